//! Writes a tiny model by its recipe: libllama says which tensors belong to the metadata, their values come from their
//! names and a seed.
//!
//! Values keep activations near 1 at any depth: norms and scales around 1, matrices by their fan-in, small biases,
//! decays of recurrent layers in the range of trained ones. So logits differ from token to token, and a wrong layer
//! shows.

use std::io::{self, BufWriter, Write};
use std::path::Path;

use brigade_engine::{TensorShape, quantize_rows, tensor_shapes};
use brigade_gguf::{Builder, GgmlType, Metadata};

use super::recipe::Recipe;
use crate::failure::{Failure, Outcome};
use crate::random::Random;

/// Parts of names of matrices that stay floats, as llama.cpp's quantiser and converters leave them.
const FLOATS: [&str; 17] = [
    "norm",
    "ffn_gate_inp",
    "altup",
    "laurel",
    "per_layer_model_proj",
    "position_embd",
    "token_types",
    "conv1d",
    "shortconv.conv",
    "ssm_a",
    "ssm_d",
    "time_mix_",
    "channel_mix_lerp",
    "attn_rel_b",
    "hc_",
    "_ape",
    "conv_base",
];

/// One model to write.
#[derive(Debug, Clone, Copy)]
pub struct Tiny<'a> {
    pub recipe: &'a Recipe,
    pub n_layers: u32,
    /// The type of matrices; where rows are no whole blocks of it, [`FALLBACK`].
    pub ty: GgmlType,
    pub seed: u64,
}

/// The type of matrices whose rows do not fit the chosen one.
const FALLBACK: GgmlType = GgmlType::F16;

struct Tensor {
    shape: TensorShape,
    ty: GgmlType,
}

impl Tiny<'_> {
    /// Writes the model to `out`.
    pub fn write(&self, out: &Path) -> Outcome {
        let metadata = self.recipe.metadata(self.n_layers);
        let tensors = self.tensors(&metadata)?;
        let mut builder = Builder::new(&metadata);
        for tensor in &tensors {
            builder.tensor(&tensor.shape.name, &tensor.shape.dims, tensor.ty).map_err(Failure::said)?;
        }
        let failed = Failure::io(format!("{} cannot be written", out.display()));
        let mut current = None;
        let fill = |idx: usize, offset: u64, bytes: &mut [u8]| {
            if current.as_ref().is_none_or(|(of, _)| *of != idx) {
                current = Some((idx, tensors[idx].bytes(self.seed).map_err(io::Error::other)?));
            }
            let Some((_, all)) = &current else { return Ok(()) };
            bytes.copy_from_slice(&all[offset as usize..offset as usize + bytes.len()]);
            Ok(())
        };
        std::fs::File::create(out)
            .map(BufWriter::new)
            .and_then(|mut file| builder.write(&mut file, fill).and_then(|()| file.flush()))
            .map_err(failed)
    }

    fn tensors(&self, metadata: &Metadata) -> Outcome<Vec<Tensor>> {
        let header = Builder::new(metadata).header_bytes();
        let mut tensors: Vec<Tensor> = Vec::new();
        for shape in tensor_shapes(&header).map_err(Failure::said)? {
            let name = &shape.name;
            // Factors of scaled quantisations that no model with plain types has.
            let is_factor = name.ends_with(".scale") || name.ends_with(".input_scale");
            let is_left_out = |part: &&str| name == part || (part.starts_with('.') && name.ends_with(*part));
            let is_left_out = self.recipe.without.iter().any(is_left_out);
            // A tensor with two uses is asked for twice.
            let is_known = tensors.iter().any(|tensor| tensor.shape.name == *name);
            if !is_factor && !is_left_out && !is_known {
                tensors.push(Tensor { ty: self.type_of(&shape), shape });
            }
        }
        Ok(tensors)
    }

    fn type_of(&self, shape: &TensorShape) -> GgmlType {
        if shape.name.contains("tid2eid") {
            return GgmlType::I32;
        }
        let keeps_floats = shape.dims.len() < 2
            || !shape.name.ends_with(".weight")
            || FLOATS.iter().any(|part| shape.name.contains(part));
        if keeps_floats {
            return GgmlType::F32;
        }
        // gpt-oss is published with experts in MXFP4 and all else in floats.
        let ty = match self.ty {
            GgmlType::MXFP4 if !shape.name.contains("_exps") => GgmlType::Q8_0,
            ty => ty,
        };
        if shape.dims[0].is_multiple_of(ty.n_block_elements()) { ty } else { FALLBACK }
    }
}

/// Middle and half width of the values of a tensor.
fn range_of(shape: &TensorShape) -> (f32, f32) {
    let name = shape.name.as_str();
    let has = |part: &str| name.contains(part);
    match () {
        // The step of a state space passes `softplus`: 0.02 to 0.3.
        () if has("ssm_dt.bias") => (-2.5, 1.3),
        () if has("ssm_a") => (-2.0, 1.5),
        () if name.ends_with(".bias") => (0.0, 0.1),
        () if has("norm") || has("ssm_d") || has("layer_output_scale") || has("gamma") || has("ffn.act") => (1.0, 0.3),
        () if has("rope_f") => (1.5, 0.5),
        () if has("time_mix_decay.") || has("time_mix_w0") => (-1.0, 1.0),
        () if has("lerp") || has("time_mix_k_a") || has("time_mix_k_k") => (0.5, 0.5),
        () if has("hc_") && has("_scale") => (0.5, 0.2),
        () if shape.dims.len() < 2 => (0.0, 0.5),
        // Uniform in +-1.7/sqrt(n) has deviation 1/sqrt(n), so that a product with n values of size 1 has size 1.
        () => (0.0, 1.7 / (shape.dims[0] as f32).sqrt()),
    }
}

impl Tensor {
    fn bytes(&self, seed: u64) -> Result<Vec<u8>, brigade_engine::TensorError> {
        let n = self.shape.dims.iter().product::<u64>() as usize;
        // FNV-1a over the name.
        let hash = |h: u64, b: u8| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3);
        let mut random = Random::new(self.shape.name.bytes().fold(0xcbf2_9ce4_8422_2325 ^ seed, hash));
        if self.ty == GgmlType::I32 {
            return Ok((0..n).flat_map(|_| (random.within(0, 4) as i32).to_le_bytes()).collect());
        }
        let (middle, half) = range_of(&self.shape);
        let uniform = |random: &mut Random| (random.next() >> 40) as f32 / (1 << 23) as f32 - 1.0;
        let values: Vec<f32> = (0..n).map(|_| middle + half * uniform(&mut random)).collect();
        quantize_rows(self.ty.id(), &values, self.shape.dims[0] as usize)
    }
}
