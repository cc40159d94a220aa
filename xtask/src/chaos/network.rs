//! A network for each worker that has a loopback interface and nothing else: whatever address it dials, there is a
//! proxy at it or nobody.
//!
//! A child process that sleeps holds the network; it goes with that child. Only root may make one.

use std::fs::File;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::processes::Processes;

/// How long making a network may take.
const TIMEOUT: Duration = Duration::from_secs(10);

/// What holds a network: it says when it is there, and sleeps for longer than any test.
const HOLD: &str = "ip link set lo up && echo up && exec sleep 2147483647";

/// A network.
#[derive(Clone)]
pub struct Network {
    path: PathBuf,
    file: Arc<File>,
}

impl Network {
    /// A new one, or `None` where this system or user has no means to make it.
    pub fn make(processes: &Processes, name: &str) -> Option<Self> {
        let mut hold = Command::new("unshare");
        hold.args(["--net", "sh", "-c", HOLD]);
        let made = processes.start(name, hold).ok().and_then(|lines| {
            lines.wait_for("a network", TIMEOUT, |line| (line == "up").then_some(())).ok()?;
            let path = PathBuf::from(format!("/proc/{}/ns/net", processes.id(name)?));
            let file = Arc::new(File::open(&path).ok()?);
            Some(Self { path, file })
        });
        if made.is_none() {
            processes.kill(name);
        }
        made
    }

    /// Runs a program in it.
    pub fn command(&self, program: &Path) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net={}", self.path.display())).arg(program);
        command
    }

    /// Lets this thread make its sockets there from now on.
    pub fn enter(&self) -> io::Result<()> {
        Ok(move_into_link_name_space(self.file.as_fd(), Some(LinkNameSpaceType::Network))?)
    }

    /// Listens there.
    pub fn listen(&self, at: SocketAddr) -> io::Result<TcpListener> {
        let network = self.clone();
        let listen = move || network.enter().and_then(|()| TcpListener::bind(at));
        let thread = std::thread::Builder::new().name("listen".to_owned()).spawn(listen)?;
        thread.join().unwrap_or_else(|_| Err(io::Error::other("a thread ended")))
    }
}
