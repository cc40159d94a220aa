//! A worker that came to serve two stages is relieved of one by a worker that serves none.

use super::super::moving::SETTLED;
use super::*;

/// Worker 2 serves stages 0 and 1, since worker 1 is lost.
fn burdened(redundancy: u32) -> World {
    let settings = Settings { redundancy, ..settings(2000, 3) };
    let mut world = World::ready(settings, &[2000, 2000]);
    world.load_standbys();
    world.gone(1);
    world.make_ready();
    assert_eq!(holders(&world), [2, 2]);
    world
}

fn holders(world: &World) -> Vec<u8> {
    let served = world.served();
    served[..served.len() - 1].iter().map(|(id, _)| id.as_bytes()[0]).collect()
}

/// A worker comes and loads; the time until the stage may move has not passed.
fn comes(world: &mut World, n: u8) {
    world.tell(Input::Offer(node(n), offer(2000)));
    assert!(world.load_standbys().is_empty(), "the ring is ready only since a moment");
}

/// Time passes, the stage moves, and the ring is ready again; what the move brought, and what being ready did.
fn moves(world: &mut World) -> (Vec<Action>, Vec<Action>) {
    let at = world.cluster.next_tick().expect("a time at which the stage moves");
    assert_eq!(kinds(&world.tick_at(at)), ["drain"]);
    let moved = world.drained();
    (moved, world.make_ready())
}

/// Nothing more happens, however long one waits.
fn rests(world: &mut World) {
    let epoch = world.cluster.epoch();
    for _ in 0..5 {
        world.load_standbys();
        assert!(world.tick_at(world.now + SETTLED * 3).is_empty());
    }
    assert_eq!((world.cluster.epoch(), world.cluster.phase()), (epoch, &Phase::Ready));
    assert_eq!(world.cluster.next_tick(), None);
}

#[test]
fn one_of_two_stages_moves_to_a_worker_that_serves_none() {
    let mut world = burdened(1);
    let ready = world.now;
    world.now += SETTLED / 2;
    let actions = world.tell(Input::Offer(node(3), offer(2000)));
    assert_eq!(kinds(&actions), ["assign"], "the ring goes on");
    assert_eq!(orders(&actions, node(3))[0].role, Role::Standby { upstream: None });
    let explanation = world.cluster.plan().unwrap().explanation.last().unwrap();
    assert!(explanation.ends_with("which serves others too, move to 2000m, which serves none."), "{explanation}");
    assert!(world.load_standbys().is_empty());
    assert_eq!(world.cluster.next_tick(), Some(ready + SETTLED));
    assert!(world.tell(Input::Tick).is_empty(), "it is not time yet");

    let (actions, _) = moves(&mut world);
    assert_eq!(kinds(&actions), ["stop", "assign", "assign", "load tail"]);
    let serve = |upstream, downstream, kv_from| Role::Serve { upstream, downstream, shadow: None, kv_from };
    let [one, other] = &orders(&actions, node(2))[..] else { panic!("{actions:?}") };
    assert_eq!((one.stage, &one.role), (0, &Role::HandOver { to: node(3) }));
    assert_eq!((other.stage, &other.role), (1, &serve(node(3), COORDINATOR, None)));
    assert!(other.keep_kv);
    let [taken] = &orders(&actions, node(3))[..] else { panic!("{actions:?}") };
    assert_eq!((taken.stage, &taken.role), (0, &serve(COORDINATOR, node(2), Some(node(2)))));
    assert!(matches!(actions.last(), Some(Action::LoadTail { keep_kv: true, .. })));
    assert_eq!(holders(&world), [3, 2]);
    rests(&mut world);
    assert!(world.standing_by().is_empty(), "nobody is to stand by");
}

#[test]
fn who_gave_a_stage_away_stands_by_for_it_and_nothing_moves_back() {
    let mut world = burdened(2);
    comes(&mut world, 1);
    assert_eq!(world.standing_by(), [(0, node(1)), (1, node(1))]);
    moves(&mut world);
    assert_eq!(holders(&world), [1, 2]);
    world.load_standbys();
    assert_eq!(world.standing_by(), [(0, node(2)), (1, node(1))]);
    rests(&mut world);
    world.gone(2);
    world.make_ready();
    assert_eq!(holders(&world), [1, 1]);
}

#[test]
fn who_stands_by_already_goes_on_standing_by_while_another_one_loads_and_after_it() {
    let settings = Settings { redundancy: 2, ..settings(600, 4) };
    let mut world = World::ready(settings, &[2000, 2000, 2000]);
    world.load_standbys();
    world.gone(1);
    world.make_ready();
    world.load_standbys();
    let burdened = holders(&world)[0];
    let other = if burdened == 2 { 3 } else { 2 };
    let stands_by = world.standing_by();
    assert!(stands_by.contains(&(0, node(other))), "{stands_by:?}");
    world.tell(Input::Offer(node(1), offer(2000)));
    assert!(world.standing_by().contains(&(0, node(other))), "it is loaded");
    world.load_standbys();
    moves(&mut world);
    let mut all = holders(&world);
    all.sort_unstable();
    assert_eq!(all, [1, 2, 3]);
    assert!(world.standing_by().contains(&(0, node(other))));
    rests(&mut world);
}

#[test]
fn several_stages_move_one_after_the_other() {
    let mut world = World::ready(settings(500, 4), &[3000, 3000, 3000]);
    for n in [1, 2] {
        world.gone(n);
        world.make_ready();
    }
    assert_eq!(holders(&world), [3, 3, 3]);
    comes(&mut world, 4);
    world.tell(Input::Offer(node(5), offer(2000)));
    assert_eq!(world.standing_by().len(), 1, "one at a time");
    moves(&mut world);
    assert_eq!(world.standing_by().len(), 1);
    world.load_standbys();
    moves(&mut world);
    let mut all = holders(&world);
    all.sort_unstable();
    assert_eq!(all, [3, 4, 5]);
    rests(&mut world);
}

#[test]
fn who_has_no_room_gets_nothing() {
    let mut world = burdened(1);
    assert!(world.tell(Input::Offer(node(3), offer(200))).is_empty());
    rests(&mut world);
}

#[test]
fn a_load_that_fails_is_tried_again_later_and_the_ring_does_not_notice() {
    for redundancy in [1, 2] {
        let mut world = burdened(redundancy);
        world.tell(Input::Offer(node(3), offer(2000)));
        let epoch = world.cluster.epoch();
        let (_, stage, _) = world.loading()[0];
        world.tell(Input::StageFailed(node(3), epoch, stage, "disk full".into()));
        assert_eq!((world.cluster.phase(), world.cluster.epoch()), (&Phase::Ready, epoch));
        world.load_standbys();
        world.tick_at(world.now + RETRY - Duration::from_millis(1));
        assert_eq!((world.cluster.phase(), world.cluster.epoch()), (&Phase::Ready, epoch));
        let retry = world.cluster.next_tick().unwrap();
        let mut actions = world.tick_at(retry);
        assert_eq!(world.loading(), [(node(3), stage, true)]);
        actions.extend(world.load_standbys());
        assert_eq!(kinds(&actions).iter().filter(|kind| **kind == "drain").count(), 1);
        world.drained();
        world.make_ready();
        // With two holders the other stage stood by, and is loaded.
        assert_eq!(holders(&world), if redundancy == 1 { [3, 2] } else { [2, 3] });
        rests(&mut world);
    }
}

#[test]
fn a_loss_while_a_stage_moves_goes_before() {
    for is_draining in [false, true] {
        for lost in [2, 3] {
            let mut world = burdened(1);
            comes(&mut world, 3);
            world.tell(Input::Offer(node(4), offer(2000)));
            if is_draining {
                world.tick_at(world.cluster.next_tick().unwrap());
            }
            let actions = world.gone(lost);
            if lost == 2 {
                assert!(actions.iter().all(|a| !matches!(a, Action::LoadTail { keep_kv: false, .. })), "same cut");
                world.make_ready();
                assert_eq!(world.loading(), [], "each of the two that are left has one of the stages");
                let mut all = holders(&world);
                all.sort_unstable();
                assert_eq!(all, [3, 4]);
                continue;
            }
            if is_draining {
                assert!(actions.is_empty(), "the passes on their way come back first");
                world.drained();
                world.make_ready();
            }
            world.load_standbys();
            moves(&mut world);
            assert_eq!(holders(&world), [4, 2]);
            rests(&mut world);
        }
    }
}

#[test]
fn who_loads_for_a_node_that_is_lost_takes_its_stage_over() {
    let mut world = burdened(1);
    comes(&mut world, 3);
    let actions = world.gone(2);
    let found = orders(&actions, node(3));
    assert_eq!([found[0].keep_kv, found[1].keep_kv], [true, false], "one of them is loaded");
}

#[test]
fn who_leaves_goes_first() {
    let mut world = burdened(1);
    comes(&mut world, 3);
    world.leave(2);
    assert_eq!(world.loading(), [(node(3), 1, true)], "the other one is loaded");
    assert_eq!(kinds(&world.load_standbys()), ["drain"]);
    world.drained();
    assert!(world.make_ready().contains(&released(2)));

    let mut world = burdened(1);
    comes(&mut world, 3);
    assert_eq!(kinds(&world.leave(3)), ["free", "released"]);
    world.gone(3);
    rests(&mut world);

    let mut world = burdened(1);
    comes(&mut world, 3);
    world.tick_at(world.cluster.next_tick().unwrap());
    assert_eq!(kinds(&world.leave(3)), ["free", "released"]);
    world.drained();
    world.make_ready();
    assert_eq!(holders(&world), [2, 2]);
}

#[test]
fn a_node_that_cannot_be_reached_where_a_stage_moved_gives_it_back_and_gets_no_other() {
    let mut world = burdened(1);
    comes(&mut world, 3);
    world.tick_at(world.cluster.next_tick().unwrap());
    world.drained();
    assert_eq!(holders(&world), [3, 2]);
    let mut n_breaks = 0;
    while holders(&world) == [3, 2] {
        n_breaks += 1;
        world.load(None);
        let epoch = world.cluster.epoch();
        world.tell(Input::RingBroke(Some(node(2)), epoch, "no route".into()));
        if let Some(until) = world.cluster.next_tick() {
            world.tick_at(until);
        }
    }
    assert_eq!((n_breaks, holders(&world)), (MAX_BREAKS + 1, vec![2, 2]));
    world.make_ready();
    rests(&mut world);
}
