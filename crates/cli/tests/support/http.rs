//! A small client of the endpoint: replies as JSON, streams as events.

use std::io::{BufRead, BufReader, Write};
use std::net::TcpStream;
use std::time::Duration;

use serde_json::Value;

/// Longer than any answer takes on a busy machine.
const TIMEOUT: Duration = Duration::from_secs(60);

/// Where a coordinator answers.
#[derive(Clone)]
pub struct Endpoint {
    /// Without a path.
    pub url: String,
    key: Option<String>,
    agent: ureq::Agent,
}

/// A reply, whatever its status.
#[derive(Debug)]
pub struct Reply {
    pub status: u16,
    pub retry_after: Option<String>,
    /// The header `x-request-id`.
    pub request_id: Option<String>,
    /// What it says, whatever it is.
    pub text: String,
    /// The same as JSON; null if it is none.
    pub body: Value,
}

impl Reply {
    /// The body of a reply that must be a success.
    #[track_caller]
    pub fn ok(self) -> Value {
        assert!((200..300).contains(&self.status), "{self:?}");
        self.body
    }

    /// The error's code, if it is an OpenAI error with one.
    pub fn code(&self) -> &str {
        self.body["error"]["code"].as_str().unwrap_or("")
    }

    /// The error's message.
    #[track_caller]
    pub fn message(&self) -> &str {
        self.body["error"]["message"].as_str().unwrap_or_else(|| panic!("no OpenAI error: {self:?}"))
    }
}

impl Endpoint {
    pub fn new(url: &str, key: Option<String>) -> Self {
        let config = ureq::Agent::config_builder().http_status_as_error(false).timeout_global(Some(TIMEOUT));
        Self { url: url.to_owned(), key, agent: ureq::Agent::new_with_config(config.build()) }
    }

    /// The same endpoint for someone with another key.
    pub fn with_key(&self, key: Option<&str>) -> Self {
        Self { key: key.map(str::to_owned), ..self.clone() }
    }

    fn authorization(&self) -> String {
        self.key.as_ref().map(|key| format!("Bearer {key}")).unwrap_or_default()
    }

    #[track_caller]
    pub fn get(&self, path: &str) -> Reply {
        let request = self.agent.get(format!("{}{path}", self.url)).header("authorization", self.authorization());
        reply(request.call().unwrap_or_else(|error| panic!("GET {path}: {error}")))
    }

    #[track_caller]
    pub fn post(&self, path: &str, body: &Value) -> Reply {
        self.post_text(path, &body.to_string())
    }

    /// Posts what need not be JSON.
    #[track_caller]
    pub fn post_text(&self, path: &str, body: &str) -> Reply {
        reply(self.send(path, body))
    }

    #[track_caller]
    fn send(&self, path: &str, body: &str) -> ureq::http::Response<ureq::Body> {
        let request = self.agent.post(format!("{}{path}", self.url)).content_type("application/json");
        let sent = request.header("authorization", self.authorization()).send(body);
        sent.unwrap_or_else(|error| panic!("POST {path}: {error}"))
    }

    /// Posts a request on a socket of its own and leaves the rest to the caller, who may hang up. No key is sent.
    pub fn post_on_socket(&self, path: &str, body: &Value) -> TcpStream {
        let body = body.to_string();
        let mut socket = TcpStream::connect(self.url.trim_start_matches("http://")).unwrap();
        let head = format!("host: localhost\r\ncontent-type: application/json\r\ncontent-length: {}", body.len());
        socket.write_all(format!("POST {path} HTTP/1.1\r\n{head}\r\n\r\n{body}").as_bytes()).unwrap();
        socket
    }

    /// Starts a streamed answer; `stream` is set here. Dropping it hangs up.
    #[track_caller]
    pub fn stream(&self, path: &str, body: &Value) -> Stream {
        let mut body = body.clone();
        body["stream"] = true.into();
        let response = self.send(path, &body.to_string());
        assert_eq!(response.status(), 200);
        let request_id = response.headers()["x-request-id"].to_str().unwrap().to_owned();
        let lines = Box::new(BufReader::new(response.into_body().into_reader()));
        Stream { request_id, lines, comments: Vec::new() }
    }
}

fn reply(mut response: ureq::http::Response<ureq::Body>) -> Reply {
    let header = |name| response.headers().get(name).map(|value| value.to_str().unwrap().to_owned());
    let (retry_after, request_id) = (header("retry-after"), header("x-request-id"));
    let text = response.body_mut().read_to_string().unwrap();
    let body = serde_json::from_str(&text).unwrap_or(Value::Null);
    Reply { status: response.status().as_u16(), retry_after, request_id, text, body }
}

/// An answer on its way.
pub struct Stream {
    /// The header `x-request-id`.
    pub request_id: String,
    lines: Box<dyn BufRead + Send>,
    /// The lines so far that clients skip.
    pub comments: Vec<String>,
}

/// One event of a stream.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// A chunk of an answer.
    Chunk(Value),
    /// An OpenAI error object.
    Error(Value),
    /// The end mark.
    Done,
    /// The connection ended without one.
    BrokeOff,
}

impl Stream {
    /// The next event.
    pub fn event(&mut self) -> Event {
        loop {
            if let Some(event) = self.read_line() {
                return event;
            }
        }
    }

    /// Reads a line, which may be an event.
    fn read_line(&mut self) -> Option<Event> {
        let mut line = String::new();
        match self.lines.read_line(&mut line) {
            Ok(0) | Err(_) => return Some(Event::BrokeOff),
            Ok(_) => {}
        }
        let line = line.trim_end();
        if let Some(comment) = line.strip_prefix(": ") {
            self.comments.push(comment.to_owned());
        }
        match line.strip_prefix("data: ")? {
            "[DONE]" => Some(Event::Done),
            data => {
                let value: Value = serde_json::from_str(data).unwrap();
                Some(if value.get("error").is_some() { Event::Error(value) } else { Event::Chunk(value) })
            }
        }
    }

    /// Whether it has said that it waits for a machine that was lost.
    pub fn has_paused(&self) -> bool {
        self.comments.iter().any(|comment| comment.starts_with("paused: "))
    }

    /// The text until it says that, if it has not yet.
    #[track_caller]
    pub fn until_pause(&mut self) -> String {
        let mut text = String::new();
        while !self.has_paused() {
            match self.read_line() {
                None => {}
                Some(Event::Chunk(chunk)) => text.push_str(chunk_text(&chunk)),
                Some(end) => panic!("the stream ended without a pause after {text:?}: {end:?}"),
            }
        }
        text
    }

    /// All text up to the first event that is no chunk, and that event.
    pub fn rest(&mut self) -> (String, Event) {
        let mut text = String::new();
        loop {
            match self.event() {
                Event::Chunk(chunk) => text.push_str(chunk_text(&chunk)),
                end => return (text, end),
            }
        }
    }

    /// The text of the next `n` chunks that have some.
    #[track_caller]
    pub fn chunks(&mut self, n: usize) -> String {
        let mut text = String::new();
        let mut found = 0;
        while found < n {
            match self.event() {
                Event::Chunk(chunk) if chunk_text(&chunk).is_empty() => {}
                Event::Chunk(chunk) => {
                    text.push_str(chunk_text(&chunk));
                    found += 1;
                }
                end => panic!("the stream ended after {text:?}: {end:?}"),
            }
        }
        text
    }
}

/// The text of a chunk of either kind.
pub fn chunk_text(chunk: &Value) -> &str {
    let choice = &chunk["choices"][0];
    choice["delta"]["content"].as_str().or(choice["text"].as_str()).unwrap_or("")
}
