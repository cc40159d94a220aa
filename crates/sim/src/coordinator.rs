//! The coordinator of a deployment, as `node::coordinator::owner` has it: what happens becomes an input of the
//! cluster's state machine, its actions become deeds.
//!
//! It owns the [`Cluster`], the control links of the workers with their pulses (`worker_link.rs` there), its own stage,
//! and the [`Ring`].

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

use brigade_base::{ByteSize, DeploymentId, Epoch, Hash, KvTypes, LayerRange, NodeId, PassId, Token};
use brigade_protocol::cluster::{Action, Cluster, Input, Order, Phase, Role, Settings};
use brigade_protocol::control::{
    Assign, DEAD_AFTER_MS, HEARTBEAT_MS, ModelRef, Offer, Peer, Progress, StageOrder, StageRole, ToCoordinator,
    ToWorker,
};
use brigade_protocol::frame::Attach;
use brigade_protocol::kind;
use brigade_protocol::requests::{FromGateway, Readiness, Refusal, ToGateway};
use brigade_protocol::schedule::Limits;

use crate::host::{Host, Work, address};
use crate::model::Model;
use crate::network::{End, Heard, MS};
use crate::ring::{Ring, Said, Start, Via};
use crate::scenario::speed;
use crate::stage::Stage;

/// A pass that is older is late. A real node derives it from running averages; here nothing takes longer unless it is
/// slowed down.
const PASS_DEADLINE: Duration = Duration::from_millis(1000);

/// Of a hundred heartbeats, those before which a node is found to be faster or slower than it was.
const PACE_CHANGES: u64 = 3;

/// While nothing moved for so long, a late pass is stuck.
const STILL: Duration = Duration::from_millis(4 * HEARTBEAT_MS);

#[derive(Debug)]
struct WorkerLink {
    end: End,
    heard_at: Instant,
    progress: Progress,
    moved_at: Instant,
}

/// How long a new coordinator waits for the nodes of the one before, as in `muster.rs` there.
const MUSTER: Duration = Duration::from_millis(1000);

/// The nodes for which the first placement waits.
#[derive(Debug)]
struct Muster {
    until: Instant,
    n_expected: usize,
    offers: Vec<(NodeId, Offer)>,
}

/// What the council is to hear.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Note {
    /// A node was heard.
    Heard(NodeId),
    /// A worker is here.
    Came(NodeId, Offer),
    /// A worker is gone, for good if it said so.
    Went(NodeId, bool),
    /// A worker's coordinator has taken it into a deployment.
    Accepted(NodeId, DeploymentId),
    /// The link to the coordinator closed.
    Lost(NodeId),
    /// A node that was taken for the coordinator is none; what it said.
    Refused(NodeId, Vec<u8>),
}

#[derive(Debug)]
enum Tail {
    Empty,
    Loading(u64),
    Loaded(Stage),
}

/// A coordinator.
#[derive(Debug)]
pub struct Coordinator {
    /// Its state machine.
    pub cluster: Cluster,
    /// Sessions, and the ring that is there.
    pub ring: Ring,
    settings: Settings,
    model: Model,
    workers: BTreeMap<NodeId, WorkerLink>,
    /// Links of other nodes' requests, and when each was heard.
    gateways: BTreeMap<End, Instant>,
    /// For the council, see [`Note`].
    pub notes: Vec<Note>,
    muster: Option<Muster>,
    tail: Tail,
    tail_wanted: Option<(Epoch, u32, LayerRange, bool)>,
    n_loads: u64,
    next_ping: Instant,
    n_pings: u64,
    had_quorum: bool,
    inputs: VecDeque<Input>,
    is_feeding: bool,
}

impl Coordinator {
    /// Begins to coordinate. Who has taken over waits a moment for the nodes of the one before, of which `n_expected`
    /// are alive.
    pub fn start(
        host: &mut Host<'_>,
        settings: Settings,
        model: Model,
        limits: Limits,
        n_expected: Option<usize>,
    ) -> Self {
        let until = host.now() + MUSTER;
        let muster = n_expected.filter(|n| *n > 0).map(|n_expected| Muster { until, n_expected, offers: Vec::new() });
        let mut coordinator = Self {
            cluster: Cluster::new(settings.clone()),
            ring: Ring::new(settings.deployment, limits, host.virtual_now),
            settings,
            model,
            workers: BTreeMap::new(),
            gateways: BTreeMap::new(),
            notes: Vec::new(),
            muster,
            tail: Tail::Empty,
            tail_wanted: None,
            n_loads: 0,
            next_ping: host.now(),
            n_pings: 0,
            had_quorum: true,
            inputs: VecDeque::new(),
            is_feeding: false,
        };
        if coordinator.muster.is_none() {
            coordinator.feed(host, Input::Tick);
        }
        coordinator.turn(host);
        coordinator
    }

    /// Whether there is a majority, as the council sees it.
    pub fn quorum(&mut self, host: &mut Host<'_>, has_quorum: bool) {
        if self.had_quorum != has_quorum {
            self.had_quorum = has_quorum;
            self.feed(host, Input::Quorum(has_quorum));
            self.turn(host);
        }
    }

    fn end_muster(&mut self, host: &mut Host<'_>) {
        let Some(muster) = self.muster.take() else { return };
        if !muster.offers.is_empty() {
            // Whoever came in time takes part in the first placement.
            let nodes_wanted = self.settings.nodes_wanted.max(muster.offers.len() + 1);
            self.cluster = Cluster::new(Settings { nodes_wanted, ..self.settings.clone() });
        }
        self.feed(host, Input::Tick);
        for (node, offer) in muster.offers {
            if self.workers.contains_key(&node) {
                self.message(host, node, ToCoordinator::Offer(offer));
            }
        }
    }

    /// When it wants to be woken.
    pub fn next_wake(&self) -> Instant {
        let muster = self.muster.as_ref().map(|muster| match muster.offers.len() < muster.n_expected {
            true => muster.until,
            false => self.next_ping - Duration::from_millis(HEARTBEAT_MS),
        });
        [self.cluster.next_tick().filter(|_| muster.is_none()), muster]
            .into_iter()
            .flatten()
            .fold(self.next_ping, Instant::min)
    }

    /// Whether anything of it is reserved for sessions.
    pub fn reservations(&self) -> (usize, usize, usize) {
        self.ring.reservations()
    }

    /// A request enters, of whose answer so many tokens are known. False if it is refused.
    pub fn submit(&mut self, host: &mut Host<'_>, caller: usize, n_told: usize, via: Via) -> bool {
        let is_in = self.ring.submit(host, caller, n_told, via);
        self.turn(host);
        is_in
    }

    /// A caller of this node hangs up.
    pub fn hang_up(&mut self, host: &mut Host<'_>, caller: usize) {
        self.ring.hang_up(host, |other, via| other == caller && via == Via::Here);
        self.turn(host);
    }

    /// Another node's requests come over this link, see `node::gateway::server`.
    pub fn greet_gateway(&mut self, host: &Host<'_>, end: End) {
        self.gateways.insert(end, host.now());
    }

    fn gateway_heard(&mut self, host: &mut Host<'_>, end: End, heard: &Heard) {
        self.gateways.insert(end, host.now());
        let Heard::Frame { bytes, .. } = heard else { return self.lose_gateway(host, end) };
        match FromGateway::decode(bytes) {
            Ok(FromGateway::Submit(submit)) => {
                let (number, told) = (submit.number, submit.answer.len());
                let caller: usize = submit.id.parse().unwrap_or_else(|_| panic!("no request {}", submit.id));
                let of = &host.truth.callers[caller];
                let log: Vec<Token> = submit.prompt.iter().chain(&submit.answer).copied().collect();
                assert_eq!(log, of.expected[..log.len()], "request {caller} is submitted with other tokens");
                if !self.ring.submit(host, caller, told, Via::There(end, number)) {
                    let refusal = Refusal::NotReady("no model is placed".to_owned());
                    host.send(end, kind::REQUESTS, ToGateway::Refused { number, refusal }.encode());
                }
            }
            Ok(FromGateway::Cancel { number }) => self.ring.hang_up(host, |_, via| via == Via::There(end, number)),
            Ok(FromGateway::Beat) => drop(host.send(end, kind::REQUESTS, ToGateway::Beat(Readiness::Ready).encode())),
            Ok(other) => panic!("a gateway says {other:?}"),
            Err(error) => panic!("a request cannot be read: {error}"),
        }
    }

    fn lose_gateway(&mut self, host: &mut Host<'_>, end: End) {
        self.gateways.remove(&end);
        host.close(end);
        self.ring.hang_up(host, |_, via| matches!(via, Via::There(other, _) if other == end));
    }

    /// Ends this node's part: its sessions go on elsewhere, its links close.
    pub fn stop(mut self, host: &mut Host<'_>) {
        self.ring.stop(host);
        for worker in self.workers.values() {
            let goodbye = ToWorker::Goodbye { reason: "the coordinator was stopped".to_owned() };
            host.send(worker.end, kind::CONTROL, goodbye.encode());
            host.close(worker.end);
        }
        self.gateways.keys().for_each(|end| host.close(*end));
    }

    /// A worker's control link is up.
    pub fn greet_worker(&mut self, host: &mut Host<'_>, end: End, node: NodeId) {
        let now = host.now();
        let link = WorkerLink { end, heard_at: now, progress: Progress::default(), moved_at: now };
        if let Some(old) = self.workers.insert(node, link) {
            host.close(old.end);
        }
    }

    /// Takes a data link, or closes it.
    pub fn data_link(&mut self, host: &mut Host<'_>, end: End, from: NodeId, attach: Attach) {
        if !self.ring.accept(end, from, attach) {
            host.close(end);
        }
        self.turn(host);
    }

    /// Something came over a link; false if it is none of this coordinator's.
    pub fn heard(&mut self, host: &mut Host<'_>, end: End, heard: &Heard) -> bool {
        if self.gateways.contains_key(&end) {
            self.gateway_heard(host, end, heard);
            self.turn(host);
            return true;
        }
        if self.ring.has(end) {
            let said = match heard {
                Heard::Connected => {
                    self.ring.connected(host, end);
                    None
                }
                Heard::Frame { kind: kind::FRAME, bytes } => self.ring.frame(host, end, bytes),
                Heard::Frame { kind, .. } => panic!("the ring sent a frame of kind {kind:#x}"),
                Heard::Ended | Heard::Unreachable => self.ring.ended(host, end),
                Heard::Incoming { .. } => None,
            };
            self.said(host, said);
            self.turn(host);
            return true;
        }
        let Some(node) = self.workers.iter().find(|(_, worker)| worker.end == end).map(|(node, _)| *node) else {
            return false;
        };
        match heard {
            Heard::Frame { bytes, .. } => match ToCoordinator::decode(bytes) {
                Ok(message) => self.message(host, node, message),
                Err(error) => panic!("a message cannot be read: {error}"),
            },
            _ => self.gone(host, node, "its link ended"),
        }
        self.turn(host);
        true
    }

    fn gone(&mut self, host: &mut Host<'_>, node: NodeId, why: &str) {
        if let Some(worker) = self.workers.remove(&node) {
            host.close(worker.end);
        }
        self.notes.push(Note::Went(node, false));
        self.feed(host, Input::Gone(node, why.to_owned()));
    }

    /// A node is as fast as it happens to be now, where speeds are known at all.
    fn pace(&mut self, host: &mut Host<'_>, node: NodeId) {
        if self.settings.coordinator.speed.is_some() {
            let speed = Box::new(speed(host.random.between(1, 10)));
            self.feed(host, Input::Measured(node, Some(speed), Vec::new()));
        }
    }

    fn message(&mut self, host: &mut Host<'_>, node: NodeId, message: ToCoordinator) {
        let now = host.now();
        if let Some(worker) = self.workers.get_mut(&node) {
            worker.heard_at = now;
        }
        self.notes.push(Note::Heard(node));
        match message {
            ToCoordinator::Offer(offer) if self.muster.is_some() => {
                let Some(muster) = &mut self.muster else { return };
                muster.offers.retain(|(other, _)| *other != node);
                muster.offers.push((node, offer));
            }
            ToCoordinator::Offer(offer) => {
                self.notes.push(Note::Came(node, offer.clone()));
                self.send(
                    host,
                    node,
                    &ToWorker::Accept { seen_as: address(host.index(node)), deployment: self.settings.deployment },
                );
                self.pace(host, node);
                self.feed(host, Input::Offer(node, offer));
            }
            ToCoordinator::Progress { epoch, stage, done, total } => {
                self.feed(host, Input::Progress(node, epoch, stage, done as f32 / total.max(1) as f32));
            }
            ToCoordinator::Loaded { epoch, stage, memory, held } => {
                self.feed(host, Input::Loaded(node, epoch, stage, memory, held));
            }
            ToCoordinator::Joined { epoch, stage } => self.feed(host, Input::Joined(node, epoch, stage)),
            ToCoordinator::StageFailed { epoch, stage, reason } => {
                self.feed(host, Input::StageFailed(node, epoch, stage, reason));
            }
            ToCoordinator::RingBroke { epoch, reason, .. } => {
                self.feed(host, Input::RingBroke(Some(node), epoch, reason));
            }
            ToCoordinator::Pong { progress, .. } => {
                if let Some(worker) = self.workers.get_mut(&node) {
                    if worker.progress.steps != progress.steps {
                        worker.moved_at = now;
                    }
                    worker.progress = progress;
                }
            }
            // This cluster's nodes are not asked.
            ToCoordinator::Measured(_) | ToCoordinator::Examined(_) => {}
            ToCoordinator::Leave { reason } => self.feed(host, Input::Leave(node, reason)),
            ToCoordinator::Goodbye { reason } => {
                self.gone(host, node, &reason);
                self.notes.push(Note::Went(node, true));
            }
        }
    }

    fn send(&self, host: &mut Host<'_>, node: NodeId, message: &ToWorker) {
        if let Some(worker) = self.workers.get(&node) {
            host.send(worker.end, kind::CONTROL, message.encode());
        }
    }

    /// Heartbeats, deadlines, and whatever the state machine waits for.
    pub fn wake(&mut self, host: &mut Host<'_>) {
        let now = host.now();
        if let Some(muster) = &self.muster {
            if now < muster.until && muster.offers.len() < muster.n_expected {
                return self.beat(host);
            }
            self.end_muster(host);
        }
        self.beat(host);
        self.feed(host, Input::Tick);
        self.ring.lose_patience(host);
        self.turn(host);
    }

    fn beat(&mut self, host: &mut Host<'_>) {
        let now = host.now();
        if now >= self.next_ping {
            self.next_ping = now + Duration::from_millis(HEARTBEAT_MS);
            self.n_pings += 1;
            let nodes: Vec<NodeId> = self.workers.keys().copied().collect();
            if self.settings.coordinator.speed.is_some() && host.random.percent(PACE_CHANGES) {
                let all: Vec<NodeId> = nodes.iter().copied().chain([host.id()]).collect();
                let node = all[host.random.below(all.len() as u64) as usize];
                self.pace(host, node);
            }
            for node in nodes {
                let heard_at = self.workers.get(&node).map_or(now, |worker| worker.heard_at);
                if now.saturating_duration_since(heard_at) >= Duration::from_millis(DEAD_AFTER_MS) {
                    self.gone(host, node, "it was silent");
                } else {
                    self.send(host, node, &ToWorker::Ping { nonce: self.n_pings });
                }
            }
            let is_silent = |at: &Instant| now.saturating_duration_since(*at) >= Duration::from_millis(DEAD_AFTER_MS);
            let silent: Vec<End> = self.gateways.iter().filter(|(_, at)| is_silent(at)).map(|(end, _)| *end).collect();
            silent.into_iter().for_each(|end| self.lose_gateway(host, end));
            self.look_for_stuck_passes(host);
        }
    }

    fn look_for_stuck_passes(&mut self, host: &mut Host<'_>) {
        let now = host.now();
        let Some((pass, _)) = self.ring.oldest().filter(|(_, at)| *at + PASS_DEADLINE <= now) else { return };
        let stages = self.cluster.plan().map(|plan| plan.stages.as_slice()).unwrap_or_default();
        let workers = stages.iter().filter_map(|stage| self.workers.get_key_value(&stage.node));
        if workers.clone().any(|(_, worker)| worker.moved_at + STILL > now) {
            return;
        }
        // The first one that has not passed it on has it, or its link does not bring it.
        let holder = workers.clone().find(|(_, worker)| worker.progress.sent < pass);
        let by = holder.filter(|(_, worker)| worker.progress.received >= pass).map(|(node, _)| *node);
        let epoch = self.cluster.epoch();
        host.truth.counts.stuck += 1;
        self.feed(host, Input::Stuck(by, epoch, format!("pass {pass} does not come back")));
    }

    /// Something that was begun is done.
    pub fn done(&mut self, host: &mut Host<'_>, work: Work) {
        match work {
            Work::TailLoad(n) if matches!(self.tail, Tail::Loading(m) if m == n) => self.tail_loaded(host),
            Work::TailPass(n) => {
                let tail = if let Tail::Loaded(tail) = &mut self.tail { Some(tail) } else { None };
                let said = self.ring.tail_done(host, n, tail);
                self.said(host, said);
            }
            _ => {}
        }
        self.turn(host);
    }

    fn tail_loaded(&mut self, host: &mut Host<'_>) {
        self.tail = Tail::Empty;
        if let Some((epoch, stage, layers, _)) = self.tail_wanted.take() {
            self.tail = Tail::Loaded(Stage::new(self.model, layers, self.settings.demand.parallel));
            self.feed(host, Input::Loaded(host.id(), epoch, stage, ByteSize::mib(1), None));
        }
    }

    fn said(&mut self, host: &mut Host<'_>, said: Option<Said>) {
        match said {
            Some(Said::WentAround(epoch)) => self.feed(host, Input::WentAround(epoch)),
            Some(Said::Broke(epoch, why)) => self.feed(host, Input::RingBroke(None, epoch, why)),
            Some(Said::Drained(epoch)) => self.feed(host, Input::Drained(epoch)),
            None => {}
        }
    }

    /// Lets the ring go on as far as it can.
    fn turn(&mut self, host: &mut Host<'_>) {
        loop {
            let has_tail = matches!(self.tail, Tail::Loaded(_));
            let said = self.ring.turn(host, has_tail);
            if said.is_none() {
                return;
            }
            self.said(host, said);
        }
    }

    /// What comes of an action is told when all of them are done, as it is in a real node's loop.
    fn feed(&mut self, host: &mut Host<'_>, input: Input) {
        self.inputs.push_back(input);
        if std::mem::replace(&mut self.is_feeding, true) {
            return;
        }
        while let Some(input) = self.inputs.pop_front() {
            if !matches!(input, Input::Tick) {
                host.say(|| format!("{input:?}"));
            }
            for action in self.cluster.handle(host.now(), input) {
                host.say(|| format!("-> {action:?}"));
                self.act(host, action);
            }
        }
        self.is_feeding = false;
    }

    fn act(&mut self, host: &mut Host<'_>, action: Action) {
        match action {
            Action::Assign { node, epoch, revision, orders } => {
                let assign = self.assign(host, epoch, revision, &orders);
                self.send(host, node, &ToWorker::Assign(Box::new(assign)));
            }
            Action::LoadTail { epoch, stage, layers, keep_kv } => {
                self.ring.stop(host);
                self.tail_wanted = Some((epoch, stage, layers, keep_kv));
                self.load_tail(host);
            }
            Action::Join { node, epoch } => {
                self.send(host, node, &ToWorker::Join { deployment: self.settings.deployment, epoch });
            }
            Action::StartRing { epoch, first, last, n_stages, shadow, held } => {
                let with_addresses = |node: NodeId| (node, self.addresses(node));
                let (first, shadow) = (first.map(with_addresses), shadow.map(with_addresses));
                self.ring.start(host, Start { epoch, first, last, shadow, n_stages, held });
            }
            Action::Ready { .. } => {}
            Action::Drain { epoch } => self.ring.drain(epoch),
            Action::StopRing { .. } => self.ring.stop(host),
            Action::Released { node } => self.send(host, node, &ToWorker::Released),
            Action::GiveUp { reason } => panic!("the coordinator gives up: {reason}"),
        }
    }

    fn addresses(&self, node: NodeId) -> Vec<String> {
        let member = self.cluster.members().iter().find(|member| member.id == node);
        member.map(|member| member.offer.addresses.clone()).unwrap_or_default()
    }

    fn load_tail(&mut self, host: &mut Host<'_>) {
        let Some((epoch, stage, layers, keep_kv)) = self.tail_wanted else { return };
        match &mut self.tail {
            // What it loads may be what is wanted; that is seen when it is done.
            Tail::Loading(_) => {}
            Tail::Loaded(tail) if tail.layers == layers => {
                tail.drop_images();
                if !keep_kv {
                    tail.clear();
                }
                let held = keep_kv.then(|| tail.held());
                self.tail_wanted = None;
                self.feed(host, Input::Loaded(host.id(), epoch, stage, ByteSize::mib(1), held));
            }
            _ => {
                self.n_loads += 1;
                self.tail = Tail::Loading(self.n_loads);
                host.begin(200 * MS, Work::TailLoad(self.n_loads));
            }
        }
    }

    fn assign(&self, host: &Host<'_>, epoch: Epoch, revision: u32, orders: &[Order]) -> Assign {
        let peer = |node: NodeId| {
            let own = node == host.id();
            Peer { node, addresses: if own { vec![address(host.node)] } else { self.addresses(node) } }
        };
        let demand = &self.settings.demand;
        let model = ModelRef {
            name: "a model that is not there".to_owned(),
            header_hash: header_hash(),
            header: Vec::new(),
            context: demand.context,
            sessions: demand.parallel,
            max_rows: demand.max_rows,
            kv: KvTypes::default(),
            adapters: None,
        };
        let order = |order: &Order| StageOrder {
            stage: order.stage,
            layers: order.layers,
            tensors: order.layers.iter().map(|layer| (layer, tensor_hash(layer))).collect(),
            keep_kv: order.keep_kv,
            role: match order.role {
                Role::Serve { upstream, downstream, shadow, kv_from } => {
                    StageRole::Serve { upstream, downstream: peer(downstream), shadow: shadow.map(peer), kv_from }
                }
                Role::Standby { upstream } => StageRole::Standby { upstream },
                Role::HandOver { to } => StageRole::HandOver { to: peer(to) },
            },
        };
        Assign {
            deployment: self.settings.deployment,
            epoch,
            revision,
            model: (!orders.is_empty()).then_some(model),
            stages: orders.iter().map(order).collect(),
        }
    }

    /// Where the deployment stands, for a person who looks at a seed.
    pub fn describe(&self) -> String {
        let members = self.cluster.members().iter().map(|member| {
            let stages: Vec<String> = member
                .stages
                .iter()
                .map(|s| format!("{}{}:{:?}", if s.is_standby { "standby " } else { "" }, s.layers, s.state))
                .collect();
            format!("{} {:?} [{}]", member.offer.name, member.state, stages.join(", "))
        });
        let members: Vec<String> = members.collect();
        let oldest: Option<PassId> = self.ring.oldest().map(|(pass, _)| pass);
        let (epoch, phase) = (self.cluster.epoch(), self.cluster.phase());
        format!(
            "epoch {epoch} {phase:?}; {}; sessions, in slots, waiting, passes: {} {:?}; oldest pass {oldest:?}",
            members.join("; "),
            self.ring.n_sessions(),
            self.ring.reservations()
        )
    }

    /// Whether requests are answered.
    pub fn is_ready(&self) -> bool {
        *self.cluster.phase() == Phase::Ready && self.ring.is_serving()
    }
}

/// Names the model.
pub fn header_hash() -> Hash {
    Hash::from_bytes([7; 32])
}

fn tensor_hash(layer: u32) -> Hash {
    Hash::from_bytes([layer as u8 + 1; 32])
}
