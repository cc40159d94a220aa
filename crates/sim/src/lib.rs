//! A seeded simulator of whole clusters.
//!
//! The code that decides (`protocol::cluster`, `worker`, `schedule`, `council`) is the real one, and so are the bytes
//! of messages and frames. What carries it is made up: time, clocks, links, disks, kernels and callers. Everything
//! follows from one number, the seed, so that whatever goes wrong goes wrong again.
//!
//! - [`scenario`]: what a seed decides beforehand; [`world`]: what happens, and what must be true at the end.
//! - [`network`], [`host`]: machines and links. [`model`], [`stage`]: numbers that betray every wrong token.
//! - [`process`], [`coordinator`], [`ring`], [`worker`], [`gateway`]: what the crate `node` does around the state
//!   machines, as thinly as possible; each file names its model.
//! - [`truth`]: what no node knows, and the checks at every step.

use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

pub mod coordinator;
pub mod gateway;
pub mod host;
pub mod model;
pub mod network;
pub mod process;
pub mod random;
pub mod ring;
pub mod scenario;
pub mod stage;
pub mod truth;
pub mod worker;
pub mod world;

pub use world::{Report, World};

/// Runs a seed.
///
/// # Errors
/// With what was not as it must be, and how to see it again.
pub fn simulate(seed: u64) -> Result<Report, String> {
    catch_unwind(AssertUnwindSafe(|| World::new(seed, false).run())).map_err(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        let text = text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
        let text = text.unwrap_or_else(|| "it panicked".to_owned());
        format!("seed {seed}: {text}\nsee it again: cargo run --release -p brigade-sim -- --seed {seed} --loud")
    })
}

/// Runs seeds on several threads. `heed` hears what came of each, and says whether to go on.
pub fn simulate_many(seeds: Range<u64>, n_threads: usize, heed: impl Fn(Result<Report, String>) -> bool + Sync) {
    let (next, is_over) = (AtomicU64::new(seeds.start), AtomicBool::new(false));
    let work = || {
        while !is_over.load(Ordering::Relaxed) {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if !seeds.contains(&seed) || !heed(simulate(seed)) {
                return is_over.store(true, Ordering::Relaxed);
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..n_threads.max(1) {
            scope.spawn(work);
        }
    });
}
