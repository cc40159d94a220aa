//! What a coordinator offers to whoever faces users: submit tokens, receive text, ask how things stand.
//!
//! `api` is written against [`Serving`] alone, so it can be tested with a model that is not there.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use brigade_base::{ByteSize, Hash, KvTypes, LayerRange, ModelId, NodeId, TenantId, Token};
pub use brigade_engine::Sampling;
pub use brigade_plan::{Optimize, Prediction, Speed};
pub use brigade_protocol::measure::{Finding, Severity};
pub use brigade_protocol::weights::WeightBytes;
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;

pub use crate::trace::{PassTrace, RequestTrace, StageTrace};

/// A model that answers, wherever its layers are.
pub trait Serving: Send + Sync + 'static {
    /// What is served.
    fn model(&self) -> &ModelCard;

    /// Whether a request would be answered now.
    fn readiness(&self) -> Readiness;

    /// The tokens of `text`. With `parse_special` the text of a control token becomes that token;
    /// with `add_special` the model's own start token is put before, where it has one.
    ///
    /// # Errors
    /// If the text is too long to be any prompt of this model.
    fn tokenize(&self, text: &str, add_special: bool, parse_special: bool) -> Result<Vec<Token>, SubmitError>;

    /// The tokens of a query and a document, put together as a model that ranks was trained to see them.
    ///
    /// # Errors
    /// If they have more tokens than a text may have.
    fn tokenize_pair(&self, query: &str, document: &str) -> Result<Vec<Token>, SubmitError>;

    /// The bytes that `token` stands for; not always whole characters. Empty for an unknown token.
    fn token_bytes(&self, token: Token) -> Vec<u8>;

    /// Starts a session. Dropping the receiver cancels it everywhere within one pass.
    ///
    /// # Errors
    /// If the request can never be answered, or not now.
    fn submit(&self, request: Request) -> Result<mpsc::UnboundedReceiver<Event>, SubmitError>;

    /// What was counted and timed, in Prometheus' text format.
    fn metrics(&self) -> String;

    /// What became of the request with this id, step by step; `None` if it is not among the recent ones.
    fn trace(&self, request: &str) -> Option<RequestTrace>;

    /// The cluster as it stands.
    fn status(&self) -> ClusterStatus;

    /// Has every node look at itself and at its links. Blocks for a second, some more where a node is slow or does not
    /// answer.
    ///
    /// # Errors
    /// If there is nobody to ask, in words for the operator.
    fn examine(&self) -> Result<Examination, String>;

    /// Makes a ticket that admits nodes for `ttl`; the text is what `brigade join` takes.
    ///
    /// # Errors
    /// If it could not be stored, in words for the operator.
    fn create_ticket(&self, ttl: Duration) -> Result<TicketInfo, String>;

    /// The tickets that are still valid, without their secrets.
    fn tickets(&self) -> Vec<TicketInfo>;

    /// Makes a ticket void. False if there is none of this id.
    ///
    /// # Errors
    /// If it could not be stored, in words for the operator.
    fn revoke_ticket(&self, id: &str) -> Result<bool, String>;
}

/// What is served.
#[derive(Debug, Clone)]
pub struct ModelCard {
    /// The name that requests use.
    pub name: String,
    /// Identity of the weights.
    pub id: ModelId,
    /// Seconds since 1970 when it was first served.
    pub created: u64,
    /// Most tokens of one session, prompt and answer together.
    pub context: u32,
    /// Size of the vocabulary; a token id at or above it is refused.
    pub n_vocab: u32,
    /// The model's own chat template (Jinja), if it has one.
    pub chat_template: Option<String>,
    /// Text of the start token, for templates.
    pub bos_text: String,
    /// Text of the end token, for templates.
    pub eos_text: String,
    /// What requests can ask of it.
    pub purpose: Purpose,
    /// How a model that ranks wants query and document put together, if it says so: a text with `{query}` and
    /// `{document}` in it.
    pub rank_template: Option<String>,
    /// Values of the vector of a text, scores of its classes from a model that ranks; 0 from one that generates text.
    pub n_values: u32,
    /// Whether the scores of a text's classes are probabilities as the model gives them, which are 1 together. Those of
    /// most models may be any numbers.
    pub has_class_shares: bool,
}

/// What a model does with a text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Purpose {
    /// It goes on with it, token by token.
    #[default]
    Generate,
    /// It makes one vector of it.
    Embed,
    /// It scores a document for a query.
    Rank,
}

impl Purpose {
    /// Its name, as reports have it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Generate => "generate",
            Self::Embed => "embed",
            Self::Rank => "rank",
        }
    }
}

impl ModelCard {
    /// Whether the model can answer `request` at all.
    ///
    /// # Errors
    /// If its prompt has no tokens, unknown ones or too many, or its sampling is out of range.
    pub fn check(&self, request: &Request) -> Result<(), SubmitError> {
        self.check_length(request.prompt.len())?;
        let is_known = |&token: &Token| u32::try_from(token).is_ok_and(|t| t < self.n_vocab);
        if let Some(&token) = request.prompt.iter().find(|t| !is_known(t)) {
            return Err(SubmitError::UnknownToken { token: token.into(), n_vocab: self.n_vocab });
        }
        request.sampling.validate(self.n_vocab).map_err(|error| SubmitError::Invalid(error.to_string()))
    }

    /// Whether a prompt of so many tokens can be taken.
    ///
    /// # Errors
    /// If it has none or too many.
    pub fn check_length(&self, tokens: usize) -> Result<(), SubmitError> {
        match tokens {
            0 => Err(SubmitError::PromptEmpty),
            _ if tokens > self.most_tokens() => Err(self.too_long(tokens, false)),
            _ => Ok(()),
        }
    }

    /// Most tokens of a prompt; one that is to be continued needs room for a token.
    fn most_tokens(&self) -> usize {
        (self.context as usize).saturating_sub(usize::from(self.purpose == Purpose::Generate))
    }

    /// The error for a prompt of so many tokens, or more if that is only a bound.
    pub(crate) fn too_long(&self, tokens: usize, is_bound: bool) -> SubmitError {
        match self.purpose {
            Purpose::Generate => SubmitError::PromptTooLong { tokens, is_bound, context: self.context },
            Purpose::Embed | Purpose::Rank => SubmitError::TextTooLong { tokens, is_bound, most: self.context },
        }
    }
}

/// Whether requests are answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Readiness {
    /// A token has gone around the ring of the present placement.
    Ready,
    /// A machine was lost and the model is placed anew: requests are taken, and wait. The text says what was lost.
    Recovering(String),
    /// Not yet, or no more; the text says what is missing.
    NotReady(String),
}

/// One completion to make.
#[derive(Debug, Clone)]
pub struct Request {
    /// Names it in log lines and traces; all texts of one request have the same.
    pub id: String,
    /// Whose it is.
    pub tenant: TenantId,
    /// Lower is earlier, as with vLLM; a waiting request may take the place of a running one with a higher number.
    pub priority: i32,
    /// The answer must be complete so long after it was submitted, or it fails.
    pub timeout: Option<Duration>,
    /// The prompt's tokens; at least one.
    pub prompt: Vec<Token>,
    /// Most tokens to generate; `None` lets the context be the bound. Zero is allowed: the answer is empty.
    pub max_tokens: Option<u32>,
    /// How to choose tokens.
    pub sampling: Sampling,
    /// The answer ends before the first of these; none is empty.
    pub stop: Vec<String>,
    /// `Some(n)` asks for each token's log probability and those of the `n` likeliest.
    pub logprobs: Option<u8>,
    /// Go on after the model's end token.
    pub ignore_end: bool,
    /// Which text of its request this is.
    pub place: TextPlace,
    /// How many other texts of its request are done; one for all of them.
    pub done: TextsDone,
}

/// Where a text stands among those of one request, each of which is a session. They are submitted in their order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TextPlace {
    /// From 0.
    pub idx: u32,
    /// How many there are; at least one, and more than `idx`.
    pub n_texts: u32,
}

impl TextPlace {
    /// The only one, as a completion is.
    pub const ONLY: Self = Self { idx: 0, n_texts: 1 };
}

/// How many texts of a request have their vectors. Its sessions share it, and each submission tells it, so that a
/// coordinator that was asked for the rest alone, after another was lost, knows when the request is complete.
#[derive(Debug, Clone, Default)]
pub struct TextsDone(Arc<AtomicU32>);

impl TextsDone {
    /// So many are done.
    pub fn of(n_done: u32) -> Self {
        Self(Arc::new(AtomicU32::new(n_done)))
    }

    /// One more is done.
    pub fn add(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }

    /// How many are done.
    pub fn get(&self) -> u32 {
        self.0.load(Ordering::Relaxed)
    }
}

impl Request {
    /// One text for a model that embeds or ranks.
    pub fn of_text(id: String, tenant: TenantId, text: Vec<Token>, place: TextPlace) -> Self {
        Self {
            id,
            tenant,
            priority: 0,
            timeout: None,
            prompt: text,
            max_tokens: None,
            sampling: Sampling::default(),
            stop: Vec::new(),
            logprobs: None,
            ignore_end: false,
            place,
            done: TextsDone::default(),
        }
    }
}

/// What a session tells its caller, in order; `Done` or `Failed` is the last.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// One more token of the answer. Only the model's end token, where it ends the answer, is not told.
    Token {
        /// Its place in the answer, from 0.
        position: u32,
        /// The token.
        token: Token,
        /// Text that no stop string can take back; may be empty.
        text: String,
        /// The token with its log probability, where that was asked for.
        logprob: Option<TokenLogprob>,
    },
    /// The end of the answer's text, which was held back.
    Text {
        /// Never empty.
        text: String,
    },
    /// The vector of the text, from a model that embeds or ranks: all that comes but for the end.
    Pooled {
        /// As the model gives it, not normalised; scores of its classes from one that ranks.
        values: Vec<f32>,
    },
    /// The answer waits, for a machine that was lost; it goes on where it was.
    Paused {
        /// Why, for people.
        why: String,
    },
    /// It goes on.
    Resumed,
    /// The answer is complete.
    Done {
        /// Why it ended.
        reason: FinishReason,
        /// What it took.
        usage: Usage,
    },
    /// The answer cannot be completed.
    Failed(Failure),
}

/// One token with its log probability under the model, before temperature and filters.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenLogprob {
    /// The chosen token.
    pub token: Token,
    /// The bytes it stands for.
    pub bytes: Vec<u8>,
    /// Natural logarithm of its probability.
    pub logprob: f32,
    /// The likeliest tokens, best first.
    pub top: Vec<(Token, Vec<u8>, f32)>,
}

/// Why an answer ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FinishReason {
    /// The model's end token or a stop string.
    Stop,
    /// `max_tokens` or the end of the context.
    Length,
}

/// Tokens read and written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Usage {
    /// Tokens of the prompt.
    pub prompt_tokens: u32,
    /// Of these, how many were not computed for this request, as a KV cache still held them.
    pub cached_tokens: u32,
    /// Tokens generated, the end token included.
    pub completion_tokens: u32,
}

/// Why an answer broke off.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Failure {
    /// A machine that held part of the model is gone.
    #[error("the answer was cut off because {0}; send the request again once the model is placed anew")]
    PlacementLost(String),
    /// The coordinator is stopping.
    #[error("the server is stopping")]
    Stopping,
    /// The answer was not complete in the time that its request gave.
    #[error(
        "the answer was not complete after {} s, the request's `timeout`; give it more time or ask for less",
        after.as_secs_f32()
    )]
    TimedOut {
        /// The time it had.
        after: Duration,
    },
    /// The engine refused to go on.
    #[error("the engine failed: {0}")]
    Engine(String),
    /// The coordinator, which this node had to ask first, does not take the request.
    #[error(transparent)]
    Refused(#[from] SubmitError),
}

/// Why a request was not taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SubmitError {
    /// No model is placed at the moment.
    #[error("the model is not ready: {0}")]
    NotReady(String),
    /// Too many requests wait already.
    #[error("{waiting} requests are waiting already; try again in a moment")]
    Busy {
        /// How many wait.
        waiting: usize,
    },
    /// The prompt leaves no room.
    #[error(
        "the prompt has {}{tokens} tokens, but a session holds {context} and needs room for at least one more; shorten \
         it or serve with a larger --context",
        if *is_bound { "at least " } else { "" }
    )]
    PromptTooLong {
        /// Tokens of the prompt.
        tokens: usize,
        /// It may have more than that; so long a text is not tokenized.
        is_bound: bool,
        /// Tokens of a session.
        context: u32,
    },
    /// The text is longer than what is embedded or ranked at once.
    #[error(
        "the text has {}{tokens} tokens, but at most {most} are taken; shorten it, or serve with a larger --context if \
         the model was trained for more",
        if *is_bound { "at least " } else { "" }
    )]
    TextTooLong {
        /// Tokens that it has.
        tokens: usize,
        /// It may have more than that; so long a text is not tokenized.
        is_bound: bool,
        /// Most tokens.
        most: u32,
    },
    /// The prompt has no tokens.
    #[error("the prompt is empty")]
    PromptEmpty,
    /// A token id is outside the vocabulary.
    #[error("token {token} is not in the vocabulary of {n_vocab} tokens")]
    UnknownToken {
        /// The id.
        token: i64,
        /// Size of the vocabulary.
        n_vocab: u32,
    },
    /// Something in the request is out of its range.
    #[error("{0}")]
    Invalid(String),
    /// The coordinator is stopping.
    #[error("the server is stopping")]
    Stopping,
}

/// A ticket as an operator sees it.
#[derive(Debug, Clone, Serialize)]
pub struct TicketInfo {
    /// Names the ticket; not secret.
    pub id: String,
    /// Seconds until it expires.
    pub expires_in_s: u64,
    /// The whole ticket with its secret; only when it was just made.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ticket: Option<String>,
}

/// The cluster as it stands; what `brigade status` prints.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ClusterStatus {
    /// The coordinator.
    pub coordinator: NodeId,
    /// Name of the served model.
    pub model: String,
    /// Identity of its weights.
    pub model_id: ModelId,
    /// Hash of its header.
    pub header_hash: Hash,
    /// Layers of the model.
    pub n_layers: u32,
    /// `ready`, or what is missing.
    pub state: String,
    /// Rises with each node that begins to coordinate.
    pub term: u64,
    /// Rises with each placement of that one.
    pub epoch: u64,
    /// Tokens of one session.
    pub context: u32,
    /// Sessions that fit at once.
    pub parallel: u32,
    /// Sessions that generate now.
    pub running: usize,
    /// Requests that wait for a session.
    pub waiting: usize,
    /// Tokens generated since the start.
    pub tokens_generated: u64,
    /// Decode speed over the last passes, all sessions together, in tokens per second; 0 before the first.
    pub tokens_per_second: f32,
    /// Median of what software and links cost per hop of a lone stream, in microseconds; 0 before the first token.
    pub hop_us_p50: f32,
    /// The 99th percentile of the same.
    pub hop_us_p99: f32,
    /// What the median is made of.
    pub hop_us: HopParts,
    /// Tokens that KV caches hold, for running sessions and for later ones with the same beginning.
    pub kv_tokens: u64,
    /// Tokens for which there is room.
    pub kv_capacity: u64,
    /// How keys and values are stored.
    pub kv: KvTypes,
    /// LoRA adapters that are added to the model, with their scales.
    pub adapters: Vec<String>,
    /// Seconds since the start.
    pub uptime_s: u64,
    /// How often a ring was lost and the answers went on in another one.
    pub recoveries: u64,
    /// The last time.
    pub last_recovery: Option<Recovery>,
    /// What placements are to be best at.
    pub optimize: Optimize,
    /// What the present placement will do, by what was measured; missing where a speed is not known, and of a model
    /// that generates no text.
    pub prediction: Option<Prediction>,
    /// Why it is as it is, one thought per line.
    pub explanation: Vec<String>,
    /// What would be better than the present placement, for people.
    pub advice: Vec<String>,
    /// What was measured of links.
    pub links: Vec<LinkStatus>,
    /// All nodes, those without a stage too, in ring order with the coordinator last.
    pub nodes: Vec<NodeStatus>,
}

/// What was found on all nodes; what `brigade doctor` prints.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Examination {
    /// The coordinator first.
    pub nodes: Vec<NodeFindings>,
}

/// What was found on one node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeFindings {
    /// Its key.
    pub id: NodeId,
    /// Its name for people.
    pub name: String,
    /// `coordinator` or `worker`.
    pub role: String,
    /// The worst first.
    pub findings: Vec<Finding>,
}

/// A link as one of its nodes measured it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LinkStatus {
    /// The node that measured.
    pub from_id: NodeId,
    /// The other one.
    pub to_id: NodeId,
    /// Name of the node that measured.
    pub from: String,
    /// Name of the other one.
    pub to: String,
    /// Milliseconds of a round trip on the idle link, half of it each way: software included.
    pub rtt_ms: f64,
    /// Milliseconds between the median round trip and the 95th percentile.
    pub jitter_ms: f64,
    /// Milliseconds of a round trip while the link is full.
    pub loaded_rtt_ms: f64,
    /// Bytes in a second there.
    pub there_bytes_per_s: f64,
    /// Bytes in a second back.
    pub back_bytes_per_s: f64,
}

/// A time when a ring was lost.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Recovery {
    /// What was lost.
    pub reason: String,
    /// From then until a pass went around again, in milliseconds; 0 while it lasts.
    pub pause_ms: f32,
}

/// Medians of what a hop of a lone stream costs, in microseconds.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
pub struct HopParts {
    /// Reading a frame from its link, decryption included, and decoding it.
    pub read: f32,
    /// Waiting until the computing thread takes it.
    pub queue: f32,
    /// Encoding the next frame.
    pub encode: f32,
    /// Writing it to its link.
    pub write: f32,
    /// What is left: the way itself, the two kernels, and waking the reader.
    pub wire: f32,
}

/// One node as it stands.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct NodeStatus {
    /// Its key.
    pub id: NodeId,
    /// Its name for people.
    pub name: String,
    /// `coordinator` or `worker`.
    pub role: String,
    /// Whether its control link is up.
    pub connected: bool,
    /// Where its links listen.
    pub address: String,
    /// Its layers, if it has a stage.
    pub layers: Option<LayerRange>,
    /// Layers of the stages that it stands by for.
    pub standby: Vec<LayerRange>,
    /// `idle`, `loading`, `ready`, `leaving` or `failed: ` and why.
    pub state: String,
    /// Share of the stage's weights that it holds, 0 to 1.
    pub loaded: f32,
    /// What it offered.
    pub memory_offered: ByteSize,
    /// Weights and KV cache of its stage.
    pub memory_stage: ByteSize,
    /// Resident memory of its process.
    pub memory_resident: ByteSize,
    /// Threads that compute.
    pub threads: u32,
    /// Median time of its part of a decode pass, in milliseconds; 0 before the first.
    pub pass_ms: f32,
    /// Share of the last ten seconds in which its stage computed, 0 to 1.
    pub busy: f32,
    /// Bytes per token that its outgoing link carries in a decode pass; 0 where it has none.
    pub bytes_per_token: u64,
    /// Round trip of its control link in milliseconds; 0 for the coordinator itself.
    pub rtt_ms: f32,
    /// What its stage takes by the plan, headroom left out; 0 without a stage.
    pub memory_predicted: ByteSize,
    /// How fast it computes the model, as measured while nothing else ran; missing if that is not known.
    pub speed: Option<Speed>,
    /// How many times as long it takes now; missing if its speed is not known.
    pub pace: Option<f64>,
    /// Bytes of weights since it started, by where it had them from, and what it sent to other nodes.
    pub weights: WeightBytes,
}
