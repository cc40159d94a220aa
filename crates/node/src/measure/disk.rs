//! How fast a disk is: bytes are written and brought to it, and read past what the system keeps in memory.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::time::{Duration, Instant};

/// Bytes that are written: a hard disk takes a fifth of a second for them, a slow card one or two.
pub(crate) const WRITTEN: usize = 16 << 20;

/// Bytes that are read or written at once: so many that a call costs nothing, so few that the time is looked at now and
/// then, and that a node with little memory has them.
const BLOCK: usize = 1 << 20;

/// Bytes in a second that `file` takes until they are on the disk, by [`WRITTEN`] of them. No two of its blocks are
/// equal and none has a pattern, so that no file system makes less of them.
///
/// # Errors
/// If they cannot be written.
pub(crate) fn write_bytes_per_s(file: &mut File) -> io::Result<f64> {
    let (mut bytes, mut block) = (incompressible(), vec![0; BLOCK]);
    let mut spent = Duration::ZERO;
    for _ in 0..WRITTEN / BLOCK {
        bytes.fill(&mut block);
        let begin = Instant::now();
        file.write_all(&block)?;
        spent += begin.elapsed();
    }
    let begin = Instant::now();
    file.sync_all()?;
    Ok(per_s(WRITTEN, spent + begin.elapsed()))
}

/// Bytes in a second that `file` gives from `start` on, of which it reads `most` at most, for `within` about; `None`
/// where the system does not forget what it has of them in memory, or there are none.
///
/// # Errors
/// If they cannot be read.
pub(crate) fn read_bytes_per_s(file: &mut File, start: u64, most: usize, within: Duration) -> io::Result<Option<f64>> {
    if !forget(file, start, most) {
        return Ok(None);
    }
    file.seek(SeekFrom::Start(start))?;
    let (mut block, mut done) = (vec![0; BLOCK.min(most)], 0);
    let begin = Instant::now();
    while done < most && (done == 0 || begin.elapsed() < within) {
        match file.read(&mut block)? {
            0 => break,
            n => done += n,
        }
    }
    Ok((done > 0).then(|| per_s(done, begin.elapsed())))
}

fn per_s(n_bytes: usize, time: Duration) -> f64 {
    n_bytes as f64 / time.as_secs_f64().max(1e-6)
}

/// Bytes without end that look like chance, and are the same each time.
fn incompressible() -> blake3::OutputReader {
    blake3::Hasher::new().finalize_xof()
}

/// Has the system drop what it keeps of a part of a file in memory; false where it cannot be asked.
#[cfg(target_os = "linux")]
fn forget(file: &File, start: u64, most: usize) -> bool {
    let most = std::num::NonZeroU64::new(most as u64);
    rustix::fs::fadvise(file, start, most, rustix::fs::Advice::DontNeed).is_ok()
}

#[cfg(not(target_os = "linux"))]
fn forget(_: &File, _: u64, _: usize) -> bool {
    false
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn no_file_system_makes_less_of_what_is_written() {
        let mut file = tempfile::tempfile().unwrap();
        assert!(write_bytes_per_s(&mut file).unwrap() > 0.0);
        let mut bytes = Vec::new();
        file.seek(SeekFrom::Start(0)).unwrap();
        file.read_to_end(&mut bytes).unwrap();
        assert_eq!(bytes.len(), WRITTEN);
        let blocks: HashSet<&[u8]> = bytes.chunks(4096).collect();
        assert_eq!(blocks.len(), WRITTEN / 4096, "equal blocks are stored once");
        // Each byte is as frequent as any other, so that there is nothing to gain by shorter codes for some.
        let mut counts = [0u32; 256];
        bytes.iter().for_each(|byte| counts[usize::from(*byte)] += 1);
        let mean = (WRITTEN / 256) as f64;
        assert!(counts.iter().all(|&n| (f64::from(n) - mean).abs() < mean / 20.0), "{counts:?}");
    }

    #[test]
    fn only_what_is_there_is_read() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[1; 9000]).unwrap();
        let mut read = |start, most| read_bytes_per_s(&mut file, start, most, Duration::ZERO).unwrap();
        assert_eq!(read(4096, 4096).is_some(), cfg!(target_os = "linux"));
        assert_eq!(read(9000, 4096), None);
    }
}
