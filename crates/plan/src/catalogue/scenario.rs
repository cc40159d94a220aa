//! A cluster that somebody wrote down: nodes with devices of the catalogue or numbers of their own, and links.
//!
//! Flow: TOML is read into rows ([`Scenario::parse`] checks all of them and resolves all names), then asked for the
//! profiles of its nodes for one model and for its links. The format, with all keys:
//!
//! ```toml
//! [defaults]
//! link = "1gbe"               # of nodes that name none; 1gbe if left out
//!
//! [prices]
//! kwh_usd = 0.30              # of electricity
//! cloud_usd_per_million = 0.60  # of a million tokens, to compare with
//!
//! [[node]]
//! name = "desk"
//! device = "rtx-3090"         # of the catalogue; or kind, bandwidth_gb_s and tflops
//! memory = "22GiB"            # given to the model; a share of the device's smallest memory if left out
//! link = "2.5gbe"             # to the switch; or latency_ms (one way, to the switch) and gbit_s
//! coordinator = true          # at most one; whichever is best if left out
//! throttle = 0.5              # share of its speed
//! watts = 400
//!
//! [[node]]
//! name = "mini"
//! count = 3                   # mini-1, mini-2, mini-3
//! kind = "cpu"
//! bandwidth_gb_s = 51.2
//! tflops = 0.9
//! memory = "24GiB"
//!
//! [[pair]]
//! between = ["desk", "mini-1"]  # a name with a count means all of them
//! link = "thunderbolt-4"      # or latency_ms (one way, from one to the other) and gbit_s
//! ```
//!
//! Between two nodes without a pair lie both their ways to the switch: of a cable each has half of its latency, of
//! Wi-Fi and of a distant place all of it. So give a distant link to the nodes that are far away, and to those alone.

mod error;

pub use error::ScenarioError;

use std::collections::BTreeMap;

use brigade_base::{ByteSize, MAX_NODE_NAME_CHARS, NodeId, is_node_name};
use serde::Deserialize;

use super::{Catalogue, Device, Kind};
use crate::{LinkProfile, Links, MAX_BYTES_PER_S, MAX_SECONDS, ModelProfile, NodeProfile};

/// Most nodes of a scenario: as many as the planner is made for.
pub const MAX_NODES: usize = 10_000;

/// Most pairs of nodes with a link of their own, groups written out: all pairs of 400 nodes, and about ten megabytes.
pub const MAX_PAIRS: usize = 80_000;

/// Largest file: 10,000 nodes of 100 bytes each.
pub const MAX_FILE_BYTES: usize = 1 << 20;

/// Most that a kilowatt hour or a million tokens may cost, in dollars: nobody pays more.
const MAX_USD: f64 = 1e6;

/// Most watts of a node: a hall of them takes no more.
const MAX_WATTS: f64 = 1e6;

/// Most 10^12 operations in a second of a node: a thousand times what the fastest devices do.
const MAX_TFLOPS: f64 = 1e7;

/// Link of a node for which none is named.
const DEFAULT_LINK: &str = "1gbe";

/// A cluster that is not there.
#[derive(Debug, Clone, PartialEq)]
pub struct Scenario {
    /// Its nodes, in the order in which they were written down; never empty, names unique.
    pub nodes: Vec<ScenarioNode>,
    /// The one that must coordinate, by its place in `nodes`; `None` if any may.
    pub coordinator: Option<usize>,
    /// Pairs of nodes, by their places in `nodes`, with a link of their own, in both directions.
    pub pairs: BTreeMap<(usize, usize), ScenarioLink>,
    /// What electricity and tokens cost.
    pub prices: Prices,
}

/// A node of a scenario.
#[derive(Debug, Clone, PartialEq)]
pub struct ScenarioNode {
    /// Its id, made up from its place.
    pub id: NodeId,
    /// Its name.
    pub name: String,
    /// What it is.
    pub device: Device,
    /// Memory that it gives.
    pub memory: ByteSize,
    /// Its way to the switch, one way.
    pub link: ScenarioLink,
    /// Share of its device's speed that it has, above 0 and at most 1.
    pub throttle: f64,
    /// Watts under load, where they are known.
    pub watts: Option<f64>,
}

/// A link of a scenario.
#[derive(Debug, Clone, PartialEq)]
pub struct ScenarioLink {
    /// Its name in the catalogue; `None` if it was given in numbers.
    pub name: Option<String>,
    /// What it does, of a node to the switch, of a pair from one to the other.
    pub profile: LinkProfile,
}

/// What electricity and tokens cost.
#[derive(Debug, Clone, Copy, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Prices {
    /// Dollars for a kilowatt hour.
    pub kwh_usd: Option<f64>,
    /// Dollars for a million tokens elsewhere.
    pub cloud_usd_per_million: Option<f64>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(default)]
    defaults: Defaults,
    #[serde(default)]
    prices: Prices,
    #[serde(default)]
    node: Vec<NodeRow>,
    #[serde(default)]
    pair: Vec<PairRow>,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct Defaults {
    link: Option<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct NodeRow {
    name: String,
    device: Option<String>,
    kind: Option<Kind>,
    bandwidth_gb_s: Option<f64>,
    tflops: Option<f64>,
    memory: Option<String>,
    count: Option<u32>,
    link: Option<String>,
    latency_ms: Option<f64>,
    gbit_s: Option<f64>,
    #[serde(default)]
    coordinator: bool,
    throttle: Option<f64>,
    watts: Option<f64>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct PairRow {
    between: [String; 2],
    link: Option<String>,
    latency_ms: Option<f64>,
    gbit_s: Option<f64>,
}

impl Scenario {
    /// Reads a cluster file; see the head of this module for its format.
    ///
    /// # Errors
    /// If it is too large, no such file, or names what there is not. The message says what to write.
    pub fn parse(text: &str) -> Result<Self, ScenarioError> {
        if text.len() > MAX_FILE_BYTES {
            return Err(ScenarioError::TooLarge { n_bytes: text.len() });
        }
        let file: File = toml::from_str(text).map_err(|error| ScenarioError::Syntax { message: error.to_string() })?;
        let n_nodes: u64 = file.node.iter().map(|row| u64::from(row.count.unwrap_or(1))).sum();
        if n_nodes > MAX_NODES as u64 {
            return Err(ScenarioError::TooManyNodes { n_nodes });
        }
        for (key, value) in
            [("kwh_usd", file.prices.kwh_usd), ("cloud_usd_per_million", file.prices.cloud_usd_per_million)]
        {
            check("[prices]", key, value, |price| (0.0..=MAX_USD).contains(&price), "0 or more, and at most 1000000")?;
        }
        let default_link = file.defaults.link.as_deref().unwrap_or(DEFAULT_LINK);
        let default_link = link_of("[defaults]", End::Switch, Some(default_link), None, None)?;
        let mut reader = Reader { default_link, ..Reader::default() };
        file.node.iter().try_for_each(|row| reader.node(row))?;
        if reader.nodes.is_empty() {
            return Err(ScenarioError::NoNodes);
        }
        file.pair.iter().try_for_each(|row| reader.pair(row))?;
        Ok(Self { nodes: reader.nodes, coordinator: reader.coordinator, pairs: reader.pairs, prices: file.prices })
    }

    /// Its nodes as the planner wants them for a model, the coordinator last: the one that must be it, else the one
    /// whose memory is the fastest.
    pub fn profiles(&self, model: &ModelProfile) -> Vec<NodeProfile> {
        let last = self.coordinator.unwrap_or_else(|| {
            let bandwidth = |node: &ScenarioNode| node.device.bandwidth * node.throttle;
            let fastest = self.nodes.iter().enumerate().max_by(|a, b| bandwidth(a.1).total_cmp(&bandwidth(b.1)));
            fastest.map_or(0, |(place, _)| place)
        });
        let workers = self.nodes.iter().enumerate().filter(|(place, _)| *place != last).map(|(_, node)| node);
        workers.chain(self.nodes.get(last)).map(|node| node.profile(model)).collect()
    }

    /// What its links do.
    pub fn links(&self) -> Links {
        let mut links = Links::default();
        for node in &self.nodes {
            links.set_port(node.id, node.link.profile);
        }
        for (&(from, to), link) in &self.pairs {
            if let (Some(one), Some(other)) = (self.nodes.get(from), self.nodes.get(to)) {
                links.set(one.id, other.id, link.profile);
                links.set(other.id, one.id, link.profile);
            }
        }
        links
    }

    /// The node of that id.
    pub fn node(&self, id: NodeId) -> Option<&ScenarioNode> {
        self.nodes.iter().find(|node| node.id == id)
    }
}

impl ScenarioNode {
    /// It as the planner wants it for a model.
    pub fn profile(&self, model: &ModelProfile) -> NodeProfile {
        let speed = self.device.speed(model).slowed(1.0 / self.throttle);
        NodeProfile { id: self.id, name: self.name.clone(), memory: self.memory, speed: Some(speed) }
    }
}

/// A scenario while it is read.
#[derive(Default)]
struct Reader {
    default_link: ScenarioLink,
    nodes: Vec<ScenarioNode>,
    /// Names as they were written, with the places that they mean.
    groups: BTreeMap<String, std::ops::Range<usize>>,
    coordinator: Option<usize>,
    pairs: BTreeMap<(usize, usize), ScenarioLink>,
}

impl Default for ScenarioLink {
    fn default() -> Self {
        Self { name: None, profile: LinkProfile::UNKNOWN }
    }
}

impl Reader {
    fn node(&mut self, row: &NodeRow) -> Result<(), ScenarioError> {
        let place = format!("node {:?}", row.name);
        let count = row.count.unwrap_or(1);
        check(&place, "count", row.count.map(f64::from), |n| n >= 1.0, "1 or more")?;
        check(&place, "throttle", row.throttle, |share| share > 0.0 && share <= 1.0, "above 0, and at most 1")?;
        let watts = |watts: f64| (0.0..=MAX_WATTS).contains(&watts);
        check(&place, "watts", row.watts, watts, "0 or more, and at most 1000000")?;
        let device = device_of(&place, row)?;
        let memory = memory_of(&place, row, &device)?;
        let has_link = row.link.is_some() || row.latency_ms.is_some() || row.gbit_s.is_some();
        let link = if has_link {
            link_of(&place, End::Switch, row.link.as_deref(), row.latency_ms, row.gbit_s)?
        } else {
            self.default_link.clone()
        };
        let start = self.nodes.len();
        for k in 1..=count {
            let name = if row.count.is_some() { format!("{}-{k}", row.name) } else { row.name.clone() };
            if row.name.is_empty() || !is_node_name(&name) {
                return Err(ScenarioError::Name { name: name.chars().take(2 * MAX_NODE_NAME_CHARS).collect() });
            }
            if row.coordinator
                && let Some(first) = self.coordinator.replace(self.nodes.len())
            {
                let first = self.nodes[first].name.clone();
                return Err(ScenarioError::Coordinators { first, second: name });
            }
            self.called(&name, self.nodes.len()..self.nodes.len() + 1)?;
            self.nodes.push(ScenarioNode {
                id: made_up_id(self.nodes.len()),
                name,
                device: device.clone(),
                memory,
                link: link.clone(),
                throttle: row.throttle.unwrap_or(1.0),
                watts: row.watts.or(device.watts),
            });
        }
        if row.count.is_some() { self.called(&row.name, start..self.nodes.len()) } else { Ok(()) }
    }

    /// Notes which nodes a name means, which must be no other ones.
    fn called(&mut self, name: &str, places: std::ops::Range<usize>) -> Result<(), ScenarioError> {
        match self.groups.insert(name.to_owned(), places) {
            Some(_) => Err(ScenarioError::SameName { name: name.to_owned() }),
            None => Ok(()),
        }
    }

    fn pair(&mut self, row: &PairRow) -> Result<(), ScenarioError> {
        let [one, other] = &row.between;
        let place = format!("the [[pair]] between {one:?} and {other:?}");
        let link = link_of(&place, End::Node, row.link.as_deref(), row.latency_ms, row.gbit_s)?;
        let (ones, others) = (self.places(one)?, self.places(other)?);
        let mut is_empty = true;
        for from in ones {
            for to in others.clone().filter(|to| *to != from) {
                is_empty = false;
                self.pairs.insert((from.min(to), from.max(to)), link.clone());
                if self.pairs.len() > MAX_PAIRS {
                    return Err(ScenarioError::TooManyPairs);
                }
            }
        }
        if is_empty { Err(ScenarioError::PairOfOne { name: one.clone() }) } else { Ok(()) }
    }

    fn places(&self, name: &str) -> Result<std::ops::Range<usize>, ScenarioError> {
        const N_NAMES: usize = 12;
        let known = || self.groups.keys().take(N_NAMES).cloned().collect();
        let found = self.groups.get(name).cloned();
        found.ok_or_else(|| ScenarioError::UnknownNode { name: name.to_owned(), known: known() })
    }
}

/// An id for a node that has no key, the one at that place of a list: its number from 1, so that none is all zeros.
pub fn made_up_id(place: usize) -> NodeId {
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&(place as u64).saturating_add(1).to_be_bytes());
    NodeId::from_bytes(bytes)
}

fn check(
    place: &str,
    key: &'static str,
    value: Option<f64>,
    is_right: impl Fn(f64) -> bool,
    expected: &'static str,
) -> Result<(), ScenarioError> {
    match value {
        Some(value) if !(value.is_finite() && is_right(value)) => {
            Err(ScenarioError::Value { place: place.to_owned(), key, value: value.to_string(), expected })
        }
        _ => Ok(()),
    }
}

fn device_of(place: &str, row: &NodeRow) -> Result<Device, ScenarioError> {
    let bandwidth = |gb: f64| gb > 0.0 && gb * 1e9 <= MAX_BYTES_PER_S;
    check(place, "bandwidth_gb_s", row.bandwidth_gb_s, bandwidth, "above 0, and at most 1000000")?;
    let flops = |tera: f64| tera > 0.0 && tera <= MAX_TFLOPS;
    check(place, "tflops", row.tflops, flops, "above 0, and at most 10000000")?;
    let unknown = |source| ScenarioError::Unknown { place: place.to_owned(), source };
    match (&row.device, row.kind, row.bandwidth_gb_s, row.tflops) {
        (Some(name), _, bandwidth, tflops) => {
            let known = Catalogue::built_in().device(name).map_err(unknown)?;
            let mut device = known.clone();
            device.bandwidth = bandwidth.map_or(device.bandwidth, |gb| gb * 1e9);
            device.flops = tflops.map_or(device.flops, |tera| tera * 1e12);
            Ok(device)
        }
        (None, Some(kind), Some(bandwidth), Some(tflops)) => {
            Ok(Device::custom(&row.name, kind, bandwidth * 1e9, tflops * 1e12))
        }
        _ => Err(ScenarioError::NoDevice { node: row.name.clone() }),
    }
}

fn memory_of(place: &str, row: &NodeRow, device: &Device) -> Result<ByteSize, ScenarioError> {
    let Some(text) = &row.memory else {
        let smallest = device.memory.first();
        let memory = smallest.map(|memory| device.usable(*memory));
        return memory.ok_or_else(|| ScenarioError::NoMemory { node: row.name.clone() });
    };
    text.parse().map_err(|_| ScenarioError::Value {
        place: place.to_owned(),
        key: "memory",
        value: text.clone(),
        expected: "a size like \"24GiB\"",
    })
}

/// Where a node's link ends.
#[derive(Clone, Copy, PartialEq, Eq)]
enum End {
    /// At the switch.
    Switch,
    /// At another node.
    Node,
}

fn link_of(
    place: &str,
    end: End,
    name: Option<&str>,
    latency_ms: Option<f64>,
    gbit_s: Option<f64>,
) -> Result<ScenarioLink, ScenarioError> {
    let latency = |ms: f64| (0.0..=MAX_SECONDS).contains(&(ms / 1e3));
    check(place, "latency_ms", latency_ms, latency, "0 or more, and at most 3600000")?;
    let rate = |gbit: f64| gbit > 0.0 && gbit * 1e9 / 8.0 <= MAX_BYTES_PER_S;
    check(place, "gbit_s", gbit_s, rate, "above 0, and at most 8000000")?;
    let unknown = |source| ScenarioError::Unknown { place: place.to_owned(), source };
    let known = name.map(|name| Catalogue::built_in().link(name)).transpose().map_err(unknown)?;
    let profile = known.map(|link| if end == End::Switch { link.port() } else { link.profile });
    let latency_s = latency_ms.map(|ms| ms / 1e3).or(profile.map(|link| link.latency_s));
    let bytes_per_s = gbit_s.map(|gbit| gbit * 1e9 / 8.0).or(profile.map(|link| link.bytes_per_s));
    let (Some(latency_s), Some(bytes_per_s)) = (latency_s, bytes_per_s) else {
        return Err(ScenarioError::NoLink { place: place.to_owned() });
    };
    Ok(ScenarioLink {
        name: known.map(|link| link.name.clone()).filter(|_| latency_ms.is_none() && gbit_s.is_none()),
        profile: LinkProfile { latency_s, bytes_per_s },
    })
}

#[cfg(test)]
mod tests;
