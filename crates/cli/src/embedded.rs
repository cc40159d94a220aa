//! The model inside this program, for those who want to see it run before they fetch a large one.

use std::path::{Path, PathBuf};

use crate::error::Failure;

/// Abacus in F16: see `models/README.md`.
const ABACUS: &[u8] = include_bytes!("../../../models/abacus-f16.gguf");

/// Name of the file that it becomes, and so of the model.
const NAME: &str = "abacus.gguf";

/// Puts the model into the state directory, unless it is there, and says where.
pub fn abacus(state_dir: &Path) -> Result<PathBuf, Failure> {
    let dir = state_dir.join("models");
    let path = dir.join(NAME);
    if std::fs::read(&path).is_ok_and(|bytes| bytes == ABACUS) {
        return Ok(path);
    }
    let failed = |error: std::io::Error| Failure::run(format!("{} cannot be written: {error}", path.display()));
    std::fs::create_dir_all(&dir).map_err(failed)?;
    brigade_net::write_atomic(&path, ABACUS, 0o644).map_err(failed)?;
    Ok(path)
}
