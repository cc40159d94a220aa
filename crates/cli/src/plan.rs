//! `brigade plan`: how a model would be placed, without running it.

use brigade_base::{ByteSize, NodeId};
use brigade_gguf::ModelFile;
use brigade_node::model_profile;
use brigade_plan::{Demand, NodeProfile, place};

use crate::args::PlanArgs;
use crate::error::Failure;
use crate::output;

/// Prints the plan.
pub fn run(args: &PlanArgs) -> Result<(), Failure> {
    let file = ModelFile::open(&args.model).map_err(Failure::run)?;
    let profile = model_profile(file.catalog()).map_err(Failure::run)?;
    let here = || vec![(brigade_node::system::host_name(), brigade_node::system::available_memory())];
    let named: Vec<(String, ByteSize)> = if args.nodes.is_empty() { here() } else { args.nodes.clone() };
    let nodes: Vec<NodeProfile> = named
        .into_iter()
        .enumerate()
        .map(|(i, (name, memory))| {
            let mut id = [0; 32];
            id[..8].copy_from_slice(&(i as u64).to_be_bytes());
            NodeProfile { id: NodeId::from_bytes(id), name, memory }
        })
        .collect();
    let demand = Demand {
        context: args.context,
        parallel: args.parallel,
        max_rows: brigade_node::CHUNK + args.parallel,
        spread: args.spread,
        split: args.layers.clone(),
    };
    let plan = place(&profile, &nodes, &demand).map_err(Failure::run)?;
    if args.json { output::json(&plan) } else { output::text(&plan.to_string()) }
}
