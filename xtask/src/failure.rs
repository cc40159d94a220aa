//! Why a task failed, in words for whoever runs it.

use std::fmt::Display;
use std::io;

/// What a task returns.
pub type Outcome<T = ()> = Result<T, Failure>;

/// A task failed.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// A file or process could not be used.
    #[error("{what}: {source}")]
    Io {
        /// Which, and what for.
        what: String,
        /// Why not.
        source: io::Error,
    },
    /// Nobody could be told.
    #[error("the output cannot be written: {0}")]
    Output(#[from] io::Error),
    /// All else.
    #[error("{0}")]
    Said(String),
}

impl Failure {
    /// A failure in these words.
    pub fn said(words: impl Display) -> Self {
        Self::Said(words.to_string())
    }

    /// Says what an I/O error was about.
    pub fn io(what: impl Display) -> impl FnOnce(io::Error) -> Self {
        let what = what.to_string();
        move |source| Self::Io { what, source }
    }

    /// Whether only the reader of our output has gone away.
    pub fn is_broken_pipe(&self) -> bool {
        matches!(self, Self::Output(error) if error.kind() == io::ErrorKind::BrokenPipe)
    }
}
