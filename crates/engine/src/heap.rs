//! What the C library keeps of freed memory, for llama.cpp and for this program alike.
//!
//! glibc has an arena for every few threads, and a block that is freed stays in the arena that it came from. It begins
//! by mapping large blocks by themselves, which go back when they are freed; but it takes each such free for a sign
//! that blocks of that size come and go, and from then on has all up to that size in arenas, up to 32 MiB. A node that
//! loads stages and gives them up would keep what they took. [`return_large_blocks`] fixes the limit.

/// Blocks of so many bytes are mapped by themselves: large enough that mapping one, about as long as clearing it, is
/// little beside what is done with it, and smaller than what weighs in memory: tensors, caches, buffers of graphs.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
const MAPPED_BYTES: core::ffi::c_int = 1 << 20;

/// Has large blocks go back to the system as soon as they are freed. To be called when a process starts, before it has
/// other threads; else nothing happens, and neither does it on systems whose C library keeps no such blocks.
pub fn return_large_blocks() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    glibc::map_large_blocks(MAPPED_BYTES);
}

#[cfg(all(target_os = "linux", target_env = "gnu"))]
mod glibc {
    use core::ffi::c_int;

    /// From malloc.h, where it is a part of the interface.
    const M_MMAP_THRESHOLD: c_int = -3;

    unsafe extern "C" {
        fn mallopt(param: c_int, value: c_int) -> c_int;
    }

    /// Fixes the limit from which blocks are mapped; whether that was done.
    pub(super) fn map_large_blocks(n_bytes: c_int) -> bool {
        if !is_alone() {
            return false;
        }
        // SAFETY: the declaration is that of malloc.h, and any two numbers may be passed. No thread may allocate
        // meanwhile, and there is no other.
        unsafe { mallopt(M_MMAP_THRESHOLD, n_bytes) == 1 }
    }

    /// Whether this process has one thread, as far as the system tells. More can come only from that one.
    fn is_alone() -> bool {
        std::fs::read_dir("/proc/self/task").is_ok_and(|tasks| tasks.count() == 1)
    }

    #[cfg(test)]
    mod tests {
        use super::*;

        #[test]
        fn nothing_is_changed_beside_other_threads() {
            let seen = std::thread::scope(|scope| scope.spawn(|| (is_alone(), map_large_blocks(1 << 20))).join());
            assert_eq!(seen.unwrap(), (false, false));
        }
    }
}
