//! `brigade pull`: a model from the hub or the web to this machine's disk. Of one that is here, all parts must be.

use std::path::{Path, PathBuf};

use brigade_gguf::ModelFile;
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
    /// @REVISION where it is not main, or https://…; a file here is only looked at
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
    path: &'a Path,
    bytes: Option<u64>,
    sha256: Vec<Option<String>>,
}

/// Fetches the model, and prints where it is.
pub fn run(args: &PullArgs) -> Result<(), Failure> {
    let source = sources::parse(&args.source)?;
    if let ModelSource::Local(path) = &source {
        return check(path, args.json);
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

/// Prints where a model is that is here already.
fn check(path: &Path, json: bool) -> Result<(), Failure> {
    let files = ModelFile::open(path).and_then(|file| {
        file.file_metadata().map_err(|source| brigade_gguf::OpenError::Io { path: path.to_owned(), source })
    });
    let bytes = files.map_err(Failure::run)?.iter().map(std::fs::Metadata::len).sum();
    if !json {
        return output::line(path.display());
    }
    output::json(&Report { source: path.display().to_string(), path, bytes: Some(bytes), sha256: Vec::new() })
}
