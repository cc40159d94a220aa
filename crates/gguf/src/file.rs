//! A model on disk: one GGUF file, or the files into which it was split.
//!
//! A `ModelFile` owns its open files and reads at positions, so one value serves all threads at once.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use crate::catalog::{Catalog, TensorSource};
use crate::header::{Header, HeaderError, MAX_HEADER_BYTES, MAX_TENSORS};
use crate::value::Metadata;

/// Most files of one model. The largest known model has about 50; each takes a file descriptor, of which a process
/// often has only 1024.
const MAX_SPLITS: u64 = 512;

/// How much of a file is read first: the whole header of a model with a vocabulary of 32 k tokens.
const FIRST_READ_BYTES: u64 = 1 << 20;

/// Why a model cannot be opened.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the messages explain the fields")]
pub enum OpenError {
    #[error("cannot read {path}: {source}")]
    Io { path: PathBuf, source: io::Error },
    #[error("{path} is not a file")]
    NotAFile { path: PathBuf },
    #[error("{path}: {source}")]
    Header { path: PathBuf, source: HeaderError },
    #[error(
        "{path} is part of a model in {n_splits} files but is not called NAME-00001-of-{n_splits:05}.gguf; rename it"
    )]
    SplitName { path: PathBuf, n_splits: u64 },
    #[error("the model has {n_splits} files, but {path} is missing: {source}")]
    MissingSplit { path: PathBuf, n_splits: u64, source: io::Error },
    #[error("{path} says it is part {found:?} of {found_count:?}, expected part {expected} of {expected_count}")]
    WrongSplit { path: PathBuf, expected: u64, expected_count: u64, found: Option<u64>, found_count: Option<u64> },
    #[error("the model says it has {expected} tensors, but its files hold {found}; download it again")]
    TensorCount { expected: u64, found: u64 },
    #[error("the model says it has {found} files, more than {MAX_SPLITS}")]
    TooManySplits { found: u64 },
}

/// An open model.
#[derive(Debug)]
pub struct ModelFile {
    path: PathBuf,
    files: Vec<File>,
    catalog: Catalog,
}

impl ModelFile {
    /// Opens the model at `path`. For a split model, `path` may be any of its files; all of them are opened.
    ///
    /// # Errors
    /// If a file cannot be read or is missing, or a header is unsound.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, OpenError> {
        let path = path.as_ref();
        let (file, header) = open_header(path, 0)?;
        let n_splits = header.metadata.u64("split.count").unwrap_or(1);
        if n_splits > MAX_SPLITS {
            return Err(OpenError::TooManySplits { found: n_splits });
        }
        let (files, metadata, tensors) = if n_splits <= 1 {
            (vec![file], header.metadata, header.tensors)
        } else {
            drop(file);
            open_splits(path, n_splits)?
        };
        let catalog =
            Catalog::new(&metadata, tensors).map_err(|source| OpenError::Header { path: path.to_owned(), source })?;
        Ok(Self { path: path.to_owned(), files, catalog })
    }

    /// The path that was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What the file system knows of each file, as opened; tells whether they have changed.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn file_metadata(&self) -> io::Result<Vec<std::fs::Metadata>> {
        self.files.iter().map(File::metadata).collect()
    }

    /// The model's header.
    pub fn catalog(&self) -> &Catalog {
        &self.catalog
    }

    /// Fills `buf` with the bytes of tensor `tensor_idx` from `offset` on.
    ///
    /// # Errors
    /// `InvalidInput` if the range is not in the tensor, `UnexpectedEof` if the file was cut since it was opened, and
    /// those of the file system.
    pub fn read_at(&self, tensor_idx: usize, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let tensor = self.catalog.tensors().get(tensor_idx);
        let outside = || io::Error::new(io::ErrorKind::InvalidInput, "the range is outside of the tensor");
        let tensor = tensor.ok_or_else(outside)?;
        let end = offset.checked_add(buf.len() as u64).ok_or_else(outside)?;
        if end > tensor.n_bytes {
            return Err(outside());
        }
        let file = self.files.get(usize::from(tensor.file)).ok_or_else(outside)?;
        read_exact_at(file, buf, tensor.offset + offset)
    }
}

impl TensorSource for ModelFile {
    fn read_tensor(&self, tensor_idx: usize, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.read_at(tensor_idx, offset, buf)
    }
}

type Opened = (Vec<File>, Metadata, Vec<crate::header::TensorInfo>);

fn open_splits(path: &Path, n_splits: u64) -> Result<Opened, OpenError> {
    let prefix =
        split_prefix(path, n_splits).ok_or_else(|| OpenError::SplitName { path: path.to_owned(), n_splits })?;
    let (mut files, mut tensors, mut metadata) = (Vec::new(), Vec::new(), Metadata::new());
    for no in 0..n_splits {
        let path = path.with_file_name(format!("{prefix}-{:05}-of-{n_splits:05}.gguf", no + 1));
        // `MAX_SPLITS` keeps the number in 16 bits.
        let (file, header) = open_header(&path, no as u16).map_err(|error| match error {
            OpenError::Io { path, source } => OpenError::MissingSplit { path, n_splits, source },
            other => other,
        })?;
        let (found, found_count) = (header.metadata.u64("split.no"), header.metadata.u64("split.count"));
        if found != Some(no) || found_count != Some(n_splits) {
            return Err(OpenError::WrongSplit { path, expected: no, expected_count: n_splits, found, found_count });
        }
        files.push(file);
        tensors.extend(header.tensors);
        if tensors.len() as u64 > MAX_TENSORS {
            let source = HeaderError::TooLarge {
                what: "number of tensors in all files",
                found: tensors.len() as u64,
                limit: MAX_TENSORS,
            };
            return Err(OpenError::Header { path, source });
        }
        if no == 0 {
            metadata = header.metadata;
        }
    }
    match metadata.u64("split.tensors.count") {
        Some(expected) if expected != tensors.len() as u64 => {
            Err(OpenError::TensorCount { expected, found: tensors.len() as u64 })
        }
        _ => Ok((files, metadata, tensors)),
    }
}

/// `NAME` of a file called `NAME-00002-of-00005.gguf` if the last number is `n_splits`.
fn split_prefix(path: &Path, n_splits: u64) -> Option<String> {
    let stem = path.file_name()?.to_str()?.strip_suffix(&format!("-of-{n_splits:05}.gguf"))?;
    let (prefix, number) = stem.rsplit_once('-')?;
    let is_number = number.len() == 5 && number.bytes().all(|byte| byte.is_ascii_digit());
    is_number.then(|| prefix.to_owned())
}

/// Opens a file and reads its header, in steps that grow as the header turns out to be longer.
fn open_header(path: &Path, no: u16) -> Result<(File, Header), OpenError> {
    let io = |source| OpenError::Io { path: path.to_owned(), source };
    // Asked before opening, since opening a pipe would wait for its other end.
    let stat = std::fs::metadata(path).map_err(io)?;
    if !stat.is_file() {
        return Err(OpenError::NotAFile { path: path.to_owned() });
    }
    let mut file = File::open(path).map_err(io)?;
    let n_file_bytes = file.metadata().map_err(io)?.len();
    let mut bytes = Vec::new();
    let mut wanted = FIRST_READ_BYTES;
    loop {
        let missing = wanted.saturating_sub(bytes.len() as u64);
        let n_new = (&mut file).take(missing).read_to_end(&mut bytes).map_err(io)?;
        match Header::parse(&bytes, n_file_bytes, no) {
            Ok(header) => return Ok((file, header)),
            Err(HeaderError::Truncated { needed, .. }) if n_new > 0 => {
                // Doubling at least keeps the work for parsing again linear in the header's size.
                wanted = needed.max(2 * bytes.len() as u64).min(MAX_HEADER_BYTES.max(needed));
            }
            Err(source) => return Err(OpenError::Header { path: path.to_owned(), source }),
        }
    }
}

#[cfg(unix)]
fn read_exact_at(file: &File, buf: &mut [u8], offset: u64) -> io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, buf, offset)
}

#[cfg(windows)]
fn read_exact_at(file: &File, mut buf: &mut [u8], mut offset: u64) -> io::Result<()> {
    while !buf.is_empty() {
        match std::os::windows::fs::FileExt::seek_read(file, buf, offset) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(n) => {
                buf = &mut buf[n..];
                offset += n as u64;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
