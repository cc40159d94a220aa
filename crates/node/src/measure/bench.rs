//! A stage that is computed for its time alone: hidden states that mean nothing, through the engine as in production.
//!
//! [`Bench`] owns the stage. Rows go through [`PassRunner::run`], as those of every pass do; filling the rows in is not
//! timed.

use std::sync::Arc;
use std::time::{Duration, Instant};

use brigade_base::{KvTypes, LayerRange};
use brigade_engine::{LoadError, Stage, StageOptions};
use brigade_gguf::{StageView, TensorSource};
use brigade_protocol::frame::RowSet;

use crate::images::Images;
use crate::loaded::check_positions;
use crate::sizes::{StageShape, stage_options};
use crate::stage_pass::{PassError, PassRunner};

/// Most runs of which the lower quartile is taken: enough that three that were disturbed do not count.
const MOST_RUNS: usize = 5;

/// Most runs where they differ much: between what other programs compute there will be a moment for one of these.
const MOST_UNSTEADY_RUNS: usize = 20;

/// Runs whose lower quartile is at most so many times the shortest are steady. On a machine that computes nothing else
/// it is a few percent.
const STEADY: f64 = 1.1;

/// A stage and what to feed it.
pub(super) struct Bench {
    runner: PassRunner,
    /// Its layers as a multiple of the model's mean layer.
    pub(super) work: f64,
    /// Most tokens of a session.
    pub(super) n_ctx: u32,
    /// `[max_rows, n_embd]`.
    template: Vec<f32>,
    hidden: Vec<f32>,
    pub(super) out: Vec<f32>,
    sets: Vec<RowSet>,
    /// Bytes that were read in a second while it was loaded.
    pub(super) load_bytes_per_s: f64,
}

/// What a bench is loaded for.
#[derive(Debug, Clone, Copy)]
pub(super) struct Shape {
    pub(super) layers: LayerRange,
    pub(super) n_ctx: u32,
    pub(super) n_sessions: u32,
    pub(super) max_rows: u32,
    pub(super) kv: KvTypes,
}

impl Shape {
    /// The options with which it is loaded.
    pub(super) fn options(&self, view: &StageView, n_threads: u32) -> StageOptions {
        let &Self { n_ctx, n_sessions, max_rows, kv, .. } = self;
        stage_options(view, StageShape { n_ctx, n_sessions, max_rows, kv, pooling: None }, n_threads)
    }
}

impl Bench {
    /// Loads a view's layers, which count as `work` mean layers; `go_on` hears the loaded share.
    pub(super) fn load(
        view: &StageView,
        source: Arc<dyn TensorSource>,
        shape: Shape,
        work: f64,
        n_threads: u32,
        go_on: &mut dyn FnMut(f32) -> bool,
    ) -> Result<Self, LoadError> {
        check_positions(view, shape.n_ctx)?;
        let options = shape.options(view, n_threads);
        let begin = Instant::now();
        let stage = Stage::load(Box::new(view.reader(source)), view.n_bytes(), options, go_on)?;
        let load_bytes_per_s = view.weight_bytes() as f64 / begin.elapsed().as_secs_f64().max(1e-6);
        let mut runner = PassRunner::new(stage, view.input_scale(), shape.n_sessions, Images::off());
        runner.set_takes_tokens(view.takes_tokens());
        let n_values = shape.max_rows as usize * view.n_embd() as usize;
        // Zeros are rows of the first token.
        let value = |index| if view.takes_tokens() { 0.0 } else { hidden_value(index) };
        Ok(Self {
            runner,
            work,
            n_ctx: shape.n_ctx,
            template: (0..n_values as u32).map(value).collect(),
            hidden: Vec::new(),
            out: Vec::new(),
            sets: Vec::new(),
            load_bytes_per_s,
        })
    }

    /// Most rows of a run.
    pub(super) fn max_rows(&self) -> u32 {
        self.runner.stage().options().max_rows
    }

    /// Most sessions.
    pub(super) fn n_sessions(&self) -> u32 {
        self.runner.stage().options().n_sessions
    }

    /// Whether [`rows_behind`](Self::rows_behind) takes fewer tokens than the slot holds, but for none.
    pub(super) fn can_rewind(&self) -> bool {
        self.runner.stage().can_rewind()
    }

    /// Seconds of a run of `n_rows` decode rows, each in a slot of its own behind what the slot holds. A final stage
    /// yields logits for all.
    pub(super) fn decode(&mut self, n_rows: u32) -> Result<f64, PassError> {
        self.sets.clear();
        for slot in 0..n_rows {
            let len = self.runner.stage().len(slot);
            let keep = if len < self.n_ctx { len } else { 0 };
            self.sets.push(RowSet { slot, keep, n_rows: 1, n_outputs: 1 });
        }
        self.run(n_rows)
    }

    /// Seconds of a run of `n_rows` rows of a slot behind its first `keep` tokens; a single one is a decode row.
    pub(super) fn rows_behind(&mut self, slot: u32, keep: u32, n_rows: u32) -> Result<f64, PassError> {
        self.sets.clear();
        self.sets.push(RowSet { slot, keep, n_rows, n_outputs: 0 });
        self.run(n_rows)
    }

    fn run(&mut self, n_rows: u32) -> Result<f64, PassError> {
        let n_values = n_rows as usize * self.runner.stage().n_embd() as usize;
        self.hidden.clear();
        self.hidden.extend_from_slice(&self.template[..n_values.min(self.template.len())]);
        let begin = Instant::now();
        self.runner.run(&self.sets, &mut self.hidden, &mut self.out)?;
        Ok(begin.elapsed().as_secs_f64())
    }
}

/// A number between -1 and 1; neighbours have nothing to do with each other.
fn hidden_value(index: u32) -> f32 {
    let mixed = (index ^ (index >> 15)).wrapping_mul(0x2c1b_3c6d);
    let mixed = (mixed ^ (mixed >> 12)).wrapping_mul(0x297a_2d39);
    (mixed >> 8) as f32 / (1u32 << 23) as f32 - 1.0
}

/// What a run takes where nothing disturbs it, by runs within `most`: more of them as long as they are not steady. The
/// first one warms up and counts only where there is no time for another.
pub(super) fn time<E>(most: Duration, mut run: impl FnMut() -> Result<f64, E>) -> Result<f64, E> {
    let begin = Instant::now();
    let first = run()?;
    let mut times = Vec::with_capacity(MOST_UNSTEADY_RUNS);
    while wants_more(&mut times) && begin.elapsed().as_secs_f64() + first < most.as_secs_f64() {
        times.push(run()?);
    }
    Ok(if times.is_empty() { first } else { undisturbed(&mut times) })
}

/// Whether these times are too few to be believed. Sorts them.
fn wants_more(times: &mut [f64]) -> bool {
    times.len() < MOST_RUNS || (times.len() < MOST_UNSTEADY_RUNS && lower_quartile(times) > STEADY * times[0])
}

/// The lower quartile of some times, 0 of none; sorts them.
fn lower_quartile(times: &mut [f64]) -> f64 {
    times.sort_by(f64::total_cmp);
    times.get(times.len() / 4).copied().unwrap_or(0.0)
}

/// What a run takes where nothing disturbs it, by some times, 0 of none: what disturbs a run makes it longer, never
/// shorter. That is the lower quartile where they are steady, and close to the shortest where they are not.
pub(super) fn undisturbed(times: &mut [f64]) -> f64 {
    let quartile = lower_quartile(times);
    times.first().map_or(0.0, |shortest| quartile.min(STEADY * shortest))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_run_warms_up_and_counts_only_alone() {
        let mut times = [9.0, 2.0, 3.0, 2.1, 5.0, 4.0].into_iter();
        let next = || Ok::<_, ()>(times.next().unwrap());
        assert_eq!(time(Duration::from_secs(3600), next), Ok(2.1), "the lower quartile of five");
        assert_eq!(time(Duration::ZERO, || Ok::<_, ()>(7.0)), Ok(7.0));
        assert_eq!(time(Duration::from_secs(1), || Err::<f64, _>("no")), Err("no"));
    }

    #[test]
    fn a_disturbed_machine_is_measured_for_longer() {
        let hour = Duration::from_secs(3600);
        // One run of four is left alone, and the first five are not.
        let mut n_runs = 0;
        let mut next = || {
            n_runs += 1;
            Ok::<_, ()>(if n_runs > 6 && n_runs % 4 == 0 { 1.0 } else { 5.0 + f64::from(7 * n_runs % 11) })
        };
        let seconds = time(hour, &mut next).unwrap();
        assert!((1.0..=STEADY).contains(&seconds), "{seconds}");
        assert!((7..=1 + MOST_UNSTEADY_RUNS as u32).contains(&n_runs), "{n_runs}");
        // It ends all the same where nothing ever is.
        let mut n_runs = 0;
        let mut next = || {
            n_runs += 1;
            Ok::<_, ()>(0.5f64.powi(n_runs))
        };
        assert!(time(hour, &mut next).is_ok() && n_runs == 1 + MOST_UNSTEADY_RUNS as i32, "{n_runs}");
        assert_eq!(undisturbed(&mut []), 0.0);
    }

    #[test]
    fn hidden_values_are_all_over_the_place() {
        let values: Vec<f32> = (0..4096).map(hidden_value).collect();
        assert!(values.iter().all(|v| (-1.0..=1.0).contains(v)));
        let mean = values.iter().sum::<f32>() / 4096.0;
        assert!(mean.abs() < 0.05, "{mean}");
    }
}
