//! The coordinator's end of a gateway's link.
//!
//! - The thread that the link came with reads: it hands requests to the coordinator and the receivers of their events
//!   to the writer.
//! - The *writer* thread owns those receivers and sends what comes from any of them, and a beat every [`BEAT`]
//!   and whenever the coordinator becomes ready or is so no more.
//!
//! Nothing is queued for a gateway that does not read but what its sessions tell, which the context bounds: the writer
//! waits in the socket, and [`brigade_net::WRITE_TIMEOUT`] ends the link. With the link end its sessions.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use brigade_base::{Hash, Token};
use brigade_net::{Link, LinkError};
use brigade_protocol::control::{DEAD_AFTER_MS, HEARTBEAT_MS};
use brigade_protocol::kind;
use brigade_protocol::requests::{FromGateway, MAX_REQUESTS_BYTES, Question, Submit, ToGateway, VOCABULARY_CHUNK};
use tokio::sync::mpsc::{Receiver, Sender, UnboundedReceiver, channel};

use super::wire;
use crate::handle::Handle;
use crate::serving::{Event, Examination, Failure, Readiness, Request, Serving, SubmitError};
use crate::threads::spawn;

/// Orders that wait for the writer. Pieces of the vocabulary are among them, so these are a megabyte at most; the
/// reader waits where there is no room.
const MAX_ORDERS: usize = 16;

/// How often the coordinator says that it is there.
const BEAT: Duration = Duration::from_millis(HEARTBEAT_MS);

/// How often it is looked whether the coordinator is ready still. A gateway submits nothing before it hears that, so
/// this is part of the pause after a loss; a look takes less than a microsecond.
const LOOK: Duration = Duration::from_millis(25);

/// Takes requests, also such as have begun elsewhere.
pub trait Coordinating: Serving {
    /// Starts a session of which the first tokens of the answer were chosen and told elsewhere; it tells those behind
    /// them.
    ///
    /// # Errors
    /// If the request can never be answered, or not now.
    fn submit_resumed(&self, request: Request, answer: Vec<Token>) -> Result<UnboundedReceiver<Event>, SubmitError>;
}

impl Coordinating for Handle {
    fn submit_resumed(&self, request: Request, answer: Vec<Token>) -> Result<UnboundedReceiver<Event>, SubmitError> {
        Self::submit_resumed(self, request, answer)
    }
}

/// What the writer is told.
enum Order {
    Open(u64, UnboundedReceiver<Event>),
    Cancel(u64),
    Say(ToGateway),
}

/// Serves a gateway's requests until its link ends, on a thread that may block. `vocabulary` is the GGUF without
/// tensors that [`brigade_gguf::vocabulary_header`] makes.
pub fn serve_requests(link: &Arc<dyn Link>, coordinator: &Arc<dyn Coordinating>, vocabulary: &[u8]) {
    link.set_frame_limit(MAX_REQUESTS_BYTES);
    let (orders, queue) = channel(MAX_ORDERS);
    let card = wire::card(coordinator.model(), Hash::from_bytes(*blake3::hash(vocabulary).as_bytes()));
    let writer = {
        let (link, coordinator) = (Arc::clone(link), Arc::clone(coordinator));
        let run = move || {
            let result = link
                .send(kind::REQUESTS, &[&ToGateway::Card(Box::new(card)).encode()])
                .and_then(|()| write_all(&*link, queue, &*coordinator));
            if let Err(error) = result {
                tracing::debug!(gateway = %link.peer().short(), %error, "a gateway's link ended");
            }
            link.close();
        };
        std::thread::Builder::new().name("gateway writer".into()).spawn(run)
    };
    match writer {
        Ok(_) => read(&**link, coordinator, vocabulary, &orders),
        Err(error) => tracing::error!(%error, "no thread for a gateway's link"),
    }
    link.close();
}

fn read(link: &dyn Link, coordinator: &Arc<dyn Coordinating>, vocabulary: &[u8], orders: &Sender<Order>) {
    let mut buf = Vec::new();
    let examines = Arc::new(AtomicBool::new(false));
    loop {
        let deadline = Instant::now() + Duration::from_millis(DEAD_AFTER_MS);
        let message = match link.recv(&mut buf, Some(deadline)) {
            Ok(kind::REQUESTS) => FromGateway::decode(&buf).map_err(|error| error.to_string()),
            Ok(other) => Err(format!("it sent a frame of unknown kind {other:#x}")),
            Err(error) => Err(error.to_string()),
        };
        let is_taken = match message {
            Ok(FromGateway::Beat) => true,
            Ok(FromGateway::Submit(submit)) => orders.blocking_send(open(&**coordinator, *submit)).is_ok(),
            Ok(FromGateway::Cancel { number }) => orders.blocking_send(Order::Cancel(number)).is_ok(),
            Ok(FromGateway::Ask { number, question: Question::Examine }) => {
                examine(number, coordinator, orders, &examines)
            }
            Ok(FromGateway::Ask { number, question }) => {
                let text = report(&**coordinator, &question);
                orders.blocking_send(Order::Say(ToGateway::Report { number, text })).is_ok()
            }
            Ok(FromGateway::FetchVocabulary) => {
                let total = vocabulary.len() as u64;
                vocabulary.chunks(VOCABULARY_CHUNK).all(|piece| {
                    let piece = ToGateway::Vocabulary { total, bytes: piece.to_vec() };
                    orders.blocking_send(Order::Say(piece)).is_ok()
                })
            }
            Err(why) => {
                tracing::debug!(gateway = %link.peer().short(), why, "a gateway's link ended");
                false
            }
        };
        if !is_taken {
            return;
        }
    }
}

fn open(coordinator: &dyn Coordinating, submit: Submit) -> Order {
    let number = submit.number;
    let (request, answer) = wire::request(submit);
    match coordinator.submit_resumed(request, answer) {
        Ok(events) => Order::Open(number, events),
        Err(error) => Order::Say(refused(number, error)),
    }
}

fn refused(number: u64, error: SubmitError) -> ToGateway {
    wire::message(number, Event::Failed(Failure::Refused(error)))
}

/// Has all nodes examined on a thread, since that takes a second or ten and requests are to get through meanwhile; one
/// such thread for each gateway. False if the writer has ended.
fn examine(
    number: u64,
    coordinator: &Arc<dyn Coordinating>,
    orders: &Sender<Order>,
    examines: &Arc<AtomicBool>,
) -> bool {
    let refuse = |why: &str| {
        let text = serde_json::to_string(&Err::<Examination, &str>(why)).unwrap_or_default();
        orders.blocking_send(Order::Say(ToGateway::Report { number, text })).is_ok()
    };
    if examines.swap(true, Ordering::Relaxed) {
        return refuse("the nodes are being examined already; ask again in a moment");
    }
    let (coordinator, orders, done) = (Arc::clone(coordinator), orders.clone(), Arc::clone(examines));
    let work = move || {
        let text = report(&*coordinator, &Question::Examine);
        done.store(false, Ordering::Relaxed);
        let _ = orders.blocking_send(Order::Say(ToGateway::Report { number, text }));
    };
    match spawn("examine", work) {
        Ok(()) => true,
        Err(error) => {
            examines.store(false, Ordering::Relaxed);
            refuse(&format!("the system gives no thread: {error}"))
        }
    }
}

/// Writing JSON to memory fails for no value of these types.
fn report(coordinator: &dyn Coordinating, question: &Question) -> String {
    match question {
        Question::Status => serde_json::to_string(&coordinator.status()).unwrap_or_default(),
        Question::Metrics => coordinator.metrics(),
        Question::Examine => serde_json::to_string(&coordinator.examine()).unwrap_or_default(),
        Question::Trace(id) => {
            let trace = coordinator.trace(id);
            serde_json::to_string(&trace.map(|trace| (trace.tenant, trace))).unwrap_or_default()
        }
    }
}

/// Runs the writer on this thread.
fn write_all(link: &dyn Link, orders: Receiver<Order>, coordinator: &dyn Coordinating) -> Result<(), LinkError> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().map_err(LinkError::Io)?;
    runtime.block_on(write(link, orders, coordinator))
}

async fn write(link: &dyn Link, mut orders: Receiver<Order>, coordinator: &dyn Coordinating) -> Result<(), LinkError> {
    let mut sessions = Sessions::default();
    let mut looks = tokio::time::interval(LOOK);
    looks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut said: Option<(Instant, Readiness)> = None;
    loop {
        let message = tokio::select! {
            order = orders.recv() => match order {
                Some(Order::Open(number, _)) if sessions.open.len() >= super::MAX_OPEN => {
                    refused(number, SubmitError::Busy { waiting: super::MAX_OPEN })
                }
                Some(Order::Open(number, events)) => {
                    sessions.open.push((number, events));
                    continue;
                }
                Some(Order::Cancel(number)) => {
                    sessions.open.retain(|(other, _)| *other != number);
                    continue;
                }
                Some(Order::Say(message)) => message,
                None => return Ok(()),
            },
            (number, event) = std::future::poll_fn(|cx| sessions.poll_next(cx)) => wire::message(number, event),
            _ = looks.tick() => {
                let readiness = coordinator.readiness();
                let is_news = |(at, before): &(Instant, Readiness)| at.elapsed() >= BEAT || *before != readiness;
                if !said.as_ref().is_none_or(is_news) {
                    continue;
                }
                said = Some((Instant::now(), readiness.clone()));
                ToGateway::Beat(wire::readiness(readiness))
            }
        };
        link.send(kind::REQUESTS, &[&message.encode()])?;
    }
}

/// The sessions of a gateway, which take turns.
#[derive(Default)]
struct Sessions {
    open: Vec<(u64, UnboundedReceiver<Event>)>,
    /// Who is asked first next time.
    turn: usize,
}

impl Sessions {
    /// The next event of any session. One that ends goes; one that breaks off is told to have stopped.
    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<(u64, Event)> {
        let n = self.open.len();
        for at in (0..n).map(|i| (self.turn + i) % n) {
            let (number, events) = &mut self.open[at];
            let number = *number;
            if let Poll::Ready(event) = events.poll_recv(cx) {
                let event = event.unwrap_or(Event::Failed(Failure::Stopping));
                if matches!(event, Event::Done { .. } | Event::Failed(_)) {
                    self.open.swap_remove(at);
                }
                self.turn = at + 1;
                return Poll::Ready((number, event));
            }
        }
        Poll::Pending
    }
}
