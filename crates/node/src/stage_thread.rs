//! The thread that computes a worker's stage: frames come in, are computed, and go on.
//!
//! - [`Incoming`] has the next frames decoded while this thread computes; [`Outgoing`] sends large ones while it
//!   computes on. Buffers are used again.
//! - What waits is computed together where that saves work, see [`n_together`]; each frame still leaves as its own, in
//!   the order of coming.
//!
//! A row that is alone in its slot has the same bits whatever else is in the batch, and rows of a prompt's chunk have
//! those of their chunk. So computing frames together changes no answer.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Instant;

use brigade_engine::Canceller;
use brigade_net::Link;
use brigade_protocol::control::MAX_SESSIONS;
use brigade_protocol::frame::{Attach, RowSet, Timing};

use crate::incoming::{InFrame, Incoming, IncomingEnd, MAX_QUEUE};
use crate::loaded::LoadedStage;
use crate::outgoing::Outgoing;
use crate::stage_pass::PassRunner;
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

/// A running stage.
pub struct RunningStage {
    stop: Arc<AtomicBool>,
    canceller: Canceller,
    inbound: Arc<dyn Link>,
    outbound: Arc<dyn Link>,
}

impl RunningStage {
    /// Starts the thread. `ended` gets the stage back.
    ///
    /// # Errors
    /// If the system gives no thread; the stage is then lost.
    pub fn start(
        attach: Attach,
        stage: LoadedStage,
        inbound: Arc<dyn Link>,
        outbound: Arc<dyn Link>,
        ended: impl FnOnce(LoadedStage, StageEnd) + Send + 'static,
    ) -> io::Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let canceller = stage.runner.stage().canceller();
        let incoming = Incoming::start(Arc::clone(&inbound))?;
        let outgoing = Outgoing::new(Arc::clone(&outbound))?;
        let running =
            Self { stop: Arc::clone(&stop), canceller, inbound: Arc::clone(&inbound), outbound: Arc::clone(&outbound) };
        let run = move || {
            let mut stage = stage;
            let end = StageLoop::new(attach, &mut stage.runner, incoming, outgoing).run(&stop);
            // Whoever is next in the ring learns from its closed link that this stage has ended.
            inbound.close();
            outbound.close();
            let stopped = stop.load(Ordering::Relaxed);
            ended(stage, if stopped { StageEnd::LinkClosed } else { end });
        };
        let _detached: JoinHandle<()> = std::thread::Builder::new().name("stage".into()).spawn(run)?;
        Ok(running)
    }

    /// Ends the thread, in the middle of a pass if need be.
    pub fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
        self.inbound.close();
        self.outbound.close();
        self.canceller.cancel();
    }
}

/// What the thread works with.
struct StageLoop<'a> {
    attach: Attach,
    runner: &'a mut PassRunner,
    incoming: Incoming,
    outgoing: Outgoing,
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
    fn new(attach: Attach, runner: &'a mut PassRunner, incoming: Incoming, outgoing: Outgoing) -> Self {
        let (waiting, header) = (VecDeque::with_capacity(MAX_QUEUE), Vec::new());
        let (sets, hidden, out) = (Vec::new(), Vec::new(), Vec::new());
        Self { attach, runner, incoming, outgoing, waiting, sets, hidden, out, header }
    }

    fn run(mut self, stop: &AtomicBool) -> StageEnd {
        loop {
            if let Err(end) = self.turn() {
                return end;
            }
            if stop.load(Ordering::Relaxed) {
                return StageEnd::LinkClosed;
            }
        }
    }

    fn turn(&mut self) -> Result<(), StageEnd> {
        self.take_frames()?;
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
        self.waiting.push_back(frame);
        Ok(())
    }

    /// Computes the first frames that wait as one batch.
    fn compute(&mut self, n_frames: usize) -> Result<Computed, StageEnd> {
        let Self { runner, waiting, sets, hidden, out, .. } = self;
        let begin = Instant::now();
        let mut n_rows = 0;
        let mut run = || {
            // Only the first frame may have steps.
            if let Some(first) = waiting.front_mut() {
                runner.apply(&mut first.head.steps)?;
            }
            if let (1, Some(only)) = (n_frames, waiting.front_mut()) {
                n_rows = only.head.n_rows();
                return runner.run(&only.head.sets, &mut only.rows, out);
            }
            sets.clear();
            hidden.clear();
            for frame in waiting.iter().take(n_frames) {
                n_rows += frame.head.n_rows();
                sets.extend_from_slice(&frame.head.sets);
                hidden.extend_from_slice(&frame.rows);
            }
            runner.run(sets, hidden, out)
        };
        run().map_err(|error| StageEnd::Failed(error.to_string()))?;
        let (found, expected) = (out.len(), n_rows as usize * runner.stage().n_embd() as usize);
        if found != expected {
            return Err(StageEnd::Failed(format!("the stage gave {found} values instead of {expected}")));
        }
        Ok(Computed { n_frames, begin, end: Instant::now() })
    }

    /// Sends the frames of a batch on, each with its rows.
    fn send(&mut self, computed: Computed) -> Result<(), StageEnd> {
        let mut rest = &self.out[..];
        for mut frame in self.waiting.drain(..computed.n_frames) {
            let (rows, others) = rest.split_at(frame.rows.len());
            rest = others;
            let mut timing = Timing {
                read_us: frame.read_us,
                queue_us: micros(computed.begin - frame.decoded),
                compute_us: micros(computed.end - computed.begin),
                encode_us: 0,
                write_us: self.outgoing.write_us(),
                n_frames: computed.n_frames as u32,
            };
            // Encoded twice, since the frame itself says how long that took; it is a matter of microseconds.
            frame.head.timings.push(timing);
            frame.head.encode(&mut self.header);
            timing.encode_us = micros(computed.end.elapsed());
            frame.head.timings.pop();
            frame.head.timings.push(timing);
            frame.head.encode(&mut self.header);
            if let Err(error) = self.outgoing.send(&self.header, rows) {
                tracing::debug!(%error, "the outgoing link ended");
                return Err(StageEnd::LinkClosed);
            }
            self.incoming.recycle(frame);
        }
        Ok(())
    }
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
