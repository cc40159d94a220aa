//! [`TcpLink`]: TLS 1.3 over one TCP connection, full duplex without a thread of its own.
//!
//! Three locks, always taken in this order: `sender` or `receiver`, then `tls`.
//! - `tls` is held to encrypt or decrypt, never across a system call.
//! - `sender` is held for a whole frame. Its holder alone moves ciphertext out of `tls` to the socket, so records leave
//!   in the order in which they were encrypted, while the receiver goes on decrypting.
//! - `receiver` is held for a whole frame. The socket is read without `tls`.
//!
//! What the TLS state wants to say by itself (alerts, key updates) comes up while receiving. The receiver sends it if
//! nobody holds `sender`; else it leaves `owes_output`, which the holder looks at after letting go.
//!
//! The socket never blocks; who has to wait does so in `poll`, so deadlines and spinning need no socket option.

use std::io::{self, BufRead, IoSlice, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::atomic::Ordering::{Relaxed, SeqCst};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, fence};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use brigade_base::NodeId;
use rustls::Connection;

use crate::frame::{FRAME_HEADER_BYTES, FrameReader, MAX_FRAME, MAX_SLICES, Pieces, TooLarge, header};
use crate::link::{Link, LinkError, LinkStats};
use crate::socket::{Interest, WRITE_TIMEOUT, is_disconnect, wait, yield_to_others};

/// Longest frame that a link receives before its peer is authorised: a refusal with its message is half of this.
pub const PREAMBLE_FRAME_MAX: usize = 1024;

/// Ciphertext that is read at once: eight TLS records, so that a decode frame of several rows is one system call.
const READ_BUFFER: usize = 128 << 10;

/// A link over TCP and TLS 1.3. Dropping it closes it.
pub struct TcpLink {
    stream: TcpStream,
    peer: NodeId,
    peer_addr: SocketAddr,
    tls: Mutex<Connection>,
    /// Ciphertext on its way to the socket; empty between frames, its memory reused.
    sender: Mutex<Vec<u8>>,
    receiver: Mutex<Receiver>,
    owes_output: AtomicBool,
    /// Nothing can be sent any more.
    ended: AtomicBool,
    /// Nothing is received any more either, not even what has arrived.
    closed: AtomicBool,
    frame_limit: AtomicUsize,
    spin_ns: AtomicU64,
    write_timeout_ms: AtomicU64,
    counters: Counters,
}

struct Receiver {
    /// Ciphertext from the socket; `raw[start..end]` is not yet decrypted.
    raw: Box<[u8]>,
    start: usize,
    end: usize,
    frame: FrameReader,
    /// Payload of a frame that a deadline interrupted.
    partial: Vec<u8>,
}

#[derive(Default)]
struct Counters {
    frames_sent: AtomicU64,
    bytes_sent: AtomicU64,
    frames_received: AtomicU64,
    bytes_received: AtomicU64,
}

impl TcpLink {
    /// A link over a prepared socket whose handshake is done.
    pub(crate) fn new(stream: TcpStream, mut tls: Connection, peer: NodeId) -> io::Result<Self> {
        let peer_addr = stream.peer_addr()?;
        // Pieces bound what is encrypted at once; a limit would only cut them shorter.
        tls.set_buffer_limit(None);
        Ok(Self {
            stream,
            peer,
            peer_addr: SocketAddr::new(peer_addr.ip().to_canonical(), peer_addr.port()),
            tls: Mutex::new(tls),
            sender: Mutex::default(),
            receiver: Mutex::new(Receiver {
                raw: vec![0; READ_BUFFER].into_boxed_slice(),
                start: 0,
                end: 0,
                frame: FrameReader::default(),
                partial: Vec::new(),
            }),
            owes_output: AtomicBool::new(false),
            ended: AtomicBool::new(false),
            closed: AtomicBool::new(false),
            frame_limit: AtomicUsize::new(PREAMBLE_FRAME_MAX),
            spin_ns: AtomicU64::new(0),
            write_timeout_ms: AtomicU64::new(WRITE_TIMEOUT.as_millis() as u64),
            counters: Counters::default(),
        })
    }

    /// Sets how long a sender waits for a peer that takes no bytes; [`WRITE_TIMEOUT`] at first.
    pub fn set_write_timeout(&self, timeout: Duration) {
        self.write_timeout_ms.store(timeout.as_millis().try_into().unwrap_or(u64::MAX), Relaxed);
    }

    /// What this side sends gives way to other links, as far as the system and the network heed that.
    pub fn set_background(&self) {
        if let Err(error) = yield_to_others(&self.stream) {
            tracing::debug!(%error, "the system knows no background traffic");
        }
    }

    /// The address that the peer sees the link come from.
    ///
    /// # Errors
    /// If the socket is broken.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        let addr = self.stream.local_addr()?;
        Ok(SocketAddr::new(addr.ip().to_canonical(), addr.port()))
    }

    /// Ends the connection. What has arrived may still be received, until [`close`](Link::close).
    fn end(&self) {
        if self.ended.swap(true, SeqCst) {
            return;
        }
        // A courtesy that must not wait: the end of the stream says the same.
        if let Ok(mut wire) = self.sender.try_lock()
            && let Ok(mut tls) = self.tls.try_lock()
        {
            tls.send_close_notify();
            if drain(&mut tls, &mut wire).is_ok() {
                let _ = (&self.stream).write(&wire);
            }
            wire.clear();
        }
        // Fails only if the connection is gone already.
        let _ = self.stream.shutdown(Shutdown::Both);
    }

    fn send_frame(&self, wire: &mut Vec<u8>, header: &[u8], parts: &[&[u8]]) -> Result<(), LinkError> {
        let mut pieces = Pieces::new(header, parts);
        let mut slices = [IoSlice::new(&[]); MAX_SLICES];
        loop {
            let n_slices = pieces.next(&mut slices);
            if n_slices == 0 {
                return Ok(());
            }
            let piece = &slices[..n_slices];
            let mut tls = lock(&self.tls);
            let taken = tls.writer().write_vectored(piece).map_err(classify)?;
            if taken != piece.iter().map(|slice| slice.len()).sum::<usize>() {
                // Only a connection that is already closing takes less than it is given.
                return Err(LinkError::Closed);
            }
            drain(&mut tls, wire).map_err(classify)?;
            drop(tls);
            self.write_out(wire)?;
        }
    }

    /// Writes `wire` to the socket and empties it.
    fn write_out(&self, wire: &mut Vec<u8>) -> Result<(), LinkError> {
        let mut rest = &wire[..];
        while !rest.is_empty() {
            match (&self.stream).write(rest) {
                Ok(0) => return Err(LinkError::Closed),
                Ok(n) => rest = &rest[n..],
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.wait_writable()?,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(classify(error)),
            }
        }
        wire.clear();
        Ok(())
    }

    fn wait_writable(&self) -> Result<(), LinkError> {
        let after = Duration::from_millis(self.write_timeout_ms.load(Relaxed));
        match wait(&self.stream, Interest::Write, Instant::now().checked_add(after)) {
            Ok(true) => Ok(()),
            Ok(false) => Err(LinkError::Stalled { after }),
            Err(error) => Err(classify(error)),
        }
    }

    /// Sends what the TLS state wants to say by itself, unless another thread holds `sender`: that one calls this after
    /// letting go.
    fn settle_output(&self) {
        // Either the holder sees our `owes_output`, or we see that it has let go; without the fence neither might.
        fence(SeqCst);
        while self.owes_output.load(SeqCst) {
            let Ok(mut wire) = self.sender.try_lock() else { return };
            self.owes_output.store(false, SeqCst);
            let drained = drain(&mut lock(&self.tls), &mut wire).map_err(classify);
            if drained.and_then(|()| self.write_out(&mut wire)).is_err() {
                drop(wire);
                self.end();
            }
        }
    }

    fn recv_frame(&self, rx: &mut Receiver, buf: &mut Vec<u8>, deadline: Option<Instant>) -> Result<u8, LinkError> {
        loop {
            let kind = self.decrypt(rx, buf);
            if self.owes_output.load(SeqCst) {
                self.settle_output();
            }
            match kind? {
                Some(kind) => return Ok(kind),
                None => self.fill(rx, deadline)?,
            }
        }
    }

    /// Decrypts what was read, up to the end of one frame. `None`: more must be read.
    fn decrypt(&self, rx: &mut Receiver, buf: &mut Vec<u8>) -> Result<Option<u8>, LinkError> {
        let limit = self.frame_limit.load(Relaxed);
        let mut tls = lock(&self.tls);
        loop {
            loop {
                let mut plain = tls.reader();
                let chunk = match plain.fill_buf() {
                    Ok([]) => return Err(LinkError::Closed),
                    Ok(chunk) => chunk,
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                    Err(_) => return Err(LinkError::Closed),
                };
                let taken = rx.frame.absorb(chunk, buf, limit);
                let (taken, kind) = taken.map_err(|TooLarge { len }| LinkError::FrameTooLarge { len, limit })?;
                plain.consume(taken);
                if kind.is_some() {
                    return Ok(kind);
                }
            }
            let mut raw = &rx.raw[rx.start..rx.end];
            if raw.is_empty() {
                return Ok(None);
            }
            rx.start += tls.read_tls(&mut raw).map_err(classify)?;
            let processed = tls.process_new_packets();
            if tls.wants_write() {
                self.owes_output.store(true, SeqCst);
            }
            processed.map_err(LinkError::Tls)?;
        }
    }

    /// Reads what the socket has; waits for it if need be.
    fn fill(&self, rx: &mut Receiver, deadline: Option<Instant>) -> Result<(), LinkError> {
        let spin = Duration::from_nanos(self.spin_ns.load(Relaxed));
        let mut spin_until = None;
        loop {
            match (&self.stream).read(&mut rx.raw) {
                Ok(0) => return Err(LinkError::Closed),
                Ok(n) => {
                    (rx.start, rx.end) = (0, n);
                    return Ok(());
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(classify(error)),
            }
            if self.closed.load(SeqCst) {
                return Err(LinkError::Closed);
            }
            if deadline.is_some() || !spin.is_zero() {
                let now = Instant::now();
                if deadline.is_some_and(|deadline| deadline <= now) {
                    return Err(LinkError::TimedOut);
                }
                if now < *spin_until.get_or_insert(now + spin) {
                    std::hint::spin_loop();
                    continue;
                }
            }
            wait(&self.stream, Interest::Read, deadline).map_err(classify)?;
        }
    }
}

impl Link for TcpLink {
    fn send(&self, kind: u8, parts: &[&[u8]]) -> Result<(), LinkError> {
        let len = parts.iter().fold(0usize, |sum, part| sum.saturating_add(part.len()));
        if len > MAX_FRAME {
            return Err(LinkError::FrameTooLarge { len, limit: MAX_FRAME });
        }
        let mut wire = lock(&self.sender);
        let sent = if self.ended.load(SeqCst) {
            Err(LinkError::Closed)
        } else {
            self.send_frame(&mut wire, &header(kind, len), parts)
        };
        drop(wire);
        match &sent {
            Ok(()) => {
                self.counters.frames_sent.fetch_add(1, Relaxed);
                self.counters.bytes_sent.fetch_add((FRAME_HEADER_BYTES + len) as u64, Relaxed);
                self.settle_output();
            }
            // What the peer said before it went may still be received.
            Err(_) => self.end(),
        }
        sent
    }

    fn recv(&self, buf: &mut Vec<u8>, deadline: Option<Instant>) -> Result<u8, LinkError> {
        let mut rx = lock(&self.receiver);
        buf.clear();
        if !rx.partial.is_empty() {
            std::mem::swap(buf, &mut rx.partial);
        }
        let received =
            if self.closed.load(SeqCst) { Err(LinkError::Closed) } else { self.recv_frame(&mut rx, buf, deadline) };
        match &received {
            Ok(_) => {
                self.counters.frames_received.fetch_add(1, Relaxed);
                self.counters.bytes_received.fetch_add((FRAME_HEADER_BYTES + buf.len()) as u64, Relaxed);
                return received;
            }
            Err(LinkError::TimedOut) if rx.frame.is_mid_frame() => std::mem::swap(buf, &mut rx.partial),
            Err(LinkError::TimedOut) => {}
            Err(_) => self.close(),
        }
        buf.clear();
        received
    }

    fn peer(&self) -> NodeId {
        self.peer
    }

    fn peer_addr(&self) -> String {
        self.peer_addr.to_string()
    }

    fn close(&self) {
        self.closed.store(true, SeqCst);
        self.end();
    }

    fn stats(&self) -> LinkStats {
        LinkStats {
            frames_sent: self.counters.frames_sent.load(Relaxed),
            bytes_sent: self.counters.bytes_sent.load(Relaxed),
            frames_received: self.counters.frames_received.load(Relaxed),
            bytes_received: self.counters.bytes_received.load(Relaxed),
        }
    }

    fn set_frame_limit(&self, bytes: usize) {
        self.frame_limit.store(bytes.min(MAX_FRAME), Relaxed);
    }

    fn set_spin(&self, spin: Duration) {
        self.spin_ns.store(spin.as_nanos().try_into().unwrap_or(u64::MAX), Relaxed);
    }
}

impl Drop for TcpLink {
    fn drop(&mut self) {
        self.close();
    }
}

impl std::fmt::Debug for TcpLink {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TcpLink").field("peer", &self.peer).field("peer_addr", &self.peer_addr).finish_non_exhaustive()
    }
}

/// Moves all ciphertext from the TLS state to `wire`.
fn drain(tls: &mut Connection, wire: &mut Vec<u8>) -> io::Result<()> {
    while tls.wants_write() {
        tls.write_tls(wire)?;
    }
    Ok(())
}

fn classify(error: io::Error) -> LinkError {
    if is_disconnect(&error) {
        return LinkError::Closed;
    }
    // The TLS state repeats the error that ended it.
    match error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>()) {
        Some(tls) => LinkError::Tls(tls.clone()),
        None => LinkError::Io(error),
    }
}

/// A panic elsewhere leaves these states whole: each is a buffer or a state machine that changes in one call.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
