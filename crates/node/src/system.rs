//! What the machine has and what this process takes of it.

use brigade_base::ByteSize;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use sysinfo::{MemoryRefreshKind, ProcessRefreshKind, ProcessesToUpdate, RefreshKind, System};

/// Memory that can be had without swapping, within the limits of a container.
pub fn available_memory() -> ByteSize {
    let system =
        System::new_with_specifics(RefreshKind::nothing().with_memory(MemoryRefreshKind::nothing().with_ram()));
    let free = system.available_memory();
    ByteSize(system.cgroup_limits().map_or(free, |limits| free.min(limits.free_memory)))
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
    fn a_process_has_memory_and_a_core() {
        assert!(resident_memory() > ByteSize::mib(1));
        assert!(available_memory() > ByteSize::mib(1));
        assert!(default_threads() >= 1);
    }
}
