//! `brigade plan`: how a model would be placed, without running it.

use brigade_base::{ByteSize, NodeId};
use brigade_gguf::{Architecture, ModelFile};
use brigade_node::{DEFAULT_CONTEXT_MAX, model_profile};
use brigade_plan::{Demand, NodeProfile, place};

use crate::args::PlanArgs;
use crate::error::Failure;
use crate::output;

/// Prints the plan.
pub fn run(args: &PlanArgs) -> Result<(), Failure> {
    let file = ModelFile::open(&args.model).map_err(Failure::run)?;
    let profile = model_profile(file.catalog()).map_err(Failure::run)?;
    let context = context(Architecture::of(file.catalog()).map_err(Failure::run)?.n_ctx_train, args.context)?;
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
        context,
        parallel: args.parallel,
        max_rows: brigade_node::CHUNK + args.parallel,
        spread: args.spread,
        split: args.layers.clone(),
    };
    let plan = place(&profile, &nodes, &demand).map_err(Failure::run)?;
    if args.json { output::json(&plan) } else { output::text(&plan.to_string()) }
}

/// Tokens of a session, as `brigade serve` would have it: what was asked for, or what the model was `trained` for.
fn context(trained: u32, asked: Option<u32>) -> Result<u32, Failure> {
    match asked {
        Some(context) if context > trained => Err(Failure::run(format!(
            "--context {context} is more than the {trained} tokens that this model was trained for"
        ))),
        Some(context) => Ok(context),
        None => Ok(trained.min(DEFAULT_CONTEXT_MAX)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_session_is_no_longer_than_the_model_was_trained_for() {
        assert_eq!(context(1024, None).unwrap(), 1024);
        assert_eq!(context(1 << 20, None).unwrap(), DEFAULT_CONTEXT_MAX);
        assert_eq!(context(1024, Some(100)).unwrap(), 100);
        assert!(context(1024, Some(1025)).unwrap_err().to_string().contains("the 1024 tokens"));
    }
}
