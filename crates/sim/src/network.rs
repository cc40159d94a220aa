//! The network between the nodes: links as TCP has them, and what can happen to them.
//!
//! - On a link, each direction delivers everything once and in order, or ends. Between links there is no order.
//! - What meets a partition, a black hole or a machine that is down is sent again later: it arrives when the way is
//!   free, long after a newer link has taken over, unless its receiver has closed its end.
//! - A killed process closes its ends, which its peers hear; a machine that vanishes does not, and resets what reaches
//!   its successor.
//! - A dial is a greeting there and back. It fails at once where no process listens, and after [`CONNECT_TIMEOUT`]
//!   where nothing comes back.
//!
//! - A way that is cut for [`KERNEL_TIMEOUT`] ends a link at both of its ends, as keep-alives and the user timeout of
//!   `net::socket` have it.
//!
//! The network owns links, and makes appointments ([`Due`]) that its owner keeps: [`Network::take_due`] says when, and
//! [`Network::arrive`] what happens then.

use std::collections::{BTreeMap, VecDeque};

use crate::random::Random;

/// Virtual nanoseconds since the beginning of a simulation.
pub type Nanos = u64;

/// A millisecond.
pub const MS: Nanos = 1_000_000;

/// A second.
pub const SECOND: Nanos = 1_000 * MS;

/// How long a dial may take, as in `node::reach`.
pub const CONNECT_TIMEOUT: Nanos = 5 * SECOND;

/// So long a link survives that nothing gets through, as in `net::socket`.
pub const KERNEL_TIMEOUT: Nanos = 10 * SECOND;

/// A gigabit each second, less what packets cost.
const NANOS_PER_BYTE: Nanos = 9;

/// Index of a node.
pub type NodeIdx = usize;

/// Names a link. Never used twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LinkId(pub u64);

/// One side of a link.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct End {
    /// The link.
    pub link: LinkId,
    /// 0 for whoever dialled, 1 for whoever was dialled.
    pub side: usize,
}

impl End {
    fn other(self) -> Self {
        Self { link: self.link, side: 1 - self.side }
    }
}

/// What a link is for, as `net::preamble` says it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// Control messages of a worker.
    Control,
    /// Passes, shadows, and what is handed over.
    Data,
    /// Votes and charters.
    Council,
    /// Requests that entered elsewhere.
    Requests,
}

/// How a process ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// By itself: what it has sent arrives.
    Exited,
    /// By force: what its peers have not read may be lost.
    Killed,
    /// With its whole machine: nobody hears of it.
    Vanished,
}

/// What a node hears of a link.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Heard {
    /// Somebody has dialled this node.
    Incoming {
        /// Who.
        from: NodeIdx,
        /// What for.
        purpose: Purpose,
    },
    /// The node that was dialled is there.
    Connected,
    /// It is not.
    Unreachable,
    /// A frame.
    Frame {
        /// What it is, see `protocol::kind`.
        kind: u8,
        /// Its payload.
        bytes: Vec<u8>,
    },
    /// Nothing more comes.
    Ended,
}

/// An appointment of the network.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Due {
    /// Something arrives at a side of a link.
    Arrival(End),
    /// A dial has taken too long.
    Timeout(LinkId),
    /// The kernel looks whether anything gets through.
    Probe(End),
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Packet {
    Hello,
    Welcome,
    Refusal,
    Frame(u8, Vec<u8>),
    End,
}

/// From one side of a link to the other.
#[derive(Debug, Default)]
struct Direction {
    on_way: VecDeque<Packet>,
    /// What met an obstacle, and all behind it.
    held: VecDeque<Packet>,
    last_arrival: Nanos,
}

#[derive(Debug)]
struct Link {
    purpose: Purpose,
    /// Dialler and acceptor.
    nodes: [NodeIdx; 2],
    open: [bool; 2],
    is_connected: bool,
    is_welcome: bool,
    /// Since when it swallows everything.
    black_hole: Option<Nanos>,
    /// To side 0 and to side 1.
    to: [Direction; 2],
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Machine {
    down_since: Option<Nanos>,
    is_listening: bool,
}

impl Machine {
    fn is_up(self) -> bool {
        self.down_since.is_none()
    }
}

/// How far nodes are from each other.
#[derive(Debug, Clone, Copy)]
pub struct Distance {
    /// At least so long on the way.
    pub least: Nanos,
    /// And up to so much longer.
    pub jitter: Nanos,
}

/// All links.
#[derive(Debug)]
pub struct Network {
    links: BTreeMap<LinkId, Link>,
    next: u64,
    machines: Vec<Machine>,
    /// Pairs whose packets from the first to the second go nowhere, and since when.
    blocked: BTreeMap<(NodeIdx, NodeIdx), Nanos>,
    distance: Distance,
    random: Random,
    due: Vec<(Nanos, Due)>,
}

impl Network {
    /// Nodes without links, none of which listens.
    pub fn new(n_nodes: usize, distance: Distance, random: Random) -> Self {
        Self {
            links: BTreeMap::new(),
            next: 1,
            machines: vec![Machine { down_since: None, is_listening: false }; n_nodes],
            blocked: BTreeMap::new(),
            distance,
            random,
            due: Vec::new(),
        }
    }

    /// Appointments made since this was asked last.
    pub fn take_due(&mut self) -> Vec<(Nanos, Due)> {
        std::mem::take(&mut self.due)
    }

    /// Begins a link to `to`; the dialler hears [`Heard::Connected`] or [`Heard::Unreachable`].
    pub fn dial(&mut self, now: Nanos, from: NodeIdx, to: NodeIdx, purpose: Purpose) -> End {
        let id = LinkId(self.next);
        self.next += 1;
        let link = Link {
            purpose,
            nodes: [from, to],
            open: [true, false],
            is_connected: false,
            is_welcome: false,
            black_hole: None,
            to: Default::default(),
        };
        self.links.insert(id, link);
        self.due.push((now + CONNECT_TIMEOUT, Due::Timeout(id)));
        let end = End { link: id, side: 0 };
        self.put(now, end.other(), Packet::Hello);
        end
    }

    /// Sends a frame from an end. False if that is closed.
    pub fn send(&mut self, now: Nanos, from: End, kind: u8, bytes: Vec<u8>) -> bool {
        let is_open = self.links.get(&from.link).is_some_and(|link| link.open[from.side]);
        if is_open {
            self.put(now, from.other(), Packet::Frame(kind, bytes));
        }
        is_open
    }

    /// Closes a side of a link; the other one hears it behind what was sent.
    pub fn close(&mut self, now: Nanos, end: End) {
        let Some(link) = self.links.get_mut(&end.link) else { return };
        if std::mem::replace(&mut link.open[end.side], false) {
            self.put(now, end.other(), Packet::End);
        }
    }

    /// Sends a packet to an end.
    fn put(&mut self, now: Nanos, to: End, packet: Packet) {
        let End { link: id, side } = to;
        let Some(link) = self.links.get_mut(&id) else { return };
        let (from, to) = (link.nodes[1 - side], link.nodes[side]);
        let is_blocked = link.black_hole.is_some()
            || self.blocked.contains_key(&(from, to))
            || !self.machines[from].is_up()
            || !self.machines[to].is_up();
        let direction = &mut link.to[side];
        if is_blocked || !direction.held.is_empty() {
            direction.held.push_back(packet);
            return;
        }
        let n_bytes = if let Packet::Frame(_, bytes) = &packet { bytes.len() as Nanos } else { 100 };
        let way = if from == to { MS / 50 } else { self.distance.least + self.random.below(self.distance.jitter) };
        let at = (now + way + n_bytes * NANOS_PER_BYTE).max(direction.last_arrival + 1);
        direction.last_arrival = at;
        direction.on_way.push_back(packet);
        self.due.push((at, Due::Arrival(End { link: id, side })));
    }

    /// Whose appointment it is.
    pub fn target(&self, due: Due) -> Option<NodeIdx> {
        match due {
            Due::Arrival(end) => self.links.get(&end.link).map(|link| link.nodes[end.side]),
            Due::Timeout(id) => self.links.get(&id).map(|link| link.nodes[0]),
            Due::Probe(end) => self.links.get(&end.link).map(|link| link.nodes[end.side]),
        }
    }

    /// What happens at an appointment: who hears what, at which side of which link.
    pub fn arrive(&mut self, now: Nanos, due: Due) -> Option<(NodeIdx, End, Heard)> {
        let end = match due {
            Due::Arrival(end) => end,
            Due::Timeout(id) => return self.time_out(now, id),
            Due::Probe(end) => return self.probe(now, end),
        };
        let End { link: id, side } = end;
        let link = self.links.get_mut(&id)?;
        let packet = link.to[side].on_way.pop_front()?;
        let (node, from, purpose) = (link.nodes[side], link.nodes[1 - side], link.purpose);
        if !self.machines[node].is_up() {
            // It will be sent again.
            link.to[side].held.push_back(packet);
            return None;
        }
        let heard = match packet {
            Packet::Hello if self.machines[node].is_listening => {
                link.open[1] = true;
                Heard::Incoming { from, purpose }
            }
            Packet::Hello => {
                self.put(now, end.other(), Packet::Refusal);
                return None;
            }
            Packet::Welcome if link.open[0] => {
                link.is_connected = true;
                Heard::Connected
            }
            Packet::Refusal if link.open[0] => {
                link.open[0] = false;
                Heard::Unreachable
            }
            Packet::Frame(kind, bytes) if link.open[side] => Heard::Frame { kind, bytes },
            Packet::End if link.open[side] => {
                link.open[side] = false;
                if side == 0 && !link.is_connected { Heard::Unreachable } else { Heard::Ended }
            }
            Packet::End => {
                self.forget_closed(id);
                return None;
            }
            // Nobody is there to take it: the sender's end is reset.
            Packet::Frame(..) | Packet::Welcome | Packet::Refusal => {
                if link.open[1 - side] {
                    self.put(now, end.other(), Packet::End);
                }
                return None;
            }
        };
        self.forget_closed(id);
        Some((node, end, heard))
    }

    /// Behind [`Heard::Incoming`]: the dialler hears that it is let in, unless the link was closed
    /// meanwhile; once.
    pub fn welcome(&mut self, now: Nanos, end: End) {
        let Some(link) = self.links.get_mut(&end.link).filter(|link| link.open[end.side]) else { return };
        if !std::mem::replace(&mut link.is_welcome, true) {
            self.put(now, end.other(), Packet::Welcome);
        }
    }

    fn time_out(&mut self, now: Nanos, id: LinkId) -> Option<(NodeIdx, End, Heard)> {
        let link = self.links.get_mut(&id).filter(|link| !link.is_connected && link.open[0])?;
        let (node, end) = (link.nodes[0], End { link: id, side: 0 });
        self.close(now, end);
        Some((node, end, Heard::Unreachable))
    }

    /// Since when nothing gets through in one direction at least, so that nothing is acknowledged in the other.
    fn cut_since(&self, link: &Link) -> Option<Nanos> {
        let [a, b] = link.nodes;
        let ways = [(a, b), (b, a)].into_iter().filter_map(|way| self.blocked.get(&way).copied());
        let machines = link.nodes.into_iter().filter_map(|node| self.machines[node].down_since);
        ways.chain(machines).chain(link.black_hole).min()
    }

    fn probe(&mut self, now: Nanos, end: End) -> Option<(NodeIdx, End, Heard)> {
        let link = self.links.get(&end.link).filter(|link| link.open[end.side] && link.is_connected)?;
        let is_dead = self.cut_since(link).is_some_and(|since| since + KERNEL_TIMEOUT <= now);
        let node = link.nodes[end.side];
        is_dead.then(|| {
            self.close(now, end);
            (node, end, Heard::Ended)
        })
    }

    /// The kernels at both ends will look at the links of which `is_cut` is true.
    fn look_later(&mut self, now: Nanos, is_cut: impl Fn(&Link) -> bool) {
        let cut = self.links.iter().filter(|(_, link)| is_cut(link)).map(|(id, _)| *id);
        let ends = cut.flat_map(|link| [0, 1].map(|side| End { link, side }));
        self.due.extend(ends.map(|end| (now + KERNEL_TIMEOUT, Due::Probe(end))));
    }

    fn forget_closed(&mut self, id: LinkId) {
        let is_over = |link: &Link| {
            link.open == [false; 2] && link.to.iter().all(|to| to.on_way.is_empty() && to.held.is_empty())
        };
        if self.links.get(&id).is_some_and(is_over) {
            self.links.remove(&id);
        }
    }

    /// A node's process runs and listens.
    pub fn start(&mut self, now: Nanos, node: NodeIdx) {
        self.machines[node] = Machine { down_since: None, is_listening: true };
        self.release(now);
    }

    /// A node's process has ended.
    pub fn stop(&mut self, now: Nanos, node: NodeIdx, how: Stop) {
        let is_machine = how == Stop::Vanished;
        self.machines[node] = Machine { down_since: is_machine.then_some(now), is_listening: false };
        if is_machine {
            self.look_later(now, |link| link.nodes.contains(&node));
        }
        let ids: Vec<LinkId> = self.links.keys().copied().collect();
        for id in ids {
            for side in 0..2 {
                let loses = self.random.percent(50);
                let Some(link) = self.links.get_mut(&id) else { continue };
                if link.nodes[side] != node || !link.open[side] {
                    continue;
                }
                if is_machine {
                    link.open[side] = false;
                    continue;
                }
                // A reset may overtake what the peer has not read.
                if loses && how == Stop::Killed {
                    let to = &mut link.to[1 - side];
                    to.on_way.iter_mut().for_each(|packet| *packet = Packet::End);
                    to.held.clear();
                }
                self.close(now, End { link: id, side });
            }
        }
    }

    /// Cuts the way from one node to another.
    pub fn block(&mut self, now: Nanos, from: NodeIdx, to: NodeIdx) {
        if from != to {
            self.blocked.entry((from, to)).or_insert(now);
            self.look_later(now, |link| link.nodes == [from, to] || link.nodes == [to, from]);
        }
    }

    /// Opens all ways; what was held is sent again.
    pub fn heal(&mut self, now: Nanos) {
        self.blocked.clear();
        self.release(now);
    }

    /// Opens one way.
    pub fn unblock(&mut self, now: Nanos, from: NodeIdx, to: NodeIdx) {
        self.blocked.remove(&(from, to));
        self.release(now);
    }

    fn release(&mut self, now: Nanos) {
        let ids: Vec<LinkId> = self.links.keys().copied().collect();
        for id in ids {
            for side in 0..2 {
                let Some(link) = self.links.get_mut(&id) else { continue };
                let held = std::mem::take(&mut link.to[side].held);
                if held.is_empty() {
                    continue;
                }
                // TCP tries again in growing intervals.
                let later = now + self.random.below(2 * SECOND);
                held.into_iter().for_each(|packet| self.put(later, End { link: id, side }, packet));
            }
        }
    }

    /// Breaks a link: both of its ends hear that it has ended, or neither does and nothing arrives any more.
    pub fn break_link(&mut self, now: Nanos, id: LinkId, is_black_hole: bool) {
        let Some(link) = self.links.get_mut(&id) else { return };
        if is_black_hole {
            link.black_hole.get_or_insert(now);
            return self.look_later(now, |link| link.black_hole == Some(now));
        }
        link.to.iter_mut().for_each(|to| to.held.clear());
        for side in 0..2 {
            self.put(now, End { link: id, side }, Packet::End);
        }
    }

    /// Links whose ends are both open, in order of age.
    pub fn open_links(&self) -> Vec<(LinkId, Purpose, [NodeIdx; 2])> {
        let open = self.links.iter().filter(|(_, link)| link.open == [true; 2] && link.is_connected);
        open.map(|(id, link)| (*id, link.purpose, link.nodes)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Keeps all appointments in order of time; returns who heard what.
    fn run(network: &mut Network, until: Nanos, pending: &mut Vec<(Nanos, Due)>) -> Vec<(NodeIdx, Heard)> {
        let mut heard = Vec::new();
        loop {
            pending.extend(network.take_due());
            pending.sort_by_key(|(at, _)| *at);
            if pending.first().is_none_or(|(at, _)| *at > until) {
                return heard;
            }
            let (at, due) = pending.remove(0);
            if let Some((node, end, what)) = network.arrive(at, due) {
                if matches!(what, Heard::Incoming { .. }) {
                    network.welcome(at, end);
                }
                heard.push((node, what));
            }
        }
    }

    fn network() -> Network {
        let mut network = Network::new(3, Distance { least: MS, jitter: MS }, Random::new(1, 0));
        (0..3).for_each(|node| network.start(0, node));
        network
    }

    fn frame(n: u8) -> Heard {
        Heard::Frame { kind: n, bytes: vec![n] }
    }

    #[test]
    fn a_link_delivers_in_order_and_ends_behind_what_was_sent() {
        let (mut network, mut pending) = (network(), Vec::new());
        let link = network.dial(0, 0, 1, Purpose::Control);
        let heard = run(&mut network, SECOND, &mut pending);
        assert_eq!(heard, [(1, Heard::Incoming { from: 0, purpose: Purpose::Control }), (0, Heard::Connected)]);
        (0..20).for_each(|n| assert!(network.send(SECOND, link, n, vec![n])));
        network.close(SECOND, link);
        assert!(!network.send(SECOND, link, 21, vec![]));
        let heard = run(&mut network, 2 * SECOND, &mut pending);
        let expected: Vec<_> = (0..20).map(|n| (1, frame(n))).chain([(1, Heard::Ended)]).collect();
        assert_eq!(heard, expected);
        assert!(network.links.is_empty());
    }

    #[test]
    fn a_partition_holds_what_it_meets_and_one_way_is_enough_to_fail_a_dial() {
        let (mut network, mut pending) = (network(), Vec::new());
        let link = network.dial(0, 0, 1, Purpose::Data);
        run(&mut network, SECOND, &mut pending);
        network.block(SECOND, 1, 0);
        assert!(network.send(SECOND, link, 1, vec![1]));
        assert!(network.send(SECOND, link.other(), 2, vec![2]));
        network.dial(SECOND, 0, 1, Purpose::Data);
        let heard = run(&mut network, 10 * SECOND, &mut pending);
        let incoming = Heard::Incoming { from: 0, purpose: Purpose::Data };
        assert!(heard[..2].contains(&(1, frame(1))) && heard[..2].contains(&(1, incoming)), "{heard:?}");
        assert_eq!(heard[2..], [(0, Heard::Unreachable), (1, Heard::Ended)]);
        network.heal(10 * SECOND);
        assert_eq!(run(&mut network, 20 * SECOND, &mut pending), [(0, frame(2))]);
        assert_eq!(network.open_links().len(), 1);
    }

    #[test]
    fn a_killed_process_is_heard_of_and_a_vanished_machine_is_not() {
        for is_machine in [false, true] {
            let (mut network, mut pending) = (network(), Vec::new());
            let link = network.dial(0, 0, 1, Purpose::Data);
            run(&mut network, SECOND, &mut pending);
            network.stop(SECOND, 1, if is_machine { Stop::Vanished } else { Stop::Exited });
            let heard = run(&mut network, 2 * SECOND, &mut pending);
            assert_eq!(heard.is_empty(), is_machine);
            let was_sent = network.send(2 * SECOND, link, 1, vec![1]);
            assert_eq!(was_sent, is_machine);
            network.start(3 * SECOND, 1);
            let heard = run(&mut network, 10 * SECOND, &mut pending);
            assert_eq!(heard, if is_machine { vec![(0, Heard::Ended)] } else { vec![] });
            assert!(network.open_links().is_empty());
        }
    }

    #[test]
    fn nobody_listens_and_black_holes_swallow_until_the_kernel_looks() {
        let (mut network, mut pending) = (network(), Vec::new());
        network.stop(0, 2, Stop::Killed);
        network.dial(0, 0, 2, Purpose::Data);
        assert_eq!(run(&mut network, SECOND, &mut pending), [(0, Heard::Unreachable)]);
        let link = network.dial(SECOND, 0, 1, Purpose::Data);
        run(&mut network, 2 * SECOND, &mut pending);
        network.break_link(2 * SECOND, link.link, true);
        assert!(network.send(2 * SECOND, link.other(), 1, vec![]));
        network.close(2 * SECOND, link);
        assert_eq!(run(&mut network, 11 * SECOND, &mut pending), []);
        assert_eq!(run(&mut network, 100 * SECOND, &mut pending), [(1, Heard::Ended)], "its kernel gives up");
        let other = network.dial(100 * SECOND, 1, 2, Purpose::Data);
        network.break_link(100 * SECOND, other.link, false);
        assert!(run(&mut network, 200 * SECOND, &mut pending).contains(&(1, Heard::Unreachable)));
    }
}
