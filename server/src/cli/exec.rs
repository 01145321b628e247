//! `layercake exec`: a command in a container of a node.

use std::process::ExitCode;

use anyhow::{anyhow, bail};
use protocol::channel::{ChannelBody, ChannelWish, ContainerPath, ExecWish, TerminalSize};
use protocol::ids::{Name, NodeId};

use super::channel::{self, Options, terminal};
use super::client::Client;
use super::logs::container_path;
use super::output;
use crate::config::values::BaseUrl;

/// What this process exits with when it fails itself, as ssh does.
const FAILED: u8 = 255;
/// The terminal's size where it does not say: that of a VT100.
const DEFAULT_SIZE: TerminalSize = TerminalSize { columns: 80, rows: 24 };

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The node.
    node: NodeId,
    /// The container: NAME, or SET/NAME where several sets have one of that name.
    container: ContainerPath,
    /// Send standard input to the command.
    #[arg(short, long)]
    interactive: bool,
    /// Give the command a terminal: this one.
    #[arg(short, long)]
    tty: bool,
    /// Run it as this user of the image, USER or USER:GROUP by name or number; as the container's own when absent.
    #[arg(short, long, value_name = "USER")]
    user: Option<String>,
    /// Set a variable of its environment, KEY=VALUE.
    #[arg(short, long, value_name = "KEY=VALUE")]
    env: Vec<String>,
    /// The ImageSet that the container is of.
    #[arg(long, value_name = "NAME")]
    set: Option<Name>,
    /// The command and its arguments.
    #[arg(
        required = true,
        trailing_var_arg = true,
        allow_hyphen_values = true,
        value_name = "COMMAND"
    )]
    command: Vec<String>,
}

/// Exits with the command's own code, with 128 and the signal's number where one ended it, and with 255 where it could not be
/// run or this process failed.
pub(super) fn run(args: &Args, client: &Client, server: &BaseUrl) -> ExitCode {
    match try_run(args, client, server) {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            output::say(&format!("layercake: {error:#}"));
            ExitCode::from(FAILED)
        }
    }
}

fn try_run(args: &Args, client: &Client, server: &BaseUrl) -> anyhow::Result<u8> {
    if args.tty && !terminal::is_there() {
        bail!("-t needs a terminal on standard input; without it leave -t out");
    }
    let size = args.tty.then(|| terminal::size().unwrap_or(DEFAULT_SIZE));
    let mut env = args.env.clone();
    if let Some(kind) = std::env::var("TERM").ok().filter(|_| args.tty)
        && !env.iter().any(|entry| entry.starts_with("TERM="))
    {
        env.push(format!("TERM={kind}"));
    }
    let argv = args.command.clone();
    let wish = ExecWish { argv, env, user: args.user.clone(), terminal: size };
    if let Some(problem) = wish.problem() {
        return Err(anyhow!(problem));
    }
    let container = container_path(&args.container, args.set.as_ref())?;
    let body = ChannelBody { container: Some(container), wish: ChannelWish::Exec(wish) };
    let input = args.interactive || args.tty;
    let options = Options { input, terminal: args.tty, signals: true, json: false };
    Ok(channel::run(client, server, &args.node, &body, options)?.status())
}
