//! A node: it holds stages and moves tokens through them, as the coordinator or as a worker.
//!
//! - [`Node`] owns the part that a node plays and changes it as the council says. A coordinator opens a [`LocalModel`],
//!   places it with the state machine of `brigade-protocol`, holds the tail stage and serves [`serving::Request`]s
//!   through a [`Handle`]. A worker runs stages for a coordinator elsewhere.
//! - The `council` is the node's vote on who coordinates: the state machine of `brigade-protocol` with file and links.
//! - The `site` is what a node keeps through all parts: key, state directory, the address where links come in.
//! - [`Gateway`] answers requests on any node, through whoever coordinates.
//!
//! Each has one thread that owns its state and hears of everything else through one channel; threads that block (links,
//! loading, computing) own what they work on and hand it back.

mod activity;
mod adapters;
mod cache;
pub mod certify;
mod coordinator;
mod council;
pub mod doctor;
mod doorway;
mod gateway;
mod handle;
mod handover;
mod images;
mod incoming;
mod known;
mod loaded;
pub mod measure;
mod meter;
mod model;
mod node;
mod outgoing;
mod probe;
mod purpose;
mod reach;
mod rehearsal;
mod ring;
pub mod serving;
mod shadow;
mod share;
mod site;
mod sizes;
mod stage_pass;
mod stage_thread;
mod state_lock;
pub mod system;
#[cfg(test)]
mod test_link;
#[cfg(test)]
mod test_stage;
mod text;
mod threads;
mod throttle;
mod trace;
pub mod trial;
mod weights;
mod worker;

pub use adapters::AdapterFile;
pub use brigade_protocol::schedule::PrefixCache;
pub use coordinator::{CHUNK, CoordinatorError, CoordinatorOptions, DEFAULT_CONTEXT_MAX, MAX_WAITING};
pub use gateway::Gateway;
pub use handle::Handle;
pub use meter::CONTENT_TYPE as METRICS_TYPE;
pub use model::{LocalModel, ModelError, model_profile};
pub use node::{Node, NodeError, NodeStopper, Part};
pub use purpose::{PoolingChoice, PurposeError, UnknownPoolingChoice, Work};
pub use reach::ReachError;
pub use rehearsal::rehearse;
pub use share::DirectFetch;
pub use site::SiteError;
pub use sizes::{SizesError, rehearse_model};
pub use worker::{WorkerError, WorkerOptions, WorkerStatus};
