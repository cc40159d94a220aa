//! The coordinator's side of the ring: schedule, run, postprocess.
//!
//! One thread owns the tail stage, the link to the first worker, and every session. Each turn it takes what came in,
//! sends as many passes as the scheduler has, waits for the oldest to come back, computes the tail, chooses tokens
//! and tells the callers. While it waits it takes requests, so that a prompt starts at once where a stage is free. A
//! ring of one stage is the same without links.
//!
//! - `inbox.rs`: the one queue that the thread sleeps on.
//! - `answer.rs`: a session's sampler, text and caller.
//! - What travels when is decided by [`Scheduler`]; what happened is told to the [`Meter`].

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use brigade_base::{SessionId, TenantId};
use brigade_engine::Sampler;
use brigade_protocol::frame::{Attach, FrameHead, KvStep, RowSet};
use brigade_protocol::schedule::{Arrival, Limits, Notice, Output, Pass, Scheduler};

use self::answer::{Answer, Chosen, Wishes};
pub use self::inbox::{Happening, Open, Submission, Submissions};
use crate::incoming::{Incoming, IncomingEnd};
use crate::loaded::LoadedStage;
use crate::meter::{End, Load, Meter, PassReport};
use crate::model::LocalModel;
use crate::outgoing::Outgoing;
use crate::serving::{Event, Failure, FinishReason, Request, Usage};
use crate::stage_pass::PassError;
use crate::text::Assembler;
use crate::threads::micros;

mod answer;
mod inbox;

/// How often the links are asked what they carried.
const LINK_POLL: Duration = Duration::from_millis(250);

/// How long an idle ring sleeps before it looks whether it should end.
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

    /// Computes the rows of a pass: `hidden` is `[n_rows, n_embd]`, `logits` becomes `[n_outputs, n_vocab]`.
    ///
    /// # Errors
    /// If the stage does not hold what the pass builds on, or the engine fails.
    fn run(&mut self, sets: &[RowSet], hidden: &mut [f32], logits: &mut Vec<f32>) -> Result<(), PassError>;
}

impl Tail for LoadedStage {
    fn apply(&mut self, steps: &mut [(KvStep, bool)]) -> Result<(), PassError> {
        self.runner.apply(steps)
    }

    fn run(&mut self, sets: &[RowSet], hidden: &mut [f32], logits: &mut Vec<f32>) -> Result<(), PassError> {
        self.runner.run(sets, hidden, logits)
    }
}

/// The links of a ring with workers.
pub struct RingLinks {
    /// To the first worker.
    pub first: Outgoing,
    /// From the last one; tells the inbox of each frame.
    pub last: Incoming,
}

/// What a ring is made of.
pub struct Ring<T> {
    /// The placement it belongs to.
    pub attach: Attach,
    /// Token embeddings and vocabulary.
    pub model: Arc<LocalModel>,
    /// The coordinator's own stage.
    pub tail: T,
    /// Missing where the coordinator holds the whole model.
    pub links: Option<RingLinks>,
    /// Requests, and frames that come back.
    pub inbox: Receiver<Happening>,
    /// What bounds the passes.
    pub limits: Limits,
    /// Tells it to end.
    pub stop: Arc<AtomicBool>,
    /// What is told of it.
    pub meter: Arc<Meter>,
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

/// A running ring.
struct Running<'a, T> {
    ring: &'a mut Ring<T>,
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

type Outcome = Result<(), RingEnd>;

impl<T: Tail> Ring<T> {
    /// Sends one token around, so that every stage, link and the head have been used once.
    ///
    /// # Errors
    /// If it does not come back whole.
    pub fn probe(&mut self) -> Result<(), RingEnd> {
        let token = self.model.vocabulary().bos().unwrap_or(0);
        let mut running = self.running();
        let (id, prompt) = (SessionId(0), vec![token]);
        let (tenant, at) = (TenantId(0), Instant::now());
        let arrival = Arrival { id, prompt, tenant, priority: 0, at, deadline: None };
        running.scheduler.admit(arrival).map_err(|error| RingEnd::Broke(error.to_string()))?;
        let pass =
            running.scheduler.next_pass().ok_or_else(|| RingEnd::Broke("there is no pass to send".to_owned()))?;
        running.send(pass)?;
        let back = running.receive()?;
        running.run_tail(&back)?;
        // Forgotten again, so that the scheduler that serves may begin with empty slots.
        let forget = RowSet { slot: 0, keep: 0, n_rows: 0, n_outputs: 0 };
        running.send(Pass { id: back.sent.pass.id.next(), sets: vec![forget], ..Pass::default() })?;
        let back = running.receive()?;
        running.run_tail(&back)
    }

    /// Serves until it breaks or is stopped. Every session has heard its end when this returns. `close` is called once,
    /// with what broke if something did: it lets no more submissions in and says what to tell those who are.
    pub fn run(&mut self, close: &dyn Fn(Option<Failure>) -> Failure) -> RingEnd {
        let mut running = self.running();
        let end = loop {
            if let Err(end) = running.turn() {
                break end;
            }
        };
        // Whoever stops a ring closes its links and cancels its stage, which then look broken.
        let end = if running.ring.stop.load(Ordering::Relaxed) { RingEnd::Stopped } else { end };
        let failure = match &end {
            RingEnd::Stopped => close(None),
            RingEnd::Broke(why) => close(Some(Failure::PlacementLost(why.clone()))),
        };
        running.fail_all(&failure);
        self.meter.load(Load::default());
        end
    }

    fn running(&mut self) -> Running<'_, T> {
        Running {
            scheduler: Scheduler::new(self.limits),
            ring: self,
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
}

impl<T: Tail> Running<'_, T> {
    fn turn(&mut self) -> Outcome {
        if self.ring.stop.load(Ordering::Relaxed) {
            return Err(RingEnd::Stopped);
        }
        self.take_submissions()?;
        self.end_unwanted();
        self.ask_links();
        self.send_passes()?;
        if self.sent.is_empty() {
            return Ok(());
        }
        let back = self.receive()?;
        let tail_begin = Instant::now();
        self.run_tail(&back)?;
        self.postprocess(&back, tail_begin, Instant::now())
    }

    /// Takes what has come in; an idle ring sleeps here.
    fn take_submissions(&mut self) -> Outcome {
        if self.sent.is_empty() && self.answers.is_empty() {
            match self.ring.inbox.recv_timeout(IDLE_POLL) {
                Ok(Happening::Submission(submission)) => self.begin(*submission),
                Ok(Happening::Frame) => return self.unasked(),
                Err(RecvTimeoutError::Disconnected) => return Err(RingEnd::Stopped),
                Err(RecvTimeoutError::Timeout) => return Ok(()),
            }
        }
        // Frames wait in their own queue, and are taken from there while any is expected.
        while let Ok(happening) = self.ring.inbox.try_recv() {
            if let Happening::Submission(submission) = happening {
                self.begin(*submission);
            }
        }
        Ok(())
    }

    /// A frame or the end of the link while no pass is on its way.
    fn unasked(&self) -> Outcome {
        let Some(links) = &self.ring.links else { return Ok(()) };
        match links.last.try_recv() {
            Ok(None) => Ok(()),
            Ok(Some(_)) => Err(RingEnd::Broke("the last stage sent a frame that nobody asked for".to_owned())),
            Err(end) => Err(RingEnd::Broke(format!("the last stage is gone: {end}"))),
        }
    }

    fn begin(&mut self, submission: Submission) {
        let Submission { request, at, events, open } = submission;
        let id = self.next_session;
        self.next_session = id.next();
        let meter = Arc::clone(&self.ring.meter);
        meter.received(id, &request, at);
        let Request { prompt, tenant, priority, timeout, max_tokens, sampling, stop, logprobs, ignore_end, .. } =
            request;
        let usage = Usage { prompt_tokens: prompt.len() as u32, ..Usage::default() };
        let n_vocab = self.ring.model.architecture().n_vocab;
        let refuse = |why: String| {
            let _ = events.send(Event::Failed(Failure::Engine(why)));
            meter.ended(id, End::Error, Instant::now());
        };
        let sampler = match Sampler::new(&sampling, n_vocab) {
            Ok(sampler) => sampler,
            Err(error) => return refuse(error.to_string()),
        };
        if max_tokens == Some(0) {
            let _ = events.send(Event::Done { reason: FinishReason::Length, usage });
            return meter.ended(id, End::Length, Instant::now());
        }
        let deadline = timeout.and_then(|timeout| at.checked_add(timeout));
        if let Err(error) = self.scheduler.admit(Arrival { id, prompt, tenant, priority, at, deadline }) {
            return refuse(error.to_string());
        }
        let wishes = Wishes { max_tokens, logprobs, ignore_end };
        let text = Assembler::new(stop);
        let answer = Answer { wishes, events, sampler, text, usage, has_started: false, timeout, _open: open };
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
        self.ring.meter.ended(id, end, Instant::now());
    }

    /// Tells all callers, those too who are not in yet, that nothing more comes.
    fn fail_all(&mut self, failure: &Failure) {
        while let Ok(happening) = self.ring.inbox.try_recv() {
            if let Happening::Submission(submission) = happening {
                let id = self.next_session;
                self.next_session = id.next();
                self.ring.meter.received(id, &submission.request, submission.at);
                let _ = submission.events.send(Event::Failed(failure.clone()));
                self.ring.meter.ended(id, End::Error, Instant::now());
            }
        }
        for (id, answer) in self.answers.drain() {
            answer.fail(failure.clone());
            self.ring.meter.ended(id, End::Error, Instant::now());
        }
    }

    fn send_passes(&mut self) -> Outcome {
        while let Some(pass) = self.scheduler.next_pass() {
            self.send(pass)?;
        }
        self.heed_notices();
        let (images, image_tokens) = self.scheduler.n_images();
        self.ring.meter.load(Load {
            running: self.scheduler.n_running(),
            waiting: self.scheduler.n_waiting(),
            kv_tokens: self.scheduler.kv_tokens(),
            kv_capacity: u64::from(self.ring.limits.n_slots) * u64::from(self.ring.limits.context),
            images,
            image_tokens,
        });
        Ok(())
    }

    /// Tells what the coordinator's own links carried, now and then.
    fn ask_links(&mut self) {
        let Some(links) = &self.ring.links else { return };
        if self.links_asked.elapsed() < LINK_POLL {
            return;
        }
        self.links_asked = Instant::now();
        let n_workers = self.ring.limits.n_stages as usize - 1;
        self.ring.meter.link(0, links.first.stats(), links.first.queued());
        self.ring.meter.link(n_workers, links.last.stats(), 0);
    }

    /// Passes on what the scheduler has decided.
    fn heed_notices(&mut self) {
        let now = Instant::now();
        let meter = &self.ring.meter;
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
        let ring = &*self.ring;
        let at = Instant::now();
        let alone = self.sent.is_empty();
        let mut hidden = Vec::new();
        let rows = if ring.links.is_some() { &mut self.hidden } else { &mut hidden };
        rows.clear();
        if !pass.tokens.is_empty() {
            ring.model
                .embed(&pass.tokens, rows, &mut self.embedded)
                .map_err(|error| RingEnd::Broke(error.to_string()))?;
        }
        let embed = at.elapsed();
        if let Some(links) = &ring.links {
            self.head.deployment = ring.attach.deployment;
            self.head.epoch = ring.attach.epoch;
            self.head.pass = pass.id;
            self.head.steps.clear();
            self.head.steps.extend(pass.steps.iter().map(|step| (*step, false)));
            self.head.sets.clone_from(&pass.sets);
            self.head.timings.clear();
            self.head.n_embd = ring.model.architecture().n_embd;
            self.head.encode(&mut self.header);
            links
                .first
                .send(&self.header, rows)
                .map_err(|error| RingEnd::Broke(format!("the link to the first stage ended: {error}")))?;
        }
        if !alone && let Some(last) = self.sent.back_mut() {
            last.alone = false;
        }
        self.sent.push_back(Sent { pass, at, embed, write: at.elapsed() - embed, alone, hidden });
        Ok(())
    }

    /// Waits for the oldest pass; its hidden states are then in the buffers. Requests that come meanwhile begin at
    /// once.
    fn receive(&mut self) -> Result<Back, RingEnd> {
        let nothing = || RingEnd::Broke("a pass came back that was never sent".to_owned());
        loop {
            let Some(links) = &self.ring.links else {
                let mut sent = self.sent.pop_front().ok_or_else(nothing)?;
                self.hidden = std::mem::take(&mut sent.hidden);
                self.head.steps.clear();
                self.head.steps.extend(sent.pass.steps.iter().map(|step| (*step, false)));
                self.head.timings.clear();
                let now = Instant::now();
                return Ok(Back { sent, read: Duration::ZERO, decoded: now });
            };
            if let Some(mut frame) = links.last.try_recv().map_err(|end| self.link_ended(&end))? {
                if frame.head.epoch != self.ring.attach.epoch {
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
                    return Err(RingEnd::Broke("a pass came back out of order or altered".to_owned()));
                }
                return Ok(Back { sent, read: decoded - arrived, decoded });
            }
            match self.ring.inbox.recv() {
                Ok(Happening::Submission(submission)) => {
                    self.begin(*submission);
                    self.send_passes()?;
                }
                Ok(Happening::Frame) => {}
                Err(_) => return Err(RingEnd::Stopped),
            }
        }
    }

    fn link_ended(&self, end: &IncomingEnd) -> RingEnd {
        if self.ring.stop.load(Ordering::Relaxed) {
            return RingEnd::Stopped;
        }
        RingEnd::Broke(format!("the last stage is gone: {end}"))
    }

    fn run_tail(&mut self, back: &Back) -> Outcome {
        let failed = |error: PassError| RingEnd::Broke(format!("the coordinator's stage failed: {error}"));
        let tail = &mut self.ring.tail;
        tail.apply(&mut self.head.steps).map_err(failed)?;
        tail.run(&back.sent.pass.sets, &mut self.hidden, &mut self.logits).map_err(failed)
    }

    /// Chooses a token for every session whose logits are here.
    fn postprocess(&mut self, back: &Back, tail_begin: Instant, tail_end: Instant) -> Outcome {
        let pass = &back.sent.pass;
        let tail_us = micros(tail_end - tail_begin);
        let stage_us: Vec<u32> = self.head.timings.iter().map(|timing| timing.share_us()).chain([tail_us]).collect();
        let failed: Vec<bool> = self.head.steps.iter().map(|(_, failed)| *failed).collect();
        let outputs = self
            .scheduler
            .complete(pass.id, &stage_us, &failed)
            .ok_or_else(|| RingEnd::Broke("a pass came back out of order".to_owned()))?;
        self.ring.meter.pass(PassReport {
            pass: pass.id,
            rows: &pass.rows,
            n_rows: pass.tokens.len() as u32,
            is_decode: pass.is_decode(),
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
        let n_vocab = self.ring.model.architecture().n_vocab as usize;
        for output in outputs {
            self.choose(output, n_vocab)?;
        }
        Ok(())
    }

    fn choose(&mut self, output: Output, n_vocab: usize) -> Outcome {
        let Some(answer) = self.answers.get_mut(&output.session) else { return Ok(()) };
        let logits = self.logits.get(output.row * n_vocab..(output.row + 1) * n_vocab);
        let Some(logits) = logits else {
            return Err(RingEnd::Broke("the head gave fewer logits than were asked for".to_owned()));
        };
        let chosen = answer.choose(logits, output.position, self.ring.model.vocabulary());
        self.ring.meter.token(output.session, Instant::now());
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
