//! `layercake man`.

use std::path::PathBuf;

use anyhow::Context;
use clap::CommandFactory;

use super::{Cli, output};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Directory for the pages; made when it is not there.
    dir: PathBuf,
}

pub(super) fn run(args: &Args) -> anyhow::Result<()> {
    let dir = args.dir.display();
    std::fs::create_dir_all(&args.dir).with_context(|| format!("{dir} cannot be made"))?;
    clap_mangen::generate_to(Cli::command(), &args.dir)
        .with_context(|| format!("the man pages could not be written to {dir}"))?;
    output::print(&format!("{dir}\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_is_a_page_for_every_command() {
        let dir = tempfile::tempdir().expect("dir");
        let pages = dir.path().join("man");
        run(&Args { dir: pages.clone() }).expect("man");
        for page in ["layercake.1", "layercake-serve.1", "layercake-roll-start.1"] {
            assert!(pages.join(page).exists(), "{page}");
        }
    }
}
