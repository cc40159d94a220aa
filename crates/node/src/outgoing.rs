//! Sending passes on without waiting for who takes them.
//!
//! The coordinator both feeds the ring and drains it. Were it to wait until the first worker takes a large frame, while
//! that worker waits until its own frame has been taken, all around, nobody would move again. And a worker that waits
//! for its neighbour computes nothing. So only small frames, of which as many as there are stages always fit into the
//! system's buffers, are sent from the thread that made them; large ones, and all behind them, go through a queue to a
//! thread that may wait.
//!
//! The queue is bounded; a sender that finds it full waits. No ring stops by that: for all to wait, every queue in it
//! would have to be full, which takes several times as many passes as a ring carries, one for each stage and one more.
//!
//! [`Outgoing`] belongs to the thread that makes frames. A frame is one write; buffers of queued ones come back.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::Instant;

use brigade_net::{Link, LinkError, LinkStats};
use brigade_protocol::frame::row_bytes;
use brigade_protocol::kind;

pub use crate::shadow::Shadow;
use crate::threads::{micros, spawn};

/// Largest frame that is sent at once. A decode row of the widest model is as large; sixteen of these fit into the
/// smallest buffers that a link's two ends usually have together.
const SMALL_FRAME_BYTES: usize = 64 << 10;

/// Most frames in the queue. The chunks of a prompt follow each other by what a stage takes to compute one, which is
/// longer than sending it where a ring is of any use: the queue is short or the link is the bottleneck.
const MAX_QUEUED: usize = 8;

/// Buffers that are kept for the next large frames: one on its way, one behind it.
const MAX_SPARE: usize = 2;

/// What both threads count.
#[derive(Default)]
struct Shared {
    /// Frames in the queue, the one being sent included.
    queued: AtomicUsize,
    /// What the last frame took to write.
    write_us: AtomicU32,
}

impl Shared {
    fn send(&self, link: &dyn Link, parts: &[&[u8]]) -> Result<(), LinkError> {
        let begin = Instant::now();
        let sent = link.send(kind::FRAME, parts);
        self.write_us.store(micros(begin.elapsed()), Ordering::Relaxed);
        sent
    }
}

/// The sending side of a ring's link.
pub struct Outgoing {
    link: Arc<dyn Link>,
    queue: SyncSender<Vec<u8>>,
    returned: Receiver<Vec<u8>>,
    shared: Arc<Shared>,
}

impl Outgoing {
    /// Wraps the link to the next stage. The thread ends with this value, or closes the link when it breaks.
    ///
    /// # Errors
    /// If the system gives no thread.
    pub fn new(link: Arc<dyn Link>) -> std::io::Result<Self> {
        let (queue, frames) = sync_channel::<Vec<u8>>(MAX_QUEUED);
        let (spare, returned) = sync_channel(MAX_SPARE);
        let shared = Arc::new(Shared::default());
        let (thread_link, thread_shared) = (Arc::clone(&link), Arc::clone(&shared));
        spawn("sender", move || {
            for frame in frames {
                if let Err(error) = thread_shared.send(&*thread_link, &[&frame]) {
                    tracing::debug!(%error, "the link to the next stage ended");
                    return thread_link.close();
                }
                // Before the count, so that whoever sees an empty queue finds the buffer.
                let _ = spare.try_send(frame);
                thread_shared.queued.fetch_sub(1, Ordering::Release);
            }
        })?;
        Ok(Self { link, queue, returned, shared })
    }

    /// Sends a frame: its head, and its rows.
    ///
    /// # Errors
    /// If the link has ended.
    pub fn send(&self, head: &[u8], rows: &[f32]) -> Result<(), LinkError> {
        let rows = row_bytes(rows);
        let is_small = head.len() + rows.len() <= SMALL_FRAME_BYTES;
        // Only this thread adds to the queue, so once it is empty it stays so.
        if is_small && self.queued() == 0 {
            return self.shared.send(&*self.link, &[head, rows]);
        }
        let mut frame = self.returned.try_recv().unwrap_or_default();
        frame.clear();
        frame.reserve_exact(head.len() + rows.len());
        frame.extend_from_slice(head);
        frame.extend_from_slice(rows);
        self.shared.queued.fetch_add(1, Ordering::Relaxed);
        self.queue.send(frame).map_err(|_| LinkError::Closed)
    }

    /// What went over the link so far.
    pub fn stats(&self) -> LinkStats {
        self.link.stats()
    }

    /// Frames that are not sent yet.
    pub fn queued(&self) -> usize {
        self.shared.queued.load(Ordering::Acquire)
    }

    /// Microseconds that the last frame took to write; 0 before the first.
    pub fn write_us(&self) -> u32 {
        self.shared.write_us.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;
    use std::time::Duration;

    use super::*;
    use crate::test_link::TestLink;

    /// Takes nothing until it is opened; keeps the first byte of each frame, and where it lay.
    #[derive(Default)]
    struct Stuck {
        door: Mutex<()>,
        taken: Mutex<Vec<(u8, usize)>>,
    }

    impl Stuck {
        fn link(self: &Arc<Self>) -> Arc<dyn Link> {
            let end = Arc::clone(self);
            let take = move |parts: &[&[u8]]| {
                let _open = end.door.lock().unwrap();
                end.taken.lock().unwrap().push((parts[0][0], parts[0].as_ptr() as usize));
            };
            TestLink::of(take, || None)
        }

        fn taken(&self) -> Vec<u8> {
            self.taken.lock().unwrap().iter().map(|(byte, _)| *byte).collect()
        }
    }

    fn large() -> Vec<f32> {
        vec![0.0; SMALL_FRAME_BYTES]
    }

    fn wait_until_sent(outgoing: &Outgoing) {
        let deadline = Instant::now() + Duration::from_secs(10);
        while outgoing.queued() > 0 {
            assert!(Instant::now() < deadline);
            std::thread::yield_now();
        }
    }

    #[test]
    fn large_frames_never_hold_up_the_sender_and_nothing_overtakes_them() {
        let link = Arc::new(Stuck::default());
        let outgoing = Outgoing::new(link.link()).unwrap();
        outgoing.send(&[0], &[]).unwrap();
        let closed = link.door.lock().unwrap();
        outgoing.send(&[1], &large()).unwrap();
        outgoing.send(&[2], &[]).unwrap();
        outgoing.send(&[3], &large()).unwrap();
        assert_eq!((link.taken(), outgoing.queued()), (vec![0], 3));
        drop(closed);
        wait_until_sent(&outgoing);
        outgoing.send(&[4], &[]).unwrap();
        assert_eq!(link.taken(), [0, 1, 2, 3, 4]);
    }

    #[test]
    fn buffers_are_used_again() {
        let link = Arc::new(Stuck::default());
        let outgoing = Outgoing::new(link.link()).unwrap();
        for _ in 0..16 {
            outgoing.send(&[1], &large()).unwrap();
            wait_until_sent(&outgoing);
        }
        let taken = link.taken.lock().unwrap();
        assert!(taken.iter().all(|(_, at)| *at == taken[0].1), "{taken:?}");
    }

    #[test]
    fn a_full_queue_holds_the_sender_until_there_is_room() {
        let link = Arc::new(Stuck::default());
        let closed = link.door.lock().unwrap();
        let outgoing = Outgoing::new(link.link()).unwrap();
        // One is taken by the thread, the rest fills the queue.
        for i in 0..=MAX_QUEUED as u8 {
            outgoing.send(&[i], &large()).unwrap();
        }
        let (done, is_done) = std::sync::mpsc::channel();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                // Moved here, as a sender belongs to one thread.
                let outgoing = outgoing;
                outgoing.send(&[99], &[]).unwrap();
                done.send(()).unwrap();
                wait_until_sent(&outgoing);
            });
            assert!(is_done.recv_timeout(Duration::from_millis(20)).is_err());
            drop(closed);
            is_done.recv_timeout(Duration::from_secs(10)).unwrap();
        });
        assert_eq!(link.taken(), (0..=MAX_QUEUED as u8).chain([99]).collect::<Vec<_>>());
    }
}
