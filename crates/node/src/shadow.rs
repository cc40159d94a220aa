//! Sending the frames of a ring to a node that stands by, beside the ring.
//!
//! The ring never waits for it: frames are copied into a bounded queue, a thread of its own sends them, and who does
//! not keep up is given up. Its slots then turn out to be short, which costs a replay and nothing else.
//!
//! [`Shadow`] belongs to the thread that makes the frames; a [`ShadowSlot`] lets another thread put it there and take
//! it away.

use std::cell::Cell;
use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex};

use brigade_net::Link;
use brigade_protocol::frame::row_bytes;
use brigade_protocol::kind;
use brigade_protocol::schedule::MAX_SHADOW_LAG;

use crate::threads::{lock, spawn};

/// Most frames that wait for a node that stands by: as many as the scheduler remembers. Behind a loss rows come as fast
/// as the ring computes them, while that node may have a stage of its own to serve.
const MAX_QUEUED: usize = MAX_SHADOW_LAG;

/// Most bytes that wait for it: one full frame.
const MAX_QUEUED_BYTES: usize = brigade_net::MAX_FRAME;

/// Buffers that are kept for the next frames: one on its way, one behind it.
const MAX_SPARE: usize = 2;

/// The link to a node that stands by. When this is dropped, the link is closed once what is queued was sent.
pub struct Shadow {
    link: Arc<dyn Link>,
    queue: SyncSender<Vec<u8>>,
    returned: Receiver<Vec<u8>>,
    queued_bytes: Arc<AtomicUsize>,
    is_over: Cell<bool>,
}

impl Shadow {
    /// Wraps the link.
    ///
    /// # Errors
    /// If the system gives no thread.
    pub fn new(link: Arc<dyn Link>) -> io::Result<Self> {
        let (queue, frames) = sync_channel::<Vec<u8>>(MAX_QUEUED);
        let (spare, returned) = sync_channel(MAX_SPARE);
        let queued_bytes = Arc::new(AtomicUsize::new(0));
        let (sender, waiting) = (Arc::clone(&link), Arc::clone(&queued_bytes));
        spawn("shadow", move || {
            for frame in frames {
                waiting.fetch_sub(frame.len(), Ordering::Relaxed);
                if let Err(error) = sender.send(kind::FRAME, &[&frame]) {
                    tracing::debug!(%error, "the link to the standby ended");
                    break;
                }
                let _ = spare.try_send(frame);
            }
            sender.close();
        })?;
        Ok(Self { link, queue, returned, queued_bytes, is_over: Cell::new(false) })
    }

    /// Queues a frame, its head and its rows. If the node does not keep up or is gone, its link is closed, and this and
    /// all further frames are dropped.
    pub fn send(&self, head: &[u8], rows: &[f32]) {
        if self.is_over.get() {
            return;
        }
        let rows = row_bytes(rows);
        let mut frame = self.returned.try_recv().unwrap_or_default();
        frame.clear();
        frame.reserve_exact(head.len() + rows.len());
        frame.extend_from_slice(head);
        frame.extend_from_slice(rows);
        let n_bytes = frame.len();
        let is_full = self.queued_bytes.fetch_add(n_bytes, Ordering::Relaxed) + n_bytes > MAX_QUEUED_BYTES;
        if is_full || self.queue.try_send(frame).is_err() {
            tracing::info!(peer = %self.link.peer().short(), "the standby does not keep up; its link is given up");
            self.is_over.set(true);
            // Its thread may be in the middle of a frame that nobody takes.
            self.link.close();
        }
    }

    /// Whether the node was given up.
    pub fn is_over(&self) -> bool {
        self.is_over.get()
    }
}

/// What is called once when a node that stands by is given up.
type OnGone = Box<dyn FnOnce() + Send>;

/// Where the link to a node that stands by is put while its ring runs.
#[derive(Default)]
pub struct ShadowSlot(Mutex<Option<(Shadow, OnGone)>>);

impl ShadowSlot {
    /// Sends frames over `link` too from now on, instead of the one before. `gone` is called if that is given up.
    ///
    /// # Errors
    /// If the system gives no thread.
    pub fn set(&self, link: Arc<dyn Link>, gone: impl FnOnce() + Send + 'static) -> io::Result<()> {
        let shadow = Shadow::new(link)?;
        *lock(&self.0) = Some((shadow, Box::new(gone)));
        Ok(())
    }

    /// Sends no more. What is queued still goes out, then the link closes.
    pub fn clear(&self) {
        *lock(&self.0) = None;
    }

    /// Sends a frame to the node that stands by, if there is one.
    pub fn send(&self, head: &[u8], rows: &[f32]) {
        let mut slot = lock(&self.0);
        if let Some((shadow, _)) = &*slot {
            shadow.send(head, rows);
        }
        if let Some((_, gone)) = slot.take_if(|(shadow, _)| shadow.is_over()) {
            gone();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;
    use std::time::Duration;

    use super::*;
    use crate::test_link::TestLink;

    const PATIENCE: Duration = Duration::from_secs(30);

    #[test]
    fn frames_go_out_in_order_and_those_that_are_queued_before_the_end() {
        let (out, sent) = channel();
        let slot = ShadowSlot::default();
        slot.send(&[0], &[]);
        slot.set(TestLink::of(move |parts| out.send(parts.concat()).unwrap(), || None), || panic!("it keeps up"))
            .unwrap();
        for i in 1..=50 {
            slot.send(&[i], &[f32::from(i)]);
        }
        slot.clear();
        slot.send(&[99], &[]);
        for i in 1..=50 {
            let frame = sent.recv_timeout(PATIENCE).unwrap();
            assert_eq!((frame[0], &frame[1..]), (i, &f32::from(i).to_le_bytes()[..]));
        }
        assert!(sent.recv_timeout(PATIENCE).is_err(), "the link is dropped behind the last");
    }

    #[test]
    fn who_does_not_keep_up_is_given_up_and_never_waited_for() {
        let door = Arc::new(Mutex::new(()));
        let (closed, held) = (Arc::clone(&door), door.lock().unwrap());
        let (tell, told) = channel();
        let slot = ShadowSlot::default();
        slot.set(TestLink::of(move |_| drop(closed.lock()), || None), move || tell.send(()).unwrap()).unwrap();
        // One may be taken by the thread, the rest fills the queue.
        for _ in 0..MAX_QUEUED + 2 {
            slot.send(&[1], &[]);
        }
        told.try_recv().unwrap();
        slot.send(&[1], &[]);
        drop(held);
        assert!(told.recv_timeout(PATIENCE).is_err(), "told once");
    }

    #[test]
    fn few_large_frames_are_too_many_too() {
        let door = Arc::new(Mutex::new(()));
        let (closed, _held) = (Arc::clone(&door), door.lock().unwrap());
        let shadow = Shadow::new(TestLink::of(move |_| drop(closed.lock()), || None)).unwrap();
        let rows = vec![0.0; MAX_QUEUED_BYTES / 4 / 3];
        (0..3).for_each(|_| shadow.send(&[], &rows));
        assert!(!shadow.is_over());
        (0..2).for_each(|_| shadow.send(&[], &rows));
        assert!(shadow.is_over());
    }
}
