//! What documents tell people to type exists: `brigade` verbs and flags, `cargo xtask` tasks, `make` targets, and files
//! that they link to.
//!
//! Commands are looked for in code only, in blocks and between backticks, and only where a program's name can stand.

use clap::CommandFactory;

use super::{Problem, Text, Tree};

/// Where the verbs of `brigade` and most of their flags are declared.
pub(super) const ARGS: &str = "crates/cli/src/args.rs";

/// Where the flags of verbs are declared that have a file of their own.
pub(super) const CLI: &str = "crates/cli/src/";

/// Words that may stand before a program's name.
const BEFORE_PROGRAM: [&str; 5] = ["$", "sudo", "exec", "time", "-"];

/// Words behind which a program's name can stand again.
const BETWEEN_PROGRAMS: [&str; 5] = ["&&", "||", "|", ";", "&"];

/// Checks README.md, the other documents beside it but the changelog, and those in `docs`.
pub fn check(tree: &Tree) -> Vec<Problem> {
    let known = Known::of(tree);
    let mut problems = Vec::new();
    for document in tree.texts.iter().filter(|text| is_document(&text.path)) {
        for (number, code) in codes(document) {
            known.check(&code, |what| problems.push(Problem::new(&document.path, number, what)));
        }
        check_links(tree, document, &mut problems);
    }
    problems
}

fn is_document(path: &str) -> bool {
    // The changelog tells of commands that were.
    path.ends_with(".md") && path != "CHANGELOG.md" && (!path.contains('/') || path.starts_with("docs/"))
}

/// All that may be typed.
struct Known {
    verbs: Vec<String>,
    flags: Vec<String>,
    targets: Vec<String>,
    tasks: clap::Command,
}

impl Known {
    fn of(tree: &Tree) -> Self {
        let args = tree.text(ARGS).map_or("", |text| &text.text);
        let makefile = tree.text("Makefile").map_or("", |text| &text.text);
        let flags = tree.texts.iter().filter(|text| text.path.starts_with(CLI)).flat_map(|text| flags(&text.text));
        let (verbs, targets, tasks) = (verbs(args), targets(makefile), crate::Cli::command());
        Self { verbs, flags: flags.collect(), targets, tasks }
    }

    /// Checks one line of code.
    fn check(&self, code: &str, mut add: impl FnMut(String)) {
        // A comment ends a line of shell.
        let code = code.split(" #").next().unwrap_or(code);
        for command in programs(code) {
            let words = &command[1..];
            match command[0].as_str() {
                "brigade" => self.check_brigade(words, &mut add),
                "make" => {
                    for target in words.iter().filter(|word| is_name(word) && !self.targets.contains(word)) {
                        add(format!("`make {target}`: the Makefile has no such target"));
                    }
                }
                "cargo" if words.first().is_some_and(|word| word == "xtask") => self.check_task(&words[1..], &mut add),
                _ => {}
            }
        }
    }

    fn check_brigade(&self, words: &[String], add: &mut impl FnMut(String)) {
        if let Some(verb) = words.first().filter(|word| is_name(word) && !self.verbs.contains(word)) {
            add(format!("`brigade {verb}`: there is no such verb"));
        }
        for word in words {
            let flag = word.strip_prefix("--").map(|flag| flag.split('=').next().unwrap_or(flag));
            if let Some(flag) = flag.filter(|flag| is_name(flag) && !self.flags.iter().any(|known| known == flag)) {
                add(format!("`brigade ... --{flag}`: no verb has this flag"));
            }
        }
    }

    fn check_task(&self, words: &[String], add: &mut impl FnMut(String)) {
        let mut command = &self.tasks;
        for word in words.iter().take_while(|word| is_name(word)) {
            if !command.has_subcommands() {
                return;
            }
            match command.find_subcommand(word) {
                Some(found) => command = found,
                None => return add(format!("`cargo xtask {}`: there is no such task", words.join(" "))),
            }
        }
    }
}

/// Whether a word may be a verb or target: not a flag, path, placeholder or assignment.
fn is_name(word: &str) -> bool {
    word.starts_with(|c: char| c.is_ascii_lowercase())
        && word.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-' || c == '_')
}

/// The commands in a line, each as its program's name without folders, and its arguments.
fn programs(code: &str) -> Vec<Vec<String>> {
    let mut found: Vec<Vec<String>> = Vec::new();
    let mut at_program = true;
    for word in code.split_whitespace() {
        let ends = word.ends_with(';') && word.len() > 1;
        let word = word.trim_end_matches(';').trim_matches(['"', '\'']);
        if BETWEEN_PROGRAMS.contains(&word) || word.is_empty() {
            at_program = true;
            continue;
        }
        if !at_program {
            if let Some(command) = found.last_mut() {
                command.push(word.to_owned());
            }
        } else if !BEFORE_PROGRAM.contains(&word) {
            // `ExecStart=/usr/bin/program` and `VARIABLE=value program`.
            let value = word.split_once('=').map(|(_, value)| value);
            let program = value.unwrap_or(word).rsplit('/').next().unwrap_or(word);
            if value.is_none() || program == "brigade" {
                found.push(vec![program.to_owned()]);
                at_program = false;
            }
        }
        at_program |= ends;
    }
    found
}

/// Lines of code blocks, continued ones joined, and code between backticks, with their line numbers.
fn codes(document: &Text) -> Vec<(usize, String)> {
    let mut found: Vec<(usize, String)> = Vec::new();
    let mut in_block = false;
    let mut continues = false;
    for (number, line) in document.lines() {
        if line.trim_start().starts_with("```") {
            in_block = !in_block;
            continues = false;
        } else if in_block {
            let code = line.trim_end().trim_end_matches('\\');
            match found.last_mut().filter(|_| continues) {
                Some((_, last)) => last.push_str(code),
                None => found.push((number, code.to_owned())),
            }
            continues = line.trim_end().ends_with('\\');
        } else {
            found.extend(line.split('`').skip(1).step_by(2).map(|code| (number, code.to_owned())));
        }
    }
    found
}

/// Names of the variants of `enum Verb`, as the command line has them.
fn verbs(args: &str) -> Vec<String> {
    let body = args.split_once("pub enum Verb {").map_or("", |(_, rest)| rest);
    let variants = body.lines().take_while(|line| *line != "}").filter_map(|line| {
        let line = line.strip_prefix("    ").filter(|line| line.starts_with(|c: char| c.is_ascii_uppercase()))?;
        line.split(['(', ',', ' ']).next()
    });
    variants.map(|name| name.to_ascii_lowercase()).collect()
}

/// Names of all fields with `#[arg(long ..)]`, as the command line has them.
pub(super) fn flags(args: &str) -> Vec<String> {
    let mut flags = vec!["help".to_owned(), "version".to_owned()];
    let mut attribute = String::new();
    let mut is_open = false;
    for line in args.lines().map(str::trim) {
        if is_open || line.starts_with("#[arg(") {
            attribute.push_str(line);
            is_open = !line.ends_with(")]");
        } else if let Some((field, _)) =
            line.split_once(':').filter(|_| !attribute.is_empty() && !line.starts_with("//"))
        {
            let long = attribute.split("long").nth(1).map(|rest| rest.trim_start().strip_prefix('='));
            let field = field.rsplit(' ').next().unwrap_or(field).replace('_', "-");
            flags.extend(long.map(|name| name.and_then(|rest| rest.split('"').nth(1)).map_or(field, str::to_owned)));
            attribute.clear();
        }
    }
    flags
}

/// Targets of a Makefile.
fn targets(makefile: &str) -> Vec<String> {
    let rules = makefile.lines().filter(|line| !line.starts_with(['\t', '#', ' ', '.'])).filter_map(|line| {
        let (names, rest) = line.split_once(':')?;
        (!rest.starts_with('=') && !names.contains('=')).then_some(names)
    });
    rules.flat_map(str::split_whitespace).map(str::to_owned).collect()
}

/// Links to files of the repository lead somewhere.
fn check_links(tree: &Tree, document: &Text, problems: &mut Vec<Problem>) {
    let dir = document.path.rsplit_once('/').map_or("", |(dir, _)| dir);
    let mut in_block = false;
    for (number, line) in document.lines() {
        in_block ^= line.trim_start().starts_with("```");
        // Code between backticks has no links.
        let prose: String =
            if in_block { String::new() } else { line.split('`').step_by(2).collect::<Vec<_>>().join("`") };
        for link in prose.split("](").skip(1).filter_map(|rest| rest.split([')', '#', ' ']).next()) {
            let is_elsewhere = link.is_empty() || link.contains("://") || link.starts_with("mailto:");
            let path = resolve(dir, link);
            if !is_elsewhere && !path.is_empty() && !tree.contains(&path) {
                problems.push(Problem::new(&document.path, number, format!("links to {link}, which does not exist")));
            }
        }
    }
}

/// `link` as seen from `dir`, relative to the repository.
fn resolve(dir: &str, link: &str) -> String {
    let mut parts: Vec<&str> = Vec::new();
    let start = if link.starts_with('/') { "" } else { dir };
    for part in start.split('/').chain(link.split('/')) {
        match part {
            "" | "." => {}
            ".." => drop(parts.pop()),
            part => parts.push(part),
        }
    }
    parts.join("/")
}

#[cfg(test)]
mod tests {
    use super::*;

    const SAMPLE: &str = "
pub enum Verb {
    /// Serve
    Serve(ServeArgs),
    /// Show
    Status {
        /// How
        #[arg(long)]
        json: bool,
    },
}
pub struct ServeArgs {
    #[arg(value_name = \"MODEL\")]
    pub model: Option<PathBuf>,
    /// Where: here
    #[arg(long, value_name = \"DIR\", env = \"BRIGADE_STATE_DIR\")]
    pub state_dir: Option<PathBuf>,
    #[arg(long = \"node\", value_name = \"NAME\")]
    pub nodes: Vec<String>,
}
";

    fn check_text(text: &str) -> Vec<String> {
        let makefile = "BUILD := x\n.PHONY: build\nbuild test: dep\n\tcargo build\n";
        let tree = Tree::of([(ARGS, SAMPLE), ("Makefile", makefile), ("docs/a.md", text), ("README.md", "")]);
        check(&tree).into_iter().map(|problem| problem.what).collect()
    }

    #[test]
    fn verbs_flags_and_targets_are_read() {
        assert_eq!(verbs(SAMPLE), ["serve", "status"]);
        assert_eq!(flags(SAMPLE), ["help", "version", "json", "state-dir", "node"]);
        assert_eq!(targets("a b: c\nD := e\nf:\n\tg: h\n# i: j\n"), ["a", "b", "f"]);
    }

    #[test]
    fn commands_that_exist_pass() {
        for text in [
            "Type `brigade serve MODEL --state-dir x`, then `make build`.",
            "```sh\n$ sudo brigade status --json   # brigade fly\n```",
            "```\nmake test && cargo xtask tidy; cargo xtask bench cluster --pin\ncargo build -p brigade --release\n```",
            "```\nExecStart=/usr/local/bin/brigade serve --node a\n```",
            "We make nothing up, and brigade flies. `brigade`, `brigade VERB`, `make`, `brigade -v serve`",
            "```\nbrigade serve \\\n    --node a\n```",
        ] {
            assert_eq!(check_text(text), [""; 0], "{text}");
        }
    }

    #[test]
    fn commands_that_do_not_exist_are_found() {
        for text in [
            "`brigade fly`",
            "`FOO=1 ./brigade fly`",
            "`brigade serve --wings`",
            "```\nbrigade serve \\\n    --wings\n```",
            "```\nExecStart=/usr/local/bin/brigade fly\n```",
            "`make fly`",
            "`make build && make fly`",
            "`cargo xtask fly`",
            "`cargo xtask bench fly`",
        ] {
            assert_eq!(check_text(text).len(), 1, "{text}: {:?}", check_text(text));
        }
    }

    #[test]
    fn links_lead_somewhere() {
        let fine = "[a](a.md#part) [b](../README.md) [c](https://example.org/x) [d](#e) [f](/docs) `[g](h.md)`";
        assert_eq!(check_text(fine), [""; 0]);
        assert_eq!(check_text("[a](b.md) and ![c](../d.png)").len(), 2);
    }
}
