//! Changes a header so that it stays one.
//!
//! A changed byte of a header mostly makes it unreadable. Here a number of the metadata becomes another one, a key goes
//! or gets another type, a tensor another shape, and the result is written anew. So the fuzzer gets to the rules of
//! architectures, and to what they believe.

use brigade_gguf::{Array, Builder, Catalog, GgmlType, Metadata, Scalars, TensorInfo, Value, supported_architectures};

/// Numbers at which something may change.
const NUMBERS: [u64; 16] =
    [0, 1, 2, 3, 4, 8, 16, 31, 32, 64, 255, 256, 1 << 20, u32::MAX as u64, i64::MAX as u64, u64::MAX];

/// `bytes` with a change that `seed` chooses; `None` if they are no header, or the change cannot be written.
pub fn header(bytes: &[u8], seed: u32) -> Option<Vec<u8>> {
    let catalog = Catalog::parse_header(bytes).ok()?;
    let mut dice = Dice(u64::from(seed));
    let mut metadata = catalog.metadata().clone();
    let mut tensors = catalog.tensors().to_vec();
    match dice.below(10) {
        0..=5 => metadata = changed_metadata(&metadata, &mut dice)?,
        6 => metadata = renamed(&metadata, &mut dice)?,
        _ => change_tensors(&mut tensors, &mut dice)?,
    }
    let mut builder = Builder::new(&metadata);
    for tensor in tensors {
        builder.tensor(tensor.name, &tensor.dims, tensor.ty).ok()?;
    }
    Some(builder.header_bytes())
}

/// Draws numbers, by Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014.
struct Dice(u64);

impl Dice {
    fn roll(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, limit: usize) -> usize {
        (self.roll() % limit.max(1) as u64) as usize
    }

    /// One of [`NUMBERS`], or near `old`.
    fn number(&mut self, old: u64) -> u64 {
        match self.below(6) {
            0 => old.wrapping_add(1),
            1 => old.wrapping_sub(1),
            2 => old.wrapping_mul(2),
            3 => old / 2,
            _ => NUMBERS[self.below(NUMBERS.len())],
        }
    }
}

fn changed_metadata(metadata: &Metadata, dice: &mut Dice) -> Option<Metadata> {
    let (key, value) = metadata.iter().nth(dice.below(metadata.len()))?;
    let key = key.to_owned();
    let changed = match dice.below(8) {
        0 => return Some(metadata.filtered(|other, _| other != key)),
        1 => Value::String("x".repeat(dice.below(9))),
        2 => Value::Array(Array::of_u32(&vec![dice.number(2) as u32; dice.below(40)])),
        3 => Value::Bool(dice.below(2) == 0),
        4 => Value::F32(dice.number(1) as f32 * [1.0, -1.0, 0.001, f32::NAN][dice.below(4)]),
        _ => changed_value(value, dice),
    };
    let mut metadata = metadata.clone();
    metadata.set(key, changed);
    Some(metadata)
}

fn changed_value(value: &Value, dice: &mut Dice) -> Value {
    match value {
        Value::Array(array @ Array::Scalars(scalars)) => {
            let (mut bytes, width) = (scalars.bytes().to_vec(), scalars.bytes().len() / scalars.len().max(1));
            let at = dice.below(scalars.len()) * width;
            match dice.below(4) {
                0 => bytes.truncate(at),
                1 => bytes.extend_from_within(..at),
                // The lowest byte of a little-endian number: it stays a small one.
                _ => bytes.get_mut(at).into_iter().for_each(|byte| *byte = dice.number(u64::from(*byte)) as u8),
            }
            let changed = Scalars::new(array.element_type(), bytes);
            changed.map_or_else(|| value.clone(), |scalars| Value::Array(Array::Scalars(scalars)))
        }
        Value::Array(Array::Strings(strings)) => {
            let n = dice.below(strings.len() + 1);
            Value::Array(Array::of_strings(strings.iter().take(n)))
        }
        Value::F32(number) => Value::F32([number * 2.0, 0.0, -number, f32::NAN, f32::INFINITY][dice.below(5)]),
        number => {
            let changed = dice.number(number.as_u64().unwrap_or(0));
            match dice.below(4) {
                0 => Value::U64(changed),
                1 => Value::I32(changed as i32),
                _ => Value::U32(changed as u32),
            }
        }
    }
}

/// The same model as one of another architecture.
fn renamed(metadata: &Metadata, dice: &mut Dice) -> Option<Metadata> {
    let old = metadata.str("general.architecture")?.to_owned();
    let all: Vec<_> = supported_architectures().collect();
    let new = all[dice.below(all.len())];
    let mut renamed = Metadata::new();
    for (key, value) in metadata.iter() {
        let key = match key.strip_prefix(&old).filter(|rest| rest.starts_with('.')) {
            Some(rest) => format!("{new}{rest}"),
            None => key.to_owned(),
        };
        renamed.set(key, value.clone());
    }
    renamed.set("general.architecture", new);
    Some(renamed)
}

fn change_tensors(tensors: &mut Vec<TensorInfo>, dice: &mut Dice) -> Option<()> {
    let idx = dice.below(tensors.len());
    let other = tensors.get(dice.below(tensors.len()))?.clone();
    let tensor = tensors.get_mut(idx)?;
    match dice.below(6) {
        0 => drop(tensors.remove(idx)),
        1 => tensors.swap(idx, 0),
        2 => tensor.dims = other.dims,
        3 => {
            let at = dice.below(tensor.dims.len());
            tensor.dims[at] = dice.number(tensor.dims[at]);
        }
        4 => tensor.ty = GgmlType::all().nth(dice.below(GgmlType::all().count()))?,
        _ => {
            let (layer, rest) = other.name.strip_prefix("blk.")?.split_once('.')?;
            let layer = dice.number(layer.parse().ok()?);
            tensors.push(TensorInfo { name: format!("blk.{layer}.{rest}"), ..other });
        }
    }
    Some(())
}
