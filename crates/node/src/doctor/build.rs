//! The program itself: whether it was built for this processor, and what the system lets it open.

use brigade_protocol::measure::Finding;

use super::{ok, warn};

/// Files and sockets that a busy coordinator opens: one for each of 4096 clients, and 256 for links, weights and
/// itself.
const FILES_WANTED: u64 = 4096 + 256;

/// What this processor can do that the program was not built to use.
pub(super) fn unused_features() -> Vec<&'static str> {
    #[cfg(target_arch = "x86_64")]
    {
        // A build for any machine has AVX2 all the same: llama.cpp turns it on by itself.
        let unused = |is_there: bool, is_used: bool, name| (is_there && !is_used).then_some(name);
        [
            unused(is_x86_feature_detected!("avx512f"), cfg!(target_feature = "avx512f"), "AVX-512"),
            unused(is_x86_feature_detected!("avx512vnni"), cfg!(target_feature = "avx512vnni"), "AVX-512 VNNI"),
            unused(is_x86_feature_detected!("avxvnni"), cfg!(target_feature = "avxvnni"), "AVX-VNNI"),
        ]
        .into_iter()
        .flatten()
        .collect()
    }
    #[cfg(target_arch = "aarch64")]
    {
        use std::arch::is_aarch64_feature_detected as has;
        let unused = |is_there: bool, is_used: bool, name| (is_there && !is_used).then_some(name);
        [
            unused(has!("dotprod"), cfg!(target_feature = "dotprod"), "dot products"),
            unused(has!("i8mm"), cfg!(target_feature = "i8mm"), "8-bit matrices"),
            unused(has!("sve"), cfg!(target_feature = "sve"), "SVE"),
        ]
        .into_iter()
        .flatten()
        .collect()
    }
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    Vec::new()
}

/// Whether the kernels were built for this machine.
pub(super) fn judge(unused: &[&str], is_debug: bool) -> Vec<Finding> {
    let mut findings = Vec::new();
    if is_debug {
        let cost = "not measured: checks that a release build leaves out, in everything but the kernels";
        findings.push(warn("build", "this is a debug build", cost, "build with --release (make build)"));
    }
    findings.push(if unused.is_empty() {
        ok("kernels", "built for this processor")
    } else {
        let detail = format!("this processor has {}, which this build does not use", unused.join(", "));
        let cost = "measured on one such machine: up to 3 times as long with AVX-512 unused";
        warn("kernels", detail, cost, "build on this machine (make build)")
    });
    findings
}

/// Judges the hard limit: `serve` and `join` raise theirs to it.
pub(super) fn open_files(most: Option<u64>) -> Finding {
    match most {
        Some(n) if n < FILES_WANTED => {
            let cost = "many clients at once are turned away";
            warn("open files", format!("at most {n}"), cost, "raise the hard limit (ulimit -Hn 65536 as root)")
        }
        Some(n) => ok("open files", format!("at most {n}")),
        None => ok("open files", "no limit"),
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::trouble;
    use super::*;

    #[test]
    fn builds_and_limits_are_judged() {
        assert!(trouble(&judge(&[], false)).is_empty());
        let findings = judge(&["AVX-512", "AVX-VNNI"], true);
        assert_eq!(trouble(&findings).len(), 2);
        assert!(findings[1].detail.contains("AVX-512, AVX-VNNI"), "{findings:?}");
        let limits = [None, Some(65_536), Some(1024)].map(open_files);
        assert_eq!(trouble(&limits).len(), 1);
    }
}
