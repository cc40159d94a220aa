//! Identifiers, units, layer ranges, kinds of KV caches and of pooling, hooks: the words that all crates share.
//!
//! Nothing here does I/O. Each type is checked where it is made, so that code which holds one need not check again.

mod hooks;
mod ids;
mod kv;
mod layers;
mod pooling;
mod units;

pub use hooks::{Hooks, LayerScale};
pub use ids::{
    DeploymentId, Epoch, Hash, IdError, ImageId, MAX_NODE_NAME_CHARS, ModelId, NodeId, PassId, SessionId, TenantId,
    is_node_name,
};
pub use kv::{KvType, KvTypes, UnknownKvType};
pub use layers::{LayerRange, LayerRangeError};
pub use pooling::{Pooling, UnknownPooling};
pub use units::{ByteSize, ByteSizeError};

/// A token of a model's vocabulary, as libllama numbers them. Negative values never name a token.
pub type Token = i32;
