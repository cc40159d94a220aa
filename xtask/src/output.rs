//! Writing for people: lines, running text and tables on standard output, complaints on standard error.

use std::io::{self, Write};

use crate::failure::Outcome;

/// Writes a line at once.
pub fn line(text: impl std::fmt::Display) -> Outcome {
    let mut out = io::stdout().lock();
    writeln!(out, "{text}")?;
    Ok(out.flush()?)
}

/// Writes text without a line's end at once.
pub fn text(text: &str) -> Outcome {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    Ok(out.flush()?)
}

/// Writes a line to standard error; nobody can be told if that fails.
pub fn error(text: &str) {
    let _ = writeln!(io::stderr().lock(), "{text}");
}

/// Writes rows in columns as wide as their widest cell. The first column is aligned to the left, the others are to the
/// right.
pub fn table(rows: &[Vec<String>]) -> Outcome {
    line(columns(rows))
}

fn columns(rows: &[Vec<String>]) -> String {
    let n_columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| {
        rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..n_columns).map(width).collect();
    let lines = rows.iter().map(|row| {
        let cells = row.iter().zip(&widths).enumerate().map(|(column, (cell, &width))| match column {
            0 => format!("{cell:<width$}"),
            _ => format!("{cell:>width$}"),
        });
        cells.collect::<Vec<_>>().join("  ").trim_end().to_owned()
    });
    lines.collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned_and_rows_may_be_short() {
        let rows =
            [vec!["node".to_owned(), "ms".to_owned()], vec!["a".to_owned(), "0.25".to_owned()], vec!["b".into()]];
        assert_eq!(columns(&rows), "node    ms\na     0.25\nb");
        assert_eq!(columns(&[]), "");
    }
}
