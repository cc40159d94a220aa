//! Tickets: all that a machine needs to join, as one word to copy.
//!
//! `brigade1-` and base32 (RFC 4648, lower case, no padding) of:
//!
//! | bytes | what |
//! |---|---|
//! | 32 | the coordinator's public key, which the joining node pins |
//! | 8 | id, not secret |
//! | 16 | secret, which the joining node shows once inside the encrypted link |
//! | 1 | number of addresses |
//! | each | `4`, IPv4, port; or `6`, IPv6, port; or `0`, length (1), host name, port; ports little endian |
//! | 4 | the first bytes of the BLAKE3 hash of all that stands before: finds typing errors, proves nothing |

use std::fmt;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::str::FromStr;

use brigade_base::NodeId;
use data_encoding::BASE32_NOPAD;

use crate::Address;
use crate::address::{Kind, MAX_ADDRESSES, MAX_HOST};

/// Bytes of a ticket's id: drawn at random, and 64 bits make a second one alike unheard of.
pub(crate) const TICKET_ID_BYTES: usize = 8;

/// Bytes of a ticket's secret: 128 bits cannot be guessed, and tickets stay short enough to paste.
pub(crate) const SECRET_BYTES: usize = 16;

const CHECKSUM_BYTES: usize = 4;

const NAME: &str = "brigade";
const VERSION: &str = "1";

/// Longest ticket text that is looked at. The longest ticket has 16 host names of 253 bytes: 4180 bytes in all, 6700
/// characters.
const MAX_TEXT: usize = 8 << 10;

/// Names a ticket; not secret.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TicketId([u8; TICKET_ID_BYTES]);

/// What a ticket's bearer has to know. Has no text, lest it ends up in a log.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret([u8; SECRET_BYTES]);

/// What admits a node: a ticket's id and secret.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TicketSecret {
    /// Which ticket.
    pub id: TicketId,
    /// That the bearer has it.
    pub secret: Secret,
}

/// An invitation to join a coordinator. Its text ([`Display`](fmt::Display), [`FromStr`]) contains the secret.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ticket {
    /// The coordinator's key.
    pub coordinator: NodeId,
    /// Where it can be reached; the first [`MAX_ADDRESSES`] fit into the text.
    pub addrs: Vec<Address>,
    /// Names the ticket.
    pub id: TicketId,
    /// Admits the bearer.
    pub secret: Secret,
}

/// Why a text is not a ticket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TicketError {
    /// It does not look like one.
    #[error("this is not a ticket: tickets start with {NAME}{VERSION}-, and `brigade serve` prints one")]
    NotATicket,
    /// It lost or changed characters.
    #[error("the ticket is cut off or mistyped; copy it again in full")]
    Damaged,
    /// It is of a later kind.
    #[error("the ticket was made by a newer Brigade; install the same release here")]
    Newer,
}

impl TicketId {
    /// Wraps the bytes.
    pub const fn from_bytes(bytes: [u8; TICKET_ID_BYTES]) -> Self {
        Self(bytes)
    }

    /// The bytes.
    pub const fn as_bytes(&self) -> &[u8; TICKET_ID_BYTES] {
        &self.0
    }
}

impl fmt::Display for TicketId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for TicketId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "TicketId({self})")
    }
}

impl FromStr for TicketId {
    type Err = TicketIdError;

    fn from_str(text: &str) -> Result<Self, TicketIdError> {
        let error = || TicketIdError { text: text.to_owned() };
        let bytes = data_encoding::HEXLOWER_PERMISSIVE.decode(text.trim().as_bytes()).map_err(|_| error())?;
        bytes.try_into().map(Self).map_err(|_| error())
    }
}

/// A text is not the id of a ticket.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not the id of a ticket, which has 16 hexadecimal digits")]
pub struct TicketIdError {
    /// What was read.
    pub text: String,
}

impl Secret {
    /// Wraps the bytes.
    pub const fn from_bytes(bytes: [u8; SECRET_BYTES]) -> Self {
        Self(bytes)
    }

    pub(crate) const fn as_bytes(&self) -> &[u8; SECRET_BYTES] {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}

impl Ticket {
    /// What to show to the coordinator.
    pub fn admission(&self) -> TicketSecret {
        TicketSecret { id: self.id, secret: self.secret.clone() }
    }

    fn encode(&self) -> Vec<u8> {
        let addrs = &self.addrs[..self.addrs.len().min(MAX_ADDRESSES)];
        let mut bytes = self.coordinator.as_bytes().to_vec();
        bytes.extend(self.id.0);
        bytes.extend(self.secret.0);
        bytes.push(addrs.len() as u8);
        for address in addrs {
            let port = match address.kind() {
                Kind::Socket(SocketAddr::V4(addr)) => {
                    bytes.push(4);
                    bytes.extend(addr.ip().octets());
                    addr.port()
                }
                Kind::Socket(SocketAddr::V6(addr)) => {
                    bytes.push(6);
                    bytes.extend(addr.ip().octets());
                    addr.port()
                }
                Kind::Name { host, port } => {
                    bytes.extend([0, host.len() as u8]);
                    bytes.extend(host.as_bytes());
                    *port
                }
            };
            bytes.extend(port.to_le_bytes());
        }
        bytes.extend(checksum(&bytes));
        bytes
    }

    fn decode(bytes: &[u8]) -> Option<Self> {
        let (content, sum) = bytes.split_last_chunk::<CHECKSUM_BYTES>()?;
        if *sum != checksum(content) {
            return None;
        }
        let (coordinator, rest) = content.split_first_chunk::<32>()?;
        let (id, rest) = rest.split_first_chunk::<TICKET_ID_BYTES>()?;
        let (secret, rest) = rest.split_first_chunk::<SECRET_BYTES>()?;
        let (&n_addrs, mut rest) = rest.split_first()?;
        if usize::from(n_addrs) > MAX_ADDRESSES {
            return None;
        }
        let mut addrs = Vec::with_capacity(n_addrs.into());
        for _ in 0..n_addrs {
            let (address, behind) = decode_address(rest)?;
            addrs.push(address);
            rest = behind;
        }
        rest.is_empty().then_some(Self {
            coordinator: NodeId::from_bytes(*coordinator),
            addrs,
            id: TicketId(*id),
            secret: Secret(*secret),
        })
    }
}

fn checksum(content: &[u8]) -> [u8; CHECKSUM_BYTES] {
    let [a, b, c, d, ..] = *blake3::hash(content).as_bytes();
    [a, b, c, d]
}

fn decode_address(bytes: &[u8]) -> Option<(Address, &[u8])> {
    let (&kind, rest) = bytes.split_first()?;
    let (host, rest) = match kind {
        4 => rest.split_first_chunk::<4>().map(|(ip, rest)| (Ipv4Addr::from(*ip).to_string(), rest))?,
        6 => rest.split_first_chunk::<16>().map(|(ip, rest)| (format!("[{}]", Ipv6Addr::from(*ip)), rest))?,
        0 => {
            let (&len, rest) = rest.split_first()?;
            let (host, rest) = rest.split_at_checked(usize::from(len).min(MAX_HOST))?;
            (std::str::from_utf8(host).ok()?.to_owned(), rest)
        }
        _ => return None,
    };
    let (port, rest) = rest.split_first_chunk()?;
    // Through the text, so that a ticket can hold only what a person could have written.
    let address = format!("{host}:{}", u16::from_le_bytes(*port)).parse().ok()?;
    Some((address, rest))
}

impl fmt::Display for Ticket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{NAME}{VERSION}-{}", BASE32_NOPAD.encode(&self.encode()).to_ascii_lowercase())
    }
}

impl FromStr for Ticket {
    type Err = TicketError;

    /// Forgives upper case, and spaces and line breaks from copying.
    fn from_str(text: &str) -> Result<Self, TicketError> {
        if text.len() > MAX_TEXT {
            return Err(TicketError::NotATicket);
        }
        let text: String = text.chars().filter(|c| !c.is_whitespace()).map(|c| c.to_ascii_uppercase()).collect();
        let rest = text.strip_prefix(&NAME.to_ascii_uppercase()).ok_or(TicketError::NotATicket)?;
        let (version, code) = rest.split_once('-').ok_or(TicketError::NotATicket)?;
        if version.is_empty() || !version.bytes().all(|byte| byte.is_ascii_digit()) {
            return Err(TicketError::NotATicket);
        }
        if version != VERSION {
            return Err(TicketError::Newer);
        }
        let bytes = BASE32_NOPAD.decode(code.as_bytes()).map_err(|_| TicketError::Damaged)?;
        Self::decode(&bytes).ok_or(TicketError::Damaged)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn any_ticket() -> impl Strategy<Value = Ticket> {
        let address = prop_oneof![
            (any::<[u8; 4]>(), 1u16..).prop_map(|(ip, port)| Address::from(SocketAddr::from((ip, port)))),
            (any::<[u8; 16]>(), 1u16..).prop_map(|(ip, port)| Address::from(SocketAddr::from((ip, port)))),
            "[a-z][a-z0-9.-]{0,40}:[1-9][0-9]{0,3}".prop_map(|text| text.parse().unwrap()),
        ];
        (any::<[u8; 32]>(), prop::collection::vec(address, 0..=MAX_ADDRESSES), any::<[u8; 8]>(), any::<[u8; 16]>())
            .prop_map(|(key, addrs, id, secret)| Ticket {
                coordinator: NodeId::from_bytes(key),
                addrs,
                id: TicketId(id),
                secret: Secret(secret),
            })
    }

    fn example() -> Ticket {
        Ticket {
            coordinator: NodeId::from_bytes([3; 32]),
            addrs: vec!["192.168.1.5:7100".parse().unwrap(), "127.0.0.1:7100".parse().unwrap()],
            id: TicketId([1; 8]),
            secret: Secret([2; 16]),
        }
    }

    proptest! {
        #[test]
        fn a_ticket_survives_its_text_and_careless_copying(ticket in any_ticket()) {
            let text = ticket.to_string();
            prop_assert_eq!(text.parse(), Ok(ticket.clone()));
            let (start, end) = text.split_at(text.len() / 2);
            prop_assert_eq!(format!(" {}\n  {}\r\n", start.to_uppercase(), end).parse(), Ok(ticket));
        }

        #[test]
        fn one_wrong_character_is_noticed(
            at in 9usize..100,
            to in prop::sample::select(b"abcdefghijklmnopqrstuvwxyz234567".to_vec()),
        ) {
            let text = example().to_string();
            let mut bytes = text.clone().into_bytes();
            bytes[at] = to;
            let mistyped = String::from_utf8(bytes).unwrap();
            prop_assume!(mistyped != text);
            prop_assert_eq!(mistyped.parse::<Ticket>(), Err(TicketError::Damaged));
        }

        #[test]
        fn a_cut_ticket_is_noticed(keep in 9usize..100) {
            let text = example().to_string();
            prop_assert_eq!(text[..keep].parse::<Ticket>(), Err(TicketError::Damaged));
        }

        #[test]
        fn arbitrary_content_with_a_true_checksum_never_panics(
            mut bytes in prop::collection::vec(any::<u8>(), 0..200),
        ) {
            bytes.extend(checksum(&bytes));
            if let Some(ticket) = Ticket::decode(&bytes) {
                prop_assert_eq!(ticket.to_string().parse(), Ok(ticket));
            }
        }
    }

    #[test]
    fn what_is_no_ticket_is_told_from_what_was_one() {
        let text = example().to_string();
        let newer = text.replacen("brigade1", "brigade2", 1);
        for (text, error) in [
            ("", TicketError::NotATicket),
            ("hello", TicketError::NotATicket),
            ("brigade-abc", TicketError::NotATicket),
            ("brigadex-abc", TicketError::NotATicket),
            (&text[9..], TicketError::NotATicket),
            (&newer, TicketError::Newer),
            ("brigade1-", TicketError::Damaged),
            ("brigade1-!!", TicketError::Damaged),
        ] {
            assert_eq!(text.parse::<Ticket>(), Err(error), "{text}");
        }
        assert_eq!("x".repeat(MAX_TEXT + 1).parse::<Ticket>(), Err(TicketError::NotATicket));
    }

    #[test]
    fn the_longest_ticket_fits_and_a_secret_has_no_text() {
        let host: Address = format!("{}:65535", "h".repeat(MAX_HOST)).parse().unwrap();
        let ticket = Ticket { addrs: vec![host; MAX_ADDRESSES], ..example() };
        assert_eq!(ticket.to_string().parse(), Ok(ticket));
        assert!(!format!("{:?}", example()).contains('2'.to_string().repeat(4).as_str()));
        assert_eq!(format!("{:?}", example().secret), "Secret(..)");
    }

    #[test]
    fn an_id_survives_its_text() {
        let id = TicketId([0, 1, 2, 3, 0xfc, 0xfd, 0xfe, 0xff]);
        assert_eq!(id.to_string(), "00010203fcfdfeff");
        assert_eq!("00010203FCFDFEFF".parse(), Ok(id));
        assert!("00".parse::<TicketId>().is_err());
    }
}
