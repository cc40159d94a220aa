//! The thread that computes a worker's stage: frames come in, are computed, and go on.
//!
//! - [`Incoming`] has the next frames decoded while this thread computes; [`Outgoing`] sends large ones while it
//!   computes on. Buffers are used again.
//! - What waits is computed together where that saves work, see [`n_together`]; each frame still leaves as its own, in
//!   the order of coming.
//! - A stage that serves sends its frames to who stands by for the stage behind, too ([`ShadowSlot`]). One that stands
//!   by itself computes the same passes and sends nothing; see [`PassRunner`] for what becomes of slots that it lacks.
//!   When its link ends it first finishes what has arrived.
//!
//! A row that is alone in its slot has the same bits whatever else is in the batch, and rows of a prompt's chunk have
//! those of their chunk. So computing frames together changes no answer.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Instant;

use brigade_base::PassId;
use brigade_engine::Canceller;
use brigade_net::Link;
use brigade_protocol::control::{Held, MAX_SESSIONS};
use brigade_protocol::frame::{Attach, RowSet, Timing};

use crate::activity::Activity;
use crate::incoming::{InFrame, Incoming, IncomingEnd, MAX_QUEUE};
use crate::loaded::LoadedStage;
use crate::outgoing::Outgoing;
use crate::shadow::ShadowSlot;
use crate::stage_pass::{PassError, PassRunner};
use crate::threads::micros;

/// Fewest single rows that are computed together. Below, processors go row by row: with 1.2 billion weights in Q4_0 on
/// one thread, 1 row was seen to take 70 ms, 2 rows 142, 3 rows 152 and 4 rows 151. So two lone rows would save
/// nothing, and the first would wait for the second.
const MIN_ROWS_TOGETHER: u32 = 3;

/// Why a stage's thread ended.
#[derive(Debug)]
pub enum StageEnd {
    /// It was told to, or a neighbour's link closed: the coordinator will say what comes next.
    LinkClosed,
    /// The stage itself cannot go on.
    Failed(String),
}

/// Where a stage's frames go.
pub enum Route {
    /// To the next stage, and to who stands by for that one.
    On {
        /// The link to the next stage.
        outbound: Arc<dyn Link>,
        /// Where the link to the one that stands by is put, if there is one.
        shadow: Arc<ShadowSlot>,
    },
    /// Nowhere: the stage stands by.
    Nowhere,
}

/// A running stage.
pub struct RunningStage {
    stop: Arc<AtomicBool>,
    canceller: Canceller,
    links: Vec<Arc<dyn Link>>,
}

impl RunningStage {
    /// Starts the thread. `ended` gets the stage back, at rest, and what its slots hold.
    ///
    /// # Errors
    /// If the system gives no thread; the stage is then lost.
    pub fn start(
        attach: Attach,
        stage: LoadedStage,
        inbound: Arc<dyn Link>,
        route: Route,
        activity: Arc<Activity>,
        ended: impl FnOnce(LoadedStage, StageEnd, Option<Held>) + Send + 'static,
    ) -> io::Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let canceller = stage.runner.stage().canceller();
        let incoming = Incoming::start(Arc::clone(&inbound))?;
        let mut links = vec![inbound];
        let (outgoing, shadow) = match route {
            Route::On { outbound, shadow } => {
                links.push(Arc::clone(&outbound));
                (Some(Outgoing::new(outbound)?), shadow)
            }
            Route::Nowhere => (None, Arc::default()),
        };
        let running = Self { stop: Arc::clone(&stop), canceller, links: links.clone() };
        let run = move || {
            let mut stage = stage;
            let shadows = Arc::clone(&shadow);
            stage.runner.enter(attach.epoch);
            let end = StageLoop::new(attach, &mut stage.runner, incoming, outgoing, shadow, activity).run(&stop);
            // Whoever is next in the ring learns from its closed link that this stage has ended.
            links.iter().for_each(|link| link.close());
            shadows.clear();
            let held = stage.runner.rest();
            ended(stage, if stop.load(Ordering::Relaxed) { StageEnd::LinkClosed } else { end }, held);
        };
        let _detached: JoinHandle<()> = std::thread::Builder::new().name("stage".into()).spawn(run)?;
        Ok(running)
    }

    /// Ends the thread, in the middle of a pass if need be.
    pub fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
        self.links.iter().for_each(|link| link.close());
        self.canceller.cancel();
    }
}

/// What the thread works with.
struct StageLoop<'a> {
    attach: Attach,
    runner: &'a mut PassRunner,
    incoming: Incoming,
    /// The way to the next stage; a stage that stands by has none.
    outgoing: Option<Outgoing>,
    shadow: Arc<ShadowSlot>,
    activity: Arc<Activity>,
    /// The last pass that was taken; none before the first.
    taken: Option<PassId>,
    /// Frames that were taken and not yet computed.
    waiting: VecDeque<InFrame>,
    /// Row sets and rows of several frames, one after the other.
    sets: Vec<RowSet>,
    hidden: Vec<f32>,
    /// What was computed, `[n_rows, n_embd]`.
    out: Vec<f32>,
    header: Vec<u8>,
}

/// When a batch was computed.
#[derive(Debug, Clone, Copy)]
struct Computed {
    n_frames: usize,
    begin: Instant,
    end: Instant,
}

impl<'a> StageLoop<'a> {
    fn new(
        attach: Attach,
        runner: &'a mut PassRunner,
        incoming: Incoming,
        outgoing: Option<Outgoing>,
        shadow: Arc<ShadowSlot>,
        activity: Arc<Activity>,
    ) -> Self {
        let (waiting, header) = (VecDeque::with_capacity(MAX_QUEUE), Vec::new());
        let (sets, hidden, out) = (Vec::new(), Vec::new(), Vec::new());
        let taken = None;
        Self { attach, runner, incoming, outgoing, shadow, activity, taken, waiting, sets, hidden, out, header }
    }

    fn run(mut self, stop: &AtomicBool) -> StageEnd {
        loop {
            if let Err(end) = self.take_frames() {
                return end;
            }
            if stop.load(Ordering::Relaxed) {
                return StageEnd::LinkClosed;
            }
            if let Err(end) = self.turn() {
                return end;
            }
        }
    }

    /// Computes what waits, or the first part of it, and sends it on.
    fn turn(&mut self) -> Result<(), StageEnd> {
        let n_frames = n_together(&self.waiting, self.runner.stage().options().max_rows);
        let computed = self.compute(n_frames)?;
        self.send(computed)
    }

    /// Waits for a frame, unless some were left over, then takes all that are here.
    fn take_frames(&mut self) -> Result<(), StageEnd> {
        while self.waiting.is_empty() {
            let frame = self.incoming.recv().map_err(|end| match end {
                IncomingEnd::Closed(_) => StageEnd::LinkClosed,
                IncomingEnd::Failed(why) => StageEnd::Failed(why),
            })?;
            self.take(frame)?;
        }
        while self.waiting.len() < MAX_QUEUE {
            // An end is heard again when nothing waits any more.
            let Ok(Some(frame)) = self.incoming.try_recv() else { break };
            self.take(frame)?;
        }
        Ok(())
    }

    /// Lets a frame wait, if it is one of this placement.
    fn take(&mut self, frame: InFrame) -> Result<(), StageEnd> {
        let head = &frame.head;
        if (head.deployment, head.epoch) != (self.attach.deployment, self.attach.epoch) {
            self.incoming.recycle(frame);
            return Ok(());
        }
        let n_embd = self.runner.stage().n_embd();
        if head.n_embd != n_embd {
            return Err(StageEnd::Failed(format!("a frame has rows of {} values instead of {n_embd}", head.n_embd)));
        }
        self.check_order(head.pass, head.follows)?;
        self.activity.received(head.pass, self.outgoing.is_some());
        self.waiting.push_back(frame);
        Ok(())
    }

    /// Passes have rising numbers, over all placements.
    fn check_order(&mut self, pass: PassId, follows: PassId) -> Result<(), StageEnd> {
        let last = self.taken.replace(pass).unwrap_or_else(|| {
            match self.outgoing {
                Some(_) => self.runner.serve(),
                None => self.runner.stand_by(follows),
            }
            self.runner.applied()
        });
        if pass > last { Ok(()) } else { Err(StageEnd::Failed(format!("pass {pass} came behind pass {last}"))) }
    }

    /// Computes the first frames that wait as one batch.
    fn compute(&mut self, n_frames: usize) -> Result<Computed, StageEnd> {
        let begin = Instant::now();
        self.compute_rows(n_frames).map_err(|error| StageEnd::Failed(error.to_string()))?;
        let frames = || self.waiting.iter().take(n_frames);
        let expected: usize = frames().map(|frame| frame.rows.len()).sum();
        if self.outgoing.is_some() && self.out.len() != expected {
            let found = self.out.len();
            return Err(StageEnd::Failed(format!("the stage gave {found} values instead of {expected}")));
        }
        if let Some(last) = frames().next_back() {
            self.runner.note_applied(last.head.pass);
        }
        Ok(Computed { n_frames, begin, end: Instant::now() })
    }

    fn compute_rows(&mut self, n_frames: usize) -> Result<(), PassError> {
        let Self { runner, waiting, sets, hidden, out, .. } = self;
        // Only the first frame may have steps.
        let Some(first) = waiting.front_mut() else { return Ok(()) };
        runner.apply(&mut first.head.steps)?;
        let is_standby = self.outgoing.is_none();
        if n_frames == 1 {
            let (sets, rows) = (&mut first.head.sets, &mut first.rows);
            return if is_standby { runner.run_fitting(sets, rows, out) } else { runner.run(sets, rows, out) };
        }
        sets.clear();
        hidden.clear();
        for frame in waiting.iter().take(n_frames) {
            sets.extend_from_slice(&frame.head.sets);
            hidden.extend_from_slice(&frame.rows);
        }
        if is_standby { runner.run_fitting(sets, hidden, out) } else { runner.run(sets, hidden, out) }
    }

    /// Sends the frames of a batch on, each with its rows.
    fn send(&mut self, computed: Computed) -> Result<(), StageEnd> {
        let Self { waiting, incoming, outgoing, shadow, activity, out, header, .. } = self;
        let mut rest = &out[..];
        for mut frame in waiting.drain(..computed.n_frames) {
            if let Some(outgoing) = outgoing {
                let (rows, others) = rest.split_at(frame.rows.len());
                rest = others;
                stamp(&mut frame, &computed, outgoing.write_us(), header);
                if let Err(error) = outgoing.send(header, rows) {
                    tracing::debug!(%error, "the outgoing link ended");
                    return Err(StageEnd::LinkClosed);
                }
                activity.sent(frame.head.pass);
                // Behind the ring's own frame, which is waited for.
                shadow.send(header, rows);
            }
            incoming.recycle(frame);
        }
        Ok(())
    }
}

/// Adds what the stage has spent on a frame, and encodes its head.
fn stamp(frame: &mut InFrame, computed: &Computed, write_us: u32, header: &mut Vec<u8>) {
    let mut timing = Timing {
        read_us: frame.read_us,
        queue_us: micros(computed.begin - frame.decoded),
        compute_us: micros(computed.end - computed.begin),
        encode_us: 0,
        write_us,
        n_frames: computed.n_frames as u32,
    };
    // Encoded twice, since the frame itself says how long that took; it is a matter of microseconds.
    frame.head.timings.push(timing);
    frame.head.encode(header);
    timing.encode_us = micros(computed.end.elapsed());
    frame.head.timings.pop();
    frame.head.timings.push(timing);
    frame.head.encode(header);
}

/// How many of the waiting frames, from the first on, are computed as one batch of at most `max_rows` rows.
///
/// Lone rows of different sessions share one reading of the weights; the chunk of a prompt is computed by itself in any
/// case. So the first frame may have anything, if it has lone rows too, and those behind it nothing but lone rows. None
/// of them may change KV caches by steps, which would then come before the rows of the first, nor have a slot that one
/// before has.
fn n_together(waiting: &VecDeque<InFrame>, max_rows: u32) -> usize {
    let Some(first) = waiting.front() else { return 0 };
    let mut slots = [false; MAX_SESSIONS as usize];
    let mut n_rows = first.head.n_rows();
    let mut n_single = first.head.sets.iter().filter(|set| set.n_rows == 1).count() as u32;
    if n_single == 0 {
        return 1;
    }
    mark(&mut slots, &first.head.sets);
    let mut n_frames = 1;
    for InFrame { head, .. } in waiting.iter().skip(1) {
        let is_single = head.steps.is_empty() && head.sets.iter().all(|set| set.n_rows <= 1);
        let n_more = head.n_rows();
        if !is_single || n_rows.saturating_add(n_more) > max_rows || is_marked(&slots, &head.sets) {
            break;
        }
        mark(&mut slots, &head.sets);
        n_rows += n_more;
        n_single += n_more;
        n_frames += 1;
    }
    if n_single < MIN_ROWS_TOGETHER { 1 } else { n_frames }
}

fn mark(slots: &mut [bool], sets: &[RowSet]) {
    for set in sets {
        if let Some(slot) = slots.get_mut(set.slot as usize) {
            *slot = true;
        }
    }
}

fn is_marked(slots: &[bool], sets: &[RowSet]) -> bool {
    // A slot that does not exist is marked: its frame fails alone.
    sets.iter().any(|set| slots.get(set.slot as usize).copied().unwrap_or(true))
}

#[cfg(test)]
#[path = "stage_thread_tests.rs"]
mod tests;
