//! Signals by name and number.

/// The number of a signal by name (`SIGTERM`, `TERM`, `SIGRTMIN+3`) or number, as Linux on x86-64 and arm64 counts
/// (signal(7); SIGRTMIN as glibc shows it, 34).
#[must_use]
pub fn signal_number(text: &str) -> Option<i32> {
    const NAMES: [(&str, i32); 21] = [
        ("HUP", 1),
        ("INT", 2),
        ("QUIT", 3),
        ("ILL", 4),
        ("TRAP", 5),
        ("ABRT", 6),
        ("BUS", 7),
        ("FPE", 8),
        ("KILL", 9),
        ("USR1", 10),
        ("SEGV", 11),
        ("USR2", 12),
        ("PIPE", 13),
        ("ALRM", 14),
        ("TERM", 15),
        ("CHLD", 17),
        ("CONT", 18),
        ("STOP", 19),
        ("TSTP", 20),
        ("WINCH", 28),
        ("PWR", 30),
    ];
    const RTMIN: i32 = 34;
    const RTMAX: i32 = 64;
    if let Ok(number) = text.parse::<i32>() {
        return (1..=RTMAX).contains(&number).then_some(number);
    }
    let name = text.strip_prefix("SIG").unwrap_or(text);
    if let Some(rest) = name.strip_prefix("RTMIN") {
        let offset = if rest.is_empty() { 0 } else { rest.strip_prefix('+')?.parse().ok()? };
        return (0..=RTMAX - RTMIN).contains(&offset).then(|| RTMIN + offset);
    }
    NAMES.iter().find(|(known, _)| *known == name).map(|(_, number)| *number)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_have_the_kernels_numbers() {
        for (text, number) in
            [("SIGTERM", 15), ("TERM", 15), ("SIGRTMIN+3", 37), ("9", 9), ("SIGRTMIN", 34)]
        {
            assert_eq!(signal_number(text), Some(number));
        }
        for text in ["SIGRTMIN+31", "0", "65", "SIGFOO", "", "SIGRTMIN-1"] {
            assert_eq!(signal_number(text), None, "{text}");
        }
    }
}
