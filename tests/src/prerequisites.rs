//! What the lab needs on this machine, and how it is installed: by apt-get as root on a Debian-family system,
//! otherwise the exact command is printed and nothing is touched.
//!
//! Deciding (which package for which missing thing) is pure; looking and installing stand at the end.

use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

mod table;

pub use table::{Manager, Need, find_program, ipxe_dir};

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
    Need::Ssh,
];

/// What the cases with network storage need beside [`CASES`].
pub const STORAGE_CASES: &[Need] =
    &[Need::NfsGanesha, Need::NfsGaneshaVfs, Need::Tgt, Need::MkfsExt4, Need::OpenSsl, Need::Curl];

/// What the cases with UEFI firmware need.
pub const EFI_CASES: &[Need] = &[
    Need::Qemu,
    Need::Ip,
    Need::UtilLinux,
    Need::Ovmf,
    Need::EfiStub,
    Need::SbSign,
    Need::Faketime,
];

/// What the cases need that boot from disks and CDs.
pub const FORM_CASES: &[Need] =
    &[Need::Syslinux, Need::SyslinuxFiles, Need::Isolinux, Need::Xorriso, Need::Mtools];

/// What building a kernel from source needs.
pub const KERNEL: &[Need] =
    &[Need::Make, Need::Gcc, Need::Flex, Need::Bison, Need::Bc, Need::Perl, Need::Xz, Need::LibElf];

/// What the unit and integration tests of all crates need.
pub const UNIT: &[Need] = &[
    Need::Syslinux,
    Need::SyslinuxFiles,
    Need::Isolinux,
    Need::Xorriso,
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
    Need::KeaDhcp6,
    Need::Skopeo,
    Need::Umoci,
    Need::Podman,
    Need::Curl,
    Need::Atftp,
    Need::TftpHpa,
    Need::Time,
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

/// What `cargo xtask bench layer0` needs.
pub const BENCH_LAYER0: &[Need] =
    &[Need::Qemu, Need::Ip, Need::UtilLinux, Need::Dnsmasq, Need::Mmdebstrap];

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
