//! The worker and the coordinator: owner loops that hold stages and move tokens through them.
//!
//! - [`Coordinator`] opens a [`LocalModel`], places it with the state machine of `brigade-protocol`, holds the tail
//!   stage and serves [`serving::Request`]s through a [`Handle`].
//! - [`Worker`] runs a stage for a coordinator elsewhere.
//!
//! Each has one thread that owns its state and hears of everything else through one channel; threads that block (links,
//! loading, computing) own what they work on and hand it back.

mod cache;
mod coordinator;
mod doorway;
mod handle;
mod images;
mod incoming;
mod known;
mod loaded;
mod meter;
mod model;
mod outgoing;
mod reach;
mod rehearsal;
mod ring;
pub mod serving;
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
mod trace;
mod weights;
mod worker;

pub use brigade_protocol::schedule::PrefixCache;
pub use coordinator::{
    CHUNK, Coordinator, CoordinatorError, CoordinatorOptions, CoordinatorStopper, DEFAULT_CONTEXT_MAX, MAX_WAITING,
};
pub use handle::Handle;
pub use known::probe_coordinator;
pub use meter::CONTENT_TYPE as METRICS_TYPE;
pub use model::{LocalModel, ModelError, model_profile};
pub use reach::ReachError;
pub use rehearsal::rehearse;
pub use worker::{Worker, WorkerError, WorkerOptions, WorkerStatus, WorkerStopper};
