//! Messages between nodes, and the tickets and addresses that people pass on.
//!
//! The first byte of an input chooses the decoder. What a decoder accepts is written and read again, and must be the
//! same bytes.

use brigade_net::{Address, Ticket};
use brigade_protocol::control::{ToCoordinator, ToWorker};
use brigade_protocol::council::{CouncilMessage, Stored};
use brigade_protocol::frame::{Attach, FrameHead, row_bytes};
use brigade_protocol::handover::{Intake, Room, Taken};
use brigade_protocol::kind;
use brigade_protocol::requests::{FromGateway, ToGateway};
use brigade_protocol::weights::{Fetch, decode_bits, decode_hashes, encode_bits, encode_hashes};

/// Any message: it is refused, or survives being written and read again.
pub fn message(bytes: &[u8]) {
    let Some((choice, bytes)) = bytes.split_first() else { return };
    match choice {
        0 => frame(bytes),
        1 => again(bytes, ToWorker::decode, ToWorker::encode),
        2 => again(bytes, ToCoordinator::decode, ToCoordinator::encode),
        3 => again(bytes, FromGateway::decode, FromGateway::encode),
        4 => again(bytes, ToGateway::decode, ToGateway::encode),
        5 => again(bytes, CouncilMessage::decode, CouncilMessage::encode),
        6 => again(bytes, Stored::decode, Stored::encode),
        7 => again(bytes, Attach::decode, |attach| attach.encode().to_vec()),
        8 => again(bytes, Fetch::decode, |fetch| fetch.encode().to_vec()),
        9 => again(bytes, |bytes| decode_hashes(bytes, 16), |hashes| encode_hashes(hashes)),
        10 => {
            if let Ok(bits) = decode_bits(bytes, 12) {
                assert_eq!(encode_bits(bits.into_iter()).len(), bytes.len());
            }
        }
        11 => hand_over(bytes),
        12 => text(&String::from_utf8_lossy(bytes)),
        _ => {}
    }
}

fn again<T, E>(bytes: &[u8], decode: impl Fn(&[u8]) -> Result<T, E>, encode: impl Fn(&T) -> Vec<u8>) {
    let Ok(message) = decode(bytes) else { return };
    let written = encode(&message);
    let Ok(message) = decode(&written) else { panic!("what was written cannot be read") };
    // Numbers have longer spellings on the wire, so only what was written once must stay the same.
    assert_eq!(encode(&message), written, "what was written says something else");
}

fn frame(bytes: &[u8]) {
    let (mut head, mut rows) = (FrameHead::default(), Vec::new());
    if head.decode(bytes, &mut rows).is_err() {
        return;
    }
    assert_eq!(rows.len() as u64, u64::from(head.n_rows()) * u64::from(head.n_embd), "rows are whole");
    let mut written = Vec::new();
    head.encode(&mut written);
    written.extend_from_slice(row_bytes(&rows));
    let (mut again, mut rows_again) = (FrameHead::default(), Vec::new());
    assert_eq!(again.decode(&written, &mut rows_again), Ok(()), "what was written can be read");
    assert_eq!(again, head);
    assert_eq!(row_bytes(&rows_again), row_bytes(&rows), "rows keep their bits");
}

/// Pieces of an input, each with its kind and length before it, are the messages of a hand-over.
fn hand_over(mut bytes: &[u8]) {
    let room = Room { n_slots: 4, context: 64, slot_bytes: 1 << 10 };
    let mut intake = Intake::new(room);
    while let [choice, length, rest @ ..] = bytes {
        let kinds = [kind::HANDOVER_SLOT, kind::HANDOVER_PIECE, kind::HANDOVER_END, *choice];
        let (piece, rest) = rest.split_at(usize::from(*length).min(rest.len()));
        bytes = rest;
        match intake.take(kinds[usize::from(choice % 4)], piece) {
            Ok(Taken::Slot { slot, n_tokens, .. }) => {
                assert!(slot < room.n_slots && n_tokens <= room.context, "a slot has no room");
            }
            Ok(Taken::More | Taken::End(_)) => {}
            Err(_) => return,
        }
    }
}

fn text(text: &str) {
    if let Ok(ticket) = text.parse::<Ticket>() {
        let written = ticket.to_string();
        assert_eq!(written.parse::<Ticket>().map(|ticket| ticket.to_string()).ok(), Some(written));
    }
    if let Ok(address) = text.parse::<Address>() {
        let written = address.to_string();
        assert_eq!(written.parse::<Address>().ok(), Some(address), "{written:?}");
    }
}
