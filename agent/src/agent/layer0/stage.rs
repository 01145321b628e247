//! Makes another Layer0 ready: fetches its files by digest, lets the kernel load them, or puts its agent where PID 1 starts it.
//!
//! Everything follows from the digest in the desired document: it is the manifest's, and the manifest has those of the files. With
//! keys in [`crate::paths::KEYS_DIR`], one of them must vouch for the manifest and for each of the site's archives, which are not in it.

mod check;
mod memory;

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use protocol::ids::Digest;
use protocol::layer0::{
    AGENT, Artifact, Contents, INITRAMFS, KERNEL, MANIFEST, MAX_ARTIFACT_BYTES, MAX_MANIFEST_BYTES,
    MAX_SIGNATURE_BYTES, SIGNATURE, SIGNATURE_SUFFIX, archive_statement, kexec_command_line, path,
    signer,
};
use protocol::node::{DesiredLayer0, Layer0Archive, Layer0How};
use protocol::signature::{Policy, PublicKey};
use sha2::{Digest as _, Sha256};

use self::check::{check_agent, check_memory, refusal};
use self::memory::Memory;
use super::{Failure, Way};
use crate::agent::chain;
use crate::sys::kexec;
use crate::transport::Transport;

/// How often the files are in memory while the kernel loads them: as fetched, as read, as it keeps them.
const COPIES: u64 = 3;
/// Most archives beside the initramfs.
const MAX_ARCHIVES: usize = 16;
/// Bytes read at a time.
const BUFFER: usize = 64 << 10;

/// What is needed to make a Layer0 ready.
#[derive(Debug)]
pub(in crate::agent) struct Stager {
    pub(in crate::agent) transport: Transport,
    /// Base URLs of the boot servers.
    pub(in crate::agent) servers: Vec<String>,
    /// Who must vouch for a manifest.
    pub(in crate::agent) policy: Policy,
    /// Where agents are put.
    pub(in crate::agent) agents: PathBuf,
    /// One at a time: what the kernel has loaded is what was asked for last.
    pub(in crate::agent) turn: Mutex<()>,
}

/// It may work the next time.
fn again(why: impl Into<String>) -> Failure {
    Failure { why: why.into(), last: false }
}

/// It will not.
fn never(why: impl Into<String>) -> Failure {
    Failure { why: why.into(), last: true }
}

impl Stager {
    /// Makes it ready. `say` is told what is being done.
    pub(super) fn stage(
        &self,
        wanted: &DesiredLayer0,
        say: &dyn Fn(String),
    ) -> Result<Way, Failure> {
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        let manifest = self.document(wanted, MANIFEST, MAX_MANIFEST_BYTES)?;
        let found = Digest::of(&manifest);
        if found != wanted.digest {
            return Err(again(format!("the manifest of {} has digest {found}", wanted.digest)));
        }
        if let Err(failure) = self.check_signature(wanted, &manifest) {
            return or_reboot(wanted, failure);
        }
        let contents = serde_json::from_slice::<Contents>(&manifest).map_err(|error| {
            never(format!("the manifest of {} is malformed: {error}", found.short()))
        })?;
        if wanted.how == Layer0How::Agent {
            return self.agent(wanted, &contents, say).map(Way::Agent);
        }
        match self.kexec(wanted, &contents, say) {
            Ok(()) => Ok(Way::Kexec),
            Err(failure) => or_reboot(wanted, failure),
        }
    }

    fn check_signature(&self, wanted: &DesiredLayer0, manifest: &[u8]) -> Result<(), Failure> {
        let keys = match &self.policy {
            Policy::Unsigned => return Ok(()),
            Policy::Unusable(why) => return Err(again(format!("nothing can be verified: {why}"))),
            Policy::Signed(keys) => keys,
        };
        let short = wanted.digest.short();
        let text = self.document(wanted, SIGNATURE, MAX_SIGNATURE_BYTES).map_err(|failure| {
            again(format!("this node wants {short} signed, and it is not: {}", failure.why))
        })?;
        let Some(key) = signer(manifest, &text, keys) else {
            return Err(again(format!("no key of this node has signed {short}")));
        };
        log::info!("layer0: {} vouches for {short}", key.name());
        // A reboot gets them from the same server, as every boot does; a kexec would make them this node's own word.
        wanted.archives.iter().try_for_each(|archive| self.check_archive(archive, keys))
    }

    fn check_archive(&self, archive: &Layer0Archive, keys: &[PublicKey]) -> Result<(), Failure> {
        let name = archive.url.rsplit('/').next().unwrap_or(&archive.url);
        let signature = self.each(&format!("{}{SIGNATURE_SUFFIX}", archive.url), |url| {
            let answer = self.transport.get(url, &[]).and_then(|answer| answer.expect(&[200, 404]));
            let answer = answer.map_err(|error| chain(&error))?;
            let is_there = answer.status() == 200;
            let bytes = answer.into_bytes(MAX_SIGNATURE_BYTES).map_err(|error| chain(&error))?;
            Ok(is_there.then_some(bytes))
        })?;
        let statement = archive_statement(&archive.digest);
        let key = signature.and_then(|text| signer(statement.as_bytes(), &text, keys));
        let Some(key) = key else {
            let short = archive.digest.short();
            return Err(never(format!(
                "no key of this node has signed the archive {name} ({short}): \
                 `layercake layer0 sign {name} --key FILE` does, beside the file on the boot server"
            )));
        };
        log::info!("layer0: {} vouches for the archive {name}", key.name());
        Ok(())
    }

    /// A small file beside the manifest, from the first server that has it.
    fn document(&self, wanted: &DesiredLayer0, name: &str, limit: u64) -> Result<Vec<u8>, Failure> {
        self.each(&path(&wanted.digest, name), |url| {
            let answer = self.transport.get(url, &[]).and_then(|answer| answer.expect(&[200]));
            answer.and_then(|answer| answer.into_bytes(limit)).map_err(|error| chain(&error))
        })
    }

    /// Asks one server after the other for a path; a URL is asked as it is.
    fn each<T>(
        &self,
        url: &str,
        mut ask: impl FnMut(&str) -> Result<T, String>,
    ) -> Result<T, Failure> {
        if !url.starts_with('/') {
            return ask(url).map_err(again);
        }
        let mut why = "no boot server is known".to_owned();
        for server in &self.servers {
            match ask(&format!("{server}{url}")) {
                Ok(done) => return Ok(done),
                Err(error) => why = error,
            }
        }
        Err(again(why))
    }

    fn kexec(
        &self,
        wanted: &DesiredLayer0,
        contents: &Contents,
        say: &dyn Fn(String),
    ) -> Result<(), Failure> {
        let present = fs::read_to_string("/proc/cmdline").unwrap_or_default();
        let line = kexec_command_line(&present, &wanted.digest).map_err(|length| {
            never(format!("its command line would have {length} bytes, more than a kernel reads"))
        })?;
        let (kernel, initramfs) = (find(contents, KERNEL)?, find(contents, INITRAMFS)?);
        if wanted.archives.len() > MAX_ARCHIVES {
            return Err(never(format!("more than {MAX_ARCHIVES} archives")));
        }
        let mut parts = vec![(path(&wanted.digest, INITRAMFS), initramfs.digest, initramfs.size)];
        let archives = wanted.archives.iter();
        parts.extend(archives.map(|archive| (archive.url.clone(), archive.digest, archive.size)));
        let all = parts.iter().fold(kernel.size, |sum, (.., size)| sum.saturating_add(*size));
        check_memory(all.saturating_mul(COPIES))?;
        let memory = |error: io::Error| again(format!("memfd: {error}"));
        let (image, archive) = (Memory::new().map_err(memory)?, Memory::new().map_err(memory)?);
        say(format!("fetching {KERNEL}, {} kB", kernel.size / 1000));
        let url = path(&wanted.digest, KERNEL);
        self.fetch(&url, &kernel.digest, kernel.size, image.file())?;
        for (url, digest, size) in &parts {
            let name = url.rsplit('/').next().unwrap_or(url);
            say(format!("fetching {name}, {} kB", size / 1000));
            self.fetch(url, digest, *size, archive.file())?;
            archive.pad(*size).map_err(memory)?;
        }
        say("loading the kernel".to_owned());
        let image = image.read_only().map_err(memory)?;
        let archive = archive.read_only().map_err(memory)?;
        kexec::load(&image, &archive, &line).map_err(|error| never(refusal(&error)))
    }

    /// Streams one file, whose digest and size must be right, to the end of this one.
    fn fetch(&self, url: &str, digest: &Digest, size: u64, mut to: &File) -> Result<(), Failure> {
        if size > MAX_ARTIFACT_BYTES {
            return Err(never(format!("{url} has {size} bytes, more than {MAX_ARTIFACT_BYTES}")));
        }
        let start = to.stream_position().map_err(|error| again(error.to_string()))?;
        self.each(url, |url| {
            // What an earlier server gave was not it.
            let back = to.set_len(start).and_then(|()| to.seek(SeekFrom::Start(start)));
            back.map_err(|error| error.to_string())?;
            self.copy(url, digest, size, to)
        })
    }

    fn copy(&self, url: &str, digest: &Digest, size: u64, mut to: &File) -> Result<(), String> {
        let answer = self.transport.get(url, &[]).and_then(|answer| answer.expect(&[200]));
        let mut body = answer.map_err(|error| chain(&error))?.into_reader().take(size + 1);
        let (mut hash, mut total, mut buffer) = (Sha256::new(), 0_u64, vec![0; BUFFER]);
        loop {
            let read = match body.read(&mut buffer) {
                Ok(0) => break,
                Ok(read) => read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(format!("GET {url}: the body broke off: {error}")),
            };
            let bytes = buffer.get(..read).unwrap_or_default();
            hash.update(bytes);
            total = total.saturating_add(u64::try_from(read).unwrap_or(u64::MAX));
            to.write_all(bytes).map_err(|error| error.to_string())?;
        }
        let found = Digest(hash.finalize().into());
        if total == size && found == *digest {
            return Ok(());
        }
        let more = if total > size { "or more " } else { "" };
        Err(format!(
            "GET {url}: {total} bytes {more}with {found} came in place of {size} with {digest}"
        ))
    }

    /// Puts the agent where PID 1 can start it, after it has shown that it runs here.
    fn agent(
        &self,
        wanted: &DesiredLayer0,
        contents: &Contents,
        say: &dyn Fn(String),
    ) -> Result<PathBuf, Failure> {
        let agent = find(contents, AGENT)?;
        if Some(agent.digest) != wanted.agent {
            return Err(never("the manifest names another agent than the desired document"));
        }
        let failed = |error: io::Error| again(format!("{}: {error}", self.agents.display()));
        check_memory(agent.size)?;
        say(format!("fetching {AGENT}, {} kB", agent.size / 1000));
        fs::create_dir_all(&self.agents).map_err(failed)?;
        let partial = self.agents.join("partial");
        // A file that is being executed cannot be written to.
        match fs::remove_file(&partial) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
            _ => {}
        }
        let mut options = OpenOptions::new();
        let file = options.write(true).create_new(true).mode(0o755).open(&partial);
        let file = file.map_err(failed)?;
        self.fetch(&path(&wanted.digest, AGENT), &agent.digest, agent.size, &file)?;
        drop(file);
        check_agent(&partial)?;
        let target = self.agents.join(agent.digest.hex());
        fs::rename(&partial, &target).map_err(failed)?;
        self.sweep(&target);
        Ok(target)
    }

    /// Removes agents that are neither the new one nor the one that runs.
    fn sweep(&self, keep: &Path) {
        let own = fs::read_link("/proc/self/exe").unwrap_or_default();
        let entries = fs::read_dir(&self.agents).into_iter().flatten().flatten();
        for path in entries.map(|entry| entry.path()) {
            if path != keep
                && path.file_name() != own.file_name()
                && let Err(error) = fs::remove_file(&path)
            {
                log::warn!("{}: {error}", path.display());
            }
        }
    }
}

/// What no other attempt changes is left to a reboot, where that was left open.
fn or_reboot(wanted: &DesiredLayer0, failure: Failure) -> Result<Way, Failure> {
    if !failure.last || wanted.how != Layer0How::Auto {
        return Err(failure);
    }
    log::warn!("layer0: {}; the node will reboot instead", failure.why);
    Ok(Way::Reboot(Some(failure.why)))
}

fn find<'a>(contents: &'a Contents, name: &str) -> Result<&'a Artifact, Failure> {
    contents.artifact(name).ok_or_else(|| never(format!("the manifest has no {name}")))
}

#[cfg(test)]
mod tests;
