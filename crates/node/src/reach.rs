//! Dialling another node and being let in.

use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, SendError, channel};
use std::time::Duration;

use brigade_base::NodeId;
use brigade_net::{
    Address, ConnectError, GreetError, Hello, Identity, Link, LinkError, Purpose, Refusal, TcpLink, TicketSecret, greet,
};
use brigade_protocol::control::Peer;
use brigade_protocol::frame::Attach;
use brigade_protocol::kind;

use crate::threads::spawn;

/// How long all addresses of a node together may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Another node cannot be reached, or does not let this one in.
#[derive(Debug, thiserror::Error)]
pub enum ReachError {
    /// No address led there.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// It refused.
    #[error(transparent)]
    Greet(#[from] GreetError),
    /// The link ended before it was of use.
    #[error(transparent)]
    Link(#[from] LinkError),
}

impl ReachError {
    /// Whether trying again is useless until a person does something.
    pub fn is_final(&self) -> bool {
        match self {
            Self::Greet(GreetError::Refused(refusal)) => !matches!(refusal, Refusal::Busy | Refusal::Stopping),
            Self::Connect(_) | Self::Greet(_) | Self::Link(_) => false,
        }
    }
}

/// How often it is looked whether a link is wanted still.
const POLL: Duration = Duration::from_millis(25);

/// Dials on a thread of its own, so that whoever waits can give it up: a machine that hangs takes seconds to say
/// nothing. `None` if `is_wanted` ceased to hold before that was done, or the system gives no thread; what comes of it
/// then goes to `discard`.
pub fn while_wanted<T: Send + 'static>(
    dial: impl FnOnce() -> T + Send + 'static,
    is_wanted: impl Fn() -> bool,
    discard: fn(T),
) -> Option<T> {
    let (tell, dialled) = channel();
    let work = move || {
        if let Err(SendError(result)) = tell.send(dial()) {
            discard(result);
        }
    };
    if let Err(error) = spawn("dial", work) {
        tracing::error!(%error, "no thread to dial with");
        std::thread::sleep(POLL);
        return None;
    }
    loop {
        match dialled.recv_timeout(POLL) {
            Ok(result) => return Some(result),
            Err(RecvTimeoutError::Timeout) if is_wanted() => {}
            Err(_) => return None,
        }
    }
}

/// A link to `node` for `purpose`.
///
/// # Errors
/// If none of the addresses leads to that node, or it refuses.
pub fn reach(
    identity: &Identity,
    node: NodeId,
    addresses: &[String],
    purpose: Purpose,
    secret: Option<&TicketSecret>,
) -> Result<Arc<TcpLink>, ReachError> {
    // A peer's addresses may hold one that this build cannot read; the others still count.
    let addresses: Vec<Address> = addresses.iter().filter_map(|text| text.parse().ok()).collect();
    let link = TcpLink::connect(identity, node, &addresses, CONNECT_TIMEOUT)?;
    greet(&*link, &Hello::new(purpose, secret.cloned()))?;
    Ok(link)
}

/// A data link to a stage of `peer`: `attach` says to which one, and what it carries.
///
/// # Errors
/// If that node is not reached, or refuses.
pub fn attach(identity: &Identity, peer: &Peer, attach: Attach) -> Result<Arc<dyn Link>, ReachError> {
    let link = reach(identity, peer.node, &peer.addresses, Purpose::Data, None)?;
    link.send(kind::ATTACH, &[&attach.encode()])?;
    Ok(link)
}
