//! Keys and values in blocks: what a row yields, what a cache is worth, and what a stage then takes in memory.
//!
//! llama.cpp attends to blocks row by row, so rows have the same bits in any batch, as with F16.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

use std::path::Path;

use brigade_base::{KvType, KvTypes};
use brigade_engine::{KvError, LoadError, Stage, StageOptions, rehearse};
use support::synthetic::{ALL, N_VOCAB, Synthetic, named};
use support::{abacus, chunks_agree, decode, difference, feed, generate, open, options, tokens, whole};

const KINDS: [KvTypes; 5] = [
    KvTypes::both(KvType::Q8_0),
    KvTypes::both(KvType::Q4_0),
    KvTypes { k: KvType::Q8_0, v: KvType::Q4_0 },
    KvTypes { k: KvType::Q8_0, v: KvType::F16 },
    KvTypes { k: KvType::F16, v: KvType::Q8_0 },
];

/// Some synthetic models, whose heads are too narrow to be turned, and abacus.
fn each(change: impl Fn(&mut StageOptions), check: impl Fn(&str, Stage)) {
    for kv in KINDS {
        let change = |o: &mut StageOptions| {
            change(o);
            o.kv = kv;
        };
        for name in ["llama", "gemma2"] {
            check(&format!("{name} in {kv}"), named(name).load(change));
        }
        check(&format!("abacus in {kv}"), whole(&abacus(), change));
    }
}

#[test]
fn a_chunk_has_the_same_bits_in_any_cut() {
    each(
        |o| (o.n_sessions, o.max_rows) = (2, 300),
        |name, mut stage| {
            if !chunks_agree(&mut stage) {
                return;
            }
            let text = tokens(280, N_VOCAB, 1);
            let expected = feed(&mut stage, 0, &text);
            for cuts in [vec![2, 278], vec![7, 235, 2, 36], vec![40; 7]] {
                stage.clear(1).unwrap();
                let mut rest = &text[..];
                let mut found = Vec::new();
                for n in cuts {
                    found.extend(feed(&mut stage, 1, &rest[..n]));
                    rest = &rest[n..];
                }
                assert!(rest.is_empty() && found == expected, "{name}");
            }
        },
    );
}

#[test]
fn a_lone_row_has_the_same_bits_in_any_batch_on_any_number_of_threads() {
    // From 512 tokens on llama.cpp deals the keys of a row over threads where they are F16 and values are too.
    let lens = [100, 3, 530, 255];
    let text = tokens(600, N_VOCAB, 2);
    for kv in [KINDS[0], KINDS[1], KINDS[4]] {
        let rows_of = |n_threads: u32, batches: &[&[u32]]| {
            let mut stage = named("llama-q8_0").load(|o| {
                (o.n_sessions, o.max_rows, o.n_ctx, o.n_threads, o.kv) = (4, 100, 768, n_threads, kv);
            });
            for (slot, &len) in lens.iter().enumerate() {
                text[..len].chunks(100).for_each(|part| drop(feed(&mut stage, slot as u32, part)));
            }
            let mut found = vec![Vec::new(); lens.len()];
            for &batch in batches {
                let out = decode(&mut stage, batch, &text).unwrap();
                for (&slot, row) in batch.iter().zip(out.chunks(out.len() / batch.len())) {
                    found[slot as usize] = row.to_vec();
                }
            }
            found
        };
        let expected = rows_of(1, &[&[0, 1, 2, 3]]);
        assert!(rows_of(1, &[&[0], &[1], &[3, 2]]) == expected, "{kv}, in other batches");
        assert!(rows_of(2, &[&[0, 1, 2, 3]]) == expected, "{kv}, on two threads");
    }
}

#[test]
fn fewer_bits_are_less_exact_and_take_less() {
    let text = tokens(40, N_VOCAB, 3);
    let run = |kv| {
        let mut stage = whole(&abacus(), |o| o.kv = kv);
        (generate(&mut stage, 0, &text, 30), stage.memory().kv)
    };
    let (exact, bytes) = run(KvTypes::default());
    let mut last = 0.0;
    for (ty, share, most) in [(KvType::Q8_0, 34.0 / 64.0, 0.1), (KvType::Q4_0, 18.0 / 64.0, 0.5)] {
        let (found, its) = run(KvTypes::both(ty));
        let difference = difference(&exact, &found);
        assert!(difference > last && difference < most, "{ty}: {difference}");
        assert!((its as f64 / bytes as f64 - share).abs() < 0.01, "{ty}: {its} of {bytes} bytes");
        last = difference;
    }
}

#[test]
fn an_image_of_other_types_is_refused() {
    let load = |kv| whole(&abacus(), |o| o.kv = kv);
    let mut image = Vec::new();
    let text = tokens(20, N_VOCAB, 4);
    let mut first = load(KINDS[0]);
    feed(&mut first, 0, &text[..10]);
    first.save(0, &mut image).unwrap();
    let expected = generate(&mut first, 0, &text[10..], 5);
    let mut same = load(KINDS[0]);
    same.restore(1, &image, 10).unwrap();
    assert!(generate(&mut same, 1, &text[10..], 5) == expected);
    for kv in [KvTypes::default(), KINDS[1], KINDS[2]] {
        let error = load(kv).restore(0, &image, 10).unwrap_err();
        assert!(matches!(&error, KvError::BadImage { message, .. } if message.contains("another type")), "{error}");
    }
}

#[test]
fn heads_that_are_no_whole_blocks_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("narrow.gguf");
    Synthetic { head_dim: 24, ..named("llama") }.write(&path);
    let load = |k, v| Stage::load_file(&path, StageOptions { kv: KvTypes { k, v }, ..options() });
    assert!(load(KvType::F16, KvType::F16).is_ok());
    for (k, v, wrong) in [(KvType::Q8_0, KvType::F16, "keys"), (KvType::F16, KvType::Q4_0, "values")] {
        let error = load(k, v).unwrap_err();
        assert!(matches!(error, LoadError::KvType { side, length: 24, .. } if side == wrong), "{error}");
    }
}

/// A rehearsal reads no tensor, and says what the stage then takes.
#[test]
fn a_rehearsal_knows_what_a_stage_takes() {
    let dir = tempfile::tempdir().unwrap();
    let check = |path: &Path, change: &dyn Fn(&mut StageOptions)| {
        for stop_node in [None, Some("l_out-1")] {
            let mut options = options();
            options.hooks.stop_node = stop_node.map(str::to_owned);
            change(&mut options);
            let (file, n_bytes) = open(path);
            let found = rehearse(file, n_bytes, &options).unwrap();
            let (file, n_bytes) = open(path);
            let stage = Stage::load(file, n_bytes, options.clone(), &mut |_| true).unwrap();
            let real = stage.memory();
            let close = |a: u64, b: u64| a.abs_diff(b) <= 16 << 10;
            let same = found.weights == real.weights && close(found.kv, real.kv) && close(found.compute, real.compute);
            assert!(same, "{} {options:?}: {found:?} instead of {real:?}", path.display());
        }
    };
    for model in ALL {
        let path = dir.path().join(model.name);
        model.write(&path);
        check(&path, &|_| ());
        check(&path, &|o| (o.n_ctx, o.n_sessions, o.max_rows, o.max_outputs) = (2048, 2, 256, 2));
    }
    for kv in KINDS {
        check(&abacus(), &|o| (o.kv, o.n_ctx, o.max_rows) = (kv, 4096, 260));
    }
}
