//! Chat templates: from messages to the one text that the model was trained on.
//!
//! A model brings its template as Jinja source written for Python's `transformers`; minijinja runs it here with the
//! same whitespace rules, the same extra functions (`raise_exception`, `strftime_now`) and a `tojson` that writes as
//! Python does. A model without a template gets [`CHATML`].
//!
//! Trust. The template comes with the weights, so it is limited: source, work and output have caps, it can reach
//! nothing but the messages and the clock, and it is parsed and run on a thread of its own whose stack holds the
//! deepest expression of the longest source. What the engine leaves unbounded is how much memory a template takes while
//! it works (a text may be doubled at each step), and how deep a value may be that it compares, drops or joins by `~`:
//! a template is code from the model's author. Serve models whose origin you trust, as with the weights themselves.
//!
//! Message *contents* are data to the template, but the rendered text is tokenized with control tokens recognised in
//! all of it, as llama.cpp's and vLLM's servers do: a user who writes `<|im_end|>` ends the turn. Who passes on text of
//! strangers should strip such marks first.

mod bounds;

use std::error::Error as StdError;
use std::io;

use jiff::Zoned;
use minijinja::syntax::SyntaxConfig;
use minijinja::value::Kwargs;
use minijinja::{AutoEscape, Environment, Error, ErrorKind, Value, context};
use serde::Serialize as _;

/// Longest template source. The longest published ones (tools, reasoning, dates) stay under 20 KiB. The engine
/// compiles a chain of `+` in quadratic time, at worst 15 seconds for this length, once when the model is set up.
pub const MAX_SOURCE_BYTES: usize = 64 << 10;
/// Longest rendered prompt: twice the default body limit, since a template adds marks around each message.
pub const MAX_OUTPUT_BYTES: usize = 8 << 20;
/// Stack to parse and to render on. The engine bounds brackets, not chains of operators, so a source may nest nearly
/// as many expressions as it has bytes. Measured: the worst sources of that kind overflow 24 MiB and fit in 32; eight
/// times that leaves room for builds without optimisation and for values that templates nest. Address space, not
/// memory.
const STACK_BYTES: usize = 256 << 20;
/// Instructions of one rendering. A message costs some hundred, so this allows tens of thousands of messages, and ends
/// an endless loop within seconds.
const FUEL: u64 = 10_000_000;
/// Name of the template in the engine's messages; its lack of an extension turns escaping off.
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
        let parse = || {
            let mut environment = environment()?;
            environment.add_template_owned(NAME, without_generation_marks(source))?;
            Ok(environment)
        };
        let environment = on_deep_stack(parse)
            .map_err(|error| TemplateError::Syntax(error.to_string()))?
            .map_err(|error: Error| TemplateError::Syntax(error.to_string()))?;
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
        let now = now.clone();
        let strftime_now = Value::from_function(move |format: &str| strftime(format, &now));
        let context = context! {
            messages => messages.iter().map(Message::to_value).collect::<Value>(),
            add_generation_prompt => true,
            bos_token => self.bos_text.as_str(),
            eos_token => self.eos_text.as_str(),
            tools => (),
            documents => (),
            strftime_now,
        };
        let mut output = Capped { bytes: Vec::new(), full: false };
        let rendered = self
            .environment
            .get_template(NAME)
            .and_then(|template| template.render_captured_to(context, &mut output).map(drop));
        match rendered {
            Ok(()) => String::from_utf8(output.bytes).map_err(|error| TemplateError::Render(error.to_string())),
            Err(_) if output.full => Err(TemplateError::TooLong),
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

/// An engine that behaves as `transformers` sets up Jinja2.
fn environment() -> Result<Environment<'static>, Error> {
    let mut environment = Environment::new();
    environment.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
    environment.set_auto_escape_callback(|_| AutoEscape::None);
    bounds::apply(&mut environment);
    environment.set_fuel(Some(FUEL));
    environment.add_function("raise_exception", |message: String| -> Result<Value, Error> {
        Err(Error::new(ErrorKind::InvalidOperation, "raised").with_source(Raised(message)))
    });
    environment.add_filter("tojson", to_json);
    Ok(environment)
}

/// A message of `raise_exception` on its way out through the engine.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Raised(String);

fn explain(error: &Error) -> TemplateError {
    let mut cause: Option<&(dyn StdError + 'static)> = Some(error);
    while let Some(error) = cause {
        if let Some(Raised(message)) = error.downcast_ref() {
            return TemplateError::Refused(message.clone());
        }
        if error.downcast_ref().is_some_and(|error: &Error| error.kind() == ErrorKind::OutOfFuel) {
            return TemplateError::TooMuchWork;
        }
        cause = error.source();
    }
    TemplateError::Render(error.to_string())
}

fn strftime(format: &str, now: &Zoned) -> Result<String, Error> {
    jiff::fmt::strtime::format(format, now)
        .map_err(|error| Error::new(ErrorKind::InvalidOperation, format!("strftime_now({format:?}): {error}")))
}

/// JSON as Python's `json.dumps(value, ensure_ascii=False, indent=indent)` writes it: nothing escaped for HTML, and
/// spaces after commas and colons.
fn to_json(value: Value, options: Kwargs) -> Result<String, Error> {
    let indent: Option<usize> = options.get("indent")?;
    // Known to `transformers`; what they choose besides the default matters to no prompt.
    let _: (Option<Value>, Option<Value>, Option<Value>) =
        (options.get("ensure_ascii")?, options.get("separators")?, options.get("sort_keys")?);
    options.assert_all_used()?;
    bounds::check_nesting(&value)?;
    let mut output = Capped { bytes: Vec::new(), full: false };
    let mut writer = &mut output;
    let written = match indent {
        Some(width) => {
            let indent = " ".repeat(width.min(16));
            let pretty = serde_json::ser::PrettyFormatter::with_indent(indent.as_bytes());
            value.serialize(&mut serde_json::Serializer::with_formatter(&mut writer, pretty))
        }
        None => value.serialize(&mut serde_json::Serializer::with_formatter(&mut writer, PythonFormatter)),
    };
    written
        .map_err(|error| error.to_string())
        .and_then(|()| String::from_utf8(output.bytes).map_err(|error| error.to_string()))
        .map_err(|error| Error::new(ErrorKind::BadSerialization, error))
}

/// Python's default separators.
struct PythonFormatter;

impl serde_json::ser::Formatter for PythonFormatter {
    fn begin_array_value<W: ?Sized + io::Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + io::Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        writer.write_all(b": ")
    }
}

/// `{% generation %}` marks the model's own words for training; when answering it says nothing. The engine does not
/// know it, so it becomes a condition that always holds.
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

/// Collects output up to [`MAX_OUTPUT_BYTES`].
struct Capped {
    bytes: Vec<u8>,
    full: bool,
}

impl io::Write for &mut Capped {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.bytes.len() + bytes.len() > MAX_OUTPUT_BYTES {
            self.full = true;
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        self.bytes.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
#[path = "template_tests.rs"]
mod tests;
