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
    };
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
        world.run_until(next_us);
        world.expire();
        check_patience(&world, &mut seen, &mut overtaken);
        let tenant = TenantId(world.random.below(load.n_tenants));
        let soon = |random: &mut Random| next_us + random.below(50 * load.pause_us);
        let deadline = world.random.percent(load.deadlines).then(|| soon(&mut world.random));
        let arrival = Arrival {
            id: SessionId(id),
            prompt: prompt(&mut world, tenant),
            tenant,
            priority: world.random.below(load.n_priorities) as i32,
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
    for seed in 1..=40 {
        let _seed = Seed(seed);
        let world = simulate(seed);
        for notice in &world.notices {
            match notice {
                Notice::Preempted { .. } => n_preempted += 1,
                Notice::Saved { ok: true, .. } => n_saved += 1,
                Notice::Loaded { ok: true, .. } => n_loaded += 1,
                Notice::Saved { .. } | Notice::Loaded { .. } => n_failed += 1,
                Notice::Started { cached, .. } => n_cached += u32::from(*cached > 0),
            }
        }
    }
    let counts = [n_preempted, n_saved, n_loaded, n_failed, n_cached];
    assert!(counts.iter().all(|n| *n > 100), "the load tries too little: {counts:?}");
}
