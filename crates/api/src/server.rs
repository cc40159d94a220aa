//! Connections: accepting them, bounding them, and ending them well.
//!
//! One task accepts; each connection has a task of its own that ends when its client leaves, when it is idle or does
//! not read for too long, or when the server stops. [`Server`] wraps this with a runtime of its own for callers that
//! have none.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::Duration;

use axum::Router;
use brigade_node::serving::Serving;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::Runtime;
use tokio::sync::{Semaphore, oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use crate::gate::Gate;
use crate::patience::Patient;
use crate::{ApiOptions, routes};

/// Connections at once. Each holds a socket and two buffers of some KiB; as many more wait in the listener's
/// queue, which the system may shorten: with the usual 128 a thousand clients that come at once are partly cut off.
const MAX_CONNECTIONS: usize = 4096;
/// How long a client may take to send a request's head, and a connection may idle between two. Longer than clients'
/// own pools keep one, so that a client never writes into a connection that is just being closed.
const HEAD_TIMEOUT: Duration = Duration::from_secs(60);
/// How long a client may take no byte of what it asked for: as long as the usual proxies wait. Until then the sockets'
/// buffers are full already, which hold some hundred KiB, so a client that computes between two reads has longer.
const READ_TIMEOUT: Duration = Duration::from_secs(60);
/// Most bytes of a head; what is read ahead of a body counts too.
const HEAD_BYTES: usize = 64 << 10;
/// How long answers may go on once the server stops.
const GRACE: Duration = Duration::from_secs(2);
/// Added to [`GRACE`] for the tasks to end before the runtime is dropped under them.
const GRACE_MARGIN: Duration = Duration::from_millis(500);
/// Pause after a failed accept: the usual cause is that file descriptors ran out, and only time gives them back.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Threads that move bytes. Streams cost microseconds per token; the second one keeps them going beside a large body.
const WORKERS: usize = 2;
/// Threads for what blocks or computes for long. Most of that are templates and tokenizing, which [`crate::prompts`]
/// keeps from taking them all.
pub(crate) const BLOCKING_THREADS: usize = 4;

/// Answers on `listener` until `shutdown` completes, and then for at most two seconds more.
pub async fn serve(listener: TcpListener, router: Router, shutdown: impl Future<Output = ()>) {
    let mut shutdown = pin!(shutdown);
    let room = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let (stopping, stop) = watch::channel(false);
    let mut connections = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            () = &mut shutdown => break,
            Some(_) = connections.join_next() => continue,
            accepted = accept(&listener, &room) => accepted,
        };
        match accepted {
            Ok((stream, permit)) => {
                let connection = connection(stream, router.clone(), stop.clone());
                connections.spawn(async move {
                    connection.await;
                    drop(permit);
                });
            }
            Err(error) => {
                tracing::warn!(%error, "a connection could not be accepted");
                sleep(ACCEPT_PAUSE).await;
            }
        }
    }
    drop(listener);
    stopping.send_replace(true);
    let all_ended = async { while connections.join_next().await.is_some() {} };
    if timeout(GRACE, all_ended).await.is_err() {
        tracing::info!(open = connections.len(), "connections are cut off");
        connections.shutdown().await;
    }
}

/// The next connection, once there is room for it.
async fn accept(
    listener: &TcpListener,
    room: &Arc<Semaphore>,
) -> io::Result<(TcpStream, tokio::sync::OwnedSemaphorePermit)> {
    let permit = room.clone().acquire_owned().await.map_err(io::Error::other)?;
    let (stream, _) = listener.accept().await?;
    // A token is a small packet that should not wait for the next one.
    stream.set_nodelay(true)?;
    Ok((stream, permit))
}

/// Serves one connection to its end.
async fn connection<S>(stream: S, router: Router, mut stop: watch::Receiver<bool>)
where
    S: AsyncRead + AsyncWrite + Unpin + Send,
{
    let stream = Patient::new(stream, READ_TIMEOUT);
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .max_buf_size(HEAD_BYTES)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(router));
    let mut connection = pin!(connection);
    let ended = tokio::select! {
        ended = &mut connection => ended,
        () = stopping(&mut stop) => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "a connection ended early");
    }
}

/// Completes once the server stops.
async fn stopping(stop: &mut watch::Receiver<bool>) {
    // An error says that the sender is gone, which is a stop too.
    drop(stop.wait_for(|stopping| *stopping).await);
}

/// The endpoint with threads of its own, for callers that are not async. Dropping it stops it without waiting.
#[derive(Debug)]
pub struct Server {
    addr: SocketAddr,
    gate: Arc<Gate>,
    /// Dropped to stop.
    stop: Option<oneshot::Sender<()>>,
    /// Closes when the last connection has ended.
    ended: Receiver<()>,
    runtime: Option<Runtime>,
}

impl Server {
    /// Answers on `listener` from threads of its own.
    ///
    /// # Errors
    /// If the listener cannot be used or threads cannot be started.
    pub fn start(listener: std::net::TcpListener, serving: Arc<dyn Serving>, options: &ApiOptions) -> io::Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(WORKERS)
            .max_blocking_threads(BLOCKING_THREADS)
            .thread_name("brigade-api")
            .enable_all()
            .build()?;
        // Once more, with a longer queue than the standard library asks for.
        socket2::SockRef::from(&listener).listen(MAX_CONNECTIONS as i32)?;
        listener.set_nonblocking(true)?;
        let addr = listener.local_addr()?;
        let listener = {
            let _inside = runtime.enter();
            TcpListener::from_std(listener)?
        };
        let gate = Arc::<Gate>::default();
        let router = routes::router(serving, options, Arc::clone(&gate));
        let (stop, stopped) = oneshot::channel::<()>();
        let (end, ended) = std::sync::mpsc::channel();
        runtime.spawn(async move {
            serve(listener, router, async { drop(stopped.await) }).await;
            drop(end);
        });
        Ok(Self { addr, gate, stop: Some(stop), ended, runtime: Some(runtime) })
    }

    /// Where it listens.
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// Refuses completions from now on with 503; those that are under way go on, and everything else is answered.
    pub fn drain(&self) {
        self.gate.close();
    }

    /// Completions that are under way, from their arrival to the last byte of the answer.
    pub fn n_answering(&self) -> usize {
        self.gate.n_inside()
    }

    /// Takes no more requests, lets answers end for up to two seconds, and cuts off the rest.
    pub fn stop(mut self) {
        drop(self.stop.take());
        if let Err(RecvTimeoutError::Timeout) = self.ended.recv_timeout(GRACE + GRACE_MARGIN) {
            tracing::warn!("the endpoint did not end in time; its threads are left behind");
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;
    use std::pin::Pin;
    use std::sync::Mutex;
    use std::task::{Context, Poll};

    use axum::body::Body;
    use axum::routing::get;
    use bytes::Bytes;
    use http_body::Frame;
    use tokio::io::{AsyncWriteExt, duplex};
    use tokio::time::Instant;

    use super::*;

    /// A body without end, which tells when it is dropped, as a session does.
    struct Endless(Option<oneshot::Sender<()>>);

    impl http_body::Body for Endless {
        type Data = Bytes;
        type Error = Infallible;

        fn poll_frame(
            self: Pin<&mut Self>,
            _: &mut Context<'_>,
        ) -> Poll<Option<Result<Frame<Self::Data>, Self::Error>>> {
            Poll::Ready(Some(Ok(Frame::data(Bytes::from_static(&[b'x'; 1024])))))
        }
    }

    impl Drop for Endless {
        fn drop(&mut self) {
            self.0.take().map(|dropped| dropped.send(()));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_never_reads_holds_no_session() {
        let (dropped, is_dropped) = oneshot::channel();
        let body = Arc::new(Mutex::new(Some(Endless(Some(dropped)))));
        let answer = move || std::future::ready(Body::new(body.lock().unwrap().take().unwrap()));
        let router = Router::new().route("/", get(answer));
        let (server, mut client) = duplex(4096);
        let (_running, stop) = watch::channel(false);
        client.write_all(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n").await.unwrap();
        let begin = Instant::now();
        connection(server, router, stop).await;
        is_dropped.await.unwrap();
        assert!((READ_TIMEOUT..2 * READ_TIMEOUT).contains(&begin.elapsed()));
    }
}
