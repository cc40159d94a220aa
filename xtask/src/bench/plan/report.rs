//! From measurements to a verdict: how far predictions are off, tables, the drawing, and Markdown for the documents.

use serde::Serialize;

use super::clusters::ClusterPlan;
use super::measure::{Measurement, Speeds};
use super::plot::Scatter;
use super::search::{Gain, Search};
use crate::bench::median;
use crate::failure::Outcome;
use crate::output::{line, table};

/// How far the median prediction of a speed may be off.
pub const MEDIAN_OFF: f64 = 0.15;

/// How far the worst may be.
pub const WORST_OFF: f64 = 0.30;

/// How far the memory of any node may be off.
const MEMORY_OFF: f64 = 0.05;

/// What the chosen plan may cost beyond the best that was measured.
const MOST_REGRET: f64 = 0.05;

/// By how much measured placement is to be faster than placement by memory on the unequal pair.
const LEAST_GAIN: f64 = 1.5;

/// How many clusters are to be measured, or all where fewer are asked for.
const LEAST_CLUSTERS: usize = 12;

/// What is to be found out beside what each cluster does; what is missing of it counts as not met.
#[derive(Debug, Clone, Default)]
pub struct Wanted {
    /// Clusters on which other plans are to be measured, by their numbers.
    pub searches: Vec<usize>,
    /// The cluster that is to be placed by memory, too.
    pub gain: Option<usize>,
}

/// A speed that is predicted.
struct Quantity {
    name: &'static str,
    unit: &'static str,
    /// Digits behind the point that mean something.
    digits: usize,
    pick: fn(&Speeds) -> f64,
}

/// All of them; the first two are speeds, so that more is better.
const QUANTITIES: [Quantity; 3] = [
    Quantity { name: "one stream", unit: "tokens/s", digits: 1, pick: |speeds| speeds.alone },
    Quantity { name: "8 streams", unit: "tokens/s", digits: 1, pick: |speeds| speeds.together },
    Quantity { name: "first token", unit: "s", digits: 2, pick: |speeds| speeds.first_token_s },
];

/// A cluster and what came of it.
#[derive(Debug, Serialize)]
pub struct ClusterResult {
    /// Its number, from 1.
    pub number: usize,
    /// Its nodes and links in words.
    pub cluster: String,
    /// What was measured; `None` if it could not be.
    pub measurement: Option<Measurement>,
    /// Why not.
    pub failure: Option<String>,
}

impl ClusterResult {
    /// What came of cluster `number`.
    pub fn new(number: usize, plan: &ClusterPlan, outcome: Outcome<Measurement>) -> Self {
        let (measurement, failure) = match outcome {
            Ok(measurement) => (Some(measurement), None),
            Err(failure) => (None, Some(failure.to_string())),
        };
        Self { number, cluster: plan.to_string(), measurement, failure }
    }

    /// Whether a prediction can be held against it.
    fn is_measured(&self) -> bool {
        self.measurement.as_ref().is_some_and(|measurement| measurement.predicted.is_some())
    }
}

/// A line of the verdict.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Verdict {
    what: String,
    /// `None` if nothing was measured for it.
    value: Option<f64>,
    target: f64,
    /// Whether the value is to be that at least, not at most.
    at_least: bool,
    unit: Unit,
    met: bool,
}

/// What a value of a verdict is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Unit {
    Share,
    Factor,
    Count,
}

impl Verdict {
    fn at_most(what: String, value: Option<f64>, target: f64) -> Self {
        Self {
            what,
            value,
            target,
            at_least: false,
            unit: Unit::Share,
            met: value.is_some_and(|value| value <= target),
        }
    }

    fn at_least(what: String, value: Option<f64>, target: f64, unit: Unit) -> Self {
        Self { what, value, target, at_least: true, unit, met: value.is_some_and(|value| value >= target) }
    }

    fn cells(&self) -> [String; 4] {
        let show = |value: f64| match self.unit {
            Unit::Share => percent(value),
            Unit::Factor => format!("{value:.2}x"),
            Unit::Count => format!("{value}"),
        };
        let sign = if self.at_least { ">=" } else { "<=" };
        let met = if self.value.is_none() {
            "not measured"
        } else if self.met {
            "yes"
        } else {
            "NO"
        };
        let value = self.value.map_or("-".to_owned(), show);
        [self.what.clone(), value, format!("{sign} {}", show(self.target)), met.to_owned()]
    }
}

/// A run.
#[derive(Debug, Serialize)]
pub struct Report {
    model: String,
    clusters: Vec<ClusterResult>,
    searches: Vec<Search>,
    gain: Option<Gain>,
    verdicts: Vec<Verdict>,
}

impl Report {
    /// Sums up.
    pub fn new(
        model: String,
        wanted: &Wanted,
        clusters: Vec<ClusterResult>,
        searches: Vec<Search>,
        gain: Option<Gain>,
    ) -> Self {
        let n_measured = clusters.iter().filter(|cluster| cluster.is_measured()).count();
        let least = clusters.len().min(LEAST_CLUSTERS);
        let count = (!clusters.is_empty()).then_some(n_measured as f64);
        let mut verdicts = vec![Verdict::at_least("clusters measured".to_owned(), count, least as f64, Unit::Count)];
        for Quantity { name, pick, .. } in QUANTITIES {
            let off = || clusters.iter().filter_map(|cluster| off_by(cluster.measurement.as_ref()?, pick));
            verdicts.push(Verdict::at_most(format!("{name}, median off by"), middle(off()), MEDIAN_OFF));
            verdicts.push(Verdict::at_most(format!("{name}, worst off by"), worst(off()), WORST_OFF));
        }
        let memory = || clusters.iter().filter_map(|cluster| cluster.measurement.as_ref()).flat_map(memory_off);
        verdicts.push(Verdict::at_most("memory of a node, median off by".to_owned(), middle(memory()), MEMORY_OFF));
        verdicts.push(Verdict::at_most("memory of a node, worst off by".to_owned(), worst(memory()), MEMORY_OFF));
        for number in &wanted.searches {
            let search = searches.iter().find(|search| search.cluster == *number);
            let what = format!("cluster {number}: chosen plan behind the best");
            verdicts.push(Verdict::at_most(what, search.map(Search::regret), MOST_REGRET));
            let what = format!("cluster {number}: of the plans tried, measured");
            verdicts.push(Verdict::at_least(what, search.and_then(Search::measured_share), 1.0, Unit::Share));
        }
        for Quantity { name, pick, .. } in wanted.gain.iter().flat_map(|_| &QUANTITIES[..2]) {
            let came = gain.as_ref().map(|gain| gain.factors(*pick));
            let what = format!("{name}, faster than placed by memory");
            verdicts.push(Verdict::at_least(what, came.map(|came| came.0), LEAST_GAIN, Unit::Factor));
            let off = came.and_then(|(came, expected)| Some((expected? / came - 1.0).abs()));
            verdicts.push(Verdict::at_most(format!("{name}, that factor off by"), off, MEDIAN_OFF));
        }
        Self { model, clusters, searches, gain, verdicts }
    }

    /// Prints tables for people, then Markdown.
    pub fn print(&self) -> Outcome {
        line(format_args!("model   {}", self.model))?;
        line("speeds  in tokens per second; first tokens in seconds, behind a prompt of 512 tokens\n")?;
        table(&self.cluster_rows())?;
        for cluster in &self.clusters {
            if let Some(failure) = &cluster.failure {
                line(format_args!("cluster {} could not be measured: {failure}", cluster.number))?;
            }
        }
        line("")?;
        table(&self.memory_rows())?;
        for search in &self.searches {
            line(format_args!("\ncluster {}: the chosen plan and others", search.cluster))?;
            table(&search_rows(search))?;
        }
        if let Some(gain) = &self.gain {
            line(format_args!("\ncluster {}: placed by what was measured, and by memory", gain.cluster))?;
            table(&gain_rows(gain))?;
        }
        line("")?;
        let head = ["", "value", "target", "met?"].map(str::to_owned);
        let rows = std::iter::once(head).chain(self.verdicts.iter().map(Verdict::cells)).map(Vec::from);
        table(&rows.collect::<Vec<_>>())?;
        line("\nfor the documents:\n")?;
        line(markdown(&self.cluster_rows()))?;
        line("")?;
        self.conclusion().into_iter().try_for_each(line)
    }

    /// What was not met and not measured, at the end where it is seen.
    fn conclusion(&self) -> Vec<String> {
        let failed = self.clusters.iter().filter(|cluster| !cluster.is_measured());
        let failed: Vec<String> = failed.map(|cluster| cluster.number.to_string()).collect();
        let mut lines = Vec::new();
        if !failed.is_empty() {
            lines.push(format!("not measured, or not predicted: clusters {}", failed.join(", ")));
        }
        let unmet: Vec<&Verdict> = self.verdicts.iter().filter(|verdict| !verdict.met).collect();
        if unmet.is_empty() {
            lines.push(format!("all {} targets are met", self.verdicts.len()));
            return lines;
        }
        lines.extend(unmet.iter().map(|verdict| {
            let [what, value, target, met] = verdict.cells();
            format!("{met}: {what} {value}, target {target}")
        }));
        lines.push(format!(
            "{} of {} targets are not met; the exit code does not tell, as a missed target is a finding",
            unmet.len(),
            self.verdicts.len()
        ));
        lines
    }

    /// Panels of predicted against measured.
    pub fn scatters(&self) -> Vec<Scatter> {
        let scatter = |Quantity { name, unit, pick, .. }: &Quantity| {
            let point = |cluster: &ClusterResult| {
                let measurement = cluster.measurement.as_ref()?;
                Some((pick(measurement.predicted.as_ref()?), pick(&measurement.measured)))
            };
            Scatter { title: format!("{name}, {unit}"), points: self.clusters.iter().filter_map(point).collect() }
        };
        QUANTITIES.iter().map(scatter).collect()
    }

    fn cluster_rows(&self) -> Vec<Vec<String>> {
        let mut head = ["cluster", "layers"].map(str::to_owned).to_vec();
        for Quantity { name, .. } in QUANTITIES {
            head.extend([format!("{name}: predicted"), "measured".to_owned(), "ratio".to_owned()]);
        }
        let row = |cluster: &ClusterResult| {
            let mut cells = vec![format!("{}: {}", cluster.number, cluster.cluster)];
            cells.push(cluster.measurement.as_ref().map_or("-".to_owned(), layers));
            for Quantity { digits, pick, .. } in QUANTITIES {
                cells.extend(compared(cluster.measurement.as_ref(), digits, pick));
            }
            cells
        };
        std::iter::once(head).chain(self.clusters.iter().map(row)).collect()
    }

    fn memory_rows(&self) -> Vec<Vec<String>> {
        let head = ["cluster, node", "layers", "predicted, MiB", "resident, MiB", "ratio"].map(str::to_owned).to_vec();
        let mut rows = vec![head];
        let mib = |bytes: u64| format!("{:.0}", bytes as f64 / f64::from(1 << 20));
        for cluster in &self.clusters {
            for node in cluster.measurement.iter().flat_map(|measurement| &measurement.nodes) {
                let ratio = node.predicted_bytes.map(|bytes| bytes as f64 / node.resident_bytes.max(1) as f64);
                rows.push(vec![
                    format!("{}: {}", cluster.number, node.name),
                    node.layers.to_string(),
                    node.predicted_bytes.map_or("-".to_owned(), mib),
                    mib(node.resident_bytes),
                    ratio.map_or("-".to_owned(), |ratio| format!("{ratio:.2}")),
                ]);
            }
        }
        rows
    }
}

fn search_rows(search: &Search) -> Vec<Vec<String>> {
    let head = ["", "one stream", "8 streams", "cost, ms", "predicted, ms"].map(str::to_owned).to_vec();
    let ms = |speeds: &Speeds| format!("{:.1}", speeds.cost_s() * 1000.0);
    let mut tried: Vec<_> =
        search.others.iter().map(|tried| (tried, "")).chain([(&search.chosen, ", chosen")]).collect();
    tried.sort_by(|a, b| {
        let cost = |of: &super::search::Tried| of.measurement.measured.cost_s();
        cost(a.0).total_cmp(&cost(b.0))
    });
    let row = |(tried, note): &(&super::search::Tried, &str)| {
        let Measurement { measured, predicted, .. } = &tried.measurement;
        vec![
            format!("{}{note}", tried.way.text()),
            format!("{:.1}", measured.alone),
            format!("{:.1}", measured.together),
            ms(measured),
            predicted.as_ref().map_or("-".to_owned(), ms),
        ]
    };
    std::iter::once(head).chain(tried.iter().map(row)).collect()
}

fn gain_rows(gain: &Gain) -> Vec<Vec<String>> {
    let head = ["", "layers", "one stream", "8 streams", "first token, s"].map(str::to_owned).to_vec();
    let row = |name: &str, layers: String, speeds: Option<Speeds>| {
        let show = |digits: usize, pick: fn(&Speeds) -> f64| {
            speeds.as_ref().map_or("-".to_owned(), |speeds| format!("{:.digits$}", pick(speeds)))
        };
        vec![name.to_owned(), layers, show(1, |s| s.alone), show(1, |s| s.together), show(2, |s| s.first_token_s)]
    };
    let (measured, memory) = (&gain.measured, &gain.memory);
    vec![
        head,
        row("measured", layers(measured), Some(measured.measured)),
        row("  as predicted", String::new(), measured.predicted),
        row("by memory", layers(memory), Some(memory.measured)),
        row("  as predicted", String::new(), gain.memory_predicted),
    ]
}

/// Layers of each stage, the coordinator's last.
fn layers(measurement: &Measurement) -> String {
    measurement.split().iter().map(u32::to_string).collect::<Vec<_>>().join(" ")
}

/// Predicted, measured, and the ratio of the two.
fn compared(measurement: Option<&Measurement>, digits: usize, pick: fn(&Speeds) -> f64) -> [String; 3] {
    let number = |value: Option<f64>| value.map_or("-".to_owned(), |value| format!("{value:.digits$}"));
    let predicted = measurement.and_then(|m| m.predicted.as_ref()).map(pick);
    let measured = measurement.map(|m| pick(&m.measured));
    let ratio = predicted.zip(measured).map(|(predicted, measured)| predicted / measured);
    [number(predicted), number(measured), ratio.map_or("-".to_owned(), |ratio| format!("{ratio:.2}"))]
}

/// How far a prediction is off, as a share of what was measured.
fn off_by(measurement: &Measurement, pick: fn(&Speeds) -> f64) -> Option<f64> {
    Some((pick(measurement.predicted.as_ref()?) / pick(&measurement.measured) - 1.0).abs())
}

/// The same for the memory of each node.
fn memory_off(measurement: &Measurement) -> Vec<f64> {
    let of = |node: &super::measure::NodeResult| {
        let predicted = node.predicted_bytes? as f64;
        (node.resident_bytes > 0).then(|| (predicted / node.resident_bytes as f64 - 1.0).abs())
    };
    measurement.nodes.iter().filter_map(of).collect()
}

fn middle(values: impl Iterator<Item = f64>) -> Option<f64> {
    let values: Vec<f64> = values.collect();
    (!values.is_empty()).then(|| median(values))
}

fn worst(values: impl Iterator<Item = f64>) -> Option<f64> {
    values.max_by(f64::total_cmp)
}

fn percent(share: f64) -> String {
    format!("{:.1} %", share * 100.0)
}

/// Rows as a Markdown table; all columns but the first hold numbers.
fn markdown(rows: &[Vec<String>]) -> String {
    let line = |cells: &[String]| format!("| {} |", cells.join(" | "));
    let n_columns = rows.first().map_or(0, Vec::len);
    let rule = (0..n_columns).map(|k| if k == 0 { "---" } else { "---:" }.to_owned()).collect::<Vec<_>>();
    let mut lines: Vec<String> = rows.iter().map(|row| line(row)).collect();
    lines.insert(1.min(lines.len()), line(&rule));
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::plan::clusters;
    use crate::bench::plan::measure::NodeResult;
    use crate::bench::plan::search::{Tried, Way};
    use crate::failure::Failure;

    fn speeds(alone: f64, together: f64, first_token_s: f64) -> Speeds {
        Speeds { alone, together, first_token_s }
    }

    fn measurement(predicted: Option<Speeds>, measured: Speeds) -> Measurement {
        let node = |name: &str, layers| NodeResult {
            name: name.to_owned(),
            layers,
            predicted_bytes: Some(104 << 20),
            resident_bytes: 100 << 20,
        };
        Measurement { nodes: vec![node("worker-1", 3), node("coordinator", 13)], predicted, measured }
    }

    fn report() -> Report {
        let plans = clusters::all();
        let came = [
            Ok(measurement(Some(speeds(11.0, 40.0, 1.0)), speeds(10.0, 40.0, 1.0))),
            Ok(measurement(Some(speeds(10.0, 60.0, 1.0)), speeds(10.0, 40.0, 1.1))),
            Err(Failure::said("no root")),
            Ok(measurement(None, speeds(1.0, 1.0, 1.0))),
        ];
        let clusters = came.into_iter().zip(&plans).zip(1..);
        let clusters = clusters.map(|((came, plan), n)| ClusterResult::new(n, plan, came)).collect();
        let tried = |alone| {
            let measurement = measurement(None, speeds(alone, 80.0, 1.0));
            Tried { way: Way::of(&measurement), measurement }
        };
        let search = Search { cluster: 2, chosen: tried(10.0), others: vec![tried(20.0), tried(5.0)], failed: 1 };
        let gain = Gain {
            cluster: 2,
            measured: measurement(Some(speeds(16.0, 50.0, 1.0)), speeds(16.0, 48.0, 1.0)),
            memory: measurement(None, speeds(10.0, 40.0, 1.0)),
            memory_predicted: Some(speeds(10.0, 40.0, 1.0)),
        };
        let wanted = Wanted { searches: vec![2, 4], gain: Some(2) };
        Report::new("m.gguf".to_owned(), &wanted, clusters, vec![search], Some(gain))
    }

    #[test]
    fn predictions_are_held_against_targets() {
        let verdicts: Vec<_> =
            report().verdicts.into_iter().map(|v| (v.what, v.value.map_or("-".into(), percent), v.met)).collect();
        let expected = [
            ("clusters measured", "200.0 %", false),
            ("one stream, median off by", "5.0 %", true),
            ("one stream, worst off by", "10.0 %", true),
            ("8 streams, median off by", "25.0 %", false),
            ("8 streams, worst off by", "50.0 %", false),
            ("first token, median off by", "4.5 %", true),
            ("first token, worst off by", "9.1 %", true),
            ("memory of a node, median off by", "4.0 %", true),
            ("memory of a node, worst off by", "4.0 %", true),
            ("cluster 2: chosen plan behind the best", "33.3 %", false),
            ("cluster 2: of the plans tried, measured", "66.7 %", false),
            ("cluster 4: chosen plan behind the best", "-", false),
            ("cluster 4: of the plans tried, measured", "-", false),
            ("one stream, faster than placed by memory", "160.0 %", true),
            ("one stream, that factor off by", "0.0 %", true),
            ("8 streams, faster than placed by memory", "120.0 %", false),
            ("8 streams, that factor off by", "4.2 %", true),
        ];
        assert_eq!(verdicts, expected.map(|(what, value, met)| (what.to_owned(), value.to_owned(), met)));
    }

    #[test]
    fn what_was_not_measured_is_shown_and_not_counted() {
        let report = report();
        let rows = report.cluster_rows();
        assert!(rows.iter().all(|row| row.len() == rows[0].len()));
        assert_eq!(rows[1][1..5], ["3 13", "11.0", "10.0", "1.10"]);
        assert!(rows[3][1..].iter().all(|cell| cell == "-"));
        assert_eq!(rows[4][2..5], ["-", "1.0", "-"]);
        assert_eq!(report.scatters().iter().map(|s| s.points.len()).collect::<Vec<_>>(), [2, 2, 2]);
        let none = Report::new(String::new(), &Wanted::default(), Vec::new(), Vec::new(), None);
        assert!(none.verdicts.iter().all(|verdict| verdict.value.is_none() && !verdict.met));
        assert_eq!(none.verdicts[0].cells()[3], "not measured");
    }

    #[test]
    fn what_is_not_met_is_said_at_the_end() {
        let lines = report().conclusion();
        assert_eq!(lines[0], "not measured, or not predicted: clusters 3, 4");
        assert_eq!(lines[1], "NO: clusters measured 2, target >= 4");
        assert!(lines.contains(&"not measured: cluster 4: chosen plan behind the best -, target <= 5.0 %".to_owned()));
        assert_eq!(lines.len(), 10, "{lines:?}");
        assert!(lines[9].starts_with("8 of 17 targets are not met"), "{lines:?}");
        let good = || Ok(measurement(Some(speeds(10.0, 40.0, 1.0)), speeds(10.0, 40.0, 1.0)));
        let clusters = (1..=13).map(|n| ClusterResult::new(n, &clusters::all()[n - 1], good())).collect();
        let met = Report::new(String::new(), &Wanted::default(), clusters, Vec::new(), None);
        assert_eq!(met.conclusion(), ["all 9 targets are met"]);
    }

    #[test]
    fn tables_become_markdown() {
        let rows = [["a", "b", "c"], ["1", "2", "3"]].map(|row| row.map(str::to_owned).to_vec());
        assert_eq!(markdown(&rows), "| a | b | c |\n| --- | ---: | ---: |\n| 1 | 2 | 3 |");
        assert!(markdown(&report().cluster_rows()).lines().count() == 6);
        assert_eq!(search_rows(&report().searches[0])[2][0], "worker-1 3, coordinator 13, chosen");
    }
}
