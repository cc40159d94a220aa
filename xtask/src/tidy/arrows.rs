//! Crate arrows: which crate may use which, and what crates without I/O may not mention.

use toml::{Table, Value};

use super::sources::test_modules;
use super::{Problem, Text, Tree};

/// A crate may use only crates before it.
const ORDER: [&str; 14] = [
    "base", "template", "gguf", "plan", "protocol", "sim", "engine", "net", "store", "node", "api", "fuzz", "cli",
    "xtask",
];

/// Crates that may use still less: of the crates before them, only these.
const ONLY: [(&str, &[&str]); 5] = [
    ("api", &["base", "template", "node"]),
    ("fuzz", &["base", "template", "gguf", "protocol", "net", "store"]),
    ("net", &["base"]),
    ("sim", &["base", "plan", "protocol"]),
    ("store", &["base", "gguf"]),
];

/// What crates must not mention outside their tests: time, sockets and files belong to those who call them.
const NOT_IN: [(&[&str], &[&str], &str); 2] = [
    (
        &["base", "template", "gguf", "plan", "protocol"],
        &["std::net::", "thread::sleep", "Instant::now", "SystemTime::now"],
        "belongs to the caller: this crate neither waits, reads a clock nor talks to a network",
    ),
    (
        &["base", "template", "plan", "protocol"],
        &["std::fs", "File::open"],
        "belongs to the caller: this crate does no file I/O",
    ),
];

/// The only crate whose code may be unsafe, and so the only one with its own lints.
const UNSAFE: &str = "engine";

/// Checks all manifests and the sources of pure crates.
pub fn check(tree: &Tree) -> Vec<Problem> {
    let mut problems = Vec::new();
    for manifest in &tree.texts {
        let name = manifest.crate_name().filter(|name| manifest.path == manifest_path(name));
        if let Some(name) = name {
            check_manifest(name, manifest, &mut problems);
        }
    }
    let tests = test_modules(tree);
    for text in tree.texts.iter().filter(|text| text.is_rust() && text.path.contains("/src/")) {
        if !tests.contains(&text.path) {
            check_purity(text, &mut problems);
        }
    }
    problems
}

fn manifest_path(name: &str) -> String {
    if name == "xtask" { "xtask/Cargo.toml".to_owned() } else { format!("crates/{name}/Cargo.toml") }
}

fn check_manifest(name: &str, manifest: &Text, problems: &mut Vec<Problem>) {
    let mut add = |what: String| problems.push(Problem::new(&manifest.path, 0, what));
    let table: Table = match manifest.text.parse() {
        Ok(table) => table,
        Err(error) => return add(format!("is no TOML: {error}")),
    };
    let Some(rank) = ORDER.iter().position(|known| *known == name) else {
        return add(format!("the crate {name:?} has no place in the order of crates; give it one in xtask/src/tidy"));
    };
    for used in uses(&table) {
        let is_before = ORDER.iter().position(|known| *known == used).is_some_and(|used| used < rank);
        let only = ONLY.iter().find(|(of, _)| *of == name).map(|(_, only)| *only);
        if !is_before {
            add(format!("{name} must not use {used}, which does not stand before it in the order of crates"));
        } else if only.is_some_and(|only| !only.contains(&used.as_str())) {
            add(format!(
                "{name} must not use {used}; of Brigade's crates it may use {}",
                only.unwrap_or(&[]).join(", ")
            ));
        }
    }
    let inherits = table.get("lints").and_then(|lints| lints.get("workspace")).and_then(Value::as_bool) == Some(true);
    if !inherits && name != UNSAFE {
        add("lacks `[lints] workspace = true`, which forbids unsafe code".to_owned());
    }
}

/// Brigade's crates among the normal and build dependencies.
fn uses(manifest: &Table) -> Vec<String> {
    let targets = manifest.get("target").and_then(Value::as_table).into_iter().flat_map(Table::values);
    let tables = std::iter::once(manifest).chain(targets.filter_map(Value::as_table));
    let dependencies = tables.flat_map(|table| {
        ["dependencies", "build-dependencies"].into_iter().filter_map(|key| table.get(key)?.as_table())
    });
    let names = dependencies.flat_map(|dependencies| {
        dependencies.iter().map(|(key, value)| match value.get("package").and_then(Value::as_str) {
            Some(package) => package,
            None => key.as_str(),
        })
    });
    let ours = names.filter_map(|name| match name {
        "brigade" => Some("cli".to_owned()),
        name => name.strip_prefix("brigade-").map(str::to_owned),
    });
    ours.collect()
}

fn check_purity(text: &Text, problems: &mut Vec<Problem>) {
    let Some(name) = text.crate_name() else { return };
    for (crates, words, reason) in NOT_IN {
        if !crates.contains(&name) {
            continue;
        }
        for (number, line) in without_tests(text) {
            let code = line.trim_start();
            if code.starts_with("//") {
                continue;
            }
            if let Some(word) = words.iter().find(|word| code.contains(**word)) {
                problems.push(Problem::new(&text.path, number, format!("`{word}` {reason}")));
            }
        }
    }
}

/// The lines before the tests, which come last.
fn without_tests(text: &Text) -> impl Iterator<Item = (usize, &str)> {
    let n_lines = text.lines().filter(|(_, line)| *line == "#[cfg(test)]").map(|(number, _)| number).last();
    text.lines().take_while(move |(number, _)| n_lines.is_none_or(|tests| *number < tests))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check_one(path: &str, text: &str) -> Vec<String> {
        check(&Tree::of([(path, text)])).into_iter().map(|problem| problem.what).collect()
    }

    fn manifest(dependencies: &str) -> String {
        format!("[dependencies]\nserde = \"1\"\n{dependencies}\n[lints]\nworkspace = true\n")
    }

    #[test]
    fn arrows_point_upwards() {
        let path = "crates/node/Cargo.toml";
        assert_eq!(check_one(path, &manifest("brigade-net = { workspace = true }")), [""; 0]);
        assert_eq!(check_one(path, &manifest("brigade-api = { workspace = true }")).len(), 1);
        assert_eq!(check_one(path, &manifest("other = { package = \"brigade-cli\" }")).len(), 1);
        assert_eq!(check_one(path, &manifest("[dev-dependencies]\nbrigade-api = \"1\"")), [""; 0]);
        assert_eq!(check_one(path, &manifest("[target.'cfg(unix)'.dependencies]\nbrigade-api = \"1\"")).len(), 1);
        assert_eq!(check_one("crates/new/Cargo.toml", &manifest("")).len(), 1);
        assert_eq!(check_one("xtask/Cargo.toml", &manifest("brigade-api = \"1\"")), [""; 0]);
        assert_eq!(check_one("crates/fuzz/fuzz/Cargo.toml", "[dependencies]\nbrigade-gguf = \"1\""), [""; 0]);
    }

    #[test]
    fn some_crates_may_use_less() {
        assert_eq!(
            check_one("crates/api/Cargo.toml", &manifest("brigade-node = \"1\"\nbrigade-base = \"1\"")),
            [""; 0]
        );
        assert_eq!(check_one("crates/api/Cargo.toml", &manifest("brigade-engine = \"1\"")).len(), 1);
        assert_eq!(check_one("crates/net/Cargo.toml", &manifest("brigade-gguf = \"1\"")).len(), 1);
    }

    #[test]
    fn only_one_crate_has_its_own_lints() {
        assert_eq!(check_one("crates/net/Cargo.toml", "[package]\nname = \"brigade-net\"").len(), 1);
        assert_eq!(check_one("crates/engine/Cargo.toml", "[package]\nname = \"brigade-engine\""), [""; 0]);
    }

    #[test]
    fn pure_crates_touch_nothing_outside_their_tests() {
        let clock = "fn f() { std::time::Instant::now(); }";
        assert_eq!(check_one("crates/plan/src/lib.rs", clock).len(), 1);
        assert_eq!(check_one("crates/node/src/lib.rs", clock), [""; 0]);
        assert_eq!(check_one("crates/plan/src/lib.rs", "/// As `Instant::now` has it.\n"), [""; 0]);
        assert_eq!(
            check_one("crates/plan/src/lib.rs", &format!("fn g() {{}}\n#[cfg(test)]\nmod tests {{ {clock} }}")),
            [""; 0]
        );
        assert_eq!(check_one("crates/protocol/src/lib.rs", "use std::fs::File;").len(), 1);
        assert_eq!(check_one("crates/gguf/src/lib.rs", "use std::fs::File;"), [""; 0]);
        let included = [
            ("crates/plan/src/lib.rs", "#[cfg(test)]\n#[path = \"lib_tests.rs\"]\nmod tests;"),
            ("crates/plan/src/lib_tests.rs", clock),
        ];
        assert_eq!(check(&Tree::of(included)), []);
    }
}
