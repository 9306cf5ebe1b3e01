//! Killed in the middle of a save: what is there is what was saved last, or what was being saved, whole.
//!
//! This binary runs itself as a child that saves without end, and kills it at random moments.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod support;

use std::ffi::OsStr;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;
use std::{env, fs};

use rwkv_core::rng::SplitMix64;
use rwkv_state::{EncodedState, Snapshot, StateFormat};
use support::layout;

/// How often each way of saving is interrupted.
const KILLS: usize = 200;

/// The longest that a child goes on after its first save, in microseconds: some saves.
const LIFE: u64 = 8_000;

/// Variables of the child: a folder, how to save there, and the number of the first snapshot.
const FOLDER: &str = "RWKV_KILL_FOLDER";
const HOW: &str = "RWKV_KILL_HOW";
const FIRST: &str = "RWKV_KILL_FIRST";

/// A way to save.
trait Way {
    fn save(&self, snapshot: &Snapshot);
    fn load(&self) -> Snapshot;
}

struct File<'a>(&'a Path);

impl Way for File<'_> {
    fn save(&self, snapshot: &Snapshot) {
        snapshot.save(self.0.join("a.state")).unwrap();
    }

    fn load(&self) -> Snapshot {
        Snapshot::load(self.0.join("a.state")).unwrap()
    }
}

#[cfg(feature = "object-store")]
impl Way for rwkv_state::store::ObjectStore {
    fn save(&self, snapshot: &Snapshot) {
        rwkv_state::StateStore::put(self, "a", snapshot).unwrap();
    }

    fn load(&self) -> Snapshot {
        rwkv_state::StateStore::get(self, "a").unwrap()
    }
}

fn way<'a>(how: &OsStr, folder: &'a Path) -> Box<dyn Way + 'a> {
    match how.to_str() {
        Some("file") => Box::new(File(folder)),
        #[cfg(feature = "object-store")]
        Some("store") => Box::new(rwkv_state::store::ObjectStore::local(folder).unwrap()),
        _ => panic!("{how:?}"),
    }
}

/// What is saved as the `n`th: 300 KiB, all of them of this number.
fn nth(n: u64) -> Snapshot {
    let layout = layout(4, 4, 64);
    let value = f32::from(u16::try_from(n % 60_000).unwrap());
    let state = EncodedState::encode(&layout, &vec![value; layout.len()], StateFormat::F32).unwrap();
    Snapshot { position: n, state, ..support::snapshot(&support::layout(1, 1, 1), StateFormat::F32, 1) }
}

/// No test, but what the others start: it saves one snapshot after the other and says so after each.
#[test]
fn child() {
    let (Some(folder), Some(how)) = (env::var_os(FOLDER), env::var_os(HOW)) else { return };
    let first: u64 = env::var(FIRST).unwrap().parse().unwrap();
    let way = way(&how, Path::new(&folder));
    for n in first.. {
        way.save(&nth(n));
        // In one piece, so that no number is told in part.
        std::io::stdout().write_all(format!(" saved {n}.\n").as_bytes()).unwrap();
    }
}

/// Kills children that save so, and says what they were at.
fn killed(how: &str) -> String {
    let folder = tempfile::tempdir().unwrap();
    let (mut rng, mut first, mut during) = (SplitMix64::new(3), 1, 0);
    for kill in 0..KILLS {
        let mut child = Command::new(env::current_exe().unwrap())
            .args(["child", "--exact", "--nocapture"])
            .envs([
                (FOLDER, folder.path().as_os_str()),
                (HOW, how.as_ref()),
                (FIRST, first.to_string().as_ref()),
            ])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut said = BufReader::new(child.stdout.take().unwrap()).lines().map(Result::unwrap);
        let saved = |line: String| line.strip_suffix('.')?.rsplit_once(" saved ")?.1.parse::<u64>().ok();
        let mut last = said.find_map(saved).unwrap();
        std::thread::sleep(Duration::from_micros(rng.next_u64() % LIFE));
        child.kill().unwrap();
        assert!(!child.wait().unwrap().success(), "kill {kill}: it ended by itself");
        last = said.filter_map(saved).last().unwrap_or(last);

        let loaded = way(how.as_ref(), folder.path()).load();
        let n = loaded.position;
        assert!(n == last || n == last + 1, "kill {kill}: {n} is there, {last} was saved");
        assert_eq!(loaded, nth(n), "kill {kill}: whole");
        first = n + 1;
        during += usize::from(n > last);
    }
    // What is left over is beside the file.
    let left = fs::read_dir(folder.path()).unwrap().count() - 1;
    assert!(left + during > 0, "no save was interrupted");
    // In the end, all the same, one more.
    let way = way(how.as_ref(), folder.path());
    way.save(&nth(first));
    assert_eq!(way.load(), nth(first), "afterwards");
    format!("{how}: {first} saves, {KILLS} kills, {left} before the rename, {during} after it")
}

#[test]
fn a_file() {
    println!("{}", killed("file"));
}

#[cfg(feature = "object-store")]
#[test]
fn a_directory_of_objects() {
    println!("{}", killed("store"));
}
