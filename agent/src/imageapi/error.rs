//! Errors of the ImageAPI: an HTTP status, a code and a sentence, in the shapes that its clients know.
//!
//! Codes from 601 on are of a request's content and come with 422; the sentences of this kind are those of go-openapi's
//! `errors` package. The others are the HTTP status itself, and begin with the reference's own words.

use super::schema::Pattern;
use super::types::ErrorBody;

/// Longest message, in bytes: a body's own text may stand in it.
const MAX_MESSAGE: usize = 1000;

/// An answer that is an error.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct ApiError {
    /// The HTTP status.
    pub status: u16,
    /// The code in the body.
    pub code: i64,
    /// One sentence.
    pub message: String,
}

impl ApiError {
    fn new(status: u16, code: i64, message: impl Into<String>) -> Self {
        let mut message: String = message.into();
        if message.len() > MAX_MESSAGE {
            let end = (0..=MAX_MESSAGE).rev().find(|at| message.is_char_boundary(*at));
            message.truncate(end.unwrap_or_default());
            message.push('…');
        }
        Self { status, code, message }
    }

    /// The answer's body.
    #[must_use]
    pub fn body(&self) -> ErrorBody {
        ErrorBody { code: self.code, message: self.message.clone() }
    }

    /// The body is no such JSON.
    pub(super) fn unreadable(reason: &dyn std::fmt::Display) -> Self {
        let message = format!("parsing body body from \"\" failed, because {reason}");
        Self::new(400, 400, message)
    }

    /// A field of the body is missing.
    pub(super) fn required(path: &str) -> Self {
        Self::new(422, 602, format!("{path} in body is required"))
    }

    /// A parameter of the query is missing.
    pub(super) fn required_query(name: &str) -> Self {
        Self::new(422, 602, format!("{name} in query is required"))
    }

    /// A parameter of the query is not of its type.
    pub(super) fn query_type(name: &str, kind: &str, value: &str) -> Self {
        Self::new(422, 601, format!("{name} in query must be of type {kind}: {value:?}"))
    }

    /// A text is empty that must not be.
    pub(super) fn too_short(path: &str) -> Self {
        Self::new(422, 604, format!("{path} in body should be at least 1 chars long"))
    }

    /// A text does not match its pattern.
    pub(super) fn pattern(path: &str, place: &str, pattern: Pattern) -> Self {
        Self::new(422, 605, format!("{path} in {place} should match '{}'", pattern.text()))
    }

    /// A word is none of an enumeration's.
    pub(super) fn one_of(path: &str, place: &str, words: &[&str]) -> Self {
        let words = words.join(" ");
        Self::new(422, 606, format!("{path} in {place} should be one of [{words}]"))
    }

    /// A field that only answers have.
    pub(super) fn read_only(path: &str) -> Self {
        Self::new(422, 619, format!("{path} in body is readOnly"))
    }

    /// No such path.
    pub(super) fn no_path(path: &str) -> Self {
        Self::new(404, 404, format!("path {path} was not found"))
    }

    /// No such method here.
    pub(super) fn no_method(method: &str, allowed: &[&str]) -> Self {
        let allowed = allowed.join(",");
        Self::new(405, 405, format!("method {method} is not allowed, but [{allowed}] are"))
    }

    /// The client takes no JSON.
    pub(super) fn not_acceptable() -> Self {
        let message = "unsupported media type requested, only [application/json] are available";
        Self::new(406, 406, message)
    }

    /// The body is larger than any request's.
    pub(super) fn too_large(limit: usize) -> Self {
        Self::new(413, 413, format!("the body is larger than {limit} bytes"))
    }

    /// What is asked for makes no sense.
    pub(super) fn invalid(detail: impl std::fmt::Display) -> Self {
        Self::new(400, 400, format!("invalid data type: {detail}"))
    }

    /// There is no such object.
    pub(super) fn not_found(what: impl std::fmt::Display) -> Self {
        Self::new(404, 404, format!("not found: {what}"))
    }

    /// Somebody needs it.
    pub(super) fn busy(detail: impl std::fmt::Display) -> Self {
        Self::new(409, 409, format!("object is busy: {detail}"))
    }

    /// The kernel, a server or a file did not do its part.
    pub(super) fn failed(detail: impl std::fmt::Display) -> Self {
        Self::new(500, 500, format!("operation failed: {detail}"))
    }

    /// The request cannot be done as it stands.
    pub(super) fn internal(detail: impl std::fmt::Display) -> Self {
        Self::new(500, 500, format!("internal server error: {detail}"))
    }

    /// Nobody can do that kind.
    pub(super) fn no_driver(detail: impl std::fmt::Display) -> Self {
        Self::new(501, 501, format!("no driver found for this object type: {detail}"))
    }
}
