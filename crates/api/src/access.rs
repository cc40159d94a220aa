//! Who may ask: API keys, the admin token, and the check of the `Host` header.
//!
//! With keys, every route but `/health` and `/ready` wants one. Without keys the server is for people on this machine,
//! and then a web page must not reach it: a page whose name is made to resolve to a loopback address (DNS rebinding)
//! still sends its own name as `Host`, so names other than `localhost` and the configured ones are refused. Bodies must
//! say that they are JSON, which a page of another origin cannot without asking first, and no such permission is given.

use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::middleware::Next;
use axum::response::Response;
use blake3::Hash;

use crate::error::ApiError;
use crate::fields::clip;

/// Routes that anyone may ask, since they tell nothing but whether the server lives.
const OPEN_ROUTES: [&str; 2] = ["/health", "/ready"];

/// The rules. Secrets are kept as hashes, whose comparison takes the same time wherever two differ.
pub(crate) struct Access {
    keys: Vec<Hash>,
    admin: Option<Hash>,
    host_names: Vec<String>,
}

/// What the caller showed.
enum Caller {
    Nobody,
    Stranger,
    Client,
    Admin,
}

impl Access {
    pub(crate) fn new(keys: &[String], admin_token: Option<&str>, host_names: &[String]) -> Self {
        Self {
            keys: keys.iter().map(|key| blake3::hash(key.as_bytes())).collect(),
            admin: admin_token.map(|token| blake3::hash(token.as_bytes())),
            host_names: host_names.to_vec(),
        }
    }

    /// Whether a request may go on to its route.
    pub(crate) fn check(&self, path: &str, headers: &HeaderMap) -> Result<(), ApiError> {
        if OPEN_ROUTES.contains(&path) {
            return Ok(());
        }
        if self.keys.is_empty() {
            return self.check_host(headers);
        }
        match self.caller(headers) {
            Caller::Client | Caller::Admin => Ok(()),
            Caller::Nobody => Err(unauthorized("no API key; send it as `Authorization: Bearer KEY`")),
            Caller::Stranger => Err(unauthorized("this API key is not known here")),
        }
    }

    /// Whether the caller may change who takes part.
    pub(crate) fn check_admin(&self, headers: &HeaderMap) -> Result<(), ApiError> {
        match (self.caller(headers), &self.admin) {
            (Caller::Admin, _) => Ok(()),
            (_, None) => Err(forbidden("this server has no admin token, so nobody may do this over HTTP")),
            (Caller::Nobody, _) => Err(unauthorized("this needs the admin token as `Authorization: Bearer TOKEN`")),
            (Caller::Client | Caller::Stranger, _) => Err(forbidden("this needs the admin token")),
        }
    }

    fn caller(&self, headers: &HeaderMap) -> Caller {
        let Some(secret) = bearer(headers) else { return Caller::Nobody };
        let hash = blake3::hash(secret);
        let is_admin = self.admin.is_some_and(|admin| admin == hash);
        // Every key is compared, so that the time tells nothing about which one matched.
        let is_client = self.keys.iter().fold(false, |found, key| found | (*key == hash));
        match (is_admin, is_client) {
            (true, _) => Caller::Admin,
            (false, true) => Caller::Client,
            (false, false) => Caller::Stranger,
        }
    }

    fn check_host(&self, headers: &HeaderMap) -> Result<(), ApiError> {
        let mut hosts = headers.get_all(header::HOST).iter();
        let (Some(host), None) = (hosts.next(), hosts.next()) else {
            return Err(ApiError::bad_request("a request needs one `Host` header"));
        };
        let host = String::from_utf8_lossy(host.as_bytes());
        if self.is_known_host(&host) {
            return Ok(());
        }
        Err(forbidden(format!(
            "without API keys this server answers only to `localhost` and IP addresses, not to `{}`, so that web pages \
             cannot reach it; configure a key, or allow this host name",
            clip(&host)
        )))
    }

    fn is_known_host(&self, host: &str) -> bool {
        if let Some(rest) = host.strip_prefix('[') {
            return rest.split_once(']').is_some_and(|(ip, _)| ip.parse::<IpAddr>().is_ok());
        }
        let name = host.split_once(':').map_or(host, |(name, _)| name);
        let name = name.strip_suffix('.').unwrap_or(name).to_ascii_lowercase();
        name.parse::<IpAddr>().is_ok()
            || name == "localhost"
            || name.ends_with(".localhost")
            || self.host_names.iter().any(|known| known.eq_ignore_ascii_case(&name))
    }
}

impl fmt::Debug for Access {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Access").field("keys", &self.keys.len()).field("admin", &self.admin.is_some()).finish()
    }
}

/// Lets a request through or answers it.
pub(crate) async fn guard(
    State(access): State<Arc<Access>>,
    request: Request,
    next: Next,
) -> Result<Response, ApiError> {
    access.check(request.uri().path(), request.headers())?;
    Ok(next.run(request).await)
}

/// The secret after `Bearer`; an empty one is none.
fn bearer(headers: &HeaderMap) -> Option<&[u8]> {
    let (scheme, secret) = headers.get(header::AUTHORIZATION)?.as_bytes().split_at_checked("Bearer ".len())?;
    let secret = secret.trim_ascii();
    (scheme.eq_ignore_ascii_case(b"Bearer ") && !secret.is_empty()).then_some(secret)
}

fn unauthorized(message: &str) -> ApiError {
    ApiError::new(StatusCode::UNAUTHORIZED, message).with_code("invalid_api_key")
}

fn forbidden(message: impl Into<String>) -> ApiError {
    ApiError::new(StatusCode::FORBIDDEN, message).with_code("forbidden")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(host: &str, authorization: Option<&str>) -> HeaderMap {
        let mut headers = HeaderMap::new();
        headers.insert(header::HOST, host.parse().unwrap());
        if let Some(value) = authorization {
            headers.insert(header::AUTHORIZATION, value.parse().unwrap());
        }
        headers
    }

    fn status(result: Result<(), ApiError>) -> u16 {
        result.map_or_else(|error| error.status.as_u16(), |()| 200)
    }

    #[test]
    fn names_of_web_pages_are_refused_without_keys() {
        let access = Access::new(&[], None, &["box.lan".to_owned()]);
        for (host, expected) in [
            ("localhost", 200),
            ("LOCALHOST.:8080", 200),
            ("a.localhost:1", 200),
            ("127.0.0.1:8080", 200),
            ("192.168.1.5", 200),
            ("[::1]:8080", 200),
            ("Box.lan:80", 200),
            ("evil.example", 403),
            ("localhost.evil.example", 403),
            ("127.0.0.1.evil.example", 403),
            ("[evil]:1", 403),
            ("", 403),
        ] {
            assert_eq!(status(access.check("/v1/models", &headers(host, None))), expected, "{host}");
            assert_eq!(status(access.check("/health", &headers(host, None))), 200, "{host}");
        }
        assert_eq!(status(access.check("/v1/models", &HeaderMap::new())), 400);
        let mut twice = headers("localhost", None);
        twice.append(header::HOST, "evil.example".parse().unwrap());
        assert_eq!(status(access.check("/v1/models", &twice)), 400);
    }

    #[test]
    fn keys_open_all_but_admin_routes() {
        let access = Access::new(&["one".to_owned(), "two".to_owned()], Some("root"), &[]);
        for (authorization, route, admin) in [
            (None, 401, 401),
            (Some("Bearer one"), 200, 403),
            (Some("bearer two"), 200, 403),
            (Some("Bearer root"), 200, 200),
            (Some("Bearer on"), 401, 403),
            (Some("Bearer "), 401, 401),
            (Some("Basic one"), 401, 401),
            (Some("one"), 401, 401),
        ] {
            let headers = headers("evil.example", authorization);
            assert_eq!(status(access.check("/v1/models", &headers)), route, "{authorization:?}");
            assert_eq!(status(access.check_admin(&headers)), admin, "{authorization:?}");
        }
    }

    #[test]
    fn an_empty_key_opens_nothing() {
        let access = Access::new(&[String::new()], Some(""), &[]);
        assert_eq!(status(access.check("/v1/models", &headers("localhost", Some("Bearer ")))), 401);
        assert_eq!(status(access.check_admin(&headers("localhost", Some("Bearer  ")))), 401);
        let access = Access::new(&[], None, &[]);
        assert_eq!(status(access.check_admin(&headers("localhost", Some("Bearer x")))), 403);
    }
}
