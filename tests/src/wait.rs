//! Bounded waits. Every wait of the lab, the cases and the demo goes through here, so that each has an end, says what
//! it waited for, and is ended by Ctrl-C. This is the one module that sleeps.

use std::sync::Arc;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// How often a condition is looked at again where nothing else is said: short beside every boot phase, and 50 looks a
/// second cost nothing.
pub const INTERVAL: Duration = Duration::from_millis(20);

static INTERRUPTED: OnceLock<Arc<AtomicBool>> = OnceLock::new();

/// The waits ended because a person asked for it (SIGINT or SIGTERM).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Interrupted;

impl std::fmt::Display for Interrupted {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("interrupted")
    }
}

impl std::error::Error for Interrupted {}

/// From now on SIGINT, SIGTERM and SIGHUP end every wait with [`Interrupted`] instead of ending the process.
///
/// # Errors
/// When the handlers cannot be installed.
pub fn handle_signals() -> Result<()> {
    let flag = INTERRUPTED.get_or_init(Arc::default);
    for signal in
        [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM, signal_hook::consts::SIGHUP]
    {
        signal_hook::flag::register(signal, Arc::clone(flag))
            .with_context(|| format!("cannot handle signal {signal}"))?;
    }
    Ok(())
}

/// Whether a person asked for the end.
#[must_use]
pub fn interrupted() -> bool {
    INTERRUPTED.get().is_some_and(|flag| flag.load(Ordering::Relaxed))
}

/// Fails with [`Interrupted`] when a person asked for the end.
///
/// # Errors
/// [`Interrupted`], then.
pub fn check() -> Result<()> {
    if interrupted() { Err(Interrupted.into()) } else { Ok(()) }
}

/// Looks at a condition until it holds, at most this long. `what` finishes the sentence "waited 10 s for …".
///
/// # Errors
/// The condition's own error, at once; [`Interrupted`]; or that the time is over.
pub fn until<T>(
    what: &str,
    within: Duration,
    mut condition: impl FnMut() -> Result<Option<T>>,
) -> Result<T> {
    let deadline = Instant::now() + within;
    loop {
        if let Some(value) = condition().with_context(|| format!("while waiting for {what}"))? {
            return Ok(value);
        }
        check()?;
        if Instant::now() >= deadline {
            bail!("waited {} s for {what}, in vain", within.as_secs_f32());
        }
        std::thread::sleep(INTERVAL);
    }
}

/// Lets time pass, a person's patience permitting.
///
/// # Errors
/// [`Interrupted`].
pub fn pause(time: Duration) -> Result<()> {
    let deadline = Instant::now() + time;
    loop {
        check()?;
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(());
        }
        std::thread::sleep(left.min(INTERVAL));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_condition_that_holds_ends_the_wait_with_its_value() {
        let mut looks = 0;
        let value = until("the third look", Duration::from_secs(10), || {
            looks += 1;
            Ok((looks == 3).then_some("seen"))
        });
        assert_eq!(value.expect("in time"), "seen");
    }

    #[test]
    fn a_wait_in_vain_says_how_long_and_for_what() {
        let error = until::<()>("godot", Duration::from_millis(30), || Ok(None)).unwrap_err();
        assert_eq!(error.to_string(), "waited 0.03 s for godot, in vain");
    }

    #[test]
    fn an_error_ends_the_wait_at_once() {
        let error =
            until::<()>("a node", Duration::from_secs(60), || bail!("it died")).unwrap_err();
        assert_eq!(format!("{error:#}"), "while waiting for a node: it died");
    }
}
