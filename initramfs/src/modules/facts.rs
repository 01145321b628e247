//! The modules that given machines need: from the facts their agents reported to a list of what is wanted, and what would be lost.
//! Pure.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use protocol::facts::{Device, DeviceClass, NodeFacts, pci_id};
use protocol::ids::NodeId;

use super::wanted::{Need, Pick, Wanted};
use super::{Catalogue, normal};

/// Where modules that drive hardware lie: of those that were loaded on a node, only these are taken by name. The others are for what
/// ran there.
const DRIVERS: &str = "kernel/drivers/";

/// A device that a node would lose with this kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Loss {
    /// The node.
    pub node: NodeId,
    /// The device.
    pub device: Device,
    /// What it is.
    pub class: DeviceClass,
}

impl fmt::Display for Loss {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { node, device, class } = self;
        let what = pci_id(&device.modalias).map_or(String::new(), |id| format!(" {id}"));
        write!(f, "node {node} would lose its {}{what}", class.as_str())?;
        if !device.place.is_empty() {
            write!(f, " at {}", device.place)?;
        }
        if let Some(driver) = &device.driver {
            write!(f, ", which {driver} drives there")?;
        }
        write!(f, " ({})", device.modalias)
    }
}

/// What was chosen for the nodes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Choice {
    /// The modules, each with the first node that needs it.
    pub wanted: Vec<Wanted>,
    /// NICs and disks that worked on the node and would not with this kernel.
    pub losses: Vec<Loss>,
    /// NICs and disks that did not work there and will not here.
    pub unserved: Vec<Loss>,
}

/// Chooses what these nodes need of this kernel.
#[must_use]
pub fn choose(catalogue: &Catalogue, nodes: &[NodeFacts]) -> Choice {
    let mut known: BTreeMap<&str, (BTreeSet<String>, bool)> = BTreeMap::new();
    let mut picked: BTreeMap<String, String> = BTreeMap::new();
    let mut choice = Choice::default();
    for NodeFacts { node, hardware } in nodes {
        let mut pick = |name: &str, why: String| {
            picked.entry(name.to_owned()).or_insert(why);
        };
        for device in &hardware.devices {
            let (modules, builtin) = known.entry(&device.modalias).or_insert_with(|| {
                let (modules, builtin) = catalogue.for_alias(&device.modalias);
                (modules.into_iter().map(|module| module.name.clone()).collect(), builtin)
            });
            for module in modules.iter() {
                pick(module, format!("{node}: {}", device.modalias));
            }
            // Some drivers are found by other ways than the alias.
            let names = [&device.module, &device.driver].into_iter().flatten();
            let names: Vec<_> = names.map(|name| normal(name)).collect();
            let by_name = names.iter().find(|name| catalogue.get(name).is_some());
            if let Some(name) = by_name {
                pick(name, format!("{node}: {}", device.modalias));
            }
            let there = !modules.is_empty()
                || *builtin
                || by_name.is_some()
                || names.iter().any(|name| catalogue.is_builtin(name));
            // What was built in there and is no NIC or disk itself, a PCI bridge's driver, may have no name that could be looked for.
            let hung_on = device.class.filter(|_| device.module.is_some());
            let class = hung_on.or_else(|| DeviceClass::of_alias(&device.modalias));
            if let Some(class) = class.filter(|_| !there) {
                let loss = Loss { node: node.clone(), device: device.clone(), class };
                let served = device.driver.is_some();
                if served { &mut choice.losses } else { &mut choice.unserved }.push(loss);
            }
        }
        for name in hardware.modules.iter().map(|name| normal(name)) {
            if catalogue.get(&name).is_some_and(|module| module.path.starts_with(DRIVERS)) {
                pick(&name, format!("{node}: it was loaded there"));
            }
        }
    }
    let wanted = |(name, reason)| {
        let pick = Pick::Name(name);
        Wanted { pick, need: Need::Required, load: false, plain: false, reason }
    };
    choice.wanted = picked.into_iter().map(wanted).collect();
    choice
}

#[cfg(test)]
mod tests {
    use protocol::facts::Hardware;

    use super::*;
    use crate::elf::fake;
    use crate::modules::Module;

    const E1000E: &str = "pci:v00008086d000010D3sv00008086sd00000000bc02sc00i00";
    const NVME: &str = "pci:v00001B36d00000010sv00001AF4sd00001100bc01sc08i02";

    fn catalogue() -> Catalogue {
        let module = |path: &str, aliases: &[&str]| {
            let entries: Vec<_> = aliases.iter().map(|alias| ("alias", *alias)).collect();
            Module::read(path, &fake::module(&entries)).unwrap()
        };
        let modules = vec![
            module("kernel/drivers/net/e1000e.ko", &["pci:v00008086d000010D3sv*sd*bc*sc*i*"]),
            module("kernel/drivers/net/phy/realtek.ko", &[]),
            module("kernel/drivers/ata/sata_mv.ko", &[]),
            module("kernel/net/bridge/bridge.ko", &[]),
        ];
        let builtin = b"virtio_blk.alias=virtio:d00000002v*\0";
        Catalogue::new(modules, "kernel/drivers/block/virtio_blk.ko\n", builtin)
    }

    fn device(modalias: &str, driver: Option<&str>) -> Device {
        Device {
            modalias: modalias.to_owned(),
            place: "0000:00:02.0".to_owned(),
            driver: driver.map(str::to_owned),
            module: None,
            class: None,
        }
    }

    fn node(devices: Vec<Device>, modules: &[&str]) -> NodeFacts {
        let modules = modules.iter().map(|name| (*name).to_owned()).collect();
        let hardware = Hardware { devices, modules, ..Hardware::default() };
        NodeFacts { node: "n7".parse().unwrap(), hardware }
    }

    fn names(choice: &Choice) -> Vec<String> {
        choice.wanted.iter().map(|wanted| wanted.pick.to_string()).collect()
    }

    #[test]
    fn drivers_come_by_alias_by_the_name_of_what_drove_it_and_by_what_was_loaded() {
        let devices = vec![device(E1000E, Some("e1000e")), device("of:Nsata", Some("sata-mv"))];
        let choice = choose(&catalogue(), &[node(devices, &["realtek", "bridge"])]);
        assert_eq!(names(&choice), ["e1000e", "realtek", "sata_mv"]);
        assert!(choice.losses.is_empty() && choice.unserved.is_empty(), "{choice:?}");
    }

    #[test]
    fn what_is_built_in_needs_no_module_and_is_no_loss() {
        let choice = choose(
            &catalogue(),
            &[node(vec![device("virtio:d00000002v00001AF4", Some("virtio_blk"))], &[])],
        );
        assert_eq!(choice, Choice::default());
    }

    #[test]
    fn a_disk_without_a_driver_is_a_loss_that_names_node_and_id() {
        let choice = choose(&catalogue(), &[node(vec![device(NVME, Some("nvme"))], &[])]);
        let text = choice.losses[0].to_string();
        let expected =
            "node n7 would lose its disk 1b36:0010 at 0000:00:02.0, which nvme drives there";
        assert!(text.starts_with(expected), "{text}");
        // What nothing drove there is not lost here.
        let choice = choose(&catalogue(), &[node(vec![device(NVME, None)], &[])]);
        assert!(choice.losses.is_empty() && choice.unserved.len() == 1);
    }

    #[test]
    fn what_hangs_on_a_device_makes_it_needed_though_its_alias_says_nothing() {
        let mut bridge = device("platform:odd-bridge", Some("odd"));
        assert!(choose(&catalogue(), &[node(vec![bridge.clone()], &[])]).losses.is_empty());
        bridge.class = Some(DeviceClass::Nic);
        assert!(choose(&catalogue(), &[node(vec![bridge.clone()], &[])]).losses.is_empty());
        bridge.module = Some("odd".to_owned());
        let text = choose(&catalogue(), &[node(vec![bridge], &[])]).losses[0].to_string();
        assert!(text.starts_with("node n7 would lose its NIC at 0000:00:02.0"), "{text}");
    }
}
