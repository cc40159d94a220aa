//! The gateway's end of a link to the coordinator.
//!
//! - Callers put messages into a bounded queue; a *writer* thread sends them, and a beat where there is nothing else to
//!   say, so nobody who serves HTTP ever waits for a socket.
//! - The thread that dialled reads: [`Remote::run`] hands each event to its request until the link ends.
//! - A [`Source`] is the caller's hold of a request: dropping it before the answer's end cancels the request.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, SyncSender, TrySendError, channel, sync_channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use brigade_base::Token;
use brigade_net::Link;
use brigade_protocol::control::{DEAD_AFTER_MS, HEARTBEAT_MS};
use brigade_protocol::kind;
use brigade_protocol::requests::{self, Card, FromGateway, Question, ToGateway};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

use super::wire;
use crate::doctor::EXAMINE_WITHIN;
use crate::serving::{Event, Examination, Readiness, Request, SubmitError};
use crate::threads::{lock, spawn};

/// Messages that wait for the writer. All requests that a gateway may have open fit, so it is full only if the
/// coordinator does not read.
const MAX_QUEUE: usize = super::MAX_OPEN;

/// How long a question waits for its report. Whoever asks holds a thread that serves HTTP, and a coordinator that needs
/// longer is taken for dead soon.
const ASK_TIMEOUT: Duration = Duration::from_secs(1);

/// How long a coordinator may take to have all nodes examined: a round that others began, one of its own, and the way.
const EXAMINE_TIMEOUT: Duration = Duration::from_secs(2 * EXAMINE_WITHIN.as_secs() + 2);

const NO_WORD: &str = "the coordinator has not said yet whether it is ready";

/// A coordinator behind a link.
pub(super) struct Remote {
    link: Arc<dyn Link>,
    outbox: SyncSender<FromGateway>,
    numbers: AtomicU64,
    /// Who hears of each open request; `None` once the link has ended.
    open: Mutex<Option<HashMap<u64, UnboundedSender<Event>>>>,
    /// Who waits for each report.
    asked: Mutex<HashMap<u64, Sender<String>>>,
    /// What the coordinator said last.
    readiness: Mutex<Option<Readiness>>,
}

/// The events of a request that somebody answers.
pub(super) struct Source {
    pub(super) events: UnboundedReceiver<Event>,
    _cancel: Option<Cancel>,
}

impl From<UnboundedReceiver<Event>> for Source {
    /// A session of this process, which ends with its receiver.
    fn from(events: UnboundedReceiver<Event>) -> Self {
        Self { events, _cancel: None }
    }
}

/// Takes a request back from the coordinator.
struct Cancel {
    remote: Arc<Remote>,
    number: u64,
}

impl Drop for Cancel {
    fn drop(&mut self) {
        let number = self.number;
        // A request that has ended is not open any more.
        if lock(&self.remote.open).as_mut().is_some_and(|open| open.remove(&number).is_some()) {
            let _ = self.remote.say(FromGateway::Cancel { number });
        }
    }
}

impl Remote {
    /// Begins to send beats over a link.
    ///
    /// # Errors
    /// If the system gives no thread.
    pub(super) fn start(link: Arc<dyn Link>) -> std::io::Result<Arc<Self>> {
        let (outbox, messages) = sync_channel(MAX_QUEUE);
        let wire = Arc::clone(&link);
        spawn("gateway writer", move || write(&*wire, &messages))?;
        Ok(Arc::new(Self {
            link,
            outbox,
            numbers: AtomicU64::new(0),
            open: Mutex::new(Some(HashMap::new())),
            asked: Mutex::default(),
            readiness: Mutex::default(),
        }))
    }

    /// What is served; the first thing that the coordinator says.
    ///
    /// # Errors
    /// If it says something else or the link ends.
    pub(super) fn receive_card(&self) -> Result<Card, String> {
        match self.receive(&mut Vec::new())? {
            ToGateway::Card(card) => Ok(*card),
            _ => Err("the coordinator did not say first what it serves".to_owned()),
        }
    }

    /// The vocabulary, of which nothing is believed yet. Only before [`run`](Self::run).
    ///
    /// # Errors
    /// If the coordinator sends something else or the link ends.
    pub(super) fn fetch_vocabulary(&self) -> Result<Vec<u8>, String> {
        self.say(FromGateway::FetchVocabulary).map_err(|error| error.to_string())?;
        let (mut whole, mut buf) = (Vec::new(), Vec::new());
        loop {
            match self.receive(&mut buf)? {
                ToGateway::Vocabulary { total, bytes } => {
                    whole.extend_from_slice(&bytes);
                    match (whole.len() as u64).cmp(&total) {
                        std::cmp::Ordering::Less if !bytes.is_empty() => {}
                        std::cmp::Ordering::Equal => return Ok(whole),
                        _ => return Err("the coordinator sent another vocabulary than it announced".to_owned()),
                    }
                }
                ToGateway::Beat(readiness) => self.hear(readiness),
                _ => return Err("the coordinator sent something else than its vocabulary".to_owned()),
            }
        }
    }

    /// Waits until the coordinator has said whether it is ready. Only before [`run`](Self::run).
    ///
    /// # Errors
    /// If it says something else or the link ends.
    pub(super) fn wait_for_word(&self) -> Result<(), String> {
        if lock(&self.readiness).is_none() {
            match self.receive(&mut Vec::new())? {
                ToGateway::Beat(readiness) => self.hear(readiness),
                _ => return Err("the coordinator did not say whether it is ready".to_owned()),
            }
        }
        Ok(())
    }

    fn hear(&self, readiness: requests::Readiness) {
        *lock(&self.readiness) = Some(wire::readiness_told(readiness));
    }

    /// Hands events to their requests until the link ends; returns why it did.
    pub(super) fn run(&self) -> String {
        let mut buf = Vec::new();
        loop {
            match self.receive(&mut buf) {
                Ok(ToGateway::Beat(readiness)) => self.hear(readiness),
                Ok(ToGateway::Report { number, text }) => {
                    if let Some(asker) = lock(&self.asked).remove(&number) {
                        let _ = asker.send(text);
                    }
                }
                Ok(message) => {
                    if let Some((number, event)) = wire::event(message) {
                        self.tell(number, event);
                    }
                }
                Err(why) => return why,
            }
        }
    }

    /// Ends the link; every open request hears that it is lost.
    pub(super) fn end(&self) {
        self.link.close();
        *lock(&self.open) = None;
        lock(&self.asked).clear();
    }

    fn receive(&self, buf: &mut Vec<u8>) -> Result<ToGateway, String> {
        let deadline = Instant::now() + Duration::from_millis(DEAD_AFTER_MS);
        match self.link.recv(buf, Some(deadline)) {
            Ok(kind::REQUESTS) => ToGateway::decode(buf).map_err(|error| error.to_string()),
            Ok(other) => Err(format!("the coordinator sent a frame of unknown kind {other:#x}")),
            Err(brigade_net::LinkError::TimedOut) => {
                Err(format!("the coordinator was silent for {} s", DEAD_AFTER_MS as f32 / 1000.0))
            }
            Err(error) => Err(format!("the link to the coordinator failed: {error}")),
        }
    }

    fn tell(&self, number: u64, event: Event) {
        let mut open = lock(&self.open);
        let Some(open) = open.as_mut() else { return };
        let ends = matches!(event, Event::Done { .. } | Event::Failed(_));
        // Whoever does not listen any more cancels by itself.
        let _ = open.get(&number).map(|listener| listener.send(event));
        if ends {
            open.remove(&number);
        }
    }

    /// Puts a message into the queue, and ends a link whose queue is full.
    fn say(&self, message: FromGateway) -> Result<(), SubmitError> {
        match self.outbox.try_send(message) {
            Ok(()) => Ok(()),
            Err(TrySendError::Full(_)) => {
                self.link.close();
                Err(SubmitError::NotReady("the coordinator takes no more requests".to_owned()))
            }
            Err(TrySendError::Disconnected(_)) => Err(lost()),
        }
    }

    /// Asks for an answer, or for the rest of one.
    ///
    /// # Errors
    /// If the link has ended, or the coordinator is not ready. What it refuses comes as an event.
    pub(super) fn submit(self: &Arc<Self>, request: &Request, answer: &[Token]) -> Result<Source, SubmitError> {
        if let Readiness::NotReady(why) = self.readiness() {
            return Err(SubmitError::NotReady(why));
        }
        let number = self.numbers.fetch_add(1, Ordering::Relaxed);
        // Bounded by the context: a session tells at most that many tokens and one end.
        let (listener, events) = unbounded_channel();
        lock(&self.open).as_mut().ok_or_else(lost)?.insert(number, listener);
        let source = Source { events, _cancel: Some(Cancel { remote: Arc::clone(self), number }) };
        self.say(FromGateway::Submit(Box::new(wire::submit(number, request, answer))))?;
        Ok(source)
    }

    /// Asks and waits for the report, at most [`ASK_TIMEOUT`].
    pub(super) fn ask(&self, question: Question) -> Option<String> {
        self.ask_within(question, ASK_TIMEOUT)
    }

    /// Has the coordinator examine all nodes.
    ///
    /// # Errors
    /// What it says instead, or that it says nothing.
    pub(super) fn examine(&self) -> Result<Examination, String> {
        let told =
            self.ask_within(Question::Examine, EXAMINE_TIMEOUT).and_then(|text| serde_json::from_str(&text).ok());
        told.unwrap_or_else(|| Err("the coordinator did not say how the nodes are; ask there".to_owned()))
    }

    /// Asks and waits for the report, at most so long.
    fn ask_within(&self, question: Question, timeout: Duration) -> Option<String> {
        let number = self.numbers.fetch_add(1, Ordering::Relaxed);
        let (asker, report) = channel();
        lock(&self.asked).insert(number, asker);
        let said = self.say(FromGateway::Ask { number, question });
        let text = said.ok().and_then(|()| report.recv_timeout(timeout).ok());
        lock(&self.asked).remove(&number);
        text
    }

    /// Whether the coordinator answers, as it said last.
    pub(super) fn readiness(&self) -> Readiness {
        lock(&self.readiness).clone().unwrap_or_else(|| Readiness::NotReady(NO_WORD.to_owned()))
    }
}

/// Has the coordinator behind a link examine all nodes, and ends the link.
///
/// # Errors
/// What it says instead, or that it says nothing.
pub(crate) fn ask_to_examine(link: Arc<dyn Link>) -> Result<Examination, String> {
    link.set_frame_limit(requests::MAX_REQUESTS_BYTES);
    let no_thread = |error: std::io::Error| format!("the system gives no thread: {error}");
    let remote = Remote::start(link).map_err(no_thread)?;
    let asked = remote.receive_card().and_then(|_| {
        let reader = Arc::clone(&remote);
        spawn("gateway", move || {
            reader.run();
            reader.end();
        })
        .map_err(no_thread)?;
        remote.examine()
    });
    remote.end();
    asked
}

fn lost() -> SubmitError {
    SubmitError::NotReady("the link to the coordinator is lost".to_owned())
}

/// Sends messages until the link ends or nobody can send any more.
fn write(link: &dyn Link, messages: &Receiver<FromGateway>) {
    let mut beat = Instant::now();
    loop {
        let message = match messages.recv_timeout(beat.saturating_duration_since(Instant::now())) {
            Ok(message) => message,
            Err(RecvTimeoutError::Timeout) => FromGateway::Beat,
            Err(RecvTimeoutError::Disconnected) => return link.close(),
        };
        if link.send(kind::REQUESTS, &[&message.encode()]).is_err() {
            return link.close();
        }
        beat = Instant::now() + Duration::from_millis(HEARTBEAT_MS);
    }
}
