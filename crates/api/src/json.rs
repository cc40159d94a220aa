//! Reading JSON to the letter: an object that has a name twice is refused. Parsers do not agree which of the two
//! counts, so a proxy that looks into requests could see another one than is answered.

use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, Error, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value};

use crate::fields::clip;

/// The value that `bytes` are. Depth is bounded by the parser (128 levels).
///
/// # Errors
/// If they are not JSON, or hold a name twice.
pub(crate) fn parse(bytes: &[u8]) -> serde_json::Result<Value> {
    let mut parser = serde_json::Deserializer::from_slice(bytes);
    let value = Literal.deserialize(&mut parser)?;
    parser.end()?;
    Ok(value)
}

/// Makes a [`Value`] of what the parser meets.
struct Literal;

impl<'de> DeserializeSeed<'de> for Literal {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, parser: D) -> Result<Value, D::Error> {
        parser.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Literal {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_str<E>(self, text: &str) -> Result<Value, E> {
        Ok(text.into())
    }

    fn visit_string<E>(self, text: String) -> Result<Value, E> {
        Ok(text.into())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Value, A::Error> {
        let mut list = Vec::new();
        while let Some(item) = items.next_element_seed(Self)? {
            list.push(item);
        }
        Ok(Value::Array(list))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut members: A) -> Result<Value, A::Error> {
        let mut map = Map::new();
        while let Some(name) = members.next_key::<String>()? {
            if map.contains_key(&name) {
                return Err(A::Error::custom(format!("`{}` is there twice", clip(&name))));
            }
            let value = members.next_value_seed(Self)?;
            map.insert(name, value);
        }
        Ok(Value::Object(map))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_those_of_the_parser() {
        for text in [
            "null",
            "[true, -1, 18446744073709551615, -9223372036854775808, 1.5e-7, 1e300, 0.0, -0]",
            r#"{"a": {"b": ["\u00e9\n", "", {}]}, "b": [[]], "": {"a": null}}"#,
            "\"a\\\"b\"",
        ] {
            assert_eq!(parse(text.as_bytes()).unwrap(), serde_json::from_str::<Value>(text).unwrap(), "{text}");
        }
    }

    #[test]
    fn what_is_not_one_value_to_the_letter_is_refused() {
        let check = |text: &str, says: &str| {
            let error = parse(text.as_bytes()).unwrap_err().to_string();
            assert!(error.contains(says), "{text}: {error}");
        };
        check(r#"{"input": "a", "input": "a"}"#, "`input` is there twice at line 1");
        check(r#"[{"a": {"b": 1, "\u0062": 2}}]"#, "`b` is there twice");
        check("{} {}", "trailing characters");
        check("[1,]", "trailing comma");
        check("", "EOF");
        check("1e999", "out of range");
        check(&"[".repeat(129), "recursion limit");
    }
}
