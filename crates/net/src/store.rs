//! Small files that survive a crash: written beside the old one, forced to disk, renamed into place.
//!
//! A reader sees the old content or the new, never half of either. The files of this crate are private to their owner.

use std::fs::{DirBuilder, File, Permissions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde::de::DeserializeOwned;
use tempfile::NamedTempFile;

/// Mode of files that only their owner may read.
pub(crate) const PRIVATE_FILE: u32 = 0o600;

/// Why a state file could not be used.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// Reading failed.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// Writing failed; the file is as it was.
    #[error("cannot write {}: {source}; is the disk full or the folder not yours?", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// The content makes no sense.
    #[error("{} is damaged ({reason}); move it away to start without it", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
}

/// Replaces the content of `path` by `bytes`, all or nothing, and returns once it is on disk. The file gets `mode`.
///
/// # Errors
/// If the folder of `path` cannot be written; the file is then as it was.
pub fn write_atomic(path: &Path, bytes: &[u8], mode: u32) -> io::Result<()> {
    written_beside(path, bytes, mode)?.persist(path)?;
    sync_folder(path)
}

/// Like [`write_atomic`], but fails with [`io::ErrorKind::AlreadyExists`] if there is a file already.
pub(crate) fn create_atomic(path: &Path, bytes: &[u8], mode: u32) -> io::Result<()> {
    written_beside(path, bytes, mode)?.persist_noclobber(path)?;
    sync_folder(path)
}

/// Makes `dir` and what is missing above it, closed to everyone but the owner. A folder that exists stays as it is.
///
/// # Errors
/// If it cannot be made.
pub fn create_private_dir(dir: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(dir)
}

fn folder_of(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

fn written_beside(path: &Path, bytes: &[u8], mode: u32) -> io::Result<NamedTempFile> {
    let mut file = tempfile::Builder::new()
        .prefix(".brigade-")
        .suffix(".tmp")
        .permissions(Permissions::from_mode(mode))
        .tempfile_in(folder_of(path))?;
    file.write_all(bytes)?;
    // The creation mode passes through the umask; this does not.
    file.as_file().set_permissions(Permissions::from_mode(mode))?;
    file.as_file().sync_all()?;
    Ok(file)
}

/// A rename is durable only once the folder that holds the name is.
fn sync_folder(path: &Path) -> io::Result<()> {
    File::open(folder_of(path))?.sync_all()
}

/// Reads at most `max_bytes` of JSON; `None` if there is no file.
pub(crate) fn read_json<T: DeserializeOwned>(path: &Path, max_bytes: u64) -> Result<Option<T>, StoreError> {
    let read = |source| StoreError::Read { path: path.to_owned(), source };
    let file = match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        opened => opened.map_err(read)?,
    };
    let mut text = Vec::new();
    file.take(max_bytes + 1).read_to_end(&mut text).map_err(read)?;
    let damaged = |reason| StoreError::Damaged { path: path.to_owned(), reason };
    if text.len() as u64 > max_bytes {
        return Err(damaged(format!("it is larger than {max_bytes} bytes")));
    }
    serde_json::from_slice(&text).map(Some).map_err(|error| damaged(error.to_string()))
}

/// Writes JSON that only the owner may read; makes the folder if need be.
pub(crate) fn write_json<T: Serialize>(path: &Path, value: &T) -> Result<(), StoreError> {
    serde_json::to_vec_pretty(value)
        .map_err(io::Error::from)
        .and_then(|text| {
            create_private_dir(folder_of(path))?;
            write_atomic(path, &text, PRIVATE_FILE)
        })
        .map_err(|source| StoreError::Write { path: path.to_owned(), source })
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn mode_of(path: &Path) -> u32 {
        fs::metadata(path).unwrap().permissions().mode() & 0o777
    }

    #[test]
    fn a_write_replaces_the_file_and_leaves_nothing_beside_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state");
        write_atomic(&path, b"old", 0o644).unwrap();
        write_atomic(&path, b"new", 0o600).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"new");
        assert_eq!(mode_of(&path), 0o600);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn creating_never_replaces() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state");
        create_atomic(&path, b"first", 0o600).unwrap();
        assert_eq!(create_atomic(&path, b"second", 0o600).unwrap_err().kind(), io::ErrorKind::AlreadyExists);
        assert_eq!(fs::read(&path).unwrap(), b"first");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_failed_write_leaves_the_old_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("missing").join("state");
        assert_eq!(write_atomic(&path, b"x", 0o600).unwrap_err().kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn json_has_a_cap_and_names_the_damaged_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("inner").join("list.json");
        assert!(read_json::<Vec<u8>>(&path, 100).unwrap().is_none());
        write_json(&path, &vec![1u8, 2, 3]).unwrap();
        assert_eq!(mode_of(&path), 0o600);
        assert_eq!(mode_of(path.parent().unwrap()), 0o700);
        assert_eq!(read_json::<Vec<u8>>(&path, 100).unwrap(), Some(vec![1, 2, 3]));
        assert!(matches!(read_json::<Vec<u8>>(&path, 3), Err(StoreError::Damaged { .. })));
        fs::write(&path, "[1,").unwrap();
        let message = read_json::<Vec<u8>>(&path, 100).unwrap_err().to_string();
        assert!(message.contains("list.json is damaged"), "{message}");
    }
}
