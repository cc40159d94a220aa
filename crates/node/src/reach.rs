//! Dialling another node and being let in.

use std::sync::Arc;
use std::time::Duration;

use brigade_base::NodeId;
use brigade_net::{Address, ConnectError, GreetError, Hello, Identity, Purpose, Refusal, TcpLink, TicketSecret, greet};

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
}

impl ReachError {
    /// Whether trying again is useless until a person does something.
    pub fn is_final(&self) -> bool {
        match self {
            Self::Connect(_) => false,
            Self::Greet(GreetError::Refused(refusal)) => !matches!(refusal, Refusal::Busy | Refusal::Stopping),
            Self::Greet(_) => false,
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
