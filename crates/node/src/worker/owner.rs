//! The worker's owner loop.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender};
use std::sync::{Arc, Mutex};

use brigade_base::{ByteSize, Hash, NodeId};
use brigade_gguf::ModelFile;
use brigade_net::{Identity, Link, Purpose};
use brigade_protocol::control::{Deploy, ToCoordinator, ToWorker};
use brigade_protocol::frame::Attach;
use brigade_protocol::kind;

use super::loader::Loader;
use super::{WorkerError, WorkerStatus};
use crate::cache::Cache;
use crate::doorway::Doorway;
use crate::known::KnownCoordinator;
use crate::loaded::{LoadedStage, StageKey};
use crate::reach::reach;
use crate::stage_thread::{RunningStage, StageEnd};
use crate::state_lock::StateLock;
use crate::threads::{lock, spawn};

/// What the other threads tell the owner loop.
pub(super) enum Event {
    Connected(Arc<dyn Link>),
    Message(ToWorker),
    Unreachable(String),
    Disconnected(String),
    GaveUp(WorkerError),
    Inbound(Arc<dyn Link>, Attach),
    Loaded(Attach, Result<Box<LoadedStage>, LoadFailure>),
    Dialled(Attach, Result<Arc<dyn Link>, String>),
    StageEnded(Attach, Box<LoadedStage>, StageEnd),
    Stop,
}

/// Why a stage was not loaded.
pub(super) enum LoadFailure {
    /// This node and the coordinator have different files: nothing will mend that but a person.
    OtherModel(String),
    /// Anything else.
    Other(String),
}

/// Where the stage is.
pub(super) enum Slot {
    Empty,
    /// A loader thread works; the flag tells it to give up.
    Loading(Arc<AtomicBool>),
    Loaded(Box<LoadedStage>),
    Running(RunningStage),
}

/// All state of a worker.
pub(super) struct Owner {
    pub(super) state_dir: PathBuf,
    pub(super) identity: Arc<Identity>,
    pub(super) known: KnownCoordinator,
    pub(super) own: Option<Arc<ModelFile>>,
    pub(super) own_hash: Option<Hash>,
    pub(super) cache: Arc<Cache>,
    pub(super) threads: u32,
    pub(super) kv_spill: ByteSize,
    pub(super) events: Sender<Event>,
    pub(super) status: Arc<Mutex<WorkerStatus>>,
    /// Who may open a data link; shared with the door.
    pub(super) upstream: Arc<Mutex<Option<NodeId>>>,
    pub(super) stopping: Arc<AtomicBool>,
    pub(super) control: Option<Arc<dyn Link>>,
    pub(super) deploy: Option<Arc<Deploy>>,
    /// The deployment's stage is still to be loaded.
    pub(super) to_load: bool,
    pub(super) slot: Slot,
    pub(super) inbound: Option<Arc<dyn Link>>,
    pub(super) outbound: Option<Arc<dyn Link>>,
    pub(super) _doorway: Doorway,
    pub(super) _lock: StateLock,
}

impl Owner {
    /// Runs until the worker ends.
    pub(super) fn run(mut self, inbox: &Receiver<Event>) -> Result<(), WorkerError> {
        let result = loop {
            let Ok(event) = inbox.recv() else { break Ok(()) };
            match event {
                Event::Stop => break Ok(()),
                Event::GaveUp(error) => break Err(error),
                Event::Loaded(attach, Err(LoadFailure::OtherModel(reason))) => {
                    self.tell(&ToCoordinator::StageFailed { epoch: attach.epoch, reason: reason.clone() });
                    break Err(WorkerError::OtherModel(reason));
                }
                event => self.apply(event),
            }
            self.load_if_due();
            self.run_if_due();
            self.publish();
        };
        self.stopping.store(true, Ordering::Relaxed);
        self.tell(&ToCoordinator::Goodbye { reason: "it was stopped".to_owned() });
        self.drop_stage();
        if let Some(control) = &self.control {
            control.close();
        }
        result
    }

    fn apply(&mut self, event: Event) {
        match event {
            Event::Connected(link) => self.control = Some(link),
            Event::Unreachable(reason) => {
                tracing::debug!(reason, "the coordinator is not there");
                self.set_trouble(reason);
            }
            Event::Disconnected(reason) => {
                tracing::warn!(reason, "the coordinator is gone; this node's stage is dropped");
                self.set_trouble(format!("the coordinator is gone: {reason}"));
                self.control = None;
                self.undeploy();
            }
            Event::Message(message) => self.message(message),
            Event::Inbound(link, attach) => {
                if self.attach() == Some(attach) {
                    self.inbound = Some(link);
                } else {
                    link.close();
                }
            }
            Event::Loaded(attach, result) => self.loaded(attach, result),
            Event::Dialled(attach, result) => self.dialled(attach, result),
            Event::StageEnded(attach, stage, end) => {
                let mut stage = stage;
                stage.runner.clear();
                self.slot = if self.deploy.is_some() { Slot::Loaded(stage) } else { Slot::Empty };
                (self.inbound, self.outbound) = (None, None);
                if let StageEnd::Failed(reason) = end {
                    self.broke(attach, reason);
                }
            }
            Event::Stop | Event::GaveUp(_) => {}
        }
    }

    fn message(&mut self, message: ToWorker) {
        match message {
            ToWorker::Accept { seen_as } => {
                tracing::info!(seen_as, "joined the cluster");
                if let Err(error) = self.known.save(&self.state_dir) {
                    tracing::warn!(%error, "the coordinator could not be remembered; the next join needs a ticket");
                }
                lock(&self.status).trouble = None;
            }
            ToWorker::Deploy(deploy) => {
                let is_old = |now: &Attach| now.deployment == deploy.deployment && now.epoch >= deploy.epoch;
                if self.attach().as_ref().is_some_and(is_old) {
                    return;
                }
                self.stop_stage();
                let (epoch, layers) = (deploy.epoch, deploy.layers);
                tracing::info!(%epoch, %layers, model = deploy.model_name, "stage assigned");
                *lock(&self.upstream) = Some(deploy.upstream);
                self.deploy = Some(Arc::new(*deploy));
                self.to_load = true;
            }
            ToWorker::Join { deployment, epoch } => self.dial_next(Attach { deployment, epoch }),
            ToWorker::Undeploy { deployment, epoch } => {
                if self.attach().is_some_and(|now| now.deployment == deployment && now.epoch <= epoch) {
                    self.undeploy();
                }
            }
            ToWorker::Goodbye { reason } => self.set_trouble(format!("the coordinator ended: {reason}")),
            ToWorker::Ping { .. } => {}
        }
    }

    fn attach(&self) -> Option<Attach> {
        self.deploy.as_ref().map(|d| Attach { deployment: d.deployment, epoch: d.epoch })
    }

    fn tell(&self, message: &ToCoordinator) {
        if let Some(control) = &self.control
            && let Err(error) = control.send(kind::CONTROL, &[&message.encode()])
        {
            tracing::debug!(%error, "the coordinator was not told");
        }
    }

    /// The stage cannot be loaded.
    fn fail(&mut self, attach: Attach, reason: String) {
        let epoch = attach.epoch;
        tracing::error!(%epoch, reason, "the stage failed");
        self.set_trouble(reason.clone());
        if self.attach() == Some(attach) {
            self.tell(&ToCoordinator::StageFailed { epoch, reason });
        }
    }

    /// The stage is as it should be, but the ring is not.
    fn broke(&mut self, attach: Attach, reason: String) {
        let epoch = attach.epoch;
        tracing::warn!(%epoch, reason, "the ring broke");
        self.set_trouble(reason.clone());
        if self.attach() == Some(attach) {
            self.tell(&ToCoordinator::RingBroke { epoch, reason });
        }
    }

    fn set_trouble(&self, text: String) {
        lock(&self.status).trouble = Some(text);
    }

    /// Ends what runs; what is loaded stays for the next placement, which may want the same.
    fn stop_stage(&mut self) {
        match &self.slot {
            Slot::Loading(cancel) => cancel.store(true, Ordering::Relaxed),
            Slot::Running(running) => running.stop(),
            Slot::Empty | Slot::Loaded(_) => {}
        }
        for link in [self.inbound.take(), self.outbound.take()].into_iter().flatten() {
            link.close();
        }
    }

    /// Ends what runs and frees what is loaded.
    fn drop_stage(&mut self) {
        self.stop_stage();
        if matches!(self.slot, Slot::Loaded(_)) {
            self.slot = Slot::Empty;
        }
    }

    fn undeploy(&mut self) {
        self.deploy = None;
        self.to_load = false;
        *lock(&self.upstream) = None;
        self.drop_stage();
    }

    fn load_if_due(&mut self) {
        let (true, Some(deploy)) = (self.to_load, self.deploy.clone()) else { return };
        if !matches!(self.slot, Slot::Empty | Slot::Loaded(_)) {
            return;
        }
        self.to_load = false;
        let key = key_of(&deploy);
        if let Slot::Loaded(stage) = &mut self.slot
            && stage.key == key
        {
            stage.runner.clear();
            let memory = stage.memory;
            return self.tell(&ToCoordinator::Loaded { epoch: deploy.epoch, memory });
        }
        // The old weights go before the new ones come: this node may not hold both.
        self.slot = Slot::Empty;
        let cancel = Arc::new(AtomicBool::new(false));
        let loader = Loader {
            deploy: Arc::clone(&deploy),
            key,
            own: self.own.clone().filter(|_| self.own_hash == Some(deploy.header_hash)),
            differs: self.own_hash.is_some_and(|hash| hash != deploy.header_hash),
            cache: Arc::clone(&self.cache),
            identity: Arc::clone(&self.identity),
            known: self.known.clone(),
            threads: self.threads,
            state_dir: self.state_dir.clone(),
            kv_spill: self.kv_spill,
            cancel: Arc::clone(&cancel),
            control: self.control.clone(),
            status: Arc::clone(&self.status),
        };
        let events = self.events.clone();
        let attach = Attach { deployment: deploy.deployment, epoch: deploy.epoch };
        match spawn("loader", move || drop(events.send(Event::Loaded(attach, loader.load().map(Box::new))))) {
            Ok(()) => self.slot = Slot::Loading(cancel),
            Err(error) => self.fail(attach, format!("no thread to load the stage: {error}")),
        }
    }

    fn loaded(&mut self, attach: Attach, result: Result<Box<LoadedStage>, LoadFailure>) {
        self.slot = Slot::Empty;
        match result {
            Ok(stage) if self.deploy.is_some() => {
                let memory = stage.memory;
                self.slot = Slot::Loaded(stage);
                if self.attach() == Some(attach) {
                    self.tell(&ToCoordinator::Loaded { epoch: attach.epoch, memory });
                }
            }
            Ok(_) => {}
            Err(LoadFailure::OtherModel(reason) | LoadFailure::Other(reason)) => {
                // A load that was given up is no failure: what it was for is gone.
                if self.attach() == Some(attach) {
                    self.fail(attach, reason);
                }
            }
        }
    }

    fn dial_next(&mut self, attach: Attach) {
        let Some(deploy) = self.deploy.clone().filter(|_| self.attach() == Some(attach)) else { return };
        let (identity, events) = (Arc::clone(&self.identity), self.events.clone());
        let dial = move || {
            let result = reach(&identity, deploy.downstream, &deploy.downstream_addresses, Purpose::Data, None)
                .map_err(|error| format!("the next stage cannot be reached: {error}"))
                .and_then(|link| {
                    link.send(kind::ATTACH, &[&attach.encode()]).map_err(|error| error.to_string())?;
                    Ok(link as Arc<dyn Link>)
                });
            let _ = events.send(Event::Dialled(attach, result));
        };
        if let Err(error) = spawn("dial", dial) {
            self.fail(attach, format!("no thread to dial the next stage: {error}"));
        }
    }

    fn dialled(&mut self, attach: Attach, result: Result<Arc<dyn Link>, String>) {
        if self.attach() != Some(attach) {
            if let Ok(link) = result {
                link.close();
            }
            return;
        }
        match result {
            Ok(link) => {
                self.outbound = Some(link);
                self.tell(&ToCoordinator::Joined { epoch: attach.epoch });
            }
            Err(reason) => self.broke(attach, reason),
        }
    }

    fn run_if_due(&mut self) {
        let Some(attach) = self.attach() else { return };
        if self.to_load || !matches!(self.slot, Slot::Loaded(_)) {
            return;
        }
        let (Some(inbound), Some(outbound)) = (self.inbound.clone(), self.outbound.clone()) else { return };
        let Slot::Loaded(stage) = std::mem::replace(&mut self.slot, Slot::Empty) else { return };
        let events = self.events.clone();
        let ended = move |stage, end| drop(events.send(Event::StageEnded(attach, Box::new(stage), end)));
        match RunningStage::start(attach, *stage, inbound, outbound, ended) {
            Ok(running) => self.slot = Slot::Running(running),
            Err(error) => self.fail(attach, format!("no thread to run the stage: {error}")),
        }
    }

    fn publish(&self) {
        let mut status = lock(&self.status);
        status.connected = self.control.is_some();
        status.layers = self.deploy.as_ref().map(|d| d.layers);
        status.model = self.deploy.as_ref().map(|d| d.model_name.clone()).unwrap_or_default();
        status.state = match self.slot {
            Slot::Empty => "waiting",
            Slot::Loading(_) => "loading",
            Slot::Loaded(_) => "loaded",
            Slot::Running(_) => "running",
        }
        .to_owned();
    }
}

fn key_of(deploy: &Deploy) -> StageKey {
    StageKey {
        header_hash: deploy.header_hash,
        tensors: deploy.tensors.iter().map(|(_, hash)| *hash).collect(),
        layers: deploy.layers,
        context: deploy.context,
        sessions: deploy.sessions,
        max_rows: deploy.max_rows,
    }
}
