//! Which files of a repository are the model that was meant.
//!
//! Files that belong together (the parts of a split model) are one candidate. Without a wish, the only candidate is
//! taken, else the one whose quantisation comes first in [`PREFERRED`]: what is close to the original and fits where
//! the original does not. Projectors of images, adapters and importance matrices are no candidates, but that a file's
//! name tells of an adapter or a matrix may mean that it was made with one: who names the file itself gets it.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use brigade_base::ByteSize;

use crate::source::Pick;
use crate::split::SplitName;

/// Quantisations in the order in which they are liked, where nobody says which.
pub const PREFERRED: [&str; 12] =
    ["Q4_K_M", "Q4_K_S", "UD-Q4_K_XL", "IQ4_XS", "Q4_0", "MXFP4", "Q5_K_M", "Q6_K", "Q8_0", "BF16", "F16", "F32"];

/// Most candidates that a message names.
pub(crate) const MAX_NAMED: usize = 16;

/// A file of a repository.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HubFile {
    /// Its path in the repository.
    pub path: String,
    /// Its length.
    pub n_bytes: u64,
    /// SHA-256 as 64 lower-case hexadecimal digits, where the hub tells it.
    pub sha256: Option<String>,
}

/// No files could be chosen.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ChoiceError {
    /// There is none.
    #[error("has no GGUF model in it")]
    NoModel,
    /// Nothing is called so.
    #[error("has no {pick:?}; it has {choices}")]
    NoSuch {
        /// What was asked for.
        pick: String,
        /// What there is.
        choices: String,
    },
    /// Several are equally good.
    #[error("has several models, say which one by its file: {choices}")]
    Ambiguous {
        /// What there is.
        choices: String,
    },
    /// Parts are missing.
    #[error("has not all parts of {name}: {missing} is missing")]
    Incomplete {
        /// What was asked for.
        name: String,
        /// The first that is missing.
        missing: String,
    },
    /// The file is something else.
    #[error("has {file:?}, but that is {what} and no model")]
    NotAModel {
        /// The file.
        file: String,
        /// What it seems to be.
        what: &'static str,
    },
}

/// One model: a file, or all parts of one.
struct Candidate<'a> {
    /// Path without the numbers of parts and the ending.
    stem: &'a str,
    quant: Option<String>,
    files: Vec<&'a HubFile>,
    missing: Option<String>,
}

impl Candidate<'_> {
    fn has(&self, path: &str) -> bool {
        self.files.iter().any(|file| file.path == path)
    }

    fn is_called(&self, quant: &str) -> bool {
        self.quant.as_deref().is_some_and(|own| own.eq_ignore_ascii_case(quant))
    }

    /// As [`Candidate::is_called`], but for the mark of quantisations that were tuned to the model.
    fn is_kind_of(&self, quant: &str) -> bool {
        let plain = |text: &str| text.to_ascii_uppercase().trim_start_matches("UD-").to_owned();
        self.quant.as_deref().is_some_and(|own| plain(own) == plain(quant))
    }
}

/// The files that `pick` means, parts in their order.
///
/// # Errors
/// If there are none, or it is not clear which.
pub fn choose(files: &[HubFile], pick: &Pick) -> Result<Vec<HubFile>, ChoiceError> {
    let named = match pick {
        Pick::File(name) if other_kind(name) == Some(PROJECTOR) => {
            return Err(ChoiceError::NotAModel { file: name.clone(), what: PROJECTOR });
        }
        Pick::File(name) => candidates(files, |_| true).into_iter().find(|candidate| candidate.has(name)),
        Pick::Quant(_) | Pick::Any => None,
    };
    let candidates = candidates(files, |path| other_kind(path).is_none());
    if candidates.is_empty() && named.is_none() {
        return Err(ChoiceError::NoModel);
    }
    let chosen = match pick {
        Pick::File(name) => named.as_ref().ok_or_else(|| no_such(name, &candidates))?,
        Pick::Quant(quant) => {
            let mut meant: Vec<_> = candidates.iter().filter(|candidate| candidate.is_called(quant)).collect();
            if meant.is_empty() {
                meant.extend(candidates.iter().filter(|candidate| candidate.is_kind_of(quant)));
            }
            match meant[..] {
                [one] => one,
                [] => return Err(no_such(quant, &candidates)),
                _ => return Err(ambiguous(meant.into_iter())),
            }
        }
        Pick::Any => any(&candidates)?,
    };
    match &chosen.missing {
        Some(missing) => Err(ChoiceError::Incomplete { name: chosen.stem.to_owned(), missing: missing.clone() }),
        None => Ok(chosen.files.iter().copied().cloned().collect()),
    }
}

fn any<'a, 'b>(candidates: &'b [Candidate<'a>]) -> Result<&'b Candidate<'a>, ChoiceError> {
    if let [one] = candidates {
        return Ok(one);
    }
    let whole: Vec<_> = candidates.iter().filter(|candidate| candidate.missing.is_none()).collect();
    for quant in PREFERRED {
        let called: Vec<_> = whole.iter().filter(|candidate| candidate.is_called(quant)).collect();
        match &called[..] {
            [] => {}
            [one] => return Ok(one),
            several => return Err(ambiguous(several.iter().map(|candidate| **candidate))),
        }
    }
    Err(ambiguous(candidates.iter()))
}

/// What there is of those that may be one by their paths, in the order of names.
fn candidates(files: &[HubFile], may_be: impl Fn(&str) -> bool) -> Vec<Candidate<'_>> {
    let mut by_stem: BTreeMap<(&str, u32), Vec<(u32, &HubFile)>> = BTreeMap::new();
    for file in files {
        let Some(stem) = strip_ending(&file.path) else { continue };
        if !may_be(&file.path) {
            continue;
        }
        match SplitName::parse(&file.path) {
            Some(split) => by_stem.entry((split.prefix, split.count)).or_default().push((split.no, file)),
            None => by_stem.entry((stem, 1)).or_default().push((1, file)),
        }
    }
    let candidate = |((stem, count), mut parts): ((_, u32), Vec<(u32, _)>)| {
        parts.sort_by_key(|(no, _)| *no);
        parts.dedup_by_key(|(no, _)| *no);
        let is_there = |no: u32| parts.binary_search_by_key(&no, |(no, _)| *no).is_ok();
        let missing = (1..=count).find(|no| !is_there(*no));
        let missing = missing.map(|no| format!("part {no} of {count}"));
        Candidate { stem, quant: quant_of(stem), files: parts.into_iter().map(|(_, file)| file).collect(), missing }
    };
    by_stem.into_iter().map(candidate).collect()
}

fn strip_ending(path: &str) -> Option<&str> {
    let stem = path.get(..path.len().checked_sub(5)?)?;
    path[stem.len()..].eq_ignore_ascii_case(".gguf").then_some(stem)
}

/// What no model has in its name.
const PROJECTOR: &str = "a projector of images";

/// What a file is by its name, if it seems to be no model.
fn other_kind(path: &str) -> Option<&'static str> {
    let name = path.rsplit('/').next().unwrap_or(path).to_ascii_lowercase();
    let has_word = |word: &str| name.split(|c: char| !c.is_ascii_alphanumeric()).any(|part| part == word);
    match () {
        () if name.contains("mmproj") => Some(PROJECTOR),
        () if has_word("imatrix") => Some("an importance matrix"),
        () if has_word("lora") || has_word("adapter") => Some("an adapter"),
        () => None,
    }
}

/// The quantisation that a name tells: its last word that is one.
pub(crate) fn quant_of(stem: &str) -> Option<String> {
    let words: Vec<&str> = stem.split(['-', '.', '/', ' ']).collect();
    let at = words.iter().rposition(|word| is_quant(word))?;
    let is_tuned = at > 0 && words[at - 1].eq_ignore_ascii_case("ud");
    let quant = words[at].to_ascii_uppercase();
    Some(if is_tuned { format!("UD-{quant}") } else { quant })
}

/// Whether a word is a quantisation: `Q4_K_M`, `IQ2_XXS`, `TQ1_0`, `F16`, `BF16`, `MXFP4_MOE`.
fn is_quant(word: &str) -> bool {
    let word = word.to_ascii_uppercase();
    if matches!(word.as_str(), "F16" | "F32" | "BF16" | "FP16" | "FP32") {
        return true;
    }
    if word.starts_with("MXFP4") || word.starts_with("NVFP4") {
        return true;
    }
    let Some(rest) = word.strip_prefix("IQ").or_else(|| word.strip_prefix("TQ")).or_else(|| word.strip_prefix('Q'))
    else {
        return false;
    };
    let mut parts = rest.split('_');
    let is_number = |text: &str| text.len() == 1 && text.bytes().all(|byte| byte.is_ascii_digit());
    parts.next().is_some_and(is_number) && parts.all(|part| !part.is_empty() && part.len() <= 3)
}

fn no_such(pick: &str, candidates: &[Candidate]) -> ChoiceError {
    ChoiceError::NoSuch { pick: pick.to_owned(), choices: named(candidates.iter()) }
}

fn ambiguous<'a, 'b: 'a>(candidates: impl Iterator<Item = &'a Candidate<'b>>) -> ChoiceError {
    ChoiceError::Ambiguous { choices: named(candidates) }
}

/// Candidates for people: what to write, and how large it is.
fn named<'a, 'b: 'a>(candidates: impl Iterator<Item = &'a Candidate<'b>>) -> String {
    let all: Vec<_> = candidates.collect();
    let mut text = String::new();
    for candidate in all.iter().take(MAX_NAMED) {
        let n_bytes = candidate.files.iter().map(|file| file.n_bytes).fold(0, u64::saturating_add);
        let file = candidate.files.first().map_or("", |file| &file.path);
        let comma = if text.is_empty() { "" } else { ", " };
        let _ = write!(text, "{comma}{file} ({})", ByteSize(n_bytes));
    }
    if all.len() > MAX_NAMED {
        let _ = write!(text, " and {} more", all.len() - MAX_NAMED);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn files(paths: &[&str]) -> Vec<HubFile> {
        let file = |path: &&str| HubFile { path: (*path).to_owned(), n_bytes: 1 << 20, sha256: None };
        paths.iter().map(file).collect()
    }

    #[track_caller]
    fn check(paths: &[&str], pick: &Pick, expected: &[&str]) {
        let chosen = choose(&files(paths), pick).unwrap();
        assert_eq!(chosen.iter().map(|file| file.path.as_str()).collect::<Vec<_>>(), expected, "{pick:?}");
    }

    #[track_caller]
    fn check_error(paths: &[&str], pick: &Pick, words: &[&str]) {
        let error = choose(&files(paths), pick).unwrap_err().to_string();
        assert!(words.iter().all(|word| error.contains(word)), "{error}");
    }

    fn quant(text: &str) -> Pick {
        Pick::Quant(text.to_owned())
    }

    fn file(text: &str) -> Pick {
        Pick::File(text.to_owned())
    }

    const REPOSITORY: [&str; 8] = [
        "README.md",
        "m-Q4_0.gguf",
        "m-Q4_K_M.gguf",
        "m-UD-Q2_K_XL.gguf",
        "m-bf16.gguf",
        "BF16/m-F16-00002-of-00002.gguf",
        "BF16/m-F16-00001-of-00002.gguf",
        "mmproj-F16.gguf",
    ];

    #[test]
    fn a_quantisation_names_one_model() {
        check(&REPOSITORY, &quant("q4_0"), &["m-Q4_0.gguf"]);
        check(&REPOSITORY, &quant("Q4_K_M"), &["m-Q4_K_M.gguf"]);
        check(&REPOSITORY, &quant("q2_k_xl"), &["m-UD-Q2_K_XL.gguf"]);
        check(&REPOSITORY, &quant("ud-q2_k_xl"), &["m-UD-Q2_K_XL.gguf"]);
        check(&REPOSITORY, &quant("BF16"), &["m-bf16.gguf"]);
        let parts = ["BF16/m-F16-00001-of-00002.gguf", "BF16/m-F16-00002-of-00002.gguf"];
        check(&REPOSITORY, &quant("f16"), &parts);
        check(&REPOSITORY, &file(parts[1]), &parts);
        check_error(&REPOSITORY, &quant("Q4_K"), &["no \"Q4_K\"", "m-Q4_K_M.gguf (1.0 MiB)"]);
        check_error(&REPOSITORY, &file("mmproj-F16.gguf"), &["projector"]);
        check_error(&REPOSITORY, &file("other.gguf"), &["no \"other.gguf\"", "m-Q4_0.gguf"]);
    }

    #[test]
    fn without_a_wish_the_liked_one_is_taken() {
        check(&REPOSITORY, &Pick::Any, &["m-Q4_K_M.gguf"]);
        check(&["a.gguf", "a-lora-f16.gguf"], &Pick::Any, &["a.gguf"]);
        check_error(&["a-lora-f16.gguf"], &Pick::Any, &["no GGUF model"]);
        check(&["m-Q3_K_S.gguf", "m-F16.gguf"], &Pick::Any, &["m-F16.gguf"]);
        check_error(&["a.gguf", "b.gguf"], &Pick::Any, &["say which one", "a.gguf", "b.gguf"]);
        check_error(&["a-Q4_K_M.gguf", "b-Q4_K_M.gguf"], &Pick::Any, &["a-Q4_K_M.gguf", "b-Q4_K_M.gguf"]);
        check_error(&["a-Q8_0.gguf", "b-q8_0.gguf"], &quant("Q8_0"), &["several"]);
        check_error(&["README.md"], &Pick::Any, &["no GGUF model"]);
        check_error(&[], &quant("Q8_0"), &["no GGUF model"]);
    }

    #[test]
    fn who_names_a_file_gets_it_whatever_its_name_tells() {
        let paths = [
            "a.gguf",
            "a-lora-merged-Q4_0.gguf",
            "b-imatrix-Q4_0-00001-of-00002.gguf",
            "b-imatrix-Q4_0-00002-of-00002.gguf",
        ];
        check(&paths, &file(paths[1]), &paths[1..2]);
        check(&paths[1..2], &file(paths[1]), &paths[1..2]);
        check(&paths, &file(paths[3]), &paths[2..]);
        check_error(&paths[..3], &file(paths[2]), &["part 2 of 2"]);
        check_error(&paths, &quant("Q4_0"), &["no \"Q4_0\"; it has a.gguf"]);
    }

    #[test]
    fn all_parts_must_be_there() {
        let paths = ["m-Q8_0-00001-of-00003.gguf", "m-Q8_0-00003-of-00003.gguf"];
        for pick in [Pick::Any, quant("Q8_0"), file(paths[0])] {
            check_error(&paths, &pick, &["m-Q8_0", "part 2 of 3"]);
        }
        check(&[paths[0], paths[1], "m-F32.gguf"], &Pick::Any, &["m-F32.gguf"]);
    }

    #[test]
    fn quantisations_are_told_from_names() {
        for (name, expected) in [
            ("qwen2.5-0.5b-instruct-q4_k_m", Some("Q4_K_M")),
            ("Llama.IQ2_XXS", Some("IQ2_XXS")),
            ("gpt-oss-20b-mxfp4", Some("MXFP4")),
            ("m-Q4_0_4_4", Some("Q4_0_4_4")),
            ("Q8_0/m", Some("Q8_0")),
            ("qwen3", None),
            ("model", None),
        ] {
            assert_eq!(quant_of(name).as_deref(), expected, "{name}");
        }
    }
}
