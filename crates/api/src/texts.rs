//! Texts that are made vectors of: what the endpoints of embeddings and of ranking share.
//!
//! ```text
//! body -> texts -> tokens (blocking thread) -> room -> vectors, some at once, in the order of the texts -> answer
//! ```
//!
//! For the node each text is a session, and all of a request have its id. They take turns with other requests' by the
//! same rules as answers do, so no request ever has the model to itself. Tokens, vectors and the written answer wait
//! in memory for the slowest text and the slowest reader: room for them is taken before anything is computed, and
//! given back once the answer is written or given up.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use axum::body::Body;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use brigade_base::{TenantId, Token};
use brigade_node::MAX_WAITING;
use brigade_node::serving::{Event, Failure, ModelCard, Purpose, Request, Serving, SubmitError, TextPlace, TextsDone};
use bytes::Bytes;
use serde::Serialize;
use tokio::sync::mpsc::UnboundedReceiver;
use tokio::time::sleep;

use crate::error::ApiError;
use crate::fields::Fields;
use crate::request::{check_model, priority, timeout};
use crate::room::{Room, Rooms};
use crate::routes::Answered;
use crate::turns::Turn;

/// Most texts of a request, as OpenAI has it.
pub(crate) const MAX_TEXTS: usize = 2048;

/// Most tokens of all texts of a request: some minutes of a large model on a small cluster, and three times what OpenAI
/// takes.
pub(crate) const MAX_TOKENS: usize = 1 << 20;

/// Most values of all vectors of a request: [`MAX_TEXTS`] of the widest usual ones, of 4096.
const MAX_VALUES: usize = 8 << 20;

/// What requests with texts may hold together, beyond their bodies: one of the largest, [`MAX_VALUES`] of
/// [`VALUE_BYTES`] and [`MAX_TOKENS`], 172 MiB, and as many again of the usual ones. Some hundred vectors of a thousand
/// values are 2 MiB.
const ROOM_BYTES: usize = 256 << 20;
/// Kept for small ones on top of that, so that a few large ones, which take minutes, do not lock them out: as many as
/// may wait in the queue.
const SMALL_ROOM_BYTES: usize = MAX_WAITING * SMALL_BYTES;
/// What counts as small: a text of 4096 tokens with a vector of 4096 values is 101 KiB, and 16 of 256 are 104 KiB.
const SMALL_BYTES: usize = 128 << 10;
/// A value in its vector and as JSON. As Base64 it is shorter.
const VALUE_BYTES: usize = size_of::<f32>() + MAX_WRITTEN;
/// The longest number of 32 bits as text, with its comma. From 1e-6 to 1e13 it has no exponent and up to 16 characters:
/// sign, `0.`, five zeros and eight digits, or sign, 13 digits and `.0`. With one it has 15: sign, nine digits, point,
/// and `e-38`.
pub(crate) const MAX_WRITTEN: usize = 17;
/// A text besides: what holds its tokens and its vector, and the names in its part of the answer.
pub(crate) const TEXT_BYTES: usize = 256;

/// A request of which some texts are done does not give them up for a full queue: after so long it asks again.
const ASK_AGAIN: Duration = Duration::from_millis(100);
/// So many times in a row: 8 seconds, in which a queue moves. After 10 without a text the node counts it as given up.
const MAX_ASKS: u32 = 80;

/// What all requests with texts may say.
#[derive(Debug, PartialEq)]
pub(crate) struct Wishes {
    pub(crate) priority: i32,
    pub(crate) timeout: Option<Duration>,
}

impl Wishes {
    /// Reads them, and checks that the right model is asked.
    pub(crate) fn parse(fields: &mut Fields, model: &ModelCard) -> Result<Self, ApiError> {
        check_model(fields, model)?;
        fields.ignore(&["user", "metadata", "service_tier", "safety_identifier"]);
        Ok(Self { priority: priority(fields)?, timeout: timeout(fields)? })
    }
}

/// Texts on their way to a model.
#[derive(Debug)]
pub(crate) struct Batch {
    pub(crate) id: String,
    pub(crate) tenant: TenantId,
    pub(crate) wishes: Wishes,
    pub(crate) texts: Vec<Vec<Token>>,
    /// For all that is held of them.
    pub(crate) room: Room,
    /// How many may be on their way.
    pub(crate) turn: Turn,
}

/// What came of them.
#[derive(Debug)]
pub(crate) struct Vectors {
    /// That of the texts, for the answer.
    pub(crate) room: Room,
    /// One for each text, as the model gives it.
    pub(crate) values: Vec<Vec<f32>>,
    pub(crate) prompt_tokens: u64,
}

/// Whether the model does what an endpoint is for.
///
/// # Errors
/// 400 that says what it does, and where.
pub(crate) fn check_purpose(model: &ModelCard, wanted: Purpose) -> Result<(), ApiError> {
    let advice = match (model.purpose, wanted) {
        (is, wanted) if is == wanted => return Ok(()),
        (Purpose::Generate, Purpose::Embed) => {
            "generates text; to have it embed texts, serve it with --pooling mean, cls or last"
        }
        (Purpose::Generate, _) => "generates text; serve a model that ranks documents",
        (Purpose::Embed, Purpose::Rank) => "embeds texts: use /v1/embeddings, or serve a model that ranks documents",
        (Purpose::Embed, _) => "embeds texts and generates none: use /v1/embeddings",
        (Purpose::Rank, Purpose::Embed) => "ranks documents: use /v1/rerank, or serve a model that embeds texts",
        (Purpose::Rank, _) => "ranks documents and generates no text: use /v1/rerank",
    };
    let message = format!("`{}` {advice}", model.name);
    Err(ApiError::new(StatusCode::BAD_REQUEST, message).with_param("model").with_code("unsupported_model"))
}

/// Keeps count of the tokens of a request's texts.
#[derive(Debug, Default)]
pub(crate) struct TokenCount(usize);

impl TokenCount {
    /// Counts one more text's.
    ///
    /// # Errors
    /// 400 if they are too many together.
    pub(crate) fn add(&mut self, n_tokens: usize) -> Result<(), ApiError> {
        self.0 += n_tokens;
        if self.0 > MAX_TOKENS {
            let message = format!("the texts have more than {MAX_TOKENS} tokens together; send them in parts");
            return Err(ApiError::bad_request(message).with_code("too_many_tokens"));
        }
        Ok(())
    }
}

/// Room for all requests with texts.
pub(crate) fn rooms() -> Rooms {
    Rooms::new(ROOM_BYTES, SMALL_ROOM_BYTES, SMALL_BYTES)
}

/// Whether a request may have vectors of so many texts. Asked before these are tokenized, which takes seconds for the
/// longest.
///
/// # Errors
/// 400 that says of how many.
pub(crate) fn check_values(model: &ModelCard, n_texts: usize) -> Result<(), ApiError> {
    if n_values(model, n_texts) > MAX_VALUES {
        let most = MAX_VALUES / (model.n_values as usize).max(1);
        let message =
            format!("vectors of {} values are made of {most} texts at once; send fewer in a request", model.n_values);
        return Err(ApiError::bad_request(message).with_code("too_many_texts"));
    }
    Ok(())
}

/// Values of all vectors of so many texts.
fn n_values(model: &ModelCard, n_texts: usize) -> usize {
    (model.n_values as usize).saturating_mul(n_texts)
}

/// Room for these texts, so many as [`check_values`] takes, and the answer about them, of which `more_bytes` are not
/// vectors.
///
/// # Errors
/// 429 if others hold too much.
pub(crate) fn room_for(
    rooms: &Rooms,
    model: &ModelCard,
    texts: &[Vec<Token>],
    more_bytes: usize,
) -> Result<Room, ApiError> {
    let n_values = n_values(model, texts.len());
    let n_tokens: usize = texts.iter().map(Vec::len).sum();
    let bytes = n_tokens * size_of::<Token>() + texts.len() * TEXT_BYTES + n_values * VALUE_BYTES + more_bytes;
    let message = "the server holds as many texts and vectors as it may; try again, or send fewer in a request";
    rooms.take(bytes).ok_or_else(|| ApiError::busy(message))
}

/// An answer of some `bytes`. It keeps its room until its last byte is with the system or its reader is gone.
///
/// # Errors
/// 500 if it cannot be written.
pub(crate) fn answer(answer: &impl Serialize, bytes: usize, room: Room) -> Answered {
    let mut text = Vec::with_capacity(bytes);
    serde_json::to_writer(&mut text, answer).map_err(|error| ApiError::internal(error.to_string()))?;
    let body = Bytes::from_owner(Written { text, _room: room });
    Ok(([(header::CONTENT_TYPE, "application/json")], Body::from(body)).into_response())
}

/// An answer's text, and the room that it takes.
struct Written {
    text: Vec<u8>,
    _room: Room,
}

impl AsRef<[u8]> for Written {
    fn as_ref(&self) -> &[u8] {
        &self.text
    }
}

/// Has a vector made of each text.
///
/// # Errors
/// If one of them cannot be; the others are then given up.
pub(crate) async fn vectors(serving: &dyn Serving, batch: Batch) -> Result<Vectors, ApiError> {
    let Batch { id, tenant, wishes, texts, room, mut turn } = batch;
    let n_values = serving.model().n_values as usize;
    let n_texts = texts.len();
    let done = TextsDone::default();
    let until = wishes.timeout.map(|timeout| (Instant::now(), timeout));
    let mut waiting: VecDeque<(usize, Vec<Token>)> = texts.into_iter().enumerate().collect();
    let mut under_way: VecDeque<(usize, Vec<Token>, UnboundedReceiver<Event>)> = VecDeque::new();
    let mut vectors = Vectors { room, values: vec![Vec::new(); n_texts], prompt_tokens: 0 };
    let (mut n_done, mut n_asks) = (0, 0);
    while n_done < n_texts {
        while turn.may_send()
            && let Some((at, text)) = waiting.pop_front()
        {
            let place = TextPlace { idx: at as u32, n_texts: n_texts as u32 };
            let request = Request {
                priority: wishes.priority,
                timeout: left_of(until)?,
                done: done.clone(),
                ..Request::of_text(id.clone(), tenant, text.clone(), place)
            };
            turn.begin();
            match serving.submit(request) {
                Ok(events) => under_way.push_back((at, text, events)),
                // Whoever has begun waits, first for what is on its way.
                Err(SubmitError::Busy { .. }) if at > 0 && n_asks < MAX_ASKS => {
                    turn.end();
                    waiting.push_front((at, text));
                    break;
                }
                Err(error) => return Err(error.into()),
            }
        }
        let Some((at, text, events)) = under_way.pop_front() else {
            n_asks += 1;
            sleep(ASK_AGAIN).await;
            continue;
        };
        let vector = vector(events, wishes.timeout).await;
        turn.end();
        let (values, n_tokens) = match vector {
            Ok(vector) => vector,
            // Another node, which coordinates, says so by an event.
            Err(Failure::Refused(SubmitError::Busy { .. })) if at > 0 && n_asks < MAX_ASKS => {
                waiting.push_front((at, text));
                n_asks += 1;
                sleep(ASK_AGAIN).await;
                continue;
            }
            Err(failure) => return Err(failure.into()),
        };
        // No more than there is room for.
        if values.len() > n_values {
            let found = values.len();
            return Err(ApiError::internal(format!("the model gave a vector of {found} values, not {n_values}")));
        }
        vectors.values[at] = values;
        vectors.prompt_tokens += u64::from(n_tokens);
        (n_done, n_asks) = (n_done + 1, 0);
    }
    Ok(vectors)
}

/// What is left of the time that the whole request has.
fn left_of(until: Option<(Instant, Duration)>) -> Result<Option<Duration>, ApiError> {
    let Some((begin, timeout)) = until else { return Ok(None) };
    match timeout.checked_sub(begin.elapsed()).filter(|left| !left.is_zero()) {
        Some(left) => Ok(Some(left)),
        None => Err(Failure::TimedOut { after: timeout }.into()),
    }
}

/// The vector of one text, and its tokens. `timeout` is that of the whole request.
async fn vector(mut events: UnboundedReceiver<Event>, timeout: Option<Duration>) -> Result<(Vec<f32>, u32), Failure> {
    let mut found = None;
    loop {
        match events.recv().await {
            Some(Event::Pooled { values }) => found = Some(values),
            Some(Event::Done { usage, .. }) => {
                return found.map(|values| (values, usage.prompt_tokens)).ok_or_else(broken_off);
            }
            Some(Event::Failed(Failure::TimedOut { after })) => {
                return Err(Failure::TimedOut { after: timeout.unwrap_or(after) });
            }
            Some(Event::Failed(failure)) => return Err(failure),
            Some(Event::Token { .. } | Event::Text { .. } | Event::Paused { .. } | Event::Resumed) => {}
            None => return Err(broken_off()),
        }
    }
}

fn broken_off() -> Failure {
    Failure::Engine("a text ended without its vector".to_owned())
}

/// A text's tokens, if the model takes so many: nothing is computed for a request of which one text is refused.
pub(crate) fn checked(model: &ModelCard, tokens: Result<Vec<Token>, SubmitError>) -> Result<Vec<Token>, SubmitError> {
    tokens.and_then(|tokens| model.check_length(tokens.len()).map(|()| tokens))
}

/// The error for the text at `path`.
pub(crate) fn at(path: String) -> impl FnOnce(SubmitError) -> ApiError {
    move |error| ApiError::from(error).with_param(path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::request::tests::card;

    #[test]
    fn room_is_for_tokens_vectors_and_the_answer() {
        let model = ModelCard { n_values: 1000, purpose: Purpose::Embed, ..card() };
        let held = |texts: &[Vec<Token>], more_bytes| {
            let rooms = rooms();
            let _room = room_for(&rooms, &model, texts, more_bytes).unwrap();
            ROOM_BYTES - rooms.free_bytes()
        };
        let texts = vec![vec![1; 500]; 100];
        let expected = 100 * (500 * 4 + 256 + 1000 * (4 + 17));
        assert!((expected..expected + 1024).contains(&held(&texts, 0)), "{}", held(&texts, 0));
        assert!((expected + 70_000..expected + 71_024).contains(&held(&texts, 70_000)));
        assert_eq!(held(&texts[..1], 0), 0, "a small one takes of what is kept for those");
    }

    #[tokio::test]
    async fn an_answer_holds_its_room_until_it_is_written() {
        let rooms = rooms();
        let response = answer(&[1, 2, 3], 8, rooms.take(1 << 20).unwrap()).unwrap();
        assert_eq!(response.headers()[header::CONTENT_TYPE], "application/json");
        assert_eq!(rooms.free_bytes(), ROOM_BYTES - (1 << 20));
        let written = axum::body::to_bytes(response.into_body(), 99).await.unwrap();
        assert_eq!((&written[..], rooms.free_bytes()), (&b"[1,2,3]"[..], ROOM_BYTES - (1 << 20)));
        drop(written);
        assert_eq!(rooms.free_bytes(), ROOM_BYTES);
    }

    #[test]
    fn no_number_is_longer_than_its_room() {
        let written = |value: f32| serde_json::to_string(&value).unwrap();
        // Where the notation changes, and so the longest there are.
        for (value, expected) in [(-1.000_000_1e-6, "-0.0000010000001"), (-1_234_568_000_000.0, "-1234568000000.0")] {
            assert_eq!(written(value), expected);
            assert_eq!(expected.len() + 1, MAX_WRITTEN);
        }
        // Of each exponent some, with their digits all over the place; the step is odd.
        for exponent in 0..255_u32 {
            for n in 0..400_u32 {
                let value = f32::from_bits(1 << 31 | exponent << 23 | n.wrapping_mul(0x9e37_79b1) >> 9);
                assert!(written(value).len() < MAX_WRITTEN, "{}", written(value));
            }
        }
    }
}
