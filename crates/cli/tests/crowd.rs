//! Many at once: whoever comes, waits, is pushed aside or hangs up, every answer is the one of a lone run.
//!
//! A crowd is made from a seed: talks of several turns below one long system prompt, and completions of tokens that
//! look random, with priorities, streams, and callers who hang up. When all of it is asked at once, the schedule and
//! the batches are others in each run, and no text may be.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

use std::io::{ErrorKind, Read};
use std::net::TcpStream;
use std::sync::Arc;

use brigade_base::Token;
use brigade_node::MAX_WAITING;
use serde_json::{Value, json};
use support::oracle::{Answer, Oracle, instructed, oracle, rendered};
use support::{Cluster, Event, MAX_ANSWER, Setup, endless_body, eventually, quantised_abacus};

const CHAT: &str = "/v1/chat/completions";
const PLAIN: &str = "/v1/completions";

/// Tokens of an answer that takes so long that it can be disturbed.
const LONG: u32 = 600;

/// A priority behind those of all others.
const PATIENT: i64 = 9;

/// Numbers that look random: SplitMix64.
struct Dice(u64);

impl Dice {
    /// A number in `0..n`.
    fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % n
    }

    /// A number in `from..to`.
    fn within(&mut self, from: u64, to: u64) -> u64 {
        from + self.below(to - from)
    }

    fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    fn tokens(&mut self, n: u64) -> Vec<Token> {
        (0..n).map(|_| self.below(1024) as Token).collect()
    }
}

/// How a caller takes its answer.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Manner {
    Whole,
    Streamed,
    /// Hangs up after so many pieces of a stream.
    Leaves(usize),
    /// Hangs up without having read anything.
    RunsAway,
}

/// A request and what must come of it.
struct Ask {
    path: &'static str,
    body: Value,
    manner: Manner,
    expected: Arc<Answer>,
}

impl Ask {
    /// Asks, and compares what is told with the lone run.
    fn check(&self, cluster: &Cluster, what: &str) {
        let expected = &self.expected;
        match self.manner {
            Manner::Whole => {
                let reply = cluster.endpoint.post(self.path, &self.body).ok();
                let choice = &reply["choices"][0];
                let text = choice["text"].as_str().or(choice["message"]["content"].as_str());
                assert_eq!(text, Some(&expected.text[..]), "{what}");
                assert_eq!(choice["finish_reason"], expected.finish, "{what}");
                assert_eq!(reply["usage"]["completion_tokens"], expected.n_generated, "{what}");
            }
            Manner::Streamed => {
                let told = cluster.stream(self.path, &self.body).rest();
                assert_eq!(told, (expected.text.clone(), Event::Done), "{what}");
            }
            Manner::Leaves(n) => {
                let told = cluster.stream(self.path, &self.body).chunks(n);
                assert!(expected.text.starts_with(&told), "{what}: {told:?} does not begin {:?}", expected.text);
            }
            Manner::RunsAway => drop(cluster.endpoint.post_on_socket(self.path, &self.body)),
        }
    }
}

/// A completion of a prompt that need not mean anything.
fn completion(oracle: &mut Oracle, prompt: &[Token], n_answer: u64, priority: i64, manner: Manner) -> Ask {
    let expected = oracle.generate(prompt, n_answer as u32, true);
    let mut body = endless_body(prompt, n_answer as u32);
    body["priority"] = priority.into();
    Ask { path: PLAIN, body, manner, expected }
}

/// What the model is told first in all talks: long enough that chunks of it travel on their own.
fn system_prompt() -> String {
    let rules = "Answer in one short sentence. Say the numbers again before you say what they make together. ";
    rules.repeat(5)
}

/// A talk of three turns.
fn talk(oracle: &mut Oracle, dice: &mut Dice, all_questions: &[Value]) -> Vec<Ask> {
    let mut turns: Vec<String> = Vec::new();
    let mut asks = Vec::new();
    for _ in 0..3 {
        let question = &all_questions[dice.below(all_questions.len() as u64) as usize];
        turns.push(question["prompt"].as_str().unwrap().to_owned());
        let texts: Vec<&str> = turns.iter().map(String::as_str).collect();
        let prompt = oracle.tokens(&instructed(&system_prompt(), &texts));
        let expected = oracle.generate(&prompt, MAX_ANSWER, false);
        let roles = ["user", "assistant"].into_iter().cycle();
        let turn = |(role, text): (&str, &String)| json!({"role": role, "content": text});
        let mut messages = vec![json!({"role": "system", "content": system_prompt()})];
        messages.extend(roles.zip(&turns).map(turn));
        turns.push(expected.text.clone());
        let body = json!({
            "messages": messages, "max_tokens": MAX_ANSWER, "temperature": 0, "priority": dice.below(3) as i64 - 1,
        });
        let manner = if dice.one_in(2) { Manner::Whole } else { Manner::Streamed };
        asks.push(Ask { path: CHAT, body, manner, expected });
    }
    asks
}

/// What each of ten callers asks, one thing after the other.
fn crowd(oracle: &mut Oracle, dice: &mut Dice) -> Vec<Vec<Ask>> {
    let all_questions: Vec<Value> = serde_json::from_str(include_str!("../../../models/eval.json")).unwrap();
    let mut callers: Vec<Vec<Ask>> = (0..4).map(|_| talk(oracle, dice, &all_questions)).collect();
    for _ in 0..6 {
        let mut asks = Vec::new();
        for _ in 0..4 {
            let n_prompt = if dice.one_in(4) { dice.within(300, 700) } else { dice.within(2, 120) };
            let (n_answer, priority) = (dice.within(10, 50), dice.below(3) as i64 - 1);
            let manner = match dice.below(6) {
                0 => Manner::Leaves(1),
                1 => Manner::RunsAway,
                2 | 3 => Manner::Whole,
                _ => Manner::Streamed,
            };
            asks.push(completion(oracle, &dice.tokens(n_prompt), n_answer, priority, manner));
        }
        callers.push(asks);
    }
    callers
}

/// Four patient sessions have all slots when a crowd of more urgent ones comes; in the end all have their answers.
fn check_crowd(setup: Setup, oracle: &mut Oracle, seed: u64) -> Cluster {
    let mut dice = Dice(seed);
    let patient: Vec<Ask> = (0..4)
        .map(|_| {
            let (n_prompt, n_answer) = (dice.within(100, 200), dice.within(200, 300));
            completion(oracle, &dice.tokens(n_prompt), n_answer, PATIENT, Manner::Streamed)
        })
        .collect();
    let callers = crowd(oracle, &mut dice);
    let cluster = setup.parallel(4).start();
    let mut streams: Vec<_> = patient.iter().map(|ask| cluster.stream(ask.path, &ask.body)).collect();
    let begun: Vec<String> = streams.iter_mut().map(|stream| stream.chunks(2)).collect();
    std::thread::scope(|scope| {
        for (caller, asks) in callers.iter().enumerate() {
            let cluster = &cluster;
            scope.spawn(move || {
                for (n, ask) in asks.iter().enumerate() {
                    ask.check(cluster, &format!("request {n} of caller {caller}, seed {seed}, {:?}", ask.manner));
                }
            });
        }
    });
    for ((ask, begun), mut stream) in patient.iter().zip(begun).zip(streams) {
        let (rest, end) = stream.rest();
        assert_eq!((begun + &rest, end), (ask.expected.text.clone(), Event::Done), "a patient session, seed {seed}");
    }
    cluster.wait_idle();
    let asks = || patient.iter().chain(callers.iter().flatten());
    let n_whole = asks().filter(|ask| matches!(ask.manner, Manner::Whole | Manner::Streamed)).count();
    let metrics = cluster.metrics();
    let ended = |reason| metrics.labelled("request_success_total", &[("finished_reason", reason)]);
    assert!(asks().count() >= 40 && n_whole < asks().count(), "{n_whole} of {}", asks().count());
    assert!(ended("stop") + ended("length") >= n_whole as f64, "{metrics:?}");
    assert_eq!(ended("error") + ended("timeout"), 0.0);
    assert_eq!(metrics.get("epoch"), 1.0, "nothing went wrong that a new placement mended");
    assert!(metrics.get("num_preemptions_total") >= 1.0);
    let failed = |name| metrics.labelled(name, &[("outcome", "failed")]);
    assert_eq!(failed("kv_image_saves_total") + failed("kv_image_restores_total"), 0.0);
    cluster
}

fn outcomes(cluster: &Cluster, name: &str) -> f64 {
    cluster.metrics().labelled(name, &[("outcome", "ok")])
}

#[test]
fn a_crowd_is_answered_as_if_each_were_alone() {
    let cluster = check_crowd(Setup::of(3).serve(&["--prefix-cache", "exact"]).kv_spill("64MiB"), &mut oracle(), 1);
    assert!(cluster.metrics().get("prefix_cache_hits_total") >= 1.0);
    assert!(outcomes(&cluster, "kv_image_saves_total") >= 1.0);
    assert!(outcomes(&cluster, "kv_image_restores_total") >= 1.0);
}

/// So little disk that images push each other out while others are on their way.
#[test]
fn a_crowd_with_little_disk_is_answered_as_if_each_were_alone() {
    let cluster = check_crowd(Setup::of(2).serve(&["--prefix-cache", "exact"]).kv_spill("1MiB"), &mut oracle(), 2);
    assert!(outcomes(&cluster, "kv_image_saves_total") >= 1.0);
}

/// Quantised products have other bits for a row alone than for one of many; each row is computed in the same company
/// of its own session here and there.
#[test]
fn a_crowd_on_quantised_weights_is_answered_as_if_each_were_alone() {
    let model = quantised_abacus();
    let setup = Setup::of(2).serve(&[model.to_str().unwrap(), "--prefix-cache", "exact"]).kv_spill("64MiB");
    let cluster = check_crowd(setup, &mut Oracle::of(&model), 6);
    assert!(outcomes(&cluster, "kv_image_restores_total") >= 1.0);
}

/// Who was preempted has its tokens computed again.
#[test]
fn a_crowd_without_disk_is_answered_as_if_each_were_alone() {
    let cluster = check_crowd(Setup::of(3).serve(&["--prefix-cache", "exact"]), &mut oracle(), 3);
    assert!(cluster.metrics().get("prefix_cache_hits_total") >= 1.0);
    assert_eq!(outcomes(&cluster, "kv_image_saves_total"), 0.0);
}

/// Without a cache, what is kept of a session is for itself alone.
#[test]
fn a_crowd_without_a_cache_is_answered_as_if_each_were_alone() {
    let cluster = check_crowd(Setup::of(3).serve(&["--prefix-cache", "off"]).kv_spill("64MiB"), &mut oracle(), 4);
    assert!(outcomes(&cluster, "kv_image_restores_total") >= 1.0);
    let body = endless_body(&Dice(5).tokens(100), 2);
    for _ in 0..2 {
        let reply = cluster.complete(&body);
        assert_eq!(reply["usage"]["prompt_tokens_details"]["cached_tokens"], 0);
    }
    assert_eq!(cluster.metrics().get("kv_images"), 0.0, "nobody is left who could use one");
}

fn story() -> Vec<Token> {
    oracle().tokens(&rendered("Tell me a story."))
}

/// The id of a stream and its text so far, once it has some.
fn begin(cluster: &Cluster, body: &Value) -> (support::Stream, String, String) {
    let mut stream = cluster.stream(PLAIN, body);
    let Event::Chunk(chunk) = stream.event() else { panic!("a stream without a beginning") };
    let text = support::http::chunk_text(&chunk).to_owned();
    (stream, chunk["id"].as_str().unwrap().to_owned(), text)
}

fn check_preemption(setup: Setup) {
    let cluster = setup.parallel(1).start();
    let story = story();
    let mut patient = endless_body(&story, LONG);
    patient["priority"] = 1.into();
    let (mut stream, patient_id, mut told) = begin(&cluster, &patient);
    let question = oracle().tokens(&rendered("What is 17 + 25?"));
    let mut urgent = endless_body(&question, 30);
    urgent["priority"] = (-1).into();
    let reply = cluster.complete(&urgent);
    assert_eq!(reply["choices"][0]["text"], oracle().generate(&question, 30, true).text);
    let (rest, end) = stream.rest();
    told.push_str(&rest);
    assert_eq!((told, end), (oracle().generate(&story, LONG, true).text.clone(), Event::Done));

    let ended = |trace: &Value| trace["received_unix_ms"].as_f64().unwrap() + trace["total_ms"].as_f64().unwrap();
    let patient = cluster.trace_of_done(&patient_id);
    let urgent = cluster.trace_of_done(reply["id"].as_str().unwrap());
    assert_eq!((&patient["preemptions"], &urgent["preemptions"]), (&json!(1), &json!(0)));
    assert_eq!((&patient["priority"], &urgent["priority"]), (&json!(1), &json!(-1)));
    assert!(patient["preempted_ms"].as_f64().unwrap() > 0.0, "{patient}");
    assert!(ended(&urgent) < ended(&patient), "{urgent}\n{patient}");
    assert_eq!(cluster.metrics().get("num_preemptions_total"), 1.0);
}

#[test]
fn an_urgent_request_takes_the_slot_of_a_patient_one_which_is_replayed() {
    check_preemption(Setup::of(2));
}

#[test]
fn an_urgent_request_takes_the_slot_of_a_patient_one_which_is_loaded_again() {
    check_preemption(Setup::of(3).kv_spill("64MiB"));
}

/// Time runs out for one that runs, whole and streamed, and for one that waits behind another.
#[test]
fn who_has_no_time_left_is_told_and_gives_up_its_place() {
    let cluster = Setup::of(2).parallel(1).start();
    let story = story();
    let mut hasty = endless_body(&story, LONG);
    hasty["timeout"] = json!(0.05);
    let reply = cluster.endpoint.post(PLAIN, &hasty);
    assert_eq!((reply.status, reply.code()), (504, "timeout"), "{reply:?}");
    assert!(reply.message().contains("0.05 s"), "{reply:?}");
    let trace = cluster.trace_of_done(reply.request_id.as_ref().unwrap());
    assert_eq!(trace["finish"], "timeout");
    let (told, end) = cluster.stream(PLAIN, &hasty).rest();
    let Event::Error(error) = end else { panic!("{end:?}") };
    assert_eq!(error["error"]["code"], "timeout");
    assert!(oracle().generate(&story, LONG, true).text.starts_with(&told), "{told:?}");
    cluster.wait_idle();

    let (mut stream, id, _) = begin(&cluster, &endless_body(&story, LONG));
    let reply = cluster.endpoint.post(PLAIN, &hasty);
    assert_eq!((reply.status, reply.code()), (504, "timeout"), "{reply:?}");
    let waited = cluster.trace_of_done(reply.request_id.as_ref().unwrap());
    assert_eq!((&waited["queued_ms"], &waited["completion_tokens"]), (&Value::Null, &json!(0)), "it never ran");
    eventually("a free place", || (cluster.status()["waiting"] == 0).then_some(()));
    assert_eq!(cluster.trace(&id)["finish"], Value::Null, "the one before it runs on");
    assert_eq!(stream.rest().1, Event::Done);
    let ended = |reason| cluster.metrics().labelled("request_success_total", &[("finished_reason", reason)]);
    eventually("the last end", || (ended("length") == 1.0).then_some(()));
    assert_eq!(ended("timeout"), 3.0);
    cluster.check_answer();
}

/// The head of a reply that has come, if one has.
fn head_of(socket: &mut TcpStream) -> Option<String> {
    let mut bytes = [0; 1024];
    match socket.read(&mut bytes) {
        Ok(n) => Some(String::from_utf8_lossy(&bytes[..n]).to_ascii_lowercase()),
        Err(error) if error.kind() == ErrorKind::WouldBlock => None,
        Err(error) => panic!("{error}"),
    }
}

#[test]
fn who_finds_the_queue_full_is_told_to_come_back_and_the_queue_empties() {
    let cluster = Setup::of(2).parallel(1).start();
    // Each takes so long that hardly any ends while the others come.
    let body = endless_body(&story(), LONG);
    let mut sockets: Vec<TcpStream> =
        (0..MAX_WAITING + 20).map(|_| cluster.endpoint.post_on_socket(PLAIN, &body)).collect();
    sockets.iter().for_each(|socket| socket.set_nonblocking(true).unwrap());
    let refused = eventually("a refusal", || {
        sockets.iter_mut().find_map(|socket| head_of(socket).filter(|head| head.contains(" 429 ")))
    });
    assert!(refused.starts_with("http/1.1 429 ") && refused.contains("\r\nretry-after: 1\r\n"), "{refused}");
    let most = MAX_WAITING as u64 + 1;
    eventually("a full queue", || (cluster.status()["waiting"].as_u64().unwrap() + 20 > most).then_some(()));
    assert!(cluster.status()["waiting"].as_u64().unwrap() <= most);
    drop(sockets);
    cluster.wait_idle();
    cluster.check_answer();
    let refused = cluster.metrics().labelled("http_requests_total", &[("route", PLAIN), ("status", "429")]);
    assert!((1.0..=20.0).contains(&refused), "{refused}");
}
