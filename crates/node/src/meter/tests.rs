//! What is told comes out right, in the text and in traces, and nothing grows without bound.

use std::collections::BTreeMap;
use std::time::Duration;

use brigade_base::{PassId, TenantId};
use brigade_protocol::frame::Timing;

use super::traces::MAX_DONE;
use super::*;
use crate::serving::{Sampling, TextPlace, TextsDone};

fn ms(n: u64) -> Duration {
    Duration::from_millis(n)
}

fn us(n: u64) -> Duration {
    Duration::from_micros(n)
}

fn request(id: &str, n_prompt: usize) -> Request {
    Request {
        id: id.to_owned(),
        tenant: TenantId(7),
        priority: 3,
        timeout: None,
        prompt: vec![1; n_prompt],
        max_tokens: None,
        sampling: Sampling::default(),
        stop: Vec::new(),
        logprobs: None,
        ignore_end: false,
        place: TextPlace::ONLY,
        done: TextsDone::default(),
    }
}

/// A meter whose model has just been placed on two workers and the coordinator, and when that was.
fn three_stages() -> (Meter, Instant) {
    let meter = Meter::new(1_000);
    meter.placed(Epoch(4), ["a", "b", "c"].map(str::to_owned).to_vec());
    (meter, Instant::now())
}

/// The worker of stage 0 computed this frame together with another one.
const TIMINGS: [Timing; 2] = [
    Timing { read_us: 10, queue_us: 40, compute_us: 600, encode_us: 5, write_us: 15, n_frames: 2 },
    Timing { read_us: 20, queue_us: 50, compute_us: 400, encode_us: 7, write_us: 18, n_frames: 1 },
];

fn rows(session: u64, n_rows: u32, is_prompt: bool) -> PassRows {
    PassRows { session: SessionId(session), n_rows, is_prompt, before: 0 }
}

/// A pass that left at `sent`, was back after 1,480 us, and whose tail took 500 us.
///
/// 1,000 us of it were computing, 480 us hops: 60 us of reading, 120 us of waiting, 12 us of encoding, 48 us of
/// writing, and so 240 us on the three links.
fn pass<'a>(n: u64, sent: Instant, rows: &'a [PassRows], timings: &'a [Timing]) -> PassReport<'a> {
    PassReport {
        pass: PassId(n),
        rows,
        n_rows: rows.iter().map(|rows| rows.n_rows).sum(),
        is_decode: rows.iter().all(|rows| !rows.is_prompt),
        moves_kv: false,
        sent,
        embed: us(25),
        write: us(15),
        read: us(30),
        decoded: sent + us(1_450),
        tail_begin: sent + us(1_480),
        tail_end: sent + us(1_980),
        timings,
        alone: true,
    }
}

/// The samples of a metrics text, after checking its form.
fn parse(text: &str) -> BTreeMap<String, f64> {
    let mut samples = BTreeMap::new();
    let mut families: BTreeMap<&str, &str> = BTreeMap::new();
    let body = text.strip_suffix("# EOF\n").expect("ends with the end mark");
    for line in body.lines() {
        if let Some(kind) = line.strip_prefix("# TYPE ") {
            let (name, kind) = kind.split_once(' ').expect("a name and a type");
            assert!(families.insert(name, kind).is_none(), "{name} twice");
            assert!(name.starts_with("brigade_") && !name.ends_with("_total") && !name.ends_with("_info"), "{name}");
        } else if !line.starts_with('#') {
            let (name, value) = line.rsplit_once(' ').expect("a name and a value");
            let value = value.parse().unwrap_or_else(|_| panic!("{line}"));
            assert!(samples.insert(name.to_owned(), value).is_none(), "{name} twice");
            let base = name.split('{').next().unwrap_or(name);
            let family = |suffix: &str| base.strip_suffix(suffix).and_then(|name| families.get(name)).copied();
            let known = match family("_total") {
                Some(kind) => kind == "counter",
                None => {
                    let histogram = ["_bucket", "_sum", "_count"].into_iter().find_map(family);
                    families.get(base) == Some(&"gauge") || histogram == Some("histogram") || family("_info").is_some()
                }
            };
            assert!(known, "{name} is of no family");
        }
    }
    samples
}

#[track_caller]
fn check(meter: &Meter, expected: &[(&str, f64)]) {
    let samples = parse(&meter.encode());
    for (name, value) in expected {
        let name = format!("brigade_{name}");
        let found = samples.get(&name).unwrap_or_else(|| panic!("no {name}"));
        assert!((found - value).abs() <= 1e-6 * value.abs().max(1.0), "{name} is {found}, not {value}");
    }
}

#[test]
fn nothing_has_happened_yet() {
    let meter = Meter::new(1_000);
    check(
        &meter,
        &[
            ("num_requests_running", 0.0),
            ("kv_cache_usage_perc", 0.0),
            ("generation_tokens_total", 0.0),
            ("time_to_first_token_seconds_count", 0.0),
            ("kv_image_saves_total{outcome=\"failed\"}", 0.0),
            (concat!("build_info{version=\"", env!("CARGO_PKG_VERSION"), "\"}"), 1.0),
        ],
    );
    assert_eq!((meter.tokens(), meter.tokens_per_second(), meter.hop_us()), (0, 0.0, (0.0, 0.0)));
    assert_eq!((meter.stage_ms(0), meter.busy(5), meter.bytes_per_token()), (0.0, 0.0, 1_000));
    assert_eq!(meter.trace("chatcmpl-1"), None);
}

#[test]
fn a_request_is_timed_from_end_to_end() {
    let (meter, begin) = three_stages();
    let id = SessionId(1);
    meter.received(id, &request("chatcmpl-1", 100), begin);
    meter.admitted(id, 64, begin + ms(400));
    meter.token(id, begin + ms(900));
    meter.token(id, begin + ms(1_000));
    meter.preempted(id, begin + ms(1_050));
    meter.admitted(id, 10, begin + ms(1_300));
    meter.token(id, begin + ms(1_500));
    meter.ended(id, End::Stop, begin + ms(1_600));
    check(
        &meter,
        &[
            ("request_queue_time_seconds_sum", 0.4),
            ("request_queue_time_seconds_count", 1.0),
            ("time_to_first_token_seconds_sum", 0.9),
            ("request_prefill_time_seconds_sum", 0.5),
            ("inter_token_latency_seconds_sum", 0.6),
            ("inter_token_latency_seconds_count", 2.0),
            ("inter_token_latency_seconds_bucket{le=\"0.1\"}", 1.0),
            ("time_per_output_token_seconds_sum", 0.3),
            ("request_decode_time_seconds_sum", 0.6),
            ("e2e_request_latency_seconds_sum", 1.6),
            ("request_prompt_tokens_sum", 100.0),
            ("request_generation_tokens_sum", 3.0),
            ("prompt_tokens_total", 100.0),
            ("generation_tokens_total", 3.0),
            ("prefix_cache_queries_total", 202.0),
            ("prefix_cache_hits_total", 74.0),
            ("num_preemptions_total", 1.0),
            ("request_success_total{finished_reason=\"stop\"}", 1.0),
        ],
    );
    let trace = meter.trace("chatcmpl-1").unwrap();
    assert_eq!((trace.state, trace.finish, trace.priority, trace.tenant), ("done", Some("stop"), 3, TenantId(7)));
    assert_eq!((trace.prompt_tokens, trace.cached_tokens, trace.completion_tokens), (100, 64, 3));
    assert_eq!((trace.queued_ms, trace.first_token_ms, trace.total_ms), (Some(400.0), Some(900.0), 1_600.0));
    assert_eq!((trace.preemptions, trace.preempted_ms), (1, 250.0));
    assert!(trace.received_unix_ms > 1_600_000_000_000);
}

#[test]
fn what_was_not_answered_in_full_is_counted_but_not_timed() {
    let (meter, begin) = three_stages();
    for (n, end) in [(1, End::Abort), (2, End::Timeout), (3, End::Error), (4, End::Length)] {
        meter.received(SessionId(n), &request(&n.to_string(), 5), begin);
        meter.ended(SessionId(n), end, begin + ms(100));
        meter.ended(SessionId(n), end, begin + ms(200));
    }
    check(
        &meter,
        &[
            ("request_success_total{finished_reason=\"abort\"}", 1.0),
            ("request_success_total{finished_reason=\"timeout\"}", 1.0),
            ("request_success_total{finished_reason=\"error\"}", 1.0),
            ("request_success_total{finished_reason=\"length\"}", 1.0),
            ("e2e_request_latency_seconds_count", 1.0),
            ("request_decode_time_seconds_count", 0.0),
            ("prompt_tokens_total", 0.0),
        ],
    );
}

/// One of `n` texts of request `embd-1`.
fn text(idx: u32, n: u32) -> Request {
    Request::of_text("embd-1".to_owned(), TenantId(7), vec![1; 10], TextPlace { idx, n_texts: n })
}

/// The same, where the gateway knows that so many others are done.
fn text_again(idx: u32, n: u32, n_done: u32) -> Request {
    Request { done: TextsDone::of(n_done), ..text(idx, n) }
}

const OF_STOP: &str = "request_success_total{finished_reason=\"stop\"}";
const OF_ABORT: &str = "request_success_total{finished_reason=\"abort\"}";

#[test]
fn many_texts_are_one_request() {
    let (meter, begin) = three_stages();
    let state = || meter.trace("embd-1").map(|trace| (trace.state, trace.texts, trace.texts_done));
    for n in 0..2 {
        meter.received(SessionId(n), &text(n as u32, 3), begin + ms(n));
    }
    assert_eq!(state(), Some(("waiting", Some(3), Some(0))));
    meter.admitted(SessionId(0), 4, begin + ms(50));
    meter.admitted(SessionId(1), 3, begin + ms(60));
    meter.preempted(SessionId(1), begin + ms(70));
    meter.admitted(SessionId(1), 9, begin + ms(80));
    meter.pass(pass(1, begin + ms(90), &[rows(0, 6, true), rows(1, 7, true)], &TIMINGS));
    for n in 0..2 {
        meter.pooled(SessionId(n));
        meter.ended(SessionId(n), End::Stop, begin + ms(100));
    }
    // None is on its way, and still there is one to come.
    assert_eq!(state(), Some(("running", Some(3), Some(2))));
    check(&meter, &[(OF_STOP, 0.0), ("prompt_tokens_total", 20.0)]);
    meter.received(SessionId(2), &text(2, 3), begin + ms(100));
    meter.pooled(SessionId(2));
    meter.ended(SessionId(2), End::Stop, begin + ms(300));
    let trace = meter.trace("embd-1").unwrap();
    assert_eq!((trace.state, trace.finish, trace.texts_done, trace.total_ms), ("done", Some("stop"), Some(3), 300.0));
    assert_eq!((trace.prompt_tokens, trace.cached_tokens, trace.preemptions), (30, 7, 1));
    assert_eq!((trace.passes.len(), trace.passes[0].rows), (1, 13));
    assert_eq!(meter.lock().traces.len(), (0, 1));
    check(
        &meter,
        &[
            (OF_STOP, 1.0),
            (OF_ABORT, 0.0),
            ("prompt_tokens_total", 30.0),
            ("request_prompt_tokens_count", 1.0),
            ("request_prompt_tokens_sum", 30.0),
            ("request_queue_time_seconds_count", 1.0),
            ("e2e_request_latency_seconds_sum", 0.3),
            ("prefix_cache_queries_total", 30.0),
        ],
    );
}

#[test]
fn a_request_fails_once_with_its_first_text_that_does() {
    let (meter, begin) = three_stages();
    for n in 0..3 {
        meter.received(SessionId(n), &text(n as u32, 3), begin);
    }
    meter.ended(SessionId(1), End::Timeout, begin);
    meter.ended(SessionId(0), End::Abort, begin);
    meter.ended(SessionId(2), End::Abort, begin);
    check(&meter, &[("request_success_total{finished_reason=\"timeout\"}", 1.0), (OF_ABORT, 0.0), (OF_STOP, 0.0)]);
    assert_eq!(meter.trace("embd-1").unwrap().finish, Some("timeout"));
    // One that was sent before that was known.
    meter.received(SessionId(3), &text(2, 4), begin);
    meter.pooled(SessionId(3));
    meter.ended(SessionId(3), End::Abort, begin);
    check(&meter, &[(OF_ABORT, 0.0)]);
    assert_eq!(meter.lock().traces.len(), (0, 1));
    let later = begin + traces::FORSAKEN_AFTER;
    meter.received(SessionId(4), &text_again(2, 3, 2), later);
    meter.ended(SessionId(4), End::Stop, later);
    check(&meter, &[(OF_STOP, 1.0)]);
}

/// A gateway whose link broke asks for the rest anew, whichever texts that are.
#[test]
fn what_was_given_up_may_be_asked_for_again() {
    for done_before in 0..3 {
        let (meter, begin) = three_stages();
        let state = || meter.trace("embd-1").map(|trace| (trace.finish, trace.texts_done, trace.prompt_tokens));
        for n in 0..3 {
            meter.received(SessionId(n), &text(n as u32, 3), begin);
        }
        meter.ended(SessionId(done_before), End::Stop, begin + ms(100));
        for n in (0..3).filter(|n| *n != done_before) {
            meter.ended(SessionId(n), End::Abort, begin + ms(200));
        }
        assert_eq!(state(), Some((None, Some(1), 30)), "it may go on");
        let rest: Vec<u64> = (0..3).filter(|n| *n != done_before).collect();
        for &n in &rest {
            meter.received(SessionId(n + 5), &text_again(n as u32, 3, 1), begin + ms(900));
        }
        rest.iter().for_each(|n| meter.ended(SessionId(n + 5), End::Stop, begin + ms(1_000)));
        assert_eq!(state(), Some((Some("stop"), Some(3), 30)), "text {done_before} was done before");
        let e2e = ("e2e_request_latency_seconds_sum", 1.0);
        check(&meter, &[(OF_ABORT, 0.0), (OF_STOP, 1.0), ("request_prompt_tokens_sum", 30.0), e2e]);
    }
}

/// What the coordinator did that was lost, the gateway has heard; what it has not heard is asked for once more.
#[test]
fn the_rest_of_a_request_is_complete_when_all_of_it_is() {
    let (meter, begin) = three_stages();
    let done = || meter.trace("embd-1").and_then(|trace| trace.texts_done);
    // Of five texts the first three were on their way, and the last of those was done.
    meter.received(SessionId(0), &text_again(0, 5, 1), begin);
    meter.received(SessionId(1), &text_again(1, 5, 1), begin);
    meter.ended(SessionId(1), End::Stop, begin);
    meter.received(SessionId(2), &text_again(3, 5, 2), begin);
    meter.ended(SessionId(0), End::Stop, begin);
    meter.ended(SessionId(2), End::Stop, begin);
    assert_eq!(done(), Some(4));
    check(&meter, &[(OF_STOP, 0.0)]);
    // That one was done here, but its link broke before the gateway heard.
    meter.received(SessionId(3), &text_again(3, 5, 3), begin);
    meter.ended(SessionId(3), End::Stop, begin);
    assert_eq!(done(), Some(4));
    meter.received(SessionId(4), &text_again(4, 5, 4), begin);
    meter.ended(SessionId(4), End::Stop, begin);
    assert_eq!(done(), Some(5));
    check(&meter, &[(OF_ABORT, 0.0), (OF_STOP, 1.0), ("request_prompt_tokens_sum", 40.0)]);
}

/// Nothing else happens on a quiet node that would have them looked for.
#[test]
fn a_trace_tells_of_a_caller_who_left_long_ago() {
    let (meter, now) = three_stages();
    let begin = now.checked_sub(traces::FORSAKEN_AFTER + ms(500)).unwrap();
    meter.received(SessionId(0), &text(0, 3), begin);
    meter.ended(SessionId(0), End::Abort, begin + ms(40));
    let trace = meter.trace("embd-1").unwrap();
    assert_eq!((trace.state, trace.finish, trace.total_ms), ("done", Some("abort"), 40.0));
}

#[test]
fn a_caller_who_leaves_between_two_texts_is_noticed() {
    let (meter, begin) = three_stages();
    let long = begin + traces::FORSAKEN_AFTER;
    meter.received(SessionId(0), &text(0, 3), begin);
    meter.ended(SessionId(0), End::Stop, begin);
    meter.received(SessionId(1), &request("other", 5), begin + ms(2_000));
    check(&meter, &[(OF_ABORT, 0.0)]);
    meter.received(SessionId(2), &request("another", 5), long);
    check(&meter, &[(OF_ABORT, 1.0)]);
    assert_eq!(meter.trace("embd-1").unwrap().finish, Some("abort"));
    assert_eq!(meter.lock().traces.len(), (2, 1));
}

#[test]
fn a_trace_tells_where_a_request_stands() {
    let (meter, begin) = three_stages();
    let id = SessionId(1);
    let state = || meter.trace("x").map(|trace| trace.state);
    assert_eq!(state(), None);
    meter.received(id, &request("x", 5), begin);
    assert_eq!(state(), Some("waiting"));
    meter.admitted(id, 0, begin);
    assert_eq!(state(), Some("running"));
    meter.preempted(id, begin);
    assert_eq!(state(), Some("preempted"));
    meter.ended(id, End::Error, begin);
    assert_eq!(state(), Some("done"));
    // An id that comes again names the later request.
    meter.received(SessionId(2), &request("x", 5), begin);
    assert_eq!(state(), Some("waiting"));
}

#[test]
fn a_pass_is_told_stage_by_stage_to_all_who_were_in_it() {
    let (meter, begin) = three_stages();
    for n in [1, 2] {
        meter.received(SessionId(n), &request(&n.to_string(), 8), begin);
    }
    meter.pass(pass(1, begin + ms(2), &[rows(1, 8, true), rows(2, 1, false)], &TIMINGS));
    meter.pass(pass(2, begin + ms(9), &[rows(2, 1, false), rows(3, 1, false)], &TIMINGS));
    let (one, two) = (meter.trace("1").unwrap(), meter.trace("2").unwrap());
    assert_eq!(one.passes.len(), 1);
    let step = &one.passes[0];
    assert_eq!((step.pass, step.kind, step.rows, step.pass_rows), (1, "prefill", 8, 9));
    assert_eq!((step.at_ms, step.total_ms, step.embed_us, step.write_us), (1.975, 2.005, 25, 15));
    let told: Vec<_> = step.stages.iter().map(|s| (s.stage, s.node.as_str(), s.compute_us, s.frames)).collect();
    assert_eq!(told, [(0, "a", 600, 2), (1, "b", 400, 1), (2, "c", 500, 1)]);
    // Nothing is counted twice or left out.
    let parts =
        |s: &crate::trace::StageTrace| s.wire_us + s.read_us + s.queue_us + s.compute_us + s.encode_us + s.write_us;
    assert_eq!(step.stages.iter().map(parts).sum::<u32>() + step.embed_us + step.write_us, 2_005);
    let kinds: Vec<_> = two.passes.iter().map(|step| (step.pass, step.kind, step.rows)).collect();
    assert_eq!(kinds, [(1, "decode", 1), (2, "decode", 1)]);
    let json = serde_json::to_value(&one).unwrap();
    assert_eq!(json["passes"][0]["stages"][0]["wire_us"], 80);
    assert_eq!((json.get("tenant"), json.get("finish")), (None, None));
}

#[test]
fn a_hop_is_split_into_its_parts() {
    let (meter, begin) = three_stages();
    let row = [rows(1, 1, false)];
    meter.pass(pass(1, begin, &row, &TIMINGS));
    // Neither passes in company, nor prompts, nor batches say what a hop costs.
    meter.pass(PassReport { alone: false, ..pass(2, begin, &row, &TIMINGS) });
    meter.pass(pass(3, begin, &[rows(1, 1, true)], &TIMINGS));
    meter.pass(pass(4, begin, &[rows(1, 1, false), rows(2, 1, false)], &TIMINGS));
    assert_eq!(meter.hop_us(), (160.0, 160.0));
    let parts = meter.hop_parts();
    assert_eq!((parts.read, parts.queue, parts.encode, parts.write, parts.wire), (20.0, 40.0, 4.0, 16.0, 80.0));
    check(
        &meter,
        &[
            ("hop_seconds_sum", 160e-6),
            ("hop_seconds_count", 1.0),
            ("hop_part_seconds_sum{part=\"wire\"}", 80e-6),
            ("hop_part_seconds_bucket{le=\"0.00005\",part=\"queue\"}", 1.0),
        ],
    );
    // A write of a larger frame before must not make the wire negative.
    let large = [TIMINGS[0], Timing { write_us: 90_000, ..TIMINGS[1] }];
    meter.placed(Epoch(5), vec!["a".into(), "b".into(), "c".into()]);
    meter.pass(pass(5, begin, &row, &large));
    assert_eq!((meter.hop_us().0, meter.hop_parts().wire), (160.0, 0.0));
}

#[test]
fn a_ring_of_one_stage_has_no_hops() {
    let meter = Meter::new(1_000);
    meter.placed(Epoch(1), vec!["alone".into()]);
    let begin = Instant::now();
    meter.received(SessionId(1), &request("r", 5), begin);
    let rows = [rows(1, 1, false)];
    let report = pass(1, begin, &rows, &[]);
    meter.pass(PassReport { write: us(0), read: us(0), decoded: begin, ..report });
    assert_eq!((meter.hop_us(), meter.stage_ms(0)), ((0.0, 0.0), 0.5));
    let step = &meter.trace("r").unwrap().passes[0];
    assert_eq!((step.stages.len(), step.stages[0].wire_us, step.stages[0].compute_us), (1, 0, 500));
    assert!(!meter.encode().contains("brigade_link_bytes_total{"));
}

#[test]
fn stages_and_links_are_counted() {
    let (meter, begin) = three_stages();
    let rows = [rows(1, 1, false), rows(2, 1, false)];
    for n in 0..10 {
        meter.pass(pass(n, begin + ms(10 * n), &rows, &TIMINGS));
    }
    // A pass that only moves KV caches has no rows, but takes time.
    meter.pass(pass(10, begin + ms(100), &[], &TIMINGS));
    let stats = LinkStats { frames_sent: 11, bytes_sent: 5_000, frames_received: 1, bytes_received: 24 };
    meter.link(0, LinkStats { bytes_sent: 100, ..LinkStats::default() }, 9);
    meter.link(0, stats, 2);
    meter.link(7, stats, 2);
    check(
        &meter,
        &[
            ("stage_busy_seconds_total{stage=\"0\",node=\"a\"}", 11.0 * 300e-6),
            ("stage_busy_seconds_total{stage=\"2\",node=\"c\"}", 11.0 * 500e-6),
            ("stage_pass_seconds_sum{stage=\"0\",node=\"a\"}", 10.0 * 600e-6),
            ("stage_rows_per_pass_count{stage=\"1\",node=\"b\"}", 10.0),
            ("stage_rows_total{stage=\"1\",node=\"b\"}", 20.0),
            ("link_bytes_total{link=\"0\",from=\"c\",to=\"a\"}", 5_024.0),
            ("link_frames_total{link=\"0\",from=\"c\",to=\"a\"}", 12.0),
            ("link_send_queue{link=\"0\",from=\"c\",to=\"a\"}", 2.0),
            ("link_bytes_total{link=\"1\",from=\"a\",to=\"b\"}", 20_000.0),
            ("link_bytes_total{link=\"2\",from=\"b\",to=\"c\"}", 0.0),
            ("epoch", 4.0),
        ],
    );
    assert_eq!((meter.stage_ms(0), meter.stage_ms(1), meter.stage_ms(2)), (0.6, 0.4, 0.5));
    let slots = &meter.lock().stages[2].busy;
    assert!((slots.share(begin + ms(102)) - 0.054).abs() < 0.01, "{}", slots.share(begin + ms(102)));
}

#[test]
fn a_placement_forgets_windows_but_no_counters() {
    let (meter, begin) = three_stages();
    let id = SessionId(1);
    meter.received(id, &request("r", 5), begin);
    meter.pass(pass(1, begin, &[rows(1, 1, false)], &TIMINGS));
    meter.token(id, begin + ms(1));
    meter.token(id, begin + ms(21));
    assert!(meter.tokens_per_second() > 0.0);
    meter.link(0, LinkStats { bytes_sent: 100, ..LinkStats::default() }, 1);
    meter.placed(Epoch(5), vec!["a".into(), "c".into()]);
    assert_eq!((meter.hop_us().0, meter.stage_ms(0), meter.busy(0), meter.tokens_per_second()), (0.0, 0.0, 0.0, 0.0));
    assert_eq!((meter.tokens(), meter.trace("r").unwrap().passes.len()), (2, 1));
    // A new link counts from nothing; the series goes on.
    meter.link(0, LinkStats { bytes_sent: 30, ..LinkStats::default() }, 0);
    check(
        &meter,
        &[
            ("stage_rows_total{stage=\"0\",node=\"a\"}", 1.0),
            ("link_bytes_total{link=\"0\",from=\"c\",to=\"a\"}", 130.0),
            ("link_send_queue{link=\"0\",from=\"c\",to=\"a\"}", 0.0),
            ("epoch", 5.0),
        ],
    );
    // A pass of another ring than the one that is known breaks nothing.
    meter.pass(pass(1, begin, &[rows(1, 1, false)], &[TIMINGS[0]; 9]));
    assert_eq!(meter.trace("r").unwrap().passes[1].stages.len(), 10);
}

#[test]
fn load_images_and_round_trips_are_shown() {
    let meter = Meter::new(1_000);
    let load = Load { running: 3, waiting: 9, kv_tokens: 250, kv_capacity: 1_000, images: 2, image_tokens: 77 };
    meter.load(load);
    assert_eq!(meter.load_now(), load);
    meter.saved(40, true);
    meter.saved(50, false);
    meter.restored(40, true);
    meter.rtt("b\"o\\x\n", 0.25);
    meter.rtt("gone", 0.5);
    meter.gone("gone");
    check(
        &meter,
        &[
            ("num_requests_running", 3.0),
            ("num_requests_waiting", 9.0),
            ("kv_cache_usage_perc", 0.25),
            ("kv_cache_capacity_tokens", 1_000.0),
            ("kv_images", 2.0),
            ("kv_image_tokens", 77.0),
            ("kv_image_saves_total{outcome=\"ok\"}", 1.0),
            ("kv_image_saves_total{outcome=\"failed\"}", 1.0),
            ("kv_image_save_tokens_total", 40.0),
            ("kv_image_restore_tokens_total", 40.0),
            ("node_rtt_seconds{node=\"b\\\"o\\\\x\\n\"}", 0.25),
        ],
    );
    assert!(!meter.encode().contains("gone"));
}

#[test]
fn nothing_grows_without_bound() {
    let (meter, begin) = three_stages();
    for n in 0..100_000u64 {
        let (id, now) = (SessionId(n), begin + ms(10 * n));
        meter.received(id, &request(&format!("chatcmpl-{n}"), 5), now);
        meter.admitted(id, 0, now);
        meter.pass(pass(n, now, &[rows(n, 1, n % 2 == 0)], &TIMINGS));
        meter.token(id, now);
        meter.ended(id, End::Stop, now);
        meter.token(id, now);
        meter.pass(pass(n, now, &[rows(n, 1, false)], &TIMINGS));
    }
    assert_eq!(meter.lock().traces.len(), (0, MAX_DONE));
    assert!(meter.trace(&format!("chatcmpl-{}", 100_000 - MAX_DONE - 1)).is_none());
    assert!(meter.trace(&format!("chatcmpl-{}", 100_000 - MAX_DONE)).is_some());
    // Texts push nobody out but with their request.
    for n in 0..2_048 {
        meter.received(SessionId(200_000 + n), &text(n as u32, 2_048), begin);
        meter.ended(SessionId(200_000 + n), End::Stop, begin);
    }
    assert_eq!(meter.lock().traces.len(), (0, MAX_DONE));
    assert!(meter.trace(&format!("chatcmpl-{}", 100_000 - MAX_DONE + 1)).is_some());
    let size = meter.encode().len();
    for n in 0..3_000u64 {
        meter.placed(Epoch(n), vec![format!("worker-{n}"), "c".into()]);
        meter.rtt(&format!("worker-{n}"), 0.1);
        meter.rtt(&format!("other-{n}"), 0.1);
    }
    let series = |text: &str, name: &str| text.lines().filter(|line| line.starts_with(name)).count();
    let text = meter.encode();
    for name in ["brigade_stage_rows_total", "brigade_link_bytes_total", "brigade_node_rtt_seconds"] {
        let n = series(&text, name);
        assert!((1..=metrics::MAX_SERIES).contains(&n), "{n} series of {name}");
    }
    assert_eq!(series(&text, "brigade_link_send_queue{"), 0);
    assert!(size < 100_000, "{size} bytes of metrics for three stages");
}
