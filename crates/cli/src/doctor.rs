//! `brigade doctor`: what makes nodes slow or keeps them out, and how to mend it.
//!
//! Whichever node it runs on, it asks the coordinator to have all nodes examined: over the endpoint that runs here, or
//! over a link as a member. Where neither is to be had it examines this machine alone. A check says `ok`, `warn` (it
//! works, but worse than it could) or `fail` (it does not work); any `fail` ends the verb with a non-zero exit code.

use std::fmt::Write;
use std::net::{TcpListener, UdpSocket};
use std::path::Path;

use brigade_net::Identity;
use brigade_node::doctor::{Subject, ask_coordinator, examine};
use brigade_node::serving::{Examination, Finding, NodeFindings, Severity};
use brigade_node::system;

use crate::args::{DoctorArgs, EndpointArgs};
use crate::endpoint::{Endpoint, EndpointError};
use crate::error::Failure;
use crate::{files, output};

/// What the coordinator is asked.
const PATH: &str = "/brigade/v1/doctor";

/// What nodes are called that take part in nothing.
const ALONE: &str = "this machine";

/// Runs every check and prints what it found.
pub fn run(args: &DoctorArgs) -> Result<(), Failure> {
    let mut nodes = match &args.endpoint.url {
        Some(url) => asked(&Endpoint::at(url, args.endpoint.api_key.clone())?)?.nodes,
        None => here(&args.endpoint)?,
    };
    for node in &mut nodes {
        node.findings.sort_by_key(|finding| std::cmp::Reverse(finding.severity));
    }
    nodes.sort_by_key(|node| std::cmp::Reverse(node.findings.first().map(|finding| finding.severity)));
    if args.json {
        output::json(&Examination { nodes: nodes.clone() })?;
    } else {
        output::text(&describe(&nodes, args.all))?;
    }
    let findings = || nodes.iter().flat_map(|node| &node.findings);
    match findings().filter(|finding| finding.severity == Severity::Fail).count() {
        0 => Ok(()),
        n => Err(Failure::run(format!("{n} of {} checks failed; mend what is marked FAIL", findings().count()))),
    }
}

/// What a coordinator says of all nodes.
fn asked(endpoint: &Endpoint) -> Result<Examination, Failure> {
    let reply = endpoint.get(PATH)?;
    let strange = |source| Failure::Endpoint(EndpointError::Strange { base: endpoint.base().to_owned(), source });
    serde_json::from_value(reply).map_err(strange)
}

/// This machine, and the cluster that it is part of.
fn here(args: &EndpointArgs) -> Result<Vec<NodeFindings>, Failure> {
    let state_dir = args.state.dir();
    let (state, identity) = state(&state_dir);
    let mut own = vec![state, loopback(), ipv6()];
    let mut nodes = cluster(args, &state_dir, &mut own);
    let id = identity.map(|identity| identity.node_id());
    match nodes.iter_mut().find(|node| Some(node.id) == id) {
        Some(node) => node.findings.extend(own),
        None => {
            own.extend(examine(&subject(&state_dir)));
            let id = id.unwrap_or(brigade_base::NodeId::from_bytes([0; 32]));
            nodes.push(NodeFindings { id, name: system::host_name(), role: ALONE.to_owned(), findings: own });
        }
    }
    Ok(nodes)
}

/// This machine as a node that is about to start with the usual settings.
fn subject(state_dir: &Path) -> Subject {
    Subject {
        state_dir: state_dir.to_owned(),
        model: None,
        threads: system::default_threads(),
        memory: None,
        listens_on: Vec::new(),
        peers: Vec::new(),
        has_stage: false,
    }
}

/// The nodes of the cluster that this machine coordinates or has joined; `own` hears how it is reached.
fn cluster(args: &EndpointArgs, state_dir: &Path, own: &mut Vec<Finding>) -> Vec<NodeFindings> {
    if let Ok(endpoint) = Endpoint::of(args) {
        return asked(&endpoint).map(|found| found.nodes).unwrap_or_else(|error| {
            let fix = "the process may have been killed: start `brigade serve` again";
            own.push(finding("endpoint", Severity::Fail, error.to_string(), fix));
            Vec::new()
        });
    }
    match ask_coordinator(state_dir) {
        None => own.push(ok("cluster", "this node runs no coordinator and has joined none")),
        Some(Err(error)) => {
            let fix = "see that `brigade serve` runs there and that its port is open in the firewall";
            own.push(finding("coordinator", Severity::Fail, error, fix));
        }
        Some(Ok(asked)) => {
            let ms = asked.took.as_secs_f64() * 1000.0;
            own.push(ok("coordinator", format!("reached and authenticated in {ms:.1} ms")));
            match asked.examination {
                Ok(found) => return found.nodes,
                Err(why) => own.push(finding("cluster", Severity::Warn, why, "run `brigade doctor` on each node")),
            }
        }
    }
    Vec::new()
}

fn finding(check: &str, severity: Severity, detail: impl Into<String>, fix: &str) -> Finding {
    Finding { check: check.to_owned(), severity, detail: detail.into(), cost: String::new(), fix: fix.to_owned() }
}

fn ok(check: &str, detail: impl Into<String>) -> Finding {
    finding(check, Severity::Ok, detail, "")
}

fn state(dir: &Path) -> (Finding, Option<Identity>) {
    let opened = files::make_state_dir(dir)
        .map_err(|error| error.to_string())
        .and_then(|()| Identity::load_or_create(dir).map_err(|error| error.to_string()));
    match opened {
        Ok(identity) => {
            (ok("state", format!("{}, node {}", dir.display(), identity.node_id().short())), Some(identity))
        }
        Err(error) => {
            let fix = "make the directory yours (chown, chmod 700), or name another with --state-dir";
            (finding("state", Severity::Fail, error, fix), None)
        }
    }
}

fn loopback() -> Finding {
    match TcpListener::bind("127.0.0.1:0") {
        Ok(_) => ok("loopback", "can listen"),
        Err(error) => {
            let fix = "bring the loopback interface up: ip link set lo up";
            finding("loopback", Severity::Fail, error.to_string(), fix)
        }
    }
}

fn ipv6() -> Finding {
    match UdpSocket::bind("[::1]:0") {
        Ok(_) => ok("IPv6", "there"),
        Err(_) => ok("IPv6", "not there; IPv4 is used"),
    }
}

/// All nodes as text, the worst first; what is well in a line for each node, unless `all` is wanted.
fn describe(nodes: &[NodeFindings], all: bool) -> String {
    let mut text = String::new();
    for node in nodes {
        // Writing to memory does not fail.
        let _ = writeln!(text, "{}, {}", node.name, node.role);
        let (well, unwell): (Vec<&Finding>, Vec<&Finding>) =
            node.findings.iter().partition(|finding| finding.severity == Severity::Ok && !all);
        for finding in unwell {
            let mark = match finding.severity {
                Severity::Ok => "ok  ",
                Severity::Warn => "warn",
                Severity::Fail => "FAIL",
            };
            let _ = writeln!(text, "  {mark}  {:<13} {}", finding.check, finding.detail);
            for (label, more) in [("costs", &finding.cost), ("fix", &finding.fix)] {
                if !more.is_empty() {
                    let _ = writeln!(text, "        {:<13} {label}: {more}", "");
                }
            }
        }
        let mut names: Vec<&str> = well.iter().map(|finding| finding.check.as_str()).collect();
        names.dedup();
        if !names.is_empty() {
            let _ = writeln!(text, "  ok    {}", names.join(", "));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nodes() -> Vec<NodeFindings> {
        let swap =
            Finding { cost: "time".to_owned(), ..finding("swap", Severity::Warn, "2 GiB in use", "close programs") };
        let findings = vec![swap, ok("memory", "much"), ok("link", "to b: fast"), ok("link", "to c: fast")];
        let id = brigade_base::NodeId::from_bytes([1; 32]);
        vec![NodeFindings { id, name: "a".to_owned(), role: "worker".to_owned(), findings }]
    }

    #[test]
    fn what_is_well_takes_one_line() {
        let expected = "a, worker\n  warn  swap          2 GiB in use\n\
                        \x20                     costs: time\n                      fix: close programs\n\
                        \x20 ok    memory, link\n";
        assert_eq!(describe(&nodes(), false), expected);
        let all = describe(&nodes(), true);
        assert!(all.ends_with("  ok    link          to b: fast\n  ok    link          to c: fast\n"), "{all}");
    }
}
