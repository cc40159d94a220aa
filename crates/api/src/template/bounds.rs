//! What of the engine a template may use, and how much each use may make.
//!
//! Filters that chat templates do not need and that make much of little are taken away; the rest that can are given a
//! cap. Values that would be written are looked through first, since the engine writes nested ones by recursion and a
//! namespace may hold itself.

use std::fmt::{self, Write as _};

use minijinja::value::{Kwargs, StringInput, ValueKind, from_args};
use minijinja::{Environment, Error, ErrorKind, State, Value, escape_formatter, filters};
use minijinja_contrib::pycompat::unknown_method_callback;

use super::MAX_OUTPUT_BYTES;

/// Filters of the engine that no published chat template uses.
const REMOVED_FILTERS: [&str; 6] = ["batch", "slice", "format", "pprint", "chain", "zip"];
/// How deep a value that is written may be: the depth of a request's JSON.
const MAX_DEPTH: usize = 128;
/// Most values in one that is written: what a request may hold, and as much again for what the template adds.
const MAX_VALUES: usize = 1_000_000;
/// Most digits of a number in the text that `str.format` fills in, so that no width is above 9999.
const MAX_FORMAT_DIGITS: usize = 4;

/// Takes away and replaces what has no bounds of its own.
pub(super) fn apply(environment: &mut Environment<'_>) {
    for name in REMOVED_FILTERS {
        environment.remove_filter(name);
    }
    environment.set_formatter(|output, state, value| {
        check_nesting(value)?;
        escape_formatter(output, state, value)
    });
    environment.add_filter("string", |state: &State, value: &Value| {
        check_nesting(value)?;
        filters::string(state, value)
    });
    environment.add_filter("join", |value: &Value, joiner: Option<&str>| join(value, joiner.unwrap_or("")));
    environment.add_filter("replace", |value: &str, from: &str, to: &str| {
        check_replace(value, from, to)?;
        Ok::<_, Error>(value.replace(from, to))
    });
    environment.add_filter("indent", indent);
    environment.set_unknown_method_callback(method);
}

/// Fails if `value` is too deep or too large to be written.
pub(super) fn check_nesting(value: &Value) -> Result<(), Error> {
    let mut n_left = MAX_VALUES;
    look_through(value, MAX_DEPTH, &mut n_left)
}

fn look_through(value: &Value, depth_left: usize, n_left: &mut usize) -> Result<(), Error> {
    *n_left = n_left.checked_sub(1).ok_or_else(too_large)?;
    let kind = value.kind();
    if !matches!(kind, ValueKind::Map | ValueKind::Seq | ValueKind::Iterable) {
        return Ok(());
    }
    let depth_left = depth_left.checked_sub(1).ok_or_else(too_large)?;
    for item in value.try_iter()? {
        if kind == ValueKind::Map {
            look_through(&value.get_item(&item)?, depth_left, n_left)?;
        }
        look_through(&item, depth_left, n_left)?;
    }
    Ok(())
}

/// `str.join`, for which only the result is ever kept.
fn join(values: &Value, joiner: &str) -> Result<String, Error> {
    let mut output = CappedText::default();
    for (i, value) in values.try_iter()?.enumerate() {
        check_nesting(&value)?;
        let joiner = if i == 0 { "" } else { joiner };
        output.write_str(joiner).and_then(|()| write!(output, "{value}")).map_err(|_| too_large())?;
    }
    Ok(output.0)
}

fn check_replace(value: &str, from: &str, to: &str) -> Result<(), Error> {
    check_product(value.matches(from).count(), to.len())
}

fn indent(
    value: StringInput<'_>,
    width: Option<usize>,
    first: Option<bool>,
    blank: Option<bool>,
    kwargs: Kwargs,
) -> Result<Value, Error> {
    let width = width.or(kwargs.get("width")?);
    check_product(value.as_str().split('\n').count(), width.unwrap_or(0))?;
    filters::indent(value, width, first, blank, kwargs)
}

/// Python's methods.
fn method(state: &mut State<'_, '_>, value: &Value, name: &str, args: &[Value]) -> Result<Value, Error> {
    match (name, value.as_str()) {
        ("join", Some(joiner)) => {
            let (values,): (&Value,) = from_args(args)?;
            return join(values, joiner).map(Value::from);
        }
        ("replace", Some(text)) => {
            if let [from, to, ..] = args {
                check_replace(text, from.as_str().unwrap_or(""), to.as_str().unwrap_or(""))?;
            }
        }
        ("format", Some(text)) => {
            let longest = text.split(|c: char| !c.is_ascii_digit()).map(str::len).max();
            if longest > Some(MAX_FORMAT_DIGITS) {
                return Err(too_large());
            }
            args.iter().try_for_each(check_nesting)?;
        }
        _ => {}
    }
    unknown_method_callback(state, value, name, args)
}

fn check_product(count: usize, bytes: usize) -> Result<(), Error> {
    match count.checked_mul(bytes) {
        Some(bytes) if bytes <= MAX_OUTPUT_BYTES => Ok(()),
        _ => Err(too_large()),
    }
}

fn too_large() -> Error {
    Error::new(ErrorKind::InvalidOperation, "a value is nested too deeply or too large")
}

/// Collects text up to [`MAX_OUTPUT_BYTES`].
#[derive(Default)]
struct CappedText(String);

impl fmt::Write for CappedText {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        if text.len() > MAX_OUTPUT_BYTES - self.0.len() {
            return Err(fmt::Error);
        }
        self.0.push_str(text);
        Ok(())
    }
}
