//! What the simulator knows and no node does: every caller's answer as it should be, and what every pass is about.
//!
//! All invariants of tokens are checked here, at the step at which they would break:
//! - a caller hears the tokens of the undisturbed answer, each once and in order ([`Truth::tell`]);
//! - a pass carries the tokens of its sessions' logs ([`Truth::sent`]);
//! - behind a pass, each slot of each stage holds what the log of its session says ([`Truth::applied`]);
//! - a term has one coordinator, and all passes of an epoch come from one ([`Truth::leads`], [`Truth::sent`]);
//! - a request ends as it may ([`Truth::end`]).

use std::collections::BTreeMap;

use brigade_base::{DeploymentId, Epoch, PassId, TenantId, Token};
use brigade_protocol::frame::RowSet;
use brigade_protocol::schedule::Pass;

use crate::network::{Nanos, NodeIdx, SECOND};
use crate::stage::Stage;

/// How a request ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Outcome {
    /// With its whole answer.
    Answered,
    /// Its caller hung up.
    Cancelled,
    /// There was no placement for as long as sessions wait for one.
    NoCapacity,
    /// The node through which it entered was killed.
    EntryLost,
}

/// A request and what its caller has heard.
#[derive(Debug, Clone)]
pub struct Caller {
    /// The node that it asks.
    pub entry: NodeIdx,
    /// When.
    pub at: Nanos,
    /// Tokens of the prompt.
    pub n_prompt: usize,
    /// Prompt and answer of the undisturbed run.
    pub expected: Vec<Token>,
    /// Its sampler's seed; 0 for greedy.
    pub sampling: u64,
    /// Whose it is.
    pub tenant: TenantId,
    /// Lower is earlier.
    pub priority: i32,
    /// It has entered.
    pub is_open: bool,
    /// Tokens of the answer that came.
    pub n_told: usize,
    /// When the last one came.
    pub told_at: Nanos,
    /// How it ended.
    pub outcome: Option<Outcome>,
}

impl Caller {
    /// Tokens of the answer.
    pub fn n_answer(&self) -> usize {
        self.expected.len() - self.n_prompt
    }
}

/// One row set of a pass: whose it is; `None` for a ring's first token.
#[derive(Debug, Clone)]
struct Meant {
    caller: Option<usize>,
    set: RowSet,
    tokens: Vec<Token>,
}

/// What happened how often.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Passes that were sent.
    pub passes: u64,
    /// Rings that a first token went around.
    pub rings: u64,
    /// Of these, such as began with tokens of sessions that were there before.
    pub kept: u64,
    /// Frames that stages which stand by have computed.
    pub shadowed: u64,
    /// Stages that were handed over with what their slots held.
    pub handed_over: u64,
    /// Passes that were found to be stuck.
    pub stuck: u64,
    /// Coordinators that took over from another one.
    pub takeovers: u64,
    /// Requests that went on at another coordinator.
    pub resumed: u64,
}

/// What nobody but the simulator knows.
#[derive(Debug)]
pub struct Truth {
    /// All requests.
    pub callers: Vec<Caller>,
    /// How long sessions wait for a placement.
    pub patience: Nanos,
    /// What happened how often, so that a test can tell whether enough does.
    pub counts: Counts,
    book: BTreeMap<(Placement, PassId), Vec<Meant>>,
    /// Who sends the passes of a placement; and the last pass of each term of a deployment.
    senders: BTreeMap<Placement, (NodeIdx, u64)>,
    leaders: BTreeMap<(DeploymentId, u64), (NodeIdx, u64)>,
    last_pass: BTreeMap<(DeploymentId, u64), PassId>,
}

/// What frames name themselves by.
pub type Placement = (DeploymentId, Epoch);

/// Passes that the book holds: more than any stage that stands by lags behind.
const MAX_BOOK: usize = 4096;

impl Truth {
    /// No requests yet.
    pub fn new(patience: Nanos) -> Self {
        Self {
            callers: Vec::new(),
            patience,
            counts: Counts::default(),
            book: BTreeMap::new(),
            senders: BTreeMap::new(),
            leaders: BTreeMap::new(),
            last_pass: BTreeMap::new(),
        }
    }

    /// A pass leaves `node`, run `incarnation` of it; `of` says whose each of its row sets is.
    pub fn sent(&mut self, node: (NodeIdx, u64), of_placement: Placement, pass: &Pass, of: &[Option<usize>]) {
        let (deployment, epoch) = of_placement;
        let sender = *self.senders.entry(of_placement).or_insert(node);
        assert_eq!(sender, node, "two coordinators send passes of epoch {epoch}");
        let last = self.last_pass.insert((deployment, epoch.term()), pass.id);
        assert!(last < Some(pass.id), "pass {} of term {} comes after {last:?}", pass.id, epoch.term());
        let mut at = 0;
        let mut meant = Vec::with_capacity(pass.sets.len());
        for (set, caller) in pass.sets.iter().zip(of) {
            let tokens = pass.tokens[at..at + set.n_rows as usize].to_vec();
            at += set.n_rows as usize;
            if let Some(caller) = caller {
                let log = &self.callers[*caller].expected;
                let rows = set.keep as usize..(set.keep + set.n_rows) as usize;
                assert_eq!(tokens, log[rows], "pass {} has other tokens than the log of request {caller}", pass.id);
            }
            meant.push(Meant { caller: *caller, set: *set, tokens });
        }
        assert_eq!(pass.sets.len(), of.len());
        self.counts.passes += 1;
        self.book.insert((of_placement, pass.id), meant);
        if self.book.len() > MAX_BOOK {
            self.book.pop_first();
        }
    }

    /// A node, run `incarnation` of it, begins to coordinate in a term.
    pub fn leads(&mut self, node: (NodeIdx, u64), term: (DeploymentId, u64)) {
        let earlier = self.leaders.insert(term, node);
        assert_eq!(earlier, None, "there are two coordinators of term {}, the other is {node:?}", term.1);
    }

    /// The tokens of each row set of a pass.
    pub fn tokens(&self, of: Placement, pass: PassId) -> Vec<Vec<Token>> {
        let meant = self.book.get(&(of, pass)).map(Vec::as_slice).unwrap_or_default();
        meant.iter().map(|meant| meant.tokens.clone()).collect()
    }

    /// A stage has computed a row set of a pass: its slot must hold what the log says, and nothing more.
    pub fn applied(&self, stage: &Stage, of: Placement, pass: PassId, which: usize) {
        let epoch = of.1;
        let Some(meant) = self.book.get(&(of, pass)).and_then(|all| all.get(which)) else {
            panic!("a stage computes pass {pass} of epoch {epoch}, which was never sent");
        };
        let log = match meant.caller {
            Some(caller) => &self.callers[caller].expected[..(meant.set.keep + meant.set.n_rows) as usize],
            None => &meant.tokens[..],
        };
        assert!(
            stage.holds(meant.set.slot, log),
            "layers {} of slot {} are not in line with the log of request {:?} behind pass {pass} of epoch {epoch}",
            stage.layers,
            meant.set.slot,
            meant.caller,
        );
    }

    /// A caller hears a token.
    pub fn tell(&mut self, now: Nanos, caller: usize, position: usize, token: Token) {
        let heard = &mut self.callers[caller];
        assert_eq!(heard.outcome, None, "request {caller} hears a token behind its end");
        assert_eq!(position, heard.n_prompt + heard.n_told, "request {caller}: a token is lost or repeated");
        assert_eq!(Some(&token), heard.expected.get(position), "request {caller}: token {position} is wrong");
        heard.n_told += 1;
        heard.told_at = now;
    }

    /// A request ends. `without` is for how long there has been no placement, if that is why.
    pub fn end(&mut self, caller: usize, outcome: Outcome, without: Nanos) {
        let patience = self.patience;
        let heard = &mut self.callers[caller];
        assert_eq!(heard.outcome.replace(outcome), None, "request {caller} ends twice");
        match outcome {
            Outcome::Answered => {
                assert_eq!(heard.n_told, heard.n_answer(), "request {caller}: its answer is not whole");
            }
            // Clocks differ by a few percent.
            Outcome::NoCapacity => assert!(
                without + without / 10 >= patience,
                "request {caller} fails after {} s without a placement",
                without / SECOND
            ),
            Outcome::Cancelled | Outcome::EntryLost => {}
        }
    }
}
