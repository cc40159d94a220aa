//! A worker's control link at the coordinator: one thread reads it, one writes to it and sends the heartbeats.

use std::net::SocketAddr;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use brigade_base::ByteSize;
use brigade_net::{Link, TcpLink};
use brigade_protocol::control::{DEAD_AFTER_MS, HEARTBEAT_MS, MAX_ADDRESSES, Offer, Progress, ToCoordinator, ToWorker};
use brigade_protocol::kind;
use brigade_protocol::weights::WeightBytes;

use crate::threads::lock;

/// A worker's control link.
pub(super) struct WorkerLink {
    pub(super) generation: u64,
    pub(super) outbox: Sender<ToWorker>,
    pub(super) link: Arc<TcpLink>,
    /// Shared with the writer, which asks, and the reader, which hears the answer.
    pub(super) pulse: Arc<Mutex<Pulse>>,
}

/// What the heartbeat tells of a worker.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Pulse {
    pub(super) asked: Option<(u64, Instant)>,
    pub(super) rtt_ms: f32,
    pub(super) resident: ByteSize,
    /// What its stages have done.
    pub(super) progress: Progress,
    /// Where it had its weights from.
    pub(super) weights: WeightBytes,
    /// When that was more than before.
    pub(super) moved: Option<Instant>,
}

/// The address under which the coordinator sees a worker is one that others may reach too.
pub(super) fn with_seen_address(mut offer: Offer, seen_as: &str) -> Offer {
    let port = offer.addresses.first().and_then(|a| a.parse::<SocketAddr>().ok()).map(|a| a.port());
    if let (Ok(mut seen), Some(port)) = (seen_as.parse::<SocketAddr>(), port) {
        seen.set_port(port);
        let seen = seen.to_string();
        offer.addresses.retain(|a| *a != seen);
        offer.addresses.insert(0, seen);
        offer.addresses.truncate(MAX_ADDRESSES);
    }
    offer
}

pub(super) fn read_worker(
    link: &dyn Link,
    pulse: &Mutex<Pulse>,
    heard: &dyn Fn(),
    tell: impl Fn(ToCoordinator),
) -> String {
    let mut buf = Vec::new();
    loop {
        let deadline = Instant::now() + Duration::from_millis(DEAD_AFTER_MS);
        let received = link.recv(&mut buf, Some(deadline));
        if received.is_ok() {
            heard();
        }
        match received {
            Ok(kind::CONTROL) => match ToCoordinator::decode(&buf) {
                Ok(ToCoordinator::Pong { nonce, resident, progress, weights }) => {
                    let mut pulse = lock(pulse);
                    pulse.weights = weights;
                    pulse.resident = resident;
                    if pulse.progress.steps != progress.steps {
                        pulse.moved = Some(Instant::now());
                    }
                    pulse.progress = progress;
                    if let Some((_, at)) = pulse.asked.filter(|(asked, _)| *asked == nonce) {
                        pulse.rtt_ms = at.elapsed().as_secs_f32() * 1000.0;
                    }
                }
                Ok(message) => tell(message),
                Err(error) => return error.to_string(),
            },
            Ok(other) => return format!("it sent a frame of unknown kind {other:#x}"),
            Err(brigade_net::LinkError::TimedOut) => {
                return format!("it was silent for {} s", DEAD_AFTER_MS as f32 / 1000.0);
            }
            Err(error) => return error.to_string(),
        }
    }
}

/// Sends what the owner loop wants told, and a ping whenever a heartbeat's time has passed.
pub(super) fn write_worker(link: &dyn Link, pulse: &Mutex<Pulse>, messages: &Receiver<ToWorker>) {
    let heartbeat = Duration::from_millis(HEARTBEAT_MS);
    let mut next_ping = Instant::now();
    let mut nonce = 0;
    loop {
        let message = match messages.recv_timeout(next_ping.saturating_duration_since(Instant::now())) {
            Ok(message) => message,
            Err(RecvTimeoutError::Timeout) => {
                next_ping = Instant::now() + heartbeat;
                nonce += 1;
                lock(pulse).asked = Some((nonce, Instant::now()));
                ToWorker::Ping { nonce }
            }
            Err(RecvTimeoutError::Disconnected) => return link.close(),
        };
        if link.send(kind::CONTROL, &[&message.encode()]).is_err() {
            return link.close();
        }
    }
}
