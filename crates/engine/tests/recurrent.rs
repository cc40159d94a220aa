//! Models whose layers keep a state that each token changes for good.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

use std::sync::atomic::{AtomicBool, Ordering};

use brigade_engine::{Input, KvError, Row, RunError, Stage, StageOptions};
use brigade_gguf::Metadata;
use support::recurrent::{ALL, N_VOCAB, metadata, write};
use support::{decode, difference, feed, open, options, tokens};

fn load(arch: &str, change: impl FnOnce(&mut StageOptions)) -> Stage {
    let file = tempfile::NamedTempFile::new().unwrap();
    write(&metadata(arch, &Metadata::new()), file.path());
    let mut options = options();
    change(&mut options);
    // As stages are loaded, whose weights llama.cpp may put into other buffers than those of a file of its own.
    let (reader, n_bytes) = open(file.path());
    Stage::load(reader, n_bytes, options, &mut |_| true).unwrap()
}

#[test]
fn a_chunk_of_two_or_more_rows_has_the_same_bits_in_any_cut() {
    for arch in ALL {
        let mut stage = load(arch, |o| (o.n_sessions, o.max_rows) = (2, 300));
        let text = tokens(300, N_VOCAB, 1);
        let expected = feed(&mut stage, 0, &text);
        // Kernels that compute chunk by chunk have chunks of 16 and 64 rows.
        for cuts in [vec![2, 298], vec![7, 255, 2, 36], vec![150; 2], vec![3; 100], vec![16, 33, 251], vec![64, 236]] {
            stage.clear(1).unwrap();
            let mut rest = &text[..];
            let mut found = Vec::new();
            for &n in &cuts {
                found.extend(feed(&mut stage, 1, &rest[..n]));
                rest = &rest[n..];
            }
            assert!(rest.is_empty() && found == expected, "{arch}: {cuts:?}");
        }
    }
}

/// Batches that are one call of llama.cpp and batches that are several, each with slot 0.
const BATCHES: [&[u32]; 8] =
    [&[0, 1, 2, 3, 4, 5, 6], &[0, 1], &[2, 0, 3], &[0, 6, 5, 3, 2], &[0, 2, 4, 6], &[0], &[0, 4], &[0, 1, 2]];

#[test]
fn a_row_that_is_alone_in_its_slot_has_the_same_bits_in_any_batch() {
    // Projections of rwkv6 stay floats, whose products have another kernel for one row.
    for arch in ALL.into_iter().filter(|arch| *arch != "rwkv6") {
        // No multiple of the sessions.
        let mut stage = load(arch, |o| (o.n_sessions, o.max_rows) = (7, 100));
        let text = tokens(60, N_VOCAB, 2);
        feed(&mut stage, 0, &text[..40]);
        let lone: Vec<_> = BATCHES.iter().map(|_| decode(&mut stage, &[0], &text).unwrap()).collect();
        // States of lengths that differ, in cells that were used before.
        for slot in 0..7 {
            stage.clear(slot).unwrap();
            feed(&mut stage, slot, &text[..40 - 2 * slot as usize]);
        }
        for (batch, lone) in BATCHES.iter().zip(&lone) {
            let out = decode(&mut stage, batch, &text).unwrap();
            let at = batch.iter().position(|slot| *slot == 0).unwrap();
            let row = &out[at * lone.len()..(at + 1) * lone.len()];
            assert!(row == lone, "{arch}: {batch:?} differs by {}", difference(row, lone));
        }
    }
}

#[test]
fn a_slot_goes_on_or_begins_anew_and_nothing_else() {
    for arch in ALL {
        let mut stage = load(arch, |o| o.n_sessions = 2);
        let text = tokens(30, N_VOCAB, 3);
        let expected = feed(&mut stage, 0, &text);
        let n_keep = 12;
        assert_eq!(stage.truncate(0, n_keep), Err(KvError::NotReversible { slot: 0, n_keep }), "{arch}");
        assert_eq!(stage.copy(0, 1, 30), Err(KvError::NotReversible { slot: 1, n_keep: 30 }), "{arch}");
        assert!(!stage.can_save() && stage.len(0) == 30 && stage.len(1) == 0);
        stage.truncate(0, 30).unwrap();
        stage.clear(0).unwrap();
        assert!(feed(&mut stage, 0, &text) == expected, "{arch}: something was left of it");
    }
}

/// Where states are is changed while a call computes, also of sessions that are not in it.
#[test]
fn a_run_that_is_cut_off_empties_all_slots() {
    let mut stage = load("jamba", |o| o.n_sessions = 3);
    let text = tokens(40, N_VOCAB, 4);
    let fill = |stage: &mut Stage| [2, 0, 1].map(|slot| feed(stage, slot, &text[..20]));
    let expected = fill(&mut stage);
    let mut out = Vec::new();
    let row = |slot, position| Row { slot, position, output: true };
    let refused = stage.run(&[row(0, 20), row(1, 21)], Input::Tokens(&[1, 2]), &mut out);
    assert!(matches!(refused, Err(RunError::Position { .. })) && stage.len(0) == 20, "it was not begun");
    let canceller = stage.canceller();
    let is_done = AtomicBool::new(false);
    let cancelled = std::thread::scope(|scope| {
        scope.spawn(|| {
            while !is_done.load(Ordering::Relaxed) {
                canceller.cancel();
            }
        });
        let rows: Vec<_> = (0..40).map(|position| row(0, position)).collect();
        // A run that was quicker than the canceller is tried again.
        let cancelled = loop {
            stage.clear(0).unwrap();
            if let Err(error) = stage.run(&rows, Input::Tokens(&text), &mut out) {
                break error;
            }
        };
        is_done.store(true, Ordering::Relaxed);
        cancelled
    });
    assert_eq!(cancelled, RunError::Cancelled);
    assert_eq!([0, 1, 2].map(|slot| stage.len(slot)), [0; 3]);
    assert!(fill(&mut stage) == expected);
}
