//! Tensors on disk, named by their hash.
//!
//! A finished tensor is a file named by its BLAKE3; one on its way ends in `.part`, and what is right of that is not
//! fetched again. A file is believed only after its bytes have been hashed, each time it is used, so neither a crash in
//! the middle of a write nor a failing disk can put wrong weights into a model. The least recently used files
//! go first when the cache or its disk is full. Whatever else is in the directory is left alone.

use std::collections::HashSet;
use std::ffi::OsStr;
use std::fs::{self, File, Metadata, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use brigade_base::{ByteSize, Hash};
use brigade_store::Limits;
use rustix::fs::statvfs;

/// Bytes read at once while hashing.
const READ_BYTES: usize = 1 << 20;

/// How names of tensors end that are on their way.
const PART: &str = ".part";

/// A disk keeps as much free as pulls leave there, but no more than this share of it: the cache of a machine with an 8
/// GiB card may fill all but 512 MiB.
const RESERVE_SHARE: u64 = 16;

/// Bytes of the blocks in which systems count what a file takes.
const COUNTED_BLOCK: u64 = 512;

/// A directory of tensors.
#[derive(Debug)]
pub struct Cache {
    dir: PathBuf,
    limit: ByteSize,
}

impl Cache {
    /// The cache in `dir`, which is made if need be.
    ///
    /// # Errors
    /// If the directory cannot be made.
    pub fn open(dir: &Path, limit: ByteSize) -> io::Result<Self> {
        fs::create_dir_all(dir).map_err(|error| about(dir, &error))?;
        Ok(Self { dir: dir.to_owned(), limit })
    }

    fn path(&self, hash: &Hash) -> PathBuf {
        self.dir.join(hash.to_string())
    }

    fn part_path(&self, hash: &Hash) -> PathBuf {
        self.dir.join(format!("{hash}{PART}"))
    }

    /// The tensor of this hash, if it is here and whole. A file with other bytes is removed.
    ///
    /// # Errors
    /// If the file cannot be read.
    pub fn get(&self, hash: &Hash) -> io::Result<Option<File>> {
        let path = self.path(hash);
        let mut file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(about(&path, &error)),
        };
        if hash_reader(&mut file).map_err(|error| about(&path, &error))? != *hash {
            tracing::warn!(path = %path.display(), "a cached tensor is damaged; it will be fetched again");
            fs::remove_file(&path).map_err(|error| about(&path, &error))?;
            return Ok(None);
        }
        // Its time of modification is its last use; failing to note it only makes it go earlier.
        let _ = file.set_modified(SystemTime::now());
        Ok(Some(file))
    }

    /// The tensor of this hash as it was when it was last looked at, for others: they hash it themselves.
    pub fn peek(&self, hash: &Hash) -> Option<File> {
        File::open(self.path(hash)).ok()
    }

    /// Removes a tensor that is damaged.
    pub fn remove(&self, hash: &Hash) {
        let path = self.path(hash);
        if let Err(error) = fs::remove_file(&path) {
            tracing::warn!(path = %path.display(), %error, "a damaged tensor could not be removed");
        }
    }

    /// Begins or continues a tensor.
    ///
    /// # Errors
    /// If the file cannot be made or read.
    pub fn begin(&self, hash: &Hash, n_bytes: u64) -> io::Result<Partial> {
        let path = self.part_path(hash);
        let open = || {
            let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path)?;
            if file.metadata()?.len() > n_bytes {
                file.set_len(0)?;
            }
            Ok(file)
        };
        let file = open().map_err(|error| about(&path, &error))?;
        Ok(Partial { file: Arc::new(file), path, target: self.path(hash) })
    }

    /// Makes room for `n_bytes` more, in the cache and on its disk, by removing what was used longest ago, but nothing
    /// in `keep`. What of that has begun to come counts among the `n_bytes`.
    ///
    /// # Errors
    /// If the directory cannot be read, or even an otherwise empty cache would be too small; nothing is removed then.
    pub fn make_room(&self, n_bytes: u64, keep: &[Hash]) -> io::Result<()> {
        self.make_room_on(Disk::of(&self.dir), n_bytes, keep)
    }

    /// The same on a disk of which so much is known.
    fn make_room_on(&self, disk: Option<Disk>, n_bytes: u64, keep: &[Hash]) -> io::Result<()> {
        let in_dir = |error: io::Error| about(&self.dir, &error);
        let kept: HashSet<PathBuf> = keep.iter().map(|hash| self.path(hash)).collect();
        let begun: HashSet<PathBuf> = keep.iter().map(|hash| self.part_path(hash)).collect();
        // What the cache is to hold, and what the disk has to take for that.
        let (mut held, mut taken) = (n_bytes, n_bytes);
        let mut files: Vec<(SystemTime, PathBuf, Metadata)> = Vec::new();
        for entry in fs::read_dir(&self.dir).map_err(in_dir)? {
            let entry = entry.map_err(in_dir)?;
            let (path, meta) = (entry.path(), entry.metadata().map_err(in_dir)?);
            if !meta.is_file() || !is_tensor(&entry.file_name()) {
                continue;
            }
            // What has begun to come is part of the bytes to come.
            if begun.contains(&path) {
                taken = taken.saturating_sub(on_disk(&meta));
                continue;
            }
            held = held.saturating_add(meta.len());
            if !kept.contains(&path) {
                files.push((meta.modified().map_err(in_dir)?, path, meta));
            }
        }
        let removable = |bytes: fn(&Metadata) -> u64| files.iter().map(|(.., meta)| bytes(meta)).sum::<u64>();
        let least = held - removable(Metadata::len);
        if least > self.limit.0 {
            return Err(self.is_too_small(least));
        }
        let mut room = disk.map_or(u64::MAX, |disk| disk.free);
        let reserve = disk.map_or(0, |disk| disk.reserve);
        let most = room.saturating_add(removable(on_disk)).saturating_sub(reserve);
        if taken > most {
            return Err(self.disk_is_full(taken, most, reserve));
        }
        files.sort_by(|a, b| (a.0, &a.1).cmp(&(b.0, &b.1)));
        for (_, path, meta) in files {
            if held <= self.limit.0 && taken <= room.saturating_sub(reserve) {
                break;
            }
            fs::remove_file(&path).map_err(|error| about(&path, &error))?;
            held -= meta.len();
            room = room.saturating_add(on_disk(&meta));
        }
        Ok(())
    }

    fn is_too_small(&self, needed: u64) -> io::Error {
        let (needed, limit, dir) = (ByteSize(needed), self.limit, self.dir.display());
        let why = format!(
            "this stage's weights need {needed} of cache, but the limit is {limit} in {dir}; raise --cache-size or \
             give this node its own copy with --model"
        );
        io::Error::new(io::ErrorKind::StorageFull, why)
    }

    fn disk_is_full(&self, needed: u64, room: u64, reserve: u64) -> io::Error {
        let (needed, room, reserve, dir) = (ByteSize(needed), ByteSize(room), ByteSize(reserve), self.dir.display());
        let why = format!(
            "this stage's weights need {needed} more in {dir}, but its disk has room for {room} beside {reserve} that \
             stay free; free some space there, name a directory on another disk with --state-dir, or give this node \
             its own copy with --model"
        );
        io::Error::new(io::ErrorKind::StorageFull, why)
    }
}

/// What a disk has.
#[derive(Debug, Clone, Copy)]
struct Disk {
    /// Bytes that a user may still write.
    free: u64,
    /// Those of them that are to stay free, for whatever else is there.
    reserve: u64,
}

impl Disk {
    /// The disk with `dir`; `None` where the system does not tell.
    fn of(dir: &Path) -> Option<Self> {
        let fs = statvfs(dir).ok()?;
        // Some file systems that are reached over a network say nothing of their size.
        let bytes = |n_blocks: u64| n_blocks.saturating_mul(fs.f_frsize);
        (fs.f_blocks > 0).then(|| Self::new(bytes(fs.f_blocks), bytes(fs.f_bavail)))
    }

    fn new(total: u64, free: u64) -> Self {
        Self { free, reserve: Limits::default().reserve_bytes.min(total / RESERVE_SHARE) }
    }
}

/// A tensor on its way into the cache. Its blocks come in any order; whoever writes them has verified them.
#[derive(Debug)]
pub struct Partial {
    file: Arc<File>,
    path: PathBuf,
    target: PathBuf,
}

impl Partial {
    /// Fills `buf` with what is there from `offset` on, which may be of any earlier time. False if it is not so much.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn read(&self, offset: u64, buf: &mut [u8]) -> io::Result<bool> {
        match self.file.read_exact_at(buf, offset) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Writes bytes that are the right ones.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all_at(bytes, offset).map_err(|error| about(&self.path, &error))
    }

    /// All bytes are there: the tensor is one of the cache from now on.
    ///
    /// # Errors
    /// If the file cannot be renamed.
    pub fn finish(&self) -> io::Result<Arc<File>> {
        fs::rename(&self.path, &self.target).map_err(|error| about(&self.path, &error))?;
        Ok(Arc::clone(&self.file))
    }
}

/// Whether a file is the cache's: named by a hash, whole or on its way.
fn is_tensor(name: &OsStr) -> bool {
    name.to_str().is_some_and(|name| name.strip_suffix(PART).unwrap_or(name).parse::<Hash>().is_ok())
}

/// What a file takes of the disk, which is less than its length where blocks in its middle are still to come.
fn on_disk(meta: &Metadata) -> u64 {
    meta.blocks().saturating_mul(COUNTED_BLOCK)
}

/// An error with the place where it came about, and what helps if that is full.
fn about(path: &Path, error: &io::Error) -> io::Error {
    let help = match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            "; free some space there, or name a directory on another disk with --state-dir"
        }
        _ => "",
    };
    io::Error::new(error.kind(), format!("{}: {error}{help}", path.display()))
}

fn to_hash(hasher: &blake3::Hasher) -> Hash {
    Hash::from_bytes(*hasher.finalize().as_bytes())
}

fn read_into(reader: &mut impl Read, hasher: &mut blake3::Hasher) -> io::Result<()> {
    let mut buf = vec![0; READ_BYTES];
    loop {
        match reader.read(&mut buf)? {
            0 => return Ok(()),
            n => hasher.update(&buf[..n]),
        };
    }
}

/// BLAKE3 of all that a reader yields.
///
/// # Errors
/// If it cannot be read.
pub fn hash_reader(reader: &mut impl Read) -> io::Result<Hash> {
    let mut hasher = blake3::Hasher::new();
    read_into(reader, &mut hasher)?;
    Ok(to_hash(&hasher))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hash(bytes: &[u8]) -> Hash {
        hash_reader(&mut &bytes[..]).unwrap()
    }

    fn put(cache: &Cache, bytes: &[u8]) -> Hash {
        let hash = hash(bytes);
        let partial = cache.begin(&hash, bytes.len() as u64).unwrap();
        partial.write(0, bytes).unwrap();
        partial.finish().unwrap();
        hash
    }

    #[test]
    fn a_tensor_is_continued_with_what_is_there() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::open(dir.path(), ByteSize(1000)).unwrap();
        let hash = hash(b"weights");
        cache.begin(&hash, 7).unwrap().write(4, b"hts").unwrap();
        assert!(cache.get(&hash).unwrap().is_none() && cache.peek(&hash).is_none());
        let partial = cache.begin(&hash, 7).unwrap();
        let mut there = [1; 7];
        assert!(partial.read(0, &mut there).unwrap());
        assert_eq!(&there, b"\0\0\0\0hts");
        assert!(!partial.read(3, &mut there).unwrap(), "so much is not there");
        partial.write(0, b"weig").unwrap();
        partial.finish().unwrap();
        assert!(cache.get(&hash).unwrap().is_some() && cache.peek(&hash).is_some());
    }

    #[test]
    fn a_damaged_tensor_is_noticed() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::open(dir.path(), ByteSize(1000)).unwrap();
        let stored = put(&cache, b"weights");
        fs::write(cache.path(&stored), b"weightz").unwrap();
        assert!(cache.get(&stored).unwrap().is_none());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_partial_file_longer_than_the_tensor_starts_anew() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::open(dir.path(), ByteSize(1000)).unwrap();
        let hash = hash(b"abc");
        fs::write(cache.part_path(&hash), b"abcdef").unwrap();
        let partial = cache.begin(&hash, 3).unwrap();
        assert!(!partial.read(0, &mut [0]).unwrap());
        partial.write(0, b"abc").unwrap();
        partial.finish().unwrap();
        assert!(cache.get(&hash).unwrap().is_some());
    }

    #[test]
    fn the_oldest_go_first_and_the_needed_stay() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::open(dir.path(), ByteSize(25)).unwrap();
        let (old, needed, young) = (put(&cache, &[1; 10]), put(&cache, &[2; 5]), put(&cache, &[3; 10]));
        for (i, hash) in [&needed, &old, &young].into_iter().enumerate() {
            let time = SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(i as u64);
            File::options().append(true).open(cache.path(hash)).unwrap().set_modified(time).unwrap();
        }
        cache.make_room(8, &[needed]).unwrap();
        assert!(cache.get(&old).unwrap().is_none());
        assert!(cache.get(&needed).unwrap().is_some() && cache.get(&young).unwrap().is_some());
        // A transfer that broke off is no second need for the same bytes.
        let begun = hash(b"begun");
        cache.begin(&begun, 8).unwrap().write(7, b"!").unwrap();
        cache.make_room(8, &[needed, begun]).unwrap();
        assert!(cache.part_path(&begun).exists() && cache.get(&young).unwrap().is_some());
        let error = cache.make_room(30, &[needed]).unwrap_err();
        assert!(error.to_string().contains("--cache-size"), "{error}");
    }

    const LARGE: u64 = 64 << 10;

    /// Bytes that no file system makes fewer.
    fn large(seed: u8) -> Vec<u8> {
        let mut bytes = vec![0; LARGE as usize];
        blake3::Hasher::new().update(&[seed]).finalize_xof().fill(&mut bytes);
        bytes
    }

    /// A tensor that was used at `time` and takes as much of the disk as it is long.
    fn put_large(cache: &Cache, seed: u8, time: u64) -> Hash {
        let hash = put(cache, &large(seed));
        let file = File::options().append(true).open(cache.path(&hash)).unwrap();
        file.sync_all().unwrap();
        file.set_modified(SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(time)).unwrap();
        hash
    }

    #[test]
    fn a_disk_that_is_full_is_a_limit_too() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::open(dir.path(), ByteSize::mib(100)).unwrap();
        let needed = put_large(&cache, 1, 0);
        let (old, young) = (put_large(&cache, 2, 1), put_large(&cache, 3, 2));
        let disk = |free| Some(Disk { free, reserve: 4 << 10 });
        // More than both give: nothing is thrown away in vain.
        let error = cache.make_room_on(disk(0), 2 * LARGE, &[needed]).unwrap_err().to_string();
        let place = dir.path().display().to_string();
        assert!(error.contains(&place) && error.contains("--state-dir") && error.contains("4.0 KiB"), "{error}");
        assert!(cache.peek(&old).is_some() && cache.peek(&young).is_some());
        // There is room.
        cache.make_room_on(disk(LARGE + (4 << 10)), LARGE, &[needed]).unwrap();
        assert!(cache.peek(&old).is_some());
        // There is, but for what is to stay free.
        cache.make_room_on(disk(LARGE), LARGE, &[needed]).unwrap();
        assert!(cache.peek(&old).is_none());
        assert!(cache.peek(&needed).is_some() && cache.peek(&young).is_some());
        // What has come of a tensor needs no room any more.
        let begun = hash(b"begun");
        let partial = cache.begin(&begun, 2 * LARGE).unwrap();
        partial.write(0, &large(4)).unwrap();
        partial.file.sync_all().unwrap();
        cache.make_room_on(disk(LARGE + (4 << 10)), 2 * LARGE, &[needed, begun]).unwrap();
        assert!(cache.peek(&young).is_some());
    }

    #[test]
    fn the_disk_of_the_cache_is_asked() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::open(dir.path(), ByteSize(u64::MAX)).unwrap();
        let error = cache.make_room(1 << 60, &[]).unwrap_err().to_string();
        assert!(error.contains(&dir.path().display().to_string()) && error.contains("--state-dir"), "{error}");
        let reserves = [Disk::new(6 << 20, 0), Disk::new(1 << 40, 0)].map(|disk| disk.reserve);
        assert_eq!(reserves, [384 << 10, 512 << 20]);
    }

    #[test]
    fn what_is_not_the_caches_stays() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::open(dir.path(), ByteSize(10)).unwrap();
        let old = put(&cache, &[1; 10]);
        let unfinished = hash(b"unfinished");
        cache.begin(&unfinished, 10).unwrap().write(0, b"unf").unwrap();
        let others = ["lost+found", "notes.txt", "notes.part"].map(|name| dir.path().join(name));
        fs::create_dir(&others[0]).unwrap();
        fs::create_dir(cache.path(&hash(b"a directory"))).unwrap();
        others[1..].iter().for_each(|path| fs::write(path, [0; 1000]).unwrap());
        cache.make_room(10, &[]).unwrap();
        assert!(cache.peek(&old).is_none() && !cache.part_path(&unfinished).exists());
        assert!(others.iter().all(|path| path.exists()) && cache.path(&hash(b"a directory")).exists());
        let error = cache.make_room(11, &[]).unwrap_err().to_string();
        assert!(error.contains(&dir.path().display().to_string()) && error.contains("--cache-size"), "{error}");
    }
}
