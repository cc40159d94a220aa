//! Asks all nodes of a cluster how they are.
//!
//! The coordinator's owner loop passes the question on to the workers ([`Report::Known`], then a [`Report::Answer`] for
//! each); whoever asks waits for the answers, since the loop waits for nobody. This node examines itself meanwhile.

use std::collections::HashMap;
use std::sync::Mutex;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use brigade_base::NodeId;
use brigade_protocol::measure::{Examined, Finding};

use super::cluster::{self, Clock, Known};
use super::{Subject, examined, fail, unix_ms, warn};
use crate::serving::{ClusterStatus, Examination, NodeFindings, NodeStatus};
use crate::threads::{lock, spawn};

/// How long nodes may take to examine themselves. It takes them a second; a slow disk or a busy node some more.
pub(crate) const EXAMINE_WITHIN: Duration = Duration::from_secs(10);

/// How often it is looked whether those who are waited for have left.
const LOOK_EVERY: Duration = Duration::from_millis(200);

/// What the owner loop says to whoever asks.
pub(crate) enum Report {
    /// What it knows of the cluster, and whom it asked.
    Known(Box<Known>),
    /// A node's answer.
    Answer(NodeId, Examined),
}

/// Passes the question on; false if nobody does any more.
type Ask = Box<dyn Fn(Sender<Report>) -> bool + Send + Sync>;

/// Asks all nodes of a cluster, one round at a time.
pub(crate) struct Rounds {
    own: NodeId,
    subject: Subject,
    ask: Ask,
    /// The last round and its beginning.
    last: Mutex<Option<(Instant, Examination)>>,
}

impl Rounds {
    /// Rounds of the coordinator `own`, which is `subject`.
    pub(crate) fn new(
        own: NodeId,
        subject: Subject,
        ask: impl Fn(Sender<Report>) -> bool + Send + Sync + 'static,
    ) -> Self {
        Self { own, subject, ask: Box::new(ask), last: Mutex::default() }
    }

    /// Examines all nodes. Blocks for a second, at most for [`EXAMINE_WITHIN`] and the rest of a round that others
    /// began; those who wait for that get what the one after it finds.
    ///
    /// # Errors
    /// If the coordinator has ended or just begins, in words.
    pub(crate) fn examine(&self, status: &dyn Fn() -> ClusterStatus) -> Result<Examination, String> {
        self.examine_since(Instant::now(), status)
    }

    /// What a round found that began after `asked`.
    fn examine_since(&self, asked: Instant, status: &dyn Fn() -> ClusterStatus) -> Result<Examination, String> {
        let mut last = lock(&self.last);
        // Several who waited for one round share the next.
        if let Some((_, found)) = last.as_ref().filter(|(began, _)| *began >= asked) {
            return Ok(found.clone());
        }
        let began = Instant::now();
        let found = self.round(status)?;
        *last = Some((began, found.clone()));
        Ok(found)
    }

    fn round(&self, status: &dyn Fn() -> ClusterStatus) -> Result<Examination, String> {
        let deadline = Instant::now() + EXAMINE_WITHIN;
        let (tell, reports) = channel();
        if !(self.ask)(tell.clone()) {
            return Err("the coordinator has ended".to_owned());
        }
        let (own, mut subject) = (self.own, self.subject.clone());
        let others: Vec<NodeStatus> = status().nodes.into_iter().filter(|node| node.id != own).collect();
        let were_here = connected(&others);
        subject.peers = others.into_iter().map(|node| node.address).collect();
        let examine = move || drop(tell.send(Report::Answer(own, examined(&subject))));
        spawn("doctor", examine).map_err(|error| format!("the system gives no thread: {error}"))?;
        // Workers that still measure themselves are no members yet, so it is not seen whether they leave.
        let left = || {
            let here = connected(&status().nodes);
            were_here.iter().filter(|node| !here.contains(node)).copied().collect()
        };
        let mut heard = Heard::until(deadline, own, &reports, &left);
        let known = heard.known.take().ok_or("the coordinator is just starting; ask again in a moment")?;
        Ok(heard.examination(&known, own, &status()))
    }
}

/// The nodes that have a link.
fn connected(nodes: &[NodeStatus]) -> Vec<NodeId> {
    nodes.iter().filter(|node| node.connected).map(|node| node.id).collect()
}

/// What was heard in a round.
#[derive(Default)]
struct Heard {
    known: Option<Box<Known>>,
    findings: HashMap<NodeId, Vec<Finding>>,
    clocks: Vec<Clock>,
    /// Nodes that left meanwhile. They may have answered before.
    left: Vec<NodeId>,
}

impl Heard {
    /// Listens until all have answered or left, or the deadline.
    fn until(deadline: Instant, own: NodeId, reports: &Receiver<Report>, left: &dyn Fn() -> Vec<NodeId>) -> Self {
        let mut heard = Self::default();
        while !heard.is_complete(own) {
            let rest = deadline.saturating_duration_since(Instant::now());
            match reports.recv_timeout(rest.min(LOOK_EVERY)) {
                Ok(Report::Known(known)) => heard.known = Some(known),
                Ok(Report::Answer(node, answer)) => {
                    if node != own {
                        heard.clocks.retain(|(other, _)| *other != node);
                        heard.clocks.push((node, answer.unix_ms as f64 - unix_ms() as f64));
                    }
                    heard.findings.insert(node, answer.findings);
                }
                Err(RecvTimeoutError::Timeout) if rest > LOOK_EVERY => heard.left = left(),
                Err(_) => break,
            }
        }
        heard
    }

    fn is_complete(&self, own: NodeId) -> bool {
        let has = |node: &NodeId| self.findings.contains_key(node);
        let is_over = |node: &NodeId| has(node) || self.left.contains(node);
        self.known.as_ref().is_some_and(|known| has(&own) && known.asked.iter().all(is_over))
    }

    /// All findings by node: the coordinator first, then its workers.
    fn examination(mut self, known: &Known, own: NodeId, status: &ClusterStatus) -> Examination {
        let mut of_cluster = cluster::judge(known, status, &self.clocks);
        let mut nodes = Vec::new();
        for id in std::iter::once(own).chain(known.asked.iter().copied()) {
            let note = known.notes.iter().find(|note| note.node == id);
            let mut findings: Vec<Finding> =
                of_cluster.extract_if(.., |(node, _)| *node == id).map(|(_, f)| f).collect();
            match self.findings.remove(&id) {
                Some(own) => findings.extend(own),
                None if self.left.contains(&id) => {
                    let cost = "what it has to say is not known";
                    let fix = "if it was not meant to leave, see its log; `brigade doctor` there looks at it alone";
                    findings.push(warn("answer", "left while the nodes were examined", cost, fix));
                }
                None => {
                    let within = EXAMINE_WITHIN.as_secs();
                    let fix = "see what that machine is busy with; `brigade doctor` there looks at it alone";
                    findings.push(fail("answer", format!("did not say within {within} s how it is"), fix));
                }
            }
            findings.sort_by_key(|finding| std::cmp::Reverse(finding.severity));
            let role = if id == own { "coordinator" } else { "worker" };
            let name = note.map_or_else(|| id.short().to_string(), |note| note.name.clone());
            nodes.push(NodeFindings { id, name, role: role.to_owned(), findings });
        }
        Examination { nodes }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU32, Ordering};

    use brigade_protocol::measure::Severity;

    use super::super::cluster::tests::{id, known, status};
    use super::*;

    fn subject(state_dir: &Path) -> Subject {
        Subject {
            state_dir: state_dir.to_owned(),
            model: None,
            threads: 1,
            memory: None,
            listens_on: Vec::new(),
            peers: Vec::new(),
            has_stage: false,
        }
    }

    fn answer(unix_ms: u64) -> Examined {
        Examined { findings: vec![warn("swap", "1 GiB in use", "time", "less")], unix_ms }
    }

    fn known_report() -> Report {
        Report::Known(Box::new(known([0.01, 0.01])))
    }

    fn of<'a>(examination: &'a Examination, name: &str) -> &'a NodeFindings {
        examination.nodes.iter().find(|node| node.name == name).unwrap()
    }

    #[test]
    fn all_nodes_are_examined_and_their_clocks_compared() {
        let dir = tempfile::tempdir().unwrap();
        let rounds = Rounds::new(id(9), subject(dir.path()), |asker| {
            asker.send(known_report()).unwrap();
            asker.send(Report::Answer(id(1), answer(unix_ms() + 60_000))).is_ok()
        });
        let found = rounds.examine(&status).unwrap();
        assert_eq!(found.nodes.iter().map(|node| node.role.as_str()).collect::<Vec<_>>(), ["coordinator", "worker"]);
        let checks = |name: &str| of(&found, name).findings.iter().map(|f| f.check.as_str()).collect::<Vec<_>>();
        assert!(checks("n9").contains(&"memory") && checks("n9").contains(&"model"), "{found:?}");
        assert!(checks("n1").contains(&"swap") && checks("n1").contains(&"link"), "{found:?}");
        let clock = of(&found, "n1").findings.iter().find(|f| f.check == "clock").unwrap();
        assert!(clock.severity == Severity::Warn && clock.detail.contains("s ahead"), "{clock:?}");
        assert!(of(&found, "n1").findings.is_sorted_by_key(|f| std::cmp::Reverse(f.severity)));
    }

    #[test]
    fn a_node_that_does_not_answer_fails() {
        let (tell, reports) = channel();
        tell.send(known_report()).unwrap();
        tell.send(Report::Answer(id(9), answer(unix_ms()))).unwrap();
        let mut heard = Heard::until(Instant::now(), id(9), &reports, &Vec::new);
        let known = heard.known.take().unwrap();
        let found = heard.examination(&known, id(9), &status());
        let worst = &of(&found, "n1").findings[0];
        assert_eq!((worst.check.as_str(), worst.severity), ("answer", Severity::Fail));
    }

    #[test]
    fn a_node_that_leaves_meanwhile_is_not_waited_for() {
        let n_looks = AtomicU32::new(0);
        // It is there when the round begins, and gone when it is looked again.
        let status = || {
            let mut status = status();
            status.nodes[0].connected = n_looks.fetch_add(1, Ordering::SeqCst) == 0;
            status
        };
        let dir = tempfile::tempdir().unwrap();
        let askers = Mutex::new(Vec::new());
        let rounds = Rounds::new(id(9), subject(dir.path()), move |asker| {
            let is_told = asker.send(known_report()).is_ok();
            // As the owner loop does, this keeps it for answers that may come.
            lock(&askers).push(asker);
            is_told
        });
        let begin = Instant::now();
        let found = rounds.examine(&status).unwrap();
        assert!(begin.elapsed() < EXAMINE_WITHIN);
        let said = of(&found, "n1").findings.iter().find(|f| f.check == "answer").unwrap();
        assert_eq!((said.severity, &*said.detail), (Severity::Warn, "left while the nodes were examined"));
        assert!(of(&found, "n9").findings.iter().any(|f| f.check == "memory"), "this node did answer: {found:?}");
    }

    #[test]
    fn who_waited_for_a_round_shares_the_next() {
        let dir = tempfile::tempdir().unwrap();
        let n_rounds = Arc::new(AtomicU32::new(0));
        let counted = Arc::clone(&n_rounds);
        let rounds = Rounds::new(id(9), subject(dir.path()), move |asker| {
            counted.fetch_add(1, Ordering::SeqCst);
            asker.send(known_report()).unwrap();
            asker.send(Report::Answer(id(1), answer(unix_ms()))).is_ok()
        });
        let asked = Instant::now();
        let ask = |asked| rounds.examine_since(asked, &status).unwrap();
        assert_eq!(ask(asked), ask(asked));
        assert_eq!(n_rounds.load(Ordering::SeqCst), 1, "who asked before it began gets the same");
        ask(Instant::now());
        assert_eq!(n_rounds.load(Ordering::SeqCst), 2, "who asks later gets what is true then");
    }

    #[test]
    fn a_coordinator_that_has_ended_says_so() {
        let rounds = Rounds::new(id(9), subject(Path::new("/")), |_| false);
        assert!(rounds.examine(&status).unwrap_err().contains("has ended"));
    }
}
