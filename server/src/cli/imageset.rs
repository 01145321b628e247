//! `layercake imageset`: everything one does with ImageSets, one file a command. The work is the imagebuilder's.

mod build;
mod copy;
mod diff;
mod inspect;
mod keygen;
mod list;
mod push;
pub(in crate::cli) mod registry;
mod sign;
mod verify;

use super::client::Client;
use super::output::Output;
use crate::config::values::BaseUrl;

#[derive(Debug, clap::Subcommand)]
pub(super) enum Command {
    /// Build an ImageSet into an OCI layout.
    Build(build::Args),
    /// Build an ImageSet and push it to a registry. Only blobs that the registry does not have are sent.
    Push(push::Args),
    /// Fetch an ImageSet into an OCI layout, with its signatures.
    Pull(copy::PullArgs),
    /// Show what an ImageSet consists of: its description, images, platforms and layers.
    Inspect(inspect::Args),
    /// List the ImageSets of the server's registry, or the versions in a repository.
    List(list::Args),
    /// Show the files and bytes that changed between two ImageSets.
    Diff(diff::Args),
    /// Copy an ImageSet byte for byte, with its signatures.
    Copy(copy::Args),
    /// Make a key pair for signatures (ECDSA P-256).
    Keygen(keygen::Args),
    /// Sign an ImageSet in a registry, its index and every manifest in it, in cosign's key layout. Signatures by other keys
    /// stay; what this key signed already is left as it is. Signers should come one after the other.
    Sign(sign::Args),
    /// Verify the signatures of an ImageSet in a registry. Exit status 1 if one is missing or wrong.
    Verify(verify::Args),
    /// Remove what no tag and no node refers to from the server's registry. The server does it by itself once an hour.
    Gc(super::registry::Gc),
    /// Make a token for the server's registry, and print it with the hash that the config takes.
    Token,
}

pub(super) fn run(command: &Command, server: &BaseUrl, output: Output) -> anyhow::Result<()> {
    match command {
        Command::Build(args) => build::run(args, output),
        Command::Push(args) => push::run(args, server, output),
        Command::Pull(args) => copy::pull(args, server, output),
        Command::Inspect(args) => inspect::run(args, server, output),
        Command::List(args) => list::run(args, server, output),
        Command::Diff(args) => diff::run(args, server, output),
        Command::Copy(args) => copy::run(args, server, output),
        Command::Keygen(args) => keygen::run(args, output),
        Command::Sign(args) => sign::run(args, server, output),
        Command::Verify(args) => verify::run(args, server, output),
        Command::Gc(args) => super::registry::gc(args, &Client::new(server), output),
        Command::Token => super::registry::token(output),
    }
}
