//! A coordinator whose model computes nothing: what is left is the cost of scheduling, choosing tokens and HTTP.
//!
//! It answers through the same [`Handle`], ring thread, scheduler and meter as a real one. Only its stage is missing:
//! in its place every token is followed by a letter that depends on its slot and position.

use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::Duration;

use brigade_base::{ByteSize, DeploymentId, Epoch, KvTypes, PassId};
use brigade_net::{Identity, TicketBook};
use brigade_plan::Optimize;
use brigade_protocol::frame::{KvStep, RowSet};
use brigade_protocol::schedule::{Limits, PrefixCache};

use crate::coordinator::{CoordinatorError, CoordinatorOptions};
use crate::doctor::{Rounds, Subject};
use crate::handle::{Handle, Shared};
use crate::meter::Meter;
use crate::model::LocalModel;
use crate::purpose::{PoolingChoice, Work};
use crate::ring::{Connection, News, Ring, RingOptions, Submissions, Tail};
use crate::share::DirectFetch;
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

    fn run(
        &mut self,
        _pass: PassId,
        sets: &[RowSet],
        _hidden: &mut [f32],
        logits: &mut Vec<f32>,
    ) -> Result<(), PassError> {
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
    let identity = Identity::load_or_create(state_dir).map_err(|error| state(&error))?;
    let tickets = TicketBook::open(state_dir).map_err(|error| state(&error))?;
    let options = CoordinatorOptions {
        state_dir: state_dir.to_owned(),
        model_name: None,
        name: "rehearsal".to_owned(),
        listen: ([127, 0, 0, 1], 0).into(),
        memory: ByteSize(0),
        threads: 1,
        context: Some(context),
        parallel,
        kv: KvTypes::default(),
        nodes_wanted: 1,
        spread: false,
        split: None,
        optimize: Optimize::Memory,
        throttle: 1.0,
        prefix_cache: PrefixCache::Full,
        kv_spill: ByteSize(0),
        redundancy: 1,
        shadow: false,
        wait_for_capacity: Duration::ZERO,
        direct_fetch: DirectFetch::Off,
        pooling: PoolingChoice::None,
        drain_timeout: Duration::ZERO,
    };
    let work = Work::default();
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
    let (happen, inbox) = channel();
    let submissions = Submissions::new(happen);
    let shared = Arc::new(Shared::new(&model, &identity, &options, (context, work), tickets, &[], submissions));
    let cache = options.prefix_cache;
    let (task, chunk) = (work.task, work.chunk(context));
    let limits =
        Limits { n_slots: parallel, context, chunk, n_stages: 1, cache, image_tokens: 0, task, can_rewind: true };
    let (connections, connected) = channel();
    let connection = Connection {
        deployment: DeploymentId(1),
        epoch: Epoch(1),
        tail: Stand { n_vocab, letters },
        links: None,
        limits,
        held: None,
        stop: Arc::default(),
    };
    let (went, is_up) = channel();
    let ready = Arc::clone(&shared);
    let ring = Ring::new(RingOptions {
        model: Arc::clone(&model),
        meter: Arc::clone(&meter),
        inbox,
        connections: connected,
        tell: Box::new(move |news| {
            if matches!(news, News::WentAround(_)) {
                ready.ready();
                let _ = went.send(());
            }
        }),
        watch: Arc::default(),
        limits,
        wait_for_capacity: options.wait_for_capacity,
    });
    meter.placed(Epoch(1), vec![options.name.clone()]);
    drop(connections.send(connection));
    spawn("ring", move || ring.run())?;
    let _ = is_up.recv();
    // There are no nodes to examine.
    let rounds = Rounds::new(identity.node_id(), Subject::coordinator(&options, &model, &[]), |_| false);
    Ok(Arc::new(Handle::new(shared, model, meter, rounds)))
}
