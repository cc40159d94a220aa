//! The `brigade` command: arguments in, one verb run, an exit code out.
//!
//! Each verb is a module with one `run`; what they have in common is in [`args`], [`config`], [`endpoint`] and
//! [`ending`]. A verb that fails says so in one line on standard error; a reader that closes our output early is no
//! failure.

mod args;
mod bench;
mod certify;
mod chat;
mod config;
mod doctor;
mod embedded;
mod ending;
mod endpoint;
mod error;
mod files;
mod http;
mod inspect;
mod join;
mod leave;
mod model;
mod models;
mod node_note;
mod output;
mod plan;
mod profile;
mod progress;
mod pull;
mod running;
mod serve;
mod sources;
mod status;
mod ticket;
mod values;

use std::path::PathBuf;
use std::process::ExitCode;

use args::Verb;
use brigade_node::trial;
use error::Failure;

fn main() -> ExitCode {
    // Before anything else, since it wants no thread beside this one.
    brigade_engine::return_large_blocks();
    // No verb for people: how this program tries a model before it loads it.
    if std::env::args_os().nth(1).is_some_and(|argument| argument == trial::ARGUMENT) {
        return trial::answer();
    }
    trial::enable(own_program());
    let args = match config::parse(std::env::args_os()) {
        Ok(args) => args,
        Err(config::ParseError::Usage(error)) => error.exit(),
        Err(config::ParseError::Config(error)) => return fail(&Failure::usage(error)),
    };
    start_log(args.verbose);
    let result = match args.verb {
        Verb::Serve(args) => serve::run(&args),
        Verb::Join(args) => join::run(&args),
        Verb::Leave(args) => leave::run(&args),
        Verb::Chat(args) => chat::run(&args),
        Verb::Status(args) => status::run(&args),
        Verb::Pull(args) => pull::run(&args),
        Verb::Models(args) => models::run(&args),
        Verb::Inspect(args) => inspect::run(&args),
        Verb::Certify(args) => certify::run(&args),
        Verb::Plan(args) => plan::run(&args),
        Verb::Profile(args) => profile::run(&args),
        Verb::Ticket(args) => ticket::run(&args),
        Verb::Doctor(args) => doctor::run(&args),
        Verb::Bench(args) => bench::run(&args),
    };
    // Whoever reads the output may have gone while this node still measures itself.
    brigade_node::measure::end_all();
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) if failure.is_broken_pipe() => ExitCode::SUCCESS,
        Err(failure) => fail(&failure),
    }
}

/// This program, to be started again; on Linux also when its file has been replaced meanwhile.
fn own_program() -> PathBuf {
    let link = PathBuf::from("/proc/self/exe");
    if link.exists() { link } else { std::env::current_exe().unwrap_or_else(|_| PathBuf::from("brigade")) }
}

fn fail(failure: &Failure) -> ExitCode {
    // One line, whatever libraries put into their messages.
    let text = failure.to_string().lines().map(str::trim).filter(|line| !line.is_empty()).collect::<Vec<_>>().join(" ");
    output::error(&format!("brigade: {text}"));
    ExitCode::from(failure.exit_code())
}

/// Log lines go to standard error. `-v` shows what happens, `-vv` details; `BRIGADE_LOG` takes filters as `RUST_LOG`.
fn start_log(verbose: u8) {
    use tracing_subscriber::EnvFilter;
    let default = match verbose {
        0 => "error",
        1 => "info,llama=warn",
        2 => "debug,llama=info",
        _ => "trace",
    };
    let filter = EnvFilter::try_from_env("BRIGADE_LOG").unwrap_or_else(|_| EnvFilter::new(default));
    let colours = std::io::IsTerminal::is_terminal(&std::io::stderr());
    tracing_subscriber::fmt().with_env_filter(filter).with_ansi(colours).with_writer(std::io::stderr).init();
}
