//! Text to tokens and back.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

use std::io::Cursor;

use brigade_engine::{LoadError, TokenizeError, Vocabulary};
use proptest::prelude::*;
use support::{abacus, open};

fn vocabulary() -> Vocabulary {
    let (reader, n_bytes) = open(&abacus());
    Vocabulary::load(reader, n_bytes).unwrap()
}

fn text(vocabulary: &Vocabulary, tokens: &[i32], special: bool) -> String {
    let bytes: Vec<u8> = tokens.iter().flat_map(|&token| vocabulary.token_bytes(token, special)).collect();
    String::from_utf8(bytes).unwrap()
}

#[test]
fn control_tokens_are_parsed_and_rendered_only_when_asked() {
    let vocabulary = vocabulary();
    assert_eq!((vocabulary.n_tokens(), vocabulary.adds_bos()), (1024, false));
    let chat = "<|im_start|>user\nWhat is 12 + 7?<|im_end|>\n";
    let parsed = vocabulary.tokenize(chat, true, true).unwrap();
    let plain = vocabulary.tokenize(chat, true, false).unwrap();
    assert!(plain.len() > parsed.len());
    assert_eq!(text(&vocabulary, &parsed, true), chat);
    assert_eq!(text(&vocabulary, &parsed, false), "user\nWhat is 12 + 7?\n");
    assert_eq!(text(&vocabulary, &plain, false), chat);

    let end = vocabulary.tokenize("<|im_end|>", false, true).unwrap();
    assert_eq!(end.len(), 1);
    assert!(vocabulary.is_end(end[0]) && vocabulary.is_control(end[0]) && !vocabulary.is_end(parsed[1]));
    assert_eq!(vocabulary.text_of(end[0]).as_deref(), Some("<|im_end|>"));
    assert!(vocabulary.eos().is_some_and(|token| vocabulary.is_end(token)));
    assert!(vocabulary.chat_template().is_some_and(|template| template.contains("im_start")));
}

#[test]
fn unknown_tokens_and_long_texts_are_harmless() {
    let vocabulary = vocabulary();
    for token in [-1, 1024, i32::MIN, i32::MAX] {
        assert!(vocabulary.token_bytes(token, true).is_empty() && !vocabulary.is_end(token));
        assert_eq!((vocabulary.text_of(token), vocabulary.is_control(token)), (None, false));
    }
    assert_eq!(vocabulary.tokenize("", true, true), Ok(vec![]));
    let long = "a".repeat((16 << 20) + 1);
    assert_eq!(
        vocabulary.tokenize(&long, true, true),
        Err(TokenizeError::TooLong { n_bytes: long.len(), max: 16 << 20 })
    );
    let word = "ab".repeat(1 << 17);
    assert_eq!(text(&vocabulary, &vocabulary.tokenize(&word, true, true).unwrap(), false), word);
    let error = vocabulary.tokenize(&(word + "c"), true, true).unwrap_err();
    assert_eq!(error, TokenizeError::LongWord { n_chars: (1 << 18) + 1, max: 1 << 18 });
}

/// The vocabulary with another pre-tokenizer.
fn vocabulary_cut_by(pre: &str) -> Vocabulary {
    let bytes = std::fs::read(abacus()).unwrap();
    let key = b"tokenizer.ggml.pre";
    let value = bytes.windows(key.len()).position(|window| window == key).unwrap() + key.len() + 4;
    let rest = &bytes[value + 8 + "qwen2".len()..];
    let n_bytes = (pre.len() as u64).to_le_bytes();
    // Zeros behind, as the tensors have moved by up to an alignment.
    let file = [&bytes[..value], &n_bytes, pre.as_bytes(), rest, &[0; 64]].concat();
    let n_bytes = file.len() as u64;
    Vocabulary::load(Box::new(Cursor::new(file)), n_bytes).unwrap()
}

/// Some pre-tokenizers recurse for each character of a word; the caller's stack must not be what they use up.
#[test]
fn long_words_do_not_overflow_the_stack() {
    for pre in ["default", "gpt-4o", "deepseek-llm", "bloom", "exaone-moe"] {
        let vocabulary = vocabulary_cut_by(pre);
        for word in ["a", "1", "!", " ", "e\u{301}", "ab cd ", "\u{e9} a"] {
            let word = word.repeat((1 << 17) / word.len());
            let tokens = vocabulary.tokenize(&word, false, false).unwrap();
            assert_eq!(text(&vocabulary, &tokens, false), word, "{pre}");
        }
    }
}

#[test]
fn letters_without_punctuation_are_bounded_where_they_may_be_one_word() {
    let prose = "ab cd ".repeat(1 << 16);
    assert!(vocabulary_cut_by("gpt-4o").tokenize(&prose, false, false).is_ok());
    let phrases = vocabulary_cut_by("exaone-moe");
    let error = phrases.tokenize(&prose, false, false).unwrap_err();
    assert_eq!(error, TokenizeError::LongWord { n_chars: prose.len(), max: 1 << 18 });
    assert!(phrases.tokenize(&prose.replace("d ab", "d. Ab"), false, false).is_ok());
}

/// `superbpe` looks ahead at each digit, so this would take half an hour.
#[test]
fn long_numbers_are_refused_where_they_take_their_square() {
    let number = "7".repeat(1 << 18);
    let error = vocabulary_cut_by("superbpe").tokenize(&number, false, false).unwrap_err();
    assert_eq!(error, TokenizeError::LongNumbers { n_digits: 1 << 18 });
    let short = vocabulary_cut_by("superbpe").tokenize(&number[..1000], false, false).unwrap();
    assert_eq!(text(&vocabulary(), &short, false), number[..1000]);
    assert!(vocabulary_cut_by("gpt-4o").tokenize(&number, false, false).is_ok());
}

#[test]
fn threads_share_a_vocabulary() {
    let vocabulary = vocabulary();
    let expected = vocabulary.tokenize("count from 3 to 9, please", true, true).unwrap();
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..200 {
                    assert_eq!(vocabulary.tokenize("count from 3 to 9, please", true, true).unwrap(), expected);
                }
            });
        }
    });
}

#[test]
fn a_file_without_vocabulary_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    support::synthetic::ALL[0].write(&path);
    let (reader, n_bytes) = open(&path);
    assert!(matches!(Vocabulary::load(reader, n_bytes), Err(LoadError::Refused(text)) if text.contains("vocabulary")));
    assert!(matches!(Vocabulary::load(Box::new(Cursor::new(vec![])), 0), Err(LoadError::Refused(_))));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn every_text_comes_back(text_in in any::<String>()) {
        thread_local!(static VOCABULARY: Vocabulary = vocabulary());
        VOCABULARY.with(|vocabulary| {
            let tokens = vocabulary.tokenize(&text_in, false, false).unwrap();
            prop_assert_eq!(text(vocabulary, &tokens, false), text_in);
            Ok(())
        })?;
    }
}

#[test]
fn a_text_with_too_many_tokens_is_refused_before_the_work() {
    let vocabulary = vocabulary();
    // The first would take llama.cpp minutes.
    for text in ["<|im_start|>".repeat(100_000), "ab ".repeat(2_000_000)] {
        let error = vocabulary.tokenize_at_most(&text, false, true, 1024).unwrap_err();
        assert!(matches!(error, TokenizeError::TooManyTokens { max: 1024, .. }), "{error}");
    }
    let text = "<|im_start|>user\nhello";
    assert_eq!(vocabulary.tokenize_at_most(text, false, true, 5), vocabulary.tokenize(text, false, true));
}
