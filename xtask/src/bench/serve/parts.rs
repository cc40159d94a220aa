//! What is measured of a cluster: decoding, long prompts, both at once, hops, idle sessions.
//!
//! Each function has the cluster to itself and leaves it idle. Prompts are fresh ones, so that no prefix of them can be
//! in a cache.

use std::time::{Duration, Instant};

use serde_json::Value;

use super::load::{Load, Steady, Track, all_began, all_made, first_token_alone};
use super::metrics::Busy;
use super::rounds::{DecodePoint, Hop, Memory, Mixed, MixedStream};
use super::{LONG_PROMPT, MIXED_PROMPT, MIXED_STREAMS, PROMPT_SAMPLES, Prompts};
use crate::bench::median;
use crate::cluster::{Cluster, nodes};
use crate::failure::{Failure, Outcome};
use crate::http::Endpoint;
use crate::processes::Processes;

/// Gaps of each stream that are still watched once the long prompt among them has been answered.
const GAPS_AFTER: usize = 8;

/// Tokens of the lone stream that hops are measured on: three of its passes lie beyond the 99th percentile.
const HOP_TOKENS: u32 = 300;

/// Tokens of its prompt.
const HOP_PROMPT: u32 = 16;

/// Context that [`hop`] needs.
pub const HOP_CONTEXT: u32 = HOP_PROMPT + HOP_TOKENS + 2;

/// Sessions that are opened and left idle.
const IDLE_SESSIONS: u32 = 48;

/// Sessions before them, two at once, after which buffers have the size that they keep.
const WARM_SESSIONS: u32 = 16;

/// Sessions that [`memory`] needs room for.
pub const MEMORY_SESSIONS: u32 = IDLE_SESSIONS + WARM_SESSIONS;

/// Tokens of an idle session's prompt.
const IDLE_PROMPT: u32 = 32;

/// Tokens of its answer.
const IDLE_ANSWER: u32 = 4;

/// Context that [`memory`] needs.
pub const MEMORY_CONTEXT: u32 = IDLE_PROMPT + IDLE_ANSWER + 2;

/// How long memory may take to settle after the last answer: some heartbeats.
const SETTLE: Duration = Duration::from_millis(500);

/// `n` streams at once, each for `n_tokens` gaps between tokens while all of them decode.
pub fn decode(endpoint: &Endpoint, prompts: &mut Prompts, n: u32, shape: DecodeShape) -> Outcome<DecodePoint> {
    let mut load = Load::new(endpoint);
    for _ in 0..n {
        load.ask(&prompts.fresh(shape.prompt), shape.most)?;
    }
    let start = began(&mut load)?;
    let busy = Busy::scrape(endpoint);
    let end = load.wait("the measurement was done", |tracks| all_made(tracks, shape.tokens as usize, start))?;
    still_run(load.tracks(), shape)?;
    let busy = busy.zip(Busy::scrape(endpoint));
    let mut point = DecodePoint::new(n, &Steady::of(load.tracks(), start, end));
    point.stage_busy = busy.map(|(before, after)| before.shares_until(&after)).unwrap_or_default();
    load.hang_up()?;
    Ok(point)
}

/// What each stream of [`decode`] does.
#[derive(Debug, Clone, Copy)]
pub struct DecodeShape {
    /// Tokens of its prompt.
    pub prompt: u32,
    /// Gaps between tokens that are measured.
    pub tokens: u32,
    /// Tokens after which it would end by itself: more than are measured, for those that begin early.
    pub most: u32,
}

/// Waits until all streams decode, and returns the moment from which on they do.
fn began(load: &mut Load) -> Outcome<Instant> {
    load.wait("all had begun", |tracks| all_began(tracks).is_some())?;
    all_began(load.tracks()).ok_or_else(|| Failure::said("nothing was asked"))
}

/// Checks that no stream has ended by itself: the others would have been measured with fewer beside them.
fn still_run(tracks: &[Track], shape: DecodeShape) -> Outcome {
    if tracks.iter().all(|track| track.tokens.len() < shape.most as usize) {
        return Ok(());
    }
    Err(Failure::said(format!("a stream ended after {} tokens, before the slowest was measured", shape.most)))
}

/// Milliseconds until the first token of long prompts that come alone.
pub fn prompt(endpoint: &Endpoint, prompts: &mut Prompts) -> Outcome<Vec<f64>> {
    (0..PROMPT_SAMPLES).map(|_| first_token_alone(endpoint, &prompts.fresh(LONG_PROMPT))).collect()
}

/// A long prompt among streams that decode.
pub fn mixed(endpoint: &Endpoint, prompts: &mut Prompts, shape: DecodeShape) -> Outcome<Mixed> {
    let alone_first_token_ms = first_token_alone(endpoint, &prompts.fresh(MIXED_PROMPT))?;
    let n = MIXED_STREAMS as usize;
    let mut load = Load::new(endpoint);
    for _ in 0..n {
        load.ask(&prompts.fresh(shape.prompt), shape.most)?;
    }
    let start = began(&mut load)?;
    let prompt = prompts.fresh(MIXED_PROMPT);
    let quiet_end = load.wait("the prompt came", |tracks| all_made(tracks, shape.tokens as usize, start))?;
    load.ask(&prompt, 2)?;
    let answered = load.wait("the prompt was answered", |tracks| !tracks[n].tokens.is_empty())?;
    let end = load.wait("the streams went on", |tracks| all_made(&tracks[..n], GAPS_AFTER, answered))?;
    still_run(&load.tracks()[..n], shape)?;
    let tracks = load.hang_up()?;
    let stream = |track: &Track| {
        let (quiet, all) = (track.gaps_ms(start, quiet_end), track.gaps_ms(start, end));
        MixedStream {
            quiet_gap_ms_p50: median(quiet),
            gap_ms_max: all.iter().copied().fold(0.0, f64::max),
            gap_ms_p50: median(all),
        }
    };
    Ok(Mixed {
        alone_first_token_ms,
        first_token_ms: tracks[n].first_token_ms().unwrap_or_default(),
        streams: tracks[..n].iter().map(stream).collect(),
    })
}

/// What a hop of a lone stream takes, as the coordinator tells of the last 512 passes that were alone in the ring; so
/// it is measured in a new cluster.
pub fn hop(cluster: &Cluster, prompts: &mut Prompts) -> Outcome<Hop> {
    let mut load = Load::new(&cluster.endpoint);
    load.ask(&prompts.fresh(HOP_PROMPT), HOP_TOKENS)?;
    load.wait("the hops were measured", |tracks| tracks[0].tokens.len() >= HOP_TOKENS as usize)?;
    load.hang_up()?;
    Ok(hop_of(&cluster.measured_status()?))
}

/// Reads it from a status.
fn hop_of(status: &Value) -> Hop {
    let number = |key: &str| status[key].as_f64().unwrap_or(0.0);
    let parts = status["hop_us"].as_object();
    let part = |(name, us): (&String, &Value)| Some((name.clone(), us.as_f64()?));
    let largest = |key: &str| nodes(status).iter().filter_map(|node| node[key].as_u64()).max().unwrap_or(0);
    Hop {
        frame_bytes: largest("bytes_per_token"),
        us_p50: number("hop_us_p50"),
        us_p99: number("hop_us_p99"),
        parts_us: parts.into_iter().flatten().filter_map(part).collect(),
    }
}

/// By how much memory grows with sessions that have been answered and are kept.
///
/// The caches of keys and values are written once when a stage is loaded, so they are resident before; what grows is
/// all else. `None` where the system does not tell.
pub fn memory(processes: &Processes, endpoint: &Endpoint, prompts: &mut Prompts) -> Outcome<Option<Memory>> {
    let mut open = |n_at_once: u32| -> Outcome {
        let mut load = Load::new(endpoint);
        for _ in 0..n_at_once {
            load.ask(&prompts.fresh(IDLE_PROMPT), IDLE_ANSWER)?;
        }
        began(&mut load)?;
        load.wait("all had ended", |tracks| tracks.iter().all(|track| track.tokens.len() >= IDLE_ANSWER as usize))?;
        load.hang_up().map(drop)
    };
    let resident = || {
        std::thread::sleep(SETTLE);
        processes.anonymous_bytes()
    };
    for _ in 0..WARM_SESSIONS / 2 {
        open(2)?;
    }
    let Some(before) = resident() else { return Ok(None) };
    for _ in 0..IDLE_SESSIONS {
        open(1)?;
    }
    let Some(after) = resident() else { return Ok(None) };
    Ok(Some(Memory { sessions: IDLE_SESSIONS, growth_bytes: after as i64 - before as i64 }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn hops_are_read_with_and_without_their_parts() {
        let mut status = json!({"hop_us_p50": 90.5, "hop_us_p99": 400, "nodes": [{"bytes_per_token": 8246}, {}]});
        let hop = hop_of(&status);
        assert_eq!((hop.us_p50, hop.us_p99, hop.frame_bytes, hop.parts_us.len()), (90.5, 400.0, 8246, 0));
        status["hop_us"] = json!({"read": 10.0, "wire": 30, "odd": null});
        assert_eq!(hop_of(&status).parts_us, [("read".to_owned(), 10.0), ("wire".to_owned(), 30.0)]);
    }
}
