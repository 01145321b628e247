//! A Layer0 with more in it: a second cpio archive behind the initramfs, which the kernel unpacks over the first
//! (Documentation/driver-api/early-userspace/buffer-format.rst). The cases use it for a rescue
//! shell and for keys.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::Write;
use std::path::Path;

use anyhow::{Context, Result};
use protocol::ids::Digest;
use protocol::layer0::{AGENT, INITRAMFS, Manifest};

use crate::artifacts::Artifacts;
use crate::prerequisites;

/// What the rescue shell can do: busybox under these names.
const APPLETS: [&str; 25] = [
    "sh", "ash", "awk", "cat", "cut", "dmesg", "echo", "grep", "head", "ip", "kill", "ls", "mkdir",
    "mount", "pidof", "ps", "reboot", "sed", "sleep", "sort", "tail", "tr", "true", "uniq", "wc",
];

/// Makes a directory of Layer0 artifacts like `from`, with busybox and a shell in the initramfs.
///
/// # Errors
/// When busybox is not there or something cannot be read or written.
pub fn with_rescue_shell(from: &Artifacts, to: &Path) -> Result<Artifacts> {
    let busybox = prerequisites::find_program("busybox")
        .context("busybox is missing (package busybox-static)")?;
    let busybox =
        fs::read(&busybox).with_context(|| format!("cannot read {}", busybox.display()))?;
    let mut archive = Newc::default();
    archive.add("bin", DIRECTORY, &[]);
    archive.add("bin/busybox", PROGRAM, &busybox);
    for name in APPLETS {
        archive.add(&format!("bin/{name}"), SYMLINK, b"busybox");
    }
    appended(from, to, &archive.finish())
}

/// Makes a directory of Layer0 artifacts like `from`, with a public key that every ImageSet must be signed by.
///
/// # Errors
/// When something cannot be read or written.
pub fn with_imageset_key(from: &Artifacts, to: &Path, key: &Path) -> Result<Artifacts> {
    appended(from, to, &imageset_key(key)?)
}

/// A site's archive with a public key that every ImageSet must be signed by.
///
/// # Errors
/// When something cannot be read.
pub fn imageset_key(key: &Path) -> Result<Vec<u8>> {
    let name = key.file_name().unwrap_or_default().to_string_lossy();
    let bytes = fs::read(key).with_context(|| format!("cannot read {}", key.display()))?;
    let mut archive = Newc::default();
    archive.add("etc/layercake/keys", DIRECTORY, &[]);
    archive.add(&format!("etc/layercake/keys/{name}"), FILE, &bytes);
    Ok(archive.finish())
}

/// Makes a directory of Layer0 artifacts like `from`, with busybox and a shell, and an ImageAPI that listens at `address` for
/// clients with a certificate. `tls` holds `cert.pem`, `key.pem` and `clients.pem`.
///
/// # Errors
/// When something cannot be read or written.
pub fn with_imageapi(from: &Artifacts, to: &Path, address: &str, tls: &Path) -> Result<Artifacts> {
    let with_shell = with_rescue_shell(from, to)?;
    let mut archive = Newc::default();
    archive.add("etc/layercake/imageapi", DIRECTORY, &[]);
    archive.add("etc/layercake/imageapi/listen", FILE, address.as_bytes());
    for name in ["cert.pem", "key.pem", "clients.pem"] {
        let file = tls.join(name);
        let bytes = fs::read(&file).with_context(|| format!("cannot read {}", file.display()))?;
        archive.add(&format!("etc/layercake/imageapi/{name}"), FILE, &bytes);
    }
    append(&with_shell.initramfs(), &archive.finish())
        .with_context(|| format!("cannot append to {}", with_shell.initramfs().display()))?;
    amend_manifest(&with_shell)?;
    Ok(with_shell)
}

/// Makes a directory of Layer0 artifacts like `from`, with busybox and a shell, this `network.toml`, and in `/tools` the `ip` and
/// `dnsmasq` of this machine, with which the node can play its own peer.
///
/// # Errors
/// When a program is not there or something cannot be read or written.
pub fn with_network_peers(from: &Artifacts, to: &Path, wishes: &str) -> Result<Artifacts> {
    let with_shell = with_rescue_shell(from, to)?;
    let mut archive = Newc::default();
    for dir in ["tools", "lib64", "lib", "lib/x86_64-linux-gnu", "etc/layercake"] {
        archive.add(dir, DIRECTORY, &[]);
    }
    archive.add("etc/layercake/network.toml", FILE, wishes.as_bytes());
    archive.add("etc/passwd", FILE, b"root:x:0:0:root:/:/bin/sh\n");
    archive.add("etc/group", FILE, b"root:x:0:\n");
    let mut libraries = BTreeSet::new();
    for program in ["ip", "dnsmasq"] {
        let file = prerequisites::find_program(program)
            .with_context(|| format!("{program} is missing"))?;
        let bytes = fs::read(&file).with_context(|| format!("cannot read {}", file.display()))?;
        archive.add(&format!("tools/{program}"), PROGRAM, &bytes);
        let output = std::process::Command::new("ldd").arg(&file).output().context("ldd")?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        // `libc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x...)`, and the loader by its path alone.
        libraries.extend(text.split_whitespace().filter(|w| w.starts_with('/')).map(str::to_owned));
    }
    for library in libraries {
        let bytes = fs::read(&library).with_context(|| format!("cannot read {library}"))?;
        archive.add(library.trim_start_matches('/'), PROGRAM, &bytes);
    }
    append(&with_shell.initramfs(), &archive.finish())
        .with_context(|| format!("cannot append to {}", with_shell.initramfs().display()))?;
    amend_manifest(&with_shell)?;
    Ok(with_shell)
}

/// Makes a directory of Layer0 artifacts like `from`, with this archive behind the initramfs.
///
/// # Errors
/// When something cannot be read or written.
pub fn with_archive(from: &Artifacts, to: &Path, archive: &Path) -> Result<Artifacts> {
    let bytes = fs::read(archive).with_context(|| format!("cannot read {}", archive.display()))?;
    appended(from, to, &bytes)
}

/// Makes another Layer0 out of `from`: the same kernel, with one more file, `etc/layercake/NAME`.
///
/// # Errors
/// When something cannot be read or written.
pub fn with_file(from: &Artifacts, to: &Path, name: &str, bytes: &[u8]) -> Result<Artifacts> {
    let mut archive = Newc::default();
    archive.add(&format!("etc/layercake/{name}"), FILE, bytes);
    appended(from, to, &archive.finish())
}

/// Makes another Layer0 out of `from` whose agent, where it is taken alone, is this program.
///
/// # Errors
/// When something cannot be read or written.
pub fn with_agent(from: &Artifacts, to: &Path, program: &[u8]) -> Result<Artifacts> {
    fs::create_dir_all(to).with_context(|| format!("cannot make {}", to.display()))?;
    copy_all(&from.layer0, to)?;
    let mut made = from.clone();
    made.layer0 = to.to_path_buf();
    fs::write(to.join(AGENT), program).context("cannot write the agent")?;
    amend_manifest(&made)?;
    Ok(made)
}

/// A static program for x86-64 that says yes to `--version` and ends with a failure whatever else it is asked.
#[must_use]
pub fn broken_agent() -> Vec<u8> {
    // mov rax, [rsp+16]; movzx edi, byte [rax]; sub edi, '-'; mov eax, SYS_exit; syscall
    const CODE: [u8; 18] = [
        0x48, 0x8b, 0x44, 0x24, 0x10, 0x0f, 0xb6, 0x38, 0x83, 0xef, 0x2d, 0xb8, 0x3c, 0, 0, 0,
        0x0f, 0x05,
    ];
    const BASE: u64 = 0x40_0000;
    let mut program = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    // elf(5): type EXEC, machine x86-64, version, entry, one program header at 64, no sections.
    program.extend([2_u8, 0, 62, 0, 1, 0, 0, 0]);
    for field in [BASE + 120, 64, 0] {
        program.extend(field.to_le_bytes());
    }
    program.extend([0_u8, 0, 0, 0, 64, 0, 56, 0, 1, 0, 64, 0, 0, 0, 0, 0]);
    // LOAD, readable and executable, the whole file.
    program.extend([1_u8, 0, 0, 0, 5, 0, 0, 0]);
    let size = 120 + CODE.len() as u64;
    for field in [0, BASE, BASE, size, size, 0x1000] {
        program.extend(field.to_le_bytes());
    }
    program.extend(CODE);
    program
}

fn appended(from: &Artifacts, to: &Path, archive: &[u8]) -> Result<Artifacts> {
    fs::create_dir_all(to).with_context(|| format!("cannot make {}", to.display()))?;
    copy_all(&from.layer0, to)?;
    let mut made = from.clone();
    made.layer0 = to.to_path_buf();
    append(&made.initramfs(), archive)
        .with_context(|| format!("cannot append to {}", made.initramfs().display()))?;
    amend_manifest(&made)?;
    Ok(made)
}

fn copy_all(from: &Path, to: &Path) -> Result<()> {
    let copy = || -> std::io::Result<()> {
        for entry in fs::read_dir(from)? {
            let entry = entry?;
            if entry.file_type()?.is_file() {
                fs::copy(entry.path(), to.join(entry.file_name()))?;
            }
        }
        Ok(())
    };
    copy().with_context(|| format!("cannot copy {} to {}", from.display(), to.display()))
}

/// Appends an archive at a multiple of 4 bytes, where the kernel looks for one.
fn append(initramfs: &Path, archive: &[u8]) -> std::io::Result<()> {
    let length = usize::try_from(fs::metadata(initramfs)?.len()).unwrap_or(usize::MAX);
    let mut file = File::options().append(true).open(initramfs)?;
    file.write_all(padding(length))?;
    file.write_all(archive)
}

/// Writes the new files' digests and sizes into the manifest, for readers that check.
fn amend_manifest(made: &Artifacts) -> Result<()> {
    let path = made.layer0.join("manifest.json");
    let text = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let mut manifest: Manifest =
        serde_json::from_slice(&text).with_context(|| format!("cannot read {}", path.display()))?;
    for artifact in &mut manifest.artifacts {
        if [INITRAMFS, AGENT].contains(&artifact.name.as_str()) {
            let file = made.layer0.join(&artifact.name);
            let bytes =
                fs::read(&file).with_context(|| format!("cannot read {}", file.display()))?;
            artifact.digest = Digest::of(&bytes);
            artifact.size = bytes.len() as u64;
            if artifact.name == AGENT {
                manifest.agent_digest = artifact.digest;
            }
        }
    }
    let text = serde_json::to_vec_pretty(&manifest).context("cannot encode the manifest")?;
    fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))
}

const DIRECTORY: u32 = 0o040_755;
const FILE: u32 = 0o100_644;
const PROGRAM: u32 = 0o100_755;
const SYMLINK: u32 = 0o120_777;

/// A newc archive in the making (cpio(5)).
#[derive(Debug, Default)]
struct Newc {
    bytes: Vec<u8>,
    inode: u32,
}

impl Newc {
    fn add(&mut self, name: &str, mode: u32, data: &[u8]) {
        self.inode += 1;
        let size = u32::try_from(data.len()).unwrap_or(u32::MAX);
        let name_size = u32::try_from(name.len() + 1).unwrap_or(u32::MAX);
        // inode, mode, uid, gid, links, mtime, size, device (4), name size, checksum.
        let fields = [self.inode, mode, 0, 0, 1, 0, size, 0, 0, 0, 0, name_size, 0];
        self.bytes.extend(b"070701");
        for field in fields {
            self.bytes.extend(format!("{field:08x}").bytes());
        }
        self.bytes.extend(name.bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend(data);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.extend(padding(self.bytes.len()));
    }

    fn finish(mut self) -> Vec<u8> {
        self.add("TRAILER!!!", 0, &[]);
        self.bytes
    }
}

/// What brings this length to a multiple of 4.
fn padding(length: usize) -> &'static [u8] {
    const ZEROS: [u8; 4] = [0; 4];
    ZEROS.get(..length.next_multiple_of(4) - length).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpio_itself_reads_the_archive() {
        let mut archive = Newc::default();
        archive.add("bin", DIRECTORY, &[]);
        archive.add("bin/busybox", PROGRAM, b"program");
        archive.add("bin/sh", SYMLINK, b"busybox");
        let dir = tempfile::tempdir().expect("tempdir");
        let file = dir.path().join("archive.cpio");
        fs::write(&file, archive.finish()).expect("write");
        // The one cpio that the lab's machines have anyway.
        let output = std::process::Command::new("busybox")
            .args(["cpio", "-i", "-d", "-F"])
            .arg(&file)
            .current_dir(dir.path())
            .output()
            .expect("busybox (package busybox-static)");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        assert_eq!(fs::read(dir.path().join("bin/sh")).expect("through the link"), b"program");
    }

    #[test]
    fn the_broken_agent_says_its_version_and_nothing_else() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().expect("tempdir");
        let file = dir.path().join("agent");
        fs::write(&file, broken_agent()).expect("write");
        fs::set_permissions(&file, fs::Permissions::from_mode(0o755)).expect("mode");
        let ends = |argument: &str| std::process::Command::new(&file).arg(argument).status();
        assert!(ends("--version").expect("runs").success());
        assert!(!ends("agent").expect("runs").success());
    }

    #[test]
    fn an_appended_archive_begins_at_a_multiple_of_four() {
        let file = tempfile::NamedTempFile::new().expect("temporary file");
        fs::write(file.path(), b"12345").expect("write");
        append(file.path(), b"070701").expect("append");
        assert_eq!(fs::read(file.path()).expect("read"), b"12345\0\0\x00070701");
    }
}
