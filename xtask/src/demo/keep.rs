//! `demo --keep`: the lab stays up, and a person is told how to look around in it.

use std::path::Path;
use std::time::Duration;

use anyhow::Result;
use tests::lab::{Lab, SERVER_URL};
use tests::server_peer::Server;
use tests::{namespace, wait};

use super::Node;

/// As long as anybody could want to look.
const LONG: Duration = Duration::from_secs(365 * 24 * 3600);

/// Says how to look around and waits for Ctrl-C.
pub(crate) fn until_interrupted(
    lab: &Lab,
    server: &Server,
    nodes: &[Node],
    layercake: &Path,
) -> Result<()> {
    // The user namespace of an ordinary user's lab has to be entered, too.
    let user = if namespace::in_user_namespace() { "-U --preserve-credentials " } else { "" };
    let enter = format!("nsenter -t {} {user}-n", server.pid());
    eprintln!("\nThe lab stays up until Ctrl-C. From another terminal:");
    let command = format!("{enter} {} --server {SERVER_URL}", layercake.display());
    eprintln!("What the nodes run, and a roll back to version 1:");
    eprintln!("  {command} node list");
    eprintln!("  {command} roll start all --imageset {}:1", super::SET);
    eprintln!("Each node's service, and the server's API:");
    for node in nodes {
        eprintln!("  {enter} curl -s {}", super::url(node));
    }
    eprintln!("  {enter} curl -s {SERVER_URL}/v1/nodes");
    eprintln!("Each node's console, and the server's log:");
    for node in nodes {
        eprintln!("  tail -f {}", node.machine.console.log().display());
    }
    eprintln!("  tail -f {}", server.log().display());
    eprintln!("Everything else is in {}", lab.dir().display());
    match wait::pause(LONG) {
        Err(error) if error.downcast_ref::<wait::Interrupted>().is_some() => Ok(()),
        other => other,
    }
}
