//! What was measured of links, kept in `<state-dir>/links.json`.

use std::io;
use std::path::{Path, PathBuf};

use brigade_base::{Hash, NodeId};
use brigade_net::write_atomic;
use brigade_protocol::control::Peer;
use brigade_protocol::measure::LinkReport;
use serde::{Deserialize, Serialize};

const FILE: &str = "links.json";

/// Most links that are kept: several clusters of a home's size.
const MAX_LINKS: usize = 64;

/// Longest file that is read back: an entry has 600 bytes at most.
const MAX_FILE: u64 = 64 << 10;

/// How long a measurement holds. Networks change seldom, and where a node's addresses do, it is measured anew anyway.
const VALID_S: u64 = 24 * 3600;

/// Links of this node. A link is known by the other node's key and the addresses of both: a laptop that has gone from
/// cable to Wi-Fi is not what it was.
#[derive(Debug)]
pub struct LinkBook {
    path: PathBuf,
    own_addresses: Vec<String>,
    /// The oldest first.
    entries: Vec<Entry>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
struct Entry {
    /// Hash of the addresses.
    way: String,
    measured_unix_s: u64,
    report: LinkReport,
}

impl LinkBook {
    /// The links of the node whose state is in `state_dir` and whose links listen at `own_addresses`. What cannot be
    /// read is measured again.
    pub fn open(state_dir: &Path, own_addresses: &[String]) -> Self {
        let path = state_dir.join(FILE);
        let entries = read(&path).unwrap_or_else(|error| {
            if error.kind() != io::ErrorKind::NotFound {
                tracing::warn!(path = %path.display(), %error, "known links cannot be read; they are measured again");
            }
            Vec::new()
        });
        Self { path, own_addresses: own_addresses.to_vec(), entries }
    }

    /// What was measured of the link to `peer`, unless that is too long ago. `now` is seconds since 1970.
    pub fn get(&self, peer: &Peer, now: u64) -> Option<LinkReport> {
        let way = self.way(peer);
        // A clock that was set back makes none older than it is.
        let is_valid = |entry: &&Entry| now.abs_diff(entry.measured_unix_s) < VALID_S;
        let found = self.entries.iter().find(|entry| entry.report.peer == peer.node && entry.way == way);
        found.filter(is_valid).map(|entry| entry.report)
    }

    /// All that is known of links at `now`, to wherever the other nodes listened then.
    pub fn all(&self, now: u64) -> impl Iterator<Item = (NodeId, LinkReport)> {
        let is_valid = move |entry: &&Entry| now.abs_diff(entry.measured_unix_s) < VALID_S;
        self.entries.iter().filter(is_valid).map(|entry| (entry.report.peer, entry.report))
    }

    /// Notes what was measured of the link to `peer`; it is on disk after [`save`](Self::save).
    pub fn put(&mut self, peer: &Peer, report: LinkReport, now: u64) {
        self.entries.retain(|entry| entry.report.peer != peer.node);
        if self.entries.len() >= MAX_LINKS {
            self.entries.remove(0);
        }
        self.entries.push(Entry { way: self.way(peer), measured_unix_s: now, report });
    }

    /// Writes the file.
    ///
    /// # Errors
    /// If that fails; the file is then as it was.
    pub fn save(&self) -> io::Result<()> {
        write_atomic(&self.path, &serde_json::to_vec_pretty(&self.entries)?, 0o600)
    }

    fn way(&self, peer: &Peer) -> String {
        let mut hasher = blake3::Hasher::new();
        for addresses in [&self.own_addresses, &peer.addresses] {
            let mut addresses: Vec<&String> = addresses.iter().collect();
            addresses.sort();
            for address in addresses {
                // No address contains a zero, so no two lists have the same bytes.
                hasher.update(address.as_bytes()).update(&[0]);
            }
            hasher.update(&[0]);
        }
        Hash::from_bytes(*hasher.finalize().as_bytes()).to_string()
    }
}

fn read(path: &Path) -> io::Result<Vec<Entry>> {
    if std::fs::metadata(path)?.len() > MAX_FILE {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "it is too long"));
    }
    let mut entries: Vec<Entry> = serde_json::from_slice(&std::fs::read(path)?)?;
    entries.retain(|entry| entry.report.is_sound());
    entries.truncate(MAX_LINKS);
    Ok(entries)
}

#[cfg(test)]
mod tests {
    use brigade_plan::LinkProfile;

    use super::*;

    const NOW: u64 = 1_800_000_000;

    fn peer(n: u8) -> Peer {
        Peer { node: NodeId::from_bytes([n; 32]), addresses: vec!["10.0.0.1:7".into(), "10.0.1.1:7".into()] }
    }

    fn report(n: u8) -> LinkReport {
        let link = LinkProfile { latency_s: 0.000_1, bytes_per_s: f64::from(n) };
        LinkReport { peer: peer(n).node, there: link, back: link, jitter_s: 0.0, loaded_rtt_s: 0.1 }
    }

    fn own() -> Vec<String> {
        vec!["10.0.0.2:7".into()]
    }

    #[test]
    fn a_link_is_known_for_a_day_and_on_its_way() {
        let dir = tempfile::tempdir().unwrap();
        let mut book = LinkBook::open(dir.path(), &own());
        book.put(&peer(1), report(9), NOW - 1);
        book.put(&peer(1), report(1), NOW);
        book.save().unwrap();
        let book = LinkBook::open(dir.path(), &own());
        let turned = Peer { addresses: peer(1).addresses.into_iter().rev().collect(), ..peer(1) };
        assert_eq!(book.get(&turned, NOW + VALID_S - 1), Some(report(1)));
        assert_eq!(book.get(&peer(1), NOW + VALID_S), None);
        assert_eq!(book.get(&Peer { addresses: own(), ..peer(1) }, NOW), None);
        assert_eq!(LinkBook::open(dir.path(), &["10.0.0.3:7".into()]).get(&peer(1), NOW), None);
    }

    #[test]
    fn the_oldest_makes_room() {
        let dir = tempfile::tempdir().unwrap();
        let mut book = LinkBook::open(dir.path(), &own());
        for n in 1..=MAX_LINKS as u8 + 1 {
            book.put(&peer(n), report(n), NOW);
        }
        book.save().unwrap();
        assert!(std::fs::metadata(&book.path).unwrap().len() <= MAX_FILE);
        let book = LinkBook::open(dir.path(), &own());
        assert_eq!((book.get(&peer(1), NOW), book.get(&peer(2), NOW)), (None, Some(report(2))));
    }

    #[test]
    fn what_cannot_be_read_is_not_known() {
        let dir = tempfile::tempdir().unwrap();
        let mut book = LinkBook::open(dir.path(), &own());
        book.put(&peer(1), LinkReport { jitter_s: -1.0, ..report(1) }, NOW);
        book.save().unwrap();
        assert_eq!(LinkBook::open(dir.path(), &own()).get(&peer(1), NOW), None);
        std::fs::write(&book.path, "{").unwrap();
        assert_eq!(LinkBook::open(dir.path(), &own()).get(&peer(1), NOW), None);
    }
}
