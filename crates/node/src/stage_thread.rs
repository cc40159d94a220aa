//! The thread that computes a worker's stage: a frame comes in, the next one goes out.
//!
//! It reads its incoming link itself: while there is nothing to compute there is nothing else to do, and handing a
//! frame from a reading thread to a computing one would cost a wake-up more than the frame's way.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Instant;

use brigade_engine::Canceller;
use brigade_net::Link;
use brigade_protocol::frame::{Attach, FrameHead, Timing, row_bytes};
use brigade_protocol::kind;

use crate::loaded::LoadedStage;

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
    ) -> std::io::Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let canceller = stage.runner.stage().canceller();
        let running =
            Self { stop: Arc::clone(&stop), canceller, inbound: Arc::clone(&inbound), outbound: Arc::clone(&outbound) };
        let run = move || {
            let mut stage = stage;
            let end = run(attach, &mut stage, &*inbound, &*outbound);
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

fn run(attach: Attach, stage: &mut LoadedStage, inbound: &dyn Link, outbound: &dyn Link) -> StageEnd {
    let mut head = FrameHead::default();
    let (mut frame, mut hidden, mut out, mut header) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    loop {
        match inbound.recv(&mut frame, None) {
            Ok(kind::FRAME) => {}
            Ok(kind) => return StageEnd::Failed(format!("the stage before sent a frame of unknown kind {kind:#x}")),
            Err(error) => {
                tracing::debug!(%error, "the incoming link ended");
                return StageEnd::LinkClosed;
            }
        }
        let arrived = Instant::now();
        if let Err(error) = head.decode(&frame, &mut hidden) {
            return StageEnd::Failed(format!("the stage before sent a broken frame: {error}"));
        }
        if (head.deployment, head.epoch) != (attach.deployment, attach.epoch) {
            continue;
        }
        let n_embd = stage.runner.stage().n_embd();
        if head.n_embd != n_embd {
            return StageEnd::Failed(format!("a frame has rows of {} values instead of {n_embd}", head.n_embd));
        }
        let begin = Instant::now();
        if let Err(error) = stage.runner.run(&head.sets, &mut hidden, &mut out) {
            return StageEnd::Failed(error.to_string());
        }
        let compute = begin.elapsed();
        let software = arrived.elapsed().saturating_sub(compute);
        head.timings.push(Timing {
            compute_us: u32::try_from(compute.as_micros()).unwrap_or(u32::MAX),
            software_us: u32::try_from(software.as_micros()).unwrap_or(u32::MAX),
        });
        head.encode(&mut header);
        if let Err(error) = outbound.send(kind::FRAME, &[&header, row_bytes(&out)]) {
            tracing::debug!(%error, "the outgoing link ended");
            return StageEnd::LinkClosed;
        }
    }
}
