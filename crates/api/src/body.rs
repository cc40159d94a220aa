//! Reading request bodies: capped in size, time, number of JSON values and memory together.
//!
//! ```text
//! read (async)  -> Body: bytes, and room for each of them, taken as they arrive
//! json (blocking thread) -> the JSON value, and the room, which its caller keeps until the prompt is handed on
//! ```
//!
//! A body that finds no room is refused with 429 at once; see [`crate::room`].

use std::time::Duration;

use axum::extract::Request;
use axum::http::{HeaderMap, StatusCode, header};
use http_body::Body as _;
use http_body_util::BodyExt;
use serde_json::Value;
use tokio::time::timeout;

use crate::error::ApiError;
use crate::json;
use crate::room::{Room, Rooms};

/// Bodies in memory at once, over all connections and until their prompts are handed on. With the default limit 64 of
/// the largest fit.
const ROOM_BYTES: usize = 256 << 20;
/// Kept for the beginnings of bodies on top of that, so that large ones which stall leave room for the usual ones: a
/// thousand of [`SMALL_BYTES`].
const SMALL_ROOM_BYTES: usize = 32 << 20;
/// What counts as the beginning of a body: a long conversation.
const SMALL_BYTES: usize = 32 << 10;
/// How long a body may take: 4 MiB at 1 Mbit/s.
const BODY_TIMEOUT: Duration = Duration::from_secs(34);
/// Most memory that a parsed body's structure may take, in JSON values of 32 bytes; see [`weight`]. The longest prompt
/// of token ids is a context of at most 2^18, and a message weighs 25, so sixteen thousand of those pass too. 13 MB.
const MAX_WEIGHT: usize = 400_000;
/// Weight of an object besides its members: the smallest map takes some 640 bytes.
const OBJECT_WEIGHT: usize = 20;
/// Weight of an array besides its items: the smallest one has room for four.
const ARRAY_WEIGHT: usize = 4;

/// Reads bodies for all requests of a router.
#[derive(Debug)]
pub(crate) struct BodyReader {
    limit: usize,
    rooms: Rooms,
}

/// A body that has arrived.
#[derive(Debug)]
pub(crate) struct Body {
    bytes: Vec<u8>,
    room: Room,
}

impl BodyReader {
    /// A reader that takes bodies of up to `limit` bytes, or what fits in memory at once if that is less.
    pub(crate) fn new(limit: usize) -> Self {
        Self::with_room(limit, ROOM_BYTES, SMALL_ROOM_BYTES)
    }

    fn with_room(limit: usize, room_bytes: usize, small_room_bytes: usize) -> Self {
        Self { limit: limit.min(room_bytes), rooms: Rooms::new(room_bytes, small_room_bytes, SMALL_BYTES) }
    }

    /// The request's body.
    ///
    /// # Errors
    /// 400, 408, 413, 415 or 429.
    pub(crate) async fn read(&self, request: Request) -> Result<Body, ApiError> {
        check_content_type(request.headers())?;
        match timeout(BODY_TIMEOUT, self.collect(request)).await {
            Ok(body) => body,
            Err(_) => {
                let message = format!("the body did not arrive within {} seconds", BODY_TIMEOUT.as_secs());
                Err(ApiError::new(StatusCode::REQUEST_TIMEOUT, message))
            }
        }
    }

    async fn collect(&self, request: Request) -> Result<Body, ApiError> {
        let mut incoming = request.into_body();
        if incoming.size_hint().lower() > self.limit as u64 {
            return Err(self.too_large());
        }
        let mut body = Body { bytes: Vec::new(), room: Room::default() };
        while let Some(frame) = incoming.frame().await {
            let frame = frame.map_err(|error| ApiError::bad_request(format!("the body could not be read: {error}")))?;
            let Ok(data) = frame.into_data() else { continue };
            if data.len() > self.limit - body.bytes.len() {
                return Err(self.too_large());
            }
            if !self.rooms.grow(&mut body.room, body.bytes.len() + data.len()) {
                return Err(ApiError::busy("the server holds as many request bodies as it may; try again"));
            }
            body.bytes.extend_from_slice(&data);
        }
        Ok(body)
    }

    fn too_large(&self) -> ApiError {
        let message = format!("the body is larger than {} bytes; shorten the prompt, or send fewer texts", self.limit);
        ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, message)
    }
}

impl Body {
    /// Bytes that arrived. No text in it has more.
    pub(crate) fn n_bytes(&self) -> usize {
        self.bytes.len()
    }

    /// The JSON in the body, and the room to be held as long as what is made of it. Depth is bounded by the parser
    /// (128 levels). Takes milliseconds for large bodies.
    ///
    /// # Errors
    /// 400.
    pub(crate) fn json(self) -> Result<(Value, Room), ApiError> {
        if weight(&self.bytes) > MAX_WEIGHT {
            let message = "the body holds too many JSON values; send fewer messages, or the prompt as text";
            return Err(ApiError::bad_request(message));
        }
        let value = json::parse(&self.bytes)
            .map_err(|error| ApiError::bad_request(format!("the body is not valid JSON: {error}")))?;
        Ok((value, self.room))
    }
}

/// What the structure of the JSON in `bytes` takes in memory once parsed, in values of 32 bytes; texts are not counted,
/// as they take no more than in the body. One pass that allocates nothing. What is not JSON has some weight too.
fn weight(bytes: &[u8]) -> usize {
    let mut weight = 1;
    let mut rest = bytes.iter();
    while let Some(byte) = rest.next() {
        match byte {
            b',' | b':' => weight += 1,
            b'[' => weight += ARRAY_WEIGHT,
            b'{' => weight += OBJECT_WEIGHT,
            b'"' => skip_string(&mut rest),
            _ => {}
        }
    }
    weight
}

/// Goes on behind the quote that ends a string.
fn skip_string(rest: &mut std::slice::Iter<'_, u8>) {
    while let Some(byte) = rest.next() {
        match byte {
            b'"' => return,
            b'\\' => drop(rest.next()),
            _ => {}
        }
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

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: usize = 1 << 20;

    async fn read(reader: &BodyReader, bytes: usize) -> Result<Body, StatusCode> {
        let request = Request::builder()
            .header(header::CONTENT_TYPE, "application/json")
            .body(axum::body::Body::from(vec![b' '; bytes]))
            .unwrap();
        reader.read(request).await.map_err(|error| error.status)
    }

    #[tokio::test]
    async fn room_is_held_until_the_value_is_done_with() {
        let reader = BodyReader::with_room(LIMIT, LIMIT, SMALL_BYTES);
        let mut first = read(&reader, LIMIT - 1000).await.unwrap();
        assert_eq!(read(&reader, LIMIT / 2).await.unwrap_err(), StatusCode::TOO_MANY_REQUESTS);
        first.bytes = b"{}".to_vec();
        let (value, room) = first.json().unwrap();
        drop(value);
        assert_eq!(read(&reader, LIMIT / 2).await.unwrap_err(), StatusCode::TOO_MANY_REQUESTS);
        drop(room);
        read(&reader, LIMIT / 2).await.unwrap();
        assert_eq!(reader.rooms.free_bytes(), LIMIT);
    }

    #[tokio::test]
    async fn large_bodies_leave_room_for_small_ones() {
        let reader = BodyReader::with_room(LIMIT, LIMIT, SMALL_BYTES);
        let _large = read(&reader, LIMIT).await.unwrap();
        let _small = read(&reader, SMALL_BYTES).await.unwrap();
        assert_eq!(read(&reader, 1).await.unwrap_err(), StatusCode::TOO_MANY_REQUESTS);
    }

    #[tokio::test]
    async fn what_only_was_announced_takes_no_room() {
        let reader = BodyReader::with_room(LIMIT, LIMIT, SMALL_BYTES);
        let silent = || {
            let head = Request::builder().header(header::CONTENT_TYPE, "application/json");
            head.header(header::CONTENT_LENGTH, LIMIT).body(axum::body::Body::new(Silent))
        };
        let mut waiting: Vec<_> = (0..40).map(|_| Box::pin(reader.read(silent().unwrap()))).collect();
        for reading in &mut waiting {
            tokio::select! {
                biased;
                _ = reading => panic!("nothing arrived"),
                () = std::future::ready(()) => {}
            }
        }
        read(&reader, LIMIT).await.unwrap();
    }

    /// A body of which nothing arrives.
    struct Silent;

    impl http_body::Body for Silent {
        type Data = bytes::Bytes;
        type Error = std::convert::Infallible;

        fn poll_frame(
            self: std::pin::Pin<&mut Self>,
            _: &mut std::task::Context<'_>,
        ) -> std::task::Poll<Option<Result<http_body::Frame<Self::Data>, Self::Error>>> {
            std::task::Poll::Pending
        }

        fn size_hint(&self) -> http_body::SizeHint {
            http_body::SizeHint::with_exact(LIMIT as u64)
        }
    }

    #[test]
    fn structure_is_weighed_and_strings_are_not() {
        for (json, expected) in [
            ("", 1),
            (r#"["{[,:\"]"#, 1 + ARRAY_WEIGHT),
            (r#"["\\", 1]"#, 2 + ARRAY_WEIGHT),
            (r#"{"a": [1, 2]}"#, 3 + ARRAY_WEIGHT + OBJECT_WEIGHT),
            (r#"{"role":"user","content":"x"},"#, 5 + OBJECT_WEIGHT),
        ] {
            assert_eq!(weight(json.as_bytes()), expected, "{json}");
        }
    }

    #[test]
    fn a_body_of_many_values_is_refused_before_it_is_parsed() {
        let parse = |json: String| Body { bytes: json.into_bytes(), room: Room::default() }.json();
        let context = format!(r#"{{"prompt": [{}1]}}"#, "12345,".repeat((1 << 18) - 1));
        assert!(parse(context).is_ok());
        for item in [r#"{"":0}"#, "[]", "1", "[[[]]]"] {
            let items = format!("[{}0]", format!("{item},").repeat((4 << 20) / (item.len() + 1)));
            assert!(parse(items).is_err_and(|error| error.to_string().contains("too many JSON values")), "{item}");
        }
    }
}
