//! What a deployment does with its model: go on with texts, or make one vector of each.
//!
//! The model's metadata decides, unless the operator does ([`PoolingChoice`]). [`Work`] is the outcome, which the
//! schedule, the last stage and the model's card are made by.

use std::fmt;
use std::str::FromStr;

use brigade_base::Pooling;
use brigade_gguf::{Catalog, PLACEHOLDER_VOCAB, Value};
use brigade_net::MAX_FRAME;
use brigade_plan::{ModelProfile, Optimize, Plan};
use brigade_protocol::control::MAX_BATCH_ROWS;
use brigade_protocol::schedule::Task;
use serde::{Deserialize, Serialize};

use crate::coordinator::{CHUNK, DEFAULT_CONTEXT_MAX};
use crate::serving::Purpose;

/// Most tokens of a text that travels whole, unless more are asked for. The buffers of every stage are as large as its
/// rows need: a kilobyte of hidden state takes some twenty there.
const DEFAULT_TEXT_MAX: u32 = 2048;

/// What a frame may hold beside its rows: its head has some dozen bytes for each session and each timing.
const FRAME_HEAD_BYTES: u64 = 1 << 20;

/// Words of reasons that are about generated text. The planner, whose sentences they are, knows of no other.
const OF_GENERATED_TEXT: [&str; 3] = ["token", "stream", "request"];

/// What is said in place of such reasons.
const BY_PROMPTS: &str = "Layers go where prompts and single rows are computed fastest; texts of this model are \
                          computed as prompts are.";

/// Models that keep no KV cache: they see a text from both ends.
const ENCODERS: [&str; 10] = [
    "bert",
    "eurobert",
    "gemma-embedding",
    "jina-bert-v2",
    "jina-bert-v3",
    "llama-embed",
    "modern-bert",
    "neo-bert",
    "nomic-bert",
    "nomic-bert-moe",
];

/// What the operator wants of a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PoolingChoice {
    /// What its metadata says.
    #[default]
    Model,
    /// Text, whatever its metadata says.
    None,
    /// Vectors, pooled like this.
    As(Pooling),
}

impl fmt::Display for PoolingChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Model => f.write_str("model"),
            Self::None => f.write_str("none"),
            Self::As(pooling) => pooling.fmt(f),
        }
    }
}

/// A text names no way to choose a pooling.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no pooling; there are model, none, mean, cls, last and rank")]
pub struct UnknownPoolingChoice(String);

impl FromStr for PoolingChoice {
    type Err = UnknownPoolingChoice;

    fn from_str(text: &str) -> Result<Self, UnknownPoolingChoice> {
        match text.to_ascii_lowercase().as_str() {
            "model" => Ok(Self::Model),
            "none" => Ok(Self::None),
            other => other.parse().map(Self::As).map_err(|_| UnknownPoolingChoice(text.chars().take(40).collect())),
        }
    }
}

/// What a deployment does with its model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Work {
    /// How the last stage pools; `None` where it generates text.
    pub pooling: Option<Pooling>,
    /// What prompts are computed for.
    pub task: Task,
}

/// A model cannot do what it is asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PurposeError {
    /// It embeds texts, and nothing else.
    #[error("this {0} model generates no text, it embeds texts; leave --pooling none out")]
    NoText(String),
    /// It has no classifier.
    #[error("this model has no classifier, so it ranks nothing; embed texts with --pooling mean, cls or last")]
    NoClassifier,
    /// More tokens are asked for than it was trained for.
    #[error("--context {asked} is more than the {trained} tokens that this model was trained for")]
    Untrained {
        /// Tokens asked for.
        asked: u32,
        /// Tokens that it was trained for.
        trained: u32,
    },
    /// More tokens are asked for than travel at once.
    #[error(
        "--context {asked} is too long: this model takes all of a text at once, and a batch has {most} rows beside one \
         for each of --parallel; give it {most} or less"
    )]
    TooLong {
        /// Tokens asked for.
        asked: u32,
        /// Most tokens.
        most: u32,
    },
}

impl Work {
    /// What is done with the model of this header.
    ///
    /// # Errors
    /// If the model cannot do what was chosen.
    pub fn of(catalog: &Catalog, choice: PoolingChoice) -> Result<Self, PurposeError> {
        let metadata = catalog.metadata();
        let architecture = metadata.str("general.architecture").unwrap_or_default();
        let get = |key: &str| metadata.get(&format!("{architecture}.{key}"));
        let number = |key| get(key).and_then(|value| value.as_u64()).and_then(Pooling::of_gguf);
        let is_encoder = ENCODERS.contains(&architecture);
        let is_causal = !is_encoder && !matches!(get("attention.causal"), Some(Value::Bool(false)));
        let pooling = match choice {
            PoolingChoice::As(pooling) => Some(pooling),
            PoolingChoice::None if !is_causal => return Err(PurposeError::NoText(architecture.to_owned())),
            PoolingChoice::None => None,
            // A model that sees both ends of a text embeds it, whether it says how or not.
            PoolingChoice::Model => number("pooling_type").or((!is_causal).then_some(Pooling::Mean)),
        };
        let has = |name| catalog.tensor_idx(name).is_some();
        let has_classifier = has("cls.output.weight") || (architecture == "jina-bert-v2" && has("cls.weight"));
        if pooling == Some(Pooling::Rank) && !has_classifier {
            return Err(PurposeError::NoClassifier);
        }
        let ranks_by_last_row = number("classifier.pooling_type") != Some(Pooling::Mean);
        Ok(Self::pooled(pooling, is_causal, ranks_by_last_row))
    }

    /// What is done with a model for text of which there is no header.
    ///
    /// # Errors
    /// If such a model cannot do what was chosen.
    pub fn of_text_model(choice: PoolingChoice) -> Result<Self, PurposeError> {
        match choice {
            PoolingChoice::Model | PoolingChoice::None => Ok(Self::default()),
            PoolingChoice::As(Pooling::Rank) => Err(PurposeError::NoClassifier),
            PoolingChoice::As(pooling) => Ok(Self::pooled(Some(pooling), true, true)),
        }
    }

    fn pooled(pooling: Option<Pooling>, is_causal: bool, ranks_by_last_row: bool) -> Self {
        let Some(pooling) = pooling else { return Self::default() };
        // Of a decoder that looks at the last row the others may come before, in chunks.
        let by_last_row = match pooling {
            Pooling::Last => true,
            Pooling::Rank => ranks_by_last_row,
            Pooling::Mean | Pooling::Cls => false,
        };
        Self { pooling: Some(pooling), task: Task::Pool { at_once: !is_causal || !by_last_row } }
    }

    /// What requests can ask of it.
    pub fn purpose(self) -> Purpose {
        match self.pooling {
            None => Purpose::Generate,
            Some(Pooling::Rank) => Purpose::Rank,
            Some(_) => Purpose::Embed,
        }
    }

    /// Whether a text travels whole, in one pass.
    pub fn is_at_once(self) -> bool {
        self.task == Task::Pool { at_once: true }
    }

    /// Whether it generates text: what is predicted of placements, tokens in a second and the first token of an answer,
    /// is of this alone.
    pub fn generates(self) -> bool {
        self.pooling.is_none()
    }

    /// Tokens of a session: what was `asked` for, else what this program and the model allow. The model was `trained`
    /// for so many, 0 if it does not say, and its hidden state is `n_embd` wide.
    ///
    /// # Errors
    /// If more are asked for than the model was trained for, or than travel at once.
    pub fn context(self, trained: u32, n_embd: u32, asked: Option<u32>, parallel: u32) -> Result<u32, PurposeError> {
        let most = if self.is_at_once() { most_at_once(n_embd, parallel) } else { u32::MAX };
        match asked {
            Some(asked) if trained > 0 && asked > trained => Err(PurposeError::Untrained { asked, trained }),
            Some(asked) if asked > most => Err(PurposeError::TooLong { asked, most }),
            Some(asked) => Ok(asked),
            None => {
                let usual = if self.is_at_once() { DEFAULT_TEXT_MAX } else { DEFAULT_CONTEXT_MAX };
                Ok(if trained > 0 { usual.min(most).min(trained) } else { usual.min(most) })
            }
        }
    }

    /// The longest session that can be asked for, where that is known. The model was `trained` for so many tokens, 0 if
    /// it does not say.
    pub fn longest_context(self, trained: u32, n_embd: u32, parallel: u32) -> Option<u32> {
        let of_model = (trained > 0).then_some(trained);
        let of_a_batch = self.is_at_once().then(|| most_at_once(n_embd, parallel));
        of_model.into_iter().chain(of_a_batch).min()
    }

    /// What the model costs, where it does this: a stage that pools has no head.
    pub fn profile(self, model: ModelProfile) -> ModelProfile {
        match self.pooling {
            None => model,
            Some(_) => ModelProfile { head_bytes: 0, embedding_bytes: 0, n_vocab: PLACEHOLDER_VOCAB, ..model },
        }
    }

    /// What placements are to be best at. What is measured of a model are rows behind others, and a text that travels
    /// whole has none.
    pub fn optimize(self, asked: Optimize) -> Optimize {
        if self.is_at_once() { Optimize::Memory } else { asked }
    }

    /// A plan as it may be told. What is predicted of placements, and most of their reasons, is how text is generated,
    /// which would be made up of a model that generates none.
    pub fn told(self, plan: Plan) -> Plan {
        if self.generates() {
            return plan;
        }
        let is_told = |line: &String| !OF_GENERATED_TEXT.iter().any(|word| line.contains(word));
        let n_reasons = plan.explanation.len();
        let mut explanation: Vec<String> = plan.explanation.into_iter().filter(is_told).collect();
        if explanation.len() < n_reasons {
            explanation.insert(0, BY_PROMPTS.to_owned());
        }
        Plan { stages: plan.stages, prediction: None, explanation }
    }

    /// Prompt rows of one pass.
    pub fn chunk(self, context: u32) -> u32 {
        if self.is_at_once() { context } else { CHUNK }
    }

    /// Most rows of a batch: those of a prompt, and one for each other session.
    pub fn max_rows(self, context: u32, parallel: u32) -> u32 {
        self.chunk(context) + parallel
    }
}

/// Most tokens of a text whose rows travel in one frame, with one row for each other session beside them.
fn most_at_once(n_embd: u32, parallel: u32) -> u32 {
    let row_bytes = 4 * u64::from(n_embd.max(1));
    let of_a_frame = (MAX_FRAME as u64 - FRAME_HEAD_BYTES) / row_bytes;
    MAX_BATCH_ROWS.min(u32::try_from(of_a_frame).unwrap_or(u32::MAX)).saturating_sub(parallel)
}

#[cfg(test)]
mod tests {
    use brigade_gguf::{Builder, GgmlType, Metadata};

    use super::*;

    fn catalog(architecture: &str, keys: &[(&str, Value)], tensors: &[&str]) -> Catalog {
        let mut metadata = Metadata::default();
        metadata.set("general.architecture".to_owned(), Value::String(architecture.to_owned()));
        for (key, value) in keys {
            metadata.set(format!("{architecture}.{key}"), value.clone());
        }
        let mut builder = Builder::new(&metadata);
        for name in tensors {
            builder.tensor(*name, &[32], GgmlType::F32).unwrap();
        }
        Catalog::parse_header(&builder.header_bytes()).unwrap()
    }

    const WHOLE: Task = Task::Pool { at_once: true };
    const IN_CHUNKS: Task = Task::Pool { at_once: false };

    #[track_caller]
    fn check(catalog: &Catalog, choice: &str, expected: Result<(Option<Pooling>, Task), &str>) {
        match (Work::of(catalog, choice.parse().unwrap()), expected) {
            (Ok(work), Ok(expected)) => assert_eq!((work.pooling, work.task), expected, "{choice}"),
            (Err(error), Err(expected)) => assert!(error.to_string().contains(expected), "{choice}: {error}"),
            (found, expected) => panic!("{choice}: {found:?} instead of {expected:?}"),
        }
    }

    #[test]
    fn a_text_model_pools_when_it_is_told() {
        let llama = catalog("llama", &[], &[]);
        check(&llama, "model", Ok((None, Task::Generate)));
        check(&llama, "none", Ok((None, Task::Generate)));
        check(&llama, "last", Ok((Some(Pooling::Last), IN_CHUNKS)));
        check(&llama, "mean", Ok((Some(Pooling::Mean), WHOLE)));
        check(&llama, "rank", Err("no classifier"));
    }

    #[test]
    fn metadata_makes_a_model_embed_or_rank() {
        let last = [("pooling_type", Value::U32(3))];
        let embedding = catalog("qwen3", &last, &[]);
        check(&embedding, "model", Ok((Some(Pooling::Last), IN_CHUNKS)));
        check(&embedding, "none", Ok((None, Task::Generate)));
        let rank = [("pooling_type", Value::U32(4))];
        check(&catalog("qwen3", &rank, &["cls.output.weight"]), "model", Ok((Some(Pooling::Rank), IN_CHUNKS)));
        check(&catalog("bert", &rank, &["cls.output.weight"]), "model", Ok((Some(Pooling::Rank), WHOLE)));
        check(&catalog("jina-bert-v2", &rank, &["cls.weight"]), "model", Ok((Some(Pooling::Rank), WHOLE)));
        check(&catalog("bert", &rank, &["cls.weight"]), "model", Err("no classifier"));
    }

    #[test]
    fn a_model_that_sees_both_ends_takes_texts_whole() {
        check(&catalog("bert", &[], &[]), "model", Ok((Some(Pooling::Mean), WHOLE)));
        check(&catalog("bert", &[], &[]), "cls", Ok((Some(Pooling::Cls), WHOLE)));
        check(&catalog("bert", &[], &[]), "none", Err("generates no text"));
        let both_ends = catalog("qwen2", &[("attention.causal", Value::Bool(false))], &[]);
        check(&both_ends, "last", Ok((Some(Pooling::Last), WHOLE)));
    }

    #[test]
    fn texts_that_travel_whole_are_as_long_as_a_batch_at_most() {
        let work = Work { pooling: Some(Pooling::Mean), task: WHOLE };
        let context = |n_embd: u32, asked: u32| work.context(0, n_embd, Some(asked), 4);
        assert_eq!(context(64, MAX_BATCH_ROWS - 4), Ok(MAX_BATCH_ROWS - 4));
        assert!(context(64, MAX_BATCH_ROWS).is_err());
        assert!(Work::default().context(0, 64, Some(MAX_BATCH_ROWS), 4).is_ok());
        // 63 MiB hold 2016 rows of 8192 values.
        assert_eq!(context(8192, 2012), Ok(2012));
        assert_eq!(context(8192, 2013), Err(PurposeError::TooLong { asked: 2013, most: 2012 }));
        assert_eq!((work.context(0, 8192, None, 4), work.context(0, 1024, None, 4)), (Ok(2012), Ok(DEFAULT_TEXT_MAX)));
        let longest = |work: Work, trained| work.longest_context(trained, 8192, 4);
        assert_eq!((longest(work, 0), longest(work, 512), longest(work, 8192)), (Some(2012), Some(512), Some(2012)));
        assert_eq!((longest(Work::default(), 8192), longest(Work::default(), 0)), (Some(8192), None));
        assert_eq!((work.chunk(512), Work::default().chunk(512)), (512, CHUNK));
        assert_eq!((work.max_rows(512, 4), Work::default().max_rows(512, 4)), (516, CHUNK + 4));
    }

    #[test]
    fn a_session_is_no_longer_than_the_model_was_trained_for() {
        let work = Work::default();
        assert_eq!(work.context(1024, 64, None, 4), Ok(1024));
        assert_eq!(work.context(1 << 20, 64, None, 4), Ok(DEFAULT_CONTEXT_MAX));
        assert_eq!(work.context(0, 64, None, 4), Ok(DEFAULT_CONTEXT_MAX), "a model that does not say");
        assert_eq!(work.context(1024, 64, Some(100), 4), Ok(100));
        let refused = work.context(1024, 64, Some(1025), 4);
        assert_eq!(refused, Err(PurposeError::Untrained { asked: 1025, trained: 1024 }));
    }

    #[test]
    fn a_model_without_a_header_pools_as_one_for_text_does() {
        let of = |choice: &str| Work::of_text_model(choice.parse().unwrap());
        assert_eq!((of("model"), of("none")), (Ok(Work::default()), Ok(Work::default())));
        assert_eq!(of("mean"), Ok(Work { pooling: Some(Pooling::Mean), task: WHOLE }));
        assert_eq!(of("last"), Ok(Work { pooling: Some(Pooling::Last), task: IN_CHUNKS }));
        assert_eq!(of("rank"), Err(PurposeError::NoClassifier));
    }

    #[test]
    fn of_texts_no_tokens_are_promised() {
        let split = "The model is split over a and b: --spread asks for every node.";
        let standby = "Nobody stands by for layers 0..4 of a: no other worker has 1 GiB to spare.";
        let of_tokens = [
            "b holds the whole model alone: with a too, a token for each of 4 sessions would take 45 % longer.",
            "c stays idle: with it, a lone request would take as long.",
            "4 streams together go as fast as b computes.",
        ];
        let plan = |lines: &[&str]| {
            let one = brigade_plan::StagePrediction { compute_s: 0.1, hop_s: 0.0, share: 1.0, busy: 1.0 };
            let bound = brigade_plan::Bound::Compute(0);
            let prediction = brigade_plan::Prediction {
                tokens_per_s: 10.0,
                first_token_s: 1.0,
                prompt_tokens: 512,
                streams: 4,
                streams_tokens_per_s: 20.0,
                stages: vec![one],
                bound,
                streams_bound: bound,
            };
            let explanation = lines.iter().map(|line| (*line).to_owned()).collect();
            Plan { stages: Vec::new(), prediction: Some(prediction), explanation }
        };
        let all = plan(&[&[split][..], &of_tokens, &[standby]].concat());
        let pools = Work { pooling: Some(Pooling::Last), task: IN_CHUNKS };
        let told = pools.told(all.clone());
        assert_eq!(told.explanation, [BY_PROMPTS, split, standby]);
        assert_eq!(told.prediction, None);
        assert_eq!(pools.told(plan(&[split])).explanation, [split], "nothing was left out");
        assert_eq!(Work::default().told(all.clone()), all);
    }

    #[test]
    fn all_choices_are_named_where_one_is_wrong() {
        let error = "bogus".parse::<PoolingChoice>().unwrap_err().to_string();
        let all = Pooling::ALL.map(PoolingChoice::As).into_iter().chain([PoolingChoice::Model, PoolingChoice::None]);
        for choice in all {
            assert!(error.contains(&choice.to_string()), "{choice}: {error}");
            assert_eq!(choice.to_string().parse(), Ok(choice));
        }
    }
}
