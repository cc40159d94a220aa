//! A tensor as a tree of blocks, so that each block is verified by itself, whoever sent it.
//!
//! BLAKE3 hashes 1024-byte chunks and joins their values pairwise up to the root, which is the tensor's hash. Blocks of
//! [`BLOCK_BYTES`] are whole subtrees. Their values are sent along; they join to the root only if they are the right
//! ones, and a block's bytes give its value only if they are the right ones.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use blake3::hazmat::{ChainingValue, HasherExt, Mode, left_subtree_len, merge_subtrees_non_root, merge_subtrees_root};
use brigade_base::Hash;
use brigade_protocol::weights::{BLOCK_BYTES, MAX_BLOCKS};

use crate::threads::lock;

/// Most blocks whose values are remembered, of all tensors together: 1 TiB of weights in 32 MiB.
const MAX_REMEMBERED: usize = 1 << 20;

/// The values of a tensor's blocks, found to belong to its hash.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tree {
    n_bytes: u64,
    blocks: Vec<Hash>,
}

/// Blocks of a tensor of so many bytes, at least one.
pub fn n_blocks(n_bytes: u64) -> usize {
    n_bytes.div_ceil(BLOCK_BYTES).max(1) as usize
}

/// First byte and number of bytes of a block.
pub fn block_range(n_bytes: u64, block: usize) -> (u64, usize) {
    let offset = block as u64 * BLOCK_BYTES;
    (offset, n_bytes.saturating_sub(offset).min(BLOCK_BYTES) as usize)
}

/// The value of a block; that of an only block is the hash itself.
pub fn block_value(n_bytes: u64, block: usize, bytes: &[u8]) -> Hash {
    if n_blocks(n_bytes) == 1 {
        return Hash::from_bytes(*blake3::hash(bytes).as_bytes());
    }
    let mut hasher = blake3::Hasher::new();
    hasher.set_input_offset(block_range(n_bytes, block).0);
    Hash::from_bytes(hasher.update(bytes).finalize_non_root())
}

impl Tree {
    /// The tree of a tensor with one block.
    pub fn of_one(hash: Hash, n_bytes: u64) -> Option<Self> {
        (n_blocks(n_bytes) == 1).then(|| Self { n_bytes, blocks: vec![hash] })
    }

    /// The tree of the tensor with this hash, if it has these values of blocks.
    pub fn of(hash: &Hash, n_bytes: u64, blocks: Vec<Hash>) -> Option<Self> {
        if blocks.len() != n_blocks(n_bytes) || blocks.len() > MAX_BLOCKS {
            return None;
        }
        let root = match blocks.as_slice() {
            [one] => *one,
            many => {
                let (left, right) = halves(n_bytes, many);
                let root = merge_subtrees_root(&left, &right, Mode::Hash);
                Hash::from_bytes(*root.as_bytes())
            }
        };
        (root == *hash).then_some(Self { n_bytes, blocks })
    }

    /// Whether these are the bytes of a block.
    pub fn holds(&self, block: usize, bytes: &[u8]) -> bool {
        block < self.blocks.len()
            && bytes.len() == block_range(self.n_bytes, block).1
            && self.blocks[block] == block_value(self.n_bytes, block, bytes)
    }

    /// The values of its blocks.
    pub fn blocks(&self) -> &[Hash] {
        &self.blocks
    }
}

/// The values of the two subtrees of two or more blocks.
fn halves(n_bytes: u64, blocks: &[Hash]) -> (ChainingValue, ChainingValue) {
    let left_bytes = left_subtree_len(n_bytes);
    let (left, right) = blocks.split_at((left_bytes / BLOCK_BYTES) as usize);
    (value(left_bytes, left), value(n_bytes - left_bytes, right))
}

fn value(n_bytes: u64, blocks: &[Hash]) -> ChainingValue {
    match blocks {
        [one] => *one.as_bytes(),
        many => {
            let (left, right) = halves(n_bytes, many);
            merge_subtrees_non_root(&left, &right, Mode::Hash)
        }
    }
}

/// Trees that were made or fetched, so that a tensor is read once for it.
#[derive(Debug, Default)]
pub struct Trees(Mutex<(HashMap<Hash, Arc<Tree>>, usize)>);

impl Trees {
    /// The tree of a tensor, if it is known.
    pub fn get(&self, hash: &Hash) -> Option<Arc<Tree>> {
        lock(&self.0).0.get(hash).cloned()
    }

    /// Remembers a tree. Where there are too many, all others are forgotten: they can be made again.
    pub fn put(&self, hash: Hash, tree: Tree) -> Arc<Tree> {
        let (trees, n_blocks) = &mut *lock(&self.0);
        if *n_blocks + tree.blocks.len() > MAX_REMEMBERED {
            trees.clear();
            *n_blocks = 0;
        }
        let tree = Arc::new(tree);
        if trees.insert(hash, Arc::clone(&tree)).is_none() {
            *n_blocks += tree.blocks.len();
        }
        tree
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tensor(n_bytes: u64) -> (Vec<u8>, Hash) {
        let bytes: Vec<u8> = (0..n_bytes).map(|at| ((at * 31) >> 7) as u8).collect();
        let hash = Hash::from_bytes(*blake3::hash(&bytes).as_bytes());
        (bytes, hash)
    }

    #[test]
    fn values_of_blocks_join_to_the_hash_of_the_tensor() {
        for n_bytes in [1, BLOCK_BYTES - 1, BLOCK_BYTES, BLOCK_BYTES + 1, 2 * BLOCK_BYTES, 5 * BLOCK_BYTES + 3000] {
            let (bytes, hash) = tensor(n_bytes);
            let blocks = bytes.chunks(BLOCK_BYTES as usize);
            let values: Vec<Hash> = blocks.clone().enumerate().map(|(i, b)| block_value(n_bytes, i, b)).collect();
            let tree = Tree::of(&hash, n_bytes, values.clone()).unwrap();
            assert!(blocks.enumerate().all(|(i, block)| tree.holds(i, block)), "{n_bytes}");
            assert_eq!(Tree::of_one(hash, n_bytes), (values.len() == 1).then_some(tree));
        }
    }

    #[test]
    fn wrong_values_and_wrong_blocks_are_refused() {
        let n_bytes = 3 * BLOCK_BYTES + 7;
        let (mut bytes, hash) = tensor(n_bytes);
        let values: Vec<Hash> =
            bytes.chunks(BLOCK_BYTES as usize).enumerate().map(|(i, b)| block_value(n_bytes, i, b)).collect();
        let tree = Tree::of(&hash, n_bytes, values.clone()).unwrap();
        let last = 3 * BLOCK_BYTES as usize;
        assert!(!tree.holds(2, &bytes[last..]) && !tree.holds(3, &bytes[last + 1..]) && !tree.holds(4, &[]));
        bytes[last] ^= 1;
        assert!(!tree.holds(3, &bytes[last..]));
        assert_eq!(Tree::of(&hash, n_bytes, values[1..].to_vec()), None);
        let mut swapped = values;
        swapped.swap(0, 1);
        assert_eq!(Tree::of(&hash, n_bytes, swapped), None);
    }
}
