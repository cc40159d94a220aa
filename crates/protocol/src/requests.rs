//! Requests on their way from a node that answers HTTP, the *gateway*, to the coordinator, and answers back.
//!
//! ```text
//! gateway                               coordinator
//!   <-------------------------------- Card            what is served
//!   FetchVocabulary -------------------->             without a copy of it only
//!   <------------------------- Vocabulary ...
//!   Submit ----------------------------->             with the tokens that came already, if it began elsewhere
//!   <------------------------------ Token ...         or Refused
//!   <---------------------------- Text, Done          or Failed; Pooled, Done from a model that embeds or ranks
//!   Cancel ----------------------------->
//!   Ask -------------------------------->
//!   <------------------------------ Report
//!   Beat <------------------------------> Beat        every HEARTBEAT_MS
//! ```
//!
//! All requests of a gateway share one link. Each has a number that the gateway gives it and never gives again on that
//! link. Every token says its place in the answer, so a gateway that submits a request again, to this coordinator or
//! to the next, neither misses a token nor shows one twice.
//!
//! Encoded with postcard, as [`crate::control`].

use brigade_base::{Hash, ModelId, TenantId, Token};
use serde::{Deserialize, Serialize};

use crate::control::{decode, encode};
use crate::{DecodeError, cap};

/// Largest frame: the most tokens of a request at five bytes each are 20 MiB, and a chat template, of which the longest
/// known has 200 KiB, may have 16 MiB.
pub const MAX_REQUESTS_BYTES: usize = 32 << 20;

/// Most tokens of a prompt and the part of its answer that is known: no text has more, as the longest that is tokenized
/// has 16 MiB, and no context of a known model holds more than twice as many.
pub const MAX_REQUEST_TOKENS: u64 = 4 << 20;

/// Longest id of a request, four times what HTTP takes from a client.
pub const MAX_ID_BYTES: u64 = 512;

/// Most stop strings, four times what HTTP takes.
pub const MAX_STOPS: u64 = 64;

/// Longest stop string in bytes, four times what HTTP takes.
pub const MAX_STOP_BYTES: u64 = 4096;

/// Longest time within which an answer must be complete: a week, seven times what HTTP takes. It is added to a clock.
pub const MAX_TIMEOUT_MS: u64 = 7 * 24 * 3600 * 1000;

/// Most entries of a logit bias: what the sampler takes.
pub const MAX_LOGIT_BIASES: u64 = 4096;

/// Most texts of which one request has vectors made, four times what HTTP takes.
pub const MAX_TEXTS: u32 = 8192;

/// Most values of a pooled vector: the widest hidden state that is taken.
pub const MAX_POOLED: u64 = crate::frame::MAX_N_EMBD as u64;

/// Most bytes of a vocabulary: the header of a model file is no longer, and this is a part of it.
pub const MAX_VOCABULARY_BYTES: u64 = 256 << 20;

/// Most bytes of the vocabulary in one message. Tokens get through between two of them, and each is a sign of life:
/// half a megabit per second brings one within [`DEAD_AFTER_MS`](crate::control::DEAD_AFTER_MS).
pub const VOCABULARY_CHUNK: usize = 64 << 10;

/// From a gateway to the coordinator.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum FromGateway {
    /// Answer this.
    Submit(Box<Submit>),
    /// Nobody waits for this answer any more.
    Cancel {
        /// Of the request.
        number: u64,
    },
    /// Send the vocabulary.
    FetchVocabulary,
    /// Answer a question about the cluster.
    Ask {
        /// Comes back in the report; counts apart from requests.
        number: u64,
        /// What is asked.
        question: Question,
    },
    /// I am here.
    Beat,
}

/// A request, and the part of its answer that is known.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Submit {
    /// Names the request on this link.
    pub number: u64,
    /// Names it in log lines and traces.
    pub id: String,
    /// Whose it is.
    pub tenant: TenantId,
    /// Lower is earlier.
    pub priority: i32,
    /// Milliseconds within which the answer must be complete.
    pub timeout_ms: Option<u64>,
    /// The prompt.
    pub prompt: Vec<Token>,
    /// Most tokens of the answer.
    pub max_tokens: Option<u32>,
    /// How to choose tokens.
    pub sampling: Sampling,
    /// The answer ends before the first of these.
    pub stop: Vec<String>,
    /// Each token is told with its log probability and those of so many of the likeliest.
    pub logprobs: Option<u8>,
    /// Go on after the model's end token.
    pub ignore_end: bool,
    /// Which text of its request it is, from 0; those of one request have one id.
    pub text_idx: u32,
    /// How many texts the request has, 1 to [`MAX_TEXTS`]; a completion is the only one.
    pub n_texts: u32,
    /// How many others of them have their vectors, whoever made those; fewer than there are.
    pub n_texts_done: u32,
    /// The beginning of the answer: what another coordinator told already. It is not told again.
    pub answer: Vec<Token>,
}

/// How the next token is chosen; see the engine's `Sampling` for the ranges.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the engine's type of this name explains each")]
pub struct Sampling {
    pub temperature: f32,
    pub top_k: u32,
    pub top_p: f32,
    pub min_p: f32,
    pub repeat_penalty: f32,
    pub frequency_penalty: f32,
    pub presence_penalty: f32,
    pub penalty_window: u32,
    pub seed: u64,
    pub logit_bias: Vec<(Token, f32)>,
}

/// What a gateway may ask.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Question {
    /// The cluster as it stands; the report is JSON.
    Status,
    /// What was counted and timed; the report is Prometheus' text format.
    Metrics,
    /// What became of the request with this id; the report is JSON: its tenant and its trace, or nothing.
    Trace(String),
    /// What is wrong with each node; the report is JSON. It takes some seconds, and one at a time is answered.
    Examine,
}

/// From the coordinator to a gateway.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum ToGateway {
    /// What is served; the first message.
    Card(Box<Card>),
    /// A piece of the vocabulary, in order: a GGUF without tensors.
    Vocabulary {
        /// Bytes of all pieces.
        total: u64,
        /// This piece, at most [`VOCABULARY_CHUNK`].
        bytes: Vec<u8>,
    },
    /// One more token.
    Token {
        /// Of the request.
        number: u64,
        /// Its place in the answer, from 0.
        position: u32,
        /// The token.
        token: Token,
        /// Text that no stop string can take back; may be empty.
        text: String,
        /// With its log probability, where that was asked for.
        logprob: Option<Logprob>,
    },
    /// The end of the answer's text, which was held back.
    Text {
        /// Of the request.
        number: u64,
        /// Never empty.
        text: String,
    },
    /// The vector of a text, from a model that embeds or ranks texts.
    Pooled {
        /// Of the request.
        number: u64,
        /// As the model gives it: not normalised. At most [`MAX_POOLED`] values.
        values: Vec<f32>,
    },
    /// The answer waits for a machine that was lost.
    Paused {
        /// Of the request.
        number: u64,
        /// Why, for people.
        why: String,
    },
    /// It goes on.
    Resumed {
        /// Of the request.
        number: u64,
    },
    /// The answer is complete.
    Done {
        /// Of the request.
        number: u64,
        /// Why it ended.
        reason: Finish,
        /// What it took.
        usage: Usage,
    },
    /// The answer cannot be completed.
    Failed {
        /// Of the request.
        number: u64,
        /// Why.
        failure: Failure,
    },
    /// The request was not taken.
    Refused {
        /// Of the request.
        number: u64,
        /// Why.
        refusal: Refusal,
    },
    /// The answer to a question.
    Report {
        /// Of the question.
        number: u64,
        /// What was asked for.
        text: String,
    },
    /// I am here.
    Beat(Readiness),
}

/// What is served.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Card {
    /// The name that requests use.
    pub name: String,
    /// Identity of the weights.
    pub id: ModelId,
    /// Seconds since 1970 when it was first served.
    pub created: u64,
    /// Most tokens of one session.
    pub context: u32,
    /// Size of the vocabulary.
    pub n_vocab: u32,
    /// The model's own chat template.
    pub chat_template: Option<String>,
    /// Text of the start token.
    pub bos_text: String,
    /// Text of the end token.
    pub eos_text: String,
    /// What it does with a text.
    pub purpose: Purpose,
    /// How a model that ranks wants query and document put together: a text with `{query}` and `{document}` in it.
    pub rank_template: Option<String>,
    /// Values of the vector of a text, at most [`MAX_POOLED`]; 0 from a model that generates text.
    pub n_values: u32,
    /// Whether the scores of a text's classes are probabilities as the model gives them.
    pub has_class_shares: bool,
    /// BLAKE3 of the vocabulary that [`FromGateway::FetchVocabulary`] brings.
    pub vocabulary: Hash,
}

/// What a model does with a text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Purpose {
    /// It goes on with it.
    Generate,
    /// It makes a vector of it.
    Embed,
    /// It scores it, where it is a query with a document.
    Rank,
}

/// Whether requests are answered.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Readiness {
    /// They are.
    Ready,
    /// They are taken, and wait.
    Recovering(String),
    /// They are not.
    NotReady(String),
}

/// A token with its log probability.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Logprob {
    /// The bytes that the token stands for.
    pub bytes: Vec<u8>,
    /// Natural logarithm of its probability.
    pub logprob: f32,
    /// The likeliest tokens with their bytes, best first.
    pub top: Vec<(Token, Vec<u8>, f32)>,
}

/// Why an answer ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Finish {
    /// The model's end token or a stop string.
    Stop,
    /// The most tokens, or the end of the context.
    Length,
}

/// Tokens read and written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    /// Tokens of the prompt.
    pub prompt_tokens: u32,
    /// Of these, how many were not computed for this request.
    pub cached_tokens: u32,
    /// Tokens generated.
    pub completion_tokens: u32,
}

/// Why an answer broke off.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Failure {
    /// A machine that held part of the model is gone, and none took its place in time.
    PlacementLost(String),
    /// The coordinator is stopping.
    Stopping,
    /// The time that the request gave is over.
    TimedOut,
    /// The engine refused to go on.
    Engine(String),
}

/// Why a request was not taken.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Refusal {
    /// No model is placed.
    NotReady(String),
    /// Too many requests wait.
    Busy {
        /// How many wait.
        waiting: u64,
    },
    /// The prompt leaves no room.
    PromptTooLong {
        /// Tokens of the prompt.
        tokens: u64,
        /// Tokens of a session.
        context: u32,
    },
    /// A text is longer than what is embedded or ranked at once.
    TextTooLong {
        /// Tokens of the text.
        tokens: u64,
        /// Most tokens.
        most: u32,
    },
    /// The prompt has no tokens.
    PromptEmpty,
    /// A token id is outside the vocabulary.
    UnknownToken {
        /// The id.
        token: i64,
        /// Size of the vocabulary.
        n_vocab: u32,
    },
    /// Something is out of its range.
    Invalid(String),
    /// The coordinator is stopping.
    Stopping,
}

impl FromGateway {
    /// The message as bytes.
    pub fn encode(&self) -> Vec<u8> {
        encode(self)
    }

    /// Reads a message.
    ///
    /// # Errors
    /// If the bytes are none, or a number is beyond its cap.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let message = decode("request", bytes)?;
        match &message {
            Self::Submit(submit) => submit.check()?,
            Self::Ask { question: Question::Trace(id), .. } => check_id(id)?,
            _ => {}
        }
        Ok(message)
    }
}

impl Submit {
    fn check(&self) -> Result<(), DecodeError> {
        check_id(&self.id)?;
        cap("timeout in milliseconds", self.timeout_ms.unwrap_or(0), MAX_TIMEOUT_MS)?;
        cap("number of tokens", self.prompt.len() as u64 + self.answer.len() as u64, MAX_REQUEST_TOKENS)?;
        cap("number of stop strings", self.stop.len() as u64, MAX_STOPS)?;
        cap("number of logit biases", self.sampling.logit_bias.len() as u64, MAX_LOGIT_BIASES)?;
        self.stop.iter().try_for_each(|stop| cap("length of a stop string", stop.len() as u64, MAX_STOP_BYTES))?;
        if self.stop.iter().any(String::is_empty) {
            return Err(DecodeError::Malformed { what: "request", why: "a stop string is empty".to_owned() });
        }
        cap("number of texts", self.n_texts.into(), MAX_TEXTS.into())?;
        if self.text_idx.max(self.n_texts_done) >= self.n_texts {
            let why = format!("it is text {} of {}, and {} are done", self.text_idx, self.n_texts, self.n_texts_done);
            return Err(DecodeError::Malformed { what: "request", why });
        }
        Ok(())
    }
}

fn check_id(id: &str) -> Result<(), DecodeError> {
    cap("length of a request's id", id.len() as u64, MAX_ID_BYTES)
}

impl ToGateway {
    /// The message as bytes.
    pub fn encode(&self) -> Vec<u8> {
        encode(self)
    }

    /// Reads a message.
    ///
    /// # Errors
    /// If the bytes are none, or a number is beyond its cap.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let message = decode("answer", bytes)?;
        match &message {
            Self::Vocabulary { total, bytes } => {
                cap("size of the vocabulary", *total, MAX_VOCABULARY_BYTES)?;
                cap("piece of the vocabulary", bytes.len() as u64, VOCABULARY_CHUNK as u64)?;
            }
            Self::Card(card) => cap("length of a vector", card.n_values.into(), MAX_POOLED)?,
            Self::Pooled { values, .. } => cap("length of a vector", values.len() as u64, MAX_POOLED)?,
            _ => {}
        }
        Ok(message)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn submit() -> Submit {
        Submit {
            number: 7,
            id: "cmpl-1".into(),
            tenant: TenantId(3),
            priority: -2,
            timeout_ms: Some(1500),
            prompt: vec![1, 2, 300_000],
            max_tokens: Some(0),
            sampling: Sampling {
                temperature: 0.5,
                top_k: 40,
                top_p: 0.9,
                min_p: 0.1,
                repeat_penalty: 1.1,
                frequency_penalty: 0.2,
                presence_penalty: 0.3,
                penalty_window: 64,
                seed: u64::MAX,
                logit_bias: vec![(5, -1.0)],
            },
            stop: vec!["END".into()],
            logprobs: Some(2),
            ignore_end: true,
            text_idx: 4,
            n_texts: 5,
            n_texts_done: 3,
            answer: vec![9, 8],
        }
    }

    fn card(n_values: u32) -> Card {
        Card {
            name: "m".into(),
            id: ModelId::from_bytes([1; 32]),
            created: 5,
            context: 4096,
            n_vocab: 32,
            chat_template: Some("{{ messages }}".into()),
            bos_text: "<s>".into(),
            eos_text: String::new(),
            purpose: Purpose::Rank,
            rank_template: Some("{query} {document}".into()),
            n_values,
            has_class_shares: true,
            vocabulary: Hash::from_bytes([2; 32]),
        }
    }

    fn token() -> ToGateway {
        let logprob = Logprob { bytes: b"a".to_vec(), logprob: -0.5, top: vec![(4, b"b".to_vec(), -0.1)] };
        ToGateway::Token { number: 7, position: 2, token: 11, text: "a".into(), logprob: Some(logprob) }
    }

    fn altered(alter: impl FnOnce(&mut Submit)) -> Result<FromGateway, DecodeError> {
        let mut submit = submit();
        alter(&mut submit);
        FromGateway::decode(&FromGateway::Submit(Box::new(submit)).encode())
    }

    #[test]
    fn messages_survive_the_wire() {
        let ask = FromGateway::Ask { number: 1, question: Question::Trace("x".into()) };
        let cancel = FromGateway::Cancel { number: 7 };
        let all =
            [FromGateway::Submit(Box::new(submit())), cancel, FromGateway::FetchVocabulary, ask, FromGateway::Beat];
        for message in all {
            assert_eq!(FromGateway::decode(&message.encode()), Ok(message));
        }
        let number = 7;
        let usage = Usage { prompt_tokens: 1, cached_tokens: 2, completion_tokens: 3 };
        let all = [
            ToGateway::Card(Box::new(card(2))),
            ToGateway::Vocabulary { total: 3, bytes: vec![1, 2, 3] },
            token(),
            ToGateway::Text { number, text: "é".into() },
            ToGateway::Pooled { number, values: vec![0.5, -0.5] },
            ToGateway::Paused { number, why: "a left".into() },
            ToGateway::Resumed { number },
            ToGateway::Done { number, reason: Finish::Length, usage },
            ToGateway::Failed { number, failure: Failure::TimedOut },
            ToGateway::Refused { number, refusal: Refusal::UnknownToken { token: -1, n_vocab: 32 } },
            ToGateway::Report { number, text: "{}".into() },
            ToGateway::Beat(Readiness::Recovering("a left".into())),
        ];
        for message in all {
            assert_eq!(ToGateway::decode(&message.encode()), Ok(message));
        }
    }

    #[test]
    fn numbers_are_capped() {
        let too_many = |found: Result<FromGateway, _>| assert!(matches!(found, Err(DecodeError::TooMany { .. })));
        assert!(altered(|s| s.id = "x".repeat(512)).is_ok());
        too_many(altered(|s| s.id = "x".repeat(513)));
        too_many(altered(|s| s.timeout_ms = Some(u64::MAX)));
        too_many(altered(|s| s.stop = vec!["x".into(); 65]));
        too_many(altered(|s| s.stop = vec!["x".repeat(4097)]));
        too_many(altered(|s| s.sampling.logit_bias = vec![(1, 1.0); 4097]));
        too_many(altered(|s| s.answer = vec![1; MAX_REQUEST_TOKENS as usize]));
        too_many(altered(|s| s.n_texts = MAX_TEXTS + 1));
        assert!(matches!(altered(|s| s.stop = vec![String::new()]), Err(DecodeError::Malformed { .. })));
        assert!(matches!(altered(|s| s.text_idx = 5), Err(DecodeError::Malformed { .. })));
        assert!(matches!(altered(|s| s.n_texts_done = 5), Err(DecodeError::Malformed { .. })));
        assert!(matches!(altered(|s| (s.text_idx, s.n_texts) = (0, 0)), Err(DecodeError::Malformed { .. })));
        let ask = FromGateway::Ask { number: 1, question: Question::Trace("x".repeat(513)) };
        too_many(FromGateway::decode(&ask.encode()));
        let of_card = |n_values| ToGateway::decode(&ToGateway::Card(Box::new(card(n_values))).encode());
        assert!(of_card(MAX_POOLED as u32).is_ok());
        assert!(matches!(of_card(MAX_POOLED as u32 + 1), Err(DecodeError::TooMany { .. })));
        for (total, n_bytes) in [(MAX_VOCABULARY_BYTES + 1, 0), (9, VOCABULARY_CHUNK + 1)] {
            let message = ToGateway::Vocabulary { total, bytes: vec![0; n_bytes] };
            assert!(matches!(ToGateway::decode(&message.encode()), Err(DecodeError::TooMany { .. })));
        }
    }

    #[test]
    fn the_longest_request_fits_a_frame() {
        let tokens = vec![Token::MAX; MAX_REQUEST_TOKENS as usize - 2];
        let message = FromGateway::Submit(Box::new(Submit { prompt: tokens, ..submit() }));
        assert!(message.encode().len() < MAX_REQUESTS_BYTES);
    }

    proptest! {
        #[test]
        fn no_bytes_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = FromGateway::decode(&bytes);
            let _ = ToGateway::decode(&bytes);
        }

        #[test]
        fn no_mutation_panics(at in 0usize..200, value: u8) {
            for mut bytes in [FromGateway::Submit(Box::new(submit())).encode(), token().encode()] {
                let at = at % bytes.len();
                bytes[at] = value;
                let _ = FromGateway::decode(&bytes);
                let _ = ToGateway::decode(&bytes);
            }
        }
    }
}
