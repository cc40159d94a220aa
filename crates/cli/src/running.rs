//! A node that runs, as `serve` and `join` show it: what it does, its endpoint, the notes that it leaves, and its end.
//!
//! ```text
//! Node::part ----> lines on standard output, bars, node.json
//!     front -----> the endpoint, once it is known what is served; endpoint.json
//! signals -------> Ending: answers first, then the node
//! ```
//!
//! One loop looks at all of it every now and then. A node may change its part at any time: who served finds another one
//! coordinating when it comes back, and who worked takes over.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use brigade_api::{ApiOptions, Server};
use brigade_node::serving::{ClusterStatus, NodeStatus, Readiness, Serving};
use brigade_node::{Gateway, Node, Part, WorkerStatus};
use brigade_plan::{figure, seconds};

use crate::ending::{Ending, Signals};
use crate::endpoint::{Note, NoteGuard};
use crate::error::Failure;
use crate::http::Front;
use crate::progress::{Bars, POLL};
use crate::{node_note, output};

/// How long a node may have no part before it says so: a coordinator that needs nobody's vote has one in milliseconds,
/// and a change of coordinators takes two seconds.
const UNDECIDED_IS_NEWS: Duration = Duration::from_secs(2);

/// A node, its endpoint and its notes.
pub struct Running {
    node: Node,
    state_dir: PathBuf,
    outlet: Outlet,
    signals: Signals,
    drain_timeout: Duration,
}

impl Running {
    /// Takes care of a node that was just started. `front` is where its endpoint will be, if it is to have one.
    ///
    /// # Errors
    /// If the system does not let signals be heard.
    pub fn new(node: Node, state_dir: &Path, front: Option<Front>, drain_timeout: Duration) -> Result<Self, Failure> {
        let signals = Signals::listen()?;
        // One that was killed may have left them; this process has its directory now.
        node_note::remove(state_dir);
        Note::remove(state_dir);
        let outlet = Outlet::Shut(front);
        Ok(Self { node, state_dir: state_dir.to_owned(), outlet, signals, drain_timeout })
    }

    /// The node.
    pub fn node(&self) -> &Node {
        &self.node
    }

    /// Waits until it ends, and shows what it does. `changed` is told each time it begins to coordinate or to work for
    /// another node.
    ///
    /// # Errors
    /// Why it could not go on.
    pub fn wait(mut self, mut changed: impl FnMut(&Node, &Part) -> Result<(), Failure>) -> Result<(), Failure> {
        let watched = self.watch(&mut changed);
        node_note::remove(&self.state_dir);
        if let Outlet::Open { server, .. } = self.outlet {
            server.stop();
        }
        watched?;
        self.node.wait().map_err(Failure::run)
    }

    fn watch(&mut self, changed: &mut dyn FnMut(&Node, &Part) -> Result<(), Failure>) -> Result<(), Failure> {
        let stopper = self.node.stopper();
        let mut ending = Ending::new(self.signals.clone(), self.drain_timeout, move || stopper.stop());
        let mut bars = Bars::new();
        let mut shown = Shown::new();
        while !self.node.is_finished() {
            let part = self.node.part();
            if shown.is_another(&part) {
                changed(&self.node, &part)?;
            }
            if !matches!(part, Part::Undecided) {
                self.outlet.open(self.node.front(), &self.state_dir)?;
            }
            ending.poll(self.outlet.server())?;
            show_progress(&mut bars, &part, self.node.front());
            if let Some(line) = shown.news(&part, || self.outlet.describe(&self.node.front().readiness())) {
                bars.clear();
                output::line(line)?;
                node_note::write(&self.state_dir, &part);
            }
            if let Part::Coordinates = part
                && let Some(lines) = shown.plan(&self.node.front().status())
            {
                bars.clear();
                lines.into_iter().try_for_each(output::line)?;
            }
            std::thread::sleep(POLL);
        }
        bars.clear();
        Ok(())
    }
}

/// The endpoint of a node. Its port is taken from the start, but it answers only once it is known what is served:
/// before that it could not even say its model's name.
enum Outlet {
    /// Not yet, or never where there is no port.
    Shut(Option<Front>),
    /// It answers.
    Open { server: Server, url: String, _note: NoteGuard },
}

impl Outlet {
    /// Opens it if the time has come.
    fn open(&mut self, gateway: &Arc<Gateway>, state_dir: &Path) -> Result<(), Failure> {
        let Self::Shut(front) = self else { return Ok(()) };
        let Some(front) = front.take_if(|_| gateway.wait_for_model(Duration::ZERO)) else { return Ok(()) };
        let admin_token = brigade_net::random_token().map_err(Failure::run)?;
        let api = ApiOptions { admin_token: Some(admin_token.clone()), ..front.options };
        let serving = Arc::clone(gateway) as Arc<dyn Serving>;
        let server = Server::start(front.listener, serving, &api).map_err(Failure::run)?;
        let url = format!("http://{}", server.addr());
        let note = Note { url: url.clone(), admin_token, pid: std::process::id() }.leave(state_dir)?;
        output::line(format_args!("serving {url}/v1"))?;
        *self = Self::Open { server, url, _note: note };
        Ok(())
    }

    fn server(&self) -> Option<&Server> {
        match self {
            Self::Shut(_) => None,
            Self::Open { server, .. } => Some(server),
        }
    }

    /// How a coordinator stands.
    fn describe(&self, readiness: &Readiness) -> String {
        match (readiness, self) {
            (Readiness::Ready, Self::Open { url, .. }) => format!("ready {url}/v1"),
            (Readiness::Ready, Self::Shut(_)) => "ready".to_owned(),
            (Readiness::Recovering(why), _) => format!("recovering: {why}"),
            (Readiness::NotReady(why), _) => why.clone(),
        }
    }
}

/// What was said last.
struct Shown {
    /// Of the last part that was none of waiting.
    coordinates: Option<bool>,
    line: String,
    trouble: Option<String>,
    undecided_since: Option<Instant>,
    /// Term and epoch of the plan that was shown.
    planned: Option<(u64, u64)>,
}

impl Shown {
    fn new() -> Self {
        Self { coordinates: None, line: String::new(), trouble: None, undecided_since: None, planned: None }
    }

    /// Whether the node did something else, or nothing, before this part.
    fn is_another(&mut self, part: &Part) -> bool {
        let coordinates = match part {
            Part::Undecided => return false,
            Part::Coordinates => true,
            Part::Works(_) => false,
        };
        self.coordinates.replace(coordinates) != Some(coordinates)
    }

    /// The plan of a placement that has become ready, if it was not said yet.
    fn plan(&mut self, status: &ClusterStatus) -> Option<Vec<String>> {
        let placed = Some((status.term, status.epoch));
        if status.state != "ready" || self.planned == placed {
            return None;
        }
        self.planned = placed;
        Some(describe_plan(status))
    }

    /// The line to say, if there is news.
    fn news(&mut self, part: &Part, describe_coordinator: impl FnOnce() -> String) -> Option<String> {
        let (line, trouble) = match part {
            Part::Undecided => {
                let since = *self.undecided_since.get_or_insert_with(Instant::now);
                if since.elapsed() < UNDECIDED_IS_NEWS {
                    return None;
                }
                ("waiting for the votes of a majority, or for the one who coordinates".to_owned(), None)
            }
            Part::Coordinates => (describe_coordinator(), None),
            Part::Works(status) => (describe_worker(status), status.trouble.clone()),
        };
        if !matches!(part, Part::Undecided) {
            self.undecided_since = None;
        }
        let is_news = line != self.line || trouble != self.trouble;
        (self.line, self.trouble) = (line, trouble);
        is_news.then(|| self.line.clone())
    }
}

/// A placement in short: who has which layers, what to expect of it, and whether something else would be better.
fn describe_plan(status: &ClusterStatus) -> Vec<String> {
    let stage = |node: &NodeStatus| node.layers.map(|layers| format!("{} {layers}", node.name));
    let stages: Vec<String> = status.nodes.iter().filter_map(stage).collect();
    let mut line = format!("plan    {}", stages.join(" -> "));
    if let Some(expected) = &status.prediction {
        let one = figure(expected.tokens_per_s);
        line.push_str(&format!("; expect {one} tokens/s for one stream"));
        if expected.streams > 1 {
            line.push_str(&format!(", {} for {}", figure(expected.streams_tokens_per_s), expected.streams));
        }
        let (tokens, wait) = (expected.prompt_tokens, seconds(expected.first_token_s));
        line.push_str(&format!("; first token of a {tokens}-token prompt after {wait}"));
    }
    std::iter::once(line).chain(status.advice.iter().map(|advice| format!("advice  {advice}"))).collect()
}

fn show_progress(bars: &mut Bars, part: &Part, front: &Gateway) {
    match part {
        Part::Undecided => {}
        Part::Coordinates => show_loading(bars, &front.status()),
        Part::Works(status) => {
            let (done, total) = status.weights;
            let share = if status.state == "loading" && total > 0 { done as f32 / total as f32 } else { 1.0 };
            bars.set("fetching weights", share);
        }
    }
}

fn show_loading(bars: &mut Bars, status: &ClusterStatus) {
    for node in &status.nodes {
        if let Some(layers) = node.layers {
            let share = if node.state == "loading" { node.loaded } else { 1.0 };
            bars.set(&format!("{} layers {layers}", node.name), share);
        }
    }
}

fn describe_worker(status: &WorkerStatus) -> String {
    let (coordinator, model) = (status.coordinator.short(), &status.model);
    let standby = status.standby.iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
    let trouble = status.trouble.as_ref().map(|trouble| format!(" ({trouble})")).unwrap_or_default();
    if !status.connected {
        return format!("looking for {coordinator}{trouble}");
    }
    match (&status.layers, standby.as_str()) {
        (Some(layers), "") => format!("{} layers {layers} of {model} for {coordinator}", status.state),
        (Some(layers), standby) => {
            format!("{} layers {layers} of {model} for {coordinator}, standing by for {standby}", status.state)
        }
        (None, _) if status.state == "leaving" => format!("leaving {coordinator}"),
        (None, _) if status.state == "released" => format!("released by {coordinator}"),
        (None, "") if status.trouble.is_some() => format!("idle for {coordinator}{trouble}"),
        (None, "") => format!("joined {coordinator}, waiting for layers"),
        (None, standby) => format!("standing by for layers {standby} of {model} for {coordinator}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use brigade_base::{LayerRange, NodeId};
    use brigade_node::serving::WeightBytes;

    fn worker(layers: Option<(u32, u32)>, standby: &[(u32, u32)], state: &str) -> WorkerStatus {
        let range = |(start, end)| LayerRange::new(start, end).unwrap();
        WorkerStatus {
            node: NodeId::from_bytes([1; 32]),
            coordinator: NodeId::from_bytes([0xab; 32]),
            address: String::new(),
            connected: true,
            model: "m".to_owned(),
            layers: layers.map(range),
            standby: standby.iter().copied().map(range).collect(),
            state: state.to_owned(),
            weights: (0, 0),
            weights_from: WeightBytes::default(),
            trouble: None,
        }
    }

    #[test]
    fn a_worker_says_what_it_is_good_for() {
        for (layers, standby, state, expected) in [
            (Some((0, 4)), &[][..], "running", "running layers 0..4 of m for abababab"),
            (Some((0, 4)), &[(4, 6)], "leaving", "leaving layers 0..4 of m for abababab, standing by for 4..6"),
            (None, &[(0, 2), (4, 6)], "waiting", "standing by for layers 0..2,4..6 of m for abababab"),
            (None, &[], "waiting", "joined abababab, waiting for layers"),
            (None, &[(0, 2)], "leaving", "leaving abababab"),
            (None, &[], "released", "released by abababab"),
        ] {
            let mut status = worker(layers, standby, state);
            assert_eq!(describe_worker(&status), expected);
            (status.connected, status.trouble) = (false, Some("no route".to_owned()));
            assert_eq!(describe_worker(&status), "looking for abababab (no route)");
        }
    }

    #[test]
    fn a_change_of_parts_is_told_once() {
        let mut shown = Shown::new();
        let works = Part::Works(worker(None, &[], "waiting"));
        let parts = [&Part::Undecided, &works, &works, &Part::Undecided, &works, &Part::Coordinates, &Part::Undecided];
        let told = parts.map(|part| shown.is_another(part));
        assert_eq!(told, [false, true, false, false, false, true, false]);
        assert!(!shown.is_another(&Part::Coordinates) && shown.is_another(&works));
    }

    #[test]
    fn what_is_no_news_is_not_said_again() {
        let mut shown = Shown::new();
        let works = |state: &str| Part::Works(worker(Some((0, 4)), &[], state));
        let mut says = |part: &Part, line: &str| shown.news(part, || line.to_owned());
        assert_eq!(says(&Part::Undecided, ""), None, "that is over in a moment");
        assert_eq!(says(&Part::Coordinates, "ready").as_deref(), Some("ready"));
        assert_eq!(says(&Part::Coordinates, "ready"), None);
        assert!(says(&works("running"), "").is_some() && says(&works("running"), "").is_none());
        assert!(says(&works("leaving"), "").is_some());
        assert_eq!(says(&Part::Coordinates, "ready").as_deref(), Some("ready"));
    }
}
