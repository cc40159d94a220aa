//! What a model costs, by its header or by its name.

use std::sync::Arc;

use brigade_base::KvTypes;
use brigade_gguf::{Architecture, Catalog, ModelFile};
use brigade_node::{PoolingChoice, Work, model_profile};
use brigade_plan::ModelProfile;
use brigade_plan::catalogue::models::{self, Quant};
use brigade_store::ModelSource;

use crate::args::PlanArgs;
use crate::error::Failure;
use crate::sources;

/// Tokens of a session that models of the catalogue are taken to be trained for: what most of them are.
const SHAPE_CONTEXT: u32 = 131_072;

/// How the weights of a model that is given by name are stored, where nobody says.
const QUANT: Quant = Quant::Q4_K_M;

/// A model to plan for.
pub struct Model {
    /// For people.
    pub name: String,
    /// How its weights are stored.
    pub quantisation: String,
    /// What is done with it.
    pub work: Work,
    /// What it costs with keys and values stored as `kv` says, where that is done with it.
    pub profile: ModelProfile,
    /// How they are stored.
    pub kv: KvTypes,
    /// Tokens of a session that it was trained for.
    pub trained: u32,
    /// What it was found by.
    pub origin: Origin,
}

/// What a model was found by.
pub enum Origin {
    /// A file here.
    File(Arc<ModelFile>),
    /// A header that was read elsewhere.
    Header(Catalog),
    /// Its name in the catalogue.
    Name(Quant),
}

impl Model {
    /// The model that the arguments name: a place on the network, a file, or a name.
    pub fn find(args: &PlanArgs) -> Result<Self, Failure> {
        let (text, wish) = (args.model.to_str().unwrap_or_default(), (args.pooling, args.kv.types()));
        if !matches!(sources::parse(&args.model)?, ModelSource::Local(_)) {
            let (name, catalog) = sources::look(&args.model, &args.sources, &args.state)?;
            return Self::of(&name, catalog.clone(), Origin::Header(catalog), wish);
        }
        let looks_like_a_path = args.model.components().count() != 1 || text.is_empty() || text.ends_with(".gguf");
        if looks_like_a_path || args.model.exists() {
            let file = Arc::new(ModelFile::open(&args.model).map_err(Failure::run)?);
            let name = args.model.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
            return Self::of(&name, file.catalog().clone(), Origin::File(file), wish);
        }
        let quant = args.quant.unwrap_or(QUANT);
        // The catalogue has models for text alone.
        let work = Work::of_text_model(args.pooling).map_err(Failure::run)?;
        Self::by_name(text, quant, (work, args.kv.types())).map_err(|error| {
            Failure::usage(format!("{text} is no file here, and no model that is known by name: {error}"))
        })
    }

    /// What to say where `quant` was asked for, perhaps by a setting that is always there, and changes nothing.
    pub fn ignored(&self, quant: Option<Quant>) -> Option<String> {
        let quant = quant.filter(|_| !matches!(self.origin, Origin::Name(_)))?;
        Some(format!("--quant {quant} is for models that are given by name; {} is planned for as it is.", self.name))
    }

    /// A model of the catalogue, what is done with it, and how its keys and values are stored.
    pub fn by_name(name: &str, quant: Quant, (work, kv): (Work, KvTypes)) -> Result<Self, models::UnknownModel> {
        let shape = models::shape(name)?;
        Ok(Self {
            name: shape.name.clone(),
            quantisation: quant.to_string(),
            work,
            profile: work.profile(shape.profile(quant, kv)),
            kv,
            trained: SHAPE_CONTEXT,
            origin: Origin::Name(quant),
        })
    }

    /// The same with keys and values stored otherwise, where its heads allow that.
    pub fn with_kv(&self, kv: KvTypes) -> Option<ModelProfile> {
        let profile = match (&self.origin, self.catalog()) {
            (Origin::Name(quant), _) => models::shape(&self.name).ok()?.profile(*quant, kv),
            (_, catalog) => model_profile(catalog?, kv).ok()?,
        };
        Some(self.work.profile(profile))
    }

    fn of(
        file_name: &str,
        catalog: Catalog,
        origin: Origin,
        (pooling, kv): (PoolingChoice, KvTypes),
    ) -> Result<Self, Failure> {
        let profile = model_profile(&catalog, kv).map_err(Failure::run)?;
        let work = Work::of(&catalog, pooling).map_err(Failure::run)?;
        let profile = work.profile(profile);
        let trained = Architecture::of(&catalog).map_err(Failure::run)?.n_ctx_train;
        let name = file_name.strip_suffix(".gguf").unwrap_or(file_name).to_owned();
        let quantisation = catalog.quantisation();
        Ok(Self { name, quantisation, work, profile, kv, trained, origin })
    }

    /// Its header, where it has one.
    pub fn catalog(&self) -> Option<&Catalog> {
        match &self.origin {
            Origin::File(file) => Some(file.catalog()),
            Origin::Header(catalog) => Some(catalog),
            Origin::Name(_) => None,
        }
    }
}
