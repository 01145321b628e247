//! Faults on purpose, for tests: an agent that was told so kills itself at a named step, as the kernel or a power cut might.
//! Release builds have nothing of it.

/// The variable that names the step.
#[cfg(debug_assertions)]
const VARIABLE: &str = "LAYERCAKE_DIE_AT";

/// The steps of a roll at which an agent may be told to die, in the order in which a roll and its way back come by them.
#[cfg(debug_assertions)]
const STEPS: [&str; 13] = [
    "pulled",
    "kept-dropped",
    "staging",
    "staged",
    "noted",
    "old-stopped",
    "waiting",
    "released",
    "watching",
    "committed",
    "going-back-noted",
    "going-back",
    "new-stopped",
];

/// The agent has come to this step.
#[cfg(debug_assertions)]
pub(super) fn reach(step: &str) {
    debug_assert!(STEPS.contains(&step), "{step} is not a step");
    if std::env::var(VARIABLE).is_ok_and(|wanted| wanted == step) {
        // SIGKILL: nobody has time to put anything in order.
        let _ =
            rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
        std::thread::park();
    }
}

/// The agent has come to this step.
#[cfg(not(debug_assertions))]
pub(super) fn reach(_step: &str) {}
