//! What a build reads, and refuses: the agent, the kernel's configuration, and archives that are appended.

use std::fs;
use std::path::{Path, PathBuf};

use super::BuildError;
use crate::archive;
use crate::compress::{self, Kind};
use crate::elf;
use crate::kernel::Kernel;
use crate::kernel::kconfig::{self, Symbol};

/// Most bytes that may come out of an archive that is appended.
const MAX_UNPACKED: usize = 2 << 30;

/// Reads the agent, which must be a static program.
pub(super) fn read_agent(path: &Path) -> Result<Vec<u8>, BuildError> {
    let io = |source| BuildError::Io { path: path.to_owned(), source };
    let agent = fs::read(path).map_err(io)?;
    let wrong = |source| BuildError::Agent { path: path.to_owned(), source };
    let linkage = elf::linkage(&agent).map_err(|error| wrong(Some(error)))?;
    if !linkage.is_static() {
        let interpreter = linkage.interpreter.iter().map(|name| format!("interpreter {name}"));
        let libraries = linkage.needed.iter().map(|name| format!("library {name}"));
        let needs = interpreter.chain(libraries).collect::<Vec<_>>().join(", ");
        return Err(BuildError::Dynamic { path: path.to_owned(), needs });
    }
    if linkage.x86_64 { Ok(agent) } else { Err(wrong(None)) }
}

/// Refuses a kernel that lacks something Layer0 relies on, where its configuration is known.
pub(super) fn check_config(kernel: &Kernel, required: &[Symbol]) -> Result<(), BuildError> {
    let Some(config) = &kernel.config else { return Ok(()) };
    let problems = kconfig::check(config, required);
    if problems.is_empty() {
        return Ok(());
    }
    let problems = problems.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ");
    Err(BuildError::Kconfig { release: kernel.release.clone(), problems })
}

/// What the kernel lacks that Layer0 can do without, a sentence each.
pub(super) fn lacks(kernel: &Kernel, required: &[Symbol]) -> Vec<String> {
    let config = kernel.config.as_deref().unwrap_or_default();
    let lacks = if config.is_empty() { Vec::new() } else { kconfig::lacks(config, required) };
    lacks.iter().map(ToString::to_string).collect()
}

/// An archive that is appended, and the symbols that unpack it.
#[derive(Debug)]
pub(super) struct Appended {
    /// Its bytes, as they are.
    pub(super) bytes: Vec<u8>,
    /// What the kernel must have for it.
    pub(super) needs: Option<Symbol>,
}

/// Reads archives that are to be appended. What is not one a kernel unpacks is refused here: the kernel would boot and lack it.
pub(super) fn read_archives(paths: &[PathBuf]) -> Result<Vec<Appended>, BuildError> {
    let read = |path: &PathBuf| {
        let io = |source| BuildError::Io { path: path.clone(), source };
        let bytes = fs::read(path).map_err(io)?;
        let wrong = |why: String| BuildError::Appended { path: path.clone(), why };
        let Some(kind) = Kind::of(&bytes) else {
            let kinds =
                "a newc cpio, plain or compressed by zstd, xz, gzip, lz4, bzip2, lzo or lzma";
            return Err(wrong(format!("it is not {kinds}")));
        };
        if kind == Kind::Cpio || compress::unpacks(kind) {
            let plain = compress::unpack(&bytes, MAX_UNPACKED);
            let plain = plain.map_err(|error| wrong(format!("it does not unpack: {error}")))?;
            archive::read_all(&plain).map_err(|error| wrong(chain(&error)))?;
        }
        Ok(Appended { bytes, needs: kind.needs() })
    };
    paths.iter().map(read).collect()
}

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(source) = next {
        text = format!("{text}: {source}");
        next = source.source();
    }
    text
}
