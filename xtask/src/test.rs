//! `cargo xtask test`: every test of the workspace, those of the GPU kernels included where that can be had.
//!
//! Linux needs a Vulkan driver for them; Mesa's software driver runs on any CPU. With a driver the tests run
//! under `RWKV_GPU=required`, so that none skips. If the environment sets `RWKV_GPU`, that holds instead. ARGS go to `cargo test`; they
//! may name single packages.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::{env, fs};

use crate::{Outcome, cargo, spawn};

/// Where the Vulkan loader looks for drivers, unless told otherwise.
const FOLDERS: [&str; 3] = ["/etc/vulkan/icd.d", "/usr/local/share/vulkan/icd.d", "/usr/share/vulkan/icd.d"];

pub(crate) fn run(args: &[String]) -> Outcome {
    run_with(args, &[])
}

/// The same, with more in the environment.
pub(crate) fn run_with(args: &[String], environment: &[(&str, &str)]) -> Outcome {
    let mut tests = cargo(&["test"]);
    tests.envs(environment.iter().copied());
    if !args.iter().any(|arg| arg.starts_with("-p") || arg.starts_with("--package")) {
        // With what is off by default, or its tests would not run.
        tests.args(["--workspace", "--features", "rwkv-model/object-store"]);
    }
    tests.args(args);
    if !cfg!(target_os = "linux") {
        println!("GPU tests run on the system's own driver, or are skipped if there is none");
    } else if let Some(driver) = driver().or_else(installed_driver) {
        println!("Vulkan driver: {}", driver.display());
        if env::var_os("RWKV_GPU").is_none() {
            tests.env("RWKV_GPU", "required");
        }
    } else {
        println!("no Vulkan driver: GPU tests will be SKIPPED (or fail under RWKV_GPU=required)");
    }
    spawn(&mut tests)
}

/// A driver's manifest, if there is one.
fn driver() -> Option<PathBuf> {
    let told = ["VK_DRIVER_FILES", "VK_ICD_FILENAMES"].into_iter().find_map(env::var_os);
    manifest(told.as_deref(), &FOLDERS.map(Path::new))
}

/// The first driver manifest: of the listed files and folders if there is a list, else of the standard folders.
fn manifest(told: Option<&OsStr>, folders: &[&Path]) -> Option<PathBuf> {
    let is_manifest = |path: &PathBuf| path.is_file() && path.extension().is_some_and(|of| of == "json");
    let places = match told {
        Some(list) => env::split_paths(list).collect(),
        None => folders.iter().map(PathBuf::from).collect::<Vec<_>>(),
    };
    let files = |place: PathBuf| match fs::read_dir(&place) {
        Ok(entries) => entries.filter_map(|entry| Some(entry.ok()?.path())).collect(),
        Err(_) => vec![place],
    };
    places.into_iter().flat_map(files).find(is_manifest)
}

/// Debian's software driver, installed now; `None`, with the reason printed, if that cannot be done.
fn installed_driver() -> Option<PathBuf> {
    println!("no Vulkan driver: installing Debian's mesa-vulkan-drivers and libvulkan1");
    if let Err(e) = install() {
        println!("cannot install: {e}");
    }
    driver()
}

fn install() -> Outcome {
    if !on_path("apt-get") {
        return Err("there is no apt-get; install a Vulkan driver by other means".to_owned());
    }
    let id = Command::new("id").arg("-u").output();
    let root = id.is_ok_and(|id| id.stdout.trim_ascii() == b"0");
    let apt: &[&str] = match root {
        true => &["env"],
        false if on_path("sudo") => &["sudo", "env"],
        false => return Err("not root, and there is no sudo; install the two packages as root".to_owned()),
    };
    let apt_get = |args: &[&str]| {
        let mut command = Command::new(apt[0]);
        command.args(&apt[1..]).args(["DEBIAN_FRONTEND=noninteractive", "apt-get"]).args(args);
        spawn(command.stdin(Stdio::null()))
    };
    // Lists that are out of date may still do, so only the installation decides.
    if let Err(e) = apt_get(&["update"]) {
        println!("{e}");
    }
    apt_get(&["install", "--yes", "--no-install-recommends", "mesa-vulkan-drivers", "libvulkan1"])
}

fn on_path(program: &str) -> bool {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path).any(|folder| folder.join(program).is_file())
}

#[cfg(test)]
mod tests {
    use std::ffi::OsStr;
    use std::fs;

    use super::manifest;

    #[test]
    fn finds_drivers_where_the_loader_does() {
        let root = tempfile::tempdir().unwrap();
        let [missing, empty, standard] = ["missing", "empty", "standard"].map(|name| root.path().join(name));
        fs::create_dir(&standard).unwrap();
        fs::create_dir(&empty).unwrap();
        fs::write(empty.join("README"), "").unwrap();
        let driver = standard.join("driver.json");
        fs::write(&driver, "{}").unwrap();

        assert_eq!(manifest(None, &[&missing, &empty, &standard]), Some(driver.clone()), "standard folders");
        assert_eq!(manifest(None, &[&missing, &empty]), None, "no manifest");
        let list = std::env::join_paths([&missing, &driver]).unwrap();
        assert_eq!(manifest(Some(&list), &[]), Some(driver.clone()), "a list of files");
        assert_eq!(manifest(Some(standard.as_os_str()), &[]), Some(driver), "a list of folders");
        assert_eq!(
            manifest(Some(OsStr::new("/none.json")), &[&standard]),
            None,
            "a list replaces the folders"
        );
    }
}
