//! A pass on one link: what happens to KV caches, which rows of which sessions, and their hidden states.
//!
//! A frame says what is meant, never how to compute it: there are no graphs, masks or pointers in it. Layout, little
//! endian:
//!
//! ```text
//! deployment u64 | epoch u64 | pass u64 | follows u64
//! dtype u8 | reserved u8 | n_steps u16 | n_sets u16 | n_timings u16 | n_embd u32 | n_rows u32
//! n_steps   x (kind u8, failed u8, reserved u16, slot u32, from u32, n_tokens u32, image u64)
//! n_sets    x (slot u32, keep u32, n_rows u32, n_outputs u32)
//! n_timings x (read_us u32, queue_us u32, compute_us u32, encode_us u32, write_us u32, n_frames u32)
//! n_rows x n_embd x f32
//! ```
//!
//! Every stage takes the frames of a ring in the same order, and of each first the KV steps in their order, then the
//! row sets. So all stages hold the same tokens in the same slots, and nobody needs to ask. Each row set begins with
//! "keep the first `keep` tokens of this slot", so that a rollback, the end of a session and its replacement by
//! another are all the same: a position. A slot may have several sets, which are computed one after the other.
//!
//! A KV step that a stage cannot carry out (its disk is full, an image is gone) is marked as failed and the frame goes
//! on: the coordinator then computes those tokens again. Rows never depend on a step of their own frame that can fail.

use brigade_base::{DeploymentId, Epoch, ImageId, PassId};

use crate::control::{MAX_BATCH_ROWS, MAX_SESSIONS};
use crate::{DecodeError, cap};

/// Bytes before the row sets.
pub const HEADER_BYTES: usize = 48;
const STEP_BYTES: usize = 24;
const SET_BYTES: usize = 16;
const TIMING_BYTES: usize = 24;

/// Most rows of a frame: one full batch and one row of every session.
pub const MAX_FRAME_ROWS: u32 = MAX_BATCH_ROWS + MAX_SESSIONS;

/// Most row sets of a frame: one of each session, and as many again that follow others of the same slot.
pub const MAX_ROW_SETS: u32 = 2 * MAX_SESSIONS;

/// Most KV steps of a frame: each slot may be saved, and then filled from elsewhere, and as many images dropped.
pub const MAX_KV_STEPS: u32 = 3 * MAX_SESSIONS;

/// Most images that a ring keeps: each is an open file on every stage, and systems allow a process at least a
/// thousand.
pub const MAX_IMAGES: usize = 256;

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

/// What happens to the KV cache of a slot before the rows of a pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KvStep {
    /// `slot` becomes a copy of the first `n_tokens` tokens of slot `from`.
    Copy {
        /// The slot that is filled.
        slot: u32,
        /// The slot that is read; never the same.
        from: u32,
        /// Tokens to take; no more than `from` holds.
        n_tokens: u32,
    },
    /// The `n_tokens` tokens of `slot`, all that it holds, are kept outside of memory under a new name. May fail.
    Save {
        /// The slot that is read.
        slot: u32,
        /// Tokens that it holds.
        n_tokens: u32,
        /// The name.
        image: ImageId,
    },
    /// `slot` becomes what was saved. May fail; the slot is then empty.
    Load {
        /// The slot that is filled.
        slot: u32,
        /// Tokens that were saved.
        n_tokens: u32,
        /// The name.
        image: ImageId,
    },
    /// What was saved is not wanted any more.
    Drop {
        /// The name.
        image: ImageId,
    },
}

impl KvStep {
    /// Kind, slot, source, tokens and image as they travel; 0 where a kind has none.
    fn fields(self) -> (u8, u32, u32, u32, u64) {
        match self {
            Self::Copy { slot, from, n_tokens } => (1, slot, from, n_tokens, 0),
            Self::Save { slot, n_tokens, image } => (2, slot, 0, n_tokens, image.0),
            Self::Load { slot, n_tokens, image } => (3, slot, 0, n_tokens, image.0),
            Self::Drop { image } => (4, 0, 0, 0, image.0),
        }
    }

    fn of_fields(kind: u8, slot: u32, from: u32, n_tokens: u32, image: u64) -> Option<Self> {
        let image = ImageId(image);
        match kind {
            1 if slot != from => Some(Self::Copy { slot, from, n_tokens }),
            2 => Some(Self::Save { slot, n_tokens, image }),
            3 => Some(Self::Load { slot, n_tokens, image }),
            4 => Some(Self::Drop { image }),
            _ => None,
        }
    }
}

/// What a stage spent on a pass, in microseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Timing {
    /// From the first byte that was read until the frame was decoded.
    pub read_us: u32,
    /// From then until its computing began: waiting for the frame before it, and for the computing thread to wake.
    pub queue_us: u32,
    /// Computing. Frames that were computed together all carry the time of their batch.
    pub compute_us: u32,
    /// From the end of computing until the next frame was encoded.
    pub encode_us: u32,
    /// Writing. A frame cannot carry the time of its own writing, so this is that of the stage's frame before.
    pub write_us: u32,
    /// Frames that were computed together, this one counted; 0 from a stage that does not say.
    pub n_frames: u32,
}

impl Timing {
    /// All but waiting and computing: what the software costs.
    pub fn software_us(self) -> u32 {
        self.read_us.saturating_add(self.encode_us).saturating_add(self.write_us)
    }

    /// The stage's computing time that falls to this frame alone.
    pub fn share_us(self) -> u32 {
        self.compute_us / self.n_frames.max(1)
    }
}

/// Says which stage a data link leads to and what it carries; the dialer sends it first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Attach {
    /// The deployment.
    pub deployment: DeploymentId,
    /// Its epoch.
    pub epoch: Epoch,
    /// The receiver's stage.
    pub stage: u32,
    /// What comes.
    pub feed: Feed,
}

/// What a data link carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Feed {
    /// Passes to compute and send on.
    Passes,
    /// The same passes for a node that stands by: to compute only.
    Shadow,
    /// What the slots of a stage hold, from a node that leaves, see [`crate::handover`].
    Handover,
}

impl Attach {
    /// Bytes of the message.
    pub const BYTES: usize = 21;

    /// Deployment and epoch as u64, stage as u32, feed as u8; little endian.
    pub fn encode(self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        bytes[..8].copy_from_slice(&self.deployment.0.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.epoch.0.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.stage.to_le_bytes());
        bytes[20] = match self.feed {
            Feed::Passes => 0,
            Feed::Shadow => 1,
            Feed::Handover => 2,
        };
        bytes
    }

    /// Reads a message.
    ///
    /// # Errors
    /// If it has another length or names an unknown feed.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let malformed = |why: String| DecodeError::Malformed { what: "attach", why };
        if bytes.len() != Self::BYTES {
            return Err(malformed(format!("{} bytes instead of {}", bytes.len(), Self::BYTES)));
        }
        let feed = match bytes[20] {
            0 => Feed::Passes,
            1 => Feed::Shadow,
            2 => Feed::Handover,
            other => return Err(malformed(format!("feed {other} is unknown"))),
        };
        let mut fields = Fields(bytes);
        let (deployment, epoch) = (DeploymentId(fields.u64()), Epoch(fields.u64()));
        Ok(Self { deployment, epoch, stage: fields.u32(), feed })
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
    /// The pass before it, as far as it counts: those between were lost with their ring, and nothing builds on them.
    pub follows: PassId,
    /// What happens to KV caches before the rows, and whether a stage could not do it.
    pub steps: Vec<(KvStep, bool)>,
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
        for n in [self.deployment.0, self.epoch.0, self.pass.0, self.follows.0] {
            out.extend_from_slice(&n.to_le_bytes());
        }
        out.extend_from_slice(&[DTYPE_F32, 0]);
        out.extend_from_slice(&(self.steps.len() as u16).to_le_bytes());
        out.extend_from_slice(&(self.sets.len() as u16).to_le_bytes());
        out.extend_from_slice(&(self.timings.len() as u16).to_le_bytes());
        out.extend_from_slice(&self.n_embd.to_le_bytes());
        out.extend_from_slice(&self.n_rows().to_le_bytes());
        for (step, failed) in &self.steps {
            let (kind, slot, from, n_tokens, image) = step.fields();
            out.extend_from_slice(&[kind, u8::from(*failed), 0, 0]);
            for n in [slot, from, n_tokens] {
                out.extend_from_slice(&n.to_le_bytes());
            }
            out.extend_from_slice(&image.to_le_bytes());
        }
        for set in &self.sets {
            for n in [set.slot, set.keep, set.n_rows, set.n_outputs] {
                out.extend_from_slice(&n.to_le_bytes());
            }
        }
        for t in &self.timings {
            for n in [t.read_us, t.queue_us, t.compute_us, t.encode_us, t.write_us, t.n_frames] {
                out.extend_from_slice(&n.to_le_bytes());
            }
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
        self.follows = PassId(fields.u64());
        let [dtype, reserved] = fields.take();
        if dtype != DTYPE_F32 || reserved != 0 {
            return Err(malformed("unknown type of values"));
        }
        let n_steps = u32::from(u16::from_le_bytes(fields.take()));
        let n_sets = u32::from(u16::from_le_bytes(fields.take()));
        let n_timings = u32::from(u16::from_le_bytes(fields.take()));
        self.n_embd = fields.u32();
        let n_rows = fields.u32();
        cap("KV steps", n_steps.into(), MAX_KV_STEPS.into())?;
        cap("row sets", n_sets.into(), MAX_ROW_SETS.into())?;
        cap("stages", n_timings.into(), MAX_STAGES.into())?;
        cap("hidden state", self.n_embd.into(), MAX_N_EMBD.into())?;
        cap("rows", n_rows.into(), MAX_FRAME_ROWS.into())?;
        let sets_end = n_steps as usize * STEP_BYTES + n_sets as usize * SET_BYTES;
        let timings_end = sets_end + n_timings as usize * TIMING_BYTES;
        let values = n_rows as usize * self.n_embd as usize;
        if rest.len() != timings_end + values * 4 {
            return Err(malformed("its length does not match its counts"));
        }
        let mut fields = Fields(&rest[..timings_end]);
        self.decode_steps(&mut fields, n_steps)?;
        self.decode_sets(&mut fields, n_sets, n_rows)?;
        self.timings.clear();
        for _ in 0..n_timings {
            let [read_us, queue_us, compute_us, encode_us, write_us, n_frames] = std::array::from_fn(|_| fields.u32());
            self.timings.push(Timing { read_us, queue_us, compute_us, encode_us, write_us, n_frames });
        }
        rows.clear();
        rows.resize(values, 0.0);
        bytemuck::cast_slice_mut::<f32, u8>(rows).copy_from_slice(&rest[timings_end..]);
        Ok(())
    }

    fn decode_steps(&mut self, fields: &mut Fields<'_>, n_steps: u32) -> Result<(), DecodeError> {
        self.steps.clear();
        for _ in 0..n_steps {
            let [kind, failed, zero, zero_too] = fields.take();
            let [slot, from, n_tokens] = std::array::from_fn(|_| fields.u32());
            let image = fields.u64();
            cap("slot", slot.max(from).into(), (MAX_SESSIONS - 1).into())?;
            match KvStep::of_fields(kind, slot, from, n_tokens, image) {
                Some(step) if failed <= 1 && zero == 0 && zero_too == 0 => self.steps.push((step, failed == 1)),
                _ => {
                    return Err(DecodeError::Malformed { what: "frame", why: format!("unknown KV step {kind}") });
                }
            }
        }
        Ok(())
    }

    fn decode_sets(&mut self, fields: &mut Fields<'_>, n_sets: u32, n_rows: u32) -> Result<(), DecodeError> {
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
            let why = "its row sets do not add up".to_owned();
            return Err(DecodeError::Malformed { what: "frame", why });
        }
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
            follows: PassId(1),
            steps: vec![
                (KvStep::Save { slot: 3, n_tokens: 9, image: ImageId(7) }, false),
                (KvStep::Load { slot: 3, n_tokens: 8, image: ImageId(6) }, true),
                (KvStep::Copy { slot: 2, from: 1, n_tokens: 5 }, false),
                (KvStep::Drop { image: ImageId(5) }, false),
            ],
            sets,
            timings: vec![Timing { compute_us: 9, read_us: 4, n_frames: 2, ..Timing::default() }],
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
        liar[HEADER_BYTES + 4 * STEP_BYTES + 8] = 1;
        assert!(head.decode(&liar, &mut Vec::new()).is_err());
    }

    #[test]
    fn kv_steps_that_make_no_sense_are_refused() {
        let (_, _, bytes) = frame(vec![set(0, 5, 2)], 8);
        for (at, value) in [(0, 0), (0, 9), (1, 2), (2, 1), (7, 1), (2 * STEP_BYTES + 8, 2)] {
            let mut broken = bytes.clone();
            broken[HEADER_BYTES + at] = value;
            let error = FrameHead::default().decode(&broken, &mut Vec::new()).unwrap_err();
            assert!(!error.to_string().is_empty(), "byte {at} = {value}");
        }
    }

    proptest! {
        #[test]
        fn no_bytes_panic_or_allocate_beyond_their_length(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let mut rows = Vec::new();
            let _ = FrameHead::default().decode(&bytes, &mut rows);
            prop_assert!(rows.len() * 4 <= bytes.len());
        }

        #[test]
        fn no_mutation_panics(at in 0usize..300, value: u8) {
            let (_, _, mut bytes) = frame(vec![set(0, 5, 2), set(1, 7, 1)], 4);
            let at = at % bytes.len();
            bytes[at] = value;
            let _ = FrameHead::default().decode(&bytes, &mut Vec::new());
        }
    }
}
