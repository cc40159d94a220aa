//! One pass of a batch through a stage.
//!
//! - Rows are checked against what the KV cache holds, then grouped into calls of `llama_decode` (`batch.rs`).
//! - Rows that only fill a hole between slots are taken out of the KV cache again right behind their call, and never
//!   get into results. Results are scattered back into the caller's row order.
//! - A run is all or nothing: after an error or a cancel, the KV cache is as before.
//!
//! The stage owns the scratch space; the caller owns rows, input and results.

use std::ops::Range;

use brigade_base::Token;
use llama_cpp_sys_2 as sys;

use crate::backend::capture;
use crate::batch::{CallRow, Room, Scratch, SlotRows};
use crate::stage::{Stage, StageOptions};

/// One token of one session in a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Row {
    /// The session's slot.
    pub slot: u32,
    /// Position in the session, from 0.
    pub position: u32,
    /// Whether its logits are wanted, or the pooled vector of the text that ends with it; ignored by a stage that
    /// yields hidden states, which yields all.
    pub output: bool,
}

/// What enters the first layer, one entry a row.
#[derive(Debug, Clone, Copy)]
pub enum Input<'a> {
    /// Hidden states `[n_rows, n_embd]`.
    Hidden(&'a [f32]),
    /// Tokens, whose embedding the stage looks up itself.
    Tokens(&'a [Token]),
}

/// A batch was not computed; the KV cache is as before.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RunError {
    /// More rows than the stage was loaded for.
    #[error("the batch has {n_rows} rows, but the stage was loaded for {max_rows}; send it in parts")]
    TooManyRows {
        /// Rows of the batch.
        n_rows: usize,
        /// Most rows.
        max_rows: u32,
    },
    /// More rows with logits than the stage was loaded for.
    #[error("{n_outputs} rows ask for logits, but the stage was loaded for {max_outputs}; send the batch in parts")]
    TooManyOutputs {
        /// Rows that ask.
        n_outputs: usize,
        /// Most such rows.
        max_outputs: u32,
    },
    /// There is no such slot.
    #[error("slot {slot} does not exist: the stage was loaded with {n_sessions}")]
    UnknownSlot {
        /// The slot.
        slot: u32,
        /// How many there are.
        n_sessions: u32,
    },
    /// The rows of a slot do not lie together.
    #[error("the rows of slot {slot} do not lie together; sort the batch by slot and position")]
    SplitSlot {
        /// The slot.
        slot: u32,
    },
    /// A row does not continue its session.
    #[error(
        "a row of slot {slot} has position {found}, but the next one is {expected}; truncate or replay the session"
    )]
    Position {
        /// The slot.
        slot: u32,
        /// The position that continues the session.
        expected: u32,
        /// The row's position.
        found: u32,
    },
    /// The session is full.
    #[error("slot {slot} is full: a session holds {n_ctx} tokens; end it or load with a longer context")]
    ContextFull {
        /// The slot.
        slot: u32,
        /// Tokens of a session.
        n_ctx: u32,
    },
    /// The input has another length than the rows need.
    #[error("the input has {found} values, but the rows need {expected}")]
    InputLength {
        /// What the rows need.
        expected: usize,
        /// What there is.
        found: usize,
    },
    /// A token is outside the vocabulary.
    #[error("token {token} is not in the vocabulary of {n_vocab} tokens")]
    UnknownToken {
        /// The token.
        token: Token,
        /// Size of the vocabulary.
        n_vocab: u32,
    },
    /// A hidden state has an infinite value or none; it would spoil the session's KV cache.
    #[error("the hidden state of row {row} is not finite; the stage before it failed or the frame is damaged")]
    NotFinite {
        /// The row.
        row: usize,
    },
    /// It was cancelled.
    #[error("the run was cancelled")]
    Cancelled,
    /// The graph did not have the input or stop node as expected.
    #[error(
        "the input or stop node appeared {n_hits} times with shape {shape:?}, but once with [{n_embd}, {n_rows}, 1, 1] was \
         expected; the architecture needs another node"
    )]
    StopNode {
        /// How often the node appeared.
        n_hits: u32,
        /// Its shape, if it was another one.
        shape: Option<[i64; 4]>,
        /// Width of the hidden state.
        n_embd: usize,
        /// Rows of the call.
        n_rows: usize,
    },
    /// The graph did not multiply by the factors that it was to be told, as expected.
    #[error(
        "the graph multiplies {found} times by a factor that {wanted} layers were to be told; it needs other nodes"
    )]
    Scales {
        /// How often it does.
        found: usize,
        /// How many factors there are.
        wanted: usize,
    },
    /// llama.cpp failed.
    #[error("llama.cpp failed with code {code}: {message}")]
    Decode {
        /// What `llama_decode` returned.
        code: i32,
        /// What it logged.
        message: String,
    },
}

impl Stage {
    /// Computes a batch. The rows of a slot lie together and continue the session; the slots come in any order.
    ///
    /// `out` is overwritten, in row order: by hidden states `[n_rows, n_embd]` in a stage with a stop node, else by
    /// logits or pooled vectors `[n_output_rows, n_out]`. Nothing is allocated once `out` has grown to its largest
    /// size.
    ///
    /// # Errors
    /// If the batch does not fit the stage or its sessions, it was cancelled, or llama.cpp fails. The KV cache is then
    /// as before and `out` is empty. Recurrent models cannot go back: once a call has begun, all their sessions are
    /// cleared, which the next run reports as [`RunError::Position`].
    pub fn run(&mut self, rows: &[Row], input: Input<'_>, out: &mut Vec<f32>) -> Result<(), RunError> {
        out.clear();
        self.check(rows, input)?;
        if rows.is_empty() {
            return Ok(());
        }
        let (n_ctx, max_rows) = (self.options.n_ctx, self.options.max_rows as usize);
        let reversible = !self.model.is_recurrent();
        let together = self.context.has_memory && self.options.pooling.is_none();
        let room = Room { lens: &self.lens, n_ctx, max_rows, reversible: reversible && together, together };
        self.scratch.group(&room);
        let n_results = if self.is_final() { self.scratch.n_outputs } else { rows.len() };
        out.resize(n_results * self.n_out as usize, 0.0);

        self.context.signals.begin();
        let result = self.compute(rows, input, out);
        let cancelled = self.context.signals.end();
        let result = if cancelled { Err(RunError::Cancelled) } else { result };
        match result {
            // An encoder keeps nothing of a text.
            Ok(()) if !self.context.has_memory => {}
            Ok(()) => {
                for rows in &self.scratch.slots {
                    self.lens[rows.slot as usize] += rows.n as u32;
                }
            }
            Err(_) => {
                out.clear();
                self.roll_back();
            }
        }
        result
    }

    /// Checks the batch and lists its slots.
    fn check(&mut self, rows: &[Row], input: Input<'_>) -> Result<(), RunError> {
        let StageOptions { max_rows, n_sessions, n_ctx, .. } = self.options;
        if rows.len() > max_rows as usize {
            return Err(RunError::TooManyRows { n_rows: rows.len(), max_rows });
        }
        self.check_input(rows.len(), input)?;
        let scratch = &mut self.scratch;
        scratch.slots.clear();
        scratch.seen.fill(false);
        scratch.output_index.clear();
        scratch.n_outputs = 0;
        for (index, &Row { slot, position, output }) in rows.iter().enumerate() {
            let Some(&len) = self.lens.get(slot as usize) else {
                return Err(RunError::UnknownSlot { slot, n_sessions });
            };
            match scratch.slots.last_mut() {
                Some(last) if last.slot == slot => last.n += 1,
                _ if scratch.seen[slot as usize] => return Err(RunError::SplitSlot { slot }),
                _ => scratch.slots.push(SlotRows { slot, first: index, n: 1 }),
            }
            scratch.seen[slot as usize] = true;
            let expected = len + scratch.slots.last().map_or(0, |rows| rows.n as u32) - 1;
            if position != expected {
                return Err(RunError::Position { slot, expected, found: position });
            }
            if position >= n_ctx {
                return Err(RunError::ContextFull { slot, n_ctx });
            }
            scratch.output_index.push(scratch.n_outputs);
            scratch.n_outputs += usize::from(output);
        }
        if self.options.hooks.stop_node.is_none() && scratch.n_outputs > self.max_outputs as usize {
            let (n_outputs, max_outputs) = (scratch.n_outputs, self.max_outputs);
            return Err(RunError::TooManyOutputs { n_outputs, max_outputs });
        }
        Ok(())
    }

    fn check_input(&self, n_rows: usize, input: Input<'_>) -> Result<(), RunError> {
        let n_embd = self.n_embd as usize;
        let (expected, found) = match input {
            Input::Hidden(hidden) => (n_rows * n_embd, hidden.len()),
            Input::Tokens(tokens) => (n_rows, tokens.len()),
        };
        if expected != found {
            return Err(RunError::InputLength { expected, found });
        }
        match input {
            Input::Hidden(hidden) => match hidden.iter().position(|value| !value.is_finite()) {
                Some(index) => Err(RunError::NotFinite { row: index / n_embd }),
                None => Ok(()),
            },
            Input::Tokens(tokens) => {
                let known = |token: Token| u32::try_from(token).is_ok_and(|token| token < self.n_vocab);
                match tokens.iter().find(|&&token| !known(token)) {
                    Some(&token) => Err(RunError::UnknownToken { token, n_vocab: self.n_vocab }),
                    None => Ok(()),
                }
            }
        }
    }

    /// Decodes call by call and scatters the results.
    fn compute(&mut self, rows: &[Row], input: Input<'_>, out: &mut [f32]) -> Result<(), RunError> {
        for call in 0..self.scratch.calls.len() {
            let range = self.scratch.calls[call].clone();
            self.decode(rows, input, range.clone())?;
            match (self.is_final(), self.options.pooling) {
                (false, _) => self.scatter_hidden(range, out)?,
                (true, None) => self.scatter_logits(rows, range, out)?,
                (true, Some(_)) => self.scatter_pooled(rows, range, out)?,
            }
        }
        Ok(())
    }

    /// Computes one row in `slot`, which must have room, and forgets it: what is queued for the next run happens.
    pub(crate) fn decode_filler(&mut self, slot: u32) -> Result<(), RunError> {
        let position = self.lens[slot as usize];
        self.scratch.group_filler(CallRow::Filler { slot, position });
        // Tokens would do where the graph looks them up; hidden states do everywhere.
        self.decode(&[], Input::Hidden(&[]), 0..1)
    }

    /// Computes the rows of one call and forgets those that only fill a hole.
    fn decode(&mut self, rows: &[Row], input: Input<'_>, range: Range<usize>) -> Result<(), RunError> {
        // libllama pools rows that are outputs alone.
        let all_outputs = !self.is_final() || self.options.pooling.is_some();
        let n_embd = self.n_embd as usize;
        let Scratch { batch, order, .. } = &mut self.scratch;
        let call = &order[range];
        batch.fill(rows, input, call, n_embd, all_outputs);
        if let Some(hook) = self.context.hook() {
            hook.arm(call.len(), &batch.hidden);
        }
        let (context, batch) = (self.context.as_ptr(), batch.raw());
        // SAFETY: the arrays of the batch hold one entry for each of its rows, hidden states `n_embd` and positions
        // all planes; slots, tokens, positions and numbers of rows and outputs were checked, those of fillers when
        // the rows were grouped, so nothing is asserted. The arrays and the hook stay untouched until the call
        // returns.
        let (code, captured) = capture(|| unsafe { sys::llama_decode(context, batch) });
        for row in call {
            if let CallRow::Filler { slot, position } = *row {
                self.context.remove(slot, position);
            }
        }
        if code != 0 {
            return Err(RunError::Decode { code, message: captured.message() });
        }
        captured.log();
        self.context.copies_queued = 0;
        let n_rows = call.len();
        let Some(hook) = self.context.hook() else { return Ok(()) };
        if !hook.entered {
            return Err(RunError::StopNode { n_hits: 0, shape: hook.odd_shape, n_embd, n_rows });
        }
        hook.check_scales()
    }

    fn scatter_hidden(&mut self, range: Range<usize>, out: &mut [f32]) -> Result<(), RunError> {
        let n_embd = self.n_embd as usize;
        let Some(hook) = self.context.hook() else { return Ok(()) };
        if hook.n_hits != 1 || hook.odd_shape.is_some() {
            let (n_hits, shape, n_rows) = (hook.n_hits, hook.odd_shape, hook.n_rows);
            return Err(RunError::StopNode { n_hits, shape, n_embd, n_rows });
        }
        for (row, values) in self.scratch.order[range].iter().zip(hook.values.chunks_exact(n_embd)) {
            if let CallRow::Given(row) = *row {
                out[row * n_embd..][..n_embd].copy_from_slice(values);
            }
        }
        Ok(())
    }

    fn scatter_pooled(&mut self, rows: &[Row], range: Range<usize>, out: &mut [f32]) -> Result<(), RunError> {
        let width = self.n_out as usize;
        for at in range {
            if let CallRow::Given(row) = self.scratch.order[at]
                && rows[row].output
            {
                let result = self.scratch.output_index[row] * width;
                self.read_pooled(rows[row].slot, &mut out[result..result + width])?;
            }
        }
        Ok(())
    }

    fn scatter_logits(&mut self, rows: &[Row], range: Range<usize>, out: &mut [f32]) -> Result<(), RunError> {
        let n_vocab = self.n_vocab as usize;
        let outputs = self.scratch.order[range].iter().filter_map(|row| match *row {
            CallRow::Given(row) => rows[row].output.then_some(row),
            CallRow::Filler { .. } => None,
        });
        let n_outputs = outputs.clone().count();
        if n_outputs == 0 {
            return Ok(());
        }
        // SAFETY: the context exists.
        let logits = unsafe { sys::llama_get_logits(self.context.as_ptr()) };
        if logits.is_null() {
            return Err(RunError::Decode { code: 0, message: "no logits were computed".to_owned() });
        }
        // SAFETY: after a decode the buffer holds `n_vocab` floats for each output row of that batch, in its order,
        // and stays until the next decode.
        let logits = unsafe { std::slice::from_raw_parts(logits, n_outputs * n_vocab) };
        for (row, values) in outputs.zip(logits.chunks_exact(n_vocab)) {
            out[self.scratch.output_index[row] * n_vocab..][..n_vocab].copy_from_slice(values);
        }
        Ok(())
    }

    /// Forgets what a failed run has put into the KV cache.
    fn roll_back(&mut self) {
        // A call moves the states of sessions that are not in it out of its way, layer by layer as it computes. So one
        // that was stopped may have left any of them half moved.
        if self.model.is_recurrent() {
            return self.clear_all();
        }
        for rows in &self.scratch.slots {
            let len = self.lens[rows.slot as usize];
            if !self.context.remove(rows.slot, len) {
                self.context.remove(rows.slot, 0);
                self.lens[rows.slot as usize] = 0;
            }
        }
    }
}
