//! Any header, as it could come from a peer: every legal cut yields a view whose virtual header can be read.
#![no_main]

use brigade_base::LayerRange;
use brigade_gguf::{Architecture, Catalog, StageView};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let Ok(catalog) = Catalog::parse_header(bytes) else { return };
    let Ok(architecture) = Architecture::of(&catalog) else { return };
    for cut in architecture.cut_points() {
        for (start, end) in [(0, cut), (cut, architecture.n_layers)] {
            let layers = LayerRange::new(start, end).expect("a cut is inside of the model");
            if let Ok(view) = StageView::new(&catalog, layers) {
                let stage = Catalog::parse(view.header_bytes(), view.n_bytes()).expect("a view is a sound file");
                assert_eq!(Architecture::of(&stage).expect("a stage is a sound model").n_layers, layers.len());
            }
        }
    }
});
