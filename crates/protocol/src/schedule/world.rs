//! A ring that is not there, for tests of the scheduler: stages that hold tokens, callers, and a clock.
//!
//! - A [`Stage`] takes frames like a worker: steps, then row sets, strictly in order. Each position of a slot has a
//!   value that follows from all positions before it, from the row that came in, and (with an exact cache) from whether
//!   it was computed alone or in a chunk. The tail's value is the next token. So an answer equals that of a lone run
//!   ([`World::lone`]) only if every stage held the right tokens all along.
//! - The [`World`] owns scheduler, stages and callers. It sends and receives passes, checks each against what the
//!   callers know, and computes when a stage would be done ([`Cost`]). Images fail as its seed wants.

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::time::{Duration, Instant};

use brigade_base::{ImageId, SessionId, TenantId, Token};

use super::*;
use crate::control::Held;
use crate::frame::MAX_ROW_SETS;

/// The scatter of `splitmix64`: a good hash of one number.
fn scatter(n: u64) -> u64 {
    let n = n.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let n = (n ^ (n >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let n = (n ^ (n >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    n ^ (n >> 31)
}

/// Numbers that follow from a seed.
#[derive(Debug)]
pub(super) struct Random(pub(super) u64);

impl Random {
    /// A number below `n`.
    pub(super) fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_add(1);
        scatter(self.0) % n
    }

    pub(super) fn percent(&mut self, chance: u64) -> bool {
        self.below(100) < chance
    }
}

/// The value of a position, given that of the position before it and the row that came in.
fn value(before: u64, row: u64, is_chunked: Option<bool>) -> u64 {
    scatter(before ^ scatter(row ^ is_chunked.map_or(0, |is| 1 + u64::from(is))))
}

/// The token that a tail's value stands for.
fn token_of(value: u64) -> Token {
    (value % 500) as Token
}

/// How long a stage computes, in microseconds.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Cost {
    /// For any decode rows.
    pub(super) decode_us: u64,
    /// For each of them.
    pub(super) decode_row_us: u64,
    /// For any chunk, at least.
    pub(super) chunk_least_us: u64,
    /// For each row of a chunk.
    pub(super) chunk_row_us: u64,
}

impl Cost {
    fn us(self, n_decode: u64, n_chunk: u64) -> u64 {
        let decode = if n_decode > 0 { self.decode_us + n_decode * self.decode_row_us } else { 0 };
        decode + if n_chunk > 0 { self.chunk_least_us.max(n_chunk * self.chunk_row_us) } else { 0 }
    }
}

#[derive(Debug, Clone, Copy)]
struct Cell {
    token: Token,
    tenant: TenantId,
    value: u64,
}

#[derive(Debug, Default)]
struct Stage {
    slots: Vec<Vec<Cell>>,
    /// Slots can be cut back and copied.
    can_rewind: bool,
    images: HashMap<ImageId, Vec<Cell>>,
    /// What it could not save.
    unsaved: HashSet<ImageId>,
    cost: Cost,
    /// When it was computing.
    busy: Vec<(u64, u64)>,
    /// What its slots held behind the last passes, oldest first.
    history: VecDeque<(PassId, Vec<Vec<Cell>>)>,
}

impl Stage {
    /// Carries out a step; false if it could not.
    fn step(&mut self, step: KvStep, fails: bool) -> bool {
        match step {
            KvStep::Copy { slot, from, n_tokens } => {
                assert!(slot != from && self.can_rewind);
                self.slots[slot as usize] = self.slots[from as usize][..n_tokens as usize].to_vec();
            }
            KvStep::Save { slot, n_tokens, image } => {
                let cells = self.slots[slot as usize].clone();
                assert!(self.can_rewind, "a state is not saved");
                assert_eq!(cells.len(), n_tokens as usize, "a save is of all that the slot holds");
                if fails {
                    assert!(self.unsaved.insert(image));
                    return false;
                }
                assert!(self.images.insert(image, cells).is_none(), "image {image} is saved twice");
            }
            KvStep::Load { slot, n_tokens, image } => {
                let cells = self.images.get(&image).expect("only whole images are loaded");
                assert_eq!(cells.len(), n_tokens as usize);
                self.slots[slot as usize] = if fails { Vec::new() } else { cells.clone() };
                return !fails;
            }
            KvStep::Drop { image } => {
                let was_there = self.images.remove(&image).is_some() || self.unsaved.remove(&image);
                assert!(was_there, "image {image} is dropped, but was never saved");
            }
        }
        true
    }

    /// Computes rows in place.
    fn compute(&mut self, set: RowSet, tenant: TenantId, tokens: &[Token], rows: &mut [u64], minds_way: bool) {
        let slot = &mut self.slots[set.slot as usize];
        assert!(set.keep as usize <= slot.len(), "{set:?}, but the slot holds {}", slot.len());
        let is_whole = set.keep == 0 || set.keep as usize == slot.len();
        assert!(is_whole || self.can_rewind, "{set:?}, but the slot holds {} and cannot be cut", slot.len());
        slot.truncate(set.keep as usize);
        for (token, row) in tokens.iter().zip(rows) {
            let before = slot.last().map_or(0, |cell| cell.value);
            *row = value(before, *row, minds_way.then_some(set.n_rows > 1));
            slot.push(Cell { token: *token, tenant, value: *row });
        }
    }
}

/// How a session ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Outcome {
    Answered,
    ContextFull,
    Cancelled,
    Expired,
}

/// What a caller knows of its session.
#[derive(Debug)]
pub(super) struct Caller {
    pub(super) tenant: TenantId,
    pub(super) priority: i32,
    pub(super) has_deadline: bool,
    pub(super) n_prompt: usize,
    /// Prompt and answer.
    pub(super) tokens: Vec<Token>,
    pub(super) n_answer: usize,
    /// When each token of the answer came.
    pub(super) told_us: Vec<u64>,
    pub(super) outcome: Option<Outcome>,
    /// Tokens that it had not to compute, for each time that it started.
    pub(super) cached: Vec<u32>,
    pub(super) n_preempted: u32,
    /// Where its next row stands, while it has a slot.
    next_position: Option<u32>,
    /// A pass in the ring brings its next token.
    awaits: bool,
}

/// Passes whose outcome on each stage is remembered, where stages are lost.
const HISTORY: usize = 12;

#[derive(Debug)]
struct Travelling {
    pass: Pass,
    failed: Vec<bool>,
    /// Values of the rows behind the tail.
    rows: Vec<u64>,
    stage_us: Vec<u32>,
    back_us: u64,
}

#[derive(Debug)]
pub(super) struct World {
    pub(super) scheduler: Scheduler,
    pub(super) callers: BTreeMap<SessionId, Caller>,
    pub(super) notices: Vec<Notice>,
    pub(super) now_us: u64,
    /// Of each saving and loading on each stage, in percent.
    pub(super) failures: u64,
    /// Stages remember their last passes, so that they can be lost.
    pub(super) has_losses: bool,
    pub(super) n_lost: u64,
    pub(super) random: Random,
    pub(super) n_passes: u64,
    /// Rows that were computed.
    pub(super) n_rows: u64,
    origin: Instant,
    stages: Vec<Stage>,
    ring: VecDeque<Travelling>,
}

impl World {
    /// One stage for each cost; `limits.n_stages` follows.
    pub(super) fn new(limits: Limits, costs: &[Cost], seed: u64) -> Self {
        let limits = Limits { n_stages: costs.len() as u32, ..limits };
        let slots = vec![Vec::new(); limits.n_slots as usize];
        let can_rewind = limits.can_rewind;
        let stage = |cost: &Cost| Stage { slots: slots.clone(), can_rewind, cost: *cost, ..Stage::default() };
        Self {
            scheduler: Scheduler::new(limits),
            callers: BTreeMap::new(),
            notices: Vec::new(),
            now_us: 0,
            failures: 0,
            has_losses: false,
            n_lost: 0,
            random: Random(seed),
            n_passes: 0,
            n_rows: 0,
            origin: Instant::now(),
            stages: costs.iter().map(stage).collect(),
            ring: VecDeque::new(),
        }
    }

    /// The scheduler's time.
    pub(super) fn at(&self, us: u64) -> Instant {
        self.origin + Duration::from_micros(us)
    }

    pub(super) fn admit(&mut self, arrival: Arrival, n_answer: usize) -> Result<(), AdmitError> {
        self.scheduler.admit(arrival.clone())?;
        let caller = Caller {
            tenant: arrival.tenant,
            priority: arrival.priority,
            has_deadline: arrival.deadline.is_some(),
            n_prompt: arrival.prompt.len(),
            tokens: [arrival.prompt, arrival.answer].concat(),
            n_answer,
            told_us: Vec::new(),
            outcome: None,
            cached: Vec::new(),
            n_preempted: 0,
            next_position: None,
            awaits: false,
        };
        assert!(self.callers.insert(arrival.id, caller).is_none());
        Ok(())
    }

    pub(super) fn end(&mut self, id: SessionId, outcome: Outcome) {
        let caller = self.callers.get_mut(&id).unwrap();
        assert_eq!(caller.outcome.replace(outcome), None, "session {id} ends twice");
        self.scheduler.end(id);
    }

    /// Ends what has come too late.
    pub(super) fn expire(&mut self) {
        for id in self.scheduler.expired(self.at(self.now_us)) {
            self.end(id, Outcome::Expired);
        }
    }

    /// Sends the next pass through all stages.
    pub(super) fn send(&mut self) -> Option<Pass> {
        let pass = self.scheduler.next_pass();
        self.hear();
        let pass = pass?;
        self.check(&pass);
        let minds_way = self.scheduler.limits.cache != PrefixCache::Full;
        let mut rows: Vec<u64> = pass.tokens.iter().map(|token| *token as u64).collect();
        let mut failed = vec![false; pass.steps.len()];
        let count =
            |is_prompt| pass.rows.iter().filter(|r| r.is_prompt == is_prompt).map(|r| u64::from(r.n_rows)).sum();
        let (mut stage_us, mut back_us) = (Vec::new(), self.now_us);
        for stage in &mut self.stages {
            for (step, failed) in pass.steps.iter().zip(&mut failed) {
                *failed |= !stage.step(*step, self.random.percent(self.failures));
            }
            let mut at = 0;
            for (set, of) in pass.sets.iter().zip(&pass.rows) {
                let range = at..at + set.n_rows as usize;
                at = range.end;
                let tenant = self.callers[&of.session].tenant;
                stage.compute(*set, tenant, &pass.tokens[range.clone()], &mut rows[range], minds_way);
            }
            if self.has_losses {
                stage.history.push_back((pass.id, stage.slots.clone()));
                stage.history.drain(..stage.history.len().saturating_sub(HISTORY));
            }
            let us = stage.cost.us(count(false), count(true));
            let from = back_us.max(stage.busy.last().map_or(0, |busy| busy.1));
            back_us = from + us;
            stage.busy.push((from, back_us));
            stage_us.push(us as u32);
        }
        self.n_passes += 1;
        self.n_rows += rows.len() as u64;
        self.ring.push_back(Travelling { pass: pass.clone(), failed, rows, stage_us, back_us });
        self.check_book();
        Some(pass)
    }

    /// The ring is lost and another one begins. Each stage has applied as many of the passes on their way as the one
    /// before it, or fewer; the tail none. One may be replaced: by one that holds nothing, or by one that stood by,
    /// lags behind, and may have missed a slot.
    pub(super) fn lose(&mut self) {
        self.n_lost += 1;
        let sent = self.scheduler.next_pass.0 - 1;
        let back = self.ring.front().map_or(sent, |front| front.pass.id.0 - 1);
        let n_stages = self.stages.len();
        let replaced = self.random.below(2 * n_stages as u64) as usize;
        let mut held = Held { applied: PassId(sent), tokens: vec![u32::MAX; self.stages[0].slots.len()] };
        let (mut before, mut is_fresh) = (sent, false);
        for (at, stage) in self.stages.iter_mut().enumerate() {
            let own = match at {
                _ if at == replaced => sent.saturating_sub(self.random.below(HISTORY as u64)),
                _ if at + 1 == n_stages => back,
                _ => back + self.random.below(before - back + 1),
            };
            before = if at == replaced { before } else { own };
            let known = stage.history.iter().rev().find(|(pass, _)| pass.0 <= own).cloned();
            match known {
                Some((_, slots)) if at != replaced || self.random.percent(70) => stage.slots = slots,
                _ => {
                    is_fresh = true;
                    stage.slots.iter_mut().for_each(Vec::clear);
                }
            }
            if at == replaced && self.random.percent(30) {
                let slot = self.random.below(stage.slots.len() as u64) as usize;
                stage.slots[slot].clear();
            }
            stage.history.retain(|(pass, _)| pass.0 <= own);
            stage.images.clear();
            stage.unsaved.clear();
            held.applied = held.applied.min(PassId(own));
            for (least, slot) in held.tokens.iter_mut().zip(&stage.slots) {
                *least = (*least).min(slot.len() as u32);
            }
        }
        self.cut_off();
        let limits = self.scheduler.limits;
        self.scheduler.recover(limits, (!is_fresh).then_some(&held));
        self.hear();
        self.check_book();
    }

    /// No pass comes back any more.
    pub(super) fn cut_off(&mut self) {
        self.ring.clear();
        self.forget_positions();
    }

    /// Tokens of each slot, of which all stages hold the same number.
    pub(super) fn held(&self) -> Vec<u32> {
        let tokens = |stage: &Stage| stage.slots.iter().map(|slot| slot.len() as u32).collect::<Vec<_>>();
        let held = tokens(&self.stages[0]);
        assert!(self.stages.iter().all(|stage| tokens(stage) == held));
        held
    }

    /// Callers may see rows again that they have seen, since another ring begins.
    pub(super) fn forget_positions(&mut self) {
        for caller in self.callers.values_mut() {
            (caller.awaits, caller.next_position) = (false, None);
        }
    }

    pub(super) fn send_all(&mut self) -> Vec<Pass> {
        std::iter::from_fn(|| self.send()).collect()
    }

    /// Takes the oldest pass back and chooses tokens. False if none is in the ring.
    pub(super) fn receive(&mut self) -> bool {
        let Some(Travelling { pass, failed, rows, stage_us, back_us }) = self.ring.pop_front() else { return false };
        self.now_us = self.now_us.max(back_us);
        let outputs = self.scheduler.complete(pass.id, &stage_us, &failed).expect("passes come back in order");
        let mut ends = Vec::new();
        let mut at = 0;
        for set in &pass.sets {
            at += set.n_rows as usize;
            ends.extend((set.n_outputs > 0).then(|| rows[at - 1]));
        }
        for output in outputs {
            let caller = self.callers.get_mut(&output.session).unwrap();
            assert_eq!(output.position as usize, caller.tokens.len());
            assert!(std::mem::take(&mut caller.awaits) && caller.outcome.is_none());
            let token = token_of(ends[output.row]);
            caller.tokens.push(token);
            caller.told_us.push(self.now_us);
            let is_answered = caller.told_us.len() >= caller.n_answer;
            let has_room = self.scheduler.push(output, token);
            assert_eq!(has_room, caller.tokens.len() < self.scheduler.limits.context as usize, "{output:?}");
            match (is_answered, has_room) {
                (true, _) => self.end(output.session, Outcome::Answered),
                (false, false) => self.end(output.session, Outcome::ContextFull),
                (false, true) => {}
            }
        }
        self.hear();
        true
    }

    /// Lets time pass.
    pub(super) fn run_until(&mut self, us: u64) {
        loop {
            self.send_all();
            if self.ring.front().is_none_or(|front| front.back_us > us) {
                break;
            }
            self.receive();
        }
        self.now_us = us;
    }

    /// Goes on until nothing is left to do, and looks whether nothing is left over.
    pub(super) fn drain(&mut self) {
        loop {
            self.send_all();
            if !self.receive() {
                break;
            }
        }
        let s = &self.scheduler;
        assert_eq!((s.n_running(), s.n_waiting(), s.n_in_flight()), (0, 0, 0), "somebody waits for ever");
        assert!(s.to_drop.is_empty());
        assert!(s.images.list.iter().all(|image| image.is_whole && image.n_readers == 0));
        let mut book: Vec<_> = s.images.list.iter().map(|image| (image.id, image.kept.tokens.clone())).collect();
        book.sort();
        for stage in &self.stages {
            let tokens = |cells: &Vec<Cell>| cells.iter().map(|cell| cell.token).collect::<Vec<_>>();
            let mut held: Vec<_> = stage.images.iter().map(|(id, cells)| (*id, tokens(cells))).collect();
            held.sort();
            assert_eq!(held, book, "images on a stage and in the book");
            assert!(stage.unsaved.is_empty());
        }
        for (id, caller) in &self.callers {
            assert!(caller.outcome.is_some(), "session {id} got no answer");
            assert_eq!(caller.tokens, self.lone(caller), "session {id} differs from a lone run");
        }
    }

    /// Prompt and answer of a session that was alone in the world.
    fn lone(&self, caller: &Caller) -> Vec<Token> {
        let minds_way = self.scheduler.limits.cache != PrefixCache::Full;
        let mut tokens = caller.tokens[..caller.n_prompt].to_vec();
        let mut before = vec![0; self.stages.len()];
        for at in 0..caller.tokens.len() - 1 {
            let is_chunked = at < caller.n_prompt && caller.n_prompt > 1;
            let mut row = tokens[at] as u64;
            for before in &mut before {
                row = value(*before, row, minds_way.then_some(is_chunked));
                *before = row;
            }
            if at + 1 >= caller.n_prompt {
                tokens.push(token_of(row));
            }
        }
        tokens
    }

    /// The share of `from..to` for which each stage was computing.
    pub(super) fn busy(&self, from: u64, to: u64) -> Vec<f64> {
        let overlap = |(a, b): &(u64, u64)| b.min(&to).saturating_sub(*a.max(&from));
        let share = |stage: &Stage| stage.busy.iter().map(overlap).sum::<u64>() as f64 / (to - from) as f64;
        self.stages.iter().map(share).collect()
    }

    fn hear(&mut self) {
        for notice in self.scheduler.take_notices() {
            self.notices.push(notice);
            match notice {
                Notice::Started { session, cached } => {
                    let caller = self.callers.get_mut(&session).unwrap();
                    assert_eq!(caller.next_position.replace(cached), None, "session {session} starts twice");
                    caller.cached.push(cached);
                }
                Notice::Preempted { session } => {
                    let caller = self.callers.get_mut(&session).unwrap();
                    caller.next_position = None;
                    caller.n_preempted += 1;
                }
                Notice::Saved { .. } | Notice::Loaded { .. } => {}
            }
        }
    }

    /// What must be true of every pass.
    fn check(&mut self, pass: &Pass) {
        assert!(pass.steps.len() <= MAX_KV_STEPS as usize, "{} steps do not fit into a frame", pass.steps.len());
        assert!(!pass.steps.is_empty() || !pass.sets.is_empty());
        assert_eq!(pass.sets.len(), pass.rows.len());
        assert_eq!(pass.sets.iter().map(|set| set.n_rows as usize).sum::<usize>(), pass.tokens.len());
        let slots: HashSet<u32> = pass.sets.iter().map(|set| set.slot).collect();
        let n_more = pass.sets.len() - slots.len();
        assert!(n_more == 0 || n_more <= (MAX_WAVES - 1) * slots.len() && pass.sets.len() <= MAX_ROW_SETS as usize);
        let Limits { n_slots, chunk, n_stages, .. } = self.scheduler.limits;
        let n_prompt_rows: u32 = pass.rows.iter().filter(|rows| rows.is_prompt).map(|rows| rows.n_rows).sum();
        assert!(n_prompt_rows <= chunk.max(3) && slots.len() <= n_slots as usize);
        let is_extra = self.ring.len() == n_stages as usize && n_stages > 1;
        assert!(self.ring.len() < n_stages as usize || is_extra && pass.rows.iter().all(|rows| rows.is_prompt));
        let mut at = 0;
        for (set, rows) in pass.sets.iter().zip(&pass.rows) {
            let caller = self.callers.get_mut(&rows.session).unwrap();
            let (from, to) = (set.keep as usize, (set.keep + set.n_rows) as usize);
            assert_eq!((caller.outcome, rows.n_rows), (None, set.n_rows));
            assert_eq!(pass.tokens[at..at + to - from], caller.tokens[from..to]);
            assert_eq!(caller.next_position.replace(to as u32), Some(set.keep), "once and in order");
            let is_lone = caller.n_prompt == 1 || from >= caller.n_prompt;
            assert_eq!((is_lone, rows.is_prompt), (set.n_rows == 1, from < caller.n_prompt));
            assert!(is_lone || to <= caller.n_prompt);
            assert_eq!(set.n_outputs, u32::from(to == caller.tokens.len()));
            assert!(set.n_outputs == 0 || !std::mem::replace(&mut caller.awaits, true));
            at += to - from;
        }
    }

    /// What the scheduler believes of slots and images must be so on all stages.
    fn check_book(&self) {
        let images = &self.scheduler.images;
        assert!(images.n_tokens() <= self.scheduler.limits.image_tokens && images.list.len() <= MAX_IMAGES);
        for (at, slot) in self.scheduler.slots.iter().enumerate() {
            let (tokens, tenant, has_surplus) = match slot {
                Slot::Held(session) => {
                    (&session.tokens[..session.n_sent as usize], session.tenant, session.has_surplus)
                }
                Slot::Kept(kept) => (&kept.tokens[..], kept.tenant, kept.has_surplus),
            };
            for stage in &self.stages {
                let cells = &stage.slots[at];
                assert!(cells.len() >= tokens.len(), "slot {at}: {} of {}", cells.len(), tokens.len());
                assert!(tokens.is_empty() || has_surplus || cells.len() == tokens.len(), "slot {at}");
                assert!(tokens.iter().zip(cells).all(|(token, cell)| (*token, tenant) == (cell.token, cell.tenant)));
            }
        }
    }
}
