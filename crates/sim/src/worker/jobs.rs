//! What a worker's stages do, as `node::stage_thread` and `node::handover` have it.

use std::collections::VecDeque;
use std::time::Duration;

use brigade_base::PassId;
use brigade_protocol::frame::{Attach, FrameHead, KvStep, row_bytes};
use brigade_protocol::handover::{self, Intake, Room, Taken};
use brigade_protocol::kind;
use brigade_protocol::worker::{End as StageEnd, HoldId, Input, LinkId};

use super::{Job, Loaded, Passes, Worker};
use crate::host::{Host, Work};
use crate::model::{N_EMBD, of_row};
use crate::network::{End, Heard, MS, Nanos};
use crate::ring::{run_stage, timing};
use crate::stage::{CELL_BYTES, Stage, decode_cells, encode_cells};

impl Worker {
    pub(super) fn data_heard(&mut self, host: &mut Host<'_>, end: End, heard: Heard) -> bool {
        let uses = |loaded: &Loaded| match &loaded.job {
            Job::Passes(passes) => {
                passes.inbound == end || passes.outbound == Some(end) || passes.shadow.is_some_and(|(_, e)| e == end)
            }
            Job::Receive { link, .. } | Job::Send { link, .. } => *link == end,
            Job::Rest | Job::Stopping => false,
        };
        let Some((&id, _)) = self.memory.iter().find(|(_, loaded)| uses(loaded)) else {
            // A link that waits for its stage: what comes over it waits too, until somebody reads it.
            let is_known = self.links.values().any(|other| *other == end);
            if is_known {
                host.defer(end, heard);
            }
            return is_known;
        };
        let (is_handover, is_shadow) = match &self.memory[&id].job {
            Job::Passes(passes) => (false, passes.shadow.is_some_and(|(_, shadow)| shadow == end)),
            _ => (true, false),
        };
        if is_handover {
            self.handover_heard(host, id, heard);
        } else if is_shadow {
            self.shadow_gone(host, id);
        } else {
            self.passes_heard(host, id, end, heard);
        }
        true
    }

    fn shadow_gone(&mut self, host: &mut Host<'_>, id: HoldId) {
        let Some(Loaded { job: Job::Passes(passes), .. }) = self.memory.get_mut(&id) else { return };
        if let Some((link, end)) = passes.shadow.take() {
            host.close(end);
            self.links.remove(&link);
            self.feed(host, Input::ShadowGone(link));
        }
    }

    fn passes_heard(&mut self, host: &mut Host<'_>, id: HoldId, end: End, heard: Heard) {
        let Some(Loaded { job: Job::Passes(passes), .. }) = self.memory.get_mut(&id) else { return };
        match heard {
            Heard::Frame { kind: kind::FRAME, bytes } if end == passes.inbound => {
                let (mut head, mut rows) = (FrameHead::default(), Vec::new());
                if let Err(error) = head.decode(&bytes, &mut rows) {
                    panic!("a frame cannot be read: {error}");
                }
                if head.epoch == passes.attach.epoch {
                    self.progress.steps += 1;
                    if passes.outbound.is_some() {
                        self.progress.received = head.pass;
                    }
                    passes.queue.push_back((head, rows));
                    self.compute(host, id);
                }
            }
            Heard::Ended if end == passes.inbound && passes.outbound.is_none() && !passes.queue.is_empty() => {
                passes.is_cut = true;
            }
            Heard::Ended => self.rest(host, id, StageEnd::Closed),
            other => panic!("a data link brings {other:?}"),
        }
    }

    /// Begins with the first frame that waits.
    pub(super) fn compute(&mut self, host: &mut Host<'_>, id: HoldId) {
        let Some(Loaded { job: Job::Passes(passes), stage, .. }) = self.memory.get_mut(&id) else { return };
        if passes.computing.is_some() {
            return;
        }
        let Some((head, _)) = passes.queue.front() else {
            if passes.is_cut {
                self.rest(host, id, StageEnd::Closed);
            }
            return;
        };
        self.n_works += 1;
        passes.computing = Some((host.virtual_now, self.n_works));
        self.works.insert(self.n_works, id);
        let rows = MS / 5 * Nanos::from(head.n_rows());
        let layers = Nanos::from(stage.layers.len());
        host.begin((MS + rows) * layers, Work::Pass(self.n_works));
    }

    pub(super) fn computed(&mut self, host: &mut Host<'_>, id: HoldId) {
        let Some(Loaded { job: Job::Passes(passes), stage, .. }) = self.memory.get_mut(&id) else { return };
        let Some((since, _)) = passes.computing.take() else { return };
        let Some((mut head, mut rows)) = passes.queue.pop_front() else { return };
        let took = host.virtual_now - since;
        self.progress.steps += took / MS + 1;
        let Some(outbound) = passes.outbound else {
            host.truth.counts.shadowed += 1;
            stand_by(host, stage, &mut head, &mut rows);
            return self.compute(host, id);
        };
        if head.pass <= stage.applied {
            let why = format!("pass {} comes after pass {}", head.pass, stage.applied);
            return self.rest(host, id, StageEnd::Failed(why));
        }
        if let Err(error) = run_stage(host, stage, &mut head, &mut rows) {
            return self.rest(host, id, StageEnd::Failed(error));
        }
        head.timings.push(timing(took));
        let mut bytes = Vec::new();
        head.encode(&mut bytes);
        bytes.extend_from_slice(row_bytes(&rows));
        self.progress.sent = head.pass;
        let shadow = passes.shadow.map(|(_, end)| end);
        let is_sent = host.send(outbound, kind::FRAME, bytes.clone());
        if shadow.is_some_and(|shadow| !host.send(shadow, kind::FRAME, bytes)) {
            self.shadow_gone(host, id);
        }
        if !is_sent {
            return self.rest(host, id, StageEnd::Closed);
        }
        self.compute(host, id);
    }

    fn handover_heard(&mut self, host: &mut Host<'_>, id: HoldId, heard: Heard) {
        let Some(Loaded { job, stage, .. }) = self.memory.get_mut(&id) else { return };
        let end = match (job, heard) {
            (Job::Receive { link, intake, .. }, Heard::Frame { kind, bytes }) => match intake.take(kind, &bytes) {
                Ok(Taken::More) => return,
                Ok(Taken::Slot { slot, n_tokens, image }) => {
                    let cells = decode_cells(image);
                    assert_eq!(cells.len(), n_tokens as usize);
                    return stage.restore(slot as usize, cells);
                }
                Ok(Taken::End(end)) => {
                    stage.applied = end.applied;
                    host.truth.counts.handed_over += 1;
                    host.send(*link, kind::HANDOVER_TAKEN, Vec::new());
                    StageEnd::Done
                }
                Err(error) => panic!("a hand-over cannot be read: {error}"),
            },
            (Job::Send { .. }, Heard::Frame { kind: kind::HANDOVER_TAKEN, .. }) => StageEnd::Done,
            _ => StageEnd::Failed("the hand-over was cut off".to_owned()),
        };
        self.rest(host, id, end);
    }

    /// A stage comes to rest.
    pub(super) fn rest(&mut self, host: &mut Host<'_>, id: HoldId, end: StageEnd) {
        let Some(loaded) = self.memory.get_mut(&id) else { return };
        let job = std::mem::replace(&mut loaded.job, Job::Rest);
        let ends: Vec<End> = match &job {
            Job::Passes(passes) => {
                let shadow = passes.shadow.map(|(_, end)| end);
                [Some(passes.inbound), passes.outbound, shadow].into_iter().flatten().collect()
            }
            Job::Receive { link, .. } | Job::Send { link, .. } => vec![*link],
            Job::Rest | Job::Stopping => Vec::new(),
        };
        if matches!(job, Job::Receive { .. }) && end != StageEnd::Done {
            loaded.stage.clear();
        }
        let held = Some(loaded.stage.held()).filter(|held| held.applied > PassId(0));
        ends.into_iter().for_each(|end| self.close(host, end));
        self.feed(host, Input::Ended { id, end, held });
    }

    pub(super) fn close(&mut self, host: &mut Host<'_>, end: End) {
        host.close(end);
        self.links.retain(|_, other| *other != end);
    }

    pub(super) fn run(
        &mut self,
        host: &mut Host<'_>,
        id: HoldId,
        attach: Attach,
        inbound: LinkId,
        outbound: Option<LinkId>,
    ) {
        let outbound = outbound.map(|link| self.links[&link]);
        let inbound = self.links[&inbound];
        let Some(loaded) = self.memory.get_mut(&id) else { panic!("{id:?} runs, but is not loaded") };
        assert!(matches!(loaded.job, Job::Rest), "a busy stage is run");
        if loaded.epoch != attach.epoch {
            loaded.epoch = attach.epoch;
            loaded.stage.drop_images();
        }
        let passes =
            Passes { attach, inbound, outbound, shadow: None, queue: VecDeque::new(), computing: None, is_cut: false };
        loaded.job = Job::Passes(Box::new(passes));
        [Some(inbound), outbound].into_iter().flatten().for_each(|end| host.resume(end));
    }

    pub(super) fn shadow(&mut self, host: &mut Host<'_>, id: HoldId, link: Option<LinkId>) {
        let end = link.map(|link| (link, self.links[&link]));
        let Some(Loaded { job: Job::Passes(passes), .. }) = self.memory.get_mut(&id) else {
            panic!("{id:?} gets a shadow, but does not serve");
        };
        let old = std::mem::replace(&mut passes.shadow, end);
        if let Some((_, old)) = old {
            self.close(host, old);
        }
        end.into_iter().for_each(|(_, end)| host.resume(end));
    }

    pub(super) fn send_slots(&mut self, host: &mut Host<'_>, id: HoldId, link: LinkId, within: Duration) {
        let end = self.links[&link];
        let until = host.now() + within;
        let Some(loaded) = self.memory.get_mut(&id) else { panic!("{id:?} hands over, but is not loaded") };
        loaded.job = Job::Send { link: end, until };
        for (slot, cells) in loaded.stage.usable_slots() {
            let image = encode_cells(cells);
            let head = handover::Slot { slot, n_tokens: cells.len() as u32, n_bytes: image.len() as u64 };
            host.send(end, kind::HANDOVER_SLOT, head.encode().to_vec());
            // Several pieces, where a real image is cut only beyond some megabytes.
            for piece in image.chunks(1000) {
                host.send(end, kind::HANDOVER_PIECE, piece.to_vec());
            }
        }
        let last = handover::End { applied: loaded.stage.applied };
        host.send(end, kind::HANDOVER_END, last.encode().to_vec());
        host.resume(end);
    }

    pub(super) fn receive_slots(&mut self, host: &mut Host<'_>, id: HoldId, link: LinkId, within: Duration) {
        let end = self.links[&link];
        let until = host.now() + within;
        let Some(loaded) = self.memory.get_mut(&id) else { panic!("{id:?} takes over, but is not loaded") };
        loaded.stage.clear();
        let room = Room { n_slots: 256, context: 1 << 20, slot_bytes: (CELL_BYTES << 20) as u64 };
        loaded.job = Job::Receive { link: end, until, intake: Box::new(Intake::new(room)) };
        host.resume(end);
    }

    /// Ends what a stage does; what it computes is given up a moment later.
    pub(super) fn stop(&mut self, host: &mut Host<'_>, id: HoldId) {
        let Some(loaded) = self.memory.get_mut(&id) else { return };
        if let Job::Passes(passes) = &loaded.job
            && let Some((_, work)) = passes.computing
        {
            let shadow = passes.shadow.map(|(_, end)| end);
            let ends: Vec<End> = [Some(passes.inbound), passes.outbound, shadow].into_iter().flatten().collect();
            loaded.job = Job::Stopping;
            self.works.remove(&work);
            self.n_works += 1;
            self.works.insert(self.n_works, id);
            host.begin(MS, Work::Pass(self.n_works));
            return ends.into_iter().for_each(|end| self.close(host, end));
        }
        self.rest(host, id, StageEnd::Closed);
    }
}

/// A stage that stands by computes what it can; a slot that misses something is of no use until it begins anew.
fn stand_by(host: &mut Host<'_>, stage: &mut Stage, head: &mut FrameHead, rows: &mut [f32]) {
    if head.follows > stage.applied {
        stage.lose_all();
    }
    let (steps, sets) = (std::mem::take(&mut head.steps), std::mem::take(&mut head.sets));
    for step in steps {
        let slot = match step.0 {
            KvStep::Copy { slot, .. } | KvStep::Load { slot, .. } => Some(slot),
            KvStep::Save { .. } | KvStep::Drop { .. } => None,
        };
        let mut one = [step];
        let has_failed = stage.apply(&mut one, host.is_disk_full).is_err();
        // What the serving stage could do and this one could not.
        if let Some(slot) = slot.filter(|_| has_failed || one[0].1 != step.1) {
            stage.lose(slot);
        }
    }
    let tokens = host.truth.tokens((head.deployment, head.epoch), head.pass);
    let mut at = 0;
    for (which, set) in sets.into_iter().enumerate() {
        let end = at + (set.n_rows * N_EMBD) as usize;
        let mut values: Vec<u64> = rows[at..end].chunks(N_EMBD as usize).map(of_row).collect();
        at = end;
        let tokens = tokens.get(which).map(Vec::as_slice).unwrap_or_default();
        match stage.compute(set, tokens, &mut values) {
            Ok(()) => host.truth.applied(stage, (head.deployment, head.epoch), head.pass, which),
            Err(_) => stage.lose(set.slot),
        }
    }
    stage.applied = head.pass;
}
