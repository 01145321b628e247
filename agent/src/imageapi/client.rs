//! `layercake-agent api`: one request of the ImageAPI over its Unix socket, for people in a shell on the node, where there is
//! no curl.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use super::route::BASE_PATH;

/// Largest answer that is read, in bytes.
const MAX_ANSWER: u64 = 64 << 20;
/// Longest line of an answer's head, in bytes, and most lines.
const MAX_LINE: u64 = 16 << 10;
const MAX_HEADERS: usize = 100;

/// One request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ApiOptions {
    /// The socket.
    pub socket: PathBuf,
    /// `GET`
    pub method: String,
    /// `/mount?id=1`, with or without the base path before it.
    pub target: String,
    /// JSON; none is sent when absent.
    pub body: Option<String>,
}

/// What came back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reply {
    /// The HTTP status.
    pub status: u16,
    /// The header `Warning`, if there is one.
    pub warning: Option<String>,
    /// The body.
    pub body: String,
}

/// Asks and waits for the answer, however long that takes.
///
/// # Errors
/// A sentence, when there is no answer.
pub fn ask(options: &ApiOptions) -> Result<Reply, String> {
    let failed = |error: std::io::Error| no_answer(&options.socket, &error);
    let mut stream = UnixStream::connect(&options.socket).map_err(failed)?;
    stream.write_all(request(options)?.as_bytes()).map_err(failed)?;
    read_reply(BufReader::new(stream))
}

fn no_answer(socket: &Path, error: &std::io::Error) -> String {
    format!("{}: {error}; does an agent serve the ImageAPI there?", socket.display())
}

fn request(options: &ApiOptions) -> Result<String, String> {
    let ApiOptions { method, target, body, .. } = options;
    let path = target.strip_prefix(BASE_PATH).unwrap_or(target);
    let plain = |text: &str| text.bytes().all(|byte| byte.is_ascii_graphic());
    if !plain(method) || method.is_empty() || !plain(path) || !path.starts_with('/') {
        return Err(format!("`{method} {target}` is not of the form `GET /mount?id=1`"));
    }
    let method = method.to_ascii_uppercase();
    let mut head =
        format!("{method} {BASE_PATH}{path} HTTP/1.1\r\nhost: node\r\nconnection: close\r\n");
    if let Some(body) = body {
        head += &format!("content-type: application/json\r\ncontent-length: {}\r\n", body.len());
    }
    Ok(format!("{head}\r\n{}", body.as_deref().unwrap_or_default()))
}

/// Reads status, headers and the rest: the connection closes behind it.
fn read_reply(mut stream: impl BufRead) -> Result<Reply, String> {
    let mut line = || {
        let mut text = String::new();
        let read = stream.by_ref().take(MAX_LINE).read_line(&mut text);
        read.map_err(|error| format!("the answer broke off: {error}"))?;
        match text.strip_suffix('\n') {
            Some(line) => Ok(line.trim_end_matches('\r').to_owned()),
            None => Err("the answer broke off".to_owned()),
        }
    };
    let first = line()?;
    let status = first.split(' ').nth(1).and_then(|status| status.parse().ok());
    let status = status.ok_or_else(|| format!("`{first}` is no HTTP"))?;
    let mut warning = None;
    for _ in 0..MAX_HEADERS {
        let header = line()?;
        if header.is_empty() {
            break;
        }
        if let Some((name, value)) = header.split_once(':')
            && name.eq_ignore_ascii_case("warning")
        {
            warning = Some(value.trim().to_owned());
        }
    }
    let mut body = String::new();
    let read = stream.take(MAX_ANSWER).read_to_string(&mut body);
    read.map_err(|error| format!("the answer broke off: {error}"))?;
    Ok(Reply { status, warning, body })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(method: &str, target: &str, body: Option<&str>) -> ApiOptions {
        let (method, target) = (method.to_owned(), target.to_owned());
        ApiOptions { socket: PathBuf::new(), method, target, body: body.map(str::to_owned) }
    }

    #[test]
    fn a_request_has_the_base_path_once_and_a_length() {
        let head = "connection: close\r\n";
        for target in ["/mount?id=1", "/imageapi/v1/mount?id=1"] {
            let text = request(&options("get", target, None)).expect("request");
            assert!(text.starts_with("GET /imageapi/v1/mount?id=1 HTTP/1.1\r\n"), "{text}");
            assert!(text.ends_with(&format!("{head}\r\n")), "{text}");
        }
        let text = request(&options("POST", "/mount", Some("{}"))).expect("request");
        assert!(text.ends_with("content-length: 2\r\n\r\n{}"), "{text}");
        for (method, target) in [("", "/x"), ("GET", "x"), ("GET", "/a b"), ("G\r\n", "/x")] {
            assert!(request(&options(method, target, None)).is_err(), "{method} {target}");
        }
    }

    #[test]
    fn a_reply_is_its_status_its_warning_and_its_body() {
        let text = "HTTP/1.1 201 Created\r\nWarning: 299 x\r\ncontent-length: 2\r\n\r\n{}";
        let reply = read_reply(text.as_bytes()).expect("reply");
        assert_eq!((reply.status, reply.warning.as_deref()), (201, Some("299 x")));
        assert_eq!(reply.body, "{}");
        for bad in ["", "HTTP/1.1 200 OK\r\n", "junk\r\n\r\n", "HTTP/1.1 200 OK\r\nx"] {
            assert!(read_reply(bad.as_bytes()).is_err(), "{bad}");
        }
    }
}
