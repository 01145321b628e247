//! `cargo xtask overlay`: the site's archive beside the image.

use std::path::PathBuf;

use anyhow::Context;
use clap::{Args as ClapArgs, ValueEnum};
use initramfs::site::{self, Config, Report, Ssh};

use crate::build_image::{root, source_date_epoch, target_dir};

/// Makes an archive that nodes get beside the image: keys, certificates, configuration, a rescue shell, ssh.
///
/// The server gives it to its nodes (`[boot] overlays` in layercake.toml); the forms of the image that are one file take it by
/// --archive. The image itself stays the same for every site. The same inputs give the same bytes.
#[derive(Debug, Clone, Default, ClapArgs)]
pub(crate) struct Args {
    /// The archive; zstd, unless its name ends with .cpio
    #[arg(long, value_name = "FILE", default_value = "site.cpio.zst")]
    out: PathBuf,
    /// Let in by ssh who has one of these public keys, a file as ~/.ssh/authorized_keys (repeatable)
    #[arg(long, value_name = "FILE")]
    authorized_key: Vec<PathBuf>,
    /// Trust the CA certificates in this PEM file (repeatable)
    #[arg(long, value_name = "FILE")]
    ca: Vec<PathBuf>,
    /// Run only ImageSets signed by this public key, PEM (repeatable, any of them is enough); see `layercake imageset keygen`
    #[arg(long, value_name = "FILE")]
    imageset_key: Vec<PathBuf>,
    /// Give nodes this registry table, TOML with `[[registries]]` as in layercake.toml: mirrors, CA certificates, credentials.
    /// Whoever can fetch the archive can read it: credentials should only be able to pull
    #[arg(long, value_name = "FILE")]
    registries: Option<PathBuf>,
    /// The nodes' network configuration, /etc/layercake/network.toml
    #[arg(long, value_name = "FILE")]
    network: Option<PathBuf>,
    /// Put a rescue shell in: Debian's static busybox, offered on the console as layercake.rescue= says
    #[arg(long)]
    rescue_shell: bool,
    /// Put ssh in: Debian's dropbear, with keys only, while there is a rescue shell, or always
    #[arg(long, value_name = "WHEN", num_args = 0..=1, default_missing_value = "rescue")]
    ssh: Option<SshArg>,
    /// The host key of ssh (dropbear's form or OpenSSH's); without it each node makes its own. Whoever can fetch the archive can
    /// read it
    #[arg(long, value_name = "FILE", requires = "ssh")]
    ssh_host_key: Option<PathBuf>,
    /// Merge this directory's tree over the rest, owned by root (repeatable, the last one wins)
    #[arg(long, value_name = "DIR")]
    dir: Vec<PathBuf>,
    /// Look for newer packages although some are in the cache
    #[arg(long)]
    update: bool,
    /// Print what was made as JSON instead of the table
    #[arg(long)]
    json: bool,
}

/// When ssh is started.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum SshArg {
    /// While there is a rescue shell
    Rescue,
    /// Always
    Always,
}

/// Runs `cargo xtask overlay`.
///
/// # Errors
/// Something cannot be read, is not what it should be, or cannot be fetched.
pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let config = Config {
        authorized_keys: args.authorized_key.clone(),
        ca: args.ca.clone(),
        imageset_keys: args.imageset_key.clone(),
        registries: args.registries.clone(),
        network: args.network.clone(),
        rescue_shell: args.rescue_shell,
        ssh: args.ssh.map(|when| match when {
            SshArg::Rescue => Ssh::Rescue,
            SshArg::Always => Ssh::Always,
        }),
        ssh_host_key: args.ssh_host_key.clone(),
        dirs: args.dir.clone(),
        update: args.update,
        mtime: source_date_epoch()?,
        cache: target_dir(&root()).join("layer0-cache"),
        out: args.out.clone(),
    };
    let report = site::build(&config, &|text| eprintln!("overlay: {text}"))?;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&report).context("cannot render the report")?);
    } else {
        print!("{}", table(&report));
    }
    Ok(())
}

/// One line for each file but for the names of busybox, which are counted.
fn table(report: &Report) -> String {
    let mut text = String::new();
    let links = report.files.iter().filter(|(_, size)| *size == 0).count();
    for (path, size) in report.files.iter().filter(|(_, size)| *size > 0) {
        text.push_str(&format!("{size:>11}  {path}\n"));
    }
    if links > 0 {
        text.push_str(&format!("{links:>11}  links and empty files\n"));
    }
    for package in &report.packages {
        text.push_str(&format!("{:>11}  {package}\n", "package"));
    }
    let secret = if report.secret { ", readable by its owner alone" } else { "" };
    let Report { out, digest, size, plain_size, .. } = report;
    text.push_str(&format!("{size:>11}  {}, {plain_size} unpacked{secret}\n", out.display()));
    text.push_str(&format!("             {digest}\n"));
    text
}
