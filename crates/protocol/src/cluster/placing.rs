//! From one placement to the next: who is told what, and how a ring comes up.

use std::time::Duration;

use brigade_base::ByteSize;

use super::ring::Ring;
use super::types::{Action, Member, MemberStage, MemberState, Phase, StageState};
use super::{Cluster, RETRY, Tail};
use crate::control::Held;

/// So long stages stay loaded while others are missing: as long as sessions wait for capacity unless told otherwise.
const PARKED: Duration = Duration::from_secs(30);

impl Cluster {
    /// Drops the present placement and makes another one.
    pub(super) fn replace(&mut self, reason: &str, actions: &mut Vec<Action>) {
        if !matches!(self.phase, Phase::Settling(_)) {
            actions.push(Action::StopRing { epoch: self.epoch, reason: reason.to_owned() });
        }
        self.place(actions);
    }

    pub(super) fn place(&mut self, actions: &mut Vec<Action>) {
        self.settle_until = None;
        self.is_placed = false;
        match self.target() {
            Ok(ring) => self.begin(ring, actions),
            Err(reason) => self.wait(reason),
        }
    }

    /// Nothing can be placed: waits for nodes, with the stages that are there for a while.
    pub(super) fn wait(&mut self, reason: String) {
        let failure = |m: &Member| match &m.state {
            MemberState::Failed(why) => Some(format!("{} was left out: {why}", m.offer.name)),
            _ => None,
        };
        let failures: Vec<String> = self.members.iter().filter_map(failure).collect();
        if !failures.is_empty() {
            self.settle_until = self.now.map(|now| now + RETRY);
        }
        if self.ring.is_some() && self.parked_until.is_none() {
            self.parked_until = self.now.map(|now| now + PARKED);
        }
        for member in &mut self.members {
            member.private.is_relieved = false;
        }
        let all: Vec<String> = std::iter::once(reason).chain(failures).collect();
        self.phase = Phase::Waiting(all.join("; "));
    }

    /// Forgets the last placement, so that its stages are dropped.
    pub(super) fn unpark(&mut self) {
        self.parked_until = None;
        self.ring = None;
        self.members.iter_mut().for_each(|m| m.stages.clear());
    }

    /// A new epoch.
    pub(super) fn begin(&mut self, ring: Ring, actions: &mut Vec<Action>) {
        self.epoch = self.epoch.next();
        self.placed_before = true;
        self.is_placed = true;
        self.parked_until = None;
        self.next = None;
        self.phase = Phase::Loading;
        for member in &mut self.members {
            let before = std::mem::take(&mut member.stages);
            let id = member.id;
            for (k, seat) in ring.seats.iter().enumerate() {
                if seat.holder == Some(id) || ring.stands_by(k, id) {
                    let same = before.iter().find(|stage| stage.layers == seat.layers);
                    member.stages.push(MemberStage {
                        stage: k as u32,
                        layers: seat.layers,
                        is_standby: seat.holder != Some(id),
                        state: StageState::Loading(0.0),
                        memory: same.map_or(ByteSize(0), |stage| stage.memory),
                        is_kept: same.is_some(),
                        was_loaded: same.is_some_and(MemberStage::is_warm),
                        held: None,
                    });
                }
            }
            let served = before.iter().any(|stage| !stage.is_standby);
            member.private.is_relieved |= member.is_leaving() && served;
            member.private.is_due = false;
            member.private.revision = 0;
        }
        let (stage, tail) = (ring.seats.len() as u32, ring.tail());
        self.ring = Some(ring);
        self.explain();
        self.tell(actions);
        if let Some(layers) = tail {
            actions.push(Action::LoadTail { epoch: self.epoch, stage, layers, keep_kv: self.tail.layers == tail });
        }
        self.tail = Tail { layers: tail, ..Tail::default() };
    }

    /// Sends orders to those who have others.
    pub(super) fn tell(&mut self, actions: &mut Vec<Action>) {
        // The stages of a ring that does not run stay as they are, but for those who may end.
        let is_parked = self.ring.is_some() && !(self.phase == Phase::Loading || self.is_running());
        let epoch = self.epoch;
        for i in 0..self.members.len() {
            let orders = self.orders(self.members[i].id);
            let Member { id: node, private, .. } = &mut self.members[i];
            if is_parked && !private.is_released {
                continue;
            }
            let is_first = private.revision == 0 && !orders.is_empty();
            if is_first || orders != private.told {
                private.revision += 1;
                private.told.clone_from(&orders);
                actions.push(Action::Assign { node: *node, epoch, revision: private.revision, orders });
            }
        }
    }

    pub(super) fn ready(&mut self, actions: &mut Vec<Action>) {
        self.phase = Phase::Ready;
        actions.push(Action::Ready { epoch: self.epoch });
        let seats = self.ring.as_mut().map(|ring| ring.seats.as_mut_slice()).unwrap_or_default();
        seats.iter_mut().for_each(|seat| seat.handed_by = None);
        self.note_ready();
        self.note_pace();
        self.members.iter_mut().for_each(|m| m.private.is_relieved = false);
    }

    /// Goes to the next phase once every stage is far enough.
    pub(super) fn advance(&mut self, actions: &mut Vec<Action>) {
        let serving = || self.members.iter().flat_map(|m| &m.stages).filter(|stage| !stage.is_standby);
        if self.phase == Phase::Loading && self.tail.is_loaded && serving().all(MemberStage::is_loaded) {
            let held = serving().map(|stage| stage.held.clone()).fold(self.tail.held.clone(), both);
            self.start(held, actions);
        } else if self.phase == Phase::Joining && serving().all(|stage| stage.state == StageState::Joined) {
            self.phase = Phase::Probing;
        }
    }

    fn start(&mut self, held: Option<Held>, actions: &mut Vec<Action>) {
        let Some(ring) = &self.ring else { return };
        let epoch = self.epoch;
        let serving = self.members.iter().filter(|m| m.serves_any());
        actions.extend(serving.map(|m| Action::Join { node: m.id, epoch }));
        actions.push(Action::StartRing {
            epoch,
            first: ring.seats.first().and_then(|seat| seat.holder),
            last: ring.seats.last().and_then(|seat| seat.holder),
            n_stages: ring.plan.stages.len() as u32,
            shadow: self.shadow_of(0),
            held,
        });
        self.phase = if ring.seats.is_empty() { Phase::Probing } else { Phase::Joining };
    }
}

/// What both hold, if both hold anything.
fn both(one: Option<Held>, other: Option<Held>) -> Option<Held> {
    Some(one?.and(other?))
}
