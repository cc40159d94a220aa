//! LoRA adapters of the served model: opened, checked and hashed where it is coordinated, and cut for each stage.
//!
//! The adapters of a deployment and their scales are one *bundle* (see [`brigade_gguf::AdapterView`]). Its header goes
//! to workers with the model's, and its tensors are had as the model's are, by their hashes. Its identity is a part of
//! a stage's and of the deployment's: stages with other adapters are loaded anew, and only who has the same may take
//! over.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use brigade_base::Hash;
use brigade_engine::AdapterSource;
use brigade_gguf::{
    AdapterError, AdapterView, Catalog, Manifest, ModelFile, StageView, TensorSource, adapter_bytes, bundle_adapters,
    check_adapter, model_id,
};
use brigade_plan::ModelProfile;
use brigade_protocol::control::AdapterRef;

use crate::model::{ModelError, manifest};
use crate::share::Stock;

/// Keeps the identity of a model with adapters apart from every other use of BLAKE3.
const SERVED_CONTEXT: &str = "brigade 2025 model with adapters v1";

/// An adapter that a user wants.
#[derive(Debug, Clone, PartialEq)]
pub struct AdapterFile {
    /// Its GGUF.
    pub path: PathBuf,
    /// What it is multiplied by.
    pub scale: f32,
}

/// The adapters of a model.
pub(crate) struct Adapters {
    bundle: Bundle,
    hashes: Vec<Hash>,
    id: Hash,
    names: Vec<String>,
}

/// Adapters of a model as one catalog, and the files with its tensors: all that stages are made with.
pub(crate) struct Bundle {
    catalog: Catalog,
    files: Arc<Files>,
}

/// The files of a bundle, whose tensors follow each other.
struct Files(Vec<Arc<ModelFile>>);

impl TensorSource for Files {
    fn read_tensor(&self, tensor_idx: usize, offset: u64, buf: &mut [u8]) -> std::io::Result<()> {
        let mut idx = tensor_idx;
        for file in &self.0 {
            let n_tensors = file.catalog().tensors().len();
            if idx < n_tensors {
                return file.read_at(idx, offset, buf);
            }
            idx -= n_tensors;
        }
        Err(std::io::Error::new(std::io::ErrorKind::InvalidInput, "the adapters have no such tensor"))
    }
}

impl Bundle {
    /// Opens adapters of `model`.
    ///
    /// # Errors
    /// If one is no adapter for the model.
    pub(crate) fn open(model: &Catalog, adapters: &[AdapterFile]) -> Result<Self, ModelError> {
        let mut files = Vec::new();
        for AdapterFile { path, .. } in adapters {
            let file = Arc::new(ModelFile::open(path)?);
            check_adapter(model, file.catalog())
                .map_err(|source| ModelError::Adapter { path: path.clone(), source })?;
            files.push(file);
        }
        let given: Vec<_> = files.iter().zip(adapters).map(|(file, wanted)| (file.catalog(), wanted.scale)).collect();
        let catalog = bundle_adapters(model, &given).map_err(ModelError::Adapters)?;
        Ok(Self { catalog, files: Arc::new(Files(files)) })
    }

    /// What of them a stage of the model needs; `None` if nothing.
    ///
    /// # Errors
    /// As [`AdapterView::new`].
    pub(crate) fn cut(&self, model: &Catalog, stage: &StageView) -> Result<Option<StageAdapter>, AdapterError> {
        let view = AdapterView::new(&self.catalog, model, stage)?;
        Ok(view.map(|view| StageAdapter { view, source: Arc::clone(&self.files) as Arc<dyn TensorSource> }))
    }

    /// Whether they change the model's head, which a deployment that generates no text does not have.
    pub(crate) fn adapt_the_head(&self) -> bool {
        let of_head = |name: &str| name.split_once('.').is_some_and(|(_, name)| name == "output.weight.lora_a");
        self.catalog.tensors().iter().any(|tensor| of_head(&tensor.name))
    }

    /// Adds what they take to what the model costs for text.
    pub(crate) fn add_to(&self, profile: &mut ModelProfile, model: &Catalog) {
        // They were checked when they were opened.
        let Ok((layers, head)) = adapter_bytes(&self.catalog, model, profile.n_layers()) else { return };
        profile.layer_bytes.iter_mut().zip(layers).for_each(|(all, own)| *all += own);
        profile.head_bytes += head;
    }
}

impl Adapters {
    /// Opens adapters of `model` and hashes them; the hashes are kept in `state_dir`.
    ///
    /// # Errors
    /// If one is no adapter for the model.
    pub(crate) fn open(model: &Catalog, adapters: &[AdapterFile], state_dir: &Path) -> Result<Self, ModelError> {
        let bundle = Bundle::open(model, adapters)?;
        let (mut hashes, mut names) = (Vec::new(), Vec::new());
        for (file, AdapterFile { path, scale }) in bundle.files.0.iter().zip(adapters) {
            let manifest = manifest(file, &file.catalog().header_hash(), state_dir, &|_, _| {});
            let manifest = manifest.map_err(|source| ModelError::Read { path: path.clone(), source })?;
            hashes.extend(manifest.tensors);
            let name = path.file_stem().map(|stem| stem.to_string_lossy().into_owned()).unwrap_or_default();
            names.push(if *scale == 1.0 { name } else { format!("{name}:{scale}") });
        }
        let manifest = Manifest { tensors: hashes };
        let id = Hash::from_bytes(*model_id(&bundle.catalog.header_hash(), &manifest).as_bytes());
        Ok(Self { bundle, hashes: manifest.tensors, id, names })
    }

    /// What they are, scales and bytes.
    pub(crate) fn id(&self) -> Hash {
        self.id
    }

    /// Their names for people, with the scale of those that are scaled.
    pub(crate) fn names(&self) -> &[String] {
        &self.names
    }

    /// What workers need to know of them.
    pub(crate) fn to_ref(&self) -> AdapterRef {
        AdapterRef { id: self.id, header: self.bundle.catalog.header_bytes(true), tensors: self.hashes.clone() }
    }

    /// Their tensors, for those who ask for them.
    pub(crate) fn stock(&self) -> Stock {
        Stock::new(Arc::clone(&self.bundle.files) as Arc<dyn TensorSource>, &self.bundle.catalog, &self.hashes)
    }

    /// The same without hashes and names.
    pub(crate) fn bundle(&self) -> &Bundle {
        &self.bundle
    }
}

/// The adapter of a stage.
pub struct StageAdapter {
    /// What of the adapters the stage needs.
    pub view: AdapterView,
    /// Their tensors.
    pub source: Arc<dyn TensorSource>,
}

impl StageAdapter {
    /// As the engine loads it.
    pub(crate) fn into_source(self) -> AdapterSource {
        let Self { view, source } = self;
        AdapterSource {
            reader: Box::new(view.reader(source)),
            n_bytes: view.n_bytes(),
            weight_bytes: view.weight_bytes(),
            scale: view.scale(),
        }
    }
}

/// What a model with these adapters is known by where it is served: the hash of its header if there are none.
pub(crate) fn served_hash(header_hash: Hash, adapters: Option<&Adapters>) -> Hash {
    let Some(adapters) = adapters else { return header_hash };
    let mut hasher = blake3::Hasher::new_derive_key(SERVED_CONTEXT);
    hasher.update(header_hash.as_bytes());
    hasher.update(adapters.id.as_bytes());
    Hash::from_bytes(*hasher.finalize().as_bytes())
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use brigade_base::KvTypes;
    use brigade_gguf::{Builder, GgmlType, Metadata};

    use super::*;
    use crate::LocalModel;

    fn write(path: &Path, value: u8) {
        let mut metadata = Metadata::new();
        for (key, value) in [("general.architecture", "llama"), ("general.type", "adapter"), ("adapter.type", "lora")] {
            metadata.set(key, value);
        }
        let mut builder = Builder::new(&metadata);
        builder.tensor("blk.3.attn_q.weight.lora_a", &[256, 2], GgmlType::F32).unwrap();
        builder.tensor("blk.3.attn_q.weight.lora_b", &[2, 256], GgmlType::F32).unwrap();
        let fill = |_: usize, _: u64, bytes: &mut [u8]| {
            bytes.fill(value);
            Ok(())
        };
        builder.write(&mut File::create(path).unwrap(), fill).unwrap();
    }

    #[test]
    fn a_model_is_another_one_with_other_adapters_or_scales() {
        let dir = tempfile::tempdir().unwrap();
        let [one, other] = ["one.gguf", "other.gguf"].map(|name| dir.path().join(name));
        write(&one, 1);
        write(&other, 2);
        let abacus = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/abacus-f16.gguf");
        let open = |adapters: &[(&PathBuf, f32)]| {
            let model = LocalModel::open(&abacus, dir.path(), &|_, _| {}).unwrap();
            let files: Vec<_> =
                adapters.iter().map(|(path, scale)| AdapterFile { path: (*path).clone(), scale: *scale }).collect();
            model.with_adapters(&files, dir.path())
        };
        let plain = open(&[]).unwrap();
        assert_eq!(plain.served_hash(), plain.header_hash());
        let sets: [&[(&PathBuf, f32)]; 5] =
            [&[], &[(&one, 1.0)], &[(&one, 0.5)], &[(&other, 1.0)], &[(&one, 1.0), (&other, 1.0)]];
        let hashes = sets.map(|adapters| open(adapters).unwrap().served_hash());
        for (i, hash) in hashes.iter().enumerate() {
            assert!(!hashes[..i].contains(hash), "set {i}");
        }
        assert_eq!(open(sets[1]).unwrap().served_hash(), hashes[1]);

        let adapted = open(sets[2]).unwrap();
        let kv = KvTypes::default();
        let more = adapted.profile(kv).layer_bytes[3] - plain.profile(kv).layer_bytes[3];
        assert_eq!(more, 2 * 4 * 2 * 256);
        let adapters = adapted.adapters().unwrap();
        assert_eq!(adapters.names(), ["one:0.5"]);
        let told = adapters.to_ref();
        assert_eq!(told.tensors.len(), Catalog::parse_header(&told.header).unwrap().tensors().len());
        let missing = open(&[(&dir.path().join("missing.gguf"), 1.0)]);
        assert!(matches!(missing, Err(ModelError::File(_))));
        let wrong = open(&[(&abacus, 1.0)]);
        assert!(matches!(wrong, Err(ModelError::Adapter { source: AdapterError::NotAnAdapter { .. }, .. })));
    }
}
