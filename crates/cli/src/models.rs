//! `brigade models`: what was pulled, and removing what is not needed.

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use brigade_base::ByteSize;
use brigade_store::{Listed, Outcome, Prune};
use clap::{Args, Subcommand};
use serde::Serialize;

use crate::args::StateArgs;
use crate::error::Failure;
use crate::output;
use crate::sources::SourceArgs;

/// `brigade models`
#[derive(Debug, Args)]
pub struct ModelsArgs {
    /// State directory, in which models are kept unless told otherwise [default: ~/.local/state/brigade]
    #[arg(long, global = true, value_name = "DIR", env = "BRIGADE_STATE_DIR")]
    pub state_dir: Option<PathBuf>,
    /// Where models are kept [default: models in the state directory]
    #[arg(long, global = true, value_name = "DIR", env = "BRIGADE_MODELS_DIR")]
    pub models_dir: Option<PathBuf>,
    /// Print JSON
    #[arg(long, global = true, env = "BRIGADE_JSON")]
    pub json: bool,
    /// What to do [default: list them]
    #[command(subcommand)]
    pub action: Option<ModelsAction>,
}

/// What to do with models.
#[derive(Debug, Subcommand)]
pub enum ModelsAction {
    /// Remove models; without names and conditions those that are not complete. What is in use stays
    Prune(PruneArgs),
}

/// `brigade models prune`
#[derive(Debug, Args)]
pub struct PruneArgs {
    /// Only these: by name, folder or source
    #[arg(value_name = "NAME")]
    pub names: Vec<String>,
    /// Those that were not used for so long, for example 30d
    #[arg(long, value_name = "TIME", env = "BRIGADE_OLDER_THAN", value_parser = humantime::parse_duration)]
    pub older_than: Option<Duration>,
    /// Those used longest ago, until the others have so many bytes at most, for example 50GB
    #[arg(long, value_name = "SIZE", env = "BRIGADE_KEEP_BYTES")]
    pub keep_bytes: Option<ByteSize>,
    /// Remove nothing, and say what would be removed
    #[arg(long, env = "BRIGADE_DRY_RUN")]
    pub dry_run: bool,
}

#[derive(Serialize)]
struct Report {
    dir: PathBuf,
    models: Vec<Listed>,
    /// What workers of this state directory have fetched of models.
    tensors: Tensors,
}

#[derive(Serialize)]
struct Tensors {
    dir: PathBuf,
    files: u64,
    bytes: u64,
}

/// Lists or removes.
pub fn run(args: &ModelsArgs) -> Result<(), Failure> {
    let state = StateArgs { state_dir: args.state_dir.clone() };
    let sources = SourceArgs { models_dir: args.models_dir.clone(), offline: true };
    let store = sources.store(&state)?;
    match &args.action {
        Some(ModelsAction::Prune(prune)) => {
            let pruned = store.prune(&Prune {
                names: prune.names.clone(),
                older_than_s: prune.older_than.map(|time| time.as_secs()),
                keep_bytes: prune.keep_bytes.map(|size| size.0),
                is_dry_run: prune.dry_run,
            })?;
            if args.json {
                return output::json(&pruned);
            }
            if pruned.is_empty() {
                return output::line("nothing to remove");
            }
            pruned.iter().try_for_each(|model| {
                let outcome = match model.outcome {
                    Outcome::Removed => "removed",
                    Outcome::WouldBeRemoved => "would remove",
                    Outcome::InUse => "in use, stays:",
                };
                output::line(format_args!("{outcome} {} ({})", model.id, ByteSize(model.bytes)))
            })
        }
        None => {
            let (dir, models) = (store.dir().to_owned(), store.list()?);
            let report = Report { dir, models, tensors: tensors(&state.dir().join("cache")) };
            if args.json { output::json(&report) } else { print(&report) }
        }
    }
}

/// What is in a node's cache of fetched weights.
fn tensors(dir: &Path) -> Tensors {
    let lengths = std::fs::read_dir(dir).into_iter().flatten().flatten().filter_map(|file| file.metadata().ok());
    let (files, bytes) = lengths.fold((0, 0), |(files, bytes), meta| (files + 1, bytes + meta.len()));
    Tensors { dir: dir.to_owned(), files, bytes }
}

fn print(report: &Report) -> Result<(), Failure> {
    if report.models.is_empty() {
        output::line(format_args!("no models in {}; `brigade pull` fetches them", report.dir.display()))?;
    } else {
        let width = report.models.iter().map(|model| model.name.len()).max().unwrap_or(0).max(4);
        output::line(format_args!(
            "{:<width$} {:>10} {:>5} {:<12} {:<16} FROM",
            "NAME", "SIZE", "FILES", "USED", "STATE"
        ))?;
        for model in &report.models {
            let size = ByteSize(model.bytes.unwrap_or(model.bytes_here)).to_string();
            let (used, state) = (ago(model.last_used), state(model));
            let line =
                format!("{:<width$} {size:>10} {:>5} {used:<12} {state:<16} {}", model.name, model.files, model.source);
            output::line(line.trim_end())?;
        }
        let n_bytes: u64 = report.models.iter().map(|model| model.bytes_here).sum();
        output::line(format_args!("{} in {}", ByteSize(n_bytes), report.dir.display()))?;
    }
    match &report.tensors {
        Tensors { files: 0, .. } => Ok(()),
        tensors => output::line(format_args!(
            "{} of weights fetched as a worker in {}, which --cache-size of `brigade join` limits",
            ByteSize(tensors.bytes),
            tensors.dir.display()
        )),
    }
}

fn state(model: &Listed) -> String {
    match (model.complete, model.in_use, model.bytes) {
        (true, true, _) => "in use".to_owned(),
        (true, false, _) => "complete".to_owned(),
        (false, true, Some(bytes)) => format!("{} %, coming", percent(model.bytes_here, bytes)),
        (false, false, Some(bytes)) => format!("{} %", percent(model.bytes_here, bytes)),
        (false, true, None) => "coming".to_owned(),
        (false, false, None) => "not complete".to_owned(),
    }
}

/// Rounded down, so that what is not complete does not say so.
fn percent(part: u64, whole: u64) -> u64 {
    (u128::from(part) * 100 / u128::from(whole.max(1))) as u64
}

/// How long ago that was, in its largest unit.
fn ago(seconds: u64) -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    match now.saturating_sub(seconds) {
        _ if seconds == 0 => "unknown".to_owned(),
        s if s < 60 => "now".to_owned(),
        s if s < 3600 => format!("{} min ago", s / 60),
        s if s < 2 * 86_400 => format!("{} h ago", s / 3600),
        s => format!("{} days ago", s / 86_400),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_rounded_down() {
        assert_eq!((percent(999, 1000), percent(0, 0), percent(u64::MAX, u64::MAX)), (99, 0, 100));
    }
}
