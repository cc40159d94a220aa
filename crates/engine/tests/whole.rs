//! A whole model in one stage: loading, batches, the KV cache, cancelling and every refusal.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

use std::io::{self, Cursor, Read, Seek, SeekFrom};

use brigade_base::LayerScale;
use brigade_engine::{Input, KvError, LoadError, Row, RunError, Stage, StageOptions};
use support::synthetic::named;
use support::{N_VOCAB, abacus, difference, feed, generate, lone_rows_agree, open, options, rows, tokens, whole};

#[test]
fn the_same_text_gives_the_same_bits() {
    let text = tokens(40, N_VOCAB, 1);
    let mut stage = whole(&abacus(), |_| ());
    let first = generate(&mut stage, 0, &text, 16);
    assert_eq!(first.len(), 40 * N_VOCAB);
    stage.clear(0).unwrap();
    assert_eq!(generate(&mut stage, 0, &text, 16), first, "again in the slot");
    assert_eq!(generate(&mut stage, 3, &text, 16), first, "in another slot, beside a full one");
    stage.clear_all();
    assert_eq!((stage.len(0), stage.len(3)), (0, 0));
    assert_eq!(generate(&mut stage, 1, &text, 16), first, "after clearing all");
}

#[test]
fn a_reader_and_a_file_load_the_same_model() {
    let mut shares = Vec::new();
    let (reader, n_bytes) = open(&abacus());
    let mut from_reader = Stage::load(reader, n_bytes, options(), &mut |share| {
        shares.push(share);
        true
    })
    .unwrap();
    assert!(shares.is_sorted() && shares.last() == Some(&1.0), "{shares:?}");
    let mut from_file = whole(&abacus(), |_| ());
    let text = tokens(20, N_VOCAB, 2);
    assert_eq!(generate(&mut from_reader, 0, &text, 16), generate(&mut from_file, 0, &text, 16));
    assert_eq!((from_reader.n_embd(), from_reader.n_vocab(), from_reader.n_layers()), (256, 1024, 8));

    let memory = from_reader.memory();
    // 4 sessions of 512 tokens, 8 layers, 4 heads of 32, keys and values of two bytes.
    assert_eq!(memory.kv, 4 * 512 * 8 * 4 * 32 * 2 * 2);
    assert!((9 << 20..11 << 20).contains(&memory.weights), "{memory:?}");
    assert!(memory.compute > 0 && memory.total() > memory.weights + memory.kv);
}

/// Rows of many sessions in one batch, in scrambled slot order, give each session what it gets alone.
#[test]
fn sessions_do_not_see_each_other() {
    let mut stage = whole(&abacus(), |o| o.n_sessions = 6);
    let texts: Vec<_> = (0..6).map(|slot| tokens(12, N_VOCAB, slot)).collect();
    let alone: Vec<_> = (0..6).map(|slot| feed(&mut stage, slot as u32, &texts[slot])).collect();
    stage.clear_all();

    // Slots 0 and 5 prefill while 1, 2 and 4 decode; 3 rests.
    for slot in [1, 2, 4] {
        feed(&mut stage, slot as u32, &texts[slot][..11]);
    }
    let mut batch: Vec<(usize, usize)> = vec![(4, 11)];
    batch.extend((0..12).map(|i| (5, i)));
    batch.push((2, 11));
    batch.extend((0..12).map(|i| (0, i)));
    batch.push((1, 11));
    let rows: Vec<_> =
        batch.iter().map(|&(slot, i)| Row { slot: slot as u32, position: i as u32, output: i % 2 == 1 }).collect();
    let input: Vec<_> = batch.iter().map(|&(slot, i)| texts[slot][i]).collect();
    let mut out = Vec::new();
    stage.run(&rows, Input::Tokens(&input), &mut out).unwrap();

    let wanted: Vec<_> = batch.iter().filter(|(_, i)| i % 2 == 1).collect();
    assert_eq!(out.len(), wanted.len() * N_VOCAB);
    for (&&(slot, i), logits) in wanted.iter().zip(out.chunks(N_VOCAB)) {
        let expected = &alone[slot][i * N_VOCAB..][..N_VOCAB];
        if slot == 0 || slot == 5 {
            assert_eq!(logits, expected, "slot {slot} row {i} was computed in the same shape");
        } else {
            let difference = difference(expected, logits);
            assert!(difference < 1e-3, "slot {slot} row {i}: {difference}");
        }
    }
    assert_eq!((0..6).map(|slot| stage.len(slot)).collect::<Vec<_>>(), [12, 12, 12, 0, 12, 12]);
}

/// What a token yields depends on its session alone: not on who else is in the batch (as far as llama.cpp's kernels
/// allow, see `batches.rs`), nor on the number of threads.
#[test]
fn a_decode_row_has_the_same_bits_in_any_batch() {
    let lens = [700, 30, 300, 600];
    let text = tokens(701, N_VOCAB, 11);
    for name in ["abacus-f16.gguf", "abacus-q8_0.gguf"] {
        let mut expected = Vec::new();
        for n_threads in [1, 2] {
            let path = abacus().with_file_name(name);
            let mut stage = whole(&path, |o| (o.n_threads, o.n_ctx, o.max_rows) = (n_threads, 1024, 350));
            let lone_rows_agree = lone_rows_agree(&mut stage);
            assert!(lone_rows_agree || name == "abacus-f16.gguf");
            let mut alone = Vec::new();
            for (slot, &len) in lens.iter().enumerate() {
                text[..len].chunks(350).for_each(|part| drop(feed(&mut stage, slot as u32, part)));
                alone.push(feed(&mut stage, slot as u32, &text[len..=len]));
                stage.truncate(slot as u32, len as u32).unwrap();
            }
            for batch in [vec![0, 1], vec![1, 3], vec![3, 2, 1, 0]] {
                let row = |&slot: &usize| Row { slot: slot as u32, position: lens[slot] as u32, output: true };
                let rows: Vec<_> = batch.iter().map(row).collect();
                let input: Vec<_> = batch.iter().map(|&slot| text[lens[slot]]).collect();
                let mut out = Vec::new();
                stage.run(&rows, Input::Tokens(&input), &mut out).unwrap();
                for (&slot, logits) in batch.iter().zip(out.chunks(N_VOCAB)) {
                    assert!(
                        alone[slot] == logits || !lone_rows_agree,
                        "{name}, {n_threads} threads, slot {slot} of {batch:?}"
                    );
                    stage.truncate(slot as u32, lens[slot] as u32).unwrap();
                }
            }
            expected.push(alone);
        }
        assert!(expected[0] == expected[1], "{name}: the number of threads matters");
    }
}

#[test]
fn a_truncated_session_goes_on_as_if_it_had_never_been_longer() {
    let mut stage = whole(&abacus(), |_| ());
    let text = tokens(60, N_VOCAB, 3);
    let expected = generate(&mut stage, 0, &text, 32);
    feed(&mut stage, 1, &text[..32]);
    for (wrong, seed) in [(20, 4), (5, 5)] {
        feed(&mut stage, 1, &tokens(wrong, N_VOCAB, seed));
        stage.truncate(1, 32).unwrap();
    }
    assert_eq!(stage.len(1), 32);
    let mut rest = Vec::new();
    for token in &text[32..] {
        rest.extend(feed(&mut stage, 1, &[*token]));
    }
    assert_eq!(rest, expected[32 * N_VOCAB..]);

    assert_eq!(stage.truncate(1, 61), Err(KvError::TooShort { slot: 1, len: 60, n_keep: 61 }));
    assert_eq!(stage.truncate(4, 0), Err(KvError::UnknownSlot { slot: 4, n_sessions: 4 }));
    assert!(stage.clear(4).is_err());
}

#[test]
fn a_cancelled_run_leaves_no_trace() {
    let mut stage = whole(&abacus(), |o| (o.max_rows, o.n_ctx) = (512, 1024));
    let canceller = stage.canceller();
    let activity = stage.activity();
    assert!(!canceller.cancel() && activity.steps() == 0, "nothing runs yet");
    let (before, text) = (tokens(7, N_VOCAB, 6), tokens(512, N_VOCAB, 7));
    feed(&mut stage, 0, &before);
    let one_run = activity.steps();
    assert!(one_run > 10 * u64::from(stage.n_layers()), "{one_run} steps");
    let expected = feed(&mut stage, 0, &text);
    assert!(activity.steps() > one_run, "each run counts");
    stage.truncate(0, 7).unwrap();

    let rows = rows(&stage, 0, text.len());
    let mut out = Vec::new();
    let result = std::thread::scope(|scope| {
        // Only a cancel that met a run returns true.
        scope.spawn(|| {
            while !canceller.cancel() {
                std::thread::yield_now();
            }
        });
        stage.run(&rows, Input::Tokens(&text), &mut out)
    });
    // The thread may have met the run or may be waiting for one no more: `scope` has joined it.
    assert_eq!(result, Err(RunError::Cancelled));
    assert_eq!((stage.len(0), out.len()), (7, 0));
    assert_eq!(feed(&mut stage, 0, &text), expected);
}

#[test]
fn batches_that_do_not_fit_are_refused_and_change_nothing() {
    let mut stage = whole(&abacus(), |o| (o.n_ctx, o.max_outputs, o.n_sessions) = (20, 2, 2));
    let mut out = vec![1.0];
    stage.run(&[], Input::Tokens(&[]), &mut out).unwrap();
    assert!(out.is_empty());
    feed(&mut stage, 0, &[1, 2]);

    let row = |slot, position| Row { slot, position, output: false };
    let mut check = |rows: &[Row], input: Input<'_>, error: RunError| {
        out.push(1.0);
        assert_eq!(stage.run(rows, input, &mut out), Err(error));
        assert!(out.is_empty() && stage.len(0) == 2 && stage.len(1) == 0);
    };
    let many: Vec<_> = (0..65).map(|i| row(1, i)).collect();
    check(&many, Input::Tokens(&[1; 65]), RunError::TooManyRows { n_rows: 65, max_rows: 64 });
    let full: Vec<_> = (0..21).map(|i| row(1, i)).collect();
    check(&full, Input::Tokens(&[1; 21]), RunError::ContextFull { slot: 1, n_ctx: 20 });
    check(&[row(2, 0)], Input::Tokens(&[1]), RunError::UnknownSlot { slot: 2, n_sessions: 2 });
    check(&[row(u32::MAX, 0)], Input::Tokens(&[1]), RunError::UnknownSlot { slot: u32::MAX, n_sessions: 2 });
    check(&[row(0, 1)], Input::Tokens(&[1]), RunError::Position { slot: 0, expected: 2, found: 1 });
    check(&[row(0, 3)], Input::Tokens(&[1]), RunError::Position { slot: 0, expected: 2, found: 3 });
    check(&[row(1, 0), row(1, 2)], Input::Tokens(&[1; 2]), RunError::Position { slot: 1, expected: 1, found: 2 });
    check(&[row(1, u32::MAX)], Input::Tokens(&[1]), RunError::Position { slot: 1, expected: 0, found: u32::MAX });
    check(&[row(0, 2), row(1, 0), row(0, 3)], Input::Tokens(&[1; 3]), RunError::SplitSlot { slot: 0 });
    check(&[row(1, 0)], Input::Tokens(&[1, 2]), RunError::InputLength { expected: 1, found: 2 });
    check(&[row(1, 0)], Input::Hidden(&[0.0; 255]), RunError::InputLength { expected: 256, found: 255 });
    check(&[row(1, 0)], Input::Tokens(&[1024]), RunError::UnknownToken { token: 1024, n_vocab: 1024 });
    check(&[row(1, 0)], Input::Tokens(&[-1]), RunError::UnknownToken { token: -1, n_vocab: 1024 });
    let mut hidden = vec![0.5; 512];
    hidden[300] = f32::NAN;
    check(&[row(1, 0), row(1, 1)], Input::Hidden(&hidden), RunError::NotFinite { row: 1 });
    let outputs: Vec<_> = (0..3).map(|i| Row { output: true, ..row(1, i) }).collect();
    check(&outputs, Input::Tokens(&[1; 3]), RunError::TooManyOutputs { n_outputs: 3, max_outputs: 2 });
}

#[test]
fn a_stage_without_outputs_and_a_full_context_work() {
    let mut stage = whole(&abacus(), |o| (o.n_ctx, o.max_rows, o.n_sessions) = (256, 256, 1));
    let text = tokens(256, N_VOCAB, 8);
    let rows: Vec<_> = (0..256).map(|i| Row { slot: 0, position: i, output: i == 255 }).collect();
    let mut out = Vec::new();
    stage.run(&rows[..200], Input::Tokens(&text[..200]), &mut out).unwrap();
    assert!(out.is_empty());
    stage.run(&rows[200..], Input::Tokens(&text[200..]), &mut out).unwrap();
    assert_eq!(out.len(), N_VOCAB);
}

#[test]
fn more_sessions_than_rows_are_fine() {
    let mut stage = whole(&abacus(), |o| (o.max_rows, o.n_sessions, o.max_outputs) = (1, 5, 1));
    assert_eq!(feed(&mut stage, 4, &[3]).len(), N_VOCAB);
}

/// Cut short at a node of the first layer: the value of that node comes out, and a wrong name is an error.
#[test]
fn a_stop_node_yields_its_value() {
    let with_stop = |node: &str| whole(&abacus(), |o| o.hooks.stop_node = Some(node.to_owned()));
    let mut stage = with_stop("l_out-0");
    assert!(!stage.is_final());
    let hidden = feed(&mut stage, 0, &[1, 2, 3]);
    assert_eq!(hidden.len(), 3 * 256);
    assert!(hidden.iter().all(|value| value.is_finite()) && hidden.iter().any(|value| *value != 0.0));

    let mut out = Vec::new();
    let row = [Row { slot: 0, position: 0, output: true }];
    let mut stage = with_stop("l_out-99");
    let error = stage.run(&row, Input::Tokens(&[1]), &mut out).unwrap_err();
    assert_eq!(error, RunError::StopNode { n_hits: 0, shape: None, n_embd: 256, n_rows: 1 });
    let mut stage = with_stop("ffn_gate-0");
    let error = stage.run(&row, Input::Tokens(&[1]), &mut out).unwrap_err();
    assert!(matches!(error, RunError::StopNode { n_hits: 1, shape: Some([512, 1, 1, 1]), .. }), "{error}");
    assert_eq!(stage.len(0), 0);
}

/// gemma2 scales its queries once in each layer: told the same factor it gives the same bits, told another one others,
/// and a factor that no node has a use for is an error.
#[test]
fn a_graph_is_told_its_factors() {
    let told = |node: &str, factors: Vec<f32>| {
        let scale = LayerScale { node: node.to_owned(), factors };
        let mut stage = named("gemma2").load(|o| o.hooks.layer_scales = vec![scale]);
        let row = [Row { slot: 0, position: 0, output: true }, Row { slot: 0, position: 1, output: true }];
        let mut out = Vec::new();
        stage.run(&row, Input::Tokens(&[1, 2]), &mut out).map(|()| out)
    };
    let mut stage = named("gemma2").load(|_| ());
    let own = feed(&mut stage, 0, &[1, 2]);
    let factor = 1.0 / 32f32.sqrt();
    assert_eq!(told("Qcur", vec![factor; 6]).unwrap(), own);
    assert_ne!(told("Qcur", vec![0.5; 6]).unwrap(), own);
    // Each layer has its own.
    let one = |layer| (0..6).map(|l| if l == layer { 0.5 } else { factor }).collect();
    let ones: Vec<_> = (0..6).map(|layer| told("Qcur", one(layer)).unwrap()).collect();
    assert!(ones.iter().enumerate().all(|(layer, out)| *out != own && !ones[..layer].contains(out)));
    assert_eq!(told("Kcur", vec![0.5; 6]).unwrap_err(), RunError::Scales { found: 0, wanted: 6 });
    assert_eq!(told("Qcur", vec![factor; 5]).unwrap_err(), RunError::Scales { found: 6, wanted: 5 });
    assert_eq!(told("Qcur", vec![factor; 7]).unwrap_err(), RunError::Scales { found: 6, wanted: 7 });
}

#[test]
fn bad_options_and_models_are_refused() {
    let load = |change: &dyn Fn(&mut StageOptions)| {
        let mut options = options();
        change(&mut options);
        Stage::load_file(&abacus(), options).unwrap_err()
    };
    for (change, text) in [
        (&(|o: &mut StageOptions| o.n_ctx = 0) as &dyn Fn(&mut StageOptions), "n_ctx is 0"),
        (&|o| o.n_sessions = 257, "n_sessions is 257"),
        (&|o| o.max_rows = 0, "max_rows is 0"),
        (&|o| o.n_threads = 0, "n_threads is 0"),
        (&|o| (o.n_ctx, o.n_sessions) = (1 << 24, 256), "n_ctx * n_sessions"),
        (&|o| o.n_embd = 255, "n_embd 256, but 255"),
        (&|o| o.n_vocab = 32, "n_vocab 1024, but 32"),
        (&|o| o.hooks.stop_node = Some(String::new()), "graph node"),
        (
            &|o| o.hooks.layer_scales = vec![LayerScale { node: "Qcur".to_owned(), factors: vec![1.0, f32::INFINITY] }],
            "factor of Qcur",
        ),
        (&|o| o.hooks.layer_scales = vec![LayerScale { node: "x".repeat(63), factors: vec![1.0] }], "graph node"),
        (&|o| o.hooks.stop_node = Some("x".repeat(64)), "graph node"),
    ] {
        let error = load(change).to_string();
        assert!(error.contains(text), "{error}");
    }
    let missing = Stage::load_file("/nowhere/model.gguf".as_ref(), options()).unwrap_err().to_string();
    assert!(missing.contains("/nowhere/model.gguf"), "{missing}");
}

fn load(reader: impl Read + Seek + Send + 'static, n_bytes: u64) -> Result<Stage, LoadError> {
    Stage::load(Box::new(reader), n_bytes, options(), &mut |_| true)
}

#[test]
fn a_broken_reader_is_an_error() {
    let bytes = std::fs::read(abacus()).unwrap();
    let n_bytes = bytes.len() as u64;
    let error = load(Cursor::new(vec![7; 4096]), 4096).unwrap_err();
    assert!(matches!(&error, LoadError::Refused(text) if text.contains("magic")), "{error}");
    let error = load(Cursor::new(bytes[..1 << 20].to_vec()), 1 << 20).unwrap_err();
    assert!(matches!(error, LoadError::Refused(_)), "{error}");
    let error = load(Cursor::new(bytes[..1 << 20].to_vec()), n_bytes).unwrap_err();
    assert!(matches!(&error, LoadError::Read(e) if e.kind() == io::ErrorKind::UnexpectedEof), "{error}");

    /// Fails, or panics, behind the first mebibyte.
    struct Broken(Cursor<Vec<u8>>, bool);
    impl Read for Broken {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            if self.0.position() > 1 << 20 {
                assert!(!self.1, "on purpose");
                return Err(io::Error::other("the peer is gone"));
            }
            self.0.read(buffer)
        }
    }
    impl Seek for Broken {
        fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
            self.0.seek(to)
        }
    }
    for (panics, text) in [(false, "the peer is gone"), (true, "panicked")] {
        let error = load(Broken(Cursor::new(bytes.clone()), panics), n_bytes).unwrap_err();
        assert!(matches!(&error, LoadError::Read(e) if e.to_string().contains(text)), "{error}");
    }
}

#[test]
fn loading_stops_when_progress_says_so() {
    let (reader, n_bytes) = open(&abacus());
    let error = Stage::load(reader, n_bytes, options(), &mut |share| share < 0.5).unwrap_err();
    assert!(matches!(error, LoadError::Cancelled), "{error}");
}
