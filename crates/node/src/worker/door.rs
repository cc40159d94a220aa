//! Who may come in at a worker's link address.

use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex};

use brigade_base::NodeId;
use brigade_net::{Hello, Link, Purpose, Refusal, TcpLink};

use super::owner::Event;
use crate::doorway::{Doorkeeper, receive_attach};
use crate::threads::lock;

/// Largest frame of hidden states: a full batch of the widest model.
const MAX_DATA_BYTES: usize = brigade_net::MAX_FRAME;

/// Lets in those who feed this worker's stages, and nobody else. Which stage a link is for it says itself, and the
/// owner compares that with its orders.
pub(super) struct DataDoor {
    /// Who is expected now; the owner keeps it up to date.
    pub(super) peers: Arc<Mutex<Vec<NodeId>>>,
    pub(super) events: Sender<Event>,
}

impl Doorkeeper for DataDoor {
    fn admit(&self, hello: &Hello, peer: NodeId) -> Result<(), Refusal> {
        if hello.purpose != Purpose::Data {
            return Err(Refusal::NotExpected("a worker takes only the links of its neighbours in the ring".to_owned()));
        }
        if !lock(&self.peers).contains(&peer) {
            return Err(Refusal::NotExpected("this worker expects no link from that node".to_owned()));
        }
        Ok(())
    }

    fn enter(&self, _hello: Hello, link: Arc<TcpLink>) {
        link.set_frame_limit(MAX_DATA_BYTES);
        match receive_attach(&*link) {
            Some(attach) => drop(self.events.send(Event::Inbound(link, attach))),
            None => link.close(),
        }
    }
}
