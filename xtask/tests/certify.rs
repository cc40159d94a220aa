//! The page about architectures says what is so: a tiny model of each is run whole and cut once.

use std::process::Command;

#[test]
fn the_page_about_architectures_is_up_to_date() {
    let output = Command::new(env!("CARGO_BIN_EXE_xtask")).args(["certify", "--quick", "--check"]).output().unwrap();
    let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    assert!(output.status.success(), "{text}");
}
