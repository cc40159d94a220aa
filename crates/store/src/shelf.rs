//! What is in a models directory, and removing what is not needed.

use std::collections::BTreeSet;
use std::fs::{self, TryLockError};
use std::path::PathBuf;

use serde::Serialize;

use crate::choose::MAX_NAMED;
use crate::entry::{Entry, is_models_folder};
use crate::files;
use crate::source::ModelSource;
use crate::store::{Store, StoreError, now};

/// A model on disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Listed {
    /// Its name; several may have the same.
    pub name: String,
    /// The name of its folder, which no other has.
    pub id: String,
    /// As it could be asked for; empty where that is not known any more.
    pub source: String,
    /// Commit of the hub's repository.
    pub commit: Option<String>,
    /// Its first file, or the folder where nothing is known of it.
    pub path: PathBuf,
    /// How many files it has.
    pub files: usize,
    /// Bytes of all files, where the server told.
    pub bytes: Option<u64>,
    /// Bytes that are here.
    pub bytes_here: u64,
    /// Whether all of it is here and verified.
    pub complete: bool,
    /// SHA-256 of each file, where the hub tells it.
    pub sha256: Vec<Option<String>>,
    /// When it was last used, in seconds since 1970.
    pub last_used: u64,
    /// Whether a process fetches or uses it now.
    pub in_use: bool,
}

/// What to remove.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Prune {
    /// Only models of these names, folders or sources, these as they are listed or were asked for; all where there are
    /// none.
    pub names: Vec<String>,
    /// Those that were not used for so many seconds.
    pub older_than_s: Option<u64>,
    /// Those used longest ago, until the others have so many bytes at most.
    pub keep_bytes: Option<u64>,
    /// Whether to remove nothing and say only what would be.
    pub is_dry_run: bool,
}

/// What became of a model that was to be removed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Pruned {
    /// Its name.
    pub name: String,
    /// The name of its folder.
    pub id: String,
    /// Bytes that it has on disk.
    pub bytes: u64,
    /// What became of it.
    pub outcome: Outcome,
}

/// What became of a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// It is gone.
    Removed,
    /// It would be gone, had it been asked for in earnest.
    WouldBeRemoved,
    /// A process fetches or uses it, so it stays.
    InUse,
}

impl Store {
    /// All models, those used last first.
    ///
    /// # Errors
    /// If the directory is there and cannot be read.
    pub fn list(&self) -> Result<Vec<Listed>, StoreError> {
        let mut all = Vec::new();
        for dir in self.folders()? {
            let id = dir.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
            let in_use = !self.is_free(&id);
            all.push(match Entry::read(&dir).filter(|entry| entry.id == id) {
                Some(entry) => Listed {
                    source: entry.source(),
                    commit: entry.commit(),
                    path: entry.files.first().map(|file| file.local(&dir)).unwrap_or_default(),
                    files: entry.files.len(),
                    bytes: entry.n_bytes(),
                    bytes_here: if in_use { entry.n_come(&dir) } else { entry.n_done(&dir).iter().sum() },
                    complete: entry.is_complete(&dir),
                    sha256: entry.files.iter().map(|file| file.sha256.clone()).collect(),
                    last_used: entry.last_used,
                    name: entry.name,
                    id,
                    in_use,
                },
                None => Listed {
                    name: id.clone(),
                    source: String::new(),
                    commit: None,
                    files: fs::read_dir(&dir).map_or(0, Iterator::count),
                    bytes: None,
                    bytes_here: n_bytes_in(&dir),
                    complete: false,
                    sha256: Vec::new(),
                    last_used: 0,
                    path: dir,
                    id,
                    in_use,
                },
            });
        }
        all.sort_by(|a, b| b.last_used.cmp(&a.last_used).then_with(|| a.id.cmp(&b.id)));
        Ok(all)
    }

    /// Removes models. With neither names, age nor bytes to keep, it is those that are not complete.
    ///
    /// # Errors
    /// If a name is of no model, or a source may be several, or something cannot be removed.
    pub fn prune(&self, prune: &Prune) -> Result<Vec<Pruned>, StoreError> {
        let all = self.list()?;
        let mut ids = BTreeSet::new();
        for name in &prune.names {
            ids.extend(self.ids_of(name, &all)?);
        }
        let is_meant = |model: &&Listed| prune.names.is_empty() || ids.contains(&model.id);
        let meant: Vec<&Listed> = all.iter().filter(is_meant).collect();
        let doomed = prune.choose(&meant, now());
        doomed.into_iter().map(|model| self.prune_one(model, prune.is_dry_run)).collect()
    }

    /// The folders of the model that somebody calls `name`; several where it was fetched in several versions.
    fn ids_of(&self, name: &str, all: &[Listed]) -> Result<Vec<String>, StoreError> {
        let is_called = |model: &&Listed| [&model.name, &model.id, &model.source].into_iter().any(|own| own == name);
        let listed: Vec<String> = all.iter().filter(is_called).map(|model| model.id.clone()).collect();
        if !listed.is_empty() {
            // What stands behind an address is not shown, and may make it another model.
            let entries = self.entries()?.into_iter().map(|(_, entry)| entry);
            let queries: BTreeSet<_> =
                entries.filter(|entry| entry.source() == name).map(|e| e.query_sha256()).collect();
            if queries.len() > 1 {
                return Err(StoreError::AmbiguousName { name: name.to_owned(), choices: listed.join(", ") });
            }
            return Ok(listed);
        }
        let found = match ModelSource::parse(name) {
            Ok(source) => self.found_as(&source)?,
            Err(_) => Vec::new(),
        };
        let sources: BTreeSet<String> = found.iter().map(Entry::source).collect();
        match sources.len() {
            0 => Err(StoreError::UnknownName { name: name.to_owned() }),
            1 => Ok(found.into_iter().map(|entry| entry.id).collect()),
            _ => {
                let choices = sources.into_iter().take(MAX_NAMED).collect::<Vec<_>>().join(", ");
                Err(StoreError::AmbiguousName { name: name.to_owned(), choices })
            }
        }
    }

    fn prune_one(&self, model: &Listed, is_dry_run: bool) -> Result<Pruned, StoreError> {
        let lock = self.lock_file(&model.id)?;
        let outcome = match lock.try_lock() {
            Err(TryLockError::WouldBlock) => Outcome::InUse,
            Err(TryLockError::Error(source)) => return Err(StoreError::Io { path: model.path.clone(), source }),
            Ok(()) if is_dry_run => Outcome::WouldBeRemoved,
            Ok(()) => {
                self.remove(&self.dir().join(&model.id))?;
                Outcome::Removed
            }
        };
        Ok(Pruned { name: model.name.clone(), id: model.id.clone(), bytes: model.bytes_here, outcome })
    }

    /// The folders of models, or links to them. Whatever else somebody keeps beside them is nobody's business.
    fn folders(&self) -> Result<Vec<PathBuf>, StoreError> {
        let mut dirs = self.io(self.dir(), files::paths_in(self.dir()))?;
        dirs.retain(|dir| dir.is_dir() && is_models_folder(dir));
        Ok(dirs)
    }

    /// Whether nobody holds a model. Where it cannot be locked, as on some disks that are read-only, nobody does.
    fn is_free(&self, id: &str) -> bool {
        let Ok(lock) = self.lock_file(id) else { return true };
        !matches!(lock.try_lock(), Err(TryLockError::WouldBlock))
    }
}

impl Prune {
    /// Those of `models`, which are in the order of their last use, that are to go.
    fn choose<'a>(&self, models: &[&'a Listed], now: u64) -> Vec<&'a Listed> {
        let is_unconditional = self.older_than_s.is_none() && self.keep_bytes.is_none();
        let mut n_kept = 0u64;
        let is_doomed = |model: &&Listed| {
            let is_old = self.older_than_s.is_some_and(|s| now.saturating_sub(model.last_used) >= s);
            let is_too_much = self.keep_bytes.is_some_and(|most| n_kept.saturating_add(model.bytes_here) > most);
            let is_named = is_unconditional && !self.names.is_empty();
            let is_rest = is_unconditional && self.names.is_empty() && !model.complete;
            let is_doomed = is_old || is_too_much || is_named || is_rest;
            if !is_doomed {
                n_kept = n_kept.saturating_add(model.bytes_here);
            }
            is_doomed
        };
        let mut is_doomed = is_doomed;
        models.iter().copied().filter(|model| is_doomed(model)).collect()
    }
}

/// Bytes of the files in a folder.
fn n_bytes_in(dir: &std::path::Path) -> u64 {
    let files = fs::read_dir(dir).into_iter().flatten().flatten();
    files.filter_map(|file| file.metadata().ok()).map(|meta| meta.len()).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn model(name: &str, last_used: u64, bytes: u64, complete: bool) -> Listed {
        Listed {
            name: name.to_owned(),
            id: name.to_owned(),
            source: String::new(),
            commit: None,
            path: PathBuf::new(),
            files: 1,
            bytes: None,
            bytes_here: bytes,
            complete,
            sha256: Vec::new(),
            last_used,
            in_use: false,
        }
    }

    #[track_caller]
    fn check(prune: &Prune, expected: &[&str]) {
        let all = [
            model("new", 90, 10, true),
            model("part", 80, 10, false),
            model("mid", 50, 10, true),
            model("old", 10, 10, true),
        ];
        let doomed = prune.choose(&all.iter().collect::<Vec<_>>(), 100);
        assert_eq!(doomed.iter().map(|model| model.name.as_str()).collect::<Vec<_>>(), expected, "{prune:?}");
    }

    #[test]
    fn the_longest_unused_go_first() {
        let none = Prune::default();
        check(&none, &["part"]);
        check(&Prune { older_than_s: Some(50), ..none.clone() }, &["mid", "old"]);
        check(&Prune { keep_bytes: Some(20), ..none.clone() }, &["mid", "old"]);
        check(&Prune { keep_bytes: Some(25), older_than_s: Some(15), ..none.clone() }, &["part", "mid", "old"]);
        check(&Prune { keep_bytes: Some(0), ..none.clone() }, &["new", "part", "mid", "old"]);
        check(&Prune { names: vec!["x".to_owned()], ..none }, &["new", "part", "mid", "old"]);
    }
}
