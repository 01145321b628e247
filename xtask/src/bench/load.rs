//! Load on a registry by HTTP/1.1 over plain sockets: streams that read blobs for a while, and pushes from files. It does as
//! little as it can (large buffers, sendfile(2)), so that what is measured is the server.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

/// Bytes read at a time.
const BUFFER: usize = 256 << 10;
/// The longest that a server may say nothing.
const SILENCE: Duration = Duration::from_secs(60);

/// An answer's head.
#[derive(Debug, PartialEq, Eq)]
struct Head {
    status: u16,
    length: u64,
    location: Option<String>,
}

fn connect(address: &str) -> Result<BufReader<TcpStream>> {
    let stream = TcpStream::connect(address).with_context(|| address.to_owned())?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(SILENCE))?;
    Ok(BufReader::with_capacity(BUFFER, stream))
}

fn head(input: &mut impl BufRead) -> Result<Head> {
    let mut line = String::new();
    input.read_line(&mut line)?;
    let status = line.split(' ').nth(1).and_then(|status| status.parse().ok());
    let mut head = Head {
        status: status.with_context(|| format!("no answer: {line}"))?,
        length: 0,
        location: None,
    };
    loop {
        line.clear();
        input.read_line(&mut line)?;
        let Some((name, value)) = line.trim().split_once(':') else { return Ok(head) };
        if name.eq_ignore_ascii_case("content-length") {
            head.length = value.trim().parse().with_context(|| line.clone())?;
        } else if name.eq_ignore_ascii_case("location") {
            head.location = Some(value.trim().to_owned());
        }
    }
}

/// Reads over a body.
fn drain(input: &mut BufReader<TcpStream>, length: u64) -> Result<()> {
    let mut left = length;
    while left > 0 {
        // The reader's own buffer: nothing is copied a second time.
        let count = input.fill_buf()?.len();
        ensure!(count > 0, "the body broke off");
        let step = usize::try_from(left).unwrap_or(usize::MAX).min(count);
        input.consume(step);
        left -= step as u64;
    }
    Ok(())
}

/// Reads these paths round and round with this many connections for a while; bytes a second of all of them.
///
/// # Errors
/// When a stream fails, or a path is not there.
pub(super) fn read(address: &str, paths: &[String], streams: usize, time: Duration) -> Result<f64> {
    let (bytes, over) = (AtomicU64::new(0), AtomicBool::new(false));
    let stream = |first: usize| -> Result<()> {
        let mut input = connect(address)?;
        for path in paths.iter().cycle().skip(first % paths.len().max(1)) {
            write!(input.get_mut(), "GET {path} HTTP/1.1\r\nHost: {address}\r\n\r\n")?;
            let head = head(&mut input)?;
            ensure!(head.status == 200, "{path}: status {}", head.status);
            let mut left = head.length;
            while left > 0 {
                let step = left.min(4 << 20);
                drain(&mut input, step)?;
                left -= step;
                if over.load(Ordering::Relaxed) {
                    return Ok(());
                }
                bytes.fetch_add(step, Ordering::Relaxed);
            }
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let begun = Instant::now();
        let running: Vec<_> =
            (0..streams).map(|first| scope.spawn(move || stream(first))).collect();
        while begun.elapsed() < time && running.iter().all(|it| !it.is_finished()) {
            std::thread::sleep(Duration::from_millis(5));
        }
        let rate = bytes.load(Ordering::Relaxed) as f64 / begun.elapsed().as_secs_f64();
        over.store(true, Ordering::Relaxed);
        for stream in running {
            stream.join().map_err(|_| anyhow::anyhow!("a stream panicked"))??;
        }
        Ok(rate)
    })
}

/// Pushes these blobs, `(hex, file)`, to a repository one after the other, each in one piece; bytes a second.
///
/// # Errors
/// When the registry refuses one.
pub(super) fn push(address: &str, repository: &str, blobs: &[(String, PathBuf)]) -> Result<f64> {
    let begun = Instant::now();
    let mut bytes = 0;
    for (hex, path) in blobs {
        let mut file = File::open(path).with_context(|| path.display().to_string())?;
        let size = file.metadata()?.len();
        let mut input = connect(address)?;
        let post = format!(
            "POST /v2/{repository}/blobs/uploads/ HTTP/1.1\r\nHost: {address}\r\nContent-Length: 0\r\n\r\n"
        );
        input.get_mut().write_all(post.as_bytes())?;
        let begun = head(&mut input)?;
        drain(&mut input, begun.length)?;
        let location = begun.location.filter(|_| begun.status == 202);
        let location =
            location.with_context(|| format!("an upload began with {}", begun.status))?;
        let path_only = location.strip_prefix(&format!("http://{address}")).unwrap_or(&location);
        let mark = if path_only.contains('?') { '&' } else { '?' };
        let put = format!(
            "PUT {path_only}{mark}digest=sha256:{hex} HTTP/1.1\r\nHost: {address}\r\nContent-Type: application/octet-stream\r\n\
             Content-Length: {size}\r\n\r\n"
        );
        input.get_mut().write_all(put.as_bytes())?;
        // From file to socket the kernel copies by itself.
        ensure!(io::copy(&mut file, input.get_mut())? == size, "the file became shorter");
        let done = head(&mut input)?;
        if done.status != 201 {
            let mut said = String::new();
            input.take(done.length.min(1000)).read_to_string(&mut said)?;
            bail!("the upload of {hex} ended with {}: {said}", done.status);
        }
        bytes += size;
    }
    Ok(bytes as f64 / begun.elapsed().as_secs_f64())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heads_are_read_whatever_the_case_of_their_names() {
        let text = b"HTTP/1.1 202 Accepted\r\nLocation: /v2/a/blobs/uploads/x?s=1\r\ncontent-length: 7\r\n\r\nbody";
        let mut input = &text[..];
        let expected =
            Head { status: 202, length: 7, location: Some("/v2/a/blobs/uploads/x?s=1".to_owned()) };
        assert_eq!(head(&mut input).expect("head"), expected);
        assert_eq!(input, b"body");
        assert!(head(&mut &b"nonsense\r\n\r\n"[..]).is_err());
        assert!(head(&mut &b""[..]).is_err());
    }
}
