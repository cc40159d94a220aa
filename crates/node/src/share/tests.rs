//! Nodes that fetch from each other over links without a network, and a hub that is none.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use brigade_base::{ByteSize, Hash, NodeId};
use brigade_net::{Link, LinkError, LinkStats};
use brigade_protocol::control::Peer;
use brigade_protocol::kind;
use brigade_protocol::weights::{BLOCK_BYTES, Hub, HubFile, HubTensor, WeightBytes};
use tempfile::TempDir;

use super::*;
use crate::cache::Cache;
use crate::test_link::PairedLink;

/// Two that fit into a block each, and one of three blocks.
fn tensors() -> Vec<Vec<u8>> {
    let bytes = |n: u64, seed: u64| (0..n).map(|at| (((at + seed) * 2_654_435_761) >> 24) as u8).collect();
    vec![bytes(5000, 1), bytes(2 * BLOCK_BYTES + 777, 2), bytes(300, 3)]
}

fn hash(bytes: &[u8]) -> Hash {
    Hash::from_bytes(*blake3::hash(bytes).as_bytes())
}

fn node(n: u8) -> NodeId {
    NodeId::from_bytes([n; 32])
}

/// What is wrong with a source.
#[derive(Clone, Copy, PartialEq)]
enum Fault {
    None,
    /// Its chunks have other bytes.
    WrongBytes,
    /// Its trees have.
    WrongTrees,
    /// Its link breaks after so many chunks, each time.
    Breaks(usize),
    /// It answers what it has, and then nothing.
    Silent,
    /// It says that it has everything, and does not.
    Boasts,
}

/// A link whose other end has a fault.
struct Faulty {
    inner: Arc<dyn Link>,
    fault: Fault,
    n_chunks: Mutex<usize>,
}

impl Link for Faulty {
    fn send(&self, kind: u8, parts: &[&[u8]]) -> Result<(), LinkError> {
        self.inner.send(kind, parts)
    }

    fn recv(&self, buf: &mut Vec<u8>, deadline: Option<std::time::Instant>) -> Result<u8, LinkError> {
        let kind = self.inner.recv(buf, deadline)?;
        match (self.fault, kind) {
            (Fault::WrongBytes, kind::CHUNK) | (Fault::WrongTrees, kind::TREE_ANSWER) => buf[7] ^= 1,
            (Fault::Boasts, kind::HAVE_ANSWER) => buf.fill(0xff),
            (Fault::Silent, kind::CHUNK | kind::TREE_ANSWER) => loop {
                self.inner.recv(buf, deadline)?;
            },
            (Fault::Breaks(after), kind::CHUNK) => {
                let mut n_chunks = self.n_chunks.lock().unwrap();
                *n_chunks += 1;
                if *n_chunks > after {
                    self.inner.close();
                    return Err(LinkError::Closed);
                }
            }
            _ => {}
        }
        Ok(kind)
    }

    fn peer(&self) -> NodeId {
        self.inner.peer()
    }

    fn peer_addr(&self) -> String {
        self.inner.peer_addr()
    }

    fn close(&self) {
        self.inner.close();
    }

    fn stats(&self) -> LinkStats {
        self.inner.stats()
    }

    fn set_frame_limit(&self, _bytes: usize) {}

    fn set_spin(&self, _spin: Duration) {}
}

/// A node with some tensors. The one with key 0 coordinates.
struct Source {
    shelf: Arc<Shelf>,
    tally: Arc<Tally>,
    fault: Fault,
    _dir: TempDir,
}

/// What a node that fetches may ask.
#[derive(Default)]
struct World {
    sources: HashMap<NodeId, Source>,
    hub: Option<(Hub, Arc<FakeHub>)>,
    /// Who was dialled.
    dialled: Mutex<Vec<NodeId>>,
}

impl World {
    /// A node that has these of the tensors.
    fn with(mut self, n: u8, has: &[usize], fault: Fault) -> Self {
        let (dir, tally) = (tempfile::tempdir().unwrap(), Arc::<Tally>::default());
        let cache = Arc::new(Cache::open(dir.path(), ByteSize::mib(100)).unwrap());
        for tensor in has {
            put(&cache, &tensors()[*tensor]);
        }
        let shelf = Shelf::new(Vec::new(), Some(cache), Arc::default(), Arc::clone(&tally), || false);
        self.sources.insert(node(n), Source { shelf: Arc::new(shelf), tally, fault, _dir: dir });
        self
    }

    /// A hub that has these, and may be asked for them.
    fn with_hub(mut self, has: &[usize], at_once: bool, is_right: bool) -> Self {
        let file: Vec<u8> = tensors().concat();
        let offset = |tensor: usize| tensors()[..tensor].iter().map(|bytes| bytes.len() as u64).sum();
        let tensor = |at: &usize| HubTensor { hash: hash(&tensors()[*at]), file: 0, offset: offset(*at) };
        let files = vec![HubFile { url: String::new(), n_bytes: file.len() as u64, etag: None }];
        let hub = Hub { files, tensors: has.iter().map(tensor).collect(), at_once };
        self.hub = Some((hub, Arc::new(FakeHub { file, is_right, n_bytes: Mutex::new(0) })));
        self
    }

    fn served(&self, n: u8) -> u64 {
        self.sources[&node(n)].tally.read().served
    }
}

impl Suppliers for World {
    fn peers(&self) -> Vec<Peer> {
        let peer = |node: &NodeId| Peer { node: *node, addresses: Vec::new() };
        self.sources.keys().filter(|key| **key != node(0)).map(peer).collect()
    }

    fn dial(&self, peer: Option<&Peer>, _is_wanted: &dyn Fn() -> bool) -> Result<Arc<dyn Link>, NoLink> {
        let to = peer.map_or(node(0), |peer| peer.node);
        self.dialled.lock().unwrap().push(to);
        let source = self.sources.get(&to).ok_or("nobody is there")?;
        let [near, far] = PairedLink::between(node(9), to);
        let shelf = Arc::clone(&source.shelf);
        std::thread::spawn(move || {
            shelf.answer_all(&*far);
            far.close();
        });
        Ok(Arc::new(Faulty { inner: near, fault: source.fault, n_chunks: Mutex::new(0) }))
    }

    fn hub(&self) -> Option<Hub> {
        self.hub.as_ref().map(|(hub, _)| hub.clone())
    }

    fn reader(&self, _hub: &Hub) -> Option<Arc<dyn HubReader>> {
        self.hub.as_ref().map(|(_, reader)| Arc::clone(reader) as Arc<dyn HubReader>)
    }
}

struct FakeHub {
    file: Vec<u8>,
    is_right: bool,
    n_bytes: Mutex<u64>,
}

impl HubReader for FakeHub {
    fn read(&self, file: usize, offset: u64, buf: &mut [u8]) -> Result<(), String> {
        assert_eq!(file, 0);
        *self.n_bytes.lock().unwrap() += buf.len() as u64;
        buf.copy_from_slice(&self.file[offset as usize..][..buf.len()]);
        buf[0] ^= u8::from(!self.is_right);
        Ok(())
    }
}

fn put(cache: &Cache, bytes: &[u8]) {
    let partial = cache.begin(&hash(bytes), bytes.len() as u64).unwrap();
    partial.write(0, bytes).unwrap();
    partial.finish().unwrap();
}

fn total() -> u64 {
    tensors().iter().map(|bytes| bytes.len() as u64).sum()
}

/// Fetches all tensors into a cache that `prepare` has seen before; what came from where.
fn gather_into(
    world: &World,
    prepare: impl FnOnce(&Cache),
    progress: &mut dyn FnMut(u64) -> bool,
) -> Result<WeightBytes, Failed> {
    let dir = tempfile::tempdir().unwrap();
    let cache = Cache::open(dir.path(), ByteSize::mib(100)).unwrap();
    prepare(&cache);
    let (trees, tally) = (Trees::default(), Tally::default());
    let wanted = |bytes: &Vec<u8>| Wanted { hash: hash(bytes), n_bytes: bytes.len() as u64, name: "t".to_owned() };
    let wanted: Vec<Wanted> = tensors().iter().map(wanted).collect();
    let files = Gathering::new(&wanted, &cache, &trees, &tally, 0).run(world, progress)?;
    assert_eq!(files.len(), wanted.len());
    for (wanted, bytes) in wanted.iter().zip(tensors()) {
        assert!(cache.get(&wanted.hash).unwrap().is_some());
        let read = std::fs::read(dir.path().join(wanted.hash.to_string())).unwrap();
        assert!(read == bytes);
    }
    Ok(tally.read())
}

fn gather(world: &World) -> Result<WeightBytes, Failed> {
    gather_into(world, |_| (), &mut |_| true)
}

const ALL: &[usize] = &[0, 1, 2];

#[test]
fn all_comes_from_the_coordinator_where_nobody_else_is() {
    let world = World::default().with(0, ALL, Fault::None);
    let came = gather(&world).unwrap();
    assert_eq!(came, WeightBytes { coordinator: total(), ..WeightBytes::default() });
    assert_eq!(world.served(0), total());
}

#[test]
fn every_node_gives_what_it_has() {
    let world = World::default().with(0, &[0], Fault::None).with(1, &[1], Fault::None).with(2, &[2], Fault::None);
    let came = gather(&world).unwrap();
    assert_eq!((came.coordinator, came.workers), (5000, total() - 5000));
    assert_eq!((world.served(1), world.served(2)), (2 * BLOCK_BYTES + 777, 300));
}

#[test]
fn a_worker_that_has_all_replaces_the_coordinator() {
    let world = World::default().with(1, ALL, Fault::None);
    assert_eq!(gather(&world).unwrap().workers, total());
}

#[test]
fn a_source_that_breaks_off_is_taken_up_again() {
    let world = World::default().with(0, ALL, Fault::Breaks(4));
    assert_eq!(gather(&world).unwrap().coordinator, total());
    assert!(world.dialled.lock().unwrap().len() > 1);
}

#[test]
fn what_a_dead_source_was_to_bring_comes_from_others() {
    let world = World::default().with(0, ALL, Fault::None).with(1, ALL, Fault::Breaks(0)).with(2, ALL, Fault::Silent);
    let came = gather(&world).unwrap();
    assert_eq!(came.coordinator, total());
}

#[test]
fn wrong_bytes_and_trees_are_refused_and_their_source_is_left() {
    for fault in [Fault::WrongBytes, Fault::WrongTrees] {
        let world = World::default().with(0, ALL, Fault::None).with(1, ALL, fault);
        let came = gather(&world).unwrap();
        assert_eq!(came.coordinator + came.workers, total());
        let n_dialled = world.dialled.lock().unwrap().iter().filter(|to| **to == node(1)).count();
        assert!(n_dialled <= 1);
        let alone = World::default().with(0, ALL, fault);
        assert!(matches!(gather(&alone), Err(Failed::WrongBytes(_))));
    }
}

#[test]
fn who_lacks_what_it_says_it_has_is_left_too() {
    let world = World::default().with(0, ALL, Fault::None).with(1, &[], Fault::Boasts);
    assert_eq!(gather(&world).unwrap().coordinator, total());
    let alone = World::default().with(0, &[0, 2], Fault::Boasts);
    assert!(matches!(gather(&alone), Err(Failed::BrokeOff(1, _))));
}

#[test]
fn what_nobody_has_is_an_error_that_names_it() {
    let world = World::default().with(0, &[0, 1], Fault::None).with(1, &[0], Fault::None);
    assert!(matches!(gather(&world), Err(Failed::BrokeOff(2, _))));
    let empty = World::default();
    let Err(Failed::BrokeOff(_, why)) = gather(&empty) else { panic!() };
    assert_eq!(why, "nobody is there");
}

#[test]
fn what_is_here_from_before_is_not_fetched_again() {
    let world = World::default().with(0, ALL, Fault::None);
    let large = &tensors()[1];
    let prepare = |cache: &Cache| {
        let partial = cache.begin(&hash(large), large.len() as u64).unwrap();
        partial.write(BLOCK_BYTES, &large[BLOCK_BYTES as usize..]).unwrap();
        // Begun with wrong bytes: they are written over.
        cache.begin(&hash(&tensors()[0]), 5000).unwrap().write(0, &[1; 5000]).unwrap();
    };
    let came = gather_into(&world, prepare, &mut |_| true).unwrap();
    assert_eq!((came.cache, came.coordinator), (BLOCK_BYTES + 777, BLOCK_BYTES + 5300));
}

#[test]
fn it_ends_when_nobody_wants_it_any_more() {
    let world = World::default().with(0, ALL, Fault::Silent);
    let mut n_asked = 0;
    let mut progress = |_| {
        n_asked += 1;
        n_asked < 3
    };
    assert!(matches!(gather_into(&world, |_| (), &mut progress), Err(Failed::Cancelled)));
}

#[test]
fn the_hub_gives_what_it_may_where_that_is_wanted_at_once() {
    // Nobody else has the small ones; the tree of the large one comes from a node.
    let world = World::default().with(0, &[1], Fault::Breaks(0)).with_hub(ALL, true, true);
    let came = gather(&world).unwrap();
    assert_eq!((came.hub, came.coordinator), (total(), 0));
    assert_eq!(*world.hub.as_ref().unwrap().1.n_bytes.lock().unwrap(), total());
}

#[test]
fn the_hub_is_left_alone_where_nodes_have_all() {
    let world = World::default().with(0, ALL, Fault::None).with_hub(ALL, false, true);
    assert_eq!(gather(&world).unwrap().coordinator, total());
    assert_eq!(*world.hub.as_ref().unwrap().1.n_bytes.lock().unwrap(), 0);
}

#[test]
fn what_nobody_has_comes_from_the_hub() {
    let world = World::default().with(0, &[1, 2], Fault::None).with_hub(&[0], false, true);
    let came = gather(&world).unwrap();
    assert_eq!((came.hub, came.coordinator), (5000, total() - 5000));
}

#[test]
fn wrong_bytes_of_the_hub_are_refused() {
    let world = World::default().with(0, ALL, Fault::None).with_hub(ALL, true, false);
    let came = gather(&world).unwrap();
    assert_eq!((came.hub, came.coordinator), (0, total()));
    let world = World::default().with(0, &[1, 2], Fault::None).with_hub(&[0], false, false);
    let Err(Failed::BrokeOff(0, why)) = gather(&world) else { panic!() };
    assert!(why.contains("wrong bytes"), "{why}");
}
