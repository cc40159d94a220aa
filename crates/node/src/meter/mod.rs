//! Hears of everything that happens in a ring, and answers `/metrics`, `/debug/requests` and `status`.
//!
//! - The ring thread tells: requests that come, get a slot, lose it, get tokens and end; passes; load.
//! - [`metrics`] holds counters and histograms. They last as long as the coordinator.
//! - [`windows`] hold what is shown of the last seconds. They last as long as a placement.
//! - [`traces`] hold what became of the last requests.
//!
//! A [`Meter`] is shared by those who tell and those who ask. Its one lock is held for less than a microsecond per
//! token, and nothing is allocated for a token; an asker holds it to copy, and computes and writes text afterwards.
//! Time is an argument where the ring thread tells, which has looked at its clock anyway.

mod metrics;
mod pace;
mod pass;
#[cfg(test)]
mod tests;
mod traces;
mod windows;

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use brigade_base::{Epoch, NodeId, SessionId};
use brigade_net::LinkStats;
use brigade_protocol::schedule::PassRows;
use prometheus_client::encoding::text;
use prometheus_client::metrics::histogram::Histogram;

use self::metrics::{LinkMetrics, Metrics, StageMetrics};
use self::pace::Paces;
pub use self::pace::{Expected, ExpectedStage};
use self::pass::Costs;
pub use self::pass::PassReport;
use self::traces::{PassInfo, State, Traces, Track};
use self::windows::{Busy, Hop, Hops, Speed, quantile};
use crate::serving::{HopParts, Recovery, Request};
use crate::threads::{lock, micros};
use crate::trace::RequestTrace;

/// What [`Meter::encode`] writes, as HTTP names it.
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Counts, times and traces of one coordinator, over all its placements.
#[derive(Debug)]
pub struct Meter {
    started: Instant,
    row_bytes: u64,
    metrics: Metrics,
    inner: Mutex<Inner>,
}

/// How a request ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// The model's end token or a stop string.
    Stop,
    /// `max_tokens` or the end of the context.
    Length,
    /// The caller has gone.
    Abort,
    /// Its time was over.
    Timeout,
    /// It could not be completed.
    Error,
}

impl End {
    const ALL: [Self; 5] = [Self::Stop, Self::Length, Self::Abort, Self::Timeout, Self::Error];

    /// The word for it in metrics and traces.
    const fn name(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
            Self::Abort => "abort",
            Self::Timeout => "timeout",
            Self::Error => "error",
        }
    }

    /// Whether the caller got the whole answer.
    const fn is_whole(self) -> bool {
        matches!(self, Self::Stop | Self::Length)
    }
}

/// How full a coordinator is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Load {
    /// Requests that have a slot.
    pub running: usize,
    /// Requests that wait for one.
    pub waiting: usize,
    /// Tokens that KV caches hold.
    pub kv_tokens: u64,
    /// Tokens for which they have room.
    pub kv_capacity: u64,
    /// KV caches that are saved outside of memory.
    pub images: usize,
    /// Tokens of these.
    pub image_tokens: u64,
}

/// What is under the lock.
#[derive(Debug, Default)]
struct Inner {
    load: Load,
    n_tokens: u64,
    speed: Speed,
    paces: Paces,
    hops: Hops,
    nodes: Arc<[String]>,
    stages: Vec<Stage>,
    /// By the stage that they lead to; none in a ring of one stage.
    links: Vec<RingLink>,
    traces: Traces,
    recoveries: u64,
    last_recovery: Option<Recovery>,
}

/// A stage of the present placement.
#[derive(Debug)]
struct Stage {
    metrics: StageMetrics,
    busy: Busy,
    /// Milliseconds of its last decode passes.
    decode_ms: VecDeque<f32>,
}

/// A link of the present placement.
#[derive(Debug)]
struct RingLink {
    metrics: LinkMetrics,
    seen: LinkStats,
}

impl Meter {
    /// Nothing has happened yet. `row_bytes` is what a frame with one row weighs on a link.
    pub fn new(row_bytes: u64) -> Self {
        let inner = Mutex::new(Inner::default());
        Self { started: Instant::now(), row_bytes, metrics: Metrics::new(), inner }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        lock(&self.inner)
    }

    /// A request has come in at `now`.
    pub fn received(&self, session: SessionId, request: &Request, now: Instant) {
        let prompt_tokens = request.prompt.len() as u32;
        tracing::debug!(request = request.id, %session, prompt_tokens, "received");
        let unix_ms = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_millis() as u64);
        let track = Track::new(session, request, (now, unix_ms));
        let mut inner = self.lock();
        self.close_forsaken(&mut inner, now);
        inner.traces.begin(track, request);
    }

    /// A request got a slot at `now`, and `cached_tokens` of it need not be computed. Not the first time, if it was
    /// preempted.
    pub fn admitted(&self, session: SessionId, cached_tokens: u32, now: Instant) {
        let mut inner = self.lock();
        let Some((text, track)) = inner.traces.text(session) else { return };
        track.state = State::Running;
        if let Some(since) = track.preempted.take() {
            track.paused += now.saturating_duration_since(since);
        }
        if !std::mem::replace(&mut text.was_admitted, true) {
            track.cached_tokens = track.cached_tokens.saturating_add(cached_tokens);
        }
        if track.admitted.is_none() {
            track.admitted = Some(now);
            observe(&self.metrics.requests.queue, now, track.received);
        }
        tracing::debug!(request = track.id, %session, cached_tokens, "admitted");
        self.metrics.load.cache_queries.inc_by(u64::from(text.n_tokens) + u64::from(track.completion_tokens));
        self.metrics.load.cache_hits.inc_by(cached_tokens.into());
    }

    /// A request lost its slot to another at `now`, and will go on later.
    pub fn preempted(&self, session: SessionId, now: Instant) {
        self.metrics.requests.preemptions.inc();
        let mut inner = self.lock();
        let Some(track) = inner.traces.open(session) else { return };
        track.preemptions += 1;
        // The other texts of a batch go on.
        if !track.is_batch() {
            track.state = State::Preempted;
            track.preempted = Some(now);
        }
        tracing::debug!(request = track.id, %session, "preempted");
    }

    /// A token of a request was chosen at `now`.
    pub fn token(&self, session: SessionId, now: Instant) {
        let requests = &self.metrics.requests;
        requests.generation_tokens.inc();
        let mut inner = self.lock();
        let inner = &mut *inner;
        inner.n_tokens += 1;
        inner.speed.token(inner.n_tokens, now);
        let Some(track) = inner.traces.open(session) else { return };
        track.completion_tokens += 1;
        if let Some(last) = track.last_token.replace(now) {
            return observe(&requests.token_gap, now, last);
        }
        track.first_token = Some(now);
        observe(&requests.first_token, now, track.received);
        observe(&requests.prefill, now, track.admitted.unwrap_or(track.received));
        requests.prompt_tokens.inc_by(track.prompt_tokens.into());
    }

    /// The vector of a text came.
    pub fn pooled(&self, session: SessionId) {
        if let Some((text, _)) = self.lock().traces.text(session) {
            self.metrics.requests.prompt_tokens.inc_by(text.n_tokens.into());
        }
    }

    /// A session ended at `now`, answered or not, and with it its request if that has no other texts to come. Ends of
    /// sessions that are not open are ignored.
    pub fn ended(&self, session: SessionId, end: End, now: Instant) {
        let mut inner = self.lock();
        let track = inner.traces.end(session, end, now);
        if inner.traces.is_idle() {
            inner.speed.pause();
        }
        if let Some(track) = track {
            self.close(&mut inner, track, end, now);
        }
    }

    /// Counts requests of many texts whose callers have left. They ended when the last text was done or given up.
    fn close_forsaken(&self, inner: &mut Inner, now: Instant) {
        for track in inner.traces.forsaken(now) {
            let ended = track.idle.unwrap_or(now);
            self.close(inner, track, End::Abort, ended);
        }
    }

    fn close(&self, inner: &mut Inner, mut track: Track, end: End, now: Instant) {
        track.state = State::Done(end.name());
        track.ended = Some(now);
        let (finish, prompt_tokens, completion_tokens) = (end.name(), track.prompt_tokens, track.completion_tokens);
        let (session, seconds) = (track.session, now.saturating_duration_since(track.received).as_secs_f64());
        if matches!(end, End::Timeout | End::Error) {
            tracing::info!(request = track.id, %session, finish, prompt_tokens, completion_tokens, seconds, "failed");
        } else {
            tracing::debug!(request = track.id, %session, finish, prompt_tokens, completion_tokens, seconds, "ended");
        }
        self.metrics.requests.finished(finish);
        if end.is_whole() {
            self.observe_whole(&track, now);
        }
        inner.traces.keep(track);
    }

    fn observe_whole(&self, track: &Track, now: Instant) {
        let requests = &self.metrics.requests;
        observe(&requests.whole, now, track.received);
        requests.prompt_sizes.observe(track.prompt_tokens.into());
        requests.answer_sizes.observe(track.completion_tokens.into());
        if let (Some(first), Some(last)) = (track.first_token, track.last_token) {
            observe(&requests.decode, last, first);
            if track.completion_tokens > 1 {
                let gaps = f64::from(track.completion_tokens - 1);
                requests.token_mean.observe(last.saturating_duration_since(first).as_secs_f64() / gaps);
            }
        }
    }

    /// A pass has come around and the tail was computed.
    pub fn pass(&self, report: PassReport<'_>) {
        let costs = Costs::of(&report);
        let mut inner = self.lock();
        inner.stages_worked(&report, &costs);
        // What a stage spends on KV steps is not expected, and is the disk's as often as not.
        if !report.moves_kv {
            inner.paces.add(report.tail_end, report.rows, &costs.spans);
        }
        if report.n_rows == 0 {
            return;
        }
        inner.links_carried(&report, self.row_bytes);
        if let Some(hop) = costs.hop.filter(|_| report.alone && report.is_decode && report.n_rows == 1) {
            self.observe_hop(hop);
            inner.hops.push(hop);
        }
        inner.trace(&report, costs);
    }

    fn observe_hop(&self, hop: Hop) {
        let metrics = &self.metrics.ring.hop;
        let HopParts { read, queue, encode, write, wire } = hop.parts;
        let all = [&metrics.read, &metrics.queue, &metrics.encode, &metrics.write, &metrics.wire, &metrics.total];
        for (histogram, us) in all.into_iter().zip([read, queue, encode, write, wire, hop.total]) {
            histogram.observe(f64::from(us) / 1e6);
        }
    }

    /// Notes how full the coordinator is.
    pub fn load(&self, load: Load) {
        let metrics = &self.metrics.load;
        metrics.running.set(load.running as i64);
        metrics.waiting.set(load.waiting as i64);
        metrics.kv_usage.set(load.kv_tokens as f64 / load.kv_capacity.max(1) as f64);
        metrics.kv_tokens.set(load.kv_tokens as i64);
        metrics.kv_capacity.set(load.kv_capacity as i64);
        metrics.images.set(load.images as i64);
        metrics.image_tokens.set(load.image_tokens as i64);
        self.lock().load = load;
    }

    /// A KV cache of so many tokens was saved by all stages, or could not be.
    pub fn saved(&self, n_tokens: u32, ok: bool) {
        self.metrics.load.saves.count(n_tokens, ok);
    }

    /// A saved KV cache was taken back by all stages, or could not be.
    pub fn restored(&self, n_tokens: u32, ok: bool) {
        self.metrics.load.restores.count(n_tokens, ok);
    }

    /// The model is placed anew: `stages` names the nodes in ring order, the coordinator last. Windows begin anew,
    /// counters, traces and open requests stay.
    pub fn placed(&self, epoch: Epoch, stages: Vec<String>) {
        let now = Instant::now();
        let metrics = &self.metrics.ring;
        self.metrics.load.term.set(epoch.term() as i64);
        self.metrics.load.epoch.set(epoch.number() as i64);
        metrics.begin_placement(stages.len());
        let stage = |(k, node): (usize, &String)| Stage {
            metrics: metrics.stage(k, node),
            busy: Busy::new(now),
            decode_ms: VecDeque::new(),
        };
        let link = |(k, to): (usize, &String)| {
            let from = &stages[k.checked_sub(1).unwrap_or(stages.len() - 1)];
            RingLink { metrics: metrics.link(k, from, to), seen: LinkStats::default() }
        };
        let has_links = stages.len() > 1;
        let new_stages = stages.iter().enumerate().map(stage).collect();
        let new_links = stages.iter().enumerate().filter(|_| has_links).map(link).collect();
        let mut inner = self.lock();
        inner.stages = new_stages;
        inner.links = new_links;
        inner.nodes = stages.into();
        inner.speed = Speed::default();
        inner.hops = Hops::default();
    }

    /// Compares the stages of the present placement with this from now on.
    pub fn expect(&self, expected: Option<Expected>) {
        self.lock().paces = Paces::new(expected);
    }

    /// How many times as long as expected each stage takes, by who serves it; `None` where too little was computed to
    /// tell, and nothing at all where nothing is expected.
    pub fn paces(&self) -> Vec<(NodeId, Option<f64>)> {
        self.lock().paces.factors()
    }

    /// A ring that answered is lost.
    pub fn lost(&self, reason: &str) {
        self.metrics.ring.losses.inc();
        self.lock().last_recovery = Some(Recovery { reason: reason.to_owned(), pause_ms: 0.0 });
    }

    /// A pass went around again, so long after a ring was lost.
    pub fn recovered(&self, reason: &str, pause: Duration) {
        self.metrics.ring.pause.observe(pause.as_secs_f64());
        let mut inner = self.lock();
        inner.recoveries += 1;
        inner.last_recovery = Some(Recovery { reason: reason.to_owned(), pause_ms: pause.as_secs_f32() * 1000.0 });
    }

    /// How often the answers went on in another ring.
    pub fn recoveries(&self) -> u64 {
        self.lock().recoveries
    }

    /// The last loss of a ring.
    pub fn last_recovery(&self) -> Option<Recovery> {
        self.lock().last_recovery.clone()
    }

    /// Notes what went over one of the coordinator's own links so far, and how many frames wait to be sent there. Links
    /// are counted by the stage that they lead to: 0 to the first worker, and the number of workers from the last one.
    pub fn link(&self, stage: usize, stats: LinkStats, queued: usize) {
        let mut inner = self.lock();
        let Some(link) = inner.links.get_mut(stage) else { return };
        let bytes = |stats: LinkStats| stats.bytes_sent + stats.bytes_received;
        let frames = |stats: LinkStats| stats.frames_sent + stats.frames_received;
        link.metrics.bytes.inc_by(bytes(stats).saturating_sub(bytes(link.seen)));
        link.metrics.frames.inc_by(frames(stats).saturating_sub(frames(link.seen)));
        link.seen = stats;
        self.metrics.ring.queued(&link.metrics, queued);
    }

    /// Notes the round trip of a node's control link.
    pub fn rtt(&self, node: &str, seconds: f32) {
        self.metrics.ring.rtt(node, seconds);
    }

    /// A node is gone, and has no round trip any more.
    pub fn gone(&self, node: &str) {
        self.metrics.ring.forget_rtt(node);
    }

    /// All metrics as [`CONTENT_TYPE`].
    pub fn encode(&self) -> String {
        self.close_forsaken(&mut self.lock(), Instant::now());
        self.metrics.load.uptime.set(self.started.elapsed().as_secs_f64());
        let mut out = String::new();
        if let Err(error) = text::encode(&mut out, &self.metrics.registry) {
            // Writing to a string does not fail; if the encoder does, half a text would be taken for the whole.
            tracing::warn!(%error, "the metrics could not be written");
            out.clear();
        }
        out
    }

    /// What became of the request with this id, if it is open or among the last [`traces::MAX_DONE`].
    pub fn trace(&self, request: &str) -> Option<RequestTrace> {
        let (mut inner, now) = (self.lock(), Instant::now());
        self.close_forsaken(&mut inner, now);
        inner.traces.find(request, now)
    }

    /// How full the coordinator is.
    pub fn load_now(&self) -> Load {
        self.lock().load
    }

    /// Tokens since the start.
    pub fn tokens(&self) -> u64 {
        self.lock().n_tokens
    }

    /// Tokens per second over the last tokens, all sessions together; 0 if that is long ago.
    pub fn tokens_per_second(&self) -> f32 {
        self.lock().speed.per_second(Instant::now())
    }

    /// Median milliseconds of a decode pass in stage `k`, in ring order with the tail last; 0 before the first.
    pub fn stage_ms(&self, k: usize) -> f32 {
        let mut values: Vec<f32> = match self.lock().stages.get(k) {
            Some(stage) => stage.decode_ms.iter().copied().collect(),
            None => Vec::new(),
        };
        quantile(&mut values, 0.5)
    }

    /// Share of the last ten seconds in which stage `k` computed, 0 to 1.
    pub fn busy(&self, k: usize) -> f32 {
        self.lock().stages.get(k).map_or(0.0, |stage| stage.busy.share(Instant::now()))
    }

    /// Median and 99th percentile of what software and links cost per hop of a lone stream, in microseconds.
    pub fn hop_us(&self) -> (f32, f32) {
        let mut values = self.lock().hops.values(|hop| hop.total);
        (quantile(&mut values, 0.5), quantile(&mut values, 0.99))
    }

    /// What a hop of a lone stream is made of; the median of each part, in microseconds.
    pub fn hop_parts(&self) -> HopParts {
        let hops = self.lock().hops.clone();
        let median = |of: fn(&HopParts) -> f32| quantile(&mut hops.values(|hop| of(&hop.parts)), 0.5);
        HopParts {
            read: median(|parts| parts.read),
            queue: median(|parts| parts.queue),
            encode: median(|parts| parts.encode),
            write: median(|parts| parts.write),
            wire: median(|parts| parts.wire),
        }
    }

    /// Bytes that each link carries for one decode row.
    pub fn bytes_per_token(&self) -> u64 {
        self.row_bytes
    }
}

impl Inner {
    /// Notes how long each stage computed, and when.
    fn stages_worked(&mut self, report: &PassReport<'_>, costs: &Costs) {
        let tail_first = costs.spans.iter().enumerate().rev();
        for ((k, span), end) in tail_first.zip(costs.ends(report)) {
            let Some(stage) = self.stages.get_mut(k) else { continue };
            stage.busy.add(end.unwrap_or(report.sent), span.share());
            stage.metrics.busy.inc_by(span.share().as_secs_f64());
            if report.n_rows == 0 {
                continue;
            }
            stage.metrics.pass.observe(f64::from(span.compute) / 1e6);
            stage.metrics.rows_per_pass.observe(report.n_rows.into());
            stage.metrics.rows.inc_by(report.n_rows.into());
            if report.is_decode {
                windows::push(&mut stage.decode_ms, span.compute as f32 / 1000.0);
            }
        }
    }

    /// Notes what went between workers, which nobody else tells of.
    fn links_carried(&self, report: &PassReport<'_>, row_bytes: u64) {
        for link in self.links.get(1..report.timings.len()).unwrap_or_default() {
            link.metrics.bytes.inc_by(u64::from(report.n_rows) * row_bytes);
            link.metrics.frames.inc();
        }
    }

    /// Notes the pass with all requests that were in it.
    fn trace(&mut self, report: &PassReport<'_>, costs: Costs) {
        let begin = report.sent.checked_sub(report.embed).unwrap_or(report.sent);
        let info = Arc::new(PassInfo {
            pass: report.pass,
            n_rows: report.n_rows,
            begin,
            total: report.tail_end.saturating_duration_since(begin),
            embed: micros(report.embed),
            write: micros(report.write),
            wire: costs.wire,
            spans: costs.spans.into(),
            nodes: Arc::clone(&self.nodes),
        });
        for PassRows { session, n_rows: rows, is_prompt, .. } in report.rows {
            if let Some(track) = self.traces.open(*session) {
                track.pass(&info, *rows, *is_prompt);
            }
        }
    }
}

fn observe(histogram: &Histogram, now: Instant, since: Instant) {
    histogram.observe(now.saturating_duration_since(since).as_secs_f64());
}
