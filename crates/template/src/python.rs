//! What `transformers` adds to Jinja2: `raise_exception`, `strftime_now`, and a `tojson` like Python's.

use std::io;

use jiff::Zoned;
use minijinja::value::Kwargs;
use minijinja::{Environment, Error, ErrorKind, State, Value};
use serde::Serialize as _;

use crate::MAX_OUTPUT_BYTES;
use crate::bounds::{pay, pay_for_all};

/// Longest format of a date, several times the longest that writes one out in words.
const MAX_DATE_FORMAT_BYTES: usize = 256;
/// Largest indent of JSON.
const MAX_INDENT: usize = 16;
/// What a byte of JSON may become: an escaped control character.
const ESCAPED_BYTES: u64 = 6;

/// Adds the filters and functions that do not depend on the request.
pub(crate) fn apply(environment: &mut Environment<'_>) {
    environment.add_function("raise_exception", |message: String| -> Result<Value, Error> {
        Err(Error::new(ErrorKind::InvalidOperation, "raised").with_source(Raised(message)))
    });
    environment.add_filter("tojson", to_json);
}

/// A message of `raise_exception` on its way out through the engine.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct Raised(pub String);

/// `strftime_now`, with `now` for now.
pub(crate) fn strftime_now(now: &Zoned) -> Value {
    let now = now.clone();
    Value::from_function(move |state: &mut State, format: &str| {
        let wrong = |why: String| Error::new(ErrorKind::InvalidOperation, why);
        pay(state, format.len() as u64)?;
        if format.len() > MAX_DATE_FORMAT_BYTES {
            return Err(wrong(format!("strftime_now takes at most {MAX_DATE_FORMAT_BYTES} bytes")));
        }
        jiff::fmt::strtime::format(format, &now).map_err(|error| wrong(format!("strftime_now({format:?}): {error}")))
    })
}

/// JSON as Python's `json.dumps(value, ensure_ascii=False, indent=indent)` writes it: nothing escaped for HTML, and
/// spaces after commas and colons.
fn to_json(state: &mut State<'_, '_>, value: Value, options: Kwargs) -> Result<String, Error> {
    let indent: Option<usize> = options.get("indent")?;
    // Known to `transformers`; what they choose besides the default matters to no prompt.
    let _: (Option<Value>, Option<Value>, Option<Value>) =
        (options.get("ensure_ascii")?, options.get("separators")?, options.get("sort_keys")?);
    options.assert_all_used()?;
    pay_for_all(state, &value, ESCAPED_BYTES)?;
    let mut output = Capped::default();
    let written = match indent {
        Some(width) => {
            let indent = " ".repeat(width.min(MAX_INDENT));
            let pretty = serde_json::ser::PrettyFormatter::with_indent(indent.as_bytes());
            value.serialize(&mut serde_json::Serializer::with_formatter(&mut output, pretty))
        }
        None => value.serialize(&mut serde_json::Serializer::with_formatter(&mut output, PythonFormatter)),
    };
    let text = written
        .map_err(|error| error.to_string())
        .and_then(|()| String::from_utf8(output.0).map_err(|error| error.to_string()))
        .map_err(|error| Error::new(ErrorKind::BadSerialization, error))?;
    pay(state, text.len() as u64)?;
    Ok(text)
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

/// Collects output up to [`MAX_OUTPUT_BYTES`].
#[derive(Default)]
struct Capped(Vec<u8>);

impl io::Write for Capped {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.0.len() + bytes.len() > MAX_OUTPUT_BYTES {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
