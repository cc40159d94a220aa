//! Councils on a bad network: everything that happens comes from one seed.
//!
//! A [`World`] has nodes with clocks of their own, disks that keep what was stored, and a network that loses, delays,
//! repeats and reorders messages, and is cut in one direction or both. Nodes that follow a coordinator exchange
//! heartbeats with it, as workers do on their control links.

use std::collections::HashMap;

use super::*;

const MS: u64 = 1_000;

/// Xorshift64* (Vigna, "An experimental exploration of Marsaglia's xorshift generators, scrambled", 2016).
struct Random(u64);

impl Random {
    fn new(seed: u64) -> Self {
        let mut random = Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        (0..8).for_each(|_| _ = random.below(2));
        random
    }

    /// A number below `n`.
    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 32) % n
    }

    fn percent(&mut self, chance: u64) -> bool {
        self.below(100) < chance
    }
}

#[derive(Debug)]
enum Event {
    Deliver {
        from: usize,
        to: usize,
        bytes: Vec<u8>,
    },
    /// The coordinator's heartbeat, and its answer.
    Ping {
        from: usize,
        to: usize,
    },
    Pong {
        from: usize,
        to: usize,
    },
    /// A node dials whom it takes for its coordinator.
    Dial {
        from: usize,
        to: usize,
    },
    /// A node's link closed.
    Closed {
        node: usize,
        at: usize,
    },
    /// The node sends its heartbeats.
    Beat {
        node: usize,
    },
}

struct Node {
    /// `None` while it is down.
    council: Option<Council>,
    disk: Stored,
    /// Its clock runs faster than the world's, in thousandths.
    skew: u64,
}

/// What the network does to each message.
#[derive(Debug, Clone, Copy)]
struct Weather {
    loss_percent: u64,
    repeat_percent: u64,
    delay_us: u64,
    /// Of all calls, those that are cut short by a crash, in thousandths.
    crash_permille: u64,
}

const CALM: Weather = Weather { loss_percent: 0, repeat_percent: 0, delay_us: 5 * MS, crash_permille: 0 };

struct World {
    random: Random,
    start: Instant,
    now_us: u64,
    n_events: u64,
    /// By time, then order.
    events: BTreeMap<(u64, u64), Event>,
    nodes: Vec<Node>,
    /// Directions in which nothing passes.
    cuts: BTreeSet<(usize, usize)>,
    weather: Weather,
    /// Who led, with the charter's age at the time: by term.
    leads: BTreeMap<u64, (usize, (u64, u64))>,
    /// The newest charter that a coordinator knew to be with a quorum.
    settled: (u64, u64),
    /// Since when two nodes both count on a quorum.
    rivals: HashMap<(usize, usize), u64>,
}

fn id(idx: usize) -> NodeId {
    NodeId::from_bytes([idx as u8 + 1; 32])
}

fn idx(node: NodeId) -> usize {
    usize::from(node.as_bytes()[0]) - 1
}

fn voter(idx: usize, may_lead: bool) -> Voter {
    Voter { node: id(idx), name: format!("n{idx}"), addresses: vec![format!("10.0.0.{idx}:7")], may_lead }
}

impl World {
    /// The first of `n` nodes has founded a deployment of which the others do not know yet.
    fn new(seed: u64, n: usize) -> Self {
        let mut random = Random::new(seed);
        let nodes = (0..n).map(|_| Node { council: None, disk: Stored::default(), skew: random.below(20) }).collect();
        let mut world = Self {
            random,
            start: Instant::now(),
            now_us: 0,
            n_events: 0,
            events: BTreeMap::new(),
            nodes,
            cuts: BTreeSet::new(),
            weather: CALM,
            leads: BTreeMap::new(),
            settled: (0, 0),
            rivals: HashMap::new(),
        };
        world.nodes[0].disk = Stored::default().found(DeploymentId(7), voter(0, true), vec![0]).unwrap();
        (0..n).for_each(|node| world.start(node));
        (0..n).for_each(|node| world.after(0, Event::Beat { node }));
        world
    }

    fn after(&mut self, delay_us: u64, event: Event) {
        self.n_events += 1;
        self.events.insert((self.now_us + delay_us, self.n_events), event);
    }

    fn clock(&self, node: usize) -> Instant {
        self.start + Duration::from_micros(self.now_us + self.now_us * self.nodes[node].skew / 1000)
    }

    /// When the node's clock shows this time.
    fn when_us(&self, node: usize, local: Instant) -> u64 {
        let local_us = local.saturating_duration_since(self.start).as_micros() as u64;
        (local_us * 1000).div_ceil(1000 + self.nodes[node].skew) + 1
    }

    fn start(&mut self, node: usize) {
        if self.nodes[node].council.is_none() {
            let council = Council::new(id(node), self.nodes[node].disk.clone(), self.clock(node));
            self.nodes[node].council = Some(council);
            self.input(node, Input::Tick);
        }
    }

    fn crash(&mut self, node: usize) {
        self.nodes[node].council = None;
        for at in 0..self.nodes.len() {
            // Not everybody is told: a machine that loses power closes no link.
            if at != node && self.random.percent(70) {
                let delay = self.random.below(self.weather.delay_us);
                self.after(delay, Event::Closed { node, at });
            }
        }
    }

    fn input(&mut self, node: usize, input: Input) {
        let now = self.clock(node);
        let Some(council) = &mut self.nodes[node].council else { return };
        let actions = council.handle(now, input);
        let crash = self.random.below(1000) < self.weather.crash_permille;
        let n_done = if crash { self.random.below(actions.len() as u64 + 1) as usize } else { actions.len() };
        for action in actions.into_iter().take(n_done) {
            self.act(node, action);
        }
        if crash {
            return self.crash(node);
        }
        self.check_settled(node);
        self.check_rivals();
    }

    fn act(&mut self, node: usize, action: Action) {
        match action {
            Action::Store(stored) => {
                assert!(stored.term >= self.nodes[node].disk.term);
                self.nodes[node].disk = Stored::decode(&stored.encode()).unwrap();
            }
            Action::Send { to, message } => self.send(node, idx(to.node), message.encode()),
            Action::Lead { term, charter } => {
                let before = self.leads.insert(term, (node, charter.age()));
                assert_eq!(before, None, "two nodes lead in term {term}");
                let newest = self.leads.keys().next_back().copied();
                assert!(newest > Some(term) || charter.age() >= self.settled, "{:?} is forgotten", self.settled);
            }
            Action::Follow(incumbent) => assert_ne!(idx(incumbent.peer.node), node),
            Action::StepDown { .. } => {}
        }
    }

    fn send(&mut self, from: usize, to: usize, bytes: Vec<u8>) {
        let n_copies = 1 + u64::from(self.random.percent(self.weather.repeat_percent));
        for _ in 0..n_copies {
            if !self.random.percent(self.weather.loss_percent) {
                let delay = self.random.below(self.weather.delay_us);
                self.after(delay, Event::Deliver { from, to, bytes: bytes.clone() });
            }
        }
    }

    fn council(&self, node: usize) -> Option<&Council> {
        self.nodes[node].council.as_ref()
    }

    /// Whom a node that is up takes for its coordinator.
    fn incumbent(&self, node: usize) -> Option<usize> {
        self.council(node)?.incumbent().map(|incumbent| idx(incumbent.peer.node))
    }

    /// A node keeps up its link to whom it follows; one that is new, to whoever is there.
    fn serves(&self, node: usize, coordinator: usize) -> bool {
        let is_new = self.council(node).is_some_and(|council| council.charter().is_none());
        is_new || self.incumbent(node) == Some(coordinator)
    }

    fn coordinators(&self) -> Vec<usize> {
        let leads = |node: &usize| self.council(*node).is_some_and(Council::is_coordinator);
        (0..self.nodes.len()).filter(leads).collect()
    }

    fn has_quorum(&self, node: usize) -> bool {
        self.council(node).is_some_and(|council| council.has_quorum(self.clock(node)))
    }

    /// What a quorum has is never forgotten by who leads later.
    fn check_settled(&mut self, node: usize) {
        let Some(council) = self.council(node).filter(|council| council.is_settled()) else { return };
        let age = council.charter().unwrap().age();
        for (term, (_, lead)) in self.leads.range(age.0 + 1..) {
            assert!(*lead >= age, "the coordinator of term {term} has {lead:?} and forgot {age:?}");
        }
        self.settled = self.settled.max(age);
    }

    /// Quorums have a node in common, and that follows one coordinator. So two may count on it no longer than for what
    /// it said before it changed sides.
    fn check_rivals(&mut self) {
        let claim: Vec<_> = self.coordinators().into_iter().filter(|node| self.has_quorum(*node)).collect();
        let pairs = claim.iter().flat_map(|a| claim.iter().filter(move |b| a < b).map(move |b| (*a, *b)));
        let pairs: Vec<_> = pairs.collect();
        self.rivals.retain(|pair, _| pairs.contains(pair));
        for pair in pairs {
            let since = *self.rivals.entry(pair).or_insert(self.now_us);
            let limit = LEASE.as_micros() as u64 + 2 * self.weather.delay_us + 10 * MS;
            assert!(self.now_us - since <= limit, "{pair:?} both count on a quorum since {since} us");
        }
    }

    fn happen(&mut self, event: Event) {
        match event {
            Event::Deliver { from, to, bytes } if !self.cuts.contains(&(from, to)) => {
                self.input(to, Input::Message(id(from), CouncilMessage::decode(&bytes).unwrap()));
            }
            Event::Ping { from, to } if !self.cuts.contains(&(from, to)) && self.serves(to, from) => {
                self.hear(to, from);
                let delay = self.random.below(self.weather.delay_us);
                self.after(delay, Event::Pong { from: to, to: from });
            }
            Event::Pong { from, to } if !self.cuts.contains(&(from, to)) => self.hear(to, from),
            Event::Dial { from, to } if !self.cuts.contains(&(from, to)) => {
                let council = self.council(to).filter(|council| !council.is_coordinator());
                if let Some(refusal) = council.and_then(Council::refusal) {
                    self.send(to, from, refusal.encode());
                }
            }
            Event::Deliver { .. } | Event::Ping { .. } | Event::Pong { .. } | Event::Dial { .. } => {}
            Event::Closed { node, at } => {
                let now = self.clock(at);
                if let Some(council) = &mut self.nodes[at].council {
                    council.lost(now, id(node));
                }
            }
            Event::Beat { node } => {
                if self.council(node).is_some_and(Council::is_coordinator) {
                    for to in (0..self.nodes.len()).filter(|to| *to != node) {
                        let delay = self.random.below(self.weather.delay_us);
                        self.after(delay, Event::Ping { from: node, to });
                    }
                } else if let Some(to) = self.incumbent(node) {
                    let delay = self.random.below(self.weather.delay_us);
                    self.after(delay, Event::Dial { from: node, to });
                }
                self.after(HEARTBEAT_MS * MS, Event::Beat { node });
            }
        }
    }

    fn hear(&mut self, at: usize, node: usize) {
        let now = self.clock(at);
        if let Some(council) = &mut self.nodes[at].council {
            council.heard(now, id(node));
        }
    }

    /// Lets what is due before this time happen.
    fn run_until(&mut self, until_us: u64) {
        loop {
            let due = |node: usize| Some((self.when_us(node, self.council(node)?.next_tick()?), node));
            let tick = (0..self.nodes.len()).filter_map(due).min();
            let event_us = self.events.first_key_value().map_or(u64::MAX, |((at_us, _), _)| *at_us);
            let next_us = tick.map_or(event_us, |(at_us, _)| event_us.min(at_us));
            if next_us > until_us {
                self.now_us = until_us;
                return;
            }
            self.now_us = self.now_us.max(next_us);
            match tick {
                Some((at_us, node)) if at_us < event_us => self.input(node, Input::Tick),
                _ => {
                    let event = self.events.pop_first().map(|(_, event)| event);
                    event.into_iter().for_each(|event| self.happen(event));
                }
            }
        }
    }

    fn run_for(&mut self, ms: u64) {
        self.run_until(self.now_us + ms * MS);
    }

    fn propose(&mut self, node: usize, others: Vec<Voter>) {
        let settings = vec![self.random.below(250) as u8];
        self.input(node, Input::Propose(Proposal::new(voter(node, true), others, settings).unwrap()));
    }

    /// All nodes vote; those of which `may_lead` holds may lead.
    fn propose_all(&mut self, node: usize, may_lead: impl Fn(usize) -> bool) {
        let others = (0..self.nodes.len()).filter(|other| *other != node);
        self.propose(node, others.map(|other| voter(other, may_lead(other))).collect());
    }

    fn isolate(&mut self, node: usize) {
        for other in 0..self.nodes.len() {
            self.cuts.extend([(node, other), (other, node)]);
        }
    }
}

/// Something bad happens, or something good.
fn disturb(world: &mut World, may_lead: &[bool]) {
    let n = world.nodes.len() as u64;
    let (a, b) = (world.random.below(n) as usize, world.random.below(n) as usize);
    match world.random.below(16) {
        0 | 1 => world.crash(a),
        2..=4 => world.start(a),
        5 => drop(world.cuts.insert((a, b))),
        6 => world.cuts.extend([(a, b), (b, a)]),
        7 => world.isolate(a),
        8 | 9 => {
            // Whoever coordinates is the one to be missed.
            let coordinator = world.coordinators().first().copied().unwrap_or(a);
            if world.random.percent(50) { world.isolate(coordinator) } else { world.crash(coordinator) }
        }
        10 => {
            let sides: Vec<_> = (0..n).map(|_| world.random.percent(50)).collect();
            let pairs = (0..n as usize).flat_map(|a| (0..n as usize).map(move |b| (a, b)));
            world.cuts = pairs.filter(|(a, b)| sides[*a] != sides[*b]).collect();
        }
        11 | 12 => world.cuts.clear(),
        13 => world.happen(Event::Closed { node: a, at: b }),
        _ => {
            for node in world.coordinators() {
                let mut others: Vec<_> = (0..n as usize).filter(|o| *o != node && world.random.percent(70)).collect();
                others.sort_by_key(|_| world.random.below(100));
                let may_lead = |o: usize, random: &mut Random| may_lead[o] != random.percent(10);
                let others = others.into_iter().map(|o| voter(o, may_lead(o, &mut world.random))).collect();
                world.propose(node, others);
            }
        }
    }
}

/// Once all is well again, one node coordinates, and all voters know it.
fn check_healed(world: &mut World) {
    world.weather = CALM;
    world.cuts.clear();
    (0..world.nodes.len()).for_each(|node| world.start(node));
    world.run_for(12_000);
    let [coordinator] = world.coordinators()[..] else { panic!("coordinators: {:?}", world.coordinators()) };
    let council = world.council(coordinator).unwrap();
    let (charter, term) = (council.charter().unwrap().clone(), council.term());
    assert!(council.is_settled() && world.has_quorum(coordinator), "{council:?}");
    for voter in &charter.voters {
        let node = idx(voter.node);
        assert_eq!(world.incumbent(node), Some(coordinator), "of node {node}");
        assert_eq!(world.council(node).unwrap().charter(), Some(&charter), "of node {node}");
    }
    world.run_for(5_000);
    assert_eq!(world.council(coordinator).map(Council::term), Some(term), "there was an election in peace");
}

fn simulate(seed: u64) -> World {
    let mut random = Random::new(seed ^ 0xc0de);
    let n = 2 + random.below(5) as usize;
    let mut world = World::new(seed, n);
    let may_lead: Vec<_> = (0..n).map(|_| random.percent(75)).collect();
    world.run_for(300);
    world.propose_all(0, |node| may_lead[node]);
    world.run_for(random.below(1_000));
    world.weather = Weather {
        loss_percent: [0, 5, 30][random.below(3) as usize],
        repeat_percent: [0, 10, 40][random.below(3) as usize],
        delay_us: [5, 50, 400, 2_000][random.below(4) as usize] * MS,
        crash_permille: [0, 2, 10][random.below(3) as usize],
    };
    for _ in 0..100 {
        disturb(&mut world, &may_lead);
        world.run_for(random.below(2_500));
    }
    check_healed(&mut world);
    world
}

#[test]
fn no_seed_breaks_a_promise() {
    let mut n_terms = 0;
    for seed in 0..500 {
        let run = std::panic::catch_unwind(|| simulate(seed).leads.len());
        match run {
            Ok(n) => n_terms += n,
            Err(panic) => {
                eprintln!("seed {seed} fails");
                std::panic::resume_unwind(panic);
            }
        }
    }
    assert!(n_terms > 2_000, "only {n_terms} terms: the simulation is too kind");
}

/// From the loss to a new coordinator, in milliseconds.
fn takeover_ms(n: usize, lose: impl Fn(&mut World)) -> u64 {
    let mut world = World::new(n as u64, n);
    world.run_for(300);
    world.propose_all(0, |_| true);
    world.run_for(1_000);
    lose(&mut world);
    let lost_us = world.now_us;
    for _ in 0..500 {
        world.run_for(10);
        if let Some(node) = world.coordinators().into_iter().find(|node| *node != 0) {
            assert_eq!(node, 1, "the first of the others takes over");
            return (world.now_us - lost_us) / MS;
        }
    }
    panic!("nobody took over");
}

#[test]
fn a_lost_coordinator_is_replaced_within_two_seconds_of_its_loss() {
    for n in 3..=6 {
        let after_close = takeover_ms(n, |world| {
            world.nodes[0].council = None;
            (1..world.nodes.len()).for_each(|at| world.happen(Event::Closed { node: 0, at }));
        });
        assert!(after_close < 1_500, "{after_close} ms");
        let after_silence = takeover_ms(n, |world| world.nodes[0].council = None);
        assert!(after_silence < 3_000, "{after_silence} ms with the time until it is noticed");
    }
}

#[test]
fn a_coordinator_that_restarts_at_once_stays_coordinator() {
    for n in 2..=6 {
        let mut world = World::new(n as u64, n);
        world.run_for(300);
        world.propose_all(0, |_| true);
        world.run_for(1_000);
        world.nodes[0].council = None;
        (1..n).for_each(|at| world.happen(Event::Closed { node: 0, at }));
        world.run_for(700);
        world.start(0);
        world.run_for(100);
        assert_eq!(world.coordinators(), [0]);
        assert_eq!(world.council(0).map(Council::term), Some(2));
    }
}

#[test]
fn a_node_that_was_cut_off_comes_back_without_an_election() {
    let mut world = World::new(1, 4);
    world.run_for(300);
    world.propose_all(0, |_| true);
    world.run_for(1_000);
    world.isolate(2);
    world.run_for(20_000);
    world.cuts.clear();
    world.run_for(3_000);
    assert_eq!((world.coordinators(), world.leads.len()), (vec![0], 1));
    assert_eq!(world.council(2).map(Council::term), Some(1));
}

#[test]
fn a_minority_has_no_quorum_and_its_coordinator_steps_down_when_it_hears_of_the_other() {
    let mut world = World::new(1, 5);
    world.run_for(300);
    world.propose_all(0, |_| true);
    world.run_for(1_000);
    world.isolate(0);
    world.run_for(5_000);
    assert_eq!(world.coordinators(), [0, 1]);
    assert!(!world.has_quorum(0) && world.has_quorum(1));
    world.cuts.clear();
    world.run_for(3_000);
    assert_eq!((world.coordinators(), world.incumbent(0)), (vec![1], Some(1)));
}
