//! What only the coordinator knows: who is slower than measured, who is worth its place, and whose versions, files and
//! clocks differ. What it knows of links is judged in `links.rs`.

use brigade_base::{Hash, NodeId};
use brigade_plan::{Demand, Links, ModelProfile, NodeProfile, Optimize, Plan, PlannedStage, Prediction, place};
use brigade_protocol::measure::{Finding, LinkReport};

use super::{fail, links, ok, warn};
use crate::serving::{ClusterStatus, NodeStatus};

/// Clocks that nobody sets apart differ by less, a message's way included.
const CLOCK_MS: f64 = 5_000.0;

/// Below this a message's way and a busy thread explain what seems to differ.
const SAME_CLOCK_MS: f64 = 100.0;

/// A node that takes so many times as long as measured is not what it was.
const SLOWED: f64 = 1.25;

/// A node may take so many times what it offers before that is told: what a process takes is predicted to a tenth.
const OVER_OFFER: f64 = 1.1;

/// By how much a placement must be faster to be called so: predictions are no better than that.
const CLEARLY_FASTER: f64 = 1.05;

/// Most workers of a placement that are left out in turn, the slowest: placing a model on many nodes takes a while.
const MAX_LEFT_OUT: usize = 8;

/// Shares of time that tell a node that holds the others up.
const BUSY: f64 = 0.9;
const IDLE: f64 = 0.5;

/// What a coordinator knows of its cluster beside its status.
#[derive(Debug, Clone)]
pub(crate) struct Known {
    /// The workers that were asked to examine themselves.
    pub(crate) asked: Vec<NodeId>,
    /// The model.
    pub(crate) model: ModelProfile,
    /// Hash of its header.
    pub(crate) header_hash: Hash,
    /// Who could be part of a placement, the coordinator last.
    pub(crate) nodes: Vec<NodeProfile>,
    /// What is known of their links.
    pub(crate) links: Links,
    /// What placements must be able to do.
    pub(crate) demand: Demand,
    /// The present one.
    pub(crate) plan: Option<Plan>,
    /// Links as they were measured, and by whom.
    pub(crate) reports: Vec<(NodeId, LinkReport)>,
    /// What nodes said of themselves.
    pub(crate) notes: Vec<Note>,
}

/// What a node said of itself.
#[derive(Debug, Clone)]
pub(crate) struct Note {
    /// The node.
    pub(crate) node: NodeId,
    /// Its name for people.
    pub(crate) name: String,
    /// Its version of this program.
    pub(crate) software: String,
    /// Hash of the header of its own copy of a model.
    pub(crate) own_copy: Option<Hash>,
    /// What it could not measure.
    pub(crate) trouble: Option<String>,
}

/// How far a node's clock is ahead, in milliseconds.
pub(super) type Clock = (NodeId, f64);

/// Judges a cluster; each finding is about a node.
pub(super) fn judge(known: &Known, status: &ClusterStatus, clocks: &[Clock]) -> Vec<(NodeId, Finding)> {
    let Some(coordinator) = known.nodes.last().map(|node| node.id) else { return Vec::new() };
    let mut findings = vec![(coordinator, judge_state(status))];
    let own_software = known.notes.iter().find(|note| note.node == coordinator).map(|note| note.software.as_str());
    for note in &known.notes {
        findings.extend(judge_note(note, known.header_hash, own_software).into_iter().map(|f| (note.node, f)));
    }
    for node in &status.nodes {
        findings.extend(judge_node(node, status).into_iter().map(|f| (node.id, f)));
        if !known.reports.iter().any(|(by, _)| *by == node.id) {
            findings.extend(links::judge_heartbeat(node).map(|f| (node.id, f)));
        }
    }
    for (by, report) in &known.reports {
        findings.extend(known.judge_link(*by, report).into_iter().map(|f| (*by, f)));
    }
    for (node, ahead_ms) in clocks {
        findings.push((*node, judge_clock(*ahead_ms)));
    }
    findings.extend(known.judge_worth());
    findings
}

fn judge_state(status: &ClusterStatus) -> Finding {
    match status.state.as_str() {
        "ready" => ok("model", format!("{} is ready", status.model)),
        state => warn("model", state, "requests wait or get 503 until it is ready", "see what is missing"),
    }
}

fn judge_note(note: &Note, header_hash: Hash, own_software: Option<&str>) -> Vec<Finding> {
    let mut findings = Vec::new();
    if own_software.is_some_and(|own| own != note.software) {
        let detail = format!("version {}, while the coordinator has {}", note.software, own_software.unwrap_or(""));
        let cost = "nothing while they understand each other; answers may differ in their last bits";
        findings.push(warn("version", detail, cost, "install the same version on all nodes"));
    }
    if note.own_copy.is_some_and(|own| own != header_hash) {
        let cost = "it cannot take over from the coordinator, and may have its weights from there";
        let fix = "give it the same file with --model, and the same adapters with --lora, or leave --model away";
        findings.push(warn("model file", "its own copy is of another model than the served one", cost, fix));
    }
    if let Some(trouble) = &note.trouble {
        let cost = "placements count on what is usual there";
        findings.push(warn("measuring", trouble, cost, fix_of_trouble(trouble)));
    }
    findings
}

/// What helps against what a node could not measure: of links it says so, all else is its own.
fn fix_of_trouble(trouble: &str) -> &'static str {
    if trouble.contains("link to node") {
        "see that both nodes' link ports are open to each other in their firewalls, then restart `brigade join` there"
    } else {
        "mend there what it says, then restart `brigade join`: it measures itself again"
    }
}

fn judge_node(node: &NodeStatus, status: &ClusterStatus) -> Vec<Finding> {
    let mut findings = Vec::new();
    if let Some(why) = node.state.strip_prefix("failed: ") {
        findings.push(fail("stage", why, "mend it there and restart `brigade join`"));
    }
    if let Some(pace) = node.pace.filter(|_| node.layers.is_some()) {
        findings.push(if pace > SLOWED {
            let detail = format!("takes {pace:.1} times as long as when it was measured");
            let cost = format!("{:.1} ms in each pass", f64::from(node.pass_ms) * (1.0 - 1.0 / pace));
            warn("speed", detail, cost, "see this node's heat, swap, power saving and other load")
        } else {
            ok("speed", format!("takes {pace:.2} times as long as measured"))
        });
    }
    findings.extend(judge_memory(node));
    findings.extend(judge_share(node, status));
    findings
}

/// Whether a node takes more memory than it offers.
fn judge_memory(node: &NodeStatus) -> Option<Finding> {
    let (offered, resident) = (node.memory_offered, node.memory_resident);
    if resident.0 as f64 <= OVER_OFFER * offered.0 as f64 {
        return None;
    }
    let detail = format!("takes {resident} of memory, but offers {offered}");
    let cost = "programs beside it may be swapped out, or the system ends the process";
    Some(warn("memory", detail, cost, "give more with --memory, or restart it so that it begins with little"))
}

/// Whether others wait for this node.
fn judge_share(node: &NodeStatus, status: &ClusterStatus) -> Option<Finding> {
    let others: Vec<f64> = status
        .nodes
        .iter()
        .filter(|other| other.layers.is_some() && other.id != node.id)
        .map(|other| f64::from(other.busy))
        .collect();
    let mean = others.iter().sum::<f64>() / others.len().max(1) as f64;
    if others.is_empty() || node.layers.is_none() || f64::from(node.busy) < BUSY || mean > IDLE {
        return None;
    }
    let percent = |share: f64| format!("{:.0} %", 100.0 * share);
    let detail =
        format!("computes {} of the time, the others {}: they wait for it", percent(node.busy.into()), percent(mean));
    let cost = format!("up to {} of what all nodes could do together", percent(1.0 - mean));
    let fix = "fewer layers there (--layers, or --optimize throughput), more threads, or a faster machine";
    Some(warn("bottleneck", detail, cost, fix))
}

fn judge_clock(ahead_ms: f64) -> Finding {
    let detail =
        format!("its clock is {:.1} s {}", ahead_ms.abs() / 1000.0, if ahead_ms > 0.0 { "ahead" } else { "behind" });
    if ahead_ms.abs() > CLOCK_MS {
        let cost = "logs and traces of nodes do not fit together, and tickets expire at other times after a takeover";
        return warn("clock", detail, cost, "let it be set by network time: sudo timedatectl set-ntp true");
    }
    if ahead_ms.abs() < SAME_CLOCK_MS {
        return ok("clock", format!("agrees with the coordinator's within {} ms", SAME_CLOCK_MS));
    }
    ok("clock", detail)
}

impl Known {
    pub(super) fn name(&self, node: NodeId) -> String {
        let noted = self.notes.iter().find(|note| note.node == node).map(|note| note.name.clone());
        noted.unwrap_or_else(|| node.short().to_string())
    }

    pub(super) fn prediction(&self) -> Option<&Prediction> {
        self.plan.as_ref()?.prediction.as_ref()
    }

    /// Whether the model would be faster without a worker, or without all.
    fn judge_worth(&self) -> Vec<(NodeId, Finding)> {
        let (Some(plan), Some(now)) = (&self.plan, self.prediction()) else { return Vec::new() };
        let Some((tail, workers)) = plan.stages.split_last() else { return Vec::new() };
        let gain = |out: &dyn Fn(NodeId) -> bool| {
            let nodes: Vec<NodeProfile> = self.nodes.iter().filter(|node| !out(node.id)).cloned().collect();
            let demand = Demand { split: None, ..self.demand.clone() };
            let without = place(&self.model, &nodes, &self.links, &demand).ok()?.prediction?;
            let lone = without.tokens_per_s / now.tokens_per_s;
            let streams = without.streams_tokens_per_s / now.streams_tokens_per_s;
            let gain = match self.demand.optimize {
                Optimize::Latency => lone,
                Optimize::Throughput => streams,
                Optimize::Balanced | Optimize::Memory => lone.min(streams),
            };
            (gain > CLEARLY_FASTER).then_some((without, gain))
        };
        let said = |without: &Prediction| {
            format!(
                "predicted {:.1} tokens/s of one stream and {:.1} of {}, instead of {:.1} and {:.1}",
                without.tokens_per_s,
                without.streams_tokens_per_s,
                without.streams,
                now.tokens_per_s,
                now.streams_tokens_per_s
            )
        };
        let mut findings = Vec::new();
        for worker in self.slowest(workers) {
            if let Some((without, gain)) = gain(&|id| id == worker) {
                let detail = format!("costs more than it brings: without it the model is {gain:.1} times as fast");
                let fix = "stop it with `brigade leave`, or let the placement leave it out: without --layers and \
                           --spread, and not with --optimize memory";
                findings.push((worker, warn("worth", detail, said(&without), fix)));
            }
        }
        if findings.is_empty() && workers.len() > 1 {
            let alone = gain(&|id| id != tail.node);
            findings.extend(alone.map(|(without, gain)| {
                let detail = format!("holds the model alone, and is {gain:.1} times as fast without the others");
                let fix = "leave --spread and --layers away; the others serve best as replicas of their own";
                (tail.node, warn("worth", detail, said(&without), fix))
            }));
        }
        findings
    }

    /// The nodes of some stages that take longest for a layer, the slowest first; none are slower than those of which
    /// nothing is known.
    fn slowest(&self, stages: &[PlannedStage]) -> Vec<NodeId> {
        let layer_s = |id: NodeId| {
            let speed = self.nodes.iter().find(|node| node.id == id).and_then(|node| node.speed.as_ref());
            speed.map_or(f64::INFINITY, |speed| speed.decode.at(1.0))
        };
        let mut nodes: Vec<NodeId> = stages.iter().map(|stage| stage.node).collect();
        nodes.sort_by(|a, b| layer_s(*b).total_cmp(&layer_s(*a)));
        nodes.truncate(MAX_LEFT_OUT);
        nodes
    }
}

#[cfg(test)]
pub(super) mod tests {
    use brigade_base::{ByteSize, LayerRange};
    use brigade_plan::{Curve, LinkProfile, Speed, SpeedSource};
    use brigade_protocol::measure::Severity;

    use super::*;
    use crate::handle::blank_status;
    use crate::serving::ModelCard;
    use crate::serving::WeightBytes;

    const MIB: u64 = 1 << 20;

    pub(in crate::doctor) fn id(n: u8) -> NodeId {
        NodeId::from_bytes([n; 32])
    }

    /// A node that takes so many seconds for a layer.
    fn node(n: u8, layer_s: f64) -> NodeProfile {
        let curve = |s: f64| Curve::new(vec![(1, s), (4, 2.0 * s)]).unwrap();
        let speed = Speed {
            decode: curve(layer_s),
            chunk: curve(layer_s),
            head: Some(curve(layer_s)),
            pass_s: 0.0,
            decode_context_s: 0.0,
            chunk_context_s: 0.0,
            load_bytes_per_s: 1e9,
            source: SpeedSource::Layers,
        };
        NodeProfile { id: id(n), name: format!("n{n}"), memory: ByteSize::gib(8), speed: Some(speed) }
    }

    fn note(n: u8) -> Note {
        Note { node: id(n), name: format!("n{n}"), software: "1".to_owned(), own_copy: None, trouble: None }
    }

    pub(in crate::doctor) const FAST: LinkProfile = LinkProfile { latency_s: 0.0001, bytes_per_s: 117e6 };

    fn report() -> LinkReport {
        LinkReport { peer: id(9), there: FAST, back: FAST, jitter_s: 0.0, loaded_rtt_s: 0.004 }
    }

    /// A worker 1 and a coordinator 9 that share eight layers.
    pub(in crate::doctor) fn known(layer_s: [f64; 2]) -> Known {
        ring(vec![node(1, layer_s[0]), node(9, layer_s[1])], vec![4, 4])
    }

    /// Nodes that have so many layers each, the first of them measured its link to the last.
    fn ring(nodes: Vec<NodeProfile>, split: Vec<u32>) -> Known {
        let n_layers: u32 = split.iter().sum();
        let model = ModelProfile {
            layer_bytes: vec![100 * MIB; n_layers as usize],
            kv_bytes_per_token: vec![1024; n_layers as usize],
            head_bytes: MIB,
            cut_points: (1..n_layers).collect(),
            n_embd: 4096,
            n_heads: 4,
            n_ff: 128,
            n_vocab: 1000,
            ..ModelProfile::default()
        };
        let links = Links::default();
        let demand =
            Demand { context: 1024, parallel: 4, max_rows: 64, split: Some(split.clone()), ..Demand::default() };
        let plan = place(&model, &nodes, &links, &demand).unwrap();
        assert!(plan.stages.iter().map(|stage| stage.layers.len()).eq(split) && plan.prediction.is_some());
        Known {
            asked: vec![id(1)],
            model,
            header_hash: Hash::from_bytes([1; 32]),
            nodes,
            links,
            demand,
            plan: Some(plan),
            reports: vec![(id(1), report())],
            notes: vec![note(1), note(9)],
        }
    }

    fn member(n: u8) -> NodeStatus {
        NodeStatus {
            id: id(n),
            name: format!("n{n}"),
            role: "worker".to_owned(),
            connected: true,
            address: String::new(),
            layers: LayerRange::new(0, 4).ok(),
            standby: Vec::new(),
            state: "ready".to_owned(),
            loaded: 1.0,
            memory_offered: ByteSize::gib(8),
            memory_stage: ByteSize(0),
            memory_resident: ByteSize(0),
            threads: 1,
            pass_ms: 32.0,
            busy: 0.95,
            bytes_per_token: 0,
            rtt_ms: 0.3,
            memory_predicted: ByteSize(0),
            speed: None,
            pace: Some(1.0),
            weights: WeightBytes::default(),
        }
    }

    pub(in crate::doctor) fn status() -> ClusterStatus {
        let card = ModelCard {
            name: "m".to_owned(),
            id: brigade_base::ModelId::from_bytes([0; 32]),
            created: 0,
            context: 1024,
            n_vocab: 1000,
            chat_template: None,
            bos_text: String::new(),
            eos_text: String::new(),
            purpose: crate::serving::Purpose::Generate,
            rank_template: None,
            n_values: 0,
            has_class_shares: false,
        };
        ClusterStatus { state: "ready".to_owned(), nodes: vec![member(1), member(9)], ..blank_status(&card) }
    }

    /// Findings that are not `ok` have these names, and say these words.
    #[track_caller]
    pub(in crate::doctor) fn check(
        known: &Known,
        status: &ClusterStatus,
        clocks: &[Clock],
        expected: &[(u8, &str)],
        words: &str,
    ) {
        let findings = judge(known, status, clocks);
        let bad = findings.iter().filter(|(_, finding)| finding.severity > Severity::Ok);
        let found: Vec<(NodeId, &str)> = bad.map(|(node, finding)| (*node, finding.check.as_str())).collect();
        let expected: Vec<(NodeId, &str)> = expected.iter().map(|(n, check)| (id(*n), *check)).collect();
        assert_eq!(found, expected, "{findings:#?}");
        assert!(format!("{findings:?}").contains(words), "{findings:#?}");
    }

    #[test]
    fn a_node_that_costs_more_than_it_brings_is_named() {
        let slow = known([0.1, 0.01]);
        check(&slow, &status(), &[], &[(1, "worth")], "without it the model is");
        let needed =
            Known { nodes: vec![node(1, 0.1), NodeProfile { memory: ByteSize::mib(600), ..node(9, 0.01) }], ..slow };
        check(&needed, &status(), &[], &[], "");
    }

    #[test]
    fn a_node_that_is_better_off_alone_is_named() {
        // Neither of the two is worth leaving out by itself, since the other's way around remains.
        let slow_link = LinkProfile { latency_s: 0.2, bytes_per_s: 1e6 };
        let mut known = ring(vec![node(1, 0.01), node(2, 0.01), node(9, 0.01)], vec![2, 2, 4]);
        for worker in [1, 2] {
            known.links.set(id(worker), id(9), slow_link);
            known.links.set(id(9), id(worker), slow_link);
        }
        known.plan = place(&known.model, &known.nodes, &known.links, &known.demand).ok();
        known.demand.spread = true;
        known.reports.clear();
        check(&known, &status(), &[], &[(9, "worth")], "times as fast without the others");
    }

    #[test]
    fn only_some_are_left_out_in_turn_and_the_slowest_are_among_them() {
        let mut nodes: Vec<NodeProfile> = (1..=12).map(|n| node(n, 0.001)).collect();
        nodes[10] = node(11, 0.5);
        nodes.push(node(99, 0.001));
        let known = ring(nodes, vec![1; 13]);
        let stages = &known.plan.as_ref().unwrap().stages;
        let looked_at = known.slowest(&stages[..12]);
        assert_eq!((looked_at.len(), looked_at[0]), (MAX_LEFT_OUT, id(11)));
        assert!(known.judge_worth().iter().any(|(node, finding)| *node == id(11) && finding.check == "worth"));
    }

    #[test]
    fn nodes_that_changed_or_hold_others_up_are_named() {
        let known = known([0.01, 0.01]);
        let with = |alter: &dyn Fn(&mut NodeStatus)| {
            let mut status = status();
            alter(&mut status.nodes[0]);
            status
        };
        check(&known, &with(&|n| n.pace = Some(1.6)), &[], &[(1, "speed")], "1.6 times as long");
        check(&known, &with(&|n| n.pace = Some(1.6)), &[], &[(1, "speed")], "12.0 ms in each pass");
        check(&known, &with(&|n| n.state = "failed: no memory".to_owned()), &[], &[(1, "stage")], "no memory");
        check(&known, &with(&|n| n.busy = 0.2), &[], &[(9, "bottleneck")], "up to 80 %");
        let takes = |mib| with(&|n| (n.memory_offered, n.memory_resident) = (ByteSize::mib(100), ByteSize::mib(mib)));
        check(&known, &takes(105), &[], &[], "");
        check(&known, &takes(212), &[], &[(1, "memory")], "takes 212.0 MiB of memory, but offers 100.0 MiB");
        let waits = ClusterStatus { state: "waiting: for memory".to_owned(), ..status() };
        check(&known, &waits, &[], &[(9, "model")], "for memory");
    }

    #[test]
    fn versions_files_and_clocks_that_differ_are_named() {
        let mut known = known([0.01, 0.01]);
        check(&known, &status(), &[(id(1), -300.0)], &[], "its clock is 0.3 s behind");
        check(&known, &status(), &[(id(1), 90_000.0)], &[(1, "clock")], "90.0 s ahead");
        known.notes[0].software = "2".to_owned();
        known.notes[0].own_copy = Some(Hash::from_bytes([2; 32]));
        known.notes[0].trouble = Some("n9 was not reached".to_owned());
        let expected = [(1, "version"), (1, "model file"), (1, "measuring")];
        check(&known, &status(), &[], &expected, "version 2, while the coordinator has 1");
        let fix = |trouble: &str| {
            let note = Note { trouble: Some(trouble.to_owned()), ..note(1) };
            judge_note(&note, Hash::from_bytes([1; 32]), None)[0].fix.clone()
        };
        assert!(fix("the link to node 0a was not measured: refused").contains("firewall"));
        let own = fix("measuring needs 2.0 GiB, but only 1.0 GiB may be used for it; free some memory");
        assert!(own.contains("measures itself again") && !own.contains("firewall"), "{own}");
        known.notes[0] = Note { own_copy: Some(known.header_hash), ..note(1) };
        check(&known, &status(), &[], &[], "");
    }
}
