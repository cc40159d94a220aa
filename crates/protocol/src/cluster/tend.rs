//! What is done for a ring that runs: holders who stand by, and those who want to end are relieved of their stages.
//!
//! Who wants to end hands over to somebody who is ready for it: another node loads the weights first, as one that
//! stands by. Only then the passes on their way are waited for, and the stage changes hands with what its slots hold.

use std::time::{Duration, Instant};

use brigade_base::{ByteSize, NodeId};
use brigade_plan::{Uncovered, Worker, standbys};

use super::ring::Ring;
use super::types::{Action, Member, MemberStage, MemberState, Phase, StageState};
use super::{Cluster, RETRY};

/// So long others may load the weights of who wants to end; then it is relieved without. Two minutes fetch 12 GiB over
/// a gigabit link.
const LEAVE_WITHIN: Duration = Duration::from_secs(120);

impl Cluster {
    pub(super) fn leave(&mut self, now: Instant, id: NodeId) {
        let Some(member) = self.members.iter_mut().find(|m| m.id == id) else { return };
        // Who asks again was not answered, or its answer was lost.
        member.private.is_released = false;
        if member.state != MemberState::Leaving {
            member.state = MemberState::Leaving;
            member.private.leave_until = Some(now + LEAVE_WITHIN);
        }
    }

    /// Forgets deadlines that are over.
    pub(super) fn expire(&mut self, now: Instant) {
        self.settled_at = self.settled_at.filter(|&at| at > now);
        for member in &mut self.members {
            for deadline in [&mut member.private.no_standby_until, &mut member.private.leave_until] {
                if deadline.is_some_and(|until| until <= now) {
                    *deadline = None;
                }
            }
        }
    }

    /// Relieves those who want to end, then finds who stands by.
    pub(super) fn tend(&mut self, actions: &mut Vec<Action>) {
        if self.phase != Phase::Ready {
            return;
        }
        let serves = |m: &&Member| m.is_leaving() && self.ring.as_ref().is_some_and(|ring| ring.is_held_by(m.id));
        let leavers: Vec<NodeId> = self.members.iter().filter(serves).map(|m| m.id).collect();
        if !leavers.is_empty() {
            self.cancel_move();
        }
        for &id in &leavers {
            self.stand_by_for_leaver(id);
            if self.can_relieve(id) {
                self.phase = Phase::Draining(format!("node {} leaves", self.name(id)));
            }
        }
        if self.phase == Phase::Ready {
            self.find_standbys();
            if leavers.is_empty() {
                self.move_on();
            }
            self.change_if_faster();
        }
        if self.phase != Phase::Ready {
            actions.push(Action::Drain { epoch: self.epoch });
        }
    }

    fn stand_by_for_leaver(&mut self, leaver: NodeId) {
        let n_stages = self.ring.as_ref().map_or(0, |ring| ring.seats.len());
        for stage in 0..n_stages {
            let Some(ring) = &self.ring else { return };
            let seat = &ring.seats[stage];
            if seat.holder == Some(leaver)
                && seat.standby.is_none()
                && let Some(standby) = self.stand_in(ring, stage, |m| !m.is_resting())
            {
                self.add_standby(stage, standby);
            }
        }
    }

    /// Whether the next placement does without a node that wants to end, and everything is ready for it. Notes it then.
    fn can_relieve(&mut self, leaver: NodeId) -> bool {
        let Some(ring) = &self.ring else { return false };
        let held = || ring.seats.iter().enumerate().filter(|(_, seat)| seat.holder == Some(leaver));
        let is_loaded = held().all(|(stage, _)| self.has_loaded_standby(ring, stage));
        let is_covered = held().all(|(_, seat)| seat.standby.is_some());
        let is_over = self.member(leaver).is_none_or(|m| m.private.leave_until.is_none());
        // Who could not load a stage a moment ago may be able to in another one.
        let is_asked_again = !is_covered && self.members.iter().any(Member::is_resting);
        if (is_covered && !is_loaded || is_asked_again) && !is_over {
            return false;
        }
        self.set_due(leaver, true);
        let can = self.target().is_ok_and(|target| !target.is_held_by(leaver));
        self.set_due(leaver, can);
        can
    }

    fn set_due(&mut self, id: NodeId, is_due: bool) {
        if let Some(member) = self.members.iter_mut().find(|m| m.id == id) {
            member.private.is_due = is_due;
        }
    }

    fn find_standbys(&mut self) {
        let Some(ring) = self.ring.as_ref().filter(|_| self.settings.redundancy > 1) else { return };
        let uncovered = |(stage, seat): (usize, &super::ring::Seat)| {
            let holder = seat.holder.filter(|&id| self.member(id).is_some_and(Member::is_here))?;
            seat.standby.is_none().then_some(Uncovered { stage: stage as u32, layers: seat.layers, holder })
        };
        let stages: Vec<Uncovered> = ring.seats.iter().enumerate().filter_map(uncovered).collect();
        if stages.is_empty() {
            return;
        }
        let may = |m: &&Member| m.is_here() && !m.is_resting();
        let worker = |m: &Member| {
            let serves = m.stages.iter().filter(|s| !s.is_standby).map(|s| s.layers).collect();
            m.worker(serves, m.standby_layers().collect())
        };
        let workers: Vec<Worker> = self.members.iter().filter(may).map(worker).collect();
        for standby in standbys(&self.settings.model, &self.settings.demand, &stages, &workers) {
            self.add_standby(standby.stage as usize, standby.node);
        }
    }

    /// From now on a node stands by for a stage; it drops others that it stands by for if it must.
    fn add_standby(&mut self, stage: usize, id: NodeId) {
        let Some(mut ring) = self.ring.clone() else { return };
        ring.seats[stage].standby = Some(id);
        self.load_beside(ring, stage, id);
    }

    /// The ring is to be this one, in which a node stands by for a stage.
    pub(super) fn load_beside(&mut self, mut ring: Ring, stage: usize, id: NodeId) {
        let fresh = MemberStage {
            stage: stage as u32,
            layers: ring.seats[stage].layers,
            is_standby: true,
            state: StageState::Loading(0.0),
            memory: ByteSize(0),
            is_kept: false,
            was_loaded: false,
            held: None,
        };
        let is_new = |m: &&mut Member| m.id == id && m.stage(stage as u32).is_none();
        if let Some(member) = self.members.iter_mut().find(is_new) {
            member.stages.push(fresh);
            member.stages.sort_by_key(|s| s.stage);
        }
        self.drop_unwanted_standbys(&mut ring, Some(stage));
        self.ring = Some(ring);
        self.forget_dropped_standbys();
        self.explain();
    }

    /// A node could not load a stage that it was to stand by with: it is left alone for a while.
    pub(super) fn standby_failed(&mut self, now: Instant, id: NodeId, stage: u32) {
        if let Some(member) = self.members.iter_mut().find(|m| m.id == id) {
            member.private.no_standby_until = Some(now + RETRY);
        }
        if let Some(ring) = &mut self.ring {
            ring.moving.take_if(|moving| (moving.stage, moving.to) == (stage as usize, id));
            if let Some(seat) = ring.seats.get_mut(stage as usize) {
                seat.standby.take_if(|standby| *standby == id);
            }
        }
        self.forget_dropped_standbys();
        self.explain();
    }

    /// Forgets the stages of members who do not stand by for them any more.
    pub(super) fn forget_dropped_standbys(&mut self) {
        let stands_by = |stage: u32, id| self.ring.as_ref().is_some_and(|ring| ring.stands_by(stage as usize, id));
        for member in &mut self.members {
            let id = member.id;
            member.stages.retain(|s| !s.is_standby || stands_by(s.stage, id));
        }
    }

    /// Those who want to end and on whom nothing depends; they stand by for nobody from now on.
    pub(super) fn release(&mut self) -> Vec<NodeId> {
        let depends = |id| self.ring.as_ref().is_some_and(|ring| ring.depends_on(id));
        let is_free = |m: &&Member| m.is_leaving() && !m.private.is_relieved && !depends(m.id);
        let free: Vec<NodeId> = self.members.iter().filter(is_free).map(|m| m.id).collect();
        for member in self.members.iter_mut().filter(|m| free.contains(&m.id)) {
            member.private.is_released = true;
        }
        if let Some(ring) = self.ring.as_mut().filter(|_| !free.is_empty()) {
            let gone = ring.seats.iter_mut().filter(|seat| seat.standby.is_some_and(|id| free.contains(&id)));
            gone.for_each(|seat| seat.standby = None);
            ring.moving.take_if(|moving| free.contains(&moving.to));
            self.forget_dropped_standbys();
            self.explain();
        }
        free
    }
}
