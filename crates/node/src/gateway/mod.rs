//! Any node answers HTTP: the front that is the same on all of them.
//!
//! ```text
//! api -> Gateway::submit -> session task --+-- Here:  this node's own coordinator
//!                               ^          +-- There: Remote -- link -- serve_requests -- coordinator
//!                               |
//!                     Standing (standing.rs): who answers, as follow() and lead() say
//! ```
//!
//! - A [`Gateway`] is what `api` talks to. The node tells it who coordinates: [`Gateway::follow`] another node,
//!   [`Gateway::lead`] with its own.
//! - Each request is a *session task* (`session.rs`) in the caller's runtime. It owns the request and its tokens, and
//!   submits it again where its coordinator is lost.
//! - The *gateway thread* (`dialer.rs`) dials the coordinator, learns what is served, and then reads the link
//!   (`remote.rs`).
//! - The coordinator serves each gateway's link with [`serve_requests`] (`server.rs`).
//!
//! Every change of who coordinates begins a new *turn*; a session that was asked in an old one asks anew.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use brigade_base::{NodeId, TenantId, Token};
use brigade_gguf::ModelFile;
use brigade_net::{Identity, Link, Purpose};
use brigade_protocol::requests::{MAX_ID_BYTES, Question};
use tokio::sync::mpsc;
use tokio::time::Instant;

use self::dialer::{Dial, Dialer};
use self::session::Session;
use self::standing::{Lead, Shared};
use crate::handle::blank_status;
use crate::model::{tokenize, tokenize_pair};
use crate::serving::{
    ClusterStatus, Event, Examination, ModelCard, Readiness, Request, RequestTrace, Serving, SubmitError, TicketInfo,
};
use crate::threads::{lock, spawn};

mod dialer;
mod remote;
mod server;
mod session;
mod standing;
mod wire;

pub(crate) use remote::ask_to_examine;
pub use server::{Coordinating, serve_requests};

/// Most requests of one gateway that are open: those that a coordinator lets wait and run together, twice, since each
/// tenant has a few of its own.
const MAX_OPEN: usize = 1024;

/// What a gateway is given.
pub struct GatewayOptions {
    /// The node's key.
    pub identity: Arc<Identity>,
    /// Where the model's vocabulary is kept.
    pub state_dir: PathBuf,
    /// The node's own copy of the model, which spares it to fetch the vocabulary.
    pub own_copy: Option<Arc<ModelFile>>,
    /// How long requests wait for a coordinator.
    pub wait_for_capacity: Duration,
}

/// Answers requests through whoever coordinates.
pub struct Gateway {
    shared: Arc<Shared>,
}

impl Gateway {
    /// Starts a gateway that knows no coordinator yet.
    ///
    /// # Errors
    /// If the system gives no thread.
    pub fn start(options: GatewayOptions) -> std::io::Result<Self> {
        let identity = options.identity;
        let dial: Dial = Arc::new(move |node, addresses| {
            let link = crate::reach::reach(&identity, node, addresses, Purpose::Requests, None);
            link.map(|link| link as Arc<dyn Link>).map_err(|error| error.to_string())
        });
        Self::start_with(dial, options.state_dir, options.own_copy, options.wait_for_capacity)
    }

    fn start_with(
        dial: Dial,
        state_dir: PathBuf,
        own_copy: Option<Arc<ModelFile>>,
        wait: Duration,
    ) -> std::io::Result<Self> {
        let shared = Arc::new(Shared::new(wait));
        let dialer = Dialer { shared: Arc::clone(&shared), dial, state_dir, own_copy };
        spawn("gateway", move || dialer.run())?;
        Ok(Self { shared })
    }

    /// Passes requests to this node from now on, or to nobody until more is known. Open ones are submitted to it again.
    /// Naming the same node once more has it dialled at once, if it is not reached.
    pub fn follow(&self, coordinator: Option<(NodeId, Vec<String>)>) {
        self.shared.follow(coordinator, None);
    }

    /// [`follow`](Self::follow) a node that coordinates in this term. The same node in another term is another
    /// coordinator: a link to what it was before ends, and open requests are submitted again.
    pub fn follow_term(&self, term: u64, node: NodeId, addresses: Vec<String>) {
        self.shared.follow(Some((node, addresses)), Some(term));
    }

    /// This node coordinates from now on. Open requests are submitted to it again.
    pub fn lead(&self, coordinator: Arc<dyn Coordinating>) {
        self.shared.lead_with(coordinator);
    }

    /// Ends all open requests, and takes no more.
    pub fn stop(&self) {
        self.shared.stop();
    }

    /// Waits until it is known what is served, for at most so long. Before that nothing can be answered, and
    /// [`Serving::model`] has no name.
    pub fn wait_for_model(&self, timeout: Duration) -> bool {
        self.shared.wait_for_card(timeout)
    }
}

impl Drop for Gateway {
    fn drop(&mut self) {
        self.stop();
    }
}

/// What operators are told who ask this node for tickets. A member cannot admit others: that is for the coordinator.
const ASK_COORDINATOR: &str = "tickets are made and revoked by the coordinator; run `brigade ticket` there";

/// Why a text cannot be tokenized here.
fn no_vocabulary(lead: &Lead) -> SubmitError {
    SubmitError::NotReady(match lead {
        Lead::Nobody { why } => why.clone(),
        _ => "the model's vocabulary is not here yet".to_owned(),
    })
}

impl Serving for Gateway {
    fn model(&self) -> &ModelCard {
        self.shared.known_card()
    }

    fn readiness(&self) -> Readiness {
        let readiness = match self.shared.lead() {
            Lead::Here(coordinator) => coordinator.readiness(),
            Lead::There(remote) => remote.readiness(),
            Lead::Nobody { why } => Readiness::NotReady(why),
            Lead::Stopping => return Readiness::NotReady(SubmitError::Stopping.to_string()),
        };
        match readiness {
            Readiness::NotReady(why) if self.shared.succeeds() => Readiness::Recovering(why),
            other => other,
        }
    }

    fn tokenize(&self, text: &str, add_special: bool, parse_special: bool) -> Result<Vec<Token>, SubmitError> {
        match (self.shared.lead(), self.shared.vocabulary()) {
            (Lead::Here(coordinator), _) => coordinator.tokenize(text, add_special, parse_special),
            (_, Some(vocabulary)) => tokenize(vocabulary, self.model(), text, add_special, parse_special),
            (lead, None) => Err(no_vocabulary(&lead)),
        }
    }

    fn tokenize_pair(&self, query: &str, document: &str) -> Result<Vec<Token>, SubmitError> {
        match (self.shared.lead(), self.shared.vocabulary()) {
            (Lead::Here(coordinator), _) => coordinator.tokenize_pair(query, document),
            (_, Some(vocabulary)) => tokenize_pair(vocabulary, self.model(), query, document),
            (lead, None) => Err(no_vocabulary(&lead)),
        }
    }

    fn token_bytes(&self, token: Token) -> Vec<u8> {
        match (self.shared.lead(), self.shared.vocabulary()) {
            (Lead::Here(coordinator), _) => coordinator.token_bytes(token),
            (_, Some(vocabulary)) => vocabulary.token_bytes(token, true),
            (_, None) => Vec::new(),
        }
    }

    /// Must be called inside a tokio runtime, one of whose tasks then passes the answer on.
    fn submit(&self, request: Request) -> Result<mpsc::UnboundedReceiver<Event>, SubmitError> {
        let shared = &self.shared;
        let outside = |_| SubmitError::NotReady("this thread is not part of an asynchronous runtime".to_owned());
        let runtime = tokio::runtime::Handle::try_current().map_err(outside)?;
        let standing = shared.standing();
        let (turn, lead) = {
            let standing = standing.borrow();
            (standing.turn, standing.lead.clone())
        };
        if shared.card().is_none() {
            return Err(SubmitError::NotReady("no coordinator has been reached yet".to_owned()));
        }
        if !matches!(lead, Lead::Here(_)) {
            self.model().check(&request)?;
        }
        let room = Arc::clone(&shared.room).try_acquire_owned();
        let room = room.map_err(|_| SubmitError::Busy { waiting: MAX_OPEN })?;
        let first = match lead.submit(&request, &[]) {
            Ok(source) => Some((turn, source)),
            Err(SubmitError::NotReady(_)) if shared.succeeds() => None,
            Err(error) => return Err(error),
        };
        // Bounded by the context: a session tells at most that many tokens and a few words more.
        let (client, events) = mpsc::unbounded_channel();
        let session = Session {
            timeout: request.timeout,
            request,
            submitted: Instant::now(),
            client,
            wait: shared.wait,
            standing,
            _room: room,
            answer: Vec::new(),
            paused: false,
            rest: None,
            waits_until: None,
        };
        runtime.spawn(session.run(first));
        Ok(events)
    }

    fn metrics(&self) -> String {
        match self.shared.lead() {
            Lead::Here(coordinator) => coordinator.metrics(),
            Lead::There(remote) => remote.ask(Question::Metrics).unwrap_or_default(),
            Lead::Nobody { .. } | Lead::Stopping => String::new(),
        }
    }

    fn trace(&self, request: &str) -> Option<RequestTrace> {
        match self.shared.lead() {
            Lead::Here(coordinator) => coordinator.trace(request),
            Lead::There(remote) if request.len() as u64 <= MAX_ID_BYTES => {
                let text = remote.ask(Question::Trace(request.to_owned()))?;
                let (tenant, trace) = serde_json::from_str::<Option<(TenantId, RequestTrace)>>(&text).ok()??;
                Some(RequestTrace { tenant, ..trace })
            }
            _ => None,
        }
    }

    fn status(&self) -> ClusterStatus {
        let why = match self.shared.lead() {
            Lead::Here(coordinator) => return coordinator.status(),
            Lead::There(remote) => {
                let told = remote.ask(Question::Status).and_then(|text| serde_json::from_str(&text).ok());
                if let Some(status) = told {
                    *lock(&self.shared.status) = Some(ClusterStatus::clone(&status));
                    return status;
                }
                "the coordinator does not say how things stand".to_owned()
            }
            Lead::Nobody { why } => why,
            Lead::Stopping => SubmitError::Stopping.to_string(),
        };
        let last = lock(&self.shared.status).clone().unwrap_or_else(|| blank_status(self.shared.known_card()));
        ClusterStatus { state: format!("waiting: {why}"), ..last }
    }

    fn examine(&self) -> Result<Examination, String> {
        match self.shared.lead() {
            Lead::Here(coordinator) => coordinator.examine(),
            Lead::There(remote) => remote.examine(),
            Lead::Nobody { why } => Err(why),
            Lead::Stopping => Err(SubmitError::Stopping.to_string()),
        }
    }

    fn create_ticket(&self, ttl: Duration) -> Result<TicketInfo, String> {
        match self.shared.lead() {
            Lead::Here(coordinator) => coordinator.create_ticket(ttl),
            _ => Err(ASK_COORDINATOR.to_owned()),
        }
    }

    fn tickets(&self) -> Vec<TicketInfo> {
        match self.shared.lead() {
            Lead::Here(coordinator) => coordinator.tickets(),
            _ => Vec::new(),
        }
    }

    fn revoke_ticket(&self, id: &str) -> Result<bool, String> {
        match self.shared.lead() {
            Lead::Here(coordinator) => coordinator.revoke_ticket(id),
            _ => Err(ASK_COORDINATOR.to_owned()),
        }
    }
}

#[cfg(test)]
mod tests;
