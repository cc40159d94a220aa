//! Questions and answers over a link to one source, on its thread.
//!
//! Several questions are on their way at once, so that a link is filled; answers come in their order. The source is
//! asked what it has first, and again when there is nothing for it to do.

use std::collections::{HashSet, VecDeque};
use std::io;
use std::time::{Duration, Instant};

use brigade_base::Hash;
use brigade_net::{Link, LinkError};
use brigade_protocol::kind;
use brigade_protocol::weights::{BLOCK_BYTES, Fetch, MAX_ASKED, MAX_BLOCKS, decode_bits, decode_hashes, encode_hashes};

use super::Origin;
use super::gathering::Gathering;
use super::pool::{SourceId, Work};
use super::tree::{Tree, block_range};

/// How long a source may take for an answer, all of a block included: at 35 kB in a second it is in time.
const ANSWER_WITHIN: Duration = Duration::from_secs(30);

/// Bytes that one source is asked for at once: what a gigabit link with a round trip of 30 ms carries in that.
const WINDOW_BYTES: u64 = 4 << 20;

/// Questions that one source is asked at once: small tensors do not wait for a round trip each.
const WINDOW: usize = 32;

/// A source that had nothing of use is asked again so often: it may be loading the same.
const ASK_AGAIN: Duration = Duration::from_secs(1);

/// A worker that had nothing of use so often is left alone for a while: there may be others.
const MAX_IN_VAIN: u32 = 3;

/// Why a talk with a source ended.
pub(super) enum End {
    /// Nothing is missing any more, or nobody wants it.
    Over,
    /// The link, or the source cannot go on; why.
    Broke(String),
    /// What came for this tensor is wrong.
    Wrong(usize),
    /// Writing on this node failed.
    Disk(io::Error),
}

impl From<LinkError> for End {
    fn from(error: LinkError) -> Self {
        Self::Broke(error.to_string())
    }
}

/// Questions and answers over one link.
pub(super) struct Talk<'a> {
    gathering: &'a Gathering<'a>,
    source: SourceId,
    origin: Origin,
    link: &'a dyn Link,
    /// What was asked, in this order.
    asked: VecDeque<Work>,
    n_asked: u64,
    /// Tensors that it lacks, whatever it says.
    refused: HashSet<usize>,
}

impl<'a> Talk<'a> {
    /// Over a link to a source.
    pub(super) fn new(gathering: &'a Gathering<'a>, source: SourceId, origin: Origin, link: &'a dyn Link) -> Self {
        let (asked, refused) = (VecDeque::new(), HashSet::new());
        Self { gathering, source, origin, link, asked, n_asked: 0, refused }
    }

    /// Goes on until nothing is missing, nobody wants it, or the source is of no use.
    pub(super) fn run(mut self) -> End {
        self.ask_all().err().unwrap_or(End::Over)
    }

    /// Goes on until nothing is missing.
    fn ask_all(&mut self) -> Result<(), End> {
        let (mut buf, mut block) = (Vec::new(), Vec::new());
        let (mut asked_at, mut n_in_vain) = (None::<Instant>, 0);
        loop {
            let is_due = asked_at.is_none_or(|at| at.elapsed() >= ASK_AGAIN);
            if self.asked.is_empty() && is_due {
                let is_of_use = self.ask_what_is_there(&mut buf)?;
                asked_at = Some(Instant::now());
                n_in_vain = if is_of_use { 0 } else { n_in_vain + 1 };
                if n_in_vain >= MAX_IN_VAIN && self.origin == Origin::Worker {
                    return Ok(());
                }
            }
            while self.asked.len() < WINDOW && self.n_asked < WINDOW_BYTES && self.ask_next()? {}
            let Some(work) = self.asked.front().copied() else {
                let state = self.gathering.lock();
                if state.is_over || state.pool.is_done() {
                    return Ok(());
                }
                self.gathering.rest(state);
                continue;
            };
            match work {
                Work::Tree(tensor) => self.receive_tree(tensor, &mut buf)?,
                Work::Block(tensor, at) => self.receive_block(tensor, at, &mut buf, &mut block)?,
            }
            self.asked.pop_front();
            self.n_asked -= self.n_bytes(work);
        }
    }

    /// Asks which of the missing tensors the source has. False if it has none.
    fn ask_what_is_there(&self, buf: &mut Vec<u8>) -> Result<bool, End> {
        let missing = self.gathering.lock().pool.missing();
        let mut is_of_use = false;
        for some in missing.chunks(MAX_ASKED) {
            let hashes: Vec<Hash> = some.iter().map(|tensor| self.gathering.wanted[*tensor].hash).collect();
            self.link.send(kind::HAVE, &[&encode_hashes(&hashes)])?;
            let answered = self.receive(buf, within())?;
            let has = match answered {
                kind::HAVE_ANSWER => decode_bits(buf, some.len()).ok(),
                _ => None,
            };
            let mut has = has.ok_or_else(|| End::Broke("it answered something else than was asked".to_owned()))?;
            has.iter_mut().zip(some).for_each(|(has, tensor)| *has &= !self.refused.contains(tensor));
            is_of_use |= has.contains(&true);
            self.gathering.lock().pool.tell(self.source, some, &has);
        }
        Ok(is_of_use)
    }

    fn n_bytes(&self, work: Work) -> u64 {
        match work {
            // Making a tree may take its source as long as sending a few blocks.
            Work::Tree(_) => BLOCK_BYTES,
            Work::Block(tensor, block) => block_range(self.gathering.wanted[tensor].n_bytes, block).1 as u64,
        }
    }

    /// Asks for what comes next. False if that is nothing.
    fn ask_next(&mut self) -> Result<bool, End> {
        let Some(work) = self.gathering.lock().pool.take(self.source, Instant::now()) else { return Ok(false) };
        let n_bytes = self.n_bytes(work);
        self.asked.push_back(work);
        self.n_asked += n_bytes;
        match work {
            Work::Tree(tensor) => {
                self.link.send(kind::TREE, &[self.gathering.wanted[tensor].hash.as_bytes()])?;
            }
            Work::Block(tensor, block) => {
                let wanted = &self.gathering.wanted[tensor];
                let (offset, n_bytes) = block_range(wanted.n_bytes, block);
                let fetch = Fetch { hash: wanted.hash, offset, n_bytes: n_bytes as u32 };
                self.link.send(kind::FETCH, &[&fetch.encode()])?;
            }
        }
        Ok(true)
    }

    fn receive(&self, buf: &mut Vec<u8>, until: Instant) -> Result<u8, End> {
        Ok(self.link.recv(buf, Some(until))?)
    }

    fn receive_tree(&mut self, tensor: usize, buf: &mut Vec<u8>) -> Result<(), End> {
        let wanted = &self.gathering.wanted[tensor];
        match self.receive(buf, within())? {
            kind::TREE_ANSWER => {
                let values = decode_hashes(buf, MAX_BLOCKS).unwrap_or_default();
                let tree = Tree::of(&wanted.hash, wanted.n_bytes, values).ok_or(End::Wrong(tensor))?;
                let tree = self.gathering.trees.put(wanted.hash, tree);
                self.gathering.tree_is_known(tensor, tree).map_err(End::Disk)
            }
            kind::FETCH_FAILED => {
                self.lacks(tensor, buf);
                Ok(())
            }
            _ => Err(End::Wrong(tensor)),
        }
    }

    fn receive_block(&mut self, tensor: usize, at: usize, buf: &mut Vec<u8>, block: &mut Vec<u8>) -> Result<(), End> {
        let n_bytes = block_range(self.gathering.wanted[tensor].n_bytes, at).1;
        block.clear();
        let until = within();
        while block.len() < n_bytes {
            match self.receive(buf, until)? {
                kind::CHUNK if !buf.is_empty() && block.len() + buf.len() <= n_bytes => block.extend_from_slice(buf),
                kind::FETCH_FAILED => {
                    self.lacks(tensor, buf);
                    return Ok(());
                }
                _ => return Err(End::Wrong(tensor)),
            }
        }
        match self.gathering.take_in(self.origin, tensor, at, block).map_err(End::Disk)? {
            true => Ok(()),
            false => Err(End::Wrong(tensor)),
        }
    }

    /// The source does not have a tensor after all.
    fn lacks(&mut self, tensor: usize, why: &[u8]) {
        self.refused.insert(tensor);
        let mut state = self.gathering.lock();
        state.pool.lacks(self.source, tensor);
        state.why = text(why);
    }
}

/// Until when an answer that begins now is in time.
fn within() -> Instant {
    Instant::now() + ANSWER_WITHIN
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(&bytes[..bytes.len().min(200)]).into_owned()
}
