//! How many requests were answered, by route and status; the rest of `/metrics` is the node's.

use std::sync::Arc;

use axum::extract::{MatchedPath, Request, State};
use axum::middleware::Next;
use axum::response::Response;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode_registry;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::registry::Registry;

/// The label of all paths that are no route, whatever they are.
const NO_ROUTE: &str = "none";

/// What ends a text in the format of OpenMetrics.
const END: &str = "# EOF\n";

/// Counts answers. There are as many counters as pairs of a route and a status that it answered with.
#[derive(Debug)]
pub(crate) struct Traffic {
    registry: Registry,
    answered: Family<Labels, Counter>,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Labels {
    route: String,
    status: u16,
}

impl Traffic {
    pub(crate) fn new() -> Self {
        let answered = Family::<Labels, Counter>::default();
        let mut registry = Registry::with_prefix("brigade");
        let help = "Answers by route and status; a stream counts when it begins";
        registry.register("http_requests", help, answered.clone());
        Self { registry, answered }
    }

    /// Adds what was counted to a text in the format of OpenMetrics, before its end.
    pub(crate) fn append_to(&self, text: &mut String) {
        text.truncate(text.strip_suffix(END).map_or(text.len(), str::len));
        if encode_registry(text, &self.registry).is_err() {
            // A text takes all that is written to it.
            tracing::error!("the count of requests could not be written");
        }
        text.push_str(END);
    }
}

/// Counts how a request is answered, refusals of the guard too.
pub(crate) async fn count(State(traffic): State<Arc<Traffic>>, request: Request, next: Next) -> Response {
    let route = request.extensions().get::<MatchedPath>().map_or(NO_ROUTE, MatchedPath::as_str).to_owned();
    let response = next.run(request).await;
    traffic.answered.get_or_create(&Labels { route, status: response.status().as_u16() }).inc();
    response
}
