//! A pass on one link: which rows of which sessions, and their hidden states.
//!
//! A frame says what is meant, never how to compute it: there are no graphs, masks or pointers in it. Layout, little
//! endian:
//!
//! ```text
//! deployment u64 | epoch u64 | pass u64
//! dtype u8 | reserved u8 | n_sets u16 | n_timings u16 | n_embd u32 | n_rows u32
//! n_sets    x (slot u32, keep u32, n_rows u32, n_outputs u32)
//! n_timings x (compute_us u32, software_us u32)
//! n_rows x n_embd x f32
//! ```
//!
//! Each row set begins with "keep the first `keep` tokens of this slot", so that a rollback, the end of a session and
//! its replacement by another are all the same: a position.

use brigade_base::{DeploymentId, Epoch, PassId};

use crate::control::{MAX_BATCH_ROWS, MAX_SESSIONS};
use crate::{DecodeError, cap};

/// Bytes before the row sets.
pub const HEADER_BYTES: usize = 38;
const SET_BYTES: usize = 16;
const TIMING_BYTES: usize = 8;

/// Most rows of a frame: one full batch and one row of every session.
pub const MAX_FRAME_ROWS: u32 = MAX_BATCH_ROWS + MAX_SESSIONS;

/// Most row sets of a frame. A slot may occur twice: once to be emptied and once to be filled.
pub const MAX_ROW_SETS: u32 = 2 * MAX_SESSIONS;

/// Most stages of a ring, each of which adds one timing.
pub const MAX_STAGES: u32 = 1024;

/// Largest hidden state; the widest known model has 53,248.
pub const MAX_N_EMBD: u32 = 1 << 17;

/// How values travel. Only exact ones for now.
const DTYPE_F32: u8 = 0;

/// Rows of one session's slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RowSet {
    /// The slot of the KV cache that the session has on every stage.
    pub slot: u32,
    /// Tokens of the slot that stay; the rows stand at `keep`, `keep + 1`, and so on.
    pub keep: u32,
    /// How many rows follow; 0 only truncates.
    pub n_rows: u32,
    /// How many of the last rows want logits.
    pub n_outputs: u32,
}

/// What a stage spent on a pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Timing {
    /// Microseconds of computing.
    pub compute_us: u32,
    /// Microseconds between the arrival of the frame and its departure that were not computing.
    pub software_us: u32,
}

/// Says which placement a data link belongs to; the dialer sends it first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Attach {
    /// The deployment.
    pub deployment: DeploymentId,
    /// Its epoch.
    pub epoch: Epoch,
}

impl Attach {
    /// Both numbers as u64, little endian.
    pub fn encode(self) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&self.deployment.0.to_le_bytes());
        bytes[8..].copy_from_slice(&self.epoch.0.to_le_bytes());
        bytes
    }

    /// Reads a message.
    ///
    /// # Errors
    /// If it has another length.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        if bytes.len() != 16 {
            let why = format!("{} bytes instead of 16", bytes.len());
            return Err(DecodeError::Malformed { what: "attach", why });
        }
        let mut fields = Fields(bytes);
        Ok(Self { deployment: DeploymentId(fields.u64()), epoch: Epoch(fields.u64()) })
    }
}

/// What a frame carries beside its rows.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct FrameHead {
    /// The deployment.
    pub deployment: DeploymentId,
    /// Its epoch; a frame of another one is dropped.
    pub epoch: Epoch,
    /// The pass.
    pub pass: PassId,
    /// The rows, in the order in which they follow.
    pub sets: Vec<RowSet>,
    /// One for each stage that the pass has left behind.
    pub timings: Vec<Timing>,
    /// Width of a row.
    pub n_embd: u32,
}

impl FrameHead {
    /// Number of rows.
    pub fn n_rows(&self) -> u32 {
        self.sets.iter().map(|set| set.n_rows).sum()
    }

    /// Writes everything before the rows into `out`, which is emptied first.
    pub fn encode(&self, out: &mut Vec<u8>) {
        out.clear();
        for n in [self.deployment.0, self.epoch.0, self.pass.0] {
            out.extend_from_slice(&n.to_le_bytes());
        }
        out.extend_from_slice(&[DTYPE_F32, 0]);
        out.extend_from_slice(&(self.sets.len() as u16).to_le_bytes());
        out.extend_from_slice(&(self.timings.len() as u16).to_le_bytes());
        out.extend_from_slice(&self.n_embd.to_le_bytes());
        out.extend_from_slice(&self.n_rows().to_le_bytes());
        for set in &self.sets {
            for n in [set.slot, set.keep, set.n_rows, set.n_outputs] {
                out.extend_from_slice(&n.to_le_bytes());
            }
        }
        for timing in &self.timings {
            out.extend_from_slice(&timing.compute_us.to_le_bytes());
            out.extend_from_slice(&timing.software_us.to_le_bytes());
        }
    }

    /// Reads a frame: `self` becomes its head, `rows` its values `[n_rows, n_embd]`. Both keep their memory.
    ///
    /// # Errors
    /// If a count is beyond its cap, or the counts and the length do not agree. `self` and `rows` are then unspecified.
    pub fn decode(&mut self, bytes: &[u8], rows: &mut Vec<f32>) -> Result<(), DecodeError> {
        let malformed = |why: &str| DecodeError::Malformed { what: "frame", why: why.to_owned() };
        let (head, rest) = bytes.split_at_checked(HEADER_BYTES).ok_or_else(|| malformed("cut off in its header"))?;
        let mut fields = Fields(head);
        self.deployment = DeploymentId(fields.u64());
        self.epoch = Epoch(fields.u64());
        self.pass = PassId(fields.u64());
        let [dtype, reserved] = fields.take();
        if dtype != DTYPE_F32 || reserved != 0 {
            return Err(malformed("unknown type of values"));
        }
        let n_sets = u32::from(u16::from_le_bytes(fields.take()));
        let n_timings = u32::from(u16::from_le_bytes(fields.take()));
        self.n_embd = fields.u32();
        let n_rows = fields.u32();
        cap("row sets", n_sets.into(), MAX_ROW_SETS.into())?;
        cap("stages", n_timings.into(), MAX_STAGES.into())?;
        cap("hidden state", self.n_embd.into(), MAX_N_EMBD.into())?;
        cap("rows", n_rows.into(), MAX_FRAME_ROWS.into())?;
        let sets_end = n_sets as usize * SET_BYTES;
        let timings_end = sets_end + n_timings as usize * TIMING_BYTES;
        let values = n_rows as usize * self.n_embd as usize;
        if rest.len() != timings_end + values * 4 {
            return Err(malformed("its length does not match its counts"));
        }
        let mut fields = Fields(&rest[..timings_end]);
        self.sets.clear();
        for _ in 0..n_sets {
            let [slot, keep, n_rows, n_outputs] = std::array::from_fn(|_| fields.u32());
            cap("slot", slot.into(), (MAX_SESSIONS - 1).into())?;
            cap("rows of a set", n_rows.into(), MAX_FRAME_ROWS.into())?;
            cap("outputs of a set", n_outputs.into(), n_rows.into())?;
            cap("position", u64::from(keep) + u64::from(n_rows), u32::MAX.into())?;
            self.sets.push(RowSet { slot, keep, n_rows, n_outputs });
        }
        if self.sets.iter().map(|set| u64::from(set.n_rows)).sum::<u64>() != u64::from(n_rows) {
            return Err(malformed("its row sets do not add up"));
        }
        self.timings.clear();
        for _ in 0..n_timings {
            let [compute_us, software_us] = std::array::from_fn(|_| fields.u32());
            self.timings.push(Timing { compute_us, software_us });
        }
        rows.clear();
        rows.resize(values, 0.0);
        bytemuck::cast_slice_mut::<f32, u8>(rows).copy_from_slice(&rest[timings_end..]);
        Ok(())
    }
}

/// The bytes of rows as they travel.
///
/// Does not compile for big-endian machines, for which no release is made: GGUF files are little endian too.
pub fn row_bytes(rows: &[f32]) -> &[u8] {
    const { assert!(cfg!(target_endian = "little"), "big-endian machines are not supported") };
    bytemuck::cast_slice(rows)
}

/// Reads numbers from bytes whose length was checked.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn take<const N: usize>(&mut self) -> [u8; N] {
        let (head, rest) = self.0.split_first_chunk::<N>().map_or(([0; N], &[][..]), |(head, rest)| (*head, rest));
        self.0 = rest;
        head
    }

    fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.take())
    }

    fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.take())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn frame(sets: Vec<RowSet>, n_embd: u32) -> (FrameHead, Vec<f32>, Vec<u8>) {
        let head = FrameHead {
            deployment: DeploymentId(1),
            epoch: Epoch(2),
            pass: PassId(3),
            sets,
            timings: vec![Timing { compute_us: 9, software_us: 4 }],
            n_embd,
        };
        let rows: Vec<f32> = (0..head.n_rows() * n_embd).map(|i| i as f32 * 0.5).collect();
        let mut bytes = Vec::new();
        head.encode(&mut bytes);
        bytes.extend_from_slice(row_bytes(&rows));
        (head, rows, bytes)
    }

    fn set(slot: u32, keep: u32, n_rows: u32) -> RowSet {
        RowSet { slot, keep, n_rows, n_outputs: n_rows.min(1) }
    }

    #[test]
    fn a_frame_survives_the_wire_bit_for_bit() {
        let (head, rows, bytes) = frame(vec![set(0, 5, 2), set(3, 0, 0), set(1, 7, 1)], 8);
        let (mut read, mut values) = (FrameHead::default(), vec![1.0; 3]);
        read.decode(&bytes, &mut values).unwrap();
        assert_eq!((read, values), (head, rows));
    }

    #[test]
    fn counts_that_disagree_are_refused() {
        let (_, _, bytes) = frame(vec![set(0, 5, 2)], 8);
        let mut head = FrameHead::default();
        for cut in 0..bytes.len() {
            assert!(head.decode(&bytes[..cut], &mut Vec::new()).is_err(), "cut at {cut}");
        }
        let mut longer = bytes.clone();
        longer.push(0);
        assert!(head.decode(&longer, &mut Vec::new()).is_err());
        let mut liar = bytes;
        liar[HEADER_BYTES + 8] = 1;
        assert!(head.decode(&liar, &mut Vec::new()).is_err());
    }

    proptest! {
        #[test]
        fn no_bytes_panic_or_allocate_beyond_their_length(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let mut rows = Vec::new();
            let _ = FrameHead::default().decode(&bytes, &mut rows);
            prop_assert!(rows.len() * 4 <= bytes.len());
        }

        #[test]
        fn no_mutation_panics(at in 0usize..200, value: u8) {
            let (_, _, mut bytes) = frame(vec![set(0, 5, 2), set(1, 7, 1)], 4);
            let at = at % bytes.len();
            bytes[at] = value;
            let _ = FrameHead::default().decode(&bytes, &mut Vec::new());
        }
    }
}
