//! How the rows of a text become one vector, where a model embeds or ranks texts.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// What of a text's final hidden states is its result.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Pooling {
    /// The mean of all rows.
    Mean,
    /// The first row.
    Cls,
    /// The last row.
    Last,
    /// The model's classifier, applied to one of the rows: the relevance of a document for a query.
    Rank,
}

/// A pooling with an unknown name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("there is no pooling {0:?}; there are mean, cls, last and rank")]
pub struct UnknownPooling(String);

impl Pooling {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Mean, Self::Cls, Self::Last, Self::Rank];

    /// Its name in options and messages.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Mean => "mean",
            Self::Cls => "cls",
            Self::Last => "last",
            Self::Rank => "rank",
        }
    }

    /// The pooling that a GGUF numbers so, in its key `pooling_type`. 0 stands for none.
    pub const fn of_gguf(number: u64) -> Option<Self> {
        match number {
            1 => Some(Self::Mean),
            2 => Some(Self::Cls),
            3 => Some(Self::Last),
            4 => Some(Self::Rank),
            _ => None,
        }
    }
}

impl fmt::Display for Pooling {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Pooling {
    type Err = UnknownPooling;

    fn from_str(text: &str) -> Result<Self, UnknownPooling> {
        let named = Self::ALL.into_iter().find(|pooling| pooling.name().eq_ignore_ascii_case(text));
        named.ok_or_else(|| UnknownPooling(text.chars().take(40).collect()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_numbers_are_read_back() {
        for (number, pooling) in (1..).zip(Pooling::ALL) {
            assert_eq!(pooling.to_string().parse(), Ok(pooling));
            assert_eq!(Pooling::of_gguf(number), Some(pooling));
        }
        assert_eq!((Pooling::of_gguf(0), Pooling::of_gguf(5)), (None, None));
        assert!("middle".parse::<Pooling>().is_err());
    }
}
