//! `brigade bench` against a real cluster, and against servers that are unlike one.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

use std::collections::HashSet;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::sync::atomic::{AtomicUsize, Ordering};

use serde_json::{Value, json};
use support::fake::{Fake, Say, models, refusal};
use support::{Setup, run};

/// The report of a measurement that must succeed.
#[track_caller]
fn measured(args: &[&str]) -> Value {
    serde_json::from_str(&run(&[&["bench", "--json"], args].concat()).ok()).unwrap()
}

/// Checks that a measurement fails with all of these words; what it says in all.
#[track_caller]
fn check_fails(args: &[&str], words: &[&str]) -> String {
    let ended = run(&[&["bench", "--runs", "1", "--tokens", "4", "--prompt-tokens", "8"], args].concat());
    assert_eq!(ended.code, Some(1), "{ended:?}");
    assert_eq!(ended.stderr.lines().count(), 1, "{ended:?}");
    assert!(words.iter().all(|word| ended.stderr.contains(word)), "{words:?}: {ended:?}");
    ended.stderr
}

/// All notes of a report.
fn notes(report: &Value) -> String {
    let notes = report["notes"].as_array().unwrap();
    notes.iter().map(|note| note.as_str().unwrap()).collect::<Vec<_>>().join("\n")
}

/// Events of a plain completion of `n` tokens without usage.
fn tokens(n: u64) -> Vec<Value> {
    let token = |_| json!({"choices": [{"index": 0, "text": " a", "finish_reason": null}]});
    let end = json!({"choices": [{"index": 0, "text": "", "finish_reason": "length"}]});
    (0..n).map(token).chain([end]).collect()
}

fn n_asked(body: &Value) -> u64 {
    body["max_tokens"].as_u64().unwrap()
}

#[test]
fn a_cluster_is_measured() {
    let cluster = Setup::of(2).parallel(2).start();
    let small = ["--prompt-tokens", "64", "--tokens", "16", "--runs", "2", "--streams", "1,2"];
    let state = cluster.state_dir("a");
    let report = measured(&[&["--state-dir", state.to_str().unwrap()], &small[..]].concat());
    let expected = json!({
        "endpoint": cluster.url(), "model": "abacus", "api": "completions", "prompt_tokens_asked": 64,
        "completion_tokens_asked": 16, "runs": 2, "same_prompt": false, "ignore_eos": true, "tokens_from": "usage",
    });
    for (key, value) in expected.as_object().unwrap() {
        assert_eq!(&report[key], value, "{key}");
    }
    for (level, streams) in report["levels"].as_array().unwrap().iter().zip([1, 2]) {
        assert_eq!((&level["streams"], &level["failed"]), (&json!(streams), &json!(0)), "{level}");
        assert_eq!((&level["requests"], &level["completion_tokens"]), (&json!(2 * streams), &json!(16.0)), "{level}");
        let n_prompt = level["prompt_tokens"].as_f64().unwrap();
        assert!((48.0..80.0).contains(&n_prompt), "{level}");
        for key in ["time_to_first_token_ms", "time_per_output_token_ms", "inter_token_latency_ms"] {
            let [mean, p50, p99, max] = ["mean", "p50", "p99", "max"].map(|part| level[key][part].as_f64().unwrap());
            assert!(mean > 0.0 && p50 <= p99 && p99 <= max, "{key}: {level}");
        }
        for key in [
            "tokens_per_second",
            "tokens_per_second_per_stream",
            "tokens_per_second_end_to_end",
            "prompt_tokens_per_second",
            "seconds",
        ] {
            assert!(level[key]["mean"].as_f64().unwrap() > 0.0, "{key}: {level}");
        }
    }

    let url = format!("{}/v1", cluster.url());
    let table = run(&[&["bench", &url, "--chat"], &small[..]].concat()).ok();
    assert!(table.starts_with(&format!("abacus at {}, chat/completions\n", cluster.url())), "{table}");
    let words = table.split_whitespace().collect::<Vec<_>>().join(" ");
    assert!(words.contains("1 stream 2 streams") && words.contains("failed requests 0 of 2 0 of 4"), "{table}");
}

#[test]
fn a_server_that_takes_little_and_counts_nothing_is_measured_as_it_can_be() {
    let server = Fake::start(|path, body| match path {
        "/v1/models" => models(&["first", "second"]),
        "/v1/completions" if body.get("ignore_eos").is_some() => refusal(400, "Unrecognized request argument"),
        "/v1/completions" if body["stream"] == true => Say::Stream(tokens(n_asked(body))),
        "/v1/completions" => Say::Json(200, json!({"choices": [{"text": " a"}]})),
        _ => refusal(404, "no such page"),
    });
    let small = ["--prompt-tokens", "16", "--tokens", "4", "--runs", "2", "--streams", "1,3", "--seed", "7"];
    let report = measured(&[&[&*server.url], &small[..]].concat());
    assert_eq!((&report["model"], &report["ignore_eos"]), (&json!("first"), &json!(false)));
    assert_eq!((&report["tokens_from"], &report["seed"]), (&json!("chunks"), &json!(7)));
    for words in ["first of 2 models", "`ignore_eos`", "tokens of a prompt", "tokens of a stream"] {
        assert!(notes(&report).contains(words), "{words}: {report}");
    }
    let level = &report["levels"][1];
    assert_eq!((&level["completion_tokens"], &level["requests"]), (&json!(4.0), &json!(6)), "{level}");
    assert!(level["prompt_tokens"].is_null() && level["prompt_tokens_per_second"].is_null(), "{level}");

    // A warm-up and two runs of one stream, the same of three.
    let prompts = |server: &Fake| -> Vec<String> {
        let bodies = server.bodies("/v1/completions");
        let asked = bodies.iter().filter(|body| body["stream"] == true && n_asked(body) == 4);
        asked.map(|body| body["prompt"].as_str().unwrap().to_owned()).collect()
    };
    let first = prompts(&server);
    assert_eq!((first.len(), first.iter().collect::<HashSet<_>>().len()), (12, 12), "no prompt twice");
    assert!(first.iter().all(|prompt| prompt.split(' ').count() == 16));
    measured(&[&[&*server.url, "--same-prompt", "--model", "second"], &small[..]].concat());
    let same = prompts(&server).split_off(12);
    assert!(same.len() == 12 && same.iter().all(|prompt| *prompt == same[0]), "one prompt always");
    assert_eq!(server.bodies("/v1/completions").last().unwrap()["model"], "second");
}

#[test]
fn the_length_of_prompts_is_told_of_those_that_were_sent() {
    // What an endpoint counts at first, and then of the prompts that are measured, by words.
    let report = |counted: fn(u64) -> u64, sent: fn(u64) -> u64| {
        let server = Fake::start(move |path, body| {
            let n_words = || body["prompt"].as_str().unwrap().split(' ').count() as u64;
            match path {
                "/v1/models" => models(&["m"]),
                "/v1/completions" if body["stream"] != true => {
                    Say::Json(200, json!({"usage": {"prompt_tokens": counted(n_words())}}))
                }
                "/v1/completions" => {
                    let n = n_asked(body);
                    let usage = json!({"prompt_tokens": sent(n_words()), "completion_tokens": n});
                    Say::Stream(tokens(n).into_iter().chain([json!({"choices": [], "usage": usage})]).collect())
                }
                _ => refusal(404, "no such page"),
            }
        });
        measured(&[&server.url, "--prompt-tokens", "64", "--tokens", "4", "--runs", "1", "--streams", "1,2"])
    };
    let twice = report(|n| n, |n| 2 * n);
    assert!(twice["levels"].as_array().unwrap().iter().all(|level| level["prompt_tokens"] == 128.0), "{twice}");
    assert_eq!(notes(&twice), "prompts have 128 tokens on average, not the 64 that were asked for");
    assert_eq!(notes(&report(|_| 7, |_| 64)), "", "as long as asked for, whatever was counted before");
}

#[test]
fn a_server_with_chats_alone_is_asked_for_chats() {
    let server = Fake::start(|path, body| match path {
        "/v1/models" => models(&["m"]),
        "/v1/chat/completions" if body.get("max_tokens").is_some() => {
            refusal(400, "'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead.")
        }
        "/v1/chat/completions" => {
            // A template of ten tokens, and three tokens for two words.
            let n_words = body["messages"][0]["content"].as_str().unwrap().split(' ').count() as u64;
            let usage = json!({"prompt_tokens": 10 + n_words * 3 / 2, "completion_tokens": 2,
                "prompt_tokens_details": {"cached_tokens": 9 + n_words}});
            if body["stream"] != true {
                return Say::Json(200, json!({"choices": [], "usage": usage}));
            }
            let delta = |delta: Value| json!({"choices": [{"index": 0, "delta": delta, "finish_reason": null}]});
            Say::Stream(vec![
                delta(json!({"role": "assistant", "content": ""})),
                delta(json!({"reasoning_content": "so"})),
                delta(json!({"content": "yes"})),
                json!({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}], "usage": null}),
                json!({"choices": [], "usage": usage}),
            ])
        }
        _ => refusal(404, "no such page"),
    });
    let report = measured(&["--url", &server.url, "--prompt-tokens", "200", "--tokens", "50", "--runs", "1"]);
    assert_eq!((&report["api"], &report["tokens_from"]), (&json!("chat/completions"), &json!("usage")));
    let level = &report["levels"][0];
    assert!((level["prompt_tokens"].as_f64().unwrap() - 200.0).abs() <= 4.0, "{level}");
    assert_eq!(level["completion_tokens"], 2.0);
    for words in ["no plain completions", "`max_completion_tokens`", "ended early, after 2.0 of 50", "cache"] {
        assert!(notes(&report).contains(words), "{words}: {report}");
    }
}

#[test]
fn answers_that_break_off_are_counted_and_fail_the_measurement() {
    // The one stream is served well, and of several one is broken off.
    let server = Fake::start({
        let n_seen = AtomicUsize::new(0);
        move |path, body| match path {
            "/v1/models" => models(&["m"]),
            "/v1/completions" if body["stream"] != true => Say::Json(200, json!({"usage": {"prompt_tokens": 8}})),
            "/v1/completions" if n_asked(body) == 4 => {
                // Two requests of one stream, then two waves of three: the last one is the measured one's.
                let is_last = n_seen.fetch_add(1, Ordering::Relaxed) == 7;
                if is_last { Say::Cut(tokens(2)) } else { Say::Stream(tokens(4)) }
            }
            "/v1/completions" => Say::Stream(tokens(n_asked(body))),
            _ => refusal(404, "no such page"),
        }
    });
    let small = ["--prompt-tokens", "8", "--tokens", "4", "--runs", "1", "--streams", "1,3"];
    let ended = run(&[&["bench", &server.url, "--json"], &small[..]].concat());
    assert_eq!(ended.code, Some(1), "{ended:?}");
    assert!(ended.stderr.contains("1 of 4 requests failed"), "{ended:?}");
    let report: Value = serde_json::from_str(&ended.stdout).unwrap();
    let level = &report["levels"][1];
    assert_eq!((&level["requests"], &level["failed"]), (&json!(3), &json!(1)), "{level}");
    assert!(level["errors"][0]["message"].as_str().unwrap().contains("broke off in the middle"), "{level}");
    assert!(notes(&report).contains("3 streams: 1 of 3 requests failed"), "{report}");
}

#[test]
fn what_prevents_a_measurement_is_said_with_what_to_do() {
    let refusing = |status, message: &'static str| Fake::start(move |_, _| refusal(status, message)).url;
    check_fails(&[&refusing(401, "no key")], &["no key", "--api-key"]);
    check_fails(&[&refusing(429, "slow down."), "--model", "m"], &["slow down: ", "--streams"]);
    check_fails(&[&refusing(404, "model 'm' not found"), "--model", "m"], &["model 'm' not found", "--model"]);
    check_fails(&[&refusing(404, "no such page")], &["lists no model", "--model"]);
    check_fails(&[&refusing(400, "too long"), "--model", "m"], &["too long", "--prompt-tokens"]);
    let coded = |code: &'static str| {
        let error = json!({"error": {"message": "no such thing", "type": "invalid_request_error", "code": code}});
        Fake::start(move |_, _| Say::Json(400, error.clone())).url
    };
    check_fails(&[&coded("context_length_exceeded"), "--model", "m"], &["no such thing: if prompt", "--prompt-tokens"]);
    let said =
        check_fails(&[&coded("unsupported_model"), "--model", "m"], &["no such thing: only models that generate"]);
    assert!(!said.contains("--prompt-tokens"), "{said}");
    let said = check_fails(&[&coded("invalid_value"), "--model", "m"], &["no such thing"]);
    assert!(!said.contains("--prompt-tokens"), "{said}");
    let cut = Fake::start(|_, _| Say::Cut(tokens(1)));
    check_fails(&[&cut.url, "--model", "m"], &["broke off in the middle", "does it still run"]);
    let closed = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    check_fails(&[&format!("http://{closed}")], &["cannot be reached"]);
    // It takes connections and says nothing.
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", silent.local_addr().unwrap());
    check_fails(&[&url, "--model", "m", "--timeout", "200ms"], &["took longer than 200ms", "--timeout"]);
}

#[test]
fn an_endpoint_behind_tls_is_asked_by_tls() {
    // It answers a handshake as web servers do that expect none.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("https://{}", listener.local_addr().unwrap());
    let server = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut first = [0];
        stream.read_exact(&mut first).unwrap();
        stream.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").unwrap();
        // Closing at once could lose what was written. The client may be gone already.
        let _ = std::io::copy(&mut stream, &mut std::io::sink());
        first[0]
    });
    let ended = run(&["bench", &url]);
    if ended.stderr.contains("trusts no certificate authority") {
        // On a bare system that is the right answer, and there is nothing to connect for.
        return;
    }
    assert!(ended.code == Some(1) && ended.stderr.contains("does it speak TLS on this port?"), "{ended:?}");
    assert_eq!(server.join().unwrap(), 22, "the content type of a handshake");
}
