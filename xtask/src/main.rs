//! `cargo xtask VERB`: what cargo alone cannot say.
//!
//! One file per verb. It depends on no crate of the workspace: it must run when they do not compile.
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a command line tool talks to a terminal")]

mod bench;
mod ci;
mod profile;
mod test;
mod tidy;

use std::path::Path;
use std::process::{Command, ExitCode};

const USAGE: &str = "\
usage: cargo xtask VERB

  test [ARGS..]     run every test; on Debian, first install a software Vulkan driver where there is none
  ci                formatting, lints, docs, tidy, then `test`: what a change must pass
  bench [ARGS..]    what each optimisation brings and costs here: --model, --device, --rows, --batch,
                    --length, --quick, --peer web-rwkv, --compare OLD.json; or a part of rwkv-bench:
                    `cpu`, `gpu`, `weights`, `states`, `state-speed`, `growth`, `chunks`, `tiles`, each with
                    --help
  quality [ARGS..]  how well a model predicts, in any way to run it: --model, --text, --last-words,
                    --with SETTINGS, ..; ARGS go to `rwkv-bench quality`
  profile [ARGS..]  time every dispatch of a model on the GPU; ARGS go to `rwkv-bench profile`:
                    --model PATH, --adapter NAME, --tokens N or --prompt N, --unfused, --trace FILE
  tidy              check the rules that no lint knows";

/// Nothing, or what went wrong.
type Outcome = Result<(), String>;

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let (verb, rest) = match args.split_first() {
        Some((verb, rest)) => (verb.as_str(), rest),
        None => ("", &[][..]),
    };
    let outcome = match (verb, rest) {
        ("test", args) => test::run(args),
        ("ci", []) => ci::run(),
        ("bench", args) => bench::run(args),
        ("quality", args) => bench::run(&[&["quality".to_owned()], args].concat()),
        ("profile", args) => profile::run(args),
        ("tidy", []) => tidy::run(),
        _ => {
            eprintln!("{USAGE}");
            return ExitCode::from(2);
        }
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("xtask {verb}: {e}");
            ExitCode::FAILURE
        }
    }
}

/// The root of the workspace.
fn root() -> &'static Path {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().unwrap_or(here)
}

/// The cargo that runs this, at the root of the workspace.
fn cargo(args: &[&str]) -> Command {
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.args(args).current_dir(root());
    cargo
}

/// Prints a command, runs it, and fails as it fails.
fn spawn(command: &mut Command) -> Outcome {
    let words: Vec<_> =
        [command.get_program()].into_iter().chain(command.get_args()).map(|w| w.to_string_lossy()).collect();
    let line = words.join(" ");
    println!("$ {line}");
    match command.status() {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => Err(format!("`{line}`: {status}")),
        Err(e) => Err(format!("`{line}`: {e}")),
    }
}
