//! What is measured of a running cluster, beside what its coordinator predicted of it.

use brigade_base::Token;
use serde::Serialize;
use serde_json::Value;

use super::start::{Running, STREAMS};
use crate::bench::median;
use crate::bench::serve::Prompts;
use crate::bench::serve::load::{Load, Steady, all_began, all_made, first_token_alone};
use crate::cluster::nodes;
use crate::failure::{Failure, Outcome};
use crate::http::Endpoint;

/// Tokens of the prompt where the coordinator does not say what its prediction is about.
const PROMPT: u32 = 512;

/// Tokens of the prompt and answer that touch all weights once.
const WARM_UP: (u32, u32) = (64, 8);

/// Gaps of all streams before those that are measured: the schedule finds its number of passes meanwhile.
const SETTLE: usize = 8;

/// Tokens at the end of a prompt that tell streams apart; those before are computed once and copied.
const OWN_TOKENS: usize = 2;

/// How often a cluster is measured anew because it was placed anew meanwhile.
const TRIES: u32 = 3;

/// How much is measured.
#[derive(Debug, Clone, Copy)]
pub struct Effort {
    /// Prompts whose first token is timed, each followed by a lone stream.
    pub prompts: u32,
    /// Gaps between tokens of a lone stream.
    pub alone: u32,
    /// Gaps of each of many streams.
    pub together: u32,
}

/// Speeds of a cluster, as predicted or as measured.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Speeds {
    /// Tokens in a second of a lone stream.
    pub alone: f64,
    /// Tokens in a second of all streams.
    pub together: f64,
    /// Seconds until the first token of a prompt that is alone.
    pub first_token_s: f64,
}

impl Speeds {
    /// What a balanced placement makes least: seconds of a lone stream's token and of a round of all streams.
    pub fn cost_s(&self) -> f64 {
        1.0 / self.alone + f64::from(STREAMS) / self.together
    }

    /// The mean of two measurements.
    pub fn mean(&self, other: &Self) -> Self {
        Self {
            alone: f64::midpoint(self.alone, other.alone),
            together: f64::midpoint(self.together, other.together),
            first_token_s: f64::midpoint(self.first_token_s, other.first_token_s),
        }
    }
}

/// A node and its memory.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct NodeResult {
    /// Its name.
    pub name: String,
    /// How many layers it has.
    pub layers: u32,
    /// Bytes that the plan gives its process.
    pub predicted_bytes: Option<u64>,
    /// Bytes that it has.
    pub resident_bytes: u64,
}

/// A cluster that was measured.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Measurement {
    /// Its nodes that have layers, in ring order, the coordinator last.
    pub nodes: Vec<NodeResult>,
    /// What the coordinator expected; `None` if it did not say.
    pub predicted: Option<Speeds>,
    /// What came.
    pub measured: Speeds,
}

impl Measurement {
    /// Layers of each stage.
    pub fn split(&self) -> Vec<u32> {
        self.nodes.iter().map(|node| node.layers).collect()
    }
}

/// Measures a cluster that rests; again if it was placed anew meanwhile.
pub fn measure(running: &Running, prompts: &mut Prompts, effort: Effort) -> Outcome<Measurement> {
    let endpoint = &running.endpoint;
    warm_up(endpoint, prompts)?;
    for _ in 0..TRIES {
        let before = endpoint.status()?;
        let predicted = predicted(&before["prediction"]);
        let n_prompt = before["prediction"]["prompt_tokens"].as_u64().map_or(PROMPT, |n| n as u32);
        let measured = speeds(endpoint, prompts, n_prompt, effort)?;
        let after = endpoint.status()?;
        if before["epoch"] == after["epoch"] {
            return Ok(Measurement { nodes: node_results(&after), predicted, measured });
        }
    }
    Err(Failure::said(format!("the cluster was placed anew {TRIES} times while it was measured")))
}

fn warm_up(endpoint: &Endpoint, prompts: &mut Prompts) -> Outcome {
    first_token_alone(endpoint, &prompts.fresh(WARM_UP.0))?;
    let mut load = Load::new(endpoint);
    load.ask(&prompts.fresh(WARM_UP.0), WARM_UP.1)?;
    load.wait("it was warm", |tracks| tracks[0].tokens.len() >= WARM_UP.1 as usize)?;
    load.hang_up().map(drop)
}

fn speeds(endpoint: &Endpoint, prompts: &mut Prompts, n_prompt: u32, effort: Effort) -> Outcome<Speeds> {
    let (mut alone, mut first) = (Vec::new(), Vec::new());
    let mut last = Vec::new();
    for _ in 0..effort.prompts.max(1) {
        last = prompts.fresh(n_prompt);
        let steady = steady(endpoint, std::slice::from_ref(&last), 1, effort.alone)?;
        alone.push(steady.tokens_per_second);
        first.push(steady.first_token_ms / 1000.0);
    }
    // The cluster has computed that prompt already, so all streams begin soon; they differ in their last tokens.
    let n_shared = last.len().saturating_sub(OWN_TOKENS);
    let stream = |_| last[..n_shared].iter().copied().chain(prompts.fresh(OWN_TOKENS as u32)).collect();
    let streams: Vec<Vec<Token>> = (0..STREAMS).map(stream).collect();
    let together = steady(endpoint, &streams, SETTLE, effort.together)?.tokens_per_second;
    Ok(Speeds { alone: median(alone), together, first_token_s: median(first) })
}

/// What streams with these prompts do at once, for `n_gaps` of each behind the first `settle`.
fn steady(endpoint: &Endpoint, prompts: &[Vec<Token>], settle: usize, n_gaps: u32) -> Outcome<Steady> {
    let mut load = Load::new(endpoint);
    let n_gaps = n_gaps as usize;
    // Streams begin one after the other and need not advance evenly.
    let most = 2 * (settle + n_gaps) + 64;
    for prompt in prompts {
        load.ask(prompt, most as u32)?;
    }
    load.wait("all had begun", |tracks| all_began(tracks).is_some())?;
    let began = all_began(load.tracks()).ok_or_else(|| Failure::said("nothing was asked"))?;
    let start = load.wait("they had settled", |tracks| all_made(tracks, settle, began))?;
    let end = load.wait("the measurement was done", |tracks| all_made(tracks, n_gaps, start))?;
    if load.tracks().iter().any(|track| track.tokens.len() >= most) {
        return Err(Failure::said(format!("a stream ended after {most} tokens, before the slowest was measured")));
    }
    let tracks = load.hang_up()?;
    Ok(Steady::of(&tracks, start, end))
}

/// Reads a prediction from a status.
fn predicted(prediction: &Value) -> Option<Speeds> {
    let number = |key: &str| prediction[key].as_f64().filter(|x| x.is_finite() && *x > 0.0);
    Some(Speeds {
        alone: number("tokens_per_s")?,
        together: number("streams_tokens_per_s")?,
        first_token_s: number("first_token_s")?,
    })
}

fn node_results(status: &Value) -> Vec<NodeResult> {
    let result = |node: &Value| {
        let layers = &node["layers"];
        let (start, end) =
            (layers[0].as_u64().or(layers["start"].as_u64()), layers[1].as_u64().or(layers["end"].as_u64()));
        Some(NodeResult {
            name: node["name"].as_str()?.to_owned(),
            layers: end?.checked_sub(start?)? as u32,
            predicted_bytes: node["memory_predicted"].as_u64().filter(|n| *n > 0),
            resident_bytes: node["memory_resident"].as_u64()?,
        })
    };
    nodes(status).iter().filter_map(result).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_prediction_is_whole_or_none() {
        let mut prediction =
            json!({"tokens_per_s": 10.0, "streams_tokens_per_s": 40, "first_token_s": 1.5, "prompt_tokens": 512});
        let speeds = predicted(&prediction).unwrap();
        assert_eq!(speeds, Speeds { alone: 10.0, together: 40.0, first_token_s: 1.5 });
        assert!((speeds.cost_s() - 0.3).abs() < 1e-12);
        prediction["first_token_s"] = 0.into();
        assert_eq!(predicted(&prediction), None);
        assert_eq!(predicted(&Value::Null), None);
    }

    #[test]
    fn nodes_without_layers_are_left_out() {
        let status = json!({"nodes": [
            {"name": "w", "layers": [0, 5], "memory_resident": 7, "memory_predicted": 9},
            {"name": "idle", "layers": null, "memory_resident": 3},
            {"name": "c", "layers": {"start": 5, "end": 16}, "memory_resident": 8},
        ]});
        let results = node_results(&status);
        let told: Vec<_> = results.iter().map(|n| (n.name.as_str(), n.layers, n.predicted_bytes)).collect();
        assert_eq!(told, [("w", 5, Some(9)), ("c", 11, None)]);
    }
}
