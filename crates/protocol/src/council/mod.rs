//! Who coordinates: votes, terms, and the charter that all nodes agree on. Without I/O.
//!
//! Each node of a deployment has a [`Council`], the coordinator too. It is told what was received, who was heard, and
//! the time; it answers what to store, what to send, and when this node begins or ceases to coordinate.
//!
//! ```text
//!            heard nothing for long            trial: a quorum would vote for it
//!  Following ---------------------> Asking (trial) ------------------> Asking (vote)
//!     ^  ^                             |                                   | a quorum votes for it
//!     |  +--- hears a coordinator -----+-----------------------------------+
//!     |                                                                    v
//!     +---------------------- hears a higher term ------------------ Coordinating
//! ```
//!
//! It is Raft (Ongaro & Ousterhout, "In Search of an Understandable Consensus Algorithm", 2014) whose log is one value:
//!
//! - **One coordinator per term.** A node gives one vote per term (§5.2), and stores it before it says so: of what a
//!   call returns, [`Action::Store`] comes first. Whoever has the votes of a quorum coordinates.
//! - **What was agreed stays.** A node votes only for those whose [`Charter`] is at least as new as its own (§5.4.1). A
//!   coordinator first writes a charter of its own term.
//! - **Who votes can change** one step after the other, with both sets of voters agreeing on each (§6).
//! - **Nobody is deposed by mistake.** A node that hears its coordinator votes for no other, and a candidate asks
//!   whether it would be elected before it begins a term (Ongaro, "Consensus: Bridging Theory and Practice", 2014,
//!   §4.2.3 and §9.6). So a node that was cut off comes back without a new election.
//! - **The choice is deterministic.** Instead of random pauses, nodes wait by their place in the charter.
//!
//! The term is the upper half of epochs, so that what a deposed coordinator still says is dropped like that of any old
//! placement.

mod charter;
mod coordinate;
mod message;
mod vote;

#[cfg(test)]
mod simulation;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use brigade_base::{DeploymentId, NodeId};

pub use charter::{Charter, MAX_SETTINGS_BYTES, MAX_TERM, MAX_VOTERS, Proposal, ProposalError, Stored, Voter};
pub use message::{Body, CouncilMessage, Incumbent, MAX_COUNCIL_BYTES};

use crate::control::{DEAD_AFTER_MS, HEARTBEAT_MS, Peer};
use coordinate::Coordination;
use vote::{Candidacy, Question};

/// A node that heard its coordinator so recently votes for nobody else: four heartbeats.
pub const STICKY: Duration = Duration::from_millis(4 * HEARTBEAT_MS);

/// How long a coordinator has to come back before others ask for votes: time for a restart, and for all voters to get
/// over [`STICKY`], since a candidate's link may have been the first to break.
pub const GRACE: Duration = Duration::from_millis(1_000);

/// What each further place in the charter waits longer: several times what two rounds of questions take in one house,
/// so that the one before is done.
pub const STAGGER: Duration = Duration::from_millis(400);

/// How long a coordinator may count on a voter that it heard. More than [`DEAD_AFTER_MS`], so that a lost worker is
/// replaced before its vote is missed; less than the 2.25 s after which a silent coordinator is first replaced.
pub const LEASE: Duration = Duration::from_millis(2_000);

/// A silent coordinator is lost after so long; a closed link is told with [`Council::lost`].
const SILENCE: Duration = Duration::from_millis(DEAD_AFTER_MS);

/// Most nodes whose last word is remembered: the voters of a charter, those of a change, and as many that only take
/// part.
const MAX_HEARD: usize = 4 * MAX_VOTERS;

/// What happened.
#[derive(Debug, Clone)]
pub enum Input {
    /// A message came from this node, whose identity the link has proven.
    Message(NodeId, CouncilMessage),
    /// Other voters or settings are wanted. Only the coordinator can propose, with itself as the first voter; elsewhere
    /// it has no effect, so the next coordinator is to propose what it finds. Of proposals that wait for a change to
    /// end, the last one counts.
    Propose(Proposal),
    /// Time has passed; the first input, and whenever [`Council::next_tick`] is reached.
    Tick,
}

/// What to do, in this order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Make it durable before anything that follows is done; if that fails, the process must end.
    Store(Stored),
    /// Send a message. Where there are no addresses, the node is to be answered on a link of its own.
    Send {
        /// To whom.
        to: Peer,
        /// What.
        message: CouncilMessage,
    },
    /// This node coordinates from now on.
    Lead {
        /// In this term.
        term: u64,
        /// The charter that it takes over.
        charter: Charter,
    },
    /// Somebody else coordinates: its link is to be dialled.
    Follow(Incumbent),
    /// This node coordinates no more.
    StepDown {
        /// Why, for people.
        reason: String,
    },
}

/// What the node is.
#[derive(Debug)]
enum Role {
    Following,
    Asking(Candidacy),
    Coordinating(Coordination),
}

/// A node's part in the choice of a coordinator.
#[derive(Debug)]
pub struct Council {
    me: NodeId,
    stored: Stored,
    role: Role,
    /// Who coordinates; `None` if that is this node, or not known.
    incumbent: Option<Incumbent>,
    /// When the incumbent was heard.
    incumbent_heard: Option<Instant>,
    /// From when on the incumbent counts as lost, so that the wait before a candidacy begins.
    lost_from: Instant,
    /// When each node was heard, while this one coordinates.
    heard: BTreeMap<NodeId, Instant>,
    actions: Vec<Action>,
    has_changed: bool,
    has_started: bool,
}

impl Council {
    /// The part of node `me`, with what it stored before; the default where it has taken part in no deployment.
    ///
    /// The first tick is due at once.
    pub fn new(me: NodeId, stored: Stored, now: Instant) -> Self {
        let incumbent = stored.charter.as_ref().filter(|charter| charter.coordinator != me).map(|charter| {
            let peer = charter.peer(charter.coordinator);
            Incumbent { term: charter.term, peer }
        });
        Self {
            me,
            stored,
            role: Role::Following,
            actions: incumbent.clone().map(Action::Follow).into_iter().collect(),
            incumbent,
            incumbent_heard: None,
            lost_from: now,
            heard: BTreeMap::new(),
            has_changed: false,
            has_started: false,
        }
    }

    /// Takes an input and says what to do.
    pub fn handle(&mut self, now: Instant, input: Input) -> Vec<Action> {
        match input {
            Input::Message(from, _) if from == self.me => {}
            Input::Message(from, message) => self.receive(now, from, message),
            Input::Propose(proposal) => self.propose(now, proposal),
            Input::Tick => self.tick(now),
        }
        self.has_started = true;
        let mut actions = Vec::new();
        if std::mem::take(&mut self.has_changed) {
            actions.push(Action::Store(self.stored.clone()));
        }
        actions.append(&mut self.actions);
        actions
    }

    /// When the next tick is due; `None` while only news can change anything.
    pub fn next_tick(&self) -> Option<Instant> {
        if !self.has_started {
            return Some(self.lost_from);
        }
        match &self.role {
            Role::Following => self.asks_at(),
            Role::Asking(candidacy) => Some(candidacy.until),
            Role::Coordinating(coordination) => Some(self.resends_at(coordination)),
        }
    }

    /// A node was heard: for a coordinator, one that works for it; for others, the node that acts as coordinator. Only
    /// what comes on a link between a worker and its coordinator counts, heartbeats included, since a node that can be
    /// reached but follows somebody else must not be counted on.
    pub fn heard(&mut self, now: Instant, node: NodeId) {
        if matches!(self.role, Role::Coordinating(_)) {
            if self.heard.len() >= MAX_HEARD {
                self.heard.retain(|_, heard| now.saturating_duration_since(*heard) < LEASE);
            }
            if self.heard.len() < MAX_HEARD || self.heard.contains_key(&node) {
                self.heard.insert(node, now);
            }
        } else if self.incumbent.as_ref().is_some_and(|incumbent| incumbent.peer.node == node) {
            self.incumbent_heard = Some(now);
            self.lost_from = now + SILENCE;
            if matches!(&self.role, Role::Asking(candidacy) if candidacy.is_trial) {
                self.role = Role::Following;
            }
        }
    }

    /// The link to a node closed. Only the coordinator's is of interest.
    pub fn lost(&mut self, now: Instant, node: NodeId) {
        if self.incumbent.as_ref().is_some_and(|incumbent| incumbent.peer.node == node) {
            self.lost_from = self.lost_from.min(now);
        }
    }

    /// This node coordinates, and has heard enough voters within [`LEASE`] to be sure of the others' votes; itself
    /// alone is enough where nobody else may lead.
    pub fn has_quorum(&self, now: Instant) -> bool {
        let Some(charter) = self.stored.charter.as_ref().filter(|_| self.is_coordinator()) else { return false };
        charter.is_quorum(|node| self.hears(now, node))
    }

    /// This node coordinates.
    pub fn is_coordinator(&self) -> bool {
        matches!(self.role, Role::Coordinating(_))
    }

    /// Who coordinates, as far as this node knows; itself if it does.
    pub fn incumbent(&self) -> Option<Incumbent> {
        if !self.is_coordinator() {
            return self.incumbent.clone();
        }
        let peer = self.stored.charter.as_ref()?.peer(self.me);
        Some(Incumbent { term: self.stored.term, peer })
    }

    /// What this node says to one that takes it for the coordinator while it is not.
    pub fn refusal(&self) -> Option<CouncilMessage> {
        let deployment = self.stored.charter.as_ref()?.deployment;
        let body = Body::Refused { term: self.stored.term, incumbent: self.incumbent() };
        Some(CouncilMessage { deployment, body })
    }

    /// The highest term that this node knows.
    pub fn term(&self) -> u64 {
        self.stored.term
    }

    /// The newest charter that this node was given or wrote. A quorum may not have it yet.
    pub fn charter(&self) -> Option<&Charter> {
        self.stored.charter.as_ref()
    }

    /// What is durable once the last [`Action::Store`] is done.
    pub fn stored(&self) -> &Stored {
        &self.stored
    }

    fn hears(&self, now: Instant, node: NodeId) -> bool {
        let recently = |heard: &Instant| now.saturating_duration_since(*heard) < LEASE;
        node == self.me || self.heard.get(&node).is_some_and(recently)
    }

    /// The coordinator was heard so recently that nobody else gets this node's vote.
    fn is_loyal(&self, now: Instant) -> bool {
        match self.role {
            Role::Coordinating(_) => self.has_quorum(now),
            _ => self.incumbent_heard.is_some_and(|heard| now.saturating_duration_since(heard) < STICKY),
        }
    }

    fn tick(&mut self, now: Instant) {
        match &self.role {
            Role::Following if self.asks_at().is_some_and(|due| due <= now) => self.ask(now, true),
            Role::Asking(candidacy) if candidacy.until <= now => self.ask(now, true),
            Role::Coordinating(coordination) if self.resends_at(coordination) <= now => self.resend(now),
            _ => {}
        }
    }

    fn receive(&mut self, now: Instant, from: NodeId, message: CouncilMessage) {
        if self.stored.charter.as_ref().is_some_and(|charter| charter.deployment != message.deployment) {
            return;
        }
        match message.body {
            Body::VoteRequest { term, charter_term, charter_version, is_trial } => {
                let (deployment, age) = (message.deployment, (charter_term, charter_version));
                self.asked(now, from, &Question { deployment, term, age, is_trial });
            }
            Body::VoteReply { asked, is_trial, granted, term, incumbent } => {
                if granted {
                    self.count_vote(now, from, asked, is_trial);
                } else {
                    self.denied(now, term, incumbent);
                }
            }
            Body::WriteCharter(charter) if charter.deployment == message.deployment => self.obey(now, from, charter),
            Body::WriteCharter(_) => {}
            Body::CharterWritten { term, version } => self.count_written(now, from, (term, version)),
            Body::Refused { term, incumbent } => self.denied(now, term, incumbent),
        }
    }

    /// A coordinator wrote a charter.
    fn obey(&mut self, now: Instant, from: NodeId, charter: Charter) {
        if charter.coordinator != from {
            return;
        }
        let deployment = charter.deployment;
        if charter.term < self.stored.term {
            let body = Body::Refused { term: self.stored.term, incumbent: self.incumbent() };
            return self.reply(from, deployment, body);
        }
        if charter.term == self.stored.term && self.is_coordinator() {
            // Votes allow no second coordinator of a term.
            return;
        }
        self.adopt(now, charter.term);
        self.role = Role::Following;
        let incumbent = Incumbent { term: charter.term, peer: charter.peer(from) };
        if self.stored.charter.as_ref().is_none_or(|own| own.age() < charter.age()) {
            self.stored.charter = Some(charter);
            self.has_changed = true;
        }
        self.follow(now, incumbent);
        self.heard(now, from);
        let (term, version) = self.stored.charter.as_ref().map_or((0, 0), Charter::age);
        self.reply(from, deployment, Body::CharterWritten { term, version });
    }

    /// Somebody knows a higher term, or another coordinator.
    fn denied(&mut self, now: Instant, term: u64, incumbent: Option<Incumbent>) {
        let is_behind = term > self.stored.term;
        self.adopt(now, term);
        if let Some(incumbent) = incumbent.filter(|incumbent| self.is_news(incumbent)) {
            self.role = Role::Following;
            self.follow(now, incumbent);
        } else if is_behind && matches!(&self.role, Role::Asking(candidacy) if candidacy.is_trial) {
            // The question was for a term that is over. Each such answer brings a term that somebody has begun, and a
            // trial begins none, so that this ends.
            self.ask(now, true);
        }
    }

    /// A hint is worth following if it is newer than what this node knows.
    fn is_news(&self, hint: &Incumbent) -> bool {
        let charter_term = self.stored.charter.as_ref().map_or(0, |charter| charter.term);
        let known_term = self.incumbent.as_ref().map(|known| known.term);
        let is_newer = hint.term >= charter_term && known_term.is_none_or(|known| known < hint.term);
        is_newer && hint.peer.node != self.me && !self.is_coordinator()
    }

    fn follow(&mut self, now: Instant, incumbent: Incumbent) {
        if self.incumbent.as_ref() == Some(&incumbent) {
            return;
        }
        self.incumbent_heard = None;
        // As long as for one that falls silent: it is to be reached first.
        self.lost_from = now + SILENCE;
        self.actions.push(Action::Follow(incumbent.clone()));
        self.incumbent = Some(incumbent);
    }

    /// Takes over a higher term. Whoever coordinates in a lower one has been deposed, or will be.
    fn adopt(&mut self, now: Instant, term: u64) {
        if term <= self.stored.term {
            return;
        }
        self.stored.term = term;
        self.has_changed = true;
        if self.is_coordinator() {
            let reason = format!("the cluster has gone on to term {term}");
            self.actions.push(Action::StepDown { reason });
            self.role = Role::Following;
            self.incumbent = None;
            self.lost_from = now;
            self.heard.clear();
        }
    }

    fn reply(&mut self, to: NodeId, deployment: DeploymentId, body: Body) {
        let to = self.stored.charter.as_ref().map_or(Peer { node: to, addresses: Vec::new() }, |c| c.peer(to));
        self.actions.push(Action::Send { to, message: CouncilMessage { deployment, body } });
    }

    /// Sends to the voters of whom `wanted` holds.
    fn send_to(&mut self, body: &Body, wanted: impl Fn(NodeId) -> bool) {
        let Some(charter) = &self.stored.charter else { return };
        let deployment = charter.deployment;
        let others = charter.electorate().filter(|voter| voter.node != self.me && wanted(voter.node));
        let message = CouncilMessage { deployment, body: body.clone() };
        self.actions.extend(others.map(|voter| Action::Send { to: voter.peer(), message: message.clone() }));
    }
}
