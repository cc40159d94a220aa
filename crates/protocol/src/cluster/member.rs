//! A node as the coordinator sees it.

use std::time::Instant;

use brigade_base::{ByteSize, LayerRange, NodeId};
use brigade_plan::{NodeProfile, Worker};

use super::types::{Member, MemberStage, MemberState, Order, StageState};
use crate::control::Offer;

/// What nobody else needs to see of a member.
#[derive(Debug, Clone, Default)]
pub(super) struct Private {
    /// The orders that it has.
    pub told: Vec<Order>,
    /// Counts its assignments of this epoch.
    pub revision: u32,
    /// It could not load a stage to stand by with, and is not asked again before this time.
    pub no_standby_until: Option<Instant>,
    /// It wants to end, and others are loaded in its place until this time; later it goes without.
    pub leave_until: Option<Instant>,
    /// It wants to end, and the next placement does without it where that is possible.
    pub is_due: bool,
    /// It wants to end, and this placement took its stages from it, but is not ready yet.
    pub is_relieved: bool,
    /// It was told that it may end.
    pub is_released: bool,
}

impl Member {
    pub(super) fn new(id: NodeId, offer: Offer) -> Self {
        Self { id, offer, stages: Vec::new(), state: MemberState::Here, private: Private::default() }
    }

    /// The layers that it serves, `None` if it serves none. Those of stages that follow each other are one range; of
    /// others it is the first.
    pub fn layers(&self) -> Option<LayerRange> {
        let mut served = self.stages.iter().filter(|stage| !stage.is_standby).map(|stage| stage.layers);
        let first = served.next()?;
        let end = served.fold(first.end(), |end, layers| if layers.start() == end { layers.end() } else { end });
        LayerRange::new(first.start(), end).ok()
    }

    /// The layers that it stands by for, in ring order.
    pub fn standby_layers(&self) -> impl Iterator<Item = LayerRange> {
        self.stages.iter().filter(|stage| stage.is_standby).map(|stage| stage.layers)
    }

    /// What all its loaded stages take.
    pub fn stage_memory(&self) -> ByteSize {
        ByteSize(self.stages.iter().fold(0, |sum, stage| sum.saturating_add(stage.memory.0)))
    }

    pub(super) fn stage(&self, stage: u32) -> Option<&MemberStage> {
        self.stages.iter().find(|s| s.stage == stage)
    }

    pub(super) fn stage_mut(&mut self, stage: u32) -> Option<&mut MemberStage> {
        self.stages.iter_mut().find(|s| s.stage == stage)
    }

    pub(super) fn serves_any(&self) -> bool {
        self.stages.iter().any(|stage| !stage.is_standby)
    }

    /// It may get stages.
    pub(super) fn is_here(&self) -> bool {
        self.state == MemberState::Here
    }

    /// It wants to end and was not told yet that it may.
    pub(super) fn is_leaving(&self) -> bool {
        self.state == MemberState::Leaving && !self.private.is_released
    }

    /// It could not load a stage to stand by with a moment ago.
    pub(super) fn is_resting(&self) -> bool {
        self.private.no_standby_until.is_some()
    }

    /// What it offers, without its speed.
    pub(super) fn profile(&self) -> NodeProfile {
        NodeProfile { id: self.id, name: self.offer.name.clone(), memory: self.offer.memory, speed: None }
    }

    /// Its room for stages, if it held these.
    pub(super) fn worker(&self, serves: Vec<LayerRange>, stands_by: Vec<LayerRange>) -> Worker {
        Worker { node: self.profile(), serves, stands_by }
    }
}

impl MemberStage {
    /// Its weights are there.
    pub(super) fn is_loaded(&self) -> bool {
        !matches!(self.state, StageState::Loading(_))
    }

    /// Frames may be sent to it: its weights are there, or were there in the placement before.
    pub(super) fn is_warm(&self) -> bool {
        self.was_loaded || self.is_loaded()
    }
}
