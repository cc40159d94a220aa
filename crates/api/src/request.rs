//! Requests for completions, parsed once into types that cannot be wrong.
//!
//! A body becomes a [`Chat`] or a [`Completion`]: defaults filled in, every number in its range, every field either
//! understood, known to change nothing, or refused by name.

use std::ops::RangeInclusive;
use std::time::Duration;

use brigade_base::Token;
use brigade_node::serving::ModelCard;
use brigade_node::serving::Sampling;
use serde_json::{Map, Value};

use crate::error::ApiError;
use crate::fields::{Fields, clip, mismatch, number};
use crate::template::{Message, Role};

/// Most stop strings. OpenAI takes 4; tools that stand in for other servers send more, few more than this.
const MAX_STOPS: usize = 16;
/// Longest stop string. The end of the answer is held back by as much, so it is also how far an answer may lag.
const MAX_STOP_BYTES: usize = 1024;
/// Most entries of `logit_bias`, as OpenAI has it. Each costs a step per token.
const MAX_LOGIT_BIAS: usize = 1024;
/// Answer length of a plain completion that names none, as OpenAI has it.
const DEFAULT_COMPLETION_TOKENS: u32 = 16;
/// How far `priority` may be from 0: finer than anybody sorts work, and a step for each cannot overflow.
const MAX_PRIORITY: i64 = 1000;
/// Longest `timeout` in seconds: a day, longer than any answer; who wants no end leaves it out.
const MAX_TIMEOUT_S: f64 = 86_400.0;
/// Most alternatives per token that a chat may ask for, and a plain completion; both as OpenAI has them.
const MAX_TOP_LOGPROBS: i64 = 20;
const MAX_COMPLETION_LOGPROBS: i64 = 5;

/// What is served, as far as parsing needs it, and the seed of requests that bring none.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Scope<'a> {
    pub(crate) model: &'a ModelCard,
    pub(crate) random_seed: u64,
}

/// A body of `POST /v1/chat/completions`.
#[derive(Debug, PartialEq)]
pub(crate) struct Chat {
    /// At least one.
    pub(crate) messages: Vec<Message>,
    pub(crate) options: Options,
}

/// A body of `POST /v1/completions`.
#[derive(Debug, PartialEq)]
pub(crate) struct Completion {
    pub(crate) prompt: Prompt,
    pub(crate) options: Options,
}

/// What a plain completion goes on from, or a text that is embedded.
#[derive(Debug, PartialEq)]
pub(crate) enum Prompt {
    /// To be tokenized.
    Text(String),
    /// Already tokenized, each in the vocabulary.
    Tokens(Vec<Token>),
}

/// How to answer.
#[derive(Debug, PartialEq)]
pub(crate) struct Options {
    pub(crate) max_tokens: Option<u32>,
    pub(crate) sampling: Sampling,
    pub(crate) stop: Vec<String>,
    pub(crate) logprobs: Option<u8>,
    pub(crate) ignore_end: bool,
    /// Within ±[`MAX_PRIORITY`]; lower is earlier.
    pub(crate) priority: i32,
    /// What the whole answer may take.
    pub(crate) timeout: Option<Duration>,
    pub(crate) stream: bool,
    /// Ends a stream with a chunk that tells the usage.
    pub(crate) include_usage: bool,
}

impl Chat {
    /// # Errors
    /// 400 or 404 that names the field at fault.
    pub(crate) fn parse(body: Value, scope: Scope<'_>) -> Result<Self, ApiError> {
        let mut fields = Fields::of_body(body)?;
        let mut options = Options::parse(&mut fields, scope)?;
        let newer = fields.integer("max_completion_tokens", 0..=i64::from(u32::MAX))?.map(|n| n as u32);
        if newer.is_some() && options.max_tokens.is_some() && newer != options.max_tokens {
            let message = "`max_tokens` and `max_completion_tokens` differ; send one of them";
            return Err(ApiError::field("max_completion_tokens", message));
        }
        options.max_tokens = newer.or(options.max_tokens);
        options.logprobs = chat_logprobs(&mut fields)?;
        refuse_missing_chat_features(&mut fields)?;
        let messages = match fields.require("messages")? {
            Value::Array(messages) if messages.is_empty() => {
                return Err(ApiError::field("messages", "`messages` must hold at least one message"));
            }
            Value::Array(messages) => messages.into_iter().enumerate().map(message).collect::<Result<_, _>>()?,
            other => return Err(mismatch("messages", "an array", &other)),
        };
        fields.finish()?;
        Ok(Self { messages, options })
    }
}

impl Completion {
    /// # Errors
    /// 400 or 404 that names the field at fault.
    pub(crate) fn parse(body: Value, scope: Scope<'_>) -> Result<Self, ApiError> {
        let mut fields = Fields::of_body(body)?;
        let mut options = Options::parse(&mut fields, scope)?;
        options.max_tokens = options.max_tokens.or(Some(DEFAULT_COMPLETION_TOKENS));
        options.logprobs = fields.integer("logprobs", 0..=MAX_COMPLETION_LOGPROBS)?.map(|n| n as u8);
        fields.unsupported("echo", |value| *value == Value::Bool(false))?;
        fields.unsupported("best_of", |value| value.as_i64() == Some(1))?;
        fields.unsupported("suffix", |value| value.as_str() == Some(""))?;
        let prompt = Prompt::parse(fields.require("prompt")?, scope.model.n_vocab)?;
        fields.finish()?;
        Ok(Self { prompt, options })
    }
}

impl Prompt {
    fn parse(value: Value, n_vocab: u32) -> Result<Self, ApiError> {
        match value {
            Value::String(text) => Ok(Self::Text(text)),
            Value::Array(mut items) => match items.first() {
                Some(Value::Number(_)) => tokens("prompt", items, n_vocab).map(Self::Tokens),
                Some(Value::String(_) | Value::Array(_)) if items.len() > 1 => {
                    let message = format!("`prompt` holds {} prompts; send one request for each", items.len());
                    Err(ApiError::field("prompt", message).with_code("unsupported_value"))
                }
                Some(Value::String(_) | Value::Array(_)) => match items.swap_remove(0) {
                    Value::String(text) => Ok(Self::Text(text)),
                    Value::Array(inner) => tokens("prompt[0]", inner, n_vocab).map(Self::Tokens),
                    other => Err(mismatch("prompt[0]", "a string or an array of tokens", &other)),
                },
                Some(other) => Err(mismatch("prompt[0]", "a string or a token", other)),
                None => Err(ApiError::field("prompt", "`prompt` must not be empty")),
            },
            other => Err(mismatch("prompt", "a string or an array of tokens", &other)),
        }
    }
}

/// Token ids, each in the vocabulary.
pub(crate) fn tokens(path: &str, items: Vec<Value>, n_vocab: u32) -> Result<Vec<Token>, ApiError> {
    let token = |(i, item): (usize, Value)| {
        let id = item.as_i64().ok_or_else(|| mismatch(&format!("{path}[{i}]"), "a token id", &item))?;
        token(id, n_vocab).ok_or_else(|| {
            let message = format!("token {id} is not in the vocabulary of {n_vocab} tokens");
            ApiError::field(format!("{path}[{i}]"), message).with_code("invalid_value")
        })
    };
    items.into_iter().enumerate().map(token).collect()
}

fn token(id: i64, n_vocab: u32) -> Option<Token> {
    Token::try_from(id).ok().filter(|_| (0..i64::from(n_vocab)).contains(&id))
}

impl Options {
    /// Reads what both kinds of completion share; `logprobs` is the caller's.
    fn parse(fields: &mut Fields, scope: Scope<'_>) -> Result<Self, ApiError> {
        check_model(fields, scope.model)?;
        fields.unsupported("n", |value| value.as_i64() == Some(1))?;
        fields.unsupported("store", |value| *value == Value::Bool(false))?;
        fields.ignore(&[
            "user",
            "metadata",
            "service_tier",
            "safety_identifier",
            "prompt_cache_key",
            "prompt_cache_retention",
        ]);
        let stream = fields.bool("stream")?.unwrap_or(false);
        Ok(Self {
            max_tokens: fields.integer("max_tokens", 0..=i64::from(u32::MAX))?.map(|n| n as u32),
            sampling: sampling(fields, scope)?,
            stop: stop(fields)?,
            logprobs: None,
            ignore_end: fields.bool("ignore_eos")?.unwrap_or(false),
            priority: priority(fields)?,
            timeout: timeout(fields)?,
            stream,
            include_usage: include_usage(fields, stream)?,
        })
    }
}

/// Refuses the name of another model than the one that is served.
pub(crate) fn check_model(fields: &mut Fields, model: &ModelCard) -> Result<(), ApiError> {
    match fields.string("model")? {
        Some(name) if name != model.name && name != "default" => {
            Err(ApiError::unknown_model(&clip(&name), &model.name))
        }
        _ => Ok(()),
    }
}

pub(crate) fn priority(fields: &mut Fields) -> Result<i32, ApiError> {
    Ok(fields.integer("priority", -MAX_PRIORITY..=MAX_PRIORITY)?.map_or(0, |n| n as i32))
}

fn include_usage(fields: &mut Fields, stream: bool) -> Result<bool, ApiError> {
    let Some(value) = fields.take("stream_options") else { return Ok(false) };
    if !stream {
        return Err(ApiError::field("stream_options", "`stream_options` is allowed only with `stream: true`"));
    }
    let mut fields = Fields::of(value, "stream_options")?;
    let include_usage = fields.bool("include_usage")?.unwrap_or(false);
    // Padding against guessing an answer from packet sizes; links to this server are expected to be the user's own.
    fields.unsupported("include_obfuscation", |value| *value == Value::Bool(false))?;
    fields.finish()?;
    Ok(include_usage)
}

fn sampling(fields: &mut Fields, scope: Scope<'_>) -> Result<Sampling, ApiError> {
    let default = Sampling::default();
    let top_p = top_p(fields)?.unwrap_or(default.top_p);
    let mut or = |name, range: RangeInclusive<f64>, default: f32| -> Result<f32, ApiError> {
        Ok(fields.number(name, range)?.map_or(default, |value| value as f32))
    };
    let temperature = or("temperature", 0.0..=2.0, default.temperature)?;
    let min_p = or("min_p", 0.0..=1.0, default.min_p)?;
    let repeat_penalty = or("repetition_penalty", 0.01..=10.0, default.repeat_penalty)?;
    let frequency_penalty = or("frequency_penalty", -2.0..=2.0, default.frequency_penalty)?;
    let presence_penalty = or("presence_penalty", -2.0..=2.0, default.presence_penalty)?;
    // vLLM says "all" as -1, llama.cpp as 0.
    let top_k = fields.integer("top_k", -1..=i64::from(i32::MAX))?.map_or(default.top_k, |k| k.max(0) as u32);
    let penalised = repeat_penalty != 1.0 || frequency_penalty != 0.0 || presence_penalty != 0.0;
    Ok(Sampling {
        temperature,
        top_k,
        top_p,
        min_p,
        repeat_penalty,
        frequency_penalty,
        presence_penalty,
        // OpenAI's penalties look at the whole answer.
        penalty_window: if penalised {
            scope.model.context.min(Sampling::MAX_PENALTY_WINDOW)
        } else {
            default.penalty_window
        },
        seed: fields.integer("seed", i64::MIN..=i64::MAX)?.map_or(scope.random_seed, |seed| seed as u64),
        logit_bias: logit_bias(fields, scope.model.n_vocab)?,
    })
}

/// Above 0, since in no time there is no answer; what rounds to no nanosecond is none either.
pub(crate) fn timeout(fields: &mut Fields) -> Result<Option<Duration>, ApiError> {
    let Some(seconds) = fields.number("timeout", f64::MIN..=f64::MAX)? else { return Ok(None) };
    let duration = (seconds <= MAX_TIMEOUT_S).then(|| Duration::try_from_secs_f64(seconds).ok()).flatten();
    match duration.filter(|duration| !duration.is_zero()) {
        Some(duration) => Ok(Some(duration)),
        None => {
            let found = clip(&seconds.to_string());
            let message = format!("`timeout` must be above 0 and at most {MAX_TIMEOUT_S} seconds, not {found}");
            Err(ApiError::field("timeout", message).with_code("invalid_value"))
        }
    }
}

/// Above 0, since at 0 nothing would be left; what rounds to 0 in single precision is no less nonsense.
fn top_p(fields: &mut Fields) -> Result<Option<f32>, ApiError> {
    match fields.number("top_p", f64::MIN..=f64::MAX)? {
        Some(number) if !(number as f32 > 0.0 && number <= 1.0) => {
            let found = clip(&number.to_string());
            let message = format!("`top_p` must be above 0 and at most 1, not {found}");
            Err(ApiError::field("top_p", message).with_code("invalid_value"))
        }
        number => Ok(number.map(|number| number as f32)),
    }
}

fn logit_bias(fields: &mut Fields, n_vocab: u32) -> Result<Vec<(Token, f32)>, ApiError> {
    let map: Map<String, Value> = match fields.take("logit_bias") {
        None => return Ok(Vec::new()),
        Some(Value::Object(map)) => map,
        Some(other) => return Err(mismatch("logit_bias", "an object", &other)),
    };
    if map.len() > MAX_LOGIT_BIAS {
        let message = format!("`logit_bias` holds {} tokens, more than {MAX_LOGIT_BIAS}", map.len());
        return Err(ApiError::field("logit_bias", message));
    }
    let entry = |(id, bias): (&String, &Value)| {
        let path = format!("logit_bias.{}", clip(id));
        let token = id.parse().ok().and_then(|id| token(id, n_vocab)).ok_or_else(|| {
            let message = format!("`{path}` must be named by a token id below {n_vocab}");
            ApiError::field(path.as_str(), message).with_code("invalid_value")
        })?;
        Ok((token, number(&path, bias, &(-100.0..=100.0))? as f32))
    };
    map.iter().map(entry).collect()
}

fn stop(fields: &mut Fields) -> Result<Vec<String>, ApiError> {
    let items = match fields.take("stop") {
        None => return Ok(Vec::new()),
        Some(Value::Array(items)) => items,
        Some(one) => vec![one],
    };
    if items.len() > MAX_STOPS {
        let message = format!("`stop` holds {} strings, more than {MAX_STOPS}", items.len());
        return Err(ApiError::field("stop", message));
    }
    let text = |item| match item {
        Value::String(text) if text.is_empty() => Err(ApiError::field("stop", "a stop string must not be empty")),
        Value::String(text) if text.len() > MAX_STOP_BYTES => {
            let message = format!("a stop string has {} bytes, more than {MAX_STOP_BYTES}", text.len());
            Err(ApiError::field("stop", message))
        }
        Value::String(text) => Ok(text),
        other => Err(mismatch("stop", "a string or an array of strings", &other)),
    };
    items.into_iter().map(text).collect()
}

fn chat_logprobs(fields: &mut Fields) -> Result<Option<u8>, ApiError> {
    let wanted = fields.bool("logprobs")?.unwrap_or(false);
    let top = fields.integer("top_logprobs", 0..=MAX_TOP_LOGPROBS)?.map(|n| n as u8);
    match (wanted, top) {
        (true, top) => Ok(Some(top.unwrap_or(0))),
        (false, None | Some(0)) => Ok(None),
        (false, Some(_)) => {
            Err(ApiError::field("top_logprobs", "`top_logprobs` is allowed only with `logprobs: true`"))
        }
    }
}

/// Parts of OpenAI's chat that need what is not there yet.
fn refuse_missing_chat_features(fields: &mut Fields) -> Result<(), ApiError> {
    let nothing = |value: &Value| value.as_array().is_some_and(Vec::is_empty);
    let no_choice = |value: &Value| matches!(value.as_str(), Some("none" | "auto"));
    let text_only = |value: &Value| value.as_array().is_some_and(|modes| modes.iter().all(|mode| mode == "text"));
    fields.unsupported("tools", nothing)?;
    fields.unsupported("tool_choice", no_choice)?;
    fields.unsupported("functions", nothing)?;
    fields.unsupported("function_call", no_choice)?;
    fields.unsupported("modalities", text_only)?;
    fields.ignore(&["parallel_tool_calls"]);
    for name in ["audio", "prediction", "web_search_options", "reasoning_effort", "verbosity"] {
        fields.unsupported(name, |_| false)?;
    }
    fields.unsupported("response_format", |value| {
        value.as_object().is_some_and(|format| format.len() == 1 && format.get("type").is_some_and(|t| t == "text"))
    })
}

fn message((i, value): (usize, Value)) -> Result<Message, ApiError> {
    let path = format!("messages[{i}]");
    let mut fields = Fields::of(value, &path)?;
    let role = match fields.require("role")?.as_str() {
        Some("system" | "developer") => Role::System,
        Some("user") => Role::User,
        Some("assistant") => Role::Assistant,
        Some("tool" | "function") => {
            let message = format!("`{path}` answers a tool call, and tools are not supported yet");
            return Err(ApiError::field(format!("{path}.role"), message).with_code("unsupported_value"));
        }
        _ => {
            let message = format!("`{path}.role` must be system, developer, user or assistant");
            return Err(ApiError::field(format!("{path}.role"), message).with_code("invalid_value"));
        }
    };
    // Clients send an assistant's message back as they got it.
    let nothing = |value: &Value| value.as_array().is_some_and(Vec::is_empty);
    fields.unsupported("tool_calls", nothing)?;
    fields.unsupported("annotations", nothing)?;
    for name in ["function_call", "refusal", "audio"] {
        fields.unsupported(name, |_| false)?;
    }
    let name = fields.string("name")?;
    let content = content(fields.require("content")?, &fields.path("content"))?;
    fields.finish()?;
    Ok(Message { role, content, name })
}

/// The text of a message. Parts are joined by line breaks, as the other local servers do for templates that take text.
fn content(value: Value, path: &str) -> Result<String, ApiError> {
    let parts = match value {
        Value::String(text) => return Ok(text),
        Value::Array(parts) => parts,
        other => return Err(mismatch(path, "a string or an array of parts", &other)),
    };
    let part = |(i, part): (usize, Value)| {
        let path = format!("{path}[{i}]");
        let mut fields = Fields::of(part, &path)?;
        match fields.string("type")?.as_deref() {
            Some("text") => {}
            Some(kind) => {
                let message = format!("`{path}` is of type `{}`; only text is supported yet", clip(kind));
                return Err(ApiError::field(path, message).with_code("unsupported_value"));
            }
            None => return Err(ApiError::field(format!("{path}.type"), format!("`{path}.type` is required"))),
        }
        let text = match fields.require("text")? {
            Value::String(text) => text,
            other => return Err(mismatch(&format!("{path}.text"), "a string", &other)),
        };
        fields.finish()?;
        Ok(text)
    };
    let texts: Vec<_> = parts.into_iter().enumerate().map(part).collect::<Result<_, _>>()?;
    Ok(texts.join("\n"))
}

#[cfg(test)]
#[path = "request_tests.rs"]
pub(crate) mod tests;
