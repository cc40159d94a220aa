//! `docs/should-i-cluster.md`, written by the planner: what typical homes get from their machines, together and apart.
//!
//! Homes are descriptions of clusters as users write them; devices, links and models come from the planner's catalogue.
//! With `--check` nothing is written; it fails where the file is not what would be written, and so does a test.

use std::fmt::Write as _;
use std::path::Path;

use brigade_plan::catalogue::models::{self, Quant};
use brigade_plan::catalogue::{Catalogue, Scenario};
use brigade_plan::{
    AlternativeKind, Coordinator, Demand, Forecast, Links, ModelProfile, NodeProfile, PlanError, Study, figure, place,
    seconds, study,
};
use clap::Args;

use crate::failure::{Failure, Outcome};
use crate::output::line;

/// Where the guide is.
const PATH: &str = "docs/should-i-cluster.md";

/// Tokens of a session.
const CONTEXT: u32 = 4096;

/// Sessions at once.
const STREAMS: u32 = 4;

/// Rows of a batch, as `brigade serve` has them.
const MAX_ROWS: u32 = 256 + STREAMS;

/// What to do with the guide.
#[derive(Debug, Args)]
pub struct GuideArgs {
    /// Write nothing, and fail if the file is out of date
    #[arg(long)]
    check: bool,
}

/// A home.
struct Home {
    title: &'static str,
    /// What people there ask themselves.
    about: &'static str,
    /// As for `brigade plan --cluster`.
    cluster: &'static str,
    /// Name and quantisation.
    models: &'static [(&'static str, Quant)],
}

const HOMES: &[Home] = &[
    Home {
        title: "A gaming PC and a MacBook",
        about: "An RTX 3090 and a MacBook Pro with an M3 Max, on gigabit Ethernet.",
        cluster: r#"
[defaults]
link = "1gbe"
[[node]]
name = "gaming-pc"
device = "rtx-3090"
memory = "23GiB"
[[node]]
name = "macbook"
device = "apple-m3-max"
memory = "36GiB"
"#,
        models: &[
            ("llama-3.1-8b", Quant::Q8_0),
            ("qwen3-32b", Quant::Q4_K_M),
            ("llama-3.3-70b", Quant::Q4_K_M),
            ("gpt-oss-120b", Quant::MXFP4),
        ],
    },
    Home {
        title: "Two Mac Studios on a Thunderbolt 5 cable",
        about: "Two M3 Ultra with 256 GiB each.",
        cluster: r#"
[defaults]
link = "thunderbolt-5"
[[node]]
name = "studio"
device = "apple-m3-ultra"
memory = "240GiB"
count = 2
"#,
        models: &[
            ("llama-3.3-70b", Quant::Q8_0),
            ("qwen3-235b-a22b", Quant::Q4_K_M),
            ("llama-3.1-405b", Quant::Q4_K_M),
            ("deepseek-v3", Quant::Q4_K_M),
        ],
    },
    Home {
        title: "Four mini PCs on a gigabit switch",
        about: "Dual-channel DDR4, 32 GiB each.",
        cluster: r#"
[defaults]
link = "1gbe"
[[node]]
name = "mini"
device = "desktop-ddr4"
memory = "28GiB"
count = 4
"#,
        models: &[
            ("llama-3.1-8b", Quant::Q4_K_M),
            ("qwen3-30b-a3b", Quant::Q4_K_M),
            ("llama-3.3-70b", Quant::Q4_K_M),
            ("gpt-oss-120b", Quant::MXFP4),
        ],
    },
    Home {
        title: "An old server and a gaming PC",
        about: "A Xeon E5 with 192 GiB and an RTX 4080, on 2.5 gigabit Ethernet.",
        cluster: r#"
[defaults]
link = "2.5gbe"
[[node]]
name = "server"
device = "xeon-e5-2680-v4"
memory = "180GiB"
[[node]]
name = "gaming-pc"
device = "rtx-4080"
memory = "15GiB"
"#,
        models: &[
            ("llama-3.1-8b", Quant::Q8_0),
            ("qwen3-32b", Quant::Q4_K_M),
            ("llama-3.3-70b", Quant::Q4_K_M),
            ("gpt-oss-120b", Quant::MXFP4),
        ],
    },
    Home {
        title: "Five Raspberry Pis",
        about: "Raspberry Pi 5 with 8 GiB each, on gigabit Ethernet.",
        cluster: r#"
[defaults]
link = "1gbe"
[[node]]
name = "pi"
device = "raspberry-pi-5"
memory = "7GiB"
count = 5
"#,
        models: &[("llama-3.2-3b", Quant::Q4_0), ("llama-3.1-8b", Quant::Q4_0), ("qwen3-30b-a3b", Quant::Q4_0)],
    },
    Home {
        title: "A desktop and a laptop on Wi-Fi",
        about: "An RTX 4070 on a cable, and a DDR5 laptop on Wi-Fi 6.",
        cluster: r#"
[defaults]
link = "1gbe"
[[node]]
name = "desktop"
device = "rtx-4070"
memory = "11GiB"
[[node]]
name = "laptop"
device = "laptop-ddr5"
memory = "24GiB"
link = "wifi-6"
"#,
        models: &[("llama-3.1-8b", Quant::Q4_K_M), ("qwen3-14b", Quant::Q4_K_M), ("qwen3-32b", Quant::Q4_K_M)],
    },
    Home {
        title: "A rented GPU",
        about: "A desktop with an RTX 3090, and an H100 thirty milliseconds away at 100 Mbit/s.",
        cluster: r#"
[[node]]
name = "desktop"
device = "rtx-3090"
memory = "23GiB"
[[node]]
name = "rented"
device = "h100-pcie"
memory = "76GiB"
link = "wan-30ms-100mbit"
"#,
        models: &[("qwen3-32b", Quant::Q4_K_M), ("llama-3.3-70b", Quant::Q4_K_M), ("llama-3.3-70b", Quant::Q8_0)],
    },
];

/// Links that are compared, by their names in the catalogue.
const LINKS: [&str; 9] = [
    "wan-100ms-100mbit",
    "wan-30ms-100mbit",
    "wan-10ms-1gbit",
    "wifi-6",
    "1gbe",
    "2.5gbe",
    "10gbe",
    "thunderbolt-5",
    "100gbe",
];

/// Writes the guide, or checks it.
pub fn run(root: &Path, args: &GuideArgs) -> Outcome {
    let path = root.join(PATH);
    if args.check {
        check(root)?;
        return line(format_args!("{PATH} is up to date"));
    }
    std::fs::write(&path, guide()?).map_err(Failure::io(PATH))?;
    line(format_args!("wrote {PATH}"))
}

fn check(root: &Path) -> Outcome {
    let found = std::fs::read_to_string(root.join(PATH)).map_err(Failure::io(PATH))?;
    if found == guide()? {
        return Ok(());
    }
    Err(Failure::said(format!("{PATH} is not what the planner says now; run `cargo xtask guide` and commit it")))
}

fn demand() -> Demand {
    Demand { context: CONTEXT, parallel: STREAMS, max_rows: MAX_ROWS, ..Demand::default() }
}

fn guide() -> Outcome<String> {
    let mut text = INTRODUCTION.trim_start().to_owned();
    for home in HOMES {
        text.push_str(&of_home(home)?);
    }
    text.push_str(&links_section()?);
    text.push_str(&routing_section()?);
    text.push_str(CLOSING);
    Ok(text)
}

const INTRODUCTION: &str = "
# Should I cluster?

*Written by `cargo xtask guide` from the planner and its catalogue. All numbers are predictions from data sheets and
published measurements; expect them to be off by a quarter. `brigade plan` measures your own machines.*

**Three questions decide it.**

1. *Does the model fit on one of your machines?* Then that machine alone answers one person soonest, as a rule: a token
   goes through all layers one after the other, so a second machine cannot work on it at the same time, and the way
   there and back is added.
2. *Does it fit on several that are about as fast, and do several people ask at once?* Then run a copy on each and deal
   the requests out: tokens per second add up, and no token crosses a cable. Brigade does not route over copies yet: run
   one `brigade serve` on each and a load balancer before them. A copy on a machine that is much slower than the best
   one brings nothing, and a single machine that serves all streams at once may be as good.
3. *Does it fit on none?* Then a cluster is what lets you run it at all. It is about as fast as one machine with the
   memory of all of them and a speed between theirs; a cable instead of Wi-Fi matters, the fastest switch hardly.

So a cluster buys **capacity** first. It buys **throughput** where several streams keep all stages busy. It never buys
**latency** for a model that one fast machine could hold.

The tables say for each model what the best machine alone gives, what the best split gives, and what copies give: tokens
per second of one stream, and in brackets of four streams together. Sessions have 4,096 tokens. *First token* is how
long it takes behind a prompt of 512 tokens, with what is advised.
";

/// A forecast as a cell: one stream, and all of them.
fn cell(forecast: &Forecast) -> String {
    format!("{} ({})", figure(forecast.tokens_per_s), figure(forecast.streams_tokens_per_s))
}

fn of_home(home: &Home) -> Outcome<String> {
    let scenario = Scenario::parse(home.cluster).map_err(|error| Failure::said(format!("{}: {error}", home.title)))?;
    let mut text = format!("\n## {}\n\n{}\n\n", home.title, home.about);
    text.push_str("| Model | Alone | Split | First token | Copies | What to do |\n|---|---|---|---|---|---|\n");
    for (name, quant) in home.models {
        let model = models::profile(name, *quant).map_err(Failure::said)?;
        let _ = writeln!(text, "| {name} {quant} | {} |", row(&model, &scenario).join(" | "));
    }
    Ok(text)
}

/// What a home gets of a model: alone, split, first token, copies, and what to do.
fn row(model: &ModelProfile, scenario: &Scenario) -> Vec<String> {
    let nodes = scenario.profiles(model);
    let links = scenario.links();
    let found = match study(model, &nodes, &links, &demand(), Coordinator::Anywhere) {
        Ok(found) => found,
        Err(PlanError::DoesNotFit { missing, .. } | PlanError::WholeDoesNotFit { missing, .. }) => {
            let dash = || "-".to_owned();
            return vec![dash(), dash(), dash(), dash(), format!("does not fit: {missing} are missing")];
        }
        Err(error) => return vec![error.to_string()],
    };
    let alone = alone(model, &nodes, &links);
    let split = split(model, &nodes, &links, scenario);
    let copies = found.alternatives.iter().find(|other| other.kind == AlternativeKind::Replicas);
    let said = |found: &Option<(String, Forecast)>, none: &str| {
        found.as_ref().map_or_else(|| none.to_owned(), |(name, forecast)| format!("{name} {}", cell(forecast)))
    };
    let copies_said = copies.and_then(|copies| copies.forecast).map_or_else(|| "-".to_owned(), |it| cell(&it));
    let advised = better_copies(&found).map(|copies| copies.forecast.first_token_s);
    let first = advised.or(found.plan.prediction.as_ref().map(|it| it.first_token_s));
    let first = first.map_or_else(|| "?".to_owned(), seconds);
    vec![said(&alone, "fits on none"), said(&split, "-"), first, copies_said, verdict(&found, &alone)]
}

/// Copies, where the plan is a split and they answer no slower: no token crosses a cable then, and one machine that
/// fails stops nobody but its own callers.
fn better_copies(found: &Study) -> Option<Copies> {
    let split = Some(&found.plan).filter(|plan| plan.stages.len() > 1)?.prediction.as_ref()?;
    let copies = found.alternatives.iter().find(|other| other.kind == AlternativeKind::Replicas)?;
    let forecast = copies.forecast?;
    let is_no_slower =
        forecast.tokens_per_s >= split.tokens_per_s && forecast.streams_tokens_per_s >= split.streams_tokens_per_s;
    let n_used = copies.members.iter().filter(|member| member.streams > 0).count();
    is_no_slower.then_some(Copies { n_used, forecast, split_first_token_s: split.first_token_s })
}

/// Whole models that are better than a split.
struct Copies {
    /// How many of them serve anybody.
    n_used: usize,
    forecast: Forecast,
    /// Seconds until the first token with the split: its stages work on the chunks of a lone prompt all at once.
    split_first_token_s: f64,
}

impl Copies {
    fn verdict(&self) -> String {
        let mut said = format!("a copy on each of {}", self.n_used);
        let sooner = self.forecast.first_token_s / self.split_first_token_s;
        if sooner > 1.1 {
            let _ = write!(said, "; split, a lone prompt is read {}x as fast", figure(sooner));
        }
        said
    }
}

/// The fastest node that can hold the model.
fn alone(model: &ModelProfile, nodes: &[NodeProfile], links: &Links) -> Option<(String, Forecast)> {
    let of = |node: &NodeProfile| {
        let plan = place(model, std::slice::from_ref(node), links, &demand()).ok()?;
        Some((node.name.clone(), Forecast::from(plan.prediction.as_ref()?)))
    };
    nodes.iter().filter_map(of).max_by(|a, b| a.1.tokens_per_s.total_cmp(&b.1.tokens_per_s))
}

/// The best split over all nodes that take part in one.
fn split(
    model: &ModelProfile,
    nodes: &[NodeProfile],
    links: &Links,
    scenario: &Scenario,
) -> Option<(String, Forecast)> {
    let free = study(model, nodes, links, &demand(), Coordinator::Anywhere).ok()?.plan;
    let plan = if free.stages.len() > 1 {
        free
    } else {
        let all = Demand { spread: true, ..demand() };
        brigade_plan::place_anywhere(model, nodes, links, &all).ok()?
    };
    if plan.stages.len() < 2 {
        return None;
    }
    let used = match (plan.stages.len(), scenario.nodes.len()) {
        (used, all) if used == all => format!("on {used},"),
        (used, all) => format!("on {used} of {all},"),
    };
    Some((used, Forecast::from(plan.prediction.as_ref()?)))
}

fn verdict(found: &Study, alone: &Option<(String, Forecast)>) -> String {
    if let Some(copies) = better_copies(found) {
        return copies.verdict();
    }
    let copies = found.alternatives.iter().find(|other| other.kind == AlternativeKind::Replicas);
    let copies = copies.and_then(|copies| copies.forecast);
    let chosen = found.plan.prediction.as_ref().map(Forecast::from);
    let routed = match (copies, chosen) {
        (Some(copies), Some(chosen)) if copies.streams_tokens_per_s > 1.1 * chosen.streams_tokens_per_s => {
            format!(
                "; for several people a copy on each, {}x as much",
                figure(copies.streams_tokens_per_s / chosen.streams_tokens_per_s)
            )
        }
        _ => String::new(),
    };
    match (found.plan.stages.len(), alone) {
        (1, _) => format!("use {} alone{routed}", found.plan.stages[0].name),
        (_, None) => "split: it fits on none alone".to_owned(),
        (_, Some(_)) => format!("split{routed}"),
    }
}

/// Two machines that need each other, on every kind of link.
fn links_section() -> Outcome<String> {
    let mut text = String::from(
        "\n## What each link buys\n\nTwo PCs with an RTX 3090 each and llama-3.3-70b in IQ4_XS, which fits on neither \
         alone. On Wi-Fi is one of\nthe two; with both the delay is twice as long.\n\n\
         | Link | One stream | Four streams | First token | Share of a token's time on the way |\n\
         |---|---|---|---|---|\n",
    );
    let model = models::profile("llama-3.3-70b", Quant::IQ4_XS).map_err(Failure::said)?;
    let mut rates = Vec::new();
    for name in LINKS {
        let link = Catalogue::built_in().link(name).map_err(Failure::said)?;
        let scenario = format!(
            "[[node]]\nname = \"pc\"\ndevice = \"rtx-3090\"\nmemory = \"23GiB\"\ncount = 2\n\
             [[pair]]\nbetween = [\"pc\", \"pc\"]\nlink = \"{name}\"\n"
        );
        let scenario = Scenario::parse(&scenario).map_err(Failure::said)?;
        let nodes = scenario.profiles(&model);
        let plan = place(&model, &nodes, &scenario.links(), &demand()).map_err(Failure::said)?;
        let prediction = plan.prediction.ok_or_else(|| Failure::said("a device has no speed"))?;
        let hops: f64 = prediction.stages.iter().map(|stage| stage.hop_s).sum();
        rates.push((name, prediction.tokens_per_s));
        let _ = writeln!(
            text,
            "| {} | {} | {} | {} | {:.0} % |",
            link.title,
            figure(prediction.tokens_per_s),
            figure(prediction.streams_tokens_per_s),
            seconds(prediction.first_token_s),
            100.0 * hops * prediction.tokens_per_s
        );
    }
    let rate = |wanted: &str| rates.iter().find(|(name, _)| *name == wanted).map_or(1.0, |(_, rate)| *rate);
    let gain = |better: &str, worse: &str| 100.0 * (rate(better) / rate(worse) - 1.0);
    let _ = writeln!(
        text,
        "\nA token's hidden state is a few KiB, so a link's delay matters and its width hardly does: from Wi-Fi to a \
         gigabit cable\nthe lone stream gains {:.0} %, from there to 10 gigabit {:.0} %. Width matters for long \
         prompts and many streams.",
        gain("1gbe", "wifi-6"),
        gain("10gbe", "1gbe")
    );
    Ok(text)
}

/// When copies beat a split: the same machines, more and more streams.
fn routing_section() -> Outcome<String> {
    let mut text = String::from(
        "\n## Copies against a split\n\nTwo PCs with an RTX 3090 each on 2.5 gigabit Ethernet and llama-3.1-8b in Q8_0, \
         which fits on both: tokens per second\nof all streams together.\n\n| Streams | One PC | Split over both | A \
         copy on each |\n|---|---|---|---|\n",
    );
    let model = models::profile("llama-3.1-8b", Quant::Q8_0).map_err(Failure::said)?;
    let scenario = Scenario::parse(
        "[[node]]\nname = \"pc\"\ndevice = \"rtx-3090\"\nmemory = \"23GiB\"\ncount = 2\nlink = \"2.5gbe\"\n",
    )
    .map_err(Failure::said)?;
    let (nodes, links) = (scenario.profiles(&model), scenario.links());
    for streams in [1, 2, 4, 8, 16] {
        let demand = Demand { parallel: streams, max_rows: 256 + streams, ..demand() };
        let rate = |plan: Result<brigade_plan::Plan, PlanError>| {
            let prediction = plan.ok().and_then(|plan| plan.prediction);
            prediction.map_or_else(|| "-".to_owned(), |it| figure(it.streams_tokens_per_s))
        };
        let alone = rate(place(&model, &nodes[..1], &links, &demand));
        let split = rate(place(&model, &nodes, &links, &Demand { spread: true, ..demand.clone() }));
        let found = study(&model, &nodes, &links, &demand, Coordinator::Last).map_err(Failure::said)?;
        let copies = found.alternatives.iter().find(|other| other.kind == AlternativeKind::Replicas);
        let copies = copies.and_then(|copies| copies.forecast);
        let copies = copies.map_or_else(|| "-".to_owned(), |it| figure(it.streams_tokens_per_s));
        let _ = writeln!(text, "| {streams} | {alone} | {split} | {copies} |");
    }
    Ok(text)
}

const CLOSING: &str = "
## And now with your machines

```bash
brigade plan llama-3.3-70b --node desk=23GiB@rtx-3090 --node mac=36GiB@apple-m3-max --explain
brigade plan model.gguf --cluster cluster.toml --explain
brigade plan model.gguf
```

The last one measures; inside a running cluster it knows all machines and links. [planning.md](planning.md) explains
what is printed, and how to write `cluster.toml`.
";

#[cfg(test)]
mod tests {
    use super::*;

    /// The rules in the introduction, held against the tables below it.
    #[test]
    fn rows_follow_the_rules() {
        let advised = |name: &str, quant, cluster: &str| {
            let model = models::profile(name, quant).unwrap();
            row(&model, &Scenario::parse(cluster).unwrap()).swap_remove(4)
        };
        let pcs = "[[node]]\nname='pc'\ndevice='desktop-ddr4'\nmemory='28GiB'\ncount=4\n";
        let copies = advised("llama-3.1-8b", Quant::Q4_K_M, pcs);
        assert!(copies.starts_with("a copy on each of 4; split, a lone prompt is read "), "{copies}");
        let unlike = "[[node]]\nname='a'\ndevice='h100-pcie'\nmemory='70GiB'\n\
                      [[node]]\nname='b'\ndevice='raspberry-pi-5'\nmemory='15GiB'\n";
        assert_eq!(advised("llama-3.1-8b", Quant::Q4_K_M, unlike), "use a alone");
        assert_eq!(advised("llama-3.3-70b", Quant::Q4_K_M, pcs), "split: it fits on none alone");
        let table = of_home(&HOMES[2]).unwrap();
        assert!(table.contains("| gpt-oss-120b MXFP4 |") && table.contains("| llama-3.1-8b Q4_K_M |"), "{table}");
    }

    #[test]
    fn the_guide_is_what_the_planner_says() {
        check(&crate::root()).unwrap_or_else(|failure| panic!("{failure}"));
    }
}
