//! GGUF without FFI: a header reader with a cap on every length, split files, and *stage views*.
//!
//! - [`ModelFile`] opens a model (all splits) and owns its open files; [`Catalog`] is its header, merged and checked.
//! - [`Architecture`] turns a catalog's metadata into hyperparameters that libllama will accept, or refuses the model.
//! - [`StageView`] is a model of its own for a range of layers: a synthesised header, and slices of the real tensors.
//!   [`StageReader`] serves its bytes from any [`TensorSource`] (the local file, a peer) and never holds them all.
//! - [`AdapterView`] is the same for LoRA adapters.
//! - [`Manifest`] and [`model_id`] name a model by its content.
//! - [`SyntheticTensors`] stand in for a model's weights where only its speed matters.
//! - [`Builder`] writes GGUF; stage views and synthetic models are laid out by it.
//!
//! Catalog, architecture and view are plain values without I/O; only `ModelFile`, `Manifest` and readers touch bytes.

mod adapter;
mod architecture;
mod builder;
mod catalog;
mod cuts;
mod file;
mod ggml_type;
mod header;
mod identity;
mod reader;
mod rules;
mod stage;
mod state;
mod synthetic;
mod value;

pub use adapter::{
    AdapterError, AdapterView, MAX_ADAPTER_BYTES, MAX_ADAPTERS, MAX_SCALE, adapter_bytes, bundle_adapters,
    check_adapter,
};
pub use architecture::{Architecture, ArchitectureError, SlidingWindow};
pub use builder::{BuildError, Builder, DATA_ALIGNMENT};
pub use catalog::{Catalog, TensorRole, TensorSource, vocabulary_header};
pub use file::{ModelFile, OpenError};
pub use ggml_type::GgmlType;
pub use header::{
    HeaderError, MAX_ALIGNMENT, MAX_HEADER_BYTES, MAX_KEY_BYTES, MAX_KEYS, MAX_NAME_BYTES, MAX_STRING_BYTES,
    MAX_TENSORS, TensorInfo,
};
pub use identity::{Manifest, model_id};
pub use reader::StageReader;
pub use rules::supported_architectures;
pub use stage::{PLACEHOLDER_VOCAB, StageView, StageViewError};
pub use synthetic::SyntheticTensors;
pub use value::{Array, Metadata, Scalars, Strings, Value, ValueType};
