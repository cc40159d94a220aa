//! `cargo xtask certify`: which architectures can be cut, and how exactly.
//!
//! - [`recipe`] knows what metadata makes a tiny model of each architecture; [`tiny`] writes it.
//! - [`case`] is one model that is made and examined, in a child process: libllama ends the process of a model that it
//!   cannot bear, and that must cost no other.
//! - [`page`] makes `docs/architectures.md` of what was found, and tells whether the page that lies there is stale.
//!
//! The examination itself is `brigade_node::certify`, which `brigade certify` uses for models of users.

mod case;
mod page;
mod recipe;
mod tiny;

use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use brigade_gguf::GgmlType;
use clap::Args;

use crate::failure::{Failure, Outcome};
use crate::output::line;
use case::{Case, Finding};
use recipe::Recipe;
use tiny::Tiny;

/// Weights of all models come from this seed.
const SEED: u64 = 1;

/// `cargo xtask certify`
#[derive(Debug, Args)]
pub struct CertifyArgs {
    /// Only recipes of this name or architecture; the page is then neither written nor checked
    #[arg(long, value_name = "NAME")]
    only: Option<String>,
    /// One cut of one model for each recipe
    #[arg(long)]
    quick: bool,
    /// Say whether the page is stale, and leave it as it is
    #[arg(long)]
    check: bool,
    /// Only write the models, to this folder
    #[arg(long, value_name = "DIR", conflicts_with_all = ["quick", "check"])]
    models: Option<PathBuf>,
    /// The type of the matrices of models that are only written
    #[arg(long = "type", value_name = "TYPE", default_value = "F16", requires = "models")]
    ty: String,
    /// Examine one case in this process, and say what was found
    #[arg(long, value_name = "CASE", hide = true)]
    case: Option<String>,
}

/// Makes and examines models.
pub fn run(args: &CertifyArgs) -> Outcome {
    if let Some(case) = &args.case {
        return Case::parse(case)?.answer();
    }
    if args.models.is_some() {
        return write_models(args);
    }
    let cases: Vec<Case> = wanted(args).flat_map(|recipe| Case::of(recipe, args.quick)).collect();
    if cases.is_empty() {
        return Err(Failure::said("there is no such recipe"));
    }
    let findings = examine(&cases)?;
    if args.only.is_some() {
        return Ok(());
    }
    page::finish(&crate::root(), &findings, args.quick, args.check)
}

fn wanted(args: &CertifyArgs) -> impl Iterator<Item = &'static Recipe> {
    let is_wanted =
        |recipe: &&Recipe| args.only.as_ref().is_none_or(|only| *only == recipe.name() || *only == recipe.arch);
    recipe::ALL.iter().filter(is_wanted)
}

/// Examines all cases, as many at once as there are cores, and says what was found.
fn examine(cases: &[Case]) -> Outcome<Vec<Finding>> {
    let next = AtomicUsize::new(0);
    let done: Mutex<Vec<(usize, Outcome<Finding>)>> = Mutex::new(Vec::new());
    let work = || {
        loop {
            let idx = next.fetch_add(1, Ordering::Relaxed);
            let Some(case) = cases.get(idx) else { return };
            let finding = case.examine();
            if let Ok(finding) = &finding {
                let _ = line(format_args!("{:<32} {finding}", case.to_string()));
            }
            done.lock().unwrap_or_else(std::sync::PoisonError::into_inner).push((idx, finding));
        }
    };
    let n_workers = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    std::thread::scope(|scope| (0..n_workers).for_each(|_| drop(scope.spawn(work))));
    let mut done = done.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
    done.sort_by_key(|(idx, _)| *idx);
    done.into_iter().map(|(_, finding)| finding).collect()
}

fn write_models(args: &CertifyArgs) -> Outcome {
    let Some(dir) = &args.models else { return Ok(()) };
    let ty = type_named(&args.ty)?;
    std::fs::create_dir_all(dir).map_err(Failure::io(dir.display()))?;
    for recipe in wanted(args).filter(|recipe| recipe.problem.is_none()) {
        let path = dir.join(format!("{}.gguf", recipe.name()));
        Tiny { recipe, n_layers: recipe.n_layers, ty, seed: SEED }.write(&path)?;
        line(path.display())?;
    }
    Ok(())
}

fn type_named(name: &str) -> Outcome<GgmlType> {
    let ty = GgmlType::all().find(|ty| ty.name().eq_ignore_ascii_case(name));
    ty.ok_or_else(|| Failure::said(format!("there is no type {name}")))
}
