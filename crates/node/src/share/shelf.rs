//! What a node has of models, and gives to others that may have it.
//!
//! Each link is served on the thread that it came with: one question at a time, in pieces, so that a node that serves
//! holds a block for each link at most. Nothing of it runs on a thread that computes. While passes go through this node
//! it pauses after each piece for as long as sending it took, and its sockets give way to those of frames.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use brigade_base::{Hash, NodeId};
use brigade_gguf::{Catalog, ModelFile, TensorSource};
use brigade_net::{Link, LinkError, Refusal, TcpLink};
use brigade_protocol::kind;
use brigade_protocol::weights::{BLOCK_BYTES, Fetch, MAX_ASKED, MAX_BLOCKS, PIECE_BYTES, decode_hashes};
use brigade_protocol::weights::{encode_bits, encode_hashes};

use super::Tally;
use super::tree::{Tree, Trees, block_range, block_value, n_blocks};
use crate::cache::Cache;
use crate::threads::lock;

/// Links that are served at once. Each has a thread and 256 KiB; twice as many nodes as a home has.
const MAX_LINKS: usize = 32;

/// Links of one node: one for each stage that it loads, and one that has not ended yet.
const MAX_LINKS_OF_NODE: usize = 2;

/// A link that asks nothing for so long ends. Whoever loads a stage asks every second, but for the time in which it
/// waits for other sources.
const IDLE: Duration = Duration::from_secs(60);

/// Longest pause between two pieces while passes go through this node.
const MAX_PAUSE: Duration = Duration::from_millis(100);

/// A whole copy of a model.
#[derive(Debug, Clone)]
pub struct OwnCopy {
    /// The file.
    pub file: Arc<ModelFile>,
    /// The hash of each tensor, as they were when it was opened.
    pub hashes: Vec<Hash>,
    /// What the model with this node's adapters is known by.
    pub served_hash: Hash,
}

/// Tensors that are not in the cache: of an own copy, or of whatever else has bytes under an index.
pub struct Stock {
    source: Arc<dyn TensorSource>,
    /// Index and length of each tensor, by its hash.
    by_hash: HashMap<Hash, (usize, u64)>,
}

impl Stock {
    /// The tensors of a catalog, whose bytes `source` has and whose hashes are these, in the catalog's order.
    pub fn new(source: Arc<dyn TensorSource>, catalog: &Catalog, hashes: &[Hash]) -> Self {
        let tensors = catalog.tensors().iter().zip(hashes).enumerate();
        let by_hash = tensors.map(|(idx, (tensor, hash))| (*hash, (idx, tensor.n_bytes))).collect();
        Self { source, by_hash }
    }
}

impl From<&OwnCopy> for Stock {
    fn from(own: &OwnCopy) -> Self {
        Self::new(Arc::clone(&own.file) as Arc<dyn TensorSource>, own.file.catalog(), &own.hashes)
    }
}

/// What a node has, and gives.
pub struct Shelf {
    stocks: Vec<Stock>,
    cache: Option<Arc<Cache>>,
    trees: Arc<Trees>,
    tally: Arc<Tally>,
    /// Whether passes go through this node now.
    is_busy: Box<dyn Fn() -> bool + Send + Sync>,
    /// Whose links are served now.
    guests: Mutex<Vec<NodeId>>,
}

/// A tensor that is here.
enum Tensor<'a> {
    Stocked(&'a dyn TensorSource, usize, u64),
    Cached(File),
}

impl Tensor<'_> {
    fn n_bytes(&self) -> io::Result<u64> {
        match self {
            Self::Stocked(_, _, n_bytes) => Ok(*n_bytes),
            Self::Cached(file) => Ok(file.metadata()?.len()),
        }
    }

    fn read(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        match self {
            Self::Stocked(_, _, n_bytes) if offset.saturating_add(buf.len() as u64) > *n_bytes => {
                Err(io::ErrorKind::UnexpectedEof.into())
            }
            Self::Stocked(source, idx, _) => source.read_tensor(*idx, offset, buf),
            Self::Cached(file) => file.read_exact_at(buf, offset),
        }
    }
}

impl Shelf {
    /// What a node has; `is_busy` says whether passes go through it.
    pub fn new(
        stocks: Vec<Stock>,
        cache: Option<Arc<Cache>>,
        trees: Arc<Trees>,
        tally: Arc<Tally>,
        is_busy: impl Fn() -> bool + Send + Sync + 'static,
    ) -> Self {
        Self { stocks, cache, trees, tally, is_busy: Box::new(is_busy), guests: Mutex::default() }
    }

    /// Whether there is room for a link of `peer`, which may have what is here.
    ///
    /// # Errors
    /// [`Refusal::Busy`] if not.
    pub fn check(&self, peer: NodeId) -> Result<(), Refusal> {
        if has_room(&lock(&self.guests), peer) { Ok(()) } else { Err(Refusal::Busy) }
    }

    /// Answers what comes over a link until it ends.
    pub fn serve(&self, link: &TcpLink) {
        link.set_background();
        self.answer_all(link);
        link.close();
    }

    pub(super) fn answer_all(&self, link: &dyn Link) {
        // Another one may have come in since that was checked.
        let Some(_guest) = Guest::seat(self, link.peer()) else { return };
        link.set_frame_limit(32 * MAX_ASKED);
        let (mut asked, mut piece) = (Vec::new(), vec![0; PIECE_BYTES]);
        loop {
            let answered = match link.recv(&mut asked, Some(Instant::now() + IDLE)) {
                Ok(kind::HAVE) => self.answer_have(link, &asked),
                Ok(kind::TREE) => self.answer_tree(link, &asked),
                Ok(kind::FETCH) => self.answer_fetch(link, &asked, &mut piece),
                Ok(_) | Err(_) => return,
            };
            if let Err(error) = answered {
                tracing::debug!(peer = %link.peer().short(), %error, "weights were not sent");
                return;
            }
        }
    }

    fn find(&self, hash: &Hash) -> Option<Tensor<'_>> {
        let stocked = |stock: &Stock| stock.by_hash.get(hash).copied();
        let found = self.stocks.iter().find_map(|stock| Some((stock, stocked(stock)?)));
        match found {
            Some((stock, (idx, n_bytes))) => Some(Tensor::Stocked(&*stock.source, idx, n_bytes)),
            None => self.cache.as_ref()?.peek(hash).map(Tensor::Cached),
        }
    }

    fn answer_have(&self, link: &dyn Link, asked: &[u8]) -> Result<(), LinkError> {
        let Ok(hashes) = decode_hashes(asked, MAX_ASKED) else { return Err(LinkError::Closed) };
        link.send(kind::HAVE_ANSWER, &[&encode_bits(hashes.iter().map(|hash| self.find(hash).is_some()))])
    }

    fn answer_tree(&self, link: &dyn Link, asked: &[u8]) -> Result<(), LinkError> {
        let hashes = decode_hashes(asked, 1).unwrap_or_default();
        let [hash] = hashes.as_slice() else { return Err(LinkError::Closed) };
        match self.tree(hash) {
            Ok(tree) => link.send(kind::TREE_ANSWER, &[&encode_hashes(tree.blocks())]),
            Err(error) => link.send(kind::FETCH_FAILED, &[error.to_string().as_bytes()]),
        }
    }

    /// The tree of a tensor that is here. Reads all of it the first time.
    fn tree(&self, hash: &Hash) -> io::Result<Arc<Tree>> {
        if let Some(tree) = self.trees.get(hash) {
            return Ok(tree);
        }
        let tensor = self.find(hash).ok_or_else(not_here)?;
        let n_bytes = tensor.n_bytes()?;
        let n_blocks = n_blocks(n_bytes);
        if n_blocks > MAX_BLOCKS {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "the tensor is too large to be shared"));
        }
        let (mut values, mut bytes) = (Vec::with_capacity(n_blocks), vec![0; BLOCK_BYTES as usize]);
        for block in 0..n_blocks {
            let (offset, n) = block_range(n_bytes, block);
            tensor.read(offset, &mut bytes[..n])?;
            values.push(block_value(n_bytes, block, &bytes[..n]));
        }
        match Tree::of(hash, n_bytes, values) {
            Some(tree) => Ok(self.trees.put(*hash, tree)),
            None => {
                if let (Tensor::Cached(_), Some(cache)) = (&tensor, &self.cache) {
                    cache.remove(hash);
                }
                Err(io::Error::new(io::ErrorKind::InvalidData, "the tensor has changed on this node's disk"))
            }
        }
    }

    fn answer_fetch(&self, link: &dyn Link, asked: &[u8], piece: &mut [u8]) -> Result<(), LinkError> {
        let Ok(fetch) = Fetch::decode(asked) else { return Err(LinkError::Closed) };
        let failed = |error: io::Error| link.send(kind::FETCH_FAILED, &[error.to_string().as_bytes()]);
        let Some(tensor) = self.find(&fetch.hash) else { return failed(not_here()) };
        let mut rest = u64::from(fetch.n_bytes);
        while rest > 0 {
            let n = rest.min(piece.len() as u64) as usize;
            let offset = fetch.offset.saturating_add(u64::from(fetch.n_bytes) - rest);
            if let Err(error) = tensor.read(offset, &mut piece[..n]) {
                return failed(error);
            }
            let begin = Instant::now();
            link.send(kind::CHUNK, &[&piece[..n]])?;
            self.tally.serve(n as u64);
            rest -= n as u64;
            if (self.is_busy)() {
                std::thread::sleep(begin.elapsed().min(MAX_PAUSE));
            }
        }
        Ok(())
    }
}

fn not_here() -> io::Error {
    io::Error::new(io::ErrorKind::NotFound, "the tensor is not here")
}

fn has_room(guests: &[NodeId], peer: NodeId) -> bool {
    guests.len() < MAX_LINKS && guests.iter().filter(|guest| **guest == peer).count() < MAX_LINKS_OF_NODE
}

/// A link's place; free when dropped.
struct Guest<'a> {
    shelf: &'a Shelf,
    peer: NodeId,
}

impl<'a> Guest<'a> {
    fn seat(shelf: &'a Shelf, peer: NodeId) -> Option<Self> {
        let mut guests = lock(&shelf.guests);
        has_room(&guests, peer).then(|| {
            guests.push(peer);
            Self { shelf, peer }
        })
    }
}

impl Drop for Guest<'_> {
    fn drop(&mut self) {
        let mut guests = lock(&self.shelf.guests);
        if let Some(at) = guests.iter().position(|peer| *peer == self.peer) {
            guests.swap_remove(at);
        }
    }
}

#[cfg(test)]
pub mod tests {
    use std::collections::VecDeque;
    use std::path::Path;

    use brigade_base::ByteSize;
    use brigade_protocol::weights::decode_bits;

    use super::*;
    use crate::test_link::TestLink;

    /// A shelf with a cache that has these tensors, and their hashes.
    pub fn shelf_with(dir: &Path, tensors: &[&[u8]]) -> (Shelf, Vec<Hash>) {
        let cache = Arc::new(Cache::open(dir, ByteSize::mib(100)).unwrap());
        let hashes: Vec<Hash> = tensors.iter().map(|bytes| Hash::from_bytes(*blake3::hash(bytes).as_bytes())).collect();
        for (hash, bytes) in hashes.iter().zip(tensors) {
            let partial = cache.begin(hash, bytes.len() as u64).unwrap();
            partial.write(0, bytes).unwrap();
            partial.finish().unwrap();
        }
        (Shelf::new(Vec::new(), Some(cache), Arc::default(), Arc::default(), || false), hashes)
    }

    /// What a shelf answers to these frames.
    pub fn answers(shelf: &Shelf, frames: Vec<(u8, Vec<u8>)>) -> Vec<(u8, Vec<u8>)> {
        let answers = Arc::new(Mutex::new(Vec::new()));
        let (seen, mut frames) = (Arc::clone(&answers), VecDeque::from(frames));
        let on_send = move |kind, parts: &[&[u8]]| seen.lock().unwrap().push((kind, parts.concat()));
        shelf.answer_all(&*TestLink::with_kinds(on_send, move || frames.pop_front()));
        answers.lock().unwrap().clone()
    }

    fn fetch(hash: Hash, offset: u64, n_bytes: u32) -> (u8, Vec<u8>) {
        (kind::FETCH, Fetch { hash, offset, n_bytes }.encode().to_vec())
    }

    #[test]
    fn it_says_what_it_has_and_gives_that() {
        let dir = tempfile::tempdir().unwrap();
        let (shelf, hashes) = shelf_with(dir.path(), &[b"weights"]);
        let other = Hash::from_bytes([9; 32]);
        let have = (kind::HAVE, encode_hashes(&[other, hashes[0]]));
        let frames = vec![have, fetch(hashes[0], 2, 3), fetch(hashes[0], 5, 3), fetch(other, 0, 1)];
        let came = answers(&shelf, frames);
        assert_eq!(decode_bits(&came[0].1, 2), Ok(vec![false, true]));
        assert_eq!(came[1], (kind::CHUNK, b"igh".to_vec()));
        assert_eq!((came[2].0, came[3].0), (kind::FETCH_FAILED, kind::FETCH_FAILED));
        assert_eq!(shelf.tally.read().served, 3);
    }

    #[test]
    fn a_large_tensor_is_given_in_pieces_with_its_tree() {
        let dir = tempfile::tempdir().unwrap();
        let bytes: Vec<u8> = (0..BLOCK_BYTES + 5000).map(|at| (at % 251) as u8).collect();
        let (shelf, hashes) = shelf_with(dir.path(), &[&bytes]);
        let frames = vec![(kind::TREE, hashes[0].as_bytes().to_vec()), fetch(hashes[0], 0, BLOCK_BYTES as u32)];
        let came = answers(&shelf, frames);
        let values = decode_hashes(&came[0].1, 2).unwrap();
        let tree = Tree::of(&hashes[0], bytes.len() as u64, values).unwrap();
        let block: Vec<u8> = came[1..].iter().flat_map(|(_, piece)| piece.clone()).collect();
        assert!(came.len() == 5 && tree.holds(0, &block));
    }

    #[test]
    fn a_tensor_that_was_damaged_is_not_given_as_a_tree() {
        let dir = tempfile::tempdir().unwrap();
        let (shelf, hashes) = shelf_with(dir.path(), &[b"weights"]);
        std::fs::write(dir.path().join(hashes[0].to_string()), b"weightz").unwrap();
        let tree = (kind::TREE, hashes[0].as_bytes().to_vec());
        assert_eq!(answers(&shelf, vec![tree])[0].0, kind::FETCH_FAILED);
        assert!(shelf.find(&hashes[0]).is_none(), "it is gone");
    }

    #[test]
    fn what_makes_no_sense_ends_the_link() {
        let dir = tempfile::tempdir().unwrap();
        let (shelf, hashes) = shelf_with(dir.path(), &[b"weights"]);
        let good = fetch(hashes[0], 0, 7);
        for bad in [(kind::FRAME, vec![]), (kind::HAVE, vec![1]), (kind::TREE, vec![0; 64]), (kind::FETCH, vec![0; 9])]
        {
            assert_eq!(answers(&shelf, vec![good.clone(), bad, good.clone()]).len(), 1);
        }
    }

    #[test]
    fn guests_are_few() {
        let dir = tempfile::tempdir().unwrap();
        let (shelf, _) = shelf_with(dir.path(), &[]);
        let node = |n: usize| NodeId::from_bytes([n as u8; 32]);
        let first: Vec<_> = (0..MAX_LINKS_OF_NODE).map(|_| Guest::seat(&shelf, node(0)).unwrap()).collect();
        assert_eq!((shelf.check(node(0)), shelf.check(node(1))), (Err(Refusal::Busy), Ok(())));
        let others: Vec<_> = (first.len()..MAX_LINKS).map(|n| Guest::seat(&shelf, node(n)).unwrap()).collect();
        assert!(Guest::seat(&shelf, node(99)).is_none());
        drop((first, others));
        assert_eq!(shelf.check(node(99)), Ok(()));
    }
}
