//! Asking the coordinator from a process beside the node: as a member, over a link of its own.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use brigade_net::{Identity, Link, Purpose};

use crate::gateway::ask_to_examine;
use crate::known::KnownCoordinator;
use crate::serving::Examination;

/// What came of asking a coordinator that was reached.
pub struct Asked {
    /// How long it took to be reached and to let this node in.
    pub took: Duration,
    /// What it said, or why it did not.
    pub examination: Result<Examination, String>,
}

/// Has the coordinator that this node has joined examine all nodes; `None` if there is none. Blocks for seconds.
///
/// # Errors
/// If it is not reached or refuses, in words for people.
pub fn ask_coordinator(state_dir: &Path) -> Option<Result<Asked, String>> {
    let known = KnownCoordinator::load(state_dir).ok()??;
    let ask = || -> Result<Asked, String> {
        let identity = Identity::load_or_create(state_dir).map_err(|error| error.to_string())?;
        let begin = Instant::now();
        let link = known.dial(&identity, Purpose::Requests, None).map_err(|error| error.to_string())?;
        let took = begin.elapsed();
        Ok(Asked { took, examination: ask_to_examine(Arc::clone(&link) as Arc<dyn Link>) })
    };
    Some(ask())
}
