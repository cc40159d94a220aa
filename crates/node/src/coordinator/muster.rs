//! Who votes on who coordinates, and who is waited for when another node has taken over.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use brigade_base::NodeId;
use brigade_net::Members;
use brigade_protocol::cluster::Settings;
use brigade_protocol::control::Offer;
use brigade_protocol::council::{Charter, MAX_VOTERS, Proposal, Voter};

use super::{CoordinatorOptions, DeploymentSettings};
use crate::threads::lock;

/// A worker that is away for so long votes no more, where the others can agree on that. Longer than a restart of its
/// machine; until then it counts as one that may come back.
const FORGET: Duration = Duration::from_secs(120);

/// How long a new coordinator waits for the nodes of the one before, so that it does not place the model on the first
/// that comes.
const PATIENCE: Duration = Duration::from_millis(1_000);

/// The nodes that vote.
pub(super) struct Voters {
    own: Voter,
    settings: DeploymentSettings,
    members: Arc<Mutex<Members>>,
    /// The others, and since when they are away.
    others: BTreeMap<NodeId, (Voter, Option<Instant>)>,
    changed: bool,
}

impl Voters {
    /// Those of the charter, of whom none is here yet.
    pub(super) fn new(
        me: NodeId,
        options: &CoordinatorOptions,
        addresses: &[SocketAddr],
        charter: &Charter,
        settings: DeploymentSettings,
        members: Arc<Mutex<Members>>,
    ) -> Self {
        let addresses = addresses.iter().map(ToString::to_string).collect();
        let now = Instant::now();
        // Whoever was taken from the list of members votes no more.
        let is_member = |node| lock(&members).contains(&node);
        let others = charter.electorate().filter(|voter| voter.node != me && is_member(voter.node));
        let others = others.map(|voter| (voter.node, (voter.clone(), Some(now)))).collect();
        Self {
            own: Voter { node: me, name: options.name.clone(), addresses, may_lead: true },
            settings,
            members,
            others,
            changed: true,
        }
    }

    /// A worker is here.
    pub(super) fn came(&mut self, node: NodeId, offer: &Offer) {
        let may_lead = offer.own_copy == Some(self.settings.served_hash);
        let voter = Voter { node, name: offer.name.clone(), addresses: offer.addresses.clone(), may_lead };
        let before = self.others.insert(node, (voter.clone(), None));
        self.changed |= before.is_none_or(|(before, _)| before != voter);
    }

    /// A worker is gone; for good, if it said so.
    pub(super) fn went(&mut self, node: NodeId, for_good: bool) {
        if for_good {
            self.changed |= self.others.remove(&node).is_some();
        } else if let Some((_, away)) = self.others.get_mut(&node) {
            away.get_or_insert_with(Instant::now);
        }
    }

    /// What to propose, if it is not what was proposed last.
    pub(super) fn proposal(&mut self) -> Option<Proposal> {
        let n_before = self.others.len();
        self.others.retain(|_, (_, away)| away.is_none_or(|since| since.elapsed() < FORGET));
        self.changed |= self.others.len() < n_before;
        if !std::mem::take(&mut self.changed) {
            return None;
        }
        let mut others: Vec<_> = self.others.values().collect();
        others.sort_by_key(|(voter, away)| (away.is_some(), !voter.may_lead));
        if others.len() >= MAX_VOTERS {
            tracing::warn!(n_nodes = others.len(), "more nodes than can vote; some have no vote");
        }
        let others = others.into_iter().map(|(voter, _)| voter.clone()).take(MAX_VOTERS - 1).collect();
        let settings = self.settings.clone().with_members(&lock(&self.members)).encode();
        Proposal::new(self.own.clone(), others, settings)
            .inspect_err(|error| tracing::warn!(%error, "some nodes do not vote"))
            .ok()
    }
}

/// The nodes of the coordinator before, for which the first placement waits.
pub(super) struct Muster {
    until: Option<Instant>,
    n_expected: usize,
}

impl Muster {
    /// Whoever founded the deployment, or comes back to it, waits for nobody but as its settings say.
    pub(super) fn new(settings: &Settings, charter: &Charter) -> Self {
        let me = settings.coordinator.id;
        let took_over = charter.coordinator != me;
        let others = charter.electorate().filter(|voter| voter.node != me && voter.node != charter.coordinator);
        Self { until: took_over.then(|| Instant::now() + PATIENCE), n_expected: others.count() }
    }

    /// Whether the first placement is to wait, with so many workers here.
    pub(super) fn waits(&mut self, n_here: usize) -> bool {
        self.until = self.until.filter(|until| n_here < self.n_expected && Instant::now() < *until);
        self.until.is_some()
    }
}
