//! What others measured on clusters, against what this planner predicts for their hardware and their software.
//!
//! Each case describes the system that was measured: which device computes which layers, what its links do, and what
//! its software adds for each token. The comment of a system says which of these numbers are known and which were
//! fitted, and to what; a fitted one is never counted as a success of its own figure. Beside it stands what Brigade is
//! expected to do on the same hardware.
//!
//! `cargo test -p brigade-plan --test published -- --nocapture` prints the table.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use brigade_base::{ByteSize, LayerRange, NodeId};
use brigade_plan::catalogue::models::{self, Quant};
use brigade_plan::catalogue::{Catalogue, Device, Kind};
use brigade_plan::{
    Demand, LinkProfile, Links, ModelProfile, NodeProfile, Optimize, RingModel, RingStage, place_anywhere,
};

/// How far a prediction may be off.
const MOST_OFF: f64 = 0.35;

/// One published figure.
struct Case {
    system: &'static str,
    setup: String,
    /// Tokens a second that were published.
    published: f64,
    /// Tokens a second that are predicted for the system.
    predicted: f64,
    /// Figures that numbers of this system were fitted to, by themselves not evidence.
    is_fitted: bool,
    /// What Brigade is expected to do.
    brigade: String,
    source: &'static str,
}

/// A part of a cluster: a device and the memory that it gives.
#[derive(Clone)]
struct Part {
    device: Device,
    gib: f64,
}

fn part(name: &str, gib: f64) -> Part {
    Part { device: Catalogue::built_in().device(name).unwrap().clone(), gib }
}

fn own_part(name: &str, kind: Kind, gb_s: f64, tflops: f64, gib: f64) -> Part {
    Part { device: Device::custom(name, kind, gb_s * 1e9, tflops * 1e12), gib }
}

fn link(name: &str) -> LinkProfile {
    Catalogue::built_in().link(name).unwrap().profile
}

fn model(name: &str, quant: Quant) -> ModelProfile {
    models::profile(name, quant).unwrap()
}

/// One stream with a short context, as benchmarks of generation have it.
fn demand() -> Demand {
    Demand { context: 256, parallel: 1, max_rows: 256, optimize: Optimize::Latency, ..Demand::default() }
}

fn nodes(model: &ModelProfile, parts: &[Part]) -> Vec<NodeProfile> {
    let node = |(k, part): (usize, &Part)| NodeProfile {
        id: NodeId::from_bytes([k as u8 + 1; 32]),
        name: part.device.name.clone(),
        memory: ByteSize((part.gib * f64::from(1 << 30)) as u64),
        speed: Some(part.device.speed(model)),
    };
    parts.iter().enumerate().map(node).collect()
}

fn links(nodes: &[NodeProfile], link: LinkProfile) -> Links {
    let mut links = Links::default();
    let port = LinkProfile { latency_s: link.latency_s / 2.0, ..link };
    nodes.iter().for_each(|node| links.set_port(node.id, port));
    links
}

/// Seconds of a token if part `k` computes `layers[k]`, one after the other; the last has the head. Hops are not
/// counted: they are the system's.
fn compute_s(model: &ModelProfile, parts: &[Part], layers: &[u32]) -> f64 {
    assert_eq!(layers.iter().sum::<u32>(), model.n_layers());
    let nodes = nodes(model, parts);
    let mut start = 0;
    let stages: Vec<RingStage<'_>> = nodes
        .iter()
        .zip(layers)
        .filter(|(_, n)| **n > 0)
        .map(|(node, &n)| {
            start += n;
            let layers = LayerRange::new(start - n, start).unwrap();
            RingStage { node, speed: node.speed.as_ref().unwrap(), layers }
        })
        .collect();
    let (none, demand) = (Links::default(), demand());
    let ring = RingModel::new(model, &stages, &none, &demand);
    (0..stages.len()).map(|k| ring.decode_s(k, 1.0)).sum()
}

/// Layers in proportion to shares.
fn split(n_layers: u32, shares: &[f64]) -> Vec<u32> {
    let sum: f64 = shares.iter().sum();
    let mut before = 0.0;
    let mut given = 0;
    let share = |share: &f64| {
        before += share;
        let end = (before / sum * f64::from(n_layers)).round() as u32;
        let own = end - given;
        given = end;
        own
    };
    shares.iter().map(share).collect()
}

/// What Brigade would do there, by its planner.
fn brigade(model: &ModelProfile, parts: &[Part], link: LinkProfile) -> String {
    let nodes = nodes(model, parts);
    match place_anywhere(model, &nodes, &links(&nodes, link), &demand()) {
        Ok(plan) => {
            let rate = plan.prediction.as_ref().map_or(f64::NAN, |prediction| prediction.tokens_per_s);
            format!("{rate:.1} on {}", plan.stages.len())
        }
        Err(_) => "does not fit".to_owned(),
    }
}

/// llama.cpp with RPC. By its protocol (`ggml-rpc.cpp`) every token, each server gets its part of the graph anew, 296
/// bytes for each tensor; the head node sends inputs, asks for the computation and reads the result, waiting for each
/// answer; results go through the head node. Tensors of a layer (42) and exchanges (5) are counted roughly. Nothing is
/// fitted.
fn rpc_s(model: &ModelProfile, link: LinkProfile, remote_layers: &[u32], is_head_remote: bool) -> f64 {
    const TENSOR_BYTES: f64 = 296.0;
    const TENSORS_PER_LAYER: f64 = 42.0;
    const EXCHANGES: f64 = 5.0;
    let server = |&n: &u32| {
        let bytes = f64::from(n) * TENSORS_PER_LAYER * TENSOR_BYTES + 2.0 * model.row_bytes();
        2.0 * EXCHANGES * link.latency_s + bytes / link.bytes_per_s
    };
    let logits = if is_head_remote { 4.0 * f64::from(model.n_vocab) / link.bytes_per_s } else { 0.0 };
    remote_layers.iter().map(server).sum::<f64>() + logits
}

fn rpc_cases() -> Vec<Case> {
    let mut cases = Vec::new();
    let mut push = |setup: &str, published: f64, seconds: f64, brigade: String, source| {
        let (system, setup) = ("llama.cpp RPC", setup.to_owned());
        cases.push(Case { system, setup, published, predicted: 1.0 / seconds, is_fitted: false, brigade, source });
    };
    let one_gb = link("1gbe");

    // A small model whole on the other machine.
    let tiny = tiny_llama();
    let remote = [own_part("gtx-1660", Kind::Gpu, 192.0, 5.0, 6.0)];
    let seconds = compute_s(&tiny, &remote, &[22]) + rpc_s(&tiny, one_gb, &[22], true);
    let alone = brigade(&tiny, &remote, one_gb);
    push("TinyLlama 1.1B F16, GTX 1660 over 1 GbE", 42.0, seconds, alone, "ggml-org/llama.cpp pull 6829");

    // Two cards of one remote machine, layers by memory, a vocabulary of 262144.
    let gemma = model("gemma-3-4b", Quant::Q4_0);
    let cards = [part("rtx-5090", 31.0), own_part("gtx-1660", Kind::Gpu, 192.0, 5.0, 5.6)];
    let layers = split(34, &[31.0, 5.6]);
    let seconds = compute_s(&gemma, &cards, &layers) + rpc_s(&gemma, one_gb, &layers, true);
    let ours = brigade(&gemma, &cards, one_gb);
    push("Gemma 3 4B Q4_0, RTX 5090 + GTX 1660 over 1 GbE", 33.18, seconds, ours, "ggml-org/llama.cpp pull 16276");

    // Metal and CUDA; llama.cpp takes remote devices first, and shares by free memory.
    let qwen = model("qwen2.5-7b", Quant::Q4_K_M);
    let ten_gb = link("10gbe");
    let pair = [part("dgx-spark", 110.0), part("apple-m2-ultra", 96.0)];
    let layers = split(28, &[110.0, 96.0]);
    let seconds = compute_s(&qwen, &pair, &layers) + rpc_s(&qwen, ten_gb, &layers[..1], false);
    let ours = brigade(&qwen, &pair, ten_gb);
    let source = "kjaiswal/llama-cpp-distributed-benchmarks";
    push("Qwen2.5 7B Q4_K_M, M2 Ultra + GB10 over 10 GbE", 52.7, seconds, ours, source);
    let local = compute_s(&qwen, &pair[1..], &[28]);
    push("the same on the M2 Ultra alone", 91.8, local, brigade(&qwen, &pair[1..], ten_gb), source);

    // Mac Studios: one, and four over a Thunderbolt 5 bridge. The file is taken to be in 8 bits, as that of exo beside
    // it.
    let (moe, tb5) = (model("qwen3-235b-a22b", Quant::Q8_0), link("thunderbolt-5"));
    let source = "jeffgeerling.com 2025-12, 1.5 TB of VRAM on Mac Studio";
    for (n, published) in [(1, 20.4), (4, 15.2)] {
        let studios = vec![part("apple-m3-ultra", 400.0); n];
        let layers = split(94, &vec![1.0; n]);
        let seconds = compute_s(&moe, &studios, &layers) + rpc_s(&moe, tb5, &layers[1..], false);
        let setup = format!("Qwen3 235B 8 bit, {n} x M3 Ultra, TB5 bridge");
        push(&setup, published, seconds, brigade(&moe, &studios, tb5), source);
    }
    cases
}

fn tiny_llama() -> ModelProfile {
    // TinyLlama 1.1B: 22 layers of 2048, 32 heads of 64, 4 of them for keys, feed forward of 5632, 32000 words.
    let weights = 2 * 2048 * 2048 + 2 * 2048 * 256 + 3 * 2048 * 5632_u64;
    ModelProfile {
        layer_bytes: vec![2 * weights; 22],
        kv_bytes_per_token: vec![1024; 22],
        head_bytes: 2 * 2048 * 32_000,
        embedding_bytes: 2 * 2048 * 32_000,
        cut_points: (1..22).collect(),
        n_embd: 2048,
        n_heads: 32,
        n_ff: 5632,
        n_vocab: 32_000,
        n_weights: 22 * weights + 2 * 2048 * 32_000,
        ..ModelProfile::default()
    }
}

/// llama.cpp with RPC over Ethernet, two RTX 3090. What was published is far slower than the protocol explains, and its
/// set-up is not described further: 61 ms of a token are computation, as measured in one box. Two numbers were fitted
/// to the four figures: 44 ms that each token takes whatever the link, and 25 MB that it sends. The figures are quoted
/// from the article by a survey; of the article itself only the beginning was at hand, which names the cards.
fn rpc_article_cases() -> Vec<Case> {
    const FIXED_S: f64 = 0.044;
    const TOKEN_BYTES: f64 = 25e6;
    let llama = model("llama-3.3-70b", Quant::Q4_K_M);
    let cards = vec![part("rtx-3090", 23.5); 2];
    let compute = compute_s(&llama, &cards, &[40, 40]);
    let in_one_box = Case {
        system: "llama.cpp",
        setup: "Llama 3 70B Q4_K_M, 2 x RTX 3090 in one box".to_owned(),
        published: 16.57,
        predicted: 1.0 / compute,
        is_fitted: false,
        brigade: brigade(&llama, &cards, link("loopback")),
        source: "XiongjieDai/GPU-Benchmarks-on-LLM-Inference",
    };
    let over = |(name, published): (&str, f64)| {
        let link = link(name);
        Case {
            system: "llama.cpp RPC",
            setup: format!("Llama 3.1 70B Q4_K_M, 2 x RTX 3090, {name}"),
            published,
            predicted: 1.0 / (compute + FIXED_S + TOKEN_BYTES / link.bytes_per_s),
            is_fitted: true,
            brigade: brigade(&llama, &cards, link),
            source: "localaimaster.com distributed-inference-local-ai, 2026-02",
        }
    };
    let figures = [("1gbe", 2.8), ("2.5gbe", 6.1), ("10gbe", 7.4), ("thunderbolt-4", 7.6)];
    std::iter::once(in_one_box).chain(figures.map(over)).collect()
}

/// exo 1.0, tensor parallel over Thunderbolt 5 with remote direct memory access. Each machine reads its share of every
/// matrix; a layer has two sums over all machines, of 9 us each, the most that is reported for a message there. Kernels
/// are taken to be as fast as llama.cpp's. Nothing is fitted.
fn exo_cases() -> Vec<Case> {
    const SUM_S: f64 = 9e-6;
    const SUMS_PER_LAYER: f64 = 2.0;
    const N: u32 = 4;
    // Kimi K2 has experts in 4 bits and all else in 16.
    let kimi = {
        let (mut wide, narrow) = (model("kimi-k2", Quant::F16), model("kimi-k2", Quant::Q4_0));
        let saved = (wide.expert_bytes - narrow.expert_bytes) / u64::from(wide.n_layers() - 1);
        wide.layer_bytes[1..].iter_mut().for_each(|bytes| *bytes -= saved);
        wide.expert_bytes = narrow.expert_bytes;
        wide
    };
    let studios = vec![part("apple-m3-ultra", 400.0); N as usize];
    let case = |(name, model, published): (&str, ModelProfile, f64)| {
        let n_layers = f64::from(model.n_layers());
        // The same number of kernels on each machine, with a share of the bytes: of a token on one machine, what goes
        // with bytes is divided.
        let bytes_s = |factor: f64| {
            let mut device = studios[0].device.clone();
            device.bandwidth *= factor;
            compute_s(&model, &[Part { device, gib: 0.0 }], &[model.n_layers()])
        };
        Case {
            system: "exo tensor parallel",
            setup: format!("{name}, 4 x M3 Ultra, TB5 RDMA"),
            published,
            predicted: 1.0 / (bytes_s(N.into()) + n_layers * SUMS_PER_LAYER * SUM_S),
            is_fitted: false,
            brigade: brigade(&model, &studios, link("thunderbolt-5")),
            source: "jeffgeerling.com 2025-12, 1.5 TB of VRAM on Mac Studio",
        }
    };
    [
        ("Qwen3 235B 8 bit", model("qwen3-235b-a22b", Quant::Q8_0), 31.9),
        ("DeepSeek V3.1 671B 8 bit", model("deepseek-v3", Quant::Q8_0), 32.5),
        ("Kimi K2 Thinking 4 bit", kimi, 28.3),
    ]
    .map(case)
    .into()
}

/// Petals, BLOOM-176B in 8 bits on three A100. Two numbers were fitted, to two figures: the time of its 8-bit kernels
/// to 2.46 tokens a second within one machine, and the time of its software for each hop to 1.71 over 1 Gbit/s. The
/// other two follow: client and three servers make four hops, each of half a round trip and 16-bit states. The figures
/// are from a summary of the paper.
fn petals_cases() -> Vec<Case> {
    const N_HOPS: f64 = 4.0;
    const LOCAL: f64 = 2.46;
    const OVER_1_GBIT: f64 = 1.71;
    let bloom = {
        let (n_layers, embd, vocab) = (70, 14_336_u64, 250_880);
        let weights = 12 * embd * embd;
        ModelProfile {
            layer_bytes: vec![weights; n_layers],
            kv_bytes_per_token: vec![4 * embd; n_layers],
            head_bytes: 2 * vocab * embd,
            cut_points: (1..n_layers as u32).collect(),
            n_embd: embd as u32,
            n_heads: 112,
            n_ff: 4 * embd as u32,
            n_vocab: vocab as u32,
            n_weights: n_layers as u64 * weights + vocab * embd,
            ..ModelProfile::default()
        }
    };
    let cards = vec![part("a100-80gb", 76.0); 3];
    let roofline = compute_s(&bloom, &cards, &[23, 23, 24]);
    let kernels = 1.0 / LOCAL / roofline;
    let state = 2.0 * f64::from(bloom.n_embd);
    let hop = |rtt_s: f64, bits: f64| rtt_s / 2.0 + state * 8.0 / bits;
    let software = (1.0 / OVER_1_GBIT - 1.0 / LOCAL) / N_HOPS - hop(0.005, 1e9);
    assert!((1.0..4.0).contains(&kernels) && (0.0..0.1).contains(&software), "{kernels} {software}");
    let figures = [(0.005, 1e9, OVER_1_GBIT, true), (0.005, 1e8, 1.66, false), (0.1, 1e8, 1.23, false)];
    let case = |(rtt_s, bits, published, is_fitted): (f64, f64, f64, bool)| {
        let link = LinkProfile { latency_s: rtt_s / 2.0, bytes_per_s: bits / 8.0 };
        Case {
            system: "Petals",
            setup: format!("BLOOM 176B 8 bit, 3 x A100, {:.0} Mbit/s, {:.0} ms", bits / 1e6, rtt_s * 1e3),
            published,
            predicted: 1.0 / (roofline * kernels + N_HOPS * (software + hop(rtt_s, bits))),
            is_fitted,
            brigade: brigade(&bloom, &cards, link),
            source: "arXiv 2312.08361",
        }
    };
    figures.map(case).into()
}

/// prima.cpp on a home cluster: a Mac M1, a laptop with an RTX 3070, a desktop with an RTX 2080 Ti, a phone, over
/// Wi-Fi. Memory is as published; processors take what graphics do not hold, each machine at least one layer. What does
/// not fit is read ahead from disk while others compute, so it costs no more than computing it. Bandwidths of the
/// processors' memory are not published: two channels of DDR4-3200, and 44 GB/s in the phone. Nothing is fitted.
fn prima_cases() -> Vec<Case> {
    const N_HOPS: f64 = 4.0;
    // Graphics first, the phone last: in this order they are filled. A tenth of a card's memory is for buffers.
    let cluster = [
        part("rtx-2080-ti", 9.9),
        part("rtx-3070", 7.2),
        part("apple-m1", 2.4),
        part("desktop-ddr4", 9.7),
        part("laptop-ddr4", 4.1),
        own_part("kirin-9000", Kind::Cpu, 44.0, 0.48, 1.9),
    ];
    let wifi = link("wifi-5");
    let case = |(name, shape, published_ms): (&str, &str, f64)| {
        // Files are Q4_K_S, whose size is that of Q4_0 to 2 %.
        let model = model(shape, Quant::Q4_0);
        let layer_gib = model.layer_bytes[0] as f64 / f64::from(1 << 30);
        let mut left = model.n_layers() - 2;
        let mut layers: Vec<u32> = Vec::new();
        for part in &cluster {
            let own = ((part.gib / layer_gib) as u32).min(left);
            left -= own;
            layers.push(own);
        }
        // The Mac and the phone have a layer in any case, and the desktop reads from disk what is left.
        layers[2] += 1;
        layers[5] += 1;
        layers[3] += left;
        let seconds = compute_s(&model, &cluster, &layers) + N_HOPS * wifi.seconds(model.row_bytes());
        Case {
            system: "prima.cpp",
            setup: format!("{name} 4 bit, home cluster over Wi-Fi"),
            published: 1e3 / published_ms,
            predicted: 1.0 / seconds,
            is_fitted: false,
            brigade: brigade(&model, &cluster, wifi),
            source: "arXiv 2504.08791, table 2 in the README of prima.cpp",
        }
    };
    [
        ("Llama 1 30B", "llama-1-30b", 72.0),
        ("Llama 1 65B", "llama-1-65b", 569.0),
        ("Llama 3 70B", "llama-3.3-70b", 674.0),
    ]
    .map(case)
    .into()
}

#[test]
fn published_figures_are_met() {
    let groups = [rpc_cases(), rpc_article_cases(), exo_cases(), petals_cases(), prima_cases()];
    let cases: Vec<Case> = groups.into_iter().flatten().collect();
    println!(
        "{:<20} {:<52} {:>9} {:>9} {:>7}  {:<14} source",
        "system", "set-up", "published", "predicted", "off", "Brigade"
    );
    for case in &cases {
        let off = 100.0 * (case.predicted / case.published - 1.0);
        let mark = if case.is_fitted { '*' } else { ' ' };
        let Case { system, setup, published, predicted, brigade, source, .. } = case;
        println!("{system:<20} {setup:<52} {published:>9.2} {predicted:>9.2} {off:>6.0}%{mark} {brigade:<14} {source}");
    }
    println!("Tokens a second of one stream. * Numbers of the system were fitted to this figure.");
    println!("Brigade: predicted, with the nodes that it would use; it cuts no DeepSeek, Kimi or BLOOM models yet.");
    for case in &cases {
        let off = (case.predicted / case.published - 1.0).abs();
        assert!(off <= MOST_OFF, "{} {}: {:.2}, not {}", case.system, case.setup, case.predicted, case.published);
    }
    let honest = cases.iter().filter(|case| !case.is_fitted).count();
    assert!(honest >= 12, "only {honest} figures are not fitted");
}
