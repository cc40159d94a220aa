//! Embeddings and ranking over real sockets, in front of a model that is not there.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on has failed")]

mod common;

use brigade_node::serving::{Event, Failure, FinishReason, Purpose, SubmitError, TextPlace, Usage};
use common::{House, Reply, Script};
use serde_json::{Value, json};

const EMBEDDINGS: &str = "/v1/embeddings";
const RERANK: &str = "/v1/rerank";

/// What a session for a text of three tokens tells.
fn pooled(values: &[f32]) -> Script {
    let usage = Usage { prompt_tokens: 3, ..Usage::default() };
    Script::Events(vec![Event::Pooled { values: values.to_vec() }, Event::Done { reason: FinishReason::Stop, usage }])
}

#[track_caller]
fn check_error(reply: &Reply, status: u16, param: Option<&str>, says: &str) {
    assert_eq!(reply.status, status, "{reply:?}");
    let error = &reply.json()["error"];
    assert_eq!(error["param"].as_str(), param, "{error}");
    assert!(error["message"].as_str().unwrap().contains(says), "{error}");
}

#[test]
fn texts_become_vectors_of_length_one_in_their_order() {
    let house = House::that(Purpose::Embed);
    house.script(pooled(&[3.0, 4.0]));
    house.script(pooled(&[0.0, -2.0]));
    let reply = house.post(EMBEDDINGS, &json!({"model": "team/abacus", "input": ["ab", "c"]}));
    assert_eq!(reply.status, 200, "{reply:?}");
    assert!(reply.header("x-request-id").unwrap().starts_with("embd-"));
    let expected = json!({
        "object": "list",
        "data": [
            {"object": "embedding", "index": 0, "embedding": [0.6, 0.8]},
            {"object": "embedding", "index": 1, "embedding": [0.0, -1.0]},
        ],
        "model": "team/abacus",
        "usage": {"prompt_tokens": 6, "total_tokens": 6},
    });
    let found: Value = reply.json();
    let close = |a: &Value, b: f64| (a.as_f64().unwrap() - b).abs() < 1e-6;
    assert!(close(&found["data"][0]["embedding"][0], 0.6) && close(&found["data"][0]["embedding"][1], 0.8));
    assert_eq!(found["data"][1], expected["data"][1]);
    assert_eq!((&found["model"], &found["usage"]), (&expected["model"], &expected["usage"]));
    let requests = house.mock.requests.lock().unwrap();
    let prompts: Vec<&[i32]> = requests.iter().map(|request| &request.prompt[..]).collect();
    assert_eq!(prompts, [&[97, 98][..], &[99]]);
    assert_eq!(house.mock.tokenized.lock().unwrap()[0], ("ab".to_owned(), true, true));
}

#[test]
fn input_is_text_or_tokens_alone_or_many() {
    let house = House::that(Purpose::Embed);
    for (input, expected) in [
        (json!("a"), vec![vec![97]]),
        (json!([5, 6]), vec![vec![5, 6]]),
        (json!([[5, 6], [7]]), vec![vec![5, 6], vec![7]]),
        (json!(["a", [7]]), vec![vec![97], vec![7]]),
    ] {
        expected.iter().for_each(|_| house.script(pooled(&[1.0])));
        let reply = house.post(EMBEDDINGS, &json!({"input": input, "user": "me", "priority": 3, "timeout": 9}));
        assert_eq!(reply.status, 200, "{reply:?}");
        let mut requests = house.mock.requests.lock().unwrap();
        assert_eq!(requests.iter().map(|request| request.prompt.clone()).collect::<Vec<_>>(), expected);
        assert!(requests.iter().all(|request| request.priority == 3 && request.timeout.is_some()));
        requests.clear();
    }
}

#[test]
fn vectors_are_cut_and_written_as_asked() {
    let house = House::that(Purpose::Embed);
    house.script(pooled(&[1.0, 0.0, 7.0]));
    let reply = house.post(EMBEDDINGS, &json!({"input": "a", "dimensions": 2, "encoding_format": "base64"}));
    assert_eq!(reply.json()["data"][0]["embedding"], "AACAPwAAAAA=");
    let n_asked = house.mock.requests.lock().unwrap().len();
    let reply = house.post(EMBEDDINGS, &json!({"input": "a", "dimensions": 4}));
    check_error(&reply, 400, Some("dimensions"), "have 3");
    assert_eq!(house.mock.requests.lock().unwrap().len(), n_asked, "nothing is computed");
    // What there is no room for is not taken.
    house.script(pooled(&[1.0; 4]));
    check_error(&house.post(EMBEDDINGS, &json!({"input": "a"})), 500, None, "4 values, not 3");
}

#[test]
fn what_requests_hold_is_bounded_over_all_of_them() {
    let house = House::with_vectors(Purpose::Embed, 4096);
    let largest = json!({"input": vec!["a"; 2048]});
    let text = largest.to_string();
    let hold = || {
        (0..16).for_each(|_| house.script(Script::Hold(vec![])));
        house.send("POST", EMBEDDINGS, &[("Content-Type", "application/json")], &text)
    };
    let first = hold();
    house.wait_until_held(16);
    let refused = house.post(EMBEDDINGS, &largest);
    refused.check_error(429, None, Some("rate_limit_exceeded"));
    assert_eq!(refused.header("retry-after"), Some("1"));
    assert_eq!(house.mock.requests.lock().unwrap().len(), 16, "nothing of it is computed");
    house.script(pooled(&[2.0; 4096]));
    assert_eq!(house.post(EMBEDDINGS, &json!({"input": "a"})).status, 200, "small ones are not locked out");
    drop(first);
    house.wait_until_answering(0);
    let _second = hold();
    house.wait_until_held(32);
}

#[test]
fn vectors_that_no_request_may_have_are_refused() {
    let house = House::with_vectors(Purpose::Embed, 5000);
    let refused = house.post(EMBEDDINGS, &json!({"input": vec!["a"; 2048]}));
    refused.check_error(400, None, Some("too_many_texts"));
    assert!(refused.body.contains("made of 1677 texts"), "{refused:?}");
    assert_eq!(house.mock.tokenized.lock().unwrap().len(), 0, "nothing is tokenized for that");
    assert_eq!(house.mock.requests.lock().unwrap().len(), 0);
    let house = House::with_vectors(Purpose::Rank, 5000);
    let refused = house.post(RERANK, &json!({"query": "a", "documents": vec!["b"; 2048]}));
    refused.check_error(400, None, Some("too_many_texts"));
    assert_eq!(house.mock.tokenized.lock().unwrap().len(), 0);
}

#[test]
fn many_texts_are_asked_a_few_at_a_time() {
    let house = House::that(Purpose::Embed);
    let texts: Vec<String> = (0..50).map(|n| n.to_string()).collect();
    texts.iter().for_each(|_| house.script(pooled(&[2.0])));
    let reply = house.post(EMBEDDINGS, &json!({"input": texts}));
    assert_eq!(reply.json()["data"].as_array().unwrap().len(), 50);
    assert_eq!(reply.json()["usage"]["total_tokens"], 150);
    // All have the name of the request, and say which text they are.
    let id = reply.header("x-request-id").unwrap();
    for (at, request) in house.mock.requests.lock().unwrap().iter().enumerate() {
        assert_eq!((request.id.as_str(), request.place), (id, TextPlace { idx: at as u32, n_texts: 50 }));
        // And share the number of those that are done.
        assert_eq!(request.done.get(), at as u32);
        request.done.add();
    }
    assert_eq!(house.get(&format!("/debug/requests/{id}")).json()["id"], id);
    // One that finds the queue full waits for those before it.
    house.script(pooled(&[2.0]));
    house.script(Script::Refuse(SubmitError::Busy { waiting: 256 }));
    house.script(pooled(&[2.0]));
    assert_eq!(house.post(EMBEDDINGS, &json!({"input": ["a", "b"]})).status, 200);
    // And does not give those up if it is full still.
    house.script(pooled(&[2.0]));
    (0..3).for_each(|_| house.script(Script::Refuse(SubmitError::Busy { waiting: 256 })));
    house.script(pooled(&[2.0]));
    assert_eq!(house.post(EMBEDDINGS, &json!({"input": ["a", "b"]})).status, 200);
    // Nor where another node coordinates, which says so later; each vector comes to its text.
    house.script(pooled(&[2.0, 0.0, 0.0]));
    let busy = Failure::Refused(SubmitError::Busy { waiting: 256 });
    house.script(Script::Events(vec![Event::Failed(busy.clone())]));
    house.script(pooled(&[0.0, 0.0, 2.0]));
    house.script(pooled(&[0.0, 2.0, 0.0]));
    let reply = house.post(EMBEDDINGS, &json!({"input": ["a", "b", "c"]}));
    let found: Vec<Value> = (0..3).map(|at| reply.json()["data"][at]["embedding"].clone()).collect();
    assert_eq!(found, [json!([1.0, 0.0, 0.0]), json!([0.0, 1.0, 0.0]), json!([0.0, 0.0, 1.0])]);
    house.script(Script::Events(vec![Event::Failed(busy)]));
    check_error(&house.post(EMBEDDINGS, &json!({"input": ["a", "b"]})), 429, None, "waiting already");
    house.script(Script::Refuse(SubmitError::Busy { waiting: 256 }));
    check_error(&house.post(EMBEDDINGS, &json!({"input": ["a", "b"]})), 429, None, "waiting already");
}

#[test]
fn requests_of_many_texts_leave_half_of_the_queue_to_others() {
    let house = House::that(Purpose::Embed);
    (0..300).for_each(|_| house.script(Script::Hold(vec![])));
    let text = json!({"input": vec!["a"; 60]}).to_string();
    let mut n_held = 0;
    let streams: Vec<_> = (0..20)
        .map(|n| {
            let stream = house.send("POST", EMBEDDINGS, &[("Content-Type", "application/json")], &text);
            // The first eight share 128 texts; of each that comes then, one is on its way.
            n_held += if n < 8 { 16 } else { 1 };
            house.wait_until_held(n_held);
            stream
        })
        .collect();
    assert_eq!(house.mock.requests.lock().unwrap().len(), 128 + 12);
    drop(streams);
    house.wait_until_answering(0);
    let _stream = house.send("POST", EMBEDDINGS, &[("Content-Type", "application/json")], &text);
    house.wait_until_held(n_held + 16);
}

#[test]
fn wrong_input_is_refused_by_its_name() {
    let house = House::that(Purpose::Embed);
    let check = |body: Value, param: Option<&str>, says: &str| {
        check_error(&house.post(EMBEDDINGS, &body), 400, param, says);
    };
    check(json!({}), Some("input"), "required");
    check(json!({"input": ""}), Some("input"), "empty");
    check(json!({"input": []}), Some("input"), "empty");
    check(json!({"input": ["a", ""]}), Some("input[1]"), "empty");
    check(json!({"input": [[1], []]}), Some("input[1]"), "empty");
    check(json!({"input": [1, 999]}), Some("input[1]"), "not in the vocabulary");
    check(json!({"input": {"text": "a"}}), Some("input"), "a string");
    check(json!({"input": vec!["a"; 2049]}), Some("input"), "more than 2048");
    check(json!({"input": ["a", "b".repeat(100_001)]}), Some("input[1]"), "tokens");
    check(json!({"input": ["a", vec![1; 4097], "b"]}), Some("input[1]"), "4097 tokens");
    check(json!({"input": "b".repeat(5000)}), Some("input"), "5000 tokens");
    check(json!({"input": "a", "encoding_format": "hex"}), Some("encoding_format"), "`float` or `base64`");
    check(json!({"input": "a", "dimensions": 0}), Some("dimensions"), "from 1");
    check(json!({"input": "a", "dimensions": 1.5}), Some("dimensions"), "with a fraction");
    check(json!({"input": "a", "dimensions": 64.0}), Some("dimensions"), "with a point");
    check(json!({"input": "a", "dimensions": 1e20}), Some("dimensions"), "a number that large");
    check(json!({"input": [u64::MAX]}), Some("input[0]"), "a number that large");
    check(json!({"input": "a", "stream": true}), Some("stream"), "unknown parameter");
    let other = house.post(EMBEDDINGS, &json!({"input": "a", "model": "x"}));
    check_error(&other, 404, Some("model"), "not served");
    assert_eq!(house.mock.requests.lock().unwrap().len(), 0);
}

#[test]
fn a_text_that_fails_fails_the_request_and_gives_up_the_others() {
    let house = House::that(Purpose::Embed);
    house.script(Script::Events(vec![Event::Failed(Failure::PlacementLost("a left".to_owned()))]));
    house.script(Script::Hold(vec![]));
    check_error(&house.post(EMBEDDINGS, &json!({"input": ["a", "b"]})), 503, None, "a left");
    house.wait_until_cancelled();
    house.wait_until_answering(0);
}

#[test]
fn each_model_is_asked_for_what_it_does() {
    let chat = json!({"messages": [{"role": "user", "content": "hi"}]});
    let embed = json!({"input": "a"});
    let rank = json!({"query": "q", "documents": ["d"]});
    let check = |purpose: Purpose, path: &str, body: &Value, says: &str| {
        check_error(&House::that(purpose).post(path, body), 400, Some("model"), says);
    };
    check(Purpose::Generate, EMBEDDINGS, &embed, "--pooling mean");
    check(Purpose::Generate, RERANK, &rank, "generates text");
    check(Purpose::Embed, "/v1/chat/completions", &chat, "use /v1/embeddings");
    check(Purpose::Embed, "/v1/completions", &json!({"prompt": "a"}), "use /v1/embeddings");
    check(Purpose::Embed, RERANK, &rank, "embeds texts");
    check(Purpose::Rank, EMBEDDINGS, &embed, "use /v1/rerank");
    check(Purpose::Rank, "/v1/chat/completions", &chat, "use /v1/rerank");
}

#[test]
fn documents_are_ranked_best_first() {
    let house = House::that(Purpose::Rank);
    for score in [0.0, 2.0, -1.0] {
        house.script(pooled(&[score]));
    }
    let documents = json!(["a", {"text": "b"}, "c"]);
    let body = json!({"query": "q", "documents": documents, "top_n": 2, "return_documents": true});
    let reply = house.post(RERANK, &body);
    assert_eq!(reply.status, 200, "{reply:?}");
    let found = reply.json();
    assert_eq!(found["usage"], json!({"prompt_tokens": 9, "total_tokens": 9}));
    assert!(found["id"].as_str().unwrap().starts_with("rank-"));
    let results = found["results"].as_array().unwrap();
    assert_eq!(results.len(), 2);
    assert_eq!((&results[0]["index"], &results[0]["document"]), (&json!(1), &json!({"text": "b"})));
    assert_eq!(results[1], json!({"index": 0, "relevance_score": 0.5, "document": {"text": "a"}}));
    let tokenized: Vec<String> = house.mock.tokenized.lock().unwrap().iter().map(|(text, ..)| text.clone()).collect();
    assert_eq!(tokenized, ["q\na", "q\nb", "q\nc"]);
    house.script(pooled(&[-1.5]));
    let raw = house.post(RERANK, &json!({"query": "q", "documents": ["a"], "raw_scores": true})).json();
    assert_eq!(raw["results"], json!([{"index": 0, "relevance_score": -1.5}]));
}

#[test]
fn classes_are_made_shares_unless_they_are() {
    let body = json!({"query": "q", "documents": ["a", "b"]});
    let raw = json!({"query": "q", "documents": ["a", "b"], "raw_scores": true});
    let check = |house: &House, body: &Value, values: [[f32; 2]; 2], expected: [(usize, f64); 2]| {
        values.iter().for_each(|classes| house.script(pooled(classes)));
        let reply = house.post(RERANK, body).json();
        for (found, (index, score)) in reply["results"].as_array().unwrap().iter().zip(expected) {
            assert_eq!(found["index"], index, "{reply}");
            assert!((found["relevance_score"].as_f64().unwrap() - score).abs() < 1e-6, "{reply}");
        }
    };
    let (logits, shares) = ([[3.0, 5.0], [1.0, 0.0]], [[0.25, 0.75], [0.5, 0.5]]);
    let house = House::with_vectors(Purpose::Rank, 2);
    check(&house, &body, logits, [(1, 0.731_058_6), (0, 0.119_202_9)]);
    check(&house, &raw, logits, [(0, 3.0), (1, 1.0)]);
    check(&House::with_class_shares(2), &body, shares, [(1, 0.5), (0, 0.25)]);
}

#[test]
fn wrong_rankings_are_refused_by_their_name() {
    let house = House::that(Purpose::Rank);
    let check = |body: Value, param: &str, says: &str| {
        check_error(&house.post(RERANK, &body), 400, Some(param), says);
    };
    check(json!({"documents": ["a"]}), "query", "required");
    check(json!({"query": "", "documents": ["a"]}), "query", "empty");
    check(json!({"query": "q"}), "documents", "required");
    check(json!({"query": "q", "documents": []}), "documents", "at least one");
    check(json!({"query": "q", "documents": [1]}), "documents[0]", "a string or an object");
    check(json!({"query": "q", "documents": [{"title": "t"}]}), "documents[0].title", "unknown parameter");
    check(json!({"query": "q", "documents": ["a"], "top_n": 0}), "top_n", "from 1");
    check(json!({"query": "q", "documents": ["a", "b".repeat(100_001)]}), "documents[1]", "tokens");
    check(json!({"query": "q", "documents": ["a", "b".repeat(5000)]}), "documents[1]", "tokens");
    check(json!({"query": "q".repeat(5000), "documents": ["a", "b"]}), "query", "tokens");
    assert_eq!(house.mock.requests.lock().unwrap().len(), 0);
}
