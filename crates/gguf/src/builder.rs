//! Writes GGUF version 3: the layout that stage views, travelling headers and synthetic models share.
//!
//! Tensor data starts at a multiple of [`DATA_ALIGNMENT`], tensors follow each other in order, each padded with zeros
//! to that alignment. libllama insists on exactly this: no gaps, no other order.

use std::collections::HashSet;
use std::io::{self, Write};

use crate::ggml_type::GgmlType;
use crate::header::{HeaderError, MAX_KEY_BYTES, MAX_NAME_BYTES, tensor_bytes};
use crate::value::{Array, Metadata, Value};

/// Alignment of tensor data in everything that Brigade writes: GGUF's default, so that no metadata key is needed.
pub const DATA_ALIGNMENT: u64 = 32;

/// Most bytes that are asked of a tensor's source at once: large enough that a call costs nothing beside its bytes.
const CHUNK_BYTES: u64 = 1 << 20;

/// Why a tensor cannot be added.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[expect(missing_docs, reason = "the messages explain the fields")]
pub enum BuildError {
    #[error("the tensor name {name:?} is longer than {MAX_NAME_BYTES} bytes; shorten it")]
    Name { name: String },
    #[error(transparent)]
    Shape(#[from] HeaderError),
}

/// A tensor as it stands in the file that is being made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Placed {
    pub name: String,
    pub dims: Vec<u64>,
    pub ty: GgmlType,
    pub n_bytes: u64,
    /// From the start of the data.
    pub offset: u64,
}

/// A GGUF file in the making: its metadata and its tensors' names and shapes. Their bytes are asked for when writing.
#[derive(Debug, Clone)]
pub struct Builder {
    metadata: Metadata,
    tensors: Vec<Placed>,
    names: HashSet<String>,
    n_data_bytes: u64,
}

impl Builder {
    /// A file with this metadata and no tensors. `general.alignment` is left out, since the alignment is the default,
    /// and so are keys longer than the format allows.
    pub fn new(metadata: &Metadata) -> Self {
        let metadata = metadata.filtered(|key, _| key != "general.alignment" && key.len() as u64 <= MAX_KEY_BYTES);
        Self { metadata, tensors: Vec::new(), names: HashSet::new(), n_data_bytes: 0 }
    }

    /// Appends a tensor of shape `dims`, innermost first.
    ///
    /// # Errors
    /// If the name is taken or too long, or the shape impossible for the type.
    pub fn tensor(&mut self, name: impl Into<String>, dims: &[u64], ty: GgmlType) -> Result<&mut Self, BuildError> {
        let name = name.into();
        if name.len() as u64 > MAX_NAME_BYTES {
            return Err(BuildError::Name { name });
        }
        let n_bytes = tensor_bytes(&name, dims, ty)?;
        let end = self.n_data_bytes.checked_add(n_bytes).and_then(|end| end.checked_next_multiple_of(DATA_ALIGNMENT));
        let Some(end) = end.filter(|end| i64::try_from(*end).is_ok()) else {
            return Err(HeaderError::Size { name }.into());
        };
        if !self.names.insert(name.clone()) {
            return Err(HeaderError::DuplicateTensor { name }.into());
        }
        self.tensors.push(Placed { name, dims: dims.to_vec(), ty, n_bytes, offset: self.n_data_bytes });
        self.n_data_bytes = end;
        Ok(self)
    }

    pub(crate) fn placed(&self) -> &[Placed] {
        &self.tensors
    }

    pub(crate) fn n_data_bytes(&self) -> u64 {
        self.n_data_bytes
    }

    /// The header with the zeros up to where tensor data starts (none if there is no tensor).
    pub fn header_bytes(&self) -> Vec<u8> {
        let mut out = Vec::new();
        out.extend_from_slice(b"GGUF");
        out.extend_from_slice(&3u32.to_le_bytes());
        out.extend_from_slice(&(self.tensors.len() as u64).to_le_bytes());
        out.extend_from_slice(&(self.metadata.len() as u64).to_le_bytes());
        for (key, value) in self.metadata.iter() {
            put_string(&mut out, key.as_bytes());
            out.extend_from_slice(&(value.value_type() as u32).to_le_bytes());
            put_value(&mut out, value);
        }
        for tensor in &self.tensors {
            put_string(&mut out, tensor.name.as_bytes());
            out.extend_from_slice(&(tensor.dims.len() as u32).to_le_bytes());
            tensor.dims.iter().for_each(|dim| out.extend_from_slice(&dim.to_le_bytes()));
            out.extend_from_slice(&tensor.ty.id().to_le_bytes());
            out.extend_from_slice(&tensor.offset.to_le_bytes());
        }
        if !self.tensors.is_empty() {
            out.resize(out.len().next_multiple_of(DATA_ALIGNMENT as usize), 0);
        }
        out
    }

    /// Writes the file. `fill(tensor, offset, bytes)` gives the bytes of tensor number `tensor` from `offset` on; it is
    /// called in order, with whole blocks of the tensor's type, at most about a mebibyte at once.
    ///
    /// # Errors
    /// Those of `out` and `fill`.
    pub fn write(
        &self,
        out: &mut impl Write,
        mut fill: impl FnMut(usize, u64, &mut [u8]) -> io::Result<()>,
    ) -> io::Result<()> {
        out.write_all(&self.header_bytes())?;
        let mut buffer = Vec::new();
        for (idx, tensor) in self.tensors.iter().enumerate() {
            let block = tensor.ty.n_block_bytes();
            let chunk = (CHUNK_BYTES / block).max(1) * block;
            let mut offset = 0;
            while offset < tensor.n_bytes {
                let n = chunk.min(tensor.n_bytes - offset);
                buffer.resize(n as usize, 0);
                fill(idx, offset, &mut buffer)?;
                out.write_all(&buffer)?;
                offset += n;
            }
            let padding = offset.next_multiple_of(DATA_ALIGNMENT) - offset;
            out.write_all(&[0; DATA_ALIGNMENT as usize][..padding as usize])?;
        }
        Ok(())
    }
}

fn put_string(out: &mut Vec<u8>, string: &[u8]) {
    out.extend_from_slice(&(string.len() as u64).to_le_bytes());
    out.extend_from_slice(string);
}

fn put_value(out: &mut Vec<u8>, value: &Value) {
    match value {
        Value::U8(n) => out.push(*n),
        Value::I8(n) => out.extend_from_slice(&n.to_le_bytes()),
        Value::U16(n) => out.extend_from_slice(&n.to_le_bytes()),
        Value::I16(n) => out.extend_from_slice(&n.to_le_bytes()),
        Value::U32(n) => out.extend_from_slice(&n.to_le_bytes()),
        Value::I32(n) => out.extend_from_slice(&n.to_le_bytes()),
        Value::F32(x) => out.extend_from_slice(&x.to_le_bytes()),
        Value::Bool(b) => out.push(u8::from(*b)),
        Value::String(text) => put_string(out, text.as_bytes()),
        Value::U64(n) => out.extend_from_slice(&n.to_le_bytes()),
        Value::I64(n) => out.extend_from_slice(&n.to_le_bytes()),
        Value::F64(x) => out.extend_from_slice(&x.to_le_bytes()),
        Value::Array(array) => {
            out.extend_from_slice(&(array.element_type() as u32).to_le_bytes());
            out.extend_from_slice(&(array.len() as u64).to_le_bytes());
            match array {
                Array::Scalars(scalars) => out.extend_from_slice(scalars.bytes()),
                Array::Strings(strings) => strings.iter().for_each(|string| put_string(out, string)),
            }
        }
    }
}
