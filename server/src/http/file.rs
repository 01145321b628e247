//! Files over HTTP: whole or one byte range (RFC 9110, section 14), streamed, with a call when the last byte has been
//! handed to the connection.

use std::io::SeekFrom;
use std::path::Path;

use axum::body::Body;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use futures_util::TryStreamExt;
use tokio::fs::File;
use tokio::io::{AsyncReadExt, AsyncSeekExt};
use tokio_util::io::ReaderStream;

use super::ApiError;

/// Bytes read and sent at a time. Large, because a boot image is sent to many nodes at once.
const BUFFER_BYTES: usize = 1 << 20;

/// The part of a file that a request asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// All of it.
    Whole,
    /// From the first to the last of these offsets, both included.
    Range(u64, u64),
    /// Something that lies outside of it.
    Outside,
}

/// Reads a `Range` header for a file of this size. What is no single byte range counts as absent, as RFC 9110 allows.
#[must_use]
pub fn parse_range(header: Option<&str>, size: u64) -> Part {
    let spec = header.and_then(|header| header.trim().strip_prefix("bytes="));
    let Some((from, to)) = spec.and_then(|spec| spec.trim().split_once('-')) else {
        return Part::Whole;
    };
    match (from.parse::<u64>(), to.parse::<u64>()) {
        (Ok(from), Ok(to)) if from <= to => within(from, to, size),
        (Ok(from), Err(_)) if to.is_empty() => within(from, u64::MAX, size),
        (Err(_), Ok(count)) if from.is_empty() => match size.checked_sub(1) {
            Some(last) if count > 0 => Part::Range(size.saturating_sub(count), last),
            _ => Part::Outside,
        },
        _ => Part::Whole,
    }
}

fn within(from: u64, to: u64, size: u64) -> Part {
    if from >= size { Part::Outside } else { Part::Range(from, to.min(size - 1)) }
}

/// Answers with a file. `sent` is called once, when its last byte has been handed over.
pub(super) async fn answer(
    path: &Path,
    headers: &HeaderMap,
    sent: impl FnOnce() + Send + 'static,
) -> Result<Response, ApiError> {
    let fail = |error: &std::io::Error| {
        let what = path.display();
        match error.kind() {
            std::io::ErrorKind::NotFound => {
                ApiError::new(StatusCode::NOT_FOUND, "no_file", format!("{what} does not exist"))
            }
            _ => ApiError::internal(format!("{what} could not be read: {error}")),
        }
    };
    let mut file = File::open(path).await.map_err(|error| fail(&error))?;
    let size = file.metadata().await.map_err(|error| fail(&error))?.len();
    let range = headers.get(header::RANGE).and_then(|range| range.to_str().ok());
    let (status, start, count) = match parse_range(range, size) {
        Part::Whole => (StatusCode::OK, 0, size),
        Part::Range(first, last) => (StatusCode::PARTIAL_CONTENT, first, last - first + 1),
        Part::Outside => {
            let span = [(header::CONTENT_RANGE, format!("bytes */{size}"))];
            return Ok((StatusCode::RANGE_NOT_SATISFIABLE, span).into_response());
        }
    };
    file.seek(SeekFrom::Start(start)).await.map_err(|error| fail(&error))?;
    let (mut at, mut sent) = (start, Some(sent));
    let stream = ReaderStream::with_capacity(file.take(count), BUFFER_BYTES);
    let stream = stream.inspect_ok(move |chunk| {
        at += chunk.len() as u64;
        if at == size
            && let Some(sent) = sent.take()
        {
            sent();
        }
    });
    let mut response = Body::from_stream(stream).into_response();
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_LENGTH, count.into());
    headers.insert(header::ACCEPT_RANGES, header::HeaderValue::from_static("bytes"));
    let octets = header::HeaderValue::from_static("application/octet-stream");
    headers.insert(header::CONTENT_TYPE, octets);
    if status == StatusCode::PARTIAL_CONTENT {
        let span = format!("bytes {start}-{}/{size}", start + count - 1);
        let span = header::HeaderValue::try_from(span)
            .map_err(|error| ApiError::internal(error.to_string()))?;
        headers.insert(header::CONTENT_RANGE, span);
    }
    Ok(response)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_read_as_rfc_9110_says() {
        for (header, expected) in [
            (None, Part::Whole),
            (Some("bytes=0-0"), Part::Range(0, 0)),
            (Some("bytes=2-5"), Part::Range(2, 5)),
            (Some("bytes=2-99"), Part::Range(2, 9)),
            (Some("bytes=4-"), Part::Range(4, 9)),
            (Some("bytes=-3"), Part::Range(7, 9)),
            (Some("bytes=-30"), Part::Range(0, 9)),
            (Some("bytes=10-"), Part::Outside),
            (Some("bytes=-0"), Part::Outside),
            (Some("bytes=5-2"), Part::Whole),
            (Some("bytes=0-1,3-4"), Part::Whole),
            (Some("lines=0-1"), Part::Whole),
            (Some("bytes=x-y"), Part::Whole),
            (Some("bytes=-"), Part::Whole),
            (Some("bytes=10-12"), Part::Outside),
        ] {
            assert_eq!(parse_range(header, 10), expected, "{header:?}");
        }
        assert_eq!(parse_range(Some("bytes=-1"), 0), Part::Outside);
    }

    proptest::proptest! {
        #[test]
        fn a_range_never_leaves_the_file(from: u64, to: u64, odd in ".*", size in 0..50_u64) {
            for header in [
                format!("bytes={from}-{to}"),
                format!("bytes={}-{}", from % 60, to % 60),
                format!("bytes={}-", from % 60),
                format!("bytes=-{}", to % 60),
                format!("bytes={odd}"),
                odd,
            ] {
                if let Part::Range(first, last) = parse_range(Some(&header), size) {
                    proptest::prop_assert!(first <= last && last < size, "{header}: {first}-{last}");
                }
            }
        }
    }
}
