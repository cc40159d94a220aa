//! The endpoint over real sockets, in front of a model that is not there.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on has failed")]

mod common;

use std::io::{Read, Write};
use std::time::{Duration, Instant};

use brigade_api::ApiOptions;
use brigade_node::serving::{Event, Failure, FinishReason, Readiness, SubmitError, TokenLogprob};
use common::{DEADLINE, House, Reply, Script, delta, done};
use serde_json::{Value, json};

const CHAT: &str = "/v1/chat/completions";
const PLAIN: &str = "/v1/completions";

fn hello() -> Value {
    json!({"model": "team/abacus", "messages": [{"role": "user", "content": "hi"}]})
}

fn streamed(mut body: Value, usage: bool) -> Value {
    body["stream"] = json!(true);
    body["stream_options"] = json!({"include_usage": usage});
    body
}

fn usage() -> Value {
    json!({
        "prompt_tokens": 3,
        "completion_tokens": 2,
        "total_tokens": 5,
        "prompt_tokens_details": {"cached_tokens": 1, "audio_tokens": 0},
        "completion_tokens_details": {
            "reasoning_tokens": 0,
            "audio_tokens": 0,
            "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0,
        },
    })
}

#[test]
fn a_chat_is_answered_whole() {
    let house = House::open();
    house.script(Script::Events(vec![delta("Hel"), delta(""), delta("lo"), done(FinishReason::Length)]));
    let reply = house.post(CHAT, &hello());
    assert_eq!(reply.status, 200, "{reply:?}");
    assert_eq!(reply.header("content-type"), Some("application/json"));
    let mut answer = reply.json();
    assert!(answer["id"].as_str().unwrap().starts_with("chatcmpl-"));
    assert!(answer["created"].as_u64().unwrap() > 1_700_000_000);
    answer["id"].take();
    answer["created"].take();
    let expected = json!({
        "id": null,
        "object": "chat.completion",
        "created": null,
        "model": "team/abacus",
        "system_fingerprint": "abababab",
        "choices": [{
            "index": 0,
            "message": {"role": "assistant", "content": "Hello", "refusal": null},
            "logprobs": null,
            "finish_reason": "length",
        }],
        "usage": usage(),
    });
    assert_eq!(answer, expected);
    let tokenized = house.mock.tokenized.lock().unwrap().clone();
    let prompt = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n".to_owned();
    assert_eq!(tokenized, [(prompt, true, true)]);
    assert_eq!(house.mock.requests.lock().unwrap()[0].max_tokens, None);
}

#[test]
fn a_chat_is_streamed() {
    let house = House::open();
    for include_usage in [false, true] {
        house.script(Script::Events(vec![delta("a"), delta(""), delta("b"), done(FinishReason::Stop)]));
        let reply = house.post(CHAT, &streamed(hello(), include_usage));
        assert_eq!(reply.status, 200);
        assert_eq!(reply.header("content-type"), Some("text/event-stream; charset=utf-8"));
        let events = reply.events();
        assert_eq!(events.last(), Some(&"[DONE]"));
        let chunks: Vec<Value> =
            events[..events.len() - 1].iter().map(|event| serde_json::from_str(event).unwrap()).collect();
        let choices: Vec<_> = chunks.iter().filter_map(|chunk| chunk["choices"].get(0)).cloned().collect();
        let choice = |delta: Value, reason: Value| {
            let mut choice = json!({"index": 0, "delta": delta, "logprobs": null});
            choice["finish_reason"] = reason;
            choice
        };
        let expected = [
            choice(json!({"role": "assistant", "content": ""}), Value::Null),
            choice(json!({"content": "a"}), Value::Null),
            choice(json!({"content": "b"}), Value::Null),
            choice(json!({}), json!("stop")),
        ];
        assert_eq!(choices, expected);
        assert!(chunks.iter().all(|chunk| chunk["id"] == chunks[0]["id"]));
        assert!(chunks.iter().all(|chunk| chunk["object"] == "chat.completion.chunk"));
        let usages: Vec<_> = chunks.iter().map(|chunk| chunk.get("usage").cloned()).collect();
        if include_usage {
            let mut expected = vec![Some(Value::Null); 4];
            expected.push(Some(usage()));
            assert_eq!(usages, expected);
            assert_eq!(chunks[4]["choices"], json!([]));
        } else {
            assert_eq!(usages, vec![None; 4]);
        }
    }
}

#[test]
fn a_plain_completion_takes_text_and_tokens() {
    let house = House::open();
    let reply = house.post(PLAIN, &json!({"prompt": "1+1=", "max_tokens": 0, "seed": 7})).json();
    assert_eq!(reply["object"], "text_completion");
    assert!(reply["id"].as_str().unwrap().starts_with("cmpl-"));
    assert_eq!(reply["choices"], json!([{"index": 0, "text": "ok", "logprobs": null, "finish_reason": "stop"}]));
    let reply = house.post(PLAIN, &streamed(json!({"model": "default", "prompt": [[1, 2]]}), false));
    let text: String = reply.events()[..2]
        .iter()
        .map(|event| serde_json::from_str::<Value>(event).unwrap()["choices"][0]["text"].as_str().unwrap().to_owned())
        .collect();
    assert_eq!((text.as_str(), reply.events()[2]), ("ok", "[DONE]"));
    let requests = house.mock.requests.lock().unwrap();
    assert_eq!((requests[0].max_tokens, requests[0].sampling.seed), (Some(0), 7));
    assert_eq!(requests[0].prompt, "1+1=".bytes().map(i32::from).collect::<Vec<_>>());
    assert_eq!((requests[1].max_tokens, requests[1].prompt.as_slice()), (Some(16), [1, 2].as_slice()));
}

#[test]
fn absent_seeds_differ() {
    let house = House::open();
    house.post(PLAIN, &json!({"prompt": "a"}));
    house.post(PLAIN, &json!({"prompt": "a"}));
    let requests = house.mock.requests.lock().unwrap();
    assert_ne!(requests[0].sampling.seed, requests[1].sampling.seed);
}

#[test]
fn log_probabilities_come_where_asked() {
    let house = House::open();
    let token = TokenLogprob { token: 65, bytes: b"A".to_vec(), logprob: -0.5, top: vec![(65, b"A".to_vec(), -0.5)] };
    let event = Event::Token { position: 0, token: 65, text: "A".to_owned(), logprob: Some(token) };
    for _ in 0..2 {
        house.script(Script::Events(vec![event.clone(), done(FinishReason::Stop)]));
    }
    let mut body = hello();
    body["logprobs"] = json!(true);
    body["top_logprobs"] = json!(1);
    let entry = json!({"token": "A", "logprob": -0.5, "bytes": [65]});
    let mut with_top = entry.clone();
    with_top["top_logprobs"] = json!([entry]);
    let expected = json!({"content": [with_top], "refusal": null});
    assert_eq!(house.post(CHAT, &body).json()["choices"][0]["logprobs"], expected);
    let expected =
        json!({"tokens": ["A"], "token_logprobs": [-0.5], "top_logprobs": [{"A": -0.5}], "text_offset": [0]});
    let reply = house.post(PLAIN, &json!({"prompt": "a", "logprobs": 1})).json();
    assert_eq!(reply["choices"][0]["logprobs"], expected);
    let asked: Vec<_> = house.mock.requests.lock().unwrap().iter().map(|request| request.logprobs).collect();
    assert_eq!(asked, [Some(1), Some(1)]);
}

#[test]
fn what_the_node_refuses_has_its_status() {
    let house = House::open();
    for (error, status, retry_after, code) in [
        (SubmitError::NotReady("no worker".into()), 503, Some("5"), Some("service_unavailable")),
        (SubmitError::Busy { waiting: 64 }, 429, Some("1"), Some("rate_limit_exceeded")),
        (
            SubmitError::PromptTooLong { tokens: 9, is_bound: false, context: 8 },
            400,
            None,
            Some("context_length_exceeded"),
        ),
        (SubmitError::Invalid("no".into()), 400, None, None),
    ] {
        house.script(Script::Refuse(error));
        let reply = house.post(CHAT, &streamed(hello(), false));
        reply.check_error(status, None, code);
        assert_eq!(reply.header("retry-after"), retry_after);
    }
    let long = house.post(PLAIN, &json!({"prompt": "x".repeat(100_001)}));
    long.check_error(400, None, Some("context_length_exceeded"));
}

#[test]
fn an_answer_that_breaks_off_says_so() {
    let house = House::open();
    for (failure, status) in [
        (Failure::PlacementLost("a machine left".into()), 503),
        (Failure::Stopping, 503),
        (Failure::TimedOut { after: Duration::from_millis(1500) }, 504),
        (Failure::Engine("no".into()), 500),
    ] {
        let events = vec![delta("half"), Event::Failed(failure)];
        house.script(Script::Events(events.clone()));
        house.script(Script::Events(events));
        let reply = house.post(CHAT, &hello());
        assert_eq!((reply.status, &reply.json()["error"]["type"]), (status, &json!("server_error")));
        let reply = house.post(CHAT, &streamed(hello(), true));
        assert_eq!(reply.status, 200);
        let last: Value = serde_json::from_str(reply.events().last().unwrap()).unwrap();
        assert_eq!(last["error"]["type"], "server_error");
    }
}

#[test]
fn a_client_that_leaves_cancels_its_session() {
    let house = House::open();
    for body in [streamed(hello(), false), hello()] {
        house.mock.held.lock().unwrap().clear();
        house.script(Script::Hold(vec![delta("a")]));
        let stream = house.send("POST", CHAT, &[("Content-Type", "application/json")], &body.to_string());
        house.wait_until_held(1);
        drop(stream);
        house.wait_until_cancelled();
    }
}

#[test]
fn text_arrives_before_the_answer_ends() {
    let house = House::open();
    house.script(Script::Hold(vec![delta("early")]));
    let body = streamed(hello(), false).to_string();
    let mut stream = house.send("POST", CHAT, &[("Content-Type", "application/json")], &body);
    let mut seen = Vec::new();
    while !String::from_utf8_lossy(&seen).contains("early") {
        let mut buffer = [0; 512];
        let n = stream.read(&mut buffer).unwrap();
        assert_ne!(n, 0);
        seen.extend_from_slice(&buffer[..n]);
    }
    let sender = house.mock.held.lock().unwrap().remove(0);
    sender.send(done(FinishReason::Stop)).unwrap();
    let mut rest = String::new();
    stream.read_to_string(&mut rest).unwrap();
    assert!(rest.contains("data: [DONE]"));
}

#[test]
fn requests_that_cannot_be_honoured_are_refused() {
    let house = House::open();
    let mut unknown = hello();
    unknown["mood"] = json!("good");
    house.post(CHAT, &unknown).check_error(400, Some("mood"), Some("unknown_parameter"));
    let mut tools = hello();
    tools["tools"] = json!([{"type": "function"}]);
    house.post(CHAT, &tools).check_error(400, Some("tools"), Some("unsupported_value"));
    let mut model = hello();
    model["model"] = json!("gpt-5");
    house.post(CHAT, &model).check_error(404, Some("model"), Some("model_not_found"));
    house.post(PLAIN, &json!({"prompt": ["a", "b"]})).check_error(400, Some("prompt"), Some("unsupported_value"));
    house.post(CHAT, &json!([])).check_error(400, None, None);
    assert!(house.mock.requests.lock().unwrap().is_empty());

    let json = [("Content-Type", "application/json; charset=utf-8")];
    let reply = house.ask("POST", CHAT, &json, "{\n  \"model\": ,}");
    reply.check_error(400, None, None);
    assert!(reply.body.contains("line 2 column 12"), "{reply:?}");
    house.ask("POST", CHAT, &json, &"[".repeat(100_000)).check_error(400, None, None);
    house.ask("POST", CHAT, &json, "").check_error(400, None, None);
    house.ask("POST", CHAT, &[], "{}").check_error(415, None, None);
    house.ask("POST", CHAT, &[("Content-Type", "text/plain")], "{}").check_error(415, None, None);
    house.get("/v2/anything").check_error(404, None, Some("unknown_url"));
    let reply = house.get(CHAT);
    reply.check_error(405, None, None);
    assert_eq!(reply.header("allow"), Some("post"));
}

#[test]
fn a_template_refuses_in_its_own_words() {
    let template = "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system here') }}\
        {% endif %}{{ messages[0].content }}";
    let house = House::with_template(ApiOptions::default(), Some(template));
    let reply = house.post(CHAT, &json!({"messages": [{"role": "developer", "content": "x"}]}));
    reply.check_error(400, Some("messages"), None);
    assert!(reply.body.contains("no system here"));
    assert_eq!(house.post(CHAT, &hello()).status, 200);
    // The template wrote the start token, so the tokenizer must not.
    assert_eq!(*house.mock.tokenized.lock().unwrap(), [("<s>hi".to_owned(), false, true)]);

    let house = House::with_template(ApiOptions::default(), Some("{% broken"));
    house.post(CHAT, &hello()).check_error(500, None, None);
    assert_eq!(house.post(PLAIN, &json!({"prompt": "a"})).status, 200);
}

#[test]
fn bodies_have_a_limit() {
    let house = House::with(ApiOptions { body_limit: 1000, ..ApiOptions::default() });
    let body = json!({"prompt": "x".repeat(1000)}).to_string();
    house.ask("POST", PLAIN, &[("Content-Type", "application/json")], &body).check_error(413, None, None);
    let head = format!(
        "POST {PLAIN} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n\
         Transfer-Encoding: chunked\r\n\r\n{:x}\r\n{body}\r\n0\r\n\r\n",
        body.len()
    );
    Reply::read(house.send_raw(head.as_bytes())).check_error(413, None, None);
    let body = json!({"prompt": "x".repeat(900)}).to_string();
    let chunks = format!(
        "POST {PLAIN} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n\
         Transfer-Encoding: chunked\r\n\r\n{:x}\r\n{body}\r\n0\r\n\r\n",
        body.len()
    );
    assert_eq!(Reply::read(house.send_raw(chunks.as_bytes())).status, 200);
}

#[test]
fn announced_bodies_that_never_come_block_nobody() {
    let house = House::open();
    let head = format!(
        "POST {PLAIN} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n",
        brigade_api::DEFAULT_BODY_LIMIT
    );
    let silent: Vec<_> = (0..100).map(|_| house.send_raw(head.as_bytes())).collect();
    assert_eq!(house.post(CHAT, &hello()).status, 200);
    drop(silent);
    let many = format!("[{}0]", "{\"\":0},".repeat(500_000));
    house.ask("POST", PLAIN, &[("Content-Type", "application/json")], &many).check_error(400, None, None);
}

#[test]
fn keys_are_asked_for() {
    let options =
        ApiOptions { keys: vec!["sk-a".to_owned()], admin_token: Some("root".to_owned()), ..ApiOptions::default() };
    let house = House::with(options);
    for path in ["/v1/models", "/brigade/v1/status", "/nowhere"] {
        let reply = house.get(path);
        reply.check_error(401, None, Some("invalid_api_key"));
        assert_eq!(reply.header("www-authenticate"), Some("bearer"));
    }
    house.post(CHAT, &hello()).check_error(401, None, Some("invalid_api_key"));
    for key in ["Bearer sk-a", "Bearer root"] {
        let reply = house.ask("GET", "/v1/models", &[("Authorization", key), ("Host", "box.example")], "");
        assert_eq!(reply.status, 200);
    }
    house.ask("GET", "/v1/models", &[("Authorization", "Bearer sk-b")], "").check_error(
        401,
        None,
        Some("invalid_api_key"),
    );
    assert_eq!((house.get("/health").status, house.get("/ready").status), (200, 200));
}

#[test]
fn web_pages_are_kept_out() {
    let house = House::open();
    let evil = [("Host", "evil.example"), ("Content-Type", "application/json")];
    house.ask("POST", CHAT, &evil, &hello().to_string()).check_error(403, None, Some("forbidden"));
    assert!(house.mock.requests.lock().unwrap().is_empty());
    assert_eq!(house.ask("GET", "/v1/models", &[("Host", "127.0.0.1:80")], "").status, 200);
    let absolute = "GET http://evil.example/v1/models HTTP/1.1\r\nHost: evil.example\r\nConnection: close\r\n\r\n";
    Reply::read(house.send_raw(absolute.as_bytes())).check_error(403, None, Some("forbidden"));
}

#[test]
fn tickets_need_the_admin_token() {
    let house = House::with(ApiOptions { admin_token: Some("root".to_owned()), ..ApiOptions::default() });
    let path = "/brigade/v1/tickets";
    house.get(path).check_error(401, None, Some("invalid_api_key"));
    house.ask("GET", path, &[("Authorization", "Bearer no")], "").check_error(403, None, Some("forbidden"));
    house.ask("DELETE", "/brigade/v1/tickets/t0", &[], "").check_error(401, None, Some("invalid_api_key"));
    let root = [("Authorization", "Bearer root"), ("Content-Type", "application/json")];
    let reply = house.ask("POST", path, &root, r#"{"ttl_s": 60}"#);
    assert_eq!((reply.status, reply.json()), (201, json!({"id": "t0", "expires_in_s": 60, "ticket": "secret"})));
    house.ask("POST", path, &root, r#"{"ttl_s": 0}"#).check_error(400, Some("ttl_s"), Some("invalid_value"));
    house.ask("POST", path, &root, "{}").check_error(400, Some("ttl_s"), None);
    let listed = house.ask("GET", path, &root, "").json();
    assert_eq!(listed["data"], json!([{"id": "t0", "expires_in_s": 60}]));
    assert_eq!(house.ask("DELETE", "/brigade/v1/tickets/t0", &root, "").json()["deleted"], true);
    house.ask("DELETE", "/brigade/v1/tickets/t0", &root, "").check_error(404, None, None);
    house.ask("DELETE", "/brigade/v1/tickets/%ff", &root, "").check_error(400, None, None);
    house.ask("DELETE", "/brigade/v1/tickets/%ff", &[], "").check_error(401, None, Some("invalid_api_key"));

    let closed = House::open();
    closed.ask("GET", path, &root, "").check_error(403, None, Some("forbidden"));
}

#[test]
fn models_and_state_are_told() {
    let house = House::open();
    let model = json!({
        "id": "team/abacus", "object": "model", "created": 1_700_000_000, "owned_by": "brigade", "max_model_len": 4096,
    });
    assert_eq!(house.get("/v1/models").json(), json!({"object": "list", "data": [model]}));
    assert_eq!(house.get("/v1/models/team/abacus").json(), model);
    assert_eq!(house.get("/v1/models/team%2Fabacus").json(), model);
    house.get("/v1/models/%ff").check_error(400, None, None);
    house.get("/v1/models/gpt-5").check_error(404, Some("model"), Some("model_not_found"));
    assert_eq!(house.get("/brigade/v1/status").json()["epoch"], 3);
    assert_eq!(house.get("/ready").json(), json!({"status": "ready"}));
    *house.mock.readiness.lock().unwrap() = Readiness::NotReady("layers 4..8 have no node".into());
    let reply = house.get("/ready");
    assert_eq!(reply.status, 503);
    assert_eq!(reply.json()["reason"], "layers 4..8 have no node");
    assert_eq!(house.get("/health").status, 200);
    // Requests are taken, so a balancer has no reason to send them elsewhere.
    *house.mock.readiness.lock().unwrap() = Readiness::Recovering("w1 is lost".into());
    let reply = house.get("/ready");
    assert_eq!((reply.status, reply.json()), (200, json!({"status": "recovering", "reason": "w1 is lost"})));
    assert_eq!(house.post(CHAT, &hello()).status, 200);
}

#[test]
fn a_stream_that_is_paused_says_so_and_goes_on() {
    let house = House::open();
    let why = "w1 is lost".to_owned();
    let events = [delta("a"), Event::Paused { why }, Event::Resumed, delta("b"), done(FinishReason::Stop)];
    for body in [streamed(hello(), false), hello()] {
        house.script(Script::Events(events.to_vec()));
        let text = house.post(CHAT, &body).body;
        let find = |what: &str| text.find(what).unwrap_or_else(|| panic!("{what} is not in {text}"));
        if body["stream"] == true {
            let places = ["\"a\"", "\n\n: paused: w1 is lost\n\n", ": resumed\n\n", "\"b\"", "[DONE]"].map(find);
            assert!(places.is_sorted(), "{text}");
        } else {
            assert!(find("\"ab\"") > 0 && !text.contains("paused"), "{text}");
        }
    }
}

#[test]
fn tokens_and_text_are_turned_into_each_other() {
    let house = House::open();
    let reply = house.post("/brigade/v1/tokenize", &json!({"text": "hé", "add_special": false})).json();
    assert_eq!(reply, json!({"tokens": [104, 195, 169], "count": 3}));
    assert_eq!(*house.mock.tokenized.lock().unwrap(), [("hé".to_owned(), false, true)]);
    assert_eq!(house.post("/brigade/v1/detokenize", &reply["tokens"]).status, 400);
    let reply = house.post("/brigade/v1/detokenize", &json!({"tokens": reply["tokens"]})).json();
    assert_eq!(reply, json!({"text": "hé"}));
    house.post("/brigade/v1/detokenize", &json!({"tokens": [256]})).check_error(
        400,
        Some("tokens[0]"),
        Some("invalid_value"),
    );
    house.post("/brigade/v1/tokenize", &json!({})).check_error(400, Some("text"), None);
}

#[test]
fn nonsense_harms_nobody() {
    let house = House::open();
    let long_header = format!("GET /health HTTP/1.1\r\nX: {}\r\n\r\n", "x".repeat(200_000));
    for bytes in [
        b"\x00\xff\x16\x03\x01nonsense\r\n\r\n".as_slice(),
        b"GET / HTTP/9.9\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello!",
        b"GET /v1/models/%ff%fe HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
        long_header.as_bytes(),
    ] {
        let mut stream = std::net::TcpStream::connect(house.addr()).unwrap();
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        // The server may close before it has read everything; either way it must end the connection and live on.
        let _ = stream.write_all(bytes);
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        assert!(!answer.starts_with(b"HTTP/1.1 2"), "{}", String::from_utf8_lossy(&answer));
        assert_eq!(house.get("/health").status, 200);
    }
}

#[test]
fn draining_refuses_completions_and_lets_those_under_way_end() {
    let house = House::open();
    let answers: Vec<_> = [streamed(hello(), false), hello()]
        .map(|body| {
            house.script(Script::Hold(vec![delta("a")]));
            house.send("POST", CHAT, &[("Content-Type", "application/json")], &body.to_string())
        })
        .into();
    house.wait_until_held(2);
    assert_eq!(house.server.n_answering(), 2);
    house.server.drain();
    let refused = house.post(CHAT, &hello());
    refused.check_error(503, None, Some("service_unavailable"));
    assert!(refused.body.contains("the server is stopping") && refused.header("retry-after").is_some(), "{refused:?}");
    let ready = house.get("/ready");
    assert_eq!((ready.status, &ready.json()["status"]), (503, &json!("stopping")));
    assert_eq!((house.get("/health").status, house.get("/brigade/v1/status").status), (200, 200));
    for sender in house.mock.held.lock().unwrap().drain(..) {
        sender.send(done(FinishReason::Stop)).unwrap();
    }
    for answer in answers {
        assert_eq!(Reply::read(answer).status, 200);
    }
    house.wait_until_answering(0);
}

#[test]
fn stopping_lets_answers_end_but_not_for_ever() {
    let house = House::open();
    house.script(Script::Hold(vec![delta("a")]));
    let body = streamed(hello(), false).to_string();
    let stream = house.send("POST", CHAT, &[("Content-Type", "application/json")], &body);
    house.wait_until_held(1);
    let addr = house.addr();
    let House { mock, server } = house;
    let begin = Instant::now();
    server.stop();
    assert!(begin.elapsed() < DEADLINE);
    assert!(mock.held.lock().unwrap()[0].is_closed());
    assert!(std::net::TcpStream::connect(addr).is_err());
    drop(stream);

    // With nothing under way it ends at once.
    let house = House::open();
    assert_eq!(house.get("/health").status, 200);
    let begin = Instant::now();
    house.server.stop();
    assert!(begin.elapsed().as_millis() < 1500);
}
