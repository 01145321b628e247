//! What is done about an offset, and which of several servers is believed. Pure.

/// Nanoseconds of a second.
const SECOND: i128 = 1_000_000_000;
/// When this program was built, or a time that its source knew to have passed, seconds since 1970: no node that runs it lives
/// before. A build that sets `SOURCE_DATE_EPOCH` moves it.
pub const BUILT_S: i128 = later(1_793_491_200, option_env!("SOURCE_DATE_EPOCH"));
/// How long after its build a program may still be in use: what a server claims beyond that is not believed.
const LIFE_S: i128 = 50 * 366 * 86_400;
/// An offset that is let be: less than a query over a busy network can tell.
const GOOD: i128 = 500_000;
/// Most that is slewed, at the kernel's 500 parts per million; what is more would take longer than the next look.
const MOST_SLEWED: i128 = SECOND / 2;
/// How far two servers may be apart beyond what their round trips explain.
const AGREE: i128 = SECOND / 10;

/// What the clock needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Correction {
    /// It is right.
    None,
    /// To run faster or slower until it has gained these nanoseconds.
    Slew(i128),
    /// To be set, these nanoseconds ahead.
    Step(i128),
}

/// Why a time is not taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Unbelievable {
    /// Before the program existed.
    #[error("its time is {0} s before this Layer0 was built")]
    BeforeBuild(i128),
    /// Too far in the future.
    #[error("its time is {0} s after this Layer0 was built, which is more than its life")]
    FarFuture(i128),
    /// Two servers that cannot be told apart.
    #[error("two time servers are {0} ms apart, and which is right cannot be told")]
    Disagree(i128),
}

/// One server's answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sample {
    /// What our clock lacks, in nanoseconds.
    pub offset_ns: i128,
    /// The round trip, in nanoseconds: half of it is the error at the most.
    pub delay_ns: i128,
}

/// What an offset asks for. The first one of a boot is always a step, so that nobody sees the clock creep to the right day.
///
/// # Errors
/// When the clock would be set to a time that cannot be.
pub fn correct(offset: i128, first: bool, now: i128) -> Result<Correction, Unbelievable> {
    believable(now.saturating_add(offset))?;
    let size = offset.abs();
    Ok(match () {
        () if size < GOOD => Correction::None,
        () if first || size > MOST_SLEWED => Correction::Step(offset),
        () => Correction::Slew(offset),
    })
}

/// Whether a time, in nanoseconds since 1970, can be.
///
/// # Errors
/// That it cannot.
pub fn believable(time: i128) -> Result<(), Unbelievable> {
    let since = time / SECOND - BUILT_S;
    match since {
        ..0 => Err(Unbelievable::BeforeBuild(-since)),
        LIFE_S.. => Err(Unbelievable::FarFuture(since)),
        _ => Ok(()),
    }
}

/// Which of the answers is taken: of those that agree with the middle one the one with the shortest round trip. Its place in the
/// list; none of an empty one.
///
/// # Errors
/// When there are two and they do not agree.
pub fn choose(samples: &[Sample]) -> Result<Option<usize>, Unbelievable> {
    let mut order: Vec<(usize, &Sample)> = samples.iter().enumerate().collect();
    order.sort_by_key(|(_, sample)| sample.offset_ns);
    let Some((_, middle)) = order.get(order.len() / 2) else { return Ok(None) };
    let agrees = |sample: &Sample| {
        let apart = (sample.offset_ns - middle.offset_ns).abs();
        apart <= (sample.delay_ns + middle.delay_ns) / 2 + AGREE
    };
    if let [(_, one), (_, two)] = order.as_slice()
        && !agrees(one)
    {
        return Err(Unbelievable::Disagree((two.offset_ns - one.offset_ns) / 1_000_000));
    }
    let good = order.iter().filter(|(_, sample)| agrees(sample));
    Ok(good.min_by_key(|(_, sample)| sample.delay_ns).map(|(place, _)| *place))
}

/// The later of a time and what the build's environment says, seconds since 1970.
const fn later(known: i128, said: Option<&str>) -> i128 {
    let Some(text) = said else { return known };
    let mut bytes = text.as_bytes();
    let mut value: i128 = 0;
    while let [digit, rest @ ..] = bytes {
        if !digit.is_ascii_digit() || value > 1 << 40 {
            return known;
        }
        value = value * 10 + (*digit - b'0') as i128;
        bytes = rest;
    }
    if value > known { value } else { known }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const NOW: i128 = (BUILT_S + 1_000_000) * SECOND;

    #[test]
    fn the_first_offset_is_stepped_and_later_ones_are_slewed_while_they_are_small() {
        for (offset, first, expected) in [
            (100, true, Correction::None),
            (700_000, true, Correction::Step(700_000)),
            (-700_000, false, Correction::Slew(-700_000)),
            (SECOND / 2, false, Correction::Slew(SECOND / 2)),
            (SECOND, false, Correction::Step(SECOND)),
        ] {
            assert_eq!(correct(offset, first, NOW), Ok(expected), "{offset} {first}");
        }
    }

    #[test]
    fn no_time_before_the_build_is_taken_and_none_in_another_century() {
        let before = correct(-2_000_000 * SECOND, true, NOW);
        assert_eq!(before, Err(Unbelievable::BeforeBuild(1_000_000)));
        let future = correct(LIFE_S * SECOND, true, NOW);
        assert_eq!(future, Err(Unbelievable::FarFuture(LIFE_S + 1_000_000)));
        assert_eq!(later(5, Some("7")), 7);
        assert_eq!([later(5, Some("3")), later(5, Some("x")), later(5, None)], [5, 5, 5]);
    }

    #[test]
    fn of_three_servers_the_liar_is_left_out_and_the_nearest_is_taken() {
        let sample = |offset_ms: i128, delay_ms: i128| Sample {
            offset_ns: offset_ms * 1_000_000,
            delay_ns: delay_ms * 1_000_000,
        };
        assert_eq!(choose(&[]), Ok(None));
        assert_eq!(choose(&[sample(5000, 9)]), Ok(Some(0)));
        assert_eq!(choose(&[sample(10, 9), sample(-9000, 1), sample(12, 4)]), Ok(Some(2)));
        assert_eq!(choose(&[sample(10, 9), sample(20, 4)]), Ok(Some(1)));
        let apart = choose(&[sample(10, 9), sample(9010, 4)]);
        assert_eq!(apart, Err(Unbelievable::Disagree(9000)));
    }

    proptest! {
        #[test]
        fn what_is_corrected_never_ends_before_the_build(
            offset in any::<i64>(),
            first: bool,
            now in any::<i64>(),
        ) {
            match correct(offset.into(), first, now.into()) {
                Ok(Correction::Step(by)) => {
                    prop_assert!((i128::from(now) + by) / SECOND >= BUILT_S);
                }
                Ok(Correction::Slew(by)) => prop_assert!(by.abs() <= MOST_SLEWED),
                _ => {}
            }
        }
    }
}
