//! Who may come in at a worker's link address.

use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex};

use brigade_base::NodeId;
use brigade_net::{Hello, Link, Purpose, Refusal, TcpLink};

use super::owner::Event;
use crate::doorway::{Doorkeeper, receive_attach};
use crate::probe::Seats;
use crate::share::Shelf;
use crate::threads::lock;

/// Largest frame of hidden states: a full batch of the widest model.
const MAX_DATA_BYTES: usize = brigade_net::MAX_FRAME;

/// Lets in those who feed this worker's stages, the other nodes of its cluster to measure their links or take weights,
/// and nobody else.
/// Which stage a link is for it says itself, and the owner compares that with its orders.
pub(super) struct WorkerDoor {
    /// Who is expected now; the owner keeps it up to date.
    pub(super) peers: Arc<Mutex<Vec<NodeId>>>,
    /// The other nodes, as the coordinator has named them; the owner keeps them up to date.
    pub(super) fellows: Arc<Mutex<Vec<NodeId>>>,
    pub(super) seats: Seats,
    /// What this node has of models.
    pub(super) shelf: Arc<Shelf>,
    pub(super) events: Sender<Event>,
}

impl Doorkeeper for WorkerDoor {
    fn admit(&self, hello: &Hello, peer: NodeId) -> Result<(), Refusal> {
        let not_expected = |why: &str| Err(Refusal::NotExpected(why.to_owned()));
        match hello.purpose {
            Purpose::Data if lock(&self.peers).contains(&peer) => Ok(()),
            Purpose::Data => not_expected("this worker expects no link from that node"),
            Purpose::Probe if lock(&self.fellows).contains(&peer) => self.seats.check(peer),
            Purpose::Probe => not_expected("this worker does not know that node, which may not measure its link to it"),
            Purpose::Weights if lock(&self.fellows).contains(&peer) => self.shelf.check(peer),
            Purpose::Weights => not_expected("this worker does not know that node, which gets no weights from it"),
            Purpose::Control | Purpose::Requests | Purpose::Council => {
                not_expected("a worker takes only the links of its neighbours in the ring")
            }
        }
    }

    fn enter(&self, hello: Hello, link: Arc<TcpLink>) {
        match hello.purpose {
            Purpose::Probe => return self.seats.serve(&link),
            Purpose::Weights => return self.shelf.serve(&link),
            _ => {}
        }
        link.set_frame_limit(MAX_DATA_BYTES);
        match receive_attach(&*link) {
            Some(attach) => drop(self.events.send(Event::Inbound(link, attach))),
            None => link.close(),
        }
    }
}
