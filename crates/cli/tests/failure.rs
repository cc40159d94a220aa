//! Promise two: a machine may die, hang, be cut off or leave in the middle of an answer, and the answer goes on, to
//! the last bit the one that an undisturbed machine gives.
//!
//! Weights are of eight bits, whose answers do not depend on batches on any machine: what is replayed after a loss is
//! computed beside other rows than before it.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use brigade_base::Token;
use brigade_engine::Sampling;
use serde_json::{Value, json};
use support::http::chunk_text;
use support::oracle::{self, Answer, Oracle, rendered};
use support::{Cluster, Endpoint, Event, Reply, Setup, Stream, endless_body, eventually, quantised_abacus};

const PLAIN: &str = "/v1/completions";

/// Tokens of an answer that takes so long that it can be disturbed.
const LONG: u32 = 600;

/// Tokens that are read before anything happens.
const BEGINNING: usize = 5;

/// The oracle for the weights that are served here.
fn oracle() -> MutexGuard<'static, Oracle> {
    static ORACLE: OnceLock<Mutex<Oracle>> = OnceLock::new();
    let oracle = ORACLE.get_or_init(|| Mutex::new(Oracle::of(&quantised_abacus())));
    oracle.lock().unwrap_or_else(PoisonError::into_inner)
}

/// `n` nodes, the coordinator counted.
fn setup(n: usize) -> Setup {
    Setup::of(n).serve(&[quantised_abacus().to_str().unwrap()]).parallel(5)
}

fn story() -> Vec<Token> {
    oracle().tokens(&rendered("Tell me a story."))
}

/// Tokens that look random; others for each `seed`.
fn tokens(n: usize, seed: usize) -> Vec<Token> {
    (0..n).map(|i| ((i * 7919 + seed * 104_729 + i * i * 31) % 1024) as Token).collect()
}

/// A request and the answer of the undisturbed machine.
struct Ask {
    body: Value,
    expected: Answer,
}

impl Ask {
    /// The likeliest answer of `n` tokens.
    fn greedy(prompt: &[Token], n: u32) -> Self {
        let expected = Answer::clone(&oracle().generate(prompt, n, true));
        Self { body: endless_body(prompt, n), expected }
    }

    /// An answer that is drawn, and depends on all tokens before.
    fn sampled(prompt: &[Token], n: u32, seed: u64) -> Self {
        let sampling = Sampling {
            temperature: 0.9,
            top_p: 0.9,
            frequency_penalty: 0.5,
            // The whole answer, as OpenAI's penalties do.
            penalty_window: oracle::CONTEXT,
            seed,
            ..Sampling::default()
        };
        let expected = oracle().sample(prompt, n, &sampling);
        let mut body = endless_body(prompt, n);
        let drawn = json!({"temperature": 0.9, "top_p": 0.9, "frequency_penalty": 0.5, "seed": seed});
        body.as_object_mut().unwrap().extend(drawn.as_object().unwrap().clone());
        Self { body, expected }
    }

    /// With the probability of each token.
    fn with_logprobs(mut self) -> Self {
        self.body["logprobs"] = 5.into();
        self
    }

    /// A long answer to a short question.
    fn story() -> Self {
        Self::greedy(&story(), LONG)
    }

    /// One of each kind.
    fn of_all_kinds() -> Vec<Self> {
        vec![
            Self::story(),
            Self::sampled(&story(), LONG, 7),
            Self::greedy(&tokens(300, 1), LONG).with_logprobs(),
            Self::sampled(&tokens(3, 2), LONG, 8).with_logprobs(),
        ]
    }

    /// Asks, and compares.
    #[track_caller]
    fn check(&self, cluster: &Cluster) {
        self.check_reply(cluster.endpoint.post(PLAIN, &self.body));
    }

    /// Compares a whole answer with the right one.
    #[track_caller]
    fn check_reply(&self, reply: Reply) {
        let reply = reply.ok();
        assert_eq!(reply["choices"][0]["text"], self.expected.text);
        assert_eq!(reply["choices"][0]["finish_reason"], self.expected.finish);
        assert_eq!(reply["usage"]["completion_tokens"], self.expected.n_generated);
    }
}

/// A streamed answer in its middle.
struct Telling<'a> {
    ask: &'a Ask,
    stream: Stream,
    text: String,
    logprobs: Vec<(f32, Vec<f32>)>,
}

impl<'a> Telling<'a> {
    /// Asks, and hears the beginning.
    #[track_caller]
    fn begin(cluster: &Cluster, ask: &'a Ask) -> Self {
        let stream = cluster.stream(PLAIN, &ask.body);
        let mut telling = Self { ask, stream, text: String::new(), logprobs: Vec::new() };
        telling.hear(BEGINNING);
        telling
    }

    /// Hears some more tokens.
    #[track_caller]
    fn hear(&mut self, n: usize) {
        let mut heard = 0;
        while heard < n {
            match self.stream.event() {
                Event::Chunk(chunk) => heard += usize::from(self.add(&chunk)),
                end => panic!("the stream ended after {:?}: {end:?}", self.text),
            }
        }
    }

    /// Takes in a chunk; true if it brings a token.
    fn add(&mut self, chunk: &Value) -> bool {
        let text = chunk_text(chunk);
        self.text.push_str(text);
        let logprobs = &chunk["choices"][0]["logprobs"];
        let list = |key: &str| logprobs[key].as_array().cloned().unwrap_or_default();
        let number = |value: &Value| value.as_f64().unwrap() as f32;
        let top = list("top_logprobs").into_iter().map(|alternatives| {
            let mut top: Vec<f32> = alternatives.as_object().unwrap().values().map(number).collect();
            top.sort_by(|a, b| b.total_cmp(a));
            top
        });
        self.logprobs.extend(list("token_logprobs").iter().map(number).zip(top));
        !text.is_empty() || !logprobs.is_null()
    }

    /// Hears the rest, and compares all with the right answer, probabilities bit by bit. Returns what else was heard.
    #[track_caller]
    fn check(mut self) -> Stream {
        loop {
            match self.stream.event() {
                Event::Chunk(chunk) => drop(self.add(&chunk)),
                end => break assert_eq!(end, Event::Done, "after {:?}", self.text),
            }
        }
        assert_eq!(self.text, self.ask.expected.text);
        if self.ask.body.get("logprobs").is_some() {
            assert_eq!(self.logprobs, self.ask.expected.printed);
        }
        self.stream
    }
}

/// Does something in the middle of four streamed answers and a whole one, and compares all with the undisturbed ones.
/// Returns whether all streams said that they paused.
#[track_caller]
fn check_answers(cluster: &mut Cluster, disturb: impl FnOnce(&mut Cluster, &mut Telling<'_>)) -> bool {
    let asks = Ask::of_all_kinds();
    let quiet = Ask::greedy(&tokens(40, 3), LONG);
    let mut tellings: Vec<Telling<'_>> = asks.iter().map(|ask| Telling::begin(cluster, ask)).collect();
    let endpoint = cluster.endpoint.clone();
    std::thread::scope(|scope| {
        let whole = scope.spawn(|| endpoint.post(PLAIN, &quiet.body));
        eventually("five sessions", || (cluster.status()["running"] == 5).then_some(()));
        disturb(cluster, &mut tellings[0]);
        let have_paused = tellings.into_iter().map(|telling| telling.check().has_paused()).collect::<Vec<_>>();
        quiet.check_reply(whole.join().unwrap());
        have_paused.into_iter().all(|has_paused| has_paused)
    })
}

/// The reason of the last recovery, and how many there were.
fn recoveries(cluster: &Cluster) -> (u64, String) {
    let status = cluster.status();
    let reason = status["last_recovery"]["reason"].as_str().unwrap_or("").to_owned();
    (status["recoveries"].as_u64().unwrap(), reason)
}

#[test]
fn a_worker_is_killed_and_its_layers_go_to_the_others() {
    let mut cluster = setup(3).start();
    assert!(check_answers(&mut cluster, |cluster, _| cluster.kill_worker(0)));
    cluster.wait_placed_on(&["a", "w1"]);
    let (n, reason) = recoveries(&cluster);
    assert!(n == 1 && reason.contains("w0"), "{n} recoveries, the last because of {reason:?}");
}

/// One loss after the other in the same answers, until the coordinator is alone.
#[test]
fn all_workers_are_killed_in_one_answer() {
    let mut cluster = setup(3).start();
    check_answers(&mut cluster, |cluster, telling| {
        for i in [0, 1] {
            cluster.kill_worker(i);
            telling.hear(BEGINNING);
        }
    });
    cluster.wait_placed_on(&["a"]);
    cluster.wait_idle();
}

#[test]
fn another_worker_is_killed_while_the_loss_of_the_first_is_mended() {
    let mut cluster = setup(4).start();
    check_answers(&mut cluster, |cluster, telling| {
        cluster.kill_worker(0);
        telling.text += &telling.stream.until_pause();
        cluster.kill_worker(2);
    });
    cluster.wait_placed_on(&["a", "w1"]);
}

/// A machine that hangs answers nothing, not even a closed link; the heartbeat finds it.
#[test]
fn a_worker_hangs_and_comes_back() {
    let mut cluster = setup(3).start();
    assert!(check_answers(&mut cluster, |cluster, _| cluster.workers[1].signal("STOP")));
    cluster.wait_placed_on(&["a", "w0"]);
    cluster.workers[1].signal("CONT");
    // Whether it is a spare one then, or was given back a stage already, depends on when it dials.
    eventually("the return of w1", || (cluster.node("w1")?["connected"] == true).then_some(()));
    Ask::story().check(&cluster);
}

/// The layers of a lost worker have to be loaded by one that had none.
#[test]
fn a_spare_worker_takes_the_place_of_a_killed_one() {
    let mut cluster = setup(2).layers("5,3").start();
    cluster.join();
    cluster.wait_spare("w1");
    assert!(check_answers(&mut cluster, |cluster, _| cluster.kill_worker(0)));
    cluster.wait_placed_on(&["a", "w1"]);
}

/// The worker is frozen before the prompt comes to it, so that it dies with the prompt in its hands.
#[test]
fn a_worker_is_killed_while_it_reads_a_prompt() {
    let ask = Ask::greedy(&tokens(900, 4), 60);
    let mut cluster = setup(3).start();
    cluster.workers[1].signal("STOP");
    std::thread::scope(|scope| {
        let endpoint = cluster.endpoint.clone();
        let body = &ask.body;
        let whole = scope.spawn(move || endpoint.post(PLAIN, body));
        eventually("the session", || (cluster.status()["running"] == 1).then_some(()));
        cluster.kill_worker(1);
        ask.check_reply(whole.join().unwrap());
    });
    cluster.wait_placed_on(&["a", "w0"]);
}

#[test]
fn the_links_of_a_worker_break_and_are_made_again() {
    let mut cluster = setup(3).cuttable().start();
    assert!(check_answers(&mut cluster, |cluster, _| cluster.links_of(1).inbound.reset()));
    // All nodes are there, so all have their layers again.
    cluster.wait_placed_on(&["a", "w0", "w1"]);
    check_answers(&mut cluster, |cluster, _| cluster.links_of(0).outbound.reset());
    Ask::story().check(&cluster);
}

/// Its links stay open, and nothing comes through them any more.
#[test]
fn a_worker_is_cut_off_without_a_word_and_comes_back() {
    let mut cluster = setup(3).cuttable().start();
    let set_silent = |cluster: &Cluster, is_silent| {
        let links = cluster.links_of(0);
        links.inbound.set_silent(is_silent);
        links.outbound.set_silent(is_silent);
    };
    assert!(check_answers(&mut cluster, |cluster, _| set_silent(cluster, true)));
    assert!(recoveries(&cluster).0 >= 1);
    set_silent(&cluster, false);
    eventually("the return of w0", || (cluster.node("w0")?["connected"] == true).then_some(()));
    Ask::story().check(&cluster);
}

/// A split that needs both workers; one is lost in the middle of an answer.
fn lose_what_is_needed(setup: Setup, ask: &Ask) -> (Cluster, Telling<'_>) {
    let mut cluster = setup.layers("3,3,2").start();
    let mut telling = Telling::begin(&cluster, ask);
    cluster.kill_worker(0);
    telling.text += &telling.stream.until_pause();
    (cluster, telling)
}

#[test]
fn answers_wait_until_a_worker_is_back_that_the_model_needs() {
    let (ask, late) = (Ask::story(), Ask::greedy(&tokens(20, 5), 40));
    let (mut cluster, telling) = lose_what_is_needed(setup(3), &ask);
    eventually("word of what is missing", || {
        let ready = cluster.endpoint.get("/ready");
        let why = ready.body["reason"].as_str().unwrap_or("");
        (ready.status == 200 && ready.body["status"] == "recovering" && why.contains("1 more must join")).then_some(())
    });
    std::thread::scope(|scope| {
        let endpoint = cluster.endpoint.clone();
        let body = &late.body;
        // New requests are taken meanwhile.
        let late_reply = scope.spawn(move || endpoint.post(PLAIN, body));
        eventually("both sessions", || {
            let status = cluster.status();
            (status["running"].as_u64().unwrap() + status["waiting"].as_u64().unwrap() == 2).then_some(())
        });
        cluster.restart_worker(0);
        telling.check();
        late.check_reply(late_reply.join().unwrap());
    });
    assert_eq!(cluster.placement().len(), 3);
}

/// That requests are refused, in OpenAI's words.
#[track_caller]
fn check_refused(endpoint: &Endpoint, ask: &Ask) {
    let reply = endpoint.post(PLAIN, &ask.body);
    assert_eq!((reply.status, reply.code()), (503, "service_unavailable"), "{reply:?}");
    assert!(reply.message().contains("1 more must join"), "{reply:?}");
    assert!(reply.retry_after.as_ref().unwrap().parse::<u32>().unwrap() > 0);
}

#[test]
fn answers_end_with_a_clear_error_if_no_worker_comes_back_in_time() {
    let ask = Ask::story();
    let setup = setup(3).serve(&["--wait-for-capacity", "2s"]);
    let (mut cluster, mut telling) = lose_what_is_needed(setup, &ask);
    let endpoint = cluster.endpoint.clone();
    let late = std::thread::spawn(move || endpoint.post(PLAIN, &endless_body(&tokens(20, 5), 40)));
    let (rest, end) = telling.stream.rest();
    let Event::Error(error) = end else { panic!("{end:?}") };
    assert_eq!(error["error"]["code"], "service_unavailable", "{error}");
    assert!(error["error"]["message"].as_str().unwrap().contains("1 more must join"), "{error}");
    assert_eq!(telling.stream.event(), Event::BrokeOff, "no end mark follows an error");
    let told = telling.text + &rest;
    assert!(ask.expected.text.starts_with(&told) && told.len() < ask.expected.text.len(), "{told:?}");
    let late = late.join().unwrap();
    assert_eq!((late.status, late.code()), (503, "service_unavailable"), "{late:?}");

    cluster.wait_not_ready("1 more must join");
    check_refused(&cluster.endpoint, &ask);
    cluster.wait_idle();
    cluster.restart_worker(0);
    cluster.wait_ready();
    ask.check(&cluster);
}

/// Waits until each of two workers stands by for the other.
fn wait_for_standby(cluster: &Cluster) {
    eventually("workers that stand by", || {
        let (one, other) = (cluster.node("w0")?, cluster.node("w1")?);
        let holds = |holder: &Value, of: &Value| holder["standby"].as_array()?.contains(&of["layers"]).then_some(());
        holds(&one, &other).and(holds(&other, &one))
    });
}

#[test]
fn a_worker_that_stands_by_takes_over() {
    let mut cluster = setup(3).redundant().start();
    wait_for_standby(&cluster);
    assert!(check_answers(&mut cluster, |cluster, _| cluster.kill_worker(0)));
    cluster.wait_placed_on(&["a", "w1"]);
    assert_eq!(recoveries(&cluster).0, 1);
    // Its place is taken again as soon as a worker is there.
    cluster.restart_worker(0);
    wait_for_second_holders(&cluster);
    assert!(check_answers(&mut cluster, |cluster, _| cluster.kill_worker(1)));
    cluster.wait_placed_on(&["a", "w0"]);
}

/// Waits until `w0` stands by for all that `w1` serves.
fn wait_for_second_holders(cluster: &Cluster) {
    let ends = |value: &Value| Some(value[0].as_u64()?..value[1].as_u64()?);
    eventually("a second holder", || {
        let served = ends(&cluster.node("w1")?["layers"])?;
        let standby = cluster.node("w0")?["standby"].clone();
        let held: Vec<_> = standby.as_array()?.iter().filter_map(ends).collect();
        served.into_iter().all(|layer| held.iter().any(|layers| layers.contains(&layer))).then_some(())
    });
}

/// Rows that the coordinator's own stage has computed: each passes through all stages.
fn rows(cluster: &Cluster) -> f64 {
    cluster.metrics().labelled("stage_rows_total", &[("node", "a")])
}

/// No row of the answer is computed again but those that were on their way when the worker was lost.
#[test]
fn a_worker_that_computed_along_takes_over_without_a_replay() {
    const PROMPT: usize = 30;
    /// Of passes on their way, one per stage and one more, and of those that show that the ring goes around.
    const MOST_AGAIN: f64 = 10.0;
    let (before, ask) = (Ask::greedy(&tokens(PROMPT, 20), LONG), Ask::greedy(&tokens(PROMPT, 21), LONG));
    let mut cluster = setup(3).redundant().serve(&["--shadow", "--prefix-cache", "off"]).start();
    wait_for_standby(&cluster);
    // Those who stand by hear of the sessions that begin once they are connected; by the end of these they are.
    before.check(&cluster);
    before.check(&cluster);
    let n_before = rows(&cluster);
    let mut telling = Telling::begin(&cluster, &ask);
    telling.hear(200);
    cluster.kill_worker(0);
    assert!(telling.check().has_paused());
    cluster.wait_placed_on(&["a", "w1"]);
    cluster.wait_idle();
    let n_rows = rows(&cluster) - n_before;
    let n_needed = (PROMPT + LONG as usize) as f64;
    // The last token is chosen and not computed.
    assert!((n_needed - 1.0..n_needed + MOST_AGAIN).contains(&n_rows), "{n_rows} rows for {n_needed} tokens");
}

#[test]
fn workers_leave_and_come_back_one_after_the_other_in_one_answer() {
    let mut cluster = setup(3).start();
    check_answers(&mut cluster, |cluster, _| {
        cluster.leave(0);
        assert!(!cluster.state_dir("w0").join("worker.json").exists(), "the note of a running worker");
        cluster.restart_worker(0);
        cluster.wait_spare("w0");
        cluster.leave(1);
    });
    cluster.wait_placed_on(&["a", "w0"]);
}

#[test]
fn who_waits_keeps_its_place_when_a_worker_is_lost() {
    let asks: Vec<Ask> =
        [LONG, 40, 40, 40].into_iter().zip(10..).map(|(n, i)| Ask::greedy(&tokens(30, i), n)).collect();
    let setup = Setup::of(3).serve(&[quantised_abacus().to_str().unwrap()]).parallel(1);
    let mut cluster = setup.start();
    let mut tellings = Vec::new();
    for (n_before, ask) in asks.iter().enumerate() {
        let stream = cluster.stream(PLAIN, &ask.body);
        eventually("a place in the queue", || (cluster.status()["waiting"] == n_before).then_some(()));
        tellings.push(Telling { ask, stream, text: String::new(), logprobs: Vec::new() });
    }
    cluster.kill_worker(0);
    let ids: Vec<String> = tellings.into_iter().map(|telling| telling.check().request_id).collect();
    let ended = |id: &String| {
        let trace = cluster.trace_of_done(id);
        trace["received_unix_ms"].as_f64().unwrap() + trace["total_ms"].as_f64().unwrap()
    };
    let ends: Vec<f64> = ids.iter().map(ended).collect();
    assert!(ends.is_sorted(), "{ends:?}");
}
