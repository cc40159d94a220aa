//! Links between nodes, as they were measured, and what each token pays for them.

use brigade_base::NodeId;
use brigade_plan::LinkProfile;
use brigade_protocol::measure::{Finding, LinkReport};

use super::cluster::Known;
use super::{ok, warn};
use crate::serving::NodeStatus;

/// Above this a link's round trip costs more than most layers: Wi-Fi, or another town.
const SLOW_RTT_S: f64 = 0.002;

/// A link that is slower than this, a quarter of gigabit Ethernet, makes prompts wait for it.
const SLOW_BYTES_PER_S: f64 = 30e6;

/// Round trips that waver by more than this, and by half of themselves, are not those of a cable.
const UNSTEADY_S: f64 = 0.001;

/// A frame behind a full queue that is kept short waits less: 1 MiB at gigabit takes 8 ms.
const LOADED_RTT_S: f64 = 0.02;

/// Directions of a cable differ by less; those of a cheap subscription by more.
const UNEVEN: f64 = 3.0;

/// Above this speed uneven directions are the machines' doing, and cost nothing.
const UNEVEN_BELOW_BYTES_PER_S: f64 = 100e6;

/// Tokens of the prompt that costs are told for.
const PROMPT_TOKENS: f64 = 512.0;

/// What heartbeats tell of a link that nobody measured.
pub(super) fn judge_heartbeat(node: &NodeStatus) -> Option<Finding> {
    let rtt_s = f64::from(node.rtt_ms) / 1000.0;
    let detail = format!("{} round trip of a heartbeat to the coordinator", ms(rtt_s));
    if rtt_s > SLOW_RTT_S {
        let cost = format!("about {} for each token and hop", ms(rtt_s / 2.0));
        return Some(warn("link", detail, cost, "use a cable instead of Wi-Fi"));
    }
    (rtt_s > 0.0).then(|| ok("link", detail))
}

impl Known {
    /// Whether frames go from one node to the other.
    fn is_hop(&self, from: NodeId, to: NodeId) -> bool {
        let stages = self.plan.as_ref().map(|plan| plan.stages.as_slice()).unwrap_or_default();
        let n = stages.len();
        n > 1 && (0..n).any(|k| stages[k].node == from && stages[(k + 1) % n].node == to)
    }

    /// What a link costs each token, in words.
    fn cost_of(&self, by: NodeId, report: &LinkReport) -> String {
        let of = |from, to, link: &LinkProfile| {
            let hop_s = link.seconds(self.model.row_bytes());
            self.is_hop(from, to).then_some(hop_s)
        };
        let there = of(by, report.peer, &report.there);
        let back = of(report.peer, by, &report.back);
        let hops_s: f64 = there.into_iter().chain(back).sum();
        if hops_s == 0.0 {
            return "nothing at present: no frames take this link".to_owned();
        }
        let token_s = self.prediction().map(|prediction| 1.0 / prediction.tokens_per_s);
        let share = token_s.map(|token_s| format!(", {:.0} % of its time", 100.0 * hops_s / token_s.max(hops_s)));
        format!("{} of each token{}", ms(hops_s), share.unwrap_or_default())
    }

    /// Judges a link as one of its nodes measured it.
    pub(super) fn judge_link(&self, by: NodeId, report: &LinkReport) -> Vec<Finding> {
        let LinkReport { there, back, jitter_s, loaded_rtt_s, .. } = *report;
        let rtt_s = there.latency_s + back.latency_s;
        let to = self.name(report.peer);
        let (slow, fast) = (there.bytes_per_s.min(back.bytes_per_s), there.bytes_per_s.max(back.bytes_per_s));
        let prompt_s = PROMPT_TOKENS * self.model.row_bytes() / slow.max(1.0);
        let cost = self.cost_of(by, report);
        let detail = format!("to {to}: {} round trip, {} there and {} back", ms(rtt_s), rate(there), rate(back));
        let mut findings = vec![if rtt_s > SLOW_RTT_S {
            warn("link", detail, cost.clone(), "use a cable instead of Wi-Fi; leave distant nodes out of the ring")
        } else if slow < SLOW_BYTES_PER_S {
            let cost = format!("{cost}; {} for each hop of a prompt of 512 tokens", ms(prompt_s));
            warn("link", detail, cost, "look at both cards, the cable and the switch: one of them is slow")
        } else {
            ok("link", detail)
        }];
        if jitter_s > UNSTEADY_S && jitter_s > rtt_s / 2.0 {
            let detail = format!("to {to}: one round trip of twenty takes {} longer than the others", ms(jitter_s));
            let fix = "a cable instead of Wi-Fi, power saving off on the card, and a core free for the network";
            findings.push(warn("jitter", detail, format!("up to {} of such a token", ms(jitter_s)), fix));
        }
        if loaded_rtt_s > LOADED_RTT_S + rtt_s {
            let detail = format!("to {to}: {} round trip while the link is full", ms(loaded_rtt_s));
            let cost = "tokens of others wait that long while a prompt or weights go over it";
            let fix = "a queue that is kept short: tc qdisc replace dev CARD root fq_codel (or cake on the router)";
            findings.push(warn("full link", detail, cost, fix));
        }
        if fast > UNEVEN * slow && slow < UNEVEN_BELOW_BYTES_PER_S {
            let detail = format!("to {to}: {} there, {} back", rate(there), rate(back));
            let cost = format!("{} for each hop of a prompt of 512 tokens in the slow direction", ms(prompt_s));
            let fix = "look at the card of the slow side (duplex, driver), or turn the ring around with --layers";
            findings.push(warn("uneven link", detail, cost, fix));
        }
        findings
    }
}

fn ms(seconds: f64) -> String {
    let ms = 1000.0 * seconds;
    if ms < 10.0 { format!("{ms:.2} ms") } else { format!("{ms:.0} ms") }
}

fn rate(link: LinkProfile) -> String {
    format!("{:.0} MB/s", link.bytes_per_s / 1e6)
}

#[cfg(test)]
mod tests {
    use super::super::cluster::tests::{FAST, check, known, status};
    use super::*;

    #[track_caller]
    fn check_link(alter: impl Fn(&mut LinkReport), expected: &[&str], words: &str) {
        let mut known = known([0.01, 0.01]);
        alter(&mut known.reports[0].1);
        let expected: Vec<(u8, &str)> = expected.iter().map(|check| (1, *check)).collect();
        check(&known, &status(), &[], &expected, words);
    }

    #[test]
    fn links_are_judged_by_what_they_cost() {
        check_link(|_| {}, &[], "to n9: 0.20 ms round trip, 117 MB/s there and 117 MB/s back");
        check_link(|l| l.jitter_s = 0.0009, &[], "");
        check_link(|l| l.loaded_rtt_s = 0.02, &[], "");
        let slow = LinkProfile { latency_s: 0.01, ..FAST };
        // 20.3 ms of the way beside 90 ms of computing.
        check_link(|l| (l.there, l.back) = (slow, slow), &["link"], "20 ms of each token, 22 % of its time");
        let thin = LinkProfile { bytes_per_s: 8e6, ..FAST };
        check_link(|l| (l.there, l.back) = (thin, thin), &["link"], "1049 ms for each hop of a prompt");
        check_link(|l| l.jitter_s = 0.008, &["jitter"], "takes 8.00 ms longer");
        check_link(|l| l.loaded_rtt_s = 0.5, &["full link"], "500 ms round trip while");
        let half = LinkProfile { bytes_per_s: 33e6, ..FAST };
        check_link(|l| l.back = half, &["uneven link"], "33 MB/s back");
        // Beyond what cables carry, uneven is only measured so.
        let memory = LinkProfile { bytes_per_s: 4e9, ..FAST };
        check_link(|l| (l.there, l.back) = (memory, FAST), &[], "");
    }

    #[test]
    fn a_link_that_no_frames_take_costs_nothing() {
        let mut known = known([0.01, 0.01]);
        known.reports[0].1.there.latency_s = 0.01;
        known.plan = None;
        check(&known, &status(), &[], &[(1, "link")], "no frames take this link");
    }

    #[test]
    fn a_link_that_nobody_measured_is_known_by_its_heartbeat() {
        let (mut known, mut status) = (known([0.01, 0.01]), status());
        known.reports.clear();
        check(&known, &status, &[], &[], "0.30 ms round trip of a heartbeat");
        status.nodes[0].rtt_ms = 5.0;
        check(&known, &status, &[], &[(1, "link")], "2.50 ms for each token");
    }
}
