//! Whatever happens in whatever order, nothing is used twice, and all is given back.

use super::*;

/// What a test driver knows of the things that it owns.
#[derive(Default)]
struct World {
    loading: Vec<HoldId>,
    resting: Vec<HoldId>,
    busy: Vec<HoldId>,
    dials: Vec<DialId>,
    /// Links that the machine has.
    links: Vec<LinkId>,
}

impl World {
    /// Does what is asked, and checks that it can be done.
    fn act(&mut self, action: &Action) {
        let mut take = |link: LinkId| {
            let at =
                self.links.iter().position(|known| *known == link).unwrap_or_else(|| panic!("{link:?} is not there"));
            self.links.remove(at);
        };
        let mut used = None;
        match action {
            Action::Load(load) => {
                assert!(self.loading.is_empty());
                self.loading.push(load.id);
            }
            Action::Free(id) => {
                assert!(self.loading.contains(id) || self.resting.contains(id));
                self.resting.retain(|known| known != id);
            }
            Action::Empty(id) => assert!(self.resting.contains(id)),
            Action::Dial(id, ..) => self.dials.push(*id),
            Action::Close(link) => take(*link),
            Action::Serve { id, inbound, outbound, .. } => {
                take(*inbound);
                take(*outbound);
                used = Some(*id);
            }
            Action::StandBy { id, inbound: link, .. }
            | Action::Send { id, link, .. }
            | Action::Receive { id, link, .. } => {
                take(*link);
                used = Some(*id);
            }
            Action::Shadow(id, link) => {
                assert!(self.busy.contains(id));
                link.iter().for_each(|link| take(*link));
            }
            Action::Stop(id) => assert!(self.busy.contains(id)),
            Action::Tell(_) | Action::End => {}
        }
        if let Some(id) = used {
            assert!(self.resting.contains(&id), "{id:?} is not at rest");
            self.resting.retain(|known| *known != id);
            self.busy.push(id);
        }
    }
}

fn any_order(stage: u32, kind: u8) -> StageOrder {
    match kind % 7 {
        0 => standby(stage, None),
        1 => standby(stage, Some(1)),
        2 => hand_over(stage, 3),
        3 => with_shadow(stage, 3),
        4 => taken_over(stage, 4),
        5 => without_kv(serve(stage)),
        _ => serve(stage),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]
    #[test]
    fn whatever_happens_nothing_is_used_twice_and_all_is_freed(
        steps in prop::collection::vec(any::<[u8; 4]>(), 0..80),
    ) {
        let (mut stages, mut world, mut now) = (Stages::new(), World::default(), Instant::now());
        let (mut epoch, mut revision, mut link) = (1, 0, 0);
        let mut feed = |world: &mut World, now, input| {
            for action in stages.handle(now, input) {
                world.act(&action);
            }
            assert!(stages.next_tick().is_none_or(|at| at > now), "{:?}", stages);
            assert!(stages.inbound.len() <= 3 * 4);
            stages.view().len()
        };
        feed(&mut world, now, Input::CoordinatorHere);
        for [what, a, b, c] in steps {
            link += 1;
            let input = match what % 11 {
                0 | 1 => {
                    (epoch, revision) = if a % 2 == 0 { (epoch + 1, 0) } else { (epoch, revision + 1) };
                    let order = |stage| any_order(stage, c.wrapping_add(stage as u8 * b));
                    let stages = (0..u32::from(b % 3)).map(order).collect();
                    Input::Assign(Box::new(assign(epoch, revision, stages)))
                }
                2 => Input::Join { deployment: DEPLOYMENT, epoch: Epoch(epoch) },
                3 | 4 if !world.loading.is_empty() => {
                    let id = world.loading.remove(0);
                    if a % 4 > 0 {
                        world.resting.push(id);
                    }
                    Input::Loaded(id, if a % 4 > 0 { Ok(MEMORY) } else { Err("no".into()) })
                }
                5 | 6 if !world.dials.is_empty() => {
                    let dial = world.dials.remove(usize::from(a) % world.dials.len());
                    if b % 4 > 0 {
                        world.links.push(LinkId(link));
                    }
                    Input::Dialled(dial, if b % 4 > 0 { Ok(LinkId(link)) } else { Err("no".into()) })
                }
                7 if !world.busy.is_empty() => {
                    let id = world.busy.remove(usize::from(a) % world.busy.len());
                    world.resting.push(id);
                    let end = [End::Done, End::Closed, End::Failed("no".into())][usize::from(b) % 3].clone();
                    Input::Ended { id, end, held: (c % 2 == 0).then(|| held(1)) }
                }
                8 => {
                    world.links.push(LinkId(link));
                    let feed = [Feed::Passes, Feed::Shadow, Feed::Handover][usize::from(a) % 3];
                    let attach = attach(epoch, u32::from(b % 3), feed);
                    Input::Inbound { link: LinkId(link), peer: node([1, 4][usize::from(c) % 2]), attach }
                }
                9 => [Input::CoordinatorHere, Input::CoordinatorGone][usize::from(a) % 2].clone(),
                _ => {
                    now += Duration::from_millis(u64::from(a) * 20);
                    Input::Tick
                }
            };
            feed(&mut world, now, input);
        }
        // Its coordinator is gone for good: everything ends.
        feed(&mut world, now, Input::CoordinatorGone);
        now += Duration::from_millis(LEASE_MS);
        feed(&mut world, now, Input::Tick);
        for id in mem::take(&mut world.loading) {
            world.resting.push(id);
            feed(&mut world, now, Input::Loaded(id, Ok(MEMORY)));
        }
        for dial in mem::take(&mut world.dials) {
            world.links.push(LinkId(u64::MAX));
            feed(&mut world, now, Input::Dialled(dial, Ok(LinkId(u64::MAX))));
        }
        for id in mem::take(&mut world.busy) {
            world.resting.push(id);
            feed(&mut world, now, Input::Ended { id, end: End::Closed, held: None });
        }
        prop_assert_eq!((world.resting, world.links), (vec![], vec![]));
        prop_assert_eq!(feed(&mut World::default(), now, Input::Tick), 0);
    }
}
