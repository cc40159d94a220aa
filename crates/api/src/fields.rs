//! Reading a JSON object field by field, so that nothing a client asks for is ever silently ignored.
//!
//! [`Fields`] gives each field out once, checked, with `null` the same as absent; [`Fields::finish`] refuses what is
//! left over. Errors name the field by its path from the body's root.

use std::fmt::Display;
use std::ops::RangeInclusive;

use serde_json::{Map, Value};

use crate::error::ApiError;

/// Most characters of a client's own words that an error repeats: enough to recognise them, too few to fill a log.
const MAX_ECHO_CHARS: usize = 80;

/// The fields of an object that were not read yet.
#[derive(Debug)]
pub(crate) struct Fields {
    path: String,
    map: Map<String, Value>,
}

impl Fields {
    /// The fields of the body itself.
    pub(crate) fn of_body(value: Value) -> Result<Self, ApiError> {
        match value {
            Value::Object(map) => Ok(Self { path: String::new(), map }),
            other => Err(ApiError::bad_request(format!("the body must be a JSON object, not {}", kind(&other)))),
        }
    }

    /// The fields of the object at `path`.
    pub(crate) fn of(value: Value, path: &str) -> Result<Self, ApiError> {
        match value {
            Value::Object(map) => Ok(Self { path: path.to_owned(), map }),
            other => Err(mismatch(path, "an object", &other)),
        }
    }

    /// The path of field `name`.
    pub(crate) fn path(&self, name: &str) -> String {
        if self.path.is_empty() { name.to_owned() } else { format!("{}.{name}", self.path) }
    }

    /// The field as it is.
    pub(crate) fn take(&mut self, name: &str) -> Option<Value> {
        self.map.remove(name).filter(|value| !value.is_null())
    }

    /// The field, or an error that it is missing.
    pub(crate) fn require(&mut self, name: &str) -> Result<Value, ApiError> {
        self.take(name).ok_or_else(|| ApiError::field(self.path(name), format!("`{}` is required", self.path(name))))
    }

    /// A boolean.
    pub(crate) fn bool(&mut self, name: &str) -> Result<Option<bool>, ApiError> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::Bool(value)) => Ok(Some(value)),
            Some(other) => Err(mismatch(&self.path(name), "a boolean", &other)),
        }
    }

    /// A text.
    pub(crate) fn string(&mut self, name: &str) -> Result<Option<String>, ApiError> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::String(value)) => Ok(Some(value)),
            Some(other) => Err(mismatch(&self.path(name), "a string", &other)),
        }
    }

    /// A whole number in `range`.
    pub(crate) fn integer(&mut self, name: &str, range: RangeInclusive<i64>) -> Result<Option<i64>, ApiError> {
        let Some(value) = self.take(name) else { return Ok(None) };
        let path = self.path(name);
        match value.as_i64() {
            Some(number) if range.contains(&number) => Ok(Some(number)),
            Some(number) => Err(out_of_range(&path, number, &range)),
            None if value.is_u64() => Err(out_of_range(&path, &value, &range)),
            None => Err(mismatch(&path, "an integer", &value)),
        }
    }

    /// A number in `range`.
    pub(crate) fn number(&mut self, name: &str, range: RangeInclusive<f64>) -> Result<Option<f64>, ApiError> {
        let Some(value) = self.take(name) else { return Ok(None) };
        number(&self.path(name), &value, &range).map(Some)
    }

    /// A field that changes nothing about the answer, whatever it says.
    pub(crate) fn ignore(&mut self, names: &[&str]) {
        for name in names {
            self.map.remove(*name);
        }
    }

    /// A field of a feature that is not there; only a value that asks for nothing passes.
    pub(crate) fn unsupported(&mut self, name: &str, asks_nothing: impl Fn(&Value) -> bool) -> Result<(), ApiError> {
        match self.take(name) {
            Some(value) if !asks_nothing(&value) => {
                let path = self.path(name);
                let message = format!("`{path}` with this value is not supported yet; leave it out");
                Err(ApiError::field(path, message).with_code("unsupported_value"))
            }
            _ => Ok(()),
        }
    }

    /// Refuses fields that nobody read.
    pub(crate) fn finish(self) -> Result<(), ApiError> {
        match self.map.iter().find(|(_, value)| !value.is_null()) {
            None => Ok(()),
            Some((name, _)) => {
                let path = clip(&self.path(name));
                let message = format!("unknown parameter `{path}`; it would have no effect, so leave it out");
                Err(ApiError::field(path, message).with_code("unknown_parameter"))
            }
        }
    }
}

/// The number `value` in `range`.
pub(crate) fn number(path: &str, value: &Value, range: &RangeInclusive<f64>) -> Result<f64, ApiError> {
    match value.as_f64() {
        Some(number) if range.contains(&number) => Ok(number),
        Some(number) => Err(out_of_range(path, number, range)),
        None => Err(mismatch(path, "a number", value)),
    }
}

/// The error for a value of another kind than `expected`.
pub(crate) fn mismatch(path: &str, expected: &str, found: &Value) -> ApiError {
    ApiError::field(path, format!("`{path}` must be {expected}, not {}", kind(found))).with_code("invalid_type")
}

/// `text`, cut to a length that an error may repeat.
pub(crate) fn clip(text: &str) -> String {
    match text.char_indices().nth(MAX_ECHO_CHARS) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text.to_owned(),
    }
}

fn out_of_range<T: Display>(path: &str, found: impl Display, range: &RangeInclusive<T>) -> ApiError {
    let found = clip(&found.to_string());
    let message = format!("`{path}` must be from {} to {}, not {found}", range.start(), range.end());
    ApiError::field(path, message).with_code("invalid_value")
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(number) => match number.as_f64() {
            // Beyond integers of 64 bits, however it is written.
            Some(number) if number.abs() >= 2_f64.powi(63) => "a number that large",
            Some(number) if number.fract() != 0.0 => "a number with a fraction",
            _ if number.is_f64() => "a number with a point or an exponent",
            _ => "a number",
        },
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}
