//! The stages that a node holds for a coordinator, as a state machine without I/O.
//!
//! - The coordinator declares all stages that the node is to hold ([`Assign`]); [`Stages`] compares that with what is
//!   there and brings it about: what is loaded and wanted again stays in memory, what is not wanted is freed, then
//!   the missing is loaded, one stage after the other.
//! - A stage rests between placements, and what its slots hold is of use to the next one, unless that orders otherwise.
//!   At rest its coordinator is told what they hold.
//! - A stage that serves waits until both neighbours' links are up. One that stands by computes what comes over a link
//!   and sends nothing on. One that is relieved sends what its slots hold to its successor.
//! - Without a coordinator everything stops at once; the stages rest for [`LEASE_MS`] and are freed then.
//!
//! Whoever drives it owns stages and links, and names them by [`HoldId`], [`LinkId`] and [`DialId`]. A link belongs to
//! the machine from its input until an action names it: it is closed, or given to a stage, which then owns it.
//! `event.rs` has inputs and actions, `want.rs` what is ordered of a stage, `hold.rs` where it stands.

use std::mem;
use std::sync::Arc;
use std::time::{Duration, Instant};

use brigade_base::{ByteSize, DeploymentId, Epoch, NodeId};

pub use self::event::{Action, DialId, End, HoldId, Input, LinkId, Load, StageKey, View};
use self::hold::{Hold, Job, State, Stopping};
use self::want::{Out, Want};
use crate::control::{Assign, Held, LEASE_MS, Peer, StageOrder, StageRole, ToCoordinator};
use crate::frame::{Attach, Feed};

mod event;
mod hold;
#[cfg(test)]
mod tests;
mod want;

/// How long a stage that stood by may go on with frames that have arrived, before it serves: its feeder has stopped
/// too and closes the link, so this is for one that hangs. A few passes' time.
pub const DRAIN: Duration = Duration::from_millis(200);

/// How long a stage waits for what another one hands over, all in all: some gigabytes on a fast network. Computing the
/// tokens again takes about as long.
pub const HANDOVER: Duration = Duration::from_secs(10);

/// Pause before a successor is dialled again, which may not know of its luck yet.
const REDIAL_SUCCESSOR: Duration = Duration::from_millis(250);

/// Pause before a node that stands by is dialled again: it may still load, or was too slow for the ring.
const REDIAL_STANDBY: Duration = Duration::from_secs(2);

/// The placement that the node has part in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Current {
    deployment: DeploymentId,
    epoch: Epoch,
    /// All stages of the ring are loaded, so that those behind may be dialled.
    joined: bool,
}

/// A link that came in and waits for its stage to be at rest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Inbound {
    link: LinkId,
    peer: NodeId,
    stage: u32,
    feed: Feed,
}

/// The stages that a node holds. See the head of this file.
#[derive(Debug, Default)]
pub struct Stages {
    holds: Vec<Hold>,
    current: Option<Current>,
    /// The newest orders so far, which outlive the link that they came over.
    newest: Option<(DeploymentId, Epoch, u32)>,
    /// At most three for each stage that is wanted.
    inbound: Vec<Inbound>,
    is_connected: bool,
    /// The coordinator is gone; all is freed then.
    lease_until: Option<Instant>,
    leave_until: Option<Instant>,
    last_id: u64,
    actions: Vec<Action>,
}

impl Stages {
    /// A node that holds nothing and has no coordinator.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes note of what happened and says what to do, in this order.
    pub fn handle(&mut self, now: Instant, input: Input) -> Vec<Action> {
        self.apply(now, input);
        self.expire(now);
        self.free_unwanted();
        self.load_next();
        for at in 0..self.holds.len() {
            self.advance(at, now);
        }
        mem::take(&mut self.actions)
    }

    /// When [`Input::Tick`] is due.
    pub fn next_tick(&self) -> Option<Instant> {
        let holds = self.holds.iter().filter_map(|hold| hold.next_tick());
        holds.chain(self.lease_until).chain(self.leave_until).min()
    }

    /// Who may bring a data link now.
    pub fn peers(&self) -> impl Iterator<Item = NodeId> {
        self.holds.iter().filter_map(|hold| hold.want.as_ref()).flat_map(Want::peers)
    }

    /// The stages that are wanted, for people; those that it serves first.
    pub fn view(&self) -> Vec<View> {
        let mut views: Vec<_> = self.holds.iter().filter_map(Hold::view).collect();
        views.sort_by_key(|view| (view.is_standby, view.stage));
        views
    }

    /// Memory of the stages that are loaded.
    pub fn memory(&self) -> ByteSize {
        ByteSize(self.holds.iter().map(|hold| hold.memory.0).sum())
    }

    /// Whether the node waits for its stages to be placed elsewhere.
    pub fn is_leaving(&self) -> bool {
        self.leave_until.is_some()
    }

    fn apply(&mut self, now: Instant, input: Input) {
        match input {
            Input::CoordinatorHere => self.is_connected = true,
            Input::CoordinatorGone => self.coordinator_gone(now),
            Input::Assign(assign) => self.assign(*assign),
            Input::Join { deployment, epoch } => {
                if let Some(current) = &mut self.current
                    && (current.deployment, current.epoch) == (deployment, epoch)
                {
                    current.joined = true;
                }
            }
            Input::Released => {
                if self.is_leaving() {
                    self.end();
                }
            }
            Input::Leave { reason, within } => self.leave(now, reason, within),
            Input::Progress(id, done, total) => {
                if let Some((epoch, stage)) = self.tag(id) {
                    self.tell(ToCoordinator::Progress { epoch, stage, done, total });
                }
            }
            Input::Loaded(id, result) => self.loaded(id, result),
            Input::Dialled(dial, result) => self.dialled(now, dial, result),
            Input::Inbound { link, peer, attach } => self.came_in(link, peer, attach),
            Input::Ended { id, end, held } => self.ended(now, id, end, held),
            Input::ShadowGone(link) => {
                for hold in &mut self.holds {
                    if let (State::Busy(busy), Some(want)) = (&mut hold.state, &mut hold.want)
                        && busy.job == (Job::Serving { shadow: Some(link) })
                    {
                        busy.job = Job::Serving { shadow: None };
                        want.shadow = Out::Again(now + REDIAL_STANDBY);
                    }
                }
            }
            Input::Tick => {}
        }
    }

    fn assign(&mut self, assign: Assign) {
        let Assign { deployment, epoch, revision, model, stages } = assign;
        let is_old =
            |(of, newest, last): (DeploymentId, Epoch, u32)| of == deployment && (epoch, revision) <= (newest, last);
        if self.newest.is_some_and(is_old) {
            return;
        }
        self.newest = Some((deployment, epoch, revision));
        self.lease_until = None;
        let same = self.current.filter(|now| (now.deployment, now.epoch) == (deployment, epoch));
        if same.is_none() {
            // They are of a ring that is over.
            self.actions.extend(self.inbound.drain(..).map(|inbound| Action::Close(inbound.link)));
        }
        self.current = Some(same.unwrap_or(Current { deployment, epoch, joined: false }));
        let mut before: Vec<_> = self.holds.iter_mut().map(|hold| hold.want.take()).collect();
        let model = model.map(Arc::new);
        for order in stages {
            let serial = self.next_id();
            let Some(model) = &model else { break };
            let key = StageKey::of(model, &order);
            let found = self.holds.iter().position(|hold| hold.want.is_none() && hold.can_be(&key));
            let Some(at) = found else {
                // What is not here cannot be handed over.
                if !matches!(order.role, StageRole::HandOver { .. }) {
                    let id = HoldId(self.next_id());
                    let load = Load { id, key: key.clone(), model: Arc::clone(model), tensors: order.tensors.clone() };
                    self.holds.push(Hold::queued(key, load, Want::new(serial, order), deployment));
                }
                continue;
            };
            let earlier =
                before.get_mut(at).filter(|_| same.is_some()).and_then(|want| want.take_if(|w| w.is_like(&order)));
            let want = earlier.unwrap_or_else(|| Want::new(serial, order.clone()));
            self.holds[at].want = Some(want);
            self.change_shadow(at, &order);
        }
        for want in before.into_iter().flatten() {
            self.actions.extend(want.links().map(Action::Close));
        }
        self.close_unexpected();
    }

    /// Gives up the link to a node that stands by, where another one or none is ordered.
    fn change_shadow(&mut self, at: usize, order: &StageOrder) {
        let hold = &mut self.holds[at];
        let Some(want) = &mut hold.want else { return };
        let is_same = want::shadow_of(&want.role) == want::shadow_of(&order.role);
        want.role = order.role.clone();
        if is_same {
            return;
        }
        self.actions.extend(want.shadow.link().map(Action::Close));
        want.shadow = Out::None;
        if let State::Busy(busy) = &mut hold.state
            && matches!(busy.job, Job::Serving { shadow: Some(_) })
        {
            busy.job = Job::Serving { shadow: None };
            self.actions.push(Action::Shadow(hold.id, None));
        }
    }

    /// Closes links that wait for what is not wanted any more.
    fn close_unexpected(&mut self) {
        let Self { inbound, holds, actions, .. } = self;
        inbound.retain(|inbound| {
            let is_wanted = |hold: &Hold| hold.takes(inbound.peer, inbound.stage, inbound.feed);
            let keep = holds.iter().any(is_wanted);
            if !keep {
                actions.push(Action::Close(inbound.link));
            }
            keep
        });
    }

    fn came_in(&mut self, link: LinkId, peer: NodeId, attach: Attach) {
        let is_current = |now: Current| (now.deployment, now.epoch) == (attach.deployment, attach.epoch);
        let is_expected = |hold: &Hold| hold.takes(peer, attach.stage, attach.feed);
        if !self.current.is_some_and(is_current) || !self.holds.iter().any(is_expected) {
            return self.actions.push(Action::Close(link));
        }
        // Who comes again has lost the link before.
        if let Some(earlier) = self.take_inbound(attach.stage, attach.feed) {
            self.actions.push(Action::Close(earlier));
        }
        self.inbound.push(Inbound { link, peer, stage: attach.stage, feed: attach.feed });
    }

    fn take_inbound(&mut self, stage: u32, feed: Feed) -> Option<LinkId> {
        let at = self.inbound.iter().position(|inbound| (inbound.stage, inbound.feed) == (stage, feed))?;
        Some(self.inbound.swap_remove(at).link)
    }

    fn coordinator_gone(&mut self, now: Instant) {
        self.is_connected = false;
        self.current = None;
        for hold in &mut self.holds {
            if let Some(want) = hold.want.take() {
                self.actions.extend(want.links().map(Action::Close));
            }
        }
        self.close_unexpected();
        if self.is_leaving() {
            self.end();
        } else if !self.holds.is_empty() && self.lease_until.is_none() {
            self.lease_until = Some(now + Duration::from_millis(LEASE_MS));
        }
    }

    fn leave(&mut self, now: Instant, reason: String, within: Duration) {
        let has_part = self.holds.iter().any(|hold| hold.want.is_some());
        if !self.is_connected || !has_part {
            return self.end();
        }
        if !self.is_leaving() {
            self.leave_until = Some(now + within);
            self.tell(ToCoordinator::Leave { reason });
        }
    }

    fn end(&mut self) {
        self.leave_until = None;
        self.actions.push(Action::End);
    }

    fn loaded(&mut self, id: HoldId, result: Result<ByteSize, String>) {
        let Some(at) = self.holds.iter().position(|hold| hold.id == id && hold.is_loading()) else { return };
        match result {
            Ok(memory) => {
                self.holds[at].memory = memory;
                self.holds[at].state = State::Resting;
            }
            Err(reason) => {
                let tag = self.tag(id);
                self.holds.remove(at);
                if let Some((epoch, stage)) = tag {
                    self.tell(ToCoordinator::StageFailed { epoch, stage, reason });
                }
            }
        }
    }

    fn dialled(&mut self, now: Instant, dial: DialId, result: Result<LinkId, String>) {
        let wants = self.holds.iter_mut().filter_map(|hold| hold.want.as_mut());
        let found = wants.into_iter().find_map(|want| {
            let is_shadow = want.shadow == Out::Dialling(dial);
            (is_shadow || want.next == Out::Dialling(dial)).then_some((want, is_shadow))
        });
        let Some((want, is_shadow)) = found else {
            return self.actions.extend(result.ok().map(Action::Close));
        };
        let is_successor = matches!(want.role, StageRole::HandOver { .. });
        let stage = want.stage;
        let (told, out) = match result {
            Ok(link) => (Ok(()), Out::Up(link)),
            Err(_) if is_shadow => (Ok(()), Out::Again(now + REDIAL_STANDBY)),
            Err(_) if is_successor => (Ok(()), Out::Again(now + REDIAL_SUCCESSOR)),
            Err(reason) => (Err(reason), Out::Over),
        };
        if is_shadow {
            want.shadow = out;
            return;
        }
        want.next = out;
        let Some(Current { epoch, .. }) = self.current.filter(|_| !is_successor) else { return };
        self.tell(match told {
            Ok(()) => ToCoordinator::Joined { epoch, stage },
            Err(reason) => ToCoordinator::RingBroke { epoch, stage, reason },
        });
    }

    fn ended(&mut self, now: Instant, id: HoldId, end: End, held: Option<Held>) {
        let Some(hold) = self.holds.iter_mut().find(|hold| hold.id == id) else { return };
        let State::Busy(busy) = mem::replace(&mut hold.state, State::Resting) else { return };
        hold.held = held;
        let (Some(want), Some(current)) = (&mut hold.want, self.current) else { return };
        if busy.serial != want.serial || busy.stopping.is_some() {
            return;
        }
        match busy.job {
            Job::Serving { .. } => {
                want.shadow = Out::Over;
                if let End::Failed(reason) = end {
                    let (epoch, stage) = (current.epoch, want.stage);
                    self.tell(ToCoordinator::RingBroke { epoch, stage, reason });
                }
            }
            Job::Sending if end == End::Done => hold.want = None,
            Job::Sending => want.next = Out::Again(now + REDIAL_SUCCESSOR),
            Job::StandingBy { .. } | Job::Receiving => {}
        }
    }

    /// Ends what has lasted too long.
    fn expire(&mut self, now: Instant) {
        let is_due = |until: Option<Instant>| until.is_some_and(|until| until <= now);
        if is_due(self.lease_until) {
            self.lease_until = None;
        }
        if is_due(self.leave_until) {
            self.end();
        }
        for hold in &mut self.holds {
            if let State::Busy(busy) = &mut hold.state
                && busy.stopping.is_some_and(|stopping| matches!(stopping, Stopping::By(at) if at <= now))
            {
                busy.stopping = Some(Stopping::Now);
                self.actions.push(Action::Stop(hold.id));
            }
            // A successor that cannot be reached computes everything again.
            let hands_over =
                |want: &Want| matches!(want.role, StageRole::HandOver { .. }) && is_due(want.handover_until);
            if let Some(want) = hold.want.take_if(|want| matches!(hold.state, State::Resting) && hands_over(want)) {
                self.actions.extend(want.links().map(Action::Close));
            }
        }
    }

    /// Ends what nobody wants, and frees it unless its coordinator may come back.
    fn free_unwanted(&mut self) {
        let is_leased = self.lease_until.is_some();
        let actions = &mut self.actions;
        self.holds.retain_mut(|hold| {
            if hold.want.is_some() {
                return true;
            }
            match &mut hold.state {
                State::Queued(_) => return false,
                State::Busy(busy) if busy.stopping != Some(Stopping::Now) => {
                    busy.stopping = Some(Stopping::Now);
                    actions.push(Action::Stop(hold.id));
                }
                State::Loading { given_up } if !is_leased && !*given_up => {
                    *given_up = true;
                    actions.push(Action::Free(hold.id));
                }
                State::Resting if !is_leased => {
                    actions.push(Action::Free(hold.id));
                    return false;
                }
                State::Busy(_) | State::Loading { .. } | State::Resting => {}
            }
            true
        });
    }

    /// Loads the next stage, once all that is not wanted is freed: this node may not hold both.
    fn load_next(&mut self) {
        if self.holds.iter().any(|hold| hold.want.is_none() || hold.is_loading()) {
            return;
        }
        let queued = self.holds.iter_mut().filter(|hold| matches!(hold.state, State::Queued(_)));
        // What the ring waits for goes first.
        let Some(hold) = queued.min_by_key(|hold| hold.want.as_ref().map(Want::rank)) else { return };
        if let State::Queued(load) = mem::replace(&mut hold.state, State::Loading { given_up: false }) {
            self.actions.push(Action::Load(load));
        }
    }

    /// Takes a wanted stage one or more steps on.
    fn advance(&mut self, at: usize, now: Instant) {
        let Some(current) = self.current else { return };
        let hold = &mut self.holds[at];
        let Some(want) = &mut hold.want else { return };
        match &mut hold.state {
            State::Queued(_) | State::Loading { .. } => {}
            State::Busy(busy) if !busy.fits(want) => {
                if busy.stopping.is_none() {
                    // What has arrived at a stage that stood by is worth having.
                    let drains =
                        matches!(busy.job, Job::StandingBy { .. }) && want.keep_kv && hold.kv_of == current.deployment;
                    busy.stopping = Some(if drains { Stopping::By(now + DRAIN) } else { Stopping::Now });
                    self.actions.extend((!drains).then_some(Action::Stop(hold.id)));
                }
            }
            State::Busy(busy) => {
                if let Job::Serving { shadow: None } = busy.job {
                    if let Some(link) = want.shadow.take_link() {
                        busy.job = Job::Serving { shadow: Some(link) };
                        self.actions.push(Action::Shadow(hold.id, Some(link)));
                    }
                    self.dial(at, now, current);
                }
            }
            State::Resting => self.advance_at_rest(at, now, current),
        }
    }

    fn advance_at_rest(&mut self, at: usize, now: Instant, current: Current) {
        let hold = &mut self.holds[at];
        let Some(want) = &mut hold.want else { return };
        let (id, stage) = (hold.id, want.stage);
        if !mem::replace(&mut want.is_settled, true) {
            let keeps = want.keep_kv && hold.kv_of == current.deployment;
            if !keeps && hold.held.take().is_some() {
                self.actions.push(Action::Empty(id));
            }
            hold.kv_of = current.deployment;
        }
        let attach = |feed| Attach { deployment: current.deployment, epoch: current.epoch, stage, feed };
        match want.role.clone() {
            StageRole::HandOver { .. } => {
                let until = *want.handover_until.get_or_insert(now + HANDOVER);
                if let Some(link) = want.next.take_link() {
                    self.start(at, Job::Sending);
                    self.actions.push(Action::Send { id, link, within: until - now });
                } else {
                    self.dial(at, now, current);
                }
            }
            StageRole::Standby { upstream } => {
                self.report(at, current);
                if let Some(upstream) = upstream
                    && let Some(inbound) = self.take_inbound(stage, Feed::Shadow)
                {
                    self.start(at, Job::StandingBy { upstream });
                    self.actions.push(Action::StandBy { id, attach: attach(Feed::Shadow), inbound });
                }
            }
            StageRole::Serve { kv_from, .. } => {
                if kv_from.is_some() && !self.holds[at].takes_over(now) {
                    if let Some(link) = self.take_inbound(stage, Feed::Handover) {
                        let within = self.holds[at].begin_takeover().map_or(HANDOVER, |until| until - now);
                        self.start(at, Job::Receiving);
                        self.actions.push(Action::Receive { id, link, within });
                    }
                    return;
                }
                self.report(at, current);
                self.dial(at, now, current);
                self.serve(at, attach(Feed::Passes));
            }
        }
    }

    /// Begins to serve, if both neighbours' links are up.
    fn serve(&mut self, at: usize, attach: Attach) {
        let Some(outbound) = self.holds[at].want.as_ref().and_then(|want| want.next.link()) else { return };
        let Some(inbound) = self.take_inbound(attach.stage, Feed::Passes) else { return };
        let hold = &mut self.holds[at];
        let Some(want) = &mut hold.want else { return };
        want.next = Out::Over;
        let (id, shadow) = (hold.id, want.shadow.take_link());
        self.start(at, Job::Serving { shadow });
        self.actions.push(Action::Serve { id, attach, inbound, outbound });
        self.actions.extend(shadow.map(|link| Action::Shadow(id, Some(link))));
    }

    fn start(&mut self, at: usize, job: Job) {
        let hold = &mut self.holds[at];
        if let Some(want) = &hold.want {
            hold.state = State::Busy(hold::Busy { job, serial: want.serial, stopping: None });
        }
    }

    /// Tells once in an epoch that a stage is loaded, and what its slots hold.
    fn report(&mut self, at: usize, current: Current) {
        let hold = &mut self.holds[at];
        let Some(want) = &mut hold.want else { return };
        if !mem::replace(&mut want.is_reported, true) {
            let (memory, held) = (hold.memory, hold.held.clone());
            let (epoch, stage) = (current.epoch, want.stage);
            self.tell(ToCoordinator::Loaded { epoch, stage, memory, held });
        }
    }

    /// Dials whoever is to get frames or slots from a stage, as far as it is time for that.
    fn dial(&mut self, at: usize, now: Instant, current: Current) {
        let first = self.last_id + 1;
        let Some(want) = &mut self.holds[at].want else { return };
        let Current { deployment, epoch, joined } = current;
        let is_due = |out: Out| matches!(out, Out::None) || matches!(out, Out::Again(at) if at <= now);
        let attach = |stage, feed| Attach { deployment, epoch, stage, feed };
        let mut dials = Vec::new();
        let mut dial = |out: &mut Out, peer: &Peer, attach: Attach| {
            if is_due(*out) {
                let id = DialId(first + dials.len() as u64);
                *out = Out::Dialling(id);
                dials.push(Action::Dial(id, peer.clone(), attach));
            }
        };
        match &want.role {
            StageRole::HandOver { to } => dial(&mut want.next, to, attach(want.stage, Feed::Handover)),
            StageRole::Serve { downstream, shadow, .. } if joined => {
                dial(&mut want.next, downstream, attach(want.stage + 1, Feed::Passes));
                if let Some(shadow) = shadow {
                    dial(&mut want.shadow, shadow, attach(want.stage + 1, Feed::Shadow));
                }
            }
            StageRole::Serve { .. } | StageRole::Standby { .. } => {}
        }
        self.last_id += dials.len() as u64;
        self.actions.append(&mut dials);
    }

    /// Epoch and stage of what is wanted of a hold.
    fn tag(&self, id: HoldId) -> Option<(Epoch, u32)> {
        let want = self.holds.iter().find(|hold| hold.id == id)?.want.as_ref()?;
        Some((self.current?.epoch, want.stage))
    }

    fn next_id(&mut self) -> u64 {
        self.last_id += 1;
        self.last_id
    }

    fn tell(&mut self, message: ToCoordinator) {
        if self.is_connected {
            self.actions.push(Action::Tell(message));
        }
    }
}
