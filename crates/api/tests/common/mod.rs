//! A model that is not there, and a client that writes what it likes to a socket.
#![allow(dead_code, reason = "each test binary uses a part")]

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use brigade_api::{ApiOptions, Server};
use brigade_base::{Hash, ModelId, NodeId, Token};
use brigade_node::serving::{
    ClusterStatus, Event, Examination, FinishReason, HopParts, ModelCard, Optimize, Purpose, Readiness, Request,
    RequestTrace, Serving, SubmitError, TicketInfo, Usage,
};
use serde_json::Value;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

/// No test waits longer for anything.
pub const DEADLINE: Duration = Duration::from_secs(20);

/// A model whose tokens are bytes and whose answers are scripted.
pub struct Mock {
    card: ModelCard,
    pub readiness: Mutex<Readiness>,
    /// One for each request; without one, the answer is "ok".
    pub scripts: Mutex<VecDeque<Script>>,
    pub requests: Mutex<Vec<Request>>,
    /// The prompt texts as they were tokenized.
    pub tokenized: Mutex<Vec<(String, bool, bool)>>,
    /// Senders of sessions that do not end by themselves.
    pub held: Mutex<Vec<UnboundedSender<Event>>>,
    pub tickets: Mutex<Vec<TicketInfo>>,
    /// What is found when nodes are examined.
    pub examination: Mutex<Result<Examination, String>>,
    /// How often nodes were to be examined.
    pub n_examined: AtomicUsize,
    /// While this is locked, large texts are not done with.
    pub large: Mutex<()>,
}

/// What the endpoint takes for a large text is longer.
pub const LARGE_BYTES: usize = 64 << 10;

/// What the node tells of itself.
pub const METRICS: &str = "# TYPE brigade_num_requests_running gauge\nbrigade_num_requests_running 2\n# EOF\n";

/// What a request meets.
pub enum Script {
    /// These events, and then the channel closes.
    Events(Vec<Event>),
    /// These events, and then nothing.
    Hold(Vec<Event>),
    Refuse(SubmitError),
}

pub fn delta(text: &str) -> Event {
    Event::Token { position: 0, token: 1, text: text.to_owned(), logprob: None }
}

pub fn done(reason: FinishReason) -> Event {
    Event::Done { reason, usage: Usage { prompt_tokens: 3, cached_tokens: 1, completion_tokens: 2 } }
}

impl Serving for Mock {
    fn model(&self) -> &ModelCard {
        &self.card
    }

    fn readiness(&self) -> Readiness {
        self.readiness.lock().unwrap().clone()
    }

    fn tokenize(&self, text: &str, add_special: bool, parse_special: bool) -> Result<Vec<Token>, SubmitError> {
        self.tokenized.lock().unwrap().push((text.to_owned(), add_special, parse_special));
        if text.len() > LARGE_BYTES {
            drop(self.large.lock().unwrap());
        }
        if text.len() > 100_000 {
            return Err(SubmitError::PromptTooLong { tokens: text.len(), is_bound: false, context: self.card.context });
        }
        Ok(text.bytes().map(Token::from).collect())
    }

    /// Both with a newline between them.
    fn tokenize_pair(&self, query: &str, document: &str) -> Result<Vec<Token>, SubmitError> {
        self.tokenize(&format!("{query}\n{document}"), true, true)
    }

    fn token_bytes(&self, token: Token) -> Vec<u8> {
        u8::try_from(token).map(|byte| vec![byte]).unwrap_or_default()
    }

    fn submit(&self, request: Request) -> Result<UnboundedReceiver<Event>, SubmitError> {
        self.requests.lock().unwrap().push(request);
        let script = self.scripts.lock().unwrap().pop_front();
        let script = script.unwrap_or_else(|| Script::Events(vec![delta("ok"), done(FinishReason::Stop)]));
        let (sender, receiver) = unbounded_channel();
        match script {
            Script::Refuse(error) => return Err(error),
            Script::Events(events) => events.into_iter().for_each(|event| sender.send(event).unwrap()),
            Script::Hold(events) => {
                events.into_iter().for_each(|event| sender.send(event).unwrap());
                self.held.lock().unwrap().push(sender);
            }
        }
        Ok(receiver)
    }

    fn metrics(&self) -> String {
        METRICS.to_owned()
    }

    /// Every request that came is remembered.
    fn trace(&self, request: &str) -> Option<RequestTrace> {
        let requests = self.requests.lock().unwrap();
        let found = requests.iter().find(|known| known.id == request)?;
        Some(RequestTrace {
            id: found.id.clone(),
            tenant: found.tenant,
            state: "running",
            finish: None,
            priority: found.priority,
            prompt_tokens: found.prompt.len() as u32,
            cached_tokens: 0,
            completion_tokens: 0,
            preemptions: 0,
            preempted_ms: 0.0,
            received_unix_ms: 1,
            queued_ms: None,
            first_token_ms: None,
            total_ms: 2.5,
            texts: None,
            texts_done: None,
            passes: Vec::new(),
            passes_left_out: 0,
        })
    }

    fn status(&self) -> ClusterStatus {
        ClusterStatus {
            coordinator: NodeId::from_bytes([1; 32]),
            model: self.card.name.clone(),
            model_id: self.card.id,
            header_hash: Hash::from_bytes([0; 32]),
            n_layers: 8,
            state: "ready".to_owned(),
            term: 1,
            epoch: 3,
            context: self.card.context,
            parallel: 4,
            running: 0,
            waiting: 0,
            tokens_generated: 0,
            tokens_per_second: 0.0,
            hop_us_p50: 0.0,
            hop_us_p99: 0.0,
            hop_us: HopParts::default(),
            kv_tokens: 0,
            kv_capacity: 0,
            kv: brigade_base::KvTypes::default(),
            adapters: Vec::new(),
            uptime_s: 9,
            recoveries: 0,
            last_recovery: None,
            optimize: Optimize::default(),
            prediction: None,
            explanation: Vec::new(),
            advice: Vec::new(),
            links: Vec::new(),
            nodes: Vec::new(),
        }
    }

    fn examine(&self) -> Result<Examination, String> {
        self.n_examined.fetch_add(1, Ordering::SeqCst);
        self.examination.lock().unwrap().clone()
    }

    fn create_ticket(&self, ttl: Duration) -> Result<TicketInfo, String> {
        let mut tickets = self.tickets.lock().unwrap();
        let info = TicketInfo { id: format!("t{}", tickets.len()), expires_in_s: ttl.as_secs(), ticket: None };
        tickets.push(info.clone());
        Ok(TicketInfo { ticket: Some("secret".to_owned()), ..info })
    }

    fn tickets(&self) -> Vec<TicketInfo> {
        self.tickets.lock().unwrap().clone()
    }

    fn revoke_ticket(&self, id: &str) -> Result<bool, String> {
        let mut tickets = self.tickets.lock().unwrap();
        let before = tickets.len();
        tickets.retain(|ticket| ticket.id != id);
        Ok(tickets.len() < before)
    }
}

/// A running endpoint over a [`Mock`].
pub struct House {
    pub mock: Arc<Mock>,
    pub server: Server,
}

impl House {
    pub fn open() -> Self {
        Self::with(ApiOptions::default())
    }

    pub fn with(options: ApiOptions) -> Self {
        Self::with_template(options, None)
    }

    pub fn with_template(options: ApiOptions, template: Option<&str>) -> Self {
        Self::of(card(Purpose::Generate, 0, template), &options)
    }

    /// With a model that embeds or ranks texts.
    pub fn that(purpose: Purpose) -> Self {
        Self::with_vectors(purpose, 3)
    }

    /// With one that makes vectors of so many values of them.
    pub fn with_vectors(purpose: Purpose, n_values: u32) -> Self {
        Self::of(card(purpose, n_values, None), &ApiOptions::default())
    }

    /// With one that gives the classes of a text their shares.
    pub fn with_class_shares(n_classes: u32) -> Self {
        let card = ModelCard { has_class_shares: true, ..card(Purpose::Rank, n_classes, None) };
        Self::of(card, &ApiOptions::default())
    }

    fn of(card: ModelCard, options: &ApiOptions) -> Self {
        let mock = Arc::new(Mock {
            card,
            readiness: Mutex::new(Readiness::Ready),
            scripts: Mutex::default(),
            requests: Mutex::default(),
            tokenized: Mutex::default(),
            held: Mutex::default(),
            tickets: Mutex::default(),
            examination: Mutex::new(Err("nobody was asked".to_owned())),
            n_examined: AtomicUsize::new(0),
            large: Mutex::new(()),
        });
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let server = Server::start(listener, mock.clone(), options).unwrap();
        Self { mock, server }
    }

    pub fn script(&self, script: Script) {
        self.mock.scripts.lock().unwrap().push_back(script);
    }

    pub fn addr(&self) -> SocketAddr {
        self.server.addr()
    }

    pub fn get(&self, path: &str) -> Reply {
        self.ask("GET", path, &[], "")
    }

    pub fn post(&self, path: &str, body: &Value) -> Reply {
        self.ask("POST", path, &[("Content-Type", "application/json")], &body.to_string())
    }

    /// A request with its usual headers; `headers` come after and may say `Host`.
    pub fn ask(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &str) -> Reply {
        Reply::read(self.send(method, path, headers, body))
    }

    /// Sends a request and leaves the answer in the socket.
    pub fn send(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &str) -> TcpStream {
        let mut text = format!("{method} {path} HTTP/1.1\r\nConnection: close\r\nContent-Length: {}\r\n", body.len());
        if !headers.iter().any(|(name, _)| *name == "Host") {
            text.push_str("Host: localhost\r\n");
        }
        for (name, value) in headers {
            text.push_str(&format!("{name}: {value}\r\n"));
        }
        self.send_raw(format!("{text}\r\n{body}").as_bytes())
    }

    pub fn send_raw(&self, bytes: &[u8]) -> TcpStream {
        let mut stream = TcpStream::connect(self.addr()).unwrap();
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        stream.write_all(bytes).unwrap();
        stream
    }

    /// Waits until the coordinator would see that the caller of a held session is gone.
    pub fn wait_until_cancelled(&self) {
        let deadline = std::time::Instant::now() + DEADLINE;
        while !self.mock.held.lock().unwrap().iter().any(UnboundedSender::is_closed) {
            assert!(std::time::Instant::now() < deadline, "the session was not cancelled");
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Waits until no more than `n` completions are under way.
    pub fn wait_until_answering(&self, n: usize) {
        let deadline = std::time::Instant::now() + DEADLINE;
        while self.server.n_answering() > n {
            assert!(std::time::Instant::now() < deadline, "{} answers do not end", self.server.n_answering());
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Waits until `n` requests are under way.
    pub fn wait_until_begun(&self, n: usize) {
        let deadline = std::time::Instant::now() + DEADLINE;
        while self.server.n_answering() < n {
            assert!(std::time::Instant::now() < deadline, "{} requests began", self.server.n_answering());
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Large texts that a thread has begun with.
    pub fn n_large(&self) -> usize {
        self.mock.tokenized.lock().unwrap().iter().filter(|(text, ..)| text.len() > LARGE_BYTES).count()
    }

    /// Waits until a thread has begun with `n` large texts.
    pub fn wait_until_large(&self, n: usize) {
        let deadline = std::time::Instant::now() + DEADLINE;
        while self.n_large() < n {
            assert!(std::time::Instant::now() < deadline, "{} large texts began", self.n_large());
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Waits until nodes were to be examined `n` times.
    pub fn wait_until_examined(&self, n: usize) {
        let deadline = std::time::Instant::now() + DEADLINE;
        while self.mock.n_examined.load(Ordering::SeqCst) < n {
            assert!(std::time::Instant::now() < deadline, "no examination began");
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Waits until `n` sessions are held.
    pub fn wait_until_held(&self, n: usize) {
        let deadline = std::time::Instant::now() + DEADLINE;
        while self.mock.held.lock().unwrap().len() < n {
            assert!(std::time::Instant::now() < deadline, "no session began");
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

fn card(purpose: Purpose, n_values: u32, template: Option<&str>) -> ModelCard {
    ModelCard {
        name: "team/abacus".to_owned(),
        id: ModelId::from_bytes([0xab; 32]),
        created: 1_700_000_000,
        context: 4096,
        n_vocab: 256,
        chat_template: template.map(str::to_owned),
        bos_text: "<s>".to_owned(),
        eos_text: "</s>".to_owned(),
        purpose,
        rank_template: None,
        n_values: if purpose == Purpose::Generate { 0 } else { n_values },
        has_class_shares: false,
    }
}

/// An answer, read to its end.
#[derive(Debug)]
pub struct Reply {
    pub status: u16,
    pub head: String,
    pub body: String,
}

impl Reply {
    pub fn read(mut stream: TcpStream) -> Self {
        let mut bytes = Vec::new();
        stream.read_to_end(&mut bytes).unwrap();
        let split = bytes.windows(4).position(|window| window == b"\r\n\r\n").expect("a head");
        let head = String::from_utf8(bytes[..split].to_vec()).unwrap().to_ascii_lowercase();
        let rest = &bytes[split + 4..];
        let body = if head.contains("transfer-encoding: chunked") { unchunk(rest) } else { rest.to_vec() };
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        Self { status, head, body: String::from_utf8(body).unwrap() }
    }

    pub fn header(&self, name: &str) -> Option<&str> {
        self.head.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "))
    }

    #[track_caller]
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {}", self.body))
    }

    /// The data of each server-sent event.
    pub fn events(&self) -> Vec<&str> {
        self.body.split_terminator("\n\n").map(|event| event.strip_prefix("data: ").unwrap()).collect()
    }

    /// Checks that this is an error object.
    #[track_caller]
    pub fn check_error(&self, status: u16, param: Option<&str>, code: Option<&str>) {
        assert_eq!(self.status, status, "{self:?}");
        let error = &self.json()["error"];
        assert!(error["message"].as_str().is_some_and(|message| !message.is_empty()), "{self:?}");
        assert!(error["type"].is_string(), "{self:?}");
        assert_eq!(error["param"], Value::from(param), "{self:?}");
        assert_eq!(error["code"], Value::from(code), "{self:?}");
    }
}

fn unchunk(mut rest: &[u8]) -> Vec<u8> {
    let mut body = Vec::new();
    while let Some(end) = rest.windows(2).position(|window| window == b"\r\n") {
        let size = usize::from_str_radix(std::str::from_utf8(&rest[..end]).unwrap(), 16).unwrap();
        if size == 0 {
            break;
        }
        body.extend_from_slice(&rest[end + 2..end + 2 + size]);
        rest = &rest[end + 4 + size..];
    }
    body
}
