//! A stage moves from a worker that serves several to one that serves none.
//!
//! After a loss the cut stays as it is, so that a worker may come to serve the stage of another one beside its own: it
//! computes twice for every token, and two stages would be lost with it. Once somebody with room serves nothing, one of
//! the stages goes there, as that of a node that leaves: loaded first, then the passes on their way are waited for,
//! then what the slots hold is handed over.
//!
//! Each move takes a stage to a node that serves none from one that keeps another, so that one more node serves than
//! before. Nothing moves back, and it comes to an end.

use std::cmp::Reverse;
use std::time::Duration;

use brigade_base::NodeId;

use super::Cluster;
use super::ring::{Move, Ring};
use super::types::{Member, MemberStage, Phase};

/// So long a ring is ready before a stage moves: whatever broke it may break it again within seconds, and several nodes
/// that come back one after the other are all there then.
pub(super) const SETTLED: Duration = Duration::from_secs(5);

impl Ring {
    /// The node may get stages and serves none.
    fn is_free(&self, member: &Member) -> bool {
        member.is_here() && self.layers_of(member.id)[0].is_empty()
    }

    /// The node serves several stages.
    fn is_burdened(&self, id: NodeId) -> bool {
        self.layers_of(id)[0].len() > 1
    }
}

impl Cluster {
    /// A stage is on its way to another node.
    pub(super) fn is_moving(&self) -> bool {
        self.ring.as_ref().is_some_and(|ring| ring.moving.is_some())
    }

    /// The ring is ready from now on, with whoever a stage moved to.
    pub(super) fn note_ready(&mut self) {
        self.settled_at = self.now.map(|now| now + SETTLED);
        if let Some(ring) = &mut self.ring {
            ring.newcomer = None;
        }
    }

    /// Takes the move a step on, or begins one; only in a ring that runs and from which nobody wants to go.
    pub(super) fn move_on(&mut self) {
        let Some(ring) = &self.ring else { return };
        if ring.moving.is_some_and(|moving| !self.can_move(ring, moving)) {
            self.cancel_move();
        }
        if !self.is_moving() {
            self.begin_move();
        }
        let Some(moving) = self.ring.as_ref().and_then(|ring| ring.moving) else { return };
        let stage = self.member(moving.to).and_then(|m| m.stage(moving.stage as u32));
        if self.settled_at.is_none() && stage.is_some_and(MemberStage::is_loaded) {
            if let Some(moving) = self.ring.as_mut().and_then(|ring| ring.moving.as_mut()) {
                moving.is_due = true;
            }
            self.phase = Phase::Draining(format!("a stage moves to node {}", self.name(moving.to)));
        }
    }

    /// Whether a move is still to be: who is to have the stage is free for it, and who has it keeps another one.
    fn can_move(&self, ring: &Ring, moving: Move) -> bool {
        let holder = ring.seats.get(moving.stage).and_then(|seat| seat.holder);
        self.member(moving.to).is_some_and(|m| ring.is_free(m)) && holder.is_some_and(|id| ring.is_burdened(id))
    }

    /// There is no move any more. Who loads the stage stands by for it, where somebody is to.
    pub(super) fn cancel_move(&mut self) {
        let Some(mut ring) = self.ring.clone() else { return };
        let Some(moving) = ring.moving.take() else { return };
        let seat = &mut ring.seats[moving.stage];
        seat.standby = seat.standby.or(Some(moving.to));
        self.drop_unwanted_standbys(&mut ring, None);
        self.ring = Some(ring);
        self.forget_dropped_standbys();
        self.explain();
    }

    /// Chooses a stage that moves, and has it loaded where it will be.
    fn begin_move(&mut self) {
        let Some(ring) = &self.ring else { return };
        let Some(moving) = self.choose_move(ring) else { return };
        let mut ring = ring.clone();
        ring.moving = Some(moving);
        self.load_beside(ring, moving.stage, moving.to);
    }

    /// The stage that is to move: one of whoever serves most, rather one that is loaded already at somebody who serves
    /// none, or loads there.
    fn choose_move(&self, ring: &Ring) -> Option<Move> {
        let n_stages = |stage: usize| ring.seats[stage].holder.map_or(0, |id| ring.layers_of(id)[0].len());
        let may = |m: &Member| ring.is_free(m) && !m.is_resting();
        let standby = |stage: usize| {
            let member = ring.seats[stage].standby.and_then(|id| self.member(id));
            member.filter(|m| may(m)).map(|m| m.id)
        };
        let is_loaded = |stage: usize| standby(stage).is_some() && self.has_loaded_standby(ring, stage);
        let mut stages: Vec<usize> = (0..ring.seats.len()).filter(|&stage| n_stages(stage) > 1).collect();
        stages.sort_by_key(|&k| (Reverse(n_stages(k)), Reverse(is_loaded(k)), Reverse(standby(k).is_some())));
        stages.into_iter().find_map(|stage| {
            let to = standby(stage).or_else(|| self.stand_in(ring, stage, may))?;
            Some(Move { stage, to, is_due: false })
        })
    }

    /// Gives the stage that moves to its new holder in a ring that is to be, if the placement is made for it.
    pub(super) fn take_move(&self, ring: &mut Ring) {
        let Some(moving) = ring.moving.take_if(|moving| moving.is_due) else { return };
        let Some(member) = self.member(moving.to).filter(|_| self.can_move(ring, moving)) else { return };
        let seat = &mut ring.seats[moving.stage];
        (seat.handed_by, seat.kv_from) = (seat.holder, seat.holder);
        let standby = seat.standby.filter(|&id| id != moving.to);
        ring.seat(moving.stage, member);
        ring.seats[moving.stage].standby = standby;
        ring.newcomer = Some(moving.to);
    }

    /// A node is lost that a stage moves to or from. Who loads it already stands by from now on.
    pub(super) fn lost_while_moving(&mut self, id: NodeId) {
        let Some(ring) = &mut self.ring else { return };
        let seats = &mut ring.seats;
        let is_over = |moving: &mut Move| moving.to == id || seats[moving.stage].holder.is_none();
        if let Some(moving) = ring.moving.take_if(is_over)
            && moving.to != id
        {
            let seat = &mut seats[moving.stage];
            seat.standby = seat.standby.or(Some(moving.to));
        }
    }

    /// For people: what moves where.
    pub(super) fn explain_move(&self) -> Option<String> {
        let ring = self.ring.as_ref()?;
        let moving = ring.moving?;
        let seat = ring.seats.get(moving.stage)?;
        let (from, to) = (self.name(seat.holder?), self.name(moving.to));
        Some(format!("Layers {} of {from}, which serves others too, move to {to}, which serves none.", seat.layers))
    }
}
