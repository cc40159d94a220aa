//! Plans for models on web servers, well-behaved and other ones: only headers are read, and errors say what to do.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

#[allow(dead_code, reason = "a part of what it can do is needed")]
#[path = "../../store/tests/support/server.rs"]
mod hub;
mod support;

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use brigade_gguf::{Builder, ModelFile, Value as GgufValue};
use serde_json::Value;
use support::encoder::write_bert;
use support::{abacus, run};

/// What lies on the server: the beginning, and how long the file is; behind the beginning are zeros.
type Files = HashMap<String, (Vec<u8>, u64)>;

/// Paths that were asked for, and the keys that came with them.
type Asked = Arc<Mutex<Vec<(String, Option<String>)>>>;

/// A server of files by range. The first part of a path says how it behaves, the rest names the file.
struct Server {
    url: String,
    n_bytes_sent: Arc<AtomicU64>,
    asked: Asked,
}

impl Server {
    fn start(files: Files) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let (n_bytes_sent, asked) = (Arc::new(AtomicU64::new(0)), Asked::default());
        let (sent, seen) = (Arc::clone(&n_bytes_sent), Arc::clone(&asked));
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                // One request for each connection. A client that has gone is no failure of the server's.
                let Some((path, range, key)) = request(&stream) else { continue };
                seen.lock().unwrap().push((path.clone(), key.clone()));
                let _ = answer(&stream, &files, &path, range, key.as_deref(), &sent);
            }
        });
        Self { url, n_bytes_sent, asked }
    }

    fn with_abacus() -> Self {
        Self::start(HashMap::from([("abacus.gguf".to_owned(), whole(std::fs::read(abacus()).unwrap()))]))
    }
}

fn whole(bytes: Vec<u8>) -> (Vec<u8>, u64) {
    let n_bytes = bytes.len() as u64;
    (bytes, n_bytes)
}

/// The path, the range, and the key.
fn request(stream: &TcpStream) -> Option<(String, (u64, u64), Option<String>)> {
    let mut lines = BufReader::new(stream).lines().map_while(Result::ok);
    let path = lines.next()?.split(' ').nth(1)?.to_owned();
    let (mut range, mut key) = ((0, u64::MAX - 1), None);
    for line in lines.take_while(|line| !line.is_empty()) {
        let (name, value) = line.split_once(": ")?;
        match name.to_ascii_lowercase().as_str() {
            "range" => {
                let (first, last) = value.strip_prefix("bytes=")?.split_once('-')?;
                range = (first.parse().ok()?, last.parse().ok()?);
            }
            "authorization" => key = Some(value.to_owned()),
            _ => {}
        }
    }
    Some((path, range, key))
}

fn answer(
    mut stream: &TcpStream,
    files: &Files,
    path: &str,
    (first, last): (u64, u64),
    key: Option<&str>,
    sent: &AtomicU64,
) -> std::io::Result<()> {
    let (how, name) = path.trim_start_matches('/').split_once('/').unwrap_or(("ok", ""));
    let name = name.rsplit('/').next().unwrap_or(name);
    let mut head =
        |status: &str, headers: &str| write!(stream, "HTTP/1.1 {status}\r\nconnection: close\r\n{headers}\r\n");
    match how {
        // As storages do whose addresses are signed: good for the range that was asked for, and for no other.
        "signed" => {
            let to = format!("location: /only-{first}-{last}/{name}\r\ncontent-length: 0\r\n");
            return head("302 Found", &to);
        }
        only if only.starts_with("only-") && only != format!("only-{first}-{last}") => {
            return head("403 Forbidden", "content-length: 0\r\n");
        }
        "moved" => return head("302 Found", &format!("location: /ok/{name}\r\ncontent-length: 0\r\n")),
        "round" => return head("302 Found", &format!("location: /round/{name}\r\ncontent-length: 0\r\n")),
        "nowhere" => return head("302 Found", "location: ftp://elsewhere/x\r\ncontent-length: 0\r\n"),
        "private" if key != Some("Bearer secret") => return head("401 Unauthorized", "content-length: 0\r\n"),
        "busy" => return head("503 Service Unavailable", "content-length: 0\r\n"),
        _ => {}
    }
    let Some((bytes, n_file_bytes)) = files.get(name) else { return head("404 Not Found", "content-length: 0\r\n") };
    if how == "whole" {
        return head("200 OK", &format!("content-length: {n_file_bytes}\r\n"));
    }
    if first >= *n_file_bytes {
        return head(
            "416 Range Not Satisfiable",
            &format!("content-range: bytes */{n_file_bytes}\r\ncontent-length: 0\r\n"),
        );
    }
    let last = if how == "crumbs" { first } else { last }.min(n_file_bytes - 1);
    let n_bytes = last - first + 1;
    let range = match how {
        "shifted" => format!("bytes {}-{}/{n_file_bytes}", first + 1, last + 1),
        "vague" => format!("bytes {first}-{last}/*"),
        _ => format!("bytes {first}-{last}/{n_file_bytes}"),
    };
    head("206 Partial Content", &format!("content-range: {range}\r\ncontent-length: {n_bytes}\r\n"))?;
    let mut body: Vec<u8> = bytes.iter().skip(first as usize).take(n_bytes as usize).copied().collect();
    body.resize(n_bytes as usize, 0);
    if how == "cut" {
        body.truncate(body.len() / 2);
    }
    sent.fetch_add(body.len() as u64, Ordering::Relaxed);
    stream.write_all(&body)
}

const NODES: [&str; 4] = ["--node", "a=1GiB", "--context", "1024"];

fn plan(model: &str) -> Value {
    serde_json::from_str(&run(&[&["plan", model, "--json"][..], &NODES].concat()).ok()).unwrap()
}

#[track_caller]
fn check_error(model: &str, expected: &[&str]) {
    let ended = run(&[&["plan", model][..], &NODES].concat());
    let is_one_line = ended.stderr.trim_end().lines().count() == 1;
    let says_all = expected.iter().all(|words| ended.stderr.contains(words));
    assert!(ended.code == Some(1) && is_one_line && says_all, "{expected:?}: {ended:?}");
}

#[test]
fn a_header_over_http_is_as_good_as_the_file() {
    let server = Server::with_abacus();
    let here = plan(abacus().to_str().unwrap());
    for how in ["ok", "moved"] {
        let there = plan(&format!("{}/{how}/abacus.gguf", server.url));
        assert_eq!(there["plan"], here["plan"], "{how}");
        assert_eq!(there["model"]["name"], "abacus");
        assert_eq!(there["model"]["bytes"], here["model"]["bytes"]);
    }
    let n_file_bytes = std::fs::metadata(abacus()).unwrap().len();
    let n_sent = server.n_bytes_sent.load(Ordering::Relaxed);
    assert!(n_sent < n_file_bytes / 4, "{n_sent} of {n_file_bytes} bytes were read");
}

#[test]
fn nothing_is_pulled_to_find_that_there_is_nothing_to_measure() {
    let dir = tempfile::tempdir().unwrap();
    let bert = std::fs::read(write_bert(dir.path(), false)).unwrap();
    let server = Server::start(Files::from([("bert.gguf".to_owned(), (bert, 64 << 20))]));
    let (url, state) = (format!("{}/ok/bert.gguf", server.url), dir.path().to_str().unwrap());
    let ended = run(&["profile", &url, "--state-dir", state]);
    assert!(ended.code == Some(1) && ended.stderr.contains("it takes each text whole"), "{ended:?}");
    let n_sent = server.n_bytes_sent.load(Ordering::Relaxed);
    assert!(n_sent < 8 << 20, "{n_sent} bytes were read");
}

/// A header of more than one range, at a hub whose storage signs addresses for one range each.
#[test]
fn each_range_is_asked_for_where_the_file_was_said_to_be() {
    let file = ModelFile::open(abacus()).unwrap();
    let mut metadata = file.catalog().metadata().clone();
    metadata.set("general.description", GgufValue::String("long ".repeat(120_000)));
    let mut builder = Builder::new(&metadata);
    for tensor in file.catalog().tensors() {
        builder.tensor(tensor.name.clone(), &tensor.dims, tensor.ty).unwrap();
    }
    let server = Server::start(Files::from([("long.gguf".to_owned(), (builder.header_bytes(), 64 << 20))]));
    let there = plan(&format!("{}/signed/long.gguf", server.url));
    assert_eq!(there["plan"], plan(abacus().to_str().unwrap())["plan"]);
    let asked = server.asked.lock().unwrap();
    let at_hub = asked.iter().filter(|(path, _)| path.starts_with("/signed")).count();
    assert!(at_hub > 1 && asked.len() == 2 * at_hub, "{asked:?}");
}

#[test]
fn a_split_model_is_put_together_from_all_headers() {
    let file = ModelFile::open(abacus()).unwrap();
    let catalog = file.catalog();
    let n_tensors = catalog.tensors().len();
    let mut files = Files::new();
    for (no, part) in catalog.tensors().chunks(n_tensors.div_ceil(3)).enumerate() {
        let mut metadata = if no == 0 { catalog.metadata().clone() } else { Default::default() };
        metadata.set("split.no", GgufValue::U16(no as u16));
        metadata.set("split.count", GgufValue::U16(3));
        metadata.set("split.tensors.count", GgufValue::I32(n_tensors as i32));
        let mut builder = Builder::new(&metadata);
        for tensor in part {
            builder.tensor(tensor.name.clone(), &tensor.dims, tensor.ty).unwrap();
        }
        let header = builder.header_bytes();
        files.insert(format!("m-{:05}-of-00003.gguf", no + 1), (header, 64 << 20));
    }
    let mut incomplete = files.clone();
    incomplete.remove("m-00003-of-00003.gguf");
    let server = Server::start(files);
    let there = plan(&format!("{}/ok/m-00002-of-00003.gguf", server.url));
    assert_eq!(there["plan"], plan(abacus().to_str().unwrap())["plan"]);

    let server = Server::start(incomplete);
    check_error(&format!("{}/ok/m-00001-of-00003.gguf", server.url), &["m-00003-of-00003.gguf is not there"]);
}

#[test]
fn the_hub_is_asked_with_its_token_and_nobody_else() {
    let model = std::fs::read(abacus()).unwrap();
    let files = [("abacus.gguf", &model[..])];
    let (storage, hub) =
        (hub::Server::start(&files, |_| "ab".repeat(32)), hub::Server::start(&files, |_| "ab".repeat(32)));
    let to = storage.url().to_owned();
    hub.faults(move |asked| match asked.token.as_deref() {
        Some("secret") => asked.is_file().then(|| hub::Fault::Redirect(to.clone())),
        _ => Some(hub::Fault::Status(401, "")),
    });
    let ask = |model: &str, endpoint: &str, token: &str| {
        Command::new(env!("CARGO_BIN_EXE_brigade"))
            .args(["plan", model, "--json"])
            .args(NODES)
            .env("HF_ENDPOINT", endpoint)
            .env("HF_TOKEN", token)
            .output()
            .unwrap()
    };
    for source in ["hf:someone/abacus", "hf:someone/abacus/abacus.gguf", "hf:someone/abacus:abacus.gguf@main"] {
        let found = ask(source, hub.url(), "secret");
        assert!(found.status.success(), "{found:?}");
    }
    for (token, expected) in [("", "set HF_TOKEN"), ("wrong", "the token in HF_TOKEN may not read")] {
        let refused = ask("hf:someone/abacus", hub.url(), token);
        let said = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert!(refused.status.code() == Some(1) && said.contains("401") && said.contains(expected), "{said}");
    }

    // An address of the hub's is the hub's, too; others get no token.
    let address = format!("{}/someone/abacus/resolve/{}/abacus.gguf", hub.url(), hub::COMMIT);
    assert!(ask(&address, hub.url(), "secret").status.success());
    let elsewhere = ask(&address, "https://hub.invalid", "secret");
    let said = String::from_utf8_lossy(&elsewhere.stderr).into_owned();
    assert!(elsewhere.status.code() == Some(1) && said.contains("HF_TOKEN goes to the hub alone"), "{said}");
    let asked = storage.asked();
    assert!(!asked.is_empty() && asked.iter().all(|asked| asked.token.is_none()), "{asked:?}");
}

#[test]
fn servers_that_misbehave_are_told_apart() {
    // The header of a file whose list of tokens has no end.
    let mut endless = b"GGUF".to_vec();
    endless.extend(3u32.to_le_bytes());
    endless.extend(0u64.to_le_bytes());
    endless.extend(1u64.to_le_bytes());
    endless.extend(1u64.to_le_bytes());
    endless.push(b'k');
    endless.extend(9u32.to_le_bytes());
    endless.extend(0u32.to_le_bytes());
    endless.extend((200u64 << 20).to_le_bytes());
    let server = Server::start(Files::from([
        ("abacus.gguf".to_owned(), whole(std::fs::read(abacus()).unwrap())),
        ("page.gguf".to_owned(), whole(b"<html>Sign in</html>".to_vec())),
        ("short.gguf".to_owned(), whole(std::fs::read(abacus()).unwrap()[..3000].to_vec())),
        ("empty.gguf".to_owned(), whole(Vec::new())),
        ("endless.gguf".to_owned(), (endless, 1 << 40)),
    ]));
    let cases = [
        ("ok/missing.gguf", &["is not there (404)", "repository"][..]),
        ("whole/abacus.gguf", &["knows no ranges", "brigade pull http://"]),
        ("private/abacus.gguf", &["401", "HF_TOKEN goes to the hub alone", "download the file"]),
        ("crumbs/abacus.gguf", &["bytes 0-0/", "in place of the bytes from 0"]),
        ("busy/abacus.gguf", &["503", "try again"]),
        ("cut/abacus.gguf", &["broke off after"]),
        ("shifted/abacus.gguf", &["in place of the bytes from 0"]),
        ("vague/abacus.gguf", &["in place of the bytes from 0"]),
        ("round/abacus.gguf", &["one redirect too many"]),
        ("nowhere/abacus.gguf", &["no address of a web server"]),
        ("ok/page.gguf", &["not a GGUF file"]),
        ("ok/short.gguf", &["ends inside its header", "download it again"]),
        ("ok/empty.gguf", &["ends inside its header"]),
        ("ok/endless.gguf", &["more than the limit", "no model file"]),
    ];
    // At once, since some are asked for again for seconds.
    std::thread::scope(|scope| {
        for (path, expected) in cases {
            let url = format!("{}/{path}", server.url);
            scope.spawn(move || check_error(&url, expected));
        }
        scope.spawn(|| check_error("http://127.0.0.1:1/m.gguf", &["cannot be reached"]));
    });
    let ended = run(&["plan", "hf:file.gguf"]);
    assert!(ended.code == Some(2) && ended.stderr.contains("hf:OWNER/REPOSITORY:FILE.gguf"), "{ended:?}");
}
