//! From a request's method, path, query and body to what is asked for, or the error that answers it. Pure.

use super::error::ApiError;
use super::schema::{self, ASKED_STATES, ATTACH_KINDS, MOUNT_KINDS, Pattern, STATES};
use super::types::{Attach, AttachKind, Container, Mount, MountKind, State};

/// What every path begins with.
pub const BASE_PATH: &str = "/imageapi/v1";
/// Largest body of a request, in bytes.
pub const MAX_BODY: usize = 1 << 20;

/// Which container is meant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Which {
    /// By its number.
    Id(i64),
    /// By its name.
    Name(String),
}

/// What is asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Call {
    /// `GET /attach`
    ListAttachments {
        /// Only this one.
        id: Option<i64>,
        /// Only of this kind.
        kind: Option<AttachKind>,
    },
    /// `POST /attach`
    Attach(Box<Attach>),
    /// `DELETE /attach`
    Detach {
        /// Which.
        id: i64,
        /// Although somebody holds it.
        force: bool,
    },
    /// `GET /mount`
    ListMounts {
        /// Only this one.
        id: Option<i64>,
        /// Only of this kind.
        kind: Option<MountKind>,
    },
    /// `POST /mount`
    Mount(Box<Mount>),
    /// `DELETE /mount`
    Unmount {
        /// Which.
        id: i64,
        /// Although somebody holds it.
        force: bool,
    },
    /// `GET /container`
    ListContainers {
        /// Only this one.
        which: Option<Which>,
        /// Only in this state.
        state: Option<State>,
    },
    /// `POST /container`
    Create(Box<Container>),
    /// `DELETE /container`
    Delete {
        /// Which.
        which: Which,
        /// Although it runs.
        force: bool,
    },
    /// `PATCH /container`
    SetState {
        /// Which.
        which: Which,
        /// Whether it should run.
        run: bool,
    },
}

/// A request as it came.
#[derive(Debug, Clone, Copy)]
pub struct Request<'a> {
    /// `GET`
    pub method: &'a str,
    /// `/imageapi/v1/mount`
    pub path: &'a str,
    /// What stands behind the `?`, else empty.
    pub query: &'a str,
    /// The header of this name.
    pub accept: Option<&'a str>,
    /// The body.
    pub body: &'a [u8],
}

/// What a request asks for, and the fields of its body that nobody knows.
///
/// # Errors
/// The answer: 404 for the path, 405 for the method, 406 for the answer's type, 400 and 422 for query and body.
pub fn read(request: &Request<'_>) -> Result<(Call, Vec<String>), ApiError> {
    let (thing, allowed): (_, &[&str]) = match request.path.strip_prefix(BASE_PATH) {
        Some("/attach") => ("attach", &["DELETE", "GET", "POST"]),
        Some("/mount") => ("mount", &["DELETE", "GET", "POST"]),
        Some("/container") => ("container", &["DELETE", "GET", "PATCH", "POST"]),
        _ => return Err(ApiError::no_path(request.path)),
    };
    if !allowed.contains(&request.method) {
        return Err(ApiError::no_method(request.method, allowed));
    }
    if !request.accept.is_none_or(takes_json) {
        return Err(ApiError::not_acceptable());
    }
    let query = Query::parse(request.query);
    let call = match (thing, request.method) {
        ("attach", "GET") => {
            Call::ListAttachments { id: query.id()?, kind: query.word("kind", ATTACH_KINDS)? }
        }
        ("attach", "POST") => {
            let (attach, unknown) = schema::read(&schema::ATTACH, request.body)?;
            return Ok((Call::Attach(Box::new(attach)), unknown));
        }
        ("attach", _) => Call::Detach { force: query.flag("force"), id: query.needed_id()? },
        ("mount", "GET") => {
            Call::ListMounts { id: query.id()?, kind: query.word("kind", MOUNT_KINDS)? }
        }
        ("mount", "POST") => {
            let (mount, unknown) = schema::read(&schema::MOUNT, request.body)?;
            return Ok((Call::Mount(Box::new(mount)), unknown));
        }
        ("mount", _) => Call::Unmount { force: query.flag("force"), id: query.needed_id()? },
        (_, "GET") => {
            Call::ListContainers { which: query.which()?, state: query.word("state", STATES)? }
        }
        (_, "POST") => {
            let (container, unknown) = schema::read(&schema::CONTAINER, request.body)?;
            return Ok((Call::Create(Box::new(container)), unknown));
        }
        (_, "PATCH") => patch(&query)?,
        _ => Call::Delete { force: query.flag("force"), which: query.needed_which()? },
    };
    Ok((call, Vec::new()))
}

fn patch(query: &Query) -> Result<Call, ApiError> {
    let state = query.get("state").ok_or_else(|| ApiError::required_query("state"))?;
    if !ASKED_STATES.contains(&state) {
        return Err(ApiError::one_of("state", "query", ASKED_STATES));
    }
    let which = query.needed_which()?;
    match state {
        "running" => Ok(Call::SetState { which, run: true }),
        "exited" => Ok(Call::SetState { which, run: false }),
        _ => Err(ApiError::invalid("a container cannot be paused")),
    }
}

/// Whether a value of `Accept` lets JSON pass (RFC 9110, 12.5.1); weights are not looked at, but `q=0` is.
fn takes_json(accept: &str) -> bool {
    accept.trim().is_empty()
        || accept.split(',').any(|range| {
            let mut parts = range.split(';').map(str::trim);
            let kind = parts.next().unwrap_or_default().to_ascii_lowercase();
            let wanted = matches!(kind.as_str(), "*/*" | "application/*" | "application/json");
            wanted && !parts.any(|part| matches!(part, "q=0" | "q=0.0" | "q=0.00" | "q=0.000"))
        })
}

/// The parameters behind the `?`. Of several with one name the last counts; an empty value counts as none.
#[derive(Debug)]
struct Query(Vec<(String, String)>);

impl Query {
    fn parse(query: &str) -> Self {
        let pairs = query.split('&').filter(|pair| !pair.is_empty()).map(|pair| {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            (decoded(key), decoded(value))
        });
        Self(pairs.collect())
    }

    fn get(&self, name: &str) -> Option<&str> {
        let pair = self.0.iter().rev().find(|(key, _)| key == name)?;
        Some(pair.1.as_str()).filter(|value| !value.is_empty())
    }

    fn id(&self) -> Result<Option<i64>, ApiError> {
        let number =
            |value: &str| value.parse().map_err(|_| ApiError::query_type("id", "int64", value));
        self.get("id").map(number).transpose()
    }

    fn needed_id(&self) -> Result<i64, ApiError> {
        self.id()?.ok_or_else(|| ApiError::required_query("id"))
    }

    /// What Go's swag takes for true; all else is false.
    fn flag(&self, name: &str) -> bool {
        let value = self.get(name).unwrap_or_default().to_ascii_lowercase();
        let truths = ["true", "1", "yes", "ok", "y", "on", "selected", "checked", "t", "enabled"];
        truths.contains(&value.as_str())
    }

    /// A word of an enumeration, as the type that serde makes of it.
    fn word<T: serde::de::DeserializeOwned>(
        &self,
        name: &str,
        words: &[&str],
    ) -> Result<Option<T>, ApiError> {
        let Some(value) = self.get(name) else { return Ok(None) };
        let wrong = || ApiError::one_of(name, "query", words);
        if !words.contains(&value) {
            return Err(wrong());
        }
        serde_json::from_value(serde_json::Value::from(value)).map(Some).map_err(|_| wrong())
    }

    /// The number goes before the name.
    fn which(&self) -> Result<Option<Which>, ApiError> {
        if let Some(id) = self.id()? {
            return Ok(Some(Which::Id(id)));
        }
        match self.get("name") {
            Some(name) if !Pattern::Name.matches(name) => {
                Err(ApiError::pattern("name", "query", Pattern::Name))
            }
            name => Ok(name.map(|name| Which::Name(name.to_owned()))),
        }
    }

    fn needed_which(&self) -> Result<Which, ApiError> {
        self.which()?.ok_or_else(|| ApiError::invalid("neither id nor name is given"))
    }
}

/// A part of a query as text: `+` is a space, `%XX` a byte; what is malformed stays as it is.
fn decoded(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((first, tail)) = rest.split_first() {
        let hex = |byte: Option<&u8>| {
            byte.and_then(|byte| char::from(*byte).to_digit(16))
                .and_then(|digit| u8::try_from(digit).ok())
        };
        match (first, hex(tail.first()), hex(tail.get(1))) {
            (b'%', Some(high), Some(low)) => {
                bytes.push(high << 4 | low);
                rest = tail.get(2..).unwrap_or_default();
                continue;
            }
            (b'+', ..) => bytes.push(b' '),
            (other, ..) => bytes.push(*other),
        }
        rest = tail;
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Reads a request from arbitrary bytes, `METHOD PATH QUERY` on the first line and the body behind it: for fuzzing.
pub fn fuzz_request(bytes: &[u8]) {
    let end = bytes.iter().position(|byte| *byte == b'\n').unwrap_or(bytes.len());
    let (head, body) = bytes.split_at(end);
    let head = String::from_utf8_lossy(head);
    let mut words = head.splitn(3, ' ');
    let mut next = || words.next().unwrap_or_default();
    let (method, path, query) = (next(), next(), next());
    // An error is as good an answer as any.
    let _ = read(&Request { method, path, query, accept: None, body });
}

#[cfg(test)]
mod tests;
