//! What nodes measure and find, as they tell it each other on the control link.
//!
//! Before a worker is given a stage, the coordinator asks it with [`Measure`] how fast it computes the model and how
//! far it is from other nodes; [`Measured`] is the answer. [`Finding`]s are the answer to the question what is wrong
//! with a node, see `brigade doctor`.

use brigade_base::NodeId;
use brigade_plan::{LinkProfile, Speed};
use serde::{Deserialize, Serialize};

use crate::control::{ModelRef, Peer, check_addresses};
use crate::{DecodeError, cap};

/// Most nodes whose links one node is asked to measure: with 0.4 s each it stays below five seconds, and a ring of more
/// machines is no home.
pub const MAX_PEERS: usize = 12;

/// Most findings of a node: a handful for each thing that is looked at.
pub const MAX_FINDINGS: usize = 64;

/// Most bytes of a finding's texts: a few sentences.
pub const MAX_FINDING_BYTES: usize = 2_000;

/// Asks a worker how fast it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Measure {
    /// The model to compute.
    pub model: ModelRef,
    /// The nodes whose links are to be measured; they expect that.
    pub peers: Vec<Peer>,
    /// Although the speed is known: it may have changed.
    pub again: bool,
}

/// How fast a worker is.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Measured {
    /// Its speed with the model; `None` if it could not be measured.
    pub speed: Option<Speed>,
    /// The speed was measured just now, or is that of a machine that was not disturbed; false where a node at work says
    /// what it knows.
    pub is_fresh: bool,
    /// Links to the peers that were reached.
    pub links: Vec<LinkReport>,
    /// What went wrong, for people.
    pub trouble: Option<String>,
}

/// A link as one of its nodes measured it.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct LinkReport {
    /// The other node.
    pub peer: NodeId,
    /// From this node to the other one.
    pub there: LinkProfile,
    /// From the other one to this node.
    pub back: LinkProfile,
    /// Seconds between the median and the 95th percentile of round trips on the idle link.
    pub jitter_s: f64,
    /// Seconds of a round trip while the link is full, the median.
    pub loaded_rtt_s: f64,
}

impl LinkReport {
    /// Whether all numbers are ones to calculate with; for what comes from another node or from a file.
    pub fn is_sound(&self) -> bool {
        let is_time = |s: f64| s.is_finite() && s >= 0.0;
        self.there.is_sound() && self.back.is_sound() && is_time(self.jitter_s) && is_time(self.loaded_rtt_s)
    }
}

/// How bad a finding is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Severity {
    /// All is well.
    Ok,
    /// It works, but worse than it could.
    Warn,
    /// It does not work.
    Fail,
}

/// What was found when a node was looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// What was looked at, in a word or two; the same for all nodes.
    pub check: String,
    /// How bad it is.
    pub severity: Severity,
    /// What was found, with what was measured.
    pub detail: String,
    /// What it costs, as measured or estimated; empty if nothing.
    pub cost: String,
    /// What to do about it; empty if nothing.
    pub fix: String,
}

/// What a node found when it looked at itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Examined {
    /// What was found, check by check.
    pub findings: Vec<Finding>,
    /// Its clock when that was done, in milliseconds since 1970.
    pub unix_ms: u64,
}

impl Measure {
    pub(crate) fn check(&self) -> Result<(), DecodeError> {
        self.model.check()?;
        cap("number of peers", self.peers.len() as u64, MAX_PEERS as u64)?;
        self.peers.iter().try_for_each(|peer| check_addresses(&peer.addresses))
    }
}

impl Measured {
    pub(crate) fn check(&self) -> Result<(), DecodeError> {
        let malformed = |why: &str| DecodeError::Malformed { what: "measurement", why: why.to_owned() };
        cap("number of links", self.links.len() as u64, MAX_PEERS as u64)?;
        cap("text length", self.trouble.as_ref().map_or(0, String::len) as u64, MAX_FINDING_BYTES as u64)?;
        if !self.links.iter().all(LinkReport::is_sound) {
            return Err(malformed("a link that cannot be"));
        }
        if !self.speed.as_ref().is_none_or(Speed::is_sound) {
            return Err(malformed("a speed that cannot be"));
        }
        Ok(())
    }
}

impl Examined {
    pub(crate) fn check(&self) -> Result<(), DecodeError> {
        cap("number of findings", self.findings.len() as u64, MAX_FINDINGS as u64)?;
        self.findings.iter().try_for_each(|finding| {
            let texts = [&finding.check, &finding.detail, &finding.cost, &finding.fix];
            cap("text length", texts.iter().map(|text| text.len()).sum::<usize>() as u64, MAX_FINDING_BYTES as u64)
        })
    }
}

#[cfg(test)]
mod tests {
    use brigade_plan::{Curve, SpeedSource};

    use super::*;
    use crate::control::ToCoordinator;

    fn speed() -> Speed {
        let curve = |s| Curve::new(vec![(1, s), (4, 2.0 * s)]).unwrap();
        Speed {
            decode: curve(0.001),
            chunk: curve(0.002),
            head: Some(curve(0.003)),
            pass_s: 0.0001,
            decode_context_s: 1e-9,
            chunk_context_s: 1e-9,
            load_bytes_per_s: 1e9,
            source: SpeedSource::Shapes,
        }
    }

    fn measured() -> Measured {
        let link = LinkProfile { latency_s: 0.0002, bytes_per_s: 1e8 };
        let peer = NodeId::from_bytes([1; 32]);
        let report = LinkReport { peer, there: link, back: link, jitter_s: 0.0, loaded_rtt_s: 0.01 };
        Measured { speed: Some(speed()), is_fresh: true, links: vec![report], trouble: None }
    }

    fn arrives(measured: Measured) -> bool {
        let message = ToCoordinator::Measured(Box::new(measured));
        match ToCoordinator::decode(&message.encode()) {
            Ok(read) => read == message,
            Err(_) => false,
        }
    }

    #[test]
    fn what_was_measured_arrives_and_nonsense_does_not() {
        assert!(arrives(measured()));
        let break_it: [fn(&mut Measured); 5] = [
            |m| m.links[0].there.bytes_per_s = 0.0,
            |m| m.links[0].jitter_s = f64::NAN,
            |m| m.speed.as_mut().unwrap().pass_s = f64::INFINITY,
            |m| m.links = vec![m.links[0]; MAX_PEERS + 1],
            |m| m.trouble = Some("x".repeat(MAX_FINDING_BYTES + 1)),
        ];
        for break_it in break_it {
            let mut broken = measured();
            break_it(&mut broken);
            assert!(!arrives(broken));
        }
    }

    #[test]
    fn findings_are_capped() {
        let finding = Finding {
            check: "swap".to_owned(),
            severity: Severity::Warn,
            detail: "2 GiB are in use".to_owned(),
            cost: String::new(),
            fix: String::new(),
        };
        let arrives = |findings: Vec<Finding>| {
            let message = ToCoordinator::Examined(Examined { findings, unix_ms: 1 });
            ToCoordinator::decode(&message.encode()).is_ok_and(|read| read == message)
        };
        assert!(arrives(vec![finding.clone(); MAX_FINDINGS]));
        assert!(!arrives(vec![finding.clone(); MAX_FINDINGS + 1]));
        assert!(!arrives(vec![Finding { fix: "x".repeat(MAX_FINDING_BYTES), ..finding }]));
    }
}
