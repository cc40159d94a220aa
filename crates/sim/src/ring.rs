//! The coordinator's side of the ring, as `node::ring` and `node::coordinator::ring_thread` have it: sessions and
//! scheduler outlive every ring; a ring connects both ends, sends a first token around, and serves until it breaks or
//! is stopped.
//!
//! The [`Coordinator`](crate::coordinator::Coordinator) owns it, starts and stops it, and hears what it says
//! ([`Said`]).

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

use brigade_base::{DeploymentId, Epoch, NodeId, PassId, SessionId, Token};
use brigade_protocol::control::Held;
use brigade_protocol::frame::{Attach, Feed, FrameHead, Timing, row_bytes};
use brigade_protocol::kind;
use brigade_protocol::requests::{Failure, Finish, ToGateway, Usage};
use brigade_protocol::schedule::{Arrival, Limits, Output, Pass, Scheduler};

use crate::host::{Host, Work};
use crate::model::{Model, N_EMBD, of_row, to_row};
use crate::network::{End, MS, Nanos, Purpose, SECOND};
use crate::stage::Stage;
use crate::truth::Outcome;

/// How long the last worker's link may take after all stages have loaded, as in `ring_thread`.
const RING_TIMEOUT: Duration = Duration::from_secs(15);

/// What a ring tells the coordinator.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Said {
    /// The first token went around.
    WentAround(Epoch),
    /// It broke.
    Broke(Epoch, String),
    /// No pass is on its way.
    Drained(Epoch),
}

/// A ring to start.
#[derive(Debug)]
pub struct Start {
    /// Its placement.
    pub epoch: Epoch,
    /// First worker and its addresses; none where the coordinator holds the whole model.
    pub first: Option<(NodeId, Vec<String>)>,
    /// The last worker.
    pub last: Option<NodeId>,
    /// Who wants the frames of the first stage too.
    pub shadow: Option<(NodeId, Vec<String>)>,
    /// Stages, the coordinator's included.
    pub n_stages: u32,
    /// What all stages hold.
    pub held: Option<Held>,
}

/// How a caller hears its answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Via {
    /// It asked this node.
    Here,
    /// It asked another one: the link, and the request's number there.
    There(End, u64),
}

#[derive(Debug, Clone, Copy)]
struct Session {
    caller: usize,
    /// Tokens of the answer that were told, here or elsewhere.
    n_told: usize,
    via: Via,
}

#[derive(Debug)]
struct Sent {
    pass: Pass,
    at: Instant,
    is_probe: bool,
}

#[derive(Debug, PartialEq, Eq, Clone, Copy)]
enum Step {
    Connecting,
    Probing,
    Serving,
}

#[derive(Debug)]
struct Run {
    epoch: Epoch,
    n_stages: u32,
    held: Option<Held>,
    step: Step,
    until: Instant,
    first: Option<End>,
    first_is_there: bool,
    last_node: Option<NodeId>,
    last: Option<End>,
    shadow: Option<(End, bool)>,
    is_draining: bool,
    has_drained: bool,
    sent: VecDeque<Sent>,
    /// Frames that came back and are not computed yet, the one that is being computed first.
    back: VecDeque<(FrameHead, Vec<f32>)>,
    is_computing: bool,
}

/// Sessions, their scheduler, and the ring that is there.
#[derive(Debug)]
pub struct Ring {
    deployment: DeploymentId,
    limits: Limits,
    scheduler: Scheduler,
    sessions: BTreeMap<SessionId, Session>,
    next_session: SessionId,
    run: Option<Run>,
    /// Counts what the tail has begun.
    n_tail: u64,
    /// Since when there is no ring.
    without_since: Option<Nanos>,
    rows: Vec<f32>,
}

impl Ring {
    /// No sessions and no ring.
    pub fn new(deployment: DeploymentId, limits: Limits, now: Nanos) -> Self {
        Self {
            deployment,
            limits,
            scheduler: Scheduler::new(limits),
            sessions: BTreeMap::new(),
            next_session: SessionId(1),
            run: None,
            n_tail: 0,
            without_since: Some(now),
            rows: Vec::new(),
        }
    }

    /// Sessions that have not ended.
    pub fn n_sessions(&self) -> usize {
        self.sessions.len()
    }

    /// Sessions in slots and passes in the ring, as the scheduler counts them.
    pub fn reservations(&self) -> (usize, usize, usize) {
        (self.scheduler.n_running(), self.scheduler.n_waiting(), self.scheduler.n_in_flight())
    }

    /// Whether requests are answered.
    pub fn is_serving(&self) -> bool {
        self.run.as_ref().is_some_and(|run| run.step == Step::Serving)
    }

    /// When the oldest pass was sent, and which it is.
    pub fn oldest(&self) -> Option<(PassId, Instant)> {
        self.run.as_ref()?.sent.front().map(|sent| (sent.pass.id, sent.at))
    }

    /// For how long there has been no ring.
    pub fn without(&self, now: Nanos) -> Nanos {
        self.without_since.map_or(0, |since| now - since)
    }

    fn attach(&self, epoch: Epoch, stage: u32, feed: Feed) -> Attach {
        Attach { deployment: self.deployment, epoch, stage, feed }
    }

    /// Begins a ring, in place of whichever there is.
    pub fn start(&mut self, host: &mut Host<'_>, start: Start) {
        self.stop(host);
        let mut dial = |(node, addresses): &(NodeId, Vec<String>)| host.dial(*node, addresses, Purpose::Data);
        let first = start.first.as_ref().map(&mut dial);
        let shadow = start.shadow.as_ref().map(&mut dial).map(|end| (end, false));
        self.run = Some(Run {
            epoch: start.epoch,
            n_stages: start.n_stages,
            held: start.held,
            step: Step::Connecting,
            until: host.now() + RING_TIMEOUT,
            first,
            first_is_there: false,
            last_node: start.last,
            last: None,
            shadow,
            is_draining: false,
            has_drained: false,
            sent: VecDeque::new(),
            back: VecDeque::new(),
            is_computing: false,
        });
    }

    /// Ends the ring, if there is one; its sessions wait.
    pub fn stop(&mut self, host: &mut Host<'_>) {
        let Some(run) = self.run.take() else { return };
        let shadow = run.shadow.map(|(end, _)| end);
        [run.first, run.last, shadow].into_iter().flatten().for_each(|end| host.close(end));
        self.without_since.get_or_insert(host.virtual_now);
    }

    /// Sends no further pass.
    pub fn drain(&mut self, epoch: Epoch) {
        if let Some(run) = self.run.as_mut().filter(|run| run.epoch == epoch) {
            run.is_draining = true;
        }
    }

    /// A request enters, of whose answer so many tokens are known. False if nobody will answer it.
    pub fn submit(&mut self, host: &mut Host<'_>, caller: usize, n_told: usize, via: Via) -> bool {
        if self.without(host.virtual_now) >= host.truth.patience {
            return false;
        }
        let id = self.next_session;
        self.next_session = id.next();
        let of = &host.truth.callers[caller];
        let known = of.n_prompt + n_told;
        let arrival = Arrival {
            id,
            prompt: of.expected[..of.n_prompt].to_vec(),
            answer: of.expected[of.n_prompt..known].to_vec(),
            tenant: of.tenant,
            priority: of.priority,
            at: host.now(),
            deadline: None,
        };
        self.sessions.insert(id, Session { caller, n_told, via });
        if n_told == of.n_answer() {
            // Its last token was told, and only its end was not.
            self.finish(host, id, Outcome::Answered);
        } else {
            let admitted = self.scheduler.admit(arrival);
            assert_eq!(admitted, Ok(()), "request {caller} is not admitted");
        }
        true
    }

    /// A caller hangs up.
    pub fn hang_up(&mut self, host: &mut Host<'_>, wanted: impl Fn(usize, Via) -> bool) {
        let of = |(id, session): (&SessionId, &Session)| wanted(session.caller, session.via).then_some(*id);
        let gone: Vec<SessionId> = self.sessions.iter().filter_map(of).collect();
        gone.into_iter().for_each(|session| self.finish(host, session, Outcome::Cancelled));
    }

    fn finish(&mut self, host: &mut Host<'_>, id: SessionId, outcome: Outcome) {
        self.scheduler.end(id);
        let Some(session) = self.sessions.remove(&id) else { return };
        let without = self.without(host.virtual_now);
        let Via::There(end, number) = session.via else { return host.truth.end(session.caller, outcome, without) };
        let message = match outcome {
            Outcome::Answered => {
                let usage = Usage { prompt_tokens: 0, cached_tokens: 0, completion_tokens: session.n_told as u32 };
                ToGateway::Done { number, reason: Finish::Length, usage }
            }
            Outcome::NoCapacity => {
                assert!(without + without / 10 >= host.truth.patience, "request {} fails too soon", session.caller);
                ToGateway::Failed { number, failure: Failure::PlacementLost("nothing took its place".to_owned()) }
            }
            Outcome::Cancelled | Outcome::EntryLost => return,
        };
        host.send(end, kind::REQUESTS, message.encode());
    }

    /// Ends all sessions where there has been no ring for too long.
    pub fn lose_patience(&mut self, host: &mut Host<'_>) {
        if self.without(host.virtual_now) < host.truth.patience {
            return;
        }
        let sessions: Vec<SessionId> = self.sessions.keys().copied().collect();
        sessions.into_iter().for_each(|session| self.finish(host, session, Outcome::NoCapacity));
    }

    /// Whether a data link with this greeting is the last worker's.
    pub fn accept(&mut self, end: End, from: NodeId, attach: Attach) -> bool {
        let deployment = self.deployment;
        let Some(run) = &mut self.run else { return false };
        let is_it = attach.deployment == deployment && attach.epoch == run.epoch && attach.feed == Feed::Passes;
        let is_it = is_it && run.last_node == Some(from) && run.last.is_none();
        if is_it {
            run.last = Some(end);
        }
        is_it
    }

    /// Whether a link is one of the ring's.
    pub fn has(&self, end: End) -> bool {
        self.run.as_ref().is_some_and(|run| {
            run.first == Some(end) || run.last == Some(end) || run.shadow.is_some_and(|(shadow, _)| shadow == end)
        })
    }

    /// A node that was dialled is there.
    pub fn connected(&mut self, host: &mut Host<'_>, end: End) {
        let Some(run) = &mut self.run else { return };
        let feed = if run.first == Some(end) { Feed::Passes } else { Feed::Shadow };
        if run.first == Some(end) {
            run.first_is_there = true;
        } else if let Some((_, is_there)) = run.shadow.as_mut().filter(|(shadow, _)| *shadow == end) {
            *is_there = true;
        }
        let attach = self.attach(self.run.as_ref().map_or(Epoch(0), |run| run.epoch), 0, feed);
        host.send(end, kind::ATTACH, attach.encode().to_vec());
    }

    /// A link has ended, or was never there.
    pub fn ended(&mut self, host: &mut Host<'_>, end: End) -> Option<Said> {
        let run = self.run.as_mut()?;
        if run.shadow.is_some_and(|(shadow, _)| shadow == end) {
            run.shadow = None;
            return None;
        }
        self.broke(host, "a link of the ring ended")
    }

    fn broke(&mut self, host: &mut Host<'_>, why: &str) -> Option<Said> {
        let epoch = self.run.as_ref()?.epoch;
        self.stop(host);
        Some(Said::Broke(epoch, why.to_owned()))
    }

    /// A frame is back.
    pub fn frame(&mut self, host: &mut Host<'_>, end: End, bytes: &[u8]) -> Option<Said> {
        let run = self.run.as_mut()?;
        if run.last != Some(end) {
            return self.broke(host, "a frame came where none was expected");
        }
        let (mut head, mut rows) = (FrameHead::default(), Vec::new());
        if let Err(error) = head.decode(bytes, &mut rows) {
            panic!("a frame cannot be read: {error}");
        }
        if head.epoch != run.epoch {
            return None;
        }
        let at = run.back.len();
        let is_it = run.sent.get(at).is_some_and(|sent| sent.pass.id == head.pass && sent.pass.sets == head.sets);
        if !is_it {
            return self.broke(host, "a pass came back out of order or altered");
        }
        run.back.push_back((head, rows));
        None
    }

    /// Goes on wherever it can; returns what the coordinator is to hear.
    pub fn turn(&mut self, host: &mut Host<'_>, has_tail: bool) -> Option<Said> {
        let run = self.run.as_mut()?;
        if run.step == Step::Connecting {
            let is_there = run.first.is_none() || run.first_is_there && run.last.is_some();
            if !is_there && host.now() >= run.until {
                return self.broke(host, "the last stage did not reach this node");
            }
            if is_there && has_tail {
                run.step = Step::Probing;
                let limits = Limits { n_stages: run.n_stages, ..self.limits };
                self.scheduler.recover(limits, run.held.as_ref());
                let keeps = run.held.as_ref().is_some_and(|held| held.tokens.iter().any(|n| *n > 0));
                host.truth.counts.kept += u64::from(keeps && !self.sessions.is_empty());
                // Where all stages go on, a row would cost a session what its slot holds.
                let token: Option<Token> = run.held.is_none().then_some(1);
                let pass = self.scheduler.probe(token);
                self.send(host, pass, true);
            }
        }
        self.send_passes(host);
        let run = self.run.as_mut()?;
        if !run.is_computing && !run.back.is_empty() {
            run.is_computing = true;
            self.n_tail += 1;
            let n_rows = Nanos::from(run.back[0].0.n_rows());
            host.begin(2 * MS + n_rows * MS / 5, Work::TailPass(self.n_tail));
        }
        let epoch = run.epoch;
        let is_drained = run.is_draining && run.sent.is_empty();
        (is_drained && !std::mem::replace(&mut run.has_drained, true)).then_some(Said::Drained(epoch))
    }

    fn send_passes(&mut self, host: &mut Host<'_>) {
        while self.run.as_ref().is_some_and(|run| run.step == Step::Serving && !run.is_draining) {
            let pass = self.scheduler.next_pass();
            self.scheduler.take_notices();
            match pass {
                Some(pass) => self.send(host, pass, false),
                None => return,
            }
        }
    }

    fn send(&mut self, host: &mut Host<'_>, pass: Pass, is_probe: bool) {
        let Some(run) = &mut self.run else { return };
        let of: Vec<Option<usize>> = match is_probe {
            true => vec![None; pass.sets.len()],
            false => pass.rows.iter().map(|rows| self.sessions.get(&rows.session).map(|of| of.caller)).collect(),
        };
        host.truth.sent((host.node, host.incarnation), (self.deployment, run.epoch), &pass, &of);
        let mut head = FrameHead {
            deployment: self.deployment,
            epoch: run.epoch,
            pass: pass.id,
            follows: pass.follows,
            steps: pass.steps.iter().map(|step| (*step, false)).collect(),
            sets: pass.sets.clone(),
            timings: Vec::new(),
            n_embd: N_EMBD,
        };
        self.rows.clear();
        self.rows.extend(pass.tokens.iter().flat_map(|token| to_row(Model::embed(*token))));
        let mut bytes = Vec::new();
        head.encode(&mut bytes);
        bytes.extend_from_slice(row_bytes(&self.rows));
        if let Some((end, true)) = run.shadow {
            host.send(end, kind::FRAME, bytes.clone());
        }
        match run.first {
            Some(end) => drop(host.send(end, kind::FRAME, bytes)),
            None => {
                head.timings.clear();
                run.back.push_back((head, self.rows.clone()));
            }
        }
        run.sent.push_back(Sent { pass, at: host.now(), is_probe });
    }

    /// The tail is done with the oldest pass that is back.
    pub fn tail_done(&mut self, host: &mut Host<'_>, n: u64, tail: Option<&mut Stage>) -> Option<Said> {
        let is_current = n == self.n_tail;
        let run = self.run.as_mut().filter(|run| is_current && run.is_computing)?;
        run.is_computing = false;
        let (mut head, mut rows) = run.back.pop_front()?;
        let sent = run.sent.pop_front()?;
        let Some(tail) = tail else { return self.broke(host, "the tail is gone") };
        let epoch = run.epoch;
        if let Err(error) = run_stage(host, tail, &mut head, &mut rows) {
            return self.broke(host, &error);
        }
        if sent.is_probe {
            let run = self.run.as_mut()?;
            run.step = Step::Serving;
            self.without_since = None;
            host.truth.counts.rings += 1;
            return Some(Said::WentAround(epoch));
        }
        let failed: Vec<bool> = head.steps.iter().map(|(_, failed)| *failed).collect();
        let stage_us: Vec<u32> = head.timings.iter().map(|timing| timing.share_us()).chain([2000]).collect();
        let outputs = self.scheduler.complete(sent.pass.id, &stage_us, &failed);
        let outputs = outputs.unwrap_or_else(|| panic!("pass {} is not the one that was to come back", sent.pass.id));
        let mut values = Vec::new();
        let mut at = 0;
        for set in &sent.pass.sets {
            at += set.n_rows as usize * N_EMBD as usize;
            values.extend((set.n_outputs > 0).then(|| of_row(&rows[at - N_EMBD as usize..at])));
        }
        for output in outputs {
            self.choose(host, output, values[output.row]);
        }
        None
    }

    fn choose(&mut self, host: &mut Host<'_>, output: Output, value: u64) {
        let Some(session) = self.sessions.get_mut(&output.session) else { return };
        let (caller, via) = (session.caller, session.via);
        let of = &host.truth.callers[caller];
        let position = output.position as usize;
        assert_eq!(position, of.n_prompt + session.n_told, "request {caller}: a token is lost or repeated");
        let token = Model::choose(value, of.sampling, position);
        let in_answer = session.n_told as u32;
        session.n_told += 1;
        let is_whole = session.n_told == of.n_answer();
        match via {
            Via::Here => host.truth.tell(host.virtual_now, caller, position, token),
            Via::There(end, number) => {
                let text = String::new();
                let message = ToGateway::Token { number, position: in_answer, token, text, logprob: None };
                host.send(end, kind::REQUESTS, message.encode());
            }
        }
        let has_room = self.scheduler.push(output, token);
        assert!(has_room || is_whole, "request {caller} has outgrown its context");
        if is_whole {
            self.finish(host, output.session, Outcome::Answered);
        }
    }
}

/// Runs a frame through a stage: KV steps, then rows, which become those of the next stage.
///
/// # Errors
/// If the stage does not hold what the frame counts on.
pub fn run_stage(host: &mut Host<'_>, stage: &mut Stage, head: &mut FrameHead, rows: &mut [f32]) -> Result<(), String> {
    stage.apply(&mut head.steps, host.is_disk_full).map_err(|error| format!("{error:?}"))?;
    let tokens = host.truth.tokens((head.deployment, head.epoch), head.pass);
    let mut at = 0;
    for (which, set) in head.sets.iter().enumerate() {
        let end = at + set.n_rows as usize * N_EMBD as usize;
        let mut values: Vec<u64> = rows[at..end].chunks(N_EMBD as usize).map(of_row).collect();
        let tokens = tokens.get(which).map(Vec::as_slice).unwrap_or_default();
        stage.compute(*set, tokens, &mut values).map_err(|error| format!("{error:?}"))?;
        host.truth.applied(stage, (head.deployment, head.epoch), head.pass, which);
        let out = values.iter().flat_map(|value| to_row(*value));
        rows[at..end].iter_mut().zip(out).for_each(|(row, value)| *row = value);
        at = end;
    }
    stage.applied = head.pass;
    Ok(())
}

/// What a stage adds to a frame.
pub fn timing(compute: Nanos) -> Timing {
    Timing { compute_us: (compute / 1000).min(60 * SECOND / 1000) as u32, n_frames: 1, ..Timing::default() }
}
