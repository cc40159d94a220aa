//! Measures one link over loopback: round trips of small frames, sleeping and spinning, and a stream of large ones.
//!
//! `cargo run --release -p brigade-net --example link_speed`

use std::error::Error;
use std::io::Write;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use brigade_net::{Identity, Link, Listener, MAX_FRAME, TcpLink};

/// Frames that are answered; all others are only counted.
const PING: u8 = 1;
const STREAM: u8 = 2;
const N_ROUNDS: usize = 2000;
const STREAM_BYTES: usize = 1 << 30;

fn main() -> Result<(), Box<dyn Error>> {
    let mut out = std::io::stdout();
    let (near, far) = pair()?;
    let echo = thread::spawn(move || {
        let mut buf = Vec::new();
        while let Ok(kind) = far.recv(&mut buf, None) {
            // The spin that the near side uses travels in the frame's kind, so that both sleep or spin alike.
            far.set_spin(if kind & 4 == 0 { Duration::ZERO } else { SPIN });
            if kind & PING != 0 && far.send(kind, &[&buf]).is_err() {
                return;
            }
        }
    });
    for (name, spin, flag) in [("sleeping", Duration::ZERO, 0), ("spinning", SPIN, 4)] {
        near.set_spin(spin);
        for len in [64, 8 << 10, 32 << 10, 256 << 10, 4 << 20] {
            let mut times = round_trips(&near, PING | flag, len)?;
            times.sort();
            let (p50, p99) = (times[times.len() / 2], times[times.len() * 99 / 100]);
            writeln!(out, "{name}  {len:>8} B  p50 {p50:>9.1?}  p99 {p99:>9.1?}")?;
        }
    }
    for len in [8 << 10, 32 << 10, 256 << 10, 4 << 20] {
        let payload = vec![1u8; len];
        let start = Instant::now();
        for _ in 0..STREAM_BYTES / len {
            near.send(STREAM, &[&payload])?;
        }
        round_trips(&near, PING, 1)?;
        let speed = STREAM_BYTES as f64 / start.elapsed().as_secs_f64() / 1e6;
        writeln!(out, "stream    {len:>8} B  {speed:>6.0} MB/s")?;
    }
    near.close();
    echo.join().map_err(|_| "the echo thread panicked")?;
    Ok(())
}

/// As long as a hot path would spin.
const SPIN: Duration = Duration::from_micros(200);

fn pair() -> Result<(Arc<TcpLink>, Arc<TcpLink>), Box<dyn Error>> {
    let identity = Identity::generate()?;
    let listener = Listener::bind(&identity, &["127.0.0.1:0".parse()?])?;
    let address = listener.local_addrs()[0].into();
    let near = TcpLink::connect(&Identity::generate()?, identity.node_id(), &[address], Duration::from_secs(5))?;
    let far = listener.accept(Duration::from_secs(5))?;
    near.set_frame_limit(MAX_FRAME);
    far.set_frame_limit(MAX_FRAME);
    Ok((near, far))
}

fn round_trips(link: &TcpLink, kind: u8, len: usize) -> Result<Vec<Duration>, Box<dyn Error>> {
    let (payload, mut answer) = (vec![7u8; len], Vec::new());
    let n_rounds = if len > 1 << 20 { N_ROUNDS / 10 } else { N_ROUNDS };
    (0..n_rounds)
        .map(|_| {
            let start = Instant::now();
            link.send(kind, &[&payload])?;
            link.recv(&mut answer, None)?;
            Ok(start.elapsed())
        })
        .collect()
}
