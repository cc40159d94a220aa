//! Workers that give each other weights, over real links.

use brigade_protocol::weights::{Hub, HubFile, HubTensor, Sources, WeightBytes};

use self::server::Server;
use super::*;

#[allow(dead_code, reason = "a part of what it can do is needed")]
#[path = "../../../../store/tests/support/server.rs"]
mod server;

/// Where a worker had its weights from.
fn weights(node: &Node) -> WeightBytes {
    node.tell(ToWorker::Ping { nonce: 8 });
    let mut buf = Vec::new();
    loop {
        node.control.recv(&mut buf, Some(Instant::now() + PATIENCE)).unwrap();
        if let Ok(ToCoordinator::Pong { nonce: 8, weights, .. }) = ToCoordinator::decode(&buf) {
            return weights;
        }
    }
}

/// The nodes may ask each other for weights.
fn introduce(nodes: &[&Node]) {
    for node in nodes {
        let others = nodes.iter().filter(|other| other.it != node.it);
        node.tell(ToWorker::Fellows(others.clone().map(|other| other.it.node).collect()));
        let sources = Sources { peers: others.map(|other| other.it.clone()).collect(), hub: None };
        node.tell(ToWorker::Sources(Box::new(sources)));
        // It has heard of that once it answers the next question.
        node.tell(ToWorker::Examine);
        assert!(matches!(next(&*node.control), ToCoordinator::Examined(_)));
    }
}

fn serves_first(coordinator: &Coordinator) -> Vec<StageOrder> {
    vec![coordinator.order(0, serve(&coordinator.me, &coordinator.me))]
}

fn stage_bytes(coordinator: &Coordinator) -> u64 {
    let tensors = coordinator.file.catalog().tensors();
    serves_first(coordinator)[0].tensors.iter().map(|(idx, _)| tensors[*idx as usize].n_bytes).sum()
}

#[test]
fn weights_come_from_another_worker_while_the_coordinator_hangs() {
    let coordinator = Coordinator::new();
    let (whole, empty, third) = (coordinator.worker(), coordinator.worker_with(None), coordinator.worker_with(None));
    introduce(&[&whole, &empty, &third]);
    let n_bytes = stage_bytes(&coordinator);

    // The link to the coordinator is there, and nothing is answered.
    coordinator.assign(&empty, 1, serves_first(&coordinator));
    let _hangs = coordinator.link(Purpose::Weights);
    assert_eq!(empty.loaded(0), None);
    assert_eq!(weights(&empty), WeightBytes { workers: n_bytes, ..WeightBytes::default() });
    let served = weights(&whole).served;
    assert!(served >= n_bytes, "{served}");

    // From the cache of one and the copy of the other.
    drop(whole);
    coordinator.assign(&third, 1, serves_first(&coordinator));
    let _hangs_too = coordinator.link(Purpose::Weights);
    assert_eq!(third.loaded(0), None);
    assert_eq!(weights(&third).workers, n_bytes);
    assert!(weights(&empty).served >= n_bytes);
}

#[test]
fn weights_that_no_node_brings_come_straight_from_the_hub() {
    let coordinator = Coordinator::new();
    let node = coordinator.worker_with(None);
    let bytes = std::fs::read(coordinator.file.path()).unwrap();
    let server = Server::start(&[("m.gguf", &bytes)], |_| String::new());
    let url = format!("{}/web/m.gguf", server.url());
    let file = HubFile { url, n_bytes: bytes.len() as u64, etag: Some("\"first\"".into()) };
    let tensors = coordinator.file.catalog().tensors();
    let place = |(idx, hash): &(u32, Hash)| HubTensor { hash: *hash, file: 0, offset: tensors[*idx as usize].offset };
    let places = serves_first(&coordinator)[0].tensors.iter().map(place).collect();
    let hub = Hub { files: vec![file], tensors: places, at_once: false };
    node.tell(ToWorker::Sources(Box::new(Sources { peers: Vec::new(), hub: Some(hub) })));
    coordinator.assign(&node, 1, serves_first(&coordinator));
    let _hangs = coordinator.link(Purpose::Weights);
    assert_eq!(node.loaded(0), None);
    let n_bytes = stage_bytes(&coordinator);
    assert_eq!(weights(&node), WeightBytes { hub: n_bytes, ..WeightBytes::default() });
    assert_eq!(server.n_bytes_sent(), n_bytes, "each byte once");
    assert!(server.asked().iter().all(|asked| asked.token.is_none()));
}

#[test]
fn weights_are_given_to_fellows_alone() {
    let coordinator = Coordinator::new();
    let (node, fellow, stranger) = (coordinator.worker(), Identity::generate().unwrap(), Identity::generate().unwrap());
    node.tell(ToWorker::Fellows(vec![fellow.node_id()]));
    node.tell(ToWorker::Examine);
    assert!(matches!(next(&*node.control), ToCoordinator::Examined(_)));
    let ask = |by: &Identity| reach(by, node.it.node, &node.it.addresses, Purpose::Weights, None);
    let refused = ask(&stranger).unwrap_err().to_string();
    assert!(refused.contains("gets no weights"), "{refused}");
    // Two links for each, and no more.
    let links = [ask(&fellow).unwrap(), ask(&fellow).unwrap()];
    let deadline = Instant::now() + PATIENCE;
    while ask(&fellow).is_ok() {
        assert!(Instant::now() < deadline, "a third link is taken");
    }
    drop(links);
}
