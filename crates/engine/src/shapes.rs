//! Which tensors llama.cpp wants for given metadata: the shapes of a model that does not exist yet.
//!
//! llama.cpp creates a model from metadata alone and asks for the content of each tensor. Those calls are the list;
//! the model is dropped at once. Test models of any architecture are made from it.

use std::ffi::{CStr, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr::{self, NonNull};

use llama_cpp_sys_2 as sys;

use crate::backend;
use crate::model::{LoadError, Model};

/// A tensor that a model has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorShape {
    /// Its name in the file.
    pub name: String,
    /// Its dimensions, innermost first, without ones at the end; at least one.
    pub dims: Vec<u64>,
}

/// The tensors that llama.cpp creates for the metadata in `header`, a GGUF without tensors, in its own order. Optional
/// tensors are among them, fused forms of others are not.
///
/// The metadata is taken as it is: where it is unsound, llama.cpp ends the process. It is for metadata that the caller
/// made, never for a file from elsewhere. Memory for all tensors in F32 is taken for a moment.
///
/// # Errors
/// If `header` is no GGUF or llama.cpp refuses its metadata.
pub fn tensor_shapes(header: &[u8]) -> Result<Vec<TensorShape>, LoadError> {
    backend::init();
    let metadata = Metadata::parse(header)?;
    let mut shapes: Vec<TensorShape> = Vec::new();
    let model = Model::from_metadata(|params| {
        // SAFETY: the metadata is alive during the call, which only reads it; `on_tensor` gets the list back as user
        // data, and nobody else uses it until the call returns.
        unsafe {
            sys::llama_model_init_from_user(
                metadata.0.as_ptr(),
                Some(on_tensor),
                ptr::from_mut(&mut shapes).cast::<c_void>(),
                params,
            )
        }
    });
    drop(model?);
    Ok(shapes)
}

/// A parsed GGUF header.
struct Metadata(NonNull<sys::gguf_context>);

impl Metadata {
    fn parse(header: &[u8]) -> Result<Self, LoadError> {
        let params = sys::gguf_init_params { no_alloc: true, ctx: ptr::null_mut() };
        let (raw, captured) = backend::capture(|| {
            // SAFETY: the bytes are readable for their length during the call, which copies what it keeps.
            unsafe { sys::gguf_init_from_buffer(header.as_ptr().cast(), header.len(), params) }
        });
        NonNull::new(raw).map(Self).ok_or_else(|| LoadError::Refused(captured.message()))
    }
}

impl Drop for Metadata {
    fn drop(&mut self) {
        // SAFETY: the pointer came from `gguf_init_from_buffer`; models keep none of it.
        unsafe { sys::gguf_free(self.0.as_ptr()) };
    }
}

unsafe extern "C" fn on_tensor(tensor: *mut sys::ggml_tensor, user_data: *mut c_void) {
    // SAFETY: llama.cpp passes a tensor of the model; `tensor_shapes` passes its list, which nobody else uses now.
    let (tensor, shapes) = unsafe { (&*tensor, &mut *user_data.cast::<Vec<TensorShape>>()) };
    // Running out of memory is the only way to panic here; the list is then incomplete, and the model is refused later.
    let _ = catch_unwind(AssertUnwindSafe(|| {
        // SAFETY: ggml ends names with NUL inside of the array.
        let name = unsafe { CStr::from_ptr(tensor.name.as_ptr()) }.to_string_lossy().into_owned();
        let mut dims: Vec<u64> = tensor.ne.iter().map(|n| u64::try_from(*n).unwrap_or(0)).collect();
        while dims.len() > 1 && dims.last() == Some(&1) {
            dims.pop();
        }
        shapes.push(TensorShape { name, dims });
    }));
}
