//! Sending passes into the ring without ever waiting for it.
//!
//! The coordinator both feeds the ring and drains it. Were it to wait until the first worker takes a large frame, while
//! that worker waits until its own frame has been taken, all around, nobody would move again. So only small frames, of
//! which as many as there are stages always fit into the system's buffers, are sent from the ring's own thread; large
//! ones, and all behind them, go through a queue to a thread that may wait. The queue holds no more than the passes of
//! the ring.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Sender, channel};

use brigade_net::{Link, LinkError};
use brigade_protocol::frame::row_bytes;
use brigade_protocol::kind;

use crate::threads::spawn;

/// Largest frame that is sent at once. A decode row of the widest model is as large; sixteen of these fit into the
/// smallest buffers that a link's two ends usually have together.
const SMALL_FRAME_BYTES: usize = 64 << 10;

/// The first link of a ring.
pub struct Outgoing {
    link: Arc<dyn Link>,
    queue: Sender<Vec<u8>>,
    /// Frames in the queue, the one being sent included.
    queued: Arc<AtomicUsize>,
}

impl Outgoing {
    /// Wraps the link to the first worker. The thread ends with this value, or closes the link when it breaks.
    ///
    /// # Errors
    /// If the system gives no thread.
    pub fn new(link: Arc<dyn Link>) -> std::io::Result<Self> {
        let (queue, frames) = channel::<Vec<u8>>();
        let queued = Arc::new(AtomicUsize::new(0));
        let (thread_link, thread_queued) = (Arc::clone(&link), Arc::clone(&queued));
        spawn("sender", move || {
            for frame in frames {
                if let Err(error) = thread_link.send(kind::FRAME, &[&frame]) {
                    tracing::debug!(%error, "the link to the first stage ended");
                    return thread_link.close();
                }
                thread_queued.fetch_sub(1, Ordering::Release);
            }
        })?;
        Ok(Self { link, queue, queued })
    }

    /// Sends a frame: its head, and its rows.
    ///
    /// # Errors
    /// If the link has ended.
    pub fn send(&self, head: &[u8], rows: &[f32]) -> Result<(), LinkError> {
        let rows = row_bytes(rows);
        let is_small = head.len() + rows.len() <= SMALL_FRAME_BYTES;
        // Only this thread adds to the queue, so once it is empty it stays so.
        if is_small && self.queued.load(Ordering::Acquire) == 0 {
            return self.link.send(kind::FRAME, &[head, rows]);
        }
        self.queued.fetch_add(1, Ordering::Relaxed);
        self.queue.send([head, rows].concat()).map_err(|_| LinkError::Closed)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;
    use std::time::{Duration, Instant};

    use super::*;
    use crate::test_link::TestLink;

    /// Takes nothing until it is opened; keeps the first byte of each frame.
    #[derive(Default)]
    struct Stuck {
        door: Mutex<()>,
        taken: Mutex<Vec<u8>>,
    }

    #[test]
    fn large_frames_never_hold_up_the_sender_and_nothing_overtakes_them() {
        let link = Arc::new(Stuck::default());
        let end = Arc::clone(&link);
        let take = move |parts: &[&[u8]]| {
            let _open = end.door.lock().unwrap();
            end.taken.lock().unwrap().push(parts[0][0]);
        };
        let outgoing = Outgoing::new(TestLink::of(take, || None)).unwrap();
        outgoing.send(&[0], &[]).unwrap();
        let closed = link.door.lock().unwrap();
        outgoing.send(&[1], &vec![0.0; SMALL_FRAME_BYTES]).unwrap();
        outgoing.send(&[2], &[]).unwrap();
        outgoing.send(&[3], &vec![0.0; SMALL_FRAME_BYTES]).unwrap();
        assert_eq!(*link.taken.lock().unwrap(), [0]);
        drop(closed);
        let deadline = Instant::now() + Duration::from_secs(10);
        while outgoing.queued.load(Ordering::Acquire) > 0 {
            assert!(Instant::now() < deadline);
            std::thread::yield_now();
        }
        outgoing.send(&[4], &[]).unwrap();
        assert_eq!(*link.taken.lock().unwrap(), [0, 1, 2, 3, 4]);
    }
}
