//! The disks that weights come from and go to: what kind they are, and how fast.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::Duration;

use brigade_base::ByteSize;
use brigade_protocol::measure::Finding;
use rustix::fs::statvfs;

use super::machine::Machine;
use super::{Subject, fail, ok, warn};
use crate::measure::disk;

/// Most bytes that are read, and for how long at most.
const READ: (usize, Duration) = (64 << 20, Duration::from_millis(300));

/// Shorter files are read in no time that could be told.
const SHORTEST: u64 = 8 << 20;

/// Below this a disk is slower than a gigabit link, from which weights could come instead.
const SLOW_MB_S: f64 = 100.0;

/// Below this there is trouble even with small models.
const SLOW_WRITE_MB_S: f64 = 50.0;

/// Fewer bytes than these load in a moment from any disk. Virtual disks often claim to turn, so that alone says little.
const TELLING: ByteSize = ByteSize::mib(64);

/// Less than this is left by a disk that is full.
const LITTLE_SPACE: ByteSize = ByteSize::gib(1);

/// File systems whose bytes come over a network, or through another system.
const DISTANT: [&str; 14] = [
    "nfs",
    "nfs4",
    "cifs",
    "smb3",
    "smbfs",
    "9p",
    "afs",
    "ceph",
    "virtiofs",
    "davfs",
    "fuse.sshfs",
    "fuse.rclone",
    "fuse.glusterfs",
    "fuse.s3fs",
];

/// What is known of the disks.
#[derive(Debug, Clone)]
pub(super) struct Disk {
    /// Megabytes written in a second where the state is, or why none were.
    written: Result<f64, String>,
    free: Option<ByteSize>,
    /// The node's copy of the model, or the largest file that it has of one.
    weights: Option<Weights>,
}

/// A file of weights.
#[derive(Debug, Clone)]
struct Weights {
    path: PathBuf,
    size: ByteSize,
    /// Kind of its file system.
    kind: Option<String>,
    is_rotational: bool,
    /// Megabytes read in a second, past what the system keeps in memory.
    read: Option<f64>,
}

impl Disk {
    /// Measures the disks.
    pub(super) fn gather(machine: &Machine, subject: &Subject) -> Self {
        let dir = &subject.state_dir;
        let free = statvfs(dir).ok().map(|fs| ByteSize(fs.f_bavail.saturating_mul(fs.f_frsize)));
        let weights = subject.model.clone().or_else(|| largest_file(&dir.join("cache")));
        Self {
            written: write_speed(dir).map_err(|error| error.to_string()),
            free,
            weights: weights.and_then(|path| Weights::gather(machine, path)),
        }
    }

    /// What follows from that.
    pub(super) fn judge(&self) -> Vec<Finding> {
        let mut findings = vec![self.judge_state()];
        findings.extend(self.weights.as_ref().map(Weights::judge));
        findings
    }

    fn judge_state(&self) -> Finding {
        let speed = match &self.written {
            Ok(speed) => *speed,
            Err(error) => {
                return fail("disk", error, "free space where the state directory is, or name another");
            }
        };
        let free = self.free.map(|free| format!("; {free} are free")).unwrap_or_default();
        let detail = format!("{speed:.0} MB/s written where the state is{free}");
        if self.free.is_some_and(|free| free < LITTLE_SPACE) {
            let cost = "weights that do not fit into the cache are fetched again at each start";
            return warn("disk", detail, cost, "free some, or put --state-dir on another disk");
        }
        if speed < SLOW_WRITE_MB_S {
            let cost = format!("each GiB of fetched weights takes {:.0} s to keep", 1073.7 / speed.max(0.1));
            return warn("disk", detail, cost, "put --state-dir on a faster disk");
        }
        ok("disk", detail)
    }
}

impl Weights {
    fn gather(machine: &Machine, path: PathBuf) -> Option<Self> {
        let path = path.canonicalize().ok()?;
        let size = ByteSize(path.metadata().ok()?.len());
        let mount = machine.text("proc/self/mountinfo").and_then(|mounts| mount_of(&mounts, &path));
        let (kind, device) = mount.map_or((None, None), |(kind, device)| (Some(kind), Some(device)));
        let is_rotational = device.is_some_and(|device| {
            let dir = format!("sys/dev/block/{device}");
            // A partition has it above itself.
            let queue = ["queue", "../queue"].into_iter();
            queue.filter_map(|queue| machine.number(format!("{dir}/{queue}/rotational"))).any(|flag: u8| flag == 1)
        });
        Some(Self { read: read_speed(&path).ok().flatten(), path, size, kind, is_rotational })
    }

    fn judge(&self) -> Finding {
        let name = self.path.file_name().unwrap_or_default().to_string_lossy();
        let load_s = |mb_s: f64| self.size.0 as f64 / 1e6 / mb_s.max(0.1);
        let what = match (&self.kind, self.is_rotational) {
            (Some(kind), true) => format!("{kind}, on a hard disk as the system says"),
            (Some(kind), false) => kind.clone(),
            (None, _) => "a disk of unknown kind".to_owned(),
        };
        let speed = self.read.map(|mb_s| format!(", {mb_s:.0} MB/s read")).unwrap_or_default();
        let detail = format!("{name} ({}) is on {what}{speed}", self.size);
        let cost = match self.read {
            Some(mb_s) => {
                format!("reading all of it takes {:.0} s, at the start and whenever layers move", load_s(mb_s))
            }
            None => "not measured: at the start, and whenever layers move".to_owned(),
        };
        let fix = "put the model on a disk of this machine, an SSD if there is one";
        if self.kind.as_deref().is_some_and(|kind| DISTANT.contains(&kind)) {
            return warn("weights", detail, cost, fix);
        }
        if self.read.is_some_and(|mb_s| mb_s < SLOW_MB_S)
            || (self.is_rotational && self.read.is_none() && self.size >= TELLING)
        {
            return warn("weights", detail, cost, fix);
        }
        ok("weights", detail)
    }
}

/// Megabytes that a directory's disk takes in a second.
fn write_speed(dir: &Path) -> std::io::Result<f64> {
    // A file without a name: it is gone with the process, however that ends.
    let mut file = tempfile::tempfile_in(dir)?;
    Ok(disk::write_bytes_per_s(&mut file)? / 1e6)
}

/// Megabytes that a file gives in a second, from its middle, where the system has least cause to have it in memory;
/// `None` if it is too short to tell, or cannot be had from the disk.
fn read_speed(path: &Path) -> std::io::Result<Option<f64>> {
    let mut file = File::open(path)?;
    let len = file.metadata()?.len();
    if len < SHORTEST {
        return Ok(None);
    }
    let speed = disk::read_bytes_per_s(&mut file, len / 2, READ.0, READ.1)?;
    Ok(speed.map(|bytes_per_s| bytes_per_s / 1e6))
}

/// The largest of a directory's files and those of directories in it.
fn largest_file(dir: &Path) -> Option<PathBuf> {
    let files = |dir: &Path| std::fs::read_dir(dir).into_iter().flatten().flatten();
    let sized = |entry: std::fs::DirEntry| Some((entry.metadata().ok()?, entry.path()));
    let (dirs, mut found): (Vec<_>, Vec<_>) = files(dir).filter_map(sized).partition(|(metadata, _)| metadata.is_dir());
    found.extend(dirs.iter().flat_map(|(_, dir)| files(dir)).filter_map(sized));
    let found = found.into_iter().filter(|(metadata, _)| metadata.is_file());
    found.max_by_key(|(metadata, _)| metadata.len()).map(|(_, path)| path)
}

/// Kind of the file system that a path is on, and the number of its device.
fn mount_of(mounts: &str, path: &Path) -> Option<(String, String)> {
    let mount = |line: &str| {
        let (head, tail) = line.split_once(" - ")?;
        let mut fields = head.split(' ').skip(2);
        let (device, point) = (fields.next()?, fields.nth(1)?.replace("\\040", " "));
        path.starts_with(&point)
            .then(|| (point.len(), tail.split(' ').next().unwrap_or("").to_owned(), device.to_owned()))
    };
    // Of several mounts at one place the last one is seen.
    let found = mounts.lines().filter_map(mount).max_by_key(|(len, ..)| *len);
    found.map(|(_, kind, device)| (kind, device))
}

#[cfg(test)]
mod tests {
    use super::super::tests::trouble;
    use super::*;

    fn weights() -> Weights {
        Weights {
            path: PathBuf::from("/m/model.gguf"),
            size: ByteSize::gib(4),
            kind: Some("ext4".to_owned()),
            is_rotational: false,
            read: Some(1000.0),
        }
    }

    #[track_caller]
    fn check(weights: Weights, is_well: bool, words: &str) {
        let finding = weights.judge();
        assert_eq!(trouble(std::slice::from_ref(&finding)).is_empty(), is_well, "{finding:?}");
        assert!(format!("{finding:?}").contains(words), "{finding:?}");
    }

    #[test]
    fn disks_of_weights_are_judged() {
        check(weights(), true, "model.gguf (4.0 GiB) is on ext4, 1000 MB/s read");
        check(Weights { read: Some(40.0), ..weights() }, false, "takes 107 s");
        check(Weights { kind: Some("nfs4".to_owned()), ..weights() }, false, "is on nfs4");
        check(Weights { is_rotational: true, ..weights() }, true, "is on ext4, on a hard disk");
        check(Weights { is_rotational: true, read: None, ..weights() }, false, "not measured");
        check(Weights { is_rotational: true, read: None, size: ByteSize::mib(1), ..weights() }, true, "1.0 MiB");
        check(Weights { kind: None, read: None, ..weights() }, true, "unknown kind");
    }

    #[test]
    fn the_state_directory_is_judged() {
        let judge = |written: Result<f64, String>, free| Disk { written, free, weights: None }.judge();
        assert!(trouble(&judge(Ok(500.0), Some(ByteSize::gib(50)))).is_empty());
        assert_eq!(judge(Ok(10.0), None)[0].cost, "each GiB of fetched weights takes 107 s to keep");
        assert_eq!(trouble(&judge(Ok(500.0), Some(ByteSize::mib(50)))).len(), 1);
        let full = judge(Err("no space".to_owned()), None);
        assert_eq!((full[0].severity, &*full[0].detail), (brigade_protocol::measure::Severity::Fail, "no space"));
    }

    #[test]
    fn the_nearest_mount_is_the_one_that_counts() {
        let mounts = "22 1 8:2 / / rw - ext4 /dev/sda2 rw\n\
                      30 22 0:40 / /mnt/my\\040files rw shared:1 - nfs4 box:/x rw\n\
                      31 22 8:17 / /mnt rw - xfs /dev/sdb1 rw\n";
        let of = |path: &str| mount_of(mounts, Path::new(path)).map(|(kind, device)| format!("{kind} {device}"));
        assert_eq!(of("/srv/x").as_deref(), Some("ext4 8:2"));
        assert_eq!(of("/mnt/x").as_deref(), Some("xfs 8:17"));
        assert_eq!(of("/mnt/my files/m.gguf").as_deref(), Some("nfs4 0:40"));
        assert_eq!(of("/mnt2/x").as_deref(), Some("ext4 8:2"));
    }

    #[test]
    fn files_are_measured() {
        let dir = tempfile::tempdir().unwrap();
        assert!(write_speed(dir.path()).unwrap() > 0.0);
        assert!(write_speed(&dir.path().join("missing")).is_err());
        std::fs::create_dir(dir.path().join("deep")).unwrap();
        std::fs::write(dir.path().join("small"), [0; 10]).unwrap();
        let large = dir.path().join("deep/large");
        std::fs::write(&large, vec![1; 9 << 20]).unwrap();
        assert_eq!(largest_file(dir.path()), Some(large.clone()));
        assert_eq!(read_speed(&large).unwrap().is_some(), cfg!(target_os = "linux"));
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 2, "what was written is gone");
        assert_eq!(read_speed(&dir.path().join("small")).unwrap(), None);
    }
}
