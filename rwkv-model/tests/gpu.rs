//! The GPU executor against the CPU's.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod support;

use rwkv_core::compare::nmse;
use rwkv_model::engine::Device;
use rwkv_model::{Engine, EngineOptions, Sampler};
use support::BUNDLED;

fn open(device: Device) -> Engine {
    Engine::open_with(BUNDLED, EngineOptions { device, ..EngineOptions::default() }, &|_| {}).unwrap()
}

#[test]
fn smoke() {
    let start = std::time::Instant::now();
    let (mut p, q) = (
        open(Device::Cpu).session(),
        Engine::open_with(
            BUNDLED,
            EngineOptions { device: Device::Gpu(None), batch_invariant: true, ..EngineOptions::default() },
            &|_| {},
        )
        .unwrap(),
    );
    let mut q = q.session();
    p.prefill(&[65]).unwrap();
    q.prefill(&[65]).unwrap();
    let (x, y) = (p.state().unwrap(), q.state().unwrap());
    for l in 0..12 {
        for (part, at, len) in [
            ("att", l * 256, 256),
            ("wkv", 12 * 256 + l * 16384, 16384),
            ("ffn", 12 * 256 + 12 * 16384 + l * 256, 256),
        ] {
            eprintln!(
                "layer {l} {part} {:?}",
                nmse(
                    &y[at..at + len],
                    &x[at..at + len].iter().map(|&x| f64::from(x)).collect::<Vec<_>>(),
                    1e-9
                )
            );
        }
    }
    let (cpu, gpu) = (open(Device::Cpu), open(Device::Gpu(None)));
    eprintln!("open {:?} {:?}", start.elapsed(), gpu.report());
    let text = std::fs::read(concat!(env!("CARGO_MANIFEST_DIR"), "/assets/books-10m/valid.txt")).unwrap();
    let tokens: Vec<u32> = text[..100].iter().map(|&b| b.into()).collect();
    let (mut a, mut b) = (cpu.session(), gpu.session());
    for n in [2, 1, 50, 1, 2] {
        let part = &tokens[a.position() as usize..][..n];
        a.prefill(part).unwrap();
        b.prefill(part).unwrap();
        let state = nmse(
            &b.state().unwrap(),
            &a.state().unwrap().iter().map(|&x| f64::from(x)).collect::<Vec<_>>(),
            1e-2,
        );
        let logits = nmse(
            b.logits().unwrap(),
            &a.logits().unwrap().iter().map(|&x| f64::from(x)).collect::<Vec<_>>(),
            1e-2,
        );
        eprintln!("{n}: state {state:?} logits {logits:?} {:?}", start.elapsed());
    }
    let x: Vec<u32> = a.generate(Sampler::greedy()).take(40).map(Result::unwrap).collect();
    let y: Vec<u32> = b.generate(Sampler::greedy()).take(40).map(Result::unwrap).collect();
    eprintln!("{:?}", start.elapsed());
    assert_eq!(x, y);
    assert_eq!(a.position(), b.position());
}
