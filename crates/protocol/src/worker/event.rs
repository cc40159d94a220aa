//! What a worker's state machine hears and says, and the names by which both sides know stages and links.

use std::sync::Arc;
use std::time::Duration;

use brigade_base::{ByteSize, DeploymentId, Epoch, Hash, KvTypes, LayerRange, NodeId};

use crate::control::{Assign, Held, ModelRef, Peer, StageOrder, ToCoordinator};
use crate::frame::Attach;

/// A stage in the memory of this node, or on its way there. Never used twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HoldId(pub u64);

/// A data link. Never used twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LinkId(pub u64);

/// An attempt to reach another node. Never used twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DialId(pub u64);

/// What makes two stages the same.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StageKey {
    /// Hash of the model's header.
    pub header_hash: Hash,
    /// Hashes of the stage's tensors, in order.
    pub tensors: Vec<Hash>,
    /// Its layers.
    pub layers: LayerRange,
    /// Tokens of one session.
    pub context: u32,
    /// Sessions at once.
    pub sessions: u32,
    /// Most rows of one batch.
    pub max_rows: u32,
    /// How keys and values are stored.
    pub kv: KvTypes,
    /// What its adapters are, if it has some.
    pub adapters: Option<Hash>,
}

impl StageKey {
    /// What an order asks for.
    pub fn of(model: &ModelRef, order: &StageOrder) -> Self {
        Self {
            header_hash: model.header_hash,
            tensors: order.tensors.iter().map(|(_, hash)| *hash).collect(),
            layers: order.layers,
            context: model.context,
            sessions: model.sessions,
            max_rows: model.max_rows,
            kv: model.kv,
            adapters: model.adapters.as_ref().map(|adapters| adapters.id),
        }
    }
}

/// What happened.
#[derive(Debug, Clone, PartialEq)]
pub enum Input {
    /// The control link to the coordinator is up.
    CoordinatorHere,
    /// It is not any more.
    CoordinatorGone,
    /// The coordinator says what to hold.
    Assign(Box<Assign>),
    /// The coordinator says that all stages of the ring are loaded.
    Join {
        /// The deployment.
        deployment: DeploymentId,
        /// Its epoch.
        epoch: Epoch,
    },
    /// The coordinator says that nothing depends on this node any more.
    Released,
    /// This node is to end, once its stages are elsewhere or so much time has passed.
    Leave {
        /// Why, for people.
        reason: String,
        /// How long it may take.
        within: Duration,
    },
    /// So many bytes of a stage's weights are here.
    Progress(HoldId, u64, u64),
    /// A stage is loaded and takes so much memory, or cannot be loaded.
    Loaded(HoldId, Result<ByteSize, String>),
    /// A node was dialled and told the `Attach`.
    Dialled(DialId, Result<LinkId, String>),
    /// A node came in.
    Inbound {
        /// Its link.
        link: LinkId,
        /// Who it is.
        peer: NodeId,
        /// What it brings.
        attach: Attach,
    },
    /// A stage has come to rest after [`Action::Serve`], [`Action::StandBy`], [`Action::Send`] or [`Action::Receive`].
    Ended {
        /// The stage.
        id: HoldId,
        /// Why.
        end: End,
        /// What its slots hold; `None` if they are empty.
        held: Option<Held>,
    },
    /// The link to a node that stands by has ended, or it was too slow and was given up. The stage serves on.
    ShadowGone(LinkId),
    /// Time has passed, see [`Stages::next_tick`].
    Tick,
}

/// Why a stage has come to rest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum End {
    /// A hand-over is complete.
    Done,
    /// It was told to, or a neighbour's link closed.
    Closed,
    /// It cannot go on; the text is for people.
    Failed(String),
}

/// A stage to load.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Load {
    /// Its name from now on.
    pub id: HoldId,
    /// What it is.
    pub key: StageKey,
    /// Its model.
    pub model: Arc<ModelRef>,
    /// Index and hash of each tensor.
    pub tensors: Vec<(u32, Hash)>,
}

/// What to do; nothing of it blocks.
#[derive(Debug, Clone, PartialEq)]
pub enum Action {
    /// Send a message to the coordinator.
    Tell(ToCoordinator),
    /// Load a stage; [`Input::Loaded`] is the answer.
    Load(Box<Load>),
    /// Free a stage that is at rest, or give its loading up; that is answered all the same.
    Free(HoldId),
    /// Empty the slots of a stage that is at rest.
    Empty(HoldId),
    /// Reach a node and send it the `Attach`; [`Input::Dialled`] is the answer.
    Dial(DialId, Peer, Attach),
    /// Close a link.
    Close(LinkId),
    /// Compute the passes of `inbound` and send them on over `outbound`.
    Serve {
        /// The stage.
        id: HoldId,
        /// What is served; frames of another epoch are dropped.
        attach: Attach,
        /// Link of the stage before.
        inbound: LinkId,
        /// Link to the stage behind.
        outbound: LinkId,
    },
    /// Compute the passes of `inbound`, for what the slots then hold.
    StandBy {
        /// The stage.
        id: HoldId,
        /// What is stood by for.
        attach: Attach,
        /// Link of the stage before.
        inbound: LinkId,
    },
    /// From now on a stage that serves sends its frames over this link too, if there is one; the last one is closed.
    Shadow(HoldId, Option<LinkId>),
    /// Send what the slots hold over a link.
    Send {
        /// The stage.
        id: HoldId,
        /// The link.
        link: LinkId,
        /// Then give it up.
        within: Duration,
    },
    /// Fill the slots with what comes over a link; they are empty if it fails.
    Receive {
        /// The stage.
        id: HoldId,
        /// The link.
        link: LinkId,
        /// Then give it up.
        within: Duration,
    },
    /// End what a stage does, at once; [`Input::Ended`] is the answer.
    Stop(HoldId),
    /// This node may end.
    End,
}

/// How a wanted stage stands, for people.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct View {
    /// Its place in the ring.
    pub stage: u32,
    /// Its layers.
    pub layers: LayerRange,
    /// Whether it only stands by.
    pub is_standby: bool,
    /// Whether it is still loaded.
    pub is_loading: bool,
    /// Whether it computes passes.
    pub is_running: bool,
}
