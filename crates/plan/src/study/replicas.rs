//! Whole copies of the model on several nodes, each serving its own requests.
//!
//! No token crosses a link, so the tokens of all copies add up. Streams are dealt one by one, each to the node that
//! then serves it fastest; a lone one goes to the fastest node.

use serde::Serialize;

use super::{Alternative, AlternativeKind, Forecast, Question};
use crate::place::can_hold;
use crate::{Demand, Links, ModelProfile, NodeProfile, RingModel, RingStage};
use brigade_base::{LayerRange, NodeId};

/// Most copies that are counted, the fastest first. Streams number at most 256, and a copy without any brings nothing.
const MAX_REPLICAS: usize = 256;

/// A node that holds the whole model beside others.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Member {
    /// The node.
    pub node: NodeId,
    /// Its name.
    pub name: String,
    /// Tokens in a second of a lone stream there.
    pub tokens_per_s: f64,
    /// Seconds until the first token there.
    pub first_token_s: f64,
    /// Of the streams, how many it gets.
    pub streams: u32,
}

/// A node with all of the model, while streams are dealt.
struct Copy<'a> {
    node: &'a NodeProfile,
    stage: RingStage<'a>,
    streams: u32,
    /// Seconds for which a token of each of its streams takes if it gets one stream more.
    next_round_s: f64,
}

/// What copies on all nodes that can hold the model would give; `None` if fewer than two can, or speeds are unknown.
pub(super) fn alternative(question: &Question<'_>) -> Option<Alternative> {
    let Question { model, demand, links, .. } = *question;
    let all = LayerRange::new(0, model.n_layers()).ok()?;
    let holds = |node: &&NodeProfile| can_hold(model, node, demand);
    let mut copies: Vec<Copy<'_>> = question
        .nodes
        .iter()
        .filter(holds)
        .filter_map(|node| {
            let stage = RingStage { node, speed: node.speed.as_ref()?, layers: all };
            Some(Copy { node, stage, streams: 0, next_round_s: round_s(model, &stage, links, demand, 1) })
        })
        .collect();
    if copies.len() < 2 {
        return None;
    }
    copies.sort_by(|a, b| a.next_round_s.total_cmp(&b.next_round_s));
    copies.truncate(MAX_REPLICAS);
    let streams = demand.parallel.max(1);
    for _ in 0..streams {
        let next = copies.iter_mut().min_by(|a, b| a.next_round_s.total_cmp(&b.next_round_s))?;
        next.streams += 1;
        next.next_round_s = round_s(model, &next.stage, links, demand, next.streams + 1);
    }
    let rate = |copy: &Copy<'_>| {
        let round_s = round_s(model, &copy.stage, links, demand, copy.streams);
        f64::from(copy.streams) / round_s
    };
    let streams_tokens_per_s = copies.iter().filter(|copy| copy.streams > 0).map(rate).sum();
    let members: Vec<Member> = copies.iter().map(|copy| member(model, copy, links, demand)).collect();
    let fastest = members.first()?;
    let forecast = Forecast {
        tokens_per_s: fastest.tokens_per_s,
        streams,
        streams_tokens_per_s,
        first_token_s: fastest.first_token_s,
    };
    Some(Alternative {
        kind: AlternativeKind::Replicas,
        name: format!("the whole model on {} nodes", members.len()),
        stages: Vec::new(),
        members,
        forecast: Some(forecast),
        is_possible: false,
        why_not: String::new(),
    })
}

/// Seconds in which each of `streams` gets a token.
fn round_s(model: &ModelProfile, stage: &RingStage<'_>, links: &Links, demand: &Demand, streams: u32) -> f64 {
    RingModel::new(model, std::slice::from_ref(stage), links, demand).round(streams).seconds
}

fn member(model: &ModelProfile, copy: &Copy<'_>, links: &Links, demand: &Demand) -> Member {
    let ring = RingModel::new(model, std::slice::from_ref(&copy.stage), links, demand);
    Member {
        node: copy.node.id,
        name: copy.node.name.clone(),
        tokens_per_s: 1.0 / ring.token_s(),
        first_token_s: ring.first_token_s(),
        streams: copy.streams,
    }
}
