//! Streams of answers at once, and the time of each token as a client sees it.
//!
//! A [`Load`] has one thread for each stream; each sends the time of every token to the one who measures, which alone
//! holds the [`Track`]s, and which decides by them when it has seen enough. Then all streams are hung up on: a
//! measurement never depends on all answers having the same length or beginning at the same time.
//!
//! What is reported of n streams is what happens while all n of them decode: from the moment at which the last one got
//! its first token, so that no prompt is being read, to the end of the measurement, so that none is missing. The speed
//! is the sum over streams of tokens by time, each between two tokens of its own: tokens that arrive together at an
//! edge distort nothing.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::{Duration, Instant};

use brigade_base::Token;

use crate::bench::{completion, quantile};
use crate::failure::{Failure, Outcome};
use crate::http::Endpoint;

/// How long there may be no token of any stream: a prompt of thousands of tokens on a slow machine.
const STALL: Duration = Duration::from_secs(300);

/// Tokens that may wait to be counted: a pass of 256 streams, sixteen times over.
const MAX_EVENTS: usize = 4096;

/// How long a coordinator may take to notice that its clients have gone: a pass that is on its way, and the next one.
const IDLE: Duration = Duration::from_secs(60);

/// How often it is asked.
const IDLE_POLL: Duration = Duration::from_millis(20);

/// What a stream did.
#[derive(Debug, Clone)]
pub struct Track {
    /// When it was asked for.
    pub asked: Instant,
    /// When each token came.
    pub tokens: Vec<Instant>,
}

impl Track {
    /// Milliseconds until the first token, if it has come.
    pub fn first_token_ms(&self) -> Option<f64> {
        Some((*self.tokens.first()? - self.asked).as_secs_f64() * 1000.0)
    }

    /// Tokens from `start` to `end`, both included.
    fn between(&self, start: Instant, end: Instant) -> &[Instant] {
        let from = self.tokens.partition_point(|at| *at < start);
        let to = self.tokens.partition_point(|at| *at <= end);
        &self.tokens[from..to.max(from)]
    }

    /// Milliseconds between neighbouring tokens from `start` to `end`.
    pub fn gaps_ms(&self, start: Instant, end: Instant) -> Vec<f64> {
        self.between(start, end).windows(2).map(|pair| (pair[1] - pair[0]).as_secs_f64() * 1000.0).collect()
    }

    /// Tokens per second from `start` to `end`, between its own tokens; 0 with fewer than two.
    fn speed(&self, start: Instant, end: Instant) -> f64 {
        let [first, .., last] = self.between(start, end) else { return 0.0 };
        let n_gaps = self.between(start, end).len() - 1;
        n_gaps as f64 / (*last - *first).as_secs_f64().max(f64::MIN_POSITIVE)
    }
}

/// What n streams did while all of them decoded.
#[derive(Debug, Clone, PartialEq)]
pub struct Steady {
    /// Tokens per second of all together.
    pub tokens_per_second: f64,
    /// Milliseconds until the first token: the median of the streams, which were asked for at once.
    pub first_token_ms: f64,
    /// Milliseconds between tokens of a stream: 50th and 99th percentile of all.
    pub gap_ms: (f64, f64),
}

impl Steady {
    /// Sums up what `tracks` did from `start` to `end`.
    pub fn of(tracks: &[Track], start: Instant, end: Instant) -> Self {
        let gaps: Vec<f64> = tracks.iter().flat_map(|track| track.gaps_ms(start, end)).collect();
        Self {
            tokens_per_second: tracks.iter().map(|track| track.speed(start, end)).sum(),
            first_token_ms: quantile(tracks.iter().filter_map(Track::first_token_ms), 0.5),
            gap_ms: (quantile(gaps.iter().copied(), 0.5), quantile(gaps, 0.99)),
        }
    }
}

/// When all had their first token; `None` while one has not.
pub fn all_began(tracks: &[Track]) -> Option<Instant> {
    tracks.iter().map(|track| track.tokens.first().copied()).try_fold(None, |latest, first| {
        let first = first?;
        Some(Some(latest.map_or(first, |latest: Instant| latest.max(first))))
    })?
}

/// Whether each has made `n_gaps` gaps between tokens since `start`.
pub fn all_made(tracks: &[Track], n_gaps: usize, start: Instant) -> bool {
    tracks.iter().all(|track| track.tokens.len() - track.tokens.partition_point(|at| *at < start) > n_gaps)
}

enum Event {
    Token(usize, Instant),
    Ended(usize, Outcome),
}

/// Streams that are being answered.
pub struct Load {
    endpoint: Endpoint,
    sender: SyncSender<Event>,
    events: Receiver<Event>,
    stop: Arc<AtomicBool>,
    tracks: Vec<Track>,
    n_ended: usize,
}

impl Load {
    /// No streams.
    pub fn new(endpoint: &Endpoint) -> Self {
        let (sender, events) = sync_channel(MAX_EVENTS);
        let stop = Arc::new(AtomicBool::new(false));
        Self { endpoint: endpoint.clone(), sender, events, stop, tracks: Vec::new(), n_ended: 0 }
    }

    /// Asks for one more stream: the continuation of `prompt` by `n_tokens`.
    pub fn ask(&mut self, prompt: &[Token], n_tokens: u32) -> Outcome {
        let stream = self.tracks.len();
        let (endpoint, sender, stop) = (self.endpoint.clone(), self.sender.clone(), Arc::clone(&self.stop));
        let body = completion(prompt, n_tokens);
        self.tracks.push(Track { asked: Instant::now(), tokens: Vec::new() });
        let run = move || {
            let on_text = |_: &str| {
                // Nobody listens once the measurement has failed; then it only has to end.
                let is_over = sender.send(Event::Token(stream, Instant::now())).is_err();
                Ok(if is_over || stop.load(Ordering::Relaxed) {
                    ControlFlow::Break(())
                } else {
                    ControlFlow::Continue(())
                })
            };
            let ended = endpoint.stream_until("/v1/completions", &body, on_text).map(drop);
            let _ = sender.send(Event::Ended(stream, ended));
        };
        std::thread::Builder::new().name(format!("stream-{stream}")).spawn(run).map_err(Failure::io("a thread"))?;
        Ok(())
    }

    /// Waits until `done` says so of the streams in the order in which they were asked for; returns the moment.
    ///
    /// # Errors
    /// If a stream fails, all end before that, or nothing happens for minutes.
    pub fn wait(&mut self, what: &str, done: impl Fn(&[Track]) -> bool) -> Outcome<Instant> {
        while !done(&self.tracks) {
            if self.n_ended == self.tracks.len() {
                return Err(Failure::said(format!("all answers ended before {what}")));
            }
            self.next(what)?;
        }
        Ok(Instant::now())
    }

    /// The streams as they stand.
    pub fn tracks(&self) -> &[Track] {
        &self.tracks
    }

    /// Hangs up on all that still run, and waits until the coordinator has noticed.
    pub fn hang_up(mut self) -> Outcome<Vec<Track>> {
        self.stop.store(true, Ordering::Relaxed);
        while self.n_ended < self.tracks.len() {
            self.next("their end")?;
        }
        let deadline = Instant::now() + IDLE;
        loop {
            let status = self.endpoint.status()?;
            if status["running"] == 0 && status["waiting"] == 0 {
                return Ok(std::mem::take(&mut self.tracks));
            }
            if Instant::now() > deadline {
                return Err(Failure::said(format!("answers run on for {IDLE:?} after their clients have gone")));
            }
            std::thread::sleep(IDLE_POLL);
        }
    }

    fn next(&mut self, what: &str) -> Outcome {
        match self.events.recv_timeout(STALL) {
            Ok(Event::Token(stream, at)) => self.tracks[stream].tokens.push(at),
            Ok(Event::Ended(stream, Ok(()))) => {
                self.n_ended += 1;
                if self.tracks[stream].tokens.is_empty() {
                    return Err(Failure::said("an answer has no text; take another model"));
                }
            }
            Ok(Event::Ended(_, Err(failure))) => return Err(failure),
            Err(_) => return Err(Failure::said(format!("no token came for {STALL:?}, waiting for {what}"))),
        }
        Ok(())
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

/// Milliseconds until the first token of a prompt that has the cluster to itself.
pub fn first_token_alone(endpoint: &Endpoint, prompt: &[Token]) -> Outcome<f64> {
    let mut load = Load::new(endpoint);
    load.ask(prompt, 1)?;
    load.wait("the first token", |tracks| all_began(tracks).is_some())?;
    let tracks = load.hang_up()?;
    tracks[0].first_token_ms().ok_or_else(|| Failure::said("the prompt was not answered"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Value;
    use std::io::{BufRead, BufReader, Read, Write};
    use std::net::{TcpListener, TcpStream};

    /// An endpoint that answers with as many tokens as it is asked for, but breaks off after `most`.
    fn endpoint(most: u64) -> Endpoint {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        std::thread::spawn(move || {
            for connection in listener.incoming() {
                // A client that hangs up makes the answer fail, as it should.
                std::thread::spawn(move || answer(&connection.unwrap(), most));
            }
        });
        Endpoint::new(&url)
    }

    fn answer(mut connection: &TcpStream, most: u64) -> std::io::Result<()> {
        let (mut reader, mut head) = (BufReader::new(connection), String::new());
        while reader.read_line(&mut head)? > 2 {}
        let head = head.to_lowercase();
        write!(connection, "HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n")?;
        if head.starts_with("get") {
            return write!(connection, "{{\"running\": 0, \"waiting\": 0}}");
        }
        let length = head.lines().find_map(|line| line.strip_prefix("content-length: ")).unwrap();
        let mut body = vec![0; length.parse().unwrap()];
        reader.read_exact(&mut body)?;
        let body: Value = serde_json::from_slice(&body)?;
        let n_tokens = body["max_tokens"].as_u64().unwrap();
        for _ in 0..n_tokens.min(most) {
            write!(connection, "data: {{\"choices\": [{{\"text\": \"w\"}}]}}\n\n")?;
        }
        if n_tokens <= most { write!(connection, "data: [DONE]\n\n") } else { Ok(()) }
    }

    #[test]
    fn endless_streams_are_hung_up_on_once_enough_was_seen() {
        let mut load = Load::new(&endpoint(u64::MAX));
        load.ask(&[1], u32::MAX).unwrap();
        load.ask(&[2], u32::MAX).unwrap();
        load.wait("all began", |tracks| all_began(tracks).is_some()).unwrap();
        let start = all_began(load.tracks()).unwrap();
        load.wait("enough", |tracks| all_made(tracks, 5, start)).unwrap();
        let tracks = load.hang_up().unwrap();
        assert!(tracks.len() == 2 && tracks.iter().all(|track| track.tokens.len() > 5));
    }

    #[test]
    fn streams_that_end_or_break_fail_what_waits_for_more() {
        for (most, reason) in [(9, "all answers ended before ten tokens"), (2, "broke off"), (0, "broke off")] {
            let mut load = Load::new(&endpoint(most));
            load.ask(&[1], 9).unwrap();
            let error = load.wait("ten tokens", |tracks| tracks[0].tokens.len() == 10).unwrap_err().to_string();
            assert!(error.contains(reason), "{error}");
        }
        assert!(first_token_alone(&endpoint(1), &[1]).unwrap() > 0.0);
    }

    fn track(asked: Instant, tokens_ms: &[u64]) -> Track {
        Track { asked, tokens: tokens_ms.iter().map(|ms| asked + Duration::from_millis(*ms)).collect() }
    }

    #[test]
    fn only_the_time_in_which_all_decode_counts() {
        let asked = Instant::now();
        let ms = |ms| asked + Duration::from_millis(ms);
        // The second stream begins late, the first decodes slowly while the prompt of the second is being read.
        let tracks = [track(asked, &[100, 200, 300, 310, 320, 330, 999]), track(asked, &[305, 315, 325, 335])];
        assert_eq!(all_began(&tracks), Some(ms(305)));
        assert!(all_made(&tracks, 2, ms(305)) && all_made(&tracks, 3, ms(305)) && !all_made(&tracks, 4, ms(305)));
        let steady = Steady::of(&tracks, ms(305), ms(335));
        assert!((steady.tokens_per_second - 200.0).abs() < 1e-6, "{steady:?}");
        assert!((steady.gap_ms.0 - 10.0).abs() < 1e-6 && (steady.gap_ms.1 - 10.0).abs() < 1e-6, "{steady:?}");
        assert!((steady.first_token_ms - 202.5).abs() < 1e-6, "{steady:?}");
    }

    #[test]
    fn streams_without_tokens_are_none() {
        let asked = Instant::now();
        assert_eq!(all_began(&[]), None);
        assert_eq!(all_began(&[track(asked, &[1]), track(asked, &[])]), None);
        let steady = Steady::of(&[track(asked, &[]), track(asked, &[5])], asked, asked + Duration::from_secs(1));
        assert_eq!((steady.tokens_per_second, steady.gap_ms), (0.0, (0.0, 0.0)));
    }
}
