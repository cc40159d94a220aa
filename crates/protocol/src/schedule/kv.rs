//! Which tokens the KV caches of a ring hold: in slots, and in images outside of memory.
//!
//! All stages hold the same, since they take the same steps in the same order; so one book is enough. A slot belongs to
//! a running session, or keeps what an ended one left until somebody else needs the slot: that is the prefix cache.
//! What is pushed out of a slot may be saved as an image.
//!
//! Tokens were computed in one of two ways, whose bits differ (see [`Kept::n_chunked`]); an exact cache tells them
//! apart.

use brigade_base::{ImageId, SessionId, TenantId, Token};
use serde::{Deserialize, Serialize};

/// Fewest tokens that are worth taking over from elsewhere: below that, copying costs as much as computing.
pub(super) const MIN_SHARED: u32 = 16;

/// Fewest tokens that are worth saving: reading and writing files takes as long as computing fewer.
const MIN_IMAGE: u32 = 64;

/// Whose cached tokens a session may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum PrefixCache {
    /// Nobody's.
    Off,
    /// Only tokens that were computed in the same way as the session itself would compute them: of prompts. Answers
    /// have the same bits as without a cache.
    Exact,
    /// All tokens of the same tenant, answers too, so that no turn of a conversation is computed twice. An answer's
    /// tokens were computed one by one, where a prompt's are computed many at once; in the last bits these differ.
    #[default]
    Full,
}

/// Tokens that a slot or an image holds.
#[derive(Debug, Clone, Default)]
pub(super) struct Kept {
    pub(super) tokens: Vec<Token>,
    /// How many of the first tokens were computed in chunks of two and more rows; the others one by one.
    pub(super) n_chunked: u32,
    /// The stages hold more tokens behind these, left by somebody else. Such a slot cannot be saved, since a stage
    /// saves all that it holds.
    pub(super) has_surplus: bool,
    pub(super) tenant: TenantId,
    /// Whose tokens they were last.
    pub(super) owner: SessionId,
    /// Rises with each use; the lowest goes first.
    pub(super) used: u64,
}

/// What a session looks for.
#[derive(Debug, Clone, Copy)]
pub(super) struct Wanted<'a> {
    pub(super) id: SessionId,
    pub(super) tenant: TenantId,
    pub(super) tokens: &'a [Token],
    /// Its first tokens, which it computes in chunks.
    pub(super) n_prompt: u32,
}

impl Kept {
    pub(super) fn len(&self) -> u32 {
        self.tokens.len() as u32
    }

    /// Only the first `n_valid` tokens are known to be there still, and perhaps others behind them.
    pub(super) fn lose_all_but(&mut self, n_valid: u32) {
        self.tokens.truncate(n_valid as usize);
        self.n_chunked = self.n_chunked.min(self.len());
        self.has_surplus = true;
    }

    /// The same of a slot that cannot be cut back: either all is there and nothing else, or nothing of use.
    pub(super) fn lose_unless_whole(&mut self, n_valid: u32) {
        if self.has_surplus || n_valid != self.len() {
            self.lose_all_but(0);
        }
    }

    /// Whether it begins with the same tokens, computed in the same way.
    fn covers(&self, other: &Self) -> bool {
        self.tenant == other.tenant
            && self.n_chunked.min(other.len()) == other.n_chunked
            && self.tokens.starts_with(&other.tokens)
    }

    /// How many of the first tokens a session may take over.
    pub(super) fn usable(&self, wanted: Wanted<'_>, cache: PrefixCache) -> u32 {
        usable(&self.tokens, self.n_chunked, self.tenant, self.owner, wanted, cache)
    }
}

/// How many of the first `tokens` a session may take over, so that the rows that are left can be computed as they must:
/// at least one, and of a prompt at least two.
pub(super) fn usable(
    tokens: &[Token],
    n_chunked: u32,
    tenant: TenantId,
    owner: SessionId,
    wanted: Wanted<'_>,
    cache: PrefixCache,
) -> u32 {
    let is_own = owner == wanted.id;
    if tenant != wanted.tenant || (cache == PrefixCache::Off && !is_own) {
        return 0;
    }
    let common = tokens.iter().zip(wanted.tokens).take_while(|(a, b)| a == b).count() as u32;
    let same_way = match (cache, n_chunked.cmp(&wanted.n_prompt)) {
        (PrefixCache::Full, _) | (_, std::cmp::Ordering::Equal) => common,
        _ => common.min(n_chunked).min(wanted.n_prompt),
    };
    let n_usable = same_way.min(wanted.tokens.len() as u32 - 1);
    // A prompt's last row may not be alone.
    if n_usable + 1 == wanted.n_prompt { n_usable.saturating_sub(1) } else { n_usable }
}

/// An image of a slot.
#[derive(Debug)]
pub(super) struct Image {
    pub(super) id: ImageId,
    pub(super) kept: Kept,
    /// All stages have said that they hold it.
    pub(super) is_whole: bool,
    /// Sessions that wait for it.
    pub(super) n_readers: u32,
}

/// The images of a ring, bounded by the tokens in all of them.
#[derive(Debug)]
pub(super) struct Images {
    pub(super) list: Vec<Image>,
    limit_tokens: u64,
    limit_images: usize,
    next_id: ImageId,
}

impl Images {
    pub(super) fn new(limit_tokens: u64, limit_images: usize) -> Self {
        Self { list: Vec::new(), limit_tokens, limit_images, next_id: ImageId(1) }
    }

    /// Forgets all images; from now on they may have `limit_tokens` tokens.
    pub(super) fn clear(&mut self, limit_tokens: u64) {
        self.limit_tokens = limit_tokens;
        self.list.clear();
    }

    /// Tokens in all images.
    pub(super) fn n_tokens(&self) -> u64 {
        self.list.iter().map(|image| u64::from(image.kept.len())).sum()
    }

    /// Makes room for what a slot holds and names its image; images that must go, or that the new one makes
    /// superfluous, are put into `dropped`. `None` if it is not worth saving, or there is no room.
    pub(super) fn begin(&mut self, kept: &Kept, dropped: &mut Vec<ImageId>) -> Option<ImageId> {
        if kept.len() < MIN_IMAGE || kept.has_surplus || self.list.iter().any(|image| image.kept.covers(kept)) {
            return None;
        }
        let n_tokens = u64::from(kept.len());
        let read = || self.list.iter().filter(|image| image.n_readers > 0);
        let n_read_tokens: u64 = read().map(|image| u64::from(image.kept.len())).sum();
        if n_read_tokens + n_tokens > self.limit_tokens || read().count() >= self.limit_images {
            return None;
        }
        let mut drop_image = |list: &mut Vec<Image>, at: usize| dropped.push(list.swap_remove(at).id);
        let is_superfluous = |image: &Image| image.n_readers == 0 && kept.covers(&image.kept);
        while let Some(at) = self.list.iter().position(is_superfluous) {
            drop_image(&mut self.list, at);
        }
        while self.n_tokens() + n_tokens > self.limit_tokens || self.list.len() >= self.limit_images {
            let oldest = self.list.iter().enumerate().filter(|(_, image)| image.n_readers == 0);
            let (at, _) = oldest.min_by_key(|(_, image)| image.kept.used)?;
            drop_image(&mut self.list, at);
        }
        let id = self.next_id;
        self.next_id = id.next();
        self.list.push(Image { id, kept: kept.clone(), is_whole: false, n_readers: 0 });
        Some(id)
    }

    /// The whole image of which a session may take over most.
    pub(super) fn best(&self, wanted: Wanted<'_>, cache: PrefixCache) -> Option<(ImageId, u32)> {
        let whole = self.list.iter().filter(|image| image.is_whole);
        let best = whole.map(|image| (image.id, image.kept.usable(wanted, cache)));
        best.max_by_key(|(_, n)| *n).filter(|(_, n)| *n >= MIN_SHARED)
    }

    pub(super) fn get_mut(&mut self, id: ImageId) -> Option<&mut Image> {
        self.list.iter_mut().find(|image| image.id == id)
    }

    /// True if it was there.
    pub(super) fn remove(&mut self, id: ImageId) -> bool {
        let n_before = self.list.len();
        self.list.retain(|image| image.id != id);
        self.list.len() < n_before
    }

    /// Drops the images of a session.
    pub(super) fn forget(&mut self, owner: SessionId, dropped: &mut Vec<ImageId>) {
        let is_left = |image: &Image| image.kept.owner == owner && image.n_readers == 0;
        dropped.extend(self.list.extract_if(.., |image| is_left(image)).map(|image| image.id));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kept(tokens: std::ops::Range<Token>, n_chunked: u32) -> Kept {
        Kept { tokens: tokens.collect(), n_chunked, ..Kept::default() }
    }

    fn wanted(tokens: &[Token], n_prompt: u32) -> Wanted<'_> {
        Wanted { id: SessionId(9), tenant: TenantId(0), tokens, n_prompt }
    }

    #[test]
    fn a_prompt_keeps_two_rows_to_compute() {
        let tokens: Vec<Token> = (0..50).collect();
        assert_eq!(kept(0..50, 50).usable(wanted(&tokens, 50), PrefixCache::Full), 48);
        assert_eq!(kept(0..40, 40).usable(wanted(&tokens, 50), PrefixCache::Full), 40);
        assert_eq!(kept(0..49, 49).usable(wanted(&tokens, 50), PrefixCache::Full), 48);
        assert_eq!(kept(0..9, 9).usable(wanted(&tokens[..1], 1), PrefixCache::Full), 0);
    }

    #[test]
    fn an_exact_cache_minds_how_tokens_were_computed() {
        let tokens: Vec<Token> = (0..80).collect();
        let exact = |kept: &Kept, n_prompt| kept.usable(wanted(&tokens, n_prompt), PrefixCache::Exact);
        assert_eq!(exact(&kept(0..60, 30), 80), 30, "the rest was an answer");
        assert_eq!(exact(&kept(0..60, 60), 30), 30, "the rest was a prompt");
        assert_eq!(exact(&kept(0..60, 30), 30), 60, "a session that goes on where it was");
        assert_eq!(kept(0..60, 30).usable(wanted(&tokens, 80), PrefixCache::Full), 60);
    }

    #[test]
    fn without_a_cache_only_its_own_tokens_are_for_a_session() {
        let tokens: Vec<Token> = (0..50).collect();
        let mut other = kept(0..40, 40);
        assert_eq!(other.usable(wanted(&tokens, 50), PrefixCache::Off), 0);
        other.owner = SessionId(9);
        assert_eq!(other.usable(wanted(&tokens, 50), PrefixCache::Off), 40);
        other.tenant = TenantId(1);
        assert_eq!(other.usable(wanted(&tokens, 50), PrefixCache::Full), 0, "another tenant's");
    }

    #[test]
    fn images_make_room_by_age_and_never_hold_the_same_twice() {
        let mut images = Images::new(250, 10);
        let mut dropped = Vec::new();
        let first = images.begin(&Kept { used: 1, ..kept(0..100, 100) }, &mut dropped).unwrap();
        assert_eq!(images.begin(&kept(0..80, 80), &mut dropped), None, "it is the beginning of another one");
        let other = images.begin(&Kept { used: 2, ..kept(500..600, 0) }, &mut dropped).unwrap();
        let longer = images.begin(&Kept { used: 3, ..kept(0..120, 0) }, &mut dropped).unwrap();
        assert_eq!(std::mem::take(&mut dropped), [first], "the longer one has all of it");
        images.get_mut(other).unwrap().n_readers = 1;
        images.begin(&kept(900..990, 0), &mut dropped).unwrap();
        assert_eq!(dropped, [longer], "the older one is being read");
        assert_eq!(images.begin(&kept(0..300, 0), &mut dropped), None, "more than fits at all");
        assert_eq!(images.begin(&kept(0..63, 0), &mut dropped), None, "too short");
        let with_surplus = Kept { has_surplus: true, ..kept(2000..2100, 0) };
        assert_eq!(images.begin(&with_surplus, &mut dropped), None, "the stages hold more than is known");
    }

    #[test]
    fn what_cannot_be_saved_pushes_nothing_out() {
        let mut images = Images::new(250, 10);
        let mut dropped = Vec::new();
        let read = images.begin(&kept(0..100, 100), &mut dropped).unwrap();
        images.get_mut(read).unwrap().n_readers = 1;
        images.begin(&kept(500..600, 0), &mut dropped).unwrap();
        assert_eq!(images.begin(&kept(500..700, 0), &mut dropped), None, "no room beside the one that is read");
        assert_eq!((images.list.len(), dropped.len()), (2, 0));
    }

    #[test]
    fn the_same_tokens_computed_in_another_way_are_another_image() {
        let mut images = Images::new(1000, 10);
        let mut dropped = Vec::new();
        images.begin(&kept(0..100, 100), &mut dropped).unwrap();
        assert!(images.begin(&kept(0..100, 70), &mut dropped).is_some(), "30 of an answer");
        assert_eq!(images.begin(&kept(0..90, 90), &mut dropped), None);
        assert_eq!(images.begin(&kept(0..90, 70), &mut dropped), None);
        assert_eq!(images.list.len(), 2);
    }

    #[test]
    fn images_of_one_owner_are_forgotten_unless_they_are_read() {
        let mut images = Images::new(1000, 10);
        let mut dropped = Vec::new();
        let of = |owner, from| Kept { owner: SessionId(owner), ..kept(from..from + 100, 0) };
        let ids: Vec<_> =
            [(1, 0), (1, 200), (2, 400)].map(|(o, at)| images.begin(&of(o, at), &mut dropped).unwrap()).into();
        images.get_mut(ids[1]).unwrap().n_readers = 1;
        images.forget(SessionId(1), &mut dropped);
        assert_eq!(dropped, [ids[0]]);
        assert!(images.remove(ids[2]) && !images.remove(ids[2]));
    }

    #[test]
    fn only_whole_images_are_found() {
        let mut images = Images::new(1000, 10);
        let id = images.begin(&kept(0..100, 100), &mut Vec::new()).unwrap();
        let tokens: Vec<Token> = (0..120).collect();
        assert_eq!(images.best(wanted(&tokens, 120), PrefixCache::Full), None);
        images.get_mut(id).unwrap().is_whole = true;
        assert_eq!(images.best(wanted(&tokens, 120), PrefixCache::Full), Some((id, 100)));
        images.remove(id);
        assert_eq!(images.n_tokens(), 0);
    }
}
