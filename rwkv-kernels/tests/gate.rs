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

/// Kernel folders, helpers and twins of one test.
struct Tree(PathBuf);

impl Tree {
    fn new(test: &str) -> Self {
        let root = Path::new(env!("CARGO_TARGET_TMPDIR")).join(test);
        let _ = fs::remove_dir_all(&root);
        fs::create_dir_all(root.join("ops")).unwrap();
        fs::create_dir_all(root.join("kernels")).unwrap();
        fs::create_dir_all(root.join("wgsl")).unwrap();
        Self(root)
    }

    fn kernel(self, name: &str, wgsl: &str) -> Self {
        self.variant(name, "", wgsl)
    }

    /// `end` is what the file name adds to the kernel's.
    fn variant(self, name: &str, end: &str, wgsl: &str) -> Self {
        let folder = self.0.join("kernels").join(name);
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join(format!("{name}{end}.wgsl")), wgsl).unwrap();
        self
    }

    fn helper(self, name: &str, wgsl: &str) -> Self {
        fs::write(self.0.join("wgsl").join(format!("{name}.wgsl")), wgsl).unwrap();
        self
    }

    fn twin(self, name: &str) -> Self {
        fs::write(self.0.join("ops").join(format!("{name}.rs")), "").unwrap();
        self
    }

    fn folders(&self) -> gate::Folders {
        let of = |name| self.0.join(name);
        gate::Folders { kernels: of("kernels"), helpers: of("wgsl"), ops: of("ops") }
    }

    /// The generated code, or the faults with the tree's own path cut off.
    fn gate(&self) -> Result<String, Vec<String>> {
        let root = format!("{}/", self.0.display());
        gate::gate(&self.folders())
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
        "pub const VARIANTS: &[crate::Kernel] = &[",
        r#"name: "demo""#,
        r#"suffix: "","#,
        &format!("source: {GOOD:?},"),
        "workgroup_size: [64, 1, 1],",
        "workgroup_bytes: 256,",
        r#"crate::Binding { name: "params", access: crate::Access::Uniform, element: None }"#,
        r#"name: "x", access: crate::Access::Read, element: Some(crate::Element { scalar: crate::Scalar::F32, lanes: 1 })"#,
        r#"name: "y", access: crate::Access::ReadWrite, element: Some("#,
        "params_bytes: 8,",
        "overrides: &[],",
        "crate::Features { f16: false, subgroup: false, coop: false }",
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
        ("f16", "shared_x[i] = x[i]", "let h = f16(1); shared_x[i] = x[i]", "12:13: ", "f16"),
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
    // A variant with any suffix has the raised limit.
    let twins = Tree::new("raised").twin("demo").kernel("demo", GOOD);
    let sized = |n: u32| GOOD.replace("workgroup_size(64)", &format!("workgroup_size({n})"));
    let tree = twins.variant("demo", "_subgroup", &sized(1024));
    assert!(tree.gate().unwrap().contains("workgroup_size: [1024, 1, 1]"), "raised");
    assert_eq!(
        tree.variant("demo", "_subgroup", &sized(1025)).gate().unwrap_err(),
        [
            "kernels/demo/demo_subgroup.wgsl:11:4: workgroup size [1025, 1, 1] exceeds [1024, 1024, 64] or 1024 invocations"
        ],
        "beyond"
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
    let tree = Tree::new("raised_memory").twin("demo").kernel("demo", GOOD);
    let sized = |n: u32| GOOD.replace("array<f32, 64>", &format!("array<f32, {n}>"));
    let tree = tree.variant("demo", "_f16", &sized(12 * 1024));
    assert!(tree.gate().unwrap().contains("workgroup_bytes: 49152,"), "raised");
    assert_eq!(
        tree.variant("demo", "_f16", &sized(12 * 1024 + 1)).gate().unwrap_err(),
        ["kernels/demo/demo_f16.wgsl:9:1: 49168 bytes of workgroup memory, the limit is 49152"],
        "beyond"
    );
}

/// [`GOOD`] with a workgroup of `SIZE` invocations and `2 * SIZE` words of memory.
fn sized(default: &str) -> String {
    GOOD.replace("workgroup_size(64)", "workgroup_size(SIZE)")
        .replace("array<f32, 64>;", &format!("array<f32, 2 * SIZE>; override SIZE: u32{default};"))
}

#[test]
fn overrides_are_checked_at_their_defaults() {
    let gate = |test, wgsl: &str| Tree::new(test).twin("demo").kernel("demo", wgsl).gate();
    let code = gate("override", &sized(" = 32u")).unwrap();
    for part in [
        "workgroup_size: [32, 1, 1],",
        "workgroup_bytes: 256,",
        r#"overrides: &[crate::Override { name: "SIZE", default: 32.0 },],"#,
    ] {
        assert!(code.contains(part), "no {part:?} in\n{code}");
    }
    let kinds =
        "override A: i32 = -3; override B: f32 = 0.5; override C: bool = true; override D: i32 = 2 * A;";
    let used = GOOD.replace("* params.scale", "* params.scale * select(B, f32(A * D), C)") + kinds;
    let code = gate("override_kinds", &used).unwrap();
    for (name, default) in [("A", "-3.0"), ("B", "0.5"), ("C", "1.0"), ("D", "-6.0")] {
        let part = format!("{{ name: {name:?}, default: {default} }}");
        assert!(code.contains(&part), "no {part:?} in\n{code}");
    }

    let fault = |test, wgsl: &str| {
        let mut faults = gate(test, wgsl).unwrap_err();
        assert_eq!(faults.len(), 1, "{faults:#?}");
        faults.remove(0)
    };
    let at = |what: &str| format!("kernels/demo/demo.wgsl:{what}");
    assert_eq!(
        fault("override_invocations", &sized(" = 257u")),
        at("11:4: workgroup size [257, 1, 1] exceeds [256, 256, 64] or 256 invocations"),
        "size"
    );
    let memory = sized(" = 64u").replace("2 * SIZE", "33 * SIZE").replace("SIZE)", "64)");
    assert_eq!(
        fault("override_memory", &memory.replace("= 64u", "= 128u")),
        at("9:1: 16896 bytes of workgroup memory, the limit is 16384"),
        "memory"
    );
    assert_eq!(
        fault("override_without", &sized("")),
        at("9:48: override `SIZE` needs a default, it cannot be checked without"),
        "no default"
    );
    assert_eq!(
        fault("override_id", &sized(" = 32u").replace("override", "@id(3) override")),
        at("9:55: override `SIZE` has an @id, but is set by its name"),
        "id"
    );
    assert_eq!(
        fault("override_unused", &(GOOD.to_owned() + "override UNUSED: u32 = 1;\n")),
        at("16:10: override `UNUSED` is not used"),
        "unused"
    );
    assert!(fault("override_zero", &sized(" = 0u")).starts_with(&at("")), "no invocations");
}

#[test]
fn a_suffix_grants_what_its_words_say() {
    let f16 = GOOD
        .replace("struct", "enable f16;\nstruct")
        .replace("x: array<f32>", "x: array<vec4<f16>>")
        .replace("x[i] *", "f32(x[i].y) *");
    let subgroup = GOOD.replace("x[i] *", "subgroupAdd(x[i]) *");
    let both = f16.replace("f32(x[i].y) *", "subgroupAdd(f32(x[i].y)) *");
    let coop = f16.replace("enable f16;", "enable f16; enable wgpu_cooperative_matrix;").replace(
        "workgroupBarrier();",
        "workgroupBarrier(); let tile = coopLoad<coop_mat8x8<f32, C>>(&y[0], 8u); coopStore(tile, &y[0], 8u);",
    );
    let tree = |test| Tree::new(test).twin("demo").kernel("demo", GOOD);
    // Written in another order than that of merit.
    let all = tree("suffixes")
        .variant("demo", "_coop", &coop)
        .variant("demo", "_subgroup", &subgroup)
        .variant("demo", "_f16_subgroup", &both)
        .variant("demo", "_f16", &f16);
    let code = all.gate().unwrap();
    let order = [
        (r#"suffix: "","#, "f16: false, subgroup: false, coop: false"),
        (r#"suffix: "f16","#, "f16: true, subgroup: false, coop: false"),
        (r#"suffix: "subgroup","#, "f16: false, subgroup: true, coop: false"),
        (r#"suffix: "f16_subgroup","#, "f16: true, subgroup: true, coop: false"),
        (r#"suffix: "coop","#, "f16: true, subgroup: false, coop: true"),
    ];
    let mut rest = code.as_str();
    for part in order.iter().flat_map(|(suffix, features)| [*suffix, *features]) {
        rest = rest.split_once(part).unwrap_or_else(|| panic!("no {part:?} where it belongs in\n{code}")).1;
    }
    assert!(code.contains("scalar: crate::Scalar::F16, lanes: 4"), "{code}");
    assert_eq!(code.matches("pub struct Params").count(), 1, "one for all variants");

    // Each without the word that it needs.
    for (test, end, wgsl, needs) in [
        ("no_f16", "_subgroup", &both, "f16"),
        ("no_subgroup", "_f16", &both, "SUBGROUP"),
        ("no_coop", "_f16_subgroup", &coop, "wgpu_cooperative_matrix"),
    ] {
        let found = tree(test).variant("demo", end, wgsl).gate().unwrap_err();
        let file = format!("kernels/demo/demo{end}.wgsl:");
        assert!(
            found[0].starts_with(&file) && found[0].to_lowercase().contains(&needs.to_lowercase()),
            "{found:#?}"
        );
    }
}

#[test]
fn a_suffix_is_of_words_that_grant_something() {
    let faults = Tree::new("suffix_words")
        .twin("demo")
        .kernel("demo", GOOD)
        .variant("demo", "_fast", GOOD)
        .variant("demo", "_f16_", GOOD)
        .variant("demo", "_f16_subgroup", GOOD)
        .variant("demo", "_subgroup_f16", GOOD)
        .variant("demo", "2", GOOD)
        .gate()
        .unwrap_err();
    let at = |end: &str, what: &str| format!("kernels/demo/demo{end}.wgsl:1:1: {what}");
    assert_eq!(
        faults,
        [
            at("2", "unchecked, the files of this folder are demo.wgsl and demo_<suffix>.wgsl"),
            at("_f16_", "`` is no capability: a suffix has f16, subgroup and coop"),
            at("_fast", "`fast` is no capability: a suffix has f16, subgroup and coop"),
            at("_subgroup_f16", "grants the same as demo_f16_subgroup.wgsl"),
        ],
        "in order"
    );
}

#[test]
fn variants_take_what_the_portable_one_takes() {
    let fault = |test, from: &str, to: &str| {
        assert!(GOOD.contains(from), "{from:?} is not in the good shader");
        let tree = Tree::new(test).twin("demo").kernel("demo", GOOD);
        let mut faults = tree.variant("demo", "_f16", &GOOD.replace(from, to)).gate().unwrap_err();
        assert_eq!(faults.len(), 1, "{faults:#?}");
        faults.remove(0)
    };
    let at = |what: &str| format!("kernels/demo/demo_f16.wgsl:{what}");
    assert_eq!(
        fault("params_type", "n: u32,\n    scale: f32,", "n: u32,\n    scale: f32,\n    more: u32,"),
        at("2:1: `Params` is not that of demo.wgsl"),
        "a field more"
    );
    assert_eq!(
        fault("params_order", "n: u32,\n    scale: f32,", "scale: f32,\n    n: u32,"),
        at("2:1: `Params` is not that of demo.wgsl"),
        "order"
    );
    assert_eq!(
        fault("binding_access", "var<storage, read> x", "var<storage, read_write> x"),
        at("7:23: binding 1 is `x`, ReadWrite; in demo.wgsl it is `x`, Read"),
        "access"
    );
    assert_eq!(
        fault(
            "binding_more",
            "var<workgroup>",
            "@group(0) @binding(3) var<storage> z: array<u32>;\nvar<workgroup>"
        ),
        at("9:23: binding 3 is `z`, Read; in demo.wgsl it is none"),
        "one more"
    );
    let lacks = GOOD.replace("@group(0) @binding(1) var<storage, read> x: array<f32>;\n", "");
    let lacks = lacks.replace("binding(2)", "binding(1)").replace("x[i] *", "y[i] *");
    let tree = Tree::new("binding_less").twin("demo").kernel("demo", GOOD).variant("demo", "_f16", &lacks);
    assert_eq!(
        tree.gate().unwrap_err(),
        [
            at("7:23: binding 1 is `y`, ReadWrite; in demo.wgsl it is `x`, Read"),
            at("1:1: 2 bindings; demo.wgsl has 3")
        ],
        "one less"
    );
    assert_eq!(
        fault("variant_entry", "fn demo(", "fn demo_f16("),
        at("11:4: entry point `demo_f16` must be named `demo`"),
        "entry point"
    );
}

/// [`GOOD`] with a call of `f` and these lines after its first.
fn uses(lines: &str) -> String {
    let twin = "// Twin: rwkv-core/src/ops/demo.rs\n";
    GOOD.replace(twin, &format!("{twin}{lines}")).replace("x[i] *", "f(x[i]) *")
}

#[test]
fn helpers_are_joined_once_and_after_the_kernel() {
    let kernel = uses("//use outer\n//use inner\n");
    let outer = "// Outer.\n//use inner\nfn f(x: f32) -> f32 { return g(x); }\n";
    let inner = "// Inner.\nfn g(x: f32) -> f32 { return 2.0 * x; }";
    let tree = Tree::new("joined").twin("demo").kernel("demo", &kernel);
    let code = tree.helper("outer", outer).helper("inner", inner).gate().unwrap();
    assert!(code.contains(&format!("source: {:?},", format!("{kernel}{outer}{inner}\n"))), "{code}");
    // So an `enable` of the kernel's stays the first thing of all.
    let enabling = uses("//use f\nenable f16;\n");
    let tree = Tree::new("enable").twin("demo").kernel("demo", GOOD).variant("demo", "_f16", &enabling);
    tree.helper("f", "fn f(x: f32) -> f32 { return f32(f16(x)); }\n").gate().unwrap();
}

#[test]
fn a_kernel_has_the_variants_of_its_helpers() {
    let (slow, fast) =
        ("fn f(x: f32) -> f32 { return x; }\n", "fn f(x: f32) -> f32 { return subgroupAdd(x); }\n");
    let tree = |test| Tree::new(test).twin("demo").kernel("demo", &uses("//use f\n")).helper("f", slow);
    let suffixes = |code: &str| {
        code.lines().filter_map(|line| Some(line.strip_prefix("suffix: \"")?.to_owned())).collect::<Vec<_>>()
    };

    let code = tree("helper_variant").helper("f_subgroup", fast).gate().unwrap();
    assert_eq!(suffixes(&code), ["\",", "subgroup\","], "one more");
    assert_eq!(
        (code.matches("return subgroupAdd").count(), code.matches("return x;").count()),
        (1, 1),
        "texts"
    );

    // With those of the kernel's own; a file of its own goes first.
    let own = uses("//use f\nenable f16;\n");
    let tree_f16 = |test| tree(test).variant("demo", "_f16", &own).helper("f_subgroup", fast);
    let code = tree_f16("variants_cross").gate().unwrap();
    assert_eq!(suffixes(&code), ["\",", "f16\",", "subgroup\",", "f16_subgroup\","], "each with each");
    let code = tree_f16("own_variant").variant("demo", "_subgroup", GOOD).gate().unwrap();
    assert_eq!(code.matches("subgroupAdd").count(), 1, "with f16 alone");

    // A fault of the kernel's text is one, whatever the variants; one of a helper's variant is where it is.
    let broken = uses("//use f\n").replace("params.scale", "params.scall");
    let found = tree("shared_fault").kernel("demo", &broken).helper("f_subgroup", fast).gate().unwrap_err();
    assert_eq!(found.len(), 1, "{found:?}");
    let found = tree("variant_fault").helper("f_subgroup", "fn f(x: f32) -> f32 { return 1u; }\n").gate();
    assert!(found.as_ref().unwrap_err()[0].starts_with("wgsl/f_subgroup.wgsl:1:"), "{found:?}");
    // A word that is no capability makes another helper, not a variant.
    let found = tree("other_helper").helper("f_fast", fast).gate().unwrap_err();
    assert_eq!(found, ["wgsl/f_fast.wgsl:1:1: unchecked, no kernel uses it"], "its own name");
}

#[test]
fn subgroups_are_as_large_as_what_is_used_says() {
    let tree = |test, own: &str, helper: &str| {
        let plain = "// F.\nfn f(x: f32) -> f32 { return x; }\n";
        let helper = format!("// F.\n{helper}fn f(x: f32) -> f32 {{ return subgroupAdd(x); }}\n");
        let kernel = uses(&format!("//use f\n{own}"));
        Tree::new(test).twin("demo").kernel("demo", &kernel).helper("f", plain).helper("f_subgroup", &helper)
    };
    let sizes = |tree: Tree| -> Vec<String> {
        let code = tree.gate().unwrap();
        code.lines()
            .filter_map(|line| line.trim().strip_prefix("subgroup_size: "))
            .map(str::to_owned)
            .collect()
    };
    assert_eq!(sizes(tree("subgroup_any", "", "")), ["0,", "0,"], "of any size");
    assert_eq!(sizes(tree("subgroup_8", "", "//subgroups of 8\n")), ["0,", "8,"], "the variant alone");

    let fault = |test, own, helper, want: &str| {
        assert_eq!(tree(test, own, helper).gate().unwrap_err(), [want], "{own:?}, {helper:?}");
    };
    let place = "wgsl/f_subgroup.wgsl:2:1";
    let number = format!("{place}: `many` invocations: invalid digit found in string");
    fault("subgroup_many", "", "//subgroups of many\n", &number);
    let late = "wgsl/f_subgroup.wgsl:3:1: what is used is named directly after the first line";
    fault("subgroup_late", "", "\n//subgroups of 8\n", late);
    let misspelt = format!("{place}: what is taken for granted is written `//subgroups of N`");
    fault("subgroup_misspelt", "", "//subgroup of 8\n", &misspelt);
    let nested = |test, of_f: &str, of_g: &str| {
        let f = format!("// F.\n//use g\n{of_f}fn f(x: f32) -> f32 {{ return g(x); }}\n");
        let g = format!("// G.\n{of_g}fn g(x: f32) -> f32 {{ return subgroupAdd(x); }}\n");
        let plain = "// F.\n//use g\nfn f(x: f32) -> f32 { return g(x); }\n";
        let tree = tree(test, "", "").helper("f", plain).helper("f_subgroup", &f);
        tree.helper("g", "// G.\nfn g(x: f32) -> f32 { return x; }\n").helper("g_subgroup", &g)
    };
    let [eight, sixteen] = ["//subgroups of 8\n", "//subgroups of 16\n"];
    assert_eq!(sizes(nested("subgroup_inner", eight, sixteen)), ["0,", "16,"], "the larger of two");
    assert_eq!(sizes(nested("subgroup_outer", sixteen, eight)), ["0,", "16,"], "whichever names it");
    let portable =
        "kernels/demo/demo.wgsl:3:1: subgroups are for a variant with the word `subgroup` or `coop`";
    fault("subgroup_portable", "//subgroups of 8\n", "", portable);
}

#[test]
fn faults_of_helpers_are_where_they_are() {
    let tree = |test| Tree::new(test).twin("demo").kernel("demo", &uses("//use a\n//use b\n"));
    let a = "// A.\n\nfn g(x: f32) -> f32 { return x; }\n";
    let b = |body: &str| format!("// B.\nfn f(x: f32) -> f32 {{\n    {body}\n}}\n");
    for (test, body, place, says) in [
        ("helper_type", "return 1u;", "3:12: ", "    return 1u;"),
        ("helper_syntax", "return ;;)", "3:14: ", "    return ;;)\n                 ^"),
        ("helper_name", "return g(y);", "3:14: ", "y"),
        ("helper_capability", "return subgroupAdd(x);", "3:12: ", "SUBGROUP"),
    ] {
        let found = tree(test).helper("a", a).helper("b", &b(body)).gate().unwrap_err();
        let first = format!("wgsl/b.wgsl:{place}");
        assert!(found[0].starts_with(&first) && found[0].contains(says), "{test}: {found:#?}");
    }
    // With a label in each of two files, each has its own place.
    let found = tree("helper_twice").helper("a", a).helper("b", &(b("return g(x);") + a)).gate().unwrap_err();
    assert!(found[0].contains("wgsl/a.wgsl:3:4: ") && found[0].contains("wgsl/b.wgsl:7:4: "), "{found:#?}");

    let one = |test, helper: &str, place: &str, what: &str| {
        let found = tree(test).helper("a", a).helper("b", &(b("return g(x);") + helper)).gate().unwrap_err();
        assert_eq!(found, [format!("wgsl/b.wgsl:{place}: {what}")], "{test}");
    };
    one(
        "helper_binding",
        "@group(0) @binding(3) var<storage> z: array<f32>;\n",
        "5:23",
        "`z` is a binding, which the kernel declares, not a helper",
    );
    one(
        "helper_entry",
        "@compute @workgroup_size(1) fn second() {}\n",
        "5:32",
        "2 entry points, a kernel has exactly one",
    );
    // The whole of a kernel but its bindings.
    let (bindings, entry) = GOOD.split_once("var<workgroup>").unwrap();
    let found = Tree::new("helper_kernel")
        .twin("demo")
        .kernel("demo", &bindings.replacen('\n', "\n//use entry\n", 1))
        .helper("entry", &format!("var<workgroup>{entry}"))
        .gate()
        .unwrap_err();
    assert_eq!(found, ["wgsl/entry.wgsl:3:4: the entry point `demo` is in a helper"], "entry point");
    one(
        "helper_memory",
        "var<workgroup> more: array<f32, 4096>;\n",
        "5:1",
        "16640 bytes of workgroup memory, the limit is 16384",
    );
}

#[test]
fn uses_lead_to_helpers() {
    let f = "fn f(x: f32) -> f32 { return x; }\n";
    let tree = |test, lines| Tree::new(test).twin("demo").kernel("demo", &uses(lines));
    assert_eq!(
        tree("no_helper", "//use f\n//use g\n").helper("f", f).gate().unwrap_err(),
        ["kernels/demo/demo.wgsl:3:1: the helper wgsl/g.wgsl does not exist"],
        "missing"
    );
    assert_eq!(
        tree("late_use", "//use f\n// Words.\n//use g\n").helper("f", f).gate().unwrap_err(),
        ["kernels/demo/demo.wgsl:4:1: what is used is named directly after the first line"],
        "late"
    );
    let circle = tree("circle", "//use f\n")
        .helper("f", &format!("// F.\n//use g\n{f}"))
        .helper("g", "// G.\n//use h\n//use f\n")
        .helper("h", "// H.\n//use g\n");
    assert_eq!(
        circle.gate().unwrap_err(),
        [
            "wgsl/h.wgsl:2:1: helpers use each other in a circle: g -> h -> g",
            "wgsl/g.wgsl:3:1: helpers use each other in a circle: f -> g -> f",
        ],
        "circles"
    );
    assert_eq!(
        tree("unused_helper", "//use f\n").helper("f", f).helper("g", f).gate().unwrap_err(),
        ["wgsl/g.wgsl:1:1: unchecked, no kernel uses it"],
        "unused"
    );
}

#[test]
fn a_fault_leaves_nothing_behind() {
    let tree = Tree::new("behind").twin("demo").kernel("demo", GOOD);
    let out = tree.0.join("kernels.rs");
    gate::build(&tree.folders(), &out).unwrap();
    assert!(fs::read_to_string(&out).unwrap().contains("fn demo("), "good");
    let broken = tree.kernel("demo", &GOOD.replace("x[i] *", "x[i] +* "));
    assert_eq!(gate::build(&broken.folders(), &out).unwrap_err().len(), 1, "one fault");
    assert!(!out.exists(), "no shader of an earlier build");
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
    let what = "must be an array, without a length, of f32, f16, u32, i32 or a vec2 or vec4 of one";
    for (test, ty) in
        [("vec3", "array<vec3<f32>>"), ("struct", "array<Params>"), ("length", "array<f32, 64>")]
    {
        let more = format!("@group(0) @binding(3) var<storage> z: {ty};\nvar<workgroup>");
        one_fault(test, "var<workgroup>", &more, &format!("9:23: `z` {what}"));
    }
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
    let tree = tree.variant("demo", "_fast", GOOD);
    let found = tree.gate().unwrap_err();
    let starts = [
        "kernels/demo/demo_fast.wgsl:1:1: `fast` is no capability",
        "kernels/demo/demo.wgsl:8:23: `y` must be",
        "kernels/demo/demo.wgsl:11:4: entry point `dem`",
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
