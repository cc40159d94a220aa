//! The OpenAI-compatible HTTP endpoint.
//!
//! ```text
//! connection (server, patience) -> count (traffic) -> guard (access) -> handler (routes, completions, insight)
//!     body   -> JSON -> typed request (request, fields) -> prompt text (template) -> tokens -> Serving::submit
//!     events -> chunks (answer) -> HTTP body (stream)
//! ```
//!
//! The crate asks [`Serving`] and nothing else: it knows no engine, no node and no link, and but for counts of requests
//! it keeps nothing between two of them. A request that cannot be honoured to the letter is refused by the
//! name of the field; nothing that a client asks for is silently ignored.
//!
//! Routes: `POST /v1/chat/completions`, `POST /v1/completions`, `POST /v1/embeddings`, `POST /v1/rerank`,
//! `GET /v1/models[/ID]`, `GET /health`, `GET /ready`,
//! `GET /metrics`, and Brigade's own `GET /brigade/v1/status`, `POST /brigade/v1/{tokenize,detokenize}`,
//! `GET /debug/requests/ID`, and for the admin token `GET, POST /brigade/v1/tickets` and
//! `DELETE /brigade/v1/tickets/ID`.
//!
//! TLS is left to a proxy in front; without one, listen on loopback or give keys and trust the network between.

#![cfg_attr(test, allow(clippy::unwrap_used, reason = "a test that cannot go on has failed"))]

mod access;
mod answer;
mod body;
mod completions;
mod embeddings;
mod error;
mod fields;
mod gate;
mod insight;
mod json;
mod patience;
mod prompts;
mod request;
mod rerank;
mod room;
mod routes;
mod server;
mod stream;
mod texts;
mod traffic;
mod turns;

use std::sync::Arc;

use axum::Router;
use brigade_node::serving::Serving;

pub use brigade_template as template;
pub use server::{Server, serve};

/// Default of [`ApiOptions::body_limit`]: some million tokens of text, more than a context of 2^18.
pub const DEFAULT_BODY_LIMIT: usize = 4 << 20;

/// How the endpoint is set up.
#[derive(Clone)]
pub struct ApiOptions {
    /// Secrets of clients. With none, anyone who reaches the socket may ask, provided that the `Host` header is an IP
    /// address, `localhost` or one of `host_names`; this keeps web pages out (DNS rebinding).
    pub keys: Vec<String>,
    /// Secret of the operator: opens the routes of tickets, and all others too. With none, tickets have no HTTP.
    pub admin_token: Option<String>,
    /// Names under which clients without keys may know this machine, such as `box.lan`; without a port.
    pub host_names: Vec<String>,
    /// Most bytes of a request's body.
    pub body_limit: usize,
    /// Treat all keys as one, so that a prompt's beginning that one of them sent is not computed again for another.
    /// Who holds a key can then tell by the time of an answer whether another one sent such a beginning, the keys do
    /// not take turns any more, and each may see the trace of any request whose id it knows.
    pub share_prefix_cache: bool,
}

impl Default for ApiOptions {
    fn default() -> Self {
        Self {
            keys: Vec::new(),
            admin_token: None,
            host_names: Vec::new(),
            body_limit: DEFAULT_BODY_LIMIT,
            share_prefix_cache: false,
        }
    }
}

/// Without the secrets.
impl std::fmt::Debug for ApiOptions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ApiOptions")
            .field("keys", &self.keys.len())
            .field("admin_token", &self.admin_token.is_some())
            .field("host_names", &self.host_names)
            .field("body_limit", &self.body_limit)
            .field("share_prefix_cache", &self.share_prefix_cache)
            .finish()
    }
}

/// All routes over `serving`, for [`serve`] or to be merged with others. They need a tokio runtime around them.
pub fn router(serving: Arc<dyn Serving>, options: &ApiOptions) -> Router {
    routes::router(serving, options, Arc::default())
}
