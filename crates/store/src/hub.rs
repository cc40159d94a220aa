//! What a hub says of a repository: its commit, who may read it, and its files.
//!
//! A revision is resolved to a commit first, so that the list and all files are of one state of the repository even
//! when somebody changes it meanwhile. Lists come in pages, of which each names the next. What a hub says is parsed by
//! [`parse_revision`], [`parse_page`] and [`next_page`], which do no I/O.

use serde::Deserialize;

use crate::choose::HubFile;
use crate::client::Client;
use crate::error::FetchError;
use crate::source::is_path;
use crate::tries::OnRetry;
use crate::url::{escaped, escaped_path, is_same_origin, refusal};

/// Largest reply. A page has a thousand files of 300 bytes; what is said of a revision lists all files by name.
const MAX_REPLY_BYTES: u64 = 4 << 20;

/// Most pages of a list: the largest repositories of models have some thousand files.
const MAX_PAGES: usize = 20;

/// Largest file that is believed in: a hundred times the largest one.
pub(crate) const MAX_FILE_BYTES: u64 = 1 << 46;

/// A state of a repository.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Revision {
    /// Its commit, or what was asked for where the hub does not tell.
    pub commit: String,
    /// Whether everybody may read it.
    pub is_public: bool,
}

#[derive(Deserialize)]
struct RevisionReply {
    sha: Option<String>,
    #[serde(default)]
    private: bool,
    #[serde(default)]
    gated: serde_json::Value,
}

#[derive(Deserialize)]
struct TreeItem {
    #[serde(rename = "type")]
    kind: String,
    path: String,
    #[serde(default)]
    size: u64,
    lfs: Option<Lfs>,
}

#[derive(Deserialize)]
struct Lfs {
    oid: String,
    size: u64,
}

/// What a hub says of a revision.
///
/// # Errors
/// What is wrong with it.
pub fn parse_revision(text: &[u8], asked: &str) -> Result<Revision, String> {
    let reply: RevisionReply = serde_json::from_slice(text).map_err(|error| error.to_string())?;
    let is_gated = !matches!(reply.gated, serde_json::Value::Null | serde_json::Value::Bool(false));
    let commit = reply.sha.filter(|sha| is_commit(sha)).unwrap_or_else(|| asked.to_owned());
    Ok(Revision { commit, is_public: !reply.private && !is_gated })
}

/// The GGUF files of a page of a list.
///
/// # Errors
/// What is wrong with it.
pub fn parse_page(text: &[u8]) -> Result<Vec<HubFile>, String> {
    let items: Vec<TreeItem> = serde_json::from_slice(text).map_err(|error| error.to_string())?;
    let mut files = Vec::new();
    for item in items {
        if item.kind != "file" || !item.path.to_ascii_lowercase().ends_with(".gguf") || !is_path(&item.path) {
            continue;
        }
        let n_bytes = item.lfs.as_ref().map_or(item.size, |lfs| lfs.size);
        let sha256 = item.lfs.map(|lfs| lfs.oid.trim_start_matches("sha256:").to_ascii_lowercase());
        if n_bytes > MAX_FILE_BYTES {
            return Err(format!("{:?} has {n_bytes} bytes", item.path));
        }
        if let Some(wrong) = sha256.as_ref().filter(|sha256| sha256.len() != 64 || !is_hex(sha256)) {
            return Err(format!("{wrong:?} is no SHA-256"));
        }
        files.push(HubFile { path: item.path, n_bytes, sha256 });
    }
    Ok(files)
}

/// The address of the next page, of a `Link` header: `<https://…>; rel="next"`.
pub fn next_page(link: &str) -> Option<&str> {
    link.split(',').find_map(|link| {
        let (address, rest) = link.trim().strip_prefix('<')?.split_once('>')?;
        let is_next = rest.split(';').any(|part| matches!(part.trim(), "rel=\"next\"" | "rel=next"));
        is_next.then_some(address)
    })
}

/// Whether it is a commit, and not a name for one.
pub(crate) fn is_commit(text: &str) -> bool {
    text.len() == 40 && is_hex(text)
}

fn is_hex(text: &str) -> bool {
    text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// Resolves a revision of `OWNER/REPOSITORY`.
pub(crate) fn revision(
    client: &Client,
    repository: &str,
    revision: &str,
    on_retry: OnRetry,
) -> Result<Revision, FetchError> {
    let url = format!("{}/revision/{}", api(client, repository), escaped(revision));
    let (text, _) = client.text(&url, MAX_REPLY_BYTES, on_retry)?;
    parse_revision(&text, revision).map_err(|why| FetchError::Strange { url, why })
}

/// The GGUF files of a commit of `OWNER/REPOSITORY`.
pub(crate) fn files(
    client: &Client,
    repository: &str,
    commit: &str,
    on_retry: OnRetry,
) -> Result<Vec<HubFile>, FetchError> {
    let mut url = format!("{}/tree/{}?recursive=true", api(client, repository), escaped(commit));
    let mut files = Vec::new();
    for _ in 0..MAX_PAGES {
        let (text, link) = client.text(&url, MAX_REPLY_BYTES, on_retry)?;
        let strange = |why: String| FetchError::Strange { url: url.clone(), why };
        files.extend(parse_page(&text).map_err(strange)?);
        let Some(next) = next_page(&link) else { return Ok(files) };
        // The token goes with it, and only to the hub.
        if !is_same_origin(next, &client.settings().endpoint) || refusal(next).is_some() {
            return Err(strange(format!("its next page is {next:?}, on another server")));
        }
        url = next.to_owned();
    }
    Err(FetchError::TooMuch { url, what: "the list of files", limit: MAX_PAGES as u64 * MAX_REPLY_BYTES })
}

/// Where a file of a repository is.
pub(crate) fn file_url(client: &Client, repository: &str, commit: &str, path: &str) -> String {
    let endpoint = &client.settings().endpoint;
    format!("{endpoint}/{}/resolve/{}/{}", escaped_path(repository), escaped(commit), escaped_path(path))
}

fn api(client: &Client, repository: &str) -> String {
    format!("{}/api/models/{}", client.settings().endpoint, escaped_path(repository))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn revisions_are_read() {
        let sha = "0123456789abcdef0123456789abcdef01234567";
        let read = |rest: &str| parse_revision(format!("{{\"sha\": \"{sha}\"{rest}}}").as_bytes(), "main").unwrap();
        assert_eq!(read(""), Revision { commit: sha.to_owned(), is_public: true });
        assert!(read(", \"private\": false, \"gated\": false, \"siblings\": []").is_public);
        assert!(!read(", \"gated\": \"auto\"").is_public && !read(", \"private\": true").is_public);
        let without = parse_revision(b"{\"sha\": \"../../x\"}", "main").unwrap();
        assert_eq!(without.commit, "main");
        assert!(parse_revision(b"[]", "main").is_err());
    }

    #[test]
    fn pages_are_read() {
        let sha = "ab".repeat(32);
        let text = format!(
            r#"[{{"type":"directory","oid":"1","size":0,"path":"d.gguf"}},
                {{"type":"file","oid":"1","size":134,"path":"d/m.gguf",
                  "lfs":{{"oid":"{sha}","size":99,"pointerSize":134}}}},
                {{"type":"file","oid":"1","size":7,"path":"small.GGUF","xetHash":"x"}},
                {{"type":"file","oid":"1","size":7,"path":"../evil.gguf"}},
                {{"type":"file","oid":"1","size":7,"path":"README.md"}}]"#
        );
        let files = parse_page(text.as_bytes()).unwrap();
        let expected = [
            HubFile { path: "d/m.gguf".to_owned(), n_bytes: 99, sha256: Some(sha) },
            HubFile { path: "small.GGUF".to_owned(), n_bytes: 7, sha256: None },
        ];
        assert_eq!(files, expected);
        let one = |rest: &str| format!(r#"[{{"type":"file","path":"a.gguf",{rest}}}]"#);
        for wrong in [
            "".to_owned(),
            "<html>".to_owned(),
            "{\"error\": \"no\"}".to_owned(),
            "[".repeat(100_000),
            one(r#""size":-1"#),
            one(r#""size":99999999999999999"#),
            one(r#""size":1,"lfs":{"oid":"zz","size":1}"#),
        ] {
            assert!(parse_page(wrong.as_bytes()).is_err(), "{}", &wrong[..wrong.len().min(60)]);
        }
    }

    #[test]
    fn links_lead_to_the_next_page() {
        let next = "https://hub/api/models/a/b/tree/main?recursive=true&cursor=x%3D";
        assert_eq!(next_page(&format!("<{next}>; rel=\"next\"")), Some(next));
        assert_eq!(next_page(&format!("<https://hub/first>; rel=\"first\", <{next}>; rel=\"next\"")), Some(next));
        for none in ["", "<", "<x>", "<x>; rel=\"prev\"", "x; rel=\"next\""] {
            assert_eq!(next_page(none), None, "{none}");
        }
    }
}
