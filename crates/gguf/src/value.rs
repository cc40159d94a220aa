//! Metadata of a GGUF file: typed values under ordered keys.
//!
//! Arrays stay in their stored form (raw little-endian bytes, or one buffer for all strings), since a vocabulary has
//! hundreds of thousands of entries that Brigade only carries around.

use std::collections::HashMap;

/// The types a value can have, with GGUF's numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u32)]
#[expect(missing_docs, reason = "the names say all there is")]
pub enum ValueType {
    U8 = 0,
    I8 = 1,
    U16 = 2,
    I16 = 3,
    U32 = 4,
    I32 = 5,
    F32 = 6,
    Bool = 7,
    String = 8,
    Array = 9,
    U64 = 10,
    I64 = 11,
    F64 = 12,
}

impl ValueType {
    /// The type with GGUF's number `id`.
    pub fn from_id(id: u32) -> Option<Self> {
        use ValueType::{Array, Bool, F32, F64, I8, I16, I32, I64, String, U8, U16, U32, U64};
        [U8, I8, U16, I16, U32, I32, F32, Bool, String, Array, U64, I64, F64].get(id as usize).copied()
    }

    /// Bytes of one value; `None` for strings and arrays, whose size is written with each of them.
    pub const fn n_bytes(self) -> Option<usize> {
        match self {
            Self::U8 | Self::I8 | Self::Bool => Some(1),
            Self::U16 | Self::I16 => Some(2),
            Self::U32 | Self::I32 | Self::F32 => Some(4),
            Self::U64 | Self::I64 | Self::F64 => Some(8),
            Self::String | Self::Array => None,
        }
    }
}

/// One metadata value.
#[derive(Debug, Clone, PartialEq)]
#[expect(missing_docs, reason = "the names say all there is")]
pub enum Value {
    U8(u8),
    I8(i8),
    U16(u16),
    I16(i16),
    U32(u32),
    I32(i32),
    F32(f32),
    Bool(bool),
    String(String),
    Array(Array),
    U64(u64),
    I64(i64),
    F64(f64),
}

impl Value {
    /// The type of this value.
    pub fn value_type(&self) -> ValueType {
        match self {
            Self::U8(_) => ValueType::U8,
            Self::I8(_) => ValueType::I8,
            Self::U16(_) => ValueType::U16,
            Self::I16(_) => ValueType::I16,
            Self::U32(_) => ValueType::U32,
            Self::I32(_) => ValueType::I32,
            Self::F32(_) => ValueType::F32,
            Self::Bool(_) => ValueType::Bool,
            Self::String(_) => ValueType::String,
            Self::Array(_) => ValueType::Array,
            Self::U64(_) => ValueType::U64,
            Self::I64(_) => ValueType::I64,
            Self::F64(_) => ValueType::F64,
        }
    }

    /// The scalar of type `ty` whose little-endian bytes start `bytes`; `None` for strings, arrays, too few bytes, and
    /// a bool that is neither 0 nor 1.
    pub(crate) fn scalar(ty: ValueType, bytes: &[u8]) -> Option<Self> {
        fn take<const N: usize>(bytes: &[u8]) -> Option<[u8; N]> {
            bytes.first_chunk().copied()
        }
        Some(match ty {
            ValueType::U8 => Self::U8(u8::from_le_bytes(take(bytes)?)),
            ValueType::I8 => Self::I8(i8::from_le_bytes(take(bytes)?)),
            ValueType::U16 => Self::U16(u16::from_le_bytes(take(bytes)?)),
            ValueType::I16 => Self::I16(i16::from_le_bytes(take(bytes)?)),
            ValueType::U32 => Self::U32(u32::from_le_bytes(take(bytes)?)),
            ValueType::I32 => Self::I32(i32::from_le_bytes(take(bytes)?)),
            ValueType::F32 => Self::F32(f32::from_le_bytes(take(bytes)?)),
            ValueType::U64 => Self::U64(u64::from_le_bytes(take(bytes)?)),
            ValueType::I64 => Self::I64(i64::from_le_bytes(take(bytes)?)),
            ValueType::F64 => Self::F64(f64::from_le_bytes(take(bytes)?)),
            ValueType::Bool => match bytes.first()? {
                0 => Self::Bool(false),
                1 => Self::Bool(true),
                _ => return None,
            },
            ValueType::String | ValueType::Array => return None,
        })
    }

    /// The value as an unsigned number, if it is an integer that is not negative.
    pub fn as_u64(&self) -> Option<u64> {
        match *self {
            Self::U8(n) => Some(n.into()),
            Self::U16(n) => Some(n.into()),
            Self::U32(n) => Some(n.into()),
            Self::U64(n) => Some(n),
            Self::I8(n) => n.try_into().ok(),
            Self::I16(n) => n.try_into().ok(),
            Self::I32(n) => n.try_into().ok(),
            Self::I64(n) => n.try_into().ok(),
            _ => None,
        }
    }
}

impl From<&str> for Value {
    fn from(text: &str) -> Self {
        Self::String(text.to_owned())
    }
}

impl From<u32> for Value {
    fn from(n: u32) -> Self {
        Self::U32(n)
    }
}

impl From<f32> for Value {
    fn from(x: f32) -> Self {
        Self::F32(x)
    }
}

impl From<bool> for Value {
    fn from(b: bool) -> Self {
        Self::Bool(b)
    }
}

/// An array of values of one type. GGUF's nested arrays are refused: no model has them, and libllama cannot read them.
#[derive(Debug, Clone, PartialEq)]
pub enum Array {
    /// Values of fixed size.
    Scalars(Scalars),
    /// Strings.
    Strings(Strings),
}

impl Array {
    /// How many elements.
    pub fn len(&self) -> usize {
        match self {
            Self::Scalars(scalars) => scalars.len(),
            Self::Strings(strings) => strings.len(),
        }
    }

    /// Whether there is no element.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Type of the elements.
    pub fn element_type(&self) -> ValueType {
        match self {
            Self::Scalars(scalars) => scalars.ty,
            Self::Strings(_) => ValueType::String,
        }
    }

    /// An array of strings.
    pub fn of_strings<S: AsRef<[u8]>>(strings: impl IntoIterator<Item = S>) -> Self {
        let mut all = Strings::default();
        for string in strings {
            all.push(string.as_ref());
        }
        Self::Strings(all)
    }

    /// An array of `u32`.
    pub fn of_u32(values: &[u32]) -> Self {
        let bytes = values.iter().flat_map(|n| n.to_le_bytes()).collect();
        Self::Scalars(Scalars { ty: ValueType::U32, bytes })
    }

    /// An array of `i32`.
    pub fn of_i32(values: &[i32]) -> Self {
        let bytes = values.iter().flat_map(|n| n.to_le_bytes()).collect();
        Self::Scalars(Scalars { ty: ValueType::I32, bytes })
    }

    /// An array of `f32`.
    pub fn of_f32(values: &[f32]) -> Self {
        let bytes = values.iter().flat_map(|x| x.to_le_bytes()).collect();
        Self::Scalars(Scalars { ty: ValueType::F32, bytes })
    }

    /// An array of `bool`.
    pub fn of_bool(values: &[bool]) -> Self {
        Self::Scalars(Scalars { ty: ValueType::Bool, bytes: values.iter().map(|b| u8::from(*b)).collect() })
    }
}

/// Values of one fixed-size type, as their little-endian bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Scalars {
    ty: ValueType,
    bytes: Vec<u8>,
}

impl Scalars {
    /// Wraps the bytes; `None` if `ty` has no fixed size or the last value is cut.
    pub fn new(ty: ValueType, bytes: Vec<u8>) -> Option<Self> {
        bytes.len().is_multiple_of(ty.n_bytes()?).then_some(Self { ty, bytes })
    }

    fn width(&self) -> usize {
        // Strings and arrays cannot be wrapped, so the width is there.
        self.ty.n_bytes().unwrap_or(1)
    }

    /// How many values.
    pub fn len(&self) -> usize {
        self.bytes.len() / self.width()
    }

    /// Whether there is no value.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// The values as little-endian bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The values one by one; a bool that is neither 0 nor 1 reads as true, as libllama has it.
    pub fn iter(&self) -> impl Iterator<Item = Value> {
        self.bytes.chunks_exact(self.width()).filter_map(|chunk| match self.ty {
            ValueType::Bool => chunk.first().map(|byte| Value::Bool(*byte != 0)),
            ty => Value::scalar(ty, chunk),
        })
    }

    /// The values `start..end`; `None` if there are fewer.
    pub fn slice(&self, start: usize, end: usize) -> Option<Self> {
        let width = self.width();
        let bytes = self.bytes.get(start.checked_mul(width)?..end.checked_mul(width)?)?.to_vec();
        Some(Self { ty: self.ty, bytes })
    }
}

/// Strings in one buffer. They are bytes: the tokens of a vocabulary need not be UTF-8.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Strings {
    bytes: Vec<u8>,
    /// Where each string ends in `bytes`.
    ends: Vec<usize>,
}

impl Strings {
    /// Appends a string.
    pub fn push(&mut self, string: &[u8]) {
        self.bytes.extend_from_slice(string);
        self.ends.push(self.bytes.len());
    }

    /// How many strings.
    pub fn len(&self) -> usize {
        self.ends.len()
    }

    /// Whether there is no string.
    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    /// The string at `idx`.
    pub fn get(&self, idx: usize) -> Option<&[u8]> {
        let end = *self.ends.get(idx)?;
        let start = if idx == 0 { 0 } else { self.ends[idx - 1] };
        self.bytes.get(start..end)
    }

    /// The strings in order.
    pub fn iter(&self) -> impl Iterator<Item = &[u8]> {
        (0..self.len()).filter_map(|idx| self.get(idx))
    }
}

/// Keys and values in the order of the file; keys are unique.
#[derive(Debug, Clone, Default)]
pub struct Metadata {
    entries: Vec<(String, Value)>,
    by_key: HashMap<String, usize>,
}

impl PartialEq for Metadata {
    fn eq(&self, other: &Self) -> bool {
        self.entries == other.entries
    }
}

impl Metadata {
    /// No keys yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// How many keys.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there is no key.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Keys and values in order.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Value)> {
        self.entries.iter().map(|(key, value)| (key.as_str(), value))
    }

    /// The value under `key`.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.by_key.get(key).map(|idx| &self.entries[*idx].1)
    }

    /// Puts `value` under `key`: in the place of the old value, else at the end.
    pub fn set(&mut self, key: impl Into<String>, value: impl Into<Value>) {
        let key = key.into();
        if let Some(idx) = self.by_key.get(&key) {
            self.entries[*idx].1 = value.into();
        } else {
            self.by_key.insert(key.clone(), self.entries.len());
            self.entries.push((key, value.into()));
        }
    }

    /// A copy with only the keys that `keep` accepts; the values of the others are not copied.
    #[must_use]
    pub fn filtered(&self, mut keep: impl FnMut(&str, &Value) -> bool) -> Self {
        let mut kept = Self::new();
        for (key, value) in self.iter().filter(|(key, value)| keep(key, value)) {
            kept.set(key, value.clone());
        }
        kept
    }

    /// The unsigned integer under `key`, whatever width or sign it is stored with; `None` if absent or no such number.
    pub fn u64(&self, key: &str) -> Option<u64> {
        self.get(key)?.as_u64()
    }

    /// As [`Metadata::u64`], for numbers that fit.
    pub fn u32(&self, key: &str) -> Option<u32> {
        self.u64(key)?.try_into().ok()
    }

    /// The float under `key`.
    pub fn f32(&self, key: &str) -> Option<f32> {
        match self.get(key)? {
            Value::F32(x) => Some(*x),
            Value::F64(x) => Some(*x as f32),
            _ => None,
        }
    }

    /// The string under `key`.
    pub fn str(&self, key: &str) -> Option<&str> {
        match self.get(key)? {
            Value::String(text) => Some(text),
            _ => None,
        }
    }

    /// The bool under `key`.
    pub fn bool(&self, key: &str) -> Option<bool> {
        match self.get(key)? {
            Value::Bool(b) => Some(*b),
            _ => None,
        }
    }

    /// The array under `key`.
    pub fn array(&self, key: &str) -> Option<&Array> {
        match self.get(key)? {
            Value::Array(array) => Some(array),
            _ => None,
        }
    }

    /// The array of strings under `key`.
    pub fn strings(&self, key: &str) -> Option<&Strings> {
        match self.array(key)? {
            Array::Strings(strings) => Some(strings),
            Array::Scalars(_) => None,
        }
    }
}

impl From<Array> for Value {
    fn from(array: Array) -> Self {
        Self::Array(array)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_read_without_loss_or_not_at_all() {
        let mut metadata = Metadata::new();
        metadata.set("a", Value::I64(7));
        metadata.set("b", Value::I8(-1));
        metadata.set("c", Value::U64(1 << 40));
        metadata.set("a", Value::U16(9));
        assert_eq!((metadata.u32("a"), metadata.u32("b"), metadata.u32("c")), (Some(9), None, None));
        assert_eq!((metadata.u64("c"), metadata.len()), (Some(1 << 40), 3));
    }

    #[test]
    fn arrays_keep_their_elements() {
        let Array::Scalars(numbers) = Array::of_u32(&[5, 6, 7]) else { panic!("scalars expected") };
        assert_eq!(numbers.slice(1, 3).map(|s| s.iter().collect::<Vec<_>>()), Some(vec![Value::U32(6), Value::U32(7)]));
        assert_eq!(numbers.slice(1, 4), None);
        assert_eq!(Scalars::new(ValueType::U16, vec![0; 3]), None);
        let Array::Strings(strings) = Array::of_strings(["a", "", "\u{fc}"]) else { panic!("strings expected") };
        assert_eq!(strings.iter().collect::<Vec<_>>(), [b"a".as_slice(), b"", "\u{fc}".as_bytes()]);
        assert_eq!(strings.get(3), None);
    }
}
