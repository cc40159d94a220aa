//! Room in memory for what requests hold, counted over all of them together.
//!
//! Room is never waited for: requests that wait while they hold some could wait for each other. One that finds none is
//! refused with 429 at once. A share is kept for small ones, so that a few large ones do not lock those out.

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// What room is counted in, so that it fits a semaphore's permits.
const UNIT_BYTES: usize = 1 << 10;

/// All the room of one kind.
#[derive(Debug)]
pub(crate) struct Rooms {
    large: Arc<Semaphore>,
    small: Arc<Semaphore>,
    small_bytes: usize,
}

/// Room that a request holds, freed when dropped.
#[derive(Debug, Default)]
pub(crate) struct Room {
    permits: Vec<OwnedSemaphorePermit>,
    bytes: usize,
}

impl Rooms {
    /// Room of `bytes` for all, and of `kept_bytes` more for those that hold no more than `small_bytes`.
    pub(crate) fn new(bytes: usize, kept_bytes: usize, small_bytes: usize) -> Self {
        let semaphore = |bytes: usize| Arc::new(Semaphore::new(bytes / UNIT_BYTES));
        Self { large: semaphore(bytes), small: semaphore(kept_bytes), small_bytes }
    }

    /// Room for `bytes`, if there is so much.
    pub(crate) fn take(&self, bytes: usize) -> Option<Room> {
        let mut room = Room::default();
        self.grow(&mut room, bytes).then_some(room)
    }

    /// Makes `room` large enough for `bytes`. False if there is not so much; what it has it keeps.
    pub(crate) fn grow(&self, room: &mut Room, bytes: usize) -> bool {
        let units = bytes.saturating_sub(room.bytes).div_ceil(UNIT_BYTES);
        let permits = u32::try_from(units).unwrap_or(u32::MAX);
        // Small ones may use all room, large ones not the share of the small.
        let shares = if bytes <= self.small_bytes { vec![&self.small, &self.large] } else { vec![&self.large] };
        let permit = shares.into_iter().find_map(|share| share.clone().try_acquire_many_owned(permits).ok());
        let Some(permit) = permit else { return false };
        room.bytes += units * UNIT_BYTES;
        // Same shares are merged, so there are never more than two.
        match room.permits.iter_mut().find(|held| Arc::ptr_eq(held.semaphore(), permit.semaphore())) {
            Some(held) => held.merge(permit),
            None => room.permits.push(permit),
        }
        true
    }

    /// Bytes that anyone may still take.
    #[cfg(test)]
    pub(crate) fn free_bytes(&self) -> usize {
        self.large.available_permits() * UNIT_BYTES
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn room_is_shared_and_given_back() {
        let rooms = Rooms::new(8 << 10, 2 << 10, 1 << 10);
        let large = rooms.take(6 << 10).unwrap();
        assert!(rooms.take((2 << 10) + 1).is_none());
        let small: Vec<Room> = (0..4).filter_map(|_| rooms.take(1 << 10)).collect();
        assert_eq!((small.len(), rooms.free_bytes()), (4, 0));
        assert!(rooms.take(1).is_none());
        drop(large);
        assert!(rooms.take(6 << 10).is_some());
        drop(small);
        assert_eq!(rooms.free_bytes(), 8 << 10);
        assert!(rooms.take(usize::MAX).is_none());
    }

    #[test]
    fn room_grows_by_what_is_missing() {
        let rooms = Rooms::new(8 << 10, 0, 0);
        let mut room = rooms.take(3000).unwrap();
        assert!(rooms.grow(&mut room, 100) && rooms.grow(&mut room, 8 << 10));
        assert!(!rooms.grow(&mut room, (8 << 10) + 1));
        assert_eq!(rooms.free_bytes(), 0);
        drop(room);
        assert_eq!(rooms.free_bytes(), 8 << 10);
    }
}
