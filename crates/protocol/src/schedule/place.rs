//! Who gets which slot, what is taken over in it, and what happens to what was there.

use brigade_base::SessionId;

use super::kv::{Kept, MIN_SHARED};
use super::session::{Session, next_waiting};
use super::{ImageStep, InFlight, Notice, Pass, PrefixCache, Scheduler, Slot};
use crate::frame::{KvStep, MAX_KV_STEPS};

impl Scheduler {
    /// Gives slots to waiting sessions.
    pub(super) fn place(&mut self, pass: &mut Pass, sent: &mut InFlight) {
        loop {
            let running = self.held().map(|(_, session)| session.tenant);
            let Some(at) = next_waiting(&self.waiting, running, |tenant| self.served.when(tenant)) else { return };
            match self.slot_for(&self.waiting[at]) {
                Some(slot) => {
                    let session = self.waiting.swap_remove(at);
                    self.take_slot(session, slot, pass, sent);
                }
                None if self.preempt(self.waiting[at].priority) => {}
                None => return,
            }
        }
    }

    /// The slot that a session is to have: one most of whose tokens it can use, else an empty one, else the one that
    /// was not used for longest.
    fn slot_for(&self, session: &Session) -> Option<usize> {
        let kept = || {
            self.slots.iter().enumerate().filter_map(|(at, slot)| match slot {
                Slot::Kept(kept) => Some((at, kept)),
                Slot::Held(_) => None,
            })
        };
        let fitting = kept().map(|(at, kept)| (at, self.usable(kept, session), kept.len()));
        let fitting = fitting.filter(|(_, n, len)| *n >= MIN_SHARED && 2 * n >= *len).max_by_key(|(_, n, _)| *n);
        let oldest = || kept().min_by_key(|(at, kept)| (!kept.tokens.is_empty(), kept.used, *at)).map(|(at, _)| at);
        fitting.map(|(at, ..)| at).or_else(oldest)
    }

    /// How many tokens of a slot a session may take over where they are. What it does not want of them is cut off;
    /// where that cannot be done it takes all or none.
    fn usable(&self, kept: &Kept, session: &Session) -> u32 {
        let n = kept.usable(session.wanted(), self.limits.cache);
        let is_whole = n == kept.len() && !kept.has_surplus;
        if self.limits.can_rewind || is_whole { n } else { 0 }
    }

    /// Makes a slot a session's own.
    fn take_slot(&mut self, mut session: Session, slot: usize, pass: &mut Pass, sent: &mut InFlight) {
        let used = self.tick();
        self.served.note(session.tenant, used);
        let Slot::Kept(kept) = std::mem::replace(&mut self.slots[slot], Slot::Kept(Kept::default())) else { return };
        let here = Some(self.usable(&kept, &session)).filter(|n| *n >= MIN_SHARED).unwrap_or(0);
        // Copying is cheaper than loading, and cannot fail.
        let copied = self.best_source(&session, slot, pass).map_or(0, |(_, n, _)| n);
        let image = self.images.best(session.wanted(), self.limits.cache);
        let image = image.filter(|(_, n)| *n >= here.max(copied) + MIN_SHARED);
        // Beside saving it, what makes room for it, and one step that fills each slot.
        let n_steps = pass.steps.len() + 1 + self.to_drop.len() + self.images.list.len() + self.slots.len();
        // What nobody could compute more cheaply than load is saved before it is overwritten.
        if (image.is_some() || kept.len() - here >= MIN_SHARED)
            && n_steps <= MAX_KV_STEPS as usize
            && let Some(id) = self.images.begin(&kept, &mut self.to_drop)
        {
            // What makes room for it goes first.
            pass.steps.extend(self.to_drop.drain(..).map(|image| KvStep::Drop { image }));
            let (n_tokens, n_chunked) = (kept.len(), kept.n_chunked);
            sent.images.push(ImageStep { step: pass.steps.len(), image: id, n_tokens, n_chunked, slot: None });
            pass.steps.push(KvStep::Save { slot: slot as u32, n_tokens, image: id });
        }
        // Making room may have dropped the image that was found.
        match image.and_then(|(id, n)| self.images.get_mut(id).map(|image| (image, n))) {
            Some((image, n)) => {
                image.n_readers += 1;
                image.kept.used = used;
                session.loading = Some((image.id, n));
                let (image, n_tokens, n_chunked) = (image.id, image.kept.len(), image.kept.n_chunked);
                sent.images.push(ImageStep { step: pass.steps.len(), image, n_tokens, n_chunked, slot: Some(slot) });
                pass.steps.push(KvStep::Load { slot: slot as u32, n_tokens, image });
            }
            None => session.take_over(here, kept.n_chunked, kept.has_surplus || here < kept.len()),
        }
        self.slots[slot] = Slot::Held(session);
    }

    /// Takes a slot from a session with a higher number than `priority`. True if one is free now.
    fn preempt(&mut self, priority: i32) -> bool {
        if self.held().any(|(_, session)| session.leaving || session.ended) {
            // A slot becomes free anyway.
            return false;
        }
        let less_urgent = self.held().filter(|(_, s)| s.priority > priority && s.loading.is_none());
        let Some((slot, _)) = less_urgent.max_by_key(|(_, s)| (s.priority, s.arrived)) else { return false };
        let Some(session) = self.session(slot) else { return false };
        session.leaving = true;
        let is_away = session.is_away();
        if !is_away {
            self.vacate(slot);
        }
        !is_away
    }

    /// Copies a longer beginning than its own slot holds to a session that has sent nothing yet.
    pub(super) fn share(&mut self, pass: &mut Pass, slot: usize) {
        let Slot::Held(session) = &self.slots[slot] else { return };
        if session.started {
            return;
        }
        let n_here = session.n_sent;
        let Some((from, n_tokens, n_chunked)) = self.best_source(session, slot, pass) else { return };
        if n_tokens < n_here + MIN_SHARED {
            return;
        }
        pass.steps.push(KvStep::Copy { slot: slot as u32, from: from as u32, n_tokens });
        let used = self.tick();
        if let Slot::Kept(kept) = &mut self.slots[from] {
            kept.used = used;
        }
        if let Some(session) = self.session(slot) {
            session.take_over(n_tokens, n_chunked, false);
        }
    }

    /// The slot beside its own from which a session could copy most, how many tokens, and how many of these were
    /// computed in chunks.
    fn best_source(&self, session: &Session, slot: usize, pass: &Pass) -> Option<(usize, u32, u32)> {
        if !self.limits.can_rewind {
            return None;
        }
        let (wanted, cache) = (session.wanted(), self.limits.cache);
        // Steps come before rows, so what this very pass computes is not there yet.
        let n_there = |at: usize, n_sent: u32| {
            pass.sets.iter().find(|set| set.slot as usize == at).map_or(n_sent, |set| set.keep)
        };
        let sources = self.slots.iter().enumerate().filter(|(at, _)| *at != slot).map(|(at, other)| match other {
            Slot::Kept(kept) => (at, kept.usable(wanted, cache), kept.n_chunked),
            Slot::Held(s) => (at, s.usable(n_there(at, s.n_sent), s.n_chunked, wanted, cache), s.n_chunked),
        });
        sources.max_by_key(|(_, n, _)| *n)
    }

    /// An image was saved or loaded, or not.
    pub(super) fn image_done(&mut self, step: ImageStep, ok: bool) {
        let ImageStep { image: id, n_tokens, n_chunked, slot, .. } = step;
        if let Some(image) = self.images.get_mut(id) {
            image.is_whole |= slot.is_none();
            image.n_readers -= u32::from(slot.is_some());
        }
        // It may have been dropped meanwhile, or another one's loading has failed.
        if !ok && self.images.remove(id) {
            self.to_drop.push(id);
        }
        let Some(slot) = slot else { return self.notices.push(Notice::Saved { n_tokens, ok }) };
        self.notices.push(Notice::Loaded { n_tokens, ok });
        if let Some(session) = self.session(slot)
            && let Some((_, n_usable)) = session.loading.take()
            && ok
        {
            session.take_over(n_usable, n_chunked, n_usable < n_tokens);
        }
        self.vacate_if_due(slot);
    }

    pub(super) fn vacate_if_due(&mut self, slot: usize) {
        if self.session(slot).is_some_and(|s| (s.ended || s.leaving) && !s.is_away()) {
            self.vacate(slot);
        }
    }

    /// Takes a slot from a session of which nothing is in the ring. What it holds is kept; a session that has not ended
    /// waits again.
    pub(super) fn vacate(&mut self, slot: usize) {
        let used = self.tick();
        let Slot::Held(session) = &mut self.slots[slot] else { return };
        let keeps = !session.ended || self.limits.cache != PrefixCache::Off;
        let kept = if keeps { session.kept(used) } else { Kept::default() };
        let Slot::Held(mut session) = std::mem::replace(&mut self.slots[slot], Slot::Kept(kept)) else { return };
        if session.ended {
            return self.forget(session.id);
        }
        self.notices.push(Notice::Preempted { session: session.id });
        session.take_over(0, 0, false);
        (session.leaving, session.started) = (false, false);
        self.waiting.push(session);
    }

    /// Without a cache, drops what is left of a session that has ended: nobody else may use it. That goes for the slot
    /// that it was pushed out of too, which would be saved otherwise.
    pub(super) fn forget(&mut self, owner: SessionId) {
        if self.limits.cache != PrefixCache::Off {
            return;
        }
        self.images.forget(owner, &mut self.to_drop);
        for slot in &mut self.slots {
            if matches!(slot, Slot::Kept(kept) if kept.owner == owner) {
                *slot = Slot::Kept(Kept::default());
            }
        }
    }
}
