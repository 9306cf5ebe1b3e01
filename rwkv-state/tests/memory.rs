//! A memory store does not grow: what the allocator has given out is at no time more than the store counts.
//!
//! Alone in its process, whose allocator counts: without the test harness too, whose own thread would be counted.
#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test that cannot go on fails, and says what it saw"
)]

mod support;

use std::alloc::System;

use cap::Cap;
use rwkv_core::rng::SplitMix64;
use rwkv_state::store::MemoryStore;
use rwkv_state::{Snapshot, StateFormat, StateStore};
use support::{layout, snapshot};

#[global_allocator]
static ALLOCATOR: Cap<System> = Cap::new(System, usize::MAX);

const BOUND: usize = 4 << 20;

const SESSIONS: usize = 100_000;

/// What the store has beside its entries: a node of each tree that is not half full.
const SLACK: usize = 1 << 10;

/// What a put takes beside it: the snapshot, and its file with the parts that it is made of.
const ONE_PUT: usize = 64 << 10;

fn main() {
    let mut snapshot = snapshot(&layout(1, 1, 2), StateFormat::F16, 1);
    let (mut rng, mut key) = (SplitMix64::new(1), String::new());
    let mut next = |key: &mut String| {
        key.clear();
        std::fmt::Write::write_fmt(key, format_args!("user-{:016x}", rng.next_u64())).unwrap();
    };
    let before = ALLOCATOR.allocated();
    let store = MemoryStore::new(BOUND);
    // What is above this ends the test, within a call too.
    ALLOCATOR.set_limit(before + BOUND + SLACK + ONE_PUT).unwrap();
    let (mut most, mut most_used) = (0, 0);
    for session in 0..SESSIONS {
        next(&mut key);
        snapshot.position = session as u64;
        store.put(&key, &snapshot).unwrap();
        let (real, used) = (ALLOCATOR.allocated() - before, store.used());
        assert!(used <= BOUND, "{used} counted");
        assert!(real <= used + SLACK, "{real} bytes, {used} counted, {session} sessions");
        (most, most_used) = (most.max(real), most_used.max(used));
    }
    assert_eq!(store.get(&key).unwrap(), snapshot, "the last");
    let each = store.used() / store.len();
    assert!(store.len() < SESSIONS / 10 && most_used > BOUND - 2 * each, "{} left: it was full", store.len());
    // The count is not so careful that it wastes what it was given.
    assert!(most > BOUND / 10 * 8, "{most} bytes of {BOUND}");
    println!(
        "{} of {SESSIONS} left; at most {most} bytes allocated, {most_used} counted, bound {BOUND}",
        store.len()
    );

    // A few large ones in their place: what the many small ones needed is given back.
    ALLOCATOR.set_limit(usize::MAX).unwrap();
    let held = ALLOCATOR.allocated();
    let large = Snapshot { logits: Some(vec![0.5; BOUND / 20]), ..snapshot.clone() };
    let before = before + (ALLOCATOR.allocated() - held);
    for session in 0..50 {
        next(&mut key);
        store.put(&key, &large).unwrap();
        let (real, used) = (ALLOCATOR.allocated() - before, store.used());
        assert!(used <= BOUND && real <= used + SLACK, "{real} bytes, {used} counted, {session} large ones");
    }
    assert!(store.len() < 5 && store.used() > BOUND / 2, "{} large ones", store.len());
}
