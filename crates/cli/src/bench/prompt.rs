//! Prompts: text that no cache knows, of a length in tokens that is found by asking.
//!
//! The words are common ones, which nearly every tokenizer has as one token, so that two prompts of as many words have
//! about as many tokens. They are drawn from a seed and the prompt's number: the same seed gives the same prompts.

/// Common English words. 128 of them: two prompts share their first word once in 128 times, and their first two once
/// in 16,384.
const WORDS: [&str; 128] = [
    "time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world", "school", "state",
    "family", "group", "country", "problem", "hand", "part", "place", "case", "week", "company", "system", "program",
    "question", "work", "number", "night", "point", "home", "water", "room", "mother", "area", "money", "story",
    "fact", "month", "lot", "right", "study", "book", "eye", "job", "word", "business", "issue", "side", "kind",
    "head", "house", "service", "friend", "father", "power", "hour", "game", "line", "end", "member", "law", "car",
    "city", "name", "team", "minute", "idea", "body", "back", "parent", "face", "level", "office", "door", "health",
    "person", "art", "war", "history", "party", "result", "change", "morning", "reason", "research", "girl", "guy",
    "moment", "air", "teacher", "force", "order", "land", "food", "road", "form", "music", "market", "table", "sense",
    "field", "plan", "river", "garden", "letter", "window", "paper", "voice", "horse", "stone", "color", "summer",
    "winter", "north", "south", "light", "green", "white", "black", "young", "large", "small", "early", "late",
    "short", "long", "open",
];

/// Most prompts whose length is asked for. The second guess is right unless tokens per word differ with the length;
/// the rest is for tokenizers without our words, where every prompt has another length.
const MAX_TRIES: u32 = 6;

/// How far a prompt may be from the asked length. Time to first token is about proportional to it, and differs by more
/// than this from run to run.
const TOLERANCE: f64 = 0.02;

/// Prompts whose mean length is taken for that of all, where an endpoint counts tokens for the asking. With tokenizers
/// that cut words into many pieces, prompts of the same number of words differ by several percent.
pub const SAMPLE: u32 = 4;

/// Tokens per word, as far as they are believed: a word has one, or at most each of its bytes with the blank is one.
const TOKENS_PER_WORD: std::ops::RangeInclusive<f64> = 0.5..=12.0;

/// Draws prompts.
#[derive(Debug, Clone)]
pub struct Prompts {
    seed: u64,
    same: bool,
    next: u64,
}

impl Prompts {
    /// Prompts from a seed; with `same`, all of one length begin alike and are the same.
    pub fn new(seed: u64, same: bool) -> Self {
        Self { seed, same, next: 0 }
    }

    /// What they are drawn from.
    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// The next prompt.
    pub fn draw(&mut self, n_words: usize) -> String {
        let number = if self.same { 0 } else { self.next };
        self.next += 1;
        let mut state = mixed(self.seed ^ mixed(number));
        let words = (0..n_words).map(|_| {
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            WORDS[(mixed(state) >> 57) as usize]
        });
        words.collect::<Vec<_>>().join(" ")
    }
}

/// The output function of SplitMix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, 2014).
fn mixed(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// How long prompts must be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Length {
    /// Words of a prompt.
    pub n_words: usize,
    /// Its tokens; `None` if the endpoint does not tell.
    pub n_tokens: Option<u32>,
}

impl Length {
    fn is_near(self, target: u32) -> bool {
        self.n_tokens.is_some_and(|n| is_near(n.into(), target))
    }
}

/// Whether a prompt of so many tokens is near enough to what was asked for.
pub fn is_near(n_tokens: f64, target: u32) -> bool {
    (n_tokens - f64::from(target)).abs() <= (TOLERANCE * f64::from(target)).max(1.0)
}

/// Tokens of a prompt, as the mean of `n` that `count` counts; `None` where that cannot be known of one of them.
///
/// # Errors
/// Those of `count`.
pub fn mean_of<E>(n: u32, mut count: impl FnMut() -> Result<Option<u32>, E>) -> Result<Option<u32>, E> {
    let mut sum = 0;
    for _ in 0..n {
        let Some(n_tokens) = count()? else { return Ok(None) };
        sum += u64::from(n_tokens);
    }
    let mean = (sum as f64 / f64::from(n.max(1))).round();
    Ok(Some(mean as u32))
}

/// Finds how many words have `target` tokens. `count` tells the tokens of a prompt of so many words, or `None` where
/// that cannot be known; a word is then taken for a token.
///
/// # Errors
/// Those of `count`.
pub fn calibrate<E>(target: u32, mut count: impl FnMut(usize) -> Result<Option<u32>, E>) -> Result<Length, E> {
    // Begins low, so that no guess is longer than the endpoint's context where the asked length is not.
    let mut n_words = (target as usize / 4).max(1);
    let mut last: Option<(f64, f64)> = None;
    let mut best: Option<Length> = None;
    for _ in 0..MAX_TRIES {
        let Some(n_tokens) = count(n_words)? else {
            return Ok(Length { n_words: target as usize, n_tokens: None });
        };
        let length = Length { n_words, n_tokens: Some(n_tokens) };
        let distance = |length: Length| length.n_tokens.map_or(u32::MAX, |n| n.abs_diff(target));
        if best.is_none_or(|best| distance(length) < distance(best)) {
            best = Some(length);
        }
        if length.is_near(target) {
            break;
        }
        // Tokens grow with the words along a line, which chat templates lift: through the last two points, or at first
        // through zero.
        let here = (n_words as f64, f64::from(n_tokens));
        let slope = match last {
            Some((words, tokens)) => (here.1 - tokens) / (here.0 - words),
            None => here.1 / here.0,
        };
        let slope = slope.clamp(*TOKENS_PER_WORD.start(), *TOKENS_PER_WORD.end());
        let next = (here.0 + (f64::from(target) - here.1) / slope).round().max(1.0) as usize;
        if next == n_words {
            break;
        }
        last = Some(here);
        n_words = next;
    }
    Ok(best.unwrap_or(Length { n_words, n_tokens: None }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;
    use std::convert::Infallible;

    /// Calibrates against a tokenizer with so many tokens for so many words; the length and how often was asked.
    fn calibrated(target: u32, tokens: impl Fn(usize) -> Option<u32>) -> (Length, u32) {
        let mut n_asked = 0;
        let count = |n_words| {
            n_asked += 1;
            Ok::<_, Infallible>(tokens(n_words))
        };
        let Ok(length) = calibrate(target, count);
        (length, n_asked)
    }

    #[test]
    fn prompts_are_repeatable_and_all_different() {
        let draw = |seed, same| {
            let mut prompts = Prompts::new(seed, same);
            (0..20).map(|_| prompts.draw(50)).collect::<Vec<_>>()
        };
        let prompts = draw(1, false);
        assert_eq!(prompts, draw(1, false));
        assert!(prompts.iter().all(|prompt| prompt.split(' ').count() == 50));
        let others = draw(2, false);
        let starts: HashSet<_> = prompts.iter().chain(&others).map(|prompt| &prompt[..15]).collect();
        assert_eq!(starts.len(), 40, "no prompt begins like another");
        let same = draw(1, true);
        assert!(same.iter().all(|prompt| *prompt == same[0]));
        assert_eq!(WORDS.iter().collect::<HashSet<_>>().len(), WORDS.len());
    }

    #[test]
    fn the_length_is_found_in_few_tries() {
        for target in [1, 2, 16, 512, 100_000] {
            for per_word in [1.0, 1.3, 3.7, 6.0] {
                for template in [0, 1, 40] {
                    let tokens = |n: usize| Some((n as f64 * per_word) as u32 + template);
                    let (length, n_asked) = calibrated(target, tokens);
                    // A word is the least that can be sent, and a step of words the least that it changes by.
                    let is_near = length.is_near(target) || length.n_tokens.unwrap().abs_diff(target) <= 6;
                    assert!(is_near || target <= template + 6, "{target} {per_word} {template}: {length:?}");
                    assert!(n_asked <= 4 || target <= template + 6, "{target} {per_word} {template}: {n_asked}");
                }
            }
        }
        assert!(calibrated(512, |n| Some(n as u32 * 3 + 20)).0.is_near(512));
    }

    #[test]
    fn the_mean_of_some_prompts_is_taken() {
        let mut tokens = [501, 520, 514, 519].into_iter();
        assert_eq!(mean_of(4, || Ok::<_, Infallible>(tokens.next())), Ok(Some(514)));
        assert_eq!(mean_of(4, || Ok::<_, Infallible>(None)), Ok(None));
        assert_eq!(mean_of(4, || Err("no")), Err("no"));
        assert!(is_near(501.8, 512) && !is_near(501.7, 512) && is_near(2.0, 1));
    }

    #[test]
    fn what_does_not_fit_together_ends() {
        let (length, n_asked) = calibrated(512, |_| Some(7));
        assert!(n_asked <= MAX_TRIES && !length.is_near(512));
        assert_eq!(calibrated(512, |_| None), (Length { n_words: 512, n_tokens: None }, 1));
        assert_eq!(calibrate(512, |_| Err("no")), Err("no"));
    }
}
