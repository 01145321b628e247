//! Pulls what is no ImageSet: one image by any reference, and one file by URL and digest.
//!
//! An image goes through the same documents, layers and signatures as a set, as a set of its own. A file becomes one layer of
//! the store, named by the digest of the file as it was served: an archive unpacked, a file system image as the file `image`.
//! Both are pinned as long as the value that is returned lives.

use std::cell::Cell;
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use flate2::bufread::MultiGzDecoder;
use protocol::ids::Digest;
use protocol::reference::Reference;
use sha2::{Digest as _, Sha256};

use super::budget::Need;
use super::plan::image::{NAME, plan};
use super::unpack::{Guarded, ZSTD_WINDOW_LOG};
use super::{Progress, Pull, PullError, PulledImage, Puller, chain};
use crate::layer::{self, LayerError, cpio};
use crate::registry::RegistryError;
use crate::store::{Claim, Pin};

/// The name of a file system image in its layer.
const IMAGE_FILE: &str = "image";
/// How much of a file is looked at to tell what it is: EROFS has its magic at 1024 (linux `fs/erofs/erofs_fs.h`).
const HEAD_BYTES: usize = 2048;
/// Buffers on the way, in bytes.
const BUFFER_BYTES: usize = 256 << 10;

/// What a file holds, as its first bytes say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Content {
    /// A newc cpio archive.
    Cpio,
    /// A tar archive.
    Tar,
    /// An EROFS image.
    Erofs,
    /// A squashfs image.
    Squashfs,
}

/// An image in the store.
#[derive(Debug, Clone)]
pub struct PulledOne {
    /// The image.
    pub image: PulledImage,
    /// What its reference stood for.
    pub digest: Digest,
    pin: Arc<Pin>,
}

/// A file in the store.
#[derive(Debug, Clone)]
pub struct PulledFile {
    /// The unpacked archive, or the file system image.
    pub path: PathBuf,
    /// What it is.
    pub content: Content,
    pin: Arc<Pin>,
}

impl PulledOne {
    /// What keeps it from being collected.
    #[must_use]
    pub fn pin(&self) -> Arc<Pin> {
        Arc::clone(&self.pin)
    }
}

impl PulledFile {
    /// What keeps it from being collected.
    #[must_use]
    pub fn pin(&self) -> Arc<Pin> {
        Arc::clone(&self.pin)
    }
}

impl Content {
    /// What the first `HEAD_BYTES` of a file say, compression taken away.
    #[must_use]
    pub fn of(head: &[u8]) -> Option<Self> {
        let at = |start: usize, magic: &[u8]| head.get(start..start + magic.len()) == Some(magic);
        if at(0, b"070701") || at(0, b"070702") {
            Some(Self::Cpio)
        } else if at(1024, &0xE0F5_E1E2_u32.to_le_bytes()) {
            Some(Self::Erofs)
        } else if at(0, b"hsqs") {
            Some(Self::Squashfs)
        } else if at(257, b"ustar") {
            Some(Self::Tar)
        } else {
            None
        }
    }
}

impl Puller {
    /// Pulls an image. As [`Puller::pull_set`]; where keys are installed, one of them must have signed what the reference
    /// stands for.
    ///
    /// # Errors
    /// On the first document or layer that cannot be had, and for an ImageSet.
    pub fn pull_image(
        &self,
        reference: &Reference,
        progress: &Progress,
        cancel: &AtomicBool,
    ) -> Result<PulledOne, PullError> {
        let registry = self.registries.open(reference)?.with_cache(self.cache.clone());
        let failed = AtomicBool::new(false);
        let pull = Pull { puller: self, registry: &registry, progress, cancel, failed };
        let digest = pull.target(reference)?;
        let mut pin = self.store.pin([digest]);
        pull.verify(reference, &digest)?;
        let plan = plan(&digest, &mut |digest, size, kind| {
            pin.add([*digest]);
            pull.document(digest, size, kind)
        })?;
        pin.add(plan.closure.iter().copied());
        let bytes = pull.layers(&plan)?;
        self.one(plan, bytes).ok_or(PullError::Cancelled)
    }

    /// An image that lies in the store completely, without any network. `None` as for [`Puller::reopen`].
    #[must_use]
    pub fn reopen_image(&self, digest: &Digest) -> Option<PulledOne> {
        if !self.is_verified(digest, None) {
            return None;
        }
        let missing = |digest: &Digest| PullError::Set {
            digest: *digest,
            reason: "not in the store".to_owned(),
        };
        let planned = plan(digest, &mut |digest, _, _| {
            self.store.blob(digest)?.ok_or_else(|| missing(digest))
        });
        self.one(planned.ok()?, 0)
    }

    fn one(&self, plan: super::Plan, bytes: u64) -> Option<PulledOne> {
        let mut set = self.pulled(plan, bytes)?;
        let image = set.images.remove(&NAME.parse().ok()?)?;
        Some(PulledOne { image, digest: set.digest, pin: set.pin })
    }

    /// Fetches a file, checks its digest and unpacks it. What the store has is not fetched again. `cancel` is looked at between
    /// reads.
    ///
    /// # Errors
    /// If it cannot be had, its digest is another, it is nothing that [`Content`] knows, or cannot be unpacked.
    pub fn pull_file(
        &self,
        url: &str,
        digest: &Digest,
        cancel: &AtomicBool,
    ) -> Result<PulledFile, PullError> {
        let pin = Arc::new(self.store.pin([*digest]));
        match self.store.claim(digest, &|| cancel.load(Ordering::Relaxed))? {
            Claim::Stopped => return Err(PullError::Cancelled),
            Claim::Ready(_) => {}
            Claim::Mine(staged) => {
                self.fetch_file(url, digest, staged.dir(), cancel)?;
                staged.commit()?;
            }
        }
        self.file(digest, pin).ok_or(PullError::Cancelled)
    }

    /// A file that lies in the store.
    #[must_use]
    pub fn reopen_file(&self, digest: &Digest) -> Option<PulledFile> {
        let pin = Arc::new(self.store.pin([*digest]));
        self.file(digest, pin)
    }

    fn file(&self, digest: &Digest, pin: Arc<Pin>) -> Option<PulledFile> {
        let dir = self.store.layer(digest)?;
        let image = dir.join(IMAGE_FILE);
        let only = fs::read_dir(&dir).ok()?.count() == 1;
        if only && let Ok(file) = File::open(&image) {
            let mut head = Vec::new();
            let most = u64::try_from(HEAD_BYTES).unwrap_or(u64::MAX);
            if file.take(most).read_to_end(&mut head).is_ok()
                && let Some(content @ (Content::Erofs | Content::Squashfs)) = Content::of(&head)
            {
                return Some(PulledFile { path: image, content, pin });
            }
        }
        // Which kind of archive it was does not matter any more.
        Some(PulledFile { path: dir, content: Content::Tar, pin })
    }

    fn fetch_file(
        &self,
        url: &str,
        digest: &Digest,
        dir: &Path,
        cancel: &AtomicBool,
    ) -> Result<(), PullError> {
        let transport = self.registries.transport();
        let response = transport.get(url, &[]).and_then(|response| response.expect(&[200]));
        let response = response.map_err(RegistryError::from)?;
        let _promise = self.promise(Need::of_file(response.content_length().unwrap_or(0)))?;
        let received = Rc::new(Cell::new(0));
        let body = Body { inner: response.into_reader(), received: received.clone(), cancel };
        let mut stream = Hashed { inner: body, hash: Sha256::new() };
        let unpacked = self.unpack_file(&mut stream, received, dir);
        if cancel.load(Ordering::Relaxed) {
            return Err(PullError::Cancelled);
        }
        // A damaged file shows as a broken archive first: its digest says which it is.
        let layer = |source| PullError::Layer { digest: *digest, source };
        let rest = io::copy(&mut stream, &mut io::sink()).map_err(LayerError::Read);
        rest.map_err(layer)?;
        let found = Digest(stream.hash.finalize().into());
        if found != *digest {
            return Err(PullError::Digest { url: url.to_owned(), expected: *digest, found });
        }
        unpacked.map_err(layer)
    }

    fn unpack_file(
        &self,
        stream: &mut impl Read,
        received: Rc<Cell<u64>>,
        dir: &Path,
    ) -> Result<(), LayerError> {
        let (head, stream) = peek(stream).map_err(LayerError::Read)?;
        let stream = BufReader::with_capacity(BUFFER_BYTES, stream);
        let plain: Box<dyn Read + '_> = match head.as_slice() {
            [0x1f, 0x8b, ..] => Box::new(MultiGzDecoder::new(stream)),
            [0x28, 0xb5, 0x2f, 0xfd, ..] => {
                let decoder = zstd::stream::read::Decoder::with_buffer(stream);
                let decoder = decoder.and_then(|mut decoder| {
                    decoder.window_log_max(ZSTD_WINDOW_LOG)?;
                    Ok(decoder)
                });
                Box::new(decoder.map_err(LayerError::Read)?)
            }
            _ => Box::new(stream),
        };
        let (head, plain) = peek(Guarded::new(plain, received)).map_err(LayerError::Read)?;
        let mut plain = BufReader::with_capacity(BUFFER_BYTES, plain);
        match Content::of(&head) {
            Some(Content::Tar) => layer::apply(plain, dir, &self.limits).map(drop),
            Some(Content::Cpio) => {
                let tar = BufReader::with_capacity(BUFFER_BYTES, cpio::ToTar::new(plain));
                layer::apply(tar, dir, &self.limits).map(drop)
            }
            Some(Content::Erofs | Content::Squashfs) => {
                let path = dir.join(IMAGE_FILE);
                let written = File::create_new(&path).and_then(|mut file| {
                    let limit = self.limits.bytes;
                    let count = io::copy(&mut plain.by_ref().take(limit), &mut file)?;
                    match count == limit && !plain.fill_buf()?.is_empty() {
                        true => Err(io::Error::other("it is larger than any image may be")),
                        false => Ok(()),
                    }
                });
                written.map_err(LayerError::Read)
            }
            None => {
                let reason = "it is no tar, cpio, EROFS or squashfs file";
                Err(LayerError::Read(io::Error::new(io::ErrorKind::InvalidData, reason)))
            }
        }
    }
}

/// The first bytes of a stream, and the stream with them.
fn peek<R: Read>(mut stream: R) -> io::Result<(Vec<u8>, impl Read + use<R>)> {
    let mut head = Vec::with_capacity(HEAD_BYTES);
    let most = u64::try_from(HEAD_BYTES).unwrap_or(u64::MAX);
    stream.by_ref().take(most).read_to_end(&mut head)?;
    Ok((head.clone(), io::Cursor::new(head).chain(stream)))
}

/// A body that counts, and ends with an error when it is told to.
struct Body<'a, R> {
    inner: R,
    received: Rc<Cell<u64>>,
    cancel: &'a AtomicBool,
}

impl<R: Read> Read for Body<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.cancel.load(Ordering::Relaxed) {
            return Err(io::Error::other("cancelled"));
        }
        let count = self.inner.read(buffer)?;
        self.received.set(self.received.get().saturating_add(count as u64));
        Ok(count)
    }
}

struct Hashed<R> {
    inner: R,
    hash: Sha256,
}

impl<R: Read> Read for Hashed<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        self.hash.update(buffer.get(..count).unwrap_or_default());
        Ok(count)
    }
}

/// The whole error in one line.
#[must_use]
pub fn explain(error: &PullError) -> String {
    chain(error)
}
