//! Where a stage's weights are on this node, and how they come there.
//!
//! A worker takes each tensor that its layers need from the first of these that has it: its own copy of the file, its
//! cache, other nodes (see [`crate::share`]). Wherever it comes from, its bytes are hashed and compared with the
//! deployment's manifest before libllama sees any of them.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use brigade_base::Hash;
use brigade_gguf::{Catalog, ModelFile, TensorSource};

use crate::cache::Cache;
use crate::share::{Failed, Gathering, Origin, Suppliers, Tally, Trees, Wanted};

/// Weights could not be had.
#[derive(Debug, thiserror::Error)]
pub enum WeightsError {
    /// The node's own copy has other bytes under the same header.
    #[error(
        "this node's copy of {model} differs from the coordinator's in {tensor}: use the same file, or leave --model \
         away to fetch the weights"
    )]
    OwnCopyDiffers {
        /// Name of the model.
        model: String,
        /// The first tensor that differs.
        tensor: String,
    },
    /// Every node that has a tensor sent other bytes than the coordinator had promised.
    #[error(
        "wrong bytes came for {tensor}, and no other node has it; the model's file may have changed while it was served"
    )]
    WrongBytes {
        /// The tensor.
        tensor: String,
    },
    /// No node that has a tensor could be reached.
    #[error("the transfer of {tensor} broke off: {why}")]
    BrokeOff {
        /// The tensor.
        tensor: String,
        /// Why.
        why: String,
    },
    /// The deployment names a tensor that its header lacks.
    #[error("the deployment names tensor {0}, which its header lacks")]
    NoTensor(u32),
    /// The coordinator took the stage back.
    #[error("the stage was taken back")]
    Cancelled,
    /// Reading or writing on this node failed.
    #[error("reading or writing weights on this node failed: {0}")]
    Disk(#[from] io::Error),
}

/// Where a stage's tensors are on this node.
pub struct Weights {
    /// By index in the catalog; `None` for tensors of other stages.
    places: Vec<Option<Place>>,
}

enum Place {
    Own(Arc<ModelFile>, usize),
    Cached(Arc<File>, u64),
}

impl TensorSource for Weights {
    fn read_tensor(&self, tensor_idx: usize, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        match self.places.get(tensor_idx).and_then(Option::as_ref) {
            Some(Place::Own(file, idx)) => file.read_at(*idx, offset, buf),
            Some(Place::Cached(file, n_bytes)) if offset + buf.len() as u64 <= *n_bytes => {
                file.read_exact_at(buf, offset)
            }
            _ => Err(io::Error::new(io::ErrorKind::NotFound, "the stage does not hold this tensor")),
        }
    }
}

/// What to gather, and from where.
pub struct Gather<'a> {
    /// Name of the model, for messages.
    pub model_name: &'a str,
    /// The model's header.
    pub catalog: &'a Catalog,
    /// Index and hash of each tensor that is needed.
    pub tensors: &'a [(u32, Hash)],
    /// What is to stay in the cache beside them.
    pub keep: &'a [Hash],
    /// The node's own copy, if it has the same header.
    pub own: Option<&'a Arc<ModelFile>>,
    /// The node's cache.
    pub cache: &'a Cache,
    /// Trees of tensors that are known.
    pub trees: &'a Trees,
    /// Counts what comes from where.
    pub tally: &'a Tally,
    /// Whom to ask.
    pub suppliers: &'a dyn Suppliers,
    /// Where among the tensors to begin; another number on each node.
    pub begin: u64,
    /// Hears how many bytes are there; false gives up.
    pub progress: &'a mut dyn FnMut(u64, u64) -> bool,
}

impl Gather<'_> {
    /// Brings every tensor to this node and verifies it.
    ///
    /// # Errors
    /// If one cannot be had with the right bytes.
    pub fn run(mut self) -> Result<Weights, WeightsError> {
        let total: u64 = self.tensors.iter().map(|(idx, _)| self.n_bytes(*idx)).sum::<Result<u64, _>>()?;
        let mut places: Vec<Option<Place>> = (0..self.catalog.tensors().len()).map(|_| None).collect();
        let mut done = 0;
        let mut missing = Vec::new();
        for &(idx, hash) in self.tensors {
            let n_bytes = self.n_bytes(idx)?;
            let (place, origin) = match self.own {
                Some(own) => (Some(self.own_place(own, idx, &hash)?), Origin::OwnCopy),
                None => (self.cache.get(&hash)?.map(|file| Place::Cached(Arc::new(file), n_bytes)), Origin::Cache),
            };
            match place {
                Some(place) => {
                    places[idx as usize] = Some(place);
                    self.tally.add(origin, n_bytes);
                    done += n_bytes;
                    if !(self.progress)(done, total) {
                        return Err(WeightsError::Cancelled);
                    }
                }
                None => missing.push((idx, hash)),
            }
        }
        if !missing.is_empty() {
            self.fetch(&missing, done, total, &mut places)?;
        }
        Ok(Weights { places })
    }

    fn n_bytes(&self, idx: u32) -> Result<u64, WeightsError> {
        self.catalog.tensors().get(idx as usize).map(|t| t.n_bytes).ok_or(WeightsError::NoTensor(idx))
    }

    fn tensor_name(&self, idx: u32) -> String {
        self.catalog.tensors().get(idx as usize).map(|t| t.name.clone()).unwrap_or_default()
    }

    fn own_place(&self, own: &Arc<ModelFile>, idx: u32, hash: &Hash) -> Result<Place, WeightsError> {
        let mut reader = TensorReader { file: own, idx: idx as usize, at: 0, n_bytes: self.n_bytes(idx)? };
        if crate::cache::hash_reader(&mut reader)? != *hash {
            let (model, tensor) = (self.model_name.to_owned(), self.tensor_name(idx));
            return Err(WeightsError::OwnCopyDiffers { model, tensor });
        }
        Ok(Place::Own(Arc::clone(own), idx as usize))
    }

    /// Fetches what is missing from other nodes.
    fn fetch(
        &mut self,
        missing: &[(u32, Hash)],
        done: u64,
        total: u64,
        places: &mut [Option<Place>],
    ) -> Result<(), WeightsError> {
        let keep: Vec<Hash> = self.tensors.iter().map(|(_, hash)| *hash).chain(self.keep.iter().copied()).collect();
        let mut wanted: Vec<Wanted> = Vec::new();
        for &(idx, hash) in missing {
            // Tensors with the same bytes have one file.
            if wanted.iter().all(|wanted| wanted.hash != hash) {
                wanted.push(Wanted { hash, n_bytes: self.n_bytes(idx)?, name: self.tensor_name(idx) });
            }
        }
        self.cache.make_room(wanted.iter().map(|wanted| wanted.n_bytes).sum(), &keep)?;
        let twice = missing.iter().map(|(idx, _)| self.n_bytes(*idx)).sum::<Result<u64, _>>()?
            - wanted.iter().map(|wanted| wanted.n_bytes).sum::<u64>();
        let progress = &mut self.progress;
        let gathering = Gathering::new(&wanted, self.cache, self.trees, self.tally, self.begin);
        let files = gathering.run(self.suppliers, &mut |n_bytes| progress(done + twice + n_bytes, total));
        let name = |tensor: usize| wanted[tensor].name.clone();
        let files = files.map_err(|failed| match failed {
            Failed::Cancelled => WeightsError::Cancelled,
            Failed::WrongBytes(tensor) => WeightsError::WrongBytes { tensor: name(tensor) },
            Failed::BrokeOff(tensor, why) => WeightsError::BrokeOff { tensor: name(tensor), why },
            Failed::Disk(error) => WeightsError::Disk(error),
        })?;
        for &(idx, hash) in missing {
            let found = wanted.iter().zip(&files).find(|(wanted, _)| wanted.hash == hash);
            places[idx as usize] = found.map(|(wanted, file)| Place::Cached(Arc::clone(file), wanted.n_bytes));
        }
        Ok(())
    }
}

/// Reads one tensor of a file from its beginning to its end.
struct TensorReader<'a> {
    file: &'a ModelFile,
    idx: usize,
    at: u64,
    n_bytes: u64,
}

impl io::Read for TensorReader<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let n = (self.n_bytes - self.at).min(buf.len() as u64) as usize;
        self.file.read_at(self.idx, self.at, &mut buf[..n])?;
        self.at += n as u64;
        Ok(n)
    }
}
