//! Statistics of measurements, as they are reported.

use serde::Serialize;

/// A number that was measured once in each run.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Spread {
    /// Mean of the runs.
    pub mean: f64,
    /// Standard deviation between runs (of a sample: n - 1); 0 for one run.
    pub sd: f64,
}

impl Spread {
    /// Of one number from each run; `None` without any.
    pub fn of(runs: &[f64]) -> Option<Self> {
        let mean = mean(runs)?;
        Some(Self { mean: rounded(mean), sd: rounded(deviation(runs, mean)) })
    }
}

/// Times of which each run has many.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Times {
    /// Mean of all.
    pub mean: f64,
    /// Standard deviation between the means of the runs.
    pub sd: f64,
    /// Half of all are shorter.
    pub p50: f64,
    /// One in a hundred is longer.
    pub p99: f64,
    /// The longest.
    pub max: f64,
}

impl Times {
    /// Of the times of each run, in any unit; `None` without any.
    pub fn of(runs: &[Vec<f64>]) -> Option<Self> {
        let mut all: Vec<f64> = runs.concat();
        all.sort_by(f64::total_cmp);
        let means: Vec<f64> = runs.iter().filter_map(|run| mean(run)).collect();
        Some(Self {
            mean: rounded(mean(&all)?),
            sd: rounded(deviation(&means, mean(&means)?)),
            p50: rounded(percentile(&all, 50.0)?),
            p99: rounded(percentile(&all, 99.0)?),
            max: rounded(*all.last()?),
        })
    }
}

/// The mean; `None` of nothing.
pub fn mean(values: &[f64]) -> Option<f64> {
    (!values.is_empty()).then(|| values.iter().sum::<f64>() / values.len() as f64)
}

fn deviation(values: &[f64], mean: f64) -> f64 {
    if values.len() < 2 {
        return 0.0;
    }
    let squares: f64 = values.iter().map(|value| (value - mean).powi(2)).sum();
    (squares / (values.len() - 1) as f64).sqrt()
}

/// The value below which `percent` of the sorted values lie, between two of them by proportion, as numpy has it.
fn percentile(sorted: &[f64], percent: f64) -> Option<f64> {
    let place = percent / 100.0 * sorted.len().checked_sub(1)? as f64;
    let (below, above) = (sorted[place.floor() as usize], sorted[place.ceil() as usize]);
    Some(below + (above - below) * place.fract())
}

/// A thousandth is less than any clock here tells apart from run to run; more digits only look exact.
fn rounded(value: f64) -> f64 {
    (value * 1000.0).round() / 1000.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spreads_of_few_runs() {
        assert_eq!(Spread::of(&[]), None);
        assert_eq!(Spread::of(&[3.0]), Some(Spread { mean: 3.0, sd: 0.0 }));
        assert_eq!(Spread::of(&[1.0, 2.0, 3.0]), Some(Spread { mean: 2.0, sd: 1.0 }));
        assert_eq!(Spread::of(&[0.0, 1.0]), Some(Spread { mean: 0.5, sd: 0.707 }));
    }

    #[test]
    fn percentiles_lie_between_values() {
        let sorted: Vec<f64> = (0..=100).map(f64::from).collect();
        assert_eq!((percentile(&sorted, 50.0), percentile(&sorted, 99.0)), (Some(50.0), Some(99.0)));
        assert_eq!(percentile(&[1.0, 2.0], 50.0), Some(1.5));
        assert_eq!((percentile(&[4.0], 99.0), percentile(&[], 50.0)), (Some(4.0), None));
    }

    #[test]
    fn times_pool_the_runs_and_compare_their_means() {
        let times = Times::of(&[vec![1.0, 3.0], vec![], vec![5.0, 7.0]]).unwrap();
        assert_eq!(times, Times { mean: 4.0, sd: 2.828, p50: 4.0, p99: 6.94, max: 7.0 });
        assert_eq!(Times::of(&[vec![], vec![]]), None);
    }
}
