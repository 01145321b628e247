//! `cargo xtask push EXAMPLE`: builds what an example needs, and pushes all its versions with the `layercake` binary, as
//! a user would.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, bail, ensure};
use tests::artifacts::workspace_root;

use crate::builds;

/// Arguments of `cargo xtask push`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The example: a folder of examples/, or one version of it such as hello/v1
    example: String,
    /// Everything after `--` goes to `layercake imageset push`, such as --to http://HOST:PORT
    #[arg(last = true)]
    more: Vec<String>,
}

/// Builds and pushes.
///
/// # Errors
/// If there is no such example, it does not build, or the registry does not take it.
pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let root = workspace_root();
    let files = descriptions(&root.join("examples"), &args.example)?;
    let layercake = builds::server(false)?;
    match args.example.split('/').next() {
        Some("hello" | "zero-downtime-roll") => builds::hello()?,
        Some("pivot") => tests::story::make_pivot_base(&root.join("target/examples/pivot"))?,
        _ => {}
    }
    for file in files {
        let mut push = Command::new(&layercake);
        push.args(["imageset", "push"]).arg(&file).args(&args.more);
        let status =
            push.status().with_context(|| format!("cannot run {}", layercake.display()))?;
        ensure!(status.success(), "pushing {} failed ({status})", file.display());
    }
    Ok(())
}

/// Every imageset.toml of the example, by path.
fn descriptions(examples: &Path, example: &str) -> anyhow::Result<Vec<PathBuf>> {
    let plain = |part: &str| !part.is_empty() && !part.starts_with('.');
    let dir = examples.join(example);
    if !example.split('/').all(plain) || !dir.is_dir() {
        bail!("there is no example `{example}`; there are: {}", names(examples)?.join(", "));
    }
    let mut files = Vec::new();
    for place in std::iter::once(dir.clone()).chain(below(&dir)?) {
        let file = place.join("imageset.toml");
        if file.is_file() {
            files.push(file);
        }
    }
    ensure!(!files.is_empty(), "{} has no imageset.toml", dir.display());
    Ok(files)
}

fn below(dir: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let list = fs::read_dir(dir).with_context(|| format!("cannot list {}", dir.display()))?;
    let mut found: Vec<PathBuf> = list.flatten().map(|entry| entry.path()).collect();
    found.retain(|path| path.is_dir());
    found.sort();
    Ok(found)
}

fn names(examples: &Path) -> anyhow::Result<Vec<String>> {
    let name = |path: PathBuf| path.file_name().map(|name| name.to_string_lossy().into_owned());
    Ok(below(examples)?.into_iter().filter_map(name).collect())
}

#[cfg(test)]
mod cases {
    use super::*;

    #[test]
    fn an_example_is_all_its_versions_and_every_example_has_one() {
        let examples = workspace_root().join("examples");
        let hello = descriptions(&examples, "hello").expect("hello");
        let versions: Vec<_> = hello.iter().map(|file| file.strip_prefix(&examples)).collect();
        let expected = ["hello/v1/imageset.toml", "hello/v2/imageset.toml"].map(Path::new);
        assert_eq!(versions, expected.map(Ok));
        assert_eq!(descriptions(&examples, "hello/v2").expect("v2").len(), 1);
        for name in names(&examples).expect("names") {
            descriptions(&examples, &name).expect("an example without a set");
        }
    }

    #[test]
    fn an_unknown_example_is_told_with_those_that_there_are() {
        let examples = workspace_root().join("examples");
        for wrong in ["nope", "", "..", "hello/../.."] {
            let error = descriptions(&examples, wrong).expect_err(wrong).to_string();
            assert!(error.contains("there are: debian-systemd, hello, pivot"), "{error}");
        }
    }
}
