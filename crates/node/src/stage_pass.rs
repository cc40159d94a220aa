//! One pass through one stage: what a worker and the coordinator's tail have in common.
//!
//! A pass first changes KV caches ([`PassRunner::apply`]), then has its rows computed ([`PassRunner::run`]). A step
//! that a stage cannot carry out for want of disk is marked as failed and the pass goes on; a step or a row that counts
//! on tokens which are not here means that the stages no longer agree, and ends the ring.
//!
//! A pass counts as applied once that is noted ([`PassRunner::note_applied`]). What is left of one that never was,
//! because the ring ended, is forgotten when the stage comes to rest ([`PassRunner::rest`]). Then the slots hold what
//! all passes up to the one applied last have left, and the next placement can go on from there.
//!
//! [`PassRunner`] owns the stage, its saved sessions ([`Images`]), and the buffers of both.

use std::time::Instant;

use brigade_base::{Epoch, ImageId, PassId, Token};
use brigade_engine::{Input, KvError, Row, RunError, Stage};
use brigade_protocol::control::{Held, MAX_SESSIONS};
use brigade_protocol::frame::{KvStep, RowSet};
use brigade_protocol::handover::Room;

use crate::images::{ImageError, Images};
use crate::throttle::Throttle;

/// Memory that is kept for the next image: sessions of a small model fit, and those of a large one, which are hundreds
/// of megabytes, must not stay in memory twice.
const KEPT_IMAGE_BYTES: usize = 16 << 20;

/// A pass could not be computed.
#[derive(Debug, thiserror::Error)]
pub enum PassError {
    /// The pass would go back in a slot, which layers with a state cannot.
    #[error("the pass goes back to {keep} of {held} tokens of slot {slot}, whose state holds for all of them or none")]
    Backward {
        /// The slot.
        slot: u32,
        /// What the pass counts on.
        keep: u32,
        /// What is here.
        held: u32,
    },
    /// The pass builds on tokens that this stage does not hold.
    #[error("the pass counts on {keep} tokens of slot {slot}, but this stage holds {held}")]
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
    /// The KV cache could not be cut back or copied.
    #[error(transparent)]
    Kv(#[from] KvError),
}

/// A session was not saved or loaded; it has to be computed again.
#[derive(Debug, thiserror::Error)]
enum SpillError {
    #[error(transparent)]
    Image(#[from] ImageError),
    #[error(transparent)]
    Kv(#[from] KvError),
}

/// A stage with what it needs to run passes; its buffers are reused.
pub struct PassRunner {
    stage: Stage,
    /// What hidden states are multiplied by before they enter, where the architecture scales its input.
    input_scale: f32,
    /// Rows carry tokens; see [`row_of_token`].
    takes_tokens: bool,
    tokens: Vec<Token>,
    n_slots: u32,
    images: Images,
    throttle: Throttle,
    /// Whose names the images have.
    epoch: Epoch,
    /// The last pass that was applied, all of it; 0 before the first.
    applied: PassId,
    /// Tokens of each slot that are those of the passes up to `applied`.
    valid: Vec<u32>,
    /// A slot that a pass does not fit is lost, and the pass goes on without it.
    is_lenient: bool,
    /// Said once that nothing can be saved.
    said_off: bool,
    /// Said that the disk refuses, and since then it has.
    said_lost: bool,
    rows: Vec<Row>,
    wave_out: Vec<f32>,
    image: Vec<u8>,
}

impl PassRunner {
    /// Wraps a stage with `n_slots` sessions; `images` are its own.
    pub fn new(stage: Stage, input_scale: f32, n_slots: u32, images: Images) -> Self {
        Self {
            stage,
            input_scale,
            takes_tokens: false,
            tokens: Vec::new(),
            n_slots,
            images,
            throttle: Throttle::default(),
            epoch: Epoch(0),
            applied: PassId(0),
            valid: vec![0; n_slots as usize],
            is_lenient: false,
            said_off: false,
            said_lost: false,
            rows: Vec::new(),
            wave_out: Vec::new(),
            image: Vec::new(),
        }
    }

    /// Computes for a `share` of the time from now on, and rests in between; 1 does not rest.
    pub fn set_throttle(&mut self, share: f32) {
        self.throttle = Throttle::new(share);
    }

    /// From now on rows carry tokens, as [`row_of_token`] makes them: for a model whose layers need the tokens.
    pub fn set_takes_tokens(&mut self, takes_tokens: bool) {
        self.takes_tokens = takes_tokens;
    }

    /// The stage itself.
    pub fn stage(&self) -> &Stage {
        &self.stage
    }

    /// Forgets every session, saved ones too, and all passes.
    pub fn clear(&mut self) {
        self.clear_slots();
        self.applied = PassId(0);
        self.images.clear();
        self.image = Vec::new();
    }

    fn clear_slots(&mut self) {
        self.stage.clear_all();
        self.valid.fill(0);
    }

    /// The last pass that was applied.
    pub fn applied(&self) -> PassId {
        self.applied
    }

    /// Says that a pass is applied, its steps and its rows, and all before it.
    pub fn note_applied(&mut self, pass: PassId) {
        self.applied = pass;
        for (slot, valid) in (0..).zip(&mut self.valid) {
            *valid = self.stage.len(slot);
        }
    }

    /// What the slots hold of the passes that were applied.
    pub fn held(&self) -> Held {
        Held { applied: self.applied, tokens: self.valid.clone() }
    }

    /// Forgets what a pass has left that was not applied as a whole, and says what the slots hold; `None` if nothing
    /// was applied since they were empty.
    pub fn rest(&mut self) -> Option<Held> {
        for slot in 0..self.n_slots {
            let valid = self.valid[slot as usize];
            let len = self.stage.len(slot);
            if len > valid && self.stage.truncate(slot, valid).is_err() {
                self.lose(slot);
            }
            // A run that failed where nothing can be taken back has emptied it.
            self.doubt(slot, len);
        }
        (self.applied > PassId(0)).then(|| self.held())
    }

    /// Comes to rest between two placements. Saved sessions are forgotten, since their names are those of one epoch,
    /// and slots too unless they are to be kept.
    pub fn next_epoch(&mut self, keep_kv: bool) {
        self.images.clear();
        if keep_kv {
            self.rest();
        } else {
            self.clear();
        }
    }

    /// Takes part in an epoch from now on, if it does not already.
    pub fn enter(&mut self, epoch: Epoch) {
        if std::mem::replace(&mut self.epoch, epoch) != epoch {
            self.next_epoch(true);
        }
    }

    /// Begins to stand by for a stage whose next pass follows `last`: from now on a slot that a pass does not fit is
    /// lost until a pass begins it anew, which ends nothing. If passes up to `last` were missed, all slots are.
    pub fn stand_by(&mut self, last: PassId) {
        self.is_lenient = true;
        if self.applied < last {
            self.clear_slots();
        }
    }

    /// Begins to serve: a pass that does not fit is an error.
    pub fn serve(&mut self) {
        self.is_lenient = false;
    }

    /// What can be handed over to this stage.
    pub fn room(&self) -> Room {
        let context = self.stage.options().n_ctx;
        Room { n_slots: self.n_slots, context, slot_bytes: self.stage.memory().kv / u64::from(self.n_slots.max(1)) }
    }

    /// Writes an image of a slot's tokens to `out`, which is overwritten.
    ///
    /// # Errors
    /// If the engine cannot.
    pub fn save_slot(&mut self, slot: u32, out: &mut Vec<u8>) -> Result<(), KvError> {
        self.stage.save(slot, out)
    }

    /// Fills a slot from an image of `n_tokens` tokens. It counts with the next pass that is noted as applied.
    ///
    /// # Errors
    /// If it is none of this stage.
    pub fn restore_slot(&mut self, slot: u32, image: &[u8], n_tokens: u32) -> Result<(), KvError> {
        self.doubt(slot, 0);
        self.stage.restore(slot, image, n_tokens)
    }

    /// No more than `n_tokens` tokens of a slot, which may not exist, are left of the passes that were applied.
    fn doubt(&mut self, slot: u32, n_tokens: u32) {
        if let Some(valid) = self.valid.get_mut(slot as usize) {
            *valid = n_tokens.min(*valid);
        }
    }

    /// Empties a slot that has not what it should have.
    fn lose(&mut self, slot: u32) {
        self.doubt(slot, 0);
        if let Err(error) = self.stage.clear(slot) {
            tracing::warn!(slot, %error, "a slot could not be emptied");
        }
    }

    /// Changes KV caches as a pass wants it before its rows. A step that is not possible here, or was not on a stage
    /// before this one, is marked with true; marks are never taken back. A slot that was not loaded is empty.
    ///
    /// # Errors
    /// If a step counts on tokens or a slot that are not here; those before it are done.
    pub fn apply(&mut self, steps: &mut [(KvStep, bool)]) -> Result<(), PassError> {
        for (step, failed) in steps {
            match self.step(*step, *failed) {
                Ok(None) => {}
                Ok(Some(error)) => {
                    *failed = true;
                    self.tell(&error);
                }
                Err(error) if self.is_lenient && !matches!(error, PassError::NoSlot { .. }) => {
                    *failed = true;
                    match *step {
                        KvStep::Copy { slot, .. } | KvStep::Save { slot, .. } | KvStep::Load { slot, .. } => {
                            self.lose(slot)
                        }
                        KvStep::Drop { .. } => {}
                    }
                }
                Err(error) => return Err(error),
            }
            if self.image.capacity() > KEPT_IMAGE_BYTES {
                self.image = Vec::new();
            }
        }
        Ok(())
    }

    /// Carries out one step that has failed elsewhere or not; why it fails here, if it may.
    fn step(&mut self, step: KvStep, failed: bool) -> Result<Option<SpillError>, PassError> {
        match step {
            KvStep::Copy { slot, from, n_tokens } => {
                self.check_slot(slot)?;
                self.check_holds(from, n_tokens)?;
                self.doubt(slot, 0);
                self.stage.copy(from, slot, n_tokens)?;
            }
            KvStep::Drop { image } => self.images.remove(image),
            KvStep::Save { slot, n_tokens, image } => {
                self.check_holds(slot, n_tokens)?;
                self.doubt(slot, n_tokens);
                // What a stage before could not save is never asked for.
                if !failed {
                    return Ok(self.save(slot, n_tokens, image).err());
                }
            }
            KvStep::Load { slot, n_tokens, image } => {
                self.check_slot(slot)?;
                self.doubt(slot, 0);
                let error = if failed { None } else { self.load(slot, n_tokens, image).err() };
                if failed || error.is_some() {
                    self.stage.clear(slot)?;
                }
                return Ok(error);
            }
        }
        Ok(None)
    }

    fn save(&mut self, slot: u32, n_tokens: u32, image: ImageId) -> Result<(), SpillError> {
        // Asked before the slot is copied; the kilobytes that llama.cpp adds are counted when the image is written.
        self.images.check_room(self.stage.kv_bytes_per_token() * u64::from(n_tokens))?;
        if !self.stage.can_save() {
            return Err(KvError::NotSavable.into());
        }
        // Tokens that were taken back may still be here.
        self.stage.truncate(slot, n_tokens)?;
        self.stage.save(slot, &mut self.image)?;
        self.images.save(image, &self.image)?;
        self.said_lost = false;
        Ok(())
    }

    fn load(&mut self, slot: u32, n_tokens: u32, image: ImageId) -> Result<(), SpillError> {
        self.images.load(image, &mut self.image)?;
        Ok(self.stage.restore(slot, &self.image, n_tokens)?)
    }

    /// Notes why a session was not saved or loaded.
    fn tell(&mut self, error: &SpillError) {
        match error {
            SpillError::Image(ImageError::Off) | SpillError::Kv(KvError::NotSavable) if self.said_off => {}
            SpillError::Image(ImageError::Off) | SpillError::Kv(KvError::NotSavable) => {
                self.said_off = true;
                tracing::info!(%error, "an idle session was not kept");
            }
            // The coordinator makes room; it happens again and again.
            SpillError::Image(ImageError::Full { .. } | ImageError::TooMany) => {
                tracing::debug!(%error, "an idle session was not kept");
            }
            // A disk that is full refuses several times a second.
            SpillError::Image(ImageError::Io { .. }) if std::mem::replace(&mut self.said_lost, true) => {
                tracing::debug!(%error, "one more idle session was lost");
            }
            _ => tracing::warn!(%error, "an idle session was lost; its tokens will be computed again"),
        }
    }

    fn check_slot(&self, slot: u32) -> Result<(), PassError> {
        let n_slots = self.n_slots;
        if slot < n_slots { Ok(()) } else { Err(PassError::NoSlot { slot, n_slots }) }
    }

    /// How many tokens a slot holds, which must be `keep` or more.
    fn check_holds(&self, slot: u32, keep: u32) -> Result<u32, PassError> {
        self.check_slot(slot)?;
        let held = self.stage.len(slot);
        if held < keep { Err(PassError::OutOfStep { slot, keep, held }) } else { Ok(held) }
    }

    /// The same of a set of rows, which where a state is kept must go on behind all that the slot holds, or begin anew.
    fn check_fits(&mut self, slot: u32, keep: u32) -> Result<u32, PassError> {
        let held = self.check_holds(slot, keep)?;
        if 0 < keep && keep < held && !self.stage.can_rewind() {
            // So that the next ring does not come to the same end.
            self.doubt(slot, 0);
            return Err(PassError::Backward { slot, keep, held });
        }
        Ok(held)
    }

    /// Runs a pass, and rests behind it if it is throttled. `hidden` is `[n_rows, n_embd]` and may be scaled in place;
    /// `out` becomes the next hidden states `[n_rows, n_embd]`, or in a final stage the logits `[n_outputs, n_vocab]`.
    ///
    /// # Errors
    /// If the stage does not hold what the pass builds on, or the engine fails; the pass then has no effect that a
    /// later `keep` would not undo.
    pub fn run(&mut self, sets: &[RowSet], hidden: &mut [f32], out: &mut Vec<f32>) -> Result<(), PassError> {
        let begin = Instant::now();
        self.run_waves(sets, hidden, out)?;
        self.throttle.pause(begin.elapsed());
        Ok(())
    }

    fn run_waves(&mut self, sets: &[RowSet], hidden: &mut [f32], out: &mut Vec<f32>) -> Result<(), PassError> {
        if self.input_scale != 1.0 {
            hidden.iter_mut().for_each(|value| *value *= self.input_scale);
        }
        if first_wave(sets) == sets.len() {
            return self.run_wave(sets, hidden, out);
        }
        out.clear();
        let n_embd = self.stage.n_embd() as usize;
        let (mut sets, mut hidden) = (sets, hidden);
        let mut wave_out = std::mem::take(&mut self.wave_out);
        while !sets.is_empty() {
            let (wave, later) = sets.split_at(first_wave(sets));
            let n_values = wave.iter().map(|set| set.n_rows as usize).sum::<usize>() * n_embd;
            // What is too short is refused by the engine.
            let (values, rest) = hidden.split_at_mut(n_values.min(hidden.len()));
            self.run_wave(wave, values, &mut wave_out)?;
            out.extend_from_slice(&wave_out);
            (sets, hidden) = (later, rest);
        }
        self.wave_out = wave_out;
        Ok(())
    }

    /// Runs sets of different slots.
    fn run_wave(&mut self, sets: &[RowSet], hidden: &mut [f32], out: &mut Vec<f32>) -> Result<(), PassError> {
        out.clear();
        self.rows.clear();
        for set in sets {
            let held = self.check_fits(set.slot, set.keep)?;
            self.doubt(set.slot, set.keep);
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
        if !self.takes_tokens {
            return Ok(self.stage.run(&self.rows, Input::Hidden(hidden), out)?);
        }
        let n_embd = self.stage.n_embd() as usize;
        self.tokens.clear();
        self.tokens.extend(hidden.chunks_exact(n_embd.max(1)).map(token_of_row));
        Ok(self.stage.run(&self.rows, Input::Tokens(&self.tokens), out)?)
    }

    /// Runs a pass of a stage that stands by: as [`run`](Self::run), but without the sets that do not fit.
    ///
    /// # Errors
    /// If a set names a slot that is not here, or the engine fails.
    pub fn run_fitting(
        &mut self,
        sets: &mut Vec<RowSet>,
        hidden: &mut Vec<f32>,
        out: &mut Vec<f32>,
    ) -> Result<(), PassError> {
        let n_embd = self.stage.n_embd() as usize;
        let (mut n_sets, mut at) = (0, 0);
        while let Some(&set) = sets.get(n_sets) {
            let n_values = set.n_rows as usize * n_embd;
            // It may build on a set before it, of which no row is computed yet.
            let before = sets[..n_sets].iter().rev().find(|before| before.slot == set.slot);
            let fits = match before.is_some_and(|before| set.keep <= before.keep + before.n_rows) {
                true => Ok(set.keep),
                false => self.check_fits(set.slot, set.keep),
            };
            match fits {
                Ok(_) => {
                    n_sets += 1;
                    at += n_values;
                }
                Err(error @ PassError::NoSlot { .. }) => return Err(error),
                Err(error) => {
                    tracing::debug!(%error, "a slot of a standby is lost");
                    self.lose(set.slot);
                    sets.remove(n_sets);
                    hidden.drain(at..(at + n_values).min(hidden.len()));
                }
            }
        }
        self.run(sets, hidden, out)
    }
}

/// The first value of the row that stands for a token where a model takes tokens instead of embeddings: the token's
/// number as its bits. So such rows go the way of all others. The other values of the row are zeros.
pub fn row_of_token(token: Token) -> f32 {
    f32::from_bits(token.cast_unsigned())
}

fn token_of_row(row: &[f32]) -> Token {
    row.first().map_or(-1, |value| value.to_bits().cast_signed())
}

/// How many of the first sets are of different slots. A set that follows another one of its slot builds on it.
fn first_wave(sets: &[RowSet]) -> usize {
    let mut seen = [false; MAX_SESSIONS as usize];
    let is_new = |set: &&RowSet| match seen.get_mut(set.slot as usize) {
        Some(seen) => !std::mem::replace(seen, true),
        // A slot that does not exist is found when it is used.
        None => true,
    };
    sets.iter().take_while(is_new).count()
}

#[cfg(test)]
mod one_way_tests;

#[cfg(test)]
mod tests {
    use brigade_base::ByteSize;

    use super::*;
    use crate::loaded::LoadedStage;
    use crate::test_stage::{N_SLOTS, compute, loaded, set};

    const IMAGE: ImageId = ImageId(1);

    fn stage(limit: u64) -> (tempfile::TempDir, LoadedStage) {
        let dir = tempfile::tempdir().unwrap();
        let images = Images::open(&dir.path().join("kv"), ByteSize(limit)).unwrap();
        (dir, loaded(images))
    }

    /// Applies one step and returns whether it failed.
    fn apply(runner: &mut PassRunner, step: KvStep) -> bool {
        let mut steps = [(step, false)];
        runner.apply(&mut steps).unwrap();
        steps[0].1
    }

    #[test]
    fn a_session_goes_on_after_it_was_saved_and_loaded_elsewhere() {
        let (_dir, mut stage) = stage(1 << 20);
        let runner = &mut stage.runner;
        compute(runner, &[set(0, 0, 5)]);
        assert!(!apply(runner, KvStep::Save { slot: 0, n_tokens: 5, image: IMAGE }));
        let expected = compute(runner, &[set(0, 5, 1)]);
        // Somebody else has the slot meanwhile.
        compute(runner, &[set(0, 0, 0), set(1, 0, 4)]);
        assert!(!apply(runner, KvStep::Load { slot: 0, n_tokens: 5, image: IMAGE }));
        assert_eq!(runner.stage().len(0), 5);
        assert_eq!(compute(runner, &[set(0, 5, 1)]), expected);
        assert!(!apply(runner, KvStep::Drop { image: IMAGE }));
        assert!(apply(runner, KvStep::Load { slot: 0, n_tokens: 5, image: IMAGE }));
        assert_eq!(runner.stage().len(0), 0, "what cannot be loaded leaves the slot empty");
    }

    #[test]
    fn a_copy_goes_on_as_the_session_it_was_copied_from() {
        let (_dir, mut stage) = stage(0);
        let runner = &mut stage.runner;
        compute(runner, &[set(0, 0, 6)]);
        assert!(!apply(runner, KvStep::Copy { slot: 3, from: 0, n_tokens: 4 }));
        let mut hidden: Vec<f32> = crate::test_stage::rows(&[set(0, 4, 1)], runner.stage().n_embd());
        let mut of_copy = Vec::new();
        runner.run(&[set(3, 4, 1)], &mut hidden, &mut of_copy).unwrap();
        assert_eq!(of_copy, compute(runner, &[set(0, 4, 1)]));
    }

    #[test]
    fn a_mark_stays_and_what_failed_before_is_not_tried() {
        let (_dir, mut stage) = stage(1 << 20);
        let runner = &mut stage.runner;
        compute(runner, &[set(0, 0, 5), set(1, 0, 3)]);
        let (save, load) =
            (KvStep::Save { slot: 0, n_tokens: 5, image: IMAGE }, KvStep::Load { slot: 1, n_tokens: 5, image: IMAGE });
        let mut steps = [(save, true), (load, true), (KvStep::Copy { slot: 2, from: 0, n_tokens: 5 }, true)];
        runner.apply(&mut steps).unwrap();
        assert!(steps.iter().all(|(_, failed)| *failed));
        assert_eq!((runner.images.len(), runner.stage().len(1), runner.stage().len(2)), (0, 0, 5));
    }

    #[test]
    fn a_store_that_is_full_fails_the_step_and_not_the_pass() {
        let (_dir, mut stage) = stage(10);
        let runner = &mut stage.runner;
        compute(runner, &[set(0, 0, 5)]);
        assert!(apply(runner, KvStep::Save { slot: 0, n_tokens: 5, image: IMAGE }));
        assert_eq!(runner.stage().len(0), 5);
    }

    #[test]
    fn tokens_that_were_taken_back_are_not_saved() {
        let (_dir, mut stage) = stage(1 << 20);
        let runner = &mut stage.runner;
        compute(runner, &[set(0, 0, 5)]);
        assert!(!apply(runner, KvStep::Save { slot: 0, n_tokens: 3, image: IMAGE }));
        assert!(!apply(runner, KvStep::Load { slot: 1, n_tokens: 3, image: IMAGE }));
        assert_eq!((runner.stage().len(0), runner.stage().len(1)), (3, 3));
    }

    #[test]
    fn clearing_forgets_what_was_saved() {
        let (_dir, mut stage) = stage(1 << 20);
        let runner = &mut stage.runner;
        compute(runner, &[set(0, 0, 5)]);
        assert!(!apply(runner, KvStep::Save { slot: 0, n_tokens: 5, image: IMAGE }));
        runner.clear();
        assert!(apply(runner, KvStep::Load { slot: 0, n_tokens: 5, image: IMAGE }));
    }

    fn held(runner: &mut PassRunner) -> (u64, Vec<u32>) {
        let Held { applied, tokens } = runner.rest().unwrap();
        (applied.0, tokens[..4].to_vec())
    }

    #[test]
    fn images_are_those_of_one_epoch() {
        let (_dir, mut stage) = stage(1 << 20);
        let runner = &mut stage.runner;
        runner.enter(Epoch(1));
        compute(runner, &[set(0, 0, 5)]);
        assert!(!apply(runner, KvStep::Save { slot: 0, n_tokens: 5, image: IMAGE }));
        runner.note_applied(PassId(1));
        runner.enter(Epoch(1));
        assert_eq!(runner.images.len(), 1);
        runner.enter(Epoch(2));
        assert_eq!((runner.images.len(), held(runner)), (0, (1, vec![5, 0, 0, 0])));
        runner.next_epoch(false);
        assert_eq!(runner.rest(), None);
    }

    #[test]
    fn at_rest_a_stage_holds_what_whole_passes_left() {
        let (_dir, mut stage) = stage(1 << 20);
        let runner = &mut stage.runner;
        assert_eq!(runner.rest(), None);
        compute(runner, &[set(0, 0, 5), set(1, 0, 3)]);
        runner.note_applied(PassId(4));
        assert_eq!(held(runner), (4, vec![5, 3, 0, 0]));
        // A pass that is cut off behind its steps, and one behind its rows.
        runner.apply(&mut [(KvStep::Copy { slot: 1, from: 0, n_tokens: 4 }, false)]).unwrap();
        compute(runner, &[set(0, 4, 3), set(2, 0, 2)]);
        assert_eq!(runner.stage().len(0), 7);
        assert_eq!(held(runner), (4, vec![4, 0, 0, 0]));
        assert_eq!(runner.stage().len(0), 4);
        compute(runner, &[set(0, 4, 1)]);
        runner.note_applied(PassId(9));
        assert_eq!(held(runner), (9, vec![5, 0, 0, 0]));
        runner.clear();
        assert_eq!((runner.rest(), runner.applied()), (None, PassId(0)));
    }

    /// Computes sets that may not fit.
    fn follow(runner: &mut PassRunner, pass: u64, sets: &[RowSet]) {
        let (mut sets, mut out) = (sets.to_vec(), Vec::new());
        let mut hidden = crate::test_stage::rows(&sets, runner.stage().n_embd());
        runner.run_fitting(&mut sets, &mut hidden, &mut out).unwrap();
        runner.note_applied(PassId(pass));
    }

    #[test]
    fn a_standby_loses_slots_that_do_not_fit_until_they_are_begun_anew() {
        let (_dir, mut stage) = stage(0);
        let (_other, mut serving) = self::stage(0);
        let runner = &mut stage.runner;
        runner.stand_by(PassId(0));
        follow(runner, 1, &[set(0, 0, 5), set(1, 0, 3)]);
        follow(runner, 2, &[set(0, 7, 1), set(1, 3, 1), set(2, 9, 2), set(3, 0, 2)]);
        assert_eq!(held(runner), (2, vec![0, 4, 0, 2]));
        let copy = |slot, from, n_tokens| (KvStep::Copy { slot, from, n_tokens }, false);
        let save = (KvStep::Save { slot: 2, n_tokens: 3, image: IMAGE }, false);
        runner.apply(&mut [copy(1, 0, 5), copy(2, 3, 2), save]).unwrap();
        follow(runner, 3, &[set(0, 0, 4)]);
        assert_eq!(held(runner), (3, vec![4, 0, 0, 2]), "a slot that cannot be saved is not what it should be");
        // What is left has the bits of one that never lost anything.
        compute(&mut serving.runner, &[set(0, 0, 4), set(3, 0, 2)]);
        runner.serve();
        let next = [set(0, 4, 1), set(3, 2, 1)];
        assert_eq!(compute(runner, &next), compute(&mut serving.runner, &next));
    }

    #[test]
    fn a_standby_that_missed_a_pass_begins_anew() {
        let (_dir, mut stage) = stage(0);
        let runner = &mut stage.runner;
        runner.stand_by(PassId(0));
        follow(runner, 1, &[set(0, 0, 5)]);
        runner.stand_by(PassId(1));
        assert_eq!(held(runner), (1, vec![5, 0, 0, 0]));
        runner.stand_by(PassId(2));
        assert_eq!(held(runner), (1, vec![0, 0, 0, 0]));
    }

    #[test]
    fn sets_of_one_slot_are_computed_one_after_the_other() {
        let (_dir, mut stage) = stage(0);
        let (_other, mut one_by_one) = self::stage(0);
        let passes = [[set(0, 0, 5), set(1, 0, 3)], [set(0, 5, 1), set(1, 3, 1)], [set(0, 6, 1), set(1, 4, 1)]];
        let expected: Vec<f32> = passes.iter().flat_map(|sets| compute(&mut one_by_one.runner, sets)).collect();
        assert_eq!(compute(&mut stage.runner, &passes.concat()), expected);
        assert_eq!([0, 1].map(|slot| stage.runner.stage().len(slot)), [7, 5]);
        // One that stands by takes them in the same way, and what does not fit is lost with what follows it.
        let (_third, mut standby) = self::stage(0);
        let runner = &mut standby.runner;
        runner.stand_by(PassId(0));
        follow(runner, 1, &[set(0, 0, 5), set(1, 2, 1), set(0, 5, 1), set(1, 3, 1)]);
        assert_eq!(held(runner), (1, vec![6, 0, 0, 0]));
    }

    #[test]
    fn steps_that_count_on_what_is_not_here_end_the_pass() {
        let (_dir, mut stage) = stage(1 << 20);
        let runner = &mut stage.runner;
        compute(runner, &[set(0, 0, 5)]);
        let mut check = |step, out_of_step: bool| match runner.apply(&mut [(step, false)]) {
            Err(PassError::OutOfStep { held: 5, .. }) => assert!(out_of_step, "{step:?}"),
            Err(PassError::NoSlot { slot: N_SLOTS, .. }) => assert!(!out_of_step, "{step:?}"),
            other => panic!("{step:?} gave {other:?}"),
        };
        check(KvStep::Copy { slot: 1, from: 0, n_tokens: 6 }, true);
        check(KvStep::Save { slot: 0, n_tokens: 6, image: IMAGE }, true);
        check(KvStep::Copy { slot: N_SLOTS, from: 0, n_tokens: 5 }, false);
        check(KvStep::Copy { slot: 1, from: N_SLOTS, n_tokens: 5 }, false);
        check(KvStep::Save { slot: N_SLOTS, n_tokens: 5, image: IMAGE }, false);
        check(KvStep::Load { slot: N_SLOTS, n_tokens: 5, image: IMAGE }, false);
    }
}
