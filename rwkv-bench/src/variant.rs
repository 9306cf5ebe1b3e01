//! Ways to run an engine, as they are named on a command line.

use std::str::FromStr;

use anyhow::{Context, bail};
use rwkv_model::quality::Rest;
use rwkv_model::skip::{Listed, Middle, SkipPolicy, Skipping};
use rwkv_model::{EngineOptions, SkipPart, SkipShifts, Wkv};

use crate::states::rows;

/// What a variant is named by, for `--help`.
pub(crate) const GRAMMAR: &str = "settings, by commas: state=NAME as `states` names them (f16-c16, int8-c16, rest-sparse-512, ..); \
    skip=first10, middle or list:3+4, part=layer or ffn, shifts=refreshed or frozen; wkv=sequential or chunked:16; \
    zeros=read; adapters=f32; fused=no; norm=apart; portable=yes; invariant=yes";

/// A way to run an engine.
#[derive(Clone, Debug)]
pub(crate) struct Variant {
    /// As it was asked for.
    pub(crate) name: String,
    settings: Vec<Setting>,
    /// Whether states rest on the way.
    pub(crate) rest: Option<Rest>,
}

#[derive(Clone, Debug)]
enum Setting {
    State(rwkv_model::Resident),
    Skip(Skipping),
    Wkv(Wkv),
    ReadZeros,
    WideAdapters,
    Unfused,
    NormApart,
    Portable,
    Invariant,
}

impl Variant {
    /// With nothing set.
    pub(crate) fn plain() -> Self {
        Self { name: "plain".to_owned(), settings: Vec::new(), rest: None }
    }

    /// The options with all that is set.
    pub(crate) fn apply(&self, mut options: EngineOptions) -> EngineOptions {
        for setting in &self.settings {
            match setting {
                Setting::State(state) => options.state = *state,
                Setting::Skip(skipping) => options.skip = Some(skipping.clone()),
                Setting::Wkv(form) => options.wkv = Some(*form),
                Setting::ReadZeros => options.skip_zeros = false,
                Setting::WideAdapters => options.wide_adapters = true,
                Setting::Unfused => options.fused = false,
                Setting::NormApart => options.fused_norm = false,
                Setting::Portable => options.portable = true,
                Setting::Invariant => options.batch_invariant = true,
            }
        }
        options
    }
}

/// Which layers, as `skip=` names them.
fn policy(text: &str) -> anyhow::Result<Skipping> {
    fn new(policy: impl SkipPolicy + 'static) -> Skipping {
        Skipping { prefill: true, ..Skipping::new(policy) }
    }
    match text.split_once(':') {
        None if text == "middle" => Ok(new(Middle::default())),
        None if text == "first10" => Ok(new(Middle { first_tokens: Some(10) })),
        Some(("list", layers)) => {
            let layers = layers.split('+').map(str::parse).collect::<Result<Vec<usize>, _>>();
            Ok(new(Listed(layers.with_context(|| format!("skip={text}: numbers of layers, by +"))?)))
        }
        _ => bail!("skip={text}: middle, first10 or list:3+4"),
    }
}

impl FromStr for Variant {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> anyhow::Result<Self> {
        let mut variant = Self { name: text.to_owned(), settings: Vec::new(), rest: None };
        let (mut skipping, mut part, mut shifts) = (None, SkipPart::Layer, SkipShifts::Refreshed);
        for setting in text.split(',') {
            match setting.split_once('=').unwrap_or((setting, "")) {
                ("state", name) => {
                    let row = rows::all().into_iter().find(|row| row.name == name);
                    let row = row.with_context(|| format!("no state {name}"))?;
                    variant.settings.push(Setting::State(row.state));
                    variant.rest = row.rest;
                }
                ("skip", which) => skipping = Some(policy(which)?),
                ("part", "layer") => part = SkipPart::Layer,
                ("part", "ffn") => part = SkipPart::ChannelMix,
                ("shifts", "refreshed") => shifts = SkipShifts::Refreshed,
                ("shifts", "frozen") => shifts = SkipShifts::Frozen,
                ("wkv", "sequential") => variant.settings.push(Setting::Wkv(Wkv::Sequential)),
                ("wkv", form) => {
                    let chunk = form.strip_prefix("chunked:").and_then(|n| n.parse().ok());
                    let chunk = chunk.with_context(|| format!("wkv={form}: sequential or chunked:16"))?;
                    variant.settings.push(Setting::Wkv(Wkv::Chunked(chunk)));
                }
                ("zeros", "read") => variant.settings.push(Setting::ReadZeros),
                ("adapters", "f32") => variant.settings.push(Setting::WideAdapters),
                ("fused", "no") => variant.settings.push(Setting::Unfused),
                ("norm", "apart") => variant.settings.push(Setting::NormApart),
                ("portable", "yes") => variant.settings.push(Setting::Portable),
                ("invariant", "yes") => variant.settings.push(Setting::Invariant),
                _ => bail!("no setting `{setting}`; {GRAMMAR}"),
            }
        }
        variant.settings.extend(skipping.map(|of| Setting::Skip(Skipping { part, shifts, ..of })));
        Ok(variant)
    }
}

#[cfg(test)]
mod tests {
    use rwkv_model::{EngineOptions, Resident, SkipPart, Wkv};

    use super::Variant;

    #[test]
    fn settings_are_named() {
        let of = |text: &str| text.parse::<Variant>().map(|of| of.apply(EngineOptions::default()));
        let options = of("state=int8-c16,part=ffn,skip=list:3+4,wkv=chunked:32,zeros=read").unwrap();
        assert_eq!((options.state, options.wkv), (Resident::int8(16), Some(Wkv::Chunked(32))), "both");
        let skip = options.skip.unwrap();
        let out: Vec<usize> = (0..8).filter(|&layer| skip.policy.skips(layer, 8, 0)).collect();
        assert_eq!((out, skip.part, skip.prefill), (vec![3, 4], SkipPart::ChannelMix, true), "layers");
        assert!(!options.skip_zeros && Variant::plain().apply(EngineOptions::default()).skip_zeros, "zeros");
        assert!(!of("norm=apart").unwrap().fused_norm && of("norm=apart").unwrap().fused, "the norm alone");
        assert!("state=rest-sparse-512".parse::<Variant>().unwrap().rest.is_some(), "at rest");
        for bad in ["", "state=f64", "skip=list:x", "wkv=chunked", "zeros=written"] {
            assert!(bad.parse::<Variant>().is_err(), "{bad}");
        }
    }
}
