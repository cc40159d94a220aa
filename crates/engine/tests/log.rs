//! llama.cpp's log ends in `tracing`. Alone in its process: the subscriber must be there before the first log line.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

use std::io;
use std::sync::{Arc, Mutex};

use support::{abacus, whole};

#[test]
fn the_log_goes_to_tracing() {
    let log = Arc::new(Mutex::new(Vec::new()));
    struct Log(Arc<Mutex<Vec<u8>>>);
    impl io::Write for Log {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let _guard = {
        let writer = Arc::clone(&log);
        let subscriber = tracing_subscriber::fmt()
            .with_max_level(tracing_subscriber::filter::LevelFilter::DEBUG)
            .with_ansi(false)
            .with_writer(move || Log(Arc::clone(&writer)))
            .finish();
        tracing_subscriber::util::SubscriberInitExt::set_default(subscriber)
    };
    whole(&abacus(), |_| ());
    let text = String::from_utf8(log.lock().unwrap().clone()).unwrap();
    let line = text.lines().find(|line| line.contains("KV buffer size")).unwrap();
    assert!(line.contains("DEBUG llama: "), "{line}");
    assert!(!text.contains("ERROR"), "{text}");
}
