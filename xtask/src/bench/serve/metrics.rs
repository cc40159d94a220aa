//! What a coordinator tells at `/metrics`, read as far as the benchmark needs it.
//!
//! The text format of Prometheus: lines `name{label="value",...} number`, and comments. A coordinator that has no such
//! page, or not this metric, makes the number unknown and nothing else fail.

use std::time::Instant;

use crate::http::Endpoint;

/// Seconds that a stage has computed, by its place in the ring.
const BUSY: &str = "brigade_stage_busy_seconds_total";

/// How long each stage had computed at a moment.
#[derive(Debug, Clone)]
pub struct Busy {
    at: Instant,
    /// By stage, in ring order.
    seconds: Vec<f64>,
}

impl Busy {
    /// Asks for it.
    pub fn scrape(endpoint: &Endpoint) -> Option<Self> {
        let text = endpoint.text("/metrics").ok()?;
        let seconds = by_stage(&text);
        (!seconds.is_empty()).then(|| Self { at: Instant::now(), seconds })
    }

    /// The share of the time from `self` to `later` in which each stage computed.
    pub fn shares_until(&self, later: &Self) -> Vec<f64> {
        let seconds = (later.at - self.at).as_secs_f64().max(f64::MIN_POSITIVE);
        self.seconds.iter().zip(&later.seconds).map(|(before, after)| (after - before) / seconds).collect()
    }
}

/// The busy seconds of all stages in ring order.
fn by_stage(text: &str) -> Vec<f64> {
    let mut stages: Vec<(u32, f64)> = text.lines().filter_map(|line| sample(line, BUSY)).collect();
    stages.sort_by_key(|(stage, _)| *stage);
    stages.into_iter().map(|(_, seconds)| seconds).collect()
}

/// The label `stage` and the value of a line, if it is one of `name`.
fn sample(line: &str, name: &str) -> Option<(u32, f64)> {
    let labels = line.strip_prefix(name)?.strip_prefix('{')?;
    let (mut stage, mut rest) = (None, labels);
    loop {
        let (label, value_on) = rest.trim_start_matches(',').split_once("=\"")?;
        let end = end_of_value(value_on)?;
        if label == "stage" {
            stage = value_on[..end].parse().ok();
        }
        rest = &value_on[end + 1..];
        if let Some(value) = rest.trim_start_matches(',').strip_prefix('}') {
            return Some((stage?, value.split_whitespace().next()?.parse().ok()?));
        }
    }
}

/// Where the quotation mark is that ends a value; one behind a backslash does not.
fn end_of_value(text: &str) -> Option<usize> {
    let mut is_escaped = false;
    text.char_indices().find_map(|(at, c)| {
        let ends = c == '"' && !is_escaped;
        is_escaped = c == '\\' && !is_escaped;
        ends.then_some(at)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn stages_are_read_in_ring_order_whatever_names_they_have() {
        let text = "# TYPE brigade_stage_busy_seconds counter\n\
                    brigade_stage_busy_seconds_total{stage=\"1\",node=\"a\\\"},b=\\\\\"} 2.5\n\
                    brigade_stage_busy_seconds_total{node=\"{x}\",stage=\"0\"} 1e1 1395066363000\n\
                    brigade_stage_busy_seconds_total_other{stage=\"7\"} 9\n\
                    brigade_stage_busy_seconds_total{node=\"no stage\"} 9\n\
                    brigade_stage_busy_seconds_total{stage=\"2\",broken\n";
        assert_eq!(by_stage(text), [10.0, 2.5]);
        assert!(by_stage("").is_empty());
    }

    #[test]
    fn shares_are_of_the_time_between() {
        let at = Instant::now();
        let before = Busy { at, seconds: vec![10.0, 2.0] };
        let after = Busy { at: at + Duration::from_secs(4), seconds: vec![13.0, 4.0] };
        assert_eq!(before.shares_until(&after), [0.75, 0.5]);
    }
}
