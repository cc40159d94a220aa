//! What is found again of models that were fetched: which version, under which address, in which state.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

use std::path::Path;

use brigade_store::{Client, Event, ModelSource, Opened, Outcome, Prune, Settings, Store, StoreError};
use serde_json::Value;
use support::{COMMIT, Fault, Shop, abacus, bytes, sha256};

const HUB: &str = "hf:someone/thing:m-Q8_0.gguf";
const SECOND: &str = "89abcdef0123456789abcdef0123456789abcdef";
const N: usize = 50_000;

/// Changes what is noted of the model to which a file belongs.
fn edit(file: &Path, change: impl Fn(&mut Value)) {
    let entry = file.with_file_name("model.json");
    let mut noted: Value = serde_json::from_slice(&std::fs::read(&entry).unwrap()).unwrap();
    change(&mut noted);
    std::fs::write(&entry, serde_json::to_vec(&noted).unwrap()).unwrap();
}

/// Opens a source without asking anybody.
fn open_offline(shop: &Shop, source: &str) -> Result<Opened, StoreError> {
    let settings = Settings { is_offline: true, ..shop.settings.clone() };
    let store = Store::new(shop.store().dir().to_owned(), Client::new(settings));
    store.open(&ModelSource::parse(source).unwrap(), &|_| ())
}

#[track_caller]
fn check_offline(shop: &Shop, source: &str, expected: &[u8]) -> Opened {
    let opened = open_offline(shop, source).unwrap();
    assert!(std::fs::read(&opened.path).unwrap() == expected, "{source}: another model");
    opened
}

#[track_caller]
fn check_not_here(shop: &Shop, source: &str) {
    let error = open_offline(shop, source).unwrap_err();
    assert!(matches!(error, StoreError::NotHere { .. }), "{source}: {error}");
}

fn fallbacks(shop: &Shop) -> Vec<String> {
    let why = |event: Event| if let Event::Fallback { why } = event { Some(why) } else { None };
    std::mem::take(&mut *shop.events.lock().unwrap()).into_iter().filter_map(why).collect()
}

#[test]
fn what_stands_behind_an_address_may_name_the_file() {
    let one = std::fs::read(abacus()).unwrap();
    let mut two = one.clone();
    *two.last_mut().unwrap() ^= 1;
    for tag in ["W/\"weak\"", "\"same\""] {
        let shop = Shop::of(&[("dl?id=1", &one), ("dl?id=2", &two), ("dl?sig=a", &one), ("dl?sig=b", &one)]);
        let url = |query: &str| format!("{}/web/dl{query}", shop.server.url());
        let (first, second) = (url("?id=1"), url("?id=2"));
        shop.server.faults(move |_| Some(Fault::Tag(tag)));
        shop.check(&first, &one);
        let opened = shop.check(&second, &two);
        assert!(!opened.location.as_ref().unwrap().is_public);
        let folder = opened.path.parent().unwrap().to_owned();
        drop(opened);
        let noted = std::fs::read_to_string(folder.join("model.json")).unwrap();
        assert!(!noted.contains("id=2"), "{noted}");

        check_offline(&shop, &first, &one);
        check_offline(&shop, &second, &two);
        ["", "?id=3", "?id=1&x"].iter().for_each(|query| check_not_here(&shop, &url(query)));
        shop.server.faults(|_| Some(Fault::Status(503, "")));
        shop.check(&second, &two);
        shop.check(&first, &one);
        let prune =
            |name: String| shop.store().prune(&Prune { names: vec![name], is_dry_run: true, ..Prune::default() });
        let named = prune(second).unwrap();
        assert!(named.len() == 1 && folder.ends_with(&named[0].id), "{named:?}");
        let error = prune(url("")).unwrap_err().to_string();
        assert!(error.contains("several") && error.contains(&named[0].id), "{error}");

        // A signature that changes is as good as another file.
        shop.server.faults(move |_| Some(Fault::Tag(tag)));
        let (signed, again) = (shop.check(&url("?sig=a"), &one), shop.check(&url("?sig=b"), &one));
        assert_ne!(signed.path, again.path);
    }
}

#[test]
fn entries_of_addresses_with_a_key_that_nobody_noted_are_of_those_without() {
    let model = std::fs::read(abacus()).unwrap();
    let shop = Shop::of(&[("m.gguf", &model)]);
    let url = format!("{}/web/m.gguf", shop.server.url());
    let path = shop.check(&format!("{url}?key=1"), &model).path;
    check_not_here(&shop, &url);
    edit(&path, |noted| drop(noted["origin"]["web"].as_object_mut().unwrap().remove("query_sha256").unwrap()));
    check_offline(&shop, &url, &model);
    check_not_here(&shop, &format!("{url}?key=1"));
}

#[test]
fn a_branch_that_moved_back_is_where_it_is() {
    let (one, two) = (bytes(1, N), bytes(2, N));
    let shop = Shop::of(&[("m-Q8_0.gguf", &one)]);
    let path = shop.check(HUB, &one).path;
    // Long before the other one.
    edit(&path, |noted| noted["added"] = 1.into());
    shop.server.publish(SECOND, &[("m-Q8_0.gguf", &two)], sha256);
    shop.check(HUB, &two);
    check_offline(&shop, HUB, &two);
    check_offline(&shop, &format!("{HUB}@{COMMIT}"), &one);
    let sources: Vec<_> = shop.store().list().unwrap().into_iter().map(|model| model.source).collect();
    assert!(sources.contains(&HUB.to_owned()) && sources.contains(&format!("{HUB}@{COMMIT}")), "{sources:?}");
    shop.server.publish(COMMIT, &[("m-Q8_0.gguf", &one)], sha256);
    shop.check(HUB, &one);
    check_offline(&shop, HUB, &one);
    check_offline(&shop, &format!("{HUB}@{SECOND}"), &two);
}

#[test]
fn other_files_of_a_branch_stay_its_own_until_they_change() {
    let model = |seed| bytes(seed, N);
    let shop = Shop::of(&[("a-Q8_0.gguf", &model(1)), ("b-Q4_0.gguf", &model(2)), ("c-Q6_K.gguf", &model(3))]);
    for (quant, seed) in [("Q8_0", 1), ("Q4_0", 2), ("Q6_K", 3)] {
        shop.check(&format!("hf:x/y:{quant}"), &model(seed));
        shop.check(&format!("hf:x/z:{quant}"), &model(seed));
    }
    // One is called otherwise, one is as it was, and one is another.
    let files: [(&str, &[u8]); 3] =
        [("new-Q8_0.gguf", &model(1)), ("b-Q4_0.gguf", &model(2)), ("c-Q6_K.gguf", &model(4))];
    shop.server.publish(SECOND, &files, sha256);
    shop.check("hf:x/y:Q8_0", &model(1));
    assert!(check_offline(&shop, "hf:x/y:Q8_0", &model(1)).path.ends_with("new-Q8_0.gguf"));
    check_offline(&shop, "hf:x/y:Q4_0", &model(2));
    check_not_here(&shop, "hf:x/y:Q6_K");
    check_offline(&shop, &format!("hf:x/y:Q6_K@{COMMIT}"), &model(3));
    check_offline(&shop, &format!("hf:x/y:a-Q8_0.gguf@{COMMIT}"), &model(1));
    // Of another repository nothing was heard.
    check_offline(&shop, "hf:x/z:Q6_K", &model(3));
    // Nor is anything forgotten that was not replaced.
    let shop = Shop::of(&[("a-Q8_0.gguf", &model(1))]);
    shop.check("hf:x/y", &model(1));
    shop.server.publish(SECOND, &files[..1], sha256);
    shop.server.faults(|asked| asked.is_file().then_some(Fault::Status(404, "")));
    shop.check_error("hf:x/y", &["is not there (404)"]);
    check_offline(&shop, "hf:x/y", &model(1));
}

#[test]
fn what_is_here_will_do_where_a_newer_one_cannot_be_had() {
    let (one, two) = (bytes(1, N), bytes(2, N));
    let mut shop = Shop::of(&[("m-Q8_0.gguf", &one)]);
    shop.check(HUB, &one);
    shop.server.publish(SECOND, &[("m-Q8_0.gguf", &two)], sha256);
    fallbacks(&shop);
    shop.server.faults(|asked| asked.is_file().then_some(Fault::Status(503, "")));
    shop.check(HUB, &one);
    let why = fallbacks(&shop);
    assert!(why.len() == 1 && why[0].ends_with("is busy (503)"), "{why:?}");
    shop.server.faults(|_| None);
    shop.settings.limits.reserve_bytes = u64::MAX / 2;
    shop.check(HUB, &one);
    let why = fallbacks(&shop);
    assert!(why.len() == 1 && why[0].contains("needs") && why[0].contains("are to stay free"), "{why:?}");
    shop.settings.limits.reserve_bytes = 0;
    shop.check(HUB, &two);
    assert!(fallbacks(&shop).is_empty());
    // Nothing is here of another one.
    shop.server.faults(|asked| asked.is_file().then_some(Fault::Status(503, "")));
    shop.check_error("hf:someone/else", &["busy (503)"]);
}

#[test]
fn a_model_is_used_until_it_is_let_go_of() {
    let model = bytes(1, N);
    let shop = Shop::of(&[("m-Q8_0.gguf", &model)]);
    let by_source = shop.check(HUB, &model);
    let path = by_source.path.clone();
    let by_path = shop.store().open(&ModelSource::of(&path).unwrap(), &|_| ()).unwrap();
    let old = Prune { older_than_s: Some(3600), ..Prune::default() };
    for opened in [by_source, by_path] {
        // As if it had been opened long ago.
        edit(&path, |noted| noted["last_used"] = 1.into());
        drop(opened);
        assert_eq!(shop.store().prune(&old).unwrap(), []);
    }
    edit(&path, |noted| noted["last_used"] = 1.into());
    assert_eq!(shop.store().prune(&old).unwrap()[0].outcome, Outcome::Removed);
    let opened = shop.check(HUB, &model);
    std::fs::remove_dir_all(path.parent().unwrap()).unwrap();
    drop(opened);
    assert!(!path.parent().unwrap().exists(), "nothing is noted of what is gone");
}

#[cfg(unix)]
#[test]
fn a_directory_that_cannot_be_written_can_be_used() {
    let model = bytes(1, N);
    let shop = Shop::of(&[("m-Q8_0.gguf", &model)]);
    let id = shop.check(HUB, &model).path.parent().unwrap().file_name().unwrap().to_owned();
    let locks = shop.store().dir().join(".locks");
    let check = |in_use: bool| {
        let opened = check_offline(&shop, HUB, &model);
        shop.check(HUB, &model);
        let listed = shop.store().list().unwrap();
        assert!(listed.len() == 1 && listed[0].complete && listed[0].in_use == in_use, "{listed:?}");
        drop(opened);
        assert!(!shop.store().list().unwrap()[0].in_use);
    };
    // Root writes wherever it likes, but no one writes a folder like a file: this lock can only be read.
    std::fs::remove_file(locks.join(&id)).unwrap();
    std::fs::create_dir(locks.join(&id)).unwrap();
    check(true);
    // And these cannot even be made.
    std::fs::remove_dir_all(&locks).unwrap();
    std::fs::write(&locks, "").unwrap();
    check(false);
}

#[test]
fn a_directory_that_cannot_be_read_is_not_empty() {
    let shop = Shop::of(&[]);
    assert_eq!(shop.store().list().unwrap(), []);
    check_not_here(&shop, HUB);
    std::fs::write(shop.store().dir(), "a file").unwrap();
    let errors = [
        shop.store().list().unwrap_err(),
        shop.store().prune(&Prune::default()).unwrap_err(),
        open_offline(&shop, HUB).unwrap_err(),
    ];
    for error in errors {
        assert!(matches!(error, StoreError::Io { .. }) && error.to_string().contains("cannot be used"), "{error}");
    }
}

#[test]
fn what_is_damaged_does_not_count() {
    let model = bytes(1, N);
    let shop = Shop::of(&[("m-Q8_0.gguf", &model)]);
    let n_here = || {
        let listed = shop.store().list().unwrap().remove(0);
        assert!(!listed.complete, "{listed:?}");
        listed.bytes_here
    };
    let path = shop.check(HUB, &model).path;
    std::fs::write(&path, &model[..N - 1]).unwrap();
    assert_eq!(n_here(), 0, "it is cut");
    std::fs::write(&path, [&model[..], b"x"].concat()).unwrap();
    assert_eq!(n_here(), 0, "it is too long");
    std::fs::remove_file(&path).unwrap();
    shop.server.faults(|asked| asked.range.filter(|range| range.0 >= 20_000).map(|_| Fault::Status(404, "")));
    shop.check_error(HUB, &["is not there (404)"]);
    let (n_whole, part) = (n_here(), path.with_file_name("m-Q8_0.gguf.part"));
    assert!(n_whole > 0);
    let journal = path.with_file_name("m-Q8_0.gguf.part.json");
    let noted = std::fs::read_to_string(&journal).unwrap();
    std::fs::write(&journal, noted.replace(&sha256(&model), &sha256(b"another"))).unwrap();
    assert_eq!(n_here(), 0, "bytes of another file");
    std::fs::write(&journal, noted).unwrap();
    assert_eq!(n_here(), n_whole);
    std::fs::write(&part, &model[..N / 2]).unwrap();
    assert_eq!(n_here(), 0, "they are not there");
}

#[test]
fn what_is_used_and_damaged_is_not_waited_for() {
    let model = bytes(1, N);
    let shop = Shop::of(&[("m-Q8_0.gguf", &model)]);
    let opened = shop.check(HUB, &model);
    std::fs::remove_file(&opened.path).unwrap();
    shop.events.lock().unwrap().clear();
    shop.check_error(HUB, &["m-Q8_0 is in use and damaged", "end the process"]);
    let events = std::mem::take(&mut *shop.events.lock().unwrap());
    assert!(!events.iter().any(|event| matches!(event, Event::Waiting { .. })), "nobody fetches it: {events:?}");
    drop(opened);
    shop.check(HUB, &model);
}

#[cfg(unix)]
#[test]
fn a_folder_may_be_on_another_disk() {
    let model = bytes(1, N);
    let shop = Shop::of(&[("m-Q8_0.gguf", &model)]);
    let path = shop.check(HUB, &model).path;
    let (folder, elsewhere) = (path.parent().unwrap(), tempfile::tempdir().unwrap());
    let moved = elsewhere.path().join(folder.file_name().unwrap());
    std::fs::rename(folder, &moved).unwrap();
    std::os::unix::fs::symlink(&moved, folder).unwrap();
    let sent = shop.server.n_bytes_sent();
    shop.check(HUB, &model);
    let opened = shop.store().open(&ModelSource::of(&path).unwrap(), &|_| ()).unwrap();
    let listed = shop.store().list().unwrap();
    assert!(listed.len() == 1 && listed[0].complete && listed[0].in_use, "{listed:?}");
    assert_eq!((shop.server.n_bytes_sent(), std::fs::read_dir(elsewhere.path()).unwrap().count()), (sent, 1));
    let named = Prune { names: vec!["m-Q8_0".to_owned()], ..Prune::default() };
    assert_eq!(shop.store().prune(&named).unwrap()[0].outcome, Outcome::InUse);
    drop(opened);
    assert_eq!(shop.store().prune(&named).unwrap()[0].outcome, Outcome::Removed);
    assert!(!folder.is_symlink() && !moved.exists() && shop.store().list().unwrap().is_empty());
}
