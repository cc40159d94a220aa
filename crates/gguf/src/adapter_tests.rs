//! Adapters that fit their model, and all that do not.

use std::io::Read;

use super::*;

#[test]
fn halves_are_widened_exactly() {
    for (half, expected) in [
        (0x0000, 0.0),
        (0x8000, -0.0),
        (0x3c00, 1.0),
        (0xc000, -2.0),
        (0x7bff, 65504.0),
        (0x0400, 6.103_515_6e-5),
        (0x0001, 5.960_464_5e-8),
        (0x3555, 0.333_251_95),
        (0x7c00, f32::INFINITY),
    ] {
        assert_eq!(f16_to_f32(half).to_bits(), f32::to_bits(expected), "{half:#x}");
    }
    assert!(f16_to_f32(0x7e00).is_nan());
}

/// A tensor's elements count from its index times 1000.
struct Counting(Vec<GgmlType>);

impl TensorSource for Counting {
    fn read_tensor(&self, idx: usize, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let value = |element: u64| (1000 * idx as u64 + element) as f32;
        let bytes: Vec<u8> = match self.0[idx] {
            GgmlType::F32 => (0..400).flat_map(|element| value(element).to_le_bytes()).collect(),
            _ => (0..400).flat_map(|element| ((value(element).to_bits() >> 16) as u16).to_le_bytes()).collect(),
        };
        buf.copy_from_slice(&bytes[offset as usize..][..buf.len()]);
        Ok(())
    }
}

#[test]
fn joined_tensors_are_the_same_however_they_are_read() {
    let part = |tensor, ty, len, factor| Part { tensor, ty, len, factor };
    let parts = vec![part(0, GgmlType::F32, 3, 2.0), part(1, GgmlType::F32, 5, -1.0)];
    let source = JoinedSource {
        parts: Arc::new(vec![Joined::Parts(parts)]),
        source: Arc::new(Counting(vec![GgmlType::F32; 2])),
    };
    let mut whole = vec![0; 8 * 4 * 7];
    source.read_tensor(0, 0, &mut whole).unwrap();
    let values: Vec<f32> = whole.as_chunks::<4>().0.iter().map(|v| f32::from_le_bytes(*v)).collect();
    assert_eq!(values[..9], [0.0, 2.0, 4.0, -1000.0, -1001.0, -1002.0, -1003.0, -1004.0, 6.0]);
    for (start, end) in [(0, 4), (3, 9), (4, 40), (31, 33), (30, 100), (1, 224), (221, 224), (12, 32)] {
        let mut piece = vec![0; end - start];
        source.read_tensor(0, start as u64, &mut piece).unwrap();
        assert_eq!(piece, whole[start..end], "{start}..{end}");
    }
}

fn catalog(metadata: &Metadata, tensors: &[(&str, &[u64], GgmlType)]) -> Catalog {
    let mut builder = Builder::new(metadata);
    for (name, dims, ty) in tensors {
        builder.tensor(*name, dims, *ty).unwrap();
    }
    Catalog::parse_header(&builder.header_bytes()).unwrap()
}

fn model() -> Catalog {
    let mut metadata = Metadata::new();
    metadata.set("general.architecture", "llama");
    for (key, value) in [
        ("block_count", 2),
        ("embedding_length", 64),
        ("context_length", 64),
        ("feed_forward_length", 96),
        ("attention.head_count", 2),
    ] {
        metadata.set(format!("llama.{key}"), value as u32);
    }
    metadata.set("llama.attention.layer_norm_rms_epsilon", 1e-5f32);
    let mut tensors: Vec<(String, Vec<u64>)> = vec![("token_embd.weight".into(), vec![64, 50])];
    for layer in 0..2 {
        for (name, dims) in [
            ("attn_norm", vec![64]),
            ("attn_q", vec![64, 64]),
            ("attn_k", vec![64, 64]),
            ("attn_v", vec![64, 64]),
            ("attn_output", vec![64, 64]),
            ("ffn_norm", vec![64]),
            ("ffn_up", vec![64, 96]),
            ("ffn_gate", vec![64, 96]),
            ("ffn_down", vec![96, 64]),
        ] {
            tensors.push((format!("blk.{layer}.{name}.weight"), dims));
        }
    }
    tensors.push(("output_norm.weight".into(), vec![64]));
    tensors.push(("output.weight".into(), vec![64, 50]));
    let tensors: Vec<_> = tensors.iter().map(|(n, d)| (n.as_str(), d.as_slice(), GgmlType::F32)).collect();
    catalog(&metadata, &tensors)
}

fn metadata(alpha: f32) -> Metadata {
    let mut metadata = Metadata::new();
    for (key, value) in [("general.architecture", "llama"), ("general.type", "adapter"), ("adapter.type", "lora")] {
        metadata.set(key, value);
    }
    metadata.set("adapter.lora.alpha", alpha);
    metadata
}

const DOWN: &[(&str, &[u64], GgmlType)] = &[
    ("blk.1.ffn_down.weight.lora_a", &[96, 4], GgmlType::F32),
    ("blk.1.ffn_down.weight.lora_b", &[4, 64], GgmlType::F32),
];

#[test]
fn what_does_not_fit_is_refused() {
    let model = model();
    let good = catalog(&metadata(8.0), DOWN);
    assert_eq!(check_adapter(&model, &good), Ok(()));
    let with = |change: &dyn Fn(&mut Metadata)| {
        let mut metadata = metadata(8.0);
        change(&mut metadata);
        check_adapter(&model, &catalog(&metadata, DOWN)).unwrap_err().to_string()
    };
    assert!(with(&|m| m.set("general.type", "model")).contains("no adapter"));
    assert!(with(&|m| m.set("adapter.type", "ia3")).contains("ia3"));
    assert!(with(&|m| m.set("general.architecture", "qwen3")).contains("qwen3"));
    assert!(with(&|m| m.set("adapter.lora.alpha", f32::NAN)).contains("finite"));
    assert!(with(&|m| m.set("adapter.lora.alpha", "8")).contains("finite"));
    assert!(with(&|m| m.set("adapter.alora.invocation_tokens", 1u32)).contains("activated"));
    let f = GgmlType::F32;
    let of = |tensors: &[(&str, &[u64], GgmlType)]| {
        check_adapter(&model, &catalog(&metadata(8.0), tensors)).unwrap_err().to_string()
    };
    assert!(of(&DOWN[..1]).contains("one half"));
    assert!(of(&[]).contains("nothing"));
    let pair = |a: &'static [u64], b: &'static [u64]| {
        of(&[("blk.1.ffn_down.weight.lora_a", a, f), ("blk.1.ffn_down.weight.lora_b", b, f)])
    };
    for (a, b) in [(&[96, 4][..], &[5, 64][..]), (&[64, 4], &[4, 64]), (&[96, 4], &[4, 96]), (&[96, 4, 2], &[4, 64])] {
        assert!(pair(a, b).contains("do not fit"), "{a:?} {b:?}");
    }
    let named = |a: &'static str, b: &'static str| of(&[(a, &[64, 4], f), (b, &[4, 50], f)]);
    assert!(named("blk.7.attn_q.weight.lora_a", "blk.7.attn_q.weight.lora_b").contains("does not have"));
    assert!(named("token_embd.weight.lora_a", "token_embd.weight.lora_b").contains("outside of the stages"));
    assert!(named("output_norm.weight.lora_a", "output_norm.weight.lora_b").contains("only matrices"));
    assert!(named("blk.0.attn_q.weight", "x").contains("neither"));
    assert!(of(&[("blk.0.attn_q.weight.lora_a", &[256, 4], GgmlType::Q4_K)]).contains("Q4_K"));
    for scale in [0.0, f32::NAN, 1001.0, f32::INFINITY] {
        assert!(matches!(bundle_adapters(&model, &[(&good, scale)]), Err(AdapterError::Scale { .. })), "{scale}");
    }
    assert!(matches!(bundle_adapters(&model, &[(&good, 1.0); 17]), Err(AdapterError::TooMany { found: 17 })));
    let whole = StageView::whole(&model).unwrap();
    assert!(matches!(AdapterView::new(&good, &model, &whole), Err(AdapterError::Bundle)));
    let of_rank = |rank| {
        let (a, b) = ([96, rank], [rank, 64]);
        catalog(&metadata(8.0), &[(DOWN[0].0, &a, f), (DOWN[1].0, &b, f)])
    };
    let mut large = Metadata::new();
    large.set("adapters.count", 1u32);
    large.set("adapters.0.alpha", 1.0f32);
    large.set("adapters.0.scale", 1.0f32);
    let (names, rank) = (DOWN.iter().map(|(name, ..)| format!("0.{name}")).collect::<Vec<_>>(), 1u64 << 24);
    let bundle = catalog(&large, &[(&names[0], &[96, rank], f), (&names[1], &[rank, 64], f)]);
    for refused in [
        bundle_adapters(&model, &[(&of_rank(rank), 1.0)]).map(drop),
        AdapterView::new(&bundle, &model, &whole).map(drop),
    ] {
        assert!(matches!(refused, Err(AdapterError::TooLarge { .. })), "{refused:?}");
    }
}

#[test]
fn a_stage_gets_the_part_of_its_layers() {
    let model = model();
    let mut tensors = DOWN.to_vec();
    tensors.push(("output.weight.lora_a", &[64, 2], GgmlType::F32));
    tensors.push(("output.weight.lora_b", &[2, 50], GgmlType::F32));
    let one = catalog(&metadata(8.0), &tensors);
    let bundle = bundle_adapters(&model, &[(&one, 0.5)]).unwrap();
    let stage = |start, end| {
        let layers = brigade_base::LayerRange::new(start, end).unwrap();
        StageView::new(&model, layers).unwrap()
    };
    assert!(AdapterView::new(&bundle, &model, &stage(0, 1)).unwrap().is_none());
    let view = AdapterView::new(&bundle, &model, &stage(1, 2)).unwrap().unwrap();
    assert_eq!((view.scale(), view.tensors()), (0.5, &[0, 1, 2, 3][..]));
    let mut bytes = Vec::new();
    view.reader(Arc::new(Counting(vec![GgmlType::F32; 4]))).read_to_end(&mut bytes).unwrap();
    assert_eq!(bytes.len() as u64, view.n_bytes());
    let cut = Catalog::parse(&bytes, view.n_bytes()).unwrap();
    assert!(cut.tensor("blk.0.ffn_down.weight.lora_a").is_some() && cut.tensor("output.weight.lora_b").is_some());
    assert_eq!(cut.metadata().f32("adapter.lora.alpha"), Some(8.0));
    let (layers, head) = adapter_bytes(&bundle, &model, 2).unwrap();
    assert_eq!((layers, head), (vec![0, 4 * 4 * (96 + 64)], 4 * 2 * (64 + 50)));
}

#[test]
fn a_stage_that_pools_gets_nothing_for_the_head_that_it_has_not() {
    let model = model();
    let head: &[(&str, &[u64], GgmlType)] =
        &[("output.weight.lora_a", &[64, 2], GgmlType::F32), ("output.weight.lora_b", &[2, 50], GgmlType::F32)];
    let [both, alone] = [[DOWN, head].concat(), head.to_vec()].map(|tensors| catalog(&metadata(8.0), &tensors));
    let layers = |start, end| brigade_base::LayerRange::new(start, end).unwrap();
    for (start, end) in [(0, 2), (1, 2)] {
        let view = |make: fn(&Catalog, _) -> _, adapters: &[(&Catalog, f32)]| {
            let stage: Result<StageView, crate::StageViewError> = make(&model, layers(start, end));
            AdapterView::new(&bundle_adapters(&model, adapters).unwrap(), &model, &stage.unwrap()).unwrap()
        };
        let of_head = |view: &AdapterView| {
            let found = Catalog::parse_header(view.header_bytes()).unwrap();
            found.tensor("output.weight.lora_a").is_some()
        };
        let one = [(&both, 1.0)];
        assert!(of_head(&view(StageView::new, &one).unwrap()));
        let pooled = view(StageView::pooled, &one).unwrap();
        assert!(!of_head(&pooled) && pooled.tensors() == [0, 1]);
        assert!(view(StageView::pooled, &[(&alone, 1.0)]).is_none());
        let several = view(StageView::pooled, &[(&alone, 0.5), (&both, 1.0)]).unwrap();
        assert!(!of_head(&several) && several.tensors() == [2, 3]);
    }
}

#[test]
fn several_adapters_become_one() {
    let model = model();
    let brain: Vec<_> = DOWN.iter().map(|(name, dims, _)| (*name, *dims, GgmlType::BF16)).collect();
    let adapters = [catalog(&metadata(8.0), DOWN), catalog(&metadata(0.0), &brain)];
    let bundle = bundle_adapters(&model, &[(&adapters[0], 0.5), (&adapters[1], 3.0)]).unwrap();
    let view = AdapterView::new(&bundle, &model, &StageView::whole(&model).unwrap()).unwrap().unwrap();
    assert_eq!((view.scale(), view.tensors()), (1.0, &[0, 1, 2, 3][..]));
    let types = [DOWN[0].2, DOWN[1].2, GgmlType::BF16, GgmlType::BF16].to_vec();
    let mut bytes = Vec::new();
    view.reader(Arc::new(Counting(types))).read_to_end(&mut bytes).unwrap();
    let cut = Catalog::parse(&bytes, view.n_bytes()).unwrap();
    assert_eq!(cut.metadata().f32("adapter.lora.alpha"), Some(0.0));
    let [a, b] = ["lora_a", "lora_b"].map(|side| cut.tensor(&format!("blk.1.ffn_down.weight.{side}")).unwrap());
    assert_eq!((&a.dims[..2], &b.dims[..2]), (&[96, 8][..], &[8, 64][..]));
    let value = |at: u64| f32::from_le_bytes(bytes[at as usize..][..4].try_into().unwrap());
    // alpha / rank * scale is 1 of the first, and the second has no alpha.
    assert_eq!([0, 3, 8, 11].map(|i| value(b.offset + 4 * i)), [1000.0, 1003.0, 1004.0, 1007.0]);
    assert_eq!(value(b.offset + 16), 3.0 * f32::from_bits(3000f32.to_bits() & 0xffff_0000));
    let q8: Vec<_> = DOWN.iter().map(|(name, _, _)| (*name, &[32, 32][..], GgmlType::Q8_0)).collect();
    assert!(check_adapter(&model, &catalog(&metadata(1.0), &q8)).is_err());
}
