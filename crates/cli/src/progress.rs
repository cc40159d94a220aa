//! Progress bars on standard error; silent where nobody looks.

use std::collections::HashMap;
use std::time::Duration;

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

/// How often what runs in the background is looked at.
pub const POLL: Duration = Duration::from_millis(50);

/// Bars by name, each from 0 to 1.
pub struct Bars {
    all: MultiProgress,
    bars: HashMap<String, ProgressBar>,
}

/// Steps of a bar.
const STEPS: u64 = 1000;

impl Bars {
    /// No bars yet.
    pub fn new() -> Self {
        Self { all: MultiProgress::new(), bars: HashMap::new() }
    }

    /// Moves the bar of this name, which appears with its first move and goes when it is full.
    pub fn set(&mut self, name: &str, share: f32) {
        if share >= 1.0 {
            if let Some(bar) = self.bars.remove(name) {
                bar.finish_and_clear();
            }
            return;
        }
        let bar = self.bars.entry(name.to_owned()).or_insert_with(|| {
            let bar = self.all.add(ProgressBar::new(STEPS));
            let style = ProgressStyle::with_template("{msg:30} [{bar:40}] {percent:>3} %");
            bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
            bar.set_message(name.to_owned());
            bar
        });
        bar.set_position((share.max(0.0) * STEPS as f32) as u64);
    }

    /// Removes all bars.
    pub fn clear(&mut self) {
        self.bars.drain().for_each(|(_, bar)| bar.finish_and_clear());
    }
}
