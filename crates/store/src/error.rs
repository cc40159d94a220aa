//! Why something could not be fetched, and whether it is worth another try.

use std::io;
use std::time::Duration;

use brigade_gguf::HeaderError;

/// Something could not be fetched.
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    /// There was no reply.
    #[error("{url} cannot be reached: {}", reason(source))]
    Unreachable {
        /// What was asked for.
        url: String,
        /// Why.
        source: Box<ureq::Error>,
    },
    /// There was no reply in time.
    #[error("{url} did not answer within {} s", limit.as_secs_f64().ceil())]
    NoAnswer {
        /// What was asked for.
        url: String,
        /// How long it had.
        limit: Duration,
    },
    /// Servers are not to be asked.
    #[error("{url} is not asked for, since this runs offline; run it without --offline and HF_HUB_OFFLINE")]
    Offline {
        /// What would have been asked for.
        url: String,
    },
    /// There is no such file.
    #[error("{url} is not there (404); check the names of the repository and the file")]
    NotFound {
        /// What was asked for.
        url: String,
    },
    /// The server wants to know who asks.
    #[error("{url} is not for everybody ({status}): {}", access.advice())]
    Forbidden {
        /// What was asked for.
        url: String,
        /// HTTP status.
        status: u16,
        /// As whom it was asked.
        access: Access,
    },
    /// The server has too much to do, or thinks that we ask too much.
    #[error("{url} is busy ({status}){}; try again later, or download the file and name it", wish(*wait))]
    Busy {
        /// What was asked for.
        url: String,
        /// HTTP status.
        status: u16,
        /// How long it wants to be left alone.
        wait: Option<Duration>,
    },
    /// The server said something else than yes.
    #[error("{url} answered {status}; try again later, or download the file and name it")]
    Refused {
        /// What was asked for.
        url: String,
        /// HTTP status.
        status: u16,
    },
    /// The server gives whole files only.
    #[error("{url} knows no ranges, so only the whole file can be had: brigade pull {url}")]
    NoRanges {
        /// What was asked for.
        url: String,
    },
    /// The server sent other bytes than those that were asked for.
    #[error("{url} sent {found:?} in place of the bytes from {start}; download the file and name it")]
    WrongRange {
        /// What was asked for.
        url: String,
        /// The first byte that was asked for.
        start: u64,
        /// What the reply says it holds.
        found: String,
    },
    /// A reply ended early.
    #[error("{url} broke off after {found} of {expected} bytes; try again")]
    BrokeOff {
        /// What was asked for.
        url: String,
        /// Bytes that came.
        found: u64,
        /// Bytes that the reply promised.
        expected: u64,
    },
    /// The file is another one now.
    #[error("{url} was changed on the server while it was read; try again")]
    Changed {
        /// What was asked for.
        url: String,
    },
    /// A redirect leads nowhere.
    #[error("{url} points to {to:?}, which {why}")]
    Redirect {
        /// What was asked for.
        url: String,
        /// Where it points.
        to: String,
        /// What is wrong with that.
        why: &'static str,
    },
    /// What came is no header of a model.
    #[error("{url}: {source}")]
    Header {
        /// What was asked for.
        url: String,
        /// Why.
        source: HeaderError,
    },
    /// What came is no list of files.
    #[error("{url} sent no list of a repository's files: {why}; is HF_ENDPOINT the address of a hub?")]
    Strange {
        /// What was asked for.
        url: String,
        /// What is wrong with it.
        why: String,
    },
    /// What is asked for is larger than anything sensible.
    #[error("{url}: {what} is larger than the limit of {limit} bytes; download the files and name one")]
    TooMuch {
        /// What was asked for.
        url: String,
        /// What is too large.
        what: &'static str,
        /// Most bytes.
        limit: u64,
    },
    /// The header goes on and on.
    #[error("{url}: the header needs {needed} bytes, more than the limit of {limit}; this is no model file")]
    TooLong {
        /// What was asked for.
        url: String,
        /// Bytes that it needs at least.
        needed: u64,
        /// Most bytes.
        limit: u64,
    },
    /// It takes too long.
    #[error("{url} could not be read within {} s; try again, or download the files and name one", limit.as_secs())]
    TooSlow {
        /// What was asked for.
        url: String,
        /// How long it may take.
        limit: Duration,
    },
    /// Bytes that are not in the file were asked for.
    #[error("{url} has no bytes from {start} to {end}")]
    Outside {
        /// The file.
        url: String,
        /// First byte.
        start: u64,
        /// The byte behind the last one.
        end: u64,
    },
    /// An address is none that is asked.
    #[error("{url:?} {why}")]
    Address {
        /// The address.
        url: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// No certificate can be checked.
    #[error(
        "this system trusts no certificate authority{why}; install its package of CA certificates, or name a file of \
         them in SSL_CERT_FILE"
    )]
    NoAuthorities {
        /// What went wrong, with a colon before it.
        why: String,
    },
    /// What came could not be put away.
    #[error("what comes from {url} cannot be kept: {source}")]
    Sink {
        /// What was asked for.
        url: String,
        /// Why.
        source: io::Error,
    },
}

/// Whether something is worth another try.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Again {
    /// It would go wrong in the same way.
    Never,
    /// It may go well at once.
    Now,
    /// It may go well later.
    Later(Option<Duration>),
}

impl FetchError {
    pub(crate) fn again(&self) -> Again {
        match self {
            Self::Busy { wait, .. } => Again::Later(*wait),
            // A storage's address may have been a moment too old.
            Self::Unreachable { source, .. } if is_passing(source) => Again::Later(None),
            Self::NoAnswer { .. } | Self::BrokeOff { .. } => Again::Later(None),
            Self::WrongRange { .. } | Self::Forbidden { access: Access::Storage, .. } => Again::Now,
            _ => Again::Never,
        }
    }

    /// Whether nobody answered, so that what is on disk is the best there is.
    pub(crate) fn is_silence(&self) -> bool {
        matches!(
            self,
            Self::Unreachable { .. }
                | Self::NoAnswer { .. }
                | Self::Busy { .. }
                | Self::Offline { .. }
                | Self::BrokeOff { .. }
        )
    }

    /// What happened, for those who hear what is done about it: without what they could do themselves.
    pub(crate) fn fact(&self) -> String {
        match self {
            Self::Busy { url, status, wait } => format!("{url} is busy ({status}){}", wish(*wait)),
            Self::BrokeOff { url, found, expected } => format!("{url} broke off after {found} of {expected} bytes"),
            other => other.to_string(),
        }
    }
}

impl From<FetchError> for io::Error {
    fn from(error: FetchError) -> Self {
        match error {
            FetchError::Sink { source, .. } => source,
            other => Self::other(other),
        }
    }
}

/// What went wrong in a handshake, which may come as a failure to read.
fn in_handshake(error: &ureq::Error) -> Option<&rustls::Error> {
    match error {
        ureq::Error::Rustls(error) => Some(error),
        ureq::Error::Io(error) => error.get_ref().and_then(|cause| cause.downcast_ref()),
        _ => None,
    }
}

/// Why there was no reply, and what may help.
fn reason(error: &ureq::Error) -> String {
    match (in_handshake(error), error) {
        (Some(error @ rustls::Error::InvalidCertificate(_)), _) => {
            format!("{error}; if the certificate is your own, name the file of its authority in SSL_CERT_FILE")
        }
        (Some(rustls::Error::InvalidMessage(_)), _) => "it speaks no TLS on this port; is it http://?".to_owned(),
        (Some(error), _) => error.to_string(),
        (None, ureq::Error::Io(error)) => error.to_string(),
        (None, error) => error.to_string(),
    }
}

/// Whether no answer now may be one later: certificates that are not trusted stay so.
fn is_passing(error: &ureq::Error) -> bool {
    match error {
        ureq::Error::Io(_) => in_handshake(error).is_none(),
        ureq::Error::ConnectionFailed | ureq::Error::HostNotFound => true,
        ureq::Error::Protocol(_) => true,
        _ => false,
    }
}

fn wish(wait: Option<Duration>) -> String {
    wait.map(|wait| format!(" and wants to be left alone for {} s", wait.as_secs())).unwrap_or_default()
}

/// As whom a server was asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Access {
    /// The hub, without a token.
    HubWithout,
    /// The hub, with a token.
    HubWith {
        /// Where the token was found.
        place: String,
    },
    /// A storage to which the file's own server redirected; it gets no token.
    Storage,
    /// Another server; there is no token for it.
    Other,
}

impl Access {
    fn advice(&self) -> String {
        let advice = match self {
            Self::HubWithout => {
                "a private or misspelt repository, or one whose licence must be accepted first; set HF_TOKEN to a \
                 token of the hub that may read it"
            }
            Self::HubWith { place } => {
                return format!(
                    "a misspelt repository, or one that the token in {place} may not read, for example because its \
                     licence must be accepted first"
                );
            }
            Self::Storage => "the file's server led there, which may have been a moment too late; try again",
            Self::Other => {
                "HF_TOKEN goes to the hub alone, named as hf:OWNER/REPOSITORY:FILE.gguf; download the file and name it"
            }
        };
        advice.to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_goes_wrong_in_a_handshake_is_no_riddle() {
        let io = |error| ureq::Error::Io(io::Error::new(io::ErrorKind::InvalidData, error));
        let plain = io(rustls::Error::InvalidMessage(rustls::InvalidMessage::InvalidContentType));
        assert!(reason(&plain).contains("no TLS") && !is_passing(&plain));
        let unknown = io(rustls::Error::InvalidCertificate(rustls::CertificateError::UnknownIssuer));
        assert!(reason(&unknown).contains("SSL_CERT_FILE") && !is_passing(&unknown));
        let refused = ureq::Error::Io(io::ErrorKind::ConnectionRefused.into());
        assert!(reason(&refused) == "connection refused" && is_passing(&refused));
    }
}
