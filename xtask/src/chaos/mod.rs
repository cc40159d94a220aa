//! `cargo xtask chaos`: real nodes are killed, frozen, cut off, filled up and asked to leave, at random moments and
//! under load, and every answer is compared with the undisturbed one.
//!
//! - [`asks`] draws requests, greedy and sampled, and has one whole process answer them before anything breaks.
//! - [`nodes`] runs a coordinator, workers and a spare one, each worker with a disk and a [`network`] of its own, which
//!   it leaves through a [`proxy`].
//! - [`callers`] stream answers in a loop, and note when each token came.
//! - [`faults`] draws what is broken; this file breaks it, measures, and waits until all is well before the next.
//! - [`report`] has the table. Times are measured, never judged: the test fails if an answer is wrong or lost, if
//!   sessions, memory or files are left over, or if the cluster does not recover.

mod asks;
mod callers;
mod faults;
pub mod network;
mod nodes;
#[allow(dead_code, reason = "tests use more of it")]
#[path = "../../../crates/cli/tests/support/proxy.rs"]
mod proxy;
mod report;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use clap::Args;
use serde_json::Value;

use self::callers::Callers;
use self::faults::{Fault, KINDS, Kind};
use self::nodes::{Nodes, NodesSpec};
use self::report::{Footprint, Record, Report, ms};
use crate::bench::ModelFacts;
use crate::cluster::brigade;
use crate::failure::{Failure, Outcome};
use crate::http::Endpoint;
use crate::output::error;
use crate::processes::Processes;
use crate::random::Random;

/// Time between two faults, at least and at most, in milliseconds: as long as some dozens of tokens, so that faults
/// fall into all parts of answers.
const CALM_MS: (u64, u64) = (200, 1200);

/// Shortest time for which a fault is watched, so that what is noticed late is noticed by us.
const WATCH: Duration = Duration::from_millis(1500);

/// How long the cluster may take until all is well again: twice `--wait-for-capacity`.
const SETTLE_TIMEOUT: Duration = Duration::from_secs(60);

/// How often the status is looked at; a detection that no stream tells of is known to so much.
const POLL: Duration = Duration::from_millis(20);

/// How long sessions may take to end when nobody asks any more.
const IDLE_TIMEOUT: Duration = Duration::from_secs(5);

/// Faults after which the coordinator's memory is taken for usual.
const N_WARM: u32 = 5;

/// One of so many faults befalls any worker, the others one that has a stage.
const ONE_OF_ALL: u64 = 5;

/// Wrong or lost answers after which a test ends early: what is broken so much need not be measured.
const MAX_BAD_ANSWERS: u64 = 20;

/// `cargo xtask chaos`
#[derive(Debug, Args)]
pub struct ChaosArgs {
    /// How many faults
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub faults: u32,
    /// Draw everything from this number [default: the time]
    #[arg(long, value_name = "N")]
    pub seed: Option<u64>,
    /// How many nodes hold each stage's weights
    #[arg(long, value_name = "1|2", default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=2))]
    pub redundancy: u32,
    /// Let the nodes that stand by compute along
    #[arg(long)]
    pub shadow: bool,
    /// Which computed tokens later answers may use: exact or off, as for `brigade serve`; full would change bits
    #[arg(long, value_name = "WHICH", default_value = "exact", value_parser = ["exact", "off"])]
    pub prefix_cache: String,
    /// Answers that are streamed at once
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=64))]
    pub streams: u32,
    /// Workers with a stage; one more is a spare
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=6))]
    pub workers: u32,
    /// Only these kinds of faults [default: all]
    #[arg(long, value_name = "KIND,..", value_delimiter = ',', value_parser = Kind::parse)]
    pub only: Vec<Kind>,
    /// The model [default: the embedded one with weights of eight bits, whose answers no batch changes]
    #[arg(long, value_name = "FILE")]
    pub model: Option<PathBuf>,
    /// Keep what the nodes log in this folder; set BRIGADE_LOG for more of it
    #[arg(long, value_name = "DIR")]
    pub logs: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// Breaks things, and prints what became of it.
pub fn run(args: &ChaosArgs) -> Outcome {
    let brigade = brigade()?;
    let processes = Processes::new()?;
    let report = measure(args, &brigade, &processes);
    if let Some(dir) = &args.logs {
        keep_logs(processes.dir(), dir)?;
    }
    let report = report?;
    report.print(args.json)?;
    report.failure().map_or(Ok(()), |why| Err(Failure::said(why)))
}

fn measure(args: &ChaosArgs, brigade: &Path, processes: &Processes) -> Outcome<Report> {
    let seed = args.seed.unwrap_or_else(seed_of_now);
    error(&format!("seed {seed}"));
    let mut random = Random::new(seed);
    let model = args.model.clone().unwrap_or_else(|| crate::root().join("models/abacus-q8_0.gguf"));
    let n_vocab = ModelFacts::of(&model)?.n_vocab;
    let asks = asks::answered(processes, brigade, &model, n_vocab, &mut random)?;
    let spec = NodesSpec {
        brigade,
        model: &model,
        workers: args.workers as usize,
        spares: 1,
        streams: args.streams,
        redundancy: args.redundancy,
        shadow: args.shadow,
        prefix_cache: &args.prefix_cache,
    };
    let nodes = Nodes::start(processes, &spec)?;
    let callers = Callers::start(args.streams, &nodes.endpoint, asks, &mut random)?;
    let (kinds, calm_since) = (kinds(args), args.shadow.then(Instant::now));
    let mut test = Test { processes, nodes, callers, random, kinds, calm_since };
    test.leave_out()?;
    test.begin()?;
    let (mut records, mut footprints) = (Vec::new(), Vec::new());
    for n in 1..=args.faults {
        let (fault, record) = test.break_one()?;
        error(&format!("{n}/{} {}", args.faults, record.words(&test.nodes.victims(&fault))));
        records.push(record);
        if n == args.faults.min(N_WARM) {
            footprints.extend(test.footprint());
        }
    }
    let answers = test.callers.finish()?;
    let sessions_left = sessions_left(&test.nodes.endpoint)?;
    footprints.extend(test.footprint());
    Ok(Report { seed, redundancy: args.redundancy, shadow: args.shadow, records, answers, footprints, sessions_left })
}

/// The kinds of faults that were asked for.
fn kinds(args: &ChaosArgs) -> Vec<(Kind, u64)> {
    KINDS.into_iter().filter(|(kind, _)| args.only.is_empty() || args.only.contains(kind)).collect()
}

/// A cluster under load that is being broken.
struct Test<'a> {
    processes: &'a Processes,
    nodes: Nodes<'a>,
    callers: Callers,
    random: Random,
    kinds: Vec<(Kind, u64)>,
    /// When the last fault was over, where some nodes compute along.
    calm_since: Option<Instant>,
}

impl Test<'_> {
    /// Leaves out what cannot be done on this machine.
    fn leave_out(&mut self) -> Outcome {
        let nodes = &self.nodes;
        self.kinds.retain(|(kind, _)| match nodes.cannot(*kind) {
            None => true,
            Some(why) => {
                error(&format!("left out: {kind}, since {why}"));
                false
            }
        });
        if self.kinds.is_empty() { Err(Failure::said("no kind of fault is left")) } else { Ok(()) }
    }

    /// Waits until all nodes are there and every caller hears something.
    fn begin(&mut self) -> Outcome {
        let started = Instant::now();
        loop {
            let status = self.nodes.endpoint.status()?;
            if self.nodes.are_whole(&status) && self.callers.all_moved_since(started) {
                self.calm_since = self.calm_since.map(|_| Instant::now());
                return Ok(());
            }
            self.check(started, &status)?;
            std::thread::sleep(POLL);
        }
    }

    /// Waits until those who compute along do so for all answers: they do for those that begin when they are there.
    fn wait_for_shadows(&self) -> Outcome {
        let Some(since) = self.calm_since else { return Ok(()) };
        while !self.callers.all_asked_since(since) {
            self.check(since, &Value::Null)?;
            std::thread::sleep(POLL);
        }
        Ok(())
    }

    /// Breaks something, mends it, and waits until all is well again.
    fn break_one(&mut self) -> Outcome<(Fault, Record)> {
        self.wait_for_shadows()?;
        std::thread::sleep(Duration::from_millis(self.random.within(CALM_MS.0, CALM_MS.1)));
        let before = self.nodes.endpoint.status()?;
        let (serving, all) = (self.nodes.serving(&before), (0..self.nodes.n_workers()).collect::<Vec<_>>());
        let is_any = serving.is_empty() || self.random.within(0, ONE_OF_ALL) == 0;
        let candidates = if is_any { &all } else { &serving };
        let fault = Fault::draw(&mut self.random, &self.kinds, candidates, all.len());
        let hits_stage = fault.victims.iter().any(|victim| serving.contains(victim));
        self.callers.begin();
        let at = Instant::now();
        self.nodes.strike(&fault)?;
        let (mut shown, mut mended) = (None, None);
        let settled = loop {
            if mended.is_none() && at.elapsed() >= fault.lasts {
                self.nodes.mend(&fault)?;
                mended = Some(Instant::now());
            }
            let status = self.nodes.endpoint.status()?;
            let now = Instant::now();
            if self.nodes.shows(&status, &fault, &before["epoch"]) {
                shown.get_or_insert(now);
            }
            let is_whole = at.elapsed() >= WATCH && self.nodes.are_whole(&status);
            if is_whole && mended.is_some_and(|mended| self.callers.all_moved_since(mended)) {
                break now;
            }
            self.check(at, &status)?;
            std::thread::sleep(POLL);
        };
        self.calm_since = self.calm_since.map(|_| settled);
        let detected = self.callers.paused().into_iter().chain(shown).min().filter(|_| fault.is_noticed());
        let record = Record {
            kind: fault.kind,
            hits_stage,
            detected_ms: detected.map(|detected| ms(detected - at)),
            pause_ms: ms(self.callers.pause(at, settled)),
            settled_ms: ms(settled - at),
        };
        Ok((fault, record))
    }

    /// That there is still something to wait for, since `begin`.
    fn check(&self, begin: Instant, status: &Value) -> Outcome {
        if let Some(why) = self.processes.failed() {
            return Err(Failure::said(why));
        }
        let tally = self.callers.tally();
        if tally.wrong + tally.lost > MAX_BAD_ANSWERS {
            return Err(Failure::said(format!("{} answers were wrong and {} were lost", tally.wrong, tally.lost)));
        }
        if begin.elapsed() > SETTLE_TIMEOUT {
            return Err(Failure::said(format!("all is not well again after {SETTLE_TIMEOUT:?}: {status:#}")));
        }
        Ok(())
    }

    fn footprint(&self) -> Option<Footprint> {
        self.nodes.footprint().map(|(bytes, files)| Footprint { bytes, files })
    }
}

/// How many sessions are left once nobody asks any more and they had time to end.
fn sessions_left(endpoint: &Endpoint) -> Outcome<u64> {
    let deadline = Instant::now() + IDLE_TIMEOUT;
    loop {
        let status = endpoint.status()?;
        let left = ["running", "waiting"].iter().filter_map(|key| status[key].as_u64()).sum();
        if left == 0 || Instant::now() > deadline {
            return Ok(left);
        }
        std::thread::sleep(POLL);
    }
}

fn seed_of_now() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    since.map_or(0, |since| since.as_millis() as u64)
}

/// Copies what the nodes wrote to standard error.
fn keep_logs(from: &Path, to: &Path) -> Outcome {
    let failed = |error| Failure::Io { what: format!("logs in {}", to.display()), source: error };
    fs::create_dir_all(to).map_err(failed)?;
    for entry in fs::read_dir(from).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        if let Some(name) = path.file_name().filter(|_| path.extension().is_some_and(|kind| kind == "log")) {
            fs::copy(&path, to.join(name)).map_err(failed)?;
        }
    }
    Ok(())
}
