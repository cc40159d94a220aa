//! What callers ask, and what one whole, undisturbed process answers.

use std::ops::ControlFlow;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use serde_json::{Value, json};

use crate::bench::{completion, prompt};
use crate::cluster::without_settings;
use crate::failure::{Failure, Outcome};
use crate::http::{Endpoint, Part};
use crate::processes::Processes;
use crate::random::Random;

/// Tokens of a session: what the embedded model was trained for. Prompts and answers below fit.
pub const CONTEXT: u32 = 1024;

/// Different requests: enough that four callers seldom ask the same at once, and answered by one process in seconds.
const N_ASKS: u64 = 12;

/// How long the whole process may take to be ready.
const READY_TIMEOUT: Duration = Duration::from_secs(60);

/// Where completions are asked for.
const PATH: &str = "/v1/completions";

/// A request and its right answer.
pub struct Ask {
    body: Value,
    expected: Told,
}

/// What a caller was told.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Told {
    /// All text.
    pub text: String,
    /// The log probability of each token, to the last bit, where they were asked for.
    logprobs: Vec<f64>,
    /// Why the answer ended.
    finish: String,
    /// Tokens that the answer took, as the server counts them.
    pub n_tokens: u64,
}

impl Told {
    /// Takes in a chunk. True if it brought a token.
    fn add(&mut self, chunk: &Value) -> bool {
        let choice = &chunk["choices"][0];
        let text = choice["text"].as_str().unwrap_or_default();
        self.text.push_str(text);
        let logprobs = choice["logprobs"]["token_logprobs"].as_array().map_or(&[][..], Vec::as_slice);
        self.logprobs.extend(logprobs.iter().filter_map(Value::as_f64));
        if let Some(finish) = choice["finish_reason"].as_str() {
            finish.clone_into(&mut self.finish);
        }
        if let Some(n) = chunk["usage"]["completion_tokens"].as_u64() {
            self.n_tokens = n;
        }
        !text.is_empty() || !logprobs.is_empty()
    }

    /// What is unlike, for people.
    fn difference(&self, expected: &Self) -> String {
        let same = |other: &str| self.text.bytes().zip(other.bytes()).take_while(|(a, b)| a == b).count();
        let same = same(&expected.text);
        let (found, whole) = (self.text.len(), expected.text.len());
        if same < found.max(whole) {
            return format!("the text differs from byte {same} on ({found} bytes instead of {whole})");
        }
        let differs = |(a, b): (&f64, &f64)| a != b;
        if let Some(at) = self.logprobs.iter().zip(&expected.logprobs).position(differs) {
            return format!("the probability of token {at} is another");
        }
        let facts = |told: &Self| format!("{} tokens, {:?}", told.n_tokens, told.finish);
        format!("{} instead of {}", facts(self), facts(expected))
    }
}

impl Ask {
    /// Asks, and tells of each token and of each comment that comes.
    pub fn ask(&self, endpoint: &Endpoint, mut on_event: impl FnMut(Heard<'_>)) -> Outcome<Told> {
        let mut told = Told::default();
        endpoint.stream_parts(PATH, &self.body, |part| {
            match part {
                Part::Comment(comment) => on_event(Heard::Comment(comment)),
                Part::Chunk(chunk) => {
                    if told.add(chunk) {
                        on_event(Heard::Token);
                    }
                }
            }
            Ok(ControlFlow::Continue(()))
        })?;
        Ok(told)
    }

    /// What is wrong with an answer.
    pub fn fault_of(&self, told: &Told) -> Option<String> {
        (*told != self.expected).then(|| told.difference(&self.expected))
    }
}

/// What is heard on a stream.
pub enum Heard<'a> {
    /// A token has come.
    Token,
    /// A line that clients skip.
    Comment(&'a str),
}

/// Draws requests from `random`: short and long, greedy and sampled, with and without log probabilities.
fn draw(random: &mut Random, n_vocab: u32) -> Vec<Value> {
    let one = |i: u64, random: &mut Random| {
        let (n_prompt, n_answer) = (random.within(2, 400) as u32, random.within(200, 500) as u32);
        let mut body = completion(&prompt(random.next(), n_prompt, n_vocab), n_answer);
        if i % 2 == 1 {
            // Penalties depend on what was said before, so a replay must know all of it.
            let sampled = json!({"temperature": 0.8, "top_p": 0.95, "seed": i, "frequency_penalty": 0.3});
            body.as_object_mut().into_iter().zip(sampled.as_object()).for_each(|(body, sampled)| {
                body.extend(sampled.clone());
            });
        }
        if i % 4 >= 2 {
            body["logprobs"] = 1.into();
        }
        body
    };
    (0..N_ASKS).map(|i| one(i, random)).collect()
}

/// Requests with the answers that one process gives which holds the whole `model`.
pub fn answered(
    processes: &Processes,
    brigade: &Path,
    model: &Path,
    n_vocab: u32,
    random: &mut Random,
) -> Outcome<Vec<Ask>> {
    const NAME: &str = "whole";
    let mut serve = without_settings(Command::new(brigade));
    serve.arg("serve").arg(model).arg("--state-dir").arg(processes.dir().join(NAME));
    serve.args(["--name", NAME, "--listen", "127.0.0.1:0", "--port", "0", "--threads", "1"]);
    serve.args(["--parallel", "1", "--prefix-cache", "off", "--context", &CONTEXT.to_string()]);
    let lines = processes.start(NAME, serve)?;
    let url = |line: &str| line.strip_prefix("ready ").map(str::to_owned);
    let endpoint = Endpoint::new(&lines.wait_for("the line `ready URL`", READY_TIMEOUT, url)?);
    let answer = |body| {
        let mut ask = Ask { body, expected: Told::default() };
        ask.expected = ask.ask(&endpoint, |_| {})?;
        if ask.expected.text.is_empty() {
            return Err(Failure::said("the model answers without text; take another one"));
        }
        Ok(ask)
    };
    let asks = draw(random, n_vocab).into_iter().map(answer).collect();
    processes.kill(NAME);
    asks
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_follow_from_the_seed_and_fit_into_the_context() {
        let asks = draw(&mut Random::new(1), 1024);
        assert_eq!(asks, draw(&mut Random::new(1), 1024));
        assert_ne!(asks, draw(&mut Random::new(2), 1024));
        for body in &asks {
            let n_prompt = body["prompt"].as_array().map_or(0, Vec::len) as u64;
            assert!(n_prompt >= 2 && n_prompt + body["max_tokens"].as_u64().unwrap() < u64::from(CONTEXT));
        }
        for (key, n) in [("seed", N_ASKS / 2), ("logprobs", N_ASKS / 2)] {
            assert_eq!(asks.iter().filter(|body| body.get(key).is_some()).count() as u64, n, "{key}");
        }
    }

    #[test]
    fn whatever_differs_is_told() {
        let told = |text: &str, logprob: f64, finish: &str, n: u64| {
            let choice = json!({"text": text, "logprobs": {"token_logprobs": [logprob]}, "finish_reason": finish});
            let mut told = Told::default();
            assert!(told.add(&json!({"choices": [choice]})));
            assert!(!told.add(&json!({"choices": [], "usage": {"completion_tokens": n}})));
            told
        };
        let right = told("one two", -0.5, "length", 2);
        let ask = Ask { body: Value::Null, expected: right.clone() };
        assert_eq!(ask.fault_of(&right), None);
        for (wrong, words) in [
            (told("one tow", -0.5, "length", 2), "from byte 5"),
            (told("one two two", -0.5, "length", 2), "11 bytes instead of 7"),
            (told("one", -0.5, "length", 2), "from byte 3"),
            (told("one two", -0.500_000_1, "length", 2), "probability of token 0"),
            (told("one two", -0.5, "stop", 2), "2 tokens, \"stop\""),
            (told("one two", -0.5, "length", 3), "3 tokens"),
        ] {
            let fault = ask.fault_of(&wrong).unwrap();
            assert!(fault.contains(words), "{fault}");
        }
    }
}
