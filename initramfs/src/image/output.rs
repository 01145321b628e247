//! What a build leaves on disk: the files, each by a rename, the manifest last; and the memory of which inputs gave which file.

use std::fs::{self, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use protocol::ids::Digest;
use protocol::layer0::{Artifact, Manifest};

use super::{BuildError, fail, size};

/// The kernel.
pub const KERNEL: &str = "vmlinuz";
/// The initramfs.
pub const INITRAMFS: &str = "initramfs.img";
/// What the files are.
pub const MANIFEST: &str = "manifest.json";
/// Most files whose inputs are remembered.
const REMEMBERED: usize = 64;

/// A file of the image: made now, or known to lie in its place already.
#[derive(Debug)]
pub(super) struct Made {
    pub(super) name: &'static str,
    pub(super) digest: Digest,
    pub(super) size: u64,
    /// None where it lies in its place.
    bytes: Option<Vec<u8>>,
}

impl Made {
    /// A file that was made now.
    pub(super) fn new(name: &'static str, bytes: Vec<u8>) -> Self {
        Self { name, digest: Digest::of(&bytes), size: size(&bytes), bytes: Some(bytes) }
    }

    /// Its bytes.
    pub(super) fn bytes(&self, out: &Path) -> Result<Vec<u8>, BuildError> {
        let path = out.join(self.name);
        let read = || fs::read(&path).map_err(fail(&path));
        self.bytes.clone().map_or_else(read, Ok)
    }
}

/// Everything a file is made of, by its digest.
#[derive(Debug)]
pub(super) struct Key(String);

impl Key {
    /// A key for a file, with nothing in it yet.
    pub(super) fn new(name: &str) -> Self {
        Self(format!("{name}\n"))
    }

    /// With one more input.
    pub(super) fn with(mut self, what: &str, bytes: &[u8]) -> Self {
        self.0.push_str(&format!("{what} {}\n", Digest::of(bytes)));
        self
    }

    /// With a file, if it can be read: whoever makes something of it says what is wrong otherwise.
    pub(super) fn with_file(self, what: &str, path: &Path) -> Self {
        let bytes = fs::read(path).unwrap_or_default();
        self.with(what, &bytes)
    }

    fn hex(&self, maker: &str) -> String {
        Digest::of(format!("{maker}\n{}", self.0).as_bytes()).hex()
    }
}

/// Where files go, and what is known of those that are there.
#[derive(Debug)]
pub(super) struct Shop {
    /// Where they go.
    pub(super) out: PathBuf,
    /// Where it is kept which inputs gave which file.
    pub(super) memory: PathBuf,
    /// The program that makes them.
    pub(super) maker: String,
}

impl Shop {
    /// Makes a file, unless its inputs gave one before and that one lies in its place.
    pub(super) fn file(
        &self,
        name: &'static str,
        key: &Key,
        make: impl FnOnce() -> Result<Vec<u8>, BuildError>,
    ) -> Result<Made, BuildError> {
        let note = self.memory.join(key.hex(&self.maker));
        let known = fs::read_to_string(&note).ok().and_then(|text| text.parse::<Digest>().ok());
        if let Some(digest) = known
            && let Ok(bytes) = fs::read(self.out.join(name))
            && Digest::of(&bytes) == digest
        {
            return Ok(Made { name, digest, size: size(&bytes), bytes: None });
        }
        let made = Made::new(name, make()?);
        fs::create_dir_all(&self.memory).map_err(fail(&self.memory))?;
        replace(&note, &[made.digest.to_string().as_bytes()])?;
        prune(&self.memory, REMEMBERED).map_err(fail(&self.memory))?;
        Ok(made)
    }
}

/// Removes all but the newest files of a directory.
pub(super) fn prune(dir: &Path, keep: usize) -> io::Result<()> {
    let mut files = Vec::new();
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let changed = entry.metadata()?.modified().unwrap_or(SystemTime::UNIX_EPOCH);
        files.push((changed, entry.path()));
    }
    files.sort();
    let old = files.len().saturating_sub(keep);
    files.iter().take(old).try_for_each(|(_, path)| fs::remove_file(path))
}

/// Fills in what the manifest says of these files.
pub(super) fn describe(made: &[Made], manifest: &mut Manifest) {
    let artifact =
        |it: &Made| Artifact { name: it.name.to_owned(), digest: it.digest, size: it.size };
    manifest.artifacts = made.iter().map(artifact).collect();
}

/// The manifest as it is written.
pub(super) fn manifest_text(manifest: &Manifest) -> Result<Vec<u8>, BuildError> {
    let text = serde_json::to_vec_pretty(manifest);
    let mut text = text.map_err(|error| fail(MANIFEST.as_ref())(error.into()))?;
    text.push(b'\n');
    Ok(text)
}

/// Writes what is not there already and removes files of an earlier build that are not of this one. Tells whether everything was
/// there.
pub(super) fn write(out: &Path, made: &[Made], others: &[&str]) -> Result<bool, BuildError> {
    fs::create_dir_all(out).map_err(fail(out))?;
    let mut unchanged = true;
    for it in made {
        let Some(bytes) = &it.bytes else { continue };
        let path = out.join(it.name);
        if fs::read(&path).is_ok_and(|there| there == *bytes) {
            continue;
        }
        replace(&path, &[bytes])?;
        unchanged = false;
    }
    for name in others.iter().filter(|name| !made.iter().any(|it| it.name == **name)) {
        match fs::remove_file(out.join(name)) {
            Ok(()) => unchanged = false,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(fail(out)(error)),
        }
    }
    Ok(unchanged)
}

/// Puts these bytes in the place of a file in one step, readable by everyone.
pub(super) fn replace(path: &Path, bytes: &[&[u8]]) -> Result<(), BuildError> {
    let fail = fail(path);
    let dir = path.parent().unwrap_or(Path::new("."));
    let mut file = tempfile::NamedTempFile::new_in(dir).map_err(&fail)?;
    for bytes in bytes {
        file.write_all(bytes).map_err(&fail)?;
    }
    file.as_file().set_permissions(Permissions::from_mode(0o644)).map_err(&fail)?;
    file.persist(path).map_err(|error| fail(error.error))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_made_again_only_when_an_input_changed_or_it_was_spoilt() {
        let dir = tempfile::tempdir().unwrap();
        let (out, memory) = (dir.path().join("out"), dir.path().join("memory"));
        let mut shop = Shop { out, memory, maker: "1".to_owned() };
        let run = |shop: &Shop, input: &[u8]| {
            let made = std::cell::Cell::new(false);
            let key = Key::new("a").with("input", input);
            let make = || {
                made.set(true);
                Ok([b"made of ", input].concat())
            };
            let file = shop.file("a", &key, make).unwrap();
            assert_eq!(file.digest, Digest::of(&[b"made of ", input].concat()));
            write(&shop.out, &[file], &["b"]).unwrap();
            made.get()
        };
        assert!(run(&shop, b"x"));
        assert!(!run(&shop, b"x"));
        assert!(run(&shop, b"y"));
        fs::write(shop.out.join("a"), b"spoilt").unwrap();
        assert!(run(&shop, b"y"));
        fs::write(shop.out.join("b"), b"of an earlier build").unwrap();
        assert!(!run(&shop, b"y"));
        assert!(!shop.out.join("b").exists());
        shop.maker = "2".to_owned();
        assert!(run(&shop, b"y"), "another program may make it in another way");
    }
}
