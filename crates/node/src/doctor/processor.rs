//! Processors: who else uses them, how many this process may use, and which memory is near to which.

use brigade_protocol::measure::Finding;

use super::machine::{Machine, cpu_list};
use super::{Subject, ok, warn};
use crate::system::{machine_ticks, process_ticks};

/// Most processors that are told apart.
const MAX_CPUS: usize = 4096;

/// Share of this node's threads that other programs may take before it is worth a word: less than the counters' step.
const USUAL_LOAD: f64 = 0.1;

/// Share of its time that a virtual machine's host may take: what is lost to its own work.
const USUAL_STEAL: f64 = 0.03;

/// What processors have done, in ticks since the system started.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Ticks {
    /// Of all processors, idle ones too.
    all: u64,
    busy: u64,
    /// Taken by the host of a virtual machine.
    stolen: u64,
    /// Of `busy`, those of nodes.
    own: u64,
    n_cpus: u64,
}

impl Ticks {
    /// Reads them; `None` where the system does not count.
    pub(super) fn read(machine: &Machine) -> Option<Self> {
        let text = machine.text("proc/stat")?;
        let [user, nice, system, idle, iowait, irq, softirq, stolen] = machine_ticks(&text)?;
        let busy = user + nice + system + irq + softirq;
        let is_cpu = |line: &&str| line.starts_with("cpu") && !line.starts_with("cpu ");
        let n_cpus = text.lines().filter(is_cpu).count().max(1) as u64;
        Some(Self { all: busy + idle + iowait + stolen, busy, stolen, own: own_ticks(machine), n_cpus })
    }

    /// What was done since `before`, by others and by the host, in processors that were busy with nothing else.
    fn load_since(&self, before: &Self) -> Option<Load> {
        let since = |now: u64, before: u64| now.saturating_sub(before) as f64;
        let elapsed = since(self.all, before.all) / self.n_cpus as f64;
        if elapsed < 1.0 {
            return None;
        }
        let others = since(self.busy, before.busy) - since(self.own, before.own);
        Some(Load { others: others.max(0.0) / elapsed, stolen: since(self.stolen, before.stolen) / elapsed })
    }
}

/// Ticks of all processes of this program, which may be several nodes, and the process that asks.
fn own_ticks(machine: &Machine) -> u64 {
    let me = std::process::id().to_string();
    let is_pid = |name: &String| name.bytes().all(|byte| byte.is_ascii_digit());
    let ticks = machine.names("proc", "").into_iter().filter(is_pid).filter_map(|pid| {
        // The name in brackets may hold anything, brackets too.
        let stat = machine.text(format!("proc/{pid}/stat"))?;
        let (head, _) = stat.rsplit_once(") ")?;
        let is_own = head.ends_with("(brigade") || pid == me;
        is_own.then(|| process_ticks(&stat).unwrap_or(0))
    });
    ticks.sum()
}

/// Processors' worth of work.
#[derive(Debug, Clone, Copy)]
struct Load {
    /// Of other programs.
    others: f64,
    /// Of the host of this virtual machine.
    stolen: f64,
}

/// What is known of a machine's processors.
#[derive(Debug, Clone)]
pub(super) struct Processor {
    threads: u32,
    /// Cores that this process may use.
    cores: u32,
    /// Hardware threads that it may use.
    cpus: u32,
    /// Processors' worth of time that its container allows.
    quota: Option<f64>,
    load: Option<Load>,
    numa: Vec<NumaNode>,
}

/// Processors with memory of their own.
#[derive(Debug, Clone)]
struct NumaNode {
    id: String,
    /// Its processors that this process may use.
    cpus: usize,
    /// How much farther the farthest memory is than its own.
    farthest: f64,
}

impl Processor {
    /// Looks at processors as they are, and at what they did since `before`.
    pub(super) fn gather(machine: &Machine, subject: &Subject, before: Option<Ticks>) -> Self {
        let now = Ticks::read(machine);
        Self {
            threads: subject.threads,
            cores: crate::system::default_threads(),
            cpus: std::thread::available_parallelism().map_or(1, |n| n.get() as u32),
            quota: quota(machine),
            load: now.zip(before).and_then(|(now, before)| now.load_since(&before)),
            numa: numa(machine),
        }
    }

    /// What follows from that.
    pub(super) fn judge(&self) -> Vec<Finding> {
        let mut findings = vec![self.judge_threads()];
        findings.extend(self.quota.and_then(|quota| self.judge_quota(quota)));
        if let Some(load) = self.load {
            findings.push(self.judge_others(load.others));
            findings.extend(judge_steal(load.stolen / f64::from(self.cpus.max(1))));
        }
        findings.extend(self.judge_numa());
        findings
    }

    fn judge_threads(&self) -> Finding {
        let Self { threads, cores, cpus, .. } = *self;
        let detail = format!("computes with --threads {threads}; {cores} cores have {cpus} hardware threads");
        if threads > cpus {
            let cost = "threads wait for each other at every layer, so the pass takes as long as the last of them: \
                        often several times as long";
            return warn("cores", detail, cost, format!("--threads {cores}"));
        }
        if threads > cores {
            let cost = "not measured: two threads of one core share what computes, and rarely gain";
            return warn("cores", detail, cost, format!("--threads {cores}, the default"));
        }
        if cores == 1 {
            let cost = "links and computing take turns: a few percent";
            return warn("cores", detail, cost, "give the machine more cores, where it is a virtual one");
        }
        ok("cores", detail)
    }

    fn judge_quota(&self, quota: f64) -> Option<Finding> {
        if quota + 0.01 >= f64::from(self.threads) {
            return None;
        }
        let detail = format!("the container allows {quota:.1} processors, and {} threads compute", self.threads);
        let cost = format!(
            "threads stand still for {:.0} % of each period once its time is used up",
            100.0 * (1.0 - quota / f64::from(self.threads))
        );
        let fix = format!("--threads {}, or a higher limit (--cpus, CPUQuota=)", quota.floor().max(1.0));
        Some(warn("CPU quota", detail, cost, fix))
    }

    fn judge_others(&self, others: f64) -> Finding {
        let room = f64::from(self.cpus) - f64::from(self.threads);
        let taken = (others - room).max(0.0) / f64::from(self.threads.max(1));
        let detail = format!("other programs keep {others:.1} of {} processors busy", self.cpus);
        if taken > USUAL_LOAD {
            let cost = format!("up to {:.0} % of this node's time at this moment", 100.0 * taken.min(1.0));
            return warn("other load", detail, cost, "end them, or leave them a core with fewer --threads");
        }
        ok("other load", detail)
    }

    /// A stage's weights lie where its threads first touched them, and threads move; nothing is pinned.
    fn judge_numa(&self) -> Option<Finding> {
        let nodes: Vec<&NumaNode> = self.numa.iter().filter(|node| node.cpus > 0).collect();
        let farthest = nodes.iter().map(|node| node.farthest).fold(1.0, f64::max);
        if nodes.len() < 2 {
            return (self.numa.len() > 1).then(|| ok("NUMA", "this process is bound to one node's processors"));
        }
        let detail =
            format!("{} nodes; memory of another one is {farthest:.1} times as far, and threads use any", nodes.len());
        let cost = format!("not measured: up to {farthest:.1} times as long for weights that lie elsewhere");
        let fits = nodes.iter().find(|node| node.cpus >= self.threads as usize);
        let fix = match fits {
            Some(node) => format!(
                "Brigade pins nothing itself: start it with `numactl --cpunodebind={0} --membind={0}` if the stage \
                 fits there, and a second node beside it for the rest",
                node.id
            ),
            None => "Brigade pins nothing itself: start it with `numactl --interleave=all`, or one node for each with \
                     `numactl --cpunodebind=N --membind=N`"
                .to_owned(),
        };
        Some(warn("NUMA", detail, cost, fix))
    }
}

fn judge_steal(share: f64) -> Option<Finding> {
    let detail = format!("the host of this virtual machine takes {:.0} % of its time", 100.0 * share);
    let cost = "threads wait for each other, so each pass is late by that share or more";
    let fix = "give the virtual machine processors of its own, or move it";
    (share > USUAL_STEAL).then(|| warn("stolen time", detail, cost, fix))
}

/// The least processor time that the control groups of this process allow, in processors.
fn quota(machine: &Machine) -> Option<f64> {
    let groups = machine.text("proc/self/cgroup")?;
    let mut group = groups.lines().find_map(|line| line.strip_prefix("0::/"))?;
    let mut least: Option<f64> = None;
    loop {
        let limit = machine.text(format!("sys/fs/cgroup/{group}/cpu.max")).and_then(|text| {
            let (quota, period) = text.split_once(' ')?;
            Some(quota.parse::<f64>().ok()? / period.parse::<f64>().ok()?)
        });
        least = least.into_iter().chain(limit).reduce(f64::min);
        if group.is_empty() {
            return least;
        }
        group = group.rsplit_once('/').map_or("", |(parent, _)| parent);
    }
}

fn numa(machine: &Machine) -> Vec<NumaNode> {
    let status = machine.text("proc/self/status").unwrap_or_default();
    let allowed = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"));
    let allowed = cpu_list(allowed.unwrap_or_default(), MAX_CPUS);
    let dir = "sys/devices/system/node";
    let is_node = |name: &String| name.len() > 4 && name[4..].bytes().all(|byte| byte.is_ascii_digit());
    let node = |name: String| {
        let cpus = cpu_list(&machine.text(format!("{dir}/{name}/cpulist"))?, MAX_CPUS);
        let distances = machine.text(format!("{dir}/{name}/distance")).unwrap_or_default();
        let distances: Vec<f64> = distances.split(' ').filter_map(|word| word.parse().ok()).collect();
        let near = distances.iter().copied().fold(f64::INFINITY, f64::min).max(1.0);
        let far = distances.iter().copied().fold(near, f64::max);
        let farthest = if distances.is_empty() { 1.0 } else { far / near };
        Some(NumaNode {
            id: name[4..].to_owned(),
            cpus: cpus.iter().filter(|cpu| allowed.contains(cpu)).count(),
            farthest,
        })
    };
    machine.names(dir, "node").into_iter().filter(is_node).filter_map(node).collect()
}

#[cfg(test)]
mod tests {
    use super::super::tests::trouble;
    use super::*;

    fn good() -> Processor {
        let load = Some(Load { others: 0.2, stolen: 0.0 });
        Processor { threads: 8, cores: 8, cpus: 16, quota: None, load, numa: Vec::new() }
    }

    fn two_nodes(cpus: usize) -> Vec<NumaNode> {
        ["0", "1"].map(|id| NumaNode { id: id.to_owned(), cpus, farthest: 2.1 }).to_vec()
    }

    #[track_caller]
    fn check(alter: impl Fn(&mut Processor), expected: &[&str], words: &str) {
        let mut processor = good();
        alter(&mut processor);
        let findings = processor.judge();
        let found: Vec<&str> = trouble(&findings).into_iter().map(|(check, _)| check).collect();
        assert_eq!(found, expected, "{findings:?}");
        assert!(format!("{findings:?}").contains(words), "{findings:?}");
    }

    #[test]
    fn processors_are_judged() {
        check(|_| {}, &[], "computes with --threads 8; 8 cores");
        check(|p| p.threads = 12, &["cores"], "--threads 8");
        check(|p| p.threads = 20, &["cores", "other load"], "several times");
        check(|p| (p.threads, p.cores, p.cpus) = (1, 1, 1), &["cores", "other load"], "take turns");
        check(|p| p.quota = Some(6.0), &["CPU quota"], "25 % of each period");
        check(|p| p.quota = Some(8.0), &[], "");
        check(|p| p.load = Some(Load { others: 12.0, stolen: 0.0 }), &["other load"], "up to 50 %");
        check(|p| p.load = Some(Load { others: 7.0, stolen: 0.0 }), &[], "keep 7.0 of 16");
        check(|p| p.load = Some(Load { others: 0.0, stolen: 1.6 }), &["stolen time"], "10 % of its time");
        check(|p| p.numa = two_nodes(8), &["NUMA"], "--cpunodebind=0 --membind=0");
        check(|p| p.numa = two_nodes(4), &["NUMA"], "--interleave=all");
        check(|p| p.numa = vec![two_nodes(8)[0].clone()], &[], "");
    }

    #[test]
    fn work_of_others_is_what_nodes_did_not_do() {
        let dir = tempfile::tempdir().unwrap();
        let read = |user: u64, own: u64| {
            let stat = format!("cpu  {user} 0 10 500 5 0 0 20 0 0\ncpu0 1 2 3\ncpu1 1 2 3\nintr 5\n");
            let process = format!("7 (brigade) S 1 1 1 0 -1 4194304 1 1 0 0 {own} 3 0 0 20 0");
            let other = "8 (a (brigade) b) S 1 1 1 0 -1 4194304 1 1 0 0 999 3 0 0 20 0";
            let files = [("proc/stat", &*stat), ("proc/7/stat", &*process), ("proc/8/stat", other)];
            Ticks::read(&Machine::made_up(dir.path(), &files)).unwrap()
        };
        let (before, after) = (read(100, 50), read(140, 60));
        assert_eq!((before.all, before.busy, before.own, before.n_cpus), (635, 110, 53, 2));
        // 40 ticks on two processors are 20 of time; 10 of them were a node's.
        let load = after.load_since(&before).unwrap();
        assert_eq!((load.others, load.stolen), (1.5, 0.0));
        assert!(after.load_since(&after).is_none());
    }

    #[test]
    fn limits_and_memory_nodes_are_read() {
        let dir = tempfile::tempdir().unwrap();
        let files = [
            ("proc/self/cgroup", "0::/a/b\n"),
            ("sys/fs/cgroup/a/b/cpu.max", "max 100000\n"),
            ("sys/fs/cgroup/a/cpu.max", "250000 100000\n"),
            ("proc/self/status", "Name:\tx\nCpus_allowed_list:\t0-5\n"),
            ("sys/devices/system/node/node0/cpulist", "0-3\n"),
            ("sys/devices/system/node/node0/distance", "10 21\n"),
            ("sys/devices/system/node/node1/cpulist", "4-7\n"),
            ("sys/devices/system/node/node1/distance", "21 10\n"),
            ("sys/devices/system/node/possible", "0-1\n"),
        ];
        let machine = Machine::made_up(dir.path(), &files);
        assert_eq!(quota(&machine), Some(2.5));
        let nodes = numa(&machine);
        assert_eq!(nodes.iter().map(|node| (node.cpus, node.farthest)).collect::<Vec<_>>(), [(4, 2.1), (2, 2.1)]);
    }
}
