//! `brigade plan`: how a model would be placed, how fast it would be, and what else could be done, without running it.
//!
//! - [`model`] finds out what the model costs: from a file, from a header over the network (`brigade-store`), or by
//!   name.
//! - [`machines`] finds out who there is: from a description, from flags, from the cluster that runs here, or this
//!   machine alone, measured.
//! - `brigade_plan::study` does the rest; [`what_if`] asks it about machines that are not there, [`cost`] about money.
//!   What it predicts is how text is generated, so of a model that embeds or ranks texts nothing is left of that.
//! - [`show`] writes the text; the JSON is [`Report`].

mod cost;
mod machines;
mod model;
mod show;
mod what_if;

use std::fmt::Write as _;

use brigade_base::{KvTypes, Pooling};
use brigade_plan::{Demand, Forecast, Optimize, Plan, PlanError, PlannedStage, Study, listed, study};
use serde::Serialize;

use crate::args::PlanArgs;
use crate::error::Failure;
use crate::output;
use cost::Cost;
use machines::Machines;
use model::Model;
use what_if::WhatIf;

/// What a kilowatt-hour costs in US dollars, where nobody says: what homes in Europe pay, about.
const PRICE_KWH: f64 = 0.30;

/// All that is known of a plan; printed with `--json`, and described in docs/planning.md.
#[derive(Serialize)]
struct Report {
    model: ModelReport,
    /// Tokens of one session.
    context: u32,
    /// Sessions at once.
    parallel: u32,
    /// How keys and values are stored, by a model that keeps some.
    kv: Option<KvTypes>,
    optimize: Optimize,
    machines: MachinesReport,
    #[serde(flatten)]
    study: Study,
    /// Where it is known how much power all machines of the plan take.
    cost: Option<Cost>,
    what_if: Vec<WhatIf>,
}

#[derive(Serialize)]
struct ModelReport {
    name: String,
    quantisation: String,
    layers: u32,
    /// Bytes of all weights.
    bytes: u64,
    /// What it does with texts: `generate`, `embed` or `rank`.
    purpose: &'static str,
    /// How it makes one vector or score of a text, if it does.
    pooling: Option<Pooling>,
    /// Whether a text is computed in one pass, and not in chunks.
    is_at_once: bool,
    /// Whether this version can run it; what it cannot run is refused, and what the catalogue has it can.
    supported: bool,
    /// What is doubtful about it.
    notes: Vec<String>,
}

#[derive(Serialize)]
struct MachinesReport {
    /// Where they come from.
    source: String,
    nodes: usize,
    /// What is doubtful about them.
    notes: Vec<String>,
}

/// Prints the plan.
pub fn run(args: &PlanArgs) -> Result<(), Failure> {
    let model = Model::find(args)?;
    let demand = demand(args, &model)?;
    let mut machines = Machines::find(args, &model, &demand)?;
    let study =
        studied(&model, &machines, &demand).map_err(|error| does_not_fit(&error, &model, &machines, &demand))?;
    let what_if = if args.explain { what_if::all(&model, &machines, &demand, &study) } else { Vec::new() };
    let cost = study.plan.prediction.as_ref().and_then(|prediction| {
        let watts = machines.watts(study.plan.stages.iter().map(|stage| stage.node))?;
        let price_kwh = args.price_kwh.or(machines.prices.kwh_usd).unwrap_or(PRICE_KWH);
        let cloud = args.cloud_price.or(machines.prices.cloud_usd_per_million);
        Some(Cost::of(watts, &Forecast::from(prediction), price_kwh, cloud))
    });
    if cost.is_none() {
        machines.notes.extend(no_cost(args, &model, &machines, &study.plan));
    }
    let report = Report {
        model: ModelReport {
            name: model.name.clone(),
            quantisation: model.quantisation.clone(),
            layers: model.profile.n_layers(),
            bytes: model.profile.layer_bytes.iter().sum::<u64>().saturating_add(model.profile.head_bytes),
            purpose: model.work.purpose().name(),
            pooling: model.work.pooling,
            is_at_once: model.work.is_at_once(),
            supported: true,
            notes: model.profile.stays_whole().into_iter().chain(model.ignored(args.quant)).collect(),
        },
        context: demand.context,
        parallel: demand.parallel,
        kv: keeps_values(&model).then_some(model.kv),
        optimize: demand.optimize,
        machines: MachinesReport { source: machines.source, nodes: machines.nodes.len(), notes: machines.notes },
        study,
        cost,
        what_if,
    };
    if args.json { output::json(&report) } else { output::text(&show::text(&report, args.explain)) }
}

/// Why prices that were told are of no use here.
fn no_cost(args: &PlanArgs, model: &Model, machines: &Machines, plan: &Plan) -> Option<String> {
    let told = [args.price_kwh, args.cloud_price, machines.prices.kwh_usd, machines.prices.cloud_usd_per_million];
    told.into_iter().flatten().next()?;
    if !model.work.generates() {
        return Some("Prices are those of answers, and this model makes none.".to_owned());
    }
    let is_unknown = |stage: &&PlannedStage| machines.watts(std::iter::once(stage.node)).is_none();
    let names: Vec<&str> = plan.stages.iter().filter(is_unknown).map(|stage| stage.name.as_str()).collect();
    Some(format!(
        "Nothing is said of prices, as the power that {} would take is not known: name the device, as --node \
         NAME=SIZE@DEVICE, or write watts in the file of --cluster.",
        listed(&names)
    ))
}

/// Whether it has a KV cache. One that sees texts from both ends has none, and one of states alone neither.
fn keeps_values(model: &Model) -> bool {
    model.profile.kv_bytes_per_token.iter().any(|&bytes| bytes > 0)
}

/// What a deployment would be asked for: the same as by `brigade serve` with these flags.
fn demand(args: &PlanArgs, model: &Model) -> Result<Demand, Failure> {
    let context = model.work.context(model.trained, model.profile.n_embd, args.context, args.parallel);
    let context = context.map_err(Failure::run)?;
    Ok(Demand {
        context,
        parallel: args.parallel,
        max_rows: model.work.max_rows(context, args.parallel),
        spread: args.spread,
        split: args.layers.clone(),
        optimize: model.work.optimize(args.optimize),
    })
}

/// The plan and what else could be done. All that is predicted and compared is how text is generated, which of a model
/// that generates none would be made up.
fn studied(model: &Model, machines: &Machines, demand: &Demand) -> Result<Study, PlanError> {
    let study = study(&model.profile, &machines.nodes, &machines.links, demand, machines.coordinator)?;
    if model.work.generates() {
        return Ok(study);
    }
    Ok(Study { plan: model.work.told(study.plan), alternatives: Vec::new(), advice: Vec::new() })
}

/// Why there is no plan, and of a model that is given by name the largest quantisation that would fit.
fn does_not_fit(error: &PlanError, model: &Model, machines: &Machines, demand: &Demand) -> Failure {
    let fits = what_if::smaller_that_fits(model, machines, demand);
    let mut said = error.to_string();
    if let Some(quant) = fits.filter(|_| is_too_large(error)) {
        let _ = write!(said, ". With --quant {quant} it would fit");
    }
    let fits = what_if::smaller_kv_that_fits(model, machines, demand);
    if let Some(ty) = fits.filter(|_| is_too_large(error)) {
        let _ = write!(said, ". With --cache-type-k {ty} --cache-type-v {ty} it would fit");
    }
    Failure::run(said)
}

/// Whether less memory would help.
fn is_too_large(error: &PlanError) -> bool {
    matches!(error, PlanError::DoesNotFit { .. } | PlanError::WholeDoesNotFit { .. })
}
