//! `brigade pull`: a model from the hub or the web to this machine's disk.

use std::path::PathBuf;

use brigade_store::ModelSource;
use clap::Args;
use serde::Serialize;

use crate::args::StateArgs;
use crate::error::Failure;
use crate::output;
use crate::sources::{self, SourceArgs};

/// `brigade pull`
#[derive(Debug, Args)]
pub struct PullArgs {
    /// The model: hf:OWNER/REPOSITORY, with :FILE.gguf or :QUANTISATION behind it where there are several and
    /// @REVISION where it is not main, or https://…
    pub source: PathBuf,
    #[command(flatten)]
    pub sources: SourceArgs,
    #[command(flatten)]
    pub state: StateArgs,
    /// Print JSON
    #[arg(long, env = "BRIGADE_JSON")]
    pub json: bool,
}

#[derive(Serialize)]
struct Report<'a> {
    source: String,
    path: &'a PathBuf,
    bytes: Option<u64>,
    sha256: Vec<Option<String>>,
}

/// Fetches the model, and prints where it is.
pub fn run(args: &PullArgs) -> Result<(), Failure> {
    let source = sources::parse(&args.source)?;
    if let ModelSource::Local(path) = &source {
        let path = path.display();
        return Err(Failure::usage(format!(
            "{path} is a path on this machine, so there is nothing to pull; write hf:OWNER/REPOSITORY or https://…"
        )));
    }
    let opened = sources::open(&args.source, &args.sources, &args.state)?;
    if !args.json {
        return output::line(opened.path.display());
    }
    let location = opened.location.as_ref();
    output::json(&Report {
        source: source.to_string(),
        path: &opened.path,
        bytes: location.map(brigade_store::RemoteLocation::n_bytes),
        sha256: location.iter().flat_map(|location| &location.parts).map(|part| part.sha256.clone()).collect(),
    })
}
