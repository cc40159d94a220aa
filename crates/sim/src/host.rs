//! What a process has of its machine: clock, network, timers, disk; and, for the checks alone, the [`Truth`].

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

use brigade_base::NodeId;

use crate::network::{End, Heard, Nanos, Network, NodeIdx, Purpose};
use crate::process::Disk;
use crate::random::Random;
use crate::truth::Truth;

/// A clock that is a little wrong.
#[derive(Debug, Clone, Copy)]
pub struct Clock {
    /// What it shows at the beginning of a simulation.
    pub origin: Instant,
    /// Thousandths of a second that it goes on in a second.
    pub rate: u64,
}

impl Clock {
    /// What it shows.
    pub fn at(&self, now: Nanos) -> Instant {
        self.origin + Duration::from_nanos(now / 1000 * self.rate)
    }

    /// When it shows `instant`, or a moment later.
    pub fn when(&self, instant: Instant) -> Nanos {
        let shown = instant.saturating_duration_since(self.origin).as_nanos() as Nanos;
        (shown / self.rate + 1) * 1000
    }
}

/// Something that a process has begun and that takes time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Work {
    /// The coordinator's stage loads; the number says which of its loads.
    TailLoad(u64),
    /// The coordinator's stage computes the oldest pass that came back to this ring.
    TailPass(u64),
    /// A worker's stage loads.
    Load(u64),
    /// A worker's stage computes a frame.
    Pass(u64),
}

/// What a process is told by its machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Happening {
    /// Something on a link.
    Link(End, Heard),
    /// Work is done.
    Done(Work),
    /// The time that was asked for has come.
    Wake,
    /// A request enters here.
    Request(usize),
    /// A caller hangs up.
    HangUp(usize),
    /// This node is asked to leave.
    Leave,
}

/// The machine as a process sees it.
pub struct Host<'a> {
    /// Which node this is.
    pub node: NodeIdx,
    /// How many processes this node had before.
    pub incarnation: u64,
    /// Virtual time, for the truth alone.
    pub virtual_now: Nanos,
    /// The node's clock.
    pub clock: Clock,
    /// Computing takes so many times as long as it should.
    pub slowness: u64,
    /// Nothing can be saved.
    pub is_disk_full: bool,
    /// The links.
    pub network: &'a mut Network,
    /// What the simulator knows.
    pub truth: &'a mut Truth,
    /// For what hangs on chance: durations.
    pub random: &'a mut Random,
    /// What the process has begun: when it is done, and what it is.
    pub begun: Vec<(Nanos, Happening)>,
    /// The process has ended by itself.
    pub has_ended: bool,
    /// All nodes.
    pub ids: &'a [NodeId],
    /// What came over links that nobody reads yet.
    pub unread: &'a mut BTreeMap<End, VecDeque<Heard>>,
    /// Links that are read from now on.
    pub resumed: VecDeque<End>,
    /// What outlives the process.
    pub disk: &'a mut Disk,
    /// Somebody looks at this seed.
    pub is_loud: bool,
}

impl Host<'_> {
    /// Says what happens, if somebody looks.
    pub fn say(&self, what: impl FnOnce() -> String) {
        if self.is_loud {
            let what: String = what().chars().take(1500).collect();
            eprintln!("{:>10.4}   node {}: {what}", self.virtual_now as f64 / 1e9, self.node);
        }
    }

    /// What this node's clock shows.
    pub fn now(&self) -> Instant {
        self.clock.at(self.virtual_now)
    }

    /// Dials a node at its addresses, of which one must be its own.
    pub fn dial(&mut self, to: NodeId, addresses: &[String], purpose: Purpose) -> End {
        let to = self.index(to);
        assert!(addresses.contains(&address(to)), "node {to} is dialled at {addresses:?}");
        self.network.dial(self.virtual_now, self.node, to, purpose)
    }

    /// Sends a frame; false if this end is closed.
    pub fn send(&mut self, end: End, kind: u8, bytes: Vec<u8>) -> bool {
        self.network.send(self.virtual_now, end, kind, bytes)
    }

    /// Lets whoever dialled this node in, before anything else is sent; otherwise that happens behind
    /// [`Heard::Incoming`].
    pub fn welcome(&mut self, end: End) {
        self.network.welcome(self.virtual_now, end);
    }

    /// Closes this end.
    pub fn close(&mut self, end: End) {
        self.unread.remove(&end);
        self.network.close(self.virtual_now, end);
    }

    /// Nobody reads this link yet: what came over it waits for [`Host::resume`].
    pub fn defer(&mut self, end: End, heard: Heard) {
        self.unread.entry(end).or_default().push_back(heard);
    }

    /// From now on somebody reads this link.
    pub fn resume(&mut self, end: End) {
        if self.unread.contains_key(&end) {
            self.resumed.push_back(end);
        }
    }

    /// Begins work that takes about so long on a machine as it should be.
    pub fn begin(&mut self, takes: Nanos, work: Work) {
        let takes = takes * self.slowness + self.random.below(takes / 4);
        self.begun.push((self.virtual_now + takes, Happening::Done(work)));
    }

    /// The node's index.
    pub fn index(&self, id: NodeId) -> NodeIdx {
        self.ids.iter().position(|other| *other == id).unwrap_or_else(|| panic!("node {id} does not exist"))
    }

    /// This node's name.
    pub fn id(&self) -> NodeId {
        self.ids[self.node]
    }
}

/// Where a node's links listen.
pub fn address(node: NodeIdx) -> String {
    format!("10.0.0.{node}:7")
}
