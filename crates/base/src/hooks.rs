//! Where a stage enters and leaves the graph that libllama makes of its layers, and what that graph is told.

use serde::{Deserialize, Serialize};

/// What makes a graph of some layers compute what they do in the whole model. The default is nothing: the graph of a
/// whole model needs none of it.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Hooks {
    /// Name of the graph node, shape `[n_rows, n_embd]`, whose value is replaced by the given hidden states, for
    /// graphs that change them first; with a `+` behind it, the first sum of that node and another one. `None` for
    /// all others. gemma2's graph multiplies all input rows by `sqrt(n_embd)`, which hidden states already are;
    /// dividing beforehand would round them once more.
    pub input_node: Option<String>,
    /// Whether the graph must look its rows up itself and ends the process over hidden states: it is given tokens then,
    /// any, and the hidden states replace the value of the input node.
    pub looks_up_rows: bool,
    /// Name of the graph node, shape `[n_rows, n_embd]`, at which the pass stops and whose value it yields; with a `+`
    /// behind it, the sum of that node and another one. `None` for the last stage, which yields logits or pools.
    pub stop_node: Option<String>,
    /// Factors that the graph is told, since they depend on the number of layers of the whole model.
    pub layer_scales: Vec<LayerScale>,
}

/// A factor that libllama works out from the number of layers, as it is in the whole model. A stage has fewer layers,
/// so its graph is told.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LayerScale {
    /// Where layers multiply by it, each once: in the graph node with this name, a dash and the layer's number, in the
    /// node that scales that one, or in a node that scales the input of the graph with just this name.
    pub node: String,
    /// What it is in the whole model for each layer that multiplies by it, in their order.
    pub factors: Vec<f32>,
}
