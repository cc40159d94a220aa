//! The tensor element types of ggml: number, name and block shape, in one table.

use std::fmt;

/// How the elements of a tensor are stored. Only types that the pinned libllama can load exist as values.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct GgmlType(u32);

struct TypeInfo {
    id: u32,
    name: &'static str,
    n_block_elements: u64,
    n_block_bytes: u64,
}

macro_rules! ggml_types {
    ($($constant:ident = $id:literal, $name:literal, $elements:literal in $bytes:literal;)*) => {
        impl GgmlType {
            $(
                #[doc = concat!("`", $name, "`: ", $elements, " element(s) in ", $bytes, " byte(s).")]
                pub const $constant: Self = Self($id);
            )*
        }

        /// Ascending by id. Block shapes as in ggml's `ggml-common.h`.
        const TYPES: &[TypeInfo] = &[
            $(TypeInfo { id: $id, name: $name, n_block_elements: $elements, n_block_bytes: $bytes },)*
        ];
    };
}

ggml_types! {
    F32 = 0, "F32", 1 in 4;
    F16 = 1, "F16", 1 in 2;
    Q4_0 = 2, "Q4_0", 32 in 18;
    Q4_1 = 3, "Q4_1", 32 in 20;
    Q5_0 = 6, "Q5_0", 32 in 22;
    Q5_1 = 7, "Q5_1", 32 in 24;
    Q8_0 = 8, "Q8_0", 32 in 34;
    Q8_1 = 9, "Q8_1", 32 in 36;
    Q2_K = 10, "Q2_K", 256 in 84;
    Q3_K = 11, "Q3_K", 256 in 110;
    Q4_K = 12, "Q4_K", 256 in 144;
    Q5_K = 13, "Q5_K", 256 in 176;
    Q6_K = 14, "Q6_K", 256 in 210;
    Q8_K = 15, "Q8_K", 256 in 292;
    IQ2_XXS = 16, "IQ2_XXS", 256 in 66;
    IQ2_XS = 17, "IQ2_XS", 256 in 74;
    IQ3_XXS = 18, "IQ3_XXS", 256 in 98;
    IQ1_S = 19, "IQ1_S", 256 in 50;
    IQ4_NL = 20, "IQ4_NL", 32 in 18;
    IQ3_S = 21, "IQ3_S", 256 in 110;
    IQ2_S = 22, "IQ2_S", 256 in 82;
    IQ4_XS = 23, "IQ4_XS", 256 in 136;
    I8 = 24, "I8", 1 in 1;
    I16 = 25, "I16", 1 in 2;
    I32 = 26, "I32", 1 in 4;
    I64 = 27, "I64", 1 in 8;
    F64 = 28, "F64", 1 in 8;
    IQ1_M = 29, "IQ1_M", 256 in 56;
    BF16 = 30, "BF16", 1 in 2;
    TQ1_0 = 34, "TQ1_0", 256 in 54;
    TQ2_0 = 35, "TQ2_0", 256 in 66;
    MXFP4 = 39, "MXFP4", 32 in 17;
    NVFP4 = 40, "NVFP4", 64 in 36;
    Q1_0 = 41, "Q1_0", 128 in 18;
    Q2_0 = 42, "Q2_0", 64 in 18;
}

impl GgmlType {
    /// The type with ggml's number `id`; `None` for unknown and withdrawn ones.
    pub fn from_id(id: u32) -> Option<Self> {
        TYPES.binary_search_by_key(&id, |info| info.id).ok().map(|_| Self(id))
    }

    /// Every known type, ascending by id.
    pub fn all() -> impl Iterator<Item = Self> {
        TYPES.iter().map(|info| Self(info.id))
    }

    /// ggml's number for this type.
    pub const fn id(self) -> u32 {
        self.0
    }

    fn info(self) -> &'static TypeInfo {
        // A value exists only for an id of the table, so the search cannot miss.
        &TYPES[TYPES.partition_point(|info| info.id < self.0)]
    }

    /// The usual name, for example `Q4_K`.
    pub fn name(self) -> &'static str {
        self.info().name
    }

    /// Elements in one block; a row is a whole number of blocks.
    pub fn n_block_elements(self) -> u64 {
        self.info().n_block_elements
    }

    /// Bytes of one block.
    pub fn n_block_bytes(self) -> u64 {
        self.info().n_block_bytes
    }

    /// Bytes of a row of `n_elements`; `None` if that is not a whole number of blocks or overflows.
    pub fn row_bytes(self, n_elements: u64) -> Option<u64> {
        let info = self.info();
        if !n_elements.is_multiple_of(info.n_block_elements) {
            return None;
        }
        (n_elements / info.n_block_elements).checked_mul(info.n_block_bytes)
    }

    /// Bytes of a tensor of shape `dims` (innermost first); `None` if rows are not whole blocks or the size overflows.
    pub fn tensor_bytes(self, dims: &[u64]) -> Option<u64> {
        let (row, rest) = dims.split_first()?;
        rest.iter().try_fold(self.row_bytes(*row)?, |bytes, dim| bytes.checked_mul(*dim))
    }
}

impl fmt::Display for GgmlType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl fmt::Debug for GgmlType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_sorted_and_every_id_finds_its_row() {
        assert!(TYPES.is_sorted_by(|a, b| a.id < b.id));
        for ty in GgmlType::all() {
            assert_eq!(GgmlType::from_id(ty.id()), Some(ty));
        }
        for id in [4, 5, 31, 33, 36, 38, 43, u32::MAX] {
            assert_eq!(GgmlType::from_id(id), None, "{id}");
        }
    }

    #[test]
    fn sizes_count_whole_blocks_and_never_wrap() {
        assert_eq!(GgmlType::Q4_K.tensor_bytes(&[512, 3]), Some(2 * 144 * 3));
        assert_eq!(GgmlType::Q4_K.tensor_bytes(&[500, 3]), None);
        assert_eq!(GgmlType::F32.tensor_bytes(&[u64::MAX / 2, 2]), None);
        assert_eq!(GgmlType::F16.tensor_bytes(&[1 << 40, 1 << 40]), None);
        assert_eq!(GgmlType::F16.tensor_bytes(&[]), None);
    }
}
