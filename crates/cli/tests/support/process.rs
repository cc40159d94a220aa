//! Processes of the `brigade` program: started with nothing from the environment, ended by their id.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use super::{POLL, eventually};

/// How long a process may take to end once asked.
const GRACE: Duration = Duration::from_secs(3);

/// How long a verb that does one thing may take.
const VERB_TIMEOUT: Duration = Duration::from_secs(60);

/// One running process.
pub struct Process {
    name: String,
    child: Child,
    ended: Option<ExitStatus>,
    out: PathBuf,
    err: PathBuf,
}

fn command(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_brigade"));
    for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("BRIGADE_")) {
        command.env_remove(name);
    }
    // Splits that depend on nothing but memory are the same in every run; tests of speed say so themselves.
    command.env("BRIGADE_OPTIMIZE", "memory").args(args).stdin(Stdio::null());
    command
}

impl Process {
    /// Starts `brigade` with `args`; what it says goes to files in `dir`.
    pub fn spawn(name: &str, dir: &Path, args: &[&str]) -> Self {
        static NEXT: AtomicUsize = AtomicUsize::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let [out, err] = ["out", "err"].map(|kind| dir.join(format!("{name}.{number}.{kind}")));
        let mut command = command(args);
        command.stdout(File::create(&out).unwrap()).stderr(File::create(&err).unwrap());
        Self { name: name.to_owned(), child: command.spawn().unwrap(), ended: None, out, err }
    }

    /// What it wrote to standard output so far.
    pub fn stdout(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(&self.out).unwrap()).into_owned()
    }

    /// What it wrote to standard error so far.
    pub fn stderr(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(&self.err).unwrap()).into_owned()
    }

    /// The rest of the first whole line that starts with `start`, once it is there.
    #[track_caller]
    pub fn line(&self, start: &str) -> String {
        let find = || {
            let text = self.stdout();
            let whole = text.rfind('\n').map_or("", |end| &text[..end]).to_owned();
            whole.lines().find_map(|line| line.strip_prefix(start)).map(|rest| rest.trim().to_owned())
        };
        eventually(&format!("a line {start:?}"), find)
    }

    /// How it ended, if it has.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        if self.ended.is_none() {
            self.ended = self.child.try_wait().unwrap();
        }
        self.ended
    }

    /// Waits until it has ended by itself.
    #[track_caller]
    pub fn wait(&mut self) -> ExitStatus {
        eventually(&format!("the end of {}", self.name), || self.ended())
    }

    /// Sends a signal, such as `TERM`, unless it has ended.
    pub fn signal(&mut self, signal: &str) {
        if self.ended().is_none() {
            let kill = format!("kill -{signal} {}", self.child.id());
            assert!(Command::new("sh").args(["-c", &kill]).status().unwrap().success(), "{kill}");
        }
    }

    /// Asks it to end, as a service manager would, and waits.
    #[track_caller]
    pub fn terminate(&mut self) -> ExitStatus {
        self.signal("TERM");
        self.wait()
    }

    /// Ends it without warning.
    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.ended = Some(self.child.wait().unwrap());
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let name = &self.name;
            eprintln!("--- {name} said\n{}--- {name} complained\n{}", self.stdout(), self.stderr());
        }
        self.signal("TERM");
        let deadline = Instant::now() + GRACE;
        while self.ended().is_none() {
            if Instant::now() >= deadline {
                return self.kill();
            }
            std::thread::sleep(POLL);
        }
    }
}

/// What a verb that has ended left.
#[derive(Debug)]
pub struct Ended {
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

impl Ended {
    /// The output of a verb that must have succeeded.
    #[track_caller]
    pub fn ok(self) -> String {
        assert_eq!(self.code, Some(0), "{self:?}");
        self.stdout
    }
}

/// Runs a verb to its end.
#[track_caller]
pub fn run(args: &[&str]) -> Ended {
    run_with_input(args, "")
}

/// Runs a verb that reads `input`, to its end.
#[track_caller]
pub fn run_with_input(args: &[&str], input: &str) -> Ended {
    let dir = tempfile::tempdir().unwrap();
    let [out, err] = ["out", "err"].map(|name| dir.path().join(name));
    let mut command = command(args);
    command.stdin(Stdio::piped()).stdout(File::create(&out).unwrap()).stderr(File::create(&err).unwrap());
    // Where a verb finds its state if it is not told; so no test sees that of the machine.
    let mut child = command.env("XDG_STATE_HOME", dir.path()).spawn().unwrap();
    // A verb that reads nothing may have gone already.
    let _ = child.stdin.take().unwrap().write_all(input.as_bytes());
    let deadline = Instant::now() + VERB_TIMEOUT;
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break Some(status);
        }
        if Instant::now() >= deadline {
            child.kill().unwrap();
            child.wait().unwrap();
            break None;
        }
        std::thread::sleep(POLL);
    };
    let [stdout, stderr] = [out, err].map(|path| String::from_utf8_lossy(&std::fs::read(path).unwrap()).into_owned());
    let status = status.unwrap_or_else(|| panic!("brigade {args:?} does not end; it said\n{stdout}{stderr}"));
    Ended { code: status.code(), stdout, stderr }
}
