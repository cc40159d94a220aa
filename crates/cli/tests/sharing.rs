//! What was computed once is not computed again: turns of a conversation, beginnings that requests share, and sessions
//! that were saved to disk; and never for anybody else, or after it has become another cluster's.
//!
//! Where a cache changes the shapes of the batches, the oracle is given the same ones, and bits are compared.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

use std::sync::Arc;

use brigade_base::Token;
use serde_json::{Value, json};
use support::oracle::{Answer, Oracle, conversation, oracle, rendered};
use support::{Cluster, Endpoint, Event, MAX_ANSWER, Metrics, Setup, chat_body, endless_body, quantised_abacus};

/// What users say in their conversations, turn by turn; the first turns have no beginning in common that is worth
/// sharing, and are long enough to be worth saving.
const TALKS: [[&str; 3]; 2] = [
    [
        "I have sixty apples and get eighty-nine more. Then somebody gives me a large basket with twelve pears and a \
         small one with seven plums. I count only the apples. How many are there?",
        "What is 17 + 25?",
        "Tell me a story.",
    ],
    [
        "Spell the word garden. Say each letter on its own, with a space between them, and do not say anything else \
         before or after the letters, since a machine that understands nothing but letters reads them.",
        "63 + 10",
        "What is the sum of 47 and 78?",
    ],
];

/// A turn, and what must come of it.
struct Turn {
    prompt: Vec<Token>,
    body: Value,
    expected: Answer,
    /// Tokens that need not be computed, if all that was computed before is still there.
    n_cached: usize,
}

/// A conversation as one machine has it that computes each token once, in the batch shapes of a cluster with a full
/// cache: the first prompt as a chunk, answers token by token, what each turn adds as a chunk.
fn talk(oracle: &mut Oracle, says: &[&str]) -> Vec<Turn> {
    let (mut computed, mut history): (Vec<Token>, Vec<Token>) = Default::default();
    let turn = |(i, text): (usize, &&str)| {
        let user = if i == 0 { rendered(text) } else { format!("<|im_end|>\n{}", conversation(&[text])) };
        history.extend(oracle.tokens(&user));
        let prompt = history.clone();
        let expected = oracle.go_on(&prompt, computed.len() as u32, MAX_ANSWER, false);
        let n_cached = computed.len();
        history.extend(&expected.tokens);
        // The token that ended the answer was chosen and never computed.
        computed.clone_from(&history);
        computed.truncate(prompt.len() + expected.n_generated - 1);
        let body = json!({"prompt": prompt, "max_tokens": MAX_ANSWER, "temperature": 0, "logprobs": 5});
        Turn { prompt, body, expected, n_cached }
    };
    says.iter().enumerate().map(turn).collect()
}

fn cached(reply: &Value) -> u64 {
    reply["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap()
}

/// Compares text and log probabilities with the oracle's, these bit by bit.
#[track_caller]
fn check_bits(reply: &Value, expected: &Answer) {
    let choice = &reply["choices"][0];
    assert_eq!(choice["text"], expected.text);
    assert_eq!(choice["finish_reason"], expected.finish);
    let number = |value: &Value| value.as_f64().unwrap() as f32;
    let own = choice["logprobs"]["token_logprobs"].as_array().unwrap().iter().map(number);
    let top = choice["logprobs"]["top_logprobs"].as_array().unwrap().iter().map(|alternatives| {
        let mut top: Vec<f32> = alternatives.as_object().unwrap().values().map(number).collect();
        top.sort_by(|a, b| b.total_cmp(a));
        top
    });
    assert_eq!(own.zip(top).collect::<Vec<_>>(), expected.printed);
}

/// Two conversations take turns, and nothing of them is computed twice. Returns how many tokens were not.
fn check_turns(cluster: &Cluster, oracle: &mut Oracle) -> usize {
    let talks = TALKS.map(|says| talk(oracle, &says));
    for turn in 0..TALKS[0].len() {
        for talk in &talks {
            let Turn { body, expected, n_cached, .. } = &talk[turn];
            let reply = cluster.complete(body);
            assert_eq!(cached(&reply), *n_cached as u64, "turn {turn}");
            check_bits(&reply, expected);
        }
    }
    // A lone run computes earlier answers as part of its prompt. That may show in the last bits, and nowhere else.
    for Turn { prompt, expected, .. } in talks.iter().flatten() {
        let lone = oracle.generate(prompt, MAX_ANSWER, false);
        assert_eq!(lone.text, expected.text);
        let differences = lone.logprobs.iter().zip(&expected.logprobs).map(|(a, b)| (a - b).abs());
        assert!(differences.fold(0.0, f64::max) < 0.01, "{:?}\n{:?}", lone.logprobs, expected.logprobs);
    }
    talks.iter().flatten().map(|turn| turn.n_cached).sum()
}

#[test]
fn on_two_nodes_no_turn_is_computed_twice_and_each_bit_is_that_of_one_machine() {
    check_turns(&Cluster::of(2), &mut oracle());
}

#[test]
fn on_three_nodes_no_turn_is_computed_twice_and_each_bit_is_that_of_one_machine() {
    check_turns(&Cluster::of(3), &mut oracle());
}

#[test]
fn on_quantised_weights_no_turn_is_computed_twice_and_each_bit_is_that_of_one_machine() {
    let model = quantised_abacus();
    let cluster = Setup::of(2).serve(&[model.to_str().unwrap()]).start();
    check_turns(&cluster, &mut Oracle::of(&model));
}

/// One slot for two conversations: each turn is loaded from disk, and that of the other is saved.
#[test]
fn a_conversation_comes_back_from_disk_bit_by_bit() {
    let cluster = Setup::of(3).parallel(1).kv_spill("64MiB").start();
    let n_restored = check_turns(&cluster, &mut oracle());
    let n_turns = TALKS[0].len() as f64;
    let metrics = cluster.metrics();
    let done = |what: &str| metrics.labelled(&format!("kv_image_{what}_total"), &[("outcome", "ok")]);
    assert_eq!(done("restores"), 2.0 * (n_turns - 1.0));
    assert_eq!(done("saves"), 2.0 * n_turns - 1.0, "all but the last, which still has the slot");
    assert_eq!(metrics.get("kv_image_restore_tokens_total"), n_restored as f64);
}

/// The same with messages, which are made into tokens anew in each turn.
#[test]
fn a_chat_says_how_much_of_it_was_known() {
    let cluster = Cluster::of(2);
    let mut body = chat_body(TALKS[0][0]);
    let mut known = 0;
    for says in &TALKS[0][1..] {
        let reply = cluster.endpoint.post("/v1/chat/completions", &body).ok();
        let usage = &reply["usage"];
        assert!(cached(&reply) >= known, "{usage} after {known}");
        known = usage["prompt_tokens"].as_u64().unwrap();
        let messages = body["messages"].as_array_mut().unwrap();
        messages.push(json!({"role": "assistant", "content": reply["choices"][0]["message"]["content"]}));
        messages.push(json!({"role": "user", "content": says}));
    }
    body["stream_options"] = json!({"include_usage": true});
    let mut stream = cluster.stream("/v1/chat/completions", &body);
    let mut usage = Value::Null;
    while let Event::Chunk(chunk) = stream.event() {
        usage = chunk;
    }
    assert!(cached(&usage) >= known, "{usage} after {known}");
}

/// Callers who come together with one long beginning have it computed once.
#[test]
fn a_beginning_that_all_share_is_computed_once() {
    let cluster = Setup::of(3).serve(&["--prefix-cache", "exact"]).start();
    let common: Vec<Token> = (0..300).map(|i| (i * 37 + i * i * 11) % 1024).collect();
    let prompt = |i: usize| [&common[..], &[i as Token; 20]].concat();
    let expected: Vec<Arc<Answer>> = (0..4).map(|i| oracle().generate(&prompt(i), 20, true)).collect();
    let n_cached: u64 = std::thread::scope(|scope| {
        let ask = |i: usize| {
            let (cluster, prompt, expected) = (&cluster, prompt(i), &expected[i]);
            scope.spawn(move || {
                let reply = cluster.complete(&endless_body(&prompt, 20));
                assert_eq!(reply["choices"][0]["text"], expected.text);
                cached(&reply)
            })
        };
        let threads: Vec<_> = (0..4).map(ask).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).sum()
    });
    // One computes it for all; the last tokens may be on their way still when the others begin.
    assert!(n_cached > 2 * common.len() as u64, "{n_cached} tokens were taken over by three");
    assert_eq!(cluster.metrics().get("prefix_cache_hits_total"), n_cached as f64);
}

/// What the same prompt costs one caller, then the same one again, then another.
fn asked_thrice(setup: Setup) -> [u64; 3] {
    let cluster = setup.key("first").serve(&["--api-key", "second"]).start();
    let first = cluster.endpoint.clone();
    let second = first.with_key(Some("second"));
    let prompt: Vec<Token> = (0..100).collect();
    let expected = oracle().generate(&prompt, 10, true);
    let ask = |endpoint: &Endpoint| {
        let reply = endpoint.post("/v1/completions", &endless_body(&prompt, 10)).ok();
        assert_eq!(reply["choices"][0]["text"], expected.text);
        cached(&reply)
    };
    [&first, &first, &second].map(ask)
}

#[test]
fn what_one_key_asked_helps_no_other() {
    assert_eq!(asked_thrice(Setup::of(2)), [0, 98, 0]);
    assert_eq!(asked_thrice(Setup::of(1).serve(&["--prefix-cache", "off"])), [0, 0, 0]);
}

#[test]
fn what_one_key_asked_helps_all_where_the_operator_says_so() {
    assert_eq!(asked_thrice(Setup::of(2).serve(&["--share-prefix-cache"])), [0, 98, 98]);
}

/// Prompts that look random, each long enough to be saved.
fn prompt(i: Token) -> Vec<Token> {
    (0..120).map(|at| (at * 7 + i * 101 + at * at * 3) % 1024).collect()
}

/// Asks for a short answer and compares it with the lone run; returns how much was cached.
#[track_caller]
fn check_prompt(cluster: &Cluster, i: Token) -> u64 {
    let expected = oracle().generate(&prompt(i), 10, true);
    let mut body = endless_body(&prompt(i), 10);
    body["logprobs"] = 5.into();
    let reply = cluster.complete(&body);
    check_bits(&reply, &expected);
    cached(&reply)
}

/// A worker dies while it holds slots and images that others go on from. It comes back without them: the answer that
/// runs is computed again, and nobody takes anything from before.
#[test]
fn after_a_loss_nothing_is_taken_from_before() {
    let mut cluster = Setup::of(3).layers("3,3,2").parallel(1).kv_spill("64MiB").start();
    assert_eq!([1, 2, 1].map(|i| check_prompt(&cluster, i)), [0, 0, 118], "the last one comes from disk");
    let mut stream = cluster.stream("/v1/completions", &endless_body(&prompt(2), 900));
    stream.chunks(3);
    let restored = |metrics: &Metrics| metrics.labelled("kv_image_restores_total", &[("outcome", "ok")]);
    let metrics = cluster.metrics();
    assert_eq!((restored(&metrics), metrics.get("kv_images") >= 1.0), (2.0, true));
    cluster.kill_worker(0);
    cluster.restart_worker(0);
    let (_, end) = stream.rest();
    assert!(matches!(end, Event::Done), "{end:?}");
    assert_eq!(cluster.metrics().get("kv_images"), 0.0);
    assert_eq!([1, 3, 2, 1, 3].map(|i| check_prompt(&cluster, i)), [0, 0, 118, 118, 118]);
    let metrics = cluster.metrics();
    let failed = |name| metrics.labelled(name, &[("outcome", "failed")]);
    assert_eq!(failed("kv_image_saves_total") + failed("kv_image_restores_total"), 0.0);
    assert_eq!(restored(&metrics), 2.0 + 3.0);
}

/// Those who are left after a loss share the layers in another way, and forget what they had computed.
#[test]
fn another_split_begins_without_a_cache() {
    let mut cluster = Setup::of(3).parallel(1).kv_spill("64MiB").start();
    assert_eq!([1, 2, 1].map(|i| check_prompt(&cluster, i)), [0, 0, 118]);
    cluster.kill_worker(1);
    cluster.wait_placed_on(&["a", "w0"]);
    assert_eq!([1, 2, 1].map(|i| check_prompt(&cluster, i)), [0, 0, 118]);
}
