//! The coordinator's model file: what it is, what it costs, its tokens and their embeddings.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::UNIX_EPOCH;

use brigade_base::{Hash, KvType, KvTypes, ModelId, Pooling, Token};
use brigade_engine::{TokenizeError, Vocabulary};
use brigade_gguf::{
    AdapterError, Architecture, ArchitectureError, Catalog, Manifest, Metadata, ModelFile, OpenError, Value, model_id,
    vocabulary_header,
};
use brigade_plan::ModelProfile;
use brigade_store::RemoteLocation;

use crate::adapters::{AdapterFile, Adapters, served_hash};
use crate::serving::{ModelCard, SubmitError};
use crate::stage_pass::row_of_token;
use crate::trial;

/// A model file could not be used.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// The file is missing, broken, or of an architecture that cannot be split.
    #[error(transparent)]
    File(#[from] OpenError),
    /// Its architecture cannot be split, or its metadata is wrong.
    #[error(transparent)]
    Architecture(#[from] ArchitectureError),
    /// libllama cannot read its vocabulary.
    #[error("the vocabulary cannot be used: {0}")]
    Vocabulary(String),
    /// Its tensors could not be read or hashed.
    #[error("reading {path} failed: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A file is no adapter for it.
    #[error("the adapter {} cannot be used: {source}", .path.display())]
    Adapter {
        /// The file.
        path: PathBuf,
        /// Why.
        source: AdapterError,
    },
    /// Its adapters cannot be used together.
    #[error("the adapters cannot be used: {0}")]
    Adapters(#[source] AdapterError),
    /// Its keys and values cannot be stored as was asked for.
    #[error("the KV cache of this model cannot be stored in {kv}: {why}; leave --cache-type-k or --cache-type-v out")]
    KvTypes {
        /// What was asked for.
        kv: KvTypes,
        /// What stands against it.
        why: String,
    },
    /// It lacks a tensor that every model has.
    #[error("the model has no tensor {0}; the file is incomplete")]
    NoTensor(&'static str),
}

/// An opened model file with all that a coordinator needs to know of it.
pub struct LocalModel {
    file: Arc<ModelFile>,
    architecture: Architecture,
    header_hash: Hash,
    manifest: Manifest,
    vocabulary: Vocabulary,
    name: String,
    embedding: EmbeddingTable,
    /// Where it was downloaded from, if others may do that too.
    origin: Option<RemoteLocation>,
    /// What is added to its matrices.
    adapters: Option<Adapters>,
}

/// Where the rows of the token embedding lie in the file.
struct EmbeddingTable {
    tensor: usize,
    type_id: u32,
    row_bytes: usize,
    n_embd: usize,
}

impl LocalModel {
    /// Opens a model and hashes its tensors; the hashes are kept in `state_dir`, so the next start reads only the
    /// header. `progress` hears how many bytes were hashed, and of how many.
    ///
    /// # Errors
    /// If the file is no model that can be served.
    pub fn open(path: &Path, state_dir: &Path, progress: &(dyn Fn(u64, u64) + Sync)) -> Result<Self, ModelError> {
        let file = Arc::new(ModelFile::open(path)?);
        let catalog = file.catalog();
        let architecture = Architecture::of(catalog)?;
        let header_hash = catalog.header_hash();
        let read_error = |source| ModelError::Read { path: path.to_owned(), source };
        let manifest = manifest(&file, &header_hash, state_dir, progress).map_err(read_error)?;
        let vocabulary = load_vocabulary(vocabulary_header(catalog))?;
        let tensor = catalog.tensor_idx("token_embd.weight").ok_or(ModelError::NoTensor("token_embd.weight"))?;
        let info = &catalog.tensors()[tensor];
        let n_embd = architecture.n_embd as usize;
        let row_bytes = info.ty.row_bytes(n_embd as u64).unwrap_or(0) as usize;
        let embedding = EmbeddingTable { tensor, type_id: info.ty.id(), row_bytes, n_embd };
        let name = path.file_stem().map_or_else(|| "model".to_owned(), |stem| display_name(&stem.to_string_lossy()));
        Ok(Self {
            file,
            architecture,
            header_hash,
            manifest,
            vocabulary,
            name,
            embedding,
            origin: None,
            adapters: None,
        })
    }

    /// The same with LoRA adapters; their hashes are kept in `state_dir`.
    ///
    /// # Errors
    /// If one of them is no adapter for this model.
    pub fn with_adapters(mut self, adapters: &[AdapterFile], state_dir: &Path) -> Result<Self, ModelError> {
        if !adapters.is_empty() {
            self.adapters = Some(Adapters::open(self.file.catalog(), adapters, state_dir)?);
        }
        Ok(self)
    }

    /// Its adapters, if it has some.
    pub(crate) fn adapters(&self) -> Option<&Adapters> {
        self.adapters.as_ref()
    }

    /// Whether its adapters change its head, which matters only where text is generated.
    pub fn has_adapted_head(&self) -> bool {
        self.adapters.as_ref().is_some_and(|adapters| adapters.bundle().adapt_the_head())
    }

    /// What it is known by where it is served: only who has the same can take over.
    pub fn served_hash(&self) -> Hash {
        served_hash(self.header_hash, self.adapters.as_ref())
    }

    /// The same, downloaded from there. That is forgotten if other nodes could not have it from there too: it wants a
    /// token, or the files have other lengths by now.
    #[must_use]
    pub fn downloaded_from(mut self, origin: RemoteLocation) -> Self {
        let lengths = |files: Vec<std::fs::Metadata>| files.iter().map(std::fs::Metadata::len).collect::<Vec<_>>();
        let here = self.file.file_metadata().map(lengths).unwrap_or_default();
        let is_same = here.iter().eq(origin.parts.iter().map(|part| &part.n_bytes));
        self.origin = Some(origin).filter(|origin| origin.is_public && is_same);
        self
    }

    /// Where it was downloaded from, if every node can have it from there.
    pub fn origin(&self) -> Option<&RemoteLocation> {
        self.origin.as_ref()
    }

    /// The opened file.
    pub fn file(&self) -> &Arc<ModelFile> {
        &self.file
    }

    /// Its hyperparameters.
    pub fn architecture(&self) -> &Architecture {
        &self.architecture
    }

    /// Hash of its whole header.
    pub fn header_hash(&self) -> Hash {
        self.header_hash
    }

    /// Hashes of its tensors.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Identity of the weights.
    pub fn id(&self) -> ModelId {
        model_id(&self.header_hash, &self.manifest)
    }

    /// Its tokens.
    pub fn vocabulary(&self) -> &Vocabulary {
        &self.vocabulary
    }

    /// The name that requests use: that of the file, without its number of splits.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What it costs with keys and values stored so, for the planner.
    pub fn profile(&self, kv: KvTypes) -> ModelProfile {
        let mut profile = profile_of(&self.architecture, kv);
        if let Some(adapters) = &self.adapters {
            adapters.bundle().add_to(&mut profile, self.file.catalog());
        }
        profile
    }

    /// Values of what the last stage makes of a text: of its vector, or scores of the classifier's labels. 0 without
    /// `pooling`.
    pub fn n_values(&self, pooling: Option<Pooling>) -> u32 {
        pooling.map_or(0, |pooling| n_values(self.file.catalog().metadata(), self.architecture.n_embd, pooling))
    }

    /// Whether the scores of its classifier's labels are probabilities as the last stage gives them.
    pub fn has_class_shares(&self) -> bool {
        HAVE_CLASS_SHARES.contains(&self.architecture.name)
    }

    /// Looks up the embeddings of `tokens` as the file has them; `out` becomes `[n_tokens, n_embd]`. For a model whose
    /// layers need the tokens, rows carry these instead.
    ///
    /// # Errors
    /// If the file cannot be read, or a token is not in the vocabulary.
    pub fn embed(&self, tokens: &[Token], out: &mut Vec<f32>, bytes: &mut Vec<u8>) -> Result<(), ModelError> {
        if self.architecture.takes_tokens() {
            let n_embd = self.architecture.n_embd as usize;
            out.resize(tokens.len() * n_embd, 0.0);
            out.fill(0.0);
            for (row, &token) in out.chunks_exact_mut(n_embd.max(1)).zip(tokens) {
                row[0] = row_of_token(token);
            }
            return Ok(());
        }
        let table = &self.embedding;
        bytes.resize(table.row_bytes * tokens.len(), 0);
        for (row, &token) in bytes.chunks_exact_mut(table.row_bytes.max(1)).zip(tokens) {
            let at = u64::try_from(token)
                .ok()
                .and_then(|t| t.checked_mul(table.row_bytes as u64))
                .ok_or(ModelError::NoTensor("token_embd.weight"))?;
            self.file
                .read_at(table.tensor, at, row)
                .map_err(|source| ModelError::Read { path: self.file.path().to_owned(), source })?;
        }
        out.clear();
        brigade_engine::dequantize_rows(table.type_id, bytes, table.n_embd, out)
            .map_err(|error| ModelError::Vocabulary(error.to_string()))?;
        Ok(())
    }
}

/// Architectures behind whose classifier libllama puts a softmax. All others give what the classifier does.
const HAVE_CLASS_SHARES: [&str; 2] = ["qwen3", "qwen3vl"];

/// Values that libllama makes of a text, by the header of a model whose hidden states have `n_embd`.
fn n_values(metadata: &Metadata, n_embd: u32, pooling: Pooling) -> u32 {
    let architecture = metadata.str("general.architecture").unwrap_or_default();
    if pooling == Pooling::Rank {
        let labels = metadata.array(&format!("{architecture}.classifier.output_labels"));
        // A classifier without the names of its classes has one.
        return labels.map_or(1, |labels| u32::try_from(labels.len()).unwrap_or(u32::MAX).max(1));
    }
    let width = metadata.get(&format!("{architecture}.embedding_length_out"));
    let width = width.and_then(|value| u32::try_from(value.as_u64()?).ok());
    width.filter(|&width| width > 0).unwrap_or(n_embd)
}

/// Loads the vocabulary of a GGUF without tensors, as [`vocabulary_header`] makes it; the bytes may come from a peer.
///
/// # Errors
/// If they are no sound header, or libllama cannot read the vocabulary.
pub(crate) fn load_vocabulary(header: Vec<u8>) -> Result<Vocabulary, ModelError> {
    // libllama reads only what was found sound before.
    Catalog::parse_header(&header).map_err(|error| ModelError::Vocabulary(error.to_string()))?;
    trial::vocabulary(&header).map_err(|error| ModelError::Vocabulary(error.to_string()))?;
    let n_bytes = header.len() as u64;
    Vocabulary::load(Box::new(std::io::Cursor::new(header)), n_bytes)
        .map_err(|error| ModelError::Vocabulary(error.to_string()))
}

/// The tokens of `text` for a session of the model on the card.
///
/// # Errors
/// If the text is too long to be any prompt.
pub(crate) fn tokenize(
    vocabulary: &Vocabulary,
    card: &ModelCard,
    text: &str,
    add_special: bool,
    parse_special: bool,
) -> Result<Vec<Token>, SubmitError> {
    let most = card.context as usize;
    vocabulary.tokenize_at_most(text, add_special, parse_special, most).map_err(|error| match error {
        TokenizeError::TooManyTokens { at_least: tokens, .. } => card.too_long(tokens, true),
        other => SubmitError::Invalid(other.to_string()),
    })
}

/// The tokens of a query and a document as the model on the card was trained to see them: by its own template, else
/// both behind each other with the marks that its tokenizer puts around texts, as llama.cpp does.
///
/// # Errors
/// If they are longer than a text may be.
pub(crate) fn tokenize_pair(
    vocabulary: &Vocabulary,
    card: &ModelCard,
    query: &str,
    document: &str,
) -> Result<Vec<Token>, SubmitError> {
    let tokens = match &card.rank_template {
        Some(template) => tokenize(vocabulary, card, &fill(template, query, document), false, true)?,
        None => {
            let marks = Marks::of(vocabulary);
            let query = tokenize(vocabulary, card, query, false, false)?;
            let document = tokenize(vocabulary, card, document, false, false)?;
            marks.around(query, document)
        }
    };
    if tokens.len() > card.context as usize { Err(card.too_long(tokens.len(), false)) } else { Ok(tokens) }
}

/// A template with query and document in their places. What they say themselves is left as it is.
fn fill(template: &str, query: &str, document: &str) -> String {
    let with_documents = |text: &str| text.replace("{document}", document);
    template.split("{query}").map(with_documents).collect::<Vec<_>>().join(query)
}

/// The tokens around two texts that belong together.
struct Marks {
    start: Option<Token>,
    separator: Option<Token>,
    end: Option<Token>,
}

impl Marks {
    fn of(vocabulary: &Vocabulary) -> Self {
        let end = vocabulary.eos().or(vocabulary.separator());
        Self {
            start: vocabulary.bos().filter(|_| vocabulary.adds_bos()),
            separator: vocabulary.separator().filter(|_| vocabulary.adds_separator()),
            // A tokenizer that ends texts with the separator ends the document with it too.
            end: end.filter(|_| vocabulary.adds_eos()),
        }
    }

    fn around(&self, query: Vec<Token>, document: Vec<Token>) -> Vec<Token> {
        let mut tokens: Vec<Token> = self.start.into_iter().chain(query).collect();
        tokens.extend(self.end.into_iter().chain(self.separator).chain(document));
        tokens.extend(self.end.or(self.separator));
        tokens
    }
}

/// What a model costs with keys and values stored so, by its header alone.
///
/// # Errors
/// If its architecture cannot be split, or its keys and values not stored so.
pub fn model_profile(catalog: &Catalog, kv: KvTypes) -> Result<ModelProfile, ModelError> {
    let architecture = Architecture::of(catalog)?;
    check_kv(catalog, &architecture, kv)?;
    Ok(profile_of(&architecture, kv))
}

/// Architectures whose graphs work without flash attention only.
const NO_FLASH_ATTENTION: [&str; 2] = ["grok", "plm"];

/// Whether keys and values of this model can be stored so.
///
/// # Errors
/// If they cannot, and why.
pub(crate) fn check_kv(catalog: &Catalog, architecture: &Architecture, kv: KvTypes) -> Result<(), ModelError> {
    let name = architecture.name;
    let refuse = |why: String| Err(ModelError::KvTypes { kv, why });
    if let Some((length, ty)) = architecture.kv_misfit(kv) {
        let n = ty.block_elements();
        return refuse(format!("{ty} stores {n} elements together, and heads of this model have {length}"));
    }
    let latent = catalog.metadata().get(&format!("{name}.attention.key_length_mla"));
    if kv.k != kv.v && latent.and_then(Value::as_u64).is_some_and(|length| length > 0) {
        return refuse("its values are a part of its keys, so both must be stored alike".to_owned());
    }
    if kv.v != KvType::F16 && NO_FLASH_ATTENTION.contains(&name) {
        return refuse(format!("llama.cpp has no flash attention for {name} models, which values in blocks need"));
    }
    Ok(())
}

/// What a model of this architecture costs.
pub(crate) fn profile_of(a: &Architecture, kv: KvTypes) -> ModelProfile {
    ModelProfile {
        layer_bytes: (0..a.n_layers).map(|i| a.layer_bytes(i)).collect(),
        kv_bytes_per_token: (0..a.n_layers).map(|i| a.kv_bytes_per_token(i, kv)).collect(),
        value_bytes_per_token: (0..a.n_layers).map(|i| a.value_bytes_per_token(i, kv)).collect(),
        state_bytes: (0..a.n_layers).map(|i| a.state_bytes(i)).collect(),
        is_flash: kv.v != KvType::F16,
        rehearsed: None,
        why_whole: a.why_whole(),
        head_bytes: a.head_bytes(),
        embedding_bytes: a.unread_embedding_bytes(),
        cut_points: a.cut_points(),
        n_embd: a.n_embd,
        n_heads: a.n_head.iter().copied().max().unwrap_or(0),
        n_ff: a.n_ff.iter().copied().max().unwrap_or(0),
        n_vocab: a.n_vocab,
        n_experts: a.n_experts,
        n_experts_used: a.n_experts_used,
        expert_bytes: a.expert_bytes(),
        n_weights: a.n_weights(),
    }
}

/// A file's name without what only tells its parts apart.
fn display_name(stem: &str) -> String {
    let parts: Vec<&str> = stem.rsplitn(4, '-').collect();
    match parts.as_slice() {
        [n, "of", i, rest] if is_split_number(n) && is_split_number(i) => (*rest).to_owned(),
        _ => stem.to_owned(),
    }
}

fn is_split_number(text: &str) -> bool {
    text.len() == 5 && text.bytes().all(|b| b.is_ascii_digit())
}

/// The hashes of a file's tensors, from `state_dir` if the file has not changed since they were made.
pub(crate) fn manifest(
    file: &Arc<ModelFile>,
    header_hash: &Hash,
    state_dir: &Path,
    progress: &(dyn Fn(u64, u64) + Sync),
) -> std::io::Result<Manifest> {
    let catalog = file.catalog();
    let stored = state_dir.join("manifests").join(fingerprint(file, header_hash)?);
    if let Ok(bytes) = std::fs::read(&stored)
        && let Some(manifest) = read_manifest(&bytes)
        && manifest.tensors.len() == catalog.tensors().len()
    {
        return Ok(manifest);
    }
    let total = catalog.weight_bytes();
    let done = AtomicU64::new(0);
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(MAX_HASH_THREADS);
    let manifest =
        Manifest::compute(catalog, &**file, threads, &|n| progress(done.fetch_add(n, Ordering::Relaxed) + n, total))?;
    if let Some(dir) = stored.parent() {
        std::fs::create_dir_all(dir)?;
    }
    let bytes: Vec<u8> = manifest.tensors.iter().flat_map(|hash| *hash.as_bytes()).collect();
    brigade_net::write_atomic(&stored, &bytes, 0o600)?;
    Ok(manifest)
}

fn read_manifest(bytes: &[u8]) -> Option<Manifest> {
    let (hashes, rest) = bytes.as_chunks::<32>();
    rest.is_empty().then(|| Manifest { tensors: hashes.iter().map(|hash| Hash::from_bytes(*hash)).collect() })
}

/// Names a state of a file: another header, size or time of change gives another name.
fn fingerprint(file: &ModelFile, header_hash: &Hash) -> std::io::Result<String> {
    let mut hasher = blake3::Hasher::new();
    hasher.update(header_hash.as_bytes());
    hasher.update(std::path::absolute(file.path())?.as_os_str().as_encoded_bytes());
    for meta in file.file_metadata()? {
        let changed = meta.modified()?.duration_since(UNIX_EPOCH).unwrap_or_default();
        hasher.update(&meta.len().to_le_bytes());
        hasher.update(&changed.as_nanos().to_le_bytes());
    }
    Ok(hasher.finalize().to_hex().to_string())
}

/// BLAKE3 takes several gigabytes per second and core; more threads than this only make a disk seek.
const MAX_HASH_THREADS: usize = 8;

#[cfg(test)]
mod tests {
    use brigade_gguf::Array;
    use brigade_store::RemotePart;

    use super::*;

    #[test]
    fn a_vector_has_the_width_that_libllama_gives_it() {
        let mut metadata = Metadata::new();
        metadata.set("general.architecture", "bert");
        let n = |metadata: &Metadata, pooling| n_values(metadata, 384, pooling);
        assert_eq!((n(&metadata, Pooling::Mean), n(&metadata, Pooling::Rank)), (384, 1));
        for labels in [vec![], vec!["yes", "no"]] {
            metadata.set("bert.classifier.output_labels", Array::of_strings(&labels));
            assert_eq!(n(&metadata, Pooling::Rank), labels.len().max(1) as u32);
        }
        metadata.set("bert.embedding_length_out", 128_u32);
        assert_eq!(n(&metadata, Pooling::Cls), 128);
    }

    #[test]
    fn a_template_is_filled_once() {
        let filled = fill("<q>{query}<d>{document}", "a {document}", "b {query}");
        assert_eq!(filled, "<q>a {document}<d>b {query}");
    }

    #[test]
    fn a_pair_has_the_marks_of_its_tokenizer() {
        let around = |start, separator, end| Marks { start, separator, end }.around(vec![1], vec![2]);
        assert_eq!(around(Some(7), Some(8), None), [7, 1, 8, 2, 8], "bert");
        assert_eq!(around(Some(7), Some(8), Some(9)), [7, 1, 9, 8, 2, 9], "roberta");
        assert_eq!(around(None, None, Some(9)), [1, 9, 2, 9], "a decoder");
        assert_eq!(around(None, None, None), [1, 2]);
    }

    #[test]
    fn the_number_of_a_split_is_no_part_of_the_name() {
        assert_eq!(display_name("qwen3-8b-q4_0-00001-of-00003"), "qwen3-8b-q4_0");
        assert_eq!(display_name("abacus-f16"), "abacus-f16");
        assert_eq!(display_name("a-1-of-3"), "a-1-of-3");
    }

    #[test]
    fn others_are_sent_only_where_everybody_may_read_the_same_file() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/abacus-f16.gguf");
        let n_bytes = std::fs::metadata(&path).unwrap().len();
        let dir = tempfile::tempdir().unwrap();
        let has_origin = |is_public, n_bytes| {
            let part = RemotePart { url: "https://hub/m.gguf".into(), n_bytes, sha256: None, etag: None };
            let origin = RemoteLocation { parts: vec![part], is_public };
            let model = LocalModel::open(&path, dir.path(), &|_, _| {}).unwrap();
            model.downloaded_from(origin).origin().is_some()
        };
        assert!(has_origin(true, n_bytes));
        assert!(!has_origin(false, n_bytes), "it needs a token");
        assert!(!has_origin(true, n_bytes + 1), "it is another file");
    }
}
