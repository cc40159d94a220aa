//! TCP sockets as links want them: no delay, dead peers noticed, never blocking where nobody asked for it.

use std::io;
use std::net::TcpStream;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use socket2::{SockRef, TcpKeepalive};

/// How long a sender waits for a peer that takes no bytes. Readers run apart from computing, so a healthy peer stops
/// reading only while its disk or its memory is slow, which is seconds; a peer stopped for longer will not come back in
/// time for anybody. Heartbeats notice a vanished machine earlier, this is for one that is there and stuck.
pub const WRITE_TIMEOUT: Duration = Duration::from_secs(10);

/// How long sent bytes may stay unacknowledged before the kernel gives the connection up. Like [`WRITE_TIMEOUT`]: the
/// kernel counts a peer with a full window as unacknowledged too, so less would end links that merely wait.
#[cfg(any(target_os = "linux", target_os = "android"))]
const USER_TIMEOUT: Duration = WRITE_TIMEOUT;

/// An idle link asks after its peer this early and this often; a vanished machine is noticed after
/// 2 s + 4 x 2 s = 10 s, the same as on a busy link.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(2);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(2);
const KEEPALIVE_RETRIES: u32 = 4;

/// Traffic class of a link that others go before: CS1, which routers and Wi-Fi take for background.
const BACKGROUND_CLASS: u32 = 0x20;

/// The kernel's class for bulk, which it sends behind all others where they wait for one network card.
#[cfg(any(target_os = "linux", target_os = "android"))]
const BACKGROUND_PRIORITY: u32 = 2;

/// What to wait for.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Interest {
    Read,
    Write,
}

/// Sets the options of a link's socket, non-blocking among them.
pub(crate) fn prepare(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    stream.set_nonblocking(true)?;
    let socket = SockRef::from(stream);
    let keepalive =
        TcpKeepalive::new().with_time(KEEPALIVE_IDLE).with_interval(KEEPALIVE_INTERVAL).with_retries(KEEPALIVE_RETRIES);
    socket.set_tcp_keepalive(&keepalive)?;
    #[cfg(any(target_os = "linux", target_os = "android"))]
    socket.set_tcp_user_timeout(Some(USER_TIMEOUT))?;
    Ok(())
}

/// Lets what other sockets send go first, as far as the kernel and the network heed that.
pub(crate) fn yield_to_others(stream: &TcpStream) -> io::Result<()> {
    let socket = SockRef::from(stream);
    match stream.local_addr()?.is_ipv4() {
        true => socket.set_tos_v4(BACKGROUND_CLASS)?,
        #[cfg(any(target_os = "linux", target_os = "android", target_os = "macos"))]
        false => socket.set_tclass_v6(BACKGROUND_CLASS)?,
        #[cfg(not(any(target_os = "linux", target_os = "android", target_os = "macos")))]
        false => {}
    }
    #[cfg(any(target_os = "linux", target_os = "android"))]
    socket.set_priority(BACKGROUND_PRIORITY)?;
    Ok(())
}

/// Sleeps until the socket is ready, closed or broken (true) or `deadline` has passed (false).
pub(crate) fn wait(stream: &TcpStream, interest: Interest, deadline: Option<Instant>) -> io::Result<bool> {
    let flags = match interest {
        Interest::Read => PollFlags::IN,
        Interest::Write => PollFlags::OUT,
    };
    poll_until(&mut [PollFd::new(stream, flags)], deadline)
}

/// Sleeps until one of `fds` has an event (true) or `deadline` has passed (false).
pub(crate) fn poll_until(fds: &mut [PollFd<'_>], deadline: Option<Instant>) -> io::Result<bool> {
    loop {
        let left = deadline.map(|deadline| {
            let left = deadline.saturating_duration_since(Instant::now());
            // A deadline beyond 68 years is none that anybody waits for.
            Timespec { tv_sec: left.as_secs().min(i32::MAX as u64) as _, tv_nsec: left.subsec_nanos() as _ }
        });
        match poll(fds, left.as_ref()) {
            Ok(0) => return Ok(false),
            Ok(_) => return Ok(true),
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// Whether the error says that the peer is gone, as opposed to something being wrong here.
pub(crate) fn is_disconnect(error: &io::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset, NotConnected, TimedOut, UnexpectedEof};
    matches!(error.kind(), BrokenPipe | ConnectionAborted | ConnectionReset | NotConnected | TimedOut | UnexpectedEof)
}
