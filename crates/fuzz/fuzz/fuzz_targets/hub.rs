//! A server's answer.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| brigade_fuzz::hub::reply(bytes));
