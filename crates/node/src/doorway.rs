//! Who comes in at a node's link address.
//!
//! One thread accepts; each link then says on a short-lived thread of its own what it wants, so that a silent one holds
//! nobody up. What it may have is decided by the node's [`Doorkeeper`] before anything else is read from it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use brigade_net::{
    AcceptError, Hello, Link, Listener, PREAMBLE_TIMEOUT, Refusal, TcpLink, receive_hello, refuse, welcome,
};
use brigade_protocol::frame::Attach;
use brigade_protocol::kind;

/// How often the accepting thread looks whether it should end.
const ACCEPT_POLL: Duration = Duration::from_millis(200);

/// Links that may be about to say what they want. As many as may be in their handshake: nobody needs more, and each
/// has a thread.
const MAX_AT_THE_DOOR: usize = brigade_net::MAX_HANDSHAKES;

/// Decides who may come in, and takes them in.
pub trait Doorkeeper: Send + Sync + 'static {
    /// Whether this peer may have what it asks for.
    ///
    /// # Errors
    /// What to answer if not.
    fn admit(&self, hello: &Hello, peer: brigade_base::NodeId) -> Result<(), Refusal>;

    /// Takes an admitted link. Runs on a thread of the link's own, which may last as long as the link.
    fn enter(&self, hello: Hello, link: Arc<TcpLink>);
}

/// The thread that accepts links.
pub struct Doorway {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Doorway {
    /// Begins to accept.
    pub fn open(listener: Listener, keeper: Arc<dyn Doorkeeper>) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let at_the_door = Arc::new(());
        let accept = move || {
            while !stopped.load(Ordering::Relaxed) {
                match listener.accept(ACCEPT_POLL) {
                    Ok(link) if Arc::strong_count(&at_the_door) > MAX_AT_THE_DOOR => link.close(),
                    Ok(link) => {
                        let (keeper, place) = (Arc::clone(&keeper), Arc::clone(&at_the_door));
                        let serve = move || enter(&*keeper, link, place);
                        if let Err(error) = std::thread::Builder::new().name("link".into()).spawn(serve) {
                            tracing::error!(%error, "no thread for a new link");
                        }
                    }
                    Err(AcceptError::TimedOut) => {}
                    Err(error) => {
                        tracing::warn!(%error, "no links are accepted any more");
                        return;
                    }
                }
            }
        };
        let thread = std::thread::Builder::new().name("accept".into()).spawn(accept);
        Self { stop, thread: thread.inspect_err(|error| tracing::error!(%error, "no thread to accept links")).ok() }
    }
}

impl Drop for Doorway {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Hears a link out and lets it in; its place at the door is free once that is decided.
fn enter(keeper: &dyn Doorkeeper, link: Arc<TcpLink>, place: Arc<()>) {
    let deadline = Instant::now() + PREAMBLE_TIMEOUT;
    let hello = match receive_hello(&*link, deadline) {
        Ok(hello) => hello,
        Err(error) => {
            tracing::debug!(peer = %link.peer_addr(), %error, "a link did not introduce itself");
            return link.close();
        }
    };
    let admitted = hello.common_version().and_then(|version| keeper.admit(&hello, link.peer()).map(|()| version));
    drop(place);
    match admitted {
        Ok(version) => match welcome(&*link, version) {
            Ok(()) => keeper.enter(hello, link),
            Err(error) => tracing::debug!(%error, "a link closed at the door"),
        },
        Err(refusal) => {
            tracing::info!(peer = %link.peer().short(), address = %link.peer_addr(), %refusal, "a link was refused");
            refuse(&*link, &refusal);
        }
    }
}

/// Reads which placement a data link belongs to.
pub fn receive_attach(link: &dyn Link) -> Option<Attach> {
    let mut buf = Vec::new();
    match link.recv(&mut buf, Some(Instant::now() + PREAMBLE_TIMEOUT)) {
        Ok(kind::ATTACH) => Attach::decode(&buf).ok(),
        _ => None,
    }
}
