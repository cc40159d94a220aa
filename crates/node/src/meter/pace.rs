//! How long stages take compared with what was measured beforehand, so that a machine that has become slower is seen.
//!
//! For each stage the times that it computed are summed up, and those that it was expected to compute for the same
//! rows. Both sums fade, so their ratio is that of the last seconds.

use std::time::{Duration, Instant};

use brigade_base::NodeId;
use brigade_plan::{ModelProfile, Speed};
use brigade_protocol::schedule::PassRows;

use super::pass::Span;

/// What has happened so long ago counts a third: a change is seen within half a minute of work, and a hiccup is not
/// taken for one.
const FADE: Duration = Duration::from_secs(10);

/// Less computing than this says nothing.
const TELLING_S: f64 = 1.0;

/// What a placement is expected to take.
#[derive(Debug, Clone)]
pub struct Expected {
    /// The model.
    pub model: ModelProfile,
    /// The stages in ring order.
    pub stages: Vec<ExpectedStage>,
}

/// A stage of which something is expected.
#[derive(Debug, Clone)]
pub struct ExpectedStage {
    /// Who serves it.
    pub node: NodeId,
    /// How fast that was measured to be; `None` where it is not known.
    pub speed: Option<Speed>,
    /// Its layers as a multiple of the mean layer.
    pub work: f64,
}

impl Expected {
    /// Seconds of stage `k` for these rows.
    fn seconds(&self, k: usize, rows: &[PassRows]) -> Option<f64> {
        let ExpectedStage { speed: Some(speed), work, .. } = self.stages.get(k)? else { return None };
        let (mut layer_s, mut n_decode) = (0.0, 0.0);
        for of in rows {
            let (n, before) = (f64::from(of.n_rows), f64::from(of.before));
            if of.n_rows == 1 {
                n_decode += 1.0;
                layer_s += before * speed.decode_context_s;
            } else {
                layer_s += speed.chunk.at(n) + n * before * speed.chunk_context_s;
            }
        }
        if n_decode > 0.0 {
            layer_s += speed.decode.at(n_decode);
        }
        let n_outputs = n_decode.max(1.0);
        let head_s = if k + 1 == self.stages.len() { speed.head_s(&self.model, n_outputs) } else { 0.0 };
        Some(work * layer_s + head_s)
    }
}

/// Sums of one stage, in seconds.
#[derive(Debug, Clone, Copy, Default)]
struct Sum {
    computed: f64,
    expected: f64,
}

/// What the stages of a placement took and were expected to take.
#[derive(Debug, Default)]
pub struct Paces {
    expected: Option<Expected>,
    sums: Vec<Sum>,
    faded: Option<Instant>,
}

impl Paces {
    /// Nothing has happened yet in a placement of which this is expected.
    pub fn new(expected: Option<Expected>) -> Self {
        let n_stages = expected.as_ref().map_or(0, |expected| expected.stages.len());
        Self { expected, sums: vec![Sum::default(); n_stages], faded: None }
    }

    /// A pass with these rows took the stages so long.
    pub fn add(&mut self, now: Instant, rows: &[PassRows], spans: &[Span]) {
        let Some(expected) = self.expected.as_ref().filter(|_| !rows.is_empty()) else { return };
        let faded = self.faded.replace(now).unwrap_or(now);
        let fading = (-now.saturating_duration_since(faded).as_secs_f64() / FADE.as_secs_f64()).exp();
        for (k, (sum, span)) in self.sums.iter_mut().zip(spans).enumerate() {
            // Of frames that were computed together nobody knows what each took.
            let seconds = expected.seconds(k, rows).filter(|_| span.frames <= 1);
            sum.computed = sum.computed * fading + seconds.map_or(0.0, |_| f64::from(span.compute) / 1e6);
            sum.expected = sum.expected * fading + seconds.unwrap_or(0.0);
        }
    }

    /// How many times as long as expected each stage takes, by who serves it; `None` where too little was computed to
    /// tell.
    pub fn factors(&self) -> Vec<(NodeId, Option<f64>)> {
        let stages = self.expected.iter().flat_map(|expected| &expected.stages);
        stages.zip(&self.sums).map(|(stage, sum)| (stage.node, sum.factor())).collect()
    }
}

impl Sum {
    fn factor(&self) -> Option<f64> {
        (self.computed >= TELLING_S && self.expected > 0.0).then(|| self.computed / self.expected)
    }
}

#[cfg(test)]
mod tests {
    use brigade_base::SessionId;
    use brigade_plan::{Curve, SpeedSource};

    use super::*;

    /// A mean layer takes 10 ms, for a chunk 1 ms for each row; a token before a row 1 us.
    fn speed() -> Speed {
        let curve = |points: &[(u32, f64)]| Curve::new(points.to_vec()).unwrap();
        Speed {
            decode: curve(&[(1, 0.01), (2, 0.01)]),
            chunk: curve(&[(1, 0.001), (2, 0.002)]),
            head: Some(curve(&[(1, 0.005), (2, 0.005)])),
            pass_s: 0.0,
            decode_context_s: 1e-6,
            chunk_context_s: 1e-6,
            load_bytes_per_s: 1e9,
            source: SpeedSource::Layers,
        }
    }

    fn rows(n_rows: u32, before: u32) -> PassRows {
        PassRows { session: SessionId(1), n_rows, is_prompt: n_rows > 1, before }
    }

    fn paces() -> Paces {
        let model = ModelProfile { layer_bytes: vec![1; 4], ..ModelProfile::default() };
        let stage = |n: u8, speed, work| ExpectedStage { node: NodeId::from_bytes([n; 32]), speed, work };
        let stages = vec![stage(1, Some(speed()), 2.0), stage(2, None, 1.0), stage(3, Some(speed()), 1.0)];
        Paces::new(Some(Expected { model, stages }))
    }

    fn factors(paces: &Paces) -> Vec<Option<f64>> {
        paces.factors().into_iter().map(|(_, factor)| factor).collect()
    }

    fn spans(ms: [u32; 3]) -> Vec<Span> {
        ms.map(|ms| Span { compute: ms * 1000, frames: 1, ..Span::default() }).to_vec()
    }

    #[test]
    fn rows_take_what_was_measured() {
        let paces = paces();
        let expected = paces.expected.as_ref().unwrap();
        let ms = |k, rows: &[PassRows]| expected.seconds(k, rows).map(|s| (s * 1e6).round() / 1e3);
        assert_eq!(ms(0, &[rows(1, 0)]), Some(20.0));
        assert_eq!(ms(0, &[rows(1, 1000), rows(1, 0)]), Some(22.0));
        assert_eq!(ms(0, &[rows(100, 0), rows(1, 0)]), Some(220.0));
        assert_eq!(ms(1, &[rows(1, 0)]), None);
        assert_eq!(ms(2, &[rows(1, 0)]), Some(15.0));
    }

    #[test]
    fn a_stage_that_becomes_slow_is_seen_within_seconds_of_work() {
        let (mut paces, mut now) = (paces(), Instant::now());
        assert_eq!(factors(&paces), [None, None, None]);
        let mut run = |paces: &mut Paces, seconds: u32, ms: [u32; 3]| {
            for _ in 0..seconds * 10 {
                now += Duration::from_millis(100);
                paces.add(now, &[rows(1, 0)], &spans(ms));
            }
            factors(paces)[0]
        };
        assert!((run(&mut paces, 20, [20, 1, 15]).unwrap() - 1.0).abs() < 1e-9);
        assert!(run(&mut paces, 2, [80, 1, 15]).unwrap() < 1.8, "a hiccup");
        assert!(run(&mut paces, 20, [80, 1, 15]).unwrap() > 3.0);
        assert!(run(&mut paces, 60, [800, 1, 15]).unwrap() > 30.0, "a machine that swaps");
        assert!((factors(&paces)[2].unwrap() - 1.0).abs() < 1e-9);
    }

    #[test]
    fn frames_that_were_computed_together_say_nothing() {
        let mut paces = paces();
        let now = Instant::now();
        let together = |mut spans: Vec<Span>| {
            spans.iter_mut().for_each(|span| span.frames = 2);
            spans
        };
        (0..1000).for_each(|_| paces.add(now, &[rows(1, 0)], &together(spans([20, 1, 15]))));
        assert_eq!(factors(&paces), [None, None, None]);
    }
}
