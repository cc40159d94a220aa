//! Weights travel once, are believed only when they hash right, and an own copy must be the same model.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use brigade_gguf::ModelFile;
use support::{Cluster, Setup, abacus, eventually};

/// Which layers the worker of these tests has.
const SPLIT: &str = "4,4";

/// A cluster whose only worker always has layers 0..4.
fn cluster() -> Cluster {
    Setup::of(2).layers(SPLIT).start()
}

/// A file of the cache: its inode, which another file of the same name would not have, and its bytes.
type Cached = (u64, Vec<u8>);

fn cache_dir(cluster: &Cluster) -> PathBuf {
    cluster.state_dir("w0").join("cache")
}

fn cached(dir: &Path) -> BTreeMap<String, Cached> {
    let entries = std::fs::read_dir(dir).unwrap().map(Result::unwrap);
    let file = |entry: std::fs::DirEntry| {
        let inode = entry.metadata().unwrap().ino();
        (entry.file_name().into_string().unwrap(), (inode, std::fs::read(entry.path()).unwrap()))
    };
    entries.map(file).collect()
}

/// Stops the worker, lets `change` have its cache, starts it again and checks an answer; the cache before and after.
fn around_restart(change: impl FnOnce(&Path)) -> (BTreeMap<String, Cached>, BTreeMap<String, Cached>) {
    let mut cluster = cluster();
    let dir = cache_dir(&cluster);
    let before = cached(&dir);
    cluster.workers[0].terminate();
    eventually("the loss", || (cluster.readiness() != "ready").then_some(()));
    change(&dir);
    cluster.restart_worker(0);
    cluster.wait_ready();
    cluster.check_answer();
    (before, cached(&dir))
}

/// A file of the cache with many bytes.
fn large(dir: &Path) -> PathBuf {
    let mut files: Vec<_> = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort_by_key(|path| (std::fs::metadata(path).unwrap().len(), path.clone()));
    files.pop().unwrap()
}

fn flip(path: &Path, at: usize) {
    let mut bytes = std::fs::read(path).unwrap();
    bytes[at] ^= 1;
    std::fs::write(path, bytes).unwrap();
}

#[test]
fn a_worker_keeps_the_tensors_of_its_layers_and_no_others() {
    let cluster = cluster();
    let file = ModelFile::open(abacus()).unwrap();
    let of_stage = |name: &str| (0..4).any(|layer| name.starts_with(&format!("blk.{layer}.")));
    let mut expected = BTreeMap::new();
    for (idx, tensor) in file.catalog().tensors().iter().enumerate().filter(|(_, tensor)| of_stage(&tensor.name)) {
        let mut bytes = vec![0; tensor.n_bytes as usize];
        file.read_at(idx, 0, &mut bytes).unwrap();
        expected.insert(blake3::hash(&bytes).to_string(), bytes);
    }
    let found: BTreeMap<_, _> =
        cached(&cache_dir(&cluster)).into_iter().map(|(name, (_, bytes))| (name, bytes)).collect();
    assert!(found == expected, "{:?}\n{:?}", found.keys(), expected.keys());
}

#[test]
fn a_restarted_worker_fetches_nothing_again() {
    let (before, after) = around_restart(|_| ());
    assert!(before == after, "files were written anew");
}

#[test]
fn a_damaged_tensor_is_fetched_again_and_alone() {
    let mut damaged = String::new();
    let (before, after) = around_restart(|dir| {
        let path = large(dir);
        flip(&path, 1000);
        damaged = path.file_name().unwrap().to_str().unwrap().to_owned();
    });
    assert_eq!(before[&damaged].1, after[&damaged].1, "the right bytes are back");
    assert_eq!(before.keys().collect::<Vec<_>>(), after.keys().collect::<Vec<_>>());
    for (name, file) in before.iter().filter(|(name, _)| **name != damaged) {
        assert_eq!(file.0, after[name].0, "{name} was written anew");
    }
}

#[test]
fn a_transfer_is_taken_up_where_it_broke_off() {
    let (mut name, mut inode) = (String::new(), 0);
    let (before, after) = around_restart(|dir| {
        let path = large(dir);
        name = path.file_name().unwrap().to_str().unwrap().to_owned();
        let bytes = std::fs::read(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        let part = dir.join(format!("{name}.part"));
        std::fs::write(&part, &bytes[..bytes.len() / 3]).unwrap();
        inode = std::fs::metadata(&part).unwrap().ino();
    });
    assert_eq!(after[&name].0, inode, "the part was thrown away");
    assert_eq!(before[&name].1, after[&name].1);
    assert_eq!(before.len(), after.len(), "no part is left");
}

#[test]
fn a_part_with_wrong_bytes_is_no_beginning() {
    let mut name = String::new();
    let (before, after) = around_restart(|dir| {
        let path = large(dir);
        name = path.file_name().unwrap().to_str().unwrap().to_owned();
        std::fs::remove_file(&path).unwrap();
        std::fs::write(dir.join(format!("{name}.part")), vec![0x55; 5000]).unwrap();
    });
    assert_eq!(before[&name].1, after[&name].1);
    assert_eq!(before.len(), after.len(), "no part is left");
}

#[test]
fn a_worker_with_its_own_copy_fetches_nothing() {
    let cluster = Setup::of(2).layers(SPLIT).join(&["--model", abacus().to_str().unwrap()]).start();
    cluster.check_answer();
    assert_eq!(cached(&cache_dir(&cluster)), BTreeMap::new());
}

/// Joins with another file as own copy; the worker must end with one line that has these words.
fn check_other_copy(prepare: impl FnOnce(&Path) -> PathBuf, words: &[&str]) {
    let mut cluster = Setup::of(2).layers(SPLIT).start_coordinator();
    let copy = prepare(cluster.scratch());
    let i = cluster.join_with(&["--model", copy.to_str().unwrap()]);
    let status = cluster.workers[i].wait();
    let stderr = cluster.workers[i].stderr();
    assert_eq!(status.code(), Some(1));
    let last = stderr.lines().last().unwrap();
    assert!(last.starts_with("brigade: ") && words.iter().all(|word| last.contains(word)), "{stderr}");
    cluster.wait_not_ready("1 more must join");
    // The node may come back with what is right: here with no copy of its own.
    cluster.restart_worker(i);
    cluster.wait_ready();
    cluster.check_answer();
}

#[test]
fn a_copy_with_one_other_byte_is_refused_and_the_tensor_named() {
    let name = "blk.2.ffn_up.weight";
    let flipped = |dir: &Path| {
        let copy = dir.join("copy.gguf");
        std::fs::copy(abacus(), &copy).unwrap();
        let file = ModelFile::open(&copy).unwrap();
        let tensor = file.catalog().tensor(name).unwrap();
        flip(&copy, (tensor.offset + tensor.n_bytes / 2) as usize);
        copy
    };
    check_other_copy(flipped, &[name, "use the same file"]);
}

#[test]
fn a_copy_of_another_model_is_refused() {
    check_other_copy(|_| abacus().with_file_name("abacus-q8_0.gguf"), &["their headers differ", "--model"]);
}
