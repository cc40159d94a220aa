//! Text to tokens and back, with llama.cpp's tokenizers.

use std::ffi::{CStr, c_char};
use std::ptr;

use aho_corasick::{AhoCorasick, MatchKind};
use brigade_base::Token;
use llama_cpp_sys_2 as sys;

use crate::model::{Content, LoadError, Model};
use crate::source::ReadSeek;

/// Longest text to tokenize: 16 MiB is more than four million tokens, far beyond any context, and fits `i32` lengths.
const MAX_TEXT_BYTES: usize = 16 << 20;

/// Longest stretch of text that a model may take as one word; [`Words`] says what that can be. For some models
/// llama.cpp cuts text into words with `std::regex`, which takes a stack frame for each character of a word. At
/// [`STACK_BYTES_PER_CHAR`] this makes 256 MiB of stack.
const MAX_WORD_CHARS: usize = 1 << 18;

/// Stack for each character of a word: 300 to 400 bytes were measured over all pre-tokenizers of llama.cpp.
const STACK_BYTES_PER_CHAR: usize = 1 << 10;

/// Stack for all else, and the longest word that is left to the caller's stack, of which 2 MiB are usual.
const BASE_STACK_BYTES: usize = 1 << 20;
const MAX_INLINE_WORD_CHARS: usize = 1 << 9;

/// Most steps for the digits of a text where a number takes so many as the square of its length; see
/// [`Words::Numbers`]. That is one number of 5792 digits, or 335 thousand of ten, more than a context of a million
/// tokens holds. A step takes some 20 ns, so all of them less than a second.
const MAX_DIGIT_STEPS: usize = 1 << 25;

/// The pre-tokenizers of llama.cpp of which no pattern goes on behind a blank that follows a word. One that is not here
/// is taken for one that does, which costs little: a larger stack, and a limit on letters without any punctuation.
const WORD_BY_WORD: &str = "\
    a.x-4.0 afmoe bailingmoe bailingmoe2 bloom chameleon chatglm-bpe codeshell cohere2moe command-r dbrx \
    deepseek-coder deepseek-llm deepseek-r1-qwen deepseek-v3 default exaone exaone4 f2llmv2 falcon falcon-h1 \
    falcon3 gemma4 gigachat glm4 glm5 gpt-2 gpt-4o gpt3-finnish granite-docling granite-embed-multi-311m \
    granite-embed-multi-97m grok-2 hunyuan hunyuan-dense hy_v4 jais jais-2 jina-de jina-es jina-v1-en \
    jina-v2-code jina-v2-de jina-v2-es jina-v5-nano joyai-llm kanana2 kimi-k2 kormo laguna lfm2 llada-moe llama-bpe \
    llama-v3 llama3 llama4 megrez mellum mellum2 midm-2.0 minerva-7b minicpm5 minimax-m2 mmbert modern-bert \
    mpt olmo phi-2 pixtral poro-chat qwen2 qwen35 refact roberta-bpe sarvam-moe seed-coder smaug-bpe smollm \
    solar-open spark2_5 stablelm2 starcoder talkie tekken tiny_aya trillion ufakzeka viking whitespace youtu";

/// Text was not tokenized.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TokenizeError {
    /// The text is too long.
    #[error("the text has {n_bytes} bytes; at most {max} can be tokenized")]
    TooLong {
        /// Bytes of the text.
        n_bytes: usize,
        /// Most bytes.
        max: usize,
    },
    /// The text has a stretch that is too long for a word, by what the model takes as one.
    #[error("the text has {n_chars} characters that may be one word to the tokenizer; at most {max} can be tokenized")]
    LongWord {
        /// Characters of the stretch.
        n_chars: usize,
        /// Most characters.
        max: usize,
    },
    /// The text has numbers that are too long for the tokenizer of this model.
    #[error(
        "the text has numbers of up to {n_digits} digits, which the tokenizer of this model would take too long for; \
         break them with blanks, or send fewer"
    )]
    LongNumbers {
        /// Digits of the longest one.
        n_digits: usize,
    },
    /// The text has more tokens than asked for.
    #[error("the text has at least {at_least} tokens; at most {max} were asked for")]
    TooManyTokens {
        /// Tokens that it has for certain.
        at_least: usize,
        /// Most tokens.
        max: usize,
    },
    /// The tokenizer failed, or had no memory for its stack.
    #[error("the tokenizer failed on a text of {n_bytes} bytes")]
    Failed {
        /// Bytes of the text.
        n_bytes: usize,
    },
}

/// The tokens of a model and the rules that make them.
///
/// It can be shared between threads: llama.cpp builds all tables when it loads a vocabulary, its functions take it as
/// `const`, keep what they need in locals, and no member of it is `mutable`.
pub struct Vocabulary {
    model: Model,
    n_tokens: u32,
    /// Bytes of the longest token.
    longest: usize,
    /// The texts that are one token wherever they stand: control and user-defined tokens.
    specials: AhoCorasick,
    words: Words,
}

/// What llama.cpp may take as one word of a text, and so does in one go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Words {
    /// A stretch of blanks, or of anything else.
    Plain,
    /// Letters with blanks between them too.
    Phrases,
    /// As [`Plain`](Self::Plain), but at each digit it looks ahead to the last one of the number.
    Numbers,
}

impl Words {
    /// By the name of the pre-tokenizer; without one llama.cpp takes its default.
    fn of(pre_tokenizer: Option<&str>) -> Self {
        match pre_tokenizer {
            Some("superbpe") => Self::Numbers,
            Some(name) if !WORD_BY_WORD.split(' ').any(|known| known == name) => Self::Phrases,
            _ => Self::Plain,
        }
    }
}

/// Attributes of tokens that llama.cpp looks for before it cuts a text into words.
const SPECIAL: sys::llama_token_attr =
    sys::LLAMA_TOKEN_ATTR_CONTROL | sys::LLAMA_TOKEN_ATTR_USER_DEFINED | sys::LLAMA_TOKEN_ATTR_UNKNOWN;

impl std::fmt::Debug for Vocabulary {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Vocabulary").field("n_tokens", &self.n_tokens).finish_non_exhaustive()
    }
}

impl Vocabulary {
    /// Loads the vocabulary of the GGUF of `n_bytes` that `reader` yields. Only its metadata is read: tensors may
    /// follow or be missing.
    ///
    /// # Errors
    /// If the reader fails, llama.cpp refuses the file, or it has no vocabulary.
    pub fn load(reader: Box<dyn ReadSeek + Send>, n_bytes: u64) -> Result<Self, LoadError> {
        let model = Model::from_reader(reader, n_bytes, Content::Vocabulary, &mut |_| true)?;
        // SAFETY: the vocabulary belongs to the model.
        if unsafe { sys::llama_vocab_type(model.vocab()) } == sys::LLAMA_VOCAB_TYPE_NONE {
            return Err(LoadError::Refused("the file has no vocabulary".to_owned()));
        }
        let n_tokens = model.n_vocab();
        let none = || AhoCorasick::new([] as [&str; 0]);
        let failed = |error: aho_corasick::BuildError| LoadError::Refused(error.to_string());
        let words = Words::of(model.metadata(c"tokenizer.ggml.pre").as_deref());
        let mut vocabulary = Self { model, n_tokens, longest: 1, specials: none().map_err(failed)?, words };
        let mut specials = Vec::new();
        for token in 0..n_tokens as Token {
            let text = vocabulary.text_of(token).unwrap_or_default();
            vocabulary.longest = vocabulary.longest.max(text.len()).max(vocabulary.token_bytes(token, true).len());
            // SAFETY: the token exists.
            let attributes = unsafe { sys::llama_vocab_get_attr(vocabulary.model.vocab(), token) };
            if attributes & SPECIAL != 0 && !text.is_empty() {
                specials.push(text);
            }
        }
        let longest_first = AhoCorasick::builder().match_kind(MatchKind::LeftmostLongest).build(specials);
        vocabulary.specials = longest_first.map_err(failed)?;
        Ok(vocabulary)
    }

    /// How many tokens there are; ids are below.
    pub fn n_tokens(&self) -> u32 {
        self.n_tokens
    }

    /// The tokens of `text` as [`tokenize`](Self::tokenize) gives them, if they are at most about `n_max`: a text that
    /// has more for certain is refused without much work. llama.cpp takes time by the square of the number of special
    /// tokens.
    ///
    /// # Errors
    /// As [`tokenize`](Self::tokenize), and if the text has too many tokens.
    pub fn tokenize_at_most(
        &self,
        text: &str,
        add_special: bool,
        parse_special: bool,
        n_max: usize,
    ) -> Result<Vec<Token>, TokenizeError> {
        let at_least = (text.len() / self.longest).max(self.specials.find_iter(text).take(n_max + 1).count());
        if at_least > n_max {
            return Err(TokenizeError::TooManyTokens { at_least, max: n_max });
        }
        self.tokenize(text, add_special, parse_special)
    }

    /// The tokens of `text`. `add_special` puts the start token before, and the end token behind, where the model wants
    /// them; `parse_special` lets the text of a control token stand for that token.
    ///
    /// # Errors
    /// If the text, or what may be one word of it, is too long.
    pub fn tokenize(&self, text: &str, add_special: bool, parse_special: bool) -> Result<Vec<Token>, TokenizeError> {
        let n_bytes = text.len();
        if n_bytes > MAX_TEXT_BYTES {
            return Err(TokenizeError::TooLong { n_bytes, max: MAX_TEXT_BYTES });
        }
        let n_chars = longest_word(text, self.words);
        if n_chars > MAX_WORD_CHARS {
            return Err(TokenizeError::LongWord { n_chars, max: MAX_WORD_CHARS });
        }
        if self.words == Words::Numbers {
            check_digits(text)?;
        }
        let failed = TokenizeError::Failed { n_bytes };
        if n_chars <= MAX_INLINE_WORD_CHARS {
            return self.tokenize_here(text, add_special, parse_special).ok_or(failed);
        }
        let stack_bytes = BASE_STACK_BYTES + n_chars * STACK_BYTES_PER_CHAR;
        std::thread::scope(|scope| {
            let tokenize = || self.tokenize_here(text, add_special, parse_special);
            let thread = std::thread::Builder::new().name("tokenize".to_owned()).stack_size(stack_bytes);
            thread.spawn_scoped(scope, tokenize).ok()?.join().ok()?
        })
        .ok_or(failed)
    }

    /// Tokenizes on the stack of this thread a text that was checked.
    fn tokenize_here(&self, text: &str, add_special: bool, parse_special: bool) -> Option<Vec<Token>> {
        // No token is made of less than a byte; special tokens and a leading space come on top.
        let mut tokens: Vec<Token> = vec![0; text.len() + 8];
        for _ in 0..2 {
            // SAFETY: the text has so many bytes of UTF-8 and `tokens` room for as many as is said; both lengths fit.
            let n = unsafe {
                sys::llama_tokenize(
                    self.model.vocab(),
                    text.as_ptr().cast(),
                    text.len() as i32,
                    tokens.as_mut_ptr(),
                    tokens.len() as i32,
                    add_special,
                    parse_special,
                )
            };
            if let Ok(n) = usize::try_from(n) {
                tokens.truncate(n);
                return Some(tokens);
            }
            if n == i32::MIN {
                break;
            }
            // Normalisation made the text longer.
            tokens.resize(n.unsigned_abs() as usize, 0);
        }
        None
    }

    /// The bytes that `token` stands for, not always whole characters. Control tokens have none, unless `special` asks
    /// for their text. Empty for an unknown token.
    pub fn token_bytes(&self, token: Token, special: bool) -> Vec<u8> {
        if !self.contains(token) {
            return Vec::new();
        }
        let piece = |buffer: &mut [u8]| {
            let (to, len) = (buffer.as_mut_ptr().cast::<c_char>(), buffer.len() as i32);
            // SAFETY: the token exists, and the buffer has `len` bytes.
            unsafe { sys::llama_token_to_piece(self.model.vocab(), token, to, len, 0, special) }
        };
        // Nearly all tokens fit; for the others the negated result says how much they need.
        let mut buffer = vec![0; 32];
        let mut n = piece(&mut buffer);
        if n < 0 {
            buffer.resize(n.unsigned_abs() as usize, 0);
            n = piece(&mut buffer);
        }
        buffer.truncate(usize::try_from(n).unwrap_or(0));
        buffer
    }

    /// The text of `token` as the file has it, with the tokenizer's own escapes; `None` for an unknown token.
    pub fn text_of(&self, token: Token) -> Option<String> {
        if !self.contains(token) {
            return None;
        }
        // SAFETY: the token exists, and there is a vocabulary; the text is a C string that lives as long as it.
        let text = unsafe { CStr::from_ptr(sys::llama_vocab_get_text(self.model.vocab(), token)) };
        Some(text.to_string_lossy().into_owned())
    }

    /// Whether `token` ends an answer: end of text, of turn or of message.
    pub fn is_end(&self, token: Token) -> bool {
        // SAFETY: the token exists.
        self.contains(token) && unsafe { sys::llama_vocab_is_eog(self.model.vocab(), token) }
    }

    /// Whether `token` is a control token, which stands for no text.
    pub fn is_control(&self, token: Token) -> bool {
        // SAFETY: the token exists.
        self.contains(token) && unsafe { sys::llama_vocab_is_control(self.model.vocab(), token) }
    }

    /// The start token, if the model has one.
    pub fn bos(&self) -> Option<Token> {
        // SAFETY: the vocabulary exists.
        Some(unsafe { sys::llama_vocab_bos(self.model.vocab()) }).filter(|token| self.contains(*token))
    }

    /// The end token, if the model has one.
    pub fn eos(&self) -> Option<Token> {
        // SAFETY: the vocabulary exists.
        Some(unsafe { sys::llama_vocab_eos(self.model.vocab()) }).filter(|token| self.contains(*token))
    }

    /// The token between two texts, if the model has one.
    pub fn separator(&self) -> Option<Token> {
        // SAFETY: the vocabulary exists.
        Some(unsafe { sys::llama_vocab_sep(self.model.vocab()) }).filter(|token| self.contains(*token))
    }

    /// Whether the end token comes behind a text that is tokenized with `add_special`.
    pub fn adds_eos(&self) -> bool {
        // SAFETY: the vocabulary exists.
        unsafe { sys::llama_vocab_get_add_eos(self.model.vocab()) }
    }

    /// Whether the separator comes behind a text that is tokenized with `add_special`, and between two.
    pub fn adds_separator(&self) -> bool {
        // SAFETY: the vocabulary exists.
        unsafe { sys::llama_vocab_get_add_sep(self.model.vocab()) }
    }

    /// Whether the start token comes before a text that is tokenized with `add_special`.
    pub fn adds_bos(&self) -> bool {
        // SAFETY: the vocabulary exists.
        unsafe { sys::llama_vocab_get_add_bos(self.model.vocab()) }
    }

    /// The model's default chat template (Jinja), if it has one.
    pub fn chat_template(&self) -> Option<String> {
        // SAFETY: the model is loaded; a null name means the default.
        let template = unsafe { sys::llama_model_chat_template(self.model.as_ptr(), ptr::null()) };
        // SAFETY: if there is one, it is a C string that lives as long as the model.
        (!template.is_null()).then(|| unsafe { CStr::from_ptr(template) }.to_string_lossy().into_owned())
    }

    fn contains(&self, token: Token) -> bool {
        u32::try_from(token).is_ok_and(|token| token < self.n_tokens)
    }
}

/// Most characters that a word pattern can match at once: a stretch of blanks or of anything else, or a phrase where
/// `words` are those. Which characters beyond ASCII are blanks or letters is for the pattern to say, so they belong to
/// either.
fn longest_word(text: &str, words: Words) -> usize {
    let (mut longest, mut len, mut blank) = (0, 0, false);
    for char in text.chars() {
        let is_blank = if char.is_ascii() { char.is_ascii_whitespace() || char == '\u{b}' } else { blank };
        len = if is_blank == blank { len + 1 } else { 1 };
        blank = is_blank;
        longest = longest.max(len);
    }
    if words == Words::Phrases {
        let ends_phrase = |char: char| char.is_ascii() && char != ' ' && !char.is_ascii_alphabetic();
        let phrases = text.split(ends_phrase).map(|phrase| phrase.chars().count());
        longest = longest.max(phrases.max().unwrap_or(0));
    }
    longest
}

/// Whether the numbers of a text take no longer than they may where each takes the square of its length.
fn check_digits(text: &str) -> Result<(), TokenizeError> {
    let numbers = || text.split(|char: char| !char.is_ascii_digit()).map(str::len);
    if numbers().map(|n_digits| n_digits * n_digits).sum::<usize>() > MAX_DIGIT_STEPS {
        return Err(TokenizeError::LongNumbers { n_digits: numbers().max().unwrap_or(0) });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_stretches_of_blanks_or_of_others() {
        for (text, n) in
            [("", 0), ("a", 1), ("ab1! c", 4), ("a  \n\t b", 5), ("\u{3000}ab\u{3000}", 4), ("a \u{3000} b", 3)]
        {
            assert_eq!(longest_word(text, Words::Plain), n, "{text:?}");
        }
    }

    #[test]
    fn phrases_are_letters_and_the_blanks_between_them() {
        for (text, n) in
            [("", 0), ("ab cd", 5), ("ab, cd ef", 6), ("a\nb c", 3), ("\u{e9} \u{3000}b", 4), ("1234 a", 4)]
        {
            assert_eq!(longest_word(text, Words::Phrases), n, "{text:?}");
        }
    }

    #[test]
    fn a_pre_tokenizer_that_is_unknown_may_take_phrases() {
        for (name, words) in [
            (None, Words::Plain),
            (Some("qwen2"), Words::Plain),
            (Some("llama-bpe"), Words::Plain),
            (Some("youtu"), Words::Plain),
            (Some("exaone-moe"), Words::Phrases),
            (Some("exaone-next"), Words::Phrases),
            (Some(""), Words::Phrases),
            (Some("superbpe"), Words::Numbers),
        ] {
            assert_eq!(Words::of(name), words, "{name:?}");
        }
    }

    #[test]
    fn numbers_are_counted_by_the_square_of_their_length() {
        let longest = "7".repeat(5792);
        for (text, n_digits) in
            [(longest.clone() + "8", 5793), (longest.clone() + &" 12".repeat(2000), 5792), ("12 ".repeat(9 << 20), 2)]
        {
            assert_eq!(check_digits(&text), Err(TokenizeError::LongNumbers { n_digits }));
        }
        for text in [longest, "1234567890 ".repeat(300_000), "\u{b2}".repeat(9000)] {
            assert_eq!(check_digits(&text), Ok(()));
        }
    }
}
