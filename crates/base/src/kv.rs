//! How keys and values of the KV cache are stored.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Storage of one side of a KV cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum KvType {
    /// 16-bit floats: nothing is lost against what llama.cpp does by default.
    #[default]
    F16,
    /// Blocks of 32 elements with a scale, 8 bits each.
    Q8_0,
    /// Blocks of 32 elements with a scale, 4 bits each.
    Q4_0,
}

/// A KV cache type with an unknown name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("there is no KV cache type {0:?}; there are f16, q8_0 and q4_0")]
pub struct UnknownKvType(String);

impl KvType {
    /// All of them, the most exact first.
    pub const ALL: [Self; 3] = [Self::F16, Self::Q8_0, Self::Q4_0];

    /// Its name in options and messages.
    pub const fn name(self) -> &'static str {
        match self {
            Self::F16 => "f16",
            Self::Q8_0 => "q8_0",
            Self::Q4_0 => "q4_0",
        }
    }

    /// Elements that are stored together; a head's key or value must be a whole number of such blocks.
    pub const fn block_elements(self) -> u64 {
        match self {
            Self::F16 => 1,
            Self::Q8_0 | Self::Q4_0 => 32,
        }
    }

    /// Bytes of one block.
    pub const fn block_bytes(self) -> u64 {
        match self {
            Self::F16 => 2,
            Self::Q8_0 => 34,
            Self::Q4_0 => 18,
        }
    }

    /// Bytes of `n_elements`, which are counted as whole blocks.
    pub const fn bytes(self, n_elements: u64) -> u64 {
        n_elements.div_ceil(self.block_elements()).saturating_mul(self.block_bytes())
    }
}

impl fmt::Display for KvType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for KvType {
    type Err = UnknownKvType;

    fn from_str(text: &str) -> Result<Self, UnknownKvType> {
        let named = Self::ALL.into_iter().find(|ty| ty.name().eq_ignore_ascii_case(text));
        named.ok_or_else(|| UnknownKvType(text.chars().take(40).collect()))
    }
}

/// Storage of keys and of values.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
pub struct KvTypes {
    /// Of keys.
    pub k: KvType,
    /// Of values; another type than F16 needs flash attention.
    pub v: KvType,
}

impl KvTypes {
    /// Both alike.
    pub const fn both(ty: KvType) -> Self {
        Self { k: ty, v: ty }
    }
}

impl fmt::Display for KvTypes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.k == self.v { self.k.fmt(f) } else { write!(f, "{}/{}", self.k, self.v) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_back_and_bytes_are_whole_blocks() {
        for ty in KvType::ALL {
            assert_eq!(ty.to_string().parse(), Ok(ty));
            assert_eq!(ty.bytes(64), 64 / ty.block_elements() * ty.block_bytes());
        }
        assert_eq!("Q8_0".parse(), Ok(KvType::Q8_0));
        assert!("q5_1".parse::<KvType>().is_err());
        assert_eq!(KvType::Q8_0.bytes(33), 68);
        assert_eq!(KvTypes { k: KvType::Q8_0, v: KvType::Q4_0 }.to_string(), "q8_0/q4_0");
        assert_eq!(KvTypes::default().to_string(), "f16");
    }
}
