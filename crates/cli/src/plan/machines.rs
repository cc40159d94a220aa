//! Who there is to hold a model: described in a file, named by flags, running as a cluster, or this machine alone.

use brigade_base::NodeId;
use brigade_node::measure::{MeasureRequest, speed_of_here};
use brigade_node::serving::{ClusterStatus, LinkStatus};
use brigade_node::system;
use brigade_plan::catalogue::{Catalogue, Device, MAX_FILE_BYTES, Prices, Scenario};
use brigade_plan::{Coordinator, Demand, LinkProfile, Links, ModelProfile, NodeProfile, Speed};

use super::model::{Model, Origin};
use crate::args::{EndpointArgs, PlanArgs};
use crate::endpoint::Endpoint;
use crate::error::Failure;
use crate::files;

/// Machines to plan for.
pub struct Machines {
    /// In the order in which they were named.
    pub nodes: Vec<NodeProfile>,
    /// Between them.
    pub links: Links,
    /// Whether the last of them must coordinate.
    pub coordinator: Coordinator,
    /// Where they come from, for people.
    pub source: String,
    /// What is doubtful about them, for people.
    pub notes: Vec<String>,
    /// What power and tokens cost there, as far as that was said.
    pub prices: Prices,
    /// How their speed with another model is found.
    knowledge: Knowledge,
}

/// What is known of machines beside their speed with one model.
enum Knowledge {
    /// A description of all of them.
    Scenario(Box<Scenario>),
    /// What each is, if that was said.
    Devices(Vec<Option<&'static Device>>),
    /// Nothing: they were measured with one model.
    Measured,
}

impl Machines {
    /// The machines that the arguments name.
    pub fn find(args: &PlanArgs, model: &Model, demand: &Demand) -> Result<Self, Failure> {
        if let Some(path) = &args.cluster {
            let text = files::read_text(path, MAX_FILE_BYTES as u64).map_err(Failure::usage)?;
            let here = path.display();
            let scenario = Scenario::parse(&text).map_err(|error| Failure::usage(format!("{here}: {error}")))?;
            return Ok(Self::described(scenario, &model.profile, here.to_string()));
        }
        if !args.nodes.is_empty() {
            return Self::named(args, &model.profile);
        }
        match Self::running(args, model, demand)? {
            Some(machines) => Ok(machines),
            None => Ok(Self::here(args, model, demand)),
        }
    }

    fn described(scenario: Scenario, model: &ModelProfile, file: String) -> Self {
        let nodes = scenario.profiles(model);
        let coordinator = if scenario.coordinator.is_some() { Coordinator::Last } else { Coordinator::Anywhere };
        Self {
            source: format!("{} as {file} has them", counted(nodes.len())),
            links: scenario.links(),
            nodes,
            coordinator,
            notes: Vec::new(),
            prices: scenario.prices,
            knowledge: Knowledge::Scenario(Box::new(scenario)),
        }
    }

    fn named(args: &PlanArgs, model: &ModelProfile) -> Result<Self, Failure> {
        let device = |name: &String| Catalogue::built_in().device(name).map_err(Failure::usage);
        let devices: Vec<Option<&'static Device>> =
            args.nodes.iter().map(|node| node.device.as_ref().map(device).transpose()).collect::<Result<_, _>>()?;
        let port = half(Catalogue::built_in().link(&args.link).map_err(Failure::usage)?.profile);
        let mut links = Links::default();
        let nodes: Vec<NodeProfile> = args
            .nodes
            .iter()
            .zip(&devices)
            .enumerate()
            .map(|(k, (node, device))| NodeProfile {
                id: numbered(k),
                name: node.name.clone(),
                memory: node.memory,
                speed: device.map(|device| device.speed(model)),
            })
            .collect();
        nodes.iter().for_each(|node| links.set_port(node.id, port));
        Ok(Self {
            source: format!("{} that --node names", counted(nodes.len())),
            nodes,
            links,
            coordinator: Coordinator::Last,
            notes: Vec::new(),
            prices: Prices::default(),
            knowledge: Knowledge::Devices(devices),
        })
    }

    /// The cluster that runs here; `None` if there is none.
    fn running(args: &PlanArgs, model: &Model, demand: &Demand) -> Result<Option<Self>, Failure> {
        let endpoint = EndpointArgs { state: args.state.clone(), url: None, api_key: None };
        // Without a note of it there is no cluster, and a note that a killed coordinator left leads nowhere.
        let Some(status) = Endpoint::of(&endpoint).ok().and_then(|here| here.get("/brigade/v1/status").ok()) else {
            return Ok(None);
        };
        let status: ClusterStatus = serde_json::from_value(status).map_err(|error| {
            Failure::run(format!("the coordinator that runs here is of another version ({error}); restart it"))
        })?;
        let mut notes = Vec::new();
        let is_same = status.model == model.name && status.n_layers == model.profile.n_layers();
        let nodes = status.nodes.iter().filter(|node| node.connected);
        let mut nodes: Vec<NodeProfile> = nodes
            .map(|node| NodeProfile {
                id: node.id,
                name: node.name.clone(),
                memory: node.memory_offered,
                speed: node.speed.clone(),
            })
            .collect();
        if !is_same && nodes.iter().any(|node| node.speed.is_some()) {
            notes.push(rescaled(&mut nodes, measured_here(args, model, demand), &status.model));
        }
        let links = links_of(&status.links, &nodes);
        Ok(Some(Self {
            source: format!("{} of the cluster that runs here", counted(nodes.len())),
            nodes,
            links,
            coordinator: Coordinator::Last,
            notes,
            prices: Prices::default(),
            knowledge: Knowledge::Measured,
        }))
    }

    fn here(args: &PlanArgs, model: &Model, demand: &Demand) -> Self {
        let (speed, notes) = match measured_here(args, model, demand) {
            Ok(speed) => (Some(speed), Vec::new()),
            Err(why) => (None, vec![format!("This machine's speed is not known: {why}.")]),
        };
        let name = system::host_name();
        Self {
            source: format!("this machine ({name}) alone; name others with --node or --cluster"),
            nodes: vec![NodeProfile { id: numbered(0), name, memory: system::available_memory(), speed }],
            links: Links::default(),
            coordinator: Coordinator::Last,
            notes,
            prices: Prices::default(),
            knowledge: Knowledge::Measured,
        }
    }

    /// The same machines with another model, where it is known how fast they are with it.
    pub fn with_model(&self, model: &ModelProfile) -> Option<Vec<NodeProfile>> {
        match &self.knowledge {
            Knowledge::Scenario(scenario) => Some(scenario.profiles(model)),
            Knowledge::Devices(devices) => {
                let speeds = devices.iter().map(|device| device.map(|device| device.speed(model)));
                let of = |(node, speed): (&NodeProfile, Option<Speed>)| NodeProfile { speed, ..node.clone() };
                Some(self.nodes.iter().zip(speeds).map(of).collect())
            }
            Knowledge::Measured => None,
        }
    }

    /// What these take at most, in watts; `None` unless it is known of all.
    pub fn watts(&self, mut ids: impl Iterator<Item = NodeId>) -> Option<f64> {
        let watts = |id: NodeId| match &self.knowledge {
            Knowledge::Scenario(scenario) => scenario.node(id)?.watts,
            Knowledge::Devices(devices) => {
                let k = self.nodes.iter().position(|node| node.id == id)?;
                devices.get(k)?.and_then(|device| device.watts)
            }
            Knowledge::Measured => None,
        };
        ids.try_fold(0.0, |sum, id| Some(sum + watts(id)?))
    }
}

fn counted(n: usize) -> String {
    if n == 1 { "1 machine".to_owned() } else { format!("{n} machines") }
}

/// A name for a machine that has no key.
pub(super) fn numbered(k: usize) -> NodeId {
    let mut id = [0; 32];
    id[..8].copy_from_slice(&(k as u64).to_be_bytes());
    NodeId::from_bytes(id)
}

/// A machine's way to the switch, if two of them make this link.
pub(super) fn half(link: LinkProfile) -> LinkProfile {
    LinkProfile { latency_s: link.latency_s / 2.0, ..link }
}

/// How fast this machine is with a model.
fn measured_here(args: &PlanArgs, model: &Model, demand: &Demand) -> Result<Speed, String> {
    let catalog = model.catalog().ok_or("a model that is given by name has no layers to measure")?;
    let request = MeasureRequest {
        catalog: catalog.clone(),
        context: demand.context,
        sessions: demand.parallel,
        max_rows: demand.max_rows,
    };
    let own = match &model.origin {
        Origin::File(file) => Some(std::sync::Arc::clone(file)),
        Origin::Header(_) | Origin::Name(_) => None,
    };
    let state_dir = args.state.dir();
    speed_of_here(&request, own, system::default_threads(), 1.0, &state_dir).map_err(|error| error.to_string())
}

/// Speeds of a cluster with the model that it serves, turned into speeds with another one: as many times as slow as the
/// coordinator, which is this machine. Says what was done.
fn rescaled(nodes: &mut [NodeProfile], here: Result<Speed, String>, served: &str) -> String {
    let with_served = nodes.last().and_then(|node| node.speed.clone());
    let (here, with_served) = match (here, with_served) {
        (Ok(here), Some(with_served)) => (here, with_served),
        (Err(why), _) => return forget(nodes, served, &why),
        (_, None) => return forget(nodes, served, "the coordinator was not measured"),
    };
    let served_s = with_served.decode.at(1.0).max(f64::MIN_POSITIVE);
    for node in nodes.iter_mut() {
        node.speed = node.speed.as_ref().map(|speed| here.slowed(speed.decode.at(1.0) / served_s));
    }
    format!("Speeds were measured with {served} and are converted by how fast this machine is with both models.")
}

fn forget(nodes: &mut [NodeProfile], served: &str, why: &str) -> String {
    nodes.iter_mut().for_each(|node| node.speed = None);
    format!("Speeds were measured with {served}, and cannot be converted: {why}.")
}

/// Links as the status has them, by the names of nodes.
fn links_of(status: &[LinkStatus], nodes: &[NodeProfile]) -> Links {
    let id = |name: &str| nodes.iter().find(|node| node.name == name).map(|node| node.id);
    let mut links = Links::default();
    for link in status {
        let (Some(from), Some(to)) = (id(&link.from), id(&link.to)) else { continue };
        let latency_s = link.rtt_ms / 2000.0;
        links.set(from, to, LinkProfile { latency_s, bytes_per_s: link.there_bytes_per_s });
        links.set(to, from, LinkProfile { latency_s, bytes_per_s: link.back_bytes_per_s });
    }
    links
}
