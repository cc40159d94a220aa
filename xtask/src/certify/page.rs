//! `docs/architectures.md`: what came of each architecture, as a table.
//!
//! The page is made of findings alone. To tell whether it is stale without hours of work, a quick run compares its own
//! findings with the rows of the page: a cut that was not tried may only be as good as the page says, and everything
//! else must be the same.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::path::Path;

use super::case::{Finding, Word};
use crate::failure::{Failure, Outcome};
use crate::output::line;

/// Where the page is.
const PATH: &str = "docs/architectures.md";

const INTRODUCTION: &str = "
# Architectures

*Written by `cargo xtask certify`: do not edit.*

Which models Brigade can cut into stages, and how exactly. Every architecture that the pinned libllama knows is here.
For each, tiny models with random weights were made and run whole, by llama.cpp's own reader, and cut where they can
be. The first model of each kind was cut before every layer where that is legal, into two, three and four stages and
into as many as there can be; those with more than 16 layers, with other numbers of layers and with quantised weights
in six ways. Two sessions took turns: prompts in two chunks each, answers alone and in one batch, and one session went
back and continued with other tokens. Models that embed texts were given texts, apart and in one batch. `brigade
certify` does the same with a model of yours, and `brigade inspect` shows where it may be cut.

- **exact**: every result had the bits of the whole.
- **within tolerance**: every greedy choice was the same, and no result was further off than 0.0001 of its largest
  value.
- **whole only**: it runs on one node, with the bits of llama.cpp alone; the reason is in the last column.
- **refused**: Brigade does not run it.

*Cuts* says before which layers a stage may begin, counted from 0. A name with something behind the architecture is a
kind of model that libllama treats in another way: with experts, with its head tied to the embedding, or with a number
of layers by which it recognises a size.

What each stage took in memory was predicted within 5 %.
";

/// Largest error of a prediction of what a stage takes in memory, as a share.
const MAX_MEMORY_ERROR: f64 = 0.05;

/// A row of the table.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Row {
    name: String,
    word: Word,
    cuts: String,
    types: String,
    reason: String,
}

/// Writes the page, or says whether it is stale. Fails if a cut differs.
pub fn finish(root: &Path, findings: &[Finding], is_quick: bool, only_check: bool) -> Outcome {
    let wrong: Vec<_> = findings.iter().filter(|finding| finding.word == Word::Differs).collect();
    if let Some(first) = wrong.first() {
        let (n, name) = (wrong.len(), &first.name);
        return Err(Failure::said(format!("{n} models differ, the first is {name}: {}", first.reason)));
    }
    if let Some(off) = findings.iter().find(|finding| finding.memory_error.abs() > MAX_MEMORY_ERROR) {
        let (name, percent) = (&off.name, 100.0 * off.memory_error);
        return Err(Failure::said(format!("the memory of a stage of {name} was predicted {percent:+.1} % off")));
    }
    let path = root.join(PATH);
    let rows = rows(findings);
    if is_quick {
        let page = std::fs::read_to_string(&path).map_err(Failure::io(PATH))?;
        if let Some(stale) = stale(&page, &rows) {
            return Err(Failure::said(format!("{PATH} is stale: {stale}; run `cargo xtask certify` and commit it")));
        }
        return line(format_args!("{PATH} is up to date, as far as one cut of each model tells"));
    }
    let page = page(findings, &rows);
    if !only_check {
        std::fs::write(&path, page).map_err(Failure::io(PATH))?;
        return line(format_args!("wrote {PATH}"));
    }
    if std::fs::read_to_string(&path).map_err(Failure::io(PATH))? == page {
        return line(format_args!("{PATH} is up to date"));
    }
    Err(Failure::said(format!("{PATH} is stale; run `cargo xtask certify` and commit it")))
}

/// A row for each recipe, in the order of the findings.
fn rows(findings: &[Finding]) -> Vec<Row> {
    let mut rows: Vec<Row> = Vec::new();
    for finding in findings {
        match rows.iter_mut().find(|row| row.name == finding.name) {
            Some(row) => {
                if finding.word > row.word {
                    (row.word, row.reason) = (finding.word, finding.reason.clone());
                }
                // Nothing that is refused was run with weights of any type.
                if finding.word != Word::Refused && !row.types.split(", ").any(|ty| ty == finding.ty) {
                    row.types = format!("{}, {}", row.types, finding.ty);
                }
            }
            None => rows.push(Row {
                name: finding.name.clone(),
                word: finding.word,
                cuts: cuts(finding),
                types: if finding.word == Word::Refused { String::new() } else { finding.ty.clone() },
                reason: finding.reason.clone(),
            }),
        }
    }
    rows
}

/// Where a model may be cut, in words.
fn cuts(finding: &Finding) -> String {
    let points = &finding.cut_points;
    let is_each = |step: u32| points.iter().copied().eq((step..finding.n_layers).step_by(step as usize));
    match points.first() {
        None => String::new(),
        Some(1) if is_each(1) => "any layer".to_owned(),
        Some(&first) if is_each(first) && points.len() > 1 => format!("every {first} layers"),
        _ => {
            let points = points.iter().map(u32::to_string).collect::<Vec<_>>().join(", ");
            format!("{points} of {}", finding.n_layers)
        }
    }
}

fn page(findings: &[Finding], rows: &[Row]) -> String {
    let mut text = INTRODUCTION.trim_start().to_owned();
    // An architecture is as good as the best of its models.
    let mut best: BTreeMap<&str, Word> = BTreeMap::new();
    for finding in findings {
        let word = best.entry(&finding.arch).or_insert(finding.word);
        *word = (*word).min(finding.word);
    }
    let n = |word| best.values().filter(|best| **best == word).count();
    let types: BTreeSet<&str> = findings.iter().map(|finding| finding.ty.as_str()).collect();
    let _ = write!(
        text,
        "\n**{} architectures: {} exact, {} within tolerance, {} whole only, {} refused.** {} models were made, with \
         weights in {}, and cut in {} ways.\n",
        best.len(),
        n(Word::Exact),
        n(Word::WithinTolerance),
        n(Word::WholeOnly),
        n(Word::Refused),
        findings.iter().filter(|finding| finding.word != Word::Refused).count(),
        types.into_iter().collect::<Vec<_>>().join(", "),
        findings.iter().map(|finding| finding.n_cuts).sum::<usize>(),
    );
    text.push_str("\n| Model | Verdict | Cuts | Weights | |\n|---|---|---|---|---|\n");
    rows.iter().for_each(|row| text.push_str(&row.line()));
    text
}

impl Row {
    fn line(&self) -> String {
        let Self { name, word, cuts, types, reason } = self;
        format!("| {name} | {} | {cuts} | {types} | {} |\n", word.text(), reason.replace('|', "/"))
    }
}

/// Why the page is not what these rows of a quick run say; `None` if it is.
fn stale(page: &str, rows: &[Row]) -> Option<String> {
    let cells = |line: &str| line.split('|').map(|cell| cell.trim().to_owned()).collect::<Vec<_>>();
    let on_page: BTreeMap<String, Vec<String>> = page
        .lines()
        .filter(|line| line.starts_with("| ") && !line.starts_with("| Model |"))
        .map(cells)
        .filter(|cells| cells.len() > 3)
        .map(|cells| (cells[1].clone(), cells))
        .collect();
    for row in rows {
        let Some(cells) = on_page.get(&row.name) else { return Some(format!("{} is not on it", row.name)) };
        let (word, cuts) = (cells[2].as_str(), cells[3].as_str());
        let agrees = word == row.word.text() || (word == Word::WithinTolerance.text() && row.word == Word::Exact);
        if !agrees || cuts != row.cuts {
            let found = format!("{} {}", row.word.text(), row.cuts);
            return Some(format!("{} is {:?}, and not {:?}", row.name, found.trim(), format!("{word} {cuts}").trim()));
        }
    }
    let names: BTreeSet<&str> = rows.iter().map(|row| row.name.as_str()).collect();
    on_page.keys().find(|name| !names.contains(name.as_str())).map(|name| format!("there is no {name} any more"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn finding(name: &str, ty: &str, word: Word, cut_points: &[u32]) -> Finding {
        Finding {
            name: name.to_owned(),
            arch: name.split('-').next().unwrap_or_default().to_owned(),
            ty: ty.to_owned(),
            n_layers: 8,
            word,
            reason: String::new(),
            cut_points: cut_points.to_vec(),
            n_cuts: cut_points.len(),
            error: 0.0,
            memory_error: 0.0,
        }
    }

    fn some() -> Vec<Finding> {
        vec![
            finding("llama", "F16", Word::Exact, &[1, 2, 3, 4, 5, 6, 7]),
            finding("llama", "Q4_K", Word::WithinTolerance, &[1, 2, 3, 4, 5, 6, 7]),
            finding("llama4", "F16", Word::Exact, &[4]),
            finding("smollm3", "F16", Word::Exact, &[2, 4, 6]),
            finding("gemma3n", "F16", Word::WholeOnly, &[]),
            finding("gemma3n-small", "F16", Word::Exact, &[3]),
            finding("clip", "F16", Word::Refused, &[]),
        ]
    }

    #[test]
    fn a_row_is_as_bad_as_the_worst_of_its_models_and_an_architecture_as_good_as_the_best() {
        let findings = some();
        let rows = rows(&findings);
        assert_eq!(rows[0].line(), "| llama | within tolerance | any layer | F16, Q4_K |  |\n");
        assert_eq!((rows[1].cuts.as_str(), rows[2].cuts.as_str()), ("4 of 8", "every 2 layers"));
        let refused = ["F16", "F16", "Q4_K"].map(|ty| finding("clip", ty, Word::Refused, &[]));
        assert_eq!(self::rows(&refused)[0].line(), "| clip | refused |  |  |  |\n");
        let page = page(&findings, &rows);
        assert!(page.contains("**5 architectures: 4 exact, 0 within tolerance, 0 whole only, 1 refused.**"), "{page}");
    }

    /// What people run most.
    const WELL_KNOWN: &str = "
        llama llama-experts llama4 mistral3 mistral4 qwen2 qwen2moe qwen3 qwen3moe qwen3next qwen35
        qwen35moe gemma gemma2 gemma3 phi2 phi3 phimoe gpt-oss deepseek deepseek2 glm4 glm4moe granite
        granitemoe granitehybrid cohere2 command-r olmo2 olmoe falcon falcon-h1 nemotron nemotron_h minicpm
        starcoder2 gpt2 bloom stablelm smollm3 seed_oss ernie4_5 hunyuan-moe exaone4 internlm2 dbrx jamba
        mamba2 lfm2 bailingmoe2 dots1 minimax-m2 grok minicpm3 rwkv6 gemma2-27b gemma3-27b
    ";

    #[test]
    fn well_known_models_are_cut_exactly_and_the_others_say_why_not() {
        let page = std::fs::read_to_string(crate::root().join(PATH)).unwrap();
        for name in WELL_KNOWN.split_whitespace() {
            assert!(page.contains(&format!("\n| {name} | exact | ")), "{name}");
        }
        for line in page.lines().filter(|line| line.starts_with("| ") && !line.contains("| Model |")) {
            let cells: Vec<&str> = line.trim_matches('|').split('|').map(str::trim).collect();
            assert_eq!(cells.len(), 5, "{line}");
            assert_eq!(cells[1] == "exact", cells[4].is_empty(), "{line}");
        }
    }

    #[test]
    fn memory_must_be_predicted() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("docs")).unwrap();
        let check = |memory_error| {
            let off = Finding { memory_error, ..finding("bert", "F16", Word::Exact, &[1]) };
            let result = finish(dir.path(), &[some(), vec![off]].concat(), false, false);
            result.map_err(|failure| failure.to_string())
        };
        assert_eq!([check(0.04), check(-0.04)], [Ok(()), Ok(())]);
        for off in [0.06, -0.06] {
            assert!(check(off).is_err_and(|why| why.contains("of bert was predicted")), "{off}");
        }
    }

    #[test]
    fn a_page_is_stale_if_a_row_is_other_or_gone() {
        let page = page(&some(), &rows(&some()));
        let check = |change: fn(&mut Vec<Finding>)| {
            // A quick run has one model of each recipe, and sees fewer cuts.
            let mut quick = some();
            quick.remove(1);
            change(&mut quick);
            stale(&page, &rows(&quick))
        };
        assert_eq!(check(|_| ()), None);
        assert!(check(|all| all[1].cut_points = vec![2]).is_some());
        assert!(check(|all| all[3].word = Word::Exact).is_some());
        assert!(check(|all| all[1].word = Word::WithinTolerance).is_some());
        assert!(check(|all| drop(all.pop())).is_some());
        assert!(check(|all| all.push(finding("new", "F16", Word::Exact, &[1]))).is_some());
    }
}
