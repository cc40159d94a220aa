//! From a session's events to an HTTP body: all at once, or as server-sent events while they come.
//!
//! Both own the session's receiver. When the client goes away, hyper drops the body or the handler, the receiver goes
//! with it, and the coordinator cancels the session.

use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::body::Body;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use brigade_node::serving::{Event, Failure};
use bytes::{Bytes, BytesMut};
use http_body::Frame;
use tokio::sync::mpsc::UnboundedReceiver;
use tokio::time::{Instant, Interval, MissedTickBehavior, interval_at};

use crate::answer::{Answer, TextChunk, write_event};
use crate::error::ApiError;

/// How often it is looked whether a stream was silent since the last look, and if so it says that it lives. That is
/// after one to two of these times; proxies give up on silence after 30 to 60 seconds.
const KEEP_ALIVE: Duration = Duration::from_secs(10);
/// When a frame is sent although more events wait: the size of a socket's usual send buffer.
const FRAME_BYTES: usize = 64 << 10;
/// What a stream's buffer begins with: the events of a few tokens, of some 250 bytes each.
const BUFFER_BYTES: usize = 1 << 10;

/// Collects a whole answer.
///
/// # Errors
/// If the session failed; what it had written is dropped, since half an answer looks like a whole one.
pub(crate) async fn whole(mut answer: Answer, mut events: UnboundedReceiver<Event>) -> Result<Response, ApiError> {
    let mut text = String::new();
    let mut logprobs = Vec::new();
    loop {
        match events.recv().await {
            Some(Event::Delta { text: more, logprobs: tokens }) => {
                text.push_str(&more);
                logprobs.extend(tokens);
            }
            Some(Event::Done { reason, usage }) => {
                let body = answer.whole(&text, &logprobs, reason, usage);
                let body = body.map_err(|error| ApiError::internal(error.to_string()))?;
                return Ok(([(header::CONTENT_TYPE, "application/json")], body).into_response());
            }
            Some(Event::Failed(failure)) => return Err(failure.into()),
            None => return Err(broken_off()),
        }
    }
}

/// Sends an answer while it is made.
pub(crate) fn streamed(mut answer: Answer, events: UnboundedReceiver<Event>) -> Response {
    let mut pending = BytesMut::with_capacity(BUFFER_BYTES);
    answer.write_first_chunk(&mut pending);
    let mut ticks = interval_at(Instant::now() + KEEP_ALIVE, KEEP_ALIVE);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let text_chunk = answer.text_chunk();
    let body = EventBody { answer, text_chunk, events, ticks, spoke: false, pending, ended: false };
    let headers = [
        (header::CONTENT_TYPE, "text/event-stream; charset=utf-8"),
        (header::CACHE_CONTROL, "no-cache"),
        // Asks a reverse proxy not to collect the stream.
        (header::HeaderName::from_static("x-accel-buffering"), "no"),
    ];
    (headers, Body::new(body)).into_response()
}

fn broken_off() -> ApiError {
    Failure::Engine("the session ended without an answer".to_owned()).into()
}

/// The body of a streamed answer. A token costs no allocation and no timer: its event is written around the text into
/// a buffer that is used again once the one before was sent, and the clock only ticks.
struct EventBody {
    answer: Answer,
    /// For chunks of text alone.
    text_chunk: Option<TextChunk>,
    events: UnboundedReceiver<Event>,
    ticks: Interval,
    /// Something was sent since the last tick.
    spoke: bool,
    /// Written but not sent.
    pending: BytesMut,
    /// The last event is written.
    ended: bool,
}

impl EventBody {
    fn write(&mut self, event: Option<Event>) {
        match event {
            Some(Event::Delta { text, logprobs }) if text.is_empty() && logprobs.is_empty() => {}
            Some(Event::Delta { text, logprobs }) => match &self.text_chunk {
                Some(chunk) => chunk.write(&text, &mut self.pending),
                None => self.answer.write_delta(&text, &logprobs, &mut self.pending),
            },
            Some(Event::Done { reason, usage }) => {
                self.answer.write_end(reason, usage, &mut self.pending);
                self.ended = true;
            }
            Some(Event::Failed(failure)) => self.write_error(&failure.into()),
            None => self.write_error(&broken_off()),
        }
    }

    /// No end mark follows an error: a client that waits for it sees that the answer is not whole.
    fn write_error(&mut self, error: &ApiError) {
        tracing::debug!(request = self.answer.id, %error, "the stream broke off");
        write_event(&error.object(), &mut self.pending);
        self.ended = true;
    }

    /// Completes at a tick before which nothing was sent for a whole interval.
    fn poll_silence(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        loop {
            ready!(self.ticks.poll_tick(cx));
            if !std::mem::take(&mut self.spoke) {
                return Poll::Ready(());
            }
        }
    }
}

impl http_body::Body for EventBody {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        let this = self.get_mut();
        // All that waits goes into one frame, and so into one write.
        while !this.ended && this.pending.len() < FRAME_BYTES {
            match this.events.poll_recv(cx) {
                Poll::Ready(event) => this.write(event),
                Poll::Pending => break,
            }
        }
        if this.pending.is_empty() {
            if this.ended {
                return Poll::Ready(None);
            }
            ready!(this.poll_silence(cx));
            this.pending.extend_from_slice(b": keep-alive\n\n");
        } else {
            this.spoke = true;
        }
        Poll::Ready(Some(Ok(Frame::data(this.pending.split().freeze()))))
    }
}

#[cfg(test)]
mod tests {
    use brigade_node::serving::{FinishReason, Usage};
    use http_body_util::BodyExt;
    use tokio::sync::mpsc;
    use tokio::time::sleep;

    use super::*;
    use crate::answer::Kind;

    fn plain() -> Answer {
        Answer {
            kind: Kind::Plain,
            id: "cmpl-1".to_owned(),
            created: 1,
            model: "m".to_owned(),
            system_fingerprint: "f".to_owned(),
            logprobs: None,
            include_usage: false,
            text_offset: 0,
        }
    }

    fn delta(text: &str) -> Event {
        Event::Delta { text: text.to_owned(), logprobs: Vec::new() }
    }

    #[tokio::test(start_paused = true)]
    async fn silence_is_filled_with_comments() {
        let (sender, events) = mpsc::unbounded_channel();
        let mut body = streamed(plain(), events).into_body();
        for _ in 0..3 {
            let before = Instant::now();
            let frame = body.frame().await.unwrap().unwrap().into_data().unwrap();
            assert_eq!(frame, ": keep-alive\n\n");
            assert!(before.elapsed() >= KEEP_ALIVE);
        }
        drop(sender);
    }

    #[tokio::test(start_paused = true)]
    async fn a_stream_that_speaks_is_not_interrupted() {
        const PAUSE: Duration = Duration::from_secs(9);
        let (sender, events) = mpsc::unbounded_channel();
        tokio::spawn(async move {
            for text in ["a", "b", "c", "d"] {
                sleep(PAUSE).await;
                sender.send(delta(text)).unwrap();
            }
            sleep(2 * KEEP_ALIVE).await;
            sender.send(Event::Done { reason: FinishReason::Stop, usage: Usage::default() }).unwrap();
        });
        let text = streamed(plain(), events).into_body().collect().await.unwrap().to_bytes();
        let text = String::from_utf8(text.to_vec()).unwrap();
        let (spoken, rest) = text.split_once(": keep-alive\n\n").unwrap();
        assert_eq!(spoken.matches("data: ").count(), 4, "{text}");
        assert!(!rest.contains("keep-alive"), "{text}");
    }

    #[tokio::test]
    async fn a_sent_buffer_is_used_again() {
        let (sender, events) = mpsc::unbounded_channel();
        let mut body = streamed(plain(), events).into_body();
        let mut places = std::collections::BTreeSet::new();
        for _ in 0..100 {
            sender.send(delta("token")).unwrap();
            let frame = body.frame().await.unwrap().unwrap().into_data().unwrap();
            places.insert(frame.as_ptr());
        }
        assert!(places.len() <= BUFFER_BYTES / 100, "{}", places.len());
    }

    #[tokio::test]
    async fn events_that_wait_share_a_frame() {
        let (sender, events) = mpsc::unbounded_channel();
        for text in ["a", "", "b"] {
            sender.send(delta(text)).unwrap();
        }
        sender.send(Event::Done { reason: FinishReason::Stop, usage: Usage::default() }).unwrap();
        let mut body = streamed(plain(), events).into_body();
        let frame = body.frame().await.unwrap().unwrap().into_data().unwrap();
        let text = String::from_utf8(frame.to_vec()).unwrap();
        assert_eq!(text.matches("data: ").count(), 4, "{text}");
        assert!(text.ends_with("data: [DONE]\n\n"));
        assert!(body.frame().await.is_none());
    }

    #[tokio::test]
    async fn a_session_that_vanishes_is_an_error() {
        let (sender, events) = mpsc::unbounded_channel();
        sender.send(delta("half")).unwrap();
        drop(sender);
        let text = streamed(plain(), events).into_body().collect().await.unwrap().to_bytes();
        let text = String::from_utf8(text.to_vec()).unwrap();
        assert!(text.contains(r#"data: {"error":{"#) && !text.contains("[DONE]"), "{text}");

        let (sender, events) = mpsc::unbounded_channel();
        sender.send(delta("half")).unwrap();
        drop(sender);
        assert_eq!(whole(plain(), events).await.unwrap_err().status.as_u16(), 500);
    }
}
