//! The receiving side of a ring's link: frames are read and decoded beside the thread that computes.
//!
//! - A reader thread receives, decodes into reused buffers and queues. So while a pass is computed the next one is made
//!   ready, and what waits can be seen before it is taken.
//! - The queue is bounded. When it is full the reader reads no more, and TCP holds the peer.
//! - The reader ends with the link, and with its first frame that is none; it closes the link then. Whoever takes
//!   frames gets those that came before, then hears why, as often as he asks.
//!
//! [`Incoming`] belongs to the thread that computes; dropping it closes the link, which ends the reader. Handing a
//! frame over costs one wake-up: of 8 KiB there and back over loopback, 3.4 us of 13.9 where both cores were free.

use std::io;
use std::sync::mpsc::{Receiver, SyncSender, TryRecvError, sync_channel};
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use brigade_net::{Link, LinkStats};
use brigade_protocol::frame::FrameHead;
use brigade_protocol::kind;

use crate::threads::{micros, spawn};

/// Most decoded frames that wait. A ring carries about as many passes as it has stages, so that in rings of some
/// machines all may wait at one stage and be computed together. More would only hold memory: a frame may have 64 MiB. A
/// ring cannot come to a stop by full queues, since that would take more passes than it carries.
pub const MAX_QUEUE: usize = 8;

/// Buffers that are kept for the next frames. Three are in use where frames come one by one (computed, waiting, read);
/// of a burst that is computed together so many more come back at once. What is beyond that is freed.
const MAX_SPARE: usize = 4;

/// A decoded frame.
#[derive(Debug)]
pub struct InFrame {
    /// All but its rows.
    pub head: FrameHead,
    /// Its rows `[n_rows, n_embd]`.
    pub rows: Vec<f32>,
    /// When the link had it whole.
    pub arrived: Instant,
    /// When it was decoded.
    pub decoded: Instant,
    /// Microseconds from the one to the other.
    pub read_us: u32,
}

/// Why no more frames come.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IncomingEnd {
    /// The link has ended; the text is for people.
    #[error("the incoming link ended: {0}")]
    Closed(String),
    /// The peer sent what is no frame; the text says who and what.
    #[error("{0}")]
    Failed(String),
}

/// What a frame is decoded into.
type Buffers = (FrameHead, Vec<f32>);

/// The frames of a link, in order.
pub struct Incoming {
    link: Arc<dyn Link>,
    frames: Receiver<InFrame>,
    spare: SyncSender<Buffers>,
    /// Set before the queue is closed.
    end: Arc<OnceLock<IncomingEnd>>,
}

impl Incoming {
    /// Starts to read a link, which nobody else may receive from.
    ///
    /// # Errors
    /// If the system gives no thread.
    pub fn start(link: Arc<dyn Link>) -> io::Result<Self> {
        Self::start_with(link, || {})
    }

    /// The same, and `notify` is called after each frame is queued, and once when their end can be heard: for a taker
    /// that waits for other things as well.
    ///
    /// # Errors
    /// If the system gives no thread.
    pub fn start_with(link: Arc<dyn Link>, notify: impl Fn() + Send + 'static) -> io::Result<Self> {
        let (queue, frames) = sync_channel(MAX_QUEUE);
        let (spare, returned) = sync_channel(MAX_SPARE);
        let end = Arc::new(OnceLock::new());
        let reader = Reader { link: Arc::clone(&link), queue, returned, end: Arc::clone(&end) };
        spawn("reader", move || reader.run(&notify))?;
        Ok(Self { link, frames, spare, end })
    }

    /// Waits for the next frame.
    ///
    /// # Errors
    /// Why none will come.
    pub fn recv(&self) -> Result<InFrame, IncomingEnd> {
        self.frames.recv().map_err(|_| self.end())
    }

    /// The next frame, if it is here.
    ///
    /// # Errors
    /// Why none will come.
    pub fn try_recv(&self) -> Result<Option<InFrame>, IncomingEnd> {
        match self.frames.try_recv() {
            Ok(frame) => Ok(Some(frame)),
            Err(TryRecvError::Empty) => Ok(None),
            Err(TryRecvError::Disconnected) => Err(self.end()),
        }
    }

    /// What went over the link so far.
    pub fn stats(&self) -> LinkStats {
        self.link.stats()
    }

    /// Gives the buffers of a frame back, so that the reader uses them again.
    pub fn recycle(&self, frame: InFrame) {
        // Where enough are spare already, or the reader has ended, they are freed.
        let _ = self.spare.try_send((frame.head, frame.rows));
    }

    fn end(&self) -> IncomingEnd {
        // Only a reader that panicked says nothing.
        self.end.get().cloned().unwrap_or_else(|| IncomingEnd::Failed("the reader has ended".to_owned()))
    }
}

impl Drop for Incoming {
    fn drop(&mut self) {
        self.link.close();
    }
}

/// What the reader thread owns.
struct Reader {
    link: Arc<dyn Link>,
    queue: SyncSender<InFrame>,
    returned: Receiver<Buffers>,
    end: Arc<OnceLock<IncomingEnd>>,
}

impl Reader {
    fn run(self, notify: &dyn Fn()) {
        let end = self.read(notify);
        tracing::debug!(%end, "no more frames are read");
        self.link.close();
        let _ = self.end.set(end);
        drop(self.queue);
        notify();
    }

    /// Reads until the link ends or the taker is gone.
    fn read(&self, notify: &dyn Fn()) -> IncomingEnd {
        let broken = |what: String| IncomingEnd::Failed(format!("node {} sent {what}", self.link.peer().short()));
        let mut bytes = Vec::new();
        loop {
            match self.link.recv(&mut bytes, None) {
                Ok(kind::FRAME) => {}
                Ok(kind) => return broken(format!("a frame of unknown kind {kind:#x}")),
                Err(error) => return IncomingEnd::Closed(error.to_string()),
            }
            let arrived = Instant::now();
            let (mut head, mut rows) = self.returned.try_recv().unwrap_or_default();
            if let Err(error) = head.decode(&bytes, &mut rows) {
                return broken(format!("a broken frame: {error}"));
            }
            let decoded = Instant::now();
            let read_us = micros(decoded - arrived);
            if self.queue.send(InFrame { head, rows, arrived, decoded, read_us }).is_err() {
                return IncomingEnd::Closed("nobody takes its frames".to_owned());
            }
            notify();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::time::Duration;

    use brigade_base::PassId;
    use brigade_protocol::frame::RowSet;

    use super::*;
    use crate::test_link::TestLink;

    const PATIENCE: Duration = Duration::from_secs(30);

    /// A frame of one row `[pass, pass]`.
    fn frame(pass: u64) -> (u8, Vec<u8>) {
        let set = RowSet { slot: 0, keep: 0, n_rows: 1, n_outputs: 0 };
        let head = FrameHead { pass: PassId(pass), sets: vec![set], n_embd: 2, ..FrameHead::default() };
        let mut bytes = Vec::new();
        head.encode(&mut bytes);
        bytes.extend([pass as f32; 2].iter().flat_map(|value| value.to_le_bytes()));
        (kind::FRAME, bytes)
    }

    /// Reads what `frames` yields, then a closed link.
    fn incoming(frames: impl IntoIterator<Item = (u8, Vec<u8>), IntoIter: Send + 'static>) -> Incoming {
        let mut frames = frames.into_iter();
        Incoming::start(TestLink::of(|_| {}, move || frames.next())).unwrap()
    }

    #[test]
    fn frames_come_in_order_then_the_end_as_often_as_asked() {
        let incoming = incoming((0..100).map(frame));
        for pass in 0..100 {
            let frame = incoming.recv().unwrap();
            assert_eq!((frame.head.pass, &frame.rows[..]), (PassId(pass), &[pass as f32; 2][..]));
            assert!(frame.decoded >= frame.arrived);
            incoming.recycle(frame);
        }
        for _ in 0..2 {
            assert!(matches!(incoming.recv(), Err(IncomingEnd::Closed(_))));
            assert!(matches!(incoming.try_recv(), Err(IncomingEnd::Closed(_))));
        }
    }

    #[test]
    fn what_is_no_frame_ends_it_with_a_message() {
        let mut cut = frame(1);
        cut.1.pop();
        for (broken, says) in [(cut, "broken frame"), ((kind::CHUNK, vec![]), "0x31")] {
            let incoming = incoming([frame(7), broken, frame(8)]);
            assert_eq!(incoming.recv().unwrap().head.pass, PassId(7));
            let end = incoming.recv().unwrap_err();
            assert!(matches!(end, IncomingEnd::Failed(_)) && end.to_string().contains(says), "{end}");
            assert_eq!(incoming.try_recv().unwrap_err(), end, "the frame behind it is not read");
        }
    }

    #[test]
    fn a_full_queue_reads_no_more() {
        let (asked, asks) = mpsc::channel();
        let incoming = incoming((0..).map(move |pass| {
            let _ = asked.send(pass);
            frame(pass)
        }));
        let next = || asks.recv_timeout(PATIENCE).ok();
        // One more than fit is read and waits for room.
        for pass in 0..=MAX_QUEUE as u64 {
            assert_eq!(next(), Some(pass));
        }
        assert!(asks.try_recv().is_err());
        incoming.recv().unwrap();
        assert_eq!(next(), Some(MAX_QUEUE as u64 + 1));
        drop(incoming);
        // The reader ends, and its link with it.
        while next().is_some() {}
        assert_eq!(asks.try_recv(), Err(TryRecvError::Disconnected));
    }

    #[test]
    fn who_sleeps_elsewhere_is_told_of_each_frame_and_of_the_end() {
        let (tell, told) = mpsc::channel();
        let mut frames = (0..20).map(frame);
        let incoming =
            Incoming::start_with(TestLink::of(|_| {}, move || frames.next()), move || tell.send(()).unwrap());
        let incoming = incoming.unwrap();
        for pass in 0..20 {
            told.recv_timeout(PATIENCE).unwrap();
            assert_eq!(incoming.try_recv().unwrap().unwrap().head.pass, PassId(pass));
        }
        told.recv_timeout(PATIENCE).unwrap();
        assert!(matches!(incoming.try_recv(), Err(IncomingEnd::Closed(_))));
        assert_eq!(told.recv_timeout(PATIENCE), Err(mpsc::RecvTimeoutError::Disconnected));
    }

    #[test]
    fn buffers_are_used_again() {
        let (feed, fed) = mpsc::channel();
        let incoming = incoming(std::iter::from_fn(move || fed.recv().ok()));
        let mut seen = std::collections::HashSet::new();
        for pass in 0..16 {
            feed.send(frame(pass)).unwrap();
            let frame = incoming.recv().unwrap();
            seen.insert(frame.rows.as_ptr());
            incoming.recycle(frame);
        }
        assert_eq!(seen.len(), 1);
    }
}
