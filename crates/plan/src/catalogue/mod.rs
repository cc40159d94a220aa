//! Devices, links and models by name, for clusters that are not there.
//!
//! - [`Catalogue`]: devices and links with their sources, from `catalogue.toml`, which is inside the program.
//! - [`Device`]: what a data sheet says of a machine; [`Device::speed`] makes a [`crate::Speed`] of it by a roofline.
//! - [`models`]: public models by shape and quantisation.
//! - [`Scenario`]: a cluster that a user wrote down, as profiles of nodes and links.
//!
//! Nothing here is measured on the machine at hand. Where nodes are there, measure them instead.

mod device;
pub mod models;
mod scenario;

pub use device::{Device, Kind, Measured};
pub use scenario::{
    MAX_FILE_BYTES, MAX_NODES, MAX_PAIRS, Prices, Scenario, ScenarioError, ScenarioLink, ScenarioNode, made_up_id,
};

use std::sync::LazyLock;

use serde::Deserialize;

use crate::LinkProfile;
use device::Row;

/// Names that an error suggests.
const N_SUGGESTIONS: usize = 3;

/// Devices and links by name.
#[derive(Debug, Clone, Default)]
pub struct Catalogue {
    devices: Vec<Device>,
    links: Vec<Link>,
}

/// A kind of link between nodes.
#[derive(Debug, Clone, PartialEq)]
pub struct Link {
    /// Its name.
    pub name: String,
    /// The same for people.
    pub title: String,
    /// What it does in one direction, from one node to another.
    pub profile: LinkProfile,
    /// Seconds from a node that is attached by it to the switch: half of the way for a cable, as two of them make one
    /// link; all of it where the delay is that of the air (Wi-Fi) or of the distance.
    pub port_latency_s: f64,
    /// Where the numbers come from.
    pub source: String,
}

impl Link {
    /// A node's way to the switch if it is attached by this link, for [`crate::Links::set_port`].
    pub fn port(&self) -> LinkProfile {
        LinkProfile { latency_s: self.port_latency_s, ..self.profile }
    }
}

/// There is no device or link of that name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("no {what} {name:?} is in the catalogue; the nearest are {}", .nearest.join(", "))]
pub struct UnknownName {
    /// A device or a link.
    pub what: &'static str,
    /// What was asked for.
    pub name: String,
    /// The names that are most like it.
    pub nearest: Vec<String>,
}

/// The embedded file; a test sees to it that it can be read.
static BUILT_IN: LazyLock<Catalogue> =
    LazyLock::new(|| Catalogue::parse(include_str!("catalogue.toml")).unwrap_or_default());

impl Catalogue {
    /// The one that is inside the program.
    pub fn built_in() -> &'static Self {
        &BUILT_IN
    }

    fn parse(text: &str) -> Result<Self, toml::de::Error> {
        let file: File = toml::from_str(text)?;
        let source = |key: &str| file.sources.get(key).and_then(toml::Value::as_str).unwrap_or(key).to_owned();
        let devices = file.device.into_iter().map(|row| row.into_device(&source)).collect();
        let links = file.link.into_iter().map(|row| row.into_link(&source)).collect();
        Ok(Self { devices, links })
    }

    /// All devices.
    pub fn devices(&self) -> &[Device] {
        &self.devices
    }

    /// All links, of each family the slowest first.
    pub fn links(&self) -> &[Link] {
        &self.links
    }

    /// The device of that name; case and punctuation do not count.
    ///
    /// # Errors
    /// If there is none.
    pub fn device(&self, name: &str) -> Result<&Device, UnknownName> {
        let found = self.devices.iter().find(|device| same_name(&device.name, name));
        found.ok_or_else(|| unknown("device", name, self.devices.iter().map(|device| device.name.as_str())))
    }

    /// The link of that name; case and punctuation do not count.
    ///
    /// # Errors
    /// If there is none.
    pub fn link(&self, name: &str) -> Result<&Link, UnknownName> {
        let found = self.links.iter().find(|link| same_name(&link.name, name));
        found.ok_or_else(|| unknown("link", name, self.links.iter().map(|link| link.name.as_str())))
    }
}

fn unknown<'a>(what: &'static str, name: &str, known: impl Iterator<Item = &'a str>) -> UnknownName {
    UnknownName { what, name: name.to_owned(), nearest: nearest(name, known) }
}

/// Letters and digits alone: `RTX 3090` is `rtx-3090`. A point between digits counts, for `2.5gbe` is not `25gbe`.
fn plain(name: &str) -> String {
    let is_point = |c: char| c == '.';
    name.chars().filter(|c| c.is_alphanumeric() || is_point(*c)).flat_map(char::to_lowercase).collect()
}

fn same_name(one: &str, other: &str) -> bool {
    plain(one) == plain(other)
}

/// Of the known names the few that are most like `name`, the likest first.
fn nearest<'a>(name: &str, known: impl Iterator<Item = &'a str>) -> Vec<String> {
    let name = plain(name);
    let likeness = |other: &str| strsim::jaro_winkler(&name, &plain(other));
    let mut by_likeness: Vec<(f64, &str)> = known.map(|other| (likeness(other), other)).collect();
    by_likeness.sort_by(|a, b| b.0.total_cmp(&a.0));
    by_likeness.into_iter().take(N_SUGGESTIONS).map(|(_, name)| name.to_owned()).collect()
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    sources: toml::Table,
    device: Vec<Row>,
    link: Vec<LinkRow>,
}

/// A link as it is written down.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct LinkRow {
    name: String,
    title: String,
    latency_ms: f64,
    port_latency_ms: Option<f64>,
    gbit_s: f64,
    source: String,
}

impl LinkRow {
    fn into_link(self, source: &impl Fn(&str) -> String) -> Link {
        Link {
            profile: LinkProfile { latency_s: self.latency_ms / 1e3, bytes_per_s: self.gbit_s * 1e9 / 8.0 },
            port_latency_s: self.port_latency_ms.unwrap_or(self.latency_ms / 2.0) / 1e3,
            source: source(&self.source),
            name: self.name,
            title: self.title,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_embedded_file_is_sound() {
        let catalogue = Catalogue::parse(include_str!("catalogue.toml")).unwrap();
        assert!(catalogue.devices().len() >= 45, "{}", catalogue.devices().len());
        assert!(catalogue.links().len() >= 20, "{}", catalogue.links().len());
        for link in catalogue.links() {
            assert!(link.profile.is_sound() && link.profile.latency_s > 0.0, "{}", link.name);
            let is_cable = !link.name.starts_with("wifi") && !link.name.starts_with("wan");
            let share = link.port_latency_s / link.profile.latency_s;
            assert!((share - if is_cable { 0.5 } else { 1.0 }).abs() < 1e-9, "{}: {share}", link.name);
            assert!(link.source.len() > 12, "{} has no source", link.name);
            assert_eq!(catalogue.links().iter().filter(|other| same_name(&other.name, &link.name)).count(), 1);
        }
        for device in catalogue.devices() {
            assert!(device.memory.is_sorted() && !device.memory.is_empty(), "{}", device.name);
            assert!(device.sources().all(|source| source.len() > 12), "{} has no source", device.name);
            assert_eq!(catalogue.devices().iter().filter(|other| same_name(&other.name, &device.name)).count(), 1);
        }
    }

    #[test]
    fn names_are_read_leniently_and_errors_help() {
        let catalogue = Catalogue::built_in();
        assert_eq!(catalogue.device("RTX 3090").unwrap().name, "rtx-3090");
        assert_eq!(catalogue.link("2.5 GbE").unwrap().name, "2.5gbe");
        assert_eq!(catalogue.link("25GbE").unwrap().name, "25gbe");
        let error = catalogue.device("rtx-3091").unwrap_err();
        assert_eq!(error.nearest[0], "rtx-3090", "{error}");
        assert!(error.to_string().contains("rtx-3091"), "{error}");
    }
}
