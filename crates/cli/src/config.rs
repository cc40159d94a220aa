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

use brigade_node::DirectFetch;
use clap::builder::Resettable;
use clap::parser::ValueSource;
use clap::{Arg, ArgMatches, Command, CommandFactory, FromArgMatches};

use crate::args::{Cli, StateArgs, Verb};
use crate::files;

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
    let command =
        with_lists_in_variables(without_empty_variables(Cli::command()), &args, &|name| std::env::var_os(name));
    let command = settings.apply(command).map_err(ParseError::Config)?;
    let matches = command.try_get_matches_from(args).map_err(ParseError::Usage)?;
    resolved(&matches, &settings).map_err(ParseError::Usage)
}

/// What was matched. A flag wins over a variable even where they are two ways to say one thing: the file of a ticket,
/// and the ticket itself. And what was set for all verbs holds for a worker only as far as it is for workers.
fn resolved(matches: &ArgMatches, settings: &Settings) -> Result<Cli, clap::Error> {
    let mut cli = Cli::from_arg_matches(matches)?;
    if let (Verb::Join(join), Some((_, given))) = (&mut cli.verb, matches.subcommand()) {
        if given.value_source("ticket") == Some(ValueSource::EnvVariable)
            && given.value_source("ticket_file") == Some(ValueSource::CommandLine)
        {
            join.ticket = None;
        }
        let is_for_all = |id: &str, flag: &str| match given.value_source(id) {
            Some(ValueSource::CommandLine) => false,
            Some(ValueSource::DefaultValue) => !settings.verbs.get("join").is_some_and(|own| own.contains_key(flag)),
            _ => true,
        };
        if join.model.is_none() && is_for_all("lora", "lora") {
            join.lora.clear();
        }
        if join.direct_fetch == DirectFetch::On && is_for_all("direct_fetch", "direct-fetch") {
            join.direct_fetch = DirectFetch::Auto;
        }
    }
    Ok(cli)
}

/// A variable that is empty counts as unset, but for keys: `BRIGADE_API_KEY=$UNSET` must not open the endpoint.
fn without_empty_variables(command: Command) -> Command {
    let command = command.mut_args(|arg| {
        let is_empty = |arg: &Arg| arg.get_env().and_then(std::env::var_os).is_some_and(|value| value.is_empty());
        if arg.get_id() != "api_key" && is_empty(&arg) { arg.env(Resettable::Reset) } else { arg }
    });
    command.mut_subcommands(without_empty_variables)
}

/// Flags that may be given several times, and whose values may have commas: on the command line and in a list of the
/// file each is one value as it stands. A variable is a single text, so there commas part them.
const PARTED_IN_VARIABLES: [&str; 1] = ["lora"];

/// Has commas part the values of those flags if they come from their variables.
fn with_lists_in_variables(
    command: Command,
    args: &[OsString],
    variable: &dyn Fn(&std::ffi::OsStr) -> Option<OsString>,
) -> Command {
    let is_parted = |arg: &Arg| {
        let is_given = arg.get_long().is_some_and(|long| flag_value(args, &format!("--{long}")).is_some());
        PARTED_IN_VARIABLES.contains(&arg.get_id().as_str()) && !is_given && arg.get_env().and_then(variable).is_some()
    };
    let command = command.mut_args(|arg| if is_parted(&arg) { arg.value_delimiter(',') } else { arg });
    command.mut_subcommands(|verb| with_lists_in_variables(verb, args, variable))
}

/// Where the file is, and whether it was named and so must exist. Looked for before the command line is understood.
fn config_path(args: &[OsString]) -> (PathBuf, bool) {
    let value_of = |flag: &str, variable: &str| {
        let given = flag_value(args, flag).filter(|value| !value.is_empty());
        let value = given.or_else(|| std::env::var_os(variable).filter(|value| !value.is_empty()));
        value.map(PathBuf::from)
    };
    match value_of("--config", "BRIGADE_CONFIG") {
        Some(path) => (path, true),
        None => {
            let state = StateArgs { state_dir: value_of("--state-dir", "BRIGADE_STATE_DIR") };
            (state.dir().join("config.toml"), false)
        }
    }
}

/// What follows `flag`, or `flag=`. Behind `--` there are no flags.
fn flag_value(args: &[OsString], flag: &str) -> Option<OsString> {
    let joined = format!("{flag}=");
    let mut flags = args.iter().take_while(|arg| *arg != "--");
    while let Some(arg) = flags.next() {
        if arg == flag {
            return flags.next().cloned();
        }
        if let Some(value) = arg.to_str().and_then(|arg| arg.strip_prefix(&joined)) {
            return Some(value.into());
        }
    }
    None
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
    Settings::from_toml(path, &files::read_text(path, MAX_CONFIG_BYTES)?)
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
            verb.get_arguments().filter_map(|arg| arg.get_long().map(str::to_owned)).collect()
        };
        let verbs: BTreeMap<String, Vec<String>> =
            command.get_subcommands().map(|verb| (verb.get_name().to_owned(), long_flags(verb))).collect();
        if let Some(key) = self.all.keys().find(|key| !verbs.values().flatten().any(|flag| flag == *key)) {
            return Err(format!("{here}: there is no setting {key:?}"));
        }
        // It would hold for some verbs alone, and who wrote it may well have meant another.
        for verb in command.get_subcommands() {
            let Some(key) =
                verb.get_positionals().map(|arg| arg.get_id().as_str()).find(|id| self.all.contains_key(*id))
            else {
                continue;
            };
            let has_flag = |(_, flags): &(&String, &Vec<String>)| flags.iter().any(|flag| flag == key);
            let tables: Vec<_> = verbs.iter().filter(has_flag).map(|(name, _)| format!("[{name}]")).collect();
            return Err(format!(
                "{here}: {key:?} at the top is ambiguous, since `brigade {}` takes it as an argument; put it under {}",
                verb.get_name(),
                tables.join(" or "),
            ));
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

    fn resolve(toml: &str, args: &[&str]) -> Result<Cli, String> {
        let settings = Settings::from_toml(Path::new("c.toml"), toml)?;
        let command = settings.apply(Cli::command())?;
        let matches = command.try_get_matches_from(args).map_err(|error| error.to_string())?;
        resolved(&matches, &settings).map_err(|error| error.to_string())
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
    fn settings_of_failures_are_flags_variables_and_keys_as_all_others() {
        let args =
            serve("redundancy = 2\n[serve]\nshadow = true\nwait-for-capacity = '2m'", &["--drain-timeout", "0s"]);
        assert_eq!((args.redundancy, args.shadow), (2, true));
        assert_eq!((args.wait_for_capacity.as_secs(), args.drain_timeout.as_secs()), (120, 0));
        let args = serve("", &[]);
        assert_eq!((args.redundancy, args.shadow), (1, false));
        assert_eq!((args.wait_for_capacity.as_secs(), args.drain_timeout.as_secs()), (30, 30));
        assert!(resolve("redundancy = 3", &["brigade", "serve"]).is_err());
        let Verb::Join(join) = resolve("", &["brigade", "join"]).unwrap().verb else { panic!() };
        assert_eq!((join.port, join.drain_timeout.as_secs()), (None, 30));
        let Verb::Join(join) = resolve("[join]\nport = 0", &["brigade", "join"]).unwrap().verb else { panic!() };
        assert_eq!(join.port, Some(0));
    }

    #[test]
    fn a_key_that_only_some_verbs_have_as_a_flag_stands_in_their_tables() {
        let error = resolve("model = 'm.gguf'", &["brigade", "join"]).unwrap_err();
        assert!(error.contains("put it under [bench] or [join]"), "{error}");
        assert!(resolve("[join]\nmodel = 'm.gguf'", &["brigade", "join"]).is_ok());
    }

    #[test]
    fn how_long_a_ticket_lives_is_set_before_or_behind_create() {
        let ttl =
            |toml: &str, args: &[&str]| match resolve(toml, &[&["brigade", "ticket"], args].concat()).unwrap().verb {
                Verb::Ticket(args) => args.ticket_ttl.as_secs(),
                _ => panic!(),
            };
        assert_eq!(ttl("", &[]), 3600);
        for args in [&["--ticket-ttl", "2h"][..], &["--ticket-ttl", "2h", "create"], &["create", "--ticket-ttl", "2h"]]
        {
            assert_eq!(ttl("ticket-ttl = '3h'", args), 7200);
        }
        assert_eq!((ttl("ticket-ttl = '3h'", &[]), ttl("ticket-ttl = '3h'", &["create"])), (10800, 10800));
    }

    #[test]
    fn an_adapter_may_have_a_comma_in_its_name() {
        let paths = |toml: &str, args: &[&str]| -> Vec<String> {
            serve(toml, args).lora.iter().map(|lora| lora.path.display().to_string()).collect()
        };
        assert_eq!(paths("", &["--lora", "a,b.gguf", "--lora", "c.gguf:0.5"]), ["a,b.gguf", "c.gguf"]);
        assert_eq!(paths("lora = ['a,b.gguf', 'c.gguf']", &[]), ["a,b.gguf", "c.gguf"]);
        assert_eq!(paths("lora = 'a,b.gguf'", &[]), ["a,b.gguf"]);
        let is_parted = |args: &[&str], value: Option<&str>| {
            let args: Vec<OsString> = args.iter().map(OsString::from).collect();
            let variable = |_: &std::ffi::OsStr| value.map(OsString::from);
            let command = with_lists_in_variables(Cli::command(), &args, &variable);
            let verb = command.find_subcommand("serve").unwrap();
            let delimiter =
                |id: &str| verb.get_arguments().find(|arg| arg.get_id() == id).unwrap().get_value_delimiter();
            assert_eq!(delimiter("host_name"), Some(','));
            delimiter("lora").is_some()
        };
        assert!(is_parted(&["brigade", "serve"], Some("a,b")));
        assert!(!is_parted(&["brigade", "serve"], None));
        assert!(!is_parted(&["brigade", "serve", "--lora", "a,b"], Some("c,d")), "the flag wins over the variable");
    }

    /// A key may have commas: in its variable and in the file each text is one key.
    #[test]
    fn a_key_is_parted_nowhere() {
        assert_eq!(serve("api-key = ['a,b', 'c']", &[]).http.api_key, ["a,b", "c"]);
        let command = with_lists_in_variables(Cli::command(), &[], &|_| Some("a,b".into()));
        let verb = command.find_subcommand("serve").unwrap();
        let arg = verb.get_arguments().find(|arg| arg.get_id() == "api_key").unwrap();
        assert_eq!(arg.get_value_delimiter(), None);
    }

    #[test]
    fn what_is_set_for_all_verbs_ends_no_worker() {
        let join = |toml: &str, args: &[&str]| match resolve(toml, &[&["brigade", "join"], args].concat()).unwrap().verb
        {
            Verb::Join(join) => (join.lora.len(), join.direct_fetch),
            _ => panic!(),
        };
        let for_all = "lora = ['a.gguf', 'b.gguf']\ndirect-fetch = 'on'";
        assert_eq!(join(for_all, &[]), (0, DirectFetch::Auto));
        assert_eq!(serve(for_all, &[]).lora.len(), 2);
        assert_eq!(join(for_all, &["--model", "m.gguf"]), (2, DirectFetch::Auto), "they are its own copy's then");
        assert_eq!(join("direct-fetch = 'off'", &[]), (0, DirectFetch::Off));
        // What was meant for it is there, to be refused.
        assert_eq!(join(for_all, &["--lora", "c.gguf", "--direct-fetch", "on"]), (1, DirectFetch::On));
        assert_eq!(join("[join]\nlora = 'a.gguf'\ndirect-fetch = 'on'", &[]), (1, DirectFetch::On));
    }

    #[test]
    fn flags_end_at_two_dashes() {
        let value = |args: &[&str]| flag_value(&args.iter().map(OsString::from).collect::<Vec<_>>(), "--config");
        assert_eq!(value(&["brigade", "--config", "a", "serve"]), Some("a".into()));
        assert_eq!(value(&["brigade", "serve", "--config=a"]), Some("a".into()));
        assert_eq!(value(&["brigade", "chat", "--", "--config", "a"]), None);
        assert_eq!(value(&["brigade", "chat", "--config"]), None);
    }

    #[test]
    fn what_is_not_known_is_named() {
        assert!(resolve("paralel = 2", &["brigade", "serve"]).unwrap_err().contains("paralel"));
        assert!(resolve("[srve]\nport = 2", &["brigade", "serve"]).unwrap_err().contains("srve"));
        assert!(resolve("[chat]\nport = 2", &["brigade", "serve"]).unwrap_err().contains("port"));
        assert!(resolve("port = 70000", &["brigade", "serve"]).is_err());
        assert!(resolve("port = {}", &["brigade", "serve"]).is_err());
    }
}
