//! Tensors asked for and sent, on links of their own.
//!
//! ```text
//! taker                              source
//!   HAVE hashes ------------------->           which of these do you have?
//!   <------------------- HAVE_ANSWER           a bit for each
//!   TREE hash --------------------->           how is this tensor made of blocks?
//!   <------------------- TREE_ANSWER           a hash for each block
//!   FETCH hash, offset, n --------->           several may be on their way
//!   <--------------------- CHUNK ...           n bytes in pieces
//!   <------------------ FETCH_FAILED           or why not; answers TREE as well
//! ```
//!
//! A tensor is named by the BLAKE3 hash of its bytes, which the taker knows from its coordinator. So a source needs to
//! know nothing of models, and the taker need not trust it: BLAKE3 is a tree over blocks, so each block is verified by
//! itself as it comes ([`BLOCK_BYTES`]). Answers come in the order of the questions. Integers are little endian.
//!
//! [`Sources`] is what the coordinator tells a worker on the control link: whom it may ask.

use brigade_base::Hash;
use serde::{Deserialize, Serialize};

use crate::control::{Peer, check_addresses};
use crate::{DecodeError, cap};

/// Bytes of a block, the unit that is fetched, verified and refused: a subtree of BLAKE3, so a power of two of its
/// 1024-byte chunks. Large enough that a question for each costs nothing; small enough that one from a slow source is
/// had again quickly from another one.
pub const BLOCK_BYTES: u64 = 1 << 20;

/// Most bytes of one chunk: a few milliseconds of a fast link, so that a source can pause between two.
pub const PIECE_BYTES: usize = 256 << 10;

/// Most hashes in one question. The largest known stages have some thousand tensors.
pub const MAX_ASKED: usize = 4096;

/// Most blocks of a tensor: 64 GiB. The largest known tensors, experts of one layer, have a tenth of it.
pub const MAX_BLOCKS: usize = 1 << 16;

/// Largest frame on a link for weights: the hashes of all blocks.
pub const MAX_WEIGHTS_FRAME: usize = 32 * MAX_BLOCKS;

/// Most nodes that a worker is told it may ask.
pub const MAX_SOURCES: usize = 64;

/// Most files of a model on a hub.
pub const MAX_REMOTE_FILES: usize = 512;

/// Longest URL or entity tag.
const MAX_URL: u64 = 2048;

/// Asks for a part of a tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fetch {
    /// The tensor.
    pub hash: Hash,
    /// First byte wanted, within the tensor.
    pub offset: u64,
    /// Bytes wanted; 1 to [`BLOCK_BYTES`].
    pub n_bytes: u32,
}

impl Fetch {
    /// Bytes of the message.
    pub const BYTES: usize = 44;

    /// The message: hash, offset as u64, bytes as u32.
    pub fn encode(&self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        bytes[..32].copy_from_slice(self.hash.as_bytes());
        bytes[32..40].copy_from_slice(&self.offset.to_le_bytes());
        bytes[40..].copy_from_slice(&self.n_bytes.to_le_bytes());
        bytes
    }

    /// Reads a message.
    ///
    /// # Errors
    /// If it has another length, or asks for nothing or for more than a block.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let malformed = || malformed(format!("a question for bytes has {} bytes instead of 44", bytes.len()));
        let (hash, rest) = bytes.split_first_chunk::<32>().ok_or_else(malformed)?;
        let (offset, n_bytes) = rest.split_first_chunk::<8>().ok_or_else(malformed)?;
        let n_bytes = u32::from_le_bytes(n_bytes.try_into().map_err(|_| malformed())?);
        cap("bytes asked for", n_bytes.into(), BLOCK_BYTES)?;
        if n_bytes == 0 {
            return Err(self::malformed("no bytes were asked for".to_owned()));
        }
        Ok(Self { hash: Hash::from_bytes(*hash), offset: u64::from_le_bytes(*offset), n_bytes })
    }
}

/// Hashes as bytes, one after the other: the payload of `HAVE`, `TREE` and `TREE_ANSWER`.
pub fn encode_hashes(hashes: &[Hash]) -> Vec<u8> {
    hashes.iter().flat_map(|hash| *hash.as_bytes()).collect()
}

/// Reads hashes, at most `most`.
///
/// # Errors
/// If there are more, or the last one is cut off.
pub fn decode_hashes(bytes: &[u8], most: usize) -> Result<Vec<Hash>, DecodeError> {
    let (hashes, rest) = bytes.as_chunks::<32>();
    cap("number of hashes", hashes.len() as u64, most as u64)?;
    match rest.is_empty() {
        true => Ok(hashes.iter().map(|hash| Hash::from_bytes(*hash)).collect()),
        false => Err(malformed("a hash is cut off".to_owned())),
    }
}

/// The answer to `HAVE`: a bit for each hash, the first one lowest.
pub fn encode_bits(bits: impl ExactSizeIterator<Item = bool>) -> Vec<u8> {
    let mut bytes = vec![0; bits.len().div_ceil(8)];
    for (at, _) in bits.enumerate().filter(|(_, bit)| *bit) {
        bytes[at / 8] |= 1 << (at % 8);
    }
    bytes
}

/// Reads `n` bits.
///
/// # Errors
/// If there is another number of them.
pub fn decode_bits(bytes: &[u8], n: usize) -> Result<Vec<bool>, DecodeError> {
    if bytes.len() != n.div_ceil(8) {
        return Err(malformed(format!("{} bytes answer a question for {n} tensors", bytes.len())));
    }
    Ok((0..n).map(|at| bytes[at / 8] >> (at % 8) & 1 == 1).collect())
}

/// Where a worker may take weights from, beside its coordinator. Replaces what was told before.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Sources {
    /// Other nodes of the cluster. What they have they say themselves.
    pub peers: Vec<Peer>,
    /// The hub from which the model came, if this worker may ask it.
    pub hub: Option<Hub>,
}

/// A model on a server that answers range requests without credentials.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hub {
    /// Its files.
    pub files: Vec<HubFile>,
    /// The tensors that this worker may fetch from there. No other worker may: each byte is to come once.
    pub tensors: Vec<HubTensor>,
    /// Whether to ask at once, and not only where that is faster than other nodes, or nobody else has a tensor.
    pub at_once: bool,
}

/// A file on a hub.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HubFile {
    /// Where it is.
    pub url: String,
    /// Its length.
    pub n_bytes: u64,
    /// What the server calls this state of it; another one would be another file.
    pub etag: Option<String>,
}

/// Where a tensor lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct HubTensor {
    /// The tensor.
    pub hash: Hash,
    /// Which of the files.
    pub file: u16,
    /// Its first byte there.
    pub offset: u64,
}

/// Bytes of weights, by where a node had them from; since it started.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct WeightBytes {
    /// Its own copy of the model.
    pub own_copy: u64,
    /// What it had kept from before.
    pub cache: u64,
    /// The coordinator.
    pub coordinator: u64,
    /// Other workers.
    pub workers: u64,
    /// The hub.
    pub hub: u64,
    /// What it sent to other nodes.
    pub served: u64,
}

impl Sources {
    /// Whether a worker takes it.
    ///
    /// # Errors
    /// If something in it is longer than is allowed, or lies outside of its file.
    pub fn check(&self) -> Result<(), DecodeError> {
        cap("number of sources", self.peers.len() as u64, MAX_SOURCES as u64)?;
        self.peers.iter().try_for_each(|peer| check_addresses(&peer.addresses))?;
        self.hub.as_ref().map_or(Ok(()), Hub::check)
    }
}

impl Hub {
    fn check(&self) -> Result<(), DecodeError> {
        cap("number of files", self.files.len() as u64, MAX_REMOTE_FILES as u64)?;
        for file in &self.files {
            cap("length of a URL", file.url.len() as u64, MAX_URL)?;
            cap("length of an entity tag", file.etag.as_ref().map_or(0, String::len) as u64, MAX_URL)?;
        }
        let is_inside = |tensor: &HubTensor| {
            self.files.get(usize::from(tensor.file)).is_some_and(|file| tensor.offset < file.n_bytes)
        };
        match self.tensors.iter().all(is_inside) {
            true => Ok(()),
            false => Err(malformed("a tensor lies outside of its file".to_owned())),
        }
    }
}

fn malformed(why: String) -> DecodeError {
    DecodeError::Malformed { what: "message about weights", why }
}

#[cfg(test)]
mod tests {
    use brigade_base::NodeId;
    use proptest::prelude::*;

    use super::*;
    use crate::control::ToWorker;

    const HASH: Hash = Hash::from_bytes([7; 32]);

    #[test]
    fn a_fetch_survives_the_wire_and_asks_for_a_block_at_most() {
        let fetch = Fetch { hash: HASH, offset: 1 << 40, n_bytes: BLOCK_BYTES as u32 };
        assert_eq!(Fetch::decode(&fetch.encode()), Ok(fetch));
        assert!(Fetch::decode(&[1; 43]).is_err() && Fetch::decode(&[1; 45]).is_err());
        for n_bytes in [0, BLOCK_BYTES as u32 + 1] {
            assert!(Fetch::decode(&Fetch { n_bytes, ..fetch }.encode()).is_err());
        }
    }

    #[test]
    fn hashes_and_bits_are_as_many_as_were_asked_for() {
        let hashes = [HASH, Hash::from_bytes([8; 32])];
        assert_eq!(decode_hashes(&encode_hashes(&hashes), 2), Ok(hashes.to_vec()));
        assert!(decode_hashes(&encode_hashes(&hashes), 1).is_err());
        assert!(decode_hashes(&[0; 33], 2).is_err());
        for n in [0, 1, 8, 9, 17] {
            let bits: Vec<bool> = (0..n).map(|at| at % 3 == 0).collect();
            assert_eq!(decode_bits(&encode_bits(bits.iter().copied()), n), Ok(bits));
        }
        assert!(decode_bits(&[0; 2], 8).is_err());
    }

    #[test]
    fn what_is_told_of_sources_is_bounded() {
        let peer = Peer { node: NodeId::from_bytes([1; 32]), addresses: vec!["10.0.0.1:7".into()] };
        let file = HubFile { url: "https://hub/m.gguf".into(), n_bytes: 100, etag: None };
        let tensor = HubTensor { hash: HASH, file: 0, offset: 99 };
        let hub = Hub { files: vec![file.clone()], tensors: vec![tensor], at_once: false };
        let told = |sources: Sources| {
            let message = ToWorker::Sources(Box::new(sources));
            ToWorker::decode(&message.encode()).map(|decoded| assert_eq!(decoded, message))
        };
        let good = Sources { peers: vec![peer.clone()], hub: Some(hub.clone()) };
        assert_eq!(told(good.clone()), Ok(()));
        assert!(told(Sources { peers: vec![peer; MAX_SOURCES + 1], ..good.clone() }).is_err());
        let with = |hub| told(Sources { hub: Some(hub), ..good.clone() });
        assert!(with(Hub { tensors: vec![HubTensor { offset: 100, ..tensor }], ..hub.clone() }).is_err());
        assert!(with(Hub { tensors: vec![HubTensor { file: 1, ..tensor }], ..hub.clone() }).is_err());
        let long = HubFile { url: "x".repeat(2049), ..file };
        assert!(with(Hub { files: vec![long], ..hub }).is_err());
    }

    proptest! {
        #[test]
        fn no_bytes_panic(bytes in prop::collection::vec(any::<u8>(), 0..100), n in 0usize..900) {
            let _ = (Fetch::decode(&bytes), decode_hashes(&bytes, 2), decode_bits(&bytes, n));
        }
    }
}
