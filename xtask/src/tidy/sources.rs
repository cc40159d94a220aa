//! The form of source files: heads, widths, lengths, words that must not stay, files that nothing includes.

use std::collections::HashSet;

use super::{Problem, Text, Tree};

/// Widest line, as `rustfmt.toml` has it.
const MAX_COLUMNS: usize = 120;

/// Longest source file; the aim is 500.
const MAX_LINES: usize = 800;

/// Source files that may be longer, each with its reason.
const LONG_FILES: [(&str, &str); 0] = [];

/// Words that mark unfinished work. In two parts, so that this file passes.
const UNFINISHED: [(&str, &str); 5] = [("todo", "!"), ("unimplemented", "!"), ("dbg", "!"), ("FIX", "ME"), ("XX", "X")];

/// Where paths of one machine begin; in two parts for the same reason.
const MACHINE_PATHS: [(&str, &str); 3] = [("/ro", "ot/"), ("/wo", "rk/"), ("/ho", "me/")];

/// Checks all source files, and all texts for paths of one machine.
pub fn check(tree: &Tree) -> Vec<Problem> {
    let mut problems = Vec::new();
    let tests = test_modules(tree);
    for text in &tree.texts {
        check_paths(text, &mut problems);
        if text.is_rust() {
            check_form(text, &tests, &mut problems);
        }
    }
    check_dead(tree, &mut problems);
    problems
}

/// Files that another one includes for its tests: by `#[path = ".."]`, or by `#[cfg(test)]` before `mod name;`.
pub fn test_modules(tree: &Tree) -> HashSet<String> {
    let rust = tree.texts.iter().filter(|text| text.is_rust());
    rust.flat_map(test_modules_of).collect()
}

fn test_modules_of(text: &Text) -> Vec<String> {
    let (dir, file) = text.path.rsplit_once('/').unwrap_or(("", &text.path));
    let is_root = ["mod.rs", "lib.rs", "main.rs"].contains(&file);
    let own_dir = if is_root { dir.to_owned() } else { format!("{dir}/{}", file.trim_end_matches(".rs")) };
    let lines: Vec<&str> = text.text.lines().map(str::trim).collect();
    let by_path = lines.iter().filter_map(|line| line.strip_prefix("#[path = \"")?.strip_suffix("\"]"));
    let by_name = lines.windows(2).filter(|pair| pair[0] == "#[cfg(test)]");
    let by_name = by_name.filter_map(|pair| pair[1].rsplit_once("mod ")?.1.strip_suffix(';'));
    let files = |name: &str| [format!("{own_dir}/{name}.rs"), format!("{own_dir}/{name}/mod.rs")];
    by_path.map(|file| format!("{dir}/{file}")).chain(by_name.flat_map(files)).collect()
}

fn check_form(text: &Text, tests: &HashSet<String>, problems: &mut Vec<Problem>) {
    let mut add = |line: usize, what: String| problems.push(Problem::new(&text.path, line, what));
    let needs_head = !tests.contains(&text.path) && !text.path.ends_with("build.rs");
    if needs_head && !text.text.starts_with("//!") {
        add(1, "begins without `//!`: say what the file is for".to_owned());
    }
    let n_lines = text.text.lines().count();
    if n_lines > MAX_LINES && !LONG_FILES.iter().any(|(path, _)| *path == text.path) {
        add(0, format!("has {n_lines} lines, more than {MAX_LINES}; split it by what it does"));
    }
    for (number, line) in text.lines() {
        let n_columns = line.chars().count();
        if n_columns > MAX_COLUMNS && !cannot_be_broken(line) {
            add(number, format!("is {n_columns} columns wide, more than {MAX_COLUMNS}"));
        }
        for (start, end) in UNFINISHED {
            if has_word(line, &format!("{start}{end}")) {
                add(number, format!("`{start}{end}` marks unfinished work; finish it or write down why not"));
            }
        }
    }
}

/// Whether `rustfmt` leaves a line alone: attributes and strings.
fn cannot_be_broken(line: &str) -> bool {
    let line = line.trim_start();
    line.starts_with("#[") || line.starts_with('"') || line.starts_with("r#\"")
}

/// Whether `word` stands in `line` with no letter, digit or `_` before it or, if it ends in a letter, behind it.
fn has_word(line: &str, word: &str) -> bool {
    let is_part = |c: char| c.is_alphanumeric() || c == '_';
    line.match_indices(word).any(|(at, _)| {
        let before = line[..at].chars().next_back();
        let after = line[at + word.len()..].chars().next();
        let is_cut = word.ends_with(is_part) && after.is_some_and(is_part);
        !is_cut && !before.is_some_and(is_part)
    })
}

fn check_paths(text: &Text, problems: &mut Vec<Problem>) {
    for (number, line) in text.lines() {
        for (start, end) in MACHINE_PATHS {
            let path = format!("{start}{end}");
            let is_path = |(at, _): (usize, &str)| {
                // Not a part of an address or of a longer path.
                let before = line[..at].chars().next_back();
                let begins = !before.is_some_and(|c| c.is_alphanumeric() || "._-/}".contains(c));
                begins && line[at + path.len()..].starts_with(|c: char| c.is_alphanumeric() || c == '.')
            };
            if line.match_indices(&path).any(is_path) {
                problems.push(Problem::new(&text.path, number, format!("names {path}..., a path of one machine")));
            }
        }
    }
}

/// Source files below a `src` that no `mod` or `#[path]` includes.
fn check_dead(tree: &Tree, problems: &mut Vec<Problem>) {
    let included = test_modules(tree);
    for text in tree.texts.iter().filter(|text| text.is_rust()) {
        let Some((root, inside)) = text.path.split_once("/src/") else { continue };
        let is_root = matches!(inside, "lib.rs" | "main.rs") || inside.starts_with("bin/");
        if is_root || included.contains(&text.path) {
            continue;
        }
        let module = inside.trim_end_matches(".rs").trim_end_matches("/mod");
        let name = module.rsplit('/').next().unwrap_or(module);
        let declaration = format!("mod {name};");
        let declares = |other: &&Text| {
            other.path.starts_with(&format!("{root}/src/"))
                && other.text.lines().any(|line| has_word(line, &declaration) && !line.trim_start().starts_with("//"))
        };
        if !tree.texts.iter().filter(|other| other.is_rust()).any(|other| declares(&other)) {
            problems.push(Problem::new(
                &text.path,
                0,
                format!("is in no module; declare `{declaration}` or remove it"),
            ));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check_one(path: &str, text: &str) -> Vec<String> {
        check(&Tree::of([(path, text)])).into_iter().map(|problem| problem.what).collect()
    }

    fn rust(body: &str) -> String {
        format!("//! Head.\n{body}\n")
    }

    #[test]
    fn files_have_a_head() {
        let path = "crates/base/src/lib.rs";
        assert_eq!(check_one(path, "//! Head.\n"), [""; 0]);
        assert_eq!(check_one(path, "use std::fs;\n").len(), 1);
        assert_eq!(check_one("crates/base/build.rs", "fn main() {}\n"), [""; 0]);
        let tree = Tree::of([
            (path, "//! Head.\n#[cfg(test)]\n#[path = \"lib_tests.rs\"]\nmod tests;\n"),
            ("crates/base/src/lib_tests.rs", "use super::*;\n"),
        ]);
        assert_eq!(check(&tree), []);
        let names = test_modules(&Tree::of([
            (path, "//! Head.\n#[cfg(test)]\nmod world;\nmod house;\n"),
            ("crates/base/src/a/b.rs", "//! Head.\n    #[cfg(test)]\n    pub(crate) mod c;\n"),
        ]));
        let expected = ["world.rs", "world/mod.rs", "a/b/c.rs", "a/b/c/mod.rs"];
        assert_eq!(names, HashSet::from(expected.map(|file| format!("crates/base/src/{file}"))));
    }

    #[test]
    fn lines_and_files_have_an_end() {
        let path = "crates/base/src/lib.rs";
        assert_eq!(check_one(path, &rust(&format!("// {}", "a".repeat(118)))).len(), 1);
        assert_eq!(check_one(path, &rust(&format!("// {}", "\u{fc}".repeat(117)))), [""; 0]);
        assert_eq!(check_one(path, &rust(&format!("    #[error(\"{}\")]", "a".repeat(200)))), [""; 0]);
        assert_eq!(check_one(path, &rust(&"\n".repeat(800))).len(), 1);
        assert_eq!(check_one("README.md", &"a".repeat(500)), [""; 0]);
    }

    #[test]
    fn unfinished_work_is_found_as_words() {
        for (start, end) in UNFINISHED {
            let line = format!("    {start}{end}(1);");
            assert_eq!(check_one("crates/base/src/lib.rs", &rust(&line)).len(), 1, "{line}");
            let line = format!("    no{start}{end}(1);");
            assert_eq!(check_one("crates/base/src/lib.rs", &rust(&line)), [""; 0], "{line}");
        }
        assert_eq!(check_one("crates/base/src/lib.rs", &rust(concat!("// XX", "XX"))), [""; 0]);
    }

    #[test]
    fn paths_of_one_machine_are_found_in_all_texts() {
        for (start, end) in MACHINE_PATHS {
            assert_eq!(check_one("README.md", &format!("see `{start}{end}ada/x`")).len(), 1);
            assert_eq!(check_one("README.md", &format!("see https://example.org{start}{end}ada")), [""; 0]);
            assert_eq!(check_one("README.md", &format!("below {start}{end} lie")), [""; 0]);
        }
    }

    #[test]
    fn files_without_a_module_are_dead() {
        let check = |lib: &str, path: &str| check(&Tree::of([("a/src/lib.rs", lib), (path, "//! Head.\n")])).len();
        assert_eq!(check("//! Head.\nmod b;\n", "a/src/b.rs"), 0);
        assert_eq!(check("//! Head.\npub mod b;\n", "a/src/b/mod.rs"), 0);
        assert_eq!(check("//! Head.\n// mod b;\n", "a/src/b.rs"), 1);
        assert_eq!(check("//! Head.\nmod ab;\n", "a/src/b.rs"), 1);
        assert_eq!(check("//! Head.\n", "a/tests/b.rs"), 0);
    }
}
