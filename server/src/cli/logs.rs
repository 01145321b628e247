//! `layercake logs`: what a container of a node wrote, or the node itself.

use anyhow::bail;
use protocol::channel::{ChannelBody, ChannelWish, ContainerPath};
use protocol::ids::{Name, NodeId};

use super::channel::{self, Options};
use super::client::Client;
use super::output::Output;
use crate::config::values::BaseUrl;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The node.
    node: NodeId,
    /// The container: NAME, or SET/NAME where several sets have one of that name. May be left out where the node has only one.
    container: Option<ContainerPath>,
    /// Go on with what is written next, across restarts and rolls of the container.
    #[arg(short, long)]
    follow: bool,
    /// Begin with this many last lines; with all that the node still has when absent.
    #[arg(short = 'n', long = "lines", value_name = "LINES")]
    lines: Option<u64>,
    /// The ImageSet that the container is of.
    #[arg(long, value_name = "NAME", requires = "container")]
    set: Option<Name>,
    /// The node's own log instead: its kernel's lines and its agent's.
    #[arg(long, conflicts_with = "container")]
    agent: bool,
}

pub(super) fn run(
    args: &Args,
    client: &Client,
    server: &BaseUrl,
    output: Output,
) -> anyhow::Result<()> {
    let path = args.container.as_ref();
    let container = path.map(|path| container_path(path, args.set.as_ref())).transpose()?;
    let (follow, tail) = (args.follow, args.lines);
    let wish = match args.agent {
        true => ChannelWish::NodeLog { follow, tail },
        false => ChannelWish::Logs { follow, tail },
    };
    let options = Options { json: output.json, ..Options::default() };
    channel::run(client, server, &args.node, &ChannelBody { container, wish }, options).map(drop)
}

/// The container with the set of `--set`.
pub(super) fn container_path(
    path: &ContainerPath,
    set: Option<&Name>,
) -> anyhow::Result<ContainerPath> {
    match (&path.set, set) {
        (Some(one), Some(other)) if one != other => {
            bail!("`{path}` and --set {other} name two different sets")
        }
        (own, other) => {
            Ok(ContainerPath { set: own.as_ref().or(other).cloned(), name: path.name.clone() })
        }
    }
}
