//! The routes: each handler reads a request, asks [`Serving`], and writes an answer. Those of completions and for
//! operators are in modules of their own.
//!
//! What may take long (JSON, templates, tokenizing, files of tickets) runs on the runtime's blocking threads, so that a
//! huge prompt delays nobody's stream. Examining all nodes takes seconds of waiting, so it has a thread of its own.

use std::sync::Arc;
use std::time::Duration;

use axum::extract::rejection::PathRejection;
use axum::extract::{OriginalUri, Path, Request, State};
use axum::http::{HeaderMap, Method, StatusCode};
use axum::middleware::from_fn_with_state;
use axum::response::{IntoResponse, Response};
use axum::routing::{delete, get, post};
use axum::{Json, Router};
use brigade_node::serving::{ModelCard, Purpose, Readiness, Serving, SubmitError};
use serde_json::{Value, json};
use tokio::sync::{Semaphore, oneshot};
use tracing::Span;

use crate::access::{Access, guard};
use crate::body::BodyReader;
use crate::error::ApiError;
use crate::fields::{Fields, clip, mismatch};
use crate::gate::Gate;
use crate::prompts::Prompts;
use crate::request::tokens;
use crate::room::Rooms;
use crate::template::{ChatTemplate, TemplateError};
use crate::traffic::{Traffic, count};
use crate::turns::Turns;
use crate::{ApiOptions, completions, embeddings, insight, rerank, texts};

/// Longest life of a ticket: a month. Who needs longer makes another one.
const MAX_TICKET_TTL_S: i64 = 31 * 24 * 3600;

/// What the handlers share.
pub(crate) struct App {
    pub(crate) serving: Arc<dyn Serving>,
    access: Arc<Access>,
    pub(crate) bodies: BodyReader,
    /// What requests with texts hold.
    pub(crate) batches: Rooms,
    /// What those have on its way.
    pub(crate) turns: Arc<Turns>,
    prompts: Prompts,
    /// A model whose template is broken still takes plain completions.
    pub(crate) template: Result<ChatTemplate, TemplateError>,
    pub(crate) traffic: Arc<Traffic>,
    pub(crate) gate: Arc<Gate>,
    /// One permit: whoever has all nodes examined.
    examining: Arc<Semaphore>,
}

impl App {
    /// Does `work`, which tokenizes up to `n_bytes` of text, where it delays nobody.
    pub(crate) async fn tokenizing<T: Send + 'static>(
        self: &Arc<Self>,
        n_bytes: usize,
        work: impl FnOnce(&Self) -> Answered<T> + Send + 'static,
    ) -> Answered<T> {
        let app = Arc::clone(self);
        self.prompts.work(n_bytes, move || work(&app)).await
    }
}

pub(crate) type Shared = State<Arc<App>>;
/// The end of a path, which is no text if it is not UTF-8.
pub(crate) type PathEnd = Result<Path<String>, PathRejection>;
pub(crate) type Answered<T = Response> = Result<T, ApiError>;

/// All routes over `serving`; completions go through `gate`.
pub(crate) fn router(serving: Arc<dyn Serving>, options: &ApiOptions, gate: Arc<Gate>) -> Router {
    let card = serving.model();
    let template = ChatTemplate::new(card.chat_template.as_deref(), &card.bos_text, &card.eos_text);
    if let (Err(error), Purpose::Generate) = (&template, card.purpose) {
        tracing::warn!(%error, model = card.name, "chat completions will be refused");
    }
    let access = Arc::new(Access::new(options));
    let traffic = Arc::new(Traffic::new());
    let bodies = BodyReader::new(options.body_limit);
    let examining = Arc::new(Semaphore::new(1));
    let (guarding, counting) = (access.clone(), traffic.clone());
    let (batches, turns, prompts) = (texts::rooms(), Arc::default(), Prompts::default());
    let app = Arc::new(App { serving, access, bodies, batches, turns, prompts, template, traffic, gate, examining });
    Router::new()
        .route("/v1/chat/completions", post(completions::chat))
        .route("/v1/completions", post(completions::plain))
        .route("/v1/embeddings", post(embeddings::embeddings))
        .route("/v1/rerank", post(rerank::rerank))
        .route("/v1/models", get(models))
        .route("/v1/models/{*id}", get(model))
        .route("/health", get(health))
        .route("/ready", get(ready))
        .route("/metrics", get(insight::metrics))
        .route("/debug/requests/{id}", get(insight::request))
        .route("/brigade/v1/status", get(status))
        .route("/brigade/v1/doctor", get(doctor))
        .route("/brigade/v1/tickets", get(list_tickets).post(create_ticket))
        .route("/brigade/v1/tickets/{id}", delete(revoke_ticket))
        .route("/brigade/v1/tokenize", post(tokenize))
        .route("/brigade/v1/detokenize", post(detokenize))
        .fallback(no_route)
        .method_not_allowed_fallback(no_method)
        .layer(from_fn_with_state(guarding, guard))
        .layer(from_fn_with_state(counting, count))
        .with_state(app)
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

/// Whether a request would be taken. While the model is placed anew it is, and a balancer that sent it elsewhere, where
/// nothing knows it, would gain nothing; so that counts as ready.
async fn ready(State(app): Shared) -> Response {
    let (status, state, reason) = match app.serving.readiness() {
        _ if app.gate.is_closed() => {
            (StatusCode::SERVICE_UNAVAILABLE, "stopping", Some(SubmitError::Stopping.to_string()))
        }
        Readiness::Ready => (StatusCode::OK, "ready", None),
        Readiness::Recovering(reason) => (StatusCode::OK, "recovering", Some(reason)),
        Readiness::NotReady(reason) => (StatusCode::SERVICE_UNAVAILABLE, "not_ready", Some(reason)),
    };
    let mut body = json!({"status": state});
    if let Some(reason) = reason {
        body["reason"] = reason.into();
    }
    (status, Json(body)).into_response()
}

async fn status(State(app): Shared) -> Answered {
    // A gateway asks the coordinator.
    let status = blocking(move || Ok(app.serving.status())).await?;
    Ok(Json(status).into_response())
}

/// What is wrong with each node. The nodes look at themselves before they answer, for seconds: one request at a time,
/// on a thread of its own, which ends by itself if its caller leaves.
async fn doctor(State(app): Shared) -> Answered {
    let Ok(permit) = app.examining.clone().try_acquire_owned() else {
        return Err(ApiError::unavailable("the nodes are being examined already; ask again in a moment"));
    };
    let (tell, told) = oneshot::channel();
    let work = move || {
        let examination = app.serving.examine();
        // Whoever has the answer may ask again.
        drop(permit);
        let _ = tell.send(examination);
    };
    let no_thread = |error| ApiError::internal(format!("the system gives no thread to examine the nodes: {error}"));
    std::thread::Builder::new().name("examine".to_owned()).spawn(work).map_err(no_thread)?;
    match told.await {
        Ok(Ok(examination)) => Ok(Json(examination).into_response()),
        Ok(Err(why)) => Err(ApiError::new(StatusCode::SERVICE_UNAVAILABLE, why)),
        Err(_) => Err(ApiError::internal("the examination ended without an answer; the log says why")),
    }
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
    let n_bytes = body.n_bytes();
    let work = move |app: &App| {
        let (body, _room) = body.json()?;
        let mut fields = Fields::of_body(body)?;
        let Some(text) = fields.string("text")? else {
            return Err(ApiError::field("text", "`text` is required"));
        };
        let add_special = fields.bool("add_special")?.unwrap_or(true);
        let parse_special = fields.bool("parse_special")?.unwrap_or(true);
        fields.finish()?;
        Ok(app.serving.tokenize(&text, add_special, parse_special)?)
    };
    let tokens = app.tokenizing(n_bytes, work).await?;
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

/// Runs `work` where it delays nobody, in the span of its caller.
pub(crate) async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Answered<T> + Send + 'static) -> Answered<T> {
    let span = Span::current();
    let outcome = tokio::task::spawn_blocking(move || span.in_scope(work)).await;
    outcome.unwrap_or_else(|error| Err(ApiError::internal(format!("the request could not be worked on: {error}"))))
}
