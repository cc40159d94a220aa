//! Saved KV caches of one stage, on disk.
//!
//! - A session that is idle need not stay in memory: the coordinator has every stage save its slot under a name, gives
//!   the slot to somebody else, and has the name loaded again when the session goes on.
//! - Each image is a file that has no name: it is made without one, or loses it at once, so that the system takes it
//!   back when the process ends, however it ends, and nobody else can open it. Its directory is the owner's alone. The
//!   blocks are freed, not overwritten.
//! - The hash of an image is kept in memory and compared when it is loaded: a failing disk costs a replay, never a
//!   wrong answer. For the same reason nothing is synced: an image need not outlive a crash.
//! - What is saved when, and what goes to make room, the coordinator decides alone, or the stages would come to hold
//!   different images. Here a full store only refuses.
//!
//! The stage's [`PassRunner`](crate::stage_pass::PassRunner) owns the images and loads and saves them on the thread
//! that computes, which the KV cache is tied to. Saving costs copying the slot twice, hashing it and writing it to the
//! page cache; loading the same the other way around.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, Read, Seek, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use brigade_base::{ByteSize, Hash, ImageId};
use brigade_protocol::frame::MAX_IMAGES;

/// An image was not saved or loaded. The tokens in it have to be computed again; nothing else is lost.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// This node saves nothing.
    #[error("this node keeps no sessions on disk; give it room with --kv-spill")]
    Off,
    /// It would be beyond the limit.
    #[error("an image of {n_bytes} does not fit: {used} of {limit} are used; raise --kv-spill")]
    Full {
        /// Size of the image.
        n_bytes: ByteSize,
        /// Size of those that are here.
        used: ByteSize,
        /// The limit.
        limit: ByteSize,
    },
    /// There are too many already.
    #[error("{MAX_IMAGES} sessions are saved already, and each needs an open file")]
    TooMany,
    /// No image has this name.
    #[error("there is no image {0}")]
    Unknown(ImageId),
    /// Its bytes are not those that were saved.
    #[error("image {0} is damaged: the disk gave other bytes than were written; check it")]
    Damaged(ImageId),
    /// The disk refused.
    #[error("{} cannot be used: {source}; free space there, or turn --kv-spill off", dir.display())]
    Io {
        /// Where images are.
        dir: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// A file and what it must hold.
#[derive(Debug)]
struct Image {
    file: File,
    n_bytes: u64,
    hash: Hash,
}

/// The saved KV caches of one stage.
#[derive(Debug)]
pub struct Images {
    dir: PathBuf,
    limit: ByteSize,
    /// Bytes of all images.
    used: u64,
    /// Bytes of all stores under the same limit; those of one node share it.
    used_by_all: Arc<AtomicU64>,
    images: HashMap<ImageId, Image>,
}

impl Images {
    /// A store of no more than `limit` bytes in `dir`, which is made if need be. A limit of 0 turns it off: every save
    /// fails and the disk is not touched.
    ///
    /// # Errors
    /// If the directory cannot be made.
    pub fn open(dir: &Path, limit: ByteSize) -> Result<Self, ImageError> {
        let mut images = Self::off();
        (images.dir, images.limit) = (dir.to_owned(), limit);
        if limit.0 > 0 {
            make_private(dir).map_err(|source| images.io(source))?;
        }
        Ok(images)
    }

    /// The store of a node, in its state directory; where that cannot be used it is off, and the log says so.
    pub fn of_node(state_dir: &Path, limit: ByteSize) -> Self {
        Self::open(&state_dir.join("kv"), limit).unwrap_or_else(|error| {
            tracing::warn!(%error, "no idle sessions are kept on disk");
            Self::off()
        })
    }

    /// A store that saves nothing.
    pub fn off() -> Self {
        let (dir, limit, used_by_all) = (PathBuf::new(), ByteSize(0), Arc::default());
        Self { dir, limit, used: 0, used_by_all, images: HashMap::new() }
    }

    /// Makes this empty store one of several that keep its limit together, of whose bytes `used` is the sum.
    #[must_use]
    pub fn sharing(mut self, used: Arc<AtomicU64>) -> Self {
        self.used_by_all = used;
        self
    }

    /// Bytes of all images.
    #[cfg(test)]
    pub fn used(&self) -> ByteSize {
        ByteSize(self.used)
    }

    /// How many there are.
    #[cfg(test)]
    pub fn len(&self) -> usize {
        self.images.len()
    }

    /// Keeps `bytes` under a name; what had that name before is gone.
    ///
    /// # Errors
    /// If the store is off or full, or the disk refuses; nothing has then the name.
    pub fn save(&mut self, id: ImageId, bytes: &[u8]) -> Result<(), ImageError> {
        self.remove(id);
        self.check_room(bytes.len() as u64)?;
        let file = self.write(bytes).map_err(|source| self.io(source))?;
        let hash = hash(bytes);
        self.used += bytes.len() as u64;
        self.used_by_all.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        self.images.insert(id, Image { file, n_bytes: bytes.len() as u64, hash });
        Ok(())
    }

    /// Puts what was saved under a name into `out`, which is overwritten and keeps its memory. It stays saved.
    ///
    /// # Errors
    /// If there is no such image, it is damaged, or the disk refuses. In the latter two cases it is gone.
    pub fn load(&mut self, id: ImageId, out: &mut Vec<u8>) -> Result<(), ImageError> {
        let image = self.images.get_mut(&id).ok_or(ImageError::Unknown(id))?;
        let read = image.read(out);
        let is_whole = read.is_ok() && hash(out) == image.hash;
        if is_whole {
            return Ok(());
        }
        self.remove(id);
        match read {
            Err(source) if source.kind() != io::ErrorKind::UnexpectedEof => Err(self.io(source)),
            _ => Err(ImageError::Damaged(id)),
        }
    }

    /// Forgets an image; one that is not here is forgotten already.
    pub fn remove(&mut self, id: ImageId) {
        if let Some(image) = self.images.remove(&id) {
            self.used -= image.n_bytes;
            self.used_by_all.fetch_sub(image.n_bytes, Ordering::Relaxed);
        }
    }

    /// Forgets all images.
    pub fn clear(&mut self) {
        self.images.clear();
        self.used_by_all.fetch_sub(std::mem::take(&mut self.used), Ordering::Relaxed);
    }

    /// Whether an image of `n_bytes` may be saved, so that nobody makes one in vain.
    ///
    /// # Errors
    /// Why not.
    pub fn check_room(&self, n_bytes: u64) -> Result<(), ImageError> {
        if self.limit.0 == 0 {
            return Err(ImageError::Off);
        }
        if self.images.len() >= MAX_IMAGES {
            return Err(ImageError::TooMany);
        }
        // Two stages that ask at the same time may both be let in: one image too many, until the next is refused.
        let used = ByteSize(self.used_by_all.load(Ordering::Relaxed));
        if used.0.saturating_add(n_bytes) > self.limit.0 {
            return Err(ImageError::Full { n_bytes: ByteSize(n_bytes), used, limit: self.limit });
        }
        Ok(())
    }

    fn write(&self, bytes: &[u8]) -> io::Result<File> {
        let mut file = tempfile::tempfile_in(&self.dir).or_else(|error| {
            if error.kind() != io::ErrorKind::NotFound {
                return Err(error);
            }
            // Somebody has tidied up.
            make_private(&self.dir)?;
            tempfile::tempfile_in(&self.dir)
        })?;
        file.write_all(bytes)?;
        Ok(file)
    }

    fn io(&self, source: io::Error) -> ImageError {
        ImageError::Io { dir: self.dir.clone(), source }
    }
}

impl Drop for Images {
    fn drop(&mut self) {
        self.clear();
    }
}

impl Image {
    fn read(&mut self, out: &mut Vec<u8>) -> io::Result<()> {
        // What is saved fits into memory, as it comes from there.
        out.resize(self.n_bytes as usize, 0);
        self.file.rewind()?;
        self.file.read_exact(out)
    }
}

fn hash(bytes: &[u8]) -> Hash {
    Hash::from_bytes(*blake3::hash(bytes).as_bytes())
}

/// Makes a directory that only its owner may enter.
fn make_private(dir: &Path) -> io::Result<()> {
    fs::create_dir_all(dir)?;
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        fs::set_permissions(dir, fs::Permissions::from_mode(0o700))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn store(limit: u64) -> (tempfile::TempDir, Images) {
        let dir = tempfile::tempdir().unwrap();
        let images = Images::open(&dir.path().join("kv"), ByteSize(limit)).unwrap();
        (dir, images)
    }

    fn load(images: &mut Images, id: u64) -> Result<Vec<u8>, ImageError> {
        let mut out = vec![7; 3];
        images.load(ImageId(id), &mut out).map(|()| out)
    }

    #[test]
    fn images_come_back_as_often_as_wanted_until_they_are_dropped() {
        let (_dir, mut images) = store(100);
        images.save(ImageId(1), b"one").unwrap();
        images.save(ImageId(2), b"").unwrap();
        images.save(ImageId(3), b"three").unwrap();
        assert_eq!((images.used(), images.len()), (ByteSize(8), 3));
        for _ in 0..2 {
            assert_eq!(load(&mut images, 1).unwrap(), b"one");
            assert_eq!(load(&mut images, 2).unwrap(), b"");
            assert_eq!(load(&mut images, 3).unwrap(), b"three");
        }
        images.remove(ImageId(1));
        images.remove(ImageId(1));
        assert!(matches!(load(&mut images, 1), Err(ImageError::Unknown(ImageId(1)))));
        assert_eq!((images.used(), images.len()), (ByteSize(5), 2));
        images.clear();
        assert_eq!((images.used(), images.len()), (ByteSize(0), 0));
        assert!(load(&mut images, 3).is_err());
    }

    #[test]
    fn a_name_that_is_used_again_counts_once() {
        let (_dir, mut images) = store(10);
        images.save(ImageId(1), &[1; 9]).unwrap();
        images.save(ImageId(1), &[2; 10]).unwrap();
        assert_eq!((images.used(), load(&mut images, 1).unwrap()), (ByteSize(10), vec![2; 10]));
    }

    #[test]
    fn the_limit_holds_and_says_what_to_raise() {
        let (_dir, mut images) = store(10);
        images.save(ImageId(1), &[0; 6]).unwrap();
        let error = images.save(ImageId(2), &[0; 5]).unwrap_err();
        assert!(matches!(error, ImageError::Full { .. }) && error.to_string().contains("--kv-spill"), "{error}");
        images.save(ImageId(3), &[0; 4]).unwrap();
        images.remove(ImageId(1));
        images.save(ImageId(2), &[0; 5]).unwrap();
        assert_eq!(images.used(), ByteSize(9));
    }

    #[test]
    fn the_stores_of_a_node_keep_one_limit() {
        let used = Arc::new(AtomicU64::new(0));
        let ((_dir, one), (_other_dir, other)) = (store(10), store(10));
        let (mut one, mut other) = (one.sharing(Arc::clone(&used)), other.sharing(Arc::clone(&used)));
        one.save(ImageId(1), &[0; 6]).unwrap();
        assert!(matches!(other.save(ImageId(1), &[0; 5]), Err(ImageError::Full { used: ByteSize(6), .. })));
        other.save(ImageId(1), &[0; 4]).unwrap();
        one.clear();
        assert_eq!((used.load(Ordering::Relaxed), other.used()), (4, ByteSize(4)));
        drop(other);
        assert_eq!(used.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn open_files_are_bounded() {
        let (_dir, mut images) = store(1 << 20);
        for id in 0..MAX_IMAGES as u64 {
            images.save(ImageId(id), b"x").unwrap();
        }
        assert!(matches!(images.save(ImageId(9999), b"x"), Err(ImageError::TooMany)));
        images.save(ImageId(0), b"y").unwrap();
    }

    #[test]
    fn off_means_that_the_disk_is_not_touched() {
        let (dir, mut images) = store(0);
        for images in [&mut images, &mut Images::off()] {
            assert!(matches!(images.save(ImageId(1), b"x"), Err(ImageError::Off)));
            assert!(matches!(load(images, 1), Err(ImageError::Unknown(_))));
        }
        assert!(!dir.path().join("kv").exists());
    }

    #[test]
    fn a_damaged_image_is_noticed_and_gone() {
        let (_dir, mut images) = store(100);
        type Damage = fn(&mut File);
        let damages: [Damage; 2] = [
            |file| {
                file.rewind().unwrap();
                file.write_all(b"X").unwrap();
            },
            |file| file.set_len(2).unwrap(),
        ];
        for damage in damages {
            images.save(ImageId(1), b"image").unwrap();
            damage(&mut images.images.get_mut(&ImageId(1)).unwrap().file);
            assert!(matches!(load(&mut images, 1), Err(ImageError::Damaged(ImageId(1)))));
            assert_eq!((images.used(), images.len()), (ByteSize(0), 0));
        }
    }

    #[cfg(unix)]
    #[test]
    fn images_have_no_names_and_their_directory_is_private() {
        use std::os::unix::fs::PermissionsExt;
        let (dir, mut images) = store(100);
        images.save(ImageId(1), b"a conversation").unwrap();
        let dir = dir.path().join("kv");
        assert_eq!(fs::read_dir(&dir).unwrap().count(), 0);
        assert_eq!(fs::metadata(&dir).unwrap().permissions().mode() & 0o777, 0o700);
    }

    #[test]
    fn a_directory_that_is_gone_is_made_again() {
        let (dir, mut images) = store(100);
        images.save(ImageId(1), b"before").unwrap();
        fs::remove_dir(dir.path().join("kv")).unwrap();
        images.save(ImageId(2), b"after").unwrap();
        assert_eq!(load(&mut images, 1).unwrap(), b"before");
        assert_eq!(load(&mut images, 2).unwrap(), b"after");
    }

    #[test]
    fn a_directory_that_cannot_be_used_is_an_error_that_names_it() {
        let (dir, mut images) = store(100);
        fs::remove_dir(dir.path().join("kv")).unwrap();
        fs::write(dir.path().join("kv"), b"a file").unwrap();
        let error = images.save(ImageId(1), b"x").unwrap_err();
        assert!(error.to_string().contains("kv"), "{error}");
        assert_eq!(images.used(), ByteSize(0));
    }
}
