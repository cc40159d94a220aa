//! Numbers and names in words, as all that is said about plans has them.

use brigade_base::ByteSize;

/// Most names in a list.
const MAX_NAMES: usize = 6;

/// Below this difference two numbers are the same.
const SAME: f64 = 1.02;

/// From this factor on people say "2.1x" and not "110 %".
const SAID_AS_FACTOR: f64 = 1.5;

/// A number with two significant digits.
pub fn figure(value: f64) -> String {
    if !value.is_finite() || value <= 0.0 {
        return "0".to_owned();
    }
    // Rounded first, so that 9.96 becomes 10 and not 10.0.
    let unit = 10f64.powi(value.log10().floor() as i32 - 1);
    let rounded = (value / unit).round() * unit;
    let digits = (1 - rounded.log10().floor() as i32).max(0) as usize;
    format!("{rounded:.digits$}")
}

/// A time with two significant digits, in the unit that people would use.
pub fn seconds(value: f64) -> String {
    match value {
        s if s < 0.000_999_5 => format!("{} us", figure(s * 1e6)),
        s if s < 0.999_5 => format!("{} ms", figure(s * 1e3)),
        s if s < 119.5 => format!("{} s", figure(s)),
        s if s < 7_200.0 => format!("{} min", figure(s / 60.0)),
        s => format!("{} h", figure(s / 3600.0)),
    }
}

/// A size that is written no smaller than it is, so that whoever gives as much as is written gives enough.
pub(crate) fn at_least(size: ByteSize) -> String {
    let unit = (1..=4u32).rev().map(|k| 1u64 << (10 * k)).find(|unit| size.0 >= *unit);
    let Some(tenth) = unit.map(|unit| unit as f64 / 10.0) else { return size.to_string() };
    ByteSize(((size.0 as f64 / tenth).ceil() * tenth).ceil() as u64).to_string()
}

/// A share as whole percent.
pub(crate) fn percent(share: f64) -> String {
    format!("{:.0} %", share * 100.0)
}

/// Names as in a sentence; long lists are cut.
pub fn listed(names: &[&str]) -> String {
    match names {
        [] => "nothing".to_owned(),
        [one] => (*one).to_owned(),
        many if many.len() > MAX_NAMES => {
            format!("{} and {} more", many[..MAX_NAMES - 1].join(", "), many.len() + 1 - MAX_NAMES)
        }
        [first @ .., last] => format!("{} and {last}", first.join(", ")),
    }
}

/// How much faster the new rate is, as "2.1x faster" or "31 % slower".
pub(crate) fn change(new: f64, old: f64) -> String {
    let factor = new / old;
    match factor {
        f if f >= SAID_AS_FACTOR => format!("{}x faster", figure(f)),
        f if f >= SAME => format!("{} faster", percent(f - 1.0)),
        f if f > 1.0 / SAME => "as fast".to_owned(),
        f if f > 1.0 / SAID_AS_FACTOR => format!("{} slower", percent(1.0 - f)),
        f => format!("{}x slower", figure(1.0 / f)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_for_people() {
        let figures = [0.0, 0.0123, 0.99, 0.999, 1.0, 7.449, 9.96, 14.6, 99.6, 163.0, 12_345.0].map(figure);
        assert_eq!(figures, ["0", "0.012", "0.99", "1.0", "1.0", "7.4", "10", "15", "100", "160", "12000"]);
        let times = [0.000_012, 0.012, 0.98, 1.5, 90.0, 600.0, 36_000.0].map(seconds);
        assert_eq!(times, ["12 us", "12 ms", "980 ms", "1.5 s", "90 s", "10 min", "10 h"]);
        let changes = [2.1, 1.31, 1.01, 0.69, 0.25].map(|new| change(new, 1.0));
        assert_eq!(changes, ["2.1x faster", "31 % faster", "as fast", "31 % slower", "4.0x slower"]);
    }

    #[test]
    fn sizes_are_rounded_up() {
        let gib = 1u64 << 30;
        let sizes = [0, 1023, 1024, 1025, gib, gib + 1, 23 * gib + gib / 25].map(|n| at_least(ByteSize(n)));
        assert_eq!(sizes, ["0 B", "1023 B", "1.0 KiB", "1.1 KiB", "1.0 GiB", "1.1 GiB", "23.1 GiB"]);
        for n in (0..2000u64).map(|k| 3 * gib + k * 997_003) {
            let written: ByteSize = at_least(ByteSize(n)).replace(' ', "").parse().unwrap();
            assert!(written.0 >= n && written.0 <= n + gib / 10 + 1, "{n}: {written}");
        }
    }

    #[test]
    fn long_lists_of_names_are_cut() {
        assert_eq!(listed(&["a"]), "a");
        assert_eq!(listed(&["a", "b", "c"]), "a, b and c");
        assert_eq!(listed(&["a", "b", "c", "d", "e", "f", "g", "h"]), "a, b, c, d, e and 3 more");
    }
}
