//! Asks all nodes of a cluster how they are.
//!
//! The coordinator's owner loop passes the question on to the workers ([`Report::Known`], then a [`Report::Answer`] for
//! each); whoever asks waits for the answers, since the loop waits for nobody. This node examines itself meanwhile.

use std::collections::HashMap;
use std::sync::Mutex;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use brigade_base::NodeId;
use brigade_protocol::measure::{Examined, Finding};

use super::cluster::{self, Clock, Known};
use super::{Subject, examined, fail, unix_ms};
use crate::serving::{ClusterStatus, Examination, NodeFindings};
use crate::threads::{lock, spawn};

/// How long nodes may take to examine themselves. It takes them a second; a slow disk or a busy node some more.
pub(crate) const EXAMINE_WITHIN: Duration = Duration::from_secs(10);

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
        let asked = Instant::now();
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
        let others = status().nodes.into_iter().filter(|node| node.id != own);
        subject.peers = others.map(|node| node.address).collect();
        let examine = move || drop(tell.send(Report::Answer(own, examined(&subject))));
        spawn("doctor", examine).map_err(|error| format!("the system gives no thread: {error}"))?;
        let mut heard = Heard::until(deadline, own, &reports);
        let known = heard.known.take().ok_or("the coordinator is just starting; ask again in a moment")?;
        Ok(heard.examination(&known, own, &status()))
    }
}

/// What was heard in a round.
#[derive(Default)]
struct Heard {
    known: Option<Box<Known>>,
    findings: HashMap<NodeId, Vec<Finding>>,
    clocks: Vec<Clock>,
}

impl Heard {
    /// Listens until all have answered or the deadline.
    fn until(deadline: Instant, own: NodeId, reports: &Receiver<Report>) -> Self {
        let mut heard = Self::default();
        while !heard.is_complete(own) {
            match reports.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(Report::Known(known)) => heard.known = Some(known),
                Ok(Report::Answer(node, answer)) => {
                    if node != own {
                        heard.clocks.retain(|(other, _)| *other != node);
                        heard.clocks.push((node, answer.unix_ms as f64 - unix_ms() as f64));
                    }
                    heard.findings.insert(node, answer.findings);
                }
                Err(_) => break,
            }
        }
        heard
    }

    fn is_complete(&self, own: NodeId) -> bool {
        let has = |node: &NodeId| self.findings.contains_key(node);
        self.known.as_ref().is_some_and(|known| has(&own) && known.asked.iter().all(has))
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
    use brigade_protocol::measure::Severity;

    use super::super::cluster::tests::{id, known, status};
    use super::super::warn;
    use super::*;

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
        let subject = Subject {
            state_dir: dir.path().to_owned(),
            model: None,
            threads: 1,
            memory: None,
            listens_on: Vec::new(),
            peers: Vec::new(),
            has_stage: false,
        };
        let rounds = Rounds::new(id(9), subject, |asker| {
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
        let mut heard = Heard::until(Instant::now(), id(9), &reports);
        let known = heard.known.take().unwrap();
        let found = heard.examination(&known, id(9), &status());
        let worst = &of(&found, "n1").findings[0];
        assert_eq!((worst.check.as_str(), worst.severity), ("answer", Severity::Fail));
    }

    #[test]
    fn a_coordinator_that_has_ended_says_so() {
        let subject = Subject {
            state_dir: "/".into(),
            model: None,
            threads: 1,
            memory: None,
            listens_on: Vec::new(),
            peers: Vec::new(),
            has_stage: false,
        };
        assert!(Rounds::new(id(9), subject, |_| false).examine(&status).unwrap_err().contains("has ended"));
    }
}
