//! The pieces that a model can be cut into, with sums over any run of them at hand.

use brigade_base::LayerRange;

use crate::memory::{layer_bytes, stage_memory};
use crate::{Demand, ModelProfile};

/// The pieces between places where the model may be cut.
#[derive(Debug, Clone)]
pub(crate) struct Units {
    /// Layers before which pieces begin, and the number of layers.
    bounds: Vec<u32>,
    /// Work of all pieces before each bound.
    work: Vec<f64>,
    /// Bytes of weights and KV cache of all pieces before each bound.
    bytes: Vec<u64>,
    /// Bytes that a worker needs beside its pieces.
    worker_bytes: u64,
    /// The same for the coordinator.
    tail_bytes: u64,
    /// Bytes of the smallest run of so many pieces.
    least_bytes: Vec<u64>,
    /// Bytes of the largest.
    most_bytes: Vec<u64>,
    /// Whether all pieces are alike.
    pub are_alike: bool,
}

impl Units {
    /// Of a model; `None` if it has no layers, or its places to cut are not ascending.
    pub fn new(model: &ModelProfile, demand: &Demand) -> Option<Self> {
        let mut bounds = vec![0];
        bounds.extend(&model.cut_points);
        bounds.push(model.n_layers());
        let (mut work, mut bytes) = (vec![0.0], vec![0u64]);
        let (mut worker_bytes, mut tail_bytes) = (0, 0);
        let mut kinds = Vec::new();
        for pair in bounds.windows(2) {
            let layers = LayerRange::new(pair[0], pair[1]).ok()?;
            let memory = stage_memory(model, demand, layers, false);
            let own = layer_bytes(model, layers).saturating_add(memory.kv.0);
            // The last one is never a worker's, unless there is no other.
            if layers.end() < model.n_layers() || bounds.len() == 2 {
                worker_bytes = memory.total().0.saturating_sub(own).max(worker_bytes);
            }
            tail_bytes = stage_memory(model, demand, layers, true).total().0.saturating_sub(own);
            kinds.push((own, memory.kv));
            work.push(work.last()? + model.work(layers));
            bytes.push(bytes.last()?.saturating_add(own));
        }
        let n = bounds.len() - 1;
        // Several pieces may take more for buffers than any by itself.
        if let (Ok(all), Ok(front)) = (LayerRange::new(0, bounds[n]), LayerRange::new(0, bounds[n - 1])) {
            let most = stage_memory(model, demand, front, false).total().0.saturating_sub(bytes[n - 1]);
            worker_bytes = worker_bytes.max(most);
            let whole = stage_memory(model, demand, all, true);
            tail_bytes = tail_bytes.max(whole.total().0.saturating_sub(bytes[n]));
        }
        let runs = |count: usize| (0..=n - count).map(move |at| (at, at + count));
        let bytes_of = |(start, end): (usize, usize)| bytes[end] - bytes[start];
        let least_bytes = (0..=n).map(|count| runs(count).map(bytes_of).min().unwrap_or(0)).collect();
        let most_bytes = (0..=n).map(|count| runs(count).map(bytes_of).max().unwrap_or(0)).collect();
        let are_alike = kinds.windows(2).all(|pair| pair[0] == pair[1]);
        Some(Self { bounds, work, bytes, worker_bytes, tail_bytes, least_bytes, most_bytes, are_alike })
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.bounds.len() - 1
    }

    /// Work of the pieces from `start` to before `end`.
    pub fn work(&self, start: usize, end: usize) -> f64 {
        self.work[end] - self.work[start]
    }

    /// Work of a piece, on average.
    pub fn mean_work(&self) -> f64 {
        self.work(0, self.len()) / self.len() as f64
    }

    /// Bytes that these pieces need on a node.
    pub fn needs(&self, start: usize, end: usize, is_tail: bool) -> u64 {
        let fixed = if is_tail { self.tail_bytes } else { self.worker_bytes };
        (self.bytes[end] - self.bytes[start]).saturating_add(fixed)
    }

    /// Most pieces that so many bytes can hold: the smallest run of them on a worker, or any run if it is to be `safe`;
    /// the last ones on the coordinator.
    pub fn most(&self, usable: u64, is_tail: bool, safe: bool) -> usize {
        let n = self.len();
        let run = if safe { &self.most_bytes } else { &self.least_bytes };
        let fits = |count: usize| match is_tail {
            true => self.needs(n - count, n, true) <= usable,
            false => run[count].saturating_add(self.worker_bytes) <= usable,
        };
        let (mut most, mut too_many) = (0, n + 1);
        while most + 1 < too_many {
            let half = most.midpoint(too_many);
            if fits(half) { most = half } else { too_many = half }
        }
        most
    }

    /// The layers of these pieces.
    pub fn layers(&self, start: usize, end: usize) -> Option<LayerRange> {
        LayerRange::new(self.bounds[start], self.bounds[end]).ok()
    }
}
