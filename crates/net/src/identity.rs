//! Who this node is: an Ed25519 key pair in `<state-dir>/node.key`.
//!
//! The file holds PKCS#8, is made once and readable by its owner alone. Two processes that start at once agree on one
//! key: the file is created without ever replacing another.

use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use brigade_base::NodeId;
use ring::rand::SystemRandom;
use ring::signature::Ed25519KeyPair;
use rustls::crypto::ring::sign::any_eddsa_type;
use rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer};
use rustls::sign::CertifiedKey;

use crate::store::{PRIVATE_FILE, create_atomic, create_private_dir};
use crate::tls;

/// Name of the key file in the state folder.
const KEY_FILE: &str = "node.key";

/// Longest key file that is read. An Ed25519 key in PKCS#8 has at most 85 bytes; anything near a kilobyte is not one.
const MAX_KEY_FILE: u64 = 1024;

/// Why this node has no identity.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// The state folder cannot be made.
    #[error("cannot make the state folder {}: {source}", path.display())]
    Folder {
        /// The folder.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// The key file cannot be read.
    #[error("cannot read the node's key {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// The key file cannot be written.
    #[error("cannot store the node's key in {}: {source}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// Others may read or write the key file.
    #[error(
        "the node's key {} is open to other users (mode {mode:03o}); run: chmod 600 {}",
        path.display(),
        path.display()
    )]
    Exposed {
        /// The file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// The key file holds no Ed25519 key.
    #[error(
        "{} is not a node's key; restore it from a backup, or remove it to become a new node that must be admitted",
        path.display()
    )]
    Corrupt {
        /// The file.
        path: PathBuf,
    },
    /// The system gave no random bytes.
    #[error("the system gave no random bytes to make a key from")]
    Random,
}

/// The node's key pair. Cloning shares it; the private half never leaves this type.
#[derive(Clone)]
pub struct Identity {
    key: Arc<CertifiedKey>,
    node_id: NodeId,
}

impl Identity {
    /// Reads the key from `dir`, or makes one there if it has none.
    ///
    /// # Errors
    /// If the file is corrupt or open to other users, or cannot be read or made.
    pub fn load_or_create(dir: &Path) -> Result<Self, IdentityError> {
        create_private_dir(dir).map_err(|source| IdentityError::Folder { path: dir.to_owned(), source })?;
        let path = dir.join(KEY_FILE);
        if let Some(identity) = Self::load(&path)? {
            return Ok(identity);
        }
        let pkcs8 = new_key()?;
        match create_atomic(&path, &pkcs8, PRIVATE_FILE) {
            Ok(()) => Self::from_pkcs8(&pkcs8).ok_or(IdentityError::Corrupt { path }),
            // Another process was faster; its key is the node's.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                Self::load(&path)?.ok_or(IdentityError::Corrupt { path })
            }
            Err(source) => Err(IdentityError::Write { path, source }),
        }
    }

    /// A new key that is stored nowhere.
    ///
    /// # Errors
    /// If the system gives no random bytes.
    pub fn generate() -> Result<Self, IdentityError> {
        Self::from_pkcs8(&new_key()?).ok_or(IdentityError::Random)
    }

    /// The public key.
    pub fn node_id(&self) -> NodeId {
        self.node_id
    }

    /// What TLS presents and signs with.
    pub(crate) fn certified_key(&self) -> Arc<CertifiedKey> {
        Arc::clone(&self.key)
    }

    /// `None` if there is no file.
    fn load(path: &Path) -> Result<Option<Self>, IdentityError> {
        let read = |source| IdentityError::Read { path: path.to_owned(), source };
        let file = match File::open(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            opened => opened.map_err(read)?,
        };
        let mode = file.metadata().map_err(read)?.permissions().mode() & 0o777;
        if mode & 0o077 != 0 {
            return Err(IdentityError::Exposed { path: path.to_owned(), mode });
        }
        let mut bytes = Vec::new();
        file.take(MAX_KEY_FILE).read_to_end(&mut bytes).map_err(read)?;
        Self::from_pkcs8(&bytes).map(Some).ok_or_else(|| IdentityError::Corrupt { path: path.to_owned() })
    }

    fn from_pkcs8(bytes: &[u8]) -> Option<Self> {
        let key = any_eddsa_type(&PrivatePkcs8KeyDer::from(bytes)).ok()?;
        let spki = key.public_key()?;
        let node_id = tls::node_id_of(&spki)?;
        let key = CertifiedKey::new(vec![CertificateDer::from(spki.to_vec())], key);
        Some(Self { key: Arc::new(key), node_id })
    }
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Identity").field(&self.node_id).finish()
    }
}

fn new_key() -> Result<Vec<u8>, IdentityError> {
    let document = Ed25519KeyPair::generate_pkcs8(&SystemRandom::new()).map_err(|_| IdentityError::Random)?;
    Ok(document.as_ref().to_vec())
}

#[cfg(test)]
mod tests {
    use std::fs::{self, Permissions};

    use super::*;

    #[test]
    fn a_node_stays_who_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let state = dir.path().join("deep").join("state");
        let first = Identity::load_or_create(&state).unwrap();
        assert_eq!(Identity::load_or_create(&state).unwrap().node_id(), first.node_id());
        assert_ne!(Identity::generate().unwrap().node_id(), first.node_id());
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&state), mode(&state.join(KEY_FILE))), (0o700, 0o600));
    }

    #[test]
    fn processes_that_start_at_once_agree_on_a_key() {
        let dir = tempfile::tempdir().unwrap();
        let ids: Vec<NodeId> = std::thread::scope(|scope| {
            let threads: Vec<_> =
                (0..8).map(|_| scope.spawn(|| Identity::load_or_create(dir.path()).unwrap().node_id())).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        assert!(ids.iter().all(|id| *id == ids[0]));
    }

    #[test]
    fn an_exposed_key_is_refused_with_the_remedy() {
        let dir = tempfile::tempdir().unwrap();
        Identity::load_or_create(dir.path()).unwrap();
        let path = dir.path().join(KEY_FILE);
        for mode in [0o640, 0o604, 0o622] {
            fs::set_permissions(&path, Permissions::from_mode(mode)).unwrap();
            let message = Identity::load_or_create(dir.path()).unwrap_err().to_string();
            assert!(message.contains(&format!("chmod 600 {}", path.display())), "{message}");
        }
    }

    #[test]
    fn a_corrupt_key_is_refused_and_kept() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(KEY_FILE);
        for content in [&b""[..], b"not a key", &[0x30; 4096]] {
            write(&path, content);
            assert!(matches!(Identity::load_or_create(dir.path()), Err(IdentityError::Corrupt { .. })));
            assert_eq!(fs::read(&path).unwrap(), content);
        }
    }

    fn write(path: &Path, content: &[u8]) {
        crate::write_atomic(path, content, PRIVATE_FILE).unwrap();
    }
}
