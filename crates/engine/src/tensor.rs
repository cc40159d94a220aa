//! Rows of tensors between ggml's storage types and `f32`, for token embeddings and test models.

use std::ffi::c_void;

use llama_cpp_sys_2 as sys;

use crate::backend;

/// Rows cannot be converted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TensorError {
    /// The type has no conversion.
    #[error("tensor type {ty} cannot be converted; use a file with another quantisation")]
    Type {
        /// The ggml type id.
        ty: u32,
    },
    /// Rows are not whole blocks.
    #[error("rows of {n_per_row} values are not whole blocks of {block} values of tensor type {ty}")]
    Block {
        /// The ggml type id.
        ty: u32,
        /// Values of a row.
        n_per_row: usize,
        /// Values of a block.
        block: usize,
    },
    /// The data is not whole rows.
    #[error("the data has {found} {unit}, which are not whole rows of {row}")]
    Length {
        /// What there is.
        found: usize,
        /// What a row has.
        row: usize,
        /// Bytes or values.
        unit: &'static str,
    },
    /// A value is infinite or none.
    #[error("value {index} is not finite")]
    NotFinite {
        /// Its index.
        index: usize,
    },
}

/// Block and byte size of rows of a type.
struct Layout {
    traits: &'static sys::ggml_type_traits,
    row_bytes: usize,
}

fn layout(ty: u32, n_per_row: usize) -> Result<Layout, TensorError> {
    backend::init();
    if ty >= sys::GGML_TYPE_COUNT {
        return Err(TensorError::Type { ty });
    }
    // SAFETY: the id is an index of ggml's constant table, whose entries never change.
    let traits = unsafe { &*sys::ggml_get_type_traits(ty) };
    let block = usize::try_from(traits.blck_size).unwrap_or(0);
    if block == 0 || traits.type_size == 0 {
        return Err(TensorError::Type { ty });
    }
    if n_per_row == 0 || !n_per_row.is_multiple_of(block) {
        return Err(TensorError::Block { ty, n_per_row, block });
    }
    Ok(Layout { traits, row_bytes: n_per_row / block * traits.type_size })
}

/// Appends the rows in `bytes`, each `n_embd` values of the ggml type `ty`, to `out` as `[n_rows, n_embd]`.
///
/// # Errors
/// If the type has no conversion or `bytes` are not whole rows; `out` is then unchanged.
pub fn dequantize_rows(ty: u32, bytes: &[u8], n_embd: usize, out: &mut Vec<f32>) -> Result<(), TensorError> {
    let Layout { traits, row_bytes } = layout(ty, n_embd)?;
    if !bytes.len().is_multiple_of(row_bytes) {
        return Err(TensorError::Length { found: bytes.len(), row: row_bytes, unit: "bytes" });
    }
    if ty == sys::GGML_TYPE_F32 {
        out.extend(bytes.as_chunks().0.iter().map(|&bytes| f32::from_le_bytes(bytes)));
        return Ok(());
    }
    let to_float = traits.to_float.ok_or(TensorError::Type { ty })?;
    let n_values = bytes.len() / row_bytes * n_embd;
    let start = out.len();
    out.resize(start + n_values, 0.0);
    let aligned;
    let from: *const c_void = if bytes.as_ptr().cast::<u64>().is_aligned() {
        bytes.as_ptr().cast()
    } else {
        aligned = copy_aligned(bytes);
        aligned.as_ptr().cast()
    };
    // SAFETY: `from` has `n_values` values of this type in whole blocks, aligned for any of ggml's block structs, and
    // `out` has room for as many floats behind `start`.
    unsafe { to_float(from, out[start..].as_mut_ptr(), n_values as i64) };
    Ok(())
}

fn copy_aligned(bytes: &[u8]) -> Vec<u64> {
    let word = |chunk: &[u8]| {
        let mut word = [0; 8];
        word[..chunk.len()].copy_from_slice(chunk);
        u64::from_ne_bytes(word)
    };
    bytes.chunks(8).map(word).collect()
}

/// Types that need no importance matrix.
const QUANTIZABLE: [u32; 16] = [
    sys::GGML_TYPE_F32,
    sys::GGML_TYPE_F16,
    sys::GGML_TYPE_BF16,
    sys::GGML_TYPE_Q4_0,
    sys::GGML_TYPE_Q4_1,
    sys::GGML_TYPE_Q5_0,
    sys::GGML_TYPE_Q5_1,
    sys::GGML_TYPE_Q8_0,
    sys::GGML_TYPE_Q2_K,
    sys::GGML_TYPE_Q3_K,
    sys::GGML_TYPE_Q4_K,
    sys::GGML_TYPE_Q5_K,
    sys::GGML_TYPE_Q6_K,
    sys::GGML_TYPE_IQ4_NL,
    sys::GGML_TYPE_IQ4_XS,
    sys::GGML_TYPE_MXFP4,
];

/// The bytes of `values`, rows of `n_per_row`, in the ggml type `ty`: floats and the quantisations that need no
/// importance matrix.
///
/// # Errors
/// If the type is another one, `values` are not whole rows, or one is not finite.
pub fn quantize_rows(ty: u32, values: &[f32], n_per_row: usize) -> Result<Vec<u8>, TensorError> {
    if !QUANTIZABLE.contains(&ty) {
        return Err(TensorError::Type { ty });
    }
    let Layout { row_bytes, .. } = layout(ty, n_per_row)?;
    if !values.len().is_multiple_of(n_per_row) {
        return Err(TensorError::Length { found: values.len(), row: n_per_row, unit: "values" });
    }
    if let Some(index) = values.iter().position(|value| !value.is_finite()) {
        return Err(TensorError::NotFinite { index });
    }
    let n_rows = values.len() / n_per_row;
    // Words, so that ggml finds its block structs aligned.
    let mut words = vec![0u64; (n_rows * row_bytes).div_ceil(8)];
    // SAFETY: the type takes no importance matrix and was checked against ggml's table; `values` are `n_rows` whole
    // rows and `words` has room for their bytes.
    let n_bytes = unsafe {
        sys::ggml_quantize_chunk(
            ty,
            values.as_ptr(),
            words.as_mut_ptr().cast(),
            0,
            n_rows as i64,
            n_per_row as i64,
            std::ptr::null(),
        )
    };
    let mut bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
    bytes.truncate(n_bytes);
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_type_comes_back_close() {
        let values: Vec<f32> = (0..512).map(|i| ((i * 37 % 101) as f32 / 50.0) - 1.0).collect();
        for ty in QUANTIZABLE {
            let bytes = quantize_rows(ty, &values, 256).unwrap();
            let mut back = vec![7.0];
            dequantize_rows(ty, &bytes, 256, &mut back).unwrap();
            assert_eq!((back.len(), back[0]), (513, 7.0), "type {ty}");
            let error = values.iter().zip(&back[1..]).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(error < 0.7, "type {ty}: {error}");

            let mut shifted = vec![0];
            shifted.extend_from_slice(&bytes);
            let mut again = vec![7.0];
            dequantize_rows(ty, &shifted[1..], 256, &mut again).unwrap();
            assert_eq!(back, again, "type {ty}, unaligned");
        }
    }

    #[test]
    fn wrong_types_and_lengths_are_refused() {
        let mut out = Vec::new();
        let q4_0 = sys::GGML_TYPE_Q4_0;
        for ty in [4, 5, 26, 31, 43, u32::MAX] {
            assert_eq!(dequantize_rows(ty, &[0; 64], 16, &mut out), Err(TensorError::Type { ty }), "type {ty}");
        }
        assert_eq!(
            dequantize_rows(q4_0, &[0; 18], 31, &mut out),
            Err(TensorError::Block { ty: q4_0, n_per_row: 31, block: 32 })
        );
        assert_eq!(
            dequantize_rows(q4_0, &[0; 17], 32, &mut out),
            Err(TensorError::Length { found: 17, row: 18, unit: "bytes" })
        );
        assert!(dequantize_rows(q4_0, &[0; 18], 0, &mut out).is_err());
        assert!(out.is_empty());
        assert_eq!(quantize_rows(0, &[1.0, f32::NAN], 2), Err(TensorError::NotFinite { index: 1 }));
        assert_eq!(quantize_rows(16, &[0.0; 256], 256), Err(TensorError::Type { ty: 16 }));
        assert!(quantize_rows(q4_0, &[0.0; 33], 32).is_err());
    }
}
