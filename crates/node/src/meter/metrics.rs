//! The numbers that `/metrics` shows, named after vLLM's where it has them.
//!
//! All are made here once and registered with the text encoder; the meter holds clones and tells them what happens.
//! Those of a stage or link carry its names as labels and are made for each placement. Counters outlive placements: a
//! node that gets the same stage again goes on counting.

use std::fmt::Debug;
use std::hash::Hash;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::{AtomicU64, AtomicUsize};

use prometheus_client::encoding::{EncodeLabelSet, EncodeMetric};
use prometheus_client::metrics::TypedMetric;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::{Metric, Registry};

use brigade_net::MAX_MEMBERS;

use super::End;

/// Most stages, links or nodes that one metric tells apart, over all placements. As many as there can be members, so a
/// cluster of any size fits. Beyond, all begin anew at 0, which Prometheus takes for a restart.
pub const MAX_SERIES: usize = MAX_MEMBERS;

/// vLLM's, for the time to the first token.
const FIRST_TOKEN_SECONDS: [f64; 22] = [
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
    160.0, 640.0, 2560.0,
];

/// vLLM's, for the time between tokens, and three finer ones for small models.
const TOKEN_SECONDS: [f64; 22] = [
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    20.0, 40.0, 80.0,
];

/// vLLM's, for whole requests and their phases.
const REQUEST_SECONDS: [f64; 21] = [
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0,
    1920.0, 7680.0,
];

/// vLLM's, for tokens of a request, up to the longest contexts.
const TOKENS: [f64; 19] =
    [1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1e3, 2e3, 5e3, 1e4, 2e4, 5e4, 1e5, 2e5, 5e5, 1e6];

/// From a tiny stage's decode pass to a large stage's chunk of a prompt.
const STAGE_SECONDS: [f64; 16] =
    [0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 10.0, 30.0];

/// One row, one of each session, and full chunks of prompts.
const ROWS: [f64; 12] = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0];

/// From a part of a hop on loopback to a whole one between continents, closest around a quarter of a millisecond.
const HOP_SECONDS: [f64; 17] =
    [1e-5, 2.5e-5, 5e-5, 1e-4, 1.5e-4, 2e-4, 2.5e-4, 3.5e-4, 5e-4, 7.5e-4, 1e-3, 2.5e-3, 5e-3, 0.01, 0.025, 0.1, 0.5];

/// A number that is not whole.
pub type Seconds = Counter<f64, AtomicU64>;

type Share = Gauge<f64, AtomicU64>;
type Text = [(&'static str, &'static str); 1];

/// Names a stage.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct StageLabels {
    stage: u32,
    node: String,
}

/// Names a link by the stage that it leads to, and by its ends.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct LinkLabels {
    link: u32,
    from: String,
    to: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct NodeLabels {
    node: String,
}

/// What is told of each stage.
#[derive(Debug, Clone)]
pub struct StageMetrics {
    /// Computing time, without what belongs to other frames of a batch.
    pub busy: Seconds,
    /// Computing time of a batch.
    pub pass: Histogram,
    /// Rows of a pass.
    pub rows_per_pass: Histogram,
    /// All rows.
    pub rows: Counter,
}

/// What is told of each link.
#[derive(Debug, Clone)]
pub struct LinkMetrics {
    /// Bytes in both directions.
    pub bytes: Counter,
    /// Frames in both directions.
    pub frames: Counter,
    labels: LinkLabels,
}

/// The parts of a hop, in the order in which they happen.
#[derive(Debug)]
pub struct HopMetrics {
    /// All together.
    pub total: Histogram,
    /// See [`HopParts`](crate::serving::HopParts).
    pub read: Histogram,
    /// Likewise.
    pub queue: Histogram,
    /// Likewise.
    pub encode: Histogram,
    /// Likewise.
    pub write: Histogram,
    /// Likewise.
    pub wire: Histogram,
}

/// Done and failed.
#[derive(Debug)]
pub struct Outcomes {
    /// Times that it was done.
    ok: Counter,
    /// Times that it could not be done.
    failed: Counter,
    /// Tokens of those that were done.
    tokens: Counter,
}

impl Outcomes {
    /// Counts one with so many tokens.
    pub fn count(&self, n_tokens: u32, ok: bool) {
        if ok {
            self.ok.inc();
            self.tokens.inc_by(n_tokens.into());
        } else {
            self.failed.inc();
        }
    }
}

/// All metrics.
#[derive(Debug)]
pub struct Metrics {
    /// What the encoder reads.
    pub registry: Registry,
    /// Of requests.
    pub requests: RequestMetrics,
    /// Of the coordinator as a whole.
    pub load: LoadMetrics,
    /// Of the ring.
    pub ring: RingMetrics,
}

/// What is told of requests; the help texts are in [`RequestMetrics::new`].
#[derive(Debug)]
pub struct RequestMetrics {
    pub first_token: Histogram,
    pub token_gap: Histogram,
    pub token_mean: Histogram,
    pub queue: Histogram,
    pub prefill: Histogram,
    pub decode: Histogram,
    pub whole: Histogram,
    pub prompt_sizes: Histogram,
    pub answer_sizes: Histogram,
    pub preemptions: Counter,
    pub prompt_tokens: Counter,
    pub generation_tokens: Counter,
    finished: Family<Text, Counter>,
}

/// What stands now, and KV caches; the help texts are in [`LoadMetrics::new`].
#[derive(Debug)]
pub struct LoadMetrics {
    pub running: Gauge,
    pub waiting: Gauge,
    pub kv_usage: Share,
    pub kv_tokens: Gauge,
    pub kv_capacity: Gauge,
    pub cache_queries: Counter,
    pub cache_hits: Counter,
    pub images: Gauge,
    pub image_tokens: Gauge,
    pub saves: Outcomes,
    pub restores: Outcomes,
    pub term: Gauge,
    pub epoch: Gauge,
    pub uptime: Share,
}

/// What is told of stages and links; the help texts are in [`RingMetrics::new`].
#[derive(Debug)]
pub struct RingMetrics {
    /// Between stages.
    pub hop: HopMetrics,
    /// Rings that were lost.
    pub losses: Counter,
    /// From losing a ring to a pass that goes around again.
    pub pause: Histogram,
    stage_busy: Series<StageLabels, Seconds>,
    stage_pass: Series<StageLabels, Histogram>,
    stage_rows_per_pass: Series<StageLabels, Histogram>,
    stage_rows: Series<StageLabels, Counter>,
    link_bytes: Series<LinkLabels, Counter>,
    link_frames: Series<LinkLabels, Counter>,
    link_queue: Series<LinkLabels, Gauge>,
    rtt: Series<NodeLabels, Share>,
}

impl Metrics {
    /// All at 0.
    pub fn new() -> Self {
        let mut maker = Maker::new();
        let requests = RequestMetrics::new(&mut maker);
        let load = LoadMetrics::new(&mut maker);
        let ring = RingMetrics::new(&mut maker);
        Self { registry: maker.0, requests, load, ring }
    }
}

impl RequestMetrics {
    fn new(m: &mut Maker) -> Self {
        Self {
            first_token: m.histogram(
                "time_to_first_token_seconds",
                "From receiving a request to its first token",
                FIRST_TOKEN_SECONDS,
            ),
            token_gap: m.histogram("inter_token_latency_seconds", "Between two tokens of a request", TOKEN_SECONDS),
            token_mean: m.histogram(
                "time_per_output_token_seconds",
                "Mean time between the tokens of a request that was answered in full",
                TOKEN_SECONDS,
            ),
            queue: m.histogram(
                "request_queue_time_seconds",
                "From receiving a request to its first admission",
                REQUEST_SECONDS,
            ),
            prefill: m.histogram(
                "request_prefill_time_seconds",
                "From the first admission of a request to its first token",
                REQUEST_SECONDS,
            ),
            decode: m.histogram(
                "request_decode_time_seconds",
                "From the first to the last token of a request that was answered in full",
                REQUEST_SECONDS,
            ),
            whole: m.histogram(
                "e2e_request_latency_seconds",
                "From receiving a request to the end of an answer in full",
                REQUEST_SECONDS,
            ),
            prompt_sizes: m.histogram(
                "request_prompt_tokens",
                "Tokens of the prompt of a request that was answered in full",
                TOKENS,
            ),
            answer_sizes: m.histogram("request_generation_tokens", "Tokens of an answer in full", TOKENS),
            preemptions: m.zero("num_preemptions", "Times that a request lost its slot to another"),
            prompt_tokens: m.zero(
                "prompt_tokens",
                "Tokens of prompts that got a first token, and of texts that got a vector; cached ones counted",
            ),
            generation_tokens: m.zero("generation_tokens", "Tokens generated"),
            finished: m.zero("request_success", "Requests that ended, by how they did"),
        }
        .with_all_ends()
    }

    /// Counters that begin at 0, so that the first request that ends is seen as an increase.
    fn with_all_ends(self) -> Self {
        for end in End::ALL {
            drop(self.finished.get_or_create(&[("finished_reason", end.name())]));
        }
        self
    }

    /// Counts a request that ended for `reason`.
    pub fn finished(&self, reason: &'static str) {
        self.finished.get_or_create(&[("finished_reason", reason)]).inc();
    }
}

impl LoadMetrics {
    fn new(m: &mut Maker) -> Self {
        Self {
            running: m.zero("num_requests_running", "Requests that have a slot"),
            waiting: m.zero("num_requests_waiting", "Requests that wait for a slot"),
            kv_usage: m.zero("kv_cache_usage_perc", "Share of the KV cache that is in use, 0 to 1"),
            kv_tokens: m.zero("kv_cache_tokens", "Tokens that KV caches hold"),
            kv_capacity: m.zero("kv_cache_capacity_tokens", "Tokens for which KV caches have room"),
            cache_queries: m.zero("prefix_cache_queries", "Tokens that were looked for in KV caches at admission"),
            cache_hits: m.zero("prefix_cache_hits", "Tokens that were found there and not computed again"),
            images: m.zero("kv_images", "KV caches of sessions that are saved outside of memory"),
            image_tokens: m.zero("kv_image_tokens", "Tokens of saved KV caches"),
            saves: m.outcomes("save", "Times that a KV cache was to be saved on all stages", "Tokens that were saved"),
            restores: m.outcomes(
                "restore",
                "Times that a saved KV cache was to be taken back on all stages",
                "Tokens that were taken back",
            ),
            term: m.zero("term", "Rises with each node that begins to coordinate"),
            epoch: m.zero("epoch", "Rises with each placement of the model by the node that coordinates"),
            uptime: m.zero("uptime_seconds", "Time since the coordinator was started"),
        }
    }
}

impl RingMetrics {
    fn new(m: &mut Maker) -> Self {
        Self {
            hop: m.hop(),
            losses: m.zero("ring_losses", "Times that a ring which answered was lost or placed anew"),
            pause: m.histogram(
                "recovery_seconds",
                "From losing a ring to the first pass that goes around another one",
                TOKEN_SECONDS,
            ),
            stage_busy: m.series("stage_busy_seconds", "Time that a stage computed", Seconds::default),
            stage_pass: m.series("stage_pass_seconds", "Computing time of the batch that a pass was part of", || {
                Histogram::new(STAGE_SECONDS)
            }),
            stage_rows_per_pass: m.series("stage_rows_per_pass", "Rows of a pass", || Histogram::new(ROWS)),
            stage_rows: m.series("stage_rows", "Rows that a stage computed", Counter::default),
            link_bytes: m.series(
                "link_bytes",
                "Bytes on a link of the ring before encryption; rows times their size where it joins two workers",
                Counter::default,
            ),
            link_frames: m.series("link_frames", "Frames on a link of the ring", Counter::default),
            link_queue: m.series(
                "link_send_queue",
                "Frames that wait to be written to a link of the coordinator",
                Gauge::default,
            ),
            rtt: m.series("node_rtt_seconds", "Round trip of a node's control link", Share::default),
        }
    }

    /// Shows no send queues until they are told again, and makes room for `n_stages` stages.
    pub fn begin_placement(&self, n_stages: usize) {
        self.link_queue.clear();
        self.stage_busy.make_room(n_stages);
        self.stage_pass.make_room(n_stages);
        self.stage_rows_per_pass.make_room(n_stages);
        self.stage_rows.make_room(n_stages);
        self.link_bytes.make_room(n_stages);
        self.link_frames.make_room(n_stages);
    }

    /// The metrics of stage `k` on `node`.
    pub fn stage(&self, k: usize, node: &str) -> StageMetrics {
        let labels = StageLabels { stage: k as u32, node: node.to_owned() };
        StageMetrics {
            busy: self.stage_busy.get(&labels),
            pass: self.stage_pass.get(&labels),
            rows_per_pass: self.stage_rows_per_pass.get(&labels),
            rows: self.stage_rows.get(&labels),
        }
    }

    /// The metrics of the link to stage `k`.
    pub fn link(&self, k: usize, from: &str, to: &str) -> LinkMetrics {
        let labels = LinkLabels { link: k as u32, from: from.to_owned(), to: to.to_owned() };
        LinkMetrics { bytes: self.link_bytes.get(&labels), frames: self.link_frames.get(&labels), labels }
    }

    /// Notes how many frames wait to be sent on a link.
    pub fn queued(&self, link: &LinkMetrics, n_frames: usize) {
        self.link_queue.get(&link.labels).set(n_frames as i64);
    }

    /// Notes the round trip of a node.
    pub fn rtt(&self, node: &str, seconds: f32) {
        self.rtt.make_room(1);
        self.rtt.get(&NodeLabels { node: node.to_owned() }).set(seconds.into());
    }

    /// Shows no round trip of a node any more.
    pub fn forget_rtt(&self, node: &str) {
        self.rtt.remove(&NodeLabels { node: node.to_owned() });
    }
}

/// A metric for each of up to [`MAX_SERIES`] sets of labels.
#[derive(Debug)]
struct Series<L, M> {
    family: Family<L, M>,
    n_made: AtomicUsize,
}

impl<L: Clone + Hash + Eq, M: Clone> Series<L, M> {
    const fn new(family: Family<L, M>) -> Self {
        Self { family, n_made: AtomicUsize::new(0) }
    }

    /// The metric with these labels, made if there is none.
    fn get(&self, labels: &L) -> M {
        if let Some(metric) = self.family.get(labels) {
            return metric.clone();
        }
        self.n_made.fetch_add(1, Relaxed);
        self.family.get_or_create_owned(labels)
    }

    /// Forgets all if `n` more would be too many.
    fn make_room(&self, n: usize) {
        if self.n_made.load(Relaxed) + n > MAX_SERIES {
            self.clear();
        }
    }

    fn remove(&self, labels: &L) {
        if self.family.remove(labels) {
            self.n_made.fetch_sub(1, Relaxed);
        }
    }

    fn clear(&self) {
        self.family.clear();
        self.n_made.store(0, Relaxed);
    }
}

/// Registers metrics under the prefix that all have. `_total` and `_info` are put behind names by the encoder, and a
/// full stop behind help texts.
struct Maker(Registry);

impl Maker {
    fn new() -> Self {
        let mut registry = Registry::with_prefix("brigade");
        let version: Text = [("version", env!("CARGO_PKG_VERSION"))];
        registry.register("build", "The version of Brigade", Info::new(version));
        Self(registry)
    }

    fn add<M: Metric + Clone>(&mut self, name: &str, help: &str, metric: M) -> M {
        self.0.register(name, help, metric.clone());
        metric
    }

    fn zero<M: Metric + Clone + Default>(&mut self, name: &str, help: &str) -> M {
        self.add(name, help, M::default())
    }

    fn histogram<const N: usize>(&mut self, name: &str, help: &str, buckets: [f64; N]) -> Histogram {
        self.add(name, help, Histogram::new(buckets))
    }

    fn series<L, M>(&mut self, name: &str, help: &str, make: fn() -> M) -> Series<L, M>
    where
        L: Clone + Hash + Eq + Debug + EncodeLabelSet + Send + Sync + 'static,
        M: Clone + EncodeMetric + TypedMetric + Debug + Send + Sync + 'static,
    {
        Series::new(self.add(name, help, Family::new_with_constructor(make)))
    }

    fn outcomes(&mut self, what: &str, times: &str, tokens: &str) -> Outcomes {
        let family = self.zero::<Family<Text, Counter>>(&format!("kv_image_{what}s"), times);
        let of = |outcome| family.get_or_create_owned(&[("outcome", outcome)]);
        let (ok, failed) = (of("ok"), of("failed"));
        Outcomes { ok, failed, tokens: self.zero(&format!("kv_image_{what}_tokens"), tokens) }
    }

    fn hop(&mut self) -> HopMetrics {
        let total = self.histogram("hop_seconds", "What software and links cost per hop of a lone stream", HOP_SECONDS);
        let family = Family::<Text, Histogram>::new_with_constructor(|| Histogram::new(HOP_SECONDS));
        let family = self.add("hop_part_seconds", "What a hop of a lone stream is made of", family);
        let of = |part| family.get_or_create_owned(&[("part", part)]);
        let (read, queue, encode, write, wire) = (of("read"), of("queue"), of("encode"), of("write"), of("wire"));
        HopMetrics { total, read, queue, encode, write, wire }
    }
}
