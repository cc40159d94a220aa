//! Why a cluster file cannot be used, and what to write instead.

use brigade_base::MAX_NODE_NAME_CHARS;

use super::super::UnknownName;
use super::{MAX_FILE_BYTES, MAX_NODES, MAX_PAIRS};

/// A scenario cannot be used.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum ScenarioError {
    /// The file is too large.
    #[error("the cluster file has {n_bytes} bytes, {MAX_FILE_BYTES} at most; write like nodes once, with count")]
    TooLarge {
        /// Its size.
        n_bytes: usize,
    },
    /// It is no TOML, or has unknown keys or values of wrong types.
    #[error("the cluster file cannot be read: {message}")]
    Syntax {
        /// What is wrong, with the line.
        message: String,
    },
    /// There are no nodes.
    #[error("the cluster file has no nodes; write one as [[node]] with a name and a device")]
    NoNodes,
    /// There are too many nodes.
    #[error("the cluster file has {n_nodes} nodes; at most {MAX_NODES} can be planned for")]
    TooManyNodes {
        /// How many.
        n_nodes: u64,
    },
    /// There are too many pairs.
    #[error("more than {MAX_PAIRS} pairs have links of their own; name the link at the nodes instead of between them")]
    TooManyPairs,
    /// A node has no name that can be shown.
    #[error(
        "a node is called {name:?}, but a name has 1 to {MAX_NODE_NAME_CHARS} printable characters, its number included"
    )]
    Name {
        /// The beginning of it.
        name: String,
    },
    /// Two nodes, or a node and a group, have one name.
    #[error("two nodes are called {name:?}; give them different names, or write one of them with count")]
    SameName {
        /// The name.
        name: String,
    },
    /// A device or link is not in the catalogue.
    #[error("{place}: {source}")]
    Unknown {
        /// Where it was written.
        place: String,
        /// What and which are the nearest.
        source: UnknownName,
    },
    /// A node has no device.
    #[error("node {node:?} says not what it is: write device = \"...\", or kind, bandwidth_gb_s, tflops and memory")]
    NoDevice {
        /// The node.
        node: String,
    },
    /// A node has no memory and its device none either.
    #[error("node {node:?} says not how much memory it gives: write memory = \"16GiB\"")]
    NoMemory {
        /// The node.
        node: String,
    },
    /// A link has neither a name nor numbers.
    #[error("{place}: write link = \"...\", or both latency_ms and gbit_s")]
    NoLink {
        /// Where.
        place: String,
    },
    /// A pair names a node that is not there.
    #[error("a [[pair]] names {name:?}, but no node is called so; there are {}", .known.join(", "))]
    UnknownNode {
        /// What it names.
        name: String,
        /// Some of the names.
        known: Vec<String>,
    },
    /// A pair is between a node and itself.
    #[error("a [[pair]] is between {name:?} and itself; name two nodes, or one with a count of two or more")]
    PairOfOne {
        /// The node.
        name: String,
    },
    /// More than one node is to coordinate.
    #[error("{first:?} and {second:?} are both to coordinate; write coordinator = true at one node, without count")]
    Coordinators {
        /// One of them.
        first: String,
        /// Another one.
        second: String,
    },
    /// A value is out of its range.
    #[error("{place}: {key} is {value}, but it must be {expected}")]
    Value {
        /// Where it was written.
        place: String,
        /// The key.
        key: &'static str,
        /// What it is.
        value: String,
        /// What it may be.
        expected: &'static str,
    },
}
