//! What is wrong is refused: in one line with an exit code, in an OpenAI error object, or by hanging up.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use brigade_gguf::{Builder, ModelFile};
use brigade_net::{
    Address, GreetError, Hello, Identity, Listener, PROTOCOL_VERSION, Purpose, Refusal, Secret, TcpLink, Ticket,
    TicketId, greet, receive_hello, refuse,
};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{ClientConfig, ClientConnection, DigitallySignedStruct, SignatureScheme};
use serde_json::{Value, json};
use support::{Cluster, PATIENCE, Setup, abacus, chat_body, eventually, run};

/// How long a verb may take to find out that it cannot work.
const SOON: Duration = Duration::from_secs(10);

/// That a verb ends with this code and one line that has these words.
#[track_caller]
fn check(args: &[&str], code: i32, words: &str) {
    let begin = Instant::now();
    let ended = run(args);
    assert!(begin.elapsed() < SOON, "{args:?} took {:?}", begin.elapsed());
    assert_eq!(ended.code, Some(code), "{args:?}: {ended:?}");
    let lines: Vec<&str> = ended.stderr.lines().collect();
    assert!(
        lines.len() == 1 && lines[0].starts_with("brigade: ") && lines[0].contains(words),
        "{args:?} complains without {words:?}:\n{}",
        ended.stderr
    );
}

/// [`check`] of `brigade serve` with a fresh state directory, on any ports unless `args` name them.
#[track_caller]
fn check_serve(args: &[&str], code: i32, words: &str) {
    let dir = tempfile::tempdir().unwrap();
    let mut all = vec!["serve", "--state-dir", dir.path().to_str().unwrap(), "--threads", "1"];
    for default in [["--port", "0"], ["--listen", "127.0.0.1:0"]] {
        if !args.contains(&default[0]) {
            all.extend(default);
        }
    }
    check(&[&all[..], args].concat(), code, words);
}

/// [`check`] of `brigade join` with a fresh state directory.
#[track_caller]
fn check_join(args: &[&str], code: i32, words: &str) {
    let dir = tempfile::tempdir().unwrap();
    let own = ["join", "--state-dir", dir.path().to_str().unwrap(), "--listen", "127.0.0.1:0"];
    check(&[&own[..], args].concat(), code, words);
}

fn write(dir: &Path, name: &str, bytes: &[u8]) -> PathBuf {
    let path = dir.join(name);
    fs::write(&path, bytes).unwrap();
    path
}

/// That every verb that reads a model refuses this one.
#[track_caller]
fn check_model(path: &Path, words: &str) {
    let path = path.to_str().unwrap();
    check_serve(&[path], 1, words);
    check(&["inspect", path], 1, words);
    check(&["plan", path], 1, words);
}

#[test]
fn files_that_are_no_whole_model_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let bytes = fs::read(abacus()).unwrap();
    check_model(&dir.path().join("none.gguf"), "No such file");
    check_model(dir.path(), "is not a file");
    check_model(&write(dir.path(), "empty", b""), "");
    check_model(&write(dir.path(), "text", b"once upon a time there was no model"), "not a GGUF file");
    for n in [4, 12, 23, 24, 100, 5000, 20_000, bytes.len() / 2, bytes.len() - 1] {
        check_model(&write(dir.path(), "cut", &bytes[..n]), "download it again");
    }
}

/// A header of version 3 that says these numbers of tensors and keys, and goes on with `rest`.
fn header(n_tensors: u64, n_keys: u64, rest: &[u8]) -> Vec<u8> {
    [b"GGUF", &3u32.to_le_bytes()[..], &n_tensors.to_le_bytes(), &n_keys.to_le_bytes(), rest].concat()
}

/// The entry of a tensor of eight numbers at `offset`.
fn tensor(name: &str, offset: u64) -> Vec<u8> {
    let len = (name.len() as u64).to_le_bytes();
    [&len[..], name.as_bytes(), &1u32.to_le_bytes(), &8u64.to_le_bytes(), &0u32.to_le_bytes(), &offset.to_le_bytes()]
        .concat()
}

#[test]
fn headers_that_lie_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let padded = |bytes: Vec<u8>| [bytes, vec![0; 256]].concat();
    let cases = [
        (header(u64::MAX, 0, b""), "number of tensors"),
        (header(0, u64::MAX, b""), "number of metadata keys"),
        (header(0, 1, &u64::MAX.to_le_bytes()), "length of a metadata key"),
        (header(60_000, 0, b""), "ends inside its header"),
        (padded(header(1, 0, &tensor("t", 1 << 40))), "ends at byte"),
        (padded(header(1, 0, &tensor("t", u64::MAX - 31))), ""),
        (padded(header(2, 0, &[tensor("t", 0), tensor("u", 0)].concat())), "overlap"),
        (padded(header(2, 0, &[tensor("t", 0), tensor("t", 32)].concat())), "is there twice"),
        ([b"GGUF", &9u32.to_le_bytes()[..], &[0; 16]].concat(), "version"),
    ];
    for (i, (bytes, words)) in cases.iter().enumerate() {
        check_model(&write(dir.path(), &format!("{i}.gguf"), bytes), words);
    }
}

#[test]
fn architectures_without_rules_are_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let file = ModelFile::open(abacus()).unwrap();
    let mut metadata = file.catalog().metadata().clone();
    metadata.set("general.architecture", "clip");
    let mut builder = Builder::new(&metadata);
    for tensor in file.catalog().tensors() {
        builder.tensor(&tensor.name, &tensor.dims, tensor.ty).unwrap();
    }
    let path = dir.path().join("clip.gguf");
    let mut out = fs::File::create(&path).unwrap();
    builder.write(&mut out, |idx, offset, buf| file.read_at(idx, offset, buf)).unwrap();
    let path = path.to_str().unwrap();
    check_serve(&[path], 1, "architecture \"clip\" cannot be run; `docs/architectures.md` lists the ");
    check(&["plan", path], 1, "architecture \"clip\" cannot be run");
    let text = run(&["inspect", path]).ok();
    // What only rules tell is not known, and no zero.
    for line in ["architecture   clip", "layers         -", "embedding      -", "head           -", "KV cache       -"]
    {
        assert!(text.contains(line), "{line}: {text}");
    }
    let report: Value = serde_json::from_str(&run(&["inspect", path, "--json"]).ok()).unwrap();
    for key in ["embedding_bytes", "head_bytes", "kv_bytes_per_token", "state_bytes", "layers", "experts", "tied_head"]
    {
        assert_eq!(report.get(key), Some(&Value::Null), "{key}: {report}");
    }
}

#[test]
fn a_model_that_does_not_fit_is_told_with_what_is_missing() {
    let abacus = abacus();
    let path = abacus.to_str().unwrap();
    check(&["plan", path, "--node", "a=50MiB"], 1, "MiB are missing");
    check(&["plan", path, "--layers", "4,5", "--node", "a=1GiB,b=1GiB"], 1, "has 9 layers, but the model has 8");
    check(&["plan", path, "--layers", "4,4", "--node", "a=1GiB"], 1, "1 more must join");

    // Of 16 sessions, the KV cache alone takes 64 MiB.
    let mut cluster = Setup::of(1).parallel(16).memory("100MiB").start_coordinator();
    let said = cluster.coordinator.line("waiting: ");
    assert!(said.contains("MiB are missing") && said.contains("--memory"), "{said}");
    cluster.wait_not_ready("MiB are missing");
    // What is missing comes with another machine.
    cluster.join();
    cluster.wait_ready();
    cluster.check_answer();
}

#[test]
fn settings_that_make_no_sense_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = taken.local_addr().unwrap();
    let port = taken.port().to_string();
    let config = write(dir.path(), "mistyped.toml", b"[serve]\nparalel = 3\n");
    let broken = write(dir.path(), "broken.toml", b"parallel = = 3\n");
    let none = write(dir.path(), "no keys", b"# nothing\n");
    check_serve(&["--port", &port], 1, "--port, or 0 for any");
    check_serve(&["--listen", &taken.to_string()], 1, "is in use by another program");
    check_serve(&["--bind", "0.0.0.0"], 2, "--api-key");
    check_serve(&["--bind", "::"], 2, "--api-key");
    check_serve(&["--api-key", ""], 2, "--api-key must not be empty");
    check_serve(&["--api-key-file", none.to_str().unwrap()], 2, "write one per line");
    check_serve(&["--config", config.to_str().unwrap()], 2, "`brigade serve` has no setting \"paralel\"");
    check_serve(&["--config", broken.to_str().unwrap()], 2, "broken.toml");
    check_serve(&["--config", "/does/not/exist.toml"], 2, "/does/not/exist.toml");
    check_serve(&["--shadow"], 2, "give --redundancy 2 too");
    check_join(&["--port", "0", "--bind", "0.0.0.0"], 2, "--api-key");
    check_join(&["--lora", "style.gguf"], 2, "give --model too");
    let model = abacus();
    let own = ["--model", model.to_str().unwrap(), "--lora", "style.gguf"];
    check_join(&own, 1, "--lora: cannot read style.gguf");
    let ended = run(&["join", "--direct-fetch", "on"]);
    assert!(ended.code == Some(2) && ended.stderr.contains("`brigade serve` alone can ask for on"), "{ended:?}");
    check_join(&["--port", "0", "--api-key", ""], 2, "--api-key must not be empty");
    check_join(&["--port", &port], 1, "--port, or 0 for any");
    check_serve(&["--context", "5000"], 1, "the 1024 tokens that this model was trained for");
    let plan = ["plan", model.to_str().unwrap(), "--context", "5000"];
    check(&plan, 1, "the 1024 tokens that this model was trained for");
    check_serve(&["--config", "/dev/zero"], 2, "/dev/zero has more than");
    check_serve(&["--api-key-file", "/dev/zero"], 2, "/dev/zero has more than");
    check_join(&["--ticket-file", "/dev/zero"], 2, "/dev/zero has more than");
    check_serve(&["--ticket-file", "/does/not/exist"], 1, "--ticket-file /does/not/exist cannot be written: No such");
    let file = none.to_str().unwrap();
    for verb in ["serve", "join", "leave", "status", "ticket", "chat"] {
        check(&[verb, "--state-dir", file], 2, "is a file; name a directory with --state-dir");
    }
    check(&["status", "--url", "localhost:1"], 2, "http://");
    check(&["status", "--url", &format!("http://{}", dead_address())], 1, "is `brigade serve` running there?");
    for verb in ["status", "ticket", "chat"] {
        check(&[verb, "--state-dir", dir.path().to_str().unwrap()], 1, "no coordinator runs with the state directory");
    }
    check(&["leave", "--state-dir", dir.path().to_str().unwrap()], 1, "no node runs with the state directory");
}

/// No machine that joins could mend these.
#[test]
fn splits_that_do_not_add_up_are_refused() {
    for (layers, words) in [("4,5", "has 9 layers"), ("3,3", "has 6 layers"), ("0,8", "at least one")] {
        check_serve(&["--layers", layers], 1, words);
    }
}

/// An address where nobody listens.
fn dead_address() -> std::net::SocketAddr {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}

#[test]
fn a_key_that_others_can_read_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().to_str().unwrap();
    assert_eq!(run(&["doctor", "--state-dir", state]).code, Some(0));
    fs::set_permissions(dir.path().join("node.key"), fs::Permissions::from_mode(0o644)).unwrap();
    let words = "is open to other users (mode 644); run: chmod 600";
    let serve = ["serve", "--state-dir", state, "--port", "0", "--listen", "127.0.0.1:0"];
    check(&serve, 1, words);
    let ticket = ticket_to(&Identity::generate().unwrap(), dead_address()).to_string();
    check(&["join", &ticket, "--state-dir", state, "--listen", "127.0.0.1:0"], 1, words);
    assert_eq!(run(&["doctor", "--state-dir", state]).code, Some(1));
}

/// A ticket that nobody issued, for the coordinator with this key.
fn ticket_to(coordinator: &Identity, addr: std::net::SocketAddr) -> Ticket {
    Ticket {
        coordinator: coordinator.node_id(),
        addrs: vec![Address::from(addr)],
        id: TicketId::from_bytes([1; 8]),
        secret: Secret::from_bytes([2; 16]),
    }
}

#[test]
fn tickets_that_admit_nobody_are_refused() {
    let cluster = Setup::of(2).start_coordinator();
    let text = cluster.ticket();
    let state = cluster.state_dir("a");
    let state = state.to_str().unwrap();

    check_join(&[], 1, "has joined no cluster yet");
    check_join(&["nonsense"], 2, "this is not a ticket");
    let at = text.len() / 2;
    let other = if &text[at..=at] == "a" { "b" } else { "a" };
    check_join(&[&format!("{}{other}{}", &text[..at], &text[at + 1..])], 2, "cut off or mistyped");
    check_join(&[&text[..text.len() - 3]], 2, "cut off or mistyped");
    check_join(&[&text.replace("brigade1-", "brigade2-")], 2, "newer Brigade");
    check_join(&["--ticket-file", "/does/not/exist"], 2, "/does/not/exist");

    let mut wrong: Ticket = text.parse().unwrap();
    wrong.secret = Secret::from_bytes([7; 16]);
    check_join(&[&wrong.to_string()], 1, "does not know this ticket");
    let mut other_key: Ticket = text.parse().unwrap();
    other_key.coordinator = Identity::generate().unwrap().node_id();
    check_join(&[&other_key.to_string()], 1, "has another key than the ticket says");
    let gone = ticket_to(&Identity::generate().unwrap(), dead_address());
    check_join(&[&gone.to_string()], 1, "is `brigade serve` running there and is the port open");

    let ticket = ["ticket", "--state-dir", state];
    let made = |args: &[&str]| run(&[&ticket[..], &["create"], args].concat()).ok().trim().to_owned();
    let short = made(&["--ticket-ttl", "1s"]);
    let id = short.parse::<Ticket>().unwrap().id.to_string();
    let list = || run(&[&ticket[..], &["list"]].concat()).ok();
    eventually("the ticket's end", || (!list().contains(&id)).then_some(()));
    check_join(&[&short], 1, "the ticket has expired");

    let revoked = made(&[]);
    let id = revoked.parse::<Ticket>().unwrap().id.to_string();
    assert!(list().contains(&id));
    run(&[&ticket[..], &["revoke", &id]].concat()).ok();
    assert!(!list().contains(&id));
    check_join(&[&revoked], 1, "the ticket was revoked");
    check(&[&ticket[..], &["revoke", "0123456789abcdef"]].concat(), 1, "no valid ticket");
    check(&[&ticket[..], &["revoke", "../x"]].concat(), 2, "is no ticket's id");
}

/// A worker without a ticket whose key the coordinator does not know.
#[test]
fn a_stranger_that_knows_the_address_stays_outside() {
    let cluster = Setup::of(2).start_coordinator();
    for purpose in [Purpose::Control, Purpose::Data, Purpose::Weights] {
        assert_eq!(greeting(&cluster, &Hello::new(purpose, None)), Refusal::NotAMember);
    }
}

/// How the coordinator refuses a node with a fresh key.
#[track_caller]
fn greeting(cluster: &Cluster, hello: &Hello) -> Refusal {
    let ticket: Ticket = cluster.ticket().parse().unwrap();
    let identity = Identity::generate().unwrap();
    let link = TcpLink::connect(&identity, ticket.coordinator, &ticket.addrs, PATIENCE).unwrap();
    match greet(&*link, hello) {
        Err(GreetError::Refused(refusal)) => refusal,
        other => panic!("{other:?}"),
    }
}

#[test]
fn releases_that_do_not_understand_each_other_say_so() {
    // A coordinator of tomorrow.
    let identity = Identity::generate().unwrap();
    let listener = Listener::bind(&identity, &["127.0.0.1:0".parse().unwrap()]).unwrap();
    let ticket = ticket_to(&identity, listener.local_addrs()[0]);
    // A node has several links to its coordinator; this is the one whose refusal ends it.
    let coordinator = std::thread::spawn(move || {
        let refused = || {
            let link = listener.accept(PATIENCE).unwrap();
            let hello = receive_hello(&*link, Instant::now() + PATIENCE).unwrap();
            refuse(&*link, &Refusal::VersionMismatch { ours: 99, theirs: hello.max_version });
            hello.purpose
        };
        while refused() != Purpose::Control {}
    });
    check_join(&[&ticket.to_string()], 1, "up to version 99, with none in common; install the same release");
    coordinator.join().unwrap();

    // A worker of tomorrow.
    let cluster = Setup::of(2).start_coordinator();
    let ticket: Ticket = cluster.ticket().parse().unwrap();
    let mut hello = Hello::new(Purpose::Control, Some(ticket.admission()));
    (hello.min_version, hello.max_version) = (99, 99);
    let expected = Refusal::VersionMismatch { ours: 99, theirs: PROTOCOL_VERSION };
    assert_eq!(greeting(&cluster, &hello), expected);
}

#[test]
fn requests_that_cannot_be_answered_get_an_openai_error() {
    let cluster = Cluster::of(1);
    let with = |name: &str, value: Value| {
        let mut body = chat_body("Hello");
        body[name] = value;
        body.to_string()
    };
    let complete = |prompt: Value| json!({"prompt": prompt}).to_string();
    let (chat, completions) = ("/v1/chat/completions", "/v1/completions");
    let cases = [
        (chat, chat_body(&"seven eight ".repeat(600)).to_string(), 400, "context_length_exceeded"),
        (completions, complete(json!(vec![5; 1024])), 400, "context_length_exceeded"),
        (completions, complete(json!(vec![5; 200_000])), 400, "context_length_exceeded"),
        (completions, complete(json!([1024])), 400, "invalid_value"),
        (completions, complete(json!([-1])), 400, "invalid_value"),
        (completions, complete(json!([u64::MAX])), 400, ""),
        (completions, complete(json!([1.5])), 400, ""),
        (completions, complete(json!([])), 400, ""),
        (completions, complete(json!({})), 400, ""),
        (chat, with("no_such_field", json!(1)), 400, ""),
        (chat, with("model", json!("gpt-4o")), 404, "model_not_found"),
        (chat, with("temperature", json!(3)), 400, ""),
        (chat, with("max_tokens", json!(-1)), 400, ""),
        (chat, with("n", json!(2)), 400, ""),
        (chat, with("messages", json!([])), 400, ""),
        (chat, with("messages", json!("Hello")), 400, ""),
        (chat, with("stop", json!([""])), 400, ""),
        (chat, "{\"messages\": [".to_owned(), 400, ""),
        (chat, String::new(), 400, ""),
        (chat, "[".repeat(100_000), 400, ""),
        (chat, "null".to_owned(), 400, ""),
        ("/v1/no/such/route", "{}".to_owned(), 404, "unknown_url"),
        ("/v1/models", "{}".to_owned(), 405, ""),
        ("/brigade/v1/tickets", "{\"ttl_s\": 60}".to_owned(), 401, "invalid_api_key"),
    ];
    for (path, body, status, code) in cases {
        let reply = cluster.endpoint.post_text(path, &body);
        let body = body.chars().take(100).collect::<String>();
        assert_eq!(reply.status, status, "{path} {body}: {reply:?}");
        assert!(!reply.message().is_empty() && (code.is_empty() || reply.code() == code), "{path} {body}: {reply:?}");
    }
    // What is too long for certain is not tokenized, so the tokens of it are not known.
    for (n_words, is_bound) in [(600, false), (60_000, true)] {
        let reply = cluster.endpoint.post("/v1/completions", &json!({"prompt": "seven ".repeat(n_words)}));
        assert_eq!(reply.message().contains("the prompt has at least "), is_bound, "{reply:?}");
        assert!(reply.message().contains("shorten it or serve with a larger --context"), "{reply:?}");
    }
    cluster.check_answer();
}

/// The first line and the rest of what comes back for raw bytes.
fn raw(url: &str, bytes: &[u8]) -> (String, String) {
    let mut stream = TcpStream::connect(url.trim_start_matches("http://")).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.write_all(bytes).unwrap();
    let mut reply = Vec::new();
    // A server that refuses a body may reset the connection behind its answer.
    let _ = stream.read_to_end(&mut reply);
    let text = String::from_utf8_lossy(&reply).into_owned();
    let (head, rest) = text.split_once("\r\n").unwrap_or((&text, ""));
    (head.to_owned(), rest.to_owned())
}

#[test]
fn rude_http_is_refused_before_it_costs_anything() {
    let cluster = Cluster::of(1);
    let post = |host: &str, more: &str| {
        format!("POST /v1/chat/completions HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n{more}\r\n\r\n")
            .into_bytes()
    };
    let json = "content-type: application/json";
    let cases = [
        (post("localhost", &format!("{json}\r\ncontent-length: 999999999")), "413"),
        (post("localhost", "content-type: text/plain\r\ncontent-length: 0"), "415"),
        (post("evil.example", &format!("{json}\r\ncontent-length: 0")), "403"),
        (b"NONSENSE\r\n\r\n".to_vec(), "400"),
        ([b"GET / HTTP/1.1\r\nx: ", &vec![b'y'; 1 << 20][..]].concat(), "431"),
    ];
    for (request, status) in cases {
        let (line, rest) = raw(cluster.url(), &request);
        assert!(line.starts_with(&format!("HTTP/1.1 {status} ")), "{line:?} {rest:?}, not {status}");
    }
    cluster.check_answer();
}

#[test]
fn an_endpoint_with_keys_wants_one() {
    let cluster = Setup::of(1).key("open sesame").start();
    let body = chat_body("Hello");
    for (key, status) in [(None, 401), (Some("open"), 401), (Some(""), 401), (Some("open sesame"), 200)] {
        let endpoint = cluster.endpoint.with_key(key);
        assert_eq!(endpoint.post("/v1/chat/completions", &body).status, status, "{key:?}");
        assert_eq!(endpoint.get("/v1/models").status, status, "{key:?}");
        assert_eq!(endpoint.get("/brigade/v1/status").status, status, "{key:?}");
        assert_eq!((endpoint.get("/health").status, endpoint.get("/ready").status), (200, 200), "{key:?}");
    }
    // Clients may not let machines in; the operator at the machine may.
    let reply = cluster.endpoint.post("/brigade/v1/tickets", &json!({"ttl_s": 60}));
    assert_eq!((reply.status, reply.code()), (403, "forbidden"));
    let state = cluster.state_dir("a");
    let state = state.to_str().unwrap();
    assert!(run(&["ticket", "--state-dir", state]).ok().starts_with("brigade1-"));
    assert!(run(&["chat", "--state-dir", state, "Hello"]).ok().len() > 1);
    check(&["chat", "--url", cluster.url(), "Hello"], 1, "no API key");
}

/// Whoever reaches the link port without a key gets nothing and disturbs nobody.
#[test]
fn garbage_on_the_link_port_disturbs_nobody() {
    let mut cluster = Cluster::of(2);
    let epoch = cluster.status()["epoch"].clone();
    let connect = || TcpStream::connect(cluster.links).unwrap();
    let noise =
        |seed: u32| (0..4096u32).map(move |i| (i.wrapping_mul(2_654_435_761).wrapping_add(seed * i) >> 13) as u8);
    for seed in 0..8 {
        // It may hang up in the middle of this.
        let _ = connect().write_all(&noise(seed).collect::<Vec<u8>>());
    }
    let silent: Vec<TcpStream> = (0..50).map(|_| connect()).collect();
    cluster.check_answer();
    assert!(anonymous_tls(connect()).is_err(), "a client without a key was let in");
    cluster.check_answer();
    assert_eq!(cluster.status()["epoch"], epoch, "nothing was placed anew");
    drop(silent);
    // The port still takes who has a key, and the ring is as it was.
    cluster.join();
    eventually("the new worker", || (cluster.status()["nodes"].as_array().unwrap().len() == 3).then_some(()));
    cluster.check_answer();
}

/// Shakes hands as any TLS client would, which has no key of its own, and waits for a byte.
fn anonymous_tls(mut stream: TcpStream) -> std::io::Result<()> {
    stream.set_read_timeout(Some(PATIENCE))?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(TrustAnybody))
        .with_no_client_auth();
    let name = ServerName::try_from("localhost").unwrap();
    let mut connection = ClientConnection::new(Arc::new(config), name).unwrap();
    let mut tls = rustls::Stream::new(&mut connection, &mut stream);
    tls.write_all(b"x")?;
    tls.read_exact(&mut [0])
}

#[derive(Debug)]
struct TrustAnybody;

impl ServerCertVerifier for TrustAnybody {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ED25519]
    }

    fn requires_raw_public_keys(&self) -> bool {
        true
    }
}
