//! A wave: as many requests at once as there are streams, each with a prompt of its own, from a common start to the
//! last answer's end. And what a wave tells.

use std::sync::Barrier;
use std::time::{Duration, Instant};

use super::stats::mean;
use super::target::{Answer, Target};
use crate::endpoint::EndpointError;

/// What became of the requests of a wave.
#[derive(Debug)]
pub struct Wave {
    /// When all were sent.
    started: Instant,
    /// Answers that came to their end and have a token.
    pub answers: Vec<Answer>,
    /// What became of the others.
    pub failures: Vec<Broken>,
    /// Tokens of a prompt where the endpoint does not tell with its answer.
    prompt_tokens: Option<u32>,
}

/// A request that brought no answer.
#[derive(Debug, thiserror::Error)]
pub enum Broken {
    /// It failed.
    #[error(transparent)]
    Endpoint(#[from] EndpointError),
    /// It succeeded with nothing.
    #[error("the answer has no token")]
    Empty,
    /// The thread that asked has gone.
    #[error("the request was not made")]
    Lost,
}

/// Sends one request for each prompt at the same moment and waits for all. `prompt_tokens` is what a prompt has where
/// the endpoint does not tell.
pub fn run(target: &Target, prompts: &[String], n_tokens: u32, prompt_tokens: Option<u32>) -> Wave {
    let all_are_here = Barrier::new(prompts.len());
    let ask = |prompt: &str| -> Result<Answer, Broken> {
        all_are_here.wait();
        let answer = target.answer(prompt, n_tokens)?;
        if answer.n_tokens() == 0 { Err(Broken::Empty) } else { Ok(answer) }
    };
    let asked = Instant::now();
    let results: Vec<_> = std::thread::scope(|scope| {
        let threads: Vec<_> = prompts.iter().map(|prompt| scope.spawn(|| ask(prompt))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap_or(Err(Broken::Lost))).collect()
    });
    let mut wave = Wave { started: asked, answers: Vec::new(), failures: Vec::new(), prompt_tokens };
    for result in results {
        match result {
            Ok(answer) => wave.answers.push(answer),
            Err(failure) => wave.failures.push(failure),
        }
    }
    // Threads took a while to start; the first request that was sent begins the wave.
    wave.started = wave.answers.iter().map(|answer| answer.sent).min().unwrap_or(asked);
    wave
}

/// Milliseconds.
fn ms(time: Duration) -> f64 {
    1000.0 * time.as_secs_f64()
}

/// `n` in some time; `None` where there is no time, since all came at once.
fn rate(n: f64, time: Duration) -> Option<f64> {
    (!time.is_zero() && n > 0.0).then(|| n / time.as_secs_f64())
}

impl Wave {
    /// Times to first token, in milliseconds.
    pub fn first_token_ms(&self) -> Vec<f64> {
        self.answers.iter().map(|answer| ms(answer.time_to_first_token())).collect()
    }

    /// Times per output token, one for each answer, in milliseconds.
    pub fn output_token_ms(&self) -> Vec<f64> {
        self.answers.iter().filter_map(Answer::time_per_output_token).map(ms).collect()
    }

    /// Times from each chunk to the next, in milliseconds.
    pub fn gap_ms(&self) -> Vec<f64> {
        self.answers.iter().flat_map(|answer| answer.chunks.windows(2).map(|two| ms(two[1] - two[0]))).collect()
    }

    /// Tokens of all answers.
    fn n_tokens(&self) -> f64 {
        self.answers.iter().map(|answer| f64::from(answer.n_tokens())).sum()
    }

    fn first(&self) -> Option<Instant> {
        self.answers.iter().map(Answer::first).min()
    }

    fn end(&self) -> Option<Instant> {
        self.answers.iter().map(|answer| answer.end).max()
    }

    /// From the start to the last answer's end, in seconds.
    pub fn seconds(&self) -> Option<f64> {
        Some((self.end()? - self.started).as_secs_f64())
    }

    /// Tokens that came after the first one of the wave, per second until the last.
    pub fn decode_rate(&self) -> Option<f64> {
        rate(self.n_tokens() - 1.0, self.end()? - self.first()?)
    }

    /// Tokens per second of a stream after its first token, as the streams' mean.
    pub fn stream_rate(&self) -> Option<f64> {
        let rates = self.answers.iter().filter_map(Answer::time_per_output_token);
        mean(&rates.filter_map(|time| rate(1.0, time)).collect::<Vec<_>>())
    }

    /// Tokens per second from the start, prompts and waiting included.
    pub fn end_to_end_rate(&self) -> Option<f64> {
        rate(self.n_tokens(), self.end()? - self.started)
    }

    /// Prompt tokens per second until every stream has its first token.
    pub fn prompt_rate(&self) -> Option<f64> {
        let tokens: Option<Vec<f64>> = self.answers.iter().map(|answer| self.prompt_tokens_of(answer)).collect();
        let last_first = self.answers.iter().map(Answer::first).max()?;
        rate(tokens?.iter().sum(), last_first - self.started)
    }

    /// Tokens of each prompt, as far as that is known.
    pub fn prompt_tokens(&self) -> Vec<f64> {
        self.answers.iter().filter_map(|answer| self.prompt_tokens_of(answer)).collect()
    }

    fn prompt_tokens_of(&self, answer: &Answer) -> Option<f64> {
        answer.usage.prompt.or(self.prompt_tokens).map(f64::from)
    }

    /// Tokens of each prompt that were in a cache, where the endpoint tells.
    pub fn cached_tokens(&self) -> Vec<f64> {
        self.answers.iter().filter_map(|answer| answer.usage.cached).map(f64::from).collect()
    }

    /// Tokens of each answer.
    pub fn answer_tokens(&self) -> Vec<f64> {
        self.answers.iter().map(|answer| f64::from(answer.n_tokens())).collect()
    }
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use crate::bench::target::Usage;

    /// A wave of answers with one token per chunk, given as the milliseconds at which chunks came; prompts have 100
    /// tokens.
    pub fn wave(answers: &[&[u64]]) -> Wave {
        let started = Instant::now();
        let answer = |chunks: &&[u64]| {
            let chunks: Vec<_> = chunks.iter().map(|ms| started + Duration::from_millis(*ms)).collect();
            let end = *chunks.last().unwrap();
            let usage = Usage { completion: u32::try_from(chunks.len()).ok(), ..Usage::default() };
            Answer { sent: started, chunks, end, usage }
        };
        let answers = answers.iter().map(answer).collect();
        Wave { started, answers, failures: Vec::new(), prompt_tokens: Some(100) }
    }

    #[test]
    fn one_stream_has_the_same_rate_alone_and_in_all() {
        let wave = wave(&[&[500, 600, 700, 1000]]);
        assert_eq!(wave.first_token_ms(), [500.0]);
        assert_eq!(wave.gap_ms(), [100.0, 100.0, 300.0]);
        let rates = [wave.decode_rate(), wave.stream_rate()];
        assert!(rates.iter().all(|rate| (rate.unwrap() - 6.0).abs() < 1e-6), "{rates:?}");
        assert_eq!((wave.end_to_end_rate(), wave.prompt_rate()), (Some(4.0), Some(200.0)));
        assert_eq!(wave.seconds(), Some(1.0));
    }

    #[test]
    fn many_streams_are_one_flow_from_the_first_token_to_the_last() {
        let wave = wave(&[&[100, 200, 300], &[200, 400, 600]]);
        assert_eq!(wave.decode_rate(), Some(10.0), "5 tokens in half a second");
        assert_eq!(wave.end_to_end_rate(), Some(10.0), "6 tokens in 0.6 s");
        assert_eq!(wave.stream_rate(), Some(7.5), "of 10 and 5");
        assert_eq!(wave.prompt_rate(), Some(1000.0), "200 tokens until the later one has its first");
    }

    #[test]
    fn what_came_at_once_has_no_rate() {
        let single = wave(&[&[100]]);
        assert_eq!((single.decode_rate(), single.stream_rate()), (None, None));
        assert_eq!(single.end_to_end_rate(), Some(10.0));
        let none = wave(&[]);
        assert!(none.decode_rate().is_none() && none.prompt_rate().is_none() && none.seconds().is_none());
        assert_eq!(wave(&[&[100, 100]]).decode_rate(), None);
    }
}
