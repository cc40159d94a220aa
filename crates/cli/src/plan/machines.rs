//! Who there is to hold a model: described in a file, named by flags, running as a cluster, or this machine alone.

use std::collections::HashSet;

use brigade_base::NodeId;
use brigade_net::Identity;
use brigade_node::measure::{MeasureRequest, Measured, speed_of_here};
use brigade_node::serving::{ClusterStatus, LinkStatus};
use brigade_node::system;
use brigade_plan::catalogue::{Catalogue, Device, MAX_FILE_BYTES, Prices, Scenario, made_up_id};
use brigade_plan::{Coordinator, Demand, LinkProfile, Links, ModelProfile, NodeProfile, Optimize, Speed};

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
        let mut names = HashSet::new();
        if let Some(twice) = args.nodes.iter().find(|node| !names.insert(&node.name)) {
            let name = &twice.name;
            return Err(Failure::usage(format!("--node names two machines {name:?}; give them different names")));
        }
        let device = |name: &String| Catalogue::built_in().device(name).map_err(Failure::usage);
        let devices: Vec<Option<&'static Device>> =
            args.nodes.iter().map(|node| node.device.as_ref().map(device).transpose()).collect::<Result<_, _>>()?;
        let port = Catalogue::built_in().link(&args.link).map_err(Failure::usage)?.port();
        let mut links = Links::default();
        let nodes: Vec<NodeProfile> = args
            .nodes
            .iter()
            .zip(&devices)
            .enumerate()
            .map(|(k, (node, device))| NodeProfile {
                id: made_up_id(k),
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
        let is_same = model.catalog().is_some_and(|catalog| catalog.header_hash() == status.header_hash);
        let nodes = status.nodes.iter().filter(|node| node.connected);
        let mut nodes: Vec<NodeProfile> = nodes
            .map(|node| NodeProfile {
                id: node.id,
                name: node.name.clone(),
                memory: node.memory_offered,
                speed: node.speed.clone(),
            })
            .collect();
        if !is_same && is_speed_of_use(model, demand) && nodes.iter().any(|node| node.speed.is_some()) {
            let here = id_here(args).and_then(|id| Ok((id, measured_here(args, model, demand)?)));
            notes.extend(here.as_ref().ok().and_then(|(_, here)| here.disturbance.note()));
            let here = here.map(|(id, here)| (id, here.speed));
            notes.push(rescaled(&mut nodes, here, &status.model));
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
        let (speed, notes) = match is_speed_of_use(model, demand).then(|| measured_here(args, model, demand)) {
            Some(Ok(here)) => (Some(here.speed), here.disturbance.note().into_iter().collect()),
            Some(Err(why)) => (None, vec![format!("This machine's speed is not known: {why}.")]),
            None => (None, Vec::new()),
        };
        let name = system::host_name();
        Self {
            source: format!("this machine ({name}) alone; name others with --node or --cluster"),
            nodes: vec![NodeProfile { id: made_up_id(0), name, memory: system::available_memory(), speed }],
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

/// Whether anything depends on speeds: a placement, or what is predicted of it.
fn is_speed_of_use(model: &Model, demand: &Demand) -> bool {
    model.work.generates() || demand.optimize != Optimize::Memory
}

/// How fast this machine is with a model.
fn measured_here(args: &PlanArgs, model: &Model, demand: &Demand) -> Result<Measured, String> {
    let catalog = model.catalog().ok_or("a model that is given by name has no layers to measure")?;
    let request = MeasureRequest {
        catalog: catalog.clone(),
        context: demand.context,
        sessions: demand.parallel,
        max_rows: demand.max_rows,
        kv: model.kv,
    };
    let own = match &model.origin {
        Origin::File(file) => Some(std::sync::Arc::clone(file)),
        Origin::Header(_) | Origin::Name(_) => None,
    };
    let state_dir = args.state.dir();
    speed_of_here(&request, own, system::default_threads(), 1.0, &state_dir).map_err(|error| error.to_string())
}

/// Which node of the cluster runs here: the one with the key of this state directory.
fn id_here(args: &PlanArgs) -> Result<NodeId, String> {
    let identity = Identity::load_or_create(&args.state.dir()).map_err(|error| error.to_string())?;
    Ok(identity.node_id())
}

/// Speeds of a cluster with the model that it serves, turned into speeds with another one by the node that is this
/// machine: the others are as many times as slow as it with both. `here` is that node, and its speed with the other
/// model. Says what was done.
fn rescaled(nodes: &mut [NodeProfile], here: Result<(NodeId, Speed), String>, served: &str) -> String {
    let (id, here) = match here {
        Ok(here) => here,
        Err(why) => return forget(nodes, served, &why),
    };
    let Some(own) = nodes.iter().find(|node| node.id == id) else {
        return forget(nodes, served, "none of its nodes is this machine");
    };
    let Some(with_served) = &own.speed else {
        return forget(nodes, served, &format!("{}, which is this machine, was not measured", own.name));
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

/// Links between these nodes as the status has them. Names are for people: two machines may be called the same.
fn links_of(status: &[LinkStatus], nodes: &[NodeProfile]) -> Links {
    let is_here = |id: NodeId| nodes.iter().any(|node| node.id == id);
    let mut links = Links::default();
    for link in status.iter().filter(|link| is_here(link.from_id) && is_here(link.to_id)) {
        let latency_s = link.rtt_ms / 2000.0;
        links.set(link.from_id, link.to_id, LinkProfile { latency_s, bytes_per_s: link.there_bytes_per_s });
        links.set(link.to_id, link.from_id, LinkProfile { latency_s, bytes_per_s: link.back_bytes_per_s });
    }
    links
}

#[cfg(test)]
mod tests {
    use super::*;
    use brigade_base::ByteSize;
    use brigade_plan::catalogue::models::{self, Quant};

    fn node(k: usize, name: &str, device: &str, model: &str) -> NodeProfile {
        let device = Catalogue::built_in().device(device).unwrap();
        let speed = device.speed(&models::profile(model, Quant::Q4_0).unwrap());
        NodeProfile { id: made_up_id(k), name: name.to_owned(), memory: ByteSize::gib(8), speed: Some(speed) }
    }

    #[test]
    fn links_are_told_apart_where_names_are_not() {
        let nodes = [0, 1, 2].map(|k| node(k, "pc", "rtx-3090", "llama-3.1-8b"));
        let link = |from: usize, to: usize, rtt_ms| LinkStatus {
            from_id: made_up_id(from),
            to_id: made_up_id(to),
            from: "pc".to_owned(),
            to: "pc".to_owned(),
            rtt_ms,
            jitter_ms: 0.0,
            loaded_rtt_ms: rtt_ms,
            there_bytes_per_s: 1e9,
            back_bytes_per_s: 1e6,
        };
        let links = links_of(&[link(0, 1, 2.0), link(2, 1, 6.0), link(0, 7, 8.0)], &nodes);
        let got = |from, to| links.get(made_up_id(from), made_up_id(to));
        assert_eq!(got(0, 1), LinkProfile { latency_s: 0.001, bytes_per_s: 1e9 });
        assert_eq!(got(1, 2), LinkProfile { latency_s: 0.003, bytes_per_s: 1e6 });
        assert_eq!(got(0, 7), LinkProfile::UNKNOWN);
    }

    #[test]
    fn speeds_are_converted_by_the_node_that_is_here() {
        let (served, asked) = ("llama-3.1-8b", "llama-3.3-70b");
        let cluster = || vec![node(0, "here", "raspberry-pi-5", served), node(1, "coordinator", "rtx-3090", served)];
        let row_s = |node: &NodeProfile| node.speed.as_ref().unwrap().decode.at(1.0);
        let here = node(0, "here", "raspberry-pi-5", asked).speed.unwrap();
        let mut nodes = cluster();
        let said = rescaled(&mut nodes, Ok((made_up_id(0), here.clone())), "abacus");
        assert!(said.contains("are converted"), "{said}");
        // The machine here has the speed that was measured; the other keeps how many times as fast it is.
        assert!((row_s(&nodes[0]) / here.decode.at(1.0) - 1.0).abs() < 1e-9);
        let factor = |nodes: &[NodeProfile]| row_s(&nodes[0]) / row_s(&nodes[1]);
        assert!((factor(&nodes) / factor(&cluster()) - 1.0).abs() < 1e-9);

        for (here, why) in [(Ok((made_up_id(9), here)), "none of its nodes"), (Err("no key".to_owned()), "no key")] {
            let mut nodes = cluster();
            let said = rescaled(&mut nodes, here, "abacus");
            assert!(said.contains("cannot be converted") && said.contains(why), "{said}");
            assert!(nodes.iter().all(|node| node.speed.is_none()));
        }
    }
}
