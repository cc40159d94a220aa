//! How the next token is chosen.

use brigade_base::Token;

/// Parameters of sampling. [`Sampling::default`] is OpenAI's default: temperature 1, nothing cut off.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampling {
    /// 0 chooses the likeliest token; above, logits are divided by it. At most 100.
    pub temperature: f32,
    /// Keep the `top_k` likeliest tokens; 0 keeps all.
    pub top_k: u32,
    /// Keep the smallest set of likeliest tokens with this probability together; 1 keeps all.
    pub top_p: f32,
    /// Keep tokens with at least this share of the likeliest one's probability; 0 keeps all.
    pub min_p: f32,
    /// Divides positive and multiplies negative logits of recent tokens; 1 is off.
    pub repeat_penalty: f32,
    /// Subtracted once for each time that a token occurred; 0 is off.
    pub frequency_penalty: f32,
    /// Subtracted once from each token that occurred; 0 is off.
    pub presence_penalty: f32,
    /// How many of the last generated tokens the penalties look at.
    pub penalty_window: u32,
    /// With the position, decides every random choice: the same seed gives the same text.
    pub seed: u64,
    /// Added to the logits of single tokens, before all else.
    pub logit_bias: Vec<(Token, f32)>,
}

impl Default for Sampling {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repeat_penalty: 1.0,
            frequency_penalty: 0.0,
            presence_penalty: 0.0,
            penalty_window: 64,
            seed: 0,
            logit_bias: Vec::new(),
        }
    }
}

/// Most entries of [`Sampling::logit_bias`]: more than any client sends, and each costs an addition a token.
const MAX_LOGIT_BIASES: usize = 4096;

/// A parameter of sampling is out of its range.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum SamplingError {
    /// A number is out of its range.
    #[error("{name} is {value}, but must be {range}")]
    Range {
        /// Which parameter.
        name: &'static str,
        /// What it was.
        value: f32,
        /// The range in words.
        range: &'static str,
    },
    /// The window of the penalties is too long.
    #[error("penalty_window is {value}, but must be at most {max}")]
    PenaltyWindow {
        /// What it was.
        value: u32,
        /// Longest window.
        max: u32,
    },
    /// A bias is for no token.
    #[error("logit_bias names token {token}, which is not in the vocabulary of {n_vocab} tokens")]
    UnknownToken {
        /// The token.
        token: Token,
        /// Size of the vocabulary.
        n_vocab: u32,
    },
    /// Too many biases.
    #[error("logit_bias has {found} entries, but must have at most {max}")]
    TooManyBiases {
        /// How many.
        found: usize,
        /// Most.
        max: usize,
    },
}

impl Sampling {
    /// Longest [`penalty_window`](Self::penalty_window), as long as the context of nearly any model; it bounds the
    /// sampler's memory.
    pub const MAX_PENALTY_WINDOW: u32 = 1 << 20;

    /// Checks all ranges, for a vocabulary of `n_vocab` tokens.
    ///
    /// # Errors
    /// Names the first parameter that is out of its range.
    pub fn validate(&self, n_vocab: u32) -> Result<(), SamplingError> {
        // Not a number is in no range.
        let check = |name, value: f32, inside: bool, range| {
            if inside { Ok(()) } else { Err(SamplingError::Range { name, value, range }) }
        };
        let Self { temperature: t, top_p, min_p, repeat_penalty: repeat, .. } = *self;
        check("temperature", t, (0.0..=100.0).contains(&t), "from 0 to 100")?;
        check("top_p", top_p, top_p > 0.0 && top_p <= 1.0, "above 0 and at most 1")?;
        check("min_p", min_p, (0.0..=1.0).contains(&min_p), "from 0 to 1")?;
        check("repeat_penalty", repeat, repeat > 0.0 && repeat <= 100.0, "above 0 and at most 100")?;
        for (name, value) in
            [("frequency_penalty", self.frequency_penalty), ("presence_penalty", self.presence_penalty)]
        {
            check(name, value, (-100.0..=100.0).contains(&value), "from -100 to 100")?;
        }
        if self.penalty_window > Self::MAX_PENALTY_WINDOW {
            return Err(SamplingError::PenaltyWindow { value: self.penalty_window, max: Self::MAX_PENALTY_WINDOW });
        }
        if self.logit_bias.len() > MAX_LOGIT_BIASES {
            return Err(SamplingError::TooManyBiases { found: self.logit_bias.len(), max: MAX_LOGIT_BIASES });
        }
        for &(token, bias) in &self.logit_bias {
            if !u32::try_from(token).is_ok_and(|token| token < n_vocab) {
                return Err(SamplingError::UnknownToken { token, n_vocab });
            }
            check("logit_bias", bias, bias.is_finite(), "finite")?;
        }
        Ok(())
    }

    /// Whether tokens that occurred are treated differently.
    pub(crate) fn penalises(&self) -> bool {
        let off = self.repeat_penalty == 1.0 && self.frequency_penalty == 0.0 && self.presence_penalty == 0.0;
        !off && self.penalty_window > 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_parameter_out_of_range_is_named() {
        let sampling = Sampling::default();
        assert_eq!(sampling.validate(10), Ok(()));
        let check = |change: &dyn Fn(&mut Sampling), name: &str| {
            let mut sampling = Sampling::default();
            change(&mut sampling);
            let error = sampling.validate(10).unwrap_err().to_string();
            assert!(error.starts_with(name), "{error}");
        };
        for value in [-0.1, f32::NAN, f32::INFINITY] {
            check(&|s| s.temperature = value, "temperature");
            check(&|s| s.top_p = value, "top_p");
            check(&|s| s.min_p = value, "min_p");
            check(&|s| s.repeat_penalty = value, "repeat_penalty");
            check(&|s| s.frequency_penalty = value * 2000.0, "frequency_penalty");
            check(&|s| s.presence_penalty = value * 2000.0, "presence_penalty");
        }
        check(&|s| s.top_p = 0.0, "top_p");
        check(&|s| s.repeat_penalty = 0.0, "repeat_penalty");
        check(&|s| s.penalty_window = u32::MAX, "penalty_window");
        check(&|s| s.logit_bias = vec![(10, 0.0)], "logit_bias names token 10");
        check(&|s| s.logit_bias = vec![(-1, 0.0)], "logit_bias names token -1");
        check(&|s| s.logit_bias = vec![(1, f32::NAN)], "logit_bias is");
        check(&|s| s.logit_bias = vec![(1, 0.0); 5000], "logit_bias has 5000");
    }
}
