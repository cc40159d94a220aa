//! One answer in the making: choosing its tokens and telling its caller.

use brigade_base::Token;
use brigade_engine::{NoNumbers, Sampler, Vocabulary};
use tokio::sync::mpsc::UnboundedSender;

use super::inbox::OpenCount;
use crate::meter::End;
use crate::serving::{Event, Failure, FinishReason, TokenLogprob, Usage};
use crate::text::Assembler;

/// What became of an answer with its newest token.
pub(super) enum Chosen {
    /// The token travels with the next pass.
    GoOn(Token),
    /// The answer is complete, and its caller knows.
    Ended(End),
}

/// What of a request is still needed once its prompt is with the scheduler.
pub(super) struct Wishes {
    pub(super) max_tokens: Option<u32>,
    pub(super) logprobs: Option<u8>,
    pub(super) ignore_end: bool,
}

/// An answer and its caller.
pub(super) struct Answer {
    pub(super) wishes: Wishes,
    pub(super) events: UnboundedSender<Event>,
    pub(super) sampler: Sampler,
    pub(super) text: Assembler,
    pub(super) usage: Usage,
    /// Where the scheduler said so; only the first time counts, as a session that was preempted is not cheaper.
    pub(super) has_started: bool,
    /// Rings in a row that ended while rows of it were on their way, since its last token.
    pub(super) rings_lost: u32,
    /// The time that its request gave it.
    pub(super) timeout: Option<std::time::Duration>,
    pub(super) _open: OpenCount,
}

impl Answer {
    /// Chooses the token for `position` and tells the caller.
    ///
    /// # Errors
    /// If no token can be chosen; the caller was not told.
    pub(super) fn choose(
        &mut self,
        logits: &[f32],
        position: u32,
        vocabulary: &Vocabulary,
    ) -> Result<Chosen, NoNumbers> {
        let token = self.sampler.sample(logits, position)?;
        self.rings_lost = 0;
        self.sampler.accept(token);
        self.usage.completion_tokens += 1;
        if vocabulary.is_end(token) && !self.wishes.ignore_end {
            return Ok(Chosen::Ended(self.finish(FinishReason::Stop)));
        }
        let bytes = vocabulary.token_bytes(token, false);
        let logprob = self.wishes.logprobs.map(|n_top| logprob(logits, token, n_top, vocabulary));
        let assembled = self.text.push(&bytes);
        let position = self.usage.completion_tokens - 1;
        self.tell(Event::Token { position, token, text: assembled.text, logprob });
        if assembled.stopped {
            return Ok(Chosen::Ended(self.done(FinishReason::Stop)));
        }
        Ok(match self.is_long_enough() {
            true => Chosen::Ended(self.finish(FinishReason::Length)),
            false => Chosen::GoOn(token),
        })
    }

    fn is_long_enough(&self) -> bool {
        self.wishes.max_tokens.is_some_and(|most| self.usage.completion_tokens >= most)
    }

    /// Takes in tokens that were chosen and told elsewhere, so that the next one follows them. If nothing follows them,
    /// tells that and returns how the answer ended; `is_full` says that they fill the context.
    pub(super) fn retrace(&mut self, told: &[Token], is_full: bool, vocabulary: &Vocabulary) -> Option<End> {
        let mut stopped = false;
        for token in told {
            self.sampler.accept(*token);
            self.usage.completion_tokens += 1;
            stopped |= self.text.push(&vocabulary.token_bytes(*token, false)).stopped;
        }
        match stopped {
            true => Some(self.done(FinishReason::Stop)),
            false if self.is_long_enough() || is_full && !told.is_empty() => Some(self.finish(FinishReason::Length)),
            false => None,
        }
    }

    /// Tells what is still held, and the end.
    pub(super) fn finish(&mut self, reason: FinishReason) -> End {
        let rest = self.text.finish();
        if !rest.is_empty() {
            self.tell(Event::Text { text: rest });
        }
        self.done(reason)
    }

    /// Tells the vector of the text, and the end.
    pub(super) fn pooled(&self, values: Vec<f32>) -> End {
        self.tell(Event::Pooled { values });
        self.done(FinishReason::Stop)
    }

    fn done(&self, reason: FinishReason) -> End {
        self.tell(Event::Done { reason, usage: self.usage });
        match reason {
            FinishReason::Stop => End::Stop,
            FinishReason::Length => End::Length,
        }
    }

    /// Tells its caller, if he is still there.
    pub(super) fn tell(&self, event: Event) {
        let _ = self.events.send(event);
    }

    /// Tells that it cannot be completed.
    pub(super) fn fail(&self, failure: Failure) {
        self.tell(Event::Failed(failure));
    }
}

fn logprob(logits: &[f32], token: Token, n_top: u8, vocabulary: &Vocabulary) -> TokenLogprob {
    let (logprob, top) = brigade_engine::log_probabilities(logits, token, n_top.into());
    let bytes_of = |token| vocabulary.token_bytes(token, true);
    TokenLogprob {
        token,
        bytes: bytes_of(token),
        logprob,
        top: top.into_iter().map(|(token, logprob)| (token, bytes_of(token), logprob)).collect(),
    }
}
