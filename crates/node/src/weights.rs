//! Weights on their way from the coordinator's file into a worker's stage.
//!
//! A worker takes each tensor that its layers need from the first of these that has it: its own copy of the file, its
//! cache, the coordinator. Wherever it comes from, its bytes are hashed and compared with the deployment's manifest
//! before libllama sees any of them.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use brigade_base::Hash;
use brigade_gguf::{Catalog, ModelFile, TensorSource};
use brigade_net::{Link, LinkError};
use brigade_protocol::kind;
use brigade_protocol::weights::{CHUNK_BYTES, Fetch};

use crate::cache::Cache;

/// How long a worker waits for the next chunk: many times what a megabyte takes on a slow link.
const CHUNK_TIMEOUT: Duration = Duration::from_secs(30);

/// How often a broken transfer is taken up again before the stage is given up.
const ATTEMPTS: usize = 4;

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
    /// The coordinator sent other bytes than it had promised, twice.
    #[error("the coordinator sent wrong bytes for {tensor}; its file may have changed while it was served")]
    WrongBytes {
        /// The tensor.
        tensor: String,
    },
    /// The link broke and could not be had again.
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

/// Answers [`Fetch`]es on a link until it closes.
pub fn serve_weights(link: &dyn Link, file: &ModelFile) {
    let mut request = Vec::new();
    let mut chunk = vec![0; CHUNK_BYTES];
    while let Ok(kind::FETCH) = link.recv(&mut request, None) {
        let Ok(fetch) = Fetch::decode(&request) else { return };
        if let Err(error) = send_tensor(link, file, fetch, &mut chunk) {
            tracing::debug!(peer = %link.peer().short(), %error, "weights were not sent");
            return;
        }
    }
}

fn send_tensor(link: &dyn Link, file: &ModelFile, fetch: Fetch, chunk: &mut [u8]) -> Result<(), LinkError> {
    let Some(info) = file.catalog().tensors().get(fetch.tensor as usize).filter(|t| fetch.offset <= t.n_bytes) else {
        return link.send(kind::FETCH_FAILED, &[b"there is no such tensor"]);
    };
    let mut at = fetch.offset;
    while at < info.n_bytes {
        let n = (info.n_bytes - at).min(chunk.len() as u64) as usize;
        if let Err(error) = file.read_at(fetch.tensor as usize, at, &mut chunk[..n]) {
            return link.send(kind::FETCH_FAILED, &[error.to_string().as_bytes()]);
        }
        link.send(kind::CHUNK, &[&chunk[..n]])?;
        at += n as u64;
    }
    Ok(())
}

/// Where a stage's tensors are on this node.
pub struct Weights {
    /// By index in the catalog; `None` for tensors of other stages.
    places: Vec<Option<Place>>,
}

enum Place {
    Own(Arc<ModelFile>, usize),
    Cached(File, u64),
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
    /// The node's own copy, if it has the same header.
    pub own: Option<&'a Arc<ModelFile>>,
    /// The node's cache.
    pub cache: &'a Cache,
    /// Dials the coordinator for weights.
    pub dial: &'a dyn Fn() -> Result<Arc<dyn Link>, String>,
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
            let place = match self.own {
                Some(own) => Some(self.own_place(own, idx, &hash)?),
                None => self.cache.get(&hash)?.map(|file| Place::Cached(file, n_bytes)),
            };
            match place {
                Some(place) => {
                    places[idx as usize] = Some(place);
                    done += n_bytes;
                    self.tell(done, total)?;
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

    fn tell(&mut self, done: u64, total: u64) -> Result<(), WeightsError> {
        if (self.progress)(done, total) { Ok(()) } else { Err(WeightsError::Cancelled) }
    }

    fn own_place(&self, own: &Arc<ModelFile>, idx: u32, hash: &Hash) -> Result<Place, WeightsError> {
        let mut reader = TensorReader { file: own, idx: idx as usize, at: 0, n_bytes: self.n_bytes(idx)? };
        if crate::cache::hash_reader(&mut reader)? != *hash {
            let (model, tensor) = (self.model_name.to_owned(), self.tensor_name(idx));
            return Err(WeightsError::OwnCopyDiffers { model, tensor });
        }
        Ok(Place::Own(Arc::clone(own), idx as usize))
    }

    fn fetch(
        &mut self,
        missing: &[(u32, Hash)],
        mut done: u64,
        total: u64,
        places: &mut [Option<Place>],
    ) -> Result<(), WeightsError> {
        let keep: Vec<Hash> = self.tensors.iter().map(|(_, hash)| *hash).collect();
        let wanted = missing.iter().map(|(idx, _)| self.n_bytes(*idx)).sum::<Result<u64, _>>()?;
        self.cache.make_room(wanted, &keep)?;
        let mut link: Option<Arc<dyn Link>> = None;
        for &(idx, hash) in missing {
            let n_bytes = self.n_bytes(idx)?;
            let mut was_wrong = false;
            let mut attempts = 0;
            let file = loop {
                match self.fetch_one(&mut link, idx, &hash, done, total) {
                    Ok(()) => match self.cache.get(&hash)? {
                        Some(file) => break file,
                        None if was_wrong => return Err(WeightsError::WrongBytes { tensor: self.tensor_name(idx) }),
                        None => was_wrong = true,
                    },
                    Err(FetchError::Link(why)) if attempts + 1 < ATTEMPTS => {
                        attempts += 1;
                        link = None;
                        tracing::info!(tensor = self.tensor_name(idx), why, "the transfer broke off; trying again");
                        std::thread::sleep(Duration::from_millis(200 << attempts));
                    }
                    Err(FetchError::Link(why)) => {
                        return Err(WeightsError::BrokeOff { tensor: self.tensor_name(idx), why });
                    }
                    Err(FetchError::Here(error)) => return Err(error),
                }
            };
            places[idx as usize] = Some(Place::Cached(file, n_bytes));
            done += n_bytes;
        }
        Ok(())
    }

    /// Fetches the rest of one tensor into the cache.
    fn fetch_one(
        &mut self,
        link: &mut Option<Arc<dyn Link>>,
        idx: u32,
        hash: &Hash,
        done: u64,
        total: u64,
    ) -> Result<(), FetchError> {
        let n_bytes = self.n_bytes(idx)?;
        let mut partial = self.cache.begin(hash, n_bytes)?;
        let link = match link {
            Some(link) => link,
            None => link.insert((self.dial)().map_err(FetchError::Link)?),
        };
        if partial.done() < n_bytes {
            let fetch = Fetch { tensor: idx, offset: partial.done() };
            link.send(kind::FETCH, &[&fetch.encode()])?;
        }
        let mut buf = Vec::new();
        while partial.done() < n_bytes {
            match link.recv(&mut buf, Some(Instant::now() + CHUNK_TIMEOUT))? {
                kind::CHUNK if !buf.is_empty() => partial.write(&buf)?,
                kind::FETCH_FAILED => return Err(FetchError::Link(String::from_utf8_lossy(&buf).into_owned())),
                _ => return Err(FetchError::Link("the coordinator sent something else than weights".to_owned())),
            }
            self.tell(done + partial.done(), total)?;
        }
        if !partial.finish()? {
            tracing::warn!(tensor = self.tensor_name(idx), "wrong bytes came; they were thrown away");
        }
        Ok(())
    }
}

enum FetchError {
    /// Worth another attempt.
    Link(String),
    /// Not.
    Here(WeightsError),
}

impl From<LinkError> for FetchError {
    fn from(error: LinkError) -> Self {
        Self::Link(error.to_string())
    }
}

impl From<WeightsError> for FetchError {
    fn from(error: WeightsError) -> Self {
        Self::Here(error)
    }
}

impl From<io::Error> for FetchError {
    fn from(error: io::Error) -> Self {
        Self::Here(error.into())
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

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;
    use std::sync::Mutex;

    use brigade_base::ByteSize;
    use brigade_gguf::{Builder, GgmlType, Metadata};

    use super::*;
    use crate::test_link::TestLink;

    const TENSOR: [u8; 32] = [7; 32];

    fn rest(fetch: Fetch) -> Vec<u8> {
        TENSOR[fetch.offset as usize..].to_vec()
    }

    /// Gathers one tensor from a coordinator that answers so; also says from where it was asked for.
    fn gather(
        dir: &std::path::Path,
        answer: fn(Fetch) -> Vec<(u8, Vec<u8>)>,
    ) -> (Result<Weights, WeightsError>, Vec<u64>) {
        let mut builder = Builder::new(&Metadata::new());
        builder.tensor("t", &[8], GgmlType::F32).unwrap();
        let catalog = Catalog::parse_header(&builder.header_bytes()).unwrap();
        let hash = crate::cache::hash_reader(&mut &TENSOR[..]).unwrap();
        let cache = Cache::open(dir, ByteSize::mib(1)).unwrap();
        let offsets = Arc::new(Mutex::new(Vec::new()));
        let seen = Arc::clone(&offsets);
        let dial = move || {
            let queue = Arc::new(Mutex::new(VecDeque::new()));
            let (answers, seen) = (Arc::clone(&queue), Arc::clone(&seen));
            let on_fetch = move |parts: &[&[u8]]| {
                let fetch = Fetch::decode(parts[0]).unwrap();
                seen.lock().unwrap().push(fetch.offset);
                answers.lock().unwrap().extend(answer(fetch));
            };
            Ok(TestLink::of(on_fetch, move || queue.lock().unwrap().pop_front()))
        };
        let gather = Gather {
            model_name: "m",
            catalog: &catalog,
            tensors: &[(0, hash)],
            own: None,
            cache: &cache,
            dial: &dial,
            progress: &mut |_, _| true,
        };
        let result = gather.run();
        let offsets = offsets.lock().unwrap().clone();
        (result, offsets)
    }

    fn read(weights: &Weights) -> [u8; 32] {
        let mut bytes = [0; 32];
        weights.read_tensor(0, 0, &mut bytes).unwrap();
        bytes
    }

    #[test]
    fn a_tensor_comes_in_pieces_and_is_there_the_next_time() {
        let dir = tempfile::tempdir().unwrap();
        let (weights, offsets) =
            gather(dir.path(), |fetch| rest(fetch).chunks(5).map(|chunk| (kind::CHUNK, chunk.to_vec())).collect());
        assert_eq!((read(&weights.unwrap()), offsets.as_slice()), (TENSOR, &[0][..]));
        let (weights, offsets) = gather(dir.path(), |_| unreachable!());
        assert_eq!((read(&weights.unwrap()), offsets.len()), (TENSOR, 0));
    }

    #[test]
    fn a_broken_transfer_goes_on_where_it_broke_off() {
        let dir = tempfile::tempdir().unwrap();
        // Ten bytes at a time, then the link closes.
        let (weights, offsets) =
            gather(dir.path(), |fetch| vec![(kind::CHUNK, rest(fetch).into_iter().take(10).collect())]);
        assert_eq!((read(&weights.unwrap()), offsets.as_slice()), (TENSOR, &[0, 10, 20, 30][..]));
    }

    #[test]
    fn wrong_bytes_are_asked_for_again_once_and_then_refused() {
        let dir = tempfile::tempdir().unwrap();
        let (result, offsets) = gather(dir.path(), |_| vec![(kind::CHUNK, vec![8; 32])]);
        assert!(matches!(result, Err(WeightsError::WrongBytes { .. })));
        assert_eq!(offsets, [0, 0]);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn more_bytes_than_the_tensor_has_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let (result, _) = gather(dir.path(), |_| vec![(kind::CHUNK, vec![7; 33])]);
        assert!(matches!(result, Err(WeightsError::Disk(_))));
    }
}
