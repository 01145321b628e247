//! Modules into the kernel: reads the index and the files of one kernel, and remembers what it has loaded.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use rustix::io::Errno;

use super::index::{Index, MAX_INDEX, Plan, Step};
use crate::sys::pages::Pages;

/// Largest module that is unpacked, in bytes. The largest that netboots need have some 5 MB, the largest of all some 30.
const MAX_MODULE: usize = 64 << 20;

/// Why a module was not loaded.
#[derive(Debug, thiserror::Error)]
pub enum ModuleError {
    /// Nothing of that name, and no alias matches.
    #[error("module {name}: this image has no such module")]
    Unknown {
        /// What was asked for.
        name: String,
    },
    /// The file is compressed by something else than zstd.
    #[error(
        "module {path}: only .ko and .ko.zst can be loaded, others are unpacked at image build"
    )]
    Compressed {
        /// The file.
        path: PathBuf,
    },
    /// What is compressed cannot be unpacked.
    #[error("module {path}: {source}")]
    Unpack {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The file cannot be opened.
    #[error("module {path}: cannot be opened")]
    Open {
        /// The file.
        path: PathBuf,
        /// What open said.
        #[source]
        source: io::Error,
    },
    /// The kernel does not take it.
    #[error("module {name} ({path}): {meaning}: {source}")]
    Load {
        /// Its name.
        name: String,
        /// Its file.
        path: PathBuf,
        /// What that errno means for a module.
        meaning: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// An index file cannot be read.
    #[error("module index {path} cannot be read")]
    Index {
        /// The file.
        path: PathBuf,
        /// What read said.
        #[source]
        source: io::Error,
    },
    /// The kernel's device events cannot be heard.
    #[error("kernel events cannot be heard")]
    Listen(#[source] io::Error),
}

/// Loads modules of one kernel.
#[derive(Debug)]
pub struct Loader {
    dir: PathBuf,
    index: Index,
    /// What is in the kernel or was refused: not tried again.
    settled: BTreeSet<String>,
    loaded: usize,
}

impl Loader {
    /// The modules of this release. A missing directory or index means that there are none.
    ///
    /// # Errors
    /// [`ModuleError::Index`].
    pub fn open(release: &str) -> Result<Self, ModuleError> {
        Self::open_at(&Path::new("/lib/modules").join(release))
    }

    /// The modules below this directory.
    ///
    /// # Errors
    /// [`ModuleError::Index`].
    pub fn open_at(dir: &Path) -> Result<Self, ModuleError> {
        let text = |name| read_index(&dir.join(name));
        let index = Index::new(
            text("modules.dep")?,
            text("modules.alias")?,
            text("modules.softdep")?,
            text("modules.builtin")?,
        );
        Ok(Self { dir: dir.to_owned(), index, settled: BTreeSet::new(), loaded: 0 })
    }

    /// Whether there are no modules: everything is built in.
    #[must_use]
    pub fn has_none(&self) -> bool {
        self.index.is_empty()
    }

    /// How many modules it has put into the kernel.
    #[must_use]
    pub fn loaded(&self) -> usize {
        self.loaded
    }

    /// Loads a module, by its name or an alias, with all it needs. Returns how many modules went into the kernel; none if
    /// they are there already or built in.
    ///
    /// # Errors
    /// [`ModuleError`], of the module or of one it needs.
    pub fn load(&mut self, request: &str) -> Result<usize, ModuleError> {
        let Plan::Load(steps) = self.index.plan(request) else {
            return Err(ModuleError::Unknown { name: request.to_owned() });
        };
        let before = self.loaded;
        for step in steps {
            if self.settled.contains(&step.name) {
                continue;
            }
            let result = self.insert(&step);
            self.settled.insert(step.name.clone());
            match result {
                Ok(()) => {}
                Err(error) if step.optional => log::debug!("{error}"),
                // No hardware for it: that is what a driver among several for one alias says.
                Err(ModuleError::Load { source, .. })
                    if source.raw_os_error() == Some(Errno::NODEV.raw_os_error()) =>
                {
                    log::debug!("module {}: no such device here", step.name);
                }
                Err(error) => return Err(error),
            }
        }
        Ok(self.loaded.saturating_sub(before))
    }

    fn insert(&mut self, step: &Step) -> Result<(), ModuleError> {
        let path = self.dir.join(&step.path);
        let is_packed = step.path.ends_with(".ko.zst");
        if !is_packed && !step.path.ends_with(".ko") {
            return Err(ModuleError::Compressed { path });
        }
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(source) => return Err(ModuleError::Open { path, source }),
        };
        let given = if is_packed {
            match unpack(file, MAX_MODULE) {
                Ok(module) => rustix::system::init_module(&module, c""),
                Err(source) => return Err(ModuleError::Unpack { path, source }),
            }
        } else {
            rustix::system::finit_module(&file, c"", 0)
        };
        match given {
            Ok(()) => {
                log::debug!("module {} loaded", step.name);
                self.loaded = self.loaded.saturating_add(1);
                Ok(())
            }
            Err(Errno::EXIST) => Ok(()),
            Err(errno) => Err(ModuleError::Load {
                name: step.name.clone(),
                path,
                meaning: meaning(errno),
                source: errno.into(),
            }),
        }
    }
}

/// Unpacks one zstd frame that says how many bytes it holds, at most as many as may come out.
fn unpack(mut file: File, most: usize) -> io::Result<Pages> {
    let wrong = |text| io::Error::new(io::ErrorKind::InvalidData, text);
    let bounded = |size| usize::try_from(size).ok().filter(|size| *size <= most);
    let too_large = || wrong("it unpacks to over 64 MiB");
    let mut packed = Pages::new(bounded(file.metadata()?.len()).ok_or_else(too_large)?)?;
    file.read_exact(&mut packed)?;
    let size = zstd::zstd_safe::get_frame_content_size(&packed).ok().flatten();
    let size = size.ok_or_else(|| wrong("it is no zstd frame that says its size"))?;
    let mut module = Pages::new(bounded(size).ok_or_else(too_large)?)?;
    let out: &mut [u8] = &mut module;
    let unpacked = zstd::bulk::decompress_to_buffer(&packed, out)?;
    if unpacked == module.len() { Ok(module) } else { Err(wrong("it is cut")) }
}

/// What an errno of `finit_module(2)` means for the module.
fn meaning(errno: Errno) -> &'static str {
    match errno {
        Errno::NOENT => "it needs a symbol that no loaded module has",
        Errno::NOEXEC => "it is not a module for this kernel",
        Errno::INVAL => "it is damaged or was built for another kernel",
        Errno::PERM => "the kernel allows no more modules, or this process may not",
        Errno::NOKEY | Errno::KEYREJECTED | Errno::BADMSG => "its signature is missing or wrong",
        Errno::NOMEM => "there is not enough memory",
        Errno::NODEV | Errno::NXIO => "there is no device for it",
        Errno::BUSY => "something in its place is busy",
        _ => "its start failed",
    }
}

fn read_index(path: &Path) -> Result<String, ModuleError> {
    let fail = |source| ModuleError::Index { path: path.to_owned(), source };
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(String::new()),
        Err(error) => return Err(fail(error)),
    };
    let limit = u64::try_from(MAX_INDEX).unwrap_or(u64::MAX);
    let size = fs::metadata(path).map_or(0, |meta| meta.len()).min(limit);
    let mut bytes = Vec::with_capacity(usize::try_from(size).unwrap_or(0));
    file.take(limit).read_to_end(&mut bytes).map_err(fail)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn loader(dep: &str) -> (tempfile::TempDir, Loader) {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("modules.dep"), dep).unwrap();
        let loader = Loader::open_at(dir.path()).unwrap();
        (dir, loader)
    }

    #[test]
    fn errors_name_the_module_and_what_to_do() {
        let (dir, mut loader) = loader("a/one.ko.xz:\na/two.ko: a/three.ko\na/three.ko:\n");
        let text = loader.load("one").unwrap_err().to_string();
        assert!(text.contains("a/one.ko.xz") && text.contains("unpacked at image build"), "{text}");
        let (dir_gz, mut gz) = self::loader("one.ko.gz:\n");
        assert!(matches!(gz.load("one"), Err(ModuleError::Compressed { .. })));
        drop(dir_gz);
        let text = loader.load("two").unwrap_err().to_string();
        assert!(text.contains("a/three.ko"), "{text}");
        let text = loader.load("four").unwrap_err().to_string();
        assert_eq!(text, "module four: this image has no such module");
        assert_eq!(loader.loaded(), 0);
        drop(dir);
    }

    #[test]
    fn what_cannot_be_unpacked_is_named_with_the_reason() {
        let (dir, mut loader) = loader("a.ko.zst:\nb.ko.zst:\nc.ko.zst:\nd.ko.zst:\ne.ko.zst:\n");
        let frame = |plain: &[u8]| {
            let mut encoder = zstd::bulk::Compressor::new(1).unwrap();
            encoder.include_checksum(true).unwrap();
            encoder.compress(plain).unwrap()
        };
        let good = frame(b"not a module, but whole");
        let mut spoilt = good.clone();
        *spoilt.last_mut().unwrap() ^= 1;
        let mut sizeless = zstd::stream::write::Encoder::new(Vec::new(), 1).unwrap();
        std::io::Write::flush(&mut sizeless).unwrap();
        let sizeless = sizeless.finish().unwrap();
        let large = frame(&vec![0; MAX_MODULE + 1]);
        for (name, bytes, said) in [
            ("a", &good[..], "a.ko.zst): "),
            ("b", &good[..good.len() - 6], "b.ko.zst: "),
            ("c", &spoilt, "c.ko.zst: "),
            ("d", &sizeless, "d.ko.zst: it is no zstd frame that says its size"),
            ("e", &large, "e.ko.zst: it unpacks to over 64 MiB"),
        ] {
            fs::write(dir.path().join(format!("{name}.ko.zst")), bytes).unwrap();
            let error = loader.load(name).unwrap_err();
            assert_eq!(matches!(error, ModuleError::Unpack { .. }), name != "a", "{error}");
            assert!(error.to_string().contains(said), "{error}");
        }
        assert_eq!(loader.loaded(), 0);
    }

    #[test]
    fn what_is_unpacked_is_what_was_packed() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let plain = b"module".repeat(1000);
        fs::write(file.path(), zstd::bulk::compress(&plain, 19).unwrap()).unwrap();
        let open = || File::open(file.path()).unwrap();
        assert_eq!(*unpack(open(), plain.len()).unwrap(), *plain);
        assert!(unpack(open(), plain.len() - 1).is_err());
    }

    #[test]
    fn a_file_that_is_no_module_is_refused_by_the_kernel_with_a_meaning() {
        let (dir, mut loader) = loader("x.ko:\n");
        fs::write(dir.path().join("x.ko"), b"not a module").unwrap();
        let error = loader.load("x").unwrap_err();
        assert!(matches!(&error, ModuleError::Load { name, .. } if name == "x"), "{error}");
        assert!(loader.load("x").is_ok(), "what was refused is not tried again");
    }
}
