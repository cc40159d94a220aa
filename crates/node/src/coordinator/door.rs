//! Who may come in at a coordinator's link address.

use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex};

use brigade_base::NodeId;
use brigade_net::{Hello, Link, Members, Purpose, Refusal, TcpLink};
use brigade_protocol::control::MAX_CONTROL_BYTES;

use super::owner::Event;
use crate::doorway::{Doorkeeper, receive_attach};
use crate::handle::Shared;
use crate::model::LocalModel;
use crate::threads::{lock, seconds_since_1970};
use crate::weights::serve_weights;

/// Lets in workers that are members or bring a ticket, the data link of the last worker, and members' weights links.
pub(super) struct Door {
    pub(super) members: Mutex<Members>,
    pub(super) shared: Arc<Shared>,
    pub(super) model: Arc<LocalModel>,
    pub(super) events: Sender<Event>,
}

impl Doorkeeper for Door {
    fn admit(&self, hello: &Hello, peer: NodeId) -> Result<(), Refusal> {
        let mut members = lock(&self.members);
        match hello.purpose {
            Purpose::Control if members.contains(&peer) => Ok(()),
            Purpose::Control => {
                let secret = hello.admission.as_ref().ok_or(Refusal::NotAMember)?;
                let now = seconds_since_1970();
                lock(&self.shared.tickets).check(secret, now)?;
                let admitted = members.admit(peer, &peer.short(), now);
                admitted.map(drop).map_err(|error| Refusal::NotExpected(error.to_string()))
            }
            Purpose::Data | Purpose::Weights if members.contains(&peer) => Ok(()),
            Purpose::Data | Purpose::Weights => Err(Refusal::NotAMember),
        }
    }

    fn enter(&self, hello: Hello, link: Arc<TcpLink>) {
        match hello.purpose {
            Purpose::Control => {
                link.set_frame_limit(MAX_CONTROL_BYTES);
                let _ = self.events.send(Event::WorkerLink(link));
            }
            Purpose::Data => {
                link.set_frame_limit(brigade_net::MAX_FRAME);
                match receive_attach(&*link) {
                    Some(attach) => drop(self.events.send(Event::DataLink(link, attach))),
                    None => link.close(),
                }
            }
            Purpose::Weights => serve_weights(&*link, self.model.file()),
        }
    }
}
