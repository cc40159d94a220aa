//! Replays the corpora: what the fuzzer kept, and what once failed.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::path::{Path, PathBuf};

use brigade_fuzz::{TARGETS, mutate};

/// All corpora together, so that they stay small enough for everybody's checkout.
const MAX_BYTES: usize = 1 << 20;

fn corpora() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus")
}

fn inputs(target: &str) -> Vec<(PathBuf, Vec<u8>)> {
    let entries = std::fs::read_dir(corpora().join(target)).unwrap();
    let mut paths: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    paths.into_iter().map(|path| (path.clone(), std::fs::read(&path).unwrap())).collect()
}

#[test]
fn corpora_are_replayed() {
    for (name, target) in TARGETS {
        let inputs = inputs(name);
        assert!(!inputs.is_empty(), "{name} has no corpus");
        for (path, bytes) in inputs {
            if std::panic::catch_unwind(|| target(&bytes)).is_err() {
                panic!("{name} fails on {}", path.display());
            }
        }
    }
}

#[test]
fn corpora_are_small_and_none_is_forgotten() {
    let folders = std::fs::read_dir(corpora()).unwrap().map(|entry| entry.unwrap().file_name());
    let mut folders: Vec<String> = folders.map(|name| name.into_string().unwrap()).collect();
    let mut names: Vec<String> = TARGETS.iter().map(|(name, _)| (*name).to_owned()).collect();
    folders.sort();
    names.sort();
    assert_eq!(folders, names);
    let n_bytes: usize = names.iter().flat_map(|name| inputs(name)).map(|(_, bytes)| bytes.len()).sum();
    assert!(n_bytes <= MAX_BYTES, "{n_bytes} bytes");
    for name in names {
        let wrapper = corpora().with_file_name("fuzz_targets").join(format!("{name}.rs"));
        assert!(wrapper.exists(), "{} is missing", wrapper.display());
    }
}

#[test]
fn changed_headers_are_headers() {
    let (_, target) = TARGETS.iter().find(|(name, _)| *name == "stage_view").unwrap();
    let mut n_changed = 0;
    for (path, bytes) in inputs("stage_view").iter().take(8) {
        for seed in 0..200 {
            let Some(changed) = mutate::header(bytes, seed) else { continue };
            n_changed += 1;
            if std::panic::catch_unwind(|| target(&changed)).is_err() {
                panic!("{} fails with the change {seed}", path.display());
            }
        }
    }
    assert!(n_changed > 0, "none can be changed");
}
