//! Chat templates, which come with a model's weights.
//!
//! An input is a source and, each behind a zero byte, messages; the first letter of each is its role.

use brigade_template::{ChatTemplate, MAX_OUTPUT_BYTES, Message, Role};
use jiff::Zoned;

/// Most messages.
const MAX_MESSAGES: usize = 16;

/// Any template with any messages: it ends soon, with an error or a prompt of bounded length. The time is the
/// fuzzer's to look at.
pub fn chat_template(bytes: &[u8]) {
    let mut parts = bytes.split(|byte| *byte == 0).map(String::from_utf8_lossy);
    let source = parts.next().unwrap_or_default();
    let messages: Vec<Message> = parts.take(MAX_MESSAGES).map(|text| message(&text)).collect();
    let Ok(template) = ChatTemplate::new(Some(&source), "<s>", "</s>") else { return };
    let now = Zoned::new(jiff::Timestamp::UNIX_EPOCH, jiff::tz::TimeZone::UTC);
    match template.render(&messages, &now) {
        Ok(prompt) => assert!(prompt.len() <= MAX_OUTPUT_BYTES, "a prompt is too long"),
        Err(error) => assert!(error.to_string().len() < 4096, "an error is too long"),
    }
}

fn message(text: &str) -> Message {
    let (role, content) = match text.split_at_checked(1) {
        Some(("s", content)) => (Role::System, content),
        Some(("a", content)) => (Role::Assistant, content),
        Some((_, content)) => (Role::User, content),
        None => (Role::User, text),
    };
    Message { role, content: content.to_owned(), name: None }
}
