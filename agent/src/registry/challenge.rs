//! The registry's demand for a token: `WWW-Authenticate: Bearer realm="…",service="…",scope="…"` (RFC 6750, section 3;
//! the distribution project's token authentication). Pure.

/// Longest challenge that is read, in bytes.
const MAX_CHALLENGE_BYTES: usize = 4096;

/// Where a token is to be had, and for what.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Challenge {
    pub(super) realm: String,
    service: Option<String>,
    scope: Option<String>,
}

impl Challenge {
    /// Reads the header's value.
    pub(super) fn parse(value: &str) -> Result<Self, &'static str> {
        if value.len() > MAX_CHALLENGE_BYTES {
            return Err("its challenge is too long");
        }
        let (scheme, mut rest) = value.split_once(' ').unwrap_or((value, ""));
        if !scheme.eq_ignore_ascii_case("bearer") {
            return Err("it does not offer tokens, and credentials are not supported yet");
        }
        let (mut realm, mut service, mut scope) = (None, None, None);
        while !rest.is_empty() {
            const BAD: &str = "its challenge is malformed";
            let (key, after) = rest.trim_start_matches([',', ' ']).split_once("=\"").ok_or(BAD)?;
            let (text, after) = after.split_once('"').ok_or(BAD)?;
            let place = match key.trim().to_ascii_lowercase().as_str() {
                "realm" => &mut realm,
                "service" => &mut service,
                "scope" => &mut scope,
                _ => &mut None,
            };
            *place = Some(text.to_owned());
            rest = after.trim_end();
        }
        let realm = realm.ok_or("its challenge names no realm")?;
        let good = realm.starts_with("https://") || realm.starts_with("http://");
        match good && realm.bytes().all(|byte| byte.is_ascii_graphic()) {
            true => Ok(Self { realm, service, scope }),
            false => Err("its challenge names a realm that is no URL"),
        }
    }

    /// The URL that gives the token.
    pub(super) fn url(&self) -> String {
        let mut url = self.realm.clone();
        for (key, value) in [("service", &self.service), ("scope", &self.scope)] {
            let Some(value) = value else { continue };
            url.push(if url.contains('?') { '&' } else { '?' });
            url.push_str(key);
            url.push('=');
            for byte in value.bytes() {
                match byte {
                    b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => {
                        url.push(char::from(byte));
                    }
                    _ => url.push_str(&format!("%{byte:02X}")),
                }
            }
        }
        url
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_challenge_gives_the_url_of_the_token() {
        let value = r#"Bearer realm="https://auth.example/token",service="reg",scope="repository:a/b:pull,push",x="y""#;
        let url = Challenge::parse(value).expect("challenge").url();
        assert_eq!(
            url,
            "https://auth.example/token?service=reg&scope=repository%3Aa%2Fb%3Apull%2Cpush"
        );
    }

    #[test]
    fn what_cannot_be_followed_is_refused() {
        let long = format!("Bearer realm=\"http://{}\"", "x".repeat(5000));
        for bad in [
            "",
            "Basic realm=\"x\"",
            "Bearer",
            "Bearer realm=x",
            "Bearer realm=\"ftp://x\"",
            "Bearer realm=\"http://a b\"",
            "Bearer service=\"x\"",
            &long,
        ] {
            assert!(Challenge::parse(bad).is_err(), "{bad} was accepted");
        }
    }

    proptest::proptest! {
        #[test]
        fn no_challenge_makes_the_parser_panic(value in "(Bearer )?\\PC{0,60}") {
            let _ = Challenge::parse(&value).map(|challenge| challenge.url());
        }
    }
}
