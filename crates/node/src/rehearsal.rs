//! A coordinator whose model computes nothing: what is left is the cost of scheduling, choosing tokens and HTTP.
//!
//! It answers through the same [`Handle`], ring thread, scheduler and meter as a real one. Only its stage is missing:
//! in its place every token is followed by a letter that depends on its slot and position.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::mpsc::channel;

use brigade_base::{ByteSize, DeploymentId, Epoch};
use brigade_net::{Identity, TicketBook};
use brigade_protocol::frame::{Attach, KvStep, RowSet};
use brigade_protocol::schedule::{Limits, PrefixCache};

use crate::coordinator::{CHUNK, CoordinatorError, CoordinatorOptions};
use crate::handle::{Handle, Shared};
use crate::meter::Meter;
use crate::model::LocalModel;
use crate::ring::{Ring, Tail};
use crate::serving::Readiness;
use crate::stage_pass::PassError;
use crate::threads::spawn;

/// The stage that is missing.
struct Stand {
    n_vocab: usize,
    /// Tokens to answer with.
    letters: Vec<usize>,
}

impl Tail for Stand {
    fn apply(&mut self, _steps: &mut [(KvStep, bool)]) -> Result<(), PassError> {
        Ok(())
    }

    fn run(&mut self, sets: &[RowSet], _hidden: &mut [f32], logits: &mut Vec<f32>) -> Result<(), PassError> {
        logits.clear();
        for set in sets.iter().filter(|set| set.n_outputs > 0) {
            let start = logits.len();
            logits.resize(start + self.n_vocab, 0.0);
            let letter = self.letters[(set.slot + set.keep + set.n_rows) as usize % self.letters.len()];
            logits[start + letter] = 1.0;
        }
        Ok(())
    }
}

/// Starts to answer for `model` with `parallel` sessions of `context` tokens each; it ends with the process.
///
/// # Errors
/// If the state directory cannot be used, or the model has no tokens that are letters.
pub fn rehearse(
    model: LocalModel,
    state_dir: &Path,
    parallel: u32,
    context: u32,
) -> Result<Arc<Handle>, CoordinatorError> {
    let state = |error: &dyn std::fmt::Display| CoordinatorError::State(error.to_string());
    let identity = Identity::load_or_create(state_dir)?;
    let tickets = TicketBook::open(state_dir).map_err(|error| state(&error))?;
    let options = CoordinatorOptions {
        state_dir: state_dir.to_owned(),
        name: "rehearsal".to_owned(),
        listen: ([127, 0, 0, 1], 0).into(),
        memory: ByteSize(0),
        threads: 1,
        context: Some(context),
        parallel,
        nodes_wanted: 1,
        spread: false,
        split: None,
        prefix_cache: PrefixCache::Full,
        kv_spill: ByteSize(0),
    };
    let n_vocab = model.architecture().n_vocab as usize;
    let is_word = |&token: &usize| {
        let bytes = model.vocabulary().token_bytes(token as i32, false);
        !bytes.is_empty() && bytes.iter().all(u8::is_ascii_alphabetic)
    };
    let letters: Vec<usize> = (0..n_vocab).filter(is_word).take(64).collect();
    if letters.is_empty() {
        return Err(CoordinatorError::Setting("the model has no tokens that are letters".to_owned()));
    }
    let model = Arc::new(model);
    let meter = Arc::new(Meter::new(0));
    let shared = Arc::new(Shared::new(&model, &identity, &options, context, tickets, &[]));
    let (happen, inbox) = channel();
    let mut ring = Ring {
        attach: Attach { deployment: DeploymentId(1), epoch: Epoch(1) },
        model: Arc::clone(&model),
        tail: Stand { n_vocab, letters },
        links: None,
        inbox,
        limits: Limits {
            n_slots: parallel,
            context,
            chunk: CHUNK,
            n_stages: 1,
            cache: options.prefix_cache,
            image_tokens: 0,
        },
        stop: Arc::new(AtomicBool::new(false)),
        meter: Arc::clone(&meter),
    };
    meter.placed(Epoch(1), vec![options.name.clone()]);
    shared.submissions.open(happen);
    shared.set_readiness(Readiness::Ready);
    let closer = Arc::clone(&shared);
    spawn("ring", move || drop(ring.run(&|failure| closer.submissions.end(failure))))?;
    Ok(Arc::new(Handle::new(shared, model, meter)))
}
