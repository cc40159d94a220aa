//! The coordinator that a worker belongs to, remembered so that it can join again without a ticket.

use std::io;
use std::path::Path;
use std::sync::Arc;

use brigade_base::NodeId;
use brigade_net::{Identity, Purpose, TcpLink, Ticket, TicketSecret, write_atomic};
use serde::{Deserialize, Serialize};

use crate::reach::{ReachError, reach};

const FILE: &str = "coordinator.json";

/// Largest file that is read back; a node has at most 64 addresses.
const MAX_FILE_BYTES: usize = 64 << 10;

/// A coordinator and where it listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KnownCoordinator {
    /// Its key.
    pub node: NodeId,
    /// Where its links listen.
    pub addresses: Vec<String>,
}

#[derive(Serialize, Deserialize)]
struct Stored {
    node: String,
    addresses: Vec<String>,
}

impl KnownCoordinator {
    /// The coordinator that issued a ticket.
    pub fn of(ticket: &Ticket) -> Self {
        Self { node: ticket.coordinator, addresses: ticket.addrs.iter().map(ToString::to_string).collect() }
    }

    /// The coordinator of the last join, if there was one.
    ///
    /// # Errors
    /// If the file is there but cannot be read.
    pub fn load(state_dir: &Path) -> io::Result<Option<Self>> {
        let path = state_dir.join(FILE);
        let bytes = match std::fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        let broken = || {
            let text = format!("{} is broken; remove it and join with a ticket", path.display());
            io::Error::new(io::ErrorKind::InvalidData, text)
        };
        if bytes.len() > MAX_FILE_BYTES {
            return Err(broken());
        }
        let stored: Stored = serde_json::from_slice(&bytes).map_err(|_| broken())?;
        let node = stored.node.parse().map_err(|_| broken())?;
        Ok(Some(Self { node, addresses: stored.addresses }))
    }

    /// Remembers it.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn save(&self, state_dir: &Path) -> io::Result<()> {
        let stored = Stored { node: self.node.to_string(), addresses: self.addresses.clone() };
        let bytes = serde_json::to_vec_pretty(&stored)?;
        write_atomic(&state_dir.join(FILE), &bytes, 0o600)
    }

    /// Dials it.
    ///
    /// # Errors
    /// If it is not there or refuses.
    pub fn dial(
        &self,
        identity: &Identity,
        purpose: Purpose,
        secret: Option<&TicketSecret>,
    ) -> Result<Arc<TcpLink>, ReachError> {
        reach(identity, self.node, &self.addresses, purpose, secret)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_coordinator_is_remembered() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(KnownCoordinator::load(dir.path()).unwrap(), None);
        let known = KnownCoordinator { node: NodeId::from_bytes([7; 32]), addresses: vec!["10.0.0.1:7".into()] };
        known.save(dir.path()).unwrap();
        assert_eq!(KnownCoordinator::load(dir.path()).unwrap(), Some(known));
        std::fs::write(dir.path().join(FILE), "{").unwrap();
        assert!(KnownCoordinator::load(dir.path()).unwrap_err().to_string().contains("join with a ticket"));
    }
}
