//! Talking to a coordinator's HTTP endpoint as its users do.

use std::io::{BufRead, BufReader, Read};
use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::failure::{Failure, Outcome};

/// Most bytes of a reply or of one line of a stream: the status of a thousand nodes.
const MAX_BYTES: u64 = 16 << 20;

/// How long connecting may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// An endpoint without a key. Clones share their connections.
#[derive(Clone)]
pub struct Endpoint {
    /// For example `http://127.0.0.1:8080`.
    base: String,
    agent: ureq::Agent,
}

/// What a stream of events is made of.
pub enum Part<'a> {
    /// A line that clients skip.
    Comment(&'a str),
    /// A chunk of the answer.
    Chunk(&'a Value),
}

/// An answer that was streamed.
#[derive(Debug, Default)]
pub struct Answer {
    /// All of it.
    pub text: String,
    /// Tokens that were generated, the end token included.
    pub n_tokens: u64,
    /// When the first and last text came.
    pub span: Option<(Instant, Instant)>,
}

impl Answer {
    /// Takes in one chunk and returns its text.
    fn add(&mut self, chunk: &Value) -> String {
        let now = Instant::now();
        let choice = &chunk["choices"][0];
        let text = choice["text"].as_str().or(choice["delta"]["content"].as_str()).unwrap_or_default();
        if !text.is_empty() {
            self.text.push_str(text);
            self.span = Some((self.span.map_or(now, |(first, _)| first), now));
        }
        if let Some(n) = chunk["usage"]["completion_tokens"].as_u64() {
            self.n_tokens = n;
        }
        text.to_owned()
    }
}

impl Endpoint {
    /// The endpoint at `url`, with or without `/v1`.
    pub fn new(url: &str) -> Self {
        let config = ureq::Agent::config_builder().http_status_as_error(false).timeout_connect(Some(CONNECT_TIMEOUT));
        let base = url.trim_end_matches('/').trim_end_matches("/v1").to_owned();
        Self { base, agent: ureq::Agent::new_with_config(config.build()) }
    }

    /// The cluster as it stands, as `brigade status --json` shows it.
    pub fn status(&self) -> Outcome<Value> {
        let path = "/brigade/v1/status";
        let text = self.text(path)?;
        serde_json::from_str(&text).map_err(|error| Failure::said(format!("{path} answered {text:?}: {error}")))
    }

    /// What is at `path`, as text.
    pub fn text(&self, path: &str) -> Outcome<String> {
        let url = format!("{}{path}", self.base);
        let failed = |error: &dyn std::fmt::Display| Failure::said(format!("{url}: {error}"));
        let mut response = self.agent.get(&url).call().map_err(|error| failed(&error))?;
        let text = response.body_mut().with_config().limit(MAX_BYTES).read_to_string();
        let text = text.map_err(|error| failed(&error))?;
        if response.status().is_success() { Ok(text) } else { Err(failed(&format!("{}: {text}", response.status()))) }
    }

    /// Streams an answer and hands out its text as it comes. `path` is `/v1/completions` or `/v1/chat/completions`;
    /// `body` asks for a stream with usage.
    pub fn stream(&self, path: &str, body: &Value, mut on_text: impl FnMut(&str) -> Outcome) -> Outcome<Answer> {
        self.stream_until(path, body, |text| on_text(text).map(ControlFlow::Continue))
    }

    /// The same, and hangs up with what has come so far as soon as `on_text` breaks.
    pub fn stream_until(
        &self,
        path: &str,
        body: &Value,
        mut on_text: impl FnMut(&str) -> Outcome<ControlFlow<()>>,
    ) -> Outcome<Answer> {
        let mut answer = Answer::default();
        let on_part = |part: Part<'_>| match part {
            Part::Comment(_) => Ok(ControlFlow::Continue(())),
            Part::Chunk(chunk) => {
                let piece = answer.add(chunk);
                if piece.is_empty() { Ok(ControlFlow::Continue(())) } else { on_text(&piece) }
            }
        };
        self.stream_parts(path, body, on_part)?;
        Ok(answer)
    }

    /// Hands out all parts of a streamed answer as they come, to its end mark or until `on_part` breaks.
    pub fn stream_parts(
        &self,
        path: &str,
        body: &Value,
        mut on_part: impl FnMut(Part<'_>) -> Outcome<ControlFlow<()>>,
    ) -> Outcome {
        let url = format!("{}{path}", self.base);
        let failed = |error: &dyn std::fmt::Display| Failure::said(format!("{url}: {error}"));
        let mut response = self.agent.post(&url).send_json(body).map_err(|error| failed(&error))?;
        if !response.status().is_success() {
            let text = response.body_mut().with_config().limit(MAX_BYTES).read_to_string().unwrap_or_default();
            return Err(failed(&format!("{}: {text}", response.status())));
        }
        let mut reader = BufReader::new(response.into_body().into_reader());
        let mut line = Vec::new();
        loop {
            line.clear();
            let n = (&mut reader).take(MAX_BYTES).read_until(b'\n', &mut line).map_err(|error| failed(&error))?;
            if n == 0 {
                return Err(failed(&"the answer broke off"));
            }
            let text = String::from_utf8_lossy(&line);
            let flow = if let Some(comment) = text.strip_prefix(':') {
                on_part(Part::Comment(comment.trim()))?
            } else {
                let Some(data) = text.strip_prefix("data:").map(str::trim) else { continue };
                if data == "[DONE]" {
                    return Ok(());
                }
                let chunk: Value = serde_json::from_str(data).map_err(|error| failed(&error))?;
                if let Some(message) = chunk["error"]["message"].as_str() {
                    return Err(failed(&message));
                }
                on_part(Part::Chunk(&chunk))?
            };
            if flow.is_break() {
                return Ok(());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn chunks_of_both_kinds_add_up() {
        let mut answer = Answer::default();
        assert_eq!(answer.add(&json!({"choices": [{"delta": {"role": "assistant"}}]})), "");
        assert!(answer.span.is_none());
        assert_eq!(answer.add(&json!({"choices": [{"delta": {"content": "one "}}]})), "one ");
        answer.add(&json!({"choices": [{"text": "two"}]}));
        answer.add(&json!({"choices": [], "usage": {"completion_tokens": 7}}));
        assert_eq!((answer.text.as_str(), answer.n_tokens), ("one two", 7));
        assert!(answer.span.is_some_and(|(first, last)| first <= last));
    }
}
