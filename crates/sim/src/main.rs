//! `brigade-sim`: seeds one by one, many, or without end.

use std::io::Write;
use std::process::ExitCode;
use std::sync::{Mutex, PoisonError};

use brigade_sim::{Report, World, simulate_many};
use clap::Parser;

/// Simulates whole clusters, one for each seed.
#[derive(Debug, Parser)]
#[command(name = "brigade-sim")]
struct Cli {
    /// The first seed
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// How many seeds
    #[arg(long, default_value_t = 1)]
    seeds: u64,
    /// Go on with further seeds until one fails
    #[arg(long)]
    forever: bool,
    /// Threads
    #[arg(long, default_value_t = 2)]
    threads: usize,
    /// Go on behind a seed that fails
    #[arg(long)]
    keep_going: bool,
    /// Say each step of the first seed
    #[arg(long)]
    loud: bool,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    if cli.loud {
        say(&format!("{:#?}", World::new(cli.seed, true).run()));
        return ExitCode::SUCCESS;
    }
    let end = if cli.forever { u64::MAX } else { cli.seed.saturating_add(cli.seeds) };
    let sums = Mutex::new(Sums::default());
    // What goes wrong is told with its seed.
    std::panic::set_hook(Box::new(|_| {}));
    simulate_many(cli.seed..end, cli.threads, |result| {
        let mut sums = sums.lock().unwrap_or_else(PoisonError::into_inner);
        sums.n += 1;
        if sums.n.is_multiple_of(SAY_EACH) {
            say(&format!("{} seeds, {} failed", sums.n, sums.n_failed));
        }
        match result {
            Ok(report) => sums.report.add(&report),
            Err(why) => {
                sums.n_failed += 1;
                say(&why);
                return cli.keep_going;
            }
        }
        true
    });
    let Sums { n, n_failed, report } = sums.into_inner().unwrap_or_else(PoisonError::into_inner);
    say(&format!("{report:#?}\n{n} seeds, {n_failed} failed"));
    if n_failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Seeds between two signs of life.
const SAY_EACH: u64 = 10_000;

#[derive(Default)]
struct Sums {
    n: u64,
    n_failed: u64,
    report: Report,
}

fn say(text: &str) {
    // Whoever reads this may have gone.
    let _ = writeln!(std::io::stdout(), "{text}");
}
