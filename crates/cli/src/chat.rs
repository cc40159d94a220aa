//! `brigade chat`: ask a model, or talk to it.

use std::io::{BufRead, IsTerminal, Read};

use serde_json::{Value, json};

use crate::args::ChatArgs;
use crate::endpoint::Endpoint;
use crate::error::Failure;
use crate::output;

/// Longest line of a conversation: longer than any model's context.
const MAX_LINE_BYTES: u64 = 16 << 20;

/// Asks once, or until the end of input.
pub fn run(args: &ChatArgs) -> Result<(), Failure> {
    let endpoint = Endpoint::of(&args.endpoint)?;
    let mut messages = Vec::new();
    if let Some(system) = &args.system {
        messages.push(json!({"role": "system", "content": system}));
    }
    if let Some(prompt) = &args.prompt {
        return ask(&endpoint, args, &mut messages, prompt);
    }
    let prompting = std::io::stdin().is_terminal();
    loop {
        if prompting {
            output::text("> ")?;
        }
        let Some(line) = next_line(&mut std::io::stdin().lock())? else { return Ok(()) };
        if !line.trim().is_empty() {
            ask(&endpoint, args, &mut messages, line.trim())?;
        }
    }
}

/// The next line of a conversation; `None` at the end.
fn next_line(input: &mut impl BufRead) -> Result<Option<String>, Failure> {
    let mut line = Vec::new();
    let read = input.take(MAX_LINE_BYTES + 1).read_until(b'\n', &mut line);
    if read.map_err(|error| Failure::run(format!("reading the input failed: {error}")))? == 0 {
        return Ok(None);
    }
    if line.len() as u64 > MAX_LINE_BYTES {
        return Err(Failure::run(format!("a line of the input has more than {MAX_LINE_BYTES} bytes; split it")));
    }
    let text = String::from_utf8(line);
    text.map(Some).map_err(|_| Failure::run("a line of the input is no UTF-8 text; convert it, for example with iconv"))
}

/// Asks, shows the answer as it comes, and appends both to the conversation.
fn ask(endpoint: &Endpoint, args: &ChatArgs, messages: &mut Vec<Value>, prompt: &str) -> Result<(), Failure> {
    messages.push(json!({"role": "user", "content": prompt}));
    let mut body = json!({
        "model": "default",
        "messages": messages,
        "temperature": args.temperature,
        "stream": true,
    });
    if let Some(n) = args.max_tokens {
        body["max_tokens"] = n.into();
    }
    let mut answer = String::new();
    endpoint.stream("/v1/chat/completions", &body, |_, chunk| {
        if let Some(text) = chunk.pointer("/choices/0/delta/content").and_then(Value::as_str) {
            answer.push_str(text);
            output::text(text)?;
        }
        Ok::<_, Failure>(())
    })?;
    output::line("")?;
    messages.push(json!({"role": "assistant", "content": answer}));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn input_is_lines_of_text() {
        let mut input = &b"one\ntwo"[..];
        assert_eq!(next_line(&mut input).unwrap().as_deref(), Some("one\n"));
        assert_eq!(next_line(&mut input).unwrap().as_deref(), Some("two"));
        assert_eq!(next_line(&mut input).unwrap(), None);
        assert!(next_line(&mut &b"\xff\n"[..]).unwrap_err().to_string().contains("UTF-8"));
        let error = next_line(&mut std::io::BufReader::new(std::io::repeat(b'a'))).unwrap_err();
        assert!(error.to_string().contains("split it"), "{error}");
    }
}
