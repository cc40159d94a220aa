//! The routes: each handler reads a request, asks [`Serving`], and writes an answer.
//!
//! What may take long (JSON, templates, tokenizing, files of tickets) runs on the runtime's blocking threads, so that a
//! huge prompt delays nobody's stream.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::extract::rejection::PathRejection;
use axum::extract::{OriginalUri, Path, Request, State};
use axum::http::{HeaderMap, Method, StatusCode};
use axum::middleware::from_fn_with_state;
use axum::response::{IntoResponse, Response};
use axum::routing::{delete, get, post};
use axum::{Json, Router};
use brigade_node::serving::{self, ModelCard, Readiness, Serving};
use jiff::Zoned;
use serde_json::{Value, json};

use crate::access::{Access, guard};
use crate::answer::{Answer, Kind};
use crate::body::{Body, BodyReader};
use crate::error::ApiError;
use crate::fields::{Fields, clip, mismatch};
use crate::request::{Chat, Completion, Options, Prompt, Scope, tokens};
use crate::template::{ChatTemplate, TemplateError};
use crate::{ApiOptions, stream};

/// Longest life of a ticket: a month. Who needs longer makes another one.
const MAX_TICKET_TTL_S: i64 = 31 * 24 * 3600;

/// What the handlers share.
struct App {
    serving: Arc<dyn Serving>,
    access: Arc<Access>,
    bodies: BodyReader,
    /// A model whose template is broken still takes plain completions.
    template: Result<ChatTemplate, TemplateError>,
}

type Shared = State<Arc<App>>;
/// The end of a path, which is no text if it is not UTF-8.
type PathEnd = Result<Path<String>, PathRejection>;
type Answered<T = Response> = Result<T, ApiError>;

/// All routes over `serving`.
pub(crate) fn router(serving: Arc<dyn Serving>, options: &ApiOptions) -> Router {
    let card = serving.model();
    let template = ChatTemplate::new(card.chat_template.as_deref(), &card.bos_text, &card.eos_text);
    if let Err(error) = &template {
        tracing::warn!(%error, model = card.name, "chat completions will be refused");
    }
    let access = Arc::new(Access::new(&options.keys, options.admin_token.as_deref(), &options.host_names));
    let bodies = BodyReader::new(options.body_limit);
    let app = Arc::new(App { serving, access: access.clone(), bodies, template });
    Router::new()
        .route("/v1/chat/completions", post(chat))
        .route("/v1/completions", post(completion))
        .route("/v1/models", get(models))
        .route("/v1/models/{*id}", get(model))
        .route("/health", get(health))
        .route("/ready", get(ready))
        .route("/brigade/v1/status", get(status))
        .route("/brigade/v1/tickets", get(list_tickets).post(create_ticket))
        .route("/brigade/v1/tickets/{id}", delete(revoke_ticket))
        .route("/brigade/v1/tokenize", post(tokenize))
        .route("/brigade/v1/detokenize", post(detokenize))
        .fallback(no_route)
        .method_not_allowed_fallback(no_method)
        .layer(from_fn_with_state(access, guard))
        .with_state(app)
}

async fn chat(State(app): Shared, request: Request) -> Answered {
    let body = app.bodies.read(request).await?;
    complete(app, Kind::Chat, body, |app, body, random_seed| {
        let chat = Chat::parse(body, Scope { model: app.serving.model(), random_seed })?;
        let template = app.template.as_ref().map_err(|error| ApiError::from(error.clone()))?;
        let prompt = template.render(&chat.messages, &Zoned::now())?;
        let prompt = app.serving.tokenize(&prompt, !template.starts_itself(&prompt), true)?;
        Ok((prompt, chat.options))
    })
    .await
}

async fn completion(State(app): Shared, request: Request) -> Answered {
    let body = app.bodies.read(request).await?;
    complete(app, Kind::Plain, body, |app, body, random_seed| {
        let completion = Completion::parse(body, Scope { model: app.serving.model(), random_seed })?;
        let prompt = match completion.prompt {
            Prompt::Text(text) => app.serving.tokenize(&text, true, true)?,
            Prompt::Tokens(tokens) => tokens,
        };
        Ok((prompt, completion.options))
    })
    .await
}

/// Makes a prompt, submits it, and answers with what comes of it.
async fn complete(
    app: Arc<App>,
    kind: Kind,
    body: Body,
    prepare: impl FnOnce(&App, Value, u64) -> Answered<(Vec<brigade_base::Token>, Options)> + Send + 'static,
) -> Answered {
    let (answer, events, streams) = blocking(move || {
        // What is made of the body takes as much memory, so its room is kept until the session has the prompt.
        let (body, _room) = body.json()?;
        let (prompt, options) = prepare(&app, body, random()?)?;
        let answer = answer(kind, app.serving.model(), &options)?;
        let events = app.serving.submit(serving::Request {
            prompt,
            max_tokens: options.max_tokens,
            sampling: options.sampling,
            stop: options.stop,
            logprobs: options.logprobs,
            ignore_end: options.ignore_end,
        })?;
        Ok((answer, events, options.stream))
    })
    .await?;
    if streams { Ok(stream::streamed(answer, events)) } else { stream::whole(answer, events).await }
}

fn answer(kind: Kind, card: &ModelCard, options: &Options) -> Answered<Answer> {
    let prefix = match kind {
        Kind::Chat => "chatcmpl",
        Kind::Plain => "cmpl",
    };
    Ok(Answer {
        kind,
        id: format!("{prefix}-{:016x}{:016x}", random()?, random()?),
        created: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs()),
        model: card.name.clone(),
        system_fingerprint: card.id.short(),
        logprobs: options.logprobs,
        include_usage: options.include_usage,
        text_offset: 0,
    })
}

async fn models(State(app): Shared) -> Json<Value> {
    Json(json!({"object": "list", "data": [model_object(app.serving.model())]}))
}

async fn model(State(app): Shared, id: PathEnd) -> Answered<Json<Value>> {
    let Path(id) = id?;
    let card = app.serving.model();
    if id != card.name && id != "default" {
        return Err(ApiError::unknown_model(&clip(&id), &card.name));
    }
    Ok(Json(model_object(card)))
}

fn model_object(card: &ModelCard) -> Value {
    json!({
        "id": card.name,
        "object": "model",
        "created": card.created,
        "owned_by": "brigade",
        "max_model_len": card.context,
    })
}

async fn health() -> Json<Value> {
    Json(json!({"status": "ok"}))
}

async fn ready(State(app): Shared) -> Response {
    match app.serving.readiness() {
        Readiness::Ready => Json(json!({"status": "ready"})).into_response(),
        Readiness::NotReady(reason) => {
            (StatusCode::SERVICE_UNAVAILABLE, Json(json!({"status": "not_ready", "reason": reason}))).into_response()
        }
    }
}

async fn status(State(app): Shared) -> Response {
    Json(app.serving.status()).into_response()
}

async fn list_tickets(State(app): Shared, headers: HeaderMap) -> Answered {
    app.access.check_admin(&headers)?;
    let tickets = blocking(move || Ok(app.serving.tickets())).await?;
    Ok(Json(json!({"object": "list", "data": tickets})).into_response())
}

async fn create_ticket(State(app): Shared, request: Request) -> Answered {
    app.access.check_admin(request.headers())?;
    let body = app.bodies.read(request).await?;
    let ticket = blocking(move || {
        let (body, _room) = body.json()?;
        let mut fields = Fields::of_body(body)?;
        let Some(ttl_s) = fields.integer("ttl_s", 1..=MAX_TICKET_TTL_S)? else {
            return Err(ApiError::field("ttl_s", "`ttl_s` is required: how many seconds the ticket admits nodes"));
        };
        fields.finish()?;
        app.serving.create_ticket(Duration::from_secs(ttl_s.unsigned_abs())).map_err(ApiError::internal)
    })
    .await?;
    Ok((StatusCode::CREATED, Json(ticket)).into_response())
}

async fn revoke_ticket(State(app): Shared, id: PathEnd, headers: HeaderMap) -> Answered {
    app.access.check_admin(&headers)?;
    let Path(id) = id?;
    let asked = id.clone();
    if !blocking(move || app.serving.revoke_ticket(&asked).map_err(ApiError::internal)).await? {
        let message = format!("there is no valid ticket `{}`", clip(&id));
        return Err(ApiError::new(StatusCode::NOT_FOUND, message));
    }
    Ok(Json(json!({"id": id, "deleted": true})).into_response())
}

async fn tokenize(State(app): Shared, request: Request) -> Answered {
    let body = app.bodies.read(request).await?;
    let tokens = blocking(move || {
        let (body, _room) = body.json()?;
        let mut fields = Fields::of_body(body)?;
        let Some(text) = fields.string("text")? else {
            return Err(ApiError::field("text", "`text` is required"));
        };
        let add_special = fields.bool("add_special")?.unwrap_or(true);
        let parse_special = fields.bool("parse_special")?.unwrap_or(true);
        fields.finish()?;
        Ok(app.serving.tokenize(&text, add_special, parse_special)?)
    })
    .await?;
    Ok(Json(json!({"tokens": tokens, "count": tokens.len()})).into_response())
}

async fn detokenize(State(app): Shared, request: Request) -> Answered {
    let body = app.bodies.read(request).await?;
    let text = blocking(move || {
        let (body, _room) = body.json()?;
        let mut fields = Fields::of_body(body)?;
        let items = match fields.require("tokens")? {
            Value::Array(items) => items,
            other => return Err(mismatch("tokens", "an array of tokens", &other)),
        };
        fields.finish()?;
        let tokens = tokens("tokens", items, app.serving.model().n_vocab)?;
        let bytes: Vec<u8> = tokens.into_iter().flat_map(|token| app.serving.token_bytes(token)).collect();
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    })
    .await?;
    Ok(Json(json!({"text": text})).into_response())
}

async fn no_route(method: Method, OriginalUri(uri): OriginalUri) -> ApiError {
    let message = format!("there is no route {method} {}; see /v1/models for what is served", clip(uri.path()));
    ApiError::new(StatusCode::NOT_FOUND, message).with_code("unknown_url")
}

async fn no_method(method: Method, OriginalUri(uri): OriginalUri) -> ApiError {
    let message = format!("{} does not answer to {}", clip(uri.path()), clip(method.as_str()));
    ApiError::new(StatusCode::METHOD_NOT_ALLOWED, message)
}

/// Runs `work` where it delays nobody.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Answered<T> + Send + 'static) -> Answered<T> {
    let outcome = tokio::task::spawn_blocking(work).await;
    outcome.unwrap_or_else(|error| Err(ApiError::internal(format!("the request could not be worked on: {error}"))))
}

fn random() -> Answered<u64> {
    getrandom::u64().map_err(|error| ApiError::internal(format!("no randomness: {error}")))
}
