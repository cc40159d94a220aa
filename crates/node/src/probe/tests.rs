//! Probes between nodes over real sockets, plain and shaped.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, sync_channel};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use brigade_base::NodeId;
use brigade_net::{GreetError, Hello, Identity, Link, Listener, Purpose, Refusal, TcpLink};
use brigade_plan::LinkProfile;
use brigade_protocol::control::Peer;
use brigade_protocol::kind;

use super::dial::{ProbeError, probe};
use super::*;
use crate::doorway::{Doorkeeper, Doorway};
use crate::reach::reach;

const PATIENCE: Duration = Duration::from_secs(30);

/// A node that may be measured by those whom it knows.
struct Node {
    door: Arc<Door>,
    it: Peer,
    _doorway: Doorway,
}

struct Door {
    seats: Seats,
    known: Mutex<Vec<NodeId>>,
    n_links: AtomicUsize,
}

impl Doorkeeper for Door {
    fn admit(&self, hello: &Hello, peer: NodeId) -> Result<(), Refusal> {
        assert_eq!(hello.purpose, Purpose::Probe);
        if self.known.lock().unwrap().contains(&peer) { self.seats.check(peer) } else { Err(Refusal::NotAMember) }
    }

    fn enter(&self, _hello: Hello, link: Arc<TcpLink>) {
        self.n_links.fetch_add(1, Ordering::SeqCst);
        self.seats.serve(&link);
    }
}

impl Node {
    fn that_knows(nodes: &[&Identity]) -> Self {
        let identity = Identity::generate().unwrap();
        let listener = Listener::bind(&identity, &[([127, 0, 0, 1], 0).into()]).unwrap();
        let it = Peer { node: identity.node_id(), addresses: vec![listener.local_addrs()[0].to_string()] };
        let known = Mutex::new(nodes.iter().map(|node| node.node_id()).collect());
        let door = Arc::new(Door { seats: Seats::default(), known, n_links: AtomicUsize::new(0) });
        let doorway = Doorway::open(listener, Arc::clone(&door) as Arc<dyn Doorkeeper>);
        Self { door, it, _doorway: doorway }
    }

    fn n_links(&self) -> usize {
        self.door.n_links.load(Ordering::SeqCst)
    }

    /// A link over which somebody else measures this node.
    fn occupy(&self, by: &Identity) -> Arc<TcpLink> {
        let link = reach(by, self.it.node, &self.it.addresses, Purpose::Probe, None).unwrap();
        // Once it is answered it has its seat.
        link.send(kind::PROBE, &[&0u32.to_le_bytes()]).unwrap();
        link.recv(&mut Vec::new(), Some(Instant::now() + PATIENCE)).unwrap();
        link
    }
}

/// Passes bytes on with a delay and no faster than a rate, each way.
struct Shaper {
    address: SocketAddr,
}

impl Shaper {
    fn to(peer: &Peer, delay: Duration, bytes_per_s: f64) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let to = peer.addresses[0].clone();
        // Ends with the process; it waits for links that no test makes any more.
        thread::spawn(move || {
            while let Ok((near, _)) = listener.accept() {
                let far = TcpStream::connect(&to).unwrap();
                for (from, to) in [(&near, &far), (&far, &near)] {
                    to.set_nodelay(true).unwrap();
                    shape(from.try_clone().unwrap(), to.try_clone().unwrap(), delay, bytes_per_s);
                }
            }
        });
        Self { address }
    }
}

fn shape(mut from: TcpStream, mut to: TcpStream, delay: Duration, bytes_per_s: f64) {
    // Far more than is ever under way.
    let (queue, pieces) = sync_channel::<(Instant, Vec<u8>)>(4096);
    thread::spawn(move || {
        let mut buf = [0; 4096];
        let mut free_at = Instant::now();
        while let Ok(n @ 1..) = from.read(&mut buf) {
            free_at = free_at.max(Instant::now()) + Duration::from_secs_f64(n as f64 / bytes_per_s);
            if queue.send((free_at + delay, buf[..n].to_vec())).is_err() {
                break;
            }
        }
    });
    thread::spawn(move || {
        let mut deliver = |pieces: Receiver<(Instant, Vec<u8>)>| -> std::io::Result<()> {
            for (due, piece) in pieces {
                thread::sleep(due.saturating_duration_since(Instant::now()));
                to.write_all(&piece)?;
            }
            Ok(())
        };
        let _ = deliver(pieces);
        let _ = to.shutdown(Shutdown::Both);
    });
}

fn is_close(measured: f64, expected: f64) -> bool {
    (0.8..=1.2).contains(&(measured / expected))
}

#[test]
fn a_link_over_loopback_is_fast_both_ways() {
    let me = Identity::generate().unwrap();
    let node = Node::that_knows(&[&me]);
    let begin = Instant::now();
    let report = probe(&me, &node.it, Duration::from_millis(400)).unwrap();
    assert!(begin.elapsed() < PATIENCE);
    assert_eq!((report.peer, node.n_links()), (node.it.node, 2));
    for link in [report.there, report.back] {
        assert!(link.latency_s < 0.02 && link.bytes_per_s > 10e6, "{report:?}");
    }
    assert!(report.is_sound() && report.loaded_rtt_s > 0.0, "{report:?}");
}

#[test]
fn a_far_and_narrow_link_is_measured() {
    let me = Identity::generate().unwrap();
    let node = Node::that_knows(&[&me]);
    let shaper = Shaper::to(&node.it, Duration::from_millis(20), 10e6);
    let shaped = Peer { addresses: vec![shaper.address.to_string()], ..node.it };
    let is_right = |link: LinkProfile| is_close(link.latency_s, 0.02) && is_close(link.bytes_per_s, 10e6);
    // Other programs may hold up one measurement, but not all.
    let mut reports = Vec::new();
    let is_measured = (0..4).any(|_| {
        let report = probe(&me, &shaped, Duration::from_millis(1200)).unwrap();
        reports.push(report);
        is_right(report.there) && is_right(report.back)
    });
    assert!(is_measured, "{reports:?}");
}

#[test]
fn a_link_that_is_too_slow_to_be_measured_is_slow() {
    let me = Identity::generate().unwrap();
    let node = Node::that_knows(&[&me]);
    let shaper = Shaper::to(&node.it, Duration::ZERO, 20e3);
    let shaped = Peer { addresses: vec![shaper.address.to_string()], ..node.it };
    let report = probe(&me, &shaped, Duration::from_millis(100)).unwrap();
    for link in [report.there, report.back] {
        assert!((5e3..40e3).contains(&link.bytes_per_s), "{report:?}");
    }
}

#[test]
fn a_stranger_is_refused_and_told_why() {
    let me = Identity::generate().unwrap();
    let node = Node::that_knows(&[]);
    let error = probe(&me, &node.it, Duration::from_millis(100)).unwrap_err();
    assert!(matches!(error, ProbeError::Greet(GreetError::Refused(Refusal::NotAMember))), "{error}");
    let dir = tempfile::tempdir().unwrap();
    let mut book = LinkBook::open(dir.path(), &[]);
    let round = links_to(&me, std::slice::from_ref(&node.it), &mut book, &|| true);
    assert!(round.links.is_empty() && round.troubles[0].contains("does not know this node"), "{round:?}");
}

#[test]
fn a_busy_node_is_asked_again_until_it_is_free() {
    let (me, other) = (Identity::generate().unwrap(), Identity::generate().unwrap());
    let node = Node::that_knows(&[&me, &other]);
    let occupied = node.occupy(&other);
    let error = probe(&me, &node.it, Duration::from_millis(100)).unwrap_err();
    assert!(error.is_passing(), "{error}");

    let dir = tempfile::tempdir().unwrap();
    let mut book = LinkBook::open(dir.path(), &[]);
    let n_asked = AtomicUsize::new(0);
    // The other one has had enough when this one comes for the third time.
    let may_go_on = || {
        if n_asked.fetch_add(1, Ordering::SeqCst) == 2 {
            occupied.close();
        }
        true
    };
    let round = links_to(&me, std::slice::from_ref(&node.it), &mut book, &may_go_on);
    assert_eq!((round.links.len(), round.troubles.len()), (1, 0), "{round:?}");
    assert!(n_asked.into_inner() >= 3);
}

#[test]
fn what_is_known_is_not_measured_again() {
    let me = Identity::generate().unwrap();
    let node = Node::that_knows(&[&me]);
    let dir = tempfile::tempdir().unwrap();
    let links = |may_go_on: bool| {
        let mut book = LinkBook::open(dir.path(), &[]);
        let round = links_to(&me, std::slice::from_ref(&node.it), &mut book, &|| may_go_on);
        round.links.iter().map(|report| report.peer).collect::<Vec<_>>()
    };
    assert_eq!((links(false), node.n_links()), (vec![], 0));
    let known = vec![node.it.node];
    assert_eq!((links(true), node.n_links()), (known.clone(), 2));
    assert_eq!((links(true), node.n_links()), (known.clone(), 2));
    assert_eq!((links(false), node.n_links()), (known, 2));
}

#[test]
fn a_node_that_hangs_on_ends_with_its_time() {
    let me = Identity::generate().unwrap();
    let node = Node::that_knows(&[&me]);
    let link = node.occupy(&me);
    let begin = Instant::now();
    assert!(link.recv(&mut Vec::new(), Some(begin + PATIENCE)).is_err());
    assert!(begin.elapsed() < PATIENCE);
    // The seat is free once the other side has noticed as well.
    let other = Identity::generate().unwrap().node_id();
    while node.door.seats.check(other).is_err() {
        assert!(begin.elapsed() < PATIENCE);
        thread::yield_now();
    }
}
