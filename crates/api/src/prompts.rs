//! Prompts on their way to tokens: how many of them have a thread.
//!
//! A tokenizer may take seconds for a text of some megabytes, and nothing ends it before it is done, not even that its
//! client leaves. So large texts get a share of the blocking threads, and all texts together leave one free: short
//! prompts do not wait for large ones, and metrics and traces for none. Who waits here has begun nothing, and is
//! dropped when its client leaves.

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::error::ApiError;
use crate::routes::{Answered, blocking};
use crate::server::BLOCKING_THREADS;

/// What is more than this is large: some 16 thousand tokens of prose, which take most tokenizers milliseconds.
const LARGE_BYTES: usize = 64 << 10;

/// Prompts that are worked on at once: one thread is left to what is no prompt.
const MOST: usize = BLOCKING_THREADS - 1;

/// Large ones of them: one thread is left to short ones.
const MOST_LARGE: usize = MOST - 1;

/// Turns at the threads.
#[derive(Debug)]
pub(crate) struct Prompts {
    all: Arc<Semaphore>,
    large: Arc<Semaphore>,
}

impl Default for Prompts {
    fn default() -> Self {
        Self { all: Arc::new(Semaphore::new(MOST)), large: Arc::new(Semaphore::new(MOST_LARGE)) }
    }
}

impl Prompts {
    /// Does `work` with texts of up to `n_bytes` on a blocking thread, once it is its turn.
    ///
    /// # Errors
    /// Those of `work`.
    pub(crate) async fn work<T: Send + 'static>(
        &self,
        n_bytes: usize,
        work: impl FnOnce() -> Answered<T> + Send + 'static,
    ) -> Answered<T> {
        let large = if n_bytes > LARGE_BYTES { Some(turn(&self.large).await?) } else { None };
        let any = turn(&self.all).await?;
        blocking(move || {
            // The thread's, not its caller's, who may leave before it is done.
            let _turns = (large, any);
            work()
        })
        .await
    }
}

async fn turn(turns: &Arc<Semaphore>) -> Answered<OwnedSemaphorePermit> {
    let closed = |error| ApiError::internal(format!("the request could not be worked on: {error}"));
    Arc::clone(turns).acquire_owned().await.map_err(closed)
}
