//! The listening end: takes connections, shakes hands, hands over links.
//!
//! - One acceptor thread owns the listening sockets and sleeps in `poll`.
//! - Each connection gets a short-lived thread for its handshake, at most [`MAX_HANDSHAKES`] at once and a quarter of
//!   them for one address, each for at most [`HANDSHAKE_TIMEOUT`]: a silent client holds up nobody.
//! - Links whose handshake is done wait in a queue for [`Listener::accept`]. Their peers have proved who they are and
//!   nothing more; whether they are welcome is the caller's question.

use std::collections::{HashMap, VecDeque};
use std::io::{self, PipeReader, PipeWriter};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};
use rustls::ServerConfig;
use socket2::{Domain, Protocol, Socket, Type};

use crate::socket::{poll_until, prepare};
use crate::tcp::{TcpLink, lock};
use crate::tls::{self, HandshakeError};
use crate::{Identity, Link};

/// Most handshakes at once. A cluster of that many machines may start together; each handshake takes about 1 ms of a
/// core, so more at once would only be slower. The thread of each costs some 300 KiB while it runs.
pub const MAX_HANDSHAKES: usize = 64;

/// Most handshakes at once from one address, so that one broken client leaves room for the others. A machine opens
/// three links for each of its nodes.
const MAX_HANDSHAKES_PER_ADDRESS: usize = MAX_HANDSHAKES / 4;

/// Longest handshake: two round trips, of 300 ms at worst over the internet, on a machine that is busy loading a model.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);

/// Most links that wait to be accepted: one full round of handshakes. Further ones are closed; their dialers try again.
const MAX_READY: usize = MAX_HANDSHAKES;

/// Connections that the kernel keeps until the acceptor takes them: as many as wait behind it.
const BACKLOG: i32 = 128;

/// Pause after the system refused a connection for want of memory or file descriptors, which closing links give back.
const REFUSED_PAUSE: Duration = Duration::from_millis(50);

/// Why a node cannot listen.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// The port is taken.
    #[error("{addr} is in use by another program; stop it, or listen on another port")]
    InUse {
        /// The address.
        addr: SocketAddr,
    },
    /// No interface has the address.
    #[error("this machine has no address {}; listen on 0.0.0.0 for all of its addresses", addr.ip())]
    NotHere {
        /// The address.
        addr: SocketAddr,
    },
    /// The system does not allow it.
    #[error("this user may not listen on {addr}; choose a port from 1024 on")]
    Denied {
        /// The address.
        addr: SocketAddr,
    },
    /// Something else.
    #[error("cannot listen on {addr}: {source}")]
    Io {
        /// The address.
        addr: SocketAddr,
        /// What the system says.
        source: io::Error,
    },
    /// No address was given.
    #[error("no address was given to listen on")]
    NoAddress,
    /// The identity cannot be used with TLS, or no thread could be started.
    #[error("cannot start listening: {0}")]
    Start(String),
}

/// Why no link was accepted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum AcceptError {
    /// Nobody came in time.
    #[error("no node connected in time")]
    TimedOut,
    /// The listener is closed.
    #[error("the listener is closed")]
    Closed,
}

/// Listens for other nodes. Dropping it closes it; accepted links live on.
pub struct Listener {
    shared: Arc<Shared>,
    local_addrs: Vec<SocketAddr>,
    /// Closing the pipe wakes the acceptor for good.
    waker: Mutex<Option<PipeWriter>>,
    acceptor: Mutex<Option<JoinHandle<()>>>,
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    tls: Arc<ServerConfig>,
}

#[derive(Default)]
struct State {
    ready: VecDeque<Arc<TcpLink>>,
    handshakes: HashMap<IpAddr, usize>,
    closed: bool,
}

/// A place among the handshakes; dropping it frees it.
struct Slot {
    shared: Arc<Shared>,
    ip: IpAddr,
}

impl Listener {
    /// Listens on all of `addrs`. Port 0 lets the system choose one; `[::]` takes IPv4 too, unless an IPv4 address is
    /// among `addrs`.
    ///
    /// # Errors
    /// If one of the addresses cannot be listened on; then none is.
    pub fn bind(identity: &Identity, addrs: &[SocketAddr]) -> Result<Self, BindError> {
        if addrs.is_empty() {
            return Err(BindError::NoAddress);
        }
        let with_ipv4 = !addrs.iter().any(SocketAddr::is_ipv4);
        let mut sockets = Vec::with_capacity(addrs.len());
        let mut local_addrs = Vec::with_capacity(addrs.len());
        for &addr in addrs {
            let bound = bind_one(addr, with_ipv4).and_then(|socket| Ok((socket.local_addr()?, socket)));
            let (local_addr, socket) = bound.map_err(|source| bind_error(addr, source))?;
            local_addrs.push(local_addr);
            sockets.push(socket);
        }
        let start = |error: &dyn std::fmt::Display| BindError::Start(error.to_string());
        let tls = tls::listener_config(identity).map_err(|error| start(&error))?;
        let shared = Arc::new(Shared { state: Mutex::default(), changed: Condvar::new(), tls });
        let (wakened, waker) = io::pipe().map_err(|error| start(&error))?;
        let acceptor = thread::Builder::new()
            .name("accept".to_owned())
            .spawn({
                let shared = Arc::clone(&shared);
                move || accept_all(&shared, &sockets, &wakened)
            })
            .map_err(|error| start(&error))?;
        Ok(Self { shared, local_addrs, waker: Mutex::new(Some(waker)), acceptor: Mutex::new(Some(acceptor)) })
    }

    /// The addresses listened on, with the ports that the system chose.
    pub fn local_addrs(&self) -> &[SocketAddr] {
        &self.local_addrs
    }

    /// Waits for the next link whose handshake is done.
    ///
    /// # Errors
    /// If none came within `timeout`, or the listener was closed.
    pub fn accept(&self, timeout: Duration) -> Result<Arc<TcpLink>, AcceptError> {
        let state = lock(&self.shared.state);
        let idle = |state: &mut State| state.ready.is_empty() && !state.closed;
        let waited = self.shared.changed.wait_timeout_while(state, timeout, idle);
        let (mut state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        if state.closed {
            return Err(AcceptError::Closed);
        }
        state.ready.pop_front().ok_or(AcceptError::TimedOut)
    }

    /// Stops listening, closes links that nobody accepted and wakes whoever waits in [`accept`](Self::accept). When it
    /// returns the ports are free. Harmless when repeated.
    pub fn close(&self) {
        let unaccepted = {
            let mut state = lock(&self.shared.state);
            state.closed = true;
            std::mem::take(&mut state.ready)
        };
        unaccepted.iter().for_each(|link| link.close());
        self.shared.changed.notify_all();
        drop(lock(&self.waker).take());
        if let Some(acceptor) = lock(&self.acceptor).take() {
            // It can only have panicked; then the sockets are closed as well.
            let _ = acceptor.join();
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.close();
    }
}

impl std::fmt::Debug for Listener {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Listener").field("local_addrs", &self.local_addrs).finish_non_exhaustive()
    }
}

fn bind_one(addr: SocketAddr, with_ipv4: bool) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(addr), Type::STREAM, Some(Protocol::TCP))?;
    if addr.is_ipv6() {
        socket.set_only_v6(!(addr.ip().is_unspecified() && with_ipv4))?;
    }
    // Lets a node start again while connections of its last run time out.
    socket.set_reuse_address(true)?;
    socket.bind(&addr.into())?;
    socket.listen(BACKLOG)?;
    socket.set_nonblocking(true)?;
    Ok(socket.into())
}

fn bind_error(addr: SocketAddr, source: io::Error) -> BindError {
    match source.kind() {
        io::ErrorKind::AddrInUse => BindError::InUse { addr },
        io::ErrorKind::AddrNotAvailable => BindError::NotHere { addr },
        io::ErrorKind::PermissionDenied => BindError::Denied { addr },
        _ => BindError::Io { addr, source },
    }
}

/// The acceptor thread.
fn accept_all(shared: &Arc<Shared>, sockets: &[TcpListener], wakened: &PipeReader) {
    loop {
        let mut fds: Vec<PollFd<'_>> = sockets.iter().map(|socket| PollFd::new(socket, PollFlags::IN)).collect();
        fds.push(PollFd::new(wakened, PollFlags::IN));
        let polled = poll_until(&mut fds, None);
        if lock(&shared.state).closed {
            return;
        }
        let mut refused = polled.err();
        for socket in sockets {
            match socket.accept() {
                Ok((stream, from)) => admit(shared, stream, from),
                Err(error) if is_transient(&error) => {}
                Err(error) => refused = Some(error),
            }
        }
        if let Some(error) = refused {
            tracing::warn!(%error, "the system refuses connections");
            // Sleeps on the waker, so that closing stays prompt.
            let _ = poll_until(&mut [PollFd::new(wakened, PollFlags::IN)], Some(Instant::now() + REFUSED_PAUSE));
        }
    }
}

/// Nobody there, or one who left before being taken.
fn is_transient(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionReset, Interrupted, WouldBlock};
    matches!(error.kind(), ConnectionAborted | ConnectionReset | Interrupted | WouldBlock)
}

/// Starts the handshake with a new connection, or drops it if too many are underway.
fn admit(shared: &Arc<Shared>, stream: TcpStream, from: SocketAddr) {
    let Some(slot) = Slot::take(shared, from.ip().to_canonical()) else {
        tracing::debug!(%from, "too many handshakes at once; connection dropped");
        return;
    };
    let spawned =
        thread::Builder::new().name("handshake".to_owned()).spawn(move || match shake_hands(&slot.shared, stream) {
            Ok(link) => slot.shared.offer(Arc::new(link)),
            Err(error) => tracing::debug!(%from, %error, "handshake failed"),
        });
    if let Err(error) = spawned {
        tracing::warn!(%from, %error, "no thread for a handshake; connection dropped");
    }
}

fn shake_hands(shared: &Shared, stream: TcpStream) -> Result<TcpLink, HandshakeError> {
    let deadline = Instant::now() + HANDSHAKE_TIMEOUT;
    prepare(&stream)?;
    let mut tls = tls::listener(Arc::clone(&shared.tls))?;
    let peer = tls::handshake(&stream, &mut tls, deadline)?;
    Ok(TcpLink::new(stream, tls, peer)?)
}

impl Shared {
    fn offer(&self, link: Arc<TcpLink>) {
        let mut state = lock(&self.state);
        // A link that is not queued is closed as it is dropped, after the lock.
        let rejected = if state.closed || state.ready.len() >= MAX_READY {
            Some(link)
        } else {
            state.ready.push_back(link);
            None
        };
        drop(state);
        self.changed.notify_one();
        if let Some(link) = rejected {
            tracing::debug!(peer = %link.peer(), "nobody accepts; link closed");
        }
    }
}

impl Slot {
    fn take(shared: &Arc<Shared>, ip: IpAddr) -> Option<Self> {
        let mut state = lock(&shared.state);
        let total: usize = state.handshakes.values().sum();
        let here = state.handshakes.get(&ip).copied().unwrap_or_default();
        if total >= MAX_HANDSHAKES || here >= MAX_HANDSHAKES_PER_ADDRESS {
            return None;
        }
        state.handshakes.insert(ip, here + 1);
        Some(Self { shared: Arc::clone(shared), ip })
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let mut state = lock(&self.shared.state);
        if let Some(here) = state.handshakes.get_mut(&self.ip) {
            *here -= 1;
            if *here == 0 {
                state.handshakes.remove(&self.ip);
            }
        }
    }
}
