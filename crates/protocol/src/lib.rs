//! What nodes say to each other, and the state machines that decide what to say; without I/O.
//!
//! - [`control`]: messages between the coordinator and a worker, on the control link.
//! - [`frame`]: a pass on one link, from stage to stage.
//! - [`handover`]: what the slots of a stage hold, from a node that leaves to its successor.
//! - [`weights`]: tensors asked for and sent, on links of their own.
//! - [`requests`]: requests and answers between a node that answers HTTP and the coordinator.
//! - [`council`]: who coordinates, over losses and partitions.
//! - [`cluster`]: who is here, and what is placed where. Events in, actions out.
//! - [`worker`]: the stages that a node holds for a coordinator. Events in, actions out.
//! - [`schedule`]: which rows of which sessions travel in the next pass, and what has come back.
//!
//! Time is an argument everywhere and nothing here is random, so every state can be reached again in a test.

pub mod cluster;
pub mod control;
pub mod council;
pub mod frame;
pub mod handover;
pub mod measure;
pub mod requests;
pub mod schedule;
pub mod weights;
pub mod worker;

/// Kinds of frames on a link; the first byte that a reader looks at.
pub mod kind {
    /// A [`crate::control::ToWorker`] or [`crate::control::ToCoordinator`].
    pub const CONTROL: u8 = 0x10;
    /// A [`crate::frame::Frame`].
    pub const FRAME: u8 = 0x20;
    /// A [`crate::frame::Attach`]: the first frame on a data link.
    pub const ATTACH: u8 = 0x21;
    /// A [`crate::handover::Slot`].
    pub const HANDOVER_SLOT: u8 = 0x22;
    /// A piece of a slot's image.
    pub const HANDOVER_PIECE: u8 = 0x23;
    /// A [`crate::handover::End`].
    pub const HANDOVER_END: u8 = 0x24;
    /// All of a hand-over is taken; no payload.
    pub const HANDOVER_TAKEN: u8 = 0x25;
    /// A [`crate::weights::Fetch`].
    pub const FETCH: u8 = 0x30;
    /// A piece of a tensor.
    pub const CHUNK: u8 = 0x31;
    /// What was asked for cannot be sent; the payload says why.
    pub const FETCH_FAILED: u8 = 0x32;
    /// Hashes of tensors: which of them are there?
    pub const HAVE: u8 = 0x33;
    /// A bit for each.
    pub const HAVE_ANSWER: u8 = 0x34;
    /// The hash of a tensor: which blocks does it have?
    pub const TREE: u8 = 0x35;
    /// A hash for each block.
    pub const TREE_ANSWER: u8 = 0x36;
    /// A [`crate::requests::FromGateway`] or [`crate::requests::ToGateway`].
    pub const REQUESTS: u8 = 0x40;
    /// A [`crate::council::CouncilMessage`].
    pub const COUNCIL: u8 = 0x41;
    /// Bytes to measure the link with; the first four say how many are wanted back.
    pub const PROBE: u8 = 0x50;
    /// The answer to them: so many bytes.
    pub const PROBE_BACK: u8 = 0x51;
}

/// A message could not be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// The bytes are no message of this version.
    #[error("malformed {what}: {why}")]
    Malformed {
        /// Which message.
        what: &'static str,
        /// What is wrong with it.
        why: String,
    },
    /// A number in it is beyond its cap.
    #[error("{what} of {found} is beyond the limit of {limit}")]
    TooMany {
        /// What is counted.
        what: &'static str,
        /// How many are claimed.
        found: u64,
        /// How many are allowed.
        limit: u64,
    },
}

/// Fails unless `found <= limit`.
pub(crate) fn cap(what: &'static str, found: u64, limit: u64) -> Result<(), DecodeError> {
    if found <= limit { Ok(()) } else { Err(DecodeError::TooMany { what, found, limit }) }
}
