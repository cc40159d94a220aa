//! Each rule of the cluster, one situation at a time.

mod moving;
mod pace;

use super::*;
use brigade_base::PassId;
use brigade_plan::{Demand, ModelProfile, NodeProfile};

pub(super) const COORDINATOR: NodeId = NodeId::from_bytes([99; 32]);

pub(super) fn node(n: u8) -> NodeId {
    NodeId::from_bytes([n; 32])
}

pub(super) fn offer(mib: u64) -> Offer {
    Offer {
        name: format!("{mib}m"),
        memory: ByteSize::mib(mib),
        kv_spill: ByteSize(0),
        threads: 1,
        addresses: vec![],
        software: String::new(),
        own_copy: None,
    }
}

/// Nine layers of 100 MiB; the coordinator offers `mib`.
pub(super) fn settings(mib: u64, nodes_wanted: usize) -> Settings {
    let model = ModelProfile {
        layer_bytes: vec![100 << 20; 9],
        kv_bytes_per_token: vec![16; 9],
        head_bytes: 1 << 20,
        cut_points: (1..9).collect(),
        n_embd: 8,
        n_heads: 2,
        n_ff: 16,
        n_vocab: 100,
        ..ModelProfile::default()
    };
    Settings {
        deployment: DeploymentId(1),
        term: 0,
        coordinator: NodeProfile { id: COORDINATOR, name: "c".into(), memory: ByteSize::mib(mib), speed: None },
        model,
        demand: Demand { context: 256, parallel: 1, max_rows: 16, spread: nodes_wanted > 1, ..Demand::default() },
        nodes_wanted,
        redundancy: 1,
        shadow: false,
    }
}

fn kinds(actions: &[Action]) -> Vec<&'static str> {
    let kind = |action: &Action| match action {
        Action::Assign { orders, .. } if orders.is_empty() => "free",
        Action::Assign { .. } => "assign",
        Action::LoadTail { .. } => "load tail",
        Action::Join { .. } => "join",
        Action::StartRing { .. } => "start",
        Action::Ready { .. } => "ready",
        Action::Drain { .. } => "drain",
        Action::StopRing { .. } => "stop",
        Action::Released { .. } => "released",
        Action::GiveUp { .. } => "give up",
    };
    actions.iter().map(kind).collect()
}

/// A cluster whose nodes do at once what they are told, but for loading.
struct World {
    cluster: Cluster,
    now: Instant,
}

impl World {
    fn new(settings: Settings) -> Self {
        let mut world = Self { cluster: Cluster::new(settings), now: Instant::now() };
        world.tell(Input::Tick);
        world
    }

    /// Workers 1, 2, ... with so much memory, all ready.
    fn ready(settings: Settings, workers_mib: &[u64]) -> Self {
        let mut world = Self::new(settings);
        for (n, &mib) in (1..).zip(workers_mib) {
            world.tell(Input::Offer(node(n), offer(mib)));
        }
        world.make_ready();
        world
    }

    fn tell(&mut self, input: Input) -> Vec<Action> {
        self.cluster.handle(self.now, input)
    }

    fn kinds(&mut self, input: Input) -> Vec<&'static str> {
        kinds(&self.tell(input))
    }

    fn gone(&mut self, n: u8) -> Vec<Action> {
        self.tell(Input::Gone(node(n), "link closed".into()))
    }

    fn leave(&mut self, n: u8) -> Vec<Action> {
        self.tell(Input::Leave(node(n), "update".into()))
    }

    fn drained(&mut self) -> Vec<Action> {
        self.tell(Input::Drained(self.cluster.epoch()))
    }

    fn tick_at(&mut self, at: Instant) -> Vec<Action> {
        self.now = at;
        self.tell(Input::Tick)
    }

    /// Stages that are still on their way: worker, stage, whether it stands by.
    fn loading(&self) -> Vec<(NodeId, u32, bool)> {
        let of = |m: &Member| {
            let loading = m.stages.iter().filter(|s| matches!(s.state, StageState::Loading(_)));
            loading.map(|s| (m.id, s.stage, s.is_standby)).collect::<Vec<_>>()
        };
        self.cluster.members().iter().flat_map(of).collect()
    }

    /// Loads all that is served, with `held` in its slots.
    fn load(&mut self, held: Option<Held>) -> Vec<Action> {
        let epoch = self.cluster.epoch();
        let tail = self.cluster.plan().unwrap().stages.len() as u32 - 1;
        let mut actions = self.tell(Input::Loaded(COORDINATOR, epoch, tail, ByteSize(1), held.clone()));
        for (id, stage, _) in self.loading().into_iter().filter(|(_, _, is_standby)| !is_standby) {
            actions.extend(self.tell(Input::Loaded(id, epoch, stage, ByteSize(1), held.clone())));
        }
        actions
    }

    fn load_standbys(&mut self) -> Vec<Action> {
        let epoch = self.cluster.epoch();
        let load = |(id, stage, is_standby): (_, _, bool)| {
            assert!(is_standby);
            Input::Loaded(id, epoch, stage, ByteSize(1), None)
        };
        let inputs: Vec<Input> = self.loading().into_iter().map(load).collect();
        inputs.into_iter().flat_map(|input| self.tell(input)).collect()
    }

    /// Everything from `Loading` to `Ready`; what came of the last step.
    fn make_ready(&mut self) -> Vec<Action> {
        let epoch = self.cluster.epoch();
        self.load(None);
        let served = |m: &Member| {
            let stages = m.stages.iter().filter(|s| !s.is_standby);
            stages.map(|s| Input::Joined(m.id, epoch, s.stage)).collect::<Vec<_>>()
        };
        let joined: Vec<Input> = self.cluster.members().iter().flat_map(served).collect();
        joined.into_iter().for_each(|input| drop(self.tell(input)));
        let actions = self.tell(Input::WentAround(epoch));
        assert_eq!(kinds(&actions)[0], "ready", "{:?}", self.cluster.phase());
        actions
    }

    /// Who serves what, the coordinator last.
    fn served(&self) -> Vec<(NodeId, u32)> {
        let plan = self.cluster.plan().expect("a placement");
        plan.stages.iter().map(|stage| (stage.node, stage.layers.len())).collect()
    }

    /// Who stands by for which stage.
    fn standing_by(&self) -> Vec<(u32, NodeId)> {
        let members = self.cluster.members().iter();
        let of = |m: &Member| m.stages.iter().filter(|s| s.is_standby).map(|s| (s.stage, m.id)).collect::<Vec<_>>();
        let mut all: Vec<_> = members.flat_map(of).collect();
        all.sort_unstable();
        all
    }

    fn why_waiting(&self) -> &str {
        let Phase::Waiting(why) = self.cluster.phase() else { panic!("{:?}", self.cluster.phase()) };
        why
    }
}

/// The orders of one node in one of the actions; the last ones.
fn orders(actions: &[Action], id: NodeId) -> Vec<Order> {
    let of = |action: &Action| match action {
        Action::Assign { node, orders, .. } if *node == id => Some(orders.clone()),
        _ => None,
    };
    actions.iter().rev().find_map(of).unwrap_or_else(|| panic!("no orders for {id:?} in {actions:?}"))
}

fn released(n: u8) -> Action {
    Action::Released { node: node(n) }
}

fn gone(n: u8) -> Input {
    Input::Gone(node(n), "x".into())
}

/// The coordinator, two workers, and three layers each; none has room for another's stage.
fn three() -> World {
    World::ready(settings(600, 3), &[600, 600])
}

/// The same with room for two stages on each worker, so that they can stand by for each other.
fn roomy(shadow: bool) -> World {
    let settings = Settings { redundancy: 2, shadow, ..settings(2000, 3) };
    World::ready(settings, &[2000, 2000])
}

#[test]
fn a_model_that_fits_on_the_coordinator_needs_nobody() {
    let mut world = World { cluster: Cluster::new(settings(2000, 1)), now: Instant::now() };
    assert_eq!(world.kinds(Input::Tick), ["load tail"]);
    let actions = world.load(None);
    let start = Action::StartRing { epoch: Epoch(1), first: None, last: None, n_stages: 1, shadow: None, held: None };
    assert_eq!(actions, [start]);
    assert_eq!(world.kinds(Input::WentAround(Epoch(1))), ["ready"]);
}

#[test]
fn a_model_that_does_not_fit_waits_for_a_worker_and_says_how_much_is_missing() {
    let mut world = World::new(settings(600, 1));
    assert!(world.why_waiting().contains("missing"), "{}", world.why_waiting());
    assert_eq!(world.kinds(Input::Offer(node(1), offer(900))), ["assign", "load tail"]);
}

#[test]
fn the_ring_is_closed_through_all_nodes() {
    let mut world = World::new(settings(600, 3));
    assert!(world.tell(Input::Offer(node(1), offer(600))).is_empty());
    assert_eq!(world.why_waiting(), "2 of 3 nodes are here");
    let actions = world.tell(Input::Offer(node(2), offer(600)));
    let serve = |upstream, downstream| Role::Serve { upstream, downstream, shadow: None, kv_from: None };
    let role = |n| orders(&actions, node(n))[0].role.clone();
    assert_eq!(role(1), serve(COORDINATOR, node(2)));
    assert_eq!(role(2), serve(node(1), COORDINATOR));
    assert!(orders(&actions, node(1)).iter().all(|order| !order.keep_kv));
}

#[test]
fn epochs_begin_with_the_term() {
    let world = World::ready(Settings { term: 3, ..settings(600, 3) }, &[600, 600]);
    assert_eq!(world.cluster.epoch(), Epoch::of(3, 1));
}

#[test]
fn losing_a_worker_places_the_model_on_what_is_left() {
    let mut world = three();
    assert_eq!(kinds(&world.gone(1)), ["stop", "assign", "load tail"]);
    assert_eq!(world.cluster.epoch(), Epoch(2));
    assert_eq!(world.served(), [(node(2), 5), (COORDINATOR, 4)]);
    world.make_ready();
}

#[test]
fn losing_too_much_waits_with_what_is_left_for_a_while_and_then_frees_it() {
    let mut world = World::ready(settings(400, 3), &[600, 600]);
    let before = world.served();
    assert_eq!(kinds(&world.gone(1)), ["stop"]);
    assert!(world.why_waiting().contains("missing"));
    assert!(world.cluster.plan().is_none());
    let actions = world.tell(Input::Offer(node(1), offer(600)));
    assert_eq!(kinds(&actions), ["assign", "assign", "load tail"]);
    assert_eq!(world.served(), before);
    assert!(!orders(&actions, node(1))[0].keep_kv && orders(&actions, node(2))[0].keep_kv);
    world.make_ready();

    world.gone(1);
    let parked_until = world.cluster.next_tick().unwrap();
    assert_eq!(kinds(&world.tick_at(parked_until)), ["free"]);
    assert_eq!(world.cluster.next_tick(), None);
    let actions = world.tell(Input::Offer(node(1), offer(600)));
    assert_eq!(kinds(&actions), ["assign", "assign", "load tail"]);
    assert!(!orders(&actions, node(2))[0].keep_kv);
}

#[test]
fn a_lost_stage_goes_to_an_idle_worker_and_all_others_keep_what_they_hold() {
    let mut world = three();
    assert!(world.tell(Input::Offer(node(3), offer(600))).is_empty(), "a running ring is not disturbed");
    let actions = world.gone(1);
    assert_eq!(kinds(&actions), ["stop", "assign", "assign", "load tail"]);
    assert_eq!(world.served(), [(node(3), 3), (node(2), 3), (COORDINATOR, 3)]);
    assert!(!orders(&actions, node(3))[0].keep_kv && orders(&actions, node(2))[0].keep_kv);
    assert!(matches!(actions.last(), Some(Action::LoadTail { keep_kv: true, stage: 2, .. })), "{actions:?}");
    let plan = world.cluster.plan().unwrap();
    assert!(plan.explanation.iter().any(|line| line.contains("taken over as they are")), "{:?}", plan.explanation);
}

#[test]
fn a_lost_stage_goes_to_a_worker_that_has_one_if_there_is_room() {
    let mut world = World::ready(settings(600, 3), &[1000, 1000]);
    let served = world.served();
    let actions = world.gone(1);
    assert_eq!(world.served(), [(node(2), served[0].1), (node(2), served[1].1), served[2]]);
    let found = orders(&actions, node(2));
    let serve = |upstream, downstream| Role::Serve { upstream, downstream, shadow: None, kv_from: None };
    assert_eq!(found[0].role, serve(COORDINATOR, node(2)));
    assert_eq!(found[1].role, serve(node(2), COORDINATOR));
    assert_eq!([found[0].keep_kv, found[1].keep_kv], [false, true]);
    let member = &world.cluster.members()[0];
    assert_eq!(member.layers().unwrap().to_string(), format!("0..{}", served[0].1 + served[1].1));
    let actions = world.load(None);
    assert_eq!(kinds(&actions), ["join", "start"], "once for each node");
    world.make_ready();
}

#[test]
fn what_all_stages_hold_is_told_when_the_ring_starts() {
    let held = |pass, tokens: &[u32]| Held { applied: PassId(pass), tokens: tokens.to_vec() };
    let told = |first: Option<Held>| {
        let mut world = three();
        world.tell(Input::RingBroke(None, Epoch(1), "closed".into()));
        world.tick_at(world.cluster.next_tick().unwrap());
        world.tell(Input::Loaded(COORDINATOR, Epoch(2), 2, ByteSize(1), Some(held(9, &[7, 5, 9]))));
        world.tell(Input::Loaded(node(1), Epoch(2), 0, ByteSize(1), first));
        let actions = world.tell(Input::Loaded(node(2), Epoch(2), 1, ByteSize(1), Some(held(8, &[7, 6, 1]))));
        let Some(Action::StartRing { held, .. }) = actions.last() else { panic!("{actions:?}") };
        held.clone()
    };
    assert_eq!(told(Some(held(10, &[8, 4, 2]))), Some(held(8, &[7, 4, 1])));
    assert_eq!(told(Some(held(10, &[8]))), Some(held(8, &[7])));
    assert_eq!(told(None), None);
}

#[test]
fn a_broken_ring_waits_a_moment_for_the_news_of_who_is_gone() {
    let mut world = three();
    assert_eq!(world.kinds(Input::RingBroke(None, Epoch(1), "closed".into())), ["stop"]);
    assert!(world.tell(Input::Tick).is_empty());
    assert_eq!(kinds(&world.gone(2)), ["assign", "load tail"]);
    assert!(world.cluster.next_tick().is_none());
}

#[test]
fn a_broken_ring_without_a_loss_is_placed_again_with_all() {
    for broken in [Input::RingBroke(None, Epoch(1), "x".into()), Input::Stuck(None, Epoch(1), "x".into())] {
        let mut world = three();
        assert_eq!(world.kinds(broken), ["stop"]);
        let actions = world.tick_at(world.cluster.next_tick().unwrap());
        assert_eq!(kinds(&actions), ["assign", "assign", "load tail"]);
        assert!([1, 2].iter().all(|&n| orders(&actions, node(n))[0].keep_kv));
        world.make_ready();
    }
}

#[test]
fn a_node_at_which_a_pass_is_stuck_is_replaced_at_once() {
    let mut world = three();
    world.tell(Input::Offer(node(3), offer(600)));
    let actions = world.tell(Input::Stuck(Some(node(2)), Epoch(1), "pass 7 is late".into()));
    assert_eq!(kinds(&actions), ["stop", "assign", "free", "assign", "load tail"]);
    assert_eq!(world.served(), [(node(1), 3), (node(3), 3), (COORDINATOR, 3)]);
}

#[test]
fn a_worker_that_never_reaches_the_next_is_left_out_after_some_tries() {
    let mut world = three();
    let mut waits = Vec::new();
    loop {
        world.load(None);
        let epoch = world.cluster.epoch();
        world.tell(Input::RingBroke(Some(node(1)), epoch, "no route".into()));
        let Some(until) = world.cluster.next_tick() else { break };
        waits.push((until - world.now).as_millis());
        world.tick_at(until);
    }
    assert_eq!(waits, [300, 600, 1200, 2400]);
    let member = world.cluster.members().iter().find(|m| m.id == node(1)).unwrap();
    assert_eq!(member.state, MemberState::Failed("no route".into()));
    assert_eq!(world.cluster.plan().unwrap().stages.len(), 2);
}

#[test]
fn a_node_whose_stage_fails_is_left_out_until_it_comes_anew() {
    let mut world = three();
    let actions = world.tell(Input::StageFailed(node(1), Epoch(1), 0, "no memory".into()));
    assert_eq!(kinds(&actions), ["stop", "free", "assign", "load tail"]);
    assert_eq!(world.cluster.plan().unwrap().stages.len(), 2);
    assert!(world.tell(Input::Offer(node(1), offer(600))).is_empty(), "the placement stands");
}

#[test]
fn nodes_that_were_left_out_get_another_chance_while_the_model_does_not_fit_without_them() {
    let mut world = World::ready(settings(400, 3), &[600, 600]);
    assert_eq!(world.kinds(Input::StageFailed(node(1), Epoch(1), 0, "disk full".into())), ["stop"]);
    assert!(world.why_waiting().contains("disk full"), "{}", world.why_waiting());
    let actions = world.tick_at(world.cluster.next_tick().unwrap());
    assert_eq!(kinds(&actions), ["assign", "assign", "load tail"]);
    world.make_ready();
}

#[test]
fn a_worker_that_comes_back_while_it_was_not_missed_is_a_loss_all_the_same() {
    let mut world = three();
    let actions = world.tell(Input::Offer(node(1), offer(600)));
    assert_eq!(kinds(&actions), ["stop", "assign", "assign", "load tail"]);
    assert!(!orders(&actions, node(1))[0].keep_kv && orders(&actions, node(2))[0].keep_kv);
}

#[test]
fn a_pinned_split_waits_for_a_worker_unless_one_stands_by() {
    for redundancy in [1, 2] {
        let mut settings = Settings { redundancy, ..settings(2000, 3) };
        settings.demand.split = Some(vec![3, 3, 3]);
        let mut world = World::ready(settings, &[2000, 2000]);
        if redundancy == 2 {
            assert_eq!(world.standing_by(), [(0, node(2)), (1, node(1))]);
            world.load_standbys();
            world.gone(1);
            assert_eq!(world.served(), [(node(2), 3), (node(2), 3), (COORDINATOR, 3)]);
            continue;
        }
        world.gone(1);
        assert!(world.why_waiting().contains("1 more must join"), "{}", world.why_waiting());
        world.tell(Input::Offer(node(1), offer(2000)));
        assert_eq!(world.served(), [(node(1), 3), (node(2), 3), (COORDINATOR, 3)]);
    }
}

#[test]
fn news_of_an_old_epoch_change_nothing() {
    let mut world = three();
    world.gone(1);
    for input in [
        Input::Loaded(node(2), Epoch(1), 1, ByteSize(1), None),
        Input::Joined(node(2), Epoch(1), 1),
        Input::StageFailed(node(2), Epoch(1), 1, "late".into()),
        Input::RingBroke(None, Epoch(1), "late".into()),
        Input::Stuck(Some(node(2)), Epoch(1), "late".into()),
        Input::WentAround(Epoch(1)),
        Input::Drained(Epoch(1)),
    ] {
        assert!(world.tell(input).is_empty());
    }
    assert_eq!(world.cluster.phase(), &Phase::Loading);
}

#[test]
fn the_coordinators_own_failure_is_final() {
    let mut world = World::new(settings(2000, 1));
    let actions = world.tell(Input::StageFailed(COORDINATOR, Epoch(1), 0, "bad file".into()));
    assert_eq!(kinds(&actions), ["stop", "give up"]);
    assert!(world.tell(Input::Offer(node(1), offer(600))).is_empty());
}

#[test]
fn neighbours_stand_by_for_each_other_once_the_ring_is_ready() {
    let mut world = World::new(Settings { redundancy: 2, ..settings(2000, 3) });
    world.tell(Input::Offer(node(1), offer(2000)));
    let loading = world.tell(Input::Offer(node(2), offer(2000)));
    assert!(world.standing_by().is_empty());
    let actions = world.make_ready();
    assert_eq!(kinds(&actions), ["ready", "assign", "assign"]);
    assert_eq!(world.standing_by(), [(0, node(2)), (1, node(1))]);
    let found = orders(&actions, node(1));
    assert_eq!(found[0], orders(&loading, node(1))[0], "what it serves stays as it is");
    assert_eq!(found[1].role, Role::Standby { upstream: None });
    assert!(actions.iter().all(|a| !matches!(a, Action::Assign { revision, .. } if *revision != 2)));
    assert!(world.load_standbys().is_empty());
    let lines = &world.cluster.plan().unwrap().explanation;
    assert!(lines.iter().any(|line| line.starts_with("2000m stands by for layers 0..")), "{lines:?}");
}

#[test]
fn a_standby_takes_over_and_serves_at_once() {
    let mut world = roomy(false);
    world.load_standbys();
    let served = world.served();
    let actions = world.gone(1);
    assert_eq!(kinds(&actions), ["stop", "assign", "load tail"]);
    assert_eq!(world.served(), [(node(2), served[0].1), served[1], served[2]]);
    assert!(orders(&actions, node(2)).iter().all(|order| order.keep_kv));
    world.make_ready();
    assert!(world.standing_by().is_empty());
    world.tell(Input::Offer(node(1), offer(2000)));
    assert_eq!(world.standing_by(), [(0, node(1)), (1, node(1))]);
}

#[test]
fn who_stands_by_for_a_lost_stage_gets_no_other_one_without_room_for_both() {
    let mut world = World::ready(Settings { redundancy: 2, ..settings(600, 3) }, &[2000, 2000]);
    world.load_standbys();
    world.gone(2);
    world.make_ready();
    assert_eq!(world.served()[..2], [(node(1), 4), (node(1), 4)]);
    for n in [3, 4] {
        world.tell(Input::Offer(node(n), offer(600)));
    }
    world.load_standbys();
    assert_eq!(world.standing_by(), [(0, node(3)), (1, node(4))]);
    world.gone(3);
    world.gone(1);
    let n_layers: u32 = world.served().iter().filter(|(id, _)| *id == node(4)).map(|(_, n)| n).sum();
    assert!(n_layers <= 5, "600 MiB do not hold {n_layers} layers");
}

#[test]
fn an_idle_worker_stands_by_first() {
    let settings = Settings { redundancy: 2, ..settings(600, 2) };
    let mut world = World::new(settings);
    world.tell(Input::Offer(node(1), offer(2000)));
    world.make_ready();
    assert!(world.standing_by().is_empty());
    world.tell(Input::Offer(node(2), offer(2000)));
    assert_eq!(world.standing_by(), [(0, node(2))]);
    assert!(kinds(&world.gone(2)).is_empty(), "the ring does not need it");
    assert!(world.standing_by().is_empty());
}

#[test]
fn a_standby_that_fails_never_touches_the_ring_and_is_asked_again_later() {
    let mut world = roomy(false);
    let actions = world.tell(Input::StageFailed(node(2), Epoch(1), 0, "disk full".into()));
    assert_eq!(kinds(&actions), ["assign"]);
    assert_eq!(orders(&actions, node(2)).len(), 1);
    assert_eq!((world.cluster.phase(), world.cluster.epoch()), (&Phase::Ready, Epoch(1)));
    assert_eq!(world.standing_by(), [(1, node(1))]);
    let retry = world.cluster.next_tick().unwrap();
    assert_eq!(retry - world.now, RETRY);
    assert_eq!(kinds(&world.tick_at(retry)), ["assign"]);
    assert_eq!(world.standing_by(), [(0, node(2)), (1, node(1))]);
}

#[test]
fn the_stage_before_feeds_a_shadow_once_it_is_loaded() {
    let mut world = roomy(true);
    let shadow = |orders: &[Order]| match &orders[0].role {
        Role::Serve { shadow, .. } => *shadow,
        other => panic!("{other:?}"),
    };
    let actions = world.tell(Input::Loaded(node(1), Epoch(1), 1, ByteSize(1), None));
    // Worker 1 serves stage 0 and stands by for stage 1, whose frames are its own.
    assert_eq!(kinds(&actions), ["assign"]);
    let found = orders(&actions, node(1));
    assert_eq!(shadow(&found), Some(node(1)));
    assert_eq!(found[1].role, Role::Standby { upstream: Some(node(1)) });
    // The coordinator feeds the one for stage 0 from the next start on.
    assert!(world.tell(Input::Loaded(node(2), Epoch(1), 0, ByteSize(1), None)).is_empty());
    world.tell(Input::RingBroke(None, Epoch(1), "closed".into()));
    let actions = world.tick_at(world.cluster.next_tick().unwrap());
    assert_eq!(shadow(&orders(&actions, node(1))), Some(node(1)), "it was loaded before");
    let actions = world.load(None);
    assert!(
        matches!(actions.last(), Some(Action::StartRing { shadow: Some(id), .. }) if *id == node(2)),
        "{actions:?}"
    );
}

#[test]
fn who_serves_nothing_is_released_at_once() {
    let mut world = three();
    world.tell(Input::Offer(node(3), offer(600)));
    assert_eq!(world.leave(3), [released(3)]);
    assert_eq!(world.leave(3), [released(3)], "the answer may have been lost");
    world.gone(1);
    assert_eq!(world.served(), [(node(2), 5), (COORDINATOR, 4)], "it is never chosen again");
    assert!(world.leave(8).is_empty(), "nobody knows it");
}

#[test]
fn who_stands_by_is_released_at_once() {
    let settings = Settings { redundancy: 2, ..settings(600, 2) };
    let mut world = World::ready(settings, &[2000]);
    world.tell(Input::Offer(node(2), offer(2000)));
    let actions = world.leave(2);
    assert_eq!(kinds(&actions), ["free", "released"]);
    assert!(world.standing_by().is_empty());
}

#[test]
fn who_leaves_hands_over_to_a_node_that_is_loaded() {
    let mut world = three();
    world.tell(Input::Offer(node(3), offer(600)));
    let actions = world.leave(1);
    assert_eq!(kinds(&actions), ["assign"]);
    assert_eq!(orders(&actions, node(3))[0].role, Role::Standby { upstream: None });
    assert_eq!(kinds(&world.load_standbys()), ["drain"]);
    assert_eq!(world.cluster.phase(), &Phase::Draining("node 600m leaves".into()));

    let actions = world.drained();
    assert_eq!(kinds(&actions), ["stop", "assign", "assign", "assign", "load tail"]);
    assert_eq!(orders(&actions, node(1))[0].role, Role::HandOver { to: node(3) });
    let serve = Role::Serve { upstream: COORDINATOR, downstream: node(2), shadow: None, kv_from: Some(node(1)) };
    assert_eq!(orders(&actions, node(3))[0].role, serve);
    assert!(orders(&actions, node(2))[0].keep_kv);
    let actions = world.make_ready();
    assert_eq!(actions[1..], [assign_nothing(2, 2, 1), released(1)], "others keep their orders as they are");
    assert!(world.gone(1).is_empty());
    assert_eq!(world.cluster.phase(), &Phase::Ready);
}

fn assign_nothing(epoch: u64, revision: u32, n: u8) -> Action {
    Action::Assign { node: node(n), epoch: Epoch(epoch), revision, orders: vec![] }
}

#[test]
fn who_dies_while_it_hands_over_is_not_waited_for() {
    let mut world = three();
    world.tell(Input::Offer(node(3), offer(600)));
    world.leave(1);
    world.load_standbys();
    world.drained();
    let actions = world.gone(1);
    assert_eq!(kinds(&actions), ["assign"]);
    assert!(matches!(orders(&actions, node(3))[0].role, Role::Serve { kv_from: None, .. }));
    world.make_ready();
}

#[test]
fn a_hand_over_that_fails_is_not_waited_for() {
    let mut world = three();
    world.tell(Input::Offer(node(3), offer(600)));
    world.leave(1);
    world.load_standbys();
    world.drained();
    let actions = world.tell(Input::StageFailed(node(1), Epoch(2), 0, "nothing there".into()));
    assert_eq!(kinds(&actions), ["free", "assign"]);
    assert!(world.make_ready().contains(&released(1)));
}

#[test]
fn a_loss_while_somebody_leaves_takes_its_stage_too_if_another_is_ready() {
    let mut world = three();
    world.tell(Input::Offer(node(3), offer(600)));
    world.tell(Input::Offer(node(4), offer(600)));
    world.leave(1);
    world.load_standbys();
    let actions = world.gone(2);
    assert_eq!(world.served()[..2], [(node(3), 3), (node(4), 3)]);
    assert_eq!(orders(&actions, node(1))[0].role, Role::HandOver { to: node(3) });
    assert!(world.make_ready().contains(&released(1)));
}

#[test]
fn who_leaves_serves_on_while_nobody_can_take_its_place() {
    let mut world = World::ready(settings(400, 3), &[600, 600]);
    assert!(world.leave(1).is_empty(), "the model does not fit without it");
    assert_eq!(world.cluster.phase(), &Phase::Ready);
    let actions = world.tell(Input::Offer(node(3), offer(600)));
    assert_eq!(kinds(&actions), ["assign"], "now another one can stand in");
    let actions = world.tell(Input::RingBroke(None, Epoch(1), "x".into()));
    assert_eq!(kinds(&actions), ["stop"]);
    world.tick_at(world.now + SETTLE);
    assert_eq!(world.served()[0].0, node(1), "the other one has not loaded yet");
    world.make_ready();
    assert_eq!(kinds(&world.load_standbys()), ["drain"]);
}

#[test]
fn without_room_for_its_stage_the_model_is_placed_without_who_leaves() {
    let mut world = three();
    assert_eq!(kinds(&world.leave(1)), ["drain"]);
    let actions = world.drained();
    assert_eq!(kinds(&actions), ["stop", "free", "assign", "load tail"]);
    assert_eq!(world.served(), [(node(2), 5), (COORDINATOR, 4)]);
    assert_eq!(world.make_ready()[1..], [released(1)]);
}

#[test]
fn who_loads_too_long_in_place_of_who_leaves_is_not_waited_for() {
    let mut world = three();
    world.tell(Input::Offer(node(3), offer(600)));
    world.leave(1);
    let until = world.cluster.next_tick().unwrap();
    assert_eq!((until - world.now).as_secs(), 120);
    assert_eq!(kinds(&world.tick_at(until)), ["drain"]);
    world.drained();
    assert_eq!(world.served()[0].0, node(3));
    assert!(world.make_ready().contains(&released(1)));
}

#[test]
fn a_node_that_cannot_load_in_place_of_who_leaves_is_asked_again() {
    let mut world = three();
    world.tell(Input::Offer(node(3), offer(600)));
    world.leave(1);
    assert_eq!(world.kinds(Input::StageFailed(node(3), Epoch(1), 0, "disk full".into())), ["free"]);
    assert_eq!(world.cluster.phase(), &Phase::Ready);
    let actions = world.tick_at(world.cluster.next_tick().unwrap());
    assert_eq!(kinds(&actions), ["assign"]);
    assert_eq!(kinds(&world.load_standbys()), ["drain"]);
}

#[test]
fn all_workers_may_leave_one_after_the_other() {
    let mut world = three();
    for n in 3..9 {
        world.tell(Input::Offer(node(n), offer(600)));
        world.leave(n - 2);
        world.load_standbys();
        world.drained();
        assert!(world.make_ready().contains(&released(n - 2)));
        assert!(world.gone(n - 2).is_empty());
    }
    assert_eq!(world.cluster.epoch(), Epoch(7));
}

#[test]
fn two_may_leave_at_once() {
    let mut world = three();
    world.tell(Input::Offer(node(3), offer(600)));
    world.tell(Input::Offer(node(4), offer(600)));
    world.leave(1);
    world.leave(2);
    let mut actions = Vec::new();
    while world.cluster.members().iter().any(|m| m.state == MemberState::Leaving && !m.stages.is_empty()) {
        world.load_standbys();
        world.drained();
        actions.extend(world.make_ready());
    }
    assert!(actions.contains(&released(1)) && actions.contains(&released(2)), "{actions:?}");
}

#[test]
fn without_a_majority_workers_are_left_alone() {
    let mut world = three();
    assert_eq!(world.kinds(Input::Quorum(false)), ["stop"]);
    assert!(world.why_waiting().starts_with("a majority of the cluster's nodes is not in reach"));
    assert!(world.tell(Input::Offer(node(3), offer(900))).is_empty());
    let actions = world.tell(Input::Quorum(true));
    assert_eq!(kinds(&actions), ["assign", "assign", "load tail"]);
    assert!([1, 2].iter().all(|&n| orders(&actions, node(n))[0].keep_kv));
    assert!(world.tell(Input::Quorum(true)).is_empty());
}

#[test]
fn without_a_majority_the_coordinator_serves_alone_if_it_can() {
    let mut world = World::ready(settings(2000, 3), &[2000, 2000]);
    assert_eq!(world.kinds(Input::Quorum(false)), ["stop", "free", "free", "load tail"]);
    assert_eq!(world.served(), [(COORDINATOR, 9)]);
    world.make_ready();
    let actions = world.tell(Input::Quorum(true));
    assert_eq!(kinds(&actions), ["stop", "assign", "assign", "load tail"]);
    assert_eq!(world.served().len(), 3);

    let mut world = World::new(settings(2000, 3));
    world.tell(Input::Quorum(false));
    assert!(world.why_waiting().contains("a majority"), "others are wanted for the first placement");
}

#[test]
fn a_lone_coordinator_needs_no_majority() {
    let mut world = World::ready(settings(2000, 1), &[]);
    assert!(world.tell(Input::Quorum(false)).is_empty());
    assert!(world.tell(Input::Quorum(true)).is_empty());
    assert_eq!(world.cluster.phase(), &Phase::Ready);
}

#[test]
fn a_loss_is_taken_in_every_phase() {
    for steps in 0..5 {
        let mut world = World::new(settings(600, 3));
        world.tell(Input::Offer(node(1), offer(600)));
        world.tell(Input::Offer(node(2), offer(600)));
        if steps > 0 {
            world.load(None);
        }
        if steps > 1 {
            world.tell(Input::Joined(node(1), Epoch(1), 0));
            world.tell(Input::Joined(node(2), Epoch(1), 1));
        }
        if steps > 2 {
            world.tell(Input::WentAround(Epoch(1)));
        }
        if steps > 3 {
            assert_eq!(kinds(&world.leave(1)), ["drain"]);
        }
        let lost = if steps > 3 { 1 } else { 2 };
        assert_eq!(world.kinds(gone(lost)), ["stop", "assign", "load tail"], "after {steps} steps");
        world.make_ready();
    }
}
