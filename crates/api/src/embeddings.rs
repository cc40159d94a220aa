//! `POST /v1/embeddings`, as OpenAI has it: a vector of length one for each text.
//!
//! What the model gives is cut to the dimensions that were asked for, brought to length one, and sent as numbers or as
//! Base64 of little-endian 32-bit floats.

use std::sync::Arc;

use axum::Extension;
use axum::extract::{Request, State};
use axum::response::Response;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use brigade_node::serving::{ModelCard, Purpose, Serving};
use serde::Serialize;
use serde_json::Value;

use crate::access::Caller;
use crate::completions::{note_client_id, under_id};
use crate::error::ApiError;
use crate::fields::{Fields, clip, mismatch};
use crate::request::{Prompt, tokens};
use crate::routes::{Answered, App, Shared, blocking};
use crate::texts::{self, Batch, MAX_TEXTS, MAX_WRITTEN, TEXT_BYTES, TokenCount, Vectors, Wishes, check_purpose};

/// Most dimensions that a request may ask for: the widest hidden state that is taken.
const MAX_DIMENSIONS: i64 = 1 << 17;

/// A body of `POST /v1/embeddings`.
#[derive(Debug, PartialEq)]
struct Embeddings {
    /// 1 to [`MAX_TEXTS`].
    input: Vec<Prompt>,
    encoding: Encoding,
    /// How many of each vector's values are wanted.
    dimensions: Option<usize>,
    wishes: Wishes,
}

/// How vectors are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Encoding {
    Float,
    Base64,
}

/// `POST /v1/embeddings`.
pub(crate) async fn embeddings(State(app): Shared, Extension(caller): Extension<Caller>, request: Request) -> Response {
    under_id("embd", |id| embed(app, id, caller, request)).await
}

async fn embed(app: Arc<App>, id: String, caller: Caller, request: Request) -> Answered {
    note_client_id(request.headers())?;
    let _entry = app.gate.enter()?;
    let body = app.bodies.read(request).await?;
    let (serving, n_bytes) = (Arc::clone(&app.serving), body.n_bytes());
    let work = move |app: &App| {
        let (body, _room) = body.json()?;
        let model = app.serving.model();
        let Embeddings { input, encoding, dimensions, wishes } = Embeddings::parse(body, model)?;
        check_purpose(model, Purpose::Embed)?;
        check_dimensions(dimensions, model.n_values as usize)?;
        texts::check_values(model, input.len())?;
        let texts = tokenized(&*app.serving, input)?;
        let room = texts::room_for(&app.batches, model, &texts, 0)?;
        tracing::debug!(texts = texts.len(), "the request is handed on");
        let turn = app.turns.join();
        Ok((Batch { id, tenant: caller.tenant, wishes, texts, room, turn }, encoding, dimensions))
    };
    let (batch, encoding, dimensions) = app.tokenizing(n_bytes, work).await?;
    let Vectors { room, values, prompt_tokens } = texts::vectors(&*serving, batch).await?;
    blocking(move || {
        let n_written: usize = values.iter().map(Vec::len).sum();
        let n_bytes = n_written * MAX_WRITTEN + values.len() * TEXT_BYTES;
        let data = values.into_iter().enumerate().map(|(index, values)| {
            Ok(Item { object: "embedding", index, embedding: Written::new(unit(values, dimensions)?, encoding) })
        });
        let data = data.collect::<Result<Vec<_>, ApiError>>()?;
        let usage = UsageObject { prompt_tokens, total_tokens: prompt_tokens };
        texts::answer(&List { object: "list", data, model: &serving.model().name, usage }, n_bytes, room)
    })
    .await
}

impl Embeddings {
    /// # Errors
    /// 400 or 404 that names the field at fault.
    fn parse(body: Value, model: &ModelCard) -> Result<Self, ApiError> {
        let mut fields = Fields::of_body(body)?;
        let wishes = Wishes::parse(&mut fields, model)?;
        let encoding = match fields.string("encoding_format")?.as_deref() {
            None | Some("float") => Encoding::Float,
            Some("base64") => Encoding::Base64,
            Some(other) => {
                let message = format!("`encoding_format` must be `float` or `base64`, not `{}`", clip(other));
                return Err(ApiError::field("encoding_format", message).with_code("invalid_value"));
            }
        };
        let dimensions = fields.integer("dimensions", 1..=MAX_DIMENSIONS)?.map(|n| n as usize);
        let input = input(fields.require("input")?, model.n_vocab)?;
        fields.finish()?;
        Ok(Self { input, encoding, dimensions, wishes })
    }
}

/// One text, one list of tokens, or many of one kind.
fn input(value: Value, n_vocab: u32) -> Result<Vec<Prompt>, ApiError> {
    let empty = |path: &str| ApiError::field(path, format!("`{path}` must not be empty")).with_code("invalid_value");
    let items = match value {
        Value::String(text) if text.is_empty() => return Err(empty("input")),
        Value::String(text) => return Ok(vec![Prompt::Text(text)]),
        Value::Array(items) if items.first().is_some_and(Value::is_number) => {
            return Ok(vec![Prompt::Tokens(tokens("input", items, n_vocab)?)]);
        }
        Value::Array(items) => items,
        other => return Err(mismatch("input", "a string, an array of strings or tokens", &other)),
    };
    if items.is_empty() {
        return Err(empty("input"));
    }
    if items.len() > MAX_TEXTS {
        let message = format!("`input` holds {} texts, more than {MAX_TEXTS}; send them in parts", items.len());
        return Err(ApiError::field("input", message));
    }
    let one = |(at, item): (usize, Value)| {
        let path = format!("input[{at}]");
        match item {
            Value::String(text) if text.is_empty() => Err(empty(&path)),
            Value::String(text) => Ok(Prompt::Text(text)),
            Value::Array(items) if items.is_empty() => Err(empty(&path)),
            Value::Array(items) => tokens(&path, items, n_vocab).map(Prompt::Tokens),
            other => Err(mismatch(&path, "a string or an array of tokens", &other)),
        }
    };
    items.into_iter().enumerate().map(one).collect()
}

fn tokenized(serving: &dyn Serving, input: Vec<Prompt>) -> Result<Vec<Vec<brigade_base::Token>>, ApiError> {
    let is_one = input.len() == 1;
    let mut count = TokenCount::default();
    let one = |(at, prompt): (usize, Prompt)| {
        let path = if is_one { "input".to_owned() } else { format!("input[{at}]") };
        let tokens = match prompt {
            Prompt::Text(text) => serving.tokenize(&text, true, true),
            Prompt::Tokens(tokens) => Ok(tokens),
        };
        let tokens = texts::checked(serving.model(), tokens).map_err(texts::at(path))?;
        count.add(tokens.len())?;
        Ok(tokens)
    };
    input.into_iter().enumerate().map(one).collect()
}

/// Whether vectors of `n_values` can be cut to so many.
fn check_dimensions(dimensions: Option<usize>, n_values: usize) -> Result<(), ApiError> {
    match dimensions {
        Some(dimensions) if dimensions > n_values => {
            let message = format!("`dimensions` is {dimensions}, but this model's vectors have {n_values}");
            Err(ApiError::field("dimensions", message).with_code("invalid_value"))
        }
        _ => Ok(()),
    }
}

/// The first `dimensions` of a vector, brought to length one; one of zeros stays as it is.
fn unit(mut values: Vec<f32>, dimensions: Option<usize>) -> Result<Vec<f32>, ApiError> {
    check_dimensions(dimensions, values.len())?;
    values.truncate(dimensions.unwrap_or(values.len()));
    let length = values.iter().map(|value| f64::from(*value).powi(2)).sum::<f64>().sqrt();
    // JSON has no word for such values.
    if !length.is_finite() {
        return Err(ApiError::internal("the model gave a text no vector of finite numbers"));
    }
    if length > 0.0 {
        values.iter_mut().for_each(|value| *value = (f64::from(*value) / length) as f32);
    }
    Ok(values)
}

#[derive(Serialize)]
struct List<'a> {
    object: &'static str,
    data: Vec<Item>,
    model: &'a str,
    usage: UsageObject,
}

#[derive(Serialize)]
struct Item {
    object: &'static str,
    index: usize,
    embedding: Written,
}

/// Tokens of all texts.
#[derive(Serialize)]
pub(crate) struct UsageObject {
    pub(crate) prompt_tokens: u64,
    pub(crate) total_tokens: u64,
}

#[derive(Serialize)]
#[serde(untagged)]
enum Written {
    Float(Vec<f32>),
    Base64(String),
}

impl Written {
    fn new(values: Vec<f32>, encoding: Encoding) -> Self {
        match encoding {
            Encoding::Float => Self::Float(values),
            Encoding::Base64 => {
                let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
                Self::Base64(STANDARD.encode(bytes))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vectors_are_cut_and_brought_to_length_one() {
        assert_eq!(unit(vec![3.0, 4.0], None).unwrap(), [0.6, 0.8]);
        assert_eq!(unit(vec![3.0, 4.0, 99.0], Some(2)).unwrap(), [0.6, 0.8]);
        assert_eq!(unit(vec![0.0, 0.0], None).unwrap(), [0.0, 0.0]);
        assert!(unit(vec![1.0], Some(2)).unwrap_err().to_string().contains("have 1"));
        assert!([f32::NAN, f32::INFINITY].iter().all(|value| unit(vec![1.0, *value], None).is_err()));
    }

    #[test]
    fn base64_is_of_little_endian_floats() {
        let Written::Base64(text) = Written::new(vec![1.0, -2.5], Encoding::Base64) else { panic!("not base64") };
        assert_eq!(text, "AACAPwAAIMA=");
    }
}
