//! Trying a model in a process of its own before it is loaded here.
//!
//! libllama ends the process over metadata that it does not expect, in more places than a reader of headers can know.
//! So a header that comes from a file or a peer goes to children first:
//!
//! ```text
//! here:  stage() or vocabulary() -- question, header --> child: the program again, with the argument `trial`
//!        TrialError or StageMemory <-- answer, or none --  one line, or an end by signal with libllama's last words
//! ```
//!
//! Of a stage one child builds the graphs ([`brigade_engine::rehearse`]), which takes no weights and no memory, and one
//! builds them with the stage's adapter: shapes and types of that were checked ([`AdapterView`]), but libllama counts
//! the nodes of a graph before it is made, and a matrix that a graph uses several times is adapted each time. Others
//! compute with zeros ([`brigade_engine::try_passes`]): the stage where it is small, else a piece of each kind that it
//! is made of, as far as there is time and memory for them, each with its part of the adapter (`pieces.rs`).
//!
//! A child (`child.rs`) gets no keys, opens no file or link, and is ended if it takes too long. One runs at a time,
//! and what it found is remembered. The program says once, by [`enable`], how children are started; until then, as in
//! tests of the library, nothing is tried.

mod child;
mod pieces;

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Mutex, OnceLock};
use std::time::{Duration, Instant};

use brigade_base::Hash;
use brigade_engine::{StageMemory, StageOptions};
use brigade_gguf::{AdapterView, Catalog, StageView};
use rustix::process::Signal;
use serde::{Deserialize, Serialize};

use self::child::MAX_CPU_S;
pub use self::child::answer;
use self::pieces::{pieces, thin};
use crate::system;
use crate::threads::lock;

/// The argument with which the program is such a child.
pub const ARGUMENT: &str = "trial";

/// How long a child may take. Most need 10 ms, the largest pieces and vocabularies some seconds; the rest is for
/// machines that are busy.
const MAX_WAIT: Duration = Duration::from_secs(30);

/// Longest answer; an error of libllama may quote a key or a name.
const MAX_ANSWER_BYTES: u64 = 256 << 10;

/// Most bytes of a child's standard error that are looked at. What ends it stands at the beginning: it logs nothing.
const MAX_SAID_BYTES: u64 = 64 << 10;

/// Most results that are remembered: of some models all layers differ, and those have up to a hundred.
const MAX_RESULTS: usize = 256;

/// Share of the free memory that zeros may take for a moment.
const MEMORY_DIVISOR: u64 = 4;

/// No further piece of a stage is begun after this. Most models have two or three kinds of layers, of which each takes
/// less than a second.
const PIECES_TIME: Duration = Duration::from_secs(5);

/// Longest line of a child that is shown.
const MAX_SHOWN_CHARS: usize = 300;

/// A model was tried, and cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TrialError {
    /// libllama says so.
    #[error("{0}")]
    Refused(String),
    /// libllama ended the process.
    #[error("libllama cannot run this model: {0}")]
    Ended(String),
    /// It did not come to an end.
    #[error("libllama cannot run this model: trying it without its weights takes longer than {MAX_CPU_S} s")]
    Late,
    /// There was no trial.
    #[error("whether libllama can run this model was not found out: {0}; without that it is not loaded")]
    Untried(String),
}

impl TrialError {
    /// Whether another trial may end otherwise.
    fn is_passing(&self) -> bool {
        matches!(self, Self::Late | Self::Untried(_))
    }
}

/// From now on models are tried before they are loaded, by `program` with the argument [`ARGUMENT`], which must call
/// [`answer`]. The first call counts.
pub fn enable(program: PathBuf) {
    let command = move || {
        let mut command = Command::new(&program);
        command.arg(ARGUMENT);
        command
    };
    let _ = TRIALS.set(Mutex::new(Trials::new(command, MAX_WAIT)));
}

/// What the stage would take in memory, once a child has built its graphs; `None` if nothing is tried. Whoever loads it
/// asks for [`stage`].
///
/// # Errors
/// If libllama does not load such a stage.
pub fn memory(view: &StageView, options: &StageOptions) -> Result<Option<StageMemory>, TrialError> {
    let Some(trials) = TRIALS.get() else { return Ok(None) };
    let question = Question::Rehearse { n_bytes: view.n_bytes(), options: tried_options(options) };
    match lock(trials).ask(&question, view.header_bytes())? {
        Answer::Memory { weights, kv, compute } => Ok(Some(StageMemory { weights, kv, compute })),
        Answer::Survived | Answer::Refused(_) => Err(TrialError::Untried("the trial answered nonsense".to_owned())),
    }
}

/// What the stage would take in memory without its adapter, once children have survived its graphs, with the adapter
/// too, and computing with them; `None` if nothing is tried.
///
/// # Errors
/// If libllama does not load or run such a stage, or its adapter cannot be tried.
pub fn stage(
    view: &StageView,
    adapter: Option<&AdapterView>,
    options: &StageOptions,
) -> Result<Option<StageMemory>, TrialError> {
    let Some(memory) = memory(view, options)? else { return Ok(None) };
    let Some(trials) = TRIALS.get() else { return Ok(None) };
    let most_weights = system::available_memory().0 / MEMORY_DIVISOR;
    let begin = Instant::now();
    if let Some(adapter) = adapter {
        let thin = thin(adapter)?.header_bytes(true);
        // It has fewer bytes, and behind its header there are zeros without end.
        let part = AdapterPart::behind(view, adapter);
        let question = Question::Adapted { n_bytes: view.n_bytes(), options: tried_options(options), adapter: part };
        lock(trials).ask(&question, &[view.header_bytes(), &thin].concat())?;
    }
    for piece in pieces(view, adapter)? {
        if piece.weight_bytes() <= most_weights && begin.elapsed() < PIECES_TIME {
            lock(trials).ask(&piece.question(options), &piece.header_bytes())?;
        }
    }
    Ok(Some(memory))
}

/// Has a child survive the graphs of a model as llama.cpp's own readers load it, with all that its header says, if
/// anything is tried.
///
/// # Errors
/// If libllama does not load it.
pub fn uncut(catalog: &Catalog, options: &StageOptions) -> Result<(), TrialError> {
    let Some(trials) = TRIALS.get() else { return Ok(()) };
    let header = catalog.header_bytes(false);
    let padded = |n_bytes: u64| n_bytes.saturating_add(PADDING);
    let weights = catalog.tensors().iter().map(|tensor| padded(tensor.n_bytes)).fold(PADDING, u64::saturating_add);
    let n_bytes = weights.saturating_add(header.len() as u64);
    lock(trials).ask(&Question::Rehearse { n_bytes, options: tried_options(options) }, &header).map(drop)
}

/// Has a child survive the vocabulary of the GGUF in `header`, if anything is tried.
///
/// # Errors
/// If libllama does not load it.
pub fn vocabulary(header: &[u8]) -> Result<(), TrialError> {
    let Some(trials) = TRIALS.get() else { return Ok(()) };
    lock(trials).ask(&Question::Vocabulary, header).map(drop)
}

/// Bytes that a file may have in front of each tensor.
const PADDING: u64 = 64;

static TRIALS: OnceLock<Mutex<Trials>> = OnceLock::new();

/// What a child is asked: a line of JSON, followed by the header, and that of an adapter.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
enum Question {
    Rehearse { n_bytes: u64, options: StageOptions },
    Adapted { n_bytes: u64, options: StageOptions, adapter: AdapterPart },
    Passes { n_bytes: u64, takes_tokens: bool, options: StageOptions, adapter: Option<AdapterPart> },
    Vocabulary,
}

/// The adapter of a stage that is computed with.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct AdapterPart {
    /// Where its header starts, behind that of the stage.
    starts: usize,
    n_bytes: u64,
    scale: f32,
}

impl AdapterPart {
    /// What is to be known of it where its header follows that of the stage.
    fn behind(stage: &StageView, adapter: &AdapterView) -> Self {
        Self { starts: stage.header_bytes().len(), n_bytes: adapter.n_bytes(), scale: adapter.scale() }
    }
}

/// The options as a child is told them: how many threads compute has no say in whether a stage can be loaded.
fn tried_options(options: &StageOptions) -> StageOptions {
    StageOptions { n_threads: 1, ..options.clone() }
}

/// What it answers: a line of JSON.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
enum Answer {
    Memory { weights: u64, kv: u64, compute: u64 },
    Survived,
    Refused(String),
}

/// Starts children and remembers what they found.
struct Trials {
    command: Box<dyn Fn() -> Command + Send>,
    max_wait: Duration,
    results: VecDeque<(Hash, Result<Answer, TrialError>)>,
}

impl Trials {
    fn new(command: impl Fn() -> Command + Send + 'static, max_wait: Duration) -> Self {
        Self { command: Box::new(command), max_wait, results: VecDeque::new() }
    }

    fn ask(&mut self, question: &Question, header: &[u8]) -> Result<Answer, TrialError> {
        let question = serde_json::to_string(question).map_err(|error| TrialError::Untried(error.to_string()))? + "\n";
        let mut hasher = blake3::Hasher::new();
        hasher.update(question.as_bytes()).update(header);
        let hash = Hash::from_bytes(*hasher.finalize().as_bytes());
        if let Some((_, result)) = self.results.iter().find(|(known, _)| *known == hash) {
            return result.clone();
        }
        let result = self.run(question.as_bytes(), header);
        if !result.as_ref().is_err_and(TrialError::is_passing) {
            self.results.truncate(MAX_RESULTS - 1);
            self.results.push_front((hash, result.clone()));
        }
        result
    }

    fn run(&self, question: &[u8], header: &[u8]) -> Result<Answer, TrialError> {
        let untried = |error: io::Error| TrialError::Untried(error.to_string());
        let mut command = (self.command)();
        for (name, _) in std::env::vars_os().filter(|(name, _)| is_private(&name.to_string_lossy())) {
            command.env_remove(name);
        }
        // Else libllama starts a debugger to show where it was.
        command.env("GGML_NO_BACKTRACE", "1");
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().map_err(untried)?;
        let (answer, said, is_late) = converse(&mut child, [question, header], self.max_wait);
        let status = child.wait().map_err(untried)?;
        let is_ended_by = |signal: Signal| status.signal() == Some(signal.as_raw());
        if is_late || is_ended_by(Signal::XCPU) {
            return Err(TrialError::Late);
        }
        if is_ended_by(Signal::KILL) {
            return Err(TrialError::Untried("its trial was killed; memory may be short".to_owned()));
        }
        match serde_json::from_slice(&answer) {
            Ok(Answer::Refused(reason)) => Err(TrialError::Refused(reason)),
            Ok(answer) => Ok(answer),
            Err(_) => Err(TrialError::Ended(last_words(&String::from_utf8_lossy(&said), status))),
        }
    }
}

/// Whether a variable of the environment is no business of a process that may be in the hands of a model's author.
fn is_private(name: &str) -> bool {
    name.starts_with("BRIGADE_") || name.starts_with("HF_") || name.ends_with("_TOKEN") || name.ends_with("_KEY")
}

/// Writes to a child and reads what it says until it has ended, or ends it after `max_wait`: its output, its standard
/// error, and whether it was ended.
fn converse(child: &mut Child, input: [&[u8]; 2], max_wait: Duration) -> (Vec<u8>, Vec<u8>, bool) {
    let (stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
    let (done, all_done) = channel();
    std::thread::scope(|scope| {
        // A child that ends before it has read everything has said why.
        let write = move || stdin.map(|mut pipe| input.into_iter().try_for_each(|bytes| pipe.write_all(bytes)));
        let spawn = |work: Box<dyn FnOnce() -> Vec<u8> + Send>| {
            std::thread::Builder::new().name("trial".to_owned()).spawn_scoped(scope, work).ok()
        };
        let _writer = std::thread::Builder::new().name("trial".to_owned()).spawn_scoped(scope, write);
        let out = spawn(reader(stdout, MAX_ANSWER_BYTES, done.clone()));
        let err = spawn(reader(stderr, MAX_SAID_BYTES, done));
        // Both readers drop their ends once the child has closed its own.
        let is_late = all_done.recv_timeout(max_wait) == Err(std::sync::mpsc::RecvTimeoutError::Timeout);
        if is_late {
            let _ = child.kill();
        }
        let read = |thread: Option<std::thread::ScopedJoinHandle<'_, Vec<u8>>>| {
            thread.and_then(|thread| thread.join().ok()).unwrap_or_default()
        };
        (read(out), read(err), is_late)
    })
}

/// Reads a pipe to its end and keeps the first bytes; `done` is dropped at the end.
fn reader<P: Read + Send + 'static>(
    pipe: Option<P>,
    max_bytes: u64,
    done: Sender<()>,
) -> Box<dyn FnOnce() -> Vec<u8> + Send> {
    Box::new(move || {
        let mut bytes = Vec::new();
        if let Some(mut pipe) = pipe {
            let _ = (&mut pipe).take(max_bytes).read_to_end(&mut bytes);
            // Else the child would wait for room in the pipe.
            let _ = io::copy(&mut pipe, &mut io::sink());
        }
        drop(done);
        bytes
    })
}

/// Why a child has ended without an answer: the assertion that libllama names, else what it said first, else how it
/// ended.
fn last_words(said: &str, status: ExitStatus) -> String {
    let mut lines = said.lines().map(str::trim).filter(|line| !line.is_empty()).map(without_folders);
    let first = lines.clone().next();
    let line = lines.find(|line| line.contains("GGML_") || line.contains("what():")).or(first);
    let text = match line {
        Some(line) => line.to_owned(),
        None => format!("the process that tried it ended by {status}"),
    };
    text.chars().take(MAX_SHOWN_CHARS).collect()
}

/// A line such as `/somewhere/src/llama-graph.cpp:174: GGML_ASSERT(buffer) failed` from the name of the file on.
fn without_folders(line: &str) -> &str {
    let path = line.split_once(": ").map_or("", |(path, _)| path);
    path.rfind(['/', '\\']).map_or(line, |slash| &line[slash + 1..])
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU32, Ordering};
    use std::time::Instant;

    use super::*;

    /// What comes of a child that does `script`.
    fn result_of(script: &'static str) -> Result<Answer, TrialError> {
        trials(script, MAX_WAIT).ask(&Question::Vocabulary, &[7; 1 << 20])
    }

    fn trials(script: &'static str, max_wait: Duration) -> Trials {
        let command = move || {
            let mut command = Command::new("/bin/sh");
            command.args(["-c", script]);
            command
        };
        Trials::new(command, max_wait)
    }

    #[test]
    fn an_assertion_of_a_child_is_an_error_here() {
        let result = result_of("echo 'load: fine\n/a b/src/x.cpp:17: GGML_ASSERT(n > 0) failed' >&2; kill -ABRT $$");
        let error = result.unwrap_err();
        assert_eq!(error, TrialError::Ended("x.cpp:17: GGML_ASSERT(n > 0) failed".to_owned()));
        assert_eq!(error.to_string(), "libllama cannot run this model: x.cpp:17: GGML_ASSERT(n > 0) failed");
        let exception = result_of("echo \"terminate called\n  what():  map::at\" >&2; exit 134").unwrap_err();
        assert_eq!(exception, TrialError::Ended("what():  map::at".to_owned()));
    }

    #[test]
    fn a_child_that_says_nothing_has_an_end_nevertheless() {
        assert_eq!(result_of("kill -XCPU $$").unwrap_err(), TrialError::Late);
        assert!(matches!(result_of("kill -KILL $$").unwrap_err(), TrialError::Untried(_)), "memory may be free later");
        let error = result_of("kill -SEGV $$").unwrap_err().to_string();
        assert!(error.contains("SIGSEGV"), "{error}");
        let error = result_of("cat >&2; exit 3").unwrap_err().to_string();
        assert!(error.len() < 500 && !error.contains('\n'), "{error}");
        let error = result_of("yes | head -c 10000000").unwrap_err().to_string();
        assert!(error.contains("exit status: 0"), "what is no answer does not count: {error}");
    }

    #[test]
    fn a_child_that_answers_is_believed() {
        assert_eq!(result_of(r#"head -n 1 | grep -q '"Vocabulary"' && echo '"Survived"'"#), Ok(Answer::Survived));
        let refused = result_of(r#"echo '{"Refused":"no such architecture"}'"#).unwrap_err();
        assert_eq!(refused.to_string(), "no such architecture");
    }

    #[test]
    fn a_child_that_hangs_is_ended() {
        let begin = Instant::now();
        let mut trials = trials("exec sleep 600", Duration::from_millis(50));
        let late = trials.ask(&Question::Vocabulary, &[0; 1 << 20]).unwrap_err();
        assert_eq!(late, TrialError::Late);
        assert!(begin.elapsed() < Duration::from_secs(60) && trials.results.is_empty());
    }

    #[test]
    fn a_program_that_is_not_there_tries_nothing() {
        let mut trials = Trials::new(|| Command::new("/no/such/program"), MAX_WAIT);
        let error = trials.ask(&Question::Vocabulary, &[]).unwrap_err();
        assert!(matches!(&error, TrialError::Untried(_)), "{error}");
        assert!(trials.results.is_empty(), "it may be there the next time");
    }

    #[test]
    fn what_was_found_is_remembered_for_the_same_question_and_header() {
        let started = Arc::new(AtomicU32::new(0));
        let counter = Arc::clone(&started);
        let command = move || {
            counter.fetch_add(1, Ordering::Relaxed);
            let mut command = Command::new("/bin/sh");
            command.args(["-c", r#"echo '"Survived"'"#]);
            command
        };
        let mut trials = Trials::new(command, MAX_WAIT);
        for n in [1, 1, 2, 1] {
            assert_eq!(trials.ask(&Question::Vocabulary, &[n]), Ok(Answer::Survived));
        }
        assert_eq!(started.load(Ordering::Relaxed), 2);
    }

    #[test]
    fn children_see_no_keys() {
        let private = ["BRIGADE_API_KEY", "BRIGADE_TICKET", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "GITHUB_TOKEN"];
        assert!(private.into_iter().all(is_private));
        assert!(!["PATH", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES", "HOME"].into_iter().any(is_private));
    }
}
