//! A stage whose layers keep a state: its slots go on or begin anew.

use std::sync::atomic::{AtomicBool, Ordering};

use super::*;
use crate::test_stage::{compute, loaded_with_state, rows, set};

fn run(runner: &mut PassRunner, sets: &[RowSet]) -> Result<Vec<f32>, PassError> {
    let (mut hidden, mut out) = (rows(sets, runner.stage().n_embd()), Vec::new());
    runner.run(sets, &mut hidden, &mut out).map(|()| out)
}

fn held(runner: &mut PassRunner) -> (u64, Vec<u32>) {
    let Held { applied, tokens } = runner.rest().unwrap();
    (applied.0, tokens[..3].to_vec())
}

#[test]
fn a_slot_goes_on_or_begins_anew() {
    let mut stage = loaded_with_state(Images::off());
    let runner = &mut stage.runner;
    let first = compute(runner, &[set(0, 0, 5), set(1, 0, 3)]);
    compute(runner, &[set(0, 5, 1), set(1, 3, 1)]);
    let waves = compute(runner, &[set(0, 6, 1), set(1, 0, 3), set(0, 7, 1)]);
    let n_embd = runner.stage().n_embd() as usize;
    assert_eq!(first[5 * n_embd..], waves[n_embd..4 * n_embd], "slot 1 begins anew");
    assert_eq!([0, 1].map(|slot| runner.stage().len(slot)), [8, 3]);
}

#[test]
fn a_pass_that_goes_back_is_refused_and_its_slot_is_lost() {
    let mut stage = loaded_with_state(Images::off());
    let runner = &mut stage.runner;
    compute(runner, &[set(0, 0, 5), set(1, 0, 3)]);
    runner.note_applied(PassId(1));
    let error = run(runner, &[set(0, 3, 2)]).unwrap_err();
    assert!(matches!(error, PassError::Backward { slot: 0, keep: 3, held: 5 }), "{error}");
    assert_eq!(held(runner), (1, vec![0, 3, 0]), "the next ring does not count on it");
    let copy = KvStep::Copy { slot: 2, from: 1, n_tokens: 3 };
    assert!(matches!(runner.apply(&mut [(copy, false)]), Err(PassError::Kv(_))));
}

/// A pass that is not noted as applied cannot be taken back, so what it has touched is lost.
#[test]
fn at_rest_a_stage_holds_only_what_no_unfinished_pass_has_changed() {
    let mut stage = loaded_with_state(Images::off());
    let runner = &mut stage.runner;
    compute(runner, &[set(0, 0, 5), set(1, 0, 3)]);
    runner.note_applied(PassId(4));
    compute(runner, &[set(0, 5, 1)]);
    assert_eq!(held(runner), (4, vec![0, 3, 0]));
    assert_eq!(runner.stage().len(0), 0);
    compute(runner, &[set(0, 0, 2), set(1, 3, 1)]);
    runner.note_applied(PassId(5));
    assert_eq!(held(runner), (5, vec![2, 4, 0]));
}

#[test]
fn a_run_that_fails_leaves_nothing_that_counts() {
    let mut stage = loaded_with_state(Images::off());
    let runner = &mut stage.runner;
    compute(runner, &[set(0, 0, 5), set(1, 0, 3)]);
    runner.note_applied(PassId(4));
    let canceller = runner.stage().canceller();
    let is_done = AtomicBool::new(false);
    let error = std::thread::scope(|scope| {
        scope.spawn(|| {
            while !is_done.load(Ordering::Relaxed) {
                canceller.cancel();
            }
        });
        // A run that was quicker than the canceller is tried again.
        let error = loop {
            if let Err(error) = run(runner, &[set(2, 0, 30)]) {
                break error;
            }
        };
        is_done.store(true, Ordering::Relaxed);
        error
    });
    assert!(matches!(error, PassError::Run(RunError::Cancelled)), "{error}");
    assert_eq!(held(runner), (4, vec![0, 0, 0]));
}

#[test]
fn a_standby_loses_slots_that_would_go_back() {
    let mut stage = loaded_with_state(Images::off());
    let runner = &mut stage.runner;
    runner.stand_by(PassId(0));
    let mut follow = |pass: u64, sets: &[RowSet]| {
        let (mut sets, mut out) = (sets.to_vec(), Vec::new());
        let mut hidden = rows(&sets, runner.stage().n_embd());
        runner.run_fitting(&mut sets, &mut hidden, &mut out).unwrap();
        runner.note_applied(PassId(pass));
        held(runner)
    };
    assert_eq!(follow(1, &[set(0, 0, 5), set(1, 0, 3)]), (1, vec![5, 3, 0]));
    assert_eq!(follow(2, &[set(0, 4, 1), set(1, 3, 1)]), (2, vec![0, 4, 0]));
    assert_eq!(follow(3, &[set(0, 0, 4), set(0, 4, 1)]), (3, vec![5, 4, 0]));
}
