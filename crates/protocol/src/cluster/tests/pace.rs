//! The placement follows speeds, seldom and for a clear gain.

use brigade_plan::{Curve, LinkProfile, Optimize, Speed, SpeedSource};

use super::super::pace::LOOK_EVERY;
use super::*;

/// A node that computes a layer in so many milliseconds, whatever the rows, and loads a layer in 0.1 s.
fn speed(layer_ms: u32) -> Option<Box<Speed>> {
    let curve = || Curve::new(vec![(1, f64::from(layer_ms) / 1000.0), (32, f64::from(layer_ms) / 1000.0)]).unwrap();
    Some(Box::new(Speed {
        decode: curve(),
        chunk: curve(),
        head: None,
        pass_s: 0.0,
        decode_context_s: 0.0,
        chunk_context_s: 0.0,
        load_bytes_per_s: 1e9,
        source: SpeedSource::Layers,
    }))
}

fn measured(id: NodeId, layer_ms: u32) -> Input {
    let fast = LinkProfile { latency_s: 0.0001, bytes_per_s: 1e9 };
    Input::Measured(id, speed(layer_ms), vec![(COORDINATOR, id, fast)])
}

/// The coordinator and two workers with room for six of nine layers each, which compute a layer in so many
/// milliseconds: the coordinator, then the workers.
fn ready(layer_ms: [u32; 3], optimize: Optimize) -> World {
    let mut settings = settings(720, 3);
    settings.demand.optimize = optimize;
    settings.demand.spread = false;
    let mut world = World::new(settings);
    world.tell(measured(COORDINATOR, layer_ms[0]));
    for (n, ms) in [(1, layer_ms[1]), (2, layer_ms[2])] {
        world.tell(measured(node(n), ms));
        world.tell(Input::Offer(node(n), offer(720)));
    }
    world.make_ready();
    world
}

fn look(world: &mut World) -> Vec<&'static str> {
    kinds(&world.tick_at(world.now + LOOK_EVERY))
}

#[test]
fn the_fast_nodes_get_the_layers() {
    let world = ready([10, 100, 10], Optimize::Latency);
    assert_eq!(world.served().iter().map(|(id, _)| *id).collect::<Vec<_>>(), [node(2), COORDINATOR]);
    let prediction = world.cluster.plan().unwrap().prediction.clone().unwrap();
    assert!((8.0..11.2).contains(&prediction.tokens_per_s), "{prediction:?}");
}

#[test]
fn a_node_that_becomes_slow_loses_its_layers_to_another_one_but_not_at_once() {
    let mut world = ready([10, 15, 10], Optimize::Latency);
    assert_eq!(world.served()[0].0, node(2));
    assert!(world.tell(measured(node(2), 40)).is_empty());
    let predicted = |world: &World| world.cluster.plan().unwrap().prediction.as_ref().unwrap().tokens_per_s;
    assert!(predicted(&world) < 10.0, "what is told follows what was measured");
    assert_eq!(look(&mut world), ["drain"]);
    assert!(matches!(world.cluster.phase(), Phase::Draining(why) if why.contains("less time")));
    let actions = world.drained();
    assert_eq!(world.served()[0].0, node(1));
    assert!(orders(&actions, node(2)).is_empty());
    world.make_ready();
    assert!(look(&mut world).is_empty(), "and there it stays");
}

#[test]
fn a_small_gain_moves_nothing() {
    let mut world = ready([10, 11, 10], Optimize::Latency);
    world.tell(measured(node(2), 12));
    assert!(look(&mut world).is_empty());
}

#[test]
fn a_gain_that_does_not_pay_for_loading_moves_nothing() {
    let mut world = ready([10, 15, 10], Optimize::Latency);
    world.tell(measured(node(2), 40));
    let slow = LinkProfile { latency_s: 0.0001, bytes_per_s: 1e6 };
    world.tell(Input::Measured(node(1), speed(15), vec![(COORDINATOR, node(1), slow)]));
    assert!(look(&mut world).is_empty());
}

#[test]
fn with_shares_by_memory_or_unknown_speeds_nothing_moves() {
    let mut world = ready([10, 15, 10], Optimize::Memory);
    world.tell(measured(node(1), 40));
    world.tell(measured(node(2), 40));
    assert!(look(&mut world).is_empty());
    assert_eq!(world.cluster.next_tick(), None);
    let mut world = three();
    assert!(look(&mut world).is_empty());
}

#[test]
fn who_is_lost_before_the_change_is_not_waited_for() {
    let mut world = ready([10, 15, 10], Optimize::Latency);
    world.tell(measured(node(2), 40));
    assert_eq!(look(&mut world), ["drain"]);
    world.gone(1);
    world.drained();
    assert_eq!(world.served().iter().map(|(id, _)| *id).collect::<Vec<_>>(), [node(2), COORDINATOR]);
    world.make_ready();
}
