//! Who answers requests, and what the parts of a gateway share.
//!
//! [`Orders`] are what the node says: whom to follow. [`Standing`] is what came of it: who answers. A change of orders
//! begins a *turn*, and what a link of an earlier turn comes to say is not heard any more.

use std::sync::{Arc, Condvar, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use brigade_base::{Hash, ModelId, NodeId, Token};
use brigade_engine::Vocabulary;
use brigade_net::Link;
use tokio::sync::{Semaphore, watch};
use tokio::time::Instant;

use super::MAX_OPEN;
use super::remote::{Remote, Source};
use super::server::Coordinating;
use super::session::NEVER;
use crate::serving::{ClusterStatus, ModelCard, Purpose, Readiness, Request, SubmitError};
use crate::threads::lock;

/// What callers, sessions and the gateway thread share.
pub(super) struct Shared {
    orders: Mutex<Orders>,
    /// The orders changed, or a model is known.
    changed: Condvar,
    /// Written under the lock of the orders alone.
    standing: watch::Sender<Standing>,
    card: OnceLock<ModelCard>,
    /// What is told while no model is known.
    no_card: ModelCard,
    /// With its hash. Of the model that is known, and of no other.
    vocabulary: OnceLock<(Hash, Vocabulary)>,
    /// What the coordinator told last.
    pub(super) status: Mutex<Option<ClusterStatus>>,
    /// For open requests.
    pub(super) room: Arc<Semaphore>,
    /// How long a request waits for a coordinator.
    pub(super) wait: Duration,
}

/// Who coordinates, as the node says.
struct Orders {
    /// Rises with each other coordinator.
    turn: u64,
    follow: Option<(NodeId, Vec<String>)>,
    /// In which it was elected, as far as was said.
    term: Option<u64>,
    /// Rises when the node hears of the same coordinator again.
    nudges: u64,
    /// The link to the coordinator, so that it can be ended.
    link: Option<Arc<dyn Link>>,
    is_stopping: bool,
}

/// Who answers, as it is.
pub(super) struct Standing {
    /// Rises with each change.
    pub(super) turn: u64,
    pub(super) lead: Lead,
    /// When the last coordinator was lost; `None` if this node has known none before.
    lost: Option<Instant>,
}

/// Who answers requests.
#[derive(Clone)]
pub(super) enum Lead {
    /// Nobody at the moment.
    Nobody { why: String },
    /// This node.
    Here(Arc<dyn Coordinating>),
    /// Another node.
    There(Arc<Remote>),
    /// Nobody any more.
    Stopping,
}

/// A node to dial.
pub(super) struct Target {
    pub(super) turn: u64,
    pub(super) node: NodeId,
    pub(super) addresses: Vec<String>,
    nudges: u64,
}

impl Lead {
    pub(super) fn nobody(why: impl Into<String>) -> Self {
        Self::Nobody { why: why.into() }
    }

    /// Asks for an answer, or for the rest of one.
    ///
    /// # Errors
    /// If nobody takes the request now. What another node refuses comes as an event.
    pub(super) fn submit(&self, request: &Request, answer: &[Token]) -> Result<Source, SubmitError> {
        match self {
            Self::Nobody { why } => Err(SubmitError::NotReady(why.clone())),
            Self::Here(coordinator) => match coordinator.readiness() {
                Readiness::NotReady(why) => Err(SubmitError::NotReady(why)),
                _ => coordinator.submit_resumed(request.clone(), answer.to_vec()).map(Source::from),
            },
            Self::There(remote) => remote.submit(request, answer),
            Self::Stopping => Err(SubmitError::Stopping),
        }
    }
}

/// What the node says.
impl Shared {
    pub(super) fn new(wait: Duration) -> Self {
        let lead = Lead::nobody("no coordinator is known yet");
        Self {
            orders: Mutex::new(Orders { turn: 0, follow: None, term: None, nudges: 0, link: None, is_stopping: false }),
            changed: Condvar::new(),
            standing: watch::Sender::new(Standing { turn: 0, lead, lost: None }),
            card: OnceLock::new(),
            no_card: no_card(),
            vocabulary: OnceLock::new(),
            status: Mutex::new(None),
            room: Arc::new(Semaphore::new(MAX_OPEN)),
            wait: wait.min(NEVER),
        }
    }

    /// Without a `term` the same node is taken to coordinate in the same one.
    pub(super) fn follow(&self, coordinator: Option<(NodeId, Vec<String>)>, term: Option<u64>) {
        let mut orders = lock(&self.orders);
        let is_same_term = term.is_none_or(|term| orders.term == Some(term));
        if let (Some((node, addresses)), Some((same, known))) = (&coordinator, &mut orders.follow)
            && node == same
            && is_same_term
        {
            known.clone_from(addresses);
            orders.nudges += 1;
            return self.changed.notify_all();
        }
        orders.term = term;
        let why = match &coordinator {
            Some((node, _)) => format!("the coordinator {} is not reached yet", node.short()),
            None => "no coordinator is known at the moment".to_owned(),
        };
        self.begin_turn(&mut orders, coordinator, Lead::nobody(why));
    }

    pub(super) fn lead_with(&self, coordinator: Arc<dyn Coordinating>) {
        let mut orders = lock(&self.orders);
        let lead = match self.meet(coordinator.model().clone()) {
            Ok(()) => Lead::Here(coordinator),
            Err(why) => Lead::nobody(why),
        };
        self.begin_turn(&mut orders, None, lead);
    }

    pub(super) fn stop(&self) {
        self.begin_turn(&mut lock(&self.orders), None, Lead::Stopping);
    }

    /// Another coordinator, or none. Nothing comes after the end.
    fn begin_turn(&self, orders: &mut Orders, follow: Option<(NodeId, Vec<String>)>, lead: Lead) {
        if orders.is_stopping {
            return;
        }
        orders.is_stopping = matches!(lead, Lead::Stopping);
        orders.turn += 1;
        orders.follow = follow;
        self.stand(lead);
        // Last, so that a session that loses its link finds what is new.
        if let Some(link) = orders.link.take() {
            link.close();
        }
        self.changed.notify_all();
    }

    fn stand(&self, lead: Lead) {
        self.standing.send_modify(|standing| {
            // Bad news after bad news is no other time of the loss.
            if matches!(standing.lead, Lead::Here(_) | Lead::There(_)) {
                standing.lost = Some(Instant::now());
            }
            standing.turn += 1;
            standing.lead = lead;
        });
    }
}

/// What the gateway thread does.
impl Shared {
    /// The node to dial in the present turn, once there is one; `None` when the gateway stops.
    pub(super) fn wait_for_target(&self) -> Option<Target> {
        let mut orders = lock(&self.orders);
        loop {
            match &orders.follow {
                _ if orders.is_stopping => return None,
                Some((node, addresses)) => {
                    let Orders { turn, nudges, .. } = *orders;
                    return Some(Target { turn, node: *node, addresses: addresses.clone(), nudges });
                }
                None => orders = self.changed.wait(orders).unwrap_or_else(PoisonError::into_inner),
            }
        }
    }

    /// Waits before the next attempt, unless there is news of the coordinator.
    pub(super) fn rest(&self, target: &Target, pause: Duration) {
        let is_same = |orders: &mut Orders| (orders.turn, orders.nudges) == (target.turn, target.nudges);
        drop(self.changed.wait_timeout_while(lock(&self.orders), pause, is_same));
    }

    /// Whether a turn lasts still.
    pub(super) fn is_turn(&self, turn: u64) -> bool {
        lock(&self.orders).turn == turn
    }

    /// Keeps the link of a turn, so that it ends with it. False if the turn is over.
    pub(super) fn hold(&self, turn: u64, link: &Arc<dyn Link>) -> bool {
        let mut orders = lock(&self.orders);
        if orders.turn == turn {
            orders.link = Some(Arc::clone(link));
        }
        orders.turn == turn
    }

    /// Says who answers, if the turn lasts still.
    pub(super) fn publish(&self, turn: u64, lead: Lead) {
        let orders = lock(&self.orders);
        if orders.turn == turn {
            self.stand(lead);
            self.changed.notify_all();
        }
    }

    /// Whether a coordinator serves what was served before.
    ///
    /// # Errors
    /// If its model or its vocabulary is another one.
    pub(super) fn check(&self, card: &ModelCard, vocabulary: &Hash) -> Result<(), String> {
        if let Some(known) = self.card.get() {
            is_same(known, card)?;
        }
        match self.vocabulary.get() {
            Some((known, _)) if known != vocabulary => Err(format!(
                "the coordinator makes tokens of text by another vocabulary of {} than this node; run the same version \
                 of brigade with the same model file on both, and restart this node",
                card.name
            )),
            _ => Ok(()),
        }
    }

    /// Learns what another node serves, with the vocabulary if it is news.
    ///
    /// # Errors
    /// As [`check`](Self::check).
    pub(super) fn learn(&self, card: ModelCard, hash: Hash, vocabulary: Option<Vocabulary>) -> Result<(), String> {
        // So that nobody who waits for the model finds it without its vocabulary.
        let _orders = lock(&self.orders);
        self.check(&card, &hash)?;
        self.meet(card)?;
        if let Some(vocabulary) = vocabulary {
            // The gateway thread alone sets it.
            let _ = self.vocabulary.set((hash, vocabulary));
        }
        Ok(())
    }

    /// Learns what is served. The first model stays: callers were told of it.
    ///
    /// # Errors
    /// If it is another one than before.
    fn meet(&self, card: ModelCard) -> Result<(), String> {
        is_same(self.card.get_or_init(|| card.clone()), &card)
    }
}

/// What callers and sessions ask.
impl Shared {
    pub(super) fn card(&self) -> Option<&ModelCard> {
        self.card.get()
    }

    pub(super) fn vocabulary(&self) -> Option<&Vocabulary> {
        self.vocabulary.get().map(|(_, vocabulary)| vocabulary)
    }

    /// What is served; nameless while that is not known.
    pub(super) fn known_card(&self) -> &ModelCard {
        self.card.get().unwrap_or(&self.no_card)
    }

    pub(super) fn wait_for_card(&self, timeout: Duration) -> bool {
        let is_unknown = |_: &mut Orders| self.card.get().is_none();
        let _orders = self.changed.wait_timeout_while(lock(&self.orders), timeout, is_unknown);
        self.card.get().is_some()
    }

    pub(super) fn standing(&self) -> watch::Receiver<Standing> {
        self.standing.subscribe()
    }

    /// Whether a coordinator that is not ready may be so soon: the one before was lost only just now.
    pub(super) fn succeeds(&self) -> bool {
        self.standing.borrow().lost.is_some_and(|lost| lost.elapsed() < self.wait)
    }

    pub(super) fn lead(&self) -> Lead {
        self.standing.borrow().lead.clone()
    }
}

fn is_same(known: &ModelCard, card: &ModelCard) -> Result<(), String> {
    if known.id == card.id {
        return Ok(());
    }
    Err(format!(
        "the coordinator serves {} now, and this node told its callers of {}; restart it to serve the other one",
        card.name, known.name
    ))
}

pub(super) fn no_card() -> ModelCard {
    ModelCard {
        name: String::new(),
        id: ModelId::from_bytes([0; 32]),
        created: 0,
        context: 0,
        n_vocab: 0,
        chat_template: None,
        bos_text: String::new(),
        eos_text: String::new(),
        purpose: Purpose::Generate,
        rank_template: None,
        n_values: 0,
        has_class_shares: false,
    }
}
