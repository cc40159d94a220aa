//! Factors in a model's graph that depend on how many layers it has.

use serde::{Deserialize, Serialize};

/// A factor that libllama works out from the number of layers, as it is in the whole model. A stage has fewer layers,
/// so its graph is told.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LayerScale {
    /// Each layer multiplies by the factor once: in the graph node with this name, a dash and the layer's number, or in
    /// the node that scales that one.
    pub node: String,
    /// What it is in the whole model.
    pub factor: f32,
}
