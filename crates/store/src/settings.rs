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
pub struct Token(String);

impl Token {
    /// The token in `text`, if there is one that may stand in a header.
    pub fn new(text: &str) -> Option<Self> {
        let text = text.trim();
        let is_sound = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_graphic());
        is_sound.then(|| Self(text.to_owned()))
    }

    pub(crate) fn bearer(&self) -> String {
        format!("Bearer {}", self.0)
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
    /// (`HF_TOKEN_PATH`, `$HF_HOME/token`, `~/.cache/huggingface/token`); `HF_HUB_OFFLINE`.
    ///
    /// # Errors
    /// As [`Settings::at`].
    pub fn from_environment() -> Result<Self, SettingsError> {
        let variable = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
        let mut settings = Self::at(&variable("HF_ENDPOINT").unwrap_or_else(|| HUB.to_owned()))?;
        // An empty HF_TOKEN says that none is to be sent.
        settings.token = match std::env::var("HF_TOKEN") {
            Ok(text) => Token::new(&text),
            Err(_) => token_file().and_then(|path| read_token(&path)),
        };
        settings.is_offline = variable("HF_HUB_OFFLINE").is_some_and(|value| is_yes(&value));
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

fn read_token(path: &Path) -> Option<Token> {
    let mut text = String::new();
    std::fs::File::open(path).ok()?.take(MAX_TOKEN_BYTES).read_to_string(&mut text).ok()?;
    Token::new(&text)
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
        let token = Token::new(" hf_secret\n").unwrap();
        assert_eq!(token.bearer(), "Bearer hf_secret");
        assert_eq!(format!("{token:?}"), "Token(..)");
        assert_eq!(Token::new("two words"), None);
        assert_eq!(Token::new(" "), None);
        assert!(is_yes("1") && is_yes("TRUE") && !is_yes("0"));
    }
}
