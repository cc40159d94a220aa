//! What became of each request: those that are open, and the last that ended.
//!
//! A pass is noted once and shared by all requests that travelled in it. Whoever asks for a trace gets a copy in the
//! words of [`crate::trace`].

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use brigade_base::{PassId, SessionId, TenantId};

use super::pass::Span;
use crate::trace::{PassTrace, RequestTrace, StageTrace};

/// Requests that have ended and are still told of. At one request a second they reach back eight minutes: long enough
/// to see a slow one in the log and look.
pub const MAX_DONE: usize = 512;

/// Open requests that are followed; sixteen times what a coordinator of 256 sessions and as many waiting has. Should
/// somebody forget to end them, the oldest are called ended.
pub const MAX_OPEN: usize = 8192;

/// First passes that are kept of a request: a prompt of 8,192 tokens in chunks of 256.
pub const FIRST_PASSES: usize = 32;

/// Last passes that are kept: where a request that hangs or has just ended shows why. With the first ones, 24 bytes
/// each, 3 KiB per request.
pub const LAST_PASSES: usize = 96;

/// Stages times passes that are kept of a request, so that a long ring takes no more memory than one of eight stages:
/// at 28 bytes each, and if no request ever shared a pass, 21 MiB for all that have ended.
const MAX_SPANS: usize = 8 * (FIRST_PASSES + LAST_PASSES);

/// A pass, for all requests that were in it.
#[derive(Debug)]
pub struct PassInfo {
    /// Which it is.
    pub pass: PassId,
    /// Rows of all requests.
    pub n_rows: u32,
    /// When the coordinator began to embed it.
    pub begin: Instant,
    /// Until the tail was computed.
    pub total: Duration,
    /// Microseconds of embedding.
    pub embed: u32,
    /// Microseconds of writing the first frame.
    pub write: u32,
    /// Microseconds on each link.
    pub wire: u32,
    /// The stages, the tail last.
    pub spans: Box<[Span]>,
    /// Names of their nodes.
    pub nodes: Arc<[String]>,
}

/// A request's part of a pass.
#[derive(Debug)]
struct Part {
    pass: Arc<PassInfo>,
    rows: u32,
    is_prompt: bool,
}

/// Where a request stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// It has never had a slot.
    Waiting,
    /// It has one.
    Running,
    /// It had one, and waits for another.
    Preempted,
    /// It has ended, for this reason.
    Done(&'static str),
}

/// One request; most fields are told of where they are shown, in [`RequestTrace`].
#[derive(Debug)]
pub struct Track {
    pub id: String,
    pub tenant: TenantId,
    pub priority: i32,
    pub state: State,
    pub prompt_tokens: u32,
    pub cached_tokens: u32,
    pub completion_tokens: u32,
    pub preemptions: u32,
    /// Since when it waits for another slot.
    pub preempted: Option<Instant>,
    /// How long it waited for others before.
    pub paused: Duration,
    pub received_unix_ms: u64,
    pub received: Instant,
    pub admitted: Option<Instant>,
    pub first_token: Option<Instant>,
    pub last_token: Option<Instant>,
    pub ended: Option<Instant>,
    first: Vec<Part>,
    last: VecDeque<Part>,
    left_out: u64,
}

impl Track {
    /// A request that has just come in.
    pub fn new(id: String, tenant: TenantId, priority: i32, prompt_tokens: u32, received: (Instant, u64)) -> Self {
        Self {
            id,
            tenant,
            priority,
            state: State::Waiting,
            prompt_tokens,
            cached_tokens: 0,
            completion_tokens: 0,
            preemptions: 0,
            preempted: None,
            paused: Duration::ZERO,
            received: received.0,
            received_unix_ms: received.1,
            admitted: None,
            first_token: None,
            last_token: None,
            ended: None,
            first: Vec::new(),
            last: VecDeque::new(),
            left_out: 0,
        }
    }

    /// Notes that `rows` of its rows were in a pass.
    pub fn pass(&mut self, pass: &Arc<PassInfo>, rows: u32, is_prompt: bool) {
        let part = Part { pass: Arc::clone(pass), rows, is_prompt };
        let most = (MAX_SPANS / pass.spans.len().max(1)).clamp(2, FIRST_PASSES + LAST_PASSES);
        let most_first = (most / 4).max(1);
        if self.first.len() < most_first && self.last.is_empty() {
            return self.first.push(part);
        }
        while self.last.len() >= most - most_first {
            self.last.pop_front();
            self.left_out += 1;
        }
        self.last.push_back(part);
    }

    fn since(&self, at: Instant) -> f64 {
        ms(at.saturating_duration_since(self.received))
    }

    fn tell(&self, now: Instant) -> RequestTrace {
        let (state, finish) = match self.state {
            State::Waiting => ("waiting", None),
            State::Running => ("running", None),
            State::Preempted => ("preempted", None),
            State::Done(reason) => ("done", Some(reason)),
        };
        let until = self.ended.unwrap_or(now);
        let waits = self.preempted.map_or(Duration::ZERO, |since| until.saturating_duration_since(since));
        RequestTrace {
            id: self.id.clone(),
            tenant: self.tenant,
            state,
            finish,
            priority: self.priority,
            prompt_tokens: self.prompt_tokens,
            cached_tokens: self.cached_tokens,
            completion_tokens: self.completion_tokens,
            preemptions: self.preemptions,
            preempted_ms: ms(self.paused + waits),
            received_unix_ms: self.received_unix_ms,
            queued_ms: self.admitted.map(|at| self.since(at)),
            first_token_ms: self.first_token.map(|at| self.since(at)),
            total_ms: self.since(until),
            passes: self.first.iter().chain(&self.last).map(|part| self.tell_pass(part)).collect(),
            passes_left_out: self.left_out,
        }
    }

    fn tell_pass(&self, part: &Part) -> PassTrace {
        let pass = &*part.pass;
        let has_links = pass.spans.len() > 1;
        let tell_span = |(k, span): (usize, &Span)| StageTrace {
            stage: k as u32,
            node: pass.nodes.get(k).cloned().unwrap_or_default(),
            wire_us: if has_links { pass.wire } else { 0 },
            read_us: span.read,
            queue_us: span.queue,
            compute_us: span.compute,
            frames: span.frames,
            encode_us: span.encode,
            write_us: span.write,
        };
        PassTrace {
            pass: pass.pass.0,
            kind: if part.is_prompt { "prefill" } else { "decode" },
            rows: part.rows,
            pass_rows: pass.n_rows,
            at_ms: self.since(pass.begin),
            total_ms: ms(pass.total),
            embed_us: pass.embed,
            write_us: pass.write,
            stages: pass.spans.iter().enumerate().map(tell_span).collect(),
        }
    }
}

/// Milliseconds to the microsecond.
fn ms(span: Duration) -> f64 {
    span.as_micros() as f64 / 1000.0
}

/// All requests that are told of.
#[derive(Debug, Default)]
pub struct Traces {
    open: HashMap<SessionId, Track>,
    done: VecDeque<Track>,
}

impl Traces {
    /// Follows a new request. Gives the oldest one back if too many are open; it is forgotten.
    pub fn begin(&mut self, session: SessionId, track: Track) -> Option<Track> {
        let forgotten = if self.open.len() < MAX_OPEN { None } else { self.open.keys().min().copied() };
        let forgotten = forgotten.and_then(|session| self.open.remove(&session));
        self.open.insert(session, track);
        forgotten
    }

    /// An open request.
    pub fn open(&mut self, session: SessionId) -> Option<&mut Track> {
        self.open.get_mut(&session)
    }

    /// No more an open request.
    pub fn take(&mut self, session: SessionId) -> Option<Track> {
        self.open.remove(&session)
    }

    /// Keeps a request that has ended.
    pub fn keep(&mut self, track: Track) {
        if self.done.len() == MAX_DONE {
            self.done.pop_front();
        }
        self.done.push_back(track);
    }

    /// Whether nothing is open.
    pub fn is_idle(&self) -> bool {
        self.open.is_empty()
    }

    /// What is known at `now` of the request with this id; the latest, should there be several.
    pub fn find(&self, id: &str, now: Instant) -> Option<RequestTrace> {
        let open = self.open.values().filter(|track| track.id == id).max_by_key(|track| track.received);
        open.or_else(|| self.done.iter().rev().find(|track| track.id == id)).map(|track| track.tell(now))
    }

    /// How many requests are open, and how many others are told of.
    #[cfg(test)]
    pub fn len(&self) -> (usize, usize) {
        (self.open.len(), self.done.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pass(n: u64, n_stages: usize) -> Arc<PassInfo> {
        Arc::new(PassInfo {
            pass: PassId(n),
            n_rows: 1,
            begin: Instant::now(),
            total: Duration::ZERO,
            embed: 0,
            write: 0,
            wire: 0,
            spans: vec![Span::default(); n_stages].into(),
            nodes: Arc::new([]),
        })
    }

    fn after(n_passes: u64, n_stages: usize) -> Track {
        let mut track = Track::new("a".to_owned(), TenantId(0), 0, 5, (Instant::now(), 0));
        for n in 0..n_passes {
            track.pass(&pass(n, n_stages), 1, n == 0);
        }
        track
    }

    #[test]
    fn the_first_and_the_last_passes_are_kept() {
        let trace = after(1_000, 3).tell(Instant::now());
        let numbers: Vec<u64> = trace.passes.iter().map(|pass| pass.pass).collect();
        let expected: Vec<u64> = (0..FIRST_PASSES as u64).chain(1_000 - LAST_PASSES as u64..1_000).collect();
        assert_eq!(numbers, expected);
        assert_eq!(trace.passes_left_out, 1_000 - expected.len() as u64);
        assert_eq!((trace.passes[0].kind, trace.passes[1].kind), ("prefill", "decode"));
        assert_eq!(after(128, 3).tell(Instant::now()).passes_left_out, 0);
    }

    #[test]
    fn a_long_ring_takes_no_more_memory() {
        for n_stages in [1, 8, 9, 50, 1024] {
            let track = after(1_000, n_stages);
            let kept = track.first.len() + track.last.len();
            assert!(kept >= 2 && (kept * n_stages <= MAX_SPANS || kept == 2), "{kept} of {n_stages} stages");
            assert_eq!(track.left_out + kept as u64, 1_000);
        }
    }

    #[test]
    fn requests_that_nobody_ends_are_forgotten() {
        let mut traces = Traces::default();
        let mut n_forgotten = 0;
        for n in 0..MAX_OPEN as u64 + 10 {
            n_forgotten += usize::from(traces.begin(SessionId(n), after(0, 1)).is_some());
        }
        assert_eq!((traces.len().0, n_forgotten), (MAX_OPEN, 10));
        assert!(traces.open(SessionId(9)).is_none() && traces.open(SessionId(10)).is_some());
    }
}
