//! Texts that are made vectors of: what the endpoints of embeddings and of ranking share.
//!
//! ```text
//! body -> texts -> tokens (blocking thread) -> a session for each, some at once -> vectors, in the order of the texts
//! ```
//!
//! A request of many texts is many sessions. Those of one request take turns with those of others by the same rules as
//! answers do, so it never has the model to itself.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use axum::http::StatusCode;
use brigade_base::{TenantId, Token};
use brigade_node::serving::{Event, Failure, ModelCard, Purpose, Request, Serving, SubmitError};
use tokio::sync::mpsc::UnboundedReceiver;

use crate::error::ApiError;
use crate::fields::Fields;
use crate::request::{check_model, priority, timeout};

/// Most texts of a request, as OpenAI has it.
pub(crate) const MAX_TEXTS: usize = 2048;

/// Most tokens of all texts of a request: some minutes of a large model on a small cluster, and three times what OpenAI
/// takes.
pub(crate) const MAX_TOKENS: usize = 1 << 20;

/// Most values of all vectors of a request, which wait in memory until the last one is there: [`MAX_TEXTS`] of the
/// widest usual ones, of 4096. As text each takes some ten bytes.
const MAX_VALUES: usize = 8 << 20;

/// Sessions of one request at once: the passes of a few stages stay full, and no more of the queue is taken than
/// everyone has to himself.
const MAX_AT_ONCE: usize = 16;

/// What all requests with texts may say.
#[derive(Debug, PartialEq)]
pub(crate) struct Wishes {
    pub(crate) priority: i32,
    pub(crate) timeout: Option<Duration>,
}

impl Wishes {
    /// Reads them, and checks that the right model is asked.
    pub(crate) fn parse(fields: &mut Fields, model: &ModelCard) -> Result<Self, ApiError> {
        check_model(fields, model)?;
        fields.ignore(&["user", "metadata", "service_tier", "safety_identifier"]);
        Ok(Self { priority: priority(fields)?, timeout: timeout(fields)? })
    }
}

/// Texts on their way to a model.
#[derive(Debug)]
pub(crate) struct Batch {
    pub(crate) id: String,
    pub(crate) tenant: TenantId,
    pub(crate) wishes: Wishes,
    pub(crate) texts: Vec<Vec<Token>>,
}

/// What came of them.
#[derive(Debug)]
pub(crate) struct Vectors {
    /// One for each text, as the model gives it.
    pub(crate) values: Vec<Vec<f32>>,
    pub(crate) prompt_tokens: u64,
}

/// Whether the model does what an endpoint is for.
///
/// # Errors
/// 400 that says what it does, and where.
pub(crate) fn check_purpose(model: &ModelCard, wanted: Purpose) -> Result<(), ApiError> {
    let advice = match (model.purpose, wanted) {
        (is, wanted) if is == wanted => return Ok(()),
        (Purpose::Generate, Purpose::Embed) => {
            "generates text; to have it embed texts, serve it with --pooling mean, cls or last"
        }
        (Purpose::Generate, _) => "generates text; serve a model that ranks documents",
        (Purpose::Embed, Purpose::Rank) => "embeds texts: use /v1/embeddings, or serve a model that ranks documents",
        (Purpose::Embed, _) => "embeds texts and generates none: use /v1/embeddings",
        (Purpose::Rank, Purpose::Embed) => "ranks documents: use /v1/rerank, or serve a model that embeds texts",
        (Purpose::Rank, _) => "ranks documents and generates no text: use /v1/rerank",
    };
    let message = format!("`{}` {advice}", model.name);
    Err(ApiError::new(StatusCode::BAD_REQUEST, message).with_param("model").with_code("unsupported_model"))
}

/// Keeps count of the tokens of a request's texts.
#[derive(Debug, Default)]
pub(crate) struct TokenCount(usize);

impl TokenCount {
    /// Counts one more text's.
    ///
    /// # Errors
    /// 400 if they are too many together.
    pub(crate) fn add(&mut self, n_tokens: usize) -> Result<(), ApiError> {
        self.0 += n_tokens;
        if self.0 > MAX_TOKENS {
            let message = format!("the texts have more than {MAX_TOKENS} tokens together; send them in parts");
            return Err(ApiError::bad_request(message).with_code("too_many_tokens"));
        }
        Ok(())
    }
}

/// Has a vector made of each text.
///
/// # Errors
/// If one of them cannot be; the others are then given up.
pub(crate) async fn vectors(serving: &dyn Serving, batch: Batch) -> Result<Vectors, ApiError> {
    let Batch { id, tenant, wishes, texts } = batch;
    let n_texts = texts.len();
    let until = wishes.timeout.map(|timeout| (Instant::now(), timeout));
    let mut waiting: VecDeque<(usize, Vec<Token>)> = texts.into_iter().enumerate().collect();
    let mut under_way: VecDeque<UnboundedReceiver<Event>> = VecDeque::new();
    let mut vectors = Vectors { values: Vec::with_capacity(n_texts), prompt_tokens: 0 };
    while vectors.values.len() < n_texts {
        while under_way.len() < MAX_AT_ONCE
            && let Some((at, text)) = waiting.pop_front()
        {
            // Each is traced by its own name.
            let own_id = if n_texts == 1 { id.clone() } else { format!("{id}.{at}") };
            let request = Request {
                priority: wishes.priority,
                timeout: left_of(until)?,
                ..Request::of_text(own_id, tenant, text.clone())
            };
            match serving.submit(request) {
                Ok(events) => under_way.push_back(events),
                // Whoever has sessions waits for those rather than fill the queue.
                Err(SubmitError::Busy { .. }) if !under_way.is_empty() => {
                    waiting.push_front((at, text));
                    break;
                }
                Err(error) => return Err(error.into()),
            }
        }
        let Some(events) = under_way.pop_front() else { return Err(broken_off()) };
        let (values, n_tokens) = vector(events, wishes.timeout).await?;
        check_size(values.len(), n_texts)?;
        vectors.values.push(values);
        vectors.prompt_tokens += u64::from(n_tokens);
    }
    Ok(vectors)
}

/// What is left of the time that the whole request has.
fn left_of(until: Option<(Instant, Duration)>) -> Result<Option<Duration>, ApiError> {
    let Some((begin, timeout)) = until else { return Ok(None) };
    match timeout.checked_sub(begin.elapsed()).filter(|left| !left.is_zero()) {
        Some(left) => Ok(Some(left)),
        None => Err(Failure::TimedOut { after: timeout }.into()),
    }
}

fn check_size(n_values: usize, n_texts: usize) -> Result<(), ApiError> {
    if n_values.saturating_mul(n_texts) <= MAX_VALUES {
        return Ok(());
    }
    let most = MAX_VALUES / n_values.max(1);
    Err(ApiError::bad_request(format!("vectors of {n_values} values are made of {most} texts at once; send fewer")))
}

/// The vector of one text, and its tokens. `timeout` is that of the whole request.
async fn vector(mut events: UnboundedReceiver<Event>, timeout: Option<Duration>) -> Result<(Vec<f32>, u32), ApiError> {
    let mut found = None;
    loop {
        match events.recv().await {
            Some(Event::Pooled { values }) => found = Some(values),
            Some(Event::Done { usage, .. }) => {
                return found.map(|values| (values, usage.prompt_tokens)).ok_or_else(broken_off);
            }
            Some(Event::Failed(Failure::TimedOut { after })) => {
                return Err(Failure::TimedOut { after: timeout.unwrap_or(after) }.into());
            }
            Some(Event::Failed(failure)) => return Err(failure.into()),
            Some(Event::Token { .. } | Event::Text { .. } | Event::Paused { .. } | Event::Resumed) => {}
            None => return Err(broken_off()),
        }
    }
}

fn broken_off() -> ApiError {
    Failure::Engine("a text ended without its vector".to_owned()).into()
}

/// A text's tokens, if the model takes so many: nothing is computed for a request of which one text is refused.
pub(crate) fn checked(model: &ModelCard, tokens: Result<Vec<Token>, SubmitError>) -> Result<Vec<Token>, SubmitError> {
    tokens.and_then(|tokens| model.check_length(tokens.len()).map(|()| tokens))
}

/// The error for the text at `path`.
pub(crate) fn at(path: String) -> impl FnOnce(SubmitError) -> ApiError {
    move |error| ApiError::from(error).with_param(path)
}
