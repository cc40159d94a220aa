//! Each rule of the council, by itself.

mod charters;
mod wire;

use super::*;

const DEPLOYMENT: DeploymentId = DeploymentId(7);

fn id(n: u8) -> NodeId {
    NodeId::from_bytes([n; 32])
}

fn voter(n: u8, may_lead: bool) -> Voter {
    Voter { node: id(n), name: format!("n{n}"), addresses: vec![format!("10.0.0.{n}:7")], may_lead }
}

fn voters(n: u8) -> Vec<Voter> {
    (0..n).map(|n| voter(n, true)).collect()
}

/// The third charter, written by node 0 in term 2, of `n` nodes that may all lead.
fn charter(n: u8) -> Charter {
    let (term, version, coordinator) = (2, 3, id(0));
    Charter { deployment: DEPLOYMENT, term, version, coordinator, voters: voters(n), before: vec![], settings: vec![1] }
}

/// A council, its clock, and what it did last.
struct Seat {
    council: Council,
    now: Instant,
    actions: Vec<Action>,
}

impl Seat {
    fn with(n: u8, stored: Stored) -> Self {
        let now = Instant::now();
        let mut seat = Self { council: Council::new(id(n), stored, now), now, actions: vec![] };
        seat.input(Input::Tick);
        seat
    }

    /// Node `n` with that charter, from which all else begins.
    fn of(n: u8, charter: Charter) -> Self {
        Self::with(n, Stored { term: charter.term, charter: Some(charter), ..Stored::default() })
    }

    /// Node 0, elected in term 3, and the charter of `n` nodes that it wrote is with all.
    fn coordinator(n: u8) -> Self {
        let mut seat = Self::of(0, charter(n));
        (1..n).for_each(|from| seat.grant(from, 3, true));
        (1..n).for_each(|from| seat.grant(from, 3, false));
        (1..n).for_each(|from| seat.written(from));
        assert!(seat.council.is_settled());
        seat
    }

    fn input(&mut self, input: Input) {
        self.actions = self.council.handle(self.now, input);
        let stores = self.actions.iter().map(|action| matches!(action, Action::Store(_)));
        assert!(stores.skip(1).all(|is| !is), "what follows depends on it");
    }

    fn hear(&mut self, from: u8, body: Body) {
        self.input(Input::Message(id(from), CouncilMessage { deployment: DEPLOYMENT, body }));
    }

    fn wait(&mut self, time: Duration) {
        let end = self.now + time;
        while let Some(due) = self.council.next_tick().filter(|due| *due <= end) {
            self.now = self.now.max(due);
            self.input(Input::Tick);
        }
        self.now = end;
    }

    fn grant(&mut self, from: u8, asked: u64, is_trial: bool) {
        let term = if is_trial { asked - 1 } else { asked };
        self.hear(from, Body::VoteReply { asked, is_trial, granted: true, term, incumbent: None });
    }

    /// Node `from` has the charter that this node last wrote.
    fn written(&mut self, from: u8) {
        let (term, version) = self.charter().age();
        self.hear(from, Body::CharterWritten { term, version });
    }

    /// The answer to node `from`, whose charter has this age.
    fn asked(&mut self, from: u8, term: u64, age: (u64, u64), is_trial: bool) -> bool {
        self.hear(from, Body::VoteRequest { term, charter_term: age.0, charter_version: age.1, is_trial });
        let reply = self.sent().into_iter().find_map(|(to, body)| match body {
            Body::VoteReply { asked, is_trial: trial, granted, .. } => {
                assert_eq!((to, asked, trial), (from, term, is_trial));
                Some(granted)
            }
            _ => None,
        });
        reply.unwrap()
    }

    fn sent(&self) -> Vec<(u8, Body)> {
        let sent = self.actions.iter().filter_map(|action| match action {
            Action::Send { to, message } => Some((to.node.as_bytes()[0], message.body.clone())),
            _ => None,
        });
        sent.collect()
    }

    /// To whom it sent its charter.
    fn wrote(&self) -> Vec<u8> {
        let sent = self.sent().into_iter();
        sent.filter(|(_, body)| matches!(body, Body::WriteCharter(_))).map(|(to, _)| to).collect()
    }

    fn charter(&self) -> &Charter {
        self.council.charter().unwrap()
    }

    fn propose(&mut self, others: Vec<Voter>, settings: u8) {
        self.input(Input::Propose(Proposal::new(voter(0, true), others, vec![settings]).unwrap()));
    }

    fn follows(&self) -> Option<(u64, u8)> {
        self.actions.iter().find_map(|action| match action {
            Action::Follow(incumbent) => Some((incumbent.term, incumbent.peer.node.as_bytes()[0])),
            _ => None,
        })
    }

    fn leads(&self) -> bool {
        self.actions.iter().any(|action| matches!(action, Action::Lead { .. }))
    }

    fn steps_down(&self) -> bool {
        self.actions.iter().any(|action| matches!(action, Action::StepDown { .. }))
    }
}

fn incumbent(n: u8, term: u64) -> Incumbent {
    Incumbent { term, peer: voter(n, true).peer() }
}

mod quorums {
    use super::*;

    fn check(voters: Vec<Voter>, has: &[u8], expected: bool) {
        let charter = Charter { voters, ..charter(1) };
        let is = charter.is_quorum(|node| has.contains(&node.as_bytes()[0]));
        assert_eq!(is, expected, "{has:?} of {}", charter.voters.len());
    }

    #[test]
    fn more_than_half_decide_and_the_tie_breaker_breaks_ties() {
        for (n, has, expected) in [
            (1, &[0][..], true),
            (2, &[0], true),
            (2, &[1], false),
            (3, &[0], false),
            (3, &[0, 2], true),
            (3, &[1, 2], true),
            (4, &[0, 3], true),
            (4, &[2, 3], false),
            (4, &[1, 2, 3], true),
            (5, &[0, 1], false),
            (5, &[2, 3, 4], true),
            (0, &[0], false),
        ] {
            check(voters(n), has, expected);
        }
    }

    #[test]
    fn any_two_quorums_have_a_node_in_common() {
        for n in 1..=7u8 {
            for only_first in [true, false] {
                let voters: Vec<_> = (0..n).map(|n| voter(n, n == 0 || !only_first)).collect();
                let charter = Charter { voters, ..charter(1) };
                let decides = |set: u8| charter.is_quorum(|node| set >> node.as_bytes()[0] & 1 == 1);
                let all = u8::MAX >> (8 - n);
                assert!(decides(all));
                assert!((0..=all).all(|set| !(decides(set) && decides(all & !set))), "of {n} voters");
            }
        }
    }

    #[test]
    fn where_nobody_else_may_lead_the_first_decides_alone() {
        let others = || vec![voter(0, true), voter(1, false), voter(2, false)];
        check(others(), &[0], true);
        check(others(), &[1, 2], false);
    }

    #[test]
    fn during_a_change_both_sets_decide() {
        let joint =
            Charter { voters: vec![voter(0, true), voter(3, true), voter(4, true)], before: voters(3), ..charter(1) };
        let check = |has: &[u8]| joint.is_quorum(|node| has.contains(&node.as_bytes()[0]));
        assert!(check(&[0, 1, 3]) && check(&[1, 2, 3, 4]));
        assert!(!check(&[0, 1]) && !check(&[0, 3]) && !check(&[1, 2]) && !check(&[3, 4]));
    }
}

mod votes {
    use super::*;

    #[test]
    fn a_node_gives_one_vote_per_term_and_stores_it_first() {
        let mut seat = Seat::of(3, charter(4));
        assert!(seat.asked(1, 3, (2, 3), false));
        let Action::Store(stored) = seat.actions[0].clone() else { panic!("{:?}", seat.actions) };
        assert_eq!((stored.term, stored.voted), (3, Some((3, id(1)))));
        assert!(!seat.asked(2, 3, (2, 3), false));
        assert!(seat.asked(1, 3, (2, 3), false), "the answer may have been lost");
        let mut restarted = Seat::with(3, Stored::decode(&stored.encode()).unwrap());
        assert!(!restarted.asked(2, 3, (2, 3), false));
        assert!(restarted.asked(2, 4, (2, 3), false));
    }

    #[test]
    fn nobody_with_an_older_charter_gets_a_vote() {
        for is_trial in [true, false] {
            for (age, expected) in [((2, 2), false), ((1, 9), false), ((2, 3), true), ((3, 1), true)] {
                let mut seat = Seat::of(3, charter(4));
                assert_eq!(seat.asked(1, 4, age, is_trial), expected, "{age:?}");
            }
        }
    }

    #[test]
    fn whoever_hears_its_coordinator_votes_for_no_other() {
        for is_trial in [true, false] {
            let mut seat = Seat::of(3, charter(4));
            seat.council.heard(seat.now, id(0));
            seat.now += STICKY - Duration::from_millis(1);
            assert!(!seat.asked(1, 3, (2, 3), is_trial));
            assert_eq!(seat.council.term(), 2, "such a question begins no term");
            let Some((_, Body::VoteReply { incumbent: hint, .. })) = seat.sent().pop() else { panic!() };
            assert_eq!(hint, Some(incumbent(0, 2)));
            seat.now += Duration::from_millis(1);
            assert!(seat.asked(1, 3, (2, 3), is_trial));
        }
    }

    #[test]
    fn a_coordinator_that_restarted_gets_votes_at_once() {
        let mut seat = Seat::of(3, charter(4));
        seat.council.heard(seat.now, id(0));
        assert!(seat.asked(0, 3, (2, 3), true) && seat.asked(0, 3, (2, 3), false));
    }

    #[test]
    fn a_coordinator_with_a_quorum_favours_no_trial() {
        let mut seat = Seat::coordinator(4);
        assert!(!seat.asked(1, 4, (3, 4), true));
        seat.now += LEASE;
        assert!(seat.asked(1, 4, (3, 4), true));
        assert!(seat.council.is_coordinator(), "a trial promises nothing");
    }

    #[test]
    fn a_node_without_a_charter_votes_except_in_the_deployment_that_it_left() {
        assert!(Seat::with(3, Stored::default()).asked(1, 3, (2, 3), false));
        let stored = Stored { term: 5, voted: Some((5, id(1))), charter: Some(charter(4)), left: None }.forget();
        assert_eq!((stored.term, stored.voted, stored.left), (5, Some((5, id(1))), Some(DEPLOYMENT)));
        let mut seat = Seat::with(3, stored);
        seat.hear(2, Body::VoteRequest { term: 6, charter_term: 2, charter_version: 3, is_trial: false });
        assert_eq!(seat.actions, []);
    }

    #[test]
    fn other_deployments_are_ignored() {
        let mut seat = Seat::of(3, charter(4));
        for (deployment, named) in [(DeploymentId(8), DeploymentId(8)), (DEPLOYMENT, DeploymentId(8))] {
            let body = Body::WriteCharter(Charter { deployment: named, term: 9, coordinator: id(1), ..charter(4) });
            seat.input(Input::Message(id(1), CouncilMessage { deployment, body }));
            assert_eq!(seat.actions, []);
        }
    }
}

mod candidates {
    use super::*;

    #[test]
    fn each_waits_by_its_place() {
        for (n, wait) in [(1, GRACE), (2, GRACE + STAGGER), (3, GRACE + 2 * STAGGER)] {
            let mut seat = Seat::of(n, charter(4));
            seat.now += Duration::from_secs(1);
            seat.council.heard(seat.now, id(0));
            assert_eq!(seat.council.next_tick(), Some(seat.now + SILENCE + wait));
            seat.council.lost(seat.now, id(0));
            assert_eq!(seat.council.next_tick(), Some(seat.now + wait));
            seat.wait(wait - Duration::from_millis(1));
            assert_eq!(seat.sent(), []);
            seat.wait(Duration::from_millis(1));
            let body = Body::VoteRequest { term: 3, charter_term: 2, charter_version: 3, is_trial: true };
            assert_eq!(seat.sent().first(), Some(&(0, body)));
        }
    }

    #[test]
    fn who_may_not_lead_never_asks() {
        let mut charter = charter(4);
        charter.voters[3].may_lead = false;
        assert_eq!(Seat::of(3, charter).council.next_tick(), None);
        assert_eq!(Seat::of(9, self::charter(4)).council.next_tick(), None, "it is no voter");
        assert_eq!(Seat::with(9, Stored::default()).council.next_tick(), None);
    }

    #[test]
    fn a_trial_begins_no_term_and_its_answers_are_no_votes() {
        let mut seat = Seat::of(1, charter(5));
        seat.wait(GRACE);
        assert_eq!((seat.council.term(), seat.sent().len()), (2, 4));
        seat.grant(2, 3, true);
        assert_eq!(seat.council.term(), 2);
        seat.grant(3, 3, true);
        assert_eq!((seat.council.term(), seat.council.stored().voted), (3, Some((3, id(1)))));
        assert!(matches!(seat.actions[0], Action::Store(_)));
        seat.grant(4, 3, true);
        seat.grant(2, 3, true);
        assert!(!seat.council.is_coordinator());
        seat.grant(2, 3, false);
        seat.grant(2, 3, false);
        assert!(!seat.council.is_coordinator(), "a node has one vote");
        seat.grant(4, 3, false);
        assert!(seat.leads() && matches!(seat.actions[0], Action::Store(_)));
    }

    #[test]
    fn an_election_that_is_not_won_is_repeated_with_a_higher_term() {
        let mut seat = Seat::of(1, charter(3));
        seat.wait(GRACE);
        seat.grant(2, 3, true);
        seat.wait(Duration::from_secs(2));
        let Some((_, Body::VoteRequest { term, is_trial, .. })) = seat.sent().pop() else { panic!() };
        assert_eq!((term, is_trial), (4, true));
        seat.grant(2, 3, false);
        assert!(!seat.council.is_coordinator(), "the vote comes too late");
    }

    #[test]
    fn a_candidate_gives_way_to_whoever_was_elected() {
        let mut seat = Seat::of(1, charter(3));
        seat.wait(GRACE);
        seat.grant(2, 3, true);
        seat.hear(2, Body::WriteCharter(Charter { term: 3, version: 4, coordinator: id(2), ..charter(3) }));
        assert_eq!(seat.follows(), Some((3, 2)));
        seat.grant(0, 3, false);
        assert!(!seat.council.is_coordinator());
    }

    #[test]
    fn a_candidate_that_hears_its_coordinator_again_waits_anew() {
        let mut seat = Seat::of(1, charter(3));
        seat.wait(GRACE);
        seat.council.heard(seat.now, id(0));
        seat.grant(2, 3, true);
        assert_eq!(seat.council.term(), 2);
        assert_eq!(seat.council.next_tick(), Some(seat.now + SILENCE + GRACE));
    }

    #[test]
    fn whoever_is_behind_asks_again_for_a_term_that_is_left() {
        let mut seat = Seat::of(1, charter(3));
        seat.wait(GRACE);
        seat.hear(2, Body::VoteReply { asked: 3, is_trial: true, granted: false, term: 6, incumbent: None });
        let Some((_, Body::VoteRequest { term, is_trial, .. })) = seat.sent().pop() else { panic!() };
        assert_eq!((term, is_trial), (7, true));
    }

    #[test]
    fn hints_are_followed_if_they_are_news() {
        let denied =
            |hint| Body::VoteReply { asked: 3, is_trial: true, granted: false, term: 4, incumbent: Some(hint) };
        for (hint, expected) in [
            (incumbent(2, 4), Some((4, 2))),
            (incumbent(0, 3), Some((3, 0))),
            (incumbent(0, 2), None),
            (incumbent(2, 1), None),
            (incumbent(1, 4), None),
        ] {
            let mut seat = Seat::of(1, charter(3));
            seat.wait(GRACE);
            seat.hear(2, denied(hint.clone()));
            assert_eq!(seat.follows(), expected);
            let mut seat = Seat::of(1, charter(3));
            seat.hear(2, Body::Refused { term: 4, incumbent: Some(hint) });
            assert_eq!(seat.follows(), expected);
        }
    }

    #[test]
    fn the_last_term_is_the_end_of_elections_and_not_of_the_process() {
        let mut seat = Seat::of(1, Charter { term: MAX_TERM, version: MAX_TERM, ..charter(1) });
        seat.wait(Duration::from_secs(30));
        let mut seat = Seat::of(0, Charter { term: MAX_TERM, version: MAX_TERM, ..charter(1) });
        seat.wait(Duration::from_secs(30));
        assert!(!seat.council.is_coordinator());
        let mut seat = Seat::of(0, Charter { version: MAX_TERM, ..charter(1) });
        seat.propose(vec![voter(1, true)], 2);
        seat.wait(Duration::from_secs(30));
        assert_eq!(seat.charter().version, MAX_TERM);
    }
}

mod coordinators {
    use super::*;

    #[test]
    fn a_founder_leads_at_once() {
        let stored = Stored { term: 6, ..Stored::default() }.found(DEPLOYMENT, voter(0, false), vec![5]).unwrap();
        let seat = Seat::with(0, stored);
        let [Action::Store(stored), Action::Lead { term: 7, .. }] = &seat.actions[..] else { panic!() };
        assert_eq!(stored.charter.as_ref().map(Charter::age), Some((7, 1)));
        assert!(seat.council.is_settled() && seat.council.has_quorum(seat.now + Duration::from_secs(1_000)));
    }

    #[test]
    fn where_nobody_else_may_lead_no_answer_is_needed() {
        let mut charter = charter(4);
        charter.voters[1..].iter_mut().for_each(|voter| voter.may_lead = false);
        let seat = Seat::of(0, charter);
        assert!(seat.leads(), "after a restart as well");
        assert!(seat.council.has_quorum(seat.now + Duration::from_secs(1_000)));
    }

    #[test]
    fn a_coordinator_that_restarts_must_be_elected_again_and_asks_at_once() {
        let mut seat = Seat::of(0, charter(3));
        assert_eq!((seat.leads(), seat.sent().len()), (false, 2));
        seat.wait(Duration::from_secs(10));
        assert!(!seat.council.is_coordinator());
        seat.grant(2, 3, true);
        seat.grant(2, 3, false);
        assert!(seat.leads());
        assert_eq!(seat.charter().age(), (3, 4));
    }

    #[test]
    fn a_coordinator_that_restarts_follows_whoever_replaced_it() {
        let mut seat = Seat::of(0, charter(3));
        let hint = Some(incumbent(1, 5));
        seat.hear(2, Body::VoteReply { asked: 3, is_trial: true, granted: false, term: 5, incumbent: hint.clone() });
        assert_eq!(seat.follows(), Some((5, 1)));
        assert_eq!(seat.council.incumbent(), hint);
    }

    #[test]
    fn a_higher_term_ends_it_at_once() {
        let reply = Body::VoteReply { asked: 3, is_trial: false, granted: false, term: 4, incumbent: None };
        for body in [
            Body::VoteRequest { term: 4, charter_term: 3, charter_version: 4, is_trial: false },
            Body::VoteRequest { term: 5, charter_term: 4, charter_version: 5, is_trial: true },
            reply,
            Body::WriteCharter(Charter { term: 4, version: 9, coordinator: id(1), ..charter(3) }),
            Body::CharterWritten { term: 4, version: 5 },
            Body::Refused { term: 4, incumbent: None },
        ] {
            let mut seat = Seat::coordinator(3);
            seat.hear(1, body.clone());
            assert!(seat.steps_down() && !seat.council.is_coordinator(), "{body:?}");
            assert!(!seat.council.has_quorum(seat.now));
            assert_eq!(seat.council.stored().term, 4);
        }
    }

    #[test]
    fn it_counts_on_voters_as_long_as_they_are_heard() {
        let mut seat = Seat::coordinator(5);
        let start = seat.now;
        seat.council.heard(start + LEASE / 2, id(1));
        seat.council.heard(start + LEASE / 2, id(9));
        assert!(seat.council.has_quorum(start + LEASE - Duration::from_millis(1)));
        assert!(!seat.council.has_quorum(start + LEASE), "two of five are left");
        seat.council.heard(start + LEASE, id(4));
        assert!(seat.council.has_quorum(start + LEASE));
        // A question is no sign of allegiance.
        seat.now += 4 * LEASE;
        (1..5).for_each(|from| _ = seat.asked(from, 4, (3, 4), true));
        assert!(!seat.council.has_quorum(seat.now));
    }

    #[test]
    fn whoever_takes_over_becomes_the_tie_breaker() {
        let mut seat = Seat::of(1, charter(4));
        seat.wait(GRACE);
        [2, 3].into_iter().for_each(|from| seat.grant(from, 3, true));
        [2, 3].into_iter().for_each(|from| seat.grant(from, 3, false));
        assert_eq!(seat.charter().age(), (3, 4));
        [2, 3].into_iter().for_each(|from| seat.written(from));
        assert_eq!((seat.charter().version, seat.charter().before.len()), (5, 4));
        [2, 3].into_iter().for_each(|from| seat.written(from));
        let order: Vec<_> = seat.charter().voters.iter().map(|voter| voter.node.as_bytes()[0]).collect();
        assert_eq!((order, seat.charter().before.len()), (vec![1, 0, 2, 3], 0));
    }
}
