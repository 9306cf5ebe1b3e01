//! The dialects in which RWKV-7 tensors are named, and the official names they stand for.
//!
//! | dialect | told by | adapters |
//! |---|---|---|
//! | official (BlinkDL) | `emb.weight` | `w1 [D, rank]`, `w2 [rank, D]` |
//! | official names, as web-rwkv's converter writes them | the shapes of the adapters | `w1 [rank, D]`, `w2 [D, rank]` |
//! | Hugging Face / fla | `model.embeddings.weight` | `lora.0.weight [rank, D]`, `lora.2.weight [D, rank]` |

use std::collections::BTreeMap;

use super::Fault;
use super::directory::Entry;

/// How tensors are named.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dialect {
    /// BlinkDL's names, which web-rwkv's converter keeps.
    Official,
    /// The names of `RWKV7ForCausalLM` in flash-linear-attention.
    Fla,
}

/// Tensors that only other architectures have, and which those are.
const FOREIGN: [(&str, &str); 5] = [
    (".ffn.s_emb", "RWKV-7a or 7b (DeepEmbed)"),
    (".ffn.s0", "RWKV-7a or 7b (DeepEmbed)"),
    (".att.time_decay", "RWKV-4, 5 or 6"),
    (".att.time_mix_k", "RWKV-4 or 5"),
    (".att.time_maa_x", "RWKV-6"),
];

/// Renames every tensor to its official name.
pub(super) fn official(
    tensors: BTreeMap<String, Entry>,
) -> Result<(Dialect, BTreeMap<String, Entry>), Fault> {
    let lower = rename(tensors, str::to_lowercase)?;
    for name in lower.keys() {
        if let Some((_, architecture)) = FOREIGN.iter().find(|(part, _)| name.contains(part)) {
            return Err(Fault::Architecture { tensor: name.clone(), architecture });
        }
    }
    if lower.contains_key("emb.weight") {
        return Ok((Dialect::Official, lower));
    }
    if !lower.contains_key("model.embeddings.weight") {
        return Err(Fault::NoEmbedding { tensors: lower.len(), first: lower.into_keys().next() });
    }
    Ok((Dialect::Fla, rename(lower, from_fla)?))
}

/// Renames every tensor; two that come to the same name are a fault.
fn rename(
    tensors: BTreeMap<String, Entry>,
    to: impl Fn(&str) -> String,
) -> Result<BTreeMap<String, Entry>, Fault> {
    let mut renamed = BTreeMap::new();
    for (name, entry) in tensors {
        let tensor = to(&name);
        if renamed.insert(tensor.clone(), entry).is_some() {
            return Err(Fault::Duplicate { tensor, name });
        }
    }
    Ok(renamed)
}

/// The official name of an fla tensor; names that mean nothing here stay as they are.
fn from_fla(name: &str) -> String {
    let whole = match name {
        "model.embeddings.weight" => Some("emb.weight"),
        "model.norm.weight" => Some("ln_out.weight"),
        "model.norm.bias" => Some("ln_out.bias"),
        "lm_head.weight" => Some("head.weight"),
        _ => None,
    };
    let layer = || {
        let (layer, rest) = name.strip_prefix("model.layers.")?.split_once('.')?;
        let (part, rest) = rest.split_once('.')?;
        Some(match part {
            "pre_norm" => format!("blocks.{layer}.ln0.{rest}"),
            "attn_norm" => format!("blocks.{layer}.ln1.{rest}"),
            "ffn_norm" => format!("blocks.{layer}.ln2.{rest}"),
            "attn" => format!("blocks.{layer}.att.{}", attention_from_fla(rest)?),
            "ffn" => format!("blocks.{layer}.ffn.{rest}"),
            _ => return None,
        })
    };
    whole.map(str::to_owned).or_else(layer).unwrap_or_else(|| name.to_owned())
}

fn attention_from_fla(name: &str) -> Option<String> {
    Some(match name {
        "r_proj.weight" => "receptance.weight".to_owned(),
        "k_proj.weight" => "key.weight".to_owned(),
        "v_proj.weight" => "value.weight".to_owned(),
        "o_proj.weight" => "output.weight".to_owned(),
        "g_norm.weight" => "ln_x.weight".to_owned(),
        "g_norm.bias" => "ln_x.bias".to_owned(),
        _ => match name.split_once("_lora.lora.") {
            Some((adapter, "0.weight")) => format!("{adapter}1"),
            Some((adapter, "2.weight")) => format!("{adapter}2"),
            Some((adapter, "2.bias")) => format!("{adapter}0"),
            Some(_) => return None,
            None => name.to_owned(),
        },
    })
}

#[cfg(test)]
mod tests {
    use super::from_fla;

    #[test]
    fn fla_names() {
        for (fla, official) in [
            ("model.embeddings.weight", "emb.weight"),
            ("model.layers.0.pre_norm.bias", "blocks.0.ln0.bias"),
            ("model.layers.11.attn.w_lora.lora.2.bias", "blocks.11.att.w0"),
            ("model.layers.3.attn.g_lora.lora.0.weight", "blocks.3.att.g1"),
            ("model.layers.3.attn.v_lora.lora.2.weight", "blocks.3.att.v2"),
            ("model.layers.3.attn.x_r", "blocks.3.att.x_r"),
            ("model.layers.3.ffn.key.weight", "blocks.3.ffn.key.weight"),
            ("model.layers.3.attn.w_lora.lora.7.bias", "model.layers.3.attn.w_lora.lora.7.bias"),
            ("lm_head.weight", "head.weight"),
        ] {
            assert_eq!(from_fla(fla), official, "{fla}");
        }
    }
}
