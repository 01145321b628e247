//! A blob as one uninterrupted stream: reconnects where the connection broke, counts, hashes, and stops at the declared
//! size plus one byte.
//!
//! What goes wrong is kept as a [`PullError`] and taken out by [`Source::finish`]; whoever reads in between only sees
//! that the stream failed.

use std::cell::Cell;
use std::io::{self, Read};
use std::rc::Rc;
use std::sync::atomic::Ordering;

use protocol::ids::Digest;
use sha2::{Digest as _, Sha256};

use super::{Job, Progress, PullError, Retry, chain};
use crate::cache::Writer;
use crate::registry::{Registry, Whence};

/// Most connections for one blob, however much progress each of them makes.
const MAX_CONNECTIONS: u32 = 256;
/// Buffer for reading what the unpacker left, in bytes.
const DRAIN_BYTES: usize = 64 << 10;

/// A blob being received.
pub(super) struct Source<'a> {
    registry: &'a Registry,
    job: &'a Job,
    retry: &'a Retry,
    stop: &'a dyn Fn() -> bool,
    progress: &'a Progress,
    body: Option<Box<dyn Read + Send>>,
    /// Who gives the body, or gave the last one.
    whence: Whence,
    /// Who gave bytes so far, beside the registry itself.
    givers: Vec<Whence>,
    /// Bytes received; shared with the ratio guard behind the decompressor.
    position: Rc<Cell<u64>>,
    /// Bytes that came over the network.
    fetched: u64,
    /// Takes the bytes into the node's cache, from the first one on.
    kept: Option<Writer>,
    /// Failures since the last byte.
    failures: u32,
    connections: u32,
    hash: Sha256,
    /// Whether the byte behind the last was asked for and there was none.
    ended: bool,
    fault: Option<PullError>,
}

impl<'a> Source<'a> {
    pub(super) fn new(
        registry: &'a Registry,
        job: &'a Job,
        retry: &'a Retry,
        stop: &'a dyn Fn() -> bool,
        progress: &'a Progress,
    ) -> Self {
        Self {
            registry,
            job,
            retry,
            stop,
            progress,
            body: None,
            whence: Whence::Origin,
            givers: Vec::new(),
            position: Rc::default(),
            fetched: 0,
            kept: None,
            failures: 0,
            connections: 0,
            hash: Sha256::new(),
            ended: false,
            fault: None,
        }
    }

    /// Bytes received so far, counted on while the stream is read.
    pub(super) fn received(&self) -> Rc<Cell<u64>> {
        Rc::clone(&self.position)
    }

    /// Reads what is left and says whether the whole blob came and has its digest.
    pub(super) fn finish(&mut self) -> Result<(), PullError> {
        let mut rest = vec![0; DRAIN_BYTES];
        while self.fault.is_none() && !self.ended {
            // The error, if there is one, is in `fault`.
            let _ = self.read(&mut rest);
        }
        if let Some(fault) = self.fault.take() {
            return Err(fault);
        }
        let found = Digest(self.hash.clone().finalize().into());
        if found == self.job.digest {
            if let Some(kept) = self.kept.take() {
                kept.commit();
            }
            return Ok(());
        }
        let error = PullError::Digest { url: self.url(), expected: self.job.digest, found };
        // Which of them it was cannot be told: none of them is asked again.
        for giver in std::mem::take(&mut self.givers) {
            self.registry.leave(giver, &self.job.digest, &error);
        }
        Err(error)
    }

    /// Takes the received bytes out of the progress: they will come again.
    pub(super) fn withdraw(&self) {
        self.progress.bytes.fetch_sub(self.position.get(), Ordering::Relaxed);
    }

    fn url(&self) -> String {
        self.registry.blob_url_at(self.whence, &self.job.digest)
    }

    /// Leaves who gave the body, unless that is the registry itself.
    fn leave(&self, why: &dyn std::error::Error) -> bool {
        self.registry.leave(self.whence, &self.job.digest, why)
    }

    /// Bytes that came over the network.
    pub(super) fn fetched(&self) -> u64 {
        self.fetched
    }

    fn fail(&mut self, fault: PullError) -> io::Error {
        let text = fault.to_string();
        self.body = None;
        self.fault.get_or_insert(fault);
        io::Error::other(text)
    }

    /// Leaves a mirror that broke off; else counts it, and pauses unless it was one too many.
    fn broke(&mut self, source: io::Error) -> io::Result<()> {
        self.body = None;
        let at = self.position.get();
        if self.connections < MAX_CONNECTIONS && self.leave(&source) {
            return Ok(());
        }
        self.failures += 1;
        if self.failures >= self.retry.tries || self.connections >= MAX_CONNECTIONS {
            let fault = PullError::Broken { url: self.url(), at, size: self.job.size, source };
            return Err(self.fail(fault));
        }
        log::warn!("pull: {}: broke off at byte {at}: {}", self.url(), chain(&source));
        match self.retry.pause(self.failures, self.stop) {
            true => Ok(()),
            false => Err(self.fail(PullError::Cancelled)),
        }
    }

    /// Opens the blob at the present position.
    fn connect(&mut self) -> io::Result<()> {
        self.connections += 1;
        let at = self.position.get();
        // What fails here failed at the registry itself, after its mirrors.
        self.whence = Whence::Origin;
        let blob = match self.registry.blob(&self.job.digest, self.job.size, at) {
            Ok(blob) => blob,
            Err(error) if error.is_transient() => return self.broke(io::Error::other(error)),
            Err(error) => return Err(self.fail(error.into())),
        };
        self.whence = blob.whence;
        if at == 0 && self.kept.is_none() && blob.whence != Whence::Cache {
            self.kept = self.registry.keep(&self.job.digest, self.job.size);
        }
        if blob.whence != Whence::Origin && !self.givers.contains(&blob.whence) {
            self.givers.push(blob.whence);
        }
        if let Some(found) = blob.size.filter(|size| *size != self.job.size) {
            return self.wrong_size(found);
        }
        let mut body = blob.body;
        // A registry without ranges begins anew: what is known already is read over.
        let known = at - blob.start.min(at);
        match io::copy(&mut body.by_ref().take(known), &mut io::sink()) {
            Ok(skipped) if skipped == known => self.body = Some(body),
            Ok(_) => return self.broke(io::ErrorKind::UnexpectedEof.into()),
            Err(error) => return self.broke(error),
        }
        Ok(())
    }

    /// The blob has another size than its descriptor says: a mirror that says so is left, the registry itself is not asked again.
    fn wrong_size(&mut self, found: u64) -> io::Result<()> {
        let (url, expected) = (self.url(), self.job.size);
        let error = PullError::Size { url, expected, found };
        match self.leave(&error) {
            true => Ok(()),
            false => Err(self.fail(error)),
        }
    }

    /// At the declared size: one more byte is one too many. Whatever else happens there is for the digest to judge.
    fn check_end(&mut self) -> io::Result<()> {
        self.ended = true;
        let Some(mut body) = self.body.take() else { return Ok(()) };
        match body.read(&mut [0]) {
            // From a mirror, what came before may be right all the same: that is for the digest to judge.
            Ok(1..) => self.wrong_size(self.job.size + 1),
            _ => Ok(()),
        }
    }
}

impl Read for Source<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if let Some(fault) = &self.fault {
            return Err(io::Error::other(fault.to_string()));
        }
        loop {
            let at = self.position.get();
            let left = self.job.size - at.min(self.job.size);
            if left == 0 && (self.ended || self.job.size > 0) {
                if !self.ended {
                    self.check_end()?;
                }
                return Ok(0);
            }
            if (self.stop)() {
                return Err(self.fail(PullError::Cancelled));
            }
            let Some(body) = &mut self.body else {
                self.connect()?;
                if left == 0 {
                    self.check_end()?;
                    return Ok(0);
                }
                continue;
            };
            let wanted = usize::try_from(left).unwrap_or(usize::MAX).min(buffer.len());
            let space = buffer.get_mut(..wanted).unwrap_or_default();
            if space.is_empty() {
                return Ok(0);
            }
            match body.read(space) {
                Ok(0) => self.broke(io::ErrorKind::UnexpectedEof.into())?,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => self.broke(error)?,
                Ok(count) => {
                    self.failures = 0;
                    let bytes = space.get(..count).unwrap_or_default();
                    self.hash.update(bytes);
                    if let Some(kept) = &mut self.kept {
                        kept.write(bytes);
                    }
                    if self.whence != Whence::Cache {
                        self.fetched += count as u64;
                    }
                    self.position.set(at + count as u64);
                    self.progress.bytes.fetch_add(count as u64, Ordering::Relaxed);
                    return Ok(count);
                }
            }
        }
    }
}
