//! The coordinator's side: writing charters until the voters have them.

use super::charter::is_quorum;
use super::*;

/// A voter that has not said that it has the charter gets it again this often.
const RESEND: Duration = Duration::from_millis(HEARTBEAT_MS);

/// A voter that is silent gets it this often, even if it has it: each is an attempt to reach it, and if it follows
/// somebody else by now, its answer says so.
const RESEND_SILENT: Duration = LEASE;

/// A node that coordinates.
#[derive(Debug)]
pub(super) struct Coordination {
    /// Who has the charter.
    written: BTreeSet<NodeId>,
    /// What the charter is to become when the change under way is over.
    wanted: Option<Proposal>,
    /// When those that are heard get it again.
    resend: Instant,
    /// When the silent ones get it again.
    resend_silent: Instant,
}

impl Council {
    /// Nothing is under way: a quorum has the charter, it has one set of voters, and nothing else was proposed. False
    /// where this node does not coordinate.
    pub fn is_settled(&self) -> bool {
        let (Role::Coordinating(coordination), Some(charter)) = (&self.role, &self.stored.charter) else {
            return false;
        };
        let is_written = charter.is_quorum(|node| coordination.written.contains(&node));
        is_written && charter.before.is_empty() && coordination.wanted.is_none()
    }

    /// Begins to coordinate in the stored term, with the votes of `voters`.
    pub(super) fn lead(&mut self, now: Instant, voters: BTreeSet<NodeId>) {
        let Some(charter) = self.stored.charter.clone() else { return };
        self.heard = voters.into_iter().map(|node| (node, now)).collect();
        self.incumbent = None;
        self.incumbent_heard = None;
        // The new coordinator is to be the tie breaker, as the one before was.
        let others = charter.voters.iter().filter(|voter| voter.node != self.me).cloned().collect();
        let me = charter.voter(self.me).cloned();
        let wanted = me.and_then(|me| Proposal::new(me, others, charter.settings.clone()).ok());
        let (resend, resend_silent) = (now + RESEND, now + RESEND_SILENT);
        self.role = Role::Coordinating(Coordination { written: BTreeSet::new(), wanted, resend, resend_silent });
        self.actions.push(Action::Lead { term: self.stored.term, charter: charter.clone() });
        self.write(now, charter);
        self.advance(now);
    }

    pub(super) fn propose(&mut self, now: Instant, proposal: Proposal) {
        let Role::Coordinating(coordination) = &mut self.role else { return };
        if proposal.voters.first().is_some_and(|first| first.node == self.me) {
            coordination.wanted = Some(proposal);
            self.advance(now);
        }
    }

    /// A voter has made a charter durable.
    pub(super) fn count_written(&mut self, now: Instant, from: NodeId, age: (u64, u64)) {
        if age.0 > self.stored.term {
            return self.adopt(now, age.0);
        }
        if age.0 == self.stored.term && self.is_coordinator() {
            self.heard(now, from);
        }
        let (Role::Coordinating(coordination), Some(charter)) = (&mut self.role, &self.stored.charter) else { return };
        if age == charter.age() && coordination.written.insert(from) {
            self.advance(now);
        }
    }

    /// When to send the charter again.
    pub(super) fn resends_at(&self, coordination: &Coordination) -> Instant {
        let charter = self.stored.charter.as_ref();
        let lacks = |voter: &Voter| voter.node != self.me && !coordination.written.contains(&voter.node);
        let is_under_way = coordination.wanted.is_some() || charter.is_some_and(|c| c.electorate().any(lacks));
        if is_under_way { coordination.resend.min(coordination.resend_silent) } else { coordination.resend_silent }
    }

    /// Sends the charter to those that have not said that they have it, and to those that say nothing.
    pub(super) fn resend(&mut self, now: Instant) {
        let Role::Coordinating(coordination) = &mut self.role else { return };
        coordination.resend = now + RESEND;
        let is_for_silent = coordination.resend_silent <= now;
        if is_for_silent {
            coordination.resend_silent = now + RESEND_SILENT;
        }
        let written = coordination.written.clone();
        let age = self.stored.charter.as_ref().map(Charter::age);
        self.advance(now);
        let Some(charter) = self.stored.charter.clone().filter(|charter| Some(charter.age()) == age) else { return };
        let heard: BTreeSet<_> = charter.electorate().map(|v| v.node).filter(|node| self.hears(now, *node)).collect();
        let wanted = |node| if heard.contains(&node) { !written.contains(&node) } else { is_for_silent };
        self.send_to(&Body::WriteCharter(charter), wanted);
    }

    /// Takes the next steps of a change for which a quorum is ready.
    fn advance(&mut self, now: Instant) {
        loop {
            let (Role::Coordinating(coordination), Some(charter)) = (&self.role, &self.stored.charter) else { return };
            if !charter.is_quorum(|node| coordination.written.contains(&node)) {
                return;
            }
            let end = (!charter.before.is_empty()).then(|| Charter { before: Vec::new(), ..charter.clone() });
            let Some(next) = end.or_else(|| self.change(now)) else { return };
            if !self.write(now, next) {
                return;
            }
        }
    }

    /// The charter by which the one that a quorum has becomes what is wanted.
    fn change(&mut self, now: Instant) -> Option<Charter> {
        let (Role::Coordinating(coordination), Some(charter)) = (&self.role, &self.stored.charter) else { return None };
        let wanted = coordination.wanted.as_ref()?;
        let is_joint = charter.differs_in_quorums(&wanted.voters);
        if is_joint && !is_quorum(&wanted.voters, |node| self.hears(now, node)) {
            // It would cost this node its quorum: wait until enough of the new voters are there.
            return None;
        }
        let before = if is_joint { charter.voters.clone() } else { Vec::new() };
        let has_news = charter.voters != wanted.voters || charter.settings != wanted.settings;
        let Proposal { voters, settings } = wanted.clone();
        let next = has_news.then(|| Charter { voters, settings, before, ..charter.clone() });
        if let Role::Coordinating(coordination) = &mut self.role {
            coordination.wanted = None;
        }
        next
    }

    /// Makes a charter the next version, stores it and sends it. False if no version is left.
    fn write(&mut self, now: Instant, charter: Charter) -> bool {
        let Role::Coordinating(coordination) = &mut self.role else { return false };
        if charter.version >= MAX_TERM {
            return false;
        }
        let (term, version, coordinator) = (self.stored.term, charter.version + 1, self.me);
        let charter = Charter { term, version, coordinator, ..charter };
        coordination.written = BTreeSet::from([self.me]);
        coordination.resend = now + RESEND;
        coordination.resend_silent = now + RESEND_SILENT;
        let body = Body::WriteCharter(charter.clone());
        // Those that lose their vote hear of it, once; they may miss it.
        self.send_to(&body, |node| charter.voter(node).is_none());
        self.stored.charter = Some(charter);
        self.has_changed = true;
        self.send_to(&body, |_| true);
        true
    }
}
