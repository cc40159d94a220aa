//! One pass through one stage: what a worker and the coordinator's tail have in common.

use brigade_engine::{Input, KvError, Row, RunError, Stage};
use brigade_protocol::frame::RowSet;

/// A pass could not be computed.
#[derive(Debug, thiserror::Error)]
pub enum PassError {
    /// The pass builds on tokens that this stage does not hold.
    #[error("the pass keeps {keep} tokens of slot {slot}, but this stage holds {held}")]
    OutOfStep {
        /// The slot.
        slot: u32,
        /// What the pass counts on.
        keep: u32,
        /// What is here.
        held: u32,
    },
    /// The pass names a slot that was not reserved.
    #[error("the pass names slot {slot}, but the stage has {n_slots}")]
    NoSlot {
        /// The slot.
        slot: u32,
        /// Slots of the stage.
        n_slots: u32,
    },
    /// The engine refused.
    #[error(transparent)]
    Run(#[from] RunError),
    /// The KV cache could not be cut back.
    #[error(transparent)]
    Kv(#[from] KvError),
}

/// A stage with what it needs to run passes; its buffers are reused.
pub struct PassRunner {
    stage: Stage,
    /// What hidden states are multiplied by before they enter, where the architecture scales its input.
    input_scale: f32,
    n_slots: u32,
    rows: Vec<Row>,
}

impl PassRunner {
    /// Wraps a stage with `n_slots` sessions.
    pub fn new(stage: Stage, input_scale: f32, n_slots: u32) -> Self {
        Self { stage, input_scale, n_slots, rows: Vec::new() }
    }

    /// The stage itself.
    pub fn stage(&self) -> &Stage {
        &self.stage
    }

    /// Forgets every session.
    pub fn clear(&mut self) {
        self.stage.clear_all();
    }

    /// Runs a pass. `hidden` is `[n_rows, n_embd]` and may be scaled in place; `out` becomes the next hidden states
    /// `[n_rows, n_embd]`, or in a final stage the logits `[n_outputs, n_vocab]`.
    ///
    /// # Errors
    /// If the stage does not hold what the pass builds on, or the engine fails; the pass then has no effect that a
    /// later `keep` would not undo.
    pub fn run(&mut self, sets: &[RowSet], hidden: &mut [f32], out: &mut Vec<f32>) -> Result<(), PassError> {
        out.clear();
        self.rows.clear();
        for set in sets {
            if set.slot >= self.n_slots {
                return Err(PassError::NoSlot { slot: set.slot, n_slots: self.n_slots });
            }
            let held = self.stage.len(set.slot);
            if held < set.keep {
                return Err(PassError::OutOfStep { slot: set.slot, keep: set.keep, held });
            }
            if held > set.keep {
                self.stage.truncate(set.slot, set.keep)?;
            }
            let first_output = set.n_rows - set.n_outputs.min(set.n_rows);
            self.rows.extend((0..set.n_rows).map(|i| Row {
                slot: set.slot,
                position: set.keep + i,
                output: i >= first_output,
            }));
        }
        if self.rows.is_empty() {
            return Ok(());
        }
        if self.input_scale != 1.0 {
            hidden.iter_mut().for_each(|value| *value *= self.input_scale);
        }
        Ok(self.stage.run(&self.rows, Input::Hidden(hidden), out)?)
    }
}
