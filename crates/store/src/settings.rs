//! Which hub is asked, as whom, and how patiently.
//!
//! [`Settings::from_environment`] is the only place that reads variables and the token's file.

use std::fmt;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::url::refusal;

/// The hub, unless `HF_ENDPOINT` names another.
const HUB: &str = "https://huggingface.co";

/// Longest token. Those of the hub have 37 characters.
const MAX_TOKEN_BYTES: u64 = 4 << 10;

/// A secret that lets its bearer read what the hub does not show to everybody. It prints as nothing.
#[derive(Clone, PartialEq, Eq)]
pub struct Token {
    text: String,
    /// Where it was found, for those who want to mend it.
    place: String,
}

impl Token {
    /// The token in `text`, which was found in `place`: a variable or a file. `None` if there is nothing.
    ///
    /// # Errors
    /// If it may not stand in a header.
    pub fn new(text: &str, place: &str) -> Result<Option<Self>, SettingsError> {
        let (text, place) = (text.trim(), place.to_owned());
        let is_sound = text.len() as u64 <= MAX_TOKEN_BYTES && text.bytes().all(|byte| byte.is_ascii_graphic());
        match text {
            "" => Ok(None),
            _ if is_sound => Ok(Some(Self { text: text.to_owned(), place })),
            _ => Err(SettingsError::Token { place }),
        }
    }

    pub(crate) fn bearer(&self) -> String {
        format!("Bearer {}", self.text)
    }

    pub(crate) fn place(&self) -> &str {
        &self.place
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(..)")
    }
}

/// A setting makes no sense.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SettingsError {
    /// The hub's address.
    #[error("HF_ENDPOINT is {endpoint:?}, which {why}")]
    Endpoint {
        /// What was given.
        endpoint: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// What should be a token. It is not shown, since it may be one with something behind it.
    #[error("{place} has characters that no token has, such as spaces and line breaks; put the token alone there")]
    Token {
        /// A variable or a file.
        place: String,
    },
}

/// Which hub is asked, and as whom.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The hub's address, without a slash at the end.
    pub endpoint: String,
    /// Sent to the hub, and to nobody else.
    pub token: Option<Token>,
    /// Whether only what is on disk is used.
    pub is_offline: bool,
    /// How patiently servers are asked.
    pub limits: Limits,
}

impl Settings {
    /// A hub at `endpoint`, asked without a token.
    ///
    /// # Errors
    /// If the address is none, or not encrypted and not on this machine.
    pub fn at(endpoint: &str) -> Result<Self, SettingsError> {
        let endpoint = endpoint.trim().trim_end_matches('/').to_owned();
        match refusal(&endpoint) {
            Some(why) => Err(SettingsError::Endpoint { endpoint, why }),
            None => Ok(Self { endpoint, token: None, is_offline: false, limits: Limits::default() }),
        }
    }

    /// What the environment says: `HF_ENDPOINT`; `HF_TOKEN`, else the file that the hub's own tools leave
    /// (`HF_TOKEN_PATH`, `$HF_HOME/token`, `~/.cache/huggingface/token`); `HF_HUB_OFFLINE`. Who `is_offline` anyway
    /// needs neither a token nor a hub.
    ///
    /// # Errors
    /// Unless offline: as [`Settings::at`], or if what should be a token is none.
    pub fn from_environment(is_offline: bool) -> Result<Self, SettingsError> {
        let variable = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
        let endpoint = variable("HF_ENDPOINT").unwrap_or_else(|| HUB.to_owned());
        if is_offline || variable("HF_HUB_OFFLINE").is_some_and(|value| is_yes(&value)) {
            return Ok(Self { endpoint, token: None, is_offline: true, limits: Limits::default() });
        }
        let mut settings = Self::at(&endpoint)?;
        // An empty HF_TOKEN says that none is to be sent.
        settings.token = match std::env::var_os("HF_TOKEN") {
            Some(text) => Token::new(&text.to_string_lossy(), "HF_TOKEN")?,
            None => token_file().map_or(Ok(None), |path| read_token(&path))?,
        };
        Ok(settings)
    }
}

fn is_yes(value: &str) -> bool {
    ["1", "on", "yes", "true"].iter().any(|yes| value.eq_ignore_ascii_case(yes))
}

fn token_file() -> Option<PathBuf> {
    let path = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    path("HF_TOKEN_PATH")
        .or_else(|| path("HF_HOME").map(|home| home.join("token")))
        .or_else(|| path("XDG_CACHE_HOME").map(|cache| cache.join("huggingface/token")))
        .or_else(|| path("HOME").map(|home| home.join(".cache/huggingface/token")))
}

/// The token in a file; `None` where there is no file.
fn read_token(path: &Path) -> Result<Option<Token>, SettingsError> {
    let mut text = Vec::new();
    let read = std::fs::File::open(path).and_then(|file| file.take(2 * MAX_TOKEN_BYTES).read_to_end(&mut text));
    match read {
        Ok(_) => Token::new(&String::from_utf8_lossy(&text), &path.display().to_string()),
        Err(_) => Ok(None),
    }
}

/// How patiently servers are asked, and in which pieces. Tests have less patience.
#[derive(Debug, Clone)]
pub struct Limits {
    /// How often in a row something is asked for before it is given up, unless it moves on in between.
    pub n_tries: u32,
    /// Pause after the first failure; it doubles with each further one. All pauses of [`Limits::n_tries`] = 5 are
    /// 3.75 s: a server that is started anew is back by then.
    pub first_pause: Duration,
    /// Longest pause, also where a server asks for a longer one: what a person waits before looking what is wrong.
    pub longest_pause: Duration,
    /// Longest that a request for a range may take; what has come by then is kept and the rest asked for anew.
    pub request_time: Duration,
    /// Longest that a hub or a server may take to say what it has now, and it is asked but once, where all of a model
    /// is here anyway: what a person bears before a start that needs no network. A hub answers within a second.
    pub look_time: Duration,
    /// Longest silence in the middle of a reply that has no other limit.
    pub silence: Duration,
    /// Fewer bytes than these in a request are no progress: 2 KB/s over [`Limits::request_time`].
    pub progress_bytes: u64,
    /// Ranges that are asked for at once of one file. Storages give each connection 20 to 100 MB/s, so that four fill a
    /// gigabit line.
    pub n_connections: usize,
    /// Bytes of one range. Each is a request to the hub, which permits about ten in a second: enough for 640 MB/s.
    pub range_bytes: u64,
    /// Bytes that stay free on the disk, for logs and whatever else is on it.
    pub reserve_bytes: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            n_tries: 5,
            first_pause: Duration::from_millis(250),
            longest_pause: Duration::from_secs(60),
            request_time: Duration::from_secs(30),
            look_time: Duration::from_secs(6),
            silence: Duration::from_secs(60),
            progress_bytes: 64 << 10,
            n_connections: 4,
            range_bytes: 64 << 20,
            reserve_bytes: 512 << 20,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hub_is_encrypted_or_here() {
        assert_eq!(Settings::at("https://hub/").unwrap().endpoint, "https://hub");
        assert!(Settings::at("http://127.0.0.1:1").is_ok());
        let error = Settings::at("http://hub").unwrap_err().to_string();
        assert!(error.contains("HF_ENDPOINT") && error.contains("https://"), "{error}");
    }

    #[test]
    fn tokens_are_not_shown() {
        let token = Token::new(" hf_secret\n", "HF_TOKEN").unwrap().unwrap();
        assert_eq!(token.bearer(), "Bearer hf_secret");
        assert_eq!(format!("{token:?}"), "Token(..)");
        assert_eq!(Token::new(" ", "HF_TOKEN"), Ok(None));
        assert!(is_yes("1") && is_yes("TRUE") && !is_yes("0"));
    }

    #[test]
    fn what_is_no_token_is_not_passed_over() {
        let long = "x".repeat(5000);
        for text in ["two words", "hf_a\nhf_b", "hf_\u{e4}", &long] {
            let error = Token::new(text, "HF_TOKEN").unwrap_err().to_string();
            assert!(error.starts_with("HF_TOKEN has characters") && !error.contains("hf_"), "{error}");
        }
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("token");
        assert_eq!(read_token(&path), Ok(None));
        for (bytes, n_tokens) in [(&b"hf_a\n"[..], Some(1)), (b"", Some(0)), (b"hf_a\nhf_b\n", None), (b"\xff", None)] {
            std::fs::write(&path, bytes).unwrap();
            let found = read_token(&path).map(|token| token.into_iter().count());
            assert_eq!(found.clone().ok(), n_tokens, "{bytes:?}");
            let names_file = |error: &SettingsError| error.to_string().contains(&path.display().to_string());
            assert!(found.err().as_ref().is_none_or(names_file));
        }
    }
}
