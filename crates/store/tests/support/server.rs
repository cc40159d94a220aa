//! A hub and a web server on loopback that misbehaves as a test tells it, and notes what it was asked for.
//!
//! Each connection carries one request. A test gives a function from a request and its number to a [`Fault`]; it is
//! called before each answer. Files are at `/web/PATH` (or `/web/PATH?QUERY`, if one is called so) and, as those of a
//! repository, at `/OWNER/NAME/resolve/COMMIT/PATH`. [`Server::publish`] replaces them all.

use std::collections::BTreeMap;
use std::io::{self, BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// The first commit of every repository.
pub const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// Files of a page of a list.
const PAGE: usize = 2;

/// A request.
#[derive(Debug, Clone)]
pub struct Asked {
    /// Which request it is, from 0.
    pub no: usize,
    /// Path and query.
    pub path: String,
    /// First and last byte.
    pub range: Option<(u64, u64)>,
    /// What stands behind `Bearer`.
    pub token: Option<String>,
    /// The tag that the file should have.
    pub if_range: Option<String>,
}

impl Asked {
    /// Whether bytes of a file are asked for.
    pub fn is_file(&self) -> bool {
        !self.path.starts_with("/api/")
    }

    /// Whether more than a file's first bytes are asked for.
    pub fn is_bulk(&self) -> bool {
        self.is_file() && self.range.is_none_or(|(_, last)| last > 3)
    }
}

/// What goes wrong with an answer.
#[derive(Debug, Clone)]
pub enum Fault {
    /// The body ends after so many bytes.
    Cut(u64),
    /// Another status, with further header lines.
    Status(u16, &'static str),
    /// The range begins a byte later than was asked for.
    Shifted,
    /// One byte is another one.
    WrongByte,
    /// The whole file with its length, whatever was asked for.
    Whole,
    /// The whole file in chunks, without its length; cut after so many bytes.
    Chunked(Option<u64>),
    /// So many bytes, and then a byte in each pause.
    Drip(u64, Duration),
    /// Another tag.
    Tag(&'static str),
    /// Nothing for so long, and then the end.
    Silence(Duration),
    /// Elsewhere: this server, the same path.
    Redirect(String),
    /// Another body.
    Body(Vec<u8>, &'static str),
}

type Faults = Box<dyn Fn(&Asked) -> Option<Fault> + Send + Sync>;

/// What every repository has now.
#[derive(Clone, Default)]
struct State {
    commit: String,
    files: BTreeMap<String, Arc<Vec<u8>>>,
    hashes: BTreeMap<String, String>,
}

struct Inner {
    url: String,
    state: Mutex<State>,
    faults: Mutex<Faults>,
    asked: Mutex<Vec<Asked>>,
    n_bytes_sent: AtomicU64,
}

/// A running server. It goes on until the process ends.
#[derive(Clone)]
pub struct Server(Arc<Inner>);

impl Server {
    /// Serves files by their paths; `hash` makes the SHA-256 that the hub tells.
    pub fn start(files: &[(&str, &[u8])], hash: impl Fn(&[u8]) -> String) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let inner = Arc::new(Inner {
            url: format!("http://{}", listener.local_addr().unwrap()),
            state: Mutex::default(),
            faults: Mutex::new(Box::new(|_| None)),
            asked: Mutex::default(),
            n_bytes_sent: AtomicU64::new(0),
        });
        let server = Self(Arc::clone(&inner));
        server.publish(COMMIT, files, hash);
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let inner = Arc::clone(&inner);
                // A client that goes away in the middle is no failure of the server's.
                std::thread::spawn(move || inner.answer(&stream));
            }
        });
        server
    }

    /// From now on it has these files, and the branches of repositories are at `commit`.
    pub fn publish(&self, commit: &str, files: &[(&str, &[u8])], hash: impl Fn(&[u8]) -> String) {
        *self.0.state.lock().unwrap() = State {
            commit: commit.to_owned(),
            files: files.iter().map(|(path, bytes)| ((*path).to_owned(), Arc::new(bytes.to_vec()))).collect(),
            hashes: files.iter().map(|(path, bytes)| ((*path).to_owned(), hash(bytes))).collect(),
        };
    }

    /// From now on answers go wrong like this.
    pub fn faults(&self, faults: impl Fn(&Asked) -> Option<Fault> + Send + Sync + 'static) {
        *self.0.faults.lock().unwrap() = Box::new(faults);
    }

    /// Its address, which is that of a hub as well.
    pub fn url(&self) -> &str {
        &self.0.url
    }

    /// All that was asked for.
    pub fn asked(&self) -> Vec<Asked> {
        self.0.asked.lock().unwrap().clone()
    }

    /// Bytes of files that were sent.
    pub fn n_bytes_sent(&self) -> u64 {
        self.0.n_bytes_sent.load(Ordering::Relaxed)
    }
}

impl Inner {
    fn answer(&self, stream: &TcpStream) -> Option<()> {
        let asked = self.request(stream)?;
        let fault = (self.faults.lock().unwrap())(&asked);
        let path = asked.path.split('?').next()?;
        match &fault {
            Some(Fault::Status(status, headers)) => return reply(stream, *status, headers, b"").ok(),
            Some(Fault::Redirect(to)) => {
                return reply(stream, 302, &format!("location: {to}{}\r\n", asked.path), b"").ok();
            }
            Some(Fault::Silence(time)) => {
                std::thread::sleep(*time);
                return None;
            }
            Some(Fault::Body(body, headers)) => return reply(stream, 200, headers, body).ok(),
            _ => {}
        }
        if let Some(rest) = path.strip_prefix("/api/models/") {
            return self.list(stream, rest, &asked.path).ok();
        }
        let state = self.state.lock().unwrap().clone();
        let name = match path.split_once(&format!("/resolve/{}/", state.commit)) {
            Some((_, name)) => name,
            None => path.strip_prefix("/web/").unwrap_or(""),
        };
        let with_query = asked.path.strip_prefix("/web/").and_then(|name| state.files.get(name));
        match with_query.or_else(|| state.files.get(name)) {
            Some(bytes) => self.file(stream, bytes, &asked, fault.as_ref()).ok(),
            None => reply(stream, 404, "", b"").ok(),
        }
    }

    fn request(&self, stream: &TcpStream) -> Option<Asked> {
        let mut lines = BufReader::new(stream).lines().map_while(Result::ok);
        let path = lines.next()?.split(' ').nth(1)?.to_owned();
        let mut asked = Asked { no: 0, path, range: None, token: None, if_range: None };
        for line in lines.take_while(|line| !line.is_empty()) {
            let (name, value) = line.split_once(": ")?;
            match name.to_ascii_lowercase().as_str() {
                "range" => {
                    let (first, last) = value.strip_prefix("bytes=")?.split_once('-')?;
                    asked.range = Some((first.parse().ok()?, last.parse().ok()?));
                }
                "authorization" => asked.token = Some(value.strip_prefix("Bearer ")?.to_owned()),
                "if-range" => asked.if_range = Some(value.to_owned()),
                _ => {}
            }
        }
        let mut all = self.asked.lock().unwrap();
        asked.no = all.len();
        all.push(asked.clone());
        Some(asked)
    }

    /// What the hub's interface says.
    fn list(&self, stream: &TcpStream, path: &str, full: &str) -> io::Result<()> {
        let State { commit, files, hashes } = self.state.lock().unwrap().clone();
        if path.contains("/revision/") {
            let body = format!(r#"{{"id":"x","sha":"{commit}","private":false,"gated":false}}"#);
            return reply(stream, 200, "", body.as_bytes());
        }
        let start = full.split_once("cursor=").and_then(|(_, at)| at.parse().ok()).unwrap_or(0usize);
        let item = |(path, bytes): (&String, &Arc<Vec<u8>>)| {
            let (n, hash) = (bytes.len(), &hashes[path]);
            format!(r#"{{"type":"file","oid":"x","size":{n},"path":"{path}","lfs":{{"oid":"{hash}","size":{n}}}}}"#)
        };
        let items: Vec<_> = files.iter().skip(start).take(PAGE).map(item).collect();
        let link = if start + PAGE < files.len() {
            let base = full.split('?').next().unwrap_or("");
            format!("link: <{}{base}?recursive=true&cursor={}>; rel=\"next\"\r\n", self.url, start + PAGE)
        } else {
            String::new()
        };
        reply(stream, 200, &link, format!("[{}]", items.join(",")).as_bytes())
    }

    fn file(&self, stream: &TcpStream, bytes: &[u8], asked: &Asked, fault: Option<&Fault>) -> io::Result<()> {
        let n_bytes = bytes.len() as u64;
        let etag = if let Some(Fault::Tag(tag)) = fault { tag } else { "\"first\"" };
        if let Some(Fault::Chunked(cut)) = fault {
            return self.chunked(stream, bytes, *cut);
        }
        let (status, first, last) = match asked.range {
            Some(_) if matches!(fault, Some(Fault::Whole)) => (200, 0, n_bytes - 1),
            Some((first, _)) if first >= n_bytes => return reply(stream, 416, "", b""),
            Some((first, last)) => (206, first, last.min(n_bytes - 1)),
            None => (200, 0, n_bytes - 1),
        };
        let shift = u64::from(matches!(fault, Some(Fault::Shifted)));
        let range = match status {
            206 => format!("content-range: bytes {}-{}/{n_bytes}\r\n", first + shift, last + shift),
            _ => String::new(),
        };
        let mut body = bytes[first as usize..=last as usize].to_vec();
        if let (Some(Fault::WrongByte), Some(byte)) = (fault, body.last_mut()) {
            *byte ^= 1;
        }
        let head = format!(
            "HTTP/1.1 {status} Fine\r\nconnection: close\r\netag: {etag}\r\n{range}content-length: {}\r\n\r\n",
            body.len()
        );
        let mut stream = stream;
        stream.write_all(head.as_bytes())?;
        match fault {
            Some(Fault::Cut(n)) => body.truncate(*n as usize),
            Some(Fault::Drip(n, pause)) => {
                let (at_once, rest) = body.split_at((*n as usize).min(body.len()));
                self.send(stream, at_once)?;
                for byte in rest.chunks(1) {
                    std::thread::sleep(*pause);
                    self.send(stream, byte)?;
                }
                return Ok(());
            }
            _ => {}
        }
        self.send(stream, &body)
    }

    fn chunked(&self, mut stream: &TcpStream, bytes: &[u8], cut: Option<u64>) -> io::Result<()> {
        stream.write_all(b"HTTP/1.1 200 Fine\r\nconnection: close\r\ntransfer-encoding: chunked\r\n\r\n")?;
        let most = cut.map_or(bytes.len(), |cut| cut as usize);
        for chunk in bytes[..most].chunks(10_000) {
            stream.write_all(format!("{:x}\r\n", chunk.len()).as_bytes())?;
            self.send(stream, chunk)?;
            stream.write_all(b"\r\n")?;
        }
        if cut.is_none() { stream.write_all(b"0\r\n\r\n") } else { Ok(()) }
    }

    fn send(&self, mut stream: &TcpStream, bytes: &[u8]) -> io::Result<()> {
        self.n_bytes_sent.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        stream.write_all(bytes)?;
        stream.flush()
    }
}

fn reply(mut stream: &TcpStream, status: u16, headers: &str, body: &[u8]) -> io::Result<()> {
    let n = body.len();
    let head = format!("HTTP/1.1 {status} Said\r\nconnection: close\r\n{headers}content-length: {n}\r\n\r\n");
    stream.write_all(head.as_bytes())?;
    stream.write_all(body)
}
