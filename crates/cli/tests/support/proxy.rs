//! A TCP proxy between two nodes that breaks their links on command.
//!
//! Each connection is carried by two threads, one for each direction. A *silent* proxy is a network that swallows
//! packets: connections stay open, new ones are taken, and nothing arrives, not even their end, until it speaks again.
//! A *reset* ends all connections that there are at once, as a router that forgets them does; new ones work.
//!
//! A proxy lives as long as the process. It is also used by `cargo xtask chaos`.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use socket2::{Domain, Protocol, SockRef, Socket, Type};

/// How soon a connection whose other end reads nothing notices a reset: far below any time that failures are measured
/// in.
const LOOK: Duration = Duration::from_millis(10);

/// How long the target may take to accept: it is on this machine.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Bytes carried at once.
const BUFFER_BYTES: usize = 64 << 10;

/// Makes a connection to whoever is behind a proxy.
type Dial = dyn Fn() -> io::Result<TcpStream> + Send + Sync;

/// A proxy in front of something.
pub struct Proxy {
    network: Arc<Network>,
}

/// What all connections of a proxy share.
struct Network {
    dial: Box<Dial>,
    state: Mutex<State>,
    speaks: Condvar,
}

#[derive(Default)]
struct State {
    is_silent: bool,
    /// Bytes after which it falls silent by itself.
    budget: Option<u64>,
    connections: Vec<Weak<Connection>>,
}

/// Both ends of a connection. When its two threads have let go of it, it is closed.
struct Connection {
    ends: [TcpStream; 2],
    is_reset: AtomicBool,
}

/// A connection to `target` that comes from `source`, if there is one.
///
/// # Errors
/// If the target does not take it.
pub fn dial(target: SocketAddr, source: Option<IpAddr>) -> io::Result<TcpStream> {
    let socket = Socket::new(Domain::for_address(target), Type::STREAM, Some(Protocol::TCP))?;
    if let Some(source) = source {
        socket.bind(&SocketAddr::new(source, 0).into())?;
    }
    socket.connect_timeout(&target.into(), CONNECT_TIMEOUT)?;
    Ok(socket.into())
}

impl Proxy {
    /// A proxy in front of what `dial` leads to; it is called in a thread of its own for each connection.
    pub fn new(dial: impl Fn() -> io::Result<TcpStream> + Send + Sync + 'static) -> Self {
        let (state, speaks) = (Mutex::default(), Condvar::new());
        Self { network: Arc::new(Network { dial: Box::new(dial), state, speaks }) }
    }

    /// Carries connections that come in here, too.
    ///
    /// # Errors
    /// If no thread can be started.
    pub fn listen(&self, listener: TcpListener) -> io::Result<()> {
        let network = Arc::clone(&self.network);
        let accept = move || {
            for near in listener.incoming().flatten() {
                let network = Arc::clone(&network);
                std::thread::spawn(move || {
                    // Whoever dialled sees that the connection ends at once.
                    let _ = network.carry(near);
                });
            }
        };
        std::thread::Builder::new().name("proxy".to_owned()).spawn(accept).map(drop)
    }

    /// Lets nothing through from now on, or everything again, also what was held back.
    pub fn set_silent(&self, is_silent: bool) {
        let mut state = self.network.state();
        (state.is_silent, state.budget) = (is_silent, None);
        drop(state);
        self.network.speaks.notify_all();
    }

    /// Falls silent once so many bytes more have come, both ways together.
    pub fn silence_after(&self, n_bytes: u64) {
        self.network.state().budget = Some(n_bytes);
    }

    /// Ends all connections that there are.
    pub fn reset(&self) {
        for connection in self.network.state().connections.drain(..).filter_map(|weak| weak.upgrade()) {
            connection.reset();
        }
        self.network.speaks.notify_all();
    }
}

impl Network {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns once something may pass.
    fn wait_for_speech(&self, is_reset: impl Fn() -> bool) {
        let mut state = self.state();
        while state.is_silent && !is_reset() {
            state = self.speaks.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Falls silent if these bytes are more than may pass.
    fn spend(&self, n_bytes: u64) {
        let mut state = self.state();
        if let Some(budget) = &mut state.budget {
            *budget = budget.saturating_sub(n_bytes);
            state.is_silent |= state.budget == Some(0);
        }
    }

    /// Carries a connection to its end.
    fn carry(self: Arc<Self>, near: TcpStream) -> io::Result<()> {
        self.wait_for_speech(|| false);
        let far = (self.dial)()?;
        for end in [&near, &far] {
            end.set_nodelay(true)?;
            end.set_write_timeout(Some(LOOK))?;
        }
        let connection = Arc::new(Connection { ends: [near, far], is_reset: AtomicBool::new(false) });
        let mut state = self.state();
        state.connections.retain(|other| other.strong_count() > 0);
        state.connections.push(Arc::downgrade(&connection));
        drop(state);
        let (network, other) = (Arc::clone(&self), Arc::clone(&connection));
        let back = std::thread::spawn(move || network.carry_one_way(&other, 1));
        self.carry_one_way(&connection, 0);
        let _ = back.join();
        Ok(())
    }

    /// Carries what comes in at one end to the other, until it ends or the connection is reset.
    fn carry_one_way(&self, connection: &Connection, from: usize) {
        let (mut from, mut to) = (&connection.ends[from], &connection.ends[1 - from]);
        let mut buf = vec![0; BUFFER_BYTES];
        loop {
            let n = match from.read(&mut buf) {
                Ok(n) => n,
                Err(error) if is_pause(&error) => continue,
                Err(_) => return connection.reset(),
            };
            self.spend(n as u64);
            self.wait_for_speech(|| connection.is_reset());
            if connection.is_reset() {
                return;
            }
            if n == 0 {
                let _ = to.shutdown(Shutdown::Write);
                return;
            }
            let mut rest = &buf[..n];
            while !rest.is_empty() {
                match to.write(rest) {
                    Ok(n) => rest = &rest[n..],
                    Err(error) if is_pause(&error) && !connection.is_reset() => {}
                    Err(_) => return connection.reset(),
                }
            }
        }
    }
}

impl Connection {
    fn is_reset(&self) -> bool {
        self.is_reset.load(Ordering::Relaxed)
    }

    /// Makes both threads end, and closing send a reset. It fails for an end that is closed already.
    fn reset(&self) {
        self.is_reset.store(true, Ordering::Relaxed);
        for end in &self.ends {
            let _ = SockRef::from(end).set_linger(Some(Duration::ZERO));
            let _ = end.shutdown(Shutdown::Read);
        }
    }
}

fn is_pause(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted)
}
