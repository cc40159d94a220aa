//! Network cards: which of them links to other nodes go through, and how fast those are.

use std::net::{IpAddr, SocketAddr, UdpSocket};

use brigade_protocol::measure::Finding;

use super::machine::Machine;
use super::{Subject, fail, ok, warn};

/// Most cards below a bridge or a bond.
const MAX_LOWER: usize = 8;

/// From this speed on, in Mb/s, the size of packets tells on how busy a core is with them.
const FAST_MBPS: u64 = 10_000;

/// Below this speed, in Mb/s, something is wrong: cards of the last fifteen years do at least as much.
const USUAL_MBPS: u64 = 1000;

/// Hidden states of a prompt that is not long, in bytes: 512 tokens of a model 4096 wide.
const PROMPT_BYTES: f64 = 512.0 * 4096.0 * 4.0;

/// A network card.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Card {
    name: String,
    kind: Kind,
    /// Megabits in a second, as negotiated; `None` where there is no such thing.
    speed: Option<u64>,
    /// The most that it could; `None` if nobody says.
    best: Option<u64>,
    is_half_duplex: bool,
    mtu: Option<u64>,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum Kind {
    #[default]
    Cable,
    Wireless,
    /// A tunnel or another network inside a network.
    Tunnel,
}

/// What is known of a machine's network.
#[derive(Debug, Clone, Default)]
pub(super) struct Network {
    /// The cards that lead to other nodes, or to anywhere if there are none yet.
    cards: Vec<Card>,
    /// Links come in on the loopback interface alone.
    is_closed: bool,
    /// Other nodes on other machines.
    has_distant_peers: bool,
}

impl Network {
    /// Looks at the cards that lead to the subject's peers.
    pub(super) fn gather(machine: &Machine, subject: &Subject) -> Self {
        let ip = |text: &String| text.parse::<SocketAddr>().ok().map(|address| address.ip());
        let peers: Vec<IpAddr> = subject.peers.iter().filter_map(ip).collect();
        let own = if_addrs::get_if_addrs().unwrap_or_default();
        let is_elsewhere = |peer: &IpAddr| !peer.is_loopback() && !own.iter().any(|address| address.ip() == *peer);
        let distant: Vec<IpAddr> = peers.into_iter().filter(is_elsewhere).collect();
        let mut names: Vec<String> = Vec::new();
        for local in distant.iter().filter_map(|peer| local_address(*peer)) {
            names.extend(own.iter().find(|address| address.ip() == local).map(|address| address.name.clone()));
        }
        if distant.is_empty() {
            names.extend(default_route(machine));
        }
        let mut names: Vec<String> = names.iter().flat_map(|name| physical(machine, name)).collect();
        names.sort();
        names.dedup();
        let listens: Vec<IpAddr> = subject.listens_on.iter().filter_map(ip).collect();
        Self {
            cards: names.into_iter().map(|name| Card::gather(machine, name)).collect(),
            is_closed: !listens.is_empty() && listens.iter().all(IpAddr::is_loopback),
            has_distant_peers: !distant.is_empty(),
        }
    }

    /// What follows from that.
    pub(super) fn judge(&self) -> Vec<Finding> {
        let mut findings = Vec::new();
        if self.is_closed {
            let detail = "links come in on the loopback interface alone";
            let fix = "--listen with the address of a network, and that port open in the firewall";
            findings.push(match self.has_distant_peers {
                true => fail("listening", detail, fix),
                false => ok("listening", format!("{detail}; nodes on other machines need {fix}")),
            });
        }
        findings.extend(self.cards.iter().flat_map(Card::judge));
        findings
    }
}

impl Card {
    fn gather(machine: &Machine, name: String) -> Self {
        let file = |file: &str| format!("sys/class/net/{name}/{file}");
        let kind = if machine.has(file("wireless")) || machine.has(file("phy80211")) {
            Kind::Wireless
        } else if machine.has(file("tun_flags"))
            || machine.text(file("uevent")).is_some_and(|text| text.contains("DEVTYPE=wireguard"))
        {
            Kind::Tunnel
        } else {
            Kind::Cable
        };
        // Cards that are down, and those that have no speed, say -1.
        let speed = machine.number::<i64>(file("speed")).and_then(|mbps| u64::try_from(mbps).ok()).filter(|s| *s > 0);
        let best =
            if kind == Kind::Cable { machine.ask("ethtool", &[&name]).and_then(|text| best_mode(&text)) } else { None };
        Self {
            kind,
            speed,
            best,
            is_half_duplex: machine.text(file("duplex")).is_some_and(|duplex| duplex == "half"),
            mtu: machine.number(file("mtu")),
            name,
        }
    }

    fn judge(&self) -> Vec<Finding> {
        let name = &self.name;
        match self.kind {
            Kind::Wireless => {
                let cost = "not measured by itself: each token pays for the way on each hop, as the links' \
                            findings say, and radio pauses when others send";
                let fix = "a cable to this node, even a slow one; or leave it out of the ring";
                return vec![warn("Wi-Fi", format!("links go through {name}, which is wireless"), cost, fix)];
            }
            Kind::Tunnel => {
                let cost = "each frame is encrypted twice and goes through another program; the links' findings say \
                            what it costs here";
                let fix = "name the addresses of the local network with --listen, where all nodes are in it";
                return vec![warn("tunnel", format!("links go through {name}"), cost, fix)];
            }
            Kind::Cable => {}
        }
        let mut findings = vec![self.judge_speed()];
        findings.extend(self.judge_mtu());
        findings
    }

    fn judge_speed(&self) -> Finding {
        let name = &self.name;
        let Some(speed) = self.speed else {
            return ok("network card", format!("{name}: its speed is not known"));
        };
        let fix = "try another cable (Cat 5e or better), another port of the switch, and negotiation left to itself";
        let prompt_s = |mbps: u64| PROMPT_BYTES * 8.0 / (mbps as f64 * 1e6);
        let better = self.best.unwrap_or(USUAL_MBPS).max(speed);
        let cost = format!(
            "a prompt of 512 tokens of a model 4096 wide takes {:.2} s for each hop instead of {:.2}",
            prompt_s(speed),
            prompt_s(better)
        );
        if self.is_half_duplex {
            let cost = "both directions take turns: half the speed, and collisions";
            return warn("network card", format!("{name}: {} in half duplex", rate(speed)), cost, fix);
        }
        match self.best {
            Some(best) if best > speed => {
                warn("network card", format!("{name}: {} of {} that it could", rate(speed), rate(best)), cost, fix)
            }
            None if speed < USUAL_MBPS => warn("network card", format!("{name}: {}", rate(speed)), cost, fix),
            _ => ok("network card", format!("{name}: {}", rate(speed))),
        }
    }

    fn judge_mtu(&self) -> Option<Finding> {
        let (name, mtu) = (&self.name, self.mtu?);
        if self.speed? < FAST_MBPS || mtu > 1500 {
            return None;
        }
        let cost =
            "not measured: the kernel handles six times as many packets as with 9000, in time that stages compute";
        let fix = format!("sudo ip link set dev {name} mtu 9000 on all nodes, and jumbo frames on in the switch");
        Some(warn("MTU", format!("{name}: packets of {mtu} bytes at {}", self.speed.map(rate)?), cost, fix))
    }
}

fn rate(mbps: u64) -> String {
    if mbps >= 1000 { format!("{} Gb/s", mbps as f64 / 1000.0) } else { format!("{mbps} Mb/s") }
}

/// The own address from which packets to `peer` would leave. Nothing is sent.
fn local_address(peer: IpAddr) -> Option<IpAddr> {
    let any: IpAddr = if peer.is_ipv4() { [0u8; 4].into() } else { [0u16; 8].into() };
    let socket = UdpSocket::bind(SocketAddr::new(any, 0)).ok()?;
    socket.connect(SocketAddr::new(peer, 9)).ok()?;
    socket.local_addr().ok().map(|address| address.ip())
}

/// The card that packets leave through which nothing else is known of.
fn default_route(machine: &Machine) -> Option<String> {
    let routes = machine.text("proc/net/route")?;
    routes.lines().find_map(|line| {
        let mut words = line.split_whitespace();
        let (name, destination) = (words.next()?, words.next()?);
        (destination == "00000000").then(|| name.to_owned())
    })
}

/// The cards behind a bridge, a bond or a VLAN; a card by itself.
fn physical(machine: &Machine, name: &str) -> Vec<String> {
    let dir = format!("sys/class/net/{name}");
    let lower = machine.names(&dir, "lower_").into_iter().map(|lower| lower["lower_".len()..].to_owned());
    let lower: Vec<String> = lower.filter(|lower| machine.has(format!("sys/class/net/{lower}/device"))).collect();
    if machine.has(format!("{dir}/device")) || lower.is_empty() || lower.len() > MAX_LOWER {
        return vec![name.to_owned()];
    }
    lower
}

/// The fastest mode that `ethtool` says a card supports, in Mb/s.
fn best_mode(text: &str) -> Option<u64> {
    let (_, rest) = text.split_once("Supported link modes:")?;
    let lines = rest.lines().enumerate().take_while(|(at, line)| *at == 0 || !line.contains(':'));
    let modes = lines.flat_map(|(_, line)| line.split_whitespace());
    modes.filter_map(|mode| mode.split_once("base")?.0.parse().ok()).max()
}

#[cfg(test)]
mod tests {
    use super::super::tests::trouble;
    use super::*;

    fn card() -> Card {
        Card { name: "eth0".to_owned(), speed: Some(1000), mtu: Some(1500), ..Card::default() }
    }

    #[track_caller]
    fn check(card: Card, expected: &[&str], words: &str) {
        let findings = card.judge();
        let found: Vec<&str> = trouble(&findings).into_iter().map(|(check, _)| check).collect();
        assert_eq!(found, expected, "{findings:?}");
        assert!(format!("{findings:?}").contains(words), "{findings:?}");
    }

    #[test]
    fn cards_are_judged() {
        check(card(), &[], "eth0: 1 Gb/s");
        check(Card { speed: None, ..card() }, &[], "not known");
        check(Card { kind: Kind::Wireless, ..card() }, &["Wi-Fi"], "cable");
        check(Card { kind: Kind::Tunnel, ..card() }, &["tunnel"], "twice");
        check(Card { speed: Some(100), ..card() }, &["network card"], "takes 0.67 s for each hop instead of 0.07");
        check(Card { best: Some(2500), ..card() }, &["network card"], "1 Gb/s of 2.5 Gb/s that it could");
        check(Card { is_half_duplex: true, ..card() }, &["network card"], "half duplex");
        check(Card { speed: Some(10_000), ..card() }, &["MTU"], "mtu 9000");
        check(Card { speed: Some(10_000), mtu: Some(9000), ..card() }, &[], "10 Gb/s");
    }

    #[test]
    fn a_node_that_others_cannot_reach_is_found() {
        let closed = Network { is_closed: true, ..Network::default() };
        assert!(trouble(&closed.judge()).is_empty());
        let findings = Network { has_distant_peers: true, ..closed }.judge();
        assert_eq!(trouble(&findings).len(), 1);
        assert!(findings[0].fix.contains("--listen"));
    }

    #[test]
    fn nodes_on_other_machines_are_told_from_those_here() {
        let dir = tempfile::tempdir().unwrap();
        let machine = Machine::made_up(dir.path(), &[]);
        let gather = |listens_on: &str, peers: &[&str]| {
            let subject = Subject {
                state_dir: dir.path().to_owned(),
                model: None,
                threads: 1,
                memory: None,
                listens_on: vec![listens_on.to_owned()],
                peers: peers.iter().map(ToString::to_string).collect(),
                has_stage: false,
            };
            let network = Network::gather(&machine, &subject);
            (network.is_closed, network.has_distant_peers)
        };
        // Addresses for documentation are nobody's.
        assert_eq!(gather("127.0.0.1:1", &["127.0.0.1:2", "[::1]:2", "a name:2"]), (true, false));
        assert_eq!(gather("127.0.0.1:1", &["203.0.113.7:2"]), (true, true));
        assert_eq!(gather("0.0.0.0:1", &["203.0.113.7:2"]), (false, true));
    }

    #[test]
    fn cards_behind_a_bridge_are_read() {
        let dir = tempfile::tempdir().unwrap();
        let files = [
            ("proc/net/route", "Iface\tDestination\tGateway\neth9\t0001A8C0\t0\nbr0\t00000000\t0101A8C0\n"),
            ("sys/class/net/br0/lower_wlan0/x", ""),
            ("sys/class/net/br0/lower_eth0/x", ""),
            ("sys/class/net/wlan0/device/x", ""),
            ("sys/class/net/wlan0/wireless/x", ""),
            ("sys/class/net/wlan0/speed", "-1"),
            ("sys/class/net/eth0/device/x", ""),
            ("sys/class/net/eth0/speed", "100"),
            ("sys/class/net/eth0/duplex", "half"),
            ("sys/class/net/eth0/mtu", "1500"),
        ];
        let machine = Machine::made_up(dir.path(), &files);
        let names = physical(&machine, &default_route(&machine).unwrap());
        let [eth, wlan] =
            <[Card; 2]>::try_from(names.into_iter().map(|name| Card::gather(&machine, name)).collect::<Vec<_>>())
                .unwrap();
        assert_eq!(eth, Card { speed: Some(100), is_half_duplex: true, ..card() });
        assert_eq!((wlan.kind, wlan.speed), (Kind::Wireless, None));
    }

    #[test]
    fn the_best_mode_of_a_card_is_found() {
        let text = "Settings for eth0:\n\tSupported ports: [ TP ]\n\
                    \tSupported link modes:   10baseT/Half 10baseT/Full\n\
                    \t                        1000baseT/Full\n\t                        2500baseT/Full\n\
                    \tSupported pause frame use: Symmetric\n\tAdvertised link modes:  10000baseT/Full\n";
        assert_eq!(best_mode(text), Some(2500));
        assert_eq!(best_mode("Cannot get device settings"), None);
    }
}
