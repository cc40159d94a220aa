//! What people name as a model: a file here, a repository of the hub, or an address on the web.
//!
//! ```text
//! path/to/model.gguf
//! hf:OWNER/REPOSITORY[:FILE.gguf | :QUANTISATION][@REVISION]
//! https://HOST/PATH.gguf
//! ```
//!
//! `hf:OWNER/REPOSITORY[@REVISION]/FILE.gguf` means the same as `hf:OWNER/REPOSITORY:FILE.gguf[@REVISION]`.

use std::fmt;
use std::path::{Path, PathBuf};

use crate::url::{file_name, refusal, without_query};

/// Longest name of an owner or a repository; the hub's own limit.
const MAX_NAME_BYTES: usize = 96;

/// Longest path of a file, quantisation or revision: as long as paths on disks may be by half.
const MAX_PATH_BYTES: usize = 2048;

/// A text names no model.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SourceError {
    /// It begins like a repository of the hub.
    #[error(
        "{text:?} names no model of the hub: {why}; write hf:OWNER/REPOSITORY, and where you want to say which file \
         hf:OWNER/REPOSITORY:FILE.gguf or hf:OWNER/REPOSITORY:Q4_K_M, with @REVISION at the end for another one than \
         main"
    )]
    Hub {
        /// What was read.
        text: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// It begins like an address.
    #[error("{text:?} {why}")]
    Web {
        /// What was read, without what may be a key.
        text: String,
        /// What is wrong with it.
        why: &'static str,
    },
}

/// Where a model is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ModelSource {
    /// A file here.
    Local(PathBuf),
    /// Files of a repository of the hub.
    Hub(HubSource),
    /// A file on a web server, encrypted or on this machine; of a split model any part.
    Web {
        /// Its address.
        url: String,
    },
}

/// Files of a repository of the hub.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HubSource {
    /// `OWNER/REPOSITORY`.
    pub repository: String,
    /// Which of its files.
    pub pick: Pick,
    /// Branch, tag or commit; `main` where none is given.
    pub revision: Option<String>,
}

/// Which files of a repository are the model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Pick {
    /// The only one, or the one whose quantisation is liked best.
    Any,
    /// The file of this path; of a split model any part.
    File(String),
    /// The one of this quantisation.
    Quant(String),
}

impl ModelSource {
    /// What `text` names.
    ///
    /// # Errors
    /// If it begins like a repository or an address, and is none.
    pub fn parse(text: &str) -> Result<Self, SourceError> {
        if let Some(path) = text.strip_prefix("hf:") {
            let hub = HubSource::parse(path).map_err(|why| SourceError::Hub { text: text.to_owned(), why })?;
            return Ok(Self::Hub(hub));
        }
        let scheme = text.split_once("://").map(|(scheme, _)| scheme);
        if !scheme.is_some_and(|scheme| scheme.bytes().all(|byte| byte.is_ascii_alphabetic())) {
            return Ok(Self::Local(PathBuf::from(text)));
        }
        let bad = |why| SourceError::Web { text: without_query(text).to_owned(), why };
        if let Some(why) = refusal(text) {
            return Err(bad(why));
        }
        if file_name(text).is_empty() {
            return Err(bad("names no file"));
        }
        Ok(Self::Web { url: text.to_owned() })
    }

    /// What a command line names, which may be a path that is no text.
    ///
    /// # Errors
    /// As [`ModelSource::parse`].
    pub fn of(path: &Path) -> Result<Self, SourceError> {
        match path.to_str() {
            Some(text) => Self::parse(text),
            None => Ok(Self::Local(path.to_owned())),
        }
    }
}

impl HubSource {
    fn parse(path: &str) -> Result<Self, &'static str> {
        let (owner, rest) = path.split_once('/').ok_or("it has no /")?;
        let end = rest.find(['/', ':', '@']).unwrap_or(rest.len());
        let (name, rest) = rest.split_at(end);
        if !is_name(owner) || !is_name(name) {
            return Err("owner and repository have letters, digits, dots, dashes and underscores, up to 96 of them");
        }
        let (pick, revision) = match (rest.chars().next(), rest.get(1..).unwrap_or("")) {
            (None, _) => (None, None),
            (Some('@'), rest) => match rest.split_once('/') {
                Some((revision, file)) if file.to_ascii_lowercase().ends_with(".gguf") => (Some(file), Some(revision)),
                _ => (None, Some(rest)),
            },
            (_, rest) => match rest.rsplit_once('@') {
                Some((pick, revision)) => (Some(pick), Some(revision)),
                None => (Some(rest), None),
            },
        };
        let pick = match pick {
            None => Pick::Any,
            Some(file) if !is_path(file) => return Err("what names the file is empty or no path in a repository"),
            Some(file) if file.to_ascii_lowercase().ends_with(".gguf") => Pick::File(file.to_owned()),
            Some(quant) if !is_quant(quant) || rest.starts_with('/') => return Err("a file's name ends in .gguf"),
            Some(quant) => Pick::Quant(quant.to_owned()),
        };
        // What has an @ could not be told from a file with one and a revision behind it.
        if revision.is_some_and(|revision| !is_path(revision) || revision.contains('@')) {
            return Err("the revision is empty, has an @, or is none");
        }
        let revision = revision.filter(|revision| *revision != "main").map(str::to_owned);
        Ok(Self { repository: format!("{owner}/{name}"), pick, revision })
    }

    /// The revision that is asked for.
    pub fn revision(&self) -> &str {
        self.revision.as_deref().unwrap_or("main")
    }
}

fn is_name(text: &str) -> bool {
    let is_sound = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_');
    (1..=MAX_NAME_BYTES).contains(&text.len()) && text.bytes().all(is_sound) && text != "." && !text.contains("..")
}

/// Whether it may be a quantisation's name.
fn is_quant(text: &str) -> bool {
    text.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-'))
}

/// Whether it is a path that stays where it begins, on Windows too.
pub(crate) fn is_path(text: &str) -> bool {
    let is_part = |part: &str| !part.is_empty() && part != "." && part != "..";
    let is_odd = |c: char| c.is_control() || matches!(c, '\\' | ':');
    text.len() <= MAX_PATH_BYTES && text.split('/').all(is_part) && !text.chars().any(is_odd)
}

impl fmt::Display for ModelSource {
    /// As it can be parsed again; of an address without what may be a key.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Local(path) => path.display().fmt(f),
            Self::Hub(hub) => hub.fmt(f),
            Self::Web { url } => f.write_str(without_query(url)),
        }
    }
}

impl fmt::Display for HubSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "hf:{}", self.repository)?;
        match &self.pick {
            Pick::Any => {}
            Pick::File(pick) | Pick::Quant(pick) => write!(f, ":{pick}")?,
        }
        match &self.revision {
            Some(revision) => write!(f, "@{revision}"),
            // Else what is behind its @ would be taken for a revision.
            None if matches!(&self.pick, Pick::File(file) if file.contains('@')) => f.write_str("@main"),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check_hub(text: &str, pick: Pick, revision: Option<&str>) {
        let ModelSource::Hub(hub) = ModelSource::parse(text).unwrap() else { panic!("{text}") };
        assert_eq!((hub.repository.as_str(), &hub.pick), ("a/b.c", &pick), "{text}");
        assert_eq!(hub.revision.as_deref(), revision, "{text}");
        assert_eq!(ModelSource::parse(&hub.to_string()).unwrap(), ModelSource::Hub(hub), "{text}");
    }

    #[test]
    fn repositories_are_read() {
        let file = |name: &str| Pick::File(name.to_owned());
        check_hub("hf:a/b.c", Pick::Any, None);
        check_hub("hf:a/b.c@main", Pick::Any, None);
        check_hub("hf:a/b.c@refs/pr/1", Pick::Any, Some("refs/pr/1"));
        check_hub("hf:a/b.c:Q4_K_M", Pick::Quant("Q4_K_M".to_owned()), None);
        check_hub("hf:a/b.c:q8_0@v1", Pick::Quant("q8_0".to_owned()), Some("v1"));
        check_hub("hf:a/b.c:d/m.gguf@refs/pr/1", file("d/m.gguf"), Some("refs/pr/1"));
        check_hub("hf:a/b.c/d e/m.gguf", file("d e/m.gguf"), None);
        check_hub("hf:a/b.c@v1/d/m.GGUF", file("d/m.GGUF"), Some("v1"));
        check_hub("hf:a/b.c@main/m@2.gguf", file("m@2.gguf"), None);
        check_hub("hf:a/b.c:m@2.gguf@v1", file("m@2.gguf"), Some("v1"));
    }

    #[test]
    fn what_is_no_repository_is_refused() {
        for text in [
            "hf:",
            "hf:a",
            "hf:a/",
            "hf:/b",
            "hf:a/b:",
            "hf:a/b@",
            "hf:a/b:x@",
            "hf:a/b@x@main/m.gguf",
            "hf:a/b:../m.gguf",
            "hf:a/b//m.gguf",
            "hf:a/b/readme.md",
            "hf:../b",
            "hf:a b/c",
            "hf:a/b:a\\b.gguf",
            "hf:a/b:m\n.gguf",
            "hf:a/b:c:m.gguf",
        ] {
            let error = ModelSource::parse(text).unwrap_err().to_string();
            assert!(error.contains("hf:OWNER/REPOSITORY:FILE.gguf"), "{text:?}: {error}");
        }
    }

    #[test]
    fn addresses_are_encrypted_or_here() {
        for text in ["https://h/m.gguf", "http://127.0.0.1:8/a/m.gguf?x=1"] {
            assert_eq!(ModelSource::parse(text).unwrap(), ModelSource::Web { url: text.to_owned() });
        }
        for text in ["http://h/m.gguf", "ftp://h/m.gguf", "https://h", "https://h/", "https://me:pw@h/m.gguf"] {
            assert!(matches!(ModelSource::parse(text), Err(SourceError::Web { .. })), "{text}");
        }
        let shown = ModelSource::parse("https://h/m.gguf?key=1").unwrap().to_string();
        assert_eq!(shown, "https://h/m.gguf");
    }

    #[test]
    fn all_else_is_a_path() {
        for text in ["model.gguf", "./hf/x.gguf", "/a/b", "", "C:\\m.gguf"] {
            assert_eq!(ModelSource::parse(text).unwrap(), ModelSource::Local(PathBuf::from(text)));
        }
    }
}
