//! TLS 1.3 with raw Ed25519 public keys on both sides (RFC 7250): who may speak, not yet who is welcome.
//!
//! - Both sides prove that they hold the private key of the public key that they present.
//! - The dialer pins: any key but the expected one ends the handshake before it has shown its own.
//! - The listener takes any Ed25519 key and reports it; its caller decides.
//! - No certificates, names, resumption, tickets or early data: a link starts with a whole handshake, about 1 ms.

use std::io;
use std::net::TcpStream;
use std::sync::Arc;
use std::time::Instant;

use brigade_base::NodeId;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{AlwaysResolvesClientRawPublicKeys, Resumption};
use rustls::crypto::ring::cipher_suite::{
    TLS13_AES_128_GCM_SHA256, TLS13_AES_256_GCM_SHA384, TLS13_CHACHA20_POLY1305_SHA256,
};
use rustls::crypto::{CryptoProvider, ring, verify_tls13_signature_with_raw_key};
use rustls::pki_types::{CertificateDer, ServerName, SubjectPublicKeyInfoDer, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{AlwaysResolvesServerRawPublicKeys, NoServerSessionStorage};
use rustls::version::TLS13;
use rustls::{
    CertificateError, ClientConfig, ClientConnection, Connection, DigitallySignedStruct, DistinguishedName, OtherError,
    ServerConfig, ServerConnection, SignatureScheme,
};

use crate::Identity;
use crate::socket::{Interest, is_disconnect, wait};

/// Names the protocol inside TLS, so that a port shared by mistake is noticed at once. Frames have their own version.
const ALPN: &[u8] = b"brigade/1";

/// What stands before the 32 key bytes in the DER of an Ed25519 public key (RFC 8410, section 4).
const ED25519_SPKI_PREFIX: [u8; 12] = [0x30, 0x2a, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x03, 0x21, 0x00];

/// Why two nodes did not come to speak.
#[derive(Debug, thiserror::Error)]
pub(crate) enum HandshakeError {
    #[error("the peer has the key {found} instead of the expected one")]
    WrongKey { found: NodeId },
    #[error("no answer in time")]
    TimedOut,
    #[error("the peer closed the connection")]
    Closed,
    #[error("{0}")]
    Tls(#[from] rustls::Error),
    #[error("{0}")]
    Io(#[from] io::Error),
}

/// Travels inside a [`rustls::Error`] from the verifier to [`handshake`].
#[derive(Debug, thiserror::Error)]
#[error("the peer has the key {found}")]
struct WrongKey {
    found: NodeId,
}

/// The node whose key is `spki`; `None` unless it is an Ed25519 key in its only DER form.
pub(crate) fn node_id_of(spki: &[u8]) -> Option<NodeId> {
    let key = spki.strip_prefix(&ED25519_SPKI_PREFIX)?;
    Some(NodeId::from_bytes(key.try_into().ok()?))
}

/// The dialing end of a link to `expected`.
pub(crate) fn dialer(identity: &Identity, expected: NodeId) -> Result<Connection, rustls::Error> {
    let provider = Arc::new(provider());
    let verifier = Arc::new(PinnedKey { expected, keys: RawKeys(Arc::clone(&provider)) });
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(verifier)
        .with_client_cert_resolver(Arc::new(AlwaysResolvesClientRawPublicKeys::new(identity.certified_key())));
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.resumption = Resumption::disabled();
    config.enable_sni = false;
    // The name is neither sent nor checked: the key is the name.
    let name = ServerName::try_from("brigade").map_err(|_| rustls::Error::General("unusable name".to_owned()))?;
    Ok(Connection::Client(ClientConnection::new(Arc::new(config), name)?))
}

/// What all listening ends share.
pub(crate) fn listener_config(identity: &Identity) -> Result<Arc<ServerConfig>, rustls::Error> {
    let provider = Arc::new(provider());
    let verifier = Arc::new(AnyKey(RawKeys(Arc::clone(&provider))));
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&TLS13])?
        .with_client_cert_verifier(verifier)
        .with_cert_resolver(Arc::new(AlwaysResolvesServerRawPublicKeys::new(identity.certified_key())));
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    config.max_early_data_size = 0;
    Ok(Arc::new(config))
}

/// One listening end.
pub(crate) fn listener(config: Arc<ServerConfig>) -> Result<Connection, rustls::Error> {
    Ok(Connection::Server(ServerConnection::new(config)?))
}

/// Runs the handshake over a non-blocking `stream` and returns who the peer is.
pub(crate) fn handshake(stream: &TcpStream, tls: &mut Connection, deadline: Instant) -> Result<NodeId, HandshakeError> {
    let mut socket = stream;
    loop {
        while tls.wants_write() {
            match tls.write_tls(&mut socket) {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    wait_or_time_out(stream, Interest::Write, deadline)?;
                }
                Err(error) => return Err(broken(error)),
            }
        }
        if !tls.is_handshaking() {
            break;
        }
        match tls.read_tls(&mut socket) {
            Ok(0) => return Err(HandshakeError::Closed),
            Ok(_) => {
                if let Err(error) = tls.process_new_packets() {
                    // Tell the peer why, if it still listens; the error stands either way.
                    let _ = tls.write_tls(&mut socket);
                    return Err(refused(error));
                }
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                wait_or_time_out(stream, Interest::Read, deadline)?;
            }
            Err(error) => return Err(broken(error)),
        }
    }
    if tls.alpn_protocol() != Some(ALPN) {
        return Err(rustls::Error::NoApplicationProtocol.into());
    }
    let presented = tls.peer_certificates().and_then(<[_]>::first);
    presented.and_then(|key| node_id_of(key)).ok_or_else(|| rustls::Error::NoCertificatesPresented.into())
}

fn wait_or_time_out(stream: &TcpStream, interest: Interest, deadline: Instant) -> Result<(), HandshakeError> {
    if wait(stream, interest, Some(deadline))? { Ok(()) } else { Err(HandshakeError::TimedOut) }
}

fn broken(error: io::Error) -> HandshakeError {
    if is_disconnect(&error) { HandshakeError::Closed } else { HandshakeError::Io(error) }
}

fn refused(error: rustls::Error) -> HandshakeError {
    if let rustls::Error::InvalidCertificate(CertificateError::Other(OtherError(inner))) = &error
        && let Some(wrong) = inner.downcast_ref::<WrongKey>()
    {
        return HandshakeError::WrongKey { found: wrong.found };
    }
    HandshakeError::Tls(error)
}

/// One key exchange, TLS 1.3 suites only. The dialer's order wins, and what is fastest depends on the machine:
/// without AES instructions (many small ARM boards) ChaCha20 is several times faster.
fn provider() -> CryptoProvider {
    let aes = [TLS13_AES_128_GCM_SHA256, TLS13_AES_256_GCM_SHA384];
    let chacha = [TLS13_CHACHA20_POLY1305_SHA256];
    let cipher_suites = if has_aes() { [&aes[..], &chacha].concat() } else { [&chacha[..], &aes].concat() };
    CryptoProvider { cipher_suites, kx_groups: vec![ring::kx_group::X25519], ..ring::default_provider() }
}

#[cfg(any(target_arch = "x86", target_arch = "x86_64"))]
fn has_aes() -> bool {
    std::arch::is_x86_feature_detected!("aes")
}

#[cfg(target_arch = "aarch64")]
fn has_aes() -> bool {
    std::arch::is_aarch64_feature_detected!("aes")
}

#[cfg(not(any(target_arch = "x86", target_arch = "x86_64", target_arch = "aarch64")))]
fn has_aes() -> bool {
    false
}

/// What both verifiers share: the key is an Ed25519 key and the peer signed with it.
#[derive(Debug)]
struct RawKeys(Arc<CryptoProvider>);

impl RawKeys {
    fn node_id(key: &CertificateDer<'_>, more: &[CertificateDer<'_>]) -> Result<NodeId, rustls::Error> {
        let only = if more.is_empty() { node_id_of(key) } else { None };
        only.ok_or(rustls::Error::InvalidCertificate(CertificateError::BadEncoding))
    }

    fn verify(
        &self,
        message: &[u8],
        key: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let spki = SubjectPublicKeyInfoDer::from(key.as_ref());
        verify_tls13_signature_with_raw_key(message, &spki, signature, &self.0.signature_verification_algorithms)
    }

    /// TLS 1.2 is never offered, so nobody can ask for its signatures.
    fn no_tls12() -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::General("TLS 1.2 is not spoken here".to_owned()))
    }
}

/// The dialer's verifier: this key and no other.
#[derive(Debug)]
struct PinnedKey {
    expected: NodeId,
    keys: RawKeys,
}

impl ServerCertVerifier for PinnedKey {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let found = RawKeys::node_id(end_entity, intermediates)?;
        if found == self.expected {
            return Ok(ServerCertVerified::assertion());
        }
        let wrong = OtherError(Arc::new(WrongKey { found }));
        Err(rustls::Error::InvalidCertificate(CertificateError::Other(wrong)))
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        RawKeys::no_tls12()
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.keys.verify(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ED25519]
    }

    fn requires_raw_public_keys(&self) -> bool {
        true
    }
}

/// The listener's verifier: a key there must be.
#[derive(Debug)]
struct AnyKey(RawKeys);

impl ClientCertVerifier for AnyKey {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        RawKeys::node_id(end_entity, intermediates).map(|_| ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        RawKeys::no_tls12()
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.0.verify(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ED25519]
    }

    fn requires_raw_public_keys(&self) -> bool {
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_an_ed25519_key_names_a_node() {
        let mut spki = ED25519_SPKI_PREFIX.to_vec();
        spki.extend([7; 32]);
        assert_eq!(node_id_of(&spki), Some(NodeId::from_bytes([7; 32])));
        assert_eq!(node_id_of(&spki[..43]), None, "short");
        spki.push(0);
        assert_eq!(node_id_of(&spki), None, "trailing byte");
        spki.pop();
        spki[8] = 0x71;
        assert_eq!(node_id_of(&spki), None, "Ed448's number");
        assert_eq!(node_id_of(&[]), None);
    }
}
