//! Which completions are under way, so that a server that stops can let them end.
//!
//! Each completion holds an [`Entry`] from before its body is read until its last byte is handed to the connection.
//! Once the [`Gate`] is closed nobody gets one any more; what is inside goes on.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use brigade_node::serving::SubmitError;

/// Counts completions and lets no more in once it is closed.
#[derive(Debug, Default)]
pub(crate) struct Gate(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    is_closed: bool,
    n_inside: usize,
}

impl Gate {
    /// Lets a completion in.
    ///
    /// # Errors
    /// If the gate is closed.
    pub(crate) fn enter(self: &Arc<Self>) -> Result<Entry, SubmitError> {
        let mut state = self.state();
        if state.is_closed {
            return Err(SubmitError::Stopping);
        }
        state.n_inside += 1;
        Ok(Entry(Arc::clone(self)))
    }

    /// Lets nobody in from now on.
    pub(crate) fn close(&self) {
        self.state().is_closed = true;
    }

    /// Whether nobody is let in.
    pub(crate) fn is_closed(&self) -> bool {
        self.state().is_closed
    }

    /// Completions that are under way.
    pub(crate) fn n_inside(&self) -> usize {
        self.state().n_inside
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A completion that is under way; dropped when it ends, however it does.
#[derive(Debug)]
pub(crate) struct Entry(Arc<Gate>);

impl Drop for Entry {
    fn drop(&mut self) {
        self.0.state().n_inside -= 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_closed_gate_lets_nobody_in_and_everybody_out() {
        let gate = Arc::new(Gate::default());
        let (first, second) = (gate.enter().unwrap(), gate.enter().unwrap());
        drop(first);
        assert_eq!((gate.n_inside(), gate.is_closed()), (1, false));
        gate.close();
        assert_eq!(gate.enter().unwrap_err(), SubmitError::Stopping);
        assert_eq!((gate.n_inside(), gate.is_closed()), (1, true));
        drop(second);
        assert_eq!(gate.n_inside(), 0);
    }
}
