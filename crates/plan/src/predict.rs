//! How fast a ring would be: what a stage takes, what a hop takes, and what follows for one stream, for many, and for
//! the first token.
//!
//! - One stream: its row goes around; all stages and hops one after the other.
//! - Many streams: they are dealt over passes, of which no more are on their way at once than there are stages. In one
//!   round each gets a token; that takes as long as the passes need for the whole ring, those at once counted once, or
//!   as the busiest stage (or link) needs for all of them.
//! - The first token: a prompt's chunks follow each other through the stages as through a flow shop.
//!
//! The same rules by which `protocol::schedule` deals sessions over passes and cuts prompts into chunks.

use brigade_base::LayerRange;
use serde::{Deserialize, Serialize};

use crate::profile::{Demand, LinkProfile, Links, ModelProfile, NodeProfile, Optimize, Speed};

/// Tokens of the prompt that predictions are about, where the context holds them.
pub const PROMPT_TOKENS: u32 = 512;

/// Tokens of the answer that predictions are about.
pub const ANSWER_TOKENS: u32 = 256;

/// Bytes of a frame beside its rows: header, one row set, TLS and TCP.
const FRAME_BYTES: f64 = 160.0;

/// Rows whose computing takes as long as reading the weights once, where nothing was measured; as the schedule has it.
const ROWS_PER_READ: f64 = 16.0;

/// Most passes for each stage; as the schedule has it.
pub(crate) const MOST_PASSES_PER_STAGE: u32 = 4;

/// How much better another number of passes must be than one for each stage; as the schedule has it.
const CLEARLY_BETTER: f64 = 0.95;

/// A stage of a ring to predict: workers in ring order, the coordinator last.
#[derive(Debug, Clone, Copy)]
pub struct RingStage<'a> {
    /// Who holds it.
    pub node: &'a NodeProfile,
    /// How fast that node is.
    pub speed: &'a Speed,
    /// Its layers.
    pub layers: LayerRange,
}

/// What a plan is expected to do.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Prediction {
    /// Tokens in a second of a lone stream, behind a prompt of `prompt_tokens`.
    pub tokens_per_s: f64,
    /// Sessions at once that `streams_tokens_per_s` is about.
    pub streams: u32,
    /// Tokens in a second of all of them together.
    pub streams_tokens_per_s: f64,
    /// Seconds until the first token behind a prompt of `prompt_tokens`.
    pub first_token_s: f64,
    /// Tokens of that prompt.
    pub prompt_tokens: u32,
    /// What each stage adds, in ring order.
    pub stages: Vec<StagePrediction>,
    /// What bounds a lone stream most.
    pub bound: Bound,
    /// What bounds all streams together.
    pub streams_bound: Bound,
}

/// What a stage adds to a token of a lone stream.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct StagePrediction {
    /// Seconds that it computes.
    pub compute_s: f64,
    /// Seconds of the hop behind it; 0 without workers.
    pub hop_s: f64,
    /// Its share of the token's time, the hop behind it included.
    pub share: f64,
    /// Share of time in which it computes while all sessions run.
    pub busy: f64,
}

/// What takes most of the time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Bound {
    /// A stage, by its place in the ring: it computes.
    Compute(usize),
    /// The hop behind a stage.
    Link(usize),
    /// All stages together: a pass is not back before the next could be sent.
    RoundTrip,
}

/// How sessions are dealt over passes, and how long each waits for its next token.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Round {
    /// Passes in which each session gets a token.
    pub passes: u32,
    /// Rows of the largest of them.
    pub rows: u32,
    /// Seconds of all of them.
    pub seconds: f64,
}

/// A ring with all that its times follow from.
#[derive(Debug, Clone)]
pub struct RingModel<'a> {
    model: &'a ModelProfile,
    stages: &'a [RingStage<'a>],
    /// The hop behind each stage; none for a ring of one.
    hops: Vec<LinkProfile>,
    work: Vec<f64>,
    demand: &'a Demand,
}

impl<'a> RingModel<'a> {
    /// A ring of these stages, workers in ring order and the coordinator last.
    pub fn new(model: &'a ModelProfile, stages: &'a [RingStage<'a>], links: &Links, demand: &'a Demand) -> Self {
        let id = |k: usize| stages[k % stages.len()].node.id;
        let hops = if stages.len() < 2 { 0 } else { stages.len() };
        let hops = (0..hops).map(|k| links.get(id(k), id(k + 1))).collect();
        let work = stages.iter().map(|stage| model.work(stage.layers)).collect();
        Self { model, stages, hops, work, demand }
    }

    /// Tokens of the prompt that predictions are about.
    pub fn prompt_tokens(&self) -> u32 {
        prompt_tokens(self.demand)
    }

    /// Seconds of stage `k` for a pass of `rows` decode rows.
    pub fn decode_s(&self, k: usize, rows: f64) -> f64 {
        Line::of_decode(self.demand, self.stages[k].speed, rows).at(self.work[k]) + self.head_s(k, rows)
    }

    /// Seconds of stage `k` for a chunk of `rows` with `before` tokens before it.
    fn chunk_s(&self, k: usize, rows: f64, before: f64, is_last: bool) -> f64 {
        let layers = Line::of_chunk(self.stages[k].speed, rows, before).at(self.work[k]);
        layers + if is_last { self.head_s(k, 1.0) } else { 0.0 }
    }

    fn head_s(&self, k: usize, rows: f64) -> f64 {
        if k + 1 == self.stages.len() { self.stages[k].speed.head_s(self.model, rows) } else { 0.0 }
    }

    /// Seconds of the hop behind stage `k` for `rows`; 0 in a ring of one.
    pub fn hop_s(&self, k: usize, rows: f64) -> f64 {
        self.hops.get(k).map_or(0.0, |link| link.seconds(frame_bytes(self.model, rows)))
    }

    /// Seconds for which the hop behind stage `k` is taken by `rows`.
    fn wire_s(&self, k: usize, rows: f64) -> f64 {
        self.hops.get(k).map_or(0.0, |link| frame_bytes(self.model, rows) / link.bytes_per_s.max(1.0))
    }

    fn places(&self) -> std::ops::Range<usize> {
        0..self.stages.len()
    }

    /// Seconds of a token of a lone stream.
    pub fn token_s(&self) -> f64 {
        self.around_s(1.0)
    }

    /// Seconds of a pass of `rows` decode rows for the whole ring.
    fn around_s(&self, rows: f64) -> f64 {
        self.places().map(|k| self.decode_s(k, rows) + self.hop_s(k, rows)).sum()
    }

    /// Seconds of the busiest stage for a pass of `rows` decode rows.
    pub fn busiest_s(&self, rows: f64) -> f64 {
        self.places().map(|k| self.decode_s(k, rows).max(self.wire_s(k, rows))).fold(0.0, f64::max)
    }

    /// The round in which each of `n` sessions gets a token. As the schedule has it, there is one pass for each stage,
    /// or another number if that is clearly better by what stages compute: links do not count for that choice.
    pub fn round(&self, n: u32) -> Round {
        let n_stages = self.stages.len() as u32;
        let n = n.max(1);
        let computing_s = |passes: u32| {
            let rows = f64::from(n.div_ceil(passes));
            let all_s: f64 = self.places().map(|k| self.decode_s(k, rows)).sum();
            all_s.max(f64::from(passes) * self.slowest_s(rows))
        };
        let usual = (n_stages.min(n), computing_s(n_stages.min(n)));
        let most = n.min(MOST_PASSES_PER_STAGE * n_stages);
        let tried = (1..=most).map(|passes| (passes, computing_s(passes)));
        let best = tried.min_by(|a, b| a.1.total_cmp(&b.1)).unwrap_or(usual);
        let (passes, _) = if best.1 < usual.1 * CLEARLY_BETTER { best } else { usual };
        let rows = n.div_ceil(passes);
        let busiest_s = self.busiest_s(rows.into());
        Round { passes, rows, seconds: round_s(passes, self.stages.len(), self.around_s(rows.into()), busiest_s) }
    }

    /// Rows of a chunk while nobody decodes.
    pub fn chunk_rows(&self) -> u32 {
        let (prompt, n_stages) = (f64::from(self.prompt_tokens()), self.stages.len());
        let most = self.demand.max_rows.saturating_sub(self.demand.parallel).max(2);
        if n_stages < 2 {
            return most;
        }
        let busiest = self.places().map(|k| (self.decode_s(k, 1.0), self.chunk_s(k, 64.0, 0.0, false) / 64.0));
        let busiest = busiest.max_by(|a, b| a.1.total_cmp(&b.1));
        let rows_per_read = busiest.map_or(ROWS_PER_READ, |(read, row)| read / row.max(f64::MIN_POSITIVE));
        let rows = (prompt * rows_per_read / (n_stages - 1) as f64).sqrt();
        let in_blocks = ((rows / 16.0).ceil() as u32).saturating_mul(16);
        in_blocks.clamp(32.min(most), most)
    }

    /// Seconds until the first token behind a prompt of [`RingModel::prompt_tokens`], alone in the ring.
    pub fn first_token_s(&self) -> f64 {
        let (prompt, chunk) = (self.prompt_tokens(), self.chunk_rows());
        let n_stages = self.stages.len();
        // When each stage, and the hop behind it, is free again; and when each of the last passes was back. The hop
        // into the first stage is the one behind the last.
        let (mut free, mut wire_free) = (vec![0.0f64; n_stages], vec![0.0f64; n_stages]);
        let mut back: Vec<f64> = Vec::new();
        let mut done = 0;
        while done < prompt {
            let rows = chunk.min(prompt - done);
            // One pass more than there are stages may be on its way.
            let mut at = back.len().checked_sub(n_stages + 1).map_or(0.0, |k| back[k]);
            for k in self.places() {
                let into = (k + n_stages - 1) % n_stages;
                let wire = self.wire_s(into, rows.into());
                wire_free[into] = at.max(wire_free[into]) + wire;
                at = wire_free[into] + self.hop_s(into, rows.into()) - wire;
                let is_last = done + rows == prompt;
                at = at.max(free[k]) + self.chunk_s(k, rows.into(), done.into(), is_last);
                free[k] = at;
            }
            back.push(at);
            done += rows;
        }
        back.last().copied().unwrap_or(0.0)
    }

    /// All of it, for [`Demand::parallel`] streams.
    pub fn predict(&self) -> Prediction {
        let token_s = self.token_s();
        let streams = self.demand.parallel.max(1);
        let round = self.round(streams);
        let (passes, rows, round_s) = (f64::from(round.passes), f64::from(round.rows), round.seconds);
        let stages: Vec<StagePrediction> = self
            .places()
            .map(|k| {
                let (compute_s, hop_s) = (self.decode_s(k, 1.0), self.hop_s(k, 1.0));
                let busy = (passes * self.decode_s(k, rows) / round_s).min(1.0);
                StagePrediction { compute_s, hop_s, share: (compute_s + hop_s) / token_s, busy }
            })
            .collect();
        let most =
            |value: &dyn Fn(usize) -> f64| self.places().max_by(|&a, &b| value(a).total_cmp(&value(b))).unwrap_or(0);
        let (slowest, farthest) = (most(&|k| stages[k].compute_s), most(&|k| stages[k].hop_s));
        let is_far = stages[farthest].hop_s > stages[slowest].compute_s;
        let bound = if is_far { Bound::Link(farthest) } else { Bound::Compute(slowest) };
        let busiest = most(&|k| self.decode_s(k, rows).max(self.wire_s(k, rows)));
        let streams_bound = if passes * self.busiest_s(rows) < round_s * CLEARLY_BETTER {
            Bound::RoundTrip
        } else if self.wire_s(busiest, rows) > self.decode_s(busiest, rows) {
            Bound::Link(busiest)
        } else {
            Bound::Compute(busiest)
        };
        Prediction {
            tokens_per_s: 1.0 / token_s,
            streams,
            streams_tokens_per_s: f64::from(streams) / round_s,
            first_token_s: self.first_token_s(),
            prompt_tokens: self.prompt_tokens(),
            stages,
            bound,
            streams_bound,
        }
    }

    /// Seconds until the first token, roughly: chunks of a length that depends on the number of stages alone, all as
    /// long as their mean. It is for comparing: being a sum over the stages and their maximum, it can be minimised.
    /// What a link takes for further chunks is left out: it would be a maximum over hops, and hops are chosen by their
    /// sum.
    fn flow_s(&self) -> f64 {
        let (n_chunks, rows) = flow_chunks(self.prompt_tokens(), self.stages.len(), self.demand);
        let before = f64::from(self.prompt_tokens()) / 2.0;
        let chunk_s = |k| self.chunk_s(k, rows, before, false);
        let first: f64 = self.places().map(|k| chunk_s(k) + self.hop_s(k, rows)).sum();
        first + (n_chunks - 1.0) * self.places().map(chunk_s).fold(0.0, f64::max)
    }

    /// What [`Demand::optimize`] makes least, in seconds. The placement is optimal in this, not in the finer
    /// [`RingModel::predict`]; in no objective does a link that is slower than the slowest stage hold up a round. With
    /// [`Optimize::Memory`] it is that of [`Optimize::Balanced`], to compare with.
    ///
    /// - Latency: a lone stream's token, and a token's share of the time until the first.
    /// - Throughput: a round of all sessions, over the best number of passes.
    /// - Balanced: a lone stream's token, and the busiest stage's time for a round with no fewer passes than there are
    ///   stages, so that a round is not shorter than the way around but for its hops. With a single session it is
    ///   latency: nobody else could use a stage that is free.
    pub fn cost_s(&self) -> f64 {
        let n = self.demand.parallel.max(1);
        let n_stages = self.stages.len() as u32;
        let most = n.min(MOST_PASSES_PER_STAGE * n_stages);
        let least = |fewest: u32, round_s: &dyn Fn(f64, f64) -> f64| {
            let of = |passes: u32| round_s(passes.into(), f64::from(n.div_ceil(passes)));
            (fewest..=most).map(of).fold(f64::INFINITY, f64::min)
        };
        match objective(self.demand) {
            Optimize::Latency => self.token_s() + self.flow_s() / f64::from(ANSWER_TOKENS),
            Optimize::Throughput => least(1, &|passes, rows| {
                round_s(passes as u32, self.stages.len(), self.around_s(rows), self.slowest_s(rows))
            }),
            Optimize::Balanced | Optimize::Memory => {
                self.token_s() + least(n.min(n_stages), &|passes, rows| passes * self.slowest_s(rows))
            }
        }
    }

    /// Seconds of the slowest stage for a pass of `rows` decode rows, links left out.
    fn slowest_s(&self, rows: f64) -> f64 {
        self.places().map(|k| self.decode_s(k, rows)).fold(0.0, f64::max)
    }
}

/// What is minimised, see [`RingModel::cost_s`].
pub(crate) fn objective(demand: &Demand) -> Optimize {
    match demand.optimize {
        Optimize::Balanced | Optimize::Memory if demand.parallel < 2 => Optimize::Latency,
        Optimize::Memory => Optimize::Balanced,
        other => other,
    }
}

/// Seconds of so many passes of which each takes `around_s` for a ring of `n_stages` and `busiest_s` for its busiest
/// stage. No more than one for each stage are on their way at once.
fn round_s(passes: u32, n_stages: usize, around_s: f64, busiest_s: f64) -> f64 {
    (around_s * turns(passes.into(), n_stages)).max(f64::from(passes) * busiest_s)
}

/// How often so many passes go around a ring one after the other, if one for each stage can be on its way at once.
pub(crate) fn turns(passes: f64, n_stages: usize) -> f64 {
    (passes / n_stages as f64).max(1.0)
}

/// Seconds of a stage by its work (see [`ModelProfile::work`]), head left out.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Line {
    /// Seconds without any layer.
    pub fixed_s: f64,
    /// Seconds for each mean layer.
    pub slope_s: f64,
}

impl Line {
    /// A pass of `rows` decode rows with as many tokens before them as predictions are about: the prompt, and half of
    /// the answer.
    pub fn of_decode(demand: &Demand, speed: &Speed, rows: f64) -> Self {
        let depth = f64::from((prompt_tokens(demand) + ANSWER_TOKENS / 2).min(demand.context));
        Self { fixed_s: speed.pass_s, slope_s: speed.decode.at(rows) + rows * depth * speed.decode_context_s }
    }

    /// A chunk of `rows` with `before` tokens before it. What a row of it sees of the chunk itself is in the curve.
    pub fn of_chunk(speed: &Speed, rows: f64, before: f64) -> Self {
        Self { fixed_s: speed.pass_s, slope_s: speed.chunk.at(rows) + rows * before * speed.chunk_context_s }
    }

    /// Seconds for so much work.
    pub fn at(&self, work: f64) -> f64 {
        self.fixed_s + self.slope_s * work
    }
}

/// Tokens of the prompt that predictions are about.
pub(crate) fn prompt_tokens(demand: &Demand) -> u32 {
    PROMPT_TOKENS.min(demand.context / 2).max(1)
}

/// Bytes of a frame of `rows`.
pub(crate) fn frame_bytes(model: &ModelProfile, rows: f64) -> f64 {
    FRAME_BYTES + rows * model.row_bytes()
}

/// Number of chunks of a prompt and rows of each, by the number of stages alone; see [`RingModel::flow_s`].
pub(crate) fn flow_chunks(prompt: u32, n_stages: usize, demand: &Demand) -> (f64, f64) {
    let most = f64::from(demand.max_rows.saturating_sub(demand.parallel).max(2));
    let prompt = f64::from(prompt);
    let rows = if n_stages < 2 { most } else { (prompt * ROWS_PER_READ / (n_stages - 1) as f64).sqrt().max(32.0) };
    let rows = rows.min(most).min(prompt);
    ((prompt / rows).max(1.0), rows)
}

#[cfg(test)]
mod tests;
