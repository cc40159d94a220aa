//! The coordinator's side of the ring: schedule, run, postprocess.
//!
//! One thread owns the tail stage, the links to the first and from the last worker, and every session. Each turn it
//! takes what came in, sends as many passes as the ring holds, waits for the oldest to come back, computes the tail,
//! chooses tokens and tells the callers. A ring of one stage is the same without links.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, TryRecvError};
use std::time::{Duration, Instant};

use brigade_base::{SessionId, Token};
use brigade_engine::Sampler;
use brigade_net::{Link, LinkError};
use brigade_protocol::frame::{Attach, FrameHead};
use brigade_protocol::kind;
use brigade_protocol::passes::{Limits, Pass, Passes};
use tokio::sync::mpsc::UnboundedSender;

use crate::loaded::LoadedStage;
use crate::model::LocalModel;
use crate::outgoing::Outgoing;
use crate::serving::{Event, Failure, FinishReason, Request, TokenLogprob, Usage};
use crate::stats::RingStats;
use crate::text::Assembler;

/// How long an idle ring sleeps before it looks whether it should end and whether its links are alive.
const IDLE_POLL: Duration = Duration::from_millis(50);

/// A request on its way into the ring.
pub struct Submission {
    /// What is asked.
    pub request: Request,
    /// Who hears the answer.
    pub events: UnboundedSender<Event>,
    /// Counts the open requests; taken back when the session ends.
    pub open: OpenCount,
}

/// One of the open requests; dropping it takes it back.
pub struct OpenCount(Arc<AtomicUsize>);

impl OpenCount {
    /// Counts one more, unless `most` are open already.
    pub fn take(counter: &Arc<AtomicUsize>, most: usize) -> Option<Self> {
        let more = |n| (n < most).then_some(n + 1);
        counter.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more).ok()?;
        Some(Self(Arc::clone(counter)))
    }
}

impl Drop for OpenCount {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Why a ring ended.
#[derive(Debug)]
pub enum RingEnd {
    /// It was told to.
    Stopped,
    /// A link broke, or a stage answered nonsense.
    Broke(String),
}

/// The links of a ring with workers.
pub struct RingLinks {
    /// To the first worker.
    pub first: Outgoing,
    /// From the last one.
    pub last: Arc<dyn Link>,
}

/// What a ring is made of.
pub struct Ring {
    /// The placement it belongs to.
    pub attach: Attach,
    /// Token embeddings and vocabulary.
    pub model: Arc<LocalModel>,
    /// The coordinator's own stage.
    pub tail: LoadedStage,
    /// Missing where the coordinator holds the whole model.
    pub links: Option<RingLinks>,
    /// What bounds the passes.
    pub limits: Limits,
    /// Tells it to end.
    pub stop: Arc<AtomicBool>,
    /// What `status` shows.
    pub stats: Arc<RingStats>,
}

/// A pass that has not come back.
struct Sent {
    pass: Pass,
    at: Instant,
    /// The embeddings, where there is nobody to send them to.
    hidden: Vec<f32>,
}

/// A session and its caller.
struct Session {
    request: Request,
    events: UnboundedSender<Event>,
    sampler: Sampler,
    text: Assembler,
    n_generated: u32,
    _open: OpenCount,
}

/// Buffers that are used for every pass.
#[derive(Default)]
struct Buffers {
    header: Vec<u8>,
    frame: Vec<u8>,
    embedded: Vec<u8>,
    hidden: Vec<f32>,
    logits: Vec<f32>,
}

/// A running ring.
struct Running<'a> {
    ring: &'a mut Ring,
    passes: Passes,
    sent: VecDeque<Sent>,
    sessions: HashMap<SessionId, Session>,
    next_session: SessionId,
    head: FrameHead,
    buffers: Buffers,
}

type Outcome = Result<(), RingEnd>;

impl Ring {
    /// Sends one token around, so that every stage, link and the head have been used once.
    ///
    /// # Errors
    /// If it does not come back whole.
    pub fn probe(&mut self) -> Result<(), RingEnd> {
        let token = self.model.vocabulary().bos().unwrap_or(0);
        let mut running = self.running();
        running.passes.admit(SessionId(0), vec![token]).map_err(|error| RingEnd::Broke(error.to_string()))?;
        running.send_passes()?;
        let sent = running.receive()?;
        running.run_tail(&sent)?;
        running.passes.complete(sent.pass.id);
        running.passes.end(SessionId(0));
        running.send_passes()?;
        let sent = running.receive()?;
        running.run_tail(&sent)?;
        self.stats.reset();
        Ok(())
    }

    /// Serves until it breaks or is stopped. Every session has heard its end when this returns. `close` is called once,
    /// with what broke if something did: it lets no more submissions in and says what to tell those who are.
    pub fn run(&mut self, inbox: &Receiver<Submission>, close: &dyn Fn(Option<Failure>) -> Failure) -> RingEnd {
        let mut running = self.running();
        let end = loop {
            if let Err(end) = running.turn(inbox) {
                break end;
            }
        };
        // Whoever stops a ring closes its links and cancels its stage, which then look broken.
        let end = if running.ring.stop.load(Ordering::Relaxed) { RingEnd::Stopped } else { end };
        let failure = match &end {
            RingEnd::Stopped => close(None),
            RingEnd::Broke(why) => close(Some(Failure::PlacementLost(why.clone()))),
        };
        let waiting = inbox.try_iter().map(|submission| submission.events);
        let open = running.sessions.drain().map(|(_, session)| session.events);
        for events in open.chain(waiting) {
            let _ = events.send(Event::Failed(failure.clone()));
        }
        self.stats.set_load(0, 0);
        end
    }

    fn running(&mut self) -> Running<'_> {
        Running {
            passes: Passes::new(self.limits),
            ring: self,
            sent: VecDeque::new(),
            sessions: HashMap::new(),
            next_session: SessionId(1),
            head: FrameHead::default(),
            buffers: Buffers::default(),
        }
    }
}

impl Running<'_> {
    fn turn(&mut self, inbox: &Receiver<Submission>) -> Outcome {
        if self.ring.stop.load(Ordering::Relaxed) {
            return Err(RingEnd::Stopped);
        }
        self.take_submissions(inbox)?;
        self.drop_abandoned();
        self.ring.stats.set_load(self.passes.n_running(), self.passes.n_waiting());
        self.send_passes()?;
        if self.sent.is_empty() {
            return Ok(());
        }
        let sent = self.receive()?;
        self.run_tail(&sent)?;
        self.postprocess(&sent)
    }

    /// Takes what has come in; an idle ring sleeps here.
    fn take_submissions(&mut self, inbox: &Receiver<Submission>) -> Outcome {
        if self.sent.is_empty() && self.sessions.is_empty() {
            match inbox.recv_timeout(IDLE_POLL) {
                Ok(submission) => self.begin(submission),
                Err(RecvTimeoutError::Disconnected) => return Err(RingEnd::Stopped),
                Err(RecvTimeoutError::Timeout) => return self.look_at_links(),
            }
        }
        loop {
            match inbox.try_recv() {
                Ok(submission) => self.begin(submission),
                Err(TryRecvError::Empty) => return Ok(()),
                Err(TryRecvError::Disconnected) => return Err(RingEnd::Stopped),
            }
        }
    }

    /// Notices a closed link while no pass is on its way.
    fn look_at_links(&mut self) -> Outcome {
        let Some(links) = &self.ring.links else { return Ok(()) };
        match links.last.recv(&mut self.buffers.frame, Some(Instant::now())) {
            Err(LinkError::TimedOut) => Ok(()),
            Ok(_) => Err(RingEnd::Broke("the last stage sent a frame that nobody asked for".to_owned())),
            Err(error) => Err(RingEnd::Broke(format!("the link from the last stage ended: {error}"))),
        }
    }

    fn begin(&mut self, submission: Submission) {
        let Submission { request, events, open } = submission;
        let id = self.next_session;
        self.next_session = id.next();
        let n_vocab = self.ring.model.architecture().n_vocab;
        let sampler = match Sampler::new(&request.sampling, n_vocab) {
            Ok(sampler) => sampler,
            Err(error) => return drop(events.send(Event::Failed(Failure::Engine(error.to_string())))),
        };
        if request.max_tokens == Some(0) {
            let usage = Usage { prompt_tokens: request.prompt.len() as u32, completion_tokens: 0 };
            return drop(events.send(Event::Done { reason: FinishReason::Length, usage }));
        }
        match self.passes.admit(id, request.prompt.clone()) {
            Ok(()) => {
                let text = Assembler::new(request.stop.clone());
                let session = Session { request, events, sampler, text, n_generated: 0, _open: open };
                self.sessions.insert(id, session);
            }
            Err(error) => drop(events.send(Event::Failed(Failure::Engine(error.to_string())))),
        }
    }

    /// Ends the sessions whose callers have gone.
    fn drop_abandoned(&mut self) {
        let passes = &mut self.passes;
        self.sessions.retain(|id, session| {
            let gone = session.events.is_closed();
            if gone {
                tracing::debug!(session = %id, "the caller has gone");
                passes.end(*id);
            }
            !gone
        });
    }

    fn send_passes(&mut self) -> Outcome {
        while let Some(pass) = self.passes.next_pass() {
            self.send(pass)?;
        }
        Ok(())
    }

    fn send(&mut self, pass: Pass) -> Outcome {
        let mut hidden = Vec::new();
        let ring = &*self.ring;
        let rows = if ring.links.is_some() { &mut self.buffers.hidden } else { &mut hidden };
        rows.clear();
        if !pass.tokens.is_empty() {
            ring.model
                .embed(&pass.tokens, rows, &mut self.buffers.embedded)
                .map_err(|error| RingEnd::Broke(error.to_string()))?;
        }
        let at = Instant::now();
        if let Some(links) = &ring.links {
            self.head.deployment = ring.attach.deployment;
            self.head.epoch = ring.attach.epoch;
            self.head.pass = pass.id;
            self.head.sets.clone_from(&pass.sets);
            self.head.timings.clear();
            self.head.n_embd = ring.model.architecture().n_embd;
            self.head.encode(&mut self.buffers.header);
            links
                .first
                .send(&self.buffers.header, rows)
                .map_err(|error| RingEnd::Broke(format!("the link to the first stage ended: {error}")))?;
        }
        self.sent.push_back(Sent { pass, at, hidden });
        Ok(())
    }

    /// Waits for the oldest pass; its hidden states are then in the buffers.
    fn receive(&mut self) -> Result<Sent, RingEnd> {
        let nothing = || RingEnd::Broke("a pass came back that was never sent".to_owned());
        let Some(links) = &self.ring.links else {
            let mut sent = self.sent.pop_front().ok_or_else(nothing)?;
            self.buffers.hidden = std::mem::take(&mut sent.hidden);
            return Ok(sent);
        };
        loop {
            match links.last.recv(&mut self.buffers.frame, None) {
                Ok(kind::FRAME) => {}
                Ok(kind) => {
                    return Err(RingEnd::Broke(format!("the last stage sent a frame of unknown kind {kind:#x}")));
                }
                Err(_) if self.ring.stop.load(Ordering::Relaxed) => return Err(RingEnd::Stopped),
                Err(error) => return Err(RingEnd::Broke(format!("the link from the last stage ended: {error}"))),
            }
            self.head
                .decode(&self.buffers.frame, &mut self.buffers.hidden)
                .map_err(|error| RingEnd::Broke(format!("the last stage sent a broken frame: {error}")))?;
            if self.head.epoch == self.ring.attach.epoch {
                break;
            }
        }
        let sent = self.sent.pop_front().ok_or_else(nothing)?;
        if self.head.pass != sent.pass.id || self.head.sets != sent.pass.sets {
            return Err(RingEnd::Broke("a pass came back out of order or altered".to_owned()));
        }
        self.ring.stats.pass_back(&sent.pass, sent.at.elapsed(), &self.head.timings);
        Ok(sent)
    }

    fn run_tail(&mut self, sent: &Sent) -> Outcome {
        let begin = Instant::now();
        self.ring
            .tail
            .runner
            .run(&sent.pass.sets, &mut self.buffers.hidden, &mut self.buffers.logits)
            .map_err(|error| RingEnd::Broke(format!("the coordinator's stage failed: {error}")))?;
        self.ring.stats.tail_done(&sent.pass, begin.elapsed());
        Ok(())
    }

    /// Chooses a token for every session whose logits are here.
    fn postprocess(&mut self, sent: &Sent) -> Outcome {
        let n_vocab = self.ring.model.architecture().n_vocab as usize;
        let outputs = self
            .passes
            .complete(sent.pass.id)
            .ok_or_else(|| RingEnd::Broke("a pass came back out of order".to_owned()))?;
        for output in outputs {
            let Some(session) = self.sessions.get_mut(&output.session) else { continue };
            let logits = self.buffers.logits.get(output.row * n_vocab..(output.row + 1) * n_vocab);
            let Some(logits) = logits else {
                return Err(RingEnd::Broke("the head gave fewer logits than were asked for".to_owned()));
            };
            let ended = match session.choose(logits, output.position, &self.ring.model) {
                Chosen::GoOn(token) => {
                    self.ring.stats.token();
                    let has_room = self.passes.push(output.session, token);
                    if !has_room {
                        // The token that fills the context was told, but nothing can follow it.
                        session.finish(FinishReason::Length);
                    }
                    !has_room
                }
                Chosen::Ended => {
                    self.ring.stats.token();
                    true
                }
            };
            if ended {
                self.passes.end(output.session);
                self.sessions.remove(&output.session);
            }
        }
        self.ring.stats.set_load(self.passes.n_running(), self.passes.n_waiting());
        Ok(())
    }
}

enum Chosen {
    GoOn(Token),
    Ended,
}

impl Session {
    /// Chooses the token for `position` and tells the caller.
    fn choose(&mut self, logits: &[f32], position: u32, model: &LocalModel) -> Chosen {
        let vocabulary = model.vocabulary();
        let token = self.sampler.sample(logits, position);
        self.sampler.accept(token);
        self.n_generated += 1;
        let is_end = vocabulary.is_end(token) && !self.request.ignore_end;
        if is_end {
            return self.finish(FinishReason::Stop);
        }
        let bytes = vocabulary.token_bytes(token, false);
        let logprobs = self.request.logprobs.map(|n_top| logprob(logits, token, n_top, vocabulary));
        let assembled = self.text.push(&bytes);
        let wants_logprobs = self.request.logprobs.is_some();
        if !assembled.text.is_empty() || wants_logprobs {
            let _ = self.events.send(Event::Delta { text: assembled.text, logprobs: logprobs.into_iter().collect() });
        }
        if assembled.stopped {
            return self.done(FinishReason::Stop);
        }
        if self.request.max_tokens.is_some_and(|most| self.n_generated >= most) {
            return self.finish(FinishReason::Length);
        }
        Chosen::GoOn(token)
    }

    /// Tells what is still held, and the end.
    fn finish(&mut self, reason: FinishReason) -> Chosen {
        let rest = self.text.finish();
        if !rest.is_empty() {
            let _ = self.events.send(Event::Delta { text: rest, logprobs: Vec::new() });
        }
        self.done(reason)
    }

    fn done(&mut self, reason: FinishReason) -> Chosen {
        let prompt_tokens = self.request.prompt.len() as u32;
        let usage = Usage { prompt_tokens, completion_tokens: self.n_generated };
        let _ = self.events.send(Event::Done { reason, usage });
        Chosen::Ended
    }
}

fn logprob(logits: &[f32], token: Token, n_top: u8, vocabulary: &brigade_engine::Vocabulary) -> TokenLogprob {
    let (logprob, top) = brigade_engine::log_probabilities(logits, token, n_top.into());
    let bytes_of = |token| vocabulary.token_bytes(token, true);
    TokenLogprob {
        token,
        bytes: bytes_of(token),
        logprob,
        top: top.into_iter().map(|(token, logprob)| (token, bytes_of(token), logprob)).collect(),
    }
}
