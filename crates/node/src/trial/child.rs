//! The child that tries a model: one question, one answer, and no way to do harm with it.
//!
//! It owns nothing but its pipes. Its memory and processor time are limited, and it leaves no core file.

use std::io::{self, BufRead, BufReader, Cursor, Read, Write};
use std::process::ExitCode;

use brigade_engine::{AdapterSource, LoadError, StageMemory, StageOptions, Vocabulary, hollow};
use brigade_gguf::MAX_HEADER_BYTES;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use super::{AdapterPart, Answer, Question};
use crate::loaded::chain;
use crate::system;

/// Seconds of processor time that a child may take.
pub(super) const MAX_CPU_S: u64 = 10;

/// Least memory that a child may have: a rehearsal takes a few dozen MiB, the largest vocabularies some hundred.
const MIN_MEMORY: u64 = 1 << 30;

/// Longest input behind the question: the header of a stage, and that of its adapter.
const MAX_INPUT_BYTES: u64 = 2 * MAX_HEADER_BYTES;

/// Longest question: options, whose largest part are factors, up to 16 characters for each of 512 layers in 4 places.
const MAX_QUESTION_BYTES: u64 = 64 << 10;

/// What the program does as a child: reads a question and a header from standard input, tries, and writes the answer to
/// standard output.
pub fn answer() -> ExitCode {
    let memory = (system::total_memory().0 / 2).max(MIN_MEMORY);
    limit(memory);
    let mut input = BufReader::new(io::stdin().lock());
    let mut line = String::new();
    let mut header = Vec::new();
    let read = (&mut input)
        .take(MAX_QUESTION_BYTES)
        .read_line(&mut line)
        .and_then(|_| (&mut input).take(MAX_INPUT_BYTES + 1).read_to_end(&mut header));
    let (Ok(_), Ok(question), true) = (read, serde_json::from_str(&line), header.len() as u64 <= MAX_INPUT_BYTES)
    else {
        return ExitCode::FAILURE;
    };
    let answer = attempt(question, header, memory);
    let Ok(text) = serde_json::to_string(&answer) else { return ExitCode::FAILURE };
    match io::stdout().lock().write_all(text.as_bytes()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

fn attempt(question: Question, mut header: Vec<u8>, memory: u64) -> Answer {
    let split = |header: &mut Vec<u8>, AdapterPart { starts, n_bytes, scale }| {
        let reader = hollow(header.split_off(header.len().min(starts)));
        AdapterSource { reader, n_bytes, weight_bytes: 0, scale }
    };
    let result = match question {
        Question::Rehearse { n_bytes, options } => attempt_graphs(header, n_bytes, &options),
        Question::Adapted { n_bytes, options, adapter } => {
            limit(memory.saturating_add(adapter.n_bytes));
            let adapter = split(&mut header, adapter);
            let reader = Box::new(Cursor::new(header));
            let result = brigade_engine::rehearse_adapted(reader, n_bytes, adapter, &options);
            result.map(|()| Answer::Survived)
        }
        Question::Passes { n_bytes, takes_tokens, options, adapter } => {
            let adapted_bytes = adapter.as_ref().map_or(0, |adapter| adapter.n_bytes);
            limit(memory.saturating_add(n_bytes).saturating_add(adapted_bytes));
            let adapter = adapter.map(|adapter| split(&mut header, adapter));
            brigade_engine::try_passes(header, n_bytes, adapter, &options, takes_tokens);
            Ok(Answer::Survived)
        }
        Question::Vocabulary => attempt_vocabulary(header),
    };
    result.unwrap_or_else(|error| Answer::Refused(chain(&error)))
}

fn attempt_graphs(header: Vec<u8>, n_bytes: u64, options: &StageOptions) -> Result<Answer, LoadError> {
    // Behind the header there is nothing to read: what wants weights fails.
    let reader = Box::new(Cursor::new(header));
    let StageMemory { weights, kv, compute } = brigade_engine::rehearse(reader, n_bytes, options)?;
    Ok(Answer::Memory { weights, kv, compute })
}

fn attempt_vocabulary(header: Vec<u8>) -> Result<Answer, LoadError> {
    let n_bytes = header.len() as u64;
    let vocabulary = Vocabulary::load(Box::new(Cursor::new(header)), n_bytes)?;
    // What it says about a text with all kinds of characters does not matter.
    drop(vocabulary.tokenize(&strange_text(), true, true));
    Ok(Answer::Survived)
}

/// Characters of each length, and of each kind that tokenizers tell apart.
fn strange_text() -> String {
    let ascii = (0..=0x7f_u8).map(char::from);
    let others =
        "  äß ΩЖ אم ไทย 中文 あ 한국 \u{fffd}\u{200d}\u{301} 🧑‍🚒 𝛑 ٣ Ⅷ <|x|> <0x41> </s> 12345 a'll\r\n\n\t".chars();
    ascii.chain(others).collect()
}

/// Limits this process, since what it loads is not to be trusted: no core file, little time, and so many bytes of
/// memory.
fn limit(memory: u64) {
    // A limit that the system does not know, or that is lower already, is no reason to try nothing.
    let set = |resource, most: u64| {
        let maximum = getrlimit(resource).maximum;
        let _ = setrlimit(resource, Rlimit { current: Some(maximum.map_or(most, |max| most.min(max))), maximum });
    };
    set(Resource::Core, 0);
    set(Resource::Cpu, MAX_CPU_S);
    // Drivers of devices reserve more addresses than there is memory.
    if !brigade_engine::HAS_DEVICES {
        set(Resource::As, memory);
    }
    // Where memory is short nevertheless, it is this process that ends.
    #[cfg(target_os = "linux")]
    drop(std::fs::write("/proc/self/oom_score_adj", "1000"));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_child_loads_what_is_sound_and_refuses_the_rest() {
        let answer = attempt(Question::Vocabulary, b"GGUF".to_vec(), MIN_MEMORY);
        assert!(matches!(&answer, Answer::Refused(reason) if !reason.is_empty()), "{answer:?}");
    }
}
