//! Who may come in while this node coordinates.

use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, OnceLock, Weak};

use brigade_base::NodeId;
use brigade_net::{Hello, Link, Members, Purpose, Refusal, TcpLink};
use brigade_protocol::control::MAX_CONTROL_BYTES;

use super::owner::Event;
use crate::doorway::{Doorkeeper, receive_attach};
use crate::gateway::{Coordinating, serve_requests};
use crate::handle::Shared;
use crate::model::LocalModel;
use crate::probe::Seats;
use crate::share::Shelf;
use crate::threads::{lock, seconds_since_1970};

/// Lets in workers that are members or bring a ticket, the data link of the last worker, and members that want weights,
/// have requests, or measure their link to this node.
pub(super) struct Door {
    pub(super) members: Arc<Mutex<Members>>,
    pub(super) shared: Arc<Shared>,
    pub(super) model: Arc<LocalModel>,
    pub(super) events: Sender<Event>,
    pub(super) handle: Arc<dyn Coordinating>,
    /// The model's header with its vocabulary, for gateways.
    pub(super) vocabulary: OnceLock<Vec<u8>>,
    pub(super) requests: Arc<RequestLinks>,
    pub(super) seats: Seats,
    pub(super) shelf: Arc<Shelf>,
}

/// The links of gateways while this node coordinates.
#[derive(Default)]
pub(super) struct RequestLinks(Mutex<(bool, Vec<Weak<TcpLink>>)>);

impl RequestLinks {
    /// Takes one in. False if there are to be none any more.
    fn add(&self, link: &Arc<TcpLink>) -> bool {
        let (is_over, links) = &mut *lock(&self.0);
        links.retain(|link| link.strong_count() > 0);
        links.push(Arc::downgrade(link));
        !*is_over
    }

    /// Ends all.
    pub(super) fn close_all(&self) {
        let (is_over, links) = &mut *lock(&self.0);
        *is_over = true;
        links.drain(..).filter_map(|link| link.upgrade()).for_each(|link| link.close());
    }
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
            Purpose::Probe if members.contains(&peer) => self.seats.check(peer),
            Purpose::Weights if members.contains(&peer) => self.shelf.check(peer),
            _ if members.contains(&peer) => Ok(()),
            _ => Err(Refusal::NotAMember),
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
            Purpose::Weights => self.shelf.serve(&link),
            Purpose::Requests if !self.requests.add(&link) => link.close(),
            Purpose::Requests => {
                let header = || brigade_gguf::vocabulary_header(self.model.file().catalog());
                let link = link as Arc<dyn Link>;
                serve_requests(&link, &self.handle, self.vocabulary.get_or_init(header));
            }
            Purpose::Probe => self.seats.serve(&link),
            // The council has a door of its own.
            Purpose::Council => link.close(),
        }
    }
}
