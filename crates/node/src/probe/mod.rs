//! Measuring the link to another node, and letting others measure theirs to this one.
//!
//! - [`probe`] dials the other node and sends it frames as a ring would: small ones with pauses, single rows, then
//!   larger and larger ones each way; at last small ones on a second link while the first one is full.
//! - [`Seats`] lets one other node at a time measure its links to this one, and answers its frames.
//! - [`LinkBook`] keeps what was measured, so that a node that comes back has nothing to measure; [`links_to`] measures
//!   what it has not.
//!
//! A frame of a probe begins with the number of bytes that are wanted back, `u32`, little endian; whatever follows is
//! padding. The answer is so many bytes. No more is said, so whoever answers needs to know nothing.

mod book;
mod dial;
mod round;
mod seats;
#[cfg(test)]
mod tests;

pub use book::LinkBook;
use dial::probe;
pub use round::{WITHIN, links_to};
pub use seats::Seats;

use std::time::Duration;

/// Largest payload of a probe's frame, each way: what a chunk of 256 rows of 4096 values is. Larger ones take no other
/// way, only longer.
const MAX_TRANSFER: usize = 4 << 20;

/// How long a link that is measured may last. A probe is over in half a second; a far one takes some round trips more.
const MAX_TIME: Duration = Duration::from_secs(2);
