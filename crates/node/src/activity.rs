//! What the stages of a worker have done, so that its coordinator can tell slow from stuck.
//!
//! Stage threads count frames, each in an [`Activity`] of its own, llama.cpp counts graph nodes, and the control thread
//! adds all up when it is asked ([`WorkerActivity`]). All counters are shared and none is ever waited for.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use brigade_base::PassId;
use brigade_protocol::control::Progress;

use crate::threads::lock;

/// Counts what a stage does while it runs.
#[derive(Debug, Default)]
pub struct Activity {
    /// Frames that came and went.
    frames: AtomicU64,
    received: AtomicU64,
    sent: AtomicU64,
}

impl Activity {
    /// A pass came in; those that a stage that stands by gets count as movement alone.
    pub fn received(&self, pass: PassId, serves: bool) {
        self.frames.fetch_add(1, Ordering::Relaxed);
        if serves {
            self.received.store(pass.0, Ordering::Relaxed);
        }
    }

    /// A pass went out.
    pub fn sent(&self, pass: PassId) {
        self.frames.fetch_add(1, Ordering::Relaxed);
        self.sent.store(pass.0, Ordering::Relaxed);
    }

    /// Its frames as steps, and its last passes.
    pub fn progress(&self) -> Progress {
        // What went out came in before, so `sent` is read first: the other way around it could be the greater one.
        let [sent, received, frames] = [&self.sent, &self.received, &self.frames].map(|n| n.load(Ordering::Relaxed));
        Progress { steps: frames, received: PassId(received), sent: PassId(sent) }
    }
}

/// Counts what the stages of one worker do.
#[derive(Debug, Default)]
pub struct WorkerActivity {
    /// The stages that run, no more than the worker holds at once.
    running: Mutex<Vec<Arc<Activity>>>,
    /// The stages that compute now or did so last, no more than the worker holds at once.
    engines: Mutex<Vec<brigade_engine::Activity>>,
    /// Frames and graph nodes of stages that are gone.
    gone: AtomicU64,
    /// Steps when [`WorkerActivity::moved_lately`] was asked last.
    seen: AtomicU64,
}

impl WorkerActivity {
    /// What a stage that begins to run counts with, for as long as it keeps that.
    pub fn stage(&self) -> Arc<Activity> {
        let activity = Arc::default();
        lock(&self.running).push(Arc::clone(&activity));
        activity
    }

    /// Replaces the stages whose computing counts.
    pub fn watch(&self, engines: Vec<brigade_engine::Activity>) {
        let mut watched = lock(&self.engines);
        let before: u64 = watched.iter().map(brigade_engine::Activity::steps).sum();
        let after: u64 = engines.iter().map(brigade_engine::Activity::steps).sum();
        // The sum never falls, or a step could be hidden by a stage that goes.
        self.gone.fetch_add(before.saturating_sub(after), Ordering::Relaxed);
        *watched = engines;
    }

    /// Whether a stage has done something since this was asked last: frames come many times in the time that a piece
    /// of weights takes, so who asks before each piece knows whether passes go through this node.
    pub fn moved_lately(&self) -> bool {
        let steps = self.progress().steps;
        self.seen.swap(steps, Ordering::Relaxed) != steps
    }

    /// What the coordinator is told: the last pass that any stage received, and the last one that none of them keeps. A
    /// stage that has passed on all that it received keeps nothing, however little came to it; so one that hangs is not
    /// hidden by another one, and one that waits is not taken for one that hangs.
    pub fn progress(&self) -> Progress {
        let nodes: u64 = lock(&self.engines).iter().map(brigade_engine::Activity::steps).sum();
        let mut running = lock(&self.running);
        running.retain_mut(|stage| {
            // Only this list has it: the stage has ended.
            let ended = Arc::get_mut(stage).map(|ended| *ended.frames.get_mut());
            self.gone.fetch_add(ended.unwrap_or(0), Ordering::Relaxed);
            ended.is_none()
        });
        let stages: Vec<Progress> = running.iter().map(|stage| stage.progress()).collect();
        let frames: u64 = stages.iter().map(|stage| stage.steps).sum();
        let received = stages.iter().map(|stage| stage.received).max().unwrap_or_default();
        let kept = stages.iter().filter(|stage| stage.sent < stage.received).map(|stage| stage.sent).min();
        let sent = kept.or_else(|| stages.iter().map(|stage| stage.sent).max()).unwrap_or_default();
        Progress { steps: frames + self.gone.load(Ordering::Relaxed) + nodes, received, sent }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::images::Images;
    use crate::test_stage::{compute, loaded, set};

    #[test]
    fn frames_and_graph_nodes_are_steps_and_none_is_lost_with_a_stage() {
        let activity = WorkerActivity::default();
        let runs = activity.stage();
        runs.received(PassId(3), true);
        runs.received(PassId(9), false);
        runs.sent(PassId(2));
        assert_eq!(activity.progress(), Progress { steps: 3, received: PassId(3), sent: PassId(2) });
        drop(runs);
        assert_eq!(activity.progress(), Progress { steps: 3, received: PassId(0), sent: PassId(0) });
        let mut stage = loaded(Images::off());
        activity.watch(vec![stage.runner.stage().activity()]);
        compute(&mut stage.runner, &[set(0, 0, 4)]);
        let steps = activity.progress().steps;
        assert!(steps > 3 + 10, "{steps}");
        activity.watch(Vec::new());
        assert_eq!(activity.progress().steps, steps);
    }

    #[test]
    fn who_asks_again_hears_whether_anything_was_done_since() {
        let activity = WorkerActivity::default();
        let stage = activity.stage();
        assert!(!activity.moved_lately());
        stage.received(PassId(1), true);
        assert!(activity.moved_lately() && !activity.moved_lately());
    }

    #[test]
    fn a_stage_that_hangs_is_not_hidden_by_one_that_goes_on() {
        let activity = WorkerActivity::default();
        let (first, second) = (activity.stage(), activity.stage());
        let passes = || {
            let Progress { received, sent, .. } = activity.progress();
            (received.0, sent.0)
        };
        for pass in 1..=6 {
            first.received(PassId(pass), true);
            first.sent(PassId(pass));
        }
        assert_eq!(passes(), (6, 6), "the stages between have them, or the link to the second one");
        second.received(PassId(3), true);
        second.sent(PassId(3));
        assert_eq!(passes(), (6, 6));
        second.received(PassId(5), true);
        assert_eq!(passes(), (6, 3));
    }
}
