//! When to start a process that must always run: pure, time comes in as milliseconds since boot.
//!
//! ```text
//! started --ended--> wait 0, 100 ms, 200 ms ... 30 s --due--> started
//!            `-- it lived 60 s: the row begins anew
//! ten ends within five minutes: failing; from then on every 30 s, and a rescue shell is wanted
//! ```

/// The first wait after the restart at once, in milliseconds; doubles with every end.
pub const FIRST_WAIT_MS: u64 = 100;
/// The longest wait, in milliseconds.
pub const MAX_WAIT_MS: u64 = 30_000;
/// A life of this length, in milliseconds, makes the next restart immediate again.
pub const STEADY_MS: u64 = 60_000;
/// This many ends ...
pub const MANY: usize = 10;
/// ... within so many milliseconds mean that it keeps failing.
pub const WINDOW_MS: u64 = 300_000;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Running { pid: i32, since_ms: u64 },
    Waiting { until_ms: u64 },
}

/// What an end means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ended {
    /// How long it lived, in milliseconds.
    pub lived_ms: u64,
    /// How long until it is started again, in milliseconds.
    pub wait_ms: u64,
    /// It keeps failing.
    pub failing: bool,
}

/// The state of one supervised process.
#[derive(Debug, Clone, Copy)]
pub struct Supervisor {
    state: State,
    in_row: u32,
    /// The last ends, in milliseconds since boot; the first `ended` from behind count.
    ends: [u64; MANY],
    ended: usize,
    starts: u32,
}

impl Supervisor {
    /// A process that was started so often before and is to be started at once.
    #[must_use]
    pub fn new(starts: u32) -> Self {
        Self { state: State::Waiting { until_ms: 0 }, in_row: 0, ends: [0; MANY], ended: 0, starts }
    }

    /// How often it has been started.
    #[must_use]
    pub fn starts(&self) -> u32 {
        self.starts
    }

    /// Its PID, if it runs.
    #[must_use]
    pub fn pid(&self) -> Option<i32> {
        match self.state {
            State::Running { pid, .. } => Some(pid),
            State::Waiting { .. } => None,
        }
    }

    /// Whether it is to be started now.
    #[must_use]
    pub fn due(&self, now_ms: u64) -> bool {
        self.wait_ms(now_ms) == Some(0)
    }

    /// Milliseconds until it is to be started; `None` while it runs.
    #[must_use]
    pub fn wait_ms(&self, now_ms: u64) -> Option<u64> {
        match self.state {
            State::Running { .. } => None,
            State::Waiting { until_ms } => Some(until_ms.saturating_sub(now_ms)),
        }
    }

    /// It has been started.
    pub fn started(&mut self, pid: i32, now_ms: u64) {
        self.starts = self.starts.saturating_add(1);
        self.state = State::Running { pid, since_ms: now_ms };
    }

    /// Its next end is not held against it: it is started again at once.
    pub fn renewed(&mut self) {
        (self.in_row, self.ended) = (0, 0);
    }

    /// It has ended, or could not be started.
    pub fn ended(&mut self, now_ms: u64) -> Ended {
        let lived_ms = match self.state {
            State::Running { since_ms, .. } => now_ms.saturating_sub(since_ms),
            State::Waiting { .. } => 0,
        };
        if lived_ms >= STEADY_MS {
            self.in_row = 0;
            self.ended = 0;
        }
        self.ends.rotate_left(1);
        if let Some(last) = self.ends.last_mut() {
            *last = now_ms;
        }
        self.ended = (self.ended + 1).min(MANY);
        let failing = self.failing(now_ms);
        let wait_ms = if failing { MAX_WAIT_MS } else { backoff_ms(self.in_row) };
        self.in_row = self.in_row.saturating_add(1);
        self.state = State::Waiting { until_ms: now_ms.saturating_add(wait_ms) };
        Ended { lived_ms, wait_ms, failing }
    }

    fn failing(&self, now_ms: u64) -> bool {
        let first = self.ends.first().copied().unwrap_or(now_ms);
        self.ended >= MANY && now_ms.saturating_sub(first) <= WINDOW_MS
    }
}

/// The wait after this many ends in a row, in milliseconds.
fn backoff_ms(in_row: u32) -> u64 {
    match in_row.checked_sub(1) {
        None => 0,
        Some(doublings) => FIRST_WAIT_MS.saturating_mul(1 << doublings.min(20)).min(MAX_WAIT_MS),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_restart_is_at_once_and_then_waits_double() {
        let mut supervisor = Supervisor::new(0);
        assert!(supervisor.due(0));
        let mut now = 0;
        let mut waits = Vec::new();
        for pid in 0..9 {
            supervisor.started(pid, now);
            assert_eq!((supervisor.pid(), supervisor.wait_ms(now)), (Some(pid), None));
            let ended = supervisor.ended(now + 1);
            waits.push(ended.wait_ms);
            now += 1 + ended.wait_ms;
            assert!(supervisor.due(now) && (ended.wait_ms == 0 || !supervisor.due(now - 1)));
        }
        assert_eq!(waits, [0, 100, 200, 400, 800, 1600, 3200, 6400, 12800]);
        assert_eq!(supervisor.starts(), 9);
    }

    #[test]
    fn ten_ends_in_five_minutes_are_failing_and_wait_the_longest() {
        let mut supervisor = Supervisor::new(0);
        for end in 1..=12_u64 {
            supervisor.started(7, end * 10);
            let ended = supervisor.ended(end * 10 + 1);
            assert_eq!(ended.failing, end >= 10, "end {end}");
            assert_eq!(ended.wait_ms == MAX_WAIT_MS, end >= 10, "end {end}");
        }
    }

    #[test]
    fn ten_ends_over_a_longer_time_are_not_failing() {
        let mut supervisor = Supervisor::new(0);
        for end in 0..30 {
            supervisor.started(7, end * 34_000);
            assert!(!supervisor.ended(end * 34_000 + 1).failing);
        }
    }

    #[test]
    fn a_minute_of_life_begins_the_row_anew() {
        let mut supervisor = Supervisor::new(0);
        for _ in 0..20 {
            supervisor.started(7, 0);
            supervisor.ended(1);
        }
        supervisor.started(7, 100);
        let ended = supervisor.ended(100 + STEADY_MS);
        assert_eq!((ended.wait_ms, ended.failing, ended.lived_ms), (0, false, STEADY_MS));
    }
}
