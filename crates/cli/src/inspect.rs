//! `brigade inspect`: what is in a model file.

use brigade_base::{ByteSize, KvTypes};
use brigade_gguf::{Architecture, Catalog};
use serde::Serialize;

use crate::args::InspectArgs;
use crate::error::Failure;
use crate::{output, sources};

/// What only rules of the architecture tell is `null` of a model that has none, and its lists are empty.
#[derive(Serialize)]
struct Report {
    name: Option<String>,
    architecture: String,
    /// Why Brigade cannot run it, if it cannot.
    unsupported: Option<String>,
    parameters: u64,
    quantisation: String,
    bytes: u64,
    layers: Option<u64>,
    embedding_length: Option<u64>,
    /// Of each layer; none where it does not attend.
    heads: Vec<u32>,
    kv_heads: Vec<u32>,
    vocabulary: Option<u64>,
    context: Option<u64>,
    experts: Option<u32>,
    tied_head: Option<bool>,
    embedding_bytes: Option<u64>,
    head_bytes: Option<u64>,
    bytes_per_layer: Vec<u64>,
    kv_bytes_per_token: Option<u64>,
    /// Bytes that each session keeps beside its KV cache, however long it is.
    state_bytes: Option<u64>,
    cut_points: Vec<u32>,
    /// Why it must stay whole, if it must.
    whole_only: Option<&'static str>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    tensors: Vec<TensorLine>,
}

#[derive(Serialize)]
struct TensorLine {
    name: String,
    dims: Vec<u64>,
    #[serde(rename = "type")]
    type_name: &'static str,
    bytes: u64,
}

/// Prints the report.
pub fn run(args: &InspectArgs) -> Result<(), Failure> {
    let (_, catalog) = sources::look(&args.model, &args.sources, &args.state)?;
    let report = report(&catalog, args.tensors);
    if args.json { output::json(&report) } else { print(&report) }
}

fn report(catalog: &Catalog, with_tensors: bool) -> Report {
    let metadata = catalog.metadata();
    let name = metadata.str("general.architecture").unwrap_or("unknown").to_owned();
    let key = |suffix: &str| metadata.u64(&format!("{name}.{suffix}")).filter(|n| *n > 0);
    let resolved = Architecture::of(catalog);
    let a = resolved.as_ref().ok();
    let tensors = catalog.tensors().iter().filter(|_| with_tensors).map(|t| TensorLine {
        name: t.name.clone(),
        dims: t.dims.clone(),
        type_name: t.ty.name(),
        bytes: t.n_bytes,
    });
    Report {
        name: metadata.str("general.name").map(str::to_owned),
        unsupported: resolved.as_ref().err().map(ToString::to_string),
        parameters: catalog.n_parameters(),
        quantisation: catalog.quantisation(),
        bytes: catalog.weight_bytes(),
        layers: a.map_or_else(|| key("block_count"), |a| Some(a.n_layers.into())),
        embedding_length: a.map_or_else(|| key("embedding_length"), |a| Some(a.n_embd.into())),
        heads: a.map(|a| a.n_head.clone()).unwrap_or_default(),
        kv_heads: a.map(|a| a.n_head_kv.clone()).unwrap_or_default(),
        vocabulary: a.map_or_else(|| key("vocab_size"), |a| Some(a.n_vocab.into())),
        context: key("context_length"),
        experts: a.map(|a| a.n_experts),
        tied_head: a.map(|a| a.tied_head),
        embedding_bytes: a.map(Architecture::embedding_bytes),
        head_bytes: a.map(Architecture::head_bytes),
        bytes_per_layer: catalog.bytes_per_layer(),
        kv_bytes_per_token: a.map(|a| (0..a.n_layers).map(|i| a.kv_bytes_per_token(i, KvTypes::default())).sum()),
        state_bytes: a.map(|a| (0..a.n_layers).map(|i| a.state_bytes(i)).sum()),
        cut_points: a.map(Architecture::cut_points).unwrap_or_default(),
        whole_only: a.and_then(Architecture::why_whole),
        tensors: tensors.collect(),
        architecture: name,
    }
}

/// What is known, else a dash.
fn known(what: Option<impl std::fmt::Display>) -> String {
    what.map_or_else(|| "-".to_owned(), |what| what.to_string())
}

/// A list of numbers in short: `4` where all are equal, and a dash where there is none.
fn short(numbers: &[u32]) -> String {
    match numbers {
        all if all.iter().all(|n| *n == 0) => "-".to_owned(),
        [first, rest @ ..] if rest.iter().all(|n| n == first) => first.to_string(),
        all => all.iter().map(u32::to_string).collect::<Vec<_>>().join(" "),
    }
}

fn print(report: &Report) -> Result<(), Failure> {
    let field = |name: &str, value: &dyn std::fmt::Display| output::line(format_args!("{name:<14} {value}"));
    if let Some(name) = &report.name {
        field("name", name)?;
    }
    field("architecture", &report.architecture)?;
    if let Some(why) = &report.unsupported {
        field("cannot run", why)?;
    }
    field("parameters", &format_args!("{:.2} million", report.parameters as f64 / 1e6))?;
    field("quantisation", &report.quantisation)?;
    field("weights", &ByteSize(report.bytes))?;
    field("layers", &known(report.layers))?;
    field("width", &known(report.embedding_length))?;
    // A layer without heads has none for keys and values, whatever the file says of these.
    match short(&report.heads).as_str() {
        "-" => field("heads", &"-")?,
        heads => field("heads", &format_args!("{heads}, of keys and values {}", short(&report.kv_heads)))?,
    }
    if let Some(n) = report.experts.filter(|n| *n > 0) {
        field("experts", &n)?;
    }
    field("vocabulary", &known(report.vocabulary))?;
    field("trained for", &known(report.context.map(|n| format!("{n} tokens"))))?;
    field("embedding", &known(report.embedding_bytes.map(ByteSize)))?;
    let head = if report.tied_head == Some(true) { " (the embedding itself)" } else { "" };
    field("head", &format_args!("{}{head}", known(report.head_bytes.map(ByteSize))))?;
    let layer = report.bytes_per_layer.iter();
    if let (Some(&least), Some(&most)) = (layer.clone().min(), layer.max()) {
        let range = if least == most {
            ByteSize(most).to_string()
        } else {
            format!("{} to {}", ByteSize(least), ByteSize(most))
        };
        field("per layer", &range)?;
    }
    field("KV cache", &known(report.kv_bytes_per_token.map(|n| format!("{} per token", ByteSize(n)))))?;
    if let Some(n_bytes) = report.state_bytes.filter(|n| *n > 0) {
        field("state", &format_args!("{} per session", ByteSize(n_bytes)))?;
    }
    match report.whole_only {
        Some(why) => field("cut points", &format_args!("none: {why}; it runs whole, on one node"))?,
        None if report.unsupported.is_some() => field("cut points", &"-")?,
        None if report.cut_points.is_empty() => field("cut points", &"none")?,
        None => field("cut points", &spans(&report.cut_points))?,
    }
    report.tensors.iter().try_for_each(|t| {
        let dims = t.dims.iter().map(u64::to_string).collect::<Vec<_>>().join(" x ");
        output::line(format_args!(
            "{:<40} {:<8} {:>20} {:>12}",
            t.name,
            t.type_name,
            dims,
            ByteSize(t.bytes).to_string()
        ))
    })
}

/// Ascending numbers with runs drawn together: `1-7, 10`.
fn spans(numbers: &[u32]) -> String {
    let mut parts: Vec<(u32, u32)> = Vec::new();
    for &n in numbers {
        match parts.last_mut() {
            Some((_, end)) if *end + 1 == n => *end = n,
            _ => parts.push((n, n)),
        }
    }
    let text = |(a, b): &(u32, u32)| if a == b { a.to_string() } else { format!("{a}-{b}") };
    parts.iter().map(text).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_drawn_together() {
        assert_eq!(spans(&[1, 2, 3, 7, 9, 10]), "1-3, 7, 9-10");
        assert_eq!(short(&[4, 4]), "4");
        assert_eq!(short(&[4, 2]), "4 2");
        assert_eq!((short(&[]), short(&[0, 0]), short(&[0, 4])), ("-".into(), "-".into(), "0 4".into()));
        assert_eq!((known(Some(4)), known(None::<u32>)), ("4".into(), "-".into()));
    }
}
