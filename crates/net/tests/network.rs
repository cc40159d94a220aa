//! Nodes that find, authenticate and greet each other over real loopback sockets, and strangers that must not.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use brigade_base::NodeId;
use brigade_net::{
    AcceptError, Address, BindError, DialReason, GreetError, Hello, HelloError, Identity, Link, LinkError, Listener,
    MAX_FRAME, Members, PREAMBLE_FRAME_MAX, PROTOCOL_VERSION, Purpose, Refusal, TcpLink, TicketBook, greet,
    receive_hello, refuse, welcome,
};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{ClientConfig, ClientConnection, DigitallySignedStruct, SignatureScheme};

/// Long enough for a busy machine; no test waits for it unless it fails.
const PATIENCE: Duration = Duration::from_secs(30);

struct Node {
    identity: Identity,
    listener: Listener,
}

impl Node {
    fn at(addr: &str) -> Self {
        let identity = Identity::generate().unwrap();
        let listener = Listener::bind(&identity, &[addr.parse().unwrap()]).unwrap();
        Self { identity, listener }
    }

    fn port(&self) -> u16 {
        self.listener.local_addrs()[0].port()
    }

    fn addr(&self) -> SocketAddr {
        self.listener.local_addrs()[0]
    }

    fn id(&self) -> NodeId {
        self.identity.node_id()
    }

    /// Both ends of a link to this node, the dialer's first, before the greeting.
    fn pair(&self) -> (Arc<TcpLink>, Arc<TcpLink>) {
        let dialed = dial(self.id(), &[&self.addr().to_string()]).unwrap();
        (dialed, self.listener.accept(PATIENCE).unwrap())
    }
}

fn dial(expected: NodeId, addrs: &[&str]) -> Result<Arc<TcpLink>, brigade_net::ConnectError> {
    let addrs: Vec<Address> = addrs.iter().map(|addr| addr.parse().unwrap()).collect();
    TcpLink::connect(&Identity::generate().unwrap(), expected, &addrs, PATIENCE)
}

/// A port at which nobody listens.
fn dead_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

fn has_ipv6() -> bool {
    TcpListener::bind("[::1]:0").is_ok()
}

fn check_reachable(node: &Node, addr: &str) {
    let dialed = dial(node.id(), &[addr]).unwrap();
    let accepted = node.listener.accept(PATIENCE).unwrap();
    dialed.send(1, &[b"ping"]).unwrap();
    let mut buf = Vec::new();
    assert_eq!(accepted.recv(&mut buf, Some(Instant::now() + PATIENCE)).unwrap(), 1);
    assert_eq!((&buf[..], dialed.peer()), (&b"ping"[..], node.id()));
}

#[test]
fn nodes_are_reached_by_ipv4_ipv6_and_name() {
    let node = Node::at("127.0.0.1:0");
    check_reachable(&node, &node.addr().to_string());
    check_reachable(&node, &format!("localhost:{}", node.port()));
    if has_ipv6() {
        let node = Node::at("[::1]:0");
        check_reachable(&node, &node.addr().to_string());
        let both = Node::at("[::]:0");
        check_reachable(&both, &format!("[::1]:{}", both.port()));
        check_reachable(&both, &format!("127.0.0.1:{}", both.port()));
        let identity = Identity::generate().unwrap();
        let addrs = ["127.0.0.1:0".parse().unwrap(), "[::1]:0".parse().unwrap()];
        let node = Node { listener: Listener::bind(&identity, &addrs).unwrap(), identity };
        node.listener.local_addrs().iter().for_each(|addr| check_reachable(&node, &addr.to_string()));
    }
}

#[test]
fn a_link_from_an_ipv4_peer_shows_an_ipv4_address() {
    if has_ipv6() {
        let node = Node::at("[::]:0");
        let _dialed = dial(node.id(), &[&format!("127.0.0.1:{}", node.port())]).unwrap();
        assert!(node.listener.accept(PATIENCE).unwrap().peer_addr().starts_with("127.0.0.1:"));
    }
}

#[test]
fn another_key_than_the_expected_one_is_refused_by_the_dialer() {
    let (node, other) = (Node::at("127.0.0.1:0"), Node::at("127.0.0.1:0"));
    let error = dial(other.id(), &[&node.addr().to_string()]).unwrap_err();
    let expected = format!("the machine at {} has another key than the ticket says", node.addr());
    assert_eq!(error.to_string(), expected);
    assert!(matches!(error.failures[0].reason, DialReason::WrongKey { found } if found == node.id()));
    // The dialer went before it had shown its key, so there is nobody to accept.
    check_reachable(&node, &node.addr().to_string());
}

#[test]
fn the_first_address_that_works_is_taken() {
    let (node, other) = (Node::at("127.0.0.1:0"), Node::at("127.0.0.1:0"));
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let [dead, wrong] = [format!("127.0.0.1:{}", dead_port()), other.addr().to_string()];
    let [silent, right] = [silent.local_addr().unwrap().to_string(), node.addr().to_string()];
    let link = dial(node.id(), &["no.such.host.invalid:1", &dead, &wrong, &silent, &right]).unwrap();
    assert_eq!(link.peer_addr(), right);
}

#[test]
fn a_failed_dial_says_why_for_each_address() {
    let stranger = TcpListener::bind("127.0.0.1:0").unwrap();
    let stranger_addr = stranger.local_addr().unwrap().to_string();
    let answering = thread::spawn(move || {
        let (mut stream, _) = stranger.accept().unwrap();
        stream.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").unwrap();
        // Waits for the dialer to leave.
        let _ = stream.read_to_end(&mut Vec::new());
    });
    let dead = format!("127.0.0.1:{}", dead_port());
    let text = dial(NodeId::from_bytes([1; 32]), &[&dead, &stranger_addr]).unwrap_err().to_string();
    assert!(text.contains(&format!("cannot reach {dead}: connection refused; is `brigade serve` running")), "{text}");
    assert!(text.contains(&format!("what answers at {stranger_addr} does not speak Brigade's protocol")), "{text}");
    answering.join().unwrap();
    assert_eq!(dial(NodeId::from_bytes([1; 32]), &[]).unwrap_err().to_string(), "no address was given to connect to");
}

#[test]
fn a_machine_that_hangs_up_is_told_from_a_stranger() {
    let busy = TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = busy.local_addr().unwrap().to_string();
    let hanging_up = thread::spawn(move || {
        let (mut stream, _) = busy.accept().unwrap();
        // Read first: closing with unread bytes would be a reset, which says the same less politely.
        assert!(stream.read(&mut [0; 4096]).unwrap() > 0);
    });
    let error = dial(NodeId::from_bytes([1; 32]), &[&addr]).unwrap_err();
    assert!(matches!(error.failures[0].reason, DialReason::HungUp), "{error}");
    hanging_up.join().unwrap();
}

#[test]
fn a_silent_machine_is_given_up_in_time() {
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = Address::from(silent.local_addr().unwrap());
    let (identity, expected) = (Identity::generate().unwrap(), NodeId::from_bytes([1; 32]));
    let error = TcpLink::connect(&identity, expected, &[addr], Duration::from_millis(100)).unwrap_err();
    assert!(matches!(error.failures[..], [ref failure] if matches!(failure.reason, DialReason::TimedOut)), "{error}");
}

#[test]
fn strangers_get_nothing_and_hold_up_nobody() {
    let node = Node::at("127.0.0.1:0");
    // These say nothing until the end of the test.
    let silent: Vec<TcpStream> = (0..10).map(|_| TcpStream::connect(node.addr()).unwrap()).collect();
    for garbage in [&b"GET / HTTP/1.1\r\n\r\n"[..], &[0; 100], &[0x16, 3, 1, 0xff, 0xff, 1], &[0xff; 20_000]] {
        let mut stream = TcpStream::connect(node.addr()).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        // The node may have closed already.
        let _ = stream.write_all(garbage);
        let _ = stream.shutdown(std::net::Shutdown::Write);
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        assert!(answer.len() < 64, "at most a TLS alert");
    }
    let started = Instant::now();
    check_reachable(&node, &node.addr().to_string());
    assert!(started.elapsed() < Duration::from_secs(4), "silent clients hold theirs for 5 s");
    assert_eq!(node.listener.accept(Duration::ZERO).unwrap_err(), AcceptError::TimedOut);
    drop(silent);
}

#[test]
fn a_client_without_a_key_is_refused() {
    let node = Node::at("127.0.0.1:0");
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(TrustAnybody))
        .with_no_client_auth();
    config.alpn_protocols = vec![b"brigade/1".to_vec()];
    let name = ServerName::try_from("brigade").unwrap();
    let mut tls = ClientConnection::new(Arc::new(config), name).unwrap();
    let mut socket = TcpStream::connect(node.addr()).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut stream = rustls::Stream::new(&mut tls, &mut socket);
    // The client's side of the handshake ends before the node has seen that the key is missing.
    let outcome = stream.write_all(b"x").and_then(|()| stream.read_exact(&mut [0]));
    assert!(outcome.is_err());
    assert_eq!(node.listener.accept(Duration::ZERO).unwrap_err(), AcceptError::TimedOut);
}

#[derive(Debug)]
struct TrustAnybody;

impl ServerCertVerifier for TrustAnybody {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ED25519]
    }

    fn requires_raw_public_keys(&self) -> bool {
        true
    }
}

#[test]
fn a_taken_port_and_a_foreign_address_are_told() {
    let node = Node::at("127.0.0.1:0");
    let identity = Identity::generate().unwrap();
    let taken = Listener::bind(&identity, &[node.addr()]).unwrap_err();
    assert!(matches!(taken, BindError::InUse { addr } if addr == node.addr()), "{taken}");
    let foreign = Listener::bind(&identity, &["198.51.100.1:0".parse().unwrap()]).unwrap_err();
    assert!(matches!(foreign, BindError::NotHere { .. }), "{foreign}");
    assert!(matches!(Listener::bind(&identity, &[]), Err(BindError::NoAddress)));
}

#[test]
fn closing_a_listener_wakes_accept_frees_the_port_and_keeps_links() {
    let node = Node::at("127.0.0.1:0");
    let (dialed, accepted) = node.pair();
    thread::scope(|scope| {
        let waiting = scope.spawn(|| node.listener.accept(PATIENCE));
        node.listener.close();
        assert_eq!(waiting.join().unwrap().unwrap_err(), AcceptError::Closed);
    });
    node.listener.close();
    let again = Listener::bind(&node.identity, &[node.addr()]).unwrap();
    assert_eq!(again.local_addrs(), node.listener.local_addrs());
    accepted.send(1, &[b"still here"]).unwrap();
    assert_eq!(dialed.recv(&mut Vec::new(), Some(Instant::now() + PATIENCE)).unwrap(), 1);
}

#[test]
fn many_nodes_connect_at_once() {
    let node = Node::at("127.0.0.1:0");
    let (id, addr) = (node.id(), node.addr().to_string());
    thread::scope(|scope| {
        // As many as one address may have in the handshake.
        let dialers: Vec<_> = (0..16).map(|_| scope.spawn(|| dial(id, &[&addr]).unwrap())).collect();
        let accepted: Vec<_> = (0..16).map(|_| node.listener.accept(PATIENCE).unwrap()).collect();
        let mut peers: Vec<NodeId> = accepted.iter().map(|link| link.peer()).collect();
        peers.sort();
        peers.dedup();
        assert_eq!(peers.len(), 16);
        dialers.into_iter().for_each(|dialer| drop(dialer.join().unwrap()));
    });
}

/// Greets over a fresh link while the listener answers with `answer`.
fn greeted(hello: &Hello, answer: impl FnOnce(&TcpLink, Hello) + Send) -> Result<u16, GreetError> {
    let (dialed, accepted) = Node::at("127.0.0.1:0").pair();
    thread::scope(|scope| {
        scope.spawn(move || answer(&accepted, receive_hello(&*accepted, Instant::now() + PATIENCE).unwrap()));
        greet(&*dialed, hello)
    })
}

#[test]
fn a_newcomer_joins_with_a_ticket_and_returns_without() {
    let state = tempfile::tempdir().unwrap();
    let (mut book, mut members) = (TicketBook::open(state.path()).unwrap(), Members::open(state.path()).unwrap());
    let node = Node::at("127.0.0.1:0");
    let ticket = book.create(node.id(), vec![node.addr().into()], Duration::from_secs(60), 1000).unwrap();
    let ticket: brigade_net::Ticket = ticket.to_string().parse().unwrap();
    let newcomer = Identity::generate().unwrap();
    let mut join = |admission: Option<_>| {
        thread::scope(|scope| {
            scope.spawn(|| {
                let link = node.listener.accept(PATIENCE).unwrap();
                let hello = receive_hello(&*link, Instant::now() + PATIENCE).unwrap();
                let allowed = match &hello.admission {
                    Some(admission) => book.check(admission, 1001),
                    None if members.contains(&link.peer()) => Ok(()),
                    None => Err(Refusal::NotAMember),
                };
                match allowed {
                    Ok(()) => {
                        members.admit(link.peer(), "newcomer", 1001).unwrap();
                        welcome(&*link, hello.common_version().unwrap()).unwrap();
                    }
                    Err(refusal) => refuse(&*link, &refusal),
                }
            });
            let link = TcpLink::connect(&newcomer, ticket.coordinator, &ticket.addrs, PATIENCE).unwrap();
            greet(&*link, &Hello::new(Purpose::Control, admission))
        })
    };
    assert!(matches!(join(None), Err(GreetError::Refused(Refusal::NotAMember))));
    assert_eq!(join(Some(ticket.admission())).unwrap(), PROTOCOL_VERSION);
    assert_eq!(join(None).unwrap(), PROTOCOL_VERSION);
}

#[test]
fn the_greeting_lifts_the_frame_limit_on_both_sides() {
    let (dialed, accepted) = Node::at("127.0.0.1:0").pair();
    let large = vec![1u8; PREAMBLE_FRAME_MAX + 1];
    thread::scope(|scope| {
        scope.spawn(|| {
            receive_hello(&*accepted, Instant::now() + PATIENCE).unwrap();
            welcome(&*accepted, PROTOCOL_VERSION).unwrap();
            accepted.send(5, &[&large]).unwrap();
            assert_eq!(accepted.recv(&mut Vec::new(), Some(Instant::now() + PATIENCE)).unwrap(), 6);
        });
        greet(&*dialed, &Hello::new(Purpose::Data, None)).unwrap();
        assert_eq!(dialed.recv(&mut Vec::new(), Some(Instant::now() + PATIENCE)).unwrap(), 5);
        dialed.send(6, &[&large]).unwrap();
    });
    assert!(large.len() < MAX_FRAME);
}

#[test]
fn refusals_reach_the_dialer_and_end_the_link() {
    let hello = Hello::new(Purpose::Weights, None);
    let stopping = greeted(&hello, |link, seen| {
        assert_eq!(seen.purpose, Purpose::Weights);
        refuse(link, &Refusal::Stopping);
    });
    assert!(matches!(stopping, Err(GreetError::Refused(Refusal::Stopping))));

    let newer = Hello { min_version: PROTOCOL_VERSION + 1, max_version: PROTOCOL_VERSION + 1, ..hello };
    let mismatch = greeted(&newer, |link, seen| refuse(link, &seen.common_version().unwrap_err()));
    let expected = Refusal::VersionMismatch { ours: PROTOCOL_VERSION + 1, theirs: PROTOCOL_VERSION };
    assert!(matches!(mismatch, Err(GreetError::Refused(refusal)) if refusal == expected));
}

#[test]
fn nonsense_in_place_of_an_answer_is_told() {
    let hello = Hello::new(Purpose::Control, None);
    let gone = greeted(&hello, |link, _| link.close());
    assert!(matches!(gone, Err(GreetError::Link(LinkError::Closed))));
    let wrong_version = greeted(&hello, |link, _| welcome(link, PROTOCOL_VERSION + 1).unwrap());
    assert!(matches!(wrong_version, Err(GreetError::Malformed)));
    let wrong_kind = greeted(&hello, |link, _| link.send(1, &[b"hi"]).unwrap());
    assert!(matches!(wrong_kind, Err(GreetError::Malformed)));
    let large = greeted(&hello, |link, _| link.send(1, &[&[0; PREAMBLE_FRAME_MAX + 1]]).unwrap());
    assert!(matches!(large, Err(GreetError::Link(LinkError::FrameTooLarge { .. }))));
}

#[test]
fn a_first_frame_that_is_no_hello_ends_the_link() {
    let node = Node::at("127.0.0.1:0");
    for (kind, payload) in [(1, &b"hi"[..]), (0xF0, b"hi"), (0xF0, b"NOPE\x01\0\x01\0\x01\0")] {
        let (dialed, accepted) = node.pair();
        dialed.send(kind, &[payload]).unwrap();
        let hello = receive_hello(&*accepted, Instant::now() + PATIENCE);
        assert!(matches!(hello, Err(HelloError::Malformed(_))), "{hello:?}");
        assert!(matches!(dialed.recv(&mut Vec::new(), Some(Instant::now() + PATIENCE)), Err(LinkError::Closed)));
    }
    let (_dialed, accepted) = node.pair();
    assert!(matches!(receive_hello(&*accepted, Instant::now()), Err(HelloError::Link(LinkError::TimedOut))));
}
