//! Results of two runs of the same script side by side.

use super::script::Script;

/// Largest error of a result that will do, as a share of the largest value of its row. Where the bits differ, sums of
/// some thousand products were rounded in another order: 2^-24 times the root of their number is below 1e-5, and a
/// model has some ten such sums one behind the other.
pub const MAX_ERROR: f64 = 1e-4;

/// Values beyond this are marks, not results: some graphs put the least number there is in place of tokens that are
/// never to be chosen.
const MARK: f32 = 1e30;

/// How far the results of a run are from those of the whole.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Comparison {
    /// Results that were compared.
    pub n_results: u32,
    /// Results that have other bits.
    pub n_other: u32,
    /// Results whose largest value is at another place: the greedy choice is another token.
    pub n_other_tokens: u32,
    /// Largest error, as a share of the largest value of its result; infinite where a value is finite in one run only.
    pub error: f64,
    /// Session and position of that result.
    pub worst: Option<(u32, u32)>,
}

impl Comparison {
    /// Whether all bits are the same.
    pub fn is_exact(&self) -> bool {
        self.n_other == 0
    }

    /// Whether all greedy choices are the same and no error is above [`MAX_ERROR`].
    pub fn is_close(&self) -> bool {
        self.n_other_tokens == 0 && self.error <= MAX_ERROR
    }
}

/// Compares results, which have the same widths; for each pass those of its rows with output, one behind the other.
pub(super) fn compare(script: &Script, wanted: &[Vec<f32>], found: &[Vec<f32>]) -> Comparison {
    let mut all = Comparison { n_results: 0, n_other: 0, n_other_tokens: 0, error: 0.0, worst: None };
    for (pass, (wanted, found)) in script.passes.iter().zip(wanted.iter().zip(found)) {
        let outputs: Vec<_> = pass.rows.iter().filter(|row| row.output).collect();
        let width = (wanted.len() / outputs.len().max(1)).max(1);
        let is_other_width = wanted.len() != found.len();
        for (row, (wanted, found)) in outputs.iter().zip(wanted.chunks(width).zip(found.chunks(width))) {
            all.n_results += 1;
            if !is_other_width && wanted.iter().map(|x| x.to_bits()).eq(found.iter().map(|x| x.to_bits())) {
                continue;
            }
            all.n_other += 1;
            all.n_other_tokens += u32::from(likeliest(wanted) != likeliest(found));
            let error = if is_other_width { f64::INFINITY } else { error_of(wanted, found) };
            if error > all.error || all.worst.is_none() {
                all.error = error;
                all.worst = Some((row.slot, row.position));
            }
        }
    }
    all
}

/// The first of the largest values.
fn likeliest(values: &[f32]) -> Option<usize> {
    let mut best: Option<usize> = None;
    for (idx, value) in values.iter().enumerate() {
        if !value.is_nan() && best.is_none_or(|best| *value > values[best]) {
            best = Some(idx);
        }
    }
    best
}

fn error_of(wanted: &[f32], found: &[f32]) -> f64 {
    let is_value = |x: f32| x.is_finite() && x.abs() < MARK;
    let largest = wanted.iter().filter(|x| is_value(**x)).fold(f32::MIN_POSITIVE, |most, x| most.max(x.abs()));
    let error = |(a, b): (&f32, &f32)| match () {
        () if a.to_bits() == b.to_bits() => 0.0,
        () if is_value(*a) && is_value(*b) => (f64::from(*a) - f64::from(*b)).abs() / f64::from(largest),
        () => f64::INFINITY,
    };
    wanted.iter().zip(found).map(error).fold(0.0, f64::max)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(wanted: [f32; 3], found: [f32; 3]) -> Comparison {
        let mut script = Script::of_texts(3, 10, 1);
        script.passes.truncate(1);
        compare(&script, &[wanted.to_vec()], &[found.to_vec()])
    }

    #[test]
    fn bits_tokens_and_errors_are_told_apart() {
        let one = [1.0, 2.0, -4.0];
        assert!(check(one, one).is_exact());
        let near = check(one, [1.0, 2.000_1, -4.0]);
        assert!(!near.is_exact() && near.is_close() && near.error > 1e-5, "{near:?}");
        assert_eq!(near.worst, Some((0, 2)));
        assert!(!check(one, [1.0, 2.01, -4.0]).is_close());
        let other = check([1.0, 1.000_01, -4.0], [1.000_01, 1.0, -4.0]);
        assert!(other.error < MAX_ERROR && other.n_other_tokens == 1 && !other.is_close());
    }

    #[test]
    fn marks_and_what_is_no_number_must_be_the_same() {
        let marks = [f32::MIN, f32::NAN, 1.0];
        assert!(check(marks, marks).is_exact());
        let near = check(marks, [f32::MIN, f32::NAN, 1.000_01]);
        assert!(near.is_close() && near.error > 0.0, "{near:?}");
        assert_eq!(check(marks, [f32::MIN, 1.0, 1.0]).error, f64::INFINITY);
    }
}
