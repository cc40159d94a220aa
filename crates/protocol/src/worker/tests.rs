use brigade_base::{Hash, KvTypes, LayerRange, PassId};
use proptest::prelude::*;

use super::*;
use crate::control::ModelRef;

#[cfg(test)]
mod random;

const DEPLOYMENT: DeploymentId = DeploymentId(5);
const LEASE: Duration = Duration::from_millis(LEASE_MS);
const MEMORY: ByteSize = ByteSize(100);

fn node(n: u8) -> NodeId {
    NodeId::from_bytes([n; 32])
}

fn peer(n: u8) -> Peer {
    Peer { node: node(n), addresses: vec![format!("10.0.0.{n}:7")] }
}

fn held(applied: u64) -> Held {
    Held { applied: PassId(applied), tokens: vec![3, 0] }
}

/// Layers of a stage: four each.
fn layers(stage: u32) -> LayerRange {
    LayerRange::new(4 * stage, 4 * stage + 4).unwrap()
}

fn order(stage: u32, role: StageRole) -> StageOrder {
    let tensors = vec![(stage, Hash::from_bytes([stage as u8; 32]))];
    StageOrder { stage, layers: layers(stage), tensors, role, keep_kv: true }
}

/// Serves a stage between nodes 1 and 2.
fn serve(stage: u32) -> StageOrder {
    order(stage, StageRole::Serve { upstream: node(1), downstream: peer(2), shadow: None, kv_from: None })
}

fn with_shadow(stage: u32, by: u8) -> StageOrder {
    let mut order = serve(stage);
    if let StageRole::Serve { shadow, .. } = &mut order.role {
        *shadow = Some(peer(by));
    }
    order
}

fn taken_over(stage: u32, from: u8) -> StageOrder {
    let mut order = serve(stage);
    if let StageRole::Serve { kv_from, .. } = &mut order.role {
        *kv_from = Some(node(from));
    }
    order
}

fn standby(stage: u32, upstream: Option<u8>) -> StageOrder {
    order(stage, StageRole::Standby { upstream: upstream.map(node) })
}

fn hand_over(stage: u32, to: u8) -> StageOrder {
    order(stage, StageRole::HandOver { to: peer(to) })
}

fn without_kv(order: StageOrder) -> StageOrder {
    StageOrder { keep_kv: false, ..order }
}

fn assign(epoch: u64, revision: u32, stages: Vec<StageOrder>) -> Assign {
    let model = ModelRef {
        name: "m".into(),
        header_hash: Hash::from_bytes([9; 32]),
        header: Vec::new(),
        context: 64,
        sessions: 2,
        max_rows: 16,
        kv: KvTypes::default(),
        adapters: None,
    };
    let model = Some(model).filter(|_| !stages.is_empty());
    Assign { deployment: DEPLOYMENT, epoch: Epoch(epoch), revision, model, stages }
}

fn attach(epoch: u64, stage: u32, feed: Feed) -> Attach {
    Attach { deployment: DEPLOYMENT, epoch: Epoch(epoch), stage, feed }
}

/// A worker whose loads and dials a test answers.
struct Worker {
    stages: Stages,
    now: Instant,
    links: u64,
    /// All that was to be done, and not yet looked at.
    actions: Vec<Action>,
}

impl Worker {
    fn new() -> Self {
        let mut worker = Self { stages: Stages::new(), now: Instant::now(), links: 1000, actions: Vec::new() };
        worker.tell(Input::CoordinatorHere);
        worker
    }

    fn tell(&mut self, input: Input) {
        self.actions.extend(self.stages.handle(self.now, input));
    }

    fn assign(&mut self, epoch: u64, revision: u32, stages: Vec<StageOrder>) {
        self.tell(Input::Assign(Box::new(assign(epoch, revision, stages))));
    }

    fn join(&mut self, epoch: u64) {
        self.tell(Input::Join { deployment: DEPLOYMENT, epoch: Epoch(epoch) });
    }

    fn wait(&mut self, span: Duration) {
        self.now += span;
        self.tell(Input::Tick);
    }

    fn actions(&mut self) -> Vec<Action> {
        mem::take(&mut self.actions)
    }

    /// Looks for an action of a kind among those not yet looked at.
    fn find<T>(&mut self, pick: impl Fn(&Action) -> Option<T>) -> Option<T> {
        let at = self.actions.iter().position(|action| pick(action).is_some())?;
        pick(&self.actions.remove(at))
    }

    fn next_load(&mut self) -> Option<(HoldId, LayerRange)> {
        self.find(|action| if let Action::Load(load) = action { Some((load.id, load.key.layers)) } else { None })
    }

    fn told(&mut self) -> Option<ToCoordinator> {
        self.find(|action| if let Action::Tell(message) = action { Some(message.clone()) } else { None })
    }

    /// Loads all that is to be loaded; the last one's name.
    fn load(&mut self) -> HoldId {
        let mut last = None;
        while let Some((id, _)) = self.next_load() {
            self.tell(Input::Loaded(id, Ok(MEMORY)));
            last = Some(id);
        }
        last.unwrap()
    }

    fn link(&mut self) -> LinkId {
        self.links += 1;
        LinkId(self.links)
    }

    /// Answers the next dial, which has to be this one.
    fn answer(&mut self, to: u8, expected: Attach, reached: bool) -> LinkId {
        let dial =
            |action: &Action| if let Action::Dial(id, peer, at) = action { Some((*id, peer.node, *at)) } else { None };
        let (id, who, at) = self.find(dial).unwrap_or_else(|| panic!("no dial among {:?}", self.actions));
        assert_eq!((who, at), (node(to), expected));
        let link = self.link();
        self.tell(Input::Dialled(id, if reached { Ok(link) } else { Err("nobody is there".into()) }));
        link
    }

    fn comes(&mut self, from: u8, attach: Attach) -> LinkId {
        let link = self.link();
        self.tell(Input::Inbound { link, peer: node(from), attach });
        link
    }

    fn ends(&mut self, id: HoldId, end: End, held: Option<Held>) {
        self.tell(Input::Ended { id, end, held });
    }

    /// Has a stage served in an epoch, from orders on.
    fn serving(epoch: u64, stages: Vec<StageOrder>) -> (Self, HoldId) {
        let stage = stages[0].stage;
        let mut worker = Self::new();
        worker.assign(epoch, 0, stages);
        let (id, _) = worker.next_load().unwrap();
        worker.tell(Input::Loaded(id, Ok(MEMORY)));
        worker.join(epoch);
        let outbound = worker.answer(2, attach(epoch, stage + 1, Feed::Passes), true);
        let attach = attach(epoch, stage, Feed::Passes);
        let inbound = worker.comes(1, attach);
        assert!(worker.actions.contains(&Action::Serve { id, attach, inbound, outbound }), "{:?}", worker.actions);
        worker.actions();
        (worker, id)
    }
}

fn loaded(epoch: u64, stage: u32, held: Option<Held>) -> Action {
    Action::Tell(ToCoordinator::Loaded { epoch: Epoch(epoch), stage, memory: MEMORY, held })
}

#[test]
fn a_stage_is_loaded_joined_and_served() {
    let mut worker = Worker::new();
    worker.assign(1, 0, vec![serve(3)]);
    let (id, which) = worker.next_load().unwrap();
    assert_eq!(which, layers(3));
    worker.tell(Input::Progress(id, 5, 10));
    assert_eq!(worker.told(), Some(ToCoordinator::Progress { epoch: Epoch(1), stage: 3, done: 5, total: 10 }));
    worker.tell(Input::Loaded(id, Ok(MEMORY)));
    assert_eq!(worker.actions(), [loaded(1, 3, None)]);
    let inbound = worker.comes(1, attach(1, 3, Feed::Passes));
    worker.join(7);
    assert_eq!(worker.actions(), [], "of another epoch");
    worker.join(1);
    let outbound = worker.answer(2, attach(1, 4, Feed::Passes), true);
    let serve = Action::Serve { id, attach: attach(1, 3, Feed::Passes), inbound, outbound };
    assert_eq!(worker.actions(), [Action::Tell(ToCoordinator::Joined { epoch: Epoch(1), stage: 3 }), serve]);
}

#[test]
fn what_the_ring_waits_for_is_loaded_first_and_one_after_the_other() {
    let mut worker = Worker::new();
    worker.assign(1, 0, vec![standby(0, None), serve(2), serve(1)]);
    for stage in [1, 2, 0] {
        let (id, which) = worker.next_load().unwrap();
        assert_eq!((which, worker.next_load()), (layers(stage), None));
        worker.tell(Input::Loaded(id, Ok(MEMORY)));
        assert_eq!(worker.told().map(Action::Tell), Some(loaded(1, stage, None)));
    }
}

#[test]
fn a_stage_that_cannot_be_loaded_is_tried_again_when_it_is_ordered_again() {
    let mut worker = Worker::new();
    worker.assign(1, 0, vec![serve(0)]);
    let (id, _) = worker.next_load().unwrap();
    worker.tell(Input::Loaded(id, Err("no memory".into())));
    let failed = ToCoordinator::StageFailed { epoch: Epoch(1), stage: 0, reason: "no memory".into() };
    assert_eq!(worker.actions(), [Action::Tell(failed)]);
    worker.assign(2, 0, vec![serve(0)]);
    assert!(worker.next_load().is_some());
}

#[test]
fn orders_of_the_past_are_ignored() {
    let (mut worker, _) = Worker::serving(4, vec![serve(0)]);
    for (epoch, revision) in [(4, 0), (3, 9)] {
        worker.assign(epoch, revision, vec![serve(1)]);
        assert_eq!(worker.actions(), []);
    }
    worker.tell(Input::CoordinatorGone);
    worker.tell(Input::CoordinatorHere);
    worker.actions();
    worker.assign(4, 0, vec![serve(1)]);
    assert_eq!(worker.actions(), [], "nor when they come over another link");
}

#[test]
fn a_link_that_is_not_expected_is_closed() {
    let mut worker = Worker::new();
    worker.assign(2, 0, vec![serve(3), standby(5, Some(1))]);
    worker.actions();
    let refused = [
        (1, attach(1, 3, Feed::Passes)),
        (1, attach(3, 3, Feed::Passes)),
        (2, attach(2, 3, Feed::Passes)),
        (1, attach(2, 4, Feed::Passes)),
        (1, attach(2, 3, Feed::Shadow)),
        (1, attach(2, 3, Feed::Handover)),
        (1, attach(2, 5, Feed::Passes)),
        (1, Attach { deployment: DeploymentId(6), ..attach(2, 3, Feed::Passes) }),
    ];
    for (from, attach) in refused {
        let link = worker.comes(from, attach);
        assert_eq!(worker.actions(), [Action::Close(link)], "{attach:?}");
    }
    assert_eq!(worker.stages.peers().collect::<Vec<_>>(), [node(1), node(1)]);
    let first = worker.comes(1, attach(2, 3, Feed::Passes));
    worker.comes(1, attach(2, 3, Feed::Passes));
    assert_eq!(worker.actions(), [Action::Close(first)], "who comes again has lost the link before");
}

#[test]
fn a_link_that_waits_is_closed_with_its_epoch() {
    let mut worker = Worker::new();
    worker.assign(2, 0, vec![serve(3)]);
    let link = worker.comes(1, attach(2, 3, Feed::Passes));
    worker.assign(2, 1, vec![serve(3)]);
    assert!(!worker.actions().contains(&Action::Close(link)), "the ring is the same");
    worker.assign(3, 0, vec![serve(3)]);
    assert!(worker.actions().contains(&Action::Close(link)));
}

#[test]
fn a_kept_stage_keeps_its_slots_and_tells_what_they_hold() {
    let (mut worker, id) = Worker::serving(1, vec![serve(0)]);
    worker.assign(2, 0, vec![serve(0)]);
    assert_eq!(worker.actions(), [Action::Stop(id)]);
    worker.ends(id, End::Closed, Some(held(7)));
    assert_eq!(worker.actions(), [loaded(2, 0, Some(held(7)))]);
    worker.assign(3, 0, vec![without_kv(serve(0))]);
    assert_eq!(worker.actions(), [Action::Empty(id), loaded(3, 0, None)]);
}

#[test]
fn the_slots_of_another_deployment_are_emptied() {
    let (mut worker, id) = Worker::serving(9, vec![serve(0)]);
    let other = Assign { deployment: DeploymentId(6), ..assign(1, 0, vec![serve(0)]) };
    worker.tell(Input::Assign(Box::new(other)));
    worker.ends(id, End::Closed, Some(held(7)));
    assert_eq!(worker.actions(), [Action::Stop(id), Action::Empty(id), loaded(1, 0, None)]);
}

#[test]
fn what_is_not_wanted_is_freed_before_anything_is_loaded() {
    let (mut worker, id) = Worker::serving(1, vec![serve(0)]);
    worker.assign(2, 0, vec![serve(1)]);
    assert_eq!(worker.actions(), [Action::Stop(id)]);
    worker.ends(id, End::Closed, Some(held(7)));
    assert_eq!(worker.actions.remove(0), Action::Free(id));
    assert_eq!(worker.next_load().unwrap().1, layers(1));
}

#[test]
fn a_standby_is_loaded_beside_a_stage_that_serves() {
    let (mut worker, _) = Worker::serving(1, vec![serve(0)]);
    worker.assign(1, 1, vec![serve(0), standby(1, None)]);
    let (id, which) = worker.next_load().unwrap();
    assert_eq!((which, worker.actions()), (layers(1), vec![]), "the other one is not touched");
    worker.tell(Input::Loaded(id, Ok(MEMORY)));
    assert_eq!(worker.actions(), [loaded(1, 1, None)]);
    let view: Vec<_> = worker.stages.view().iter().map(|view| (view.stage, view.is_standby, view.is_running)).collect();
    assert_eq!(view, [(0, false, true), (1, true, false)]);
}

#[test]
fn a_load_that_is_given_up_is_freed_and_may_be_ordered_anew() {
    let mut worker = Worker::new();
    worker.assign(1, 0, vec![serve(0)]);
    let (first, _) = worker.next_load().unwrap();
    worker.assign(2, 0, vec![]);
    assert_eq!(worker.actions(), [Action::Free(first)]);
    worker.assign(3, 0, vec![serve(0)]);
    assert_eq!(worker.actions(), [], "the loader has not ended yet");
    worker.tell(Input::Loaded(first, Ok(MEMORY)));
    assert_eq!(worker.actions.remove(0), Action::Free(first));
    let (second, _) = worker.next_load().unwrap();
    assert_ne!(first, second);
}

#[test]
fn a_load_goes_on_for_the_next_epoch() {
    let mut worker = Worker::new();
    worker.assign(1, 0, vec![serve(0)]);
    let (id, _) = worker.next_load().unwrap();
    worker.assign(2, 0, vec![serve(0)]);
    assert_eq!(worker.actions(), []);
    worker.tell(Input::Loaded(id, Ok(MEMORY)));
    assert_eq!(worker.actions(), [loaded(2, 0, None)]);
}

#[test]
fn a_shadow_comes_and_goes_without_a_restart() {
    let (mut worker, id) = Worker::serving(1, vec![serve(0)]);
    worker.assign(1, 1, vec![with_shadow(0, 3)]);
    let link = worker.answer(3, attach(1, 1, Feed::Shadow), true);
    assert_eq!(worker.actions(), [Action::Shadow(id, Some(link))]);
    worker.assign(1, 2, vec![with_shadow(0, 3)]);
    assert_eq!(worker.actions(), [], "nothing has changed");
    worker.assign(1, 3, vec![with_shadow(0, 4)]);
    assert_eq!(worker.actions.remove(0), Action::Shadow(id, None));
    let link = worker.answer(4, attach(1, 1, Feed::Shadow), true);
    assert_eq!(worker.actions(), [Action::Shadow(id, Some(link))]);
    worker.assign(1, 4, vec![serve(0)]);
    assert_eq!(worker.actions(), [Action::Shadow(id, None)]);
}

#[test]
fn a_shadow_that_was_lost_is_dialled_again_later() {
    let (mut worker, id) = Worker::serving(1, vec![serve(0)]);
    worker.assign(1, 1, vec![with_shadow(0, 3)]);
    worker.answer(3, attach(1, 1, Feed::Shadow), false);
    assert_eq!(worker.actions(), []);
    worker.wait(REDIAL_STANDBY);
    let link = worker.answer(3, attach(1, 1, Feed::Shadow), true);
    assert_eq!(worker.actions(), [Action::Shadow(id, Some(link))]);
    worker.tell(Input::ShadowGone(link));
    assert_eq!(worker.actions(), []);
    worker.wait(REDIAL_STANDBY);
    worker.answer(3, attach(1, 1, Feed::Shadow), true);
    assert_eq!(worker.actions().len(), 1);
    worker.tell(Input::ShadowGone(link));
    assert_eq!(worker.stages.next_tick(), None, "news of an earlier link mean nothing");
}

/// A stage that stands by, fed by node 1 since epoch 1.
fn standing_by() -> (Worker, HoldId) {
    let mut worker = Worker::new();
    worker.assign(1, 0, vec![standby(0, Some(1))]);
    let id = worker.load();
    let attach = attach(1, 0, Feed::Shadow);
    let inbound = worker.comes(1, attach);
    assert_eq!(worker.actions(), [loaded(1, 0, None), Action::StandBy { id, attach, inbound }]);
    (worker, id)
}

#[test]
fn a_standby_goes_on_over_the_next_link() {
    let (mut worker, id) = standing_by();
    let attach = attach(1, 0, Feed::Shadow);
    let inbound = worker.comes(1, attach);
    worker.ends(id, End::Failed("a frame is missing".into()), Some(held(3)));
    assert_eq!(worker.actions(), [Action::StandBy { id, attach, inbound }]);
}

#[test]
fn a_standby_that_serves_first_finishes_what_has_arrived() {
    let (mut worker, id) = standing_by();
    worker.assign(2, 0, vec![serve(0)]);
    assert_eq!((worker.actions(), worker.stages.next_tick()), (vec![], Some(worker.now + DRAIN)));
    worker.ends(id, End::Closed, Some(held(3)));
    assert_eq!(worker.actions(), [loaded(2, 0, Some(held(3)))]);

    let (mut worker, id) = standing_by();
    worker.assign(2, 0, vec![serve(0)]);
    worker.wait(DRAIN);
    assert_eq!(worker.actions(), [Action::Stop(id)], "its feeder hangs");
    worker.ends(id, End::Closed, Some(held(2)));
    assert_eq!(worker.actions(), [loaded(2, 0, Some(held(2)))]);
}

#[test]
fn a_broken_ring_is_told_unless_only_a_link_closed() {
    let broke =
        |reason: &str| Action::Tell(ToCoordinator::RingBroke { epoch: Epoch(1), stage: 0, reason: reason.into() });
    let (mut worker, id) = Worker::serving(1, vec![serve(0)]);
    worker.ends(id, End::Closed, Some(held(3)));
    assert_eq!(worker.actions(), []);
    worker.comes(1, attach(1, 0, Feed::Passes));
    assert_eq!(worker.actions(), [], "nothing goes on in this epoch");
    worker.assign(2, 0, vec![serve(0)]);
    assert_eq!(worker.find(|a| matches!(a, Action::Tell(_)).then(|| a.clone())), Some(loaded(2, 0, Some(held(3)))));

    let (mut worker, id) = Worker::serving(1, vec![serve(0)]);
    worker.ends(id, End::Failed("out of step".into()), None);
    assert_eq!(worker.actions(), [broke("out of step")]);

    let mut worker = Worker::new();
    worker.assign(1, 0, vec![serve(0)]);
    worker.load();
    worker.join(1);
    worker.actions.retain(|action| matches!(action, Action::Dial(..)));
    worker.answer(2, attach(1, 1, Feed::Passes), false);
    assert_eq!(worker.actions(), [broke("nobody is there")]);
}

#[test]
fn a_stage_with_other_neighbours_is_begun_anew_in_the_same_epoch_too() {
    let (mut worker, id) = Worker::serving(1, vec![serve(0)]);
    let role = StageRole::Serve { upstream: node(7), downstream: peer(2), shadow: None, kv_from: None };
    worker.assign(1, 1, vec![order(0, role)]);
    worker.ends(id, End::Closed, Some(held(3)));
    assert_eq!((worker.actions.remove(0), worker.actions.remove(0)), (Action::Stop(id), loaded(1, 0, Some(held(3)))));
    worker.answer(2, attach(1, 1, Feed::Passes), true);
    worker.comes(7, attach(1, 0, Feed::Passes));
    assert!(worker.actions().iter().any(|action| matches!(action, Action::Serve { .. })));
}

#[test]
fn an_answer_to_a_dial_of_the_past_is_closed() {
    let mut worker = Worker::new();
    worker.assign(1, 0, vec![serve(0)]);
    worker.load();
    worker.join(1);
    let dial = worker.find(|action| if let Action::Dial(id, ..) = action { Some(*id) } else { None }).unwrap();
    worker.assign(2, 0, vec![serve(0)]);
    worker.actions();
    worker.tell(Input::Dialled(dial, Ok(LinkId(1))));
    assert_eq!(worker.actions(), [Action::Close(LinkId(1))]);
    // A link that is up and not used yet.
    worker.join(2);
    let link = worker.answer(2, attach(2, 1, Feed::Passes), true);
    worker.actions();
    worker.assign(3, 0, vec![serve(0)]);
    assert_eq!(worker.actions(), [Action::Close(link), loaded(3, 0, None)]);
}

#[test]
fn a_node_that_leaves_hands_over_and_then_frees() {
    let (mut worker, id) = Worker::serving(1, vec![serve(0)]);
    worker.assign(2, 0, vec![hand_over(0, 3)]);
    worker.ends(id, End::Closed, Some(held(9)));
    assert_eq!(worker.actions.remove(0), Action::Stop(id));
    worker.answer(3, attach(2, 0, Feed::Handover), false);
    worker.wait(REDIAL_SUCCESSOR);
    let link = worker.answer(3, attach(2, 0, Feed::Handover), true);
    let within = HANDOVER - REDIAL_SUCCESSOR;
    assert_eq!(worker.actions(), [Action::Send { id, link, within }], "nothing is told");
    // The successor had not heard of it yet.
    worker.ends(id, End::Failed("closed".into()), Some(held(9)));
    worker.wait(REDIAL_SUCCESSOR);
    worker.answer(3, attach(2, 0, Feed::Handover), true);
    worker.actions();
    worker.ends(id, End::Done, Some(held(9)));
    assert_eq!((worker.actions(), worker.stages.next_tick()), (vec![Action::Free(id)], None));
}

#[test]
fn a_hand_over_to_nobody_ends() {
    let (mut worker, id) = Worker::serving(1, vec![serve(0)]);
    worker.assign(2, 0, vec![hand_over(0, 3), hand_over(7, 3)]);
    worker.ends(id, End::Closed, None);
    worker.actions();
    worker.wait(HANDOVER);
    assert_eq!(worker.actions(), [Action::Free(id)]);
}

#[test]
fn a_successor_takes_over_before_it_tells_what_it_holds() {
    let mut worker = Worker::new();
    worker.assign(2, 0, vec![taken_over(0, 4)]);
    let link = worker.comes(4, attach(2, 0, Feed::Handover));
    assert_eq!(worker.stages.peers().collect::<Vec<_>>(), [node(1), node(4)]);
    let id = worker.load();
    assert_eq!(worker.actions(), [Action::Receive { id, link, within: HANDOVER }]);
    worker.ends(id, End::Done, Some(held(9)));
    assert_eq!(worker.actions(), [loaded(2, 0, Some(held(9)))]);
}

#[test]
fn a_successor_waits_no_longer_than_it_may() {
    let mut worker = Worker::new();
    worker.assign(2, 0, vec![taken_over(0, 4)]);
    let id = worker.load();
    assert_eq!((worker.actions(), worker.stages.next_tick()), (vec![], Some(worker.now + HANDOVER)));
    worker.wait(HANDOVER / 2);
    let link = worker.comes(4, attach(2, 0, Feed::Handover));
    assert_eq!(worker.actions(), [Action::Receive { id, link, within: HANDOVER / 2 }]);
    worker.ends(id, End::Failed("cut off".into()), None);
    assert_eq!(worker.actions(), [loaded(2, 0, None)]);

    let mut worker = Worker::new();
    worker.assign(2, 0, vec![taken_over(0, 4)]);
    worker.load();
    worker.wait(HANDOVER);
    assert_eq!((worker.actions(), worker.stages.next_tick()), (vec![loaded(2, 0, None)], None));
}

#[test]
fn without_a_coordinator_all_stops_at_once_and_is_freed_after_the_lease() {
    let (mut worker, id) = Worker::serving(1, vec![serve(0)]);
    worker.tell(Input::CoordinatorGone);
    assert_eq!(worker.actions(), [Action::Stop(id)]);
    worker.ends(id, End::Closed, Some(held(3)));
    worker.wait(LEASE - Duration::from_millis(1));
    assert_eq!(worker.actions(), []);
    worker.tell(Input::CoordinatorHere);
    worker.wait(Duration::from_millis(1));
    assert_eq!(worker.actions(), [Action::Free(id)], "its coordinator is back, but wants nothing");
    assert_eq!(worker.stages.next_tick(), None);
}

#[test]
fn orders_within_the_lease_reuse_what_is_loaded() {
    let (mut worker, id) = Worker::serving(1, vec![serve(0)]);
    worker.tell(Input::CoordinatorGone);
    worker.ends(id, End::Closed, Some(held(3)));
    worker.tell(Input::CoordinatorHere);
    worker.actions();
    worker.assign(1 << 32 | 1, 0, vec![serve(0)]);
    assert_eq!((worker.actions(), worker.stages.next_tick()), (vec![loaded(1 << 32 | 1, 0, Some(held(3)))], None));
}

#[test]
fn who_leaves_waits_to_be_released() {
    let within = Duration::from_secs(5);
    let leave = || Input::Leave { reason: "bye".into(), within };
    let told = Action::Tell(ToCoordinator::Leave { reason: "bye".into() });
    type Then = fn(&mut Worker);
    let ways: [Then; 3] =
        [|w| w.tell(Input::Released), |w| w.wait(Duration::from_secs(5)), |w| w.tell(Input::CoordinatorGone)];
    for then in ways {
        let (mut worker, _) = Worker::serving(1, vec![serve(0)]);
        worker.tell(leave());
        worker.tell(leave());
        assert_eq!((worker.actions(), worker.stages.is_leaving()), (vec![told.clone()], true));
        then(&mut worker);
        assert!(worker.actions().contains(&Action::End));
    }
    let mut idle = Worker::new();
    idle.tell(leave());
    assert_eq!(idle.actions(), [Action::End], "it holds nothing");
    let (mut lonely, _) = Worker::serving(1, vec![serve(0)]);
    lonely.tell(Input::CoordinatorGone);
    lonely.actions();
    lonely.tell(leave());
    assert_eq!(lonely.actions(), [Action::End], "nobody is there to take over");
}

/// What a stage between two nodes is for, which may be the node itself.
fn between(upstream: u8, downstream: u8) -> StageRole {
    StageRole::Serve { upstream: node(upstream), downstream: peer(downstream), shadow: None, kv_from: None }
}

#[test]
fn a_node_may_be_its_own_neighbour() {
    let mut worker = Worker::new();
    worker.assign(1, 0, vec![order(0, between(1, 9)), order(1, between(9, 2))]);
    worker.load();
    worker.join(1);
    worker.answer(9, attach(1, 1, Feed::Passes), true);
    worker.answer(2, attach(1, 2, Feed::Passes), true);
    worker.comes(9, attach(1, 1, Feed::Passes));
    worker.comes(1, attach(1, 0, Feed::Passes));
    assert_eq!(worker.actions().iter().filter(|action| matches!(action, Action::Serve { .. })).count(), 2);
}

#[test]
fn a_stage_is_handed_over_beside_one_that_is_served_on() {
    let mut worker = Worker::new();
    worker.assign(1, 0, vec![order(0, between(1, 9)), order(1, between(9, 2))]);
    let [moved, kept] = [0, 1].map(|stage| {
        let (id, which) = worker.next_load().unwrap();
        assert_eq!(which, layers(stage));
        worker.tell(Input::Loaded(id, Ok(MEMORY)));
        id
    });
    worker.join(1);
    worker.answer(9, attach(1, 1, Feed::Passes), true);
    worker.answer(2, attach(1, 2, Feed::Passes), true);
    worker.comes(1, attach(1, 0, Feed::Passes));
    worker.comes(9, attach(1, 1, Feed::Passes));
    worker.actions();

    worker.assign(2, 0, vec![hand_over(0, 3), order(1, between(3, 2))]);
    assert_eq!(worker.actions(), [Action::Stop(moved), Action::Stop(kept)]);
    worker.ends(moved, End::Closed, Some(held(9)));
    worker.ends(kept, End::Closed, Some(held(8)));
    assert_eq!(worker.find(|a| matches!(a, Action::Tell(_)).then(|| a.clone())), Some(loaded(2, 1, Some(held(8)))));
    let link = worker.answer(3, attach(2, 0, Feed::Handover), true);
    assert_eq!(worker.actions(), [Action::Send { id: moved, link, within: HANDOVER }]);
    // The ring starts while one stage is still sent.
    worker.join(2);
    let outbound = worker.answer(2, attach(2, 2, Feed::Passes), true);
    let feed = attach(2, 1, Feed::Passes);
    let inbound = worker.comes(3, feed);
    assert!(worker.actions().contains(&Action::Serve { id: kept, attach: feed, inbound, outbound }));
    worker.ends(moved, End::Done, Some(held(9)));
    assert_eq!(worker.actions(), [Action::Free(moved)], "the other one is not touched");
    // From now on it stands by for what it gave away.
    worker.assign(2, 1, vec![without_kv(standby(0, None)), order(1, between(3, 2))]);
    assert_eq!((worker.next_load().map(|(_, which)| which), worker.actions()), (Some(layers(0)), vec![]));
}

#[test]
fn a_stage_is_taken_over_beside_one_that_is_handed_over() {
    let (mut worker, given) = Worker::serving(1, vec![serve(0)]);
    worker.assign(1, 1, vec![serve(0), standby(1, None)]);
    let taken = worker.load();
    worker.actions();
    worker.assign(2, 0, vec![hand_over(0, 3), taken_over(1, 4)]);
    worker.ends(given, End::Closed, Some(held(9)));
    let outbound = worker.answer(3, attach(2, 0, Feed::Handover), true);
    let inbound = worker.comes(4, attach(2, 1, Feed::Handover));
    let within = HANDOVER;
    let actions = worker.actions();
    assert!(actions.contains(&Action::Send { id: given, link: outbound, within }), "{actions:?}");
    assert!(actions.contains(&Action::Receive { id: taken, link: inbound, within }), "{actions:?}");
    worker.ends(taken, End::Done, Some(held(9)));
    worker.ends(given, End::Done, Some(held(9)));
    assert_eq!(worker.actions(), [loaded(2, 1, Some(held(9))), Action::Free(given)]);
}
