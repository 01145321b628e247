//! What a registry asks for in `WWW-Authenticate` (RFC 9110, section 11; the distribution project's token
//! authentication), and the `Authorization` that answers it.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use http_auth::parse_challenges;
use oci_distribution::errors::OciDistributionError;
use protocol::reference::Scheme;
use reqwest::header::{AUTHORIZATION, HeaderValue, WWW_AUTHENTICATE};
use reqwest::{Response, StatusCode, Url};
use serde::Deserialize;

use super::{BEARER_USER, Credentials, Registry};

/// What a registry asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Demand {
    /// User name and password.
    Basic,
    /// A token from this URL.
    Bearer(Url),
}

#[derive(Deserialize)]
struct TokenAnswer {
    token: Option<String>,
    access_token: Option<String>,
}

impl Registry {
    /// Sends what `make` makes, and once more with authorization if the registry asks for one.
    pub(super) async fn send(
        &self,
        make: impl Fn() -> Result<reqwest::RequestBuilder, OciDistributionError>,
    ) -> Result<Response, OciDistributionError> {
        let answer = self.send_once(make()?).await?;
        if answer.status() != StatusCode::UNAUTHORIZED {
            return Ok(answer);
        }
        let asked = answer.headers().get_all(WWW_AUTHENTICATE).iter();
        let asked: Vec<&str> = asked.filter_map(|value| value.to_str().ok()).collect();
        match self.authorize(&asked).await? {
            Some(value) => *self.authorization.write().await = Some(value),
            None => return Ok(answer),
        }
        self.send_once(make()?).await
    }

    async fn send_once(
        &self,
        request: reqwest::RequestBuilder,
    ) -> Result<Response, OciDistributionError> {
        let mut request = request.build()?;
        // Uploads may be sent elsewhere, which has no business with our secrets.
        if self.is_own(request.url())
            && let Some(value) = self.authorization.read().await.clone()
        {
            request.headers_mut().insert(AUTHORIZATION, value);
        }
        Ok(self.http.execute(request).await?)
    }

    fn is_own(&self, url: &Url) -> bool {
        Url::parse(&self.api("")).is_ok_and(|own| own.origin() == url.origin())
    }

    /// The value that answers the first demand that can be met; `None` where none can.
    async fn authorize(&self, asked: &[&str]) -> Result<Option<HeaderValue>, OciDistributionError> {
        let demands = asked.iter().flat_map(|value| demands(value));
        for demand in demands {
            match (demand, &self.known) {
                (_, Some(known)) if known.user == BEARER_USER => {
                    return Ok(secret(&format!("Bearer {}", known.password)));
                }
                (Demand::Basic, Some(known)) => return Ok(secret(&basic(known))),
                (Demand::Basic, None) => {}
                // Who speaks TLS to the registry does not tell the password to anybody without.
                (Demand::Bearer(url), Some(_))
                    if self.reference.scheme == Scheme::Https && url.scheme() != "https" => {}
                (Demand::Bearer(url), known) => {
                    let mut request = self.http.get(url);
                    if let Some(value) = known.as_ref().and_then(|known| secret(&basic(known))) {
                        request = request.header(AUTHORIZATION, value);
                    }
                    let answer = checked(request.send().await?, StatusCode::is_success).await?;
                    let answer: TokenAnswer = serde_json::from_slice(&answer.bytes().await?)
                        .map_err(|error| {
                            OciDistributionError::RegistryTokenDecodeError(error.to_string())
                        })?;
                    let token = answer.token.or(answer.access_token).unwrap_or_default();
                    return Ok(secret(&format!("Bearer {token}")));
                }
            }
        }
        Ok(None)
    }
}

/// The answer, unless its status is another one than expected.
pub(super) async fn checked(
    answer: Response,
    good: impl Fn(&StatusCode) -> bool,
) -> Result<Response, OciDistributionError> {
    if good(&answer.status()) {
        return Ok(answer);
    }
    let (code, url) = (answer.status().as_u16(), answer.url().to_string());
    let message = answer.text().await.unwrap_or_default();
    let message = match serde_json::from_str::<Envelope>(&message) {
        Ok(envelope) => envelope.to_string(),
        Err(_) => message.chars().take(200).collect(),
    };
    Err(OciDistributionError::ServerError { code, url, message })
}

/// The body of an error (OCI distribution specification, "Error Codes").
#[derive(Deserialize)]
struct Envelope {
    errors: Vec<EnvelopeError>,
}

#[derive(Deserialize)]
struct EnvelopeError {
    code: String,
    #[serde(default)]
    message: String,
}

impl std::fmt::Display for Envelope {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let say = |error: &EnvelopeError| format!("{} ({})", error.message, error.code);
        let errors: Vec<String> = self.errors.iter().map(say).collect();
        f.write_str(&errors.join("; "))
    }
}

fn basic(known: &Credentials) -> String {
    format!("Basic {}", STANDARD.encode(format!("{}:{}", known.user, known.password)))
}

/// A header's value that is shown nowhere.
fn secret(text: &str) -> Option<HeaderValue> {
    let mut value = HeaderValue::from_str(text).ok()?;
    value.set_sensitive(true);
    Some(value)
}

/// What a header's value demands, in its order. Schemes that are not known here are left out.
fn demands(value: &str) -> Vec<Demand> {
    let mut demands = Vec::new();
    for challenge in parse_challenges(value).unwrap_or_default() {
        if challenge.scheme.eq_ignore_ascii_case("basic") {
            demands.push(Demand::Basic);
        }
        if challenge.scheme.eq_ignore_ascii_case("bearer") {
            let param = |name: &str| {
                let found = challenge.params.iter().find(|(key, _)| key.eq_ignore_ascii_case(name));
                found.map(|(_, value)| value.to_unescaped())
            };
            let Some(mut url) = param("realm").and_then(|realm| Url::parse(&realm).ok()) else {
                continue;
            };
            if let Some(service) = param("service") {
                url.query_pairs_mut().append_pair("service", &service);
            }
            // A mount from another repository asks for two.
            for scope in param("scope").unwrap_or_default().split_ascii_whitespace() {
                url.query_pairs_mut().append_pair("scope", scope);
            }
            demands.push(Demand::Bearer(url));
        }
    }
    demands
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn demands_are_read() {
        let token = r#"Bearer realm="https://a.example/t?x=1",service="r",scope="repository:a/b:pull,push repository:c:pull",error="y""#;
        let [Demand::Bearer(url)] = &demands(token)[..] else { panic!("no bearer") };
        assert_eq!(
            url.as_str(),
            "https://a.example/t?x=1&service=r&scope=repository%3Aa%2Fb%3Apull%2Cpush&scope=repository%3Ac%3Apull"
        );
        assert_eq!(demands(r#"Basic realm="x""#), [Demand::Basic]);
        for other in ["", "Negotiate", "Bearer service=\"x\"", "Bearer realm=\"no url\"", "\"\""] {
            assert_eq!(demands(other), [], "{other}");
        }
    }

    #[test]
    fn a_secret_shows_nowhere() {
        let value = secret(&basic(&Credentials::new("ann", "pass"))).expect("value");
        assert_eq!(value.to_str().expect("text"), "Basic YW5uOnBhc3M=");
        assert!(!format!("{value:?}").contains("YW5u"));
    }
}
