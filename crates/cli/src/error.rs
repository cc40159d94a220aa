//! What ends a verb, and with which exit code.

use std::fmt::Display;
use std::io;

use crate::endpoint::EndpointError;

/// A verb failed.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// The command line or configuration makes no sense.
    #[error("{0}")]
    Usage(String),
    /// Something else than the command line is wrong.
    #[error("{0}")]
    Run(String),
    /// An endpoint did not do what it was asked.
    #[error(transparent)]
    Endpoint(#[from] EndpointError),
    /// All went well, but what was found is not what is hoped for.
    #[error("{text}")]
    Verdict {
        /// What was found.
        text: String,
        /// The code that says so.
        code: u8,
    },
    /// Output could not be written.
    #[error("writing output failed: {0}")]
    Output(#[from] io::Error),
}

impl Failure {
    /// The command line or configuration makes no sense.
    pub fn usage(text: impl Display) -> Self {
        Self::Usage(text.to_string())
    }

    /// Something else is wrong.
    pub fn run(text: impl Display) -> Self {
        Self::Run(text.to_string())
    }

    /// The code that the process ends with: 2 for a wrong command line, as every verb of every tool does, that of a
    /// verdict, else 1.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Usage(_) => 2,
            Self::Verdict { code, .. } => *code,
            Self::Run(_) | Self::Endpoint(_) | Self::Output(_) => 1,
        }
    }

    /// Whether the reader of our output has gone.
    pub fn is_broken_pipe(&self) -> bool {
        matches!(self, Self::Output(error) if error.kind() == io::ErrorKind::BrokenPipe)
    }
}
