//! A loaded stage: what `node::stage_pass` and `engine::Stage` are in a real node, with a [`Model`] that is not there.
//!
//! It holds cells instead of KV tensors, and refuses what a real stage refuses. Beside each value it keeps the token
//! that belongs there, which no real stage knows, so that the simulator can compare position and contents of every slot
//! with the logs of the sessions at every step.

use std::collections::BTreeMap;

use brigade_base::{ImageId, LayerRange, PassId, Token};
use brigade_protocol::control::Held;
use brigade_protocol::frame::{KvStep, RowSet};

use crate::model::{Cell, MAX_LAYERS, Model};

/// The KV of one slot, as it travels to a successor.
pub type Slot = Vec<Cell>;

/// A pass counts on tokens that are not here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OutOfStep {
    /// The slot.
    pub slot: u32,
    /// Tokens that the pass counts on.
    pub keep: u32,
    /// Tokens that are here.
    pub held: u32,
}

/// A stage in the memory of a node.
#[derive(Debug)]
pub struct Stage {
    /// Its layers.
    pub layers: LayerRange,
    model: Model,
    slots: Vec<Slot>,
    /// Slots that missed something: what they hold is of no use.
    is_lost: Vec<bool>,
    images: BTreeMap<ImageId, Slot>,
    /// The last pass that was applied.
    pub applied: PassId,
}

impl Stage {
    /// Nothing in its slots.
    pub fn new(model: Model, layers: LayerRange, n_slots: u32) -> Self {
        let n_slots = n_slots as usize;
        Self {
            layers,
            model,
            slots: vec![Vec::new(); n_slots],
            is_lost: vec![false; n_slots],
            images: BTreeMap::new(),
            applied: PassId(0),
        }
    }

    /// Forgets every session and image.
    pub fn clear(&mut self) {
        self.slots.iter_mut().for_each(Vec::clear);
        self.is_lost.fill(false);
        self.images.clear();
        self.applied = PassId(0);
    }

    /// Forgets all images: they are those of one ring.
    pub fn drop_images(&mut self) {
        self.images.clear();
    }

    /// What its slots hold.
    pub fn held(&self) -> Held {
        let tokens = self.slots.iter().zip(&self.is_lost);
        let tokens = tokens.map(|(slot, is_lost)| if *is_lost { 0 } else { slot.len() as u32 }).collect();
        Held { applied: self.applied, tokens }
    }

    /// The slots that hold something of use to a successor.
    pub fn usable_slots(&self) -> impl Iterator<Item = (u32, &Slot)> {
        let is_usable = |at: usize, slot: &Slot| self.model.can_rewind && !self.is_lost[at] && !slot.is_empty();
        let all = self.slots.iter().enumerate().filter(move |(at, slot)| is_usable(*at, slot));
        all.map(|(at, slot)| (at as u32, slot))
    }

    /// Every slot has missed something.
    pub fn lose_all(&mut self) {
        self.is_lost.fill(true);
    }

    /// What a slot holds becomes what came from a predecessor.
    pub fn restore(&mut self, slot: usize, cells: Slot) {
        self.slots[slot] = cells;
        self.is_lost[slot] = false;
    }

    fn usable(&self, slot: u32, keep: u32) -> Result<(), OutOfStep> {
        let len = self.slots.get(slot as usize).map_or(0, |slot| slot.len() as u32);
        let held = if self.is_lost.get(slot as usize) == Some(&false) { len } else { 0 };
        if held < keep || slot as usize >= self.slots.len() { Err(OutOfStep { slot, keep, held }) } else { Ok(()) }
    }

    /// A slot has missed something.
    pub fn lose(&mut self, slot: u32) {
        if let Some(is_lost) = self.is_lost.get_mut(slot as usize) {
            *is_lost = true;
        }
    }

    /// Carries out the KV steps of a pass and marks those that fail; with `is_disk_full` all saving does.
    ///
    /// # Errors
    /// If one counts on tokens that are not here.
    pub fn apply(&mut self, steps: &mut [(KvStep, bool)], is_disk_full: bool) -> Result<(), OutOfStep> {
        for (step, failed) in steps {
            assert!(self.model.can_rewind, "{step:?} of slots that are neither copied nor saved");
            match *step {
                KvStep::Copy { slot, from, n_tokens } => {
                    self.usable(from, n_tokens)?;
                    let cells = self.slots[from as usize][..n_tokens as usize].to_vec();
                    self.restore(slot as usize, cells);
                }
                KvStep::Save { slot, n_tokens, image } => {
                    self.usable(slot, n_tokens)?;
                    if *failed || is_disk_full {
                        *failed = true;
                    } else {
                        let cells = self.slots[slot as usize][..n_tokens as usize].to_vec();
                        assert!(self.images.insert(image, cells).is_none(), "image {image} is saved twice");
                    }
                }
                KvStep::Load { slot, n_tokens, image } => match self.images.get(&image).filter(|_| !*failed) {
                    Some(cells) => {
                        assert_eq!(cells.len(), n_tokens as usize, "image {image} has another length");
                        let cells = cells.clone();
                        self.restore(slot as usize, cells);
                    }
                    None => {
                        *failed = true;
                        self.restore(slot as usize, Vec::new());
                    }
                },
                KvStep::Drop { image } => drop(self.images.remove(&image)),
            }
        }
        Ok(())
    }

    /// Computes the rows of a set in place. `tokens` is what the simulator knows of them.
    ///
    /// # Errors
    /// If the set counts on tokens that are not here.
    pub fn compute(&mut self, set: RowSet, tokens: &[Token], rows: &mut [u64]) -> Result<(), OutOfStep> {
        self.usable(set.slot, set.keep)?;
        let slot = &mut self.slots[set.slot as usize];
        let is_whole = set.keep == 0 || set.keep as usize == slot.len();
        assert!(is_whole || self.model.can_rewind, "{set:?} goes back from {} tokens", slot.len());
        slot.truncate(set.keep as usize);
        self.is_lost[set.slot as usize] = false;
        for (token, row) in tokens.iter().zip(rows) {
            *row = self.model.compute(self.layers, slot, *token, *row, set.n_rows > 1);
        }
        Ok(())
    }

    /// Whether the first tokens of a slot are `tokens`.
    pub fn holds(&self, slot: u32, tokens: &[Token]) -> bool {
        let cells = &self.slots[slot as usize];
        cells.len() == tokens.len() && cells.iter().zip(tokens).all(|(cell, token)| cell.token == *token)
    }
}

/// Cells as they travel.
pub fn encode_cells(cells: &[Cell]) -> Vec<u8> {
    let fields = |cell: &Cell| {
        let values = cell.values.into_iter().flat_map(u64::to_le_bytes);
        cell.token.to_le_bytes().into_iter().chain(values).collect::<Vec<_>>()
    };
    cells.iter().flat_map(fields).collect()
}

/// Cells that have travelled.
pub fn decode_cells(bytes: &[u8]) -> Slot {
    let cell = |bytes: &[u8]| {
        let (token, values) = bytes.split_at(4);
        let number = |at: usize| values[8 * at..8 * at + 8].iter().rev().fold(0, |n, byte| n << 8 | u64::from(*byte));
        let token = token.iter().rev().fold(0u32, |n, byte| n << 8 | u32::from(*byte));
        Cell { token: token as Token, values: std::array::from_fn(number) }
    };
    bytes.chunks_exact(CELL_BYTES).map(cell).collect()
}

/// Bytes of a cell that travels.
pub const CELL_BYTES: usize = 4 + 8 * MAX_LAYERS;

#[cfg(test)]
mod tests {
    use super::*;

    fn stage() -> Stage {
        Stage::new(Model { n_layers: 4, minds_way: true, can_rewind: true }, LayerRange::new(1, 3).unwrap(), 2)
    }

    fn set(slot: u32, keep: u32, n_rows: u32) -> RowSet {
        RowSet { slot, keep, n_rows, n_outputs: 0 }
    }

    #[test]
    fn a_stage_refuses_what_counts_on_more_than_it_holds() {
        let mut stage = stage();
        stage.compute(set(0, 0, 3), &[1, 2, 3], &mut [1, 2, 3]).unwrap();
        assert!(stage.holds(0, &[1, 2, 3]) && !stage.holds(0, &[1, 2]) && !stage.holds(0, &[1, 2, 4]));
        let error = stage.compute(set(0, 4, 1), &[1], &mut [1]).unwrap_err();
        assert_eq!(error, OutOfStep { slot: 0, keep: 4, held: 3 });
        stage.lose(0);
        assert_eq!(stage.held().tokens, [0, 0]);
        assert!(stage.compute(set(0, 3, 1), &[4], &mut [4]).is_err());
        stage.compute(set(0, 0, 1), &[4], &mut [4]).unwrap();
        assert_eq!(stage.held().tokens, [1, 0]);
    }

    #[test]
    fn cells_survive_the_wire() {
        let cell =
            |n: u64| Cell { token: n as Token - 9, values: std::array::from_fn(|at| u64::MAX / (n + at as u64)) };
        let cells: Vec<Cell> = (1..9).map(cell).collect();
        assert_eq!(decode_cells(&encode_cells(&cells)), cells);
    }

    #[test]
    fn images_fail_on_a_full_disk_and_are_forgotten() {
        let mut stage = stage();
        stage.compute(set(0, 0, 2), &[1, 2], &mut [1, 2]).unwrap();
        let save = KvStep::Save { slot: 0, n_tokens: 2, image: ImageId(1) };
        let load = KvStep::Load { slot: 1, n_tokens: 2, image: ImageId(1) };
        let mut run = |step, is_full| {
            let mut steps = [(step, false)];
            stage.apply(&mut steps, is_full).unwrap();
            (steps[0].1, stage.held().tokens[1])
        };
        assert_eq!([run(save, true), run(load, false)], [(true, 0), (true, 0)]);
        assert_eq!([run(save, false), run(load, true)], [(false, 0), (false, 2)]);
        run(KvStep::Drop { image: ImageId(1) }, false);
        assert_eq!(run(load, false), (true, 0));
    }
}
