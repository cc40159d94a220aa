//! How a charter changes, and what a voter makes of it.

use super::*;

#[test]
fn a_change_of_voters_needs_both_sets() {
    let mut seat = Seat::coordinator(3);
    (3..6).for_each(|node| seat.council.heard(seat.now, id(node)));
    seat.propose((3..6).map(|n| voter(n, true)).collect(), 1);
    assert_eq!((seat.charter().version, seat.charter().before.len()), (5, 3));
    assert_eq!(seat.wrote(), [3, 4, 5, 1, 2]);
    assert!(matches!(seat.actions[0], Action::Store(_)));
    seat.written(3);
    assert_eq!(seat.charter().version, 5, "the old ones have not agreed");
    seat.written(2);
    assert_eq!((seat.charter().version, seat.charter().before.len()), (6, 0));
    assert_eq!(seat.wrote(), [1, 2, 3, 4, 5], "those that leave are told");
    assert!(!seat.council.is_settled());
    seat.written(1);
    assert!(!seat.council.is_settled(), "it has no vote any more");
    seat.written(5);
    assert!(seat.council.is_settled());
}

#[test]
fn settings_names_and_the_order_of_succession_change_in_one_step() {
    let mut seat = Seat::coordinator(3);
    seat.propose(vec![voter(2, true), Voter { name: "new".into(), ..voter(1, true) }], 9);
    assert_eq!((seat.charter().version, seat.charter().before.len()), (5, 0));
    seat.written(2);
    assert!(seat.council.is_settled());
    assert_eq!(seat.charter().settings, [9]);
    seat.propose(seat.charter().voters[1..].to_vec(), 9);
    assert_eq!((seat.sent(), seat.charter().version), (vec![], 5), "nothing is to change");
}

#[test]
fn who_may_lead_changes_in_two_steps() {
    let mut seat = Seat::coordinator(3);
    seat.propose(vec![voter(1, true), voter(2, false)], 1);
    assert_eq!(seat.charter().before.len(), 3);
}

#[test]
fn of_proposals_that_wait_the_last_counts() {
    let mut seat = Seat::coordinator(3);
    [7, 8, 9].into_iter().for_each(|settings| seat.propose(voters(3)[1..].to_vec(), settings));
    assert_eq!(seat.charter().settings, [7]);
    seat.written(1);
    assert_eq!((seat.charter().settings.as_slice(), seat.charter().version), (&[9][..], 6));
}

#[test]
fn a_change_that_would_cost_the_quorum_waits() {
    let mut seat = Seat::coordinator(2);
    seat.propose(vec![voter(3, true), voter(4, true)], 1);
    assert_eq!(seat.charter().version, 4);
    seat.wait(Duration::from_secs(1));
    seat.council.heard(seat.now, id(4));
    seat.wait(Duration::from_millis(HEARTBEAT_MS));
    assert_eq!((seat.charter().version, seat.charter().before.len()), (5, 2));
}

#[test]
fn only_the_coordinator_can_propose() {
    let mut seat = Seat::of(1, charter(3));
    seat.propose(vec![], 1);
    assert_eq!(seat.actions, []);
    let mut seat = Seat::coordinator(3);
    seat.input(Input::Propose(Proposal::new(voter(1, true), vec![voter(0, true)], vec![]).unwrap()));
    assert_eq!(seat.actions, [], "and itself must be first");
}

#[test]
fn a_charter_is_sent_until_it_is_written() {
    let mut seat = Seat::coordinator(4);
    seat.propose(voters(4)[1..].to_vec(), 9);
    assert_eq!(seat.wrote(), [1, 2, 3]);
    seat.written(1);
    seat.wait(Duration::from_millis(HEARTBEAT_MS));
    assert_eq!(seat.wrote(), [2, 3]);
    seat.now += LEASE;
    seat.council.heard(seat.now, id(1));
    seat.council.heard(seat.now, id(2));
    seat.input(Input::Tick);
    assert_eq!(seat.wrote(), [2, 3], "a silent one seldom");
    seat.wait(Duration::from_millis(HEARTBEAT_MS));
    assert_eq!(seat.wrote(), [2]);
}

#[test]
fn a_voter_stores_what_is_newer_and_says_what_it_has() {
    let mut seat = Seat::of(3, charter(4));
    let write = |version, n| Body::WriteCharter(Charter { term: 3, version, coordinator: id(1), ..charter(n) });
    seat.hear(1, write(6, 5));
    let [Action::Store(_), Action::Follow(_), Action::Send { .. }] = &seat.actions[..] else { panic!() };
    assert_eq!(seat.sent(), [(1, Body::CharterWritten { term: 3, version: 6 })]);
    seat.hear(1, write(5, 4));
    assert_eq!(seat.sent(), [(1, Body::CharterWritten { term: 3, version: 6 })], "it came late");
    assert_eq!((seat.actions.len(), seat.charter().voters.len()), (1, 5));
}

#[test]
fn a_coordinator_of_an_old_term_is_refused_and_told_who_leads() {
    let mut seat = Seat::of(3, Charter { term: 4, coordinator: id(1), ..charter(4) });
    seat.hear(0, Body::WriteCharter(charter(4)));
    assert_eq!(seat.sent(), [(0, Body::Refused { term: 4, incumbent: Some(incumbent(1, 4)) })]);
    seat.hear(2, Body::WriteCharter(Charter { term: 9, ..charter(4) }));
    assert_eq!(seat.actions, [], "nobody writes in the name of another");
}

#[test]
fn proposals_beyond_their_limits_are_refused() {
    let many = (1..=MAX_VOTERS as u8).map(|n| voter(n, true)).collect();
    assert!(matches!(Proposal::new(voter(0, true), many, vec![]), Err(ProposalError::TooMuch(_))));
    let settings = vec![0; MAX_SETTINGS_BYTES + 1];
    assert!(matches!(Proposal::new(voter(0, true), vec![], settings), Err(ProposalError::TooMuch(_))));
    let twice = Proposal::new(voter(0, true), vec![voter(0, true)], vec![]);
    assert_eq!(twice, Err(ProposalError::Twice(id(0))));
}
