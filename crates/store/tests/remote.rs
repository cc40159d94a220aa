//! Models of which only ranges are read.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

use brigade_gguf::{ModelFile, TensorSource};
use brigade_store::{FetchError, RemoteFiles, RemoteLocation, RemoteModel};
use support::{Fault, Shop, abacus};

fn open(shop: &Shop) -> RemoteModel {
    let url = format!("{}/web/abacus.gguf", shop.server.url());
    RemoteModel::open_urls(shop.client(), &[url], true).unwrap()
}

#[test]
fn tensors_are_read_by_range() {
    let (file, bytes) = (ModelFile::open(abacus()).unwrap(), std::fs::read(abacus()).unwrap());
    let shop = Shop::of(&[("abacus.gguf", &bytes)]);
    let model = open(&shop);
    assert_eq!(model.catalog(), file.catalog());
    assert!(shop.server.n_bytes_sent() < bytes.len() as u64 / 2);
    assert_eq!(model.location().n_bytes(), bytes.len() as u64);

    // As another node gets it, over connections that break.
    let text = serde_json::to_string(model.location()).unwrap();
    let location: RemoteLocation = serde_json::from_str(&text).unwrap();
    shop.server.faults(|asked| asked.is_bulk().then_some(Fault::Cut(5000)));
    let files = RemoteFiles::new(shop.client(), location).unwrap();
    for (i, tensor) in file.catalog().tensors().iter().enumerate().step_by(7) {
        let (mut here, mut there, mut range) =
            (vec![0; tensor.n_bytes as usize], vec![0; tensor.n_bytes as usize], vec![0; tensor.n_bytes as usize]);
        file.read_tensor(i, 0, &mut here).unwrap();
        model.read_tensor(i, 0, &mut there).unwrap();
        files.read_range(0, tensor.offset, &mut range).unwrap();
        assert!(here == there && here == range, "{}", tensor.name);
    }
    assert!(model.read_tensor(0, u64::MAX, &mut [0; 2]).is_err());
}

#[test]
fn a_file_that_changed_is_not_read_on() {
    let bytes = std::fs::read(abacus()).unwrap();
    let shop = Shop::of(&[("abacus.gguf", &bytes)]);
    let model = open(&shop);
    shop.server.faults(|_| Some(Fault::Tag("\"second\"")));
    let error = model.read_range(0, 0, &mut [0; 100]).unwrap_err();
    assert!(matches!(error, FetchError::Changed { .. }), "{error}");
    shop.server.faults(|_| Some(Fault::Whole));
    let error = model.read_range(0, 100, &mut [0; 100]).unwrap_err();
    assert!(matches!(error, FetchError::NoRanges { .. }), "{error}");
    shop.server.faults(|_| Some(Fault::Status(503, "")));
    let error = model.read_range(0, 100, &mut [0; 100]).unwrap_err();
    assert!(matches!(error, FetchError::Busy { .. }), "{error}");
}
