//! What the slots of a stage hold, on its way from a node that leaves to the one that serves the stage from now on.
//!
//! ```text
//! leaver                          successor
//!   Slot ------------------------->        once for each slot that holds tokens,
//!   PIECE ... -------------------->        its image in pieces
//!   End -------------------------->
//!   <------------------------- TAKEN       the slots are filled; the leaver may free the stage
//! ```
//!
//! An image is what the engine saves of a slot, and means something only to a stage of the same layers of the same
//! model. A stage that can save nothing sends an [`End`] alone, with pass 0. Integers are little endian.
//!
//! [`Intake`] is the successor's side without I/O: kinds and payloads in, whole images out. It owns the image that is
//! on its way.

use brigade_base::PassId;

use crate::control::MAX_SESSIONS;
use crate::{DecodeError, cap, kind};

/// Most bytes of a piece: large enough that headers cost nothing, small enough that a link is never held for long.
pub const PIECE_BYTES: usize = 4 << 20;

/// What an image may have beyond its slot's share of the KV cache: positions and headers, some bytes for each token
/// (16 were seen), and some for each layer.
pub const IMAGE_SLACK_BYTES: u64 = 1 << 20;

/// Begins the image of a slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Slot {
    /// The slot.
    pub slot: u32,
    /// Tokens that it holds.
    pub n_tokens: u32,
    /// Bytes of its image, which follow in pieces.
    pub n_bytes: u64,
}

impl Slot {
    /// Bytes of the message.
    pub const BYTES: usize = 16;

    /// Slot and tokens as u32, bytes as u64.
    pub fn encode(self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        bytes[..4].copy_from_slice(&self.slot.to_le_bytes());
        bytes[4..8].copy_from_slice(&self.n_tokens.to_le_bytes());
        bytes[8..].copy_from_slice(&self.n_bytes.to_le_bytes());
        bytes
    }

    fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let bytes: &[u8; Self::BYTES] = bytes.try_into().map_err(|_| malformed("a slot has another length"))?;
        let word = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let n_bytes = u64::from(word(8)) | u64::from(word(12)) << 32;
        Ok(Self { slot: word(0), n_tokens: word(4), n_bytes })
    }
}

/// Ends a hand-over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct End {
    /// The last pass that the slots have applied; 0 if nothing was sent.
    pub applied: PassId,
}

impl End {
    /// Bytes of the message.
    pub const BYTES: usize = 8;

    /// The pass as u64.
    pub fn encode(self) -> [u8; Self::BYTES] {
        self.applied.0.to_le_bytes()
    }

    fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let bytes: [u8; Self::BYTES] = bytes.try_into().map_err(|_| malformed("an end has another length"))?;
        Ok(Self { applied: PassId(u64::from_le_bytes(bytes)) })
    }
}

/// What a successor's stage has room for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Room {
    /// Its slots.
    pub n_slots: u32,
    /// Tokens of one slot.
    pub context: u32,
    /// Bytes of one slot's KV cache.
    pub slot_bytes: u64,
}

/// What a message has completed.
#[derive(Debug, PartialEq, Eq)]
pub enum Taken<'a> {
    /// Nothing yet.
    More,
    /// The image of a slot.
    Slot {
        /// The slot.
        slot: u32,
        /// Tokens in it.
        n_tokens: u32,
        /// The image.
        image: &'a [u8],
    },
    /// All of it.
    End(End),
}

/// Takes the messages of a hand-over, of which each slot may come once.
#[derive(Debug)]
pub struct Intake {
    room: Room,
    came: [bool; MAX_SESSIONS as usize],
    /// The slot whose image is not whole yet.
    current: Option<Slot>,
    image: Vec<u8>,
}

impl Intake {
    /// For a stage with so much room.
    pub fn new(room: Room) -> Self {
        Self { room, came: [false; MAX_SESSIONS as usize], current: None, image: Vec::new() }
    }

    /// Takes one message.
    ///
    /// # Errors
    /// If it makes no sense here, or the stage has no room for it.
    pub fn take(&mut self, message: u8, bytes: &[u8]) -> Result<Taken<'_>, DecodeError> {
        match (message, self.current) {
            (kind::HANDOVER_SLOT, None) => {
                let slot = Slot::decode(bytes)?;
                self.begin(slot)?;
                Ok(Taken::More)
            }
            (kind::HANDOVER_PIECE, Some(slot)) => {
                let left = slot.n_bytes - self.image.len() as u64;
                cap("piece of an image", bytes.len() as u64, left.min(PIECE_BYTES as u64))?;
                if bytes.is_empty() {
                    return Err(malformed("a piece is empty"));
                }
                self.image.extend_from_slice(bytes);
                if left > bytes.len() as u64 {
                    return Ok(Taken::More);
                }
                self.current = None;
                Ok(Taken::Slot { slot: slot.slot, n_tokens: slot.n_tokens, image: &self.image })
            }
            (kind::HANDOVER_END, None) => Ok(Taken::End(End::decode(bytes)?)),
            (kind::HANDOVER_SLOT | kind::HANDOVER_END, Some(_)) => Err(malformed("an image is cut off")),
            (kind::HANDOVER_PIECE, None) => Err(malformed("a piece is of no slot")),
            (other, _) => Err(malformed(&format!("a message of kind {other:#x} is none of a hand-over"))),
        }
    }

    fn begin(&mut self, slot: Slot) -> Result<(), DecodeError> {
        cap("number of slots", u64::from(slot.slot) + 1, self.room.n_slots.min(MAX_SESSIONS).into())?;
        cap("tokens of a slot", slot.n_tokens.into(), self.room.context.into())?;
        cap("image of a slot", slot.n_bytes, self.room.slot_bytes.saturating_add(IMAGE_SLACK_BYTES))?;
        if slot.n_tokens == 0 || slot.n_bytes == 0 {
            return Err(malformed("an empty slot was sent"));
        }
        if std::mem::replace(&mut self.came[slot.slot as usize], true) {
            return Err(malformed("a slot came twice"));
        }
        // What is announced is not believed: memory is taken as pieces come.
        self.image.clear();
        self.current = Some(slot);
        Ok(())
    }
}

fn malformed(why: &str) -> DecodeError {
    DecodeError::Malformed { what: "hand-over", why: why.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const ROOM: Room = Room { n_slots: 4, context: 100, slot_bytes: 10 };

    fn slot(slot: u32, n_tokens: u32, n_bytes: u64) -> (u8, Vec<u8>) {
        (kind::HANDOVER_SLOT, Slot { slot, n_tokens, n_bytes }.encode().to_vec())
    }

    fn piece(bytes: &[u8]) -> (u8, Vec<u8>) {
        (kind::HANDOVER_PIECE, bytes.to_vec())
    }

    fn end(applied: u64) -> (u8, Vec<u8>) {
        (kind::HANDOVER_END, End { applied: PassId(applied) }.encode().to_vec())
    }

    /// Takes all messages; what the last one gave.
    fn take(messages: &[(u8, Vec<u8>)]) -> Result<String, DecodeError> {
        let mut intake = Intake::new(ROOM);
        let mut last = String::new();
        for (kind, bytes) in messages {
            last = format!("{:?}", intake.take(*kind, bytes)?);
        }
        Ok(last)
    }

    #[test]
    fn images_come_whole_and_then_the_end() {
        let mut messages = vec![slot(2, 7, 5), piece(b"abc"), piece(b"de")];
        let whole = Taken::Slot { slot: 2, n_tokens: 7, image: b"abcde" };
        assert_eq!(take(&messages), Ok(format!("{whole:?}")));
        messages.extend([slot(0, 1, 1), piece(b"x"), end(9)]);
        assert_eq!(take(&messages), Ok(format!("{:?}", Taken::End(End { applied: PassId(9) }))));
        assert!(take(&[end(0)]).is_ok(), "nothing to hand over");
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        let check = |messages: &[(u8, Vec<u8>)], says: &str| {
            let error = take(messages).unwrap_err().to_string();
            assert!(error.contains(says), "{error}");
        };
        check(&[slot(4, 7, 5)], "slots of 5");
        check(&[slot(0, 101, 5)], "limit of 100");
        check(&[slot(0, 7, 11 + IMAGE_SLACK_BYTES)], "image of a slot");
        check(&[slot(0, 0, 5)], "empty slot");
        check(&[slot(0, 7, 0)], "empty slot");
        check(&[slot(0, 7, 5), end(1)], "cut off");
        check(&[slot(0, 7, 5), slot(1, 7, 5)], "cut off");
        check(&[slot(0, 7, 1), piece(b"a"), slot(0, 7, 1)], "twice");
        check(&[slot(0, 7, 1), piece(b"ab")], "limit of 1");
        check(&[slot(0, 7, 1), piece(b"")], "empty");
        check(&[piece(b"ab")], "no slot");
        check(&[(kind::FRAME, vec![])], "0x20");
        check(&[(kind::HANDOVER_SLOT, vec![0; 15])], "another length");
        check(&[(kind::HANDOVER_END, vec![0; 9])], "another length");
    }

    #[test]
    fn a_stage_without_slots_takes_none() {
        let mut intake = Intake::new(Room { n_slots: 0, ..ROOM });
        let (kind, bytes) = slot(0, 7, 5);
        assert!(intake.take(kind, &bytes).is_err());
    }

    proptest! {
        #[test]
        fn no_bytes_panic(
            messages in prop::collection::vec((0x20u8..0x27, prop::collection::vec(any::<u8>(), 0..20)), 0..9),
        ) {
            let _ = take(&messages);
        }
    }
}
