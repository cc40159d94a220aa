//! A template and messages.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| brigade_fuzz::templates::chat_template(bytes));
