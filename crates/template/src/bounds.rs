//! What of the engine a template may use, and what each use costs.
//!
//! The engine counts instructions; here is counted what they read and write, in bytes: [`Work`]. It bounds memory and
//! time of a rendering, however a template goes about it.
//!
//! - Operators are paid for by the checks that [`super::guard`] puts before them.
//! - Filters, tests and functions are those of the tables here and no others, each with its price; so are methods.
//! - Texts are at most [`MAX_OUTPUT_BYTES`] long. Values that are compared, written or kept are at most [`MAX_DEPTH`]
//!   deep, since the engine looks through nested ones by recursion. No namespace holds a namespace, so no value holds
//!   itself.
//! - Sequences that the engine would build lazily, one around the other, are made lists.

use std::fmt::{self, Write as _};

use minijinja::value::{Kwargs, Rest, StringInput, Tuple, ValueKind, ValueOrKwargs, from_args};
use minijinja::{Environment, Error, ErrorKind, State, Value, escape_formatter, filters, functions, tests};
use minijinja_contrib::pycompat::unknown_method_callback;

use crate::MAX_OUTPUT_BYTES;
use crate::guard::checks;

/// Bytes that one rendering may read and write. A template reads each message some ten times (conditions, trimming,
/// splitting, joining), so this is enough for prompts of the longest length, and a second at most: the slowest uses
/// take a few nanoseconds for a byte.
pub(crate) const WORK_BYTES: u64 = 32 * MAX_OUTPUT_BYTES as u64;
/// What a value in a sequence costs beside its text: it takes 24 bytes, and some nanoseconds to look at.
const VALUE_BYTES: u64 = 32;
/// How deep a value that is looked through may be: the depth of a request's JSON.
const MAX_DEPTH: usize = 128;
/// How much dearer than reading is writing a nested value: an escaped character takes up to ten bytes.
const WRITING: u64 = 10;
/// How much dearer than reading is sorting: each of `n` values is compared `log n` times.
const SORTING: u64 = 20;
/// Most digits of a number in the text that `str.format` fills in, so that no width is above 9999.
const MAX_FORMAT_DIGITS: usize = 4;
/// Most characters that are stripped from the ends of a text, each of which is compared with each of the text.
const MAX_STRIPPED_CHARS: usize = 64;
/// Largest bounds of a range: beyond them the engine's arithmetic overflows.
const MAX_RANGE: isize = 1 << 30;

/// What is left of [`WORK_BYTES`] in this rendering.
#[derive(Debug)]
struct Work(u64);

/// What a use of a filter or test costs.
#[derive(Debug, Clone, Copy)]
enum Price {
    /// Texts are read.
    Texts,
    /// Texts are read, and sequences item by item.
    Items,
    /// All is read, however deep, so many times.
    All(u64),
}

/// Gives `environment` what templates may use.
pub(crate) fn apply(environment: &mut Environment<'_>) {
    add_checks(environment);
    add_filters(environment);
    add_tests(environment);
    environment.add_function("range", range);
    environment.add_function("dict", |state: &mut State, args: Rest<ValueOrKwargs>| {
        use_function(state, "dict", &Value::from_function(functions::dict), Price::Items, &args.into_values())
    });
    environment.add_function("namespace", |state: &mut State, args: Rest<ValueOrKwargs>| {
        let args = args.into_values();
        args.iter().try_for_each(refuse_changing)?;
        use_function(state, "namespace", &Value::from_function(functions::namespace), Price::Items, &args)
    });
    environment.set_unknown_method_callback(method);
    environment.set_formatter(|output, state, value| {
        pay_for_writing(state, value)?;
        escape_formatter(output, state, value)
    });
}

/// Pays for `bytes` read or written.
pub(crate) fn pay(state: &mut State<'_, '_>, bytes: u64) -> Result<(), Error> {
    let work = state.get_or_insert_extension(Work(WORK_BYTES));
    match work.0.checked_sub(bytes) {
        Some(left) => {
            work.0 = left;
            Ok(())
        }
        None => Err(ErrorKind::OutOfFuel.into()),
    }
}

/// Pays for reading all of `value`. Fails if it is too deep.
pub(crate) fn pay_for_all(state: &mut State<'_, '_>, value: &Value, times: u64) -> Result<(), Error> {
    let limit = state.get_or_insert_extension(Work(WORK_BYTES)).0 / times;
    let mut bytes = 0;
    look_through(value, MAX_DEPTH, limit, &mut bytes)?;
    pay(state, bytes * times)
}

/// Pays for writing `value` as text.
fn pay_for_writing(state: &mut State<'_, '_>, value: &Value) -> Result<(), Error> {
    if is_nested(value) { pay_for_all(state, value, WRITING) } else { pay(state, text_bytes(value)) }
}

fn pay_for_items(state: &mut State<'_, '_>, value: &Value) -> Result<(), Error> {
    if !is_nested(value) {
        return pay(state, text_bytes(value));
    }
    match value.len() {
        Some(n_items) => pay(state, VALUE_BYTES.saturating_mul(n_items as u64)),
        None => value.try_iter()?.try_for_each(|_| pay(state, VALUE_BYTES)),
    }
}

/// Adds up what is in `value`, and stops at `limit` bytes.
fn look_through(value: &Value, depth_left: usize, limit: u64, bytes: &mut u64) -> Result<(), Error> {
    *bytes += VALUE_BYTES + text_bytes(value);
    if *bytes > limit {
        return Err(ErrorKind::OutOfFuel.into());
    }
    if !is_nested(value) {
        return Ok(());
    }
    let depth_left = depth_left.checked_sub(1).ok_or_else(too_large)?;
    let is_map = value.kind() == ValueKind::Map;
    for item in value.try_iter()? {
        if is_map {
            look_through(&value.get_item(&item)?, depth_left, limit, bytes)?;
        }
        look_through(&item, depth_left, limit, bytes)?;
    }
    Ok(())
}

fn is_nested(value: &Value) -> bool {
    matches!(value.kind(), ValueKind::Map | ValueKind::Seq | ValueKind::Iterable)
}

fn is_sequence(value: &Value) -> bool {
    matches!(value.kind(), ValueKind::Seq | ValueKind::Iterable)
}

fn text_bytes(value: &Value) -> u64 {
    value.as_str().map(str::len).or_else(|| value.as_bytes().map(<[u8]>::len)).unwrap_or(0) as u64
}

fn too_large() -> Error {
    Error::new(ErrorKind::InvalidOperation, "a value is nested too deeply or too large")
}

/// Fails if `count` times `bytes` is more than a text may have.
fn check_product(count: usize, bytes: usize) -> Result<(), Error> {
    match count.checked_mul(bytes) {
        Some(bytes) if bytes <= MAX_OUTPUT_BYTES => Ok(()),
        _ => Err(too_large()),
    }
}

/// Fails if there is something in `value` that changes later, a namespace or a loop: kept in a namespace, it could come
/// to hold itself.
fn refuse_changing(value: &Value) -> Result<(), Error> {
    fn look(value: &Value, depth_left: usize, n_left: &mut u64) -> Result<(), Error> {
        if !is_nested(value) {
            return Ok(());
        }
        let type_name = value.as_object().map_or("", |object| object.type_name());
        if type_name.ends_with("::Namespace") || type_name.ends_with("::Loop") {
            return Err(Error::new(ErrorKind::InvalidOperation, "a namespace or loop cannot be kept in a namespace"));
        }
        let depth_left = depth_left.checked_sub(1).ok_or_else(too_large)?;
        let is_map = value.kind() == ValueKind::Map;
        for item in value.try_iter()? {
            *n_left = n_left.checked_sub(1).ok_or_else(too_large)?;
            if is_map {
                look(&value.get_item(&item)?, depth_left, n_left)?;
            }
            look(&item, depth_left, n_left)?;
        }
        Ok(())
    }
    look(value, MAX_DEPTH, &mut (WORK_BYTES / VALUE_BYTES))
}

fn add_checks(environment: &mut Environment<'_>) {
    /// The operands as the engine unpacks them: the last one first.
    fn back(operands: impl IntoIterator<Item = Value, IntoIter: DoubleEndedIterator>) -> Value {
        Value::from(Tuple::from(operands.into_iter().rev().collect::<Vec<_>>()))
    }
    macro_rules! check {
        ($name:expr, |$state:ident, $left:ident, $right:ident| $body:expr) => {
            environment.add_function($name, |$state: &mut State, $left: ValueOrKwargs, $right: ValueOrKwargs| {
                let ($left, $right) = ($left.into_value(), $right.into_value());
                $body?;
                Ok::<_, Error>(back([$left, $right]))
            });
        };
    }
    check!(checks::ADD, |state, left, right| check_joined(state, &left, &right));
    check!(checks::CONCATENATE, |state, left, right| check_concatenated(state, &left, &right));
    check!(checks::MULTIPLY, |state, left, right| check_repeated(state, &left, &right));
    check!(checks::COMPARE, |state, left, right| pay_for_comparison(state, &left, &right));
    check!(checks::COMPARE_ANY, |state, left, right| {
        pay_for_all(state, &left, 1).and_then(|()| pay_for_all(state, &right, 1))
    });
    check!(checks::CONTAINS, |state, needle, hay| {
        pay_for_all(state, &needle, WRITING).and_then(|()| pay_for_all(state, &hay, 1))
    });
    check!(checks::ITEM, |state, from, key| pay_for_item(state, &from, &key));
    check!(checks::SET, |state, value, _namespace| {
        pay_for_all(state, &value, 1).and_then(|()| refuse_changing(&value))
    });
    environment.add_function(checks::SLICE, slice);
    environment.add_function(checks::MAP, |state: &mut State, pairs: Rest<ValueOrKwargs>| {
        let pairs = pairs.into_values();
        pairs.iter().step_by(2).try_for_each(|key| pay_for_all(state, key, 1))?;
        Ok::<_, Error>(back(pairs))
    });
    environment.add_filter(checks::ITERATE, |state: &mut State, value: ValueOrKwargs| {
        let value = value.into_value();
        pay_for_items(state, &value)?;
        Ok::<_, Error>(value)
    });
    environment.add_filter(checks::SETTLE, |state: &mut State, value: ValueOrKwargs| settle(state, value.into_value()));
}

/// A lazy sequence as a list.
fn settle(state: &mut State<'_, '_>, value: Value) -> Result<Value, Error> {
    if !is_sequence(&value) || value.is_tuple() {
        return Ok(value);
    }
    pay_for_items(state, &value)?;
    Ok(value.try_iter()?.collect::<Vec<_>>().into())
}

/// `value[start:stop:step]`, as Python has it.
fn slice(
    state: &mut State<'_, '_>,
    value: ValueOrKwargs,
    start: Option<i64>,
    stop: Option<i64>,
    step: Option<i64>,
) -> Result<Value, Error> {
    let value = value.into_value();
    pay_for_items(state, &value)?;
    let step = step.unwrap_or(1);
    if step == 0 {
        return Err(Error::new(ErrorKind::InvalidOperation, "cannot slice by step size of 0"));
    }
    if let Some(text) = value.as_str() {
        let chars: Vec<char> = text.chars().collect();
        return Ok(sliced(&chars, start, stop, step).collect::<String>().into());
    }
    if value.is_undefined() || value.is_none() || is_sequence(&value) {
        let items: Vec<Value> = value.try_iter()?.collect();
        let items: Vec<Value> = sliced(&items, start, stop, step).collect();
        return Ok(if value.is_tuple() { Tuple::from(items).into() } else { items.into() });
    }
    Err(Error::new(ErrorKind::InvalidOperation, format!("value of type {} cannot be sliced", value.kind())))
}

fn sliced<T: Clone>(
    items: &[T],
    start: Option<i64>,
    stop: Option<i64>,
    step: i64,
) -> impl Iterator<Item = T> + use<'_, T> {
    let n_items = items.len() as i64;
    // Where a slice may begin and end, which is before the first item if it goes backwards.
    let (first, last) = if step > 0 { (0, n_items) } else { (-1, n_items - 1) };
    let bound = |bound: i64| (if bound < 0 { bound.saturating_add(n_items) } else { bound }).clamp(first, last);
    let start = start.map_or(if step > 0 { first } else { last }, bound);
    let stop = stop.map_or(if step > 0 { last } else { first }, bound);
    let is_inside = move |at: &i64| if step > 0 { *at < stop } else { *at > stop };
    let indices = std::iter::successors(Some(start), move |at| at.checked_add(step)).take_while(is_inside);
    indices.filter_map(|at| items.get(usize::try_from(at).ok()?).cloned())
}

fn check_joined(state: &mut State<'_, '_>, left: &Value, right: &Value) -> Result<(), Error> {
    let n_bytes = text_bytes(left) + text_bytes(right);
    if n_bytes > MAX_OUTPUT_BYTES as u64 {
        return Err(too_large());
    }
    pay(state, n_bytes)?;
    if is_sequence(left) && is_sequence(right) {
        pay_for_items(state, left)?;
        pay_for_items(state, right)?;
    }
    Ok(())
}

fn check_concatenated(state: &mut State<'_, '_>, left: &Value, right: &Value) -> Result<(), Error> {
    if text_bytes(left) + text_bytes(right) > MAX_OUTPUT_BYTES as u64 {
        return Err(too_large());
    }
    pay_for_writing(state, left)?;
    pay_for_writing(state, right)
}

fn check_repeated(state: &mut State<'_, '_>, left: &Value, right: &Value) -> Result<(), Error> {
    let repeated = right.as_usize().map(|times| (left, times)).or_else(|| left.as_usize().map(|times| (right, times)));
    let Some((value, times)) = repeated else { return Ok(()) };
    if is_sequence(value) {
        pay_for_items(state, value)?;
        let n_items = value.len().ok_or_else(too_large)?.checked_mul(times).ok_or_else(too_large)?;
        return pay(state, VALUE_BYTES.saturating_mul(n_items as u64));
    }
    let n_bytes = text_bytes(value) as usize;
    check_product(n_bytes, times)?;
    pay(state, (n_bytes * times) as u64)
}

fn pay_for_comparison(state: &mut State<'_, '_>, left: &Value, right: &Value) -> Result<(), Error> {
    if is_nested(left) && is_nested(right) {
        pay_for_all(state, left, 1)?;
        return pay_for_all(state, right, 1);
    }
    pay(state, text_bytes(left).min(text_bytes(right)))
}

fn pay_for_item(state: &mut State<'_, '_>, from: &Value, key: &Value) -> Result<(), Error> {
    pay_for_all(state, key, 1)?;
    // Only lists and maps are indexed in one step.
    if matches!(from.kind(), ValueKind::Map | ValueKind::Seq) { Ok(()) } else { pay_for_items(state, from) }
}

/// Uses `function` at its price, and makes a list of what it gives.
fn use_function(
    state: &mut State<'_, '_>,
    name: &str,
    function: &Value,
    price: Price,
    args: &[Value],
) -> Result<Value, Error> {
    pay_for_use(state, price, args)?;
    if name == "trim" {
        check_stripped(args.get(1))?;
    }
    let value = function.call(state, args)?;
    let value = if value.kind() == ValueKind::Iterable { settle(state, value)? } else { value };
    pay_for_items(state, &value)?;
    Ok(value)
}

fn pay_for_use(state: &mut State<'_, '_>, price: Price, args: &[Value]) -> Result<(), Error> {
    // An attribute may be a path of many steps, and all arguments are handed on for each item.
    let options = args.get(1..).unwrap_or_default();
    let mut n_steps = 1 + options.len() as u64;
    for option in options {
        let texts = if option.is_kwargs() {
            option.try_iter()?.map(|key| option.get_item(&key)).collect::<Result<Vec<_>, _>>()?
        } else {
            vec![option.clone()]
        };
        for text in &texts {
            n_steps += text.as_str().map_or(0, |text| text.matches(['.', ',']).count()) as u64;
            pay(state, text_bytes(text))?;
        }
    }
    for arg in args {
        match price {
            Price::Texts => pay(state, text_bytes(arg).saturating_mul(n_steps))?,
            Price::Items => (0..n_steps).try_for_each(|_| pay_for_items(state, arg))?,
            Price::All(times) => pay_for_all(state, arg, times.saturating_mul(n_steps))?,
        }
    }
    Ok(())
}

fn add_filters(environment: &mut Environment<'_>) {
    use Price::{All, Items, Texts};
    macro_rules! add {
        ($($name:literal: $function:ident at $price:expr;)*) => {$(
            let function = Value::from_function(filters::$function);
            environment.add_filter($name, move |state: &mut State, args: Rest<ValueOrKwargs>| {
                use_function(state, $name, &function, $price, &args.into_values())
            });
        )*};
    }
    add! {
        "abs": abs at Texts;
        "attr": attr at Texts;
        "bool": bool at Texts;
        "capitalize": capitalize at Texts;
        "count": length at Texts;
        "d": default at Texts;
        "default": default at Texts;
        "dictsort": dictsort at All(SORTING);
        "e": escape at All(WRITING);
        "escape": escape at All(WRITING);
        "first": first at Texts;
        "float": float at Texts;
        "groupby": groupby at All(SORTING);
        "int": int at Texts;
        "items": items at Items;
        "last": last at Items;
        "length": length at Texts;
        "lines": lines at Texts;
        "list": list at Items;
        "lower": lower at Texts;
        "map": map at Items;
        "max": max at All(2);
        "min": min at All(2);
        "reject": reject at Items;
        "rejectattr": rejectattr at Items;
        "reverse": reverse at Items;
        "round": round at Texts;
        "safe": safe at Texts;
        "select": select at Items;
        "selectattr": selectattr at Items;
        "sort": sort at All(SORTING);
        "split": split at Texts;
        "string": string at All(WRITING);
        "title": title at Texts;
        "trim": trim at Texts;
        "unique": unique at All(SORTING);
        "upper": upper at Texts;
    }
    environment.add_filter("join", |state: &mut State, value: &Value, joiner: Option<&str>| {
        join(state, value, joiner.unwrap_or(""))
    });
    environment.add_filter("replace", |state: &mut State, value: &str, from: &str, to: &str| {
        pay_for_replacing(state, value, from, to)?;
        Ok::<_, Error>(value.replace(from, to))
    });
    environment.add_filter("indent", indent);
}

fn add_tests(environment: &mut Environment<'_>) {
    use Price::{All, Texts};
    macro_rules! add {
        ($($($name:literal)|+: $function:ident at $price:expr;)*) => {$($(
            let function = Value::from_function(tests::$function);
            environment.add_test($name, move |state: &mut State, args: Rest<ValueOrKwargs>| {
                let args = args.into_values();
                pay_for_use(state, $price, &args)?;
                function.call(state, &args).map(|value| value.is_true())
            });
        )+)*};
    }
    add! {
        "boolean": is_boolean at Texts;
        "defined": is_defined at Texts;
        "divisibleby": is_divisibleby at Texts;
        "endingwith": is_endingwith at All(WRITING);
        "eq" | "equalto" | "==": is_eq at All(1);
        "even": is_even at Texts;
        "false": is_false at Texts;
        "float": is_float at Texts;
        "ge" | ">=": is_ge at All(1);
        "gt" | "greaterthan" | ">": is_gt at All(1);
        "in": is_in at All(WRITING);
        "int" | "integer": is_integer at Texts;
        "iterable": is_iterable at Texts;
        "le" | "<=": is_le at All(1);
        "lower": is_lower at Texts;
        "lt" | "lessthan" | "<": is_lt at All(1);
        "mapping": is_mapping at Texts;
        "ne" | "!=": is_ne at All(1);
        "none": is_none at Texts;
        "number": is_number at Texts;
        "odd": is_odd at Texts;
        "sameas": is_sameas at All(1);
        "sequence": is_sequence at Texts;
        "startingwith": is_startingwith at All(WRITING);
        "string": is_string at Texts;
        "true": is_true at Texts;
        "undefined": is_undefined at Texts;
        "upper": is_upper at Texts;
    }
}

fn range(lower: isize, upper: Option<isize>, step: Option<isize>) -> Result<Value, Error> {
    let mut numbers = [Some(lower), upper, step].into_iter().flatten();
    if numbers.any(|number| number.unsigned_abs() > MAX_RANGE.unsigned_abs()) {
        return Err(too_large());
    }
    functions::range(lower, upper, step)
}

/// `str.join`, for which only the result is ever kept.
fn join(state: &mut State<'_, '_>, values: &Value, joiner: &str) -> Result<String, Error> {
    pay_for_items(state, values)?;
    let mut output = CappedText::default();
    for (i, value) in values.try_iter()?.enumerate() {
        pay_for_writing(state, &value)?;
        let joiner = if i == 0 { "" } else { joiner };
        pay(state, joiner.len() as u64)?;
        output.write_str(joiner).and_then(|()| write!(output, "{value}")).map_err(|_| too_large())?;
    }
    Ok(output.0)
}

fn pay_for_replacing(state: &mut State<'_, '_>, value: &str, from: &str, to: &str) -> Result<(), Error> {
    pay(state, (value.len() + from.len() + to.len()) as u64)?;
    let count = value.matches(from).count();
    check_product(count, to.len())?;
    pay(state, (count * to.len()) as u64)
}

fn indent(state: &mut State<'_, '_>, value: StringInput<'_>, options: Rest<ValueOrKwargs>) -> Result<Value, Error> {
    let options = options.into_values();
    let (width, first, blank, kwargs): (Option<usize>, _, _, Kwargs) = from_args(&options)?;
    let width = width.or(kwargs.get("width")?);
    pay(state, value.as_str().len() as u64)?;
    let n_lines = value.as_str().split('\n').count();
    check_product(n_lines, width.unwrap_or(0))?;
    pay(state, (n_lines * width.unwrap_or(4)) as u64)?;
    filters::indent(value, width, first, blank, kwargs)
}

fn check_stripped(chars: Option<&Value>) -> Result<(), Error> {
    let n_chars = chars.and_then(Value::as_str).map_or(0, |chars| chars.chars().count());
    if n_chars > MAX_STRIPPED_CHARS { Err(too_large()) } else { Ok(()) }
}

/// Python's methods.
fn method(state: &mut State<'_, '_>, value: &Value, name: &str, args: &[Value]) -> Result<Value, Error> {
    pay_for_items(state, value)?;
    for arg in args {
        pay_for_all(state, arg, 1)?;
    }
    match (name, value.as_str()) {
        ("join", Some(joiner)) => {
            let (values,): (&Value,) = from_args(args)?;
            return join(state, values, joiner).map(Value::from);
        }
        ("replace", Some(text)) => {
            if let [from, to, ..] = args {
                pay_for_replacing(state, text, from.as_str().unwrap_or(""), to.as_str().unwrap_or(""))?;
            }
        }
        ("strip" | "lstrip" | "rstrip", Some(_)) => check_stripped(args.first())?,
        ("format", Some(text)) => check_format(state, text, args)?,
        ("count", None) => pay_for_all(state, value, 1)?,
        _ => {}
    }
    let value = unknown_method_callback(state, value, name, args)?;
    let value = if value.kind() == ValueKind::Iterable { settle(state, value)? } else { value };
    pay_for_items(state, &value)?;
    Ok(value)
}

/// Each field of a format may write the longest argument, or blanks up to the largest width.
fn check_format(state: &mut State<'_, '_>, text: &str, args: &[Value]) -> Result<(), Error> {
    let longest = text.split(|c: char| !c.is_ascii_digit()).map(str::len).max();
    if longest > Some(MAX_FORMAT_DIGITS) {
        return Err(too_large());
    }
    let n_fields = text.matches('{').count();
    let mut longest = 10_usize.pow(MAX_FORMAT_DIGITS as u32);
    for arg in args {
        let mut bytes = 0;
        look_through(arg, MAX_DEPTH, WORK_BYTES, &mut bytes)?;
        longest = longest.max(if is_nested(arg) { bytes * WRITING } else { bytes } as usize);
    }
    check_product(n_fields, longest)?;
    pay(state, (n_fields * longest) as u64)
}

/// Collects text up to [`MAX_OUTPUT_BYTES`].
#[derive(Default)]
struct CappedText(String);

impl fmt::Write for CappedText {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        if text.len() > MAX_OUTPUT_BYTES - self.0.len() {
            return Err(fmt::Error);
        }
        self.0.push_str(text);
        Ok(())
    }
}
