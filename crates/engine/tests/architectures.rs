//! Tiny models of each architecture load and compute.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

use support::synthetic::{ALL, N_VOCAB};
use support::{feed, generate, tokens, whole};

#[test]
fn each_model_loads_and_is_deterministic() {
    let dir = tempfile::tempdir().unwrap();
    for model in ALL {
        let path = dir.path().join(model.name);
        model.write(&path);
        let mut stage = whole(&path, |o| o.n_vocab = N_VOCAB as u32);
        assert_eq!(u64::from(stage.n_layers()), model.n_layers);
        let text = tokens(40, N_VOCAB, 1);
        let first = generate(&mut stage, 0, &text, 24);
        assert!(first.iter().all(|value| value.is_finite()), "{}", model.name);
        // Back behind the start of any sliding window.
        stage.truncate(0, 24).unwrap();
        let rest: Vec<f32> = text[24..].iter().flat_map(|token| feed(&mut stage, 0, &[*token])).collect();
        assert_eq!(rest, first[24 * N_VOCAB..], "{}", model.name);
    }
}
