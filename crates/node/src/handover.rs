//! Moving what the slots of a stage hold from a node that leaves to its successor.
//!
//! Both sides have the stage to themselves on a thread of their own, and a link that nobody else uses. Messages are
//! those of [`brigade_protocol::handover`]; one image is in memory at a time.

use std::time::Instant;

use brigade_base::PassId;
use brigade_engine::KvError;
use brigade_net::{Link, LinkError};
use brigade_protocol::handover::{End, Intake, PIECE_BYTES, Slot, Taken};
use brigade_protocol::{DecodeError, kind};

use crate::stage_pass::PassRunner;

/// A hand-over did not come to its end. The successor computes everything again.
#[derive(Debug, thiserror::Error)]
pub enum HandoverError {
    /// The link ended, or it took too long.
    #[error("the hand-over broke off: {0}")]
    Link(#[from] LinkError),
    /// The peer sent what makes no sense.
    #[error("the hand-over makes no sense: {0}")]
    Decode(#[from] DecodeError),
    /// The engine refused.
    #[error("a slot could not be handed over: {0}")]
    Kv(#[from] KvError),
    /// The peer did not confirm.
    #[error("the successor answered with a message of kind {0:#x}")]
    Answer(u8),
}

/// Sends what the slots hold, and waits until it is taken.
///
/// # Errors
/// If the link or the engine fails. The slots are as before.
pub fn send(runner: &mut PassRunner, link: &dyn Link, until: Instant) -> Result<(), HandoverError> {
    let held = runner.rest().filter(|_| runner.stage().can_save()).unwrap_or_default();
    let mut image = Vec::new();
    for (slot, &n_tokens) in (0..).zip(&held.tokens).filter(|(_, n_tokens)| **n_tokens > 0) {
        runner.save_slot(slot, &mut image)?;
        let head = Slot { slot, n_tokens, n_bytes: image.len() as u64 };
        link.send(kind::HANDOVER_SLOT, &[&head.encode()])?;
        for piece in image.chunks(PIECE_BYTES) {
            link.send(kind::HANDOVER_PIECE, &[piece])?;
            if Instant::now() >= until {
                return Err(LinkError::TimedOut.into());
            }
        }
    }
    link.send(kind::HANDOVER_END, &[&End { applied: held.applied }.encode()])?;
    match link.recv(&mut image, Some(until))? {
        kind::HANDOVER_TAKEN => Ok(()),
        other => Err(HandoverError::Answer(other)),
    }
}

/// Fills the slots with what comes, and confirms it.
///
/// # Errors
/// If the link or the engine fails, or the peer sends what makes no sense. The slots are then empty.
pub fn receive(runner: &mut PassRunner, link: &dyn Link, until: Instant) -> Result<(), HandoverError> {
    runner.clear();
    let applied = fill(runner, link, until).inspect_err(|_| runner.clear())?;
    if applied == PassId(0) {
        runner.clear();
    } else {
        runner.note_applied(applied);
    }
    // The slots are filled whether or not the other side hears of it.
    let _ = link.send(kind::HANDOVER_TAKEN, &[]);
    Ok(())
}

/// Fills the slots; the pass up to which they are whole.
fn fill(runner: &mut PassRunner, link: &dyn Link, until: Instant) -> Result<PassId, HandoverError> {
    link.set_frame_limit(PIECE_BYTES);
    let mut intake = Intake::new(runner.room());
    let mut message = Vec::new();
    loop {
        let kind = link.recv(&mut message, Some(until))?;
        match intake.take(kind, &message)? {
            Taken::More => {}
            Taken::Slot { slot, n_tokens, image } => runner.restore_slot(slot, image, n_tokens)?,
            Taken::End(End { applied }) => return Ok(applied),
        }
        // A frame that has arrived is given out late too.
        if Instant::now() >= until {
            return Err(LinkError::TimedOut.into());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, Sender, channel};
    use std::sync::{Arc, Mutex};
    use std::time::Duration;

    use super::*;
    use crate::images::Images;
    use crate::loaded::LoadedStage;
    use crate::test_link::TestLink;
    use crate::test_stage::{compute, loaded, set};

    type Message = (u8, Vec<u8>);

    /// A link; what it sends goes to `out`, what it receives comes from `source`.
    fn end(out: Sender<Message>, source: Receiver<Message>) -> Arc<dyn Link> {
        let out = Mutex::new(out);
        let kinds = move |kind: u8, parts: &[&[u8]]| drop(out.lock().unwrap().send((kind, parts.concat())));
        TestLink::with_kinds(kinds, move || source.recv().ok())
    }

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(30)
    }

    fn filled() -> LoadedStage {
        let mut stage = loaded(Images::off());
        compute(&mut stage.runner, &[set(0, 0, 5), set(3, 0, 9)]);
        stage.runner.note_applied(PassId(7));
        stage
    }

    /// What a stage sends that hands over.
    fn sent(stage: &mut LoadedStage) -> Vec<Message> {
        let (out, messages) = channel();
        let (confirm, answers) = channel();
        confirm.send((kind::HANDOVER_TAKEN, vec![])).unwrap();
        send(&mut stage.runner, &*end(out, answers), soon()).unwrap();
        messages.try_iter().collect()
    }

    /// What receiving these messages comes to, and what was answered.
    fn take(
        stage: &mut LoadedStage,
        messages: &[Message],
        until: Instant,
    ) -> (Result<(), HandoverError>, Vec<Message>) {
        let (feed, source) = channel();
        let (out, answers) = channel();
        messages.iter().for_each(|message| feed.send(message.clone()).unwrap());
        drop(feed);
        let result = receive(&mut stage.runner, &*end(out, source), until);
        (result, answers.try_iter().collect())
    }

    #[test]
    fn a_successor_goes_on_with_the_same_bits() {
        let (mut leaver, mut successor) = (filled(), loaded(Images::off()));
        // The successor held something else before.
        compute(&mut successor.runner, &[set(0, 0, 2), set(1, 0, 4)]);
        let messages = sent(&mut leaver);
        let (result, answers) = take(&mut successor, &messages, soon());
        result.unwrap();
        assert_eq!(answers, [(kind::HANDOVER_TAKEN, vec![])]);
        let held = successor.runner.rest();
        assert_eq!(held, leaver.runner.rest());
        assert_eq!(held.map(|held| (held.applied, held.tokens[3], held.tokens[1])), Some((PassId(7), 9, 0)));
        let next = [set(0, 5, 1), set(3, 9, 1)];
        assert_eq!(compute(&mut successor.runner, &next), compute(&mut leaver.runner, &next));
    }

    #[test]
    fn a_hand_over_that_breaks_off_leaves_the_slots_empty() {
        let messages = sent(&mut filled());
        for n in 0..messages.len() {
            let mut successor = filled();
            let (result, answers) = take(&mut successor, &messages[..n], soon());
            assert!(matches!(result, Err(HandoverError::Link(_))), "{n} messages");
            assert_eq!((successor.runner.rest(), answers), (None, vec![]));
        }
        let mut successor = filled();
        let (result, _) = take(&mut successor, &messages, Instant::now());
        assert!(matches!(result, Err(HandoverError::Link(LinkError::TimedOut))));
        assert_eq!(successor.runner.rest(), None);
    }

    #[test]
    fn an_image_that_is_none_is_refused() {
        let mut messages = sent(&mut filled());
        messages[1].1[0] ^= 1;
        let mut successor = filled();
        assert!(matches!(take(&mut successor, &messages, soon()).0, Err(HandoverError::Kv(_))));
        assert_eq!(successor.runner.rest(), None);
    }

    #[test]
    fn a_stage_that_holds_nothing_says_so_at_once() {
        let messages = sent(&mut loaded(Images::off()));
        assert_eq!(messages.len(), 1);
        let mut successor = filled();
        assert!(take(&mut successor, &messages, soon()).0.is_ok());
        assert_eq!(successor.runner.rest(), None);
    }

    #[test]
    fn without_a_confirmation_the_leaver_keeps_its_slots() {
        let mut leaver = filled();
        let (out, _messages) = channel();
        let answers = channel().1;
        let result = send(&mut leaver.runner, &*end(out, answers), soon());
        assert!(matches!(result, Err(HandoverError::Link(LinkError::Closed))));
        assert_eq!(leaver.runner.rest().map(|held| held.tokens[3]), Some(9));
    }
}
