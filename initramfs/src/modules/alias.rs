//! Aliases of devices against the patterns that modules have for them (modules.alias, fnmatch(3)): `*`, `?`, `[a-f]`. Pure.

/// An alias with `_` for `-`, as the kernel's tools compare them; inside brackets `-` is a range and stays.
#[must_use]
pub fn fold(alias: &str) -> String {
    let mut inside = false;
    let change = |c| {
        match c {
            '[' => inside = true,
            ']' => inside = false,
            '-' if !inside => return '_',
            _ => {}
        }
        c
    };
    alias.chars().map(change).collect()
}

/// What stands before the first `:`, with it: patterns for a device begin with the same. Empty where there is none.
#[must_use]
pub fn bucket(alias: &str) -> &str {
    alias.find(':').and_then(|at| alias.get(..=at)).unwrap_or_default()
}

/// Whether the alias matches the pattern. Goes back to the last `*` only: the product of both lengths at worst.
#[must_use]
pub fn matches(pattern: &str, alias: &str) -> bool {
    let (pattern, text) = (pattern.as_bytes(), alias.as_bytes());
    let (mut p, mut t, mut retry) = (0, 0, None);
    loop {
        let step = match (pattern.get(p), text.get(t)) {
            (Some(b'*'), _) => {
                retry = Some((p + 1, t));
                p += 1;
                continue;
            }
            (None, None) => return true,
            (Some(b'?'), Some(_)) => Some(1),
            (Some(b'['), Some(byte)) => set(pattern.get(p..).unwrap_or_default(), *byte),
            (Some(a), Some(b)) if a == b => Some(1),
            _ => None,
        };
        match (step, retry) {
            (Some(length), _) => (p, t) = (p + length, t + 1),
            (None, Some((after, from))) if from < text.len() => {
                retry = Some((after, from + 1));
                (p, t) = (after, from + 1);
            }
            _ => return false,
        }
    }
}

/// The length of the set in brackets at the beginning of the pattern, if the byte is in it.
fn set(pattern: &[u8], byte: u8) -> Option<usize> {
    let end = pattern.iter().skip(2).position(|byte| *byte == b']')? + 2;
    let mut rest = pattern.get(1..end)?;
    let not = rest.strip_prefix(b"!").or_else(|| rest.strip_prefix(b"^"));
    rest = not.unwrap_or(rest);
    let mut found = false;
    while let [first, more @ ..] = rest {
        rest = match more {
            [b'-', last, after @ ..] => {
                found |= (first..=last).contains(&&byte);
                after
            }
            _ => {
                found |= *first == byte;
                more
            }
        };
    }
    (found != not.is_some()).then_some(end + 1)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[track_caller]
    fn check(pattern: &str, alias: &str, expect: bool) {
        assert_eq!(matches(&fold(pattern), &fold(alias)), expect, "{pattern} on {alias}");
    }

    #[test]
    fn patterns_match_as_fnmatch_does() {
        let e1000e = "pci:v00008086d000010D3sv00008086sd00000000bc02sc00i00";
        check("pci:v00008086d000010D3sv*sd*bc*sc*i*", e1000e, true);
        check("pci:v00008086d000010D4sv*sd*bc*sc*i*", e1000e, false);
        check("pci:v*d*sv*sd*bc0[1-2]sc*i*", e1000e, true);
        check("pci:v*d*sv*sd*bc0[!1-2]sc*i*", e1000e, false);
        check("scsi:t-0x00*", "scsi:t-0x00", true);
        check("a?c", "abc", true);
        check("a?c", "ac", false);
        check("a[", "a[", false);
        check("*", "", true);
        assert_eq!(bucket(e1000e), "pci:");
        assert_eq!(fold("of:N*T[a-c]-x"), "of:N*T[a-c]_x");
    }

    proptest! {
        #[test]
        fn any_pattern_ends_and_a_text_matches_itself(pattern in "[a-c*?\\[\\]!-]{0,20}", text in "[a-c]{0,30}") {
            let _any = matches(&pattern, &text);
            prop_assert!(matches(&text, &text));
            let (around, within) = (format!("*{text}*"), format!("x{text}y"));
            prop_assert!(matches(&around, &within));
        }
    }
}
