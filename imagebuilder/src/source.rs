//! Where an image's layers come from: the words of `source = …`, and turning each into layers and a base config.
//!
//! Not here: the tar itself (`layer`), the image's manifest and config (`build`).

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use protocol::ids::Digest;
use protocol::oci::{Descriptor, ImageConfig, OciError};
use protocol::reference::Reference;

use crate::blob::BlobDir;
use crate::build::BuildError;
use crate::client::{Options, RegistryError};
use crate::description::ImageSource;
use crate::layer::{self, Layer, LayerError, LayerWriter};

mod debian;
mod docker_archive;
mod elf;
mod oci_layout;
mod registry;

pub(crate) use debian::{is_mirror, is_package};
pub use elf::{ElfError, check_static};
pub(crate) use oci_layout::{ANNOTATION_REF_NAME, read_blob};

/// Largest executable of a `binary:` source, in bytes.
const MAX_BINARY_BYTES: u64 = 1 << 30;

/// One word of `source`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// `dir:PATH`, a root filesystem directory: one layer.
    Dir(PathBuf),
    /// `tar:PATH`, a tar, plain, gzip or zstd: one layer.
    Tar(PathBuf),
    /// `binary:PATH`, a static executable, placed at `/NAME`: one layer.
    Binary(PathBuf),
    /// `oci:PATH[:TAG]`, an image of an OCI layout: its layers and its config.
    Oci {
        /// The layout's directory.
        path: PathBuf,
        /// `org.opencontainers.image.ref.name`; needed when the layout has several images.
        tag: Option<String>,
    },
    /// `docker-archive:PATH`, what `docker save` and `podman save` write, with one image: its layers and its config.
    DockerArchive(PathBuf),
    /// `registry:REFERENCE`, an image of a registry: its layers and its config.
    Registry(Reference),
    /// `debian:SUITE`, the packages that the image's `packages` names: one layer.
    Debian(String),
}

/// Why a text is not a source.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{text}` is not a source; expected dir:PATH, tar:PATH, binary:PATH, oci:PATH[:TAG], docker-archive:PATH, registry:REFERENCE or debian:SUITE"
)]
pub struct InvalidSource {
    /// The offending text.
    pub text: String,
}

impl FromStr for Source {
    type Err = InvalidSource;

    fn from_str(text: &str) -> Result<Self, InvalidSource> {
        let invalid = || InvalidSource { text: text.chars().take(120).collect() };
        let (kind, path) = text.split_once(':').ok_or_else(invalid)?;
        if path.is_empty() || path.contains('\0') {
            return Err(invalid());
        }
        Ok(match kind {
            "dir" => Self::Dir(path.into()),
            "tar" => Self::Tar(path.into()),
            "binary" => Self::Binary(path.into()),
            "docker-archive" => Self::DockerArchive(path.into()),
            "registry" => Self::Registry(path.parse().map_err(|_| invalid())?),
            "debian" if debian::is_suite(path) => Self::Debian(path.to_owned()),
            "oci" => match path.rsplit_once(':') {
                Some((path, tag)) if !path.is_empty() && !tag.is_empty() && !tag.contains('/') => {
                    Self::Oci { path: path.into(), tag: Some(tag.to_owned()) }
                }
                _ => Self::Oci { path: path.into(), tag: None },
            },
            _ => return Err(invalid()),
        })
    }
}

/// Why a source gives no layers.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// A file of it cannot be read.
    #[error("{what} {}", path.display())]
    Io {
        /// What was being done.
        what: &'static str,
        /// To which file.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// A layer cannot be made of it.
    #[error(transparent)]
    Layer(#[from] LayerError),
    /// An executable is not a static one of the image's architecture.
    #[error("{}", path.display())]
    Binary {
        /// The executable.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: ElfError,
    },
    /// A document of it is malformed.
    #[error("{}", path.display())]
    Document {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: OciError,
    },
    /// A registry does not give it.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// What a registry gives cannot be kept.
    #[error("cannot keep what was fetched")]
    Layout {
        /// Why.
        #[source]
        source: Box<BuildError>,
    },
    /// The thread that fetched ended without a result.
    #[error("{reference} was not fetched")]
    CutOff {
        /// What was being fetched.
        reference: String,
    },
    /// It does not hold what it should.
    #[error("{}: {reason}", path.display())]
    Wrong {
        /// The source.
        path: PathBuf,
        /// What is wrong, with names and digests.
        reason: String,
    },
}

/// What a source gives.
#[derive(Debug, Default)]
pub(crate) struct Content {
    /// Layers, lowest first, whose blobs are written.
    pub(crate) layers: Vec<Layer>,
    /// The config of an image that was one already.
    pub(crate) config: Option<ImageConfig>,
    /// Its manifest, byte for byte as the source has it, with the descriptor of its config.
    pub(crate) original: Option<Original>,
}

/// The documents of an image that was one already.
#[derive(Debug)]
pub(crate) struct Original {
    pub(crate) manifest: Descriptor,
    pub(crate) manifest_bytes: Vec<u8>,
    pub(crate) config_type: String,
    pub(crate) config_bytes: Vec<u8>,
}

pub(crate) fn io_error(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> SourceError {
    let path = path.to_owned();
    move |source| SourceError::Io { what, path, source }
}

pub(crate) fn wrong(path: &Path, reason: impl Into<String>) -> SourceError {
    SourceError::Wrong { path: path.to_owned(), reason: reason.into() }
}

/// What an image was made from, as far as that is a registry's.
#[derive(Debug, Clone)]
pub(crate) struct Base {
    pub(crate) reference: Reference,
    pub(crate) digest: Digest,
}

/// An image whose sources are all on this machine.
#[derive(Debug)]
pub(crate) struct Localized {
    /// One for each platform, each with its architecture named.
    pub(crate) images: Vec<ImageSource>,
    pub(crate) base: Option<Base>,
}

/// Fetches what is in registries into `scratch`, and finds out for which platforms there is an image. All platforms of
/// an image are kept where it is its only source and no architecture is asked for.
pub(crate) fn localize(
    image: &ImageSource,
    base: &Path,
    options: &Options,
    scratch: &Path,
) -> Result<Localized, SourceError> {
    let mut local = image.clone();
    let mut from = None;
    let alone = image.sources.len() == 1;
    let architecture = match &image.architecture {
        None if alone => None,
        _ => Some(image.architecture()),
    };
    for (number, source) in local.sources.iter_mut().enumerate() {
        if let Source::Registry(reference) = source {
            let out = scratch.join(format!("{}-{number}", image.name));
            let digest = registry::fetch(reference, architecture, options, &out)?;
            from = Some(Base { reference: reference.clone(), digest });
            *source = Source::Oci { path: out, tag: None };
        }
    }
    let mut architectures = Vec::new();
    if let (None, [Source::Oci { path, tag }]) = (architecture, local.sources.as_slice()) {
        architectures = oci_layout::architectures(&base.join(path), tag.as_deref())?;
    }
    if architectures.is_empty() {
        architectures.push(image.architecture().to_owned());
    }
    let images = architectures
        .into_iter()
        .map(|architecture| ImageSource { architecture: Some(architecture), ..local.clone() });
    Ok(Localized { images: images.collect(), base: from })
}

impl Source {
    /// Writes the layers of the source into `blobs`.
    pub(crate) fn content(
        &self,
        image: &ImageSource,
        base: &Path,
        epoch: u64,
        blobs: &BlobDir,
    ) -> Result<Content, SourceError> {
        let start = |path: &Path| {
            LayerWriter::new(blobs, image.compression, image.compression_level)
                .map_err(io_error("cannot start the layer of", path))
        };
        let (path, layer) = match self {
            Self::Oci { path, tag } => {
                return oci_layout::content(
                    &base.join(path),
                    tag.as_deref(),
                    image.architecture(),
                    blobs,
                );
            }
            Self::Registry(reference) => {
                return Err(SourceError::CutOff { reference: reference.to_string() });
            }
            Self::Debian(suite) => {
                let layer = debian::content(suite, image, epoch, blobs)?;
                return Ok(Content { layers: vec![layer], ..Content::default() });
            }
            Self::DockerArchive(path) => {
                return docker_archive::content(&base.join(path), image, blobs);
            }
            Self::Dir(path) => {
                let path = base.join(path);
                let mut layer = start(&path)?;
                layer::write_dir(&path, epoch, image.owners, &mut layer)?;
                (path, layer)
            }
            Self::Tar(path) => {
                let path = base.join(path);
                let file = File::open(&path).map_err(io_error("cannot read", &path))?;
                let mut layer = start(&path)?;
                layer::copy_checked(&path, file, &mut layer)?;
                (path, layer)
            }
            Self::Binary(path) => {
                let path = base.join(path);
                let bytes = read_binary(&path, image.architecture())?;
                let name = path.file_name().ok_or_else(|| wrong(&path, "it has no file name"))?;
                let mut layer = start(&path)?;
                layer::write_executable(name, &bytes, epoch, &mut layer)
                    .map_err(io_error("cannot write the layer of", &path))?;
                (path, layer)
            }
        };
        let layer = layer.finish().map_err(io_error("cannot finish the layer of", &path))?;
        Ok(Content { layers: vec![layer], ..Content::default() })
    }
}

fn read_binary(path: &Path, architecture: &str) -> Result<Vec<u8>, SourceError> {
    let meta = fs::metadata(path).map_err(io_error("cannot read", path))?;
    if !meta.is_file() || meta.len() > MAX_BINARY_BYTES {
        return Err(wrong(path, format!("not a file of at most {MAX_BINARY_BYTES} bytes")));
    }
    let bytes = fs::read(path).map_err(io_error("cannot read", path))?;
    check_static(&bytes, architecture)
        .map_err(|source| SourceError::Binary { path: path.to_owned(), source })?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sources_are_read() {
        let oci = |path: &str, tag: Option<&str>| Source::Oci {
            path: path.into(),
            tag: tag.map(str::to_owned),
        };
        for (text, source) in [
            ("dir:../a b", Source::Dir("../a b".into())),
            ("tar:/x.tar", Source::Tar("/x.tar".into())),
            ("binary:x", Source::Binary("x".into())),
            ("docker-archive:x.tar", Source::DockerArchive("x.tar".into())),
            ("oci:layout", oci("layout", None)),
            ("oci:layout:1", oci("layout", Some("1"))),
            ("oci:a:b/layout", oci("a:b/layout", None)),
            ("registry:http://r:1/a:2", Source::Registry("http://r:1/a:2".parse().expect("ref"))),
            ("debian:bookworm", Source::Debian("bookworm".to_owned())),
        ] {
            assert_eq!(text.parse::<Source>().expect(text), source);
        }
        for text in ["", "rootfs", "dir:", "ftp:x", "oci:", "dir:a\0b", "registry:x", "debian:-x"] {
            let error = text.parse::<Source>().expect_err(text).to_string();
            assert!(error.contains("expected dir:PATH"), "{error}");
        }
    }
}
