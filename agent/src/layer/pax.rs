//! Numbers of tar headers and records of PAX extended headers (POSIX.1-2017, pax, "pax Extended Header"). Pure.
//!
//! Stricter than most readers on purpose: where two readers could disagree about an archive, it is refused.

/// A point in time: seconds since 1970, may be negative, and nanoseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Time {
    pub(super) seconds: i64,
    pub(super) nanoseconds: i64,
}

/// What a PAX header says about the next entry. Values it does not carry are absent.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Records {
    pub(super) path: Option<Vec<u8>>,
    pub(super) link: Option<Vec<u8>>,
    pub(super) size: Option<u64>,
    pub(super) uid: Option<u64>,
    pub(super) gid: Option<u64>,
    pub(super) mtime: Option<Time>,
    /// Extended attributes, name and value, in order.
    pub(super) xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    /// What it says of a sparse file.
    pub(super) sparse: Option<Sparse>,
}

/// The records `GNU.sparse.…`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Sparse {
    /// Major and minor number of the form.
    pub(super) version: (u64, u64),
    /// The file's own path; the entry's is made up.
    name: Option<Vec<u8>>,
    /// Bytes of the file, holes included.
    pub(super) real: Option<u64>,
    /// The map, in version 0.1.
    pub(super) map: Option<Vec<u8>>,
}

/// A numeric field of a header: octal digits, or GNU's base-256 when the first bit is set. Empty means 0, as in Go.
pub(super) fn number(field: &[u8]) -> Option<i64> {
    let (first, rest) = field.split_first()?;
    if first & 0x80 != 0 {
        // Two's complement, big-endian, the marker bit taken off (or kept as the sign, when 0xff).
        let negative = first & 0x40 != 0;
        let mut value: i64 = if negative { -1 } else { 0 };
        let first = if negative { i64::from(*first) - 256 } else { i64::from(first & 0x3f) };
        value = if negative { value & first } else { first };
        for byte in rest {
            value = value.checked_mul(256)?.checked_add(i64::from(*byte))?;
        }
        return Some(value);
    }
    let text = field.split(|byte| *byte == 0).next()?;
    let text = std::str::from_utf8(text).ok()?.trim_matches(' ');
    if text.is_empty() {
        return Some(0);
    }
    let octal = text.bytes().all(|byte| (b'0'..=b'7').contains(&byte));
    octal.then(|| i64::from_str_radix(text, 8).ok()).flatten()
}

/// A decimal number without sign.
pub(super) fn decimal(value: &[u8]) -> Option<u64> {
    let digits = !value.is_empty() && value.iter().all(u8::is_ascii_digit);
    digits.then(|| std::str::from_utf8(value).ok()?.parse().ok()).flatten()
}

/// A time as PAX writes it: `SECONDS[.FRACTION]`, perhaps negative. Digits below the nanosecond are dropped.
pub(super) fn time(value: &[u8]) -> Option<Time> {
    let (negative, value) = match value.strip_prefix(b"-") {
        Some(rest) => (true, rest),
        None => (false, value),
    };
    let mut parts = value.splitn(2, |byte| *byte == b'.');
    let seconds = i64::try_from(decimal(parts.next()?)?).ok()?;
    let mut nanoseconds = 0;
    if let Some(fraction) = parts.next() {
        if !fraction.iter().all(u8::is_ascii_digit) {
            return None;
        }
        for at in 0..9 {
            let digit = fraction.get(at).map_or(0, |byte| i64::from(byte - b'0'));
            nanoseconds = nanoseconds * 10 + digit;
        }
    }
    match (negative, nanoseconds) {
        (false, _) => Some(Time { seconds, nanoseconds }),
        (true, 0) => Some(Time { seconds: -seconds, nanoseconds: 0 }),
        (true, _) => Some(Time { seconds: -seconds - 1, nanoseconds: 1_000_000_000 - nanoseconds }),
    }
}

/// Key and value.
type Record<'a> = (&'a [u8], &'a [u8]);

/// Splits `LENGTH KEY=VALUE\n` records by their lengths, so that values may hold any byte.
fn split(mut data: &[u8]) -> Result<Vec<Record<'_>>, &'static str> {
    const BAD: &str = "a PAX record is malformed";
    let mut records = Vec::new();
    while !data.is_empty() {
        let space = data.iter().take(8).position(|byte| *byte == b' ').ok_or(BAD)?;
        let length = data.get(..space).and_then(decimal).ok_or(BAD)?;
        let length = usize::try_from(length).map_err(|_| BAD)?;
        let record = data.get(space + 1..length).ok_or(BAD)?;
        let record = record.strip_suffix(b"\n").ok_or(BAD)?;
        let equals = record.iter().position(|byte| *byte == b'=').ok_or(BAD)?;
        let (key, value) = (record.get(..equals), record.get(equals + 1..));
        let (Some(key), Some(value)) = (key, value) else { return Err(BAD) };
        if key.is_empty() || records.iter().any(|(known, _)| *known == key) {
            return Err("a PAX key is empty or stands twice");
        }
        records.push((key, value));
        data = data.get(length..).unwrap_or_default();
    }
    Ok(records)
}

/// Reads the PAX header of one entry.
pub(super) fn records(data: &[u8]) -> Result<Records, &'static str> {
    const XATTR: &[u8] = b"SCHILY.xattr.";
    let mut found = Records::default();
    for (key, value) in split(data)? {
        if let Some(name) = key.strip_prefix(XATTR) {
            if name.is_empty() || name.len() > 255 || name.contains(&0) {
                return Err("an extended attribute has an impossible name");
            }
            found.xattrs.push((name.to_vec(), value.to_vec()));
            continue;
        }
        let text = || (!value.is_empty()).then(|| value.to_vec()).ok_or("a PAX path is empty");
        let whole = || decimal(value).ok_or("a PAX number is malformed");
        match key {
            b"path" => found.path = Some(text()?),
            b"linkpath" => found.link = Some(text()?),
            b"size" => found.size = Some(whole()?),
            b"uid" => found.uid = Some(whole()?),
            b"gid" => found.gid = Some(whole()?),
            b"mtime" => found.mtime = Some(time(value).ok_or("a PAX time is malformed")?),
            // Others (atime, ctime, uname, gname, comment, hdrcharset, vendors' own): nothing a layer's content depends on.
            _ => {
                if let Some(name) = key.strip_prefix(b"GNU.sparse.") {
                    sparse(found.sparse.get_or_insert_default(), name, value)?;
                }
            }
        }
    }
    if let Some(name) = found.sparse.as_mut().and_then(|sparse| sparse.name.take()) {
        found.path = Some(name);
    }
    Ok(found)
}

/// Takes a record of a sparse file.
fn sparse(told: &mut Sparse, name: &[u8], value: &[u8]) -> Result<(), &'static str> {
    let whole = || decimal(value).ok_or("a PAX number is malformed");
    match name {
        b"major" => told.version.0 = whole()?,
        b"minor" => told.version.1 = whole()?,
        b"name" if !value.is_empty() => told.name = Some(value.to_vec()),
        b"realsize" | b"size" => told.real = Some(whole()?),
        b"map" => told.map = Some(value.to_vec()),
        // How many pieces there are: the map says so itself.
        b"numblocks" => {}
        _ => return Err("a record of a sparse file is unknown, or of version 0.0"),
    }
    Ok(())
}

/// Checks a global PAX header: only what changes no entry is accepted, since readers disagree about the rest.
pub(super) fn check_global(data: &[u8]) -> Result<(), &'static str> {
    let harmless = |key: &[u8]| matches!(key, b"comment" | b"hdrcharset");
    match split(data)?.iter().all(|(key, _)| harmless(key)) {
        true => Ok(()),
        false => Err("a global PAX header would change entries"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_octal_or_base_256() {
        for (field, expected) in [
            (&b"0000644\0"[..], Some(0o644)),
            (b"  644 \0", Some(0o644)),
            (b"\0\0\0\0", Some(0)),
            (b"77777777", Some(0o77_777_777)),
            (b"0000648\0", None),
            (b"-000001\0", None),
            (b"\x80\0\0\0\0\0\0\0\0\0\x01\x02", Some(258)),
            (b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff", Some(-1)),
            (b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\0", Some(-256)),
            (b"\x80\0\0\x01\0\0\0\0\0\0\0\0", None),
        ] {
            assert_eq!(number(field), expected, "{field:?}");
        }
    }

    #[test]
    fn times_keep_their_nanoseconds_and_their_sign() {
        let at = |seconds, nanoseconds| Some(Time { seconds, nanoseconds });
        for (text, expected) in [
            ("0", at(0, 0)),
            ("1700000000.123456789", at(1_700_000_000, 123_456_789)),
            ("1.5", at(1, 500_000_000)),
            ("1.1234567899", at(1, 123_456_789)),
            ("-1.25", at(-2, 750_000_000)),
            ("-3", at(-3, 0)),
            ("", None),
            ("1.x", None),
            ("1e3", None),
            ("99999999999999999999", None),
        ] {
            assert_eq!(time(text.as_bytes()), expected, "{text}");
        }
    }

    #[test]
    fn record_lengths_are_obeyed_so_that_values_may_hold_newlines() {
        let found = records(b"30 SCHILY.xattr.user.a=x\n5 y=\n\n").expect_err("length is wrong");
        assert!(found.contains("malformed"));
        let found = records(b"29 SCHILY.xattr.user.a=x\n5 y\n").expect("records");
        assert_eq!(found.xattrs, [(b"user.a".to_vec(), b"x\n5 y".to_vec())]);
    }

    #[test]
    fn malformed_and_contradicting_records_are_refused() {
        for bad in [
            &b"9 path=a\n9 path=b\n"[..],
            b"99 path=a\n",
            b"9 path=ab",
            b"0 path=a\n",
            b"x path=a\n",
            b"7 path=\n",
            b"10 size=-1\n",
            b"10 size=+1\n",
            b"5 =a\n",
            b"23 GNU.sparse.major=1\n",
        ] {
            assert!(records(bad).is_err(), "{:?} was accepted", String::from_utf8_lossy(bad));
        }
        assert!(check_global(b"14 comment=x\n").is_err(), "wrong length");
        assert!(check_global(b"12 comment=\n").is_ok());
        assert!(check_global(b"9 path=a\n").is_err());
    }

    proptest::proptest! {
        #[test]
        fn no_bytes_make_a_parser_panic(bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..64)) {
            let _ = records(&bytes);
            let _ = check_global(&bytes);
            let _ = number(&bytes);
            let _ = time(&bytes);
        }
    }
}
