//! Puts checks between the engine's instructions.
//!
//! The engine counts instructions, but one of them may double a text or compare two long ones. So a compiled template
//! is not run as it is: [`guarded`] copies it, and before each instruction whose work depends on the size of its
//! operands comes a call that looks at them, and pays for the work or fails (see [`super::bounds`]).
//!
//! ```text
//! LoadConst, Lookup, Add    becomes    LoadConst, Lookup, CallFunction(":add"), UnpackList(2), Add
//! ```
//!
//! The check takes the operands from the stack and gives them back as a tuple, which is unpacked again. Its name has a
//! colon, so that no template can name it. Jumps lead to the checks of the instruction that they led to. Instructions
//! that are not known here are refused, so that a new version of the engine brings nothing unseen.

use std::collections::BTreeMap;

use minijinja::machinery::{
    CompiledTemplate, Instruction, Instructions, eval, get_compiled_template, make_string_output,
};
use minijinja::value::ValueKind;
use minijinja::{AutoEscape, Environment, Error, ErrorKind, Value};

/// The names of all checks.
pub(crate) mod checks {
    pub const ADD: &str = ":add";
    pub const MULTIPLY: &str = ":multiply";
    pub const CONCATENATE: &str = ":concatenate";
    pub const COMPARE: &str = ":compare";
    /// One comparison of several in a chain, of any kind.
    pub const COMPARE_ANY: &str = ":compare_any";
    pub const CONTAINS: &str = ":contains";
    /// Keys and values of a map, in turns.
    pub const MAP: &str = ":map";
    pub const ITEM: &str = ":item";
    /// Not a check: what the engine does, done here.
    pub const SLICE: &str = ":slice";
    pub const SET: &str = ":set";
    /// A filter: what is iterated over or unpacked.
    pub const ITERATE: &str = ":iterate";
    /// A filter: a lazy sequence becomes a list.
    pub const SETTLE: &str = ":settle";
}

/// Says to the engine that a filter is not to be remembered by number.
const NO_LOCAL_ID: u8 = !0;

/// Runs the template `name` with checks; what it wrote.
///
/// # Errors
/// Those of the template, of the checks, and if it uses what is not supported.
pub(crate) fn render(environment: &Environment<'_>, name: &str, context: Value) -> Result<String, Error> {
    let template = environment.get_template(name)?;
    let compiled = get_compiled_template(&template);
    let instructions = guarded(compiled)?;
    let mut text = String::new();
    let blocks = BTreeMap::new();
    eval(environment, &instructions, context, &blocks, &mut make_string_output(&mut text), AutoEscape::None)?;
    Ok(text)
}

/// Fails if the template `name` uses what is not supported.
///
/// # Errors
/// If it does, or there is none.
pub(crate) fn check(environment: &Environment<'_>, name: &str) -> Result<(), Error> {
    guarded(get_compiled_template(&environment.get_template(name)?)).map(drop)
}

/// The template with checks.
fn guarded<'a>(compiled: &CompiledTemplate<'a>) -> Result<Instructions<'a>, Error> {
    if !compiled.blocks.is_empty() {
        return Err(unsupported("blocks"));
    }
    let old = &compiled.instructions;
    let mut steps = Vec::new();
    let mut starts = Vec::new();
    for index in 0.. {
        starts.push(steps.len() as u32);
        let Some(instruction) = old.get(index) else { break };
        let first = steps.len();
        with_checks(instruction, |step| steps.push((index, step)))?;
        debug_assert!(steps.len() > first, "each instruction becomes at least one");
    }
    let moved = |target: u32| starts.get(target as usize).copied().unwrap_or(u32::MAX);
    let mut new = Instructions::new(old.name(), old.source());
    for (index, step) in steps {
        let step = match step {
            Instruction::Iterate(target) => Instruction::Iterate(moved(target)),
            Instruction::Jump(target) => Instruction::Jump(moved(target)),
            Instruction::JumpIfFalse(target) => Instruction::JumpIfFalse(moved(target)),
            Instruction::JumpIfFalseOrPop(target) => Instruction::JumpIfFalseOrPop(moved(target)),
            Instruction::JumpIfTrueOrPop(target) => Instruction::JumpIfTrueOrPop(moved(target)),
            Instruction::BuildMacro(name, target, flags) => Instruction::BuildMacro(name, moved(target), flags),
            step => step,
        };
        match (old.get_span(index), old.get_line(index)) {
            (Some(span), _) => new.add_with_span(step, span),
            (None, Some(line)) => new.add_with_line(step, u16::try_from(line).unwrap_or(u16::MAX)),
            (None, None) => new.add(step),
        };
    }
    Ok(new)
}

/// Puts `instruction` with its checks.
fn with_checks<'a>(instruction: &Instruction<'a>, mut put: impl FnMut(Instruction<'a>)) -> Result<(), Error> {
    use Instruction as I;
    let operands = |name, n: u16, put: &mut dyn FnMut(Instruction<'a>)| {
        put(I::CallFunction(name, Some(n)));
        put(I::UnpackList(n.into()));
    };
    let filter = |name| I::ApplyFilter(name, Some(1), NO_LOCAL_ID);
    match instruction {
        // Text of the template may be written into a variable as well, so it is paid for like any other.
        I::EmitRaw(text) => {
            put(I::LoadConst(Value::from(*text)));
            put(I::Emit);
            return Ok(());
        }
        // What is computed when the template is compiled may be a lazy sequence too.
        I::LoadConst(value) if value.kind() == ValueKind::Iterable => {
            put(I::LoadConst(value.try_iter()?.collect::<Vec<_>>().into()));
            return Ok(());
        }
        I::BuildMap(n) if *n > 0 => {
            let n = u16::try_from(2 * n).map_err(|_| unsupported("maps of so many keys"))?;
            operands(checks::MAP, n, &mut put);
        }
        I::Add => operands(checks::ADD, 2, &mut put),
        I::Mul => operands(checks::MULTIPLY, 2, &mut put),
        I::StringConcat => operands(checks::CONCATENATE, 2, &mut put),
        I::Eq | I::Ne | I::Gt | I::Gte | I::Lt | I::Lte => operands(checks::COMPARE, 2, &mut put),
        I::In => operands(checks::CONTAINS, 2, &mut put),
        I::CompareAndPreserve(_) => operands(checks::COMPARE_ANY, 2, &mut put),
        I::GetItem => operands(checks::ITEM, 2, &mut put),
        I::SetAttr(_) => operands(checks::SET, 2, &mut put),
        // The engine reads beyond the end of an empty text or list.
        I::Slice => {
            put(I::CallFunction(checks::SLICE, Some(4)));
            return Ok(());
        }
        I::PushLoop(_) | I::UnpackList(_) | I::FastRecurse | I::CallFunction("loop", Some(1)) => {
            put(filter(checks::ITERATE));
        }
        I::CallFunction("super", _) => return Err(unsupported("super()")),
        I::CallMethod("cycle" | "changed", _) => return Err(unsupported("loop.cycle and loop.changed")),
        I::UnpackLists(_) | I::MergeKwargs(_) => return Err(unsupported("* and ** before an argument")),
        known if is_bounded(known) => {}
        _ => return Err(unsupported("include, import, extends, block and autoescape")),
    }
    let is_lazy = matches!(instruction, I::Add | I::Mul);
    put(instruction.clone());
    if is_lazy {
        put(filter(checks::SETTLE));
    }
    Ok(())
}

/// Whether an instruction does the same work whatever its operands are, or is bounded by other means: calls by those
/// who are called, sequences of what is on the stack by how it came there.
fn is_bounded(instruction: &Instruction<'_>) -> bool {
    use Instruction as I;
    matches!(
        instruction,
        I::StoreLocal(_)
            | I::Lookup(_)
            | I::GetAttr(_)
            | I::LoadConst(_)
            | I::BuildMap(_)
            | I::BuildKwargs(_)
            | I::BuildList(_)
            | I::BuildTuple(_)
            | I::Sub
            | I::Div
            | I::IntDiv
            | I::Rem
            | I::Pow
            | I::Neg
            | I::Not
            | I::ApplyFilter(..)
            | I::PerformTest(..)
            | I::Emit
            | I::PushWith
            | I::Iterate(_)
            | I::PushDidNotIterate
            | I::PopFrame
            | I::PopLoopFrame
            | I::Jump(_)
            | I::JumpIfFalse(_)
            | I::JumpIfFalseOrPop(_)
            | I::JumpIfTrueOrPop(_)
            | I::BeginCapture(_)
            | I::EndCapture
            | I::CallFunction(..)
            | I::CallMethod(..)
            | I::CallObject(_)
            | I::DupTop
            | I::DiscardTop
            | I::Swap
            | I::BuildMacro(..)
            | I::Return
            | I::IsUndefined
            | I::Enclose(_)
            | I::GetClosure
    )
}

fn unsupported(what: &str) -> Error {
    Error::new(ErrorKind::SyntaxError, format!("not supported: {what}"))
}
