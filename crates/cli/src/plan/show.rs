//! A plan as people read it: who holds what, how fast that will be, what bounds it, and what else could be done.

use std::fmt::Write as _;

use brigade_base::{ByteSize, KvTypes};
use brigade_plan::{Alternative, Bound, Forecast, Plan, Prediction, figure, seconds};

use super::{ModelReport, Report};

/// Room for names; longer ones push their row to the right.
const NAME_WIDTH: usize = 20;

/// The whole report. With `explain` also why, and what else could be done.
pub fn text(report: &Report, explain: bool) -> String {
    let mut text = String::new();
    head(&mut text, report);
    table(&mut text, &report.study.plan, if report.model.pooling.is_some() { "-" } else { "?" });
    match &report.study.plan.prediction {
        Some(prediction) => speed(&mut text, &report.study.plan, prediction),
        None => line(&mut text, "speed", &no_speed(&report.model)),
    }
    if let Some(cost) = &report.cost {
        cost.lines().iter().for_each(|said| line(&mut text, "power", said));
    }
    let notes = report.model.notes.iter().chain(&report.machines.notes);
    notes.for_each(|note| line(&mut text, "note", note));
    report.study.advice.iter().for_each(|advice| line(&mut text, "advice", advice));
    if explain {
        let is_new = |why: &&String| !report.model.notes.contains(why);
        report.study.plan.explanation.iter().filter(is_new).for_each(|why| line(&mut text, "why", why));
        alternatives(&mut text, &report.study.alternatives, report.parallel);
        what_ifs(&mut text, report);
    }
    text
}

/// Why nothing is said about speed.
fn no_speed(model: &ModelReport) -> String {
    if model.pooling.is_none() {
        return "not known".to_owned();
    }
    let does = if model.purpose == "rank" { "ranks" } else { "embeds" };
    let how = if model.is_at_once { "each whole in one pass" } else { "in chunks, as prompts are" };
    format!("not predicted: this model {does} texts, {how}, and generates none")
}

fn line(text: &mut String, what: &str, said: &str) {
    // Writing to a string cannot fail.
    let _ = writeln!(text, "{what:<8} {said}");
}

fn head(text: &mut String, report: &Report) {
    let model = &report.model;
    let thing = if model.pooling.is_some() { "text" } else { "session" };
    let sessions = match report.parallel {
        1 => format!("1 {thing}"),
        n => format!("{n} {thing}s"),
    };
    let kv = match report.kv {
        Some(kv) if kv != KvTypes::default() => format!(", KV cache in {kv}"),
        _ => String::new(),
    };
    let said = format!(
        "{} {}, {} layers, {}; {sessions} of {} tokens{kv}",
        model.name,
        model.quantisation,
        model.layers,
        ByteSize(model.bytes),
        report.context
    );
    line(text, "model", &said);
    line(text, "for", &report.machines.source);
}

/// Who holds what; `no_share` stands where there is no share of time.
fn table(text: &mut String, plan: &Plan, no_share: &str) {
    let row = |text: &mut String, cells: [&str; 6]| {
        let [name, layers, memory, offered, share, hop] = cells;
        let row = format!("{name:<NAME_WIDTH$} {layers:>9} {memory:>11} {offered:>11} {share:>7}  {hop}");
        let _ = writeln!(text, "{}", row.trim_end());
    };
    text.push('\n');
    row(text, ["node", "layers", "memory", "of", "time", "link"]);
    for (k, stage) in plan.stages.iter().enumerate() {
        let predicted = plan.prediction.as_ref().and_then(|prediction| prediction.stages.get(k));
        let share = predicted.map_or_else(|| no_share.to_owned(), |stage| format!("{:.0} %", stage.share * 100.0));
        let next = &plan.stages[(k + 1) % plan.stages.len()].name;
        let hop = match predicted {
            Some(_) if plan.stages.len() < 2 => String::new(),
            Some(stage) => format!("{} to {next}", seconds(stage.hop_s)),
            None => String::new(),
        };
        let (memory, offered) = (stage.memory.total().to_string(), stage.offered.to_string());
        row(text, [&stage.name, &stage.layers.to_string(), &memory, &offered, &share, &hop]);
    }
    text.push('\n');
}

/// How many streams, as a row of tables and sentences has it.
fn streams(n: u32) -> String {
    if n == 1 { "1 stream".to_owned() } else { format!("{n} streams") }
}

fn speed(text: &mut String, plan: &Plan, prediction: &Prediction) {
    let mut said = format!("{} tokens/s for one stream", figure(prediction.tokens_per_s));
    if prediction.streams > 1 {
        let all = figure(prediction.streams_tokens_per_s);
        said.push_str(&format!(", {all} for {}", streams(prediction.streams)));
    }
    line(text, "speed", &said);
    let first =
        format!("token of a {}-token prompt after {}", prediction.prompt_tokens, seconds(prediction.first_token_s));
    line(text, "first", &first);
    let one = bound(plan, prediction.bound);
    let said = match (prediction.streams, bound(plan, prediction.streams_bound)) {
        (1, _) => format!("one stream by {one}"),
        (n, many) if many == one => format!("one stream and {n} by {one}"),
        (n, many) => format!("one stream by {one}; {n} by {many}"),
    };
    line(text, "bound", &said);
}

fn bound(plan: &Plan, bound: Bound) -> String {
    let name = |k: usize| plan.stages.get(k % plan.stages.len().max(1)).map_or("?", |stage| stage.name.as_str());
    match bound {
        Bound::Compute(k) => format!("computing on {}", name(k)),
        Bound::Link(k) => format!("the link from {} to {}", name(k), name(k + 1)),
        Bound::RoundTrip => "the way around the ring".to_owned(),
    }
}

fn alternatives(text: &mut String, all: &[Alternative], n_streams: u32) {
    if all.is_empty() {
        return;
    }
    let many = streams(n_streams);
    let _ = writeln!(text, "\n{:<44} {:>10} {:>10} {:>11}", "instead", "1 stream", many, "first token");
    for other in all {
        let (name, why) = (&other.name, &other.why_not);
        let _ = match &other.forecast {
            Some(forecast) => writeln!(text, "{name:<44} {}", numbers(forecast)),
            None => writeln!(text, "{name:<44} {:>10} {:>10} {:>11}", "?", "?", "?"),
        };
        if other.stages.len() > 1 {
            let stages: Vec<String> =
                other.stages.iter().map(|stage| format!("{} {}", stage.name, stage.layers)).collect();
            let _ = writeln!(text, "    {}", stages.join(" -> "));
        }
        let _ = writeln!(text, "    {why}");
    }
}

fn numbers(forecast: &Forecast) -> String {
    format!(
        "{:>10} {:>10} {:>11}",
        figure(forecast.tokens_per_s),
        figure(forecast.streams_tokens_per_s),
        seconds(forecast.first_token_s)
    )
}

fn what_ifs(text: &mut String, report: &Report) {
    if report.what_if.is_empty() {
        return;
    }
    let _ = match report.what_if.iter().any(|what_if| what_if.forecast.is_some()) {
        true => {
            let many = streams(report.parallel);
            writeln!(text, "\n{:<44} {:>10} {:>10} {:>11}", "what if", "1 stream", many, "first token")
        }
        false => writeln!(text, "\nwhat if"),
    };
    for what_if in &report.what_if {
        let name = &what_if.change;
        let _ = match &what_if.forecast {
            Some(forecast) => writeln!(text, "{name:<44} {}", numbers(forecast)),
            None => writeln!(text, "{name}"),
        };
        let _ = writeln!(text, "    {}", what_if.effect);
    }
}
