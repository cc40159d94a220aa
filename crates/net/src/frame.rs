//! Frames: `u32` payload length (little endian), `u8` kind, payload. Pure bytes, no I/O.
//!
//! [`FrameReader`] puts frames together from whatever pieces arrive; [`Pieces`] cuts one to send into pieces that are
//! encrypted and written one after the other.

use std::io::IoSlice;

/// Bytes before a frame's payload.
pub const FRAME_HEADER_BYTES: usize = 5;

/// Longest payload of any frame. The largest frames are prefill chunks: 512 rows of 16384 F32 values are 32 MiB; twice
/// that leaves room, and bounds what a peer can make this node hold.
pub const MAX_FRAME: usize = 64 << 20;

/// A payload buffer grows by what has arrived, or by this much at least: few reallocations, and a peer that only
/// announces a large frame gets no more memory than this.
const GROWTH_STEP: usize = 1 << 20;

/// Most plaintext that is encrypted in one go. 16 TLS records: one system call for any decode frame, while a frame of
/// many megabytes neither holds the TLS state for long nor needs a second copy of its size.
pub(crate) const MAX_PIECE: usize = 256 << 10;

/// Most slices in a piece: the header and what senders pass (header, rows, side tables), with room.
pub(crate) const MAX_SLICES: usize = 16;

/// An announced payload is longer than allowed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct TooLarge {
    pub(crate) len: usize,
}

/// The header of a frame with `len` payload bytes; `len` is at most [`MAX_FRAME`].
pub(crate) fn header(kind: u8, len: usize) -> [u8; FRAME_HEADER_BYTES] {
    let [a, b, c, d] = (len as u32).to_le_bytes();
    [a, b, c, d, kind]
}

/// Puts one frame after the other together.
#[derive(Debug, Default)]
pub(crate) struct FrameReader {
    header: [u8; FRAME_HEADER_BYTES],
    n_header: usize,
}

impl FrameReader {
    /// Takes bytes of one frame from the front of `input`, payload into `payload`. Returns how many it took, and the
    /// kind once the frame is complete. It then takes no more: the next call starts the next frame, with an empty
    /// `payload`.
    pub(crate) fn absorb(
        &mut self,
        input: &[u8],
        payload: &mut Vec<u8>,
        limit: usize,
    ) -> Result<(usize, Option<u8>), TooLarge> {
        let n_header = input.len().min(FRAME_HEADER_BYTES - self.n_header);
        self.header[self.n_header..][..n_header].copy_from_slice(&input[..n_header]);
        self.n_header += n_header;
        if self.n_header < FRAME_HEADER_BYTES {
            return Ok((n_header, None));
        }
        let [a, b, c, d, kind] = self.header;
        let len = u32::from_le_bytes([a, b, c, d]) as usize;
        if len > limit {
            return Err(TooLarge { len });
        }
        let n_payload = (input.len() - n_header).min(len - payload.len());
        grow(payload, n_payload, len);
        payload.extend_from_slice(&input[n_header..][..n_payload]);
        if payload.len() < len {
            return Ok((n_header + n_payload, None));
        }
        self.n_header = 0;
        Ok((n_header + n_payload, Some(kind)))
    }

    /// Whether part of a frame has been taken.
    pub(crate) fn is_mid_frame(&self) -> bool {
        self.n_header > 0
    }
}

/// Makes room for `more` bytes in a payload that will have `total`.
fn grow(payload: &mut Vec<u8>, more: usize, total: usize) {
    let needed = payload.len() + more;
    if needed > payload.capacity() {
        let target = needed.max(2 * payload.len()).max(GROWTH_STEP).min(total);
        payload.reserve_exact(target - payload.len());
    }
}

/// Cuts a header and payload parts into pieces of at most [`MAX_PIECE`] bytes and [`MAX_SLICES`] slices.
pub(crate) struct Pieces<'a> {
    header: &'a [u8],
    parts: &'a [&'a [u8]],
    /// Index of the next segment: 0 is the header, then the parts.
    segment: usize,
    /// Bytes of it already given.
    offset: usize,
}

impl<'a> Pieces<'a> {
    pub(crate) fn new(header: &'a [u8], parts: &'a [&'a [u8]]) -> Self {
        Self { header, parts, segment: 0, offset: 0 }
    }

    /// Fills `slices` with the next piece and returns how many there are; 0 at the end.
    pub(crate) fn next(&mut self, slices: &mut [IoSlice<'a>; MAX_SLICES]) -> usize {
        let (mut n_slices, mut n_bytes) = (0, 0);
        while n_slices < MAX_SLICES && n_bytes < MAX_PIECE && self.segment <= self.parts.len() {
            let segment = if self.segment == 0 { self.header } else { self.parts[self.segment - 1] };
            let rest = &segment[self.offset..];
            let slice = &rest[..rest.len().min(MAX_PIECE - n_bytes)];
            if slice.len() == rest.len() {
                (self.segment, self.offset) = (self.segment + 1, 0);
            } else {
                self.offset += slice.len();
            }
            if !slice.is_empty() {
                slices[n_slices] = IoSlice::new(slice);
                n_slices += 1;
                n_bytes += slice.len();
            }
        }
        n_slices
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn cut(header: &[u8], parts: &[&[u8]]) -> Vec<Vec<u8>> {
        let mut pieces = Pieces::new(header, parts);
        let mut slices = [IoSlice::new(&[]); MAX_SLICES];
        let mut out = Vec::new();
        loop {
            match pieces.next(&mut slices) {
                0 => return out,
                n => out.push(slices[..n].iter().flat_map(|slice| slice.to_vec()).collect()),
            }
        }
    }

    #[test]
    fn a_small_frame_is_one_piece_and_a_large_one_is_cut() {
        assert_eq!(cut(b"head", &[b"", b"one", b"", b"two"]), [b"headonetwo".to_vec()]);
        assert_eq!(cut(b"head", &[]), [b"head".to_vec()]);
        let large = vec![3u8; 2 * MAX_PIECE];
        let pieces = cut(b"head", &[&large, b"tail"]);
        assert!(pieces.iter().all(|piece| piece.len() <= MAX_PIECE));
        assert_eq!(pieces.len(), 3);
        assert_eq!(pieces.concat(), [b"head", &large[..], b"tail"].concat());
        let many: Vec<&[u8]> = vec![b"x"; 100];
        assert_eq!(cut(b"head", &many).concat().len(), 104);
    }

    #[test]
    fn an_announced_length_gets_no_memory_before_its_bytes() {
        let (mut reader, mut payload) = (FrameReader::default(), Vec::new());
        reader.absorb(&header(1, MAX_FRAME), &mut payload, MAX_FRAME).unwrap();
        reader.absorb(&[0; 10], &mut payload, MAX_FRAME).unwrap();
        assert!(payload.capacity() <= GROWTH_STEP, "{}", payload.capacity());
        let mut reader = FrameReader::default();
        assert_eq!(reader.absorb(&header(1, 101), &mut Vec::new(), 100), Err(TooLarge { len: 101 }));
    }

    proptest! {
        #[test]
        fn frames_survive_any_fragmentation(
            frames in prop::collection::vec((any::<u8>(), prop::collection::vec(any::<u8>(), 0..300)), 1..8),
            steps in prop::collection::vec(1usize..64, 1..32),
        ) {
            let mut wire = Vec::new();
            for (kind, payload) in &frames {
                wire.extend(header(*kind, payload.len()));
                wire.extend(payload);
            }
            let (mut reader, mut payload, mut got) = (FrameReader::default(), Vec::new(), Vec::new());
            let (mut rest, mut steps) = (&wire[..], steps.iter().cycle());
            while !rest.is_empty() {
                let piece = &rest[..rest.len().min(*steps.next().unwrap())];
                let (taken, kind) = reader.absorb(piece, &mut payload, 300).unwrap();
                rest = &rest[taken..];
                if let Some(kind) = kind {
                    got.push((kind, std::mem::take(&mut payload)));
                }
            }
            prop_assert_eq!(got, frames);
            prop_assert!(!reader.is_mid_frame());
        }
    }
}
