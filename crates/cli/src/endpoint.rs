//! Talking to a coordinator's HTTP endpoint: which one, with which key, and what its errors say.
//!
//! A coordinator notes its address and an administration token in its state directory, readable by its user alone, so
//! that the other verbs find it without being told.
//!
//! An https endpoint is checked against the authorities that the system trusts.

use std::io::{self, BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use serde_json::Value;
use ureq::tls::{Certificate, RootCerts, TlsConfig};

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

    /// Removes the note that a killed coordinator left.
    pub fn remove(state_dir: &Path) {
        let _ = std::fs::remove_file(Self::path(state_dir));
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

/// An endpoint did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum EndpointError {
    /// There was no reply.
    #[error("{base} cannot be reached: {source}; {}", advice(source))]
    Unreachable {
        /// The endpoint.
        base: String,
        /// Why.
        source: Box<ureq::Error>,
    },
    /// The reply says no.
    #[error("{message}")]
    Refused {
        /// HTTP status.
        status: u16,
        /// What the endpoint says, or that it said nothing.
        message: String,
        /// What that is in a word, where the endpoint says so.
        code: Option<String>,
    },
    /// A stream brought an error object.
    #[error("{message}")]
    Failed {
        /// What the endpoint says.
        message: String,
    },
    /// The reply did not end as it should.
    #[error("{base} broke off in the middle of an answer{}", reason(source))]
    BrokeOff {
        /// The endpoint.
        base: String,
        /// Why, where the connection did not just end.
        source: Option<io::Error>,
    },
    /// The request took longer than it may.
    #[error("{base} took longer than {}", humantime::format_duration(*limit))]
    TooSlow {
        /// The endpoint.
        base: String,
        /// How long it may take.
        limit: Duration,
    },
    /// A stream brought something else than JSON.
    #[error("{base} sent something strange: {source}")]
    Strange {
        /// The endpoint.
        base: String,
        /// What is wrong with it.
        source: serde_json::Error,
    },
}

fn advice(error: &ureq::Error) -> &'static str {
    // What goes wrong in a handshake comes as a failure to read.
    let tls = match error {
        ureq::Error::Rustls(error) => Some(error),
        ureq::Error::Io(error) => error.get_ref().and_then(|cause| cause.downcast_ref::<rustls::Error>()),
        _ => None,
    };
    match tls {
        Some(rustls::Error::InvalidCertificate(_)) => {
            "if the certificate is your own, name the file of its authority in SSL_CERT_FILE"
        }
        Some(_) => "does it speak TLS on this port?",
        None => "is `brigade serve` running there?",
    }
}

fn reason(source: &Option<io::Error>) -> String {
    source.as_ref().map(|error| format!(": {error}")).unwrap_or_default()
}

/// An endpoint to talk to.
pub struct Endpoint {
    base: String,
    key: Option<String>,
    agent: ureq::Agent,
    /// How long a whole request may take, streams too; `None` for endless streams.
    limit: Option<Duration>,
}

type Reply = Result<ureq::http::Response<ureq::Body>, ureq::Error>;

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
        let is_secure = url.starts_with("https://");
        if !is_secure && !url.starts_with("http://") {
            return Err(Failure::usage(format!(
                "{url}: write http://HOST:PORT, or https:// where the endpoint has TLS"
            )));
        }
        let base = url.trim_end_matches('/').trim_end_matches("/v1").trim_end_matches('/').to_owned();
        let agent = agent(is_secure, 1, None)?;
        Ok(Self { base, key, agent, limit: None })
    }

    /// The same endpoint for many requests at once: keeps `n_connections` open, and no request takes longer than
    /// `limit`.
    pub fn under_load(mut self, n_connections: usize, limit: Duration) -> Result<Self, Failure> {
        self.agent = agent(self.base.starts_with("https://"), n_connections, Some(limit))?;
        self.limit = Some(limit);
        Ok(self)
    }

    /// The endpoint's URL, without `/v1`.
    pub fn base(&self) -> &str {
        &self.base
    }

    fn authorization(&self) -> Option<(&'static str, String)> {
        self.key.as_ref().map(|key| ("authorization", format!("Bearer {key}")))
    }

    /// The reply to a GET.
    pub fn get(&self, path: &str) -> Result<Value, EndpointError> {
        let mut request = self.agent.get(format!("{}{path}", self.base));
        if let Some((name, value)) = self.authorization() {
            request = request.header(name, value);
        }
        self.read(request.config().timeout_global(Some(TIMEOUT)).build().call(), Some(TIMEOUT))
    }

    /// The reply to a DELETE.
    pub fn delete(&self, path: &str) -> Result<Value, EndpointError> {
        let mut request = self.agent.delete(format!("{}{path}", self.base));
        if let Some((name, value)) = self.authorization() {
            request = request.header(name, value);
        }
        self.read(request.config().timeout_global(Some(TIMEOUT)).build().call(), Some(TIMEOUT))
    }

    /// The reply to a POST.
    pub fn post(&self, path: &str, body: &Value) -> Result<Value, EndpointError> {
        self.read(self.send(path, body), self.limit)
    }

    fn send(&self, path: &str, body: &Value) -> Reply {
        let mut request = self.agent.post(format!("{}{path}", self.base));
        if let Some((name, value)) = self.authorization() {
            request = request.header(name, value);
        }
        request.send_json(body)
    }

    /// Posts and hands each event of the reply's stream to `each`, with the time at which its line was read, until the
    /// end.
    pub fn stream<E: From<EndpointError>>(
        &self,
        path: &str,
        body: &Value,
        mut each: impl FnMut(Instant, Value) -> Result<(), E>,
    ) -> Result<(), E> {
        let response = match self.send(path, body) {
            Ok(response) if response.status().is_success() => response,
            other => return Ok(self.read(other, self.limit).map(drop)?),
        };
        let mut reader = BufReader::new(response.into_body().into_reader());
        let mut line = Vec::new();
        while next_line(&mut reader, &mut line).map_err(|error| self.broke_off(error, self.limit))? {
            let read_at = Instant::now();
            let Some(data) = line.strip_prefix(b"data:").map(<[u8]>::trim_ascii) else { continue };
            if data == b"[DONE]" {
                if self.limit.is_some() {
                    // A connection is used again only if its reply was read to the end. There may be none to read.
                    let _ = io::copy(&mut reader.take(MAX_REPLY_BYTES), &mut io::sink());
                }
                return Ok(());
            }
            let value: Value = serde_json::from_slice(data)
                .map_err(|source| EndpointError::Strange { base: self.base.clone(), source })?;
            if let Some(message) = error_message(&value) {
                return Err(EndpointError::Failed { message }.into());
            }
            each(read_at, value)?;
        }
        Err(EndpointError::BrokeOff { base: self.base.clone(), source: None }.into())
    }

    fn read(&self, result: Reply, limit: Option<Duration>) -> Result<Value, EndpointError> {
        let mut response = result.map_err(|source| match (source, limit) {
            (ureq::Error::Timeout(ureq::Timeout::Global), Some(limit)) => self.too_slow(limit),
            (source, _) => EndpointError::Unreachable { base: self.base.clone(), source: Box::new(source) },
        })?;
        let status = response.status();
        let text = response
            .body_mut()
            .with_config()
            .limit(MAX_REPLY_BYTES)
            .read_to_string()
            .map_err(|error| self.broke_off(error.into_io(), limit))?;
        let value: Value = serde_json::from_str(&text).unwrap_or(Value::Null);
        if status.is_success() {
            return Ok(value);
        }
        let message = error_message(&value).unwrap_or_else(|| {
            let place = response.headers().get("location").and_then(|place| place.to_str().ok());
            let moved = place.map(|place| format!("; it points to {place}")).unwrap_or_default();
            format!("{} answered {status}{moved}", self.base)
        });
        let code = value.pointer("/error/code").and_then(Value::as_str).map(str::to_owned);
        Err(EndpointError::Refused { status: status.as_u16(), message, code })
    }

    fn too_slow(&self, limit: Duration) -> EndpointError {
        EndpointError::TooSlow { base: self.base.clone(), limit }
    }

    fn broke_off(&self, error: io::Error, limit: Option<Duration>) -> EndpointError {
        let cause = error.get_ref().and_then(|cause| cause.downcast_ref::<ureq::Error>());
        match limit.filter(|_| matches!(cause, Some(ureq::Error::Timeout(_)))) {
            Some(limit) => self.too_slow(limit),
            None => EndpointError::BrokeOff { base: self.base.clone(), source: Some(error) },
        }
    }
}

/// What makes requests. Redirects are not followed: a key is for one place, and a moved POST would become a GET.
pub fn agent(is_secure: bool, n_connections: usize, limit: Option<Duration>) -> Result<ureq::Agent, Failure> {
    let mut config = ureq::Agent::config_builder()
        .http_status_as_error(false)
        .max_redirects(0)
        .max_redirects_will_error(false)
        .max_idle_connections(n_connections)
        .max_idle_connections_per_host(n_connections)
        .timeout_connect(Some(TIMEOUT))
        .timeout_global(limit);
    if is_secure {
        let found = rustls_native_certs::load_native_certs();
        let roots: Vec<_> = found.certs.iter().map(|der| Certificate::from_der(der).to_owned()).collect();
        if roots.is_empty() {
            let why = found.errors.first().map(|error| format!(": {error}")).unwrap_or_default();
            return Err(Failure::run(format!(
                "this system trusts no certificate authority{why}; install its package of CA certificates, or name a \
                 file of them in SSL_CERT_FILE"
            )));
        }
        let tls = TlsConfig::builder()
            .root_certs(RootCerts::new_with_certs(&roots))
            .unversioned_rustls_crypto_provider(Arc::new(rustls::crypto::ring::default_provider()));
        config = config.tls_config(tls.build());
    }
    Ok(ureq::Agent::new_with_config(config.build()))
}

/// The message of an error object: OpenAI's, or one of the shapes that other servers send.
fn error_message(value: &Value) -> Option<String> {
    let error = value.get("error").filter(|error| !error.is_null());
    let found = match error {
        Some(error) => error.get("message").unwrap_or(error),
        None if value.get("object").and_then(Value::as_str) == Some("error") => value.get("message")?,
        None => value.get("detail")?,
    };
    Some(found.as_str().map_or_else(|| found.to_string(), str::to_owned))
}

/// Reads the next line of a stream into `line`; false at the end.
fn next_line(reader: &mut impl BufRead, line: &mut Vec<u8>) -> io::Result<bool> {
    line.clear();
    Ok(reader.take(MAX_REPLY_BYTES).read_until(b'\n', line)? > 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn errors_of_other_servers_are_understood() {
        let said = |value: Value| error_message(&value);
        assert_eq!(said(json!({"error": {"message": "no"}})).as_deref(), Some("no"));
        assert_eq!(said(json!({"error": "no"})).as_deref(), Some("no"));
        assert_eq!(said(json!({"object": "error", "message": "no"})).as_deref(), Some("no"));
        assert_eq!(said(json!({"detail": "Not Found"})).as_deref(), Some("Not Found"));
        assert_eq!(said(json!({"detail": [{"msg": "no"}]})).as_deref(), Some("[{\"msg\":\"no\"}]"));
        assert_eq!(said(json!({"choices": [], "error": null})), None);
    }

    #[test]
    fn urls_may_end_with_v1_and_must_name_their_scheme() {
        for url in ["http://a:1", "http://a:1/", "http://a:1/v1", "http://a:1/v1/"] {
            assert_eq!(Endpoint::at(url, None).unwrap().base(), "http://a:1");
        }
        assert!(matches!(Endpoint::at("a:1", None), Err(Failure::Usage(_))));
    }
}
