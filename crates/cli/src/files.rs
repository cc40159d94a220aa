//! Files and folders that the command line names, and how many of them a process may open.
//!
//! What is wrong with one is found before long work begins, and said with the path that was given.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use crate::error::Failure;

/// Reads a text of at most `max_bytes`; a device or pipe that has no end is no reason to read on.
///
/// # Errors
/// Path and reason, if it cannot be read, is larger or is no UTF-8.
pub fn read_text(path: &Path, max_bytes: u64) -> Result<String, String> {
    let here = path.display();
    let failed = |error: io::Error| format!("{here}: {error}");
    let mut bytes = Vec::new();
    File::open(path).map_err(failed)?.take(max_bytes + 1).read_to_end(&mut bytes).map_err(failed)?;
    if bytes.len() as u64 > max_bytes {
        return Err(format!("{here} has more than {max_bytes} bytes; this is another file than was meant"));
    }
    String::from_utf8(bytes).map_err(|_| format!("{here} is no UTF-8 text; this is another file than was meant"))
}

/// Makes the state directory, unless it is there.
///
/// # Errors
/// If it is a file or cannot be made.
pub fn make_state_dir(dir: &Path) -> Result<(), Failure> {
    if dir.is_file() {
        return Err(is_a_file(dir));
    }
    brigade_net::create_private_dir(dir)
        .map_err(|error| Failure::run(format!("{} cannot be used: {error}", dir.display())))
}

/// A file stands where the state directory should be.
pub fn is_a_file(dir: &Path) -> Failure {
    Failure::usage(format!("{} is a file; name a directory with --state-dir", dir.display()))
}

/// Whether a file could be put at `path` later, found out by putting one beside it.
///
/// # Errors
/// If not.
pub fn check_writable(path: &Path) -> io::Result<()> {
    if path.is_dir() || path.file_name().is_none() {
        return Err(io::Error::new(io::ErrorKind::IsADirectory, "this is a directory; name a file"));
    }
    let probe = path.with_file_name(format!(".brigade-{}.probe", std::process::id()));
    brigade_net::write_atomic(&probe, b"", 0o600)?;
    std::fs::remove_file(probe)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_end_at_their_cap() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("text");
        std::fs::write(&path, "four").unwrap();
        assert_eq!(read_text(&path, 4).as_deref(), Ok("four"));
        assert!(read_text(&path, 3).unwrap_err().contains("more than 3 bytes"));
        assert!(read_text(Path::new("/dev/zero"), 1 << 10).unwrap_err().contains("/dev/zero"));
        assert!(read_text(dir.path(), 4).is_err());
        std::fs::write(&path, [0xff]).unwrap();
        assert!(read_text(&path, 4).unwrap_err().contains("UTF-8"));
    }

    #[test]
    fn what_cannot_be_written_is_found_and_nothing_is_left() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ticket");
        check_writable(&path).unwrap();
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
        assert!(check_writable(dir.path()).is_err());
        assert!(check_writable(&dir.path().join("none/ticket")).is_err());
    }

    #[test]
    fn a_file_is_no_state_directory() {
        let file = tempfile::NamedTempFile::new().unwrap();
        assert!(make_state_dir(file.path()).unwrap_err().to_string().contains("--state-dir"));
    }
}
