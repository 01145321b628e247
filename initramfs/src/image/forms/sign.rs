//! Signatures for Secure Boot, by sbsign(1). The time in a signature is held at the image's own by faketime(1), so that the same
//! inputs give the same bytes here, too; firmware does not look at it (UEFI 2.10 section 32.5.3.3).

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use super::super::output::Key;
use super::{FormError, io_error, run};

/// What brings the programs.
const HINT: &str = ": apt-get install -y --no-install-recommends sbsigntool faketime";

/// A key for Secure Boot.
#[derive(Debug, Clone)]
pub struct Signer {
    /// Private key, PEM.
    pub key: PathBuf,
    /// Its certificate, PEM.
    pub certificate: PathBuf,
}

impl Signer {
    /// A key of files that are made with this one.
    pub(super) fn key(&self, key: Key) -> Key {
        key.with_file("signing key", &self.key).with_file("certificate", &self.certificate)
    }

    /// Signs an EFI program, at this time in seconds since 1970.
    pub(super) fn sign(&self, program: Vec<u8>, time: u32) -> Result<Vec<u8>, FormError> {
        let dir = tempfile::tempdir().map_err(io_error(&std::env::temp_dir(), ""))?;
        let (plain, signed) = (dir.path().join("plain.efi"), dir.path().join("signed.efi"));
        for path in [&self.key, &self.certificate] {
            fs::File::open(path).map_err(io_error(path, ""))?;
        }
        fs::write(&plain, program).map_err(io_error(&plain, ""))?;
        let mut command = Command::new("faketime");
        command.args(["-f", &clock(time), "sbsign"]).env("TZ", "UTC");
        command.arg("--key").arg(&self.key).arg("--cert").arg(&self.certificate);
        run(command.arg("--output").arg(&signed).arg(&plain), HINT)?;
        fs::read(&signed).map_err(io_error(&signed, HINT))
    }
}

/// A time as faketime takes it, one that stands still.
fn clock(time: u32) -> String {
    let (year, month, day) = date(time / 86_400);
    let (hour, minute, second) = (time / 3600 % 24, time / 60 % 60, time % 60);
    format!("{year:04}-{month:02}-{day:02} {hour:02}:{minute:02}:{second:02}")
}

/// Year, month and day of a day since 1970-01-01 in the proleptic Gregorian calendar.
pub(super) fn date(days: u32) -> (u32, u32, u32) {
    let leap = |year: u32| {
        let by = |number: u32| year.is_multiple_of(number);
        by(4) && (!by(100) || by(400))
    };
    let (mut year, mut left) = (1970, days);
    while left >= 365 + u32::from(leap(year)) {
        left -= 365 + u32::from(leap(year));
        year += 1;
    }
    let february = 28 + u32::from(leap(year));
    let months = [31, february, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];
    let mut month = 1;
    for length in months {
        if left < length {
            break;
        }
        left -= length;
        month += 1;
    }
    (year, month, left + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seconds_become_the_date_that_the_calendar_has() {
        for (time, text) in [
            (0, "1970-01-01 00:00:00"),
            (951_782_399, "2000-02-28 23:59:59"),
            (951_782_400, "2000-02-29 00:00:00"),
            (1_735_689_599, "2024-12-31 23:59:59"),
            (u32::MAX, "2106-02-07 06:28:15"),
        ] {
            assert_eq!(clock(time), text);
        }
    }
}
