//! What is measured: an endpoint, a model, and how this endpoint wants to be asked.
//!
//! The endpoints of the field agree on little beyond OpenAI's core. [`Target::settle`] asks a short question with all
//! that a fair measurement wants, drops what the endpoint refuses, and remembers what that means for the numbers.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::endpoint::{Endpoint, EndpointError};

/// Tokens of the answer to the first question: enough to see a stream, too few to wait for.
const TRIAL_TOKENS: u32 = 2;

/// An endpoint and how to ask it.
pub struct Target {
    endpoint: Endpoint,
    model: String,
    dialect: Dialect,
    /// Whether it counts tokens for the asking, as Brigade does.
    has_tokenizer: bool,
}

/// What an endpoint takes.
#[derive(Debug, Clone)]
struct Dialect {
    is_chat: bool,
    /// The field that bounds an answer.
    max_tokens: &'static str,
    ignore_eos: bool,
    stream_options: bool,
    temperature: bool,
}

/// One answer and when it came.
#[derive(Debug)]
pub struct Answer {
    /// When the request was sent.
    pub sent: Instant,
    /// When each chunk with something of the answer was read. A chunk is a token with most servers.
    pub chunks: Vec<Instant>,
    /// When it was over: the last chunk, or the one that says why it ended.
    pub end: Instant,
    /// Tokens, as the endpoint counts them.
    pub usage: Usage,
}

/// Tokens, as an endpoint counts them; `None` where it does not.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// Of the prompt.
    pub prompt: Option<u32>,
    /// Of these, how many the endpoint had in a cache.
    pub cached: Option<u32>,
    /// Of the answer.
    pub completion: Option<u32>,
}

impl Usage {
    fn of(reply: &Value) -> Option<Self> {
        let usage = reply.get("usage").filter(|usage| usage.is_object())?;
        let number = |path: &str| usage.pointer(path).and_then(Value::as_u64).and_then(|n| u32::try_from(n).ok());
        Some(Self {
            prompt: number("/prompt_tokens"),
            cached: number("/prompt_tokens_details/cached_tokens"),
            completion: number("/completion_tokens"),
        })
    }
}

impl Answer {
    /// Tokens of the answer: as the endpoint counts them, else its chunks.
    pub fn n_tokens(&self) -> u32 {
        self.usage.completion.unwrap_or_else(|| u32::try_from(self.chunks.len()).unwrap_or(u32::MAX))
    }

    /// When the first token came.
    pub fn first(&self) -> Instant {
        self.chunks.first().copied().unwrap_or(self.end)
    }

    /// From sending the request to the first token.
    pub fn time_to_first_token(&self) -> Duration {
        self.first() - self.sent
    }

    /// Time of each token after the first, on average; `None` with fewer than two tokens.
    pub fn time_per_output_token(&self) -> Option<Duration> {
        let n = self.n_tokens().checked_sub(1).filter(|n| *n > 0)?;
        Some((self.end - self.first()) / n)
    }
}

impl Target {
    /// Finds out how an endpoint wants to be asked; also what it does not take, and what that means.
    ///
    /// # Errors
    /// The endpoint's own, if it refuses the plainest question too.
    pub fn settle(endpoint: Endpoint, model: String, chat: bool) -> Result<(Self, Vec<String>), EndpointError> {
        let mut target = Self { endpoint, model, dialect: Dialect::new(chat), has_tokenizer: false };
        let mut notes = Vec::new();
        let mut first_refusal = None;
        loop {
            let error = match target.answer("Hello", TRIAL_TOKENS) {
                Ok(_) => break,
                Err(error) => error,
            };
            let EndpointError::Refused { status, message, .. } = &error else { return Err(error) };
            let note = target.dialect.concede(*status, message);
            match note {
                Some(note) => notes.push(note),
                // What came last may speak of something else than what was wrong from the start.
                None => return Err(first_refusal.filter(|_| matches!(status, 400 | 422)).unwrap_or(error)),
            }
            first_refusal.get_or_insert(error);
        }
        target.has_tokenizer = !target.dialect.is_chat && target.tokenized("Hello").is_some();
        Ok((target, notes))
    }

    /// The model's name.
    pub fn model(&self) -> &str {
        &self.model
    }

    /// The endpoint's URL.
    pub fn url(&self) -> &str {
        self.endpoint.base()
    }

    /// Which kind of request is sent.
    pub fn api(&self) -> &'static str {
        if self.dialect.is_chat { "chat/completions" } else { "completions" }
    }

    /// Whether the endpoint was told to go on after the model's end token. Some take the field and ignore it.
    pub fn ignores_end(&self) -> bool {
        self.dialect.ignore_eos
    }

    /// Whether prompts are counted without an answer, and so at no cost.
    pub fn counts_alone(&self) -> bool {
        self.has_tokenizer
    }

    /// Tokens of a prompt, the chat template's counted too; `None` if the endpoint does not tell.
    pub fn prompt_tokens(&self, prompt: &str) -> Result<Option<u32>, EndpointError> {
        if self.has_tokenizer
            && let Some(n) = self.tokenized(prompt)
        {
            return Ok(Some(n));
        }
        let reply = self.endpoint.post(&self.path(), &self.dialect.body(&self.model, prompt, 1, false))?;
        Ok(Usage::of(&reply).and_then(|usage| usage.prompt))
    }

    fn tokenized(&self, text: &str) -> Option<u32> {
        let reply = self.endpoint.post("/brigade/v1/tokenize", &json!({"text": text})).ok()?;
        u32::try_from(reply.get("count")?.as_u64()?).ok()
    }

    /// Asks for up to `n_tokens` and takes the time.
    pub fn answer(&self, prompt: &str, n_tokens: u32) -> Result<Answer, EndpointError> {
        let body = self.dialect.body(&self.model, prompt, n_tokens, true);
        let sent = Instant::now();
        let (mut chunks, mut end, mut usage) = (Vec::with_capacity(n_tokens as usize), None, Usage::default());
        self.endpoint.stream(&self.path(), &body, |read_at, chunk| {
            if let Some(choice) = chunk.pointer("/choices/0") {
                let is_last = choice.get("finish_reason").is_some_and(|reason| !reason.is_null());
                if brings_token(choice, is_last) {
                    chunks.push(read_at);
                }
                if is_last {
                    end = Some(read_at);
                }
            }
            usage = Usage::of(&chunk).unwrap_or(usage);
            Ok::<_, EndpointError>(())
        })?;
        let end = end.into_iter().chain(chunks.last().copied()).max().unwrap_or_else(Instant::now);
        Ok(Answer { sent, chunks, end, usage })
    }

    fn path(&self) -> String {
        format!("/v1/{}", self.api())
    }
}

/// Whether a chunk brings something of the answer. One with empty text does if a token without text can be behind it:
/// it is neither the first of a chat, which only says who speaks, nor the last, which says why the answer ended.
fn brings_token(choice: &Value, is_last: bool) -> bool {
    let delta = choice.get("delta").unwrap_or(choice);
    let texts = ["text", "content", "reasoning_content", "reasoning"].map(|key| delta.get(key).and_then(Value::as_str));
    let is_opening = delta.get("role").is_some_and(|role| !role.is_null());
    texts.into_iter().flatten().any(|text| !text.is_empty() || !(is_opening || is_last))
}

impl Dialect {
    fn new(is_chat: bool) -> Self {
        Self { is_chat, max_tokens: "max_tokens", ignore_eos: true, stream_options: true, temperature: true }
    }

    fn body(&self, model: &str, prompt: &str, n_tokens: u32, stream: bool) -> Value {
        let mut body = if self.is_chat {
            json!({"model": model, "messages": [{"role": "user", "content": prompt}]})
        } else {
            json!({"model": model, "prompt": prompt})
        };
        body[self.max_tokens] = n_tokens.into();
        body["stream"] = stream.into();
        if self.temperature {
            body["temperature"] = 0.into();
        }
        if self.ignore_eos {
            body["ignore_eos"] = true.into();
        }
        if self.stream_options && stream {
            body["stream_options"] = json!({"include_usage": true});
        }
        body
    }

    /// Gives up what an endpoint refused with this; says what that means. `None` if there is nothing left to give up.
    fn concede(&mut self, status: u16, message: &str) -> Option<String> {
        match status {
            404 | 405 | 501 if !self.is_chat => {
                self.is_chat = true;
                Some("it has no plain completions, so chats are asked for".to_owned())
            }
            400 | 422 => self.concede_field(message),
            _ => None,
        }
    }

    /// Drops the field that a message names, else the next one that could be it.
    fn concede_field(&mut self, message: &str) -> Option<String> {
        // `max_completion_tokens` is the advice of endpoints that refuse `max_tokens`.
        if self.max_tokens == "max_tokens" && message.contains("max_completion_tokens") {
            self.max_tokens = "max_completion_tokens";
            return Some("it takes `max_completion_tokens` instead of `max_tokens`".to_owned());
        }
        let fields = [
            ("ignore_eos", &mut self.ignore_eos, "answers may end before they have the asked length"),
            ("stream_options", &mut self.stream_options, "it may not tell how many tokens an answer has"),
            ("temperature", &mut self.temperature, "answers are drawn at random"),
        ];
        let mut left: Vec<_> = fields.into_iter().filter(|(_, is_sent, _)| **is_sent).collect();
        let named = left.iter().position(|(name, ..)| message.contains(name)).unwrap_or(0);
        let (name, is_sent, meaning) = left.get_mut(named)?;
        **is_sent = false;
        Some(format!("it does not take `{name}`: {meaning}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_field_that_a_refusal_names_is_dropped_first() {
        let mut dialect = Dialect::new(false);
        assert!(dialect.concede(400, "temperature must be 1").unwrap().contains("`temperature`"));
        assert!(dialect.concede(422, "no such field").unwrap().contains("`ignore_eos`"));
        assert!(dialect.concede(404, "no such page").unwrap().contains("chats"));
        assert!(dialect.concede(400, "use 'max_completion_tokens'").unwrap().contains("instead"));
        assert!(dialect.concede(400, "no").unwrap().contains("`stream_options`"));
        assert_eq!(dialect.concede(400, "no"), None);
        assert_eq!(dialect.concede(404, "no such model"), None);
        let body = dialect.body("m", "p", 5, true);
        let expected = json!({
            "model": "m", "messages": [{"role": "user", "content": "p"}], "max_completion_tokens": 5, "stream": true,
        });
        assert_eq!(body, expected);
        assert_eq!(Dialect::new(false).concede(500, "broken"), None);
    }

    #[test]
    fn chunks_that_only_frame_an_answer_are_no_tokens() {
        let brings = |choice: Value| {
            let is_last = choice.get("finish_reason").is_some_and(|reason| !reason.is_null());
            brings_token(&choice, is_last)
        };
        assert!(brings(json!({"text": "a", "finish_reason": null})));
        assert!(brings(json!({"text": "", "finish_reason": null})), "a token without text");
        assert!(brings(json!({"text": "a", "finish_reason": "length"})), "the last token and the end in one");
        assert!(!brings(json!({"text": "", "finish_reason": "length"})));
        assert!(!brings(json!({"delta": {"role": "assistant", "content": ""}})));
        assert!(brings(json!({"delta": {"role": "assistant", "content": "a"}})), "a server that repeats the role");
        assert!(brings(json!({"delta": {"reasoning_content": "a"}, "finish_reason": null})));
        assert!(!brings(json!({"delta": {}, "finish_reason": "stop"})));
    }

    #[test]
    fn times_of_an_answer() {
        let sent = Instant::now();
        let at = |ms: u64| sent + Duration::from_millis(ms);
        let answer = |completion| Answer {
            sent,
            chunks: vec![at(100), at(120), at(180)],
            end: at(200),
            usage: Usage { completion, ..Usage::default() },
        };
        assert_eq!(answer(None).time_to_first_token(), Duration::from_millis(100));
        assert_eq!((answer(None).n_tokens(), answer(Some(11)).n_tokens()), (3, 11));
        assert_eq!(answer(Some(11)).time_per_output_token(), Some(Duration::from_millis(10)));
        assert_eq!(answer(Some(1)).time_per_output_token(), None);
        assert_eq!(answer(Some(0)).time_per_output_token(), None);
    }
}
