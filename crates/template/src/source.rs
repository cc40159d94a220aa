//! Prepares the source of a template for the engine.
//!
//! - `{% generation %}` marks the model's own words for training; when answering it says nothing. The engine does not
//!   know it, so it becomes a condition that always holds.
//! - Constants are computed when a template is compiled, and nothing bounds that: `'x' * 99999999` is a text of 95 MiB.
//!   So each `*` is followed by a variable that is one and another `*`.
//! - A chain of `n` operators takes the compiler `n * n` steps, so no tag may have more than [`MAX_TAG_TOKENS`].

use minijinja::machinery::{Token, tokenize};
use minijinja::syntax::SyntaxConfig;
use minijinja::{Environment, Error, ErrorKind};

/// Most tokens between the marks of a tag. The longest of published templates, that compose a tool call in one
/// expression, have about a hundred. The worst source within this bound compiles in about a second.
pub(crate) const MAX_TAG_TOKENS: usize = 1024;

/// The variable that is one.
const ONE: &str = "__one";

/// The source for the engine, which must also get what [`add_names`] adds.
///
/// # Errors
/// If the source has no tokens, or too many in a tag.
pub(crate) fn prepared(source: &str, syntax: &SyntaxConfig) -> Result<String, Error> {
    let source = without_generation_marks(source);
    let mut prepared = String::with_capacity(source.len());
    let (mut n_copied, mut n_tokens) = (0, 0);
    for token in tokenize(&source, false, syntax.clone()) {
        let (token, span) = token?;
        match token {
            Token::TemplateData(_) => {}
            Token::VariableStart | Token::BlockStart => n_tokens = 0,
            Token::Mul => {
                let end = span.end_offset as usize;
                prepared.push_str(source.get(n_copied..end).unwrap_or_default());
                prepared.push_str(ONE);
                prepared.push('*');
                n_copied = end;
            }
            _ => {}
        }
        n_tokens += 1;
        if n_tokens > MAX_TAG_TOKENS {
            let error = format!("line {}: a tag has more than {MAX_TAG_TOKENS} words", span.start_line);
            return Err(Error::new(ErrorKind::SyntaxError, error));
        }
    }
    prepared.push_str(source.get(n_copied..).unwrap_or_default());
    Ok(prepared)
}

/// Adds the names that a prepared source uses.
pub(crate) fn add_names(environment: &mut Environment<'_>) {
    environment.add_global(ONE, 1);
}

fn without_generation_marks(source: &str) -> String {
    let mut result = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        let (before, tag) = rest.split_at(start + 2);
        result.push_str(before);
        rest = tag;
        let word = tag.trim_start_matches(['-', '+']).trim_start();
        let sign_and_space = &tag[..tag.len() - word.len()];
        for (mark, replacement) in [("generation", "if true"), ("endgeneration", "endif")] {
            let Some(after) = word.strip_prefix(mark) else { continue };
            if after.trim_start().trim_start_matches(['-', '+']).starts_with("%}") {
                result.push_str(sign_and_space);
                result.push_str(replacement);
                rest = after;
            }
        }
    }
    result.push_str(rest);
    result
}
