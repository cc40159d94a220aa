//! Votes: asking for them, giving them, counting them.

use super::*;

/// A trial that has not brought a quorum after so long is repeated: two round trips between continents. Repeating it
/// is harmless, and soon all voters will have missed their coordinator for long enough.
const TRIAL: Duration = Duration::from_millis(400);

/// An election that has not been won after so long, and a [`STAGGER`] for each place, is given up: the votes were split
/// or messages lost. The places keep two candidates from trying again at the same time.
const ROUND: Duration = Duration::from_millis(600);

/// What a candidate says of itself.
pub(super) struct Question {
    pub(super) deployment: DeploymentId,
    /// The term that it asks for.
    pub(super) term: u64,
    /// Of its charter.
    pub(super) age: (u64, u64),
    pub(super) is_trial: bool,
}

/// A node that asks for votes.
#[derive(Debug)]
pub(super) struct Candidacy {
    pub(super) is_trial: bool,
    term: u64,
    granted: BTreeSet<NodeId>,
    pub(super) until: Instant,
}

impl Council {
    /// When this node asks for votes if it hears of no coordinator; `None` if it may not lead.
    pub(super) fn asks_at(&self) -> Option<Instant> {
        let place = self.stored.charter.as_ref()?.place(self.me)?;
        // The coordinator itself, after a restart or when it was deposed by nobody, need not wait for its return.
        let wait = place.checked_sub(1).map_or(Duration::ZERO, |n_before| GRACE + STAGGER * n_before);
        Some(self.lost_from + wait)
    }

    /// Asks all voters for the next term.
    pub(super) fn ask(&mut self, now: Instant, is_trial: bool) {
        let Some(charter) = &self.stored.charter else { return };
        let Some(place) = charter.place(self.me) else {
            self.role = Role::Following;
            return;
        };
        let term = self.stored.term + 1;
        let (charter_term, charter_version) = charter.age();
        if term > MAX_TERM {
            self.role = Role::Following;
            // No term is left, and none ever will be: it asks again at a pace that harms nobody.
            self.lost_from = now + LEASE;
            return;
        }
        if !is_trial {
            self.stored.term = term;
            self.stored.voted = Some((term, self.me));
            self.has_changed = true;
        }
        let until = now + if is_trial { TRIAL } else { ROUND + STAGGER * place };
        let granted = BTreeSet::from([self.me]);
        self.role = Role::Asking(Candidacy { is_trial, term, granted, until });
        if !self.is_elected() {
            let body = Body::VoteRequest { term, charter_term, charter_version, is_trial };
            return self.send_to(&body, |_| true);
        }
        self.win(now);
    }

    /// A node with a charter of this age asks for this one's vote. One that has no charter yet votes as well: it may be
    /// a voter already, of a charter whose coordinator died before it was told.
    pub(super) fn asked(&mut self, now: Instant, from: NodeId, question: &Question) {
        let &Question { deployment, term, age, is_trial } = question;
        if self.stored.charter.is_none() && self.stored.left == Some(deployment) {
            return;
        }
        // Somebody was elected in that term, whatever comes of this question.
        self.adopt(now, age.0);
        let is_as_new = self.stored.charter.as_ref().is_none_or(|charter| age >= charter.age());
        let is_incumbent = self.incumbent.as_ref().is_some_and(|incumbent| incumbent.peer.node == from);
        // A coordinator that asks has restarted: there is nothing left to be loyal to.
        let is_loyal = self.is_loyal(now) && !is_incumbent;
        let granted = if is_trial {
            !is_loyal && is_as_new && term > self.stored.term
        } else if is_loyal && !self.is_coordinator() {
            false
        } else {
            // A quorum would have voted for the one who asks, so a coordinator gives way as well.
            let coordinated = self.is_coordinator();
            self.adopt(now, term);
            if coordinated && !self.is_coordinator() {
                // The candidate is first.
                self.lost_from = now + ROUND;
            }
            let is_free = self.stored.voted.is_none_or(|(voted, node)| voted < term || node == from);
            is_as_new && term == self.stored.term && is_free
        };
        if granted && !is_trial {
            self.stored.voted = Some((term, from));
            self.has_changed = true;
            self.role = Role::Following;
            // Time for the winner to say that it is one.
            self.lost_from = self.lost_from.max(now + ROUND);
        }
        let incumbent = if is_loyal && !granted { self.incumbent() } else { None };
        let body = Body::VoteReply { asked: term, is_trial, granted, term: self.stored.term, incumbent };
        self.reply(from, deployment, body);
    }

    /// A node gave its vote, or would give it.
    pub(super) fn count_vote(&mut self, now: Instant, from: NodeId, asked: u64, is_trial: bool) {
        let Role::Asking(candidacy) = &mut self.role else { return };
        if (candidacy.term, candidacy.is_trial) != (asked, is_trial) {
            return;
        }
        candidacy.granted.insert(from);
        if self.is_elected() {
            self.win(now);
        }
    }

    fn is_elected(&self) -> bool {
        let Role::Asking(candidacy) = &self.role else { return false };
        // A term that somebody else has begun meanwhile can no longer be won.
        let is_open = candidacy.term == self.stored.term + u64::from(candidacy.is_trial);
        let charter = self.stored.charter.as_ref();
        is_open && charter.is_some_and(|charter| charter.is_quorum(|node| candidacy.granted.contains(&node)))
    }

    /// A trial becomes an election, an election a coordinator.
    fn win(&mut self, now: Instant) {
        match std::mem::replace(&mut self.role, Role::Following) {
            Role::Asking(candidacy) if candidacy.is_trial => self.ask(now, false),
            Role::Asking(candidacy) => self.lead(now, candidacy.granted),
            role => self.role = role,
        }
    }
}
