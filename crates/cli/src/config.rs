//! From raw arguments to a resolved command line: flags win over environment, environment over `config.toml`, and that
//! over defaults.
//!
//! A key of the file is a flag's long name. At the top level it holds for every verb that has the flag; in a table
//! named like a verb, for that verb alone:
//!
//! ```toml
//! memory = "12GiB"
//! [serve]
//! parallel = 8
//! ```

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

use clap::{Command, CommandFactory, FromArgMatches};

use crate::args::{Cli, StateArgs};

/// Largest file that is read: a hundred times the longest sensible one.
const MAX_CONFIG_BYTES: u64 = 1 << 20;

/// Arguments could not be resolved.
#[derive(Debug)]
pub enum ParseError {
    /// The command line; clap has the message, which may be the help text.
    Usage(clap::Error),
    /// The file.
    Config(String),
}

/// Resolves the command line.
pub fn parse(args: impl Iterator<Item = OsString>) -> Result<Cli, ParseError> {
    let args: Vec<OsString> = args.collect();
    let settings = match config_path(&args) {
        (path, required) if required || path.exists() => read(&path).map_err(ParseError::Config)?,
        _ => Settings::default(),
    };
    let command = settings.apply(Cli::command()).map_err(ParseError::Config)?;
    let matches = command.try_get_matches_from(args).map_err(ParseError::Usage)?;
    Cli::from_arg_matches(&matches).map_err(ParseError::Usage)
}

/// Where the file is, and whether it was named and so must exist. Looked for before the command line is understood.
fn config_path(args: &[OsString]) -> (PathBuf, bool) {
    let value_of = |flag: &str, variable: &str| {
        let text: Vec<_> = args.iter().map(|arg| arg.to_string_lossy()).collect();
        let joined = format!("{flag}=");
        let after = text.iter().position(|arg| arg == flag).and_then(|at| args.get(at + 1)).map(PathBuf::from);
        let inside = text.iter().find_map(|arg| arg.strip_prefix(&joined).map(PathBuf::from));
        after.or(inside).or_else(|| std::env::var_os(variable).map(PathBuf::from))
    };
    match value_of("--config", "BRIGADE_CONFIG") {
        Some(path) => (path, true),
        None => {
            let state = StateArgs { state_dir: value_of("--state-dir", "BRIGADE_STATE_DIR") };
            (state.dir().join("config.toml"), false)
        }
    }
}

/// Flags and their values as text.
type Values = BTreeMap<String, Vec<String>>;

#[derive(Debug, Default)]
struct Settings {
    path: PathBuf,
    all: Values,
    verbs: BTreeMap<String, Values>,
}

fn read(path: &Path) -> Result<Settings, String> {
    let here = path.display();
    let size = std::fs::metadata(path).map_err(|error| format!("{here}: {error}"))?.len();
    if size > MAX_CONFIG_BYTES {
        return Err(format!("{here} has {size} bytes; that is no configuration"));
    }
    let text = std::fs::read_to_string(path).map_err(|error| format!("{here}: {error}"))?;
    Settings::from_toml(path, &text)
}

impl Settings {
    fn from_toml(path: &Path, text: &str) -> Result<Self, String> {
        let here = path.display();
        let table: toml::Table = text.parse().map_err(|error: toml::de::Error| format!("{here}: {error}"))?;
        let mut settings = Self { path: path.to_owned(), ..Self::default() };
        for (key, value) in table {
            match value {
                toml::Value::Table(inner) => {
                    let values = inner.into_iter().map(|(key, value)| Ok((key.clone(), texts(path, &key, value)?)));
                    settings.verbs.insert(key, values.collect::<Result<_, String>>()?);
                }
                value => drop(settings.all.insert(key.clone(), texts(path, &key, value)?)),
            }
        }
        Ok(settings)
    }

    /// Makes the file's values the defaults of the flags.
    fn apply(&self, command: Command) -> Result<Command, String> {
        let here = self.path.display();
        let long_flags = |verb: &Command| -> Vec<String> {
            let flags = verb.get_arguments().filter(|arg| !arg.is_global_set());
            flags.filter_map(|arg| arg.get_long().map(str::to_owned)).collect()
        };
        let verbs: BTreeMap<String, Vec<String>> =
            command.get_subcommands().map(|verb| (verb.get_name().to_owned(), long_flags(verb))).collect();
        if let Some(key) = self.all.keys().find(|key| !verbs.values().flatten().any(|flag| flag == *key)) {
            return Err(format!("{here}: there is no setting {key:?}"));
        }
        for (name, values) in &self.verbs {
            let flags = verbs.get(name).ok_or_else(|| format!("{here}: there is no verb [{name}]"))?;
            if let Some(key) = values.keys().find(|key| !flags.contains(key)) {
                return Err(format!("{here}: `brigade {name}` has no setting {key:?}"));
            }
        }
        Ok(verbs.keys().fold(command, |command, name| {
            let own = self.verbs.get(name);
            command.mut_subcommand(name, |verb| {
                verb.mut_args(|arg| {
                    let Some(long) = arg.get_long() else { return arg };
                    let values = own.and_then(|own| own.get(long)).or_else(|| self.all.get(long));
                    match values {
                        Some(values) => arg.default_values(values.clone()),
                        None => arg,
                    }
                })
            })
        }))
    }
}

fn texts(path: &Path, key: &str, value: toml::Value) -> Result<Vec<String>, String> {
    let one = |value: toml::Value| match value {
        toml::Value::String(text) => Ok(text),
        toml::Value::Integer(number) => Ok(number.to_string()),
        toml::Value::Float(number) => Ok(number.to_string()),
        toml::Value::Boolean(yes) => Ok(yes.to_string()),
        _ => Err(format!("{}: {key} must be a text, a number, true or false, or a list of these", path.display())),
    };
    match value {
        toml::Value::Array(values) => values.into_iter().map(one).collect(),
        value => Ok(vec![one(value)?]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::Verb;

    fn resolve(toml: &str, args: &[&str]) -> Result<Cli, String> {
        let command = Settings::from_toml(Path::new("c.toml"), toml)?.apply(Cli::command())?;
        let matches = command.try_get_matches_from(args).map_err(|error| error.to_string())?;
        Cli::from_arg_matches(&matches).map_err(|error| error.to_string())
    }

    fn serve(toml: &str, args: &[&str]) -> crate::args::ServeArgs {
        match resolve(toml, &[&["brigade", "serve"], args].concat()).unwrap().verb {
            Verb::Serve(args) => args,
            _ => panic!(),
        }
    }

    #[test]
    fn a_verbs_table_wins_over_the_top_and_flags_over_both() {
        let toml = "parallel = 2\nmemory = '3GiB'\n[serve]\nparallel = 5\nspread = true\nlayers = [1, 2]";
        let args = serve(toml, &[]);
        assert_eq!((args.parallel, args.spread), (5, true));
        assert_eq!(args.layers, Some(vec![1, 2]));
        assert_eq!(args.node.memory, Some(brigade_base::ByteSize::gib(3)));
        assert_eq!(serve(toml, &["--parallel", "7"]).parallel, 7);
    }

    #[test]
    fn what_is_not_known_is_named() {
        assert!(resolve("paralel = 2", &["brigade", "serve"]).unwrap_err().contains("paralel"));
        assert!(resolve("[srve]\nport = 2", &["brigade", "serve"]).unwrap_err().contains("srve"));
        assert!(resolve("[join]\nport = 2", &["brigade", "serve"]).unwrap_err().contains("port"));
        assert!(resolve("port = 70000", &["brigade", "serve"]).is_err());
        assert!(resolve("port = {}", &["brigade", "serve"]).is_err());
    }
}
