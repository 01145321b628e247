//! What hardware the node has ([`protocol::facts`]), out of sysfs, procfs and the kernel's log: looked at once the machine has been
//! quiet for a moment, and again when something was plugged in or out. Between the two nobody wakes up.

use std::collections::BTreeMap;
use std::fs::{self, OpenOptions};
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc::Receiver;
use std::time::Duration;

use protocol::facts::{
    Device, DeviceClass, Disk, Hardware, MAX_FACTS, MAX_TEXT, MissingFirmware, Nic,
    missing_firmware,
};

use crate::paths::RUN_DIR;
use crate::{identity, memory, modules};

/// How long no device event may have come before the hardware is looked at: drivers ask for firmware and start in this time.
const QUIET: Duration = Duration::from_secs(2);
/// Bytes of a sector, in which sysfs counts whatever the disk's own are.
const SECTOR: u64 = 512;
/// Largest record of the kernel's log.
const RECORD: usize = 8192;
/// Most records that are read of it.
const MAX_RECORDS: usize = 100_000;

/// Looks at the hardware when the machine is quiet and hands it out; again after each `news`. Ends with the last sender of them.
pub fn watch(news: &Receiver<()>, mut tell: impl FnMut(Hardware)) {
    loop {
        loop {
            match news.recv_timeout(QUIET) {
                Ok(()) => {}
                Err(std::sync::mpsc::RecvTimeoutError::Timeout) => break,
                Err(std::sync::mpsc::RecvTimeoutError::Disconnected) => {
                    // Nobody will tell of changes: this look is the only one.
                    tell(collect(Path::new("/sys")));
                    return;
                }
            }
        }
        tell(collect(Path::new("/sys")));
        if news.recv().is_err() {
            return;
        }
    }
}

/// Looks at the hardware. `sys` is where sysfs is.
#[must_use]
pub fn collect(sys: &Path) -> Hardware {
    let mut classes = BTreeMap::new();
    let nics = nics(sys, &mut classes);
    let disks = disks(sys, &mut classes);
    let loaded = fs::read_to_string("/proc/modules").unwrap_or_default();
    let loaded = loaded.lines().filter_map(|line| line.split_whitespace().next());
    let mut loaded: Vec<String> = loaded.take(MAX_FACTS).map(str::to_owned).collect();
    loaded.sort();
    Hardware {
        kernel: identity::release(),
        memory: memory::total(),
        store: store(),
        zram: memory::zram(),
        devices: devices(sys, &classes, &loaded),
        nics,
        disks,
        modules: loaded,
        firmware_missing: firmware(),
    }
}

/// Size of the file system that the store is on.
fn store() -> u64 {
    let about = rustix::fs::statvfs(RUN_DIR);
    about.map_or(0, |about| about.f_blocks.saturating_mul(about.f_frsize))
}

/// What hangs on a device, by its directory.
type Classes = BTreeMap<PathBuf, DeviceClass>;

/// Marks a device and all it hangs on. What is for both is for the network: without that a node is lost.
fn mark(classes: &mut Classes, device: &Path, class: DeviceClass) {
    for dir in device.ancestors() {
        classes.entry(dir.to_owned()).or_insert(class);
    }
}

/// The entries of a class that are real hardware: name and device directory.
fn entries(sys: &Path, class: &str) -> Vec<(String, PathBuf)> {
    let Ok(entries) = fs::read_dir(sys.join(class)) else { return Vec::new() };
    let real = |entry: fs::DirEntry| {
        let path = fs::canonicalize(entry.path()).ok()?;
        let text = path.to_str().filter(|path| !path.contains("/virtual/"))?;
        (text.len() < 4096).then(|| (entry.file_name().to_string_lossy().into_owned(), path))
    };
    let mut found: Vec<_> = entries.flatten().filter_map(real).take(MAX_FACTS).collect();
    found.sort();
    found
}

fn nics(sys: &Path, classes: &mut Classes) -> Vec<Nic> {
    let nic = |(name, dir): (String, PathBuf)| {
        let device = fs::canonicalize(dir.join("device")).ok()?;
        mark(classes, &device, DeviceClass::Nic);
        let mac = line(&dir.join("address")).and_then(|text| text.parse().ok());
        let place = device.file_name().map(|place| place.to_string_lossy().into_owned());
        Some(Nic { name, mac, driver: link_name(&device.join("driver")), place })
    };
    entries(sys, "class/net").into_iter().filter_map(nic).collect()
}

fn disks(sys: &Path, classes: &mut Classes) -> Vec<Disk> {
    let disk = |(name, dir): (String, PathBuf)| {
        mark(classes, &dir, DeviceClass::Disk);
        let size = number(&dir.join("size")).saturating_mul(SECTOR);
        Disk { name, size, model: line(&dir.join("device/model")) }
    };
    entries(sys, "block").into_iter().map(disk).collect()
}

/// Devices that ask for a driver, each different one once. Those of the processor ask by all it can do, and have no driver to lose.
fn devices(sys: &Path, classes: &Classes, loaded: &[String]) -> Vec<Device> {
    let mut found: BTreeMap<_, String> = BTreeMap::new();
    for (dir, modalias) in modules::devices_below(&sys.join("devices")) {
        if modalias.len() > MAX_TEXT || modalias.starts_with("cpu:") || modalias.contains("dmi:") {
            continue;
        }
        let driver = link_name(&dir.join("driver"));
        // Some drivers that are built in have such a link too.
        let module = link_name(&dir.join("driver/module")).filter(|name| loaded.contains(name));
        let class = classes.get(&dir).copied().or_else(|| DeviceClass::of_alias(&modalias));
        let place = dir.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let first = found.entry((modalias, driver, module, class)).or_insert_with(|| place.clone());
        if place < *first {
            *first = place;
        }
    }
    let device = |((modalias, driver, module, class), place)| Device {
        modalias,
        place,
        driver,
        module,
        class,
    };
    found.into_iter().map(device).take(MAX_FACTS).collect()
}

/// The last part of where a link leads.
fn link_name(link: &Path) -> Option<String> {
    let target = fs::read_link(link).ok()?;
    Some(target.file_name()?.to_string_lossy().into_owned())
}

fn line(path: &Path) -> Option<String> {
    let text = fs::read_to_string(path).ok()?;
    Some(text.trim().chars().take(MAX_TEXT).collect()).filter(|text: &String| !text.is_empty())
}

fn number(path: &Path) -> u64 {
    line(path).and_then(|text| text.parse().ok()).unwrap_or(0)
}

/// Firmware that the kernel's log says was not found.
fn firmware() -> Vec<MissingFirmware> {
    let mut options = OpenOptions::new();
    options.read(true).custom_flags(nix::libc::O_NONBLOCK);
    let Ok(mut log) = options.open("/dev/kmsg") else { return Vec::new() };
    let mut missing = Vec::new();
    let mut record = [0; RECORD];
    for _ in 0..MAX_RECORDS {
        match log.read(&mut record) {
            Ok(count) => missing.extend(of_record(record.get(..count).unwrap_or_default())),
            // Records were overwritten before they were read; the next read goes on after the gap.
            Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => {}
            Err(_) => break,
        }
    }
    missing.sort();
    missing.dedup();
    missing.truncate(MAX_FACTS);
    missing
}

/// The text of a record is between the first `;` and the end of its line.
fn of_record(record: &[u8]) -> Option<MissingFirmware> {
    let text = std::str::from_utf8(record).ok()?.split_once(';')?.1;
    missing_firmware(text.lines().next()?)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    const E1000E: &str = "pci:v00008086d000010D3sv00008086sd00000000bc02sc00i00";
    const PLATFORM: &str = "platform:bridge";

    /// A machine with a NIC behind a bridge that has a driver too, a disk, a second NIC without driver, and a loop device.
    fn machine() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        let sys = dir.path();
        let write = |path: &str, text: &str| {
            let path = sys.join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        let bridge = "devices/pci0/bridge";
        write(&format!("{bridge}/modalias"), PLATFORM);
        write(&format!("{bridge}/0000:01:00.0/modalias"), E1000E);
        write(&format!("{bridge}/0000:01:00.0/net/eth0/address"), "52:54:00:00:00:01\n");
        write("devices/pci0/0000:02:00.0/modalias", E1000E);
        write("devices/pci0/ata1/block/sda/size", "2048\n");
        write("devices/pci0/ata1/modalias", "scsi:t-0x00\n");
        write("devices/pci0/ata1/model", "QEMU DISK  \n");
        write("devices/virtual/block/loop0/size", "0\n");
        write("devices/system/cpu/modalias", "cpu:type:x86");
        write("bus/drivers/e1000e/module", "");
        for (link, target) in [
            (format!("{bridge}/0000:01:00.0/driver"), "bus/drivers/e1000e"),
            (format!("{bridge}/0000:01:00.0/net/eth0/device"), "devices/pci0/bridge/0000:01:00.0"),
            ("devices/pci0/ata1/block/sda/device".to_owned(), "devices/pci0/ata1"),
            ("class/net/eth0".to_owned(), "devices/pci0/bridge/0000:01:00.0/net/eth0"),
            ("block/sda".to_owned(), "devices/pci0/ata1/block/sda"),
            ("block/loop0".to_owned(), "devices/virtual/block/loop0"),
        ] {
            let link = sys.join(link);
            fs::create_dir_all(link.parent().unwrap()).unwrap();
            symlink(sys.join(target), link).unwrap();
        }
        dir
    }

    #[test]
    fn what_nics_and_disks_hang_on_is_marked_and_what_is_made_of_nothing_is_left_out() {
        let dir = machine();
        let found = collect(dir.path());
        let device = |place: &str| found.devices.iter().find(|it| it.place == place).unwrap();
        assert_eq!(found.devices.len(), 4, "{:?}", found.devices);
        assert_eq!(device("0000:01:00.0").driver.as_deref(), Some("e1000e"));
        assert_eq!(device("0000:02:00.0").class, Some(DeviceClass::Nic));
        assert_eq!(device("0000:02:00.0").driver, None);
        assert_eq!(device("bridge").class, Some(DeviceClass::Nic), "the NIC hangs on it");
        assert_eq!(device("ata1").class, Some(DeviceClass::Disk));
        let disk = Disk { name: "sda".to_owned(), size: 1 << 20, model: Some("QEMU DISK".into()) };
        assert_eq!(found.disks, [disk]);
        assert_eq!(found.nics.len(), 1);
        assert_eq!(found.nics[0].place.as_deref(), Some("0000:01:00.0"));
    }

    #[test]
    fn a_record_of_the_log_is_read_behind_its_head() {
        let record =
            b"4,512,9,-;e100 0000:01:00.0: firmware: failed to load e100/a.bin (-2)\n X=y\n";
        assert_eq!(of_record(record).unwrap().file, "e100/a.bin");
        assert_eq!(of_record(b"6,1,2,-;eth0: link up\n"), None);
        assert_eq!(of_record(b"\xff;"), None);
    }

    #[test]
    fn this_machine_has_memory_and_a_kernel() {
        let found = collect(Path::new("/sys"));
        assert!(found.memory > 1 << 20 && !found.kernel.is_empty());
    }
}
