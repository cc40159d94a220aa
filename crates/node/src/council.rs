//! This node's part in the choice of a coordinator: the state machine of `brigade-protocol` with its file and links.
//!
//! A [`CouncilHost`] lives as long as the process, through all changes of role. Whoever has something to tell calls it
//! from its own thread: the state machine is held for a moment, what it wants stored is on disk before anything leaves,
//! and messages go into the queues of one thread per peer. A ticker thread calls when time has passed. The node's role
//! is told through a channel.

use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use brigade_base::{DeploymentId, NodeId};
use brigade_net::{Identity, Link, Purpose, TcpLink, write_atomic};
use brigade_protocol::control::Peer;
use brigade_protocol::council::{
    Action, Body, Charter, Council, CouncilMessage, Incumbent, Input, MAX_COUNCIL_BYTES, Proposal, Stored,
};
use brigade_protocol::kind;

use crate::reach::reach;
use crate::threads::{lock, spawn};

/// Where a node keeps what it must not forget.
const FILE: &str = "council.bin";

/// How often it is looked whether the state machine is due.
const TICK: Duration = Duration::from_millis(50);

/// Messages that wait for a peer. Each is sent again by whoever needs an answer, so further ones are dropped.
const MAX_QUEUED: usize = 16;

/// A link on which nothing was sent for so long is closed; its thread ends.
const IDLE: Duration = Duration::from_secs(30);

/// What this node is from now on.
#[derive(Debug)]
pub enum RoleChange {
    /// It coordinates.
    Lead {
        /// In this term.
        term: u64,
        /// What was agreed.
        charter: Box<Charter>,
    },
    /// Another node coordinates.
    Follow(Incumbent),
    /// It coordinates no more; who does is told when it is known.
    StepDown,
}

/// The council of a node.
pub struct CouncilHost {
    identity: Arc<Identity>,
    inner: Mutex<Inner>,
    /// As it was when that could be asked last.
    has_quorum: AtomicBool,
    stopping: AtomicBool,
}

struct Inner {
    council: Council,
    path: PathBuf,
    roles: Sender<RoleChange>,
    /// The way to each peer.
    peers: HashMap<NodeId, SyncSender<CouncilMessage>>,
    /// The node that admitted this one, before there is a charter.
    introduced: Option<NodeId>,
    /// What waits until the disk takes what comes first among it.
    held: Vec<Action>,
    said_failed: bool,
}

impl CouncilHost {
    /// What `state_dir` holds of earlier runs.
    ///
    /// # Errors
    /// If the file is there but cannot be read.
    pub fn stored(state_dir: &Path) -> io::Result<Stored> {
        let path = state_dir.join(FILE);
        let bytes = match std::fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Stored::default()),
            Err(error) => return Err(error),
        };
        Stored::decode(&bytes).map_err(|error| {
            let text = format!("{} is broken ({error}); remove it, and join again", path.display());
            io::Error::new(io::ErrorKind::InvalidData, text)
        })
    }

    /// Begins to take part, with what was stored. Roles are told through `roles`.
    ///
    /// # Errors
    /// If the system gives no thread.
    pub fn start(
        identity: Arc<Identity>,
        state_dir: &Path,
        stored: Stored,
        roles: Sender<RoleChange>,
    ) -> io::Result<Arc<Self>> {
        let council = Council::new(identity.node_id(), stored, Instant::now());
        let (path, peers) = (state_dir.join(FILE), HashMap::new());
        let inner =
            Mutex::new(Inner { council, path, roles, peers, introduced: None, held: Vec::new(), said_failed: false });
        let host =
            Arc::new(Self { identity, inner, has_quorum: AtomicBool::new(true), stopping: AtomicBool::new(false) });
        let ticker = Arc::clone(&host);
        spawn("council", move || {
            while !ticker.stopping.load(Ordering::Relaxed) {
                let now = Instant::now();
                let inner = lock(&ticker.inner);
                let is_due = !inner.held.is_empty() || inner.council.next_tick().is_some_and(|due| due <= now);
                drop(inner);
                if is_due {
                    ticker.handle(Input::Tick);
                }
                std::thread::sleep(TICK);
            }
        })?;
        Ok(host)
    }

    /// Takes part no more.
    pub fn stop(&self) {
        self.stopping.store(true, Ordering::Relaxed);
        lock(&self.inner).peers.clear();
    }

    /// A node was heard.
    pub fn heard(&self, node: NodeId) {
        // Somebody may be storing; the next sign of life comes soon, and whoever tells of this one has to answer it.
        if let Ok(mut inner) = self.inner.try_lock() {
            inner.council.heard(Instant::now(), node);
        }
    }

    /// The link to a node closed.
    pub fn lost(&self, node: NodeId) {
        lock(&self.inner).council.lost(Instant::now(), node);
    }

    /// Other voters are wanted.
    pub fn propose(self: &Arc<Self>, proposal: Proposal) {
        self.handle(Input::Propose(proposal));
    }

    /// Whether this node coordinates and a majority is in reach.
    pub fn has_quorum(&self) -> bool {
        if let Ok(inner) = self.inner.try_lock() {
            self.has_quorum.store(inner.council.has_quorum(Instant::now()), Ordering::Relaxed);
        }
        self.has_quorum.load(Ordering::Relaxed)
    }

    /// This node takes part in a deployment of `coordinator`. What it agreed to in another one counts no more.
    pub fn belong(&self, deployment: DeploymentId, coordinator: NodeId) {
        let inner = &mut *lock(&self.inner);
        inner.introduced = Some(coordinator);
        if inner.council.charter().is_some_and(|charter| charter.deployment != deployment) {
            let stored = inner.council.stored().clone().forget();
            // Stored by the next tick, before anything is said.
            inner.held = vec![Action::Store(stored.clone())];
            inner.council = Council::new(self.identity.node_id(), stored, Instant::now());
        }
    }

    /// Whether a node may talk to this one's council.
    pub fn admits(&self, node: NodeId) -> bool {
        let inner = lock(&self.inner);
        inner.introduced == Some(node) || inner.council.charter().is_some_and(|charter| charter.voter(node).is_some())
    }

    /// Tells who takes this node for the coordinator who it is instead, and ends the link.
    pub fn refuse(&self, link: &dyn Link) {
        let refusal = lock(&self.inner).council.refusal();
        if let Some(message) = refusal {
            let _ = link.send(kind::COUNCIL, &[&message.encode()]);
        }
        link.close();
    }

    /// Takes a message that came on another link than the council's own.
    pub fn receive(self: &Arc<Self>, peer: NodeId, bytes: &[u8]) {
        match CouncilMessage::decode(bytes) {
            Ok(CouncilMessage { deployment, body: Body::Refused { incumbent: Some(incumbent), .. } })
                if lock(&self.inner).council.charter().is_some_and(|charter| charter.deployment != deployment) =>
            {
                // The node that it took for its coordinator belongs to another deployment by now. Whoever coordinates
                // that one may accept this node too; then it belongs there.
                let _ = lock(&self.inner).roles.send(RoleChange::Follow(incumbent));
            }
            Ok(message) => self.handle(Input::Message(peer, message)),
            Err(error) => tracing::warn!(peer = %peer.short(), %error, "a council message cannot be read"),
        }
    }

    /// Whether another node coordinates, as far as this one knows.
    pub fn follows(&self) -> bool {
        let inner = lock(&self.inner);
        !inner.council.is_coordinator() && inner.council.incumbent().is_some()
    }

    /// Reads a peer's messages until its link ends. Answers go the same way where the peer has no address.
    pub fn converse(self: &Arc<Self>, link: &Arc<TcpLink>) {
        link.set_frame_limit(MAX_COUNCIL_BYTES);
        let peer = link.peer();
        let (queue, messages) = sync_channel(MAX_QUEUED);
        let writer = Arc::clone(link);
        if spawn("council link", move || write(&*writer, &messages)).is_err() {
            return link.close();
        }
        // The newest link is the one that works; the older one's writer ends for want of a queue.
        lock(&self.inner).peers.insert(peer, queue);
        self.read(&**link);
    }

    fn read(self: &Arc<Self>, link: &dyn Link) {
        let (peer, mut buf) = (link.peer(), Vec::new());
        while let Ok(kind::COUNCIL) = link.recv(&mut buf, None) {
            match CouncilMessage::decode(&buf) {
                Ok(message) => self.handle(Input::Message(peer, message)),
                Err(error) => {
                    tracing::warn!(peer = %peer.short(), %error, "a council message cannot be read");
                    break;
                }
            }
        }
        link.close();
    }

    fn handle(self: &Arc<Self>, input: Input) {
        let inner = &mut *lock(&self.inner);
        let mut actions = std::mem::take(&mut inner.held);
        actions.extend(inner.council.handle(Instant::now(), input));
        let mut actions = actions.into_iter();
        while let Some(action) = actions.next() {
            match action {
                Action::Store(stored) => {
                    if !inner.store(&stored) {
                        // What is not stored is not said, nor acted upon; messages may be lost anyway.
                        let rest = actions.filter(|action| !matches!(action, Action::Send { .. }));
                        inner.held = std::iter::once(Action::Store(stored)).chain(rest).collect();
                        return;
                    }
                }
                Action::Send { to, message } => self.send(inner, to, message),
                Action::Lead { term, charter } => {
                    tracing::info!(term, "this node coordinates");
                    let _ = inner.roles.send(RoleChange::Lead { term, charter: Box::new(charter) });
                }
                Action::Follow(incumbent) => {
                    let (term, node) = (incumbent.term, incumbent.peer.node.short());
                    tracing::info!(term, node, "another node coordinates");
                    let _ = inner.roles.send(RoleChange::Follow(incumbent));
                }
                Action::StepDown { reason } => {
                    tracing::warn!(reason, "this node coordinates no more");
                    let _ = inner.roles.send(RoleChange::StepDown);
                }
            }
        }
    }

    /// Queues a message for a peer, and dials it if there is no link.
    fn send(self: &Arc<Self>, inner: &mut Inner, to: Peer, message: CouncilMessage) {
        let message = match inner.peers.get(&to.node) {
            Some(queue) => match queue.try_send(message) {
                Ok(()) | Err(TrySendError::Full(_)) => return,
                Err(TrySendError::Disconnected(message)) => message,
            },
            None => message,
        };
        if to.addresses.is_empty() || self.stopping.load(Ordering::Relaxed) {
            return;
        }
        let (queue, messages) = sync_channel(MAX_QUEUED);
        let _ = queue.try_send(message);
        let node = to.node;
        let host = Arc::clone(self);
        let work = move || match reach(&host.identity, to.node, &to.addresses, Purpose::Council, None) {
            Ok(link) => {
                link.set_frame_limit(MAX_COUNCIL_BYTES);
                let reader = (Arc::clone(&host), Arc::clone(&link));
                if spawn("council link", move || reader.0.read(&*reader.1)).is_ok() {
                    write(&*link, &messages);
                }
            }
            Err(error) => tracing::debug!(peer = %to.node.short(), %error, "a voter is not reached"),
        };
        if spawn("council link", work).is_ok() {
            inner.peers.insert(node, queue);
        }
    }
}

impl Inner {
    /// Makes what the node has agreed to durable. False if the disk refuses; it is tried again then.
    fn store(&mut self, stored: &Stored) -> bool {
        let result = write_atomic(&self.path, &stored.encode(), 0o600);
        if let (Err(error), false) = (&result, self.said_failed) {
            let path = self.path.display();
            tracing::error!(%path, %error, "what this node agrees to cannot be stored; it has no vote until it can");
        }
        self.said_failed = result.is_err();
        result.is_ok()
    }
}

/// Sends what is queued until the link ends, the queue does, or nothing came for long.
fn write(link: &dyn Link, messages: &Receiver<CouncilMessage>) {
    loop {
        match messages.recv_timeout(IDLE) {
            Ok(message) if link.send(kind::COUNCIL, &[&message.encode()]).is_ok() => {}
            Ok(_) | Err(RecvTimeoutError::Disconnected | RecvTimeoutError::Timeout) => return link.close(),
        }
    }
}
