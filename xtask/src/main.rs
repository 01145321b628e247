//! `cargo xtask`: everything about this repository that is more than one cargo command. One file a subcommand.

#![allow(clippy::print_stdout, clippy::print_stderr)]

mod agent_build;
mod bench;
mod bill;
mod build_image;
mod builds;
mod children;
mod crates;
mod demo;
mod gate;
mod kernel;
mod overlay;
mod push;
mod tidy;
mod verify_image;

use std::process::ExitCode;

use clap::Parser;
use tests::wait::Interrupted;

/// The exit status that shells use for Ctrl-C: 128 and the number of the signal.
const INTERRUPTED: u8 = 130;

/// Builds, shows and checks Layercake.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", version)]
enum Cli {
    /// Build Layer0: vmlinuz, initramfs.img, manifest.json, and other forms
    BuildImage(build_image::Args),
    /// Build a Layer0 again from the same inputs and compare it bit for bit
    VerifyImage(verify_image::VerifyArgs),
    /// Build a kernel of our own from the distribution's source and the fragments in kernel-config
    Kernel(kernel::Args),
    /// Make the site's archive beside the image: keys, certificates, configuration, a rescue shell, ssh
    Overlay(overlay::Args),
    /// Boot machines in a private lab, run an ImageSet on them and roll it
    Demo(demo::Args),
    /// Measure us beside the peers, and judge the goals
    #[command(subcommand)]
    Bench(bench::Bench),
    /// Build an example and push its ImageSets to a registry
    Push(push::Args),
    /// Run everything that must hold before a change lands
    Test(gate::Args),
    /// Check the house rules that neither rustc nor clippy knows
    Tidy,
}

fn main() -> ExitCode {
    let result = match Cli::parse() {
        Cli::BuildImage(args) => build_image::run(&args),
        Cli::VerifyImage(args) => verify_image::run(&args),
        Cli::Kernel(args) => kernel::run(&args),
        Cli::Overlay(args) => overlay::run(&args),
        Cli::Demo(args) => demo::run(&args),
        Cli::Bench(bench) => bench::run(&bench),
        Cli::Push(args) => push::run(&args),
        Cli::Test(args) => gate::run(&args, &tests::artifacts::workspace_root()),
        Cli::Tidy => tidy::run(&tests::artifacts::workspace_root()),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if error.downcast_ref::<Interrupted>().is_some() => {
            eprintln!("interrupted: everything that was started is gone");
            ExitCode::from(INTERRUPTED)
        }
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
