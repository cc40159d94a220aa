//! Messages and what is stored, as bytes; and messages that nobody should send.

use proptest::prelude::*;

use super::*;
use crate::DecodeError;

fn round_trip(body: Body) -> Result<(), DecodeError> {
    let message = CouncilMessage { deployment: DEPLOYMENT, body };
    CouncilMessage::decode(&message.encode()).map(|decoded| assert_eq!(decoded, message))
}

#[test]
fn messages_survive_the_wire() {
    let hint = Some(incumbent(1, 2));
    for body in [
        Body::VoteRequest { term: 3, charter_term: 2, charter_version: 3, is_trial: true },
        Body::VoteReply { asked: 3, is_trial: false, granted: true, term: 3, incumbent: hint.clone() },
        Body::WriteCharter(Charter { before: voters(3), ..charter(64) }),
        Body::CharterWritten { term: 1, version: 2 },
        Body::Refused { term: 1, incumbent: hint },
    ] {
        round_trip(body).unwrap();
    }
    let stored = Stored { term: 4, voted: Some((4, id(1))), charter: Some(charter(3)), left: Some(DEPLOYMENT) };
    assert_eq!(Stored::decode(&stored.encode()), Ok(stored));
}

#[test]
fn numbers_and_lengths_are_capped() {
    let address = |text: String| Voter { addresses: vec![text], ..voter(1, true) };
    for bad in [
        Charter { term: MAX_TERM + 1, ..charter(1) },
        Charter { version: MAX_TERM + 1, ..charter(1) },
        charter(65),
        Charter { before: voters(65), ..charter(1) },
        Charter { settings: vec![0; MAX_SETTINGS_BYTES + 1], ..charter(1) },
        charter(0),
        Charter { voters: vec![voter(1, true), voter(1, false)], ..charter(1) },
        Charter { voters: vec![address("x".repeat(261))], ..charter(1) },
        Charter { voters: vec![Voter { addresses: vec![String::new(); 65], ..voter(1, true) }], ..charter(1) },
        Charter { voters: vec![Voter { name: "x".repeat(65), ..voter(1, true) }], ..charter(1) },
    ] {
        let stored = Stored { charter: Some(bad.clone()), ..Stored::default() };
        assert!(Stored::decode(&stored.encode()).is_err(), "{bad:?}");
        assert!(round_trip(Body::WriteCharter(bad)).is_err());
    }
    let too_high = Some(incumbent(1, MAX_TERM + 1));
    assert!(round_trip(Body::Refused { term: 1, incumbent: too_high }).is_err());
    assert!(round_trip(Body::CharterWritten { term: u64::MAX, version: 1 }).is_err());
    assert!(Stored::decode(&Stored { term: u64::MAX, ..Stored::default() }.encode()).is_err());
    assert!(Stored::decode(&[]).is_err() && Stored::decode(&[9, 0, 0, 0]).is_err());
}

fn any_message() -> impl Strategy<Value = (u8, Body)> {
    let number = || prop_oneof![0u64..6, Just(MAX_TERM), Just(MAX_TERM - 1)];
    let hint = prop::option::of((0u8..5, number()).prop_map(|(n, term)| incumbent(n, term)));
    let (bits, numbers) = (any::<(bool, bool)>(), (number(), number(), number()));
    (0u8..5, 0u8..5, 1u8..5, numbers, bits, hint).prop_map(|(from, kind, n, (a, b, c), (is_trial, granted), hint)| {
        let before = if granted { voters(n) } else { vec![] };
        let body = match kind {
            0 => Body::VoteRequest { term: a, charter_term: b, charter_version: c, is_trial },
            1 => Body::VoteReply { asked: a, is_trial, granted, term: b, incumbent: hint },
            2 => Body::WriteCharter(Charter { term: a, version: b, coordinator: id(from), before, ..charter(n) }),
            3 => Body::CharterWritten { term: a, version: b },
            _ => Body::Refused { term: a, incumbent: hint },
        };
        (from, body)
    })
}

proptest! {
    #[test]
    fn no_bytes_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        let _ = CouncilMessage::decode(&bytes);
        let _ = Stored::decode(&bytes);
    }

    #[test]
    fn no_mutation_panics(at in 0usize..400, value: u8) {
        let body = Body::WriteCharter(charter(4));
        let mut bytes = CouncilMessage { deployment: DEPLOYMENT, body }.encode();
        let at = at % bytes.len();
        bytes[at] = value;
        let _ = CouncilMessage::decode(&bytes);
    }

    /// Whatever others say, true or not: terms never fall, no vote is taken back, and each wait has an end.
    #[test]
    fn no_messages_break_a_council(
        me in 0u8..5,
        messages in prop::collection::vec((any_message(), 0u64..3_000), 0..60),
    ) {
        let mut seat = Seat::of(me, charter(4));
        let mut before = seat.council.stored().clone();
        for ((from, body), pause_ms) in messages {
            seat.hear(from, body);
            seat.wait(Duration::from_millis(pause_ms));
            let after = seat.council.stored().clone();
            prop_assert!(after.term >= before.term);
            prop_assert!(after.charter.as_ref().map(Charter::age) >= before.charter.as_ref().map(Charter::age));
            if let (Some((then, for_whom)), Some((now, for_whom_now))) = (before.voted, after.voted) {
                prop_assert!(now > then || (now, for_whom_now) == (then, for_whom));
            }
            before = after;
        }
    }
}
