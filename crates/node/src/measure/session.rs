//! One measurement: loads the stages and times them; see the head of this module for which and why.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use brigade_base::{ByteSize, LayerRange};
use brigade_engine::{LoadError, Sampler, Sampling};
use brigade_gguf::{Architecture, StageView, SyntheticTensors, TensorSource};
use brigade_plan::{Curve, ModelProfile, Speed, SpeedSource};

use super::bench::{Bench, Shape, time, undisturbed};
use super::watch::Watch;
use super::{
    FRAME_S, MEMORY_DIVISOR, MeasureError, MeasureOptions, MeasureRequest, Measured, has_tensors_of, hash_bytes_per_s,
};
use crate::model::profile_of;
use crate::system;
use crate::throttle::Throttle;
use crate::trial;

/// Most bytes of a thick stage: more than any processor's cache, so that what is measured is memory.
const MAX_THICK_BYTES: u64 = 768 << 20;

/// How long a decode row may take in the thick stage, in seconds: with six points, of which the largest take up to ten
/// times as long as this, and some runs of each, it is a third of the budget.
const THICK_ROW_S: f64 = 0.02;

/// Decode rows that are timed, the most telling first.
pub(super) const DECODE_ROWS: [u32; 6] = [1, 4, 16, 2, 8, 32];

/// Rows of a chunk that are timed, the most telling first. None has one row.
const CHUNK_ROWS: [u32; 5] = [64, 16, 256, 2, 128];

/// Rows with logits that are timed.
const HEAD_ROWS: [u32; 3] = [1, 4, 16];

/// Tokens before the rows with which the price of context is measured, where the context holds them.
const DEPTH: u32 = 512;

/// Most that a run may seem to take beside its layers, as a share of it: more would be noise.
const MOST_PASS_SHARE: f64 = 0.25;

/// What a run takes at least, in seconds: a nanosecond, which no clock tells from nothing.
const LEAST_S: f64 = 1e-9;

/// Shares of the budget at which the parts end, if they did not before.
#[derive(Debug, Clone, Copy)]
struct Shares {
    decode: f64,
    chunks: f64,
    context: f64,
}

/// Without a head.
const OF_LAYERS: Shares = Shares { decode: 0.5, chunks: 0.85, context: 1.0 };

/// With a head, which may be as large as many layers and has to be loaded too.
const WITH_HEAD: Shares = Shares { decode: 0.35, chunks: 0.6, context: 0.7 };

/// Share of the budget that loading the thick stage may take, by what the thin one took.
const THICK_LOAD_SHARE: f64 = 0.12;

/// Share of the budget that loading the node's own weights may take; a slower disk is left alone.
const OWN_LOAD_SHARE: f64 = 0.3;

/// Decode rows that are timed for so many sessions, in order.
pub(super) fn decode_rows(sessions: u32) -> Vec<u32> {
    let most = sessions.clamp(1, DECODE_ROWS[5]);
    let mut rows: Vec<u32> = DECODE_ROWS.into_iter().filter(|rows| *rows <= most).collect();
    if !rows.contains(&most) {
        rows.push(most);
    }
    rows
}

/// Times by rows, in the order in which they were measured.
pub(super) type Points = Vec<(u32, f64)>;

/// Points by ascending rows, none longer than one with more rows, and none of no time at all: fewer rows never take
/// longer, and what disturbs a run only makes it longer.
pub(super) fn settled(mut points: Points) -> Points {
    points.sort_by_key(|(rows, _)| *rows);
    let mut least = f64::INFINITY;
    for (_, seconds) in points.iter_mut().rev() {
        least = least.min(seconds.max(LEAST_S));
        *seconds = least;
    }
    points
}

/// What the layers of a stage take of a run with `seconds`, without the `pass_s` beside them, of which a run has never
/// more than its share: else the layers would take no time at all where one of the two was disturbed.
pub(super) fn layers_s(seconds: f64, pass_s: f64) -> f64 {
    (seconds - pass_s).max(seconds * (1.0 - MOST_PASS_SHARE))
}

/// The curve through points, [settled] and their seconds scaled.
fn curve(points: Points, scale: impl Fn(f64) -> f64) -> Result<Curve, MeasureError> {
    let points = settled(points).into_iter().map(|(rows, seconds)| (rows, scale(seconds))).collect();
    Curve::new(points).map_err(|error| MeasureError::Run(error.to_string()))
}

/// What `n_rows` take at most, by other points: as long as the next larger number, or in proportion longer than the
/// largest. Nothing is known without points.
pub(super) fn expected(points: &Points, n_rows: u32) -> f64 {
    let larger = points.iter().filter(|(rows, _)| *rows >= n_rows).min_by_key(|(rows, _)| *rows);
    let largest = || points.iter().max_by_key(|(rows, _)| *rows);
    match larger {
        Some((_, seconds)) => *seconds,
        None => largest().map_or(0.0, |&(rows, seconds)| seconds * f64::from(n_rows) / f64::from(rows)),
    }
}

/// A measurement on its way.
pub(super) struct Session<'a> {
    request: &'a MeasureRequest,
    options: &'a MeasureOptions,
    architecture: Architecture,
    profile: ModelProfile,
    /// Where the model may be cut, its ends included.
    bounds: Vec<u32>,
    source: Arc<dyn TensorSource>,
    is_own: bool,
    begin: Instant,
    watch: Watch,
    /// Memory that may be taken.
    pub(super) room: u64,
}

impl<'a> Session<'a> {
    pub(super) fn new(request: &'a MeasureRequest, options: &'a MeasureOptions) -> Result<Self, MeasureError> {
        let (begin, watch) = (Instant::now(), Watch::begin());
        let architecture = Architecture::of(&request.catalog)?;
        let profile = profile_of(&architecture, request.kv);
        let mut bounds = vec![0];
        bounds.extend_from_slice(&profile.cut_points);
        bounds.push(profile.n_layers());
        // Another file may have the same name and other shapes.
        let own = options.own.as_ref().filter(|file| has_tensors_of(file.catalog(), &request.catalog));
        let (source, is_own): (Arc<dyn TensorSource>, bool) = match own {
            Some(file) => (Arc::clone(file) as Arc<dyn TensorSource>, true),
            None => (Arc::new(SyntheticTensors::new(&request.catalog)), false),
        };
        let room = system::available_memory().0 / MEMORY_DIVISOR;
        Ok(Self { request, options, architecture, profile, bounds, source, is_own, begin, watch, room })
    }

    pub(super) fn run(mut self) -> Result<Measured, MeasureError> {
        let mut thin = self.load_thin()?;
        let thin_row_s = time(self.until(0.2), || thin.decode(1))?;
        let mut thick = self.load_thick(&thin, thin_row_s)?;
        let (decode, pass_s) = self.time_decode(&mut thin, thick.as_mut(), thin_row_s)?;
        let work = thick.as_ref().map_or(thin.work, |thick| thick.work);
        let load_bytes_per_s = thick.as_ref().map_or(thin.load_bytes_per_s, |thick| thick.load_bytes_per_s);
        drop(thick);
        let per_layer = |work: f64| move |seconds: f64| layers_s(seconds, pass_s) / work;
        let decode = curve(decode, per_layer(work))?;
        let chunk = settled(self.time_chunks(&mut thin)?);
        let (decode_context_s, chunk_context_s) = self.time_context(&mut thin, &decode, &chunk)?;
        let chunk = curve(chunk, per_layer(thin.work))?;
        drop(thin);
        let head = if self.is_own { self.time_head(&decode, pass_s, load_bytes_per_s)? } else { None };
        let slowdown = Throttle::new(self.options.throttle).slowdown();
        let speed = Speed {
            decode: decode.scaled(slowdown),
            chunk: chunk.scaled(slowdown),
            head: head.map(|head| head.scaled(slowdown)),
            pass_s: pass_s * slowdown + FRAME_S,
            decode_context_s: decode_context_s * slowdown,
            chunk_context_s: chunk_context_s * slowdown,
            load_bytes_per_s: 1.0 / (1.0 / load_bytes_per_s + 1.0 / hash_bytes_per_s()),
            source: if self.is_own { SpeedSource::Layers } else { SpeedSource::Shapes },
        };
        Ok(Measured { speed, disturbance: self.watch.end() })
    }

    /// Time until a share of the budget is spent; nothing if it is.
    fn until(&self, share: f64) -> Duration {
        self.options.budget.mul_f64(share).saturating_sub(self.begin.elapsed())
    }

    fn shares(&self) -> Shares {
        if self.is_own { WITH_HEAD } else { OF_LAYERS }
    }

    fn check(&self) -> Result<(), MeasureError> {
        if self.options.cancel.load(Ordering::Relaxed) || super::IS_OVER.load(Ordering::Relaxed) {
            Err(MeasureError::Cancelled)
        } else {
            Ok(())
        }
    }

    /// Layers between two of the bounds.
    fn layers(&self, first: usize, end: usize) -> Result<LayerRange, MeasureError> {
        LayerRange::new(self.bounds[first], self.bounds[end]).map_err(|_| MeasureError::Whole)
    }

    /// What a stage takes in memory, about.
    pub(super) fn memory(&self, view: &StageView, shape: Shape) -> u64 {
        let cells = u64::from(shape.n_ctx).next_multiple_of(256) * u64::from(shape.n_sessions);
        let kv = self.profile.kv_bytes_per_token_of(shape.layers, !self.profile.is_flash);
        let states: u64 = shape.layers.iter().map(|layer| self.architecture.state_bytes(layer)).sum();
        let per_row = (4 * u64::from(self.profile.n_heads)).saturating_mul(shape.n_ctx.into());
        let scores = per_row.saturating_mul(shape.max_rows.into());
        // The engine holds no more of them than this.
        let scores = if scores <= 512 << 20 { scores } else { 0 };
        let logits = if view.is_final() { 4 * u64::from(view.n_vocab()) * u64::from(shape.n_sessions) } else { 0 };
        let row = 4 * (6 * u64::from(self.profile.n_embd) + 3 * u64::from(self.profile.n_ff));
        let states = states.saturating_mul(shape.n_sessions.into());
        let others = states.saturating_add(scores + logits + row * u64::from(shape.max_rows));
        view.weight_bytes().saturating_add(kv.saturating_mul(cells)).saturating_add(others)
    }

    fn load(&mut self, view: &StageView, shape: Shape) -> Result<Bench, MeasureError> {
        self.check()?;
        self.room = self.room.saturating_sub(self.memory(view, shape));
        let work = self.profile.work(shape.layers);
        let n_threads = self.options.threads;
        // What the child computes is not done by others.
        self.watch.pause();
        let is_sound = trial::stage(view, None, &shape.options(view, n_threads));
        self.watch.go_on();
        is_sound?;
        if self.is_own {
            let most = self.options.budget.mul_f64(OWN_LOAD_SHARE);
            let (begin, cancel) = (Instant::now(), &self.options.cancel);
            let mut go_on = |_: f32| begin.elapsed() < most && !cancel.load(Ordering::Relaxed);
            match Bench::load(view, Arc::clone(&self.source), shape, work, n_threads, &mut go_on) {
                Err(LoadError::Cancelled) => {}
                loaded => return Ok(loaded?),
            }
            self.check()?;
            tracing::info!("the disk is too slow to measure this node's own weights; others of their shapes are used");
            self.source = Arc::new(SyntheticTensors::new(&self.request.catalog));
            self.is_own = false;
        }
        let mut go_on = |_: f32| !self.options.cancel.load(Ordering::Relaxed);
        Bench::load(view, Arc::clone(&self.source), shape, work, n_threads, &mut go_on).map_err(|error| match error {
            LoadError::Cancelled => MeasureError::Cancelled,
            error => error.into(),
        })
    }

    /// The place of the thin stage among the bounds: in the middle, and never the last, which has the head.
    fn thin_at(&self) -> Result<usize, MeasureError> {
        let n_pieces = self.bounds.len() - 1;
        if n_pieces < 2 { Err(MeasureError::Whole) } else { Ok((n_pieces / 2).min(n_pieces - 2)) }
    }

    /// The thin stage: its layers, and what it is loaded for.
    pub(super) fn thin(&self) -> Result<(StageView, Shape), MeasureError> {
        let at = self.thin_at()?;
        let layers = self.layers(at, at + 1)?;
        let view = StageView::new(&self.request.catalog, layers)?;
        let n_ctx = self.request.context.max(1);
        let max_rows = self.request.max_rows.clamp(2, 1 << 14);
        Ok((view, Shape { layers, n_ctx, n_sessions: 2, max_rows, kv: self.request.kv }))
    }

    pub(super) fn load_thin(&mut self) -> Result<Bench, MeasureError> {
        let (view, mut shape) = self.thin()?;
        // A context that does not fit is shortened: only its first tokens are used.
        while self.memory(&view, shape) > self.room && shape.n_ctx > 2 * DEPTH {
            shape.n_ctx /= 2;
        }
        let needed = self.memory(&view, shape);
        if needed > self.room {
            return Err(MeasureError::Memory { needed: ByteSize(needed), room: ByteSize(self.room) });
        }
        self.load(&view, shape)
    }

    /// As many layers as time and memory allow, if that is more than the thin stage has.
    fn load_thick(&mut self, thin: &Bench, thin_row_s: f64) -> Result<Option<Bench>, MeasureError> {
        let at = self.thin_at()?;
        let mean_bytes = self.profile.layer_bytes.iter().sum::<u64>() as f64 / f64::from(self.profile.n_layers());
        let by_time = THICK_ROW_S / (thin_row_s / thin.work);
        let by_load = thin.load_bytes_per_s * self.options.budget.as_secs_f64() * THICK_LOAD_SHARE / mean_bytes;
        let most_work = by_time.min(by_load);
        let n_sessions = self.request.sessions.clamp(1, DECODE_ROWS[5]);
        let (n_ctx, kv) = (256.min(self.request.context.max(1)), self.request.kv);
        let shape = |layers| Shape { layers, n_ctx, n_sessions, max_rows: 32, kv };
        let (mut first, mut end) = (at, at + 1);
        let mut best = None;
        // One piece more at the end or the start, as long as that is allowed.
        loop {
            let (more_first, more_end) = if end + 1 < self.bounds.len() - 1 {
                (first, end + 1)
            } else if first > 0 {
                (first - 1, end)
            } else {
                break;
            };
            let layers = self.layers(more_first, more_end)?;
            let view = StageView::new(&self.request.catalog, layers)?;
            let fits = self.memory(&view, shape(layers)) <= self.room && view.weight_bytes() <= MAX_THICK_BYTES;
            if !fits || self.profile.work(layers) > most_work {
                break;
            }
            (first, end) = (more_first, more_end);
            best = Some((view, shape(layers)));
        }
        best.map(|(view, shape)| self.load(&view, shape)).transpose()
    }

    /// Seconds of decode rows in the thick stage, or in the thin one if there is no other; and what a run costs beside
    /// its layers.
    fn time_decode(
        &self,
        thin: &mut Bench,
        thick: Option<&mut Bench>,
        thin_row_s: f64,
    ) -> Result<(Points, f64), MeasureError> {
        let Some(thick) = thick else {
            let rows = decode_rows(self.request.sessions.min(thin.n_sessions()));
            let points = self.time_points(&rows, self.shares().decode, |rows| Ok(thin.decode(rows)?))?;
            return Ok((if points.is_empty() { vec![(1, thin_row_s)] } else { points }, 0.0));
        };
        // In turn, so that each finds the caches as the other left them.
        let mut thin_times = Vec::new();
        let row_s = time(self.until(self.shares().decode / 2.0), || {
            thin_times.push(thin.decode(1)?);
            thick.decode(1)
        })?;
        let thin_row_s = undisturbed(&mut thin_times);
        let rows = decode_rows(self.request.sessions);
        let mut points = self.time_points(&rows[1..], self.shares().decode, |rows| Ok(thick.decode(rows)?))?;
        points.push((1, row_s));
        let points = settled(points);
        // More layers take no less time than fewer.
        let row_s = points[0].1;
        let thin_row_s = thin_row_s.min(row_s);
        let layer_s = (row_s - thin_row_s) / (thick.work - thin.work).max(f64::MIN_POSITIVE);
        let pass_s = (thin_row_s - layer_s * thin.work).clamp(0.0, thin_row_s * MOST_PASS_SHARE);
        Ok((points, pass_s))
    }

    /// Seconds of a chunk in the thin stage.
    fn time_chunks(&self, thin: &mut Bench) -> Result<Points, MeasureError> {
        let most_rows = thin.max_rows().min(thin.n_ctx);
        let rows: Vec<u32> = CHUNK_ROWS.into_iter().filter(|rows| *rows <= most_rows).collect();
        let points = self.time_points(&rows, self.shares().chunks, |rows| Ok(thin.rows_behind(0, 0, rows)?))?;
        if points.is_empty() {
            // The shortest chunk, whatever it takes.
            let rows = 2.min(most_rows);
            return Ok(vec![(rows, thin.rows_behind(0, 0, rows)?)]);
        }
        Ok(points)
    }

    /// Times `run` for each number of rows, as far as there is time until a share of the budget is spent. Each gets an
    /// even part of what is left.
    fn time_points(
        &self,
        rows: &[u32],
        until: f64,
        mut run: impl FnMut(u32) -> Result<f64, MeasureError>,
    ) -> Result<Points, MeasureError> {
        let mut points = Points::new();
        for (i, &n_rows) in rows.iter().enumerate() {
            self.check()?;
            let left = self.until(until);
            let expected = expected(&points, n_rows);
            if expected >= left.as_secs_f64() {
                continue;
            }
            let part = left.div_f64((rows.len() - i) as f64).as_secs_f64();
            // Long runs are steady, so one and a warm-up are better than none.
            let most = Duration::from_secs_f64(part.max((2.5 * expected).min(left.as_secs_f64())));
            points.push((n_rows, time(most, || run(n_rows))?));
        }
        Ok(points)
    }

    /// What tokens before a row cost in the thin stage, for each: of decode rows and of chunks. `decode` is by layers,
    /// `chunk` by runs.
    fn time_context(&self, thin: &mut Bench, decode: &Curve, chunk: &Points) -> Result<(f64, f64), MeasureError> {
        let estimate = self.context_by_size(decode);
        let most_rows = thin.max_rows().min(CHUNK_ROWS[2]);
        // The stage's context may be shorter than that of the deployment.
        let depth = DEPTH.min(thin.n_ctx / 2);
        // Rows of the chunk that is timed behind them.
        let at = chunk.iter().find(|(rows, _)| *rows == CHUNK_ROWS[0]).or_else(|| chunk.last());
        // Each run would be deeper than the one before where none can be taken back.
        let can_measure = depth >= 64 && thin.can_rewind();
        let (Some(&(rows, flat_s)), true) = (at, can_measure) else { return Ok(estimate) };
        if flat_s / f64::from(rows) * f64::from(depth) * 1.5 > self.until(self.shares().context).as_secs_f64() {
            return Ok(estimate);
        }
        let mut keep = 0;
        while keep < depth {
            let n_rows = most_rows.min(depth - keep).max(1);
            thin.rows_behind(0, keep, n_rows)?;
            keep += n_rows;
        }
        let rows = rows.min(thin.n_ctx - depth);
        let deep_s = time(self.until(self.shares().context).mul_f64(0.7), || thin.rows_behind(0, depth, rows))?;
        let chunk_s = (deep_s - flat_s).max(0.0) / f64::from(depth) / f64::from(rows) / thin.work;
        // In turn with a row that has nothing before it, as what is looked for is small.
        let (mut deep, mut flat) = (Vec::new(), Vec::new());
        time(self.until(self.shares().context), || {
            let both = (thin.rows_behind(0, depth, 1)?, thin.rows_behind(1, 0, 1)?);
            deep.push(both.0);
            flat.push(both.1);
            Ok::<_, MeasureError>(both.0 + both.1)
        })?;
        let decode_s = undisturbed(&mut deep) - undisturbed(&mut flat);
        Ok((decode_s.max(0.0) / f64::from(depth) / thin.work, chunk_s))
    }

    /// The price of context where there is no time to measure it: KV caches are read as fast as weights.
    fn context_by_size(&self, decode: &Curve) -> (f64, f64) {
        let n_layers = f64::from(self.profile.n_layers());
        let mean = |all: &[u64]| all.iter().sum::<u64>() as f64 / n_layers;
        let experts = self.profile.expert_bytes as f64 / n_layers;
        let unused = 1.0 - f64::from(self.profile.n_experts_used) / f64::from(self.profile.n_experts.max(1));
        let bytes_per_s = (mean(&self.profile.layer_bytes) - experts * unused) / decode.at(1.0).max(1e-9);
        let decode_s = mean(&self.profile.kv_bytes_per_token) / bytes_per_s.max(1.0);
        // Rows of a chunk share what is read.
        (decode_s, decode_s / 4.0)
    }

    /// Seconds of the head by rows: those of the last layers with it, without what they cost by themselves.
    fn time_head(&mut self, decode: &Curve, pass_s: f64, load_bytes_per_s: f64) -> Result<Option<Curve>, MeasureError> {
        let n_pieces = self.bounds.len() - 1;
        let layers = self.layers(n_pieces - 1, n_pieces)?;
        let view = StageView::new(&self.request.catalog, layers)?;
        let n_sessions = self.request.sessions.clamp(1, HEAD_ROWS[2]);
        let (n_ctx, kv) = (256.min(self.request.context.max(1)), self.request.kv);
        let shape = Shape { layers, n_ctx, n_sessions, max_rows: n_sessions, kv };
        // The two stages before are gone.
        self.room = system::available_memory().0 / MEMORY_DIVISOR;
        let load_s = view.weight_bytes() as f64 / load_bytes_per_s;
        if self.memory(&view, shape) > self.room || load_s > self.until(1.0).as_secs_f64() {
            return Ok(None);
        }
        let mut tail = self.load(&view, shape)?;
        let greedy = Sampling { temperature: 0.0, ..Sampling::default() };
        let mut sampler =
            Sampler::new(&greedy, view.n_vocab()).map_err(|error| MeasureError::Run(error.to_string()))?;
        let n_vocab = view.n_vocab().max(1) as usize;
        let mut rows: Vec<u32> = HEAD_ROWS.into_iter().filter(|rows| *rows <= n_sessions).collect();
        if !rows.contains(&n_sessions) {
            rows.push(n_sessions);
        }
        let points = self.time_points(&rows, 1.0, |rows| {
            let run_s = tail.decode(rows)?;
            let begin = Instant::now();
            for logits in tail.out.chunks_exact(n_vocab) {
                let _ = std::hint::black_box(sampler.sample(logits, 0));
            }
            let layers_s = pass_s + tail.work * decode.at(rows.into());
            Ok(run_s + begin.elapsed().as_secs_f64() - layers_s)
        })?;
        // Where the layers alone seem to have taken longer, one of the two was disturbed.
        let is_sound = !points.is_empty() && points.iter().all(|(_, seconds)| *seconds > 0.0);
        if is_sound { curve(points, |seconds| seconds).map(Some) } else { Ok(None) }
    }
}
