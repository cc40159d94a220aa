//! How many bytes of weights came from where.

use std::sync::atomic::{AtomicU64, Ordering};

use brigade_protocol::weights::WeightBytes;

/// Where bytes of weights come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// The node's own copy of the model.
    OwnCopy,
    /// Its cache.
    Cache,
    /// The coordinator.
    Coordinator,
    /// Another worker.
    Worker,
    /// The server that the model came from.
    Hub,
}

/// Counts bytes; shared by all that fetch and serve.
#[derive(Debug, Default)]
pub struct Tally {
    came: [AtomicU64; 5],
    served: AtomicU64,
}

impl Tally {
    /// So many bytes are here.
    pub fn add(&self, origin: Origin, n_bytes: u64) {
        self.came[origin as usize].fetch_add(n_bytes, Ordering::Relaxed);
    }

    /// So many bytes were sent to another node.
    pub fn serve(&self, n_bytes: u64) {
        self.served.fetch_add(n_bytes, Ordering::Relaxed);
    }

    /// The counts.
    pub fn read(&self) -> WeightBytes {
        let came = |origin: Origin| self.came[origin as usize].load(Ordering::Relaxed);
        WeightBytes {
            own_copy: came(Origin::OwnCopy),
            cache: came(Origin::Cache),
            coordinator: came(Origin::Coordinator),
            workers: came(Origin::Worker),
            hub: came(Origin::Hub),
            served: self.served.load(Ordering::Relaxed),
        }
    }
}
