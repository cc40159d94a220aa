//! Links to several nodes, one after the other.

use std::collections::VecDeque;
use std::thread;
use std::time::{Duration, Instant};

use brigade_net::Identity;
use brigade_protocol::control::Peer;
use brigade_protocol::measure::LinkReport;

use super::{LinkBook, probe};
use crate::threads::seconds_since_1970;

/// How long one link may be measured.
pub const WITHIN: Duration = Duration::from_millis(400);

/// After this no more links are measured: a dozen take so long, and whoever asked waits little longer. Until then nodes
/// that others are measuring are asked again.
const ROUND: Duration = Duration::from_secs(4);

/// Pause before they are asked again, when all that are left are busy.
const BUSY_PAUSE: Duration = Duration::from_millis(50);

/// The links to some nodes.
#[derive(Debug, Default)]
pub struct Round {
    /// What is known of them now.
    pub links: Vec<LinkReport>,
    /// Why others were not measured, for people.
    pub troubles: Vec<String>,
}

/// What is known of the links to `peers`: from the book what it has, measured what it has not while `may_go_on` says
/// so. What was measured is in the book then.
pub fn links_to(identity: &Identity, peers: &[Peer], book: &mut LinkBook, may_go_on: &dyn Fn() -> bool) -> Round {
    let mut round = Round::default();
    let mut left = VecDeque::new();
    let now = seconds_since_1970();
    for peer in peers {
        match book.get(peer, now) {
            Some(report) => round.links.push(report),
            None => left.push_back((peer, 0)),
        }
    }
    let n_known = round.links.len();
    let until = Instant::now() + ROUND;
    while let Some((peer, n_tries)) = left.pop_front() {
        if !may_go_on() {
            break;
        }
        if Instant::now() >= until {
            round.troubles.push(format!("there was no time to measure the link to node {}", peer.node.short()));
            continue;
        }
        // Where it was tried as often as all others, each of them was busy.
        if n_tries > 0 && left.iter().all(|(_, others)| *others >= n_tries) {
            thread::sleep(BUSY_PAUSE);
        }
        match probe(identity, peer, WITHIN) {
            Ok(report) => {
                book.put(peer, report, seconds_since_1970());
                round.links.push(report);
            }
            Err(error) if error.is_passing() && Instant::now() < until => left.push_back((peer, n_tries + 1)),
            Err(error) => {
                round.troubles.push(format!("the link to node {} was not measured: {error}", peer.node.short()));
            }
        }
    }
    if round.links.len() > n_known
        && let Err(error) = book.save()
    {
        tracing::warn!(%error, "measured links cannot be stored; they are measured again at the next start");
    }
    round
}
