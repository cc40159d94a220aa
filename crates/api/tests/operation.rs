//! What operators rely on: ids that tie a request together, whose it is, metrics, and traces.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on has failed")]

mod common;

use std::sync::atomic::Ordering;
use std::time::Duration;

use brigade_api::ApiOptions;
use brigade_base::{NodeId, TenantId};
use brigade_node::serving::{Event, Examination, Failure, Finding, NodeFindings, Severity, SubmitError};
use common::{House, LARGE_BYTES, Reply, Script, delta};
use serde_json::{Value, json};

const CHAT: &str = "/v1/chat/completions";
const PLAIN: &str = "/v1/completions";

fn keys() -> ApiOptions {
    let keys = vec!["sk-a".to_owned(), "sk-b".to_owned()];
    ApiOptions { keys, admin_token: Some("root".to_owned()), ..ApiOptions::default() }
}

/// Asks for a plain completion with further headers.
fn complete(house: &House, headers: &[(&str, &str)], body: &Value) -> Reply {
    let mut all = vec![("Content-Type", "application/json")];
    all.extend(headers);
    house.ask("POST", PLAIN, &all, &body.to_string())
}

fn with_key(house: &House, path: &str, key: &str) -> Reply {
    house.ask("GET", path, &[("Authorization", &format!("Bearer {key}"))], "")
}

/// The ids of the requests that reached the node.
fn ids(house: &House) -> Vec<String> {
    house.mock.requests.lock().unwrap().iter().map(|request| request.id.clone()).collect()
}

#[test]
fn one_id_names_a_request_everywhere() {
    let house = House::open();
    let messages = json!([{"role": "user", "content": "hi"}]);
    for (path, prefix, body) in [
        (CHAT, "chatcmpl-", json!({"messages": messages})),
        (CHAT, "chatcmpl-", json!({"messages": messages, "stream": true})),
        (PLAIN, "cmpl-", json!({"prompt": "a"})),
        (PLAIN, "cmpl-", json!({"prompt": "a", "stream": true})),
    ] {
        let reply = house.post(path, &body);
        let id = ids(&house).pop().unwrap();
        assert!(id.starts_with(prefix), "{id}");
        assert_eq!(reply.header("x-request-id"), Some(id.as_str()));
        let answer =
            if body["stream"] == true { serde_json::from_str(reply.events()[0]).unwrap() } else { reply.json() };
        assert_eq!(answer["id"], id.as_str());
    }
    let mut all = ids(&house);
    all.dedup();
    assert_eq!(all.len(), 4);
}

#[test]
fn refusals_have_an_id_too() {
    let house = House::open();
    house.script(Script::Refuse(SubmitError::Busy { waiting: 7 }));
    let busy = house.post(PLAIN, &json!({"prompt": "a"}));
    busy.check_error(429, None, Some("rate_limit_exceeded"));
    assert_eq!(busy.header("retry-after"), Some("1"));
    let wrong = house.post(PLAIN, &json!({"prompt": "a", "mood": "good"}));
    wrong.check_error(400, Some("mood"), Some("unknown_parameter"));
    for reply in [busy, wrong] {
        assert!(reply.header("x-request-id").is_some_and(|id| id.starts_with("cmpl-")), "{reply:?}");
    }
}

#[test]
fn a_clients_own_id_is_taken_or_refused_but_never_becomes_ours() {
    let house = House::open();
    let body = json!({"prompt": "a"});
    for own in ["x", "b3f0-77/A:{~}", &"y".repeat(128)] {
        let reply = complete(&house, &[("X-Request-Id", own)], &body);
        assert_eq!(reply.status, 200);
        let id = ids(&house).pop().unwrap();
        assert_ne!(id, own);
        assert_eq!(reply.header("x-request-id"), Some(id.as_str()));
    }
    let n_taken = ids(&house).len();
    for own in ["", "two words", "caf\u{e9}", &"y".repeat(129)] {
        complete(&house, &[("X-Request-Id", own)], &body).check_error(400, None, Some("invalid_value"));
    }
    assert_eq!(ids(&house).len(), n_taken);
}

#[test]
fn a_request_carries_its_priority_and_its_time() {
    let house = House::open();
    house.post(PLAIN, &json!({"prompt": "a"}));
    house.post(PLAIN, &json!({"prompt": "a", "priority": -5, "timeout": 0.5}));
    let told: Vec<_> = house.mock.requests.lock().unwrap().iter().map(|r| (r.priority, r.timeout)).collect();
    assert_eq!(told, [(0, None), (-5, Some(Duration::from_millis(500)))]);
    house.post(PLAIN, &json!({"prompt": "a", "priority": 1001})).check_error(
        400,
        Some("priority"),
        Some("invalid_value"),
    );
    house.post(PLAIN, &json!({"prompt": "a", "timeout": 0})).check_error(400, Some("timeout"), Some("invalid_value"));
}

/// Tokenizing cannot be ended, so what nobody waits for any more must not hold up the others.
#[test]
fn large_prompts_leave_threads_to_short_ones_and_to_metrics() {
    let house = House::open();
    let busy = house.mock.large.lock().unwrap();
    let large = json!({"prompt": "a".repeat(LARGE_BYTES + 1)}).to_string();
    let send = || house.send("POST", PLAIN, &[("Content-Type", "application/json")], &large);
    let check_others = || {
        for _ in 0..3 {
            assert_eq!(house.post(PLAIN, &json!({"prompt": "a"})).status, 200);
            assert_eq!(house.post(CHAT, &json!({"messages": [{"role": "user", "content": "hi"}]})).status, 200);
            assert_eq!(house.get("/metrics").status, 200);
            assert_eq!(house.get("/debug/requests/x").status, 404);
        }
    };
    let streams: Vec<_> = (0..6).map(|_| send()).collect();
    house.wait_until_begun(6);
    house.wait_until_large(2);
    check_others();
    drop(streams);
    house.wait_until_answering(0);
    check_others();
    drop(busy);
    assert_eq!(Reply::read(send()).status, 200);
    assert_eq!(house.n_large(), 3, "those that waited when their clients left were not begun");
}

#[test]
fn an_answer_that_takes_too_long_says_so() {
    let house = House::open();
    let late =
        || Script::Events(vec![delta("half"), Event::Failed(Failure::TimedOut { after: Duration::from_secs(2) })]);
    house.script(late());
    let reply = house.post(PLAIN, &json!({"prompt": "a", "timeout": 2}));
    reply.check_error(504, None, Some("timeout"));
    assert!(reply.body.contains("after 2 s"), "{reply:?}");
    house.script(late());
    let reply = house.post(PLAIN, &json!({"prompt": "a", "timeout": 2, "stream": true}));
    let last: Value = serde_json::from_str(reply.events().last().unwrap()).unwrap();
    assert_eq!((reply.status, &last["error"]["code"]), (200, &json!("timeout")));
}

#[test]
fn requests_with_one_key_are_of_one_tenant() {
    let tenants = |options: ApiOptions| {
        let house = House::with(options);
        for key in ["Bearer sk-a", "Bearer sk-b", "Bearer root", "Bearer sk-a"] {
            assert_eq!(complete(&house, &[("Authorization", key)], &json!({"prompt": "a"})).status, 200);
        }
        let requests = house.mock.requests.lock().unwrap();
        requests.iter().map(|request| request.tenant).collect::<Vec<_>>()
    };
    let told = tenants(keys());
    assert_eq!(told[0], told[3]);
    assert!(told[0] != told[1] && told[1] != told[2] && told[0] != told[2]);
    assert!(!told.contains(&TenantId(0)));
    assert_eq!(tenants(keys()), told, "keys name the same tenants after a restart");
    assert_eq!(tenants(ApiOptions { share_prefix_cache: true, ..keys() }), [TenantId(0); 4]);

    let open = House::open();
    complete(&open, &[("Authorization", "Bearer none")], &json!({"prompt": "a"}));
    assert_eq!(open.mock.requests.lock().unwrap()[0].tenant, TenantId(0));
}

#[test]
fn a_trace_is_shown_to_whose_it_is() {
    let house = House::with(keys());
    complete(&house, &[("Authorization", "Bearer sk-a")], &json!({"prompt": "abc", "priority": 3}));
    let path = format!("/debug/requests/{}", ids(&house)[0]);
    for key in ["sk-a", "root"] {
        let trace = with_key(&house, &path, key).json();
        assert_eq!((&trace["prompt_tokens"], &trace["priority"]), (&json!(3), &json!(3)));
        assert_eq!(trace.get("tenant"), None);
    }
    with_key(&house, &path, "sk-b").check_error(404, None, Some("request_not_found"));
    with_key(&house, "/debug/requests/cmpl-0", "root").check_error(404, None, Some("request_not_found"));
    with_key(&house, "/debug/requests/%ff", "root").check_error(400, None, None);
    house.get(&path).check_error(401, None, Some("invalid_api_key"));

    let open = House::open();
    open.post(PLAIN, &json!({"prompt": "a"}));
    assert_eq!(open.get(&format!("/debug/requests/{}", ids(&open)[0])).json()["state"], "running");
}

#[test]
fn metrics_are_the_nodes_and_the_count_of_answers() {
    let house = House::open();
    house.post(PLAIN, &json!({"prompt": "a"}));
    house.post(PLAIN, &json!({"prompt": "a"}));
    house.post(PLAIN, &json!({"mood": "good"}));
    for n in 0..3 {
        house.get(&format!("/nowhere/{n}"));
        house.get(&format!("/v1/models/{n}"));
    }
    let reply = house.get("/metrics");
    assert_eq!(reply.status, 200);
    assert_eq!(reply.header("content-type"), Some("application/openmetrics-text; version=1.0.0; charset=utf-8"));
    let lines: Vec<&str> = reply.body.lines().collect();
    assert_eq!((lines.last(), lines.iter().filter(|line| **line == "# EOF").count()), (Some(&"# EOF"), 1));
    for expected in [
        "brigade_num_requests_running 2",
        "# TYPE brigade_http_requests counter",
        r#"brigade_http_requests_total{route="/v1/completions",status="200"} 2"#,
        r#"brigade_http_requests_total{route="/v1/completions",status="400"} 1"#,
        r#"brigade_http_requests_total{route="/v1/models/{*id}",status="404"} 3"#,
        r#"brigade_http_requests_total{route="none",status="404"} 3"#,
    ] {
        assert!(lines.contains(&expected), "{expected} is not in\n{}", reply.body);
    }
}

#[test]
fn metrics_are_guarded_as_the_rest() {
    let house = House::with(keys());
    house.get("/metrics").check_error(401, None, Some("invalid_api_key"));
    let reply = with_key(&house, "/metrics", "sk-a");
    assert!(reply.body.contains(r#"brigade_http_requests_total{route="/metrics",status="401"} 1"#), "{}", reply.body);
    let open = House::open();
    open.ask("GET", "/metrics", &[("Host", "evil.example")], "").check_error(403, None, Some("forbidden"));
}

#[test]
fn nodes_are_examined_for_whoever_may_see_the_status() {
    let house = House::with(keys());
    house.get("/brigade/v1/doctor").check_error(401, None, Some("invalid_api_key"));
    let nobody = with_key(&house, "/brigade/v1/doctor", "sk-a");
    assert_eq!((nobody.status, nobody.json()["error"]["message"].as_str()), (503, Some("nobody was asked")));
    let finding = Finding {
        check: "swap".to_owned(),
        severity: Severity::Warn,
        detail: "1 GiB in use".to_owned(),
        cost: "time".to_owned(),
        fix: "close programs".to_owned(),
    };
    let node = NodeFindings {
        id: NodeId::from_bytes([3; 32]),
        name: "box".to_owned(),
        role: "worker".to_owned(),
        findings: vec![finding],
    };
    *house.mock.examination.lock().unwrap() = Ok(Examination { nodes: vec![node] });
    let found = with_key(&house, "/brigade/v1/doctor", "sk-a").json();
    let expected = json!({"nodes": [{
        "id": "03".repeat(32), "name": "box", "role": "worker",
        "findings": [{"check": "swap", "severity": "warn", "detail": "1 GiB in use", "cost": "time", "fix": "close programs"}],
    }]});
    assert_eq!(found, expected);
}

#[test]
fn nodes_are_examined_once_at_a_time_and_nobody_waits_for_that() {
    let house = House::open();
    // It takes as long as this test likes.
    let holds = house.mock.examination.lock().unwrap();
    let first = house.send("GET", "/brigade/v1/doctor", &[], "");
    house.wait_until_examined(1);
    // More than there are threads for prompts.
    for _ in 0..8 {
        let other = house.get("/brigade/v1/doctor");
        other.check_error(503, None, Some("service_unavailable"));
        assert!(other.body.contains("already") && other.header("retry-after").is_some(), "{other:?}");
    }
    assert_eq!(house.post(PLAIN, &json!({"prompt": "a"})).status, 200);
    drop(holds);
    assert!(Reply::read(first).body.contains("nobody was asked"));
    assert!(house.get("/brigade/v1/doctor").body.contains("nobody was asked"), "the next one may ask");
    assert_eq!(house.mock.n_examined.load(Ordering::SeqCst), 2);
}
