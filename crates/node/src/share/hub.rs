//! The server that a model came from, as a source of weights.
//!
//! The coordinator says whether a node may ask it, and for which tensors: each is one node's alone, so that no byte
//! crosses a home's uplink twice for two workers. Unless it says to ask at once, other nodes come first: the server is
//! asked where nobody else has a tensor, or where it turns out to be faster than all other nodes together while there
//! is much to fetch still. Its bytes are verified as those of nodes are. It gives no trees; those come from a node.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use brigade_base::Hash;
use brigade_protocol::weights::{Hub, HubTensor};
use brigade_store::{Client, RemoteFiles, RemoteLocation, RemotePart, Settings};

use super::Origin;
use super::gathering::Gathering;
use super::pool::{SourceId, Work};
use super::tree::block_range;
use crate::reach::while_wanted;

/// The client wants an endpoint for names of models; here there are addresses alone.
const DEFAULT_ENDPOINT: &str = "https://huggingface.co";

/// How long other nodes are watched before the hub is tried.
const WATCH: Duration = Duration::from_secs(3);

/// Nodes that will bring the rest within this are left to it: the hub is not worth the bytes.
const SOON: Duration = Duration::from_secs(10);

/// Bytes that show how fast the hub is.
const SAMPLE_BYTES: u64 = 4 << 20;

/// Blocks of one request: enough that its round trip is small beside it on a line of a home.
const RUN: usize = 8;

/// How often it is looked whether the hub is worth asking.
const LOOK_EVERY: Duration = Duration::from_millis(250);

/// Whether workers may fetch weights from where the model was downloaded from. Off where a node is to ask no server:
/// nobody below looks whether it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DirectFetch {
    /// Where that is faster than other nodes are, or nobody else has them.
    #[default]
    Auto,
    /// Never.
    Off,
    /// At once.
    On,
}

/// Reads from files on a hub.
pub trait HubReader: Send + Sync {
    /// Fills `buf` with the bytes of a file from `offset` on. Blocks.
    ///
    /// # Errors
    /// Why not, for people.
    fn read(&self, file: usize, offset: u64, buf: &mut [u8]) -> Result<(), String>;
}

/// What reads from a hub; `None`, and a line in the log, if its addresses are none that a node asks.
pub fn read_from_hub(hub: &Hub) -> Option<Arc<dyn HubReader>> {
    let parts = hub.files.iter().map(|file| RemotePart {
        url: file.url.clone(),
        n_bytes: file.n_bytes,
        sha256: None,
        etag: file.etag.clone(),
    });
    let location = RemoteLocation { parts: parts.collect(), is_public: true };
    // Without a token, whatever this machine's owner has: addresses come from another node.
    let settings = Settings::at(DEFAULT_ENDPOINT).map_err(|error| error.to_string());
    let files = settings
        .and_then(|settings| RemoteFiles::new(Client::new(settings), location).map_err(|error| error.to_string()));
    match files {
        Ok(files) => Some(Arc::new(Remote(files))),
        Err(why) => {
            tracing::warn!(why, "the hub that the coordinator names is not asked");
            None
        }
    }
}

struct Remote(RemoteFiles);

impl HubReader for Remote {
    fn read(&self, file: usize, offset: u64, buf: &mut [u8]) -> Result<(), String> {
        self.0.read_range(file, offset, buf).map_err(|error| error.to_string())
    }
}

/// Fetches from the hub while that is worth it.
pub(super) fn ask_hub(gathering: &Gathering<'_>, hub: &Hub, reader: &Arc<dyn HubReader>) {
    let by_hash: HashMap<Hash, HubTensor> = hub.tensors.iter().map(|tensor| (tensor.hash, *tensor)).collect();
    let places: Vec<Option<HubTensor>> =
        gathering.wanted.iter().map(|wanted| by_hash.get(&wanted.hash).copied()).collect();
    let source = {
        let mut state = gathering.lock();
        let source = state.pool.join(false);
        let all: Vec<usize> = (0..places.len()).collect();
        let has: Vec<bool> = places.iter().map(Option::is_some).collect();
        state.pool.tell(source, &all, &has);
        source
    };
    let mut asker = Asker { gathering, reader, places, source, n_bytes: 0, time: Duration::ZERO };
    while !gathering.is_over() {
        if !hub.at_once && !asker.is_worth_it() {
            gathering.pause(LOOK_EVERY);
            continue;
        }
        match asker.fetch() {
            Ok(true) => {}
            Ok(false) => gathering.pause(LOOK_EVERY),
            Err(why) => {
                tracing::warn!(why, "weights do not come from the hub; other nodes have to bring them");
                return gathering.lose(source, true, why);
            }
        }
    }
}

struct Asker<'a> {
    gathering: &'a Gathering<'a>,
    reader: &'a Arc<dyn HubReader>,
    places: Vec<Option<HubTensor>>,
    source: SourceId,
    /// What has come, and how long that took.
    n_bytes: u64,
    time: Duration,
}

impl Asker<'_> {
    /// Whether nobody else has what is missing, or the others take longer.
    fn is_worth_it(&self) -> bool {
        let watched = self.gathering.elapsed();
        let state = self.gathering.lock();
        let may_have_more = state.pool.is_anybody_hoped() && watched < WATCH;
        if state.pool.is_alone(self.source) && !may_have_more {
            return true;
        }
        let rate = state.from_nodes as f64 / watched.as_secs_f64().max(1e-3);
        let left_s = state.pool.n_missing_bytes() as f64 / rate.max(1.0);
        let own_rate = self.n_bytes as f64 / self.time.as_secs_f64().max(1e-3);
        let is_faster = self.n_bytes < SAMPLE_BYTES || own_rate > rate;
        watched >= WATCH && left_s >= SOON.as_secs_f64() && is_faster
    }

    /// Fetches a few blocks that lie one behind the other. False if there is nothing to fetch.
    fn fetch(&mut self) -> Result<bool, String> {
        let (tensor, first, n_blocks) = {
            let mut state = self.gathering.lock();
            let Some(Work::Block(tensor, first)) = state.pool.take(self.source, Instant::now()) else {
                return Ok(false);
            };
            let more = (1..RUN).take_while(|n| state.pool.take_block(self.source, tensor, first + n, Instant::now()));
            (tensor, first, 1 + more.count())
        };
        let Some(place) = self.places[tensor] else { return Ok(false) };
        let wanted = &self.gathering.wanted[tensor];
        let range = |block| block_range(wanted.n_bytes, block);
        let (offset, _) = range(first);
        let n_bytes: usize = (first..first + n_blocks).map(|block| range(block).1).sum();
        let (reader, at) = (Arc::clone(self.reader), place.offset.saturating_add(offset));
        let read = move || {
            let mut bytes = vec![0; n_bytes];
            reader.read(usize::from(place.file), at, &mut bytes).map(|()| bytes)
        };
        let begin = Instant::now();
        let Some(read) = while_wanted(read, || !self.gathering.is_over(), drop) else { return Ok(false) };
        let bytes = read?;
        self.time += begin.elapsed();
        self.n_bytes += n_bytes as u64;
        let mut rest = bytes.as_slice();
        for block in first..first + n_blocks {
            let (bytes, behind) = rest.split_at(range(block).1);
            rest = behind;
            let is_right = self.gathering.take_in(Origin::Hub, tensor, block, bytes);
            if !is_right.map_err(|error| format!("writing on this node failed: {error}"))? {
                return Err(format!("the hub sent wrong bytes for {}", wanted.name));
            }
        }
        Ok(true)
    }
}
