//! Slots that cannot be cut back: a session goes on behind all that its slot holds, or begins anew.

use super::*;

fn one_way(cache: PrefixCache, n_slots: u32) -> World {
    let limits = Limits { cache, image_tokens: 1000, can_rewind: false, ..limits(n_slots) };
    World::new(limits, &[COST; 2], 1)
}

/// The tokens of a session, and `n` more.
fn turn(world: &World, id: SessionId, n: Token) -> Vec<Token> {
    [&world.callers[&id].tokens[..], &text(9, n)].concat()
}

/// The ring is replaced by one of which all stages hold all that was sent.
fn replace_ring(world: &mut World) {
    let limits = world.scheduler.limits;
    let applied = PassId(world.scheduler.next_pass.0 - 1);
    let tokens = world.held();
    world.scheduler.recover(limits, Some(&Held { applied, tokens }));
    world.cut_off();
}

#[test]
fn a_conversation_goes_on_where_it_was() {
    for (cache, expected) in [(PrefixCache::Off, 0), (PrefixCache::Exact, 0), (PrefixCache::Full, 49)] {
        let mut world = one_way(cache, 2);
        let first = world.ask(1, text(1, 40), 10);
        world.drain();
        let prompt = turn(&world, first, 20);
        let second = world.ask(2, prompt, 4);
        world.drain();
        assert_eq!(world.cached(second), expected, "{cache:?}");
    }
}

#[test]
fn a_part_of_what_a_slot_holds_is_of_no_use() {
    let mut world = one_way(PrefixCache::Full, 3);
    world.ask(1, text(1, 100), 5);
    world.drain();
    let same = world.ask(2, text(1, 100), 5);
    world.drain();
    let longer = world.ask(3, [text(1, 100), text(2, 30)].concat(), 5);
    let shorter = world.ask(4, text(1, 60), 5);
    world.drain();
    assert_eq!([same, longer, shorter].map(|id| world.cached(id)), [0; 3]);
    assert_eq!(world.callers[&same].tokens, world.callers[&SessionId(1)].tokens);
}

#[test]
fn a_prompt_of_which_one_row_would_be_left_begins_anew() {
    let mut world = one_way(PrefixCache::Full, 2);
    let first = world.ask(1, text(1, 40), 10);
    world.drain();
    // One row behind what the slot holds would be alone.
    let next = world.callers[&first].tokens.clone();
    let second = world.ask(2, next, 4);
    world.drain();
    assert_eq!(world.cached(second), 0);
    let prompt = turn(&world, second, 1);
    let third = world.ask(3, prompt, 4);
    world.drain();
    assert_eq!(world.cached(third), 53, "two rows are left");
}

#[test]
fn those_who_come_together_do_not_wait_for_each_other() {
    let mut world = one_way(PrefixCache::Full, 4);
    let ids: Vec<_> = (1..=4).map(|id| world.ask(id, [text(1, 64), text(10 + id as Token, 8)].concat(), 1)).collect();
    let sent = world.send_all();
    let slots: std::collections::HashSet<u32> = sent.iter().flat_map(|pass| &pass.sets).map(|set| set.slot).collect();
    assert!(slots.len() > 1 && sent.iter().all(|pass| pass.steps.is_empty()));
    world.drain();
    assert!(ids.iter().all(|id| world.cached(*id) == 0));
}

#[test]
fn who_gave_up_a_slot_begins_anew() {
    let mut world = one_way(PrefixCache::Full, 1);
    let patient = world.ask_as(1, text(1, 70), 20, 0, 1);
    world.until_told(patient, 5);
    let urgent = world.ask_as(2, text(2, 70), 3, 0, 0);
    world.drain();
    assert_eq!((world.cached(urgent), &world.callers[&patient].cached[..]), (0, &[0, 0][..]));
    assert!(!world.notices.iter().any(|notice| matches!(notice, Notice::Saved { .. })), "nothing is saved");
}

#[test]
fn a_ring_that_is_replaced_by_one_that_holds_the_same_computes_nothing_again() {
    let mut world = one_way(PrefixCache::Full, 2);
    let kept = world.ask(1, text(1, 40), 5);
    world.drain();
    let running = world.ask(2, text(2, 40), 30);
    world.until_told(running, 10);
    while world.receive() {}
    let n_before = world.n_rows;
    replace_ring(&mut world);
    let prompt = turn(&world, kept, 20);
    let next = world.ask(3, prompt, 2);
    world.drain();
    assert_eq!(world.cached(next), 44);
    assert_eq!(world.n_rows - n_before, (29 - 10 + 1) + (21 + 1), "no row twice");
}

/// A stage has applied the last pass and another one has not. Where slots can be cut back only that is sent again.
#[test]
fn what_was_on_its_way_begins_anew() {
    for (can_rewind, expected) in [(true, 1), (false, 40 + 10)] {
        let mut world = World::new(Limits { can_rewind, ..limits(2) }, &[COST; 2], 1);
        let limits = world.scheduler.limits;
        let running = world.ask(1, text(1, 40), 30);
        world.until_told(running, 10);
        while world.receive() {}
        let resting = world.held();
        let applied = PassId(world.scheduler.next_pass.0 - 1);
        // It is lost behind both stages, of which the second one does not count it as applied.
        world.send().unwrap();
        world.cut_off();
        let n_before = world.n_rows;
        world.scheduler.recover(limits, Some(&Held { applied, tokens: resting }));
        let told = world.callers[&running].told_us.len();
        world.until_told(running, told + 1);
        assert_eq!(world.n_rows - n_before, expected, "{can_rewind}");
        world.drain();
    }
}
