//! What a node has whatever its part is: its key, its state directory, the address where links come in, and its seat in
//! the council.
//!
//! A node that begins to coordinate, or ceases to, changes the keeper of its [`Gate`]; address and key stay, so that
//! others find it where they know it.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};

use brigade_base::NodeId;
use brigade_net::{Hello, Identity, Listener, Members, Purpose, Refusal, TcpLink, advertised_addrs};
use brigade_protocol::council::Stored;

use crate::council::{CouncilHost, RoleChange};
use crate::doorway::{Doorkeeper, Doorway};
use crate::state_lock::StateLock;
use crate::threads::lock;

/// A node cannot take its place.
#[derive(Debug, thiserror::Error)]
pub enum SiteError {
    /// Its key cannot be used.
    #[error(transparent)]
    Identity(#[from] brigade_net::IdentityError),
    /// Its link address cannot be bound.
    #[error(transparent)]
    Bind(#[from] brigade_net::BindError),
    /// Its state directory cannot be used.
    #[error("the state directory cannot be used: {0}")]
    State(#[from] std::io::Error),
}

/// A node's place.
pub struct Site {
    pub(crate) identity: Arc<Identity>,
    pub(crate) state_dir: PathBuf,
    /// Where its links listen.
    pub(crate) link_addresses: Vec<SocketAddr>,
    pub(crate) council: Arc<CouncilHost>,
    gate: Arc<Gate>,
    _doorway: Doorway,
    _lock: StateLock,
}

impl Site {
    /// Takes the place of the node whose state is in `state_dir`, to listen at `listen`. `enter` says with what its
    /// council begins, given its key, addresses, and what was stored. Nobody is let in until a keeper is there.
    ///
    /// # Errors
    /// If key, address or directory cannot be used, or another process has them.
    pub(crate) fn take(
        state_dir: &Path,
        listen: SocketAddr,
        enter: impl FnOnce(NodeId, &[SocketAddr], Stored) -> Stored,
    ) -> Result<(Self, Receiver<RoleChange>), SiteError> {
        let identity = Arc::new(Identity::load_or_create(state_dir)?);
        let state_lock = StateLock::take(state_dir)?;
        let stored = CouncilHost::stored(state_dir)?;
        let listener = Listener::bind(&identity, &[listen])?;
        let link_addresses: Vec<SocketAddr> =
            listener.local_addrs().iter().flat_map(|a| advertised_addrs(*a)).collect();
        let stored = enter(identity.node_id(), &link_addresses, stored);
        let (roles, changes) = channel();
        let council = CouncilHost::start(Arc::clone(&identity), state_dir, stored, roles)?;
        let state_dir = state_dir.to_owned();
        let gate = Gate { keeper: Mutex::new(None), council: Arc::clone(&council), state_dir: state_dir.clone() };
        let gate = Arc::new(gate);
        let doorway = Doorway::open(listener, Arc::clone(&gate) as Arc<dyn Doorkeeper>);
        let site = Self { identity, state_dir, link_addresses, council, gate, _doorway: doorway, _lock: state_lock };
        Ok((site, changes))
    }

    /// Lets links in as this keeper says, until the guard is dropped.
    pub(crate) fn keep(&self, keeper: Arc<dyn Doorkeeper>) -> Keeping {
        *lock(&self.gate.keeper) = Some(Arc::clone(&keeper));
        Keeping { gate: Arc::clone(&self.gate), keeper }
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        self.council.stop();
    }
}

/// Who decides about links. When it is dropped all are sent away, unless somebody else decides by then.
pub(crate) struct Keeping {
    gate: Arc<Gate>,
    keeper: Arc<dyn Doorkeeper>,
}

impl Drop for Keeping {
    fn drop(&mut self) {
        lock(&self.gate.keeper).take_if(|keeper| Arc::ptr_eq(keeper, &self.keeper));
    }
}

/// The door of a node whose part may change.
struct Gate {
    keeper: Mutex<Option<Arc<dyn Doorkeeper>>>,
    council: Arc<CouncilHost>,
    /// Has the members whom this node admitted when it coordinated last.
    state_dir: PathBuf,
}

impl Gate {
    fn keeper(&self) -> Option<Arc<dyn Doorkeeper>> {
        lock(&self.keeper).clone()
    }
}

impl Doorkeeper for Gate {
    fn admit(&self, hello: &Hello, peer: NodeId) -> Result<(), Refusal> {
        let is_voter = self.council.admits(peer);
        let wants_coordinator = matches!(hello.purpose, Purpose::Control | Purpose::Requests);
        let members = || Members::open(&self.state_dir).is_ok_and(|members| members.contains(&peer));
        let is_member = || is_voter || members();
        match hello.purpose {
            Purpose::Council if is_voter => return Ok(()),
            // Told below who coordinates instead.
            _ if wants_coordinator && self.council.follows() && is_member() => return Ok(()),
            _ => {}
        }
        // Between two parts, a voter is to come again rather than to give up.
        let answer = self.keeper().ok_or(Refusal::Busy).and_then(|keeper| keeper.admit(hello, peer));
        match answer {
            Err(Refusal::NotExpected(_) | Refusal::NotAMember) if is_voter => Err(Refusal::Busy),
            answer => answer,
        }
    }

    fn enter(&self, hello: Hello, link: Arc<TcpLink>) {
        match (hello.purpose, self.keeper()) {
            (Purpose::Council, _) => self.council.converse(&link),
            (Purpose::Control | Purpose::Requests, _) if self.council.follows() => self.council.refuse(&*link),
            (_, Some(keeper)) => keeper.enter(hello, link),
            (_, None) => brigade_net::Link::close(&*link),
        }
    }
}
