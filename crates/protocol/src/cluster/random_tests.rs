//! Whatever happens in whatever order, what the cluster tells the nodes makes a whole ring.

use std::collections::HashMap;

use super::tests::{COORDINATOR, node, offer, settings};
use super::*;
use brigade_base::PassId;
use proptest::prelude::*;

const N_WORKERS: u8 = 5;

/// What happens next; numbers choose among what can.
#[derive(Debug, Clone)]
enum Event {
    Offer {
        n: u8,
        mib: u64,
    },
    Gone {
        n: u8,
    },
    Leave {
        n: u8,
    },
    /// The next thing that the cluster waits for, done by the n-th of those who have something to do.
    GoOn {
        n: usize,
    },
    /// Everything that it waits for, until nothing is to be done.
    Settle,
    StageFailed {
        n: u8,
        stage: u32,
    },
    Broke {
        by: u8,
    },
    Stuck {
        by: u8,
    },
    Quorum(bool),
    /// Time passes until the next deadline.
    Tick,
    /// News of an epoch before.
    Late {
        n: u8,
        stage: u32,
    },
}

fn offer_of(n: std::ops::RangeInclusive<u8>) -> impl Strategy<Value = Event> {
    (n, prop::sample::select(vec![300u64, 500, 700, 1300])).prop_map(|(n, mib)| Event::Offer { n, mib })
}

fn event() -> impl Strategy<Value = Event> {
    let n = 1..=N_WORKERS;
    let by = 0..=N_WORKERS;
    prop_oneof![
        4 => offer_of(n.clone()),
        2 => n.clone().prop_map(|n| Event::Gone { n }),
        2 => n.clone().prop_map(|n| Event::Leave { n }),
        8 => any::<usize>().prop_map(|n| Event::GoOn { n }),
        6 => Just(Event::Settle),
        1 => (n.clone(), 0u32..4).prop_map(|(n, stage)| Event::StageFailed { n, stage }),
        1 => by.clone().prop_map(|by| Event::Broke { by }),
        1 => by.prop_map(|by| Event::Stuck { by }),
        1 => any::<bool>().prop_map(Event::Quorum),
        3 => Just(Event::Tick),
        1 => (n, 0u32..4).prop_map(|(n, stage)| Event::Late { n, stage }),
    ]
}

/// What a worker was last told.
#[derive(Default)]
struct Told {
    epoch: Epoch,
    revision: u32,
    orders: Vec<Order>,
    /// Stages that are loaded and joined in this epoch.
    done: HashMap<u32, u8>,
}

struct World {
    cluster: Cluster,
    now: Instant,
    here: HashMap<NodeId, Told>,
    tail: Option<(Epoch, u32, LayerRange)>,
    tail_loaded: bool,
    is_started: bool,
    is_draining: bool,
    released: Vec<NodeId>,
}

impl World {
    fn feed(&mut self, input: Input) {
        let actions = self.cluster.handle(self.now, input);
        for action in actions {
            self.apply(action);
        }
        self.check();
    }

    fn apply(&mut self, action: Action) {
        match action {
            Action::Assign { node, epoch, revision, orders } => {
                let told = self.here.get_mut(&node).expect("orders for a node that is gone");
                assert!(!self.released.contains(&node) || orders.is_empty(), "orders for a node that was released");
                assert!((epoch, revision) > (told.epoch, told.revision), "orders do not get newer");
                assert_eq!(epoch, self.cluster.epoch());
                let is_new = epoch != told.epoch;
                let same =
                    |order: &Order| told.orders.iter().any(|o| (o.stage, o.layers) == (order.stage, order.layers));
                let kept = |stage: &u32| !is_new && orders.iter().any(|o| o.stage == *stage && same(o));
                let done = told.done.iter().filter(|(stage, _)| kept(stage)).map(|(&stage, &n)| (stage, n)).collect();
                *told = Told { epoch, revision, orders, done };
            }
            Action::LoadTail { epoch, stage, layers, .. } => {
                self.tail = Some((epoch, stage, layers));
                (self.tail_loaded, self.is_started, self.is_draining) = (false, false, false);
            }
            Action::Join { node, .. } => assert!(self.here.contains_key(&node)),
            Action::StartRing { epoch, first, last, n_stages, .. } => {
                assert_eq!(Some((epoch, n_stages)), self.tail.map(|(epoch, stage, _)| (epoch, stage + 1)));
                assert_eq!(first.is_some(), n_stages > 1);
                assert!([first, last].iter().flatten().all(|id| self.here.contains_key(id)));
                self.is_started = true;
            }
            Action::Ready { epoch } => assert!(self.is_started && epoch == self.cluster.epoch()),
            Action::Drain { .. } => self.is_draining = true,
            Action::StopRing { .. } => (self.is_started, self.is_draining) = (false, false),
            Action::Released { node } => {
                assert!(self.here[&node].orders.is_empty(), "a node was released with stages");
                self.released.push(node);
            }
            Action::GiveUp { .. } => unreachable!("the coordinator's stage does not fail here"),
        }
    }

    /// Each stage of a placement has one holder, and together they have all layers.
    fn check(&self) {
        let placed = !matches!(self.cluster.phase(), Phase::Waiting(_) | Phase::Settling(_));
        assert_eq!(placed, self.cluster.plan().is_some() && !matches!(self.cluster.phase(), Phase::Settling(_)));
        if !placed {
            return;
        }
        let epoch = self.cluster.epoch();
        let current = self.here.iter().filter(|(_, told)| told.epoch == epoch);
        let mut serving = Vec::new();
        for (&id, told) in current {
            for order in &told.orders {
                if let Role::Serve { upstream, downstream, .. } = order.role {
                    serving.push((order.stage, order.layers, id, upstream, downstream));
                }
            }
        }
        serving.sort_unstable_by_key(|&(stage, ..)| stage);
        let (tail_epoch, tail_stage, tail) = self.tail.expect("a tail");
        assert_eq!((tail_epoch, tail_stage as usize), (epoch, serving.len()));
        let mut next = 0;
        let ring: Vec<NodeId> = serving.iter().map(|&(_, _, id, ..)| id).chain([COORDINATOR]).collect();
        for (k, &(stage, layers, _, upstream, downstream)) in serving.iter().enumerate() {
            assert_eq!((stage as usize, layers.start()), (k, next));
            assert_eq!((upstream, downstream), (ring[(k + ring.len() - 1) % ring.len()], ring[k + 1]));
            next = layers.end();
        }
        assert_eq!((tail.start(), tail.end()), (next, 9));
    }

    /// What can be told next.
    fn pending(&self) -> Vec<Input> {
        let mut inputs = Vec::new();
        let epoch = self.cluster.epoch();
        let mut ids: Vec<_> = self.here.keys().copied().collect();
        ids.sort_unstable();
        for id in ids {
            let told = &self.here[&id];
            for order in told.orders.iter().filter(|_| told.epoch == epoch) {
                let stage = order.stage;
                let held = order.keep_kv.then(|| Held { applied: PassId(1), tokens: vec![1] });
                match (told.done.get(&stage), &order.role) {
                    (_, Role::HandOver { .. }) => {}
                    (None, _) => inputs.push(Input::Loaded(id, epoch, stage, ByteSize(1), held)),
                    (Some(1), Role::Serve { .. }) if self.is_started => inputs.push(Input::Joined(id, epoch, stage)),
                    _ => {}
                }
            }
        }
        if let Some((epoch, stage, _)) = self.tail.filter(|_| !self.tail_loaded) {
            inputs.push(Input::Loaded(COORDINATOR, epoch, stage, ByteSize(1), None));
        }
        if self.is_started && *self.cluster.phase() == Phase::Probing {
            inputs.push(Input::WentAround(epoch));
        }
        if self.is_draining {
            inputs.push(Input::Drained(epoch));
        }
        inputs
    }

    fn go_on(&mut self, n: usize) -> bool {
        let mut pending = self.pending();
        if pending.is_empty() {
            return false;
        }
        let input = pending.swap_remove(n % pending.len());
        match &input {
            Input::Loaded(COORDINATOR, ..) => self.tail_loaded = true,
            Input::Loaded(id, _, stage, ..) => drop(self.here.get_mut(id).map(|told| told.done.insert(*stage, 1))),
            Input::Joined(id, _, stage) => drop(self.here.get_mut(id).map(|told| told.done.insert(*stage, 2))),
            Input::Drained(_) => self.is_draining = false,
            _ => {}
        }
        self.feed(input);
        true
    }

    fn happen(&mut self, event: &Event) {
        let epoch = self.cluster.epoch();
        let by = |n: u8| (n > 0).then(|| node(n));
        match *event {
            Event::Offer { n, mib } => {
                self.here.insert(node(n), Told::default());
                self.released.retain(|&id| id != node(n));
                self.feed(Input::Offer(node(n), offer(mib)));
            }
            Event::Gone { n } => {
                if self.here.remove(&node(n)).is_some() {
                    self.released.retain(|&id| id != node(n));
                    self.feed(Input::Gone(node(n), "gone".into()));
                }
            }
            Event::Leave { n } => self.feed(Input::Leave(node(n), "leave".into())),
            Event::GoOn { n } => drop(self.go_on(n)),
            Event::Settle => self.settle(),
            Event::StageFailed { n, stage } => self.feed(Input::StageFailed(node(n), epoch, stage, "failed".into())),
            Event::Broke { by: n } => self.feed(Input::RingBroke(by(n), epoch, "broke".into())),
            Event::Stuck { by: n } => self.feed(Input::Stuck(by(n), epoch, "stuck".into())),
            Event::Quorum(has_quorum) => self.feed(Input::Quorum(has_quorum)),
            Event::Tick => {
                self.now = self.cluster.next_tick().unwrap_or(self.now).max(self.now);
                self.feed(Input::Tick);
            }
            Event::Late { n, stage } => {
                let old = Epoch(epoch.0.saturating_sub(1));
                self.feed(Input::Loaded(node(n), old, stage, ByteSize(1), None));
                self.feed(Input::RingBroke(by(n), old, "late".into()));
                self.feed(Input::Drained(old));
            }
        }
    }

    /// Assignments of this epoch.
    fn n_assigned(&self) -> u32 {
        self.here.values().map(|told| told.revision).sum()
    }

    /// Nothing happens for a while but what the cluster itself is up to.
    fn rest(&mut self) {
        for _ in 0..20 {
            self.settle();
            self.happen(&Event::Tick);
        }
        self.settle();
    }

    /// Given time the cluster serves, as well as it can, and does not change any more.
    fn check_at_rest(&mut self, settings: &Settings) {
        self.rest();
        assert_eq!(self.cluster.phase(), &Phase::Ready);
        self.check_spread(settings);
        let (epoch, n_assigned) = (self.cluster.epoch(), self.n_assigned());
        self.rest();
        assert_eq!((self.cluster.epoch(), self.n_assigned()), (epoch, n_assigned), "it comes to no rest");
    }

    /// Nobody serves several stages while somebody with room for one of them serves none.
    fn check_spread(&self, settings: &Settings) {
        let served = |m: &Member| m.stages.iter().filter(|s| !s.is_standby).map(|s| s.layers).collect::<Vec<_>>();
        let idle = self.cluster.members().iter().filter(|m| m.is_here() && !m.serves_any());
        for (idle, burdened) in idle.flat_map(|m| self.cluster.members().iter().map(move |b| (m, b))) {
            let layers = served(burdened);
            for &layers in layers.iter().filter(|_| layers.len() > 1) {
                let fits = idle.worker(vec![layers], vec![]).fits(&settings.model, &settings.demand);
                assert!(!fits, "{layers} of {} could be on {}", burdened.id, idle.id);
            }
        }
    }

    fn settle(&mut self) {
        // A hundred steps are more than all stages of all workers take, and a few placements more.
        let n_steps = (0..500).take_while(|_| self.go_on(0)).count();
        assert!(n_steps < 500, "it comes to no rest: {:?}", self.cluster.phase());
        let rests = matches!(self.cluster.phase(), Phase::Ready | Phase::Waiting(_) | Phase::Settling(_));
        assert!(rests, "it is stuck: {:?}", self.cluster.phase());
    }
}

fn check(redundancy: u32, shadow: bool, spread: bool, mib: u64, split: Option<Vec<u32>>, events: &[Event]) {
    let mut settings = Settings { redundancy, shadow, ..settings(mib, 1) };
    let is_pinned = split.is_some();
    (settings.demand.spread, settings.demand.split) = (spread, split);
    let mut world = World {
        cluster: Cluster::new(settings.clone()),
        now: Instant::now(),
        here: HashMap::new(),
        tail: None,
        tail_loaded: false,
        is_started: false,
        is_draining: false,
        released: Vec::new(),
    };
    world.feed(Input::Tick);
    for event in events {
        match event {
            // A pinned split takes workers in the order in which they come, and waits for one that is large enough.
            &Event::Offer { n, .. } if is_pinned => world.happen(&Event::Offer { n, mib: 700 }),
            event => world.happen(event),
        }
    }
    // However it went: with enough nodes and time it serves again, and who wants to end may end.
    world.happen(&Event::Quorum(true));
    for n in N_WORKERS + 1..N_WORKERS + 4 {
        world.happen(&Event::Offer { n, mib: 2000 });
    }
    world.check_at_rest(&settings);
    let leaving = world.cluster.members().iter().filter(|m| m.state == MemberState::Leaving);
    leaving.for_each(|m| assert!(world.released.contains(&m.id), "{} may not end", m.id));
    // Loss by loss all stages come to one worker; of those that come then, each that has room takes one over.
    for n in 1..N_WORKERS + 3 {
        world.happen(&Event::Gone { n });
        world.settle();
    }
    for n in N_WORKERS + 1..N_WORKERS + 3 {
        world.happen(&Event::Offer { n, mib: 1300 });
    }
    world.check_at_rest(&settings);
}

proptest! {
    #[test]
    fn whatever_happens_the_ring_is_whole(
        redundancy in 1u32..=2, shadow: bool, spread: bool, mib in prop::sample::select(vec![400u64, 700, 1300]),
        pinned: bool, events in prop::collection::vec(event(), 0..60),
    ) {
        let split = pinned.then(|| vec![3, 4, 2]);
        check(redundancy, shadow, spread, mib, split, &events);
    }
}
