//! Ranges of a model's layers.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Consecutive layers `start..end` of a model; never empty.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "(u32, u32)", into = "(u32, u32)")]
pub struct LayerRange {
    start: u32,
    end: u32,
}

/// A range without layers was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a layer range needs at least one layer, but {start}..{end} has none")]
pub struct LayerRangeError {
    /// First layer of the range.
    pub start: u32,
    /// First layer behind the range.
    pub end: u32,
}

impl LayerRange {
    /// The layers from `start` to before `end`.
    ///
    /// # Errors
    /// If the range would be empty.
    pub fn new(start: u32, end: u32) -> Result<Self, LayerRangeError> {
        if start < end { Ok(Self { start, end }) } else { Err(LayerRangeError { start, end }) }
    }

    /// The first layer.
    pub const fn start(self) -> u32 {
        self.start
    }

    /// The first layer behind the range.
    pub const fn end(self) -> u32 {
        self.end
    }

    /// How many layers; at least one.
    #[expect(clippy::len_without_is_empty, reason = "a range is never empty")]
    pub const fn len(self) -> u32 {
        self.end - self.start
    }

    /// Whether `layer` is one of these.
    pub const fn contains(self, layer: u32) -> bool {
        self.start <= layer && layer < self.end
    }

    /// The layer indices in order.
    pub fn iter(self) -> std::ops::Range<u32> {
        self.start..self.end
    }
}

impl TryFrom<(u32, u32)> for LayerRange {
    type Error = LayerRangeError;

    fn try_from((start, end): (u32, u32)) -> Result<Self, LayerRangeError> {
        Self::new(start, end)
    }
}

impl From<LayerRange> for (u32, u32) {
    fn from(range: LayerRange) -> Self {
        (range.start, range.end)
    }
}

impl fmt::Display for LayerRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}..{}", self.start, self.end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_range_cannot_be_made() {
        assert_eq!(LayerRange::new(3, 3), Err(LayerRangeError { start: 3, end: 3 }));
        assert!(LayerRange::new(4, 3).is_err());
        let range = LayerRange::new(2, 5).unwrap();
        assert_eq!((range.len(), range.contains(4), range.contains(5)), (3, true, false));
        assert_eq!(range.to_string(), "2..5");
    }
}
