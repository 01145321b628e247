//! The figures with their goals, and the table.

use std::path::Path;

use anyhow::Result;

use super::boot::Boots;
use super::idle::{Idle, SPAN_S};
use super::images::Contestant;
use super::{Measured, NAME, mib, one, size};
use crate::bench::figures::{Figure, Samples, figures_table, table};

/// Most that an initramfs of ours may have, MiB: the virt flavour, and that with the modules of real machines.
const VIRT_MIB: f64 = 2.5;
const HARDWARE_MIB: f64 = 14.0;
/// The same for the form that is one kernel with everything inside.
const EFI_MIB: f64 = 8.0;
/// What /init to an address may take of the others' time.
const OF_FLOOR: f64 = 1.3;
const OF_INITRAMFS_TOOLS: f64 = 0.1;
const OF_DRACUT: f64 = 0.03;
/// Memory in use when there is an address, over the floor's, MiB (the goal is 10 MB).
const OVER_FLOOR_MIB: f64 = 10.0 * 1e6 / 1_048_576.0;
/// CPU seconds from QEMU's start to the agent with our own kernel, of those with Debian's.
const OF_CLOUD: f64 = 0.6;
/// Seconds: nothing changed; after cargo when the agent changed.
const UNCHANGED_S: f64 = 1.0;
const CHANGED_S: f64 = 2.0;
/// The image's time of that which initramfs-tools takes.
const OF_MKINITRAMFS: f64 = 0.3;
/// Most that agent and PID 1 hold, KiB.
const AGENT_KIB: f64 = 16.0 * 1024.0;
const INIT_KIB: f64 = 512.0;
/// Seconds between two heartbeats of the agent, which are its long polls, and switches that are allowed beyond them.
const HEARTBEAT_S: u64 = 30;
const MORE_SWITCHES: u64 = 2;

/// Every figure with its goal.
pub(super) fn figures(measured: &Measured) -> Vec<Figure> {
    let mut figures = Vec::new();
    sizes(measured, &mut figures);
    times(measured, &mut figures);
    build_times(measured, &mut figures);
    if let Some(idle) = &measured.idle {
        idle_figures(idle, &mut figures);
    }
    figures
}

fn sizes(measured: &Measured, figures: &mut Vec<Figure>) {
    for (name, bytes) in &measured.builds.sizes {
        let goal = match name.as_str() {
            "initramfs, virt" => VIRT_MIB,
            "efi form, virt" => EFI_MIB,
            "initramfs, hw" | "initramfs, generic (Debian's kernel)" => HARDWARE_MIB,
            _ => continue,
        };
        figures.extend(Figure::below(NAME, name, &one(mib(*bytes)), "MiB", goal));
    }
}

fn times(measured: &Measured, figures: &mut Vec<Figure>) {
    let Some(ours) = measured.boots(Contestant::Ours) else { return };
    for (peer, goal) in [
        (Contestant::Floor, OF_FLOOR),
        (Contestant::InitramfsTools, OF_INITRAMFS_TOOLS),
        (Contestant::Dracut, OF_DRACUT),
    ] {
        let Some(theirs) = measured.boots(peer) else { continue };
        let mut beside = |what: &str, pick: fn(&Boots) -> &Samples, unit, goal| {
            let what = format!("{what}, beside {}", peer.name());
            let pair = (pick(ours), pick(theirs));
            let name = measured.name(peer);
            figures.extend(Figure::beside(NAME, &what, pair, name, unit, goal));
        };
        beside("/init to address", |it| &it.init_to_address_s, "s", Some(goal));
        beside("/init to address, CPU", |it| &it.init_to_address_cpu_s, "s", None);
        beside("memory at the address", |it| &it.used_mib, "MiB", None);
    }
    over_the_floor(measured, figures);
    if let Some(own) = measured.boots(Contestant::OwnKernel) {
        let name = measured.name(Contestant::Ours);
        let pair = (&own.start_to_agent_cpu_s, &ours.start_to_agent_cpu_s);
        let what = "own kernel: QEMU start to agent, CPU";
        figures.extend(Figure::beside(NAME, what, pair, name, "s", Some(OF_CLOUD)));
        let pair = (&own.start_to_address_s, &ours.start_to_address_s);
        figures.extend(Figure::beside(
            NAME,
            "own kernel: QEMU start to address",
            pair,
            name,
            "s",
            None,
        ));
    }
}

/// Memory of ours beyond the floor's, with each kernel; with our own the time as well.
fn over_the_floor(measured: &Measured, figures: &mut Vec<Figure>) {
    for (ours, floor, what) in [
        (Contestant::Ours, Contestant::Floor, "memory at the address, over the floor"),
        (
            Contestant::OwnKernel,
            Contestant::OwnFloor,
            "own kernel: memory at the address, over the floor",
        ),
    ] {
        let median = |who| measured.boots(who).and_then(|boots| boots.used_mib.median());
        if let (Some(ours), Some(floor)) = (median(ours), median(floor)) {
            figures.extend(Figure::below(NAME, what, &one(ours - floor), "MiB", OVER_FLOOR_MIB));
        }
    }
    let own = measured.boots(Contestant::OwnKernel).zip(measured.boots(Contestant::OwnFloor));
    if let Some((ours, floor)) = own {
        let pair = (&ours.init_to_address_s, &floor.init_to_address_s);
        let (what, name) = ("own kernel: /init to address", Contestant::OwnFloor.name());
        figures.extend(Figure::beside(NAME, what, pair, name, "s", Some(OF_FLOOR)));
    }
}

fn build_times(measured: &Measured, figures: &mut Vec<Figure>) {
    let builds = &measured.builds;
    let mut below = |what: &str, samples: &Samples, limit| {
        // One slow round of a busy machine says nothing: the median is judged.
        let median = Samples(samples.median().into_iter().collect());
        figures.extend(Figure::below(NAME, what, &median, "s", limit));
    };
    below("build-image, nothing changed", &builds.unchanged_s, UNCHANGED_S);
    below("build-image, agent changed, beyond cargo", &builds.changed_s, CHANGED_S);
    for (peer, took) in &builds.peers {
        let goal = (*peer == Contestant::InitramfsTools).then_some(OF_MKINITRAMFS);
        let what = format!("whole image, cloud kernel, beside {}", peer.name());
        let pair = (&builds.changed_cloud_s, &one(*took));
        figures.extend(Figure::beside(NAME, &what, pair, measured.name(*peer), "s", goal));
    }
}

fn idle_figures(idle: &Idle, figures: &mut Vec<Figure>) {
    let switches = idle.init.switches.saturating_add(idle.agent.switches);
    let allowed = SPAN_S / HEARTBEAT_S + MORE_SWITCHES;
    for (what, value, unit, limit) in [
        ("idle: agent's own memory", idle.agent.kib, "KiB", AGENT_KIB),
        ("idle: PID 1's own memory", idle.init.kib, "KiB", INIT_KIB),
        (
            "idle: voluntary context switches of both in 60 s",
            switches,
            "switches",
            // `below` wants less than its limit, the goal is at most.
            f64::from(u32::try_from(allowed).unwrap_or(u32::MAX)) + 0.5,
        ),
    ] {
        figures.extend(Figure::below(NAME, what, &one(f64::from(value)), unit, limit));
    }
}

/// The tables.
pub(super) fn text(agent: &Path, measured: &Measured, figures: &[Figure]) -> Result<String> {
    let head = [
        "initramfs",
        "bytes",
        "/init to address s",
        "CPU s",
        "QEMU start to address s",
        "CPU s",
        "in use MiB",
        "built in s",
    ];
    let mut rows = vec![head.map(str::to_owned).to_vec()];
    for (contestant, boots) in &measured.boots {
        let built = match contestant {
            Contestant::Ours => measured.builds.changed_cloud_s.clone(),
            Contestant::OwnKernel => measured.builds.changed_s.clone(),
            peer => {
                let took = measured.builds.peers.iter().find(|(who, _)| who == peer);
                took.map(|(_, took)| one(*took)).unwrap_or_default()
            }
        };
        rows.push(vec![
            measured.name(*contestant).to_owned(),
            boots.image.size.to_string(),
            boots.init_to_address_s.cell(2),
            boots.init_to_address_cpu_s.cell(2),
            boots.start_to_address_s.cell(2),
            boots.start_to_address_cpu_s.cell(2),
            boots.used_mib.cell(1),
            built.cell(1),
        ]);
    }
    let sizes =
        measured.builds.sizes.iter().map(|(name, bytes)| vec![name.clone(), bytes.to_string()]);
    Ok(format!(
        "Agent of {} bytes. Median (min-max); times by this machine's clock, CPU seconds of QEMU.\n\n{}\n{}\n{}",
        size(agent)?,
        table(rows),
        table(sizes.collect()),
        figures_table(figures)
    ))
}

#[cfg(test)]
mod tests_of_figures {
    use super::super::idle::Process;
    use super::*;

    #[test]
    fn idle_is_judged_by_memory_of_each_and_switches_of_both() {
        let judge = |kib, switches| {
            let agent = Process { kib, switches };
            let idle = Idle { init: Process { kib: 100, switches: 0 }, agent };
            let mut figures = Vec::new();
            idle_figures(&idle, &mut figures);
            figures.iter().map(|it| it.met).collect::<Vec<_>>()
        };
        assert_eq!(judge(9_000, 4), [true, true, true].map(Some));
        assert_eq!(judge(17_000, 5), [false, true, false].map(Some));
    }
}
