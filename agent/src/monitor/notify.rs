//! What a program says of itself over NOTIFY_SOCKET (sd_notify(3)), and its watchdog. Pure: datagrams and the time in, what
//! changed out. The socket itself is the monitor's.
//!
//! READY=1, STOPPING=1, STATUS= and WATCHDOG=1 (or WATCHDOG=trigger) mean something here. MAINPID= does not: the
//! container's first process is what is watched. FDSTORE=1 is refused, descriptors that come along are closed; a BARRIER=1
//! is satisfied by that. Everything else is passed over, as sd_notify(3) asks of those who listen.

/// Longest datagram that is read, in bytes; what is longer is not looked at.
pub const MAX_DATAGRAM: usize = 4096;
/// Most characters that are kept of a STATUS.
const MAX_TEXT: usize = 200;
/// Shortest time between two tellings of a changed STATUS: a program that talks all the time costs the agent little.
const TELL_PACE_NS: u64 = 500_000_000;

/// One datagram's meaning.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Message {
    /// READY=1.
    pub ready: bool,
    /// STOPPING=1.
    pub stopping: bool,
    /// WATCHDOG=1.
    pub alive: bool,
    /// WATCHDOG=trigger: as if the watchdog had been missed.
    pub trigger: bool,
    /// STATUS=, made fit to be shown: one line without control characters, shortened.
    pub text: Option<String>,
}

/// Reads a datagram: `KEY=VALUE` a line. The last of several with one key counts.
#[must_use]
pub fn parse(datagram: &[u8]) -> Message {
    let mut message = Message::default();
    if datagram.len() > MAX_DATAGRAM {
        return message;
    }
    for line in datagram.split(|byte| *byte == b'\n') {
        match line {
            b"READY=1" => message.ready = true,
            b"STOPPING=1" => message.stopping = true,
            b"WATCHDOG=1" => message.alive = true,
            b"WATCHDOG=trigger" => message.trigger = true,
            line => {
                if let Some(text) = line.strip_prefix(b"STATUS=") {
                    message.text = Some(shown(text));
                }
            }
        }
    }
    message
}

fn shown(text: &[u8]) -> String {
    let text = String::from_utf8_lossy(text);
    text.chars().filter(|c| !c.is_control()).take(MAX_TEXT).collect()
}

/// A target for fuzzing.
pub fn fuzz_notify(datagram: &[u8]) {
    let mut said = Said::new(Some(1_000_000));
    said.take(&parse(datagram), 1);
    let _ = said.due(u64::MAX);
}

/// What falls due by time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Due {
    /// A changed text is to be told now.
    Tell,
    /// The watchdog was missed.
    Starved,
}

/// What a program has said so far.
#[derive(Debug, Clone, Default)]
pub struct Said {
    /// When it was ready first, nanoseconds of CLOCK_BOOTTIME.
    pub ready_at_ns: Option<u64>,
    /// Whether it said that it is ending.
    pub stopping: bool,
    /// Its last STATUS.
    pub text: Option<String>,
    watchdog_ns: Option<u64>,
    starves_at_ns: Option<u64>,
    told_at_ns: u64,
    untold: bool,
}

impl Said {
    /// A program that has said nothing; with the longest time between two WATCHDOG=1, where they are asked for.
    #[must_use]
    pub fn new(watchdog_ns: Option<u64>) -> Self {
        Self { watchdog_ns, ..Self::default() }
    }

    /// Takes a message. True when those who watch should be told at once.
    ///
    /// The watchdog runs from the first READY=1 or WATCHDOG=1 on, as systemd's does from the end of the start.
    pub fn take(&mut self, message: &Message, now_ns: u64) -> bool {
        let ready = message.ready && self.ready_at_ns.is_none();
        if ready {
            self.ready_at_ns = Some(now_ns);
        }
        let stopping = message.stopping && !self.stopping;
        self.stopping |= message.stopping;
        if message.alive || ready {
            self.starves_at_ns = self.watchdog_ns.map(|every| now_ns.saturating_add(every));
        }
        if message.trigger && self.watchdog_ns.is_some() {
            self.starves_at_ns = Some(now_ns);
        }
        if let Some(text) = &message.text
            && self.text.as_ref() != Some(text)
        {
            self.text = Some(text.clone());
            self.untold = true;
        }
        let at_once = ready || stopping || (self.untold && self.tell_at_ns() <= now_ns);
        if at_once {
            self.told(now_ns);
        }
        at_once
    }

    fn told(&mut self, now_ns: u64) {
        self.untold = false;
        self.told_at_ns = now_ns;
    }

    fn tell_at_ns(&self) -> u64 {
        match self.told_at_ns {
            0 => 0,
            at => at.saturating_add(TELL_PACE_NS),
        }
    }

    /// The program is being stopped: its watchdog asks for nothing any more.
    pub fn rest(&mut self) {
        self.watchdog_ns = None;
        self.starves_at_ns = None;
    }

    /// When [`Self::due`] should be asked.
    #[must_use]
    pub fn deadline_ns(&self) -> Option<u64> {
        let tell = self.untold.then(|| self.tell_at_ns());
        tell.into_iter().chain(self.starves_at_ns).min()
    }

    /// What is due now; each is said once.
    pub fn due(&mut self, now_ns: u64) -> Option<Due> {
        if self.starves_at_ns.is_some_and(|at| at <= now_ns) {
            self.rest();
            return Some(Due::Starved);
        }
        if self.untold && self.tell_at_ns() <= now_ns {
            self.told(now_ns);
            return Some(Due::Tell);
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MS: u64 = 1_000_000;

    #[test]
    fn datagrams_mean_what_sd_notify_says() {
        let table: [(&[u8], Message); 7] = [
            (b"", Message::default()),
            (b"READY=1", Message { ready: true, ..Message::default() }),
            (
                b"READY=1\nSTATUS=serving 3 clients\nMAINPID=7\n",
                Message {
                    ready: true,
                    text: Some("serving 3 clients".to_owned()),
                    ..Message::default()
                },
            ),
            (
                b"WATCHDOG=1\nSTOPPING=1",
                Message { alive: true, stopping: true, ..Message::default() },
            ),
            (b"WATCHDOG=trigger", Message { trigger: true, ..Message::default() }),
            (b"READY=2\nFDSTORE=1\nready=1\n READY=1", Message::default()),
            (
                b"STATUS=a\x1b[31m\tb\xff\nSTATUS=\x00last",
                Message { text: Some("last".to_owned()), ..Message::default() },
            ),
        ];
        for (datagram, expected) in table {
            assert_eq!(parse(datagram), expected, "{}", datagram.escape_ascii());
        }
        assert_eq!(
            parse(&[b"READY=1\n".to_vec(), vec![b'x'; MAX_DATAGRAM]].concat()),
            Message::default()
        );
        let long = parse(format!("STATUS={}", "ä".repeat(1000)).as_bytes());
        assert_eq!(long.text.expect("text").chars().count(), MAX_TEXT);
    }

    #[test]
    fn the_watchdog_runs_from_the_first_word_and_is_missed_once() {
        let mut said = Said::new(Some(100 * MS));
        assert_eq!(said.deadline_ns(), None);
        assert!(said.take(&parse(b"READY=1"), 10 * MS));
        assert!(!said.take(&parse(b"READY=1"), 20 * MS), "it was ready before");
        assert_eq!((said.ready_at_ns, said.deadline_ns()), (Some(10 * MS), Some(110 * MS)));
        assert!(!said.take(&parse(b"WATCHDOG=1"), 90 * MS));
        assert_eq!(said.due(189 * MS), None);
        assert_eq!(said.due(190 * MS), Some(Due::Starved));
        assert_eq!((said.due(u64::MAX), said.deadline_ns()), (None, None));
        let mut said = Said::new(None);
        said.take(&parse(b"READY=1\nWATCHDOG=trigger"), 1);
        assert_eq!(said.deadline_ns(), None, "nobody asked for a watchdog");
    }

    #[test]
    fn a_program_that_talks_all_the_time_is_quoted_twice_a_second() {
        let mut said = Said::new(None);
        let mut told = 0;
        for ms in 1..=2000 {
            told += u32::from(said.take(&parse(format!("STATUS={ms}").as_bytes()), ms * MS));
            told += u32::from(said.due(ms * MS) == Some(Due::Tell));
        }
        assert!((4..=5).contains(&told), "{told}");
        assert!(said.deadline_ns().is_some(), "the last word is still told");
        assert_eq!((said.due(u64::MAX), said.deadline_ns()), (Some(Due::Tell), None));
    }

    proptest! {
        #[test]
        fn no_datagram_makes_the_parser_panic(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
            let text = parse(&bytes).text.unwrap_or_default();
            prop_assert!(text.chars().count() <= MAX_TEXT && !text.contains(char::is_control));
            fuzz_notify(&bytes);
        }
    }
}
