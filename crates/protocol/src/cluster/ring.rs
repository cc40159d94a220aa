//! The ring that is to be: which node serves which stage, chosen without changing anything.
//!
//! First the cut that is there, with others in the place of those who are lost: so all other stages stay loaded, with
//! what their slots hold. The model is placed anew only where that is not possible.

use brigade_base::{LayerRange, NodeId};
use brigade_plan::{Plan, PlanError, Standby, explain_standbys, place, predict, stand_in};

use super::Cluster;
use super::types::{Member, Order, Role};

/// Said of a placement some of whose stages changed hands.
const MENDED: &str = "Stages of nodes that are gone were taken over as they are, so that all others stayed loaded.";

/// A worker's stage in the ring.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Seat {
    pub layers: LayerRange,
    /// Who serves it; `None` after a loss, until it is placed again.
    pub holder: Option<NodeId>,
    /// Who stands by for it; never the holder.
    pub standby: Option<NodeId>,
    /// Who hands over what its slots held and has not been relieved of that yet.
    pub handed_by: Option<NodeId>,
    /// From whom the holder was told to take that. It stays as it was told, so that its orders do not change.
    pub kv_from: Option<NodeId>,
}

/// A stage that is to change hands, because its holder serves others too.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Move {
    pub stage: usize,
    /// Who loads it, serves nothing yet, and is to serve it.
    pub to: NodeId,
    /// The next placement is made for it.
    pub is_due: bool,
}

/// All stages.
#[derive(Debug, Clone)]
pub(super) struct Ring {
    /// The placement as others see it.
    pub plan: Plan,
    /// Why this placement, without those who stand by.
    pub(super) reasons: Vec<String>,
    /// The workers' stages in ring order.
    pub seats: Vec<Seat>,
    /// At most one stage moves at a time.
    pub moving: Option<Move>,
    /// The node that a stage has moved to, until the ring is ready with it.
    pub newcomer: Option<NodeId>,
    /// On the coordinator alone for want of a majority.
    pub is_makeshift: bool,
}

impl Ring {
    fn new(plan: Plan, is_makeshift: bool) -> Self {
        let workers = plan.stages.split_last().map_or(&[][..], |(_, workers)| workers);
        let seat = |stage: &brigade_plan::PlannedStage| Seat {
            layers: stage.layers,
            holder: Some(stage.node),
            standby: None,
            handed_by: None,
            kv_from: None,
        };
        let seats = workers.iter().map(seat).collect();
        Self { reasons: plan.explanation.clone(), seats, moving: None, newcomer: None, plan, is_makeshift }
    }

    /// From now on a stage is a member's, which did not have it before.
    pub fn seat(&mut self, stage: usize, member: &Member) {
        let seat = &mut self.seats[stage];
        (seat.holder, seat.standby) = (Some(member.id), None);
        let planned = &mut self.plan.stages[stage];
        (planned.node, planned.offered) = (member.id, member.offer.memory);
        planned.name.clone_from(&member.offer.name);
        if !self.reasons.iter().any(|reason| reason == MENDED) {
            self.reasons.push(MENDED.to_owned());
        }
    }

    /// Layers of the coordinator's own stage.
    pub fn tail(&self) -> Option<LayerRange> {
        self.plan.stages.last().map(|stage| stage.layers)
    }

    pub fn is_held_by(&self, id: NodeId) -> bool {
        self.seats.iter().any(|seat| seat.holder == Some(id))
    }

    /// The node serves a stage, or hands over what one held.
    pub fn depends_on(&self, id: NodeId) -> bool {
        self.seats.iter().any(|seat| [seat.holder, seat.handed_by].contains(&Some(id)))
    }

    /// The node holds the weights of a stage that another one serves.
    pub fn stands_by(&self, stage: usize, id: NodeId) -> bool {
        self.seats.get(stage).is_some_and(|seat| seat.standby == Some(id))
            || self.moving.is_some_and(|moving| (moving.stage, moving.to) == (stage, id))
    }

    /// Layers that a node serves, and those that it stands by for.
    pub fn layers_of(&self, id: NodeId) -> [Vec<LayerRange>; 2] {
        let of = |is_its: &dyn Fn(usize, &Seat) -> bool| {
            let its = self.seats.iter().enumerate().filter(|&(k, seat)| is_its(k, seat));
            its.map(|(_, seat)| seat.layers).collect()
        };
        [of(&|_, seat| seat.holder == Some(id)), of(&|k, _| self.stands_by(k, id))]
    }
}

impl Cluster {
    /// The ring that is to be from now on, or what is missing for it.
    pub(super) fn target(&self) -> Result<Ring, String> {
        if !self.has_quorum {
            return self.alone();
        }
        if let Some(ring) = self.chosen() {
            return Ok(ring);
        }
        let here = self.members.iter().filter(|m| m.is_here()).count() + 1;
        let wanted = if self.placed_before { 1 } else { self.settings.nodes_wanted };
        if here < wanted {
            return Err(format!("{here} of {wanted} nodes are here"));
        }
        let mended = |keep_leavers| self.ring.as_ref().and_then(|ring| self.mended(ring, keep_leavers));
        if let Some(ring) = mended(false) {
            return Ok(ring);
        }
        let error = match self.planned(Member::is_here) {
            Ok(ring) => return Ok(ring),
            Err(error) => error,
        };
        // Those who want to end go on serving where it is not possible without them.
        if self.members.iter().any(Member::is_leaving) {
            let planned = || self.planned(|m| m.is_here() || m.is_leaving()).ok();
            if let Some(ring) = mended(true).or_else(planned) {
                return Ok(ring);
            }
        }
        Err(error.to_string())
    }

    /// Without a majority another coordinator may place the workers: this one keeps its hands off them.
    fn alone(&self) -> Result<Ring, String> {
        const NO_MAJORITY: &str = "a majority of the cluster's nodes is not in reach";
        if !self.placed_before && self.settings.nodes_wanted > 1 {
            return Err(NO_MAJORITY.to_owned());
        }
        let mut ring =
            self.planned(|_| false).map_err(|error| format!("{NO_MAJORITY}, and this node alone: {error}"))?;
        ring.is_makeshift = true;
        ring.reasons = vec![format!("The coordinator is on its own: {NO_MAJORITY}.")];
        Ok(ring)
    }

    /// A placement from scratch on the members that `may` take part.
    pub(super) fn planned(&self, may: impl Fn(&Member) -> bool) -> Result<Ring, PlanError> {
        let nodes = self.profiles(may);
        place(&self.settings.model, &nodes, &self.links, &self.settings.demand).map(|plan| Ring::new(plan, false))
    }

    /// The same cut with another holder for each stage that has none, or whose holder wants to end and can be done
    /// without; `None` if somebody is missing.
    fn mended(&self, ring: &Ring, keep_leavers: bool) -> Option<Ring> {
        let mut ring = ring.clone();
        for stage in 0..ring.seats.len() {
            let is_ready = self.has_loaded_standby(&ring, stage);
            let seat = &mut ring.seats[stage];
            (seat.handed_by, seat.kv_from) = (None, None);
            let leaver = seat.holder.and_then(|id| self.member(id)).filter(|m| m.is_leaving() && !keep_leavers);
            if let Some(leaver) = leaver.filter(|leaver| is_ready || leaver.private.is_due) {
                seat.holder = None;
                seat.handed_by = Some(leaver.id);
                seat.kv_from = Some(leaver.id);
            }
        }
        let vacant =
            |ring: &Ring| (0..ring.seats.len()).filter(|&k| ring.seats[k].holder.is_none()).collect::<Vec<_>>();
        if vacant(&ring).is_empty() {
            self.take_move(&mut ring);
        } else {
            ring.moving = None;
        }
        // Those who stand by first: whoever stands in for another stage must have room beside what it then serves.
        for stage in vacant(&ring) {
            let standby = ring.seats[stage].standby;
            if let Some(member) = standby.and_then(|id| self.member(id)).filter(|m| m.is_here()) {
                ring.seat(stage, member);
            }
        }
        for stage in vacant(&ring) {
            let id = self.stand_in(&ring, stage, |_| true)?;
            ring.seat(stage, self.member(id)?);
        }
        self.drop_unwanted_standbys(&mut ring, None);
        Some(ring)
    }

    pub(super) fn has_loaded_standby(&self, ring: &Ring, stage: usize) -> bool {
        let standby = ring.seats[stage].standby.and_then(|id| self.member(id));
        standby.and_then(|m| m.stage(stage as u32)).is_some_and(|s| s.is_standby && s.is_warm())
    }

    /// Who of those that `may` can take a stage beside what it has. With a pinned split, one stage for each node was
    /// asked for: only who has none.
    pub(super) fn stand_in(&self, ring: &Ring, stage: usize, may: impl Fn(&Member) -> bool) -> Option<NodeId> {
        let seat = &ring.seats[stage];
        let is_pinned = self.settings.demand.split.is_some();
        let mut workers = Vec::new();
        for member in self.members.iter().filter(|m| m.is_here() && seat.holder != Some(m.id) && may(m)) {
            let [serves, stands_by] = ring.layers_of(member.id);
            if serves.is_empty() || !is_pinned {
                workers.push(member.worker(serves, stands_by));
            }
        }
        stand_in(&self.settings.model, &self.settings.demand, seat.layers, &workers)
    }

    /// Drops those who stand by where nobody needs it any more, and where there is no room any more: rather those who
    /// still load, and not for the stage `but`.
    pub(super) fn drop_unwanted_standbys(&self, ring: &mut Ring, but: Option<usize>) {
        for seat in &mut ring.seats {
            let is_wanted = self.settings.redundancy > 1
                || seat.holder.and_then(|id| self.member(id)).is_some_and(Member::is_leaving);
            let is_here = seat.standby.and_then(|id| self.member(id)).is_some_and(Member::is_here);
            if !is_wanted || !is_here || seat.standby == seat.holder {
                seat.standby = None;
            }
        }
        for member in &self.members {
            while let [serves, stands_by] = ring.layers_of(member.id)
                && !stands_by.is_empty()
                && !member.worker(serves, stands_by).fits(&self.settings.model, &self.settings.demand)
            {
                let mine = (0..ring.seats.len()).filter(|&stage| ring.seats[stage].standby == Some(member.id));
                let least = mine.min_by_key(|&stage| (but == Some(stage), self.has_loaded_standby(ring, stage)));
                let Some(stage) = least else { break };
                ring.seats[stage].standby = None;
            }
        }
    }

    /// What a worker is to hold, in ring order.
    pub(super) fn orders(&self, id: NodeId) -> Vec<Order> {
        let seats = self.ring.as_ref().map(|ring| ring.seats.as_slice()).unwrap_or_default();
        let (own, shadow) = (self.settings.coordinator.id, self.settings.shadow);
        let neighbour = |stage: Option<usize>| stage.and_then(|k| seats.get(k)?.holder).unwrap_or(own);
        let mut orders = Vec::new();
        for (k, seat) in seats.iter().enumerate() {
            let upstream = neighbour(k.checked_sub(1));
            let role = if seat.holder == Some(id) {
                let shadow = self.shadow_of(k + 1);
                Role::Serve { upstream, downstream: neighbour(Some(k + 1)), shadow, kv_from: seat.kv_from }
            } else if self.ring.as_ref().is_some_and(|ring| ring.stands_by(k, id)) {
                Role::Standby { upstream: Some(upstream).filter(|_| shadow && seat.standby == Some(id)) }
            } else if let (true, Some(to)) = (seat.handed_by == Some(id), seat.holder) {
                Role::HandOver { to }
            } else {
                continue;
            };
            let is_kept = self.member(id).and_then(|m| m.stage(k as u32)).is_none_or(|stage| stage.is_kept);
            orders.push(Order { stage: k as u32, layers: seat.layers, role, keep_kv: is_kept });
        }
        orders
    }

    /// Who stands by for a stage and can take its frames.
    pub(super) fn shadow_of(&self, stage: usize) -> Option<NodeId> {
        let standby = self.ring.as_ref()?.seats.get(stage)?.standby.filter(|_| self.settings.shadow)?;
        self.member(standby)?.stage(stage as u32)?.is_warm().then_some(standby)
    }

    /// Brings the plan's explanation and prediction up to date.
    pub(super) fn explain(&mut self) {
        let Some(ring) = &self.ring else { return };
        let mut lines = ring.reasons.clone();
        if self.settings.redundancy > 1 && !ring.seats.is_empty() {
            let standby = |(k, seat): (usize, &Seat)| Some(Standby { stage: k as u32, node: seat.standby? });
            let standbys: Vec<Standby> = ring.seats.iter().enumerate().filter_map(standby).collect();
            lines.extend(explain_standbys(&ring.plan.stages, &standbys, |id| self.name(id)));
        }
        lines.extend(self.explain_move());
        let nodes = self.profiles(|m| ring.is_held_by(m.id));
        let prediction = predict(&self.settings.model, &nodes, &self.links, &self.settings.demand, &ring.plan.stages);
        if let Some(ring) = &mut self.ring {
            ring.plan.explanation = lines;
            ring.plan.prediction = prediction;
        }
    }
}
