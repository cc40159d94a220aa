//! What a node notes of its part in its state directory, so that `brigade status` and `brigade leave` find it.
//!
//! A note may outlive a node that was killed, and its process number may be another's by now. So a note counts only
//! while the state directory's lock is held, which the system frees with the process.

use std::fs::{File, TryLockError};
use std::path::{Path, PathBuf};

use brigade_node::{Part, WorkerStatus};
use rustix::process::Pid;
use serde::Serialize;
use serde_json::Value;

use crate::error::Failure;
use crate::files;

/// Largest note: a few texts of a few kilobytes.
const MAX_NOTE_BYTES: u64 = 1 << 20;

/// What a node does, and which process it is.
#[derive(Serialize)]
struct Note<'a> {
    pid: u32,
    role: Role,
    /// Of a worker.
    #[serde(flatten)]
    status: Option<&'a WorkerStatus>,
}

/// What a node does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Role {
    Undecided,
    Coordinator,
    Worker,
}

fn path(state_dir: &Path) -> PathBuf {
    state_dir.join("node.json")
}

/// Writes the note of this process. A full disk must not end the node, so that it may fail.
pub fn write(state_dir: &Path, part: &Part) {
    let (role, status) = match part {
        Part::Undecided => (Role::Undecided, None),
        Part::Coordinates => (Role::Coordinator, None),
        Part::Works(status) => (Role::Worker, Some(status)),
    };
    if let Ok(bytes) = serde_json::to_vec_pretty(&Note { pid: std::process::id(), role, status }) {
        let _ = brigade_net::write_atomic(&path(state_dir), &bytes, 0o600);
    }
}

/// Removes the note, if there is one.
pub fn remove(state_dir: &Path) {
    let _ = std::fs::remove_file(path(state_dir));
}

/// A node that runs.
#[derive(Debug)]
pub struct Found {
    /// Its process.
    pub pid: Pid,
    /// What it notes.
    pub note: Value,
}

impl Found {
    /// Whether it coordinates.
    pub fn coordinates(&self) -> bool {
        self.note.get("role").and_then(Value::as_str) == Some("coordinator")
    }
}

/// The node that runs with this state directory; `None` if there is no note.
///
/// # Errors
/// If the one that left the note was killed.
pub fn find(state_dir: &Path) -> Result<Option<Found>, Failure> {
    let Ok(text) = files::read_text(&path(state_dir), MAX_NOTE_BYTES) else { return Ok(None) };
    let Ok(note) = serde_json::from_str::<Value>(&text) else { return Ok(None) };
    let pid = note.get("pid").and_then(Value::as_i64).and_then(|pid| Pid::from_raw(pid.try_into().ok()?));
    match pid {
        Some(pid) if is_in_use(state_dir) => Ok(Some(Found { pid, note })),
        _ => Err(Failure::run(format!(
            "no node runs with the state directory {}: the last one was killed; start `brigade join` again",
            state_dir.display()
        ))),
    }
}

/// Whether a process uses the state directory.
pub fn is_in_use(state_dir: &Path) -> bool {
    // Shared, so that two who look at once do not take each other for a node.
    File::open(state_dir.join("lock")).is_ok_and(|file| matches!(file.try_lock_shared(), Err(TryLockError::WouldBlock)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_note_counts_while_its_process_lives() {
        let dir = tempfile::tempdir().unwrap();
        let note =
            |pid: u32| std::fs::write(path(dir.path()), json!({"pid": pid, "state": "idle"}).to_string()).unwrap();
        assert!(find(dir.path()).unwrap().is_none());
        note(7);
        assert!(find(dir.path()).unwrap_err().to_string().contains("no node runs"), "nobody has the directory");
        let lock = File::create(dir.path().join("lock")).unwrap();
        lock.try_lock().unwrap();
        let found = find(dir.path()).unwrap().unwrap();
        assert_eq!((found.pid.as_raw_nonzero().get(), &found.note["state"]), (7, &json!("idle")));
        for pid in [0, u32::MAX] {
            note(pid);
            assert!(find(dir.path()).unwrap_err().to_string().contains("no node runs"), "{pid} is no process");
        }
        note(7);
        drop(lock);
        assert!(find(dir.path()).is_err(), "it has ended");
        remove(dir.path());
        assert!(find(dir.path()).unwrap().is_none());
    }
}
