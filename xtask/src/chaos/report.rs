//! What a test of faults has found, as a table and as JSON.

use std::time::Duration;

use brigade_base::ByteSize;
use serde::Serialize;

use super::callers::Tally;
use super::faults::{KINDS, Kind};
use crate::bench::quantile;
use crate::failure::{Failure, Outcome};
use crate::output::{line, table};

/// Longest pause after `kill -9` of a worker, in milliseconds, that 95 of 100 may have: with a second holder of each
/// stage, and without.
const TARGET_MS: [(u32, f64); 2] = [(2, 1000.0), (1, 3000.0)];

/// How much more memory of its own a coordinator may have after all faults than after the first ones: what its
/// allocator keeps, and its traces of the last requests.
const MAX_GROWTH: u64 = 64 << 20;

/// How many more files it may have open: those of nodes that are just coming.
const MAX_MORE_FILES: usize = 16;

/// What one fault did.
#[derive(Debug, Clone, Serialize)]
pub struct Record {
    /// What it was.
    pub kind: Kind,
    /// Whether a worker with a stage was among those that it befell.
    pub hits_stage: bool,
    /// From the fault until a stream or the status told of it, where there was something to notice.
    pub detected_ms: Option<f64>,
    /// The longest time without a token of any caller until all was well again.
    pub pause_ms: f64,
    /// From the fault until all was well again, all nodes and those that stand by counted.
    pub settled_ms: f64,
}

impl Record {
    /// A line for whoever watches.
    pub fn words(&self, victims: &str) -> String {
        let of = if victims.is_empty() { String::new() } else { format!(" of {victims}") };
        let idle = if victims.is_empty() || self.hits_stage { "" } else { " without a stage" };
        let noticed = self.detected_ms.map_or(String::new(), |ms| format!("detected after {ms:.0} ms, "));
        let (pause, settled) = (self.pause_ms, self.settled_ms / 1000.0);
        format!("{}{of}{idle}: {noticed}pause {pause:.0} ms, settled after {settled:.1} s", self.kind)
    }
}

/// What the coordinator holds of the machine.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Footprint {
    /// Resident memory of its own, in bytes.
    pub bytes: u64,
    /// Open files.
    pub files: usize,
}

/// All that was found.
#[derive(Debug, Serialize)]
pub struct Report {
    /// What all was drawn from.
    pub seed: u64,
    /// Holders of each stage.
    pub redundancy: u32,
    /// Whether those that stand by computed along.
    pub shadow: bool,
    /// Each fault.
    pub records: Vec<Record>,
    /// What became of the answers.
    pub answers: Tally,
    /// What the coordinator held after the first faults and at the end.
    pub footprints: Vec<Footprint>,
    /// Sessions that were left when nobody asked any more.
    pub sessions_left: u64,
}

/// In milliseconds.
pub fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}

impl Report {
    /// Prints all of it.
    pub fn print(&self, json: bool) -> Outcome {
        if json {
            return line(serde_json::to_string_pretty(self).map_err(Failure::said)?);
        }
        table(&self.rows())?;
        line("")?;
        let Tally { whole, wrong, lost, tokens } = self.answers;
        line(format_args!("answers    {whole} whole ({tokens} tokens), {wrong} wrong, {lost} lost"))?;
        if let Some((before, after)) = self.ends() {
            line(format_args!(
                "left over  {} sessions; coordinator's memory {} -> {}, open files {} -> {}",
                self.sessions_left,
                ByteSize(before.bytes),
                ByteSize(after.bytes),
                before.files,
                after.files
            ))?;
        }
        if let (Some(pause), Some((_, target))) = (self.pause_after_kill(), self.target()) {
            let verdict = if pause <= target { "met" } else { "missed" };
            let what = format!("pause after kill {pause:.0} ms at p95, at most {target:.0} ms wanted: {verdict}");
            line(format_args!("target     {what}"))?;
        }
        line(format_args!(
            "run        --seed {} --redundancy {}{}",
            self.seed,
            self.redundancy,
            if self.shadow { " --shadow" } else { "" }
        ))
    }

    /// Why the test has failed: times are measured, but nothing may be lost, wrong or left over.
    pub fn failure(&self) -> Option<String> {
        let Tally { whole, wrong, lost, .. } = self.answers;
        if wrong > 0 || lost > 0 {
            return Some(format!("{wrong} answers were wrong and {lost} were lost (seed {})", self.seed));
        }
        if whole == 0 {
            return Some("no answer came to its end".to_owned());
        }
        if self.sessions_left > 0 {
            return Some(format!("{} sessions are left although nobody asks", self.sessions_left));
        }
        let (before, after) = self.ends()?;
        let grows = after.bytes > before.bytes + MAX_GROWTH || after.files > before.files + MAX_MORE_FILES;
        grows.then(|| format!("the coordinator leaks: {before:?} became {after:?}"))
    }

    fn ends(&self) -> Option<(Footprint, Footprint)> {
        Some((*self.footprints.first()?, *self.footprints.last()?))
    }

    fn target(&self) -> Option<(u32, f64)> {
        TARGET_MS.into_iter().find(|(redundancy, _)| *redundancy == self.redundancy)
    }

    fn pause_after_kill(&self) -> Option<f64> {
        let kills = || self.records.iter().filter(|record| record.kind == Kind::Kill && record.hits_stage);
        kills().next().map(|_| quantile(kills().map(|record| record.pause_ms), 0.95))
    }

    fn rows(&self) -> Vec<Vec<String>> {
        let head = ["fault", "n", "detected p50, ms", "p95", "pause p50, ms", "p95", "longest", "settled p50, s"];
        let mut rows = vec![head.map(str::to_owned).to_vec()];
        for (kind, _) in KINDS {
            let is_meant = |record: &Record| record.kind == kind && (record.hits_stage || kind == Kind::Nothing);
            rows.extend(self.row(kind.name(), is_meant));
        }
        rows.extend(self.row("all of these", |record| record.hits_stage));
        rows.extend(self.row("without a stage", |record| !record.hits_stage && record.kind != Kind::Nothing));
        rows
    }

    fn row(&self, name: &str, is_meant: impl Fn(&Record) -> bool) -> Option<Vec<String>> {
        let records: Vec<&Record> = self.records.iter().filter(|record| is_meant(record)).collect();
        if records.is_empty() {
            return None;
        }
        let at = |values: &[f64], q: f64| match values {
            [] => "-".to_owned(),
            _ => format!("{:.0}", quantile(values.iter().copied(), q)),
        };
        let detected: Vec<f64> = records.iter().filter_map(|record| record.detected_ms).collect();
        let pauses: Vec<f64> = records.iter().map(|record| record.pause_ms).collect();
        let settled = quantile(records.iter().map(|record| record.settled_ms / 1000.0), 0.5);
        Some(vec![
            name.to_owned(),
            records.len().to_string(),
            at(&detected, 0.5),
            at(&detected, 0.95),
            at(&pauses, 0.5),
            at(&pauses, 0.95),
            at(&pauses, 1.0),
            format!("{settled:.1}"),
        ])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(answers: Tally, footprints: &[(u64, usize)], sessions_left: u64) -> Report {
        let record = |kind, detected_ms, pause_ms| {
            let hits_stage = pause_ms >= 10.0;
            Record { kind, hits_stage, detected_ms, pause_ms, settled_ms: 1500.0 }
        };
        Report {
            seed: 7,
            redundancy: 2,
            shadow: false,
            records: vec![
                record(Kind::Nothing, None, 9.0),
                record(Kind::Kill, Some(2.0), 100.0),
                record(Kind::Kill, Some(4.0), 300.0),
                record(Kind::Kill, Some(8.0), 1.0),
                record(Kind::Leave, None, 20.0),
            ],
            answers,
            footprints: footprints.iter().map(|(bytes, files)| Footprint { bytes: *bytes, files: *files }).collect(),
            sessions_left,
        }
    }

    #[test]
    fn each_kind_that_occurred_has_a_row() {
        let rows = report(Tally::default(), &[], 0).rows();
        let row = |name: &str| rows.iter().find(|row| row[0] == name).unwrap()[1..].join(" ");
        assert_eq!(rows.len(), 6);
        assert_eq!(row("nothing"), "1 - - 9 9 9 1.5");
        assert_eq!(row("kill"), "2 3 4 200 290 300 1.5");
        assert_eq!(row("all of these"), "3 3 4 100 280 300 1.5");
        assert_eq!(row("without a stage"), "1 8 8 1 1 1 1.5");
    }

    #[test]
    fn only_what_is_lost_wrong_or_left_over_is_a_failure() {
        let tally = |whole, wrong, lost| Tally { whole, wrong, lost, tokens: 1 };
        let failure = |answers, footprints: &[_], left| report(answers, footprints, left).failure();
        assert_eq!(failure(tally(9, 0, 0), &[(1 << 20, 30), (2 << 20, 31)], 0), None);
        for (failure, words) in [
            (failure(tally(9, 1, 0), &[], 0), "1 answers were wrong and 0 were lost (seed 7)"),
            (failure(tally(9, 0, 2), &[], 0), "2 were lost"),
            (failure(tally(0, 0, 0), &[], 0), "no answer"),
            (failure(tally(9, 0, 0), &[], 1), "1 sessions are left"),
            (failure(tally(9, 0, 0), &[(0, 30), (1 << 30, 30)], 0), "leaks"),
            (failure(tally(9, 0, 0), &[(0, 30), (0, 300)], 0), "leaks"),
        ] {
            assert!(failure.as_ref().unwrap().contains(words), "{failure:?}");
        }
    }
}
