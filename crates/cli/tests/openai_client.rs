//! The official Python client of OpenAI against a cluster.
//!
//! `openai_client.py` and `openai_embeddings.py` do the asking. They run in the Python that `BRIGADE_TEST_PYTHON`
//! names, which must have the package `openai`, else in a virtual environment that the first run makes below the target
//! directory.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use brigade_base::Pooling;
use serde_json::json;
use support::encoder::TextOracle;
use support::oracle::{oracle, rendered};
use support::{MAX_ANSWER, Setup, abacus};

/// Release of the client that the environment gets: one that these tests were seen to pass with.
const PACKAGE: &str = "openai==3.52.0";

fn run(program: &Path, args: &[&str]) -> Output {
    let shown = format!("{} {args:?}", program.display());
    let output = Command::new(program).args(args).output().unwrap_or_else(|error| panic!("{shown}: {error}"));
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(
        output.status.success(),
        "{shown} failed: {}\n{}\nTo use a Python that has the package `openai`, set BRIGADE_TEST_PYTHON to its path.",
        text(&output.stdout),
        text(&output.stderr)
    );
    output
}

/// A Python with the package.
fn python() -> PathBuf {
    if let Some(path) = std::env::var_os("BRIGADE_TEST_PYTHON").filter(|path| !path.is_empty()) {
        return path.into();
    }
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join("python-venv");
    let (python, complete) = (dir.join("bin/python"), dir.join(PACKAGE));
    fs::create_dir_all(env!("CARGO_TARGET_TMPDIR")).unwrap();
    // Held until this returns, so that two tests do not make it at once.
    let lock = File::create(dir.with_extension("lock")).unwrap();
    lock.lock().unwrap();
    if !complete.exists() {
        run(Path::new("python3"), &["-m", "venv", "--clear", dir.to_str().unwrap()]);
        run(&python, &["-m", "pip", "install", "--quiet", "--disable-pip-version-check", PACKAGE]);
        File::create(complete).unwrap();
    }
    python
}

#[test]
fn the_official_client_is_content() {
    let python = python();
    let cluster = Setup::of(3).key("right key").start();
    let prompt = "What is 17 + 25?";
    let answer = oracle().chat(prompt);
    let tokens = oracle().tokens(&rendered(prompt));
    let expected = json!({
        "base_url": format!("{}/v1", cluster.url()),
        "key": "right key",
        "prompt": prompt,
        "rendered": rendered(prompt),
        "tokens": tokens,
        "max_tokens": MAX_ANSWER,
        "text": answer.text,
        "logprobs": answer.logprobs,
        "completion_tokens": answer.n_generated,
    });
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/openai_client.py");
    run(&python, &[script.to_str().unwrap(), &expected.to_string()]);
}

#[test]
fn the_official_client_embeds() {
    let python = python();
    let cluster = Setup::of(2).serve(&["--pooling", "mean"]).start();
    let mut oracle = TextOracle::of(&abacus(), Pooling::Mean);
    let texts = ["What is 17 + 25?", "A story.", "7"];
    let tokens: Vec<_> = texts.iter().map(|text| oracle.tokens(text)).collect();
    let vectors: Vec<_> = tokens.iter().map(|text| oracle.unit(text)).collect();
    let base_url = format!("{}/v1", cluster.url());
    let expected = json!({"base_url": base_url, "texts": texts, "tokens": tokens, "vectors": vectors});
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/openai_embeddings.py");
    run(&python, &[script.to_str().unwrap(), &expected.to_string()]);
}
