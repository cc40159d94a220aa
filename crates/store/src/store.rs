//! Models on disk, and how they get there.
//!
//! ```text
//! source -> resolve: which files, how long, which hashes (the hub, or the web server)
//!        -> the folder for them; if all is there, used at once
//!        -> else locked and downloaded, or waited for while another process does
//!        -> Opened: the path, held so that nobody removes it
//! ```
//!
//! Without a network (or with `is_offline`) the folder is looked for by what was asked for before, and where all is
//! here, nobody is waited for for long. So it is where a newer version cannot be fetched now, or has no room. A file
//! that is named by its path is held if it lies in a models directory.

use std::fs::{self, File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use brigade_base::ByteSize;
use brigade_gguf::{Catalog, ModelFile, OpenError};

use crate::choose::{ChoiceError, HubFile, choose};
use crate::client::Client;
use crate::download::{DownloadError, Wanted, Watch, download};
use crate::entry::{Entry, FileEntry, LOCKS, Origin, is_models_file, local_name, model_name, query_sum};
use crate::error::FetchError;
use crate::files;
use crate::find::{Held, MAX_POLLS, POLL, hold};
use crate::hub;
use crate::progress::{Event, Listener};
use crate::remote::{RemoteLocation, RemoteModel};
use crate::source::{HubSource, ModelSource, SourceError};
use crate::url::{file_name, part_urls, without_query};

/// Bytes by which a web server's file is recognised.
const PROBE_BYTES: u64 = 4;

/// A model could not be had.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The text names none.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// It could not be fetched.
    #[error(transparent)]
    Fetch(#[from] FetchError),
    /// A file of it could not be downloaded.
    #[error(transparent)]
    Download(#[from] DownloadError),
    /// It is not clear which files it is.
    #[error("{repository} at {revision} {source}")]
    Choice {
        /// `OWNER/REPOSITORY`.
        repository: String,
        /// Branch, tag or commit.
        revision: String,
        /// Why.
        source: ChoiceError,
    },
    /// It is not on disk, and servers are not to be asked.
    #[error(
        "{source_text} is not among the models in {}, and this runs offline; pull it first: brigade pull {source_text}",
        dir.display()
    )]
    NotHere {
        /// What was asked for.
        source_text: String,
        /// The models directory.
        dir: PathBuf,
    },
    /// Not all of it is on disk, and servers are not to be asked.
    #[error(
        "{source_text} is not complete in {} ({} are here), and this runs offline; pull the rest first: brigade pull \
         {source_text}",
        dir.display(), ByteSize(*n_done)
    )]
    Incomplete {
        /// What was asked for.
        source_text: String,
        /// Bytes that are on disk.
        n_done: u64,
        /// The models directory.
        dir: PathBuf,
    },
    /// The disk is too full.
    #[error(
        "{name} needs {} more, and {} are to stay free, but {} has {}; remove something (`brigade models prune`), or \
         name another disk with --models-dir",
        ByteSize(*needed), ByteSize(*reserve), dir.display(), ByteSize(*free)
    )]
    NoSpace {
        /// The model.
        name: String,
        /// Bytes that are to come.
        needed: u64,
        /// Bytes that stay free.
        reserve: u64,
        /// Bytes that are free.
        free: u64,
        /// Where.
        dir: PathBuf,
    },
    /// It is to be fetched again, and cannot be as long as somebody reads it.
    #[error(
        "{name} is in use and damaged: files of it are cut or missing in {}; end the process that uses it, and pull it \
         again",
        dir.display()
    )]
    InUse {
        /// The model.
        name: String,
        /// Its folder.
        dir: PathBuf,
    },
    /// What came has no hash to compare with, and is damaged.
    #[error("what came is damaged and was removed, try again: {source}")]
    Damaged {
        /// What is wrong.
        source: Box<OpenError>,
    },
    /// A file is no sound model.
    #[error(transparent)]
    File {
        /// Why.
        source: Box<OpenError>,
    },
    /// The models directory cannot be used.
    #[error("{} cannot be used: {source}", path.display())]
    Io {
        /// What.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// No model is called so.
    #[error("no model here is called {name:?}; `brigade models` lists them")]
    UnknownName {
        /// What was asked for.
        name: String,
    },
    /// Several models are called so.
    #[error("{name:?} may be several models here, name one of them: {choices}")]
    AmbiguousName {
        /// What was asked for.
        name: String,
        /// As what they can be asked for.
        choices: String,
    },
}

/// A models directory.
pub struct Store {
    dir: PathBuf,
    client: Client,
}

/// A model that is on disk. As long as it is held, nobody prunes it.
#[derive(Debug)]
pub struct Opened {
    /// Its first file; the other parts are beside it.
    pub path: PathBuf,
    /// Where it came from, for those who fetch parts of it. Only to be handed on if it says `is_public`.
    pub location: Option<RemoteLocation>,
    pub(crate) _held: Option<Held>,
}

/// What a source is now, by its server.
struct Resolved {
    entry: Entry,
    wanted: Vec<Wanted>,
    /// All GGUF files of its repository; none of a web server.
    listed: Vec<HubFile>,
}

/// What is in a model's folder.
pub(crate) enum Found {
    /// All of it.
    Here(Opened),
    /// Not all of it.
    Incomplete,
    /// Somebody fetches, removes or looks at it.
    Locked,
}

impl Store {
    /// The directory `dir`, filled by `client`. It is made when something is put there.
    pub fn new(dir: PathBuf, client: Client) -> Self {
        Self { dir, client }
    }

    /// Where it is.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The model at `source`, fetched if it is not here.
    ///
    /// # Errors
    /// If it cannot be had.
    pub fn open(&self, source: &ModelSource, listener: Listener) -> Result<Opened, StoreError> {
        if let ModelSource::Local(path) = source {
            return Ok(Opened { path: path.clone(), location: None, _held: hold(path) });
        }
        if self.client.settings().is_offline {
            return self.open_here(source, listener)?.ok_or_else(|| self.not_here(source));
        }
        let opened = self.resolve(source, &self.asker(source), listener).and_then(|found| {
            let opened = self.fetch(&found, listener)?;
            // Only now: as long as it was not here, what was here before could be used in its place.
            self.forget_others(&found.entry, &found.listed);
            Ok(opened)
        });
        opened.or_else(|error| self.fall_back(error, source, listener))
    }

    /// Name and header of the model at `source`; of one that is not here only the header is read.
    ///
    /// # Errors
    /// If it cannot be had, or is unsound.
    pub fn look(&self, source: &ModelSource, listener: Listener) -> Result<(String, Catalog), StoreError> {
        let remote = match source {
            ModelSource::Local(_) => return look_at(&self.open(source, listener)?.path),
            _ if self.client.settings().is_offline => return look_at(&self.open(source, listener)?.path),
            ModelSource::Hub(hub) => {
                self.resolve_hub(hub, &self.asker(source), listener).and_then(|found| self.look_at(&found, listener))
            }
            ModelSource::Web { url } => {
                // Nobody else is sent there.
                let found = RemoteModel::open_urls(self.asker(source), &part_urls(url), false);
                found.map(|model| (model_name(file_name(url)), model.catalog().clone())).map_err(StoreError::from)
            }
        };
        remote.or_else(|error| look_at(&self.fall_back(error, source, listener)?.path))
    }

    /// What is here of `source`, where `error` leaves no better; else that.
    fn fall_back(&self, error: StoreError, source: &ModelSource, listener: Listener) -> Result<Opened, StoreError> {
        let Some(why) = error.excuse() else { return Err(error) };
        match self.open_here(source, listener)? {
            Some(opened) => {
                listener(Event::Fallback { why });
                Ok(opened)
            }
            None => Err(error),
        }
    }

    /// Whom to ask what `source` is now: where all of it is here already, nobody waits for long.
    fn asker(&self, source: &ModelSource) -> Client {
        let is_here = self.find_here(source).is_ok_and(|found| found.is_some());
        if is_here { self.client.hasty() } else { self.client.clone() }
    }

    fn not_here(&self, source: &ModelSource) -> StoreError {
        let (source_text, dir) = (source.to_string(), self.dir.clone());
        let n_done = |entry: &Entry| entry.n_done(&dir.join(&entry.id)).iter().sum::<u64>();
        match self.found_as(source).unwrap_or_default().iter().map(n_done).max() {
            Some(n_done) => StoreError::Incomplete { source_text, n_done, dir },
            None => StoreError::NotHere { source_text, dir },
        }
    }

    fn look_at(&self, found: &Resolved, listener: Listener) -> Result<(String, Catalog), StoreError> {
        let entry = &found.entry;
        if let Found::Here(opened) = self.use_complete(entry, false, listener)? {
            self.forget_others(entry, &found.listed);
            return look_at(&opened.path);
        }
        let location = entry.location().unwrap_or(RemoteLocation { parts: Vec::new(), is_public: false });
        let model = RemoteModel::open(self.client.clone(), location)?;
        Ok((entry.name.clone(), model.catalog().clone()))
    }

    /// What `source` is now, by its server.
    fn resolve(&self, source: &ModelSource, client: &Client, listener: Listener) -> Result<Resolved, StoreError> {
        match source {
            ModelSource::Hub(source) => self.resolve_hub(source, client, listener),
            ModelSource::Web { url } => self.resolve_web(url, client, listener),
            ModelSource::Local(path) => {
                let source = io::Error::new(io::ErrorKind::InvalidInput, "this file needs not be fetched");
                Err(StoreError::Io { path: path.clone(), source })
            }
        }
    }

    fn resolve_hub(&self, source: &HubSource, client: &Client, listener: Listener) -> Result<Resolved, StoreError> {
        let repository = &source.repository;
        let on_retry = |error: &FetchError, pause| listener(Event::Retrying { why: error.fact(), pause });
        let revision = hub::revision(client, repository, source.revision(), &on_retry)?;
        let listed = hub::files(client, repository, &revision.commit, &on_retry)?;
        let chosen = choose(&listed, &source.pick).map_err(|error| choice_error(source, error))?;
        let origin = Origin::Hub {
            repository: repository.clone(),
            commit: revision.commit.clone(),
            revisions: vec![source.revision().to_owned()],
        };
        let file = |file: HubFile| FileEntry {
            name: local_name(file.path.rsplit('/').next().unwrap_or(&file.path)),
            url: hub::file_url(client, repository, &revision.commit, &file.path),
            path: file.path,
            n_bytes: Some(file.n_bytes),
            sha256: file.sha256,
            etag: None,
        };
        let files: Vec<_> = chosen.into_iter().map(file).collect();
        let wanted = files.iter().map(|file| file.wanted(file.url.clone())).collect();
        Ok(Resolved { entry: Entry::new(origin, revision.is_public, files, now()), wanted, listed })
    }

    fn resolve_web(&self, url: &str, client: &Client, listener: Listener) -> Result<Resolved, StoreError> {
        let on_retry = |error: &FetchError, pause| listener(Event::Retrying { why: error.fact(), pause });
        let urls = part_urls(url);
        // What stands behind the path may be a key.
        let (mut files, mut is_public) = (Vec::new(), without_query(url) == url);
        for url in &urls {
            let mut beginning = Vec::new();
            let (target, _) = client.probe(url, PROBE_BYTES, &mut beginning, &on_retry)?;
            // Others have no token.
            is_public &= !target.had_token;
            let name = file_name(url);
            files.push(FileEntry {
                name: local_name(name),
                path: name.to_owned(),
                url: without_query(url).to_owned(),
                n_bytes: target.n_bytes,
                sha256: None,
                etag: target.etag,
            });
        }
        let wanted = files.iter().zip(&urls).map(|(file, url)| file.wanted(url.clone())).collect();
        let shown = urls.first().map_or(url, |first| without_query(first)).to_owned();
        let origin = Origin::Web { url: shown, query_sha256: query_sum(url) };
        Ok(Resolved { entry: Entry::new(origin, is_public, files, now()), wanted, listed: Vec::new() })
    }

    /// Sees to it that all files of an entry are here.
    fn fetch(&self, found: &Resolved, listener: Listener) -> Result<Opened, StoreError> {
        let entry = &found.entry;
        let dir = self.dir.join(&entry.id);
        let (mut is_new, mut n_used) = (false, 0);
        loop {
            let is_locked = match self.use_complete(entry, is_new, listener)? {
                Found::Here(opened) => return Ok(opened),
                Found::Incomplete => false,
                Found::Locked => true,
            };
            let lock = self.lock_file(&entry.id)?;
            match lock.try_lock() {
                Ok(()) => {
                    is_new = true;
                    self.download(entry.clone(), &dir, &found.wanted, listener)?;
                }
                // Nobody fetches it: others use it, or look at it for a moment.
                Err(TryLockError::WouldBlock) if !is_locked => {
                    n_used += 1;
                    if n_used > MAX_POLLS {
                        return Err(StoreError::InUse { name: entry.name.clone(), dir });
                    }
                    std::thread::sleep(POLL);
                }
                Err(TryLockError::WouldBlock) => {
                    n_used = 0;
                    let (name, n_bytes) = (entry.name.clone(), entry.n_bytes());
                    listener(Event::Waiting { name, n_done: entry.n_come(&dir), n_bytes });
                    std::thread::sleep(POLL);
                }
                Err(TryLockError::Error(error)) => return self.io(&dir, Err(error)),
            }
        }
    }

    /// The model of this entry, if it is complete and nobody changes it.
    pub(crate) fn use_complete(&self, entry: &Entry, is_new: bool, listener: Listener) -> Result<Found, StoreError> {
        let id = entry.id.clone();
        let dir = self.dir.join(&id);
        // A folder that cannot be written may have no lock, and nobody who removes it.
        let lock = self.lock_file(&id).ok();
        match lock.as_ref().map_or(Ok(()), File::try_lock_shared) {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Ok(Found::Locked),
            Err(TryLockError::Error(error)) => return self.io(&dir, Err(error)),
        }
        let Some(known) = Entry::read(&dir).filter(|known| known.is_complete(&dir)) else {
            return Ok(Found::Incomplete);
        };
        if lock.is_none() {
            tracing::warn!(dir = %dir.display(), "the model is not locked, so `brigade models prune` may remove it");
        }
        let mut noted = Entry { last_used: now(), ..entry.clone() };
        noted.merge(known);
        // A disk that is full or read-only keeps nobody from using what is there.
        if let Err(error) = noted.write(&dir) {
            tracing::info!(%error, "the use of a model is not noted");
        }
        let path = noted.files.first().map(|file| file.local(&dir)).unwrap_or_default();
        let location = noted.location();
        listener(Event::Ready { name: noted.name, is_new });
        Ok(Found::Here(Opened { path, location, _held: lock.map(|lock| Held::new(lock, dir)) }))
    }

    /// Downloads what is missing. The lock is held.
    fn download(&self, mut entry: Entry, dir: &Path, wanted: &[Wanted], listener: Listener) -> Result<(), StoreError> {
        if let Some(known) = Entry::read(dir) {
            entry.merge(known);
        }
        let (n_bytes, mut done) = (entry.n_bytes(), entry.n_done(dir));
        // Before anything is written, which would not tell what to do about it.
        self.check_space(&entry, dir, &done)?;
        self.io(dir, files::create_private_dir(dir))?;
        self.io(dir, entry.write(dir))?;
        let (name, n_files) = (entry.name.clone(), wanted.len());
        listener(Event::Fetching { name, n_files, n_bytes, n_done: done.iter().sum() });
        let on_retry = |error: &FetchError, pause| listener(Event::Retrying { why: error.fact(), pause });
        for (i, wanted) in wanted.iter().enumerate() {
            let file = &mut entry.files[i];
            if file.is_complete(dir) {
                continue;
            }
            let before: u64 = done.iter().enumerate().filter(|(other, _)| *other != i).map(|(_, done)| done).sum();
            let tell = |n_done: u64| listener(Event::Moved { n_done: before + n_done, n_bytes });
            let found = download(&self.client, wanted, &file.local(dir), Watch { done: &tell, on_retry: &on_retry })?;
            done[i] = found.n_bytes;
            file.n_bytes = Some(found.n_bytes);
            file.etag = found.etag.or(file.etag.take());
            // Without a hash of the server's the next check is whether it is a whole model.
            if wanted.sha256.is_none() {
                tracing::info!(file = file.name, sha256 = found.sha256, "the server tells no hash to compare with");
            }
            self.io(dir, entry.write(dir))?;
        }
        self.check_model(&entry, dir, wanted)
    }

    /// Files without a hash are checked by what their headers say of their lengths.
    fn check_model(&self, entry: &Entry, dir: &Path, wanted: &[Wanted]) -> Result<(), StoreError> {
        let Some(first) = entry.files.first().filter(|_| wanted.iter().any(|wanted| wanted.sha256.is_none())) else {
            return Ok(());
        };
        let Err(error) = ModelFile::open(first.local(dir)) else { return Ok(()) };
        for file in &entry.files {
            self.io(dir, files::remove(&file.local(dir)))?;
        }
        Err(StoreError::Damaged { source: Box::new(error) })
    }

    fn check_space(&self, entry: &Entry, dir: &Path, done: &[u64]) -> Result<(), StoreError> {
        let free = files::free_bytes(if dir.exists() { dir } else { &self.dir });
        let (Some(n_bytes), Some(free)) = (entry.n_bytes(), free) else { return Ok(()) };
        let needed = n_bytes.saturating_sub(done.iter().sum());
        let reserve = self.client.limits().reserve_bytes;
        if needed.saturating_add(reserve) <= free {
            return Ok(());
        }
        let name = entry.name.clone();
        Err(StoreError::NoSpace { name, needed, reserve, free, dir: self.dir.clone() })
    }

    /// What is locked by those who fetch, use or remove a model.
    pub(crate) fn lock_file(&self, id: &str) -> Result<File, StoreError> {
        let path = self.dir.join(LOCKS).join(id);
        self.io(&path, files::open_lock(&path))
    }

    pub(crate) fn io<T>(&self, path: &Path, result: io::Result<T>) -> Result<T, StoreError> {
        result.map_err(|source| StoreError::Io { path: path.to_owned(), source })
    }

    /// Removes a model's folder, and of what is in it nothing that is not the model's. The lock is held.
    pub(crate) fn remove(&self, dir: &Path) -> Result<(), StoreError> {
        for file in self.io(dir, fs::read_dir(dir))? {
            let file = self.io(dir, file)?;
            if is_models_file(&file.file_name().to_string_lossy()) {
                self.io(&file.path(), files::remove(&file.path()))?;
            }
        }
        // A link leads to a folder on another disk, and goes with it.
        let is_link = dir.is_symlink();
        let folder = if is_link { self.io(dir, dir.canonicalize())? } else { dir.to_owned() };
        match fs::remove_dir(&folder) {
            Err(error) if error.kind() == io::ErrorKind::DirectoryNotEmpty => Ok(()),
            Ok(()) if is_link => self.io(dir, files::remove(dir)),
            removed => self.io(&folder, removed),
        }
    }
}

impl StoreError {
    /// What happened, if it says nothing of the model, so that what is on disk is the best there is.
    fn excuse(&self) -> Option<String> {
        match self {
            Self::Fetch(error) | Self::Download(DownloadError::Fetch(error)) => {
                error.is_silence().then(|| error.fact())
            }
            Self::Download(DownloadError::Write { source, .. }) | Self::Io { source, .. } => {
                files::is_full(source).then(|| self.to_string())
            }
            Self::NoSpace { .. } => Some(self.to_string()),
            _ => None,
        }
    }
}

/// Name and header of the model in a file.
fn look_at(path: &Path) -> Result<(String, Catalog), StoreError> {
    let file = ModelFile::open(path).map_err(|source| StoreError::File { source: Box::new(source) })?;
    let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    Ok((model_name(&name), file.catalog().clone()))
}

pub(crate) fn choice_error(source: &HubSource, error: ChoiceError) -> StoreError {
    let (repository, revision) = (source.repository.clone(), source.revision().to_owned());
    StoreError::Choice { repository, revision, source: error }
}

/// Seconds since 1970.
pub(crate) fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}
