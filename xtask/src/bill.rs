//! The bill of materials of a bundle beside CycloneDX's own schema, by their Python library: a judge that is not ours.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use initramfs::sbom;

use crate::{children, crates};

/// The judge, on PyPI.
const JUDGE: &str = "cyclonedx-python-lib";
/// Its version.
const VERSION: &str = "11.12.0";
/// Says `None`, or what is wrong.
const SCRIPT: &str = "import sys
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
print(JsonStrictValidator(SchemaVersion.V1_5).validate_str(open(sys.argv[1]).read()))";

/// Judges the bill of the agent as it is, and one that is wrong.
///
/// # Errors
/// The judge cannot be installed, refuses the first or takes the second.
pub(crate) fn check(root: &Path) -> Result<()> {
    let python = judge(root)?;
    let (manifest, _) = sbom::sample();
    let crates = crates::of_the_agent(root)?;
    let bill = sbom::render(&manifest, &crates)?;
    let said = ask(root, &python, &bill)?;
    ensure!(said == "None", "the bill of materials is not CycloneDX 1.5: {said}");
    let wrong = bill.replace("\"type\": \"library\"", "\"type\": \"book\"");
    ensure!(ask(root, &python, &wrong)? != "None", "the judge takes anything");
    eprintln!("the bill of materials is CycloneDX 1.5: {} crates", crates.len());
    Ok(())
}

/// The Python that has the judge, below `target/` and installed when it is not there.
fn judge(root: &Path) -> Result<PathBuf> {
    let place = root.join("target/tools/cyclonedx");
    let python = place.join("bin/python");
    let script = format!("import importlib.metadata as m; print(m.version('{JUDGE}'))");
    let version = Command::new(&python).args(["-c", &script]).output();
    if version.is_ok_and(|it| String::from_utf8_lossy(&it.stdout).trim() == VERSION) {
        return Ok(python);
    }
    eprintln!("installing {JUDGE} {VERSION} below target/tools");
    children::run(Command::new("python3").args(["-m", "venv"]).arg(&place))
        .context("it needs python3-venv")?;
    let package = format!("{JUDGE}[json-validation]=={VERSION}");
    children::run(Command::new(&python).args(["-m", "pip", "install", "--quiet", &package]))?;
    Ok(python)
}

fn ask(root: &Path, python: &Path, bill: &str) -> Result<String> {
    let path = root.join("target/tools/cyclonedx/bill.json");
    fs::write(&path, bill).with_context(|| format!("cannot write {}", path.display()))?;
    let output = Command::new(python).args(["-c", SCRIPT]).arg(&path).output();
    let output = output.with_context(|| format!("cannot run {}", python.display()))?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr).trim());
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}
