//! `brigade chat`: ask a model, or talk to it.

use std::io::{BufRead, IsTerminal};

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
        let mut line = String::new();
        let read = std::io::Read::take(std::io::stdin().lock(), MAX_LINE_BYTES).read_line(&mut line)?;
        if read == 0 {
            return Ok(());
        }
        if !line.trim().is_empty() {
            ask(&endpoint, args, &mut messages, line.trim())?;
        }
    }
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
    endpoint.stream("/v1/chat/completions", &body, |chunk| {
        if let Some(text) = chunk.pointer("/choices/0/delta/content").and_then(Value::as_str) {
            answer.push_str(text);
            output::text(text)?;
        }
        Ok(())
    })?;
    output::line("")?;
    messages.push(json!({"role": "assistant", "content": answer}));
    Ok(())
}
