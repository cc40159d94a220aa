//! Opening a model file, with a bar while it is hashed.

use std::path::Path;
use std::sync::{Mutex, PoisonError};

use brigade_node::{LocalModel, ModelError};
use brigade_store::Opened;

use crate::progress::Bars;

/// Opens a model that may have been pulled, so that workers can have it from where it came from.
///
/// # Errors
/// As [`open`].
pub fn open_pulled(pulled: &Opened, state_dir: &Path) -> Result<LocalModel, ModelError> {
    let model = open(&pulled.path, state_dir)?;
    Ok(match pulled.location.clone() {
        Some(location) => model.downloaded_from(location),
        None => model,
    })
}

/// Opens the model; its hashes are kept in `state_dir`.
///
/// # Errors
/// If the file is no model that can be served.
pub fn open(path: &Path, state_dir: &Path) -> Result<LocalModel, ModelError> {
    brigade_engine::init();
    let bars = Mutex::new(Bars::new());
    let hashing = |done: u64, total: u64| {
        let share = if total == 0 { 1.0 } else { done as f32 / total as f32 };
        bars.lock().unwrap_or_else(PoisonError::into_inner).set("hashing weights", share);
    };
    let model = LocalModel::open(path, state_dir, &hashing);
    bars.lock().unwrap_or_else(PoisonError::into_inner).clear();
    model
}
