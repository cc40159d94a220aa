//! Start of llama.cpp, and its log.
//!
//! llama.cpp logs through one process-wide callback, in pieces of lines. Each thread joins its own pieces; a whole line
//! goes to `tracing` with target `llama`. While a call is [captured](capture), its error lines are kept for the caller,
//! who puts them into the error that it returns, and the buffer sizes that llama.cpp reports nowhere else are read.

use std::cell::RefCell;
use std::ffi::{CStr, c_char, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr;
use std::sync::Once;

use llama_cpp_sys_2 as sys;

/// Most error lines kept of one call: the first says what went wrong, the next ones which calls failed because of it.
const MAX_ERROR_LINES: usize = 8;

/// Longest line that is joined; llama.cpp prints chat templates, whose cap it is.
const MAX_LINE_BYTES: usize = 1 << 20;

/// Starts llama.cpp and sends its log to `tracing`. Later calls do nothing; every constructor of this crate calls it.
pub fn init() {
    static STARTED: Once = Once::new();
    STARTED.call_once(|| {
        // SAFETY: the callback is a function of static lifetime that uses no user data, and `Once` keeps other threads
        // out while the two globals are set.
        unsafe {
            sys::llama_log_set(Some(on_log), ptr::null_mut());
            sys::llama_backend_init();
        }
    });
}

/// What llama.cpp logged during one call.
#[derive(Debug, Default)]
pub(crate) struct Captured {
    errors: Vec<String>,
    /// Bytes of the KV cache and of recurrent states, to 10 KiB.
    pub(crate) kv_bytes: u64,
    /// Bytes that the cells of the KV cache need, allocated or not, to 10 KiB.
    pub(crate) cell_bytes: u64,
    /// Bytes of compute and output buffers, to 10 KiB.
    pub(crate) compute_bytes: u64,
}

impl Captured {
    /// The error lines as one text.
    pub(crate) fn message(&self) -> String {
        if self.errors.is_empty() { "llama.cpp gave no reason".to_owned() } else { self.errors.join("; ") }
    }

    /// Logs the errors of a call that went well nevertheless.
    pub(crate) fn log(&self) {
        for line in &self.errors {
            tracing::error!(target: "llama", "{line}");
        }
    }
}

thread_local! {
    static LINE: RefCell<(sys::ggml_log_level, String)> =
        const { RefCell::new((sys::GGML_LOG_LEVEL_NONE, String::new())) };
    static CAPTURED: RefCell<Option<Captured>> = const { RefCell::new(None) };
}

/// Runs `call` and keeps the errors that llama.cpp logs on this thread meanwhile. Not to be nested.
pub(crate) fn capture<R>(call: impl FnOnce() -> R) -> (R, Captured) {
    CAPTURED.with(|captured| *captured.borrow_mut() = Some(Captured::default()));
    let result = call();
    let captured = CAPTURED.with(|captured| captured.borrow_mut().take()).unwrap_or_default();
    (result, captured)
}

unsafe extern "C" fn on_log(level: sys::ggml_log_level, text: *const c_char, _user_data: *mut c_void) {
    if text.is_null() {
        return;
    }
    // SAFETY: llama.cpp passes a string that ends in NUL and outlives the call.
    let text = unsafe { CStr::from_ptr(text) };
    // A subscriber that panics must not unwind into C++.
    let _ = catch_unwind(AssertUnwindSafe(|| append(level, &text.to_string_lossy())));
}

/// Joins a piece to the line of this thread and emits what is complete.
fn append(level: sys::ggml_log_level, text: &str) {
    let lines = LINE.try_with(|line| {
        let Ok(mut line) = line.try_borrow_mut() else { return Vec::new() };
        let mut lines = Vec::new();
        if level != sys::GGML_LOG_LEVEL_CONT {
            if !line.1.is_empty() {
                lines.push((line.0, std::mem::take(&mut line.1)));
            }
            line.0 = level;
        }
        for piece in text.split_inclusive('\n') {
            if line.1.len() + piece.len() <= MAX_LINE_BYTES {
                line.1.push_str(piece);
            }
            if piece.ends_with('\n') {
                lines.push((line.0, std::mem::take(&mut line.1)));
            }
        }
        lines
    });
    for (level, line) in lines.unwrap_or_default() {
        emit(level, line.trim_end());
    }
}

fn emit(level: sys::ggml_log_level, line: &str) {
    if line.is_empty() {
        return;
    }
    let captured = CAPTURED.try_with(|captured| {
        let Ok(mut captured) = captured.try_borrow_mut() else { return false };
        let Some(captured) = captured.as_mut() else { return false };
        if level != sys::GGML_LOG_LEVEL_ERROR {
            captured.read_size(line);
            return false;
        }
        if captured.errors.len() < MAX_ERROR_LINES {
            captured.errors.push(line.to_owned());
        }
        true
    });
    match level {
        sys::GGML_LOG_LEVEL_ERROR if captured != Ok(true) => tracing::error!(target: "llama", "{line}"),
        // Warnings are about things that Brigade does on purpose, such as a session shorter than the trained context.
        _ => tracing::debug!(target: "llama", "{line}"),
    }
}

impl Captured {
    /// Adds the size of a line such as `llama_kv_cache: CPU KV buffer size = 1.00 MiB`.
    fn read_size(&mut self, line: &str) {
        let mib = |text: &str| text.trim().strip_suffix("MiB").and_then(|n| n.trim().parse::<f64>().ok());
        let in_bytes = |mib: f64| (mib * f64::from(1 << 20)) as u64;
        if let Some((_, sizes)) = line.split_once("size =").filter(|(_, sizes)| sizes.contains("), K (")) {
            let cells = sizes.split_once('(').and_then(|(size, _)| mib(size));
            self.cell_bytes += cells.map_or(0, in_bytes);
            return;
        }
        let Some((what, size)) = line.split_once("buffer size =") else { return };
        let Some(bytes) = mib(size).map(in_bytes) else { return };
        match what.split_whitespace().next_back() {
            Some("KV" | "RS" | "state") => self.kv_bytes += bytes,
            Some("compute" | "output") => self.compute_bytes += bytes,
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_of_a_line_become_one_error() {
        let ((), captured) = capture(|| {
            append(sys::GGML_LOG_LEVEL_ERROR, "missing tensor ");
            append(sys::GGML_LOG_LEVEL_CONT, "blk.0\nignored");
            append(sys::GGML_LOG_LEVEL_INFO, "fine\n");
        });
        assert_eq!(captured.message(), "missing tensor blk.0; ignored");
    }

    #[test]
    fn buffer_sizes_are_read_and_summed() {
        let ((), captured) = capture(|| {
            append(sys::GGML_LOG_LEVEL_INFO, "llama_kv_cache:        CPU KV buffer size =     1.50 MiB\n");
            append(sys::GGML_LOG_LEVEL_INFO, "sched_reserve:        CPU compute buffer size =    2.00 MiB\n");
            append(sys::GGML_LOG_LEVEL_INFO, "llama_context:        CPU  output buffer size =     1.00 MiB\n");
            append(sys::GGML_LOG_LEVEL_INFO, "load_tensors:         CPU model buffer size =    64.00 MiB\n");
            let cells =
                "llama_kv_cache: size =    1.25 MiB (   512 cells,   8 layers,  4/4 seqs), K (f16):    0.75 MiB\n";
            append(sys::GGML_LOG_LEVEL_INFO, cells);
        });
        assert_eq!((captured.kv_bytes, captured.compute_bytes), (3 << 19, 3 << 20));
        assert_eq!(captured.cell_bytes, 5 << 18);
        assert_eq!(captured.message(), "llama.cpp gave no reason");
    }
}
