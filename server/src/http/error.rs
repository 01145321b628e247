//! The error bodies of the API: one form for every failure.

use axum::Json;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use protocol::api::{ErrorBody, ErrorDetail};

use crate::inventory::InventoryError;
use crate::sources::SourceError;
use crate::storage::StorageError;

/// A failure, as the API answers it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ApiError {
    status: StatusCode,
    code: &'static str,
    message: String,
}

impl ApiError {
    /// A failure of this status, with a stable word for programs and a sentence for people.
    #[must_use]
    pub fn new(status: StatusCode, code: &'static str, message: impl Into<String>) -> Self {
        Self { status, code, message: message.into() }
    }

    /// The request is malformed.
    #[must_use]
    pub fn bad_request(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "malformed", message)
    }

    /// There is no such thing.
    pub fn not_found(message: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND, "not_found", message)
    }

    /// Something inside failed.
    #[must_use]
    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "internal", message)
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        if self.status.is_server_error() {
            tracing::error!(code = self.code, "{}", self.message);
        } else {
            tracing::debug!(code = self.code, "{}", self.message);
        }
        let error = ErrorDetail { code: self.code.to_owned(), message: self.message };
        (self.status, Json(ErrorBody { error })).into_response()
    }
}

/// An error and everything under it, in one line.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut inner = error.source();
    while let Some(source) = inner {
        text.push_str(": ");
        text.push_str(&source.to_string());
        inner = source.source();
    }
    text
}

impl From<InventoryError> for ApiError {
    fn from(error: InventoryError) -> Self {
        use InventoryError as E;
        let (status, code) = match &error {
            E::UnknownNodes(_) | E::NoNodes | E::Unregistered(_) => {
                (StatusCode::NOT_FOUND, "node_not_found")
            }
            E::NoSuchSet { .. } => (StatusCode::NOT_FOUND, "imageset_not_found"),
            E::NothingBefore { .. } => (StatusCode::CONFLICT, "nothing_before"),
            E::UnknownRoll(_) => (StatusCode::NOT_FOUND, "roll_not_found"),
            E::NotInLayer0(_) => (StatusCode::CONFLICT, "not_in_layer0"),
            E::NotReported(_) => (StatusCode::CONFLICT, "not_reported"),
            E::OtherNode { .. } => (StatusCode::BAD_REQUEST, "other_node"),
            E::Protocol(_) => (StatusCode::BAD_REQUEST, "protocol"),
            E::Crowded => (StatusCode::INSUFFICIENT_STORAGE, "crowded"),
            E::Storage(StorageError::Full) => (StatusCode::INSUFFICIENT_STORAGE, "disk_full"),
            E::Storage(_) => (StatusCode::INTERNAL_SERVER_ERROR, "storage"),
        };
        Self::new(status, code, chain(&error))
    }
}

impl From<SourceError> for ApiError {
    fn from(error: SourceError) -> Self {
        use SourceError as E;
        let (status, code) = match &error {
            E::NotFound(_) => (StatusCode::NOT_FOUND, "imageset_not_found"),
            E::NotAnImageSet { .. } | E::Nameless(_) | E::Reference(_) => {
                (StatusCode::UNPROCESSABLE_ENTITY, "not_an_imageset")
            }
            E::Remote(_) | E::NoCatalog { .. } | E::TooMany(_) => {
                (StatusCode::BAD_GATEWAY, "registry")
            }
            E::External(_) => (StatusCode::NOT_IMPLEMENTED, "external_registry"),
            E::Embedded(_) | E::Task(_) => (StatusCode::INTERNAL_SERVER_ERROR, "registry"),
        };
        Self::new(status, code, chain(&error))
    }
}
