//! Measured speeds on disk, so that a node that starts again need not measure again.
//!
//! Each is a small JSON file in `profiles` of the state directory, named by the hash of all that it depends on
//! ([`ProfileKey`]). A file that cannot be read or is nonsense is as good as none.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use brigade_base::{Hash, KvTypes};
use brigade_plan::{Speed, SpeedSource};
use serde::{Deserialize, Serialize};

use super::session::decode_rows;
use super::{MeasureOptions, MeasureRequest, has_tensors_of};
use crate::system;
use crate::threads::seconds_since_1970;

/// Most profiles that are kept, the oldest go: some models, each with some settings; at a kilobyte each it is nothing.
const MAX_PROFILES: usize = 64;

/// Largest file that is read: three curves of 32 points have 3 KB.
const MAX_FILE_BYTES: u64 = 64 << 10;

/// Rises when the same machine with the same model would be measured otherwise than before.
const METHOD: u32 = 2;

/// All that a measured speed depends on, hashed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ProfileKey(Hash);

impl ProfileKey {
    /// The key of a measurement.
    pub fn of(request: &MeasureRequest, options: &MeasureOptions) -> Self {
        let mut hasher = blake3::Hasher::new();
        let mut add = |bytes: &[u8]| {
            hasher.update(&(bytes.len() as u64).to_le_bytes());
            hasher.update(bytes);
        };
        for tensor in request.catalog.tensors() {
            add(tensor.name.as_bytes());
            tensor.dims.iter().for_each(|dim| add(&dim.to_le_bytes()));
            add(&tensor.ty.id().to_le_bytes());
        }
        // A longer context may be attended to in another way; more sessions and rows are more points.
        let most_rows = decode_rows(request.sessions).into_iter().max().unwrap_or(1);
        for number in [METHOD, options.threads, request.context, most_rows, request.max_rows] {
            add(&number.to_le_bytes());
        }
        // Keys and values in blocks are attended to in another way.
        if request.kv != KvTypes::default() {
            add(request.kv.to_string().as_bytes());
        }
        add(&options.throttle.to_le_bytes());
        let is_own = options.own.as_ref().is_some_and(|file| has_tensors_of(file.catalog(), &request.catalog));
        add(&[u8::from(is_own)]);
        let cpu = system::cpu();
        add(cpu.name.as_bytes());
        cpu.features.iter().for_each(|feature| add(feature.as_bytes()));
        add(env!("CARGO_PKG_VERSION").as_bytes());
        Self(Hash::from_bytes(*hasher.finalize().as_bytes()))
    }
}

/// What a file holds.
#[derive(Serialize, Deserialize)]
struct Stored {
    /// Seconds since 1970.
    measured_at: u64,
    /// Whether other programs left the processor to the measurement.
    is_quiet: bool,
    speed: Speed,
}

/// The measured speeds of a state directory.
#[derive(Debug, Clone)]
pub struct Profiles {
    dir: PathBuf,
}

impl Profiles {
    /// Those of `state_dir`; nothing is read or made yet.
    pub fn open(state_dir: &Path) -> Self {
        Self { dir: state_dir.join("profiles") }
    }

    fn path(&self, key: &ProfileKey) -> PathBuf {
        self.dir.join(format!("{}.json", key.0))
    }

    /// The speed that was measured last for `key`, if any.
    pub fn get(&self, key: &ProfileKey) -> Option<Speed> {
        self.read(key).map(|stored| stored.speed)
    }

    /// The same, unless other programs disturbed the measurement.
    pub(super) fn get_quiet(&self, key: &ProfileKey) -> Option<Speed> {
        self.read(key).filter(|stored| stored.is_quiet).map(|stored| stored.speed)
    }

    fn read(&self, key: &ProfileKey) -> Option<Stored> {
        let path = self.path(key);
        if fs::metadata(&path).ok()?.len() > MAX_FILE_BYTES {
            return None;
        }
        let stored: Stored = serde_json::from_slice(&fs::read(&path).ok()?).ok()?;
        let was_measured = matches!(stored.speed.source, SpeedSource::Layers | SpeedSource::Shapes);
        (was_measured && stored.speed.is_sound()).then_some(stored)
    }

    /// Keeps a speed; the oldest go if there are too many. One that is not `is_quiet`, since other programs were
    /// computing, is there for those who cannot measure, and measured again by those who can.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn put(&self, key: &ProfileKey, speed: &Speed, is_quiet: bool) -> io::Result<()> {
        brigade_net::create_private_dir(&self.dir)?;
        let stored = Stored { measured_at: seconds_since_1970(), is_quiet, speed: speed.clone() };
        brigade_net::write_atomic(&self.path(key), &serde_json::to_vec_pretty(&stored)?, 0o600)?;
        self.trim(&self.path(key))
    }

    /// Removes the oldest, but not the one that was just written.
    fn trim(&self, keep: &Path) -> io::Result<()> {
        let mut files: Vec<(SystemTime, PathBuf)> = Vec::new();
        for entry in fs::read_dir(&self.dir)? {
            let entry = entry?;
            if entry.path().extension().is_some_and(|ext| ext == "json") && entry.path() != keep {
                files.push((entry.metadata()?.modified()?, entry.path()));
            }
        }
        files.sort();
        let n_over = (files.len() + 1).saturating_sub(MAX_PROFILES);
        files.iter().take(n_over).try_for_each(|(_, path)| fs::remove_file(path))
    }
}

#[cfg(test)]
mod tests {
    use brigade_plan::Curve;

    use super::*;

    fn key(n: u8) -> ProfileKey {
        ProfileKey(Hash::from_bytes([n; 32]))
    }

    fn speed(seconds: f64) -> Speed {
        let curve = Curve::new(vec![(1, seconds), (4, 2.0 * seconds)]).unwrap();
        Speed {
            decode: curve.clone(),
            chunk: curve,
            head: None,
            pass_s: 0.0,
            decode_context_s: 1e-9,
            chunk_context_s: 1e-9,
            load_bytes_per_s: 1e9,
            source: SpeedSource::Shapes,
        }
    }

    #[test]
    fn what_was_kept_is_found_and_nonsense_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let profiles = Profiles::open(dir.path());
        assert_eq!(profiles.get(&key(1)), None);
        profiles.put(&key(1), &speed(0.001), true).unwrap();
        assert_eq!(profiles.get(&key(1)), Some(speed(0.001)));
        assert_eq!(profiles.get(&key(2)), None);
        let path = profiles.path(&key(1));
        let text = fs::read_to_string(&path).unwrap();
        for broken in ["", "{}", &text[..text.len() / 2], &text.replace("0.002", "-1"), &" ".repeat(100_000)] {
            fs::write(&path, broken).unwrap();
            assert_eq!(profiles.get(&key(1)), None, "{broken:.40}");
        }
        profiles.put(&key(1), &speed(0.003), true).unwrap();
        assert_eq!(profiles.get_quiet(&key(1)), Some(speed(0.003)));
        profiles.put(&key(1), &speed(0.004), false).unwrap();
        assert_eq!((profiles.get(&key(1)), profiles.get_quiet(&key(1))), (Some(speed(0.004)), None));
    }

    #[test]
    fn the_oldest_go() {
        let dir = tempfile::tempdir().unwrap();
        let profiles = Profiles::open(dir.path());
        for n in 0..=MAX_PROFILES as u8 {
            profiles.put(&key(n), &speed(0.001), true).unwrap();
            let time = SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(u64::from(n) + 1);
            fs::File::options().append(true).open(profiles.path(&key(n))).unwrap().set_modified(time).unwrap();
        }
        assert_eq!(fs::read_dir(&profiles.dir).unwrap().count(), MAX_PROFILES);
        assert_eq!(profiles.get(&key(0)), None);
        assert!(profiles.get(&key(1)).is_some() && profiles.get(&key(MAX_PROFILES as u8)).is_some());
    }
}
