//! The scheduler under load: many callers who come, go and return, all from one seed.

use brigade_base::{SessionId, TenantId, Token};

use super::world::{Cost, Outcome, Random, World};
use super::*;

/// Who comes, and what he may do.
#[derive(Debug)]
struct Load {
    n_sessions: u64,
    n_tenants: u64,
    n_priorities: u64,
    /// Of all sessions, in percent.
    cancels: u64,
    deadlines: u64,
    /// Mean time between arrivals.
    pause_us: u64,
    longest_answer: u64,
    /// How often the ring is lost while a session comes, in percent.
    losses: u64,
}

/// A caller who hangs up.
type Cancel = (u64, SessionId);

fn random_world(seed: u64) -> (World, Load) {
    let random = &mut Random(seed << 32);
    let limits = Limits {
        n_slots: 1 + random.below(6) as u32,
        context: 64 + random.below(300) as u32,
        chunk: 2 + random.below(64) as u32,
        n_stages: 0,
        cache: [PrefixCache::Off, PrefixCache::Exact, PrefixCache::Full][random.below(3) as usize],
        image_tokens: [0, 300, 2000][random.below(3) as usize],
        task: Task::Generate,
        can_rewind: !seed.is_multiple_of(4),
    };
    let n_stages = 1 + random.below(4);
    let costs: Vec<Cost> = (0..n_stages)
        .map(|_| Cost {
            decode_us: 1000 + random.below(9000),
            decode_row_us: 100 + random.below(900),
            chunk_least_us: 1000 + random.below(9000),
            chunk_row_us: 20 + random.below(500),
        })
        .collect();
    let mut world = World::new(limits, &costs, seed);
    world.failures = [0, 5, 40][random.below(3) as usize];
    let load = Load {
        n_sessions: 300,
        n_tenants: 1 + random.below(3),
        n_priorities: 1 + random.below(3),
        cancels: [0, 20, 60][random.below(3) as usize],
        deadlines: [0, 30][random.below(2) as usize],
        pause_us: [2_000, 20_000, 200_000][random.below(3) as usize],
        longest_answer: 1 + random.below(60),
        losses: [0, 10, 60][random.below(3) as usize],
    };
    world.has_losses = load.losses > 0;
    (world, load)
}

/// A prompt: new, with one of a few beginnings that all tenants use, or a conversation that goes on.
fn prompt(world: &mut World, tenant: TenantId) -> Vec<Token> {
    let context = u64::from(world.scheduler.limits.context);
    let callers = &world.callers;
    let random = &mut world.random;
    let mut tokens: Vec<Token> = Vec::new();
    match random.below(4) {
        0 => {}
        1 => {
            let before = callers.values().rev().take(30).filter(|caller| caller.tenant == tenant);
            let before: Vec<_> = before.filter(|caller| caller.outcome == Some(Outcome::Answered)).collect();
            if !before.is_empty() {
                tokens.clone_from(&before[random.below(before.len() as u64) as usize].tokens);
            }
        }
        kind => {
            let (shared, length) = (kind * 1000 + random.below(2) * 500, random.below(context));
            tokens.extend((0..length).map(|at| (shared + at) as Token));
        }
    }
    let n_new = if random.percent(30) { random.below(3) } else { random.below(context / 2) };
    tokens.extend((0..n_new).map(|_| random.below(500) as Token));
    tokens.truncate(context as usize - 1);
    if tokens.is_empty() {
        tokens.push(7);
    }
    tokens
}

/// Whoever comes earlier is not overtaken for ever by his equals.
fn check_patience(world: &World, seen: &mut usize, overtaken: &mut std::collections::HashMap<SessionId, u32>) {
    for notice in &world.notices[*seen..] {
        let Notice::Started { session, .. } = notice else { continue };
        let starter = &world.callers[session];
        overtaken.remove(session);
        for (id, caller) in world.callers.range(..*session) {
            let is_equal = (caller.tenant, caller.priority) == (starter.tenant, starter.priority);
            let has_haste = caller.has_deadline || starter.has_deadline || starter.cached.len() > 1;
            if is_equal && !has_haste && caller.cached.is_empty() && caller.outcome.is_none() {
                let n = overtaken.entry(*id).or_default();
                *n += 1;
                assert!(*n <= 2 * world.scheduler.limits.n_slots, "session {id} is overtaken {n} times");
            }
        }
    }
    *seen = world.notices.len();
}

fn simulate(seed: u64) -> World {
    let (mut world, load) = random_world(seed);
    let mut cancels: Vec<Cancel> = Vec::new();
    let (mut seen, mut overtaken) = (0, Default::default());
    for id in 1..=load.n_sessions {
        let next_us = world.now_us + world.random.below(2 * load.pause_us);
        cancels.sort();
        while cancels.first().is_some_and(|(us, _)| *us <= next_us) {
            let (us, id) = cancels.remove(0);
            world.run_until(us);
            if world.callers[&id].outcome.is_none() {
                world.end(id, Outcome::Cancelled);
            }
        }
        if world.random.percent(load.losses) {
            let us = world.now_us + world.random.below(next_us - world.now_us + 1);
            world.run_until(us);
            world.send_all();
            world.lose();
        }
        world.run_until(next_us);
        world.expire();
        check_patience(&world, &mut seen, &mut overtaken);
        let tenant = TenantId(world.random.below(load.n_tenants));
        let soon = |random: &mut Random| next_us + random.below(50 * load.pause_us);
        let deadline = world.random.percent(load.deadlines).then(|| soon(&mut world.random));
        let arrival = Arrival {
            id: SessionId(id),
            prompt: prompt(&mut world, tenant),
            answer: vec![],
            tenant,
            priority: world.random.below(load.n_priorities) as i32,
            at: world.at(world.now_us),
            deadline: deadline.map(|us| world.at(us)),
        };
        let n_answer = 1 + world.random.below(load.longest_answer) as usize;
        world.admit(arrival, n_answer).unwrap();
        if world.random.percent(load.cancels) {
            cancels.push((soon(&mut world.random), SessionId(id)));
        }
        assert!(world.n_passes < 1000 * load.n_sessions, "passes without end");
    }
    world.drain();
    check_patience(&world, &mut seen, &mut overtaken);
    world
}

/// Says which seed it was, if a thread panics.
struct Seed(u64);

impl Drop for Seed {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("seed {}", self.0);
        }
    }
}

#[test]
fn whatever_happens_answers_are_those_of_lone_runs() {
    let (mut n_preempted, mut n_saved, mut n_loaded, mut n_failed, mut n_cached) = (0, 0, 0, 0, 0);
    let (mut n_lost, mut n_whole) = (0, 0);
    for seed in 1..=120 {
        let _seed = Seed(seed);
        let world = simulate(seed);
        n_lost += world.n_lost;
        let can_rewind = world.scheduler.limits.can_rewind;
        for notice in &world.notices {
            match notice {
                Notice::Preempted { .. } => n_preempted += 1,
                Notice::Saved { ok: true, .. } => n_saved += 1,
                Notice::Loaded { ok: true, .. } => n_loaded += 1,
                Notice::Saved { .. } | Notice::Loaded { .. } => n_failed += 1,
                Notice::Started { cached, .. } => {
                    n_cached += u32::from(*cached > 0);
                    n_whole += u32::from(*cached > 0 && !can_rewind);
                }
            }
        }
    }
    let counts = [n_preempted, n_saved, n_loaded, n_failed, n_cached, n_lost as u32, n_whole];
    assert!(counts.iter().all(|n| *n > 100), "the load tries too little: {counts:?}");
}

/// A 1-billion model on one core for each of two stages.
const CORE: Cost = Cost { decode_us: 75_000, decode_row_us: 0, chunk_least_us: 37_000, chunk_row_us: 6_500 };

fn busy_world(n_slots: u32, n_stages: usize) -> World {
    let cache = PrefixCache::Full;
    let limits = Limits {
        n_slots,
        context: 4096,
        chunk: 256,
        n_stages: 0,
        cache,
        image_tokens: 0,
        task: Task::Generate,
        can_rewind: true,
    };
    World::new(limits, &vec![CORE; n_stages], 1)
}

/// Admits a session whose tokens nobody else has, at once.
fn ask(world: &mut World, id: u64, n_prompt: usize, n_answer: usize) -> SessionId {
    let prompt = (0..n_prompt).map(|at| (id as usize * 10_000 + at) as Token).collect();
    let at = world.at(world.now_us);
    let arrival =
        Arrival { id: SessionId(id), prompt, answer: vec![], tenant: TenantId(0), priority: 0, at, deadline: None };
    world.admit(arrival, n_answer).unwrap();
    SessionId(id)
}

#[test]
fn both_stages_work_while_eight_sessions_decode() {
    for n_stages in 1..=4 {
        let mut world = busy_world(8, n_stages);
        let ids: Vec<_> = (1..=8).map(|id| ask(&mut world, id, 20 + 10 * id as usize, 100)).collect();
        world.drain();
        let from = ids.iter().map(|id| world.callers[id].told_us[0]).max().unwrap();
        let to = ids.iter().map(|id| *world.callers[id].told_us.last().unwrap()).min().unwrap();
        let busy = world.busy(from, to);
        assert!(busy.iter().all(|share| *share > 0.9), "{n_stages} stages: {busy:?}");
    }
}

/// Gaps between the tokens of a session's answer from `from` to `to`, in order of length.
fn gaps(world: &World, id: SessionId, from: u64, to: u64) -> Vec<u64> {
    let told = world.callers[&id].told_us.windows(2).filter(|pair| pair[0] >= from && pair[1] <= to);
    let mut gaps: Vec<u64> = told.map(|pair| pair[1] - pair[0]).collect();
    gaps.sort_unstable();
    gaps
}

/// When the first token of a 1,500-token prompt that comes at `comes_us` is told, in microseconds from then.
fn first_token_us(world: &mut World, comes_us: u64) -> u64 {
    world.run_until(comes_us);
    let id = ask(world, 9, 1500, 2);
    world.drain();
    world.callers[&id].told_us[0] - comes_us
}

#[test]
fn nobody_waits_long_behind_a_long_prompt_nor_it_behind_them() {
    for n_stages in 1..=6 {
        for comes_us in (30_000_000..30_300_000).step_by(25_000) {
            let mut alone = busy_world(5, n_stages);
            ask(&mut alone, 1, 100, 20);
            let lone_us = first_token_us(&mut alone, comes_us);
            let mut world = busy_world(5, n_stages);
            let streams: Vec<_> = (1..=4).map(|id| ask(&mut world, id, 30, 400)).collect();
            let us = first_token_us(&mut world, comes_us);
            let slower = us as f64 / lone_us as f64;
            assert!(slower <= 1.5, "{n_stages} stages: the prompt takes {slower:.2} times as long as alone");
            for id in streams {
                let quiet = gaps(&world, id, comes_us / 2, comes_us);
                let median = quiet[quiet.len() / 2];
                let largest = *gaps(&world, id, comes_us / 2, comes_us + us + 2_000_000).last().unwrap();
                let longer = largest as f64 / median as f64;
                assert!(longer <= 4.0, "{n_stages} stages, session {id}: a gap of {longer:.2} medians");
            }
        }
    }
}

#[test]
fn sessions_that_travelled_apart_come_together_again() {
    for (n_stages, n_sessions) in (1..=5).flat_map(|n_stages| (1..=9).map(move |n| (n_stages, n))) {
        let mut world = busy_world(9, n_stages);
        for id in 1..=n_sessions {
            // Each comes at another moment, and one leaves soon.
            ask(&mut world, id, 10 + 7 * id as usize, if id == 3 { 5 } else { 200 });
            world.run_until(id * 170_000);
        }
        world.drain();
        let told = &world.callers[&SessionId(1)].told_us;
        let gap = told[150] - told[149];
        assert_eq!(gap, 75_000 * n_stages as u64, "{n_sessions} sessions, {n_stages} stages");
    }
}

#[test]
fn the_chunks_of_a_lone_prompt_overlap() {
    let first_us = |n_stages: usize, n_prompt: usize| {
        let mut world = busy_world(1, n_stages);
        ask(&mut world, 1, 100, 20);
        world.run_until(30_000_000);
        let id = ask(&mut world, 2, n_prompt, 1);
        world.drain();
        (world.callers[&id].told_us[0] - 30_000_000) as f64 / n_stages as f64
    };
    for n_prompt in [512, 1500] {
        // Of a model cut into two, compared to the same model whole.
        let share = first_us(2, n_prompt) / first_us(1, n_prompt);
        assert!(share <= 0.65, "{n_prompt} tokens: {share:.2}");
    }
}
