//! Which rows of a run are computed together, and the arrays of one call of `llama_decode`.
//!
//! With a KV stream for each session, llama.cpp cuts a batch into *ubatches* of equally long runs of consecutive
//! sequence numbers. Each *call* here is exactly one ubatch: either single rows of consecutive slots, or all rows of
//! one slot. So results come in the order in which rows went in, and no graph is wider than asked for.
//!
//! A slot without a row would part its neighbours, and each call reads all weights. So holes of up to [`MAX_HOLE`]
//! slots are filled with rows that nobody asked for: zeros at the end of the slot's session, forgotten right behind
//! the call (`run.rs` sees to that). A session that rests in such a slot keeps its bits, as its own cells are only
//! read.
//!
//! The scratch space belongs to the stage and is kept from run to run, so that a run allocates nothing.

use std::ops::Range;
use std::ptr;

use llama_cpp_sys_2 as sys;

use crate::run::{Input, Row};
use crate::stage::{CELL_PADDING, StageOptions};

/// Most slots in a hole that is filled, and least rows of a call with filled holes.
///
/// Measured with 1.2 billion weights in Q4_0 on one thread, a call of one row takes 70 ms, of two 142, of 3, 4, 5, 6,
/// 8, 12 and 16 rows 152, 151, 188, 199, 218, 287 and 327: about 112 + 13 n from three rows on, since the kernel for
/// few rows reads the weights once for each. Three rows with a hole of h between each two take 210 ms as calls of
/// their own, and 151 + 26 h together: with h = 2 it is even at worst, and better with more rows, fewer holes or
/// holes of one. Two rows gain nothing even with h = 1 (152 against 140).
const MAX_HOLE: u32 = 2;
const MIN_ROWS_AROUND_HOLES: usize = 3;

/// The rows of one slot in a batch.
#[derive(Debug, Clone, Copy)]
pub(crate) struct SlotRows {
    pub(crate) slot: u32,
    pub(crate) first: usize,
    pub(crate) n: usize,
}

/// One row of a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum CallRow {
    /// The row of the batch with this index.
    Given(usize),
    /// A row that nobody asked for.
    Filler { slot: u32, position: u32 },
}

/// What the slots that the batch leaves out have room for.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Room<'a> {
    /// Tokens of each slot.
    pub(crate) lens: &'a [u32],
    /// Most tokens of a slot.
    pub(crate) n_ctx: u32,
    /// Most rows of a call.
    pub(crate) max_rows: usize,
    /// Whether a row can be forgotten; if not, nothing is filled.
    pub(crate) reversible: bool,
    /// Whether single rows of several slots may share a call.
    pub(crate) together: bool,
}

/// Buffers of a run, kept for the next.
pub(crate) struct Scratch {
    /// The batch by slots; sorted by slot once it is grouped.
    pub(crate) slots: Vec<SlotRows>,
    /// For each slot, whether the batch has rows of it.
    pub(crate) seen: Vec<bool>,
    /// Rows in the order of decoding.
    pub(crate) order: Vec<CallRow>,
    /// Calls as ranges of `order`.
    pub(crate) calls: Vec<Range<usize>>,
    /// For each row, how many rows before it ask for logits.
    pub(crate) output_index: Vec<usize>,
    pub(crate) n_outputs: usize,
    pub(crate) batch: Batch,
}

/// The arrays that `llama_batch` points to.
pub(crate) struct Batch {
    n_planes: usize,
    /// Hidden states are for the input node alone; llama.cpp gets tokens.
    looks_up_rows: bool,
    tokens: Vec<sys::llama_token>,
    pub(crate) hidden: Vec<f32>,
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
            // Each slot is in one call at most, with rows of the batch or with a filler.
            order: Vec::with_capacity(n_rows + n_slots),
            calls: Vec::with_capacity(n_slots),
            output_index: Vec::with_capacity(n_rows),
            n_outputs: 0,
            batch: Batch {
                n_planes,
                looks_up_rows: options.hooks.looks_up_rows,
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

    /// Groups the slots into calls.
    pub(crate) fn group(&mut self, room: &Room<'_>) {
        self.slots.sort_unstable_by_key(|rows| rows.slot);
        self.order.clear();
        self.calls.clear();
        let mut rest = &self.slots[..];
        while let Some(first) = rest.first() {
            let filled = if room.reversible { room.stretch(rest, MAX_HOLE) } else { 0 };
            let n = match filled {
                _ if !room.together => 1,
                filled if filled >= MIN_ROWS_AROUND_HOLES => filled,
                _ => room.stretch(rest, 0),
            };
            let start = self.order.len();
            let mut slot = first.slot;
            for rows in &rest[..n] {
                self.order.extend((slot..rows.slot).map(|slot| room.filler(slot)));
                self.order.extend((rows.first..rows.first + rows.n).map(CallRow::Given));
                slot = rows.slot + 1;
            }
            self.calls.push(start..self.order.len());
            rest = &rest[n..];
        }
    }

    /// Makes one call of a row that nobody asked for.
    pub(crate) fn group_filler(&mut self, filler: CallRow) {
        self.order.clear();
        self.order.push(filler);
    }
}

impl Room<'_> {
    /// The row that fills `slot`.
    pub(crate) fn filler(&self, slot: u32) -> CallRow {
        CallRow::Filler { slot, position: self.lens[slot as usize] }
    }

    /// How many of the first `slots`, in ascending order, go into one call if holes of up to `max_hole` slots are
    /// filled.
    ///
    /// All sessions of a call attend to as many cells as the longest, masked beyond their own. So a hole whose
    /// session is longer than those around it is left, or it would cost more than it saves.
    fn stretch(&self, slots: &[SlotRows], max_hole: u32) -> usize {
        let Some(first) = slots.first().filter(|first| first.n == 1) else { return 1 };
        let mut n_cells = self.n_cells(first.slot);
        let mut n = 1;
        for (rows, next) in slots.iter().zip(&slots[1..]) {
            let mut hole = rows.slot + 1..next.slot;
            let n_rows = next.slot + 1 - first.slot;
            n_cells = n_cells.max(self.n_cells(next.slot));
            let fits = |slot| self.lens[slot as usize] < self.n_ctx && self.n_cells(slot) <= n_cells;
            if next.n != 1 || n_rows as usize > self.max_rows || hole.len() > max_hole as usize || !hole.all(fits) {
                break;
            }
            n += 1;
        }
        n
    }

    /// Cells that a row at the end of `slot` attends to.
    fn n_cells(&self, slot: u32) -> u32 {
        (self.lens[slot as usize] + 1).next_multiple_of(CELL_PADDING)
    }
}

impl Batch {
    /// Fills the arrays with the rows of one call.
    pub(crate) fn fill(&mut self, rows: &[Row], input: Input<'_>, call: &[CallRow], n_embd: usize, all_outputs: bool) {
        self.tokens.clear();
        self.hidden.clear();
        self.positions.clear();
        self.seq_id.clear();
        self.output.clear();
        for call_row in call {
            match (*call_row, input) {
                (CallRow::Given(row), Input::Hidden(hidden)) => {
                    self.hidden.extend_from_slice(&hidden[row * n_embd..][..n_embd]);
                }
                (CallRow::Given(row), Input::Tokens(tokens)) => self.tokens.push(tokens[row]),
                (CallRow::Filler { .. }, Input::Hidden(_)) => self.hidden.resize(self.hidden.len() + n_embd, 0.0),
                (CallRow::Filler { .. }, Input::Tokens(_)) => self.tokens.push(0),
            }
            let (slot, position, output) = match *call_row {
                CallRow::Given(row) => (rows[row].slot, rows[row].position, rows[row].output),
                CallRow::Filler { slot, position } => (slot, position, false),
            };
            self.seq_id.push(slot as i32);
            self.positions.push(position as i32);
            self.output.push((all_outputs || output).into());
        }
        if self.looks_up_rows && !self.hidden.is_empty() {
            self.tokens.resize(call.len(), 0);
        }
        for plane in 1..self.n_planes {
            // Text has the same position in time, height and width, and 0 in the unused plane.
            match plane {
                3 => self.positions.resize(self.positions.len() + call.len(), 0),
                _ => self.positions.extend_from_within(..call.len()),
            }
        }
        self.n_seq_id.clear();
        self.n_seq_id.resize(call.len(), 1);
        let seq_id = self.seq_id.as_mut_ptr();
        self.seq_id_of_row.clear();
        self.seq_id_of_row.extend((0..call.len()).map(|i| seq_id.wrapping_add(i)));
    }

    /// The batch as llama.cpp takes it; valid until the arrays change.
    pub(crate) fn raw(&mut self) -> sys::llama_batch {
        let or_null = |values: &mut Vec<i32>| if values.is_empty() { ptr::null_mut() } else { values.as_mut_ptr() };
        sys::llama_batch {
            n_tokens: self.seq_id_of_row.len() as i32,
            token: or_null(&mut self.tokens),
            embd: if self.hidden.is_empty() || self.looks_up_rows { ptr::null_mut() } else { self.hidden.as_mut_ptr() },
            pos: self.positions.as_mut_ptr(),
            n_seq_id: self.n_seq_id.as_mut_ptr(),
            seq_id: self.seq_id_of_row.as_mut_ptr(),
            logits: self.output.as_mut_ptr(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const N_CTX: u32 = 1000;

    /// Groups a batch of `(slot, rows)` and compares the calls, where `-1` is a filler and other numbers are slots.
    fn check(change: impl FnOnce(&mut Vec<u32>, &mut Room<'_>), batch: &[(u32, usize)], expected: &[&[i32]]) {
        let mut lens = vec![10; 32];
        let mut room = Room { lens: &[], n_ctx: N_CTX, max_rows: 16, reversible: true, together: true };
        change(&mut lens, &mut room);
        let Room { max_rows, reversible, together, .. } = room;
        let room = Room { lens: &lens, n_ctx: N_CTX, max_rows, reversible, together };
        let options = StageOptions {
            n_ctx: N_CTX,
            n_sessions: 32,
            max_rows: max_rows as u32,
            max_outputs: 0,
            n_threads: 1,
            n_embd: 0,
            n_vocab: 0,
            hooks: brigade_base::Hooks::default(),
            pooling: None,
            kv: brigade_base::KvTypes::default(),
        };
        let mut scratch = Scratch::new(&options, 1, 1);
        let mut slot_of = Vec::new();
        for &(slot, n) in batch {
            scratch.slots.push(SlotRows { slot, first: slot_of.len(), n });
            slot_of.extend(std::iter::repeat_n(slot as i32, n));
        }
        let capacity = scratch.order.capacity();
        scratch.group(&room);
        assert_eq!(scratch.order.capacity(), capacity, "nothing is allocated");
        let shown = |row: &CallRow| match *row {
            CallRow::Given(row) => slot_of[row],
            CallRow::Filler { slot, position } => {
                assert_eq!(position, lens[slot as usize]);
                -1
            }
        };
        let calls: Vec<Vec<_>> =
            scratch.calls.iter().map(|call| scratch.order[call.clone()].iter().map(shown).collect()).collect();
        assert_eq!(calls, expected, "{batch:?}");
    }

    fn singles(slots: &[u32]) -> Vec<(u32, usize)> {
        slots.iter().map(|&slot| (slot, 1)).collect()
    }

    #[test]
    fn neighbours_form_a_call_and_chunks_their_own() {
        check(|_, _| (), &singles(&[2, 0, 1]), &[&[0, 1, 2]]);
        check(|_, _| (), &singles(&[4, 5]), &[&[4, 5]]);
        check(|_, _| (), &[(0, 1), (1, 3), (2, 1), (3, 1)], &[&[0], &[1, 1, 1], &[2, 3]]);
        check(|_, _| (), &[(1, 2), (0, 2)], &[&[0, 0], &[1, 1]]);
    }

    #[test]
    fn texts_that_are_pooled_share_no_call() {
        check(|_, room| room.together = false, &singles(&[0, 1, 2, 4]), &[&[0], &[1], &[2], &[4]]);
        check(|_, room| room.together = false, &[(0, 1), (1, 3), (2, 1)], &[&[0], &[1, 1, 1], &[2]]);
    }

    #[test]
    fn holes_are_filled_where_that_saves_a_call() {
        check(|_, _| (), &singles(&[0, 2]), &[&[0], &[2]]);
        check(|_, _| (), &singles(&[0, 2, 3]), &[&[0, -1, 2, 3]]);
        check(|_, _| (), &singles(&[0, 3, 6]), &[&[0, -1, -1, 3, -1, -1, 6]]);
        check(|_, _| (), &singles(&[0, 1, 5, 6, 8]), &[&[0, 1], &[5, 6, -1, 8]]);
        check(|_, _| (), &[(0, 1), (1, 1), (3, 2), (5, 1), (6, 1)], &[&[0, 1], &[3, 3], &[5, 6]]);
    }

    #[test]
    fn slots_without_room_or_with_longer_sessions_are_no_fillers() {
        let batch = singles(&[0, 1, 3, 4]);
        let apart: &[&[i32]] = &[&[0, 1], &[3, 4]];
        check(|lens, _| lens[2] = N_CTX, &batch, apart);
        check(|lens, _| lens[2] = 300, &batch, apart);
        check(|lens, _| (lens[2], lens[4]) = (500, 300), &batch, apart);
        check(|lens, _| (lens[2], lens[3]) = (500, 300), &batch, &[&[0, 1, -1, 3, 4]]);
        check(|_, room| room.reversible = false, &batch, apart);
    }

    #[test]
    fn no_call_is_longer_than_the_stage_takes() {
        check(|_, room| room.max_rows = 4, &singles(&[0, 1, 3, 4]), &[&[0, 1, -1, 3], &[4]]);
        check(|_, room| room.max_rows = 3, &singles(&[0, 2, 4]), &[&[0], &[2], &[4]]);
    }
}
