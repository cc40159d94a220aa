//! Completions, from a request to its answer, under one id. Other requests for a model's work get theirs here too.
//!
//! The id is drawn before anything is read. It is the answer's `id`, the header `x-request-id` of answers and refusals
//! alike, the name of the request in the node's traces, and in the span of every log line that is written for it here.

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use axum::Extension;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue};
use axum::response::{IntoResponse, Response};
use brigade_base::Token;
use brigade_node::serving::{self, ModelCard, Purpose, TextPlace, TextsDone};
use jiff::Zoned;
use serde_json::Value;
use tracing::{Instrument, Span, field};

use crate::access::Caller;
use crate::answer::{Answer, Kind};
use crate::error::ApiError;
use crate::request::{Chat, Completion, Options, Prompt, Scope};
use crate::routes::{Answered, App, Shared};
use crate::stream;
use crate::texts::check_purpose;

/// Names a request: ours in an answer, and a client's own in a request, which is only logged beside.
const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// Longest id of a client's own: four UUIDs.
const MAX_CLIENT_ID_BYTES: usize = 128;

/// `POST /v1/chat/completions`.
pub(crate) async fn chat(State(app): Shared, Extension(caller): Extension<Caller>, request: Request) -> Response {
    complete_under_id(app, Kind::Chat, caller, request, |app, body, random_seed| {
        let chat = Chat::parse(body, Scope { model: app.serving.model(), random_seed })?;
        let template = app.template.as_ref().map_err(|error| ApiError::from(error.clone()))?;
        let prompt = template.render(&chat.messages, &Zoned::now())?;
        let prompt = app.serving.tokenize(&prompt, !template.starts_itself(&prompt), true)?;
        Ok((prompt, chat.options))
    })
    .await
}

/// `POST /v1/completions`.
pub(crate) async fn plain(State(app): Shared, Extension(caller): Extension<Caller>, request: Request) -> Response {
    complete_under_id(app, Kind::Plain, caller, request, |app, body, random_seed| {
        let completion = Completion::parse(body, Scope { model: app.serving.model(), random_seed })?;
        let prompt = match completion.prompt {
            Prompt::Text(text) => app.serving.tokenize(&text, true, true)?,
            Prompt::Tokens(tokens) => tokens,
        };
        Ok((prompt, completion.options))
    })
    .await
}

async fn complete_under_id(
    app: Arc<App>,
    kind: Kind,
    caller: Caller,
    request: Request,
    prepare: impl FnOnce(&App, Value, u64) -> Answered<(Vec<Token>, Options)> + Send + 'static,
) -> Response {
    let prefix = match kind {
        Kind::Chat => "chatcmpl",
        Kind::Plain => "cmpl",
    };
    under_id(prefix, |id| complete(app, kind, id, caller, request, prepare)).await
}

/// Draws an id that begins with `prefix`, and answers under it with what `work` does.
pub(crate) async fn under_id<W: Future<Output = Answered>>(prefix: &str, work: impl FnOnce(String) -> W) -> Response {
    let (id, header) = match new_id(prefix) {
        Ok(drawn) => drawn,
        Err(error) => return error.into_response(),
    };
    let span = tracing::info_span!("answer", request = id, client_request = field::Empty);
    let answered = async {
        work(id).await.unwrap_or_else(|error| {
            tracing::debug!(%error, "the request was not answered");
            error.into_response()
        })
    };
    let mut response = answered.instrument(span).await;
    response.headers_mut().insert(REQUEST_ID, header);
    response
}

/// Makes a prompt, submits it, and answers with what comes of it.
async fn complete(
    app: Arc<App>,
    kind: Kind,
    id: String,
    caller: Caller,
    request: Request,
    prepare: impl FnOnce(&App, Value, u64) -> Answered<(Vec<Token>, Options)> + Send + 'static,
) -> Answered {
    note_client_id(request.headers())?;
    let entry = app.gate.enter()?;
    let body = app.bodies.read(request).await?;
    let n_bytes = body.n_bytes();
    let work = move |app: &App| {
        // What is made of the body takes as much memory, so its room is kept until the session has the prompt.
        let (body, _room) = body.json()?;
        check_purpose(app.serving.model(), Purpose::Generate)?;
        let (prompt, options) = prepare(app, body, random()?)?;
        tracing::debug!(prompt_tokens = prompt.len(), stream = options.stream, "the request is handed on");
        let answer = answer(kind, id.clone(), app.serving.model(), &options);
        let events = app.serving.submit(serving::Request {
            id,
            tenant: caller.tenant,
            priority: options.priority,
            timeout: options.timeout,
            prompt,
            max_tokens: options.max_tokens,
            sampling: options.sampling,
            stop: options.stop,
            logprobs: options.logprobs,
            ignore_end: options.ignore_end,
            place: TextPlace::ONLY,
            done: TextsDone::default(),
        })?;
        Ok((answer, events, options.stream))
    };
    let (answer, events, streams) = app.tokenizing(n_bytes, work).await?;
    if streams { Ok(stream::streamed(answer, events, entry)) } else { stream::whole(answer, events).await }
}

fn answer(kind: Kind, id: String, card: &ModelCard, options: &Options) -> Answer {
    Answer {
        kind,
        id,
        created: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs()),
        model: card.name.clone(),
        system_fingerprint: card.id.short(),
        logprobs: options.logprobs,
        include_usage: options.include_usage,
        text_offset: 0,
    }
}

/// An id that nobody can guess, also as a header.
fn new_id(prefix: &str) -> Answered<(String, HeaderValue)> {
    let id = format!("{prefix}-{:016x}{:016x}", random()?, random()?);
    let header = HeaderValue::try_from(&id).map_err(|error| ApiError::internal(error.to_string()))?;
    Ok((id, header))
}

/// Writes the client's own id of its request into the log, if it sent one.
///
/// # Errors
/// 400 if it is none.
pub(crate) fn note_client_id(headers: &HeaderMap) -> Answered<()> {
    if let Some(client_id) = client_id(headers)? {
        Span::current().record("client_request", client_id);
    }
    Ok(())
}

/// The client's own id of its request, if it sent one.
fn client_id(headers: &HeaderMap) -> Answered<Option<&str>> {
    let Some(value) = headers.get(REQUEST_ID) else { return Ok(None) };
    let bytes = value.as_bytes();
    match value.to_str() {
        Ok(id) if (1..=MAX_CLIENT_ID_BYTES).contains(&bytes.len()) && bytes.iter().all(u8::is_ascii_graphic) => {
            Ok(Some(id))
        }
        _ => {
            let message =
                format!("the header `X-Request-Id` must be 1 to {MAX_CLIENT_ID_BYTES} visible ASCII characters");
            Err(ApiError::bad_request(message).with_code("invalid_value"))
        }
    }
}

fn random() -> Answered<u64> {
    getrandom::u64().map_err(|error| ApiError::internal(format!("no randomness: {error}")))
}
