//! What is computed: passes of rows with tokens, the same for every way to run the model.
//!
//! - Sessions: the prompts of two sessions in two chunks each, apart and in one batch; answers apart and in one batch;
//!   then one session goes back and continues with other tokens. Where a state cannot go back it is cleared, and what
//!   it keeps is computed again.
//! - Texts, for models that pool: each apart, then both in one batch.
//!
//! As in operation, chunks have two rows or more, tokens of answers are rows of their own, and the last row of a
//! session in a pass yields a result.

use brigade_base::Token;
use brigade_engine::Row;

/// Fewest tokens that a script can be made of: each chunk of a prompt has two rows.
pub(super) const MIN_TOKENS: u32 = 8;

/// Something that happens to a session before a pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Rewind {
    pub slot: u32,
    /// How many of its first tokens it keeps.
    pub n_keep: u32,
}

/// One batch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Pass {
    pub rewind: Option<Rewind>,
    pub rows: Vec<Row>,
    /// A token for each row.
    pub tokens: Vec<Token>,
}

/// All batches of a run, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Script {
    pub passes: Vec<Pass>,
}

/// Rows of one session in a pass.
#[derive(Clone, Copy)]
struct Part {
    slot: u32,
    start: u32,
    n: u32,
    /// Which tokens stand there: those of another take are others.
    take: u64,
}

impl Script {
    /// Two sessions of `n_tokens`, which is [`MIN_TOKENS`] at least; without `can_rewind` they are cleared to go back.
    pub(super) fn of_sessions(n_tokens: u32, n_vocab: u32, can_rewind: bool, seed: u64) -> Self {
        let draft = Draft { n_vocab, seed };
        let part = |slot, start, n| Part { slot, start, n, take: 0 };
        // Ends of the chunks of both prompts.
        let [a, aa, b, bb] = [n_tokens * 3 / 8, n_tokens * 5 / 8, n_tokens / 4, n_tokens / 2];
        let mut passes = vec![
            draft.pass(None, &[part(0, 0, a)]),
            draft.pass(None, &[part(1, 0, b)]),
            draft.pass(None, &[part(0, a, aa - a), part(1, b, bb - b)]),
        ];
        // The first session is ahead; then both in one batch, then each alone.
        passes.push(draft.pass(None, &[part(0, aa, 1)]));
        let left = n_tokens - aa - 1;
        for k in 0..left {
            let both = [part(0, aa + 1 + k, 1), part(1, bb + k, 1)];
            if k % 3 == 2 {
                passes.extend(both.map(|one| draft.pass(None, &[one])));
            } else {
                passes.push(draft.pass(None, &both));
            }
        }
        // Back into the first chunk, and on with other tokens, in a batch with the answer of the other session.
        let n_keep = a - 1;
        let other = |start, n| Part { slot: 0, start, n, take: 1 };
        let chunk = other(n_keep, (n_tokens - n_keep) / 2);
        if can_rewind {
            passes.push(draft.pass(Some(Rewind { slot: 0, n_keep }), &[chunk]));
        } else {
            passes.push(draft.pass(Some(Rewind { slot: 0, n_keep: 0 }), &[part(0, 0, n_keep)]));
            passes.push(draft.pass(None, &[chunk]));
        }
        let rest = bb + left..n_tokens;
        for (k, b) in (chunk.start + chunk.n..n_tokens).zip(rest.chain(std::iter::repeat(n_tokens))) {
            let both = [other(k, 1), part(1, b, 1)];
            passes.push(draft.pass(None, if b < n_tokens { &both } else { &both[..1] }));
        }
        Self { passes }
    }

    /// Two texts, the longer one of `n_tokens`.
    pub(super) fn of_texts(n_tokens: u32, n_vocab: u32, seed: u64) -> Self {
        let draft = Draft { n_vocab, seed };
        let texts = |take| {
            [Part { slot: 0, start: 0, n: n_tokens, take }, Part { slot: 1, start: 0, n: n_tokens * 2 / 3, take }]
        };
        let [long, short] = texts(0);
        let clear = |slot| Some(Rewind { slot, n_keep: 0 });
        let [other_long, other_short] = texts(1);
        let passes = vec![
            draft.pass(None, &[long]),
            draft.pass(clear(0), &[short]),
            draft.pass(clear(1), &[other_short]),
            draft.pass(clear(1), &[other_long, short]),
        ];
        Self { passes }
    }

    /// Rows of the largest batch.
    pub(super) fn max_rows(&self) -> u32 {
        self.passes.iter().map(|pass| pass.rows.len() as u32).max().unwrap_or(0)
    }
}

struct Draft {
    n_vocab: u32,
    seed: u64,
}

impl Draft {
    fn pass(&self, rewind: Option<Rewind>, parts: &[Part]) -> Pass {
        let rows = parts.iter().flat_map(|part| {
            let end = part.start + part.n;
            (part.start..end).map(move |position| Row { slot: part.slot, position, output: position + 1 == end })
        });
        let tokens = parts.iter().flat_map(|part| (part.start..part.start + part.n).map(|at| self.token(*part, at)));
        Pass { rewind, rows: rows.collect(), tokens: tokens.collect() }
    }

    /// SplitMix64 (Steele, Lea and Flood, 2014) of what the token is for.
    fn token(&self, part: Part, position: u32) -> Token {
        let place = u64::from(position) << 8 | u64::from(part.slot) << 4 | part.take;
        let mut z = (self.seed ^ place.wrapping_mul(0xd134_2543_de82_ef95)).wrapping_add(0x9e37_79b9_7f4a_7c15);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) % u64::from(self.n_vocab.max(1))) as Token
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Plays a script by the rules of a stage; the lengths of both sessions at the end.
    fn check(script: &Script, n_tokens: u32, is_text: bool) -> [u32; 2] {
        let mut lens = [0u32; 2];
        for pass in &script.passes {
            if let Some(Rewind { slot, n_keep }) = pass.rewind {
                assert!(n_keep <= lens[slot as usize]);
                lens[slot as usize] = n_keep;
            }
            assert_eq!(pass.rows.len(), pass.tokens.len());
            assert!(pass.rows.is_sorted_by_key(|row| row.slot));
            for slot in [0, 1] {
                let rows: Vec<&Row> = pass.rows.iter().filter(|row| row.slot == slot).collect();
                for row in &rows {
                    assert_eq!(row.position, lens[slot as usize]);
                    lens[slot as usize] += 1;
                }
                assert_eq!(rows.iter().filter(|row| row.output).count(), usize::from(!rows.is_empty()));
                assert!(rows.last().is_none_or(|row| row.output));
                if is_text && !rows.is_empty() {
                    lens[slot as usize] = 0;
                }
            }
            assert!(lens.iter().all(|len| *len <= n_tokens));
            assert!(pass.tokens.iter().all(|token| (0..50).contains(token)));
        }
        lens
    }

    #[test]
    fn sessions_go_on_where_they_are() {
        for n_tokens in [8, 16, 17, 48, 1000] {
            for can_rewind in [true, false] {
                let script = Script::of_sessions(n_tokens, 50, can_rewind, 1);
                assert_eq!(check(&script, n_tokens, false)[0], n_tokens);
                let goes_back = script.passes.iter().filter_map(|pass| pass.rewind).collect::<Vec<_>>();
                assert_eq!(goes_back.len(), 1);
                assert_eq!(goes_back[0].n_keep > 0, can_rewind);
                let is_single = |pass: &&Pass| pass.rows.len() == 2 && pass.rows[0].slot != pass.rows[1].slot;
                assert!(n_tokens < 16 || script.passes.iter().any(|pass| is_single(&pass)), "no batch of both");
            }
        }
    }

    #[test]
    fn texts_are_computed_at_once() {
        for n_tokens in [3, 16, 48] {
            check(&Script::of_texts(n_tokens, 50, 1), n_tokens, true);
        }
    }

    #[test]
    fn tokens_follow_from_the_seed() {
        let script = |seed| Script::of_sessions(48, 50_000, true, seed);
        assert_eq!(script(1), script(1));
        assert_ne!(script(1).passes[0].tokens, script(2).passes[0].tokens);
    }
}
