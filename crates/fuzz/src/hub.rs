//! What a hub of models answers, and what people write to name a model there.
//!
//! The first byte of an input chooses what the others are: a page of a list, a `Link` header, a revision, a
//! `Content-Range` header, or a source.

use brigade_store::{ModelSource, Pick, choose, content_range, next_page, parse_page, parse_revision};

/// Any answer: it is read or refused, and files that are chosen were in it.
pub fn reply(bytes: &[u8]) {
    let Some((kind, bytes)) = bytes.split_first() else { return };
    let text = String::from_utf8_lossy(bytes);
    match kind {
        b'p' => page(bytes),
        b'l' => {
            let address = next_page(&text).unwrap_or_default();
            assert!(text.contains(address), "an address was made up");
        }
        b'r' => {
            if let Ok(revision) = parse_revision(bytes, "main") {
                assert!(revision.commit == "main" || revision.commit.len() == 40, "a commit is no hash");
            }
        }
        b'c' => drop(content_range(&text)),
        b's' => match ModelSource::parse(&text) {
            Ok(source @ ModelSource::Hub(_)) => {
                assert_eq!(ModelSource::parse(&source.to_string()), Ok(source), "a source is written otherwise");
            }
            Ok(source) => drop(source.to_string()),
            Err(error) => drop(error.to_string()),
        },
        _ => {}
    }
}

fn page(bytes: &[u8]) {
    let Ok(files) = parse_page(bytes) else { return };
    let named = files.last().map_or_else(String::new, |file| file.path.clone());
    for pick in [Pick::Any, Pick::Quant("Q4_K_M".to_owned()), Pick::File(named)] {
        match choose(&files, &pick) {
            Ok(chosen) => {
                assert!(!chosen.is_empty() && chosen.iter().all(|file| files.contains(file)), "a file was made up");
                assert!(chosen.iter().all(|file| is_inside(&file.path)), "a path leads out of its folder");
            }
            Err(error) => drop(error.to_string()),
        }
    }
}

/// Whether a path stays below where it begins, on every system.
fn is_inside(path: &str) -> bool {
    !path.contains(['\\', ':', '\0']) && path.split('/').all(|part| !matches!(part, "" | "." | ".."))
}
