//! The first frames of a link: what the dialer wants, and whether it is welcome.
//!
//! The dialer sends one [`Hello`]; the listener answers `Welcome` or `Refused`, and a refusal ends the link. Integers
//! are little endian. Bytes behind the known fields are ignored, so that a later version can add some.
//!
//! `Hello`, kind 0xF0:
//!
//! | bytes | what |
//! |---|---|
//! | 0..4 | magic `BRGD` |
//! | 4..6, 6..8 | lowest and highest protocol version of the dialer |
//! | 8 | purpose: 1 control, 2 data, 3 weights, 4 requests, 5 council |
//! | 9 | admission: 0 none, 1 ticket |
//! | 10..18, 18..34 | id and secret, with a ticket only |
//!
//! `Welcome`, kind 0xF1: the version to speak, 2 bytes. `Refused`, kind 0xF2:
//!
//! | bytes | what |
//! |---|---|
//! | 0 | code of the [`Refusal`] |
//! | 1..3, 3..5 | the refuser's and the other's highest version with code 1, else zero |
//! | 5.. | message, UTF-8, at most 512 bytes |
//!
//! These kinds mean something only here; afterwards the protocol is free to use them.

use std::time::{Duration, Instant};

use crate::frame::MAX_FRAME;
use crate::link::{Link, LinkError};
use crate::ticket::{SECRET_BYTES, Secret, TICKET_ID_BYTES, TicketId, TicketSecret};

/// The highest protocol version that this build speaks.
///
/// | version | since | reason |
/// |---|---|---|
/// | 1 | 0.1 | the first |
/// | 2 | 0.1 | frames carry KV steps and five times of each stage; offers say how much disk there is for sessions |
/// | 3 | 0.1 | stages are assigned as a whole, with standbys and hand-over; links for requests and for the council |
/// | 4 | 0.1 | nodes measure how fast they compute the model and how far they are from each other |
/// | 5 | 0.1 | weights from any node or from the hub; pooling, adapters, types of KV caches, recurrent states |
pub const PROTOCOL_VERSION: u16 = 5;

/// The lowest protocol version that this build speaks.
pub const MIN_PROTOCOL_VERSION: u16 = 5;

/// Longest wait for the other side's preamble: a round trip and a look into two small tables, on a machine that may be
/// busy loading a model.
pub const PREAMBLE_TIMEOUT: Duration = Duration::from_secs(5);

/// Longest `Hello`: the present 34 bytes, and room for what later versions add.
const MAX_HELLO: usize = 256;

/// Longest message in a refusal: a few lines on a terminal.
const MAX_MESSAGE: usize = 512;

const MAGIC: [u8; 4] = *b"BRGD";
const KIND_HELLO: u8 = 0xF0;
const KIND_WELCOME: u8 = 0xF1;
const KIND_REFUSED: u8 = 0xF2;

/// Where the fields of a `Refused` end and its message starts.
const REFUSED_FIELDS: usize = 5;

/// What a link is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Purpose {
    /// Membership, heartbeats, deployments. The first link to a node.
    Control,
    /// Passes from stage to stage.
    Data,
    /// Weights from a node that has them to one that needs them.
    Weights,
    /// Requests from a node that answers HTTP, and their answers.
    Requests,
    /// Who coordinates.
    Council,
    /// Measuring the link itself.
    Probe,
}

/// What a dialer says first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hello {
    /// The lowest protocol version that the dialer speaks.
    pub min_version: u16,
    /// The highest protocol version that the dialer speaks.
    pub max_version: u16,
    /// What the link is for.
    pub purpose: Purpose,
    /// A ticket, from a node that is no member yet.
    pub admission: Option<TicketSecret>,
}

/// Why a dialer is not welcome. The text is for the operator of the node that was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// No protocol version is spoken by both.
    #[error(
        "this node speaks the protocol up to version {ours} and the other up to version {theirs}, with none in common; \
         install the same release of Brigade on both"
    )]
    VersionMismatch {
        /// The highest version of the node that holds this value.
        ours: u16,
        /// The highest version of the other node.
        theirs: u16,
    },
    /// No ticket has this id and secret.
    #[error("the coordinator does not know this ticket; copy it again in full, or make a new one there")]
    TicketUnknown,
    /// The ticket's time is over.
    #[error("the ticket has expired; make a new one on the coordinator")]
    TicketExpired,
    /// The ticket was made void.
    #[error("the ticket was revoked; ask the coordinator's operator for a new one")]
    TicketRevoked,
    /// A node without ticket that was never admitted, or was forgotten.
    #[error("the coordinator does not know this node; join with a ticket made there: brigade join TICKET")]
    NotAMember,
    /// No room at the moment.
    #[error("the other node has no room for another link at the moment; try again in a few seconds")]
    Busy,
    /// The listener is about to end.
    #[error("the other node is stopping; try again once it has started anew")]
    Stopping,
    /// A valid request at the wrong time or place.
    #[error("the other node did not expect this: {0}")]
    NotExpected(String),
}

/// Why a greeting failed.
#[derive(Debug, thiserror::Error)]
pub enum GreetError {
    /// The listener said no.
    #[error("{0}")]
    Refused(Refusal),
    /// The link broke, or no answer came within [`PREAMBLE_TIMEOUT`].
    #[error("the other node did not answer the greeting: {0}")]
    Link(#[from] LinkError),
    /// The answer is none.
    #[error("the other node answered the greeting with something else; install the same release of Brigade on both")]
    Malformed,
}

/// Why no [`Hello`] was received.
#[derive(Debug, thiserror::Error)]
pub enum HelloError {
    /// The link broke, or nothing came in time.
    #[error("no greeting came: {0}")]
    Link(#[from] LinkError),
    /// The first frame is not a greeting.
    #[error("the first frame is not a greeting: {0}")]
    Malformed(&'static str),
}

/// Says hello over a fresh link and waits for the answer, at most [`PREAMBLE_TIMEOUT`]. Returns the protocol version to
/// speak; the link then takes frames up to [`MAX_FRAME`].
///
/// # Errors
/// If the listener refuses, breaks off or answers nonsense; the link is then closed.
pub fn greet(link: &dyn Link, hello: &Hello) -> Result<u16, GreetError> {
    let answered = exchange(link, hello);
    match answered {
        Ok(_) => link.set_frame_limit(MAX_FRAME),
        Err(_) => link.close(),
    }
    answered
}

fn exchange(link: &dyn Link, hello: &Hello) -> Result<u16, GreetError> {
    let sent = link.send(KIND_HELLO, &[&hello.encode()]);
    let mut answer = Vec::new();
    // Even if sending failed: a listener may have refused and closed before it read anything.
    let received = link.recv(&mut answer, Some(Instant::now() + PREAMBLE_TIMEOUT));
    match received {
        Ok(KIND_WELCOME) => {
            let version = answer.first_chunk().map(|bytes| u16::from_le_bytes(*bytes)).ok_or(GreetError::Malformed)?;
            let spoken = (hello.min_version..=hello.max_version).contains(&version);
            if spoken { Ok(version) } else { Err(GreetError::Malformed) }
        }
        Ok(KIND_REFUSED) => Err(Refusal::decode(&answer).map_or(GreetError::Malformed, GreetError::Refused)),
        Ok(_) => Err(GreetError::Malformed),
        Err(error) => Err(sent.err().unwrap_or(error).into()),
    }
}

/// Waits for the dialer's hello.
///
/// # Errors
/// If none comes by `deadline` or the first frame is something else; the link is then closed.
pub fn receive_hello(link: &dyn Link, deadline: Instant) -> Result<Hello, HelloError> {
    let mut payload = Vec::new();
    let hello = match link.recv(&mut payload, Some(deadline)) {
        Ok(KIND_HELLO) => Hello::decode(&payload).map_err(HelloError::Malformed),
        Ok(_) => Err(HelloError::Malformed("it has another kind")),
        Err(error) => Err(error.into()),
    };
    if hello.is_err() {
        link.close();
    }
    hello
}

/// Tells the dialer to go on with protocol `version`. The link then takes frames up to [`MAX_FRAME`].
///
/// # Errors
/// If the link broke.
pub fn welcome(link: &dyn Link, version: u16) -> Result<(), LinkError> {
    link.set_frame_limit(MAX_FRAME);
    link.send(KIND_WELCOME, &[&version.to_le_bytes()])
}

/// Tells the dialer why it is not welcome and closes the link. `refusal` is from this node's point of view; the dialer
/// gets it from its own.
pub fn refuse(link: &dyn Link, refusal: &Refusal) {
    // A dialer that is gone needs no answer.
    let _ = link.send(KIND_REFUSED, &[&refusal.encode()]);
    link.close();
}

impl Purpose {
    const ALL: [Self; 6] = [Self::Control, Self::Data, Self::Weights, Self::Requests, Self::Council, Self::Probe];

    fn code(self) -> u8 {
        match self {
            Self::Control => 1,
            Self::Data => 2,
            Self::Weights => 3,
            Self::Requests => 4,
            Self::Council => 5,
            Self::Probe => 6,
        }
    }

    fn from_code(code: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|purpose| purpose.code() == code)
    }
}

impl Hello {
    /// A hello from this build.
    pub fn new(purpose: Purpose, admission: Option<TicketSecret>) -> Self {
        Self { min_version: MIN_PROTOCOL_VERSION, max_version: PROTOCOL_VERSION, purpose, admission }
    }

    /// The highest version that this build and the dialer both speak.
    ///
    /// # Errors
    /// [`Refusal::VersionMismatch`] if there is none.
    pub fn common_version(&self) -> Result<u16, Refusal> {
        let version = self.max_version.min(PROTOCOL_VERSION);
        if version >= self.min_version.max(MIN_PROTOCOL_VERSION) {
            Ok(version)
        } else {
            Err(Refusal::VersionMismatch { ours: PROTOCOL_VERSION, theirs: self.max_version })
        }
    }

    fn encode(&self) -> Vec<u8> {
        let mut bytes = MAGIC.to_vec();
        bytes.extend(self.min_version.to_le_bytes());
        bytes.extend(self.max_version.to_le_bytes());
        bytes.extend([self.purpose.code(), u8::from(self.admission.is_some())]);
        if let Some(TicketSecret { id, secret }) = &self.admission {
            bytes.extend(id.as_bytes());
            bytes.extend(secret.as_bytes());
        }
        bytes
    }

    fn decode(bytes: &[u8]) -> Result<Self, &'static str> {
        const SHORT: &str = "it is too short";
        if bytes.len() > MAX_HELLO {
            return Err("it is too long");
        }
        let (magic, rest) = bytes.split_first_chunk().ok_or(SHORT)?;
        if *magic != MAGIC {
            return Err("it is from another program");
        }
        let (&[min_a, min_b, max_a, max_b, purpose, admission], rest) = rest.split_first_chunk::<6>().ok_or(SHORT)?;
        let admission = match admission {
            0 => None,
            1 => {
                let (id, rest) = rest.split_first_chunk::<TICKET_ID_BYTES>().ok_or(SHORT)?;
                let secret = rest.first_chunk::<SECRET_BYTES>().ok_or(SHORT)?;
                Some(TicketSecret { id: TicketId::from_bytes(*id), secret: Secret::from_bytes(*secret) })
            }
            _ => return Err("its admission is of an unknown kind"),
        };
        Ok(Self {
            min_version: u16::from_le_bytes([min_a, min_b]),
            max_version: u16::from_le_bytes([max_a, max_b]),
            purpose: Purpose::from_code(purpose).ok_or("its purpose is unknown")?,
            admission,
        })
    }
}

impl Refusal {
    fn code(&self) -> u8 {
        match self {
            Self::VersionMismatch { .. } => 1,
            Self::TicketUnknown => 2,
            Self::TicketExpired => 3,
            Self::TicketRevoked => 4,
            Self::NotAMember => 5,
            Self::Busy => 6,
            Self::Stopping => 7,
            Self::NotExpected(_) => 8,
        }
    }

    fn encode(&self) -> Vec<u8> {
        let (ours, theirs) = match self {
            Self::VersionMismatch { ours, theirs } => (*ours, *theirs),
            _ => (0, 0),
        };
        let mut message = match self {
            Self::NotExpected(message) => message.clone(),
            // For a dialer that does not know the code.
            known => known.to_string(),
        };
        let mut bytes = vec![self.code()];
        bytes.extend(ours.to_le_bytes());
        bytes.extend(theirs.to_le_bytes());
        while message.len() > MAX_MESSAGE {
            message.pop();
        }
        bytes.extend(message.as_bytes());
        bytes
    }

    /// Turns the refuser's view into this node's.
    fn decode(bytes: &[u8]) -> Option<Self> {
        let (&[code, ours_a, ours_b, theirs_a, theirs_b], message) = bytes.split_first_chunk::<REFUSED_FIELDS>()?;
        Some(match code {
            1 => Self::VersionMismatch {
                ours: u16::from_le_bytes([theirs_a, theirs_b]),
                theirs: u16::from_le_bytes([ours_a, ours_b]),
            },
            2 => Self::TicketUnknown,
            3 => Self::TicketExpired,
            4 => Self::TicketRevoked,
            5 => Self::NotAMember,
            6 => Self::Busy,
            7 => Self::Stopping,
            _ => Self::NotExpected(printable(&message[..message.len().min(MAX_MESSAGE)])),
        })
    }
}

/// Text of a peer that can go to a terminal.
fn printable(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn any_hello() -> impl Strategy<Value = Hello> {
        let ticket = (any::<[u8; TICKET_ID_BYTES]>(), any::<[u8; SECRET_BYTES]>())
            .prop_map(|(id, secret)| TicketSecret { id: TicketId::from_bytes(id), secret: Secret::from_bytes(secret) });
        let purpose = prop::sample::select(Purpose::ALL.to_vec());
        (any::<u16>(), any::<u16>(), purpose, prop::option::of(ticket)).prop_map(
            |(min_version, max_version, purpose, admission)| Hello { min_version, max_version, purpose, admission },
        )
    }

    proptest! {
        #[test]
        fn a_hello_survives_the_wire_and_later_fields(
            hello in any_hello(),
            later in prop::collection::vec(any::<u8>(), 0..200),
        ) {
            let mut bytes = hello.encode();
            prop_assert_eq!(Hello::decode(&bytes), Ok(hello.clone()));
            bytes.extend(later);
            prop_assert_eq!(Hello::decode(&bytes), Ok(hello));
        }

        #[test]
        fn a_cut_hello_is_refused(hello in any_hello(), keep in 0.0..1.0f64) {
            let bytes = hello.encode();
            let cut = &bytes[..(bytes.len() as f64 * keep) as usize];
            prop_assert!(Hello::decode(cut).is_err());
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..600), with_magic: bool) {
            let bytes = if with_magic { [&MAGIC[..], &bytes].concat() } else { bytes };
            let _ = Hello::decode(&bytes);
            if let Some(Refusal::NotExpected(message)) = Refusal::decode(&bytes) {
                prop_assert!(message.chars().all(|c| !c.is_control()));
            }
        }
    }

    #[test]
    fn a_refusal_arrives_from_the_others_point_of_view() {
        for refusal in [
            Refusal::TicketUnknown,
            Refusal::TicketExpired,
            Refusal::TicketRevoked,
            Refusal::NotAMember,
            Refusal::Busy,
            Refusal::Stopping,
            Refusal::NotExpected("a second control link".to_owned()),
        ] {
            assert_eq!(Refusal::decode(&refusal.encode()), Some(refusal));
        }
        let mismatch = Refusal::VersionMismatch { ours: 1, theirs: 9 }.encode();
        assert_eq!(Refusal::decode(&mismatch), Some(Refusal::VersionMismatch { ours: 9, theirs: 1 }));
    }

    #[test]
    fn a_refusal_is_cut_and_cleaned() {
        let bytes = Refusal::NotExpected("é".repeat(1000)).encode();
        assert_eq!(bytes.len(), REFUSED_FIELDS + MAX_MESSAGE);
        let mut bytes = Refusal::NotExpected("a\u{1b}[2Jb\n".to_owned()).encode();
        assert_eq!(Refusal::decode(&bytes), Some(Refusal::NotExpected("a [2Jb ".to_owned())));
        bytes[0] = 200;
        assert!(matches!(Refusal::decode(&bytes), Some(Refusal::NotExpected(_))), "a code of a later version");
    }

    #[test]
    fn the_highest_common_version_is_spoken() {
        let hello = |min_version, max_version| Hello { min_version, max_version, ..Hello::new(Purpose::Control, None) };
        assert_eq!(hello(PROTOCOL_VERSION, PROTOCOL_VERSION).common_version(), Ok(PROTOCOL_VERSION));
        let older = MIN_PROTOCOL_VERSION - 1;
        assert_eq!(
            hello(older, older).common_version(),
            Err(Refusal::VersionMismatch { ours: PROTOCOL_VERSION, theirs: older })
        );
        assert_eq!(hello(0, 900).common_version(), Ok(PROTOCOL_VERSION));
        let newer = PROTOCOL_VERSION + 1;
        assert_eq!(
            hello(newer, newer + 1).common_version(),
            Err(Refusal::VersionMismatch { ours: PROTOCOL_VERSION, theirs: newer + 1 })
        );
        assert!(hello(0, 0).common_version().is_err());
    }
}
