//! The links of a cluster: a network for each worker from which only forwarders lead to the others.
//!
//! As in `cargo xtask chaos`, a worker has a [`Network`] with a loopback interface and nothing else. In it somebody
//! listens at the address of every other node: a [`Shaper`], which carries the connection out over the two wires
//! between those nodes. The coordinator is outside and finds each worker at an address of 127.0.1.0/24 in the same way.
//! So no link has a way around its wires, whoever dials, and the two of a pair share them. Only root may make networks.

use std::io;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use socket2::{Domain, Protocol, Socket, Type};

use super::clusters::{ClusterPlan, Link};
use crate::chaos::network::Network;
use crate::failure::{Failure, Outcome};
use crate::processes::Processes;
use crate::shaper::{LinkShape, Shaper, Wire};

/// A link that nothing shapes in a cluster with others that are: as loopback, but through a forwarder.
const UNSHAPED: LinkShape =
    LinkShape { latency: std::time::Duration::ZERO, jitter: std::time::Duration::ZERO, bytes_per_s: 10e9 };

/// The links of a running cluster; they end when it is dropped.
pub struct Net {
    workers: Vec<Seat>,
    /// They listen as long as they are held.
    _shapers: Vec<Shaper>,
}

/// Where a worker is.
struct Seat {
    network: Network,
    ip: Ipv4Addr,
    /// Where others find it; it listens at the same port of its own loopback.
    seen_as: SocketAddr,
    /// For the coordinator, which is outside.
    front: Option<TcpListener>,
}

impl Net {
    /// Makes the networks and forwarders of a cluster whose coordinator listens at `coordinator`.
    ///
    /// # Errors
    /// Where this user may not make networks, among others.
    pub fn make(processes: &Processes, plan: &ClusterPlan, coordinator: SocketAddr) -> Outcome<Self> {
        let mut workers = Vec::new();
        for k in 1..plan.nodes.len() {
            let network = Network::make(processes, &format!("network-{k}"));
            let network = network.ok_or_else(|| Failure::said("shaped links need root, `unshare` and `nsenter`"))?;
            let ip = Ipv4Addr::new(127, 0, 1, k as u8);
            let front = TcpListener::bind((ip, 0)).map_err(Failure::io("a port for a worker"))?;
            let seen_as = front.local_addr().map_err(Failure::io("a port for a worker"))?;
            workers.push(Seat { network, ip, seen_as, front: Some(front) });
        }
        let shapers = connect(&mut workers, plan, coordinator).map_err(Failure::io("the links between nodes"))?;
        Ok(Self { workers, _shapers: shapers })
    }

    /// Runs a program as worker `k`, counted from 1.
    pub fn command(&self, k: usize, program: &Path) -> Command {
        self.workers[k - 1].network.command(program)
    }

    /// Where that worker must listen.
    pub fn listen(&self, k: usize) -> SocketAddr {
        self.workers[k - 1].inside()
    }
}

impl Seat {
    fn inside(&self) -> SocketAddr {
        SocketAddr::from((Ipv4Addr::LOCALHOST, self.seen_as.port()))
    }

    /// Makes connections to it.
    fn dial(&self) -> impl Fn() -> io::Result<TcpStream> + Send + Sync + 'static {
        let (network, inside) = (self.network.clone(), self.inside());
        move || {
            network.enter()?;
            TcpStream::connect(inside)
        }
    }
}

/// A forwarder for each ordered pair of nodes, and two wires for each pair.
fn connect(workers: &mut [Seat], plan: &ClusterPlan, coordinator: SocketAddr) -> io::Result<Vec<Shaper>> {
    let n = workers.len() + 1;
    let wire = |from: usize, to: usize| {
        let shape = Link::shape(plan.link_of(from, to)).unwrap_or(UNSHAPED);
        Arc::new(Wire::new(shape, (from * n + to) as u64))
    };
    let wires: Vec<Vec<Arc<Wire>>> = (0..n).map(|from| (0..n).map(|to| wire(from, to)).collect()).collect();
    let pair = |from: usize, to: usize| (Arc::clone(&wires[from][to]), Arc::clone(&wires[to][from]));
    let mut shapers = Vec::new();
    for k in 1..n {
        if let Some(front) = workers[k - 1].front.take() {
            let (there, back) = pair(0, k);
            shapers.push(Shaper::start(front, workers[k - 1].dial(), there, back)?);
        }
        let own = &workers[k - 1];
        let ip = own.ip;
        let (there, back) = pair(k, 0);
        let dial = move || connect_from(ip, coordinator);
        shapers.push(Shaper::start(own.network.listen(coordinator)?, dial, there, back)?);
        for other in (1..n).filter(|other| *other != k) {
            let (there, back) = pair(k, other);
            let to = &workers[other - 1];
            shapers.push(Shaper::start(own.network.listen(to.seen_as)?, to.dial(), there, back)?);
        }
    }
    Ok(shapers)
}

/// A connection that comes from `ip`: the coordinator tells the others to find a worker where it sees it.
fn connect_from(ip: Ipv4Addr, to: SocketAddr) -> io::Result<TcpStream> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::TCP))?;
    socket.bind(&SocketAddr::from((ip, 0)).into())?;
    socket.connect(&to.into())?;
    Ok(socket.into())
}
