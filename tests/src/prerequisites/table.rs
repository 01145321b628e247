//! The table of what the lab, the tests and the benches use of the machine: how to see that it is there, and which package
//! brings it. One row a thing. What is needed for what, and installing, stands a level up.

use std::fmt;
use std::path::{Path, PathBuf};

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
const UNDIONLY: &str = "undionly.kpxe";
/// Where nfs-ganesha's back ends lie.
const GANESHA_DIRS: [&str; 3] =
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
    /// `kea-dhcp6`, a DHCPv6 server that is not ours.
    KeaDhcp6,
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
    /// `ssh` and `ssh-keygen`, for rescue from afar.
    Ssh,
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
    /// `faketime`, which holds the clock for a signature.
    Faketime,
    /// `syslinux`, which makes a disk boot.
    Syslinux,
    /// Its boot code and modules.
    SyslinuxFiles,
    /// `isolinux.bin`, which a CD boots.
    Isolinux,
    /// `xorriso`, which writes CDs.
    Xorriso,
    /// `make`.
    Make,
    /// `gcc` and `ld`.
    Gcc,
    /// `flex`.
    Flex,
    /// `bison`.
    Bison,
    /// `bc`.
    Bc,
    /// `perl`.
    Perl,
    /// `xz`.
    Xz,
    /// The headers of libelf.
    LibElf,
    /// `rpmbuild`, `rpm2cpio` and `rpm`.
    Rpm,
}

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

/// Packages by [`Manager`]; none where the distribution has none.
type Packages = [Option<&'static str>; 3];

const fn everywhere(package: &'static str) -> Packages {
    [Some(package); 3]
}

/// How a thing is seen to be there.
#[derive(Debug, Clone, Copy)]
enum Sign {
    /// All of these programs are found.
    Programs(&'static [&'static str]),
    /// A file of this name lies in one of the directories.
    File { about: &'static str, dirs: &'static [&'static str], name: &'static str },
}

const fn programs(names: &'static [&'static str]) -> Sign {
    Sign::Programs(names)
}

const fn file(about: &'static str, dirs: &'static [&'static str], name: &'static str) -> Sign {
    Sign::File { about, dirs, name }
}

impl Need {
    #[rustfmt::skip]
    fn row(self) -> (Packages, Sign) {
        match self {
            Self::Qemu => ([Some("qemu-system-x86"), Some("qemu-system-x86-core"), Some("qemu-system-x86")], programs(&["qemu-system-x86_64"])),
            Self::IpxeRom => ([Some("ipxe-qemu"), Some("ipxe-roms-qemu"), Some("qemu-common")], file("the network boot ROM of QEMU's NIC (efi-virtio.rom)", &ROM_DIRS, ROM)),
            Self::IpxeFiles => ([Some("ipxe"), Some("ipxe-bootimgs-x86"), Some("ipxe")], file("iPXE's boot files (undionly.kpxe)", &IPXE_DIRS, UNDIONLY)),
            Self::Ip => ([Some("iproute2"), Some("iproute"), Some("iproute2")], programs(&["ip"])),
            Self::UtilLinux => (everywhere("util-linux"), programs(&["setpriv", "unshare", "nsenter"])),
            Self::Ethtool => (everywhere("ethtool"), programs(&["ethtool"])),
            Self::DockerRegistry => ([Some("docker-registry"), Some("docker-distribution"), None], programs(&["docker-registry"])),
            Self::Busybox => ([Some("busybox-static"), Some("busybox"), Some("busybox")], programs(&["busybox"])),
            Self::KeaDhcp6 => ([Some("kea-dhcp6-server"), Some("kea"), Some("kea")], programs(&["kea-dhcp6"])),
            Self::Dnsmasq => ([Some("dnsmasq-base"), Some("dnsmasq"), Some("dnsmasq")], programs(&["dnsmasq"])),
            Self::Htpasswd => ([Some("apache2-utils"), Some("httpd-tools"), Some("apache")], programs(&["htpasswd"])),
            Self::MkfsErofs => (everywhere("erofs-utils"), programs(&["mkfs.erofs"])),
            Self::Mksquashfs => (everywhere("squashfs-tools"), programs(&["mksquashfs"])),
            Self::Mmdebstrap => ([Some("mmdebstrap"), Some("mmdebstrap"), None], programs(&["mmdebstrap"])),
            Self::Skopeo => (everywhere("skopeo"), programs(&["skopeo"])),
            Self::Umoci => ([Some("umoci"), None, Some("umoci")], programs(&["umoci"])),
            Self::Podman => (everywhere("podman"), programs(&["podman"])),
            Self::Curl => (everywhere("curl"), programs(&["curl"])),
            Self::Atftp => ([Some("atftp"), Some("atftp"), None], programs(&["atftp"])),
            Self::TftpHpa => ([Some("tftp-hpa"), Some("tftp"), Some("tftp-hpa")], programs(&["tftp"])),
            Self::Kill => ([Some("procps"), Some("util-linux"), Some("util-linux")], programs(&["kill"])),
            Self::Time => (everywhere("time"), programs(&["time"])),
            Self::Containerd => (everywhere("containerd"), programs(&["containerd", "ctr"])),
            Self::Runc => (everywhere("runc"), programs(&["runc"])),
            Self::Crun => (everywhere("crun"), programs(&["crun"])),
            Self::Igzip => ([Some("isal"), Some("isa-l-tools"), Some("isa-l")], programs(&["igzip"])),
            Self::OpenSsl => (everywhere("openssl"), programs(&["openssl"])),
            Self::Ssh => ([Some("openssh-client"), Some("openssh-clients"), Some("openssh")], programs(&["ssh", "ssh-keygen"])),
            Self::MkfsExt4 => (everywhere("e2fsprogs"), programs(&["mkfs.ext4"])),
            Self::NfsGanesha => ([Some("nfs-ganesha"), Some("nfs-ganesha"), None], programs(&["ganesha.nfsd"])),
            Self::NfsGaneshaVfs => ([Some("nfs-ganesha-vfs"), Some("nfs-ganesha-vfs"), None], file("nfs-ganesha's VFS back end (libfsalvfs.so)", &GANESHA_DIRS, "libfsalvfs.so")),
            Self::Tgt => ([Some("tgt"), Some("scsi-target-utils"), None], programs(&["tgtd", "tgtadm"])),
            Self::Cpio => (everywhere("cpio"), programs(&["cpio"])),
            Self::Uidmap => ([Some("uidmap"), Some("shadow-utils"), Some("shadow")], programs(&["newuidmap", "newgidmap"])),
            Self::Buildah => (everywhere("buildah"), programs(&["buildah"])),
            Self::Nginx => ([Some("nginx-light"), Some("nginx"), Some("nginx")], programs(&["nginx"])),
            Self::Dosfstools => (everywhere("dosfstools"), programs(&["fsck.fat"])),
            Self::Mtools => (everywhere("mtools"), programs(&["mcopy", "mdir"])),
            Self::Fdisk => ([Some("fdisk"), Some("util-linux"), Some("util-linux")], programs(&["sfdisk"])),
            Self::Ovmf => ([Some("ovmf"), None, None], file("UEFI firmware (OVMF_CODE_4M.fd)", &["/usr/share/OVMF"], "OVMF_CODE_4M.fd")),
            Self::EfiStub => ([Some("systemd-boot-efi"), None, None], file("systemd's EFI stub (linuxx64.efi.stub)", &["/usr/lib/systemd/boot/efi"], "linuxx64.efi.stub")),
            Self::SbSign => ([Some("sbsigntool"), Some("sbsigntools"), Some("sbsigntools")], programs(&["sbsign", "sbverify"])),
            Self::Faketime => ([Some("faketime"), Some("libfaketime"), Some("libfaketime")], programs(&["faketime"])),
            Self::Syslinux => (everywhere("syslinux"), programs(&["syslinux"])),
            Self::SyslinuxFiles => ([Some("syslinux-common"), None, None], file("syslinux's boot code (gptmbr.bin)", &["/usr/lib/syslinux/mbr"], "gptmbr.bin")),
            Self::Isolinux => ([Some("isolinux"), None, None], file("the boot loader of CDs (isolinux.bin)", &["/usr/lib/ISOLINUX"], "isolinux.bin")),
            Self::Xorriso => ([Some("xorriso"), Some("xorriso"), Some("libisoburn")], programs(&["xorriso"])),
            Self::Make => (everywhere("make"), programs(&["make"])),
            Self::Gcc => (everywhere("gcc"), programs(&["gcc", "ld"])),
            Self::Flex => (everywhere("flex"), programs(&["flex"])),
            Self::Bison => (everywhere("bison"), programs(&["bison"])),
            Self::Bc => (everywhere("bc"), programs(&["bc"])),
            Self::Perl => (everywhere("perl"), programs(&["perl"])),
            Self::Xz => ([Some("xz-utils"), Some("xz"), Some("xz")], programs(&["xz"])),
            Self::LibElf => ([Some("libelf-dev"), Some("elfutils-libelf-devel"), Some("libelf")], file("the headers of libelf (gelf.h)", &["/usr/include"], "gelf.h")),
            Self::Rpm => ([Some("rpm"), Some("rpm-build"), Some("rpm-tools")], programs(&["rpmbuild", "rpm2cpio", "rpm"])),
        }
    }

    /// The package that brings it; none where the distribution has none.
    #[must_use]
    pub fn package(self, manager: Manager) -> Option<&'static str> {
        let [apt, dnf, pacman] = self.row().0;
        match manager {
            Manager::Apt => apt,
            Manager::Dnf => dnf,
            Manager::Pacman => pacman,
        }
    }

    pub(super) fn present(self) -> bool {
        match self.row().1 {
            Sign::Programs(names) => names.iter().all(|name| find_program(name).is_some()),
            Sign::File { dirs, name, .. } => {
                dirs.iter().any(|dir| Path::new(dir).join(name).exists())
            }
        }
    }
}

impl fmt::Display for Need {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.row().1 {
            _ if *self == Self::Busybox => f.write_str("a static busybox"),
            Sign::Programs(names) => f.write_str(&names.join(", ")),
            Sign::File { about, .. } => f.write_str(about),
        }
    }
}

/// The directory of iPXE's boot files, where it is installed.
#[must_use]
pub fn ipxe_dir() -> Option<PathBuf> {
    IPXE_DIRS.iter().map(PathBuf::from).find(|dir| dir.join(UNDIONLY).exists())
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
