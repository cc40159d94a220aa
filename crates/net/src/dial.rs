//! Dialing a node at whichever of its addresses answers first.
//!
//! Each address gets its own short-lived thread, started one after the other with a small stagger or as soon as the one
//! before has failed. The first that completes the handshake with the expected key wins; a link that comes too late is
//! dropped, and with it closed. Host names are resolved in a thread too, so a slow resolver holds up nobody.

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use brigade_base::NodeId;

use crate::address::{Kind, MAX_ADDRESSES};
use crate::socket::prepare;
use crate::tcp::TcpLink;
use crate::tls::{self, HandshakeError};
use crate::{Address, Identity};

/// Head start of an address over the next. A LAN handshake takes 1 ms and one over the internet 100 to 200 ms, so what
/// answers at all mostly answers before the next is tried, and an address that swallows packets costs a quarter second.
const STAGGER: Duration = Duration::from_millis(250);

/// No address of a node led to it.
#[derive(Debug)]
pub struct ConnectError {
    /// What went wrong at each address, in the order in which it did.
    pub failures: Vec<DialFailure>,
}

/// Why one address did not lead to the node.
#[derive(Debug)]
pub struct DialFailure {
    /// The address as it was given, or the one that its name stands for.
    pub address: String,
    /// What happened there.
    pub reason: DialReason,
}

/// What happened at an address.
#[derive(Debug)]
pub enum DialReason {
    /// The name stands for no address.
    Unresolved(io::Error),
    /// No connection came about.
    Unreachable(io::Error),
    /// Nothing answered in time.
    TimedOut,
    /// Another node answers there.
    WrongKey {
        /// Its key.
        found: NodeId,
    },
    /// What listens there ended the connection before it had proved anything.
    HungUp,
    /// What answers there is no node, or one that cannot speak with this.
    NotANode(String),
}

impl std::error::Error for ConnectError {}

impl fmt::Display for ConnectError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.failures.is_empty() {
            return f.write_str("no address was given to connect to");
        }
        for (i, failure) in self.failures.iter().enumerate() {
            write!(f, "{}{failure}", if i == 0 { "" } else { "; " })?;
        }
        Ok(())
    }
}

impl fmt::Display for DialFailure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const HINT: &str = "is `brigade serve` running there and is the port open in its firewall?";
        let at = &self.address;
        match &self.reason {
            DialReason::Unresolved(error) => write!(f, "cannot find {at}: {error}; use its IP address instead"),
            DialReason::Unreachable(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                write!(f, "cannot reach {at}: connection refused; {HINT}")
            }
            DialReason::Unreachable(error) => write!(f, "cannot reach {at}: {error}; {HINT}"),
            DialReason::TimedOut => write!(f, "cannot reach {at}: no answer in time; {HINT}"),
            DialReason::WrongKey { .. } => write!(f, "the machine at {at} has another key than the ticket says"),
            DialReason::HungUp => {
                write!(f, "the machine at {at} hung up: it is too busy for another link, or no Brigade node; try again")
            }
            DialReason::NotANode(why) => {
                write!(f, "what answers at {at} does not speak Brigade's protocol ({why}); is the port right?")
            }
        }
    }
}

/// What the dialing threads report: the address that they were given, and what became of it.
struct Report {
    target: Target,
    outcome: Outcome,
}

enum Outcome {
    Resolved(Vec<SocketAddr>),
    Connected(Arc<TcpLink>),
    Failed(DialReason),
}

#[derive(Clone, PartialEq)]
enum Target {
    Name(Address),
    Socket(SocketAddr),
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Name(address) => address.fmt(f),
            Self::Socket(addr) => addr.fmt(f),
        }
    }
}

impl From<&Address> for Target {
    fn from(address: &Address) -> Self {
        match address.kind() {
            Kind::Socket(addr) => Self::Socket(*addr),
            Kind::Name { .. } => Self::Name(address.clone()),
        }
    }
}

impl TcpLink {
    /// Dials the node `expected` at `addresses` (the first [`MAX_ADDRESSES`] count), for at most `timeout` in all.
    /// Returns once one of them has proved to hold the expected key.
    ///
    /// # Errors
    /// If none did; the error says why for each.
    pub fn connect(
        identity: &Identity,
        expected: NodeId,
        addresses: &[Address],
        timeout: Duration,
    ) -> Result<Arc<Self>, ConnectError> {
        let deadline = Instant::now() + timeout;
        let mut waiting: VecDeque<Target> = addresses.iter().take(MAX_ADDRESSES).map(Target::from).collect();
        let mut underway: Vec<Target> = Vec::new();
        let mut failures = Vec::new();
        let (reports, inbox) = channel();
        loop {
            if let Some(target) = waiting.pop_front() {
                underway.push(target.clone());
                start(identity, expected, target, deadline, &reports);
            }
            if underway.is_empty() {
                return Err(ConnectError { failures });
            }
            let now = Instant::now();
            if now >= deadline {
                let silent = underway.iter().chain(&waiting).map(|target| (target, DialReason::TimedOut));
                failures.extend(silent.map(|(target, reason)| DialFailure { address: target.to_string(), reason }));
                return Err(ConnectError { failures });
            }
            let patience = if waiting.is_empty() { deadline - now } else { STAGGER.min(deadline - now) };
            // The sender lives as long as this function, so an error means that the time is up.
            let Ok(Report { target, outcome }) = inbox.recv_timeout(patience) else { continue };
            underway.retain(|other| *other != target);
            match outcome {
                Outcome::Connected(link) => return Ok(link),
                Outcome::Resolved(addrs) => {
                    addrs.into_iter().rev().for_each(|addr| waiting.push_front(Target::Socket(addr)));
                }
                Outcome::Failed(reason) => failures.push(DialFailure { address: target.to_string(), reason }),
            }
        }
    }
}

/// Works on one target in a thread that ends by `deadline`, or when the resolver does.
fn start(identity: &Identity, expected: NodeId, target: Target, deadline: Instant, reports: &Sender<Report>) {
    let (identity, thread_reports, thread_target) = (identity.clone(), reports.clone(), target.clone());
    let spawned = thread::Builder::new().name("dial".to_owned()).spawn(move || {
        let outcome = match &thread_target {
            Target::Name(address) => resolve(address),
            Target::Socket(addr) => match dial(&identity, expected, *addr, deadline) {
                Ok(link) => Outcome::Connected(Arc::new(link)),
                Err(reason) => Outcome::Failed(reason),
            },
        };
        // Nobody listens any more if another address was faster.
        let _ = thread_reports.send(Report { target: thread_target, outcome });
    });
    if let Err(error) = spawned {
        let _ = reports.send(Report { target, outcome: Outcome::Failed(DialReason::Unreachable(error)) });
    }
}

fn resolve(address: &Address) -> Outcome {
    match address.resolve() {
        Ok(addrs) if addrs.is_empty() => Outcome::Failed(DialReason::Unresolved(io::ErrorKind::NotFound.into())),
        Ok(addrs) => Outcome::Resolved(addrs),
        Err(error) => Outcome::Failed(DialReason::Unresolved(error)),
    }
}

fn dial(identity: &Identity, expected: NodeId, addr: SocketAddr, deadline: Instant) -> Result<TcpLink, DialReason> {
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() {
        return Err(DialReason::TimedOut);
    }
    let stream = TcpStream::connect_timeout(&addr, left).map_err(unreachable)?;
    prepare(&stream).map_err(unreachable)?;
    let failed = |error| match error {
        HandshakeError::WrongKey { found } => DialReason::WrongKey { found },
        HandshakeError::TimedOut => DialReason::TimedOut,
        HandshakeError::Io(error) => unreachable(error),
        HandshakeError::Closed => DialReason::HungUp,
        HandshakeError::Tls(error) => DialReason::NotANode(error.to_string()),
    };
    let mut tls = tls::dialer(identity, expected).map_err(|error| failed(error.into()))?;
    let peer = tls::handshake(&stream, &mut tls, deadline).map_err(failed)?;
    TcpLink::new(stream, tls, peer).map_err(unreachable)
}

fn unreachable(error: io::Error) -> DialReason {
    if error.kind() == io::ErrorKind::TimedOut { DialReason::TimedOut } else { DialReason::Unreachable(error) }
}
