//! For operators: metrics, and what became of one request.

use axum::Extension;
use axum::Json;
use axum::extract::{Path, State};
use axum::http::header;
use axum::response::IntoResponse;
use brigade_node::METRICS_TYPE;
use brigade_node::serving::RequestTrace;

use crate::access::Caller;
use crate::error::ApiError;
use crate::fields::clip;
use crate::routes::{Answered, PathEnd, Shared, blocking};

/// `GET /metrics`.
pub(crate) async fn metrics(State(app): Shared) -> Answered {
    let text = blocking(move || {
        let mut text = app.serving.metrics();
        app.traffic.append_to(&mut text);
        Ok(text)
    });
    Ok(([(header::CONTENT_TYPE, METRICS_TYPE)], text.await?).into_response())
}

/// `GET /debug/requests/{id}`. Another's request is as unknown as one that never was.
pub(crate) async fn request(
    State(app): Shared,
    Extension(caller): Extension<Caller>,
    id: PathEnd,
) -> Answered<Json<RequestTrace>> {
    let Path(id) = id?;
    let asked = id.clone();
    let trace = blocking(move || Ok(app.serving.trace(&asked))).await?;
    let trace = trace.filter(|trace| caller.may_see(trace.tenant));
    trace.map(Json).ok_or_else(|| ApiError::unknown_request(&clip(&id)))
}
