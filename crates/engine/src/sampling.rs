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
