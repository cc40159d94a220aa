//! Links that are as slow as real ones: a TCP forwarder that delays and limits what it carries.
//!
//! A [`Wire`] is one direction between two machines. Bytes enter it one after the other at its rate, and leave it after
//! its latency; all connections that use it share its rate, as they share a cable. A [`Shaper`] carries connections to
//! one place, each over two wires, *there* and *back*.
//!
//! Each connection has four threads, two for each direction: one reads pieces and asks the wire when their last byte
//! would be there, the other waits until then and writes. Between them is a queue, so that reading never waits for a
//! latency. A shaper stops listening when it is dropped; its connections go on to their own end.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use socket2::SockRef;

use crate::random::Random;

/// Bytes that are delayed together. A frame of one token is one piece for all widths up to 4096; at 50 Mb/s a piece
/// takes 2.6 ms, so what shares the wire waits no longer than for one Ethernet switch's worth of packets.
const PIECE_BYTES: usize = 16 << 10;

/// Pieces of a connection that may be on their way: 4 MiB, what 1 Gb/s carries in 33 ms. A wire with more latency and
/// rate than that would be limited by it, as a connection with so small a window would.
const MAX_PIECES: usize = 256;

/// How soon a dropped shaper stops listening.
const LOOK: Duration = Duration::from_millis(100);

/// What a direction of a link does.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LinkShape {
    /// From one end to the other, beside what sending the bytes takes.
    pub latency: Duration,
    /// Up to so much more, at random for each piece; order is kept.
    pub jitter: Duration,
    /// Bytes in a second.
    pub bytes_per_s: f64,
}

/// One direction between two machines.
#[derive(Debug)]
pub struct Wire {
    shape: LinkShape,
    state: Mutex<WireState>,
}

#[derive(Debug)]
struct WireState {
    /// When the last byte that was given has entered.
    free_at: Option<Instant>,
    random: Random,
}

impl Wire {
    /// A wire on which nothing is; jitter follows from `seed`.
    pub fn new(shape: LinkShape, seed: u64) -> Self {
        Self { shape, state: Mutex::new(WireState { free_at: None, random: Random::new(seed) }) }
    }

    /// When the last of `n_bytes` that come now is at the other end.
    fn carry(&self, n_bytes: usize, now: Instant) -> Instant {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let entered = Duration::from_secs_f64(n_bytes as f64 / self.shape.bytes_per_s);
        let free_at = state.free_at.map_or(now, |free_at| free_at.max(now)) + entered;
        state.free_at = Some(free_at);
        let jitter = Duration::from_nanos(state.random.within(0, self.shape.jitter.as_nanos() as u64 + 1));
        free_at + self.shape.latency + jitter
    }
}

/// Makes a connection to what a shaper leads to.
type Dial = dyn Fn() -> io::Result<TcpStream> + Send + Sync;

/// A forwarder to one place.
pub struct Shaper {
    is_over: Arc<AtomicBool>,
}

/// What all connections of a shaper share.
struct Way {
    dial: Box<Dial>,
    there: Arc<Wire>,
    back: Arc<Wire>,
}

impl Shaper {
    /// Carries connections that come in at `listener` to where `dial` leads, which is called in a thread of its own for
    /// each: what is sent goes over `there`, what is answered over `back`.
    ///
    /// # Errors
    /// If the listener cannot be set up or no thread be started.
    pub fn start(
        listener: TcpListener,
        dial: impl Fn() -> io::Result<TcpStream> + Send + Sync + 'static,
        there: Arc<Wire>,
        back: Arc<Wire>,
    ) -> io::Result<Self> {
        // It bounds accepting, too.
        SockRef::from(&listener).set_read_timeout(Some(LOOK))?;
        let is_over = Arc::new(AtomicBool::new(false));
        let (way, until) = (Arc::new(Way { dial: Box::new(dial), there, back }), Arc::clone(&is_over));
        let accept = move || {
            while !until.load(Ordering::Relaxed) {
                let Ok((near, _)) = listener.accept() else { continue };
                let way = Arc::clone(&way);
                // Whoever dialled sees that the connection ends at once.
                std::thread::spawn(move || drop(way.carry(&near)));
            }
        };
        std::thread::Builder::new().name("shaper".to_owned()).spawn(accept)?;
        Ok(Self { is_over })
    }
}

impl Drop for Shaper {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::Relaxed);
    }
}

impl Way {
    fn carry(&self, near: &TcpStream) -> io::Result<()> {
        let far = (self.dial)()?;
        for end in [near, &far] {
            end.set_read_timeout(None)?;
            end.set_nodelay(true)?;
        }
        carry_one_way(near.try_clone()?, far.try_clone()?, &self.there)?;
        carry_one_way(far, near.try_clone()?, &self.back)
    }
}

/// Carries what comes in at `from` to `to` until either ends, in two threads.
fn carry_one_way(from: TcpStream, to: TcpStream, wire: &Arc<Wire>) -> io::Result<()> {
    let (sender, pieces) = sync_channel(MAX_PIECES);
    let wire = Arc::clone(wire);
    std::thread::Builder::new().name("shaper-in".to_owned()).spawn(move || read(&from, &wire, &sender))?;
    std::thread::Builder::new().name("shaper-out".to_owned()).spawn(move || write(&to, &pieces))?;
    Ok(())
}

/// Bytes, and when they are at the other end; none for the end of all.
type Piece = (Instant, Vec<u8>);

fn read(mut from: &TcpStream, wire: &Wire, pieces: &SyncSender<Piece>) {
    let mut buffer = vec![0; PIECE_BYTES];
    loop {
        let n = match from.read(&mut buffer) {
            Ok(n) => n,
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            // A reset is an end, too.
            Err(_) => 0,
        };
        let arrives_at = wire.carry(n, Instant::now());
        if pieces.send((arrives_at, buffer[..n].to_vec())).is_err() || n == 0 {
            return;
        }
    }
}

fn write(mut to: &TcpStream, pieces: &Receiver<Piece>) {
    for (arrives_at, bytes) in pieces {
        std::thread::sleep(arrives_at.saturating_duration_since(Instant::now()));
        if bytes.is_empty() {
            let _ = to.shutdown(Shutdown::Write);
            return;
        }
        if to.write_all(&bytes).is_err() {
            // Wakes the reader of the other direction, which ends the other end in turn.
            let _ = to.shutdown(Shutdown::Both);
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn shape(latency_ms: u32, bytes_per_s: f64) -> LinkShape {
        LinkShape { latency: MS * latency_ms, jitter: Duration::ZERO, bytes_per_s }
    }

    #[test]
    fn bytes_enter_one_after_the_other_and_leave_after_the_latency() {
        let (wire, now) = (Wire::new(shape(20, 1000.0), 1), Instant::now());
        let after = |n, at: u32| (wire.carry(n, now + MS * at) - now).as_millis();
        assert_eq!([after(100, 0), after(100, 0), after(100, 50)], [120, 220, 320], "they share the rate");
        assert_eq!(after(10, 1000), 1030, "an idle wire keeps nothing for later");
    }

    #[test]
    fn jitter_adds_up_to_its_bound_and_follows_from_the_seed() {
        let now = Instant::now();
        let draw = |seed| {
            let wire = Wire::new(LinkShape { jitter: 5 * MS, ..shape(10, 1e12) }, seed);
            (0..50).map(|k| wire.carry(1, now + MS * k) - (now + MS * k)).collect::<Vec<_>>()
        };
        assert_eq!(draw(1), draw(1));
        assert!(draw(2).iter().all(|after| (10 * MS..16 * MS).contains(after)) && draw(1) != draw(2));
    }

    /// A connection through a shaper, and what is at its other end.
    fn connect(there: LinkShape, back: LinkShape) -> (Shaper, TcpStream, TcpStream) {
        let target = TcpListener::bind("127.0.0.1:0").unwrap();
        let (listener, to) = (TcpListener::bind("127.0.0.1:0").unwrap(), target.local_addr().unwrap());
        let at = listener.local_addr().unwrap();
        let wires = (Arc::new(Wire::new(there, 1)), Arc::new(Wire::new(back, 2)));
        let shaper = Shaper::start(listener, move || TcpStream::connect(to), wires.0, wires.1).unwrap();
        let near = TcpStream::connect(at).unwrap();
        (shaper, near, target.accept().unwrap().0)
    }

    #[test]
    fn each_direction_has_its_own_latency() {
        let (_shaper, mut near, mut far) = connect(shape(60, 1e9), shape(5, 1e9));
        let mut one_way = |is_there: bool| {
            let (from, to) = if is_there { (&mut near, &mut far) } else { (&mut far, &mut near) };
            let sent = Instant::now();
            from.write_all(b"token").unwrap();
            to.read_exact(&mut [0; 5]).unwrap();
            sent.elapsed()
        };
        // No wire is early; how late a busy machine makes it is not tested beyond telling the two apart.
        let took: Vec<Duration> = (0..3).map(|_| one_way(true)).collect();
        assert!(took.iter().all(|took| *took >= 60 * MS), "{took:?}");
        let took = (0..5).map(|_| one_way(false)).min().unwrap();
        assert!((5 * MS..50 * MS).contains(&took), "{took:?}");
    }

    #[test]
    fn a_transfer_takes_as_long_as_its_rate_says_and_arrives_whole() {
        let (_shaper, mut near, mut far) = connect(shape(1, 4e6), shape(1, 1e9));
        let bytes: Vec<u8> = (0..1_000_000u32).map(|k| (k % 251) as u8).collect();
        let (sent, expected) = (Instant::now(), bytes.clone());
        let sender = std::thread::spawn(move || {
            near.write_all(&bytes).unwrap();
            near.shutdown(Shutdown::Write).unwrap();
            near
        });
        let mut received = Vec::new();
        far.read_to_end(&mut received).unwrap();
        let took = sent.elapsed();
        assert!(received == expected && (250 * MS..2000 * MS).contains(&took), "{took:?}");
        // The other direction is still open.
        far.write_all(b"thanks").unwrap();
        drop(far);
        let mut answer = String::new();
        sender.join().unwrap().read_to_string(&mut answer).unwrap();
        assert_eq!(answer, "thanks");
    }

    #[test]
    fn who_dials_hears_that_there_is_nobody() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let at = listener.local_addr().unwrap();
        let wire = Arc::new(Wire::new(shape(1, 1e9), 1));
        let nobody = || Err(ErrorKind::ConnectionRefused.into());
        let shaper = Shaper::start(listener, nobody, Arc::clone(&wire), wire).unwrap();
        assert_eq!(TcpStream::connect(at).unwrap().read(&mut [0]).unwrap_or(0), 0);
        drop(shaper);
        let deadline = Instant::now() + Duration::from_secs(20);
        while TcpStream::connect(at).is_ok() {
            assert!(Instant::now() < deadline, "it listens on");
        }
    }
}
