//! Answers as OpenAI writes them, whole or in chunks.
//!
//! An [`Answer`] knows what stays the same in all of an answer's chunks. The types below it are mirrors of OpenAI's
//! objects, borrowed where they can be. A chunk that carries text alone, which nearly all do, is not built from them
//! each time: a [`TextChunk`] is such a chunk written once, and repeats it around each text.

use brigade_base::Token;
use brigade_node::serving::{FinishReason, TokenLogprob, Usage};
use bytes::{BufMut, BytesMut};
use serde::Serialize;
use serde_json::{Map, Value};

/// Log probability of what cannot be; JSON has no infinity, and this is what OpenAI writes.
const IMPOSSIBLE: f32 = -9999.0;

/// Which endpoint answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// `/v1/chat/completions`.
    Chat,
    /// `/v1/completions`.
    Plain,
}

/// One answer on its way out.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) kind: Kind,
    /// `chatcmpl-...` or `cmpl-...`.
    pub(crate) id: String,
    /// Seconds since 1970.
    pub(crate) created: u64,
    pub(crate) model: String,
    pub(crate) system_fingerprint: String,
    /// What was asked for; decides the shape.
    pub(crate) logprobs: Option<u8>,
    pub(crate) include_usage: bool,
    /// Characters of token texts sent so far, for `text_offset`.
    pub(crate) text_offset: usize,
}

/// The chunk of a text, cut in two where the text goes.
#[derive(Debug)]
pub(crate) struct TextChunk {
    before: Vec<u8>,
    after: Vec<u8>,
}

#[derive(Serialize)]
struct Envelope<'a, C> {
    id: &'a str,
    object: &'static str,
    created: u64,
    model: &'a str,
    system_fingerprint: &'a str,
    choices: &'a [C],
    /// Absent, null, or there.
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<Option<UsageObject>>,
}

#[derive(Serialize)]
struct ChatChunk<'a> {
    index: u32,
    delta: Delta<'a>,
    logprobs: Option<ChatLogprobs<'a>>,
    finish_reason: Option<&'static str>,
}

#[derive(Default, Serialize)]
struct Delta<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    content: Option<&'a str>,
}

#[derive(Serialize)]
struct ChatChoice<'a> {
    index: u32,
    message: ChatMessage<'a>,
    logprobs: Option<ChatLogprobs<'a>>,
    finish_reason: &'static str,
}

#[derive(Serialize)]
struct ChatMessage<'a> {
    role: &'static str,
    content: &'a str,
    refusal: Option<()>,
}

#[derive(Serialize)]
struct ChatLogprobs<'a> {
    content: Vec<ChatToken<'a>>,
    refusal: Option<()>,
}

#[derive(Serialize)]
struct ChatToken<'a> {
    token: String,
    logprob: f32,
    bytes: &'a [u8],
    #[serde(skip_serializing_if = "Option::is_none")]
    top_logprobs: Option<Vec<ChatToken<'a>>>,
}

#[derive(Serialize)]
struct PlainChoice<'a> {
    index: u32,
    text: &'a str,
    logprobs: Option<PlainLogprobs>,
    finish_reason: Option<&'static str>,
}

#[derive(Serialize)]
struct PlainLogprobs {
    tokens: Vec<String>,
    token_logprobs: Vec<f32>,
    top_logprobs: Option<Vec<Map<String, Value>>>,
    text_offset: Vec<usize>,
}

#[derive(Serialize)]
struct UsageObject {
    prompt_tokens: u32,
    completion_tokens: u32,
    total_tokens: u32,
    prompt_tokens_details: PromptDetails,
    completion_tokens_details: CompletionDetails,
}

#[derive(Serialize)]
struct PromptDetails {
    cached_tokens: u32,
    audio_tokens: u32,
}

#[derive(Default, Serialize)]
struct CompletionDetails {
    reasoning_tokens: u32,
    audio_tokens: u32,
    accepted_prediction_tokens: u32,
    rejected_prediction_tokens: u32,
}

impl Answer {
    /// The chunk before all text: who speaks. Plain completions have none.
    pub(crate) fn write_first_chunk(&self, out: &mut BytesMut) {
        if self.kind == Kind::Chat {
            let delta = Delta { role: Some("assistant"), content: Some("") };
            self.write_event(&[ChatChunk { index: 0, delta, logprobs: None, finish_reason: None }], out);
        }
    }

    /// A chunk of text.
    pub(crate) fn write_delta(&mut self, text: &str, logprobs: &[TokenLogprob], out: &mut BytesMut) {
        match self.kind {
            Kind::Chat => {
                let delta = Delta { role: None, content: Some(text) };
                let logprobs = self.chat_logprobs(logprobs);
                self.write_event(&[ChatChunk { index: 0, delta, logprobs, finish_reason: None }], out);
            }
            Kind::Plain => {
                let logprobs = self.plain_logprobs(logprobs);
                self.write_event(&[PlainChoice { index: 0, text, logprobs, finish_reason: None }], out);
            }
        }
    }

    /// What [`Answer::write_delta`] writes for any text; `None` where the tokens behind it are told too.
    pub(crate) fn text_chunk(&mut self) -> Option<TextChunk> {
        if self.logprobs.is_some() {
            return None;
        }
        let mut chunk = BytesMut::new();
        self.write_delta("", &[], &mut chunk);
        TextChunk::cut(&chunk)
    }

    /// The chunks after all text: why it ended, the usage where asked for, and the end mark.
    pub(crate) fn write_end(&self, reason: FinishReason, usage: Usage, out: &mut BytesMut) {
        let finish_reason = Some(reason_text(reason));
        match self.kind {
            Kind::Chat => {
                let delta = Delta::default();
                self.write_event(&[ChatChunk { index: 0, delta, logprobs: None, finish_reason }], out);
            }
            Kind::Plain => {
                self.write_event(&[PlainChoice { index: 0, text: "", logprobs: None, finish_reason }], out);
            }
        }
        if self.include_usage {
            let choices: &[ChatChunk<'_>] = &[];
            write_event(&self.envelope(self.chunk_object(), choices, Some(Some(usage.into()))), out);
        }
        out.extend_from_slice(b"data: [DONE]\n\n");
    }

    /// All of the answer in one object.
    ///
    /// # Errors
    /// None that its types allow; they are passed on rather than assumed away.
    pub(crate) fn whole(
        &mut self,
        text: &str,
        logprobs: &[TokenLogprob],
        reason: FinishReason,
        usage: Usage,
    ) -> Result<Vec<u8>, serde_json::Error> {
        let usage = Some(Some(usage.into()));
        let finish_reason = reason_text(reason);
        match self.kind {
            Kind::Chat => {
                let message = ChatMessage { role: "assistant", content: text, refusal: None };
                let logprobs = self.chat_logprobs(logprobs);
                let choices = [ChatChoice { index: 0, message, logprobs, finish_reason }];
                serde_json::to_vec(&self.envelope("chat.completion", &choices, usage))
            }
            Kind::Plain => {
                let logprobs = self.plain_logprobs(logprobs);
                let choices = [PlainChoice { index: 0, text, logprobs, finish_reason: Some(finish_reason) }];
                serde_json::to_vec(&self.envelope("text_completion", &choices, usage))
            }
        }
    }

    fn chunk_object(&self) -> &'static str {
        match self.kind {
            Kind::Chat => "chat.completion.chunk",
            Kind::Plain => "text_completion",
        }
    }

    fn write_event<C: Serialize>(&self, choices: &[C], out: &mut BytesMut) {
        write_event(&self.envelope(self.chunk_object(), choices, self.include_usage.then_some(None)), out);
    }

    fn envelope<'a, C>(
        &'a self,
        object: &'static str,
        choices: &'a [C],
        usage: Option<Option<UsageObject>>,
    ) -> Envelope<'a, C> {
        Envelope {
            id: &self.id,
            object,
            created: self.created,
            model: &self.model,
            system_fingerprint: &self.system_fingerprint,
            choices,
            usage,
        }
    }

    fn chat_logprobs<'a>(&self, logprobs: &'a [TokenLogprob]) -> Option<ChatLogprobs<'a>> {
        self.logprobs?;
        let alternative = |(token, bytes, logprob): &'a (Token, Vec<u8>, f32)| ChatToken {
            token: token_text(*token, bytes),
            logprob: finite(*logprob),
            bytes,
            top_logprobs: None,
        };
        let token = |token: &'a TokenLogprob| ChatToken {
            token: token_text(token.token, &token.bytes),
            logprob: finite(token.logprob),
            bytes: &token.bytes,
            top_logprobs: Some(token.top.iter().map(alternative).collect()),
        };
        Some(ChatLogprobs { content: logprobs.iter().map(token).collect(), refusal: None })
    }

    fn plain_logprobs(&mut self, logprobs: &[TokenLogprob]) -> Option<PlainLogprobs> {
        let n_top = self.logprobs?;
        let tokens: Vec<_> = logprobs.iter().map(|token| token_text(token.token, &token.bytes)).collect();
        let alternatives = |token: &TokenLogprob| {
            let entry = |(token, bytes, logprob): &(Token, Vec<u8>, f32)| {
                (token_text(*token, bytes), Value::from(finite(*logprob)))
            };
            token.top.iter().map(entry).collect()
        };
        let mut offset = |token: &TokenLogprob| {
            let offset = self.text_offset;
            // A character is counted where its first byte is.
            self.text_offset += token.bytes.iter().filter(|&&byte| byte & 0xc0 != 0x80).count();
            offset
        };
        Some(PlainLogprobs {
            tokens,
            token_logprobs: logprobs.iter().map(|token| finite(token.logprob)).collect(),
            top_logprobs: (n_top > 0).then(|| logprobs.iter().map(alternatives).collect()),
            text_offset: logprobs.iter().map(&mut offset).collect(),
        })
    }
}

impl TextChunk {
    /// Cuts a chunk whose text is empty at that text.
    fn cut(chunk: &[u8]) -> Option<Self> {
        // It is the last empty string: behind it come numbers and nulls alone.
        let quotes = chunk.windows(2).rposition(|pair| pair == b"\"\"")?;
        Some(Self { before: chunk[..quotes].to_vec(), after: chunk[quotes + 2..].to_vec() })
    }

    /// The chunk of `text`.
    pub(crate) fn write(&self, text: &str, out: &mut BytesMut) {
        // With room for the quotes; whatever has to be escaped makes it grow.
        out.reserve(self.before.len() + text.len() + 2 + self.after.len());
        out.extend_from_slice(&self.before);
        write_json(text, "\"\"", out);
        out.extend_from_slice(&self.after);
    }
}

/// Appends one server-sent event.
pub(crate) fn write_event(value: &impl Serialize, out: &mut BytesMut) {
    out.extend_from_slice(b"data: ");
    write_json(value, "{}", out);
    out.extend_from_slice(b"\n\n");
}

/// Appends a value as JSON. No type here can fail to serialize; were one to, the stream stays well-formed with
/// `otherwise`.
fn write_json<T: Serialize + ?Sized>(value: &T, otherwise: &str, out: &mut BytesMut) {
    let start = out.len();
    if let Err(error) = serde_json::to_writer((&mut *out).writer(), value) {
        tracing::error!(%error, "an event could not be written");
        out.truncate(start);
        out.extend_from_slice(otherwise.as_bytes());
    }
}

impl From<Usage> for UsageObject {
    fn from(usage: Usage) -> Self {
        Self {
            prompt_tokens: usage.prompt_tokens,
            completion_tokens: usage.completion_tokens,
            total_tokens: usage.prompt_tokens.saturating_add(usage.completion_tokens),
            prompt_tokens_details: PromptDetails { cached_tokens: usage.cached_tokens, audio_tokens: 0 },
            completion_tokens_details: CompletionDetails::default(),
        }
    }
}

fn reason_text(reason: FinishReason) -> &'static str {
    match reason {
        FinishReason::Stop => "stop",
        FinishReason::Length => "length",
    }
}

fn finite(logprob: f32) -> f32 {
    if logprob.is_finite() { logprob } else { IMPOSSIBLE }
}

/// A token as text. Part of a character is written as `bytes:\xe2\x82`, as OpenAI does; a token without bytes, such as
/// an end token, by its number, so that two of them stay apart.
fn token_text(token: Token, bytes: &[u8]) -> String {
    if bytes.is_empty() {
        return format!("<token {token}>");
    }
    std::str::from_utf8(bytes).map_or_else(
        |_| bytes.iter().fold("bytes:".to_owned(), |text, byte| format!("{text}\\x{byte:02x}")),
        str::to_owned,
    )
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn answer(kind: Kind, logprobs: Option<u8>) -> Answer {
        Answer {
            kind,
            id: "x-1".to_owned(),
            created: 5,
            model: "m".to_owned(),
            system_fingerprint: "f".to_owned(),
            logprobs,
            include_usage: false,
            text_offset: 0,
        }
    }

    fn token(bytes: &[u8], logprob: f32) -> TokenLogprob {
        let top = vec![(9, bytes.to_vec(), logprob), (8, vec![0xe2], f32::NEG_INFINITY)];
        TokenLogprob { token: 9, bytes: bytes.to_vec(), logprob, top }
    }

    fn events(out: &[u8]) -> Vec<Value> {
        let text = std::str::from_utf8(out).unwrap();
        text.split_terminator("\n\n").map(|event| serde_json::from_str(&event["data: ".len()..]).unwrap()).collect()
    }

    #[test]
    fn chat_logprobs_have_bytes_and_alternatives() {
        let mut out = BytesMut::new();
        answer(Kind::Chat, Some(2)).write_delta("é", &[token("é".as_bytes(), -0.5)], &mut out);
        let expected = json!({
            "content": [{"token": "é", "logprob": -0.5, "bytes": [195, 169], "top_logprobs": [
                {"token": "é", "logprob": -0.5, "bytes": [195, 169]},
                {"token": "bytes:\\xe2", "logprob": -9999.0, "bytes": [226]},
            ]}],
            "refusal": null,
        });
        assert_eq!(events(&out)[0]["choices"][0]["logprobs"], expected);
    }

    #[test]
    fn plain_logprobs_count_offsets_over_chunks() {
        let mut answer = answer(Kind::Plain, Some(0));
        let mut out = BytesMut::new();
        answer.write_delta("né", &[token(b"n", -1.0), token("é".as_bytes(), -2.0)], &mut out);
        answer.write_delta("!", &[token(b"!", f32::NAN)], &mut out);
        let events = events(&out);
        let expected =
            json!({"tokens": ["n", "é"], "token_logprobs": [-1.0, -2.0], "top_logprobs": null, "text_offset": [0, 1]});
        assert_eq!(events[0]["choices"][0]["logprobs"], expected);
        assert_eq!(events[1]["choices"][0]["logprobs"]["text_offset"], json!([2]));
        assert_eq!(events[1]["choices"][0]["logprobs"]["token_logprobs"], json!([-9999.0]));
    }

    #[test]
    fn a_text_chunk_is_the_chunk_that_would_be_built() {
        for (kind, include_usage) in
            [(Kind::Chat, false), (Kind::Chat, true), (Kind::Plain, false), (Kind::Plain, true)]
        {
            // Names with what the cut looks for.
            let mut answer =
                Answer { include_usage, model: "a \"\" b".to_owned(), id: String::new(), ..answer(kind, None) };
            let chunk = answer.text_chunk().unwrap();
            for text in ["", "a", "\"", "\"\"", "é\n\t\u{1}\\ </s>", "data: x\n\n"] {
                let (mut fast, mut built) = (BytesMut::new(), BytesMut::new());
                chunk.write(text, &mut fast);
                answer.write_delta(text, &[], &mut built);
                assert_eq!(fast, built);
            }
        }
        assert!(answer(Kind::Chat, Some(0)).text_chunk().is_none());
    }

    #[test]
    fn tokens_without_bytes_stay_apart() {
        assert_ne!(token_text(1, &[]), token_text(2, &[]));
    }
}
