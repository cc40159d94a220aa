//! Any bytes: the parser ends without a panic, and what it accepts survives being written and read again.
#![no_main]

use brigade_gguf::{Catalog, vocabulary_header};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let Ok(catalog) = Catalog::parse(bytes, bytes.len() as u64) else { return };
    let again = Catalog::parse_header(&catalog.header_bytes(false)).expect("a written header can be read");
    assert_eq!(again.header_hash(), catalog.header_hash());
    let _ = (catalog.quantisation(), catalog.n_parameters(), vocabulary_header(&catalog));
});
