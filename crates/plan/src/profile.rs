//! What goes into a plan: the model, the nodes, the links between them, and what is asked for.
//!
//! A [`Speed`] belongs to one node and one model: it says how long the node computes for the model's mean layer, by the
//! number of rows. Whoever makes it measures real layers, or works it out from what is known of the device; here it is
//! taken as true. Seconds and bytes everywhere.

use std::collections::HashMap;

use brigade_base::{ByteSize, LayerRange, NodeId};
use serde::{Deserialize, Serialize};

use crate::memory::{Rehearsed, own};

/// What a model costs, layer by layer.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ModelProfile {
    /// Bytes of the weights of each layer; its length is the number of layers.
    pub layer_bytes: Vec<u64>,
    /// Bytes of KV cache per token of each layer; as long as `layer_bytes`.
    pub kv_bytes_per_token: Vec<u64>,
    /// Of those, the bytes of values; as long as `layer_bytes`, or empty for a model whose layers are all as wide.
    pub value_bytes_per_token: Vec<u64>,
    /// Bytes of the state that each session has in each layer, however long it is; as long as `layer_bytes`, or empty
    /// for a model without such layers.
    pub state_bytes: Vec<u64>,
    /// Whether attention is computed without its scores, since values are stored in blocks.
    pub is_flash: bool,
    /// Why it cannot be cut, where it cannot.
    pub why_whole: Option<&'static str>,
    /// What the buffers of its graphs take, where that was found out.
    pub rehearsed: Option<Rehearsed>,
    /// Bytes of the final norm and the head, which are with the last layer.
    pub head_bytes: u64,
    /// Bytes that the coordinator holds of the token embedding, beside the head.
    pub embedding_bytes: u64,
    /// Layers before which the model may be cut, ascending, without 0 and the number of layers.
    pub cut_points: Vec<u32>,
    /// Width of the hidden state.
    pub n_embd: u32,
    /// Attention heads of the layer with the most.
    pub n_heads: u32,
    /// Width of the widest feed-forward activation.
    pub n_ff: u32,
    /// Size of the vocabulary.
    pub n_vocab: u32,
    /// Experts of a layer; 0 in a dense model.
    pub n_experts: u32,
    /// Experts that a row goes through.
    pub n_experts_used: u32,
    /// Of the bytes of all layers, those that belong to experts.
    pub expert_bytes: u64,
    /// Weights of all layers and the head, as a count.
    pub n_weights: u64,
}

impl ModelProfile {
    /// What to say of a model that cannot be cut.
    pub fn stays_whole(&self) -> Option<String> {
        self.why_whole.map(|why| format!("This model must stay whole on one node, since {why}."))
    }

    /// Number of layers.
    pub fn n_layers(&self) -> u32 {
        self.layer_bytes.len() as u32
    }

    /// Bytes of KV cache per token of `layers` in one stage. Attention that is computed plainly has libllama store the
    /// values of each layer as wide as those of the widest layer of the stage, even of layers without heads for them;
    /// only beside layers with states are these left out.
    pub fn kv_bytes_per_token_of(&self, layers: LayerRange, is_plain: bool) -> u64 {
        let (all, values) = (own(&self.kv_bytes_per_token, layers), own(&self.value_bytes_per_token, layers));
        let widest = values.iter().copied().max().filter(|_| is_plain).unwrap_or(0);
        let has_states = self.state_bytes.iter().any(|bytes| *bytes > 0);
        let padding = all
            .iter()
            .zip(values)
            .filter(|(all, _)| **all > 0 || !has_states)
            .map(|(_, value)| widest.saturating_sub(*value));
        all.iter().copied().chain(padding).fold(0, u64::saturating_add)
    }

    /// What computing `layers` takes, as a multiple of the mean layer: their share of the bytes.
    pub fn work(&self, layers: LayerRange) -> f64 {
        let sum = |bytes: &[u64]| bytes.iter().map(|&b| b as f64).sum::<f64>();
        let all = sum(&self.layer_bytes);
        let own = sum(self.layer_bytes.get(layers.start() as usize..layers.end() as usize).unwrap_or_default());
        if all > 0.0 { own / all * f64::from(self.n_layers()) } else { f64::from(layers.len()) }
    }

    /// Bytes of a mean layer that `rows` read: of the experts those that any of them goes through, each row taking its
    /// own at random.
    pub(crate) fn read_bytes(&self, rows: f64) -> f64 {
        let all = self.layer_bytes.iter().map(|&bytes| bytes as f64).sum::<f64>();
        let experts = if self.n_experts > 0 { (self.expert_bytes as f64).min(all) } else { 0.0 };
        let used = f64::from(self.n_experts_used) / f64::from(self.n_experts.max(1));
        let touched = 1.0 - (1.0 - used).max(0.0).powf(rows);
        (all - experts + experts * touched) / f64::from(self.n_layers().max(1))
    }

    /// Bytes of one row of hidden state on a link.
    pub fn row_bytes(&self) -> f64 {
        4.0 * f64::from(self.n_embd)
    }
}

/// Seconds by number of rows: points that were measured, lines between them. Ascending in rows, never empty, all
/// seconds from 0 to [`MAX_SECONDS`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "Vec<(u32, f64)>", into = "Vec<(u32, f64)>")]
pub struct Curve(Vec<(u32, f64)>);

/// Most points of a curve: one for every number of sessions would be no better.
pub const MAX_POINTS: usize = 32;

/// Longest time of a layer, a pass or a hop: an hour. Nobody waits for a token that long, and sums and products of such
/// times over all layers, rows and nodes are far from where numbers end.
pub const MAX_SECONDS: f64 = 3600.0;

/// Most bytes in a second of a link or a disk: a thousand times what memory beside the fastest processors moves.
pub const MAX_BYTES_PER_S: f64 = 1e15;

/// Longest that a layer takes for one token of context: a second; what is measured are microseconds.
pub const MAX_CONTEXT_S: f64 = 1.0;

/// A list of points is no curve.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("not a list of 1 to {MAX_POINTS} times of 0 to {MAX_SECONDS} s, ascending in rows")]
pub struct CurveError;

impl Curve {
    /// A curve through these points: rows and seconds.
    ///
    /// # Errors
    /// If there are none or too many, rows are not ascending from 1, or a time is not from 0 to [`MAX_SECONDS`].
    pub fn new(points: Vec<(u32, f64)>) -> Result<Self, CurveError> {
        let is_ascending = points.is_sorted_by(|a, b| a.0 < b.0);
        let is_sound = points.iter().all(|&(rows, s)| rows > 0 && (0.0..=MAX_SECONDS).contains(&s));
        let is_some = (1..=MAX_POINTS).contains(&points.len());
        if is_some && is_ascending && is_sound { Ok(Self(points)) } else { Err(CurveError) }
    }

    /// As long for one row as for any other number.
    pub(crate) fn constant(seconds: f64) -> Self {
        Self(vec![(1, seconds), (2, seconds)])
    }

    /// Seconds for `rows`: on the line between its neighbours. Below the first point it is that of the first; beyond
    /// the last, more rows cost as the last two points say, and in proportion if there is one.
    pub fn at(&self, rows: f64) -> f64 {
        let points = self.0.as_slice();
        let on_line =
            |(r0, s0): (u32, f64), (r1, s1): (u32, f64)| s0 + (s1 - s0) * (rows - f64::from(r0)) / f64::from(r1 - r0);
        let after = points.partition_point(|&(r, _)| f64::from(r) < rows);
        match (after, points) {
            (0, _) => points[0].1,
            (_, [(r, s)]) => s * rows / f64::from(*r),
            (n, _) if n == points.len() => on_line(points[n - 2], points[n - 1]).max(points[n - 1].1),
            (n, _) => on_line(points[n - 1], points[n]),
        }
    }

    /// The same, all times multiplied, up to [`MAX_SECONDS`].
    #[must_use]
    pub fn scaled(&self, factor: f64) -> Self {
        Self(self.0.iter().map(|&(rows, s)| (rows, at_most(s * factor, MAX_SECONDS))).collect())
    }

    /// The points: rows and seconds.
    pub fn points(&self) -> &[(u32, f64)] {
        &self.0
    }
}

/// From 0 to `most`; what is no number counts as the most.
pub(crate) fn at_most(value: f64, most: f64) -> f64 {
    value.min(most).max(0.0)
}

impl TryFrom<Vec<(u32, f64)>> for Curve {
    type Error = CurveError;

    fn try_from(points: Vec<(u32, f64)>) -> Result<Self, CurveError> {
        Self::new(points)
    }
}

impl From<Curve> for Vec<(u32, f64)> {
    fn from(curve: Curve) -> Self {
        curve.0
    }
}

/// How fast a node computes one model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Speed {
    /// Seconds of a mean layer for decode rows, each of another session, with few tokens before them.
    pub decode: Curve,
    /// Seconds of a mean layer for a chunk of one prompt with so many rows, with nothing before it.
    pub chunk: Curve,
    /// Seconds of the head with final norm, by rows that want logits; `None` if it was not measured here.
    pub head: Option<Curve>,
    /// Seconds that a pass takes a stage beside its layers: waking up, encoding, writing, choosing tokens.
    pub pass_s: f64,
    /// Seconds that each layer takes longer for each decode row and each token before it.
    pub decode_context_s: f64,
    /// The same for each row of a chunk.
    pub chunk_context_s: f64,
    /// Bytes of weights that it loads in a second.
    pub load_bytes_per_s: f64,
    /// Where the numbers come from.
    pub source: SpeedSource,
}

/// Where a [`Speed`] comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SpeedSource {
    /// Layers of the model were run on the node.
    Layers,
    /// Layers of the model's shapes with other weights were run on the node.
    Shapes,
    /// Worked out from what is known of the device.
    Device,
    /// Passes of a deployment were timed.
    Passes,
}

impl Speed {
    /// Whether all numbers are ones to calculate with; for what comes from another node.
    pub fn is_sound(&self) -> bool {
        let within = |value: f64, most: f64| (0.0..=most).contains(&value);
        within(self.pass_s, MAX_SECONDS)
            && within(self.decode_context_s, MAX_CONTEXT_S)
            && within(self.chunk_context_s, MAX_CONTEXT_S)
            && within(self.load_bytes_per_s, MAX_BYTES_PER_S)
    }

    /// The same with every number within what [`Speed::is_sound`] takes.
    #[must_use]
    pub(crate) fn bounded(self) -> Self {
        Self {
            pass_s: at_most(self.pass_s, MAX_SECONDS),
            decode_context_s: at_most(self.decode_context_s, MAX_CONTEXT_S),
            chunk_context_s: at_most(self.chunk_context_s, MAX_CONTEXT_S),
            load_bytes_per_s: at_most(self.load_bytes_per_s, MAX_BYTES_PER_S),
            ..self
        }
    }

    /// A node that is slower by `factor`.
    #[must_use]
    pub fn slowed(&self, factor: f64) -> Self {
        Self {
            decode: self.decode.scaled(factor),
            chunk: self.chunk.scaled(factor),
            head: self.head.as_ref().map(|head| head.scaled(factor)),
            pass_s: self.pass_s * factor,
            decode_context_s: self.decode_context_s * factor,
            chunk_context_s: self.chunk_context_s * factor,
            load_bytes_per_s: self.load_bytes_per_s,
            source: self.source,
        }
        .bounded()
    }

    /// Seconds of the head for `rows`. Where it was not measured, it is taken to be as fast as layers are: a head of
    /// as many bytes as `rows` read of a mean layer takes as long as one.
    pub fn head_s(&self, model: &ModelProfile, rows: f64) -> f64 {
        if let Some(head) = &self.head {
            return head.at(rows);
        }
        let read = model.read_bytes(rows);
        let share = if read > 0.0 { model.head_bytes as f64 / read } else { 0.0 };
        share * self.decode.at(rows)
    }
}

/// What a node offers.
#[derive(Debug, Clone, PartialEq)]
pub struct NodeProfile {
    /// The node.
    pub id: NodeId,
    /// Its name for people.
    pub name: String,
    /// Memory that it gives.
    pub memory: ByteSize,
    /// How fast it computes the model; `None` if nobody knows.
    pub speed: Option<Speed>,
}

/// What a link does in one direction.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct LinkProfile {
    /// Seconds from the first byte that is sent to the first that is received, software at both ends included.
    pub latency_s: f64,
    /// Bytes in a second.
    pub bytes_per_s: f64,
}

impl LinkProfile {
    /// A link of which nothing is known: gigabit Ethernet through one switch.
    pub const UNKNOWN: Self = Self { latency_s: 0.000_3, bytes_per_s: 117e6 };

    /// Seconds until the last of so many bytes is there.
    pub fn seconds(&self, bytes: f64) -> f64 {
        self.latency_s + bytes / self.bytes_per_s.max(1.0)
    }

    /// Whether all numbers are ones to calculate with; for what comes from another node.
    pub fn is_sound(&self) -> bool {
        (0.0..=MAX_SECONDS).contains(&self.latency_s) && (1.0..=MAX_BYTES_PER_S).contains(&self.bytes_per_s)
    }
}

/// The links between nodes, each direction by itself.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Links {
    known: HashMap<(NodeId, NodeId), LinkProfile>,
    /// What each node's own attachment does, for pairs that were not measured.
    ports: HashMap<NodeId, LinkProfile>,
}

impl Links {
    /// Notes what was measured from one node to another.
    pub fn set(&mut self, from: NodeId, to: NodeId, link: LinkProfile) {
        self.known.insert((from, to), link);
    }

    /// Notes a node's way to the switch that all are attached to: its part of the latency between two nodes, and the
    /// most that it sends or receives.
    pub fn set_port(&mut self, node: NodeId, port: LinkProfile) {
        self.ports.insert(node, port);
    }

    /// Forgets all that is known of a node's links.
    pub fn remove(&mut self, node: NodeId) {
        self.known.retain(|(from, to), _| *from != node && *to != node);
        self.ports.remove(&node);
    }

    /// The link from one node to another: as measured, else as measured in the other direction, else by both nodes'
    /// ports, else [`LinkProfile::UNKNOWN`].
    pub fn get(&self, from: NodeId, to: NodeId) -> LinkProfile {
        let measured = self.known.get(&(from, to)).or_else(|| self.known.get(&(to, from)));
        measured.copied().unwrap_or_else(|| match (self.ports.get(&from), self.ports.get(&to)) {
            (Some(one), Some(other)) => LinkProfile {
                latency_s: one.latency_s + other.latency_s,
                bytes_per_s: one.bytes_per_s.min(other.bytes_per_s),
            },
            (Some(port), None) | (None, Some(port)) => LinkProfile { latency_s: 2.0 * port.latency_s, ..*port },
            (None, None) => LinkProfile::UNKNOWN,
        })
    }
}

/// What a plan is to be best at.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Optimize {
    /// The time of one request that is alone: its first token and all others.
    Latency,
    /// Tokens of all sessions together.
    Throughput,
    /// Both: the time of a lone stream's token, and the time for which the busiest node works for a token of each
    /// session.
    #[default]
    Balanced,
    /// Nothing is measured: shares follow memory, on the fewest nodes.
    Memory,
}

/// What the deployment must be able to do.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Demand {
    /// Tokens of one session.
    pub context: u32,
    /// Sessions at once.
    pub parallel: u32,
    /// Most rows of one batch.
    pub max_rows: u32,
    /// Use every node, even where fewer would do.
    pub spread: bool,
    /// Pinned number of layers of each stage, in ring order: workers in the order given, the coordinator last.
    pub split: Option<Vec<u32>>,
    /// What the plan is to be best at.
    pub optimize: Optimize,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn curve(points: &[(u32, f64)]) -> Curve {
        Curve::new(points.to_vec()).unwrap()
    }

    #[test]
    fn a_curve_is_measured_points_and_lines() {
        let c = curve(&[(1, 1.0), (2, 2.0), (4, 2.5)]);
        assert_eq!([0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 8.0].map(|r| c.at(r)), [1.0, 1.0, 1.5, 2.0, 2.25, 2.5, 3.5]);
        assert_eq!(curve(&[(4, 2.0)]).at(8.0), 4.0);
        assert_eq!(curve(&[(1, 2.0), (2, 1.0)]).at(9.0), 1.0, "more rows never cost less than was measured");
        for points in [vec![], vec![(0, 1.0)], vec![(2, 1.0), (2, 1.0)], vec![(1, f64::NAN)], vec![(1, -1.0)]] {
            assert_eq!(Curve::new(points), Err(CurveError));
        }
    }

    #[test]
    fn numbers_beyond_what_can_be_are_refused_or_bounded() {
        assert_eq!(Curve::new(vec![(1, 1e-3), (2, 5e307)]), Err(CurveError));
        let sound = Speed {
            decode: curve(&[(1, 1.0)]),
            chunk: curve(&[(1, 1.0)]),
            head: None,
            pass_s: 1.0,
            decode_context_s: 1e-6,
            chunk_context_s: 1e-6,
            load_bytes_per_s: 1e9,
            source: SpeedSource::Layers,
        };
        let broken: [fn(&mut Speed); 5] = [
            |s| s.pass_s = 3601.0,
            |s| s.decode_context_s = 1.1,
            |s| s.chunk_context_s = f64::INFINITY,
            |s| s.load_bytes_per_s = 1e16,
            |s| s.load_bytes_per_s = f64::NAN,
        ];
        for spoil in broken {
            let mut speed = sound.clone();
            spoil(&mut speed);
            assert!(sound.is_sound() && !speed.is_sound(), "{speed:?}");
        }
        for factor in [1e300, f64::INFINITY, f64::NAN] {
            let slow = sound.slowed(factor);
            assert!(slow.is_sound() && Curve::new(slow.decode.points().to_vec()).is_ok(), "{factor}: {slow:?}");
        }
        for (latency_s, bytes_per_s) in [(3601.0, 1e9), (f64::NAN, 1e9), (0.1, 0.5), (0.1, f64::INFINITY)] {
            assert!(!LinkProfile { latency_s, bytes_per_s }.is_sound());
        }
        assert!(LinkProfile::UNKNOWN.is_sound());
    }

    #[test]
    fn a_head_is_compared_with_the_experts_that_a_row_reads() {
        // Half of the bytes are dense, and of 8 experts a row reads 2: 625 of 1000 bytes.
        let model = ModelProfile {
            layer_bytes: vec![1000; 4],
            head_bytes: 500,
            n_experts: 8,
            n_experts_used: 2,
            expert_bytes: 2000,
            ..ModelProfile::default()
        };
        let speed = Speed {
            decode: curve(&[(1, 1.0), (2, 1.0)]),
            chunk: curve(&[(1, 1.0)]),
            head: None,
            pass_s: 0.0,
            decode_context_s: 0.0,
            chunk_context_s: 0.0,
            load_bytes_per_s: 0.0,
            source: SpeedSource::Layers,
        };
        assert_eq!(speed.head_s(&model, 1.0), 0.8);
        let dense = ModelProfile { n_experts: 0, ..model };
        assert_eq!(speed.head_s(&dense, 1.0), 0.5);
    }

    #[test]
    fn links_are_taken_from_what_is_known() {
        let [a, b, c] = [1, 2, 3].map(|n| NodeId::from_bytes([n; 32]));
        let mut links = Links::default();
        assert_eq!(links.get(a, b), LinkProfile::UNKNOWN);
        let slow = LinkProfile { latency_s: 0.01, bytes_per_s: 1e6 };
        links.set(a, b, slow);
        assert_eq!((links.get(a, b), links.get(b, a)), (slow, slow));
        let port = |ms: f64, mb: f64| LinkProfile { latency_s: ms / 1000.0, bytes_per_s: mb * 1e6 };
        links.set_port(a, port(1.0, 100.0));
        links.set_port(c, port(2.0, 50.0));
        assert_eq!(links.get(a, c), port(3.0, 50.0));
        assert_eq!(links.get(b, c), port(4.0, 50.0));
        links.remove(a);
        assert_eq!(links.get(a, b), LinkProfile::UNKNOWN);
    }
}
