//! Identifiers as newtypes, so that a session can never be mistaken for a pass.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Why a text is not an identifier.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IdError {
    /// The text does not have 64 characters.
    #[error("expected 64 hexadecimal digits, found {found} characters")]
    Length {
        /// How many characters the text has.
        found: usize,
    },
    /// The text holds something else than hexadecimal digits.
    #[error("expected hexadecimal digits, found {found:?}")]
    Digit {
        /// The first character that is none.
        found: char,
    },
}

/// Longest name of a node, in characters: a line of a table holds it beside numbers.
pub const MAX_NODE_NAME_CHARS: usize = 64;

/// Whether people can read a text as the name of a node: neither empty nor too long, and nothing in it moves a cursor.
pub fn is_node_name(text: &str) -> bool {
    (1..=MAX_NODE_NAME_CHARS).contains(&text.chars().count()) && !text.chars().any(char::is_control)
}

fn parse_hex(text: &str) -> Result<[u8; 32], IdError> {
    let n = text.chars().count();
    if n != 64 {
        return Err(IdError::Length { found: n });
    }
    let mut bytes = [0u8; 32];
    for (i, digit) in text.chars().enumerate() {
        let value = digit.to_digit(16).ok_or(IdError::Digit { found: digit })? as u8;
        bytes[i / 2] = bytes[i / 2] << 4 | value;
    }
    Ok(bytes)
}

macro_rules! bytes_id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name([u8; 32]);

        impl Serialize for $name {
            /// Hexadecimal digits where people read, bytes on the wire.
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                if serializer.is_human_readable() { serializer.collect_str(self) } else { self.0.serialize(serializer) }
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                if deserializer.is_human_readable() {
                    let text = String::deserialize(deserializer)?;
                    text.parse().map_err(serde::de::Error::custom)
                } else {
                    <[u8; 32]>::deserialize(deserializer).map(Self)
                }
            }
        }

        impl $name {
            /// Wraps the 32 bytes.
            pub const fn from_bytes(bytes: [u8; 32]) -> Self {
                Self(bytes)
            }

            /// The 32 bytes.
            pub const fn as_bytes(&self) -> &[u8; 32] {
                &self.0
            }

            /// The first eight hexadecimal digits: enough for people, never for a comparison.
            pub fn short(&self) -> String {
                self.to_string()[..8].to_owned()
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}({})", stringify!($name), self.short())
            }
        }

        impl FromStr for $name {
            type Err = IdError;

            fn from_str(text: &str) -> Result<Self, IdError> {
                parse_hex(text).map(Self)
            }
        }
    };
}

bytes_id!(
    /// A machine that takes part: its Ed25519 public key.
    NodeId
);
bytes_id!(
    /// A model: BLAKE3 over its header and the hashes of its tensors, so that equal ids mean equal weights.
    ModelId
);
bytes_id!(
    /// A BLAKE3 hash.
    Hash
);

macro_rules! number_id {
    ($(#[$doc:meta])* $name:ident, $inner:ty) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
        pub struct $name(pub $inner);

        impl $name {
            /// The identifier after this one.
            #[must_use]
            pub const fn next(self) -> Self {
                Self(self.0 + 1)
            }
        }

    };
}

macro_rules! plain_display {
    ($($name:ident)*) => {
        $(impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        })*
    };
}

plain_display!(DeploymentId SessionId PassId ImageId TenantId);

number_id!(
    /// A model placed on nodes. Unique within its coordinator.
    DeploymentId,
    u64
);
number_id!(
    /// Counts the placements of a deployment; rises at each change, so that frames of an old one can be dropped.
    ///
    /// The upper 32 bits are the term of the coordinator that placed, the lower ones count its placements from 1. So
    /// every placement of a later coordinator is newer than all of the one before, whatever that one still sends.
    Epoch,
    u64
);

impl Epoch {
    /// Placement `number` of the coordinator of `term`. Both must be below 2^32; higher bits are cut off.
    #[must_use]
    pub const fn of(term: u64, number: u64) -> Self {
        Self(term << 32 | number & 0xffff_ffff)
    }

    /// The term of the coordinator that placed; 0 for the first one.
    pub const fn term(self) -> u64 {
        self.0 >> 32
    }

    /// Which of that coordinator's placements, from 1; 0 is before the first.
    pub const fn number(self) -> u64 {
        self.0 & 0xffff_ffff
    }
}

impl fmt::Display for Epoch {
    /// The number alone in term 0, else `term.number`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.term() {
            0 => self.number().fmt(f),
            term => f.pad(&format!("{term}.{}", self.number())),
        }
    }
}

number_id!(
    /// One sequence of tokens with its KV cache. Never used twice in the life of a coordinator.
    SessionId,
    u64
);
number_id!(
    /// One batch that travels through all stages. Rises over all epochs of a deployment.
    PassId,
    u64
);
number_id!(
    /// The KV cache of a session, saved outside of memory by every stage of a ring. Never used twice in a deployment.
    ImageId,
    u64
);
number_id!(
    /// Whose request it is: those of one tenant share what is cached of their prompts, and tenants take turns. 0 is
    /// whoever sends no key.
    TenantId,
    u64
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_can_be_read() {
        let longest = "ä".repeat(MAX_NODE_NAME_CHARS);
        assert!(is_node_name("old server 2") && is_node_name(&longest));
        assert!(!["", "a\nb", "\u{1b}[31m"].into_iter().any(is_node_name) && !is_node_name(&format!("{longest}a")));
    }

    #[test]
    fn an_id_survives_its_text() {
        let id = NodeId::from_bytes(std::array::from_fn(|i| i as u8 * 7));
        assert_eq!(id.to_string().parse(), Ok(id));
        assert_eq!(id.short(), "00070e15");
    }

    #[test]
    fn epochs_of_a_later_term_are_newer() {
        let (old, new) = (Epoch::of(1, 900), Epoch::of(2, 1));
        assert!(old < new && old < old.next());
        assert_eq!((new.term(), new.number(), new.next()), (2, 1, Epoch::of(2, 2)));
        assert_eq!([Epoch::of(0, 7), Epoch(7), old].map(|e| e.to_string()), ["7", "7", "1.900"]);
    }

    #[test]
    fn a_text_that_is_no_id_is_refused() {
        assert_eq!("abc".parse::<NodeId>(), Err(IdError::Length { found: 3 }));
        assert_eq!("é".repeat(64).parse::<NodeId>(), Err(IdError::Digit { found: 'é' }));
    }
}
