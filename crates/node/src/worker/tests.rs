//! Workers over real links, with a coordinator that a test plays.

use std::path::Path;
use std::sync::mpsc::Receiver;
use std::time::Instant;

use brigade_base::{DeploymentId, Epoch, Hash, KvTypes, PassId};
use brigade_gguf::{Manifest, ModelFile, StageView};
use brigade_net::{Hello, Identity, Link, Listener, Purpose, Refusal, TcpLink};
use brigade_protocol::control::{
    Assign, HEARTBEAT_MS, Held, MAX_CONTROL_BYTES, ModelRef, Peer, Progress, StageOrder, StageRole, ToCoordinator,
    ToWorker,
};
use brigade_protocol::frame::{Attach, Feed, FrameHead, row_bytes};
use brigade_protocol::kind;
use brigade_protocol::measure::{Measure, Measured};

use super::*;
use crate::doorway::{Doorkeeper, Doorway, receive_attach};
use crate::images::Images;
use crate::reach::reach;
use crate::test_stage::{self, set};

mod sharing;

const PATIENCE: Duration = Duration::from_secs(60);
const DEPLOYMENT: DeploymentId = DeploymentId(5);

/// Lets everybody in.
struct Open(Sender<(Purpose, Arc<TcpLink>)>);

impl Doorkeeper for Open {
    fn admit(&self, _hello: &Hello, _peer: NodeId) -> Result<(), Refusal> {
        Ok(())
    }

    fn enter(&self, hello: Hello, link: Arc<TcpLink>) {
        let _ = self.0.send((hello.purpose, link));
    }
}

fn abacus() -> Arc<ModelFile> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/abacus-f16.gguf");
    Arc::new(ModelFile::open(path).unwrap())
}

/// What the test plays.
struct Coordinator {
    identity: Identity,
    me: Peer,
    came: Receiver<(Purpose, Arc<TcpLink>)>,
    file: Arc<ModelFile>,
    hashes: Vec<Hash>,
    n_embd: u32,
    _doorway: Doorway,
}

impl Coordinator {
    fn new() -> Self {
        let identity = Identity::generate().unwrap();
        let listener = Listener::bind(&identity, &[([127, 0, 0, 1], 0).into()]).unwrap();
        let me = Peer { node: identity.node_id(), addresses: vec![listener.local_addrs()[0].to_string()] };
        let (links, came) = channel();
        let doorway = Doorway::open(listener, Arc::new(Open(links)));
        let file = abacus();
        let hashes = Manifest::compute(file.catalog(), &*file, 1, &|_| {}).unwrap().tensors;
        let n_embd = test_stage::loaded(Images::off()).runner.stage().n_embd();
        Self { identity, me, came, file, hashes, n_embd, _doorway: doorway }
    }

    /// The next link that comes in.
    fn link(&self, purpose: Purpose) -> Arc<TcpLink> {
        let (came, link) = self.came.recv_timeout(PATIENCE).unwrap();
        assert_eq!(came, purpose);
        link
    }

    /// A worker that has joined, with a copy of the model.
    fn worker(&self) -> Node {
        self.worker_with(Some(Arc::clone(&self.file)))
    }

    /// A worker that has joined.
    fn worker_with(&self, own: Option<Arc<ModelFile>>) -> Node {
        let dir = tempfile::tempdir().unwrap();
        let (site, _roles) = Site::take(dir.path(), ([127, 0, 0, 1], 0).into(), |_, _, stored| stored).unwrap();
        let known = KnownCoordinator { node: self.me.node, addresses: self.me.addresses.clone() };
        let options = WorkerOptions {
            state_dir: dir.path().to_owned(),
            name: "worker".into(),
            ticket: None,
            listen: ([127, 0, 0, 1], 0).into(),
            memory: ByteSize(1 << 30),
            threads: 1,
            throttle: 1.0,
            cache_limit: ByteSize(1 << 30),
            kv_spill: ByteSize(0),
            drain_timeout: PATIENCE,
            wait_for_capacity: PATIENCE,
            direct_fetch: DirectFetch::Auto,
        };
        let own_copy = own.as_ref().map(|file| file.catalog().header_hash());
        let own =
            own.map(|file| OwnCopy { served_hash: file.catalog().header_hash(), file, hashes: self.hashes.clone() });
        let worker = Worker::start(&options, own, &site, known, None).unwrap();
        let control = self.link(Purpose::Control);
        control.set_frame_limit(MAX_CONTROL_BYTES);
        let ToCoordinator::Offer(offer) = next(&*control) else { panic!("no offer") };
        assert_eq!(offer.own_copy, own_copy);
        ping(&control);
        let it = Peer { node: site.identity.node_id(), addresses: offer.addresses };
        Node { worker, it, control, _site: site, _dir: dir }
    }

    /// A stage of two layers.
    fn order(&self, stage: u32, role: StageRole) -> StageOrder {
        let layers = LayerRange::new(2 * stage, 2 * stage + 2).unwrap();
        let view = StageView::new(self.file.catalog(), layers).unwrap();
        let tensors = view.tensors().iter().map(|&idx| (idx as u32, self.hashes[idx])).collect();
        StageOrder { stage, layers, tensors, role, keep_kv: true }
    }

    fn model(&self) -> ModelRef {
        ModelRef {
            name: "abacus".into(),
            header_hash: self.file.catalog().header_hash(),
            header: self.file.catalog().header_bytes(true),
            context: 64,
            sessions: test_stage::N_SLOTS,
            max_rows: test_stage::MAX_ROWS,
            kv: KvTypes::default(),
            adapters: None,
        }
    }

    fn assign(&self, to: &Node, epoch: u64, stages: Vec<StageOrder>) {
        let (epoch, model) = (Epoch(epoch), Some(self.model()));
        let assign = Assign { deployment: DEPLOYMENT, epoch, revision: 0, model, stages };
        to.tell(ToWorker::Assign(Box::new(assign)));
    }

    /// Asks a worker how fast it is, and how far from `peers`.
    fn measure(&self, node: &Node, peers: &[&Node]) {
        let peers = peers.iter().map(|peer| peer.it.clone()).collect();
        node.tell(ToWorker::Measure(Box::new(Measure { model: self.model(), peers, again: false })));
    }

    /// Has the ring of `first` to `last` joined; the links into it and out of it.
    fn join(&self, epoch: u64, first: &Node, last: &Node, n_stages: u32) -> Ring {
        let mut nodes = vec![first];
        nodes.extend((first.it != last.it).then_some(last));
        for node in &nodes {
            node.tell(ToWorker::Join { deployment: DEPLOYMENT, epoch: Epoch(epoch) });
        }
        for at in 0..n_stages as usize {
            let told = next(&*nodes[at.min(nodes.len() - 1)].control);
            assert!(matches!(told, ToCoordinator::Joined { .. }), "{told:?}");
        }
        let into = reach(&self.identity, first.it.node, &first.it.addresses, Purpose::Data, None).unwrap();
        into.send(kind::ATTACH, &[&attach(epoch, 0).encode()]).unwrap();
        let out = self.link(Purpose::Data);
        assert_eq!(receive_attach(&*out), Some(attach(epoch, n_stages)));
        out.set_frame_limit(brigade_net::MAX_FRAME);
        Ring { into, out, epoch, n_stages, n_embd: self.n_embd }
    }
}

fn attach(epoch: u64, stage: u32) -> Attach {
    Attach { deployment: DEPLOYMENT, epoch: Epoch(epoch), stage, feed: Feed::Passes }
}

fn serve(upstream: &Peer, downstream: &Peer) -> StageRole {
    StageRole::Serve { upstream: upstream.node, downstream: downstream.clone(), shadow: None, kv_from: None }
}

/// A worker, and the coordinator's side of it.
struct Node {
    worker: Worker,
    it: Peer,
    control: Arc<TcpLink>,
    _site: Site,
    _dir: tempfile::TempDir,
}

impl Node {
    fn tell(&self, message: ToWorker) {
        self.control.send(kind::CONTROL, &[&message.encode()]).unwrap();
    }

    /// What a stage is told to hold when it is loaded: the last pass, and the tokens of slot 0.
    fn loaded(&self, stage: u32) -> Option<(PassId, u32)> {
        match next(&*self.control) {
            ToCoordinator::Loaded { stage: which, held, .. } if which == stage => {
                held.map(|Held { applied, tokens }| (applied, tokens[0]))
            }
            other => panic!("{other:?}"),
        }
    }

    /// What it answers when it was asked how fast it is.
    fn measured(&self) -> Measured {
        match next(&*self.control) {
            ToCoordinator::Measured(measured) => *measured,
            other => panic!("{other:?}"),
        }
    }

    fn progress(&self) -> Progress {
        self.tell(ToWorker::Ping { nonce: 7 });
        let mut buf = Vec::new();
        loop {
            self.control.recv(&mut buf, Some(Instant::now() + PATIENCE)).unwrap();
            if let Ok(ToCoordinator::Pong { nonce: 7, progress, .. }) = ToCoordinator::decode(&buf) {
                return progress;
            }
        }
    }
}

/// Keeps a worker from taking this side for dead, until its link ends.
fn ping(control: &Arc<TcpLink>) {
    let control = Arc::downgrade(control);
    let ping = ToWorker::Ping { nonce: 1 }.encode();
    std::thread::spawn(move || {
        while control.upgrade().is_some_and(|link| link.send(kind::CONTROL, &[&ping]).is_ok()) {
            std::thread::sleep(Duration::from_millis(HEARTBEAT_MS));
        }
    });
}

/// The next message that is no news of loading.
fn next(control: &dyn Link) -> ToCoordinator {
    let (mut buf, deadline) = (Vec::new(), Instant::now() + PATIENCE);
    loop {
        control.recv(&mut buf, Some(deadline)).unwrap();
        match ToCoordinator::decode(&buf).unwrap() {
            ToCoordinator::Progress { .. } | ToCoordinator::Pong { .. } => {}
            message => return message,
        }
    }
}

/// The coordinator's links of a ring.
struct Ring {
    into: Arc<TcpLink>,
    out: Arc<TcpLink>,
    epoch: u64,
    n_stages: u32,
    n_embd: u32,
}

impl Ring {
    /// Sends rows of slot 0 around and returns what they have become.
    fn pass(&self, pass: u64, keep: u32, n_rows: u32) -> Vec<f32> {
        let (epoch, n_embd, sets) = (Epoch(self.epoch), self.n_embd, vec![set(0, keep, n_rows)]);
        let rows = test_stage::rows(&sets, n_embd);
        let head = FrameHead {
            deployment: DEPLOYMENT,
            epoch,
            pass: PassId(pass),
            follows: PassId(pass - 1),
            sets,
            n_embd,
            ..FrameHead::default()
        };
        let mut bytes = Vec::new();
        head.encode(&mut bytes);
        self.into.send(kind::FRAME, &[&bytes, row_bytes(&rows)]).unwrap();
        let (mut came, mut rows) = (FrameHead::default(), Vec::new());
        self.out.recv(&mut bytes, Some(Instant::now() + PATIENCE)).unwrap();
        came.decode(&bytes, &mut rows).unwrap();
        assert_eq!((came.pass, came.timings.len()), (head.pass, self.n_stages as usize));
        rows
    }
}

#[test]
fn a_worker_is_its_own_neighbour_keeps_its_slots_and_leaves() {
    let coordinator = Coordinator::new();
    let node = coordinator.worker();
    let orders = || {
        let roles = [serve(&coordinator.me, &node.it), serve(&node.it, &coordinator.me)];
        (0..).zip(roles).map(|(stage, role)| coordinator.order(stage, role)).collect()
    };
    coordinator.assign(&node, 1, orders());
    assert_eq!((node.loaded(0), node.loaded(1)), (None, None));
    let ring = coordinator.join(1, &node, &node, 2);
    ring.pass(1, 0, 5);
    let expected = ring.pass(2, 5, 1);

    coordinator.assign(&node, 2, orders());
    let (one, other) = (next(&*node.control), next(&*node.control));
    for told in [one, other] {
        let ToCoordinator::Loaded { held: Some(held), .. } = told else { panic!("{told:?}") };
        assert_eq!((held.applied, held.tokens[0]), (PassId(2), 6));
    }
    let ring = coordinator.join(2, &node, &node, 2);
    assert_eq!(ring.pass(3, 5, 1), expected, "the last token again");
    let progress = node.progress();
    assert!(progress.steps > 100 && progress.received == PassId(3), "{progress:?}");

    node.worker.stopper().stop();
    assert!(matches!(next(&*node.control), ToCoordinator::Leave { .. }));
    assert!(!node.worker.is_finished());
    node.tell(ToWorker::Released);
    assert!(matches!(next(&*node.control), ToCoordinator::Goodbye { .. }));
    node.worker.wait().unwrap();
}

#[test]
fn weights_that_a_lost_coordinator_owes_come_from_the_next_one() {
    let (lost, next) = (Coordinator::new(), Coordinator::new());
    let node = lost.worker_with(None);
    lost.assign(&node, 1, vec![lost.order(0, serve(&lost.me, &lost.me))]);
    // It hangs: the link is open, and nothing comes.
    let hangs = lost.link(Purpose::Weights);
    node.worker.follow(KnownCoordinator { node: next.me.node, addresses: next.me.addresses.clone() });
    let deadline = Instant::now() + PATIENCE;
    let weights = loop {
        let (purpose, link) = next.came.recv_timeout(deadline.saturating_duration_since(Instant::now())).unwrap();
        if purpose == Purpose::Weights {
            break link;
        }
    };
    assert_eq!(weights.peer(), node.it.node);
    let mut buf = Vec::new();
    assert_eq!(weights.recv(&mut buf, Some(deadline)).unwrap(), kind::HAVE);
    while hangs.recv(&mut buf, Some(deadline)).is_ok() {}
}

#[test]
fn who_leaves_hands_its_slots_over() {
    let coordinator = Coordinator::new();
    let (leaver, successor) = (coordinator.worker(), coordinator.worker());
    coordinator.assign(&leaver, 1, vec![coordinator.order(0, serve(&coordinator.me, &coordinator.me))]);
    assert_eq!(leaver.loaded(0), None);
    let ring = coordinator.join(1, &leaver, &leaver, 1);
    ring.pass(1, 0, 5);
    let expected = ring.pass(2, 5, 1);

    // The leaver hears of it first and has to knock again.
    let hand_over = StageRole::HandOver { to: successor.it.clone() };
    coordinator.assign(&leaver, 2, vec![coordinator.order(0, hand_over)]);
    let mut takes_over = serve(&coordinator.me, &coordinator.me);
    if let StageRole::Serve { kv_from, .. } = &mut takes_over {
        *kv_from = Some(leaver.it.node);
    }
    coordinator.assign(&successor, 2, vec![coordinator.order(0, takes_over)]);
    assert_eq!(successor.loaded(0), Some((PassId(2), 6)));
    let ring = coordinator.join(2, &successor, &successor, 1);
    assert_eq!(ring.pass(3, 5, 1), expected);
}

#[test]
fn a_standby_with_a_shadow_takes_over_with_the_same_tokens() {
    let coordinator = Coordinator::new();
    let (first, second, standby) = (coordinator.worker(), coordinator.worker(), coordinator.worker());
    let mut feeds = serve(&coordinator.me, &second.it);
    if let StageRole::Serve { shadow, .. } = &mut feeds {
        *shadow = Some(standby.it.clone());
    }
    let by = StageRole::Standby { upstream: Some(first.it.node) };
    coordinator.assign(&standby, 1, vec![coordinator.order(1, by)]);
    assert_eq!(standby.loaded(1), None);
    coordinator.assign(&first, 1, vec![coordinator.order(0, feeds)]);
    coordinator.assign(&second, 1, vec![coordinator.order(1, serve(&first.it, &coordinator.me))]);
    assert_eq!((first.loaded(0), second.loaded(1)), (None, None));
    let ring = coordinator.join(1, &first, &second, 2);
    // The shadow may join late; it has what begins since then.
    let deadline = Instant::now() + PATIENCE;
    let mut pass = 0;
    let before = standby.progress().steps;
    while standby.progress().steps == before {
        assert!(Instant::now() < deadline, "the shadow gets nothing");
        pass += 1;
        ring.pass(pass, 0, 5);
    }
    ring.pass(pass + 1, 0, 5);
    let expected = ring.pass(pass + 2, 5, 1);

    drop(second);
    coordinator.assign(&standby, 2, vec![coordinator.order(1, serve(&first.it, &coordinator.me))]);
    coordinator.assign(&first, 2, vec![coordinator.order(0, serve(&coordinator.me, &standby.it))]);
    let held = Some((PassId(pass + 2), 6));
    assert_eq!((first.loaded(0), standby.loaded(1)), (held, held));
    let ring = coordinator.join(2, &first, &standby, 2);
    assert_eq!(ring.pass(pass + 3, 5, 1), expected);
}

#[test]
fn a_worker_that_nobody_needs_ends_at_once_and_another_one_when_told_twice() {
    let coordinator = Coordinator::new();
    let idle = coordinator.worker();
    idle.worker.stopper().stop();
    assert!(matches!(next(&*idle.control), ToCoordinator::Goodbye { .. }));
    idle.worker.wait().unwrap();

    let busy = coordinator.worker();
    coordinator.assign(&busy, 1, vec![coordinator.order(0, serve(&coordinator.me, &coordinator.me))]);
    busy.loaded(0);
    busy.worker.stopper().stop();
    assert!(matches!(next(&*busy.control), ToCoordinator::Leave { .. }));
    busy.worker.stopper().stop();
    assert!(matches!(next(&*busy.control), ToCoordinator::Goodbye { .. }));
    busy.worker.wait().unwrap();
    assert!(matches!(coordinator.came.try_recv(), Err(std::sync::mpsc::TryRecvError::Empty)));
}

#[test]
fn a_worker_measures_itself_and_its_links_and_only_while_it_has_no_work() {
    let coordinator = Coordinator::new();
    let (node, fellow) = (coordinator.worker(), coordinator.worker());
    fellow.tell(ToWorker::Fellows(vec![node.it.node, coordinator.me.node]));
    fellow.tell(ToWorker::Examine);
    // It has heard of its fellows by then.
    assert!(matches!(next(&*fellow.control), ToCoordinator::Examined(examined) if !examined.findings.is_empty()));

    coordinator.measure(&node, &[]);
    coordinator.measure(&node, &[&fellow]);
    let measured = node.measured();
    assert!(measured.speed.is_some() && measured.trouble.is_none(), "{measured:?}");
    assert_eq!(measured.links.iter().map(|link| link.peer).collect::<Vec<_>>(), [fellow.it.node]);
    node.tell(ToWorker::Examine);
    assert!(matches!(next(&*node.control), ToCoordinator::Examined(_)), "the first question has no answer");

    let new = coordinator.worker();
    for (node, knows_itself) in [(&node, true), (&new, false)] {
        coordinator.assign(node, 1, vec![coordinator.order(0, serve(&coordinator.me, &coordinator.me))]);
        node.loaded(0);
        coordinator.measure(node, &[&fellow]);
        let measured = node.measured();
        assert_eq!((measured.speed.is_some(), measured.links.len() == 1), (knows_itself, knows_itself), "{measured:?}");
    }
}

#[test]
fn a_worker_lets_only_its_fellows_measure_their_links() {
    let (coordinator, stranger) = (Coordinator::new(), Identity::generate().unwrap());
    let node = coordinator.worker();
    let probe = |by: &Identity| reach(by, node.it.node, &node.it.addresses, Purpose::Probe, None);
    let refused = probe(&stranger).unwrap_err().to_string();
    assert!(refused.contains("does not know that node"), "{refused}");
    let refused = probe(&coordinator.identity).unwrap_err().to_string();
    assert!(refused.contains("does not know that node"), "{refused}");
    node.tell(ToWorker::Fellows(vec![coordinator.me.node]));
    let deadline = Instant::now() + PATIENCE;
    while let Err(error) = probe(&coordinator.identity) {
        assert!(Instant::now() < deadline, "{error}");
    }
    assert!(probe(&stranger).is_err());
}
