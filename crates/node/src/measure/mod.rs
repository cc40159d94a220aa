//! How fast this machine computes a model: a few of its layers are loaded and timed, within seconds.
//!
//! Two stages from the middle of the model are run in turn, through the same code as passes are:
//!
//! - the *thin* one is as small as the model can be cut, has the context of the deployment, and is timed with chunks of
//!   a prompt and behind many tokens;
//! - the *thick* one has as many layers as the time and a quarter of the free memory allow, and is timed with decode
//!   rows. Reading weights is what those cost, and a layer alone would stay in the processor's caches, where the layers
//!   of a real stage do not. Layers that are run in turn read as they will in production.
//!
//! What a run costs beside its layers follows from both. Weights are the node's own where it has the model, else
//! [`SyntheticTensors`], which cost the same. With its own weights the head is measured too: the last layer is run with
//! it, and what the layer costs is taken off. The most telling points come first; those for which there is no time are
//! left out, and lie on the lines between the others. Of several runs the lower quartile counts, or where they differ
//! much one close to the shortest, as what disturbs a run only makes it longer; and more rows never take less time than
//! fewer. [`Disturbance`] tells how much others computed meanwhile.
//!
//! [`Profiles`] keeps results, [`speed`] measures only what is not there. [`machine`] measures a machine for itself.

mod bench;
pub(crate) mod disk;
pub mod machine;
mod profiles;
mod session;
mod watch;

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use brigade_base::{ByteSize, KvTypes};
use brigade_engine::LoadError;
use brigade_gguf::{ArchitectureError, Catalog, HeaderError, ModelFile, StageViewError};
use brigade_plan::Speed;
use brigade_protocol::control::ModelRef;

pub use self::profiles::{ProfileKey, Profiles};
use self::session::Session;
pub use self::watch::Disturbance;
use crate::stage_pass::PassError;
use crate::threads::lock;
use crate::trial::TrialError;

/// What a measurement takes in all, about: a node that joins is kept waiting for it.
pub const BUDGET: Duration = Duration::from_secs(5);

/// Of the free memory, one part in so many may be taken for a measurement.
const MEMORY_DIVISOR: u64 = 4;

/// What a stage does for a pass beside running it, in seconds: it wakes up, reads and decodes a frame, encodes and
/// writes one. An estimate: two wake-ups of threads and two system calls, at ten to twenty microseconds each.
pub const FRAME_S: f64 = 60e-6;

/// What is to be measured.
#[derive(Debug, Clone)]
pub struct MeasureRequest {
    /// Header of the model; its vocabulary is not needed.
    pub catalog: Catalog,
    /// Tokens of one session.
    pub context: u32,
    /// Sessions at once.
    pub sessions: u32,
    /// Most rows of one batch.
    pub max_rows: u32,
    /// How keys and values are stored.
    pub kv: KvTypes,
}

impl MeasureRequest {
    /// For a model as it is named on links.
    ///
    /// # Errors
    /// If its header is none.
    pub fn of(model: &ModelRef) -> Result<Self, HeaderError> {
        let catalog = Catalog::parse_header(&model.header)?;
        let ModelRef { context, sessions, max_rows, kv, .. } = *model;
        Ok(Self { catalog, context, sessions, max_rows, kv })
    }
}

/// How it is to be measured.
#[derive(Debug, Clone)]
pub struct MeasureOptions {
    /// Threads that compute.
    pub threads: u32,
    /// Share of time for which the node computes.
    pub throttle: f32,
    /// The model's weights, where the node has them.
    pub own: Option<Arc<ModelFile>>,
    /// How long it may take, about.
    pub budget: Duration,
    /// Set to give up.
    pub cancel: Arc<AtomicBool>,
}

impl MeasureOptions {
    /// The usual ones.
    pub fn new(threads: u32, throttle: f32, own: Option<Arc<ModelFile>>) -> Self {
        Self { threads, throttle, own, budget: BUDGET, cancel: Arc::default() }
    }
}

/// A speed, and how far it is to be believed.
#[derive(Debug, Clone, PartialEq)]
pub struct Measured {
    /// What was measured.
    pub speed: Speed,
    /// What others computed meanwhile.
    pub disturbance: Disturbance,
}

/// A speed was not measured.
#[derive(Debug, thiserror::Error)]
pub enum MeasureError {
    /// The model cannot be run.
    #[error(transparent)]
    Architecture(#[from] ArchitectureError),
    /// The model cannot be cut.
    #[error(transparent)]
    View(#[from] StageViewError),
    /// The model has no layers that could be run without its head.
    #[error("the model cannot be cut, so none of its layers can be measured by itself")]
    Whole,
    /// There is too little memory for even the smallest piece.
    #[error(
        "measuring needs {needed}, but only {room}, a quarter of what is free, may be used for it; free some memory"
    )]
    Memory {
        /// What the thin stage takes.
        needed: ByteSize,
        /// What may be taken.
        room: ByteSize,
    },
    /// The engine did not load the layers.
    #[error("the layers to measure could not be loaded")]
    Load(#[from] LoadError),
    /// libllama cannot run the model.
    #[error(transparent)]
    Trial(#[from] TrialError),
    /// The engine did not run them.
    #[error("the layers to measure could not be run: {0}")]
    Run(String),
    /// It was cancelled.
    #[error("the measurement was cancelled")]
    Cancelled,
}

impl From<PassError> for MeasureError {
    fn from(error: PassError) -> Self {
        Self::Run(error.to_string())
    }
}

/// The speed of this machine with a model, from `profiles` if it was measured before, unless `again`.
///
/// # Errors
/// As [`measure`].
pub fn speed(
    request: &MeasureRequest,
    options: &MeasureOptions,
    profiles: &Profiles,
    again: bool,
) -> Result<Speed, MeasureError> {
    measured(request, options, profiles, again).map(|measured| measured.speed)
}

/// The same, with how far it is to be believed. One that was disturbed is used, but measured again the next time.
///
/// # Errors
/// As [`measure`].
pub fn measured(
    request: &MeasureRequest,
    options: &MeasureOptions,
    profiles: &Profiles,
    again: bool,
) -> Result<Measured, MeasureError> {
    let key = ProfileKey::of(request, options);
    if let Some(speed) = profiles.get_quiet(&key).filter(|_| !again) {
        return Ok(Measured { speed, disturbance: Disturbance::default() });
    }
    let measured = measure(request, options)?;
    let is_quiet = measured.disturbance.is_quiet();
    if let Err(error) = profiles.put(&key, &measured.speed, is_quiet) {
        tracing::warn!(%error, "the measured speed is not kept; it will be measured again at the next start");
    }
    if !is_quiet {
        tracing::warn!(
            "other programs took {:.0} % of the processor while its speed was measured; it will be measured again at \
             the next start",
            100.0 * measured.disturbance.share()
        );
    }
    Ok(measured)
}

/// The speed of this machine with a model, as [`measured`] with the profiles of a state directory.
///
/// # Errors
/// As [`measure`].
pub fn speed_of_here(
    request: &MeasureRequest,
    own: Option<Arc<ModelFile>>,
    threads: u32,
    throttle: f32,
    state_dir: &Path,
) -> Result<Measured, MeasureError> {
    measured(request, &MeasureOptions::new(threads, throttle, own), &Profiles::open(state_dir), false)
}

/// Measures how fast this machine computes a model.
///
/// # Errors
/// If the model cannot be run or cut, memory is short, the engine fails, or it was cancelled.
pub fn measure(request: &MeasureRequest, options: &MeasureOptions) -> Result<Measured, MeasureError> {
    let _turn = lock(&TURN);
    brigade_engine::init();
    Session::new(request, options)?.run()
}

/// Ends what is being measured, and waits for that; for a process that is about to end, whatever its node does.
pub fn end_all() {
    IS_OVER.store(true, Ordering::Relaxed);
    wait_until_over();
}

/// Waits for what is being measured, which was told to end: a process must not end while the engine computes.
pub(crate) fn wait_until_over() {
    drop(lock(&TURN));
}

/// Held while something is measured: two at once would slow each other down.
static TURN: Mutex<()> = Mutex::new(());

/// Nothing is to be measured any more.
static IS_OVER: AtomicBool = AtomicBool::new(false);

/// Whether two headers have the same tensors.
fn has_tensors_of(file: &Catalog, model: &Catalog) -> bool {
    let (file, model) = (file.tensors(), model.tensors());
    file.len() == model.len()
        && file.iter().zip(model).all(|(a, b)| (&a.name, &a.dims, a.ty) == (&b.name, &b.dims, b.ty))
}

/// Bytes that this machine hashes in a second: weights that are loaded are compared with the manifest.
fn hash_bytes_per_s() -> f64 {
    let bytes = vec![1; 4 << 20];
    let begin = Instant::now();
    std::hint::black_box(blake3::hash(&bytes));
    bytes.len() as f64 / begin.elapsed().as_secs_f64().max(1e-6)
}

#[cfg(test)]
mod tests;
