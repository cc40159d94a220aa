//! What a coordinator tells of itself and its workers.

use brigade_base::{ByteSize, LayerRange, NodeId};
use brigade_plan::{Plan, advice};
use brigade_protocol::cluster::{Member, MemberState, Phase, Settings, StageState};
use brigade_protocol::measure::LinkReport;

use super::owner::{Owner, Tail};
use super::worker_link::Pulse;
use crate::ring::Happening;
use crate::serving::{ClusterStatus, LinkStatus, NodeStatus};
use crate::system::resident_memory;
use crate::threads::lock;

impl Owner {
    /// Brings the status that callers see up to date.
    pub(super) fn publish(&mut self) {
        self.advise();
        let phase = match self.cluster.phase() {
            Phase::Ready => "ready".to_owned(),
            Phase::Waiting(why) => format!("waiting: {why}"),
            Phase::Loading => "loading weights".to_owned(),
            Phase::Joining => "connecting the stages".to_owned(),
            Phase::Probing => "sending a first token around".to_owned(),
            Phase::Draining(why) => format!("ready; the model is placed anew in a moment: {why}"),
            Phase::Settling(why) => format!("placing the model anew: {why}"),
        };
        if !matches!(self.cluster.phase(), Phase::Ready | Phase::Draining(_)) {
            self.shared.not_ready(phase.clone());
        }
        let missing = match self.cluster.phase() {
            Phase::Waiting(why) => why.as_str(),
            _ => "",
        };
        if missing != self.said_missing {
            self.said_missing = missing.to_owned();
            self.shared.submissions.tell(Happening::Missing(self.said_missing.clone()));
        }
        let (prediction, explanation) =
            self.told_plan().map(|plan| (plan.prediction, plan.explanation)).unwrap_or_default();
        let load = self.meter.load_now();
        let (hop_us_p50, hop_us_p99) = self.meter.hop_us();
        let n_workers = self.stages().len().saturating_sub(1);
        let mut nodes: Vec<NodeStatus> = self.cluster.members().iter().map(|m| self.worker_status(m)).collect();
        nodes.sort_by_key(|node| node.layers.map_or(u32::MAX, LayerRange::start));
        nodes.push(self.own_status(n_workers));
        *lock(&self.shared.status) = ClusterStatus {
            coordinator: self.identity.node_id(),
            model: self.shared.card.name.clone(),
            model_id: self.model.id(),
            header_hash: self.model.header_hash(),
            n_layers: self.model.architecture().n_layers,
            state: phase,
            term: self.cluster.epoch().term(),
            epoch: self.cluster.epoch().number(),
            context: self.context,
            parallel: self.options.parallel,
            running: load.running,
            waiting: load.waiting,
            tokens_generated: self.meter.tokens(),
            tokens_per_second: self.meter.tokens_per_second(),
            hop_us_p50,
            hop_us_p99,
            hop_us: self.meter.hop_parts(),
            kv_tokens: load.kv_tokens,
            kv_capacity: u64::from(self.context) * u64::from(self.options.parallel),
            kv: self.options.kv,
            adapters: self.model.adapters().map(|adapters| adapters.names().to_vec()).unwrap_or_default(),
            uptime_s: self.started.elapsed().as_secs(),
            recoveries: self.meter.recoveries(),
            last_recovery: self.meter.last_recovery(),
            optimize: self.options.optimize,
            prediction,
            explanation,
            advice: self.advice.1.clone(),
            links: self.link_status(),
            nodes,
        };
    }

    /// The present plan, as far as it may be told of what is done with the model.
    pub(super) fn told_plan(&self) -> Option<Plan> {
        self.cluster.plan().map(|plan| self.work.told(plan.clone()))
    }

    /// Looks once for each placement whether something else would be better.
    fn advise(&mut self) {
        let epoch = self.cluster.epoch();
        let (Phase::Ready, Some(plan)) = (self.cluster.phase(), self.cluster.plan()) else { return };
        if !self.work.generates() {
            return;
        }
        if self.advice.0 != Some(epoch) {
            let Settings { model, demand, .. } = &self.settings;
            let advice = advice(model, &self.cluster.nodes(), self.cluster.links(), demand, plan);
            self.advice = (Some(epoch), advice);
        }
    }

    /// What a node's stages take by the plan.
    fn memory_predicted(&self, node: NodeId) -> ByteSize {
        let its = self.stages().iter().filter(|stage| stage.node == node);
        ByteSize(its.fold(0, |sum, stage| sum.saturating_add(stage.memory.total().0)))
    }

    fn link_status(&self) -> Vec<LinkStatus> {
        let name = |id: NodeId| {
            let member = self.cluster.members().iter().find(|m| m.id == id);
            let own = (id == self.identity.node_id()).then(|| self.options.name.clone());
            own.or_else(|| member.map(|m| m.offer.name.clone()))
        };
        let ms = |s: f64| s * 1000.0;
        let of = |(from, link): (NodeId, &LinkReport)| {
            Some(LinkStatus {
                from_id: from,
                to_id: link.peer,
                from: name(from)?,
                to: name(link.peer)?,
                rtt_ms: ms(link.there.latency_s + link.back.latency_s),
                jitter_ms: ms(link.jitter_s),
                loaded_rtt_ms: ms(link.loaded_rtt_s),
                there_bytes_per_s: link.there.bytes_per_s,
                back_bytes_per_s: link.back.bytes_per_s,
            })
        };
        let mut links: Vec<LinkStatus> = self.pace.links().filter_map(of).collect();
        links.sort_by(|a, b| (&a.from, &a.to).cmp(&(&b.from, &b.to)));
        links
    }

    fn worker_status(&self, member: &Member) -> NodeStatus {
        let place = self.stages().iter().position(|stage| stage.node == member.id);
        let link = self.workers.get(&member.id);
        let pulse = link.map(|worker| *lock(&worker.pulse)).unwrap_or_default();
        let Pulse { rtt_ms, resident: memory_resident, weights, .. } = pulse;
        if link.is_some() {
            self.meter.rtt(&member.offer.name, rtt_ms / 1000.0);
        }
        let share_of = |state| match state {
            StageState::Loading(share) => share,
            StageState::Loaded | StageState::Joined => 1.0,
        };
        let served = || member.stages.iter().filter(|stage| !stage.is_standby);
        let loaded = served().map(|stage| share_of(stage.state)).reduce(f32::min);
        let state = match (&member.state, loaded) {
            (MemberState::Failed(why), _) => format!("failed: {why}"),
            (MemberState::Leaving, _) => "leaving".to_owned(),
            (MemberState::Here, None) => "idle".to_owned(),
            (MemberState::Here, Some(share)) if share < 1.0 => "loading".to_owned(),
            (MemberState::Here, Some(_)) => "ready".to_owned(),
        };
        NodeStatus {
            id: member.id,
            name: member.offer.name.clone(),
            role: "worker".to_owned(),
            connected: link.is_some(),
            address: member.offer.addresses.first().cloned().unwrap_or_default(),
            layers: member.layers(),
            standby: member.standby_layers().collect(),
            state,
            loaded: loaded.unwrap_or(0.0),
            memory_offered: member.offer.memory,
            memory_stage: member.stage_memory(),
            memory_resident,
            threads: member.offer.threads,
            pass_ms: place.map_or(0.0, |k| self.meter.stage_ms(k)),
            busy: place.map_or(0.0, |k| self.meter.busy(k)),
            bytes_per_token: if place.is_some() { self.meter.bytes_per_token() } else { 0 },
            rtt_ms,
            memory_predicted: self.memory_predicted(member.id),
            speed: self.pace.speed(member.id).cloned(),
            pace: self.pace.factor(member.id),
            weights,
        }
    }

    fn own_status(&self, n_workers: usize) -> NodeStatus {
        let layers = self.stages().last().map(|stage| stage.layers);
        let (state, loaded, memory) = match &self.tail {
            Tail::Empty => ("idle", 0.0, ByteSize(0)),
            Tail::Loading(_) => ("loading", self.tail_share, ByteSize(0)),
            Tail::Loaded(tail) => ("ready", 1.0, tail.memory),
            Tail::InRing => ("ready", 1.0, self.cluster.tail_memory()),
        };
        NodeStatus {
            id: self.identity.node_id(),
            name: self.options.name.clone(),
            role: "coordinator".to_owned(),
            connected: true,
            address: self.shared.link_addresses.first().cloned().unwrap_or_default(),
            layers,
            standby: Vec::new(),
            state: state.to_owned(),
            loaded,
            memory_offered: self.options.memory,
            memory_stage: memory,
            memory_resident: resident_memory(),
            threads: self.options.threads,
            pass_ms: self.meter.stage_ms(n_workers),
            busy: self.meter.busy(n_workers),
            bytes_per_token: if n_workers > 0 { self.meter.bytes_per_token() } else { 0 },
            rtt_ms: 0.0,
            memory_predicted: self.memory_predicted(self.identity.node_id()),
            speed: self.pace.speed(self.identity.node_id()).cloned(),
            pace: self.pace.factor(self.identity.node_id()),
            weights: self.tally.read(),
        }
    }
}
