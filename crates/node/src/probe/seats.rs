//! Answering the probes of others.

use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use brigade_base::NodeId;
use brigade_net::{Link, LinkError, Refusal, TcpLink};
use brigade_protocol::kind;

use super::{MAX_TIME, MAX_TRANSFER};

/// Most bytes that go over one link, both ways together. A probe takes less than half of it: 12 MiB of transfers, and
/// twice 48 MiB at most to fill the link.
const MAX_BYTES: u64 = 256 << 20;

/// Links of one probe: one that is filled, and one that is measured meanwhile.
const MAX_LINKS: usize = 2;

/// The links over which this node is being measured. One other node at a time: two would share this node's port, and
/// each measure half of it. The others are told to come again.
#[derive(Debug, Default)]
pub struct Seats(Mutex<Vec<NodeId>>);

impl Seats {
    /// Whether there is room for a link of `peer`.
    ///
    /// # Errors
    /// [`Refusal::Busy`] if not.
    pub fn check(&self, peer: NodeId) -> Result<(), Refusal> {
        if has_room(&self.taken(), peer) { Ok(()) } else { Err(Refusal::Busy) }
    }

    /// Answers what comes over a link until the other node has had enough, or more than its share.
    pub fn serve(&self, link: &TcpLink) {
        // Another one may have come in since that was checked. Closing sends this one away as well.
        if let Some(_seat) = self.take(link.peer()) {
            link.set_write_timeout(MAX_TIME);
            if let Err(error) = serve_probe(link) {
                tracing::debug!(peer = %link.peer().short(), %error, "a probe has ended");
            }
        }
        link.close();
    }

    fn take(&self, peer: NodeId) -> Option<Seat<'_>> {
        let mut taken = self.taken();
        has_room(&taken, peer).then(|| {
            taken.push(peer);
            Seat { seats: self, peer }
        })
    }

    fn taken(&self) -> std::sync::MutexGuard<'_, Vec<NodeId>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn has_room(taken: &[NodeId], peer: NodeId) -> bool {
    taken.len() < MAX_LINKS && taken.iter().all(|other| *other == peer)
}

/// One link's place; free when dropped.
struct Seat<'a> {
    seats: &'a Seats,
    peer: NodeId,
}

impl Drop for Seat<'_> {
    fn drop(&mut self) {
        let mut taken = self.seats.taken();
        if let Some(at) = taken.iter().position(|peer| *peer == self.peer) {
            taken.swap_remove(at);
        }
    }
}

/// Answers each frame of a probe. Ends without error at the first that is none, or asks for too much.
///
/// # Errors
/// When the link ends, or its time is over.
fn serve_probe(link: &dyn Link) -> Result<(), LinkError> {
    link.set_frame_limit(MAX_TRANSFER);
    let until = Instant::now() + MAX_TIME;
    let (mut asked, mut padding) = (Vec::new(), Vec::new());
    let mut n_bytes = 0;
    while let kind::PROBE = link.recv(&mut asked, Some(until))? {
        let Some(wanted) = asked.first_chunk() else { return Ok(()) };
        let wanted = u32::from_le_bytes(*wanted) as usize;
        n_bytes += (asked.len() + wanted) as u64;
        // A frame that is here already is received however late it is.
        if wanted > MAX_TRANSFER || n_bytes > MAX_BYTES || Instant::now() >= until {
            return Ok(());
        }
        if padding.len() < wanted {
            padding.resize(wanted, 0);
        }
        link.send(kind::PROBE_BACK, &[&padding[..wanted]])?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;
    use crate::test_link::TestLink;

    /// What comes back for frames of these kinds, lengths, and wants: the lengths of the answers.
    fn answers(frames: Vec<(u8, usize, u32)>) -> Vec<usize> {
        let answers = Arc::new(Mutex::new(Vec::new()));
        let seen = Arc::clone(&answers);
        let mut frames = frames.into_iter().map(|(kind, len, wanted)| {
            let mut payload = wanted.to_le_bytes().to_vec();
            payload.resize(len, 0);
            (kind, payload)
        });
        let on_send = move |kind, parts: &[&[u8]]| {
            assert_eq!(kind, kind::PROBE_BACK);
            seen.lock().unwrap().push(parts.iter().map(|part| part.len()).sum());
        };
        let _ = serve_probe(&*TestLink::with_kinds(on_send, move || frames.next()));
        answers.lock().unwrap().clone()
    }

    #[test]
    fn as_many_bytes_come_back_as_are_wanted() {
        let frames = [(64, 64), (4, 0), (100_000, 4), (4, MAX_TRANSFER as u32)];
        let asked = frames.map(|(len, wanted)| (kind::PROBE, len, wanted)).to_vec();
        assert_eq!(answers(asked), frames.map(|(_, wanted)| wanted as usize));
    }

    #[test]
    fn what_is_no_probe_or_wants_too_much_ends_it() {
        let good = (kind::PROBE, 8, 8);
        for bad in [(kind::FRAME, 8, 8), (kind::PROBE, 3, 8), (kind::PROBE, 8, MAX_TRANSFER as u32 + 1)] {
            assert_eq!(answers(vec![good, bad, good]), [8]);
        }
        let largest = (kind::PROBE, MAX_TRANSFER, MAX_TRANSFER as u32);
        assert_eq!(answers(vec![largest; 100]).len(), (MAX_BYTES / (2 * MAX_TRANSFER) as u64) as usize);
    }

    #[test]
    fn one_node_at_a_time_has_two_links() {
        let [a, b] = [1, 2].map(|n| NodeId::from_bytes([n; 32]));
        let seats = Seats::default();
        let first = seats.take(a).unwrap();
        assert_eq!((seats.check(a), seats.check(b)), (Ok(()), Err(Refusal::Busy)));
        let second = seats.take(a).unwrap();
        assert!(seats.take(a).is_none() && seats.check(a).is_err());
        drop((first, second));
        assert!(seats.take(b).is_some());
    }
}
