//! A store in a folder of its own, in front of a server that misbehaves.
#![allow(dead_code, unused_imports, reason = "each test binary uses a part")]
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

pub mod server;

use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::Duration;

use brigade_store::{Client, Event, Limits, ModelSource, Opened, Settings, Store, StoreError, Token};
use ring::digest::{SHA256, digest};
use tempfile::TempDir;

pub use server::{Asked, COMMIT, Fault, Server};

/// SHA-256 as the hub writes it.
pub fn sha256(bytes: &[u8]) -> String {
    digest(&SHA256, bytes).as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The model inside the program.
pub fn abacus() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/abacus-q8_0.gguf")
}

/// Bytes that begin like a model, and are no other test's.
pub fn bytes(seed: u64, n: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = b"GGUF".to_vec();
    bytes.resize_with(n, || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 56) as u8
    });
    bytes
}

/// Little patience, and small ranges.
pub fn limits() -> Limits {
    Limits {
        n_tries: 4,
        first_pause: Duration::from_millis(1),
        longest_pause: Duration::from_secs(1),
        request_time: Duration::from_secs(5),
        look_time: Duration::from_secs(1),
        silence: Duration::from_secs(5),
        progress_bytes: 1000,
        n_connections: 4,
        range_bytes: 20_000,
        reserve_bytes: 0,
    }
}

/// A store, and what it told.
pub struct Shop {
    pub server: Server,
    pub settings: Settings,
    pub events: Mutex<Vec<Event>>,
    dir: TempDir,
}

impl Shop {
    /// An empty store before a server with these files.
    pub fn of(files: &[(&str, &[u8])]) -> Self {
        let server = Server::start(files, sha256);
        let mut settings = Settings::at(server.url()).unwrap();
        settings.limits = limits();
        Self { server, settings, events: Mutex::default(), dir: tempfile::tempdir().unwrap() }
    }

    pub fn client(&self) -> Client {
        Client::new(self.settings.clone())
    }

    pub fn store(&self) -> Store {
        Store::new(self.dir.path().join("models"), self.client())
    }

    pub fn open(&self, source: &str) -> Result<Opened, StoreError> {
        let hears = |event| self.events.lock().unwrap().push(event);
        self.store().open(&ModelSource::parse(source).unwrap(), &hears)
    }

    /// Opens and compares the first file.
    #[track_caller]
    pub fn check(&self, source: &str, expected: &[u8]) -> Opened {
        let opened = self.open(source).unwrap();
        assert!(std::fs::read(&opened.path).unwrap() == expected, "{source}: other bytes than on the server");
        opened
    }

    /// Opens what cannot be opened.
    #[track_caller]
    pub fn check_error(&self, source: &str, words: &[&str]) {
        let error = self.open(source).unwrap_err().to_string();
        assert!(words.iter().all(|word| error.contains(word)), "{source}: {error}");
    }

    /// The same store with a token for the hub.
    pub fn with_token(mut self, token: &str) -> Self {
        self.settings.token = Token::new(token, "HF_TOKEN").unwrap();
        self
    }

    pub fn offline(mut self) -> Self {
        self.settings.is_offline = true;
        self
    }
}
