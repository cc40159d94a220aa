//! Choosing the next token from logits.
//!
//! The order is llama.cpp's: bias, penalties, `top_k`, `top_p`, `min_p`, then temperature, so that the filters look at
//! the model's own probabilities. The random choice is a pure function of seed and position: a session that is replayed
//! on other machines chooses the same tokens.
//!
//! A vocabulary has up to 256 thousand tokens, of which a filter keeps a few. So tokens are first counted in buckets by
//! their distance to the best; only those in buckets that can matter are sorted.

use std::cmp::Ordering;
use std::collections::{HashMap, VecDeque};

use brigade_base::Token;

use crate::sampling::{Sampling, SamplingError};

/// Buckets of the first cut: 1/32 nat wide, so that they reach 64 nats below the best, where probabilities are below
/// 1e-27. The last one takes all that is further away.
const N_BUCKETS: usize = 2048;

/// Buckets in a nat.
const BUCKETS_PER_NAT: f32 = 32.0;

/// Logits are looked at so many at a time for what is no number: few enough for the nearest cache, and all of them
/// before the first branch, so that the processor compares several at once.
const CHUNK: usize = 1024;

/// No token can be chosen from a model's values.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the model gave values that are no numbers")]
pub struct NoNumbers;

/// Chooses tokens for one session.
#[derive(Debug, Clone)]
pub struct Sampler {
    sampling: Sampling,
    n_vocab: usize,
    /// The last tokens, as many as the penalties look at.
    recent: VecDeque<Token>,
    /// How often each of them is among these.
    counts: HashMap<Token, u32>,
    // Buffers, kept for the next token.
    scores: Vec<f32>,
    candidates: Vec<Candidate>,
    buckets: Vec<f64>,
}

#[derive(Debug, Clone, Copy)]
struct Candidate {
    token: Token,
    score: f32,
}

impl Sampler {
    /// A sampler for logits of `n_vocab` tokens, before the first token.
    ///
    /// # Errors
    /// If a parameter is out of its range.
    pub fn new(sampling: &Sampling, n_vocab: u32) -> Result<Self, SamplingError> {
        sampling.validate(n_vocab)?;
        Ok(Self {
            sampling: sampling.clone(),
            n_vocab: n_vocab as usize,
            recent: VecDeque::new(),
            counts: HashMap::new(),
            scores: Vec::new(),
            candidates: Vec::new(),
            buckets: Vec::new(),
        })
    }

    /// Chooses the token at `position` of the session from its `logits`, `[n_vocab]`. The same logits, history and
    /// position give the same token. A missing or superfluous logit is as good as none.
    ///
    /// The token does not enter the history: that is what [`Sampler::accept`] is for.
    ///
    /// # Errors
    /// If a logit is not a number, or none is finite: the weights are broken, or what computed with them.
    pub fn sample(&mut self, logits: &[f32], position: u32) -> Result<Token, NoNumbers> {
        let logits = &logits[..logits.len().min(self.n_vocab)];
        if !are_numbers(logits) {
            return Err(NoNumbers);
        }
        if self.sampling.temperature == 0.0 && self.counts.is_empty() && self.sampling.logit_bias.is_empty() {
            return Ok(likeliest(logits).0);
        }
        self.score(logits);
        let (best, max) = likeliest(&self.scores);
        if self.sampling.temperature == 0.0 || max == f32::NEG_INFINITY {
            return Ok(best);
        }
        self.shortlist(max);
        self.filter();
        Ok(self.choose(max, uniform(self.sampling.seed, position)))
    }

    /// Tells the sampler that `token` was generated, for the penalties.
    pub fn accept(&mut self, token: Token) {
        if !self.sampling.penalises() {
            return;
        }
        if self.recent.len() == self.sampling.penalty_window as usize
            && let Some(oldest) = self.recent.pop_front()
            && let Some(count) = self.counts.get_mut(&oldest)
        {
            *count -= 1;
            if *count == 0 {
                self.counts.remove(&oldest);
            }
        }
        self.recent.push_back(token);
        *self.counts.entry(token).or_insert(0) += 1;
    }

    /// Copies the logits, which become scores by biases and penalties.
    fn score(&mut self, logits: &[f32]) {
        let Self { sampling, scores, counts, .. } = self;
        scores.clear();
        scores.extend(logits.iter().map(|&logit| usable(logit)));
        for &(token, bias) in &sampling.logit_bias {
            if let Some(score) = scores.get_mut(token as usize) {
                *score = usable(*score + bias);
            }
        }
        for (&token, &count) in counts.iter() {
            let Some(score) = usize::try_from(token).ok().and_then(|token| scores.get_mut(token)) else { continue };
            let factor = if *score > 0.0 { 1.0 / sampling.repeat_penalty } else { sampling.repeat_penalty };
            let minus = count as f32 * sampling.frequency_penalty + sampling.presence_penalty;
            *score = usable(*score * factor - minus);
        }
    }

    /// Collects all tokens that `top_k`, `top_p` and `min_p` may keep; sorted, best first, where their order matters.
    fn shortlist(&mut self, max: f32) {
        let Self { sampling, scores, candidates, buckets, .. } = self;
        let by_count = sampling.top_k > 0 && (sampling.top_k as usize) < scores.len();
        let by_mass = !by_count && sampling.top_p < 1.0;
        let lowest = if by_count || by_mass {
            let enough = if by_count { f64::from(sampling.top_k) } else { f64::from(sampling.top_p) };
            cut(scores, max, by_mass, enough, buckets)
        } else {
            N_BUCKETS
        };
        let min_score = min_p_score(max, sampling.min_p);
        // With `min_p` alone nothing is sorted: the choice goes through the tokens by id.
        let floor = if by_count || by_mass { f32::NEG_INFINITY } else { min_score };
        candidates.clear();
        candidates.extend(scores.iter().enumerate().filter_map(|(token, &score)| {
            let keep = score > f32::NEG_INFINITY && score >= floor && bucket(score, max) <= lowest;
            keep.then_some(Candidate { token: token as Token, score })
        }));
        if by_count || by_mass {
            candidates.sort_unstable_by(best_first);
        }
    }

    /// Cuts the sorted candidates at `top_k`, `top_p` and `min_p`; one stays at least.
    fn filter(&mut self) {
        let Self { sampling, candidates, scores, buckets, .. } = self;
        let Some(best) = candidates.first().map(|candidate| candidate.score) else { return };
        let by_count = sampling.top_k > 0 && (sampling.top_k as usize) < scores.len();
        if by_count {
            candidates.truncate(sampling.top_k as usize);
        }
        if sampling.top_p < 1.0 {
            let weight = |candidate: &Candidate| f64::from((candidate.score - best).exp());
            // After `top_k` the probabilities are those among the kept tokens, else among all.
            let total: f64 = if by_count { candidates.iter().map(weight).sum() } else { buckets.iter().sum() };
            let enough = total * f64::from(sampling.top_p);
            let mut sum = 0.0;
            let reached = candidates.iter().position(|candidate| {
                sum += weight(candidate);
                sum >= enough
            });
            candidates.truncate(reached.map_or(candidates.len(), |index| index + 1));
        }
        if by_count || sampling.top_p < 1.0 {
            let min_score = min_p_score(best, sampling.min_p);
            let kept = candidates.partition_point(|candidate| candidate.score >= min_score);
            candidates.truncate(kept.max(1));
        }
    }

    /// Draws from the candidates at the given temperature; `point` is in [0, 1).
    fn choose(&self, max: f32, point: f64) -> Token {
        let weight = |candidate: &Candidate| f64::from(((candidate.score - max) / self.sampling.temperature).exp());
        let mut left = point * self.candidates.iter().map(weight).sum::<f64>();
        let mut chosen = 0;
        for candidate in &self.candidates {
            let weight = weight(candidate);
            if weight > 0.0 {
                chosen = candidate.token;
                if left < weight {
                    break;
                }
            }
            left -= weight;
        }
        chosen
    }
}

/// Natural logarithms of the probability of `token` and of the `n_top` likeliest, best first, from the model's own
/// `logits`, `[n_vocab]`. A token without a logit is impossible.
pub fn log_probabilities(logits: &[f32], token: Token, n_top: usize) -> (f32, Vec<(Token, f32)>) {
    let max = likeliest(logits).1;
    let sum: f64 = logits.iter().map(|&logit| f64::from((usable(logit) - max).exp())).sum();
    let log_sum = f64::from(max) + sum.ln();
    let log_probability = |logit: f32| {
        if max == f32::NEG_INFINITY { f32::NEG_INFINITY } else { (f64::from(usable(logit)) - log_sum) as f32 }
    };
    let own = usize::try_from(token).ok().and_then(|token| logits.get(token));
    // `top` is short and sorted; nearly all tokens fail against its last.
    let n_top = n_top.min(logits.len());
    let mut top: Vec<Candidate> = Vec::with_capacity(n_top + 1);
    for (token, &logit) in logits.iter().enumerate() {
        let candidate = Candidate { token: token as Token, score: usable(logit) };
        if top.len() < n_top || top.last().is_some_and(|last| candidate.score > last.score) {
            let place = top.partition_point(|other| other.score >= candidate.score);
            top.insert(place, candidate);
            top.truncate(n_top);
        }
    }
    let own = own.map_or(f32::NEG_INFINITY, |&logit| log_probability(logit));
    (own, top.iter().map(|candidate| (candidate.token, log_probability(candidate.score))).collect())
}

/// The token with the highest score, the lowest id among equals, and that score.
fn likeliest(scores: &[f32]) -> (Token, f32) {
    let mut best = (0, f32::NEG_INFINITY);
    for (token, &score) in scores.iter().enumerate() {
        // False for what is not a number.
        if score > best.1 {
            best = (token as Token, score);
        }
    }
    (best.0, best.1.min(f32::MAX))
}

/// Whether a token can be chosen by them. Some may be impossible, so minus infinity, but not all.
fn are_numbers(logits: &[f32]) -> bool {
    let has_nan = |chunk: &[f32]| chunk.iter().fold(false, |found, logit| found | logit.is_nan());
    logits.iter().any(|logit| logit.is_finite()) && !logits.chunks(CHUNK).any(has_nan)
}

/// What is not a number counts as impossible; infinity would spoil sums.
fn usable(logit: f32) -> f32 {
    if logit.is_nan() { f32::NEG_INFINITY } else { logit.min(f32::MAX) }
}

fn best_first(a: &Candidate, b: &Candidate) -> Ordering {
    b.score.total_cmp(&a.score).then(a.token.cmp(&b.token))
}

/// The score of `min_p` times the best one's probability.
fn min_p_score(best: f32, min_p: f32) -> f32 {
    // ln(0) is minus infinity: nothing is below.
    best + min_p.ln()
}

/// Which bucket a score is in; the last takes all from 64 nats below the best.
fn bucket(score: f32, max: f32) -> usize {
    // The conversion saturates.
    (((max - score) * BUCKETS_PER_NAT) as usize).min(N_BUCKETS - 1)
}

/// The last bucket needed so that the tokens in it and above are at least `enough`, counted, or, `by_mass`, as a share
/// of all probability. Leaves the sums in `buckets`.
fn cut(scores: &[f32], max: f32, by_mass: bool, enough: f64, buckets: &mut Vec<f64>) -> usize {
    buckets.clear();
    buckets.resize(N_BUCKETS, 0.0);
    for &score in scores {
        buckets[bucket(score, max)] += if by_mass { f64::from((score - max).exp()) } else { 1.0 };
    }
    let enough = if by_mass { enough * buckets.iter().sum::<f64>() } else { enough };
    let mut sum = 0.0;
    let reached = buckets.iter().position(|bucket| {
        sum += bucket;
        sum >= enough
    });
    // One more, as sums in another order may round to a little less.
    reached.map_or(N_BUCKETS, |index| index + 1)
}

/// A number in [0, 1) that depends on seed and position alone: two rounds of SplitMix64 (Steele, Lea, Flood, 2014).
fn uniform(seed: u64, position: u32) -> f64 {
    let mixed = mix(mix(seed).wrapping_add(u64::from(position)));
    (mixed >> 11) as f64 / (1u64 << 53) as f64
}

fn mix(state: u64) -> u64 {
    let mut z = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn sampler(change: impl FnOnce(&mut Sampling), n_vocab: usize) -> Sampler {
        let mut sampling = Sampling { seed: 7, ..Sampling::default() };
        change(&mut sampling);
        Sampler::new(&sampling, n_vocab as u32).unwrap()
    }

    /// What the filters keep, written as plainly as can be: probabilities, a full sort, three cuts.
    fn kept(sampling: &Sampling, logits: &[f32]) -> Vec<Token> {
        let mut tokens: Vec<(Token, f64)> =
            logits.iter().enumerate().map(|(i, &l)| (i as Token, f64::from(l))).collect();
        tokens.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        if sampling.top_k > 0 {
            tokens.truncate(sampling.top_k as usize);
        }
        let best = tokens[0].1;
        let total: f64 = tokens.iter().map(|t| (t.1 - best).exp()).sum();
        let (mut sum, mut n) = (0.0, 0);
        while n < tokens.len() && (n == 0 || sum < f64::from(sampling.top_p) * total) {
            sum += (tokens[n].1 - best).exp();
            n += 1;
        }
        if sampling.top_p < 1.0 {
            tokens.truncate(n);
        }
        tokens.retain(|t| (t.1 - best).exp() >= f64::from(sampling.min_p));
        let mut tokens: Vec<Token> = tokens.into_iter().map(|t| t.0).collect();
        tokens.sort_unstable();
        tokens
    }

    proptest! {
        #[test]
        fn filters_keep_what_the_definition_keeps(
            // Multiples of an eighth, so that there are ties and no cut falls between two roundings of one sum.
            logits in prop::collection::vec((-400..80i32).prop_map(|n| n as f32 / 8.0), 1..300),
            top_k in 0..50u32,
            top_p in prop_oneof![Just(1.0f32), 0.05..0.999f32],
            min_p in prop_oneof![Just(0.0f32), 0.001..0.5f32],
            position: u32,
        ) {
            let mut sampler = sampler(|s| { s.top_k = top_k; s.top_p = top_p; s.min_p = min_p; }, logits.len());
            let token = sampler.sample(&logits, position).unwrap();
            let mut candidates: Vec<Token> = sampler.candidates.iter().map(|c| c.token).collect();
            candidates.sort_unstable();
            // A sum that is the same up to rounding may cut one token earlier or later.
            let expected = kept(&sampler.sampling, &logits);
            prop_assert!(candidates.len().abs_diff(expected.len()) <= 1, "{candidates:?} {expected:?}");
            let common = candidates.iter().filter(|token| expected.contains(token)).count();
            prop_assert!(common >= candidates.len().min(expected.len()), "{candidates:?} {expected:?}");
            prop_assert!(candidates.contains(&token));
        }

        #[test]
        fn nonsense_logits_never_panic(
            logits in prop::collection::vec(prop::num::f32::ANY, 0..40), top_k in 0..9u32, top_p in 0.01..=1.0f32,
            min_p in 0.0..=1.0f32, temperature in prop_oneof![Just(0.0f32), Just(f32::MIN_POSITIVE), 0.0..100.0f32],
        ) {
            let change = |s: &mut Sampling| {
                (s.top_k, s.top_p, s.min_p, s.temperature) = (top_k, top_p, min_p, temperature);
                (s.repeat_penalty, s.frequency_penalty) = (1.3, 2.0);
            };
            let mut sampler = sampler(change, 30);
            for position in 0..4 {
                let token = sampler.sample(&logits, position);
                prop_assert!(token.is_err() || (0..30).contains(&token.unwrap()));
                token.into_iter().for_each(|token| sampler.accept(token));
            }
            log_probabilities(&logits, 3, 5);
        }
    }

    #[test]
    fn temperature_zero_takes_the_first_of_the_best() {
        let logits = [0.0, 3.0, f32::NEG_INFINITY, 3.0, -1.0];
        assert_eq!(sampler(|s| s.temperature = 0.0, 5).sample(&logits, 0), Ok(1));
        let mut biased = sampler(|s| (s.temperature, s.logit_bias) = (0.0, vec![(1, -0.5), (4, 1.0)]), 5);
        assert_eq!(biased.sample(&logits, 0), Ok(3));
    }

    #[test]
    fn no_token_is_chosen_by_what_is_no_number() {
        let check = |logits: &[f32], expected: Result<Token, NoNumbers>| {
            let n_vocab = 3 * CHUNK;
            assert_eq!(sampler(|s| s.temperature = 0.0, n_vocab).sample(logits, 0), expected);
            assert_eq!(sampler(|s| s.top_k = 1, n_vocab).sample(logits, 0), expected);
        };
        let mut logits = vec![f32::NEG_INFINITY; 3 * CHUNK];
        check(&logits, Err(NoNumbers));
        logits[5] = -7.0;
        check(&logits, Ok(5));
        // One is enough, wherever it is, but not behind the vocabulary.
        for at in [0, CHUNK, 3 * CHUNK - 1] {
            let mut broken = logits.clone();
            broken[at] = f32::NAN;
            check(&broken, Err(NoNumbers));
        }
        logits.push(f32::NAN);
        check(&logits, Ok(5));
        check(&[], Err(NoNumbers));
    }

    #[test]
    fn a_choice_depends_on_seed_and_position_alone() {
        let logits: Vec<f32> = (0..50).map(|i| (i % 7) as f32 * 0.3).collect();
        let text = |seed| -> Vec<Token> {
            let mut sampler = sampler(|s| s.seed = seed, 50);
            (0..200).map(|position| sampler.sample(&logits, position).unwrap()).collect()
        };
        let forward = text(3);
        assert_eq!(forward, text(3));
        assert_ne!(forward, text(4));
        let mut backward = sampler(|s| s.seed = 3, 50);
        for position in (0..200).rev() {
            assert_eq!(backward.sample(&logits, position), Ok(forward[position as usize]));
        }
    }

    #[test]
    fn tokens_come_as_often_as_likely() {
        let check = |temperature: f32, top_k: u32| {
            let logits = [1.0f32, 0.0, 2.0, -1.0];
            let mut sampler = sampler(|s| (s.temperature, s.top_k) = (temperature, top_k), 4);
            let n = 20_000;
            let mut counts = [0u32; 4];
            for position in 0..n {
                counts[sampler.sample(&logits, position).unwrap() as usize] += 1;
            }
            let weights = logits.map(|l| if top_k == 2 && l < 1.0 { 0.0 } else { (l / temperature).exp() });
            let total: f32 = weights.iter().sum();
            for (count, weight) in counts.iter().zip(weights) {
                let (found, expected) = (*count as f32 / n as f32, weight / total);
                assert!((found - expected).abs() < 0.012, "{temperature} {top_k}: {found} for {expected}");
            }
        };
        check(1.0, 0);
        check(0.5, 0);
        check(2.0, 2);
    }

    #[test]
    fn penalties_see_the_window_only() {
        let change = |s: &mut Sampling| (s.temperature, s.presence_penalty, s.penalty_window) = (0.0, 1.5, 2);
        let mut sampler = sampler(change, 3);
        let logits = [2.0, 1.0, 0.0];
        let mut text = Vec::new();
        for position in 0..6 {
            let token = sampler.sample(&logits, position).unwrap();
            sampler.accept(token);
            text.push(token);
        }
        // Two are penalised at a time: 0, then 1, then 0 again (0.5 against 0), and so on.
        assert_eq!(text, [0, 1, 0, 0, 1, 0]);
        assert!(sampler.recent.len() == 2 && sampler.counts.len() <= 2);
    }

    #[test]
    fn log_probabilities_are_those_of_the_softmax() {
        let logits = [1.0f32, 3.0, 3.0, -2.0, f32::NAN];
        let total: f32 = [1.0f32, 3.0, 3.0, -2.0].iter().map(|l| l.exp()).sum();
        let (own, top) = log_probabilities(&logits, 0, 3);
        assert!((own - (1.0f32.exp() / total).ln()).abs() < 1e-6);
        assert_eq!(top.iter().map(|t| t.0).collect::<Vec<_>>(), [1, 2, 0]);
        assert_eq!((top[2].1, log_probabilities(&logits, 4, 0).0), (own, f32::NEG_INFINITY));
        assert_eq!(log_probabilities(&logits, 99, 9).1.len(), 5);
        assert_eq!(log_probabilities(&[], 0, 3), (f32::NEG_INFINITY, vec![]));
    }
}
