//! Messages on the control link between the coordinator and one worker.
//!
//! ```text
//! worker                                coordinator
//!   Offer ------------------------------->            what this node gives
//!   <------------------------------ Accept
//!   <------------------------------ Deploy            load these layers
//!   Progress ... ------------------------>
//!   Loaded ------------------------------>
//!   <-------------------------------- Join            dial the next stage
//!   Joined ------------------------------>
//!   <--------------------------- Undeploy             drop the stage
//!   <-------------------------------- Ping            every HEARTBEAT_MS
//!   Pong -------------------------------->
//! ```
//!
//! Encoded with postcard: its lengths are checked against the bytes that are there, so a hostile message cannot make
//! a reader allocate more than the frame that carried it.

use brigade_base::{ByteSize, DeploymentId, Epoch, Hash, LayerRange, NodeId};
use serde::{Deserialize, Serialize};

use crate::{DecodeError, cap};

/// Interval of heartbeats in milliseconds.
pub const HEARTBEAT_MS: u64 = 250;

/// A peer that was silent for so long is taken for dead. Eight heartbeats: a machine that computes with all its cores
/// was seen to delay one by up to a second, and an ended process closes its links at once anyway.
pub const DEAD_AFTER_MS: u64 = 8 * HEARTBEAT_MS;

/// Largest control frame: a deployment carries the model's header without its vocabulary, which was seen to stay
/// below 1 MiB for a thousand layers, and 40 bytes for each tensor.
pub const MAX_CONTROL_BYTES: usize = 16 << 20;

/// Most characters of a node's name.
pub const MAX_NAME: usize = 64;

/// Most addresses of a node: a machine with many interfaces and two families.
pub const MAX_ADDRESSES: usize = 64;

/// Most tokens of all sessions together, so that no product of sizes overflows later.
pub const MAX_KV_TOKENS: u64 = 1 << 32;

/// Most rows of one batch.
pub const MAX_BATCH_ROWS: u32 = 1 << 14;

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
}

/// A stage to load.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Deploy {
    /// The deployment.
    pub deployment: DeploymentId,
    /// Its epoch.
    pub epoch: Epoch,
    /// Name of the model, for people.
    pub model_name: String,
    /// Hash of the model's whole header, vocabulary included.
    pub header_hash: Hash,
    /// The header without its vocabulary, as GGUF.
    pub header: Vec<u8>,
    /// Layers of this stage.
    pub layers: LayerRange,
    /// Index and hash of each tensor that this stage needs.
    pub tensors: Vec<(u32, Hash)>,
    /// Tokens of one session.
    pub context: u32,
    /// Sessions at once.
    pub sessions: u32,
    /// Most rows of one batch.
    pub max_rows: u32,
    /// The node whose frames come in.
    pub upstream: NodeId,
    /// The node to which frames go.
    pub downstream: NodeId,
    /// Where that node's links listen.
    pub downstream_addresses: Vec<String>,
}

/// From the coordinator to a worker.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToWorker {
    /// The offer was taken; the address is where the coordinator sees this node.
    Accept {
        /// Address of the worker as the coordinator sees it.
        seen_as: String,
    },
    /// Load a stage; it replaces an earlier one.
    Deploy(Box<Deploy>),
    /// All stages are loaded: dial the next one.
    Join {
        /// The deployment.
        deployment: DeploymentId,
        /// Its epoch.
        epoch: Epoch,
    },
    /// Drop the stage of this epoch and of all earlier ones.
    Undeploy {
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
    /// The coordinator ends this node's part; the text is for people.
    Goodbye {
        /// Why.
        reason: String,
    },
}

/// From a worker to the coordinator.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToCoordinator {
    /// What this node gives; the first message.
    Offer(Offer),
    /// So much of the stage's weights is here.
    Progress {
        /// Epoch of the stage.
        epoch: Epoch,
        /// Bytes that are here.
        done: u64,
        /// Bytes in all.
        total: u64,
    },
    /// The stage is loaded.
    Loaded {
        /// Epoch of the stage.
        epoch: Epoch,
        /// Bytes of weights and KV cache.
        memory: ByteSize,
    },
    /// The next stage is reached.
    Joined {
        /// Epoch of the stage.
        epoch: Epoch,
    },
    /// The stage cannot be loaded.
    StageFailed {
        /// Epoch of the stage.
        epoch: Epoch,
        /// Why, for people.
        reason: String,
    },
    /// The next stage cannot be reached, or a pass could not be computed.
    RingBroke {
        /// Epoch of the stage.
        epoch: Epoch,
        /// Why, for people.
        reason: String,
    },
    /// I am here.
    Pong {
        /// Of the question.
        nonce: u64,
        /// Resident memory of the process.
        resident: ByteSize,
    },
    /// This node leaves; the text is for people.
    Goodbye {
        /// Why.
        reason: String,
    },
}

impl Offer {
    fn check(&self) -> Result<(), DecodeError> {
        cap("name length", self.name.chars().count() as u64, MAX_NAME as u64)?;
        cap("software name length", self.software.len() as u64, MAX_NAME as u64)?;
        check_addresses(&self.addresses)
    }
}

impl Deploy {
    fn check(&self) -> Result<(), DecodeError> {
        cap("context × sessions", u64::from(self.context) * u64::from(self.sessions), MAX_KV_TOKENS)?;
        cap("sessions", self.sessions.into(), MAX_SESSIONS.into())?;
        cap("rows of a batch", self.max_rows.into(), MAX_BATCH_ROWS.into())?;
        check_addresses(&self.downstream_addresses)?;
        if self.sessions == 0 || self.context == 0 || self.max_rows == 0 {
            let why = "sessions, context and rows must not be zero".to_owned();
            return Err(DecodeError::Malformed { what: "deployment", why });
        }
        Ok(())
    }
}

fn check_addresses(addresses: &[String]) -> Result<(), DecodeError> {
    cap("number of addresses", addresses.len() as u64, MAX_ADDRESSES as u64)?;
    // 253 characters of a host name, a colon and a port.
    addresses.iter().try_for_each(|a| cap("address length", a.len() as u64, 260))
}

fn encode<T: Serialize>(message: &T) -> Vec<u8> {
    // Writing to memory fails for no value of these types: they hold no map or sequence of unknown length.
    postcard::to_stdvec(message).unwrap_or_default()
}

fn decode<'a, T: Deserialize<'a>>(what: &'static str, bytes: &'a [u8]) -> Result<T, DecodeError> {
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
        if let Self::Deploy(deploy) = &message {
            deploy.check()?;
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
        if let Self::Offer(offer) = &message {
            offer.check()?;
        }
        Ok(message)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn offer(n_addresses: usize) -> ToCoordinator {
        ToCoordinator::Offer(Offer {
            name: "box".into(),
            memory: ByteSize::gib(2),
            kv_spill: ByteSize::gib(1),
            threads: 4,
            addresses: vec!["[::1]:7".into(); n_addresses],
            software: "0.1".into(),
        })
    }

    fn deploy(sessions: u32, context: u32) -> ToWorker {
        ToWorker::Deploy(Box::new(Deploy {
            deployment: DeploymentId(1),
            epoch: Epoch(2),
            model_name: "m".into(),
            header_hash: Hash::from_bytes([1; 32]),
            header: vec![1, 2, 3],
            layers: LayerRange::new(0, 4).unwrap(),
            tensors: vec![(3, Hash::from_bytes([2; 32]))],
            context,
            sessions,
            max_rows: 256,
            upstream: NodeId::from_bytes([3; 32]),
            downstream: NodeId::from_bytes([4; 32]),
            downstream_addresses: vec![],
        }))
    }

    #[test]
    fn messages_survive_the_wire() {
        assert_eq!(ToCoordinator::decode(&offer(2).encode()), Ok(offer(2)));
        assert_eq!(ToWorker::decode(&deploy(4, 512).encode()), Ok(deploy(4, 512)));
    }

    #[test]
    fn numbers_are_capped() {
        assert!(matches!(ToCoordinator::decode(&offer(65).encode()), Err(DecodeError::TooMany { .. })));
        assert!(matches!(ToWorker::decode(&deploy(257, 1).encode()), Err(DecodeError::TooMany { .. })));
        assert!(matches!(ToWorker::decode(&deploy(256, u32::MAX).encode()), Err(DecodeError::TooMany { .. })));
        assert!(matches!(ToWorker::decode(&deploy(0, 1).encode()), Err(DecodeError::Malformed { .. })));
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
            let mut bytes = deploy(4, 512).encode();
            let at = at % bytes.len();
            bytes[at] = value;
            let _ = ToWorker::decode(&bytes);
        }
    }
}
