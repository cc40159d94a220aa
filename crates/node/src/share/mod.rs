//! Weights that nodes of a cluster give each other.
//!
//! - [`Shelf`] is what a node has and gives: its own copy of the model, and its cache. The door lets in whom the
//!   coordinator has named; what is asked for is looked up by hash, so there is nothing else to be had.
//! - [`Gathering`] is what a node misses while it loads a stage: one thread for each source, all taking from one
//!   [`pool::Pool`]. The thread that loads owns it, watches over the others and ends them.
//! - [`tree`] verifies each block as it comes. A source that sends a wrong one is not asked again.
//! - [`hub`] is a source of another kind: the server that the model came from.
//! - [`Tally`] counts what came from where.
//!
//! Messages are those of [`brigade_protocol::weights`].

mod gathering;
mod hub;
mod pool;
mod shelf;
mod talk;
mod tally;
#[cfg(test)]
mod tests;
mod tree;

pub use gathering::{Failed, Gathering, NoLink, Suppliers, Wanted};
pub use hub::{DirectFetch, HubReader, read_from_hub};
pub use shelf::{OwnCopy, Shelf, Stock};
pub use tally::{Origin, Tally};
pub use tree::Trees;
