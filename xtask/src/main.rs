//! Development tasks: `cargo xtask TASK`.
//!
//! - [`tidy`] checks what the compiler does not: crate arrows, form of files, commands in documents. It is also a test.
//! - [`synth`] writes models of real shapes with random weights.
//! - [`demo`] shows a model on three nodes, and proves its answers.
//! - [`bench`] measures. It and the demo run real `brigade` processes through [`cluster`] and [`processes`], and
//!   compare them with [`whole`], the same model in one process.
//! - [`guide`] writes what typical homes get from a cluster, by the planner; it is also a test.
//! - [`certify`] makes tiny models of each architecture and tells which can be cut, and how exactly.
//! - [`chaos`] kills, freezes and cuts off nodes under load, and compares every answer with the undisturbed one.

mod bench;
mod certify;
mod chaos;
mod cluster;
mod demo;
mod failure;
mod guide;
mod http;
mod output;
mod processes;
mod random;
mod shaper;
mod synth;
mod tidy;
mod whole;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Development tasks of Brigade.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", disable_help_subcommand = true)]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    /// Check crate arrows, the form of files, and the commands that documents name
    Tidy,
    /// Write a model of a real shape with random weights
    Synth(synth::SynthArgs),
    /// Split the embedded model over three processes, ask it, and compare with one process
    Demo,
    /// Measure
    #[command(subcommand)]
    Bench(bench::Bench),
    /// Write docs/should-i-cluster.md from the planner, or check it
    Guide(guide::GuideArgs),
    /// Make tiny models of each architecture, and run them whole and cut
    Certify(certify::CertifyArgs),
    /// Break nodes and links at random under load, and compare every answer with the undisturbed one
    Chaos(chaos::ChaosArgs),
}

/// The repository.
fn root() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().unwrap_or(here).to_owned()
}

fn main() -> ExitCode {
    let result = match Cli::parse().task {
        Task::Tidy => tidy::run(&root()),
        Task::Synth(args) => synth::run(&args),
        Task::Demo => demo::run(),
        Task::Bench(bench) => bench::run(&bench),
        Task::Guide(args) => guide::run(&root(), &args),
        Task::Certify(args) => certify::run(&args),
        Task::Chaos(args) => chaos::run(&args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) if failure.is_broken_pipe() => ExitCode::SUCCESS,
        Err(failure) => {
            output::error(&format!("xtask: {failure}"));
            ExitCode::FAILURE
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_sound() {
        Cli::command().debug_assert();
    }
}
