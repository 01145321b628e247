//! An amount of memory on the kernel command line: `512M`, or `25%` of what the machine has.

use std::fmt;
use std::str::FromStr;

/// Largest share: swap that is compressed may be larger than the memory it lies in.
const MAX_PERCENT: u8 = 200;

/// An amount of memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Amount {
    /// So many bytes.
    Bytes(u64),
    /// This share of the machine's memory, 1 to 200.
    Percent(u8),
}

impl Amount {
    /// In bytes, on a machine with so much memory.
    #[must_use]
    pub fn of(self, memory: u64) -> u64 {
        match self {
            Self::Bytes(bytes) => bytes,
            Self::Percent(percent) => (memory / 100).saturating_mul(u64::from(percent)),
        }
    }
}

/// What a text must be to be an amount.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("expected a size (512M, 2G) or a share of the memory from 1% to 200%")]
pub struct InvalidAmount;

impl FromStr for Amount {
    type Err = InvalidAmount;

    fn from_str(text: &str) -> Result<Self, InvalidAmount> {
        let number = |text: &str| {
            let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
            text.parse::<u64>().ok().filter(|number| digits && *number > 0).ok_or(InvalidAmount)
        };
        if let Some(percent) = text.strip_suffix('%') {
            let percent = u8::try_from(number(percent)?).map_err(|_| InvalidAmount)?;
            return if percent > MAX_PERCENT {
                Err(InvalidAmount)
            } else {
                Ok(Self::Percent(percent))
            };
        }
        let shift = match text.bytes().last() {
            Some(b'K' | b'k') => 10,
            Some(b'M' | b'm') => 20,
            Some(b'G' | b'g') => 30,
            Some(b'T' | b't') => 40,
            _ => 0,
        };
        let digits = text.get(..text.len() - usize::from(shift > 0)).unwrap_or_default();
        let bytes = number(digits)?.checked_mul(1 << shift).ok_or(InvalidAmount)?;
        Ok(Self::Bytes(bytes))
    }
}

impl fmt::Display for Amount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Percent(percent) => write!(f, "{percent}%"),
            Self::Bytes(bytes) => {
                let units = [(40, "T"), (30, "G"), (20, "M"), (10, "K")];
                let whole = units.iter().find(|(shift, _)| bytes.trailing_zeros() >= *shift);
                let (shift, unit) = whole.copied().unwrap_or((0, ""));
                write!(f, "{}{unit}", bytes >> shift)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn sizes_and_shares_are_read() {
        for (text, expected) in [
            ("512M", Ok(Amount::Bytes(512 << 20))),
            ("2g", Ok(Amount::Bytes(2 << 30))),
            ("4096", Ok(Amount::Bytes(4096))),
            ("25%", Ok(Amount::Percent(25))),
            ("201%", Err(InvalidAmount)),
            ("0%", Err(InvalidAmount)),
            ("0", Err(InvalidAmount)),
            ("+5M", Err(InvalidAmount)),
            ("99999999T", Err(InvalidAmount)),
            ("M", Err(InvalidAmount)),
            ("", Err(InvalidAmount)),
            ("5é", Err(InvalidAmount)),
        ] {
            assert_eq!(text.parse(), expected, "{text}");
        }
        assert_eq!(Amount::Percent(50).of(1000), 500);
        assert_eq!(Amount::Bytes(7).of(1000), 7);
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_again(bytes in 1_u64.., percent in 1_u8..=200) {
            for amount in [Amount::Bytes(bytes), Amount::Percent(percent)] {
                prop_assert_eq!(amount.to_string().parse(), Ok(amount));
            }
        }

        #[test]
        fn any_text_is_an_amount_or_not(text in "\\PC{0,12}") {
            let _amount = text.parse::<Amount>();
        }
    }
}
