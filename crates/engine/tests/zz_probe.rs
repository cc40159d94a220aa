mod support;
use brigade_engine::{Input, Row, Stage};
use support::synthetic::{N_VOCAB, TYPES};
use support::{abacus, feed, tokens, whole};
fn decode(stage: &mut Stage, slots: &[u32], text: &[i32]) -> Vec<f32> {
    let rows: Vec<_> = slots.iter().map(|&slot| Row { slot, position: stage.len(slot), output: true }).collect();
    let input: Vec<_> = rows.iter().map(|row| text[row.position as usize]).collect();
    let mut out = Vec::new();
    stage.run(&rows, Input::Tokens(&input), &mut out).unwrap();
    out
}
#[test]
fn probe() {
    let mut all: Vec<(String, Stage)> =
        TYPES.iter().map(|m| (m.name.to_owned(), m.load(|o| (o.n_sessions, o.max_rows) = (16, 300)))).collect();
    for name in ["abacus-f16.gguf", "abacus-q8_0.gguf"] {
        all.push((name.to_owned(), whole(&abacus().with_file_name(name), |o| (o.n_sessions, o.max_rows) = (16, 300))));
    }
    for (name, mut stage) in all {
        let text = tokens(300, N_VOCAB, 1);
        let full = feed(&mut stage, 0, &text[..64]);
        let w = full.len() / 64;
        // which chunk sizes match the 64-chunk, from the first rows
        let mut ok = String::new();
        for n in 2..=40 {
            stage.clear(1).unwrap();
            let part = feed(&mut stage, 1, &text[..n]);
            ok.push(if part[..] == full[..n * w] { '.' } else { 'x' });
        }
        // offset: chunk of n after an aligned 16
        let mut ok2 = String::new();
        for n in 2..=40 {
            stage.clear(1).unwrap();
            feed(&mut stage, 1, &text[..16]);
            let part = feed(&mut stage, 1, &text[16..16 + n]);
            ok2.push(if part[..] == full[16 * w..(16 + n) * w] { '.' } else { 'x' });
        }
        stage.clear_all();
        for s in 0..16 {
            feed(&mut stage, s, &text[..20 + s as usize]);
        }
        let mut outs: Vec<Vec<f32>> = Vec::new();
        for n in 1..=16u32 {
            let slots: Vec<u32> = (0..n).collect();
            outs.push(decode(&mut stage, &slots, &text));
            for s in 0..n {
                stage.truncate(s, 20 + s).unwrap();
            }
        }
        let lone: Vec<Vec<f32>> = (0..16u32)
            .map(|s| {
                let o = decode(&mut stage, &[s], &text);
                stage.truncate(s, 20 + s).unwrap();
                o
            })
            .collect();
        let show = |f: &dyn Fn(usize, usize) -> bool| {
            (1..=16usize).map(|n| if (0..n).all(|s| f(n, s)) { '.' } else { 'x' }).collect::<String>()
        };
        let a = show(&|n, s| outs[n - 1][s * w..(s + 1) * w] == lone[s][..]);
        let b = show(&|n, s| n < 2 || outs[n - 1][s * w..(s + 1) * w] == outs[15][s * w..(s + 1) * w]);
        println!("{name:18} chunk {ok}\n{:18} after16 {ok2}\n{:18} singles-vs-lone {a} singles-vs-16 {b}", "", "");
    }
}
