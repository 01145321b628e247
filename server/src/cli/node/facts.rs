//! `layercake node facts`: what hardware nodes have.

use anyhow::bail;
use protocol::api::NodeRecord;
use protocol::facts::{Device, DeviceClass, Hardware, NodeFacts, pci_id};

use super::super::client::Client;
use super::super::output::{Output, bytes};

pub(super) fn run(nodes: &str, client: &Client, output: Output) -> anyhow::Result<()> {
    let get = |id: &str| client.get::<Option<NodeFacts>>(&format!("/v1/nodes/{id}/hardware"));
    let facts: Vec<NodeFacts> = if nodes == "all" {
        let nodes: Vec<NodeRecord> = client.get("/v1/nodes")?;
        let mut facts = Vec::new();
        for node in nodes {
            facts.extend(get(node.id.as_str())?);
        }
        facts
    } else {
        let Some(facts) = get(nodes)? else {
            bail!(
                "node {nodes} has not said yet what hardware it has; its agent does soon after its start"
            );
        };
        vec![facts]
    };
    output.result(&facts, || text(&facts))
}

fn text(facts: &[NodeFacts]) -> String {
    if facts.is_empty() {
        return "No node has said yet what hardware it has.\n".to_owned();
    }
    let mut lines = Vec::new();
    for NodeFacts { node, hardware } in facts {
        let part = |size: u64, what: &str| match size {
            0 => String::new(),
            size => format!(", {what} {}", bytes(size)),
        };
        let memory = bytes(hardware.memory);
        let store = part(hardware.store, "the store at most");
        let zram = part(hardware.zram, "compressed swap");
        lines.push(format!("{node}  kernel {}, {memory} of memory{store}{zram}", hardware.kernel));
        lines.extend(of_node(hardware));
    }
    lines.join("\n") + "\n"
}

fn of_node(hardware: &Hardware) -> Vec<String> {
    let or_dash = |text: &Option<String>| text.clone().unwrap_or_else(|| "-".to_owned());
    let mut lines = Vec::new();
    for nic in &hardware.nics {
        let mac = nic.mac.map_or("-".to_owned(), |mac| mac.to_string());
        let (driver, place) = (or_dash(&nic.driver), or_dash(&nic.place));
        lines.push(format!("  NIC        {}  {mac}  {driver}  at {place}", nic.name));
    }
    for disk in &hardware.disks {
        let model = or_dash(&disk.model);
        lines.push(format!("  disk       {}  {}  {model}", disk.name, bytes(disk.size)));
    }
    for device in hardware.devices.iter().filter(|device| device.driver.is_none()) {
        let class = device.class.or_else(|| DeviceClass::of_alias(&device.modalias));
        if let Some(class) = class {
            lines.push(format!("  no driver  {} {}", class.as_str(), name(device)));
        }
    }
    for file in &hardware.firmware_missing {
        lines.push(format!("  firmware   {} is missing, {} asks for it", file.file, file.asked_by));
    }
    lines
}

fn name(device: &Device) -> String {
    let id = pci_id(&device.modalias).unwrap_or_else(|| device.modalias.clone());
    format!("{id} at {}", device.place)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn facts_are_a_few_lines_for_each_node() {
        let golden = include_str!("../../../../protocol/golden/v1/facts.json");
        let mut facts = protocol::facts::parse(golden).expect("golden");
        facts[0].hardware.devices[0].driver = None;
        let expected = "\
n1  kernel 6.1.0-56-amd64, 477.00 MiB of memory, the store at most 381.60 MiB, compressed swap 256.00 MiB
  NIC        eth1  52:54:00:00:01:01  e1000e  at 0000:01:00.0
  disk       nvme0n1  64.00 MiB  QEMU NVMe Ctrl
  no driver  NIC 8086:10d3 at 0000:01:00.0
  firmware   e100/d101m_ucode.bin is missing, e100 0000:02:00.0 asks for it
";
        assert_eq!(text(&facts), expected);
    }
}
