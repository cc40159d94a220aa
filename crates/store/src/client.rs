//! Requests over HTTP: ranges of files, and small texts.
//!
//! Redirects are followed by hand, as hubs answer with the address of a storage that knows no tokens: a token goes to
//! the host that it is for, and nowhere else. Such an address may be signed for one range, so each range is asked for
//! where the file was said to be, and redirected anew.
//!
//! What breaks off is asked for again from where it broke off, after a pause, as long as it moves on ([`Tries`]).
//! Nothing is believed that a reply does not say: its range and length are compared with what was asked for.

use std::io::{self, Read};
use std::ops::Range;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use ureq::http::{HeaderName, Response, header};
use ureq::tls::{Certificate, RootCerts, TlsConfig};

use crate::error::{Access, FetchError};
use crate::settings::{Limits, Settings};
use crate::store::now;
use crate::tries::{OnRetry, Tries};
use crate::url::{is_same_origin, origin, redirected, refusal, without_query};

/// Most redirects of one request: a hub answers with one, a renamed repository with one more.
const MAX_REDIRECTS: usize = 5;

/// Most that is read of a redirect's body: it repeats the address, and is there for people.
const MAX_REDIRECT_BYTES: u64 = 16 << 10;

/// Bytes of a reply that are handed on at once, and all that is kept of it in memory.
const PIECE_BYTES: usize = 128 << 10;

/// Asks servers. Clones share their connections.
#[derive(Clone)]
pub struct Client {
    settings: Arc<Settings>,
    agents: Arc<Agents>,
}

#[derive(Default)]
struct Agents {
    plain: OnceLock<ureq::Agent>,
    secure: OnceLock<Result<ureq::Agent, String>>,
}

/// A file on a server, as far as it is known.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Target {
    pub url: String,
    /// Its length.
    pub n_bytes: Option<u64>,
    /// What tells whether it is the same file still: a strong entity tag.
    pub etag: Option<String>,
    /// Whether all of it is compared with a known sum in the end. Tags are not looked at then: the storages of one hub
    /// may have several for the same bytes.
    pub has_sum: bool,
    /// Whether it was asked for with the token, so that others may not be able to read it.
    pub had_token: bool,
}

/// A reply with a status that is to be looked at: 200, 206 or 416.
pub(crate) struct Reply {
    response: Response<ureq::Body>,
    /// What was asked for, and of whom.
    place: String,
    /// Whether the token was sent on the way.
    had_token: bool,
}

/// What is asked for.
struct Ask<'a> {
    url: &'a str,
    range: Option<Range<u64>>,
    /// Only a range of the file with this tag is wanted.
    etag: Option<&'a str>,
    /// How long all of it may take; `None` limits each silence alone.
    time: Option<Duration>,
}

impl Client {
    /// Asks as the settings say.
    pub fn new(settings: Settings) -> Self {
        Self { settings: Arc::new(settings), agents: Arc::default() }
    }

    /// One that asks once and does not wait for long, for those who can do without an answer.
    pub(crate) fn hasty(&self) -> Self {
        let mut settings = Settings::clone(&self.settings);
        settings.limits.n_tries = 1;
        settings.limits.request_time = settings.limits.request_time.min(settings.limits.look_time);
        Self { settings: Arc::new(settings), agents: Arc::clone(&self.agents) }
    }

    /// As it was made.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    pub(crate) fn limits(&self) -> &Limits {
        &self.settings.limits
    }

    /// Reads a text of at most `max_bytes`, and the reply's `Link`.
    pub(crate) fn text(&self, url: &str, max_bytes: u64, on_retry: OnRetry) -> Result<(Vec<u8>, String), FetchError> {
        let mut tries = Tries::new(self.limits(), None, on_retry);
        loop {
            match self.text_once(url, max_bytes) {
                Ok(found) => return Ok(found),
                Err(error) => tries.failed(error, 0)?,
            }
        }
    }

    fn text_once(&self, url: &str, max_bytes: u64) -> Result<(Vec<u8>, String), FetchError> {
        let reply = self.ask(&Ask { url, range: None, etag: None, time: Some(self.limits().request_time) })?;
        if reply.status() != 200 {
            return Err(FetchError::Refused { url: reply.place, status: reply.response.status().as_u16() });
        }
        let link = reply.header(&header::LINK);
        let expected = reply.content_length();
        let place = reply.place.clone();
        let mut text = Vec::new();
        let read = reply.body().take(max_bytes + 1).read_to_end(&mut text);
        let found = text.len() as u64;
        if found > max_bytes {
            return Err(FetchError::TooMuch { url: place, what: "the list of files", limit: max_bytes });
        }
        if read.is_err() || expected.is_some_and(|expected| expected != found) {
            let expected = expected.unwrap_or(found + 1);
            return Err(FetchError::BrokeOff { url: place, found, expected });
        }
        Ok((text, link))
    }

    /// Reads the bytes of `range`, or up to the file's end, and hands them on piece by piece; asks again for what
    /// breaks off, until `deadline`. Says what the file is.
    pub(crate) fn read(
        &self,
        target: &Target,
        range: Range<u64>,
        deadline: Option<Instant>,
        on_retry: OnRetry,
        sink: &mut dyn FnMut(&[u8]) -> io::Result<()>,
    ) -> Result<Target, FetchError> {
        let mut tries = Tries::new(self.limits(), deadline, on_retry);
        let mut known = target.clone();
        let mut at = range.start;
        loop {
            let time = tries.time(&target.url)?;
            let before = at;
            let mut counted = |piece: &[u8]| {
                sink(piece)?;
                at += piece.len() as u64;
                Ok(())
            };
            match self.read_once(&mut known, before..range.end, time, &mut counted) {
                Ok(()) => return Ok(known),
                Err(error) => tries.failed(error, at - before)?,
            }
        }
    }

    fn read_once(
        &self,
        known: &mut Target,
        range: Range<u64>,
        time: Duration,
        sink: &mut dyn FnMut(&[u8]) -> io::Result<()>,
    ) -> Result<(), FetchError> {
        let reply = self.ask(&Ask {
            url: &known.url,
            range: Some(range.clone()),
            etag: known.etag.as_deref(),
            time: Some(time),
        })?;
        let (expected, found) = reply.range(known, &range)?;
        *known = found;
        reply.copy(Some(expected), sink)
    }

    /// Asks for the beginning of a file of which nothing is known, to learn what it is. `bytes` gets at most `n_bytes`
    /// of it. The server may send the whole file instead; then the second value is false.
    pub(crate) fn probe(
        &self,
        url: &str,
        n_bytes: u64,
        bytes: &mut Vec<u8>,
        on_retry: OnRetry,
    ) -> Result<(Target, bool), FetchError> {
        let mut tries = Tries::new(self.limits(), None, on_retry);
        loop {
            bytes.clear();
            match self.probe_once(url, n_bytes, bytes) {
                Ok(found) => return Ok(found),
                Err(error) => tries.failed(error, 0)?,
            }
        }
    }

    fn probe_once(&self, url: &str, n_bytes: u64, bytes: &mut Vec<u8>) -> Result<(Target, bool), FetchError> {
        let mut known = Target { url: url.to_owned(), ..Target::default() };
        let ask = Ask { url, range: Some(0..n_bytes), etag: None, time: Some(self.limits().request_time) };
        let reply = self.ask(&ask)?;
        known.had_token = reply.had_token;
        if reply.status() == 200 {
            (known.n_bytes, known.etag) = (reply.content_length(), reply.etag());
            let expected = known.n_bytes.unwrap_or(0).min(n_bytes);
            // Whether it breaks off is found out when it is read for good.
            let _ = reply.body().take(n_bytes).read_to_end(bytes);
            return if (bytes.len() as u64) < expected {
                Err(FetchError::BrokeOff { url: known.url, found: bytes.len() as u64, expected })
            } else {
                Ok((known, false))
            };
        }
        let (expected, found) = reply.range(&known, &(0..n_bytes))?;
        reply.copy(Some(expected), &mut |piece| {
            bytes.extend_from_slice(piece);
            Ok(())
        })?;
        Ok((found, true))
    }

    /// Reads a whole file from a server that knows no ranges; once, since there is nothing to go on from.
    pub(crate) fn read_whole(
        &self,
        target: &Target,
        sink: &mut dyn FnMut(&[u8]) -> io::Result<()>,
    ) -> Result<(), FetchError> {
        let reply = self.ask(&Ask { url: &target.url, range: None, etag: None, time: None })?;
        if reply.status() != 200 {
            return Err(FetchError::Refused { url: reply.place.clone(), status: reply.status() });
        }
        let found = reply.content_length();
        if target.n_bytes.is_some() && found.is_some() && found != target.n_bytes {
            return Err(FetchError::Changed { url: reply.place });
        }
        let expected = found.or(target.n_bytes);
        reply.copy(expected, sink)
    }

    /// The reply; redirects are followed, and what is no yes becomes an error.
    fn ask(&self, ask: &Ask) -> Result<Reply, FetchError> {
        let settings = &self.settings;
        let shown = without_query(ask.url).to_owned();
        if settings.is_offline {
            return Err(FetchError::Offline { url: shown });
        }
        if let Some(why) = refusal(ask.url) {
            return Err(FetchError::Address { url: shown, why });
        }
        let (mut at, mut had_token) = (ask.url.to_owned(), false);
        for _ in 0..=MAX_REDIRECTS {
            had_token |= self.sends_token(&at);
            let place = place(ask.url, &at);
            let response = self.ask_once(ask, &at, &place)?;
            let status = response.status().as_u16();
            match status {
                200 | 206 | 416 => return Ok(Reply { response, place, had_token }),
                301 | 302 | 303 | 307 | 308 => {
                    at = redirected(ask.url, &at, &text_of(&response, &header::LOCATION))?;
                    // A connection is used again only if its reply was read to the end. Whether it can be is all one.
                    let mut body = response.into_body().into_with_config().limit(MAX_REDIRECT_BYTES).reader();
                    let _ = io::copy(&mut body, &mut io::sink());
                }
                401 | 403 => {
                    return Err(FetchError::Forbidden { url: place, status, access: self.access(ask.url, &at) });
                }
                404 | 410 => return Err(FetchError::NotFound { url: place }),
                408 | 425 | 429 | 500 | 502 | 503 | 504 => {
                    let wait = retry_after(&text_of(&response, &header::RETRY_AFTER), now());
                    return Err(FetchError::Busy { url: place, status, wait });
                }
                _ => return Err(FetchError::Refused { url: place, status }),
            }
        }
        Err(FetchError::Redirect { url: shown, to: without_query(&at).to_owned(), why: "is one redirect too many" })
    }

    fn ask_once(&self, ask: &Ask, at: &str, place: &str) -> Result<Response<ureq::Body>, FetchError> {
        let limits = self.limits();
        let mut request = self
            .agent(at)?
            .get(at)
            .config()
            .timeout_connect(Some(limits.request_time))
            .timeout_recv_response(Some(limits.request_time))
            .timeout_per_read(Some(limits.silence))
            .timeout_global(ask.time)
            .build()
            .header(header::ACCEPT_ENCODING, "identity");
        if let Some(range) = &ask.range {
            request = request.header(header::RANGE, format!("bytes={}-{}", range.start, range.end.saturating_sub(1)));
            if let Some(etag) = ask.etag {
                request = request.header(header::IF_RANGE, etag);
            }
        }
        if let Some(token) = self.settings.token.as_ref().filter(|_| self.sends_token(at)) {
            request = request.header(header::AUTHORIZATION, token.bearer());
        }
        request.call().map_err(|error| match error {
            ureq::Error::Timeout(_) => {
                let limit = ask.time.map_or(limits.request_time, |time| time.min(limits.request_time));
                FetchError::NoAnswer { url: place.to_owned(), limit }
            }
            source => FetchError::Unreachable { url: place.to_owned(), source: Box::new(source) },
        })
    }

    /// Whether whoever is at `url` gets the token.
    pub(crate) fn sends_token(&self, url: &str) -> bool {
        self.settings.token.is_some() && is_same_origin(url, &self.settings.endpoint)
    }

    fn access(&self, url: &str, at: &str) -> Access {
        let settings = &self.settings;
        let is_hub = is_same_origin(url, &settings.endpoint);
        match (is_same_origin(url, at), is_hub, &settings.token) {
            (false, ..) => Access::Storage,
            (true, true, None) => Access::HubWithout,
            (true, true, Some(token)) => Access::HubWith { place: token.place().to_owned() },
            (true, false, _) => Access::Other,
        }
    }

    fn agent(&self, url: &str) -> Result<ureq::Agent, FetchError> {
        let n_connections = self.limits().n_connections;
        if !url.starts_with("https://") {
            return Ok(self.agents.plain.get_or_init(|| agent(n_connections, None)).clone());
        }
        let made = self.agents.secure.get_or_init(|| Ok(agent(n_connections, Some(trust()?))));
        made.clone().map_err(|why| FetchError::NoAuthorities { why })
    }
}

fn agent(n_connections: usize, tls: Option<TlsConfig>) -> ureq::Agent {
    let mut config = ureq::Agent::config_builder()
        .http_status_as_error(false)
        .max_redirects(0)
        .max_redirects_will_error(false)
        .max_idle_connections(2 * n_connections)
        .max_idle_connections_per_host(n_connections);
    if let Some(tls) = tls {
        config = config.tls_config(tls);
    }
    ureq::Agent::new_with_config(config.build())
}

/// The authorities that the system trusts.
fn trust() -> Result<TlsConfig, String> {
    let found = rustls_native_certs::load_native_certs();
    let roots: Vec<_> = found.certs.iter().map(|der| Certificate::from_der(der).to_owned()).collect();
    if roots.is_empty() {
        return Err(found.errors.first().map(|error| format!(": {error}")).unwrap_or_default());
    }
    let tls = TlsConfig::builder()
        .root_certs(RootCerts::new_with_certs(&roots))
        .unversioned_rustls_crypto_provider(Arc::new(rustls::crypto::ring::default_provider()));
    Ok(tls.build())
}

/// What was asked for, and of whom. Of another server only the name: the rest of the address may be a key to it.
fn place(url: &str, at: &str) -> String {
    let shown = without_query(url);
    if is_same_origin(url, at) { shown.to_owned() } else { format!("{} (where {shown} leads)", origin(at)) }
}

impl Reply {
    fn status(&self) -> u16 {
        self.response.status().as_u16()
    }

    fn header(&self, name: &HeaderName) -> String {
        text_of(&self.response, name)
    }

    fn content_length(&self) -> Option<u64> {
        self.header(&header::CONTENT_LENGTH).trim().parse().ok()
    }

    /// The tag, if it is strong: a weak one does not tell bytes apart.
    fn etag(&self) -> Option<String> {
        let etag = self.header(&header::ETAG);
        let is_sound = etag.len() <= MAX_ETAG_BYTES && etag.starts_with('"') && etag.ends_with('"');
        is_sound.then_some(etag)
    }

    /// Checks that the reply holds the bytes of `range`, or those up to the file's end, of the `known` file; says how
    /// many these are, and what the file is.
    fn range(&self, known: &Target, range: &Range<u64>) -> Result<(u64, Target), FetchError> {
        let (url, etag) = (self.place.clone(), self.etag().filter(|_| !known.has_sum));
        let is_other = known.etag.is_some() && etag.is_some() && known.etag != etag;
        let found = self.header(&header::CONTENT_RANGE);
        match self.status() {
            _ if is_other => return Err(FetchError::Changed { url }),
            200 => return Err(FetchError::NoRanges { url }),
            416 => return Err(FetchError::Outside { url, start: range.start, end: range.end }),
            _ => {}
        }
        let wrong = || FetchError::WrongRange { url: url.clone(), start: range.start, found: found.clone() };
        let (first, last, n_bytes) = content_range(&found).ok_or_else(wrong)?;
        if known.n_bytes.is_some_and(|known| known != n_bytes) {
            return Err(FetchError::Changed { url });
        }
        // All that was asked for, or all that there is: a server that deals out crumbs would be asked without end.
        let is_whole = last.checked_add(1) == Some(range.end.min(n_bytes));
        if first != range.start || last < first || !is_whole {
            return Err(wrong());
        }
        let etag = etag.or_else(|| known.etag.clone());
        Ok((last - first + 1, Target { n_bytes: Some(n_bytes), etag, ..known.clone() }))
    }

    fn body(self) -> impl Read {
        // The limit of the body counts as exceeded where it is reached; readers of it have limits of their own.
        self.response.into_body().into_with_config().limit(u64::MAX).reader()
    }

    /// Hands the body on piece by piece: `expected` bytes of it, or all.
    fn copy(self, expected: Option<u64>, sink: &mut dyn FnMut(&[u8]) -> io::Result<()>) -> Result<(), FetchError> {
        let url = self.place.clone();
        let mut body = self.body().take(expected.unwrap_or(u64::MAX));
        let (mut piece, mut found) = (vec![0; PIECE_BYTES], 0u64);
        loop {
            let n_read = match body.read(&mut piece) {
                Ok(n_read) => n_read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                // What breaks off is told by its length, whatever the error says.
                Err(_) => return Err(FetchError::BrokeOff { url, found, expected: expected.unwrap_or(found + 1) }),
            };
            if n_read == 0 {
                return match expected {
                    Some(expected) if expected != found => Err(FetchError::BrokeOff { url, found, expected }),
                    _ => Ok(()),
                };
            }
            found += n_read as u64;
            sink(&piece[..n_read]).map_err(|source| FetchError::Sink { url: url.clone(), source })?;
        }
    }
}

/// Longest entity tag. Usual are hashes of up to 64 characters.
const MAX_ETAG_BYTES: usize = 256;

fn text_of(response: &Response<ureq::Body>, name: &HeaderName) -> String {
    response.headers().get(name).and_then(|value| value.to_str().ok()).unwrap_or("").to_owned()
}

/// How long a server wants to be left alone from `now` on: seconds, or a date.
fn retry_after(text: &str, now: u64) -> Option<Duration> {
    let text = text.trim();
    if let Ok(seconds) = text.parse() {
        return Some(Duration::from_secs(seconds));
    }
    let then = jiff::fmt::rfc2822::parse(text).ok()?.timestamp().as_second();
    Some(Duration::from_secs(u64::try_from(then).unwrap_or(0).saturating_sub(now)))
}

/// First byte, last byte and length of the file, of `bytes 0-99/1234`, as a server says them: whether they make sense
/// is for the caller to check.
pub fn content_range(text: &str) -> Option<(u64, u64, u64)> {
    let (range, length) = text.trim().strip_prefix("bytes ")?.split_once('/')?;
    let (first, last) = range.split_once('-')?;
    Some((first.parse().ok()?, last.parse().ok()?, length.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_read() {
        assert_eq!(content_range("bytes 0-99/1234"), Some((0, 99, 1234)));
        for wrong in ["", "bytes */1234", "bytes 0-99/*", "0-99/1234", "bytes 5/9"] {
            assert_eq!(content_range(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn pauses_are_seconds_or_dates() {
        let now = 784_111_770;
        let check = |text, seconds: Option<u64>| {
            assert_eq!(retry_after(text, now), seconds.map(Duration::from_secs), "{text:?}");
        };
        check(" 7 ", Some(7));
        check("Sun, 06 Nov 1994 08:49:37 GMT", Some(7));
        check("Sun, 06 Nov 1994 08:49:00 GMT", Some(0));
        ["", "soon", "-1", "7.5"].iter().for_each(|text| check(text, None));
    }

    #[test]
    fn who_refuses_is_named_without_the_key_to_it() {
        let client = Client::new(Settings::at("https://h").unwrap());
        assert_eq!(
            (place("https://h/a?k=1", "https://h/b"), client.access("https://h/a", "https://h/b")),
            ("https://h/a".into(), Access::HubWithout)
        );
        let at = "https://storage/a?signature=secret";
        assert_eq!(place("https://h/a", at), "https://storage (where https://h/a leads)");
        assert_eq!(client.access("https://h/a", at), Access::Storage);
        assert_eq!(client.access("https://i/a", "https://i/a"), Access::Other);
    }
}
