//! What the machine has, how it is, and what this process takes of it.

use std::fs;
use std::path::{Path, PathBuf};

use brigade_base::ByteSize;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use serde::{Deserialize, Serialize};
use sysinfo::{CpuRefreshKind, MemoryRefreshKind, ProcessRefreshKind, ProcessesToUpdate, RefreshKind, System};

/// Memory that can be had without swapping, within the limits of a container.
pub fn available_memory() -> ByteSize {
    let system =
        System::new_with_specifics(RefreshKind::nothing().with_memory(MemoryRefreshKind::nothing().with_ram()));
    let free = system.available_memory();
    ByteSize(system.cgroup_limits().map_or(free, |limits| free.min(limits.free_memory)))
}

/// Memory that the machine has, or its container may have.
pub(crate) fn total_memory() -> ByteSize {
    let system =
        System::new_with_specifics(RefreshKind::nothing().with_memory(MemoryRefreshKind::nothing().with_ram()));
    let all = system.total_memory();
    ByteSize(system.cgroup_limits().map_or(all, |limits| all.min(limits.total_memory)))
}

/// Resident memory of this process.
pub fn resident_memory() -> ByteSize {
    let Ok(pid) = sysinfo::get_current_pid() else { return ByteSize(0) };
    let mut system = System::new();
    system.refresh_processes_specifics(
        ProcessesToUpdate::Some(&[pid]),
        false,
        ProcessRefreshKind::nothing().with_memory().without_tasks(),
    );
    ByteSize(system.process(pid).map_or(0, sysinfo::Process::memory))
}

/// Swap that is in use on this machine.
pub fn used_swap() -> ByteSize {
    let memory = MemoryRefreshKind::nothing().with_swap();
    ByteSize(System::new_with_specifics(RefreshKind::nothing().with_memory(memory)).used_swap())
}

/// Threads that a node computes with unless told otherwise: one for each core that this process may use. Two threads
/// of one core share what computes, so they count once.
pub fn default_threads() -> u32 {
    let usable = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    System::physical_core_count().map_or(usable, |cores| usable.min(cores)).max(1) as u32
}

/// The processor.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cpu {
    /// As it calls itself; empty if it does not.
    pub name: String,
    /// Cores, where that is known.
    pub n_cores: Option<u32>,
    /// Threads that this process may run at once.
    pub n_threads: u32,
    /// What it can that matters for computing, by the system's names.
    pub features: Vec<String>,
}

/// Features of processors that llama.cpp has kernels for, as Linux names them.
const FEATURES: [&str; 20] = [
    "sse3",
    "ssse3",
    "sse4_2",
    "avx",
    "avx2",
    "avx_vnni",
    "fma",
    "f16c",
    "bmi2",
    "avx512f",
    "avx512_vnni",
    "avx512_vbmi",
    "avx512_bf16",
    "amx_int8",
    "amx_bf16",
    "asimd",
    "asimddp",
    "i8mm",
    "sve",
    "sme",
];

/// The processor of this machine.
pub fn cpu() -> Cpu {
    let system = System::new_with_specifics(RefreshKind::nothing().with_cpu(CpuRefreshKind::nothing()));
    Cpu {
        name: system.cpus().first().map_or("", sysinfo::Cpu::brand).trim().to_owned(),
        n_cores: System::physical_core_count().map(|n| n as u32),
        n_threads: std::thread::available_parallelism().map_or(1, std::num::NonZero::get) as u32,
        features: features(&fs::read_to_string("/proc/cpuinfo").unwrap_or_default()),
    }
}

/// The features that the first processor of `/proc/cpuinfo` has.
fn features(cpuinfo: &str) -> Vec<String> {
    let line = cpuinfo.lines().find(|line| line.starts_with("flags") || line.starts_with("Features"));
    let words: Vec<&str> = line.and_then(|line| line.split_once(':')).map_or("", |(_, all)| all).split(' ').collect();
    FEATURES.iter().filter(|feature| words.contains(feature)).map(|&feature| feature.to_owned()).collect()
}

/// How the machine is at this moment. What cannot be read is `None`.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Condition {
    /// Frequency of the first core in MHz.
    pub mhz: Option<u64>,
    /// The most that it may have.
    pub mhz_max: Option<u64>,
    /// How frequencies are chosen, for example `powersave`.
    pub governor: Option<String>,
    /// How often cores were slowed for heat since the machine was started, all cores together.
    pub thermal_throttles: Option<u64>,
    /// Whether it runs on a battery; `None` where there is none.
    pub on_battery: Option<bool>,
    /// How full the battery is.
    pub battery_percent: Option<u64>,
}

/// How this machine is.
pub fn condition() -> Condition {
    let cpus = Path::new("/sys/devices/system/cpu");
    let frequency = |name: &str| number(&cpus.join("cpu0/cpufreq").join(name)).map(|khz| khz / 1000);
    let (on_battery, battery_percent) = battery(Path::new("/sys/class/power_supply"));
    Condition {
        mhz: frequency("scaling_cur_freq").or_else(first_core_mhz),
        mhz_max: frequency("cpuinfo_max_freq"),
        governor: text(&cpus.join("cpu0/cpufreq/scaling_governor")),
        thermal_throttles: thermal_throttles(cpus),
        on_battery,
        battery_percent,
    }
}

fn first_core_mhz() -> Option<u64> {
    let kind = RefreshKind::nothing().with_cpu(CpuRefreshKind::nothing().with_frequency());
    let system = System::new_with_specifics(kind);
    system.cpus().first().map(sysinfo::Cpu::frequency).filter(|mhz| *mhz > 0)
}

/// How often cores were slowed for heat since the machine was started, by its directory of processors; `None` where
/// nobody counts.
pub(crate) fn thermal_throttles(cpus: &Path) -> Option<u64> {
    let counts = entries(cpus).into_iter().filter_map(|cpu| number(&cpu.join("thermal_throttle/core_throttle_count")));
    counts.reduce(u64::saturating_add)
}

/// Whether a battery empties, by the machine's directory of power supplies, and how full the first one is.
pub(crate) fn battery(supplies: &Path) -> (Option<bool>, Option<u64>) {
    let is_battery = |supply: &PathBuf| text(&supply.join("type")).as_deref() == Some("Battery");
    // Mice and keyboards have batteries too, and say so.
    let is_ours = |supply: &PathBuf| text(&supply.join("scope")).as_deref() != Some("Device");
    let ours: Vec<PathBuf> =
        entries(supplies).into_iter().filter(|supply| is_battery(supply) && is_ours(supply)).collect();
    let statuses = ours.iter().filter_map(|supply| text(&supply.join("status")));
    let empties = statuses.map(|status| status == "Discharging").reduce(|one, other| one || other);
    (empties, ours.first().and_then(|supply| number(&supply.join("capacity"))))
}

/// What is in a folder, in the order of names.
fn entries(dir: &Path) -> Vec<PathBuf> {
    let mut paths: Vec<PathBuf> =
        fs::read_dir(dir).into_iter().flatten().filter_map(|entry| Some(entry.ok()?.path())).collect();
    paths.sort();
    paths
}

fn text(path: &Path) -> Option<String> {
    fs::read_to_string(path).ok().map(|text| text.trim().to_owned()).filter(|text| !text.is_empty())
}

fn number(path: &Path) -> Option<u64> {
    text(path)?.parse().ok()
}

/// Processor time since the machine was started, in the system's ticks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CpuTime {
    /// Of all cores together, idle or not.
    all: u64,
    /// Of them, what was spent on computing.
    busy: u64,
    /// What this process has spent.
    own: u64,
}

impl CpuTime {
    /// Up to now; `None` where the system does not tell.
    pub fn now() -> Option<Self> {
        let (machine, own) = (fs::read_to_string("/proc/stat").ok()?, fs::read_to_string("/proc/self/stat").ok()?);
        Self::parse(&machine, &own)
    }

    /// From the files `stat` of the machine and of this process.
    fn parse(machine: &str, own: &str) -> Option<Self> {
        let ticks = machine_ticks(machine)?;
        let all = ticks.iter().sum();
        Some(Self { all, busy: all - ticks[3] - ticks[4], own: process_ticks(own)? })
    }

    /// Share of all cores' time since `before` that other processes took, 0 to 1.
    pub fn others_since(self, before: Self) -> f64 {
        let others = self.busy.saturating_sub(before.busy).saturating_sub(self.own.saturating_sub(before.own));
        others as f64 / self.all.saturating_sub(before.all).max(1) as f64
    }
}

/// What all processors together did, by the file `stat` of the machine: user, nice, system, idle, iowait, irq, softirq,
/// steal. What follows is counted in the first two already.
pub(crate) fn machine_ticks(stat: &str) -> Option<[u64; 8]> {
    let of_all = stat.lines().find_map(|line| line.strip_prefix("cpu "))?;
    let ticks: Vec<u64> = of_all.split_whitespace().map_while(|word| word.parse().ok()).collect();
    ticks.get(..8)?.try_into().ok()
}

/// What a process did for itself and in the system, by its file `stat`.
pub(crate) fn process_ticks(stat: &str) -> Option<u64> {
    // Behind the name, which may have spaces and brackets: the state, ten numbers, user and system time.
    let mut numbers = stat.rsplit_once(')')?.1.split_whitespace().skip(11).map_while(|n| n.parse::<u64>().ok());
    Some(numbers.next()? + numbers.next()?)
}

/// The machine's name for people.
pub fn host_name() -> String {
    let name = System::host_name().unwrap_or_else(|| "node".to_owned());
    name.chars().take(brigade_protocol::control::MAX_NAME).collect()
}

/// Most files and sockets that this process may have open once [`raise_open_files`] was called; `None` is no limit.
pub fn open_files_max() -> Option<u64> {
    getrlimit(Resource::Nofile).maximum
}

/// Lets this process open as many files and sockets as the system grants: the soft limit is often 1024, fewer than a
/// busy endpoint has connections.
pub fn raise_open_files() {
    let maximum = open_files_max();
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }) {
        tracing::info!(%error, "the limit of open files stays as it is");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_limit_of_open_files_rises_to_its_most() {
        raise_open_files();
        assert_eq!(getrlimit(Resource::Nofile).current, open_files_max());
    }

    #[test]
    fn features_are_those_that_matter() {
        let x86 = "processor\t: 0\nflags\t\t: fpu sse3 avx avx2 f16c foo\nprocessor\t: 1\nflags\t\t: amx_int8\n";
        assert_eq!(features(x86), ["sse3", "avx", "avx2", "f16c"]);
        assert_eq!(features("Features\t: fp asimd i8mm"), ["asimd", "i8mm"]);
        assert!(features("").is_empty());
        assert!(cpu().n_threads >= 1);
    }

    #[test]
    fn what_others_compute_is_told_from_what_this_process_does() {
        let time = |machine: &str, own: &str| CpuTime::parse(machine, own).unwrap();
        let own = |user, system| format!("7 (a) b (c)) S 1 1 1 0 -1 4 1 0 0 0 {user} {system} 0 0 20 0");
        let before = time("cpu  10 0 10 100 0 0 0 0 0 0\ncpu0 1\n", &own(1, 1));
        let after = time("cpu  50 0 30 130 10 0 0 0 0 0\ncpu0 1\n", &own(21, 11));
        assert_eq!(after.others_since(before), 0.3);
        assert_eq!(before.others_since(after), 0.0);
        assert_eq!(CpuTime::parse("", ""), None);
        assert_eq!(CpuTime::now().is_some(), cfg!(target_os = "linux"));
    }

    #[test]
    fn batteries_and_heat_are_read_as_linux_tells_them() {
        let dir = tempfile::tempdir().unwrap();
        let write = |path: &str, text: &str| {
            let path = dir.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        assert_eq!(battery(dir.path()), (None, None));
        write("a-mouse/type", "Battery\n");
        write("a-mouse/scope", "Device\n");
        write("ac/type", "Mains\n");
        assert_eq!(battery(dir.path()), (None, None));
        for (file, text) in [("type", "Battery\n"), ("status", "Discharging\n"), ("capacity", "42\n")] {
            write(&format!("bat/{file}"), text);
        }
        assert_eq!(battery(dir.path()), (Some(true), Some(42)));
        for (file, text) in [("a-full/type", "Battery\n"), ("a-full/status", "Full\n"), ("a-full/capacity", "99\n")] {
            write(file, text);
        }
        assert_eq!(battery(dir.path()), (Some(true), Some(99)), "one of two empties");
        assert_eq!(thermal_throttles(dir.path()), None);
        write("cpu0/thermal_throttle/core_throttle_count", "3\n");
        write("cpu1/thermal_throttle/core_throttle_count", "4\n");
        assert_eq!(thermal_throttles(dir.path()), Some(7));
    }

    #[test]
    fn a_process_has_memory_and_a_core() {
        assert!(resident_memory() > ByteSize::mib(1));
        assert!(available_memory() > ByteSize::mib(1));
        assert!(default_threads() >= 1);
    }
}
