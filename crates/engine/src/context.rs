//! A context of llama.cpp and what it points to: compute threads, the signals of a run, and the hook by which a pass
//! enters the graph, leaves it and tells it factors.
//!
//! The context owns all of it and calls back only while it decodes, for which its owner needs `&mut`.

use std::ffi::{CStr, CString, c_void};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};

use brigade_base::{KvType, LayerScale};
use llama_cpp_sys_2 as sys;

use crate::backend::{Captured, capture};
use crate::kv_types::{check_types, ggml_type};
use crate::model::{HAS_DEVICES, LoadError, Model};
use crate::pooling;
use crate::run::RunError;
use crate::stage::StageOptions;

/// Most bytes of attention scores, `n_heads * n_ctx * max_rows` floats, a part of the compute buffers: 256 rows in a
/// context of 16 thousand tokens with 32 heads. Above, flash attention does without them.
const MAX_SCORES_BYTES: u64 = 512 << 20;

const IDLE: u8 = 0;
const RUNNING: u8 = 1;
const CANCELLED: u8 = 2;

/// What other threads see of runs and tell them.
#[derive(Debug, Default)]
pub(crate) struct Signals {
    /// `IDLE` or `RUNNING`, or `CANCELLED` until the run that was cancelled ends. Only a run leaves `IDLE` and enters
    /// it, so no cancel is lost and none outlives its run.
    state: AtomicU8,
    /// Graph nodes that were begun, in all runs.
    steps: AtomicU64,
}

impl Signals {
    pub(crate) fn begin(&self) {
        self.state.store(RUNNING, Ordering::Release);
    }

    /// Ends the run and returns whether it was cancelled.
    pub(crate) fn end(&self) -> bool {
        self.state.swap(IDLE, Ordering::AcqRel) == CANCELLED
    }

    /// Cancels the run in progress, if there is one.
    pub(crate) fn cancel(&self) -> bool {
        self.state.compare_exchange(RUNNING, CANCELLED, Ordering::AcqRel, Ordering::Acquire).is_ok()
    }

    /// Graph nodes that were begun so far.
    pub(crate) fn steps(&self) -> u64 {
        self.steps.load(Ordering::Relaxed)
    }

    /// Counts a node, and returns whether the run was cancelled before it.
    fn step(&self) -> bool {
        self.steps.fetch_add(1, Ordering::Relaxed);
        self.state.load(Ordering::Acquire) == CANCELLED
    }
}

/// A context of llama.cpp with all that it points to.
pub(crate) struct Context {
    raw: NonNull<sys::llama_context>,
    threads: Option<NonNull<sys::ggml_threadpool>>,
    hook: Option<NonNull<Hook>>,
    pub(crate) signals: Arc<Signals>,
    /// Copies of slots that the next decode makes before it computes.
    pub(crate) copies_queued: u32,
    /// Whether there is a KV cache; encoders have none.
    pub(crate) has_memory: bool,
}

/// Where a pass enters and stops, what the nodes hold there, and which factors others are told.
pub(crate) struct Hook {
    /// The node whose value is replaced by `input`.
    input_node: Option<CString>,
    /// It is the first sum of that node and another one instead.
    enters_at_sum: bool,
    /// The node at which the graph stops.
    stop_node: Option<CString>,
    /// It stops at the sum of that node and another one instead.
    stops_at_sum: bool,
    n_embd: usize,
    /// Rows of the present decode.
    pub(crate) n_rows: usize,
    /// `[n_rows, n_embd]` that enter the present decode, where there is an input node.
    input: Vec<f32>,
    /// Whether the input node was reached in the present decode.
    pub(crate) entered: bool,
    /// `[n_rows, n_embd]` of the last decode.
    pub(crate) values: Vec<f32>,
    /// Factors that the graph is told.
    scales: Vec<Scale>,
    /// How often the node was reached in the present decode.
    pub(crate) n_hits: u32,
    /// The node's shape, if it was not `[n_rows, n_embd]` of F32.
    pub(crate) odd_shape: Option<[i64; 4]>,
}

/// Factors of one kind that the graph is told.
struct Scale {
    /// The start of their nodes' names, up to the layer's number.
    prefix: Vec<u8>,
    /// One for each node, in the order in which they are computed.
    factors: Vec<f32>,
    /// Nodes that were found in the present decode.
    n_found: usize,
}

unsafe extern "C" fn on_abort(data: *mut c_void) -> bool {
    // SAFETY: the context was given the signals that its `Context` keeps alive for longer.
    unsafe { &*data.cast::<Signals>() }.step()
}

/// Asked (`ask`) for each node whether its value is wanted, then called with it; `false` stops the graph there.
unsafe extern "C" fn on_node(node: *mut sys::ggml_tensor, ask: bool, user_data: *mut c_void) -> bool {
    // SAFETY: the owner of the hook does not touch it while a decode runs.
    let hook = unsafe { &mut *user_data.cast::<Hook>() };
    if ask && !hook.scales.is_empty() {
        // SAFETY: the scheduler passes a node of the graph, which it has not computed yet and nobody else uses now.
        hook.scale(unsafe { &mut *node });
    }
    // SAFETY: as above; nothing changes the node while this function reads it.
    let node = unsafe { &*node };
    let name = name_of(node);
    let is = |wanted: &Option<CString>| wanted.as_deref() == Some(name);
    let stops = if hook.stops_at_sum { is_sum_of(node, &hook.stop_node) } else { is(&hook.stop_node) };
    let enters =
        if hook.enters_at_sum { !hook.entered && is_sum_of(node, &hook.input_node) } else { is(&hook.input_node) };
    if !enters && !stops {
        return !ask;
    }
    if ask {
        return true;
    }
    hook.n_hits += u32::from(stops);
    let row_bytes = hook.n_embd * size_of::<f32>();
    let shape = [hook.n_embd as i64, hook.n_rows as i64, 1, 1];
    let dense = node.nb[0] == size_of::<f32>() && (hook.n_rows == 1 || node.nb[1] == row_bytes);
    if node.type_ != sys::GGML_TYPE_F32 || node.ne != shape || !dense {
        hook.odd_shape = Some(node.ne);
        return false;
    }
    if enters {
        if hook.input.len() != hook.n_rows * hook.n_embd {
            return false;
        }
        hook.entered = true;
        let data = hook.input.as_ptr().cast();
        // SAFETY: the node is computed and dense, and both sides have `n_rows * row_bytes` bytes. The nodes that read
        // it are computed after this call.
        unsafe { sys::ggml_backend_tensor_set(std::ptr::from_ref(node).cast_mut(), data, 0, hook.n_rows * row_bytes) };
        return true;
    }
    // The capacity was reserved for the largest pass, so this allocates nothing.
    hook.values.resize(hook.n_rows * hook.n_embd, 0.0);
    // SAFETY: the node is computed and dense, and both sides have `n_rows * row_bytes` bytes.
    unsafe { sys::ggml_backend_tensor_get(node, hook.values.as_mut_ptr().cast(), 0, hook.n_rows * row_bytes) };
    false
}

fn name_of(tensor: &sys::ggml_tensor) -> &CStr {
    // SAFETY: ggml ends all names with NUL inside their array.
    unsafe { CStr::from_ptr(tensor.name.as_ptr()) }
}

/// Whether `node` adds something to the node of this name.
fn is_sum_of(node: &sys::ggml_tensor, name: &Option<CString>) -> bool {
    let is_named = |operand: &*mut sys::ggml_tensor| {
        // SAFETY: operands of a node live as long as it.
        let operand_name = unsafe { operand.as_ref() }.map(name_of);
        operand_name.is_some() && operand_name == name.as_deref()
    };
    node.op == sys::GGML_OP_ADD && node.src.iter().any(is_named)
}

impl Context {
    pub(crate) fn new(model: &Model, options: &StageOptions, n_embd: u32) -> Result<(Self, Captured), LoadError> {
        check_types(model, options.kv)?;
        let hook = Hook::new(options, n_embd as usize)?;
        let hook = hook.map(|hook| NonNull::from(Box::leak(Box::new(hook))));
        let signals = Arc::new(Signals::default());
        let params = context_params(model, options, hook, &signals);
        // SAFETY: the model is loaded and outlives the context (see `Stage`); hook and signals do as well.
        let (raw, captured) = capture(|| unsafe { sys::llama_init_from_model(model.as_ptr(), params) });
        let Some(raw) = NonNull::new(raw) else {
            if let Some(hook) = hook {
                // SAFETY: it was leaked above, and there is no context that refers to it.
                drop(unsafe { Box::from_raw(hook.as_ptr()) });
            }
            return Err(LoadError::Context(captured.message()));
        };
        captured.log();
        // SAFETY: the context exists.
        let has_memory = !unsafe { sys::llama_get_memory(raw.as_ptr()) }.is_null();
        let mut context = Self { raw, threads: None, hook, signals, copies_queued: 0, has_memory };
        context.start_threads(options.n_threads);
        Ok((context, captured))
    }

    /// Starts compute threads once, instead of at each pass. They sleep between passes and do not spin.
    fn start_threads(&mut self, n_threads: u32) {
        if n_threads < 2 {
            return;
        }
        // SAFETY: the function only returns a struct of plain values.
        let mut params = unsafe { sys::ggml_threadpool_params_default(n_threads as i32) };
        params.poll = 0;
        // SAFETY: the parameters are complete; the pool is freed after the context that uses it.
        self.threads = NonNull::new(unsafe { sys::ggml_threadpool_new(&mut params) });
        if let Some(pool) = self.threads {
            // SAFETY: both exist, and the pool outlives the context.
            unsafe { sys::llama_attach_threadpool(self.raw.as_ptr(), pool.as_ptr(), pool.as_ptr()) };
        }
    }

    pub(crate) fn n_batch(&self) -> u32 {
        // SAFETY: the context exists.
        unsafe { sys::llama_n_batch(self.raw.as_ptr()) }
    }

    pub(crate) fn as_ptr(&self) -> *mut sys::llama_context {
        self.raw.as_ptr()
    }

    /// The hook of a stage with an input or a stop node, or with factors; the borrow keeps decodes out.
    pub(crate) fn hook(&mut self) -> Option<&mut Hook> {
        // SAFETY: it was leaked for this context, and only a decode, which needs `&mut self`, uses it otherwise.
        self.hook.map(|mut hook| unsafe { hook.as_mut() })
    }

    /// Forgets the tokens of `slot`, which must exist, from position `from`; false if the memory cannot.
    pub(crate) fn remove(&mut self, slot: u32, from: u32) -> bool {
        // SAFETY: without a memory nothing happens; else it has this slot, and -1 means up to the end.
        unsafe { sys::llama_memory_seq_rm(sys::llama_get_memory(self.as_ptr()), slot as i32, from as i32, -1) }
    }

    pub(crate) fn clear(&mut self) {
        // SAFETY: without a memory nothing happens. Stale values in freed cells are never read: each is masked or
        // overwritten.
        unsafe { sys::llama_memory_clear(sys::llama_get_memory(self.as_ptr()), false) };
    }

    /// Gives slot `to` the positions of slot `from`, and queues the copy of its values; both must exist and differ.
    pub(crate) fn copy(&mut self, from: u32, to: u32) {
        // SAFETY: without a memory nothing happens; else it has these slots, and -1 means from the start and up to the
        // end, as copies from one stream to another have to be.
        unsafe { sys::llama_memory_seq_cp(sys::llama_get_memory(self.as_ptr()), from as i32, to as i32, -1, -1) };
        self.copies_queued += 1;
    }

    /// First and last position of `slot`, which must exist; `(-1, -1)` if it is empty.
    pub(crate) fn positions(&self, slot: u32) -> (i32, i32) {
        // SAFETY: the context has a memory with this slot.
        unsafe {
            let memory = sys::llama_get_memory(self.as_ptr());
            (sys::llama_memory_seq_pos_min(memory, slot as i32), sys::llama_memory_seq_pos_max(memory, slot as i32))
        }
    }

    /// Appends the state of `slot`, which must exist, to `out`; false if llama.cpp wrote less than it had announced.
    pub(crate) fn save(&mut self, slot: u32, out: &mut Vec<u8>) -> bool {
        // SAFETY: the context has a memory with this slot.
        let n_bytes = unsafe { sys::llama_state_seq_get_size(self.as_ptr(), slot as i32) };
        let start = out.len();
        out.resize(start + n_bytes, 0);
        let state = out[start..].as_mut_ptr();
        // SAFETY: as above, and `state` points to `n_bytes` bytes, which nobody else uses.
        let n_written = unsafe { sys::llama_state_seq_get_data(self.as_ptr(), state, n_bytes, slot as i32) };
        n_bytes > 0 && n_written == n_bytes
    }

    /// Replaces the state of `slot`, which must exist; false if llama.cpp refused it or left some of it unread.
    pub(crate) fn restore(&mut self, slot: u32, state: &[u8]) -> bool {
        // SAFETY: the context has a memory with this slot, and `state` stays for the call. llama.cpp checks the length
        // at each read and catches its own exceptions.
        let n_read = unsafe { sys::llama_state_seq_set_data(self.as_ptr(), state.as_ptr(), state.len(), slot as i32) };
        !state.is_empty() && n_read == state.len()
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: each pointer was made by this context and is freed once, the context before what it refers to.
        unsafe {
            sys::llama_free(self.raw.as_ptr());
            if let Some(pool) = self.threads {
                sys::ggml_threadpool_free(pool.as_ptr());
            }
            if let Some(hook) = self.hook {
                drop(Box::from_raw(hook.as_ptr()));
            }
        }
    }
}

impl Hook {
    /// The hook that the options ask for, if they ask for one.
    fn new(options: &StageOptions, n_embd: usize) -> Result<Option<Self>, LoadError> {
        if options.hooks.input_node.is_none()
            && options.hooks.stop_node.is_none()
            && options.hooks.layer_scales.is_empty()
        {
            return Ok(None);
        }
        let n_values = n_embd * options.max_rows as usize;
        let node = |name: &Option<String>| -> Result<_, LoadError> {
            let is_sum = name.as_deref().is_some_and(|name| name.ends_with('+'));
            let name = name.as_deref().map(|name| node_name(name.strip_suffix('+').unwrap_or(name)));
            Ok((name.transpose()?, is_sum))
        };
        let (input_node, enters_at_sum) = node(&options.hooks.input_node)?;
        let (stop_node, stops_at_sum) = node(&options.hooks.stop_node)?;
        let scale = |scale: &LayerScale| {
            let prefix = node_name(&format!("{}-", scale.node))?.into_bytes();
            Ok(Scale { prefix, factors: scale.factors.clone(), n_found: 0 })
        };
        let reserve = |node: &Option<String>| Vec::with_capacity(if node.is_some() { n_values } else { 0 });
        Ok(Some(Self {
            input_node,
            enters_at_sum,
            stop_node,
            stops_at_sum,
            n_embd,
            n_rows: 0,
            input: reserve(&options.hooks.input_node),
            entered: false,
            values: reserve(&options.hooks.stop_node),
            scales: options.hooks.layer_scales.iter().map(scale).collect::<Result<_, LoadError>>()?,
            n_hits: 0,
            odd_shape: None,
        }))
    }

    /// Whether the present decode had as many nodes of each kind as there are factors for them.
    ///
    /// # Errors
    /// If it had not; the graph is another one than the caller knew then.
    pub(crate) fn check_scales(&self) -> Result<(), RunError> {
        match self.scales.iter().find(|scale| scale.n_found != scale.factors.len()) {
            Some(scale) => Err(RunError::Scales { found: scale.n_found, wanted: scale.factors.len() }),
            None => Ok(()),
        }
    }

    /// Tells the factor to a node that multiplies by it. ggml keeps it as the first parameter of the operation and
    /// reads it when it computes (`ggml_scale`).
    fn scale(&mut self, node: &mut sys::ggml_tensor) {
        if node.op != sys::GGML_OP_SCALE {
            return;
        }
        // SAFETY: operands of a node live as long as it.
        let operand = unsafe { node.src[0].as_ref() };
        let (name, operand) =
            (name_of(node).to_bytes(), operand.map_or(&[][..], |operand| name_of(operand).to_bytes()));
        let is_layer = |digits: &[u8]| !digits.is_empty() && digits.iter().all(u8::is_ascii_digit);
        let is_at = |scale: &&mut Scale| {
            let is_of = |name: &[u8]| name.strip_prefix(&scale.prefix[..]).is_some_and(is_layer);
            is_of(name) || is_of(operand) || scale.prefix.strip_suffix(b"-") == Some(operand)
        };
        let Some(scale) = self.scales.iter_mut().find(is_at) else { return };
        if let Some(factor) = scale.factors.get(scale.n_found) {
            node.op_params[0] = factor.to_bits().cast_signed();
        }
        scale.n_found += 1;
    }

    /// Forgets the last decode. `hidden` is what enters the next one.
    pub(crate) fn arm(&mut self, n_rows: usize, hidden: &[f32]) {
        self.n_rows = n_rows;
        self.input.clear();
        if self.input_node.is_some() {
            self.input.extend_from_slice(hidden);
        }
        self.entered = self.input_node.is_none();
        self.scales.iter_mut().for_each(|scale| scale.n_found = 0);
        self.n_hits = 0;
        self.odd_shape = None;
    }
}

fn node_name(name: &str) -> Result<CString, LoadError> {
    // ggml keeps names in 64 bytes with their NUL and cuts longer ones, which would then never be found.
    let error = || LoadError::StopNode { name: name.to_owned() };
    let name = CString::new(name).map_err(|_| error())?;
    if name.is_empty() || name.count_bytes() > 63 { Err(error()) } else { Ok(name) }
}

fn context_params(
    model: &Model,
    options: &StageOptions,
    hook: Option<NonNull<Hook>>,
    signals: &Arc<Signals>,
) -> sys::llama_context_params {
    // SAFETY: the function only returns a struct of plain values.
    let mut params = unsafe { sys::llama_context_default_params() };
    params.n_ctx = options.n_cells() as u32;
    params.n_seq_max = options.n_sessions;
    params.kv_unified = false;
    params.swa_full = true;
    params.type_k = ggml_type(options.kv.k);
    params.type_v = ggml_type(options.kv.v);
    let n_scores = u64::from(model.n_heads()) * u64::from(options.n_ctx) * u64::from(options.max_rows);
    if options.kv.v != KvType::F16 {
        // Without it values are stored transposed, which blocks cannot be.
        params.flash_attn_type = sys::LLAMA_FLASH_ATTN_TYPE_ENABLED;
    } else if !HAS_DEVICES && n_scores <= MAX_SCORES_BYTES / size_of::<f32>() as u64 {
        params.flash_attn_type = sys::LLAMA_FLASH_ATTN_TYPE_DISABLED;
    }
    let n_rows = options.n_graph_rows();
    params.n_batch = n_rows;
    params.n_ubatch = n_rows;
    params.n_outputs_max = options.n_outputs();
    params.n_threads = options.n_threads as i32;
    params.n_threads_batch = options.n_threads as i32;
    params.no_perf = true;
    params.abort_callback = Some(on_abort);
    params.abort_callback_data = Arc::as_ptr(signals).cast_mut().cast();
    if let Some(pooling) = options.pooling {
        params.embeddings = true;
        params.pooling_type = pooling::type_of(pooling);
    }
    if let Some(hook) = hook {
        params.cb_eval = Some(on_node);
        params.cb_eval_user_data = hook.as_ptr().cast();
    }
    params
}
