//! The charter: who votes, who may lead, who leads; and what a node must not forget.
//!
//! A charter is the whole of what the nodes agree on. Each version replaces the one before, so what Raft keeps as a
//! log is a single value here, and its term and version are the term and index of the last entry.

use brigade_base::{DeploymentId, NodeId};
use serde::{Deserialize, Serialize};

use crate::control::{MAX_NAME, Peer, check_addresses, decode, encode};
use crate::{DecodeError, cap};

/// Most voters of a charter. More nodes may take part without a vote: a majority of 64 is out of reach as seldom as one
/// of more, and each change waits for its answers.
pub const MAX_VOTERS: usize = 64;

/// Largest settings of a charter: a configuration is a few KiB of text, and each change sends it to each voter.
pub const MAX_SETTINGS_BYTES: usize = 64 << 10;

/// Highest term, since it is the upper half of an epoch; and highest version of a charter. One a second is enough for
/// 136 years.
pub const MAX_TERM: u64 = u32::MAX as u64;

/// Layout of [`Stored`] as bytes; its first byte.
const STORED_VERSION: u8 = 1;

/// Votes of the tie breaker. It adds one to a sum that would be even, so that no two halves of the voters are equal.
const TIE_BREAKER_WEIGHT: usize = 3;

/// Votes of each other voter.
const WEIGHT: usize = 2;

/// A node that votes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Voter {
    /// The node.
    pub node: NodeId,
    /// Its name for people.
    pub name: String,
    /// Where its links listen, as `host:port`.
    pub addresses: Vec<String>,
    /// It has what a coordinator needs: the whole model.
    pub may_lead: bool,
}

impl Voter {
    /// Where to reach it.
    pub fn peer(&self) -> Peer {
        Peer { node: self.node, addresses: self.addresses.clone() }
    }

    fn check(&self) -> Result<(), DecodeError> {
        cap("name length", self.name.chars().count() as u64, MAX_NAME as u64)?;
        check_addresses(&self.addresses)
    }
}

/// Why a proposal cannot be made.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ProposalError {
    /// A number in it is beyond its cap.
    #[error("cannot change the charter: {0}; propose less")]
    TooMuch(DecodeError),
    /// A node would have two votes.
    #[error("cannot change the charter: node {0} is named twice; propose it once")]
    Twice(NodeId),
}

/// Voters and settings that a charter can take: within all caps, each node once, the coordinator first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Proposal {
    pub(super) voters: Vec<Voter>,
    pub(super) settings: Vec<u8>,
}

impl Proposal {
    /// What `coordinator` proposes. It is the tie breaker and may lead. Of `others`, those that may lead take over in
    /// the order in which they are given. `settings` are of no concern here: at most [`MAX_SETTINGS_BYTES`] of them go
    /// to each voter and to the next coordinator.
    ///
    /// # Errors
    /// If there are more than [`MAX_VOTERS`], a node is named twice, or a text is too long.
    pub fn new(coordinator: Voter, others: Vec<Voter>, settings: Vec<u8>) -> Result<Self, ProposalError> {
        let mut voters = vec![Voter { may_lead: true, ..coordinator }];
        voters.extend(others);
        if let Some(node) = named_twice(&voters) {
            return Err(ProposalError::Twice(node));
        }
        check_voters(&voters).map_err(ProposalError::TooMuch)?;
        check_settings(&settings).map_err(ProposalError::TooMuch)?;
        Ok(Self { voters, settings })
    }
}

/// What the nodes of a deployment agree on.
///
/// The first voter of a set is its tie breaker.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Charter {
    /// The deployment.
    pub deployment: DeploymentId,
    /// The term of the coordinator that wrote it.
    pub term: u64,
    /// Rises with each charter, over all terms.
    pub version: u64,
    /// The node that wrote it.
    pub coordinator: NodeId,
    /// Who votes.
    pub voters: Vec<Voter>,
    /// Who voted before, while a change is under way: until it is over, both sets must agree. Empty otherwise.
    pub before: Vec<Voter>,
    /// What the next coordinator must know.
    pub settings: Vec<u8>,
}

impl Charter {
    /// Term and version. Of two charters of a deployment the higher one is newer.
    pub fn age(&self) -> (u64, u64) {
        (self.term, self.version)
    }

    /// The nodes for which `has` holds decide for all.
    ///
    /// Any two quorums have a node in common, of one charter and of two that follow each other. That is all that the
    /// safety of votes and writes rests on, so the weights can be chosen for what users want: a pair goes on with its
    /// tie breaker alone, and never with the other one alone.
    pub fn is_quorum(&self, has: impl Fn(NodeId) -> bool) -> bool {
        is_quorum(&self.voters, &has) && (self.before.is_empty() || is_quorum(&self.before, &has))
    }

    /// All voters, those of both sets while a change is under way; each once.
    pub fn electorate(&self) -> impl Iterator<Item = &Voter> {
        let new = |old: &&Voter| !self.voters.iter().any(|voter| voter.node == old.node);
        self.voters.iter().chain(self.before.iter().filter(new))
    }

    /// A voter.
    pub fn voter(&self, node: NodeId) -> Option<&Voter> {
        self.electorate().find(|voter| voter.node == node)
    }

    /// A node and where to reach it; no addresses for a node that is no voter.
    pub fn peer(&self, node: NodeId) -> Peer {
        self.voter(node).map_or(Peer { node, addresses: Vec::new() }, Voter::peer)
    }

    /// The node's place among those that may lead: 0 for the coordinator that wrote the charter, from 1 on for those
    /// that can replace it; `None` if it may not lead.
    pub(super) fn place(&self, node: NodeId) -> Option<u32> {
        let mut leaders = self.electorate().filter(|voter| voter.may_lead);
        if node == self.coordinator {
            return leaders.any(|voter| voter.node == node).then_some(0);
        }
        let mut others = leaders.filter(|voter| voter.node != self.coordinator);
        others.position(|voter| voter.node == node).map(|idx| idx as u32 + 1)
    }

    /// With these voters other sets of nodes would be quorums, so that both have to agree on the change.
    pub(super) fn differs_in_quorums(&self, voters: &[Voter]) -> bool {
        let powers = |voters: &[Voter]| {
            let mut powers: Vec<_> = voters.iter().map(|voter| (voter.node, voter.may_lead)).collect();
            // The order of all but the first is only that of who asks for votes first.
            powers[voters.len().min(1)..].sort_unstable();
            powers
        };
        powers(&self.voters) != powers(voters)
    }

    pub(super) fn check(&self) -> Result<(), DecodeError> {
        cap("term", self.term, MAX_TERM)?;
        cap("version of a charter", self.version, MAX_TERM)?;
        check_settings(&self.settings)?;
        check_voters(&self.voters)?;
        check_voters(&self.before)?;
        let malformed = |why: &str| Err(DecodeError::Malformed { what: "charter", why: why.to_owned() });
        if self.voters.is_empty() {
            return malformed("nobody votes");
        }
        if named_twice(&self.voters).or(named_twice(&self.before)).is_some() {
            return malformed("a node has two votes");
        }
        Ok(())
    }
}

/// The nodes for which `has` holds decide for these voters.
///
/// Where none but the first may lead, nobody can ever be elected against it. So it decides alone, and needs no answer
/// of the others to go on.
pub(super) fn is_quorum(voters: &[Voter], has: impl Fn(NodeId) -> bool) -> bool {
    let Some((first, others)) = voters.split_first() else { return false };
    if !others.iter().any(|voter| voter.may_lead) {
        return has(first.node);
    }
    let n_agreed = others.iter().filter(|voter| has(voter.node)).count();
    let agreed = WEIGHT * n_agreed + if has(first.node) { TIE_BREAKER_WEIGHT } else { 0 };
    2 * agreed > WEIGHT * others.len() + TIE_BREAKER_WEIGHT
}

/// What a node must not forget, even if it is killed.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Stored {
    /// The highest term that it has heard of.
    pub term: u64,
    /// Whom it gave its vote, and for which term.
    pub voted: Option<(u64, NodeId)>,
    /// The newest charter that it was given.
    pub charter: Option<Charter>,
    /// The deployment that it left. It has no vote there any more, since it does not know what it agreed to.
    pub left: Option<DeploymentId>,
}

impl Stored {
    /// Begins a deployment of which `coordinator` is the only voter, so that it leads at once. Terms go on from those
    /// that the node knows.
    ///
    /// # Errors
    /// If a text is too long.
    pub fn found(self, deployment: DeploymentId, coordinator: Voter, settings: Vec<u8>) -> Result<Self, ProposalError> {
        let node = coordinator.node;
        let Proposal { voters, settings } = Proposal::new(coordinator, Vec::new(), settings)?;
        let (term, version, before) = (0, 0, Vec::new());
        let charter = Charter { deployment, term, version, coordinator: node, voters, before, settings };
        Ok(Self { charter: Some(charter), ..self })
    }

    /// Leaves the deployment, so that the node can join another one. It keeps its term: no vote is given twice.
    #[must_use]
    pub fn forget(self) -> Self {
        let left = self.charter.map(|charter| charter.deployment).or(self.left);
        Self { charter: None, left, ..self }
    }

    /// As bytes for a file.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = vec![STORED_VERSION];
        bytes.extend(encode(self));
        bytes
    }

    /// Reads what [`Stored::encode`] wrote.
    ///
    /// # Errors
    /// If the bytes are of another layout, or a number is beyond its cap.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let (what, malformed) = ("council state", |why: String| DecodeError::Malformed { what: "council state", why });
        match bytes.split_first() {
            Some((&STORED_VERSION, bytes)) => {
                let stored: Self = decode(what, bytes)?;
                cap("term", stored.term, MAX_TERM)?;
                stored.charter.as_ref().map_or(Ok(()), Charter::check)?;
                Ok(stored)
            }
            Some((version, _)) => Err(malformed(format!("layout {version}, this program reads {STORED_VERSION}"))),
            None => Err(malformed("it is empty".to_owned())),
        }
    }
}

fn check_settings(settings: &[u8]) -> Result<(), DecodeError> {
    cap("bytes of settings", settings.len() as u64, MAX_SETTINGS_BYTES as u64)
}

fn check_voters(voters: &[Voter]) -> Result<(), DecodeError> {
    cap("number of voters", voters.len() as u64, MAX_VOTERS as u64)?;
    voters.iter().try_for_each(Voter::check)
}

fn named_twice(voters: &[Voter]) -> Option<NodeId> {
    let is_second = |(idx, voter): &(usize, &Voter)| voters[..*idx].iter().any(|other| other.node == voter.node);
    voters.iter().enumerate().find(is_second).map(|(_, voter)| voter.node)
}
