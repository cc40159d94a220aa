//! Headers that lie: each is refused with the reason, and no bytes whatever make the parser panic.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a failed test is to panic")]

mod support;

use brigade_base::LayerRange;
use brigade_gguf::{
    Architecture, Array, Builder, Catalog, GgmlType, HeaderError, MAX_HEADER_BYTES, Metadata, Scalars, StageView,
    Value, ValueType,
};
use proptest::prelude::*;
use support::Recipe;

/// Writes a header by hand, lies included.
#[derive(Clone)]
struct Raw(Vec<u8>);

impl Raw {
    fn new(version: u32, n_tensors: u64, n_keys: u64) -> Self {
        Self(b"GGUF".to_vec()).u32(version).u64(n_tensors).u64(n_keys)
    }

    fn u32(mut self, n: u32) -> Self {
        self.0.extend(n.to_le_bytes());
        self
    }

    fn u64(mut self, n: u64) -> Self {
        self.0.extend(n.to_le_bytes());
        self
    }

    fn bytes(mut self, bytes: &[u8]) -> Self {
        self.0.extend(bytes);
        self
    }

    fn string(self, text: &[u8]) -> Self {
        self.u64(text.len() as u64).bytes(text)
    }

    fn key(self, key: &[u8], ty: ValueType) -> Self {
        self.string(key).u32(ty as u32)
    }

    fn tensor(self, name: &[u8], dims: &[u64], ty: u32, offset: u64) -> Self {
        let start = self.string(name).u32(dims.len() as u32);
        dims.iter().fold(start, |raw, dim| raw.u64(*dim)).u32(ty).u64(offset)
    }

    fn padded(mut self, n_bytes: usize) -> Self {
        self.0.resize(self.0.len().next_multiple_of(32) + n_bytes, 0);
        self
    }

    fn error(self) -> HeaderError {
        Catalog::parse(&self.0, self.0.len() as u64).expect_err("an unsound header was accepted")
    }
}

macro_rules! refused {
    ($($name:ident: $raw:expr => $error:pat,)*) => {
        $(#[test]
        fn $name() {
            let error = $raw.error();
            assert!(matches!(error, $error), "{error:?}");
        })*
    };
}

refused! {
    another_magic: Raw(b"GGML".to_vec()).u32(3).u64(0).u64(0) => HeaderError::Magic { .. },
    version_1: Raw::new(1, 0, 0) => HeaderError::Version { found: 1 },
    version_4: Raw::new(4, 0, 0) => HeaderError::Version { found: 4 },
    big_endian: Raw::new(3u32.swap_bytes(), 0, 0) => HeaderError::BigEndian,
    too_many_tensors: Raw::new(3, u64::MAX, 0) => HeaderError::TooLarge { what: "number of tensors", .. },
    too_many_keys: Raw::new(3, 0, 1 << 40) => HeaderError::TooLarge { what: "number of metadata keys", .. },
    fewer_tensors_than_said: Raw::new(3, 60_000, 0) => HeaderError::Truncated { .. },
    a_huge_key: Raw::new(3, 0, 1).u64(u64::MAX) => HeaderError::TooLarge { what: "length of a metadata key", .. },
    an_empty_key: Raw::new(3, 0, 1).key(b"", ValueType::U8).bytes(&[0]) => HeaderError::EmptyKey { position: 24 },
    a_key_in_latin_1: Raw::new(3, 0, 1).key(b"caf\xe9", ValueType::U8).bytes(&[0])
        => HeaderError::NotUtf8 { what: "length of a metadata key", .. },
    a_string_in_latin_1: Raw::new(3, 0, 1).key(b"k", ValueType::String).string(b"\xff") => HeaderError::NotUtf8 { .. },
    a_huge_string: Raw::new(3, 0, 1).key(b"k", ValueType::String).u64(1 << 62) => HeaderError::TooLarge { .. },
    one_key_twice: Raw::new(3, 0, 2).key(b"k", ValueType::U8).bytes(&[0]).key(b"k", ValueType::U8).bytes(&[0])
        => HeaderError::DuplicateKey { .. },
    an_unknown_value_type: Raw::new(3, 0, 1).string(b"k").u32(13) => HeaderError::ValueType { found: 13, .. },
    a_bool_of_two: Raw::new(3, 0, 1).key(b"k", ValueType::Bool).bytes(&[2]) => HeaderError::Bool { .. },
    a_nested_array: Raw::new(3, 0, 1).key(b"k", ValueType::Array).u32(9).u64(1).u32(9).u64(1)
        => HeaderError::NestedArray { .. },
    a_huge_array: Raw::new(3, 0, 1).key(b"k", ValueType::Array).u32(10).u64(u64::MAX)
        => HeaderError::TooLarge { what: "header size", .. },
    an_array_of_absent_strings: Raw::new(3, 0, 1).key(b"k", ValueType::Array).u32(8).u64(1 << 24)
        => HeaderError::Truncated { .. },
    an_alignment_of_48: Raw::new(3, 0, 1).key(b"general.alignment", ValueType::U32).u32(48)
        => HeaderError::Alignment { .. },
    an_alignment_of_zero: Raw::new(3, 0, 1).key(b"general.alignment", ValueType::U32).u32(0)
        => HeaderError::Alignment { .. },
    a_huge_alignment: Raw::new(3, 0, 1).key(b"general.alignment", ValueType::U32).u32(1 << 20)
        => HeaderError::Alignment { .. },
    an_alignment_in_words: Raw::new(3, 0, 1).key(b"general.alignment", ValueType::String).string(b"32")
        => HeaderError::Alignment { .. },
    one_tensor_twice: Raw::new(3, 2, 0).tensor(b"t", &[8], 0, 0).tensor(b"t", &[8], 0, 32).padded(64)
        => HeaderError::DuplicateTensor { .. },
    a_long_tensor_name: Raw::new(3, 1, 0).tensor(&[b'x'; 64], &[8], 0, 0).padded(64) => HeaderError::TooLarge { .. },
    a_tensor_name_in_latin_1: Raw::new(3, 1, 0).tensor(b"\xe9", &[8], 0, 0).padded(64) => HeaderError::NotUtf8 { .. },
    no_dimension: Raw::new(3, 1, 0).tensor(b"t", &[], 0, 0).padded(64) => HeaderError::Dimensions { n_dims: 0, .. },
    five_dimensions: Raw::new(3, 1, 0).tensor(b"t", &[1; 5], 0, 0).padded(64)
        => HeaderError::Dimensions { n_dims: 5, .. },
    a_dimension_of_zero: Raw::new(3, 1, 0).tensor(b"t", &[8, 0], 0, 0).padded(64) => HeaderError::Shape { .. },
    an_unknown_tensor_type: Raw::new(3, 1, 0).tensor(b"t", &[8], 43, 0).padded(64)
        => HeaderError::TensorType { found: 43, .. },
    a_withdrawn_tensor_type: Raw::new(3, 1, 0).tensor(b"t", &[8], 4, 0).padded(64)
        => HeaderError::TensorType { found: 4, .. },
    half_a_block: Raw::new(3, 1, 0).tensor(b"t", &[48], 2, 0).padded(64) => HeaderError::Row { block: 32, .. },
    a_size_that_wraps: Raw::new(3, 1, 0).tensor(b"t", &[1 << 32, 1 << 32], 0, 0).padded(64)
        => HeaderError::Size { .. },
    an_odd_offset: Raw::new(3, 1, 0).tensor(b"t", &[8], 0, 8).padded(64) => HeaderError::Misaligned { offset: 8, .. },
    an_end_behind_the_file: Raw::new(3, 1, 0).tensor(b"t", &[8], 0, 64).padded(64) => HeaderError::OutOfFile { .. },
    an_offset_that_wraps: Raw::new(3, 1, 0).tensor(b"t", &[8], 0, u64::MAX - 31).padded(64)
        => HeaderError::OutOfFile { .. },
    overlapping_tensors: Raw::new(3, 2, 0).tensor(b"a", &[16], 0, 0).tensor(b"b", &[8], 0, 32).padded(96)
        => HeaderError::Overlap { .. },
}

#[test]
fn a_header_behind_the_cap_is_refused_before_its_bytes_are_read() {
    let raw = Raw::new(3, 0, 1).key(b"k", ValueType::Array).u32(0).u64(MAX_HEADER_BYTES);
    let error = Catalog::parse(&raw.0, u64::MAX).unwrap_err();
    assert!(matches!(error, HeaderError::TooLarge { what: "header size", .. }), "{error:?}");
}

#[test]
fn version_2_reads_as_version_3() {
    let raw = |version| Raw::new(version, 1, 0).tensor(b"t", &[8], 0, 0).padded(32).0;
    let parse = |bytes: Vec<u8>| Catalog::parse(&bytes, bytes.len() as u64).unwrap();
    assert_eq!(parse(raw(2)), parse(raw(3)));
}

/// Whatever a header says, everything that looks at its catalog must end without a panic.
fn look_at(catalog: &Catalog) {
    let again = Catalog::parse_header(&catalog.header_bytes(false)).unwrap();
    assert_eq!(again.header_hash(), catalog.header_hash());
    let _ = (catalog.quantisation(), catalog.bytes_per_layer(), catalog.n_parameters());
    let _ = brigade_gguf::vocabulary_header(catalog);
    let _ = StageView::whole(catalog);
    if let Ok(architecture) = Architecture::of(catalog) {
        for cut in architecture.cut_points().into_iter().take(3) {
            for layers in [LayerRange::new(0, cut), LayerRange::new(cut, architecture.n_layers)] {
                let _ = StageView::new(catalog, layers.unwrap());
            }
        }
    }
}

#[test]
fn a_file_cut_anywhere_is_refused() {
    let model = Recipe::new("gemma3", 2).model();
    for n in 0..model.bytes.len() {
        let cut = &model.bytes[..n];
        assert!(Catalog::parse(cut, n as u64).is_err(), "{n} of {} bytes were accepted", model.bytes.len());
        if let Ok(catalog) = Catalog::parse(cut, model.bytes.len() as u64) {
            assert_eq!(catalog, model.catalog, "{n}");
        }
    }
}

#[test]
fn every_changed_byte_of_a_header_is_survived() {
    let model = Recipe::new("qwen3moe", 2).model();
    let n_header = model.catalog.tensors()[0].offset as usize;
    let mut bytes = model.bytes.clone();
    for position in 0..n_header {
        let original = bytes[position];
        for value in [0, 1, 0x7f, 0x80, 0xff, original.wrapping_add(1)] {
            bytes[position] = value;
            if let Ok(catalog) = Catalog::parse(&bytes, bytes.len() as u64) {
                look_at(&catalog);
            }
        }
        bytes[position] = original;
    }
}

fn any_value() -> impl Strategy<Value = Value> {
    prop_oneof![
        any::<u8>().prop_map(Value::U8),
        any::<i16>().prop_map(Value::I16),
        any::<u32>().prop_map(Value::U32),
        any::<i64>().prop_map(Value::I64),
        any::<bool>().prop_map(Value::Bool),
        (-1e9..1e9f64).prop_map(Value::F64),
        ".{0,12}".prop_map(|text| Value::from(text.as_str())),
        prop::collection::vec(any::<i32>(), 0..9).prop_map(|values| Array::of_i32(&values).into()),
        prop::collection::vec(any::<bool>(), 0..9).prop_map(|values| Array::of_bool(&values).into()),
        prop::collection::vec(prop::collection::vec(any::<u8>(), 0..9), 0..9)
            .prop_map(|strings| Array::of_strings(strings).into()),
        prop::collection::vec(any::<u64>(), 0..5).prop_map(|values| {
            let bytes = values.iter().flat_map(|n| n.to_le_bytes()).collect();
            Value::Array(Array::Scalars(Scalars::new(ValueType::U64, bytes).unwrap()))
        }),
    ]
}

fn any_tensor() -> impl Strategy<Value = (Vec<u64>, GgmlType)> {
    let types: Vec<GgmlType> = GgmlType::all().collect();
    (prop::sample::select(types), prop::collection::vec(1u64..4, 1..=4)).prop_map(|(ty, mut dims)| {
        dims[0] *= ty.n_block_elements();
        (dims, ty)
    })
}

/// The embedded model with some bytes behind the first occurrence of `after` replaced.
fn tampered(after: &[u8], skip: usize, with: &[u8]) -> String {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../models/abacus-f16.gguf");
    let mut bytes = std::fs::read(path).unwrap();
    let at = bytes.windows(after.len()).position(|window| window == after).unwrap() + after.len() + skip;
    bytes[at..at + with.len()].copy_from_slice(with);
    let catalog = Catalog::parse(&bytes, bytes.len() as u64).unwrap();
    Architecture::of(&catalog).unwrap_err().to_string()
}

#[test]
fn vocabularies_that_would_end_the_process_are_refused() {
    let kind = tampered(b"tokenizer.ggml.model", 4 + 8, b"none");
    assert!(kind.contains("none") && kind.contains("gpt2"), "{kind}");
    // The first tokens are <|endoftext|>, <|im_start|> and <|im_end|>.
    let zero = tampered(b"<|endoftext|>", 8, b"\0");
    assert!(zero.contains("zero byte in token 1"), "{zero}");
    // Byte tokens follow, each one character long: "!" and then a double quote, which becomes another "!".
    let twice = tampered(b"<|im_end|>", 8 + 1 + 8, b"!");
    assert!(twice.contains("twice"), "{twice}");
}

proptest! {
    #[test]
    fn what_is_written_is_read(
        keys in prop::collection::btree_map("[a-z.]{1,20}", any_value(), 0..12),
        tensors in prop::collection::vec(any_tensor(), 0..12),
    ) {
        let mut metadata = Metadata::new();
        for (key, value) in keys {
            metadata.set(format!("x.{key}"), value);
        }
        let mut builder = Builder::new(&metadata);
        for (i, (dims, ty)) in tensors.iter().enumerate() {
            builder.tensor(format!("tensor.{i}"), dims, *ty).unwrap();
        }
        let mut bytes = Vec::new();
        builder.write(&mut bytes, |idx, _, buf| { buf.fill(idx as u8 + 1); Ok(()) }).unwrap();
        let catalog = Catalog::parse(&bytes, bytes.len() as u64).unwrap();
        prop_assert_eq!(catalog.metadata(), &metadata);
        prop_assert_eq!(catalog.tensors().len(), tensors.len());
        for (idx, (tensor, (dims, ty))) in catalog.tensors().iter().zip(&tensors).enumerate() {
            prop_assert_eq!((&tensor.dims, tensor.ty), (dims, *ty));
            let data = &bytes[tensor.offset as usize..][..tensor.n_bytes as usize];
            prop_assert!(data.iter().all(|byte| usize::from(*byte) == idx + 1));
        }
    }

    #[test]
    fn arbitrary_bytes_are_survived(bytes in prop::collection::vec(any::<u8>(), 0..200), n_file_bytes: u64) {
        let _ = Catalog::parse(&bytes, n_file_bytes);
        let mut header = b"GGUF\x03\0\0\0\x01\0\0\0\0\0\0\0\x02\0\0\0\0\0\0\0".to_vec();
        header.extend(&bytes);
        if let Ok(catalog) = Catalog::parse(&header, n_file_bytes) {
            look_at(&catalog);
        }
    }

    #[test]
    fn several_changed_bytes_are_survived(changes in prop::collection::vec((0usize..4000, any::<u8>()), 1..8)) {
        let mut bytes = Recipe::new("gemma2", 3).model().bytes.clone();
        let n_header = bytes.len().min(4000);
        for (position, value) in changes {
            bytes[position % n_header] = value;
        }
        if let Ok(catalog) = Catalog::parse(&bytes, bytes.len() as u64) {
            look_at(&catalog);
        }
    }
}
