//! Messages on the control link between the coordinator and one worker.
//!
//! ```text
//! worker                                coordinator
//!   Offer ------------------------------->            what this node gives
//!   <------------------------------ Accept
//!   <------------------------------ Measure           how fast are you with this model, how far from these nodes?
//!   Measured ---------------------------->
//!   <------------------------------ Assign            hold these stages, and no others
//!   Progress ... ------------------------>            once for each stage, as the following
//!   Loaded ------------------------------>
//!   <-------------------------------- Join            dial the stages behind your own
//!   Joined ------------------------------>
//!   <-------------------------------- Ping            every HEARTBEAT_MS
//!   Pong -------------------------------->
//!   Leave ------------------------------->            relieve me of my stages
//!   <---------------------------- Released            nothing depends on you any more
//! ```
//!
//! Encoded with postcard: its lengths are checked against the bytes that are there, so a hostile message cannot make
//! a reader allocate more than the frame that carried it.

use brigade_base::{ByteSize, DeploymentId, Epoch, Hash, KvTypes, LayerRange, NodeId, PassId};
use serde::{Deserialize, Serialize};

use crate::frame::MAX_STAGES;
use crate::measure::{Examined, Measure, Measured};
use crate::weights::{Sources, WeightBytes};
use crate::{DecodeError, cap};

/// Interval of heartbeats in milliseconds.
pub const HEARTBEAT_MS: u64 = 250;

/// A peer that was silent for so long is taken for dead: four heartbeats missed, and one interval for the way. Ended
/// processes close their links at once; this finds those that hang and machines that vanished.
pub const DEAD_AFTER_MS: u64 = 5 * HEARTBEAT_MS;

/// How long a worker keeps its stages loaded after its coordinator is gone: time for the link to come back, or for
/// another coordinator to take over; after that the memory is free.
pub const LEASE_MS: u64 = 4_000;

/// Most stages of one node: those that it serves and those that it stands by for.
pub const MAX_NODE_STAGES: usize = 16;

/// Largest control frame: a deployment carries the model's header without its vocabulary, which was seen to stay
/// below 1 MiB for a thousand layers, and 40 bytes for each tensor.
pub const MAX_CONTROL_BYTES: usize = 16 << 20;

/// Most characters of a node's name.
pub const MAX_NAME: usize = 64;

/// Most addresses of a node: a machine with many interfaces and two families.
pub const MAX_ADDRESSES: usize = 64;

/// Most nodes that a worker is told of: those of a charter, and as many again that are no members yet.
pub const MAX_FELLOWS: usize = 512;

/// Most tokens of all sessions together, so that no product of sizes overflows later.
pub const MAX_KV_TOKENS: u64 = 1 << 32;

/// Most rows of one batch.
pub const MAX_BATCH_ROWS: u32 = 1 << 14;

/// Most tensors of all adapters of a deployment: sixteen adapters with two for each of eight matrices in 256 layers.
pub const MAX_ADAPTER_TENSORS: u64 = 1 << 16;

/// Most sessions of a deployment: libllama's `LLAMA_MAX_SEQ`.
pub const MAX_SESSIONS: u32 = 256;

/// What a worker gives.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Offer {
    /// Its name for people.
    pub name: String,
    /// Memory that it gives.
    pub memory: ByteSize,
    /// Disk that it gives for the KV cache of idle sessions; 0 if none.
    pub kv_spill: ByteSize,
    /// Threads that compute.
    pub threads: u32,
    /// Where its links listen, as `host:port`.
    pub addresses: Vec<String>,
    /// Version of the software, for people.
    pub software: String,
    /// Hash of the header of its own whole copy of a model, if it has one. Such a node can take over as coordinator.
    pub own_copy: Option<Hash>,
}

/// All stages that a node is to hold from now on; it drops the others. Empty `stages` free it.
///
/// Orders of a newer epoch, or of the same one with a higher revision, replace earlier ones. What is loaded and wanted
/// again with the same layers stays in memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Assign {
    /// The deployment.
    pub deployment: DeploymentId,
    /// Its epoch.
    pub epoch: Epoch,
    /// Rises with each assignment of this epoch to this node.
    pub revision: u32,
    /// The model of the stages; missing where there are none.
    pub model: Option<ModelRef>,
    /// The stages.
    pub stages: Vec<StageOrder>,
}

/// What all stages of a model have in common.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModelRef {
    /// Name of the model, for people.
    pub name: String,
    /// Hash of the model's whole header, vocabulary included.
    pub header_hash: Hash,
    /// The header without its vocabulary, as GGUF.
    pub header: Vec<u8>,
    /// Tokens of one session.
    pub context: u32,
    /// Sessions at once.
    pub sessions: u32,
    /// Most rows of one batch.
    pub max_rows: u32,
    /// How keys and values are stored.
    pub kv: KvTypes,
    /// What is added to its matrices.
    pub adapters: Option<AdapterRef>,
}

/// The LoRA adapters of a deployment.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AdapterRef {
    /// What they are, scales and bytes.
    pub id: Hash,
    /// The header of their bundle, as GGUF.
    pub header: Vec<u8>,
    /// The hash of each of its tensors.
    pub tensors: Vec<Hash>,
}

/// A stage to hold.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StageOrder {
    /// Its place in the ring, from 0; the coordinator's stage has the highest.
    pub stage: u32,
    /// Its layers.
    pub layers: LayerRange,
    /// Index and hash of each tensor that it needs.
    pub tensors: Vec<(u32, Hash)>,
    /// What it is for.
    pub role: StageRole,
    /// What its slots hold is of use still, if it is loaded with the same layers: it is told with
    /// [`ToCoordinator::Loaded`]. Otherwise the slots are to be emptied.
    pub keep_kv: bool,
}

/// What a node does with a stage.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum StageRole {
    /// Computes passes and sends them on.
    Serve {
        /// The node whose frames come in; may be this node itself.
        upstream: NodeId,
        /// The node to which frames go; may be this node itself.
        downstream: Peer,
        /// Who stands by for the stage behind and wants the same frames.
        shadow: Option<Peer>,
        /// A node that leaves and hands over what its slots hold.
        kv_from: Option<NodeId>,
    },
    /// Holds the weights, so that it can serve at once.
    Standby {
        /// Whose frames come in to be computed and not sent on, so that the slots hold what those of the serving stage
        /// do; `None` leaves the slots empty.
        upstream: Option<NodeId>,
    },
    /// Sends what the slots hold to the node that serves the stage from now on, then drops the stage.
    HandOver {
        /// The node.
        to: Peer,
    },
}

/// A node to dial.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Peer {
    /// The node.
    pub node: NodeId,
    /// Where its links listen.
    pub addresses: Vec<String>,
}

/// What the slots of a stage hold.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Held {
    /// The last pass that was applied, KV steps and rows. Passes have rising numbers over all epochs of a deployment.
    pub applied: PassId,
    /// Tokens of each slot that are those of all passes up to it; 0 where a pass could not be applied.
    pub tokens: Vec<u32>,
}

/// From the coordinator to a worker.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToWorker {
    /// The offer was taken.
    Accept {
        /// Address of the worker as the coordinator sees it.
        seen_as: String,
        /// The deployment that it takes part in from now on.
        deployment: DeploymentId,
    },
    /// What to measure. [`ToCoordinator::Measured`] is the answer.
    Measure(Box<Measure>),
    /// Other nodes of the cluster, which may measure their links to this one and take weights from it.
    Fellows(Vec<NodeId>),
    /// Where weights may come from, beside the coordinator.
    Sources(Box<Sources>),
    /// What is wrong with this node? [`ToCoordinator::Examined`] is the answer.
    Examine,
    /// What to hold.
    Assign(Box<Assign>),
    /// All stages are loaded: dial those behind the stages that this node serves.
    Join {
        /// The deployment.
        deployment: DeploymentId,
        /// Its epoch.
        epoch: Epoch,
    },
    /// Are you there?
    Ping {
        /// Comes back in the answer.
        nonce: u64,
    },
    /// Nothing depends on this node any more: it may end.
    Released,
    /// The coordinator ends this node's part; the text is for people.
    Goodbye {
        /// Why.
        reason: String,
    },
}

/// From a worker to the coordinator.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum ToCoordinator {
    /// What this node gives; the first message.
    Offer(Offer),
    /// How fast this node is.
    Measured(Box<Measured>),
    /// What was found when this node looked at itself.
    Examined(Examined),
    /// So much of a stage's weights is here.
    Progress {
        /// Epoch of the stage.
        epoch: Epoch,
        /// Which of the ring's stages.
        stage: u32,
        /// Bytes that are here.
        done: u64,
        /// Bytes in all.
        total: u64,
    },
    /// A stage is loaded.
    Loaded {
        /// Epoch of the stage.
        epoch: Epoch,
        /// Which of the ring's stages.
        stage: u32,
        /// Bytes of weights and KV cache.
        memory: ByteSize,
        /// What its slots hold; `None` if they are empty.
        held: Option<Held>,
    },
    /// The stage behind one is reached.
    Joined {
        /// Epoch of the stage.
        epoch: Epoch,
        /// Which of the ring's stages.
        stage: u32,
    },
    /// A stage cannot be loaded.
    StageFailed {
        /// Epoch of the stage.
        epoch: Epoch,
        /// Which of the ring's stages.
        stage: u32,
        /// Why, for people.
        reason: String,
    },
    /// The stage behind one cannot be reached, or a pass could not be computed.
    RingBroke {
        /// Epoch of the stage.
        epoch: Epoch,
        /// Which of the ring's stages.
        stage: u32,
        /// Why, for people.
        reason: String,
    },
    /// I am here.
    Pong {
        /// Of the question.
        nonce: u64,
        /// Resident memory of the process.
        resident: ByteSize,
        /// What its stages have done.
        progress: Progress,
        /// Where it had its weights from.
        weights: WeightBytes,
    },
    /// This node wants to end: please place its stages elsewhere. [`ToWorker::Released`] is the answer.
    Leave {
        /// Why, for people.
        reason: String,
    },
    /// This node leaves; the text is for people.
    Goodbye {
        /// Why.
        reason: String,
    },
}

/// What the stages that a node serves have done, so that slow can be told from stuck.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Progress {
    /// Rises whenever anything moves: a frame received or sent, an operation of a pass computed.
    pub steps: u64,
    /// The last pass that came in.
    pub received: PassId,
    /// The last pass that went out.
    pub sent: PassId,
}

impl Held {
    /// What two stages both hold: the earlier pass, and of each slot the fewer tokens.
    #[must_use]
    pub fn and(mut self, other: Self) -> Self {
        self.applied = self.applied.min(other.applied);
        self.tokens.truncate(other.tokens.len());
        for (own, others) in self.tokens.iter_mut().zip(other.tokens) {
            *own = (*own).min(others);
        }
        self
    }
}

impl Offer {
    fn check(&self) -> Result<(), DecodeError> {
        cap("name length", self.name.chars().count() as u64, MAX_NAME as u64)?;
        cap("software name length", self.software.len() as u64, MAX_NAME as u64)?;
        check_addresses(&self.addresses)
    }
}

impl Assign {
    fn check(&self) -> Result<(), DecodeError> {
        cap("number of stages", self.stages.len() as u64, MAX_NODE_STAGES as u64)?;
        let malformed = |why: &str| DecodeError::Malformed { what: "assignment", why: why.to_owned() };
        match &self.model {
            Some(model) => model.check()?,
            None if self.stages.is_empty() => {}
            None => return Err(malformed("stages without a model")),
        }
        for order in &self.stages {
            cap("stage", order.stage.into(), MAX_STAGES.into())?;
            match &order.role {
                StageRole::Serve { downstream, shadow, .. } => {
                    check_addresses(&downstream.addresses)?;
                    shadow.as_ref().map_or(Ok(()), |shadow| check_addresses(&shadow.addresses))?;
                }
                StageRole::Standby { .. } => {}
                StageRole::HandOver { to } => check_addresses(&to.addresses)?,
            }
        }
        let twice = |(at, order): (usize, &StageOrder)| self.stages[..at].iter().any(|o| o.stage == order.stage);
        if self.stages.iter().enumerate().any(twice) {
            return Err(malformed("a stage is named twice"));
        }
        Ok(())
    }
}

impl ModelRef {
    pub(crate) fn check(&self) -> Result<(), DecodeError> {
        cap("context × sessions", u64::from(self.context) * u64::from(self.sessions), MAX_KV_TOKENS)?;
        cap("sessions", self.sessions.into(), MAX_SESSIONS.into())?;
        cap("rows of a batch", self.max_rows.into(), MAX_BATCH_ROWS.into())?;
        let n_adapter_tensors = self.adapters.as_ref().map_or(0, |adapters| adapters.tensors.len());
        cap("tensors of adapters", n_adapter_tensors as u64, MAX_ADAPTER_TENSORS)?;
        if self.sessions == 0 || self.context == 0 || self.max_rows == 0 {
            let why = "sessions, context and rows must not be zero".to_owned();
            return Err(DecodeError::Malformed { what: "assignment", why });
        }
        Ok(())
    }
}

pub(crate) fn check_addresses(addresses: &[String]) -> Result<(), DecodeError> {
    cap("number of addresses", addresses.len() as u64, MAX_ADDRESSES as u64)?;
    // 253 characters of a host name, a colon and a port.
    addresses.iter().try_for_each(|a| cap("address length", a.len() as u64, 260))
}

pub(crate) fn encode<T: Serialize>(message: &T) -> Vec<u8> {
    // Writing to memory fails for no value of these types: they hold no map or sequence of unknown length.
    postcard::to_stdvec(message).unwrap_or_default()
}

pub(crate) fn decode<'a, T: Deserialize<'a>>(what: &'static str, bytes: &'a [u8]) -> Result<T, DecodeError> {
    let malformed = |why: String| DecodeError::Malformed { what, why };
    let (message, rest) = postcard::take_from_bytes(bytes).map_err(|e| malformed(e.to_string()))?;
    if rest.is_empty() { Ok(message) } else { Err(malformed(format!("{} bytes too many", rest.len()))) }
}

impl ToWorker {
    /// The message as bytes.
    pub fn encode(&self) -> Vec<u8> {
        encode(self)
    }

    /// Reads a message.
    ///
    /// # Errors
    /// If the bytes are none, or a number is beyond its cap.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let message = decode("control message", bytes)?;
        match &message {
            Self::Assign(assign) => assign.check()?,
            Self::Measure(measure) => measure.check()?,
            Self::Sources(sources) => sources.check()?,
            Self::Fellows(nodes) => cap("number of nodes", nodes.len() as u64, MAX_FELLOWS as u64)?,
            _ => {}
        }
        Ok(message)
    }
}

impl ToCoordinator {
    /// The message as bytes.
    pub fn encode(&self) -> Vec<u8> {
        encode(self)
    }

    /// Reads a message.
    ///
    /// # Errors
    /// If the bytes are none, or a number is beyond its cap.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let message = decode("control message", bytes)?;
        match &message {
            Self::Offer(offer) => offer.check()?,
            Self::Measured(measured) => measured.check()?,
            Self::Examined(examined) => examined.check()?,
            Self::Loaded { held: Some(held), .. } => {
                cap("number of slots", held.tokens.len() as u64, MAX_SESSIONS.into())?;
            }
            _ => {}
        }
        Ok(message)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use brigade_base::KvType;
    use proptest::prelude::*;

    fn offer(n_addresses: usize) -> ToCoordinator {
        ToCoordinator::Offer(Offer {
            name: "box".into(),
            memory: ByteSize::gib(2),
            kv_spill: ByteSize::gib(1),
            threads: 4,
            addresses: vec!["[::1]:7".into(); n_addresses],
            software: "0.1".into(),
            own_copy: None,
        })
    }

    fn assign(sessions: u32, context: u32) -> ToWorker {
        let peer = Peer { node: NodeId::from_bytes([4; 32]), addresses: vec!["10.0.0.1:7".into()] };
        let upstream = NodeId::from_bytes([3; 32]);
        let order = |stage, role| StageOrder {
            stage,
            layers: LayerRange::new(0, 4).unwrap(),
            tensors: vec![(3, Hash::from_bytes([2; 32]))],
            role,
            keep_kv: true,
        };
        let serve = StageRole::Serve { upstream, downstream: peer.clone(), shadow: Some(peer.clone()), kv_from: None };
        let model = ModelRef {
            name: "m".into(),
            header_hash: Hash::from_bytes([1; 32]),
            header: vec![1, 2, 3],
            context,
            sessions,
            max_rows: 256,
            kv: KvTypes { k: KvType::Q8_0, v: KvType::Q4_0 },
            adapters: Some(AdapterRef { id: Hash::from_bytes([5; 32]), header: vec![7], tensors: Vec::new() }),
        };
        ToWorker::Assign(Box::new(Assign {
            deployment: DeploymentId(1),
            epoch: Epoch(2),
            revision: 1,
            model: Some(model),
            stages: vec![
                order(0, serve),
                order(1, StageRole::Standby { upstream: Some(upstream) }),
                order(2, StageRole::HandOver { to: peer }),
            ],
        }))
    }

    #[test]
    fn messages_survive_the_wire() {
        assert_eq!(ToCoordinator::decode(&offer(2).encode()), Ok(offer(2)));
        assert_eq!(ToWorker::decode(&assign(4, 512).encode()), Ok(assign(4, 512)));
    }

    #[test]
    fn numbers_are_capped() {
        assert!(matches!(ToCoordinator::decode(&offer(65).encode()), Err(DecodeError::TooMany { .. })));
        assert!(matches!(ToWorker::decode(&assign(257, 1).encode()), Err(DecodeError::TooMany { .. })));
        assert!(matches!(ToWorker::decode(&assign(256, u32::MAX).encode()), Err(DecodeError::TooMany { .. })));
        assert!(matches!(ToWorker::decode(&assign(0, 1).encode()), Err(DecodeError::Malformed { .. })));
    }

    #[test]
    fn an_assignment_names_each_stage_once_and_its_model() {
        let altered = |alter: &dyn Fn(&mut Assign)| {
            let ToWorker::Assign(mut assign) = assign(4, 512) else { panic!() };
            alter(&mut assign);
            ToWorker::decode(&ToWorker::Assign(assign).encode())
        };
        assert!(matches!(altered(&|a| a.stages[1].stage = 0), Err(DecodeError::Malformed { .. })));
        assert!(matches!(altered(&|a| a.model = None), Err(DecodeError::Malformed { .. })));
        assert!(matches!(altered(&|a| a.stages[0].stage = u32::MAX), Err(DecodeError::TooMany { .. })));
        let many = |a: &mut Assign| a.stages = vec![a.stages[0].clone(); MAX_NODE_STAGES + 1];
        assert!(matches!(altered(&many), Err(DecodeError::TooMany { .. })));
        let free = |a: &mut Assign| (a.model, a.stages) = (None, vec![]);
        assert!(altered(&free).is_ok());
    }

    #[test]
    fn trailing_bytes_are_refused() {
        let mut bytes = ToWorker::Ping { nonce: 1 }.encode();
        bytes.push(0);
        assert!(ToWorker::decode(&bytes).is_err());
    }

    proptest! {
        #[test]
        fn no_bytes_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = ToWorker::decode(&bytes);
            let _ = ToCoordinator::decode(&bytes);
        }

        #[test]
        fn no_mutation_panics(at in 0usize..100, value: u8) {
            let mut bytes = assign(4, 512).encode();
            let at = at % bytes.len();
            bytes[at] = value;
            let _ = ToWorker::decode(&bytes);
        }
    }
}
