//! The build gate, fed broken shaders: each must be refused, with the place of the fault.
#![expect(clippy::unwrap_used, reason = "helpers of tests")]

#[path = "../build/gate.rs"]
mod gate;

use std::fs;
use std::path::{Path, PathBuf};

const GOOD: &str = "\
// Twin: rwkv-core/src/ops/demo.rs
struct Params {
    n: u32,
    scale: f32,
}
@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> x: array<f32>;
@group(0) @binding(2) var<storage, read_write> y: array<f32>;
var<workgroup> shared_x: array<f32, 64>;
@compute @workgroup_size(64)
fn demo(@builtin(local_invocation_index) i: u32) {
    shared_x[i] = x[i] * params.scale;
    workgroupBarrier();
    if i < params.n { y[i] = shared_x[63u - i]; }
}
";

/// Kernel folders and twins of one test.
struct Tree(PathBuf);

impl Tree {
    fn new(test: &str) -> Self {
        let root = Path::new(env!("CARGO_TARGET_TMPDIR")).join(test);
        let _ = fs::remove_dir_all(&root);
        fs::create_dir_all(root.join("ops")).unwrap();
        fs::create_dir_all(root.join("kernels")).unwrap();
        Self(root)
    }

    fn kernel(self, name: &str, wgsl: &str) -> Self {
        let folder = self.0.join("kernels").join(name);
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join(format!("{name}.wgsl")), wgsl).unwrap();
        self
    }

    fn twin(self, name: &str) -> Self {
        fs::write(self.0.join("ops").join(format!("{name}.rs")), "").unwrap();
        self
    }

    /// The generated code, or the faults with the tree's own path cut off.
    fn gate(&self) -> Result<String, Vec<String>> {
        let root = format!("{}/", self.0.display());
        gate::gate(&self.0.join("kernels"), &self.0.join("ops"))
            .map_err(|faults| faults.iter().map(|fault| fault.replace(&root, "")).collect())
    }
}

/// Faults of [`GOOD`] after replacing `from`, which it must contain, by `to`.
fn faults(test: &str, from: &str, to: &str) -> Vec<String> {
    assert!(GOOD.contains(from), "{from:?} is not in the good shader");
    Tree::new(test).twin("demo").kernel("demo", &GOOD.replace(from, to)).gate().unwrap_err()
}

#[track_caller]
fn one_fault(test: &str, from: &str, to: &str, want: &str) {
    assert_eq!(faults(test, from, to), [format!("kernels/demo/demo.wgsl:{want}")], "{from:?} -> {to:?}");
}

#[test]
fn a_good_kernel_is_reflected() {
    let code = Tree::new("good").twin("demo").kernel("demo", GOOD).gate().unwrap();
    for part in [
        "pub(crate) mod demo {",
        "pub const SOURCE: &str = include_str!(",
        "WORKGROUP_SIZE: [u32; 3] = [64, 1, 1];",
        r#"crate::Binding { name: "params", access: crate::Access::Uniform }"#,
        r#"crate::Binding { name: "x", access: crate::Access::Read }"#,
        r#"crate::Binding { name: "y", access: crate::Access::ReadWrite }"#,
        "pub n: u32,",
        "pub scale: f32,",
        "assert!(size_of::<Params>() == 8",
    ] {
        assert!(code.contains(part), "no {part:?} in\n{code}");
    }
}

#[test]
fn a_kernel_without_a_uniform_has_no_params() {
    let wgsl = "// Twin: rwkv-core/src/ops/demo.rs\n\
                @group(0) @binding(0) var<storage, read_write> y: array<f32>;\n\
                @compute @workgroup_size(1) fn demo() { y[0] = 1.0; }\n";
    let code = Tree::new("no_uniform").twin("demo").kernel("demo", wgsl).gate().unwrap();
    assert!(!code.contains("Params"), "{code}");
}

#[test]
fn naga_faults_have_their_place_and_source() {
    for (test, from, to, place, says) in [
        ("syntax", "var<workgroup> shared_x", "var<workgroup shared_x", "9:4: ", "expected"),
        ("type", "x[i] * params.scale", "x[i] * params.n", "12:5: ", "shared_x[i] = x[i] * params.n;"),
        ("name", "shared_x[63u - i]", "shared_z[63u - i]", "14:30: ", "shared_z"),
        ("no_binding", "@group(0) @binding(1) var", "var", "7:1: ", "Binding decoration is missing"),
        ("capability", "x[i] * params.scale", "subgroupAdd(x[i])", "12:19: ", "SUBGROUP"),
        ("readonly", "y[i] = shared_x[63u - i]", "x[i] = 1.0", "14:23: ", "x[i] = 1.0"),
    ] {
        let found = faults(test, from, to);
        let first = format!("kernels/demo/demo.wgsl:{place}");
        assert!(found[0].starts_with(&first) && found[0].contains(says), "{test}: {}", found[0]);
    }
}

#[test]
fn entry_points() {
    one_fault("renamed", "fn demo(", "fn other(", "11:4: entry point `other` must be named `demo`");
    let second = "}\n@compute @workgroup_size(1) fn second() {}\n";
    let found = Tree::new("second")
        .twin("demo")
        .kernel("demo", &(GOOD.trim_end().trim_end_matches('}').to_owned() + second));
    assert_eq!(
        found.gate().unwrap_err(),
        ["kernels/demo/demo.wgsl:16:32: 2 entry points, a kernel has exactly one"],
        "second"
    );
    one_fault(
        "no_entry",
        "@compute @workgroup_size(64)\nfn demo(@builtin(local_invocation_index) i: u32)",
        "\nfn demo(i: u32)",
        "1:1: 0 entry points, a kernel has exactly one",
    );
}

#[test]
fn workgroup_sizes() {
    for (test, size, shown) in [
        ("wide", "257", "[257, 1, 1]"),
        ("square", "32, 16", "[32, 16, 1]"),
        ("deep", "1, 1, 65", "[1, 1, 65]"),
    ] {
        one_fault(
            test,
            "workgroup_size(64)",
            &format!("workgroup_size({size})"),
            &format!("11:4: workgroup size {shown} exceeds [256, 256, 64] or 256 invocations"),
        );
    }
    one_fault(
        "override_size",
        "@compute @workgroup_size(64)",
        "override SIZE: u32 = 64; @compute @workgroup_size(SIZE)",
        "11:4: the workgroup size must be constant, or it cannot be checked here",
    );
}

#[test]
fn workgroup_memory() {
    one_fault(
        "memory",
        "array<f32, 64>",
        "array<f32, 4097>",
        "9:1: 16400 bytes of workgroup memory, the limit is 16384",
    );
    // 16384 bytes are allowed; one word more counts as 16 bytes.
    one_fault(
        "memory_sum",
        "array<f32, 64>;",
        "array<f32, 4096>;\nvar<workgroup> one_more: f32;",
        "10:1: 16400 bytes of workgroup memory, the limit is 16384",
    );
    one_fault(
        "override_memory",
        "array<f32, 64>;",
        "array<f32, SIZE>; override SIZE: u32 = 64;",
        "9:1: the size of `shared_x` must be constant",
    );
}

#[test]
fn storage_buffers_and_bindings() {
    let nine: String =
        (3..10).map(|i| format!("@group(0) @binding({i}) var<storage> b{i}: array<f32>;\n")).collect();
    one_fault(
        "ninth",
        "var<workgroup>",
        &(nine + "var<workgroup>"),
        "15:23: `b9` is storage buffer 9, the limit is 8",
    );
    one_fault("gap", "@binding(2)", "@binding(3)", "8:23: `y` must be @group(0) @binding(2)");
    one_fault(
        "group",
        "@group(0) @binding(2)",
        "@group(1) @binding(0)",
        "8:23: `y` must be @group(0) @binding(2)",
    );
    one_fault(
        "texture",
        "var<workgroup>",
        "@group(0) @binding(3) var image: texture_2d<f32>;\nvar<workgroup>",
        "9:23: `image` is neither a uniform nor a storage buffer",
    );
}

#[test]
fn params() {
    one_fault(
        "non_scalar",
        "scale: f32",
        "scale: f32, v: vec2<f32>",
        "4:17: `Params.v` is neither u32 nor f32",
    );
    one_fault("signed", "n: u32,", "n: u32, i: i32,", "3:13: `Params.i` is neither u32 nor f32");
    one_fault(
        "padded",
        "scale: f32",
        "@align(8) scale: f32",
        "4:15: `Params.scale` is at byte 8, not 4: padded",
    );
    one_fault(
        "padded_end",
        "scale: f32",
        "@size(12) scale: f32",
        "2:1: `Params` is 16 bytes, its fields are 8: padded",
    );
    one_fault("params_name", "Params", "Config", "6:36: uniform `params` must be of a struct `Params`");
    one_fault(
        "second_uniform",
        "var<workgroup>",
        "@group(0) @binding(3) var<uniform> more: Params;\nvar<workgroup>",
        "9:23: `more` is a second uniform, a kernel has one",
    );
}

#[test]
fn twins() {
    let first = "rwkv-core/src/ops/demo.rs";
    one_fault("unnamed", first, "elsewhere", &format!("1:1: the first line must name the twin, {first}"));
    let lonely = Tree::new("lonely").kernel("demo", GOOD);
    assert_eq!(
        lonely.gate().unwrap_err(),
        ["kernels/demo/demo.wgsl:1:1: the twin ops/demo.rs does not exist"],
        "no twin"
    );
}

#[test]
fn all_faults_of_all_kernels_are_reported() {
    let tree = Tree::new("all")
        .twin("demo")
        .kernel(
            "demo",
            &GOOD
                .replace("fn demo(", "fn dem(")
                .replace("@binding(2)", "@binding(7)")
                .replace("64>", "9999>"),
        )
        .kernel(
            "other",
            &GOOD.replace("fn demo(", "fn other(").replace("n: u32,", "n: i32,").replace("< params.n", "< 5"),
        );
    fs::create_dir_all(tree.0.join("kernels/empty")).unwrap();
    fs::write(tree.0.join("kernels/demo/demo_fast.wgsl"), GOOD).unwrap();
    let found = tree.gate().unwrap_err();
    let starts = [
        "kernels/demo/demo_fast.wgsl:1:1: unchecked, only demo.wgsl of its folder is",
        "kernels/demo/demo.wgsl:11:4: entry point `dem`",
        "kernels/demo/demo.wgsl:8:23: `y` must be",
        "kernels/demo/demo.wgsl:9:1: 40000 bytes",
        "kernels/empty/empty.wgsl: ",
        "kernels/other/other.wgsl:1:1: the twin ops/other.rs does not exist",
        "kernels/other/other.wgsl:1:1: the first line must name the twin",
        "kernels/other/other.wgsl:3:5: `Params.n` is neither",
    ];
    assert_eq!(found.len(), starts.len(), "{found:#?}");
    for (fault, start) in found.iter().zip(starts) {
        assert!(fault.starts_with(start), "{fault:?} is not {start:?}");
    }
}
