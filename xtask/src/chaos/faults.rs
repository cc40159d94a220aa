//! What is done to nodes and links.

use std::fmt;
use std::time::Duration;

use serde::{Serialize, Serializer};

use crate::random::Random;

/// How long a node is frozen, a link silent or a disk full: three times the time after which a silent node is dead.
const SPELL: Duration = Duration::from_secs(4);

/// How long a node that ended stays away, at least and at most.
const AWAY_MS: (u64, u64) = (500, 3000);

/// A kind of fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// None: how long tokens take without.
    Nothing,
    /// `kill -9` of a worker.
    Kill,
    /// The same of two at once.
    KillTwo,
    /// A worker is frozen by a signal.
    Freeze,
    /// All links of a worker are silent.
    Silence,
    /// Links of a worker break and can be made again at once.
    Reset,
    /// A worker's disk is full.
    FullDisk,
    /// A worker leaves in good order, and comes back.
    Leave,
}

/// All kinds, and how often each comes among the sum of these numbers.
pub const KINDS: [(Kind, u64); 8] = [
    (Kind::Nothing, 1),
    (Kind::Kill, 6),
    (Kind::KillTwo, 2),
    (Kind::Freeze, 3),
    (Kind::Silence, 3),
    (Kind::Reset, 3),
    (Kind::FullDisk, 1),
    (Kind::Leave, 3),
];

impl Kind {
    /// The name on the command line and in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Nothing => "nothing",
            Self::Kill => "kill",
            Self::KillTwo => "kill-two",
            Self::Freeze => "freeze",
            Self::Silence => "silence",
            Self::Reset => "reset",
            Self::FullDisk => "full-disk",
            Self::Leave => "leave",
        }
    }

    /// The kind of this name.
    ///
    /// # Errors
    /// If there is none.
    pub fn parse(text: &str) -> Result<Self, String> {
        let names = || KINDS.map(|(kind, _)| kind.name()).join(", ");
        let kind = KINDS.iter().map(|(kind, _)| *kind).find(|kind| kind.name() == text);
        kind.ok_or_else(|| format!("write one of {}", names()))
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl Serialize for Kind {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name())
    }
}

/// Which links of a worker break.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Links {
    /// Those that others have dialled: passes come in on one.
    Inbound,
    /// Those to the coordinator: control and weights.
    Outbound,
    /// All.
    All,
}

/// One fault.
#[derive(Debug, Clone)]
pub struct Fault {
    /// What is done.
    pub kind: Kind,
    /// To which workers, by number.
    pub victims: Vec<usize>,
    /// How long it lasts; after that it is mended.
    pub lasts: Duration,
    /// Which links, where it is about links.
    pub links: Links,
}

impl Fault {
    /// Draws a fault of one of these kinds for one of `candidates`, which are some of `n_workers` workers.
    pub fn draw(random: &mut Random, kinds: &[(Kind, u64)], candidates: &[usize], n_workers: usize) -> Self {
        let sum = kinds.iter().map(|(_, weight)| weight).sum();
        let mut at = random.within(0, sum);
        let drawn = kinds.iter().find(|(_, weight)| {
            let is_here = at < *weight;
            at = at.saturating_sub(*weight);
            is_here
        });
        let kind = drawn.map_or(Kind::Nothing, |(kind, _)| *kind);
        let first = *random.one_of(candidates);
        let other = (first + random.within(1, n_workers as u64) as usize) % n_workers;
        let victims = match kind {
            Kind::Nothing => vec![],
            Kind::KillTwo => vec![first, other],
            _ => vec![first],
        };
        let away = Duration::from_millis(random.within(AWAY_MS.0, AWAY_MS.1));
        let lasts = match kind {
            Kind::Nothing | Kind::Reset => Duration::ZERO,
            Kind::Kill | Kind::KillTwo | Kind::Leave => away,
            Kind::Freeze | Kind::Silence | Kind::FullDisk => SPELL,
        };
        let links = *random.one_of(&[Links::Inbound, Links::Outbound, Links::All]);
        Self { kind, victims, lasts, links }
    }

    /// Whether the cluster has something to notice.
    pub fn is_noticed(&self) -> bool {
        !matches!(self.kind, Kind::Nothing | Kind::FullDisk | Kind::Leave)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_kinds_are_drawn_and_follow_from_the_seed() {
        let draw = |seed| {
            let mut random = Random::new(seed);
            (0..200).map(|_| Fault::draw(&mut random, &KINDS, &[0, 2, 3], 4)).collect::<Vec<_>>()
        };
        let faults = draw(1);
        assert_eq!(format!("{faults:?}"), format!("{:?}", draw(1)));
        for (kind, weight) in KINDS {
            let n = faults.iter().filter(|fault| fault.kind == kind).count() as u64;
            assert!(n >= weight, "{kind}: {n}");
            assert_eq!(Kind::parse(kind.name()), Ok(kind));
        }
        for fault in &faults {
            assert!(fault.victims.iter().all(|victim| *victim < 4), "{fault:?}");
            assert_ne!(fault.victims.first(), Some(&1), "no candidate");
            assert!(fault.victims.len() < 2 || fault.victims[0] != fault.victims[1], "{fault:?}");
        }
        assert!(Kind::parse("flood").is_err_and(|error| error.contains("full-disk")));
    }

    #[test]
    fn kinds_that_are_left_out_are_not_drawn() {
        let mut random = Random::new(1);
        let kinds = [(Kind::Leave, 2), (Kind::Reset, 1)];
        let drawn = (0..50).map(|_| Fault::draw(&mut random, &kinds, &[0], 1).kind);
        assert!(drawn.into_iter().all(|kind| matches!(kind, Kind::Leave | Kind::Reset)));
    }
}
