//! The `brigade` process of a node, as `node::node`, `node::council` and `coordinator/muster.rs` have it: it
//! coordinates or works, and changes between the two as the council decides.
//!
//! It owns the node's part, its [`Council`] with the links to the other voters, and the [`Gateway`]. What a part has to
//! tell the council waits in its notes, and is told behind each thing that happened ([`Process::handle`]).

use std::collections::{BTreeMap, VecDeque};
use std::rc::Rc;
use std::time::Instant;

use brigade_base::{ByteSize, DeploymentId, NodeId};
use brigade_protocol::cluster::Settings;
use brigade_protocol::control::{Offer, Peer};
use brigade_protocol::council::{Action, Charter, Council, CouncilMessage, Input, Proposal, Stored, Voter};
use brigade_protocol::frame::Attach;
use brigade_protocol::kind;

use crate::coordinator::{Coordinator, Note, header_hash};
use crate::gateway::Gateway;
use crate::host::{Happening, Host, Work, address};
use crate::network::{End, Heard, Purpose};
use crate::scenario::Scenario;
use crate::worker::Worker;

/// Messages that wait for a link, as in `node::council`.
const MAX_QUEUED: usize = 16;

/// What a node does.
#[derive(Debug)]
pub enum Part {
    /// Nothing: it waits for votes, or to hear who coordinates.
    Nothing,
    /// It coordinates.
    Coordinates(Box<Coordinator>),
    /// It works for whoever does.
    Works(Box<Worker>),
}

/// What a node keeps on disk.
#[derive(Debug, Clone, Default)]
pub struct Disk {
    /// What it has agreed to, as bytes.
    pub council: Option<Vec<u8>>,
    /// The coordinator that it knows.
    pub known: Option<Peer>,
}

#[derive(Debug)]
struct Voice {
    end: End,
    is_up: bool,
    queue: VecDeque<CouncilMessage>,
}

/// A process.
#[derive(Debug)]
pub struct Process {
    part: Part,
    council: Council,
    gateway: Gateway,
    scenario: Rc<Scenario>,
    /// Loading fails so often of a hundred times.
    load_failures: u64,
    /// Links that came in and have not said what they bring.
    doorstep: BTreeMap<End, NodeId>,
    voices: BTreeMap<NodeId, Voice>,
    /// All links of voters, also those that newer ones have replaced.
    council_links: BTreeMap<End, NodeId>,
    introduced: Option<NodeId>,
    /// The voters as this coordinator wants them.
    voters: BTreeMap<NodeId, Voter>,
    voters_changed: bool,
    council_at: Option<Instant>,
}

impl Process {
    /// A process that has just begun.
    pub fn start(host: &mut Host<'_>, scenario: Rc<Scenario>, founder: Peer, load_failures: u64) -> Self {
        let stored = host.disk.council.as_ref().map_or_else(Stored::default, |bytes| {
            Stored::decode(bytes).unwrap_or_else(|error| panic!("a council's file cannot be read: {error}"))
        });
        let is_founder = founder.node == host.id();
        let stored = if is_founder { founded(host, stored) } else { stored };
        let mut process = Self {
            part: Part::Nothing,
            council: Council::new(host.id(), stored, host.now()),
            gateway: Gateway::new(scenario.patience),
            scenario,
            load_failures,
            doorstep: BTreeMap::new(),
            voices: BTreeMap::new(),
            council_links: BTreeMap::new(),
            introduced: None,
            voters: BTreeMap::new(),
            voters_changed: false,
            council_at: None,
        };
        if !is_founder {
            let known = host.disk.known.clone().unwrap_or(founder);
            process.work(host, known);
        }
        process.tend(host);
        process
    }

    /// What it does.
    pub fn part(&self) -> &Part {
        &self.part
    }

    /// Its requests.
    pub fn n_open(&self) -> usize {
        self.gateway.n_open()
    }

    /// Nothing is under way in its council.
    pub fn is_settled(&self) -> bool {
        self.council.is_settled()
    }

    /// What its council knows, for a person.
    pub fn describe_council(&self) -> String {
        format!("term {}, coordinator {:?}", self.council.term(), self.council.incumbent().map(|i| i.peer.node))
    }

    /// When it wants to be woken.
    pub fn next_wake(&self) -> Option<Instant> {
        let part = match &self.part {
            Part::Nothing => None,
            Part::Coordinates(coordinator) => Some(coordinator.next_wake()),
            Part::Works(worker) => worker.next_wake(),
        };
        [part, self.gateway.next_wake(), self.council_at].into_iter().flatten().min()
    }

    /// Takes note of what happened.
    pub fn handle(&mut self, host: &mut Host<'_>, happening: Happening) {
        self.handle_one(host, happening);
        while let Some(end) = host.resumed.pop_front() {
            while let Some(heard) = host.unread.get_mut(&end).and_then(VecDeque::pop_front) {
                self.handle_one(host, Happening::Link(end, heard));
            }
            host.unread.remove(&end);
        }
        self.tend(host);
    }

    fn handle_one(&mut self, host: &mut Host<'_>, happening: Happening) {
        match (happening, &mut self.part) {
            (Happening::Link(end, heard), _) => self.link(host, end, heard),
            (Happening::Done(work @ (Work::TailLoad(..) | Work::TailPass(..))), Part::Coordinates(coordinator)) => {
                coordinator.done(host, work);
            }
            (Happening::Done(work), Part::Works(worker)) => worker.done(host, work),
            (Happening::Wake, Part::Coordinates(coordinator)) => coordinator.wake(host),
            (Happening::Wake, Part::Works(worker)) => worker.wake(host),
            (Happening::Request(caller), _) => self.gateway.take(host, caller),
            (Happening::HangUp(caller), part) => {
                let coordinator =
                    if let Part::Coordinates(coordinator) = part { Some(&mut **coordinator) } else { None };
                self.gateway.hang_up(host, caller, coordinator);
            }
            (Happening::Leave, Part::Works(worker)) => worker.leave(host),
            _ => {}
        }
    }

    fn link(&mut self, host: &mut Host<'_>, end: End, heard: Heard) {
        if let Heard::Incoming { from, purpose } = heard {
            return self.came_in(host, end, host.ids[from], purpose);
        }
        if let Some(peer) = self.council_links.get(&end).copied() {
            return self.voice(host, end, peer, &heard);
        }
        if self.gateway.heard(host, end, &heard) {
            return;
        }
        match &mut self.part {
            Part::Nothing => host.close(end),
            Part::Works(worker) => drop(worker.heard(host, end, heard)),
            Part::Coordinates(coordinator) => match (self.doorstep.remove(&end), &heard) {
                (None, _) => drop(coordinator.heard(host, end, &heard)),
                (Some(from), Heard::Frame { kind: kind::ATTACH, bytes }) => {
                    let attach = Attach::decode(bytes).unwrap_or_else(|error| panic!("no attach: {error}"));
                    coordinator.data_link(host, end, from, attach);
                }
                (Some(_), _) => host.close(end),
            },
        }
    }

    fn came_in(&mut self, host: &mut Host<'_>, end: End, from: NodeId, purpose: Purpose) {
        let is_voter = self.introduced == Some(from)
            || self.council.charter().is_some_and(|charter| charter.voter(from).is_some());
        match (purpose, &mut self.part) {
            (Purpose::Council, _) if is_voter => {
                self.council_links.insert(end, from);
                self.voices.insert(from, Voice { end, is_up: true, queue: VecDeque::new() });
            }
            (Purpose::Control, Part::Coordinates(coordinator)) => coordinator.greet_worker(host, end, from),
            (Purpose::Requests, Part::Coordinates(coordinator)) => coordinator.greet_gateway(host, end),
            (Purpose::Data, Part::Coordinates(_)) => drop(self.doorstep.insert(end, from)),
            (Purpose::Data, Part::Works(worker)) => worker.came_in(end, from),
            (Purpose::Control | Purpose::Requests, _) => {
                // Who takes this node for the coordinator learns who is.
                if let Some(refusal) = self.council.refusal() {
                    host.welcome(end);
                    host.send(end, kind::COUNCIL, refusal.encode());
                }
                host.close(end);
            }
            _ => host.close(end),
        }
    }

    /// Something came over a council link.
    fn voice(&mut self, host: &mut Host<'_>, end: End, peer: NodeId, heard: &Heard) {
        match heard {
            Heard::Connected => {
                let Some(voice) = self.voices.get_mut(&peer).filter(|voice| voice.end == end) else { return };
                voice.is_up = true;
                for message in std::mem::take(&mut voice.queue) {
                    host.send(end, kind::COUNCIL, message.encode());
                }
            }
            Heard::Frame { bytes, .. } => match CouncilMessage::decode(bytes) {
                Ok(message) => self.advise(host, Input::Message(peer, message)),
                Err(error) => panic!("a council message cannot be read: {error}"),
            },
            _ => {
                host.close(end);
                self.council_links.remove(&end);
                if self.voices.get(&peer).is_some_and(|voice| voice.end == end) {
                    self.voices.remove(&peer);
                }
            }
        }
    }

    fn speak(&mut self, host: &mut Host<'_>, to: &Peer, message: CouncilMessage) {
        match self.voices.get_mut(&to.node) {
            Some(voice) if voice.is_up => drop(host.send(voice.end, kind::COUNCIL, message.encode())),
            Some(voice) if voice.queue.len() < MAX_QUEUED => voice.queue.push_back(message),
            Some(_) => {}
            None if to.addresses.is_empty() => {}
            None => {
                let end = host.dial(to.node, &to.addresses, Purpose::Council);
                self.council_links.insert(end, to.node);
                self.voices.insert(to.node, Voice { end, is_up: false, queue: VecDeque::from([message]) });
            }
        }
    }

    /// What follows from whatever happened: for the council, for the voters, for requests.
    fn tend(&mut self, host: &mut Host<'_>) {
        let notes = match &mut self.part {
            Part::Nothing => Vec::new(),
            Part::Coordinates(coordinator) => std::mem::take(&mut coordinator.notes),
            Part::Works(worker) => std::mem::take(&mut worker.notes),
        };
        notes.into_iter().for_each(|note| self.note(host, note));
        if std::mem::take(&mut self.voters_changed) && matches!(self.part, Part::Coordinates(_)) {
            let me = own_voter(host, &self.scenario);
            let others = self.voters.values().cloned().collect();
            match Proposal::new(me, others, Vec::new()) {
                Ok(proposal) => self.advise(host, Input::Propose(proposal)),
                Err(error) => panic!("the voters cannot be proposed: {error}"),
            }
        }
        if self.council.next_tick().is_some_and(|due| due <= host.now()) {
            self.advise(host, Input::Tick);
        }
        let has_quorum = self.council.has_quorum(host.now());
        let mut coordinator = if let Part::Coordinates(c) = &mut self.part { Some(&mut **c) } else { None };
        if let Some(coordinator) = &mut coordinator {
            coordinator.quorum(host, has_quorum);
        }
        self.gateway.turn(host, coordinator);
        self.council_at = self.council.next_tick();
    }

    fn note(&mut self, host: &mut Host<'_>, note: Note) {
        match note {
            Note::Heard(node) => self.council.heard(host.now(), node),
            Note::Lost(node) => self.council.lost(host.now(), node),
            Note::Refused(node, bytes) => match CouncilMessage::decode(&bytes) {
                Ok(message) => self.advise(host, Input::Message(node, message)),
                Err(error) => panic!("a refusal cannot be read: {error}"),
            },
            Note::Came(node, offer) => {
                let may_lead = offer.own_copy == Some(header_hash());
                let voter = Voter { node, name: offer.name, addresses: offer.addresses, may_lead };
                self.voters_changed |= self.voters.insert(node, voter.clone()) != Some(voter);
            }
            Note::Went(node, true) => self.voters_changed |= self.voters.remove(&node).is_some(),
            Note::Went(_, false) => {}
            Note::Accepted(coordinator, deployment) => {
                self.introduced = Some(coordinator);
                let addresses = vec![address(host.index(coordinator))];
                host.disk.known = Some(Peer { node: coordinator, addresses });
                if self.council.charter().is_some_and(|charter| charter.deployment != deployment) {
                    let stored = self.council.stored().clone().forget();
                    host.disk.council = Some(stored.encode());
                    self.council = Council::new(host.id(), stored, host.now());
                }
            }
        }
    }

    /// Tells the council something, and does what it says.
    fn advise(&mut self, host: &mut Host<'_>, input: Input) {
        for action in self.council.handle(host.now(), input) {
            if !matches!(action, Action::Send { .. }) {
                host.say(|| format!("council -> {action:?}"));
            }
            match action {
                Action::Store(stored) => host.disk.council = Some(stored.encode()),
                Action::Send { to, message } => self.speak(host, &to, message),
                Action::Lead { term, charter } => self.lead(host, term, &charter),
                Action::Follow(incumbent) => self.follow(host, incumbent.peer),
                Action::StepDown { .. } => {
                    self.gateway.follow(host, None);
                    self.drop_part(host);
                }
            }
        }
    }

    fn lead(&mut self, host: &mut Host<'_>, term: u64, charter: &Charter) {
        self.gateway.follow(host, None);
        self.drop_part(host);
        let me = host.id();
        host.truth.leads((host.node, host.incarnation), (charter.deployment, term));
        let scenario = Rc::clone(&self.scenario);
        let settings = Settings {
            deployment: charter.deployment,
            term,
            coordinator: scenario.nodes[host.node].clone(),
            model: scenario.profile.clone(),
            demand: scenario.demand.clone(),
            nodes_wanted: scenario.nodes_wanted,
            redundancy: scenario.redundancy,
            shadow: scenario.shadow,
        };
        let took_over = charter.coordinator != me;
        host.truth.counts.takeovers += u64::from(took_over);
        let others = || charter.electorate().filter(|voter| voter.node != me);
        let n_expected = others().filter(|voter| voter.node != charter.coordinator).count();
        self.voters = others().map(|voter| (voter.node, voter.clone())).collect();
        self.voters_changed = true;
        let n_expected = took_over.then_some(n_expected);
        let coordinator = Coordinator::start(host, settings, scenario.model, scenario.limits, n_expected);
        self.part = Part::Coordinates(Box::new(coordinator));
    }

    fn follow(&mut self, host: &mut Host<'_>, peer: Peer) {
        self.gateway.follow(host, Some(peer.clone()));
        match &mut self.part {
            Part::Works(worker) => worker.follow(host, peer),
            Part::Coordinates(_) | Part::Nothing => {
                self.drop_part(host);
                self.work(host, peer);
            }
        }
    }

    fn work(&mut self, host: &mut Host<'_>, coordinator: Peer) {
        self.gateway.follow(host, Some(coordinator.clone()));
        let profile = &self.scenario.nodes[host.node];
        let offer = Offer {
            name: profile.name.clone(),
            memory: profile.memory,
            kv_spill: ByteSize::gib(1),
            threads: 1,
            addresses: vec![address(host.node)],
            software: "simulated".to_owned(),
            own_copy: self.scenario.may_lead[host.node].then(header_hash),
        };
        let worker = Worker::start(host, offer, self.scenario.model, coordinator, self.load_failures);
        self.part = Part::Works(Box::new(worker));
    }

    /// Ends the part at once: another one follows.
    fn drop_part(&mut self, host: &mut Host<'_>) {
        match std::mem::replace(&mut self.part, Part::Nothing) {
            Part::Nothing => {}
            Part::Coordinates(coordinator) => coordinator.stop(host),
            Part::Works(worker) => worker.abandon(host),
        }
        std::mem::take(&mut self.doorstep).into_keys().for_each(|end| host.close(end));
    }
}

fn own_voter(host: &Host<'_>, scenario: &Scenario) -> Voter {
    let name = scenario.nodes[host.node].name.clone();
    Voter { node: host.id(), name, addresses: vec![address(host.node)], may_lead: true }
}

/// A deployment of its own, unless it has a vote in one.
fn founded(host: &Host<'_>, stored: Stored) -> Stored {
    let me = host.id();
    let votes = |charter: &Charter| charter.voter(me).is_some_and(|voter| voter.may_lead);
    if stored.charter.as_ref().is_some_and(votes) {
        return stored;
    }
    let own = Voter { node: me, name: String::new(), addresses: vec![address(host.node)], may_lead: true };
    let deployment = DeploymentId(1 + host.incarnation);
    stored.forget().found(deployment, own, Vec::new()).unwrap_or_else(|error| panic!("nothing is founded: {error}"))
}
