//! Models of real shapes with random weights: as fast and as large as the real ones, and free to make.
//!
//! Weights are normal with deviation `1/sqrt(fan-in)`, norms are one, so activations stay finite at any depth. What
//! costs time is quantising, so it is done once: for each width and type a pool of [`POOL_ROWS`] rows is quantised, and
//! each tensor repeats it from a row of its own, so that no two matrices are equal. Nothing but the pools is held in
//! memory. Since a pool has fewer rows than a vocabulary, logits repeat; greedy choice takes the first of equal ones.
//!
//! The tokenizer is byte-level BPE: control tokens, 256 bytes, one merge, and filler words ` w512`, ` w513`, ... The
//! head's rows of all but the filler are zeros, so that greedy answers have whole words and never end by themselves.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use brigade_base::ByteSize;
use brigade_engine::quantize_rows;
use brigade_gguf::{Array, Builder, GgmlType, Metadata, Value};
use clap::{Args, ValueEnum};

use crate::failure::{Failure, Outcome};
use crate::output::line;
use crate::random::Random;

/// Rows of a pool: a prime, so that it is out of step with heads and vocabularies, and large enough for most tensors to
/// have full rank.
const POOL_ROWS: usize = 1021;

/// Tokens below this are control tokens, bytes and the merge; fillers follow.
const FIRST_FILLER: u32 = 512;

const END_OF_TEXT: u32 = 0;
const TURN_END: u32 = 2;
const CONTROL: [&str; 3] = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"];

/// The chat format of ChatML.
const CHAT_TEMPLATE: &str = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + \
                             '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' \
                             }}{% endif %}";

/// `cargo xtask synth`
#[derive(Debug, Args)]
pub struct SynthArgs {
    /// The shape
    pub shape: Shape,
    /// How weights are stored
    #[arg(long = "type", value_name = "TYPE", ignore_case = true)]
    pub quantisation: Quantisation,
    /// The file to write
    #[arg(value_name = "OUT.gguf")]
    pub out: PathBuf,
    /// Other weights of the same shape
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
}

/// A shape that real models have, or a tiny one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Shape {
    /// 4 layers of width 256, 1024 tokens
    #[value(name = "tiny")]
    Tiny,
    /// 16 layers of width 1536, 32000 tokens
    #[value(name = "llama-0.5b")]
    LlamaHalfB,
    /// 22 layers of width 2048, 32000 tokens
    #[value(name = "tinyllama-1.1b")]
    TinyLlama,
    /// 16 layers of width 2048, 128256 tokens, tied head
    #[value(name = "llama-1b")]
    Llama1b,
    /// 28 layers of width 3072, 128256 tokens, tied head
    #[value(name = "llama-3b")]
    Llama3b,
    /// 32 layers of width 4096, 128256 tokens
    #[value(name = "llama-8b")]
    Llama8b,
}

/// How the weights of a model are stored, as llama.cpp's quantiser mixes types.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Quantisation {
    /// All F16
    #[value(name = "F16")]
    F16,
    /// All Q8_0
    #[value(name = "Q8_0")]
    Q8_0,
    /// Q4_0 with a head in Q6_K
    #[value(name = "Q4_0")]
    Q4_0,
    /// Q4_K with the head and half of the sensitive matrices in Q6_K
    #[value(name = "Q4_K_M")]
    Q4KM,
}

/// Numbers of a shape.
struct Numbers {
    n_embd: u64,
    n_layers: u64,
    n_head: u64,
    n_head_kv: u64,
    n_ff: u64,
    n_vocab: u32,
    n_ctx_train: u32,
    rope_base: f32,
    /// The head is the token embedding.
    tied: bool,
}

impl Shape {
    fn numbers(self) -> Numbers {
        let llama3 = |n_embd, n_layers, n_head, n_ff, tied| Numbers {
            n_embd,
            n_layers,
            n_head,
            n_head_kv: 8,
            n_ff,
            n_vocab: 128_256,
            n_ctx_train: 131_072,
            rope_base: 500_000.0,
            tied,
        };
        let llama2 = |n_embd, n_layers, n_head, n_head_kv, n_ff, n_vocab| Numbers {
            n_embd,
            n_layers,
            n_head,
            n_head_kv,
            n_ff,
            n_vocab,
            n_ctx_train: 2048,
            rope_base: 10_000.0,
            tied: false,
        };
        match self {
            Self::Tiny => llama2(256, 4, 4, 2, 512, 1024),
            Self::LlamaHalfB => llama2(1536, 16, 12, 4, 4096, 32_000),
            Self::TinyLlama => llama2(2048, 22, 32, 4, 5632, 32_000),
            Self::Llama1b => llama3(2048, 16, 32, 8192, true),
            Self::Llama3b => llama3(3072, 28, 24, 8192, true),
            Self::Llama8b => llama3(4096, 32, 32, 14_336, false),
        }
    }
}

impl Quantisation {
    /// llama.cpp's number for the file type.
    fn file_type(self) -> u32 {
        match self {
            Self::F16 => 1,
            Self::Q4_0 => 2,
            Self::Q8_0 => 7,
            Self::Q4KM => 15,
        }
    }

    /// The type of a matrix, as llama.cpp's quantiser chooses it without an importance matrix. `layer` matters for
    /// tensors of layers only.
    fn of(self, name: &str, layer: u64, numbers: &Numbers) -> GgmlType {
        let is_head = name == "output.weight" || (numbers.tied && name == "token_embd.weight");
        let is_sensitive = name.ends_with("attn_v.weight") || name.ends_with("ffn_down.weight");
        let (layer, eighth) = (layer, numbers.n_layers / 8);
        let gets_more = || layer < eighth || layer >= 7 * numbers.n_layers / 8 || (layer - eighth) % 3 == 2;
        match self {
            Self::F16 => GgmlType::F16,
            Self::Q8_0 => GgmlType::Q8_0,
            Self::Q4_0 if is_head => GgmlType::Q6_K,
            Self::Q4_0 => GgmlType::Q4_0,
            Self::Q4KM if is_head || (is_sensitive && gets_more()) => GgmlType::Q6_K,
            Self::Q4KM => GgmlType::Q4_K,
        }
    }
}

/// A value's name on the command line.
pub fn name_of(value: impl ValueEnum) -> String {
    value.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned())
}

/// Writes the model that the arguments name.
pub fn run(args: &SynthArgs) -> Outcome {
    write(args.shape, args.quantisation, args.seed, &args.out)?;
    let n_bytes = std::fs::metadata(&args.out).map_err(Failure::io(args.out.display()))?.len();
    line(format_args!("{}: {}", args.out.display(), ByteSize(n_bytes)))
}

/// Writes a model to `out`, which appears once it is whole.
pub fn write(shape: Shape, quantisation: Quantisation, seed: u64, out: &Path) -> Outcome {
    let numbers = shape.numbers();
    let metadata = metadata(shape, quantisation, &numbers);
    let tensors = tensors(quantisation, &numbers);
    let mut builder = Builder::new(&metadata);
    for tensor in &tensors {
        builder.tensor(&tensor.name, &tensor.dims, tensor.ty).map_err(Failure::said)?;
    }
    let pools = pools(&tensors, seed)?;
    let mut partial = out.as_os_str().to_owned();
    partial.push(".part");
    let failed = |error| Failure::Io { what: format!("{} cannot be written", out.display()), source: error };
    let mut file = BufWriter::new(File::create(&partial).map_err(failed)?);
    let head = if numbers.tied { "token_embd.weight" } else { "output.weight" };
    let fill = |idx: usize, offset: u64, bytes: &mut [u8]| {
        let tensor = &tensors[idx];
        fill(idx, tensor, tensor.name == head, &pools, offset, bytes)
    };
    builder.write(&mut file, fill).and_then(|()| file.flush()).map_err(failed)?;
    drop(file);
    std::fs::rename(&partial, out).map_err(failed)
}

struct Tensor {
    name: String,
    dims: Vec<u64>,
    ty: GgmlType,
}

fn tensors(quantisation: Quantisation, numbers: &Numbers) -> Vec<Tensor> {
    let Numbers { n_embd, n_ff, n_head, n_head_kv, .. } = *numbers;
    let n_kv = n_embd / n_head * n_head_kv;
    let n_vocab = u64::from(numbers.n_vocab);
    let mut all = Vec::new();
    let mut add = |name: String, layer: u64, dims: &[u64]| {
        let ty = if dims.len() == 1 { GgmlType::F32 } else { quantisation.of(&name, layer, numbers) };
        all.push(Tensor { name, dims: dims.to_vec(), ty });
    };
    add("token_embd.weight".to_owned(), 0, &[n_embd, n_vocab]);
    for layer in 0..numbers.n_layers {
        let of_layer: [(&str, &[u64]); 9] = [
            ("attn_norm", &[n_embd]),
            ("attn_q", &[n_embd, n_embd]),
            ("attn_k", &[n_embd, n_kv]),
            ("attn_v", &[n_embd, n_kv]),
            ("attn_output", &[n_embd, n_embd]),
            ("ffn_norm", &[n_embd]),
            ("ffn_gate", &[n_embd, n_ff]),
            ("ffn_up", &[n_embd, n_ff]),
            ("ffn_down", &[n_ff, n_embd]),
        ];
        for (name, dims) in of_layer {
            add(format!("blk.{layer}.{name}.weight"), layer, dims);
        }
    }
    add("output_norm.weight".to_owned(), 0, &[n_embd]);
    if !numbers.tied {
        add("output.weight".to_owned(), 0, &[n_embd, n_vocab]);
    }
    all
}

fn metadata(shape: Shape, quantisation: Quantisation, numbers: &Numbers) -> Metadata {
    let mut metadata = Metadata::new();
    let mut set = |key: &str, value: Value| metadata.set(key, value);
    set("general.architecture", "llama".into());
    set("general.name", format!("random {}", name_of(shape)).as_str().into());
    set("general.file_type", quantisation.file_type().into());
    set("general.quantization_version", 2.into());
    set("llama.vocab_size", numbers.n_vocab.into());
    set("llama.context_length", numbers.n_ctx_train.into());
    for (key, n) in [
        ("embedding_length", numbers.n_embd),
        ("block_count", numbers.n_layers),
        ("feed_forward_length", numbers.n_ff),
        ("attention.head_count", numbers.n_head),
        ("attention.head_count_kv", numbers.n_head_kv),
        ("rope.dimension_count", numbers.n_embd / numbers.n_head),
    ] {
        set(&format!("llama.{key}"), Value::U32(n as u32));
    }
    set("llama.rope.freq_base", numbers.rope_base.into());
    set("llama.attention.layer_norm_rms_epsilon", 1e-5.into());
    let tokens = tokens(numbers.n_vocab);
    let types: Vec<i32> = tokens.iter().map(|(_, ty)| *ty).collect();
    set("tokenizer.ggml.model", "gpt2".into());
    set("tokenizer.ggml.pre", "qwen2".into());
    set("tokenizer.ggml.tokens", Array::of_strings(tokens.iter().map(|(text, _)| text)).into());
    set("tokenizer.ggml.token_type", Array::of_i32(&types).into());
    set("tokenizer.ggml.merges", Array::of_strings(["\u{120} \u{120}"]).into());
    set("tokenizer.ggml.bos_token_id", END_OF_TEXT.into());
    set("tokenizer.ggml.eos_token_id", TURN_END.into());
    set("tokenizer.ggml.add_bos_token", false.into());
    set("tokenizer.chat_template", CHAT_TEMPLATE.into());
    metadata
}

/// Texts and types of all tokens. A filler stands for a word with a space before it.
fn tokens(n_vocab: u32) -> Vec<(String, i32)> {
    /// Type of usual tokens, of control tokens, and of tokens that text never becomes, as llama.cpp numbers them.
    const NORMAL: i32 = 1;
    const CONTROL_TYPE: i32 = 3;
    const UNUSED: i32 = 5;
    let mut all: Vec<(String, i32)> = CONTROL.iter().map(|text| ((*text).to_owned(), CONTROL_TYPE)).collect();
    all.extend((0..=255).map(|byte| (byte_symbol(byte).to_string(), NORMAL)));
    all.push(("\u{120}\u{120}".to_owned(), NORMAL));
    while all.len() < FIRST_FILLER as usize {
        all.push((format!("[unused {}]", all.len()), UNUSED));
    }
    all.extend((FIRST_FILLER..n_vocab).map(|n| (format!("\u{120}w{n}"), NORMAL)));
    all
}

/// The character that stands for `byte` in byte-level BPE: itself if it can be seen, else the next one from U+0100.
fn byte_symbol(byte: u8) -> char {
    let can_be_seen = |byte: u8| matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    if can_be_seen(byte) {
        return char::from(byte);
    }
    let n_before = (0..byte).filter(|byte| !can_be_seen(*byte)).count() as u32;
    char::from_u32(0x100 + n_before).unwrap_or(char::REPLACEMENT_CHARACTER)
}

/// Quantised rows for each width and type.
type Pools = HashMap<(u64, GgmlType), Vec<u8>>;

fn pools(tensors: &[Tensor], seed: u64) -> Outcome<Pools> {
    let mut pools = Pools::new();
    for tensor in tensors {
        let width = tensor.dims[0];
        if pools.contains_key(&(width, tensor.ty)) {
            continue;
        }
        let rows = if tensor.dims.len() == 1 {
            vec![1.0; width as usize]
        } else {
            let mut random = Random::new(seed ^ (width << 32) ^ u64::from(tensor.ty.id()));
            let deviation = 1.0 / (width as f32).sqrt();
            (0..width as usize * POOL_ROWS).map(|_| random.normal() * deviation).collect()
        };
        let bytes = quantize_rows(tensor.ty.id(), &rows, width as usize).map_err(Failure::said)?;
        pools.insert((width, tensor.ty), bytes);
    }
    Ok(pools)
}

/// The bytes of a tensor from `offset` on. In the head the tokens that show no text are never the likeliest, so that
/// every token of an answer can be seen.
fn fill(
    idx: usize,
    tensor: &Tensor,
    is_head: bool,
    pools: &Pools,
    offset: u64,
    mut bytes: &mut [u8],
) -> io::Result<()> {
    let pool = pools.get(&(tensor.dims[0], tensor.ty)).ok_or(io::ErrorKind::NotFound)?;
    let row_bytes = tensor.ty.row_bytes(tensor.dims[0]).ok_or(io::ErrorKind::InvalidData)? as usize;
    let mut offset = offset as usize;
    if is_head {
        // In all types used here, a block of zero bytes holds zeros.
        let n_zeros = (FIRST_FILLER as usize * row_bytes).saturating_sub(offset).min(bytes.len());
        let (zeros, rest) = bytes.split_at_mut(n_zeros);
        zeros.fill(0);
        offset += n_zeros;
        bytes = rest;
    }
    // A step that is coprime to the number of rows gives each tensor a start of its own.
    let mut at = (idx * 97 % POOL_ROWS * row_bytes + offset) % pool.len();
    while !bytes.is_empty() {
        let n = bytes.len().min(pool.len() - at);
        let (now, later) = bytes.split_at_mut(n);
        now.copy_from_slice(&pool[at..at + n]);
        bytes = later;
        at = 0;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::whole::Whole;
    use brigade_engine::Vocabulary;
    use brigade_gguf::{Architecture, ModelFile};

    #[test]
    fn each_type_loads_and_answers_with_whole_words() {
        let dir = tempfile::tempdir().unwrap();
        for quantisation in Quantisation::value_variants() {
            let path = dir.path().join(name_of(*quantisation));
            write(Shape::Tiny, *quantisation, 1, &path).unwrap();
            let file = ModelFile::open(&path).unwrap();
            let architecture = Architecture::of(file.catalog()).unwrap();
            assert_eq!((architecture.n_layers, architecture.n_vocab), (4, 1024));
            let mut whole = Whole::open(&path, 1, 256, 1).unwrap();
            let generated = whole.generate(&[vec![600, 700, 800]], 16, false).unwrap();
            let answer = &generated.answers[0];
            assert_eq!(answer.len(), 16);
            assert!(answer.iter().all(|token| *token >= FIRST_FILLER as i32), "{answer:?}");
            assert_eq!(whole.text(answer).matches(" w").count(), 16);
        }
    }

    #[test]
    fn text_survives_the_tokenizer() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("model.gguf");
        write(Shape::Tiny, Quantisation::Q8_0, 1, &path).unwrap();
        let file = File::open(&path).unwrap();
        let n_bytes = file.metadata().unwrap().len();
        let vocabulary = Vocabulary::load(Box::new(file), n_bytes).unwrap();
        let text = "Hello,  w\u{f6}rld!\n\u{1f980}\u{0}\u{7f}";
        let tokens = vocabulary.tokenize(text, true, true).unwrap();
        let back: Vec<u8> = tokens.iter().flat_map(|token| vocabulary.token_bytes(*token, true)).collect();
        assert_eq!(back, text.as_bytes());
        let chat = vocabulary.tokenize("<|im_start|>user\nw<|im_end|>", true, true).unwrap();
        assert_eq!((chat[0], chat[chat.len() - 1]), (1, TURN_END as i32));
        assert!(vocabulary.is_end(TURN_END as i32) && vocabulary.is_end(END_OF_TEXT as i32));
    }

    #[test]
    fn seeds_and_layers_differ() {
        let dir = tempfile::tempdir().unwrap();
        let bytes_of = |seed| {
            let path = dir.path().join("model.gguf");
            write(Shape::Tiny, Quantisation::Q4_0, seed, &path).unwrap();
            let file = ModelFile::open(&path).unwrap();
            let read = |name: &str| {
                let idx = file.catalog().tensor_idx(name).unwrap();
                let mut bytes = vec![0; 256];
                file.read_at(idx, 0, &mut bytes).unwrap();
                bytes
            };
            [read("blk.0.attn_q.weight"), read("blk.1.attn_q.weight")]
        };
        let (one, other) = (bytes_of(1), bytes_of(2));
        assert_eq!(one, bytes_of(1));
        assert!(one[0] != one[1] && one[0] != other[0]);
    }

    #[test]
    fn the_mix_of_types_is_that_of_llama_cpp() {
        let numbers = Shape::TinyLlama.numbers();
        let of = |name: &str, layer| Quantisation::Q4KM.of(name, layer, &numbers);
        let more: Vec<u64> = (0..22).filter(|l| of("blk.0.ffn_down.weight", *l) == GgmlType::Q6_K).collect();
        assert_eq!(more, [0, 1, 4, 7, 10, 13, 16, 19, 20, 21]);
        assert_eq!(of("blk.0.attn_k.weight", 0), GgmlType::Q4_K);
        assert_eq!((of("output.weight", 0), of("token_embd.weight", 0)), (GgmlType::Q6_K, GgmlType::Q4_K));
        assert_eq!(Quantisation::Q4_0.of("token_embd.weight", 0, &Shape::Llama1b.numbers()), GgmlType::Q6_K);
    }
}
