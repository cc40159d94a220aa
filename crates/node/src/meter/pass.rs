//! A pass as the ring thread tells of it, and what it cost where.
//!
//! The ring thread knows when a pass left and when it was back; each worker tells how long it read, waited, computed
//! and wrote. Nodes have no common clock, so what is left of the way around is the wire's, spread evenly over the
//! links.

use std::time::{Duration, Instant};

use brigade_base::PassId;
use brigade_protocol::frame::Timing;
use brigade_protocol::schedule::PassRows;

use super::windows::Hop;
use crate::serving::HopParts;
use crate::threads::micros;

/// A pass that went through all stages. Tell of it before the tokens that it gave.
#[derive(Debug, Clone, Copy)]
pub struct PassReport<'a> {
    /// Which it was.
    pub pass: PassId,
    /// Whose rows: how many of each session, and whether they read its prompt or make its next token.
    pub rows: &'a [PassRows],
    /// All rows together; 0 for a pass that only moved KV caches.
    pub n_rows: u32,
    /// Whether every row is a next token.
    pub is_decode: bool,
    /// Whether KV caches were copied, saved or loaded before the rows.
    pub moves_kv: bool,
    /// When its rows were embedded and its first frame began to be encoded.
    pub sent: Instant,
    /// How long embedding took, before that.
    pub embed: Duration,
    /// How long encoding and writing the first frame took, after that; zero without workers.
    pub write: Duration,
    /// Reading and decoding the last worker's frame, up to `decoded`; zero without workers.
    pub read: Duration,
    /// When that frame was decoded; `sent` without workers.
    pub decoded: Instant,
    /// When the tail began to compute.
    pub tail_begin: Instant,
    /// When it had.
    pub tail_end: Instant,
    /// What each worker spent, in ring order.
    pub timings: &'a [Timing],
    /// Whether no other pass was in the ring all the way; what a hop costs is measured on such.
    pub alone: bool,
}

/// What a stage spent on a pass, in microseconds; see [`StageTrace`](crate::trace::StageTrace).
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Span {
    pub read: u32,
    pub queue: u32,
    pub compute: u32,
    pub frames: u32,
    pub encode: u32,
    pub write: u32,
}

impl Span {
    fn of(timing: &Timing) -> Self {
        Self {
            read: timing.read_us,
            queue: timing.queue_us,
            compute: timing.compute_us,
            frames: timing.n_frames,
            encode: timing.encode_us,
            write: timing.write_us,
        }
    }

    /// The computing time that belongs to this pass alone.
    pub fn share(&self) -> Duration {
        micros_long(self.compute / self.frames.max(1))
    }
}

/// What a pass cost, stage by stage.
#[derive(Debug)]
pub struct Costs {
    /// The stages, the tail last.
    pub spans: Vec<Span>,
    /// Microseconds on each link.
    pub wire: u32,
    /// Missing where there are no links.
    pub hop: Option<Hop>,
}

impl Costs {
    /// Those of a pass.
    pub fn of(report: &PassReport<'_>) -> Self {
        let mut spans = Vec::with_capacity(report.timings.len() + 1);
        spans.extend(report.timings.iter().map(Span::of));
        spans.push(Span {
            read: micros(report.read),
            queue: micros(report.tail_begin.saturating_duration_since(report.decoded)),
            compute: micros(report.tail_end.saturating_duration_since(report.tail_begin)),
            frames: 1,
            ..Span::default()
        });
        let hop = (!report.timings.is_empty()).then(|| hop(report, &spans));
        Self { spans, wire: hop.map_or(0, |hop| hop.parts.wire as u32), hop }
    }

    /// When each stage was done computing, the tail first; `None` before the clock began.
    pub fn ends(&self, report: &PassReport<'_>) -> impl Iterator<Item = Option<Instant>> {
        let wire = micros_long(self.wire);
        let mut arrived = report.decoded.checked_sub(report.read);
        let workers = self.spans.iter().rev().skip(1).map(move |span| {
            let end = arrived.and_then(|at| at.checked_sub(wire + micros_long(span.encode) + micros_long(span.write)));
            let before = micros_long(span.compute) + micros_long(span.queue) + micros_long(span.read);
            arrived = end.and_then(|at| at.checked_sub(before));
            end
        });
        std::iter::once(Some(report.tail_end)).chain(workers)
    }
}

/// What a hop cost on average: all from leaving to the tail that was not computing.
fn hop(report: &PassReport<'_>, spans: &[Span]) -> Hop {
    let n_hops = spans.len() as f64;
    let per_hop = |us: f64| (us / n_hops) as f32;
    let sum = |of: fn(&Span) -> u32| spans.iter().map(|span| f64::from(of(span))).sum::<f64>();
    let around = report.tail_begin.saturating_duration_since(report.sent).as_micros() as f64;
    let tail = spans.last().map_or(0, |tail| tail.compute);
    let total = per_hop((around - (sum(|span| span.compute) - f64::from(tail))).max(0.0));
    let mut parts = HopParts {
        read: per_hop(sum(|span| span.read)),
        queue: per_hop(sum(|span| span.queue)),
        encode: per_hop(sum(|span| span.encode)),
        write: per_hop(sum(|span| span.write) + f64::from(micros(report.write))),
        wire: 0.0,
    };
    // The write is that of the frame before, so the parts may come to more than the whole.
    parts.wire = (total - parts.read - parts.queue - parts.encode - parts.write).max(0.0);
    Hop { total, parts }
}

fn micros_long(us: u32) -> Duration {
    Duration::from_micros(us.into())
}
