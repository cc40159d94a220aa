//! What became of one request, step by step, as `GET /debug/requests/{id}` shows it.
//!
//! The ring's [`Meter`](crate::meter::Meter) collects it and makes one of these when somebody asks. How much is kept is
//! bounded there: the last requests, and of each the first and the last passes.
//!
//! Times of a pass add up: `embed_us + write_us`, then for each stage `wire_us + read_us + queue_us + compute_us +
//! encode_us + write_us`. Nodes have no common clock, so the wire is not measured: it is what is left of the way
//! around, spread evenly over the links. A stage tells the writing of the frame before, so where frames of unlike size
//! follow each other, some of the wire's time is called writing, or the other way about.

use brigade_base::TenantId;
use serde::Serialize;

/// A request and its passes. Times are in milliseconds since it was received.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct RequestTrace {
    /// Its id, the one that the answer carries.
    pub id: String,
    /// Whose it is; decides who may see this.
    #[serde(skip)]
    pub tenant: TenantId,
    /// `waiting`, `running`, `preempted` or `done`.
    pub state: &'static str,
    /// Why it ended: `stop`, `length`, `abort`, `timeout` or `error`; missing until it has.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub finish: Option<&'static str>,
    /// Lower is earlier.
    pub priority: i32,
    /// Tokens of the prompt.
    pub prompt_tokens: u32,
    /// Of these, how many a KV cache still held.
    pub cached_tokens: u32,
    /// Tokens generated so far.
    pub completion_tokens: u32,
    /// How often it lost its slot to another and went on later.
    pub preemptions: u32,
    /// How long it waited for a slot then.
    pub preempted_ms: f64,
    /// When it was received, in milliseconds since 1970 by the coordinator's clock.
    pub received_unix_ms: u64,
    /// When it got a slot for the first time.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub queued_ms: Option<f64>,
    /// When its first token was chosen.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub first_token_ms: Option<f64>,
    /// When it ended; how old it is, if it has not.
    pub total_ms: f64,
    /// The passes that had rows of it, oldest first, with a gap where some were left out.
    pub passes: Vec<PassTrace>,
    /// Passes between the first and the last ones that were not kept.
    pub passes_left_out: u64,
}

/// A pass, as one of its requests saw it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct PassTrace {
    /// The pass; it has the same number in the traces of all requests that travelled in it.
    pub pass: u64,
    /// `prefill` if it read the prompt, `decode` if it made the next token.
    pub kind: &'static str,
    /// Rows of this request.
    pub rows: u32,
    /// Rows of all requests together.
    pub pass_rows: u32,
    /// When the coordinator began to embed it, in milliseconds since the request was received.
    pub at_ms: f64,
    /// From then until the last stage had computed.
    pub total_ms: f64,
    /// Looking up the rows' embeddings, in microseconds.
    pub embed_us: u32,
    /// Encoding the first frame and writing it, in microseconds; 0 without workers.
    pub write_us: u32,
    /// The stages in the order of the ring; the last is the coordinator's own.
    pub stages: Vec<StageTrace>,
}

/// What a stage spent on a pass, in microseconds.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct StageTrace {
    /// Its place in the ring, counted from 0.
    pub stage: u32,
    /// The node that holds it.
    pub node: String,
    /// The way to it: what is left of the pass, spread evenly over all links.
    pub wire_us: u32,
    /// Reading and decoding the frame.
    pub read_us: u32,
    /// Waiting until the computing thread took it.
    pub queue_us: u32,
    /// Computing the batch that the frame was part of.
    pub compute_us: u32,
    /// Frames in that batch.
    pub frames: u32,
    /// Encoding the next frame.
    pub encode_us: u32,
    /// Writing it; measured at the stage's frame before.
    pub write_us: u32,
}
