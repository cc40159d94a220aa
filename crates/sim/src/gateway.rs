//! The front of a node, as `node::gateway` has it: callers' requests, whoever coordinates.
//!
//! It keeps each request with the tokens that came, asks this node's own coordinator or the one that it follows, and
//! submits what is open again when that one is lost (`session.rs`, `dialer.rs` there). The coordinator's side of a link
//! is in [`Coordinator`](crate::coordinator::Coordinator).

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use brigade_protocol::control::{DEAD_AFTER_MS, HEARTBEAT_MS, Peer};
use brigade_protocol::kind;
use brigade_protocol::requests::{Failure, FromGateway, Refusal, Sampling, Submit, ToGateway};

use crate::coordinator::Coordinator;
use crate::host::Host;
use crate::network::{End, Heard, Nanos, Purpose};
use crate::ring::Via;
use crate::truth::Outcome;

/// First and longest pause before the coordinator is dialled again, as in `node::gateway::dialer`.
const REDIAL: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(2));

/// Pause before a coordinator is asked again that did not take a request.
const ASK_AGAIN: Duration = Duration::from_millis(50);

/// Who answers a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Asked {
    Nobody,
    Here,
    There(u64),
}

#[derive(Debug)]
struct Open {
    asked: Asked,
    /// Until when it waits for somebody; set while it does.
    waits_until: Option<Instant>,
}

#[derive(Debug)]
struct Link {
    end: End,
    is_up: bool,
    heard_at: Instant,
    beat_at: Instant,
}

/// The front of a node.
#[derive(Debug)]
pub struct Gateway {
    patience: Duration,
    open: BTreeMap<usize, Open>,
    target: Option<Peer>,
    link: Option<Link>,
    dial_at: Option<Instant>,
    pause: Duration,
    ask_at: Option<Instant>,
    n_submits: u64,
}

impl Gateway {
    /// No requests, and nobody to ask.
    pub fn new(patience: Nanos) -> Self {
        Self {
            patience: Duration::from_nanos(patience),
            open: BTreeMap::new(),
            target: None,
            link: None,
            dial_at: None,
            pause: REDIAL.0,
            ask_at: None,
            n_submits: 0,
        }
    }

    /// Requests whose callers wait.
    pub fn n_open(&self) -> usize {
        self.open.len()
    }

    /// When it wants to be woken.
    pub fn next_wake(&self) -> Option<Instant> {
        let waits = self.open.values().filter_map(|open| open.waits_until).min();
        let beat = self.link.as_ref().filter(|link| link.is_up).map(|link| link.beat_at);
        [waits, beat, self.dial_at, self.ask_at].into_iter().flatten().min()
    }

    /// From now on this node's requests go to another one, or wait.
    pub fn follow(&mut self, host: &mut Host<'_>, target: Option<Peer>) {
        if self.target == target && target.is_some() {
            return;
        }
        self.lose_link(host);
        self.release(host, Asked::Here);
        self.dial_at = target.is_some().then(|| host.now());
        self.pause = REDIAL.0;
        self.target = target;
    }

    /// The requests that somebody was asked wait again.
    fn release(&mut self, host: &Host<'_>, asked: Asked) {
        let until = host.now() + self.patience;
        for open in self.open.values_mut() {
            let is_it = match asked {
                Asked::There(_) => matches!(open.asked, Asked::There(_)),
                other => open.asked == other,
            };
            if is_it {
                open.asked = Asked::Nobody;
                open.waits_until.get_or_insert(until);
            }
        }
    }

    fn lose_link(&mut self, host: &mut Host<'_>) {
        if let Some(link) = self.link.take() {
            host.close(link.end);
        }
        self.release(host, Asked::There(0));
        self.dial_at = Some(host.now() + self.pause);
        self.pause = (self.pause * 2).min(REDIAL.1);
    }

    /// A caller asks.
    pub fn take(&mut self, host: &Host<'_>, caller: usize) {
        let waits_until = Some(host.now() + self.patience);
        self.open.insert(caller, Open { asked: Asked::Nobody, waits_until });
    }

    /// A caller hangs up.
    pub fn hang_up(&mut self, host: &mut Host<'_>, caller: usize, coordinator: Option<&mut Coordinator>) {
        match (self.open.remove(&caller).map(|open| open.asked), coordinator, &self.link) {
            (Some(Asked::Here), Some(coordinator), _) => coordinator.hang_up(host, caller),
            (Some(Asked::There(number)), _, Some(link)) => {
                host.send(link.end, kind::REQUESTS, FromGateway::Cancel { number }.encode());
                host.truth.end(caller, Outcome::Cancelled, 0);
            }
            (Some(_), ..) => host.truth.end(caller, Outcome::Cancelled, 0),
            (None, ..) => {}
        }
    }

    /// Asks whoever coordinates for all that nobody answers, and gives up what has waited too long.
    pub fn turn(&mut self, host: &mut Host<'_>, mut coordinator: Option<&mut Coordinator>) {
        let now = host.now();
        self.open.retain(|caller, _| host.truth.callers[*caller].outcome.is_none());
        self.tend_link(host, coordinator.is_some());
        let waiting: Vec<usize> =
            self.open.iter().filter(|(_, open)| open.asked == Asked::Nobody).map(|(caller, _)| *caller).collect();
        for caller in waiting {
            let asked = match (&mut coordinator, &self.link) {
                (Some(coordinator), _) => {
                    let told = host.truth.callers[caller].n_told;
                    coordinator.submit(host, caller, told, Via::Here).then_some(Asked::Here)
                }
                (None, Some(link)) if link.is_up => {
                    self.n_submits += 1;
                    let submit = submit(host, self.n_submits, caller);
                    host.send(link.end, kind::REQUESTS, FromGateway::Submit(Box::new(submit)).encode());
                    Some(Asked::There(self.n_submits))
                }
                _ => None,
            };
            let Some(open) = self.open.get_mut(&caller) else { continue };
            if let Some(asked) = asked {
                open.asked = asked;
                if asked == Asked::Here {
                    open.waits_until = None;
                }
                host.truth.counts.resumed += u64::from(host.truth.callers[caller].n_told > 0);
            } else if open.waits_until.is_some_and(|until| until <= now) {
                self.open.remove(&caller);
                host.truth.end(caller, Outcome::NoCapacity, Nanos::MAX / 2);
            }
        }
        let is_waiting = self.open.values().any(|open| open.asked == Asked::Nobody);
        self.ask_at = (is_waiting && coordinator.is_some()).then_some(now + ASK_AGAIN);
        // Who has asked somebody waits no longer than that one lets it.
        for open in self.open.values_mut().filter(|open| open.asked != Asked::Nobody) {
            open.waits_until = open.waits_until.filter(|until| *until > now);
        }
    }

    fn tend_link(&mut self, host: &mut Host<'_>, is_coordinator: bool) {
        let now = host.now();
        if let Some(link) = self.link.as_mut().filter(|link| link.is_up && link.beat_at <= now) {
            link.beat_at = now + Duration::from_millis(HEARTBEAT_MS);
            if link.heard_at + Duration::from_millis(DEAD_AFTER_MS) <= now {
                return self.lose_link(host);
            }
            let end = link.end;
            host.send(end, kind::REQUESTS, FromGateway::Beat.encode());
        }
        if self.dial_at.is_some_and(|at| at <= now) {
            self.dial_at = None;
            if let Some(Peer { node, addresses }) =
                self.target.clone().filter(|_| !is_coordinator && self.link.is_none())
            {
                let end = host.dial(node, &addresses, Purpose::Requests);
                self.link = Some(Link { end, is_up: false, heard_at: now, beat_at: now });
            }
        }
    }

    /// Something came over a link; false if it is none of this gateway's.
    pub fn heard(&mut self, host: &mut Host<'_>, end: End, heard: &Heard) -> bool {
        let now = host.now();
        let Some(link) = self.link.as_mut().filter(|link| link.end == end) else { return false };
        link.heard_at = now;
        match heard {
            Heard::Connected => {
                link.is_up = true;
                link.beat_at = now;
                self.pause = REDIAL.0;
            }
            // The part hears the same, and passes it on.
            Heard::Frame { kind: kind::COUNCIL, .. } => {}
            Heard::Frame { bytes, .. } => match ToGateway::decode(bytes) {
                Ok(message) => self.message(host, message),
                Err(error) => panic!("an answer cannot be read: {error}"),
            },
            _ => self.lose_link(host),
        }
        true
    }

    fn message(&mut self, host: &mut Host<'_>, message: ToGateway) {
        let (ToGateway::Token { number, .. }
        | ToGateway::Done { number, .. }
        | ToGateway::Failed { number, .. }
        | ToGateway::Refused { number, .. }) = message
        else {
            return;
        };
        let Some((&caller, open)) = self.open.iter_mut().find(|(_, open)| open.asked == Asked::There(number)) else {
            return;
        };
        let until = host.now() + self.patience;
        match message {
            ToGateway::Token { position, token, .. } => {
                open.waits_until = None;
                let heard = &host.truth.callers[caller];
                let (n_told, position) = (heard.n_told, position as usize);
                assert!(position <= n_told, "request {caller}: token {position} comes behind {n_told} others");
                if position == n_told {
                    let at = heard.n_prompt + position;
                    host.truth.tell(host.virtual_now, caller, at, token);
                }
            }
            ToGateway::Done { .. } => {
                self.open.remove(&caller);
                host.truth.end(caller, Outcome::Answered, 0);
            }
            ToGateway::Failed { failure: Failure::PlacementLost(_), .. } => {
                self.open.remove(&caller);
                host.truth.end(caller, Outcome::NoCapacity, Nanos::MAX / 2);
            }
            ToGateway::Failed { failure: Failure::Stopping, .. }
            | ToGateway::Refused { refusal: Refusal::NotReady(_) | Refusal::Stopping, .. } => {
                open.asked = Asked::Nobody;
                open.waits_until.get_or_insert(until);
                self.ask_at = Some(host.now() + ASK_AGAIN);
            }
            other => panic!("a gateway hears {other:?}"),
        }
    }
}

fn submit(host: &Host<'_>, number: u64, caller: usize) -> Submit {
    let of = &host.truth.callers[caller];
    let known = of.n_prompt + of.n_told;
    Submit {
        number,
        id: caller.to_string(),
        tenant: of.tenant,
        priority: of.priority,
        timeout_ms: None,
        prompt: of.expected[..of.n_prompt].to_vec(),
        max_tokens: Some(of.n_answer() as u32),
        sampling: Sampling {
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repeat_penalty: 1.0,
            frequency_penalty: 0.0,
            presence_penalty: 0.0,
            penalty_window: 0,
            seed: of.sampling,
            logit_bias: Vec::new(),
        },
        stop: Vec::new(),
        logprobs: None,
        ignore_end: true,
        text_idx: 0,
        n_texts: 1,
        n_texts_done: 0,
        answer: of.expected[of.n_prompt..known].to_vec(),
    }
}
