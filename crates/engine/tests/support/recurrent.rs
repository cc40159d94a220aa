//! Tiny random models whose layers keep a state: one of each kind of state that libllama computes.
//!
//! A model is its metadata; libllama says which tensors it wants for that. Values follow from their tensors' names.
#![allow(dead_code, reason = "each test binary uses a part")]

use std::fs::File;
use std::path::Path;

use brigade_engine::{TensorShape, quantize_rows, tensor_shapes};
use brigade_gguf::{Array, Builder, GgmlType, Metadata, Value};

/// Tokens of the vocabulary, if the metadata brings none.
pub const N_VOCAB: usize = 96;

/// One of each kind of state: selective scans of both generations, gated delta nets with a decay for each head and for
/// each channel, short convolutions, and linear attention; alone, beside attention in each layer, and in turns with it.
/// None is a mixture of experts, whose routing has other bits for a row alone than for one of more.
pub const ALL: [&str; 9] =
    ["mamba", "mamba2", "jamba", "falcon-h1", "granitehybrid", "qwen35", "kimi-linear", "lfm2", "rwkv6"];

/// Layers that attend, every fourth; the others keep a state.
const TURNS: [u32; 8] = [0, 0, 2, 0, 0, 0, 2, 0];

fn pattern(n: u32) -> Value {
    Array::of_u32(&TURNS.map(|layer| if layer > 0 { n } else { 0 })).into()
}

/// Metadata of a model of `arch` with 8 layers, beside what `base` says of vocabulary and texts.
pub fn metadata(arch: &str, base: &Metadata) -> Metadata {
    let mut all = base.filtered(|key, _| key.starts_with("tokenizer."));
    all.set("general.architecture", arch);
    if all.get("tokenizer.ggml.model").is_none() {
        all.set("tokenizer.ggml.model", "no_vocab");
        all.set(format!("{arch}.vocab_size"), N_VOCAB as u32);
    }
    let mut set = |key: &str, value: Value| all.set(format!("{arch}.{key}"), value);
    let is_pure = matches!(arch, "mamba" | "mamba2" | "rwkv6");
    for (key, n) in [("block_count", 8u32), ("context_length", 1024), ("embedding_length", 128)] {
        set(key, n.into());
    }
    set("feed_forward_length", if matches!(arch, "mamba" | "mamba2") { 0u32 } else { 192 }.into());
    set("attention.head_count", if is_pure { 0u32 } else { 4 }.into());
    set("attention.head_count_kv", if is_pure { 0u32 } else { 2 }.into());
    set("attention.layer_norm_rms_epsilon", 1e-5f32.into());
    set("attention.layer_norm_epsilon", 1e-5f32.into());
    let ssm = |inner: u32, state: u32, rank: u32, groups: u32| {
        let ssm = [("conv_kernel", 4), ("inner_size", inner), ("state_size", state), ("time_step_rank", rank)];
        ssm.into_iter().chain([("group_count", groups)]).filter(|(_, n)| *n > 0)
    };
    let ssm: Vec<(&str, u32)> = match arch {
        "mamba" | "jamba" => ssm(256, 16, 8, 0).collect(),
        "mamba2" | "falcon-h1" | "granitehybrid" => ssm(256, 32, 8, 2).collect(),
        "qwen35" => ssm(128, 32, 4, 2).collect(),
        "kimi-linear" => vec![("conv_kernel", 4)],
        _ => vec![],
    };
    for (key, n) in ssm {
        set(&format!("ssm.{key}"), n.into());
    }
    if matches!(arch, "jamba" | "granitehybrid" | "lfm2") {
        set("attention.head_count_kv", pattern(2));
    }
    match arch {
        "granitehybrid" => {
            set("attention.scale", 0.18f32.into());
            set("logit_scale", 1.0f32.into());
            set("residual_scale", 1.0f32.into());
            set("embedding_scale", 2.0f32.into());
        }
        "qwen35" => set("rope.dimension_sections", Array::of_u32(&[6, 5, 5, 0]).into()),
        "kimi-linear" => {
            set("attention.head_count_kv", pattern(1));
            for (key, n) in [("kv_lora_rank", 64u32), ("key_length", 80), ("value_length", 64)] {
                set(&format!("attention.{key}"), n.into());
            }
            set("attention.key_length_mla", 48u32.into());
            set("attention.value_length_mla", 32u32.into());
            set("rope.dimension_count", 16u32.into());
            set("kda.head_dim", 32u32.into());
            // It wants to have experts, and then has none.
            for (key, n) in [("count", 4u32), ("used_count", 2), ("feed_forward_length", 64), ("shared_count", 1)] {
                set(&format!("expert_{key}"), n.into());
            }
            set("leading_dense_block_count", 8u32.into());
            set("expert_gating_func", 2u32.into());
            set("expert_weights_scale", 1.5f32.into());
        }
        "lfm2" => set("shortconv.l_cache", 3u32.into()),
        "rwkv6" => {
            set("wkv.head_size", 32u32.into());
            set("time_mix_extra_dim", 32u32.into());
            set("time_decay_extra_dim", 32u32.into());
        }
        _ => {}
    }
    all
}

/// Writes the model that `metadata` describes to `path`, matrices in Q8_0.
pub fn write(metadata: &Metadata, path: &Path) {
    let header = Builder::new(metadata).header_bytes();
    let mut shapes: Vec<TensorShape> = Vec::new();
    for shape in tensor_shapes(&header).unwrap() {
        let name = &shape.name;
        // Factors of scaled quantisations, and projections of queries that are there whole already.
        let is_odd = name.ends_with(".scale") || name.ends_with("input_scale") || name.contains("attn_q_a");
        let is_odd = is_odd || name.contains("attn_q_b") || name.contains("attn_kv_b") || name.contains("rope_freqs");
        if !is_odd && shapes.iter().all(|other| other.name != *name) {
            shapes.push(shape);
        }
    }
    let mut builder = Builder::new(metadata);
    for shape in &shapes {
        builder.tensor(&shape.name, &shape.dims, ty(shape)).unwrap();
    }
    let mut current = (usize::MAX, Vec::new());
    let fill = |idx: usize, offset: u64, bytes: &mut [u8]| {
        if current.0 != idx {
            current = (idx, values(&shapes[idx]));
        }
        bytes.copy_from_slice(&current.1[offset as usize..offset as usize + bytes.len()]);
        Ok(())
    };
    builder.write(&mut File::create(path).unwrap(), fill).unwrap();
}

/// Only products of whole matrices are stored in blocks.
fn ty(shape: &TensorShape) -> GgmlType {
    const FLOATS: [&str; 5] = ["norm", "ffn_gate_inp", "conv", "time_mix_", "lerp"];
    let is_matrix = shape.dims.len() > 1 && shape.name.ends_with(".weight") && shape.dims[0].is_multiple_of(32);
    let keeps_floats = FLOATS.iter().any(|part| shape.name.contains(part));
    if is_matrix && !keeps_floats { GgmlType::Q8_0 } else { GgmlType::F32 }
}

/// Values that keep activations near 1: decays in the range of trained ones, norms around 1, matrices by their fan-in.
fn values(shape: &TensorShape) -> Vec<u8> {
    let name = shape.name.as_str();
    let (middle, spread) = match name {
        _ if name.contains("ssm_dt.bias") => (-2.5, 1.3),
        _ if name.ends_with("ssm_a") => (-2.0, 1.5),
        _ if name.contains("time_mix_decay.") => (-1.0, 1.0),
        _ if name.contains("lerp") => (0.5, 0.5),
        _ if name.ends_with(".bias") => (0.0, 0.1),
        _ if name.contains("norm") || name.contains("ssm_d") => (1.0, 0.3),
        _ => (0.0, 1.7 / (shape.dims[0] as f32).sqrt()),
    };
    let hash = |h: u64, b: u8| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3);
    let mut state = name.bytes().fold(0xcbf2_9ce4_8422_2325u64, hash);
    let n: u64 = shape.dims.iter().product();
    let values: Vec<f32> = (0..n)
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            middle + spread * ((state >> 40) as f32 / (1 << 23) as f32 - 1.0)
        })
        .collect();
    quantize_rows(ty(shape).id(), &values, shape.dims[0] as usize).unwrap()
}
