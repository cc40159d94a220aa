//! What goes into a scheduler and comes out of it: limits, passes, outputs, notices.

use brigade_base::{PassId, SessionId, Token};

use super::PrefixCache;
use crate::frame::{KvStep, RowSet};

/// What prompts are computed for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Task {
    /// To be continued, token by token.
    #[default]
    Generate,
    /// For one vector each, with which the session is done.
    Pool {
        /// All rows of a prompt travel in one pass, and nothing that a slot holds can be built on: rows see those
        /// behind them, or all of them count for the vector.
        at_once: bool,
    },
}

/// What bounds the passes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Sessions at once; each has a slot of the KV cache on every stage.
    pub n_slots: u32,
    /// Tokens of one session.
    pub context: u32,
    /// Most prompt tokens of one pass, unless a single prompt that travels whole has more.
    pub chunk: u32,
    /// Stages of the ring.
    pub n_stages: u32,
    /// Whose cached tokens a session may use.
    pub cache: PrefixCache,
    /// Tokens of all saved images together; 0 saves none.
    pub image_tokens: u64,
    /// What all prompts are computed for.
    pub task: Task,
    /// Whether a slot can be cut back to its first tokens. Where layers keep a state that each token changes for good,
    /// it can only go on from all that it holds, or begin anew; and its state is neither copied nor saved.
    pub can_rewind: bool,
}

impl Limits {
    /// The same without what its task and its slots rule out.
    pub(super) fn sound(self) -> Self {
        let image_tokens = if self.can_rewind { self.image_tokens } else { 0 };
        let (cache, image_tokens) = match self.task {
            Task::Pool { at_once: true } => (PrefixCache::Off, 0),
            Task::Generate | Task::Pool { .. } => (self.cache, image_tokens),
        };
        // A chunk of one row would be computed in another way.
        Self { chunk: self.chunk.max(2), cache, image_tokens, ..self }
    }

    /// Whether prompts travel whole.
    pub(super) fn is_at_once(&self) -> bool {
        self.task == Task::Pool { at_once: true }
    }

    /// Most tokens of a prompt. One that is to be continued needs room for a token.
    pub(super) fn most_tokens(&self) -> usize {
        (self.context as usize).saturating_sub(usize::from(self.task == Task::Generate))
    }
}

/// A pass to send.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Pass {
    /// Names the pass.
    pub id: PassId,
    /// The pass before it, as far as it counts, see [`crate::frame::FrameHead::follows`].
    pub follows: PassId,
    /// What happens to KV caches first.
    pub steps: Vec<KvStep>,
    /// Rows of slots, in the order of `tokens`.
    pub sets: Vec<RowSet>,
    /// One token for each row.
    pub tokens: Vec<Token>,
    /// Whose rows they are, one entry for each set.
    pub rows: Vec<PassRows>,
}

/// The rows of one session in a pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PassRows {
    /// The session.
    pub session: SessionId,
    /// How many rows.
    pub n_rows: u32,
    /// Whether they are of its prompt.
    pub is_prompt: bool,
    /// Tokens of the session before the first of them.
    pub before: u32,
}

impl Pass {
    /// Whether every row is the next token of its session.
    pub fn is_decode(&self) -> bool {
        !self.rows.is_empty() && self.rows.iter().all(|rows| !rows.is_prompt)
    }
}

/// A session whose logits came back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Output {
    /// The session.
    pub session: SessionId,
    /// Its slot.
    pub slot: usize,
    /// Which of the pass's output rows is its own.
    pub row: usize,
    /// Position of the token that is to be chosen.
    pub position: u32,
}

/// What the scheduler has decided, for whoever counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Notice {
    /// A session has its slot and its first rows are sent; told again when it goes on after it was preempted.
    Started {
        /// The session.
        session: SessionId,
        /// Tokens that it need not compute.
        cached: u32,
    },
    /// A session gave up its slot to a more urgent one, and waits again.
    Preempted {
        /// The session.
        session: SessionId,
    },
    /// An image was saved, or could not be.
    Saved {
        /// Its tokens.
        n_tokens: u32,
        /// Whether all stages hold it.
        ok: bool,
    },
    /// An image was loaded, or could not be.
    Loaded {
        /// Its tokens.
        n_tokens: u32,
        /// Whether all stages have it back.
        ok: bool,
    },
}

/// Why a session was not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum AdmitError {
    /// The prompt leaves no room for an answer.
    #[error("the prompt has {tokens} tokens and the context {context}")]
    TooLong {
        /// Tokens of the prompt.
        tokens: usize,
        /// Tokens of a session.
        context: u32,
    },
    /// The prompt has no tokens.
    #[error("the prompt is empty")]
    Empty,
}
