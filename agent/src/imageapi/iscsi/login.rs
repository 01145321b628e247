//! The login phase of a normal session without authentication: PDUs in, PDUs out, and what was agreed on. Pure.

use std::collections::BTreeMap;

/// Size of a basic header segment, in bytes.
pub(in crate::imageapi) const HEADER: usize = 48;
/// Largest data segment of a login response that is taken (RFC 7143, 13.12: 8192 unless declared), with room.
pub(in crate::imageapi) const MAX_DATA: usize = 64 << 10;
/// Most requests of one login.
const MAX_ROUNDS: u32 = 16;
/// Most bytes that a target may say over several responses.
const MAX_TEXT: usize = 256 << 10;
/// Opcodes, the first with the bit for immediate delivery.
const LOGIN_REQUEST: u8 = 0x43;
const LOGIN_RESPONSE: u8 = 0x23;
/// Flags of byte 1.
const TRANSIT: u8 = 0x80;
const CONTINUE: u8 = 0x40;
/// Stages.
const SECURITY: u8 = 0;
const OPERATIONAL: u8 = 1;
const FULL_FEATURE: u8 = 3;
/// The number of the first command, which is that of the login, too.
pub(in crate::imageapi) const FIRST_COMMAND: u32 = 1;
/// What we take in one data segment, in bytes.
const OUR_SEGMENT: u32 = 256 << 10;

/// Why there is no session.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(in crate::imageapi) enum LoginError {
    /// The target speaks something else.
    #[error("the target does not speak iSCSI: {0}")]
    Protocol(&'static str),
    /// The target refused (RFC 7143, 11.13.5).
    #[error("the target refused the login: {0}")]
    Refused(String),
}

/// What was agreed on, as the kernel wants it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::imageapi) struct Agreed {
    /// The target's number of its next response.
    pub next_status: u32,
    /// Most bytes the target takes in one data segment.
    pub their_segment: u32,
    /// Most bytes we take.
    pub our_segment: u32,
    /// Whether data waits for being asked for.
    pub initial_r2t: bool,
    /// Whether data may come with its command.
    pub immediate_data: bool,
    /// Most bytes of one sequence.
    pub max_burst: u32,
    /// Most bytes that are sent unasked.
    pub first_burst: u32,
    /// Most questions for data at a time.
    pub max_r2t: u32,
    /// The target's portal group.
    pub portal_group: u32,
}

/// What comes next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::imageapi) enum Step {
    /// Send this and read a response.
    Send(Vec<u8>),
    /// The session is in its full feature phase.
    Done(Agreed),
}

/// A login under way.
#[derive(Debug)]
pub(in crate::imageapi) struct Login {
    isid: [u8; 6],
    names: String,
    stage: u8,
    status_number: u32,
    rounds: u32,
    text: Vec<u8>,
    said: BTreeMap<String, String>,
}

impl Login {
    /// A login of `initiator` at `target`. `isid` tells the sessions between the two apart.
    pub(in crate::imageapi) fn new(initiator: &str, target: &str, isid: [u8; 6]) -> Self {
        let names = format!(
            "InitiatorName={initiator}\0TargetName={target}\0SessionType=Normal\0AuthMethod=None\0"
        );
        Self {
            isid,
            names,
            stage: SECURITY,
            status_number: 0,
            rounds: 0,
            text: Vec::new(),
            said: BTreeMap::new(),
        }
    }

    /// The first request.
    pub(in crate::imageapi) fn first(&mut self) -> Vec<u8> {
        let names = std::mem::take(&mut self.names);
        self.request(TRANSIT | SECURITY << 2 | OPERATIONAL, names.as_bytes())
    }

    fn request(&self, flags: u8, text: &[u8]) -> Vec<u8> {
        let mut pdu = vec![0; HEADER];
        let length = u32::try_from(text.len()).unwrap_or_default().to_be_bytes();
        let parts: [(usize, &[u8]); 6] = [
            (0, &[LOGIN_REQUEST, flags]),
            (5, length.get(1..).unwrap_or_default()),
            (8, &self.isid),
            (16, &1_u32.to_be_bytes()),
            (24, &FIRST_COMMAND.to_be_bytes()),
            (28, &self.status_number.to_be_bytes()),
        ];
        for (at, bytes) in parts {
            pdu.iter_mut().skip(at).zip(bytes).for_each(|(to, from)| *to = *from);
        }
        pdu.extend(text);
        pdu.resize(pdu.len().next_multiple_of(4), 0);
        pdu
    }

    /// Takes a response: its header and its data segment without padding.
    pub(in crate::imageapi) fn take(
        &mut self,
        header: &[u8; HEADER],
        data: &[u8],
    ) -> Result<Step, LoginError> {
        self.rounds += 1;
        if self.rounds > MAX_ROUNDS {
            return Err(LoginError::Protocol("its login does not end"));
        }
        if header[0] & 0x3f != LOGIN_RESPONSE {
            return Err(LoginError::Protocol("it answers a login with something else"));
        }
        if header[36] != 0 {
            return Err(LoginError::Refused(refusal(header[36], header[37], data)));
        }
        self.status_number = number(header, 24).wrapping_add(1);
        self.text.extend(data);
        if self.text.len() > MAX_TEXT {
            return Err(LoginError::Protocol("it says too much"));
        }
        let flags = header[1];
        if flags & CONTINUE != 0 {
            return Ok(Step::Send(self.request(self.stage << 2, &[])));
        }
        self.said.extend(pairs(&std::mem::take(&mut self.text)));
        if flags & TRANSIT == 0 {
            let flags = TRANSIT | self.stage << 2 | self.next_stage();
            return Ok(Step::Send(self.request(flags, &[])));
        }
        match flags & 3 {
            OPERATIONAL if self.stage == SECURITY => {
                if self.said.get("AuthMethod").is_some_and(|method| method != "None") {
                    return Err(LoginError::Refused("it wants authentication".to_owned()));
                }
                self.stage = OPERATIONAL;
                let flags = TRANSIT | OPERATIONAL << 2 | FULL_FEATURE;
                Ok(Step::Send(self.request(flags, proposal().as_bytes())))
            }
            FULL_FEATURE if self.stage == OPERATIONAL => self.agreed().map(Step::Done),
            _ => Err(LoginError::Protocol("its login goes astray")),
        }
    }

    fn next_stage(&self) -> u8 {
        if self.stage == SECURITY { OPERATIONAL } else { FULL_FEATURE }
    }

    /// What the target answered; what it did not answer is as RFC 7143, 13 has it by default.
    fn agreed(&self) -> Result<Agreed, LoginError> {
        let yes =
            |key: &str, default: bool| self.said.get(key).map_or(default, |value| value == "Yes");
        let size = |key: &str, default: u32| match self.said.get(key) {
            None => Ok(default),
            Some(value) => {
                let size = value.parse().ok().filter(|size| (512..=0xff_ffff).contains(size));
                size.ok_or(LoginError::Protocol("it names a size that is none"))
            }
        };
        let small = |key: &str, default: u32| {
            self.said.get(key).and_then(|value| value.parse().ok()).unwrap_or(default)
        };
        for digest in ["HeaderDigest", "DataDigest"] {
            if self.said.get(digest).is_some_and(|value| value != "None") {
                return Err(LoginError::Refused(format!("it insists on {digest}")));
            }
        }
        Ok(Agreed {
            next_status: self.status_number,
            their_segment: size("MaxRecvDataSegmentLength", 8192)?,
            our_segment: OUR_SEGMENT,
            initial_r2t: yes("InitialR2T", true),
            immediate_data: yes("ImmediateData", true),
            max_burst: size("MaxBurstLength", 256 << 10)?,
            first_burst: size("FirstBurstLength", 64 << 10)?,
            max_r2t: small("MaxOutstandingR2T", 1).max(1),
            portal_group: small("TargetPortalGroupTag", 1),
        })
    }
}

/// What we would like of a session.
fn proposal() -> String {
    let pairs = [
        ("HeaderDigest", "None".to_owned()),
        ("DataDigest", "None".to_owned()),
        ("ErrorRecoveryLevel", "0".to_owned()),
        ("InitialR2T", "No".to_owned()),
        ("ImmediateData", "Yes".to_owned()),
        ("MaxBurstLength", "16776192".to_owned()),
        ("FirstBurstLength", "262144".to_owned()),
        ("DefaultTime2Wait", "2".to_owned()),
        ("DefaultTime2Retain", "0".to_owned()),
        ("MaxOutstandingR2T", "1".to_owned()),
        ("MaxConnections", "1".to_owned()),
        ("DataPDUInOrder", "Yes".to_owned()),
        ("DataSequenceInOrder", "Yes".to_owned()),
        ("MaxRecvDataSegmentLength", OUR_SEGMENT.to_string()),
    ];
    pairs.iter().map(|(key, value)| format!("{key}={value}\0")).collect()
}

/// The length of the data segment and of what stands before it (additional headers), as a header says them.
///
/// # Errors
/// If a segment is longer than any of a login.
pub(in crate::imageapi) fn lengths(header: &[u8; HEADER]) -> Result<(usize, usize), LoginError> {
    let additional = usize::from(header[4]).saturating_mul(4);
    let data = usize::try_from(number(header, 4) & 0xff_ffff).unwrap_or(usize::MAX);
    match data > MAX_DATA {
        true => Err(LoginError::Protocol("a response is too long")),
        false => Ok((additional, data)),
    }
}

fn number(header: &[u8; HEADER], at: usize) -> u32 {
    let bytes = header.get(at..).and_then(|rest| rest.first_chunk::<4>());
    bytes.map_or(0, |bytes| u32::from_be_bytes(*bytes))
}

fn pairs(text: &[u8]) -> impl Iterator<Item = (String, String)> {
    text.split(|byte| *byte == 0).filter_map(|pair| {
        let (key, value) = std::str::from_utf8(pair).ok()?.split_once('=')?;
        Some((key.to_owned(), value.to_owned()))
    })
}

/// Status class and detail in words (RFC 7143, 11.13.5).
fn refusal(class: u8, detail: u8, data: &[u8]) -> String {
    let words = match (class, detail) {
        (1, _) => {
            let moved = pairs(data).find(|(key, _)| key == "TargetAddress");
            let to = moved.map(|(_, to)| to.chars().take(80).collect::<String>());
            return format!("the target has moved to {}", to.unwrap_or_default().escape_debug());
        }
        (2, 1) => "authentication failed",
        (2, 2) => "this initiator is not allowed",
        (2, 3) => "there is no such target",
        (2, 4) => "the target was removed",
        (2, 6) => "it has too many connections",
        (3, 1) => "the target is out of service",
        (3, 2) => "the target has no resources left",
        _ => return format!("status {class}.{detail}"),
    };
    words.to_owned()
}

/// Feeds a login with responses out of arbitrary bytes, for fuzzing.
pub fn fuzz_login(bytes: &[u8]) {
    let mut login = Login::new("iqn.a", "iqn.b", [0; 6]);
    drop(login.first());
    let mut rest = bytes;
    while let Some((header, tail)) = rest.split_first_chunk::<HEADER>() {
        let Ok((_, data)) = lengths(header) else { return };
        let (data, tail) = tail.split_at(data.min(tail.len()));
        if !matches!(login.take(header, data), Ok(Step::Send(_))) {
            return;
        }
        rest = tail;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn response(flags: u8, status: (u8, u8), number: u32, text: &str) -> ([u8; HEADER], Vec<u8>) {
        let mut header = [0; HEADER];
        header[0] = LOGIN_RESPONSE;
        header[1] = flags;
        header[24..28].copy_from_slice(&number.to_be_bytes());
        (header[36], header[37]) = status;
        (header, text.replace('|', "\0").into_bytes())
    }

    fn login() -> Login {
        let mut login = Login::new("iqn.2026-11.node", "iqn.2026-11.disk", [0x80, 1, 2, 3, 4, 5]);
        let first = login.first();
        assert_eq!(first.len() % 4, 0);
        assert_eq!(&first[..2], &[0x43, 0x81]);
        assert_eq!(&first[8..14], &[0x80, 1, 2, 3, 4, 5]);
        let text = String::from_utf8(first[HEADER..].to_vec()).expect("text");
        assert!(text.starts_with("InitiatorName=iqn.2026-11.node\0TargetName=iqn.2026-11.disk\0"));
        let (_, length) = lengths(first.first_chunk().expect("header")).expect("lengths");
        assert_eq!(text.trim_end_matches('\0').len() + 1, length);
        login
    }

    #[test]
    fn a_login_goes_through_its_stages_and_takes_what_was_agreed_on() {
        let mut login = login();
        let (header, data) = response(0x81, (0, 0), 7, "AuthMethod=None|TargetPortalGroupTag=3|");
        let Ok(Step::Send(second)) = login.take(&header, &data) else { panic!("second") };
        assert_eq!(second[1], 0x87);
        assert_eq!(&second[28..32], &8_u32.to_be_bytes());
        // A response in two parts, then a target that is not ready to go on.
        let (header, data) = response(0x44, (0, 0), 8, "InitialR2T=Yes|Immediate");
        assert!(matches!(login.take(&header, &data), Ok(Step::Send(pdu)) if pdu[1] == 4));
        let text = "Data=No|MaxRecvDataSegmentLength=65536|MaxBurstLength=131072|";
        let (header, data) = response(0x04, (0, 0), 9, text);
        assert!(matches!(login.take(&header, &data), Ok(Step::Send(pdu)) if pdu[1] == 0x87));
        let (header, data) = response(0x87, (0, 0), 10, "");
        let agreed = Agreed {
            next_status: 11,
            their_segment: 65536,
            our_segment: OUR_SEGMENT,
            initial_r2t: true,
            immediate_data: false,
            max_burst: 131_072,
            first_burst: 65536,
            max_r2t: 1,
            portal_group: 3,
        };
        assert_eq!(login.take(&header, &data), Ok(Step::Done(agreed)));
    }

    #[test]
    fn refusals_are_said_in_words() {
        for (status, text, expected) in [
            ((2, 3), "", "there is no such target"),
            ((2, 1), "", "authentication failed"),
            ((1, 1), "TargetAddress=10.0.0.9:3260,1|", "moved to 10.0.0.9:3260,1"),
            ((3, 9), "", "status 3.9"),
            ((0, 0), "AuthMethod=CHAP|", "wants authentication"),
        ] {
            let (header, data) = response(0x81, status, 0, text);
            let error = login().take(&header, &data).expect_err(expected).to_string();
            assert!(error.contains(expected), "{error}");
        }
        let (mut header, data) = response(0x81, (0, 0), 0, "");
        header[0] = 0x3f;
        assert!(login().take(&header, &data).is_err());
    }

    #[test]
    fn a_target_that_never_ends_is_left() {
        let mut login = login();
        let (header, data) = response(0x00, (0, 0), 0, "");
        let ends = (0..100).find(|_| login.take(&header, &data).is_err());
        assert_eq!(ends, Some(16));
    }

    proptest! {
        #[test]
        fn hostile_targets_do_no_harm(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
            fuzz_login(&bytes);
            let (header, _) = response(0x81, (0, 0), 1, "");
            fuzz_login(&[&header[..], &bytes].concat());
        }
    }
}
