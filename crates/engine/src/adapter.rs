//! LoRA adapters of a stage: small matrices beside those of the model, whose product is added to theirs.
//!
//! An adapter is loaded before the context is made, since the size of its graphs depends on it, and freed with the
//! model. Its header must have been checked against the model's: llama.cpp checks less than its graphs then assert.

use std::path::Path;
use std::ptr::NonNull;

use llama_cpp_sys_2 as sys;

use crate::backend::capture;
use crate::context::Context;
use crate::model::{LoadError, Model};
use crate::source::{ReadSeek, Source};

/// An adapter to load, as a GGUF.
pub struct AdapterSource {
    /// Yields its bytes.
    pub reader: Box<dyn ReadSeek + Send>,
    /// How many there are.
    pub n_bytes: u64,
    /// Bytes of its tensors.
    pub weight_bytes: u64,
    /// What its product is multiplied by, beside what the GGUF says.
    pub scale: f32,
}

impl std::fmt::Debug for AdapterSource {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { n_bytes, scale, .. } = self;
        f.debug_struct("AdapterSource").field("n_bytes", n_bytes).field("scale", scale).finish_non_exhaustive()
    }
}

/// An adapter in memory. The model that it was loaded for frees it.
pub(crate) struct Adapter {
    raw: NonNull<sys::llama_adapter_lora>,
    scale: f32,
}

impl Adapter {
    /// Loads an adapter of `model`.
    pub(crate) fn load(model: &Model, source: AdapterSource) -> Result<Self, LoadError> {
        let AdapterSource { reader, n_bytes, scale, .. } = source;
        let mut source = Source::new(reader, n_bytes);
        let model = model.as_ptr();
        #[cfg(any(target_os = "linux", target_os = "macos"))]
        let (raw, captured) = capture(|| {
            source.with_file(|file| {
                // SAFETY: the model is loaded, and nobody else uses it yet; `file` is open for reading for the call.
                unsafe { sys::llama_adapter_lora_init_from_file_ptr(model, file.cast()) }
            })
        });
        #[cfg(not(any(target_os = "linux", target_os = "macos")))]
        let (raw, captured) = {
            let file = source.spool().map_err(LoadError::Read)?;
            let path = c_path(file.path())?;
            // SAFETY: the model is loaded, and nobody else uses it yet; the path outlives the call.
            capture(|| Some(unsafe { sys::llama_adapter_lora_init(model, path.as_ptr()) }))
        };
        if let Some(error) = source.failure.take() {
            return Err(LoadError::Read(error));
        }
        let raw = raw.ok_or_else(|| LoadError::Read(std::io::Error::last_os_error()))?;
        match NonNull::new(raw) {
            Some(raw) => Ok(Self { raw, scale }),
            None => Err(LoadError::Adapter(captured.message())),
        }
    }

    /// Loads an adapter of `model` from its file, with llama.cpp's own reader.
    pub(crate) fn load_file(model: &Model, path: &Path, scale: f32) -> Result<Self, LoadError> {
        let path = c_path(path)?;
        // SAFETY: the model is loaded, and nobody else uses it yet; the path outlives the call.
        let (raw, captured) = capture(|| unsafe { sys::llama_adapter_lora_init(model.as_ptr(), path.as_ptr()) });
        let raw = NonNull::new(raw).ok_or_else(|| LoadError::Adapter(captured.message()))?;
        Ok(Self { raw, scale })
    }
}

fn c_path(path: &Path) -> Result<std::ffi::CString, LoadError> {
    let path_error = || LoadError::Path(path.to_owned());
    path.to_str().and_then(|path| std::ffi::CString::new(path).ok()).ok_or_else(path_error)
}

impl Context {
    /// Has all passes from now on go through these adapters of the context's model.
    pub(crate) fn set_adapters(&mut self, adapters: &[Adapter]) {
        let mut raw: Vec<_> = adapters.iter().map(|adapter| adapter.raw.as_ptr()).collect();
        let mut scales: Vec<f32> = adapters.iter().map(|adapter| adapter.scale).collect();
        // SAFETY: the context exists, both arrays have as many entries as is said and are copied, and the adapters
        // belong to the model, which outlives the context.
        unsafe { sys::llama_set_adapters_lora(self.as_ptr(), raw.as_mut_ptr(), raw.len(), scales.as_mut_ptr()) };
    }
}
