//! `cargo xtask verify-image`: builds a Layer0 again from the inputs that its manifest names, with nothing of an earlier build but the
//! kernel, and compares every file bit for bit.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use clap::{Args as ClapArgs, ValueEnum};
use initramfs::compare::{self, Difference};
use initramfs::image::bundle::BESIDE;
use initramfs::image::forms::Form;
use initramfs::image::{self, Config, MANIFEST};
use protocol::ids::Digest;
use protocol::layer0::{Inputs, Manifest};
use serde::Serialize;

use crate::agent_build;
use crate::build_image::{self, Flavour, Format, root, target_dir};

/// Builds a Layer0 again from the same inputs and compares it bit for bit.
///
/// Forms, kernel flavour, command line, compression and the time in it are taken from its manifest.json, whatever is said here; what was given
/// by files (kernels, facts, firmware, overlays, archives, keys) must be given again, in the same order. The agent is built from
/// nothing in a directory of its own; kernels of ours and packages come from the cache. Exits with 0 when every file is the same,
/// else with 1 and says what differs.
#[derive(Debug, Clone, ClapArgs)]
pub(crate) struct VerifyArgs {
    /// The Layer0 [default: out/layer0 in this repository]
    dir: Option<PathBuf>,
    #[command(flatten)]
    build: build_image::Args,
}

/// What came out.
#[derive(Debug, Serialize)]
struct Verdict {
    /// The Layer0 that was verified.
    dir: PathBuf,
    /// Whether every file is the same.
    same: bool,
    /// Files that were compared.
    files: Vec<String>,
    /// Those that differ.
    differences: Vec<Difference>,
}

/// Runs `cargo xtask verify-image`.
///
/// # Errors
/// Something differs, the inputs are not the same, or it cannot be built.
pub(crate) fn run(args: &VerifyArgs) -> Result<()> {
    let dir = args.dir.clone().unwrap_or_else(|| root().join("out/layer0"));
    let manifest = read_manifest(&dir)?;
    let inputs = manifest.inputs.as_ref().with_context(|| {
        format!(
            "{} does not say what it was built from: build it again",
            dir.join(MANIFEST).display()
        )
    })?;
    check_given(&args.build, inputs)?;
    check_files(&dir, &manifest)?;
    let scratch = Scratch::new()?;
    let again = scratch.path.join("out");
    build(&args.build, &manifest, inputs, &scratch, &again)?;
    let names = names(&manifest, inputs);
    let verdict = compare(dir, &again, names)?;
    if args.build.json {
        println!("{}", serde_json::to_string_pretty(&verdict)?);
    } else {
        for difference in &verdict.differences {
            println!("{difference}");
        }
    }
    ensure!(verdict.same, "{} of {} files differ", verdict.differences.len(), verdict.files.len());
    if !args.build.json {
        println!("{}: all {} files are the same", verdict.dir.display(), verdict.files.len());
    }
    Ok(())
}

fn read_manifest(dir: &Path) -> Result<Manifest> {
    let path = dir.join(MANIFEST);
    let text = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
    serde_json::from_slice(&text).with_context(|| format!("{} is no manifest", path.display()))
}

/// Refuses inputs that are not as many as there were. Whether they are the same ones, the manifest that is built again will tell.
fn check_given(args: &build_image::Args, inputs: &Inputs) -> Result<()> {
    let given = [
        ("ca", args.ca.len()),
        ("imageset-key", args.imageset_key.len()),
        ("registries", usize::from(args.registries.is_some())),
        ("overlay", args.overlay.len()),
        ("archive", args.archive.len()),
    ];
    for (option, given) in given {
        let wanted = inputs.files.iter().filter(|it| it.option == option).count();
        ensure!(
            given == wanted,
            "it was built with {wanted} --{option}, and {given} are given: give the same, in the same order"
        );
    }
    Ok(())
}

/// Refuses files that are not even what the manifest beside them says.
fn check_files(dir: &Path, manifest: &Manifest) -> Result<()> {
    for artifact in &manifest.artifacts {
        let path = dir.join(&artifact.name);
        let bytes = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let digest = Digest::of(&bytes);
        ensure!(
            digest == artifact.digest,
            "{} is {digest}, but {MANIFEST} beside it says {}: it was changed after it was built",
            path.display(),
            artifact.digest
        );
    }
    Ok(())
}

/// Every file that the build leaves.
fn names(manifest: &Manifest, inputs: &Inputs) -> Vec<String> {
    let mut names: Vec<_> = manifest.artifacts.iter().map(|it| it.name.clone()).collect();
    if inputs.forms.iter().any(|form| form == Form::Bundle.word()) {
        names.extend(BESIDE.map(str::to_owned));
        names.extend(Form::Bundle.file().map(str::to_owned));
    }
    names.push(MANIFEST.to_owned());
    names
}

fn build(
    args: &build_image::Args,
    manifest: &Manifest,
    inputs: &Inputs,
    scratch: &Scratch,
    out: &Path,
) -> Result<()> {
    let notice = |text: &str| eprintln!("verify-image: {text}");
    let agent = match &args.agent {
        Some(path) => path.clone(),
        None if manifest.agent == "unknown" => {
            bail!("it was built with --agent FILE: give the same one")
        }
        None => {
            notice("building the agent from nothing");
            agent_build::build_anew(&root(), &scratch.path.join("target"))?
        }
    };
    let args = as_build_args(args, manifest, inputs, agent)?;
    let config = Config {
        agent_version: manifest.agent.clone(),
        mtime: inputs.mtime,
        packed: scratch.path.join("packed"),
        out: out.to_owned(),
        ..build_image::config(&args, &notice)?
    };
    let report = image::build(&config, &notice)?;
    let (was, is) = (&manifest.kernel_source, &report.manifest.kernel_source);
    if was != is {
        notice(&format!("the kernel is another one: it was built from {was}, and now from {is}"));
    }
    Ok(())
}

/// The arguments of the build that made it.
fn as_build_args(
    args: &build_image::Args,
    manifest: &Manifest,
    inputs: &Inputs,
    agent: PathBuf,
) -> Result<build_image::Args> {
    let given = args.kernel.is_some() || args.hardware.has_kernel();
    let flavour = match Flavour::from_str(&manifest.flavour, false) {
        Ok(flavour) => flavour,
        Err(_) if given => Flavour::default(),
        Err(_) => bail!(
            "it was built from a kernel that was given ({}): give it again",
            manifest.kernel_source
        ),
    };
    let format = |word: &String| {
        Format::from_str(word, false).map_err(|_| anyhow::anyhow!("there is no form {word:?} here"))
    };
    Ok(build_image::Args {
        flavour,
        agent: Some(agent),
        with: inputs.with.clone(),
        compression: inputs.compression.parse()?,
        format: inputs.forms.iter().map(format).collect::<Result<_>>()?,
        cmdline: inputs.command_line.clone(),
        ..args.clone()
    })
}

fn compare(dir: PathBuf, again: &Path, files: Vec<String>) -> Result<Verdict> {
    let mut differences = Vec::new();
    for name in &files {
        let read = |dir: &Path| {
            let path = dir.join(name);
            fs::read(&path).with_context(|| format!("cannot read {}", path.display()))
        };
        differences.extend(compare::files(name, &read(&dir)?, &read(again)?));
    }
    Ok(Verdict { dir, same: differences.is_empty(), files, differences })
}

/// A directory that nothing was built in before. It goes when this does.
#[derive(Debug)]
struct Scratch {
    path: PathBuf,
}

impl Scratch {
    fn new() -> Result<Self> {
        let path = target_dir(&root()).join(format!("verify-{}", std::process::id()));
        fs::create_dir_all(&path).with_context(|| format!("cannot make {}", path.display()))?;
        Ok(Self { path })
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // What stays behind costs space and nothing else.
        let _ = fs::remove_dir_all(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use protocol::layer0::Input;

    use super::*;

    fn args(line: &[&str]) -> VerifyArgs {
        #[derive(clap::Parser)]
        struct Cli {
            #[command(flatten)]
            args: VerifyArgs,
        }
        <Cli as clap::Parser>::parse_from([&["verify-image"], line].concat()).args
    }

    #[test]
    fn what_was_given_by_files_must_be_given_again() {
        let overlay = Input { option: "overlay".to_owned(), digest: Digest::of(b"x") };
        let inputs = Inputs { files: vec![overlay], ..Inputs::default() };
        let error = check_given(&args(&[]).build, &inputs).unwrap_err().to_string();
        assert!(error.contains("1 --overlay, and 0 are given"), "{error}");
        assert!(check_given(&args(&["--overlay", "d"]).build, &inputs).is_ok());
        let error =
            check_given(&args(&["--overlay", "d", "--ca", "f"]).build, &inputs).unwrap_err();
        assert!(error.to_string().contains("0 --ca, and 1 are given"), "{error}");
    }

    #[test]
    fn a_build_is_asked_for_as_the_manifest_has_it() {
        let (mut manifest, _) = initramfs::sbom::sample();
        let inputs = Inputs {
            forms: vec!["uki".to_owned()],
            command_line: "quiet".to_owned(),
            compression: "zstd:3".to_owned(),
            ..Inputs::default()
        };
        let built = as_build_args(&args(&[]).build, &manifest, &inputs, "a".into()).unwrap();
        assert_eq!((built.flavour, built.cmdline.as_str()), (Flavour::Cloud, "quiet"));
        assert_eq!(built.format, [Format::Uki]);
        assert_eq!(built.compression.to_string(), "zstd:3");
        manifest.flavour = "custom".to_owned();
        let error = as_build_args(&args(&[]).build, &manifest, &inputs, "a".into()).unwrap_err();
        assert!(error.to_string().contains("give it again"), "{error}");
    }

    #[test]
    fn files_that_were_changed_after_the_build_are_refused() {
        let dir = std::env::temp_dir().join(format!("layercake-verify-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        let (manifest, _) = initramfs::sbom::sample();
        fs::write(dir.join("vmlinuz"), b"k").unwrap();
        assert!(check_files(&dir, &manifest).is_ok());
        fs::write(dir.join("vmlinuz"), b"l").unwrap();
        let error = check_files(&dir, &manifest).unwrap_err().to_string();
        assert!(error.contains("vmlinuz is sha256:") && error.contains("changed after"), "{error}");
        fs::remove_dir_all(dir).unwrap();
    }
}
