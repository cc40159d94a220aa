//! `cargo xtask bench plan`: what the planner predicts, against what real clusters then do.
//!
//! - [`clusters`] says which: two to four nodes, throttled, with little memory, on links that [`net`] shapes.
//! - [`start`] starts one, node after node, and waits until all have measured themselves and rest.
//! - [`measure`] reads the prediction and measures the same: a lone stream, eight streams, the first token of a prompt
//!   that is alone, and the memory of each node.
//! - [`search`] pins other plans on some clusters and compares them with the chosen one, and compares placement by
//!   speed with placement by memory on a pair of unlike nodes.
//! - [`report`] says how far predictions are off and whether that is within the project's targets; [`plot`] draws it.
//!
//! All nodes are processes of one thread on this machine, which needs two cores that nobody else uses, and root for
//! the networks of shaped links. A cluster that cannot be measured is reported and left out.

mod clusters;
mod measure;
mod net;
mod plot;
mod report;
mod search;
mod start;

use std::path::{Path, PathBuf};

use clap::Args;

use self::clusters::{ClusterPlan, QUICK, SEARCHED, UNEQUAL_PAIR};
use self::measure::{Effort, Measurement, measure};
use self::report::{ClusterResult, Report, Wanted};
use self::search::{Gain, Search, Tried, Way, grain, measured_in, ways};
use self::start::{Placement, Start, is_legal};
use super::serve::Prompts;
use super::{ModelArgs, ModelFacts};
use crate::cluster::brigade;
use crate::failure::{Failure, Outcome};
use crate::output::{error, line};
use crate::processes::Processes;
use crate::synth::{Quantisation, Shape};

/// What is measured of a cluster whose prediction is judged.
const FULL: Effort = Effort { prompts: 2, alone: 48, together: 32 };

/// What is measured where plans are compared, and in a quick run.
const BRIEF: Effort = Effort { prompts: 1, alone: 32, together: 24 };

/// `cargo xtask bench plan`
#[derive(Debug, Args)]
pub struct PlanArgs {
    /// Three clusters only, and no other plans than the chosen ones
    #[arg(long)]
    pub quick: bool,
    /// Only these clusters, by their numbers from 1
    #[arg(long, value_name = "N,..", value_delimiter = ',', value_parser = cluster_number)]
    pub only: Vec<usize>,
    /// Write all values as JSON to this file, or without a file to standard output instead of the tables
    #[arg(long, value_name = "FILE", num_args = 0..=1, default_missing_value = "-")]
    pub json: Option<PathBuf>,
    /// Draw predicted against measured into this file
    #[arg(long, value_name = "FILE")]
    pub svg: Option<PathBuf>,
}

fn cluster_number(text: &str) -> Result<usize, String> {
    let most = clusters::all().len();
    text.parse().ok().filter(|n| (1..=most).contains(n)).ok_or_else(|| format!("not a number from 1 to {most}"))
}

impl PlanArgs {
    /// Which clusters, counted from 0.
    fn chosen(&self) -> Vec<usize> {
        let is_wanted = |k: &usize| match (&self.only[..], self.quick) {
            ([], true) => QUICK.contains(k),
            ([], false) => true,
            (only, _) => only.contains(&(k + 1)),
        };
        (0..clusters::all().len()).filter(is_wanted).collect()
    }

    /// What is to be found out beside what those clusters do.
    fn wanted(&self) -> Wanted {
        let chosen = self.chosen();
        let is_asked = |k: &usize| !self.quick && chosen.contains(k);
        Wanted {
            searches: SEARCHED.into_iter().filter(is_asked).map(|k| k + 1).collect(),
            gain: Some(UNEQUAL_PAIR).filter(is_asked).map(|k| k + 1),
        }
    }
}

/// Measures, prints and writes.
pub fn run(args: &PlanArgs) -> Outcome {
    let model = ModelArgs { model: None, shape: Some(Shape::LlamaHalfB), quantisation: Quantisation::Q4_0 }.path()?;
    let facts = ModelFacts::of(&model)?;
    let n_cores = std::thread::available_parallelism().map_or(1, usize::from);
    if n_cores < 2 {
        error("note: there is one core; nodes that compute at once will be slower than they measured alone");
    }
    let bench = Bench { processes: Processes::new()?, brigade: brigade()?, model, n_layers: facts.n_layers };
    let mut prompts = Prompts::new(facts.n_vocab);
    let plans = clusters::all();
    let (mut results, mut searches, mut gain) = (Vec::new(), Vec::new(), None);
    let wanted = args.wanted();
    for k in args.chosen() {
        let plan = &plans[k];
        error(&format!("cluster {} of {}: {plan} ...", k + 1, plans.len()));
        let effort = if args.quick { BRIEF } else { FULL };
        let measured = bench.cluster(k, plan, &mut prompts, effort);
        if let Ok(measured) = &measured {
            if wanted.searches.contains(&(k + 1)) {
                searches.extend(said(k, bench.search(k, plan, measured, &mut prompts)));
            }
            if wanted.gain == Some(k + 1) {
                gain = said(k, bench.gain(k, plan, measured, &mut prompts));
            }
        }
        results.push(ClusterResult::new(k + 1, plan, measured));
    }
    let name = bench.model.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let report = Report::new(name, &wanted, results, searches, gain);
    if let Some(path) = &args.svg {
        std::fs::write(path, plot::draw(&report.scatters())).map_err(Failure::io(path.display()))?;
    }
    let json = serde_json::to_string_pretty(&report).map_err(Failure::said)?;
    match &args.json {
        Some(path) if path == Path::new("-") => return line(json),
        Some(path) => std::fs::write(path, json + "\n").map_err(Failure::io(path.display()))?,
        None => {}
    }
    report.print()
}

/// What came of cluster `k` if it is no failure, which is told.
fn said<T>(k: usize, outcome: Outcome<T>) -> Option<T> {
    outcome.inspect_err(|failure| error(&format!("cluster {}: {failure}", k + 1))).ok()
}

/// What a run owns.
struct Bench {
    processes: Processes,
    brigade: PathBuf,
    model: PathBuf,
    n_layers: u32,
}

impl Bench {
    /// The directory of an own start of cluster `k`.
    fn dir(&self, k: usize, what: &str) -> PathBuf {
        self.processes.dir().join(format!("cluster-{}-{what}", k + 1))
    }

    /// Cluster `k` as it places the model itself.
    fn cluster(&self, k: usize, plan: &ClusterPlan, prompts: &mut Prompts, effort: Effort) -> Outcome<Measurement> {
        let dir = self.dir(k, "own");
        self.measure(&self.start(plan, Placement::Measured, dir), prompts, effort)
    }

    fn start<'a>(&'a self, plan: &'a ClusterPlan, placement: Placement, dir: PathBuf) -> Start<'a> {
        Start { brigade: &self.brigade, model: &self.model, plan, placement, dir, measured: None }
    }

    fn measure(&self, start: &Start<'_>, prompts: &mut Prompts, effort: Effort) -> Outcome<Measurement> {
        let measured = start.run(&self.processes).and_then(|running| measure(&running, prompts, effort));
        self.processes.end();
        measured
    }

    /// Another plan for cluster `k`, pinned; its nodes know how fast they are.
    fn pinned(
        &self,
        k: usize,
        plan: &ClusterPlan,
        way: &Way,
        what: &str,
        prompts: &mut Prompts,
    ) -> Outcome<Measurement> {
        let part = plan.with_workers(&way.workers);
        let mut start = self.start(&part, Placement::Layers(way.layers.clone()), self.dir(k, what));
        start.measured = Some(measured_in(self.dir(k, "own"), &way.workers));
        self.measure(&start, prompts, BRIEF)
    }

    /// All coarse plans for cluster `k`, and the chosen one in the same manner.
    fn search(&self, k: usize, plan: &ClusterPlan, own: &Measurement, prompts: &mut Prompts) -> Outcome<Search> {
        let chosen = Way::of(own);
        let n_workers = plan.nodes.len() - 1;
        let mut legal = Vec::new();
        for way in ways(n_workers, self.n_layers, grain(n_workers, self.n_layers)) {
            if way != chosen && is_legal(&self.brigade, &self.model, &plan.with_workers(&way.workers), &way.layers)? {
                legal.push(way);
            }
        }
        let n_ways = legal.len();
        let mut tried = Vec::new();
        for (i, way) in std::iter::once(chosen).chain(legal).enumerate() {
            error(&format!("  {} ...", way.text()));
            // One that fails is counted, and compared with nothing.
            let measurement = said(k, self.pinned(k, plan, &way, &format!("way-{i}"), prompts));
            tried.extend(measurement.map(|measurement| Tried { way, measurement }));
        }
        if tried.first().is_none_or(|first| first.way != Way::of(own)) {
            return Err(Failure::said("the chosen plan could not be measured again"));
        }
        let chosen = tried.remove(0);
        let failed = n_ways - tried.len();
        let mut search = Search { cluster: k + 1, chosen, others: tried, failed };
        let mut n_again = 0;
        search.look_again(|way| {
            n_again += 1;
            error(&format!("  {} again ...", way.text()));
            said(k, self.pinned(k, plan, way, &format!("again-{n_again}"), prompts))
        });
        Ok(search)
    }

    /// Cluster `k` placed by memory.
    fn gain(&self, k: usize, plan: &ClusterPlan, own: &Measurement, prompts: &mut Prompts) -> Outcome<Gain> {
        error("  by memory ...");
        let memory = self.measure(&self.start(plan, Placement::Memory, self.dir(k, "memory")), prompts, FULL)?;
        // Who places by memory predicts nothing; who pins the same split does.
        let pinned = self.pinned(k, plan, &Way::of(&memory), "memory-pinned", prompts)?;
        Ok(Gain { cluster: k + 1, measured: own.clone(), memory, memory_predicted: pinned.predicted })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        args: PlanArgs,
    }

    #[test]
    fn clusters_are_chosen_by_number() {
        let chosen = |words: &[&str]| {
            let line = Line::try_parse_from(std::iter::once(&"plan").chain(words));
            line.map(|line| line.args.chosen()).ok()
        };
        assert_eq!(chosen(&[]).unwrap().len(), clusters::all().len());
        assert_eq!(chosen(&["--quick"]), Some(QUICK.to_vec()));
        assert_eq!(chosen(&["--quick", "--only", "3,1"]), Some(vec![0, 2]));
        assert_eq!((chosen(&["--only", "0"]), chosen(&["--only", "99"])), (None, None));
    }

    #[test]
    fn what_is_asked_for_is_wanted() {
        let wanted = |words: &[&str]| Line::parse_from(std::iter::once(&"plan").chain(words)).args.wanted();
        let all = wanted(&[]);
        assert_eq!((all.searches, all.gain), (SEARCHED.map(|k| k + 1).to_vec(), Some(UNEQUAL_PAIR + 1)));
        let quick = wanted(&["--quick"]);
        assert_eq!((quick.searches, quick.gain), (Vec::new(), None));
        let one = wanted(&["--only", "5,6"]);
        assert_eq!((one.searches, one.gain), (vec![5], None));
    }
}
