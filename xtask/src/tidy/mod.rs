//! Checks of the repository that the compiler does not make: `cargo xtask tidy`, and a test below.
//!
//! A [`Tree`] holds all text files; each check is a pure function from it to [`Problem`]s, so its tests need no files.
//!
//! - [`arrows`]: which crate may use which, and what pure crates may not touch.
//! - [`sources`]: heads, widths and lengths of source files, words that must not stay, files that nothing includes.
//! - [`commands`]: commands and links in documents lead to something.
//! - [`flags`]: the page about configuration names each flag.

mod arrows;
mod commands;
mod flags;
mod sources;

use std::fmt;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::failure::{Failure, Outcome};
use crate::output::line;

/// Larger files are data.
const MAX_TEXT_BYTES: u64 = 4 << 20;

/// Something to put right.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// The file, relative to the repository.
    path: String,
    /// Its line, from 1; 0 if the whole file is meant.
    line: usize,
    /// What is wrong, and what would be right.
    what: String,
}

impl Problem {
    fn new(path: &str, line: usize, what: impl Into<String>) -> Self {
        Self { path: path.to_owned(), line, what: what.into() }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.line {
            0 => write!(f, "{}: {}", self.path, self.what),
            line => write!(f, "{}:{line}: {}", self.path, self.what),
        }
    }
}

/// A text file.
#[derive(Debug, Clone)]
struct Text {
    /// Relative to the repository, with `/`.
    path: String,
    text: String,
}

impl Text {
    /// Lines with their numbers, from 1.
    fn lines(&self) -> impl Iterator<Item = (usize, &str)> {
        (1..).zip(self.text.lines())
    }

    fn is_rust(&self) -> bool {
        self.path.ends_with(".rs")
    }

    /// The name of its folder in `crates`, or `xtask`.
    fn crate_name(&self) -> Option<&str> {
        let mut parts = self.path.split('/');
        match (parts.next()?, parts.next()?) {
            ("crates", name) => Some(name),
            ("xtask", _) => Some("xtask"),
            _ => None,
        }
    }
}

/// The text files of a repository, and the paths of all files.
#[derive(Debug, Default)]
struct Tree {
    texts: Vec<Text>,
    paths: Vec<String>,
}

impl Tree {
    /// Reads what Git tracks or would track; without Git, everything but build output.
    fn load(root: &Path) -> Outcome<Self> {
        let mut paths = match tracked(root) {
            Some(paths) => paths,
            None => walk(root).map_err(Failure::io(root.display()))?,
        };
        paths.sort();
        let mut tree = Self::default();
        for path in paths {
            let file = root.join(&path);
            // A file may be tracked and deleted.
            let Ok(metadata) = std::fs::metadata(&file) else { continue };
            if metadata.len() <= MAX_TEXT_BYTES
                && let Ok(text) = String::from_utf8(std::fs::read(&file).map_err(Failure::io(file.display()))?)
            {
                tree.texts.push(Text { path: path.clone(), text });
            }
            tree.paths.push(path);
        }
        Ok(tree)
    }

    fn text(&self, path: &str) -> Option<&Text> {
        self.texts.iter().find(|text| text.path == path)
    }

    /// Whether there is such a file or folder.
    fn contains(&self, path: &str) -> bool {
        self.paths
            .iter()
            .any(|known| known == path || known.strip_prefix(path).is_some_and(|rest| rest.starts_with('/')))
    }

    #[cfg(test)]
    fn of<const N: usize>(files: [(&str, &str); N]) -> Self {
        let text = |(path, text): (&str, &str)| Text { path: path.to_owned(), text: text.to_owned() };
        let texts: Vec<Text> = files.into_iter().map(text).collect();
        Self { paths: texts.iter().map(|text| text.path.clone()).collect(), texts }
    }
}

fn tracked(root: &Path) -> Option<Vec<String>> {
    let mut git = Command::new("git");
    git.current_dir(root).args(["ls-files", "-z", "--cached", "--others", "--exclude-standard"]);
    let output = git.output().ok().filter(|output| output.status.success())?;
    let paths = output.stdout.split(|byte| *byte == 0).filter(|path| !path.is_empty());
    Some(paths.map(|path| String::from_utf8_lossy(path).into_owned()).collect())
}

fn walk(root: &Path) -> std::io::Result<Vec<String>> {
    let mut found = Vec::new();
    let mut todo = vec![PathBuf::new()];
    while let Some(dir) = todo.pop() {
        for entry in std::fs::read_dir(root.join(&dir))? {
            let entry = entry?;
            let path = dir.join(entry.file_name());
            if entry.file_name() == ".git" || entry.file_name() == "target" {
                continue;
            }
            if entry.file_type()?.is_dir() {
                todo.push(path);
            } else {
                found.push(path.to_string_lossy().replace('\\', "/"));
            }
        }
    }
    Ok(found)
}

/// All problems of the repository at `root`.
fn problems(root: &Path) -> Outcome<Vec<Problem>> {
    let tree = Tree::load(root)?;
    let mut problems = arrows::check(&tree);
    problems.extend(sources::check(&tree));
    problems.extend(commands::check(&tree));
    problems.extend(flags::check(&tree));
    problems.sort_by(|a, b| (&a.path, a.line).cmp(&(&b.path, b.line)));
    Ok(problems)
}

/// Checks the repository at `root` and prints what is to be put right.
pub fn run(root: &Path) -> Outcome {
    let problems = problems(root)?;
    for problem in &problems {
        line(problem)?;
    }
    match problems.len() {
        0 => line("tidy"),
        n => Err(Failure::said(format!("{n} thing(s) to tidy up"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_repository_is_tidy() {
        let problems = problems(&crate::root()).unwrap();
        let list: Vec<String> = problems.iter().map(ToString::to_string).collect();
        assert!(list.is_empty(), "to be tidied up:\n{}", list.join("\n"));
    }

    #[test]
    fn a_folder_without_git_is_walked() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(dir.path().join("docs/deep")).unwrap();
        std::fs::create_dir_all(dir.path().join("target")).unwrap();
        for path in ["a.rs", "docs/deep/b.md", "target/c.rs"] {
            std::fs::write(dir.path().join(path), "text").unwrap();
        }
        std::fs::write(dir.path().join("docs/data"), [0xff, 0xfe]).unwrap();
        let mut paths = walk(dir.path()).unwrap();
        paths.sort();
        assert_eq!(paths, ["a.rs", "docs/data", "docs/deep/b.md"]);
        let tree = Tree::of([("docs/deep/b.md", "")]);
        assert!(tree.contains("docs") && tree.contains("docs/deep/b.md") && !tree.contains("do"));
    }
}
