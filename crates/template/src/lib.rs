//! Chat templates: from messages to the one text that a model was trained on. Pure: text in, text out.
//!
//! A model brings its template as Jinja source written for Python's `transformers`; minijinja runs it here with the
//! same whitespace rules, the same extra functions (`raise_exception`, `strftime_now`) and a `tojson` that writes as
//! Python does. A model without a template gets [`CHATML`].
//!
//! ```text
//! source --source--> prepared source --engine--> instructions --guard--> with checks --engine--> prompt
//!                                                     what they may use, and what it costs: bounds, python
//! ```
//!
//! Trust. The template comes with the weights, from a stranger, and it is a program. It can reach nothing but the
//! messages and the clock, and it is bounded: [`MAX_SOURCE_BYTES`] to compile; to render, a number of instructions and
//! a number of bytes that they read and write. It takes about a second and half a gigabyte at most, and then ends with
//! an error. It is parsed and run on a thread of its own whose stack holds the deepest nesting that these bounds allow.
//!
//! Message *contents* are data to the template, but the rendered text is tokenized with control tokens recognised in
//! all of it, as llama.cpp's and vLLM's servers do: a user who writes `<|im_end|>` ends the turn. Who passes on text of
//! strangers should strip such marks first.

#![cfg_attr(test, allow(clippy::unwrap_used, reason = "a test that cannot go on has failed"))]

mod bounds;
mod guard;
mod python;
mod source;

use std::error::Error as StdError;
use std::io;

use jiff::Zoned;
use minijinja::syntax::SyntaxConfig;
use minijinja::{AutoEscape, Environment, Error, ErrorKind, Value, context};

use python::Raised;

/// Longest template source. The longest published ones (tools, reasoning, dates) stay under 20 KiB.
pub const MAX_SOURCE_BYTES: usize = 64 << 10;
/// Longest rendered prompt, and longest text on the way to it: twice the default limit of a request's body, since a
/// template adds marks around each message.
pub const MAX_OUTPUT_BYTES: usize = 8 << 20;
/// Stack to parse and to render on. A source may nest statements, and a rendering values, some hundred thousand deep;
/// the worst of both that were found take some 30 MiB. Several times that leaves room for builds without optimisation.
/// Address space, not memory.
const STACK_BYTES: usize = 256 << 20;
/// Instructions of one rendering. A message costs some hundred, so this allows ten thousand messages, and ends an
/// endless loop within a second.
const FUEL: u64 = 10_000_000;
/// Most bytes of an error's text, which goes to the client: enough for the longest that published templates raise.
const MAX_ERROR_BYTES: usize = 1 << 10;
/// Name of the template in the engine's messages.
const NAME: &str = "chat_template";

/// The template for models that have none: the most common one.
pub const CHATML: &str = "{% for message in messages %}\
    {{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}\
    {% endfor %}\
    {% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

/// Why messages could not become a prompt.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TemplateError {
    /// The source is longer than [`MAX_SOURCE_BYTES`].
    #[error(
        "the model's chat template has {bytes} bytes, more than the {MAX_SOURCE_BYTES} allowed; use /v1/completions"
    )]
    SourceTooLong {
        /// Its length.
        bytes: usize,
    },
    /// The source is no template that this engine understands.
    #[error("the model's chat template cannot be used ({0}); use /v1/completions")]
    Syntax(String),
    /// The template itself refused the messages, by `raise_exception`.
    #[error("the model's chat template refuses these messages: {0}")]
    Refused(String),
    /// The prompt is longer than [`MAX_OUTPUT_BYTES`].
    #[error("the messages render to more than {MAX_OUTPUT_BYTES} bytes; shorten them")]
    TooLong,
    /// Rendering took more than the work allowed.
    #[error("the chat template needs too much work for these messages; send fewer")]
    TooMuchWork,
    /// The template went wrong on these messages.
    #[error("the model's chat template fails on these messages: {0}")]
    Render(String),
}

/// Who speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Instructions above the conversation.
    System,
    /// The person.
    User,
    /// The model.
    Assistant,
}

/// One message as templates see it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    /// Who speaks.
    pub role: Role,
    /// What is said.
    pub content: String,
    /// Tells speakers of one role apart, where a template cares.
    pub name: Option<String>,
}

impl Role {
    /// What templates call it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::System => "system",
            Self::User => "user",
            Self::Assistant => "assistant",
        }
    }
}

impl Message {
    fn to_value(&self) -> Value {
        let named = self.name.as_deref().map(|name| ("name", name));
        Value::from_pairs([("role", self.role.as_str()), ("content", &self.content)].into_iter().chain(named))
    }
}

/// A model's chat template, parsed once.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    bos_text: String,
    eos_text: String,
}

impl ChatTemplate {
    /// Parses `source`, or takes [`CHATML`]. The texts of start and end token are for the template's use.
    ///
    /// # Errors
    /// [`TemplateError::SourceTooLong`] or [`TemplateError::Syntax`].
    pub fn new(source: Option<&str>, bos_text: &str, eos_text: &str) -> Result<Self, TemplateError> {
        let source = source.unwrap_or(CHATML);
        if source.len() > MAX_SOURCE_BYTES {
            return Err(TemplateError::SourceTooLong { bytes: source.len() });
        }
        let environment = on_deep_stack(|| parsed(source))
            .map_err(|error| TemplateError::Syntax(shortened(error.to_string())))?
            .map_err(|error| TemplateError::Syntax(shortened(error.to_string())))?;
        Ok(Self { environment, bos_text: bos_text.to_owned(), eos_text: eos_text.to_owned() })
    }

    /// The prompt that asks the model for the answer to `messages`. `now` is what the template takes for today.
    ///
    /// # Errors
    /// All but the two of [`ChatTemplate::new`].
    pub fn render(&self, messages: &[Message], now: &Zoned) -> Result<String, TemplateError> {
        on_deep_stack(|| self.render_here(messages, now))
            .unwrap_or_else(|error| Err(TemplateError::Render(error.to_string())))
    }

    fn render_here(&self, messages: &[Message], now: &Zoned) -> Result<String, TemplateError> {
        let context = context! {
            messages => messages.iter().map(Message::to_value).collect::<Value>(),
            add_generation_prompt => true,
            bos_token => self.bos_text.as_str(),
            eos_token => self.eos_text.as_str(),
            tools => (),
            documents => (),
            strftime_now => python::strftime_now(now),
        };
        match guard::render(&self.environment, NAME, context) {
            Ok(text) if text.len() > MAX_OUTPUT_BYTES => Err(TemplateError::TooLong),
            Ok(text) => Ok(text),
            Err(error) => Err(explain(&error)),
        }
    }

    /// Whether `prompt` begins with the start token's text, so that the tokenizer must not put it there again.
    pub fn starts_itself(&self, prompt: &str) -> bool {
        !self.bos_text.is_empty() && prompt.starts_with(&self.bos_text)
    }
}

/// Runs `work` on a thread with [`STACK_BYTES`] and waits for it. The thread costs some ten microseconds; memory is
/// taken only for what of the stack is used.
fn on_deep_stack<T: Send>(work: impl FnOnce() -> T + Send) -> io::Result<T> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("chat-template".to_owned()).stack_size(STACK_BYTES);
        let ended = thread.spawn_scoped(scope, work)?.join();
        ended.map_err(|_| io::Error::other("the template engine panicked"))
    })
}

/// An engine that behaves as `transformers` sets up Jinja2, with the template in it.
fn parsed(source: &str) -> Result<Environment<'static>, Error> {
    let mut environment = Environment::empty();
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?;
    let source = source::prepared(source, &syntax)?;
    environment.set_syntax(syntax);
    environment.set_auto_escape_callback(|_| AutoEscape::None);
    environment.set_debug(false);
    environment.set_fuel(Some(FUEL));
    source::add_names(&mut environment);
    bounds::apply(&mut environment);
    python::apply(&mut environment);
    environment.add_template_owned(NAME, source)?;
    guard::check(&environment, NAME)?;
    Ok(environment)
}

fn explain(error: &Error) -> TemplateError {
    let mut cause: Option<&(dyn StdError + 'static)> = Some(error);
    while let Some(error) = cause {
        if let Some(Raised(message)) = error.downcast_ref() {
            return TemplateError::Refused(shortened(message.clone()));
        }
        if error.downcast_ref().is_some_and(|error: &Error| error.kind() == ErrorKind::OutOfFuel) {
            return TemplateError::TooMuchWork;
        }
        cause = error.source();
    }
    TemplateError::Render(shortened(error.to_string()))
}

/// At most the first [`MAX_ERROR_BYTES`] of an error's text.
fn shortened(mut text: String) -> String {
    if let Some((end, _)) = text.char_indices().find(|(start, c)| start + c.len_utf8() > MAX_ERROR_BYTES) {
        text.truncate(end);
        text.push_str("...");
    }
    text
}

#[cfg(test)]
mod tests;
