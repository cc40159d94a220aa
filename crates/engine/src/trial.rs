//! Passes of a stage whose weights are zeros: what libllama asserts while it computes shows itself before the weights
//! are there.
//!
//! A rehearsal ([`rehearse`](crate::rehearse)) builds graphs; but some inputs are asserted when they are set, and types
//! of tensors when they are computed with. So a stage is loaded with zeros in place of all weights, and computes, with
//! its adapter where it has one: that is a part of the graphs from the first pass on. It takes the memory of the
//! weights, so it is for stages of few layers, in a process that may be lost.

use std::io::{self, Read, Seek, SeekFrom};
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use crate::adapter::AdapterSource;
use crate::model::{Content, Model};
use crate::run::{Input, Row};
use crate::source::ReadSeek;
use crate::stage::{Stage, StageOptions};

/// Rows of the chunk that is tried; more take another way through no graph.
const CHUNK_ROWS: u32 = 2;

/// How long loading and computing may take together. Zeros are loaded at a GiB in a second and more.
const MAX_TIME: Duration = Duration::from_secs(2);

/// A GGUF without its data: the header, and zeros behind it without end.
pub fn hollow(header: Vec<u8>) -> Box<dyn ReadSeek + Send> {
    Box::new(Hollow { header, position: 0 })
}

/// Computes a chunk and a single row with the GGUF of `n_bytes` that begins with `header`, and with an adapter (as a
/// [hollow] one, too), as far as time allows. `takes_tokens` says what enters it.
///
/// What does not assert is of no interest here: errors of a stage without weights and with little memory are dropped.
pub fn try_passes(
    header: Vec<u8>,
    n_bytes: u64,
    adapter: Option<AdapterSource>,
    options: &StageOptions,
    takes_tokens: bool,
) {
    let deadline = Instant::now() + MAX_TIME;
    let model = Model::from_reader(hollow(header), n_bytes, Content::All, &mut |_| Instant::now() < deadline);
    let Ok(mut stage) = model.and_then(|model| Stage::adapted(model, adapter, options.clone())) else { return };
    let (canceller, (done, is_done)) = (stage.canceller(), channel::<()>());
    std::thread::scope(|scope| {
        let watch = move || {
            if is_done.recv_timeout(deadline.saturating_duration_since(Instant::now())).is_err() {
                canceller.cancel();
            }
        };
        let watcher = std::thread::Builder::new().name("watch".to_owned()).spawn_scoped(scope, watch);
        if watcher.is_ok() {
            pass_rows(&mut stage, takes_tokens, deadline);
        }
        let _ = done.send(());
    });
}

/// A chunk, and a row behind it where a session goes on.
fn pass_rows(stage: &mut Stage, takes_tokens: bool, deadline: Instant) {
    let (mut position, mut out) = (0, Vec::new());
    for n_rows in [CHUNK_ROWS.min(stage.options().max_rows), 1] {
        let rows: Vec<Row> =
            (0..n_rows).map(|i| Row { slot: 0, position: position + i, output: i + 1 == n_rows }).collect();
        let hidden = vec![0.0; n_rows as usize * stage.n_embd() as usize];
        let tokens = vec![0; n_rows as usize];
        let input = if takes_tokens { Input::Tokens(&tokens) } else { Input::Hidden(&hidden) };
        if Instant::now() >= deadline || stage.run(&rows, input, &mut out).is_err() {
            return;
        }
        position = stage.len(0);
    }
}

/// A header with zeros behind it.
struct Hollow {
    header: Vec<u8>,
    position: u64,
}

impl Read for Hollow {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let rest = usize::try_from(self.position).ok().and_then(|at| self.header.get(at..)).unwrap_or_default();
        let n = if rest.is_empty() { buffer.len() } else { rest.len().min(buffer.len()) };
        match rest.get(..n) {
            Some(bytes) => buffer[..n].copy_from_slice(bytes),
            None => buffer[..n].fill(0),
        }
        self.position += n as u64;
        Ok(n)
    }
}

impl Seek for Hollow {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        // The engine counts from the start alone.
        let SeekFrom::Start(position) = to else { return Err(io::ErrorKind::Unsupported.into()) };
        self.position = position;
        Ok(position)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zeros_follow_a_header() {
        let mut hollow = Hollow { header: vec![7; 5], position: 0 };
        let mut buffer = [1; 4];
        assert_eq!((hollow.read(&mut buffer).unwrap(), buffer), (4, [7; 4]));
        assert_eq!((hollow.read(&mut buffer).unwrap(), buffer[0]), (1, 7));
        assert_eq!((hollow.read(&mut buffer).unwrap(), buffer), (4, [0; 4]));
        assert_eq!(hollow.seek(SeekFrom::Start(4)).unwrap(), 4);
        assert_eq!((hollow.read(&mut buffer).unwrap(), buffer[0]), (1, 7));
    }

    #[test]
    fn what_is_no_model_is_left_alone() {
        let options = StageOptions {
            n_ctx: 16,
            n_sessions: 1,
            max_rows: 2,
            max_outputs: 1,
            n_threads: 1,
            n_embd: 0,
            n_vocab: 0,
            hooks: brigade_base::Hooks::default(),
            pooling: None,
            kv: brigade_base::KvTypes::default(),
        };
        try_passes(b"GGUF".to_vec(), 1 << 20, None, &options, false);
    }
}
