//! Slots that are copied, saved and restored go on with the bits of a slot that computed everything itself.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

use brigade_base::Token;
use brigade_engine::{Input, KvError, Row, RunError, Stage, StageOptions};
use support::synthetic::{self, N_VOCAB, named};
use support::{abacus, feed, generate, rows, tokens, whole};

/// Longer than the sliding windows of the synthetic models.
const N_PREFIX: usize = 24;

/// A prefix, and what follows it: a chunk of 8 tokens, then tokens one by one.
fn conversation(seed: usize) -> Vec<Token> {
    let rest = tokens(16, N_VOCAB, seed);
    [tokens(N_PREFIX, N_VOCAB, 1), rest].concat()
}

/// What a slot yields that computes everything behind the prefix, then and later.
fn go_on(stage: &mut Stage, slot: u32, text: &[Token]) -> Vec<f32> {
    generate(stage, slot, &text[N_PREFIX..], 8)
}

/// The same in a slot that computes the prefix itself.
fn alone(stage: &mut Stage, text: &[Token]) -> Vec<f32> {
    stage.clear_all();
    feed(stage, 0, &text[..N_PREFIX]);
    let expected = go_on(stage, 0, text);
    stage.clear_all();
    expected
}

/// Options under which llama.cpp uses flash attention, and so keeps values in another layout.
fn flash(options: &mut StageOptions) {
    (options.n_ctx, options.max_rows, options.n_sessions) = (16384, 2100, 2);
}

fn check_copy(name: &str, mut stage: Stage) {
    let (ours, theirs) = (conversation(2), conversation(3));
    let (our_end, their_end) = (alone(&mut stage, &ours), alone(&mut stage, &theirs));
    let to = stage.options().n_sessions - 1;

    // The copy is shorter than its source and replaces a longer session.
    feed(&mut stage, to, &tokens(50, N_VOCAB, 4));
    feed(&mut stage, 0, &ours[..N_PREFIX + 5]);
    stage.copy(0, to, N_PREFIX as u32).unwrap();
    assert_eq!((stage.len(0), stage.len(to)), (N_PREFIX as u32 + 5, N_PREFIX as u32));
    stage.truncate(0, N_PREFIX as u32).unwrap();
    assert!(go_on(&mut stage, 0, &ours) == our_end, "{name}: the source");
    assert!(go_on(&mut stage, to, &theirs) == their_end, "{name}: the copy");
}

#[test]
fn a_copy_goes_on_with_the_bits_of_a_slot_that_computed_it() {
    for name in ["llama", "qwen3", "gemma2", "gemma3", "mixtral"] {
        check_copy(name, named(name).load(|_| ()));
    }
    for model in synthetic::TYPES {
        check_copy(model.name, model.load(|_| ()));
    }
    check_copy("abacus", whole(&abacus(), |o| o.n_threads = 2));
    check_copy("flash attention", named("llama").load(flash));
}

#[test]
fn a_stage_that_is_not_the_last_copies_and_saves() {
    let mut stage = named("llama").load(|o| o.hooks.stop_node = Some("l_out-2".to_owned()));
    let text = conversation(2);
    let expected = alone(&mut stage, &text);
    feed(&mut stage, 0, &text[..N_PREFIX]);
    stage.copy(0, 1, N_PREFIX as u32).unwrap();
    let mut image = Vec::new();
    stage.save(1, &mut image).unwrap();
    stage.restore(3, &image, N_PREFIX as u32).unwrap();
    for slot in [0, 1, 3] {
        assert!(go_on(&mut stage, slot, &text) == expected, "slot {slot}");
    }
}

/// A copy is made when the next run begins; what happens to its source until then does not matter.
#[test]
fn a_queued_copy_holds_what_was_there_when_it_was_asked_for() {
    let mut stage = named("llama").load(|_| ());
    let (text, other) = (conversation(2), conversation(3));
    let (expected, expected_other) = (alone(&mut stage, &text), alone(&mut stage, &other));
    let n = N_PREFIX as u32;
    let mut check = |what: &str, slots: &[u32], change: &mut dyn FnMut(&mut Stage)| {
        stage.clear_all();
        feed(&mut stage, 0, &text[..N_PREFIX]);
        change(&mut stage);
        for &slot in slots {
            assert_eq!(stage.len(slot), n, "{what}: slot {slot}");
            assert!(go_on(&mut stage, slot, &text) == expected, "{what}: slot {slot}");
        }
    };
    check("source overwritten", &[1], &mut |stage| {
        stage.copy(0, 1, n).unwrap();
        stage.clear(0).unwrap();
        feed(stage, 0, &tokens(40, N_VOCAB, 7));
    });
    check("chain", &[0, 1, 2, 3], &mut |stage| {
        stage.copy(0, 1, n).unwrap();
        stage.copy(1, 2, n).unwrap();
        stage.copy(2, 3, n).unwrap();
    });
    check("there and back", &[0, 2], &mut |stage| {
        stage.copy(0, 1, n).unwrap();
        stage.truncate(0, 3).unwrap();
        stage.copy(1, 0, n).unwrap();
        stage.copy(3, 1, 0).unwrap();
        stage.copy(0, 2, n).unwrap();
    });
    check("cleared meanwhile", &[0], &mut |stage| {
        stage.copy(0, 1, n).unwrap();
        stage.clear_all();
        feed(stage, 0, &text[..N_PREFIX]);
    });
    check("a refused run between", &[0, 1], &mut |stage| {
        stage.copy(0, 1, n).unwrap();
        let error = stage.run(&[Row { slot: 1, position: 0, output: true }], Input::Tokens(&[1]), &mut Vec::new());
        assert_eq!(error, Err(RunError::Position { slot: 1, expected: n, found: 0 }));
    });
    check("more copies than slots", &[0, 1, 2, 3], &mut |stage| {
        for round in 0..40 {
            stage.copy(round % 4, (round + 1) % 4, n).unwrap();
        }
    });
    check("saved at once", &[1, 2], &mut |stage| {
        let mut image = Vec::new();
        stage.copy(0, 1, n).unwrap();
        stage.save(1, &mut image).unwrap();
        stage.copy(3, 1, 0).unwrap();
        stage.copy(0, 1, n).unwrap();
        stage.restore(1, &image, n).unwrap();
        stage.restore(2, &image, n).unwrap();
    });
    stage.clear_all();
    feed(&mut stage, 0, &other[..N_PREFIX]);
    assert!(go_on(&mut stage, 0, &other) == expected_other);
}

#[test]
fn a_cancelled_run_keeps_copies() {
    let mut stage = whole(&abacus(), |o| (o.n_ctx, o.max_rows) = (1024, 512));
    let text = tokens(512, N_VOCAB, 5);
    let expected = generate(&mut stage, 0, &text[..40], 20);
    stage.truncate(0, 20).unwrap();
    let canceller = stage.canceller();
    loop {
        stage.copy(0, 1, 20).unwrap();
        let rows = rows(&stage, 0, text.len());
        let result = std::thread::scope(|scope| {
            let run = scope.spawn(|| stage.run(&rows, Input::Tokens(&text), &mut Vec::new()));
            while !run.is_finished() && !canceller.cancel() {
                std::thread::yield_now();
            }
            run.join().unwrap()
        });
        if result == Err(RunError::Cancelled) {
            break;
        }
        // It was faster than this thread.
        stage.truncate(0, 20).unwrap();
    }
    assert_eq!((stage.len(0), stage.len(1)), (20, 20));
    for slot in [1, 0] {
        let rest: Vec<_> = text[20..40].iter().flat_map(|token| feed(&mut stage, slot, &[*token])).collect();
        assert!(rest == expected[20 * support::N_VOCAB..], "slot {slot}");
    }
}

#[test]
fn copies_that_cannot_be_made_change_nothing() {
    let mut stage = named("llama").load(|_| ());
    feed(&mut stage, 0, &[1, 2, 3]);
    feed(&mut stage, 1, &[1, 2]);
    let n_sessions = 4;
    for (from, to, n, error) in [
        (0, 4, 1, KvError::UnknownSlot { slot: 4, n_sessions }),
        (u32::MAX, 0, 1, KvError::UnknownSlot { slot: u32::MAX, n_sessions }),
        (0, 0, 1, KvError::SameSlot { slot: 0 }),
        (0, 1, 4, KvError::TooShort { slot: 0, len: 3, n_keep: 4 }),
        (2, 1, 1, KvError::TooShort { slot: 2, len: 0, n_keep: 1 }),
    ] {
        assert_eq!(stage.copy(from, to, n), Err(error));
        assert_eq!((stage.len(0), stage.len(1)), (3, 2));
    }
    stage.copy(2, 1, 0).unwrap();
    assert_eq!(stage.len(1), 0, "a copy of nothing is nothing");
}

fn check_image(name: &str, load: impl Fn() -> Stage) {
    let (mut first, mut second) = (load(), load());
    let text = conversation(2);
    let expected = alone(&mut first, &text);
    let n = N_PREFIX as u32;
    let mut image = vec![1; 7];
    feed(&mut first, 0, &text[..N_PREFIX]);
    first.save(0, &mut image).unwrap();
    assert!(image.len() as u64 >= u64::from(n) * first.kv_bytes_per_token(), "{name}");
    assert!(go_on(&mut first, 0, &text) == expected, "{name}: the slot that was saved");

    let to = first.options().n_sessions - 1;
    feed(&mut first, to, &tokens(50, N_VOCAB, 4));
    for (stage, slot, what) in [(&mut first, to, "another slot"), (&mut second, 0, "another stage")] {
        stage.restore(slot, &image, n).unwrap();
        assert_eq!(stage.len(slot), n);
        assert!(go_on(stage, slot, &text) == expected, "{name}: {what}");
        stage.truncate(slot, n).unwrap();
        let mut again = Vec::new();
        stage.save(slot, &mut again).unwrap();
        assert_eq!(again.len(), image.len(), "{name}: {what} saved again");
    }
}

#[test]
fn a_restored_slot_goes_on_with_the_same_bits() {
    for name in ["llama", "qwen3", "phi3"] {
        check_image(name, || named(name).load(|_| ()));
    }
    check_image("abacus", || whole(&abacus(), |_| ()));
    check_image("flash attention", || named("llama").load(flash));
    check_image("one session", || named("llama").load(|o| o.n_sessions = 1));
}

#[test]
fn an_empty_slot_has_an_image() {
    let mut stage = named("llama").load(|_| ());
    let mut image = Vec::new();
    stage.save(2, &mut image).unwrap();
    feed(&mut stage, 1, &[1, 2, 3]);
    stage.restore(1, &image, 0).unwrap();
    assert_eq!(stage.len(1), 0);
    feed(&mut stage, 1, &[4]);
}

#[test]
fn models_with_a_window_are_not_saved() {
    for name in ["gemma2", "gemma3"] {
        let mut stage = named(name).load(|_| ());
        feed(&mut stage, 0, &[1, 2, 3]);
        let mut image = vec![1];
        assert!(!stage.can_save());
        assert_eq!(stage.save(0, &mut image), Err(KvError::NotSavable));
        assert!(image.is_empty());
        assert_eq!(stage.restore(0, &[], 0), Err(KvError::NotSavable));
        assert_eq!(stage.len(0), 3);
    }
}

/// Whatever is given as an image, it is refused before or by llama.cpp, and the stage goes on.
#[test]
fn garbage_is_no_image() {
    let mut stage = named("llama").load(|_| ());
    let text = conversation(2);
    let expected = alone(&mut stage, &text);
    let (mut image, mut out) = (Vec::new(), Vec::new());
    feed(&mut stage, 0, &text[..2]);
    stage.save(0, &mut image).unwrap();
    let header = image.len() - (image.len() - 20);
    let mut refused = |image: &[u8], n, what: &str| {
        feed(&mut stage, 1, &[5, 6]);
        let error = stage.restore(1, image, n).expect_err(what);
        assert!(matches!(error, KvError::BadImage { slot: 1, .. }), "{what}: {error}");
        assert_eq!(stage.len(1), 0, "{what}");
    };
    refused(&image, 1, "other n");
    refused(&image, 3, "other n");
    refused(&image, u32::MAX, "other n");
    refused(&[0; 4096], 2, "zeros");
    let with_length = |image: &[u8]| {
        let mut image = image.to_vec();
        let n_bytes = (image.len() - header) as u64;
        image[12..20].copy_from_slice(&n_bytes.to_le_bytes());
        image
    };
    for len in 0..image.len() {
        refused(&image[..len], 2, "cut off");
        // The same behind a header that fits: llama.cpp itself runs out of bytes.
        if len >= header {
            refused(&with_length(&image[..len]), 2, "cut off inside");
        }
    }
    refused(&with_length(&[&image[..], &[0]].concat()), 2, "too long");
    for bit in 0..header * 8 {
        let mut image = image.clone();
        image[bit / 8] ^= 1 << (bit % 8);
        refused(&image, 2, "flipped bit");
    }
    // llama.cpp's own magic, the number of streams, cells of each stream, positions.
    for byte in (header..header + 4).chain(header + 8..header + 60) {
        let mut image = image.clone();
        image[byte] ^= 0x40;
        // Ids of sequences are read and ignored.
        if stage.restore(1, &image, 2).is_err() {
            assert_eq!(stage.len(1), 0, "byte {byte}");
        }
        stage.clear(1).unwrap();
    }
    let mut other = named("llama").load(|o| o.n_sessions = 3);
    assert!(matches!(other.restore(0, &image, 2), Err(KvError::BadImage { .. })), "other number of streams");
    let mut other = named("gemma2").load(|_| ());
    assert!(other.restore(0, &image, 2).is_err());
    let mut small = named("llama").load(|o| o.n_ctx = 1);
    assert!(matches!(small.restore(0, &image, 2), Err(KvError::BadImage { .. })), "longer than a session");
    assert_eq!(stage.save(9, &mut out), Err(KvError::UnknownSlot { slot: 9, n_sessions: 4 }));
    assert!(stage.restore(9, &image, 2).is_err());

    stage.restore(1, &image, 2).unwrap();
    let rest = feed(&mut stage, 1, &text[2..N_PREFIX]);
    assert!(!rest.is_empty() && go_on(&mut stage, 1, &text) == expected);
}

#[test]
fn saving_with_a_queued_copy_needs_a_slot_with_room() {
    let mut stage = named("llama").load(|o| (o.n_ctx, o.n_sessions) = (32, 2));
    let text = tokens(32, N_VOCAB, 1);
    feed(&mut stage, 0, &text);
    stage.copy(0, 1, 32).unwrap();
    let mut image = Vec::new();
    assert_eq!(stage.save(0, &mut image), Err(KvError::NoRoom));
    assert_eq!(stage.restore(0, &[], 0), Err(KvError::NoRoom));
    assert_eq!((stage.len(0), stage.len(1)), (32, 32));
    stage.truncate(1, 31).unwrap();
    stage.save(0, &mut image).unwrap();
    assert_eq!((stage.len(0), stage.len(1)), (32, 31));
}
