//! What the nodes of a council say to each other.
//!
//! Messages may be lost, delayed, repeated and come in any order; nothing but their sender's identity is relied on.

use brigade_base::DeploymentId;
use serde::{Deserialize, Serialize};

use super::charter::{Charter, MAX_TERM};
use crate::control::{Peer, check_addresses, decode, encode};
use crate::{DecodeError, cap};

/// Largest message: a charter with two sets of 64 voters, each with 64 addresses of 260 bytes, is 2.1 MiB; its settings
/// are 64 KiB.
pub const MAX_COUNCIL_BYTES: usize = 4 << 20;

/// Who coordinates in a term, as far as the sender knows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Incumbent {
    /// The term.
    pub term: u64,
    /// The coordinator.
    pub peer: Peer,
}

/// A message from one node to another.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CouncilMessage {
    /// The deployment that it is about; nodes of another one ignore it.
    pub deployment: DeploymentId,
    /// What is said.
    pub body: Body,
}

/// What is said.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Body {
    /// The sender asks for a vote.
    VoteRequest {
        /// For this term.
        term: u64,
        /// Term of the sender's charter.
        charter_term: u64,
        /// Version of the sender's charter.
        charter_version: u64,
        /// Only asks whether it would get the vote: nothing is promised, and no term is begun.
        is_trial: bool,
    },
    /// The answer to it.
    VoteReply {
        /// The term that was asked for.
        asked: u64,
        /// Whether the question was a trial.
        is_trial: bool,
        /// Whether the sender gives, or would give, its vote.
        granted: bool,
        /// The highest term that the sender knows.
        term: u64,
        /// The coordinator that the sender is in touch with.
        incumbent: Option<Incumbent>,
    },
    /// The sender is the coordinator of the charter's term, and this is what holds from now on.
    WriteCharter(Charter),
    /// The answer to it: the sender has made a charter durable.
    CharterWritten {
        /// Its term.
        term: u64,
        /// Its version.
        version: u64,
    },
    /// The answer to a coordinator of an old term, and to whoever takes the sender for the coordinator.
    Refused {
        /// The highest term that the sender knows.
        term: u64,
        /// Who coordinates instead.
        incumbent: Option<Incumbent>,
    },
}

impl CouncilMessage {
    /// The message as bytes.
    pub fn encode(&self) -> Vec<u8> {
        encode(self)
    }

    /// Reads a message.
    ///
    /// # Errors
    /// If the bytes are none, or a number is beyond its cap.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        cap("bytes of a council message", bytes.len() as u64, MAX_COUNCIL_BYTES as u64)?;
        let message: Self = decode("council message", bytes)?;
        match &message.body {
            Body::VoteRequest { term, charter_term, charter_version, .. } => {
                cap("term", *term.max(charter_term), MAX_TERM)?;
                cap("version of a charter", *charter_version, MAX_TERM)?;
            }
            Body::VoteReply { asked, term, incumbent, .. } => {
                cap("term", *asked.max(term), MAX_TERM)?;
                incumbent.as_ref().map_or(Ok(()), Incumbent::check)?;
            }
            Body::WriteCharter(charter) => charter.check()?,
            Body::CharterWritten { term, version } => {
                cap("term", *term, MAX_TERM)?;
                cap("version of a charter", *version, MAX_TERM)?;
            }
            Body::Refused { term, incumbent } => {
                cap("term", *term, MAX_TERM)?;
                incumbent.as_ref().map_or(Ok(()), Incumbent::check)?;
            }
        }
        Ok(message)
    }
}

impl Incumbent {
    fn check(&self) -> Result<(), DecodeError> {
        cap("term", self.term, MAX_TERM)?;
        check_addresses(&self.peer.addresses)
    }
}
