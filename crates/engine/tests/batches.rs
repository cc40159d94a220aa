//! What a row yields depends on its session and on whether it is alone in its slot, not on what it is computed with.
//!
//! That rests on llama.cpp's kernels. With AMX it holds for all types; Q8_0 and Q4_0 keep to it with AVX2 and AVX-512
//! as well. Elsewhere a matrix of floats has another kernel for a call of one row (and so has the routing to experts,
//! which is F32, on all machines), and repacked Q4_K one for blocks of four rows. Where that is so, the tests ask for
//! the rest.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

use brigade_engine::{Input, Row, RunError, Stage, StageOptions};
use support::synthetic::{ALL, N_VOCAB, Q8_0, Synthetic, TYPES, named};
use support::{abacus, chunks_agree, decode, feed, lone_rows_agree, tokens, whole};

/// All synthetic models, and abacus in its two types.
fn each(change: impl Fn(&mut StageOptions), check: impl Fn(&str, Stage)) {
    for model in ALL.iter().chain(&TYPES) {
        check(model.name, model.load(&change));
    }
    for name in ["abacus-f16.gguf", "abacus-q8_0.gguf"] {
        check(name, whole(&abacus().with_file_name(name), &change));
    }
}

#[test]
fn a_chunk_of_two_or_more_rows_has_the_same_bits_in_any_cut() {
    each(
        |o| (o.n_sessions, o.max_rows) = (2, 300),
        |name, mut stage| {
            if !chunks_agree(&mut stage) {
                return assert_eq!(name, "q4_k");
            }
            let text = tokens(300, N_VOCAB, 1);
            let expected = feed(&mut stage, 0, &text);
            for cuts in [vec![2, 298], vec![7, 255, 2, 36], vec![150; 2], vec![3; 100], vec![16, 33, 251]] {
                stage.clear(1).unwrap();
                let mut rest = &text[..];
                let mut found = Vec::new();
                for &n in &cuts {
                    found.extend(feed(&mut stage, 1, &rest[..n]));
                    rest = &rest[n..];
                }
                assert!(rest.is_empty() && found == expected, "{name}: {cuts:?}");
            }
        },
    );
}

/// Batches that are one call of llama.cpp, with holes that are filled, and batches that are several.
const JOINED: [&[u32]; 5] = [&[0, 1, 2, 3, 4, 5, 6, 7], &[0, 1], &[2, 0, 3], &[7, 5, 3, 2], &[2, 4, 6, 7]];
const PARTED: [&[u32]; 6] = [&[1, 4, 7], &[0, 2, 7], &[0], &[3], &[5], &[7]];

#[test]
fn a_row_that_is_alone_in_its_slot_has_the_same_bits_in_any_batch() {
    each(
        |o| (o.n_sessions, o.max_rows) = (8, 100),
        |name, mut stage| {
            if !chunks_agree(&mut stage) {
                return assert_eq!(name, "q4_k");
            }
            let lone_rows_agree = lone_rows_agree(&mut stage);
            assert!(lone_rows_agree || !matches!(name, "llama-q8_0" | "q8_0" | "q4_0" | "abacus-q8_0.gguf"));
            let text = tokens(330, N_VOCAB, 2);
            let lens = [100, 3, 280, 255, 0, 256, 40, 300];
            for (slot, &len) in lens.iter().enumerate() {
                text[..len].chunks(100).for_each(|part| drop(feed(&mut stage, slot as u32, part)));
            }
            let mut run = |slots: &[u32]| {
                let out = decode(&mut stage, slots, &text).unwrap();
                slots.iter().for_each(|&slot| stage.truncate(slot, lens[slot as usize] as u32).unwrap());
                assert!((0..8).all(|slot| stage.len(slot) == lens[slot as usize] as u32));
                out.chunks(out.len() / slots.len()).map(<[f32]>::to_vec).collect::<Vec<_>>()
            };
            let expected: Vec<_> =
                if lone_rows_agree { (0..8).flat_map(|slot| run(&[slot])).collect() } else { run(JOINED[0]) };
            // Each batch twice: slots that rested while others used their cells have lost nothing.
            for batch in JOINED.iter().chain(&PARTED).chain(&JOINED).filter(|b| lone_rows_agree || JOINED.contains(b)) {
                for (&slot, row) in batch.iter().zip(run(batch)) {
                    assert!(row == expected[slot as usize], "{name}: slot {slot} of {batch:?}");
                }
            }
        },
    );
}

/// Rows that fill holes never come out of a stage, whatever it takes and yields.
#[test]
fn filled_holes_do_not_show_in_results() {
    for (stop_node, input_node) in [(Some("l_out-3"), None), (None, None), (None, Some("inp_scaled"))] {
        let name = if input_node.is_some() { "gemma2" } else { "llama" };
        let mut stage = Synthetic { ty: Q8_0, ..named(name) }.load(|o| {
            (o.n_sessions, o.max_rows) = (6, 40);
            o.hooks.stop_node = stop_node.map(str::to_owned);
            o.hooks.input_node = input_node.map(str::to_owned);
        });
        let n_embd = stage.n_embd() as usize;
        let value = |position: u32, i: usize| ((i * 37 + position as usize * 11) % 64) as f32 / 64.0;
        let run = |stage: &mut Stage, rows: &[Row]| {
            let input: Vec<f32> = rows.iter().flat_map(|row| (0..n_embd).map(|i| value(row.position, i))).collect();
            let mut out = Vec::new();
            stage.run(rows, Input::Hidden(&input), &mut out).unwrap();
            out
        };
        for slot in 0..6 {
            let rows = support::rows(&stage, slot, 20 + slot as usize);
            run(&mut stage, &rows);
        }
        let row = |slot| Row { slot, position: 20 + slot, output: slot != 3 };
        let alone: Vec<_> = (0..6).map(|slot| run(&mut stage, &[row(slot)])).collect();
        (0..6).for_each(|slot| stage.truncate(slot, 20 + slot).unwrap());
        for batch in [[5, 0, 3], [0, 2, 3], [1, 3, 5]] {
            let out = run(&mut stage, &batch.map(row));
            let expected: Vec<_> = batch.iter().flat_map(|&slot| alone[slot as usize].clone()).collect();
            assert!(out == expected, "{name} {stop_node:?}: {batch:?}");
            batch.iter().for_each(|&slot| stage.truncate(slot, 20 + slot).unwrap());
        }
        assert_eq!((0..6).map(|slot| stage.len(slot)).collect::<Vec<_>>(), [20, 21, 22, 23, 24, 25]);
    }
}

/// A hole at the edge: its slot is full, or has one place left, or none of its cells was ever used.
#[test]
fn holes_in_full_and_empty_slots() {
    let mut stage = named("llama-q8_0").load(|o| (o.n_sessions, o.n_ctx, o.max_rows) = (5, 256, 256));
    let text = tokens(256, N_VOCAB, 4);
    let alone = |stage: &mut Stage, slot| {
        let out = decode(stage, &[slot], &text).unwrap();
        stage.truncate(slot, stage.len(slot) - 1).unwrap();
        out
    };
    for (slot, len) in [(0, 250), (1, 256), (2, 9), (3, 255), (4, 100)] {
        feed(&mut stage, slot, &text[..len]);
    }
    let expected: Vec<_> = [0, 2, 3, 4].map(|slot| alone(&mut stage, slot)).concat();
    let full = decode(&mut stage, &[1], &[&text[..], &[1]].concat());
    assert_eq!(full, Err(RunError::ContextFull { slot: 1, n_ctx: 256 }));
    assert!(decode(&mut stage, &[0, 2, 3, 4], &text).unwrap() == expected);
    for slot in [0, 2, 3, 4] {
        stage.truncate(slot, stage.len(slot) - 1).unwrap();
    }
    // Slot 3 has one place left; slot 1 is empty.
    stage.clear(1).unwrap();
    let (n, expected) = (N_VOCAB, &expected);
    assert!(decode(&mut stage, &[0, 2, 4], &text).unwrap() == [&expected[..2 * n], &expected[3 * n..]].concat());
    assert_eq!((0..5).map(|slot| stage.len(slot)).collect::<Vec<_>>(), [251, 0, 10, 255, 101]);
    assert!(decode(&mut stage, &[3], &text).unwrap() == expected[2 * n..3 * n]);
}

#[test]
fn a_cancelled_batch_with_a_hole_leaves_no_trace() {
    let mut stage = whole(&abacus(), |o| o.n_sessions = 5);
    let text = tokens(41, N_VOCAB, 5);
    let mut alone = Vec::new();
    for slot in 0..5 {
        feed(&mut stage, slot, &text[..40]);
        alone.push(decode(&mut stage, &[slot], &text).unwrap());
        stage.truncate(slot, 40).unwrap();
    }
    let canceller = stage.canceller();
    loop {
        let result = std::thread::scope(|scope| {
            let run = scope.spawn(|| decode(&mut stage, &[0, 2, 4], &text));
            while !run.is_finished() && !canceller.cancel() {
                std::hint::spin_loop();
            }
            run.join().unwrap()
        });
        match result {
            Err(error) => break assert_eq!(error, RunError::Cancelled),
            // It was faster than this thread.
            Ok(_) => [0, 2, 4].iter().for_each(|&slot| stage.truncate(slot, 40).unwrap()),
        }
    }
    assert!((0..5).all(|slot| stage.len(slot) == 40));
    for slot in 0..5 {
        assert!(decode(&mut stage, &[slot], &text).unwrap() == alone[slot as usize], "slot {slot}");
    }
}
