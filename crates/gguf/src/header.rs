//! The header of one GGUF file: magic, version, metadata, tensor index.
//!
//! Parsing works on the bytes that exist: a count read from the file never decides an allocation, it is first checked
//! against the bytes that are there. When a header goes on behind the given bytes the parser says how many it needs
//! ([`HeaderError::Truncated`]), so that a file can be read step by step. Versions 2 and 3, little endian.

use std::collections::HashSet;

use crate::ggml_type::GgmlType;
use crate::value::{Array, Metadata, Scalars, Strings, Value, ValueType};

/// Largest header in bytes. The largest known ones (vocabularies of 256 k tokens with merges and scores) have about
/// 20 MiB; ten times that still fits in the memory of any machine that can hold a layer of such a model.
pub const MAX_HEADER_BYTES: u64 = 256 << 20;

/// Most metadata keys. Known files have up to 100; with per-layer keys for 512 layers it would be a few thousand.
pub const MAX_KEYS: u64 = 64 << 10;

/// Most tensors in all files together. libllama knows at most 512 layers, and no architecture has over 100 tensors in
/// one layer.
pub const MAX_TENSORS: u64 = 64 << 10;

/// Longest key in bytes, by the GGUF specification.
pub const MAX_KEY_BYTES: u64 = (64 << 10) - 1;

/// Longest tensor name in bytes: ggml keeps names in 64 bytes with a zero at the end.
pub const MAX_NAME_BYTES: u64 = 63;

/// Longest string in bytes, here for chat templates and licences, of which the longest known has 200 KiB.
pub const MAX_STRING_BYTES: u64 = 16 << 20;

/// Largest alignment of tensor data: the largest page size in use.
pub const MAX_ALIGNMENT: u64 = 64 << 10;

/// Largest file in bytes: a million times the largest known model, and small enough that sums over all tensors with
/// their padding stay below 2^63.
pub(crate) const MAX_FILE_BYTES: u64 = 1 << 60;

const MAGIC: [u8; 4] = *b"GGUF";
const DEFAULT_ALIGNMENT: u64 = 32;
const ALIGNMENT_KEY: &str = "general.alignment";

/// Smallest room that a string takes: its length.
const MIN_STRING_BYTES: u64 = 8;

/// Why bytes are not the header of a GGUF file that Brigade can use.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[expect(missing_docs, reason = "the messages explain the fields")]
pub enum HeaderError {
    #[error("the file ends inside its header: it needs at least {needed} bytes and has {available}; download it again")]
    Truncated { needed: u64, available: u64 },
    #[error("not a GGUF file: it starts with {found:02x?}, not with \"GGUF\"")]
    Magic { found: [u8; 4] },
    #[error("a big-endian GGUF file; convert the model again on a little-endian machine")]
    BigEndian,
    #[error(
        "GGUF version {found} is not supported, only 2 and 3 are; convert the model again with a current llama.cpp"
    )]
    Version { found: u32 },
    #[error("the {what} is {found}, more than the limit of {limit}; this is no sound model file")]
    TooLarge { what: &'static str, found: u64, limit: u64 },
    #[error("the {what} at byte {position} is not UTF-8")]
    NotUtf8 { what: &'static str, position: u64 },
    #[error("the metadata key at byte {position} is empty")]
    EmptyKey { position: u64 },
    #[error("the metadata key {key:?} is there twice")]
    DuplicateKey { key: String },
    #[error("the metadata key {key:?} has the unknown value type {found}")]
    ValueType { key: String, found: u32 },
    #[error("the metadata key {key:?} holds an array of arrays, which no model needs")]
    NestedArray { key: String },
    #[error("the metadata key {key:?} holds a bool that is neither 0 nor 1")]
    Bool { key: String },
    #[error("general.alignment must be a power of two of at most {MAX_ALIGNMENT}, not {found}")]
    Alignment { found: String },
    #[error("the tensor {name:?} is there twice")]
    DuplicateTensor { name: String },
    #[error("the tensor {name:?} has the shape {dims:?}; it needs one to four dimensions, none of them 0")]
    Shape { name: String, dims: Vec<u64> },
    #[error("the tensor {name:?} has {n_dims} dimensions, not one to four")]
    Dimensions { name: String, n_dims: u32 },
    #[error("the tensor {name:?} has the unknown type {found}; a newer or withdrawn quantisation, take another one")]
    TensorType { name: String, found: u32 },
    #[error("the tensor {name:?} has rows of {n_elements} elements, not a multiple of the {block} in a block of {ty}")]
    Row { name: String, n_elements: u64, ty: GgmlType, block: u64 },
    #[error("the size of the tensor {name:?} overflows")]
    Size { name: String },
    #[error("the tensor {name:?} starts at offset {offset}, which is not a multiple of the alignment {alignment}")]
    Misaligned { name: String, offset: u64, alignment: u64 },
    #[error("the tensor {name:?} ends at byte {end}, but the file has {n_file_bytes} bytes; download it again")]
    OutOfFile { name: String, end: u64, n_file_bytes: u64 },
    #[error("the tensors {first:?} and {second:?} overlap")]
    Overlap { first: String, second: String },
    #[error("this is file {no} of {count} of a model, expected file {expected_no} of {expected_count}; name them all")]
    Part { no: u64, count: u64, expected_no: u64, expected_count: u64 },
    #[error("the model says it has {expected} tensors, but its files hold {found}; download it again")]
    TensorCount { expected: u64, found: u64 },
}

/// A tensor: its name, shape and type, and where its bytes are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// Unique in the model, at most [`MAX_NAME_BYTES`] long.
    pub name: String,
    /// One to four dimensions, the innermost (row length) first; none is 0.
    pub dims: Vec<u64>,
    /// How elements are stored.
    pub ty: GgmlType,
    /// Bytes of all elements.
    pub n_bytes: u64,
    /// Which split holds the bytes, from 0.
    pub file: u16,
    /// Where they start, counted from the start of that file.
    pub offset: u64,
}

impl TensorInfo {
    /// Number of elements.
    pub fn n_elements(&self) -> u64 {
        self.dims.iter().product()
    }

    /// Bytes of one row, that is of `dims[0]` elements.
    pub fn row_bytes(&self) -> u64 {
        self.n_bytes / self.dims.iter().skip(1).product::<u64>()
    }
}

/// What one file says about itself.
#[derive(Debug)]
pub(crate) struct Header {
    pub metadata: Metadata,
    pub tensors: Vec<TensorInfo>,
}

impl Header {
    /// Parses the header at the start of `bytes`, which is the whole file or its beginning; the file has
    /// `n_file_bytes`, and `file` is its number among the splits.
    pub fn parse(bytes: &[u8], n_file_bytes: u64, file: u16) -> Result<Self, HeaderError> {
        let mut cursor = Cursor { bytes, position: 0 };
        cursor.preamble()?;
        let n_tensors = cursor.count("number of tensors", MAX_TENSORS)?;
        let n_keys = cursor.count("number of metadata keys", MAX_KEYS)?;
        let metadata = cursor.metadata(n_keys)?;
        let alignment = alignment(&metadata)?;
        let mut tensors = cursor.tensors(n_tensors, file)?;
        let data_start = cursor.position.next_multiple_of(alignment);
        place(&mut tensors, data_start, alignment, n_file_bytes)?;
        Ok(Self { metadata, tensors })
    }
}

fn alignment(metadata: &Metadata) -> Result<u64, HeaderError> {
    let alignment = match metadata.get(ALIGNMENT_KEY) {
        None => DEFAULT_ALIGNMENT,
        Some(value) => value.as_u64().ok_or_else(|| HeaderError::Alignment { found: format!("{value:?}") })?,
    };
    if alignment.is_power_of_two() && alignment <= MAX_ALIGNMENT {
        Ok(alignment)
    } else {
        Err(HeaderError::Alignment { found: alignment.to_string() })
    }
}

/// Turns offsets into positions in the file, and checks that each tensor lies in the file and touches no other.
fn place(tensors: &mut [TensorInfo], data_start: u64, alignment: u64, n_file_bytes: u64) -> Result<(), HeaderError> {
    let n_file_bytes = n_file_bytes.min(MAX_FILE_BYTES);
    let mut spans = Vec::with_capacity(tensors.len());
    for (idx, tensor) in tensors.iter_mut().enumerate() {
        if !tensor.offset.is_multiple_of(alignment) {
            let (name, offset) = (tensor.name.clone(), tensor.offset);
            return Err(HeaderError::Misaligned { name, offset, alignment });
        }
        let start = data_start.checked_add(tensor.offset);
        let end = start.and_then(|start| start.checked_add(tensor.n_bytes));
        match (start, end) {
            (Some(start), Some(end)) if end <= n_file_bytes => {
                tensor.offset = start;
                spans.push((start, end, idx));
            }
            _ => {
                let end = end.unwrap_or(u64::MAX);
                return Err(HeaderError::OutOfFile { name: tensor.name.clone(), end, n_file_bytes });
            }
        }
    }
    spans.sort_unstable();
    for pair in spans.windows(2) {
        if let [(_, end, first), (start, _, second)] = *pair
            && start < end
        {
            let name = |idx: usize| tensors[idx].name.clone();
            return Err(HeaderError::Overlap { first: name(first), second: name(second) });
        }
    }
    Ok(())
}

/// Reads forward through bytes of which more may follow.
struct Cursor<'a> {
    bytes: &'a [u8],
    position: u64,
}

impl<'a> Cursor<'a> {
    /// Fails unless `n` more bytes exist.
    fn need(&self, n: u64) -> Result<(), HeaderError> {
        let needed = self.position.saturating_add(n);
        if needed > MAX_HEADER_BYTES {
            return Err(HeaderError::TooLarge { what: "header size", found: needed, limit: MAX_HEADER_BYTES });
        }
        let available = self.bytes.len() as u64;
        if needed > available { Err(HeaderError::Truncated { needed, available }) } else { Ok(()) }
    }

    fn take(&mut self, n: u64) -> Result<&'a [u8], HeaderError> {
        self.need(n)?;
        // Both ends are within the bytes, which have a `usize` length.
        let taken = &self.bytes[self.position as usize..(self.position + n) as usize];
        self.position += n;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], HeaderError> {
        let taken = self.take(N as u64)?;
        Ok(std::array::from_fn(|i| taken[i]))
    }

    fn u32(&mut self) -> Result<u32, HeaderError> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64, HeaderError> {
        self.array().map(u64::from_le_bytes)
    }

    fn count(&mut self, what: &'static str, limit: u64) -> Result<u64, HeaderError> {
        let found = self.u64()?;
        if found > limit { Err(HeaderError::TooLarge { what, found, limit }) } else { Ok(found) }
    }

    fn string_bytes(&mut self, what: &'static str, limit: u64) -> Result<&'a [u8], HeaderError> {
        let n = self.count(what, limit)?;
        self.take(n)
    }

    fn string(&mut self, what: &'static str, limit: u64) -> Result<&'a str, HeaderError> {
        let position = self.position;
        std::str::from_utf8(self.string_bytes(what, limit)?).map_err(|_| HeaderError::NotUtf8 { what, position })
    }

    fn preamble(&mut self) -> Result<(), HeaderError> {
        let found = self.array()?;
        if found != MAGIC {
            return Err(HeaderError::Magic { found });
        }
        match self.u32()? {
            2 | 3 => Ok(()),
            found if matches!(found.swap_bytes(), 1..=3) => Err(HeaderError::BigEndian),
            found => Err(HeaderError::Version { found }),
        }
    }

    fn metadata(&mut self, n_keys: u64) -> Result<Metadata, HeaderError> {
        let mut metadata = Metadata::new();
        for _ in 0..n_keys {
            let position = self.position;
            let key = self.string("length of a metadata key", MAX_KEY_BYTES)?;
            if key.is_empty() {
                return Err(HeaderError::EmptyKey { position });
            }
            if metadata.get(key).is_some() {
                return Err(HeaderError::DuplicateKey { key: key.to_owned() });
            }
            let ty = self.value_type(key)?;
            let value = self.value(key, ty)?;
            metadata.set(key, value);
        }
        Ok(metadata)
    }

    fn value_type(&mut self, key: &str) -> Result<ValueType, HeaderError> {
        let found = self.u32()?;
        ValueType::from_id(found).ok_or_else(|| HeaderError::ValueType { key: key.to_owned(), found })
    }

    fn value(&mut self, key: &str, ty: ValueType) -> Result<Value, HeaderError> {
        match (ty, ty.n_bytes()) {
            (_, Some(n_bytes)) => {
                let bytes = self.take(n_bytes as u64)?;
                Value::scalar(ty, bytes).ok_or_else(|| HeaderError::Bool { key: key.to_owned() })
            }
            (ValueType::Array, None) => self.array_value(key).map(Value::Array),
            (_, None) => self.string("length of a string", MAX_STRING_BYTES).map(Value::from),
        }
    }

    fn array_value(&mut self, key: &str) -> Result<Array, HeaderError> {
        let ty = self.value_type(key)?;
        let n = self.u64()?;
        match ty.n_bytes() {
            Some(n_bytes) => {
                let bytes = self.take(n.saturating_mul(n_bytes as u64))?;
                match Scalars::new(ty, bytes.to_vec()) {
                    Some(scalars) => Ok(Array::Scalars(scalars)),
                    None => Err(HeaderError::ValueType { key: key.to_owned(), found: ty as u32 }),
                }
            }
            None if ty == ValueType::Array => Err(HeaderError::NestedArray { key: key.to_owned() }),
            None => {
                self.need(n.saturating_mul(MIN_STRING_BYTES))?;
                let mut strings = Strings::default();
                for _ in 0..n {
                    strings.push(self.string_bytes("length of a string", MAX_STRING_BYTES)?);
                }
                Ok(Array::Strings(strings))
            }
        }
    }

    /// The tensors with their offsets as stored, that is relative to the start of the data.
    fn tensors(&mut self, n_tensors: u64, file: u16) -> Result<Vec<TensorInfo>, HeaderError> {
        let mut tensors = Vec::new();
        let mut names = HashSet::new();
        for _ in 0..n_tensors {
            let name = self.string("length of a tensor name", MAX_NAME_BYTES)?;
            if !names.insert(name) {
                return Err(HeaderError::DuplicateTensor { name: name.to_owned() });
            }
            let n_dims = self.u32()?;
            if !(1..=4).contains(&n_dims) {
                return Err(HeaderError::Dimensions { name: name.to_owned(), n_dims });
            }
            let dims = (0..n_dims).map(|_| self.u64()).collect::<Result<Vec<_>, _>>()?;
            let found = self.u32()?;
            let ty =
                GgmlType::from_id(found).ok_or_else(|| HeaderError::TensorType { name: name.to_owned(), found })?;
            let offset = self.u64()?;
            let n_bytes = tensor_bytes(name, &dims, ty)?;
            tensors.push(TensorInfo { name: name.to_owned(), dims, ty, n_bytes, file, offset });
        }
        Ok(tensors)
    }
}

/// Bytes of a tensor of shape `dims`, whose number of elements fits ggml's signed 64 bits.
pub(crate) fn tensor_bytes(name: &str, dims: &[u64], ty: GgmlType) -> Result<u64, HeaderError> {
    let name = || name.to_owned();
    let [n_elements, ..] = *dims else { return Err(HeaderError::Dimensions { name: name(), n_dims: 0 }) };
    if dims.contains(&0) || dims.len() > 4 {
        return Err(HeaderError::Shape { name: name(), dims: dims.to_vec() });
    }
    let block = ty.n_block_elements();
    if !n_elements.is_multiple_of(block) {
        return Err(HeaderError::Row { name: name(), n_elements, ty, block });
    }
    let total = dims.iter().try_fold(1u64, |total, dim| total.checked_mul(*dim));
    match (total, ty.tensor_bytes(dims)) {
        (Some(total), Some(n_bytes)) if i64::try_from(total).is_ok() && i64::try_from(n_bytes).is_ok() => Ok(n_bytes),
        _ => Err(HeaderError::Size { name: name() }),
    }
}
