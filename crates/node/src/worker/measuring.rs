//! Answering how fast this node is, and what is wrong with it.
//!
//! Both take seconds, so each has a thread, which tells the coordinator by itself over the link on which it was asked;
//! where that has ended nobody waits for the answer. One measurement runs at a time: a newer question ends an older.

use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use brigade_base::{ByteSize, Hash};
use brigade_gguf::ModelFile;
use brigade_net::{Identity, Link};
use brigade_plan::Speed;
use brigade_protocol::control::{ModelRef, ToCoordinator};
use brigade_protocol::kind;
use brigade_protocol::measure::{MAX_FINDING_BYTES, Measure, Measured};

use crate::doctor::{Subject, examined};
use crate::loaded::chain;
use crate::measure::{BUDGET, MeasureError, MeasureOptions, MeasureRequest, ProfileKey, Profiles, speed};
use crate::probe::{LinkBook, WITHIN, links_to};
use crate::threads::{lock, spawn};

/// What of this node is measured and examined, and what of that runs.
pub(super) struct Measuring {
    pub(super) node: Measurable,
    /// Held by the thread that measures.
    turn: Arc<Mutex<()>>,
    /// Ends what is being measured.
    cancel: Arc<AtomicBool>,
    /// Nobody waits for what is being measured.
    is_stale: Arc<AtomicBool>,
    is_examining: Arc<AtomicBool>,
    last: Arc<LastSpeed>,
    /// Where the nodes listen whose links were asked for last.
    peer_addresses: Vec<String>,
}

/// What was measured last: on a machine that is busy with other things, profiles do not keep that.
type LastSpeed = Mutex<Option<(ProfileKey, Speed)>>;

/// A node as it is measured.
#[derive(Clone)]
pub(super) struct Measurable {
    pub(super) identity: Arc<Identity>,
    pub(super) state_dir: PathBuf,
    /// Its copy of a model.
    pub(super) own: Option<(Hash, Arc<ModelFile>)>,
    /// Memory that it gives.
    pub(super) memory: ByteSize,
    pub(super) threads: u32,
    /// Share of the time in which it computes.
    pub(super) throttle: f32,
    /// Where its links listen.
    pub(super) addresses: Vec<String>,
}

impl Measuring {
    pub(super) fn new(node: Measurable) -> Self {
        Self {
            node,
            turn: Arc::default(),
            cancel: Arc::default(),
            is_stale: Arc::default(),
            is_examining: Arc::default(),
            last: Arc::default(),
            peer_addresses: Vec::new(),
        }
    }

    /// Measures what is asked for and tells it over `control`. A node that `is_at_work` says only what it knows: to
    /// measure would hold up its stages, and take memory that they may need.
    pub(super) fn measure(&mut self, request: Measure, is_at_work: bool, control: Arc<dyn Link>) {
        self.stop();
        (self.cancel, self.is_stale) = (Arc::default(), Arc::default());
        self.peer_addresses = request.peers.iter().flat_map(|peer| peer.addresses.clone()).collect();
        let (node, turn, cancel) = (self.node.clone(), Arc::clone(&self.turn), Arc::clone(&self.cancel));
        let (link, last, is_stale) = (Arc::clone(&control), Arc::clone(&self.last), Arc::clone(&self.is_stale));
        let work = move || {
            // Whoever has it was told to end.
            let _turn = lock(&turn);
            let measured = node.measure(&request, is_at_work, &last, &cancel);
            if !is_stale.load(Ordering::Relaxed) {
                tell(&*link, &ToCoordinator::Measured(Box::new(measured)));
            }
        };
        if let Err(error) = spawn("measure", work) {
            let trouble = Some(no_thread(&error));
            tell(
                &*control,
                &ToCoordinator::Measured(Box::new(Measured {
                    speed: None,
                    is_fresh: false,
                    links: Vec::new(),
                    trouble,
                })),
            );
        }
    }

    /// Looks for what is wrong with this node and tells it over `control`. Whoever asks meanwhile gets the same answer.
    pub(super) fn examine(&self, coordinator: &[String], has_stage: bool, control: Arc<dyn Link>) {
        if self.is_examining.swap(true, Ordering::Relaxed) {
            return;
        }
        let node = &self.node;
        let subject = Subject {
            state_dir: node.state_dir.clone(),
            model: node.own.as_ref().map(|(_, file)| file.path().to_owned()),
            threads: node.threads,
            memory: Some(node.memory),
            listens_on: node.addresses.clone(),
            peers: coordinator.iter().chain(&self.peer_addresses).cloned().collect(),
            has_stage,
        };
        let under_way = UnderWay(Arc::clone(&self.is_examining));
        let work = move || {
            let examined = examined(&subject);
            // From here on, who asks is answered anew.
            drop(under_way);
            tell(&*control, &ToCoordinator::Examined(examined));
        };
        if let Err(error) = spawn("examine", work) {
            tracing::warn!("{}", no_thread(&error));
        }
    }

    /// Ends what is being measured: this node gets work. What is known is told.
    pub(super) fn cut_short(&self) {
        self.cancel.store(true, Ordering::Relaxed);
    }

    /// Ends what is being measured; it is not told.
    pub(super) fn stop(&self) {
        self.is_stale.store(true, Ordering::Relaxed);
        self.cancel.store(true, Ordering::Relaxed);
    }
}

impl Measurable {
    /// Measures the node and its links, as far as that works.
    fn measure(&self, request: &Measure, is_at_work: bool, last: &LastSpeed, cancel: &Arc<AtomicBool>) -> Measured {
        let mut troubles = Vec::new();
        let (speed, is_fresh) = self.speed(request, is_at_work, last, cancel).unwrap_or_else(|trouble| {
            troubles.push(trouble);
            (None, false)
        });
        let mut book = LinkBook::open(&self.state_dir, &self.addresses);
        let may_go_on = || !is_at_work && !cancel.load(Ordering::Relaxed);
        let round = links_to(&self.identity, &request.peers, &mut book, &may_go_on);
        troubles.extend(round.troubles);
        troubles.iter().for_each(|trouble| tracing::warn!(trouble, "not all was measured"));
        Measured { speed, is_fresh, links: round.links, trouble: text_of(&troubles) }
    }

    /// How fast it computes the model, and whether that was measured just now or undisturbed; nothing if it is not
    /// known and not to be measured.
    fn speed(
        &self,
        wanted: &Measure,
        is_at_work: bool,
        last: &LastSpeed,
        cancel: &Arc<AtomicBool>,
    ) -> Result<(Option<Speed>, bool), String> {
        let request =
            MeasureRequest::of(&wanted.model).map_err(|error| format!("its header cannot be read: {error}"))?;
        let options = MeasureOptions {
            // The links are measured within the same time.
            budget: BUDGET.saturating_sub(WITHIN * wanted.peers.len() as u32).max(BUDGET / 2),
            cancel: Arc::clone(cancel),
            ..MeasureOptions::new(self.threads, self.throttle, self.own_of(&wanted.model))
        };
        let (profiles, key) = (Profiles::open(&self.state_dir), ProfileKey::of(&request, &options));
        let known = || {
            let last = lock(last).clone().filter(|(of, _)| *of == key).map(|(_, speed)| speed);
            Ok((last.or_else(|| profiles.get(&key)), false))
        };
        if is_at_work {
            return known();
        }
        let measured = speed(&request, &options, &profiles, wanted.again);
        if matches!(measured, Err(MeasureError::Cancelled)) {
            return known();
        }
        let speed = measured.map_err(|error| format!("its speed was not measured: {}", chain(&error)))?;
        *lock(last) = Some((key, speed.clone()));
        Ok((Some(speed), true))
    }

    /// Its own copy, if it is of this model.
    fn own_of(&self, model: &ModelRef) -> Option<Arc<ModelFile>> {
        self.own.as_ref().filter(|(hash, _)| *hash == model.header_hash).map(|(_, file)| Arc::clone(file))
    }
}

/// That this node is examined; not any more once it is dropped.
struct UnderWay(Arc<AtomicBool>);

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Relaxed);
    }
}

fn tell(control: &dyn Link, message: &ToCoordinator) {
    if let Err(error) = control.send(kind::CONTROL, &[&message.encode()]) {
        tracing::debug!(%error, "the coordinator was not told");
    }
}

fn no_thread(error: &io::Error) -> String {
    format!("no thread to look at this node with: {error}; end other programs or raise the limit of processes")
}

/// What went wrong, as long as a message may be.
fn text_of(troubles: &[String]) -> Option<String> {
    let mut text = troubles.join("; ");
    let end = (0..=MAX_FINDING_BYTES.min(text.len())).rev().find(|at| text.is_char_boundary(*at));
    text.truncate(end.unwrap_or(0));
    (!text.is_empty()).then_some(text)
}
