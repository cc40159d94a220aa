//! The clusters that predictions are held against: two to four nodes of unlike speed and memory on unlike links.
//!
//! Speeds are throttles, shares of one core. Those of a cluster never sum to more than 1.6 of this machine's two cores,
//! since all stages compute at once under many streams: nodes that waited for each other's core would be slower than
//! they measured alone. Memory is what `--memory` says. The model of this benchmark takes 620 MiB with the KV cache of
//! eight streams, so that with one exception no node can hold it alone.

use std::time::Duration;

use brigade_base::ByteSize;

use crate::shaper::LinkShape;

/// A cluster to start.
#[derive(Debug, Clone, PartialEq)]
pub struct ClusterPlan {
    /// The nodes, the coordinator first, workers in the order in which they join.
    pub nodes: Vec<NodePlan>,
    /// What lies between any two nodes.
    pub link: Link,
    /// A worker, counted from 1, that all others reach over another link.
    pub far: Option<(usize, Link)>,
}

/// A node of one thread.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct NodePlan {
    /// The share of a core that it uses.
    pub throttle: f64,
    /// What it gives.
    pub memory: ByteSize,
}

/// What lies between two nodes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Link {
    /// The machine's own loopback.
    Loopback,
    /// 1 ms each way, 1 Gb/s: two switches and a busy home network.
    Near,
    /// 5 ms, 100 Mb/s: Wi-Fi.
    Wireless,
    /// 20 ms, 50 Mb/s: another house.
    Wide,
}

impl Link {
    /// What each direction does; `None` if nothing shapes it.
    pub fn shape(self) -> Option<LinkShape> {
        let of = |latency_ms, megabits: f64| LinkShape {
            latency: Duration::from_millis(latency_ms),
            jitter: Duration::ZERO,
            bytes_per_s: megabits * 1e6 / 8.0,
        };
        match self {
            Self::Loopback => None,
            Self::Near => Some(of(1, 1000.0)),
            Self::Wireless => Some(of(5, 100.0)),
            Self::Wide => Some(of(20, 50.0)),
        }
    }

    /// For tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::Loopback => "loopback",
            Self::Near => "1 ms, 1 Gb/s",
            Self::Wireless => "5 ms, 100 Mb/s",
            Self::Wide => "20 ms, 50 Mb/s",
        }
    }
}

impl ClusterPlan {
    /// The link between two nodes, counted from 0.
    pub fn link_of(&self, a: usize, b: usize) -> Link {
        self.far.filter(|(far, _)| *far == a || *far == b).map_or(self.link, |(_, link)| link)
    }

    /// Whether any of its links needs a forwarder.
    pub fn is_shaped(&self) -> bool {
        self.link.shape().is_some() || self.far.is_some_and(|(_, link)| link.shape().is_some())
    }

    /// What node `k` is called.
    pub fn name_of(k: usize) -> String {
        if k == 0 { "coordinator".to_owned() } else { format!("worker-{k}") }
    }

    /// The same with some of its workers only, in this order.
    pub fn with_workers(&self, workers: &[usize]) -> Self {
        let nodes = std::iter::once(0).chain(workers.iter().copied()).map(|k| self.nodes[k]).collect();
        let place = |far: usize| Some(workers.iter().position(|k| *k == far)? + 1);
        Self { nodes, link: self.link, far: self.far.and_then(|(far, link)| Some((place(far)?, link))) }
    }
}

impl std::fmt::Display for ClusterPlan {
    /// Speeds, memory and links: `1 + 0.25, 576 MiB each, loopback`.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let list = |of: &dyn Fn(&NodePlan) -> String| self.nodes.iter().map(of).collect::<Vec<_>>();
        let mib = list(&|node| (node.memory.0 >> 20).to_string());
        let memory =
            if mib.iter().all(|m| *m == mib[0]) { format!("{} MiB each", mib[0]) } else { mib.join(" + ") + " MiB" };
        write!(f, "{}, {memory}, {}", list(&|node| node.throttle.to_string()).join(" + "), self.link.name())?;
        if let Some((far, link)) = self.far {
            write!(f, "; {} to node {}", link.name(), far + 1)?;
        }
        Ok(())
    }
}

/// The 4:1 pair that measured placement is compared with placement by memory on.
pub const UNEQUAL_PAIR: usize = 1;

/// Those on which all coarse splits are measured, too.
pub const SEARCHED: [usize; 3] = [UNEQUAL_PAIR, 4, 7];

/// Those of `--quick`: one of each size and link.
pub const QUICK: [usize; 3] = [UNEQUAL_PAIR, 6, 11];

/// All clusters.
pub fn all() -> Vec<ClusterPlan> {
    let of = |throttles: &[f64], mib: &[u64], link| {
        let memory = mib.iter().cycle().map(|m| ByteSize(m << 20));
        let nodes = throttles.iter().zip(memory).map(|(&throttle, memory)| NodePlan { throttle, memory }).collect();
        ClusterPlan { nodes, link, far: None }
    };
    vec![
        of(&[0.8, 0.75], &[512], Link::Loopback),
        of(&[1.0, 0.25], &[576], Link::Loopback),
        of(&[0.3, 1.0], &[512], Link::Loopback),
        of(&[0.8, 0.8], &[512], Link::Near),
        of(&[1.0, 0.5], &[576], Link::Wireless),
        of(&[0.7, 0.7], &[512], Link::Wide),
        of(&[0.5, 0.5, 0.5], &[384], Link::Loopback),
        of(&[1.0, 0.4, 0.2], &[448], Link::Near),
        of(&[0.2, 1.0, 0.4], &[384, 512, 448], Link::Wireless),
        of(&[0.6, 0.6, 0.15], &[448], Link::Wide),
        of(&[0.4, 0.4, 0.4, 0.4], &[320], Link::Loopback),
        of(&[0.6, 0.5, 0.3, 0.2], &[384], Link::Near),
        // A machine in another house, without which the model fits as well.
        ClusterPlan { far: Some((3, Link::Wide)), ..of(&[0.45, 0.45, 0.35, 0.35], &[384], Link::Near) },
        // Each holds the model alone.
        of(&[0.3, 1.0], &[1024], Link::Near),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the throttles of a cluster may sum to; the rest of two cores is for clients and forwarders.
    const MOST_CORES: f64 = 1.61;

    #[test]
    fn clusters_are_many_unlike_and_do_not_crowd_the_machine() {
        let all = all();
        assert!(all.len() >= 12 && (2..=4).all(|n| all.iter().any(|cluster| cluster.nodes.len() == n)));
        for cluster in &all {
            let throttles = || cluster.nodes.iter().map(|node| node.throttle);
            assert!(
                (2..=4).contains(&cluster.nodes.len()) && throttles().sum::<f64>() <= MOST_CORES + 1e-9,
                "{cluster}"
            );
            assert!(throttles().all(|throttle| (0.15..=1.0).contains(&throttle)), "{cluster}");
            assert!(cluster.far.is_none_or(|(far, _)| (1..cluster.nodes.len()).contains(&far)), "{cluster}");
        }
        for link in [Link::Loopback, Link::Near, Link::Wireless, Link::Wide] {
            assert!(all.iter().any(|cluster| cluster.link == link), "{link:?}");
        }
        let pair = &all[UNEQUAL_PAIR];
        assert_eq!((pair.nodes[0].throttle / pair.nodes[1].throttle, pair.nodes.len()), (4.0, 2));
        assert_eq!(pair.nodes[0].memory, pair.nodes[1].memory);
        assert!(SEARCHED.iter().chain(&QUICK).all(|k| *k < all.len()));
    }

    #[test]
    fn a_cluster_is_told_in_words_and_keeps_its_links_with_fewer_workers() {
        let far = ClusterPlan { far: Some((2, Link::Wide)), ..all()[8].clone() };
        assert_eq!(far.to_string(), "0.2 + 1 + 0.4, 384 + 512 + 448 MiB, 5 ms, 100 Mb/s; 20 ms, 50 Mb/s to node 3");
        assert_eq!((far.link_of(0, 1), far.link_of(1, 2), far.link_of(2, 0)), (Link::Wireless, Link::Wide, Link::Wide));
        let turned = far.with_workers(&[2, 1]);
        assert_eq!((turned.nodes[1].throttle, turned.far), (0.4, Some((1, Link::Wide))));
        assert_eq!(far.with_workers(&[1]).far, None);
    }
}
