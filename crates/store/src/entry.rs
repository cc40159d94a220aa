//! What is noted of a model on disk: where it came from, and what its files are.
//!
//! ```text
//! DIR/                        the models directory, <state-dir>/models unless told otherwise
//!   NAME-KEY/                 one model; KEY tells contents and origins of one name apart
//!     model.json              its entry
//!     FILE.gguf ...           its files; with .part and .part.json while they are not complete
//!   .locks/NAME-KEY           locked by whoever fetches the model, and shared by whoever uses it; never removed
//! ```

use std::path::{Path, PathBuf};

use ring::digest::{Context, SHA256, digest};
use serde::{Deserialize, Serialize};

use crate::choose::HubFile;
use crate::download::{Wanted, hex, n_come, n_done};
use crate::files;
use crate::hub::is_commit;
use crate::remote::{RemoteLocation, RemotePart};
use crate::source::HubSource;
use crate::split::SplitName;
use crate::url::query;

/// Name of an entry's file.
const ENTRY: &str = "model.json";

/// Longest entry: 512 files with 2 KB of names each.
const MAX_ENTRY_BYTES: u64 = 1 << 20;

/// Most revisions that are noted by name; the oldest go first.
const MAX_REVISIONS: usize = 16;

/// Longest name of a model, so that a folder's name is short enough for every file system.
const MAX_NAME_BYTES: usize = 100;

/// Longest name of a file: what file systems take, less what is put behind it.
const MAX_FILE_NAME_BYTES: usize = 200;

/// Digits of the key: 48 bits tell a million models apart.
const KEY_DIGITS: usize = 12;

/// Where the locks of models are.
pub(crate) const LOCKS: &str = ".locks";

/// Whether a folder is a model's. If its entry is damaged, it is known by its name, its lock, and since it holds
/// nothing else.
pub(crate) fn is_models_folder(dir: &Path) -> bool {
    let name = dir.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    if Entry::read(dir).is_some_and(|entry| entry.id == name) {
        return true;
    }
    let is_key = |key: &str| key.len() == KEY_DIGITS && key.bytes().all(|byte| byte.is_ascii_hexdigit());
    let has_key = name.rsplit_once('-').is_some_and(|(_, key)| is_key(key));
    let has_lock = dir.with_file_name(LOCKS).join(&name).exists();
    let mut files = std::fs::read_dir(dir).into_iter().flatten();
    has_key && has_lock && files.all(|file| file.is_ok_and(|file| is_models_file(&file.file_name().to_string_lossy())))
}

/// Whether a file of a model's folder may be called so.
pub(crate) fn is_models_file(name: &str) -> bool {
    let is_temporary = name.starts_with(files::TEMPORARY);
    name == ENTRY || is_temporary || [".gguf", ".gguf.part", ".gguf.part.json"].iter().any(|end| name.ends_with(end))
}

/// What is noted of a model.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Entry {
    /// The name of its folder, made from what was known of it before it was fetched.
    pub id: String,
    pub name: String,
    pub origin: Origin,
    /// Whether everybody may read it where it came from.
    pub is_public: bool,
    pub files: Vec<FileEntry>,
    /// When it was first asked for, in seconds since 1970.
    pub added: u64,
    /// When it was last used, in seconds since 1970.
    pub last_used: u64,
}

/// Where a model came from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Origin {
    /// A repository of the hub.
    Hub {
        repository: String,
        commit: String,
        /// As what it was asked for, the last one last.
        revisions: Vec<String>,
    },
    /// An address, without what may be a key.
    Web {
        url: String,
        /// Of what stands behind its path, since that may say which file it is: [`query_sum`].
        #[serde(default, skip_serializing_if = "Option::is_none")]
        query_sha256: Option<String>,
    },
}

/// SHA-256 of what stands behind a URL's path, which is not kept itself since it may be a key.
pub(crate) fn query_sum(url: &str) -> Option<String> {
    query(url).map(|query| hex(digest(&SHA256, query.as_bytes()).as_ref()))
}

/// A file of a model.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct FileEntry {
    /// Its name here.
    pub name: String,
    /// Its path in the repository, or its name on the server.
    pub path: String,
    /// Where it came from, without what may be a key.
    pub url: String,
    pub n_bytes: Option<u64>,
    pub sha256: Option<String>,
    pub etag: Option<String>,
}

impl Entry {
    /// The entry in a model's folder, if there is one that makes sense.
    pub fn read(dir: &Path) -> Option<Self> {
        let entry: Self = files::read_json(&dir.join(ENTRY), MAX_ENTRY_BYTES)?;
        // Names are joined to the folder, wherever the entry came from.
        let is_sound = !entry.files.is_empty() && entry.files.iter().all(|file| file.name == local_name(&file.name));
        is_sound.then_some(entry)
    }

    pub fn write(&self, dir: &Path) -> std::io::Result<()> {
        files::write_json(&dir.join(ENTRY), self)
    }

    /// What is to be fetched; noted as used at `now`, in seconds since 1970.
    pub fn new(origin: Origin, is_public: bool, files: Vec<FileEntry>, now: u64) -> Self {
        let name = files.first().map_or_else(|| "model".to_owned(), |file| model_name(&file.path));
        let mut entry = Self { id: String::new(), name, origin, is_public, files, added: now, last_used: now };
        entry.id = entry.make_id();
        entry
    }

    fn make_id(&self) -> String {
        let mut context = Context::new(&SHA256);
        let mut add = |text: &str| {
            context.update(&(text.len() as u64).to_le_bytes());
            context.update(text.as_bytes());
        };
        match &self.origin {
            Origin::Hub { repository, .. } => add(&repository.to_ascii_lowercase()),
            Origin::Web { url, query_sha256 } => {
                add(url);
                query_sha256.iter().for_each(|sum| add(sum));
            }
        }
        for file in &self.files {
            add(&file.path);
            let length = file.n_bytes.map(|n| n.to_string()).unwrap_or_default();
            match (&self.origin, &file.sha256) {
                (_, Some(sha256)) => add(sha256),
                (Origin::Hub { commit, .. }, None) => add(&format!("{commit} {length}")),
                (Origin::Web { .. }, None) => add(&format!("{} {length}", file.etag.as_deref().unwrap_or(""))),
            }
        }
        format!("{}-{}", self.name, &hex(context.finish().as_ref())[..KEY_DIGITS])
    }

    /// As it could be asked for.
    pub fn source(&self) -> String {
        match (&self.origin, self.files.first()) {
            (Origin::Hub { repository, commit, revisions }, Some(file)) => {
                // What has no name any more is known by its commit.
                let revision = Some(revisions.last().unwrap_or(commit)).filter(|revision| *revision != "main");
                let revision = revision.map(|revision| format!("@{revision}")).unwrap_or_default();
                format!("hf:{repository}:{}{revision}", file.path)
            }
            (Origin::Hub { repository, .. }, None) => format!("hf:{repository}"),
            (Origin::Web { url, .. }, _) => url.clone(),
        }
    }

    /// The commit of its repository.
    pub fn commit(&self) -> Option<String> {
        match &self.origin {
            Origin::Hub { commit, .. } => Some(commit.clone()),
            Origin::Web { .. } => None,
        }
    }

    /// Of what stands behind the path of its address, if anything does.
    pub fn query_sha256(&self) -> Option<String> {
        match &self.origin {
            Origin::Hub { .. } => None,
            Origin::Web { query_sha256, .. } => query_sha256.clone(),
        }
    }

    /// Whether it is of this repository and revision.
    pub fn is_of(&self, source: &HubSource) -> bool {
        let revision = source.revision();
        let is_commit = is_commit(revision) && self.commit().is_some_and(|commit| commit == revision);
        self.is_named(&source.repository, revision) || is_commit && self.is_in(&source.repository)
    }

    /// Whether it was the repository's when that was asked for as this, and nothing else is since.
    pub fn is_named(&self, repository: &str, revision: &str) -> bool {
        let Origin::Hub { revisions, .. } = &self.origin else { return false };
        self.is_in(repository) && revisions.iter().any(|known| known == revision)
    }

    fn is_in(&self, of: &str) -> bool {
        matches!(&self.origin, Origin::Hub { repository, .. } if repository.eq_ignore_ascii_case(of))
    }

    /// Forgets that it was asked for as this.
    pub fn lose_name(&mut self, revision: &str) {
        if let Origin::Hub { revisions, .. } = &mut self.origin {
            revisions.retain(|known| known != revision);
        }
    }

    /// Whether its files are among those of a repository, as far as lengths and sums tell.
    pub fn is_among(&self, listed: &[HubFile]) -> bool {
        let is_same = |file: &FileEntry, other: &HubFile| {
            let is_other_sum = file.sha256.is_some() && other.sha256.is_some() && file.sha256 != other.sha256;
            file.path == other.path && file.n_bytes.is_none_or(|n| n == other.n_bytes) && !is_other_sum
        };
        self.files.iter().all(|file| listed.iter().any(|other| is_same(file, other)))
    }

    /// Takes over what another entry of the same model knows besides.
    pub fn merge(&mut self, older: Self) {
        self.added = older.added;
        if let (Origin::Hub { revisions, .. }, Origin::Hub { revisions: known, .. }) = (&mut self.origin, older.origin)
        {
            let new = std::mem::replace(revisions, known);
            revisions.retain(|revision| !new.contains(revision));
            revisions.extend(new);
            let n_too_many = revisions.len().saturating_sub(MAX_REVISIONS);
            revisions.drain(..n_too_many);
        }
        for (file, old) in self.files.iter_mut().zip(older.files) {
            file.sha256 = file.sha256.take().or(old.sha256);
            file.etag = file.etag.take().or(old.etag);
            file.n_bytes = file.n_bytes.or(old.n_bytes);
        }
    }

    /// Bytes of all files, where all are known.
    pub fn n_bytes(&self) -> Option<u64> {
        self.files.iter().map(|file| file.n_bytes).sum()
    }

    /// Bytes of each file that are in its folder, and need not be fetched.
    pub fn n_done(&self, dir: &Path) -> Vec<u64> {
        self.files.iter().map(|file| file.n_done(dir)).collect()
    }

    /// Bytes of all files that are in its folder, while somebody fetches it.
    pub fn n_come(&self, dir: &Path) -> u64 {
        let of = |file: &FileEntry| if file.is_complete(dir) { file.n_done(dir) } else { n_come(&file.local(dir)) };
        self.files.iter().map(of).sum()
    }

    /// Whether all files are there and verified.
    pub fn is_complete(&self, dir: &Path) -> bool {
        self.files.iter().all(|file| file.is_complete(dir))
    }

    /// Where workers could fetch it.
    pub fn location(&self) -> Option<RemoteLocation> {
        let part = |file: &FileEntry| {
            let n_bytes = file.n_bytes?;
            Some(RemotePart { url: file.url.clone(), n_bytes, sha256: file.sha256.clone(), etag: file.etag.clone() })
        };
        let parts = self.files.iter().map(part).collect::<Option<Vec<_>>>()?;
        Some(RemoteLocation { parts, is_public: self.is_public })
    }
}

impl FileEntry {
    pub fn local(&self, dir: &Path) -> PathBuf {
        dir.join(&self.name)
    }

    /// A file gets its name only when it has been verified; its length tells whether it was cut since.
    pub fn is_complete(&self, dir: &Path) -> bool {
        let length = std::fs::metadata(self.local(dir)).ok().filter(std::fs::Metadata::is_file).map(|meta| meta.len());
        length.is_some() && (self.n_bytes.is_none() || length == self.n_bytes)
    }

    /// As it is to be fetched from `url`, which may have a key in it.
    pub fn wanted(&self, url: String) -> Wanted {
        Wanted { url, n_bytes: self.n_bytes, sha256: self.sha256.clone() }
    }

    /// What is damaged or of another file does not count.
    fn n_done(&self, dir: &Path) -> u64 {
        let path = self.local(dir);
        if self.is_complete(dir) {
            return std::fs::metadata(&path).map_or(0, |meta| meta.len());
        }
        n_done(&path, &self.wanted(String::new()), self.etag.as_deref())
    }
}

/// The name of a model whose first file is called so.
pub(crate) fn model_name(path: &str) -> String {
    let name = local_name(path.rsplit('/').next().unwrap_or(path));
    let stem = match SplitName::parse(&name) {
        Some(split) => split.prefix.to_owned(),
        None => name.strip_suffix(".gguf").unwrap_or(&name).to_owned(),
    };
    let end = stem.len().min(MAX_NAME_BYTES);
    if stem.is_empty() { "model".to_owned() } else { stem[..end].to_owned() }
}

/// A file's name as it is here: plain characters, no beginning that hides it, and an ending that tells what it is.
pub(crate) fn local_name(name: &str) -> String {
    let plain = |c: char| if c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | '+') { c } else { '_' };
    let name: String = name.chars().map(plain).collect();
    let name = name.trim_start_matches(['.', '-']);
    let stem = match name.len().checked_sub(5).map(|at| name.split_at(at)) {
        Some((stem, ending)) if ending.eq_ignore_ascii_case(".gguf") => stem,
        _ => name,
    };
    // The end of a long name tells parts apart.
    let stem = &stem[stem.len().saturating_sub(MAX_FILE_NAME_BYTES)..];
    let stem = stem.trim_start_matches(['.', '-']);
    if stem.is_empty() { "model.gguf".to_owned() } else { format!("{stem}.gguf") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry() -> Entry {
        let file = FileEntry {
            name: "m-q8_0.gguf".to_owned(),
            path: "d/m-q8_0.gguf".to_owned(),
            url: "https://hub/o/r/resolve/c/d/m-q8_0.gguf".to_owned(),
            n_bytes: Some(4),
            sha256: None,
            etag: None,
        };
        Entry::new(origin(&["main"]), true, vec![file], 1)
    }

    fn origin(revisions: &[&str]) -> Origin {
        let revisions = revisions.iter().map(|revision| (*revision).to_owned()).collect();
        Origin::Hub { repository: "o/r".to_owned(), commit: "c".repeat(40), revisions }
    }

    #[test]
    fn an_entry_is_kept() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(Entry::read(dir.path()), None);
        entry().write(dir.path()).unwrap();
        assert_eq!(Entry::read(dir.path()), Some(entry()));
        assert!(!entry().is_complete(dir.path()));
        std::fs::write(dir.path().join("m-q8_0.gguf"), "GGU").unwrap();
        assert!(!entry().is_complete(dir.path()), "a file that was cut");
        std::fs::write(dir.path().join("m-q8_0.gguf"), "GGUF").unwrap();
        assert!(entry().is_complete(dir.path()));
        for (what, bad) in [("above", "../../x.gguf"), ("hidden", ".x.gguf"), ("deep", "a/b.gguf")] {
            let mut evil = entry();
            evil.files[0].name = bad.to_owned();
            evil.write(dir.path()).unwrap();
            assert_eq!(Entry::read(dir.path()), None, "{what}");
        }
        std::fs::write(dir.path().join(ENTRY), "{").unwrap();
        assert_eq!(Entry::read(dir.path()), None);
    }

    #[test]
    fn folders_of_others_are_known_by_what_is_in_them() {
        let dir = tempfile::tempdir().unwrap();
        let make = |folder: &str, files: &[&str]| {
            let folder = dir.path().join(folder);
            std::fs::create_dir_all(&folder).unwrap();
            files.iter().for_each(|file| std::fs::write(folder.join(file), "").unwrap());
            folder
        };
        let key = "0123456789ab";
        make(LOCKS, &[&format!("broken-{key}"), &format!("notes-{key}"), "llamas"]);
        assert!(is_models_folder(&make(&format!("broken-{key}"), &[ENTRY, "m.gguf.part", "m.gguf.part.json"])));
        assert!(!is_models_folder(&make(&format!("notes-{key}"), &["m.gguf", "notes.txt"])));
        assert!(!is_models_folder(&make("llamas", &["m.gguf"])));
        assert!(!is_models_folder(&make(&format!("other-{key}"), &["m.gguf"])));
        let own = make(&entry().id, &["README.md"]);
        assert!(!is_models_folder(&own));
        entry().write(&own).unwrap();
        assert!(is_models_folder(&own));
    }

    #[test]
    fn folders_tell_contents_and_origins_apart() {
        let id = entry().id;
        assert!(id.starts_with("m-q8_0-") && id.len() == "m-q8_0-".len() + KEY_DIGITS, "{id}");
        let change = |change: &dyn Fn(&mut Entry)| {
            let mut changed = entry();
            change(&mut changed);
            changed.make_id()
        };
        assert_ne!(change(&|entry| entry.files[0].sha256 = Some("ab".repeat(32))), id);
        assert_ne!(change(&|entry| entry.files[0].n_bytes = Some(5)), id);
        let web = |url: &str| {
            let origin = Origin::Web { url: "https://h/m".to_owned(), query_sha256: query_sum(url) };
            change(&|entry| entry.origin = origin.clone())
        };
        let ids: std::collections::BTreeSet<_> = ["https://h/m", "https://h/m?a", "https://h/m?b"].map(web).into();
        assert!(ids.len() == 3 && !ids.contains(&id), "{ids:?}");
        assert_eq!(change(&|entry| entry.last_used = 99), id);
    }

    #[test]
    fn revisions_gather() {
        let mut newer = entry();
        newer.origin = origin(&["v1"]);
        newer.added = 9;
        newer.merge(entry());
        assert_eq!((newer.added, newer.source().as_str()), (1, "hf:o/r:d/m-q8_0.gguf@v1"));
        let source = |revision: &str| HubSource {
            repository: "O/R".to_owned(),
            pick: crate::source::Pick::Any,
            revision: Some(revision.to_owned()),
        };
        let commit = "c".repeat(40);
        assert!(["main", "v1", &commit].iter().all(|revision| newer.is_of(&source(revision))));
        assert!(!newer.is_of(&source("v2")));
        ["main", "v1"].iter().for_each(|revision| newer.lose_name(revision));
        assert!(newer.is_of(&source(&commit)) && !newer.is_of(&source("main")));
        assert_eq!(newer.source(), format!("hf:o/r:d/m-q8_0.gguf@{commit}"));
    }

    #[test]
    fn another_file_is_told_by_what_is_known_of_both() {
        let sum = |digit: &str| Some(digit.repeat(64));
        let check = |path: &str, n_bytes, sha256, expected| {
            let listed = [HubFile { path: path.to_owned(), n_bytes, sha256 }];
            let mut known = entry();
            known.files[0].sha256 = sum("a");
            assert_eq!(known.is_among(&listed), expected, "{listed:?}");
        };
        check("d/m-q8_0.gguf", 4, sum("a"), true);
        check("d/m-q8_0.gguf", 4, None, true);
        check("d/m-q8_0.gguf", 4, sum("b"), false);
        check("d/m-q8_0.gguf", 5, None, false);
        check("e/m-q8_0.gguf", 4, sum("a"), false);
    }

    #[test]
    fn entries_without_a_sum_of_the_query_are_of_addresses_without_one() {
        let text = r#"{"web":{"url":"https://h/m"}}"#;
        let old: Origin = serde_json::from_str(text).unwrap();
        assert_eq!(old, Origin::Web { url: "https://h/m".to_owned(), query_sha256: None });
        assert_eq!(serde_json::to_string(&old).unwrap(), text);
    }

    #[test]
    fn names_are_plain() {
        assert_eq!(model_name("a/b/Q-00001-of-00002.gguf"), "Q");
        assert_eq!(model_name("m b.GGUF"), "m_b");
        for (name, expected) in [
            ("m.gguf", "m.gguf"),
            ("../../etc/passwd", "_.._etc_passwd.gguf"),
            (".hidden.gguf", "hidden.gguf"),
            ("-rf.gguf", "rf.gguf"),
            ("", "model.gguf"),
            (".gguf", "gguf.gguf"),
            ("ä", "_.gguf"),
        ] {
            assert_eq!(local_name(name), expected, "{name}");
            assert_eq!(local_name(expected), expected);
        }
        let long = local_name(&format!("{}-00002-of-00003.gguf", "x".repeat(5000)));
        assert!(long.len() < 210 && long.ends_with("-00002-of-00003.gguf") && local_name(&long) == long);
    }
}
