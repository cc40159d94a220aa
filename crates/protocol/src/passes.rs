//! Which rows of which sessions travel in the next pass, and what has come back.
//!
//! A session waits, takes a slot, has its prompt computed in chunks, then decodes one token a pass until it ends. Up to
//! one pass per stage is in the ring. A session that decodes is in at most one of them, so those sessions are dealt
//! evenly over the passes: with two stages and eight sessions, four travel while four are sampled. The chunks of a
//! prompt need not wait for each other: while one is in the second stage, the next is in the first. A pass carries the
//! decode rows first and at most one chunk of one prompt, so nobody waits longer than a chunk for a neighbour's prompt;
//! prompts take turns.
//! A chunk's length depends on its own prompt alone: libllama's matrix products round differently for different
//! numbers of rows, and a prompt must be computed the same whoever else is here.

use std::collections::VecDeque;

use brigade_base::{PassId, SessionId, Token};

use crate::frame::RowSet;

/// What bounds the passes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Sessions at once; each has a slot of the KV cache on every stage.
    pub n_slots: u32,
    /// Tokens of one session.
    pub context: u32,
    /// Most prompt tokens of one pass.
    pub chunk: u32,
    /// Stages of the ring, and so the most passes in it.
    pub n_stages: u32,
}

/// A pass to send: the row sets and the tokens of their rows, in the same order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pass {
    /// Names the pass.
    pub id: PassId,
    /// What the frame's head says.
    pub sets: Vec<RowSet>,
    /// One token for each row.
    pub tokens: Vec<Token>,
}

/// A session whose logits came back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Output {
    /// The session.
    pub session: SessionId,
    /// Which of the pass's output rows is its own.
    pub row: usize,
    /// Position of the token that is to be chosen.
    pub position: u32,
}

/// Why a session was not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum AdmitError {
    /// The prompt leaves no room for an answer.
    #[error("the prompt has {tokens} tokens and the context {context}")]
    TooLong {
        /// Tokens of the prompt.
        tokens: usize,
        /// Tokens of a session.
        context: u32,
    },
    /// The prompt has no tokens.
    #[error("the prompt is empty")]
    Empty,
}

#[derive(Debug)]
struct Session {
    id: SessionId,
    /// Prompt and answer so far.
    tokens: Vec<Token>,
    n_prompt: u32,
    /// How many of the tokens have been sent through the ring.
    n_sent: u32,
    /// Passes in the ring with rows of it.
    in_flight: u32,
    /// Ended while in flight: its slot is free when the pass is back.
    ended: bool,
}

impl Session {
    fn n_unsent(&self) -> u32 {
        self.tokens.len() as u32 - self.n_sent
    }

    fn has_prompt_left(&self) -> bool {
        !self.ended && self.n_sent < self.n_prompt
    }

    fn is_decoding(&self) -> bool {
        !self.ended && self.n_sent >= self.n_prompt
    }
}

#[derive(Debug)]
struct InFlight {
    id: PassId,
    /// Slots with rows in the pass, and for each whether its last row has logits.
    slots: Vec<(usize, bool)>,
}

/// The sessions of a deployment and their passes.
#[derive(Debug)]
pub struct Passes {
    limits: Limits,
    slots: Vec<Option<Session>>,
    waiting: VecDeque<(SessionId, Vec<Token>)>,
    /// Free slots whose KV the stages still hold.
    to_clear: Vec<bool>,
    in_flight: VecDeque<InFlight>,
    next_pass: PassId,
    /// The run of slots after the last one that decoded, so that all do in turn.
    decode_turn: usize,
    /// The slot after the last one whose prompt was computed, so that all are in turn.
    prompt_turn: usize,
}

impl Passes {
    /// No sessions yet.
    pub fn new(limits: Limits) -> Self {
        let n = limits.n_slots as usize;
        Self {
            limits,
            slots: (0..n).map(|_| None).collect(),
            waiting: VecDeque::new(),
            to_clear: vec![false; n],
            in_flight: VecDeque::new(),
            next_pass: PassId(1),
            decode_turn: 0,
            prompt_turn: 0,
        }
    }

    /// Takes a session; it starts as soon as a slot is free. How many may wait is up to the caller.
    ///
    /// # Errors
    /// If it can never run.
    pub fn admit(&mut self, id: SessionId, prompt: Vec<Token>) -> Result<(), AdmitError> {
        if prompt.is_empty() {
            return Err(AdmitError::Empty);
        }
        if prompt.len() >= self.limits.context as usize {
            return Err(AdmitError::TooLong { tokens: prompt.len(), context: self.limits.context });
        }
        self.waiting.push_back((id, prompt));
        self.fill_slots();
        Ok(())
    }

    /// The next pass to send, if one may be in the ring and there is something to do.
    pub fn next_pass(&mut self) -> Option<Pass> {
        if self.in_flight.len() >= self.limits.n_stages.max(1) as usize {
            return None;
        }
        let mut pass = Pass { id: self.next_pass, sets: Vec::new(), tokens: Vec::new() };
        let mut slots = Vec::new();
        for (slot, clear) in self.to_clear.iter_mut().enumerate() {
            if std::mem::take(clear) && self.slots[slot].is_none() {
                pass.sets.push(RowSet { slot: slot as u32, keep: 0, n_rows: 0, n_outputs: 0 });
            }
        }
        for slot in self.decode_share() {
            self.put(&mut pass, &mut slots, slot, 1);
        }
        if let Some(slot) = self.next_slot(self.prompt_turn, Session::has_prompt_left) {
            self.prompt_turn = slot + 1;
            self.put(&mut pass, &mut slots, slot, self.limits.chunk);
        }
        if pass.sets.is_empty() {
            return None;
        }
        self.next_pass = self.next_pass.next();
        self.in_flight.push_back(InFlight { id: pass.id, slots });
        Some(pass)
    }

    /// The first slot from `turn` on, all around, whose session is wanted.
    fn next_slot(&self, turn: usize, wanted: impl Fn(&Session) -> bool) -> Option<usize> {
        let n_slots = self.slots.len();
        (0..n_slots).map(|i| (turn + i) % n_slots).find(|&slot| self.slots[slot].as_ref().is_some_and(&wanted))
    }

    /// The slots that decode in the next pass. Those that decode at all are cut into as many runs of neighbours as
    /// there are stages, so that all passes of the ring are about equally full; the next run that has tokens to send is
    /// taken. Neighbours, because the engine computes rows of consecutive slots as one batch, and others one by one.
    fn decode_share(&mut self) -> Vec<usize> {
        let is = |slot: &usize, wanted: &dyn Fn(&Session) -> bool| self.slots[*slot].as_ref().is_some_and(wanted);
        let decoding: Vec<usize> = (0..self.slots.len()).filter(|slot| is(slot, &Session::is_decoding)).collect();
        let share = decoding.len().div_ceil(self.limits.n_stages.max(1) as usize).max(1);
        let runs: Vec<&[usize]> = decoding.chunks(share).collect();
        for i in 0..runs.len() {
            let turn = (self.decode_turn + i) % runs.len();
            let ready = |s: &Session| s.in_flight == 0 && s.n_unsent() > 0;
            let slots: Vec<usize> = runs[turn].iter().copied().filter(|slot| is(slot, &ready)).collect();
            if !slots.is_empty() {
                self.decode_turn = turn + 1;
                return slots;
            }
        }
        Vec::new()
    }

    /// Adds up to `most` rows of a slot to a pass.
    fn put(&mut self, pass: &mut Pass, slots: &mut Vec<(usize, bool)>, slot: usize, most: u32) {
        let Some(session) = &mut self.slots[slot] else { return };
        let n_rows = session.n_unsent().min(most);
        let last = n_rows == session.n_unsent();
        let set = RowSet { slot: slot as u32, keep: session.n_sent, n_rows, n_outputs: last.into() };
        pass.sets.push(set);
        let start = session.n_sent as usize;
        pass.tokens.extend_from_slice(&session.tokens[start..start + n_rows as usize]);
        session.n_sent += n_rows;
        session.in_flight += 1;
        slots.push((slot, last));
    }

    /// A pass is back. Returns whose logits it holds; `None` if it is not the pass that was to come next.
    pub fn complete(&mut self, id: PassId) -> Option<Vec<Output>> {
        if self.in_flight.front()?.id != id {
            return None;
        }
        let pass = self.in_flight.pop_front()?;
        let mut outputs = Vec::new();
        let mut row = 0;
        for (slot, has_output) in pass.slots {
            if let Some(session) = &mut self.slots[slot] {
                session.in_flight -= 1;
                if session.ended {
                    if session.in_flight == 0 {
                        self.free(slot);
                    }
                } else if has_output {
                    outputs.push(Output { session: session.id, row, position: session.tokens.len() as u32 });
                }
            }
            row += usize::from(has_output);
        }
        Some(outputs)
    }

    /// Appends a chosen token; it travels with the next pass. False if the session's context is full, so that the
    /// token can be told but nothing after it.
    pub fn push(&mut self, id: SessionId, token: Token) -> bool {
        let context = self.limits.context as usize;
        let Some(session) = self.slots.iter_mut().flatten().find(|s| s.id == id) else { return false };
        session.tokens.push(token);
        session.tokens.len() < context
    }

    /// Ends a session wherever it is. Its KV goes with the next pass.
    pub fn end(&mut self, id: SessionId) {
        self.waiting.retain(|(other, _)| *other != id);
        let Some(slot) = self.slots.iter().position(|s| s.as_ref().is_some_and(|s| s.id == id)) else { return };
        match &mut self.slots[slot] {
            Some(session) if session.in_flight > 0 => session.ended = true,
            _ => self.free(slot),
        }
    }

    fn free(&mut self, slot: usize) {
        self.slots[slot] = None;
        self.to_clear[slot] = true;
        self.fill_slots();
    }

    fn fill_slots(&mut self) {
        while let Some(slot) = self.slots.iter().position(Option::is_none) {
            let Some((id, tokens)) = self.waiting.pop_front() else { return };
            // Its first row set keeps nothing, which clears what was there.
            self.to_clear[slot] = false;
            let n_prompt = tokens.len() as u32;
            self.slots[slot] = Some(Session { id, tokens, n_prompt, n_sent: 0, in_flight: 0, ended: false });
        }
    }

    /// Sessions with a slot.
    pub fn n_running(&self) -> usize {
        self.slots.iter().flatten().filter(|s| !s.ended).count()
    }

    /// Sessions that wait for one.
    pub fn n_waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Passes in the ring.
    pub fn n_in_flight(&self) -> usize {
        self.in_flight.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashMap;

    fn limits(n_slots: u32, n_stages: u32) -> Limits {
        Limits { n_slots, context: 64, chunk: 8, n_stages }
    }

    fn set(slot: u32, keep: u32, n_rows: u32, n_outputs: u32) -> RowSet {
        RowSet { slot, keep, n_rows, n_outputs }
    }

    #[test]
    fn a_prompt_travels_in_chunks_and_then_token_by_token() {
        let mut passes = Passes::new(limits(1, 1));
        passes.admit(SessionId(1), (0..10).collect()).unwrap();
        let first = passes.next_pass().unwrap();
        assert_eq!((first.sets.as_slice(), first.tokens.len()), (&[set(0, 0, 8, 0)][..], 8));
        assert_eq!(passes.next_pass(), None, "one pass per stage");
        assert_eq!(passes.complete(first.id), Some(vec![]));
        let second = passes.next_pass().unwrap();
        assert_eq!(second.sets, [set(0, 8, 2, 1)]);
        assert_eq!(passes.complete(second.id), Some(vec![Output { session: SessionId(1), row: 0, position: 10 }]));
        assert_eq!(passes.next_pass(), None, "nothing until a token is chosen");
        assert!(passes.push(SessionId(1), 77));
        let third = passes.next_pass().unwrap();
        assert_eq!((third.sets.as_slice(), third.tokens.as_slice()), (&[set(0, 10, 1, 1)][..], &[77][..]));
    }

    #[test]
    fn a_prompt_of_one_token_starts_like_any_other() {
        let mut passes = Passes::new(limits(1, 1));
        passes.admit(SessionId(1), vec![5]).unwrap();
        assert_eq!(passes.next_pass().unwrap().sets, [set(0, 0, 1, 1)]);
    }

    #[test]
    fn an_ended_session_is_cleared_everywhere_with_the_next_pass() {
        let mut passes = Passes::new(limits(2, 2));
        passes.admit(SessionId(1), vec![1, 2]).unwrap();
        let pass = passes.next_pass().unwrap();
        passes.end(SessionId(1));
        assert_eq!(passes.next_pass(), None, "its pass is still in the ring");
        assert_eq!(passes.complete(pass.id), Some(vec![]));
        let clear = passes.next_pass().unwrap();
        assert_eq!((clear.sets.as_slice(), clear.tokens.len()), (&[set(0, 0, 0, 0)][..], 0));
        passes.complete(clear.id).unwrap();
        assert_eq!(passes.next_pass(), None);
        assert_eq!(passes.n_running(), 0);
    }

    #[test]
    fn those_who_wait_come_next() {
        let mut passes = Passes::new(limits(1, 1));
        for id in 1..=3 {
            passes.admit(SessionId(id), vec![1]).unwrap();
        }
        passes.end(SessionId(2));
        passes.end(SessionId(1));
        assert_eq!((passes.n_running(), passes.n_waiting()), (1, 0));
        assert_eq!(passes.next_pass().unwrap().sets, [set(0, 0, 1, 1)], "session 3 overwrites slot 0");
    }

    #[test]
    fn sessions_are_dealt_over_the_passes_of_the_ring() {
        let mut passes = Passes::new(limits(4, 2));
        for id in 1..=4 {
            passes.admit(SessionId(id), vec![1, 2]).unwrap();
        }
        while passes.slots.iter().flatten().any(|s| s.n_unsent() != 1 || s.n_sent == 0) {
            let pass = passes.next_pass().unwrap();
            for output in passes.complete(pass.id).unwrap() {
                passes.push(output.session, 9);
            }
        }
        for _ in 0..3 {
            let (one, two) = (passes.next_pass().unwrap(), passes.next_pass().unwrap());
            let slots = |pass: &Pass| pass.sets.iter().map(|set| set.slot).collect::<Vec<_>>();
            let mut shares = [slots(&one), slots(&two)];
            shares.sort();
            assert_eq!(shares, [[0, 1], [2, 3]], "neighbours travel together");
            assert_eq!(passes.next_pass(), None);
            for pass in [one, two] {
                for output in passes.complete(pass.id).unwrap() {
                    passes.push(output.session, 9);
                }
            }
        }
    }

    #[test]
    fn the_chunks_of_a_prompt_do_not_wait_for_each_other() {
        let mut passes = Passes::new(limits(1, 3));
        passes.admit(SessionId(1), vec![0; 18]).unwrap();
        let sent: Vec<_> = std::iter::from_fn(|| passes.next_pass()).collect();
        let sets: Vec<_> = sent.iter().flat_map(|pass| pass.sets.clone()).collect();
        assert_eq!(sets, [set(0, 0, 8, 0), set(0, 8, 8, 0), set(0, 16, 2, 1)]);
        let outputs: Vec<_> = sent.iter().map(|pass| passes.complete(pass.id).unwrap().len()).collect();
        assert_eq!(outputs, [0, 0, 1]);
    }

    #[test]
    fn prompts_take_turns() {
        let mut passes = Passes::new(limits(2, 4));
        passes.admit(SessionId(1), vec![0; 40]).unwrap();
        passes.admit(SessionId(2), vec![0; 9]).unwrap();
        let slots: Vec<u32> = std::iter::from_fn(|| passes.next_pass()).map(|pass| pass.sets[0].slot).collect();
        assert_eq!(slots, [0, 1, 0, 1]);
    }

    #[test]
    fn a_session_that_ends_in_several_passes_is_free_after_the_last() {
        let mut passes = Passes::new(limits(1, 2));
        passes.admit(SessionId(1), vec![0; 16]).unwrap();
        let (one, two) = (passes.next_pass().unwrap(), passes.next_pass().unwrap());
        passes.end(SessionId(1));
        passes.complete(one.id).unwrap();
        assert_eq!(passes.next_pass(), None);
        passes.complete(two.id).unwrap();
        assert_eq!(passes.next_pass().unwrap().sets, [set(0, 0, 0, 0)]);
    }

    #[test]
    fn hopeless_prompts_are_refused() {
        let mut passes = Passes::new(limits(1, 1));
        assert_eq!(passes.admit(SessionId(1), vec![]), Err(AdmitError::Empty));
        let long = AdmitError::TooLong { tokens: 64, context: 64 };
        assert_eq!(passes.admit(SessionId(1), vec![1; 64]), Err(long));
    }

    #[derive(Debug, Clone)]
    enum Step {
        Admit(u8),
        Send,
        Complete,
        End(u8),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            (1u8..40).prop_map(Step::Admit),
            Just(Step::Send),
            Just(Step::Complete),
            any::<u8>().prop_map(Step::End)
        ]
    }

    proptest! {
        /// A stage that holds the passes to account: positions are contiguous, and every session's tokens arrive
        /// once and in order.
        #[test]
        fn stages_see_every_token_once_and_in_order(
            steps in prop::collection::vec(step(), 1..300), n_slots in 1u32..5, n_stages in 1u32..4,
        ) {
            let mut passes = Passes::new(limits(n_slots, n_stages));
            let mut kv: HashMap<u32, Vec<Token>> = HashMap::new();
            let mut ring: VecDeque<Pass> = VecDeque::new();
            let mut live: Vec<SessionId> = Vec::new();
            let mut next = 0i32;
            for step in steps {
                match step {
                    Step::Admit(n) => {
                        next += 1;
                        // Tokens tell which session they are of, and where in it.
                        let prompt = (0..i32::from(n)).map(|i| next * 1000 + i).collect();
                        if passes.admit(SessionId(next as u64), prompt).is_ok() {
                            live.push(SessionId(next as u64));
                        }
                    }
                    Step::Send => if let Some(pass) = passes.next_pass() {
                        let mut tokens = pass.tokens.iter();
                        let mut seen = Vec::new();
                        for set in &pass.sets {
                            let slot = kv.entry(set.slot).or_default();
                            prop_assert!(set.keep as usize <= slot.len());
                            slot.truncate(set.keep as usize);
                            slot.extend(tokens.by_ref().take(set.n_rows as usize));
                            prop_assert!(slot.iter().enumerate().all(|(i, t)| t % 1000 == i as i32));
                            prop_assert!(slot.windows(2).all(|w| w[0] / 1000 == w[1] / 1000));
                            prop_assert!(!seen.contains(&set.slot));
                            seen.push(set.slot);
                        }
                        prop_assert!(tokens.next().is_none());
                        ring.push_back(pass);
                        prop_assert!(ring.len() <= n_stages as usize);
                    },
                    Step::Complete => if let Some(pass) = ring.pop_front() {
                        for output in passes.complete(pass.id).unwrap() {
                            prop_assert!(live.contains(&output.session));
                            let token = output.session.0 as i32 * 1000 + output.position as i32;
                            if !passes.push(output.session, token) {
                                passes.end(output.session);
                                live.retain(|id| *id != output.session);
                            }
                        }
                    },
                    Step::End(i) => if !live.is_empty() {
                        let id = live.remove(i as usize % live.len());
                        passes.end(id);
                    },
                }
            }
            for id in live { passes.end(id); }
            while let Some(pass) = ring.pop_front() { passes.complete(pass.id).unwrap(); }
            while let Some(pass) = passes.next_pass() {
                prop_assert!(pass.tokens.is_empty());
                passes.complete(pass.id).unwrap();
            }
            prop_assert_eq!((passes.n_running(), passes.n_waiting(), passes.n_in_flight()), (0, 0, 0));
        }
    }
}
