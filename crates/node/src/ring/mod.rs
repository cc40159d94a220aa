//! The coordinator's side of the ring: schedule, run, postprocess; and go on in the next one.
//!
//! One thread owns every session and the scheduler for as long as the coordinator runs. It gets a [`Connection`] for
//! each placement: the tail stage and the links. With one, each turn takes what came in, sends as many passes as the
//! scheduler has, waits for the oldest to come back, computes the tail, chooses tokens and tells the callers. While it
//! waits it takes requests, so that a prompt starts at once where a stage is free. A ring of one stage is the same
//! without links.
//!
//! When a ring is lost its tail goes back to the owner loop, and the sessions wait for the next connection. The
//! scheduler then has computed again what the stages do not hold any more; samplers and texts stay as they were, so no
//! token is told twice and none is missing. Only if no ring comes about in time do the sessions end with an error.
//!
//! - `inbox.rs`: the one queue that the thread sleeps on.
//! - `answer.rs`: a session's sampler, text and caller.
//! - `watch.rs`: which pass is awaited, and since when, for the owner loop, which looks whether it is stuck.
//! - What travels when is decided by [`Scheduler`]; what happened is told to the [`Meter`].

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use brigade_base::{DeploymentId, Epoch, PassId, SessionId};
use brigade_engine::{NoNumbers, Sampler};
use brigade_protocol::control::Held;
use brigade_protocol::frame::{FrameHead, KvStep, RowSet};
use brigade_protocol::schedule::{Arrival, Limits, Notice, Output, Pass, Scheduler, Task};

use self::answer::{Answer, Chosen, Wishes};
pub use self::inbox::{Happening, Open, Submission, Submissions};
pub use self::watch::Watch;
use crate::incoming::{Incoming, IncomingEnd};
use crate::loaded::LoadedStage;
use crate::meter::{End, Load, Meter, PassReport};
use crate::model::LocalModel;
use crate::outgoing::{Outgoing, Shadow};
use crate::serving::{Event, Failure, FinishReason, Request, Usage};
use crate::stage_pass::PassError;
use crate::text::Assembler;
use crate::threads::micros;

mod answer;
mod inbox;
mod watch;

/// Rings in a row that a session may lose without a token in between. Machines that die come one at a time; what is
/// lost so often breaks its rings itself, as values that are no numbers do.
const MAX_RINGS_LOST: u32 = 5;

/// How often the links are asked what they carried.
const LINK_POLL: Duration = Duration::from_millis(250);

/// How long an idle thread sleeps before it looks whether its ring should end.
const IDLE_POLL: Duration = Duration::from_millis(50);

/// Why a ring ended.
#[derive(Debug)]
pub enum RingEnd {
    /// It was told to.
    Stopped,
    /// A link broke, or a stage answered nonsense.
    Broke(String),
}

/// What computes the coordinator's part of a pass.
pub trait Tail {
    /// Carries out the KV steps of a pass; those that fail are marked.
    ///
    /// # Errors
    /// If the stage does not hold what a step builds on.
    fn apply(&mut self, steps: &mut [(KvStep, bool)]) -> Result<(), PassError>;

    /// Computes the rows of a pass: `hidden` is `[n_rows, n_embd]`, `logits` becomes `[n_outputs, n_vocab]`, or the
    /// pooled vectors of a model that embeds or ranks.
    ///
    /// # Errors
    /// If the stage does not hold what the pass builds on, or the engine fails.
    fn run(
        &mut self,
        pass: PassId,
        sets: &[RowSet],
        hidden: &mut [f32],
        logits: &mut Vec<f32>,
    ) -> Result<(), PassError>;
}

impl Tail for LoadedStage {
    fn apply(&mut self, steps: &mut [(KvStep, bool)]) -> Result<(), PassError> {
        self.runner.apply(steps)
    }

    fn run(
        &mut self,
        pass: PassId,
        sets: &[RowSet],
        hidden: &mut [f32],
        logits: &mut Vec<f32>,
    ) -> Result<(), PassError> {
        self.runner.run(sets, hidden, logits)?;
        self.runner.note_applied(pass);
        Ok(())
    }
}

/// The links of a ring with workers.
pub struct RingLinks {
    /// To the first worker.
    pub first: Outgoing,
    /// To who stands by for the first worker's stage, and wants the same frames.
    pub shadow: Option<Shadow>,
    /// From the last one; tells the inbox of each frame.
    pub last: Incoming,
}

/// A ring that stands.
pub struct Connection<T> {
    /// The deployment.
    pub deployment: DeploymentId,
    /// Its epoch.
    pub epoch: Epoch,
    /// The coordinator's own stage.
    pub tail: T,
    /// Missing where the coordinator holds the whole model.
    pub links: Option<RingLinks>,
    /// What bounds the passes.
    pub limits: Limits,
    /// What all stages hold still; `None` if one of them holds nothing.
    pub held: Option<Held>,
    /// Tells it to end.
    pub stop: Arc<Stop>,
}

/// Tells a ring to end, and why.
#[derive(Debug, Default)]
pub struct Stop {
    is_set: AtomicBool,
    why: OnceLock<String>,
}

impl Stop {
    /// The ring is to end; the first reason counts.
    pub fn set(&self, why: &str) {
        self.why.get_or_init(|| why.to_owned());
        self.is_set.store(true, Ordering::Release);
    }

    /// Whether it is to end.
    pub fn is_set(&self) -> bool {
        self.is_set.load(Ordering::Acquire)
    }
}

/// What the ring's thread tells the owner loop.
pub enum News<T> {
    /// A first pass went around; requests are answered from now on.
    WentAround(Epoch),
    /// No pass is on its way any more, as was asked.
    Drained(Epoch),
    /// The ring has ended.
    Ended(Epoch, Box<T>, RingEnd),
}

/// What the thread is started with.
pub struct RingOptions<T> {
    /// Token embeddings and vocabulary.
    pub model: Arc<LocalModel>,
    /// What is told of it.
    pub meter: Arc<Meter>,
    /// Requests, and word of what else there is.
    pub inbox: Receiver<Happening>,
    /// Rings, each after [`Happening::Wake`].
    pub connections: Receiver<Connection<T>>,
    /// The owner loop's ear.
    pub tell: Box<dyn Fn(News<T>) + Send>,
    /// Where it says what it waits for.
    pub watch: Arc<Watch>,
    /// Slots and their size.
    pub limits: Limits,
    /// How long sessions wait for another ring.
    pub wait_for_capacity: Duration,
}

/// A pass that has not come back.
struct Sent {
    pass: Pass,
    at: Instant,
    embed: Duration,
    write: Duration,
    /// It was the only one when it was sent.
    alone: bool,
    /// The embeddings, where there is nobody to send them to.
    hidden: Vec<f32>,
}

/// A pass that is back from the workers.
struct Back {
    sent: Sent,
    read: Duration,
    decoded: Instant,
}

/// When the last ring was lost, and why.
struct Lost {
    at: Instant,
    why: String,
}

/// Sessions and the ring that carries them.
pub struct Ring<T> {
    model: Arc<LocalModel>,
    meter: Arc<Meter>,
    inbox: Receiver<Happening>,
    connections: Receiver<Connection<T>>,
    tell: Box<dyn Fn(News<T>) + Send>,
    watch: Arc<Watch>,
    wait_for_capacity: Duration,
    connection: Option<Connection<T>>,
    /// No further passes are sent.
    holds_back: bool,
    /// The owner loop wants to know when none is on its way.
    drains: bool,
    lost: Option<Lost>,
    /// What another ring would take; empty while nothing is missing.
    missing: String,
    task: Task,
    scheduler: Scheduler,
    sent: VecDeque<Sent>,
    answers: HashMap<SessionId, Answer>,
    next_session: SessionId,
    links_asked: Instant,
    /// Of the frame that is sent or was received last.
    head: FrameHead,
    header: Vec<u8>,
    embedded: Vec<u8>,
    hidden: Vec<f32>,
    logits: Vec<f32>,
}

/// What ends a turn early.
enum Interrupt {
    /// The ring has ended.
    Ring(RingEnd),
    /// The thread is to end; callers hear this.
    Stop(Failure),
}

type Outcome<V = ()> = Result<V, Interrupt>;

/// What a caller hears whose session got no numbers.
fn no_numbers(error: NoNumbers) -> Failure {
    Failure::Engine(format!("{error}; examine the model's file and its adapters with `brigade certify`"))
}

fn broke(why: impl Into<String>) -> Interrupt {
    Interrupt::Ring(RingEnd::Broke(why.into()))
}

impl<T: Tail> Ring<T> {
    /// No sessions and no ring yet.
    pub fn new(options: RingOptions<T>) -> Self {
        let RingOptions { model, meter, inbox, connections, tell, watch, limits, wait_for_capacity } = options;
        Self {
            model,
            meter,
            inbox,
            connections,
            tell,
            watch,
            wait_for_capacity,
            connection: None,
            holds_back: false,
            drains: false,
            lost: None,
            missing: String::new(),
            task: limits.task,
            scheduler: Scheduler::new(limits),
            sent: VecDeque::new(),
            answers: HashMap::new(),
            next_session: SessionId(1),
            links_asked: Instant::now(),
            head: FrameHead::default(),
            header: Vec::new(),
            embedded: Vec::new(),
            hidden: Vec::new(),
            logits: Vec::new(),
        }
    }

    /// Runs until it is stopped. Every session has heard its end when this returns.
    pub fn run(mut self) {
        let failure = loop {
            let turn = if self.connection.is_some() { self.turn() } else { self.wait() };
            match turn {
                Ok(()) => {}
                Err(Interrupt::Ring(end)) => self.disconnect(end),
                Err(Interrupt::Stop(failure)) => break failure,
            }
        };
        self.disconnect(RingEnd::Stopped);
        // Whoever asks a second time is told the same.
        let _ = self.fail_all(&failure);
        self.meter.load(Load::default());
    }

    /// Takes what comes while there is no ring.
    fn wait(&mut self) -> Outcome {
        match self.inbox.recv_timeout(IDLE_POLL) {
            Ok(happening) => self.heed(happening)?,
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return Err(Interrupt::Stop(Failure::Stopping)),
        }
        self.end_unwanted();
        if let Some(lost) = self.lost.as_ref().filter(|lost| lost.at.elapsed() >= self.wait_for_capacity) {
            let waited = self.wait_for_capacity.as_secs_f32();
            let missing = if self.missing.is_empty() { "nothing took its place" } else { &self.missing };
            let why = format!("{}, and for {waited} s {missing}", lost.why);
            self.fail_all(&Failure::PlacementLost(why))?;
        }
        self.tell_load();
        match self.connections.try_recv() {
            Ok(connection) => self.connect(connection),
            Err(_) => Ok(()),
        }
    }

    /// Lets the sessions go on in a new ring, once a first pass went around.
    fn connect(&mut self, connection: Connection<T>) -> Outcome {
        let Connection { epoch, limits, .. } = connection;
        self.scheduler.recover(limits, connection.held.as_ref());
        // Where all stages go on, they have computed before; a row would cost a session what its slot holds.
        let token = connection.held.is_none().then(|| self.model.vocabulary().bos().unwrap_or(0));
        self.connection = Some(connection);
        (self.holds_back, self.drains) = (true, false);
        let probe = self.scheduler.probe(token);
        self.send(probe)?;
        let back = self.receive()?;
        self.run_tail(&back)?;
        if !back.sent.pass.sets.is_empty() && self.logits.iter().any(|value| value.is_nan()) {
            tracing::warn!("{NoNumbers}: requests will fail; examine its file and adapters with `brigade certify`");
        }
        self.holds_back = false;
        if let Some(lost) = self.lost.take() {
            self.meter.recovered(&lost.why, lost.at.elapsed());
            self.answers.values().for_each(|answer| answer.tell(Event::Resumed));
        }
        (self.tell)(News::WentAround(epoch));
        Ok(())
    }

    /// Gives the tail back; the sessions wait.
    fn disconnect(&mut self, end: RingEnd) {
        let Some(Connection { epoch, tail, links, stop, .. }) = self.connection.take() else { return };
        // Whoever stops a ring closes its links and cancels its stage, which then look broken.
        let end = if stop.is_set() { RingEnd::Stopped } else { end };
        drop(links);
        let given_up = self.count_losses();
        self.sent.clear();
        self.watch.set(None);
        let why = match &end {
            RingEnd::Stopped => stop.why.get().cloned().unwrap_or_default(),
            RingEnd::Broke(why) => why.clone(),
        };
        let failure = Failure::Engine(format!(
            "{MAX_RINGS_LOST} times in a row the machines failed while they computed it, at last since {why}; `brigade \
             certify` tells whether the model's file or an adapter is at fault"
        ));
        given_up.into_iter().for_each(|id| self.fail(id, &failure));
        if self.lost.is_none() {
            self.answers.values().for_each(|answer| answer.tell(Event::Paused { why: why.clone() }));
            self.meter.lost(&why);
            self.lost = Some(Lost { at: Instant::now(), why });
        }
        self.tell_load();
        (self.tell)(News::Ended(epoch, Box::new(tail), end));
    }

    /// Counts a ring as lost for each session that had rows on their way. Those that have lost [`MAX_RINGS_LOST`] in a
    /// row are returned: what breaks a ring whenever it is computed would break each further one.
    fn count_losses(&mut self) -> Vec<SessionId> {
        let rows = self.sent.iter().flat_map(|sent| &sent.pass.rows);
        let sessions: HashSet<SessionId> = rows.map(|rows| rows.session).collect();
        let mut given_up = Vec::new();
        for id in sessions {
            let Some(answer) = self.answers.get_mut(&id) else { continue };
            answer.rings_lost += 1;
            if answer.rings_lost >= MAX_RINGS_LOST {
                given_up.push(id);
            }
        }
        given_up
    }

    fn turn(&mut self) -> Outcome {
        if self.connection.as_ref().is_some_and(|connection| connection.stop.is_set()) {
            return Err(Interrupt::Ring(RingEnd::Stopped));
        }
        self.take_happenings()?;
        self.end_unwanted();
        self.ask_links();
        self.send_passes()?;
        if self.sent.is_empty() {
            if let (true, Some(connection)) = (std::mem::take(&mut self.drains), &self.connection) {
                (self.tell)(News::Drained(connection.epoch));
            }
            return Ok(());
        }
        let back = self.receive()?;
        let tail_begin = Instant::now();
        self.run_tail(&back)?;
        self.postprocess(&back, tail_begin, Instant::now())
    }

    /// Takes what has come in; an idle ring sleeps here.
    fn take_happenings(&mut self) -> Outcome {
        if self.sent.is_empty() && (self.answers.is_empty() || self.holds_back) {
            match self.inbox.recv_timeout(IDLE_POLL) {
                Ok(Happening::Frame) => return self.unasked(),
                Ok(happening) => self.heed(happening)?,
                Err(RecvTimeoutError::Disconnected) => return Err(Interrupt::Stop(Failure::Stopping)),
                Err(RecvTimeoutError::Timeout) => return Ok(()),
            }
        }
        // Frames wait in their own queue, and are taken from there while any is expected.
        while let Ok(happening) = self.inbox.try_recv() {
            self.heed(happening)?;
        }
        Ok(())
    }

    fn heed(&mut self, happening: Happening) -> Outcome {
        match happening {
            Happening::Submission(submission) => self.begin(*submission),
            Happening::Drain(epoch) => {
                if self.connection.as_ref().is_some_and(|connection| connection.epoch == epoch) {
                    (self.holds_back, self.drains) = (true, true);
                }
            }
            Happening::Stop(failure) => return Err(Interrupt::Stop(failure)),
            Happening::Gone(why) => {
                // Who is gone says more than which link closed.
                if let Some(lost) = self.lost.as_mut().filter(|_| self.connection.is_none()) {
                    lost.why = why;
                }
            }
            Happening::Shadowed => self.scheduler.forget_cache(),
            Happening::Shadow(epoch, shadow) => {
                let ring = self.connection.as_mut().filter(|connection| connection.epoch == epoch);
                if let Some(links) = ring.and_then(|connection| connection.links.as_mut()) {
                    links.shadow = Some(*shadow);
                    self.scheduler.forget_cache();
                }
            }
            Happening::Missing(what) => self.missing = what,
            Happening::Frame | Happening::Wake => {}
        }
        Ok(())
    }

    /// A frame or the end of the link while no pass is on its way.
    fn unasked(&self) -> Outcome {
        let Some(links) = self.connection.as_ref().and_then(|connection| connection.links.as_ref()) else {
            return Ok(());
        };
        match links.last.try_recv() {
            Ok(None) => Ok(()),
            Ok(Some(_)) => Err(broke("the last stage sent a frame that nobody asked for")),
            Err(end) => Err(broke(format!("the last stage is gone: {end}"))),
        }
    }

    fn begin(&mut self, submission: Submission) {
        let Submission { request, answer: told, at, events, open } = submission;
        let id = self.next_session;
        self.next_session = id.next();
        let meter = Arc::clone(&self.meter);
        meter.received(id, &request, at);
        let Request { prompt, tenant, priority, timeout, max_tokens, sampling, stop, logprobs, ignore_end, .. } =
            request;
        let usage = Usage { prompt_tokens: prompt.len() as u32, ..Usage::default() };
        let refuse = |why: String| {
            let _ = events.send(Event::Failed(Failure::Engine(why)));
            meter.ended(id, End::Error, Instant::now());
        };
        let sampler = match Sampler::new(&sampling, self.model.architecture().n_vocab) {
            Ok(sampler) => sampler,
            Err(error) => return refuse(error.to_string()),
        };
        let wishes = Wishes { max_tokens, logprobs, ignore_end };
        let text = Assembler::new(stop);
        let mut answer = Answer {
            wishes,
            events: events.clone(),
            sampler,
            text,
            usage,
            has_started: false,
            rings_lost: 0,
            timeout,
            _open: open,
        };
        let is_full = prompt.len() + told.len() >= self.scheduler.context() as usize;
        if let Some(end) = answer.retrace(&told, is_full, self.model.vocabulary()) {
            return meter.ended(id, end, Instant::now());
        }
        let deadline = timeout.and_then(|timeout| at.checked_add(timeout));
        let arrival = Arrival { id, prompt, answer: told, tenant, priority, at, deadline };
        if let Err(error) = self.scheduler.admit(arrival) {
            return refuse(error.to_string());
        }
        if let Some(lost) = &self.lost {
            answer.tell(Event::Paused { why: lost.why.clone() });
        }
        self.answers.insert(id, answer);
    }

    /// Ends the sessions whose callers have gone or whose time is up.
    fn end_unwanted(&mut self) {
        let now = Instant::now();
        for id in self.scheduler.expired(now) {
            if let Some(answer) = self.answers.get(&id) {
                answer.fail(Failure::TimedOut { after: answer.timeout.unwrap_or_default() });
                self.end(id, End::Timeout);
            }
        }
        let gone: Vec<SessionId> =
            self.answers.iter().filter(|(_, answer)| answer.events.is_closed()).map(|(id, _)| *id).collect();
        gone.into_iter().for_each(|id| self.end(id, End::Abort));
    }

    fn end(&mut self, id: SessionId, end: End) {
        self.scheduler.end(id);
        self.answers.remove(&id);
        self.meter.ended(id, end, Instant::now());
    }

    /// Tells all callers, those too who are not in yet, that nothing more comes.
    fn fail_all(&mut self, failure: &Failure) -> Outcome {
        let mut outcome = Ok(());
        while let Ok(happening) = self.inbox.try_recv() {
            outcome = self.heed(happening).and(outcome);
        }
        let ids: Vec<SessionId> = self.answers.keys().copied().collect();
        ids.into_iter().for_each(|id| self.fail(id, failure));
        outcome
    }

    /// Tells a caller that his answer cannot be completed.
    fn fail(&mut self, id: SessionId, failure: &Failure) {
        if let Some(answer) = self.answers.get(&id) {
            answer.fail(failure.clone());
        }
        self.end(id, End::Error);
    }

    fn send_passes(&mut self) -> Outcome {
        while !self.holds_back
            && let Some(pass) = self.scheduler.next_pass()
        {
            self.send(pass)?;
        }
        self.heed_notices();
        self.tell_load();
        Ok(())
    }

    fn tell_load(&self) {
        let (images, image_tokens) = self.scheduler.n_images();
        self.meter.load(Load {
            running: self.scheduler.n_running(),
            waiting: self.scheduler.n_waiting(),
            kv_tokens: self.scheduler.kv_tokens(),
            kv_capacity: self.scheduler.kv_capacity(),
            images,
            image_tokens,
        });
    }

    /// Tells what the coordinator's own links carried, now and then.
    fn ask_links(&mut self) {
        let Some(Connection { links: Some(links), limits, .. }) = &self.connection else { return };
        if self.links_asked.elapsed() < LINK_POLL {
            return;
        }
        self.links_asked = Instant::now();
        self.meter.link(0, links.first.stats(), links.first.queued());
        self.meter.link(limits.n_stages as usize - 1, links.last.stats(), 0);
    }

    /// Passes on what the scheduler has decided.
    fn heed_notices(&mut self) {
        let now = Instant::now();
        let meter = &self.meter;
        for notice in self.scheduler.take_notices() {
            match notice {
                Notice::Started { session, cached } => {
                    let Some(answer) = self.answers.get_mut(&session) else { continue };
                    let first = !std::mem::replace(&mut answer.has_started, true);
                    if first {
                        answer.usage.cached_tokens = cached;
                    }
                    meter.admitted(session, cached, now);
                }
                Notice::Preempted { session } => meter.preempted(session, now),
                Notice::Saved { n_tokens, ok } => meter.saved(n_tokens, ok),
                Notice::Loaded { n_tokens, ok } => meter.restored(n_tokens, ok),
            }
        }
    }

    fn send(&mut self, pass: Pass) -> Outcome {
        let Some(connection) = &self.connection else { return Ok(()) };
        let at = Instant::now();
        let alone = self.sent.is_empty();
        let mut hidden = Vec::new();
        let rows = if connection.links.is_some() { &mut self.hidden } else { &mut hidden };
        rows.clear();
        if !pass.tokens.is_empty() {
            self.model.embed(&pass.tokens, rows, &mut self.embedded).map_err(|error| broke(error.to_string()))?;
        }
        let embed = at.elapsed();
        if let Some(links) = &connection.links {
            self.head.deployment = connection.deployment;
            self.head.epoch = connection.epoch;
            self.head.pass = pass.id;
            self.head.follows = pass.follows;
            self.head.steps.clear();
            self.head.steps.extend(pass.steps.iter().map(|step| (*step, false)));
            self.head.sets.clone_from(&pass.sets);
            self.head.timings.clear();
            self.head.n_embd = self.model.architecture().n_embd;
            self.head.encode(&mut self.header);
            links
                .first
                .send(&self.header, rows)
                .map_err(|error| broke(format!("the link to the first stage ended: {error}")))?;
            if let Some(shadow) = &links.shadow {
                shadow.send(&self.header, rows);
            }
        }
        if !alone && let Some(last) = self.sent.back_mut() {
            last.alone = false;
        }
        self.sent.push_back(Sent { pass, at, embed, write: at.elapsed() - embed, alone, hidden });
        if alone {
            self.await_front(at);
        }
        Ok(())
    }

    /// Says which pass is awaited now, where others compute it.
    fn await_front(&self, since: Instant) {
        let has_links = self.connection.as_ref().is_some_and(|connection| connection.links.is_some());
        let front = self.sent.front().filter(|_| has_links);
        self.watch.set(front.map(|sent| (sent.pass.id, sent.pass.tokens.len() as u32, since.max(sent.at))));
    }

    /// Waits for the oldest pass; its hidden states are then in the buffers. Requests that come meanwhile begin at
    /// once.
    fn receive(&mut self) -> Outcome<Back> {
        let nothing = || broke("a pass came back that was never sent");
        loop {
            let Some(connection) = &self.connection else { return Err(nothing()) };
            let Some(links) = &connection.links else {
                let mut sent = self.sent.pop_front().ok_or_else(nothing)?;
                self.hidden = std::mem::take(&mut sent.hidden);
                self.head.steps.clear();
                self.head.steps.extend(sent.pass.steps.iter().map(|step| (*step, false)));
                self.head.timings.clear();
                let now = Instant::now();
                return Ok(Back { sent, read: Duration::ZERO, decoded: now });
            };
            let gone = |end: IncomingEnd| broke(format!("the last stage is gone: {end}"));
            if let Some(mut frame) = links.last.try_recv().map_err(gone)? {
                if frame.head.epoch != connection.epoch {
                    links.last.recycle(frame);
                    continue;
                }
                std::mem::swap(&mut self.head, &mut frame.head);
                std::mem::swap(&mut self.hidden, &mut frame.rows);
                let (arrived, decoded) = (frame.arrived, frame.decoded);
                links.last.recycle(frame);
                let sent = self.sent.pop_front().ok_or_else(nothing)?;
                let steps = self.head.steps.iter().map(|(step, _)| *step);
                let is_it = self.head.pass == sent.pass.id && self.head.sets == sent.pass.sets;
                if !is_it || !steps.eq(sent.pass.steps.iter().copied()) {
                    return Err(broke("a pass came back out of order or altered"));
                }
                self.watch.back(decoded);
                self.await_front(decoded);
                return Ok(Back { sent, read: decoded - arrived, decoded });
            }
            match self.inbox.recv() {
                Ok(happening) => {
                    let is_new = matches!(happening, Happening::Submission(_));
                    self.heed(happening)?;
                    if is_new {
                        self.send_passes()?;
                    }
                }
                Err(_) => return Err(Interrupt::Stop(Failure::Stopping)),
            }
        }
    }

    fn run_tail(&mut self, back: &Back) -> Outcome {
        let failed = |error: PassError| broke(format!("the coordinator's stage failed: {error}"));
        let Some(connection) = &mut self.connection else { return Ok(()) };
        let pass = &back.sent.pass;
        connection.tail.apply(&mut self.head.steps).map_err(failed)?;
        connection.tail.run(pass.id, &pass.sets, &mut self.hidden, &mut self.logits).map_err(failed)
    }

    /// Chooses a token for every session whose logits are here, or tells it its vector.
    fn postprocess(&mut self, back: &Back, tail_begin: Instant, tail_end: Instant) -> Outcome {
        let pass = &back.sent.pass;
        let tail_us = micros(tail_end - tail_begin);
        let stage_us: Vec<u32> = self.head.timings.iter().map(|timing| timing.share_us()).chain([tail_us]).collect();
        let failed: Vec<bool> = self.head.steps.iter().map(|(_, failed)| *failed).collect();
        let outputs = self
            .scheduler
            .complete(pass.id, &stage_us, &failed)
            .ok_or_else(|| broke("a pass came back out of order"))?;
        self.meter.pass(PassReport {
            pass: pass.id,
            rows: &pass.rows,
            n_rows: pass.tokens.len() as u32,
            is_decode: pass.is_decode(),
            moves_kv: !pass.steps.is_empty(),
            sent: back.sent.at,
            embed: back.sent.embed,
            write: back.sent.write,
            read: back.read,
            decoded: back.decoded,
            tail_begin,
            tail_end,
            timings: &self.head.timings,
            alone: back.sent.alone,
        });
        let n_outputs: u32 = pass.sets.iter().map(|set| set.n_outputs).sum();
        let width = match self.task {
            Task::Generate => self.model.architecture().n_vocab as usize,
            Task::Pool { .. } => self.logits.len() / (n_outputs as usize).max(1),
        };
        for output in outputs {
            match self.task {
                Task::Generate => self.choose(output, width)?,
                Task::Pool { .. } => self.hand_over(output, width)?,
            }
        }
        Ok(())
    }

    /// Tells a caller the vector of its text, which is all that it wants.
    fn hand_over(&mut self, output: Output, width: usize) -> Outcome {
        let Some(answer) = self.answers.get(&output.session) else { return Ok(()) };
        let values = self.logits.get(output.row * width..(output.row + 1) * width).filter(|values| !values.is_empty());
        let Some(values) = values else { return Err(broke("the last stage pooled fewer texts than were asked for")) };
        if values.iter().any(|value| !value.is_finite()) {
            self.fail(output.session, &no_numbers(NoNumbers));
            return Ok(());
        }
        self.meter.pooled(output.session);
        let end = answer.pooled(values.to_vec());
        self.end(output.session, end);
        Ok(())
    }

    fn choose(&mut self, output: Output, n_vocab: usize) -> Outcome {
        let Some(answer) = self.answers.get_mut(&output.session) else { return Ok(()) };
        let logits = self.logits.get(output.row * n_vocab..(output.row + 1) * n_vocab);
        let Some(logits) = logits else {
            return Err(broke("the head gave fewer logits than were asked for"));
        };
        let chosen = match answer.choose(logits, output.position, self.model.vocabulary()) {
            Ok(chosen) => chosen,
            Err(error) => {
                self.fail(output.session, &no_numbers(error));
                return Ok(());
            }
        };
        self.meter.token(output.session, Instant::now());
        let end = match chosen {
            Chosen::GoOn(token) if self.scheduler.push(output, token) => return Ok(()),
            // The token that fills the context was told, but nothing can follow it.
            Chosen::GoOn(_) => answer.finish(FinishReason::Length),
            Chosen::Ended(end) => end,
        };
        self.end(output.session, end);
        Ok(())
    }
}
