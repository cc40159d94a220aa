use std::sync::Mutex;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use brigade_base::{DeploymentId, Epoch, ImageId, PassId};
use brigade_protocol::frame::{Feed, FrameHead, KvStep, row_bytes};
use brigade_protocol::kind;

use super::*;
use crate::images::Images;
use crate::test_link::TestLink;
use crate::test_stage::{MAX_ROWS, N_SLOTS, compute, loaded, rows, set};

const ATTACH: Attach = Attach { deployment: DeploymentId(1), epoch: Epoch(2), stage: 0, feed: Feed::Passes };
const PATIENCE: Duration = Duration::from_secs(30);

fn head(pass: u64, sets: &[RowSet], n_embd: u32) -> FrameHead {
    let Attach { deployment, epoch, .. } = ATTACH;
    let follows = PassId(pass.saturating_sub(1));
    FrameHead { deployment, epoch, pass: PassId(pass), follows, sets: sets.to_vec(), n_embd, ..FrameHead::default() }
}

fn in_frame(head: FrameHead) -> InFrame {
    let (now, rows) = (Instant::now(), rows(&head.sets, head.n_embd));
    InFrame { head, rows, arrived: now, decoded: now, read_us: 0 }
}

fn bytes(head: &FrameHead) -> Vec<u8> {
    let mut bytes = Vec::new();
    head.encode(&mut bytes);
    bytes.extend_from_slice(row_bytes(&rows(&head.sets, head.n_embd)));
    bytes
}

/// What was sent over a link: heads and rows.
type Sent = Receiver<(FrameHead, Vec<f32>)>;

/// A link that passes on what is sent over it, and yields what comes from `frames`.
fn link(frames: Receiver<(u8, Vec<u8>)>) -> (Arc<dyn Link>, Sent) {
    let (out, sent) = channel();
    let out = Mutex::new(out);
    let on_send = move |parts: &[&[u8]]| {
        let (mut head, mut rows) = (FrameHead::default(), Vec::new());
        head.decode(&parts.concat(), &mut rows).unwrap();
        let _ = out.lock().unwrap().send((head, rows));
    };
    (TestLink::of(on_send, move || frames.recv().ok()), sent)
}

fn closed() -> (Arc<dyn Link>, Sent) {
    link(channel().1)
}

/// The number of the first decode pass.
const FIRST_DECODE: u64 = 50;

/// Three tokens in every slot, then one token of each slot, two slots a frame.
fn prompts_and_decodes(n_embd: u32) -> (Vec<RowSet>, Vec<FrameHead>) {
    let prompts = (0..N_SLOTS).map(|slot| set(slot, 0, 3)).collect();
    let pair = |i: u32| head(FIRST_DECODE + u64::from(i), &[set(2 * i, 3, 1), set(2 * i + 1, 3, 1)], n_embd);
    (prompts, (0..N_SLOTS / 2).map(pair).collect())
}

#[test]
fn frames_that_are_computed_together_have_the_bits_and_the_order_of_each_alone() {
    let (mut together, mut alone) = (loaded(Images::off()), loaded(Images::off()));
    let n_embd = alone.runner.stage().n_embd();
    let (prompts, heads) = prompts_and_decodes(n_embd);
    assert_eq!(compute(&mut together.runner, &prompts), compute(&mut alone.runner, &prompts));

    let (outbound, sent) = closed();
    let incoming = Incoming::start(closed().0).unwrap();
    let outgoing = Some(Outgoing::new(outbound).unwrap());
    let mut stage = StageLoop::new(ATTACH, &mut together.runner, incoming, outgoing, Arc::default(), Arc::default());
    for head in &heads {
        stage.take(in_frame(head.clone())).unwrap();
    }
    let n_frames = n_together(&stage.waiting, MAX_ROWS);
    assert_eq!(n_frames, heads.len());
    let computed = stage.compute(n_frames).unwrap();
    stage.send(computed).unwrap();
    assert!(stage.waiting.is_empty());

    for head in &heads {
        let (came, rows) = sent.recv_timeout(PATIENCE).unwrap();
        assert_eq!((came.pass, &came.sets), (head.pass, &head.sets));
        assert_eq!(came.timings[0].n_frames as usize, heads.len());
        assert_eq!(rows, compute(&mut alone.runner, &head.sets), "pass {}", head.pass);
    }
}

#[test]
fn only_lone_rows_of_other_slots_join_a_batch() {
    let check = |sets: &[&[RowSet]], expected: usize, why: &str| {
        let waiting: VecDeque<_> = sets.iter().map(|sets| in_frame(head(1, sets, 1))).collect();
        assert_eq!(n_together(&waiting, 16), expected, "{why}");
    };
    let pair = [set(0, 9, 1), set(1, 9, 1)];
    let other = [set(2, 9, 1), set(3, 9, 1)];
    check(&[], 0, "nothing waits");
    check(&[&pair], 1, "nothing else waits");
    check(&[&pair, &other, &[set(4, 0, 1)]], 3, "lone rows");
    check(&[&pair, &other, &[set(3, 10, 1)]], 2, "the third has a slot of the second");
    check(&[&pair, &other[..1], &[set(5, 0, 0)]], 3, "a slot that is only cut back");
    check(&[&pair, &[set(0, 0, 0)], &other], 1, "a slot that is cut back behind its row");
    check(&[&[set(0, 1, 1)], &[set(1, 1, 1)]], 1, "two lone rows save nothing");
    check(&[&[set(0, 1, 1)], &[set(1, 1, 1)], &[set(2, 1, 1)]], 3, "three do");
    check(&[&pair, &[set(4, 0, 8)], &other], 1, "a prompt's chunk joins nobody");
    check(&[&[set(4, 0, 8)], &pair, &other], 1, "nor does anybody join a chunk alone");
    check(&[&[set(4, 0, 8), set(5, 9, 1)], &pair], 2, "but the lone rows beside it");
    check(&[&[set(4, 0, 14)], &pair], 1, "a chunk alone");
    check(&[&[set(4, 0, 13), set(5, 1, 1)], &pair, &other], 2, "no more rows than the stage takes");
    check(&[&[set(4, 0, 14), set(5, 1, 1)], &pair], 1, "not one too many");
    check(&[&[set(0, 0, 0)], &pair, &other], 1, "what has no rows goes at once");
    check(&[&pair, &[set(MAX_SESSIONS, 0, 1)]], 1, "a slot that does not exist");
}

#[test]
fn a_frame_with_steps_begins_a_batch_and_never_joins_one() {
    let frame = |slot, has_steps: bool| {
        let mut head = head(1, &[set(slot, 0, 1), set(slot + 1, 0, 1)], 1);
        head.steps.extend(has_steps.then_some((KvStep::Drop { image: ImageId(1) }, false)));
        in_frame(head)
    };
    let mut waiting = VecDeque::from([frame(0, true), frame(2, false), frame(4, true), frame(6, false)]);
    assert_eq!(n_together(&waiting, 16), 2);
    waiting.drain(..2);
    assert_eq!(n_together(&waiting, 16), 2);
}

/// A running stage between two links.
struct Running {
    stage: RunningStage,
    shadow: Arc<ShadowSlot>,
    activity: Arc<Activity>,
    frames: Sender<(u8, Vec<u8>)>,
    sent: Sent,
    ended: Receiver<(LoadedStage, StageEnd, Option<Held>)>,
    n_embd: u32,
}

fn running() -> Running {
    start(loaded(Images::off()), true)
}

/// Starts a stage that serves or stands by.
fn start(stage: LoadedStage, serves: bool) -> Running {
    let n_embd = stage.runner.stage().n_embd();
    let (frames, source) = channel();
    let (outbound, sent) = closed();
    let (shadow, activity) = (Arc::default(), Arc::default());
    let (end, ended) = channel();
    let tell = move |stage, why, held| end.send((stage, why, held)).unwrap();
    let route = if serves { Route::On { outbound, shadow: Arc::clone(&shadow) } } else { Route::Nowhere };
    let stage = RunningStage::start(ATTACH, stage, link(source).0, route, Arc::clone(&activity), tell).unwrap();
    Running { stage, shadow, activity, frames, sent, ended, n_embd }
}

impl Running {
    fn feed(&self, head: &FrameHead) {
        self.frames.send((kind::FRAME, bytes(head))).unwrap();
    }

    fn failure(&self) -> String {
        match self.ended.recv_timeout(PATIENCE).unwrap().1 {
            StageEnd::Failed(why) => why,
            StageEnd::LinkClosed => "the link closed".to_owned(),
        }
    }

    /// Closes the link, and waits until what has arrived is computed.
    fn finish(self) -> (LoadedStage, Option<Held>) {
        drop(self.frames);
        let (stage, end, held) = self.ended.recv_timeout(PATIENCE).unwrap();
        assert!(matches!(end, StageEnd::LinkClosed), "{end:?}");
        (stage, held)
    }
}

#[test]
fn a_running_stage_gives_the_bits_of_one_frame_after_the_other() {
    let running = running();
    let mut alone = loaded(Images::off());
    let (prompts, decodes) = prompts_and_decodes(running.n_embd);
    let prompts = (1..).zip(prompts.chunks(2)).map(|(pass, sets)| head(pass, sets, running.n_embd));
    let heads: Vec<_> = prompts.chain(decodes).collect();
    for head in &heads {
        running.feed(head);
    }
    for head in &heads {
        let (came, rows) = running.sent.recv_timeout(PATIENCE).unwrap();
        assert_eq!((came.pass, &came.sets), (head.pass, &head.sets));
        assert!(came.timings[0].n_frames > 0 && came.timings[0].compute_us > 0, "{:?}", came.timings);
        assert_eq!(rows, compute(&mut alone.runner, &head.sets));
    }
    let last = FIRST_DECODE + u64::from(N_SLOTS / 2) - 1;
    let progress = running.activity.progress();
    assert_eq!((progress.received, progress.sent), (PassId(last), PassId(last)));
    let (_, held) = running.finish();
    assert_eq!(held, Some(Held { applied: PassId(last), tokens: vec![4; N_SLOTS as usize] }));
}

#[test]
fn steps_come_back_with_their_marks() {
    let running = running();
    running.feed(&head(1, &[set(0, 0, 3)], running.n_embd));
    let mut with_steps = head(2, &[set(1, 3, 1)], running.n_embd);
    let copy = KvStep::Copy { slot: 1, from: 0, n_tokens: 3 };
    let save = KvStep::Save { slot: 0, n_tokens: 3, image: ImageId(1) };
    with_steps.steps = vec![(copy, false), (save, false)];
    running.feed(&with_steps);
    assert_eq!(running.sent.recv_timeout(PATIENCE).unwrap().0.pass, PassId(1));
    let (came, _) = running.sent.recv_timeout(PATIENCE).unwrap();
    assert_eq!(came.steps, [(copy, false), (save, true)], "this stage saves nothing");
}

#[test]
fn frames_of_an_old_placement_are_dropped() {
    let running = running();
    let old = FrameHead { epoch: Epoch(1), ..head(1, &[set(0, 0, 2)], running.n_embd) };
    running.feed(&old);
    running.feed(&head(2, &[set(0, 0, 2)], running.n_embd));
    assert_eq!(running.sent.recv_timeout(PATIENCE).unwrap().0.pass, PassId(2));
    running.stage.stop();
    running.finish();
}

#[test]
fn a_frame_that_makes_no_sense_ends_the_stage_with_a_message() {
    let check = |feed: &dyn Fn(&Running), says: &str| {
        let running = running();
        feed(&running);
        let why = running.failure();
        assert!(why.contains(says), "{why}");
    };
    check(&|running| running.frames.send((kind::FRAME, vec![1, 2, 3])).unwrap(), "broken frame");
    check(&|running| running.frames.send((kind::CHUNK, vec![])).unwrap(), "0x31");
    check(&|running| running.feed(&head(1, &[set(0, 0, 2)], running.n_embd + 1)), "instead of");
    check(&|running| running.feed(&head(1, &[set(0, 5, 2)], running.n_embd)), "holds 0");
    check(&|running| running.feed(&head(1, &[set(N_SLOTS, 0, 2)], running.n_embd)), "slot 8");
    check(
        &|running| (0..2).for_each(|_| running.feed(&head(3, &[set(0, 0, 2)], running.n_embd))),
        "pass 3 came behind",
    );
}

#[test]
fn a_stage_goes_on_in_the_next_placement_with_what_it_holds() {
    let first = running();
    let n_embd = first.n_embd;
    first.feed(&head(1, &[set(0, 0, 3)], n_embd));
    let (stage, held) = first.finish();
    assert_eq!(held.map(|held| (held.applied, held.tokens[0])), Some((PassId(1), 3)));
    let next = start(stage, true);
    // Passes between were lost with the ring.
    next.feed(&head(5, &[set(0, 3, 1)], n_embd));
    let (_, rows) = next.sent.recv_timeout(PATIENCE).unwrap();
    let mut alone = loaded(Images::off());
    compute(&mut alone.runner, &[set(0, 0, 3)]);
    assert_eq!(rows, compute(&mut alone.runner, &[set(0, 3, 1)]));
    let (stage, _) = next.finish();
    let again = start(stage, true);
    again.feed(&head(5, &[set(0, 4, 1)], n_embd));
    assert!(again.failure().contains("pass 5 came behind pass 5"));
}

#[test]
fn a_standby_holds_what_the_stage_holds_that_it_stands_by_for() {
    let upstream = running();
    let n_embd = upstream.n_embd;
    let (to_standby, shadowed) = closed();
    upstream.shadow.set(to_standby, || panic!("it keeps up")).unwrap();
    let (serving, standby) = (start(loaded(Images::off()), true), start(loaded(Images::off()), false));
    for pass in 1..=4 {
        upstream.feed(&head(pass, &[set(0, 4 * (pass as u32 - 1), 4), set(pass as u32, 0, 2)], n_embd));
        let forward = |sent: &Sent, to: &Running| {
            let (head, rows) = sent.recv_timeout(PATIENCE).unwrap();
            let mut bytes = Vec::new();
            head.encode(&mut bytes);
            bytes.extend_from_slice(row_bytes(&rows));
            to.frames.send((kind::FRAME, bytes)).unwrap();
        };
        forward(&upstream.sent, &serving);
        forward(&shadowed, &standby);
    }
    assert_eq!(serving.sent.recv_timeout(PATIENCE).unwrap().0.timings.len(), 2);
    let ((mut stage, held), (mut shadow, of_shadow)) = (serving.finish(), standby.finish());
    assert_eq!(held, of_shadow);
    assert_eq!(held.map(|held| (held.applied, held.tokens[0])), Some((PassId(4), 16)));
    let next = [set(0, 16, 1), set(2, 2, 1)];
    assert_eq!(compute(&mut stage.runner, &next), compute(&mut shadow.runner, &next));
}

#[test]
fn a_standby_that_joins_late_has_what_began_since_then() {
    let standby = start(loaded(Images::off()), false);
    let n_embd = standby.n_embd;
    standby.feed(&head(7, &[set(0, 9, 1), set(1, 0, 3)], n_embd));
    standby.feed(&head(8, &[set(0, 10, 1), set(1, 3, 1)], n_embd));
    let (stage, held) = standby.finish();
    let held = held.unwrap();
    assert_eq!((held.applied, &held.tokens[..2]), (PassId(8), &[0, 4][..]));
    // Its next link lacks a pass.
    let standby = start(stage, false);
    standby.feed(&head(10, &[set(1, 4, 1), set(2, 0, 2)], n_embd));
    let held = standby.finish().1.unwrap();
    assert_eq!((held.applied, &held.tokens[..3]), (PassId(10), &[0, 0, 2][..]));
}
