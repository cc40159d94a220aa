//! What callers hold of a coordinator.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use brigade_base::{Hash, KvTypes, NodeId, Token};
use brigade_net::{Identity, TicketBook, TicketState};
use tokio::sync::mpsc;

use crate::coordinator::{CoordinatorOptions, MAX_WAITING};
use crate::doctor::Rounds;
use crate::meter::Meter;
use crate::model::{LocalModel, tokenize, tokenize_pair};
use crate::purpose::Work;
use crate::ring::{Open, Submission, Submissions};
use crate::serving::{
    ClusterStatus, Event, Examination, HopParts, ModelCard, Optimize, Readiness, Request, RequestTrace, Serving,
    SubmitError, TicketInfo,
};
use crate::threads::{lock, seconds_since_1970};

/// What the owner loop, the ring, the door and the callers share.
pub(crate) struct Shared {
    pub(crate) status: Mutex<ClusterStatus>,
    pub(crate) tickets: Mutex<TicketBook>,
    pub(crate) submissions: Submissions,
    pub(crate) link_addresses: Vec<String>,
    readiness: Mutex<State>,
    /// How long requests are taken while the model has no place.
    wait_for_capacity: Duration,
    pub(crate) open: Arc<Open>,
    node: NodeId,
    pub(crate) card: ModelCard,
    parallel: u32,
}

impl Shared {
    pub(crate) fn new(
        model: &LocalModel,
        identity: &Identity,
        options: &CoordinatorOptions,
        (context, work): (u32, Work),
        tickets: TicketBook,
        link_addresses: &[SocketAddr],
        submissions: Submissions,
    ) -> Self {
        let vocabulary = model.vocabulary();
        let text = |token: Option<Token>| token.and_then(|t| vocabulary.text_of(t)).unwrap_or_default();
        let card = ModelCard {
            name: options.model_name.clone().unwrap_or_else(|| model.name().to_owned()),
            id: model.id(),
            created: seconds_since_1970(),
            context,
            n_vocab: model.architecture().n_vocab,
            chat_template: model.file().catalog().metadata().str("tokenizer.chat_template").map(str::to_owned),
            bos_text: text(vocabulary.bos()),
            eos_text: text(vocabulary.eos()),
            purpose: work.purpose(),
            rank_template: model.file().catalog().metadata().str("tokenizer.chat_template.rerank").map(str::to_owned),
            n_values: model.n_values(work.pooling),
            has_class_shares: model.has_class_shares(),
        };
        let starting = "the model is about to be placed".to_owned();
        let status = ClusterStatus {
            coordinator: identity.node_id(),
            n_layers: model.architecture().n_layers,
            state: starting.clone(),
            parallel: options.parallel,
            kv_capacity: u64::from(context) * u64::from(options.parallel),
            kv: options.kv,
            adapters: model.adapters().map(|adapters| adapters.names().to_vec()).unwrap_or_default(),
            ..blank_status(&card)
        };
        Self {
            status: Mutex::new(status),
            tickets: Mutex::new(tickets),
            submissions,
            link_addresses: link_addresses.iter().map(ToString::to_string).collect(),
            readiness: Mutex::new(State::NotYet(starting)),
            wait_for_capacity: options.wait_for_capacity,
            open: Arc::default(),
            node: identity.node_id(),
            card,
            parallel: options.parallel,
        }
    }

    /// A first pass went around.
    pub(crate) fn ready(&self) {
        *lock(&self.readiness) = State::Ready;
    }

    /// The model has no place at the moment.
    pub(crate) fn not_ready(&self, why: String) {
        let mut state = lock(&self.readiness);
        *state = match *state {
            State::NotYet(_) => State::NotYet(why),
            State::Ready => State::Lost { since: Instant::now(), why },
            State::Lost { since, .. } => State::Lost { since, why },
            State::Stopping => State::Stopping,
        };
    }

    /// Nothing is answered any more.
    pub(crate) fn stopping(&self) {
        *lock(&self.readiness) = State::Stopping;
    }
}

/// Whether the model has a place.
#[derive(Debug)]
enum State {
    NotYet(String),
    Ready,
    /// It had one.
    Lost {
        since: Instant,
        why: String,
    },
    Stopping,
}

/// A coordinator as its callers see it.
pub struct Handle {
    shared: Arc<Shared>,
    model: Arc<LocalModel>,
    meter: Arc<Meter>,
    rounds: Rounds,
}

impl Handle {
    pub(crate) fn new(shared: Arc<Shared>, model: Arc<LocalModel>, meter: Arc<Meter>, rounds: Rounds) -> Self {
        Self { shared, model, meter, rounds }
    }

    /// Makes a ticket and keeps what admits its bearer.
    ///
    /// # Errors
    /// If it cannot be stored.
    pub fn ticket(&self, ttl: Duration) -> Result<brigade_net::Ticket, String> {
        let shared = &self.shared;
        let addresses = shared.link_addresses.iter().filter_map(|text| text.parse().ok()).collect();
        lock(&shared.tickets)
            .create(shared.node, addresses, ttl, seconds_since_1970())
            .map_err(|error| error.to_string())
    }

    /// Starts a session of which the first tokens of the answer were chosen and told elsewhere; it tells those behind
    /// them.
    ///
    /// # Errors
    /// If the request can never be answered, or not now.
    pub fn submit_resumed(
        &self,
        request: Request,
        answer: Vec<Token>,
    ) -> Result<mpsc::UnboundedReceiver<Event>, SubmitError> {
        let card = &self.shared.card;
        if let Readiness::NotReady(why) = self.readiness() {
            return Err(SubmitError::NotReady(why));
        }
        card.check(&request)?;
        if request.prompt.len() + answer.len() > card.context as usize {
            let why = format!("prompt and answer have more than the {} tokens of a session", card.context);
            return Err(SubmitError::Invalid(why));
        }
        let is_known = |&token: &Token| u32::try_from(token).is_ok_and(|t| t < card.n_vocab);
        if let Some(&token) = answer.iter().find(|t| !is_known(t)) {
            return Err(SubmitError::UnknownToken { token: token.into(), n_vocab: card.n_vocab });
        }
        let most = MAX_WAITING + self.shared.parallel as usize;
        let open = self.shared.open.take(request.tenant, most);
        let open = open.ok_or(SubmitError::Busy { waiting: MAX_WAITING })?;
        // Bounded by the context: a session tells at most that many tokens and one end.
        let (events, receiver) = mpsc::unbounded_channel();
        if self.shared.submissions.send(Submission { request, answer, at: Instant::now(), events, open }) {
            Ok(receiver)
        } else {
            Err(SubmitError::Stopping)
        }
    }
}

impl Serving for Handle {
    fn model(&self) -> &ModelCard {
        &self.shared.card
    }

    fn readiness(&self) -> Readiness {
        match &*lock(&self.shared.readiness) {
            State::NotYet(why) => Readiness::NotReady(why.clone()),
            State::Ready => Readiness::Ready,
            State::Lost { since, why } if since.elapsed() < self.shared.wait_for_capacity => {
                Readiness::Recovering(why.clone())
            }
            State::Lost { why, .. } => Readiness::NotReady(why.clone()),
            State::Stopping => Readiness::NotReady(SubmitError::Stopping.to_string()),
        }
    }

    fn tokenize(&self, text: &str, add_special: bool, parse_special: bool) -> Result<Vec<Token>, SubmitError> {
        tokenize(self.model.vocabulary(), &self.shared.card, text, add_special, parse_special)
    }

    fn tokenize_pair(&self, query: &str, document: &str) -> Result<Vec<Token>, SubmitError> {
        tokenize_pair(self.model.vocabulary(), &self.shared.card, query, document)
    }

    fn token_bytes(&self, token: Token) -> Vec<u8> {
        self.model.vocabulary().token_bytes(token, true)
    }

    fn submit(&self, request: Request) -> Result<mpsc::UnboundedReceiver<Event>, SubmitError> {
        self.submit_resumed(request, Vec::new())
    }

    fn status(&self) -> ClusterStatus {
        let mut status = lock(&self.shared.status).clone();
        let load = self.meter.load_now();
        (status.running, status.waiting) = (load.running, load.waiting);
        status.kv_tokens = load.kv_tokens;
        status.tokens_generated = self.meter.tokens();
        status.tokens_per_second = self.meter.tokens_per_second();
        status
    }

    fn metrics(&self) -> String {
        self.meter.encode()
    }

    fn trace(&self, request: &str) -> Option<RequestTrace> {
        self.meter.trace(request)
    }

    fn examine(&self) -> Result<Examination, String> {
        self.rounds.examine(&|| self.status())
    }

    fn create_ticket(&self, ttl: Duration) -> Result<TicketInfo, String> {
        let ticket = self.ticket(ttl)?;
        Ok(TicketInfo { id: ticket.id.to_string(), expires_in_s: ttl.as_secs(), ticket: Some(ticket.to_string()) })
    }

    fn tickets(&self) -> Vec<TicketInfo> {
        let now = seconds_since_1970();
        lock(&self.shared.tickets)
            .list(now)
            .into_iter()
            .filter(|entry| entry.state == TicketState::Valid)
            .map(|entry| TicketInfo {
                id: entry.id.to_string(),
                expires_in_s: entry.expires_unix_s.saturating_sub(now),
                ticket: None,
            })
            .collect()
    }

    fn revoke_ticket(&self, id: &str) -> Result<bool, String> {
        let Ok(id) = id.parse() else { return Ok(false) };
        lock(&self.shared.tickets).revoke(id).map_err(|error| error.to_string())
    }
}

/// How things stand with a model of which nobody has told more.
pub(crate) fn blank_status(card: &ModelCard) -> ClusterStatus {
    ClusterStatus {
        coordinator: NodeId::from_bytes([0; 32]),
        model: card.name.clone(),
        model_id: card.id,
        header_hash: Hash::from_bytes([0; 32]),
        n_layers: 0,
        state: String::new(),
        term: 0,
        epoch: 0,
        context: card.context,
        parallel: 0,
        running: 0,
        waiting: 0,
        tokens_generated: 0,
        tokens_per_second: 0.0,
        hop_us_p50: 0.0,
        hop_us_p99: 0.0,
        hop_us: HopParts::default(),
        kv_tokens: 0,
        kv_capacity: 0,
        kv: KvTypes::default(),
        adapters: Vec::new(),
        uptime_s: 0,
        recoveries: 0,
        last_recovery: None,
        optimize: Optimize::default(),
        prediction: None,
        explanation: Vec::new(),
        advice: Vec::new(),
        links: Vec::new(),
        nodes: Vec::new(),
    }
}
