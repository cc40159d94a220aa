//! The thread that keeps a gateway's link to the coordinator up, whoever that is at the moment.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use brigade_base::{Hash, NodeId};
use brigade_engine::Vocabulary;
use brigade_gguf::{ModelFile, vocabulary_header};
use brigade_net::{Link, write_atomic};
use brigade_protocol::requests::{Card, MAX_REQUESTS_BYTES, MAX_VOCABULARY_BYTES};

use super::remote::Remote;
use super::standing::{Lead, Shared};
use super::wire;
use crate::model::load_vocabulary;
use crate::reach::while_wanted;

/// First and longest pause before the coordinator is dialled again. Whoever waits for an answer notices the first ones,
/// and a coordinator that stays away is news that somebody else brings.
const REDIAL: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(2));

/// Where vocabularies are kept, in the state directory.
const VOCABULARIES: &str = "vocabularies";

/// Dials a node for its requests link.
pub(super) type Dial = Arc<dyn Fn(NodeId, &[String]) -> Result<Arc<dyn Link>, String> + Send + Sync>;

/// What the thread owns.
pub(super) struct Dialer {
    pub(super) shared: Arc<Shared>,
    pub(super) dial: Dial,
    pub(super) state_dir: PathBuf,
    /// This node's own copy of a model.
    pub(super) own_copy: Option<Arc<ModelFile>>,
}

impl Dialer {
    /// Runs until the gateway stops.
    pub(super) fn run(self) {
        let (mut pause, mut before) = (REDIAL.0, 0);
        while let Some(target) = self.shared.wait_for_target() {
            let begin = Instant::now();
            let (dial, node, addresses) = (Arc::clone(&self.dial), target.node, target.addresses.clone());
            let is_wanted = || self.shared.is_turn(target.turn);
            let discard = |result: Result<Arc<dyn Link>, String>| drop(result.map(|link| link.close()));
            let Some(dialled) = while_wanted(move || dial(node, &addresses), is_wanted, discard) else { continue };
            match dialled {
                Ok(link) => self.converse(target.turn, link),
                Err(why) => self.lose(target.turn, &why),
            }
            if target.turn != before || begin.elapsed() > REDIAL.1 {
                (pause, before) = (REDIAL.0, target.turn);
            }
            self.shared.rest(&target, pause);
            pause = (pause * 2).min(REDIAL.1);
        }
    }

    fn lose(&self, turn: u64, why: &str) {
        tracing::debug!(why, "no link to the coordinator for requests");
        self.shared.publish(turn, Lead::nobody(why));
    }

    /// Lets the coordinator answer until the link ends or somebody else is to.
    fn converse(&self, turn: u64, link: Arc<dyn Link>) {
        link.set_frame_limit(MAX_REQUESTS_BYTES);
        if !self.shared.hold(turn, &link) {
            return link.close();
        }
        let remote = match Remote::start(link) {
            Ok(remote) => remote,
            Err(error) => return self.lose(turn, &format!("the system gives no thread: {error}")),
        };
        let why = match remote.receive_card().and_then(|card| self.prepare(&remote, card)) {
            Ok(()) => {
                self.shared.publish(turn, Lead::There(Arc::clone(&remote)));
                remote.run()
            }
            Err(why) => why,
        };
        // First, so that no session asks this one again.
        self.lose(turn, &why);
        remote.end();
    }

    /// Learns what is served, so that prompts can be made of text here.
    fn prepare(&self, remote: &Remote, card: Card) -> Result<(), String> {
        let hash = card.vocabulary;
        let card = wire::model_card(card);
        // First, since the vocabulary of another model would take the place of this one's.
        self.shared.check(&card, &hash)?;
        let vocabulary = match self.shared.vocabulary() {
            Some(_) => None,
            None => Some(self.vocabulary(remote, hash)?),
        };
        remote.wait_for_word()?;
        self.shared.learn(card, hash, vocabulary)
    }

    /// The vocabulary of this hash: of the own copy, kept from before, or the coordinator's.
    fn vocabulary(&self, remote: &Remote, hash: Hash) -> Result<Vocabulary, String> {
        let own = self.own_copy.as_ref().map(|file| vocabulary_header(file.catalog()));
        let path = self.state_dir.join(VOCABULARIES).join(format!("{hash}.gguf"));
        let bytes = match own.filter(|bytes| is(bytes, &hash)).or_else(|| kept(&path, &hash)) {
            Some(bytes) => bytes,
            None => {
                let bytes = remote.fetch_vocabulary()?;
                if !is(&bytes, &hash) {
                    return Err("the coordinator sent another vocabulary than it announced".to_owned());
                }
                // Without it the next start fetches it again.
                if let Err(error) = keep(&path, &bytes) {
                    tracing::warn!(%error, path = %path.display(), "the vocabulary was not kept");
                }
                bytes
            }
        };
        load_vocabulary(bytes).map_err(|error| error.to_string())
    }
}

fn is(bytes: &[u8], hash: &Hash) -> bool {
    blake3::hash(bytes).as_bytes() == hash.as_bytes()
}

fn kept(path: &Path, hash: &Hash) -> Option<Vec<u8>> {
    let n_bytes = std::fs::metadata(path).ok()?.len();
    let bytes = (n_bytes <= MAX_VOCABULARY_BYTES).then(|| std::fs::read(path).ok()).flatten()?;
    Some(bytes).filter(|bytes| is(bytes, hash))
}

/// Keeps one vocabulary: a node serves one model.
fn keep(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    if let Some(dir) = path.parent() {
        std::fs::create_dir_all(dir)?;
        for entry in std::fs::read_dir(dir)? {
            std::fs::remove_file(entry?.path())?;
        }
    }
    write_atomic(path, bytes, 0o600)
}
