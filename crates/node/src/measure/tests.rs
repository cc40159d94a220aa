//! The small model of the repository is measured, with its own weights and with others.

use std::sync::atomic::Ordering;

use brigade_base::KvType;
use brigade_engine::dequantize_rows;
use brigade_gguf::{Builder, GgmlType, Metadata, SyntheticTensors, TensorSource};
use brigade_plan::{Curve, SpeedSource};

use super::bench::Shape;
use super::session::{DECODE_ROWS, Points, decode_rows, expected, layers_s, settled};
use super::*;

fn file() -> Arc<ModelFile> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/abacus-f16.gguf");
    Arc::new(ModelFile::open(path).unwrap())
}

fn request(sessions: u32) -> MeasureRequest {
    MeasureRequest {
        catalog: file().catalog().clone(),
        context: 256,
        sessions,
        max_rows: 64 + sessions,
        kv: KvTypes::default(),
    }
}

/// With time for every point, however busy the machine is; the model is small, so that it is not needed.
fn options(own: Option<Arc<ModelFile>>) -> MeasureOptions {
    MeasureOptions { budget: Duration::from_secs(60), ..MeasureOptions::new(1, 1.0, own) }
}

fn rows(curve: &Curve) -> Vec<u32> {
    curve.points().iter().map(|(rows, _)| *rows).collect()
}

#[test]
fn a_node_with_the_model_measures_its_layers_and_head() {
    let speed = measure(&request(4), &options(Some(file()))).unwrap().speed;
    assert!(speed.is_sound(), "{speed:?}");
    assert_eq!(speed.source, SpeedSource::Layers);
    assert_eq!((rows(&speed.decode), rows(&speed.chunk)), (vec![1, 2, 4], vec![2, 16, 64]));
    // It may be missing where the machine is so busy that the layers alone took longer.
    assert!(speed.head.as_ref().is_none_or(|head| rows(head) == [1, 4]));
    assert!(speed.decode.at(1.0) > 0.0 && speed.load_bytes_per_s > 0.0 && speed.pass_s >= FRAME_S);
}

#[test]
fn a_node_without_it_measures_its_shapes() {
    let speed = measure(&request(6), &options(None)).unwrap().speed;
    assert!(speed.is_sound(), "{speed:?}");
    assert_eq!((speed.source, speed.head), (SpeedSource::Shapes, None));
    assert_eq!(rows(&speed.decode), [1, 2, 4, 6]);
}

#[test]
fn what_was_measured_is_not_measured_again() {
    let dir = tempfile::tempdir().unwrap();
    let (request, options, profiles) = (request(1), options(None), Profiles::open(dir.path()));
    let key = ProfileKey::of(&request, &options);
    let measured = speed(&request, &options, &profiles, false).unwrap();
    assert!(profiles.get(&key).is_some());
    // The machine of a test may be busy.
    profiles.put(&key, &measured, true).unwrap();
    let stored = profiles.get(&key).unwrap();
    assert_eq!(speed(&request, &options, &profiles, false).unwrap(), stored);
    let known = super::measured(&request, &options, &profiles, false).unwrap();
    assert_eq!((known.speed, known.disturbance.note()), (stored, None), "what is kept was measured in quiet");
    for other in [
        MeasureOptions { threads: 2, ..options.clone() },
        MeasureOptions { throttle: 0.5, ..options.clone() },
        MeasureOptions { own: Some(file()), ..options.clone() },
    ] {
        assert_ne!(ProfileKey::of(&request, &other), key);
    }
    for other in [
        MeasureRequest { context: 255, ..request.clone() },
        MeasureRequest { max_rows: 64, ..request.clone() },
        MeasureRequest { kv: KvTypes::both(KvType::Q8_0), ..request.clone() },
        MeasureRequest { sessions: 2, ..request.clone() },
    ] {
        assert_ne!(ProfileKey::of(&other, &options), key);
    }
    let slower = MeasureOptions { budget: Duration::from_secs(1), ..options };
    assert_eq!(ProfileKey::of(&request, &slower), key, "it is the same speed, however long it was measured");
}

#[test]
fn a_measurement_that_is_cancelled_ends() {
    let options = options(None);
    options.cancel.store(true, Ordering::Relaxed);
    assert!(matches!(measure(&request(1), &options), Err(MeasureError::Cancelled)));
}

#[test]
fn too_little_memory_is_said() {
    let request = request(1);
    let options = options(None);
    let mut session = Session::new(&request, &options).unwrap();
    session.room = 1000;
    let Err(error) = session.load_thin().map(drop) else { panic!() };
    assert!(error.to_string().contains("free some memory"), "{error}");
}

#[test]
fn a_context_that_does_not_fit_is_shortened() {
    // Halved until it fits: from the longest that a message can name to a few tokens more than are put before the rows
    // that are timed.
    for n_ctx in [513, 575, 600, 1024] {
        let request = MeasureRequest { context: n_ctx << 3, ..request(2) };
        let options = options(None);
        let mut session = Session::new(&request, &options).unwrap();
        let (view, shape) = session.thin().unwrap();
        session.room = session.memory(&view, Shape { n_ctx, ..shape });
        let speed = session.run().unwrap_or_else(|error| panic!("{n_ctx}: {error}")).speed;
        assert!(speed.is_sound(), "{n_ctx}: {speed:?}");
    }
}

#[test]
fn what_a_stage_takes_is_known_for_every_request() {
    let request = MeasureRequest { context: u32::MAX, sessions: u32::MAX, max_rows: u32::MAX, ..request(1) };
    let options = options(None);
    let mut session = Session::new(&request, &options).unwrap();
    let (view, shape) = session.thin().unwrap();
    let memory = |n_ctx| session.memory(&view, Shape { n_ctx, ..shape });
    assert!(memory(1) < memory(1 << 20) && memory(1 << 20) < memory(u32::MAX));
    assert!(memory(u32::MAX) > u64::from(u32::MAX), "at least a byte for each token");
    session.room = memory(2048);
    assert!(session.load_thin().is_ok_and(|thin| (1024..=2048).contains(&thin.n_ctx)));
}

#[test]
fn who_computes_for_a_part_of_the_time_is_slower() {
    let of = |throttle| {
        let options = MeasureOptions { throttle, ..options(None) };
        measure(&request(1), &options).unwrap().speed
    };
    let (whole, part) = (of(1.0), of(0.02));
    // Fifty times as slow, if the machine were the same each time.
    for (whole, part) in [(&whole.decode, &part.decode), (&whole.chunk, &part.chunk)] {
        let rows = part.points()[0].0.into();
        assert!(part.at(rows) > 5.0 * whole.at(rows), "{whole:?}, {part:?}");
    }
    assert!(part.chunk.points().len() == whole.chunk.points().len());
}

#[test]
fn made_up_weights_are_numbers_as_usual() {
    let integers = [GgmlType::I8, GgmlType::I16, GgmlType::I32, GgmlType::I64, GgmlType::F64];
    let never_stored = [GgmlType::Q8_1, GgmlType::Q8_K];
    for ty in GgmlType::all().filter(|ty| !integers.contains(ty) && !never_stored.contains(ty)) {
        let mut builder = Builder::new(&Metadata::new());
        builder.tensor("blk.0.ffn_up.weight", &[4096, 4], ty).unwrap();
        let source = SyntheticTensors::new(&Catalog::parse_header(&builder.header_bytes()).unwrap());
        let mut bytes = vec![0; ty.tensor_bytes(&[4096, 4]).unwrap() as usize];
        source.read_tensor(0, 0, &mut bytes).unwrap();
        let mut values = Vec::new();
        dequantize_rows(ty.id(), &bytes, 4096, &mut values).unwrap();
        let n = values.len() as f32;
        let (mean, rms) = (values.iter().sum::<f32>() / n, (values.iter().map(|v| v * v).sum::<f32>() / n).sqrt());
        assert!((0.004..0.06).contains(&rms) && mean.abs() < 0.02, "{ty}: mean {mean}, rms {rms}");
    }
}

#[test]
fn rows_go_up_to_the_number_of_sessions() {
    assert_eq!(decode_rows(1), [1]);
    assert_eq!(decode_rows(6), [1, 4, 2, 6]);
    assert_eq!(decode_rows(256), DECODE_ROWS);
}

#[test]
fn more_rows_never_take_less_time() {
    // As one row that was disturbed and two that were not.
    assert_eq!(settled(vec![(2, 0.000_156), (1, 0.0522)]), [(1, 0.000_156), (2, 0.000_156)]);
    let steady = vec![(1, 1.0), (4, 2.0), (16, 3.0)];
    assert_eq!(settled(steady.clone()), steady);
    let settled = settled(vec![(16, 9.0), (1, 3.0), (4, 2.0), (8, 0.0), (32, 8.0)]);
    assert!(settled.iter().map(|(rows, _)| *rows).eq([1, 4, 8, 16, 32]));
    assert!(
        settled.is_sorted_by(|a, b| a.1 <= b.1) && settled.iter().all(|(_, seconds)| *seconds > 0.0),
        "{settled:?}"
    );
    assert_eq!(settled[4], (32, 8.0));
}

#[test]
fn layers_take_the_most_of_a_run() {
    assert_eq!(layers_s(4.0, 1.0), 3.0);
    assert_eq!(layers_s(4.0, 3.9), 3.0, "what lies beside them was measured when the machine was disturbed");
}

#[test]
fn what_a_run_will_take_follows_from_others() {
    let points = vec![(4, 1.0), (16, 2.0)];
    assert_eq!([2, 4, 8, 16, 32].map(|rows| expected(&points, rows)), [1.0, 1.0, 2.0, 2.0, 4.0]);
    assert_eq!(expected(&Points::new(), 64), 0.0);
}
