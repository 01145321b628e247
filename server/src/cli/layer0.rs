//! `layercake layer0`: the builds of Layer0 itself, and bringing nodes to one of them.

mod wait;

use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use imagebuilder::sign::key::SigningKey;
use protocol::api::{Layer0Node, Layer0Record, Layer0Request, Layer0Upload, NodeRecord};
use protocol::ids::{Digest, Name};
use protocol::layer0::{MANIFEST, SIGNATURE, SIGNATURE_SUFFIX, archive_statement, signature_text};
use protocol::node::{Layer0How, Layer0State};
use serde_json::json;

use super::client::Client;
use super::output::{self, Output, ago, bytes, table};
use crate::clock::now_ms;

#[derive(Debug, clap::Subcommand)]
pub(super) enum Command {
    /// List the builds that the server has.
    List,
    /// Show one build.
    Show {
        /// `default`, a name, a digest or the beginning of one.
        layer0: String,
    },
    /// Bring a build to the server: a directory that `cargo xtask build-image` wrote.
    Add(Add),
    /// Sign a build, or an archive of the site's, for nodes with keys in /etc/layercake/keys: writes manifest.json.sig beside the
    /// build's manifest, FILE.sig beside the archive.
    Sign(Sign),
    /// Remove a build that no node runs or shall run.
    Remove {
        /// A name, a digest or the beginning of one.
        layer0: String,
        #[command(flatten)]
        token: Token,
    },
    /// Bring nodes to a build: by kexec, by a reboot, or only its agent, under containers that go on.
    Start(Start),
    /// Show which Layer0 each node runs, which it should run, and why these differ.
    Status {
        /// The nodes, separated by commas; all when absent.
        #[arg(value_delimiter = ',')]
        nodes: Vec<String>,
    },
}

#[derive(Debug, clap::Args)]
pub(super) struct Token {
    /// A push token of the registry, where its config has such.
    #[arg(long, env = "LAYERCAKE_TOKEN", hide_env_values = true)]
    token: Option<String>,
}

#[derive(Debug, clap::Args)]
pub(super) struct Add {
    /// The directory with manifest.json.
    dir: PathBuf,
    /// A name for it; a build that has it loses it.
    #[arg(long)]
    name: Option<Name>,
    #[command(flatten)]
    token: Token,
}

#[derive(Debug, clap::Args)]
pub(super) struct Sign {
    /// The directory with manifest.json, or an archive of the site's (`[boot] overlays`), whose signature lies beside it.
    path: PathBuf,
    /// The private key: ECDSA P-256, PKCS#8 in PEM, as `imageset keygen` and `openssl genpkey` write it.
    #[arg(long, value_name = "FILE")]
    key: PathBuf,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum How {
    /// By kexec; where that is refused, by a reboot.
    Auto,
    /// By kexec or not at all.
    Kexec,
    /// By a reboot: the firmware fetches it from the boot server.
    Reboot,
    /// Only the agent, at once and under the containers; the rest comes with the next boot.
    Agent,
}

#[derive(Debug, clap::Args)]
pub(super) struct Start {
    /// The nodes, separated by commas, or `all`.
    #[arg(required = true, value_delimiter = ',')]
    nodes: Vec<String>,
    /// The build: `default`, a name, a digest or the beginning of one.
    #[arg(long)]
    layer0: String,
    /// How to get there.
    #[arg(long, default_value = "auto")]
    how: How,
    /// Also where the node runs it already: a reboot without firmware.
    #[arg(long)]
    again: bool,
    /// Busy nodes as well.
    #[arg(long)]
    force: bool,
    /// Return as soon as the nodes are asked. Otherwise the command waits until every node runs it, and fails if one does not.
    #[arg(long)]
    no_wait: bool,
    /// Wait; this is what happens anyway.
    #[arg(long, hide = true, conflicts_with = "no_wait")]
    wait: bool,
    /// Seconds after which it waits no longer and fails; for ever when absent.
    #[arg(long, conflicts_with = "no_wait", value_name = "SECONDS")]
    timeout: Option<u64>,
}

pub(super) fn run(command: Command, client: &Client, output: Output) -> anyhow::Result<()> {
    match command {
        Command::List => {
            let builds: Vec<Layer0Record> = client.get("/v1/layer0")?;
            output.result(&builds, || list_text(&builds, now_ms()))
        }
        Command::Show { layer0 } => {
            let build = find(client, &layer0)?;
            output.result(&build, || show_text(&build, now_ms()))
        }
        Command::Add(add) => add_build(&add, client, output),
        Command::Sign(it) => sign(&it, output),
        Command::Remove { layer0, token } => {
            let digest = find(client, &layer0)?.digest;
            client.delete(&format!("/v1/layer0/{}", digest.hex()), token.token.as_deref())?;
            output.result(&json!({ "removed": digest }), || format!("{digest} is removed\n"))
        }
        Command::Start(start) => start_nodes(start, client, output),
        Command::Status { nodes } => {
            let builds: Vec<Layer0Record> = client.get("/v1/layer0")?;
            let all: Vec<NodeRecord> = client.get("/v1/nodes")?;
            let known = |id: &String| all.iter().any(|node| node.id.as_str() == id);
            if let Some(unknown) = nodes.iter().find(|id| !known(id)) {
                bail!("there is no node {unknown}; `layercake node list` shows all");
            }
            let asked = |node: &&NodeRecord| {
                nodes.is_empty() || nodes.iter().any(|id| id == node.id.as_str())
            };
            let rows: Vec<Standing> =
                all.iter().filter(asked).map(|node| standing(node, &builds)).collect();
            output.result(&rows, || status_text(&rows))
        }
    }
}

/// The build that is meant, found as the server finds it.
fn find(client: &Client, text: &str) -> anyhow::Result<Layer0Record> {
    let builds: Vec<Layer0Record> = client.get("/v1/layer0")?;
    Ok(crate::layer0::choose(builds, text)?)
}

fn add_build(add: &Add, client: &Client, output: Output) -> anyhow::Result<()> {
    let token = add.token.token.as_deref();
    let path = add.dir.join(MANIFEST);
    let manifest = std::fs::read(&path)
        .with_context(|| format!("{}: is it a directory of build-image?", path.display()))?;
    let query = add.name.as_ref().map_or(String::new(), |name| format!("?name={name}"));
    let upload: Layer0Upload =
        client.upload("POST", &format!("/v1/layer0{query}"), &manifest[..], token)?;
    let base = format!("/v1/layer0/{}", upload.digest.hex());
    // The signature first: a build is there as soon as its last file is.
    let signature = add.dir.join(SIGNATURE);
    if signature.is_file() {
        put(client, &signature, &format!("{base}/{SIGNATURE}"), token)?;
    }
    for name in &upload.missing {
        output::say(&format!("sending {name}"));
        put(client, &add.dir.join(name), &format!("{base}/{name}"), token)?;
    }
    let build = find(client, &upload.digest.to_string())?;
    output.result(&build, || show_text(&build, now_ms()))
}

fn put(client: &Client, file: &Path, path: &str, token: Option<&str>) -> anyhow::Result<()> {
    let bytes = std::fs::read(file).with_context(|| file.display().to_string())?;
    client.upload_only("PUT", path, &bytes, token)
}

fn sign(sign: &Sign, output: Output) -> anyhow::Result<()> {
    let key = SigningKey::read(&sign.key)?;
    let read = |path: &Path| std::fs::read(path).with_context(|| path.display().to_string());
    let (digest, der, path) = if sign.path.is_dir() {
        let manifest = read(&sign.path.join(MANIFEST))?;
        (Digest::of(&manifest), key.sign(&manifest)?, sign.path.join(SIGNATURE))
    } else {
        let digest = Digest::of(&read(&sign.path)?);
        let mut beside = sign.path.clone().into_os_string();
        beside.push(SIGNATURE_SUFFIX);
        (digest, key.sign(archive_statement(&digest).as_bytes())?, PathBuf::from(beside))
    };
    std::fs::write(&path, signature_text(&der)).with_context(|| path.display().to_string())?;
    let value = json!({ "digest": digest, "fingerprint": key.public().fingerprint() });
    output
        .result(&value, || format!("{digest}\nsigned by {} in {}\n", key.public(), path.display()))
}

fn start_nodes(start: Start, client: &Client, output: Output) -> anyhow::Result<()> {
    let request = Layer0Request {
        nodes: start.nodes,
        layer0: start.layer0,
        how: match start.how {
            How::Auto => Layer0How::Auto,
            How::Kexec => Layer0How::Kexec,
            How::Reboot => Layer0How::Reboot,
            How::Agent => Layer0How::Agent,
        },
        again: start.again,
        force: start.force,
    };
    let asked: Vec<Layer0Node> = client.post("/v1/layer0/start", &request)?;
    let failed = match start.no_wait {
        true => Vec::new(),
        false => wait::wait(&asked, request.how, start.timeout, client)?,
    };
    output.result(&asked, || {
        let word = if start.no_wait { "is asked for" } else { "runs" };
        let line = |node: &Layer0Node| format!("{} {word} {}\n", node.node, node.digest.short());
        let good = |node: &&Layer0Node| !failed.iter().any(|(id, _)| *id == node.node);
        asked.iter().filter(good).map(line).collect()
    })?;
    if failed.is_empty() {
        return Ok(());
    }
    let failed: Vec<String> = failed.iter().map(|(node, why)| format!("{node}: {why}")).collect();
    bail!("layer0 failed: {}", failed.join("; "))
}

/// How a node stands.
#[derive(Debug, serde::Serialize)]
struct Standing {
    node: String,
    /// What it runs.
    #[serde(skip_serializing_if = "Option::is_none")]
    runs: Option<Digest>,
    /// The version that its image says it is.
    #[serde(skip_serializing_if = "Option::is_none")]
    version: Option<String>,
    /// The agent that runs.
    #[serde(skip_serializing_if = "Option::is_none")]
    agent: Option<Digest>,
    /// What it should run: what it was asked for, else the default.
    #[serde(skip_serializing_if = "Option::is_none")]
    wanted: Option<Digest>,
    /// `current`, `stale`, `failed`, or `unknown` where its agent says nothing.
    state: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
}

fn standing(node: &NodeRecord, builds: &[Layer0Record]) -> Standing {
    let observed = node.observed.as_ref().and_then(|observed| observed.layer0.as_ref());
    let asked = node.desired.layer0.as_ref();
    let default = builds.iter().find(|build| build.default).map(|build| build.digest);
    let runs = observed.and_then(|layer0| layer0.digest);
    let (state, reason) = match (observed, asked, default) {
        (None, _, _) => ("unknown", None),
        (Some(layer0), Some(_), _) => {
            let word = match layer0.state {
                Layer0State::Current => "current",
                Layer0State::Stale => "stale",
                Layer0State::Failed => "failed",
            };
            (word, layer0.reason.clone())
        }
        (Some(_), None, Some(default)) if runs != Some(default) => {
            ("stale", Some("the default has changed since it booted".to_owned()))
        }
        (Some(_), None, _) => ("current", None),
    };
    Standing {
        node: node.id.to_string(),
        runs,
        version: observed.and_then(|layer0| layer0.version.clone()),
        agent: observed.and_then(|layer0| layer0.agent),
        wanted: asked.map(|layer0| layer0.digest).or(default),
        state,
        reason,
    }
}

fn short(digest: Option<Digest>) -> String {
    digest.map_or("-".to_owned(), |digest| digest.short())
}

fn status_text(rows: &[Standing]) -> String {
    if rows.is_empty() {
        return "No node has been seen yet.\n".to_owned();
    }
    let row = |it: &Standing| {
        vec![
            it.node.clone(),
            short(it.runs),
            it.version.clone().unwrap_or("-".to_owned()),
            short(it.agent),
            short(it.wanted),
            it.state.to_owned(),
            it.reason.clone().unwrap_or_default().replace(char::is_control, " "),
        ]
    };
    let rows: Vec<Vec<String>> = rows.iter().map(row).collect();
    table(&["NODE", "LAYER0", "VERSION", "AGENT", "WANTED", "STATE", "REASON"], &rows)
}

fn list_text(builds: &[Layer0Record], now_ms: u64) -> String {
    if builds.is_empty() {
        return "There is no Layer0 yet; `layercake layer0 add DIR` brings one.\n".to_owned();
    }
    let row = |build: &Layer0Record| {
        vec![
            build.digest.short(),
            called(build),
            build.version.clone(),
            format!("{} ({})", build.kernel, build.flavour),
            build.agent_digest.short(),
            bytes(build.bytes),
            if build.signed { "yes" } else { "no" }.to_owned(),
            ago(build.added_ms, now_ms),
        ]
    };
    let rows: Vec<Vec<String>> = builds.iter().map(row).collect();
    let head = ["LAYER0", "NAME", "VERSION", "KERNEL", "AGENT", "SIZE", "SIGNED", "ADDED"];
    table(&head, &rows)
}

fn called(build: &Layer0Record) -> String {
    let name = build.name.as_ref().map(ToString::to_string);
    match (name, build.default) {
        (Some(name), true) => format!("{name}, default"),
        (Some(name), false) => name,
        (None, true) => "default".to_owned(),
        (None, false) => "-".to_owned(),
    }
}

fn show_text(build: &Layer0Record, now_ms: u64) -> String {
    let alone = if build.agent_alone { "" } else { " (not alone: only with the rest)" };
    let signed = if build.signed { "yes" } else { "no" };
    format!(
        "layer0   {}\nname     {}\nversion  {}\nkernel   {} ({})\nagent    {} {}{alone}\nsize     {}\n\
         signed   {signed}\nadded    {} ago\n",
        build.digest,
        called(build),
        build.version,
        build.kernel,
        build.flavour,
        build.agent,
        build.agent_digest,
        bytes(build.bytes),
        ago(build.added_ms, now_ms),
    )
}

#[cfg(test)]
mod tests;
