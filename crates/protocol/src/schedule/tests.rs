//! What callers may rely on, each in a few lines. The [`World`] checks every pass beside, and compares the answers with
//! those of lone runs at the end.

use brigade_base::{SessionId, TenantId, Token};

use super::world::{Cost, Outcome, World};
use super::*;
use crate::control::Held;

mod one_way;

/// Chunks of 32 tokens are what the budget gives with these costs, whoever decodes.
const COST: Cost = Cost { decode_us: 10_000, decode_row_us: 100, chunk_least_us: 1_000, chunk_row_us: 100 };

fn limits(n_slots: u32) -> Limits {
    Limits {
        n_slots,
        context: 256,
        chunk: 32,
        n_stages: 0,
        cache: PrefixCache::Full,
        image_tokens: 0,
        task: Task::Generate,
        can_rewind: true,
    }
}

fn world(n_slots: u32, n_stages: usize) -> World {
    World::new(limits(n_slots), &vec![COST; n_stages], 1)
}

fn with_images(n_slots: u32, image_tokens: u64) -> World {
    World::new(Limits { image_tokens, ..limits(n_slots) }, &[COST; 2], 1)
}

/// `n` tokens that no other `kind` has.
fn text(kind: Token, n: Token) -> Vec<Token> {
    (0..n).map(|at| kind * 10_000 + at).collect()
}

impl World {
    fn ask(&mut self, id: u64, prompt: Vec<Token>, n_answer: usize) -> SessionId {
        self.ask_as(id, prompt, n_answer, 0, 0)
    }

    fn ask_as(&mut self, id: u64, prompt: Vec<Token>, n_answer: usize, tenant: u64, priority: i32) -> SessionId {
        let tenant = TenantId(tenant);
        let at = self.at(self.now_us);
        let arrival = Arrival { id: SessionId(id), prompt, answer: vec![], tenant, priority, at, deadline: None };
        self.admit(arrival, n_answer).unwrap();
        SessionId(id)
    }

    /// Goes on until a session has told so many tokens.
    fn until_told(&mut self, id: SessionId, n: usize) {
        while self.callers[&id].told_us.len() < n {
            self.send_all();
            assert!(self.receive(), "session {id} stands still");
        }
    }

    /// Tokens that a session took over when it started first.
    fn cached(&self, id: SessionId) -> u32 {
        self.callers[&id].cached[0]
    }
}

/// Slot, tokens before, rows and outputs of each set.
fn sets(pass: &Pass) -> Vec<[u32; 4]> {
    pass.sets.iter().map(|set| [set.slot, set.keep, set.n_rows, set.n_outputs]).collect()
}

#[test]
fn a_prompt_travels_in_chunks_and_then_token_by_token() {
    let mut world = world(1, 1);
    world.ask(1, text(1, 40), 3);
    for expected in [[0, 0, 32, 0], [0, 32, 8, 1], [0, 40, 1, 1], [0, 41, 1, 1]] {
        assert_eq!(sets(&world.send().unwrap()), [expected]);
        assert_eq!(world.send(), None, "one pass for one stage");
        world.receive();
    }
    world.drain();
    assert_eq!(world.n_passes, 4, "the last token need not be computed");
}

#[test]
fn prompts_of_any_length_have_no_lone_row() {
    let mut world = World::new(Limits { cache: PrefixCache::Exact, ..limits(3) }, &[COST; 2], 1);
    for n in 1..100 {
        world.ask(n as u64, text(n, n), 2);
    }
    world.drain();
}

#[test]
fn the_chunks_of_a_prompt_do_not_wait_for_each_other() {
    let mut world = world(1, 2);
    world.ask(1, text(1, 120), 2);
    let sent: Vec<_> = world.send_all().iter().flat_map(sets).collect();
    assert_eq!(sent, [[0, 0, 32, 0], [0, 32, 32, 0], [0, 64, 32, 0]], "one more than there are stages");
    world.drain();
}

#[test]
fn decode_rows_come_first_and_one_pass_for_each_stage_is_enough() {
    let mut world = world(2, 2);
    let first = world.ask(1, text(1, 4), 9);
    world.until_told(first, 2);
    world.ask(2, text(2, 100), 2);
    let sent = world.send_all();
    assert_eq!(sent.len(), 2);
    assert_eq!(sets(&sent[0]), [[0, 5, 1, 1], [1, 0, 32, 0]]);
    assert_eq!(sets(&sent[1]), [[1, 32, 32, 0]]);
    assert_eq!([&sent[0], &sent[1]].map(Pass::is_decode), [false; 2]);
    world.drain();
}

#[test]
fn sessions_are_dealt_over_the_passes_of_the_ring() {
    let mut world = world(4, 2);
    let ids: Vec<_> = (1..=4).map(|id| world.ask(id, text(id as Token, 4), 20)).collect();
    ids.iter().for_each(|id| world.until_told(*id, 3));
    for _ in 0..4 {
        world.send_all();
        world.receive();
        world.receive();
    }
    let mut slots: Vec<Vec<u32>> =
        world.send_all().iter().map(|pass| pass.sets.iter().map(|set| set.slot).collect()).collect();
    slots.sort();
    assert_eq!(slots, [[0, 1], [2, 3]], "neighbours travel together");
    world.drain();
}

#[test]
fn short_prompts_share_a_pass_and_long_ones_take_turns() {
    let mut world = world(5, 2);
    for id in 1..=3 {
        world.ask(id, text(id as Token, 10), 1);
    }
    assert_eq!(sets(&world.send().unwrap()), [[0, 0, 10, 1], [1, 0, 10, 1], [2, 0, 10, 1]]);
    world.drain();
    for id in 4..=5 {
        world.ask(id, text(id as Token, 64), 1);
    }
    let slots: Vec<u32> = world.send_all().iter().map(|pass| pass.sets[0].slot).collect();
    assert!(slots.len() == 3 && slots[0] != slots[1] && slots[1] != slots[2], "{slots:?}");
    world.drain();
}

#[test]
fn a_conversation_goes_on_where_it_was() {
    for (cache, expected) in [(PrefixCache::Off, 0), (PrefixCache::Exact, 40), (PrefixCache::Full, 49)] {
        let mut world = World::new(Limits { cache, ..limits(2) }, &[COST; 2], 1);
        let first = world.ask(1, text(1, 40), 10);
        world.drain();
        let mut tokens = world.callers[&first].tokens.clone();
        tokens.extend(text(2, 20));
        let second = world.ask(2, tokens, 4);
        world.drain();
        assert_eq!(world.cached(second), expected, "{cache:?}");
        // The tokens that end the answers are never computed.
        assert_eq!(world.n_rows, u64::from(49 + 70 + 3 - expected), "{cache:?}");
    }
}

#[test]
fn a_beginning_is_copied_from_a_slot_that_somebody_may_want_again() {
    let mut world = world(2, 2);
    world.ask(1, text(1, 100), 1);
    world.drain();
    let other = [text(1, 30), text(2, 20)].concat();
    let second = world.ask(2, other, 4);
    assert_eq!(world.send().unwrap().steps, [KvStep::Copy { slot: 1, from: 0, n_tokens: 30 }]);
    world.drain();
    let again = world.ask(3, text(1, 100), 1);
    world.drain();
    assert_eq!([second, again].map(|id| world.cached(id)), [30, 98], "a prompt keeps two rows to compute");
}

#[test]
fn a_beginning_is_copied_from_a_session_that_runs() {
    let mut world = world(2, 2);
    let first = world.ask(1, text(1, 64), 20);
    world.until_told(first, 2);
    let second = world.ask(2, [text(1, 64), text(2, 10)].concat(), 2);
    assert_eq!(world.send().unwrap().steps, [KvStep::Copy { slot: 1, from: 0, n_tokens: 64 }]);
    world.drain();
    assert_eq!(world.cached(second), 64);
}

#[test]
fn the_same_beginning_is_computed_once_by_those_who_come_together() {
    let mut world = world(4, 2);
    let ids: Vec<_> = (1..=4).map(|id| world.ask(id, [text(1, 64), text(10 + id as Token, 8)].concat(), 1)).collect();
    world.drain();
    assert_eq!(world.n_rows, 64 + 4 * 8);
    assert_eq!(ids.iter().map(|id| world.cached(*id)).collect::<Vec<_>>(), [0, 64, 64, 64]);
}

#[test]
fn who_follows_goes_on_alone_when_the_leader_ends() {
    let mut world = world(2, 1);
    let leader = world.ask(1, text(1, 96), 1);
    let follower = world.ask(2, text(1, 96), 1);
    assert_eq!(sets(&world.send().unwrap()), [[0, 0, 32, 0]]);
    world.end(leader, Outcome::Cancelled);
    world.drain();
    assert_eq!(world.cached(follower), 32, "what the leader has left");
}

#[test]
fn other_tenants_share_nothing() {
    let mut world = with_images(2, 1000);
    for (id, tenant) in [(1, 1), (2, 2), (3, 3)] {
        world.ask_as(id, text(1, 100), 2, tenant, 0);
    }
    world.drain();
    assert_eq!([1, 2, 3].map(|id| world.cached(SessionId(id))), [0, 0, 0]);
}

#[test]
fn urgent_sessions_take_slots_and_give_them_back() {
    for (image_tokens, n_images) in [(0, 0), (1000, 1)] {
        let mut world = with_images(1, image_tokens);
        let patient = world.ask_as(1, text(1, 70), 20, 0, 1);
        world.until_told(patient, 5);
        world.send_all();
        let urgent = world.ask_as(2, text(2, 40), 3, 0, 0);
        world.until_told(urgent, 3);
        assert_eq!(world.callers[&patient].n_preempted, 1);
        assert_eq!(world.callers[&patient].told_us.len(), 6, "what was in the ring is not lost");
        world.drain();
        assert_eq!(world.callers[&patient].n_preempted, 1);
        let n_loaded = world.notices.iter().filter(|n| matches!(n, Notice::Loaded { ok: true, .. })).count();
        assert_eq!(n_loaded, n_images);
        assert_eq!(world.callers[&patient].cached, [0, 75 * n_images as u32]);
    }
}

#[test]
fn what_was_answered_is_replayed_token_by_token() {
    let mut world = world(1, 2);
    let patient = world.ask_as(1, text(1, 40), 9, 0, 1);
    world.until_told(patient, 5);
    let urgent = world.ask_as(2, text(2, 40), 1, 0, 0);
    world.until_told(urgent, 1);
    let mut rows = Vec::new();
    while world.callers[&patient].told_us.len() < 6 {
        rows.extend(world.send_all().iter().flat_map(sets).map(|set| set[2]));
        assert!(world.receive());
    }
    assert_eq!(rows[..7], [32, 8, 1, 1, 1, 1, 1]);
    world.drain();
}

#[test]
fn a_session_whose_whole_prompt_is_copied_goes_on_with_its_answer() {
    let mut world = world(2, 2);
    let patient = world.ask_as(1, text(1, 40), 9, 0, 1);
    world.ask_as(2, text(1, 40), 60, 0, 0);
    world.until_told(patient, 4);
    world.ask_as(3, text(3, 40), 2, 0, 0);
    world.drain();
    assert_eq!(world.callers[&patient].n_preempted, 1);
    assert!(world.callers[&patient].cached[1] > 40);
}

#[test]
fn equals_do_not_push_each_other_out() {
    let mut world = world(2, 2);
    for id in 1..=6 {
        world.ask_as(id, text(id as Token, 40), 9, id % 2, 3);
    }
    world.drain();
    assert!(world.callers.values().all(|caller| caller.n_preempted == 0));
}

#[test]
fn who_is_cancelled_at_any_moment_leaves_nothing_behind() {
    for moment in 0..60 {
        for victim in 1..=3 {
            let mut world = with_images(1, 400);
            world.failures = if moment % 2 == 0 { 0 } else { 50 };
            world.ask_as(1, text(1, 100), 6, 0, 2);
            for step in 0..60 {
                if step == 4 {
                    world.ask_as(2, text(2, 70), 6, 0, 1);
                } else if step == 9 {
                    world.ask_as(3, text(3, 70), 4, 0, 0);
                }
                if step == moment && world.callers.get(&SessionId(victim)).is_some_and(|c| c.outcome.is_none()) {
                    world.end(SessionId(victim), Outcome::Cancelled);
                }
                world.send_all();
                world.receive();
            }
            world.drain();
        }
    }
}

#[test]
fn what_cannot_be_saved_or_loaded_is_computed_again() {
    for failures in [30, 100] {
        let mut world = with_images(1, 1000);
        world.failures = failures;
        for id in 1..=20 {
            world.ask_as(id, text(id as Token % 3, 90), 3, 0, 0);
            world.drain();
        }
        let n_bad = world.notices.iter().filter(|n| matches!(n, Notice::Saved { ok: false, .. })).count();
        assert!(n_bad >= 5);
        assert!(failures < 100 || world.scheduler.n_images() == (0, 0));
    }
}

#[test]
fn pushed_out_prefixes_come_back_from_images_until_they_are_old() {
    let mut world = with_images(1, 250);
    for (id, kind) in [(1, 1), (2, 2), (3, 3), (4, 2), (5, 1)] {
        world.ask(id, text(kind, 101), 1);
        world.drain();
        assert!(world.scheduler.n_images().1 <= 250);
    }
    assert_eq!([1, 2, 3, 4, 5].map(|id| world.cached(SessionId(id))), [0, 0, 0, 99, 0]);
}

#[test]
fn without_a_cache_images_go_with_their_sessions() {
    let limits = Limits { cache: PrefixCache::Off, image_tokens: 1000, ..limits(1) };
    let mut world = World::new(limits, &[COST; 2], 1);
    let patient = world.ask_as(1, text(1, 100), 9, 0, 1);
    world.until_told(patient, 3);
    let urgent = world.ask_as(2, text(1, 100), 2, 0, 0);
    world.until_told(urgent, 1);
    assert_eq!(world.scheduler.n_images().0, 1);
    world.drain();
    assert_eq!(world.scheduler.n_images(), (0, 0));
    assert_eq!((world.cached(urgent), world.callers[&patient].cached[1]), (0, 102));
}

#[test]
fn without_a_cache_nothing_is_saved_of_who_has_given_up() {
    let limits = Limits { cache: PrefixCache::Off, image_tokens: 1000, ..limits(1) };
    let mut world = World::new(limits, &[COST; 2], 1);
    let patient = world.ask_as(1, text(1, 100), 9, 0, 1);
    world.until_told(patient, 3);
    world.send_all();
    world.ask_as(2, text(2, 100), 2, 0, 0);
    world.send_all();
    while world.scheduler.n_waiting() < 2 {
        assert!(world.receive(), "nobody was pushed out");
    }
    world.end(patient, Outcome::Cancelled);
    world.drain();
    assert!(!world.notices.iter().any(|notice| matches!(notice, Notice::Saved { .. })));
}

#[test]
fn no_pass_has_more_steps_than_a_frame_holds() {
    let limits = Limits { image_tokens: 256 * 70, context: 1100, chunk: 256, ..limits(256) };
    let long_chunks = Cost { chunk_least_us: 1_000_000, ..COST };
    let mut world = World::new(limits, &[long_chunks; 2], 1);
    // Many short images; then as many long slots, for each of which one of them must go; and all are filled by copying.
    for id in 0..256 {
        world.ask(id + 1, text(id as Token, 66), 1);
    }
    world.drain();
    for id in 256..512 {
        world.ask(id + 1, text(id as Token, 1000), 1);
    }
    world.drain();
    for id in 512..768 {
        let shared = text(256, 900);
        world.ask(id + 1, [shared, text(id as Token, 2)].concat(), 1);
    }
    world.drain();
    let images = world.notices.iter().filter(|notice| matches!(notice, Notice::Saved { .. })).count();
    assert!(images > 256, "{images} saved");
}

#[test]
fn tenants_take_turns() {
    let mut world = world(1, 1);
    for (id, tenant) in [(1, 1), (2, 1), (3, 1), (4, 2)] {
        world.ask_as(id, text(id as Token, 10), 2, tenant, 0);
    }
    let mut two = World::new(limits(2), &[COST], 1);
    for (id, tenant) in [(1, 1), (2, 1), (3, 1), (4, 2)] {
        two.ask_as(id, text(id as Token, 10), 2, tenant, 0);
    }
    let started = |world: &mut World| {
        world.drain();
        let started = world.notices.iter().filter_map(|notice| match notice {
            Notice::Started { session, .. } => Some(session.0),
            _ => None,
        });
        started.collect::<Vec<_>>()
    };
    assert_eq!(started(&mut world), [1, 4, 2, 3], "the other one has had no turn yet");
    assert_eq!(started(&mut two)[..2], [1, 4]);
}

#[test]
fn deadlines_are_told_for_waiting_and_running_sessions() {
    let mut world = world(1, 1);
    for id in 1..=3 {
        let deadline = (id != 3).then(|| world.at(1000 * id));
        let (prompt, at) = (text(id as Token, 10), world.at(0));
        world
            .admit(
                Arrival { id: SessionId(id), prompt, answer: vec![], tenant: TenantId(0), priority: 0, at, deadline },
                5,
            )
            .unwrap();
    }
    world.send();
    let expired = |us: u64| {
        let mut ids = world.scheduler.expired(world.at(us));
        ids.sort_unstable();
        ids
    };
    assert_eq!(expired(999), []);
    assert_eq!(expired(1000), [SessionId(1)]);
    assert_eq!(expired(5000), [SessionId(1), SessionId(2)]);
    world.now_us = 5000;
    world.expire();
    assert_eq!(world.scheduler.expired(world.at(9000)), []);
    world.drain();
    assert_eq!(world.callers[&SessionId(3)].outcome, Some(Outcome::Answered));
}

#[test]
fn a_full_context_ends_an_answer() {
    let mut world = World::new(Limits { context: 20, ..limits(1) }, &[COST], 1);
    let id = world.ask(1, text(1, 15), 99);
    world.drain();
    let caller = &world.callers[&id];
    assert_eq!((caller.told_us.len(), caller.outcome), (5, Some(Outcome::ContextFull)));
}

/// A scheduler of texts with so many tokens, which are named from 1.
fn pooling(at_once: bool, n_slots: u32, texts: &[usize]) -> Scheduler {
    let mut scheduler = Scheduler::new(Limits { task: Task::Pool { at_once }, n_stages: 2, ..limits(n_slots) });
    for (id, &n) in (1..).zip(texts) {
        let (tenant, at) = (TenantId(0), Instant::now());
        let prompt = vec![7; n];
        let arrival = Arrival { id: SessionId(id), prompt, answer: vec![], tenant, priority: 0, at, deadline: None };
        scheduler.admit(arrival).unwrap();
    }
    scheduler
}

#[test]
fn texts_that_must_be_whole_travel_whole_and_leave_nothing() {
    let mut scheduler = pooling(true, 4, &[200, 5, 20, 256]);
    let first = scheduler.next_pass().unwrap();
    assert_eq!(sets(&first), [[0, 0, 200, 1]], "longer than a chunk, and so alone");
    let second = scheduler.next_pass().unwrap();
    assert_eq!(sets(&second), [[1, 0, 5, 1], [2, 0, 20, 1]]);
    let outputs = scheduler.complete(first.id, &[10, 10], &[]).unwrap();
    assert_eq!(outputs.iter().map(|output| (output.session, output.row)).collect::<Vec<_>>(), [(SessionId(1), 0)]);
    scheduler.end(SessionId(1));
    let third = scheduler.next_pass().unwrap();
    assert_eq!(sets(&third), [[3, 0, 256, 1]], "it may be as long as the context, as nothing follows it");
    let outputs = scheduler.complete(second.id, &[10, 10], &[]).unwrap();
    assert_eq!(
        outputs.iter().map(|output| (output.session, output.row)).collect::<Vec<_>>(),
        [(SessionId(2), 0), (SessionId(3), 1)]
    );
    [2, 3].into_iter().for_each(|id| scheduler.end(SessionId(id)));
    assert_eq!(scheduler.next_pass(), None, "none of them decodes");
    // The ring is lost: what is held does not count, the text is sent again whole.
    let held = Held { applied: third.id, tokens: vec![200, 5, 20, 256] };
    scheduler.recover(Limits { task: Task::Pool { at_once: true }, n_stages: 1, ..limits(4) }, Some(&held));
    assert_eq!(sets(&scheduler.next_pass().unwrap()), [[3, 0, 256, 1]]);
}

#[test]
fn texts_of_which_the_last_row_counts_travel_in_chunks() {
    let mut scheduler = pooling(false, 1, &[80]);
    let mut rows = Vec::new();
    while let Some(pass) = scheduler.next_pass() {
        rows.extend(sets(&pass));
        scheduler.complete(pass.id, &[10, 10], &[]).unwrap();
    }
    assert!(rows.len() > 1 && rows.iter().all(|set| set[2] >= 2), "{rows:?}");
    assert_eq!(rows.iter().map(|set| set[2]).sum::<u32>(), 80);
    assert!(rows.iter().all(|set| (set[3] == 1) == (set[1] + set[2] == 80)), "only the last row is wanted: {rows:?}");
}

#[test]
fn hopeless_prompts_are_refused() {
    let mut scheduler = Scheduler::new(limits(1));
    let mut admit = |prompt| {
        let (id, tenant, at) = (SessionId(1), TenantId(0), Instant::now());
        scheduler.admit(Arrival { id, prompt, answer: vec![], tenant, priority: 0, at, deadline: None })
    };
    assert_eq!(admit(vec![]), Err(AdmitError::Empty));
    assert_eq!(admit(vec![1; 256]), Err(AdmitError::TooLong { tokens: 256, context: 256 }));
    assert_eq!(admit(vec![1; 255]), Ok(()));
}

#[test]
fn passes_that_are_not_due_change_nothing() {
    let mut world = world(1, 1);
    world.ask(1, text(1, 10), 2);
    let pass = world.send().unwrap();
    assert_eq!(world.scheduler.complete(pass.id.next(), &[1], &[]), None);
    world.drain();
}

/// Nothing is on its way when the ring is replaced, and both stages hold all that was sent.
#[test]
fn a_ring_that_is_replaced_by_one_that_holds_the_same_computes_nothing_again() {
    let mut world = world(2, 2);
    let id = world.ask(1, text(1, 40), 30);
    world.until_told(id, 10);
    while world.receive() {}
    let limits = world.scheduler.limits;
    let applied = PassId(world.scheduler.next_pass.0 - 1);
    world.scheduler.recover(limits, Some(&Held { applied, tokens: vec![256; 2] }));
    world.forget_positions();
    world.drain();
    assert_eq!(world.n_rows, 40 + 29, "each but the last token once");
}

#[test]
fn a_ring_that_holds_nothing_computes_all_again_in_the_same_way() {
    let mut world = World::new(Limits { cache: PrefixCache::Exact, ..limits(2) }, &[COST; 2], 1);
    let id = world.ask(1, text(1, 40), 30);
    world.until_told(id, 10);
    while world.receive() {}
    let n_before = world.n_rows;
    let limits = world.scheduler.limits;
    world.scheduler.recover(limits, None);
    world.forget_positions();
    world.drain();
    assert_eq!(world.n_rows, n_before + 40 + 29);
}

#[test]
fn an_answer_that_began_elsewhere_goes_on_behind_its_tokens() {
    let mut world = World::new(Limits { cache: PrefixCache::Exact, ..limits(2) }, &[COST; 2], 1);
    let id = world.ask(1, text(1, 40), 30);
    world.drain();
    let whole = world.callers[&id].tokens.clone();
    let (prompt, answer) = (whole[..40].to_vec(), whole[40..55].to_vec());
    let (id, tenant, at) = (SessionId(2), TenantId(9), world.at(world.now_us));
    world.admit(Arrival { id, prompt, answer, tenant, priority: 0, at, deadline: None }, 15).unwrap();
    world.drain();
    assert_eq!(world.callers[&id].tokens, whole);
}

#[test]
fn an_answer_that_began_elsewhere_must_leave_room_too() {
    let mut scheduler = Scheduler::new(limits(1));
    let (at, tenant) = (Instant::now(), TenantId(0));
    let mut admit = |n_answer| {
        let (prompt, answer) = (vec![1; 10], vec![2; n_answer]);
        scheduler.admit(Arrival { id: SessionId(1), prompt, answer, tenant, priority: 0, at, deadline: None })
    };
    assert_eq!(admit(246), Err(AdmitError::TooLong { tokens: 256, context: 256 }));
    assert_eq!(admit(245), Ok(()));
}

#[test]
fn what_is_forgotten_of_the_cache_is_computed_again() {
    let mut world = world(2, 2);
    world.ask(1, text(1, 60), 3);
    world.drain();
    world.scheduler.forget_cache();
    let id = world.ask(2, text(1, 60), 3);
    world.drain();
    assert_eq!(world.cached(id), 0);
    let id = world.ask(3, text(1, 60), 3);
    world.drain();
    assert_eq!(world.cached(id), 58);
}

/// The first pass of a ring follows the last one that all stages have applied; those that were lost count no more.
#[test]
fn passes_say_which_one_they_follow() {
    let mut world = world(2, 2);
    world.ask(1, text(1, 60), 20);
    let ids = |passes: &[Pass]| passes.iter().map(|pass| (pass.id.0, pass.follows.0)).collect::<Vec<_>>();
    assert_eq!(ids(&world.send_all()), [(1, 0), (2, 1)]);
    let limits = world.scheduler.limits;
    world.scheduler.recover(limits, Some(&Held { applied: PassId(1), tokens: vec![256; 2] }));
    assert_eq!(world.scheduler.probe(None).follows, PassId(1));
    assert_eq!(world.scheduler.next_pass().map(|pass| (pass.id.0, pass.follows.0)), Some((4, 3)));
    world.scheduler.recover(limits, None);
    assert_eq!(world.scheduler.probe(Some(1)).follows, PassId(0));
}

#[test]
fn what_is_computed_again_travels_in_few_passes() {
    let mut world = World::new(Limits { cache: PrefixCache::Exact, ..limits(3) }, &[COST; 2], 1);
    let ids = [1, 2, 3].map(|id| world.ask(id, text(id as Token, 40), 150));
    world.until_told(ids[0], 100);
    while world.receive() {}
    let (n_passes, limits) = (world.n_passes, world.scheduler.limits);
    world.scheduler.recover(limits, None);
    world.forget_positions();
    let told = world.callers[&ids[0]].told_us.len();
    world.until_told(ids[0], told + 1);
    let n_passes = world.n_passes - n_passes;
    assert!(n_passes <= 120 / MAX_WAVES as u64 + 20, "{n_passes} passes for 100 rows of each of three sessions");
    world.drain();
}
