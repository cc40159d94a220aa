//! Weights that mean nothing, for measuring how fast a machine computes a model that it does not have.
//!
//! What a layer costs depends on the shapes and types of its tensors and not on their values, as long as these are
//! numbers as usual: finite, and not so small that the processor computes them in another way. Matrices are made of
//! random quants whose scales give weights of about 1/64, as those of a trained model of some thousand columns have;
//! norms are one, biases zero. Matrices in F32, among them those that route rows to experts, are random too, so that
//! different rows take different experts.
//!
//! For each type a [`SyntheticTensors`] holds one pool of blocks; tensors repeat it from different places.

use std::collections::HashMap;
use std::io;

use crate::catalog::{Catalog, TensorSource};
use crate::ggml_type::GgmlType;

/// Blocks of a pool: a prime, so that rows and experts are out of step with it; up to 300 KB in the type with the
/// largest blocks.
const POOL_BLOCKS: usize = 1021;

/// Fields of a type's block that are no quants: where they lie, and what is put there. Layouts as in ggml's
/// `ggml-common.h`; scales so that weights are about 1/64.
type Fields = Vec<(usize, Vec<u8>)>;

/// `2^-n` as a half float, for n from 1 to 14.
fn half(n: u16) -> Vec<u8> {
    ((15 - n) << 10).to_le_bytes().to_vec()
}

/// `-2^-n` as a half float.
fn minus_half(n: u16) -> Vec<u8> {
    (((15 - n) << 10) | 0x8000).to_le_bytes().to_vec()
}

fn fields(ty: GgmlType) -> Option<Fields> {
    Some(match ty {
        GgmlType::Q1_0 | GgmlType::Q2_0 => vec![(0, half(6))],
        GgmlType::Q4_0 => vec![(0, half(8))],
        GgmlType::Q4_1 => vec![(0, half(8)), (2, minus_half(5))],
        GgmlType::Q5_0 => vec![(0, half(9))],
        GgmlType::Q5_1 => vec![(0, half(9)), (2, minus_half(5))],
        GgmlType::Q8_0 | GgmlType::IQ4_NL => vec![(0, half(12))],
        // Behind the scales come mins, which are to be as large as the mean of what the quants give.
        GgmlType::Q2_K => vec![(80, half(10)), (82, vec![0x00, 0x16])],
        GgmlType::Q3_K => vec![(108, half(11))],
        GgmlType::Q4_K => vec![(0, half(13)), (2, half(10))],
        GgmlType::Q5_K => vec![(0, half(14)), (2, half(10))],
        GgmlType::Q6_K => vec![(192, vec![16; 16]), (208, half(14))],
        GgmlType::IQ2_XXS | GgmlType::IQ2_XS | GgmlType::IQ2_S => vec![(0, half(11))],
        GgmlType::IQ3_XXS | GgmlType::IQ3_S => vec![(0, half(13))],
        GgmlType::IQ1_S => vec![(0, half(9))],
        // Its scale is a half float in the upper quarters of four words.
        GgmlType::IQ1_M => vec![(48, vec![0x92, 0x04, 0x92, 0x04, 0x92, 0x84, 0x92, 0x14])],
        GgmlType::IQ4_XS => vec![(0, half(14)), (2, vec![0xaa; 2])],
        GgmlType::TQ1_0 => vec![(52, half(6))],
        GgmlType::TQ2_0 => vec![(64, half(6))],
        GgmlType::MXFP4 => vec![(0, vec![119])],
        GgmlType::NVFP4 => vec![(0, vec![0x08; 4])],
        _ => return None,
    })
}

/// A source for every tensor of a catalog.
#[derive(Debug)]
pub struct SyntheticTensors {
    /// For each tensor, what it repeats, and where in it the tensor begins.
    tensors: Vec<(Content, u64)>,
    /// Bytes of each tensor.
    n_bytes: Vec<u64>,
    pools: HashMap<GgmlType, Vec<u8>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Content {
    /// The pool of a type.
    Pool(GgmlType),
    /// Ones in this type.
    Ones(GgmlType),
    Zeros,
}

impl SyntheticTensors {
    /// Weights for `catalog`.
    pub fn new(catalog: &Catalog) -> Self {
        let (mut tensors, mut pools) = (Vec::new(), HashMap::new());
        for (idx, tensor) in catalog.tensors().iter().enumerate() {
            let content = content(&tensor.name, &tensor.dims, tensor.ty);
            if let Content::Pool(ty) = content {
                pools.entry(ty).or_insert_with(|| pool(ty));
            }
            // A step that is coprime to the number of blocks gives each tensor a beginning of its own.
            let first = (idx * 97 % POOL_BLOCKS) as u64 * tensor.ty.n_block_bytes();
            tensors.push((content, first));
        }
        let n_bytes = catalog.tensors().iter().map(|tensor| tensor.n_bytes).collect();
        Self { tensors, n_bytes, pools }
    }
}

impl TensorSource for SyntheticTensors {
    fn read_tensor(&self, tensor_idx: usize, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let outside = || io::Error::new(io::ErrorKind::InvalidInput, "the range is outside of the tensor");
        let end = offset.checked_add(buf.len() as u64).ok_or_else(outside)?;
        let (content, first) = match (self.tensors.get(tensor_idx), self.n_bytes.get(tensor_idx)) {
            (Some(tensor), Some(n_bytes)) if end <= *n_bytes => *tensor,
            _ => return Err(outside()),
        };
        match content {
            Content::Zeros => buf.fill(0),
            Content::Ones(GgmlType::F32) => repeat(&1f32.to_le_bytes(), offset, buf),
            Content::Ones(GgmlType::BF16) => repeat(&0x3f80u16.to_le_bytes(), offset, buf),
            Content::Ones(_) => repeat(&0x3c00u16.to_le_bytes(), offset, buf),
            Content::Pool(ty) => repeat(self.pools.get(&ty).map_or(&[0], Vec::as_slice), first + offset, buf),
        }
        Ok(())
    }
}

/// What a tensor is made of.
fn content(name: &str, dims: &[u64], ty: GgmlType) -> Content {
    let is_float = matches!(ty, GgmlType::F32 | GgmlType::F16 | GgmlType::BF16);
    let is_matrix = dims.len() > 1;
    match (is_float, is_matrix) {
        _ if name.ends_with(".bias") => Content::Zeros,
        (true, false) => Content::Ones(ty),
        (true, true) => Content::Pool(ty),
        (false, _) if fields(ty).is_some() => Content::Pool(ty),
        // Whole numbers and doubles are no weights.
        (false, _) => Content::Zeros,
    }
}

/// Random blocks of a type.
fn pool(ty: GgmlType) -> Vec<u8> {
    let block = ty.n_block_bytes() as usize;
    let mut state = u64::from(ty.id()) + 1;
    let mut bytes: Vec<u8> =
        std::iter::repeat_with(|| random(&mut state).to_le_bytes()).flatten().take(POOL_BLOCKS * block).collect();
    match ty {
        // Sign and mantissa are random, the exponent says 2^-7 or so.
        GgmlType::F32 => bytes.as_chunks_mut::<4>().0.iter_mut().for_each(|b| {
            *b = (u32::from_le_bytes(*b) & 0x807f_ffff | 120 << 23).to_le_bytes();
        }),
        GgmlType::BF16 => bytes.as_chunks_mut::<2>().0.iter_mut().for_each(|b| {
            *b = (u16::from_le_bytes(*b) & 0x807f | 120 << 7).to_le_bytes();
        }),
        GgmlType::F16 => bytes.as_chunks_mut::<2>().0.iter_mut().for_each(|b| {
            *b = (u16::from_le_bytes(*b) & 0x83ff | 8 << 10).to_le_bytes();
        }),
        _ => {
            for (at, field) in fields(ty).unwrap_or_default() {
                bytes.chunks_exact_mut(block).for_each(|b| b[at..][..field.len()].copy_from_slice(&field));
            }
        }
    }
    bytes
}

/// The next number of a sequence (`SplitMix64` of Steele, Lea and Flood).
fn random(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Fills `buf` with `pattern` over and over, as if from its start `offset` bytes ago.
fn repeat(pattern: &[u8], offset: u64, mut buf: &mut [u8]) {
    let mut at = (offset % pattern.len() as u64) as usize;
    while !buf.is_empty() {
        let n = buf.len().min(pattern.len() - at);
        let (now, later) = buf.split_at_mut(n);
        now.copy_from_slice(&pattern[at..at + n]);
        (buf, at) = (later, 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::builder::Builder;
    use crate::value::Metadata;

    /// A catalog of one tensor of each type with these names and shapes.
    fn catalog(tensors: &[(&str, &[u64], GgmlType)]) -> Catalog {
        let mut builder = Builder::new(&Metadata::new());
        for (name, dims, ty) in tensors {
            builder.tensor(*name, dims, *ty).unwrap();
        }
        Catalog::parse_header(&builder.header_bytes()).unwrap()
    }

    fn read(source: &SyntheticTensors, idx: usize, offset: u64, n: usize) -> Vec<u8> {
        let mut bytes = vec![0; n];
        source.read_tensor(idx, offset, &mut bytes).unwrap();
        bytes
    }

    #[test]
    fn every_type_of_weights_has_a_pool_and_fields_lie_in_blocks() {
        let integers = [GgmlType::I8, GgmlType::I16, GgmlType::I32, GgmlType::I64, GgmlType::F64];
        // Only intermediate results have these types.
        let never_stored = [GgmlType::Q8_1, GgmlType::Q8_K];
        for ty in GgmlType::all().filter(|ty| !integers.contains(ty) && !never_stored.contains(ty)) {
            assert_eq!(content("blk.0.ffn_up.weight", &[256, 2], ty), Content::Pool(ty), "{ty}");
            assert_eq!(pool(ty).len(), POOL_BLOCKS * ty.n_block_bytes() as usize, "{ty}");
        }
    }

    #[test]
    fn norms_are_one_biases_zero_and_reads_agree() {
        let source = SyntheticTensors::new(&catalog(&[
            ("blk.0.attn_norm.weight", &[8], GgmlType::F32),
            ("blk.0.attn_q.bias", &[8], GgmlType::F32),
            ("blk.0.attn_q.weight", &[256, 300], GgmlType::Q4_K),
            ("blk.0.attn_k.weight", &[256, 300], GgmlType::Q4_K),
        ]));
        assert_eq!(read(&source, 0, 4, 4), 1f32.to_le_bytes());
        assert_eq!(read(&source, 1, 0, 32), [0; 32]);
        let whole = read(&source, 2, 0, 144 * 300);
        assert_eq!(read(&source, 2, 1000, 500), whole[1000..1500]);
        assert_eq!(whole[144..146], half(13));
        assert_ne!(read(&source, 3, 0, 1000), whole[..1000], "each tensor begins elsewhere");
        assert!(source.read_tensor(2, 144 * 300 - 1, &mut [0; 2]).is_err());
        assert!(source.read_tensor(4, 0, &mut [0; 1]).is_err());
    }
}
