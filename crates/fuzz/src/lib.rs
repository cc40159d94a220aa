//! What Brigade reads from strangers, as functions for a fuzzer: any bytes go in, and what must hold is asserted.
//!
//! - [`headers`]: the header of a model, and the stages that are cut out of it.
//! - [`adapters`]: LoRA adapters, and the parts of them that stages get.
//! - [`templates`]: a chat template and messages.
//! - [`hub`]: what servers of models say.
//! - [`messages`]: what nodes say to each other, tickets and addresses.
//! - [`mutate`]: changes headers so that they stay headers, since random bytes rarely get past the parser.
//!
//! `fuzz/` beside this crate's sources hands them to libFuzzer: a workspace of its own, since it needs a nightly
//! compiler. There are the corpora too: inputs that reach different code, and what once failed. A test here replays all
//! of them, with any compiler.

#![expect(clippy::expect_used, reason = "a failure is what the fuzzer looks for")]

pub mod adapters;
pub mod headers;
pub mod hub;
pub mod messages;
pub mod mutate;
pub mod templates;

/// A target: its name, which its corpus has too, and its function.
pub type Target = (&'static str, fn(&[u8]));

/// All targets.
pub const TARGETS: [Target; 6] = [
    ("header", headers::header),
    ("stage_view", headers::stage_view),
    ("adapter", adapters::adapter),
    ("chat_template", templates::chat_template),
    ("hub", hub::reply),
    ("message", messages::message),
];
