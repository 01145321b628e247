//! What the lab needs on this machine, and how it is installed: by apt-get as root on a Debian-family system,
//! otherwise the exact command is printed and nothing is touched.
//!
//! Deciding (which package for which missing thing) is pure; looking and installing stand at the end.

use std::fmt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

/// Where firmware and ROM files lie, over the distributions (Debian, Fedora, Arch).
const ROM_DIRS: [&str; 5] = [
    "/usr/lib/ipxe/qemu",
    "/usr/share/qemu",
    "/usr/share/ipxe/qemu",
    "/usr/local/share/qemu",
    "/usr/share/qemu-kvm",
];
/// The ROM that QEMU's virtio-net-pci loads by default: iPXE for BIOS and UEFI in one.
const ROM: &str = "efi-virtio.rom";
/// iPXE's boot files, for firmware that is not iPXE itself.
const IPXE_DIRS: [&str; 3] = ["/usr/lib/ipxe", "/usr/share/ipxe", "/usr/share/ipxe/x86_64"];
/// UEFI firmware as Debian has it; the other distributions' files have other names and sizes.
const OVMF: &str = "/usr/share/OVMF/OVMF_CODE_4M.fd";
/// systemd's EFI stub as Debian has it.
const EFI_STUB: &str = "/usr/lib/systemd/boot/efi/linuxx64.efi.stub";
/// Where nfs-ganesha's back ends lie.
const GANESHA_VFS: [&str; 3] =
    ["/usr/lib/ganesha", "/usr/lib64/ganesha", "/usr/lib/x86_64-linux-gnu/ganesha"];
/// Directories of programs beyond `PATH`, which lacks them for ordinary users.
const SBIN: [&str; 3] = ["/usr/sbin", "/sbin", "/usr/local/sbin"];

/// Something that must be on the machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Need {
    /// `qemu-system-x86_64`.
    Qemu,
    /// The network boot ROM of QEMU's virtio NIC.
    IpxeRom,
    /// `undionly.kpxe`, iPXE for other PXE firmware.
    IpxeFiles,
    /// `ip`.
    Ip,
    /// `setpriv`, `unshare` and `nsenter`.
    UtilLinux,
    /// `ethtool`, where the machines have no taps.
    Ethtool,
    /// Debian's `docker-registry`.
    DockerRegistry,
    /// A static busybox, the rescue shell.
    Busybox,
    /// `dnsmasq`, the boot server that is not ours.
    Dnsmasq,
    /// `htpasswd`, for users of test registries.
    Htpasswd,
    /// `mkfs.erofs`, for mount forms.
    MkfsErofs,
    /// `mksquashfs`, for mount forms.
    Mksquashfs,
    /// `mmdebstrap`, for `debian:` sources and the benches' Debian system.
    Mmdebstrap,
    /// `skopeo`, a registry client that is not ours.
    Skopeo,
    /// `umoci`, which unpacks images as others do.
    Umoci,
    /// `podman`, an engine that is not ours.
    Podman,
    /// `curl`, a client for HTTP and TFTP.
    Curl,
    /// `atftp`, a TFTP client with options.
    Atftp,
    /// `tftp` of tftp-hpa, a TFTP client.
    TftpHpa,
    /// `kill`, the program.
    Kill,
    /// GNU `time`, which says what a program cost.
    Time,
    /// `containerd` and `ctr`.
    Containerd,
    /// `runc`, which starts a container from a bundle.
    Runc,
    /// `crun`, which does as well.
    Crun,
    /// `igzip`, the fastest gzip there is.
    Igzip,
    /// `openssl`, the second judge of signatures.
    OpenSsl,
    /// `mkfs.ext4`, for disks that nodes keep blobs on.
    MkfsExt4,
    /// `ganesha.nfsd`, an NFS server.
    NfsGanesha,
    /// Its back end for directories of this machine.
    NfsGaneshaVfs,
    /// `tgtd` and `tgtadm`, an iSCSI target.
    Tgt,
    /// `cpio`.
    Cpio,
    /// `newuidmap` and `newgidmap`, for mmdebstrap without root.
    Uidmap,
    /// `buildah`, which makes images.
    Buildah,
    /// `nginx`, which serves files.
    Nginx,
    /// `fsck.fat`.
    Dosfstools,
    /// `mcopy` and `mdir`.
    Mtools,
    /// `sfdisk`.
    Fdisk,
    /// OVMF, UEFI firmware for QEMU.
    Ovmf,
    /// systemd's EFI stub.
    EfiStub,
    /// `sbsign` and `sbverify`.
    SbSign,
    /// `rpmbuild`, `rpm2cpio` and `rpm`.
    Rpm,
}

/// What the demo needs.
pub const DEMO: &[Need] = &[Need::Qemu, Need::IpxeRom, Need::IpxeFiles, Need::Ip, Need::UtilLinux];

/// What the whole-system cases need.
pub const CASES: &[Need] = &[
    Need::MkfsErofs,
    Need::Mksquashfs,
    Need::Qemu,
    Need::IpxeRom,
    Need::IpxeFiles,
    Need::Ip,
    Need::UtilLinux,
    Need::DockerRegistry,
    Need::Busybox,
    Need::Dnsmasq,
    Need::Mmdebstrap,
    Need::Uidmap,
    Need::Buildah,
    Need::Umoci,
    Need::Skopeo,
    Need::Podman,
    Need::Runc,
];

/// What the cases with network storage need beside [`CASES`].
pub const STORAGE_CASES: &[Need] =
    &[Need::NfsGanesha, Need::NfsGaneshaVfs, Need::Tgt, Need::MkfsExt4, Need::OpenSsl, Need::Curl];

/// What the cases with UEFI firmware need.
pub const EFI_CASES: &[Need] =
    &[Need::Qemu, Need::Ip, Need::UtilLinux, Need::Ovmf, Need::EfiStub, Need::SbSign];

/// What the unit and integration tests of all crates need.
pub const UNIT: &[Need] = &[
    Need::Dosfstools,
    Need::Mtools,
    Need::Fdisk,
    Need::MkfsErofs,
    Need::Mksquashfs,
    Need::Qemu,
    Need::Ip,
    Need::UtilLinux,
    Need::Ethtool,
    Need::DockerRegistry,
    Need::Busybox,
    Need::Dnsmasq,
    Need::Skopeo,
    Need::Umoci,
    Need::Podman,
    Need::Curl,
    Need::Atftp,
    Need::TftpHpa,
    Need::Kill,
    Need::Htpasswd,
    Need::Mmdebstrap,
    Need::OpenSsl,
    Need::MkfsExt4,
    Need::Cpio,
    Need::Rpm,
    Need::Tgt,
];

/// What `cargo xtask bench pull` needs.
pub const BENCH_PULL: &[Need] = &[
    Need::MkfsErofs,
    Need::Mksquashfs,
    Need::Ip,
    Need::UtilLinux,
    Need::DockerRegistry,
    Need::Mmdebstrap,
    Need::Time,
    Need::Podman,
    Need::Skopeo,
    Need::Umoci,
    Need::Containerd,
    Need::Curl,
    Need::Igzip,
];

/// What `cargo xtask bench roll` needs.
pub const BENCH_ROLL: &[Need] =
    &[Need::Ip, Need::UtilLinux, Need::Podman, Need::Runc, Need::Crun, Need::Busybox];

/// A package manager.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Manager {
    /// Debian, Ubuntu and their family.
    Apt,
    /// Fedora and its family.
    Dnf,
    /// Arch and its family.
    Pacman,
}

impl Need {
    /// The package that brings it; none where the distribution has none.
    #[must_use]
    pub fn package(self, manager: Manager) -> Option<&'static str> {
        let [apt, dnf, pacman] = match self {
            Self::Qemu => {
                [Some("qemu-system-x86"), Some("qemu-system-x86-core"), Some("qemu-system-x86")]
            }
            Self::IpxeRom => [Some("ipxe-qemu"), Some("ipxe-roms-qemu"), Some("qemu-common")],
            Self::IpxeFiles => [Some("ipxe"), Some("ipxe-bootimgs-x86"), Some("ipxe")],
            Self::Ip => [Some("iproute2"), Some("iproute"), Some("iproute2")],
            Self::UtilLinux => [Some("util-linux"), Some("util-linux"), Some("util-linux")],
            Self::DockerRegistry => [Some("docker-registry"), Some("docker-distribution"), None],
            Self::Busybox => [Some("busybox-static"), Some("busybox"), Some("busybox")],
            Self::Dnsmasq => [Some("dnsmasq-base"), Some("dnsmasq"), Some("dnsmasq")],
            Self::TftpHpa => [Some("tftp-hpa"), Some("tftp"), Some("tftp-hpa")],
            Self::Time => [Some("time"); 3],
            Self::Containerd => [Some("containerd"); 3],
            Self::Runc => [Some("runc"); 3],
            Self::Crun => [Some("crun"); 3],
            Self::Igzip => [Some("isal"), Some("isa-l-tools"), Some("isa-l")],
            Self::Kill => [Some("procps"), Some("util-linux"), Some("util-linux")],
            Self::Atftp => [Some("atftp"), Some("atftp"), None],
            Self::Ethtool => [Some("ethtool"); 3],
            Self::Skopeo => [Some("skopeo"); 3],
            Self::Umoci => [Some("umoci"), None, Some("umoci")],
            Self::Podman => [Some("podman"); 3],
            Self::Curl => [Some("curl"); 3],
            Self::Htpasswd => [Some("apache2-utils"), Some("httpd-tools"), Some("apache")],
            Self::MkfsErofs => [Some("erofs-utils"); 3],
            Self::Mksquashfs => [Some("squashfs-tools"); 3],
            Self::Mmdebstrap => [Some("mmdebstrap"), Some("mmdebstrap"), None],
            Self::OpenSsl => [Some("openssl"); 3],
            Self::MkfsExt4 => [Some("e2fsprogs"); 3],
            Self::NfsGanesha => [Some("nfs-ganesha"), Some("nfs-ganesha"), None],
            Self::NfsGaneshaVfs => [Some("nfs-ganesha-vfs"), Some("nfs-ganesha-vfs"), None],
            Self::Tgt => [Some("tgt"), Some("scsi-target-utils"), None],
            Self::Cpio => [Some("cpio"); 3],
            Self::Uidmap => [Some("uidmap"), Some("shadow-utils"), Some("shadow")],
            Self::Buildah => [Some("buildah"); 3],
            Self::Nginx => [Some("nginx-light"), Some("nginx"), Some("nginx")],
            Self::Dosfstools => [Some("dosfstools"); 3],
            Self::Mtools => [Some("mtools"); 3],
            Self::Fdisk => [Some("fdisk"), Some("util-linux"), Some("util-linux")],
            Self::Ovmf => [Some("ovmf"), None, None],
            Self::EfiStub => [Some("systemd-boot-efi"), None, None],
            Self::SbSign => [Some("sbsigntool"), Some("sbsigntools"), Some("sbsigntools")],
            Self::Rpm => [Some("rpm"), Some("rpm-build"), Some("rpm-tools")],
        };
        match manager {
            Manager::Apt => apt,
            Manager::Dnf => dnf,
            Manager::Pacman => pacman,
        }
    }

    /// The programs that it stands for; none for what is no program.
    fn programs(self) -> &'static [&'static str] {
        match self {
            Self::Qemu => &["qemu-system-x86_64"],
            Self::IpxeRom | Self::IpxeFiles | Self::Ovmf | Self::EfiStub | Self::NfsGaneshaVfs => {
                &[]
            }
            Self::NfsGanesha => &["ganesha.nfsd"],
            Self::Tgt => &["tgtd", "tgtadm"],
            Self::Cpio => &["cpio"],
            Self::Ip => &["ip"],
            Self::UtilLinux => &["setpriv", "unshare", "nsenter"],
            Self::Ethtool => &["ethtool"],
            Self::DockerRegistry => &["docker-registry"],
            Self::Busybox => &["busybox"],
            Self::Dnsmasq => &["dnsmasq"],
            Self::Skopeo => &["skopeo"],
            Self::Umoci => &["umoci"],
            Self::Podman => &["podman"],
            Self::Curl => &["curl"],
            Self::Htpasswd => &["htpasswd"],
            Self::MkfsErofs => &["mkfs.erofs"],
            Self::Mksquashfs => &["mksquashfs"],
            Self::Mmdebstrap => &["mmdebstrap"],
            Self::Atftp => &["atftp"],
            Self::TftpHpa => &["tftp"],
            Self::Kill => &["kill"],
            Self::Time => &["time"],
            Self::Containerd => &["containerd", "ctr"],
            Self::Runc => &["runc"],
            Self::Crun => &["crun"],
            Self::Igzip => &["igzip"],
            Self::OpenSsl => &["openssl"],
            Self::MkfsExt4 => &["mkfs.ext4"],
            Self::Uidmap => &["newuidmap", "newgidmap"],
            Self::Buildah => &["buildah"],
            Self::Nginx => &["nginx"],
            Self::Dosfstools => &["fsck.fat"],
            Self::Mtools => &["mcopy", "mdir"],
            Self::Fdisk => &["sfdisk"],
            Self::SbSign => &["sbsign", "sbverify"],
            Self::Rpm => &["rpmbuild", "rpm2cpio", "rpm"],
        }
    }

    fn present(self) -> bool {
        match self {
            Self::IpxeRom => ROM_DIRS.iter().any(|dir| Path::new(dir).join(ROM).exists()),
            Self::IpxeFiles => ipxe_dir().is_some(),
            Self::Ovmf => Path::new(OVMF).exists(),
            Self::EfiStub => Path::new(EFI_STUB).exists(),
            Self::NfsGaneshaVfs => {
                GANESHA_VFS.iter().any(|dir| Path::new(dir).join("libfsalvfs.so").exists())
            }
            _ => self.programs().iter().all(|program| find_program(program).is_some()),
        }
    }
}

impl fmt::Display for Need {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::IpxeRom => f.write_str("the network boot ROM of QEMU's NIC (efi-virtio.rom)"),
            Self::IpxeFiles => f.write_str("iPXE's boot files (undionly.kpxe)"),
            Self::Busybox => f.write_str("a static busybox"),
            Self::NfsGaneshaVfs => f.write_str("nfs-ganesha's VFS back end (libfsalvfs.so)"),
            Self::Ovmf => f.write_str("UEFI firmware (OVMF_CODE_4M.fd)"),
            Self::EfiStub => f.write_str("systemd's EFI stub (linuxx64.efi.stub)"),
            _ => f.write_str(&self.programs().join(", ")),
        }
    }
}

/// The packages that bring these things, each once, in order.
#[must_use]
pub fn packages(missing: &[Need], manager: Manager) -> Vec<&'static str> {
    let mut packages: Vec<&str> = Vec::new();
    for package in missing.iter().filter_map(|need| need.package(manager)) {
        if !packages.contains(&package) {
            packages.push(package);
        }
    }
    packages
}

/// What a person types to install these things.
#[must_use]
pub fn command_line(missing: &[Need], manager: Manager) -> String {
    let install = match manager {
        Manager::Apt => "sudo apt-get update && sudo apt-get install --no-install-recommends",
        Manager::Dnf => "sudo dnf install --setopt=install_weak_deps=False",
        Manager::Pacman => "sudo pacman -S --needed",
    };
    format!("{install} {}", packages(missing, manager).join(" "))
}

/// What to tell a person whose machine lacks these things.
#[must_use]
pub fn advice(missing: &[Need]) -> String {
    let names: Vec<String> = missing.iter().map(ToString::to_string).collect();
    let lines: Vec<String> =
        [("Debian, Ubuntu", Manager::Apt), ("Fedora", Manager::Dnf), ("Arch", Manager::Pacman)]
            .iter()
            .map(|(family, manager)| format!("  {family}: {}", command_line(missing, *manager)))
            .collect();
    format!("missing: {}. Install with\n{}", names.join(", "), lines.join("\n"))
}

/// Makes sure these things are there, installing what is missing where that can be done without asking.
///
/// # Errors
/// What is missing with the commands that install it, or that installing failed.
pub fn ensure(needs: &[Need]) -> Result<()> {
    let missing: Vec<Need> = needs.iter().copied().filter(|need| !need.present()).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let may_install = nix::unistd::geteuid().is_root()
        && !crate::namespace::in_user_namespace()
        && find_program("apt-get").is_some();
    if !may_install {
        bail!("{}", advice(&missing));
    }
    let packages = packages(&missing, Manager::Apt);
    apt_get(&["update", "--quiet"])?;
    // Another apt-get that runs at the same time is waited for.
    let lock = ["-o", "DPkg::Lock::Timeout=300"];
    let install = ["install", "--yes", "--quiet", "--no-install-recommends"];
    apt_get(&[&lock[..], &install[..], &packages].concat())?;
    let still: Vec<Need> = missing.into_iter().filter(|need| !need.present()).collect();
    if !still.is_empty() {
        bail!("apt-get installed {} but {}", packages.join(" "), advice(&still));
    }
    Ok(())
}

/// apt-get with its output on our stderr: stdout is for results.
fn apt_get(args: &[&str]) -> Result<()> {
    let status = Command::new("apt-get")
        .args(args)
        .env("DEBIAN_FRONTEND", "noninteractive")
        .stdin(Stdio::null())
        .stdout(std::io::stderr())
        .status()
        .context("cannot run apt-get")?;
    if !status.success() {
        bail!("apt-get {} failed: {status}", args.join(" "));
    }
    Ok(())
}

/// The directory of iPXE's boot files, where it is installed.
#[must_use]
pub fn ipxe_dir() -> Option<PathBuf> {
    IPXE_DIRS.iter().map(PathBuf::from).find(|dir| dir.join("undionly.kpxe").exists())
}

/// A program in `PATH` or one of the system's sbin directories.
#[must_use]
pub fn find_program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(SBIN.iter().map(PathBuf::from))
        .map(|dir| dir.join(name))
        .find(|file| file.is_file())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_missing_thing_names_its_package_once() {
        let missing = [Need::IpxeRom, Need::Qemu, Need::IpxeRom];
        assert_eq!(packages(&missing, Manager::Apt), ["ipxe-qemu", "qemu-system-x86"]);
        assert_eq!(packages(&missing, Manager::Dnf), ["ipxe-roms-qemu", "qemu-system-x86-core"]);
    }

    #[test]
    fn a_thing_without_a_package_is_left_out_of_the_command() {
        assert_eq!(
            command_line(&[Need::DockerRegistry, Need::Ip], Manager::Pacman),
            "sudo pacman -S --needed iproute2"
        );
    }

    #[test]
    fn the_advice_has_one_command_for_each_family() {
        assert_eq!(
            advice(&[Need::IpxeFiles, Need::Ip]),
            "missing: iPXE's boot files (undionly.kpxe), ip. Install with\n  \
             Debian, Ubuntu: sudo apt-get update && sudo apt-get install --no-install-recommends ipxe iproute2\n  \
             Fedora: sudo dnf install --setopt=install_weak_deps=False ipxe-bootimgs-x86 iproute\n  \
             Arch: sudo pacman -S --needed ipxe iproute2"
        );
    }

    #[test]
    fn everything_that_is_needed_has_a_debian_package() {
        for need in CASES.iter().chain(UNIT).chain(DEMO).chain(BENCH_PULL).chain(BENCH_ROLL) {
            assert!(need.package(Manager::Apt).is_some(), "{need}");
        }
    }

    #[test]
    fn programs_are_found_in_the_path_and_strange_ones_are_not() {
        assert!(find_program("sh").is_some());
        assert_eq!(find_program("no-such-program-anywhere"), None);
    }
}
