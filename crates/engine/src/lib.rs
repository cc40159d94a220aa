//! Safe Rust over llama.cpp; the only crate of Brigade with `unsafe` code.
//!
//! - [`Stage`] computes the layers of one GGUF: a cut-out of a model, or a whole one. It owns its weights, its KV cache
//!   and its compute threads; its owner calls it from one thread at a time.
//! - [`Vocabulary`] turns text into tokens and back.
//! - [`Sampler`] chooses a token from logits; plain Rust, no state of llama.cpp.
//! - [`dequantize_rows`] looks token embeddings up, [`quantize_rows`] makes test models.
//!
//! A safe method checks its arguments before each call, so that no assertion of llama.cpp, which would end the process,
//! can be reached through it. What is *not* checked here is the GGUF itself: `brigade-gguf` reads it first.

#![cfg_attr(test, allow(clippy::unwrap_used, reason = "a test that cannot go on has failed"))]

mod adapter;
mod backend;
mod batch;
mod context;
mod heap;
mod kv;
mod kv_types;
mod model;
mod pooling;
mod rehearsal;
mod run;
mod sampler;
mod sampling;
mod shapes;
mod source;
mod stage;
mod tensor;
mod trial;
mod vocabulary;

pub use adapter::AdapterSource;
pub use backend::init;
pub use heap::return_large_blocks;
pub use kv::KvError;
pub use model::{HAS_DEVICES, LoadError};
pub use rehearsal::{rehearse, rehearse_adapted};
pub use run::{Input, Row, RunError};
pub use sampler::{NoNumbers, Sampler, log_probabilities};
pub use sampling::{Sampling, SamplingError};
pub use shapes::{TensorShape, tensor_shapes};
pub use source::ReadSeek;
pub use stage::{Activity, Canceller, Stage, StageMemory, StageOptions};
pub use tensor::{TensorError, dequantize_rows, quantize_rows};
pub use trial::{hollow, try_passes};
pub use vocabulary::{TokenizeError, Vocabulary};
