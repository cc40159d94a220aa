//! What people are told about a choice: who is used and why, who is not and what it would cost.

use brigade_base::ByteSize;

use super::cuts::{Cut, Cutter};
use super::{Choice, WORTH_A_SPLIT, cost};
use crate::predict::objective;
use crate::words::listed;
use crate::{Bound, Optimize, Prediction};

/// Idle nodes of which each is given a line: a screen full.
const MAX_IDLE_LINES: usize = 8;

/// Stages of the longest ring into which an idle node is put everywhere to see what it would cost; in longer ones it is
/// put before the coordinator only.
const MAX_TRIED_STAGES: usize = 16;

/// Changes below this share are said to be none.
const NO_CHANGE: f64 = 0.005;

/// Why the choice was made, one thought per line.
pub(crate) fn explain(choice: &Choice, prediction: Option<&Prediction>) -> Vec<String> {
    let mut lines = Vec::new();
    let Some(best) = choice.best() else { return lines };
    lines.push(if best.ring.len() == 1 { alone(choice) } else { together(choice, best) });
    lines.extend(unused_cuts(choice, best));
    lines.extend(idle(choice, best));
    lines.extend(unknown_speeds(choice));
    if let Some(prediction) = prediction {
        lines.extend(bounds(choice, best, prediction));
    }
    lines
}

fn name<'a>(choice: &Choice<'a>, node: usize) -> &'a str {
    &choice.problem.nodes[node].name
}

/// Names of nodes in a row.
fn names(choice: &Choice, nodes: impl IntoIterator<Item = usize>) -> String {
    listed(&nodes.into_iter().map(|node| name(choice, node)).collect::<Vec<_>>())
}

/// What the cost is about.
fn subject(choice: &Choice) -> String {
    let n = choice.problem.demand.parallel.max(1);
    match objective(choice.problem.demand) {
        Optimize::Latency => "a lone request".to_owned(),
        Optimize::Throughput => format!("a token for each of {n} sessions"),
        Optimize::Balanced | Optimize::Memory => format!("a token (of one session, and of {n} at once)"),
    }
}

/// How much longer than `base` something takes, in words that follow a verb like "takes".
fn compared(cost: f64, base: f64) -> String {
    let change = cost / base - 1.0;
    match change {
        _ if change >= 1.0 => format!("{:.1} times as long", cost / base),
        _ if change >= NO_CHANGE => format!("{:.0} % longer", change * 100.0),
        _ if change <= -NO_CHANGE => format!("only {:.0} % less time", -change * 100.0),
        _ => "as long".to_owned(),
    }
}

fn alone(choice: &Choice) -> String {
    let (Some(solo), Some(node)) = (&choice.solo, choice.solo.as_ref().map(|solo| solo.ring[0])) else {
        return String::new();
    };
    let tail = name(choice, node);
    if choice.problem.nodes.len() == 1 {
        return "The coordinator holds the whole model.".to_owned();
    }
    let Some(split) = &choice.split else {
        return format!("{tail} holds the whole model; no other node can take a part of it.");
    };
    let threshold = if split.cost < solo.cost {
        format!("; less than {:.0} % is not worth a further machine", WORTH_A_SPLIT * 100.0)
    } else {
        String::new()
    };
    // Where any node may coordinate, the best split may be one without this node.
    let ring = split.ring.iter().copied();
    let with = if split.ring.contains(&node) {
        format!("with {} too", names(choice, ring.filter(|other| *other != node)))
    } else {
        format!("split over {}", names(choice, ring))
    };
    format!(
        "{tail} holds the whole model alone: {with}, {} would take {}{threshold}. --spread splits it all the same.",
        subject(choice),
        compared(split.cost, solo.cost),
    )
}

fn together(choice: &Choice, best: &Cut) -> String {
    let tail = name(choice, choice.problem.tail);
    let with = format!("The model is split over {}", names(choice, best.ring.iter().copied()));
    match &choice.solo {
        _ if choice.problem.demand.spread => format!("{with}: --spread asks for every node."),
        None => format!("{with}: {tail} alone could not hold it."),
        Some(solo) => format!(
            "{with}: {} takes {:.0} % less time than on {} alone.",
            subject(choice),
            (1.0 - best.cost / solo.cost) * 100.0,
            name(choice, solo.ring[0]),
        ),
    }
}

fn unused_cuts(choice: &Choice, best: &Cut) -> Option<String> {
    let cuts = choice.problem.units.len() - 1;
    let is_short = choice.problem.demand.spread && best.ring.len() < choice.problem.nodes.len();
    is_short.then(|| format!("The model has only {cuts} places to cut, so not every node gets a stage."))
}

/// A line for each node that gets nothing.
fn idle(choice: &Choice, best: &Cut) -> Vec<String> {
    let problem = &choice.problem;
    let is_idle = |node: &usize| !best.ring.contains(node);
    let n_idle = (0..problem.nodes.len()).filter(is_idle).count();
    // Of one alone the first line says it already, if there is only one other.
    if best.ring.len() == 1 && n_idle == 1 && choice.split.is_some() {
        return Vec::new();
    }
    let mut cutter = Cutter::new(problem, &choice.scenarios);
    let mut lines: Vec<String> = (0..problem.nodes.len())
        .filter(is_idle)
        .take(MAX_IDLE_LINES)
        .map(|node| format!("{} stays idle: {}", name(choice, node), why_idle(choice, &mut cutter, best, node)))
        .collect();
    if n_idle > MAX_IDLE_LINES {
        lines.push(format!("{} more nodes stay idle.", n_idle - MAX_IDLE_LINES));
    }
    lines
}

fn why_idle(choice: &Choice, cutter: &mut Cutter, best: &Cut, node: usize) -> String {
    let problem = &choice.problem;
    if problem.most(node, false) == 0 {
        let least = (0..problem.units.len()).map(|at| problem.units.needs(at, at + 1, false)).min().unwrap_or(0);
        let usable = problem.usable(node);
        return format!(
            "it can use {}, and the smallest part of the model needs {}.",
            ByteSize(usable),
            ByteSize(least)
        );
    }
    if best.ring.len() >= problem.units.len() {
        return "there is no further place to cut the model.".to_owned();
    }
    let n_workers = best.ring.len() - 1;
    let first = if best.ring.len() > MAX_TRIED_STAGES { n_workers } else { 0 };
    let mut with: Option<Cut> = None;
    for at in first..=n_workers {
        let mut ring = best.ring.clone();
        ring.insert(at, node);
        with = cutter.cut(&ring, cost(with.as_ref())).or(with);
    }
    match with {
        None => "with one stage more the model could not be cut so that all fits.".to_owned(),
        Some(with) => format!("with it, {} would take {}.", subject(choice), compared(with.cost, best.cost)),
    }
}

fn unknown_speeds(choice: &Choice) -> Option<String> {
    let unknown = choice.problem.nodes.iter().filter(|node| node.speed.is_none());
    let first = unknown.clone().next()?;
    Some(match unknown.count() {
        1 => format!("The speed of {} is not known; it is taken to be that of the slowest other node.", first.name),
        n => format!("The speed of {n} nodes is not known; it is taken to be that of the slowest other node."),
    })
}

/// What bounds one stream and all of them.
fn bounds(choice: &Choice, best: &Cut, prediction: &Prediction) -> Vec<String> {
    let stage = |k: usize| best.ring.get(k).map_or("", |&node| name(choice, node));
    let next = |k: usize| stage((k + 1) % best.ring.len());
    let one = match prediction.bound {
        _ if best.ring.len() == 1 => None,
        Bound::Compute(k) => prediction.stages.get(k).map(|s| {
            let share = s.compute_s * prediction.tokens_per_s * 100.0;
            format!("A lone stream waits for {} most: it computes for {share:.0} % of each token's time.", stage(k))
        }),
        Bound::Link(k) => prediction.stages.get(k).map(|s| {
            let share = s.hop_s * prediction.tokens_per_s * 100.0;
            format!(
                "A lone stream waits most for the link from {} to {}: {share:.0} % of each token's time.",
                stage(k),
                next(k)
            )
        }),
        Bound::RoundTrip => None,
    };
    let n = prediction.streams;
    let many = match prediction.streams_bound {
        _ if best.ring.len() == 1 || n < 2 => None,
        Bound::Compute(k) => Some(format!("{n} streams together go as fast as {} computes.", stage(k))),
        Bound::Link(k) => {
            Some(format!("{n} streams together go as fast as the link from {} to {} carries.", stage(k), next(k)))
        }
        Bound::RoundTrip => {
            Some(format!("{n} streams together do not keep all nodes busy: the way around takes longer."))
        }
    };
    one.into_iter().chain(many).collect()
}
