//! What is left when a ring is lost, and how its sessions go on in the next one.
//!
//! The stages of the next ring hold what they held before, or nothing. They have applied different numbers of the
//! passes that were on their way, so the scheduler remembers of the last passes which tokens of which slots they left
//! alone: these are the same on every stage, whether it has applied a pass or not. Everything behind them is computed
//! again, each row in the way in which it was computed before.
//!
//! Slots that cannot be cut back go on only if none of those passes had rows of them, so that all stages hold the same
//! and nothing but that. All others begin anew.

use std::collections::VecDeque;

use brigade_base::PassId;

use super::kv::Kept;
use super::{Limits, Pass, Scheduler, Slot};
use crate::control::Held;
use crate::frame::{KvStep, RowSet};

/// Passes that are remembered: more than are in a ring, and than a node that computes along may lag behind, which
/// queues at most [`MAX_SHADOW_LAG`].
const MAX_TOUCHED: usize = MAX_SHADOW_LAG + 64;

/// Most passes that may wait for a node that computes along: those of an answer that is computed again at once, in
/// waves.
pub const MAX_SHADOW_LAG: usize = 960;

/// For the last passes, the slots whose contents they change, and how many of each slot's first tokens they do not.
#[derive(Debug, Default)]
pub(super) struct Touched(VecDeque<(PassId, Vec<(u32, u32)>)>);

impl Touched {
    /// Takes note of a pass that is sent.
    pub(super) fn note(&mut self, pass: &Pass) {
        let sets = pass.sets.iter().map(|set| (set.slot, set.keep));
        let steps = pass.steps.iter().filter_map(|step| match step {
            KvStep::Copy { slot, .. } | KvStep::Load { slot, .. } => Some((*slot, 0)),
            KvStep::Save { .. } | KvStep::Drop { .. } => None,
        });
        if self.0.len() == MAX_TOUCHED {
            self.0.pop_front();
        }
        let mut slots: Vec<(u32, u32)> = steps.chain(sets).collect();
        // The least of each slot is enough.
        slots.sort_unstable();
        slots.dedup_by_key(|(slot, _)| *slot);
        self.0.push_back((pass.id, slots));
    }

    /// How many of the first tokens of `slot` no pass after `applied` has changed, as far as is remembered; `u32::MAX`
    /// if none had rows or steps of it.
    fn untouched(&self, slot: u32, applied: PassId) -> u32 {
        let forgotten = self.0.front().is_some_and(|(oldest, _)| *oldest > applied.next());
        if forgotten {
            return 0;
        }
        let after = self.0.iter().rev().take_while(|(pass, _)| *pass > applied);
        let keeps = after.flat_map(|(_, slots)| slots.iter().filter(|(at, _)| *at == slot).map(|(_, keep)| *keep));
        keeps.min().unwrap_or(u32::MAX)
    }
}

impl Scheduler {
    /// Goes on in another ring. `held` is what all of its stages hold: the least of what each has applied and of what
    /// each of its slots has; `None` if one of them holds nothing. No pass of the ring before comes back any more.
    ///
    /// Sessions that had a slot keep it, and go on before those that wait. Images are those of one ring: the stages
    /// drop theirs too.
    pub fn recover(&mut self, limits: Limits, held: Option<&Held>) {
        // Slots and their size are those of the deployment.
        let Limits { n_slots, context, chunk, .. } = self.limits;
        let can_rewind = self.limits.can_rewind && limits.can_rewind;
        let limits = Limits { n_slots, context, chunk, can_rewind, ..limits }.sound();
        self.limits = limits;
        self.in_flight.clear();
        // What was sent after that counts no more: no slot is taken to hold anything of it.
        self.last_pass = held.map_or(PassId(0), |held| held.applied);
        self.chunk_back = 0;
        self.budget = super::Budget::default();
        self.images.clear(limits.image_tokens);
        self.to_drop.clear();
        for slot in 0..self.slots.len() {
            let valid = held.map_or(0, |held| self.valid(slot, held));
            match &mut self.slots[slot] {
                Slot::Held(session) if can_rewind => session.lose_all_but(valid),
                Slot::Held(session) => session.lose_unless_whole(valid),
                Slot::Kept(kept) if can_rewind => kept.lose_all_but(valid),
                Slot::Kept(kept) => kept.lose_unless_whole(valid),
            }
            self.vacate_if_due(slot);
        }
        // Whoever came first has the first chunk.
        let first = self.held().min_by_key(|(_, session)| session.arrived).map_or(0, |(slot, _)| slot);
        (self.prompt_turn, self.decode_turn) = (first, 0);
    }

    /// How many of the first tokens of a slot are the same on all stages; of one that cannot be cut back, all or none.
    fn valid(&self, slot: usize, held: &Held) -> u32 {
        let here = held.tokens.get(slot).copied().unwrap_or(0);
        let untouched = self.touched.untouched(slot as u32, held.applied);
        match self.limits {
            limits if limits.is_at_once() => 0,
            Limits { can_rewind: true, .. } => here.min(untouched),
            // Some stage may have applied a pass that another one has not.
            _ if untouched < u32::MAX => 0,
            _ => here,
        }
    }

    /// Forgets what is cached of sessions that have ended, so that those that come begin with their first token: a node
    /// that begins to compute along would otherwise lack what theirs are built on.
    pub fn forget_cache(&mut self) {
        for slot in &mut self.slots {
            if let Slot::Kept(kept) = slot {
                kept.lose_all_but(0);
            }
        }
    }

    /// A pass beside all sessions that shows whether a ring goes around: `rows` of slot 0, whose contents are lost by
    /// it, or none at all. To be sent while no other pass is in the ring; it is not completed.
    pub fn probe(&mut self, token: Option<brigade_base::Token>) -> Pass {
        let id = self.next_pass;
        self.next_pass = id.next();
        let follows = std::mem::replace(&mut self.last_pass, id);
        let sets = token.iter().map(|_| RowSet { slot: 0, keep: 0, n_rows: 1, n_outputs: 1 }).collect();
        let pass = Pass { id, follows, sets, tokens: token.into_iter().collect(), ..Pass::default() };
        self.touched.note(&pass);
        if token.is_some() {
            match &mut self.slots[0] {
                Slot::Held(session) => session.lose_all_but(0),
                Slot::Kept(kept) => *kept = Kept { has_surplus: true, ..Kept::default() },
            }
        }
        pass
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pass(id: u64, sets: &[(u32, u32)], steps: Vec<KvStep>) -> Pass {
        let sets = sets.iter().map(|&(slot, keep)| RowSet { slot, keep, n_rows: 1, n_outputs: 0 }).collect();
        Pass { id: PassId(id), sets, steps, ..Pass::default() }
    }

    #[test]
    fn what_later_passes_did_not_change_is_the_same_everywhere() {
        let mut touched = Touched::default();
        touched.note(&pass(5, &[(0, 10), (1, 3)], vec![]));
        touched.note(&pass(6, &[(0, 11)], vec![KvStep::Copy { slot: 2, from: 0, n_tokens: 8 }]));
        touched.note(&pass(7, &[(0, 4), (2, 8)], vec![]));
        let untouched = |slot, applied| touched.untouched(slot, PassId(applied));
        assert_eq!([4, 5, 6, 7].map(|applied| untouched(0, applied)), [4, 4, 4, u32::MAX]);
        assert_eq!([4, 5].map(|applied| untouched(1, applied)), [3, u32::MAX]);
        assert_eq!([5, 6, 7].map(|applied| untouched(2, applied)), [0, 8, u32::MAX]);
        assert_eq!(untouched(0, 3), 0, "pass 4 is not remembered");
    }

    #[test]
    fn so_many_passes_are_remembered() {
        let mut touched = Touched::default();
        (1..=MAX_TOUCHED as u64 + 1).for_each(|id| touched.note(&pass(id, &[(0, 9)], vec![])));
        assert_eq!(touched.0.len(), MAX_TOUCHED);
        assert_eq!([0, 1, 2].map(|applied| touched.untouched(0, PassId(applied))), [0, 9, 9]);
    }
}
