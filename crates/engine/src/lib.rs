//! Safe Rust over llama.cpp; the only crate of Brigade with `unsafe` code.

mod sampling;

pub use sampling::Sampling;
