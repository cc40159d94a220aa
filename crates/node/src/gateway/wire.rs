//! Between what requests and answers are called in this crate and what travels, see [`brigade_protocol::requests`].

use std::time::Duration;

use brigade_base::{Hash, Token};
use brigade_protocol::requests::{self, Card, Finish, Logprob, MAX_TIMEOUT_MS, Refusal, Submit, ToGateway};

use crate::serving::{
    Event, Failure, FinishReason, ModelCard, Purpose, Readiness, Request, Sampling, SubmitError, TextPlace, TextsDone,
    TokenLogprob, Usage,
};

/// A request with the known part of its answer, to be sent under `number`.
pub(super) fn submit(number: u64, request: &Request, answer: &[Token]) -> Submit {
    let sampling = &request.sampling;
    Submit {
        number,
        id: request.id.clone(),
        tenant: request.tenant,
        priority: request.priority,
        timeout_ms: request
            .timeout
            .map(|timeout| u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX).min(MAX_TIMEOUT_MS)),
        prompt: request.prompt.clone(),
        max_tokens: request.max_tokens,
        sampling: requests::Sampling {
            temperature: sampling.temperature,
            top_k: sampling.top_k,
            top_p: sampling.top_p,
            min_p: sampling.min_p,
            repeat_penalty: sampling.repeat_penalty,
            frequency_penalty: sampling.frequency_penalty,
            presence_penalty: sampling.presence_penalty,
            penalty_window: sampling.penalty_window,
            seed: sampling.seed,
            logit_bias: sampling.logit_bias.clone(),
        },
        stop: request.stop.clone(),
        logprobs: request.logprobs,
        ignore_end: request.ignore_end,
        text_idx: request.place.idx,
        n_texts: request.place.n_texts,
        n_texts_done: request.done.get(),
        answer: answer.to_vec(),
    }
}

/// The request that came, and the known part of its answer.
pub(super) fn request(submit: Submit) -> (Request, Vec<Token>) {
    let sampling = submit.sampling;
    let request = Request {
        id: submit.id,
        tenant: submit.tenant,
        priority: submit.priority,
        timeout: submit.timeout_ms.map(Duration::from_millis),
        prompt: submit.prompt,
        max_tokens: submit.max_tokens,
        sampling: Sampling {
            temperature: sampling.temperature,
            top_k: sampling.top_k,
            top_p: sampling.top_p,
            min_p: sampling.min_p,
            repeat_penalty: sampling.repeat_penalty,
            frequency_penalty: sampling.frequency_penalty,
            presence_penalty: sampling.presence_penalty,
            penalty_window: sampling.penalty_window,
            seed: sampling.seed,
            logit_bias: sampling.logit_bias,
        },
        stop: submit.stop,
        logprobs: submit.logprobs,
        ignore_end: submit.ignore_end,
        place: TextPlace { idx: submit.text_idx, n_texts: submit.n_texts },
        done: TextsDone::of(submit.n_texts_done),
    };
    (request, submit.answer)
}

/// What a session tells, for the gateway that asked under `number`.
pub(super) fn message(number: u64, event: Event) -> ToGateway {
    match event {
        Event::Token { position, token, text, logprob } => {
            let logprob = logprob.map(|l| Logprob { bytes: l.bytes, logprob: l.logprob, top: l.top });
            ToGateway::Token { number, position, token, text, logprob }
        }
        Event::Text { text } => ToGateway::Text { number, text },
        Event::Pooled { values } => ToGateway::Pooled { number, values },
        Event::Paused { why } => ToGateway::Paused { number, why },
        Event::Resumed => ToGateway::Resumed { number },
        Event::Done { reason, usage: Usage { prompt_tokens, cached_tokens, completion_tokens } } => {
            let reason = match reason {
                FinishReason::Stop => Finish::Stop,
                FinishReason::Length => Finish::Length,
            };
            let usage = requests::Usage { prompt_tokens, cached_tokens, completion_tokens };
            ToGateway::Done { number, reason, usage }
        }
        Event::Failed(Failure::Refused(error)) => ToGateway::Refused { number, refusal: refusal(error) },
        Event::Failed(failure) => {
            let failure = match failure {
                Failure::PlacementLost(why) => requests::Failure::PlacementLost(why),
                Failure::Stopping => requests::Failure::Stopping,
                Failure::TimedOut { .. } => requests::Failure::TimedOut,
                Failure::Engine(why) => requests::Failure::Engine(why),
                Failure::Refused(error) => requests::Failure::Engine(error.to_string()),
            };
            ToGateway::Failed { number, failure }
        }
    }
}

/// Which request a message is for, and what its session tells; `None` for those that are for none.
pub(super) fn event(message: ToGateway) -> Option<(u64, Event)> {
    Some(match message {
        ToGateway::Token { number, position, token, text, logprob } => {
            let logprob = logprob.map(|l| TokenLogprob { token, bytes: l.bytes, logprob: l.logprob, top: l.top });
            (number, Event::Token { position, token, text, logprob })
        }
        ToGateway::Text { number, text } => (number, Event::Text { text }),
        ToGateway::Pooled { number, values } => (number, Event::Pooled { values }),
        ToGateway::Paused { number, why } => (number, Event::Paused { why }),
        ToGateway::Resumed { number } => (number, Event::Resumed),
        ToGateway::Done { number, reason, usage } => {
            let requests::Usage { prompt_tokens, cached_tokens, completion_tokens } = usage;
            let reason = match reason {
                Finish::Stop => FinishReason::Stop,
                Finish::Length => FinishReason::Length,
            };
            (number, Event::Done { reason, usage: Usage { prompt_tokens, cached_tokens, completion_tokens } })
        }
        ToGateway::Failed { number, failure } => {
            let failure = match failure {
                requests::Failure::PlacementLost(why) => Failure::PlacementLost(why),
                requests::Failure::Stopping => Failure::Stopping,
                // The session knows how long it was.
                requests::Failure::TimedOut => Failure::TimedOut { after: Duration::ZERO },
                requests::Failure::Engine(why) => Failure::Engine(why),
            };
            (number, Event::Failed(failure))
        }
        ToGateway::Refused { number, refusal } => (number, Event::Failed(Failure::Refused(submit_error(refusal)))),
        ToGateway::Card(_) | ToGateway::Vocabulary { .. } | ToGateway::Report { .. } | ToGateway::Beat(_) => {
            return None;
        }
    })
}

fn refusal(error: SubmitError) -> Refusal {
    match error {
        SubmitError::NotReady(why) => Refusal::NotReady(why),
        SubmitError::Busy { waiting } => Refusal::Busy { waiting: waiting as u64 },
        SubmitError::PromptTooLong { tokens, context, .. } => Refusal::PromptTooLong { tokens: tokens as u64, context },
        SubmitError::TextTooLong { tokens, most, .. } => Refusal::TextTooLong { tokens: tokens as u64, most },
        SubmitError::PromptEmpty => Refusal::PromptEmpty,
        SubmitError::UnknownToken { token, n_vocab } => Refusal::UnknownToken { token, n_vocab },
        SubmitError::Invalid(why) => Refusal::Invalid(why),
        SubmitError::Stopping => Refusal::Stopping,
    }
}

fn submit_error(refusal: Refusal) -> SubmitError {
    match refusal {
        Refusal::NotReady(why) => SubmitError::NotReady(why),
        Refusal::Busy { waiting } => SubmitError::Busy { waiting: waiting as usize },
        // A coordinator sees tokens, so it has counted them all.
        Refusal::PromptTooLong { tokens, context } => {
            SubmitError::PromptTooLong { tokens: tokens as usize, is_bound: false, context }
        }
        Refusal::TextTooLong { tokens, most } => {
            SubmitError::TextTooLong { tokens: tokens as usize, is_bound: false, most }
        }
        Refusal::PromptEmpty => SubmitError::PromptEmpty,
        Refusal::UnknownToken { token, n_vocab } => SubmitError::UnknownToken { token, n_vocab },
        Refusal::Invalid(why) => SubmitError::Invalid(why),
        Refusal::Stopping => SubmitError::Stopping,
    }
}

pub(super) fn card(card: &ModelCard, vocabulary: Hash) -> Card {
    Card {
        name: card.name.clone(),
        id: card.id,
        created: card.created,
        context: card.context,
        n_vocab: card.n_vocab,
        chat_template: card.chat_template.clone(),
        bos_text: card.bos_text.clone(),
        eos_text: card.eos_text.clone(),
        purpose: match card.purpose {
            Purpose::Generate => requests::Purpose::Generate,
            Purpose::Embed => requests::Purpose::Embed,
            Purpose::Rank => requests::Purpose::Rank,
        },
        rank_template: card.rank_template.clone(),
        n_values: card.n_values,
        has_class_shares: card.has_class_shares,
        vocabulary,
    }
}

pub(super) fn model_card(card: Card) -> ModelCard {
    ModelCard {
        name: card.name,
        id: card.id,
        created: card.created,
        context: card.context,
        n_vocab: card.n_vocab,
        chat_template: card.chat_template,
        bos_text: card.bos_text,
        eos_text: card.eos_text,
        purpose: match card.purpose {
            requests::Purpose::Generate => Purpose::Generate,
            requests::Purpose::Embed => Purpose::Embed,
            requests::Purpose::Rank => Purpose::Rank,
        },
        rank_template: card.rank_template,
        n_values: card.n_values,
        has_class_shares: card.has_class_shares,
    }
}

pub(super) fn readiness(readiness: Readiness) -> requests::Readiness {
    match readiness {
        Readiness::Ready => requests::Readiness::Ready,
        Readiness::Recovering(why) => requests::Readiness::Recovering(why),
        Readiness::NotReady(why) => requests::Readiness::NotReady(why),
    }
}

pub(super) fn readiness_told(readiness: requests::Readiness) -> Readiness {
    match readiness {
        requests::Readiness::Ready => Readiness::Ready,
        requests::Readiness::Recovering(why) => Readiness::Recovering(why),
        requests::Readiness::NotReady(why) => Readiness::NotReady(why),
    }
}

#[cfg(test)]
mod tests {
    use brigade_base::{ModelId, TenantId};

    use super::*;

    #[test]
    fn a_request_comes_out_as_it_went_in() {
        let before = Request {
            id: "cmpl-1".into(),
            tenant: TenantId(4),
            priority: -3,
            timeout: Some(Duration::from_millis(1500)),
            prompt: vec![1, 2, 3],
            max_tokens: Some(0),
            sampling: Sampling {
                temperature: 0.5,
                top_k: 1,
                top_p: 0.25,
                min_p: 0.125,
                repeat_penalty: 1.5,
                frequency_penalty: 2.5,
                presence_penalty: 3.5,
                penalty_window: 9,
                seed: 7,
                logit_bias: vec![(1, 0.5)],
            },
            stop: vec!["END".into()],
            logprobs: Some(3),
            ignore_end: true,
            place: TextPlace { idx: 3, n_texts: 9 },
            done: TextsDone::of(2),
        };
        let (after, answer) = request(submit(5, &before, &[8, 9]));
        assert_eq!(format!("{after:?}"), format!("{before:?}"));
        assert_eq!(answer, [8, 9]);
    }

    #[test]
    fn events_come_out_as_they_went_in() {
        let logprob = TokenLogprob { token: 4, bytes: vec![1], logprob: -1.0, top: vec![(5, vec![2], -2.0)] };
        let refused = [
            SubmitError::NotReady("a".into()),
            SubmitError::Busy { waiting: 3 },
            SubmitError::PromptTooLong { tokens: 4, is_bound: false, context: 5 },
            SubmitError::TextTooLong { tokens: 7, is_bound: false, most: 6 },
            SubmitError::PromptEmpty,
            SubmitError::UnknownToken { token: -1, n_vocab: 6 },
            SubmitError::Invalid("b".into()),
            SubmitError::Stopping,
        ];
        let mut events = vec![
            Event::Token { position: 3, token: 4, text: "x".into(), logprob: Some(logprob) },
            Event::Text { text: "y".into() },
            Event::Pooled { values: vec![0.5, -2.0] },
            Event::Paused { why: "z".into() },
            Event::Resumed,
            Event::Done {
                reason: FinishReason::Length,
                usage: Usage { prompt_tokens: 1, cached_tokens: 2, completion_tokens: 3 },
            },
            Event::Failed(Failure::PlacementLost("a".into())),
            Event::Failed(Failure::Stopping),
            Event::Failed(Failure::Engine("b".into())),
        ];
        events.extend(refused.map(|error| Event::Failed(Failure::Refused(error))));
        for before in events {
            assert_eq!(event(message(7, before.clone())), Some((7, before)));
        }
    }

    #[test]
    fn a_card_comes_out_as_it_went_in() {
        let before = ModelCard {
            name: "m".into(),
            id: ModelId::from_bytes([1; 32]),
            created: 2,
            context: 3,
            n_vocab: 4,
            chat_template: Some("t".into()),
            bos_text: "b".into(),
            eos_text: "e".into(),
            purpose: Purpose::Embed,
            rank_template: Some("r".into()),
            n_values: 5,
            has_class_shares: true,
        };
        let after = model_card(card(&before, Hash::from_bytes([2; 32])));
        assert_eq!(format!("{after:?}"), format!("{before:?}"));
        for before in [Readiness::Ready, Readiness::Recovering("r".into()), Readiness::NotReady("n".into())] {
            assert_eq!(readiness_told(readiness(before.clone())), before);
        }
    }
}
