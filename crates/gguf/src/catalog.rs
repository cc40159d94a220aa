//! A whole model's header: metadata and tensors of all splits, merged.
//!
//! A catalog comes from files ([`ModelFile`](crate::ModelFile)) or from the header that a coordinator sends. Tensor
//! *indices* are the same on every node that works on a model; offsets are not, so bytes are asked for by index.

use std::collections::HashMap;
use std::io;

use brigade_base::Hash;

use crate::builder::Builder;
use crate::ggml_type::GgmlType;
use crate::header::{Header, HeaderError, MAX_FILE_BYTES, MAX_TENSORS, TensorInfo};
use crate::value::Metadata;

/// Gives the bytes of a model's tensors: a local file, or a peer.
pub trait TensorSource: Send + Sync {
    /// Fills `buf` with the bytes of tensor `tensor_idx` from `offset` on.
    ///
    /// # Errors
    /// If the range is not in the tensor, or the bytes cannot be had.
    fn read_tensor(&self, tensor_idx: usize, offset: u64, buf: &mut [u8]) -> io::Result<()>;
}

/// Which part of a model needs a tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum TensorRole {
    /// One layer.
    Layer(u32),
    /// The look-up of tokens, and the head too where the head is tied to it.
    TokenEmbedding,
    /// What is added to embeddings before the first layer, or done with them: positions, token types, a norm.
    Input,
    /// Final norm and head.
    Head,
    /// Every layer, so every stage has a copy: rope factors.
    EveryStage,
    /// Nothing that Brigade knows of.
    Other,
}

/// The header of a model.
#[derive(Debug, Clone, PartialEq)]
pub struct Catalog {
    metadata: Metadata,
    tensors: Vec<TensorInfo>,
    by_name: HashMap<String, usize>,
}

impl Catalog {
    /// Parses the header at the start of `bytes`, which are a whole file or its beginning, for a file of
    /// `n_file_bytes`. For one file of a split model this is the catalog of that file.
    ///
    /// # Errors
    /// If anything in the header is unsound; see [`HeaderError`].
    pub fn parse(bytes: &[u8], n_file_bytes: u64) -> Result<Self, HeaderError> {
        let Header { metadata, tensors } = Header::parse(bytes, n_file_bytes, 0)?;
        Self::new(&metadata, tensors)
    }

    /// Parses the headers of all files of a split model, in their order: the beginning of each file, and its length.
    /// A model that is not split has one.
    ///
    /// # Errors
    /// As [`Catalog::parse`], for the first file with an error; and if the files are not all of one model.
    pub fn parse_parts(parts: &[(Vec<u8>, u64)]) -> Result<Self, HeaderError> {
        let expected_count = parts.len() as u64;
        let (mut merged, mut tensors) = (None, Vec::new());
        for (expected_no, (bytes, n_file_bytes)) in (1..).zip(parts) {
            // Files beyond the range of numbers cannot be told apart, so they are refused as the wrong ones.
            let header = Header::parse(bytes, *n_file_bytes, u16::try_from(expected_no - 1).unwrap_or(u16::MAX))?;
            let count = header.metadata.u64("split.count").unwrap_or(1);
            let no = header.metadata.u64("split.no").unwrap_or(0).saturating_add(1);
            if (no, count) != (expected_no, expected_count) {
                return Err(HeaderError::Part { no, count, expected_no, expected_count });
            }
            tensors.extend(header.tensors);
            merged.get_or_insert(header.metadata);
            let found = tensors.len() as u64;
            if found > MAX_TENSORS {
                return Err(HeaderError::TooLarge {
                    what: "number of tensors in all files",
                    found,
                    limit: MAX_TENSORS,
                });
            }
        }
        let metadata = merged.ok_or(HeaderError::Truncated { needed: 1, available: 0 })?;
        match metadata.u64("split.tensors.count") {
            Some(expected) if expected != tensors.len() as u64 => {
                Err(HeaderError::TensorCount { expected, found: tensors.len() as u64 })
            }
            _ => Self::new(&metadata, tensors),
        }
    }

    /// Parses a header that travels without its file, as [`Catalog::header_bytes`] makes it.
    ///
    /// # Errors
    /// As [`Catalog::parse`].
    pub fn parse_header(bytes: &[u8]) -> Result<Self, HeaderError> {
        Self::parse(bytes, MAX_FILE_BYTES)
    }

    /// Joins the metadata of a model with the tensors of all its files. Keys about splits and alignment go: they speak
    /// of files, not of the model.
    pub(crate) fn new(metadata: &Metadata, tensors: Vec<TensorInfo>) -> Result<Self, HeaderError> {
        let metadata = metadata.filtered(|key, _| !key.starts_with("split.") && key != "general.alignment");
        let mut by_name = HashMap::new();
        for (idx, tensor) in tensors.iter().enumerate() {
            if by_name.insert(tensor.name.clone(), idx).is_some() {
                return Err(HeaderError::DuplicateTensor { name: tensor.name.clone() });
            }
        }
        Ok(Self { metadata, tensors, by_name })
    }

    /// The model's metadata.
    pub fn metadata(&self) -> &Metadata {
        &self.metadata
    }

    /// The model's tensors in file order; an index into these names a tensor on every node.
    pub fn tensors(&self) -> &[TensorInfo] {
        &self.tensors
    }

    /// The index of the tensor `name`.
    pub fn tensor_idx(&self, name: &str) -> Option<usize> {
        self.by_name.get(name).copied()
    }

    /// The tensor `name`.
    pub fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        self.tensor_idx(name).map(|idx| &self.tensors[idx])
    }

    /// Number of weights.
    pub fn n_parameters(&self) -> u64 {
        self.tensors.iter().map(TensorInfo::n_elements).fold(0, u64::saturating_add)
    }

    /// Bytes of all tensors.
    pub fn weight_bytes(&self) -> u64 {
        self.tensors.iter().map(|tensor| tensor.n_bytes).fold(0, u64::saturating_add)
    }

    /// Bytes of each layer's tensors, by layer index.
    pub fn bytes_per_layer(&self) -> Vec<u64> {
        let mut bytes: Vec<u64> = Vec::new();
        for tensor in &self.tensors {
            if let TensorRole::Layer(layer) = TensorRole::of(&tensor.name) {
                // The role caps layer indices, so the list stays small.
                let needed = layer as usize + 1;
                bytes.resize(bytes.len().max(needed), 0);
                bytes[layer as usize] = bytes[layer as usize].saturating_add(tensor.n_bytes);
            }
        }
        bytes
    }

    /// Name of the quantisation: as `general.file_type` says, else the type that holds most bytes.
    pub fn quantisation(&self) -> String {
        let named = self.metadata.u32("general.file_type").and_then(file_type_name);
        if let Some(name) = named {
            return name.to_owned();
        }
        let mut bytes: HashMap<GgmlType, u64> = HashMap::new();
        for tensor in &self.tensors {
            let sum = bytes.entry(tensor.ty).or_default();
            *sum = sum.saturating_add(tensor.n_bytes);
        }
        let most = bytes.into_iter().max_by_key(|(ty, bytes)| (*bytes, *ty));
        most.map_or_else(|| "none".to_owned(), |(ty, _)| ty.name().to_owned())
    }

    /// The canonical header: GGUF version 3, alignment 32, the same keys and tensors in the same order, offsets as if
    /// the model were one file. It does not depend on how the model was split or aligned. With `strip_vocabulary` all
    /// `tokenizer.*` keys are left out but for one, of which a stage needs it: what workers need, a few KiB instead of
    /// megabytes.
    pub fn header_bytes(&self, strip_vocabulary: bool) -> Vec<u8> {
        let mut builder = if strip_vocabulary {
            Builder::new(&self.metadata.filtered(|key, _| key == TOKEN_TYPES || !key.starts_with("tokenizer.")))
        } else {
            Builder::new(&self.metadata)
        };
        for tensor in &self.tensors {
            let added = builder.tensor(tensor.name.clone(), &tensor.dims, tensor.ty);
            debug_assert!(added.is_ok(), "a catalog holds only tensors that can be written: {added:?}");
        }
        builder.header_bytes()
    }

    /// BLAKE3 of the canonical header with its vocabulary.
    pub fn header_hash(&self) -> Hash {
        Hash::from_bytes(*blake3::hash(&self.header_bytes(false)).as_bytes())
    }
}

/// A GGUF file with all metadata of the model and no tensors, from which libllama loads the vocabulary alone.
pub fn vocabulary_header(catalog: &Catalog) -> Vec<u8> {
    Builder::new(catalog.metadata()).header_bytes()
}

/// Rows of `token_types.weight`, which libllama reads with the tokenizer.
pub(crate) const TOKEN_TYPES: &str = "tokenizer.ggml.token_type_count";

/// Highest layer index that counts as one; libllama knows at most 512 layers.
const MAX_LAYER_IDX: u32 = 511;

impl TensorRole {
    /// The role of the tensor `name`.
    pub fn of(name: &str) -> Self {
        if let Some((layer, _)) = layer_and_rest(name) {
            return Self::Layer(layer);
        }
        match name.split_once('.').map_or(name, |(stem, _)| stem) {
            "token_embd" => Self::TokenEmbedding,
            "token_embd_norm" | "position_embd" | "token_types" => Self::Input,
            "output" | "output_norm" | "cls" | "dense_2" | "dense_3" => Self::Head,
            "enc" if name.starts_with("enc.output_norm.") => Self::Head,
            "rope_freqs" | "rope_factors_long" | "rope_factors_short" => Self::EveryStage,
            _ => Self::Other,
        }
    }
}

/// Splits `blk.7.attn_q.weight` into 7 and `attn_q.weight`.
pub(crate) fn layer_and_rest(name: &str) -> Option<(u32, &str)> {
    let (number, rest) = name.strip_prefix("blk.")?.split_once('.')?;
    let layer = number.parse::<u32>().ok()?;
    // Only the usual spelling, so that renumbering cannot make two names one.
    (layer <= MAX_LAYER_IDX && layer.to_string() == number).then_some((layer, rest))
}

/// Names of `general.file_type` as llama.cpp numbers them.
fn file_type_name(file_type: u32) -> Option<&'static str> {
    Some(match file_type {
        0 => "F32",
        1 => "F16",
        2 => "Q4_0",
        3 => "Q4_1",
        7 => "Q8_0",
        8 => "Q5_0",
        9 => "Q5_1",
        10 => "Q2_K",
        11 => "Q3_K_S",
        12 => "Q3_K_M",
        13 => "Q3_K_L",
        14 => "Q4_K_S",
        15 => "Q4_K_M",
        16 => "Q5_K_S",
        17 => "Q5_K_M",
        18 => "Q6_K",
        19 => "IQ2_XXS",
        20 => "IQ2_XS",
        21 => "Q2_K_S",
        22 => "IQ3_XS",
        23 => "IQ3_XXS",
        24 => "IQ1_S",
        25 => "IQ4_NL",
        26 => "IQ3_S",
        27 => "IQ3_M",
        28 => "IQ2_S",
        29 => "IQ2_M",
        30 => "IQ4_XS",
        31 => "IQ1_M",
        32 => "BF16",
        36 => "TQ1_0",
        37 => "TQ2_0",
        38 => "MXFP4_MOE",
        39 => "NVFP4",
        40 => "Q1_0",
        41 => "Q2_0",
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn roles_follow_from_names() {
        for (name, role) in [
            ("blk.0.attn_q.weight", TensorRole::Layer(0)),
            ("blk.31.ffn_down.bias", TensorRole::Layer(31)),
            ("blk.031.ffn_down.bias", TensorRole::Other),
            ("blk.512.attn_q.weight", TensorRole::Other),
            ("blk.99999999999.x", TensorRole::Other),
            ("token_embd.weight", TensorRole::TokenEmbedding),
            ("output.weight", TensorRole::Head),
            ("output_norm.weight", TensorRole::Head),
            ("rope_freqs.weight", TensorRole::EveryStage),
            ("position_embd.weight", TensorRole::Input),
            ("cls.output.weight", TensorRole::Head),
            ("altup_proj.weight", TensorRole::Other),
        ] {
            assert_eq!(TensorRole::of(name), role, "{name}");
        }
    }
}
