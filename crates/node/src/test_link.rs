//! A link without a network, for tests: what it does with frames is up to the test.

use std::sync::{Arc, Mutex};
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
