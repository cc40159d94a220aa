//! Tensors on disk, named by their hash.
//!
//! A finished tensor is a file named by its BLAKE3; one on its way ends in `.part`, and what is right of that is not
//! fetched again. A file is believed only after its bytes have been hashed, each time it is used, so neither a crash in
//! the middle of a write nor a failing disk can put wrong weights into a model. The least recently used files
//! go first when the cache is full.

use std::collections::HashSet;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use brigade_base::{ByteSize, Hash};

/// Bytes read at once while hashing.
const READ_BYTES: usize = 1 << 20;

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
        fs::create_dir_all(dir)?;
        Ok(Self { dir: dir.to_owned(), limit })
    }

    fn path(&self, hash: &Hash) -> PathBuf {
        self.dir.join(hash.to_string())
    }

    fn part_path(&self, hash: &Hash) -> PathBuf {
        self.dir.join(format!("{hash}.part"))
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
            Err(error) => return Err(error),
        };
        if hash_reader(&mut file)? != *hash {
            tracing::warn!(path = %path.display(), "a cached tensor is damaged; it will be fetched again");
            fs::remove_file(&path)?;
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
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path)?;
        if file.metadata()?.len() > n_bytes {
            file.set_len(0)?;
        }
        Ok(Partial { file: Arc::new(file), path, target: self.path(hash) })
    }

    /// Makes room for `n_bytes` more by removing what was used longest ago, but nothing in `keep`. What of that has
    /// begun to come counts among the `n_bytes`.
    ///
    /// # Errors
    /// If the directory cannot be read, or even an otherwise empty cache would be too small.
    pub fn make_room(&self, n_bytes: u64, keep: &[Hash]) -> io::Result<()> {
        let kept: HashSet<PathBuf> = keep.iter().map(|hash| self.path(hash)).collect();
        let begun: HashSet<PathBuf> = keep.iter().map(|hash| self.part_path(hash)).collect();
        let mut files: Vec<(SystemTime, u64, PathBuf)> = Vec::new();
        let mut used = 0u64;
        for entry in fs::read_dir(&self.dir)? {
            let entry = entry?;
            // What has begun to come is part of the bytes to come.
            if begun.contains(&entry.path()) {
                continue;
            }
            let meta = entry.metadata()?;
            used += meta.len();
            if !kept.contains(&entry.path()) {
                files.push((meta.modified()?, meta.len(), entry.path()));
            }
        }
        files.sort();
        for (_, len, path) in files {
            if used.saturating_add(n_bytes) <= self.limit.0 {
                break;
            }
            fs::remove_file(&path)?;
            used -= len;
        }
        if used.saturating_add(n_bytes) > self.limit.0 {
            return Err(io::Error::new(
                io::ErrorKind::StorageFull,
                format!(
                    "this stage's weights need {} of cache, but the limit is {}; raise --cache-size or give this node \
                     its own copy with --model",
                    ByteSize(used.saturating_add(n_bytes)),
                    self.limit
                ),
            ));
        }
        Ok(())
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
        self.file.write_all_at(bytes, offset)
    }

    /// All bytes are there: the tensor is one of the cache from now on.
    ///
    /// # Errors
    /// If the file cannot be renamed.
    pub fn finish(&self) -> io::Result<Arc<File>> {
        fs::rename(&self.path, &self.target)?;
        Ok(Arc::clone(&self.file))
    }
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
}
