//! The few things that are asked of URLs: whose they are, what they name, and where a redirect leads.

use crate::error::FetchError;
use crate::split::SplitName;

/// Longest URL. Those that storages sign have two to three thousand characters.
pub const MAX_URL_BYTES: usize = 8 << 10;

/// Scheme, host and port of a URL.
pub fn origin(url: &str) -> &str {
    let host = url.find("://").map_or(0, |at| at + 3);
    let end = url[host..].find(['/', '?', '#']).map_or(url.len(), |at| host + at);
    &url[..end]
}

/// Whether two URLs are of one server.
pub fn is_same_origin(a: &str, b: &str) -> bool {
    origin(a).eq_ignore_ascii_case(origin(b))
}

/// Why a URL is not one that bytes are fetched from; `None` if it is: encrypted, or on this machine.
pub fn refusal(url: &str) -> Option<&'static str> {
    let scheme = url.find("://").map_or("", |at| &url[..at]).to_ascii_lowercase();
    let host = origin(url).split_once("://").map_or("", |(_, host)| host);
    match scheme.as_str() {
        _ if url.len() > MAX_URL_BYTES => Some("is longer than any address"),
        _ if url.bytes().any(|byte| byte <= b' ' || byte == 0x7f) => Some("has spaces or control characters"),
        _ if host.contains('@') => Some("has a name or password in it, which would be shown to others"),
        "https" | "http" if host.is_empty() => Some("names no server"),
        "https" => None,
        "http" if is_loopback(host) => None,
        "http" => Some("is not encrypted; write https://"),
        _ => Some("is no address of a web server"),
    }
}

/// Whether `host`, with or without a port, is this machine.
fn is_loopback(host: &str) -> bool {
    let without_port = match host.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or(""),
        None => host.split(':').next().unwrap_or(host),
    };
    without_port.eq_ignore_ascii_case("localhost")
        || without_port.parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

/// The URL without what stands behind its path, which may be a key to it.
pub fn without_query(url: &str) -> &str {
    url.split(['?', '#']).next().unwrap_or(url)
}

/// What stands behind the URL's path: it may say which file is meant, and may be a key to it.
pub fn query(url: &str) -> Option<&str> {
    let sent = url.split('#').next().unwrap_or(url);
    sent.split_once('?').map(|(_, query)| query).filter(|query| !query.is_empty())
}

/// The last part of the URL's path.
pub fn file_name(url: &str) -> &str {
    let path = &without_query(url)[origin(url).len().min(without_query(url).len())..];
    path.rsplit('/').next().unwrap_or(path)
}

/// As it may stand in a URL's path, slashes too.
pub fn escaped_path(text: &str) -> String {
    text.split('/').map(escaped).collect::<Vec<_>>().join("/")
}

/// As one part of a URL's path.
pub fn escaped(text: &str) -> String {
    let one = |byte: u8| match byte {
        b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => char::from(byte).to_string(),
        other => format!("%{other:02X}"),
    };
    text.bytes().map(one).collect()
}

/// The URLs of all files of a model, of which `url` is one: `…-00001-of-00003.gguf`.
pub fn part_urls(url: &str) -> Vec<String> {
    let (path, rest) = url.split_at(without_query(url).len());
    match SplitName::parse(path) {
        Some(split) => split.all().map(|path| format!("{path}{rest}")).collect(),
        None => vec![url.to_owned()],
    }
}

/// Where a redirect from `at` leads; `url` is what was asked for first, for messages.
pub fn redirected(url: &str, at: &str, to: &str) -> Result<String, FetchError> {
    let bad = |why| FetchError::Redirect { url: without_query(url).to_owned(), to: without_query(to).to_owned(), why };
    let next = match to {
        "" => return Err(bad("is no place")),
        to if to.starts_with("//") => {
            let scheme = if at.starts_with("https://") { "https:" } else { "http:" };
            format!("{scheme}{to}")
        }
        to if to.starts_with('/') => format!("{}{to}", origin(at)),
        to if has_scheme(to) => to.to_owned(),
        to => beside(at, to),
    };
    if at.starts_with("https://") && !next.starts_with("https://") && next.starts_with("http://") {
        return Err(bad("is not encrypted although the link that was given is"));
    }
    match refusal(&next) {
        Some(why) => Err(bad(why)),
        None => Ok(next),
    }
}

fn has_scheme(text: &str) -> bool {
    text.find([':', '/', '?', '#']).is_some_and(|at| text[at..].starts_with(':'))
}

/// What `to` means at `at`: a path from there on, or only another query (RFC 3986, section 5.2).
fn beside(at: &str, to: &str) -> String {
    let (path, rest) = to.split_at(without_query(to).len());
    let (own, server) = (without_query(at), origin(at));
    if path.is_empty() {
        return format!("{own}{rest}");
    }
    let folder = own[server.len()..].rsplit_once('/').map_or("", |(folder, _)| folder);
    let mut parts = Vec::new();
    for part in format!("{folder}/{path}").split('/').skip(1) {
        match part {
            "." => {}
            ".." => drop(parts.pop()),
            part => parts.push(part.to_owned()),
        }
    }
    if path.ends_with("/.") || path.ends_with("/..") || path == "." || path == ".." {
        parts.push(String::new());
    }
    format!("{server}/{}{rest}", parts.join("/"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_is_taken_apart() {
        assert_eq!(origin("http://h:1/a/b?c"), "http://h:1");
        assert_eq!(origin("http://h"), "http://h");
        assert!(is_same_origin("https://Hub/a", "https://hub/b") && !is_same_origin("https://hub", "https://hub.evil"));
        assert_eq!(file_name("https://h/a/b.gguf?x=/y"), "b.gguf");
        assert_eq!(file_name("https://h"), "");
        assert_eq!(
            (query("https://h/a?x=1&y#z?"), query("https://h/a#b?c"), query("https://h/a?")),
            (Some("x=1&y"), None, None)
        );
        assert_eq!(escaped_path("a b/ä"), "a%20b/%C3%A4");
        assert_eq!(escaped("refs/pr/1"), "refs%2Fpr%2F1");
    }

    #[test]
    fn only_encrypted_links_and_this_machine_are_asked() {
        for good in ["https://h/a", "http://127.0.0.1:1/a", "http://[::1]:1/a", "http://localhost/a", "HTTPS://h"] {
            assert_eq!(refusal(good), None, "{good}");
        }
        for bad in [
            "http://h/a",
            "ftp://h/a",
            "https://",
            "https:///a",
            "https://u:p@h/a",
            "https://h/a b",
            "h",
            "http://127.0.0.1.evil/a",
        ] {
            assert!(refusal(bad).is_some(), "{bad}");
        }
    }

    #[test]
    fn parts_are_named_by_their_numbers() {
        let parts = part_urls("http://h/m-00002-of-00003.gguf?x=1");
        let expected = [1, 2, 3].map(|no| format!("http://h/m-0000{no}-of-00003.gguf?x=1"));
        assert_eq!(parts, expected);
        for whole in ["http://h/m.gguf", "http://h/m-of-00003.gguf", "http://h/m-1-of-3.gguf"] {
            assert_eq!(part_urls(whole), [whole]);
        }
    }

    #[test]
    fn a_redirect_must_lead_somewhere_safe() {
        let next = |to| redirected("https://h/a", "https://h/a", to);
        assert_eq!(next("/b").unwrap(), "https://h/b");
        assert_eq!(next("//i/b").unwrap(), "https://i/b");
        assert_eq!(next("https://i/b").unwrap(), "https://i/b");
        for wrong in ["", "http://h/b", "http://127.0.0.1/b", "ftp://h/b", "data:b", "b c"] {
            assert!(next(wrong).is_err(), "{wrong}");
        }
        for (to, expected) in [
            ("d.gguf?y=2", "https://h/a/b/d.gguf?y=2"),
            ("./d", "https://h/a/b/d"),
            ("../d:1/e", "https://h/a/d:1/e"),
            ("../../../d", "https://h/d"),
            ("..", "https://h/a/"),
            ("?y=2", "https://h/a/b/c?y=2"),
        ] {
            assert_eq!(redirected("https://h/x", "https://h/a/b/c?x=/1", to).unwrap(), expected, "{to}");
        }
        assert_eq!(redirected("https://h", "https://h", "b").unwrap(), "https://h/b");
    }
}
