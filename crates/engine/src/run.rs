//! One pass of a batch through a stage.
//!
//! - Rows are checked against what the KV cache holds, then grouped into calls of `llama_decode`. With a KV stream for
//!   each session, llama.cpp cuts a batch into *ubatches* of equally long runs of consecutive sequence numbers. Each
//!   group here is exactly one ubatch: either the single rows of consecutive slots, or all rows of one slot. So results
//!   come in the order in which rows went in, and no graph is wider than asked for.
//! - Results are scattered back into the caller's row order.
//! - A run is all or nothing: after an error or a cancel, the KV cache is as before.

use std::ops::Range;
use std::ptr;

use brigade_base::Token;
use llama_cpp_sys_2 as sys;

use crate::backend::capture;
use crate::stage::{Stage, StageOptions};

/// One token of one session in a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Row {
    /// The session's slot.
    pub slot: u32,
    /// Position in the session, from 0.
    pub position: u32,
    /// Whether its logits are wanted; ignored by a stage that yields hidden states, which yields all.
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
    /// llama.cpp failed.
    #[error("llama.cpp failed with code {code}: {message}")]
    Decode {
        /// What `llama_decode` returned.
        code: i32,
        /// What it logged.
        message: String,
    },
}

/// The rows of one slot in a batch.
#[derive(Debug, Clone, Copy)]
struct SlotRows {
    slot: u32,
    first: usize,
    n: usize,
}

/// Buffers of a run, kept for the next.
pub(crate) struct Scratch {
    /// The batch by slots; sorted by slot once it is checked.
    slots: Vec<SlotRows>,
    /// For each slot, whether the batch has rows of it.
    seen: Vec<bool>,
    /// Row indices in the order of decoding.
    order: Vec<usize>,
    /// Calls as ranges of `order`.
    groups: Vec<Range<usize>>,
    /// For each row, how many rows before it ask for logits.
    output_index: Vec<usize>,
    n_outputs: usize,
    batch: Batch,
}

/// The arrays that `llama_batch` points to.
struct Batch {
    n_planes: usize,
    tokens: Vec<sys::llama_token>,
    hidden: Vec<f32>,
    positions: Vec<sys::llama_pos>,
    n_seq_id: Vec<i32>,
    seq_id: Vec<sys::llama_seq_id>,
    seq_id_of_row: Vec<*mut sys::llama_seq_id>,
    output: Vec<i8>,
}

impl Scratch {
    pub(crate) fn new(options: &StageOptions, n_embd: usize, n_planes: usize) -> Self {
        let (n_rows, n_slots) = (options.max_rows as usize, options.n_sessions as usize);
        Self {
            slots: Vec::with_capacity(n_slots),
            seen: vec![false; n_slots],
            order: Vec::with_capacity(n_rows),
            groups: Vec::with_capacity(n_slots),
            output_index: Vec::with_capacity(n_rows),
            n_outputs: 0,
            batch: Batch {
                n_planes,
                tokens: Vec::with_capacity(n_rows),
                hidden: Vec::with_capacity(n_rows * n_embd),
                positions: Vec::with_capacity(n_rows * n_planes),
                n_seq_id: Vec::with_capacity(n_rows),
                seq_id: Vec::with_capacity(n_rows),
                seq_id_of_row: Vec::with_capacity(n_rows),
                output: Vec::with_capacity(n_rows),
            },
        }
    }

    /// Groups the slots into calls that are one ubatch each.
    fn group(&mut self) {
        self.slots.sort_unstable_by_key(|rows| rows.slot);
        self.order.clear();
        self.groups.clear();
        let mut previous_single = None;
        for rows in &self.slots {
            let single = (rows.n == 1).then_some(rows.slot);
            let joins = single.is_some_and(|slot| slot > 0 && previous_single == Some(slot - 1));
            let start = self.order.len();
            self.order.extend(rows.first..rows.first + rows.n);
            match self.groups.last_mut() {
                Some(group) if joins => group.end = self.order.len(),
                _ => self.groups.push(start..self.order.len()),
            }
            previous_single = single;
        }
    }
}

impl Batch {
    /// Fills the arrays with the given rows.
    fn fill(&mut self, rows: &[Row], input: Input<'_>, indices: &[usize], n_embd: usize, all_outputs: bool) {
        self.tokens.clear();
        self.hidden.clear();
        self.positions.clear();
        self.seq_id.clear();
        self.output.clear();
        for &index in indices {
            let row = rows[index];
            match input {
                Input::Hidden(hidden) => self.hidden.extend_from_slice(&hidden[index * n_embd..][..n_embd]),
                Input::Tokens(tokens) => self.tokens.push(tokens[index]),
            }
            self.seq_id.push(row.slot as i32);
            self.output.push((all_outputs || row.output).into());
        }
        for plane in 0..self.n_planes {
            // Text has the same position in time, height and width, and 0 in the unused plane.
            self.positions.extend(indices.iter().map(|&i| if plane == 3 { 0 } else { rows[i].position as i32 }));
        }
        self.n_seq_id.clear();
        self.n_seq_id.resize(indices.len(), 1);
        let seq_id = self.seq_id.as_mut_ptr();
        self.seq_id_of_row.clear();
        self.seq_id_of_row.extend((0..indices.len()).map(|i| seq_id.wrapping_add(i)));
    }

    /// The batch as llama.cpp takes it; valid until the arrays change.
    fn raw(&mut self) -> sys::llama_batch {
        let or_null = |values: &mut Vec<i32>| if values.is_empty() { ptr::null_mut() } else { values.as_mut_ptr() };
        sys::llama_batch {
            n_tokens: self.seq_id_of_row.len() as i32,
            token: or_null(&mut self.tokens),
            embd: if self.hidden.is_empty() { ptr::null_mut() } else { self.hidden.as_mut_ptr() },
            pos: self.positions.as_mut_ptr(),
            n_seq_id: self.n_seq_id.as_mut_ptr(),
            seq_id: self.seq_id_of_row.as_mut_ptr(),
            logits: self.output.as_mut_ptr(),
        }
    }
}

impl Stage {
    /// Computes a batch. The rows of a slot lie together and continue the session; the slots come in any order.
    ///
    /// `out` is overwritten, in row order: by hidden states `[n_rows, n_embd]` in a stage with a stop node, else by
    /// logits `[n_output_rows, n_vocab]`. Nothing is allocated once `out` has grown to its largest size.
    ///
    /// # Errors
    /// If the batch does not fit the stage or its sessions, it was cancelled, or llama.cpp fails. The KV cache is then
    /// as before and `out` is empty. Recurrent models cannot go back: their sessions of the batch are cleared, which
    /// the next run reports as [`RunError::Position`].
    pub fn run(&mut self, rows: &[Row], input: Input<'_>, out: &mut Vec<f32>) -> Result<(), RunError> {
        out.clear();
        self.check(rows, input)?;
        if rows.is_empty() {
            return Ok(());
        }
        self.scratch.group();
        let (width, n_results) =
            if self.is_final() { (self.n_vocab, self.scratch.n_outputs) } else { (self.n_embd, rows.len()) };
        out.resize(n_results * width as usize, 0.0);

        self.context.cancel.begin();
        let result = self.compute(rows, input, out);
        let cancelled = self.context.cancel.end();
        let result = if cancelled { Err(RunError::Cancelled) } else { result };
        match result {
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
        if self.options.stop_node.is_none() && scratch.n_outputs > self.max_outputs as usize {
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

    /// Decodes group by group and scatters the results.
    fn compute(&mut self, rows: &[Row], input: Input<'_>, out: &mut [f32]) -> Result<(), RunError> {
        for group in 0..self.scratch.groups.len() {
            let range = self.scratch.groups[group].clone();
            self.decode(rows, input, range.clone())?;
            if self.is_final() {
                self.scatter_logits(rows, range, out)?;
            } else {
                self.scatter_hidden(range, out)?;
            }
        }
        Ok(())
    }

    /// Computes the rows of one group.
    fn decode(&mut self, rows: &[Row], input: Input<'_>, range: Range<usize>) -> Result<(), RunError> {
        let (n_embd, all_outputs) = (self.n_embd as usize, !self.is_final());
        let n_rows = range.len();
        let Scratch { batch, order, .. } = &mut self.scratch;
        batch.fill(rows, input, &order[range], n_embd, all_outputs);
        if let Some(hook) = self.context.hook() {
            hook.arm(n_rows, &batch.hidden);
        }
        let (context, batch) = (self.context.as_ptr(), batch.raw());
        // SAFETY: the arrays of the batch hold one entry for each of its rows, hidden states `n_embd` and positions all
        // planes; slots, tokens, positions and numbers of rows and outputs were checked, so nothing is asserted. The
        // arrays and the hook stay untouched until the call returns.
        let (code, captured) = capture(|| unsafe { sys::llama_decode(context, batch) });
        if code != 0 {
            return Err(RunError::Decode { code, message: captured.message() });
        }
        captured.log();
        match self.context.hook() {
            Some(hook) if !hook.entered => Err(RunError::StopNode { n_hits: 0, shape: hook.odd_shape, n_embd, n_rows }),
            _ => Ok(()),
        }
    }

    fn scatter_hidden(&mut self, range: Range<usize>, out: &mut [f32]) -> Result<(), RunError> {
        let n_embd = self.n_embd as usize;
        let Some(hook) = self.context.hook() else { return Ok(()) };
        if hook.n_hits != 1 || hook.odd_shape.is_some() {
            let (n_hits, shape, n_rows) = (hook.n_hits, hook.odd_shape, hook.n_rows);
            return Err(RunError::StopNode { n_hits, shape, n_embd, n_rows });
        }
        for (&row, values) in self.scratch.order[range].iter().zip(hook.values.chunks_exact(n_embd)) {
            out[row * n_embd..][..n_embd].copy_from_slice(values);
        }
        Ok(())
    }

    fn scatter_logits(&mut self, rows: &[Row], range: Range<usize>, out: &mut [f32]) -> Result<(), RunError> {
        let n_vocab = self.n_vocab as usize;
        let order = &self.scratch.order[range];
        let n_outputs = order.iter().filter(|&&row| rows[row].output).count();
        if n_outputs == 0 {
            return Ok(());
        }
        // SAFETY: the context exists.
        let logits = unsafe { sys::llama_get_logits(self.context.as_ptr()) };
        if logits.is_null() {
            return Err(RunError::Decode { code: 0, message: "no logits were computed".to_owned() });
        }
        // SAFETY: after a decode the buffer holds `n_vocab` floats for each output row of that batch, in its order, and
        // stays until the next decode.
        let logits = unsafe { std::slice::from_raw_parts(logits, n_outputs * n_vocab) };
        let outputs = order.iter().filter(|&&row| rows[row].output);
        for (&row, values) in outputs.zip(logits.chunks_exact(n_vocab)) {
            out[self.scratch.output_index[row] * n_vocab..][..n_vocab].copy_from_slice(values);
        }
        Ok(())
    }

    /// Forgets what a failed run has put into the KV cache.
    fn roll_back(&mut self) {
        for rows in &self.scratch.slots {
            let len = self.lens[rows.slot as usize];
            if !self.context.remove(rows.slot, len) {
                self.context.remove(rows.slot, 0);
                self.lens[rows.slot as usize] = 0;
            }
        }
    }
}
