//! Memory: what is free, what is in swap, and how large its pages are.

use std::time::Instant;

use brigade_base::ByteSize;
use brigade_plan::HEADROOM_DIVISOR;
use brigade_protocol::measure::Finding;
use sysinfo::{MemoryRefreshKind, RefreshKind, System};

use super::machine::Machine;
use super::{Subject, ok, warn};

/// Below this a node without a stage holds no layer worth a hop.
const LITTLE_MEMORY: ByteSize = ByteSize::gib(1);

/// Swap that is used by what nobody has touched for days, on a machine that lacks nothing.
const USUAL_SWAP: ByteSize = ByteSize::mib(256);

/// Pages in a second that a machine swaps which does not lack memory: now and then one.
const USUAL_SWAPPING: f64 = 50.0;

/// What is known of a machine's memory.
#[derive(Debug, Clone)]
pub(super) struct Memory {
    total: ByteSize,
    free: ByteSize,
    used_swap: ByteSize,
    /// Pages in a second, in and out; `None` where the system does not count them.
    swapping: Option<f64>,
    /// Whether the kernel makes large pages of large blocks: `always`, `madvise` or `never`.
    huge_pages: Option<String>,
    given: Option<ByteSize>,
    has_stage: bool,
}

/// Pages that went to and came from swap since the system started.
pub(super) fn swapped_pages(machine: &Machine) -> Option<u64> {
    let counts = machine.text("proc/vmstat")?;
    let count = |name: &str| {
        let line = counts.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line?.parse::<u64>().ok()
    };
    Some(count("pswpin")? + count("pswpout")?)
}

impl Memory {
    /// Looks at memory as it is, and at what was swapped since `swapped` was counted.
    pub(super) fn gather(machine: &Machine, subject: &Subject, swapped: Option<u64>, since: Instant) -> Self {
        let system =
            System::new_with_specifics(RefreshKind::nothing().with_memory(MemoryRefreshKind::nothing().with_ram()));
        let total = system.cgroup_limits().map_or(system.total_memory(), |limits| limits.total_memory);
        let pages = swapped_pages(machine).zip(swapped).map(|(now, before)| now.saturating_sub(before));
        let choices = machine.text("sys/kernel/mm/transparent_hugepage/enabled");
        Self {
            total: ByteSize(total.min(system.total_memory())),
            free: crate::system::available_memory(),
            used_swap: crate::system::used_swap(),
            swapping: pages.map(|pages| pages as f64 / since.elapsed().as_secs_f64()),
            huge_pages: choices.and_then(|text| chosen(&text)),
            given: subject.memory,
            has_stage: subject.has_stage,
        }
    }

    /// What follows from that.
    pub(super) fn judge(&self) -> Vec<Finding> {
        let mut findings = vec![self.judge_room(), self.judge_swap()];
        findings.extend(self.huge_pages.as_deref().map(judge_huge_pages));
        findings
    }

    fn judge_room(&self) -> Finding {
        let Self { total, free, .. } = *self;
        let least = ByteSize(total.0 / HEADROOM_DIVISOR);
        if let Some(given) = self.given.filter(|given| *given > total) {
            let detail = format!("--memory gives {given}, but there are {total}");
            let cost = "a stage of that size would end up in swap, or have the system end the process";
            return warn("memory", detail, cost, format!("give at most {}", ByteSize(total.0 - least.0)));
        }
        if self.has_stage && free < least {
            let detail = format!("{free} of {total} are free with the stage loaded, less than a sixteenth");
            let cost = "one more program, and weights go to swap or the system ends the process";
            return warn("memory", detail, cost, "give less with --memory, or close programs");
        }
        if !self.has_stage && free < LITTLE_MEMORY {
            let cost = "what is free decides how many layers fit";
            return warn("memory", format!("{free} can be had"), cost, "close programs");
        }
        ok("memory", format!("{free} of {total} can be had"))
    }

    fn judge_swap(&self) -> Finding {
        let used = self.used_swap;
        let fix = "give less with --memory, or close programs";
        if let Some(pages) = self.swapping.filter(|pages| *pages > USUAL_SWAPPING) {
            let detail = format!("this machine swaps {pages:.0} pages a second; {used} are in use");
            let cost = "a page that a token needs comes from the disk, a thousand times slower than from memory";
            return warn("swap", detail, cost, fix);
        }
        if used > USUAL_SWAP {
            let cost = "nothing at this moment; if weights or KV cache are in it, the next token waits for the disk";
            return warn("swap", format!("{used} in use"), cost, fix);
        }
        ok("swap", format!("{used} in use"))
    }
}

fn judge_huge_pages(choice: &str) -> Finding {
    if choice == "never" {
        let cost = "not measured: weights are read through 512 times as many page table entries";
        let fix = "echo madvise | sudo tee /sys/kernel/mm/transparent_hugepage/enabled";
        return warn("huge pages", "never", cost, fix);
    }
    ok("huge pages", choice)
}

/// The choice that is made of those that a file lists: the one in brackets.
fn chosen(text: &str) -> Option<String> {
    let (_, rest) = text.split_once('[')?;
    Some(rest.split_once(']')?.0.to_owned())
}

#[cfg(test)]
mod tests {
    use brigade_protocol::measure::Severity;

    use super::super::tests::trouble;
    use super::*;

    fn good() -> Memory {
        Memory {
            total: ByteSize::gib(32),
            free: ByteSize::gib(20),
            used_swap: ByteSize(0),
            swapping: Some(0.0),
            huge_pages: Some("always".to_owned()),
            given: None,
            has_stage: false,
        }
    }

    #[track_caller]
    fn check(alter: impl Fn(&mut Memory), expected: &[&str]) {
        let mut memory = good();
        alter(&mut memory);
        let findings = memory.judge();
        let expected: Vec<(&str, Severity)> = expected.iter().map(|check| (*check, Severity::Warn)).collect();
        assert_eq!(trouble(&findings), expected, "{findings:?}");
        let explained = findings.iter().filter(|f| f.severity > Severity::Ok);
        assert!(explained.into_iter().all(|f| !f.cost.is_empty() && !f.fix.is_empty()), "{findings:?}");
    }

    #[test]
    fn memory_is_judged() {
        check(|_| {}, &[]);
        check(|m| m.free = ByteSize::mib(500), &["memory"]);
        // A stage that is loaded has taken what it needs.
        check(|m| (m.has_stage, m.free) = (true, ByteSize::gib(3)), &[]);
        check(|m| (m.has_stage, m.free) = (true, ByteSize::gib(1)), &["memory"]);
        check(|m| m.given = Some(ByteSize::gib(31)), &[]);
        check(|m| m.given = Some(ByteSize::gib(33)), &["memory"]);
        check(|m| m.used_swap = ByteSize::gib(1), &["swap"]);
        check(|m| m.swapping = Some(400.0), &["swap"]);
        check(|m| m.swapping = None, &[]);
        check(|m| m.huge_pages = Some("never".to_owned()), &["huge pages"]);
        check(|m| m.huge_pages = None, &[]);
    }

    #[test]
    fn counters_and_choices_are_read() {
        let dir = tempfile::tempdir().unwrap();
        let vmstat = "nr_free_pages 5\npswpin 7\npswpout 9\npswpin_zero 100\n";
        let machine = Machine::made_up(dir.path(), &[("proc/vmstat", vmstat)]);
        assert_eq!(swapped_pages(&machine), Some(16));
        assert_eq!(chosen("always [madvise] never").as_deref(), Some("madvise"));
        assert_eq!(chosen("always"), None);
    }
}
