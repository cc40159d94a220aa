//! Links without a network, for tests: one that does with frames what the test says, and one with two ends.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use brigade_base::NodeId;
use brigade_net::{Link, LinkError, LinkStats};

type OnSend = dyn Fn(u8, &[&[u8]]) + Send + Sync;
type OnRecv = dyn FnMut() -> Option<(u8, Vec<u8>)> + Send;

/// A link whose two ends are functions.
pub struct TestLink {
    on_send: Box<OnSend>,
    on_recv: Mutex<Box<OnRecv>>,
}

impl TestLink {
    /// `on_send` gets the parts of each frame; `on_recv` gives the next frame, or `None` once the link is closed.
    pub fn of(
        on_send: impl Fn(&[&[u8]]) + Send + Sync + 'static,
        on_recv: impl FnMut() -> Option<(u8, Vec<u8>)> + Send + 'static,
    ) -> Arc<dyn Link> {
        Self::with_kinds(move |_, parts| on_send(parts), on_recv)
    }

    /// The same, and `on_send` gets the kind of each frame too.
    pub fn with_kinds(
        on_send: impl Fn(u8, &[&[u8]]) + Send + Sync + 'static,
        on_recv: impl FnMut() -> Option<(u8, Vec<u8>)> + Send + 'static,
    ) -> Arc<dyn Link> {
        Arc::new(Self { on_send: Box::new(on_send), on_recv: Mutex::new(Box::new(on_recv)) })
    }
}

impl Link for TestLink {
    fn send(&self, kind: u8, parts: &[&[u8]]) -> Result<(), LinkError> {
        (self.on_send)(kind, parts);
        Ok(())
    }

    fn recv(&self, buf: &mut Vec<u8>, _deadline: Option<Instant>) -> Result<u8, LinkError> {
        let mut on_recv = self.on_recv.lock().unwrap();
        let (kind, bytes) = on_recv().ok_or(LinkError::Closed)?;
        *buf = bytes;
        Ok(kind)
    }

    fn peer(&self) -> NodeId {
        NodeId::from_bytes([0; 32])
    }

    fn peer_addr(&self) -> String {
        String::new()
    }

    fn close(&self) {}

    fn stats(&self) -> LinkStats {
        LinkStats::default()
    }

    fn set_frame_limit(&self, _bytes: usize) {}

    fn set_spin(&self, _spin: Duration) {}
}

/// Frames that have not arrived, and whether the link is closed.
type Frames = (VecDeque<(u8, Vec<u8>)>, bool);

/// Frames on their way from one end to the other.
#[derive(Default)]
struct Way {
    frames: Mutex<Frames>,
    changed: Condvar,
}

/// One end of a link between two nodes.
pub struct PairedLink {
    peer: NodeId,
    out: Arc<Way>,
    back: Arc<Way>,
}

impl PairedLink {
    /// Both ends of a link: that of `here`, and that of `there`.
    pub fn between(here: NodeId, there: NodeId) -> [Arc<dyn Link>; 2] {
        let (a, b) = (Arc::<Way>::default(), Arc::<Way>::default());
        let near = Self { peer: there, out: Arc::clone(&a), back: Arc::clone(&b) };
        [Arc::new(near), Arc::new(Self { peer: here, out: b, back: a })]
    }
}

impl Link for PairedLink {
    fn send(&self, kind: u8, parts: &[&[u8]]) -> Result<(), LinkError> {
        let mut frames = self.out.frames.lock().unwrap();
        if frames.1 {
            return Err(LinkError::Closed);
        }
        frames.0.push_back((kind, parts.concat()));
        self.out.changed.notify_all();
        Ok(())
    }

    fn recv(&self, buf: &mut Vec<u8>, deadline: Option<Instant>) -> Result<u8, LinkError> {
        let mut frames = self.back.frames.lock().unwrap();
        loop {
            if let Some((kind, bytes)) = frames.0.pop_front() {
                *buf = bytes;
                return Ok(kind);
            }
            if frames.1 {
                return Err(LinkError::Closed);
            }
            let left = deadline.map_or(Duration::MAX, |at| at.saturating_duration_since(Instant::now()));
            if left.is_zero() {
                return Err(LinkError::TimedOut);
            }
            frames = self.back.changed.wait_timeout(frames, left.min(Duration::from_secs(60))).unwrap().0;
        }
    }

    fn peer(&self) -> NodeId {
        self.peer
    }

    fn peer_addr(&self) -> String {
        String::new()
    }

    fn close(&self) {
        for way in [&self.out, &self.back] {
            way.frames.lock().unwrap().1 = true;
            way.changed.notify_all();
        }
    }

    fn stats(&self) -> LinkStats {
        LinkStats::default()
    }

    fn set_frame_limit(&self, _bytes: usize) {}

    fn set_spin(&self, _spin: Duration) {}
}

impl Drop for PairedLink {
    fn drop(&mut self) {
        self.close();
    }
}
