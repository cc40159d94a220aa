//! One file, from a server to the disk: resumable, over several connections, verified.
//!
//! ```text
//! NAME.gguf.part        bytes at their places, of the whole length from the start where that is known
//! NAME.gguf.part.json   what the file is, and which ranges are missing: the journal
//! NAME.gguf             renamed once all bytes are there and their SHA-256 is the hub's
//! ```
//!
//! Connections fetch ranges, each at its own place. Another thread hashes behind the first missing byte, so that the
//! sum is known when the last byte is; the caller's thread writes the journal every two seconds, after the bytes that
//! it speaks of are on the disk, and tells how far it is. A connection that a busy server refuses ends, and the others
//! go on. No more of the file is in memory than a piece for each connection.
//!
//! Where a server sends the whole file in place of a range, one connection reads it from the start. A file that changes
//! on the server is begun anew, once; where its SHA-256 is known, that alone tells whether it did.

use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use ring::digest::{Context, SHA256};
use serde::{Deserialize, Serialize};

use crate::client::{Client, Target};
use crate::error::{Again, FetchError};
use crate::files;
use crate::hub::MAX_FILE_BYTES;
use crate::ranges::Missing;
use crate::tries::{OnRetry, Tries};
use crate::url::without_query;

/// How every GGUF file begins.
const MAGIC: &[u8] = b"GGUF";

/// How often the journal is written: what comes in two seconds is all that a crash can lose.
const JOURNAL_EVERY: Duration = Duration::from_secs(2);

/// How often it is told how far the download is.
const TELL_EVERY: Duration = Duration::from_millis(100);

/// Ranges of long files have no fewer bytes than these: asking for one takes as long as these do over a gigabit line.
const LEAST_RANGE_BYTES: u64 = 8 << 20;

/// After how many bytes it is looked again whether the disk has room for as many more.
const ROOM_BYTES: u64 = 64 << 20;

/// Longest journal. There are hardly more ranges than connections; ten thousand would have 500 KB.
const MAX_JOURNAL_BYTES: u64 = 1 << 20;

/// Bytes hashed at once.
const HASH_BYTES: usize = 1 << 20;

/// A file could not be downloaded.
#[derive(Debug, thiserror::Error)]
pub enum DownloadError {
    /// It could not be fetched.
    #[error(transparent)]
    Fetch(#[from] FetchError),
    /// It could not be written.
    #[error("{} cannot be written: {source}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It is no model.
    #[error("{url} begins like no GGUF file; is it the address of a page about the model, not of the model itself?")]
    NotGguf {
        /// What was asked for.
        url: String,
    },
    /// It is not as long as the hub says.
    #[error("{url} has {found} bytes, but the hub says {expected}; try again later")]
    WrongLength {
        /// What was asked for.
        url: String,
        /// Bytes that it has.
        found: u64,
        /// Bytes that it should have.
        expected: u64,
    },
    /// What came is not what the hub has.
    #[error(
        "the bytes of {url} are wrong: their SHA-256 is {found}, but the hub says {expected}; they were removed, try \
         again"
    )]
    WrongBytes {
        /// What was asked for.
        url: String,
        /// Of what came.
        found: String,
        /// Of what the hub has.
        expected: String,
    },
}

/// What is to be downloaded.
#[derive(Debug, Clone)]
pub(crate) struct Wanted {
    pub url: String,
    /// Its length, as the hub says.
    pub n_bytes: Option<u64>,
    /// Its SHA-256, as the hub says.
    pub sha256: Option<String>,
}

/// What was downloaded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Downloaded {
    pub n_bytes: u64,
    pub sha256: String,
    pub etag: Option<String>,
}

/// What is known of a file that is not complete.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Journal {
    n_bytes: u64,
    etag: Option<String>,
    sha256: Option<String>,
    /// First byte and the one behind the last.
    missing: Vec<(u64, u64)>,
}

/// Who hears of a download.
#[derive(Clone, Copy)]
pub(crate) struct Watch<'a> {
    /// Bytes that are here.
    pub done: &'a (dyn Fn(u64) + Sync),
    pub on_retry: OnRetry<'a>,
}

/// Where the bytes are until all are there.
pub(crate) fn part_path(path: &Path) -> PathBuf {
    with_suffix(path, ".part")
}

fn journal_path(path: &Path) -> PathBuf {
    with_suffix(path, ".part.json")
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

/// Bytes that are here of a file that is not complete, as far as a download of what is `wanted`, which has this tag,
/// would go on from them.
pub(crate) fn n_done(path: &Path, wanted: &Wanted, etag: Option<&str>) -> u64 {
    let Some(n_bytes) = wanted.n_bytes else { return 0 };
    let fresh = Journal::fresh(wanted, n_bytes, etag);
    Journal::read(path, &fresh).map_or(0, |journal| journal.missing(1).n_done())
}

/// Bytes that are here of a file that somebody fetches, whether or not another download could go on from them.
pub(crate) fn n_come(path: &Path) -> u64 {
    let journal: Option<Journal> = files::read_json(&journal_path(path), MAX_JOURNAL_BYTES);
    journal.filter(|_| part_path(path).exists()).map_or(0, |journal| journal.missing(1).n_done())
}

/// Removes what is here of a file that is not complete.
pub(crate) fn discard(path: &Path) -> io::Result<()> {
    files::remove(&journal_path(path))?;
    files::remove(&part_path(path))
}

/// Downloads a file to `path`, going on with what is there of it.
///
/// # Errors
/// If it cannot be had or written, or is not what the hub says. What is there stays, unless it is wrong.
pub(crate) fn download(
    client: &Client,
    wanted: &Wanted,
    path: &Path,
    watch: Watch,
) -> Result<Downloaded, DownloadError> {
    let download = Download { client, wanted, path, watch };
    match download.run() {
        Err(DownloadError::Fetch(FetchError::Changed { .. })) => {
            tracing::warn!(url = without_query(&wanted.url), "changed on the server, beginning anew");
            // What is here of a file whose sum is known is not that file's only if the sum says so.
            if wanted.sha256.is_none() {
                download.write(discard(path))?;
            }
            download.run()
        }
        other => other,
    }
}

struct Download<'a> {
    client: &'a Client,
    wanted: &'a Wanted,
    path: &'a Path,
    watch: Watch<'a>,
}

impl Download<'_> {
    fn run(&self) -> Result<Downloaded, DownloadError> {
        let (target, knows_ranges) = self.probe()?;
        let fetched = match target.n_bytes.filter(|_| knows_ranges) {
            Some(n_bytes) => match self.fetch_ranges(&target, n_bytes) {
                Err(DownloadError::Fetch(FetchError::NoRanges { .. })) => self.fetch_whole(&target),
                other => other,
            },
            None => self.fetch_whole(&target),
        };
        let (sha256, n_bytes) = fetched?;
        if let Some(expected) = self.wanted.sha256.clone().filter(|expected| *expected != sha256) {
            self.write(discard(self.path))?;
            return Err(DownloadError::WrongBytes { url: self.url(), found: sha256, expected });
        }
        self.write(std::fs::rename(part_path(self.path), self.path))?;
        self.write(files::remove(&journal_path(self.path)))?;
        self.write(self.path.parent().map_or(Ok(()), files::sync_dir))?;
        Ok(Downloaded { n_bytes, sha256, etag: target.etag })
    }

    fn url(&self) -> String {
        without_query(&self.wanted.url).to_owned()
    }

    fn write<T>(&self, result: io::Result<T>) -> Result<T, DownloadError> {
        result.map_err(|source| DownloadError::Write { path: self.path.to_owned(), source })
    }

    /// What the file is, and whether the server knows ranges.
    fn probe(&self) -> Result<(Target, bool), DownloadError> {
        let mut bytes = Vec::new();
        let n_bytes = MAGIC.len() as u64;
        let (target, knows_ranges) = self.client.probe(&self.wanted.url, n_bytes, &mut bytes, self.watch.on_retry)?;
        if bytes != MAGIC {
            return Err(DownloadError::NotGguf { url: self.url() });
        }
        match (target.n_bytes, self.wanted.n_bytes) {
            (Some(found), Some(expected)) if found != expected => {
                Err(DownloadError::WrongLength { url: self.url(), found, expected })
            }
            (found, expected) => {
                let has_sum = self.wanted.sha256.is_some();
                let etag = target.etag.filter(|_| !has_sum);
                Ok((Target { n_bytes: found.or(expected), etag, has_sum, ..target }, knows_ranges))
            }
        }
    }

    /// Fetches what is missing; says SHA-256 and length.
    fn fetch_ranges(&self, target: &Target, n_bytes: u64) -> Result<(String, u64), DownloadError> {
        let limits = self.client.limits();
        let (part, journal_path) = (part_path(self.path), journal_path(self.path));
        let fresh = Journal::fresh(self.wanted, n_bytes, target.etag.as_deref());
        // Before the file is there, so that bytes are never taken for those of another file.
        let journal = Journal::read(self.path, &fresh).unwrap_or(fresh);
        self.write(files::write_json(&journal_path, &journal))?;
        let open = OpenOptions::new().create(true).truncate(false).read(true).write(true).open(&part);
        let file = self.write(open)?;
        self.write(file.set_len(n_bytes))?;
        let work = Work::new(journal.missing(limits.n_connections));
        let result = std::thread::scope(|scope| {
            let (ended, ends) = mpsc::channel();
            for connection in 0..limits.n_connections {
                let (ended, work, file) = (ended.clone(), &work, &file);
                scope.spawn(move || {
                    let result = self.fetch_some(work, file, target, connection);
                    if result.is_err() {
                        work.end();
                    }
                    let _ = ended.send(result);
                });
            }
            drop(ended);
            let hasher = scope.spawn(|| work.hash(&part, n_bytes));
            let fetched = self.keep_journal(&work, &file, &journal, &ends);
            work.end();
            let hashed = hasher.join().unwrap_or_else(|_| Err(io::Error::other("the thread that hashes ended")));
            fetched?;
            self.write(hashed)
        });
        let sha256 = result?;
        self.write(file.sync_all())?;
        Ok((sha256, n_bytes))
    }

    /// One connection: fetches ranges until there are none.
    fn fetch_some(&self, work: &Work, file: &File, target: &Target, connection: usize) -> Result<(), DownloadError> {
        let limits = self.client.limits();
        // Each connection gets something of a short file.
        let share = target.n_bytes.unwrap_or(0) / limits.n_connections.max(1) as u64;
        let most = share.max(LEAST_RANGE_BYTES).min(limits.range_bytes);
        while let Some(range) = work.take(connection, most) {
            let mut at = range.start;
            let mut sink = |piece: &[u8]| {
                files::write_all_at(file, piece, at)?;
                at += piece.len() as u64;
                if work.advance(connection, piece.len() as u64) {
                    Ok(())
                } else {
                    Err(io::ErrorKind::Interrupted.into())
                }
            };
            let read = self.client.read(target, range, None, self.watch.on_retry, &mut sink);
            let n_others = work.release(connection);
            match read {
                Ok(_) => {}
                Err(_) if work.is_over() => return Ok(()),
                // As many as the server likes: the others fetch what is left.
                Err(error) if n_others > 0 && error.again() != Again::Never => {
                    tracing::info!(%error, "going on with one connection less");
                    return Ok(());
                }
                Err(FetchError::Sink { source, .. }) => return self.write(Err(source)),
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// Writes the journal and tells how far it is, until all connections have ended.
    fn keep_journal(
        &self,
        work: &Work,
        file: &File,
        journal: &Journal,
        ends: &mpsc::Receiver<Result<(), DownloadError>>,
    ) -> Result<(), DownloadError> {
        let (mut result, mut written) = (Ok(()), Instant::now());
        let save = |missing: &[std::ops::Range<u64>]| {
            // What the journal calls present must be on the disk before the journal is.
            file.sync_data()?;
            let missing = missing.iter().map(|range| (range.start, range.end)).collect();
            files::write_json(&journal_path(self.path), &Journal { missing, ..journal.clone() })
        };
        loop {
            match ends.recv_timeout(TELL_EVERY) {
                Ok(Err(error)) if result.is_ok() => result = Err(error),
                Ok(_) => {}
                Err(RecvTimeoutError::Timeout) => (self.watch.done)(work.lock().missing.n_done()),
                Err(RecvTimeoutError::Disconnected) => break,
            }
            if written.elapsed() >= JOURNAL_EVERY {
                let missing = work.lock().missing.all();
                if let Err(error) = save(&missing) {
                    work.end();
                    result = result.and(self.write(Err(error)));
                }
                written = Instant::now();
            }
        }
        let missing = work.lock().missing.all();
        (self.watch.done)(work.lock().missing.n_done());
        // A full disk is what the error says already.
        let saved = self.write(save(&missing));
        result.and(saved)
    }

    /// Reads the file from its start, as often as it makes sense; says SHA-256 and length.
    fn fetch_whole(&self, target: &Target) -> Result<(String, u64), DownloadError> {
        self.write(files::remove(&journal_path(self.path)))?;
        let part = part_path(self.path);
        let mut tries = Tries::new(self.client.limits(), None, self.watch.on_retry);
        loop {
            let file = self.write(File::create(&part))?;
            let mut room = Room { dir: self.path.parent(), reserve: self.client.limits().reserve_bytes, checked: None };
            let (mut context, mut n_bytes, mut told) = (Context::new(&SHA256), 0u64, Instant::now());
            let mut sink = |piece: &[u8]| {
                room.check(n_bytes)?;
                files::write_all_at(&file, piece, n_bytes)?;
                context.update(piece);
                n_bytes += piece.len() as u64;
                if told.elapsed() >= TELL_EVERY {
                    (self.watch.done)(n_bytes);
                    told = Instant::now();
                }
                Ok(())
            };
            let read = self.client.read_whole(target, &mut sink);
            if read.is_err() {
                // Nothing of it can be gone on from.
                self.write(discard(self.path))?;
            }
            match read {
                Ok(()) => {
                    self.write(file.sync_all())?;
                    (self.watch.done)(n_bytes);
                    return Ok((hex(context.finish().as_ref()), n_bytes));
                }
                Err(FetchError::Sink { source, .. }) => return self.write(Err(source)),
                // However much came is no progress.
                Err(error) => tries.failed(error, 0)?,
            }
        }
    }
}

/// Looks whether a disk has room for what comes, where nobody says how much that is.
struct Room<'a> {
    dir: Option<&'a Path>,
    reserve: u64,
    /// Up to where there was room.
    checked: Option<u64>,
}

impl Room<'_> {
    /// Whether the bytes behind the first `n_bytes` may be written.
    fn check(&mut self, n_bytes: u64) -> io::Result<()> {
        if self.checked.is_some_and(|checked| n_bytes < checked) {
            return Ok(());
        }
        let free = self.dir.and_then(files::free_bytes).unwrap_or(u64::MAX);
        if n_bytes > MAX_FILE_BYTES || free < self.reserve.saturating_add(ROOM_BYTES) {
            let why = format!(
                "it is {n_bytes} bytes long and goes on, and the disk has {free} left; remove something (`brigade \
                 models prune`), or name another disk with --models-dir"
            );
            return Err(io::Error::new(io::ErrorKind::StorageFull, why));
        }
        self.checked = Some(n_bytes.saturating_add(ROOM_BYTES));
        Ok(())
    }
}

impl Journal {
    /// Of a file of which nothing is here.
    fn fresh(wanted: &Wanted, n_bytes: u64, etag: Option<&str>) -> Self {
        let missing = vec![(0, n_bytes)];
        Self { n_bytes, etag: etag.map(str::to_owned), sha256: wanted.sha256.clone(), missing }
    }

    /// What was noted of the file at `path`, if it speaks of the same bytes as `fresh` and they are there.
    fn read(path: &Path, fresh: &Self) -> Option<Self> {
        let found: Self = files::read_json(&journal_path(path), MAX_JOURNAL_BYTES)?;
        let length = std::fs::metadata(part_path(path)).ok()?.len();
        (found.is_of_same_file(fresh) && length == fresh.n_bytes).then_some(found)
    }

    fn missing(&self, n_connections: usize) -> Missing {
        let ranges = self.missing.iter().map(|(start, end)| *start..*end).collect();
        Missing::new(self.n_bytes, n_connections, ranges)
    }

    /// Whether it is sure that both speak of the same bytes.
    fn is_of_same_file(&self, other: &Self) -> bool {
        let is_same_sum = self.sha256.is_some() && self.sha256 == other.sha256;
        let is_same_tag = self.etag.is_some() && self.etag == other.etag;
        self.n_bytes == other.n_bytes && self.sha256 == other.sha256 && (is_same_sum || is_same_tag)
    }
}

/// What the threads of a download share.
struct Work {
    state: Mutex<State>,
    /// Something came, or it is over.
    moved: Condvar,
}

struct State {
    missing: Missing,
    is_over: bool,
}

impl Work {
    fn new(missing: Missing) -> Self {
        Self { state: Mutex::new(State { missing, is_over: false }), moved: Condvar::new() }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take(&self, connection: usize, most: u64) -> Option<std::ops::Range<u64>> {
        let mut state = self.lock();
        if state.is_over { None } else { state.missing.take(connection, most) }
    }

    /// Notes bytes that came; false if nobody wants more.
    fn advance(&self, connection: usize, n_bytes: u64) -> bool {
        let mut state = self.lock();
        state.missing.advance(connection, n_bytes);
        self.moved.notify_all();
        !state.is_over
    }

    /// Gives back what is left; says how many other connections go on.
    fn release(&self, connection: usize) -> usize {
        let mut state = self.lock();
        state.missing.release(connection);
        state.missing.n_busy()
    }

    fn end(&self) {
        self.lock().is_over = true;
        self.moved.notify_all();
    }

    fn is_over(&self) -> bool {
        self.lock().is_over
    }

    /// Hashes the file at `path` as it grows; the SHA-256 of what is there when it is over.
    fn hash(&self, path: &Path, n_bytes: u64) -> io::Result<String> {
        let mut file = File::open(path)?;
        let (mut context, mut hashed, mut piece) = (Context::new(&SHA256), 0u64, vec![0; HASH_BYTES]);
        while hashed < n_bytes {
            let frontier = {
                let mut state = self.lock();
                while state.missing.frontier() == hashed && !state.is_over {
                    state = self.moved.wait(state).unwrap_or_else(PoisonError::into_inner);
                }
                state.missing.frontier()
            };
            if frontier == hashed {
                break;
            }
            while hashed < frontier {
                let most = usize::try_from(frontier - hashed).unwrap_or(usize::MAX).min(HASH_BYTES);
                file.read_exact(&mut piece[..most])?;
                context.update(&piece[..most]);
                hashed += most as u64;
            }
        }
        Ok(hex(context.finish().as_ref()))
    }
}

/// Lower-case hexadecimal digits.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
