//! The seam between nodes and the way their bytes travel.

use std::io;
use std::time::{Duration, Instant};

use brigade_base::NodeId;

/// Why a frame was not sent or received.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// The link has ended: the peer closed it or died, or this side closed it. Every later call says the same.
    #[error("the link is closed")]
    Closed,
    /// The deadline passed before a whole frame was there. The link is as good as before and keeps what arrived.
    #[error("no frame arrived in time")]
    TimedOut,
    /// A frame is longer than allowed. One to send was not sent; one that the peer announced has closed the link.
    #[error("a frame of {len} bytes is longer than the {limit} allowed on this link")]
    FrameTooLarge {
        /// Bytes of its payload.
        len: usize,
        /// Bytes allowed.
        limit: usize,
    },
    /// The peer took no bytes for so long that the link was closed.
    #[error("the peer has taken no bytes for {} s; it hangs or its network does", after.as_secs())]
    Stalled {
        /// How long the sender waited.
        after: Duration,
    },
    /// The peer sent what is not TLS, or refused what this side sent. The link is closed.
    #[error("the encrypted link failed: {0}")]
    Tls(#[source] rustls::Error),
    /// The socket failed. The link is closed.
    #[error("the link's socket failed: {0}")]
    Io(#[source] io::Error),
}

/// What went over a link so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct LinkStats {
    /// Whole frames sent.
    pub frames_sent: u64,
    /// Bytes of them with their headers, before encryption.
    pub bytes_sent: u64,
    /// Whole frames received.
    pub frames_received: u64,
    /// Bytes of them with their headers, after decryption.
    pub bytes_received: u64,
}

/// An authenticated connection to one other node that carries whole frames in order, both directions at once.
///
/// Any thread may call anything. Several senders take turns by whole frames; several receivers do too, which is seldom
/// useful. A sender that waits for the peer never holds up the receiver.
pub trait Link: Send + Sync {
    /// Sends one frame: `parts` one after the other are its payload. Returns when the system has taken all bytes.
    ///
    /// # Errors
    /// [`LinkError::FrameTooLarge`] above [`MAX_FRAME`](crate::MAX_FRAME) bytes; any other error has closed the link.
    fn send(&self, kind: u8, parts: &[&[u8]]) -> Result<(), LinkError>;

    /// Waits for the next frame, puts its payload into `buf` (replacing the content, reusing the memory) and returns
    /// its kind. Without a `deadline` it waits until the link ends. A frame that has arrived is returned even if the
    /// deadline has passed.
    ///
    /// # Errors
    /// [`LinkError::TimedOut`] leaves the link usable and `buf` empty; any other error has closed the link.
    fn recv(&self, buf: &mut Vec<u8>, deadline: Option<Instant>) -> Result<u8, LinkError>;

    /// Who the peer proved to be.
    fn peer(&self) -> NodeId;

    /// Where the peer is, for people.
    fn peer_addr(&self) -> String;

    /// Ends both directions at once and wakes whoever waits in [`recv`](Self::recv) or [`send`](Self::send). Harmless
    /// when repeated. Frames that were sent before still reach a peer that reads them.
    fn close(&self);

    /// What went over the link so far.
    fn stats(&self) -> LinkStats;

    /// Sets the longest payload that is received, in bytes; never above [`MAX_FRAME`](crate::MAX_FRAME).
    fn set_frame_limit(&self, bytes: usize);

    /// Lets [`recv`](Self::recv) ask the socket again and again for this long before it sleeps. Saves the wake-up,
    /// which costs more than the frame's way over a LAN, and burns a core meanwhile: for links that expect a frame
    /// soon, where a core is free. Zero at first.
    fn set_spin(&self, spin: Duration);
}
