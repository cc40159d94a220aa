//! A stage that is in memory or on its way there, and what it does.

use std::time::Instant;

use brigade_base::{ByteSize, DeploymentId, NodeId};

use super::want::{Out, Want};
use super::{HANDOVER, HoldId, LinkId, Load, StageKey, View};
use crate::control::{Held, StageRole};
use crate::frame::Feed;

/// Where a stage is.
#[derive(Debug)]
pub(super) enum State {
    /// To be loaded when it is its turn.
    Queued(Box<Load>),
    /// Being loaded, for nobody if it was given up.
    Loading {
        given_up: bool,
    },
    /// In memory; nobody uses it.
    Resting,
    Busy(Busy),
}

/// What a stage does.
#[derive(Debug)]
pub(super) struct Busy {
    pub(super) job: Job,
    /// The [`Want`] that it does it for.
    pub(super) serial: u64,
    pub(super) stopping: Option<Stopping>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Job {
    /// Computes passes and sends them on, perhaps to who stands by for the stage behind as well.
    Serving {
        shadow: Option<LinkId>,
    },
    /// Computes the passes that `upstream` sends.
    StandingBy {
        upstream: NodeId,
    },
    Receiving,
    Sending,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stopping {
    /// It was told to end.
    Now,
    /// It goes on until its link ends, or till then.
    By(Instant),
}

impl Busy {
    /// Whether that is what is wanted still.
    pub(super) fn fits(&self, want: &Want) -> bool {
        let is_fed_by = |feeder| matches!(want.role, StageRole::Standby { upstream } if upstream == Some(feeder));
        self.stopping.is_none()
            && self.serial == want.serial
            && if let Job::StandingBy { upstream } = self.job { is_fed_by(upstream) } else { true }
    }
}

/// A stage that this node holds.
#[derive(Debug)]
pub(super) struct Hold {
    pub(super) id: HoldId,
    key: StageKey,
    pub(super) state: State,
    pub(super) memory: ByteSize,
    /// What its slots held when it last came to rest.
    pub(super) held: Option<Held>,
    /// Whose tokens that are.
    pub(super) kv_of: DeploymentId,
    /// What it is to do; without that it is to be freed.
    pub(super) want: Option<Want>,
}

impl Hold {
    pub(super) fn queued(key: StageKey, load: Load, want: Want, kv_of: DeploymentId) -> Self {
        let (id, state) = (load.id, State::Queued(Box::new(load)));
        Self { id, key, state, memory: ByteSize(0), held: None, kv_of, want: Some(want) }
    }

    /// Whether it is such a stage, and stays.
    pub(super) fn can_be(&self, key: &StageKey) -> bool {
        self.key == *key && !matches!(self.state, State::Loading { given_up: true })
    }

    /// Whether a node may bring it a link with such a feed.
    pub(super) fn takes(&self, peer: NodeId, stage: u32, feed: Feed) -> bool {
        self.want.as_ref().is_some_and(|want| want.stage == stage && want.source(feed) == Some(peer))
    }

    pub(super) fn is_loading(&self) -> bool {
        matches!(self.state, State::Loading { .. })
    }

    /// Whether what another node hands over has come, or is not waited for any longer. The wait begins with the first
    /// question.
    pub(super) fn takes_over(&mut self, now: Instant) -> bool {
        let Some(want) = &mut self.want else { return false };
        let until = *want.handover_until.get_or_insert(now + HANDOVER);
        want.is_handed |= until <= now;
        want.is_handed
    }

    /// What another node hands over begins to come; until when it may.
    pub(super) fn begin_takeover(&mut self) -> Option<Instant> {
        let want = self.want.as_mut()?;
        want.is_handed = true;
        want.handover_until
    }

    pub(super) fn next_tick(&self) -> Option<Instant> {
        let want = self.want.as_ref()?;
        let again = |out: Out| if let Out::Again(at) = out { Some(at) } else { None };
        let hands_over = matches!(want.role, StageRole::HandOver { .. });
        match &self.state {
            State::Queued(_) | State::Loading { .. } => None,
            State::Busy(Busy { stopping: Some(Stopping::By(at)), .. }) => Some(*at),
            State::Busy(Busy { job: Job::Serving { shadow: None }, stopping: None, .. }) => again(want.shadow),
            State::Busy(_) => None,
            State::Resting => {
                let handover = want.handover_until.filter(|_| hands_over || want.source(Feed::Handover).is_some());
                [handover, again(want.next), again(want.shadow)].into_iter().flatten().min()
            }
        }
    }

    pub(super) fn view(&self) -> Option<View> {
        let want = self.want.as_ref()?;
        Some(View {
            stage: want.stage,
            layers: self.key.layers,
            is_standby: matches!(want.role, StageRole::Standby { .. }),
            is_loading: matches!(self.state, State::Queued(_) | State::Loading { .. }),
            is_running: matches!(&self.state, State::Busy(busy) if !matches!(busy.job, Job::Receiving | Job::Sending)),
        })
    }
}
