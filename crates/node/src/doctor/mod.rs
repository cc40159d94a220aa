//! What makes a node slow or fragile, and what to do about it; see `brigade doctor`.
//!
//! - Each file looks at one part of the machine: it gathers facts, and a pure `judge` makes [`Finding`]s of them. Facts
//!   come from the files of [`Machine`], so that tests can make machines up.
//! - [`examine`] looks at the machine that it runs on, and blocks for about a second.
//! - `cluster.rs` and `links.rs` judge what only the coordinator knows: versions, who is worth its place, and links.
//! - `rounds.rs` asks all nodes of a cluster; `ask.rs` has a coordinator do that.
//!
//! Nothing here changes anything, but for a file in the state directory that is written and removed. What costs
//! something says how much, as measured; where nothing was measured it says so.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use brigade_base::ByteSize;
use brigade_protocol::measure::{Examined, Finding, MAX_FINDING_BYTES, MAX_FINDINGS, Severity};

pub use self::ask::{Asked, ask_coordinator};
pub(crate) use self::cluster::{Known, Note};
use self::disk::Disk;
use self::machine::Machine;
use self::memory::Memory;
use self::network::Network;
use self::power::Power;
use self::processor::Processor;
pub(crate) use self::rounds::{EXAMINE_WITHIN, Report, Rounds};
use crate::coordinator::CoordinatorOptions;
use crate::model::LocalModel;

mod ask;
mod build;
mod cluster;
mod disk;
mod links;
mod machine;
mod memory;
mod network;
mod power;
mod processor;
mod rounds;

/// How long counters are watched: at 100 ticks a second, in which processors count, a share is known to a twentieth.
const WINDOW: Duration = Duration::from_millis(200);

/// What is examined: a node, as far as checks depend on how it was started.
#[derive(Debug, Clone)]
pub struct Subject {
    /// Where its keys, membership and cache are.
    pub state_dir: PathBuf,
    /// Its own copy of the model, if it has one.
    pub model: Option<PathBuf>,
    /// Threads that compute.
    pub threads: u32,
    /// Memory that it gives; `None` if that is whatever is free.
    pub memory: Option<ByteSize>,
    /// Where its links listen, as `host:port`; empty if it does not run.
    pub listens_on: Vec<String>,
    /// Nodes that it has links with, as `host:port`. What is no IP address is not looked up.
    pub peers: Vec<String>,
    /// It has a stage in memory, so what is free now is what stays free.
    pub has_stage: bool,
}

impl Subject {
    /// A coordinator whose links listen at these addresses. Its peers change; they are filled in when it is examined.
    pub(crate) fn coordinator(options: &CoordinatorOptions, model: &LocalModel, listens_on: &[SocketAddr]) -> Self {
        Self {
            state_dir: options.state_dir.clone(),
            model: Some(model.file().path().to_owned()),
            threads: options.threads,
            memory: Some(options.memory),
            listens_on: listens_on.iter().map(ToString::to_string).collect(),
            peers: Vec::new(),
            has_stage: true,
        }
    }
}

/// Examines this machine. Blocks for about a second, most of it to watch counters and to read from the disk.
pub fn examine(subject: &Subject) -> Vec<Finding> {
    let machine = Machine::here();
    let (memory, processor, power) = watch(subject, &machine);
    let mut findings = memory.judge();
    findings.extend(processor.judge());
    findings.extend(build::judge(&build::unused_features(), cfg!(debug_assertions)));
    findings.extend(power.judge());
    findings.extend(Network::gather(&machine, subject).judge());
    findings.extend(Disk::gather(&machine, subject).judge());
    findings.push(build::open_files(crate::system::open_files_max()));
    if !cfg!(target_os = "linux") {
        let detail = "swapping, heat, power saving, NUMA and network cards are not looked at on this system";
        findings.push(ok("system", detail));
    }
    bounded(findings)
}

/// Examines this machine for another node that asks.
pub fn examined(subject: &Subject) -> Examined {
    let findings = examine(subject);
    Examined { findings, unix_ms: unix_ms() }
}

/// This node's clock, in milliseconds since 1970.
fn unix_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
}

/// Gathers what shows only over a while.
fn watch(subject: &Subject, machine: &Machine) -> (Memory, Processor, Power) {
    let begin = Instant::now();
    let swapped = memory::swapped_pages(machine);
    let ticks = processor::Ticks::read(machine);
    let throttled = power::throttle_count(machine);
    std::thread::sleep(WINDOW);
    let memory = Memory::gather(machine, subject, swapped, begin);
    let processor = Processor::gather(machine, subject, ticks);
    (memory, processor, Power::gather(machine, throttled))
}

/// What another node would refuse is cut off.
fn bounded(mut findings: Vec<Finding>) -> Vec<Finding> {
    findings.sort_by_key(|finding| std::cmp::Reverse(finding.severity));
    findings.truncate(MAX_FINDINGS);
    for finding in &mut findings {
        for text in [&mut finding.check, &mut finding.detail, &mut finding.cost, &mut finding.fix] {
            let is_end = |at: &usize| text.is_char_boundary(*at);
            let end = (0..=text.len().min(MAX_FINDING_BYTES / 4)).rev().find(is_end).unwrap_or(0);
            text.truncate(end);
        }
    }
    findings
}

/// All is well.
fn ok(check: &str, detail: impl Into<String>) -> Finding {
    found(Severity::Ok, check, detail.into(), String::new(), String::new())
}

/// It works, but worse than it could.
fn warn(check: &str, detail: impl Into<String>, cost: impl Into<String>, fix: impl Into<String>) -> Finding {
    found(Severity::Warn, check, detail.into(), cost.into(), fix.into())
}

/// It does not work.
fn fail(check: &str, detail: impl Into<String>, fix: impl Into<String>) -> Finding {
    found(Severity::Fail, check, detail.into(), String::new(), fix.into())
}

fn found(severity: Severity, check: &str, detail: String, cost: String, fix: String) -> Finding {
    Finding { check: check.to_owned(), severity, detail, cost, fix }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The findings that are not `ok`, as check and severity.
    pub(super) fn trouble(findings: &[Finding]) -> Vec<(&str, Severity)> {
        let bad = findings.iter().filter(|finding| finding.severity > Severity::Ok);
        bad.map(|finding| (finding.check.as_str(), finding.severity)).collect()
    }

    #[test]
    fn this_machine_can_be_examined() {
        let dir = tempfile::tempdir().unwrap();
        let subject = Subject {
            state_dir: dir.path().to_owned(),
            model: None,
            threads: 1,
            memory: None,
            listens_on: vec!["127.0.0.1:1".to_owned()],
            peers: vec!["127.0.0.1:2".to_owned()],
            has_stage: false,
        };
        let examined = examined(&subject);
        let names: Vec<&str> = examined.findings.iter().map(|finding| finding.check.as_str()).collect();
        for check in ["memory", "swap", "cores", "kernels", "open files", "disk"] {
            assert!(names.contains(&check), "{check} is missing in {names:?}");
        }
        assert!(examined.unix_ms > 1_600_000_000_000);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "nothing is left behind");
    }

    #[test]
    fn findings_fit_into_a_message() {
        let long = warn("x", "ä".repeat(MAX_FINDING_BYTES), "y".repeat(MAX_FINDING_BYTES), "");
        let mut findings = vec![long; MAX_FINDINGS + 5];
        findings.push(fail("bad", "", ""));
        let bounded = bounded(findings);
        assert_eq!((bounded.len(), bounded[0].check.as_str()), (MAX_FINDINGS, "bad"), "the worst stay");
        assert!(bounded.iter().all(|f| f.detail.len() + f.cost.len() <= MAX_FINDING_BYTES));
    }
}
