//! Where a node can be reached.

use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, ToSocketAddrs};
use std::str::FromStr;

/// Most addresses of one node that a ticket carries or a dialer tries. A machine has a handful of interfaces with an
/// IPv4 and some IPv6 addresses each; more would make tickets long and dialing slow.
pub const MAX_ADDRESSES: usize = 16;

/// Longest host name (RFC 1035, section 2.3.4).
pub(crate) const MAX_HOST: usize = 253;

/// Where a node can be reached: an IP address and port, or a host name and port.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Address(Kind);

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) enum Kind {
    Socket(SocketAddr),
    Name { host: String, port: u16 },
}

/// A text is not an address.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{text:?} is not an address: write HOST:PORT, for example 192.168.1.5:7100, [fd00::5]:7100 or tower.local:7100"
)]
pub struct AddressError {
    /// What was read.
    pub text: String,
}

impl Address {
    pub(crate) fn kind(&self) -> &Kind {
        &self.0
    }

    /// The addresses behind a host name, asking the system's resolver, which may take long.
    pub(crate) fn resolve(&self) -> io::Result<Vec<SocketAddr>> {
        match &self.0 {
            Kind::Socket(addr) => Ok(vec![*addr]),
            Kind::Name { host, port } => Ok((host.as_str(), *port).to_socket_addrs()?.take(MAX_ADDRESSES).collect()),
        }
    }
}

impl From<SocketAddr> for Address {
    fn from(addr: SocketAddr) -> Self {
        Self(Kind::Socket(SocketAddr::new(addr.ip(), addr.port())))
    }
}

impl FromStr for Address {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        let error = || AddressError { text: text.to_owned() };
        let address = match text.parse::<SocketAddr>() {
            Ok(addr) => Self::from(addr),
            Err(_) => {
                let (host, port) = text.rsplit_once(':').ok_or_else(error)?;
                let port = port.parse().map_err(|_| error())?;
                if host.is_empty() || host.len() > MAX_HOST || !host.bytes().all(is_host_byte) {
                    return Err(error());
                }
                Self(Kind::Name { host: host.to_ascii_lowercase(), port })
            }
        };
        match address.0 {
            Kind::Socket(addr) if addr.port() == 0 => Err(error()),
            Kind::Name { port: 0, .. } => Err(error()),
            _ => Ok(address),
        }
    }
}

/// The bytes of host names, and the underscore that some home networks use.
fn is_host_byte(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_')
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Kind::Socket(addr) => addr.fmt(f),
            Kind::Name { host, port } => write!(f, "{host}:{port}"),
        }
    }
}

/// Where others can reach a listener that is bound to `bound`, most useful first.
///
/// For a wildcard address these are the addresses of the machine's interfaces that are up: IPv4, then IPv6 if the bind
/// covers it, then IPv4 link-local (two machines on one cable), and loopback last (several nodes on one machine). IPv6
/// link-local addresses are left out: they mean nothing without the reader's own interface name. At most
/// [`MAX_ADDRESSES`].
pub fn advertised_addrs(bound: SocketAddr) -> Vec<SocketAddr> {
    if !bound.ip().is_unspecified() {
        return vec![bound];
    }
    let interfaces = if_addrs::get_if_addrs().unwrap_or_else(|error| {
        tracing::warn!(%error, "cannot list the network interfaces; only this machine will find the node");
        Vec::new()
    });
    let ips = interfaces.iter().filter(|interface| interface.is_oper_up()).map(if_addrs::Interface::ip);
    rank(ips, bound.is_ipv6()).into_iter().map(|ip| SocketAddr::new(ip, bound.port())).collect()
}

fn rank(ips: impl Iterator<Item = IpAddr>, with_ipv6: bool) -> Vec<IpAddr> {
    let class = |ip: &IpAddr| match ip {
        IpAddr::V4(v4) if v4.is_loopback() || v4.is_unspecified() => None,
        IpAddr::V4(v4) => Some(if v4.is_link_local() { 2 } else { 0 }),
        IpAddr::V6(v6) if !with_ipv6 || v6.is_loopback() || v6.is_unicast_link_local() => None,
        IpAddr::V6(_) => Some(1),
    };
    let mut ranked: Vec<(u8, IpAddr)> = ips.filter_map(|ip| Some((class(&ip)?, ip))).collect();
    ranked.sort();
    ranked.dedup();
    ranked.truncate(MAX_ADDRESSES - 1);
    ranked.into_iter().map(|(_, ip)| ip).chain([IpAddr::V4(Ipv4Addr::LOCALHOST)]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_read_as_people_write_them() {
        for text in ["192.168.1.5:7100", "[fd00::5]:7100", "tower.local:7100", "my_box:1"] {
            assert_eq!(text.parse::<Address>().unwrap().to_string(), text);
        }
        let too_long = format!("{}:7100", "a".repeat(MAX_HOST + 1));
        for text in
            ["", "host", "host:", ":7100", "host:0", "1.2.3.4:0", "ho st:1", "fd00::5:7100", "a:99999", &too_long]
        {
            assert!(text.parse::<Address>().is_err(), "{text}");
        }
    }

    #[test]
    fn a_bound_address_is_advertised_as_it_is() {
        let addr = "10.1.2.3:7100".parse().unwrap();
        assert_eq!(advertised_addrs(addr), [addr]);
    }

    #[test]
    fn a_wildcard_advertises_interfaces_with_loopback_last() {
        for wildcard in ["0.0.0.0:7100", "[::]:7100"] {
            let addrs = advertised_addrs(wildcard.parse().unwrap());
            assert_eq!(addrs.last().unwrap().to_string(), "127.0.0.1:7100");
            assert!(addrs.len() <= MAX_ADDRESSES);
        }
        let ips = ["169.254.1.1", "fe80::1", "fd00::2", "127.0.0.1", "::1", "10.0.0.2", "10.0.0.2"];
        let ips = || ips.iter().map(|ip| ip.parse().unwrap());
        let text = |ips: Vec<IpAddr>| ips.iter().map(IpAddr::to_string).collect::<Vec<_>>();
        assert_eq!(text(rank(ips(), true)), ["10.0.0.2", "fd00::2", "169.254.1.1", "127.0.0.1"]);
        assert_eq!(text(rank(ips(), false)), ["10.0.0.2", "169.254.1.1", "127.0.0.1"]);
        let many = (0..100).map(|i| IpAddr::from([10, 0, 0, i]));
        assert_eq!(rank(many, true).len(), MAX_ADDRESSES);
    }
}
