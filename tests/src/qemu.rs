//! Machines: QEMU with a cable to the lab's bridge, an empty disk and a serial console. Firmware first, as a real
//! machine boots; or a kernel handed over directly, for what needs no server.

use std::fs::File;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use protocol::ids::{Mac, NodeId};

use crate::cable::Cable;
use crate::console::Console;
use crate::lab::Lab;
use crate::process::Process;
use crate::{console, prerequisites};

pub mod accelerator;
pub mod ovmf;
pub mod qmp;

pub use ovmf::{FirmwareProtocol, Ovmf};
pub use qmp::Qmp;

/// Memory of a machine where nothing else is said, in MB.
pub const MEMORY_MB: u32 = 512;
/// Size of the empty disk. It is sparse and takes no space.
const DISK_BYTES: u64 = 64 << 20;
/// Most machines of one lab: their number is the last byte of their Ethernet address, and 100 less than that of their
/// IP address.
pub const MAX_MACHINES: u8 = 99;

/// How a machine starts.
#[derive(Debug, Clone)]
pub enum Boot {
    /// As its firmware does: the NIC's iPXE ROM, DHCP, TFTP, HTTP.
    Network,
    /// As UEFI firmware (OVMF) does with drivers of its own: DHCP, then TFTP or HTTP.
    EfiNetwork(FirmwareProtocol),
    /// With this kernel, initramfs and command line, no firmware in between.
    Direct {
        /// The kernel.
        kernel: PathBuf,
        /// The initramfs.
        initramfs: PathBuf,
        /// The kernel command line.
        append: String,
    },
    /// With UEFI firmware (OVMF) from a disk whose first program is this one.
    Efi {
        /// An EFI program, such as a unified kernel image: the disk's `\\EFI\\BOOT\\BOOTX64.EFI`.
        program: PathBuf,
        /// The firmware.
        firmware: Ovmf,
    },
    /// With firmware from a medium that holds this image. It is not written to.
    Medium {
        /// The image.
        image: PathBuf,
        /// What it is on.
        medium: Medium,
        /// UEFI firmware; BIOS (SeaBIOS) without.
        firmware: Option<Ovmf>,
    },
    /// With a kernel that has its initramfs and command line inside, handed over as a BIOS boot loader does.
    Kernel {
        /// The kernel.
        image: PathBuf,
    },
}

/// What firmware boots from besides the network.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Medium {
    /// A SATA disk.
    Disk,
    /// A CD in a SATA drive.
    Cd,
    /// A USB stick.
    Stick,
}

impl Medium {
    /// QEMU's arguments for one with the drive `medium`.
    fn device(self) -> &'static [&'static str] {
        match self {
            Self::Disk => &["-device", "ide-hd,drive=medium,bus=ide.0,bootindex=0"],
            Self::Cd => &["-device", "ide-cd,drive=medium,bus=ide.0,bootindex=0"],
            Self::Stick => {
                &["-device", "qemu-xhci", "-device", "usb-storage,drive=medium,bootindex=0"]
            }
        }
    }
}

/// What a machine's NIC and its disk are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Devices {
    /// Those of virtual machines: virtio.
    Virtio,
    /// Those of a real machine, emulated: an Intel NIC (e1000e) and an NVMe disk.
    Emulated,
}

impl Devices {
    fn nic(self) -> &'static str {
        match self {
            Self::Virtio => "virtio-net-pci",
            Self::Emulated => "e1000e",
        }
    }

    /// QEMU's arguments for the disk in `file`.
    fn disk(self, file: &str) -> Vec<String> {
        match self {
            Self::Virtio => vec!["-drive".to_owned(), format!("if=virtio,format=raw,file={file}")],
            Self::Emulated => vec![
                "-drive".to_owned(),
                format!("if=none,id=disk,format=raw,file={file}"),
                "-device".to_owned(),
                "nvme,drive=disk,serial=layercake".to_owned(),
            ],
        }
    }
}

/// A machine to be started.
#[derive(Debug, Clone)]
pub struct MachineSpec {
    /// Its number in the lab, from 1 to [`MAX_MACHINES`].
    pub number: u8,
    /// Its memory in MB.
    pub memory_mb: u32,
    /// How it starts.
    pub boot: Boot,
    /// Its NIC and its disk.
    pub devices: Devices,
    /// Whether a reboot starts it again; otherwise it ends QEMU.
    pub reboots: bool,
    /// More arguments for QEMU.
    pub extra: Vec<String>,
}

impl MachineSpec {
    /// Machine `number`, booting from the network.
    #[must_use]
    pub fn netboot(number: u8) -> Self {
        Self {
            number,
            memory_mb: MEMORY_MB,
            boot: Boot::Network,
            devices: Devices::Virtio,
            reboots: true,
            extra: Vec::new(),
        }
    }

    /// Its Ethernet address, `52:54:00:00:00:NN`.
    #[must_use]
    pub fn mac(&self) -> Mac {
        mac(self.number)
    }

    /// QEMU's arguments. `dir` holds the machine's disk, log and socket.
    fn args(
        &self,
        accelerator: accelerator::Accelerator,
        netdev: String,
        dir: &Path,
    ) -> Vec<String> {
        let path = |name: &str| dir.join(name).display().to_string();
        let mut args: Vec<String> =
            ["-machine", "q35,graphics=off", "-nodefaults", "-display"].map(str::to_owned).to_vec();
        args.push("none".to_owned());
        args.extend(accelerator.args().map(str::to_owned));
        args.extend(["-m".to_owned(), self.memory_mb.to_string()]);
        args.extend([
            "-name".to_owned(),
            format!("node{}", self.number),
            "-uuid".to_owned(),
            format!("52540000-0000-4000-8000-0000000000{:02x}", self.number),
            "-chardev".to_owned(),
            format!(
                "socket,id=s0,path={},server=on,wait=off,logfile={},logappend=on",
                path("serial.sock"),
                path("serial.log")
            ),
            "-serial".to_owned(),
            "chardev:s0".to_owned(),
            "-qmp".to_owned(),
            format!("unix:{},server=on,wait=off", path("qmp.sock")),
            "-netdev".to_owned(),
            netdev,
        ]);
        args.extend(self.devices.disk(&path("disk.raw")));
        let nic = format!("{},netdev=n0,mac={}", self.devices.nic(), self.mac());
        match &self.boot {
            Boot::Network => args.extend(["-device".to_owned(), format!("{nic},bootindex=0")]),
            Boot::EfiNetwork(protocol) => {
                args.extend(Ovmf::Open.args(dir));
                args.extend(protocol.args().map(str::to_owned));
                args.extend(["-device".to_owned(), format!("{nic},romfile=,bootindex=0")]);
            }
            Boot::Direct { kernel, initramfs, append } => args.extend([
                "-device".to_owned(),
                format!("{nic},romfile="),
                "-kernel".to_owned(),
                kernel.display().to_string(),
                "-initrd".to_owned(),
                initramfs.display().to_string(),
                "-append".to_owned(),
                append.clone(),
            ]),
            Boot::Efi { firmware, .. } => {
                args.extend(firmware.args(dir));
                args.extend(Ovmf::disk(dir));
                args.extend(["-device".to_owned(), format!("{nic},romfile=")]);
            }
            Boot::Medium { image, medium, firmware } => {
                args.extend(firmware.iter().flat_map(|firmware| firmware.args(dir)));
                let drive =
                    format!("if=none,id=medium,format=raw,snapshot=on,file={}", image.display());
                args.extend(["-drive".to_owned(), drive]);
                args.extend(medium.device().iter().map(|it| (*it).to_owned()));
                args.extend(["-device".to_owned(), format!("{nic},romfile=")]);
            }
            Boot::Kernel { image } => args.extend([
                "-device".to_owned(),
                format!("{nic},romfile="),
                "-kernel".to_owned(),
                image.display().to_string(),
            ]),
        }
        if !self.reboots {
            args.push("-no-reboot".to_owned());
        }
        args.extend(self.extra.iter().cloned());
        args
    }
}

/// The Ethernet address of machine `number`.
#[must_use]
pub fn mac(number: u8) -> Mac {
    Mac([0x52, 0x54, 0, 0, 0, number])
}

/// The id that the lab's server gives machine `number`.
///
/// # Errors
/// Never for a number up to [`MAX_MACHINES`].
pub fn node_id(number: u8) -> Result<NodeId> {
    format!("n{number}").parse().context("a machine's number makes no node id")
}

/// The address that the lab's server gives machine `number`.
#[must_use]
pub fn address(number: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 9, 0, 100 + number)
}

/// The bridge's interface that leads to machine `number`.
fn port(number: u8) -> String {
    format!("tap{number}")
}

/// A machine that was started. Dropped, it loses its power.
#[derive(Debug)]
pub struct Machine {
    /// Its console.
    pub console: Console,
    /// Its id in the lab's server.
    pub id: NodeId,
    /// Its address, where the lab's server gives it one.
    pub address: Ipv4Addr,
    /// When QEMU was started.
    pub started: Instant,
    dir: PathBuf,
    process: Process,
    _cable: Cable,
}

impl Machine {
    /// Switches a machine on.
    ///
    /// # Errors
    /// When its disk or its cable cannot be made or QEMU cannot be started.
    pub fn start(lab: &Lab, spec: &MachineSpec) -> Result<Self> {
        let dir = lab.dir().join(format!("node{}", spec.number));
        std::fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
        let disk = dir.join("disk.raw");
        File::create(&disk)
            .and_then(|file| file.set_len(DISK_BYTES))
            .with_context(|| format!("cannot make {}", disk.display()))?;
        match &spec.boot {
            Boot::Efi { firmware, program } => {
                firmware.place(&dir)?;
                Ovmf::place_program(&dir, program)?;
            }
            Boot::Medium { firmware: Some(firmware), .. } => firmware.place(&dir)?,
            Boot::EfiNetwork(_) => Ovmf::Open.place(&dir)?,
            _ => {}
        }
        let cable = lab.add_cable(&port(spec.number), &dir)?;
        let accelerator = accelerator::best();
        let qemu = prerequisites::find_program(accelerator::QEMU)
            .with_context(|| format!("{} is missing", accelerator::QEMU))?;
        let args = spec.args(accelerator, cable.netdev(), &dir);
        let started = Instant::now();
        let process = Process::start(lab.namespace(), &qemu, args, &dir.join("qemu.log"))?;
        Ok(Self {
            console: Console::new(dir.join("serial.log"), dir.join("serial.sock")),
            id: node_id(spec.number)?,
            address: address(spec.number),
            started,
            dir,
            process,
            _cable: cable,
        })
    }

    /// QEMU's process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// Where its files lie.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// A conversation with its QEMU.
    ///
    /// # Errors
    /// When QEMU does not answer.
    pub fn qmp(&self) -> Result<Qmp> {
        Qmp::connect(&self.dir.join("qmp.sock"))
    }

    /// Fails when QEMU has ended, with what it and the machine said last.
    ///
    /// # Errors
    /// That it has ended.
    pub fn check_alive(&mut self) -> Result<()> {
        let situation = || {
            format!("{}: {} ends with\n{}", self.id, self.console.log().display(), {
                console::last_lines(self.console.log(), 15)
            })
        };
        self.process.check_alive().with_context(situation)
    }

    /// Whether the machine has switched itself off.
    ///
    /// # Errors
    /// When QEMU cannot be waited for.
    pub fn is_off(&mut self) -> Result<bool> {
        Ok(self.process.ended()?.is_some())
    }

    /// Waits until the machine has switched itself off (or, without [`MachineSpec::reboots`], wanted to reboot).
    ///
    /// # Errors
    /// When it has not in time.
    pub fn wait_off(&mut self, within: Duration) -> Result<ExitStatus> {
        let ended = self.process.wait_end(within);
        ended.with_context(|| format!("{} stays on; {}", self.id, self.console.situation()))
    }

    /// Pulls the plug.
    ///
    /// # Errors
    /// When QEMU cannot be killed.
    pub fn pull_the_plug(&mut self) -> Result<()> {
        self.process.kill()
    }

    /// Runs a command in the rescue shell on the console; the node must have booted with `layercake.rescue=always`.
    ///
    /// # Errors
    /// As [`Console::shell`].
    pub fn shell(&mut self, command: &str) -> Result<String> {
        /// A short command on a loaded emulated machine.
        const WITHIN: Duration = Duration::from_secs(60);
        self.check_alive()?;
        self.console.shell(command, WITHIN)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn machines_are_told_apart_by_the_last_byte_of_their_address() {
        assert_eq!(MachineSpec::netboot(17).mac().to_string(), "52:54:00:00:00:11");
    }

    #[test]
    fn a_directly_booted_machine_has_no_boot_rom() {
        let mut spec = MachineSpec::netboot(1);
        let dir = Path::new("/lab");
        let args = spec.args(accelerator::Accelerator::Tcg, "tap,id=n0".to_owned(), dir).join(" ");
        assert!(args.contains("bootindex=0") && !args.contains("-kernel"), "{args}");
        spec.boot = Boot::Direct {
            kernel: "k".into(),
            initramfs: "i".into(),
            append: "console=ttyS0".to_owned(),
        };
        let args = spec.args(accelerator::Accelerator::Tcg, "tap,id=n0".to_owned(), dir).join(" ");
        assert!(args.contains("romfile= -kernel k -initrd i -append console=ttyS0"), "{args}");
    }
}
