//! `docs/configuration.md` names each flag of each verb of `brigade`.
//!
//! ```text
//! enum Verb { Plan(PlanArgs), .. } -> struct PlanArgs and the structs and enums in it -> long flags
//! | `brigade plan MODEL` | .. |    -> a row names all flags of its verb
//! ## `brigade serve [MODEL]`       -> so does a section, with the table of what every node has where it refers to that
//! ```

use std::collections::BTreeSet;

use super::commands::{ARGS, CLI, flags};
use super::{Problem, Tree};

/// The page that claims to have them all.
const PAGE: &str = "docs/configuration.md";

/// Flags of every program, which need no words.
const OF_ALL: [&str; 2] = ["help", "version"];

/// Verbs that there are: if none of them is found, it is not looked for as it is written.
const SURE_VERBS: [&str; 2] = ["serve", "join"];

/// Words before the table of the flags of all nodes; it stands in one section, and ends with an empty line.
const OF_NODES: &str = "and what every node has:\n\n";

/// With these words another section has that table too.
const WITH_OF_NODES: &str = "Beside the table above";

/// Checks that the page names all flags.
pub fn check(tree: &Tree) -> Vec<Problem> {
    let (Some(args), Some(page)) = (tree.text(ARGS), tree.text(PAGE)) else { return Vec::new() };
    let sources: Vec<&str> =
        tree.texts.iter().filter(|text| text.path.starts_with(CLI)).map(|text| text.text.as_str()).collect();
    let mut problems = Vec::new();
    let verbs = verbs(&args.text);
    for sure in SURE_VERBS.iter().filter(|sure| !verbs.iter().any(|(verb, _)| verb == *sure)) {
        let what = format!("`enum Verb` has no `{sure}` that is found: flags are not checked");
        problems.push(Problem::new(ARGS, 0, what));
    }
    for (verb, ty) in verbs {
        let (number, text) = words_about(&page.text, &verb);
        let flags = flags_of(&ty, &sources);
        if flags.is_empty() && SURE_VERBS.contains(&verb.as_str()) {
            problems.push(Problem::new(ARGS, 0, format!("no flags of `brigade {verb}` are found in `{ty}`")));
        }
        for flag in flags {
            if number.is_none() {
                problems.push(Problem::new(PAGE, 0, format!("`brigade {verb}` has neither a row nor a section")));
                break;
            }
            if !names(&text, &flag) {
                let what = format!("`brigade {verb}` has a flag `--{flag}`, which is not named");
                problems.push(Problem::new(PAGE, number.unwrap_or(0), what));
            }
        }
    }
    for flag in own_flags(body("Cli", &[&args.text]).unwrap_or_default()).iter().filter(|flag| !names(&page.text, flag))
    {
        problems.push(Problem::new(PAGE, 0, format!("the flag `--{flag}` of all verbs is not named")));
    }
    problems
}

/// Verbs as the command line has them, and the types of their arguments.
fn verbs(args: &str) -> Vec<(String, String)> {
    let variants = body("Verb", &[args]).unwrap_or_default().lines().filter_map(|line| {
        let (name, ty) = line.trim().trim_end_matches(',').strip_suffix(')')?.split_once('(')?;
        name.chars().all(char::is_alphanumeric).then(|| (name.to_ascii_lowercase(), ty.to_owned()))
    });
    variants.collect()
}

/// What the page says about the flags of a verb, and in which line that begins: its row, else its section, with the
/// table of all nodes if it says so.
fn words_about(page: &str, verb: &str) -> (Option<usize>, String) {
    let is_of = |line: &str, start: &str| {
        let rest = line.strip_prefix(start).and_then(|rest| rest.strip_prefix(verb));
        rest.is_some_and(|rest| rest.starts_with(['`', ' ']))
    };
    let row = (1..).zip(page.lines()).find(|(_, line)| is_of(line, "| `brigade "));
    if let Some((number, row)) = row {
        return (Some(number), row.to_owned());
    }
    let number = (1..).zip(page.lines()).find(|(_, line)| is_of(line, "## `brigade ")).map(|(number, _)| number);
    let section = page.split("\n## ").find(|section| is_of(section, "`brigade ")).unwrap_or_default();
    let of_nodes = page.split_once(OF_NODES).and_then(|(_, rest)| rest.split("\n\n").next());
    let shared = of_nodes.filter(|_| section.contains(WITH_OF_NODES)).unwrap_or_default();
    (number, format!("{section}\n{shared}"))
}

/// All long flags of the arguments in `ty`, and in what it is made of.
fn flags_of(ty: &str, sources: &[&str]) -> BTreeSet<String> {
    let mut flags = BTreeSet::new();
    let (mut todo, mut seen) = (vec![ty.to_owned()], BTreeSet::new());
    while let Some(ty) = todo.pop() {
        let Some(body) = body(&ty, sources).filter(|_| seen.insert(ty)) else { continue };
        flags.extend(own_flags(body));
        let code = body.lines().filter(|line| !line.trim_start().starts_with("//"));
        let words = code.flat_map(|line| line.split(|c: char| !c.is_alphanumeric()));
        todo.extend(words.filter(|word| word.starts_with(char::is_uppercase)).map(str::to_owned));
    }
    flags
}

fn own_flags(body: &str) -> Vec<String> {
    flags(body).into_iter().filter(|flag| !OF_ALL.contains(&flag.as_str())).collect()
}

/// What stands between the braces of the struct or enum with this name.
fn body<'a>(ty: &str, sources: &[&'a str]) -> Option<&'a str> {
    let heads = ["struct", "enum"].map(|kind| format!("{kind} {ty} {{\n"));
    let rest = sources.iter().find_map(|source| heads.iter().find_map(|head| source.split_once(head.as_str())))?.1;
    rest.split("\n}").next()
}

/// Whether `text` has `--flag`, and not only as the beginning of another one.
fn names(text: &str, flag: &str) -> bool {
    let goes_on = |rest: &str| rest.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '-');
    text.split("--").skip(1).any(|rest| rest.strip_prefix(flag).is_some_and(|rest| !goes_on(rest)))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SAMPLE: &str = "
pub struct Cli {
    /// Settings
    #[arg(long, global = true)]
    pub config: Option<PathBuf>,
}
pub enum Verb {
    /// Serve
    Serve(ServeArgs),
    /// Join
    Join(JoinArgs),
    /// Tickets
    Ticket(TicketArgs),
}
pub struct StateArgs {
    #[arg(long, value_name = \"DIR\")]
    pub state_dir: Option<PathBuf>,
}
pub struct ServeArgs {
    #[command(flatten)]
    pub state: StateArgs,
    #[arg(long)]
    pub port: u16,
}
pub struct JoinArgs {
    #[command(flatten)]
    pub state: StateArgs,
    #[arg(long)]
    pub lora: Vec<AdapterFile>,
}
pub struct TicketArgs {
    #[command(subcommand)]
    pub action: Option<TicketAction>,
}
pub enum TicketAction {
    /// Make one
    Create {
        /// For how long
        #[arg(long)]
        ttl: Duration,
    },
}
";

    const FINE: &str = "# Configuration
`--config`
## `brigade serve [MODEL]`
| `--port N` |
and what every node has:

| `--state-dir` |

## `brigade join`
Beside the table above:
| `--lora` |
## Others
| `brigade ticket` | `create` with `--ttl` |
";

    fn check_page(page: &str) -> Vec<String> {
        let tree = Tree::of([(ARGS, SAMPLE), (PAGE, page)]);
        check(&tree).iter().map(ToString::to_string).collect()
    }

    #[test]
    fn flags_are_those_of_all_that_a_verb_is_made_of() {
        let all = |ty: &str| flags_of(ty, &[SAMPLE]).into_iter().collect::<Vec<_>>();
        assert_eq!(all("ServeArgs"), ["port", "state-dir"]);
        assert_eq!(all("TicketArgs"), ["ttl"]);
        assert_eq!(verbs(SAMPLE)[1], ("join".to_owned(), "JoinArgs".to_owned()));
    }

    #[test]
    fn what_is_not_named_is_found() {
        assert_eq!(check_page(FINE), [""; 0]);
        for (gone, instead, found) in [
            ("--port", "--portal", "docs/configuration.md:3: `brigade serve` has a flag `--port`"),
            ("--ttl", "ttl", "docs/configuration.md:13: `brigade ticket` has a flag `--ttl`"),
            ("Beside the table above:", "", "docs/configuration.md:9: `brigade join` has a flag `--state-dir`"),
            ("| `--lora` |", "", "docs/configuration.md:9: `brigade join` has a flag `--lora`"),
            ("| `--port N` |", "", "docs/configuration.md:3: `brigade serve` has a flag `--port`"),
            ("`--config`", "", "the flag `--config` of all verbs"),
            ("`brigade ticket`", "", "`brigade ticket` has neither a row nor a section"),
        ] {
            let problems = check_page(&FINE.replace(gone, instead));
            assert!(problems.len() == 1 && problems[0].contains(found), "{gone}: {problems:?}");
        }
        // A row is for its verb alone, and so is a section.
        let elsewhere = FINE.replace("## Others\n", "## Others\n| `brigade join` | `--state-dir` |\n");
        assert_eq!(check_page(&elsewhere).len(), 1);
        let elsewhere = FINE.replace("| `--port N` |", "| `--port N` | `--lora` |").replace("| `--lora` |\n##", "##");
        assert_eq!(check_page(&elsewhere).len(), 1);
    }

    /// A check that finds nothing to look at says so.
    #[test]
    fn verbs_that_are_not_found_are_told() {
        for (gone, instead, n) in [
            ("pub enum Verb {", "pub enum Action {", 2),
            ("    Join(JoinArgs),", "    #[command(hide = true)] Join(JoinArgs, bool),", 1),
            ("pub struct JoinArgs {", "pub struct JoinArgs<T> {", 1),
        ] {
            let tree = Tree::of([(ARGS, SAMPLE.replace(gone, instead).as_str()), (PAGE, FINE)]);
            let problems: Vec<String> = check(&tree).iter().map(ToString::to_string).collect();
            assert!(problems.len() == n && problems.iter().all(|what| what.contains(ARGS)), "{gone}: {problems:?}");
        }
    }
}
