//! `cargo xtask bench scheduler`: what scheduling and HTTP cost per token.
//!
//! A child answers over real HTTP with the real scheduler, sampler, meter and server, but its model computes nothing
//! (`brigade_node::rehearse`), on one core. This process holds the streams, on another core, and counts. Only the time
//! in which all streams run counts; the child's processor time over it gives the cost of a token.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use brigade_api::{ApiOptions, Server};
use brigade_node::serving::Serving;
use brigade_node::system::raise_open_files;
use brigade_node::{LocalModel, rehearse};
use clap::Args;
use rustix::thread::{CpuSet, sched_setaffinity};
use serde::Serialize;

use crate::cluster::on_cores;
use crate::failure::{Failure, Outcome};
use crate::output::line;
use crate::processes::Processes;

/// What the project asks for.
const TARGET_TOKENS_PER_SECOND: f64 = 20_000.0;

/// How long the child may take to open its model.
const OPEN_TIMEOUT: Duration = Duration::from_secs(60);

/// How long all streams together may take to get their first token.
const START_TIMEOUT: Duration = Duration::from_secs(120);

/// Bytes of a reading thread's stack: a buffer and a call.
const STACK_BYTES: usize = 128 << 10;

/// `cargo xtask bench scheduler`
#[derive(Debug, Args)]
pub struct SchedulerArgs {
    /// Requests at once
    #[arg(long, value_name = "N", default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..=4000))]
    pub streams: u32,
    /// Seconds to measure
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=600))]
    pub seconds: u32,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// The child of `cargo xtask bench scheduler`
#[derive(Debug, Args)]
pub struct RehearsalArgs {
    /// Sessions at once
    #[arg(long)]
    pub streams: u32,
    /// Tokens of a session
    #[arg(long)]
    pub context: u32,
    /// Where it keeps its key
    #[arg(long)]
    pub state_dir: PathBuf,
}

#[derive(Debug, Serialize)]
struct Report {
    streams: u32,
    seconds: f64,
    tokens: u64,
    tokens_per_second: f64,
    /// Microseconds of the child's processor time for a token.
    cpu_us_per_token: f64,
    /// Share of one core that the child used.
    cpu_share: f64,
    n_vocab: u32,
    target: f64,
}

/// Answers until it is ended.
pub fn run_rehearsal(args: &RehearsalArgs) -> Outcome {
    raise_open_files();
    let path = crate::root().join("models/abacus-f16.gguf");
    let model = LocalModel::open(&path, &args.state_dir, &|_, _| {}).map_err(Failure::said)?;
    let handle = rehearse(model, &args.state_dir, args.streams, args.context).map_err(Failure::said)?;
    let listener = TcpListener::bind("127.0.0.1:0").map_err(Failure::io("a port"))?;
    let n_vocab = handle.model().n_vocab;
    let server = Server::start(listener, handle, &ApiOptions::default()).map_err(Failure::io("the endpoint"))?;
    line(format_args!("ready {} {n_vocab}", server.addr()))?;
    loop {
        std::thread::park();
    }
}

/// Measures and prints.
pub fn run(args: &SchedulerArgs) -> Outcome {
    raise_open_files();
    let processes = Processes::new()?;
    // More tokens than any machine makes in the time.
    let context = 4096 + args.seconds * 4000 * 1000 / args.streams.max(1);
    let program = std::env::current_exe().map_err(Failure::io("the path of this program"))?;
    let mut command = on_cores(&program, Some((0, 1)));
    command.args(["bench", "rehearsal", "--streams", &args.streams.to_string(), "--context", &context.to_string()]);
    command.arg("--state-dir").arg(processes.dir().join("state"));
    let lines = processes.start("rehearsal", command)?;
    let (addr, n_vocab, pid) = lines
        .wait_for("its address", OPEN_TIMEOUT, |line| {
            let (addr, n_vocab) = line.strip_prefix("ready ")?.split_once(' ')?;
            Some((addr.parse::<SocketAddr>().ok()?, n_vocab.parse::<u32>().ok()?, ()))
        })
        .map(|(addr, n_vocab, ())| (addr, n_vocab, processes.id("rehearsal")))?;
    keep_off_core(0)?;
    let crowd = Crowd::start(addr, args.streams, context)?;
    let begin = (Instant::now(), crowd.tokens(), cpu_time(pid)?);
    std::thread::sleep(Duration::from_secs(args.seconds.into()));
    let end = (Instant::now(), crowd.tokens(), cpu_time(pid)?);
    let still_running = crowd.stop();
    if still_running < args.streams as usize {
        return Err(Failure::said(format!("{} streams ended early", args.streams as usize - still_running)));
    }
    let (seconds, tokens, cpu) = ((end.0 - begin.0).as_secs_f64(), end.1 - begin.1, end.2 - begin.2);
    let report = Report {
        streams: args.streams,
        seconds,
        tokens,
        tokens_per_second: tokens as f64 / seconds,
        cpu_us_per_token: cpu * 1e6 / (tokens as f64).max(1.0),
        cpu_share: cpu / seconds,
        n_vocab,
        target: TARGET_TOKENS_PER_SECOND,
    };
    if args.json {
        return line(serde_json::to_string_pretty(&report).map_err(Failure::said)?);
    }
    print(&report)
}

fn print(report: &Report) -> Outcome {
    let met = if report.tokens_per_second >= report.target { "met" } else { "NOT met" };
    line(format_args!(
        "{} streams over HTTP on one core, a vocabulary of {}, no model",
        report.streams, report.n_vocab
    ))?;
    line(format_args!("tokens/s        {:.0}   (target {:.0}: {met})", report.tokens_per_second, report.target))?;
    line(format_args!("cost per token  {:.1} us of processor time", report.cpu_us_per_token))?;
    line(format_args!("core in use     {:.0} %", report.cpu_share * 100.0))
}

/// Streams that only count.
struct Crowd {
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    tokens: AtomicU64,
    started: AtomicUsize,
    ended: AtomicUsize,
    stop: AtomicBool,
    /// What the first stream that ended had to say.
    why: Mutex<Option<String>>,
}

impl Crowd {
    /// Opens all streams and waits until each has a token.
    fn start(addr: SocketAddr, n_streams: u32, context: u32) -> Outcome<Self> {
        let shared = Arc::new(Shared::default());
        for k in 0..n_streams {
            let shared = Arc::clone(&shared);
            let stream = move || {
                let end = follow(addr, k, context - 64, &shared);
                shared.ended.fetch_add(1, Ordering::Relaxed);
                if let Ok(mut why) = shared.why.lock() {
                    let end = end.unwrap_or_else(|error| error.to_string());
                    why.get_or_insert(end);
                }
            };
            let thread = std::thread::Builder::new().stack_size(STACK_BYTES);
            thread.spawn(stream).map_err(Failure::io("a thread for a stream"))?;
        }
        let deadline = Instant::now() + START_TIMEOUT;
        while shared.started.load(Ordering::Relaxed) < n_streams as usize {
            if shared.ended.load(Ordering::Relaxed) > 0 || Instant::now() > deadline {
                let why = shared.why.lock().ok().and_then(|why| why.clone()).unwrap_or_else(|| "too slow".to_owned());
                return Err(Failure::said(format!("a stream got no token: {why}")));
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(Self { shared })
    }

    fn tokens(&self) -> u64 {
        self.shared.tokens.load(Ordering::Relaxed)
    }

    /// Ends all streams; returns how many still ran.
    fn stop(&self) -> usize {
        let ended = self.shared.ended.load(Ordering::Relaxed);
        self.shared.stop.store(true, Ordering::Relaxed);
        self.shared.started.load(Ordering::Relaxed) - ended
    }
}

/// Asks, and counts the events of the answer until it ends or is to stop.
fn follow(addr: SocketAddr, k: u32, n_tokens: u32, shared: &Shared) -> std::io::Result<String> {
    let body = format!(
        r#"{{"model":"default","prompt":[{},{},{}],"max_tokens":{n_tokens},"temperature":0,"ignore_eos":true,"stream":true}}"#,
        k % 200 + 1,
        k / 200 + 1,
        k % 7 + 1
    );
    let mut stream = TcpStream::connect(addr)?;
    write!(
        stream,
        "POST /v1/completions HTTP/1.1\r\nhost: {addr}\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    )?;
    let mut buffer = [0; 16 << 10];
    let mut events = Events::default();
    let (mut has_answer, mut has_started) = (false, false);
    while !shared.stop.load(Ordering::Relaxed) {
        let n = stream.read(&mut buffer)?;
        if n == 0 {
            return Ok("the connection was closed".to_owned());
        }
        if !buffer[..n].starts_with(b"HTTP/1.1 200") && !has_answer {
            return Ok(String::from_utf8_lossy(&buffer[..n.min(400)]).into_owned());
        }
        has_answer = true;
        let found = events.count(&buffer[..n]);
        if found > 0 && !std::mem::replace(&mut has_started, true) {
            shared.started.fetch_add(1, Ordering::Relaxed);
        }
        shared.tokens.fetch_add(found, Ordering::Relaxed);
    }
    Ok("it was told to stop".to_owned())
}

/// Counts events that carry text, wherever reads cut them.
#[derive(Default)]
struct Events {
    matched: usize,
}

impl Events {
    /// What every chunk of a plain completion has once.
    const MARK: &'static [u8] = b"\"text\":";

    fn count(&mut self, bytes: &[u8]) -> u64 {
        let mut found = 0;
        for &byte in bytes {
            self.matched = match byte {
                _ if byte == Self::MARK[self.matched] => self.matched + 1,
                b'"' => 1,
                _ => 0,
            };
            if self.matched == Self::MARK.len() {
                found += 1;
                self.matched = 0;
            }
        }
        found
    }
}

/// Seconds of processor time that a process has used.
pub fn cpu_time(pid: Option<u32>) -> Outcome<f64> {
    let pid = pid.ok_or_else(|| Failure::said("the child is gone"))?;
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).map_err(Failure::io("/proc"))?;
    // After the name, which may hold anything, in parentheses: the 12th and 13th fields, in hundredths of a second.
    let fields: Vec<&str> = text.rsplit_once(')').map_or("", |(_, rest)| rest).split_whitespace().collect();
    let ticks = |k: usize| fields.get(k).and_then(|field| field.parse::<f64>().ok()).unwrap_or(0.0);
    Ok((ticks(11) + ticks(12)) / 100.0)
}

/// Leaves a core to somebody else, where there is another.
fn keep_off_core(core: usize) -> Outcome {
    let n_cores = std::thread::available_parallelism().map_or(1, usize::from);
    if n_cores < 2 {
        return Err(Failure::said("this needs two cores: one for the endpoint and one for its clients"));
    }
    let mut cores = CpuSet::new();
    (0..n_cores).filter(|k| *k != core).for_each(|k| cores.set(k));
    sched_setaffinity(None, &cores).map_err(|error| Failure::said(format!("cores cannot be chosen: {error}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_counted_wherever_reads_cut_them() {
        let answer = br#"data: {"choices":[{"index":0,"text":"a\"text","logprobs":null}]}"#.repeat(3);
        for size in 1..20 {
            let mut events = Events::default();
            assert_eq!(answer.chunks(size).map(|part| events.count(part)).sum::<u64>(), 3, "reads of {size}");
        }
    }

    #[test]
    fn a_process_has_used_some_time() {
        let begin = Instant::now();
        while begin.elapsed() < Duration::from_millis(30) {}
        assert!(cpu_time(Some(std::process::id())).unwrap() > 0.0);
    }
}
