//! A model's header from the hub or any web server, without the model: only the beginnings of its files are read.
//!
//! A header says of itself how long it is at least, so ranges of growing length are asked for until it is whole; a few
//! hundred KiB for a small vocabulary, some MiB for a large one. Of a split model the header of every file is read.
//!
//! Redirects are followed by hand, as hubs answer with the address of a storage that knows no tokens: a token goes to
//! the host that it is for, and nowhere else. Such an address may be signed for one range, so each range is asked for
//! where the file was said to be, and redirected anew.
//!
//! All files of a model share one [`Budget`] of bytes and time, whatever servers send.

use std::io::Read;
use std::time::{Duration, Instant};

use brigade_gguf::{Catalog, HeaderError};
use ureq::http::{Response, header};

use crate::endpoint::agent;
use crate::error::Failure;

/// What is read of a file at first: most headers of files behind the first, and all of a model with few tokens.
const FIRST_READ_BYTES: u64 = 256 << 10;

/// Longest header that is read. The longest known ones have 20 MiB; a file that needs more is not what was meant, and
/// is read over somebody's mobile phone.
const MAX_HEADER_BYTES: u64 = 64 << 20;

/// Most files of one model, as where they lie on a disk.
const MAX_PARTS: u32 = 512;

/// Most redirects of one request: a hub answers with one, a renamed repository with one more.
const MAX_REDIRECTS: usize = 5;

/// Most ranges of one header: each is at least twice as long as what is there, so it is whole after log2 of
/// [`MAX_HEADER_BYTES`] / [`FIRST_READ_BYTES`] and the first.
const MAX_READS: u32 = (MAX_HEADER_BYTES / FIRST_READ_BYTES).ilog2() + 1;

/// Most bytes of all headers of a model: the longest one, and what is read at first of each other file.
const MAX_BYTES: u64 = MAX_HEADER_BYTES + MAX_PARTS as u64 * FIRST_READ_BYTES;

/// How long a request may take: what remains of [`MAX_HEADER_BYTES`] over a link of 2 MB/s.
const TIMEOUT: Duration = Duration::from_secs(30);

/// How long all requests may take: [`MAX_BYTES`] over the same link, and a tenth of a second to ask for each file.
const TIME: Duration = Duration::from_secs(160);

/// The hub, unless `HF_ENDPOINT` names another.
const HUB: &str = "https://huggingface.co";

/// A header could not be read.
#[derive(Debug, thiserror::Error)]
pub enum RemoteError {
    /// There was no reply.
    #[error("{url} cannot be reached: {source}")]
    Unreachable {
        /// What was asked for.
        url: String,
        /// Why.
        source: Box<ureq::Error>,
    },
    /// There is no such file.
    #[error("{url} is not there (404); check the names of the repository and the file")]
    NotFound {
        /// What was asked for.
        url: String,
    },
    /// The server wants to know who asks.
    #[error("{url} is not for everybody ({status}): {}", access.advice())]
    Forbidden {
        /// What was asked for.
        url: String,
        /// HTTP status.
        status: u16,
        /// As whom it was asked.
        access: Access,
    },
    /// The server said something else than yes.
    #[error("{url} answered {status}; try again later, or download the file and name it")]
    Refused {
        /// What was asked for.
        url: String,
        /// HTTP status.
        status: u16,
    },
    /// The server gives whole files only.
    #[error("{url} knows no ranges, so only the whole file could be had; download it and name it")]
    NoRanges {
        /// What was asked for.
        url: String,
    },
    /// The server sent other bytes than those that were asked for.
    #[error("{url} sent {found:?} in place of the bytes from {start}; download the file and name it")]
    WrongRange {
        /// What was asked for.
        url: String,
        /// The first byte that was asked for.
        start: u64,
        /// What the reply says it holds.
        found: String,
    },
    /// A reply ended early.
    #[error("{url} broke off after {found} of {expected} bytes; try again")]
    BrokeOff {
        /// What was asked for.
        url: String,
        /// Bytes that came.
        found: u64,
        /// Bytes that the reply promised.
        expected: u64,
    },
    /// A redirect leads nowhere.
    #[error("{url} points to {to:?}, which {why}")]
    Redirect {
        /// What was asked for.
        url: String,
        /// Where it points.
        to: String,
        /// What is wrong with that.
        why: &'static str,
    },
    /// What came is no header of a model.
    #[error("{url}: {source}")]
    Header {
        /// What was asked for.
        url: String,
        /// Why.
        source: HeaderError,
    },
    /// All headers together are too much.
    #[error("{url}: the headers of all files have more than {MAX_BYTES} bytes; download the files and name one")]
    TooMuch {
        /// What was asked for.
        url: String,
    },
    /// All headers together take too long.
    #[error(
        "{url}: the headers of this model's files could not be read within {} s; download the files and name one",
        TIME.as_secs()
    )]
    TooSlow {
        /// What was asked for.
        url: String,
    },
    /// The header goes on and on.
    #[error("{url}: the header needs {needed} bytes, more than the limit of {MAX_HEADER_BYTES}; this is no model file")]
    TooLong {
        /// What was asked for.
        url: String,
        /// Bytes that it needs at least.
        needed: u64,
    },
}

/// As whom a server was asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// The hub, without a token.
    HubWithout,
    /// The hub, with a token.
    HubWith,
    /// A storage to which the file's own server redirected; it gets no token.
    Storage,
    /// Another server; there is no token for it.
    Other,
}

impl Access {
    fn advice(self) -> &'static str {
        match self {
            Self::HubWithout => {
                "a private or misspelt repository, or one whose licence must be accepted first; set HF_TOKEN to a \
                 token of the hub that may read it"
            }
            Self::HubWith => {
                "a misspelt repository, or one that the token in HF_TOKEN may not read, for example because its \
                 licence must be accepted first"
            }
            Self::Storage => "the file's server led there, which may have been a moment too late; try again",
            Self::Other => {
                "HF_TOKEN goes to the hub alone, named as hf:OWNER/REPOSITORY/FILE.gguf; download the file and name it"
            }
        }
    }
}

/// Where a model lies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Location {
    /// Of one of its files.
    url: String,
    /// Whether that is the hub.
    is_hub: bool,
    /// Sent to the host of `url`, which is then the hub.
    token: Option<String>,
}

impl Location {
    /// What `https://…`, `http://…` or `hf:owner/repository/file` name; `None` if the text is none of them.
    ///
    /// # Errors
    /// If it begins like one, but names no file.
    pub fn parse(text: &str) -> Result<Option<Self>, Failure> {
        let variable = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
        let hub = variable("HF_ENDPOINT").unwrap_or_else(|| HUB.to_owned());
        if text.starts_with("https://") || text.starts_with("http://") {
            let is_hub = origin(text).eq_ignore_ascii_case(origin(&hub));
            let token = variable("HF_TOKEN").filter(|_| is_hub);
            return Ok(Some(Self { url: text.to_owned(), is_hub, token }));
        }
        let Some(path) = text.strip_prefix("hf:") else { return Ok(None) };
        let url = hub_url(&hub, path).ok_or_else(|| {
            Failure::usage(format!(
                "{text:?} names no file of the hub; write hf:OWNER/REPOSITORY/FILE.gguf, or with a revision \
                 hf:OWNER/REPOSITORY@REVISION/FILE.gguf"
            ))
        })?;
        Ok(Some(Self { url, is_hub: true, token: variable("HF_TOKEN") }))
    }

    /// Name of the file, without what stands before and behind it.
    pub fn file_name(&self) -> &str {
        let path = self.url.split(['?', '#']).next().unwrap_or(&self.url);
        path.rsplit('/').next().unwrap_or(path)
    }

    /// Reads the headers of the model's files.
    ///
    /// # Errors
    /// If one cannot be had, or is unsound.
    pub fn catalog(&self) -> Result<Catalog, Failure> {
        let (mut parts, mut budget) = (Vec::new(), Budget::new());
        for url in part_urls(&self.url)? {
            parts.push(File::new(self, url).header(&mut budget)?);
        }
        let header = |source| RemoteError::Header { url: self.url.clone(), source };
        Ok(Catalog::parse_parts(&parts).map_err(header)?)
    }
}

impl From<RemoteError> for Failure {
    fn from(error: RemoteError) -> Self {
        Self::run(error)
    }
}

/// Where the hub keeps `owner/repository[@revision]/file`.
fn hub_url(hub: &str, path: &str) -> Option<String> {
    let mut parts = path.splitn(3, '/');
    let (owner, repository, file) = (parts.next()?, parts.next()?, parts.next()?);
    let (repository, revision) = repository.split_once('@').unwrap_or((repository, "main"));
    if [owner, repository, revision, file].iter().any(|part| part.is_empty()) {
        return None;
    }
    let [owner, repository, revision, file] = [owner, repository, revision, file].map(escaped);
    Some(format!("{}/{owner}/{repository}/resolve/{revision}/{file}", hub.trim_end_matches('/')))
}

/// As it may stand in a URL's path.
fn escaped(text: &str) -> String {
    let one = |byte: u8| match byte {
        b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' | b'/' => char::from(byte).to_string(),
        other => format!("%{other:02X}"),
    };
    text.bytes().map(one).collect()
}

/// The URLs of all files of a model, of which `url` is one: `…-00001-of-00003.gguf`.
fn part_urls(url: &str) -> Result<Vec<String>, Failure> {
    let (path, query) = url.find(['?', '#']).map_or((url, ""), |at| url.split_at(at));
    let number = |text: &str| (text.len() == 5).then(|| text.parse::<u32>().ok()).flatten();
    let split = path.strip_suffix(".gguf").and_then(|stem| {
        let (rest, count) = stem.rsplit_once("-of-")?;
        let (name, no) = rest.rsplit_once('-')?;
        number(no)?;
        Some((name, number(count)?))
    });
    match split {
        None | Some((_, 0 | 1)) => Ok(vec![url.to_owned()]),
        Some((_, count)) if count > MAX_PARTS => {
            Err(Failure::run(format!("{url} is one of {count} files, more than the limit of {MAX_PARTS}")))
        }
        Some((name, count)) => Ok((1..=count).map(|no| format!("{name}-{no:05}-of-{count:05}.gguf{query}")).collect()),
    }
}

/// What all files of a model may take together.
struct Budget {
    n_bytes_left: u64,
    deadline: Instant,
}

impl Budget {
    fn new() -> Self {
        Self { n_bytes_left: MAX_BYTES, deadline: Instant::now() + TIME }
    }

    /// How long the next request may take; `None` if there is no time left.
    fn next_request(&self) -> Option<Duration> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        (!left.is_zero()).then(|| left.min(TIMEOUT))
    }
}

/// A file on a server.
struct File<'a> {
    location: &'a Location,
    /// Of this file.
    url: String,
    /// Where the last request went: `url`, or where that led.
    at: String,
    /// Made for the scheme of `at`.
    agent: Option<(bool, ureq::Agent)>,
}

impl<'a> File<'a> {
    fn new(location: &'a Location, url: String) -> Self {
        Self { location, at: url.clone(), url, agent: None }
    }

    /// Its beginning, which holds the whole header, and the length of the file.
    fn header(mut self, budget: &mut Budget) -> Result<(Vec<u8>, u64), Failure> {
        let (mut bytes, mut wanted) = (Vec::new(), FIRST_READ_BYTES);
        for _ in 0..MAX_READS {
            let n_file_bytes = self.read_on(&mut bytes, wanted, budget)?;
            let (url, n_read) = (self.url.clone(), bytes.len() as u64);
            match Catalog::parse(&bytes, n_file_bytes) {
                Ok(_) => return Ok((bytes, n_file_bytes)),
                Err(HeaderError::Truncated { needed, .. }) if n_read < n_file_bytes => {
                    if needed > MAX_HEADER_BYTES || n_read >= MAX_HEADER_BYTES {
                        return Err(RemoteError::TooLong { url, needed }.into());
                    }
                    // Doubling at least keeps the number of requests and the work of parsing again small.
                    wanted = needed.max(2 * n_read).min(MAX_HEADER_BYTES).min(n_file_bytes);
                }
                Err(source) => return Err(RemoteError::Header { url, source }.into()),
            }
        }
        Err(RemoteError::TooLong { url: self.url, needed: bytes.len() as u64 + 1 }.into())
    }

    /// Reads from the end of `bytes` up to byte `end`, or the file's end; says how long the file is.
    fn read_on(&mut self, bytes: &mut Vec<u8>, end: u64, budget: &mut Budget) -> Result<u64, Failure> {
        let start = bytes.len() as u64;
        let response = self.ask(start, end, budget)?;
        let url = self.place();
        let found = text_of(&response, header::CONTENT_RANGE.as_str());
        let wrong = || RemoteError::WrongRange { url: url.clone(), start, found: found.clone() };
        let (first, last, n_file_bytes) = content_range(&found).ok_or_else(wrong)?;
        // All that was asked for, or all that there is: a server that deals out crumbs would be asked without end.
        let is_whole = last.checked_add(1) == Some(end.min(n_file_bytes));
        if first != start || last < first || !is_whole {
            return Err(wrong().into());
        }
        let expected = last - first + 1;
        budget.n_bytes_left = budget
            .n_bytes_left
            .checked_sub(expected)
            .ok_or_else(|| RemoteError::TooMuch { url: self.location.url.clone() })?;
        // The body's own limit counts as exceeded where it is reached. What breaks off is told by its length.
        let body = response.into_body().into_with_config().limit(expected + 1).reader();
        let read = body.take(expected).read_to_end(bytes);
        let found = bytes.len() as u64 - start;
        if found != expected || read.is_err() {
            return Err(RemoteError::BrokeOff { url, found, expected }.into());
        }
        Ok(n_file_bytes)
    }

    /// The reply to a request for bytes from `start` to before `end`; redirects are followed.
    fn ask(&mut self, start: u64, end: u64, budget: &Budget) -> Result<Response<ureq::Body>, Failure> {
        self.at.clone_from(&self.url);
        for _ in 0..=MAX_REDIRECTS {
            let response = self.ask_once(start, end, budget)?;
            let (url, status) = (self.place(), response.status().as_u16());
            match status {
                206 => return Ok(response),
                200 => return Err(RemoteError::NoRanges { url }.into()),
                301 | 302 | 303 | 307 | 308 => self.at = self.next(&text_of(&response, header::LOCATION.as_str()))?,
                401 | 403 => return Err(RemoteError::Forbidden { url, status, access: self.access() }.into()),
                404 | 410 => return Err(RemoteError::NotFound { url }.into()),
                416 => {
                    let source = HeaderError::Truncated { needed: start + 1, available: start };
                    return Err(RemoteError::Header { url, source }.into());
                }
                _ => return Err(RemoteError::Refused { url, status }.into()),
            }
        }
        let to = self.at.clone();
        Err(RemoteError::Redirect { url: self.url.clone(), to, why: "is one redirect too many" }.into())
    }

    fn ask_once(&mut self, start: u64, end: u64, budget: &Budget) -> Result<Response<ureq::Body>, Failure> {
        let limit = budget.next_request().ok_or_else(|| RemoteError::TooSlow { url: self.location.url.clone() })?;
        let is_secure = self.at.starts_with("https://");
        let agent = match self.agent.take() {
            Some((same, agent)) if same == is_secure => agent,
            _ => agent(is_secure, 1, Some(TIMEOUT))?,
        };
        let mut request = agent
            .get(&self.at)
            .config()
            .timeout_global(Some(limit))
            .build()
            .header(header::RANGE, format!("bytes={start}-{}", end.saturating_sub(1)))
            .header(header::ACCEPT_ENCODING, "identity");
        if let Some(token) = self.location.token.as_ref().filter(|_| self.is_at_home()) {
            request = request.header(header::AUTHORIZATION, format!("Bearer {token}"));
        }
        let unreachable = |source| RemoteError::Unreachable { url: self.place(), source: Box::new(source) };
        let response = request.call().map_err(unreachable)?;
        self.agent = Some((is_secure, agent));
        Ok(response)
    }

    /// Whether the last request went to the server that was named.
    fn is_at_home(&self) -> bool {
        origin(&self.at) == origin(&self.url)
    }

    /// What was asked for, and of whom. Of another server only the name: the rest of the address may be a key to it.
    fn place(&self) -> String {
        if self.is_at_home() { self.url.clone() } else { format!("{} (where {} leads)", origin(&self.at), self.url) }
    }

    fn access(&self) -> Access {
        match (self.is_at_home(), self.location.is_hub, &self.location.token) {
            (false, ..) => Access::Storage,
            (true, true, None) => Access::HubWithout,
            (true, true, Some(_)) => Access::HubWith,
            (true, false, _) => Access::Other,
        }
    }

    /// Where a redirect leads.
    fn next(&self, to: &str) -> Result<String, RemoteError> {
        let bad = |why| RemoteError::Redirect { url: self.url.clone(), to: to.to_owned(), why };
        let next = match to {
            "" => return Err(bad("is no place")),
            to if to.starts_with("//") => {
                let scheme = if self.at.starts_with("https://") { "https:" } else { "http:" };
                format!("{scheme}{to}")
            }
            to if to.starts_with('/') => format!("{}{to}", origin(&self.at)),
            to => to.to_owned(),
        };
        if !next.starts_with("https://") && !next.starts_with("http://") {
            return Err(bad("is no address of a web server"));
        }
        if self.at.starts_with("https://") && !next.starts_with("https://") {
            return Err(bad("is not encrypted although the link that was given is"));
        }
        Ok(next)
    }
}

/// Scheme, host and port of a URL.
fn origin(url: &str) -> &str {
    let host = url.find("://").map_or(0, |at| at + 3);
    let end = url[host..].find(['/', '?', '#']).map_or(url.len(), |at| host + at);
    &url[..end]
}

fn text_of(response: &Response<ureq::Body>, name: &str) -> String {
    response.headers().get(name).and_then(|value| value.to_str().ok()).unwrap_or("").to_owned()
}

/// First byte, last byte and length of the file, of `bytes 0-99/1234`.
fn content_range(text: &str) -> Option<(u64, u64, u64)> {
    let (range, length) = text.trim().strip_prefix("bytes ")?.split_once('/')?;
    let (first, last) = range.split_once('-')?;
    Some((first.parse().ok()?, last.parse().ok()?, length.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_become_urls() {
        let hub = |path| hub_url("https://hub/", path);
        assert_eq!(hub("a/b/c.gguf").as_deref(), Some("https://hub/a/b/resolve/main/c.gguf"));
        assert_eq!(hub("a/b@v1/d e/c.gguf").as_deref(), Some("https://hub/a/b/resolve/v1/d%20e/c.gguf"));
        for wrong in ["", "a", "a/b", "a/b/", "/b/c", "a//c", "a/b@/c"] {
            assert_eq!(hub(wrong), None, "{wrong}");
        }
        assert_eq!(Location::parse("model.gguf").unwrap(), None);
        assert!(Location::parse("hf:a/b").is_err());
    }

    #[test]
    fn parts_are_named_by_their_numbers() {
        let parts = part_urls("http://h/m-00002-of-00003.gguf?x=1").unwrap();
        let expected = [1, 2, 3].map(|no| format!("http://h/m-0000{no}-of-00003.gguf?x=1"));
        assert_eq!(parts, expected);
        for whole in ["http://h/m.gguf", "http://h/m-of-00003.gguf", "http://h/m-1-of-3.gguf"] {
            assert_eq!(part_urls(whole).unwrap(), [whole]);
        }
        assert!(part_urls("http://h/m-00001-of-99999.gguf").is_err());
    }

    #[test]
    fn origins_and_ranges_are_read() {
        assert_eq!(origin("http://h:1/a/b?c"), "http://h:1");
        assert_eq!(origin("http://h"), "http://h");
        assert_eq!(content_range("bytes 0-99/1234"), Some((0, 99, 1234)));
        for wrong in ["", "bytes */1234", "bytes 0-99/*", "0-99/1234", "bytes 5/9"] {
            assert_eq!(content_range(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn all_files_share_a_budget() {
        assert_eq!(FIRST_READ_BYTES << (MAX_READS - 1), MAX_HEADER_BYTES);
        let mut budget = Budget::new();
        assert_eq!(budget.next_request(), Some(TIMEOUT));
        budget.deadline = Instant::now();
        assert_eq!(budget.next_request(), None);
        let location = Location { url: "http://127.0.0.1:1/a".into(), is_hub: false, token: None };
        let late = File::new(&location, location.url.clone()).header(&mut budget).unwrap_err();
        assert!(late.to_string().contains("within 160 s"), "{late}");
    }

    #[test]
    fn who_refuses_is_named_without_the_key_to_it() {
        let location = Location { url: "https://h/a".into(), is_hub: true, token: None };
        let mut file = File::new(&location, location.url.clone());
        assert_eq!((file.place().as_str(), file.access()), ("https://h/a", Access::HubWithout));
        file.at = "https://storage/a?signature=secret".into();
        assert_eq!(file.place(), "https://storage (where https://h/a leads)");
        assert_eq!(file.access(), Access::Storage);
    }

    #[test]
    fn a_redirect_must_lead_somewhere_safe() {
        let location = Location { url: "https://h/a".into(), is_hub: false, token: None };
        let file = File::new(&location, location.url.clone());
        assert_eq!(file.next("/b").unwrap(), "https://h/b");
        assert_eq!(file.next("//i/b").unwrap(), "https://i/b");
        assert_eq!(file.next("https://i/b").unwrap(), "https://i/b");
        for wrong in ["", "http://h/b", "ftp://h/b", "b"] {
            assert!(file.next(wrong).is_err(), "{wrong}");
        }
    }
}
