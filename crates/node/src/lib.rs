//! The worker and the coordinator: owner loops that hold stages and move tokens through them.

pub mod serving;
