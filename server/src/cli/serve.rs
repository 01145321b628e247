//! `layercake serve`: runs the boot server, or writes its config.

use std::fs::OpenOptions;
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, anyhow};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

use super::output::{self, Output};
use crate::config::{self, Config};
use crate::serve::Server;

#[derive(Debug, clap::Args)]
#[group(required = true, multiple = false)]
pub(super) struct Args {
    /// Serve with this config.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Write a commented config instead, and say which ports it needs.
    #[arg(long, value_name = "FILE", num_args = 0..=1, default_missing_value = "layercake.toml")]
    init: Option<PathBuf>,
}

pub(super) fn run(args: &Args, output: Output) -> anyhow::Result<()> {
    if let Some(path) = &args.init {
        return init(path, output);
    }
    let path = args.config.as_deref().context("--config FILE is missing")?;
    let config = config::load(path)?;
    allow_many_connections();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(serve(config))?;
    // A file that is still being read must not hold the end up.
    runtime.shutdown_background();
    Ok(())
}

/// Raises the soft limit of open files, 1024 by custom, to the hard one: every node keeps a long poll open.
fn allow_many_connections() {
    let limits = getrlimit(Resource::Nofile);
    let wished = Rlimit { current: limits.maximum, ..limits };
    if let Err(error) = setrlimit(Resource::Nofile, wished) {
        tracing::warn!(%error, "the limit of open files stays at {:?}", limits.current);
    }
}

async fn serve(config: Config) -> anyhow::Result<()> {
    let (stop, stopping) = watch::channel(false);
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    tokio::spawn(async move {
        let name = tokio::select! {
            _ = interrupt.recv() => "SIGINT",
            _ = terminate.recv() => "SIGTERM",
        };
        tracing::info!("{name}: stopping");
        stop.send_replace(true);
    });
    let ports = config.ports();
    let url = config.server.url.clone();
    let server = Server::open(config).await?;
    for port in ports {
        tracing::info!("{} {}: {}", port.protocol, port.address, port.purpose);
    }
    tracing::info!("serving; nodes reach this server as {url}");
    Ok(server.run(stopping).await?)
}

/// Writes the config that is to be edited; never over another.
fn write_template(path: &Path) -> anyhow::Result<Config> {
    let name = path.display();
    let mut file =
        OpenOptions::new().write(true).create_new(true).open(path).map_err(|error| match error
            .kind()
        {
            std::io::ErrorKind::AlreadyExists => {
                anyhow!("{name} exists and is left as it is; remove it or name another file")
            }
            _ => anyhow!("{name} cannot be written: {error}"),
        })?;
    file.write_all(config::TEMPLATE.as_bytes()).with_context(|| format!("{name}"))?;
    Ok(Config::parse(config::TEMPLATE, path)?)
}

fn init(path: &Path, output: Output) -> anyhow::Result<()> {
    let ports = write_template(path)?.ports();
    let name = path.display();
    let json = serde_json::json!({
        "config": path,
        "ports": ports.iter().map(|port| serde_json::json!({
            "protocol": port.protocol, "address": port.address, "purpose": port.purpose,
        })).collect::<Vec<_>>(),
    });
    output.result(&json, || {
        let row = |port: &config::Port| {
            vec![port.protocol.to_owned(), port.address.to_string(), port.purpose.to_owned()]
        };
        let rows: Vec<Vec<String>> = ports.iter().map(row).collect();
        let table = output::table(&["PROTOCOL", "ADDRESS", "FOR"], &rows);
        format!("Wrote {name}. It needs these ports, the ones below 1024 as root:\n\n{table}\nThen: layercake serve --config {name}\n")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn init_writes_a_good_config_once_and_never_over_another() {
        let dir = tempfile::tempdir().expect("dir");
        let path = dir.path().join("l.toml");
        write_template(&path).expect("first");
        config::load(&path).expect("good config");
        let error = write_template(&path).expect_err("second").to_string();
        assert!(error.ends_with("exists and is left as it is; remove it or name another file"));
    }
}
