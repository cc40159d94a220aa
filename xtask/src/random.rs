//! Numbers that look random and come from a seed.

/// SplitMix64 (Steele, Lea and Flood, 2014).
#[derive(Debug, Clone)]
pub struct Random(u64);

impl Random {
    /// All numbers that follow from `seed`.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// Any number.
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number in `from..to`; `from` if there is none.
    pub fn within(&mut self, from: u64, to: u64) -> u64 {
        from + self.next() % to.saturating_sub(from).max(1)
    }

    /// One of `all`, which has some.
    pub fn one_of<'a, T>(&mut self, all: &'a [T]) -> &'a T {
        &all[self.within(0, all.len() as u64) as usize]
    }

    /// Nearly normal with deviation 1: the sum of four uniform numbers of variance 1/12 each, scaled.
    pub fn normal(&mut self) -> f32 {
        let bits = self.next();
        let sum: f32 = (0..4).map(|k| f32::from((bits >> (16 * k)) as u16) / 65_536.0).sum();
        (sum - 2.0) * 3f32.sqrt()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_follow_from_the_seed_and_stay_in_their_range() {
        let draw = |seed| {
            let mut random = Random::new(seed);
            (0..100).map(|_| random.within(3, 9)).collect::<Vec<_>>()
        };
        assert_eq!(draw(1), draw(1));
        assert_ne!(draw(1), draw(2));
        assert!((3..9).all(|n| draw(1).contains(&n)) && draw(1).iter().all(|n| (3..9).contains(n)));
        assert_eq!(Random::new(1).within(5, 5), 5);
    }
}
