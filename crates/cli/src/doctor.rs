//! `brigade doctor`: what makes this node slow or keeps it out, and how to mend it.
//!
//! A check says `ok`, `warn` (it works, but worse than it could) or `fail` (it does not work). Any `fail` ends the verb
//! with a non-zero exit code.

use std::net::{TcpListener, UdpSocket};
use std::path::Path;
use std::time::{Duration, Instant};

use brigade_base::ByteSize;
use brigade_net::Identity;
use serde::Serialize;
use serde_json::Value;

use crate::args::{DoctorArgs, EndpointArgs};
use crate::endpoint::Endpoint;
use crate::error::Failure;
use crate::{files, output};

/// Below this a node holds no layer worth a hop.
const LITTLE_MEMORY: ByteSize = ByteSize::gib(1);

/// Above this a link's round trip costs more than most layers: Wi-Fi, or another town.
const SLOW_LINK_MS: f64 = 2.0;

/// Files and sockets that a busy coordinator opens: one for each of 4096 clients, and 256 for links, weights and
/// itself.
const FILES_WANTED: u64 = 4096 + 256;

#[derive(Serialize, PartialEq, Eq, Clone, Copy)]
#[serde(rename_all = "lowercase")]
enum Verdict {
    Ok,
    Warn,
    Fail,
}

#[derive(Serialize)]
struct Check {
    what: &'static str,
    verdict: Verdict,
    found: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    fix: Option<String>,
}

fn ok(what: &'static str, found: impl Into<String>) -> Check {
    Check { what, verdict: Verdict::Ok, found: found.into(), fix: None }
}

fn warn(what: &'static str, found: impl Into<String>, fix: impl Into<String>) -> Check {
    Check { what, verdict: Verdict::Warn, found: found.into(), fix: Some(fix.into()) }
}

fn bad(what: &'static str, found: impl Into<String>, fix: impl Into<String>) -> Check {
    Check { what, verdict: Verdict::Fail, found: found.into(), fix: Some(fix.into()) }
}

/// Runs every check and prints what it found.
pub fn run(args: &DoctorArgs) -> Result<(), Failure> {
    let state_dir = args.state.dir();
    let mut checks = vec![state(&state_dir), memory(), swap(), cores(), kernels(), loopback(), ipv6(), open_files()];
    checks.push(disk_speed(&state_dir));
    checks.extend(cluster(args, &state_dir));
    if args.json {
        output::json(&checks)?;
    } else {
        for check in &checks {
            let mark = match check.verdict {
                Verdict::Ok => "ok  ",
                Verdict::Warn => "warn",
                Verdict::Fail => "FAIL",
            };
            output::line(format_args!("{mark}  {:<12} {}", check.what, check.found))?;
            if let Some(fix) = &check.fix {
                output::line(format_args!("                    {fix}"))?;
            }
        }
    }
    let failed = checks.iter().filter(|check| check.verdict == Verdict::Fail).count();
    match failed {
        0 => Ok(()),
        n => Err(Failure::run(format!("{n} of {} checks failed; mend what is marked FAIL", checks.len()))),
    }
}

fn state(dir: &Path) -> Check {
    let opened = files::make_state_dir(dir)
        .map_err(|error| error.to_string())
        .and_then(|()| Identity::load_or_create(dir).map_err(|error| error.to_string()));
    match opened {
        Ok(identity) => ok("state", format!("{}, node {}", dir.display(), identity.node_id().short())),
        Err(error) => {
            bad("state", error, "make the directory yours (chown, chmod 700), or name another with --state-dir")
        }
    }
}

fn memory() -> Check {
    let free = brigade_node::system::available_memory();
    if free < LITTLE_MEMORY {
        return warn(
            "memory",
            format!("{free} can be had"),
            "close programs; what is free decides how many layers fit",
        );
    }
    ok("memory", format!("{free} can be had"))
}

fn swap() -> Check {
    let used = brigade_node::system::used_swap();
    if used > ByteSize::mib(256) {
        let fix = "weights in swap make every token wait for the disk: give less with --memory, or close programs";
        return warn("swap", format!("{used} in use"), fix);
    }
    ok("swap", format!("{used} in use"))
}

fn cores() -> Check {
    let n = brigade_node::system::default_threads();
    match n {
        1 => warn("cores", "1", "with one core, links and computing take turns; expect a few percent less"),
        n => ok("cores", n.to_string()),
    }
}

/// Whether the kernels were built for this machine.
fn kernels() -> Check {
    #[cfg(target_arch = "x86_64")]
    {
        // A build for any machine has AVX2 all the same: llama.cpp turns it on by itself.
        if is_x86_feature_detected!("avx512f") && !cfg!(target_feature = "avx512f") {
            let found = "this processor has AVX-512, which this build does not use";
            return warn("kernels", found, "build on this machine (make build): measured up to 3x faster");
        }
    }
    ok("kernels", "built for this processor")
}

fn loopback() -> Check {
    match TcpListener::bind("127.0.0.1:0") {
        Ok(_) => ok("loopback", "can listen"),
        Err(error) => bad("loopback", error.to_string(), "bring the loopback interface up: ip link set lo up"),
    }
}

fn ipv6() -> Check {
    match UdpSocket::bind("[::1]:0") {
        Ok(_) => ok("IPv6", "there"),
        Err(_) => ok("IPv6", "not there; IPv4 is used"),
    }
}

fn open_files() -> Check {
    // The hard limit: `serve` and `join` raise theirs to it.
    match brigade_node::system::open_files_max() {
        Some(n) if n < FILES_WANTED => {
            let fix = "many clients at once may be turned away: raise the hard limit (ulimit -Hn 65536 as root)";
            warn("open files", format!("at most {n}"), fix)
        }
        Some(n) => ok("open files", format!("at most {n}")),
        None => ok("open files", "no limit"),
    }
}

/// How fast the cache's disk takes a few megabytes.
fn disk_speed(dir: &Path) -> Check {
    const BYTES: usize = 16 << 20;
    let path = dir.join("doctor.tmp");
    let begin = Instant::now();
    let written = std::fs::File::create(&path).and_then(|mut file| {
        std::io::Write::write_all(&mut file, &vec![0x5a; BYTES])?;
        file.sync_all()
    });
    let took = begin.elapsed();
    let _ = std::fs::remove_file(&path);
    match written {
        Err(error) => bad("disk", error.to_string(), "free space where the state directory is, or name another"),
        Ok(()) => {
            let speed = BYTES as f64 / 1e6 / took.as_secs_f64().max(1e-6);
            let found = format!("{speed:.0} MB/s written");
            if speed < 50.0 {
                return warn("disk", found, "weights load no faster than this; put --state-dir on a faster disk");
            }
            ok("disk", found)
        }
    }
}

/// The cluster that runs here, or that this node has joined.
fn cluster(args: &DoctorArgs, state_dir: &Path) -> Vec<Check> {
    let endpoint = EndpointArgs { state: args.state.clone(), url: None, api_key: None };
    if let Ok(endpoint) = Endpoint::of(&endpoint) {
        return coordinator(&endpoint);
    }
    match brigade_node::probe_coordinator(state_dir) {
        None => vec![ok("cluster", "this node runs no coordinator and has joined none")],
        Some(Ok(took)) => vec![link("coordinator", took)],
        Some(Err(error)) => {
            let fix = "see that `brigade serve` runs there and that its port is open in the firewall";
            vec![bad("coordinator", error, fix)]
        }
    }
}

fn link(what: &'static str, took: Duration) -> Check {
    let ms = took.as_secs_f64() * 1000.0;
    ok(what, format!("reached and authenticated in {ms:.1} ms"))
}

fn coordinator(endpoint: &Endpoint) -> Vec<Check> {
    let status = match endpoint.get("/brigade/v1/status") {
        Ok(status) => status,
        Err(error) => {
            let fix = "the process may have been killed: start `brigade serve` again";
            return vec![bad("endpoint", error.to_string(), fix)];
        }
    };
    let state = status.get("state").and_then(Value::as_str).unwrap_or("");
    let mut checks = vec![match state {
        "ready" => ok("model", "ready"),
        other => warn("model", other, "requests get 503 until it is ready"),
    }];
    for node in status.get("nodes").and_then(Value::as_array).into_iter().flatten() {
        let name = node.get("name").and_then(Value::as_str).unwrap_or("");
        let rtt = node.get("rtt_ms").and_then(Value::as_f64).unwrap_or(0.0);
        if rtt > SLOW_LINK_MS {
            let fix = "use a cable instead of Wi-Fi; each token pays this for each hop";
            checks.push(warn("link", format!("{name}: {rtt:.1} ms round trip"), fix));
        } else if rtt > 0.0 {
            checks.push(ok("link", format!("{name}: {rtt:.2} ms round trip")));
        }
        if let Some(why) = node.get("state").and_then(Value::as_str).and_then(|s| s.strip_prefix("failed: ")) {
            checks.push(bad("node", format!("{name}: {why}"), "mend it there and restart `brigade join`"));
        }
    }
    checks
}
