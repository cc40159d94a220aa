//! How fast a device would be, by what its data sheet says: a roofline.
//!
//! A layer takes as long as reading its weights, or as computing with them, whichever is longer, and a little beside
//! that. Real kernels reach a share of what a data sheet promises. That share is taken from the device's own published
//! measurements where the catalogue has some, else it is that of its kind; the constants below say where theirs come
//! from. "Discussion 4167", "15013" and "10879" are those of llama.cpp; all are about Llama 2 7B in Q4_0 unless said
//! otherwise. Layers of 7B in Q4_0 and its head are 3.75e9 bytes.

use brigade_base::ByteSize;
use serde::{Deserialize, Serialize};

use super::models::{self, Quant};
use crate::profile::{MAX_SECONDS, at_most};
use crate::{Curve, ModelProfile, Speed, SpeedSource};

/// Decode rows that a curve has points for: as many as kernels change their behaviour at, up to the sessions of a home.
const DECODE_ROWS: [u32; 7] = [1, 2, 4, 8, 16, 32, 64];

/// Rows of chunks that a curve has points for; the schedule makes none larger than 256.
const CHUNK_ROWS: [u32; 8] = [2, 8, 16, 32, 64, 128, 256, 512];

/// Rows of the prompt that `pp512` measures.
const PROMPT_ROWS: f64 = 512.0;

/// Operations that a few rows reach, as a share of what a chunk reaches: kernels for few rows unpack each weight for
/// each row. A Raspberry Pi 5 makes 6.1 tokens of an answer in a second and 15 of a prompt, which is 0.4 at least; two
/// x86 cores made 27 for 8 sessions and 97 of a prompt.
const FEW_ROWS_SHARE: f64 = 0.4;

/// Of the bandwidth that weights reach, what the KV cache reaches: heads are short and rows few. Without flash
/// attention it was 0.26 on an RTX 3090 (8B in Q4_K_M, 115 tokens a second over 512 tokens, 87 over 8192; XiongjieDai);
/// with it, kernels come near the whole. Half is between them.
const KV_BANDWIDTH_SHARE: f64 = 0.5;

/// A layer with experts takes so many times the extra time of a dense one: gating, sorting, and a kernel for each part.
/// gpt-oss-20b on an RTX 4090 makes 222 tokens a second (discussion 15396), 1.5 of 4.5 ms beside its bytes, which is 2.
/// DeepSeek R1 in Q4_K_M on an M3 Ultra makes 20.2 (geerlingguy/beowulf-ai-cluster, issue 17), which is 2; Qwen3 30B on
/// a Ryzen AI Max 86 (visorcraft/strix-halo-llm-perf), which is 1.
const EXPERT_LAYER_FACTOR: f64 = 2.0;

/// Shares outside of this range come from wrong numbers, not from kernels. More than all is possible: quantised prompts
/// are multiplied as 8-bit integers, which some cards do twice as fast as FP16.
const EFFICIENCY_RANGE: std::ops::RangeInclusive<f64> = 0.02..=2.0;

/// What kind of device it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// Processor cores with memory beside them.
    Cpu,
    /// A graphics card with memory of its own.
    Gpu,
    /// Graphics that share memory with the processor.
    Unified,
}

/// What kernels on one kind of device reach.
struct Typical {
    decode_efficiency: f64,
    chunk_efficiency: f64,
    layer_s: f64,
    pass_s: f64,
    load_bytes_per_s: f64,
    memory_share: f64,
}

impl Kind {
    /// - CPU. 13900K with DDR5-6400: 18.3 tokens a second are 0.68 of its bandwidth, 55 tokens of a prompt 0.3 of its
    ///   operations (llama.cpp issue 34); Raspberry Pi 5 0.7 and 0.5. A fifth of the memory stays with the system.
    /// - GPU. Discussion 15013: RTX 3060 (75.6 tokens a second at 360 GB/s), 4090 (186 at 1008) and 5090 (290 at 1792)
    ///   are all met to 1 % by 0.85 of the bandwidth and 31 us for a layer. Prompts reach 0.4 of the operations of a
    ///   workstation card; GeForce cards, which sum in FP32 at half the rate, 0.9 to 1.25. A twentieth of the memory is
    ///   for the driver.
    /// - Unified. Discussion 4167: by F16 and Q4_0 of M2, M3 Pro, M4, M4 Max and M2 Ultra it is 0.85 to 0.93 of the
    ///   bandwidth and 130 to 170 us for a layer with the build of 2023; newer ones take about 110. Prompts reach 0.6
    ///   of the operations. The system gives graphics three quarters of the memory.
    ///
    /// A pass takes a stage beside its layers what it takes to wake threads, start kernels and write a frame: between
    /// 100 and 250 us on this project's machines. Files are read as from an NVMe drive of an ordinary machine.
    fn typical(self) -> Typical {
        match self {
            Self::Cpu => Typical {
                decode_efficiency: 0.68,
                chunk_efficiency: 0.35,
                layer_s: 20e-6,
                pass_s: 150e-6,
                load_bytes_per_s: 1.5e9,
                memory_share: 0.8,
            },
            Self::Gpu => Typical {
                decode_efficiency: 0.85,
                chunk_efficiency: 0.45,
                layer_s: 31e-6,
                pass_s: 200e-6,
                load_bytes_per_s: 2e9,
                memory_share: 0.95,
            },
            Self::Unified => Typical {
                decode_efficiency: 0.87,
                chunk_efficiency: 0.6,
                layer_s: 110e-6,
                pass_s: 250e-6,
                load_bytes_per_s: 3e9,
                memory_share: 0.75,
            },
        }
    }
}

/// Tokens a second that somebody measured on a device.
#[derive(Debug, Clone, PartialEq)]
pub struct Measured {
    /// The model, by its name in [`models`].
    pub model: String,
    /// Its quantisation.
    pub quant: Quant,
    /// Tokens of an answer in a second, one stream, llama.cpp's `tg128`.
    pub decode: f64,
    /// Tokens of a prompt in a second, llama.cpp's `pp512`.
    pub prompt: Option<f64>,
    /// Where the numbers come from.
    pub source: String,
}

/// What is known of a device.
#[derive(Debug, Clone, PartialEq)]
pub struct Device {
    /// Its name.
    pub name: String,
    /// The same for people.
    pub title: String,
    /// What it is.
    pub kind: Kind,
    /// Sizes in which it is sold, the smallest first.
    pub memory: Vec<ByteSize>,
    /// Bytes that its memory moves in a second, by data sheet.
    pub bandwidth: f64,
    /// Operations in a second, by data sheet: dense, FP16.
    pub flops: f64,
    /// Watts under load.
    pub watts: Option<f64>,
    /// Bytes of weights that it loads in a second.
    pub load_bytes_per_s: f64,
    /// What others measured.
    pub measured: Vec<Measured>,
    source: String,
    /// Share of the bandwidth that decode rows reach.
    decode_efficiency: f64,
    /// Share of the operations that chunks reach.
    chunk_efficiency: f64,
    /// Seconds of a dense layer beside reading and computing.
    layer_s: f64,
}

impl Device {
    /// A device that is in no catalogue, by its kind, bytes in a second and operations in a second.
    pub fn custom(name: &str, kind: Kind, bandwidth: f64, flops: f64) -> Self {
        let typical = kind.typical();
        Self {
            name: name.to_owned(),
            title: name.to_owned(),
            kind,
            memory: Vec::new(),
            bandwidth,
            flops,
            watts: None,
            load_bytes_per_s: typical.load_bytes_per_s,
            measured: Vec::new(),
            source: String::new(),
            decode_efficiency: typical.decode_efficiency,
            chunk_efficiency: typical.chunk_efficiency,
            layer_s: typical.layer_s,
        }
    }

    /// Where all its numbers come from: the data sheet first, then measurements.
    pub fn sources(&self) -> impl Iterator<Item = &str> {
        std::iter::once(self.source.as_str()).chain(self.measured.iter().map(|measured| measured.source.as_str()))
    }

    /// Of so much memory, what a node would give to a model unless it is told otherwise.
    pub fn usable(&self, memory: ByteSize) -> ByteSize {
        ByteSize((memory.0 as f64 * self.kind.typical().memory_share) as u64)
    }

    /// How fast it computes a model: for a mean layer, by rows, the longer of reading and computing.
    pub fn speed(&self, model: &ModelProfile) -> Speed {
        let work = Work::of(model);
        let (bandwidth, flops) = (self.bandwidth * self.decode_efficiency, self.flops * self.chunk_efficiency);
        let layer_s = self.layer_s * if model.n_experts > 0 { EXPERT_LAYER_FACTOR } else { 1.0 };
        let seconds =
            |bytes: f64, weights: f64, rows: f64, flops: f64| (bytes / bandwidth).max(2.0 * weights * rows / flops);
        let layer = |rows: f64, flops: f64| layer_s + seconds(model.read_bytes(rows), work.active_weights, rows, flops);
        let head = |rows: f64| seconds(work.head_bytes, work.head_weights, rows, flops * FEW_ROWS_SHARE);
        let mean_kv = mean(&model.kv_bytes_per_token);
        Speed {
            decode: curve(&DECODE_ROWS, |rows| layer(rows, flops * FEW_ROWS_SHARE)),
            chunk: curve(&CHUNK_ROWS, |rows| layer(rows, flops)),
            head: Some(curve(&DECODE_ROWS, head)),
            pass_s: self.kind.typical().pass_s,
            decode_context_s: mean_kv / (bandwidth * KV_BANDWIDTH_SHARE),
            // A row of a chunk multiplies with a token's key and adds its value; heads together are about as wide as
            // the hidden state.
            chunk_context_s: 4.0 * f64::from(model.n_embd) / (flops * FEW_ROWS_SHARE),
            load_bytes_per_s: self.load_bytes_per_s,
            source: SpeedSource::Device,
        }
        .bounded()
    }

    /// Takes the shares from what was measured on the device, where there is anything: their geometric mean.
    fn calibrate(&mut self) {
        let (mut decode, mut chunk) = (Vec::new(), Vec::new());
        for measured in &self.measured {
            let Ok(model) = models::profile(&measured.model, measured.quant) else { continue };
            let work = Work::of(&model);
            let n_layers = f64::from(model.n_layers());
            let extra_s = n_layers * self.layer_s * if model.n_experts > 0 { EXPERT_LAYER_FACTOR } else { 1.0 };
            let bytes = n_layers * model.read_bytes(1.0) + work.head_bytes;
            decode.push(bytes / self.bandwidth / (1.0 / measured.decode - extra_s));
            if let Some(prompt) = measured.prompt {
                let operations = 2.0 * n_layers * work.active_weights * PROMPT_ROWS;
                chunk.push(operations / self.flops / (PROMPT_ROWS / prompt - extra_s));
            }
        }
        let share = |shares: &[f64], usual: f64| {
            let log = shares.iter().filter(|share| EFFICIENCY_RANGE.contains(*share)).map(|share| share.ln());
            let (sum, n) = log.fold((0.0, 0u32), |(sum, n), log| (sum + log, n + 1));
            if n > 0 { (sum / f64::from(n)).exp() } else { usual }
        };
        self.decode_efficiency = share(&decode, self.decode_efficiency);
        self.chunk_efficiency = share(&chunk, self.chunk_efficiency);
    }
}

/// What computing a model takes, per mean layer.
struct Work {
    /// Weights that a row is multiplied with.
    active_weights: f64,
    /// Bytes and weights of the head's matrix; embedding rows are looked up, which costs nothing.
    head_bytes: f64,
    head_weights: f64,
}

impl Work {
    fn of(model: &ModelProfile) -> Self {
        let n_layers = f64::from(model.n_layers().max(1));
        let bytes = model.layer_bytes.iter().map(|&bytes| bytes as f64).sum::<f64>();
        let expert_bytes = (model.expert_bytes as f64).min(bytes);
        let matrix = f64::from(model.n_vocab) * f64::from(model.n_embd);
        // All weights are counted, those of an embedding beside the head too.
        let matrices = if model.embedding_bytes > 0 { 2.0 } else { 1.0 };
        let layer_weights = (model.n_weights as f64 - matrices * matrix).max(0.0);
        let used = match model.n_experts {
            0 => 1.0,
            n => f64::from(model.n_experts_used) / f64::from(n),
        };
        // Experts have the share of the weights that they have of the bytes.
        let expert_share = if bytes > 0.0 { expert_bytes / bytes } else { 0.0 };
        Self {
            active_weights: layer_weights * (1.0 - expert_share + expert_share * used) / n_layers,
            head_bytes: model.head_bytes as f64,
            head_weights: matrix,
        }
    }
}

fn mean(values: &[u64]) -> f64 {
    values.iter().map(|&value| value as f64).sum::<f64>() / values.len().max(1) as f64
}

/// A curve through these rows. Numbers that are none (a device of 0 bytes in a second) are taken as very slow.
fn curve(rows: &[u32], seconds: impl Fn(f64) -> f64) -> Curve {
    let points = rows.iter().map(|&rows| (rows, at_most(seconds(rows.into()), MAX_SECONDS))).collect();
    // Rows ascend and times are bounded, so there is always a curve.
    Curve::new(points).unwrap_or_else(|_| Curve::constant(MAX_SECONDS))
}

/// A device as it is written down.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Row {
    name: String,
    title: String,
    kind: Kind,
    memory_gib: Vec<u64>,
    bandwidth_gb_s: f64,
    tflops: f64,
    watts: Option<f64>,
    load_gb_s: Option<f64>,
    layer_us: Option<f64>,
    decode_efficiency: Option<f64>,
    chunk_efficiency: Option<f64>,
    source: String,
    #[serde(default)]
    measured: Vec<MeasuredRow>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct MeasuredRow {
    model: String,
    #[serde(deserialize_with = "quant")]
    quant: Quant,
    decode: f64,
    prompt: Option<f64>,
    source: String,
}

fn quant<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Quant, D::Error> {
    String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
}

impl Row {
    /// `source` resolves the key of a source.
    pub fn into_device(self, source: &impl Fn(&str) -> String) -> Device {
        let measured = self.measured.into_iter().map(|row| Measured {
            model: row.model,
            quant: row.quant,
            decode: row.decode,
            prompt: row.prompt,
            source: source(&row.source),
        });
        let custom = Device::custom(&self.name, self.kind, self.bandwidth_gb_s * 1e9, self.tflops * 1e12);
        let mut device = Device {
            title: self.title,
            memory: self.memory_gib.into_iter().map(ByteSize::gib).collect(),
            watts: self.watts,
            load_bytes_per_s: self.load_gb_s.map_or(custom.load_bytes_per_s, |gb| gb * 1e9),
            layer_s: self.layer_us.map_or(custom.layer_s, |us| us / 1e6),
            decode_efficiency: self.decode_efficiency.unwrap_or(custom.decode_efficiency),
            chunk_efficiency: self.chunk_efficiency.unwrap_or(custom.chunk_efficiency),
            measured: measured.collect(),
            source: source(&self.source),
            ..custom
        };
        device.calibrate();
        device
    }
}

#[cfg(test)]
mod tests {
    use super::super::Catalogue;
    use super::*;

    /// Tokens a second of one stream with no context, and of a prompt of 512.
    fn rates(device: &Device, name: &str, quant: Quant) -> (f64, f64) {
        let model = models::profile(name, quant).unwrap();
        let speed = device.speed(&model);
        let n_layers = f64::from(model.n_layers());
        let head_s = speed.head_s(&model, 1.0);
        (1.0 / (n_layers * speed.decode.at(1.0) + head_s), 512.0 / (n_layers * speed.chunk.at(512.0) + head_s))
    }

    #[test]
    fn devices_do_what_was_measured_on_them() {
        for device in Catalogue::built_in().devices() {
            for measured in &device.measured {
                let (decode, prompt) = rates(device, &measured.model, measured.quant);
                let off = decode / measured.decode - 1.0;
                assert!(off.abs() < 0.25, "{} {}: {decode:.1}, not {}", device.name, measured.model, measured.decode);
                if let Some(expected) = measured.prompt {
                    let off = prompt / expected - 1.0;
                    assert!(off.abs() < 0.35, "{} {}: prompt {prompt:.0}, not {expected}", device.name, measured.model);
                }
            }
        }
    }

    #[test]
    fn figures_that_calibrate_nothing_are_met_too() {
        // Each is of another model than its device was calibrated with.
        for (device, model, quant, expected, source) in [
            ("rtx-4090", "gpt-oss-20b", Quant::MXFP4, 222.0, "llama.cpp discussion 15396"),
            ("rtx-5090", "gpt-oss-20b", Quant::MXFP4, 282.5, "llama.cpp discussion 15396"),
            ("rtx-3090", "llama-3.1-8b", Quant::Q4_K_M, 115.4, "XiongjieDai"),
            ("rtx-4090", "llama-3.1-8b", Quant::F16, 54.8, "XiongjieDai"),
            ("rtx-a6000", "llama-3.3-70b", Quant::Q4_K_M, 14.6, "XiongjieDai"),
            ("apple-m1-max", "llama-3.3-70b", Quant::Q4_K_M, 4.3, "XiongjieDai"),
            ("apple-m3-ultra", "deepseek-v3", Quant::Q4_K_M, 20.2, "geerlingguy/beowulf-ai-cluster issue 17"),
            ("apple-m3-ultra", "gpt-oss-20b", Quant::MXFP4, 115.5, "geerlingguy/ai-benchmarks"),
            ("ryzen-ai-max-395", "qwen3-30b-a3b", Quant::Q4_K_M, 86.1, "visorcraft/strix-halo-llm-perf"),
            ("ryzen-ai-max-395", "qwen2.5-32b", Quant::Q4_K_M, 11.3, "visorcraft/strix-halo-llm-perf"),
            ("dgx-spark", "gpt-oss-20b", Quant::MXFP4, 88.0, "geerlingguy/ai-benchmarks"),
        ] {
            let (rate, _) = rates(Catalogue::built_in().device(device).unwrap(), model, quant);
            let off = rate / expected - 1.0;
            assert!(off.abs() <= 0.30, "{device}, {model} {quant}: {rate:.1}, not {expected} ({source})");
        }
    }

    #[test]
    fn more_rows_never_cost_less_and_share_the_reading() {
        let model = models::profile("llama-3.1-8b", Quant::Q4_K_M).unwrap();
        let experts = models::profile("qwen3-30b-a3b", Quant::Q4_K_M).unwrap();
        for device in Catalogue::built_in().devices() {
            for speed in [device.speed(&model), device.speed(&experts)] {
                assert!(speed.is_sound() && speed.source == SpeedSource::Device);
                for curve in [&speed.decode, &speed.chunk] {
                    let times: Vec<f64> = curve.points().iter().map(|point| point.1).collect();
                    assert!(times.is_sorted() && times[0] > 0.0, "{}: {times:?}", device.name);
                }
                assert!(speed.decode.at(8.0) < 8.0 * speed.decode.at(1.0), "{}", device.name);
            }
        }
        let card = Catalogue::built_in().device("rtx-4090").unwrap();
        // Eight rows read nearly eight times the experts, but the dense weights once.
        let (dense, routed) = (card.speed(&model), card.speed(&experts));
        assert!(dense.decode.at(8.0) < 1.3 * dense.decode.at(1.0));
        assert!(routed.decode.at(8.0) > 2.0 * routed.decode.at(1.0));
    }

    #[test]
    fn a_device_of_ones_own_is_of_its_kind() {
        let model = models::profile("llama-3.1-8b", Quant::Q4_K_M).unwrap();
        let own = Device::custom("own", Kind::Gpu, 936e9, 71e12).speed(&model);
        let known = Catalogue::built_in().device("rtx-3090").unwrap().speed(&model);
        assert!((own.decode.at(1.0) / known.decode.at(1.0) - 1.0).abs() < 0.2);
        for flops in [0.0, 1e-297] {
            let broken = Device::custom("broken", Kind::Cpu, 0.0, flops).speed(&model);
            assert!(broken.decode.at(1.0) > 1000.0 && broken.is_sound(), "{broken:?}");
        }
    }
}
