//! What happens to the KV cache of sessions between runs: cut back, copied, saved and restored.
//!
//! - Slots are cut back at once: freed cells are forgotten, their values stay until they are overwritten.
//! - A copy takes effect on positions at once, but its values are copied by the next call of `llama_decode`, before
//!   that computes, in the order of asking, whole streams at a time. So runs and further copies see what they should
//!   whatever is cut, cleared or copied meanwhile: none of that touches values. Saving and restoring do, and
//!   therefore first *settle*: a decode of one row that nobody asked for, in any slot with room. A run that was
//!   refused or failed may have come to an end before the copies; the count of queued ones goes to 0 only behind a
//!   decode that went well.
//! - A saved slot is an *image*: 22 bytes of header ([`ImageHeader`]), then what llama.cpp writes. It fits stages of
//!   the same layers of the same model, loaded with as many sessions, the same types of keys and values, and the same
//!   kind of attention.
//!
//! The stage owns the cache; images belong to the caller, who keeps a hash of each: llama.cpp takes any values for
//! keys, and the header does not protect them.

use brigade_base::{KvType, KvTypes};

use crate::run::RunError;
use crate::stage::Stage;

/// Begins each image; the last byte is the version of the layout, which changes with llama.cpp's.
const IMAGE_MAGIC: [u8; 8] = *b"BrigKV\0\x02";

/// Bytes before the state that llama.cpp writes: magic, types of keys and values, number of tokens, length of the
/// state.
const IMAGE_HEADER_BYTES: usize = 8 + 2 + 4 + 8;

/// The KV cache of a session cannot be changed so.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum KvError {
    /// There is no such slot.
    #[error("slot {slot} does not exist: the stage was loaded with {n_sessions}")]
    UnknownSlot {
        /// The slot.
        slot: u32,
        /// How many there are.
        n_sessions: u32,
    },
    /// The session is shorter.
    #[error("slot {slot} holds {len} tokens, so {n_keep} cannot be kept")]
    TooShort {
        /// The slot.
        slot: u32,
        /// Tokens that it holds.
        len: u32,
        /// Tokens to keep.
        n_keep: u32,
    },
    /// The model has recurrent layers, whose state cannot go back.
    #[error("slot {slot} cannot go back to {n_keep} tokens: the model is recurrent; clear it and replay")]
    NotReversible {
        /// The slot.
        slot: u32,
        /// Tokens to keep.
        n_keep: u32,
    },
    /// A slot cannot be copied to itself.
    #[error("slot {slot} cannot be copied to itself; truncate it instead")]
    SameSlot {
        /// The slot.
        slot: u32,
    },
    /// What llama.cpp saves is not the whole state of this model.
    #[error("a slot of this model cannot be saved: it has sliding-window or recurrent layers; replay the session")]
    NotSavable,
    /// Queued copies need a row of a slot, and none has room.
    #[error("copies wait for the next run, and no slot has room for the row that would make them; truncate a slot")]
    NoRoom,
    /// Queued copies could not be made.
    #[error("copies that waited for the next run could not be made")]
    Settle(#[source] RunError),
    /// llama.cpp did not write the state of a slot.
    #[error("slot {slot} could not be saved: {message}")]
    Save {
        /// The slot.
        slot: u32,
        /// What llama.cpp logged.
        message: String,
    },
    /// What was given is not the image of a slot of this stage.
    #[error("slot {slot} could not be restored ({message}); it is empty now: replay the session")]
    BadImage {
        /// The slot.
        slot: u32,
        /// What is wrong with it.
        message: String,
    },
}

impl Stage {
    /// Forgets all but the first `n_keep` tokens of `slot`.
    ///
    /// # Errors
    /// If there is no such slot, it holds fewer tokens, or the model is recurrent.
    pub fn truncate(&mut self, slot: u32, n_keep: u32) -> Result<(), KvError> {
        let len = self.len_checked(slot)?;
        if n_keep > len {
            return Err(KvError::TooShort { slot, len, n_keep });
        }
        if n_keep < len && !self.context.remove(slot, n_keep) {
            return Err(KvError::NotReversible { slot, n_keep });
        }
        self.lens[slot as usize] = n_keep;
        Ok(())
    }

    /// Forgets all tokens of `slot`.
    ///
    /// # Errors
    /// If there is no such slot.
    pub fn clear(&mut self, slot: u32) -> Result<(), KvError> {
        self.truncate(slot, 0)
    }

    /// Forgets all tokens of all slots.
    pub fn clear_all(&mut self) {
        self.context.clear();
        self.lens.fill(0);
    }

    /// Makes `to`, whatever it held, a copy of the first `n` tokens of slot `from`. It has the same bits as if they
    /// had been computed there.
    ///
    /// The values are copied when the next run begins, all cells of a session however few are used: about as long as
    /// writing [`Stage::kv_bytes_per_token`] times `n_ctx` takes.
    ///
    /// # Errors
    /// If there is no such slot, both are the same, `from` holds fewer tokens, or the model is recurrent. Nothing has
    /// changed then.
    pub fn copy(&mut self, from: u32, to: u32, n: u32) -> Result<(), KvError> {
        let len = self.len_checked(from)?;
        self.len_checked(to)?;
        if from == to {
            return Err(KvError::SameSlot { slot: from });
        }
        if n > len {
            return Err(KvError::TooShort { slot: from, len, n_keep: n });
        }
        if self.model.is_recurrent() {
            return Err(KvError::NotReversible { slot: to, n_keep: n });
        }
        if n == 0 {
            return self.clear(to);
        }
        // One copy for each slot is as much as a caller needs between two runs; without a limit they would pile up
        // while nothing runs.
        if self.context.copies_queued >= self.options.n_sessions {
            self.settle()?;
        }
        self.context.copy(from, to);
        self.lens[to as usize] = len;
        self.truncate(to, n)
    }

    /// Whether [`Stage::truncate`] can keep a part of what a slot holds, and [`Stage::copy`] works. The state of
    /// recurrent layers holds for the last token only.
    pub fn can_rewind(&self) -> bool {
        !self.model.is_recurrent()
    }

    /// Whether [`Stage::save`] and [`Stage::restore`] work. They do not where what llama.cpp saves of a slot is not
    /// all of it: it leaves out what has moved out of a sliding window, which a truncated session needs again; and
    /// the state of recurrent layers holds for the last token only.
    pub fn can_save(&self) -> bool {
        self.context.has_memory && !self.model.has_window() && !self.model.is_recurrent()
    }

    /// Writes an image of `slot` to `out`, which is overwritten: [`Stage::kv_bytes_per_token`] for each token, and
    /// some kilobytes.
    ///
    /// # Errors
    /// If there is no such slot, the model's slots cannot be saved, or queued copies cannot be made; `out` is then
    /// empty.
    pub fn save(&mut self, slot: u32, out: &mut Vec<u8>) -> Result<(), KvError> {
        out.clear();
        let n_tokens = self.len_checked(slot)?;
        if !self.can_save() {
            return Err(KvError::NotSavable);
        }
        self.settle()?;
        out.resize(IMAGE_HEADER_BYTES, 0);
        let (saved, captured) = crate::backend::capture(|| self.context.save(slot, out));
        if !saved {
            out.clear();
            return Err(KvError::Save { slot, message: captured.message() });
        }
        let n_bytes = (out.len() - IMAGE_HEADER_BYTES) as u64;
        out[..IMAGE_HEADER_BYTES].copy_from_slice(&ImageHeader { kv: self.options.kv, n_tokens, n_bytes }.encode());
        Ok(())
    }

    /// Gives `slot`, whatever it held, the `n` tokens of an image. It has the same bits as the slot that was saved.
    ///
    /// # Errors
    /// If there is no such slot, the model's slots cannot be saved, or queued copies cannot be made: nothing has
    /// changed then. If it is no image of `n` tokens for this stage, the slot is empty.
    pub fn restore(&mut self, slot: u32, image: &[u8], n: u32) -> Result<(), KvError> {
        self.len_checked(slot)?;
        if !self.can_save() {
            return Err(KvError::NotSavable);
        }
        self.settle()?;
        self.clear(slot)?;
        let bad = |message: String| KvError::BadImage { slot, message };
        let state = state_of(image, self.options.kv, n).map_err(|message| bad(message.to_owned()))?;
        if n > self.options.n_ctx {
            return Err(bad(format!("it holds {n} tokens, but a session at most {}", self.options.n_ctx)));
        }
        let (restored, captured) = crate::backend::capture(|| self.context.restore(slot, state));
        let expected = if n == 0 { (-1, -1) } else { (0, n as i32 - 1) };
        let found = self.context.positions(slot);
        if restored && found == expected {
            self.lens[slot as usize] = n;
            return Ok(());
        }
        self.context.remove(slot, 0);
        Err(bad(if restored {
            format!("it has positions {found:?} instead of {expected:?}")
        } else {
            captured.message()
        }))
    }

    /// Bytes of KV cache that a token takes, rounded down; recurrent states count as if they were cells.
    pub fn kv_bytes_per_token(&self) -> u64 {
        self.memory().kv / self.options.n_cells()
    }

    /// Makes the copies that wait for the next run, by computing a row that is forgotten at once.
    fn settle(&mut self) -> Result<(), KvError> {
        if self.context.copies_queued == 0 {
            return Ok(());
        }
        let slot = self.lens.iter().position(|&len| len < self.options.n_ctx).ok_or(KvError::NoRoom)?;
        self.decode_filler(slot as u32).map_err(KvError::Settle)
    }

    fn len_checked(&self, slot: u32) -> Result<u32, KvError> {
        let n_sessions = self.options.n_sessions;
        self.lens.get(slot as usize).copied().ok_or(KvError::UnknownSlot { slot, n_sessions })
    }
}

/// What an image begins with, little endian: magic, a byte each for the types of keys and of values, `n_tokens`,
/// `n_bytes`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct ImageHeader {
    kv: KvTypes,
    n_tokens: u32,
    /// Bytes behind the header.
    n_bytes: u64,
}

impl ImageHeader {
    fn encode(self) -> [u8; IMAGE_HEADER_BYTES] {
        let mut bytes = [0; IMAGE_HEADER_BYTES];
        bytes[..8].copy_from_slice(&IMAGE_MAGIC);
        bytes[8..10].copy_from_slice(&[self.kv.k, self.kv.v].map(type_byte));
        bytes[10..14].copy_from_slice(&self.n_tokens.to_le_bytes());
        bytes[14..].copy_from_slice(&self.n_bytes.to_le_bytes());
        bytes
    }
}

/// How a type is named in an image.
fn type_byte(ty: KvType) -> u8 {
    match ty {
        KvType::F16 => 0,
        KvType::Q8_0 => 1,
        KvType::Q4_0 => 2,
    }
}

/// The state in an image of `n` tokens. There is one header that fits, so nothing is parsed.
fn state_of(image: &[u8], kv: KvTypes, n: u32) -> Result<&[u8], &'static str> {
    let (header, state) = image.split_at_checked(IMAGE_HEADER_BYTES).ok_or("it is shorter than its header")?;
    let expected = ImageHeader { kv, n_tokens: n, n_bytes: state.len() as u64 }.encode();
    if header[..8] != expected[..8] {
        Err("it was not written by this version")
    } else if header[8..10] != expected[8..10] {
        Err("its keys or values are stored in another type")
    } else if header[10..14] != expected[10..14] {
        Err("it holds another number of tokens")
    } else if header != expected {
        Err("it is cut off or has bytes too many")
    } else {
        Ok(state)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_right_header_is_taken() {
        let kv = KvTypes { k: KvType::Q8_0, v: KvType::F16 };
        let image = [&ImageHeader { kv, n_tokens: 7, n_bytes: 3 }.encode()[..], b"abc"].concat();
        assert_eq!(state_of(&image, kv, 7), Ok(&b"abc"[..]));
        assert!(state_of(&image, kv, 8).is_err());
        assert!(state_of(&image, KvTypes::default(), 7).is_err_and(|why| why.contains("another type")));
        for len in 0..image.len() {
            assert!(state_of(&image[..len], kv, 7).is_err(), "{len} bytes");
        }
        assert!(state_of(&[&image[..], b"d"].concat(), kv, 7).is_err());
        for bit in 0..IMAGE_HEADER_BYTES * 8 {
            let mut image = image.clone();
            image[bit / 8] ^= 1 << (bit % 8);
            assert!(state_of(&image, kv, 7).is_err(), "bit {bit}");
        }
    }
}
