//! What a stage would take in memory, found out without loading it.
//!
//! llama.cpp reads the header alone, builds the graphs of the largest passes, and adds up what their buffers would be.
//! It takes milliseconds, and no memory to speak of. The sums are those of a stage that is loaded with the same options
//! on the same devices.
//!
//! An adapter is no part of the graphs that are made with a context, but of those that are made anew once it is set:
//! before the first pass, or here, without one ([`rehearse_adapted`]).

use std::ffi::c_void;
use std::ptr;

use brigade_base::KvTypes;
use llama_cpp_sys_2 as sys;

use crate::adapter::{Adapter, AdapterSource};
use crate::backend::capture;
use crate::context::Context;
use crate::model::{Content, LoadError, Model};
use crate::source::ReadSeek;
use crate::stage::{StageMemory, StageOptions};

/// What [`Stage::load`](crate::Stage::load) would take for the GGUF of `n_bytes` bytes that `reader` yields; only its
/// header is read.
///
/// # Errors
/// As [`Stage::load`](crate::Stage::load), but for what is wrong with tensors alone.
pub fn rehearse(
    reader: Box<dyn ReadSeek + Send>,
    n_bytes: u64,
    options: &StageOptions,
) -> Result<StageMemory, LoadError> {
    options.check()?;
    // Nothing is computed, so nobody need wait to compute.
    let options = StageOptions { n_threads: 1, ..options.clone() };
    let model = Model::from_reader(reader, n_bytes, Content::Sizes, &mut |_| true)?;
    model.check_kind()?;
    let (_context, captured) = Context::new(&model, &options, model.n_embd())?;
    let kv = captured.kv_bytes + captured.cell_bytes;
    Ok(StageMemory { weights: model.n_bytes(), kv, compute: captured.compute_bytes })
}

/// Builds the same graphs with an adapter, whose weights are read. What is wrong with them ends the process: libllama
/// counts the nodes of a graph before it is made, and takes each matrix for one that is used once.
///
/// # Errors
/// As [`rehearse`], and if llama.cpp refuses the adapter.
pub fn rehearse_adapted(
    reader: Box<dyn ReadSeek + Send>,
    n_bytes: u64,
    adapter: AdapterSource,
    options: &StageOptions,
) -> Result<(), LoadError> {
    options.check()?;
    // With as many cells as rows the graphs would be made for training. And those are without flash attention, which
    // values in blocks cannot be without.
    let n_ctx = options.n_ctx.max(options.n_graph_rows() + 1);
    let options = StageOptions { n_ctx, n_threads: 1, kv: KvTypes::default(), ..options.clone() };
    let model = Model::from_reader(reader, n_bytes, Content::Sizes, &mut |_| true)?;
    model.check_kind()?;
    let adapter = Adapter::load(&model, adapter)?;
    let (mut context, _) = Context::new(&model, &options, model.n_embd())?;
    context.set_adapters(&[adapter]);
    context.reserve(&model);
    Ok(())
}

impl Context {
    /// Builds the graphs of the largest passes anew. Of what llama.cpp offers, only the start of a training does that
    /// without a pass; the context is good for nothing else afterwards.
    fn reserve(&mut self, model: &Model) {
        unsafe extern "C" fn nothing(_: *const sys::ggml_tensor, _: *mut c_void) -> bool {
            false
        }
        let params = sys::llama_opt_params {
            // A whole number of batches, as it has to be.
            n_ctx_train: self.n_batch(),
            param_filter: Some(nothing),
            param_filter_ud: ptr::null_mut(),
            get_opt_pars: None,
            get_opt_pars_ud: ptr::null_mut(),
            optimizer_type: sys::GGML_OPT_OPTIMIZER_TYPE_ADAMW,
        };
        // SAFETY: both exist, the context is one of the model, and nobody else uses them. The filter takes nothing for
        // training, so no tensor is changed; the functions for training are never called.
        capture(|| unsafe { sys::llama_opt_init(self.as_ptr(), model.as_ptr(), params) }).1.log();
    }
}
