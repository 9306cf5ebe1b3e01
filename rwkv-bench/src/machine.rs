//! What the machine is and what it gives.

use std::hint::black_box;

use rayon::prelude::*;

/// The processor and its threads.
pub(crate) fn describe() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = info.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    let name = name.map_or(std::env::consts::ARCH, |(_, name)| name);
    format!("machine: {name}, {} threads", rayon::current_num_threads())
}

/// The most memory that this process had resident, in bytes, where the system tells.
pub(crate) fn peak_memory() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

/// A plain parallel sum: the rate at which the machine reads memory, as a program that does nothing else sees it.
pub(crate) struct Reading(Vec<f32>);

impl Reading {
    /// Elements summed by a task.
    const TASK: usize = 1 << 18;

    pub(crate) fn new(bytes: usize) -> Self {
        Self(vec![1.0; bytes / size_of::<f32>()])
    }

    pub(crate) fn run(&self) {
        let sum = |task: &[f32]| {
            let (lanes, rest) = task.as_chunks::<16>();
            let mut sums = [0.0; 16];
            for lane in lanes {
                for (sum, x) in sums.iter_mut().zip(lane) {
                    *sum += x;
                }
            }
            sums.iter().chain(rest).sum::<f32>()
        };
        black_box(self.0.par_chunks(Self::TASK).map(sum).sum::<f32>());
    }
}
