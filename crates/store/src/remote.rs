//! A model on a server, of which ranges are read: its header, and whatever bytes of its tensors somebody needs.
//!
//! A [`RemoteLocation`] says where its files are, holds no secret, and may be sent to other nodes. [`RemoteFiles`]
//! reads ranges of them; it has done no request yet when it is made. [`RemoteModel`] has read the header too.
//!
//! A header says of itself how long it is at least, so ranges of growing length are asked for until it is whole; a few
//! hundred KiB for a small vocabulary, some MiB for a large one. All files of a model share one budget of bytes and
//! time, whatever servers send.

use std::io;
use std::time::{Duration, Instant};

use brigade_gguf::{Catalog, HeaderError, TensorSource};
use serde::{Deserialize, Serialize};

use crate::client::{Client, Target};
use crate::error::FetchError;
use crate::split::MAX_PARTS;
use crate::url::{refusal, without_query};

/// What is read of a file at first: most headers of files behind the first, and all of a model with few tokens.
const FIRST_READ_BYTES: u64 = 256 << 10;

/// Longest header that is read. The longest known ones have 20 MiB; a file that needs more is not what was meant, and
/// is read over somebody's mobile phone.
const MAX_HEADER_BYTES: u64 = 64 << 20;

/// Most ranges of one header: each is at least twice as long as what is there, so it is whole after log2 of
/// [`MAX_HEADER_BYTES`] / [`FIRST_READ_BYTES`] and the first.
const MAX_READS: u32 = (MAX_HEADER_BYTES / FIRST_READ_BYTES).ilog2() + 1;

/// Most bytes of all headers of a model: the longest one, and what is read at first of each other file.
const MAX_BYTES: u64 = MAX_HEADER_BYTES + MAX_PARTS as u64 * FIRST_READ_BYTES;

/// How long all headers may take: [`MAX_BYTES`] over a link of 2 MB/s, and a tenth of a second to ask for each file.
const TIME: Duration = Duration::from_secs(160);

/// Where the files of a model are. Without secrets: who may read them only with a token needs one of their own.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RemoteLocation {
    /// Its files in their order; a model that is not split has one. At least one, at most 512.
    pub parts: Vec<RemotePart>,
    /// Whether everybody may read them. Where not, other nodes must not be sent there: they have no token.
    pub is_public: bool,
}

/// A file on a server.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RemotePart {
    /// Where it is; the server may redirect from there.
    pub url: String,
    /// Its length.
    pub n_bytes: u64,
    /// SHA-256 of its bytes as 64 hexadecimal digits, where the hub tells it.
    pub sha256: Option<String>,
    /// The tag that the server gives the file as long as its bytes are the same.
    pub etag: Option<String>,
}

impl RemotePart {
    pub(crate) fn target(&self) -> Target {
        Target { url: self.url.clone(), n_bytes: Some(self.n_bytes), etag: self.etag.clone(), ..Target::default() }
    }
}

impl RemoteLocation {
    /// Bytes of all files.
    pub fn n_bytes(&self) -> u64 {
        self.parts.iter().map(|part| part.n_bytes).fold(0, u64::saturating_add)
    }
}

/// The files of a model on a server.
#[derive(Clone)]
pub struct RemoteFiles {
    client: Client,
    location: RemoteLocation,
}

impl RemoteFiles {
    /// The files at `location`, which may come from another node. Nothing is asked for yet.
    ///
    /// # Errors
    /// If an address is neither encrypted nor on this machine, or there are no files or too many.
    pub fn new(client: Client, location: RemoteLocation) -> Result<Self, FetchError> {
        if location.parts.is_empty() || location.parts.len() > MAX_PARTS as usize {
            return Err(FetchError::Address { url: String::new(), why: "are too many files, or none" });
        }
        for part in &location.parts {
            if let Some(why) = refusal(&part.url) {
                return Err(FetchError::Address { url: without_query(&part.url).to_owned(), why });
            }
        }
        Ok(Self { client, location })
    }

    /// Where they are.
    pub fn location(&self) -> &RemoteLocation {
        &self.location
    }

    /// Fills `buf` with the bytes of file `part` from `offset` on. Asks again for what breaks off, so it may take some
    /// time; gives up where nothing moves. The bytes are as the server sent them: who uses them compares a hash.
    ///
    /// # Errors
    /// If the range is not in the file, the file has changed, or the bytes cannot be had.
    pub fn read_range(&self, part: usize, offset: u64, buf: &mut [u8]) -> Result<(), FetchError> {
        let n_wanted = buf.len() as u64;
        let outside = |url: &str| FetchError::Outside {
            url: without_query(url).to_owned(),
            start: offset,
            end: offset.saturating_add(n_wanted),
        };
        let part = self.location.parts.get(part).ok_or_else(|| outside(""))?;
        let end = offset.checked_add(n_wanted).filter(|end| *end <= part.n_bytes).ok_or_else(|| outside(&part.url))?;
        if buf.is_empty() {
            return Ok(());
        }
        let mut rest = buf;
        self.client.read(&part.target(), offset..end, None, &log_retry, &mut |piece| {
            let (here, behind) = std::mem::take(&mut rest)
                .split_at_mut_checked(piece.len())
                .ok_or_else(|| io::Error::other("more bytes than were asked for"))?;
            here.copy_from_slice(piece);
            rest = behind;
            Ok(())
        })?;
        Ok(())
    }
}

/// For readers that have nobody to tell.
pub(crate) fn log_retry(error: &FetchError, pause: Duration) {
    tracing::info!(%error, ?pause, "asking again");
}

/// A model on a server, whose header has been read.
pub struct RemoteModel {
    files: RemoteFiles,
    catalog: Catalog,
}

impl RemoteModel {
    /// Reads the header of each file at `location`.
    ///
    /// # Errors
    /// If one cannot be had, or is unsound, or has changed.
    pub fn open(client: Client, location: RemoteLocation) -> Result<Self, FetchError> {
        let files = RemoteFiles::new(client, location)?;
        let mut budget = Budget::new();
        let mut parts = Vec::new();
        for part in &files.location.parts {
            let (bytes, target) = read_header(&files.client, part.target(), &mut budget)?;
            parts.push((bytes, target.n_bytes.unwrap_or(part.n_bytes)));
        }
        let catalog = parse(&files.location.parts[0].url, &parts)?;
        Ok(Self { files, catalog })
    }

    /// Reads the headers of the files at `urls`, of which nothing else is known.
    ///
    /// # Errors
    /// As [`RemoteModel::open`], or if there are no URLs.
    pub fn open_urls(client: Client, urls: &[String], is_public: bool) -> Result<Self, FetchError> {
        let (mut budget, mut parts, mut location) = (Budget::new(), Vec::new(), Vec::new());
        for url in urls {
            let unknown = Target { url: url.clone(), ..Target::default() };
            let (bytes, target) = read_header(&client, unknown, &mut budget)?;
            let n_bytes = target.n_bytes.unwrap_or(bytes.len() as u64);
            parts.push((bytes, n_bytes));
            location.push(RemotePart { url: url.clone(), n_bytes, sha256: None, etag: target.etag });
        }
        let files = RemoteFiles::new(client, RemoteLocation { parts: location, is_public })?;
        let catalog = parse(&files.location.parts[0].url, &parts)?;
        Ok(Self { files, catalog })
    }

    /// The model's header. A tensor's `file` is its part, its `offset` counts from the start of that.
    pub fn catalog(&self) -> &Catalog {
        &self.catalog
    }

    /// Where its files are, with lengths and tags.
    pub fn location(&self) -> &RemoteLocation {
        &self.files.location
    }

    /// Its files.
    pub fn files(&self) -> &RemoteFiles {
        &self.files
    }

    /// As [`RemoteFiles::read_range`].
    ///
    /// # Errors
    /// The same.
    pub fn read_range(&self, part: usize, offset: u64, buf: &mut [u8]) -> Result<(), FetchError> {
        self.files.read_range(part, offset, buf)
    }
}

impl TensorSource for RemoteModel {
    fn read_tensor(&self, tensor_idx: usize, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let outside = || io::Error::new(io::ErrorKind::InvalidInput, "the range is outside of the tensor");
        let tensor = self.catalog.tensors().get(tensor_idx).ok_or_else(outside)?;
        offset.checked_add(buf.len() as u64).filter(|end| *end <= tensor.n_bytes).ok_or_else(outside)?;
        Ok(self.read_range(usize::from(tensor.file), tensor.offset + offset, buf)?)
    }
}

fn parse(url: &str, parts: &[(Vec<u8>, u64)]) -> Result<Catalog, FetchError> {
    Catalog::parse_parts(parts).map_err(|source| FetchError::Header { url: without_query(url).to_owned(), source })
}

/// What all files of a model may take together.
struct Budget {
    n_bytes_left: u64,
    deadline: Instant,
}

impl Budget {
    fn new() -> Self {
        Self { n_bytes_left: MAX_BYTES, deadline: Instant::now() + TIME }
    }
}

/// The beginning of a file, which holds the whole header, and what the file is.
fn read_header(client: &Client, target: Target, budget: &mut Budget) -> Result<(Vec<u8>, Target), FetchError> {
    let url = || without_query(&target.url).to_owned();
    let (mut bytes, mut known, mut wanted) = (Vec::new(), target.clone(), FIRST_READ_BYTES);
    for _ in 0..MAX_READS {
        let start = bytes.len() as u64;
        budget.n_bytes_left = budget.n_bytes_left.checked_sub(wanted - start).ok_or_else(|| FetchError::TooMuch {
            url: url(),
            what: "the headers of all files",
            limit: MAX_BYTES,
        })?;
        let mut keep = |piece: &[u8]| {
            bytes.extend_from_slice(piece);
            Ok(())
        };
        known = match client.read(&known, start..wanted, Some(budget.deadline), &log_retry, &mut keep) {
            Ok(known) => known,
            Err(FetchError::Outside { start, .. }) => {
                let source = HeaderError::Truncated { needed: start + 1, available: start };
                return Err(FetchError::Header { url: url(), source });
            }
            Err(error) => return Err(error),
        };
        let (n_read, n_file_bytes) = (bytes.len() as u64, known.n_bytes.unwrap_or(0));
        match Catalog::parse(&bytes, n_file_bytes) {
            Ok(_) => return Ok((bytes, known)),
            Err(HeaderError::Truncated { needed, .. }) if n_read < n_file_bytes => {
                if needed > MAX_HEADER_BYTES || n_read >= MAX_HEADER_BYTES {
                    return Err(FetchError::TooLong { url: url(), needed, limit: MAX_HEADER_BYTES });
                }
                // Doubling at least keeps the number of requests and the work of parsing again small.
                wanted = needed.max(2 * n_read).min(MAX_HEADER_BYTES).min(n_file_bytes);
            }
            Err(source) => return Err(FetchError::Header { url: url(), source }),
        }
    }
    Err(FetchError::TooLong { url: url(), needed: bytes.len() as u64 + 1, limit: MAX_HEADER_BYTES })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::settings::Settings;

    fn client() -> Client {
        Client::new(Settings::at("https://hub.invalid").unwrap())
    }

    fn location(url: &str) -> RemoteLocation {
        let part = RemotePart { url: url.to_owned(), n_bytes: 10, sha256: None, etag: None };
        RemoteLocation { parts: vec![part], is_public: true }
    }

    #[test]
    fn all_files_share_a_budget() {
        assert_eq!(FIRST_READ_BYTES << (MAX_READS - 1), MAX_HEADER_BYTES);
        let mut budget = Budget::new();
        budget.deadline = Instant::now();
        let target = location("http://127.0.0.1:1/a").parts[0].target();
        let late = read_header(&client(), target.clone(), &mut budget).unwrap_err();
        assert!(matches!(late, FetchError::TooSlow { .. }), "{late}");
        let mut budget = Budget { n_bytes_left: FIRST_READ_BYTES - 1, ..Budget::new() };
        let large = read_header(&client(), target, &mut budget).unwrap_err();
        assert!(matches!(large, FetchError::TooMuch { .. }), "{large}");
    }

    #[test]
    fn a_location_of_another_node_is_checked() {
        for bad in ["http://h/a", "file:///etc/passwd", ""] {
            assert!(RemoteFiles::new(client(), location(bad)).is_err(), "{bad}");
        }
        assert!(RemoteFiles::new(client(), RemoteLocation { parts: Vec::new(), is_public: true }).is_err());
        let files = RemoteFiles::new(client(), location("https://h/a")).unwrap();
        let outside = files.read_range(0, 5, &mut [0; 6]).unwrap_err();
        assert!(matches!(outside, FetchError::Outside { .. }), "{outside}");
        assert!(files.read_range(1, 0, &mut [0; 1]).is_err());
        assert!(files.read_range(0, u64::MAX, &mut [0; 1]).is_err());
    }
}
