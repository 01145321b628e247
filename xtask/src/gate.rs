//! `cargo xtask test`: everything that must hold before a change lands, in one command. All failures are reported.

use std::fmt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::ensure;
use tests::{prerequisites, wait};

use crate::children;

/// The version of cargo-deny that gates licences, bans and sources.
const CARGO_DENY: &str = "0.20.2";

/// A part of the gate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Part {
    /// Formatting.
    Fmt,
    /// The house rules.
    Tidy,
    /// Lints, warnings denied.
    Clippy,
    /// Unit and integration tests.
    Unit,
    /// Signatures beside the sigstore crate, in a workspace of its own.
    Oracle,
    /// The documentation, warnings denied.
    Doc,
    /// Licences, bans and sources.
    Deny,
    /// The bill of materials beside CycloneDX's schema.
    Bill,
    /// The configurations of our own kernels, and the one for virtual machines, from its cache or built.
    Kernel,
    /// Whole-system cases in QEMU.
    Qemu,
}

impl Part {
    /// In the order in which they run: what fails fast comes first.
    const ALL: [Self; 10] = [
        Self::Fmt,
        Self::Tidy,
        Self::Clippy,
        Self::Unit,
        Self::Oracle,
        Self::Doc,
        Self::Deny,
        Self::Bill,
        Self::Kernel,
        Self::Qemu,
    ];
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Fmt => "fmt",
            Self::Tidy => "tidy",
            Self::Clippy => "clippy",
            Self::Unit => "unit",
            Self::Oracle => "oracle",
            Self::Doc => "doc",
            Self::Deny => "deny",
            Self::Bill => "bill",
            Self::Kernel => "kernel",
            Self::Qemu => "qemu",
        })
    }
}

/// Arguments of `cargo xtask test`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Run only these parts (all by default)
    #[arg(value_enum)]
    parts: Vec<Part>,
    /// Run only the tests whose name contains this (parts unit and qemu)
    #[arg(long, value_name = "TEXT")]
    filter: Option<String>,
}

/// Runs the gate.
///
/// # Errors
/// If a part failed; all of them are run first, and a table says which.
pub(crate) fn run(args: &Args, root: &Path) -> anyhow::Result<()> {
    wait::handle_signals()?;
    let parts = if args.parts.is_empty() { Part::ALL.to_vec() } else { args.parts.clone() };
    let filter = args.filter.as_deref();
    if parts.iter().any(|part| matches!(part, Part::Unit | Part::Oracle)) {
        prerequisites::ensure(prerequisites::UNIT)?;
    }
    if parts.iter().any(|part| matches!(part, Part::Kernel | Part::Qemu)) {
        prerequisites::ensure(prerequisites::KERNEL)?;
    }
    if parts.contains(&Part::Qemu) {
        prerequisites::ensure(prerequisites::CASES)?;
        prerequisites::ensure(prerequisites::EFI_CASES)?;
        prerequisites::ensure(prerequisites::FORM_CASES)?;
    }
    let mut results: Vec<(Part, Duration, anyhow::Result<()>)> = Vec::new();
    for part in parts {
        eprintln!("==> {part}");
        let started = Instant::now();
        let result = run_part(part, root, filter);
        wait::check()?;
        if let Err(error) = &result {
            eprintln!("==> {part} FAILED: {error:#}");
        }
        results.push((part, started.elapsed(), result));
    }
    eprintln!();
    for (part, took, result) in &results {
        let verdict = if result.is_ok() { "ok" } else { "FAILED" };
        eprintln!("{part:<8} {:>6.1} s  {verdict}", took.as_secs_f64());
    }
    let failed: Vec<String> = results
        .iter()
        .filter(|(_, _, result)| result.is_err())
        .map(|(part, _, _)| part.to_string())
        .collect();
    ensure!(failed.is_empty(), "failed: {}", failed.join(", "));
    Ok(())
}

fn run_part(part: Part, root: &Path, filter: Option<&str>) -> anyhow::Result<()> {
    let filter: Vec<&str> = filter.into_iter().collect();
    match part {
        Part::Fmt => cargo(root, &["fmt", "--all", "--check"]),
        Part::Tidy => crate::tidy::run(root),
        Part::Clippy => cargo(
            root,
            &["clippy", "--workspace", "--all-targets", "--locked", "--", "-D", "warnings"],
        ),
        Part::Unit => {
            let unit = ["test", "--workspace", "--locked", "--no-fail-fast", "--exclude", "tests"];
            let lab = ["test", "--package", "tests", "--lib", "--locked", "--no-fail-fast"];
            let first = cargo(root, &[&unit[..], &filter].concat());
            cargo(root, &[&lab[..], &filter].concat()).and(first)
        }
        Part::Oracle => oracle(root),
        Part::Doc => doc(root),
        Part::Deny => {
            let deny = cargo_deny(root)?;
            let mut check = Command::new(deny);
            children::run(check.args(["check", "licenses", "bans", "sources"]).current_dir(root))
        }
        Part::Bill => crate::bill::check(root),
        Part::Kernel => crate::kernel::gate(),
        Part::Qemu => {
            crate::builds::everything(false)?;
            crate::builds::efi()?;
            crate::builds::forms()?;
            crate::builds::storage()?;
            crate::builds::kernels()?;
            crate::builds::floor()?;
            crate::builds::site()?;
            crate::builds::time_server()?;
            let qemu =
                ["test", "--package", "tests", "--test", "*", "--locked", "--no-fail-fast", "--"];
            cargo(root, &[&qemu[..], &["--test-threads=1"], &filter].concat())
        }
    }
}

/// Runs the tests of `tests/oracle`, which is not a member of the workspace.
fn oracle(root: &Path) -> anyhow::Result<()> {
    let place = root.join("tests/oracle");
    let target = root.join("target/oracle");
    let commands: [&[&str]; 2] = [&["fmt", "--check"], &["test", "--locked", "--no-fail-fast"]];
    commands.iter().try_for_each(|args| {
        let mut command = children::cargo();
        children::run(command.args(*args).env("CARGO_TARGET_DIR", &target).current_dir(&place))
    })
}

fn doc(root: &Path) -> anyhow::Result<()> {
    let mut command = children::cargo();
    command.args(["doc", "--workspace", "--no-deps", "--document-private-items", "--locked"]);
    children::run(command.env("RUSTDOCFLAGS", "-D warnings").current_dir(root))
}

fn cargo(root: &Path, args: &[&str]) -> anyhow::Result<()> {
    children::run(children::cargo().args(args).current_dir(root))
}

/// cargo-deny of the pinned version, installed below `target/` when it is not there.
fn cargo_deny(root: &Path) -> anyhow::Result<PathBuf> {
    let tools = root.join("target/tools");
    let binary = tools.join("bin/cargo-deny");
    let version = Command::new(&binary).arg("--version").output();
    let is_there = version.is_ok_and(|output| {
        String::from_utf8_lossy(&output.stdout).trim() == format!("cargo-deny {CARGO_DENY}")
    });
    if !is_there {
        eprintln!("installing cargo-deny {CARGO_DENY} below target/tools (a few minutes, once)");
        let build = root.join("target/tools/build");
        let mut install = children::cargo();
        install.args([
            "install",
            "cargo-deny",
            "--version",
            CARGO_DENY,
            "--locked",
            "--quiet",
            "--root",
        ]);
        children::run(install.arg(&tools).arg("--target-dir").arg(build))?;
    }
    Ok(binary)
}
