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
use serde::{Deserialize, Deserializer, Serialize};

/// One of the words of a trace.
pub type Word = &'static str;

/// A request and its passes. Times are in milliseconds since it was received.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RequestTrace {
    /// Its id, the one that the answer carries.
    pub id: String,
    /// Whose it is; decides who may see this.
    #[serde(skip)]
    pub tenant: TenantId,
    /// `waiting`, `running`, `preempted` or `done`.
    #[serde(deserialize_with = "word")]
    pub state: Word,
    /// Why it ended: `stop`, `length`, `abort`, `timeout` or `error`; missing until it has.
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "some_word")]
    pub finish: Option<Word>,
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
    /// How many texts it has, if those are more than one; all other numbers are of all of them together.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub texts: Option<u32>,
    /// Of these, how many have their vector.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub texts_done: Option<u32>,
    /// The passes that had rows of it, oldest first, with a gap where some were left out.
    pub passes: Vec<PassTrace>,
    /// Passes between the first and the last ones that were not kept.
    pub passes_left_out: u64,
}

/// A pass, as one of its requests saw it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PassTrace {
    /// The pass; it has the same number in the traces of all requests that travelled in it.
    pub pass: u64,
    /// `prefill` if it read the prompt, `decode` if it made the next token.
    #[serde(deserialize_with = "word")]
    pub kind: Word,
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
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
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

/// All words in a trace, so that one that came from another node needs no memory of its own.
const WORDS: [Word; 11] =
    ["waiting", "running", "preempted", "done", "stop", "length", "abort", "timeout", "error", "prefill", "decode"];

fn word<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Word, D::Error> {
    let found = String::deserialize(deserializer)?;
    let known = WORDS.into_iter().find(|word| *word == found);
    known.ok_or_else(|| serde::de::Error::unknown_variant(&found, &WORDS))
}

fn some_word<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Word>, D::Error> {
    word(deserializer).map(Some)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_trace_comes_out_as_it_went_in() {
        let stage = StageTrace {
            stage: 1,
            node: "w1".into(),
            wire_us: 1,
            read_us: 2,
            queue_us: 3,
            compute_us: 4,
            frames: 5,
            encode_us: 6,
            write_us: 7,
        };
        let pass = PassTrace {
            pass: 3,
            kind: "prefill",
            rows: 4,
            pass_rows: 5,
            at_ms: 0.5,
            total_ms: 1.5,
            embed_us: 8,
            write_us: 9,
            stages: vec![stage],
        };
        let mut before = RequestTrace {
            id: "cmpl-1".into(),
            tenant: TenantId(0),
            state: "done",
            finish: Some("stop"),
            priority: 1,
            prompt_tokens: 2,
            cached_tokens: 3,
            completion_tokens: 4,
            preemptions: 5,
            preempted_ms: 0.25,
            received_unix_ms: 6,
            queued_ms: Some(1.0),
            first_token_ms: None,
            total_ms: 7.0,
            texts: Some(9),
            texts_done: Some(8),
            passes: vec![pass],
            passes_left_out: 8,
        };
        let through = |trace: &RequestTrace| serde_json::from_str(&serde_json::to_string(trace).unwrap());
        assert_eq!(through(&before).ok(), Some(before.clone()));
        before.finish = None;
        assert_eq!(through(&before).ok(), Some(before.clone()));
        before.state = "asleep";
        assert!(through(&before).is_err());
    }
}
