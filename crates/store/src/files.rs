//! Small files that are replaced as a whole, and how much room a disk has.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde::de::DeserializeOwned;

/// How files begin that are about to replace others.
pub const TEMPORARY: &str = ".new-";

/// Replaces a file by JSON, all or nothing.
pub fn write_json(path: &Path, value: &impl Serialize) -> io::Result<()> {
    let dir = path.parent().unwrap_or(Path::new("."));
    let mut file = tempfile::Builder::new().prefix(TEMPORARY).tempfile_in(dir)?;
    file.write_all(&serde_json::to_vec_pretty(value)?)?;
    file.as_file().sync_all()?;
    file.persist(path)?;
    sync_dir(dir)
}

/// Reads JSON of at most `max_bytes`; `None` if there is none that makes sense.
pub fn read_json<T: DeserializeOwned>(path: &Path, max_bytes: u64) -> Option<T> {
    let mut text = Vec::new();
    File::open(path).ok()?.take(max_bytes + 1).read_to_end(&mut text).ok()?;
    (text.len() as u64 <= max_bytes).then(|| serde_json::from_slice(&text).ok()).flatten()
}

/// Makes `dir` and what is missing above it, closed to everyone but the owner.
pub fn create_private_dir(dir: &Path) -> io::Result<()> {
    let mut builder = fs::DirBuilder::new();
    #[cfg(unix)]
    std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
    builder.recursive(true).create(dir)
}

/// Opens what is locked by those who fetch, use or remove a model. One that may only be read can be locked as well.
pub fn open_lock(path: &Path) -> io::Result<File> {
    let made = path.parent().map_or(Ok(()), create_private_dir);
    let open = made.and_then(|()| File::options().create(true).truncate(false).write(true).open(path));
    open.or_else(|error| File::open(path).map_err(|_| error))
}

/// What is in a folder; nothing where there is no folder.
pub fn paths_in(dir: &Path) -> io::Result<Vec<PathBuf>> {
    match fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        found => found?.map(|file| file.map(|file| file.path())).collect(),
    }
}

/// Whether something failed since a disk is full, or what somebody may have of it.
pub fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

/// A rename is durable only once the folder that holds the name is.
pub fn sync_dir(dir: &Path) -> io::Result<()> {
    if cfg!(unix) { File::open(dir)?.sync_all() } else { Ok(()) }
}

/// Removes a file, if it is there.
pub fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Bytes that a user may still write where `dir` is; `None` where the system does not tell.
#[cfg(unix)]
pub fn free_bytes(dir: &Path) -> Option<u64> {
    rustix::fs::statvfs(dir).ok().map(|fs| fs.f_bavail.saturating_mul(fs.f_frsize))
}

/// Bytes that a user may still write where `dir` is; `None` where the system does not tell.
#[cfg(not(unix))]
pub fn free_bytes(_dir: &Path) -> Option<u64> {
    None
}

/// Writes at a position, from several threads at once.
#[cfg(unix)]
pub fn write_all_at(file: &File, bytes: &[u8], offset: u64) -> io::Result<()> {
    std::os::unix::fs::FileExt::write_all_at(file, bytes, offset)
}

/// Writes at a position, from several threads at once.
#[cfg(windows)]
pub fn write_all_at(file: &File, mut bytes: &[u8], mut offset: u64) -> io::Result<()> {
    while !bytes.is_empty() {
        let n = std::os::windows::fs::FileExt::seek_write(file, bytes, offset)?;
        bytes = &bytes[n..];
        offset += n as u64;
    }
    Ok(())
}
