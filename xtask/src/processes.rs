//! Child processes that never outlive this one, and the directory that they work in.
//!
//! [`Processes`] owns the children and a temporary directory. It ends the one and removes the other when it is dropped,
//! so also on an error and a panic, and on Ctrl-C or SIGTERM, for which it installs the handler. Each child is first
//! asked to stop, and killed if it does not. What a child writes to standard output arrives as lines; its standard
//! error goes to a file in the directory, whose end becomes part of the error message if the child fails.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use crate::failure::{Failure, Outcome};
use crate::output;

/// How long a child may take to stop once asked; its own shutdown is bounded by two seconds.
const GRACE: Duration = Duration::from_secs(3);

/// How often an ending child is looked at: short beside the tens of milliseconds that ending takes.
const POLL: Duration = Duration::from_millis(5);

/// How often a wait for a line looks whether a child has died meanwhile.
const CHECK: Duration = Duration::from_millis(100);

/// Lines of a child that may wait to be read; the rest waits in its pipe.
const MAX_LINES: usize = 1024;

/// How much of a failed child's log becomes part of an error: some lines.
const LOG_TAIL_BYTES: usize = 2000;

/// Exit code after Ctrl-C, as shells have it: 128 + SIGINT.
const INTERRUPTED: i32 = 130;

/// Children and their directory.
pub struct Processes {
    held: Arc<Mutex<Held>>,
    dir: PathBuf,
}

#[derive(Default)]
struct Held {
    running: Vec<Running>,
    dir: Option<TempDir>,
    /// Small disks in the directory.
    mounts: Vec<PathBuf>,
    /// Set by the signal handler: nothing is started any more.
    interrupted: bool,
}

struct Running {
    name: String,
    child: Child,
    log: PathBuf,
}

fn lock(held: &Mutex<Held>) -> MutexGuard<'_, Held> {
    held.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Processes {
    /// No children, and an empty directory. Once in a process, since it takes over its signals.
    pub fn new() -> Outcome<Self> {
        let dir = tempfile::Builder::new().prefix("brigade-xtask-").tempdir();
        let dir = dir.map_err(Failure::io("a temporary directory"))?;
        let path = dir.path().to_owned();
        let held = Arc::new(Mutex::new(Held { dir: Some(dir), ..Held::default() }));
        let on_signal = Arc::clone(&held);
        let handler = move || {
            let mut held = lock(&on_signal);
            held.interrupted = true;
            held.end();
            held.clean();
            output::error("interrupted");
            std::process::exit(INTERRUPTED);
        };
        ctrlc::set_handler(handler).map_err(Failure::said)?;
        Ok(Self { held, dir: path })
    }

    /// The process of a running child.
    pub fn id(&self, name: &str) -> Option<u32> {
        lock(&self.held).running.iter().find(|running| running.name == name).map(|running| running.child.id())
    }

    /// Sends a signal to a running child.
    pub fn signal(&self, name: &str, signal: Signal) -> Outcome {
        let held = lock(&self.held);
        let child = held.running.iter().find(|running| running.name == name);
        let child = child.ok_or_else(|| Failure::said(format!("{name} does not run")))?;
        let sent = kill_process(Pid::from_child(&child.child), signal);
        sent.map_err(|error| Failure::said(format!("{name} cannot be sent a signal: {error}")))
    }

    /// Ends a child without warning; that it failed is no failure. False if it does not run.
    pub fn kill(&self, name: &str) -> bool {
        self.take(name).is_some_and(|mut running| {
            let _ = running.child.kill();
            running.child.wait().is_ok()
        })
    }

    /// How a child ended that does so by itself; it is killed if it does not `within` that time.
    pub fn ended(&self, name: &str, within: Duration) -> Outcome<ExitStatus> {
        let failed = |why: &dyn std::fmt::Display| Failure::said(format!("{name} {why}"));
        let mut running = self.take(name).ok_or_else(|| failed(&"does not run"))?;
        let deadline = Instant::now() + within;
        loop {
            match running.child.try_wait() {
                Ok(Some(status)) => return Ok(status),
                Ok(None) if Instant::now() < deadline => std::thread::sleep(POLL),
                Ok(None) => {
                    let _ = running.child.kill();
                    let _ = running.child.wait();
                    return Err(failed(&format!("did not end within {within:?}{}", log_tail(&running.log))));
                }
                Err(error) => return Err(failed(&error)),
            }
        }
    }

    fn take(&self, name: &str) -> Option<Running> {
        let mut held = lock(&self.held);
        let at = held.running.iter().position(|running| running.name == name)?;
        Some(held.running.swap_remove(at))
    }

    /// Makes `dir`, which is inside of this one's directory, a disk of its own with so many bytes, in memory. False
    /// where the system does not let us: anything but Linux, and anyone but root.
    pub fn small_disk(&self, dir: &Path, n_bytes: u64) -> bool {
        let options = std::ffi::CString::new(format!("size={n_bytes},mode=700")).unwrap_or_default();
        let made = std::fs::create_dir_all(dir).is_ok()
            && mount("brigade", dir, "tmpfs", MountFlags::NOSUID | MountFlags::NODEV, options.as_c_str()).is_ok();
        if made {
            lock(&self.held).mounts.push(dir.to_owned());
        }
        made
    }

    /// Why a child ended that nobody has ended, if one did.
    pub fn failed(&self) -> Option<String> {
        lock(&self.held).failed()
    }

    /// Where children keep their state.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Starts a child that is called `name` in messages.
    pub fn start(&self, name: &str, mut command: Command) -> Outcome<Lines> {
        let failed = |error| Failure::Io { what: format!("{name} cannot be started"), source: error };
        let log = self.dir.join(format!("{name}.log"));
        // A child that is started again goes on in the same file.
        let stderr = File::options().create(true).append(true).open(&log).map_err(failed)?;
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(stderr);
        let mut held = lock(&self.held);
        if held.interrupted {
            return Err(Failure::said("interrupted"));
        }
        let mut child = command.spawn().map_err(failed)?;
        let stdout = child.stdout.take();
        held.running.push(Running { name: name.to_owned(), child, log: log.clone() });
        drop(held);
        let (sender, lines) = sync_channel(MAX_LINES);
        if let Some(stdout) = stdout {
            std::thread::Builder::new().name(name.to_owned()).spawn(move || read(stdout, &sender)).map_err(failed)?;
        }
        Ok(Lines { name: name.to_owned(), lines, log, held: Arc::clone(&self.held) })
    }

    /// Resident memory of all running children that is their own and no mapped file; `None` where the system does not
    /// tell (anything but Linux).
    pub fn anonymous_bytes(&self) -> Option<u64> {
        let held = lock(&self.held);
        let of = |running: &Running| {
            let status = std::fs::read_to_string(format!("/proc/{}/status", running.child.id())).ok()?;
            let kib: u64 = status
                .lines()
                .find_map(|line| line.strip_prefix("RssAnon:"))?
                .split_whitespace()
                .next()?
                .parse()
                .ok()?;
            Some(kib * 1024)
        };
        held.running.iter().map(of).sum()
    }

    /// Ends all children and waits until they are gone.
    pub fn end(&self) {
        lock(&self.held).end();
    }
}

impl Drop for Processes {
    fn drop(&mut self) {
        let mut held = lock(&self.held);
        held.end();
        held.clean();
    }
}

impl Held {
    /// Removes the directory. What cannot be removed is in the system's directory for such things.
    fn clean(&mut self) {
        for path in self.mounts.drain(..) {
            let _ = unmount(&path, UnmountFlags::DETACH);
        }
        self.dir = None;
    }

    fn end(&mut self) {
        for running in &self.running {
            // It fails if the child has ended already.
            let _ = kill_process(Pid::from_child(&running.child), Signal::TERM);
        }
        let deadline = Instant::now() + GRACE;
        for mut running in self.running.drain(..) {
            while matches!(running.child.try_wait(), Ok(None)) && Instant::now() < deadline {
                std::thread::sleep(POLL);
            }
            let _ = running.child.kill();
            let _ = running.child.wait();
        }
    }

    /// The first child that has failed, in words.
    fn failed(&mut self) -> Option<String> {
        self.running.iter_mut().find_map(|running| match running.child.try_wait() {
            Ok(Some(status)) if !status.success() => {
                Some(format!("{} ended with {status}{}", running.name, log_tail(&running.log)))
            }
            _ => None,
        })
    }
}

fn read(stdout: ChildStdout, lines: &SyncSender<String>) {
    // Goes on after the receiver is gone, so that the child never blocks on a full pipe.
    for line in BufReader::new(stdout).lines().map_while(Result::ok) {
        let _ = lines.send(line);
    }
}

fn log_tail(log: &Path) -> String {
    let text = std::fs::read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(&text[text.len().saturating_sub(LOG_TAIL_BYTES)..]).into_owned();
    if text.trim().is_empty() { String::new() } else { format!("; it wrote: {}", text.trim()) }
}

/// What a child writes to standard output.
pub struct Lines {
    name: String,
    lines: Receiver<String>,
    log: PathBuf,
    held: Arc<Mutex<Held>>,
}

impl Lines {
    /// The first value that `pick` finds in a line.
    ///
    /// # Errors
    /// If it does not come `within` that time, or a child fails meanwhile.
    pub fn wait_for<T>(&self, what: &str, within: Duration, mut pick: impl FnMut(&str) -> Option<T>) -> Outcome<T> {
        let deadline = Instant::now() + within;
        loop {
            match self.lines.recv_timeout(CHECK) {
                Ok(line) => {
                    if let Some(found) = pick(&line) {
                        return Ok(found);
                    }
                }
                Err(RecvTimeoutError::Disconnected) => {
                    let reason = lock(&self.held).failed();
                    let reason = reason.unwrap_or_else(|| format!("{} ended{}", self.name, log_tail(&self.log)));
                    return Err(Failure::said(format!("waiting for {what}: {reason}")));
                }
                Err(RecvTimeoutError::Timeout) => {
                    if let Some(reason) = lock(&self.held).failed() {
                        return Err(Failure::said(format!("waiting for {what}: {reason}")));
                    }
                }
            }
            if Instant::now() >= deadline {
                let tail = log_tail(&self.log);
                return Err(Failure::said(format!("{} did not bring {what} within {within:?}{tail}", self.name)));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command
    }

    /// One test for all, since the signal handler can be installed only once in a process.
    #[test]
    fn children_are_heard_and_ended() {
        let within = Duration::from_secs(30);
        let processes = Processes::new().unwrap();
        let dir = processes.dir().to_owned();
        let deaf = processes.start("deaf", shell("trap '' TERM; echo started; while :; do sleep 0.1; done")).unwrap();
        deaf.wait_for("a start", within, |line| (line == "started").then_some(())).unwrap();
        let failing = processes.start("failing", shell("echo oops >&2; exit 3")).unwrap();
        let error = failing.wait_for("a word", within, |_| Some(())).unwrap_err().to_string();
        assert!(error.contains("failing ended") && error.contains("oops"), "{error}");
        // A failed child is noticed while another one is waited for.
        let error = deaf.wait_for("more", within, |_| None::<()>).unwrap_err().to_string();
        assert!(error.contains("failing ended"), "{error}");
        let pid = Pid::from_child(&lock(&processes.held).running[0].child);
        assert!(processes.ended("failing", within).is_ok_and(|status| status.code() == Some(3)));
        assert!(processes.ended("failing", within).is_err() && processes.failed().is_none());
        processes.start("victim", shell("exec sleep 600")).unwrap();
        processes.signal("victim", Signal::STOP).unwrap();
        assert!(processes.kill("victim") && !processes.kill("victim") && processes.failed().is_none());
        drop(processes);
        assert!(rustix::process::test_kill_process(pid).is_err(), "the deaf child lives on");
        assert!(!dir.exists());
    }
}
