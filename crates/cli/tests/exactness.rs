//! Promise one: however a model is cut and however many ask at once, every answer is that of one machine.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

use std::sync::Arc;

use brigade_base::Token;
use brigade_node::CHUNK;
use serde_json::{Value, json};
use support::oracle::{Answer, oracle};
use support::{Cluster, Event, Setup, chat_body, endless_body, eventually};

/// `n` questions spread over all tasks; another `start` gives others.
fn questions(n: usize, start: usize) -> Vec<String> {
    let all: Vec<Value> = serde_json::from_str(include_str!("../../../models/eval.json")).unwrap();
    let question = |i: usize| all[(i * all.len() / n + start) % all.len()]["prompt"].as_str().unwrap().to_owned();
    (0..n).map(question).collect()
}

/// Tokens that look random.
fn random_tokens(n: usize, seed: usize) -> Vec<Token> {
    (0..n).map(|i| ((i * 7919 + seed * 104_729 + i * i * 31) % 1024) as Token).collect()
}

/// Asks each question alone and compares text, end and number of tokens with the oracle.
fn check_questions(cluster: &Cluster, questions: &[String]) {
    let placement = cluster.placement();
    for question in questions {
        let expected = oracle().chat(question);
        let reply = cluster.endpoint.post("/v1/chat/completions", &chat_body(question)).ok();
        let choice = &reply["choices"][0];
        let found = (&choice["message"]["content"], &choice["finish_reason"], &reply["usage"]["completion_tokens"]);
        let expected = (&json!(expected.text), &json!(expected.finish), &json!(expected.n_generated));
        assert_eq!(found, expected, "{question:?} on {placement:?}");
    }
}

fn check_nodes(n: usize) {
    let cluster = Cluster::of(n);
    assert_eq!(cluster.placement().len(), n);
    check_questions(&cluster, &questions(60, n));
}

#[test]
fn one_node_answers_as_the_engine() {
    check_nodes(1);
}

#[test]
fn two_nodes_answer_as_one() {
    check_nodes(2);
}

#[test]
fn three_nodes_answer_as_one() {
    check_nodes(3);
}

#[test]
fn four_nodes_answer_as_one() {
    check_nodes(4);
}

#[test]
fn every_cut_gives_the_same_answers() {
    for k in 1..8 {
        let cluster = Setup::of(2).layers(&format!("{k},{}", 8 - k)).start();
        assert_eq!(cluster.placement(), [("w0".to_owned(), [0, k]), ("a".to_owned(), [k, 8])]);
        check_questions(&cluster, &questions(12, k as usize));
    }
}

/// Compares a completion's text and log probabilities with the oracle's.
fn check_completion(reply: &Value, expected: &Answer, what: &str) {
    let choice = &reply["choices"][0];
    assert_eq!(choice["text"], json!(expected.text), "{what}");
    assert_eq!(choice["finish_reason"], json!(expected.finish), "{what}");
    let logprobs = choice["logprobs"]["token_logprobs"].as_array().unwrap();
    assert_eq!(logprobs.len(), expected.logprobs.len(), "{what}");
    for (i, (found, expected)) in logprobs.iter().zip(&expected.logprobs).enumerate() {
        let difference = (found.as_f64().unwrap() - expected).abs();
        assert!(difference < 1e-4, "{what}: token {i} differs by {difference}");
    }
}

/// Prompts of tokens: short, at and around the borders of a chunk, and of several chunks; with long answers.
#[test]
fn tokens_have_the_probabilities_of_one_machine() {
    let cluster = Cluster::of(3);
    let chunk = CHUNK as usize;
    let cases =
        [(1, 40), (3, 250), (chunk - 1, 10), (chunk, 10), (chunk + 1, 10), (2 * chunk, 10), (600, 220), (1000, 20)];
    for (seed, (n_prompt, n_answer)) in cases.into_iter().enumerate() {
        let prompt = random_tokens(n_prompt, seed);
        let expected = oracle().generate(&prompt, n_answer, true);
        assert_eq!(expected.tokens.len(), n_answer as usize);
        let mut body = endless_body(&prompt, n_answer);
        body["logprobs"] = 2.into();
        check_completion(&cluster.complete(&body), &expected, &format!("{n_prompt} tokens and {n_answer} more"));
    }
    // The same session in pieces as they come.
    let prompt = random_tokens(600, 6);
    let expected = oracle().generate(&prompt, 220, true);
    let (text, end) = cluster.stream("/v1/completions", &endless_body(&prompt, 220)).rest();
    assert_eq!((text, end), (expected.text.clone(), Event::Done));
}

/// A session that fills its context ends there, with all tokens that fitted.
#[test]
fn the_context_can_be_filled_to_the_last_token() {
    let cluster = Setup::of(2).context(256).start();
    let prompt = random_tokens(200, 1);
    let reply = cluster.complete(&endless_body(&prompt, 1000));
    let n = reply["usage"]["completion_tokens"].as_u64().unwrap();
    assert!((256 - 200..=256 - 200 + 1).contains(&n), "{n} tokens after 200 in a context of 256");
    let expected = oracle().generate(&prompt, n as u32, true);
    assert_eq!(reply["choices"][0]["text"], json!(expected.text));
    assert_eq!(reply["choices"][0]["finish_reason"], "length");
}

/// More sessions than slots, of different lengths, some in the middle of their prompt while others generate.
#[test]
fn sessions_that_run_together_answer_as_if_alone() {
    let cluster = Setup::of(3).parallel(4).start();
    let mut sessions: Vec<(Vec<Token>, u32, bool)> = Vec::new();
    for question in questions(12, 3) {
        sessions.push((oracle().tokens(&support::oracle::rendered(&question)), 64, false));
    }
    let story = oracle().tokens(&support::oracle::rendered("Tell me a story."));
    sessions.insert(1, (story.clone(), 200, true));
    let long: Vec<Token> = sessions.iter().flat_map(|(tokens, ..)| tokens.clone()).take(700).collect();
    sessions.insert(3, (long, 60, true));
    let sessions: Vec<_> = sessions
        .into_iter()
        .map(|(prompt, n, ignore_end)| {
            let expected: Arc<Answer> = oracle().generate(&prompt, n, ignore_end);
            let mut body = endless_body(&prompt, n);
            body["ignore_eos"] = ignore_end.into();
            (body, expected)
        })
        .collect();
    // Six at a time: four have a slot and two wait.
    for round in 0..3 {
        for together in sessions.chunks(6) {
            std::thread::scope(|scope| {
                for (body, expected) in together {
                    let cluster = &cluster;
                    scope.spawn(move || {
                        let reply = cluster.complete(body);
                        assert_eq!(reply["choices"][0]["text"], json!(expected.text), "round {round}");
                    });
                }
            });
        }
    }
    eventually("rest", || (cluster.status()["running"] == 0).then_some(()));
}
