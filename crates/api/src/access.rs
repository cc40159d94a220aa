//! Who may ask: API keys, the admin token, and the check of the `Host` header; and in whose name a request is answered.
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
use brigade_base::TenantId;

use crate::ApiOptions;
use crate::error::ApiError;
use crate::fields::clip;

/// Routes that anyone may ask, since they tell nothing but whether the server lives.
const OPEN_ROUTES: [&str; 2] = ["/health", "/ready"];

/// The rules. Secrets are kept as hashes, whose comparison takes the same time wherever two differ.
pub(crate) struct Access {
    keys: Vec<Hash>,
    admin: Option<Hash>,
    host_names: Vec<String>,
    one_tenant: bool,
}

/// In whose name a request is answered; the guard leaves it in the request's extensions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Caller {
    /// The same for all requests with one key; [`NO_KEY`] without keys.
    pub(crate) tenant: TenantId,
    /// Showed the admin token.
    pub(crate) is_admin: bool,
}

/// The tenant of callers who need no key.
const NO_KEY: TenantId = TenantId(0);

/// What a caller showed: nothing, what nobody knows, or a known secret by its hash.
enum Shown {
    Nothing,
    Unknown,
    Key(Hash),
    AdminToken(Hash),
}

impl Caller {
    /// Whether the caller may see what became of a request of `tenant`.
    pub(crate) fn may_see(self, tenant: TenantId) -> bool {
        self.is_admin || self.tenant == tenant
    }
}

impl Access {
    pub(crate) fn new(options: &ApiOptions) -> Self {
        Self {
            keys: options.keys.iter().map(|key| blake3::hash(key.as_bytes())).collect(),
            admin: options.admin_token.as_ref().map(|token| blake3::hash(token.as_bytes())),
            host_names: options.host_names.clone(),
            one_tenant: options.share_prefix_cache,
        }
    }

    /// Whether a request may go on to its route, and in whose name.
    pub(crate) fn check(&self, path: &str, headers: &HeaderMap) -> Result<Caller, ApiError> {
        let nobody = Caller { tenant: NO_KEY, is_admin: false };
        if OPEN_ROUTES.contains(&path) {
            return Ok(nobody);
        }
        let shown = self.shown(headers);
        if self.keys.is_empty() {
            self.check_host(headers)?;
        }
        match shown {
            Shown::AdminToken(hash) => Ok(Caller { tenant: self.tenant(hash), is_admin: true }),
            Shown::Key(hash) => Ok(Caller { tenant: self.tenant(hash), is_admin: false }),
            // Clients of OpenAI's cannot be told to send no key, so without keys any is as good as none.
            Shown::Nothing | Shown::Unknown if self.keys.is_empty() => Ok(nobody),
            Shown::Nothing => Err(unauthorized("no API key; send it as `Authorization: Bearer KEY`")),
            Shown::Unknown => Err(unauthorized("this API key is not known here")),
        }
    }

    /// Whose requests those with a secret are: the beginning of its hash, so the same after a restart.
    fn tenant(&self, secret: Hash) -> TenantId {
        if self.one_tenant {
            return NO_KEY;
        }
        let mut first = [0; 8];
        first.copy_from_slice(&secret.as_bytes()[..8]);
        TenantId(u64::from_le_bytes(first).max(NO_KEY.next().0))
    }

    /// Whether the caller may change who takes part.
    pub(crate) fn check_admin(&self, headers: &HeaderMap) -> Result<(), ApiError> {
        match (self.shown(headers), &self.admin) {
            (Shown::AdminToken(_), _) => Ok(()),
            (_, None) => Err(forbidden("this server has no admin token, so nobody may do this over HTTP")),
            (Shown::Nothing, _) => Err(unauthorized("this needs the admin token as `Authorization: Bearer TOKEN`")),
            (Shown::Key(_) | Shown::Unknown, _) => Err(forbidden("this needs the admin token")),
        }
    }

    fn shown(&self, headers: &HeaderMap) -> Shown {
        let Some(secret) = bearer(headers) else { return Shown::Nothing };
        let hash = blake3::hash(secret);
        let is_admin = self.admin.is_some_and(|admin| admin == hash);
        // Every key is compared, so that the time tells nothing about which one matched.
        let is_client = self.keys.iter().fold(false, |found, key| found | (*key == hash));
        match (is_admin, is_client) {
            (true, _) => Shown::AdminToken(hash),
            (false, true) => Shown::Key(hash),
            (false, false) => Shown::Unknown,
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

/// Lets a request through, with its [`Caller`] in the extensions, or answers it.
pub(crate) async fn guard(
    State(access): State<Arc<Access>>,
    mut request: Request,
    next: Next,
) -> Result<Response, ApiError> {
    let caller = access.check(request.uri().path(), request.headers())?;
    request.extensions_mut().insert(caller);
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

    fn access(keys: &[&str], admin_token: Option<&str>, host_names: &[&str]) -> Access {
        let owned = |texts: &[&str]| texts.iter().map(|&text| text.to_owned()).collect();
        Access::new(&ApiOptions {
            keys: owned(keys),
            admin_token: admin_token.map(str::to_owned),
            host_names: owned(host_names),
            ..ApiOptions::default()
        })
    }

    fn status<T>(result: Result<T, ApiError>) -> u16 {
        result.map_or_else(|error| error.status.as_u16(), |_| 200)
    }

    fn caller(access: &Access, authorization: Option<&str>) -> Caller {
        access.check("/v1/models", &headers("localhost", authorization)).unwrap()
    }

    #[test]
    fn names_of_web_pages_are_refused_without_keys() {
        let access = access(&[], None, &["box.lan"]);
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
        let access = access(&["one", "two"], Some("root"), &[]);
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
        let access = access(&[""], Some(""), &[]);
        assert_eq!(status(access.check("/v1/models", &headers("localhost", Some("Bearer ")))), 401);
        assert_eq!(status(access.check_admin(&headers("localhost", Some("Bearer  ")))), 401);
        assert_eq!(status(self::access(&[], None, &[]).check_admin(&headers("localhost", Some("Bearer x")))), 403);
    }

    #[test]
    fn each_key_is_a_tenant_of_its_own() {
        let access = access(&["one", "two"], Some("root"), &[]);
        let [one, two, root] = ["Bearer one", "Bearer two", "Bearer root"].map(|shown| caller(&access, Some(shown)));
        assert_eq!(one, caller(&self::access(&["one"], None, &[]), Some("bearer one")));
        let tenants = [one.tenant, two.tenant, root.tenant, NO_KEY];
        assert!((1..4).all(|i| tenants[..i].iter().all(|tenant| *tenant != tenants[i])), "{tenants:?}");
        assert!(one.may_see(one.tenant) && !one.may_see(two.tenant) && !one.may_see(root.tenant));
        assert!(root.may_see(one.tenant) && root.may_see(two.tenant));
    }

    #[test]
    fn without_keys_all_but_the_admin_are_one_tenant() {
        let access = access(&[], Some("root"), &[]);
        let nobody = Caller { tenant: NO_KEY, is_admin: false };
        assert_eq!(caller(&access, None), nobody);
        assert_eq!(caller(&access, Some("Bearer none")), nobody);
        let admin = caller(&access, Some("Bearer root"));
        assert!(admin.is_admin && admin.tenant != NO_KEY);
    }

    #[test]
    fn a_shared_cache_makes_all_one_tenant() {
        let options = ApiOptions {
            keys: vec!["one".to_owned()],
            admin_token: Some("root".to_owned()),
            share_prefix_cache: true,
            ..ApiOptions::default()
        };
        let access = Access::new(&options);
        for (shown, is_admin) in [("Bearer one", false), ("Bearer root", true)] {
            assert_eq!(caller(&access, Some(shown)), Caller { tenant: NO_KEY, is_admin });
        }
    }
}
