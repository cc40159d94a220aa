//! What workers are told of where weights may come from, beside the coordinator itself.
//!
//! Every worker may ask every other one, which says itself what it has. Where the model came from a hub that needs no
//! token, workers may be sent there too, each for tensors that are its alone ([`Claims`]).

use std::collections::{HashMap, HashSet};

use brigade_base::NodeId;
use brigade_gguf::StageView;
use brigade_protocol::cluster::Order;
use brigade_protocol::control::{MAX_FELLOWS, ToWorker};
use brigade_protocol::weights::{Hub, HubFile, HubTensor, MAX_SOURCES, Sources};

use super::owner::Owner;
use crate::model::LocalModel;
use crate::share::DirectFetch;

/// Who may fetch which tensors from the hub. Each is one node's alone, so that none comes twice.
#[derive(Debug, Default)]
pub(super) struct Claims(HashMap<usize, NodeId>);

impl Claims {
    /// A node is to hold these tensors: those that are nobody's are its own from now on.
    fn claim(&mut self, node: NodeId, tensors: impl Iterator<Item = usize>) {
        for tensor in tensors {
            self.0.entry(tensor).or_insert(node);
        }
    }

    /// Nobody's again are those of nodes that are not here any more.
    fn keep(&mut self, here: &HashSet<NodeId>) {
        self.0.retain(|_, node| here.contains(node));
    }

    /// What a node may fetch, in the order of the file.
    fn of(&self, node: NodeId) -> Vec<usize> {
        let its = self.0.iter().filter(|(_, claimant)| **claimant == node);
        let mut tensors: Vec<usize> = its.map(|(tensor, _)| *tensor).collect();
        tensors.sort_unstable();
        tensors
    }
}

impl Owner {
    /// Tells all workers who else is here: they may measure their links to those and take weights from them.
    pub(super) fn tell_fellows(&mut self) {
        let here: HashSet<NodeId> = self.workers.keys().copied().collect();
        self.claims.keep(&here);
        let own = self.identity.node_id();
        let all: Vec<NodeId> = std::iter::once(own).chain(here.iter().copied()).take(MAX_FELLOWS).collect();
        for id in here {
            self.send(id, ToWorker::Fellows(all.clone()));
        }
        self.tell_sources();
    }

    /// Lets a node that is to hold stages fetch their tensors from the hub, as far as no other one may.
    pub(super) fn claim(&mut self, node: NodeId, orders: &[Order]) {
        if self.options.direct_fetch == DirectFetch::Off || self.model.origin().is_none() {
            return;
        }
        let catalog = self.model.file().catalog();
        let views = orders.iter().filter_map(|order| StageView::new(catalog, order.layers).ok());
        let tensors: Vec<usize> = views.flat_map(|view| view.tensors().to_vec()).collect();
        self.claims.claim(node, tensors.into_iter());
        self.tell_sources();
    }

    /// Tells all workers whom they may ask for weights.
    fn tell_sources(&self) {
        for id in self.workers.keys() {
            let others = self.workers.keys().filter(|other| *other != id);
            let peers = others.map(|node| self.peer(*node)).filter(|peer| !peer.addresses.is_empty());
            let hub = hub(&self.model, &self.claims.of(*id), self.options.direct_fetch);
            let mut sources = Sources { peers: peers.take(MAX_SOURCES).collect(), hub };
            // No worker would take it: its addresses are too long.
            if let Err(error) = sources.check() {
                tracing::debug!(%error, "workers are not sent to the hub");
                sources.hub = None;
            }
            self.send(*id, ToWorker::Sources(Box::new(sources)));
        }
    }
}

/// The hub as a worker may ask it for `tensors`; `None` if it may not, or for nothing.
fn hub(model: &LocalModel, tensors: &[usize], mode: DirectFetch) -> Option<Hub> {
    let origin = model.origin().filter(|_| mode != DirectFetch::Off && !tensors.is_empty())?;
    let file = |part: &brigade_store::RemotePart| HubFile {
        url: part.url.clone(),
        n_bytes: part.n_bytes,
        etag: part.etag.clone(),
    };
    let (catalog, hashes) = (model.file().catalog(), &model.manifest().tensors);
    let place = |idx: &usize| {
        let tensor = catalog.tensors().get(*idx)?;
        Some(HubTensor { hash: *hashes.get(*idx)?, file: tensor.file, offset: tensor.offset })
    };
    Some(Hub {
        files: origin.parts.iter().map(file).collect(),
        tensors: tensors.iter().filter_map(place).collect(),
        at_once: mode == DirectFetch::On,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tensor_is_one_node_s_alone_until_that_is_gone() {
        let [a, b] = [1, 2].map(|n| NodeId::from_bytes([n; 32]));
        let mut claims = Claims::default();
        claims.claim(a, [3, 1].into_iter());
        claims.claim(b, [1, 2].into_iter());
        assert_eq!((claims.of(a), claims.of(b)), (vec![1, 3], vec![2]));
        claims.keep(&HashSet::from([b]));
        claims.claim(b, [1, 2].into_iter());
        assert_eq!((claims.of(a), claims.of(b)), (vec![], vec![1, 2]));
    }
}
