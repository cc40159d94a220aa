//! Reads the virtual file of a stage view: header and padding from memory, tensors from their source.
//!
//! A reader holds the header at most. It owns its position; several readers of a view are independent.

use std::fmt;
use std::io::{self, Read, Seek, SeekFrom};
use std::sync::Arc;

use crate::catalog::TensorSource;
use crate::stage::{Origin, Segment, VirtualFile};

/// Most bytes asked of the source at once, so that a source may answer from a buffer of known size.
const MAX_READ_BYTES: usize = 1 << 20;

/// The bytes of a stage's virtual GGUF file.
pub struct StageReader {
    file: Arc<VirtualFile>,
    source: Arc<dyn TensorSource>,
    position: u64,
}

impl fmt::Debug for StageReader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StageReader").field("position", &self.position).field("n_bytes", &self.file.n_bytes).finish()
    }
}

impl StageReader {
    pub(crate) fn new(file: Arc<VirtualFile>, source: Arc<dyn TensorSource>) -> Self {
        Self { file, source, position: 0 }
    }

    /// Bytes of the virtual file.
    pub fn n_bytes(&self) -> u64 {
        self.file.n_bytes
    }

    /// Fills the start of `buf` with what lies at the position up to the next border; says how much that was.
    fn fill(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let file = Arc::clone(&self.file);
        let position = self.position;
        if let Some(header) = file.header.get(usize::try_from(position).unwrap_or(usize::MAX)..)
            && !header.is_empty()
        {
            let n = header.len().min(buf.len());
            buf[..n].copy_from_slice(&header[..n]);
            return Ok(n);
        }
        let next = file.segments.partition_point(|segment| segment.start <= position);
        let next_start = file.segments.get(next).map_or(file.n_bytes, |segment| segment.start);
        if let Some(segment) = next.checked_sub(1).and_then(|idx| file.segments.get(idx))
            && position < segment.start + segment.n_bytes
        {
            let n = clamp(segment.start + segment.n_bytes - position, buf.len());
            self.read_segment(*segment, position - segment.start, &mut buf[..n])?;
            return Ok(n);
        }
        let n = clamp(next_start - position, buf.len());
        buf[..n].fill(0);
        Ok(n)
    }

    fn read_segment(&self, segment: Segment, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        match segment.origin {
            Origin::Zeros => {
                buf.fill(0);
                Ok(())
            }
            Origin::Tensor(tensor_idx) => self.source.read_tensor(tensor_idx, offset, buf),
        }
    }
}

/// The smaller of a distance in the file and the room in a buffer, at most [`MAX_READ_BYTES`].
fn clamp(distance: u64, room: usize) -> usize {
    usize::try_from(distance).unwrap_or(usize::MAX).min(room).min(MAX_READ_BYTES)
}

impl Read for StageReader {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let mut n_read = 0;
        while n_read < buf.len() && self.position < self.file.n_bytes {
            match self.fill(&mut buf[n_read..]) {
                Ok(n) => {
                    n_read += n;
                    self.position += n as u64;
                }
                // What was read so far counts; the next call meets the error again.
                Err(_) if n_read > 0 => break,
                Err(error) => return Err(error),
            }
        }
        Ok(n_read)
    }
}

impl Seek for StageReader {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let position = match to {
            SeekFrom::Start(position) => Some(position),
            SeekFrom::Current(by) => self.position.checked_add_signed(by),
            SeekFrom::End(by) => self.file.n_bytes.checked_add_signed(by),
        };
        let outside = || io::Error::new(io::ErrorKind::InvalidInput, "a position before the start of the file");
        self.position = position.ok_or_else(outside)?;
        Ok(self.position)
    }
}
