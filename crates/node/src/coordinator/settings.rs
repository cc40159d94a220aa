//! What of a coordinator's options belongs to the deployment: the next coordinator takes it over.

use std::time::Duration;

use brigade_base::Hash;
use brigade_protocol::schedule::PrefixCache;
use serde::{Deserialize, Serialize};

use super::CoordinatorOptions;

/// Travels as JSON in the charter.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct DeploymentSettings {
    /// Hash of the model's header.
    pub header_hash: Hash,
    context: Option<u32>,
    parallel: u32,
    nodes_wanted: usize,
    spread: bool,
    split: Option<Vec<u32>>,
    prefix_cache: PrefixCache,
    redundancy: u32,
    shadow: bool,
    wait_for_capacity: Duration,
}

impl DeploymentSettings {
    pub(crate) fn of(options: &CoordinatorOptions, header_hash: Hash) -> Self {
        Self {
            header_hash,
            context: options.context,
            parallel: options.parallel,
            nodes_wanted: options.nodes_wanted,
            spread: options.spread,
            split: options.split.clone(),
            prefix_cache: options.prefix_cache,
            redundancy: options.redundancy,
            shadow: options.shadow,
            wait_for_capacity: options.wait_for_capacity,
        }
    }

    /// As bytes for a charter.
    pub(crate) fn encode(&self) -> Vec<u8> {
        // Writing to memory fails for no value of these types.
        serde_json::to_vec(self).unwrap_or_default()
    }

    /// Reads what another coordinator wrote; `None` if this program does not understand it.
    pub(crate) fn decode(bytes: &[u8]) -> Option<Self> {
        serde_json::from_slice(bytes).ok()
    }

    /// The options of the next coordinator: `own` says what is its own.
    pub(crate) fn into_options(self, own: CoordinatorOptions) -> CoordinatorOptions {
        CoordinatorOptions {
            context: self.context,
            parallel: self.parallel,
            // One is lost, or there would be no next coordinator; those that come in time are waited for anyway.
            nodes_wanted: 1,
            spread: self.spread,
            split: self.split,
            prefix_cache: self.prefix_cache,
            redundancy: self.redundancy,
            shadow: self.shadow,
            wait_for_capacity: self.wait_for_capacity,
            ..own
        }
    }
}
