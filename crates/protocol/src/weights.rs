//! Tensors asked for and sent.
//!
//! A worker asks with a [`Fetch`] for the rest of one tensor; the coordinator answers with chunks until its end, or
//! with `FETCH_FAILED`. The worker knows length and hash from the deployment, so chunks carry nothing but bytes.

use crate::DecodeError;

/// Most bytes of one chunk: large enough that framing costs nothing, small enough to report progress and to be
/// buffered on both sides of a slow link.
pub const CHUNK_BYTES: usize = 1 << 20;

/// Asks for a tensor from `offset` to its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fetch {
    /// Index of the tensor in the model's catalog.
    pub tensor: u32,
    /// First byte wanted, within the tensor.
    pub offset: u64,
}

impl Fetch {
    /// The message: tensor as u32, offset as u64, little endian.
    pub fn encode(self) -> [u8; 12] {
        let mut bytes = [0; 12];
        bytes[..4].copy_from_slice(&self.tensor.to_le_bytes());
        bytes[4..].copy_from_slice(&self.offset.to_le_bytes());
        bytes
    }

    /// Reads a message.
    ///
    /// # Errors
    /// If it has another length.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let malformed =
            || DecodeError::Malformed { what: "fetch", why: format!("{} bytes instead of 12", bytes.len()) };
        let (tensor, offset) = bytes.split_first_chunk::<4>().ok_or_else(malformed)?;
        let offset: [u8; 8] = offset.try_into().map_err(|_| malformed())?;
        Ok(Self { tensor: u32::from_le_bytes(*tensor), offset: u64::from_le_bytes(offset) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fetch_survives_the_wire() {
        let fetch = Fetch { tensor: 7, offset: 1 << 40 };
        assert_eq!(Fetch::decode(&fetch.encode()), Ok(fetch));
        assert!(Fetch::decode(&[0; 11]).is_err());
        assert!(Fetch::decode(&[0; 13]).is_err());
    }
}
