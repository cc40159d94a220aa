//! What is still to be fetched, and which source fetches what; without I/O.
//!
//! Sources take blocks as fast as they deliver them, so the fastest brings most. A source gets a block of a tensor that
//! few have, so that those who have much are left for what only they have. Work of one that is lost goes back. When
//! nothing is left that nobody fetches, whoever is idle fetches what another one takes long for, and the first to bring
//! it counts.
//!
//! Whoever drives it owns links and files, and names sources by [`SourceId`].

use std::time::{Duration, Instant};

use super::tree::{block_range, n_blocks};

/// What is fetched already is asked of another source too once it takes so long: many times what a block takes on a
/// LAN.
pub const LONG: Duration = Duration::from_millis(400);

/// Sources that fetch the same at most, but for those that have been at it for very long.
const MAX_TAKERS: usize = 2;

/// A source; never used twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SourceId(usize);

/// What a source is to fetch next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Work {
    /// The tree of a tensor.
    Tree(usize),
    /// A block of a tensor whose tree is known.
    Block(usize, usize),
}

/// What a block that came is good for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Arrived {
    /// It was here already.
    Again,
    /// More of the tensor is missing.
    First,
    /// It was the last one of its tensor.
    Last,
}

/// Something that is fetched by those who took it.
#[derive(Debug, Default)]
struct Takers(Vec<(SourceId, Instant)>);

impl Takers {
    fn may_join(&self, source: SourceId, now: Instant) -> Option<Instant> {
        let since = self.0.iter().map(|(_, since)| *since).max()?;
        let is_young = |since: Instant| now.saturating_duration_since(since) < 10 * LONG;
        let n_young = self.0.iter().filter(|(_, since)| is_young(*since)).count();
        let is_new = n_young < MAX_TAKERS && self.0.iter().all(|(taker, _)| *taker != source);
        (is_new && now.saturating_duration_since(since) >= LONG).then_some(since)
    }
}

#[derive(Debug)]
enum Piece {
    Missing(Takers),
    Here,
}

impl Piece {
    fn new() -> Self {
        Self::Missing(Takers::default())
    }

    fn is_untaken(&self) -> bool {
        matches!(self, Self::Missing(takers) if takers.0.is_empty())
    }

    fn may_join(&self, source: SourceId, now: Instant) -> Option<Instant> {
        if let Self::Missing(takers) = self { takers.may_join(source, now) } else { None }
    }

    fn take(&mut self, source: SourceId, now: Instant) {
        if let Self::Missing(takers) = self {
            takers.0.push((source, now));
        }
    }

    fn give_back(&mut self, source: SourceId) {
        if let Self::Missing(takers) = self {
            takers.0.retain(|(taker, _)| *taker != source);
        }
    }
}

#[derive(Debug)]
struct Tensor {
    n_bytes: u64,
    tree: Piece,
    blocks: Vec<Piece>,
    /// Blocks that are not here.
    n_missing: usize,
    /// Every block before it is taken or here.
    first_untaken: usize,
}

/// What is known of a source.
#[derive(Debug)]
enum Standing {
    /// Not asked yet, and it may answer.
    Hoped,
    /// By tensor.
    Has(Vec<bool>),
    Gone,
}

#[derive(Debug)]
struct Source {
    standing: Standing,
    /// Whether it knows trees.
    knows_trees: bool,
}

impl Source {
    fn has(&self, tensor: usize) -> bool {
        matches!(&self.standing, Standing::Has(has) if has.get(tensor).copied().unwrap_or(false))
    }
}

/// What is to be fetched. See the head of this file.
#[derive(Debug)]
pub struct Pool {
    tensors: Vec<Tensor>,
    sources: Vec<Source>,
    /// The tensor that is begun with. Nodes that fetch the same begin with different ones, and then have something to
    /// give each other.
    begin: usize,
}

impl Pool {
    /// Tensors of so many bytes, of which none is here.
    pub fn new(n_bytes: impl Iterator<Item = u64>, begin: u64) -> Self {
        let tensors: Vec<Tensor> = n_bytes
            .map(|n_bytes| {
                let n_missing = n_blocks(n_bytes);
                let tree = if n_missing == 1 { Piece::Here } else { Piece::new() };
                let blocks = (0..n_missing).map(|_| Piece::new()).collect();
                Tensor { n_bytes, tree, blocks, n_missing, first_untaken: 0 }
            })
            .collect();
        let begin = (begin % tensors.len().max(1) as u64) as usize;
        Self { tensors, sources: Vec::new(), begin }
    }

    /// A source that may have something; whether it can be asked for trees.
    pub fn join(&mut self, knows_trees: bool) -> SourceId {
        self.sources.push(Source { standing: Standing::Hoped, knows_trees });
        SourceId(self.sources.len() - 1)
    }

    /// The source says which tensors it has, of those in `asked`.
    pub fn tell(&mut self, source: SourceId, asked: &[usize], has: &[bool]) {
        let n_tensors = self.tensors.len();
        let standing = &mut self.sources[source.0].standing;
        if !matches!(standing, Standing::Has(_)) {
            *standing = Standing::Has(vec![false; n_tensors]);
        }
        if let Standing::Has(all) = standing {
            asked.iter().zip(has).for_each(|(tensor, has)| all[*tensor] = *has);
        }
    }

    /// The source cannot be asked at the moment. What it was to fetch is for others; `is_gone` if it is not hoped for.
    pub fn lose(&mut self, source: SourceId, is_gone: bool) {
        self.sources[source.0].standing = if is_gone { Standing::Gone } else { Standing::Hoped };
        for tensor in 0..self.tensors.len() {
            self.give_back(source, tensor);
        }
    }

    /// The source does not have a tensor after all.
    pub fn lacks(&mut self, source: SourceId, tensor: usize) {
        self.tell(source, &[tensor], &[false]);
        self.give_back(source, tensor);
    }

    fn give_back(&mut self, source: SourceId, tensor: usize) {
        let tensor = &mut self.tensors[tensor];
        tensor.tree.give_back(source);
        tensor.blocks.iter_mut().for_each(|block| block.give_back(source));
        tensor.first_untaken = 0;
    }

    /// What a source is to fetch next; `None` if there is nothing for it now.
    pub fn take(&mut self, source: SourceId, now: Instant) -> Option<Work> {
        let rarity = |tensor: usize| self.sources.iter().filter(|source| source.has(tensor)).count();
        let untaken = self.order().filter(|tensor| self.untaken(source, *tensor));
        let rarest = untaken.min_by_key(|tensor| rarity(*tensor));
        let work = match rarest {
            Some(tensor) => self.first_of(tensor),
            None => self.slowest(source, now)?,
        };
        match work {
            Work::Tree(tensor) => self.tensors[tensor].tree.take(source, now),
            Work::Block(tensor, block) => self.tensors[tensor].blocks[block].take(source, now),
        }
        Some(work)
    }

    fn order(&self) -> impl Iterator<Item = usize> {
        (self.begin..self.tensors.len()).chain(0..self.begin)
    }

    /// Whether the source has something of a tensor that nobody fetches.
    fn untaken(&self, source: SourceId, tensor: usize) -> bool {
        let from = &self.sources[source.0];
        let it = &self.tensors[tensor];
        from.has(tensor)
            && match &it.tree {
                Piece::Here => it.n_missing > 0 && it.next_untaken().is_some(),
                tree => from.knows_trees && tree.is_untaken(),
            }
    }

    fn first_of(&mut self, tensor: usize) -> Work {
        let it = &mut self.tensors[tensor];
        if !matches!(it.tree, Piece::Here) {
            return Work::Tree(tensor);
        }
        it.first_untaken = it.next_untaken().unwrap_or(0);
        Work::Block(tensor, it.first_untaken)
    }

    /// Takes a certain block too, if nobody fetches it.
    pub fn take_block(&mut self, source: SourceId, tensor: usize, block: usize, now: Instant) -> bool {
        let piece = self.tensors[tensor].blocks.get_mut(block).filter(|piece| piece.is_untaken());
        piece.map(|piece| piece.take(source, now)).is_some()
    }

    /// What others have been fetching for longest.
    fn slowest(&self, source: SourceId, now: Instant) -> Option<Work> {
        let from = &self.sources[source.0];
        let of_tensor = |tensor: usize| {
            let it = &self.tensors[tensor];
            let tree = it.tree.may_join(source, now).filter(|_| from.knows_trees);
            let tree = tree.map(|since| (since, Work::Tree(tensor)));
            let blocks = it.blocks.iter().enumerate();
            let blocks = blocks.filter_map(move |(i, b)| Some((b.may_join(source, now)?, Work::Block(tensor, i))));
            tree.into_iter().chain(blocks)
        };
        let missing = (0..self.tensors.len()).filter(|t| self.tensors[*t].n_missing > 0 && from.has(*t));
        missing.flat_map(of_tensor).min_by_key(|(since, _)| *since).map(|(_, work)| work)
    }

    /// The tree of a tensor is known, and these blocks are here from before. True if that is all of it.
    pub fn tree_known(&mut self, tensor: usize, here: &[usize]) -> bool {
        let it = &mut self.tensors[tensor];
        it.tree = Piece::Here;
        for block in here {
            it.arrived(*block);
        }
        it.n_missing == 0
    }

    /// A block is here.
    pub fn arrived(&mut self, tensor: usize, block: usize) -> Arrived {
        let it = &mut self.tensors[tensor];
        match (it.arrived(block), it.n_missing) {
            (false, _) => Arrived::Again,
            (true, 0) => Arrived::Last,
            (true, _) => Arrived::First,
        }
    }

    /// Tensors of which something is missing.
    pub fn missing(&self) -> Vec<usize> {
        (0..self.tensors.len()).filter(|tensor| self.tensors[*tensor].n_missing > 0).collect()
    }

    /// Whether nothing is missing.
    pub fn is_done(&self) -> bool {
        self.tensors.iter().all(|tensor| tensor.n_missing == 0)
    }

    /// Bytes that are missing.
    pub fn n_missing_bytes(&self) -> u64 {
        let missing = |tensor: &Tensor| {
            let blocks = tensor.blocks.iter().enumerate().filter(|(_, block)| !matches!(block, Piece::Here));
            blocks.map(|(i, _)| block_range(tensor.n_bytes, i).1 as u64).sum::<u64>()
        };
        self.tensors.iter().map(missing).sum()
    }

    /// A tensor that nobody can bring, or is hoped to.
    pub fn hopeless(&self) -> Option<usize> {
        if self.is_anybody_hoped() {
            return None;
        }
        let can_come = |tensor: &usize| self.sources.iter().any(|source| self.can_bring(source, *tensor));
        self.missing().into_iter().find(|tensor| !can_come(tensor))
    }

    /// Whether somebody was not asked yet and may have what is missing.
    pub fn is_anybody_hoped(&self) -> bool {
        self.sources.iter().any(|source| matches!(source.standing, Standing::Hoped))
    }

    /// Whether a source has something missing that no other one can bring.
    pub fn is_alone(&self, source: SourceId) -> bool {
        let others = |tensor: usize| {
            let mut others = self.sources.iter().enumerate().filter(|(at, _)| *at != source.0);
            others.any(|(_, other)| self.can_bring(other, tensor))
        };
        let own = &self.sources[source.0];
        self.missing().into_iter().any(|tensor| self.can_bring(own, tensor) && !others(tensor))
    }

    /// Whether a source has a tensor, and the tree is known or can be had from somebody.
    fn can_bring(&self, source: &Source, tensor: usize) -> bool {
        let knows_tree = |source: &Source| source.knows_trees && source.has(tensor);
        let has_tree = matches!(self.tensors[tensor].tree, Piece::Here);
        source.has(tensor) && (has_tree || self.sources.iter().any(knows_tree))
    }
}

impl Tensor {
    fn next_untaken(&self) -> Option<usize> {
        (self.first_untaken..self.blocks.len()).find(|block| self.blocks[*block].is_untaken())
    }

    /// False if it was here before.
    fn arrived(&mut self, block: usize) -> bool {
        let is_new = matches!(self.blocks.get(block), Some(Piece::Missing(_)));
        if is_new {
            self.blocks[block] = Piece::Here;
            self.n_missing -= 1;
        }
        is_new
    }
}

#[cfg(test)]
mod tests {
    use brigade_protocol::weights::BLOCK_BYTES;
    use proptest::prelude::*;

    use super::*;

    /// Tensors of so many blocks.
    fn pool(n_blocks: &[u64]) -> Pool {
        Pool::new(n_blocks.iter().map(|n| n * BLOCK_BYTES), 0)
    }

    fn source(pool: &mut Pool, has: &[bool]) -> SourceId {
        let source = pool.join(true);
        let asked: Vec<usize> = (0..has.len()).collect();
        pool.tell(source, &asked, has);
        source
    }

    #[test]
    fn the_tree_comes_first_and_then_each_block_once() {
        let (mut pool, now) = (pool(&[3, 1]), Instant::now());
        let a = source(&mut pool, &[true, true]);
        let b = source(&mut pool, &[true, false]);
        // The small one is rarer, and needs no tree.
        assert_eq!(pool.take(a, now), Some(Work::Block(1, 0)));
        assert_eq!(pool.take(b, now), Some(Work::Tree(0)));
        assert_eq!(pool.take(a, now), None);
        assert!(!pool.tree_known(0, &[1]), "a block was here from before");
        assert_eq!((pool.take(a, now), pool.take(b, now)), (Some(Work::Block(0, 0)), Some(Work::Block(0, 2))));
        assert_eq!(pool.n_missing_bytes(), 3 * BLOCK_BYTES);
        assert_eq!((pool.arrived(1, 0), pool.arrived(0, 0)), (Arrived::Last, Arrived::First));
        assert_eq!((pool.arrived(0, 2), pool.arrived(0, 2)), (Arrived::Last, Arrived::Again));
        assert!(pool.is_done());
    }

    #[test]
    fn what_a_lost_source_was_to_bring_is_for_others() {
        let (mut pool, now) = (pool(&[1, 1]), Instant::now());
        let [a, b] = [(); 2].map(|()| source(&mut pool, &[true, true]));
        assert_eq!((pool.take(a, now), pool.take(b, now)), (Some(Work::Block(0, 0)), Some(Work::Block(1, 0))));
        pool.lose(a, true);
        assert_eq!((pool.take(b, now), pool.take(a, now)), (Some(Work::Block(0, 0)), None));
        pool.lacks(b, 0);
        assert_eq!(pool.hopeless(), Some(0));
        pool.lose(b, false);
        assert_eq!(pool.hopeless(), None);
    }

    #[test]
    fn whoever_is_idle_helps_with_what_takes_long() {
        let (mut pool, now) = (pool(&[1, 1]), Instant::now());
        let [a, b, c] = [(); 3].map(|()| source(&mut pool, &[true, true]));
        pool.take(a, now);
        pool.take(a, now + Duration::from_millis(1));
        assert_eq!(pool.take(b, now + LONG / 2), None);
        let later = now + 2 * LONG;
        assert_eq!((pool.take(b, later), pool.take(b, later)), (Some(Work::Block(0, 0)), Some(Work::Block(1, 0))));
        assert_eq!((pool.take(c, later + 2 * LONG), pool.take(a, later + 2 * LONG)), (None, None), "two are enough");
        let much_later = later + 10 * LONG;
        assert_eq!(pool.take(c, much_later), Some(Work::Block(0, 0)), "unless neither of them comes to an end");
    }

    #[test]
    fn who_fetches_the_same_begins_elsewhere() {
        let first = |begin| {
            let mut pool = Pool::new([5, 5, 5].into_iter(), begin);
            let a = source(&mut pool, &[true; 3]);
            pool.take(a, Instant::now())
        };
        assert_eq!((first(0), first(7)), (Some(Work::Block(0, 0)), Some(Work::Block(1, 0))));
    }

    #[test]
    fn a_source_without_trees_waits_for_them() {
        let (mut pool, now) = (pool(&[2]), Instant::now());
        let hub = pool.join(false);
        pool.tell(hub, &[0], &[true]);
        assert_eq!((pool.take(hub, now), pool.is_alone(hub)), (None, false));
        assert_eq!(pool.hopeless(), Some(0), "nobody knows its tree");
        let a = source(&mut pool, &[true]);
        assert_eq!((pool.take(a, now), pool.is_alone(hub), pool.hopeless()), (Some(Work::Tree(0)), false, None));
        pool.tree_known(0, &[]);
        assert_eq!(pool.take(hub, now), Some(Work::Block(0, 0)));
        pool.lose(a, true);
        assert_eq!((pool.is_alone(hub), pool.hopeless()), (true, None));
    }

    proptest! {
        /// Sources that come, go, refuse and are slow: all comes in the end as long as one stays that has it.
        #[test]
        fn everything_comes(
            sizes in prop::collection::vec(1u64..4, 1..6),
            events in prop::collection::vec(0u8..6, 0..60),
        ) {
            let mut pool = pool(&sizes);
            let all = vec![true; sizes.len()];
            let steady = source(&mut pool, &all);
            let mut other = source(&mut pool, &all);
            let (mut now, mut late) = (Instant::now(), Vec::new());
            for event in events {
                now += LONG / 3;
                match event {
                    0 => {
                        pool.lose(other, true);
                        late.clear();
                        other = source(&mut pool, &all);
                    }
                    1 => late.extend(pool.take(other, now)),
                    2 => pool.lacks(other, 0),
                    3 => late.pop().into_iter().for_each(|work| finish(&mut pool, work)),
                    _ => pool.take(steady, now).into_iter().for_each(|work| finish(&mut pool, work)),
                }
            }
            for _ in 0..1000 {
                now += LONG;
                pool.take(steady, now).into_iter().for_each(|work| finish(&mut pool, work));
            }
            prop_assert!(pool.is_done() && pool.missing().is_empty() && pool.n_missing_bytes() == 0);
        }
    }

    fn finish(pool: &mut Pool, work: Work) {
        match work {
            Work::Tree(tensor) => _ = pool.tree_known(tensor, &[]),
            Work::Block(tensor, block) => _ = pool.arrived(tensor, block),
        }
    }
}
