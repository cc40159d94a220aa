use super::*;

const COORDINATOR: NodeId = NodeId::from_bytes([99; 32]);

fn node(n: u8) -> NodeId {
    NodeId::from_bytes([n; 32])
}

fn offer(mib: u64) -> Offer {
    Offer {
        name: format!("{mib}m"),
        memory: ByteSize::mib(mib),
        kv_spill: ByteSize(0),
        threads: 1,
        addresses: vec![],
        software: String::new(),
    }
}

/// Nine layers of 100 MiB; the coordinator offers `mib`.
fn cluster(mib: u64, nodes_wanted: usize) -> Cluster {
    let model = ModelProfile {
        layer_bytes: vec![100 << 20; 9],
        kv_bytes_per_token: vec![16; 9],
        head_bytes: 1 << 20,
        cut_points: (1..9).collect(),
        n_embd: 8,
        n_heads: 2,
        n_ff: 16,
        n_vocab: 100,
    };
    let coordinator = NodeProfile { id: COORDINATOR, name: "c".into(), memory: ByteSize::mib(mib) };
    let demand = Demand { context: 256, parallel: 1, max_rows: 16, spread: nodes_wanted > 1, split: None };
    let settings = Settings { deployment: DeploymentId(1), coordinator, model, demand, nodes_wanted };
    Cluster::new(settings)
}

fn kinds(actions: &[Action]) -> Vec<&'static str> {
    actions
        .iter()
        .map(|action| match action {
            Action::Deploy { .. } => "deploy",
            Action::LoadTail { .. } => "load tail",
            Action::Join { .. } => "join",
            Action::StartRing { .. } => "start",
            Action::Ready { .. } => "ready",
            Action::StopRing { .. } => "stop",
            Action::Undeploy { .. } => "undeploy",
            Action::GiveUp { .. } => "give up",
        })
        .collect()
}

/// Brings a cluster of two workers and the coordinator to `Ready`.
fn ready(cluster: &mut Cluster, now: Instant) {
    cluster.handle(now, Input::Tick);
    cluster.handle(now, Input::Offer(node(1), offer(600)));
    cluster.handle(now, Input::Offer(node(2), offer(600)));
    make_ready(cluster, now, &[1, 2]);
}

fn make_ready(cluster: &mut Cluster, now: Instant, workers: &[u8]) {
    let epoch = cluster.epoch();
    cluster.handle(now, Input::Loaded(COORDINATOR, epoch, ByteSize(1)));
    for &n in workers {
        cluster.handle(now, Input::Loaded(node(n), epoch, ByteSize(1)));
    }
    for &n in workers {
        cluster.handle(now, Input::Joined(node(n), epoch));
    }
    let actions = cluster.handle(now, Input::WentAround(epoch));
    assert_eq!(kinds(&actions), ["ready"], "{:?}", cluster.phase());
}

#[test]
fn a_coordinator_that_holds_the_model_needs_nobody() {
    let now = Instant::now();
    let mut cluster = cluster(2000, 1);
    assert_eq!(kinds(&cluster.handle(now, Input::Tick)), ["load tail"]);
    let actions = cluster.handle(now, Input::Loaded(COORDINATOR, Epoch(1), ByteSize(1)));
    assert_eq!(actions, [Action::StartRing { epoch: Epoch(1), first: None, last: None, n_stages: 1 }]);
    assert_eq!(kinds(&cluster.handle(now, Input::WentAround(Epoch(1)))), ["ready"]);
}

#[test]
fn a_model_that_does_not_fit_waits_for_a_worker_and_says_how_much_is_missing() {
    let now = Instant::now();
    let mut cluster = cluster(600, 1);
    assert!(cluster.handle(now, Input::Tick).is_empty());
    let Phase::Waiting(why) = cluster.phase() else { panic!() };
    assert!(why.contains("missing"), "{why}");
    let actions = cluster.handle(now, Input::Offer(node(1), offer(900)));
    assert_eq!(kinds(&actions), ["deploy", "load tail"]);
}

#[test]
fn the_ring_is_closed_through_all_nodes() {
    let now = Instant::now();
    let mut cluster = cluster(600, 3);
    cluster.handle(now, Input::Tick);
    assert!(cluster.handle(now, Input::Offer(node(1), offer(600))).is_empty());
    assert_eq!(cluster.phase(), &Phase::Waiting("2 of 3 nodes are here".into()));
    let actions = cluster.handle(now, Input::Offer(node(2), offer(600)));
    let hops: Vec<_> = actions
        .iter()
        .filter_map(|a| match a {
            Action::Deploy { node, upstream, downstream, .. } => Some((*upstream, *node, *downstream)),
            _ => None,
        })
        .collect();
    assert_eq!(hops, [(COORDINATOR, node(1), node(2)), (node(1), node(2), COORDINATOR)]);
}

#[test]
fn losing_a_worker_places_the_model_on_what_is_left() {
    let now = Instant::now();
    let mut cluster = cluster(600, 3);
    ready(&mut cluster, now);
    let actions = cluster.handle(now, Input::Gone(node(1), "link closed".into()));
    assert_eq!(kinds(&actions), ["stop", "deploy", "load tail"]);
    assert_eq!(cluster.epoch(), Epoch(2));
    make_ready(&mut cluster, now, &[2]);
}

#[test]
fn losing_too_much_waits_and_frees_what_is_left() {
    let now = Instant::now();
    let mut cluster = cluster(400, 3);
    ready(&mut cluster, now);
    assert_eq!(kinds(&cluster.handle(now, Input::Gone(node(1), "x".into()))), ["stop", "undeploy"]);
    assert!(matches!(cluster.phase(), Phase::Waiting(_)));
    let actions = cluster.handle(now, Input::Offer(node(1), offer(600)));
    assert_eq!(kinds(&actions), ["deploy", "deploy", "load tail"]);
}

#[test]
fn a_broken_ring_waits_a_moment_for_the_news_of_who_is_gone() {
    let now = Instant::now();
    let mut cluster = cluster(600, 3);
    ready(&mut cluster, now);
    assert_eq!(kinds(&cluster.handle(now, Input::RingBroke(None, Epoch(1), "closed".into()))), ["stop"]);
    assert!(cluster.handle(now, Input::Tick).is_empty());
    let actions = cluster.handle(now, Input::Gone(node(2), "closed".into()));
    assert_eq!(kinds(&actions), ["deploy", "load tail"]);
    assert!(cluster.next_tick().is_none());
}

#[test]
fn a_broken_ring_without_a_loss_is_placed_again_with_all() {
    let now = Instant::now();
    let mut cluster = cluster(600, 3);
    ready(&mut cluster, now);
    cluster.handle(now, Input::RingBroke(None, Epoch(1), "closed".into()));
    let actions = cluster.handle(cluster.next_tick().unwrap(), Input::Tick);
    assert_eq!(kinds(&actions), ["deploy", "deploy", "load tail"]);
    make_ready(&mut cluster, now, &[1, 2]);
}

#[test]
fn a_worker_that_never_reaches_the_next_is_left_out_after_some_tries() {
    let now = Instant::now();
    let mut cluster = cluster(600, 3);
    ready(&mut cluster, now);
    let mut waits = Vec::new();
    loop {
        let epoch = cluster.epoch();
        cluster.handle(now, Input::Loaded(COORDINATOR, epoch, ByteSize(1)));
        for n in [1, 2] {
            cluster.handle(now, Input::Loaded(node(n), epoch, ByteSize(1)));
        }
        cluster.handle(now, Input::RingBroke(Some(node(1)), epoch, "no route".into()));
        let Some(until) = cluster.next_tick() else { break };
        waits.push((until - now).as_millis());
        cluster.handle(until, Input::Tick);
    }
    assert_eq!(waits, [300, 600, 1200, 2400]);
    let member = cluster.members().iter().find(|m| m.id == node(1)).unwrap();
    assert_eq!(member.stage, StageState::Failed("no route".into()));
    assert_eq!(cluster.plan().unwrap().stages.len(), 2);
}

#[test]
fn a_node_whose_stage_fails_is_left_out_until_it_comes_anew() {
    let now = Instant::now();
    let mut cluster = cluster(600, 3);
    ready(&mut cluster, now);
    let actions = cluster.handle(now, Input::StageFailed(node(1), Epoch(1), "no memory".into()));
    assert_eq!(kinds(&actions), ["stop", "deploy", "load tail"]);
    assert_eq!(cluster.plan().unwrap().stages.len(), 2);
    assert!(cluster.handle(now, Input::Offer(node(1), offer(600))).is_empty(), "the placement stands");
}

#[test]
fn nodes_that_were_left_out_get_another_chance_while_the_model_does_not_fit_without_them() {
    let now = Instant::now();
    let mut cluster = cluster(400, 3);
    ready(&mut cluster, now);
    let actions = cluster.handle(now, Input::StageFailed(node(1), Epoch(1), "disk full".into()));
    assert_eq!(kinds(&actions), ["stop", "undeploy"]);
    let Phase::Waiting(why) = cluster.phase() else { panic!() };
    assert!(why.contains("disk full"), "{why}");
    let until = cluster.next_tick().unwrap();
    assert_eq!(kinds(&cluster.handle(until, Input::Tick)), ["deploy", "deploy", "load tail"]);
}

#[test]
fn news_of_an_old_epoch_change_nothing() {
    let now = Instant::now();
    let mut cluster = cluster(600, 3);
    ready(&mut cluster, now);
    cluster.handle(now, Input::Gone(node(1), "x".into()));
    for input in [
        Input::Loaded(node(2), Epoch(1), ByteSize(1)),
        Input::Joined(node(2), Epoch(1)),
        Input::StageFailed(node(2), Epoch(1), "late".into()),
        Input::RingBroke(None, Epoch(1), "late".into()),
        Input::WentAround(Epoch(1)),
    ] {
        assert!(cluster.handle(now, input).is_empty());
    }
    assert_eq!(cluster.phase(), &Phase::Loading);
}

#[test]
fn the_coordinators_own_failure_is_final() {
    let now = Instant::now();
    let mut cluster = cluster(2000, 1);
    cluster.handle(now, Input::Tick);
    let actions = cluster.handle(now, Input::StageFailed(COORDINATOR, Epoch(1), "bad file".into()));
    assert_eq!(kinds(&actions), ["stop", "give up"]);
    assert!(cluster.handle(now, Input::Offer(node(1), offer(600))).is_empty());
}
