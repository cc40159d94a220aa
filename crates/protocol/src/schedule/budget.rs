//! How many prompt rows a pass may carry, and over how many passes the sessions that decode are dealt.
//!
//! Two things bound prompt rows. While others decode, a pass with a chunk takes longer than one without, and
//! everybody's next token comes that much later: the chunk may make a pass [`SLOWDOWN`] times as long, no more, and
//! the first chunks behind passes without any are shorter, since they pile up in the first stage. While nobody
//! decodes, the chunks of one prompt follow each other through the stages: few long ones leave stages idle at the
//! beginning and the end, many short ones read the weights too often.
//!
//! Sessions that decode are dealt over as many passes as give most tokens in a time: with few passes the rows of each
//! are computed together, which may cost less; with many all stages have something to do.
//!
//! All of it comes from measured times: of the busiest stage and of all, for decode rows by their number, and for a row
//! of a chunk.

/// How much longer than without it a pass may take because of a chunk, decode rows included. A stream whose tokens
/// came every `t` then waits about `SLOWDOWN * t`. With noise, and because a chunk takes longer the more tokens are
/// before it while the mean is of earlier ones, that stays below four times, which people still see as a steady flow.
const SLOWDOWN: f32 = 3.1;

/// What the first chunks may be of those that follow them. While passes come back every `t`, others that take `x` are
/// sent every `t`, so with `n` stages the last of `n` waits `(n - 1) * (x - t)` before the first stage. With chunks
/// that take `a * t` a stream's longest gap is `1 + a * (2 - 1 / n)` times `t * n`. If the first round has `f * a` and
/// the second `a`, it is `1 + 2 * f * a` in the first and `1 + a + (1 - f) * a` in the second, for large `n`: least for
/// two thirds, and then still below four.
const FIRST_CHUNKS: f32 = 2.0 / 3.0;

/// Fewest rows of a chunk that is cut: below it the weights are read so often that the prompt takes noticeably longer
/// (measured with 4-bit weights on a CPU: 16 rows 20 % longer than 32, 32 as fast as 256).
const MIN_CHUNK: u32 = 16;

/// Rows of a chunk beside decode rows while nothing was measured yet.
const UNMEASURED_CHUNK: u32 = 32;

/// Rows whose computing takes as long as reading the weights once, while nothing was measured: on CPUs about six were
/// seen, on graphics cards more than a hundred.
const UNMEASURED_ROWS_PER_READ: f32 = 16.0;

/// Weight of a new measurement in the running mean of decode rows.
const WEIGHT: f32 = 0.2;

/// The same for rows of chunks, which take longer and longer as the prompt goes on, so that an old mean says little.
const CHUNK_WEIGHT: f32 = 0.5;

/// Chunks shorter than this say little about the time of a row.
const MIN_TELLING_CHUNK: u32 = 8;

/// How much better another number of passes must be than one per stage: measured times waver by some percent.
const CLEARLY_BETTER: f32 = 0.95;

/// Most passes for each stage: with four sessions each may have its own; more are never quicker than larger passes, as
/// kernels compute from four rows on together.
const MOST_PER_STAGE: u32 = 4;

/// Measured times of a ring, in microseconds.
#[derive(Debug, Default)]
pub(super) struct Budget {
    /// Of a pass with `i + 1` decode rows and nothing else.
    decode: Vec<Option<Decode>>,
    /// Of one row of a chunk, in the busiest stage.
    row_us: Option<f32>,
}

/// What a pass of decode rows takes.
#[derive(Debug, Clone, Copy)]
struct Decode {
    busiest_us: f32,
    all_us: f32,
}

impl Budget {
    /// Takes in that a pass with so many rows took each stage so long.
    pub(super) fn observe(&mut self, n_decode: u32, n_chunk: u32, stage_us: &[u32]) {
        let busiest_us = stage_us.iter().copied().max().unwrap_or(0) as f32;
        if n_chunk == 0 && n_decode > 0 {
            let at = n_decode as usize - 1;
            if self.decode.len() <= at {
                self.decode.resize(at + 1, None);
            }
            let all_us = stage_us.iter().map(|us| *us as f32).sum();
            let seen = self.decode[at].unwrap_or(Decode { busiest_us, all_us });
            let mixed = |old: f32, new: f32| old + WEIGHT * (new - old);
            let busiest_us = mixed(seen.busiest_us, busiest_us);
            self.decode[at] = Some(Decode { busiest_us, all_us: mixed(seen.all_us, all_us) });
        } else if n_chunk >= MIN_TELLING_CHUNK {
            let chunk_us = busiest_us - self.decode(n_decode).map_or(0.0, |decode| decode.busiest_us);
            let us = chunk_us.max(busiest_us / 4.0) / n_chunk as f32;
            self.row_us = Some(self.row_us.map_or(us, |old| old + CHUNK_WEIGHT * (us - old)));
        }
    }

    /// Times of a pass with so many decode rows: as measured, else of the nearest number that was; with more rows than
    /// were ever measured, half of what they add is taken to cost as much as those before.
    fn decode(&self, n_rows: u32) -> Option<Decode> {
        let at = (n_rows as usize).checked_sub(1)?;
        let measured = self.decode.iter().enumerate().filter_map(|(i, times)| times.map(|times| (i, times)));
        let (nearest, times) = measured.min_by_key(|(i, _)| i.abs_diff(at))?;
        let more = at.saturating_sub(nearest) as f32 / (nearest + 1) as f32;
        let factor = if at >= self.decode.len() { 1.0 + more / 2.0 } else { 1.0 };
        Some(Decode { busiest_us: times.busiest_us * factor, all_us: times.all_us * factor })
    }

    /// Over how many passes `n_sessions` that decode are dealt. In one round each gets a token; with `p` passes of `r`
    /// rows it takes as long as a pass needs for all stages, or as the busiest stage for all passes. A number of rows
    /// that was never tried is guessed from its neighbours, and tried if it might be better; one pass per stage is
    /// always tried.
    ///
    /// There may be more passes than stages: where two rows cost twice as much as one, nobody gains by sharing a pass.
    pub(super) fn passes(&self, n_sessions: u32, n_stages: u32) -> u32 {
        let usual = n_stages.min(n_sessions).max(1);
        let is_measured = |n_rows: u32| self.decode.get(n_rows as usize - 1).is_some_and(Option::is_some);
        if n_sessions == 0 || !is_measured(n_sessions.div_ceil(usual)) {
            return usual;
        }
        let round_us = |n_passes: u32| {
            let times = self.decode(n_sessions.div_ceil(n_passes));
            times.map_or(0.0, |times| times.all_us.max(n_passes as f32 * times.busiest_us))
        };
        let most = n_sessions.min(MOST_PER_STAGE * n_stages.max(1));
        let best = (1..=most).min_by(|a, b| round_us(*a).total_cmp(&round_us(*b))).unwrap_or(usual);
        if round_us(best) < round_us(usual) * CLEARLY_BETTER { best } else { usual }
    }

    /// Prompt rows for a pass with `n_decode` decode rows, while somebody decodes. It takes the place of one that had
    /// `chunk_back` prompt rows.
    pub(super) fn beside_decode(&self, n_decode: u32, chunk_back: u32, n_stages: u32, most: u32) -> u32 {
        let (Some(decode), Some(row_us)) = (self.decode(n_decode.max(1)), self.row_us) else {
            return UNMEASURED_CHUNK.min(most);
        };
        let rows = (SLOWDOWN - 1.0) * decode.busiest_us / row_us.max(f32::MIN_POSITIVE);
        // Kernels take rows in blocks of eight or sixteen.
        let in_blocks = |rows: f32| ((rows / 8.0) as u32).saturating_mul(8).clamp(MIN_CHUNK.min(most), most);
        match in_blocks(rows) {
            full if n_stages > 1 && chunk_back < full / 2 => in_blocks(full as f32 * FIRST_CHUNKS),
            full => full,
        }
    }

    /// Prompt rows for a pass while nobody decodes: those that bring a prompt of `n_prompt` tokens through `n_stages`
    /// stages soonest. With chunks of `c` rows that takes about `(n_prompt / c + n_stages - 1) * (read + c * row)`,
    /// which is least at `c = sqrt(n_prompt * read / ((n_stages - 1) * row))`.
    pub(super) fn alone(&self, n_prompt: u32, n_stages: u32, most: u32) -> u32 {
        if n_stages < 2 {
            return most;
        }
        let rows_per_read = match (self.decode(1), self.row_us) {
            (Some(read), Some(row_us)) => read.busiest_us / row_us.max(f32::MIN_POSITIVE),
            _ => UNMEASURED_ROWS_PER_READ,
        };
        let rows = (n_prompt as f32 * rows_per_read / (n_stages - 1) as f32).sqrt();
        let blocks = (rows / 16.0).ceil() as u32;
        blocks.saturating_mul(16).clamp((2 * MIN_CHUNK).min(most), most)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_measurements_chunks_are_careful() {
        let budget = Budget::default();
        assert_eq!(budget.beside_decode(3, 0, 2, 256), 32);
        assert_eq!(budget.alone(512, 1, 256), 256);
        assert_eq!(budget.alone(512, 2, 256), 96);
        assert_eq!((budget.beside_decode(1, 0, 2, 8), budget.alone(512, 2, 8)), (8, 8));
    }

    #[test]
    fn a_chunk_takes_twice_as_long_as_the_decode_rows_beside_it() {
        let mut budget = Budget::default();
        budget.observe(2, 0, &[75_000]);
        budget.observe(2, 32, &[75_000 + 32 * 6_500]);
        assert_eq!([0, 16, 24].map(|back| budget.beside_decode(2, back, 2, 256)), [16, 24, 24]);
        assert_eq!(budget.beside_decode(2, 0, 1, 256), 24, "nothing piles up before a single stage");
        for _ in 0..50 {
            budget.observe(2, 0, &[10_000]);
            budget.observe(2, 256, &[10_000 + 256 * 20]);
        }
        assert_eq!([0, 168].map(|back| budget.beside_decode(2, back, 2, 256)), [168, 256]);
    }

    #[test]
    fn a_lone_prompt_is_cut_by_the_square_root() {
        let mut budget = Budget::default();
        budget.observe(1, 0, &[37_000]);
        budget.observe(0, 64, &[64 * 6_500]);
        assert_eq!([64, 512, 1500].map(|n| budget.alone(n, 2, 256)), [32, 64, 96]);
        assert_eq!(budget.alone(1500, 8, 256), 48);
    }

    #[test]
    fn the_nearest_number_of_rows_stands_in_for_an_unmeasured_one() {
        let mut budget = Budget::default();
        budget.observe(4, 0, &[100]);
        budget.observe(1, 0, &[40]);
        let times = |n| budget.decode(n).map(|times| times.busiest_us);
        assert_eq!([1, 2, 3, 8].map(times), [40.0, 40.0, 100.0, 150.0].map(Some));
        assert_eq!(times(0), None);
    }

    /// Tries what the budget says until it says the same again.
    fn settles(n_sessions: u32, stage_us: impl Fn(u32) -> Vec<u32>) -> u32 {
        let mut budget = Budget::default();
        let n_stages = stage_us(1).len() as u32;
        let mut n_passes = budget.passes(n_sessions, n_stages);
        assert_eq!(n_passes, n_stages.min(n_sessions), "one per stage until something is known");
        // The first of them was alone for a while.
        budget.observe(1, 0, &stage_us(1));
        for _ in 0..20 {
            let n_rows = n_sessions.div_ceil(n_passes);
            budget.observe(n_rows, 0, &stage_us(n_rows));
            n_passes = budget.passes(n_sessions, n_stages);
        }
        n_passes
    }

    #[test]
    fn sessions_are_dealt_over_as_many_passes_as_are_quickest() {
        // Two and three rows cost one by one, four as much as two: measured with 4-bit weights on a CPU.
        let cpu = |n_rows: u32| match n_rows {
            1 => vec![37, 36],
            2 | 3 => vec![70, 92],
            4 => vec![75, 91],
            _ => vec![110, 120],
        };
        assert_eq!([1, 2, 3, 4, 8, 16].map(|n| settles(n, cpu)), [1, 2, 3, 4, 2, 2]);
        // Where rows cost nothing, it is all the same, and all stages have something to do.
        assert_eq!(settles(8, |_| vec![10, 10, 10]), 3);
        // One stage that takes ten times as long as the others has nobody to wait for.
        assert_eq!(settles(6, |_| vec![10, 100, 10]), 1);
        assert_eq!(settles(6, |n| vec![10, 100 * n, 10]), 3);
    }
}
