//! Errors as OpenAI words them: `{"error": {"message", "type", "param", "code"}}` with the HTTP status beside.
//!
//! Every refusal of this crate is an [`ApiError`], the ones for unknown routes and unreadable bodies too, so a client
//! needs one way to read them.

use axum::Json;
use axum::extract::rejection::PathRejection;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use brigade_node::serving::{Failure, SubmitError};
use serde::Serialize;

use crate::template::TemplateError;

/// When to try again while no model is placed: placing one anew takes seconds.
const RETRY_NOT_READY_S: u64 = 5;
/// When to try again while the queue is full: the next answer to end makes room.
const RETRY_BUSY_S: u64 = 1;

/// A refusal, ready to be sent.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{status}: {}", .body.message)]
pub(crate) struct ApiError {
    /// The HTTP status.
    pub(crate) status: StatusCode,
    body: Body,
    retry_after_s: Option<u64>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
struct Body {
    message: String,
    #[serde(rename = "type")]
    kind: &'static str,
    param: Option<String>,
    code: Option<&'static str>,
}

/// The error object as a body or an SSE event carries it.
#[derive(Serialize)]
pub(crate) struct ErrorObject<'a> {
    error: &'a Body,
}

impl ApiError {
    /// A refusal with `status`; the error's type follows from it.
    pub(crate) fn new(status: StatusCode, message: impl Into<String>) -> Self {
        let kind = match status {
            StatusCode::TOO_MANY_REQUESTS => "requests",
            status if status.is_server_error() => "server_error",
            _ => "invalid_request_error",
        };
        Self { status, body: Body { message: message.into(), kind, param: None, code: None }, retry_after_s: None }
    }

    /// 400.
    pub(crate) fn bad_request(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, message)
    }

    /// 400 that names the field at fault, as a path from the body's root (`messages[0].content`).
    pub(crate) fn field(param: impl Into<String>, message: impl Into<String>) -> Self {
        Self::bad_request(message).with_param(param)
    }

    /// 500 for what should not happen.
    pub(crate) fn internal(message: impl Into<String>) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, message)
    }

    /// 503 while no answer can be given.
    pub(crate) fn unavailable(message: impl Into<String>) -> Self {
        let mut error = Self::new(StatusCode::SERVICE_UNAVAILABLE, message).with_code("service_unavailable");
        error.retry_after_s = Some(RETRY_NOT_READY_S);
        error
    }

    /// 429 while there is no room for the request.
    pub(crate) fn busy(message: impl Into<String>) -> Self {
        let mut error = Self::new(StatusCode::TOO_MANY_REQUESTS, message).with_code("rate_limit_exceeded");
        error.retry_after_s = Some(RETRY_BUSY_S);
        error
    }

    /// 404 for a request that is not remembered, or not the caller's.
    pub(crate) fn unknown_request(id: &str) -> Self {
        let message = format!(
            "no request `{id}` is among the recent ones; a request's id is its answer's `id` and header `x-request-id`"
        );
        Self::new(StatusCode::NOT_FOUND, message).with_code("request_not_found")
    }

    /// 404 for a model that is not served.
    pub(crate) fn unknown_model(asked: &str, served: &str) -> Self {
        let message = format!("the model `{asked}` is not served here; use `{served}` (or `default`)");
        Self::new(StatusCode::NOT_FOUND, message).with_param("model").with_code("model_not_found")
    }

    #[must_use]
    pub(crate) fn with_param(mut self, param: impl Into<String>) -> Self {
        self.body.param = Some(param.into());
        self
    }

    #[must_use]
    pub(crate) fn with_code(mut self, code: &'static str) -> Self {
        self.body.code = Some(code);
        self
    }

    /// What goes into a body or an SSE event.
    pub(crate) fn object(&self) -> ErrorObject<'_> {
        ErrorObject { error: &self.body }
    }
}

impl From<SubmitError> for ApiError {
    fn from(error: SubmitError) -> Self {
        let message = error.to_string();
        match error {
            SubmitError::NotReady(_) | SubmitError::Stopping => Self::unavailable(message),
            SubmitError::Busy { .. } => Self::busy(message),
            SubmitError::PromptTooLong { .. } | SubmitError::TextTooLong { .. } => {
                Self::bad_request(message).with_code("context_length_exceeded")
            }
            SubmitError::PromptEmpty | SubmitError::UnknownToken { .. } | SubmitError::Invalid(_) => {
                Self::bad_request(message)
            }
        }
    }
}

impl From<Failure> for ApiError {
    fn from(failure: Failure) -> Self {
        let message = failure.to_string();
        match failure {
            Failure::PlacementLost(_) | Failure::Stopping => Self::unavailable(message),
            Failure::TimedOut { .. } => Self::new(StatusCode::GATEWAY_TIMEOUT, message).with_code("timeout"),
            Failure::Engine(_) => Self::internal(message),
            Failure::Refused(error) => error.into(),
        }
    }
}

impl From<PathRejection> for ApiError {
    fn from(rejection: PathRejection) -> Self {
        Self::new(rejection.status(), format!("the path cannot be read: {}", rejection.body_text()))
    }
}

impl From<TemplateError> for ApiError {
    fn from(error: TemplateError) -> Self {
        let message = error.to_string();
        match error {
            TemplateError::SourceTooLong { .. } | TemplateError::Syntax(_) => Self::internal(message),
            TemplateError::Refused(_) | TemplateError::TooLong | TemplateError::TooMuchWork => {
                Self::field("messages", message)
            }
            TemplateError::Render(_) => Self::field("messages", message),
        }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(self.object())).into_response();
        let headers = response.headers_mut();
        if let Some(seconds) = self.retry_after_s {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        if self.status == StatusCode::UNAUTHORIZED {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[track_caller]
    fn check(error: impl Into<ApiError>, status: u16, retry_after: Option<&str>, code: Option<&str>) {
        let error = error.into();
        assert_eq!(error.body.code, code);
        let response = error.into_response();
        assert_eq!(response.status().as_u16(), status);
        let header = response.headers().get(header::RETRY_AFTER).map(|value| value.to_str().unwrap());
        assert_eq!(header, retry_after);
    }

    #[test]
    fn what_the_node_refuses_has_its_status() {
        check(SubmitError::NotReady("no worker".into()), 503, Some("5"), Some("service_unavailable"));
        check(SubmitError::Stopping, 503, Some("5"), Some("service_unavailable"));
        check(SubmitError::Busy { waiting: 9 }, 429, Some("1"), Some("rate_limit_exceeded"));
        check(
            SubmitError::PromptTooLong { tokens: 9, is_bound: false, context: 8 },
            400,
            None,
            Some("context_length_exceeded"),
        );
        check(SubmitError::PromptEmpty, 400, None, None);
        check(SubmitError::Invalid("no".into()), 400, None, None);
        check(Failure::PlacementLost("a left".into()), 503, Some("5"), Some("service_unavailable"));
        check(Failure::TimedOut { after: Duration::from_secs(2) }, 504, None, Some("timeout"));
        check(Failure::Engine("no".into()), 500, None, None);
    }

    #[test]
    fn the_object_has_the_four_members() {
        let error = ApiError::field("n", "one only");
        let text = serde_json::to_string(&error.object()).unwrap();
        let expected = r#"{"error":{"message":"one only","type":"invalid_request_error","param":"n","code":null}}"#;
        assert_eq!(text, expected);
    }
}
