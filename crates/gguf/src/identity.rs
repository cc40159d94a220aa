//! What a model is called: the hash of its header and the hashes of its tensors.

use std::io;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use brigade_base::{Hash, ModelId};

use crate::catalog::{Catalog, TensorSource};

/// Bytes hashed at once. More gains nothing (BLAKE3 is fastest from 128 KiB on), and each thread holds one buffer.
const CHUNK_BYTES: u64 = 1 << 20;

/// Keeps model ids apart from every other use of BLAKE3.
const ID_CONTEXT: &str = "brigade 2025 model id v1";

/// The BLAKE3 hash of each tensor's bytes, in catalog order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Manifest {
    /// One hash per tensor.
    pub tensors: Vec<Hash>,
}

impl Manifest {
    /// Hashes all tensors of `source` with `n_threads` threads (at least one). `progress` hears of each chunk's bytes
    /// as they are done, from any of the threads.
    ///
    /// # Errors
    /// The first error of `source`.
    pub fn compute(
        catalog: &Catalog,
        source: &dyn TensorSource,
        n_threads: usize,
        progress: &(dyn Fn(u64) + Sync),
    ) -> io::Result<Self> {
        let n_tensors = catalog.tensors().len();
        // Large tensors first, so that no thread is left alone with one at the end.
        let mut order: Vec<usize> = (0..n_tensors).collect();
        order.sort_by_key(|idx| std::cmp::Reverse(catalog.tensors()[*idx].n_bytes));
        let next = AtomicUsize::new(0);
        let results = Mutex::new(Ok(vec![Hash::from_bytes([0; 32]); n_tensors]));
        let work = || {
            let mut buffer = Vec::new();
            while let Some(idx) = order.get(next.fetch_add(1, Ordering::Relaxed)) {
                let hash = hash_tensor(*idx, catalog.tensors()[*idx].n_bytes, source, &mut buffer, progress);
                let mut results = results.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                match (hash, results.as_mut()) {
                    (Ok(hash), Ok(hashes)) => hashes[*idx] = hash,
                    (Err(error), Ok(_)) => *results = Err(error),
                    (_, Err(_)) => return,
                }
            }
        };
        std::thread::scope(|scope| {
            for _ in 1..n_threads.min(n_tensors) {
                scope.spawn(work);
            }
            work();
        });
        let tensors = results.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner)?;
        Ok(Self { tensors })
    }
}

fn hash_tensor(
    tensor_idx: usize,
    n_bytes: u64,
    source: &dyn TensorSource,
    buffer: &mut Vec<u8>,
    progress: &(dyn Fn(u64) + Sync),
) -> io::Result<Hash> {
    let mut hasher = blake3::Hasher::new();
    let mut offset = 0;
    while offset < n_bytes {
        let n = CHUNK_BYTES.min(n_bytes - offset);
        buffer.resize(n as usize, 0);
        source.read_tensor(tensor_idx, offset, buffer)?;
        hasher.update(buffer);
        progress(n);
        offset += n;
    }
    Ok(Hash::from_bytes(*hasher.finalize().as_bytes()))
}

/// The name of a model with this header and these tensors.
pub fn model_id(header_hash: &Hash, manifest: &Manifest) -> ModelId {
    let mut hasher = blake3::Hasher::new_derive_key(ID_CONTEXT);
    hasher.update(header_hash.as_bytes());
    hasher.update(&(manifest.tensors.len() as u64).to_le_bytes());
    for hash in &manifest.tensors {
        hasher.update(hash.as_bytes());
    }
    ModelId::from_bytes(*hasher.finalize().as_bytes())
}
