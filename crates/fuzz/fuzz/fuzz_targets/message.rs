//! A message of a node.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| brigade_fuzz::messages::message(bytes));
