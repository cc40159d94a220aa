//! What the coordinator has ordered of a stage, and how far that has come in the present epoch.

use std::time::Instant;

use brigade_base::NodeId;

use super::{DialId, LinkId};
use crate::control::{StageOrder, StageRole};
use crate::frame::Feed;

/// A link that this node dials for a stage.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Out {
    /// Not dialled yet.
    None,
    Dialling(DialId),
    /// There, and the stage has not begun to use it.
    Up(LinkId),
    /// To be dialled again then.
    Again(Instant),
    /// Not to be dialled again in this epoch: the stage has it, or it cannot be had.
    Over,
}

impl Out {
    /// The link, which stays here.
    pub(super) fn link(&self) -> Option<LinkId> {
        if let Self::Up(link) = *self { Some(link) } else { None }
    }

    /// The link, which the stage gets now.
    pub(super) fn take_link(&mut self) -> Option<LinkId> {
        let link = self.link()?;
        *self = Self::Over;
        Some(link)
    }
}

/// What is ordered of a stage in this epoch.
#[derive(Debug)]
pub(super) struct Want {
    /// Tells it from all earlier ones.
    pub(super) serial: u64,
    pub(super) stage: u32,
    pub(super) role: StageRole,
    pub(super) keep_kv: bool,
    /// The slots were kept or emptied as ordered.
    pub(super) is_settled: bool,
    /// The coordinator was told that it is loaded.
    pub(super) is_reported: bool,
    /// The stage behind, or the successor.
    pub(super) next: Out,
    /// Who stands by for the stage behind.
    pub(super) shadow: Out,
    /// The hand-over, to or from this stage, takes no longer.
    pub(super) handover_until: Option<Instant>,
    /// What another node hands over has begun to come, or will not.
    pub(super) is_handed: bool,
}

impl Want {
    pub(super) fn new(serial: u64, order: StageOrder) -> Self {
        Self {
            serial,
            stage: order.stage,
            role: order.role,
            keep_kv: order.keep_kv,
            is_settled: false,
            is_reported: false,
            next: Out::None,
            shadow: Out::None,
            handover_until: None,
            is_handed: false,
        }
    }

    /// Whether a later order of the same epoch leaves it as it is, but for who else gets or sends its frames.
    pub(super) fn is_like(&self, order: &StageOrder) -> bool {
        use StageRole::{HandOver, Serve, Standby};
        self.stage == order.stage
            && match (&self.role, &order.role) {
                (Serve { upstream, downstream, .. }, Serve { upstream: from, downstream: to, .. }) => {
                    upstream == from && downstream.node == to.node
                }
                (Standby { .. }, Standby { .. }) => true,
                (HandOver { to: now }, HandOver { to: then }) => now.node == then.node,
                _ => false,
            }
    }

    /// Who brings a link with such a feed.
    pub(super) fn source(&self, feed: Feed) -> Option<NodeId> {
        match (&self.role, feed) {
            (StageRole::Serve { upstream, .. }, Feed::Passes) => Some(*upstream),
            (StageRole::Serve { kv_from, .. }, Feed::Handover) => kv_from.filter(|_| !self.is_handed),
            (StageRole::Standby { upstream }, Feed::Shadow) => *upstream,
            _ => None,
        }
    }

    /// Who may bring a link.
    pub(super) fn peers(&self) -> impl Iterator<Item = NodeId> {
        [Feed::Passes, Feed::Shadow, Feed::Handover].into_iter().filter_map(|feed| self.source(feed))
    }

    /// Links that are up and not used yet.
    pub(super) fn links(&self) -> impl Iterator<Item = LinkId> {
        [self.next.link(), self.shadow.link()].into_iter().flatten()
    }

    /// Lower is loaded earlier.
    pub(super) fn rank(&self) -> (bool, u32) {
        (matches!(self.role, StageRole::Standby { .. }), self.stage)
    }
}

/// Who stands by for the stage behind.
pub(super) fn shadow_of(role: &StageRole) -> Option<NodeId> {
    if let StageRole::Serve { shadow, .. } = role { shadow.as_ref().map(|peer| peer.node) } else { None }
}
