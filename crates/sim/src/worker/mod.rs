//! A worker, as `node::worker` has it around [`Stages`]: the control link (`control.rs` there), the door, and for each
//! stage what `stage_thread.rs` does with it ([`Job`]).

mod jobs;

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

use brigade_base::{ByteSize, Epoch, NodeId};
use brigade_protocol::control::{DEAD_AFTER_MS, Offer, Peer, Progress, ToCoordinator, ToWorker};
use brigade_protocol::frame::{Attach, FrameHead};
use brigade_protocol::handover::Intake;
use brigade_protocol::kind;
use brigade_protocol::weights::WeightBytes;
use brigade_protocol::worker::{Action, DialId, End as StageEnd, HoldId, Input, LinkId, Load, Stages};

use crate::coordinator::Note;
use crate::host::{Host, Work};
use crate::model::Model;
use crate::network::{End, Heard, MS, Nanos, Purpose};
use crate::scenario::LAYER_BYTES;
use crate::stage::Stage;

/// First and longest pause before the coordinator is dialled again, as in `node::worker::control`.
const REDIAL: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(5));

/// How long a node that leaves waits for its stages to be placed elsewhere.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(30);

/// A frame that has arrived.
type Frame = (FrameHead, Vec<f32>);

/// The control link.
#[derive(Debug)]
enum Control {
    Pause { until: Instant },
    Dialling(End),
    Up { end: End, heard_at: Instant },
}

/// What a stage does.
#[derive(Debug)]
enum Job {
    Rest,
    /// Computes passes; with an outbound link it sends them on, else it stands by.
    Passes(Box<Passes>),
    Receive {
        link: End,
        until: Instant,
        intake: Box<Intake>,
    },
    Send {
        link: End,
        until: Instant,
    },
    /// What it computed is given up; then it is at rest.
    Stopping,
}

#[derive(Debug)]
struct Passes {
    attach: Attach,
    inbound: End,
    outbound: Option<End>,
    shadow: Option<(LinkId, End)>,
    queue: VecDeque<Frame>,
    /// Since when the first of the queue is computed, and which of all works that is.
    computing: Option<(Nanos, u64)>,
    /// Nothing more comes.
    is_cut: bool,
}

#[derive(Debug)]
struct Loaded {
    stage: Stage,
    epoch: Epoch,
    job: Job,
}

/// A worker.
#[derive(Debug)]
pub struct Worker {
    stages: Stages,
    offer: Offer,
    model: Model,
    coordinator: Peer,
    control: Control,
    pause: Duration,
    links: BTreeMap<LinkId, End>,
    n_links: u64,
    /// Links that came in and have not said what they bring.
    doorstep: BTreeMap<End, NodeId>,
    dials: BTreeMap<End, (DialId, Attach)>,
    memory: BTreeMap<HoldId, Loaded>,
    loading: BTreeMap<HoldId, Box<Load>>,
    n_works: u64,
    works: BTreeMap<u64, HoldId>,
    progress: Progress,
    /// Loading fails so often of a hundred times.
    load_failures: u64,
    /// For the council, see [`Note`].
    pub notes: Vec<Note>,
    inputs: VecDeque<Input>,
    is_feeding: bool,
}

impl Worker {
    /// Begins to look for the coordinator.
    pub fn start(host: &mut Host<'_>, offer: Offer, model: Model, coordinator: Peer, load_failures: u64) -> Self {
        let mut worker = Self {
            stages: Stages::new(),
            offer,
            model,
            coordinator,
            control: Control::Pause { until: host.now() },
            pause: REDIAL.0,
            links: BTreeMap::new(),
            n_links: 0,
            doorstep: BTreeMap::new(),
            dials: BTreeMap::new(),
            memory: BTreeMap::new(),
            loading: BTreeMap::new(),
            n_works: 0,
            works: BTreeMap::new(),
            progress: Progress::default(),
            load_failures,
            notes: Vec::new(),
            inputs: VecDeque::new(),
            is_feeding: false,
        };
        worker.wake(host);
        worker
    }

    /// When it wants to be woken.
    pub fn next_wake(&self) -> Option<Instant> {
        let control = match &self.control {
            Control::Pause { until } => Some(*until),
            Control::Dialling(_) => None,
            Control::Up { heard_at, .. } => Some(*heard_at + Duration::from_millis(DEAD_AFTER_MS)),
        };
        let jobs = self.memory.values().filter_map(|loaded| match loaded.job {
            Job::Receive { until, .. } | Job::Send { until, .. } => Some(until),
            _ => None,
        });
        jobs.chain(control).chain(self.stages.next_tick()).min()
    }

    /// Stages in its memory, those on their way there included.
    pub fn n_stages(&self) -> usize {
        self.memory.len() + self.loading.len()
    }

    /// Whom it works for.
    pub fn coordinator(&self) -> &Peer {
        &self.coordinator
    }

    /// Ends this node's part at once: it has another one now.
    pub fn abandon(mut self, host: &mut Host<'_>) {
        self.tell(host, &ToCoordinator::Goodbye { reason: "it has another part now".to_owned() });
        self.hang_up(host);
        self.links.values().chain(self.doorstep.keys()).chain(self.dials.keys()).for_each(|end| host.close(*end));
    }

    /// Whether it has a coordinator.
    pub fn is_connected(&self) -> bool {
        matches!(self.control, Control::Up { .. })
    }

    /// From now on another node coordinates.
    pub fn follow(&mut self, host: &mut Host<'_>, coordinator: Peer) {
        if coordinator != self.coordinator {
            self.coordinator = coordinator;
            self.hang_up(host);
            self.pause = REDIAL.0;
            self.control = Control::Pause { until: host.now() };
            self.wake(host);
        }
    }

    /// Closes the control link, if it is up.
    pub fn hang_up(&mut self, host: &mut Host<'_>) {
        match self.control {
            Control::Pause { .. } => return,
            Control::Dialling(end) => host.close(end),
            Control::Up { end, .. } => {
                host.close(end);
                self.notes.push(Note::Lost(self.coordinator.node));
                self.feed(host, Input::CoordinatorGone);
            }
        }
        self.control = Control::Pause { until: host.now() + self.pause };
        self.pause = (self.pause * 2).min(REDIAL.1);
    }

    /// Time has passed.
    pub fn wake(&mut self, host: &mut Host<'_>) {
        let now = host.now();
        match &self.control {
            Control::Pause { until } if *until <= now => {
                let Peer { node, addresses } = self.coordinator.clone();
                self.control = Control::Dialling(host.dial(node, &addresses, Purpose::Control));
            }
            Control::Up { heard_at, .. } if *heard_at + Duration::from_millis(DEAD_AFTER_MS) <= now => {
                self.hang_up(host);
            }
            _ => {}
        }
        let late = |loaded: &Loaded| match loaded.job {
            Job::Receive { until, .. } | Job::Send { until, .. } => until <= now,
            _ => false,
        };
        let ids: Vec<HoldId> = self.memory.iter().filter(|(_, loaded)| late(loaded)).map(|(id, _)| *id).collect();
        ids.into_iter().for_each(|id| self.rest(host, id, StageEnd::Failed("it took too long".to_owned())));
        self.feed(host, Input::Tick);
    }

    /// This node is to leave.
    pub fn leave(&mut self, host: &mut Host<'_>) {
        self.feed(host, Input::Leave { reason: "it was asked to".to_owned(), within: DRAIN_TIMEOUT });
    }

    /// Somebody brings a data link.
    pub fn came_in(&mut self, end: End, from: NodeId) {
        self.doorstep.insert(end, from);
    }

    /// Something came over a link; false if it is none of this worker's.
    pub fn heard(&mut self, host: &mut Host<'_>, end: End, heard: Heard) -> bool {
        let is_control = match &self.control {
            Control::Dialling(control) | Control::Up { end: control, .. } => *control == end,
            Control::Pause { .. } => false,
        };
        if is_control {
            self.control_heard(host, end, heard);
        } else if let Some(from) = self.doorstep.remove(&end) {
            self.at_the_door(host, end, from, &heard);
        } else if let Some((dial, attach)) = self.dials.remove(&end) {
            let result = match heard {
                Heard::Connected => {
                    host.send(end, kind::ATTACH, attach.encode().to_vec());
                    Ok(self.name_link(end))
                }
                _ => Err("nobody is there".to_owned()),
            };
            self.feed(host, Input::Dialled(dial, result));
        } else {
            return self.data_heard(host, end, heard);
        }
        true
    }

    fn control_heard(&mut self, host: &mut Host<'_>, end: End, heard: Heard) {
        let now = host.now();
        match heard {
            Heard::Connected => {
                self.pause = REDIAL.0;
                self.control = Control::Up { end, heard_at: now };
                host.send(end, kind::CONTROL, ToCoordinator::Offer(self.offer.clone()).encode());
                self.feed(host, Input::CoordinatorHere);
            }
            Heard::Frame { kind: kind::COUNCIL, bytes } => {
                self.notes.push(Note::Refused(self.coordinator.node, bytes));
            }
            Heard::Frame { bytes, .. } => {
                self.control = Control::Up { end, heard_at: now };
                self.notes.push(Note::Heard(self.coordinator.node));
                match ToWorker::decode(&bytes) {
                    Ok(message) => self.message(host, message),
                    Err(error) => panic!("a message cannot be read: {error}"),
                }
            }
            _ => self.hang_up(host),
        }
    }

    fn message(&mut self, host: &mut Host<'_>, message: ToWorker) {
        match message {
            ToWorker::Ping { nonce } => {
                let progress = self.progress(host);
                let (resident, weights) = (ByteSize::mib(1), WeightBytes::default());
                self.tell(host, &ToCoordinator::Pong { nonce, resident, progress, weights });
            }
            ToWorker::Assign(assign) => self.feed(host, Input::Assign(assign)),
            ToWorker::Join { deployment, epoch } => self.feed(host, Input::Join { deployment, epoch }),
            ToWorker::Released => self.feed(host, Input::Released),
            ToWorker::Accept { deployment, .. } => {
                self.notes.push(Note::Accepted(self.coordinator.node, deployment));
            }
            ToWorker::Measure(_)
            | ToWorker::Fellows(_)
            | ToWorker::Sources(_)
            | ToWorker::Examine
            | ToWorker::Goodbye { .. } => {}
        }
    }

    /// While a stage computes, each millisecond is a step.
    fn progress(&self, host: &Host<'_>) -> Progress {
        let since = self.memory.values().filter_map(|loaded| match &loaded.job {
            Job::Passes(passes) => passes.computing.map(|(since, _)| since),
            _ => None,
        });
        let steps = since.map(|since| (host.virtual_now - since) / MS).sum::<u64>();
        Progress { steps: self.progress.steps + steps, ..self.progress }
    }

    fn tell(&self, host: &mut Host<'_>, message: &ToCoordinator) {
        if let Control::Up { end, .. } = self.control {
            host.send(end, kind::CONTROL, message.encode());
        }
    }

    fn name_link(&mut self, end: End) -> LinkId {
        self.n_links += 1;
        self.links.insert(LinkId(self.n_links), end);
        LinkId(self.n_links)
    }

    fn at_the_door(&mut self, host: &mut Host<'_>, end: End, from: NodeId, heard: &Heard) {
        let Heard::Frame { kind: kind::ATTACH, bytes } = heard else { return host.close(end) };
        let attach = Attach::decode(bytes).unwrap_or_else(|error| panic!("an attach cannot be read: {error}"));
        if !self.stages.peers().any(|peer| peer == from) {
            return host.close(end);
        }
        let link = self.name_link(end);
        self.feed(host, Input::Inbound { link, peer: from, attach });
    }

    /// Something that was begun is done.
    pub fn done(&mut self, host: &mut Host<'_>, work: Work) {
        let (Work::Load(n) | Work::Pass(n)) = work else { return };
        let Some(id) = self.works.remove(&n) else { return };
        match work {
            Work::Load(_) => self.loaded(host, id),
            _ => match self.memory.get(&id).map(|loaded| &loaded.job) {
                Some(Job::Stopping) => self.rest(host, id, StageEnd::Closed),
                Some(Job::Passes(passes)) if passes.computing.is_some_and(|(_, m)| m == n) => self.computed(host, id),
                _ => {}
            },
        }
    }

    fn loaded(&mut self, host: &mut Host<'_>, id: HoldId) {
        let Some(load) = self.loading.remove(&id) else { return };
        let result = if host.random.percent(self.load_failures) || host.is_disk_full && host.random.percent(50) {
            Err("its weights cannot be read".to_owned())
        } else {
            let stage = Stage::new(self.model, load.key.layers, load.key.sessions);
            self.memory.insert(id, Loaded { stage, epoch: Epoch(0), job: Job::Rest });
            Ok(ByteSize::mib(100 * u64::from(load.key.layers.len())))
        };
        self.feed(host, Input::Loaded(id, result));
    }

    /// What comes of an action is told when all of them are done, as it is in a real node's loop.
    fn feed(&mut self, host: &mut Host<'_>, input: Input) {
        self.inputs.push_back(input);
        if std::mem::replace(&mut self.is_feeding, true) {
            return;
        }
        while let Some(input) = self.inputs.pop_front() {
            if input != Input::Tick {
                host.say(|| format!("{input:?}"));
            }
            for action in self.stages.handle(host.now(), input) {
                host.say(|| format!("-> {action:?}"));
                self.act(host, action);
            }
        }
        self.is_feeding = false;
    }

    fn act(&mut self, host: &mut Host<'_>, action: Action) {
        match action {
            Action::Tell(message) => self.tell(host, &message),
            Action::Load(load) => self.load(host, load),
            Action::Free(id) => self.free(host, id),
            Action::Empty(id) => {
                if let Some(loaded) = self.memory.get_mut(&id) {
                    assert!(matches!(loaded.job, Job::Rest), "a busy stage is emptied");
                    loaded.stage.clear();
                }
            }
            Action::Dial(dial, peer, attach) => {
                let end = host.dial(peer.node, &peer.addresses, Purpose::Data);
                self.dials.insert(end, (dial, attach));
            }
            Action::Close(link) => {
                if let Some(end) = self.links.get(&link).copied() {
                    self.close(host, end);
                }
            }
            Action::Serve { id, attach, inbound, outbound } => {
                self.run(host, id, attach, inbound, Some(outbound));
            }
            Action::StandBy { id, attach, inbound } => self.run(host, id, attach, inbound, None),
            Action::Shadow(id, link) => self.shadow(host, id, link),
            Action::Send { id, link, within } => self.send_slots(host, id, link, within),
            Action::Receive { id, link, within } => self.receive_slots(host, id, link, within),
            Action::Stop(id) => self.stop(host, id),
            Action::End => {
                self.tell(host, &ToCoordinator::Goodbye { reason: "it has left".to_owned() });
                host.has_ended = true;
            }
        }
    }

    fn load(&mut self, host: &mut Host<'_>, load: Box<Load>) {
        let there =
            self.memory.values().map(|loaded| loaded.stage.layers).chain(self.loading.values().map(|l| l.key.layers));
        let n_layers: u64 = there.chain([load.key.layers]).map(|layers| u64::from(layers.len())).sum();
        assert!(n_layers * LAYER_BYTES <= self.offer.memory.0, "node {} holds more than it gives", host.node);
        self.n_works += 1;
        self.works.insert(self.n_works, load.id);
        let takes = 100 * MS + host.random.below(400) * MS;
        host.begin(takes, Work::Load(self.n_works));
        self.loading.insert(load.id, load);
    }

    fn free(&mut self, host: &mut Host<'_>, id: HoldId) {
        match self.memory.remove(&id) {
            Some(loaded) => assert!(matches!(loaded.job, Job::Rest), "a busy stage is freed"),
            None => {
                self.loading.remove(&id);
                self.feed(host, Input::Loaded(id, Err("it was given up".to_owned())));
            }
        }
    }
}
