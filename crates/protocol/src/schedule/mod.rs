//! Which rows of which sessions travel in the next pass, and what has come back.
//!
//! A session waits, takes a slot of the KV cache on every stage, has its prompt computed in chunks, then decodes one
//! token a pass until it ends. [`Scheduler::next_pass`] makes a pass, [`Scheduler::complete`] takes one back,
//! [`Scheduler::push`] appends a chosen token.
//!
//! - **Full stages.** Up to one pass per stage carries decode rows, fewer where that is quicker.
//!   Sessions are dealt over the passes: with two stages and eight sessions, four travel while four are sampled.
//!   While only prompts are computed, one more pass waits before the busiest stage. The chunks of a prompt need not
//!   wait for each other: while one is in the second stage, the next is in the first.
//! - **Nobody waits behind a prompt.** A pass carries decode rows first and prompt rows as far as the measured times
//!   allow (`budget.rs`); prompts take turns.
//! - **Nothing is computed twice.** A slot keeps its tokens when its session ends. A session takes over the slot with
//!   the longest common beginning, copies from a slot that others need, waits for a session that is just computing the
//!   same beginning, or has a saved image loaded (`kv.rs`). Where layers keep a state that each token changes for good
//!   ([`Limits::can_rewind`]), a session takes over all that a slot holds, or begins anew.
//! - **Order.** Waiting sessions come by priority, then tenants take turns (`session.rs`). A session with a higher
//!   priority takes the slot of one with a lower, which goes on later: from what its slot still holds, from its image,
//!   or by computing its tokens again.
//! - **The same bits.** Prompt rows are computed at least two at a time, all others one at a time, also when they are
//!   computed again: libllama's kernels give a row of either kind the same bits in any company, but not both kinds.
//! - **Vectors.** Where prompts are computed for a vector each ([`Task::Pool`]) no session decodes; those that need all
//!   their rows in one pass have them there.
//! - **Rings come and go.** When one is lost, its sessions go on in the next: [`Scheduler::recover`] (`recover.rs`).
//!
//! A slot holds a whole context on every stage. So who has a slot can always finish, and nobody who runs is ever
//! stopped for want of memory.

use std::collections::VecDeque;
use std::time::Instant;

use brigade_base::{ImageId, PassId, SessionId, Token};

use self::budget::Budget;
use self::kv::{Images, Kept, MIN_SHARED};
use self::recover::Touched;
use self::session::{Served, Session};
use crate::control::MAX_SESSIONS;
use crate::frame::{KvStep, MAX_IMAGES, MAX_KV_STEPS, RowSet};

mod budget;
mod kv;
mod pass;
mod place;
mod recover;
mod session;
#[cfg(test)]
mod simulation;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod world;

pub use kv::PrefixCache;
pub use pass::{AdmitError, Limits, Notice, Output, Pass, PassRows, Task};
pub use recover::MAX_SHADOW_LAG;
pub use session::Arrival;

/// Most rows one after the other of a session in a pass, where they are computed again: enough that what a hop costs
/// beside computing counts little, and few enough that the stages work beside each other still.
const MAX_WAVES: usize = 16;

/// The same while others wait for their next token, which comes later by so many steps.
const MAX_WAVES_BESIDE_DECODE: usize = 3;

#[derive(Debug)]
enum Slot {
    Held(Session),
    Kept(Kept),
}

#[derive(Debug, Default)]
struct InFlight {
    id: PassId,
    /// Slots with rows in the pass, and for each whether its last row has logits.
    slots: Vec<(usize, bool)>,
    n_decode: u32,
    /// How many rows one after the other each session that decodes may have in it.
    n_waves: u32,
    /// Rows of prompts.
    n_chunk: u32,
    /// Its steps that may fail.
    images: Vec<ImageStep>,
}

#[derive(Debug, Clone, Copy)]
struct ImageStep {
    /// Which of the pass's steps it is.
    step: usize,
    image: ImageId,
    n_tokens: u32,
    n_chunked: u32,
    /// The slot that waits for it; `None` where it is saved.
    slot: Option<usize>,
}

/// The sessions of a deployment and their passes.
#[derive(Debug)]
pub struct Scheduler {
    limits: Limits,
    slots: Vec<Slot>,
    waiting: Vec<Session>,
    images: Images,
    /// Images that the stages are to drop with the next pass.
    to_drop: Vec<ImageId>,
    in_flight: VecDeque<InFlight>,
    touched: Touched,
    budget: Budget,
    /// Prompt rows of the pass that came back last.
    chunk_back: u32,
    notices: Vec<Notice>,
    next_pass: PassId,
    /// The pass that the next one follows.
    last_pass: PassId,
    n_arrived: u64,
    /// Rises with each use of a slot or image.
    clock: u64,
    served: Served,
    /// The run of slots after the last one that decoded, so that all do in turn.
    decode_turn: usize,
    /// The slot after the last one whose prompt was computed, so that all are in turn.
    prompt_turn: usize,
}

impl Scheduler {
    /// No sessions yet.
    pub fn new(limits: Limits) -> Self {
        let limits = limits.sound();
        Self {
            limits,
            slots: (0..limits.n_slots).map(|_| Slot::Kept(Kept::default())).collect(),
            waiting: Vec::new(),
            images: Images::new(limits.image_tokens, MAX_IMAGES),
            to_drop: Vec::new(),
            in_flight: VecDeque::new(),
            touched: Touched::default(),
            budget: Budget::default(),
            chunk_back: 0,
            notices: Vec::new(),
            next_pass: PassId(1),
            last_pass: PassId(0),
            n_arrived: 0,
            clock: 0,
            served: Served::default(),
            decode_turn: 0,
            prompt_turn: 0,
        }
    }

    /// Takes a session; it starts as soon as a slot is free. How many may wait is up to the caller.
    ///
    /// # Errors
    /// If it can never run.
    pub fn admit(&mut self, arrival: Arrival) -> Result<(), AdmitError> {
        let tokens = arrival.prompt.len() + arrival.answer.len();
        if arrival.prompt.is_empty() {
            return Err(AdmitError::Empty);
        }
        if tokens > self.limits.most_tokens() {
            return Err(AdmitError::TooLong { tokens, context: self.limits.context });
        }
        self.n_arrived += 1;
        self.waiting.push(Session::new(arrival, self.n_arrived));
        Ok(())
    }

    /// The next pass to send, if one may be in the ring and there is something to do.
    pub fn next_pass(&mut self) -> Option<Pass> {
        let n_stages = self.limits.n_stages.max(1) as usize;
        // The one more pass that only prompts have.
        let is_extra = self.in_flight.len() == n_stages && n_stages > 1;
        if self.in_flight.len() >= n_stages && !is_extra || is_extra && self.decodes() {
            return None;
        }
        let mut pass = Pass { id: self.next_pass, follows: self.last_pass, ..Pass::default() };
        let mut sent = InFlight { id: pass.id, ..InFlight::default() };
        self.place(&mut pass, &mut sent);
        // Somebody who was preempted may go on at once where he was.
        let decodes = self.decodes();
        if !(is_extra && decodes) {
            self.put_decode_rows(&mut pass, &mut sent);
            self.put_prompts(&mut pass, &mut sent, decodes);
        }
        let n_drops = self.to_drop.len().min((MAX_KV_STEPS as usize).saturating_sub(pass.steps.len()));
        pass.steps.extend(self.to_drop.drain(..n_drops).map(|image| KvStep::Drop { image }));
        if pass.sets.is_empty() && pass.steps.is_empty() {
            return None;
        }
        self.next_pass = self.next_pass.next();
        self.last_pass = pass.id;
        self.touched.note(&pass);
        self.in_flight.push_back(sent);
        Some(pass)
    }

    /// Whether anybody sends tokens one by one.
    fn decodes(&self) -> bool {
        self.limits.task == Task::Generate && self.held().any(|(_, session)| session.is_decoding())
    }

    fn held(&self) -> impl Iterator<Item = (usize, &Session)> {
        self.slots.iter().enumerate().filter_map(|(at, slot)| match slot {
            Slot::Held(session) => Some((at, session)),
            Slot::Kept(_) => None,
        })
    }

    fn session(&mut self, slot: usize) -> Option<&mut Session> {
        match self.slots.get_mut(slot) {
            Some(Slot::Held(session)) => Some(session),
            _ => None,
        }
    }

    fn tick(&mut self) -> u64 {
        self.clock += 1;
        self.clock
    }

    /// Adds one row of each session whose turn it is, and further ones of those that compute again what they had
    /// chosen, one wave after the other: none of them waits for a choice.
    fn put_decode_rows(&mut self, pass: &mut Pass, sent: &mut InFlight) {
        let replays = |session: &Session| session.is_decoding() && session.n_unsent() > 1;
        let all_replay =
            self.held().any(|(_, s)| replays(s)) && self.held().all(|(_, s)| !s.is_decoding() || replays(s));
        let slots = match all_replay {
            true => self.held().filter(|(_, s)| replays(s)).map(|(slot, _)| slot).collect(),
            false => self.decode_share(),
        };
        let most = if all_replay { MAX_WAVES } else { MAX_WAVES_BESIDE_DECODE };
        let n_waves = (MAX_SESSIONS as usize / slots.len().max(1)).clamp(1, most);
        for wave in 0..n_waves {
            for &slot in &slots {
                // A further wave leaves the last row, which is followed by a choice, to a pass with those of others.
                let n_left = u32::from(wave > 0);
                if self.session(slot).is_some_and(|session| session.is_decoding() && session.n_unsent() > n_left) {
                    self.put(pass, sent, slot, 1);
                    sent.n_decode += u32::from(wave == 0);
                    sent.n_waves = wave as u32 + 1;
                }
            }
        }
    }

    /// The slots that decode in the next pass. Those that decode at all are cut into runs of neighbours, one for each
    /// stage or as many as are quicker, so that all passes of the ring are about equally full; the next run that
    /// has tokens to send is taken. Neighbours, because the engine computes rows of consecutive slots as one batch,
    /// and others one by one.
    ///
    /// No more passes than runs are on their way: then a run has its turn again when all of it is back. Otherwise the
    /// sessions of a run that once travelled apart would do so for ever, each in a pass that has room for all.
    fn decode_share(&mut self) -> Vec<usize> {
        let decoding: Vec<(usize, bool)> =
            self.held().filter(|(_, s)| s.is_decoding()).map(|(slot, s)| (slot, s.n_unsent() > 0)).collect();
        let n_runs = self.budget.passes(decoding.len() as u32, self.limits.n_stages);
        let share = decoding.len().div_ceil(n_runs as usize).max(1);
        let runs: Vec<&[(usize, bool)]> = decoding.chunks(share).collect();
        // Rows that are computed again follow each other without waiting.
        let has_output = |pass: &&InFlight| pass.n_decode > 0 && pass.slots.iter().any(|(_, has_output)| *has_output);
        if self.in_flight.iter().filter(has_output).count() >= runs.len() {
            return Vec::new();
        }
        for i in 0..runs.len() {
            let turn = (self.decode_turn + i) % runs.len();
            let slots: Vec<usize> = runs[turn].iter().filter(|(_, ready)| *ready).map(|(slot, _)| *slot).collect();
            if !slots.is_empty() {
                self.decode_turn = turn + 1;
                return slots;
            }
        }
        Vec::new()
    }

    /// Adds chunks of prompts, as many as the budget allows.
    fn put_prompts(&mut self, pass: &mut Pass, sent: &mut InFlight, decodes: bool) {
        let Limits { n_stages, chunk, .. } = self.limits;
        let chunk_back = self.chunk_back;
        let mut left = None;
        while let Some(slot) = self.next_prompt(pass) {
            self.share(pass, slot);
            let Slot::Held(session) = &self.slots[slot] else { return };
            let budget = *left.get_or_insert_with(|| match decodes {
                true => self.budget.beside_decode(sent.n_decode, chunk_back, n_stages, chunk),
                false => self.budget.alone(session.n_prompt, n_stages, chunk),
            });
            let n_rows = if self.limits.is_at_once() { session.n_unsent() } else { session.chunk(budget) };
            if n_rows == 0 {
                // Its whole prompt was copied; the answer that it had goes on in the next pass.
                continue;
            }
            if sent.n_chunk > 0 && n_rows > budget {
                return;
            }
            self.prompt_turn = slot + 1;
            self.put(pass, sent, slot, n_rows);
            sent.n_chunk += n_rows;
            left = Some(budget.saturating_sub(n_rows));
            if budget < n_rows + 2 {
                return;
            }
        }
    }

    /// The next slot in turn with a prompt to compute that has no rows in the pass and need not wait for another one.
    fn next_prompt(&self, pass: &Pass) -> Option<usize> {
        let n_slots = self.slots.len();
        let is_wanted = |slot: &usize| match &self.slots[*slot] {
            Slot::Held(session) => {
                session.has_prompt_left()
                    && pass.sets.iter().all(|set| set.slot as usize != *slot)
                    && (session.started || !self.limits.can_rewind || !self.has_leader(session))
            }
            Slot::Kept(_) => false,
        };
        (0..n_slots).map(|i| (self.prompt_turn + i) % n_slots).find(is_wanted)
    }

    /// Whether another session is computing a beginning that this one can take over soon.
    fn has_leader(&self, session: &Session) -> bool {
        self.held().any(|(_, other)| {
            let is_ahead = other.started || other.arrived < session.arrived;
            other.id != session.id && other.has_prompt_left() && is_ahead && {
                let n = other.usable(other.n_prompt, other.n_prompt, session.wanted(), self.limits.cache);
                n > other.n_sent && n >= session.n_sent + 2 * MIN_SHARED
            }
        })
    }

    /// Adds the next `n_rows` rows of a slot to a pass.
    fn put(&mut self, pass: &mut Pass, sent: &mut InFlight, slot: usize, n_rows: u32) {
        let Some(session) = self.session(slot) else { return };
        let is_prompt = session.n_sent < session.n_prompt;
        let last = n_rows == session.n_unsent();
        pass.sets.push(RowSet { slot: slot as u32, keep: session.n_sent, n_rows, n_outputs: last.into() });
        let start = session.n_sent as usize;
        pass.tokens.extend_from_slice(&session.tokens[start..start + n_rows as usize]);
        pass.rows.push(PassRows { session: session.id, n_rows, is_prompt, before: session.n_sent });
        if is_prompt && session.n_chunked == session.n_sent && session.n_prompt > 1 {
            session.n_chunked += n_rows;
        }
        let started = std::mem::replace(&mut session.started, true);
        let notice = Notice::Started { session: session.id, cached: session.n_sent };
        session.n_sent += n_rows;
        session.has_surplus = false;
        session.in_flight += 1;
        if !started {
            self.notices.push(notice);
        }
        sent.slots.push((slot, last));
    }

    /// A pass is back: its stages computed for `stage_us` microseconds each, and each of its steps `failed` or not.
    /// Returns whose logits it holds; `None` if it is not the pass that was to come next.
    pub fn complete(&mut self, id: PassId, stage_us: &[u32], failed: &[bool]) -> Option<Vec<Output>> {
        if self.in_flight.front()?.id != id {
            return None;
        }
        let pass = self.in_flight.pop_front()?;
        self.chunk_back = pass.n_chunk;
        // Waves take several times as long as a pass of as many sessions.
        if pass.n_waves <= 1 {
            self.budget.observe(pass.n_decode, pass.n_chunk, stage_us);
        }
        for step in &pass.images {
            self.image_done(*step, !failed.get(step.step).copied().unwrap_or(false));
        }
        let mut outputs = Vec::new();
        let mut row = 0;
        for (slot, has_output) in pass.slots {
            if let Some(session) = self.session(slot) {
                session.in_flight -= 1;
                if has_output && !session.ended {
                    let position = session.tokens.len() as u32;
                    outputs.push(Output { session: session.id, slot, row, position });
                }
                self.vacate_if_due(slot);
            }
            row += usize::from(has_output);
        }
        Some(outputs)
    }

    /// Appends the token that was chosen for an output of the pass that came back last; it travels with the next one.
    /// To be called before the next [`Scheduler::next_pass`]. False if the session's context is full, so that the token
    /// can be told but nothing after it.
    pub fn push(&mut self, output: Output, token: Token) -> bool {
        let context = self.limits.context as usize;
        let session = match &mut self.slots[output.slot] {
            Slot::Held(session) if session.id == output.session => session,
            // It gave its slot up when the pass came back.
            _ => match self.waiting.iter_mut().find(|session| session.id == output.session) {
                Some(session) => session,
                None => return false,
            },
        };
        session.tokens.push(token);
        session.tokens.len() < context
    }

    /// Ends a session wherever it is. What its slot holds is kept for later ones.
    pub fn end(&mut self, id: SessionId) {
        if let Some(at) = self.waiting.iter().position(|session| session.id == id) {
            self.waiting.swap_remove(at);
            return self.forget(id);
        }
        let Some((slot, _)) = self.held().find(|(_, session)| session.id == id) else { return };
        if let Some(session) = self.session(slot) {
            session.ended = true;
        }
        self.vacate_if_due(slot);
    }

    /// The sessions whose deadline has passed; they go on until they are ended.
    pub fn expired(&self, now: Instant) -> Vec<SessionId> {
        let all = self.waiting.iter().chain(self.held().map(|(_, session)| session));
        let expired = all.filter(|s| !s.ended && s.deadline.is_some_and(|deadline| deadline <= now));
        expired.map(|session| session.id).collect()
    }

    /// What was decided since this was asked last.
    pub fn take_notices(&mut self) -> Vec<Notice> {
        std::mem::take(&mut self.notices)
    }

    /// Sessions with a slot.
    pub fn n_running(&self) -> usize {
        self.held().filter(|(_, session)| !session.ended).count()
    }

    /// Sessions that wait for one.
    pub fn n_waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Passes in the ring.
    pub fn n_in_flight(&self) -> usize {
        self.in_flight.len()
    }

    /// Tokens that slots hold, for running sessions and for later ones.
    pub fn kv_tokens(&self) -> u64 {
        let tokens = |slot: &Slot| match slot {
            Slot::Held(session) => session.n_sent,
            Slot::Kept(kept) => kept.len(),
        };
        self.slots.iter().map(|slot| u64::from(tokens(slot))).sum()
    }

    /// Tokens for which there is room.
    pub fn kv_capacity(&self) -> u64 {
        u64::from(self.limits.n_slots) * u64::from(self.limits.context)
    }

    /// Tokens of one session.
    pub fn context(&self) -> u32 {
        self.limits.context
    }

    /// Images outside of memory, and the tokens in them.
    pub fn n_images(&self) -> (usize, u64) {
        (self.images.list.len(), self.images.n_tokens())
    }
}
