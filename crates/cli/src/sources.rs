//! Models that verbs are given: a file here, a repository of the hub, or an address; fetched if need be, with a bar.
//!
//! [`open`] yields a path for verbs that need all of a model, [`look`] the header for those that need no more. What is
//! done on the way is said on standard error.

use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use brigade_base::ByteSize;
use brigade_gguf::Catalog;
use brigade_store::{Client, Event, ModelSource, Opened, Settings, Store, StoreError};
use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};

use crate::args::StateArgs;
use crate::error::Failure;
use crate::output;

/// Shorter pauses are not worth a line.
const LONG_PAUSE: Duration = Duration::from_secs(1);

/// Where models from elsewhere are kept, and whether servers may be asked.
#[derive(Debug, Clone, Args)]
pub struct SourceArgs {
    /// Where models from the hub and the web are kept; several nodes may share it
    /// [default: models in the state directory]
    #[arg(long, value_name = "DIR", env = "BRIGADE_MODELS_DIR")]
    pub models_dir: Option<PathBuf>,
    /// Ask no server: use models that are here; HF_HUB_OFFLINE=1 means the same
    #[arg(long, env = "BRIGADE_OFFLINE")]
    pub offline: bool,
}

impl SourceArgs {
    /// The models directory.
    ///
    /// # Errors
    /// If the environment names no sensible hub, or a token that is none.
    pub fn store(&self, state: &StateArgs) -> Result<Store, Failure> {
        let settings = Settings::from_environment(self.offline).map_err(Failure::usage)?;
        let dir = self.models_dir.clone().unwrap_or_else(|| state.dir().join("models"));
        Ok(Store::new(dir, Client::new(settings)))
    }

    /// The models directory, to take `source` from it. For a file here nobody is asked, so no token need be sound.
    fn store_for(&self, source: &ModelSource, state: &StateArgs) -> Result<Store, Failure> {
        let is_local = matches!(source, ModelSource::Local(_));
        Self { offline: self.offline || is_local, ..self.clone() }.store(state)
    }
}

/// What a command line names.
///
/// # Errors
/// If it begins like a repository or an address, and is none.
pub fn parse(model: &Path) -> Result<ModelSource, Failure> {
    ModelSource::of(model).map_err(Failure::usage)
}

/// The model as a file here, fetched if it is not. Nobody prunes it while the result is held, also where it was named
/// by its path in a models directory.
///
/// # Errors
/// If it cannot be had.
pub fn open(model: &Path, args: &SourceArgs, state: &StateArgs) -> Result<Opened, Failure> {
    let source = parse(model)?;
    let teller = Teller::default();
    let opened = args.store_for(&source, state)?.open(&source, &|event| teller.hear(event));
    teller.end();
    Ok(opened?)
}

/// Name and header of the model; of one that is not here no more is read.
///
/// # Errors
/// If it cannot be had, or is unsound.
pub fn look(model: &Path, args: &SourceArgs, state: &StateArgs) -> Result<(String, Catalog), Failure> {
    let source = parse(model)?;
    let teller = Teller::default();
    let found = args.store_for(&source, state)?.look(&source, &|event| teller.hear(event));
    teller.end();
    Ok(found?)
}

impl From<StoreError> for Failure {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::Source(error) => Self::usage(error),
            error => Self::run(error),
        }
    }
}

/// Tells a person what becomes of a model: by a bar in a terminal, by lines elsewhere.
#[derive(Default)]
struct Teller(Mutex<Told>);

#[derive(Default)]
struct Told {
    bar: Option<ProgressBar>,
    is_waiting: bool,
}

impl Teller {
    fn hear(&self, event: Event) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).hear(event);
    }

    fn end(&self) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }
}

impl Told {
    fn hear(&mut self, event: Event) {
        match event {
            Event::Fetching { name, n_files, n_bytes, n_done } => {
                let files = if n_files == 1 { String::new() } else { format!(" in {n_files} files") };
                let size = n_bytes.map_or_else(|| "of unknown size".to_owned(), |n| ByteSize(n).to_string());
                let here = if n_done == 0 { String::new() } else { format!(", {} are here", ByteSize(n_done)) };
                self.line(&format!("pulling {name} ({size}{files}{here})"));
                self.show(&name, n_done, n_bytes);
            }
            Event::Waiting { name, n_done, n_bytes } => {
                if !self.is_waiting {
                    self.is_waiting = true;
                    self.line(&format!("another process pulls {name}; waiting for it"));
                }
                self.show(&name, n_done, n_bytes);
            }
            Event::Moved { n_done, .. } => {
                if let Some(bar) = &self.bar {
                    bar.set_position(n_done);
                }
            }
            Event::Retrying { why, pause } if pause >= LONG_PAUSE => {
                self.line(&format!("{why}; asking again in {} s", pause.as_secs()));
            }
            Event::Retrying { why, .. } => tracing::info!(why, "asking again"),
            Event::Fallback { why } => self.line(&format!("{why}; going on with what is here")),
            Event::Ready { name, is_new } => {
                self.clear();
                if is_new {
                    self.line(&format!("pulled {name}"));
                }
            }
        }
    }

    fn show(&mut self, name: &str, n_done: u64, n_bytes: Option<u64>) {
        let bar = self.bar.get_or_insert_with(|| {
            let (bar, template) = match n_bytes {
                Some(n) => (ProgressBar::new(n), "{msg:30!} [{bar:30}] {bytes}/{total_bytes} {bytes_per_sec} {eta}"),
                None => (ProgressBar::no_length(), "{msg:30!} {bytes} {bytes_per_sec}"),
            };
            bar.set_style(ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar()));
            bar.set_message(name.to_owned());
            // What is here already says nothing of the speed.
            bar.set_position(n_done);
            bar.reset_eta();
            bar
        });
        bar.set_position(n_done);
    }

    fn line(&self, text: &str) {
        match &self.bar {
            Some(bar) => bar.suspend(|| output::error(text)),
            None => output::error(text),
        }
    }

    fn clear(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }
}
