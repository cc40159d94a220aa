//! Talking to a coordinator's HTTP endpoint: which one, with which key, and what its errors say.
//!
//! A coordinator notes its address and an administration token in its state directory, readable by its user alone, so
//! that the other verbs find it without being told.

use std::io::{BufReader, Read};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::args::EndpointArgs;
use crate::error::Failure;

/// Largest reply that is read whole: the status of a thousand nodes.
const MAX_REPLY_BYTES: u64 = 16 << 20;

/// How long an answer that is no stream may take.
const TIMEOUT: Duration = Duration::from_secs(30);

/// What a coordinator notes of itself.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Note {
    /// Where it listens, for example `http://127.0.0.1:8080`.
    pub url: String,
    /// Lets its bearer make tickets; also passes for an API key.
    pub admin_token: String,
    /// The process.
    pub pid: u32,
}

impl Note {
    fn path(state_dir: &Path) -> PathBuf {
        state_dir.join("endpoint.json")
    }

    /// Writes the note; it is removed when the guard is dropped.
    pub fn leave(&self, state_dir: &Path) -> Result<NoteGuard, Failure> {
        let path = Self::path(state_dir);
        let bytes = serde_json::to_vec_pretty(self).map_err(Failure::run)?;
        brigade_net::write_atomic(&path, &bytes, 0o600)
            .map_err(|error| Failure::run(format!("{} cannot be written: {error}", path.display())))?;
        Ok(NoteGuard(path))
    }

    /// Reads the note of the coordinator that runs with this state directory.
    pub fn find(state_dir: &Path) -> Result<Self, Failure> {
        if state_dir.is_file() {
            return Err(crate::files::is_a_file(state_dir));
        }
        let text = std::fs::read_to_string(Self::path(state_dir)).map_err(|_| {
            Failure::run(format!(
                "no coordinator runs with the state directory {}: start one with `brigade serve`, or name its \
                 --state-dir or --url",
                state_dir.display()
            ))
        })?;
        serde_json::from_str(&text).map_err(|_| {
            Failure::run(format!("{} is broken; restart `brigade serve`", Self::path(state_dir).display()))
        })
    }
}

/// Removes a note.
pub struct NoteGuard(PathBuf);

impl Drop for NoteGuard {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// An endpoint to talk to.
pub struct Endpoint {
    base: String,
    key: Option<String>,
    agent: ureq::Agent,
}

impl Endpoint {
    /// The endpoint that the arguments name, or the one that runs here.
    pub fn of(args: &EndpointArgs) -> Result<Self, Failure> {
        match &args.url {
            Some(url) => Self::at(url, args.api_key.clone()),
            None => {
                let note = Note::find(&args.state.dir())?;
                Self::at(&note.url, args.api_key.clone().or(Some(note.admin_token)))
            }
        }
    }

    /// The endpoint at `url`, with or without `/v1`.
    pub fn at(url: &str, key: Option<String>) -> Result<Self, Failure> {
        if !url.starts_with("http://") {
            return Err(Failure::usage(format!(
                "{url}: only http:// endpoints can be reached; write http://HOST:PORT"
            )));
        }
        let base = url.trim_end_matches('/').trim_end_matches("/v1").to_owned();
        let config = ureq::Agent::config_builder().http_status_as_error(false).timeout_connect(Some(TIMEOUT));
        Ok(Self { base, key, agent: ureq::Agent::new_with_config(config.build()) })
    }

    fn authorization(&self) -> Option<(&'static str, String)> {
        self.key.as_ref().map(|key| ("authorization", format!("Bearer {key}")))
    }

    /// The reply to a GET.
    pub fn get(&self, path: &str) -> Result<Value, Failure> {
        let mut request = self.agent.get(format!("{}{path}", self.base));
        if let Some((name, value)) = self.authorization() {
            request = request.header(name, value);
        }
        self.read(request.config().timeout_global(Some(TIMEOUT)).build().call())
    }

    /// The reply to a DELETE.
    pub fn delete(&self, path: &str) -> Result<Value, Failure> {
        let mut request = self.agent.delete(format!("{}{path}", self.base));
        if let Some((name, value)) = self.authorization() {
            request = request.header(name, value);
        }
        self.read(request.config().timeout_global(Some(TIMEOUT)).build().call())
    }

    /// The reply to a POST.
    pub fn post(&self, path: &str, body: &Value) -> Result<Value, Failure> {
        self.read(self.send(path, body))
    }

    fn send(&self, path: &str, body: &Value) -> Result<ureq::http::Response<ureq::Body>, ureq::Error> {
        let mut request = self.agent.post(format!("{}{path}", self.base));
        if let Some((name, value)) = self.authorization() {
            request = request.header(name, value);
        }
        request.send_json(body)
    }

    /// Posts and hands each event of the reply's stream to `each`, until the end.
    pub fn stream(
        &self,
        path: &str,
        body: &Value,
        mut each: impl FnMut(Value) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        let response = self.send(path, body);
        let response = match response {
            Ok(response) if response.status().is_success() => response,
            other => return self.read(other).map(drop),
        };
        let mut lines = Lines { reader: BufReader::new(response.into_body().into_reader()) };
        while let Some(line) = lines.next()? {
            let Some(data) = line.strip_prefix("data:").map(str::trim) else { continue };
            if data == "[DONE]" {
                return Ok(());
            }
            let value: Value = serde_json::from_str(data)
                .map_err(|error| Failure::run(format!("{} sent something strange: {error}", self.base)))?;
            if let Some(message) = error_message(&value) {
                return Err(Failure::run(message));
            }
            each(value)?;
        }
        Err(Failure::run(format!("{} broke off in the middle of an answer", self.base)))
    }

    fn read(&self, result: Result<ureq::http::Response<ureq::Body>, ureq::Error>) -> Result<Value, Failure> {
        let mut response = result.map_err(|error| {
            Failure::run(format!("{} cannot be reached: {error}; is `brigade serve` running there?", self.base))
        })?;
        let status = response.status();
        let text = response
            .body_mut()
            .with_config()
            .limit(MAX_REPLY_BYTES)
            .read_to_string()
            .map_err(|error| Failure::run(format!("{} broke off its reply: {error}", self.base)))?;
        let value: Value = serde_json::from_str(&text).unwrap_or(Value::Null);
        if status.is_success() {
            return Ok(value);
        }
        let message = error_message(&value).unwrap_or_else(|| format!("{} answered {status}", self.base));
        Err(Failure::run(message))
    }
}

/// The message of an OpenAI error object.
fn error_message(value: &Value) -> Option<String> {
    Some(value.get("error")?.get("message")?.as_str()?.to_owned())
}

/// Lines of a stream, with a cap.
struct Lines<R> {
    reader: BufReader<R>,
}

impl<R: Read> Lines<R> {
    fn next(&mut self) -> Result<Option<String>, Failure> {
        use std::io::BufRead;
        let mut line = Vec::new();
        let read = (&mut self.reader)
            .take(MAX_REPLY_BYTES)
            .read_until(b'\n', &mut line)
            .map_err(|error| Failure::run(format!("the answer broke off: {error}")))?;
        Ok((read > 0).then(|| String::from_utf8_lossy(&line).into_owned()))
    }
}
