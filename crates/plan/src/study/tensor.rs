//! Tensor groups: every layer is split over n nodes, and all of them work on each row at once.
//!
//! A rank holds 1/n of the heads and of the feed-forward width, and computes 1/n of each layer. Twice in a layer,
//! behind attention and behind feed-forward, the ranks' partial sums are added up (Shoeybi et al. 2019,
//! "Megatron-LM", §3). One such reduction of `B` bytes over links of latency `l` and bandwidth `w` takes the lesser of
//!
//! - `l + (n - 1)·B/w`: each rank sends its sum to all others at once; best for few rows.
//! - `2(n - 1)·(l + B/(n·w))`: a ring, first adding and then handing around (Patarasuk and Yuan 2009); best for many.
//!
//! With a layer's time `c(rows)` on the slowest rank a pass of `rows` takes
//!
//! ```text
//! pass_s + n_layers·(c(rows)/n + 2·reduce(rows)) + head(rows)
//! ```
//!
//! That is the most that could be gained: small matrices keep a processor less busy than large ones. All links are
//! taken to be as slow as the slowest in the group, and wire and computing not to overlap: a layer needs its sums.

use brigade_base::LayerRange;

use super::{Alternative, AlternativeKind, Forecast, Question};
use crate::memory::{stage_memory, usable};
use crate::predict::{Line, prompt_tokens};
use crate::words::{listed, percent};
use crate::{LinkProfile, NodeProfile, Speed};

/// Most nodes of a group: beyond it the reductions outweigh everything on any network of a home.
const MAX_RANKS: usize = 8;

/// Reductions of a layer.
const REDUCTIONS: f64 = 2.0;

/// A group of nodes that share every layer.
struct Group<'a> {
    question: &'a Question<'a>,
    /// The first coordinates.
    ranks: Vec<(&'a NodeProfile, &'a Speed)>,
    /// As slow as the slowest between any two.
    link: LinkProfile,
}

/// The best group, or `None` if none can be made.
pub(super) fn alternative(question: &Question<'_>) -> Option<Alternative> {
    let known = question.nodes.iter().filter_map(|node| Some((node, node.speed.as_ref()?)));
    let mut nodes: Vec<_> = known.collect();
    // The fastest first, but before all whoever must coordinate.
    let is_tail =
        |node: &NodeProfile| question.coordinator == super::Coordinator::Last && question.may_coordinate(node);
    nodes.sort_by(|a, b| {
        let key = |(node, speed): &(&NodeProfile, &Speed)| (!is_tail(node), speed.decode.at(1.0));
        key(a).partial_cmp(&key(b)).unwrap_or(std::cmp::Ordering::Equal)
    });
    let most = nodes.len().min(MAX_RANKS);
    let n_heads = question.model.n_heads as usize;
    let groups = (2..=most).filter(|n| n_heads.is_multiple_of(*n)).map(|n| Group::new(question, nodes[..n].to_vec()));
    let fitting = groups.filter(Group::fits).map(|group| (group.forecast(), group));
    let (forecast, group) = fitting.max_by(|a, b| a.0.tokens_per_s.total_cmp(&b.0.tokens_per_s))?;
    let names: Vec<&str> = group.ranks.iter().map(|(node, _)| node.name.as_str()).collect();
    Some(Alternative {
        kind: AlternativeKind::TensorGroup,
        name: format!("every layer split over {}", listed(&names)),
        stages: Vec::new(),
        members: Vec::new(),
        forecast: Some(forecast),
        is_possible: false,
        why_not: format!(
            "{} of each token would go into {} sums over the network",
            percent(group.reducing_s(1.0) / group.pass_s(1.0)),
            REDUCTIONS * f64::from(question.model.n_layers())
        ),
    })
}

impl<'a> Group<'a> {
    fn new(question: &'a Question<'a>, ranks: Vec<(&'a NodeProfile, &'a Speed)>) -> Self {
        let mut link = LinkProfile { latency_s: 0.0, bytes_per_s: f64::INFINITY };
        for (i, (from, _)) in ranks.iter().enumerate() {
            for (to, _) in &ranks[i + 1..] {
                for direction in [question.links.get(from.id, to.id), question.links.get(to.id, from.id)] {
                    link.latency_s = link.latency_s.max(direction.latency_s);
                    link.bytes_per_s = link.bytes_per_s.min(direction.bytes_per_s);
                }
            }
        }
        Self { question, ranks, link }
    }

    fn n(&self) -> f64 {
        self.ranks.len() as f64
    }

    /// Whether each rank can hold its part of every layer.
    fn fits(&self) -> bool {
        let Question { model, demand, .. } = *self.question;
        let Ok(all) = LayerRange::new(0, model.n_layers()) else { return false };
        self.ranks.iter().enumerate().all(|(rank, (node, _))| {
            let whole = stage_memory(model, demand, all, rank == 0);
            let head = if rank == 0 { model.head_bytes } else { 0 };
            let layers = (whole.weights.0.saturating_sub(head) + whole.kv.0) / self.ranks.len() as u64;
            layers.saturating_add(head).saturating_add(whole.fixed()) <= usable(node.memory).0
        })
    }

    /// Seconds of one reduction of `rows`.
    fn reduce_s(&self, rows: f64) -> f64 {
        let (n, bytes, link) = (self.n(), rows * self.question.model.row_bytes(), self.link);
        let to_all = link.latency_s + (n - 1.0) * bytes / link.bytes_per_s;
        let ring = 2.0 * (n - 1.0) * (link.latency_s + bytes / (n * link.bytes_per_s));
        to_all.min(ring)
    }

    /// Seconds of all reductions of a pass.
    fn reducing_s(&self, rows: f64) -> f64 {
        REDUCTIONS * f64::from(self.question.model.n_layers()) * self.reduce_s(rows)
    }

    /// Seconds of all layers on the slowest rank, and of what a pass takes beside them.
    fn computing_s(&self, line: impl Fn(&Speed) -> Line) -> f64 {
        let work = f64::from(self.question.model.n_layers()) / self.n();
        self.ranks.iter().map(|(_, speed)| line(speed).at(work)).fold(0.0, f64::max)
    }

    fn head_s(&self, rows: f64) -> f64 {
        self.ranks.first().map_or(0.0, |(_, speed)| speed.head_s(self.question.model, rows))
    }

    /// Seconds of a pass of `rows` decode rows.
    fn pass_s(&self, rows: f64) -> f64 {
        let layers = self.computing_s(|speed| Line::of_decode(self.question.demand, speed, rows));
        layers + self.reducing_s(rows) + self.head_s(rows)
    }

    /// Seconds until the first token: one chunk after the other, since all ranks work on each.
    fn first_token_s(&self) -> f64 {
        let demand = self.question.demand;
        let prompt = prompt_tokens(demand);
        let chunk = demand.max_rows.saturating_sub(demand.parallel).max(2);
        let starts = (0..prompt).step_by(chunk as usize);
        let chunks = starts.map(|start| {
            let rows = f64::from(chunk.min(prompt - start));
            self.computing_s(|speed| Line::of_chunk(speed, rows, start.into())) + self.reducing_s(rows)
        });
        chunks.sum::<f64>() + self.head_s(1.0)
    }

    fn forecast(&self) -> Forecast {
        let streams = self.question.demand.parallel.max(1);
        Forecast {
            tokens_per_s: 1.0 / self.pass_s(1.0),
            streams,
            streams_tokens_per_s: f64::from(streams) / self.pass_s(streams.into()),
            first_token_s: self.first_token_s(),
        }
    }
}
