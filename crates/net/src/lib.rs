//! Authenticated, encrypted links between nodes, and what decides who may open one.
//!
//! Knows nothing of models: a frame is a kind byte and bytes. How a link comes to be:
//!
//! - [`Identity`] holds the node's Ed25519 key; its public half is the [`NodeId`](brigade_base::NodeId).
//! - The one side runs a [`Listener`], the other dials with [`TcpLink::connect`]. TLS 1.3 authenticates both by raw
//!   public key; the dialer pins the key that it expects, the listener reports the key that it saw.
//! - The dialer says what it wants with [`greet`]; the listener reads it with [`receive_hello`] and, asking its
//!   [`Members`] and [`TicketBook`], answers [`welcome`] or [`refuse`]. Until then no frame above 1 KiB is read.
//! - From there on both use the [`Link`]: whole frames, both directions at once.
//!
//! Threads block; there is no runtime. A [`Listener`] owns its acceptor thread, a [`TcpLink`] owns no thread at all.

#![cfg_attr(test, allow(clippy::unwrap_used, reason = "a test that cannot go on has failed"))]

mod address;
mod book;
mod dial;
mod frame;
mod identity;
mod link;
mod listener;
mod members;
mod preamble;
mod socket;
mod store;
mod tcp;
mod ticket;
mod tls;
mod token;

pub use address::{Address, AddressError, MAX_ADDRESSES, advertised_addrs};
pub use book::{MAX_TICKETS, TicketBook, TicketBookError, TicketEntry, TicketState};
pub use dial::{ConnectError, DialFailure, DialReason};
pub use frame::{FRAME_HEADER_BYTES, MAX_FRAME};
pub use identity::{Identity, IdentityError};
pub use link::{Link, LinkError, LinkStats};
pub use listener::{AcceptError, BindError, Listener, MAX_HANDSHAKES};
pub use members::{MAX_MEMBERS, Member, Members, MembersError};
pub use preamble::{
    GreetError, Hello, HelloError, MIN_PROTOCOL_VERSION, PREAMBLE_TIMEOUT, PROTOCOL_VERSION, Purpose, Refusal, greet,
    receive_hello, refuse, welcome,
};
pub use socket::WRITE_TIMEOUT;
pub use store::{StoreError, create_private_dir, write_atomic};
pub use tcp::{PREAMBLE_FRAME_MAX, TcpLink};
pub use ticket::{Secret, Ticket, TicketError, TicketId, TicketIdError, TicketSecret};
pub use token::{RandomError, random_token};
