//! `POST /v1/rerank`, as Cohere and Jina have it: how relevant each document is for a query.
//!
//! The model reads the query with one document at a time and gives a score for each of its classes, of which the first
//! says that the document is relevant. Results come best first. Most models give any numbers: unless raw scores are
//! asked for, a single one is mapped to 0 to 1 by the logistic function, and of several the first one's share is taken
//! by softmax. A model whose graph ends in a softmax gives shares already.

use std::sync::Arc;

use axum::Extension;
use axum::extract::{Request, State};
use axum::response::Response;
use brigade_base::Token;
use brigade_node::serving::{ModelCard, Purpose, Serving};
use serde::Serialize;
use serde_json::Value;

use crate::access::Caller;
use crate::completions::{note_client_id, under_id};
use crate::embeddings::UsageObject;
use crate::error::ApiError;
use crate::fields::{Fields, mismatch};
use crate::routes::{Answered, App, Shared, blocking};
use crate::texts::{self, Batch, MAX_TEXTS, TEXT_BYTES, TokenCount, Vectors, Wishes, check_purpose};

/// A byte of a document that is to come back, in the request and in the answer: a control character is six there, such
/// as `\u0001`.
const DOCUMENT_BYTES: usize = 1 + MAX_ESCAPED;
const MAX_ESCAPED: usize = 6;

/// A body of `POST /v1/rerank`.
#[derive(Debug, PartialEq)]
struct Rerank {
    /// Not empty.
    query: String,
    /// 1 to [`MAX_TEXTS`].
    documents: Vec<String>,
    /// How many results are wanted; all without.
    top_n: usize,
    return_documents: bool,
    raw_scores: bool,
    wishes: Wishes,
}

/// `POST /v1/rerank`.
pub(crate) async fn rerank(State(app): Shared, Extension(caller): Extension<Caller>, request: Request) -> Response {
    under_id("rank", |id| rank(app, id, caller, request)).await
}

async fn rank(app: Arc<App>, id: String, caller: Caller, request: Request) -> Answered {
    note_client_id(request.headers())?;
    let _entry = app.gate.enter()?;
    let body = app.bodies.read(request).await?;
    let (serving, own_id) = (Arc::clone(&app.serving), id.clone());
    let parsing = Arc::clone(&serving);
    let (asked, body_room) = blocking(move || {
        let (body, room) = body.json()?;
        let model = parsing.model();
        let asked = Rerank::parse(body, model)?;
        check_purpose(model, Purpose::Rank)?;
        texts::check_values(model, asked.documents.len())?;
        Ok((asked, room))
    })
    .await?;
    let n_bytes_read = asked.n_bytes_read();
    let work = move |app: &App| {
        let _room = body_room;
        let model = app.serving.model();
        let Rerank { query, documents, top_n, return_documents, raw_scores, wishes } = asked;
        let texts = tokenized(&*app.serving, &query, &documents)?;
        let documents = return_documents.then_some(documents);
        let room = texts::room_for(&app.batches, model, &texts, n_bytes(documents.as_deref()) * DOCUMENT_BYTES)?;
        tracing::debug!(texts = texts.len(), "the request is handed on");
        let turn = app.turns.join();
        let batch = Batch { id: own_id, tenant: caller.tenant, wishes, texts, room, turn };
        Ok((batch, documents, raw_scores, top_n))
    };
    let (batch, documents, raw_scores, top_n) = app.tokenizing(n_bytes_read, work).await?;
    let Vectors { room, values, prompt_tokens } = texts::vectors(&*serving, batch).await?;
    blocking(move || {
        let n_bytes = n_bytes(documents.as_deref()) * MAX_ESCAPED + values.len() * TEXT_BYTES;
        let are_logits = !raw_scores && !serving.model().has_class_shares;
        let results = results(&values, documents, are_logits, top_n)?;
        let usage = UsageObject { prompt_tokens, total_tokens: prompt_tokens };
        let model = &serving.model().name;
        texts::answer(&Ranking { id, object: "list", model, results, usage }, n_bytes, room)
    })
    .await
}

fn n_bytes(documents: Option<&[String]>) -> usize {
    documents.into_iter().flatten().map(String::len).sum()
}

impl Rerank {
    /// What the model reads: the query with each document.
    fn n_bytes_read(&self) -> usize {
        n_bytes(Some(&self.documents)).saturating_add(self.query.len().saturating_mul(self.documents.len()))
    }

    /// # Errors
    /// 400 or 404 that names the field at fault.
    fn parse(body: Value, model: &ModelCard) -> Result<Self, ApiError> {
        let mut fields = Fields::of_body(body)?;
        let wishes = Wishes::parse(&mut fields, model)?;
        let query = match fields.string("query")? {
            Some(query) if !query.is_empty() => query,
            Some(_) => return Err(ApiError::field("query", "`query` must not be empty")),
            None => return Err(ApiError::field("query", "`query` is required")),
        };
        let documents = match fields.require("documents")? {
            Value::Array(items) if items.is_empty() => {
                return Err(ApiError::field("documents", "`documents` must hold at least one document"));
            }
            Value::Array(items) if items.len() > MAX_TEXTS => {
                let n = items.len();
                let message = format!("`documents` holds {n} documents, more than {MAX_TEXTS}; send them in parts");
                return Err(ApiError::field("documents", message));
            }
            Value::Array(items) => items.into_iter().enumerate().map(document).collect::<Result<Vec<_>, _>>()?,
            other => return Err(mismatch("documents", "an array", &other)),
        };
        let top_n = fields.integer("top_n", 1..=i64::from(u32::MAX))?.map_or(documents.len(), |n| n as usize);
        let return_documents = fields.bool("return_documents")?.unwrap_or(false);
        let raw_scores = fields.bool("raw_scores")?.unwrap_or(false);
        fields.finish()?;
        Ok(Self { query, documents, top_n, return_documents, raw_scores, wishes })
    }
}

/// A document: its text, or an object with it.
fn document((at, item): (usize, Value)) -> Result<String, ApiError> {
    let path = format!("documents[{at}]");
    match item {
        Value::String(text) => Ok(text),
        Value::Object(_) => {
            let mut fields = Fields::of(item, &path)?;
            let text = fields.string("text")?;
            fields.finish()?;
            text.ok_or_else(|| ApiError::field(path.clone(), format!("`{path}.text` is required")))
        }
        other => Err(mismatch(&path, "a string or an object with `text`", &other)),
    }
}

fn tokenized(serving: &dyn Serving, query: &str, documents: &[String]) -> Result<Vec<Vec<Token>>, ApiError> {
    let mut count = TokenCount::default();
    let one = |(at, document): (usize, &String)| {
        let pair_with = |document: &str| texts::checked(serving.model(), serving.tokenize_pair(query, document));
        let pair = pair_with(document).or_else(|error| {
            // Where the query is too long by itself no document is at fault.
            pair_with("").map_err(texts::at("query".to_owned()))?;
            Err(texts::at(format!("documents[{at}]"))(error))
        })?;
        count.add(pair.len())?;
        Ok(pair)
    };
    documents.iter().enumerate().map(one).collect()
}

/// How likely the first class is against all others together, as the logarithm of the odds; of a single class its
/// score. The logistic function of it is the first class's share by softmax.
fn log_odds(scores: &[f64]) -> Option<f64> {
    let (first, others) = scores.split_first()?;
    let most = others.iter().copied().reduce(f64::max);
    let all_others = most.map(|most| most + others.iter().map(|score| (score - most).exp()).sum::<f64>().ln());
    Some(first - all_others.unwrap_or(0.0))
}

/// The best `top_n` documents with their scores, which are made shares if they `are_logits`; of equal ones the first
/// comes first.
fn results(
    values: &[Vec<f32>],
    mut documents: Option<Vec<String>>,
    are_logits: bool,
    top_n: usize,
) -> Result<Vec<Found>, ApiError> {
    let mut scores = Vec::with_capacity(values.len());
    for (index, classes) in values.iter().enumerate() {
        let classes: Vec<f64> = classes.iter().copied().map(f64::from).collect();
        let score = if are_logits { log_odds(&classes) } else { classes.first().copied() };
        let score = score.filter(|score| score.is_finite());
        let score = score.ok_or_else(|| ApiError::internal("the model gave a document no score"))?;
        // Two may be so sure that their shares are the same; they are still put in order.
        scores.push((index, if are_logits { 1.0 / (1.0 + (-score).exp()) } else { score }, score));
    }
    scores.sort_by(|(_, _, a), (_, _, b)| b.total_cmp(a));
    let found = |(index, relevance_score, _): (usize, f64, f64)| {
        let text = documents.as_mut().map(|documents| std::mem::take(&mut documents[index]));
        Found { index, relevance_score, document: text.map(|text| Document { text }) }
    };
    Ok(scores.into_iter().take(top_n).map(found).collect())
}

#[derive(Serialize)]
struct Ranking<'a> {
    id: String,
    object: &'static str,
    model: &'a str,
    results: Vec<Found>,
    usage: UsageObject,
}

#[derive(Debug, PartialEq, Serialize)]
struct Found {
    index: usize,
    relevance_score: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    document: Option<Document>,
}

#[derive(Debug, PartialEq, Serialize)]
struct Document {
    text: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn order(results: &[Found]) -> Vec<usize> {
        results.iter().map(|found| found.index).collect()
    }

    #[test]
    fn the_best_come_first_and_scores_are_shares() {
        let values = vec![vec![0.0], vec![40.0], vec![-3.0], vec![0.0]];
        let all = results(&values, None, true, 9).unwrap();
        assert_eq!(order(&all), [1, 0, 3, 2]);
        assert_eq!(all[1].relevance_score, 0.5);
        assert!(all.iter().all(|found| (0.0..=1.0).contains(&found.relevance_score) && found.document.is_none()));
        let raw = results(&values, None, false, 2).unwrap();
        assert_eq!(raw.iter().map(|found| found.relevance_score).collect::<Vec<_>>(), [40.0, 0.0]);
    }

    #[test]
    fn of_several_classes_the_first_ones_share_counts() {
        // The second document's first class has the lower score, but more of a share.
        let values = [vec![3.0, 5.0], vec![1.0, 0.0], vec![900.0, -900.0], vec![0.5, 0.5, 0.5], vec![-900.0, 900.0]];
        let shares = results(&values, None, true, 9).unwrap();
        assert_eq!(order(&shares), [2, 1, 3, 0, 4]);
        let expected = [1.0, 0.731_058_578_63, 1.0 / 3.0, 0.119_202_922_02, 0.0];
        for (found, expected) in shares.iter().zip(expected) {
            assert!((found.relevance_score - expected).abs() < 1e-9, "{found:?}");
        }
        let given = results(&values, None, false, 2).unwrap();
        assert_eq!(given.iter().map(|found| found.relevance_score).collect::<Vec<_>>(), [900.0, 3.0]);
    }

    #[test]
    fn shares_are_taken_as_they_are() {
        let documents = Some(vec!["a".to_owned(), "b".to_owned()]);
        let all = results(&[vec![0.25, 0.75], vec![0.5, 0.5]], documents, false, 2).unwrap();
        assert_eq!(order(&all), [1, 0]);
        assert_eq!(all[0].relevance_score, 0.5);
        assert_eq!(all[0].document, Some(Document { text: "b".to_owned() }));
    }

    #[test]
    fn what_is_no_number_is_no_score() {
        for are_logits in [true, false] {
            assert!(results(&[vec![f32::NAN]], None, are_logits, 1).is_err());
            assert!(results(&[vec![]], None, are_logits, 1).is_err());
        }
        assert!(results(&[vec![1.0, f32::NAN]], None, true, 1).is_err());
    }
}
