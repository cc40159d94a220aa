//! From tokens to text that can be shown.
//!
//! Tokens are bytes, not characters: a character may be spread over several of them, and the beginning of a stop string
//! may be the end of a token. So bytes are held back until they are whole characters and cannot be the beginning of a
//! stop string any more.

/// Assembles an answer.
#[derive(Debug)]
pub struct Assembler {
    stop: Vec<String>,
    /// Bytes that are no whole character yet.
    partial: Vec<u8>,
    /// Text that may be the beginning of a stop string.
    held: String,
}

/// What became of a token's bytes.
#[derive(Debug, PartialEq, Eq)]
pub struct Assembled {
    /// Text to show; may be empty.
    pub text: String,
    /// Whether a stop string was met: the text ends before it, and the answer is over.
    pub stopped: bool,
}

impl Assembler {
    /// An answer that ends before the first of `stop`.
    pub fn new(stop: Vec<String>) -> Self {
        Self { stop, partial: Vec::new(), held: String::new() }
    }

    /// Adds a token's bytes.
    pub fn push(&mut self, bytes: &[u8]) -> Assembled {
        self.partial.extend_from_slice(bytes);
        let characters = take_characters(&mut self.partial);
        self.held.push_str(&characters);
        // The one that ends first, so that it does not matter how the text was cut into tokens.
        let found = self.stop.iter().filter_map(|stop| self.held.find(stop.as_str()).map(|at| (at + stop.len(), at)));
        if let Some((_, at)) = found.min() {
            self.held.truncate(at);
            return Assembled { text: std::mem::take(&mut self.held), stopped: true };
        }
        let keep = self.stop.iter().map(|stop| overlap(&self.held, stop)).max().unwrap_or(0);
        let text = self.held.drain(..self.held.len() - keep).collect();
        Assembled { text, stopped: false }
    }

    /// The rest, once no more tokens come.
    pub fn finish(&mut self) -> String {
        let mut text = std::mem::take(&mut self.held);
        text.push_str(&String::from_utf8_lossy(&std::mem::take(&mut self.partial)));
        text
    }
}

/// Takes all whole characters; bytes that can never become one turn into U+FFFD.
fn take_characters(bytes: &mut Vec<u8>) -> String {
    let mut text = String::new();
    loop {
        match std::str::from_utf8(bytes) {
            Ok(valid) => {
                text.push_str(valid);
                bytes.clear();
                return text;
            }
            Err(error) => {
                let n_valid = error.valid_up_to();
                text.push_str(&String::from_utf8_lossy(&bytes[..n_valid]));
                let Some(n_wrong) = error.error_len() else {
                    bytes.drain(..n_valid);
                    return text;
                };
                text.push('\u{FFFD}');
                bytes.drain(..n_valid + n_wrong);
            }
        }
    }
}

/// Length of the longest proper beginning of `stop` with which `text` ends.
fn overlap(text: &str, stop: &str) -> usize {
    stop.char_indices().map(|(i, _)| i).skip(1).filter(|&n| text.ends_with(&stop[..n])).max().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn feed(stop: &[&str], pieces: &[&[u8]]) -> (Vec<String>, bool) {
        let mut assembler = Assembler::new(stop.iter().map(|s| (*s).to_owned()).collect());
        let mut shown = Vec::new();
        for piece in pieces {
            let assembled = assembler.push(piece);
            shown.push(assembled.text);
            if assembled.stopped {
                return (shown, true);
            }
        }
        shown.push(assembler.finish());
        (shown, false)
    }

    #[test]
    fn characters_come_whole() {
        let euro = "€".as_bytes();
        let (shown, _) = feed(&[], &[&euro[..1], &euro[1..2], &euro[2..], b"!"]);
        assert_eq!(shown, ["", "", "€", "!", ""]);
    }

    #[test]
    fn bytes_that_are_no_text_become_replacement_characters() {
        let (shown, _) = feed(&[], &[b"a\xff\xfeb", b"\xe2\x82"]);
        assert_eq!(shown, ["a\u{fffd}\u{fffd}b", "", "\u{fffd}"]);
    }

    #[test]
    fn a_stop_string_is_found_over_token_borders_and_never_shown() {
        assert_eq!(feed(&["END"], &[b"abE", b"N", b"Dx"]), (vec!["ab".into(), String::new(), String::new()], true));
        assert_eq!(feed(&["END"], &[b"abE", b"No"]), (vec!["ab".into(), "ENo".into(), String::new()], false));
        assert_eq!(feed(&["b", "abc"], &[b"xabc"]).0, ["xa"]);
    }

    #[test]
    fn what_is_held_comes_at_the_end() {
        assert_eq!(feed(&["\n\n"], &[b"a\n"]).0, ["a", "\n"]);
    }
}
