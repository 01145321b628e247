//! depmod's index, and what it says to load: pure.
//!
//! Reads the text forms of `modules.dep`, `modules.alias`, `modules.softdep` and `modules.builtin` (depmod(8), modules.dep(5)).
//! Lines that make no sense are left out: a broken line should cost one module, not the boot. Names are compared with `-` and `_`
//! being the same, as the kernel does.

use std::borrow::Cow;
use std::collections::BTreeSet;

/// Longest index file that is read, in bytes; longer ones are cut at a line.
pub const MAX_INDEX: usize = 32 * 1024 * 1024;
/// Deepest chain of dependencies that is followed; the kernel's are below ten.
const MAX_DEPTH: usize = 64;

/// One module to load.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Step {
    /// Its name, with `_`.
    pub name: String,
    /// Its file, relative to `/lib/modules/RELEASE`.
    pub path: String,
    /// Nothing else needs it (a soft dependency): its failure does not matter.
    pub optional: bool,
}

/// A line of `modules.dep`.
#[derive(Debug, Clone, Copy)]
struct Entry<'a> {
    path: &'a str,
    /// The one that is needed first comes last.
    needs: &'a str,
}

/// The index: its texts, in which is looked when something is asked for. Few lines ever are, and the first answer must come
/// soon: the network waits for its driver.
#[derive(Debug, Clone, Default)]
pub struct Index {
    dep: String,
    alias: String,
    softdep: String,
    builtin: String,
}

/// What a request comes to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Plan {
    /// Load these, in this order. Empty: it is built in.
    Load(Vec<Step>),
    /// Nothing of that name, and no alias matches.
    Unknown,
}

impl Index {
    /// Takes the four files' texts; any may be empty.
    #[must_use]
    pub fn new(
        dep: impl Into<String>,
        alias: impl Into<String>,
        softdep: impl Into<String>,
        builtin: impl Into<String>,
    ) -> Self {
        Self {
            dep: dep.into(),
            alias: alias.into(),
            softdep: softdep.into(),
            builtin: builtin.into(),
        }
    }

    /// Whether no module has a file.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        lines(&self.dep).next().is_none()
    }

    /// The module of this name, folded.
    fn entry(&self, name: &str) -> Option<Entry<'_>> {
        lines(&self.dep).find_map(|line| {
            let (path, needs) = line.split_once(':')?;
            is_file_of(path, name).then_some(Entry { path, needs })
        })
    }

    fn is_builtin(&self, name: &str) -> bool {
        lines(&self.builtin).any(|path| is_file_of(path, name))
    }

    /// What to load for a module's name or a device's alias.
    #[must_use]
    pub fn plan(&self, request: &str) -> Plan {
        let request = request.trim();
        let mut walk = Walk { index: self, seen: BTreeSet::new(), steps: Vec::new() };
        // A device's alias has a colon, which no name has.
        if !request.contains(':') {
            let name = fold(request);
            if self.entry(&name).is_some() {
                walk.visit(&name, false, 0);
                return Plan::Load(walk.steps);
            }
            if self.is_builtin(&name) {
                return Plan::Load(Vec::new());
            }
        }
        let mut known = false;
        for module in self.matches(request) {
            known |= walk.visit(&module, false, 0) || self.is_builtin(&module);
        }
        if known { Plan::Load(walk.steps) } else { Plan::Unknown }
    }

    /// The modules whose aliases match, in the index's order.
    fn matches(&self, alias: &str) -> Vec<String> {
        let kind = bucket(alias);
        let alias = fold_alias(alias);
        let mut found = Vec::new();
        for line in lines(&self.alias) {
            let words = line.strip_prefix("alias ").and_then(|rest| rest.split_once(' '));
            let Some((pattern, module)) = words else { continue };
            // Most are of another kind; one whose kind has a wildcard is of any.
            let may = pattern.starts_with(kind) || bucket(pattern).is_empty();
            if may && glob(fold_alias(pattern).as_bytes(), alias.as_bytes()) {
                let module = fold(module.trim());
                if !found.contains(&module) {
                    found.push(module);
                }
            }
        }
        found
    }

    /// What a module softly wants before it, or after it.
    fn soft(&self, name: &str, list: &str) -> Vec<&str> {
        let mut wanted = Vec::new();
        for line in lines(&self.softdep) {
            let mut words = line.split_whitespace();
            if words.next() != Some("softdep") || words.next().is_none_or(|it| !is_name(it, name)) {
                continue;
            }
            let mut is_wanted = false;
            for word in words {
                match word {
                    "pre:" | "post:" => is_wanted = word == list,
                    _ if is_wanted => wanted.push(word),
                    _ => {}
                }
            }
        }
        wanted
    }
}

struct Walk<'a> {
    index: &'a Index,
    seen: BTreeSet<String>,
    steps: Vec<Step>,
}

impl Walk<'_> {
    /// Dependencies first, then the module, then what it softly wants after it. Whether there is such a module.
    fn visit(&mut self, name: &str, optional: bool, depth: usize) -> bool {
        let Some(entry) = self.index.entry(name) else { return false };
        if depth > MAX_DEPTH {
            return true;
        }
        if !self.seen.insert(name.to_owned()) {
            // Wanted softly before, needed now.
            if let Some(step) = self.steps.iter_mut().find(|step| step.name == name) {
                step.optional &= optional;
            }
            return true;
        }
        for wanted in self.index.soft(name, "pre:") {
            self.visit_soft(wanted, depth);
        }
        for needed in entry.needs.split_whitespace().rev() {
            self.visit(&file_name(needed), optional, depth.saturating_add(1));
        }
        let path = entry.path.to_owned();
        self.steps.push(Step { name: name.to_owned(), path, optional });
        for wanted in self.index.soft(name, "post:") {
            self.visit_soft(wanted, depth);
        }
        true
    }

    /// A soft dependency may name an alias (`crypto-sha256`).
    fn visit_soft(&mut self, wanted: &str, depth: usize) {
        let name = fold(wanted);
        if !self.visit(&name, true, depth.saturating_add(1)) && !self.index.is_builtin(&name) {
            for module in self.index.matches(wanted) {
                self.visit(&module, true, depth.saturating_add(1));
            }
        }
    }
}

/// The names in a list: one a line, `#` begins a remark.
pub fn names(text: &str) -> impl Iterator<Item = &str> {
    let bare = |line: &'_ str| line.split('#').next().unwrap_or_default().len();
    text.lines()
        .map(move |line| line.get(..bare(line)).unwrap_or_default().trim())
        .filter(|name| !name.is_empty())
}

fn lines(text: &str) -> impl Iterator<Item = &str> {
    let text = text.get(..text.floor_char_boundary(MAX_INDEX)).unwrap_or_default();
    text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'))
}

/// A module's name with `_` in the place of `-`.
fn fold(name: &str) -> String {
    name.replace('-', "_")
}

/// The same outside brackets, where `-` is a range.
fn fold_alias(alias: &str) -> Cow<'_, str> {
    if !alias.contains('-') {
        return Cow::Borrowed(alias);
    }
    let mut inside = false;
    let change = |c| {
        match c {
            '[' => inside = true,
            ']' => inside = false,
            '-' if !inside => return '_',
            _ => {}
        }
        c
    };
    Cow::Owned(alias.chars().map(change).collect())
}

/// The name of a module from its file's path: `kernel/a/b-c.ko.xz` is `b_c`.
fn file_name(path: &str) -> String {
    let file = path.trim().rsplit('/').next().unwrap_or_default();
    fold(file.split(".ko").next().unwrap_or_default())
}

/// Whether a module's file is that of the module of this name, which is folded.
fn is_file_of(path: &str, name: &str) -> bool {
    let file = path.rsplit('/').next().unwrap_or_default();
    // What follows the name is `.ko` or `.ko.xz`.
    let own = file.get(..name.len()).is_some_and(|own| is_name(own, name));
    own && file.get(name.len()..).is_some_and(|end| end.starts_with(".ko"))
}

/// Whether a name is this one, which is folded.
fn is_name(name: &str, folded: &str) -> bool {
    let same = |(a, b): (u8, u8)| a == b || (a == b'-' && b == b'_');
    name.len() == folded.len() && name.bytes().zip(folded.bytes()).all(same)
}

/// What stands before the first `:`, with it, if there is no wildcard in it.
fn bucket(alias: &str) -> &str {
    let kind = alias.find(':').and_then(|end| alias.get(..=end)).unwrap_or_default();
    if kind.contains(['*', '?', '[']) { "" } else { kind }
}

/// Shell-style matching (fnmatch(3) without flags): `*`, `?`, `[a-f]`, `[!a]`. Time is at most the product of both lengths.
fn glob(pattern: &[u8], text: &[u8]) -> bool {
    let (mut p, mut t) = (pattern, text);
    let mut retry: Option<(&[u8], &[u8])> = None;
    loop {
        let step = match (p.split_first(), t.split_first()) {
            (Some((b'*', rest)), _) => {
                retry = Some((rest, t));
                p = rest;
                continue;
            }
            (None, None) => return true,
            (Some((first, rest)), Some((byte, after))) => {
                one(*first, rest, *byte).map(|rest| (rest, after))
            }
            _ => None,
        };
        match (step, retry) {
            (Some((rest, after)), _) => (p, t) = (rest, after),
            (None, Some((rest, from))) => {
                let Some((_, from)) = from.split_first() else { return false };
                retry = Some((rest, from));
                (p, t) = (rest, from);
            }
            (None, None) => return false,
        }
    }
}

/// Matches one byte against the pattern's next element; returns the pattern after it.
fn one(first: u8, rest: &[u8], byte: u8) -> Option<&[u8]> {
    match first {
        b'?' => Some(rest),
        b'[' => match class(rest, byte) {
            Some((true, after)) => Some(after),
            Some((false, _)) => None,
            // An unclosed bracket stands for itself.
            None => (byte == b'[').then_some(rest),
        },
        _ => (first == byte).then_some(rest),
    }
}

/// Whether a byte is in the class that begins after `[`, and the pattern after its `]`. `None`: it has no end.
fn class(pattern: &[u8], byte: u8) -> Option<(bool, &[u8])> {
    let (negated, mut rest) = match pattern.split_first() {
        Some((b'!' | b'^', rest)) => (true, rest),
        _ => (false, pattern),
    };
    let mut hit = false;
    let mut first = true;
    loop {
        match rest {
            [b']', after @ ..] if !first => return Some((hit != negated, after)),
            [low, b'-', high, after @ ..] if *high != b']' => {
                hit |= (*low..=*high).contains(&byte);
                rest = after;
            }
            [single, after @ ..] => {
                hit |= *single == byte;
                rest = after;
            }
            [] => return None,
        }
        first = false;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const DEP: &str = "\
kernel/drivers/net/virtio_net.ko: kernel/net/core/failover-net.ko kernel/drivers/virtio/virtio.ko
kernel/net/core/failover-net.ko:
kernel/drivers/virtio/virtio_pci.ko: kernel/drivers/virtio/virtio_ring.ko kernel/drivers/virtio/virtio.ko
kernel/drivers/virtio/virtio_ring.ko: kernel/drivers/virtio/virtio.ko
kernel/drivers/virtio/virtio.ko:
kernel/crypto/crc-x.ko:
kernel/fs/btr.ko:
";
    const ALIAS: &str = "\
# Aliases extracted from modules themselves.
alias pci:v00001AF4d*sv*sd*bc*sc*i* virtio_pci
alias virtio:d00000001v* virtio_net
alias virtio:d0000000[2-3]v* btr
alias crypto-crc crc-x
alias fs-ext4 ext4
";
    const SOFT: &str = "softdep btr pre: crypto-crc nothere post: virtio-ring\n";

    fn index() -> Index {
        Index::new(DEP, ALIAS, SOFT, "kernel/fs/ext4/ext4.ko\n")
    }

    #[track_caller]
    fn check(request: &str, expect: Option<&[&str]>) {
        let found = match index().plan(request) {
            Plan::Unknown => None,
            Plan::Load(steps) => Some(steps),
        };
        let names: Option<Vec<String>> = found.map(|steps| {
            let mark = |step: Step| if step.optional { step.name + "?" } else { step.name };
            steps.into_iter().map(mark).collect()
        });
        let expect = expect.map(|names| names.iter().map(ToString::to_string).collect());
        assert_eq!(names, expect, "{request}");
    }

    #[test]
    fn what_is_needed_comes_first() {
        check("virtio_net", Some(&["virtio", "failover_net", "virtio_net"]));
        check("virtio-pci", Some(&["virtio", "virtio_ring", "virtio_pci"]));
        check("failover-net", Some(&["failover_net"]));
    }

    #[test]
    fn devices_find_their_modules_by_alias() {
        let pci = "pci:v00001AF4d00001041sv00001AF4sd00001100bc02sc00i00";
        check(pci, Some(&["virtio", "virtio_ring", "virtio_pci"]));
        check("virtio:d00000001v00001AF4", Some(&["virtio", "failover_net", "virtio_net"]));
        check("virtio:d00000009v00001AF4", None);
        check("pci:v00008086d0", None);
    }

    #[test]
    fn what_is_built_in_needs_nothing() {
        check("ext4", Some(&[]));
        check("fs-ext4", Some(&[]));
    }

    #[test]
    fn soft_dependencies_are_taken_along_and_may_be_missing() {
        check("btr", Some(&["crc_x?", "btr", "virtio?", "virtio_ring?"]));
    }

    #[test]
    fn a_circle_ends() {
        let index = Index::new("a.ko: b.ko\nb.ko: a.ko\n", "", "softdep a pre: a b\n", "");
        let Plan::Load(steps) = index.plan("a") else { panic!("unknown") };
        assert_eq!(steps.len(), 2);
    }

    #[test]
    fn what_is_wanted_and_needed_is_needed() {
        let index = Index::new("a.ko: b.ko\nb.ko:\n", "", "softdep a pre: b\n", "");
        let Plan::Load(steps) = index.plan("a") else { panic!("unknown") };
        assert!(steps.iter().all(|step| !step.optional), "{steps:?}");
    }

    #[test]
    fn wildcards_match_as_in_a_shell() {
        let table = [
            ("*", "", true),
            ("a*c", "abbc", true),
            ("a*c", "abcd", false),
            ("a?c", "abc", true),
            ("a?c", "ac", false),
            ("[a-c]x", "bx", true),
            ("[!a-c]x", "bx", false),
            ("[]a]", "]", true),
            ("[ab", "[ab", true),
            ("*a*b*c", "xxaxxbxxbc", true),
            ("d*sv*i00", "d1sv2i01i00", true),
        ];
        for (pattern, text, expect) in table {
            assert_eq!(glob(pattern.as_bytes(), text.as_bytes()), expect, "{pattern} {text}");
        }
    }

    #[test]
    fn a_list_of_names_may_have_remarks() {
        let list: Vec<&str> = names("overlay\n\n# all\n loop # for images\n").collect();
        assert_eq!(list, ["overlay", "loop"]);
    }

    proptest! {
        #[test]
        fn any_text_is_an_index(text in "[ -~\n]{0,300}", request in "[ -~]{0,40}") {
            let index = Index::new(&text, &text, &text, &text);
            let _ = index.plan(&request);
        }

        #[test]
        fn a_star_in_any_place_still_matches(text in "[a-z:]{0,30}", at in 0_usize..30, cut in 0_usize..10) {
            let at = at.min(text.len());
            let end = (at + cut).min(text.len());
            let pattern = format!("{}*{}", &text[..at], &text[end..]);
            prop_assert!(glob(pattern.as_bytes(), text.as_bytes()));
        }

        #[test]
        fn every_step_follows_what_it_needs(edges in proptest::collection::vec((0_u8..12, 0_u8..12), 0..40)) {
            // Edges from larger to smaller: no circles.
            let needs = |module: u8| edges.iter().filter(move |(a, b)| *a == module && b < a).map(|e| e.1);
            let line = |m: u8| {
                let needed: Vec<String> = needs(m).map(|n| format!("m{n}.ko")).collect();
                format!("m{m}.ko: {}\n", needed.join(" "))
            };
            let dep: String = (0..12).map(line).collect();
            let index = Index::new(&dep, "", "", "");
            let Plan::Load(steps) = index.plan("m11") else { panic!("unknown") };
            let place = |m: u8| steps.iter().position(|step| step.name == format!("m{m}"));
            for step in 0..12 {
                if let Some(own) = place(step) {
                    for needed in needs(step) {
                        prop_assert!(place(needed).is_some_and(|other| other < own));
                    }
                }
            }
        }
    }
}
