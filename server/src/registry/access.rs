//! Who may pull and push: tokens, of which only the SHA-256 is known here. Pure: what a request shows goes in, whether
//! it may comes out.
//!
//! A token comes as `Authorization: Bearer TOKEN`, or as the password of Basic with any user name, which is what
//! `podman login` and `~/.docker/config.json` can say. There are no rights by repository.

use std::fmt;
use std::str::FromStr;

use protocol::ids::Digest;
use serde::de::Error as _;
use serde::{Deserialize, Deserializer};

/// Longest `Authorization` header that is looked at, in bytes.
const MAX_HEADER: usize = 4096;

/// The SHA-256 of a token, `sha256:HEX`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TokenHash(Digest);

/// Why a text is no hash of a token. It does not repeat the text, which may be the token itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "not the hash of a token: expected sha256:HEX; `layercake imageset token` makes a token and its hash, and \
     `printf %s TOKEN | sha256sum` tells the hash of one that you have"
)]
pub struct InvalidTokenHash;

impl TokenHash {
    /// The hash of a token.
    #[must_use]
    pub fn of(token: &str) -> Self {
        Self(Digest::of(token.as_bytes()))
    }
}

impl fmt::Display for TokenHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl FromStr for TokenHash {
    type Err = InvalidTokenHash;

    fn from_str(text: &str) -> Result<Self, InvalidTokenHash> {
        text.parse().map(Self).map_err(|_| InvalidTokenHash)
    }
}

impl<'de> Deserialize<'de> for TokenHash {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
    }
}

/// The tokens that are known. Where there are none for something, everybody may do it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Access {
    push: Vec<TokenHash>,
    pull: Vec<TokenHash>,
}

/// What a request wants to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Right {
    /// Find out whether there is a registry and whether credentials hold: `GET /v2/`.
    Look,
    /// Read.
    Pull,
    /// Change.
    Push,
}

/// Why a request may not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Denied {
    /// It shows no token, or one that is not known.
    Unknown,
    /// Its token is for pulling only.
    PullOnly,
}

impl Access {
    /// `push` may push, delete and pull; `pull` may only pull. Without any of one kind that right is everybody's.
    #[must_use]
    pub fn new(push: Vec<TokenHash>, pull: Vec<TokenHash>) -> Self {
        Self { push, pull }
    }

    /// Whether a request with this `Authorization` header has a right.
    pub(crate) fn check(&self, right: Right, header: Option<&str>) -> Result<(), Denied> {
        let hash = header.and_then(token).map(|token| TokenHash(Digest::of(&token)));
        let known = |tokens: &[TokenHash]| hash.is_some_and(|hash| tokens.contains(&hash));
        let (pushes, pulls) = (known(&self.push), known(&self.pull));
        let open = match right {
            // Clients ask this first and show their credentials later only if it was refused without them.
            Right::Look => self.push.is_empty() && self.pull.is_empty(),
            Right::Pull => self.pull.is_empty(),
            Right::Push => self.push.is_empty(),
        };
        match right {
            _ if open || pushes => Ok(()),
            Right::Look | Right::Pull if pulls => Ok(()),
            Right::Push if pulls => Err(Denied::PullOnly),
            _ => Err(Denied::Unknown),
        }
    }
}

/// The token that a header carries. Basic without a password is nobody: some clients send that instead of nothing.
fn token(header: &str) -> Option<Vec<u8>> {
    if header.len() > MAX_HEADER {
        return None;
    }
    let (scheme, value) = header.trim().split_once(' ')?;
    let value = value.trim();
    if scheme.eq_ignore_ascii_case("bearer") {
        return (!value.is_empty()).then(|| value.as_bytes().to_vec());
    }
    if !scheme.eq_ignore_ascii_case("basic") {
        return None;
    }
    let pair = base64(value)?;
    let colon = pair.iter().position(|byte| *byte == b':')?;
    let password = pair.get(colon + 1..)?;
    (!password.is_empty()).then(|| password.to_vec())
}

/// Reads Base64 (RFC 4648, section 4), with or without padding.
fn base64(text: &str) -> Option<Vec<u8>> {
    let (mut bytes, mut bits, mut count) = (Vec::new(), 0_u32, 0_u32);
    for letter in text.trim_end_matches('=').bytes() {
        let value = match letter {
            b'A'..=b'Z' => letter - b'A',
            b'a'..=b'z' => letter - b'a' + 26,
            b'0'..=b'9' => letter - b'0' + 52,
            b'+' => 62,
            b'/' => 63,
            _ => return None,
        };
        bits = (bits << 6) | u32::from(value);
        count += 6;
        if count >= 8 {
            count -= 8;
            bytes.push(u8::try_from((bits >> count) & 0xff).ok()?);
            bits &= (1 << count) - 1;
        }
    }
    Some(bytes)
}

/// Reads any bytes as an `Authorization` header, for fuzzing.
pub fn fuzz_access(bytes: &[u8]) {
    let access = Access::new(vec![TokenHash::of("x")], Vec::new());
    let _ = access.check(Right::Push, Some(&String::from_utf8_lossy(bytes)));
}

#[cfg(test)]
mod tests {
    use super::*;

    // `any:push`, `:`, `any:pull`, `any:` and `any`.
    const BASIC_PUSH: &str = "Basic YW55OnB1c2g=";
    const BASIC_NOBODY: &str = "Basic Og==";
    const BASIC_PULL: &str = "Basic YW55OnB1bGw=";

    #[test]
    fn without_tokens_everybody_may_do_everything() {
        for right in [Right::Look, Right::Pull, Right::Push] {
            assert_eq!(Access::default().check(right, None), Ok(()));
            assert_eq!(Access::default().check(right, Some("Bearer any")), Ok(()));
        }
    }

    #[test]
    fn with_push_tokens_anybody_pulls_and_only_they_push() {
        let access = Access::new(vec![TokenHash::of("other"), TokenHash::of("push")], Vec::new());
        for header in [Some("Bearer push"), Some("bearer  push "), Some(BASIC_PUSH)] {
            for right in [Right::Look, Right::Pull, Right::Push] {
                assert_eq!(access.check(right, header), Ok(()), "{header:?}");
            }
        }
        for header in [
            None,
            Some("push"),
            Some("Bearer"),
            Some("Bearer "),
            Some("Bearer Push"),
            Some("Digest push"),
            Some(BASIC_NOBODY),
            Some(BASIC_PULL),
            Some("Basic YW55Og=="),
            Some("Basic YW55"),
            Some("Basic ***"),
        ] {
            assert_eq!(access.check(Right::Pull, header), Ok(()), "{header:?}");
            assert_eq!(access.check(Right::Push, header), Err(Denied::Unknown), "{header:?}");
            assert_eq!(access.check(Right::Look, header), Err(Denied::Unknown), "{header:?}");
        }
    }

    #[test]
    fn with_pull_tokens_nobody_pulls_without_and_they_do_not_push() {
        let access = Access::new(vec![TokenHash::of("push")], vec![TokenHash::of("pull")]);
        assert_eq!(access.check(Right::Pull, None), Err(Denied::Unknown));
        assert_eq!(access.check(Right::Pull, Some(BASIC_PULL)), Ok(()));
        assert_eq!(access.check(Right::Look, Some(BASIC_PULL)), Ok(()));
        assert_eq!(access.check(Right::Push, Some(BASIC_PULL)), Err(Denied::PullOnly));
        assert_eq!(access.check(Right::Pull, Some(BASIC_PUSH)), Ok(()));
    }

    #[test]
    fn a_text_that_is_no_hash_is_not_repeated() {
        let error = "my-secret".parse::<TokenHash>().expect_err("plain").to_string();
        assert!(!error.contains("my-secret") && error.contains("imageset token"), "{error}");
        let hash = TokenHash::of("x");
        assert_eq!(hash.to_string().parse(), Ok(hash));
    }

    #[test]
    fn base64_is_read_as_the_rfc_says() {
        for (text, bytes) in
            [("", ""), ("Zg==", "f"), ("Zm8=", "fo"), ("Zm9v", "foo"), ("Zm9vYmE=", "fooba")]
        {
            assert_eq!(base64(text).expect(text), bytes.as_bytes());
        }
        assert_eq!(base64("a b"), None);
    }

    proptest::proptest! {
        #[test]
        fn no_header_makes_the_reader_panic_or_opens_the_door(header in "(Basic |Bearer )?.{0,60}") {
            fuzz_access(header.as_bytes());
            let access = Access::new(vec![TokenHash::of("a-long-token")], Vec::new());
            proptest::prop_assert_eq!(access.check(Right::Push, Some(&header)), Err(Denied::Unknown));
        }
    }
}
