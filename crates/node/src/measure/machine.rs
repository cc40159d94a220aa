//! What a machine can do, without a model at hand: memory, computing by quantisation, disk.
//!
//! Computing is measured with layers of a made-up llama of moderate width, through the same code as a real model's.

use std::fs;
use std::io;
use std::path::Path;
use std::sync::RwLock;
use std::sync::mpsc::{Sender, channel};
use std::time::{Duration, Instant};

use brigade_base::{ByteSize, KvTypes};
use brigade_gguf::{Builder, Catalog, GgmlType, Metadata, Value};
use brigade_plan::ModelProfile;
use serde::{Deserialize, Serialize};

use super::{
    Disturbance, MEMORY_DIVISOR, MeasureError, MeasureOptions, MeasureRequest, disk, hash_bytes_per_s, measure,
};
use crate::model::model_profile;
use crate::system::{self, Cpu};
use crate::threads::seconds_since_1970;

/// Types of weights that are measured: those that most models come in.
const TYPES: [GgmlType; 5] = [GgmlType::F16, GgmlType::Q8_0, GgmlType::Q4_0, GgmlType::Q4_K, GgmlType::Q6_K];

/// How long one type may take; all together leave a second of five for memory and disk.
const TYPE_BUDGET: Duration = Duration::from_millis(800);

/// How long reading memory may take.
const MEMORY_BUDGET: Duration = Duration::from_millis(400);

/// Most memory that is read over and over: more than any processor's cache.
const MAX_STREAM_BYTES: u64 = 1 << 30;

/// Words that are summed up between two looks at the clock: 512 KiB take tens of microseconds.
const STREAM_BLOCK: usize = 64 << 10;

/// How long reading the disk may take, about.
const DISK_BUDGET: Duration = Duration::from_secs(1);

/// Largest stored profile that is read; it has about two kilobytes.
const MAX_FILE_BYTES: u64 = 64 << 10;

/// Rises when the same machine would be measured otherwise than before.
const METHOD: u32 = 2;

/// What a machine can do.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MachineProfile {
    /// When it was measured, in seconds since 1970.
    pub measured_at: u64,
    /// Version of the software that measured.
    pub version: String,
    method: u32,
    /// The processor.
    pub cpu: Cpu,
    /// Threads that computed.
    pub threads: u32,
    /// Share of time for which it computes.
    pub throttle: f32,
    /// Bytes of memory that all threads together read in a second.
    pub memory_bytes_per_s: f64,
    /// How fast it computes with each type of weights.
    pub types: Vec<TypeSpeed>,
    /// Bytes that the disk of the state directory reads in a second; `None` where that cannot be told from the
    /// system's cache.
    pub disk_bytes_per_s: Option<f64>,
    /// Bytes of weights that are hashed in a second, by one thread.
    pub hash_bytes_per_s: f64,
}

/// How fast a machine computes with one type of weights.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TypeSpeed {
    /// The type, for example `Q4_0`.
    #[serde(rename = "type")]
    pub name: String,
    /// Seconds that a token takes for each GiB of weights.
    pub s_per_gib: f64,
    /// Seconds that the rows of a prompt take for 10^9 multiplications or additions.
    pub s_per_gflop: f64,
    /// Bytes of weights that are loaded from memory in a second.
    pub load_bytes_per_s: f64,
}

/// What this machine can do, from the file `profile.json` of `state_dir` if it was measured before with the same
/// settings, unless `again`; and what others computed while it was measured. If that was much it is not kept.
///
/// # Errors
/// If the engine fails.
pub fn profile(
    state_dir: &Path,
    threads: u32,
    throttle: f32,
    again: bool,
) -> Result<(MachineProfile, Disturbance), MeasureError> {
    let path = state_dir.join("profile.json");
    if let Some(stored) = read(&path).filter(|stored| !again && stored.fits(threads, throttle)) {
        return Ok((stored, Disturbance::default()));
    }
    let (profile, disturbance) = measure_machine(state_dir, threads, throttle)?;
    if !disturbance.is_quiet() {
        return Ok((profile, disturbance));
    }
    let written = serde_json::to_vec_pretty(&profile)
        .map_err(io::Error::from)
        .and_then(|bytes| brigade_net::write_atomic(&path, &bytes, 0o600));
    if let Err(error) = written {
        tracing::warn!(%error, "the profile of this machine is not kept");
    }
    Ok((profile, disturbance))
}

impl MachineProfile {
    /// Whether this machine with these settings would be measured the same.
    fn fits(&self, threads: u32, throttle: f32) -> bool {
        self.method == METHOD
            && self.version == env!("CARGO_PKG_VERSION")
            && self.cpu == system::cpu()
            && (self.threads, self.throttle) == (threads, throttle)
    }
}

fn read(path: &Path) -> Option<MachineProfile> {
    if fs::metadata(path).ok()?.len() > MAX_FILE_BYTES {
        return None;
    }
    serde_json::from_slice(&fs::read(path).ok()?).ok()
}

fn measure_machine(
    state_dir: &Path,
    threads: u32,
    throttle: f32,
) -> Result<(MachineProfile, Disturbance), MeasureError> {
    let (mut types, mut disturbance) = (Vec::with_capacity(TYPES.len()), Disturbance::default());
    for ty in TYPES {
        let (speed, disturbed) = type_speed(ty, threads, throttle, TYPE_BUDGET)?;
        types.push(speed);
        disturbance = disturbance.and(disturbed);
    }
    let profile = MachineProfile {
        measured_at: seconds_since_1970(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        method: METHOD,
        cpu: system::cpu(),
        threads,
        throttle,
        memory_bytes_per_s: memory_bytes_per_s(threads),
        types,
        disk_bytes_per_s: disk_bytes_per_s(state_dir).unwrap_or_else(|error| {
            tracing::info!(%error, "the disk was not measured");
            None
        }),
        hash_bytes_per_s: hash_bytes_per_s(),
    };
    Ok((profile, disturbance))
}

fn type_speed(
    ty: GgmlType,
    threads: u32,
    throttle: f32,
    budget: Duration,
) -> Result<(TypeSpeed, Disturbance), MeasureError> {
    let catalog = made_up(ty).map_err(|error| MeasureError::Run(error.to_string()))?;
    let model = model_profile(&catalog, KvTypes::default()).map_err(|error| MeasureError::Run(error.to_string()))?;
    let request = MeasureRequest { catalog, context: 512, sessions: 1, max_rows: 64, kv: KvTypes::default() };
    let options = MeasureOptions { budget, ..MeasureOptions::new(threads, throttle, None) };
    let measured = measure(&request, &options)?;
    let speed = measured.speed;
    let gib = model.layer_bytes[0] as f64 / ByteSize::gib(1).0 as f64;
    let (rows, chunk_s) = speed.chunk.points().last().copied().unwrap_or((1, 0.0));
    let speed = TypeSpeed {
        name: ty.name().to_owned(),
        s_per_gib: speed.decode.at(1.0) / gib,
        s_per_gflop: chunk_s / (flops_per_row(&model) * f64::from(rows) / 1e9),
        load_bytes_per_s: speed.load_bytes_per_s,
    };
    Ok((speed, measured.disturbance))
}

/// Multiplications and additions of a layer for a row: one of each for each weight.
fn flops_per_row(model: &ModelProfile) -> f64 {
    2.0 * model.n_weights as f64 / f64::from(model.n_layers().max(1))
}

/// A llama with matrices of one type: as wide as models of one to three billion weights.
fn made_up(ty: GgmlType) -> Result<Catalog, Box<dyn std::error::Error>> {
    const N_EMBD: u64 = 2048;
    const N_KV: u64 = 512;
    const N_FF: u64 = 8192;
    const N_LAYERS: u32 = 12;
    let mut metadata = Metadata::new();
    metadata.set("general.architecture", "llama");
    for (key, value) in [
        ("embedding_length", N_EMBD as u32),
        ("block_count", N_LAYERS),
        ("feed_forward_length", N_FF as u32),
        ("context_length", 4096),
        ("attention.head_count", 32),
        ("attention.head_count_kv", 8),
        ("rope.dimension_count", 64),
        ("vocab_size", 32),
    ] {
        metadata.set(format!("llama.{key}"), Value::U32(value));
    }
    metadata.set("llama.attention.layer_norm_rms_epsilon", Value::F32(1e-5));
    let mut builder = Builder::new(&metadata);
    builder.tensor("token_embd.weight", &[N_EMBD, 32], GgmlType::F16)?;
    for layer in 0..N_LAYERS {
        let of_layer: [(&str, &[u64]); 9] = [
            ("attn_norm", &[N_EMBD]),
            ("attn_q", &[N_EMBD, N_EMBD]),
            ("attn_k", &[N_EMBD, N_KV]),
            ("attn_v", &[N_EMBD, N_KV]),
            ("attn_output", &[N_EMBD, N_EMBD]),
            ("ffn_norm", &[N_EMBD]),
            ("ffn_gate", &[N_EMBD, N_FF]),
            ("ffn_up", &[N_EMBD, N_FF]),
            ("ffn_down", &[N_FF, N_EMBD]),
        ];
        for (name, dims) in of_layer {
            let ty = if dims.len() == 1 { GgmlType::F32 } else { ty };
            builder.tensor(format!("blk.{layer}.{name}.weight"), dims, ty)?;
        }
    }
    builder.tensor("output_norm.weight", &[N_EMBD], GgmlType::F32)?;
    Ok(Catalog::parse_header(&builder.header_bytes())?)
}

/// Bytes of memory that `threads` threads read in a second: each sums up a part of its own, all at the same time.
fn memory_bytes_per_s(threads: u32) -> f64 {
    let bytes = MAX_STREAM_BYTES.min(system::available_memory().0 / MEMORY_DIVISOR);
    let n_words = (bytes / 8 / u64::from(threads.max(1))).max(1) as usize;
    let prepare = || vec![1u64; n_words];
    let read = |words: Vec<u64>| {
        let (begin, mut n_read, mut elapsed) = (Instant::now(), 0, Duration::ZERO);
        // Whoever went on to the end of its part would read alone for a while.
        for block in words.chunks(STREAM_BLOCK).cycle() {
            let block = std::hint::black_box(block);
            std::hint::black_box(block.iter().fold(0, |sum: u64, &word| sum.wrapping_add(word)));
            n_read += block.len();
            elapsed = begin.elapsed();
            if elapsed >= MEMORY_BUDGET {
                break;
            }
        }
        (n_read * 8) as f64 / elapsed.as_secs_f64().max(1e-9)
    };
    together(threads.max(1), prepare, read).iter().sum()
}

/// Runs `work` on `n` threads, on none before all have prepared for it.
fn together<P, T: Send>(n: u32, prepare: impl Fn() -> P + Sync, work: impl Fn(P) -> T + Sync) -> Vec<T> {
    let (gate, (tell, prepared)) = (RwLock::new(()), channel());
    let run = |tell: Sender<()>| {
        let what = prepare();
        drop(tell);
        drop(gate.read());
        work(what)
    };
    let run = &run;
    std::thread::scope(|scope| {
        let shut = gate.write();
        // Fewer, if the system gives no more.
        let spawn = |tell: Sender<()>| std::thread::Builder::new().spawn_scoped(scope, move || run(tell)).ok();
        let threads: Vec<_> = (0..n).filter_map(|_| spawn(tell.clone())).collect();
        drop(tell);
        // Ends once all have dropped theirs.
        let _ = prepared.recv();
        drop(shut);
        threads.into_iter().filter_map(|thread| thread.join().ok()).collect()
    })
}

/// Bytes that the file system of `dir` reads in a second, past the system's cache.
fn disk_bytes_per_s(dir: &Path) -> io::Result<Option<f64>> {
    let mut file = tempfile::tempfile_in(dir)?;
    disk::write_bytes_per_s(&mut file)?;
    disk::read_bytes_per_s(&mut file, 0, disk::WRITTEN, DISK_BUDGET)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use brigade_gguf::Architecture;

    use super::*;

    #[test]
    fn the_made_up_models_can_be_cut_everywhere() {
        for ty in TYPES {
            let catalog = made_up(ty).unwrap();
            assert_eq!(Architecture::of(&catalog).unwrap().cut_points().len(), 11, "{ty}");
            assert!(flops_per_row(&model_profile(&catalog, KvTypes::default()).unwrap()) > 1e8);
        }
    }

    #[test]
    fn a_stored_profile_is_used() {
        let dir = tempfile::tempdir().unwrap();
        let stored = MachineProfile {
            measured_at: 7,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            method: METHOD,
            cpu: system::cpu(),
            threads: 1,
            throttle: 1.0,
            memory_bytes_per_s: 1e9,
            types: Vec::new(),
            disk_bytes_per_s: None,
            hash_bytes_per_s: 1e9,
        };
        fs::write(dir.path().join("profile.json"), serde_json::to_vec(&stored).unwrap()).unwrap();
        assert_eq!(profile(dir.path(), 1, 1.0, false).unwrap(), (stored.clone(), Disturbance::default()));
        assert!(!stored.fits(2, 1.0) && !stored.fits(1, 0.5));
        let other = |alter: fn(&mut MachineProfile)| {
            let mut profile = stored.clone();
            alter(&mut profile);
            profile
        };
        let others = [
            other(|stored| stored.method -= 1),
            other(|stored| stored.version.push('0')),
            other(|stored| stored.cpu.n_threads += 1),
        ];
        assert!(others.iter().all(|stored| !stored.fits(1, 1.0)), "what was measured elsewhere is measured anew");
        fs::write(dir.path().join("profile.json"), " ".repeat(MAX_FILE_BYTES as usize + 1)).unwrap();
        assert_eq!(read(&dir.path().join("profile.json")), None);
    }

    #[test]
    fn no_thread_begins_before_all_are_prepared() {
        const N: u32 = 16;
        let n_prepared = AtomicU32::new(0);
        let seen = together(
            N,
            || {
                // Work of some length, so that the first would be done before the last has begun.
                std::hint::black_box(vec![1u64; 1 << 18]);
                n_prepared.fetch_add(1, Ordering::SeqCst)
            },
            |_| n_prepared.load(Ordering::SeqCst),
        );
        assert_eq!(seen, [N; N as usize]);
    }

    #[test]
    fn a_type_is_measured_and_so_are_memory_and_disk() {
        let (ty, _) = type_speed(GgmlType::Q4_0, 1, 1.0, Duration::from_millis(200)).unwrap();
        assert!(ty.s_per_gib > 0.0 && ty.s_per_gflop > 0.0 && ty.load_bytes_per_s > 0.0, "{ty:?}");
        assert!(memory_bytes_per_s(1) > 1e6);
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(disk_bytes_per_s(dir.path()).unwrap().is_some(), cfg!(target_os = "linux"));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0, "nothing is left behind");
    }
}
