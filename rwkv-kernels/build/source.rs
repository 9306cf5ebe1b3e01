//! A kernel's text and the helpers that it names, joined, with the way back to the file of every byte.

use std::collections::BTreeSet;
use std::fs;
use std::ops::Range;
use std::path::Path;

use super::shader::Features;

/// Opens a line that names a helper.
const USE: &str = "//use ";

/// Opens a line that says how many invocations a subgroup has at least where this is used.
const SUBGROUPS: &str = "//subgroups of ";

/// The texts, joined. The kernel's own comes first, so that its `enable` directives do.
#[derive(Default)]
pub(super) struct Source {
    pub(super) text: String,
    /// What the helpers that are used have variants for, granted here or not.
    pub(super) variants: BTreeSet<Features>,
    /// What is taken for granted of subgroups: their invocations, at least.
    pub(super) subgroup_size: u32,
    /// Where each file starts and its path, in order.
    files: Vec<(usize, String)>,
}

impl Source {
    /// The text of `path` with all that it uses from the folder `helpers`, each in the variant that makes most of
    /// what is `granted`. Adds the names of their files to `used`.
    pub(super) fn join(
        path: &Path,
        helpers: &Path,
        granted: Features,
        used: &mut BTreeSet<String>,
        faults: &mut Vec<String>,
    ) -> Self {
        let mut source = Self::default();
        let mut joining =
            Joining { helpers, granted, open: Vec::new(), joined: BTreeSet::new(), used, faults };
        source.add(path, &mut joining);
        source
    }

    fn add(&mut self, path: &Path, joining: &mut Joining<'_>) {
        let own = match fs::read_to_string(path) {
            Ok(text) => text,
            Err(e) => return joining.faults.push(format!("{}: {e}", path.display())),
        };
        let start = self.text.len();
        self.files.push((start, path.display().to_string()));
        self.text.push_str(&own);
        if !own.ends_with('\n') {
            self.text.push('\n');
        }
        let (mut at, mut directly) = (start, true);
        for (i, line) in own.split_inclusive('\n').enumerate() {
            match [USE, SUBGROUPS].map(|opening| line.strip_prefix(opening)) {
                [None, None] if line.starts_with("//subgroup") => {
                    let what = format!("what is taken for granted is written `{SUBGROUPS}N`");
                    joining.faults.push(self.fault(at, &what));
                }
                [None, None] => directly &= i == 0,
                _ if i == 0 || !directly => {
                    let what = "what is used is named directly after the first line";
                    joining.faults.push(self.fault(at, what));
                }
                [Some(name), _] => self.add_helper(name.trim(), at, joining),
                [None, Some(size)] => self.add_subgroups(size.trim(), at, joining),
            }
            at += line.len();
        }
    }

    /// Adds what the line at `at` takes for granted.
    fn add_subgroups(&mut self, size: &str, at: usize, joining: &mut Joining<'_>) {
        match size.parse() {
            _ if !(joining.granted.subgroup || joining.granted.coop) => {
                let what = "subgroups are for a variant with the word `subgroup` or `coop`";
                joining.faults.push(self.fault(at, what));
            }
            Ok(size) => self.subgroup_size = self.subgroup_size.max(size),
            Err(e) => joining.faults.push(self.fault(at, &format!("`{size}` invocations: {e}"))),
        }
    }

    /// Adds what the line at `at` names, unless it is there.
    fn add_helper(&mut self, name: &str, at: usize, joining: &mut Joining<'_>) {
        let path = joining.helpers.join(format!("{name}.wgsl"));
        if let Some(outer) = joining.open.iter().position(|open| open == name) {
            let circle = [&joining.open[outer..], &[name.to_owned()]].concat().join(" -> ");
            joining.faults.push(self.fault(at, &format!("helpers use each other in a circle: {circle}")));
        } else if !path.is_file() {
            let what = format!("the helper {} does not exist", path.display());
            joining.faults.push(self.fault(at, &what));
        } else if joining.joined.insert(name.to_owned()) {
            let variants = variants(joining.helpers, name);
            let best = variants.iter().filter(|(of, _)| of.without(joining.granted) == Features::default());
            let file = best.max().map_or(name, |(_, file)| file);
            joining.used.insert(file.to_owned());
            joining.open.push(name.to_owned());
            self.add(&joining.helpers.join(format!("{file}.wgsl")), joining);
            self.variants.extend(variants.into_iter().map(|(features, _)| features));
            joining.open.pop();
        }
    }

    /// `path:line:column` of a byte, in the file that holds it.
    pub(super) fn place(&self, at: usize) -> String {
        let (start, path) = &self.files[self.files.partition_point(|(start, _)| *start <= at) - 1];
        let before = &self.text[*start..at];
        let line = before.matches('\n').count() + 1;
        let column = at - start - before.rfind('\n').map_or(0, |newline| newline + 1) + 1;
        format!("{path}:{line}:{column}")
    }

    /// What is wrong at a byte.
    pub(super) fn fault(&self, at: usize, what: &str) -> String {
        format!("{}: {what}", self.place(at))
    }

    /// Whether a byte is of a helper.
    pub(super) fn in_helper(&self, at: usize) -> bool {
        self.files.get(1).is_some_and(|(start, _)| at >= *start)
    }

    /// The line that holds the start of `span`, and below it carets under the span, as far as it goes there.
    pub(super) fn excerpt(&self, span: Range<usize>) -> String {
        let start = self.text[..span.start].rfind('\n').map_or(0, |newline| newline + 1);
        let end = self.text[span.start..].find('\n').map_or(self.text.len(), |newline| span.start + newline);
        let line = self.text[start..end].replace('\t', " ");
        let carets = span.end.min(end).saturating_sub(span.start).max(1);
        format!("    {line}\n    {:1$}{2}", "", span.start - start, "^".repeat(carets))
    }

    /// Where `word` stands in `range` outside line comments; the start of `range` if it does not.
    pub(super) fn find(&self, word: &str, range: Range<usize>) -> usize {
        let text = &self.text[range.clone()];
        let in_word = |c: char| c.is_alphanumeric() || c == '_';
        let stands = |at: usize| {
            let (before, after) = (&text[..at], &text[at + word.len()..]);
            let line = before.rsplit('\n').next().unwrap_or(before);
            !before.ends_with(in_word) && !after.starts_with(in_word) && !line.contains("//")
        };
        let found = text.match_indices(word).map(|(at, _)| at).find(|&at| stands(at));
        range.start + found.unwrap_or(0)
    }

    pub(super) fn find_anywhere(&self, word: &str) -> usize {
        self.find(word, 0..self.text.len())
    }
}

/// What is known while files are joined.
struct Joining<'a> {
    helpers: &'a Path,
    granted: Features,
    /// The helpers that led to the present file.
    open: Vec<String>,
    joined: BTreeSet<String>,
    used: &'a mut BTreeSet<String>,
    faults: &'a mut Vec<String>,
}

/// The variants of a helper: what each takes and its file's name, without the end.
fn variants(helpers: &Path, name: &str) -> Vec<(Features, String)> {
    let files = fs::read_dir(helpers).into_iter().flatten().flatten();
    let stems = files.filter_map(|file| Some(file.path().file_stem()?.to_string_lossy().into_owned()));
    let of = |stem: &str| Features::of(stem.strip_prefix(name)?.strip_prefix('_')?).ok();
    stems.filter_map(|stem| Some((of(&stem)?, stem))).collect()
}
