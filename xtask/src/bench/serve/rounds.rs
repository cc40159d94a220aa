//! What one round measured, as it stands in the JSON.

use serde::{Deserialize, Serialize};

use super::load::Steady;

/// A round: each side alone, one after the other.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Round {
    /// The whole model in one process with as many threads as one node has.
    pub whole_one: Option<WholeRound>,
    /// The whole model in one process with as many threads as all nodes have.
    pub whole_all: Option<WholeRound>,
    /// The cluster.
    pub cluster: ClusterRound,
}

/// What the whole model in one process did.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct WholeRound {
    /// Threads that computed.
    pub threads: u32,
    /// Each number of streams.
    pub decode: Vec<DecodePoint>,
    /// Milliseconds until the first token of a long prompt, once for each prompt.
    pub prompt_first_token_ms: Vec<f64>,
}

/// What a cluster did; `None` or empty for parts that were not asked for.
#[derive(Debug, Clone, Default, Serialize)]
pub struct ClusterRound {
    /// Each number of streams.
    pub decode: Vec<DecodePoint>,
    /// Milliseconds until the first token of a long prompt that is alone, once for each prompt.
    pub prompt_first_token_ms: Vec<f64>,
    /// A long prompt among streams that decode.
    pub mixed: Option<Mixed>,
    /// What lies between stages.
    pub hop: Option<Hop>,
    /// What idle sessions take.
    pub memory: Option<Memory>,
}

/// A number of streams at once.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct DecodePoint {
    /// How many.
    pub streams: u32,
    /// Tokens per second of all together, while all decode.
    pub tokens_per_second: f64,
    /// Milliseconds until the first token: the median of streams that were asked for at once.
    pub first_token_ms: f64,
    /// Milliseconds between tokens of a stream, median.
    pub gap_ms_p50: f64,
    /// The 99th percentile of the same.
    pub gap_ms_p99: f64,
    /// The share of the time in which each stage computed, in ring order; empty where nobody tells.
    #[serde(default)]
    pub stage_busy: Vec<f64>,
}

impl DecodePoint {
    /// What `streams` streams did.
    pub fn new(streams: u32, steady: &Steady) -> Self {
        Self {
            streams,
            tokens_per_second: steady.tokens_per_second,
            first_token_ms: steady.first_token_ms,
            gap_ms_p50: steady.gap_ms.0,
            gap_ms_p99: steady.gap_ms.1,
            stage_busy: Vec::new(),
        }
    }
}

/// A long prompt that arrives while some streams decode.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Mixed {
    /// Milliseconds until its first token when it has the cluster to itself.
    pub alone_first_token_ms: f64,
    /// The same among the streams.
    pub first_token_ms: f64,
    /// Each of the streams.
    pub streams: Vec<MixedStream>,
}

/// A stream that decodes while a long prompt arrives.
#[derive(Debug, Clone, Default, Serialize)]
pub struct MixedStream {
    /// Milliseconds between its tokens before the prompt came, median.
    pub quiet_gap_ms_p50: f64,
    /// The same over the whole time: before, while the prompt was read, and a little after.
    pub gap_ms_p50: f64,
    /// The longest of the whole time.
    pub gap_ms_max: f64,
}

/// What software takes between two stages for a lone stream, in microseconds.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Hop {
    /// Bytes of hidden state in a frame.
    pub frame_bytes: u64,
    /// Median.
    pub us_p50: f64,
    /// 99th percentile.
    pub us_p99: f64,
    /// What the median is made of, by name; empty where the coordinator does not tell.
    pub parts_us: Vec<(String, f64)>,
}

/// Memory of idle sessions.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Memory {
    /// How many were opened and left.
    pub sessions: u32,
    /// By how much the resident memory of all processes grew. Caches of keys and values are resident before.
    pub growth_bytes: i64,
}

impl Memory {
    /// Bytes for each.
    pub fn bytes_per_session(&self) -> f64 {
        self.growth_bytes.max(0) as f64 / f64::from(self.sessions.max(1))
    }
}
