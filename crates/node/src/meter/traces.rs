//! What became of each request: those that are open, and the last that ended.
//!
//! A pass is noted once and shared by all requests that travelled in it. Whoever asks for a trace gets a copy in the
//! words of [`crate::trace`].
//!
//! A completion is one session. A request of many texts has one for each, of which a few are open at once; they are one
//! request here, known by their common id. It ends when all of them are done, or with the first that fails. One whose
//! texts are all given up may be over, or a gateway whose link broke is about to ask for them again: time tells.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use brigade_base::{PassId, SessionId, TenantId};

use super::End;
use super::pass::Span;
use crate::serving::Request;
use crate::trace::{PassTrace, RequestTrace, StageTrace};

/// Requests that have ended and are still told of. At one request a second they reach back eight minutes: long enough
/// to see a slow one in the log and look.
pub const MAX_DONE: usize = 512;

/// Open requests and open sessions that are followed; sixteen times what a coordinator of 256 sessions and as many
/// waiting has. Should somebody forget to end them, the oldest are called ended.
pub const MAX_OPEN: usize = 8192;

/// How long a request of many texts may have none on its way before it counts as given up. A gateway sends the next one
/// as soon as it has a vector, and all again as soon as it has another link, so this is many times the slowest of both.
pub const FORSAKEN_AFTER: Duration = Duration::from_secs(10);

/// How often such requests are looked for.
const SWEEP_PAUSE: Duration = Duration::from_secs(1);

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
    /// Its first.
    pub session: SessionId,
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
    n_texts: u32,
    n_texts_open: u32,
    /// Those that came in here.
    begun: TextSet,
    /// Those that are done here.
    done: TextSet,
    /// How many more are done for sure, by another coordinator.
    n_done_elsewhere: u32,
    /// Since when none of its texts is on its way.
    pub idle: Option<Instant>,
    first: Vec<Part>,
    last: VecDeque<Part>,
    left_out: u64,
}

impl Track {
    /// A request that has just come in, of which no text has been counted yet.
    pub fn new(session: SessionId, request: &Request, received: (Instant, u64)) -> Self {
        let Request { id, tenant, priority, .. } = request;
        let (id, tenant, priority) = (id.clone(), *tenant, *priority);
        Self {
            session,
            id,
            tenant,
            priority,
            state: State::Waiting,
            prompt_tokens: 0,
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
            n_texts: 1,
            n_texts_open: 0,
            begun: TextSet::default(),
            done: TextSet::default(),
            n_done_elsewhere: 0,
            idle: None,
            first: Vec::new(),
            last: VecDeque::new(),
            left_out: 0,
        }
    }

    /// Whether it has more texts than one.
    pub fn is_batch(&self) -> bool {
        self.n_texts > 1
    }

    fn add_text(&mut self, request: &Request) {
        if self.begun.insert(request.place.idx) {
            self.prompt_tokens = self.prompt_tokens.saturating_add(request.prompt.len() as u32);
        }
        self.n_texts = request.place.n_texts;
        self.n_texts_open += 1;
        self.idle = None;
        // The gateway may not know all of those that are done here, so this is too few rather than too many.
        self.n_done_elsewhere = self.n_done_elsewhere.max(request.done.get().saturating_sub(self.done.n));
    }

    fn n_texts_done(&self) -> u32 {
        self.done.n.saturating_add(self.n_done_elsewhere).min(self.n_texts)
    }

    fn is_complete(&self) -> bool {
        self.n_texts_open == 0 && self.n_texts_done() == self.n_texts
    }

    /// Notes that `rows` of its rows were in a pass; more of them, if another text of it was there too.
    pub fn pass(&mut self, pass: &Arc<PassInfo>, rows: u32, is_prompt: bool) {
        if let Some(part) = self.last.back_mut().or(self.first.last_mut()).filter(|p| Arc::ptr_eq(&p.pass, pass)) {
            part.rows += rows;
            return;
        }
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
            texts: self.is_batch().then_some(self.n_texts),
            texts_done: self.is_batch().then(|| self.n_texts_done()),
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

/// Some texts of a request, a bit for each: one that comes again counts once. As many as a request may have are 1 KiB.
#[derive(Debug, Default)]
struct TextSet {
    bits: Vec<u64>,
    n: u32,
}

impl TextSet {
    /// Whether it was not there yet.
    fn insert(&mut self, idx: u32) -> bool {
        let (at, bit) = ((idx / u64::BITS) as usize, 1 << (idx % u64::BITS));
        if at >= self.bits.len() {
            self.bits.resize(at + 1, 0);
        }
        let is_new = self.bits[at] & bit == 0;
        self.bits[at] |= bit;
        self.n += u32::from(is_new);
        is_new
    }
}

/// A session: a completion, or one text of a request.
#[derive(Debug)]
pub struct Text {
    /// The first session of its request.
    request: SessionId,
    /// Which of its texts it is.
    idx: u32,
    /// Tokens of its prompt.
    pub n_tokens: u32,
    /// It had a slot before.
    pub was_admitted: bool,
}

/// A request of many texts.
#[derive(Debug)]
struct Batch {
    /// Its first session.
    request: SessionId,
    /// When one of its texts failed. Its caller may have sent more before he knew; those are not another request.
    failed: Option<Instant>,
}

/// All requests that are told of.
#[derive(Debug, Default)]
pub struct Traces {
    texts: HashMap<SessionId, Text>,
    /// By their first sessions.
    open: HashMap<SessionId, Track>,
    /// Requests of many texts, by their ids.
    batches: HashMap<String, Batch>,
    /// When forsaken requests were last looked for.
    swept: Option<Instant>,
    done: VecDeque<Track>,
}

impl Traces {
    /// Follows a new session, the first of `track`, for `request`. If an earlier text of that is known it is counted
    /// there. Gives the oldest request back if too many are open; it is forgotten.
    pub fn begin(&mut self, track: Track, request: &Request) -> Option<Track> {
        let (session, n_tokens, place) = (track.session, request.prompt.len() as u32, request.place);
        let oldest_text = if self.texts.len() < MAX_OPEN { None } else { self.texts.keys().min().copied() };
        let forgotten = oldest_text.and_then(|oldest| self.end(oldest, End::Abort, track.received));
        let is_full = forgotten.is_none() && self.open.len() >= MAX_OPEN;
        let oldest = if is_full { self.open.keys().min().copied() } else { None };
        let forgotten = forgotten.or_else(|| oldest.and_then(|oldest| self.close(oldest)));
        let batch = self.batches.get(&track.id).filter(|_| place.n_texts > 1);
        let (first, has_failed) = batch.map_or((session, false), |batch| (batch.request, batch.failed.is_some()));
        self.texts.insert(session, Text { request: first, idx: place.idx, n_tokens, was_admitted: false });
        if has_failed {
            return forgotten;
        }
        if place.n_texts > 1 {
            self.batches.entry(track.id.clone()).or_insert(Batch { request: first, failed: None });
        }
        self.open.entry(first).or_insert(track).add_text(request);
        forgotten
    }

    /// The open request of a session.
    pub fn open(&mut self, session: SessionId) -> Option<&mut Track> {
        self.text(session).map(|(_, track)| track)
    }

    /// An open session and its request.
    pub fn text(&mut self, session: SessionId) -> Option<(&mut Text, &mut Track)> {
        let text = self.texts.get_mut(&session)?;
        let track = self.open.get_mut(&text.request)?;
        Some((text, track))
    }

    /// A session has ended at `now`. Gives its request back if that has ended with it.
    pub fn end(&mut self, session: SessionId, end: End, now: Instant) -> Option<Track> {
        let Text { request, idx, .. } = self.texts.remove(&session)?;
        // Gone already if another text of it failed.
        let track = self.open.get_mut(&request)?;
        track.n_texts_open -= 1;
        if end.is_whole() {
            track.done.insert(idx);
        }
        let has_failed = matches!(end, End::Timeout | End::Error);
        if track.is_batch() && !has_failed && !track.is_complete() {
            if track.n_texts_open == 0 {
                track.idle = Some(now);
            }
            return None;
        }
        let track = self.close(request)?;
        // Texts that were sent before the failure was known are not another request.
        let has_late_texts = has_failed && track.is_batch();
        if has_late_texts && self.batches.len() < MAX_OPEN {
            self.batches.insert(track.id.clone(), Batch { request, failed: Some(now) });
        }
        Some(track)
    }

    /// Requests of many texts whose callers have left.
    pub fn forsaken(&mut self, now: Instant) -> Vec<Track> {
        let is_soon = |swept: Instant| now.saturating_duration_since(swept) < SWEEP_PAUSE;
        if self.batches.is_empty() || self.swept.is_some_and(is_soon) {
            return Vec::new();
        }
        self.swept = Some(now);
        let is_long_ago = |since: Instant| now.saturating_duration_since(since) >= FORSAKEN_AFTER;
        self.batches.retain(|_, batch| !batch.failed.is_some_and(is_long_ago));
        let is_over = |track: &Track| track.idle.is_some_and(is_long_ago);
        let requests = self.batches.values().map(|batch| batch.request);
        let over: Vec<SessionId> = requests.filter(|request| self.open.get(request).is_some_and(is_over)).collect();
        over.into_iter().filter_map(|request| self.close(request)).collect()
    }

    fn close(&mut self, request: SessionId) -> Option<Track> {
        let track = self.open.remove(&request)?;
        if self.batches.get(&track.id).is_some_and(|batch| batch.request == request) {
            self.batches.remove(&track.id);
        }
        Some(track)
    }

    /// Keeps a request that has ended.
    pub fn keep(&mut self, track: Track) {
        if self.done.len() == MAX_DONE {
            self.done.pop_front();
        }
        self.done.push_back(track);
    }

    /// Whether no session is open.
    pub fn is_idle(&self) -> bool {
        self.texts.is_empty()
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
    use crate::serving::TextPlace;

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

    fn request() -> Request {
        Request::of_text("a".to_owned(), TenantId(0), vec![1; 5], TextPlace::ONLY)
    }

    fn after(n_passes: u64, n_stages: usize) -> Track {
        let mut track = Track::new(SessionId(0), &request(), (Instant::now(), 0));
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
            let track = Track { session: SessionId(n), ..after(0, 1) };
            n_forgotten += usize::from(traces.begin(track, &request()).is_some());
        }
        assert_eq!((traces.len().0, n_forgotten), (MAX_OPEN, 10));
        assert!(traces.open(SessionId(9)).is_none() && traces.open(SessionId(10)).is_some());
    }
}
