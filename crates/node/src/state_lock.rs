//! One process for one state directory.
//!
//! Two nodes with one key would push each other out of the cluster without end, and tickets and members have one
//! writer. The system frees the lock when the process ends, however it ends.

use std::fs::{File, TryLockError};
use std::io;
use std::path::Path;

/// Holds a state directory until it is dropped.
#[derive(Debug)]
pub struct StateLock(#[expect(dead_code, reason = "held, not used")] File);

impl StateLock {
    /// Takes the directory.
    ///
    /// # Errors
    /// If another process has it, or the lock file cannot be made.
    pub fn take(state_dir: &Path) -> io::Result<Self> {
        let file = File::options().create(true).truncate(false).write(true).open(state_dir.join("lock"))?;
        match file.try_lock() {
            Ok(()) => Ok(Self(file)),
            Err(TryLockError::Error(error)) => Err(error),
            Err(TryLockError::WouldBlock) => Err(io::Error::new(
                io::ErrorKind::ResourceBusy,
                format!(
                    "another brigade process uses {}; stop it, or give this node a --state-dir of its own",
                    state_dir.display()
                ),
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_has_one_process_at_a_time() {
        let dir = tempfile::tempdir().unwrap();
        let held = StateLock::take(dir.path()).unwrap();
        let error = StateLock::take(dir.path()).unwrap_err();
        assert!(error.to_string().contains("--state-dir"), "{error}");
        drop(held);
        StateLock::take(dir.path()).unwrap();
    }
}
