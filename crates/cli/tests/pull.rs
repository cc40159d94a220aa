//! `brigade pull`, `models`, and verbs that are given a source, against a hub on loopback that misbehaves.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

#[allow(dead_code, reason = "a part of what it can do is needed")]
#[path = "../../store/tests/support/server.rs"]
mod hub;
mod support;

use std::path::Path;
use std::process::{Command, Output};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use hub::{Fault, Server};
use ring::digest::{SHA256, digest};
use serde_json::Value;
use support::{Endpoint, Process, abacus, chat_body, eventually, quantised_abacus};

const SOURCE: &str = "hf:someone/abacus:F16";

fn hub() -> Server {
    let (f16, q8_0) = (std::fs::read(abacus()).unwrap(), std::fs::read(quantised_abacus()).unwrap());
    let hash = |bytes: &[u8]| digest(&SHA256, bytes).as_ref().iter().map(|byte| format!("{byte:02x}")).collect();
    Server::start(&[("abacus-F16.gguf", &f16), ("abacus-Q8_0.gguf", &q8_0)], hash)
}

/// A verb with a state directory of its own and this hub.
fn command(hub: &Server, state: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_brigade"));
    for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("BRIGADE_")) {
        command.env_remove(name);
    }
    command.args(args).env("HF_ENDPOINT", hub.url()).env("HF_TOKEN", "").env_remove("HF_HUB_OFFLINE");
    command.env("BRIGADE_STATE_DIR", state);
    command
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[track_caller]
fn ok(output: Output) -> String {
    assert!(output.status.success(), "{output:?}");
    text(&output.stdout)
}

fn models(hub: &Server, state: &Path) -> Vec<Value> {
    let listed: Value =
        serde_json::from_str(&ok(command(hub, state, &["models", "--json"]).output().unwrap())).unwrap();
    listed["models"].as_array().unwrap().clone()
}

#[test]
fn what_was_pulled_is_served_offline() {
    let (hub, dir) = (hub(), tempfile::tempdir().unwrap());
    let state = dir.path().join("state");
    // Every third answer breaks off somewhere.
    let state_of_random = AtomicU64::new(7);
    hub.faults(move |asked| {
        let step = |x: u64| Some(x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1));
        let random = state_of_random.fetch_update(Ordering::SeqCst, Ordering::SeqCst, step).unwrap_or(0) >> 33;
        (asked.is_bulk() && random.is_multiple_of(3)).then_some(Fault::Cut(100_000 + random % 1_000_000))
    });
    let n_bytes = std::fs::metadata(abacus()).unwrap().len();
    let pulled = command(&hub, &state, &["pull", SOURCE]).output().unwrap();
    let said = text(&pulled.stderr);
    assert!(said.contains("pulling abacus-F16 (") && said.contains("pulled abacus-F16"), "{said}");
    let path = ok(pulled).trim().to_owned();
    assert!(std::fs::read(&path).unwrap() == std::fs::read(abacus()).unwrap());
    assert_eq!(hub.n_bytes_sent(), n_bytes + 4, "each byte once");
    assert_eq!(ok(command(&hub, &state, &["pull", SOURCE]).output().unwrap()).trim(), path);
    let report: Value =
        serde_json::from_str(&ok(command(&hub, &state, &["pull", SOURCE, "--json"]).output().unwrap())).unwrap();
    assert_eq!((report["bytes"].as_u64(), report["path"].as_str()), (Some(n_bytes), Some(path.as_str())));

    // From here on there is no hub.
    hub.faults(|_| Some(Fault::Status(500, "")));
    let n_asked = hub.asked().len();
    let args =
        ["serve", SOURCE, "--offline", "--port", "0", "--listen", "127.0.0.1:0", "--threads", "1", "--state-dir"];
    let args = [&args[..], &[state.to_str().unwrap(), "--optimize", "memory"]].concat();
    let served = Process::spawn("served", dir.path(), &args);
    let endpoint = Endpoint::new(served.line("serving ").trim_end_matches("/v1"), None);
    eventually("readiness", || (endpoint.get("/ready").status == 200).then_some(()));
    let reply = endpoint.post("/v1/chat/completions", &chat_body("What is 17 + 25?")).ok();
    assert_eq!(
        reply["choices"][0]["message"]["content"].as_str().unwrap(),
        support::oracle::oracle().chat("What is 17 + 25?").text
    );
    assert_eq!(hub.asked().len(), n_asked, "offline nothing is asked for");

    // What is served is not pruned.
    let pruned = ok(command(&hub, &state, &["models", "prune", "--keep-bytes", "0B"]).output().unwrap());
    assert!(pruned.contains("in use"), "{pruned}");
    assert!(models(&hub, &state)[0]["in_use"] == true && Path::new(&path).exists());
    drop(served);
    let dry = ok(command(&hub, &state, &["models", "prune", "abacus-F16", "--dry-run"]).output().unwrap());
    assert!(dry.contains("would remove") && Path::new(&path).exists(), "{dry}");
    let table = ok(command(&hub, &state, &["models"]).output().unwrap());
    assert!(
        ["NAME", "abacus-F16", "10.0 MiB", "complete", "hf:someone/abacus:abacus-F16.gguf"]
            .iter()
            .all(|word| table.contains(word)),
        "{table}"
    );
    ok(command(&hub, &state, &["models", "prune", "abacus-F16"]).output().unwrap());
    assert!(models(&hub, &state).is_empty() && !Path::new(&path).exists());
}

#[test]
fn what_is_served_by_its_path_is_not_pruned() {
    let (hub, dir) = (hub(), tempfile::tempdir().unwrap());
    let state = dir.path().join("state");
    let path = ok(command(&hub, &state, &["pull", SOURCE]).output().unwrap()).trim().to_owned();
    let args = ["serve", &path, "--port", "0", "--listen", "127.0.0.1:0", "--threads", "1", "--state-dir"];
    let served = Process::spawn("served", dir.path(), &[&args[..], &[dir.path().to_str().unwrap()]].concat());
    served.line("serving ");
    let prune = ["models", "prune", "--older-than", "0s"];
    let pruned = ok(command(&hub, &state, &prune).output().unwrap());
    assert!(pruned.contains("in use, stays: abacus-F16-") && Path::new(&path).exists(), "{pruned}");
    drop(served);
    let pruned = ok(command(&hub, &state, &["models", "prune", SOURCE]).output().unwrap());
    assert!(pruned.contains("removed abacus-F16-") && !Path::new(&path).exists(), "by what was typed: {pruned}");
}

#[test]
fn a_pull_that_was_killed_goes_on() {
    let (hub, dir) = (hub(), tempfile::tempdir().unwrap());
    hub.faults(|asked| match asked.range {
        Some((_, last)) if last > 3 => Some(Fault::Drip(4 << 20, Duration::from_millis(5))),
        _ => None,
    });
    let mut first = command(&hub, dir.path(), &["pull", SOURCE]).spawn().unwrap();
    // Killed once the journal speaks of what is here: it is written every two seconds.
    let here = eventually("half a model", || {
        models(&hub, dir.path()).first()?["bytes_here"].as_u64().filter(|n| *n >= 4 << 20)
    });
    first.kill().unwrap();
    first.wait().unwrap();
    let listed = &models(&hub, dir.path())[0];
    assert!(listed["complete"] == false && listed["in_use"] == false, "{listed}");
    let sent = hub.n_bytes_sent();
    hub.faults(|_| None);
    ok(command(&hub, dir.path(), &["pull", SOURCE]).output().unwrap());
    let n_bytes = std::fs::metadata(abacus()).unwrap().len();
    // Some bytes were on their way to the process that was killed.
    assert!(hub.n_bytes_sent() - sent <= n_bytes - here + 1000, "what was here came again");
    let (listed, shown) = (models(&hub, dir.path()), std::fs::read(abacus()).unwrap());
    assert!(std::fs::read(listed[0]["path"].as_str().unwrap()).unwrap() == shown);
}

#[test]
fn verbs_take_sources_and_say_what_is_wrong_with_them() {
    let (hub, dir) = (hub(), tempfile::tempdir().unwrap());
    let run = |args: &[&str]| command(&hub, dir.path(), args).output().unwrap();
    let there: Value = serde_json::from_str(&ok(run(&["inspect", SOURCE, "--json"]))).unwrap();
    let here: Value = serde_json::from_str(&ok(run(&["inspect", abacus().to_str().unwrap(), "--json"]))).unwrap();
    assert_eq!(there, here);
    assert!(hub.n_bytes_sent() < 2 << 20 && models(&hub, dir.path()).is_empty(), "the header alone is read");
    let address = format!("{}/web/abacus-Q8_0.gguf", hub.url());
    ok(run(&["pull", &address, "--models-dir", dir.path().join("other").to_str().unwrap()]));
    assert!(models(&hub, dir.path()).is_empty());

    let said = |args: &[&str], code: i32| {
        let ended = run(args);
        assert_eq!(ended.status.code(), Some(code), "{args:?}: {ended:?}");
        let said = text(&ended.stderr);
        assert_eq!(said.trim_end().lines().count(), 1, "{said}");
        said
    };
    assert!(said(&["pull", "hf:someone/abacus:Q6_K"], 1).contains("no \"Q6_K\"; it has abacus-F16.gguf (10.0 MiB)"));
    assert!(said(&["pull", "hf:someone"], 2).contains("hf:OWNER/REPOSITORY"));
    assert!(said(&["pull", "http://example.com/m.gguf"], 2).contains("not encrypted"));
    assert!(said(&["pull", "m.gguf"], 1).contains("cannot read m.gguf"));
    assert_eq!(ok(run(&["pull", abacus().to_str().unwrap()])).trim(), abacus().to_str().unwrap());
    assert!(said(&["serve", "--offline", "--port", "0", "hf:someone/abacus:Q8_0"], 1).contains("runs offline"));
    assert!(said(&["models", "prune", "nothing"], 1).contains("no model here is called"));
    hub.faults(|_| Some(Fault::Status(401, "")));
    assert!(said(&["pull", SOURCE], 1).contains("set HF_TOKEN"));
    let bad = command(&hub, dir.path(), &["pull", SOURCE]).env("HF_ENDPOINT", "http://hub.example").output().unwrap();
    assert!(bad.status.code() == Some(2) && text(&bad.stderr).contains("HF_ENDPOINT"), "{bad:?}");
    let with_token = |args: &[&str]| command(&hub, dir.path(), args).env("HF_TOKEN", "hf_two\nlines").output().unwrap();
    let bad = with_token(&["pull", SOURCE]);
    let said = text(&bad.stderr);
    assert!(bad.status.code() == Some(2) && said.contains("HF_TOKEN has characters that no token has"), "{bad:?}");
    assert!(!said.contains("hf_two") && !said.contains("lines"), "{said}");
    // Who asks nobody needs neither a token nor a hub.
    ok(with_token(&["models"]));
    ok(with_token(&["inspect", abacus().to_str().unwrap()]));
    for args in [["models", "--json"], ["inspect", abacus().to_str().unwrap()]] {
        ok(command(&hub, dir.path(), &args).env("HF_ENDPOINT", "http://hub.example").output().unwrap());
    }
}
