//! LoRA adapters: checked against their model, bundled for the way to other nodes, and cut like the model.
//!
//! ```text
//! files      tensors NAME.lora_a [n_in, rank] and NAME.lora_b [rank, n_out] for matrices NAME of the model
//! bundle     all adapters of a deployment: a catalog whose tensors are called N.NAME.lora_a, N counting adapters
//! view       what a stage needs of it: a GGUF file that libllama reads as one adapter, layers renumbered from 0
//! ```
//!
//! libllama adds `scale * alpha / rank * B(A(x))` to what NAME makes of x. It applies several adapters in an order that
//! depends on addresses in memory, and with it the last bits of a sum. So of several adapters a view makes one: all `A`
//! below each other, all `B` beside each other and multiplied by their scales, in F32. A single adapter is left as it
//! is.
//!
//! libllama checks little of this and ends the process over the rest, so everything is checked here, in bundles as
//! well, since those come from other nodes.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;

use crate::builder::{BuildError, Builder, Placed};
use crate::catalog::{Catalog, TensorRole, TensorSource, layer_and_rest};
use crate::ggml_type::GgmlType;
use crate::header::{HeaderError, TensorInfo};
use crate::reader::StageReader;
use crate::stage::{Origin, Segment, StageView, VirtualFile};
use crate::value::{Metadata, Value};

/// Most adapters of a deployment: each costs every row two more products for each matrix.
pub const MAX_ADAPTERS: usize = 16;

/// Most bytes of all adapters of a deployment: one of rank 64 for a model of 70 billion weights has less than two GiB.
pub const MAX_ADAPTER_BYTES: u64 = 4 << 30;

/// Largest scale, either sign: ten times what makes sense with any adapter.
pub const MAX_SCALE: f32 = 1000.0;

/// Types that products of adapters can be computed in.
const TYPES: [GgmlType; 4] = [GgmlType::F32, GgmlType::F16, GgmlType::BF16, GgmlType::Q8_0];

/// Types that are turned into F32 here, where several adapters become one.
const FLOATS: [GgmlType; 3] = [GgmlType::F32, GgmlType::F16, GgmlType::BF16];

/// Why an adapter cannot be used with a model.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[expect(missing_docs, reason = "the messages explain the fields")]
pub enum AdapterError {
    #[error("it is no adapter: general.type is {found}, expected \"adapter\"")]
    NotAnAdapter { found: String },
    #[error("it is an adapter of type {found}; only \"lora\" is known")]
    Kind { found: String },
    #[error("it acts from certain tokens on (activated LoRA), which is not supported")]
    Activated,
    #[error("it was made for {found} models, and this is a {expected} model")]
    Architecture { found: String, expected: String },
    #[error("its alpha is {alpha}, which is no finite number")]
    Alpha { alpha: f32 },
    #[error(
        "the scale {scale} is not between -{MAX_SCALE} and {MAX_SCALE}, or is 0; leave an adapter that is to do nothing out"
    )]
    Scale { scale: f32 },
    #[error("its tensor {name:?} is neither a lora_a nor a lora_b")]
    Unknown { name: String },
    #[error("of its pair for {name:?} one half is missing")]
    Half { name: String },
    #[error("it adapts {name:?}, which this model does not have; it was made for another one")]
    NoBase { name: String },
    #[error("it adapts {name:?}: {why}")]
    Unsupported { name: String, why: &'static str },
    #[error(
        "its pair for {name:?} has the shapes {a:?} and {b:?}, which do not fit {base:?}; it was made for another model"
    )]
    Shape { name: String, a: Vec<u64>, b: Vec<u64>, base: Vec<u64> },
    #[error(
        "its tensor {name:?} is stored as {ty}; F32, F16, BF16 or Q8_0 would do, but not Q8_0 for several adapters at once"
    )]
    Type { name: String, ty: GgmlType },
    #[error("it adapts nothing")]
    Empty,
    #[error("{found} adapters were given; at most {MAX_ADAPTERS} are used at once")]
    TooMany { found: usize },
    #[error("the adapters have {n_bytes} bytes, more than the {MAX_ADAPTER_BYTES} that are allowed")]
    TooLarge { n_bytes: u64 },
    #[error("the bundle of adapters is not complete")]
    Bundle,
    #[error(transparent)]
    Build(#[from] BuildError),
    #[error(transparent)]
    Header(#[from] HeaderError),
}

/// A matrix of the model that an adapter adapts, and by which of its tensors.
#[derive(Debug, Clone, PartialEq)]
struct Pair {
    /// Name of the matrix.
    base: String,
    a: usize,
    b: usize,
    /// `[n_in, n_out, n_matrices]`.
    shape: [u64; 3],
    rank: u64,
}

/// An adapter's numbers and pairs.
#[derive(Debug, Clone, PartialEq)]
struct Adapter {
    alpha: f32,
    scale: f32,
    pairs: Vec<Pair>,
}

/// Checks that the file of this header is an adapter for the model.
///
/// # Errors
/// If it is not.
pub fn check_adapter(model: &Catalog, adapter: &Catalog) -> Result<(), AdapterError> {
    read_file(model, adapter, 1.0).map(drop)
}

/// Makes one catalog of the headers of adapters and their scales. Its tensors are those of the first adapter, then
/// those of the second, and so on, in their order.
///
/// # Errors
/// If one of them is no adapter for the model, or they are too many.
pub fn bundle_adapters(model: &Catalog, adapters: &[(&Catalog, f32)]) -> Result<Catalog, AdapterError> {
    if adapters.len() > MAX_ADAPTERS {
        return Err(AdapterError::TooMany { found: adapters.len() });
    }
    check_bytes(adapters.iter().map(|(adapter, _)| *adapter))?;
    let mut metadata = Metadata::new();
    metadata.set("general.type", "adapters");
    metadata.set("adapters.count", adapters.len() as u32);
    for (number, (catalog, scale)) in adapters.iter().enumerate() {
        let adapter = read_file(model, catalog, *scale)?;
        check_types(catalog, &adapter, adapters.len() > 1)?;
        metadata.set(format!("adapters.{number}.alpha"), adapter.alpha);
        metadata.set(format!("adapters.{number}.scale"), adapter.scale);
    }
    let mut builder = Builder::new(&metadata);
    for (number, (catalog, _)) in adapters.iter().enumerate() {
        for tensor in catalog.tensors() {
            builder.tensor(format!("{number}.{}", tensor.name), &tensor.dims, tensor.ty)?;
        }
    }
    Ok(Catalog::parse_header(&builder.header_bytes())?)
}

fn read_file(model: &Catalog, file: &Catalog, scale: f32) -> Result<Adapter, AdapterError> {
    let metadata = file.metadata();
    let text = |key: &str| metadata.str(key).map_or_else(|| "missing".to_owned(), quoted);
    if metadata.str("general.type") != Some("adapter") {
        return Err(AdapterError::NotAnAdapter { found: text("general.type") });
    }
    if metadata.str("adapter.type") != Some("lora") {
        return Err(AdapterError::Kind { found: text("adapter.type") });
    }
    if metadata.get("adapter.alora.invocation_tokens").is_some() {
        return Err(AdapterError::Activated);
    }
    let expected = model.metadata().str("general.architecture").unwrap_or_default();
    if metadata.str("general.architecture") != Some(expected) {
        return Err(AdapterError::Architecture { found: text("general.architecture"), expected: expected.to_owned() });
    }
    let alpha = match metadata.get("adapter.lora.alpha") {
        None => 0.0,
        Some(Value::F32(alpha)) => *alpha,
        Some(_) => f32::NAN,
    };
    let tensors = file.tensors().iter().enumerate().map(|(idx, tensor)| (idx, tensor.name.as_str(), tensor));
    adapter_of(model, tensors, alpha, scale)
}

/// The adapter with this number in a bundle.
fn read_bundled(model: &Catalog, bundle: &Catalog, number: u32) -> Result<Adapter, AdapterError> {
    let value = |key: &str| bundle.metadata().f32(&format!("adapters.{number}.{key}")).ok_or(AdapterError::Bundle);
    let prefix = format!("{number}.");
    let tensors = bundle.tensors().iter().enumerate();
    let its = tensors.filter_map(|(idx, tensor)| Some((idx, tensor.name.strip_prefix(&prefix)?, tensor)));
    adapter_of(model, its, value("alpha")?, value("scale")?)
}

/// Pairs tensors, given with their names in the adapter, and checks them.
fn adapter_of<'a>(
    model: &Catalog,
    tensors: impl Iterator<Item = (usize, &'a str, &'a TensorInfo)>,
    alpha: f32,
    scale: f32,
) -> Result<Adapter, AdapterError> {
    if !alpha.is_finite() {
        return Err(AdapterError::Alpha { alpha });
    }
    // Not a number is in no range.
    if !(scale.abs() <= MAX_SCALE && scale != 0.0) {
        return Err(AdapterError::Scale { scale });
    }
    let mut halves: BTreeMap<&str, [Option<(usize, &TensorInfo)>; 2]> = BTreeMap::new();
    for (idx, name, tensor) in tensors {
        let (base, side) = match (name.strip_suffix(".lora_a"), name.strip_suffix(".lora_b")) {
            (Some(base), _) => (base, 0),
            (None, Some(base)) => (base, 1),
            // Adapters may bring norms, which libllama leaves out as well.
            (None, None) if name.ends_with("_norm.weight") => continue,
            (None, None) => return Err(AdapterError::Unknown { name: name.to_owned() }),
        };
        if !TYPES.contains(&tensor.ty) {
            return Err(AdapterError::Type { name: name.to_owned(), ty: tensor.ty });
        }
        halves.entry(base).or_default()[side] = Some((idx, tensor));
    }
    let pair = |(base, halves): (&str, [Option<(usize, &TensorInfo)>; 2])| match halves {
        [Some(a), Some(b)] => pair_of(model, base, a, b),
        _ => Err(AdapterError::Half { name: base.to_owned() }),
    };
    let pairs = halves.into_iter().map(pair).collect::<Result<Vec<_>, _>>()?;
    if pairs.is_empty() { Err(AdapterError::Empty) } else { Ok(Adapter { alpha, scale, pairs }) }
}

fn pair_of(
    model: &Catalog,
    base: &str,
    (a_idx, a): (usize, &TensorInfo),
    (b_idx, b): (usize, &TensorInfo),
) -> Result<Pair, AdapterError> {
    let tensor = model.tensor(base).ok_or_else(|| AdapterError::NoBase { name: base.to_owned() })?;
    let unsupported = |why| Err(AdapterError::Unsupported { name: base.to_owned(), why });
    match TensorRole::of(base) {
        TensorRole::Layer(_) => {}
        TensorRole::Head if base == "output.weight" => {}
        TensorRole::TokenEmbedding => {
            return unsupported("tokens are embedded outside of the stages, where adapters are not applied");
        }
        _ => return unsupported("only matrices of layers and the head can be adapted"),
    }
    if tensor.ty == GgmlType::NVFP4 {
        return unsupported("libllama adapts no matrices in NVFP4");
    }
    let wrong = || AdapterError::Shape {
        name: base.to_owned(),
        a: a.dims.clone(),
        b: b.dims.clone(),
        base: tensor.dims.clone(),
    };
    let [shape, of_a, of_b] = [&tensor.dims, &a.dims, &b.dims].map(|dims| three(dims));
    let (Some(shape), Some(of_a), Some(of_b)) = (shape, of_a, of_b) else { return Err(wrong()) };
    let [n_in, n_out, n_matrices] = shape;
    let rank = of_a[1];
    if tensor.dims.len() < 2 || of_a != [n_in, rank, n_matrices] || of_b != [rank, n_out, n_matrices] {
        return Err(wrong());
    }
    Ok(Pair { base: base.to_owned(), a: a_idx, b: b_idx, shape, rank })
}

/// Dimensions filled up with ones to three; `None` for more.
fn three(dims: &[u64]) -> Option<[u64; 3]> {
    let at = |i: usize| dims.get(i).copied().unwrap_or(1);
    (dims.len() <= 3).then(|| [at(0), at(1), at(2)])
}

fn check_types(catalog: &Catalog, adapter: &Adapter, is_one_of_several: bool) -> Result<(), AdapterError> {
    let mut tensors = adapter.pairs.iter().flat_map(|pair| [pair.a, pair.b]).map(|idx| &catalog.tensors()[idx]);
    match tensors.find(|tensor| is_one_of_several && !FLOATS.contains(&tensor.ty)) {
        Some(tensor) => Err(AdapterError::Type { name: tensor.name.clone(), ty: tensor.ty }),
        None => Ok(()),
    }
}

fn quoted(text: &str) -> String {
    format!("{:?}", text.chars().take(80).collect::<String>())
}

/// What a stage needs of a bundle, as a GGUF file that libllama reads as one adapter.
#[derive(Debug, Clone)]
pub struct AdapterView {
    scale: f32,
    tensors: Vec<usize>,
    weight_bytes: u64,
    file: Arc<VirtualFile>,
    parts: Arc<Vec<Joined>>,
}

impl AdapterView {
    /// The part of `bundle` for a stage of the model; `None` if nothing in the stage is adapted. What adapts the head
    /// is left out where there is none: a stage that pools makes its vectors before it.
    ///
    /// # Errors
    /// If it is no bundle for this model.
    pub fn new(bundle: &Catalog, model: &Catalog, stage: &StageView) -> Result<Option<Self>, AdapterError> {
        let adapters = adapters_of(bundle, model)?;
        let layers = stage.layers();
        let is_here = |pair: &&Pair| match TensorRole::of(&pair.base) {
            TensorRole::Layer(layer) => layers.contains(layer),
            _ => stage.has_head(),
        };
        let name = |base: &str| match layer_and_rest(base) {
            Some((layer, rest)) => format!("blk.{}.{rest}", layer - layers.start()),
            None => base.to_owned(),
        };
        let architecture = model.metadata().str("general.architecture").unwrap_or_default();
        let mut draft = Draft::new(architecture, &adapters);
        let mut matrices: BTreeMap<&str, Vec<(&Adapter, &Pair)>> = BTreeMap::new();
        for adapter in &adapters {
            for pair in adapter.pairs.iter().filter(is_here) {
                matrices.entry(&pair.base).or_default().push((adapter, pair));
            }
        }
        for (base, pairs) in matrices {
            draft.add(&name(base), bundle, &pairs)?;
        }
        Ok(draft.finish())
    }

    /// Indices of the bundle's tensors that this stage needs, ascending.
    pub fn tensors(&self) -> &[usize] {
        &self.tensors
    }

    /// Bytes of the virtual file.
    pub fn n_bytes(&self) -> u64 {
        self.file.n_bytes
    }

    /// The virtual file up to where tensor data starts.
    pub fn header_bytes(&self) -> &[u8] {
        &self.file.header
    }

    /// Bytes of its tensors: what they take in memory.
    pub fn weight_bytes(&self) -> u64 {
        self.weight_bytes
    }

    /// What libllama is to multiply the adapter by.
    pub fn scale(&self) -> f32 {
        self.scale
    }

    /// A reader of the virtual file. `source` must hold the tensors of the bundle.
    pub fn reader(&self, source: Arc<dyn TensorSource>) -> StageReader {
        let source = Arc::new(JoinedSource { parts: Arc::clone(&self.parts), source });
        StageReader::new(Arc::clone(&self.file), source)
    }
}

/// Bytes that a bundle takes in memory: in each of the model's first `n_layers` layers, and in the head.
///
/// # Errors
/// If it is no bundle for this model.
pub fn adapter_bytes(bundle: &Catalog, model: &Catalog, n_layers: u32) -> Result<(Vec<u64>, u64), AdapterError> {
    let adapters = adapters_of(bundle, model)?;
    let (mut layers, mut head) = (vec![0; n_layers as usize], 0);
    for pair in adapters.iter().flat_map(|adapter| &adapter.pairs) {
        let bytes = [pair.a, pair.b].map(|idx| match &bundle.tensors()[idx] {
            tensor if adapters.len() > 1 => tensor.n_elements().saturating_mul(4),
            tensor => tensor.n_bytes,
        });
        let place = match TensorRole::of(&pair.base) {
            TensorRole::Layer(layer) => layers.get_mut(layer as usize),
            _ => Some(&mut head),
        };
        // Layers behind the last one are left out, and so is what adapts them.
        if let Some(place) = place {
            *place += bytes.iter().sum::<u64>();
        }
    }
    Ok((layers, head))
}

/// Refuses adapters that take too much memory.
fn check_bytes<'a>(catalogs: impl Iterator<Item = &'a Catalog>) -> Result<(), AdapterError> {
    let n_bytes = catalogs.map(Catalog::weight_bytes).fold(0, u64::saturating_add);
    if n_bytes > MAX_ADAPTER_BYTES { Err(AdapterError::TooLarge { n_bytes }) } else { Ok(()) }
}

fn adapters_of(bundle: &Catalog, model: &Catalog) -> Result<Vec<Adapter>, AdapterError> {
    check_bytes([bundle].into_iter())?;
    let n_adapters = bundle.metadata().u32("adapters.count").ok_or(AdapterError::Bundle)?;
    if n_adapters as usize > MAX_ADAPTERS {
        return Err(AdapterError::TooMany { found: n_adapters as usize });
    }
    let adapters = (0..n_adapters).map(|number| read_bundled(model, bundle, number));
    let adapters = adapters.collect::<Result<Vec<_>, _>>()?;
    adapters.iter().try_for_each(|adapter| check_types(bundle, adapter, adapters.len() > 1))?;
    Ok(adapters)
}

/// A view in the making.
struct Draft {
    is_single: bool,
    scale: f32,
    builder: Builder,
    parts: Vec<Joined>,
}

impl Draft {
    fn new(architecture: &str, adapters: &[Adapter]) -> Self {
        // The scale of several is in their tensors, and without alpha libllama does not divide by the rank.
        let (alpha, scale) = match adapters {
            [one] => (one.alpha, one.scale),
            _ => (0.0, 1.0),
        };
        let mut metadata = Metadata::new();
        metadata.set("general.architecture", architecture);
        metadata.set("general.type", "adapter");
        metadata.set("adapter.type", "lora");
        metadata.set("adapter.lora.alpha", alpha);
        Self { is_single: adapters.len() == 1, scale, builder: Builder::new(&metadata), parts: Vec::new() }
    }

    /// Adds the pair for the matrix that the stage calls `name`.
    fn add(&mut self, name: &str, bundle: &Catalog, pairs: &[(&Adapter, &Pair)]) -> Result<(), AdapterError> {
        let (name_a, name_b) = (format!("{name}.lora_a"), format!("{name}.lora_b"));
        let tensor = |idx: usize| &bundle.tensors()[idx];
        if let ([(_, pair)], true) = (pairs, self.is_single) {
            for (name, idx) in [(name_a, pair.a), (name_b, pair.b)] {
                self.builder.tensor(name, &tensor(idx).dims, tensor(idx).ty)?;
                self.parts.push(Joined::Whole(idx));
            }
            return Ok(());
        }
        let [n_in, n_out, n_matrices] = pairs.first().map_or([0; 3], |(_, pair)| pair.shape);
        let rank: u64 = pairs.iter().map(|(_, pair)| pair.rank).sum();
        let rows = |idx: usize, len: u64, factor: f32| Part { tensor: idx, ty: tensor(idx).ty, len, factor };
        let of_a = pairs.iter().map(|(_, pair)| rows(pair.a, n_in * pair.rank, 1.0));
        self.builder.tensor(name_a, &[n_in, rank, n_matrices], GgmlType::F32)?;
        self.parts.push(Joined::Parts(of_a.collect()));
        let factor = |adapter: &Adapter, pair: &Pair| match adapter.alpha {
            0.0 => adapter.scale,
            alpha => adapter.scale * alpha / pair.rank as f32,
        };
        let of_b = pairs.iter().map(|(adapter, pair)| rows(pair.b, pair.rank, factor(adapter, pair)));
        self.builder.tensor(name_b, &[rank, n_out, n_matrices], GgmlType::F32)?;
        self.parts.push(Joined::Parts(of_b.collect()));
        Ok(())
    }

    fn finish(self) -> Option<AdapterView> {
        if self.parts.is_empty() {
            return None;
        }
        let header = self.builder.header_bytes();
        let data_start = header.len() as u64;
        let segment = |(idx, placed): (usize, &Placed)| Segment {
            start: data_start + placed.offset,
            n_bytes: placed.n_bytes,
            origin: Origin::Tensor(idx),
        };
        let segments: Vec<_> = self.builder.placed().iter().enumerate().map(segment).collect();
        let mut tensors: Vec<usize> = self.parts.iter().flat_map(Joined::tensors).collect();
        tensors.sort_unstable();
        Some(AdapterView {
            scale: self.scale,
            tensors,
            weight_bytes: segments.iter().map(|segment| segment.n_bytes).sum(),
            file: Arc::new(VirtualFile { header, segments, n_bytes: data_start + self.builder.n_data_bytes() }),
            parts: Arc::new(self.parts),
        })
    }
}

/// What a tensor of a view is made of.
#[derive(Debug, Clone)]
enum Joined {
    /// A tensor of the bundle.
    Whole(usize),
    /// F32: a group after the other, each with some elements of each part in turn.
    Parts(Vec<Part>),
}

/// A tensor of the bundle that is a part of one of a view.
#[derive(Debug, Clone, Copy)]
struct Part {
    tensor: usize,
    ty: GgmlType,
    /// Elements in a group.
    len: u64,
    /// What each is multiplied by.
    factor: f32,
}

impl Joined {
    fn tensors(&self) -> impl Iterator<Item = usize> {
        let (whole, parts) = match self {
            Self::Whole(idx) => (Some(*idx), [].as_slice()),
            Self::Parts(parts) => (None, parts.as_slice()),
        };
        whole.into_iter().chain(parts.iter().map(|part| part.tensor))
    }
}

/// The tensors of a view, made of those of its bundle.
struct JoinedSource {
    parts: Arc<Vec<Joined>>,
    source: Arc<dyn TensorSource>,
}

impl TensorSource for JoinedSource {
    fn read_tensor(&self, tensor_idx: usize, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        match self.parts.get(tensor_idx) {
            Some(Joined::Whole(idx)) => self.source.read_tensor(*idx, offset, buf),
            Some(Joined::Parts(parts)) => {
                let end = offset + buf.len() as u64;
                let (first, last) = (offset / 4, end.div_ceil(4));
                let elements = self.elements(parts, first, last)?;
                let bytes: Vec<u8> = elements.iter().flat_map(|element| element.to_le_bytes()).collect();
                let start = (offset - 4 * first) as usize;
                buf.copy_from_slice(&bytes[start..start + buf.len()]);
                Ok(())
            }
            None => Err(io::Error::new(io::ErrorKind::InvalidInput, "the adapter has no such tensor")),
        }
    }
}

impl JoinedSource {
    /// Elements `first..end` of a joined tensor. What is read of each part are the groups, or the piece of a group,
    /// that they are in.
    fn elements(&self, parts: &[Part], first: u64, end: u64) -> io::Result<Vec<f32>> {
        let group: u64 = parts.iter().map(|part| part.len).sum();
        let (first_group, end_group) = (first / group, end.div_ceil(group));
        let mut out = vec![0.0; (end - first) as usize];
        let mut begin_in_group = 0;
        for part in parts {
            // Of a single group, only what is asked for; of several, all: groups are short where there are many.
            let (from, to) = if end_group - first_group == 1 {
                let (lo, hi) = (first - first_group * group, end - first_group * group);
                let clamp = |at: u64| at.clamp(begin_in_group, begin_in_group + part.len) - begin_in_group;
                (first_group * part.len + clamp(lo), first_group * part.len + clamp(hi))
            } else {
                (first_group * part.len, end_group * part.len)
            };
            for (at, element) in (from..to).zip(self.part(part, from, to)?) {
                let place = at / part.len * group + begin_in_group + at % part.len;
                if (first..end).contains(&place) {
                    out[(place - first) as usize] = element * part.factor;
                }
            }
            begin_in_group += part.len;
        }
        Ok(out)
    }

    /// Elements `from..to` of a part as they are stored.
    fn part(&self, part: &Part, from: u64, to: u64) -> io::Result<Vec<f32>> {
        let size = part.ty.n_block_bytes();
        let mut bytes = vec![0; ((to - from) * size) as usize];
        self.source.read_tensor(part.tensor, from * size, &mut bytes)?;
        let halves = || bytes.as_chunks::<2>().0.iter().map(|half| u16::from_le_bytes(*half));
        Ok(match part.ty {
            GgmlType::F16 => halves().map(f16_to_f32).collect(),
            GgmlType::BF16 => halves().map(|half| f32::from_bits(u32::from(half) << 16)).collect(),
            // Others were refused when the view was made.
            _ => bytes.as_chunks::<4>().0.iter().map(|element| f32::from_le_bytes(*element)).collect(),
        })
    }
}

/// IEEE 754 half precision, exactly.
fn f16_to_f32(half: u16) -> f32 {
    let sign = u32::from(half >> 15) << 31;
    let (exponent, fraction) = (u32::from(half >> 10 & 0x1f), u32::from(half & 0x3ff));
    match exponent {
        // Below the normal numbers: a multiple of 2^-24.
        0 => f32::from_bits(sign | (fraction as f32 / 16_777_216.0).to_bits()),
        0x1f => f32::from_bits(sign | 0x7f80_0000 | fraction << 13),
        _ => f32::from_bits(sign | (exponent + 112) << 23 | fraction << 13),
    }
}

#[cfg(test)]
#[path = "adapter_tests.rs"]
mod tests;
