//! A small server that answers as a test tells it, for what no real one can be brought to do.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

use serde_json::{Value, json};

/// Longest request that is read: many times what tests send.
const MAX_REQUEST_BYTES: u64 = 1 << 20;

/// What the server says to a request.
pub enum Say {
    /// A status and a JSON body.
    Json(u16, Value),
    /// Events of a stream, each at once, and then the end mark.
    Stream(Vec<Value>),
    /// Events of a stream, and then nothing.
    Cut(Vec<Value>),
}

/// A server on a port of its own. It lives as long as the test's process.
pub struct Fake {
    /// Where it answers, without a path.
    pub url: String,
    seen: Arc<Mutex<Vec<(String, Value)>>>,
}

impl Fake {
    /// Starts a server that answers a path and body with what `answer` makes of them, each request in a thread.
    pub fn start(answer: impl Fn(&str, &Value) -> Say + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let seen = Arc::new(Mutex::new(Vec::new()));
        let (answer, shared) = (Arc::new(answer), Arc::clone(&seen));
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (answer, seen) = (Arc::clone(&answer), Arc::clone(&shared));
                std::thread::spawn(move || {
                    // A client that has gone is no failure of the server's.
                    let Some((path, body)) = request(&stream) else { return };
                    seen.lock().unwrap().push((path.clone(), body.clone()));
                    let _ = say(&stream, answer(&path, &body));
                });
            }
        });
        Self { url, seen }
    }

    /// The bodies of all requests to a path so far.
    pub fn bodies(&self, path: &str) -> Vec<Value> {
        self.seen.lock().unwrap().iter().filter(|(seen, _)| seen == path).map(|(_, body)| body.clone()).collect()
    }
}

/// A request's path and JSON body, null if it has none.
fn request(stream: &TcpStream) -> Option<(String, Value)> {
    let mut reader = BufReader::new(stream.take(MAX_REQUEST_BYTES));
    let mut line = String::new();
    reader.read_line(&mut line).ok()?;
    let path = line.split(' ').nth(1)?.to_owned();
    let mut n_bytes = 0;
    loop {
        line.clear();
        reader.read_line(&mut line).ok()?;
        match line.trim_end().to_ascii_lowercase().strip_prefix("content-length:") {
            Some(length) => n_bytes = length.trim().parse().ok()?,
            None if line.trim_end().is_empty() => break,
            None => {}
        }
    }
    let mut body = vec![0; n_bytes];
    reader.read_exact(&mut body).ok()?;
    Some((path, serde_json::from_slice(&body).unwrap_or(Value::Null)))
}

fn say(mut stream: &TcpStream, what: Say) -> std::io::Result<()> {
    let (events, is_whole) = match what {
        Say::Json(status, body) => {
            let body = body.to_string();
            let head = format!("HTTP/1.1 {status} Said\r\nconnection: close\r\ncontent-length: {}\r\n\r\n", body.len());
            return stream.write_all((head + &body).as_bytes());
        }
        Say::Stream(events) => (events, true),
        Say::Cut(events) => (events, false),
    };
    stream.write_all(b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-type: text/event-stream\r\n\r\n")?;
    for event in events {
        stream.write_all(format!("data: {event}\n\n").as_bytes())?;
    }
    if is_whole { stream.write_all(b"data: [DONE]\n\n") } else { Ok(()) }
}

/// The reply to `GET /v1/models`.
pub fn models(ids: &[&str]) -> Say {
    let data: Vec<Value> = ids.iter().map(|id| json!({"id": id, "object": "model"})).collect();
    Say::Json(200, json!({"object": "list", "data": data}))
}

/// An error as OpenAI writes it.
pub fn refusal(status: u16, message: &str) -> Say {
    Say::Json(status, json!({"error": {"message": message, "type": "said", "param": null, "code": null}}))
}
