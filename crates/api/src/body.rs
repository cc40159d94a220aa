//! Reading request bodies: capped in size, time and together, and then parsed as JSON.

use std::sync::Arc;
use std::time::Duration;

use axum::extract::Request;
use axum::http::{HeaderMap, StatusCode, header};
use http_body::Body as _;
use http_body_util::{BodyExt, LengthLimitError, Limited};
use serde_json::Value;
use tokio::sync::Semaphore;
use tokio::time::timeout;

use crate::error::ApiError;

/// Bodies in memory at once, over all connections. With the default limit 32 of the largest fit, and thousands of the
/// usual ones; the rest wait for room.
const BODIES_TOTAL_BYTES: usize = 256 << 20;
/// What the room is counted in, so that it fits a semaphore's permits.
const UNIT_BYTES: usize = 1 << 10;
/// How long a body may take, waiting for room included: 8 MiB at 2 Mbit/s.
const BODY_TIMEOUT: Duration = Duration::from_secs(34);

/// Reads bodies for all requests of a router.
#[derive(Debug)]
pub(crate) struct BodyReader {
    limit: usize,
    room: Arc<Semaphore>,
}

impl BodyReader {
    /// A reader that takes bodies of up to `limit` bytes, or what fits in memory at once if that is less.
    pub(crate) fn new(limit: usize) -> Self {
        let room = Arc::new(Semaphore::new(BODIES_TOTAL_BYTES / UNIT_BYTES));
        Self { limit: limit.min(BODIES_TOTAL_BYTES), room }
    }

    /// The JSON in the request's body. Depth is bounded by the parser (128 levels).
    ///
    /// # Errors
    /// 400, 408, 413 or 415.
    pub(crate) async fn json(&self, request: Request) -> Result<Value, ApiError> {
        check_content_type(request.headers())?;
        match timeout(BODY_TIMEOUT, self.read(request)).await {
            Ok(value) => value,
            Err(_) => {
                let message = format!("the body did not arrive within {} seconds", BODY_TIMEOUT.as_secs());
                Err(ApiError::new(StatusCode::REQUEST_TIMEOUT, message))
            }
        }
    }

    async fn read(&self, request: Request) -> Result<Value, ApiError> {
        let body = request.into_body();
        if body.size_hint().lower() > self.limit as u64 {
            return Err(self.too_large());
        }
        let bytes = body.size_hint().upper().map_or(self.limit, |upper| self.limit.min(upper as usize));
        let units = u32::try_from(bytes.div_ceil(UNIT_BYTES)).unwrap_or(u32::MAX);
        let _room = self.room.acquire_many(units).await.map_err(|error| ApiError::internal(error.to_string()))?;
        let collected = Limited::new(body, self.limit).collect().await;
        let bytes = collected.map_err(|error| match error.downcast_ref::<LengthLimitError>() {
            Some(_) => self.too_large(),
            None => ApiError::bad_request(format!("the body could not be read: {error}")),
        })?;
        serde_json::from_slice(&bytes.to_bytes())
            .map_err(|error| ApiError::bad_request(format!("the body is not valid JSON: {error}")))
    }

    fn too_large(&self) -> ApiError {
        let message = format!("the body is larger than {} bytes; shorten the prompt", self.limit);
        ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, message)
    }
}

/// Refuses what is not said to be JSON; `access` tells why that matters.
fn check_content_type(headers: &HeaderMap) -> Result<(), ApiError> {
    let value = headers.get(header::CONTENT_TYPE).map_or("", |value| value.to_str().unwrap_or(""));
    let kind = value.split(';').next().unwrap_or("").trim().to_ascii_lowercase();
    if kind == "application/json" || (kind.starts_with("application/") && kind.ends_with("+json")) {
        return Ok(());
    }
    let message = "send the body as JSON, with the header `Content-Type: application/json`";
    Err(ApiError::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, message))
}
