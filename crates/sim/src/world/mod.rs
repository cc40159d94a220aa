//! Everything at once: time, nodes, network, callers, and what goes wrong.
//!
//! ```text
//! event --> network or node --> process --> state machines
//!   ^                                            |
//!   +------------- timers, packets, work <-------+
//! ```
//!
//! Events are taken in order of time, and of their making where times are equal. While trouble lasts, faults are drawn
//! and undone; then all is mended, and everybody must get an answer within [`MENDED`]. At last the cluster must be at
//! rest, and nothing may be left over once the coordinator is gone.

mod trouble;

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap, VecDeque};
use std::rc::Rc;
use std::time::Instant;

use brigade_base::NodeId;
use brigade_protocol::control::{LEASE_MS, Peer};

use crate::coordinator::Coordinator;
use crate::host::{Clock, Happening, Host, address};
use crate::network::{Due, End, Heard, MS, Nanos, Network, NodeIdx, Purpose, SECOND, Stop};
use crate::process::{Disk, Part, Process};
use crate::random::Random;
use crate::scenario::{Scenario, TROUBLE};
use crate::truth::{Counts, Outcome, Truth};
use crate::worker::Worker;

/// How long everybody may wait for an answer once all is mended: the longest pauses before another try, one after the
/// other.
const MENDED: Nanos = 180 * SECOND;

/// Most events of a simulation: ten times as many as the busiest seed takes. More mean that something goes in circles.
const MAX_EVENTS: u64 = 3_000_000;

/// Something that happens.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Event {
    Net(Due),
    /// Of a process that may have ended meanwhile.
    Node(NodeIdx, u64, Happening),
    Request(usize),
    HangUp(usize),
    /// Something goes wrong, and the next time is drawn.
    Trouble,
    Undo(Undo),
    /// All is mended.
    Mend,
}

/// What ends by itself.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Undo {
    Start(NodeIdx),
    Thaw(NodeIdx),
    Unblock(NodeIdx, NodeIdx),
    Hasten(NodeIdx),
    EmptyDisk(NodeIdx),
}

/// An event in the queue. The queue gives the largest, which is the earliest.
#[derive(Debug, PartialEq, Eq)]
struct Entry(Reverse<(Nanos, u64)>, Event);

impl Ord for Entry {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.0.cmp(&other.0)
    }
}

impl PartialOrd for Entry {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

#[derive(Debug)]
struct Node {
    clock: Clock,
    process: Option<Process>,
    incarnation: u64,
    is_frozen: bool,
    /// What came while it was frozen.
    thaws: VecDeque<Event>,
    wake_at: Nanos,
    slowness: u64,
    is_disk_full: bool,
    unread: BTreeMap<End, VecDeque<Heard>>,
    disk: Disk,
}

/// What came of a seed, or of several.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Report {
    /// Requests by how they ended.
    pub outcomes: BTreeMap<Outcome, u64>,
    /// Faults by their names.
    pub faults: BTreeMap<&'static str, u64>,
    /// Other things that happened.
    pub counts: Counts,
    /// Events.
    pub n_events: u64,
    /// Virtual time in all.
    pub took: Nanos,
    /// A number that follows from every event: equal for equal runs.
    pub fingerprint: u64,
}

impl Report {
    /// Adds what came of another seed.
    pub fn add(&mut self, other: &Self) {
        other.outcomes.iter().for_each(|(outcome, n)| *self.outcomes.entry(*outcome).or_default() += n);
        other.faults.iter().for_each(|(fault, n)| *self.faults.entry(fault).or_default() += n);
        let (sum, one) = (&mut self.counts, &other.counts);
        sum.passes += one.passes;
        sum.rings += one.rings;
        sum.kept += one.kept;
        sum.shadowed += one.shadowed;
        sum.handed_over += one.handed_over;
        sum.stuck += one.stuck;
        sum.takeovers += one.takeovers;
        sum.resumed += one.resumed;
        self.n_events += other.n_events;
        self.took += other.took;
    }
}

/// A simulated cluster.
#[derive(Debug)]
pub struct World {
    scenario: Rc<Scenario>,
    now: Nanos,
    n_made: u64,
    queue: BinaryHeap<Entry>,
    ids: Vec<NodeId>,
    nodes: Vec<Node>,
    network: Network,
    truth: Truth,
    random: Random,
    report: Report,
    is_mended: bool,
    is_over: bool,
    /// Says each step.
    is_loud: bool,
}

impl World {
    /// The world of a seed, before anything has happened.
    pub fn new(seed: u64, is_loud: bool) -> Self {
        let scenario = Rc::new(Scenario::of(seed));
        let n_nodes = scenario.nodes.len();
        let origin = Instant::now();
        let node = |rate: &u64| Node {
            clock: Clock { origin, rate: *rate },
            process: None,
            incarnation: 0,
            is_frozen: false,
            thaws: VecDeque::new(),
            wake_at: Nanos::MAX,
            slowness: 1,
            is_disk_full: false,
            unread: BTreeMap::new(),
            disk: Disk::default(),
        };
        let mut truth = Truth::new(scenario.patience);
        truth.callers.clone_from(&scenario.callers);
        let mut world = Self {
            now: 0,
            n_made: 0,
            queue: BinaryHeap::new(),
            ids: scenario.nodes.iter().map(|node| node.id).collect(),
            nodes: scenario.clock_rates.iter().map(node).collect(),
            network: Network::new(n_nodes, scenario.distance, Random::new(seed, 2)),
            truth,
            random: Random::new(seed, 3),
            report: Report::default(),
            is_mended: false,
            is_over: false,
            is_loud,
            scenario,
        };
        for at in 0..n_nodes {
            let begins = world.random.below(3 * SECOND);
            world.at(begins, Event::Undo(Undo::Start(at)));
        }
        for (caller, at) in world.scenario.callers.iter().map(|caller| caller.at).enumerate().collect::<Vec<_>>() {
            world.at(at, Event::Request(caller));
        }
        for (at, caller) in world.scenario.hang_ups.clone() {
            world.at(at, Event::HangUp(caller));
        }
        world.at(4 * SECOND, Event::Trouble);
        world.at(TROUBLE, Event::Mend);
        world
    }

    fn at(&mut self, at: Nanos, event: Event) {
        self.n_made += 1;
        self.queue.push(Entry(Reverse((at, self.n_made)), event));
    }

    /// Runs it to its end.
    ///
    /// # Panics
    /// If anything is not as it must be.
    pub fn run(mut self) -> Report {
        let until = TROUBLE + MENDED;
        while self.truth.callers.iter().any(|caller| caller.outcome.is_none()) || self.now < TROUBLE {
            self.step();
            assert!(self.now < until, "a request does not end; {}", self.describe());
        }
        // What is left of the last session goes around.
        let rest = self.now + 60 * SECOND;
        while !self.is_at_rest() {
            self.step();
            assert!(self.now < rest, "the cluster does not come to rest; {}", self.describe());
        }
        self.check_rest();
        self.is_over = true;
        let heirs = (0..self.nodes.len()).filter(|node| self.scenario.may_lead[*node]);
        heirs.collect::<Vec<_>>().into_iter().for_each(|node| self.stop(node, Stop::Killed));
        let freed = self.now + (LEASE_MS + 2_000) * MS;
        while self.now < freed {
            self.step();
        }
        self.check_freed();
        self.report.counts = self.truth.counts;
        self.report.took = self.now;
        for caller in &self.truth.callers {
            if let Some(outcome) = caller.outcome {
                *self.report.outcomes.entry(outcome).or_default() += 1;
            }
        }
        self.report
    }

    fn coordinators(&self) -> impl Iterator<Item = &Coordinator> {
        self.nodes.iter().filter_map(|node| match node.process.as_ref().map(Process::part) {
            Some(Part::Coordinates(coordinator)) => Some(&**coordinator),
            _ => None,
        })
    }

    fn coordinator(&self) -> Option<&Coordinator> {
        self.coordinators().next()
    }

    fn workers(&self) -> impl Iterator<Item = (NodeIdx, &Worker)> {
        self.nodes.iter().enumerate().filter_map(|(at, node)| match node.process.as_ref().map(Process::part) {
            Some(Part::Works(worker)) => Some((at, &**worker)),
            _ => None,
        })
    }

    /// All nodes are here, requests are answered, and nothing is on its way.
    fn is_at_rest(&self) -> bool {
        self.nodes.iter().all(|node| node.process.is_some())
            && self.workers().count() + 1 == self.nodes.len()
            && self.nodes.iter().any(|node| node.process.as_ref().is_some_and(Process::is_settled))
            && self.workers().all(|(_, worker)| worker.is_connected())
            && self.coordinator().is_some_and(|c| c.is_ready() && c.reservations() == (0, 0, 0))
    }

    fn check_rest(&self) {
        let Some(coordinator) = self.coordinator() else { return };
        assert_eq!(coordinator.ring.n_sessions(), 0, "sessions are left over");
        let n_open: usize = self.nodes.iter().filter_map(|node| node.process.as_ref()).map(Process::n_open).sum();
        assert_eq!(n_open, 0, "requests are left over");
    }

    /// A worker without a coordinator holds nothing after its lease, and no link is left.
    fn check_freed(&self) {
        for (at, worker) in self.workers() {
            assert_eq!(worker.n_stages(), 0, "node {at} still holds stages");
        }
        let mut left = self.network.open_links();
        left.retain(|(_, purpose, _)| *purpose != Purpose::Council);
        assert!(left.is_empty(), "links are left open: {left:?}");
        let unread: usize = self.nodes.iter().map(|node| node.unread.len()).sum();
        assert_eq!(unread, 0, "something was never read");
    }

    fn step(&mut self) {
        let Some(Entry(Reverse((at, _)), event)) = self.queue.pop() else {
            assert!(self.is_over, "nothing happens any more; {}", self.describe());
            self.now += SECOND;
            return;
        };
        self.now = at;
        self.report.n_events += 1;
        assert!(self.report.n_events < MAX_EVENTS, "too many events; {}", self.describe());
        self.take(event);
        for (at, due) in self.network.take_due() {
            self.at(at, Event::Net(due));
        }
    }

    fn say(&self, what: impl FnOnce() -> String) {
        if self.is_loud {
            eprintln!("{:>10.4} {}", self.now as f64 / SECOND as f64, what());
        }
    }

    fn take(&mut self, event: Event) {
        match event {
            Event::Net(due) => {
                let target = self.network.target(due);
                if let Some(node) = target.filter(|node| self.nodes[*node].is_frozen) {
                    return self.nodes[node].thaws.push_back(Event::Net(due));
                }
                if let Some((node, end, heard)) = self.network.arrive(self.now, due) {
                    let is_new = matches!(heard, Heard::Incoming { .. });
                    self.tell(node, Happening::Link(end, heard));
                    if is_new {
                        self.network.welcome(self.now, end);
                    }
                }
            }
            Event::Node(node, incarnation, happening) => {
                let of = &mut self.nodes[node];
                if of.incarnation != incarnation {
                    return;
                }
                if of.is_frozen {
                    return of.thaws.push_back(Event::Node(node, incarnation, happening));
                }
                if happening == Happening::Wake {
                    of.wake_at = Nanos::MAX;
                }
                self.tell(node, happening);
            }
            Event::Request(caller) => self.request(caller),
            Event::HangUp(caller) => self.hang_up(caller),
            Event::Trouble => self.trouble(),
            Event::Undo(undo) => self.undo(undo),
            Event::Mend => self.mend(),
        }
    }

    /// A process is told something, and does what it will.
    fn tell(&mut self, node: NodeIdx, happening: Happening) {
        let Some(mut process) = self.nodes[node].process.take() else { return };
        if happening != Happening::Wake {
            self.say(|| {
                let text = format!("{happening:?}");
                format!("node {node}: {}", &text[..text.len().min(160)])
            });
        }
        self.with_host(node, |host| process.handle(host, happening));
        self.settle(node, process);
    }

    fn with_host<T>(&mut self, node: NodeIdx, act: impl FnOnce(&mut Host<'_>) -> T) -> T {
        let of = &mut self.nodes[node];
        let mut host = Host {
            node,
            incarnation: of.incarnation,
            virtual_now: self.now,
            clock: of.clock,
            slowness: of.slowness,
            is_disk_full: of.is_disk_full,
            network: &mut self.network,
            truth: &mut self.truth,
            random: &mut self.random,
            begun: Vec::new(),
            has_ended: false,
            ids: &self.ids,
            unread: &mut of.unread,
            resumed: VecDeque::new(),
            disk: &mut of.disk,
            is_loud: self.is_loud,
        };
        let value = act(&mut host);
        let (begun, has_ended, incarnation) = (host.begun, host.has_ended, of.incarnation);
        for (at, happening) in begun {
            self.at(at, Event::Node(node, incarnation, happening));
        }
        if has_ended {
            // Seen when the process is put back.
            self.nodes[node].wake_at = 0;
        }
        value
    }

    /// Puts a process back and makes its next appointment.
    fn settle(&mut self, node: NodeIdx, process: Process) {
        let of = &mut self.nodes[node];
        let next = process.next_wake().map(|instant| of.clock.when(instant).max(self.now + 1000));
        let has_ended = of.wake_at == 0;
        self.report.fingerprint = crate::random::scatter(self.report.fingerprint ^ self.now ^ next.unwrap_or(0));
        of.process = Some(process);
        if has_ended {
            self.say(|| format!("node {node} has left"));
            self.stop(node, Stop::Exited);
            let back = self.now + self.random.between(SECOND / 2, 3 * SECOND);
            return self.at(back, Event::Undo(Undo::Start(node)));
        }
        if let Some(at) = next.filter(|at| *at < of.wake_at) {
            of.wake_at = at;
            let incarnation = of.incarnation;
            self.at(at, Event::Node(node, incarnation, Happening::Wake));
        }
    }

    fn start(&mut self, node: NodeIdx) {
        if self.nodes[node].process.is_some() {
            return;
        }
        self.say(|| format!("node {node} starts"));
        self.network.start(self.now, node);
        self.nodes[node].wake_at = Nanos::MAX;
        let failures = if self.is_mended { 0 } else { self.scenario.faults.load_failures };
        let founder = Peer { node: self.ids[0], addresses: vec![address(0)] };
        let scenario = Rc::clone(&self.scenario);
        let process = self.with_host(node, |host| Process::start(host, scenario, founder, failures));
        self.settle(node, process);
    }

    fn stop(&mut self, node: NodeIdx, how: Stop) {
        let of = &mut self.nodes[node];
        if of.process.take().is_none() {
            return;
        }
        of.incarnation += 1;
        of.is_frozen = false;
        of.unread.clear();
        let thaws = std::mem::take(&mut of.thaws);
        self.network.stop(self.now, node, how);
        // What it would have read is lost with it.
        for event in thaws {
            if let Event::Net(due) = event {
                self.network.arrive(self.now, due);
            }
        }
        for caller in 0..self.truth.callers.len() {
            let of = &self.truth.callers[caller];
            if of.entry == node && of.is_open && of.outcome.is_none() {
                self.truth.end(caller, Outcome::EntryLost, 0);
            }
        }
    }

    fn request(&mut self, caller: usize) {
        let entry = self.truth.callers[caller].entry;
        self.truth.callers[caller].is_open = true;
        let of = &mut self.nodes[entry];
        if of.process.is_none() {
            return self.truth.end(caller, Outcome::EntryLost, 0);
        }
        let event = Event::Node(entry, of.incarnation, Happening::Request(caller));
        self.take(event);
    }

    fn hang_up(&mut self, caller: usize) {
        let of = &self.truth.callers[caller];
        if of.is_open && of.outcome.is_none() {
            let entry = of.entry;
            let event = Event::Node(entry, self.nodes[entry].incarnation, Happening::HangUp(caller));
            self.take(event);
        }
    }

    /// Where everything stands, for a person who looks at a seed.
    fn describe(&self) -> String {
        let coordinators: Vec<String> = self.coordinators().map(Coordinator::describe).collect();
        let coordinator = coordinators.join(" AND ");
        let open: Vec<usize> =
            (0..self.truth.callers.len()).filter(|at| self.truth.callers[*at].outcome.is_none()).collect();
        let workers: Vec<String> = self
            .workers()
            .map(|(at, worker)| {
                format!("node {at} is connected: {}, stages {}", worker.is_connected(), worker.n_stages())
            })
            .collect();
        let councils: Vec<String> = self
            .nodes
            .iter()
            .map(|node| node.process.as_ref().map_or("down".to_owned(), Process::describe_council))
            .collect();
        format!(
            "at {:.3} s: {coordinator}; councils: {councils:?}; requests {open:?}; {}; links {:?}",
            self.now as f64 / SECOND as f64,
            workers.join("; "),
            self.network.open_links()
        )
    }
}
