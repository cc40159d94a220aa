//! One model that is made and examined, in a child process.

use std::fmt;
use std::io::Read;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use brigade_gguf::{GgmlType, ModelFile, supported_architectures};
use brigade_node::certify::{CertifyError, CertifyOptions, Cuts, Outcome as RunOutcome, Report, Verdict, certify};
use serde::{Deserialize, Serialize};

use super::recipe::{self, Recipe};
use super::tiny::Tiny;
use super::{SEED, type_named};
use crate::failure::{Failure, Outcome};
use crate::output::line;

/// How long a child may take: most need a second, the deepest models with all their cuts twenty.
const MAX_WAIT: Duration = Duration::from_secs(180);

/// How often a child is looked at.
const POLL: Duration = Duration::from_millis(5);

/// Types that the models of [`TYPED`] are made of beside F16.
const TYPES: [GgmlType; 6] =
    [GgmlType::Q8_0, GgmlType::Q4_0, GgmlType::Q4_K, GgmlType::Q6_K, GgmlType::IQ4_XS, GgmlType::MXFP4];

/// Recipes whose models are made of each type: one for each kind of layers.
const TYPED: [&str; 14] = [
    "llama",
    "llama-experts",
    "qwen2",
    "qwen3moe",
    "gemma3",
    "gpt-oss",
    "phi3",
    "deepseek2",
    "mamba2",
    "jamba",
    "qwen3next",
    "lfm2",
    "granitehybrid-experts",
    "glm4moe",
];

/// Deepest models that are cut at each place; deeper ones repeat themselves, and their cuts take as many seconds.
const MAX_LAYERS_ALL: u32 = 16;

/// Cuts of all other models: two of each number of stages.
const SOME: Cuts = Cuts::Most(6);

/// A model and how it is examined.
#[derive(Debug, Clone, Copy)]
pub struct Case {
    pub recipe: &'static Recipe,
    pub n_layers: u32,
    pub ty: GgmlType,
    cuts: Cuts,
}

/// What was found.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Finding {
    pub name: String,
    pub arch: String,
    pub ty: String,
    pub n_layers: u32,
    pub word: Word,
    /// Why it is no better than that.
    pub reason: String,
    pub cut_points: Vec<u32>,
    /// Cuts that were tried.
    pub n_cuts: usize,
    /// Largest error of a result.
    pub error: f64,
    /// The prediction of a stage's memory that was farthest off, as a share.
    pub memory_error: f64,
}

/// The verdict.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Word {
    Exact,
    WithinTolerance,
    WholeOnly,
    Refused,
    /// A cut gives something else: a fault of Brigade's.
    Differs,
}

impl Word {
    /// How people read it.
    pub fn text(self) -> &'static str {
        match self {
            Self::Exact => "exact",
            Self::WithinTolerance => "within tolerance",
            Self::WholeOnly => "whole only",
            Self::Refused => "refused",
            Self::Differs => "DIFFERS",
        }
    }
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} {} ", self.recipe.name(), self.n_layers, self.ty.name())?;
        match self.cuts {
            Cuts::All => f.write_str("all"),
            Cuts::Most(n) => write!(f, "{n}"),
        }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:<16} {:>3} cuts  {:.0e}", self.word.text(), self.n_cuts, self.error)?;
        write!(f, "  memory {:+.1} %  {}", 100.0 * self.memory_error, self.reason)
    }
}

impl Case {
    /// The cases of a recipe; with `is_quick` one.
    pub fn of(recipe: &'static Recipe, is_quick: bool) -> Vec<Self> {
        let case = |n_layers, ty, cuts| Self { recipe, n_layers, ty, cuts };
        let n_layers = recipe.n_layers;
        if is_quick || recipe.problem.is_some() {
            return vec![case(n_layers, GgmlType::F16, Cuts::Most(1))];
        }
        let cuts = if n_layers <= MAX_LAYERS_ALL { Cuts::All } else { SOME };
        let mut all = vec![case(n_layers, GgmlType::F16, cuts)];
        all.extend(recipe.more_layers.map(|n_layers| case(n_layers, GgmlType::F16, SOME)));
        if TYPED.contains(&recipe.name().as_str()) {
            all.extend(TYPES.map(|ty| case(n_layers, ty, SOME)));
        }
        all
    }

    /// The case that [`Case::to_string`] says.
    pub fn parse(text: &str) -> Outcome<Self> {
        let wrong = || Failure::said(format!("{text:?} is no case"));
        let [name, n_layers, ty, cuts] = text.split(' ').collect::<Vec<_>>()[..] else { return Err(wrong()) };
        let recipe = recipe::ALL.iter().find(|recipe| recipe.name() == name).ok_or_else(wrong)?;
        let cuts = if cuts == "all" { Cuts::All } else { Cuts::Most(cuts.parse().map_err(|_| wrong())?) };
        Ok(Self { recipe, n_layers: n_layers.parse().map_err(|_| wrong())?, ty: type_named(ty)?, cuts })
    }

    /// Has a child make and examine the model.
    pub fn examine(&self) -> Outcome<Finding> {
        if let Some(problem) = self.recipe.problem {
            return Ok(self.finding(Word::Refused, problem));
        }
        let program = std::env::current_exe().map_err(Failure::io("this program"))?;
        let mut command = Command::new(program);
        command.args(["certify", "--case", &self.to_string()]).stdin(Stdio::null());
        let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
        let (status, said, complained) = wait(child.map_err(Failure::io("a child process"))?)?;
        match serde_json::from_str(said.trim()) {
            Ok(finding) => Ok(finding),
            Err(_) => Ok(self.finding(Word::Differs, &format!("{status}: {}", last_words(&complained)))),
        }
    }

    /// Makes and examines the model in this process, and says what was found in a line of JSON.
    pub fn answer(&self) -> Outcome {
        let dir = tempfile::tempdir().map_err(Failure::io("a temporary folder"))?;
        let path = dir.path().join("model.gguf");
        Tiny { recipe: self.recipe, n_layers: self.n_layers, ty: self.ty, seed: SEED }.write(&path)?;
        let file = Arc::new(ModelFile::open(&path).map_err(Failure::said)?);
        let options = CertifyOptions { cuts: self.cuts, ..CertifyOptions::default() };
        let finding = match certify(&file, Some(&path), &options, &mut |_, _| {}) {
            Ok(report) => self.found(&report),
            Err(CertifyError::Refused(why)) => self.refused(&why),
            Err(error) => self.finding(Word::Differs, &error.to_string()),
        };
        line(serde_json::to_string(&finding).map_err(Failure::said)?)
    }

    /// An architecture without rules is refused by intent, which its recipe explains; all else is a fault.
    fn refused(&self, why: &str) -> Finding {
        let has_rules = supported_architectures().any(|name| name == self.recipe.arch);
        match self.recipe.refusal.filter(|_| !has_rules) {
            Some(refusal) => self.finding(Word::Refused, refusal),
            None => self.finding(Word::Differs, &format!("it is refused, and its recipe does not say so: {why}")),
        }
    }

    fn finding(&self, word: Word, reason: &str) -> Finding {
        Finding {
            name: self.recipe.name(),
            arch: self.recipe.arch.to_owned(),
            ty: self.ty.name().to_owned(),
            n_layers: self.n_layers,
            word,
            reason: reason.to_owned(),
            cut_points: Vec::new(),
            n_cuts: 0,
            error: 0.0,
            memory_error: 0.0,
        }
    }

    fn found(&self, report: &Report) -> Finding {
        let word = match report.verdict() {
            Verdict::Exact => Word::Exact,
            Verdict::Close => Word::WithinTolerance,
            Verdict::WholeOnly => Word::WholeOnly,
            Verdict::Differs => Word::Differs,
        };
        let mut error = 0f64;
        let mut reason = report.reason().unwrap_or_default().to_owned();
        for plan in &report.plans {
            match &plan.outcome {
                RunOutcome::Compared(comparison) => error = error.max(comparison.error),
                RunOutcome::Failed(_) => {}
            }
            if !plan.outcome.is_good() && reason.is_empty() {
                reason = match &plan.outcome {
                    RunOutcome::Compared(c) => format!(
                        "cut before {:?}: {} of {} results, {} tokens, first at {:?}",
                        plan.cuts, c.n_other, c.n_results, c.n_other_tokens, c.worst
                    ),
                    RunOutcome::Failed(why) => format!("cut before {:?}: {why}", plan.cuts),
                };
            }
        }
        Finding {
            cut_points: report.cut_points.clone(),
            n_cuts: report.plans.len() - 1,
            error,
            memory_error: report.worst_prediction(0).map_or(0.0, |line| line.error()),
            ..self.finding(word, &reason)
        }
    }
}

/// What a child did and said. It is ended if it takes too long.
fn wait(mut child: Child) -> Outcome<(String, String, String)> {
    // Read apart, so that a child with much to say is not stopped by a full pipe.
    let read = |stream: Option<Box<dyn Read + Send>>| {
        std::thread::spawn(move || {
            let mut bytes = Vec::new();
            let _ = stream.map(|mut stream| stream.read_to_end(&mut bytes));
            String::from_utf8_lossy(&bytes).into_owned()
        })
    };
    let said = read(child.stdout.take().map(|stream| Box::new(stream) as _));
    let complained = read(child.stderr.take().map(|stream| Box::new(stream) as _));
    let end = Instant::now() + MAX_WAIT;
    let status = loop {
        match child.try_wait().map_err(Failure::io("a child process"))? {
            Some(status) => break status.to_string(),
            None if Instant::now() > end => {
                child.kill().map_err(Failure::io("a child process"))?;
                child.wait().map_err(Failure::io("a child process"))?;
                break format!("not done within {} s", MAX_WAIT.as_secs());
            }
            None => std::thread::sleep(POLL),
        }
    };
    Ok((status, said.join().unwrap_or_default(), complained.join().unwrap_or_default()))
}

/// The assertion that ended a child, else its last line.
fn last_words(complained: &str) -> &str {
    let assertion = complained.lines().find(|line| line.contains("GGML_ASSERT(") || line.contains("GGML_ABORT"));
    assertion.or_else(|| complained.lines().rfind(|line| !line.trim().is_empty())).unwrap_or("it said nothing")
}
