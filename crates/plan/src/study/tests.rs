use super::*;
use crate::{Curve, LinkProfile, Speed, SpeedSource};
use brigade_base::{ByteSize, NodeId};

const MIB: u64 = 1 << 20;

/// 16 layers of 100 MiB; a node of speed 1 takes 1 ms for each.
fn model() -> ModelProfile {
    ModelProfile {
        layer_bytes: vec![100 * MIB; 16],
        kv_bytes_per_token: vec![1024; 16],
        head_bytes: 100 * MIB,
        cut_points: (1..16).collect(),
        n_embd: 1024,
        n_heads: 8,
        n_ff: 4096,
        n_vocab: 1000,
        ..ModelProfile::default()
    }
}

fn node(name: &str, mib: u64, speed: f64) -> NodeProfile {
    let mut id = [0; 32];
    id[..name.len()].copy_from_slice(name.as_bytes());
    let s = 0.001 / speed;
    let speed = Speed {
        decode: Curve::new(vec![(1, s), (2, 1.1 * s), (8, 2.0 * s)]).unwrap(),
        chunk: Curve::new(vec![(2, 1.1 * s), (256, 16.0 * s)]).unwrap(),
        head: None,
        pass_s: 0.000_05,
        decode_context_s: 0.0,
        chunk_context_s: 0.0,
        load_bytes_per_s: 1e9,
        source: SpeedSource::Device,
    };
    NodeProfile { id: NodeId::from_bytes(id), name: name.to_owned(), memory: ByteSize::mib(mib), speed: Some(speed) }
}

fn demand() -> Demand {
    Demand { context: 1024, parallel: 4, max_rows: 260, ..Demand::default() }
}

fn links(nodes: &[NodeProfile], latency_s: f64) -> Links {
    let mut links = Links::default();
    nodes.iter().for_each(|node| links.set_port(node.id, LinkProfile { latency_s: latency_s / 2.0, bytes_per_s: 1e9 }));
    links
}

fn study_here(nodes: &[NodeProfile], latency_s: f64, demand: &Demand) -> Study {
    study(&model(), nodes, &links(nodes, latency_s), demand, Coordinator::Last).unwrap()
}

fn of(study: &Study, kind: AlternativeKind) -> &Alternative {
    study.alternatives.iter().find(|other| other.kind == kind).unwrap_or_else(|| panic!("no {kind:?}: {study:#?}"))
}

fn says(study: &Study, words: &[&str]) {
    let found = study.advice.iter().any(|line| words.iter().all(|word| line.contains(word)));
    assert!(found, "nothing of {words:?} in {:#?}", study.advice);
}

#[test]
fn a_faster_machine_that_could_serve_alone_is_named() {
    let study = study_here(&[node("gpu-box", 8000, 4.0), node("laptop", 8000, 1.0)], 0.0005, &demand());
    says(&study, &["gpu-box alone", "x faster", "`brigade serve` on gpu-box"]);
    let alone = of(&study, AlternativeKind::Alone);
    assert_eq!(alone.name, "gpu-box alone");
    assert!(alone.why_not.contains("would have to run there"), "{}", alone.why_not);
}

#[test]
fn a_link_that_carries_too_little_for_all_streams_is_warned_of() {
    // For one stream the split is nearly as fast as the box alone; the rows of eight take their time on the link.
    let nodes = [node("box", 8000, 1.0), node("laptop", 1200, 3.0)];
    let mut links = Links::default();
    links.set(nodes[0].id, nodes[1].id, LinkProfile { latency_s: 0.0, bytes_per_s: 1.2e6 });
    for optimize in [Optimize::Balanced, Optimize::Throughput] {
        let demand = Demand { parallel: 8, optimize, ..demand() };
        let study = study(&model(), &nodes, &links, &demand, Coordinator::Last).unwrap();
        assert_eq!(study.plan.stages.len(), 2);
        says(&study, &["box alone", "8 streams together are", "faster there than in this split", "`brigade serve`"]);
    }
}

#[test]
fn numbers_of_no_machine_are_studied_in_the_end() {
    let text = r#"
        [[node]]
        name = "odd"
        count = 3
        kind = "cpu"
        bandwidth_gb_s = 50
        tflops = 1e-309
        memory = "1500MiB"
        throttle = 1e-300
    "#;
    let scenario = crate::catalogue::Scenario::parse(text).unwrap();
    for optimize in [Optimize::Latency, Optimize::Throughput, Optimize::Balanced] {
        let demand = Demand { optimize, ..demand() };
        let nodes = scenario.profiles(&model());
        let study = study(&model(), &nodes, &scenario.links(), &demand, Coordinator::Anywhere).unwrap();
        assert!(study.plan.prediction.is_some_and(|prediction| prediction.tokens_per_s > 0.0));
    }
}

#[test]
fn copies_share_the_streams_and_are_left_to_a_balancer() {
    let nodes = [node("a", 8000, 1.0), node("b", 8000, 1.0)];
    let study = study_here(&nodes, 0.02, &Demand { parallel: 8, ..demand() });
    let copies = of(&study, AlternativeKind::Replicas);
    assert_eq!(copies.members.iter().map(|member| member.streams).collect::<Vec<_>>(), [4, 4]);
    assert!(!copies.is_possible && copies.why_not.contains("does not route"), "{}", copies.why_not);
    says(&study, &["a and b", "8 streams", "load balancer"]);

    let (all, alone) = (copies.forecast.unwrap(), study.plan.prediction.unwrap());
    assert!((all.tokens_per_s / alone.tokens_per_s - 1.0).abs() < 1e-9, "a lone stream gains nothing");
    assert!(all.streams_tokens_per_s > 1.2 * alone.streams_tokens_per_s);
}

#[test]
fn a_slow_copy_gets_no_stream_that_a_fast_one_serves_better() {
    let nodes = [node("slow", 8000, 0.05), node("fast", 8000, 1.0)];
    let study = study_here(&nodes, 0.0005, &demand());
    let copies = of(&study, AlternativeKind::Replicas);
    let dealt: Vec<_> = copies.members.iter().map(|member| (member.name.as_str(), member.streams)).collect();
    assert_eq!(dealt, [("fast", 4), ("slow", 0)]);
    assert!(!study.advice.iter().any(|line| line.contains("balancer")), "{:#?}", study.advice);
}

#[test]
fn what_memory_would_bring_is_said_where_only_memory_is_lacking() {
    let study = study_here(&[node("small", 1400, 1.0), node("tiny", 1200, 1.0)], 0.02, &demand());
    assert_eq!(study.plan.stages.len(), 2);
    says(&study, &["more memory", "alone"]);
    says(&study, &["Links take", "%"]);
    // As much as is written is enough.
    let line = study.advice.iter().find(|line| line.contains("more memory")).unwrap();
    let (more, rest) = line["With ".len()..].split_once(" more memory ").unwrap();
    let more: ByteSize = more.replace(' ', "").parse().unwrap();
    let (name, mib) = if rest.starts_with("small ") { ("small", 1400) } else { ("tiny", 1200) };
    let holds = |mib: u64| place::can_hold(&model(), &node(name, mib, 1.0), &demand());
    assert!(holds(mib + more.0.div_ceil(MIB)) && !holds(mib + more.0 / MIB - 1), "{line}");
    assert!(study.alternatives.iter().all(|other| other.kind != AlternativeKind::Alone));
}

#[test]
fn a_network_is_blamed_by_what_it_costs() {
    let nodes = [node("small", 1400, 1.0), node("tiny", 1200, 1.0)];
    says(&study_here(&nodes, 0.0005, &demand()), &["faster network", "at most"]);
    let free = study_here(&nodes, 0.0, &demand());
    assert!(free.advice.iter().all(|line| !line.contains("network")), "{:#?}", free.advice);
}

#[test]
fn tensor_groups_pay_two_sums_for_each_layer() {
    let nodes = [node("a", 1400, 1.0), node("b", 1200, 1.0)];
    let rate =
        |latency_s: f64| of(&study_here(&nodes, latency_s, &demand()), AlternativeKind::TensorGroup).forecast.unwrap();
    let (near, far) = (rate(0.0), rate(0.001));
    let added_s = 1.0 / far.tokens_per_s - 1.0 / near.tokens_per_s;
    assert!((added_s - 2.0 * 16.0 * 0.001).abs() < 1e-9, "{added_s}");
    let far = study_here(&nodes, 0.001, &demand());
    let group = of(&far, AlternativeKind::TensorGroup);
    assert!(!group.is_possible && group.why_not.contains("not executed") && group.why_not.contains("32 sums"));

    // Eight heads cannot be divided among three, nine can.
    let three = [node("a", 1400, 1.0), node("b", 1400, 1.0), node("c", 1400, 1.0)];
    for (n_heads, name) in [(8, "every layer split over c and a"), (9, "every layer split over c, a and b")] {
        let model = ModelProfile { n_heads, ..model() };
        let study = study(&model, &three, &links(&three, 0.0), &demand(), Coordinator::Last).unwrap();
        assert_eq!(of(&study, AlternativeKind::TensorGroup).name, name);
    }
}

#[test]
fn shares_by_memory_are_compared() {
    let study = study_here(&[node("big-slow", 3000, 0.25), node("small", 1400, 1.0)], 0.0005, &demand());
    let by_memory = of(&study, AlternativeKind::ByMemory);
    assert!(by_memory.stages.len() == 2 && by_memory.why_not.contains("slower"), "{by_memory:#?}");
}

#[test]
fn a_pinned_or_spread_plan_is_compared_with_the_free_one() {
    let nodes = [node("far", 8000, 1.0), node("here", 8000, 1.0)];
    says(&study_here(&nodes, 0.02, &Demand { spread: true, ..demand() }), &["Without --spread", "faster"]);
    let pinned = Demand { split: Some(vec![8, 8]), ..demand() };
    says(&study_here(&nodes, 0.02, &pinned), &["Without --layers", "faster"]);
}

#[test]
fn leaving_out_is_tried_for_those_who_can_be_missed() {
    let nodes = [node("a", 800, 1.0), node("b", 800, 1.0), node("c", 1400, 1.0)];
    let study = study_here(&nodes, 0.0005, &demand());
    let left: Vec<_> = study.alternatives.iter().filter(|other| other.kind == AlternativeKind::Without).collect();
    assert!(!left.is_empty(), "{:#?}", study.plan);
    assert!(left.iter().all(|other| other.name != "without c"), "the coordinator has the model");
    assert!(left.iter().all(|other| other.forecast.is_some()));
}

#[test]
fn unknown_speeds_are_asked_for() {
    let mut nodes = [node("a", 8000, 1.0), node("b", 8000, 1.0)];
    nodes.iter_mut().for_each(|node| node.speed = None);
    let study = study_here(&nodes, 0.0005, &demand());
    assert_eq!(study.plan.prediction, None);
    says(&study, &["a and b", "not known", "@DEVICE"]);
}

#[test]
fn a_running_deployment_is_told_only_what_matters() {
    let (model, demand) = (model(), demand());
    let told = |nodes: &[NodeProfile], latency_s: f64| {
        let links = links(nodes, latency_s);
        let plan = place(&model, nodes, &links, &demand).unwrap();
        advice(&model, nodes, &links, &demand, &plan)
    };
    let mut nodes = [node("gpu-box", 8000, 4.0), node("laptop", 8000, 1.0)];
    assert!(told(&nodes, 0.0005)[0].contains("gpu-box alone"));
    nodes[0].speed = None;
    assert!(told(&nodes, 0.0005).is_empty());
    assert!(told(&nodes[1..], 0.0).is_empty(), "alone there is nothing to gain");
}

#[test]
fn what_does_not_fit_is_an_error() {
    let nodes = [node("a", 100, 1.0)];
    let error = study(&model(), &nodes, &links(&nodes, 0.0), &demand(), Coordinator::Anywhere).unwrap_err();
    assert!(matches!(error, PlanError::DoesNotFit { .. }), "{error}");
}
