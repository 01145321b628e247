//! Mount forms in a pull: which of an image's is taken, and how its blob comes into the store. Nothing is unpacked: the
//! blob is hashed while it is written, and tried out before it has its name there.

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::Path;

use protocol::oci::Descriptor;
use protocol::oci::mount::{MountEntry, MountForm};

use super::plan::{Content, Job};
use super::source::Source;
use super::{Pull, PullError};
use crate::mounts::lower;
use crate::store::{Claim, Store};

/// Bytes that are read and written at a time: as many as stay in the processor's cache between the hash and the copy.
const BUFFER_BYTES: usize = 256 << 10;

/// Whether a mount form is worth its manifest.
pub(super) type Usable<'a> = dyn Fn(MountForm) -> Result<(), String> + 'a;

/// Which mount forms a pull takes.
#[derive(Clone, Copy)]
pub(super) struct Forms<'a> {
    /// The best first.
    pub(super) preferred: &'a [MountForm],
    /// Says what this kernel lacks for one.
    pub(super) usable: &'a Usable<'a>,
    /// Only what lies in this store already.
    pub(super) stored: Option<&'a Store>,
}

impl Forms<'_> {
    /// The forms of an image in the order of preference, without those that this node cannot mount; the log says why.
    pub(super) fn candidates<'e>(&self, entries: &'e [MountEntry]) -> Vec<&'e MountEntry> {
        let mut found = Vec::new();
        for form in self.preferred {
            let Some(entry) = entries.iter().find(|entry| entry.form == *form) else { continue };
            match (self.usable)(*form) {
                Ok(()) => found.push(entry),
                // Said once, when it is pulled.
                Err(_) if self.stored.is_some() => {}
                Err(reason) => {
                    log::info!(
                        "image {}: its mount form {form} is not taken: {reason}",
                        entry.image
                    );
                }
            }
        }
        found
    }

    /// Whether the blob may be taken: it is there, or may be fetched.
    pub(super) fn allows(&self, form: MountForm, blob: &Descriptor) -> bool {
        self.stored.is_none_or(|store| store.file_system(form, &blob.digest).is_some())
    }
}

impl Pull<'_> {
    /// Fetches one file system, and returns its size; 0 if somebody else did meanwhile.
    pub(super) fn file_system(&self, job: &Job, form: MountForm) -> Result<u64, PullError> {
        let stop = || self.stopped();
        let store = &self.puller.store;
        let staged = match store.claim_file_system(&job.digest, &stop)? {
            Claim::Mine(staged) => staged,
            Claim::Stopped => return Err(PullError::Cancelled),
            Claim::Ready(_) => return Ok(self.was_there(job)),
        };
        let mut source = Source::new(self.registry, job, &self.puller.retry, &stop, self.progress);
        let written = write(&mut source, staged.dir(), job.size);
        // Whatever went wrong in between: the digest of the whole says which it is.
        let checked = source.finish();
        if checked.is_err() {
            source.withdraw();
        }
        checked?;
        let keep = |source| PullError::FileSystem { digest: job.digest, source };
        written.map_err(keep)?;
        lower::try_out(form, staged.dir()).map_err(|source| PullError::Unmountable {
            digest: job.digest,
            form,
            source,
        })?;
        staged.commit()?;
        log::debug!("pull: {form} {} of {} bytes", job.digest.short(), job.size);
        Ok(source.fetched())
    }
}

fn write(source: &mut Source<'_>, path: &Path, size: u64) -> io::Result<()> {
    let mut file = File::options().write(true).create_new(true).open(path)?;
    let wanted = usize::try_from(size).unwrap_or(usize::MAX);
    let mut buffer = vec![0; BUFFER_BYTES.min(wanted.max(1))];
    loop {
        match source.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(count) => file.write_all(buffer.get(..count).unwrap_or_default())?,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

/// The job that fetches a mount form's blob.
pub(super) fn job(form: MountForm, blob: &Descriptor) -> Job {
    Job { digest: blob.digest, size: blob.size, content: Content::FileSystem(form), unpacked: None }
}
