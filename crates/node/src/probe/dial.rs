//! Measuring the link to another node.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use brigade_net::{
    Address, ConnectError, GreetError, Hello, Identity, Link, LinkError, Purpose, Refusal, TcpLink, greet,
};
use brigade_plan::LinkProfile;
use brigade_protocol::control::Peer;
use brigade_protocol::kind;
use brigade_protocol::measure::LinkReport;

use super::{MAX_TIME, MAX_TRANSFER};

/// How long the other node may take to be reached: it is here, and a handshake takes three round trips.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);

/// How long a link is measured at most: on one that is slow this side is to give up first, and knows that it was slow.
const PATIENCE: Duration = MAX_TIME.saturating_sub(Duration::from_millis(200));

/// Bytes of a small frame each way: a pass without rows, and far below a packet.
const SMALL: usize = 64;

/// Bytes of a row of 2048 values.
const ROW: usize = 8 << 10;

/// Round trips of small frames: enough for a 95th percentile.
const N_SMALL: usize = 20;

/// Round trips of rows, for their median.
const N_ROWS: usize = 9;

/// Round trips that are not counted: they find the buffers of both ends cold.
const N_WARM_UP: usize = 3;

/// Pause between two round trips. A ring's frames come some milliseconds apart, and find readers asleep: being woken
/// takes longer than a short way.
const PAUSE: Duration = Duration::from_millis(2);

/// First transfer that is timed for bandwidth; each next one is twice as large.
const FIRST_TRANSFER: usize = 64 << 10;

/// Transfers of the largest size: the best of a few.
const N_LARGEST: usize = 2;

/// How much of what a filled link carries in a second is on its way at once, in two frames. Enough to fill the queue of
/// a router, which is where small frames then wait.
const FILL_S: f64 = 0.05;

/// How long each way is kept full: some fast round trips.
const FILL_TIME: Duration = Duration::from_millis(40);

/// Most bytes that keep one way full. A link that carries them in [`FILL_TIME`] is faster than any network of a home.
const MAX_FILL: usize = 48 << 20;

/// The link to a node cannot be measured.
#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    /// It was not reached.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// It refused.
    #[error(transparent)]
    Greet(#[from] GreetError),
    /// The link broke, or no answer came.
    #[error("the link broke while it was measured: {0}")]
    Link(#[from] LinkError),
    /// Something else came back.
    #[error("the other node does not answer probes as it should; install the same release of Brigade on both")]
    Nonsense,
}

impl ProbeError {
    /// Whether the other node is only busy, or has not heard yet of this one.
    pub fn is_passing(&self) -> bool {
        match self {
            Self::Greet(GreetError::Refused(refusal)) => {
                matches!(refusal, Refusal::Busy | Refusal::Stopping | Refusal::NotExpected(_))
            }
            Self::Link(LinkError::Closed) => true,
            Self::Greet(_) | Self::Connect(_) | Self::Link(_) | Self::Nonsense => false,
        }
    }
}

/// Measures the link to `peer`, which takes about as long as `within`; on a link so slow that nothing is measured by
/// then, as long as one transfer each way takes, but at most [`PATIENCE`] for each.
///
/// A latency is from the first byte that is sent to the first that is received, between the threads that send and
/// receive: encryption, system calls, both kernels, the way, and waking the reader up. What a hop costs beyond that,
/// handing the frame to the thread that computes, is in [`brigade_plan::Speed::pass_s`]. It is chosen such that a
/// single row takes as long as was measured, since that is what travels most; but it is no less than half of a small
/// frame's round trip.
///
/// # Errors
/// If the node is not reached, refuses, or the link breaks.
pub fn probe(identity: &Identity, peer: &Peer, within: Duration) -> Result<LinkReport, ProbeError> {
    let mut first = Probe::dial(identity, peer)?;
    let begin = Instant::now();
    let share = |of: f64| begin + within.mul_f64(of);
    let small = first.round_trips(SMALL, N_SMALL, share(0.2))?;
    let rows = first.round_trips(ROW, N_ROWS, share(0.3))?;
    let rtt = small.median();
    // What a row takes longer than a small frame; says nothing on a fast link, and enough on one that is too slow for
    // more.
    let slow_rate = 2.0 * ROW as f64 / (rows.median() - rtt).max(1e-9);
    let there = first.rate(Way::There, rtt, slow_rate, within.mul_f64(0.25))?;
    // A link of its own, since the first one's time may be over by now if it is slow.
    let mut second = Probe::dial(identity, peer)?;
    let back = second.rate(Way::Back, rtt, slow_rate, within.mul_f64(0.25))?;
    let loaded = first.loaded(&mut second, [there, back], share(1.0)).unwrap_or_else(|error| {
        tracing::debug!(peer = %peer.node.short(), %error, "the full link was not measured");
        small.p95()
    });
    let row_wire_s = ROW as f64 * (1.0 / there + 1.0 / back);
    let latency_s = ((rows.median() - row_wire_s) / 2.0).max(rtt / 2.0);
    Ok(LinkReport {
        peer: peer.node,
        there: LinkProfile { latency_s, bytes_per_s: there },
        back: LinkProfile { latency_s, bytes_per_s: back },
        jitter_s: small.p95() - rtt,
        loaded_rtt_s: loaded.max(rtt),
    })
}

/// Which way a transfer goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    There,
    Back,
}

impl Way {
    /// Bytes there and back, where so many go this way and a small frame the other.
    fn frames(self, n_bytes: usize) -> (usize, usize) {
        match self {
            Self::There => (n_bytes, SMALL),
            Self::Back => (SMALL, n_bytes),
        }
    }
}

/// Seconds of some round trips, ascending, never empty.
struct Trips(Vec<f64>);

impl Trips {
    fn of(mut seconds: Vec<f64>) -> Self {
        seconds.sort_by(f64::total_cmp);
        Self(seconds)
    }

    fn median(&self) -> f64 {
        self.at(0.5)
    }

    fn p95(&self) -> f64 {
        self.at(0.95)
    }

    fn at(&self, share: f64) -> f64 {
        let last = self.0.len() - 1;
        self.0[(share * last as f64).round() as usize]
    }
}

/// A link that is measured, and its buffers.
struct Probe {
    link: Arc<TcpLink>,
    /// The other node ends the link a little later.
    until: Instant,
    padding: Vec<u8>,
    answer: Vec<u8>,
}

impl Probe {
    fn dial(identity: &Identity, peer: &Peer) -> Result<Self, ProbeError> {
        // A peer's addresses may hold one that this build cannot read; the others still count.
        let addresses: Vec<Address> = peer.addresses.iter().filter_map(|text| text.parse().ok()).collect();
        let link = TcpLink::connect(identity, peer.node, &addresses, CONNECT_TIMEOUT)?;
        greet(&*link, &Hello::new(Purpose::Probe, None))?;
        link.set_frame_limit(MAX_TRANSFER);
        link.set_write_timeout(PATIENCE);
        Ok(Self { link, until: Instant::now() + PATIENCE, padding: Vec::new(), answer: Vec::new() })
    }

    /// Sends a frame of `n_there` bytes, for which `n_back` are to come.
    fn send(&mut self, n_there: usize, n_back: usize) -> Result<(), LinkError> {
        let wanted = (n_back as u32).to_le_bytes();
        let n_padding = n_there.saturating_sub(wanted.len());
        if self.padding.len() < n_padding {
            self.padding.resize(n_padding, 0);
        }
        self.link.send(kind::PROBE, &[&wanted, &self.padding[..n_padding]])
    }

    /// Waits for an answer of `n_back` bytes.
    fn recv(&mut self, n_back: usize) -> Result<(), ProbeError> {
        let kind = self.link.recv(&mut self.answer, Some(self.until))?;
        if kind == kind::PROBE_BACK && self.answer.len() == n_back { Ok(()) } else { Err(ProbeError::Nonsense) }
    }

    /// Seconds of one round trip.
    fn round_trip(&mut self, (n_there, n_back): (usize, usize)) -> Result<f64, ProbeError> {
        let begin = Instant::now();
        self.send(n_there, n_back)?;
        self.recv(n_back)?;
        Ok(begin.elapsed().as_secs_f64())
    }

    /// Up to `n` round trips with as many bytes each way, one after the other until it is late; one at least.
    fn round_trips(&mut self, n_bytes: usize, n: usize, until: Instant) -> Result<Trips, ProbeError> {
        let mut seconds = Vec::with_capacity(n + N_WARM_UP);
        for _ in 0..n + N_WARM_UP {
            seconds.push(self.round_trip((n_bytes, n_bytes))?);
            if Instant::now() >= until {
                break;
            }
            thread::sleep(PAUSE);
        }
        seconds.drain(..N_WARM_UP.min(seconds.len() - 1));
        Ok(Trips::of(seconds))
    }

    /// Bytes in a second on one way: the best of the last transfers, each twice as large as the one before, as many as
    /// fit into `within`; one at least. If not even that one arrives, `slow_rate`, or what the time says if that is
    /// less.
    ///
    /// The round trip of a small frame is taken off each. On a far link the first transfers take more of those, since
    /// TCP begins slowly; so do a ring's frames there, after each pause.
    fn rate(&mut self, way: Way, rtt: f64, slow_rate: f64, within: Duration) -> Result<f64, ProbeError> {
        let begin = Instant::now();
        let mut rates: Vec<f64> = Vec::new();
        let mut n_bytes = FIRST_TRANSFER;
        let mut n_largest = 0;
        loop {
            let seconds = match self.round_trip(way.frames(n_bytes)) {
                Ok(seconds) => seconds,
                Err(ProbeError::Link(LinkError::TimedOut | LinkError::Stalled { .. })) if rates.is_empty() => {
                    return Ok(slow_rate.min(n_bytes as f64 / begin.elapsed().as_secs_f64()));
                }
                Err(error) => return Err(error),
            };
            // One that was lucky on its way does not make the link faster than ten times what it took.
            let rate = n_bytes as f64 / (seconds - rtt).max(0.1 * seconds);
            rates.push(rate);
            n_largest += usize::from(n_bytes == MAX_TRANSFER);
            n_bytes = (2 * n_bytes).min(MAX_TRANSFER);
            let next_s = rtt + n_bytes as f64 / rate;
            if n_largest >= N_LARGEST || begin.elapsed().as_secs_f64() + next_s > within.as_secs_f64() {
                let later = &rates[rates.len().saturating_sub(N_LARGEST)..];
                return Ok(later.iter().copied().fold(0.0, f64::max));
            }
        }
    }

    /// Seconds of a small frame's round trip over `quiet` while this link is full, first one way, then the other; the
    /// longer of both medians. `rates` are bytes in a second there and back.
    fn loaded(&mut self, quiet: &mut Self, rates: [f64; 2], until: Instant) -> Result<f64, ProbeError> {
        let mut longest = 0.0f64;
        for (n_left, (way, rate)) in [(2, (Way::There, rates[0])), (1, (Way::Back, rates[1]))] {
            let n_bytes = ((rate * FILL_S) as usize / 2).clamp(SMALL, MAX_TRANSFER);
            let now = Instant::now();
            let until = now + FILL_TIME.min(until.saturating_duration_since(now) / n_left);
            let stop = AtomicBool::new(false);
            let seconds = thread::scope(|scope| {
                let filler = scope.spawn(|| self.fill(way.frames(n_bytes), &stop));
                let trips = quiet.round_trips(SMALL, N_SMALL, until);
                stop.store(true, Ordering::Relaxed);
                let filled = filler.join().unwrap_or(Err(ProbeError::Nonsense));
                filled.and(trips).map(|trips| trips.median())
            })?;
            longest = longest.max(seconds);
        }
        Ok(longest)
    }

    /// Keeps two frames on their way until it is told to stop. Only one way is filled: an answer that is as large as
    /// what this side sends would have both wait for the other one to read.
    fn fill(&mut self, (n_there, n_back): (usize, usize), stop: &AtomicBool) -> Result<(), ProbeError> {
        self.send(n_there, n_back)?;
        let mut n_bytes = 2 * (n_there + n_back);
        while !stop.load(Ordering::Relaxed) && n_bytes <= MAX_FILL {
            self.send(n_there, n_back)?;
            self.recv(n_back)?;
            n_bytes += n_there + n_back;
        }
        self.recv(n_back)
    }
}

impl Drop for Probe {
    fn drop(&mut self) {
        self.link.close();
    }
}
