//! How fast nodes and links are, and whether another placement would be so much faster that it pays to change to it.
//!
//! Speeds come before a node's offer, and again whenever they have changed: a laptop that throttles, a gaming machine
//! whose owner plays. The placement is changed only where all is well, seldom, for a clear gain, and if the gain makes
//! up for loading and for computing sessions again within [`PAYS_WITHIN`]. So a speed that wavers moves nothing.

use std::time::{Duration, Instant};

use brigade_base::{LayerRange, NodeId};
use brigade_plan::{LinkProfile, NodeProfile, Optimize, Plan, PlannedStage, RingModel, RingStage, Speed};

use super::Cluster;
use super::ring::Ring;
use super::types::{Member, Phase};

/// A ring is ready for so long before another placement is thought of, and so much time passes between two thoughts: a
/// new speed is seen within a minute, and most noise is over.
pub(super) const LOOK_EVERY: Duration = Duration::from_secs(20);

/// What the other placement must cost at most, as a share of the present one: predictions are off by some percent, and
/// two that are equal must not take turns.
const WORTH: f64 = 0.85;

/// The time for which a change stops all sessions must be gained within so many seconds of work.
const PAYS_WITHIN: f64 = 600.0;

impl Cluster {
    /// Takes note of a node's speed and links.
    pub(super) fn measured(&mut self, id: NodeId, speed: Option<Speed>, links: &[(NodeId, NodeId, LinkProfile)]) {
        for &(from, to, link) in links {
            self.links.set(from, to, link);
        }
        if id == self.settings.coordinator.id {
            self.settings.coordinator.speed = speed;
        } else {
            match speed {
                Some(speed) => _ = self.speeds.insert(id, speed),
                None => _ = self.speeds.remove(&id),
            }
        }
        self.explain();
    }

    /// Forgets what was measured of a node that is gone.
    pub(super) fn forget_pace(&mut self, id: NodeId) {
        self.speeds.remove(&id);
        self.links.remove(id);
    }

    /// The nodes that `may` take part, the coordinator last, with all that is known of them.
    pub(super) fn profiles(&self, may: impl Fn(&Member) -> bool) -> Vec<NodeProfile> {
        let workers = self.members.iter().filter(|m| may(m));
        let known = |m: &Member| NodeProfile { speed: self.speeds.get(&m.id).cloned(), ..m.profile() };
        workers.map(known).chain([self.settings.coordinator.clone()]).collect()
    }

    /// What the present placement, with those who serve it now, and another one cost; `None` if a speed is not known.
    fn cost_s(&self, nodes: &[NodeProfile], stages: &[PlannedStage]) -> Option<f64> {
        let of = |stage: &PlannedStage| {
            let node = nodes.iter().find(|node| node.id == stage.node)?;
            Some(RingStage { node, speed: node.speed.as_ref()?, layers: stage.layers })
        };
        let ring = stages.iter().map(of).collect::<Option<Vec<_>>>()?;
        Some(RingModel::new(&self.settings.model, &ring, &self.links, &self.settings.demand).cost_s())
    }

    /// Whether the placement may be changed for speed: speeds count and are known, and nothing else changes.
    fn may_change(&self) -> bool {
        let demand = &self.settings.demand;
        let is_wanted = demand.optimize != Optimize::Memory && demand.split.is_none();
        let is_calm = self.phase == Phase::Ready
            && self.has_quorum
            && !self.is_moving()
            && !self.members.iter().any(Member::is_leaving);
        is_wanted && is_calm && self.settings.coordinator.speed.is_some()
    }

    /// The ring is ready from now on.
    pub(super) fn note_pace(&mut self) {
        self.look_at = self.now.map(|now| now + LOOK_EVERY);
    }

    /// When it is to be looked whether another placement would be faster.
    pub(super) fn look_at(&self) -> Option<Instant> {
        self.look_at.filter(|_| self.may_change())
    }

    /// Begins to change to another placement if that pays.
    pub(super) fn change_if_faster(&mut self) {
        if self.look_at().is_none_or(|at| self.now.is_none_or(|now| now < at)) {
            return;
        }
        self.note_pace();
        if let Some((ring, reason)) = self.faster() {
            self.next = Some(ring);
            self.phase = Phase::Draining(reason);
        }
    }

    /// A placement that is worth a change, and why.
    fn faster(&self) -> Option<(Ring, String)> {
        let ring = self.ring.as_ref()?;
        let nodes = self.profiles(|m| m.is_here() || ring.is_held_by(m.id));
        let now_s = self.cost_s(&nodes, &ring.plan.stages)?;
        let next = self.planned(Member::is_here).ok()?;
        let then_s = self.cost_s(&nodes, &next.plan.stages)?;
        let change_s = self.change_s(ring, &next.plan, &nodes);
        let gain = 1.0 - then_s / now_s;
        // Said this way round, numbers that are none move nothing.
        let pays = then_s <= now_s * WORTH && change_s <= gain * PAYS_WITHIN;
        let is_another = next.plan.stages != ring.plan.stages;
        if !pays || !is_another {
            return None;
        }
        let gain = gain * 100.0;
        let reason = format!(
            "by what was measured, another placement takes {gain:.0} % less time; the change takes about {change_s:.0} s"
        );
        Some((next, reason))
    }

    /// Seconds for which a change to `plan` stops all sessions: what nodes must load, all at the same time but over the
    /// coordinator's links, and at worst every session is computed again.
    fn change_s(&self, ring: &Ring, plan: &Plan, nodes: &[NodeProfile]) -> f64 {
        let own = self.settings.coordinator.id;
        let bytes_of = |layers: LayerRange| -> f64 {
            layers.iter().map(|i| self.settings.model.layer_bytes.get(i as usize).map_or(0.0, |&b| b as f64)).sum()
        };
        let (mut slowest_s, mut sent_s) = (0.0f64, 0.0);
        for stage in &plan.stages {
            let has = if stage.node == own {
                ring.tail() == Some(stage.layers)
            } else {
                ring.layers_of(stage.node).concat().contains(&stage.layers)
            };
            if has {
                continue;
            }
            let speed = nodes.iter().find(|node| node.id == stage.node).and_then(|node| node.speed.as_ref());
            let bytes = bytes_of(stage.layers);
            slowest_s = slowest_s.max(bytes / speed.map_or(f64::INFINITY, |speed| speed.load_bytes_per_s).max(1.0));
            if stage.node != own {
                sent_s += bytes / self.links.get(own, stage.node).bytes_per_s.max(1.0);
            }
        }
        let again_s = plan.prediction.as_ref().map_or(0.0, |p| p.first_token_s * f64::from(p.streams));
        slowest_s.max(sent_s) + again_s
    }

    /// The placement to change to, if all who serve in it are still here.
    pub(super) fn chosen(&self) -> Option<Ring> {
        let next = self.next.as_ref()?;
        let is_here = |id| self.member(id).is_some_and(Member::is_here);
        next.seats.iter().all(|seat| seat.holder.is_some_and(is_here)).then(|| next.clone())
    }
}
