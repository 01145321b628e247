//! Of a node that reports: how each ImageSet stands to what is wanted of it.

use protocol::node::{
    ContainerState, DesiredSet, HealthState, Observed, ObservedContainer, ObservedSet,
    PullProgress, RollOutcome, SetState,
};
use protocol::why::WhyState;

use super::{Case, advice, calm, push, span};

impl Case<'_> {
    pub(super) fn sets(&mut self, observed: &Observed) {
        for set in &observed.imagesets {
            push(&mut self.why.seen, seen(set));
        }
        let desired = &self.node.desired;
        for wanted in &desired.imagesets {
            match observed.imagesets.iter().find(|set| set.name == wanted.name) {
                Some(set) => self.set(wanted, set, observed),
                None => self.not_taken_up(wanted, observed),
            }
        }
        let wants = |set: &&ObservedSet| desired.imagesets.iter().any(|it| it.name == set.name);
        for set in observed.imagesets.iter().filter(|set| !wants(set)) {
            self.answer(WhyState::OnItsWay, format!("{} is not wanted any more", short(set)));
            self.next(format!("the node stops {}", set.name));
        }
        if let Some(waiting) = &observed.waiting {
            let waiting = calm(waiting);
            // Its sets' reasons are in there as well.
            if self.why.because.iter().all(|it| !waiting.contains(it.as_str())) {
                self.answer(WhyState::Waiting, format!("it waits: {waiting}"));
                self.because(waiting);
                self.next(
                    "it goes on by itself as soon as that is over; what it asks for, it asks again",
                );
            }
        }
    }

    fn not_taken_up(&mut self, wanted: &DesiredSet, observed: &Observed) {
        let (acted, latest) = (observed.desired_version, self.node.desired.version);
        let title = title(wanted);
        self.answer(WhyState::OnItsWay, format!("it has not taken up {title} yet"));
        if acted < latest {
            self.because(format!(
                "its last report is of version {acted} of what is wanted, this is in version {latest}"
            ));
        }
        self.next("a node is told within a second, and reports what it does at once");
    }

    fn set(&mut self, wanted: &DesiredSet, set: &ObservedSet, observed: &Observed) {
        let right = wanted.reference.digest.is_none_or(|digest| digest == set.digest);
        let title = title(wanted);
        let went_back = set.last_roll.as_ref().filter(|roll| {
            roll.outcome == Some(RollOutcome::RolledBack)
                && !right
                && wanted.reference.digest.is_none_or(|digest| digest == roll.to)
        });
        if let Some(roll) = went_back {
            let why = roll.reason.clone().or_else(|| set.reason.clone());
            return self.went_back(&title, set, &calm(&why.unwrap_or_default()));
        }
        if let Some(pull) = &set.pull {
            return self.pulling(&title, set, pull, right);
        }
        if let Some(why) = self.busy(set) {
            return self.held(&title, &why);
        }
        let reason = set.reason.as_deref().map(calm).or_else(|| ailing(set));
        match (set.state, right) {
            (SetState::Current, true) => {
                if let Some(reason) = reason {
                    self.because(format!("{}: {reason}", set.name));
                }
            }
            (SetState::Degraded | SetState::Failed, _) => {
                self.failing(&title, set, right, reason, observed);
            }
            _ => {
                let what = reason.unwrap_or_else(|| "it is being made ready".to_owned());
                self.answer(WhyState::OnItsWay, format!("{title}: {what}"));
                self.next("it starts as soon as every container of it stands ready");
            }
        }
    }

    fn went_back(&mut self, title: &str, set: &ObservedSet, why: &str) {
        let (name, version, node) = (&set.name, &set.version, &self.node.id);
        let retry = format!("layercake roll start {node} --imageset {title} tries it again");
        let undo =
            format!("layercake roll undo {name} --node {node} wants version {version} for good");
        self.answer(
            WhyState::Stuck,
            format!("{title} did not do well and was taken back, {name}:{version} runs: {why}"),
        );
        self.because(format!("{title}: {why}"));
        self.next(format!("{name}:{version} goes on; {title} is not tried again by itself"));
        self.can(format!("layercake logs {node} {name}/CONTAINER shows what it said"));
        self.can(retry);
        self.can(undo);
    }

    fn pulling(&mut self, title: &str, set: &ObservedSet, pull: &PullProgress, right: bool) {
        let percent = pull.bytes.saturating_mul(100).checked_div(pull.total).unwrap_or(0);
        self.answer(WhyState::OnItsWay, format!("it fetches {title}, {percent} % are there"));
        if let Some(reason) = set.reason.as_deref().filter(|_| !right || set.attempts.is_some()) {
            self.because(format!("{}: {}", set.name, calm(reason)));
        }
        let left = pull.total.saturating_sub(pull.bytes).checked_div(pull.bytes_per_s);
        self.next(match left {
            Some(seconds) => {
                format!("the rest takes about {} at the present pace", span((seconds + 1) * 1000))
            }
            None => "it has only just begun".to_owned(),
        });
        if !set.containers.is_empty() {
            self.next(format!("{} runs until then", short(set)));
        }
    }

    /// Why the set waits for a node that is not to be disturbed, where it does.
    fn busy(&self, set: &ObservedSet) -> Option<String> {
        let (_, why) = set.reason.as_deref()?.split_once("node is busy: ")?;
        Some(calm(why))
    }

    fn held(&mut self, title: &str, why: &str) {
        self.answer(
            WhyState::Waiting,
            format!("{title} is fetched and ready, and the node is busy: {why}"),
        );
        self.because(format!("busy: {why}"));
        self.next(format!(
            "{title} takes over as soon as the node is free; it is asked every 15 s"
        ));
        let node = &self.node.id;
        let free = match self.node.desired.busy {
            Some(_) => format!("layercake node busy {node} off"),
            None => "end what the node's /etc/layercake/busy sees".to_owned(),
        };
        let force = format!("layercake roll start {node} --imageset {title} --force");
        self.can(free);
        self.can(force);
    }

    fn failing(
        &mut self,
        title: &str,
        set: &ObservedSet,
        right: bool,
        reason: Option<String>,
        observed: &Observed,
    ) {
        let reason = reason.unwrap_or_else(|| "the node gives no reason".to_owned());
        let runs = !set.containers.is_empty();
        self.answer(
            WhyState::Waiting,
            match (right && runs, runs) {
                (true, _) => format!("{title} runs, but not well: {reason}"),
                (_, true) => format!("{title} does not run, {} does: {reason}", short(set)),
                (_, false) => format!("{title} does not run: {reason}"),
            },
        );
        self.because(format!("{}: {reason}", set.name));
        match self.retry_in_ms(set, observed) {
            Some(ms) => {
                let times =
                    set.attempts.map_or_else(String::new, |n| format!(" (failed {n} times)"));
                self.next(format!("the node tries again in {}{times}", span(ms)));
            }
            None if set.attempts.is_some() => self.next("the node is trying again right now"),
            None => self.next("its restart policy decides; the node goes on reporting"),
        }
        if runs && !right {
            self.next(format!("{} goes on running meanwhile", short(set)));
        }
        let node = self.node.id.as_str();
        if let Some(text) = advice::on(&reason, title, node) {
            self.can(text);
        }
        if let Some(container) = set.containers.iter().find(|it| !is_well(it)) {
            self.can(format!("layercake logs {node} {}/{}", set.name, container.name));
        }
        self.can(format!("layercake roll undo {} --node {node}", set.name));
    }

    /// In how many milliseconds the node tries again. Its clock begins with its kernel; the phases that it stamped and that
    /// were seen here say when that was. A report takes a moment to arrive, so the earliest is the nearest.
    fn retry_in_ms(&self, set: &ObservedSet, observed: &Observed) -> Option<u64> {
        let marks = observed.timeline.iter().filter_map(|mark| {
            let seen = self.node.boot.iter().find(|time| time.phase == mark.phase)?;
            seen.at_ms.checked_sub(mark.uptime_ms)
        });
        let at_ms = marks.min()?.checked_add(set.retry_at_ms?)?;
        at_ms.checked_sub(self.now_ms)
    }
}

fn title(set: &DesiredSet) -> String {
    format!("{}:{}", set.name, set.version)
}

pub(super) fn short(set: &ObservedSet) -> String {
    format!("{}:{}", set.name, set.version)
}

fn seen(set: &ObservedSet) -> String {
    let state = match set.state {
        SetState::Absent => "absent",
        SetState::Staged => "staged",
        SetState::Current => "running",
        SetState::Degraded => "degraded",
        SetState::Failed => "failed",
    };
    let digest = set.digest.short();
    let names: Vec<String> = set.containers.iter().map(container).collect();
    let containers =
        if names.is_empty() { String::new() } else { format!(": {}", names.join(", ")) };
    format!("{}  {digest}  {state}{containers}", short(set))
}

fn container(it: &ObservedContainer) -> String {
    let state = format!("{:?}", it.state).to_lowercase();
    let health = match it.health {
        Some(HealthState::Unhealthy) => ", unhealthy",
        Some(HealthState::Starting) => ", not ready yet",
        _ => "",
    };
    let restarts = match it.restarts {
        0 => String::new(),
        n => format!(", {n} restarts"),
    };
    format!("{} {state}{health}{restarts}", it.name)
}

fn is_well(it: &ObservedContainer) -> bool {
    it.state == ContainerState::Running && it.health != Some(HealthState::Unhealthy)
}

/// What is wrong with the first container that is not well.
fn ailing(set: &ObservedSet) -> Option<String> {
    let bad = set.containers.iter().find(|it| !is_well(it))?;
    let why = bad.reason.as_deref().map_or_else(String::new, |why| format!(": {}", calm(why)));
    Some(format!("container {}{why}", container(bad)))
}
