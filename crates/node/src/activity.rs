//! What the stages of a worker have done, so that its coordinator can tell slow from stuck.
//!
//! Stage threads count frames, llama.cpp counts graph nodes, and the control thread adds both up when it is asked. All
//! counters are shared and none is ever waited for.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use brigade_base::PassId;
use brigade_protocol::control::Progress;

use crate::threads::lock;

/// Counts what the stages of one worker do.
#[derive(Debug, Default)]
pub struct Activity {
    /// Frames that came and went.
    frames: AtomicU64,
    received: AtomicU64,
    sent: AtomicU64,
    /// The stages that compute now or did so last, no more than the worker holds at once.
    engines: Mutex<Vec<brigade_engine::Activity>>,
    /// Graph nodes of stages that are gone.
    gone: AtomicU64,
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

    /// Replaces the stages whose computing counts.
    pub fn watch(&self, engines: Vec<brigade_engine::Activity>) {
        let mut watched = lock(&self.engines);
        let before: u64 = watched.iter().map(brigade_engine::Activity::steps).sum();
        let after: u64 = engines.iter().map(brigade_engine::Activity::steps).sum();
        // The sum never falls, or a step could be hidden by a stage that goes.
        self.gone.fetch_add(before.saturating_sub(after), Ordering::Relaxed);
        *watched = engines;
    }

    /// What the coordinator is told.
    pub fn progress(&self) -> Progress {
        let nodes: u64 = lock(&self.engines).iter().map(brigade_engine::Activity::steps).sum();
        let [frames, gone, received, sent] =
            [&self.frames, &self.gone, &self.received, &self.sent].map(|n| n.load(Ordering::Relaxed));
        Progress { steps: frames + gone + nodes, received: PassId(received), sent: PassId(sent) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::images::Images;
    use crate::test_stage::{compute, loaded, set};

    #[test]
    fn frames_and_graph_nodes_are_steps_and_none_is_lost_with_a_stage() {
        let activity = Activity::default();
        activity.received(PassId(3), true);
        activity.received(PassId(9), false);
        activity.sent(PassId(2));
        assert_eq!(activity.progress(), Progress { steps: 3, received: PassId(3), sent: PassId(2) });
        let mut stage = loaded(Images::off());
        activity.watch(vec![stage.runner.stage().activity()]);
        compute(&mut stage.runner, &[set(0, 0, 4)]);
        let steps = activity.progress().steps;
        assert!(steps > 3 + 10, "{steps}");
        activity.watch(Vec::new());
        assert_eq!(activity.progress().steps, steps);
    }
}
