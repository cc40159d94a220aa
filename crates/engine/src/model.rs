//! Loading a GGUF with llama.cpp, from a reader or from a file; the weights are freed on drop.

use std::any::Any;
use std::ffi::{CStr, CString, c_void};
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::{Path, PathBuf};
use std::ptr::{self, NonNull};

use llama_cpp_sys_2 as sys;

use crate::backend::{self, Captured, capture};
use crate::source::{ReadSeek, Source};

/// Whether this build computes on devices beside the CPU.
pub const HAS_DEVICES: bool = cfg!(any(feature = "cuda", feature = "metal", feature = "rocm", feature = "vulkan"));

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
    /// A factor would make all values infinite or zero.
    #[error("the factor of {node} is {factor}, but must be a number above 0")]
    Factor {
        /// What is scaled.
        node: String,
        /// The factor.
        factor: f32,
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
    /// The model is of a kind that no graph here can run.
    #[error("models with {0} are not served: only decoders that generate text, and models that embed texts, can be")]
    Kind(&'static str),
    /// llama.cpp cannot use an adapter.
    #[error("llama.cpp refused the adapter: {0}")]
    Adapter(String),
    /// The KV cache cannot be stored so.
    #[error(
        "a KV cache in {ty} stores {} elements together, but the {side} of this model have {length}; use f16 for the {side}",
        .ty.block_elements()
    )]
    KvType {
        /// The type that was asked for.
        ty: brigade_base::KvType,
        /// `keys` or `values`.
        side: &'static str,
        /// Elements of one head.
        length: u32,
    },
    /// The model keeps no KV cache, so it yields no tokens one after the other.
    #[error("this model generates no text: it embeds texts; load it with a pooling")]
    NoText,
    /// The model has no such output.
    #[error("the pooling {0} is not possible: {1}")]
    Pooling(brigade_base::Pooling, &'static str),
}

/// Makes llama.cpp load a model; `None` if no file could be opened.
type LoadFn<'a> = &'a mut dyn FnMut(sys::llama_model_params) -> Option<*mut sys::llama_model>;

/// What of a GGUF is loaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Content {
    All,
    /// No tensors.
    Vocabulary,
    /// Names, types and shapes of tensors. A context of such a model allocates nothing and cannot compute.
    Sizes,
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
    /// Loads the GGUF of `n_bytes` that `reader` yields, or a part of it.
    ///
    /// `progress` hears the loaded share, 0 to 1, and returns whether to go on.
    pub(crate) fn from_reader(
        reader: Box<dyn ReadSeek + Send>,
        n_bytes: u64,
        content: Content,
        progress: &mut dyn FnMut(f32) -> bool,
    ) -> Result<Self, LoadError> {
        let mut source = Source::new(reader, n_bytes);
        #[cfg(any(target_os = "linux", target_os = "macos"))]
        let loaded = Self::load(content, progress, &mut |params| {
            source.rewind();
            source.with_file(|file| {
                // SAFETY: `file` is open for reading for the whole call; the parameters are complete.
                unsafe { sys::llama_model_load_from_file_ptr(file.cast(), params) }
            })
        });
        #[cfg(not(any(target_os = "linux", target_os = "macos")))]
        let loaded = {
            let file = source.spool().map_err(LoadError::Read)?;
            Self::from_file_with(file.path(), content, progress)
        };
        match source.failure.take() {
            Some(error) => Err(LoadError::Read(error)),
            None => loaded,
        }
    }

    /// Loads a whole GGUF from its file, with llama.cpp's own reader.
    pub(crate) fn from_file(path: &Path) -> Result<Self, LoadError> {
        Self::from_file_with(path, Content::All, &mut |_| true)
    }

    /// Creates a model without a file: `create` gets the parameters that all loads share.
    pub(crate) fn from_metadata(
        mut create: impl FnMut(sys::llama_model_params) -> *mut sys::llama_model,
    ) -> Result<Self, LoadError> {
        Self::load_once(Content::All, true, &mut |_| true, &mut |params| Some(create(params)))
    }

    fn from_file_with(path: &Path, content: Content, progress: &mut dyn FnMut(f32) -> bool) -> Result<Self, LoadError> {
        let c_path =
            path.to_str().and_then(|path| CString::new(path).ok()).ok_or_else(|| LoadError::Path(path.to_owned()))?;
        Self::load(content, progress, &mut |params| {
            // SAFETY: the path is a C string that outlives the call; the parameters are complete.
            Some(unsafe { sys::llama_model_load_from_file(c_path.as_ptr(), params) })
        })
    }

    /// Calls `load` with the parameters that all loads share. It returns `None` if no file could be opened.
    ///
    /// With AMX it is called twice. llama.cpp then puts matrices into buffers of their own, after a look at each matrix
    /// alone, and computes wrongly what some graphs do with them ([`Model::breaks_amx`]). So the metadata is read
    /// first, and such a model gets plain buffers.
    fn load(content: Content, progress: &mut dyn FnMut(f32) -> bool, load: LoadFn<'_>) -> Result<Self, LoadError> {
        // SAFETY: the function only tells how ggml was compiled.
        let has_amx = unsafe { sys::ggml_cpu_has_amx_int8() } != 0;
        let may_repack = content == Content::Vocabulary || !has_amx || {
            let model = Self::load_once(Content::Vocabulary, true, &mut |_| true, load)?;
            !model.breaks_amx()
        };
        Self::load_once(content, may_repack, progress, load)
    }

    fn load_once(
        content: Content,
        may_repack: bool,
        progress: &mut dyn FnMut(f32) -> bool,
        load: LoadFn<'_>,
    ) -> Result<Self, LoadError> {
        backend::init();
        let mut progress = Progress { report: progress, stopped: false, panic: None };
        // SAFETY: the function only returns a struct of plain values.
        let mut params = unsafe { sys::llama_model_default_params() };
        params.load_mode = sys::LLAMA_LOAD_MODE_NONE;
        params.n_gpu_layers = if HAS_DEVICES { -1 } else { 0 };
        params.vocab_only = content == Content::Vocabulary;
        params.no_alloc = content == Content::Sizes;
        params.use_extra_bufts = may_repack;
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

    /// Whether its graph multiplies matrices by inputs that buffers for AMX do not bear:
    ///
    /// - inputs with more than two dimensions, as the layers of recurrent models have them (a text is a plane),
    ///   gemma3n, and models with several hidden states for a token: the matrix for the second plane is read from
    ///   behind the only one there is, so the second text of a batch gets nonsense;
    /// - permuted ones, as latent attention has them: the process ends.
    fn breaks_amx(&self) -> bool {
        if self.is_recurrent() {
            return true;
        }
        let is_set = |key| self.number(key).is_some_and(|value| value != 0);
        let architecture = self.metadata(c"general.architecture");
        architecture.is_some_and(|name| name == "gemma3n")
            || is_set("attention.key_length_mla")
            || is_set("hyper_connection.count")
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

    /// Tokens of the longest text that the model was trained for; those with learned positions have no more.
    pub(crate) fn n_ctx_train(&self) -> u32 {
        // SAFETY: the model is loaded.
        u32::try_from(unsafe { sys::llama_model_n_ctx_train(self.raw.as_ptr()) }).unwrap_or(0)
    }

    /// Width of a pooled vector.
    pub(crate) fn n_embd_out(&self) -> u32 {
        // SAFETY: the model is loaded.
        u32::try_from(unsafe { sys::llama_model_n_embd_out(self.raw.as_ptr()) }).unwrap_or(0)
    }

    /// Scores that the classifier gives.
    pub(crate) fn n_cls_out(&self) -> u32 {
        // SAFETY: the model is loaded.
        unsafe { sys::llama_model_n_cls_out(self.raw.as_ptr()) }
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

    /// A number of the metadata, under the prefix of the architecture; `None` if it is not there or no plain number.
    pub(crate) fn number(&self, key: &str) -> Option<u32> {
        let architecture = self.metadata(c"general.architecture")?;
        let key = CString::new(format!("{architecture}.{key}")).ok()?;
        self.metadata(&key)?.parse().ok()
    }

    /// A value of the metadata as text, cut off behind 63 bytes.
    pub(crate) fn metadata(&self, key: &CStr) -> Option<String> {
        let mut text = [0u8; 64];
        // SAFETY: the model is loaded, the key ends in NUL, and at most 64 bytes are written, the last one NUL.
        let n =
            unsafe { sys::llama_model_meta_val_str(self.as_ptr(), key.as_ptr(), text.as_mut_ptr().cast(), text.len()) };
        let text = CStr::from_bytes_until_nul(&text).ok()?;
        (n >= 0).then(|| text.to_string_lossy().into_owned())
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

    /// Refuses models that compute in another way than one pass per batch.
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
