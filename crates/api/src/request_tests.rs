//! What bodies mean, which are refused and in whose name, and that no body whatever causes a panic.

use brigade_base::ModelId;
use proptest::prelude::*;
use serde_json::json;

use super::*;

pub(crate) fn card() -> ModelCard {
    ModelCard {
        name: "abacus".to_owned(),
        id: ModelId::from_bytes([7; 32]),
        created: 1,
        context: 100,
        n_vocab: 256,
        chat_template: None,
        bos_text: String::new(),
        eos_text: String::new(),
        purpose: brigade_node::serving::Purpose::Generate,
        rank_template: None,
        n_values: 0,
        has_class_shares: false,
    }
}

fn chat(body: Value) -> Result<Chat, ApiError> {
    Chat::parse(body, Scope { model: &card(), random_seed: 42 })
}

fn completion(body: Value) -> Result<Completion, ApiError> {
    Completion::parse(body, Scope { model: &card(), random_seed: 42 })
}

fn with(mut body: Value, name: &str, value: Value) -> Value {
    body[name] = value;
    body
}

fn chat_with(name: &str, value: Value) -> Result<Chat, ApiError> {
    chat(with(json!({"model": "abacus", "messages": [{"role": "user", "content": "hi"}]}), name, value))
}

fn completion_with(name: &str, value: Value) -> Result<Completion, ApiError> {
    completion(with(json!({"model": "abacus", "prompt": "hi"}), name, value))
}

#[track_caller]
fn check_refused<T: std::fmt::Debug>(result: Result<T, ApiError>, param: &str) {
    let error = serde_json::to_value(result.unwrap_err().object()).unwrap();
    assert_eq!(error["error"]["param"], param, "{error}");
    assert_ne!(error["error"]["message"], "");
}

#[test]
fn defaults_are_openais() {
    let chat = chat_with("model", json!("default")).unwrap();
    let message = Message { role: Role::User, content: "hi".to_owned(), name: None };
    assert_eq!(chat.messages, [message]);
    let options = Options {
        max_tokens: None,
        sampling: Sampling { seed: 42, ..Sampling::default() },
        stop: Vec::new(),
        logprobs: None,
        ignore_end: false,
        priority: 0,
        timeout: None,
        stream: false,
        include_usage: false,
    };
    assert_eq!(chat.options, options);
    let plain = completion_with("temperature", Value::Null).unwrap();
    assert_eq!(plain.prompt, Prompt::Text("hi".to_owned()));
    assert_eq!(plain.options, Options { max_tokens: Some(16), ..options });
}

#[test]
fn every_field_reaches_its_place() {
    let body = json!({
        "prompt": [1, 2], "max_tokens": 3, "temperature": 0, "top_p": 0.5, "top_k": -1, "min_p": 0.1, "seed": -1,
        "repetition_penalty": 1.5, "frequency_penalty": -2, "presence_penalty": 2, "stop": ["a", "b"],
        "logit_bias": {"5": -100, "6": 1.5}, "logprobs": 5, "ignore_eos": true, "stream": true,
        "priority": -7, "timeout": 2.5,
        "stream_options": {"include_usage": true}, "n": 1, "best_of": 1, "echo": false, "suffix": null, "user": "u",
    });
    let expected = Completion {
        prompt: Prompt::Tokens(vec![1, 2]),
        options: Options {
            max_tokens: Some(3),
            sampling: Sampling {
                temperature: 0.0,
                top_k: 0,
                top_p: 0.5,
                min_p: 0.1,
                repeat_penalty: 1.5,
                frequency_penalty: -2.0,
                presence_penalty: 2.0,
                penalty_window: 100,
                seed: u64::MAX,
                logit_bias: vec![(5, -100.0), (6, 1.5)],
            },
            stop: vec!["a".to_owned(), "b".to_owned()],
            logprobs: Some(5),
            ignore_end: true,
            priority: -7,
            timeout: Some(Duration::from_millis(2500)),
            stream: true,
            include_usage: true,
        },
    };
    assert_eq!(completion(body), Ok(expected));
}

#[test]
fn prompts_come_in_four_shapes() {
    let text = Prompt::Text("a".to_owned());
    assert_eq!(completion(json!({"prompt": "a"})).unwrap().prompt, text);
    assert_eq!(completion(json!({"prompt": ["a"]})).unwrap().prompt, text);
    assert_eq!(completion(json!({"prompt": [0, 255]})).unwrap().prompt, Prompt::Tokens(vec![0, 255]));
    assert_eq!(completion(json!({"prompt": [[3]]})).unwrap().prompt, Prompt::Tokens(vec![3]));
    for (value, param) in [
        (json!([]), "prompt"),
        (json!(["a", "b"]), "prompt"),
        (json!([[1], [2]]), "prompt"),
        (json!([256]), "prompt[0]"),
        (json!([1, -1]), "prompt[1]"),
        (json!([1, "a"]), "prompt[1]"),
        (json!([[1.5]]), "prompt[0][0]"),
        (json!([true]), "prompt[0]"),
        (json!(7), "prompt"),
        (json!(null), "prompt"),
    ] {
        check_refused(completion(json!({"prompt": value})), param);
    }
}

#[test]
fn messages_are_text_of_known_roles() {
    let body = json!({"messages": [
        {"role": "developer", "content": "S", "name": "n"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": "c", "refusal": null, "tool_calls": [], "annotations": [], "audio": null},
    ]});
    let texts: Vec<_> = chat(body).unwrap().messages.into_iter().map(|m| (m.role, m.content)).collect();
    let expected = [(Role::System, "S"), (Role::User, "a\nb"), (Role::Assistant, "c")];
    assert_eq!(texts, expected.map(|(role, text)| (role, text.to_owned())));
    for (value, param) in [
        (json!([]), "messages"),
        (json!("hi"), "messages"),
        (json!(["hi"]), "messages[0]"),
        (json!([{"content": "a"}]), "messages[0].role"),
        (json!([{"role": "user", "content": "a"}, {"role": "king", "content": "a"}]), "messages[1].role"),
        (json!([{"role": "tool", "content": "a", "tool_call_id": "x"}]), "messages[0].role"),
        (json!([{"role": "user"}]), "messages[0].content"),
        (json!([{"role": "user", "content": 1}]), "messages[0].content"),
        (json!([{"role": "user", "content": "a", "mood": "good"}]), "messages[0].mood"),
        (json!([{"role": "assistant", "content": "a", "tool_calls": [{}]}]), "messages[0].tool_calls"),
        (json!([{"role": "user", "content": [{"text": "a"}]}]), "messages[0].content[0].type"),
        (json!([{"role": "user", "content": [{"type": "text"}]}]), "messages[0].content[0].text"),
        (json!([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]), "messages[0].content[0]"),
    ] {
        check_refused(chat(json!({"messages": value})), param);
    }
}

#[test]
fn numbers_have_ranges() {
    for (name, good, bad) in [
        ("temperature", json!(2), json!(2.1)),
        ("temperature", json!(0.0), json!("0")),
        ("top_p", json!(1), json!(0)),
        ("top_p", json!(1e-30), json!(1e-60)),
        ("top_p", json!(0.5), json!(1.1)),
        ("min_p", json!(0), json!(1.1)),
        ("top_k", json!(0), json!(-2)),
        ("repetition_penalty", json!(1.1), json!(0)),
        ("frequency_penalty", json!(-2), json!(-2.5)),
        ("presence_penalty", json!(2), json!(3)),
        ("max_tokens", json!(0), json!(-1)),
        ("max_tokens", json!(4_294_967_295_u32), json!(4_294_967_296_u64)),
        ("max_tokens", json!(1), json!(1.5)),
        ("seed", json!(i64::MIN), json!(u64::MAX)),
        ("n", json!(1), json!(2)),
        ("stop", json!("a"), json!("")),
        ("stop", json!(vec!["a"; 16]), json!(vec!["a"; 17])),
        ("stop", json!([]), json!([1])),
        ("stop", json!("a".repeat(1024)), json!("a".repeat(1025))),
        ("stream", json!(true), json!("true")),
        ("store", json!(false), json!(true)),
        ("ignore_eos", json!(false), json!(0)),
        ("logit_bias", json!({}), json!([])),
        ("priority", json!(-1000), json!(-1001)),
        ("priority", json!(1000), json!(1001)),
        ("priority", json!(0), json!(0.5)),
        ("timeout", json!(86_400), json!(86_401)),
        ("timeout", json!(0.001), json!(0)),
        ("timeout", json!(1e-9), json!(1e-30)),
        ("timeout", json!(1), json!(-1)),
        ("timeout", json!(1), json!("1")),
    ] {
        chat_with(name, good.clone()).unwrap();
        completion_with(name, good).unwrap();
        check_refused(chat_with(name, bad.clone()), name);
        check_refused(completion_with(name, bad), name);
    }
    check_refused(chat_with("logit_bias", json!({"1": 101})), "logit_bias.1");
    check_refused(chat_with("logit_bias", json!({"256": 1})), "logit_bias.256");
    check_refused(chat_with("logit_bias", json!({"a": 1})), "logit_bias.a");
    check_refused(completion_with("logprobs", json!(6)), "logprobs");
    check_refused(completion_with("logprobs", json!(true)), "logprobs");
    check_refused(chat_with("logprobs", json!(3)), "logprobs");
}

#[test]
fn what_is_not_there_is_refused_by_name() {
    for (name, value) in [
        ("tools", json!([{"type": "function"}])),
        ("tool_choice", json!("required")),
        ("functions", json!([{}])),
        ("response_format", json!({"type": "json_object"})),
        ("modalities", json!(["text", "audio"])),
        ("audio", json!({})),
        ("reasoning_effort", json!("high")),
        ("top_logprobs", json!(2)),
        ("stream_options", json!({"include_usage": true})),
        ("grammar", json!("root ::= x")),
        ("prompt", json!("hi")),
        ("model", json!("gpt-5")),
    ] {
        check_refused(chat_with(name, value), name);
    }
    for (name, value) in [
        ("echo", json!(true)),
        ("best_of", json!(2)),
        ("suffix", json!("x")),
        ("messages", json!([])),
        ("max_completion_tokens", json!(3)),
    ] {
        check_refused(completion_with(name, value), name);
    }
    let streamed = json!({"prompt": "a", "stream": true, "stream_options": {"speed": 2}});
    check_refused(completion(streamed), "stream_options.speed");
    for (name, value) in [
        ("tools", json!([])),
        ("tool_choice", json!("none")),
        ("parallel_tool_calls", json!(true)),
        ("modalities", json!(["text"])),
        ("response_format", json!({"type": "text"})),
        ("metadata", json!({"a": "b"})),
        ("top_logprobs", json!(0)),
        ("anything", json!(null)),
    ] {
        chat_with(name, value).unwrap();
    }
}

#[test]
fn both_names_of_the_answers_length_work() {
    assert_eq!(chat_with("max_tokens", json!(5)).unwrap().options.max_tokens, Some(5));
    assert_eq!(chat_with("max_completion_tokens", json!(6)).unwrap().options.max_tokens, Some(6));
    let both = json!({"messages": [{"role": "user", "content": ""}], "max_tokens": 1, "max_completion_tokens": 2});
    check_refused(chat(both), "max_completion_tokens");
}

#[test]
fn errors_repeat_only_so_much() {
    let error = chat_with(&"x".repeat(100_000), json!(1)).unwrap_err();
    assert!(serde_json::to_string(&error.object()).unwrap().len() < 500);
    let error = chat_with("model", json!("é".repeat(100_000))).unwrap_err();
    assert!(serde_json::to_string(&error.object()).unwrap().len() < 500);
    for name in ["timeout", "top_p", "temperature"] {
        let error = chat_with(name, json!(1e308)).unwrap_err();
        assert!(serde_json::to_string(&error.object()).unwrap().len() < 300, "{name}: {error}");
    }
}

fn any_json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        any::<String>().prop_map(Value::from),
        prop::sample::select(vec!["user", "text", "auto", "default", "1"]).prop_map(Value::from),
    ];
    leaf.prop_recursive(4, 32, 6, |inner| {
        let key = prop_oneof![any::<String>(), prop::sample::select(NAMES.to_vec()).prop_map(str::to_owned)];
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..6).prop_map(Value::from),
            prop::collection::vec((key, inner), 0..6).prop_map(|pairs| Value::Object(pairs.into_iter().collect())),
        ]
    })
}

const NAMES: &[&str] = &[
    "model",
    "messages",
    "role",
    "content",
    "type",
    "text",
    "prompt",
    "stop",
    "n",
    "stream",
    "stream_options",
    "seed",
    "logit_bias",
    "logprobs",
    "top_logprobs",
    "temperature",
    "max_tokens",
    "tools",
    "response_format",
    "include_usage",
    "priority",
    "timeout",
];

proptest! {
    #[test]
    fn no_body_causes_a_panic(body in any_json()) {
        let _ = (chat(body.clone()), completion(body));
    }

    #[test]
    fn no_field_causes_a_panic(name in prop::sample::select(NAMES.to_vec()), value in any_json()) {
        let _ = (chat_with(name, value.clone()), completion_with(name, value));
    }

    #[test]
    fn no_message_causes_a_panic(role in any_json(), content in any_json()) {
        let _ = chat(json!({"messages": [{"role": role, "content": content}]}));
    }
}

#[test]
fn penalties_look_at_no_more_than_they_can() {
    let body = || json!({"prompt": "hi", "frequency_penalty": 0.5});
    for (context, window) in [(4096, 4096), (1 << 21, 1 << 20)] {
        let model = ModelCard { context, ..card() };
        let sampling = Completion::parse(body(), Scope { model: &model, random_seed: 42 }).unwrap().options.sampling;
        assert_eq!(sampling.penalty_window, window);
        sampling.validate(model.n_vocab).unwrap();
    }
}
