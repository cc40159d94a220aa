//! What of a coordinator's options belongs to the deployment: the next coordinator takes it over.

use std::time::Duration;

use brigade_base::{Hash, KvTypes, NodeId};
use brigade_net::Members;
use brigade_plan::Optimize;
use brigade_protocol::schedule::PrefixCache;
use serde::{Deserialize, Serialize};

use super::CoordinatorOptions;
use crate::model::LocalModel;
use crate::purpose::PoolingChoice;

/// Most members that a charter names; with names they stay below its 64 KiB of settings. Others need a ticket after a
/// takeover.
const MAX_MEMBERS: usize = 256;

/// Travels as JSON in the charter.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct DeploymentSettings {
    /// What the model with its adapters is known by.
    pub served_hash: Hash,
    model_name: String,
    /// Nodes that may come in without a ticket, those too that have no vote, and their names.
    pub members: Vec<(NodeId, String)>,
    context: Option<u32>,
    parallel: u32,
    kv: KvTypes,
    nodes_wanted: usize,
    spread: bool,
    split: Option<Vec<u32>>,
    optimize: Optimize,
    prefix_cache: PrefixCache,
    redundancy: u32,
    shadow: bool,
    wait_for_capacity: Duration,
    #[serde(default)]
    pooling: PoolingChoice,
}

impl DeploymentSettings {
    pub(crate) fn of(options: &CoordinatorOptions, model: &LocalModel) -> Self {
        Self {
            served_hash: model.served_hash(),
            model_name: options.model_name.clone().unwrap_or_else(|| model.name().to_owned()),
            members: Vec::new(),
            context: options.context,
            parallel: options.parallel,
            kv: options.kv,
            nodes_wanted: options.nodes_wanted,
            spread: options.spread,
            split: options.split.clone(),
            optimize: options.optimize,
            prefix_cache: options.prefix_cache,
            redundancy: options.redundancy,
            shadow: options.shadow,
            wait_for_capacity: options.wait_for_capacity,
            pooling: options.pooling,
        }
    }

    /// The same with the members that there are.
    pub(crate) fn with_members(mut self, members: &Members) -> Self {
        let known = members.iter().map(|member| (member.node, member.name.chars().take(32).collect()));
        self.members = known.take(MAX_MEMBERS).collect();
        self
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
            model_name: Some(self.model_name),
            context: self.context,
            parallel: self.parallel,
            kv: self.kv,
            // One is lost, or there would be no next coordinator; those that come in time are waited for anyway.
            nodes_wanted: 1,
            spread: self.spread,
            split: self.split,
            optimize: self.optimize,
            prefix_cache: self.prefix_cache,
            redundancy: self.redundancy,
            shadow: self.shadow,
            wait_for_capacity: self.wait_for_capacity,
            pooling: self.pooling,
            ..own
        }
    }
}
