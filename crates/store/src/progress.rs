//! What is told while models are found and fetched.

use std::time::Duration;

/// Something happened that a person may want to see.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// A model was found, and is going to be fetched.
    Fetching {
        /// Its name.
        name: String,
        /// How many files it has.
        n_files: usize,
        /// Bytes of all files, where the server tells.
        n_bytes: Option<u64>,
        /// Bytes of these that are here already.
        n_done: u64,
    },
    /// Another process fetches it; told now and then while that goes on.
    Waiting {
        /// Its name.
        name: String,
        /// Bytes that are here.
        n_done: u64,
        /// Bytes of all files, where the server tells.
        n_bytes: Option<u64>,
    },
    /// Bytes came; told some times in a second.
    Moved {
        /// Bytes of all files that are here.
        n_done: u64,
        /// Bytes of all files, where the server tells.
        n_bytes: Option<u64>,
    },
    /// Something is asked for again.
    Retrying {
        /// What went wrong.
        why: String,
        /// After how long.
        pause: Duration,
    },
    /// What the server has now cannot be had, and what is here is used.
    Fallback {
        /// Why it cannot.
        why: String,
    },
    /// All is here, and verified.
    Ready {
        /// Its name.
        name: String,
        /// Whether anything had to be fetched.
        is_new: bool,
    },
}

/// Hears of events, from several threads.
pub type Listener<'a> = &'a (dyn Fn(Event) + Sync);
