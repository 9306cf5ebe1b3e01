//! One dispatch for each operation, the form that fusion is measured against: what it computes is what the CPU does.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod support;

use rwkv_core::compare::nmse;
use rwkv_kernels::gpu::device_for_tests;
use rwkv_model::engine::Device;
use rwkv_model::{Engine, EngineOptions, Sampler};
use support::BUNDLED;

/// The error that rounding explains, as a mean square. A product over `n` inputs, added up one after the other, is
/// `n u^2 / 6` off if each rounding is an independent error of variance `u^2 / 3`, `u = 2^-24`; the twelve layers have
/// five products in a row each, of 1024 inputs at most, and there are two executors: 7e-11. It is a hundredth of that as
/// a rule, since most products are shorter and none adds in one row.
const LIMIT: f64 = 1e-10;

/// In single precision: what products of halves come to, and that they need the halves written first, is the matter of
/// `gpu.rs`.
fn options(device: Device) -> EngineOptions {
    EngineOptions { device, fused: false, portable: true, ..EngineOptions::default() }
}

/// The bundled model on the CPU and on the GPU.
fn pair() -> Option<[Engine; 2]> {
    device_for_tests()?;
    let open = |device| Engine::open_with(BUNDLED, options(device), &|_| {}).unwrap();
    Some([open(Device::Cpu), open(Device::Gpu(None))])
}

fn text(n: usize) -> Vec<u32> {
    let text = std::fs::read(concat!(env!("CARGO_MANIFEST_DIR"), "/assets/books-10m/valid.txt")).unwrap();
    text[..n].iter().map(|&byte| byte.into()).collect()
}

fn same(got: &[f32], want: &[f32], what: &str) {
    let error = nmse(got, want, LIMIT);
    assert!(error.is_ok(), "{what}: {error:?}");
}

#[test]
fn computes_what_the_cpu_does() {
    let Some([cpu, gpu]) = pair() else { return };
    let (mut want, mut got) = (cpu.session(), gpu.session());
    let tokens = text(64);
    // Tiles of every size, steps between them, and the same number again after another.
    let mut rest = tokens.as_slice();
    for n in [1, 2, 33, 1, 5, 1, 2] {
        let (now, later) = rest.split_at(n);
        want.prefill(now).unwrap();
        got.prefill(now).unwrap();
        rest = later;
        same(got.logits().unwrap(), want.logits().unwrap(), &format!("{n} tokens: logits"));
        same(&got.state().unwrap(), &want.state().unwrap(), &format!("{n} tokens: state"));
    }
    for n in [1, 9] {
        let (now, later) = rest.split_at(n);
        same(&got.logits_of(now).unwrap(), &want.logits_of(now).unwrap(), &format!("all of {n} rows"));
        rest = later;
    }
    let [want, got] = [want, got].map(|mut session| {
        let tokens = session.generate(Sampler::greedy()).take(40);
        tokens.collect::<Result<Vec<u32>, _>>().unwrap()
    });
    assert_eq!(got, want, "40 tokens, the most probable each time");
}

/// Each session's pass is its own.
#[test]
fn sessions_go_one_after_the_other() {
    let Some([cpu, gpu]) = pair() else { return };
    let tokens = text(12);
    let logits = |engine: &Engine| {
        let (mut a, mut b) = (engine.session(), engine.session());
        engine.step(&mut [(&mut a, &tokens[..7]), (&mut b, &tokens[7..11])]).unwrap();
        engine.step(&mut [(&mut b, &tokens[11..]), (&mut a, &tokens[..1])]).unwrap();
        [a, b].map(|session| session.logits().unwrap().to_vec())
    };
    for (got, want) in logits(&gpu).iter().zip(logits(&cpu)) {
        same(got, &want, "logits");
    }
}

#[test]
fn every_operation_is_a_dispatch() {
    let Some([_, gpu]) = pair() else { return };
    let (report, layers) = (gpu.report().unwrap(), gpu.config().n_layers);
    // Layer 0 has no adapter of the value: two products, a bias and an interpolation less.
    assert_eq!(report.step_dispatches, 31 * layers - 4, "one token");
    assert_eq!(report.batch_dispatches, 31 * layers - 4, "several");
    for (kernel, used) in [("wkv7", true), ("token_shift", true), ("time_mix", false), ("mix_rows", false)] {
        let found = report.kernels.iter().any(|label| label.starts_with(kernel));
        assert_eq!(found, used, "{kernel} among {:?}", report.kernels);
    }
}

/// A matrix of the stack begins where the device binds, or the model is refused.
#[test]
fn odd_ranks() {
    if device_for_tests().is_none() {
        return;
    }
    let model = |heads| {
        let model = support::random_model([2, heads, 64, 128, 16, 7], 1);
        // as the device holds them, and in memory as in the file
        support::safetensors(&model.iter().map(|tensor| tensor.to("F16")).collect::<Vec<_>>())
    };
    let open = |bytes, device| Engine::new(&support::open(bytes, None).unwrap(), options(device), &|_| {});
    let refused = open(model(1), Device::Gpu(None)).unwrap_err().to_string();
    assert_eq!(
        refused, "a1: begins at byte 25472 of a buffer, bound are multiples of 256",
        "rows of 128 bytes"
    );
    let [want, got] = [Device::Cpu, Device::Gpu(None)].map(|device| {
        let mut session = open(model(2), device).unwrap().session();
        session.prefill(&[1, 2, 3]).unwrap();
        session.step(4).unwrap().to_vec()
    });
    same(&got, &want, "rows of 256 bytes");
}
