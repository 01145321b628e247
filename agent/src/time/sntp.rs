//! SNTP's packets (RFC 5905 sections 7.3 and 14, RFC 4330): a request, and a server's reply judged. Pure; no extension fields, no
//! authentication, client mode alone.

use super::discipline::{BUILT_S, Sample};

/// Length of a packet without extensions, in bytes.
pub const LENGTH: usize = 48;
/// Leap indicator 0, version 4, mode 3 (client).
const CLIENT: u8 = 0b00_100_011;
/// The server's mode.
const SERVER: u8 = 4;
/// Leap indicator of a clock that was never set.
const ALARM: u8 = 3;
/// Strata from here on are not synchronised.
const UNSYNCHRONISED: u8 = 16;
/// From 1900 to 1970, in seconds.
const TO_1970: u32 = 2_208_988_800;
/// Nanoseconds of a second.
const SECOND: i128 = 1_000_000_000;
/// Longest round trip that is believed, in nanoseconds.
const MAX_DELAY: i128 = 2 * SECOND;
/// Largest distance to the reference clock that is believed (RFC 5905 section 7.2, MAXDISP): 16 s, as 16.16.
const MAX_DISTANCE: u32 = 16 << 16;

/// What a server said.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reply {
    /// The time.
    Time(Sample),
    /// It is not to be asked again (`DENY`, `RSTR`).
    Leave,
    /// It is to be asked less often (`RATE`).
    Slower,
}

/// Why a packet is no answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NoReply {
    /// Too short.
    #[error("it is too short")]
    Short,
    /// Not from a server, or not to this request: somebody else's, late or made up.
    #[error("it does not answer what was asked")]
    Foreign,
    /// The server's own clock is not set.
    #[error("its clock is not synchronised")]
    Unsynchronised,
    /// Its times contradict each other, or took too long.
    #[error("its times make no sense")]
    Nonsense,
}

/// A request. `cookie` is random: it stands where our time would, says nothing of our clock, and comes back in the reply.
#[must_use]
pub fn request(cookie: u64) -> [u8; LENGTH] {
    let mut packet = [0; LENGTH];
    if let Some(first) = packet.first_mut() {
        *first = CLIENT;
    }
    if let Some(transmit) = packet.get_mut(40..) {
        transmit.copy_from_slice(&cookie.to_be_bytes());
    }
    packet
}

/// Reads a reply to the request with this cookie, which was sent and answered at these times of our clock, nanoseconds since 1970.
///
/// # Errors
/// What is wrong with it.
pub fn read(bytes: &[u8], cookie: u64, sent: i128, received: i128) -> Result<Reply, NoReply> {
    let byte = |at: usize| bytes.get(at).copied().ok_or(NoReply::Short);
    let word = |at: usize| -> Result<u32, NoReply> {
        let word = bytes.get(at..at.saturating_add(4)).and_then(|it| it.try_into().ok());
        word.map(u32::from_be_bytes).ok_or(NoReply::Short)
    };
    let (head, stratum) = (byte(0)?, byte(1)?);
    let (leap, version, mode) = (head >> 6, (head >> 3) & 7, head & 7);
    let echoed = u64::from(word(24)?) << 32 | u64::from(word(28)?);
    let (seconds, fraction) = (word(40)?, word(44)?);
    if mode != SERVER || !(3..=4).contains(&version) || echoed != cookie {
        return Err(NoReply::Foreign);
    }
    if stratum == 0 {
        return match &word(12)?.to_be_bytes() {
            b"DENY" | b"RSTR" => Ok(Reply::Leave),
            b"RATE" => Ok(Reply::Slower),
            _ => Err(NoReply::Unsynchronised),
        };
    }
    let distance = (word(4)? / 2).saturating_add(word(8)?);
    if leap == ALARM || stratum >= UNSYNCHRONISED || distance > MAX_DISTANCE {
        return Err(NoReply::Unsynchronised);
    }
    if (seconds, fraction) == (0, 0) {
        return Err(NoReply::Nonsense);
    }
    let arrived = since_1970(word(32)?, word(36)?);
    let left = since_1970(seconds, fraction);
    let delay_ns = (received - sent) - (left - arrived);
    // Which two clocks that run at a little different speeds can make a little negative.
    if left < arrived || received < sent || !(-SECOND / 1000..=MAX_DELAY).contains(&delay_ns) {
        return Err(NoReply::Nonsense);
    }
    let offset_ns = ((arrived - sent) + (left - received)) / 2;
    Ok(Reply::Time(Sample { offset_ns, delay_ns: delay_ns.max(0) }))
}

/// A timestamp, nanoseconds since 1970: of the times that it may mean, 136 years apart, the one nearest to our build.
fn since_1970(seconds: u32, fraction: u32) -> i128 {
    const ERA: i128 = 1 << 32;
    let in_era = i128::from(seconds) - i128::from(TO_1970);
    let eras = (BUILT_S - in_era + ERA / 2).div_euclid(ERA);
    (in_era + eras * ERA) * SECOND + ((i128::from(fraction) * SECOND) >> 32)
}

/// Reads any bytes as a reply; for fuzzing.
pub fn fuzz_reply(bytes: &[u8]) {
    let cookie = bytes.get(24..32).and_then(|it| it.try_into().ok()).map_or(0, u64::from_be_bytes);
    if let Ok(Reply::Time(sample)) = read(bytes, cookie, 0, SECOND) {
        assert!(sample.delay_ns >= 0);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const COOKIE: u64 = 0x0102_0304_0506_0708;
    const NOW: i128 = (BUILT_S + 1000) * SECOND;

    fn stamp(time: i128) -> [u8; 8] {
        let seconds = u32::try_from((time / SECOND + i128::from(TO_1970)) & 0xffff_ffff).unwrap();
        let fraction = u32::try_from(((time % SECOND) << 32) / SECOND).unwrap();
        (u64::from(seconds) << 32 | u64::from(fraction)).to_be_bytes()
    }

    /// A good reply of a server whose clock is `ahead` of ours and that took 1 ms, 2 ms away.
    fn reply(ahead: i128) -> [u8; LENGTH] {
        let mut bytes = request(0);
        (bytes[0], bytes[1]) = (0b00_100_100, 2);
        bytes[24..32].copy_from_slice(&COOKIE.to_be_bytes());
        bytes[32..40].copy_from_slice(&stamp(NOW + ahead + 2_000_000));
        bytes[40..48].copy_from_slice(&stamp(NOW + ahead + 3_000_000));
        bytes
    }

    fn read_it(bytes: &[u8]) -> Result<Reply, NoReply> {
        read(bytes, COOKIE, NOW, NOW + 5_000_000)
    }

    #[test]
    fn the_offset_is_what_our_clock_lacks_and_the_delay_what_the_network_took() {
        for ahead in [0, 7 * SECOND, -3600 * SECOND] {
            let Ok(Reply::Time(sample)) = read_it(&reply(ahead)) else { panic!("{ahead}") };
            assert!((sample.offset_ns - ahead).abs() < 10, "{sample:?}");
            assert!((sample.delay_ns - 4_000_000).abs() < 10, "{sample:?}");
        }
    }

    #[test]
    fn what_is_no_answer_is_told_apart() {
        let with = |change: fn(&mut [u8; LENGTH])| {
            let mut bytes = reply(0);
            change(&mut bytes);
            read_it(&bytes)
        };
        assert_eq!(with(|it| it[0] = 0b00_100_011), Err(NoReply::Foreign), "a client's");
        assert_eq!(with(|it| it[31] ^= 1), Err(NoReply::Foreign), "another request's");
        assert_eq!(with(|it| it[0] |= 0b1100_0000), Err(NoReply::Unsynchronised));
        assert_eq!(with(|it| it[1] = 16), Err(NoReply::Unsynchronised));
        assert_eq!(with(|it| it[8] = 1), Err(NoReply::Unsynchronised), "far from its reference");
        assert_eq!(with(|it| it[40..48].fill(0)), Err(NoReply::Nonsense));
        assert_eq!(with(|it| it[43] -= 1), Err(NoReply::Nonsense), "sent before it came");
        assert_eq!(read(&reply(0), COOKIE, NOW, NOW - 1), Err(NoReply::Nonsense));
        assert_eq!(read(&reply(0), COOKIE, NOW, NOW + 9 * SECOND), Err(NoReply::Nonsense));
        assert_eq!(read_it(&reply(0)[..47]), Err(NoReply::Short));
    }

    #[test]
    fn a_kiss_of_death_is_obeyed() {
        let kiss = |code: &[u8; 4]| {
            let mut bytes = reply(0);
            bytes[1] = 0;
            bytes[12..16].copy_from_slice(code);
            read_it(&bytes)
        };
        assert_eq!(kiss(b"DENY"), Ok(Reply::Leave));
        assert_eq!(kiss(b"RSTR"), Ok(Reply::Leave));
        assert_eq!(kiss(b"RATE"), Ok(Reply::Slower));
        assert_eq!(kiss(b"INIT"), Err(NoReply::Unsynchronised));
    }

    #[test]
    fn a_timestamp_of_the_next_era_is_understood() {
        // 2036-02-07 06:28:16 UTC, when the seconds since 1900 pass 32 bits.
        let turn = i128::from(u32::MAX) + 1 - i128::from(TO_1970);
        assert_eq!(since_1970(0, 0), turn * SECOND);
        assert_eq!(since_1970(u32::MAX, 0), (turn - 1) * SECOND);
        assert_eq!(since_1970(5, 1 << 31), (turn + 5) * SECOND + SECOND / 2);
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_without_a_panic(bytes in proptest::collection::vec(any::<u8>(), 0..80)) {
            fuzz_reply(&bytes);
        }

        #[test]
        fn a_reply_with_any_bytes_behind_the_header_is_read(tail in proptest::collection::vec(any::<u8>(), 46)) {
            let mut bytes = vec![0b00_100_100, 1];
            bytes.extend(tail);
            fuzz_reply(&bytes);
        }
    }
}
