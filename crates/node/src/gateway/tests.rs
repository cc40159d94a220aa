//! Gateways before coordinators whose answers the test writes: in this process, and behind real links on loopback.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread::JoinHandle;

use brigade_base::{Hash, ModelId, TenantId};
use brigade_gguf::vocabulary_header;
use brigade_net::{Address, Listener, TcpLink, receive_hello, welcome};
use brigade_protocol::kind;
use brigade_protocol::requests::{Card, ToGateway, VOCABULARY_CHUNK};
use tempfile::TempDir;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

use super::standing::no_card;
use super::*;
use crate::serving::{Failure, Finding, FinishReason, NodeFindings, Sampling, Severity, TextPlace, TextsDone, Usage};
use crate::threads::lock;

/// Long enough for a busy machine; no test waits for it unless it fails.
const PATIENCE: Duration = Duration::from_secs(30);

/// A coordinator that answers nothing by itself: each request that it takes goes to the test.
struct Fake {
    card: ModelCard,
    readiness: Mutex<Readiness>,
    refuses: Mutex<Option<SubmitError>>,
    /// How often it refused.
    refusals: AtomicU32,
    taken: UnboundedSender<Taken>,
}

/// A request that a coordinator took, and the way to answer it.
struct Taken {
    request: Request,
    answer: Vec<Token>,
    events: UnboundedSender<Event>,
}

impl Taken {
    fn tell(&self, events: impl IntoIterator<Item = Event>) {
        for event in events {
            self.events.send(event).unwrap();
        }
    }
}

impl Fake {
    fn new() -> (Arc<Self>, UnboundedReceiver<Taken>) {
        Self::serving("abacus", 1)
    }

    fn serving(name: &str, id: u8) -> (Arc<Self>, UnboundedReceiver<Taken>) {
        let (taken, requests) = unbounded_channel();
        let card = ModelCard {
            name: name.to_owned(),
            id: ModelId::from_bytes([id; 32]),
            context: 64,
            n_vocab: 100,
            bos_text: "<s>".to_owned(),
            ..no_card()
        };
        let (readiness, refuses) = (Mutex::new(Readiness::Ready), Mutex::default());
        (Arc::new(Self { card, readiness, refuses, refusals: AtomicU32::new(0), taken }), requests)
    }
}

impl Coordinating for Fake {
    fn submit_resumed(&self, request: Request, answer: Vec<Token>) -> Result<UnboundedReceiver<Event>, SubmitError> {
        if let Some(error) = lock(&self.refuses).clone() {
            self.refusals.fetch_add(1, Ordering::Relaxed);
            return Err(error);
        }
        let (events, receiver) = unbounded_channel();
        self.taken.send(Taken { request, answer, events }).map_err(|_| SubmitError::Stopping)?;
        Ok(receiver)
    }
}

impl Serving for Fake {
    fn model(&self) -> &ModelCard {
        &self.card
    }

    fn readiness(&self) -> Readiness {
        lock(&self.readiness).clone()
    }

    fn tokenize_pair(&self, _query: &str, _document: &str) -> Result<Vec<Token>, SubmitError> {
        Ok(vec![43])
    }

    fn tokenize(&self, _text: &str, _add_special: bool, _parse_special: bool) -> Result<Vec<Token>, SubmitError> {
        Ok(vec![42])
    }

    fn token_bytes(&self, _token: Token) -> Vec<u8> {
        b"local".to_vec()
    }

    fn submit(&self, request: Request) -> Result<UnboundedReceiver<Event>, SubmitError> {
        self.submit_resumed(request, Vec::new())
    }

    fn metrics(&self) -> String {
        "brigade_tokens 7".to_owned()
    }

    fn trace(&self, request: &str) -> Option<RequestTrace> {
        (request == "cmpl-1").then(|| RequestTrace {
            id: request.to_owned(),
            tenant: TenantId(3),
            state: "running",
            finish: None,
            priority: 0,
            prompt_tokens: 0,
            cached_tokens: 0,
            completion_tokens: 0,
            preemptions: 0,
            preempted_ms: 0.0,
            received_unix_ms: 0,
            queued_ms: None,
            first_token_ms: None,
            total_ms: 0.0,
            texts: None,
            texts_done: None,
            passes: Vec::new(),
            passes_left_out: 0,
        })
    }

    fn status(&self) -> ClusterStatus {
        ClusterStatus { epoch: 9, state: "ready".to_owned(), ..blank_status(&self.card) }
    }

    fn examine(&self) -> Result<Examination, String> {
        let finding = Finding {
            check: "swap".to_owned(),
            severity: Severity::Warn,
            detail: "2 GiB in use".to_owned(),
            cost: "time".to_owned(),
            fix: "close programs".to_owned(),
        };
        let node = NodeFindings {
            id: NodeId::from_bytes([5; 32]),
            name: "a".to_owned(),
            role: "worker".to_owned(),
            findings: vec![finding],
        };
        Ok(Examination { nodes: vec![node] })
    }

    fn create_ticket(&self, _ttl: Duration) -> Result<TicketInfo, String> {
        Ok(TicketInfo { id: "t".to_owned(), expires_in_s: 1, ticket: None })
    }

    fn tickets(&self) -> Vec<TicketInfo> {
        Vec::new()
    }

    fn revoke_ticket(&self, _id: &str) -> Result<bool, String> {
        Ok(false)
    }
}

/// A node that lets gateways in.
struct Host {
    place: (NodeId, Vec<String>),
    links: Arc<Mutex<Vec<Arc<TcpLink>>>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Host {
    /// Serves each requests link on a thread of its own.
    fn of(serve: impl Fn(Arc<dyn Link>) + Send + Sync + 'static) -> Self {
        let identity = Identity::generate().unwrap();
        let listener = Listener::bind(&identity, &["127.0.0.1:0".parse().unwrap()]).unwrap();
        let place = (identity.node_id(), vec![Address::from(listener.local_addrs()[0]).to_string()]);
        let (links, stop) = (Arc::new(Mutex::new(Vec::new())), Arc::new(AtomicBool::new(false)));
        let (held, stopped, serve) = (Arc::clone(&links), Arc::clone(&stop), Arc::new(serve));
        let accept = move || {
            while !stopped.load(Ordering::Relaxed) {
                let Ok(link) = listener.accept(Duration::from_millis(20)) else { continue };
                let hello = receive_hello(&*link, std::time::Instant::now() + PATIENCE).unwrap();
                assert_eq!(hello.purpose, Purpose::Requests);
                welcome(&*link, hello.common_version().unwrap()).unwrap();
                lock(&held).push(Arc::clone(&link));
                let serve = Arc::clone(&serve);
                spawn("test host", move || serve(link)).unwrap();
            }
        };
        Self { place, links, stop, thread: Some(std::thread::spawn(accept)) }
    }

    fn serving(coordinator: &Arc<Fake>) -> Self {
        let coordinator = Arc::clone(coordinator) as Arc<dyn Coordinating>;
        let vocabulary = vocabulary();
        Self::of(move |link| serve_requests(&link, &coordinator, &vocabulary))
    }

    fn cut_links(&self) {
        lock(&self.links).drain(..).for_each(|link| link.close());
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let _ = self.thread.take().unwrap().join();
        self.cut_links();
    }
}

fn vocabulary() -> Vec<u8> {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../models/abacus-f16.gguf");
    vocabulary_header(ModelFile::open(path).unwrap().catalog())
}

/// A gateway that reaches nobody.
fn gateway(wait: Duration) -> Gateway {
    let dial: Dial = Arc::new(|_, _| Err("nobody is there".to_owned()));
    Gateway::start_with(dial, PathBuf::new(), None, wait).unwrap()
}

/// A gateway that dials, and its state directory.
fn dialing(wait: Duration) -> (Gateway, TempDir) {
    let dir = tempfile::tempdir().unwrap();
    let options = GatewayOptions {
        identity: Arc::new(Identity::generate().unwrap()),
        state_dir: dir.path().to_owned(),
        own_copy: None,
        wait_for_capacity: wait,
    };
    (Gateway::start(options).unwrap(), dir)
}

/// A gateway that has reached a coordinator.
async fn following(host: &Host) -> (Gateway, TempDir) {
    let (gateway, dir) = dialing(PATIENCE);
    gateway.follow(Some(host.place.clone()));
    until(|| gateway.readiness() == Readiness::Ready).await;
    (gateway, dir)
}

async fn until(condition: impl Fn() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "the condition did not come about");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

async fn next<T>(receiver: &mut UnboundedReceiver<T>) -> T {
    tokio::time::timeout(PATIENCE, receiver.recv()).await.unwrap().unwrap()
}

async fn expect(receiver: &mut UnboundedReceiver<Event>, events: impl IntoIterator<Item = Event>) {
    for event in events {
        assert_eq!(next(receiver).await, event);
    }
}

async fn expect_pause(receiver: &mut UnboundedReceiver<Event>) {
    let event = next(receiver).await;
    assert!(matches!(event, Event::Paused { .. }), "{event:?}");
}

fn request() -> Request {
    Request {
        id: "cmpl-1".to_owned(),
        tenant: TenantId(3),
        priority: 1,
        timeout: None,
        prompt: vec![5, 6],
        max_tokens: Some(9),
        sampling: Sampling { seed: 11, ..Sampling::default() },
        stop: vec!["END".to_owned()],
        logprobs: None,
        ignore_end: false,
        place: TextPlace::ONLY,
        done: TextsDone::default(),
    }
}

fn token(position: u32) -> Event {
    Event::Token { position, token: 10 + position as Token, text: format!("t{position}"), logprob: None }
}

fn text() -> Event {
    Event::Text { text: "rest".to_owned() }
}

fn done() -> Event {
    let usage = Usage { prompt_tokens: 2, cached_tokens: 0, completion_tokens: 3 };
    Event::Done { reason: FinishReason::Length, usage }
}

#[tokio::test]
async fn a_request_and_its_answer_pass_over_a_link() {
    let (fake, mut requests) = Fake::new();
    let host = Host::serving(&fake);
    let (gateway, dir) = following(&host).await;
    assert_eq!(format!("{:?}", gateway.model()), format!("{:?}", fake.card));
    let mut events = gateway.submit(request()).unwrap();
    let taken = next(&mut requests).await;
    assert_eq!(format!("{:?}", taken.request), format!("{:?}", request()));
    assert!(taken.answer.is_empty());
    let told = [token(0), token(1), Event::Paused { why: "w".to_owned() }, Event::Resumed, token(2), text(), done()];
    taken.tell(told.clone());
    expect(&mut events, told).await;
    assert!(events.recv().await.is_none());
    // The vocabulary came over the link, and stays.
    let tokens = gateway.tokenize("1+1", false, false).unwrap();
    let bytes: Vec<u8> = tokens.iter().flat_map(|token| gateway.token_bytes(*token)).collect();
    assert_eq!(bytes, b"1+1");
    let kept = std::fs::read_dir(dir.path().join("vocabularies")).unwrap().next().unwrap().unwrap();
    assert_eq!(std::fs::read(kept.path()).unwrap(), vocabulary());
}

#[tokio::test]
async fn operators_hear_of_the_cluster_from_any_node() {
    let (fake, _requests) = Fake::new();
    let host = Host::serving(&fake);
    let (gateway, _dir) = following(&host).await;
    let gateway = Arc::new(gateway);
    let asking = Arc::clone(&gateway);
    let ask = move || (asking.status(), asking.metrics(), asking.trace("cmpl-1"), asking.trace("cmpl-2"));
    let (status, metrics, trace, none) = tokio::task::spawn_blocking(ask).await.unwrap();
    assert_eq!((status.epoch, status.state.as_str(), metrics.as_str()), (9, "ready", "brigade_tokens 7"));
    assert_eq!((trace, none), (fake.trace("cmpl-1"), None), "with its tenant, who alone may see it");
    let asking = Arc::clone(&gateway);
    let examined = tokio::task::spawn_blocking(move || asking.examine()).await.unwrap();
    assert!(examined.is_ok());
    assert_eq!(examined, fake.examine());
    assert!(gateway.create_ticket(PATIENCE).unwrap_err().contains("coordinator"));
    gateway.follow(None);
    assert!(gateway.examine().is_err());
    let status = gateway.status();
    assert_eq!(status.epoch, 9, "what was told last");
    assert!(status.state.starts_with("waiting: "), "{}", status.state);
}

#[tokio::test]
async fn an_answer_goes_on_with_the_next_coordinator() {
    let ((first, mut to_first), (second, mut to_second)) = (Fake::new(), Fake::new());
    let (dying, heir) = (Host::serving(&first), Host::serving(&second));
    let (gateway, _dir) = following(&dying).await;
    let mut events = gateway.submit(request()).unwrap();
    let taken = next(&mut to_first).await;
    taken.tell([token(0), token(1)]);
    expect(&mut events, [token(0), token(1)]).await;
    drop(dying);
    expect_pause(&mut events).await;
    assert!(matches!(gateway.readiness(), Readiness::Recovering(_)));
    gateway.follow(Some(heir.place.clone()));
    let taken = next(&mut to_second).await;
    assert_eq!(taken.answer, [10, 11]);
    // One token too many is no harm.
    taken.tell([token(1), token(2), text(), done()]);
    expect(&mut events, [Event::Resumed, token(2), text(), done()]).await;
}

#[tokio::test]
async fn a_link_that_broke_is_dialled_again() {
    let (fake, mut requests) = Fake::new();
    let host = Host::serving(&fake);
    let (gateway, _dir) = following(&host).await;
    let mut events = gateway.submit(request()).unwrap();
    let taken = next(&mut requests).await;
    // The end of the text is told once, with the end of the answer.
    taken.tell([token(0), text()]);
    expect(&mut events, [token(0)]).await;
    host.cut_links();
    tokio::time::timeout(PATIENCE, taken.events.closed()).await.unwrap();
    expect_pause(&mut events).await;
    let taken = next(&mut requests).await;
    assert_eq!(taken.answer, [10]);
    taken.tell([text(), done()]);
    expect(&mut events, [Event::Resumed, text(), done()]).await;
}

#[tokio::test]
async fn who_is_asked_for_the_rest_of_some_texts_hears_how_many_are_done() {
    let ((first, mut to_first), (second, mut to_second)) = (Fake::new(), Fake::new());
    let (dying, heir) = (Host::serving(&first), Host::serving(&second));
    let (gateway, _dir) = following(&dying).await;
    let all_done = TextsDone::default();
    let text = |idx| {
        let place = TextPlace { idx, n_texts: 3 };
        let request = Request::of_text("embd-1".to_owned(), TenantId(3), vec![5, 6], place);
        gateway.submit(Request { done: all_done.clone(), ..request }).unwrap()
    };
    let (mut slow, mut fast) = (text(0), text(1));
    let (taken_slow, taken_fast) = (next(&mut to_first).await, next(&mut to_first).await);
    assert_eq!((taken_slow.request.done.get(), taken_fast.request.done.get()), (0, 0));
    let vector = || [Event::Pooled { values: vec![0.5] }, done()];
    taken_fast.tell(vector());
    expect(&mut fast, vector()).await;
    drop(dying);
    expect_pause(&mut slow).await;
    gateway.follow(Some(heir.place.clone()));
    let again = next(&mut to_second).await;
    assert_eq!((again.request.place.idx, again.request.done.get()), (0, 1));
    again.tell(vector());
    expect(&mut slow, [Event::Resumed].into_iter().chain(vector())).await;
    let _last = text(2);
    assert_eq!(next(&mut to_second).await.request.done.get(), 2);
}

#[tokio::test]
async fn a_node_takes_the_lead_and_gives_it_up() {
    let ((here, mut to_here), (there, mut to_there)) = (Fake::new(), Fake::new());
    let host = Host::serving(&there);
    let (gateway, _dir) = dialing(PATIENCE);
    gateway.lead(here.clone());
    assert_eq!(gateway.tokenize("x", true, true), Ok(vec![42]));
    let mut events = gateway.submit(request()).unwrap();
    let taken = next(&mut to_here).await;
    taken.tell([token(0)]);
    expect(&mut events, [token(0)]).await;
    gateway.follow(Some(host.place.clone()));
    expect_pause(&mut events).await;
    assert!(taken.events.is_closed(), "who does not coordinate any more is not listened to");
    let taken = next(&mut to_there).await;
    taken.tell([token(1)]);
    expect(&mut events, [Event::Resumed, token(1)]).await;
    gateway.lead(here);
    expect_pause(&mut events).await;
    let taken = next(&mut to_here).await;
    assert_eq!(taken.answer, [10, 11]);
    taken.tell([done()]);
    expect(&mut events, [Event::Resumed, done()]).await;
}

#[tokio::test]
async fn waiting_for_a_coordinator_has_an_end() {
    let wait = Duration::from_millis(500);
    let gateway = gateway(wait);
    let refused = gateway.submit(request()).unwrap_err();
    assert!(matches!(refused, SubmitError::NotReady(_)), "nobody was there before: {refused}");
    let (fake, mut requests) = Fake::new();
    gateway.lead(fake);
    let mut old = gateway.submit(request()).unwrap();
    let taken = next(&mut requests).await;
    taken.tell([token(0)]);
    expect(&mut old, [token(0)]).await;
    gateway.follow(None);
    let lost = Instant::now();
    let mut new = gateway.submit(request()).unwrap();
    let mut hasty = gateway.submit(Request { timeout: Some(wait / 50), ..request() }).unwrap();
    for events in [&mut old, &mut new, &mut hasty] {
        expect_pause(events).await;
    }
    expect(&mut hasty, [Event::Failed(Failure::TimedOut { after: wait / 50 })]).await;
    for events in [&mut old, &mut new] {
        let end = next(events).await;
        assert!(matches!(end, Event::Failed(Failure::PlacementLost(_))), "{end:?}");
        assert!(events.recv().await.is_none());
    }
    assert!(lost.elapsed() >= wait);
    assert!(matches!(gateway.readiness(), Readiness::NotReady(_)));
    assert!(gateway.submit(request()).is_err());
}

#[tokio::test]
async fn a_new_coordinator_is_waited_for_until_it_is_ready() {
    let ((first, _to_first), (second, mut to_second)) = (Fake::new(), Fake::new());
    *lock(&second.readiness) = Readiness::NotReady("loading".to_owned());
    let host = Host::serving(&second);
    let (gateway, _dir) = dialing(PATIENCE);
    gateway.lead(first);
    gateway.follow(Some(host.place.clone()));
    until(|| gateway.readiness() == Readiness::Recovering("loading".to_owned())).await;
    let mut events = gateway.submit(request()).unwrap();
    expect_pause(&mut events).await;
    assert!(to_second.is_empty());
    *lock(&second.readiness) = Readiness::Ready;
    next(&mut to_second).await.tell([done()]);
    expect(&mut events, [Event::Resumed, done()]).await;
}

#[tokio::test]
async fn refusals_reach_the_caller() {
    let (fake, mut requests) = Fake::new();
    let host = Host::serving(&fake);
    let (gateway, _dir) = following(&host).await;
    let busy = SubmitError::Busy { waiting: 3 };
    *lock(&fake.refuses) = Some(busy.clone());
    let mut events = gateway.submit(request()).unwrap();
    expect(&mut events, [Event::Failed(Failure::Refused(busy))]).await;
    let long = Request { prompt: vec![1; 64], ..request() };
    assert_eq!(
        gateway.submit(long).unwrap_err(),
        SubmitError::PromptTooLong { tokens: 64, is_bound: false, context: 64 }
    );
    // A begun answer waits for room.
    *lock(&fake.refuses) = None;
    let mut events = gateway.submit(request()).unwrap();
    let taken = next(&mut requests).await;
    *lock(&fake.refuses) = Some(SubmitError::Busy { waiting: 3 });
    drop(taken);
    expect_pause(&mut events).await;
    *lock(&fake.refuses) = None;
    next(&mut requests).await.tell([done()]);
    expect(&mut events, [Event::Resumed, done()]).await;
}

#[tokio::test]
async fn a_busy_coordinator_is_asked_now_and_then_and_not_for_ever() {
    let (fake, mut requests) = Fake::new();
    let host = Host::serving(&fake);
    let wait = Duration::from_millis(500);
    let (gateway, _dir) = dialing(wait);
    gateway.follow(Some(host.place.clone()));
    until(|| gateway.readiness() == Readiness::Ready).await;
    // The first ends with its own time, the second with the time to wait.
    for timeout in [Some(wait / 5), None] {
        *lock(&fake.refuses) = None;
        let mut events = gateway.submit(Request { timeout, ..request() }).unwrap();
        let taken = next(&mut requests).await;
        *lock(&fake.refuses) = Some(SubmitError::Busy { waiting: 3 });
        let before = fake.refusals.load(Ordering::Relaxed);
        drop(taken);
        expect_pause(&mut events).await;
        let Event::Failed(failure) = next(&mut events).await else { panic!("the answer went on") };
        match timeout {
            Some(after) => assert_eq!(failure, Failure::TimedOut { after }),
            None => assert!(matches!(failure, Failure::PlacementLost(_)), "{failure:?}"),
        }
        assert!(fake.refusals.load(Ordering::Relaxed) - before <= 10, "one each 50 ms at most");
    }
}

#[tokio::test]
async fn the_same_node_in_another_term_is_another_coordinator() {
    let (fake, mut requests) = Fake::new();
    let host = Host::serving(&fake);
    let (node, addresses) = host.place.clone();
    let (gateway, _dir) = dialing(PATIENCE);
    gateway.follow_term(4, node, addresses.clone());
    until(|| gateway.readiness() == Readiness::Ready).await;
    let mut events = gateway.submit(request()).unwrap();
    let taken = next(&mut requests).await;
    gateway.follow_term(4, node, addresses.clone());
    gateway.follow(Some((node, addresses.clone())));
    taken.tell([token(0), token(1)]);
    expect(&mut events, [token(0), token(1)]).await;
    gateway.follow_term(5, node, addresses);
    expect_pause(&mut events).await;
    let taken = next(&mut requests).await;
    assert_eq!(taken.answer, [10, 11]);
    taken.tell([done()]);
    expect(&mut events, [Event::Resumed, done()]).await;
}

#[tokio::test]
async fn another_vocabulary_than_the_first_is_refused() {
    let ((first, _to_first), (second, _to_second)) = (Fake::new(), Fake::new());
    let host = Host::serving(&first);
    let other = Host::of(move |link| {
        let coordinator = Arc::clone(&second) as Arc<dyn Coordinating>;
        serve_requests(&link, &coordinator, b"another");
    });
    let (gateway, dir) = following(&host).await;
    gateway.follow(Some(other.place.clone()));
    until(|| matches!(gateway.readiness(), Readiness::Recovering(why) if why.contains("another vocabulary"))).await;
    assert!(gateway.tokenize("1+1", false, false).is_ok());
    let kept = std::fs::read_dir(dir.path().join("vocabularies")).unwrap().next().unwrap().unwrap();
    assert_eq!(std::fs::read(kept.path()).unwrap(), vocabulary());
}

#[tokio::test]
async fn a_caller_that_goes_away_cancels_its_request_alone() {
    let (fake, mut requests) = Fake::new();
    let host = Host::serving(&fake);
    let (gateway, _dir) = following(&host).await;
    let (going, mut staying) = (gateway.submit(request()).unwrap(), gateway.submit(request()).unwrap());
    let (left, kept) = (next(&mut requests).await, next(&mut requests).await);
    drop(going);
    tokio::time::timeout(PATIENCE, left.events.closed()).await.unwrap();
    kept.tell([token(0), done()]);
    expect(&mut staying, [token(0), done()]).await;
    // With the gateway go its requests.
    let mut events = gateway.submit(request()).unwrap();
    let taken = next(&mut requests).await;
    drop(gateway);
    expect(&mut events, [Event::Failed(Failure::Stopping)]).await;
    tokio::time::timeout(PATIENCE, taken.events.closed()).await.unwrap();
}

#[tokio::test]
async fn another_model_is_not_served_under_the_name_of_the_first() {
    let gateway = gateway(PATIENCE);
    gateway.lead(Fake::new().0);
    gateway.lead(Fake::serving("other", 2).0);
    assert_eq!(gateway.model().name, "abacus");
    let Readiness::Recovering(why) = gateway.readiness() else { panic!() };
    assert!(why.contains("other") && why.contains("restart"), "{why}");
}

#[tokio::test]
async fn a_silent_coordinator_is_left() {
    let card = Card {
        name: "abacus".to_owned(),
        id: ModelId::from_bytes([1; 32]),
        created: 0,
        context: 64,
        n_vocab: 100,
        chat_template: None,
        bos_text: String::new(),
        eos_text: String::new(),
        purpose: brigade_protocol::requests::Purpose::Generate,
        rank_template: None,
        n_values: 0,
        has_class_shares: false,
        vocabulary: Hash::from_bytes(*blake3::hash(&vocabulary()).as_bytes()),
    };
    let host = Host::of(move |link| {
        let whole = vocabulary();
        let piece = |bytes: &[u8]| ToGateway::Vocabulary { total: whole.len() as u64, bytes: bytes.to_vec() };
        let card = ToGateway::Card(Box::new(card.clone()));
        let beat = ToGateway::Beat(brigade_protocol::requests::Readiness::Ready);
        for message in std::iter::once(card).chain(whole.chunks(VOCABULARY_CHUNK).map(piece)).chain([beat]) {
            link.send(kind::REQUESTS, &[&message.encode()]).unwrap();
        }
        // Reads, so that the gateway has nothing to complain of but the silence.
        while link.recv(&mut Vec::new(), None).is_ok() {}
    });
    let (gateway, _dir) = following(&host).await;
    until(|| matches!(gateway.readiness(), Readiness::Recovering(why) if why.contains("silent"))).await;
}

#[tokio::test]
async fn a_wrong_vocabulary_is_refused() {
    let (fake, _requests) = Fake::new();
    let card = wire::card(&fake.card, Hash::from_bytes([9; 32]));
    let host = Host::of(move |link| {
        let message = ToGateway::Card(Box::new(card.clone()));
        link.send(kind::REQUESTS, &[&message.encode()]).unwrap();
        let bytes = ToGateway::Vocabulary { total: 3, bytes: vec![1, 2, 3] };
        let _ = link.send(kind::REQUESTS, &[&bytes.encode()]);
        while link.recv(&mut Vec::new(), None).is_ok() {}
    });
    let (gateway, _dir) = dialing(PATIENCE);
    gateway.follow(Some(host.place.clone()));
    until(|| matches!(gateway.readiness(), Readiness::NotReady(why) if why.contains("another vocabulary"))).await;
    assert!(!gateway.wait_for_model(Duration::ZERO));
}
