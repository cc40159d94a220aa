//! From a session's events to an HTTP body: all at once, or as server-sent events while they come.
//!
//! Both own the session's receiver. When the client goes away, hyper drops the body or the handler, the receiver goes
//! with it, and the coordinator cancels the session.
//!
//! A session that waits because a machine was lost says so. A stream passes that on in comments, which clients skip but
//! whose bytes keep their read timeouts, and those of proxies, from striking; a whole answer just comes later.

use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::body::Body;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use brigade_node::serving::{Event, Failure, TokenLogprob};
use bytes::{Bytes, BytesMut};
use http_body::Frame;
use tokio::sync::mpsc::UnboundedReceiver;
use tokio::time::{Instant, Interval, MissedTickBehavior, interval_at};

use crate::answer::{Answer, TextChunk, write_event};
use crate::error::ApiError;
use crate::gate::Entry;

/// How often it is looked whether a stream was silent since the last look, and if so it says that it lives. That is
/// after one to two of these times; proxies give up on silence after 30 to 60 seconds.
const KEEP_ALIVE: Duration = Duration::from_secs(10);
/// How often a stream says that it lives while its session waits for a lost machine to be replaced: below the shortest
/// read timeouts that clients are seen to have, of five seconds.
const PAUSED_KEEP_ALIVE: Duration = Duration::from_secs(2);
/// Most characters of a pause's reason: a line on a screen, twice.
const MAX_REASON_CHARS: usize = 200;
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
            Some(Event::Token { text: more, logprob, .. }) => {
                text.push_str(&more);
                logprobs.extend(logprob);
            }
            Some(Event::Text { text: more }) => text.push_str(&more),
            // A model that embeds texts is asked elsewhere.
            Some(Event::Pooled { .. } | Event::Paused { .. } | Event::Resumed) => {}
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

/// Sends an answer while it is made; `entry` is kept until all of it is sent.
pub(crate) fn streamed(mut answer: Answer, events: UnboundedReceiver<Event>, entry: Entry) -> Response {
    let mut pending = BytesMut::with_capacity(BUFFER_BYTES);
    answer.write_first_chunk(&mut pending);
    let text_chunk = answer.text_chunk();
    let body = EventBody {
        answer,
        text_chunk,
        events,
        ticks: every(KEEP_ALIVE),
        spoke: false,
        paused: false,
        pending,
        ended: false,
        _entry: entry,
    };
    let headers = [
        (header::CONTENT_TYPE, "text/event-stream; charset=utf-8"),
        (header::CACHE_CONTROL, "no-cache"),
        // Asks a reverse proxy not to collect the stream.
        (header::HeaderName::from_static("x-accel-buffering"), "no"),
    ];
    (headers, Body::new(body)).into_response()
}

fn every(period: Duration) -> Interval {
    let mut ticks = interval_at(Instant::now() + period, period);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    ticks
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
    /// The session waits for a lost machine to be replaced.
    paused: bool,
    /// Written but not sent.
    pending: BytesMut,
    /// The last event is written.
    ended: bool,
    /// Says that this answer is under way.
    _entry: Entry,
}

impl EventBody {
    fn write(&mut self, event: Option<Event>) {
        match event {
            Some(Event::Token { text, logprob, .. }) => self.write_text(&text, logprob.as_slice()),
            Some(Event::Text { text }) => self.write_text(&text, &[]),
            Some(Event::Pooled { .. }) => {}
            Some(Event::Paused { why }) => {
                write_comment("paused: ", &why, &mut self.pending);
                (self.paused, self.ticks) = (true, every(PAUSED_KEEP_ALIVE));
            }
            Some(Event::Resumed) => {
                write_comment("resumed", "", &mut self.pending);
                (self.paused, self.ticks) = (false, every(KEEP_ALIVE));
            }
            Some(Event::Done { reason, usage }) => {
                self.answer.write_end(reason, usage, &mut self.pending);
                self.ended = true;
            }
            Some(Event::Failed(failure)) => self.write_error(&failure.into()),
            None => self.write_error(&broken_off()),
        }
    }

    fn write_text(&mut self, text: &str, logprobs: &[TokenLogprob]) {
        match &self.text_chunk {
            _ if text.is_empty() && logprobs.is_empty() => {}
            Some(chunk) => chunk.write(text, &mut self.pending),
            None => self.answer.write_delta(text, logprobs, &mut self.pending),
        }
    }

    /// No end mark follows an error: a client that waits for it sees that the answer is not whole.
    fn write_error(&mut self, error: &ApiError) {
        tracing::debug!(request = self.answer.id, %error, "the stream broke off");
        write_event(&error.object(), &mut self.pending);
        self.ended = true;
    }

    /// Completes at a tick before which nothing was sent for a whole interval, and in a pause at each.
    fn poll_silence(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        loop {
            ready!(self.ticks.poll_tick(cx));
            if !std::mem::take(&mut self.spoke) || self.paused {
                return Poll::Ready(());
            }
        }
    }
}

/// A comment of server-sent events, which ends where its line does: whatever `text` has, it makes no event.
fn write_comment(kind: &str, text: &str, out: &mut BytesMut) {
    let line = text.chars().take(MAX_REASON_CHARS).map(|c| if c.is_control() { ' ' } else { c });
    out.extend_from_slice(format!(": {kind}{}\n\n", line.collect::<String>()).as_bytes());
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
            this.pending.extend_from_slice(if this.paused { b": still paused\n\n" } else { b": keep-alive\n\n" });
        } else {
            this.spoke = true;
        }
        Poll::Ready(Some(Ok(Frame::data(this.pending.split().freeze()))))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use brigade_node::serving::{FinishReason, Usage};
    use http_body_util::BodyExt;
    use tokio::sync::mpsc;
    use tokio::time::sleep;

    use super::*;
    use crate::answer::Kind;
    use crate::gate::Gate;

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
        Event::Token { position: 0, token: 1, text: text.to_owned(), logprob: None }
    }

    fn body(events: UnboundedReceiver<Event>) -> Body {
        streamed(plain(), events, Arc::new(Gate::default()).enter().unwrap()).into_body()
    }

    /// The next frame that is sent, as text.
    async fn next(body: &mut Body) -> String {
        let frame = body.frame().await.unwrap().unwrap().into_data().unwrap();
        String::from_utf8(frame.to_vec()).unwrap()
    }

    #[tokio::test(start_paused = true)]
    async fn silence_is_filled_with_comments() {
        let (sender, events) = mpsc::unbounded_channel();
        let mut body = body(events);
        for _ in 0..3 {
            let before = Instant::now();
            assert_eq!(next(&mut body).await, ": keep-alive\n\n");
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
        let text = body(events).collect().await.unwrap().to_bytes();
        let text = String::from_utf8(text.to_vec()).unwrap();
        let (spoken, rest) = text.split_once(": keep-alive\n\n").unwrap();
        assert_eq!(spoken.matches("data: ").count(), 4, "{text}");
        assert!(!rest.contains("keep-alive"), "{text}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_pause_is_told_at_once_and_every_two_seconds() {
        let (sender, events) = mpsc::unbounded_channel();
        let mut body = body(events);
        sender.send(delta("a")).unwrap();
        assert!(next(&mut body).await.starts_with("data: "));
        sender.send(Event::Paused { why: "w1 is\r\ndata: lost\n\n".to_owned() }).unwrap();
        let begin = Instant::now();
        assert_eq!(next(&mut body).await, ": paused: w1 is  data: lost  \n\n", "no reason makes an event");
        assert_eq!(begin.elapsed(), Duration::ZERO);
        for n in 1..4 {
            assert_eq!(next(&mut body).await, ": still paused\n\n");
            assert_eq!(begin.elapsed().as_secs(), (n * PAUSED_KEEP_ALIVE).as_secs());
        }
        for event in [Event::Resumed, delta("b"), Event::Text { text: "c".to_owned() }] {
            sender.send(event).unwrap();
        }
        let text = next(&mut body).await;
        assert!(text.starts_with(": resumed\n\ndata: ") && text.matches("data: ").count() == 2, "{text}");
        let begin = Instant::now();
        assert_eq!(next(&mut body).await, ": keep-alive\n\n");
        assert!(begin.elapsed() >= KEEP_ALIVE);
    }

    #[tokio::test]
    async fn a_reason_has_an_end() {
        let mut out = BytesMut::new();
        write_comment("paused: ", &"é".repeat(10_000), &mut out);
        assert_eq!(out.len(), ": paused: \n\n".len() + 2 * MAX_REASON_CHARS);
    }

    #[tokio::test]
    async fn a_whole_answer_only_waits() {
        let (sender, events) = mpsc::unbounded_channel();
        let (done, why) = (Event::Done { reason: FinishReason::Stop, usage: Usage::default() }, String::new());
        for event in [delta("a"), Event::Paused { why }, Event::Resumed, Event::Text { text: "b".to_owned() }, done] {
            sender.send(event).unwrap();
        }
        let answer = whole(plain(), events).await.unwrap().into_body().collect().await.unwrap().to_bytes();
        let answer: serde_json::Value = serde_json::from_slice(&answer).unwrap();
        assert_eq!(answer["choices"][0]["text"], "ab");
    }

    #[tokio::test]
    async fn a_sent_buffer_is_used_again() {
        let (sender, events) = mpsc::unbounded_channel();
        let mut body = body(events);
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
        let mut body = body(events);
        let text = next(&mut body).await;
        assert_eq!(text.matches("data: ").count(), 4, "{text}");
        assert!(text.ends_with("data: [DONE]\n\n"));
        assert!(body.frame().await.is_none());
    }

    #[tokio::test]
    async fn a_session_that_vanishes_is_an_error() {
        let (sender, events) = mpsc::unbounded_channel();
        sender.send(delta("half")).unwrap();
        drop(sender);
        let text = body(events).collect().await.unwrap().to_bytes();
        let text = String::from_utf8(text.to_vec()).unwrap();
        assert!(text.contains(r#"data: {"error":{"#) && !text.contains("[DONE]"), "{text}");

        let (sender, events) = mpsc::unbounded_channel();
        sender.send(delta("half")).unwrap();
        drop(sender);
        assert_eq!(whole(plain(), events).await.unwrap_err().status.as_u16(), 500);
    }
}
