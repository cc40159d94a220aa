//! Loading a GGUF with llama.cpp, from a reader or from a file; the weights are freed on drop.

use std::any::Any;
use std::ffi::{CString, c_void};
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::{Path, PathBuf};
use std::ptr::{self, NonNull};

use llama_cpp_sys_2 as sys;

use crate::backend::{self, Captured, capture};
use crate::source::{ReadSeek, Source};

/// Whether this build computes on devices beside the CPU.
pub(crate) const HAS_DEVICES: bool =
    cfg!(any(feature = "cuda", feature = "metal", feature = "rocm", feature = "vulkan"));

/// A model was not loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// An option is out of its range.
    #[error("{name} is {value}, but must be from {min} to {max}")]
    Option {
        /// Which.
        name: &'static str,
        /// What it was.
        value: u64,
        /// Least value.
        min: u64,
        /// Greatest value.
        max: u64,
    },
    /// The name of the stop node cannot be the name of a graph node.
    #[error("{name:?} cannot be the name of a graph node: it must have 1 to 63 bytes and no zero byte")]
    StopNode {
        /// The name.
        name: String,
    },
    /// A path cannot be passed to C.
    #[error("the path {} cannot be opened: it must be valid UTF-8 without a zero byte", .0.display())]
    Path(PathBuf),
    /// The reader failed.
    #[error("the model could not be read")]
    Read(#[source] io::Error),
    /// The progress function asked to stop.
    #[error("loading was cancelled")]
    Cancelled,
    /// llama.cpp cannot use the file.
    #[error("llama.cpp refused the model: {0}")]
    Refused(String),
    /// llama.cpp made no context; mostly because memory is short.
    #[error("llama.cpp made no context (try fewer sessions, fewer rows or a shorter context): {0}")]
    Context(String),
    /// The model is not what the caller takes it for.
    #[error("the model has {name} {found}, but {expected} was expected; it does not belong to this deployment")]
    Shape {
        /// Which number.
        name: &'static str,
        /// What the model says.
        found: u64,
        /// What the caller said.
        expected: u64,
    },
    /// The model does not generate text token by token.
    #[error("models with {0} are not served: only decoders that generate text can be")]
    Kind(&'static str),
}

/// Weights and vocabulary of a loaded GGUF.
pub(crate) struct Model {
    raw: NonNull<sys::llama_model>,
}

// SAFETY: llama.cpp ties a model to no thread.
unsafe impl Send for Model {}
// SAFETY: this crate reads a loaded model through `const` functions alone, and those change nothing behind the pointer.
unsafe impl Sync for Model {}

impl Drop for Model {
    fn drop(&mut self) {
        // SAFETY: the pointer came from a load function, and contexts are freed before their model.
        unsafe { sys::llama_model_free(self.raw.as_ptr()) };
    }
}

/// The caller's progress function behind a C callback.
struct Progress<'a> {
    report: &'a mut dyn FnMut(f32) -> bool,
    stopped: bool,
    panic: Option<Box<dyn Any + Send>>,
}

unsafe extern "C" fn on_progress(progress: f32, user_data: *mut c_void) -> bool {
    // SAFETY: `Model::load` passes a `Progress` that outlives the load and that nobody else uses meanwhile.
    let state = unsafe { &mut *user_data.cast::<Progress<'_>>() };
    match catch_unwind(AssertUnwindSafe(|| (state.report)(progress))) {
        Ok(go_on) => state.stopped |= !go_on,
        Err(panic) => {
            state.stopped = true;
            state.panic = Some(panic);
        }
    }
    !state.stopped
}

impl Model {
    /// Loads the GGUF of `n_bytes` that `reader` yields; with `vocab_only` without tensors.
    ///
    /// `progress` hears the loaded share, 0 to 1, and returns whether to go on.
    pub(crate) fn from_reader(
        reader: Box<dyn ReadSeek + Send>,
        n_bytes: u64,
        vocab_only: bool,
        progress: &mut dyn FnMut(f32) -> bool,
    ) -> Result<Self, LoadError> {
        let mut source = Source::new(reader, n_bytes);
        #[cfg(any(target_os = "linux", target_os = "macos"))]
        let loaded = Self::load(vocab_only, progress, |params| {
            source.with_file(|file| {
                // SAFETY: `file` is open for reading for the whole call; the parameters are complete.
                unsafe { sys::llama_model_load_from_file_ptr(file.cast(), params) }
            })
        });
        #[cfg(not(any(target_os = "linux", target_os = "macos")))]
        let loaded = {
            let file = source.spool().map_err(LoadError::Read)?;
            Self::from_file_with(file.path(), vocab_only, progress)
        };
        match source.failure.take() {
            Some(error) => Err(LoadError::Read(error)),
            None => loaded,
        }
    }

    /// Loads a whole GGUF from its file, with llama.cpp's own reader.
    pub(crate) fn from_file(path: &Path) -> Result<Self, LoadError> {
        Self::from_file_with(path, false, &mut |_| true)
    }

    fn from_file_with(path: &Path, vocab_only: bool, progress: &mut dyn FnMut(f32) -> bool) -> Result<Self, LoadError> {
        let c_path =
            path.to_str().and_then(|path| CString::new(path).ok()).ok_or_else(|| LoadError::Path(path.to_owned()))?;
        Self::load(vocab_only, progress, |params| {
            // SAFETY: the path is a C string that outlives the call; the parameters are complete.
            Some(unsafe { sys::llama_model_load_from_file(c_path.as_ptr(), params) })
        })
    }

    /// Calls `load` with the parameters that all loads share. It returns `None` if no file could be opened.
    fn load(
        vocab_only: bool,
        progress: &mut dyn FnMut(f32) -> bool,
        load: impl FnOnce(sys::llama_model_params) -> Option<*mut sys::llama_model>,
    ) -> Result<Self, LoadError> {
        backend::init();
        let mut progress = Progress { report: progress, stopped: false, panic: None };
        // SAFETY: the function only returns a struct of plain values.
        let mut params = unsafe { sys::llama_model_default_params() };
        params.load_mode = sys::LLAMA_LOAD_MODE_NONE;
        params.n_gpu_layers = if HAS_DEVICES { -1 } else { 0 };
        params.vocab_only = vocab_only;
        params.progress_callback = Some(on_progress);
        params.progress_callback_user_data = ptr::from_mut(&mut progress).cast();
        let (raw, captured): (_, Captured) = capture(|| load(params));
        if let Some(panic) = progress.panic {
            resume_unwind(panic);
        }
        let raw = raw.ok_or_else(|| LoadError::Read(io::Error::last_os_error()))?;
        match NonNull::new(raw) {
            Some(raw) => {
                captured.log();
                Ok(Self { raw })
            }
            None if progress.stopped => Err(LoadError::Cancelled),
            None => Err(LoadError::Refused(captured.message())),
        }
    }

    /// The model for calls of llama.cpp; valid as long as `self`.
    pub(crate) fn as_ptr(&self) -> *mut sys::llama_model {
        self.raw.as_ptr()
    }

    /// The vocabulary; valid as long as `self`.
    pub(crate) fn vocab(&self) -> *const sys::llama_vocab {
        // SAFETY: the model is loaded.
        unsafe { sys::llama_model_get_vocab(self.raw.as_ptr()) }
    }

    /// Tokens of the vocabulary.
    pub(crate) fn n_vocab(&self) -> u32 {
        // SAFETY: the vocabulary belongs to this model.
        u32::try_from(unsafe { sys::llama_vocab_n_tokens(self.vocab()) }).unwrap_or(0)
    }

    /// Width of the hidden state that enters the first layer.
    pub(crate) fn n_embd(&self) -> u32 {
        // SAFETY: the model is loaded.
        u32::try_from(unsafe { sys::llama_model_n_embd_inp(self.raw.as_ptr()) }).unwrap_or(0)
    }

    /// Layers of this GGUF.
    pub(crate) fn n_layers(&self) -> u32 {
        // SAFETY: the model is loaded.
        u32::try_from(unsafe { sys::llama_model_n_layer(self.raw.as_ptr()) }).unwrap_or(0)
    }

    /// Attention heads of the first layer.
    pub(crate) fn n_heads(&self) -> u32 {
        // SAFETY: the model is loaded.
        u32::try_from(unsafe { sys::llama_model_n_head(self.raw.as_ptr()) }).unwrap_or(0)
    }

    /// Bytes of all tensors.
    pub(crate) fn n_bytes(&self) -> u64 {
        // SAFETY: the model is loaded.
        unsafe { sys::llama_model_size(self.raw.as_ptr()) }
    }

    /// Position planes of a row: 4 with M-RoPE (time, height, width, unused), else 1.
    pub(crate) fn n_position_planes(&self) -> usize {
        // SAFETY: the model is loaded.
        match unsafe { sys::llama_model_rope_type(self.raw.as_ptr()) } {
            sys::LLAMA_ROPE_TYPE_MROPE | sys::LLAMA_ROPE_TYPE_IMROPE => 4,
            _ => 1,
        }
    }

    /// Whether layers keep a state that a token changes for good, instead of or beside a KV cache.
    pub(crate) fn is_recurrent(&self) -> bool {
        let raw = self.raw.as_ptr();
        // SAFETY: the model is loaded; the functions only look at its architecture.
        unsafe { sys::llama_model_is_recurrent(raw) || sys::llama_model_is_hybrid(raw) }
    }

    /// Whether layers attend to a window of the past only.
    pub(crate) fn has_window(&self) -> bool {
        // SAFETY: the model is loaded.
        unsafe { sys::llama_model_n_swa(self.raw.as_ptr()) > 0 }
    }

    /// Refuses models that decode in another way than one causal pass per batch.
    pub(crate) fn check_kind(&self) -> Result<(), LoadError> {
        let raw = self.raw.as_ptr();
        // SAFETY: the model is loaded; the functions only look at its architecture.
        let (encoder, decoder, diffusion) = unsafe {
            (sys::llama_model_has_encoder(raw), sys::llama_model_has_decoder(raw), sys::llama_model_is_diffusion(raw))
        };
        match (encoder, decoder, diffusion) {
            (true, ..) => Err(LoadError::Kind("an encoder")),
            (_, false, _) => Err(LoadError::Kind("no decoder")),
            (.., true) => Err(LoadError::Kind("diffusion")),
            _ => Ok(()),
        }
    }
}
