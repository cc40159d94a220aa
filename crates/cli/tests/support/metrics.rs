//! What `/metrics` shows, read as strictly as a scraper of OpenMetrics does: text that it would not take fails the
//! test.

use std::collections::{HashMap, HashSet};

/// One line with a number.
#[derive(Debug, Clone, PartialEq)]
struct Sample {
    name: String,
    labels: Vec<(String, String)>,
    value: f64,
}

/// All numbers at one moment.
#[derive(Debug, Clone)]
pub struct Metrics {
    /// Names that were told of, also those without numbers yet.
    families: HashSet<String>,
    samples: Vec<Sample>,
}

impl Metrics {
    /// Reads a whole exposition.
    #[track_caller]
    pub fn parse(text: &str) -> Self {
        let body = text.strip_suffix("# EOF\n").unwrap_or_else(|| panic!("no end mark in {text:?}"));
        let mut kinds: HashMap<&str, &str> = HashMap::new();
        let mut family = "";
        let mut samples: Vec<Sample> = Vec::new();
        for line in body.lines() {
            if let Some(about) = line.strip_prefix("# ") {
                let words: Vec<&str> = about.splitn(3, ' ').collect();
                match words[..] {
                    ["HELP", name, help] => assert!(is_name(name) && !help.is_empty(), "{line:?}"),
                    ["TYPE", name, kind @ ("counter" | "gauge" | "histogram" | "info")] => {
                        assert!(is_name(name) && kinds.insert(name, kind).is_none(), "told twice: {line:?}");
                        family = name;
                    }
                    _ => panic!("neither help nor type: {line:?}"),
                }
                continue;
            }
            let sample = Sample::parse(line);
            let suffix = sample.name.strip_prefix(family).unwrap_or_else(|| panic!("{line:?} is not of {family:?}"));
            let suffixes: &[&str] = match kinds[family] {
                "counter" => &["_total"],
                "gauge" => &[""],
                "info" => &["_info"],
                _ => &["_bucket", "_count", "_sum"],
            };
            assert!(suffixes.contains(&suffix), "{line:?} of a {}", kinds[family]);
            assert!(kinds[family] == "gauge" || sample.value >= 0.0, "{line:?}");
            let is_same = |other: &Sample| other.name == sample.name && other.labels == sample.labels;
            assert!(!samples.iter().any(is_same), "twice: {line:?}");
            samples.push(sample);
        }
        let metrics = Self { families: kinds.keys().map(ToString::to_string).collect(), samples };
        kinds.iter().filter(|(_, kind)| **kind == "histogram").for_each(|(name, _)| metrics.check_histogram(name));
        metrics
    }

    /// Buckets hold each other, and the last one holds all.
    #[track_caller]
    fn check_histogram(&self, name: &str) {
        let (mut last, mut series) = (0.0, Vec::new());
        for sample in self.samples.iter().filter(|sample| sample.name == format!("{name}_bucket")) {
            let (bounds, labels): (Vec<_>, Vec<_>) = sample.labels.iter().cloned().partition(|(key, _)| key == "le");
            if labels != series {
                (last, series) = (0.0, labels);
            }
            assert!(sample.value >= last, "{sample:?} after {last}");
            last = sample.value;
            if bounds[0].1 == "+Inf" {
                let labels: Vec<(&str, &str)> = series.iter().map(|(key, value)| (&key[..], &value[..])).collect();
                assert_eq!(last, self.of(&format!("{name}_count"), &labels), "{sample:?}");
                last = 0.0;
            }
        }
    }

    /// Whether anything is told of this: counters with labels are not there before they count.
    pub fn tells(&self, family: &str) -> bool {
        self.families.contains(&format!("brigade_{family}"))
    }

    /// A number, added up over all labels. The prefix of the project is put before the name.
    #[track_caller]
    pub fn get(&self, name: &str) -> f64 {
        self.of(&format!("brigade_{name}"), &[])
    }

    /// A number with these labels, added up over others.
    #[track_caller]
    pub fn labelled(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        self.of(&format!("brigade_{name}"), labels)
    }

    #[track_caller]
    fn of(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        let family = ["_total", "_info", "_bucket", "_count", "_sum"].iter().find_map(|end| name.strip_suffix(end));
        assert!([Some(name), family].into_iter().flatten().any(|f| self.families.contains(f)), "there is no {name}");
        let has = |sample: &Sample, (key, value): &(&str, &str)| {
            sample.labels.iter().any(|(other_key, other)| other_key == key && other == value)
        };
        let found =
            self.samples.iter().filter(|sample| sample.name == name && labels.iter().all(|label| has(sample, label)));
        found.map(|sample| sample.value).sum()
    }
}

fn is_name(text: &str) -> bool {
    text.starts_with("brigade_") && text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_')
}

impl Sample {
    #[track_caller]
    fn parse(line: &str) -> Self {
        let bad = || -> ! { panic!("not a sample: {line:?}") };
        let (series, value) = line.rsplit_once(' ').unwrap_or_else(|| bad());
        let value = value.parse().unwrap_or_else(|_| bad());
        let (name, labels) = match series.split_once('{') {
            Some((name, labels)) => (name, labels.strip_suffix('}').unwrap_or_else(|| bad())),
            None => (series, ""),
        };
        // No test gives names with commas or quotes.
        let label = |text: &str| {
            let (key, value) = text.split_once('=').unwrap_or_else(|| bad());
            let value = value.strip_prefix('"').and_then(|value| value.strip_suffix('"')).unwrap_or_else(|| bad());
            (key.to_owned(), value.to_owned())
        };
        let labels = labels.split(',').filter(|text| !text.is_empty()).map(label).collect();
        if !is_name(name) {
            bad();
        }
        Self { name: name.to_owned(), labels, value }
    }
}
