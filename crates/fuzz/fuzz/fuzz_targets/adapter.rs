//! The header of an adapter, or of a bundle of them.
#![no_main]

use brigade_fuzz::{adapters, mutate};
use libfuzzer_sys::{fuzz_mutator, fuzz_target, fuzzer_mutate};

fuzz_target!(|bytes: &[u8]| adapters::adapter(bytes));

// Most of the changes keep a header what it is.
fuzz_mutator!(|bytes: &mut [u8], size: usize, max_size: usize, seed: u32| {
    let changed = (seed % 8 != 0).then(|| mutate::header(&bytes[..size], seed)).flatten();
    match changed.filter(|changed| changed.len() <= max_size) {
        Some(changed) => {
            bytes[..changed.len()].copy_from_slice(&changed);
            changed.len()
        }
        None => fuzzer_mutate(bytes, size, max_size),
    }
});
