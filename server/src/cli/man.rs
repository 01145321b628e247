//! `layercake man`.

use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::CommandFactory;

use super::{Cli, output};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Directory for the pages; made when it is not there.
    dir: PathBuf,
}

pub(super) fn run(args: &Args) -> anyhow::Result<()> {
    write(&args.dir)?;
    output::print(&format!("{}\n", args.dir.display()))
}

fn write(dir: &Path) -> anyhow::Result<()> {
    let name = dir.display();
    std::fs::create_dir_all(dir).with_context(|| format!("{name} cannot be made"))?;
    clap_mangen::generate_to(Cli::command(), dir)
        .with_context(|| format!("the man pages could not be written to {name}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_is_a_page_for_every_command() {
        let dir = tempfile::tempdir().expect("dir");
        let pages = dir.path().join("man");
        write(&pages).expect("man");
        for page in ["layercake.1", "layercake-serve.1", "layercake-roll-start.1"] {
            assert!(pages.join(page).exists(), "{page}");
        }
    }
}
