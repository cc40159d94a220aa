//! What is here already: models by what they were asked for, and the model that a path leads to.
//!
//! No server is asked. A model is found by its name on the hub or the web ([`Store::open_here`], which takes complete
//! ones, and [`Store::found_as`], which takes all), and by a file of its folder ([`hold`]). Where a branch has moved,
//! what it was before is not found by its name any more ([`Store::forget_others`]).

use std::fs::{File, TryLockError};
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::choose::{ChoiceError, HubFile, choose};
use crate::entry::{Entry, FileEntry, LOCKS, Origin, is_models_folder, query_sum};
use crate::files;
use crate::progress::Listener;
use crate::source::ModelSource;
use crate::store::{Found, Opened, Store, StoreError, choice_error, now};
use crate::url::without_query;

/// How often it is looked whether another process has done with a model.
pub(crate) const POLL: Duration = Duration::from_millis(100);

/// How often it is looked whether a complete model is locked no more: a listing looks at it for less than a second.
pub(crate) const MAX_POLLS: u32 = 20;

/// A model that is used. When it is let go of, its use is noted once more: who serves a model uses it for as long.
#[derive(Debug)]
pub(crate) struct Held {
    /// Shared with others who use it, and closed after the use is noted.
    _lock: File,
    dir: PathBuf,
}

impl Held {
    /// The model in `dir`, whose lock is `lock` and has been taken.
    pub(crate) fn new(lock: File, dir: PathBuf) -> Self {
        Self { _lock: lock, dir }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        note_use(&self.dir);
    }
}

/// Notes that the model in `dir` is used now.
fn note_use(dir: &Path) {
    let Some(known) = Entry::read(dir) else { return };
    let now = now();
    if known.last_used >= now {
        return;
    }
    // A disk that is full or read-only keeps nobody from using what is there.
    if let Err(error) = (Entry { last_used: now, ..known }).write(dir) {
        tracing::info!(%error, "the use of a model is not noted");
    }
}

impl Store {
    /// All entries, with their folders.
    ///
    /// # Errors
    /// If the models directory is there and cannot be read.
    pub(crate) fn entries(&self) -> Result<Vec<(PathBuf, Entry)>, StoreError> {
        let dirs = self.io(self.dir(), files::paths_in(self.dir()))?.into_iter();
        let entries = dirs.filter_map(|dir| Entry::read(&dir).map(|entry| (dir, entry)));
        // Whoever renames a folder by hand makes it unknown, not wrong.
        let is_own = |(dir, entry): &(PathBuf, Entry)| dir.file_name().is_some_and(|name| *name == *entry.id);
        Ok(entries.filter(is_own).collect())
    }

    /// The model that was fetched from `source` before, if it is complete.
    pub(crate) fn open_here(&self, source: &ModelSource, listener: Listener) -> Result<Option<Opened>, StoreError> {
        let Some(entry) = self.find_here(source)? else { return Ok(None) };
        // It is complete, so whoever has it locked looks at it only for a moment.
        for _ in 0..MAX_POLLS {
            match self.use_complete(&entry, false, listener)? {
                Found::Here(opened) => return Ok(Some(opened)),
                Found::Incomplete => return Ok(None),
                Found::Locked => std::thread::sleep(POLL),
            }
        }
        Ok(None)
    }

    /// The complete model that `source` means, of those that are here.
    pub(crate) fn find_here(&self, source: &ModelSource) -> Result<Option<Entry>, StoreError> {
        let mut entries: Vec<Entry> = self.entries()?.into_iter().map(|(_, entry)| entry).collect();
        // The one that was fetched last wins.
        entries.sort_by_key(|entry| std::cmp::Reverse(entry.added));
        entries.retain(|entry| entry.is_complete(&self.dir().join(&entry.id)));
        match source {
            ModelSource::Local(_) => Ok(None),
            ModelSource::Web { url } => Ok(entries.into_iter().find(|entry| entry.is_at(url))),
            ModelSource::Hub(source) => {
                entries.retain(|entry| entry.is_of(source));
                let files: Vec<_> = entries.iter().flat_map(Entry::hub_files).collect();
                match choose(&files, &source.pick) {
                    Ok(chosen) => {
                        let path = chosen.first().map(|file| &file.path);
                        Ok(entries.into_iter().find(|entry| entry.files.first().map(|file| &file.path) == path))
                    }
                    Err(ChoiceError::NoModel | ChoiceError::NoSuch { .. }) => Ok(None),
                    Err(error) => Err(choice_error(source, error)),
                }
            }
        }
    }

    /// All that `source` may mean, complete or not.
    pub(crate) fn found_as(&self, source: &ModelSource) -> Result<Vec<Entry>, StoreError> {
        let is_meant = |entry: &Entry| match source {
            ModelSource::Local(_) => false,
            ModelSource::Web { url } => entry.is_at(url),
            ModelSource::Hub(source) => entry.is_of(source) && choose(&entry.hub_files(), &source.pick).is_ok(),
        };
        Ok(self.entries()?.into_iter().map(|(_, entry)| entry).filter(is_meant).collect())
    }

    /// Notes that the repository of `current` has the files `listed` now, under the name that was asked for: what is
    /// not among them has that name no more. Other quantisations that have not changed keep it.
    pub(crate) fn forget_others(&self, current: &Entry, listed: &[HubFile]) {
        let Origin::Hub { repository, revisions, .. } = &current.origin else { return };
        let Some(revision) = revisions.last() else { return };
        let is_past = |entry: &Entry| entry.is_named(repository, revision) && !entry.is_among(listed);
        for (dir, entry) in self.entries().unwrap_or_default() {
            if entry.id == current.id || !is_past(&entry) {
                continue;
            }
            // Who fetches or removes it writes its entry too; what is left of the name then goes the next time.
            let Ok(lock) = self.lock_file(&entry.id) else { continue };
            let Some(mut entry) = lock.try_lock_shared().ok().and_then(|()| Entry::read(&dir)) else { continue };
            entry.lose_name(revision);
            if let Err(error) = entry.write(&dir) {
                tracing::info!(%error, model = entry.id, revision, "it is not noted that this is another model now");
            }
        }
    }
}

impl Entry {
    /// Its files as the hub lists them.
    fn hub_files(&self) -> Vec<HubFile> {
        let file = |file: &FileEntry| HubFile {
            path: file.path.clone(),
            n_bytes: file.n_bytes.unwrap_or(0),
            sha256: file.sha256.clone(),
        };
        self.files.iter().map(file).collect()
    }

    /// Whether a file of it came from this address, also from what stands behind its path.
    fn is_at(&self, url: &str) -> bool {
        self.query_sha256() == query_sum(url) && self.files.iter().any(|file| file.url == without_query(url))
    }
}

/// Holds the model in whose folder the file at `path` lies, and notes its use, as if it had been opened by its source.
/// `None` where the file lies in no models directory or that cannot be locked: it is used all the same.
pub(crate) fn hold(path: &Path) -> Option<Held> {
    // A link may lead into a folder, and out of it, and the folder may be one.
    let named = std::path::absolute(path).ok().and_then(|path| path.parent().map(Path::to_owned));
    let followed = named.as_ref().and_then(|dir| dir.canonicalize().ok());
    let real = path.canonicalize().ok().and_then(|path| path.parent().map(Path::to_owned));
    let dir = [named, followed, real].into_iter().flatten().find(|dir| is_models_folder(dir))?;
    let (locks, id) = (dir.parent()?.join(LOCKS), dir.file_name()?);
    let lock = match lock_shared(&locks.join(id)) {
        Ok(lock) => lock,
        Err(error) => {
            let dir = dir.display();
            tracing::warn!(%error, %dir, "the model is not locked, so `brigade models prune` may remove it");
            return None;
        }
    };
    note_use(&dir);
    Some(Held::new(lock, dir))
}

/// Locks `path` beside others who use the model, once whoever looks at it has done.
fn lock_shared(path: &Path) -> std::io::Result<File> {
    let lock = files::open_lock(path)?;
    for _ in 0..MAX_POLLS {
        match lock.try_lock_shared() {
            Ok(()) => return Ok(lock),
            Err(TryLockError::WouldBlock) => std::thread::sleep(POLL),
            Err(TryLockError::Error(error)) => return Err(error),
        }
    }
    Err(std::io::Error::new(std::io::ErrorKind::WouldBlock, "another process fetches or removes it"))
}
