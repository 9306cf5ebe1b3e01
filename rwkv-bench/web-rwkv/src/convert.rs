//! `convert`: a model as it is published, in the layout that web-rwkv reads.
//!
//! The input is mapped and the output written tensor by tensor, so that no more than one tensor is held in memory.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::Write;
use std::path::Path;

use anyhow::Context;
use half::{bf16, f16};
use safetensors::tensor::{Metadata, TensorInfo, TensorView};
use safetensors::{Dtype, SafeTensors};

use crate::layout::{Dialect, Dims, Fault, find, is_factor};

/// Writes the model in `from` to `to`. A file that was at `to` stays there unless all goes well.
pub(crate) fn convert(from: &Path, to: &Path) -> anyhow::Result<()> {
    let data = crate::map(from)?;
    let file = SafeTensors::deserialize(&data).map_err(Fault::from)?;
    let dims = Dims::read(&file, Dialect::Official)?;
    let mut part = to.as_os_str().to_owned();
    part.push(".part");
    let part = Path::new(&part);
    write(&file, &dims, part)
        .and_then(|()| Ok(fs::rename(part, to)?))
        .inspect_err(|_| _ = fs::remove_file(part))
        .with_context(|| to.display().to_string())
}

fn write(file: &SafeTensors<'_>, dims: &Dims, path: &Path) -> anyhow::Result<()> {
    let (mut infos, mut end) = (Vec::new(), 0);
    let tensors = dims.tensors(Dialect::WebRwkv);
    for (name, shape) in &tensors {
        let start = end;
        end += size_of::<f16>() * shape.iter().product::<usize>();
        let info = TensorInfo { dtype: Dtype::F16, shape: shape.clone(), data_offsets: (start, end) };
        infos.push((name.clone(), info));
    }
    let about = HashMap::from([("layout".to_owned(), "web-rwkv".to_owned())]);
    let mut header = serde_json::to_vec(&Metadata::new(Some(about), infos)?)?;
    header.resize(header.len().next_multiple_of(8), b' '); // so that the tensors lie aligned in a mapping

    let mut out = File::create(path)?;
    out.write_all(&u64::try_from(header.len())?.to_le_bytes())?;
    out.write_all(&header)?;
    for (name, shape) in &tensors {
        let mut values = halves(name, &find(file, name)?)?;
        if is_factor(name) {
            values = transposed(&values, shape[0]);
        }
        out.write_all(values.as_flattened())?;
    }
    out.flush()?;
    Ok(())
}

/// The elements in F16, little-endian. One that F16 cannot hold is a fault: web-rwkv would compute with infinity.
fn halves(tensor: &str, view: &TensorView<'_>) -> Result<Vec<[u8; 2]>, Fault> {
    let checked = |value: f32| {
        let half = f16::from_f32(value);
        if half.is_finite() {
            Ok(half.to_le_bytes())
        } else {
            Err(Fault::Range { tensor: tensor.to_owned(), value })
        }
    };
    let (bytes, _) = view.data().as_chunks::<2>();
    match view.dtype() {
        Dtype::F16 => bytes.iter().map(|&b| checked(f16::from_le_bytes(b).to_f32())).collect(),
        Dtype::BF16 => bytes.iter().map(|&b| checked(bf16::from_le_bytes(b).to_f32())).collect(),
        Dtype::F32 => {
            view.data().as_chunks::<4>().0.iter().map(|&b| checked(f32::from_le_bytes(b))).collect()
        }
        got => {
            Err(Fault::Type { tensor: tensor.to_owned(), got, want: &[Dtype::F16, Dtype::BF16, Dtype::F32] })
        }
    }
}

/// `[rows, columns]` to `[columns, rows]`.
fn transposed(values: &[[u8; 2]], columns: usize) -> Vec<[u8; 2]> {
    (0..columns).flat_map(|column| values.iter().skip(column).step_by(columns).copied()).collect()
}

#[cfg(test)]
mod tests {
    use safetensors::serialize;
    use safetensors::tensor::TensorView;

    use super::*;

    /// Name, shape and bytes of each tensor.
    type Tensors = Vec<(String, Vec<usize>, Vec<u8>)>;

    const DIMS: (usize, usize) = (128, 8); // width and rank

    /// A model of two layers in the official layout, every element of which is its index within its tensor, reduced;
    /// `dtype` as given for all tensors.
    fn official(dtype: Dtype, value: impl Fn(usize) -> f32) -> Tensors {
        let (d, rank) = DIMS;
        let mut tensors = Vec::new();
        let mut push = |name: &str, shape: &[usize]| {
            let elements = (0..shape.iter().product()).map(&value);
            let data = elements
                .flat_map(|x| match dtype {
                    Dtype::F32 => x.to_le_bytes().to_vec(),
                    Dtype::BF16 => bf16::from_f32(x).to_le_bytes().to_vec(),
                    _ => f16::from_f32(x).to_le_bytes().to_vec(),
                })
                .collect();
            tensors.push((name.to_owned(), shape.to_vec(), data));
        };
        push("emb.weight", &[16, d]);
        push("head.weight", &[16, d]);
        push("ln_out.weight", &[d]);
        push("ln_out.bias", &[d]);
        push("blocks.0.ln0.weight", &[d]);
        push("blocks.0.ln0.bias", &[d]);
        for layer in 0..2 {
            let mut push = |name: &str, shape: &[usize]| push(&format!("blocks.{layer}.{name}"), shape);
            for norm in ["ln1", "ln2", "att.ln_x"] {
                push(&format!("{norm}.weight"), &[d]);
                push(&format!("{norm}.bias"), &[d]);
            }
            for x in ["x_r", "x_w", "x_k", "x_v", "x_a", "x_g", "k_k", "k_a", "w0", "a0", "v0"] {
                push(&format!("att.{x}"), &[1, 1, d]);
            }
            for x in ["w", "a", "v", "g"] {
                push(&format!("att.{x}1"), &[d, rank]);
                push(&format!("att.{x}2"), &[rank, d]);
            }
            push("att.r_k", &[2, 64]);
            for x in ["receptance", "key", "value", "output"] {
                push(&format!("att.{x}.weight"), &[d, d]);
            }
            push("ffn.x_k", &[1, 1, d]);
            push("ffn.key.weight", &[4 * d, d]);
            push("ffn.value.weight", &[d, 4 * d]);
        }
        tensors
    }

    fn bytes(dtype: Dtype, tensors: &[(String, Vec<usize>, Vec<u8>)]) -> Vec<u8> {
        let view = |shape: &Vec<usize>, data| TensorView::new(dtype, shape.clone(), data).unwrap();
        serialize(tensors.iter().map(|(name, shape, data)| (name, view(shape, data))), None).unwrap()
    }

    /// The converted bytes, or the fault.
    fn converted(name: &str, input: &[u8]) -> anyhow::Result<Vec<u8>> {
        let folder = std::env::temp_dir().join(format!("web-rwkv-bench-{}-{name}", std::process::id()));
        fs::create_dir_all(&folder)?;
        let (from, to) = (folder.join("in"), folder.join("out"));
        fs::write(&from, input)?;
        let result = convert(&from, &to);
        let left = fs::read_dir(&folder)?.count();
        assert_eq!(left, if result.is_ok() { 2 } else { 1 }, "nothing else is left behind");
        let output = result.and_then(|()| Ok(fs::read(&to)?));
        fs::remove_dir_all(&folder)?;
        output
    }

    fn index(i: usize) -> f32 {
        (i % 251) as f32 // exact in all three types
    }

    #[test]
    fn values_and_layout() {
        let mut outputs = Vec::new();
        for dtype in [Dtype::F16, Dtype::BF16, Dtype::F32] {
            outputs.push(converted(&format!("{dtype:?}"), &bytes(dtype, &official(dtype, index))).unwrap());
        }
        assert_eq!(outputs[0], outputs[1], "BF16 gives what F16 gives");
        assert_eq!(outputs[0], outputs[2], "F32 gives what F16 gives");

        let file = SafeTensors::deserialize(&outputs[0]).unwrap();
        Dims::read(&file, Dialect::WebRwkv).expect("the output is what web-rwkv reads");
        assert!(Dims::read(&file, Dialect::Official).is_err(), "and no longer the official layout");
        let (d, rank) = DIMS;
        let at = |name: &str, i: usize| {
            f16::from_le_bytes(file.tensor(name).unwrap().data().as_chunks::<2>().0[i]).to_f32()
        };
        for (row, column) in [(0, 0), (3, 1), (7, 127), (5, 64)] {
            assert_eq!(at("blocks.1.att.v1", row * d + column), index(column * rank + row), "v1 [rank, D]");
            assert_eq!(at("blocks.0.att.g2", column * rank + row), index(row * d + column), "g2 [D, rank]");
            assert_eq!(
                at("blocks.1.ffn.key.weight", row * d + column),
                index(row * d + column),
                "key as it was"
            );
        }
        assert!(file.tensor("blocks.0.att.v1").is_err(), "layer 0 needs no value residual");
    }

    #[test]
    fn faults() {
        let good = official(Dtype::F16, index);
        let fault = |name: &str, edit: &dyn Fn(&mut Tensors)| {
            let mut tensors = good.clone();
            edit(&mut tensors);
            converted(name, &bytes(Dtype::F16, &tensors)).unwrap_err().to_string()
        };
        let place = |name: &str| good.iter().position(|(tensor, ..)| tensor == name).unwrap();
        let (key, r_k, w1) =
            (place("blocks.0.ffn.key.weight"), place("blocks.0.att.r_k"), place("blocks.1.att.w1"));
        for (name, edit, want) in [
            (
                "missing",
                &(|t: &mut Tensors| _ = t.remove(r_k)) as &dyn Fn(&mut Tensors),
                "`blocks.0.att.r_k` is missing",
            ),
            ("heads", &|t| t[r_k].1 = vec![1, 128], "1 heads of 128"),
            ("flat", &|t| t[key].1 = vec![512 * 128], "`blocks.0.ffn.key.weight` has 1 axes, not 2"),
            (
                "shape",
                &|t| t[key].1 = vec![128, 512],
                "`blocks.0.ffn.key.weight` is [128, 512], not [128, 128]",
            ),
            ("layout", &|t| t[w1].1 = vec![8, 128], "`blocks.1.att.w1` is [8, 128]: not the official layout"),
            (
                "foreign",
                &|t| t[w1].0 = "blocks.1.ffn.s_emb.weight".to_owned(),
                "`blocks.1.att.w1` is missing",
            ),
            (
                "unknown",
                &|t| t.push(("blocks.0.ffn.s_emb.weight".to_owned(), vec![0], Vec::new())),
                "`blocks.0.ffn.s_emb.weight` is no tensor of RWKV-7",
            ),
            (
                "layers",
                &|t| t.retain(|(tensor, ..)| !tensor.starts_with("blocks.1.")),
                "1 layer: web-rwkv takes the rank",
            ),
        ] {
            let got = fault(name, edit);
            assert!(got.contains(want), "{name}: {got}");
        }
        let whole = bytes(Dtype::F16, &good);
        for cut in [0, 7, 8, 100, whole.len() - 1] {
            converted("cut", &whole[..cut]).expect_err("a file cut short");
        }
        let wide = official(Dtype::BF16, |i| if i == 5 { 1e5 } else { 0.0 });
        let got = converted("range", &bytes(Dtype::BF16, &wide)).unwrap_err();
        assert!(format!("{got:#}").contains("which F16 cannot"), "{got:#}");
    }
}
