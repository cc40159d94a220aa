//! What a stage is computed with in a trial: it as a whole where it is small, else pieces of it.

use brigade_base::{ByteSize, LayerRange};
use brigade_engine::StageOptions;
use brigade_gguf::{AdapterError, AdapterView, Architecture, Builder, Catalog, StageView, bundle_adapters};

use super::{AdapterPart, Question, TrialError};
use crate::sizes::{StageShape, stage_options};

/// Weights of a stage that is not taken to pieces: computing with it takes a fraction of a second.
const SMALL_STAGE: ByteSize = ByteSize(128 << 20);

/// Tokens of a session and rows of a batch for which pieces are loaded: what they take in memory is no question here,
/// and one trial does for stages of any length.
const TRIED_CONTEXT: u32 = 256;
const TRIED_ROWS: u32 = 2;

/// What is computed with in a trial: a stage or a part of it.
pub(super) struct Piece {
    view: StageView,
    adapter: Option<AdapterView>,
}

impl Piece {
    pub(super) fn weight_bytes(&self) -> u64 {
        self.view.weight_bytes().saturating_add(self.adapter.as_ref().map_or(0, AdapterView::weight_bytes))
    }

    /// The header of the stage, and behind it that of the adapter.
    pub(super) fn header_bytes(&self) -> Vec<u8> {
        [self.view.header_bytes(), self.adapter.as_ref().map_or(&[], AdapterView::header_bytes)].concat()
    }

    /// Whether computing works as in the `whole` stage that is to be loaded, but for what makes no difference.
    pub(super) fn question(&self, whole: &StageOptions) -> Question {
        let Self { view, adapter } = self;
        let shape = StageShape {
            n_ctx: TRIED_CONTEXT.min(whole.n_ctx),
            n_sessions: 1,
            max_rows: TRIED_ROWS.min(whole.max_rows),
            kv: whole.kv,
            pooling: whole.pooling,
        };
        let options = StageOptions { n_embd: 0, n_vocab: 0, ..stage_options(view, shape, 1) };
        let adapter = adapter.as_ref().map(|adapter| AdapterPart::behind(view, adapter));
        Question::Passes { n_bytes: view.n_bytes(), takes_tokens: view.takes_tokens(), options, adapter }
    }
}

/// What a stage is tried in: it as a whole, or the smallest stages that it can be cut into. A stage of which nothing
/// can be cut out is tried in no piece.
///
/// # Errors
/// If its adapter cannot be cut with it.
pub(super) fn pieces(view: &StageView, adapter: Option<&AdapterView>) -> Result<Vec<Piece>, TrialError> {
    let whole = Piece { view: view.clone(), adapter: adapter.cloned() };
    if whole.weight_bytes() <= SMALL_STAGE.0 {
        return Ok(vec![whole]);
    }
    // The stage is a model of its own, and its adapter one of that model.
    let Ok(catalog) = Catalog::parse_header(view.header_bytes()) else { return Ok(Vec::new()) };
    let Ok(architecture) = Architecture::of(&catalog) else { return Ok(Vec::new()) };
    let bundle = match adapter {
        Some(adapter) => Some(bundle_adapters(&catalog, &[(&thin(adapter)?, adapter.scale())]).map_err(uncut)?),
        None => None,
    };
    let (cuts, n_layers) = (architecture.cut_points(), architecture.n_layers);
    let ends = cuts.iter().copied().chain([n_layers]);
    let mut pieces = Vec::new();
    for (start, end) in [0].into_iter().chain(cuts.iter().copied()).zip(ends) {
        // Layers that have been cut out once may not be cut again.
        let cut = LayerRange::new(start, end).ok().and_then(|layers| StageView::new(&catalog, layers).ok());
        let Some(view) = cut else { continue };
        let adapter = match &bundle {
            Some(bundle) => AdapterView::new(bundle, &catalog, &view).map_err(uncut)?,
            None => None,
        };
        pieces.push(Piece { view, adapter });
    }
    Ok(pieces)
}

/// The adapter with matrices of the least rank: of how many values a product is the sum makes no difference for
/// whether it can be computed, and an adapter may have more bytes than there is time for.
///
/// # Errors
/// If its header cannot be written so.
pub(super) fn thin(adapter: &AdapterView) -> Result<Catalog, TrialError> {
    let full = Catalog::parse_header(adapter.header_bytes()).map_err(|error| uncut(error.into()))?;
    let mut builder = Builder::new(full.metadata());
    for tensor in full.tensors() {
        let mut dims = tensor.dims.clone();
        let (base, rank_idx) = match (tensor.name.strip_suffix(".lora_a"), tensor.name.strip_suffix(".lora_b")) {
            (Some(base), _) => (base, 1),
            (None, Some(base)) => (base, 0),
            (None, None) => continue,
        };
        let second = full.tensor(&format!("{base}.lora_b"));
        if let (Some(rank), Some(second)) = (dims.get_mut(rank_idx), second) {
            // Its rows are as long as the rank is.
            *rank = second.ty.n_block_elements().min(*rank);
        }
        builder.tensor(&tensor.name, &dims, tensor.ty).map_err(|error| uncut(error.into()))?;
    }
    Catalog::parse_header(&builder.header_bytes()).map_err(|error| uncut(error.into()))
}

fn uncut(error: AdapterError) -> TrialError {
    TrialError::Untried(format!("its adapters cannot be tried: {error}"))
}

#[cfg(test)]
mod tests {
    use brigade_gguf::{GgmlType, Metadata, Value};

    use super::*;

    const N_EMBD: u64 = 4096;
    const N_VOCAB: u64 = 32_000;
    const N_LAYERS: u32 = 2;

    fn catalog(metadata: &Metadata, tensors: &[(String, Vec<u64>)]) -> Catalog {
        let mut builder = Builder::new(metadata);
        for (name, dims) in tensors {
            let ty = if dims.len() > 1 { GgmlType::F16 } else { GgmlType::F32 };
            builder.tensor(name, dims, ty).unwrap();
        }
        Catalog::parse_header(&builder.header_bytes()).unwrap()
    }

    /// A model whose stages are not small.
    fn model() -> Catalog {
        let mut metadata = Metadata::new();
        metadata.set("general.architecture", "llama");
        metadata.set("tokenizer.ggml.model", "no_vocab");
        for (key, value) in [
            ("embedding_length", N_EMBD as u32),
            ("block_count", N_LAYERS),
            ("feed_forward_length", N_EMBD as u32),
            ("context_length", 256),
            ("attention.head_count", 32),
            ("rope.dimension_count", 128),
            ("vocab_size", N_VOCAB as u32),
        ] {
            metadata.set(format!("llama.{key}"), Value::U32(value));
        }
        metadata.set("llama.attention.layer_norm_rms_epsilon", Value::F32(1e-5));
        let mut tensors = vec![("token_embd.weight".to_owned(), vec![N_EMBD, N_VOCAB])];
        for layer in 0..N_LAYERS {
            let square = ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"];
            let name = |name: &str| format!("blk.{layer}.{name}.weight");
            tensors.extend(["attn_norm", "ffn_norm"].map(|norm| (name(norm), vec![N_EMBD])));
            tensors.extend(square.map(|matrix| (name(matrix), vec![N_EMBD, N_EMBD])));
        }
        tensors.push(("output_norm.weight".to_owned(), vec![N_EMBD]));
        tensors.push(("output.weight".to_owned(), vec![N_EMBD, N_VOCAB]));
        catalog(&metadata, &tensors)
    }

    fn adapter(rank: u64) -> Catalog {
        let mut metadata = Metadata::new();
        let keys = [("general.architecture", "llama"), ("general.type", "adapter"), ("adapter.type", "lora")];
        keys.into_iter().for_each(|(key, value)| metadata.set(key, value));
        let pair = |layer| {
            let name = format!("blk.{layer}.attn_q.weight");
            [(format!("{name}.lora_a"), vec![N_EMBD, rank]), (format!("{name}.lora_b"), vec![rank, N_EMBD])]
        };
        catalog(&metadata, &(0..N_LAYERS).flat_map(pair).collect::<Vec<_>>())
    }

    #[test]
    fn each_piece_has_its_part_of_the_adapters_however_large_they_are() {
        let (model, one) = (model(), adapter(40_000));
        let bundle = bundle_adapters(&model, &[(&one, 1.0), (&one, 0.5)]).unwrap();
        let view = StageView::whole(&model).unwrap();
        let joined = AdapterView::new(&bundle, &model, &view).unwrap().unwrap();
        assert!(joined.weight_bytes() > brigade_gguf::MAX_ADAPTER_BYTES, "joined they are stored in F32");
        let pieces = pieces(&view, Some(&joined)).unwrap();
        assert_eq!(pieces.len(), 2);
        for Piece { view, adapter } in &pieces {
            let adapter = adapter.as_ref().unwrap();
            assert!(adapter.weight_bytes() == 4 * 2 * N_EMBD && view.weight_bytes() > SMALL_STAGE.0);
        }
    }

    #[test]
    fn an_adapter_of_another_model_is_an_error() {
        let (model, view) = (model(), StageView::whole(&model()).unwrap());
        let last = StageView::new(&model, LayerRange::new(1, 2).unwrap()).unwrap();
        let bundle = bundle_adapters(&model, &[(&adapter(4), 1.0)]).unwrap();
        let adapter = AdapterView::new(&bundle, &model, &view).unwrap().unwrap();
        let error = pieces(&last, Some(&adapter)).err().unwrap();
        assert!(matches!(&error, TrialError::Untried(why) if why.contains("blk.1.attn_q")), "{error}");
    }
}
