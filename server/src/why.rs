//! Why a node is not what is wanted of it, from what the inventory knows. Pure: the time is an argument.
//!
//! It goes along the way of a boot and stops where the node stands: never seen, between two phases, silent, or reporting.
//! Of a node that reports, each wanted set has its own finding; the worst of them is the answer.

mod advice;
mod sets;

use protocol::api::{MAX_LONG_POLL_S, NodeRecord};
use protocol::node::{Layer0State, Observed, Phase, PowerAction};
use protocol::why::{Why, WhyState};

/// A node that was not heard of for so long is called silent: two long polls. Milliseconds.
pub const SILENT_MS: u64 = 2 * MAX_LONG_POLL_S * 1000;
/// A quiet node asks again every 30 s: one that is later is said to be. Milliseconds.
const QUIET_MS: u64 = 35_000;
/// What the steps of a boot usually take at most; after that something is wrong. Milliseconds.
const STEP_MS: u64 = 90_000;

/// The answer in the making.
#[derive(Debug)]
struct Case<'a> {
    node: &'a NodeRecord,
    now_ms: u64,
    why: Why,
}

/// Why this node is as it is.
#[must_use]
pub fn why(node: &NodeRecord, now_ms: u64) -> Why {
    let wanted = node.desired.imagesets.iter().map(|set| {
        let digest = set.reference.digest.map_or_else(String::new, |d| format!("  {}", d.short()));
        let roll = if set.roll > 0 { format!(", by roll {}", set.roll) } else { String::new() };
        format!("{}:{}{digest}{roll}", set.name, set.version)
    });
    let why = Why {
        node: node.id.clone(),
        state: WhyState::AsWanted,
        answer: String::new(),
        wanted: wanted.collect(),
        seen: Vec::new(),
        because: Vec::new(),
        next: Vec::new(),
        you_can: Vec::new(),
    };
    let mut case = Case { node, now_ms, why };
    case.solve();
    case.why
}

/// Whether a node is only known from the config: `last_seen_ms` then says when the server read that.
#[must_use]
pub fn is_new(node: &NodeRecord) -> bool {
    node.boot.is_empty() && node.observed.is_none() && node.last_seen_ms == node.first_seen_ms
}

/// A time in one figure: `5 s`, `3 min`, `2 h`, `4 d`.
#[must_use]
pub fn span(ms: u64) -> String {
    let seconds = ms / 1000;
    match seconds {
        0..120 => format!("{seconds} s"),
        120..7200 => format!("{} min", seconds / 60),
        7200..172_800 => format!("{} h", seconds / 3600),
        _ => format!("{} d", seconds / 86_400),
    }
}

impl Case<'_> {
    fn solve(&mut self) {
        if is_new(self.node) {
            return self.never_seen();
        }
        let quiet_ms = self.now_ms.saturating_sub(self.node.last_seen_ms);
        self.why.seen.push(format!("last heard of {} ago", span(quiet_ms)));
        let Some(last) = self.node.boot.last() else { return self.only_asked() };
        if last.phase <= Phase::Kernel {
            return self.booting(last.phase, self.now_ms.saturating_sub(last.at_ms));
        }
        let Some(observed) = &self.node.observed else {
            return self.answer(WhyState::OnItsWay, "its agent runs and has not reported yet");
        };
        self.machine(observed);
        if quiet_ms > SILENT_MS {
            return self.silent(observed, quiet_ms);
        }
        if quiet_ms > QUIET_MS {
            self.because(format!("nothing was heard of it for {}", span(quiet_ms)));
        }
        self.power(observed);
        self.layer0(observed);
        self.sets(observed);
        self.side_notes(observed);
        self.conclude();
    }

    /// The worst finding is the answer; the first of equals.
    fn answer(&mut self, state: WhyState, text: impl std::fmt::Display) {
        if self.why.answer.is_empty() || state > self.why.state {
            self.why.state = state;
            self.why.answer = format!("{} {}: {text}", self.node.id, words(state));
        }
    }

    fn because(&mut self, text: impl Into<String>) {
        push(&mut self.why.because, text.into());
    }

    fn next(&mut self, text: impl Into<String>) {
        push(&mut self.why.next, text.into());
    }

    fn can(&mut self, text: impl Into<String>) {
        push(&mut self.why.you_can, text.into());
    }

    fn never_seen(&mut self) {
        let macs: Vec<String> = self.node.macs.iter().map(ToString::to_string).collect();
        let by = if macs.is_empty() { "its name".to_owned() } else { macs.join(", ") };
        let text =
            format!("the server knows {by} from its config only, and nothing ever came from it");
        self.answer(WhyState::NeverSeen, text);
        self.because("no DHCP request to boot, no boot script fetched, no report");
        self.next("nothing until the machine is switched on and boots from the network");
        self.can("switch it on, with network boot first in its firmware");
        self.can(format!("see that {by} is the interface that it boots from"));
        self.can("see that this server's DHCP is on its network, or that the DHCP server there names this one");
    }

    /// Heard of in some way, and no step of a boot seen.
    fn only_asked(&mut self) {
        self.answer(WhyState::OnItsWay, "it asked for what is wanted of it and has not reported");
        self.next("its agent reports as soon as it has read that");
    }

    fn booting(&mut self, phase: Phase, since_ms: u64) {
        let late = since_ms > STEP_MS;
        let state = if late { WhyState::Stuck } else { WhyState::OnItsWay };
        let ago = span(since_ms);
        match phase {
            Phase::Dhcp => {
                self.answer(
                    state,
                    format!("it asked for an address to boot {ago} ago and has not fetched its boot script since"),
                );
                self.because("DHCP is done, iPXE is not: the loader, or the way from it to this server's HTTP port");
                self.can(
                    "look at its console: the firmware says what it could not load, iPXE what it could not reach",
                );
                self.can("see that `server.url` can be reached from the node, and that TFTP has the loader its firmware asks for");
            }
            Phase::Ipxe => {
                self.answer(
                    state,
                    format!("it fetched its boot script {ago} ago and has not fetched kernel and initramfs since"),
                );
                self.because("iPXE runs; the files are still on their way, are not there, or the transfer broke");
                self.can(
                    "see that `server.layer0_dir` holds vmlinuz, initramfs.img and the overlays",
                );
            }
            _ => {
                self.answer(
                    state,
                    format!("kernel and initramfs were fetched {ago} ago and its agent has been silent since"),
                );
                self.because("the kernel starts, or does not; its NIC may have no driver in this image; or the node cannot reach this server");
                self.can("look at its console: the status screen says what it waits for (`layercake-agent why` in the rescue shell)");
                self.can("build an image with the drivers that it needs (`cargo xtask build-image --for FACTS`)");
            }
        }
        if late {
            self.next("iPXE tries again every 5 s, the agent every 30 s at most; a kernel that panics reboots after 10 s");
        } else {
            self.next(format!("the next step is usually seen within {}", span(STEP_MS)));
            self.why.you_can.clear();
        }
        self.boots_before();
    }

    /// That its last report is of the boot before.
    fn boots_before(&mut self) {
        if let Some(observed) = &self.node.observed {
            let sets: Vec<String> = observed.imagesets.iter().map(sets::short).collect();
            let ran = if sets.is_empty() { "nothing".to_owned() } else { sets.join(", ") };
            push(&mut self.why.seen, format!("in the boot before it ran {ran}"));
        }
    }

    fn silent(&mut self, observed: &Observed, quiet_ms: u64) {
        let power = self.node.desired.power.as_ref();
        let asked = power.filter(|it| it.boot_id == observed.boot_id).map(|it| it.action);
        if asked == Some(PowerAction::Off) {
            self.answer(WhyState::AsWanted, "it was asked to power off, and is silent since");
            self.next("nothing until it is switched on");
            return;
        }
        let ago = span(quiet_ms);
        self.answer(WhyState::Silent, format!("nothing was heard of it for {ago}"));
        self.because(
            "it has no power, hangs, or cannot reach this server: from here these look alike",
        );
        if asked == Some(PowerAction::Reboot) {
            self.because("it was asked to reboot, and has not asked to boot since");
        }
        self.next("a node that runs tries to reach this server every 30 s at most, for ever; its containers go on meanwhile");
        self.next("a kernel that panics reboots after 10 s, an agent that dies starts again");
        self.can("look at its console: the status screen says whether the server cannot be reached, and why");
        let addresses = observed.links.iter().flat_map(|link| &link.addresses);
        if let Some(address) = addresses.into_iter().next() {
            self.can(format!("ping {address} from its network"));
        }
        self.can("switch its power off and on: it boots into what is wanted now");
    }

    fn machine(&mut self, observed: &Observed) {
        let addresses: Vec<String> = observed
            .links
            .iter()
            .flat_map(|link| link.addresses.iter().map(move |ip| format!("{ip} on {}", link.name)))
            .collect();
        let mut words = vec![format!("agent {}", observed.agent_version)];
        words.push(format!("kernel {}", observed.kernel));
        words.extend(addresses);
        push(&mut self.why.seen, words.join(", "));
    }

    fn power(&mut self, observed: &Observed) {
        let Some(power) = &self.node.desired.power else { return };
        if power.boot_id == observed.boot_id {
            let what = match power.action {
                PowerAction::Off => "power off",
                PowerAction::Reboot => "reboot",
            };
            self.answer(WhyState::OnItsWay, format!("it was asked to {what} and still reports"));
            self.next("its containers get 10 s to stop, then it goes down");
        }
    }

    /// Another Layer0 is wanted than the one that runs.
    fn layer0(&mut self, observed: &Observed) {
        let (Some(wanted), Some(runs)) = (&self.node.desired.layer0, &observed.layer0) else {
            return;
        };
        push(&mut self.why.wanted, format!("Layer0 {}", wanted.digest.short()));
        let reason =
            runs.reason.as_deref().map_or_else(|| "it has only just heard".to_owned(), calm);
        match runs.state {
            Layer0State::Current => return,
            Layer0State::Stale => {
                self.answer(WhyState::OnItsWay, format!("it runs another Layer0: {reason}"));
                self.next("it changes its Layer0 as soon as it may; its sets run until then");
            }
            Layer0State::Failed => {
                self.answer(WhyState::Stuck, format!("it stays on another Layer0: {reason}"));
                self.next(
                    "its sets go on; this Layer0 is not tried again until it is asked for again",
                );
                self.can(format!("layercake logs {} --agent", self.node.id));
            }
        }
        self.because(format!("Layer0: {reason}"));
    }

    /// What does not keep it from being as wanted, and may explain why it is slow or short of something.
    fn side_notes(&mut self, observed: &Observed) {
        if observed.agent_starts > 1 {
            let starts = observed.agent_starts;
            self.because(format!(
                "its agent was started {starts} times in this boot; containers do not notice"
            ));
            self.can(format!("layercake logs {} --agent", self.node.id));
        }
        if let Some(problem) = observed.cache.as_ref().and_then(|cache| cache.problem.as_ref()) {
            self.because(format!("its cache disk is not used: {}", calm(problem)));
        }
        if let Some(crash) = &observed.last_crash {
            self.because(format!("before this boot its kernel crashed: {}", calm(crash)));
        }
        if let Some(problem) = observed.clock.as_ref().and_then(|clock| clock.problem.as_ref()) {
            self.because(format!("its clock cannot be compared: {}", calm(problem)));
        }
    }

    fn conclude(&mut self) {
        if !self.why.answer.is_empty() {
            return;
        }
        let runs: Vec<String> = self
            .node
            .desired
            .imagesets
            .iter()
            .map(|it| format!("{}:{}", it.name, it.version))
            .collect();
        if runs.is_empty() {
            self.answer(WhyState::AsWanted, "nothing is wanted of it, and it runs nothing");
            self.can(format!("layercake roll start {} --imageset NAME:VERSION", self.node.id));
        } else {
            self.answer(WhyState::AsWanted, format!("it runs {}", runs.join(", ")));
        }
    }
}

/// The words that stand between the node's name and the sentence.
fn words(state: WhyState) -> &'static str {
    match state {
        WhyState::AsWanted => "is as wanted",
        WhyState::OnItsWay => "is on its way",
        WhyState::Waiting => "is not as wanted, and goes on trying",
        WhyState::Stuck => "is not as wanted, and needs you",
        WhyState::Silent => "is silent",
        WhyState::NeverSeen => "was never seen",
    }
}

/// Adds a sentence once.
fn push(list: &mut Vec<String>, text: String) {
    if !list.contains(&text) {
        list.push(text);
    }
}

/// A node's words in one line.
fn calm(text: &str) -> String {
    text.replace(char::is_control, " ")
}

#[cfg(test)]
mod tests;
