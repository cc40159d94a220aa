//! A language model that is not there: numbers that betray every wrong token in a KV cache.
//!
//! Each layer has a value for each position of a slot. It follows from the layer's value of the position before, from
//! the row that came in, and (where bits matter) from whether the row was computed alone or in a chunk. The value of
//! the last layer chooses the next token. So an answer is that of [`Model::answer`] only if every stage held the right
//! tokens all along, computed in the right way, whatever the cuts between the stages were.

use brigade_base::{LayerRange, Token};

use crate::random::scatter;

/// Most layers; the planner's choices are the same with a hundred.
pub const MAX_LAYERS: usize = 8;

/// Width of a row on the wire: a value's 64 bits as four whole numbers that F32 holds exactly.
pub const N_EMBD: u32 = 4;

/// Tokens of the vocabulary.
const N_VOCAB: u64 = 500;

/// What a layer range remembers of one position.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cell {
    /// The token that stands there.
    pub token: Token,
    /// Value of each of the model's layers; 0 where the stage does not have the layer.
    pub values: [u64; MAX_LAYERS],
}

/// The model.
#[derive(Debug, Clone, Copy)]
pub struct Model {
    /// Its layers, at most [`MAX_LAYERS`].
    pub n_layers: u32,
    /// Rows computed alone and rows of a chunk differ.
    pub minds_way: bool,
    /// Slots can be cut back, copied, saved and handed over.
    pub can_rewind: bool,
}

impl Model {
    /// The row that a token enters as.
    pub fn embed(token: Token) -> u64 {
        scatter(token as u64)
    }

    /// Computes one row behind what `slot` holds, and adds its cell.
    pub fn compute(&self, layers: LayerRange, slot: &mut Vec<Cell>, token: Token, row: u64, is_chunked: bool) -> u64 {
        let mut cell = Cell { token, values: [0; MAX_LAYERS] };
        let before = slot.last();
        let way = if self.minds_way { 1 + u64::from(is_chunked) } else { 0 };
        let mut row = row;
        for layer in layers.iter() {
            let before = before.map_or(0, |cell| cell.values[layer as usize]);
            row = scatter(before ^ scatter(row ^ way ^ u64::from(layer) << 8));
            cell.values[layer as usize] = row;
        }
        slot.push(cell);
        row
    }

    /// The token that a session's sampler chooses at a position, given the last layer's value.
    pub fn choose(value: u64, sampling: u64, position: usize) -> Token {
        let drawn = if sampling == 0 { value } else { scatter(value ^ scatter(sampling ^ position as u64)) };
        (drawn % N_VOCAB) as Token
    }

    /// Prompt and answer of a session that is alone in the world.
    pub fn answer(&self, prompt: &[Token], n_answer: usize, sampling: u64) -> Vec<Token> {
        let Ok(layers) = LayerRange::new(0, self.n_layers) else { return prompt.to_vec() };
        let mut tokens = prompt.to_vec();
        let mut slot = Vec::new();
        for at in 0..prompt.len() + n_answer - 1 {
            let is_chunked = at < prompt.len() && prompt.len() > 1;
            let value = self.compute(layers, &mut slot, tokens[at], Self::embed(tokens[at]), is_chunked);
            if at + 1 >= prompt.len() {
                tokens.push(Self::choose(value, sampling, at + 1));
            }
        }
        tokens
    }
}

/// A value as it travels.
pub fn to_row(value: u64) -> [f32; N_EMBD as usize] {
    std::array::from_fn(|i| f32::from((value >> (16 * i)) as u16))
}

/// A value that has travelled.
pub fn of_row(row: &[f32]) -> u64 {
    row.iter().enumerate().fold(0, |value, (i, part)| value | (*part as u64) << (16 * i))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_survives_the_wire() {
        for value in [0, 1, u64::MAX, 0x0123_4567_89ab_cdef] {
            assert_eq!(of_row(&to_row(value)), value);
        }
    }

    #[test]
    fn an_answer_does_not_depend_on_the_cut_but_on_every_token() {
        let model = Model { n_layers: 6, minds_way: true, can_rewind: true };
        let tokens = model.answer(&[1, 2, 3], 5, 0);
        assert_eq!(tokens.len(), 8);
        let mut slots = [Vec::new(), Vec::new()];
        let cut = [LayerRange::new(0, 4).unwrap(), LayerRange::new(4, 6).unwrap()];
        for (at, token) in tokens[..7].iter().enumerate() {
            let mut row = Model::embed(*token);
            for (slot, layers) in slots.iter_mut().zip(cut) {
                row = model.compute(layers, slot, *token, row, at < 3);
            }
            assert!(at < 2 || Model::choose(row, 0, at + 1) == tokens[at + 1]);
        }
        let other_way = Model { minds_way: false, ..model };
        assert_ne!(tokens[3..], model.answer(&[9, 2, 3], 5, 0)[3..]);
        assert_ne!(tokens[3..], model.answer(&[1, 2, 3], 5, 7)[3..]);
        assert_ne!(tokens[3..], other_way.answer(&[1, 2, 3], 5, 0)[3..]);
    }
}
