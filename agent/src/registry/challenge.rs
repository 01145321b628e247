//! What a registry asks for with 401: `WWW-Authenticate: Bearer realm="…",service="…",scope="…"` (RFC 6750, section 3; the
//! distribution project's token authentication) or `Basic` (RFC 7617). Pure.

/// Longest challenge that is read, in bytes.
const MAX_CHALLENGE_BYTES: usize = 4096;

/// What is asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Challenge {
    /// User name and password.
    Basic,
    /// A token.
    Token(TokenServer),
}

/// Where a token is to be had, and for what.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct TokenServer {
    pub(super) realm: String,
    service: Option<String>,
    scope: Option<String>,
}

impl Challenge {
    /// The first of these header values that can be met.
    pub(super) fn choose(values: &[&str]) -> Result<Self, &'static str> {
        let mut refused = "it asks for nothing that could be given";
        for value in values {
            match Self::parse(value) {
                Ok(challenge) => return Ok(challenge),
                Err(reason) => refused = reason,
            }
        }
        Err(refused)
    }

    /// Reads one header value.
    fn parse(value: &str) -> Result<Self, &'static str> {
        if value.len() > MAX_CHALLENGE_BYTES {
            return Err("its challenge is too long");
        }
        let (scheme, mut rest) = value.split_once(' ').unwrap_or((value, ""));
        if scheme.eq_ignore_ascii_case("basic") {
            return Ok(Self::Basic);
        }
        if !scheme.eq_ignore_ascii_case("bearer") {
            return Err("it takes neither passwords nor tokens");
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
            true => Ok(Self::Token(TokenServer { realm, service, scope })),
            false => Err("its challenge names a realm that is no URL"),
        }
    }
}

impl TokenServer {
    /// The URL that gives the token.
    pub(super) fn url(&self) -> String {
        let mut url = self.realm.clone();
        for (key, value) in [("service", &self.service), ("scope", &self.scope)] {
            let Some(value) = value else { continue };
            url.push(if url.contains('?') { '&' } else { '?' });
            url.push_str(key);
            url.push('=');
            encode(value, &mut url);
        }
        url
    }

    /// The form that exchanges a refresh token (the distribution project's OAuth 2 token endpoint).
    pub(super) fn form(&self, refresh_token: &str) -> String {
        let mut form = "grant_type=refresh_token&client_id=layercake-agent".to_owned();
        let fields = [
            ("refresh_token", Some(refresh_token)),
            ("service", self.service.as_deref()),
            ("scope", self.scope.as_deref()),
        ];
        for (key, value) in fields {
            let Some(value) = value else { continue };
            form.push('&');
            form.push_str(key);
            form.push('=');
            encode(value, &mut form);
        }
        form
    }
}

/// Percent-encodes all but what is unreserved (RFC 3986, 2.3).
fn encode(text: &str, out: &mut String) {
    for byte in text.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => {
                out.push(char::from(byte));
            }
            _ => out.push_str(&format!("%{byte:02X}")),
        }
    }
}

/// Reads any bytes as a challenge, for fuzzing.
pub fn fuzz_challenge(bytes: &[u8]) {
    if let Ok(Challenge::Token(server)) = Challenge::parse(&String::from_utf8_lossy(bytes)) {
        let _ = (server.url(), server.form("x"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TOKEN: &str = r#"Bearer realm="https://auth.example/token",service="reg",scope="repository:a/b:pull,push",x="y""#;

    #[test]
    fn a_challenge_gives_the_url_of_the_token_and_the_form_of_an_exchange() {
        let Challenge::Token(server) = Challenge::parse(TOKEN).expect("challenge") else {
            panic!("no token")
        };
        assert_eq!(
            server.url(),
            "https://auth.example/token?service=reg&scope=repository%3Aa%2Fb%3Apull%2Cpush"
        );
        assert_eq!(
            server.form("a b"),
            "grant_type=refresh_token&client_id=layercake-agent&refresh_token=a%20b&service=reg\
             &scope=repository%3Aa%2Fb%3Apull%2Cpush"
        );
    }

    #[test]
    fn the_first_that_can_be_met_is_taken() {
        let choose = |values: &[&str]| Challenge::choose(values);
        assert_eq!(choose(&["Negotiate", "basic realm=\"x\""]), Ok(Challenge::Basic));
        assert!(matches!(choose(&[TOKEN, "Basic realm=\"x\""]), Ok(Challenge::Token(_))));
        assert_eq!(choose(&[]), Err("it asks for nothing that could be given"));
        assert_eq!(choose(&["Negotiate"]), Err("it takes neither passwords nor tokens"));
    }

    #[test]
    fn what_cannot_be_followed_is_refused() {
        let long = format!("Bearer realm=\"http://{}\"", "x".repeat(5000));
        for bad in [
            "",
            "Digest realm=\"x\"",
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
        fn no_challenge_makes_the_parser_panic(value in "(Bearer |Basic )?\\PC{0,60}") {
            fuzz_challenge(value.as_bytes());
        }
    }
}
