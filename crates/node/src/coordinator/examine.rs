//! Asking workers how they are, for whoever asks this node; see [`crate::doctor`].

use std::sync::mpsc::Sender;

use brigade_base::NodeId;
use brigade_protocol::control::{Offer, ToWorker};
use brigade_protocol::measure::Examined;

use super::owner::Owner;
use crate::doctor::{Known, Note, Report};

/// Most that ask at once: one round follows the other, so there are more only while those that gave up were not noticed
/// yet.
const MAX_ASKERS: usize = 4;

impl Owner {
    /// Passes the question on to all workers. Whoever asks hears of their answers, and waits for them as long as it
    /// likes.
    pub(super) fn examine(&mut self, asker: Sender<Report>) {
        if asker.send(Report::Known(Box::new(self.known()))).is_err() {
            return;
        }
        for worker in self.workers.keys() {
            self.send(*worker, ToWorker::Examine);
        }
        if self.askers.len() == MAX_ASKERS {
            self.askers.remove(0);
        }
        self.askers.push(asker);
    }

    /// A worker has examined itself.
    pub(super) fn examined(&mut self, worker: NodeId, examined: &Examined) {
        self.askers.retain(|asker| asker.send(Report::Answer(worker, examined.clone())).is_ok());
    }

    fn known(&self) -> Known {
        let own = Note {
            node: self.identity.node_id(),
            name: self.options.name.clone(),
            software: env!("CARGO_PKG_VERSION").to_owned(),
            own_copy: None,
            trouble: None,
        };
        let note = |node: NodeId, offer: &Offer| Note {
            node,
            name: offer.name.clone(),
            software: offer.software.clone(),
            own_copy: offer.own_copy,
            trouble: self.pace.trouble(node).map(str::to_owned),
        };
        let members = self.cluster.members().iter().map(|member| note(member.id, &member.offer));
        // Those that still measure themselves are asked too.
        let measuring = self.workers.keys().filter_map(|id| Some(note(*id, self.pace.offer(*id)?)));
        Known {
            asked: self.workers.keys().copied().collect(),
            model: self.settings.model.clone(),
            header_hash: self.model.served_hash(),
            nodes: self.cluster.nodes(),
            links: self.cluster.links().clone(),
            demand: self.settings.demand.clone(),
            plan: self.told_plan(),
            reports: self.pace.links().map(|(by, report)| (by, *report)).collect(),
            notes: members.chain(measuring).chain([own]).collect(),
        }
    }
}
