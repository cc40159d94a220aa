//! Who is here, and what is placed where.
//!
//! The coordinator's state machine: it is told what happened and answers what to do.
//!
//! ```text
//! Waiting --(enough nodes, a plan)--> Loading --(all loaded)--> Joining --(all joined)--> Probing --(a token went
//!    ^                                  |                          |                         |      around)--> Ready
//!    |                                  +------------ a stage is lost or broken -------------+-----------------+
//!    +-- no plan <---------------------------------- place again, epoch + 1 <----------------------------------+
//!                                                               ^                                              |
//!                                                               +-- Draining <-- somebody wants to end, -------+
//!                                                                                or a stage moves
//! ```
//!
//! - Every placement has a higher epoch than the one before; news of an older epoch are ignored.
//! - After a loss the same cut is used where that is possible: only the lost stages change hands. Sessions outlive the
//!   ring; what stages held of their KV cache is told with [`Action::StartRing`].
//! - A node that comes while the model is placed does not change the cut at once: it stays idle, or stands by, until
//!   somebody is lost, even where more nodes were asked for than the ring has. But where a worker serves several
//!   stages, because it took over from one that was lost, one of them moves to a node that serves none, with what its
//!   slots hold. And where all speeds are known, the model is placed anew if that is clearly faster and pays.
//! - Orders are derived from the ring and sent where they differ from those that a node has. So whatever changes the
//!   ring need not think of who is to be told.
//! - While nothing is placed for want of nodes, stages stay loaded for a while, so that a node that comes back finds
//!   the ring as it was.

mod member;
mod moving;
mod pace;
mod placing;
mod ring;
mod tend;
mod types;

use std::collections::HashMap;
use std::time::{Duration, Instant};

use brigade_base::{ByteSize, DeploymentId, Epoch, LayerRange, NodeId};
use brigade_plan::{Links, MAX_STAGES_OF_WORKER, NodeProfile, Plan, Speed};

pub use types::{Action, Input, Member, MemberStage, MemberState, Order, Phase, Role, Settings, StageState};

use crate::control::{Held, MAX_NODE_STAGES, Offer};
use ring::Ring;

/// How long a broken ring waits for the news of which node is gone before it is placed again with all of them. A
/// killed process closes all its links within a millisecond; a vanished machine takes the heartbeat's time.
const SETTLE: Duration = Duration::from_millis(300);

/// A ring that breaks so often before it was ready is placed without the worker that says so: two machines that cannot
/// reach each other never will. Until then each wait is twice the one before.
const MAX_BREAKS: u32 = 3;

/// Most doublings of the wait: about 20 seconds.
const MAX_DOUBLINGS: u32 = 6;

/// While the model does not fit without the nodes that were left out, they get another chance this often: what failed
/// may have been a switch that restarted or a disk that was full. A node that could not load a stage to stand by with
/// is asked again after the same time.
const RETRY: Duration = Duration::from_secs(10);

// What a worker is told to hold must fit into an assignment.
const _: () = assert!(MAX_STAGES_OF_WORKER <= MAX_NODE_STAGES);

/// The coordinator's own stage.
#[derive(Debug, Default)]
struct Tail {
    /// The layers that it was last told to load.
    layers: Option<LayerRange>,
    is_loaded: bool,
    memory: ByteSize,
    held: Option<Held>,
}

/// The coordinator's state machine.
#[derive(Debug)]
pub struct Cluster {
    settings: Settings,
    /// Workers in the order in which they came.
    members: Vec<Member>,
    /// How fast workers are, of which that is known.
    speeds: HashMap<NodeId, Speed>,
    links: Links,
    phase: Phase,
    epoch: Epoch,
    /// The present placement; while nothing is placed, the last one, as far as its stages are still loaded.
    ring: Option<Ring>,
    /// The ring is what is placed now.
    is_placed: bool,
    tail: Tail,
    /// The placement to change to, once no pass is on its way.
    next: Option<Ring>,
    /// When it is to be looked whether another placement would be faster.
    look_at: Option<Instant>,
    settle_until: Option<Instant>,
    /// Ready since a moment ago: no stage moves before this time.
    settled_at: Option<Instant>,
    /// Until when stages stay loaded while nothing is placed.
    parked_until: Option<Instant>,
    /// How often the ring broke since it was last ready.
    n_breaks: u32,
    /// The first tick came.
    is_begun: bool,
    placed_before: bool,
    has_quorum: bool,
    given_up: bool,
    /// When the present input came.
    now: Option<Instant>,
}

impl Cluster {
    /// A cluster of the coordinator alone. Call [`Cluster::handle`] with [`Input::Tick`] to begin.
    pub fn new(settings: Settings) -> Self {
        Self {
            epoch: Epoch::of(settings.term, 0),
            settings,
            members: Vec::new(),
            speeds: HashMap::new(),
            links: Links::default(),
            phase: Phase::Waiting("the model is about to be placed".to_owned()),
            ring: None,
            is_placed: false,
            tail: Tail::default(),
            next: None,
            look_at: None,
            settle_until: None,
            settled_at: None,
            parked_until: None,
            n_breaks: 0,
            is_begun: false,
            placed_before: false,
            has_quorum: true,
            given_up: false,
            now: None,
        }
    }

    /// Where the deployment stands.
    pub fn phase(&self) -> &Phase {
        &self.phase
    }

    /// The epoch of the present placement; its number is 0 before the first.
    pub fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// The present placement.
    pub fn plan(&self) -> Option<&Plan> {
        self.ring.as_ref().filter(|_| self.is_placed).map(|ring| &ring.plan)
    }

    /// The nodes here with all that is known of their speed, the coordinator last.
    pub fn nodes(&self) -> Vec<NodeProfile> {
        self.profiles(Member::is_here)
    }

    /// What is known of the links between nodes.
    pub fn links(&self) -> &Links {
        &self.links
    }

    /// The workers in the order in which they came.
    pub fn members(&self) -> &[Member] {
        &self.members
    }

    /// What the coordinator's own stage takes, once loaded.
    pub fn tail_memory(&self) -> ByteSize {
        self.tail.memory
    }

    /// The deployment.
    pub fn deployment(&self) -> DeploymentId {
        self.settings.deployment
    }

    /// When [`Input::Tick`] is due.
    pub fn next_tick(&self) -> Option<Instant> {
        let deadlines = |m: &Member| [m.private.no_standby_until, m.private.leave_until];
        let members = self.members.iter().flat_map(deadlines);
        let settled_at = self.settled_at.filter(|_| self.is_moving());
        members.chain([self.settle_until, self.parked_until, settled_at, self.look_at()]).flatten().min()
    }

    /// Takes note of what happened and says what to do, in this order.
    pub fn handle(&mut self, now: Instant, input: Input) -> Vec<Action> {
        let mut actions = Vec::new();
        self.now = Some(now);
        if self.given_up {
            return actions;
        }
        self.expire(now);
        self.take(now, input, &mut actions);
        if self.given_up {
            return actions;
        }
        self.tend(&mut actions);
        let released = self.release();
        self.tell(&mut actions);
        actions.extend(released.into_iter().map(|node| Action::Released { node }));
        actions
    }

    fn take(&mut self, now: Instant, input: Input, actions: &mut Vec<Action>) {
        match input {
            Input::Offer(id, offer) => self.offer(id, offer, actions),
            Input::Measured(id, speed, links) => self.measured(id, speed.map(|speed| *speed), &links),
            Input::Gone(id, reason) => self.gone(id, &reason, actions),
            Input::Progress(id, epoch, stage, share) => {
                if let Some(stage) = self.current(id, epoch, stage)
                    && let StageState::Loading(done) = &mut stage.state
                {
                    *done = share.clamp(0.0, 1.0);
                }
            }
            Input::Loaded(id, epoch, stage, memory, held) => self.loaded(id, epoch, stage, memory, held, actions),
            Input::Joined(id, epoch, stage) => {
                if let Some(stage) = self.current(id, epoch, stage)
                    && (stage.state, stage.is_standby) == (StageState::Loaded, false)
                {
                    stage.state = StageState::Joined;
                    self.advance(actions);
                }
            }
            Input::StageFailed(id, epoch, stage, reason) => self.stage_failed(now, id, epoch, stage, &reason, actions),
            Input::WentAround(epoch) => {
                if epoch == self.epoch && matches!(self.phase, Phase::Joining | Phase::Probing) {
                    self.ready(actions);
                }
            }
            Input::RingBroke(by, epoch, reason) => {
                if epoch == self.epoch && self.is_running() {
                    self.ring_broke(now, by, reason, actions);
                }
            }
            Input::Stuck(by, epoch, reason) => {
                if epoch == self.epoch && self.is_running() {
                    match by.filter(|&id| self.member(id).is_some_and(Member::serves_any)) {
                        Some(id) => self.fail(id, &reason, actions),
                        None => self.ring_broke(now, None, reason, actions),
                    }
                }
            }
            Input::Leave(id, _) => self.leave(now, id),
            Input::Drained(epoch) => {
                if epoch == self.epoch
                    && let Phase::Draining(reason) = self.phase.clone()
                {
                    self.replace(&reason, actions);
                }
            }
            Input::Quorum(has_quorum) => self.quorum(has_quorum, actions),
            Input::Tick => self.tick(now, actions),
        }
    }

    /// Passes may be on their way.
    fn is_running(&self) -> bool {
        matches!(self.phase, Phase::Joining | Phase::Probing | Phase::Ready | Phase::Draining(_))
    }

    fn member(&self, id: NodeId) -> Option<&Member> {
        self.members.iter().find(|m| m.id == id)
    }

    /// The name of a worker for people.
    fn name(&self, id: NodeId) -> String {
        self.member(id).map(|m| m.offer.name.clone()).unwrap_or_default()
    }

    /// A stage that a worker has in the present placement.
    fn current(&mut self, id: NodeId, epoch: Epoch, stage: u32) -> Option<&mut MemberStage> {
        if epoch != self.epoch {
            return None;
        }
        self.members.iter_mut().find(|m| m.id == id)?.stage_mut(stage)
    }

    fn tick(&mut self, now: Instant, actions: &mut Vec<Action>) {
        let is_over = |until: Option<Instant>| until.is_some_and(|until| now >= until);
        if is_over(self.parked_until) {
            self.unpark();
        }
        if !self.is_begun || is_over(self.settle_until) {
            self.is_begun = true;
            if matches!(self.phase, Phase::Waiting(_)) {
                self.forgive();
            }
            self.place(actions);
        }
    }

    fn offer(&mut self, id: NodeId, offer: Offer, actions: &mut Vec<Action>) {
        let had_stage = self.remove(id);
        self.n_breaks = 0;
        self.members.push(Member::new(id, offer));
        if had_stage && self.is_placed {
            self.replace("a node that held a part of the model started anew", actions);
        } else if matches!(self.phase, Phase::Waiting(_)) {
            self.place(actions);
        }
    }

    fn gone(&mut self, id: NodeId, reason: &str, actions: &mut Vec<Action>) {
        let name = self.name(id);
        self.forget_pace(id);
        self.n_breaks = 0;
        if self.remove(id) && self.is_placed {
            self.replace(&format!("node {name} is gone ({reason})"), actions);
        } else if matches!(self.phase, Phase::Waiting(_)) {
            self.place(actions);
        }
    }

    /// Lets the nodes that were left out take part again.
    fn forgive(&mut self) {
        for member in &mut self.members {
            if matches!(member.state, MemberState::Failed(_)) {
                member.state = MemberState::Here;
            }
        }
    }

    /// Forgets a member; true if it served a stage.
    fn remove(&mut self, id: NodeId) -> bool {
        let Some(at) = self.members.iter().position(|m| m.id == id) else { return false };
        self.members.remove(at);
        self.vacate(id)
    }

    /// Takes all stages from a node; true if it served one.
    fn vacate(&mut self, id: NodeId) -> bool {
        if let Some(member) = self.members.iter_mut().find(|m| m.id == id) {
            member.stages.clear();
        }
        let seats = self.ring.as_mut().map(|ring| ring.seats.as_mut_slice()).unwrap_or_default();
        let mut served = false;
        let mut unfed = Vec::new();
        for (k, seat) in seats.iter_mut().enumerate() {
            served |= seat.holder == Some(id);
            for place in [&mut seat.holder, &mut seat.standby] {
                if *place == Some(id) {
                    *place = None;
                }
            }
            if seat.handed_by == Some(id) {
                unfed.push(k);
            }
        }
        unfed.into_iter().for_each(|k| self.end_hand_over(k));
        self.next = None;
        self.lost_while_moving(id);
        self.explain();
        served
    }

    /// What a stage held does not come any more: it starts without, unless it has it.
    fn end_hand_over(&mut self, stage: usize) {
        let Some(seat) = self.ring.as_ref().and_then(|ring| ring.seats.get(stage)) else { return };
        let holder = seat.holder.and_then(|id| self.member(id));
        let is_loaded = holder.and_then(|m| m.stage(stage as u32)).is_some_and(MemberStage::is_loaded);
        if let Some(seat) = self.ring.as_mut().and_then(|ring| ring.seats.get_mut(stage)) {
            seat.handed_by = None;
            seat.kv_from = seat.kv_from.filter(|_| is_loaded);
        }
    }

    fn loaded(
        &mut self,
        id: NodeId,
        epoch: Epoch,
        stage: u32,
        memory: ByteSize,
        held: Option<Held>,
        actions: &mut Vec<Action>,
    ) {
        if id == self.settings.coordinator.id {
            if epoch == self.epoch && self.phase == Phase::Loading {
                self.tail = Tail { layers: self.tail.layers, is_loaded: true, memory, held };
                self.advance(actions);
            }
        } else if let Some(stage) = self.current(id, epoch, stage)
            && !stage.is_loaded()
        {
            (stage.state, stage.memory, stage.held) = (StageState::Loaded, memory, held);
            self.advance(actions);
        }
    }

    fn stage_failed(
        &mut self,
        now: Instant,
        id: NodeId,
        epoch: Epoch,
        stage: u32,
        reason: &str,
        actions: &mut Vec<Action>,
    ) {
        if epoch != self.epoch {
            return;
        }
        if id == self.settings.coordinator.id {
            self.given_up = true;
            self.is_placed = false;
            self.phase = Phase::Waiting(reason.to_owned());
            actions.push(Action::StopRing { epoch, reason: reason.to_owned() });
            actions.push(Action::GiveUp { reason: reason.to_owned() });
            return;
        }
        match self.current(id, epoch, stage).map(|stage| stage.is_standby) {
            Some(true) => self.standby_failed(now, id, stage),
            Some(false) => self.fail(id, reason, actions),
            None => {
                let seat = self.ring.as_ref().and_then(|ring| ring.seats.get(stage as usize));
                if seat.is_some_and(|seat| seat.handed_by == Some(id)) {
                    self.end_hand_over(stage as usize);
                }
            }
        }
    }

    /// Places the model without a worker.
    fn fail(&mut self, id: NodeId, reason: &str, actions: &mut Vec<Action>) {
        let why = format!("node {} failed: {reason}", self.name(id));
        if let Some(member) = self.members.iter_mut().find(|m| m.id == id && m.state != MemberState::Leaving) {
            member.state = MemberState::Failed(reason.to_owned());
        }
        match (self.vacate(id), self.is_placed) {
            (true, true) => self.replace(&why, actions),
            (true, false) => self.place(actions),
            (false, _) => {}
        }
    }

    fn ring_broke(&mut self, now: Instant, by: Option<NodeId>, reason: String, actions: &mut Vec<Action>) {
        let was_ready = matches!(self.phase, Phase::Ready | Phase::Draining(_));
        self.n_breaks = if was_ready { 0 } else { self.n_breaks + 1 };
        // A ring that ran until a stage moved is whole without the node that it moved to.
        let newcomer = self.ring.as_ref().and_then(|ring| ring.newcomer);
        if let Some(id) = newcomer.or(by).filter(|&id| self.member(id).is_some_and(Member::serves_any))
            && self.n_breaks > MAX_BREAKS
        {
            self.n_breaks = 0;
            return self.fail(id, &reason, actions);
        }
        actions.push(Action::StopRing { epoch: self.epoch, reason: reason.clone() });
        self.phase = Phase::Settling(reason);
        self.settle_until = Some(now + SETTLE * 2u32.pow(self.n_breaks.min(MAX_DOUBLINGS)));
    }

    fn quorum(&mut self, has_quorum: bool, actions: &mut Vec<Action>) {
        if std::mem::replace(&mut self.has_quorum, has_quorum) == has_quorum {
            return;
        }
        let is_split = self.ring.as_ref().is_some_and(|ring| !ring.seats.is_empty());
        let is_makeshift = self.ring.as_ref().is_some_and(|ring| ring.is_makeshift);
        if self.is_placed && !has_quorum && is_split {
            self.replace("a majority of the cluster's nodes is not in reach", actions);
        } else if self.is_placed && has_quorum && is_makeshift {
            if self.planned(Member::is_here).is_ok_and(|ring| !ring.seats.is_empty()) {
                self.unpark();
                self.replace("a majority of the cluster's nodes is in reach again", actions);
            } else if let Some(ring) = &mut self.ring {
                ring.is_makeshift = false;
            }
        } else if self.is_begun && matches!(self.phase, Phase::Waiting(_)) {
            self.place(actions);
        }
    }
}

#[cfg(test)]
mod random_tests;
#[cfg(test)]
mod tests;
