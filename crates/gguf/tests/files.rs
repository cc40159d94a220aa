//! Models on disk: one file, several files, and files that do not belong together.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a failed test is to panic")]

mod support;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use brigade_gguf::{Builder, Catalog, HeaderError, Manifest, ModelFile, OpenError, TensorSource, Value, model_id};
use support::{Model, Recipe};

fn split_name(dir: &Path, no: usize, n_splits: usize) -> PathBuf {
    dir.join(format!("model-{:05}-of-{n_splits:05}.gguf", no + 1))
}

/// Writes the model of `recipe` in `n_splits` files; all metadata is in the first, as llama.cpp does it.
fn write_splits(dir: &Path, recipe: &Recipe, n_splits: usize) {
    let tensors = recipe.tensors();
    let per_split = tensors.len().div_ceil(n_splits);
    for (no, part) in tensors.chunks(per_split).enumerate() {
        let mut metadata = if no == 0 { recipe.metadata() } else { Default::default() };
        metadata.set("split.no", Value::U16(no as u16));
        metadata.set("split.count", Value::U16(n_splits as u16));
        metadata.set("split.tensors.count", Value::I32(tensors.len() as i32));
        let mut builder = Builder::new(&metadata);
        for (name, dims, ty) in part {
            builder.tensor(name.clone(), dims, *ty).unwrap();
        }
        let names: Vec<String> = part.iter().map(|(name, ..)| name.clone()).collect();
        fs::write(split_name(dir, no, n_splits), &Model::build(&builder, &names).bytes).unwrap();
    }
}

fn read(file: &ModelFile, name: &str) -> Vec<u8> {
    let idx = file.catalog().tensor_idx(name).unwrap();
    let mut bytes = vec![0; file.catalog().tensors()[idx].n_bytes as usize];
    file.read_at(idx, 0, &mut bytes).unwrap();
    bytes
}

#[test]
fn the_beginnings_of_split_files_are_enough_for_a_catalog() {
    let dir = tempfile::tempdir().unwrap();
    let recipe = Recipe::new("llama", 5);
    write_splits(dir.path(), &recipe, 3);
    let whole: Vec<Vec<u8>> = (0..3).map(|no| fs::read(split_name(dir.path(), no, 3)).unwrap()).collect();
    let beginning = |bytes: &Vec<u8>| {
        let mut n_bytes = 64;
        while let Err(HeaderError::Truncated { needed, .. }) = Catalog::parse(&bytes[..n_bytes], bytes.len() as u64) {
            n_bytes = needed as usize;
        }
        (bytes[..n_bytes].to_vec(), bytes.len() as u64)
    };
    let parts: Vec<_> = whole.iter().map(beginning).collect();
    assert!(parts.iter().zip(&whole).all(|(part, whole)| part.0.len() < whole.len()));
    assert_eq!(Catalog::parse_parts(&parts).unwrap().header_hash(), recipe.model().catalog.header_hash());

    let wrong = |parts: &[(Vec<u8>, u64)]| Catalog::parse_parts(parts).unwrap_err();
    assert!(matches!(wrong(&parts[..1]), HeaderError::Part { no: 1, count: 3, expected_no: 1, expected_count: 1 }));
    let swapped = [parts[1].clone(), parts[0].clone(), parts[2].clone()];
    assert!(matches!(wrong(&swapped), HeaderError::Part { no: 2, expected_no: 1, .. }));
    assert!(matches!(wrong(&[]), HeaderError::Truncated { .. }));
}

#[test]
fn a_split_model_is_the_same_model() {
    let dir = tempfile::tempdir().unwrap();
    let recipe = Recipe::new("llama", 5);
    let model = recipe.model();
    write_splits(dir.path(), &recipe, 3);
    for no in 0..3 {
        let file = ModelFile::open(split_name(dir.path(), no, 3)).unwrap();
        assert_eq!(file.catalog().metadata(), model.catalog.metadata());
        assert_eq!(file.catalog().header_hash(), model.catalog.header_hash());
        assert!(file.catalog().tensors().iter().any(|tensor| tensor.file == 2));
        for tensor in model.catalog.tensors() {
            assert_eq!(read(&file, &tensor.name), model.tensor_bytes(&tensor.name), "{}", tensor.name);
        }
    }
}

#[test]
fn incomplete_and_mixed_splits_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    write_splits(dir.path(), &Recipe::new("llama", 5), 3);
    let first = split_name(dir.path(), 0, 3);
    let open = |path: &Path| ModelFile::open(path).unwrap_err();

    let third = split_name(dir.path(), 2, 3);
    let kept = fs::read(&third).unwrap();
    fs::remove_file(&third).unwrap();
    assert!(matches!(open(&first), OpenError::MissingSplit { n_splits: 3, .. }));

    fs::copy(split_name(dir.path(), 1, 3), &third).unwrap();
    assert!(matches!(open(&first), OpenError::WrongSplit { expected: 2, found: Some(1), .. }));

    fs::write(&third, &kept[..kept.len() - 64]).unwrap();
    assert!(matches!(open(&first), OpenError::Header { .. }));

    let renamed = dir.path().join("part-one.gguf");
    fs::copy(&first, &renamed).unwrap();
    assert!(matches!(open(&renamed), OpenError::SplitName { n_splits: 3, .. }));
    assert!(matches!(open(dir.path()), OpenError::NotAFile { .. }));
    assert!(matches!(open(&dir.path().join("absent.gguf")), OpenError::Io { .. }));
}

#[test]
fn a_header_longer_than_the_first_read_is_read_whole() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("long.gguf");
    let mut metadata = Recipe::new("llama", 1).metadata();
    let words = (0..400_000).map(|i| format!("word {i}"));
    metadata.set("x.words", brigade_gguf::Array::of_strings(words));
    fs::write(&path, Builder::new(&metadata).header_bytes()).unwrap();
    let file = ModelFile::open(&path).unwrap();
    assert_eq!(file.catalog().metadata().strings("x.words").unwrap().get(399_999), Some(b"word 399999".as_slice()));
}

#[test]
fn reads_stay_in_their_tensor() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    fs::write(&path, &Recipe::new("llama", 1).model().bytes).unwrap();
    let file = ModelFile::open(&path).unwrap();
    let n_bytes = file.catalog().tensors()[0].n_bytes;
    for (idx, offset, n) in [(0, n_bytes, 1), (0, n_bytes - 1, 2), (0, u64::MAX, 1), (999, 0, 1)] {
        let error = file.read_at(idx, offset, &mut vec![0; n]).unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::InvalidInput);
    }
    file.read_at(0, n_bytes, &mut []).unwrap();
}

#[test]
fn equal_weights_have_equal_names_and_others_do_not() {
    let dir = tempfile::tempdir().unwrap();
    let recipe = Recipe::new("qwen2", 4);
    write_splits(dir.path(), &recipe, 2);
    let split = ModelFile::open(split_name(dir.path(), 1, 2)).unwrap();
    let model = recipe.model();
    let id = |catalog: &Catalog, source: &dyn TensorSource, n_threads| {
        let done = AtomicU64::new(0);
        let progress = |n| {
            done.fetch_add(n, Ordering::Relaxed);
        };
        let manifest = Manifest::compute(catalog, source, n_threads, &progress).unwrap();
        assert_eq!(done.into_inner(), catalog.weight_bytes());
        model_id(&catalog.header_hash(), &manifest)
    };
    let expected = id(&model.catalog, &*model, 1);
    assert_eq!(id(split.catalog(), &split, 4), expected);

    let mut changed = Model { bytes: model.bytes.clone(), catalog: model.catalog.clone() };
    let last = changed.bytes.len() - 1;
    changed.bytes[last] ^= 1;
    assert_ne!(id(&changed.catalog, &changed, 2), expected);
    let other = Recipe::new("qwen2", 4).with("context_length", 256).model();
    assert_ne!(id(&other.catalog, &*other, 2), expected);
}

#[test]
fn an_error_of_the_source_ends_the_manifest() {
    struct Broken;
    impl TensorSource for Broken {
        fn read_tensor(&self, tensor_idx: usize, _: u64, _: &mut [u8]) -> std::io::Result<()> {
            if tensor_idx == 3 { Err(std::io::Error::other("gone")) } else { Ok(()) }
        }
    }
    let model = Recipe::new("llama", 4).model();
    for n_threads in [0, 1, 3] {
        let error = Manifest::compute(&model.catalog, &Broken, n_threads, &|_| {}).unwrap_err();
        assert_eq!(error.to_string(), "gone");
    }
}
