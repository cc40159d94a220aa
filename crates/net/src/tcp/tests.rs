//! Links over real loopback sockets, with a hand inside to send what no peer should.

use std::sync::Arc;
use std::thread;

use super::*;
use crate::{Address, Identity, Listener};

/// Long enough for a busy machine; no test waits for it unless it fails.
const PATIENCE: Duration = Duration::from_secs(30);

/// Both ends of a fresh link that takes frames of any size.
fn pair() -> (Arc<TcpLink>, Arc<TcpLink>) {
    let (identity, other) = (Identity::generate().unwrap(), Identity::generate().unwrap());
    let listener = Listener::bind(&identity, &["127.0.0.1:0".parse().unwrap()]).unwrap();
    let address = Address::from(listener.local_addrs()[0]);
    let dialed = TcpLink::connect(&other, identity.node_id(), &[address], PATIENCE).unwrap();
    let accepted = listener.accept(PATIENCE).unwrap();
    assert_eq!((dialed.peer(), accepted.peer()), (identity.node_id(), other.node_id()));
    dialed.set_frame_limit(MAX_FRAME);
    accepted.set_frame_limit(MAX_FRAME);
    (dialed, accepted)
}

fn soon() -> Option<Instant> {
    Some(Instant::now() + PATIENCE)
}

fn recv(link: &TcpLink) -> (u8, Vec<u8>) {
    let mut buf = Vec::new();
    let kind = link.recv(&mut buf, soon()).unwrap();
    (kind, buf)
}

/// Sends plaintext that need not be whole frames.
fn send_raw(link: &TcpLink, plaintext: &[u8]) {
    let mut wire = lock(&link.sender);
    let mut tls = lock(&link.tls);
    tls.writer().write_all(plaintext).unwrap();
    drain(&mut tls, &mut wire).unwrap();
    drop(tls);
    link.write_out(&mut wire).unwrap();
}

fn assert_closed(link: &TcpLink) {
    assert!(matches!(link.send(1, &[b"x"]), Err(LinkError::Closed)));
    assert!(matches!(link.recv(&mut Vec::new(), None), Err(LinkError::Closed)));
}

#[test]
fn frames_arrive_whole_in_order_and_counted() {
    let (a, b) = pair();
    let large = vec![7u8; 3 << 20];
    a.send(1, &[]).unwrap();
    a.send(2, &[b"one", b"", b"two"]).unwrap();
    a.send(3, &[b"head", &large, b"tail"]).unwrap();
    assert_eq!(recv(&b), (1, Vec::new()));
    assert_eq!(recv(&b), (2, b"onetwo".to_vec()));
    assert_eq!(recv(&b), (3, [b"head", &large[..], b"tail"].concat()));
    let bytes = (3 * FRAME_HEADER_BYTES + 6 + large.len() + 8) as u64;
    assert_eq!(a.stats(), LinkStats { frames_sent: 3, bytes_sent: bytes, ..LinkStats::default() });
    assert_eq!(b.stats(), LinkStats { frames_received: 3, bytes_received: bytes, ..LinkStats::default() });
    assert_eq!(a.peer_addr(), b.local_addr().unwrap().to_string());
}

#[test]
fn a_received_payload_reuses_the_buffer() {
    let (a, b) = pair();
    let mut buf = Vec::with_capacity(1 << 16);
    let memory = buf.as_ptr();
    for n in [60_000, 5, 0, 30_000] {
        a.send(1, &[&vec![n as u8; n]]).unwrap();
        b.recv(&mut buf, soon()).unwrap();
        assert_eq!((buf.len(), buf.as_ptr()), (n, memory));
    }
}

#[test]
fn both_directions_carry_100_mb_at_once() {
    const TOTAL: usize = 100_000_000;
    let (a, b) = pair();
    thread::scope(|scope| {
        for (link, seed) in [(&a, 1u64), (&b, 2)] {
            scope.spawn(move || {
                let mut content = Content::new(seed);
                let mut payload = Vec::new();
                while content.sent < TOTAL {
                    let kind = content.next(&mut payload);
                    let (front, back) = payload.split_at(payload.len() / 3);
                    link.send(kind, &[front, back]).unwrap();
                }
            });
        }
        for (link, seed) in [(&b, 1u64), (&a, 2)] {
            scope.spawn(move || {
                let mut content = Content::new(seed);
                let (mut expected, mut got) = (Vec::new(), Vec::new());
                while content.sent < TOTAL {
                    let kind = content.next(&mut expected);
                    assert_eq!(link.recv(&mut got, soon()).unwrap(), kind);
                    assert!(got == expected, "frame of {} bytes differs", expected.len());
                }
            });
        }
    });
    assert_eq!(a.stats().frames_sent, b.stats().frames_received);
    assert_eq!(b.stats().bytes_sent, a.stats().bytes_received);
}

/// Frames of all sizes whose content both ends know.
struct Content {
    state: u64,
    sent: usize,
}

impl Content {
    fn new(seed: u64) -> Self {
        Self { state: seed, sent: 0 }
    }

    fn draw(&mut self) -> u64 {
        // Knuth's MMIX generator.
        self.state = self.state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        self.state >> 16
    }

    fn next(&mut self, payload: &mut Vec<u8>) -> u8 {
        let scale = [100, 10_000, 1_000_000, 5_000_000][self.draw() as usize % 4];
        let n = self.draw() as usize % scale;
        let base = self.draw();
        payload.clear();
        payload.extend((0..n.div_ceil(8) as u64).flat_map(|i| (base ^ i).to_le_bytes()));
        payload.truncate(n);
        self.sent += n + FRAME_HEADER_BYTES;
        base as u8
    }
}

#[test]
fn a_sender_that_waits_does_not_stop_the_receiver() {
    let (a, b) = pair();
    let large = vec![1u8; MAX_FRAME];
    thread::scope(|scope| {
        let sender = scope.spawn(|| a.send(1, &[&large]));
        for i in 0..100u8 {
            b.send(2, &[&[i]]).unwrap();
            assert_eq!(recv(&a), (2, vec![i]));
        }
        // No socket buffer holds 64 MiB, and nobody has read any of it.
        assert!(!sender.is_finished());
        assert_eq!(recv(&b).1.len(), MAX_FRAME);
        sender.join().unwrap().unwrap();
    });
}

#[test]
fn a_peer_that_takes_nothing_ends_the_send() {
    let (a, _b) = pair();
    let after = Duration::from_millis(100);
    a.set_write_timeout(after);
    let sent = a.send(1, &[&vec![0; MAX_FRAME]]);
    assert!(matches!(sent, Err(LinkError::Stalled { after: waited }) if waited == after), "{sent:?}");
    assert_closed(&a);
}

#[test]
fn a_frame_above_the_limit_closes_the_link() {
    let (a, b) = pair();
    b.set_frame_limit(PREAMBLE_FRAME_MAX);
    a.send(1, &[&[0; PREAMBLE_FRAME_MAX]]).unwrap();
    assert_eq!(recv(&b).1.len(), PREAMBLE_FRAME_MAX);
    a.send(1, &[&[0; PREAMBLE_FRAME_MAX + 1]]).unwrap();
    let received = b.recv(&mut Vec::new(), soon());
    assert!(matches!(received, Err(LinkError::FrameTooLarge { len: 1025, limit: 1024 })), "{received:?}");
    assert_closed(&b);
    assert!(matches!(a.recv(&mut Vec::new(), soon()), Err(LinkError::Closed)));
}

#[test]
fn the_limit_never_rises_above_the_hard_one_and_an_oversized_frame_is_not_sent() {
    let (a, b) = pair();
    b.set_frame_limit(usize::MAX);
    send_raw(&a, &u32::MAX.to_le_bytes());
    send_raw(&a, &[1]);
    assert!(matches!(b.recv(&mut Vec::new(), soon()), Err(LinkError::FrameTooLarge { limit: MAX_FRAME, .. })));

    let (a, b) = pair();
    let half = vec![0; MAX_FRAME / 2 + 1];
    assert!(matches!(a.send(1, &[&half, &half]), Err(LinkError::FrameTooLarge { limit: MAX_FRAME, .. })));
    a.send(2, &[b"still fine"]).unwrap();
    assert_eq!(recv(&b), (2, b"still fine".to_vec()));
}

#[test]
fn a_frame_cut_off_by_the_end_is_never_delivered() {
    for cut in 1..FRAME_HEADER_BYTES + 3 {
        let (a, b) = pair();
        send_raw(&a, &[&header(1, 3)[..], b"abc"].concat()[..cut]);
        a.close();
        let mut buf = vec![9; 9];
        assert!(matches!(b.recv(&mut buf, soon()), Err(LinkError::Closed)), "{cut}");
        assert!(buf.is_empty());
    }
}

#[test]
fn a_deadline_keeps_the_part_that_arrived() {
    let (a, b) = pair();
    let frame = [&header(7, 6)[..], b"abcdef"].concat();
    let mut buf = Vec::new();
    for byte in &frame {
        let now = Some(Instant::now());
        assert!(matches!(b.recv(&mut buf, now), Err(LinkError::TimedOut)));
        assert!(buf.is_empty());
        send_raw(&a, &[*byte]);
    }
    assert_eq!(recv(&b), (7, b"abcdef".to_vec()));
    a.send(8, &[b"next"]).unwrap();
    assert_eq!(recv(&b), (8, b"next".to_vec()));
}

#[test]
fn a_frame_that_has_arrived_beats_its_deadline() {
    let (a, b) = pair();
    a.send(1, &[b"first"]).unwrap();
    a.send(2, &[b"second"]).unwrap();
    wait(&b.stream, Interest::Read, soon()).unwrap();
    let mut buf = Vec::new();
    assert_eq!(b.recv(&mut buf, Some(Instant::now())).unwrap(), 1);
}

#[test]
fn closing_wakes_a_receiver_on_either_side_and_repeats_harmlessly() {
    for local in [true, false] {
        let (a, b) = pair();
        thread::scope(|scope| {
            let waiting = scope.spawn(|| b.recv(&mut Vec::new(), None));
            // Whether it sleeps already or not yet, it must end.
            if local {
                b.close()
            } else {
                a.close()
            }
            assert!(matches!(waiting.join().unwrap(), Err(LinkError::Closed)));
        });
        a.close();
        b.close();
        assert_closed(&a);
        assert_closed(&b);
    }
}

#[test]
fn closing_wakes_a_sender() {
    let (a, _b) = pair();
    thread::scope(|scope| {
        let sender = scope.spawn(|| a.send(1, &[&vec![0; MAX_FRAME]]));
        a.close();
        assert!(matches!(sender.join().unwrap(), Err(LinkError::Closed)));
    });
}

#[test]
fn what_was_sent_before_the_close_still_arrives() {
    let (a, b) = pair();
    a.send(1, &[b"last words"]).unwrap();
    drop(a);
    // The link ends while sending; what the peer said is there all the same.
    while b.send(2, &[b"anybody there?"]).is_ok() {}
    assert_eq!(recv(&b), (1, b"last words".to_vec()));
    assert!(matches!(b.recv(&mut Vec::new(), soon()), Err(LinkError::Closed)));
    assert_closed(&b);
}

#[test]
fn a_spinning_receiver_gets_frames_deadlines_and_the_end() {
    let (a, b) = pair();
    a.set_spin(PATIENCE);
    b.set_spin(Duration::from_micros(200));
    thread::scope(|scope| {
        scope.spawn(|| {
            for _ in 0..1000 {
                let (kind, payload) = recv(&b);
                b.send(kind, &[&payload]).unwrap();
            }
        });
        for i in 0..1000u32 {
            a.send(i as u8, &[&i.to_le_bytes()]).unwrap();
            assert_eq!(recv(&a), (i as u8, i.to_le_bytes().to_vec()));
        }
    });
    assert!(matches!(a.recv(&mut Vec::new(), Some(Instant::now())), Err(LinkError::TimedOut)));
    thread::scope(|scope| {
        let waiting = scope.spawn(|| a.recv(&mut Vec::new(), None));
        a.close();
        assert!(matches!(waiting.join().unwrap(), Err(LinkError::Closed)));
    });
}

#[test]
fn keys_can_change_while_both_sides_send() {
    let (a, b) = pair();
    thread::scope(|scope| {
        for (link, other) in [(&a, &b), (&b, &a)] {
            scope.spawn(move || {
                for i in 0..1000u32 {
                    if i % 100 == 50 {
                        lock(&link.tls).refresh_traffic_keys().unwrap();
                    }
                    link.send(1, &[&i.to_le_bytes()]).unwrap();
                }
            });
            scope.spawn(move || {
                for i in 0..1000u32 {
                    assert_eq!(recv(other).1, i.to_le_bytes());
                }
            });
        }
    });
}

#[test]
fn a_forged_byte_ends_the_link_and_tells_the_peer() {
    let (a, b) = pair();
    (&a.stream).write_all(&[0x17, 3, 3, 0, 20]).unwrap();
    (&a.stream).write_all(&[0xaa; 20]).unwrap();
    let received = b.recv(&mut Vec::new(), soon());
    assert!(matches!(received, Err(LinkError::Tls(rustls::Error::DecryptError))), "{received:?}");
    assert_closed(&b);
    let told = a.recv(&mut Vec::new(), soon());
    assert!(matches!(told, Err(LinkError::Tls(rustls::Error::AlertReceived(_)))), "{told:?}");
}

#[test]
fn senders_take_turns_by_whole_frames() {
    let (a, b) = pair();
    thread::scope(|scope| {
        for kind in 0..4u8 {
            let a = &a;
            scope.spawn(move || (0..20).for_each(|_| a.send(kind, &[&vec![kind; 600_000]]).unwrap()));
        }
        for _ in 0..80 {
            let (kind, payload) = recv(&b);
            assert!(payload.len() == 600_000 && payload.iter().all(|byte| *byte == kind));
        }
    });
}
