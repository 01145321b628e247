//! What a node's hardware is, as its agent found it: reported once a boot and when it changes, shown by `layercake node facts`, read
//! by `build-image --for`. Pure.

use serde::{Deserialize, Serialize};

use crate::ids::{Mac, NodeId};

/// Most devices, and most of anything else, that facts hold; the rest is left out.
pub const MAX_FACTS: usize = 1024;
/// Longest text in facts, in bytes: a modalias of the kernel's is rarely over 100.
pub const MAX_TEXT: usize = 256;

/// What a device is to the node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DeviceClass {
    /// The node's way into the network, or a part of that way.
    Nic,
    /// A disk, or what disks hang on.
    Disk,
}

impl DeviceClass {
    /// Its name in sentences.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Nic => "NIC",
            Self::Disk => "disk",
        }
    }

    /// What a modalias alone tells: PCI class 02 or 01 (kernel `include/linux/pci_ids.h`), or a virtio device 1, 2 or 8
    /// (`include/uapi/linux/virtio_ids.h`).
    #[must_use]
    pub fn of_alias(modalias: &str) -> Option<Self> {
        if let Some(virtio) = modalias.strip_prefix("virtio:d") {
            return match virtio.get(..8)? {
                "00000001" => Some(Self::Nic),
                "00000002" | "00000008" => Some(Self::Disk),
                _ => None,
            };
        }
        match pci_part(modalias, "bc", 2)? {
            "02" => Some(Self::Nic),
            "01" => Some(Self::Disk),
            _ => None,
        }
    }
}

/// The fields of a PCI modalias (`pci:v…d…sv…sd…bc…sc…i…`) stand in this order.
fn pci_part<'a>(modalias: &'a str, key: &str, length: usize) -> Option<&'a str> {
    let rest = modalias.strip_prefix("pci:")?;
    rest.get(rest.find(key)?.checked_add(key.len())?..)?.get(..length)
}

/// `8086:10d3` of a PCI device's modalias.
#[must_use]
pub fn pci_id(modalias: &str) -> Option<String> {
    let vendor = pci_part(modalias, "v0000", 4)?;
    let device = pci_part(modalias, "d0000", 4)?;
    Some(format!("{vendor}:{device}").to_ascii_lowercase())
}

/// A device that asks for a driver.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Device {
    /// What it asks by.
    pub modalias: String,
    /// The name its bus has for it: `0000:00:02.0`.
    pub place: String,
    /// The driver that serves it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub driver: Option<String>,
    /// The module that driver is in, where it is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub module: Option<String>,
    /// What hangs on it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub class: Option<DeviceClass>,
}

/// A network interface of real hardware.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Nic {
    /// The kernel's name, `eth0`.
    pub name: String,
    /// Its Ethernet address, where it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mac: Option<Mac>,
    /// The driver.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub driver: Option<String>,
    /// The name its bus has for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub place: Option<String>,
}

/// A disk of real hardware.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Disk {
    /// The kernel's name, `nvme0n1`.
    pub name: String,
    /// Its size in bytes.
    pub size: u64,
    /// What it calls itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
}

/// A firmware file that a driver asked the kernel for and did not get.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct MissingFirmware {
    /// Its path below `/lib/firmware`.
    pub file: String,
    /// Who asked: driver and device, `e100 0000:01:00.0`.
    pub asked_by: String,
}

/// A node's hardware.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hardware {
    /// The kernel that found it (`uname -r`).
    pub kernel: String,
    /// Memory that the kernel manages, in bytes.
    #[serde(default)]
    pub memory: u64,
    /// Most bytes that what is pulled and written may fill (`layercake.store=`); 0 where that is not known.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub store: u64,
    /// Size of the compressed swap in memory, in bytes; 0 where there is none.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub zram: u64,
    /// Devices that ask for drivers, by place.
    #[serde(default)]
    pub devices: Vec<Device>,
    /// Network interfaces, by name.
    #[serde(default)]
    pub nics: Vec<Nic>,
    /// Disks, by name.
    #[serde(default)]
    pub disks: Vec<Disk>,
    /// Modules that are loaded, by name: drivers find some of them by other ways than a modalias.
    #[serde(default)]
    pub modules: Vec<String>,
    /// Firmware that was asked for and is not there.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub firmware_missing: Vec<MissingFirmware>,
}

fn is_zero(number: &u64) -> bool {
    *number == 0
}

/// One node's facts: what `layercake node facts --json` prints a list of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeFacts {
    /// The node.
    pub node: NodeId,
    /// Its hardware.
    pub hardware: Hardware,
}

/// Reads what `layercake node facts --json` prints: a list, or a single node's.
///
/// # Errors
/// It is neither.
pub fn parse(text: &str) -> Result<Vec<NodeFacts>, serde_json::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum File {
        Many(Vec<NodeFacts>),
        One(NodeFacts),
    }
    match serde_json::from_str(text) {
        Ok(File::Many(nodes)) => Ok(nodes),
        Ok(File::One(node)) => Ok(vec![node]),
        // The list's own error says where; that of the choice between two forms says nothing.
        Err(_) => serde_json::from_str::<Vec<NodeFacts>>(text),
    }
}

/// Reads a line of the kernel's log for firmware that was not found: the kernel's own words (`drivers/base/firmware_loader/main.c`),
/// and Debian's.
#[must_use]
pub fn missing_firmware(line: &str) -> Option<MissingFirmware> {
    const UPSTREAM: &str = ": Direct firmware load for ";
    const DEBIAN: &str = ": firmware: failed to load ";
    let (asked_by, rest) = line.split_once(UPSTREAM).or_else(|| line.split_once(DEBIAN))?;
    let (file, _) = rest.split_once(' ')?;
    let text = |text: &str| text.chars().take(MAX_TEXT).collect::<String>();
    (!file.is_empty()).then(|| MissingFirmware { file: text(file), asked_by: text(asked_by) })
}

#[cfg(test)]
mod tests {
    use super::*;

    const E1000E: &str = "pci:v00008086d000010D3sv00008086sd00000000bc02sc00i00";

    #[test]
    fn classes_are_told_by_pci_class_and_by_virtio_device() {
        for (alias, expected) in [
            (E1000E, Some(DeviceClass::Nic)),
            ("pci:v00008086d00002922sv00001AF4sd00001100bc01sc06i01", Some(DeviceClass::Disk)),
            ("virtio:d00000001v00001AF4", Some(DeviceClass::Nic)),
            ("virtio:d00000008v00001AF4", Some(DeviceClass::Disk)),
            ("virtio:d00000004v00001AF4", None),
            ("pci:v00001234", None),
            ("acpi:PNP0303:", None),
        ] {
            assert_eq!(DeviceClass::of_alias(alias), expected, "{alias}");
        }
        assert_eq!(pci_id(E1000E).as_deref(), Some("8086:10d3"));
        assert_eq!(pci_id("virtio:d00000001v00001AF4"), None);
    }

    #[test]
    fn both_ways_in_which_kernels_miss_firmware_are_read() {
        let expected = MissingFirmware {
            file: "e100/d101m_ucode.bin".to_owned(),
            asked_by: "e100 0000:01:00.0".to_owned(),
        };
        for line in [
            "e100 0000:01:00.0: Direct firmware load for e100/d101m_ucode.bin failed with error -2",
            "e100 0000:01:00.0: firmware: failed to load e100/d101m_ucode.bin (-2)",
        ] {
            assert_eq!(missing_firmware(line), Some(expected.clone()), "{line}");
        }
        assert_eq!(
            missing_firmware("e100 0000:01:00.0: firmware: direct-loading firmware x"),
            None
        );
        assert_eq!(missing_firmware(": firmware: failed to load "), None);
    }

    proptest::proptest! {
        #[test]
        fn any_alias_and_any_line_is_something_or_nothing(text in "(pci:v0000|virtio:d|: firmware: failed to load )?\\PC{0,40}") {
            let _read = (DeviceClass::of_alias(&text), pci_id(&text), missing_firmware(&text), parse(&text));
        }
    }

    #[test]
    fn facts_are_read_as_a_list_or_alone_and_what_is_later_is_ignored() {
        let golden = include_str!("../golden/v1/facts.json");
        let nodes = parse(golden).expect("golden");
        assert_eq!(serde_json::to_string_pretty(&nodes).expect("render") + "\n", golden);
        let one = serde_json::to_string(&nodes[0]).expect("render");
        assert_eq!(parse(&one.replacen('{', "{\"colour\":1,", 1)).expect("one"), nodes);
        let error = parse("[{\"node\": 7}]").expect_err("no node").to_string();
        assert!(error.contains("line 1"), "{error}");
    }
}
