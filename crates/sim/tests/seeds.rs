//! Thousands of clusters, each from one seed. A seed that fails says how to see it again.

use std::sync::{Mutex, PoisonError};

use brigade_sim::truth::{Counts, Outcome};
use brigade_sim::{Report, World, simulate_many};

/// Runs seeds on all processors; panics with one that fails.
fn check(seeds: std::ops::Range<u64>) -> Report {
    let n_threads = std::thread::available_parallelism().map_or(1, usize::from);
    let sums = Mutex::new((Report::default(), None));
    simulate_many(seeds, n_threads, |result| {
        let (report, failed) = &mut *sums.lock().unwrap_or_else(PoisonError::into_inner);
        match result {
            Ok(one) => report.add(&one),
            Err(why) => drop(failed.get_or_insert(why)),
        }
        failed.is_none()
    });
    match sums.into_inner().unwrap_or_else(PoisonError::into_inner) {
        (report, None) => report,
        (_, Some(why)) => panic!("{why}"),
    }
}

#[test]
fn whatever_goes_wrong_everybody_gets_the_undisturbed_answer() {
    let report = check(1..2001);
    // Seeds that try nothing prove nothing.
    let answered = report.outcomes[&Outcome::Answered];
    let all: u64 = report.outcomes.values().sum();
    assert!(answered * 10 > all * 7, "too few requests are answered: {:?}", report.outcomes);
    assert!(report.faults.len() == 8 && report.faults.values().all(|n| *n > 100), "{:?}", report.faults);
    let Counts { rings, kept, shadowed, handed_over, stuck, takeovers, resumed, .. } = report.counts;
    let counts = [rings, kept, shadowed, handed_over, stuck, takeovers, resumed];
    assert!(counts.iter().all(|n| *n > 100), "{:?}", report.counts);
}

#[test]
fn a_seed_gives_the_same_run_again() {
    for seed in 1..20 {
        let again = || World::new(seed, false).run();
        assert_eq!(again(), again(), "seed {seed}");
    }
}
