//! The header of a file.
#![no_main]

use brigade_fuzz::{headers, mutate};
use libfuzzer_sys::{fuzz_mutator, fuzz_target, fuzzer_mutate};

fuzz_target!(|bytes: &[u8]| headers::header(bytes));

// Half of the changes keep a header what it is.
fuzz_mutator!(|bytes: &mut [u8], size: usize, max_size: usize, seed: u32| {
    let changed = (seed % 2 != 0).then(|| mutate::header(&bytes[..size], seed)).flatten();
    match changed.filter(|changed| changed.len() <= max_size) {
        Some(changed) => {
            bytes[..changed.len()].copy_from_slice(&changed);
            changed.len()
        }
        None => fuzzer_mutate(bytes, size, max_size),
    }
});
