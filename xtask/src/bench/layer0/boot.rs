//! One boot, watched from outside: what the console says is timed by this machine's clock, for a guest's is not to be trusted
//! where it is emulated (its timer's calibration can be off by a factor of six).

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use tests::lab::Lab;
use tests::process::Process;
use tests::qemu::{Boot, Machine, MachineSpec};
use tests::{console, prerequisites, wait};

use super::images::{Contestant, Image};
use crate::bench::figures::Samples;
use crate::bench::measure;

/// Memory of a machine: dracut's initramfs wants it.
const MEMORY_MB: u32 = 1024;
/// How long a boot may take. The slowest takes half a minute on a quiet machine.
const WITHIN: Duration = Duration::from_secs(120);
/// Between two looks at the console: the precision of every time.
const LOOK: Duration = Duration::from_millis(2);
/// What the probe's lines begin with.
pub(super) const PROBE: &str = "layercake-probe: ";
/// Which every contestant has on its command line.
pub(super) const COMMAND_LINE: &str =
    "console=ttyS0,115200n8 panic=10 net.ifnames=0 rdinit=/probe loglevel=7";

/// A moment: since QEMU was started, and QEMU's CPU seconds until then.
#[derive(Debug, Clone, Copy)]
pub(super) struct Moment {
    pub(super) at: Duration,
    pub(super) cpu_s: f64,
}

/// What was seen of a boot.
#[derive(Debug, Clone, Copy)]
pub(super) struct Seen {
    /// /init is started.
    pub(super) init: Moment,
    /// There is an address.
    pub(super) address: Moment,
    /// The agent says that it starts, where there is one.
    pub(super) agent: Option<Moment>,
    /// Memory in use when there is an address, KiB.
    pub(super) used_kib: f64,
}

/// The boots of one image.
#[derive(Debug)]
pub(super) struct Boots {
    pub(super) image: Image,
    pub(super) init_to_address_s: Samples,
    pub(super) init_to_address_cpu_s: Samples,
    pub(super) start_to_address_s: Samples,
    pub(super) start_to_address_cpu_s: Samples,
    pub(super) start_to_agent_s: Samples,
    pub(super) start_to_agent_cpu_s: Samples,
    pub(super) used_mib: Samples,
}

impl Boots {
    /// None yet.
    pub(super) fn new(image: Image) -> Self {
        Self {
            image,
            init_to_address_s: Samples::default(),
            init_to_address_cpu_s: Samples::default(),
            start_to_address_s: Samples::default(),
            start_to_address_cpu_s: Samples::default(),
            start_to_agent_s: Samples::default(),
            start_to_agent_cpu_s: Samples::default(),
            used_mib: Samples::default(),
        }
    }
}

/// Boots it in a lab of its own, with Debian's dnsmasq to give the address.
///
/// # Errors
/// When it gets none in time, with the end of its console.
pub(super) fn once(contestant: Contestant, image: &Image) -> Result<Seen> {
    let lab = Lab::new()?;
    let _dhcp = start_dhcp(&lab)?;
    let arguments = format!("{COMMAND_LINE} {}", contestant.arguments());
    let machine = start(&lab, image, &arguments)?;
    let mut moments = Moments { has_agent: contestant.has_agent(), ..Moments::default() };
    let mut watch = Watch::new(&machine);
    watch.until(&machine, "an address", WITHIN, |line, moment| moments.hear(line, moment))?;
    let (Some(init), Some((address, used_kib))) = (moments.init, moments.address) else {
        bail!("the console's lines are out of order: {}", machine.console.situation());
    };
    Ok(Seen { init, address, agent: moments.agent, used_kib })
}

/// Switches a machine on with this image.
///
/// # Errors
/// When it cannot be started.
pub(super) fn start(lab: &Lab, image: &Image, append: &str) -> Result<Machine> {
    let mut spec = MachineSpec::netboot(1);
    spec.memory_mb = MEMORY_MB;
    spec.boot = Boot::Direct {
        kernel: image.kernel.clone(),
        initramfs: image.initramfs.clone(),
        append: append.to_owned(),
    };
    Machine::start(lab, &spec)
}

fn start_dhcp(lab: &Lab) -> Result<Process> {
    let dnsmasq = prerequisites::find_program("dnsmasq").context("dnsmasq is missing")?;
    let leases = format!("--dhcp-leasefile={}", lab.dir().join("leases").display());
    let args = [
        "--keep-in-foreground",
        "--conf-file=/dev/null",
        "--no-ping",
        "--port=0",
        "--interface=br0",
        "--bind-interfaces",
        "--user=root",
        "--pid-file=",
        "--dhcp-range=10.9.0.100,10.9.0.150,255.255.255.0,1h",
        &leases,
    ];
    Process::start(lab.namespace(), &dnsmasq, args, &lab.dir().join("dnsmasq.log"))
}

/// What has been heard of a boot.
#[derive(Debug, Default)]
struct Moments {
    /// An agent follows, before the address or after it.
    has_agent: bool,
    init: Option<Moment>,
    agent: Option<Moment>,
    address: Option<(Moment, f64)>,
}

impl Moments {
    /// Takes a line; whether it was the last that matters.
    fn hear(&mut self, line: &str, moment: Moment) -> bool {
        if line.contains("agent ") && line.trim_end().ends_with(" starts") {
            self.agent.get_or_insert(moment);
        }
        let said = line.split_once(PROBE).map_or("", |(_, said)| said);
        let words: Vec<&str> = said.split_whitespace().collect();
        match words[..] {
            ["init"] => self.init = Some(moment),
            ["address", _, "used", kib, "kB"] => {
                self.address = Some((moment, kib.parse().unwrap_or(0.0)));
            }
            _ => {}
        }
        self.address.is_some() && (self.agent.is_some() || !self.has_agent)
    }
}

/// Reads a console as it grows.
#[derive(Debug)]
pub(super) struct Watch {
    started: Instant,
    pid: u32,
    offset: u64,
    pending: String,
}

impl Watch {
    /// From the beginning of the console.
    pub(super) fn new(machine: &Machine) -> Self {
        Self { started: machine.started, pid: machine.pid(), offset: 0, pending: String::new() }
    }

    /// Hands each line with its moment to `hear` until that says that it was the last.
    ///
    /// # Errors
    /// When it does not in time, or the probe says that something failed.
    pub(super) fn until(
        &mut self,
        machine: &Machine,
        what: &str,
        within: Duration,
        mut hear: impl FnMut(&str, Moment) -> bool,
    ) -> Result<()> {
        let begun = Instant::now();
        loop {
            let text = self.news(machine.console.log())?;
            let moment = Moment {
                at: self.started.elapsed(),
                cpu_s: measure::of_daemon(self.pid).context("QEMU is gone")?.cpu_s,
            };
            self.pending.push_str(&text);
            while let Some((line, rest)) = self.pending.split_once('\n') {
                if line.contains(&format!("{PROBE}failed")) {
                    bail!("the machine says: {line}");
                }
                let last = hear(line, moment);
                self.pending = rest.to_owned();
                if last {
                    return Ok(());
                }
            }
            if begun.elapsed() > within {
                bail!("no {what} within {within:?}: {}", machine.console.situation());
            }
            wait::pause(LOOK)?;
        }
    }

    fn news(&mut self, log: &Path) -> Result<String> {
        let mut bytes = Vec::new();
        // QEMU makes the file in its own time.
        let Ok(mut file) = File::open(log) else { return Ok(String::new()) };
        file.seek(SeekFrom::Start(self.offset))
            .and_then(|_| file.read_to_end(&mut bytes))
            .with_context(|| log.display().to_string())?;
        self.offset += u64::try_from(bytes.len())?;
        Ok(console::clean(&bytes))
    }
}

#[cfg(test)]
mod tests_of_lines {
    use super::*;

    #[test]
    fn the_probe_and_the_agent_are_heard_among_kernel_messages() {
        let mut moments = Moments::default();
        let at = |ms| Moment { at: Duration::from_millis(ms), cpu_s: 0.0 };
        assert!(!moments.hear("[    1.2] random: crng init done", at(1)));
        assert!(!moments.hear("layercake-probe: init", at(2)));
        assert!(!moments.hear("[    1.5] layercake: agent: agent 0.1.0 starts", at(3)));
        assert!(moments.hear("layercake-probe: address 10.9.0.101 used 2048 kB", at(4)));
        let mut early = Moments { has_agent: true, ..Moments::default() };
        assert!(!early.hear("layercake-probe: address 10.9.0.101 used 2048 kB", at(3)));
        assert!(early.hear("[    1.5] layercake: agent: agent 0.1.0 starts", at(4)));
        assert_eq!(moments.init.expect("init").at.as_millis(), 2);
        assert_eq!(moments.agent.expect("agent").at.as_millis(), 3);
        assert!(moments.address.expect("address").1 > 2047.0);
    }
}
