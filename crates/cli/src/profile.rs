//! `brigade profile`: what this machine can do, and how fast it computes a model.
//!
//! Everything is measured by `brigade_node::measure` within seconds, and kept in the state directory.

use std::path::Path;
use std::sync::Arc;

use brigade_base::ByteSize;
use brigade_gguf::{Architecture, Catalog, ModelFile};
use brigade_node::measure::machine::{self, MachineProfile};
use brigade_node::measure::{Disturbance, MeasureOptions, MeasureRequest, Profiles, measured};
use brigade_node::{Work, model_profile, system};
use brigade_plan::{Curve, ModelProfile, Speed};
use serde::Serialize;

use crate::args::ProfileArgs;
use crate::error::Failure;
use crate::{files, output, sources};

#[derive(Serialize)]
struct Report {
    name: String,
    memory_free: u64,
    condition: system::Condition,
    #[serde(skip_serializing_if = "Option::is_none")]
    machine: Option<MachineProfile>,
    #[serde(skip_serializing_if = "Option::is_none")]
    model: Option<ModelReport>,
    /// What is doubtful about the numbers.
    notes: Vec<String>,
}

#[derive(Serialize)]
struct ModelReport {
    name: String,
    layers: u32,
    mean_layer_bytes: u64,
    context: u32,
    parallel: u32,
    speed: Speed,
}

/// Prints what was measured: of the machine, or of the machine with a model.
pub fn run(args: &ProfileArgs) -> Result<(), Failure> {
    let state_dir = args.state.dir();
    files::make_state_dir(&state_dir)?;
    let threads = args.threads.unwrap_or_else(system::default_threads);
    let (machine, model, disturbance) = match &args.model {
        Some(path) => {
            // Nothing is pulled to find out that there is nothing to measure.
            let (_, header) = sources::look(path, &args.sources, &args.state)?;
            let work = measured_work(args, &header)?;
            let pulled = sources::open(path, &args.sources, &args.state)?;
            let (model, disturbance) = model(args, work, &pulled.path, &state_dir, threads)?;
            (None, Some(model), disturbance)
        }
        None => {
            let (machine, disturbance) =
                machine::profile(&state_dir, threads, args.throttle, args.again).map_err(Failure::run)?;
            (Some(machine), None, disturbance)
        }
    };
    let report = Report {
        name: system::host_name(),
        memory_free: system::available_memory().0,
        condition: system::condition(),
        machine,
        model,
        notes: disturbance.note().into_iter().collect(),
    };
    if args.json { output::json(&report) } else { print(&report) }
}

/// What a deployment would do with the model, if that can be measured.
fn measured_work(args: &ProfileArgs, header: &Catalog) -> Result<Work, Failure> {
    let work = Work::of(header, args.pooling).map_err(Failure::run)?;
    if work.is_at_once() {
        return Err(Failure::run(
            "nothing is measured of this model: it takes each text whole, in one pass, and what is measured are rows \
             behind others; it is placed by memory, and `brigade plan` says where",
        ));
    }
    Ok(work)
}

fn model(
    args: &ProfileArgs,
    work: Work,
    path: &Path,
    state_dir: &Path,
    threads: u32,
) -> Result<(ModelReport, Disturbance), Failure> {
    let file = Arc::new(ModelFile::open(path).map_err(Failure::run)?);
    let Architecture { n_ctx_train, n_embd, .. } = Architecture::of(file.catalog()).map_err(Failure::run)?;
    // As a deployment would have it: what was measured is found again there.
    let context = work.context(n_ctx_train, n_embd, args.context, args.parallel).map_err(Failure::run)?;
    let request = MeasureRequest {
        catalog: file.catalog().clone(),
        context,
        sessions: args.parallel,
        max_rows: work.max_rows(context, args.parallel),
        kv: args.kv.types(),
    };
    let profile = work.profile(model_profile(file.catalog(), args.kv.types()).map_err(Failure::run)?);
    let options = MeasureOptions::new(threads, args.throttle, Some(file));
    let measured = measured(&request, &options, &Profiles::open(state_dir), args.again).map_err(Failure::run)?;
    let report = ModelReport {
        name: path.file_stem().map_or_else(String::new, |stem| stem.to_string_lossy().into_owned()),
        layers: profile.n_layers(),
        mean_layer_bytes: mean_layer_bytes(&profile),
        context: request.context,
        parallel: request.sessions,
        speed: measured.speed,
    };
    Ok((report, measured.disturbance))
}

fn mean_layer_bytes(model: &ModelProfile) -> u64 {
    model.layer_bytes.iter().sum::<u64>() / u64::from(model.n_layers().max(1))
}

fn field(name: &str, value: impl std::fmt::Display) -> Result<(), Failure> {
    output::line(format_args!("{name:<10} {value}"))
}

fn print(report: &Report) -> Result<(), Failure> {
    field("machine", &report.name)?;
    if let Some(machine) = &report.machine {
        let cpu = &machine.cpu;
        let cores = cpu.n_cores.map_or_else(String::new, |n| format!("{n} cores, "));
        field("processor", format_args!("{}, {cores}{} threads", or_unknown(&cpu.name), cpu.n_threads))?;
        field("can", or_unknown(&cpu.features.join(" ")))?;
    }
    print_condition(&report.condition)?;
    field("free", format_args!("{} of memory", ByteSize(report.memory_free)))?;
    if let Some(machine) = &report.machine {
        print_machine(machine)?;
    }
    report.model.as_ref().map_or(Ok(()), print_model)?;
    report.notes.iter().try_for_each(|note| output::line(format_args!("\n{note}")))
}

fn print_condition(condition: &system::Condition) -> Result<(), Failure> {
    let mut parts = Vec::new();
    match (condition.mhz, condition.mhz_max) {
        (Some(mhz), Some(max)) => parts.push(format!("{mhz} of {max} MHz")),
        (Some(mhz), None) => parts.push(format!("{mhz} MHz")),
        _ => {}
    }
    parts.extend(condition.governor.as_ref().map(|governor| format!("governor {governor}")));
    parts.extend(condition.thermal_throttles.map(|n| format!("slowed {n} times for heat")));
    if !parts.is_empty() {
        field("clock", parts.join(", "))?;
    }
    match (condition.on_battery, condition.battery_percent) {
        (Some(on), Some(percent)) => {
            field("battery", format_args!("{percent} %, {}", if on { "discharging" } else { "on mains" }))
        }
        _ => Ok(()),
    }
}

fn print_machine(machine: &MachineProfile) -> Result<(), Failure> {
    field("reads", format_args!("memory at {}, with {} threads", rate(machine.memory_bytes_per_s), machine.threads))?;
    if let Some(disk) = machine.disk_bytes_per_s {
        field("", format_args!("disk at {}", rate(disk)))?;
    }
    field("", format_args!("and hashes weights at {}", rate(machine.hash_bytes_per_s)))?;
    output::line(format_args!("\n{:<8} {:>22} {:>22}", "weights", "token, per GiB", "prompt"))?;
    machine.types.iter().try_for_each(|ty| {
        let token = format!("{:.1} ms", ty.s_per_gib * 1e3);
        let prompt = format!("{:.0} GFLOP/s", 1.0 / ty.s_per_gflop.max(1e-12));
        output::line(format_args!("{:<8} {token:>22} {prompt:>22}", ty.name))
    })
}

fn print_model(model: &ModelReport) -> Result<(), Failure> {
    let speed = &model.speed;
    field("model", format_args!("{}: {} layers of {}", model.name, model.layers, ByteSize(model.mean_layer_bytes)))?;
    field("pass", format_args!("{:.2} ms beside its layers", speed.pass_s * 1e3))?;
    field("loads", rate(speed.load_bytes_per_s))?;
    output::line(format_args!("\n{:<8} {:>14} {:>14} {:>14}", "rows", "decode layer", "prompt layer", "head"))?;
    let curves = [Some(&speed.decode), Some(&speed.chunk), speed.head.as_ref()];
    let mut rows: Vec<u32> = curves.iter().flatten().flat_map(|curve| curve.points()).map(|(rows, _)| *rows).collect();
    rows.sort_unstable();
    rows.dedup();
    rows.iter().try_for_each(|&rows| {
        let [decode, chunk, head] = curves.map(|curve| cell(curve, rows));
        output::line(format_args!("{rows:<8} {decode:>14} {chunk:>14} {head:>14}"))
    })?;
    output::line(format_args!(
        "\n1000 tokens before it make a row {:.3} ms longer for each layer, and one of a prompt {:.3} ms.",
        speed.decode_context_s * 1e6,
        speed.chunk_context_s * 1e6
    ))
}

/// What a curve was measured at.
fn cell(curve: Option<&Curve>, rows: u32) -> String {
    let point = curve.and_then(|curve| curve.points().iter().find(|(r, _)| *r == rows));
    point.map_or_else(String::new, |(_, seconds)| format!("{:.3} ms", seconds * 1e3))
}

fn rate(bytes_per_s: f64) -> String {
    format!("{}/s", ByteSize(bytes_per_s as u64))
}

fn or_unknown(text: &str) -> &str {
    if text.is_empty() { "unknown" } else { text }
}
