//! What the system tells of itself: the files of `/proc` and `/sys`, and tools that know more.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::str::FromStr;
use std::time::{Duration, Instant};

/// Most bytes of a file that is read: `/proc/stat` of 1024 processors has 200 KiB.
const MAX_BYTES: u64 = 1 << 20;

/// How long a tool may take: none of them does more than to ask the kernel or a settings file.
const TOOL_TIMEOUT: Duration = Duration::from_millis(500);

/// The root of a system's files.
pub(super) struct Machine {
    root: PathBuf,
    /// Whether this is the machine that runs, which tools can be asked about.
    is_here: bool,
}

impl Machine {
    /// The machine that this runs on.
    pub(super) fn here() -> Self {
        Self { root: PathBuf::from("/"), is_here: true }
    }

    /// A machine with these files.
    #[cfg(test)]
    pub(super) fn made_up(root: &Path, files: &[(&str, &str)]) -> Self {
        for (path, text) in files {
            let path = root.join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        Self { root: root.to_owned(), is_here: false }
    }

    /// The path of a file of the system, given without the leading slash.
    pub(super) fn path(&self, path: impl AsRef<Path>) -> PathBuf {
        self.root.join(path)
    }

    /// A file's text without the line's end; `None` if it cannot be read.
    pub(super) fn text(&self, path: impl AsRef<Path>) -> Option<String> {
        let mut bytes = Vec::new();
        File::open(self.path(path)).ok()?.take(MAX_BYTES).read_to_end(&mut bytes).ok()?;
        Some(String::from_utf8_lossy(&bytes).trim_end().to_owned())
    }

    /// A file that holds one number.
    pub(super) fn number<T: FromStr>(&self, path: impl AsRef<Path>) -> Option<T> {
        self.text(path)?.trim().parse().ok()
    }

    /// Names in a directory that begin with `prefix`, sorted.
    pub(super) fn names(&self, dir: impl AsRef<Path>, prefix: &str) -> Vec<String> {
        let entries = std::fs::read_dir(self.path(dir)).into_iter().flatten().flatten();
        let mut names: Vec<String> = entries
            .filter_map(|entry| entry.file_name().into_string().ok())
            .filter(|name| name.starts_with(prefix))
            .collect();
        names.sort();
        names
    }

    /// Whether there is such a file.
    pub(super) fn has(&self, path: impl AsRef<Path>) -> bool {
        self.path(path).exists()
    }

    /// What a tool prints; `None` if it is not there, fails or takes too long.
    pub(super) fn ask(&self, tool: &str, args: &[&str]) -> Option<String> {
        if !self.is_here {
            return None;
        }
        let mut command = Command::new(tool);
        command.args(args).env("LC_ALL", "C").stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut child = command.spawn().ok()?;
        let deadline = Instant::now() + TOOL_TIMEOUT;
        // What these tools print fits into the pipe, so that none waits for a reader.
        let status = loop {
            match child.try_wait() {
                Ok(Some(status)) => break status,
                Ok(None) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(5)),
                _ => {
                    let _ = child.kill();
                    let _ = child.wait();
                    return None;
                }
            }
        };
        let mut text = String::new();
        child.stdout.take()?.take(MAX_BYTES).read_to_string(&mut text).ok()?;
        status.success().then_some(text)
    }
}

/// The numbers of a list as the kernel writes it, such as `0-3,8`. One that cannot be read, or names more than `most`,
/// counts as far as it goes.
pub(super) fn cpu_list(text: &str, most: usize) -> Vec<u32> {
    let mut cpus = Vec::new();
    for part in text.trim().split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (Ok(first), Ok(last)) = (first.parse::<u32>(), last.parse::<u32>()) else { break };
        cpus.extend((first..=last).take(most - cpus.len().min(most)));
    }
    cpus
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_are_read_as_the_kernel_writes_them() {
        assert_eq!(cpu_list("0-3,8\n", 64), [0, 1, 2, 3, 8]);
        assert_eq!(cpu_list("5", 64), [5]);
        assert!(cpu_list("", 64).is_empty());
        assert_eq!(cpu_list("0-4294967295", 3), [0, 1, 2]);
    }

    #[test]
    fn tools_that_are_not_there_or_fail_say_nothing() {
        let machine = Machine::here();
        assert_eq!(machine.ask("no such tool of anybody", &[]), None);
        assert_eq!(machine.ask("false", &[]), None);
        assert_eq!(machine.ask("echo", &["a"]).as_deref(), Some("a\n"));
    }
}
