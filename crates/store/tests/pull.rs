//! Models from servers, well-behaved and other ones.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use brigade_store::{DownloadError, Event, ModelSource, Outcome, Prune, StoreError, Token};
use support::{Asked, COMMIT, Fault, Shop, abacus, bytes, sha256};

const HUB: &str = "hf:someone/thing:m-Q8_0.gguf";
const N: usize = 150_000;

fn shop(seed: u64) -> (Shop, Vec<u8>) {
    let model = bytes(seed, N);
    (Shop::of(&[("m-Q8_0.gguf", &model)]), model)
}

#[test]
fn a_model_is_fetched_once_and_then_here() {
    let other = bytes(2, 1000);
    let model = bytes(1, N);
    let shop = Shop::of(&[
        ("README.md", b"words"),
        ("d/other-Q4_0.gguf", &other),
        ("m-Q8_0.gguf", &model),
        ("mmproj-F16.gguf", &other),
    ]);
    let opened = shop.check(HUB, &model);
    let location = opened.location.clone().unwrap();
    assert!(location.is_public && location.n_bytes() == N as u64);
    assert_eq!(location.parts[0].url, format!("{}/someone/thing/resolve/{COMMIT}/m-Q8_0.gguf", shop.server.url()));
    assert_eq!(location.parts[0].sha256.as_deref(), Some(sha256(&model).as_str()));
    assert_eq!(shop.server.n_bytes_sent(), N as u64 + 4, "the beginning and each byte once");
    let n_ranges = shop.server.asked().iter().filter(|asked| asked.is_bulk()).count();
    assert_eq!(n_ranges, N.div_ceil(20_000));

    let again = shop.check("hf:someone/thing:q8_0", &model);
    assert_eq!((again.path.clone(), again.location), (opened.path, Some(location)));
    shop.check("hf:someone/thing:d/other-Q4_0.gguf", &other);
    assert_eq!(shop.server.n_bytes_sent(), N as u64 + 4 + 1000 + 4);
    shop.check_error("hf:someone/thing:mmproj-F16.gguf", &["someone/thing", "projector"]);
    shop.check_error("hf:someone/thing:Q6_K", &["no \"Q6_K\"", "m-Q8_0.gguf", "d/other-Q4_0.gguf"]);
    let events = shop.events.lock().unwrap();
    let is_ready = |is_new: bool| Event::Ready { name: "m-Q8_0".to_owned(), is_new };
    assert!(events.contains(&is_ready(true)) && events.contains(&is_ready(false)));
}

#[test]
fn a_split_model_comes_whole() {
    let (one, two) = (bytes(1, 50_000), bytes(2, 30_000));
    let shop = Shop::of(&[("q/m-Q4_0-00001-of-00002.gguf", &one), ("q/m-Q4_0-00002-of-00002.gguf", &two)]);
    let opened = shop.check("hf:a/b", &one);
    assert_eq!(opened.path.file_name().unwrap(), "m-Q4_0-00001-of-00002.gguf");
    assert!(std::fs::read(opened.path.with_file_name("m-Q4_0-00002-of-00002.gguf")).unwrap() == two);
    assert_eq!(opened.location.unwrap().parts.len(), 2);
}

#[test]
fn connections_that_break_cost_no_byte_twice() {
    for seed in 1..=5 {
        let (shop, model) = shop(seed);
        let state = AtomicU64::new(seed);
        shop.server.faults(move |asked| {
            let step = |x: u64| Some(x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1));
            let random = state.fetch_update(Ordering::SeqCst, Ordering::SeqCst, step).unwrap_or(0) >> 33;
            // Never less than what counts as progress, so that it gets on however often it breaks.
            (asked.is_bulk() && !random.is_multiple_of(3)).then_some(Fault::Cut(1000 + random % 19_000))
        });
        shop.check(HUB, &model);
        assert_eq!(shop.server.n_bytes_sent(), N as u64 + 4, "seed {seed}");
    }
}

#[test]
fn what_is_here_stays_when_a_pull_fails() {
    let (shop, model) = shop(1);
    shop.server.faults(|asked| asked.range.filter(|range| range.0 >= 80_000).map(|_| Fault::Status(404, "")));
    shop.check_error(HUB, &["is not there (404)"]);
    let listed = shop.store().list().unwrap().remove(0);
    assert!(!listed.complete && listed.bytes_here > 0 && listed.bytes == Some(N as u64), "{listed:?}");
    let mut shop = shop.offline();
    shop.check_error(HUB, &["is not complete in", "runs offline", "the rest first: brigade pull hf:someone/thing"]);
    shop.settings.is_offline = false;
    shop.server.faults(|_| None);
    let before = shop.server.n_bytes_sent();
    shop.check(HUB, &model);
    let sent = shop.server.n_bytes_sent() - before;
    assert_eq!(sent, N as u64 - listed.bytes_here + 4);
}

#[test]
fn wrong_bytes_are_not_kept() {
    let (shop, model) = shop(1);
    shop.server.faults(|asked| (asked.range == Some((40_000, 59_999))).then_some(Fault::WrongByte));
    let error = shop.open(HUB).unwrap_err();
    assert!(matches!(error, StoreError::Download(DownloadError::WrongBytes { .. })), "{error}");
    assert!(error.to_string().contains(&sha256(&model)) && error.to_string().contains("were removed"), "{error}");
    assert_eq!(shop.store().list().unwrap()[0].bytes_here, 0);
    shop.server.faults(|_| None);
    shop.check(HUB, &model);
}

#[test]
fn another_range_than_was_asked_for_is_refused() {
    let (shop, model) = shop(1);
    let n_wrong = AtomicUsize::new(0);
    shop.server.faults(move |asked| {
        let is_first = asked.is_bulk() && n_wrong.fetch_add(1, Ordering::SeqCst) == 0;
        is_first.then_some(Fault::Shifted)
    });
    shop.check(HUB, &model);
    let (shop, _) = self::shop(2);
    shop.server.faults(|asked| asked.is_bulk().then_some(Fault::Shifted));
    shop.check_error(HUB, &["sent \"bytes ", "in place of the bytes from"]);
}

#[test]
fn a_server_that_drips_is_given_up() {
    let (mut shop, model) = shop(1);
    shop.settings.limits.request_time = Duration::from_millis(100);
    shop.server.faults(|asked| asked.is_bulk().then_some(Fault::Drip(3, Duration::from_millis(20))));
    let started = Instant::now();
    shop.check_error(HUB, &["broke off"]);
    assert!(started.elapsed() < Duration::from_secs(10), "{:?}", started.elapsed());
    // A slow one that moves on is not.
    shop.server.faults(|asked| asked.is_bulk().then_some(Fault::Drip(3000, Duration::from_millis(20))));
    shop.check(HUB, &model);
}

#[test]
fn who_may_not_read_is_told_what_to_do() {
    let (shop, _) = shop(1);
    shop.server.faults(|_| Some(Fault::Status(401, "")));
    shop.check_error(HUB, &["401", "set HF_TOKEN"]);
    let shop = shop.with_token("wrong");
    shop.check_error(HUB, &["401", "the token in HF_TOKEN may not read"]);
    let mut shop = shop;
    shop.settings.token = Token::new("wrong", "/secrets/token").unwrap();
    shop.check_error(HUB, &["401", "the token in /secrets/token may not read"]);
    shop.server.faults(|asked| asked.is_file().then_some(Fault::Status(403, "")));
    shop.check_error(HUB, &["403", "licence"]);
    shop.server.faults(|_| Some(Fault::Status(404, "")));
    shop.check_error(HUB, &["is not there (404)", "names of the repository"]);
    assert!(shop.server.asked().len() <= 9, "none of it is worth another try");
}

#[test]
fn a_busy_server_is_left_alone_for_as_long_as_it_wants() {
    let (shop, model) = shop(1);
    shop.server
        .faults(|asked| [429, 500, 503].get(asked.no).map(|status| Fault::Status(*status, "retry-after: 0\r\n")));
    shop.check(HUB, &model);
    let (shop, model) = self::shop(2);
    shop.server.faults(|asked| (asked.no == 0).then_some(Fault::Status(429, "retry-after: 1\r\n")));
    let started = Instant::now();
    shop.check(HUB, &model);
    assert!(started.elapsed() >= Duration::from_secs(1));
    let why = shop.events.lock().unwrap().iter().find_map(|event| match event {
        Event::Retrying { why, .. } => Some(why.clone()),
        _ => None,
    });
    let why = why.unwrap();
    assert!(why.ends_with("is busy (429) and wants to be left alone for 1 s"), "no advice while it is tried: {why}");
    let (shop, _) = self::shop(3);
    shop.server.faults(|_| Some(Fault::Status(429, "retry-after: 3600\r\n")));
    shop.check_error(HUB, &["busy (429)", "3600 s"]);
    assert_eq!(shop.server.asked().len(), 1, "nobody waits for an hour");
    let (shop, _) = self::shop(4);
    shop.server.faults(|_| Some(Fault::Status(500, "")));
    shop.check_error(HUB, &["busy (500)", "try again later"]);
    assert_eq!(shop.server.asked().len(), 4);
}

#[test]
fn a_server_may_permit_few_connections() {
    let (shop, model) = shop(1);
    let refused = AtomicUsize::new(0);
    // Of all that begin at once only one is let in; the others do not come again.
    shop.server.faults(move |asked| match asked.range {
        Some((first, _)) if first > 0 && refused.load(Ordering::SeqCst) < 3 => {
            refused.fetch_add(1, Ordering::SeqCst);
            Some(Fault::Status(429, "retry-after: 3600\r\n"))
        }
        Some((0, last)) if last > 3 => Some(Fault::Drip(10_000, Duration::from_micros(10))),
        _ => None,
    });
    shop.check(HUB, &model);
}

#[test]
fn servers_without_ranges_or_lengths_will_do() {
    let model = std::fs::read(abacus()).unwrap();
    let files = [("abacus.gguf", &model[..])];
    for (name, fault) in [("whole", Fault::Whole), ("chunked", Fault::Chunked(None))] {
        let shop = Shop::of(&files);
        shop.server.faults(move |asked| asked.is_file().then(|| fault.clone()));
        shop.check(&format!("{}/web/abacus.gguf", shop.server.url()), &model);
        shop.check("hf:a/b", &model);
        let listed = shop.store().list().unwrap();
        assert!(listed.len() == 2 && listed.iter().all(|model| model.complete), "{name}: {listed:?}");
        let shop = shop.offline();
        shop.check(&format!("{}/web/abacus.gguf", shop.server.url()), &model);
    }
    // Cut in the middle: told by the end of the chunks that does not come, and begun again.
    let shop = Shop::of(&files);
    let n_cut = AtomicUsize::new(0);
    shop.server.faults(move |asked| {
        let is_cut = asked.is_bulk() && n_cut.fetch_add(1, Ordering::SeqCst) < 2;
        Some(Fault::Chunked(is_cut.then_some(100_000)))
    });
    shop.check(&format!("{}/web/abacus.gguf", shop.server.url()), &model);
}

#[test]
fn a_whole_file_in_place_of_a_range_begins_anew() {
    let (shop, model) = shop(1);
    shop.server.faults(|asked| asked.range.is_none_or(|range| range.0 >= 60_000).then_some(Fault::Whole));
    shop.check(HUB, &model);
}

#[test]
fn a_file_without_a_hash_must_be_a_whole_model() {
    let model = std::fs::read(abacus()).unwrap();
    let shop = Shop::of(&[("abacus.gguf", &model[..model.len() / 2])]);
    let url = format!("{}/web/abacus.gguf", shop.server.url());
    shop.check_error(&url, &["damaged and was removed"]);
    assert_eq!(shop.store().list().unwrap()[0].bytes_here, 0);
    let page = Shop::of(&[("m.gguf", b"<html>Sign in</html>")]);
    page.check_error(&format!("{}/web/m.gguf", page.server.url()), &["no GGUF file", "page about the model"]);
    page.check_error("hf:a/b", &["no GGUF file"]);
}

#[test]
fn what_the_token_opened_is_not_for_others() {
    let model = std::fs::read(abacus()).unwrap();
    let files = [("abacus.gguf", &model[..])];
    let is_public = |shop: &Shop, server: &support::Server| {
        let url = format!("{}/web/abacus.gguf", server.url());
        shop.open(&url).unwrap().location.unwrap().is_public
    };
    let shop = Shop::of(&files);
    assert!(is_public(&shop, &shop.server), "nobody was asked with a token");
    let (shop, other) = (Shop::of(&files).with_token("secret"), support::Server::start(&files, sha256));
    assert!(!is_public(&shop, &shop.server), "the hub was");
    assert!(is_public(&shop, &other), "another server is not");
    let (shop, other) = (Shop::of(&files).with_token("secret"), support::Server::start(&files, sha256));
    let hub = shop.server.url().to_owned();
    other.faults(move |_| Some(Fault::Redirect(hub.clone())));
    assert!(!is_public(&shop, &other), "it led to the hub");
}

#[test]
fn a_token_goes_to_the_hub_alone() {
    let model = bytes(1, N);
    let storage = support::Server::start(&[("m-Q8_0.gguf", &model)], sha256);
    let shop = Shop::of(&[("m-Q8_0.gguf", &model)]).with_token("secret");
    let to = storage.url().to_owned();
    shop.server.faults(move |asked| asked.is_file().then(|| Fault::Redirect(to.clone())));
    shop.check(HUB, &model);
    let at_hub = shop.server.asked();
    assert!(at_hub.iter().all(|asked| asked.token.as_deref() == Some("secret")), "{at_hub:?}");
    let at_storage = storage.asked();
    assert!(at_storage.iter().all(|asked| asked.token.is_none()), "{at_storage:?}");
    // An address that was signed for one range is used for that alone.
    assert_eq!(at_hub.iter().filter(|asked| asked.is_file()).count(), at_storage.len());
    let mut other = Shop::of(&[("abacus.gguf", &std::fs::read(abacus()).unwrap())]);
    other.settings = shop.settings.clone();
    other.open(&format!("{}/web/abacus.gguf", other.server.url())).unwrap();
    assert!(other.server.asked().iter().all(|asked| asked.token.is_none()), "another server's address");
}

#[test]
fn a_storage_that_says_no_once_is_asked_again_by_way_of_the_hub() {
    let model = bytes(1, N);
    let storage = support::Server::start(&[("m-Q8_0.gguf", &model)], sha256);
    let shop = Shop::of(&[("m-Q8_0.gguf", &model)]);
    let to = storage.url().to_owned();
    shop.server.faults(move |asked| asked.is_file().then(|| Fault::Redirect(to.clone())));
    storage.faults(|asked| (asked.no % 3 == 1).then_some(Fault::Status(403, "")));
    shop.check(HUB, &model);
    let fresh = Shop::of(&[("m-Q8_0.gguf", &model)]);
    fresh.server.faults(|asked| asked.is_file().then(|| Fault::Redirect(String::from("http://elsewhere.invalid"))));
    fresh.check_error(HUB, &["points to", "not encrypted"]);
    fresh.server.faults(|asked| asked.is_file().then(|| Fault::Redirect(String::new())));
    fresh.check_error(HUB, &["one redirect too many"]);
}

#[test]
fn a_file_that_changes_in_the_middle_begins_anew() {
    let model = std::fs::read(abacus()).unwrap();
    let shop = Shop::of(&[("abacus.gguf", &model)]);
    let url = format!("{}/web/abacus.gguf", shop.server.url());
    let n_asked = AtomicUsize::new(0);
    shop.server.faults(move |_| (n_asked.fetch_add(1, Ordering::SeqCst) > 3).then_some(Fault::Tag("\"second\"")));
    shop.check(&url, &model);
    let shop = Shop::of(&[("abacus.gguf", &model)]);
    let url = format!("{}/web/abacus.gguf", shop.server.url());
    shop.server.faults(|asked| Some(Fault::Tag(["\"a\"", "\"b\""][asked.no % 2])));
    shop.check_error(&url, &["was changed on the server"]);
}

#[test]
fn tags_say_nothing_of_a_file_whose_sum_is_known() {
    let (shop, model) = shop(1);
    // As from several storages, each with tags of its own.
    shop.server.faults(|asked| match asked.range {
        Some((first, _)) if first >= 80_000 => Some(Fault::Status(404, "")),
        _ => Some(Fault::Tag(["\"a\"", "\"b\""][asked.no % 2])),
    });
    shop.check_error(HUB, &["is not there (404)"]);
    let n_here = shop.store().list().unwrap()[0].bytes_here;
    let before = shop.server.n_bytes_sent();
    shop.server.faults(|asked| Some(Fault::Tag(["\"c\"", "\"d\""][asked.no % 2])));
    shop.check(HUB, &model);
    assert_eq!(shop.server.n_bytes_sent() - before, N as u64 - n_here + 4, "no byte twice");
    let asked = shop.server.asked();
    assert!(n_here > 0 && asked.iter().all(|asked| asked.if_range.is_none()), "{asked:?}");
}

#[test]
fn strange_lists_are_refused() {
    let (shop, _) = shop(1);
    let answers = |path: &'static str, body: Vec<u8>, headers: &'static str| {
        shop.server.faults(move |asked: &Asked| asked.path.contains(path).then(|| Fault::Body(body.clone(), headers)));
    };
    answers("/revision/", b"<html>".to_vec(), "");
    shop.check_error(HUB, &["no list of a repository's files", "HF_ENDPOINT"]);
    answers("/tree/", b"{}".to_vec(), "");
    shop.check_error(HUB, &["no list of a repository's files"]);
    answers("/tree/", b"[]".to_vec(), "");
    shop.check_error(HUB, &["no GGUF model"]);
    answers("/tree/", vec![b'['; 5 << 20], "");
    shop.check_error(HUB, &["larger than the limit of 4194304 bytes"]);
    answers("/tree/", b"[]".to_vec(), "link: <http://127.0.0.1:1/x>; rel=\"next\"\r\n");
    shop.check_error(HUB, &["on another server"]);
    let next = format!("link: <{}/api/models/a/b/tree/x>; rel=\"next\"\r\n", shop.server.url());
    answers("/tree/", b"[]".to_vec(), Box::leak(next.into_boxed_str()));
    shop.check_error(HUB, &["the list of files is larger"]);
    let lies = format!(r#"[{{"type":"file","path":"m-Q8_0.gguf","size":{}}}]"#, N + 1);
    answers("/tree/", lies.into_bytes(), "");
    shop.check_error(HUB, &["has 150000 bytes, but the hub says 150001"]);
}

#[test]
fn two_pulls_share_one_download() {
    let (shop, model) = shop(1);
    shop.server.faults(|asked| asked.is_bulk().then_some(Fault::Drip(19_900, Duration::from_millis(3))));
    std::thread::scope(|scope| {
        let pulls: Vec<_> = (0..3).map(|_| scope.spawn(|| shop.check(HUB, &model))).collect();
        pulls.into_iter().for_each(|pull| drop(pull.join().unwrap()));
    });
    assert_eq!(shop.server.n_bytes_sent(), N as u64 + 4);
    let events = shop.events.lock().unwrap();
    let waits = |event: &&Event| matches!(event, Event::Waiting { n_bytes: Some(n), .. } if *n == N as u64);
    assert!(events.iter().any(|event| waits(&event)), "{events:?}");
}

#[test]
fn offline_what_is_here_is_used() {
    let (shop, model) = shop(1);
    shop.check(HUB, &model);
    let shop = shop.offline();
    let n_asked = shop.server.asked().len();
    for source in [HUB, "hf:someone/thing", "hf:someone/thing:q8_0", &format!("hf:someone/thing@{COMMIT}")] {
        shop.check(source, &model);
    }
    shop.check_error("hf:someone/thing@v2", &["runs offline", "brigade pull hf:someone/thing@v2"]);
    shop.check_error("hf:someone/other", &["runs offline"]);
    assert_eq!(shop.server.asked().len(), n_asked);
}

#[test]
fn without_a_network_what_is_here_is_used() {
    let (mut shop, model) = shop(1);
    shop.check(HUB, &model);
    shop.settings.endpoint = "http://127.0.0.1:1".to_owned();
    shop.check(HUB, &model);
    let events = shop.events.lock().unwrap();
    assert!(events.iter().any(|event| matches!(event, Event::Fallback { .. })), "{events:?}");
    drop(events);
    shop.check_error("hf:someone/other", &["cannot be reached"]);
}

#[test]
fn a_hub_that_says_nothing_is_not_waited_for_where_all_is_here() {
    let model = std::fs::read(abacus()).unwrap();
    let mut shop = Shop::of(&[("abacus-q8_0.gguf", &model)]);
    let url = format!("{}/web/abacus-q8_0.gguf", shop.server.url());
    let sources = ["hf:a/b", &url];
    sources.iter().for_each(|source| drop(shop.check(source, &model)));
    shop.settings.limits.request_time = Duration::from_secs(60);
    shop.server.faults(|_| Some(Fault::Silence(Duration::from_secs(60))));
    for source in sources {
        let (started, n_asked) = (Instant::now(), shop.server.asked().len());
        shop.events.lock().unwrap().clear();
        shop.check(source, &model);
        assert_eq!(shop.server.asked().len(), n_asked + 1, "{source}: asked once");
        let hears = |event| shop.events.lock().unwrap().push(event);
        shop.store().look(&ModelSource::parse(source).unwrap(), &hears).unwrap();
        assert!(started.elapsed() < Duration::from_secs(20), "{source}: {:?}", started.elapsed());
        let is_said =
            |event: &&Event| matches!(event, Event::Fallback { why } if why.contains("did not answer within"));
        assert_eq!(shop.events.lock().unwrap().iter().filter(is_said).count(), 2, "{source}: by open and by look");
    }
}

#[test]
fn a_header_is_looked_at_without_the_rest() {
    let model = std::fs::read(abacus()).unwrap();
    let catalog = brigade_gguf::ModelFile::open(abacus()).unwrap().catalog().clone();
    let shop = Shop::of(&[("abacus-q8_0.gguf", &model)]);
    let look = |shop: &Shop, source: &str| {
        let (name, found) = shop.store().look(&ModelSource::parse(source).unwrap(), &|_| ()).unwrap();
        assert!((name.as_str(), &found) == ("abacus-q8_0", &catalog), "{source}: {name}");
    };
    look(&shop, abacus().to_str().unwrap());
    assert_eq!(shop.server.asked().len(), 0);
    look(&shop, "hf:a/b");
    look(&shop, &format!("{}/web/abacus-q8_0.gguf", shop.server.url()));
    assert!(shop.server.n_bytes_sent() < model.len() as u64 / 2 && shop.store().list().unwrap().is_empty());
    // What is here needs no server.
    shop.check("hf:a/b", &model);
    let sent = shop.server.n_bytes_sent();
    look(&shop, "hf:a/b:Q8_0");
    let shop = shop.offline();
    look(&shop, "hf:a/b");
    assert_eq!(shop.server.n_bytes_sent(), sent);
}

#[test]
fn a_disk_that_is_too_full_is_noticed_before() {
    let (mut shop, _) = shop(1);
    shop.settings.limits.reserve_bytes = u64::MAX / 2;
    shop.check_error(HUB, &["m-Q8_0 needs 146.5 KiB more", "brigade models prune", "--models-dir"]);
    assert_eq!((shop.server.n_bytes_sent(), shop.store().list().unwrap()), (0, vec![]), "nothing was written");
    // Nor does a file without a length fill it.
    let model = std::fs::read(abacus()).unwrap();
    let mut shop = Shop::of(&[("abacus.gguf", &model)]);
    shop.settings.limits.reserve_bytes = u64::MAX / 2;
    shop.server.faults(|_| Some(Fault::Chunked(None)));
    shop.check_error(&format!("{}/web/abacus.gguf", shop.server.url()), &["goes on, and the disk has", "--models-dir"]);
    assert_eq!(shop.store().list().unwrap()[0].bytes_here, 0);
}

#[test]
fn what_is_in_use_is_not_pruned() {
    let (one, two) = (bytes(1, 10_000), bytes(2, 20_000));
    let shop = Shop::of(&[("a-Q8_0.gguf", &one), ("b-Q4_0.gguf", &two)]);
    let (a, b) = (shop.check("hf:x/y:Q8_0", &one), shop.check("hf:x/y:Q4_0", &two));
    let store = shop.store();
    let all = Prune { keep_bytes: Some(0), ..Prune::default() };
    let outcomes = |prune: &Prune| {
        let mut pruned = store.prune(prune).unwrap();
        pruned.sort_by(|a, b| a.name.cmp(&b.name));
        pruned.into_iter().map(|pruned| (pruned.name, pruned.outcome)).collect::<Vec<_>>()
    };
    drop(b);
    let dry = Prune { is_dry_run: true, ..all.clone() };
    assert_eq!(outcomes(&dry), [("a-Q8_0".to_owned(), Outcome::InUse), ("b-Q4_0".to_owned(), Outcome::WouldBeRemoved)]);
    assert_eq!(store.list().unwrap().len(), 2);
    assert_eq!(outcomes(&all), [("a-Q8_0".to_owned(), Outcome::InUse), ("b-Q4_0".to_owned(), Outcome::Removed)]);
    let left = store.list().unwrap();
    assert!(
        left.len() == 1 && left[0].in_use && left[0].complete && left[0].source == "hf:x/y:a-Q8_0.gguf",
        "{left:?}"
    );
    drop(a);
    let named = |name: &str| Prune { names: vec![name.to_owned()], ..Prune::default() };
    assert!(matches!(store.prune(&named("c")), Err(StoreError::UnknownName { .. })));
    assert_eq!(outcomes(&named("a-Q8_0")), [("a-Q8_0".to_owned(), Outcome::Removed)]);
    assert_eq!(store.list().unwrap(), []);
}

#[test]
fn a_model_that_is_named_by_its_path_is_in_use_too() {
    let (shop, model) = shop(1);
    let path = shop.check(HUB, &model).path;
    let store = shop.store();
    let links = tempfile::tempdir().unwrap();
    let link = links.path().join("linked.gguf");
    #[cfg(unix)]
    std::os::unix::fs::symlink(&path, &link).unwrap();
    let entry = path.with_file_name("model.json");
    let all = Prune { older_than_s: Some(0), ..Prune::default() };
    let paths = if cfg!(unix) { vec![&path, &link] } else { vec![&path] };
    for path in paths {
        // As if it had been used long ago.
        let mut noted: serde_json::Value = serde_json::from_slice(&std::fs::read(&entry).unwrap()).unwrap();
        noted["last_used"] = 1.into();
        std::fs::write(&entry, serde_json::to_vec(&noted).unwrap()).unwrap();
        let opened = store.open(&ModelSource::of(path).unwrap(), &|_| ()).unwrap();
        assert_eq!((&opened.path, &opened.location), (path, &None), "used as it was named");
        let listed = store.list().unwrap().remove(0);
        assert!(listed.in_use && listed.last_used > 1, "{listed:?}");
        assert_eq!(store.prune(&all).unwrap()[0].outcome, Outcome::InUse);
    }
    assert_eq!(store.prune(&all).unwrap()[0].outcome, Outcome::Removed);
    // Elsewhere nothing is left beside a file, and whether there is one is for others to say.
    let (dir, missing) = (tempfile::tempdir().unwrap(), path);
    let file = dir.path().join("d/m.gguf");
    std::fs::create_dir(dir.path().join("d")).unwrap();
    std::fs::write(&file, &model).unwrap();
    for path in [&file, &missing] {
        assert_eq!(&store.open(&ModelSource::of(path).unwrap(), &|_| ()).unwrap().path, path);
    }
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
}

#[test]
fn models_are_pruned_by_what_they_were_asked_for_as() {
    let (one, two) = (bytes(1, 10_000), bytes(2, 20_000));
    let shop = Shop::of(&[("a-Q8_0.gguf", &one), ("b-Q4_0.gguf", &two)]);
    let store = shop.store();
    let url = format!("{}/web/b-Q4_0.gguf?key=secret", shop.server.url());
    for (source, file) in [("hf:x/y:q8_0", &one), ("hf:X/y:a-Q8_0.gguf", &one), ("hf:x/y", &two)] {
        shop.check(source, file);
        let prune = Prune { names: vec![source.to_owned()], ..Prune::default() };
        let pruned = store.prune(&prune).unwrap();
        assert!(pruned.len() == 1 && pruned[0].outcome == Outcome::Removed, "{source}: {pruned:?}");
        assert_eq!(store.list().unwrap(), [], "{source}");
    }
    ["hf:x/y:Q8_0", "hf:x/y:Q4_0"].iter().for_each(|source| drop(shop.open(source).unwrap()));
    let error = |name: &str| store.prune(&Prune { names: vec![name.to_owned()], ..Prune::default() }).unwrap_err();
    let several = error("hf:x/y").to_string();
    assert!(several.ends_with("name one of them: hf:x/y:a-Q8_0.gguf, hf:x/y:b-Q4_0.gguf"), "{several}");
    for none in ["hf:x/y:Q6_K", "hf:x/z", "hf:x/y@v2", "hf:x", url.as_str(), "a.gguf"] {
        assert!(matches!(error(none), StoreError::UnknownName { .. }), "{none}");
    }
    assert_eq!(store.list().unwrap().len(), 2);
}

#[test]
fn what_others_keep_beside_models_stays() {
    let (shop, _) = shop(1);
    let opened = shop.open(HUB).unwrap();
    let (folder, store) = (opened.path.parent().unwrap().to_owned(), shop.store());
    drop(opened);
    let notes = folder.join("notes.txt");
    let foreign = store.dir().join("llamas-0123456789ab/llama.gguf.d/llama.gguf");
    for file in [&notes, &foreign, &store.dir().join("mine/m.gguf")] {
        std::fs::create_dir_all(file.parent().unwrap()).unwrap();
        std::fs::write(file, "mine").unwrap();
    }
    let names = vec!["m-Q8_0".to_owned()];
    for prune in [
        Prune { older_than_s: Some(0), ..Prune::default() },
        Prune { keep_bytes: Some(0), ..Prune::default() },
        Prune::default(),
    ] {
        store.prune(&prune).unwrap();
        assert!(notes.exists() && foreign.exists() && store.dir().join("mine/m.gguf").exists(), "{prune:?}");
    }
    assert!(!folder.join("m-Q8_0.gguf").exists() && store.list().unwrap().is_empty());
    assert!(matches!(store.prune(&Prune { names, ..Prune::default() }), Err(StoreError::UnknownName { .. })));
}
