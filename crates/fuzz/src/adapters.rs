//! LoRA adapters, as they come from files, and bundles of them, as they come from peers.

use std::io;
use std::sync::{Arc, LazyLock};

use brigade_base::LayerRange;
use brigade_gguf::{
    AdapterView, Builder, Catalog, GgmlType, Metadata, StageView, TensorSource, Value, adapter_bytes, bundle_adapters,
    check_adapter,
};

/// Largest view that is read: what small adapters of the model here take.
const MAX_READ_BYTES: u64 = 1 << 20;

/// Any header: as an adapter it is refused, or can be bundled alone and with itself; as a bundle it is refused, or each
/// stage's part of it is a sound file that can be read.
pub fn adapter(bytes: &[u8]) {
    let Ok(catalog) = Catalog::parse_header(bytes) else { return };
    let model = &MODEL;
    if check_adapter(model, &catalog).is_ok() {
        for adapters in [&[(&catalog, 0.5)][..], &[(&catalog, 0.5), (&catalog, -2.0)]] {
            // Too many bytes, or types that cannot be joined.
            let Ok(bundle) = bundle_adapters(model, adapters) else { continue };
            check_bundle(&bundle);
            adapter_bytes(&bundle, model, N_LAYERS).expect("what was bundled is a bundle");
        }
    }
    check_bundle(&catalog);
}

fn check_bundle(bundle: &Catalog) {
    for (start, end) in [(0, 1), (1, N_LAYERS), (0, N_LAYERS)] {
        let stage = StageView::new(&MODEL, LayerRange::new(start, end).expect("it is not empty")).expect("it is legal");
        let Ok(Some(view)) = AdapterView::new(bundle, &MODEL, &stage) else { continue };
        assert!(view.tensors().iter().all(|idx| *idx < bundle.tensors().len()), "a view's tensors exist");
        if view.n_bytes() > MAX_READ_BYTES {
            continue;
        }
        let (mut file, mut reader) = (Vec::new(), view.reader(Arc::new(Ones)));
        io::Read::read_to_end(&mut reader, &mut file).expect("a view can be read");
        assert_eq!(file.len() as u64, view.n_bytes(), "a view has its length");
        let catalog = Catalog::parse(&file, view.n_bytes()).expect("a view is a sound file");
        assert_eq!(catalog.weight_bytes(), view.weight_bytes(), "a view says what it takes");
        check_adapter(&catalog_of(end - start), &catalog).expect("a view is an adapter of its stage");
    }
}

/// Tensors of ones, as F16 has them.
struct Ones;

impl TensorSource for Ones {
    fn read_tensor(&self, _: usize, _: u64, buf: &mut [u8]) -> io::Result<()> {
        buf.iter_mut().zip([0x00, 0x3c].iter().cycle()).for_each(|(byte, one)| *byte = *one);
        Ok(())
    }
}

const N_LAYERS: u32 = 3;

/// The model that is adapted.
static MODEL: LazyLock<Catalog> = LazyLock::new(|| catalog_of(N_LAYERS));

fn catalog_of(n_layers: u32) -> Catalog {
    let mut metadata = Metadata::new();
    metadata.set("general.architecture", "llama");
    let numbers = [
        ("block_count", n_layers),
        ("context_length", 64),
        ("embedding_length", 32),
        ("feed_forward_length", 64),
        ("attention.head_count", 2),
    ];
    for (key, number) in numbers {
        metadata.set(format!("llama.{key}"), number);
    }
    metadata.set("llama.attention.layer_norm_rms_epsilon", Value::F32(1e-5));
    let mut builder = Builder::new(&metadata);
    let mut add = |name: &str, dims: &[u64]| {
        builder.tensor(format!("{name}.weight"), dims, GgmlType::F32).expect("it is sound");
    };
    add("token_embd", &[32, 40]);
    for layer in 0..n_layers {
        for (name, dims) in [
            ("attn_norm", &[32][..]),
            ("attn_q", &[32, 32]),
            ("attn_k", &[32, 32]),
            ("attn_v", &[32, 32]),
            ("attn_output", &[32, 32]),
            ("ffn_norm", &[32]),
            ("ffn_up", &[32, 64]),
            ("ffn_gate", &[32, 64]),
            ("ffn_down", &[64, 32]),
        ] {
            add(&format!("blk.{layer}.{name}"), dims);
        }
    }
    add("output_norm", &[32]);
    add("output", &[32, 40]);
    Catalog::parse_header(&builder.header_bytes()).expect("it is sound")
}
