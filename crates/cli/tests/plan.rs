//! `brigade plan` as people and scripts use it. What docs/planning.md shows is what is printed.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use brigade_base::KvTypes;
use brigade_gguf::{Architecture, Builder, Catalog, GgmlType, Metadata};
use brigade_plan::catalogue::models::{self, Quant, Shape};
use serde_json::{Value, json};
use support::encoder::{N_CTX, write_bert};
use support::{Cluster, abacus, run};

fn docs() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs")
}

/// Runs `brigade` beside the examples of the documents, with nothing from the environment.
fn beside_examples(args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_brigade"));
    for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("BRIGADE_")) {
        command.env_remove(name);
    }
    command.current_dir(docs().join("examples")).args(args).output().unwrap()
}

fn planned(args: &[&str]) -> Value {
    let output = beside_examples(&[&["plan"], args, &["--json"]].concat());
    serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{args:?}: {error}: {output:?}"))
}

#[track_caller]
fn check_error(args: &[&str], code: i32, expected: &str) {
    let output = beside_examples(&[&["plan"], args].concat());
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.code() == Some(code) && said.contains(expected), "{args:?}: {output:?}");
}

/// Stages as names and layers.
fn stages(report: &Value) -> Vec<(String, Value)> {
    let stages = report["plan"]["stages"].as_array().unwrap().iter();
    stages.map(|stage| (stage["name"].as_str().unwrap().to_owned(), stage["layers"].clone())).collect()
}

/// The text of each block of a document that shows a command and what it prints, with that command put in.
fn with_real_output(document: &str) -> String {
    let mut text = String::new();
    let mut lines = document.lines();
    while let Some(line) = lines.next() {
        text.push_str(line);
        text.push('\n');
        if line != "```console" {
            continue;
        }
        let command = lines.next().unwrap();
        let args: Vec<&str> = command.strip_prefix("$ brigade ").unwrap().split(' ').collect();
        let output = beside_examples(&args);
        text.push_str(&format!("{command}\n"));
        text.push_str(&String::from_utf8(output.stdout).unwrap());
        text.push_str(&String::from_utf8(output.stderr).unwrap());
        text.push_str("```\n");
        assert!(lines.any(|line| line == "```"), "{command} has no end");
    }
    text
}

/// With `UPDATE_DOCS=1` the document is written instead.
#[test]
fn the_document_shows_what_is_printed() {
    let path = docs().join("planning.md");
    let written = std::fs::read_to_string(&path).unwrap();
    let real = with_real_output(&written);
    if std::env::var_os("UPDATE_DOCS").is_some() {
        std::fs::write(&path, real).unwrap();
        return;
    }
    for (number, (written, real)) in (1..).zip(written.lines().zip(real.lines())) {
        assert_eq!(written, real, "{}:{number}; UPDATE_DOCS=1 writes it anew", path.display());
    }
    assert_eq!(written.len(), real.len());
}

#[test]
fn plan_tells_who_gets_what() {
    let abacus = abacus();
    let path = abacus.to_str().unwrap();
    let plan = |args: &[&str]| planned(&[&[path, "--context", "1024"], args].concat());
    let fits = plan(&["--node", "a=4GiB", "--node", "b=4GiB"]);
    assert_eq!(stages(&fits), [("b".to_owned(), json!([0, 8]))], "one machine is enough, and that is the coordinator");
    assert!(!fits["plan"]["explanation"].as_array().unwrap().is_empty());
    assert!(fits["plan"]["prediction"].is_null() && fits["advice"][0].as_str().unwrap().contains("@DEVICE"), "{fits}");
    assert_eq!(stages(&plan(&["--node", "a=4GiB,b=4GiB", "--spread"])).len(), 2);
    let pinned = plan(&["--node", "a=4GiB,b=4GiB", "--layers", "5,3"]);
    assert_eq!(stages(&pinned), [("a".to_owned(), json!([0, 5])), ("b".to_owned(), json!([5, 8]))]);
    assert_eq!(pinned["plan"]["stages"][0]["node"].as_str().unwrap().len(), 64, "ids are hexadecimal");
    let text = run(&["plan", path, "--node", "a=4GiB"]).ok();
    assert!(text.contains("0..8"), "{text}");
}

#[test]
fn json_has_what_the_document_lists() {
    let report = planned(&["qwen3-14b", "--cluster", "wifi.toml", "--explain"]);
    for key in
        ["model", "context", "parallel", "optimize", "machines", "plan", "alternatives", "advice", "cost", "what_if"]
    {
        assert!(report.get(key).is_some(), "{key}");
    }
    let prediction = &report["plan"]["prediction"];
    assert!(prediction["tokens_per_s"].as_f64().unwrap() > 0.0 && prediction["first_token_s"].as_f64().unwrap() > 0.0);
    assert_eq!(prediction["streams"], 4);
    assert_eq!(stages(&report).last().unwrap().0, "desktop", "it is to coordinate");
    let shares = prediction["stages"].as_array().unwrap().iter().map(|stage| stage["share"].as_f64().unwrap());
    assert!((shares.sum::<f64>() - 1.0).abs() < 1e-6);
    for other in report["alternatives"].as_array().unwrap() {
        assert!(!other["why_not"].as_str().unwrap().is_empty(), "{other}");
    }
}

/// The header of a file with a model like one of the catalogue, as far as cuts depend on it.
fn header_like(shape: &Shape) -> Catalog {
    let profile = shape.profile(Quant::F16, KvTypes::default());
    let (n_embd, n_vocab) = (u64::from(profile.n_embd), u64::from(profile.n_vocab));
    let mut metadata = Metadata::new();
    metadata.set("general.architecture", shape.architecture.as_str());
    let mut set = |key: &str, value: u32| metadata.set(format!("{}.{key}", shape.architecture), value);
    for (key, value) in [
        ("block_count", profile.n_layers()),
        ("context_length", 4096),
        ("embedding_length", profile.n_embd),
        ("feed_forward_length", profile.n_ff),
        ("attention.head_count", profile.n_heads),
        ("attention.head_count_kv", 1),
        ("attention.key_length", 64),
        ("attention.value_length", 64),
        ("rope.dimension_count", 64),
        ("expert_count", profile.n_experts),
        ("expert_used_count", profile.n_experts_used),
        ("attention.sliding_window", 512),
    ] {
        set(key, value);
    }
    let mut header = Builder::new(&metadata);
    header.tensor("token_embd.weight", &[n_embd, n_vocab], GgmlType::F16).unwrap();
    for layer in 0..profile.n_layers() {
        header.tensor(format!("blk.{layer}.attn_norm.weight"), &[n_embd], GgmlType::F32).unwrap();
    }
    header.tensor("output_norm.weight", &[n_embd], GgmlType::F32).unwrap();
    Catalog::parse_header(&header.header_bytes()).unwrap()
}

#[test]
fn models_of_the_catalogue_can_be_run_and_are_cut_where_their_files_are() {
    for shape in models::shapes() {
        let architecture = Architecture::of(&header_like(shape)).unwrap_or_else(|e| panic!("{}: {e}", shape.name));
        let profile = shape.profile(Quant::Q4_K_M, KvTypes::default());
        assert_eq!(profile.cut_points, architecture.cut_points(), "cuts of {} in models.toml", shape.name);
    }
    let report = planned(&["gpt-oss-120b", "--quant", "MXFP4", "--node", "a=40GiB,b=40GiB", "--spread"]);
    assert_eq!((&report["model"]["supported"], &report["model"]["notes"]), (&json!(true), &json!([])));
    let layers = stages(&report).into_iter().map(|stage| stage.1).collect::<Vec<_>>();
    assert!(layers.len() == 2 && layers[1][0].as_u64().unwrap() % 2 == 0, "{report}");
    check_error(&["gpt-oss-20b", "--node", "a=40GiB,b=40GiB", "--layers", "11,13"], 1, "only before 2, 4");
}

#[test]
fn a_model_that_embeds_is_planned_for_as_it_would_be_served() {
    let (abacus, dir) = (abacus(), tempfile::tempdir().unwrap());
    let (bert, reranker) = (write_bert(dir.path(), false), write_bert(dir.path(), true));
    let plan = |model: &Path, args: &[&str]| {
        let given = [&[model.to_str().unwrap(), "--node", "a=22GiB@rtx-3090,b=22GiB@rtx-3090"], args].concat();
        let text = run(&[&["plan"], &given[..]].concat()).ok();
        assert!(!text.contains("tokens/s") && !text.contains("first "), "{text}");
        assert!(text.contains("not predicted: this model "), "{text}");
        let report = planned(&given);
        assert!(report["plan"]["prediction"].is_null() && report["cost"].is_null(), "{report}");
        assert_eq!((&report["alternatives"], &report["advice"]), (&json!([]), &json!([])));
        (report, text)
    };
    let compute = |report: &Value| report["plan"]["stages"][0]["memory"]["compute"].as_u64().unwrap();
    let (whole, text) = plan(&abacus, &["--pooling", "mean"]);
    assert!(text.contains("4 texts of 1024 tokens") && text.contains("embeds texts, each whole"), "{text}");
    let (chunks, text) = plan(&abacus, &["--pooling", "last"]);
    assert!(text.contains("embeds texts, in chunks"), "{text}");
    let (spread, _) = plan(&abacus, &["--pooling", "last", "--spread"]);
    let why = spread["plan"]["explanation"].as_array().unwrap();
    assert!(why[0].as_str().unwrap().contains("as prompts are"), "{spread}");
    assert!(why.len() == 2 && why[1].as_str().unwrap().contains("--spread asks for every node"), "{spread}");
    let at_once = [&whole, &chunks].map(|report| &report["model"]["is_at_once"]);
    assert_eq!(at_once, [&json!(true), &json!(false)]);
    let said = |report: &Value| (report["model"]["purpose"].clone(), report["model"]["pooling"].clone());
    assert_eq!((said(&whole), said(&chunks)), ((json!("embed"), json!("mean")), (json!("embed"), json!("last"))));
    assert_eq!(whole["kv"], json!({"k": "f16", "v": "f16"}));
    assert!(compute(&whole) > compute(&chunks), "buffers are as large as a whole text");
    assert_eq!(whole["optimize"], "memory", "what is measured of others does not happen there");

    let (with_types, text) = plan(&bert, &["--cache-type-k", "q8_0"]);
    assert!(with_types["kv"].is_null() && !text.contains("KV cache"), "{text}");
    let too_small = ["plan", bert.to_str().unwrap(), "--node", "a=3MiB", "--node", "b=3MiB"];
    let too_small = run(&too_small).stderr;
    assert!(too_small.contains("with the buffers of each node") && !too_small.contains("KV cache"), "{too_small}");
    let (bert, _) = plan(&bert, &["--explain"]);
    assert_eq!((said(&bert), &bert["context"]), ((json!("embed"), json!("mean")), &json!(N_CTX)));
    assert_eq!(bert["plan"]["stages"][0]["memory"]["kv"], 0);
    let (reranker, text) = plan(&reranker, &[]);
    assert!(text.contains("ranks texts"), "{text}");
    assert_eq!(said(&reranker), (json!("rank"), json!("rank")));

    let (named, _) = plan(Path::new("llama-3.1-8b"), &["--quant", "Q2_K", "--pooling", "mean"]);
    assert_eq!(named["context"], 2048, "a text that travels whole");
    let text = planned(&[abacus.to_str().unwrap(), "--node", "a=4GiB@rtx-3090", "--quant", "Q8_0"]);
    assert_eq!(said(&text), (json!("generate"), Value::Null));
    assert!(text["model"]["notes"][0].as_str().unwrap().contains("--quant Q8_0 is for models that are given by name"));
    let path = abacus.to_str().unwrap();
    check_error(&[path, "--pooling", "rank"], 1, "no classifier");
    check_error(&["llama-3.1-8b", "--pooling", "mean", "--context", "20000"], 1, "give it 4028 or less");
}

/// It would be of no use.
#[test]
fn a_model_that_takes_texts_whole_is_not_measured_for_a_plan() {
    let dir = tempfile::tempdir().unwrap();
    let bert = write_bert(dir.path(), false);
    let report = planned(&[bert.to_str().unwrap(), "--state-dir", dir.path().to_str().unwrap()]);
    assert_eq!((&report["machines"]["notes"], stages(&report)[0].1.clone()), (&json!([]), json!([0, 6])));
    assert!(!dir.path().join("profiles").exists());
    let profile = run(&["profile", bert.to_str().unwrap(), "--state-dir", dir.path().to_str().unwrap()]);
    assert!(profile.code == Some(1) && profile.stderr.contains("it takes each text whole"), "{profile:?}");
}

#[test]
fn a_lone_measured_machine_is_planned_for() {
    let (abacus, dir) = (abacus(), tempfile::tempdir().unwrap());
    let state_dir = dir.path().to_str().unwrap();
    let report = planned(&[abacus.to_str().unwrap(), "--state-dir", state_dir, "--context", "512"]);
    assert_eq!(stages(&report)[0].1, json!([0, 8]));
    assert!(report["plan"]["prediction"]["tokens_per_s"].as_f64().unwrap() > 0.0, "{report}");
    assert!(report["cost"].is_null());
    let notes = |report: &Value| {
        let notes = report["machines"]["notes"].as_array().unwrap().clone();
        let notes = notes.into_iter().map(|note| note.as_str().unwrap().to_owned());
        // Other tests run beside this one, and that is told.
        notes.filter(|note| !note.starts_with("Other programs took ")).collect::<Vec<_>>()
    };
    assert_eq!(notes(&report), [""; 0]);
    // Prices that were told are answered.
    let priced = planned(&[abacus.to_str().unwrap(), "--state-dir", state_dir, "--context", "512", "--price-kwh", "1"]);
    assert!(notes(&priced)[0].contains("write watts"), "{priced}");
}

#[test]
fn the_cluster_that_runs_here_is_planned_for() {
    let (cluster, abacus) = (Cluster::of(2), abacus());
    let state_dir = cluster.state_dir("a");
    let report = planned(&[abacus.to_str().unwrap(), "--state-dir", state_dir.to_str().unwrap(), "--spread"]);
    assert!(report["machines"]["source"].as_str().unwrap().contains("cluster that runs here"), "{report}");
    assert_eq!(stages(&report).iter().map(|stage| stage.0.as_str()).collect::<Vec<_>>(), ["w0", "a"]);
}

#[test]
fn power_is_priced() {
    let cost =
        |args: &[&str]| planned(&[&["llama-3.1-8b", "--node", "a=22GiB@rtx-3090"], args].concat())["cost"].clone();
    let usd = |cost: &Value| cost["usd_per_million_tokens"].as_f64().unwrap();
    let (usual, double) = (cost(&[]), cost(&["--price-kwh", "0.60"]));
    assert!((usd(&double) / usd(&usual) - 2.0).abs() < 1e-9, "{usual} {double}");
    assert_eq!(cost(&["--cloud-price", "0.5"])["cloud_usd_per_million_tokens"], 0.5);
    let without = |args: &[&str]| {
        let report = planned(&[args, &["--cloud-price", "0.5"]].concat());
        assert!(report["cost"].is_null(), "{report}");
        report["machines"]["notes"][0].as_str().unwrap().to_owned()
    };
    let said = without(&["llama-3.1-8b", "--node", "a=22GiB"]);
    assert!(said.contains("the power that a would take is not known"), "{said}");
    let said = without(&["llama-3.1-8b", "--pooling", "last", "--node", "a=22GiB@rtx-3090"]);
    assert!(said.contains("this model makes none"), "{said}");
}

#[test]
fn without_speeds_columns_are_still_called_what_was_asked_for() {
    let args = ["plan", "llama-3.1-8b", "--node", "a=22GiB,b=22GiB", "--parallel", "3", "--explain"];
    let text = String::from_utf8(beside_examples(&args).stdout).unwrap();
    let head = text.lines().find(|line| line.starts_with("instead")).unwrap_or_else(|| panic!("{text}"));
    assert!(head.contains("1 stream ") && head.contains("3 streams"), "{head}");
}

#[test]
fn faster_links_and_more_machines_are_tried() {
    let nodes = ["--node", "a=24GiB@rtx-3090,b=24GiB@rtx-3090", "--explain"];
    let rate = |link: &str| {
        let report = planned(&[&["llama-3.3-70b", "--quant", "Q4_0", "--link", link], &nodes[..]].concat());
        let changes = report["what_if"].as_array().unwrap().iter().map(|it| it["change"].as_str().unwrap().to_owned());
        (report["plan"]["prediction"]["tokens_per_s"].as_f64().unwrap(), changes.collect::<Vec<_>>())
    };
    let ((slow, changes), (fast, _)) = (rate("wan-30ms-100mbit"), rate("10gbe"));
    assert!(fast > 1.5 * slow, "{slow} {fast}");
    for expected in ["Ethernet between all", "one more machine like a", "in place of Q4_0", "--context"] {
        assert!(changes.iter().any(|change| change.contains(expected)), "{expected}: {changes:?}");
    }
}

#[test]
fn what_cannot_be_planned_says_what_to_write() {
    check_error(&["llama-3.3-71b"], 2, "llama-3.3-70b");
    check_error(&["llama-3.3-70b", "--quant", "Q4"], 2, "Q4_K_M");
    check_error(&["llama-3.3-70b", "--node", "a=1GiB@rtx-3091"], 2, "rtx-3090");
    check_error(&["llama-3.3-70b", "--node", "a=1GiB@rtx-3090", "--link", "2gbe"], 2, "2.5gbe");
    check_error(&["llama-3.3-70b", "--cluster", "nowhere.toml"], 2, "nowhere.toml");
    check_error(&["llama-3.3-70b", "--cluster", "home.toml", "--node", "a=1GiB"], 2, "cannot be used with");
    check_error(&["llama-3.3-70b", "--quant", "F16", "--cluster", "home.toml"], 1, "With --quant");
    check_error(&["nowhere/model.gguf"], 1, "nowhere/model.gguf");
    check_error(&["nowhere/model.gguf", "--quant", "garbage"], 2, "Q4_K_M");
    check_error(&["llama-3.1-8b", "--link", "10gbe"], 2, "--node");
    check_error(&["llama-3.1-8b", "--link", "10gbe", "--cluster", "home.toml"], 2, "cannot be used with");
    check_error(&["llama-3.1-8b", "--node", "a=1GiB", "--node", "a=2GiB"], 2, "different names");
    for flag in ["--price-kwh", "--cloud-price"] {
        check_error(&["llama-3.1-8b", "--node", "a=22GiB", flag, "-1"], 2, "write a price such as");
    }
}
