//! The peers: initramfs-tools and dracut as Debian packages them, in a system of their own that mmdebstrap makes once. They
//! get the same kernel's modules; nothing of this machine is changed.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use initramfs::kernel::Kernel;

use super::images::Contestant;

/// Changes when the system is made in another way: the old one is then not used any more.
const RECIPE: &str = "peers-1";
/// What is in it beside Debian's required packages.
const PACKAGES: &str = "busybox,dbus,dracut-core,dracut-network,initramfs-tools,iproute2,isc-dhcp-client,kmod,\
                        procps,systemd-sysv,udev,zstd";
/// Debian's release and where it comes from.
const SUITE: [&str; 2] = ["bookworm", "http://deb.debian.org/debian"];
/// Runs in a mount namespace of its own: what both look for below /proc, /sys and /dev.
const ENTER: &str = "mount -t proc proc \"$0/proc\" && mount -t sysfs sysfs \"$0/sys\" && \
                     mount --rbind /dev \"$0/dev\" && mount -t tmpfs tmp \"$0/tmp\" && exec chroot \"$0\" \"$@\"";

/// The system that they are in.
#[derive(Debug)]
pub(super) struct Peers {
    root: PathBuf,
    release: String,
}

/// What one of them built.
#[derive(Debug)]
pub(super) struct Built {
    pub(super) file: PathBuf,
    /// With its version.
    pub(super) name: String,
    /// Seconds from start to end.
    pub(super) took: f64,
}

impl Peers {
    /// The system in this directory, made when it is not there, with this kernel's modules in it.
    ///
    /// # Errors
    /// When it cannot be made.
    pub(super) fn ensure(dir: &Path, kernel: &Kernel) -> Result<Self> {
        let root = dir.join(RECIPE);
        let made = dir.join(format!("{RECIPE}.made"));
        if !made.exists() {
            eprintln!("making the peers' system below {} (minutes, once)", root.display());
            if root.exists() {
                fs::remove_dir_all(&root).with_context(|| root.display().to_string())?;
            }
            let mut command = Command::new("mmdebstrap");
            command.args(["--variant=minbase", "--components=main"]);
            command.arg(format!("--include={PACKAGES}")).arg(SUITE[0]).arg(&root).arg(SUITE[1]);
            succeed(&mut command)?;
            fs::write(&made, "").with_context(|| made.display().to_string())?;
        }
        let peers = Self { root, release: kernel.release.clone() };
        peers.place_kernel(kernel)?;
        Ok(peers)
    }

    /// The modules with depmod's indexes, and the configuration, as the kernel's package would leave them.
    fn place_kernel(&self, kernel: &Kernel) -> Result<()> {
        let modules = self.root.join("lib/modules").join(&self.release);
        if modules.join("modules.dep").exists() {
            return Ok(());
        }
        let parent = self.root.join("lib/modules");
        fs::create_dir_all(&parent).with_context(|| parent.display().to_string())?;
        let mut copy = Command::new("cp");
        succeed(
            copy.args(["--archive", "--no-target-directory"])
                .arg(&kernel.modules_dir)
                .arg(&modules),
        )?;
        let config = self.root.join("boot").join(format!("config-{}", self.release));
        fs::write(&config, kernel.config.as_deref().unwrap_or_default())
            .with_context(|| config.display().to_string())?;
        self.inside(&["depmod", &self.release]).map(drop)
    }

    /// Builds an initramfs, as a person would with the package's own command.
    ///
    /// # Errors
    /// When that fails.
    pub(super) fn build(&self, contestant: Contestant) -> Result<Built> {
        eprintln!("building the initramfs of {}", contestant.name());
        let release = self.release.as_str();
        let (package, argv) = match contestant {
            Contestant::InitramfsTools => {
                self.configure_netboot()?;
                let argv = vec!["mkinitramfs", "-d", "/root/netboot", "-o", "/root/built", release];
                ("initramfs-tools-core", argv)
            }
            Contestant::Dracut => {
                let add = ["--force", "--no-hostonly", "--add", "network"];
                let mut argv = vec!["dracut"];
                argv.extend(add);
                argv.extend(["--kver", release, "/root/built"]);
                ("dracut-core", argv)
            }
            _ => bail!("{} is not made by others", contestant.name()),
        };
        let file = self.root.join("root/built");
        if file.exists() {
            fs::remove_file(&file).with_context(|| file.display().to_string())?;
        }
        let begun = Instant::now();
        self.inside(&argv)?;
        let took = begun.elapsed().as_secs_f64();
        let kept = self.root.join("root").join(format!("{contestant:?}"));
        fs::rename(&file, &kept)
            .with_context(|| format!("{} left no {}", argv.join(" "), file.display()))?;
        let version = self.inside(&["dpkg-query", "-W", "-f", "${Version}", package])?;
        Ok(Built { file: kept, name: format!("{} ({version})", contestant.name()), took })
    }

    /// Debian's own configuration with the two words that make it boot from the network (initramfs.conf(5)).
    fn configure_netboot(&self) -> Result<()> {
        let script = "rm -rf /root/netboot && cp -a /etc/initramfs-tools /root/netboot && \
                      sed -i 's/^MODULES=.*/MODULES=netboot/; $aBOOT=nfs' /root/netboot/initramfs.conf";
        self.inside(&["sh", "-c", script]).map(drop)
    }

    fn inside(&self, argv: &[&str]) -> Result<String> {
        let mut command = Command::new("unshare");
        command.args(["--mount", "--", "sh", "-c", ENTER]).arg(&self.root).args(argv);
        succeed(&mut command)
    }
}

/// Runs a program to its end, and gives what it said.
fn succeed(command: &mut Command) -> Result<String> {
    let output = command.stdin(Stdio::null()).output().context("cannot start a program")?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        let last: Vec<&str> = said.lines().rev().take(15).collect();
        let last: Vec<&str> = last.into_iter().rev().collect();
        bail!("{command:?} failed ({}): {}", output.status, last.join("\n"));
    }
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}
