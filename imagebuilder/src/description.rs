//! `imageset.toml`, the form of an ImageSet that people write: [`protocol::imageset::ImageSet`] plus, for every image,
//! where it comes from and how it is configured. It reads the file and checks it; it opens none of the sources.

use std::collections::BTreeMap;
use std::fmt;
use std::marker::PhantomData;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use protocol::ids::{Name, Version};
use protocol::imageset::{Container, Image, ImageSet, Mode, signal_number};
use serde::de::{self, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};

use crate::layer::{Compression, Owners};
use crate::mount::MountKind;
use crate::source::{Source, is_mirror, is_package};

/// Largest `imageset.toml` that is read, in bytes.
pub const MAX_DESCRIPTION_BYTES: u64 = 1 << 20;

/// What mmdebstrap(1) calls its sets of packages.
const VARIANTS: [&str; 8] =
    ["extract", "custom", "essential", "apt", "minbase", "buildd", "important", "standard"];

/// The environment variable that dates a build (reproducible-builds.org, SOURCE_DATE_EPOCH), in seconds since 1970.
pub const EPOCH_VARIABLE: &str = "SOURCE_DATE_EPOCH";

/// An ImageSet with the sources of its images.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SetSource {
    /// What nodes will read.
    pub set: ImageSet,
    /// The images in the order of `set.images`, with their sources.
    pub images: Vec<ImageSource>,
    /// The directory that relative source paths are relative to.
    pub base: PathBuf,
    /// Modification time of every file of `dir:` and `binary:` sources and `created` of every image, in seconds since
    /// 1970.
    pub epoch: u64,
}

/// One `[[image]]` of `imageset.toml`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ImageSource {
    /// Its name in the set.
    pub name: Name,
    /// Where its layers come from, lowest first: `source = "dir:rootfs"` or a list.
    #[serde(rename = "source", deserialize_with = "one_or_many")]
    pub sources: Vec<Source>,
    /// Program and first arguments; the source's own when absent.
    pub entrypoint: Option<Vec<String>>,
    /// Further arguments; the source's own when absent and `entrypoint` is absent too.
    pub cmd: Option<Vec<String>>,
    /// Added to the source's environment.
    #[serde(default)]
    pub env: BTreeMap<String, String>,
    /// `USER[:GROUP]`.
    pub user: Option<String>,
    /// Working directory.
    pub workdir: Option<String>,
    /// Added to the source's labels.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// Signal that asks the program to end.
    pub stop_signal: Option<String>,
    /// Go's name of the architecture. Absent: all those of the one image that is the only source, else `amd64`.
    pub architecture: Option<String>,
    /// Packages of a `debian:` source, beside those of its variant.
    #[serde(default)]
    pub packages: Vec<String>,
    /// Which packages a `debian:` source has anyway, as mmdebstrap(1) names the sets; `minbase` when absent.
    pub variant: Option<String>,
    /// Where a `debian:` source's packages come from: URLs, `deb` lines or files in apt's form. When absent: this
    /// machine's apt sources where they have the suite.
    #[serde(default)]
    pub mirrors: Vec<String>,
    /// How layers that are made here are compressed.
    #[serde(default)]
    pub compression: Compression,
    /// Level of that compression; 1 to 9 for gzip (default 6), 1 to 19 for zstd (default 3).
    pub compression_level: Option<u32>,
    /// Whether files of `dir:` sources keep their owners.
    #[serde(default)]
    pub owners: Owners,
    /// File systems that the image is published as beside its layers: `mount = "squashfs"` or a list.
    #[serde(default, deserialize_with = "one_or_many")]
    pub mount: Vec<MountKind>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    name: Name,
    version: Version,
    #[serde(default)]
    mode: Mode,
    #[serde(default)]
    init: Vec<String>,
    watch_s: Option<u32>,
    #[serde(rename = "image")]
    images: Vec<ImageSource>,
    #[serde(rename = "container", default)]
    containers: Vec<Container>,
}

/// Why an `imageset.toml` cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DescriptionError {
    /// The file cannot be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The file is larger than [`MAX_DESCRIPTION_BYTES`].
    #[error("{} is larger than the {MAX_DESCRIPTION_BYTES} bytes that are read", path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
    },
    /// The text is not an ImageSet: bad TOML, an unknown key, a wrong type, a bad value.
    #[error("{}:{line}:{column}: {}{message}", path.display(), key_prefix(key.as_deref()))]
    Syntax {
        /// The file.
        path: PathBuf,
        /// Line, from 1.
        line: usize,
        /// Column in characters, from 1.
        column: usize,
        /// The key that stands there, where one does.
        key: Option<String>,
        /// What is wrong.
        message: String,
    },
    /// The set as a whole has problems.
    #[error("{}: {}", path.display(), problems.join("; "))]
    Problems {
        /// The file.
        path: PathBuf,
        /// Each problem as a sentence that names the place.
        problems: Vec<String>,
    },
    /// SOURCE_DATE_EPOCH is not a number of seconds.
    #[error("{EPOCH_VARIABLE}=`{text}` is not a number of seconds since 1970")]
    Epoch {
        /// What it is.
        text: String,
    },
}

fn key_prefix(key: Option<&str>) -> String {
    key.map(|key| format!("key `{key}`: ")).unwrap_or_default()
}

/// Reads and checks an `imageset.toml`. SOURCE_DATE_EPOCH is taken from the environment, 0 when absent.
///
/// # Errors
/// If the file cannot be read, is not an ImageSet's, or the set has problems.
pub fn load(path: &Path) -> Result<SetSource, DescriptionError> {
    let read = |source| DescriptionError::Read { path: path.to_owned(), source };
    if std::fs::metadata(path).map_err(read)?.len() > MAX_DESCRIPTION_BYTES {
        return Err(DescriptionError::TooLarge { path: path.to_owned() });
    }
    let text = std::fs::read_to_string(path).map_err(read)?;
    let epoch = match std::env::var(EPOCH_VARIABLE) {
        Ok(text) => text.trim().parse().map_err(|_| DescriptionError::Epoch { text })?,
        Err(_) => 0,
    };
    parse(&text, path, epoch)
}

/// Checks the text of an `imageset.toml`; `path` names it in errors and its directory is the base of its sources.
///
/// # Errors
/// If the text is not an ImageSet's, or the set has problems.
pub fn parse(text: &str, path: &Path, epoch: u64) -> Result<SetSource, DescriptionError> {
    let file: File = toml::from_str(text).map_err(|error| syntax(text, path, &error))?;
    let set = ImageSet {
        name: file.name,
        version: file.version,
        mode: file.mode,
        init: file.init,
        watch_s: file.watch_s,
        images: file.images.iter().map(|image| Image { name: image.name.clone() }).collect(),
        containers: file.containers,
    };
    let mut problems = set.problems();
    for image in &file.images {
        image.problems(&mut problems);
    }
    if !problems.is_empty() {
        return Err(DescriptionError::Problems { path: path.to_owned(), problems });
    }
    let base = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
        _ => PathBuf::from("."),
    };
    Ok(SetSource { set, images: file.images, base, epoch })
}

impl ImageSource {
    /// The architecture of what is made here.
    #[must_use]
    pub fn architecture(&self) -> &str {
        self.architecture.as_deref().unwrap_or("amd64")
    }

    /// Whether the image is its source as it is: no key changes its configuration.
    #[must_use]
    pub fn is_unchanged(&self) -> bool {
        self.entrypoint.is_none()
            && self.cmd.is_none()
            && self.env.is_empty()
            && self.user.is_none()
            && self.workdir.is_none()
            && self.labels.is_empty()
            && self.stop_signal.is_none()
    }

    fn problems(&self, problems: &mut Vec<String>) {
        let mut say = |text: String| problems.push(format!("image `{}`: {text}", self.name));
        for (number, kind) in self.mount.iter().enumerate() {
            if self.mount.iter().take(number).any(|other| other.form() == kind.form()) {
                say(format!("`mount` has two file systems of the form {}", kind.form()));
            }
        }
        if self.sources.is_empty() {
            say("`source` is an empty list".to_owned());
        }
        for key in self.env.keys() {
            if key.is_empty() || key.contains(['=', '\0']) {
                say(format!("env key `{key}` is not a variable name"));
            }
        }
        if self.workdir.as_deref().is_some_and(|dir| !dir.starts_with('/')) {
            say("workdir must be an absolute path".to_owned());
        }
        if let Some(signal) = &self.stop_signal
            && signal_number(signal).is_none()
        {
            say(format!("stop_signal `{signal}` is not a signal such as SIGTERM or SIGRTMIN+3"));
        }
        let word = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
        let architecture = self.architecture();
        if architecture.is_empty() || !architecture.bytes().all(word) {
            say(format!("architecture `{architecture}` is not of the form amd64 or arm64"));
        }
        let debian = self.sources.iter().any(|source| matches!(source, Source::Debian(_)));
        let unused = self.packages.is_empty() && self.mirrors.is_empty() && self.variant.is_none();
        if !debian && !unused {
            say("packages, variant and mirrors are of a debian: source, and there is none"
                .to_owned());
        }
        for package in self.packages.iter().filter(|package| !is_package(package)) {
            say(format!("`{package}` is not the name of a package"));
        }
        for mirror in self.mirrors.iter().filter(|mirror| !is_mirror(mirror)) {
            say(format!("mirror `{mirror}` is neither a URL, a deb line nor an absolute path"));
        }
        if let Some(variant) = &self.variant
            && !VARIANTS.contains(&variant.as_str())
        {
            say(format!("variant `{variant}` is none of {}", VARIANTS.join(", ")));
        }
        let most = self.compression.highest_level();
        if self.compression_level.is_some_and(|level| level == 0 || level > most) {
            say(format!("compression_level must be 1 to {most}"));
        }
    }
}

/// A text, or a list of texts, each of which is read.
fn one_or_many<'de, D, T>(deserializer: D) -> Result<Vec<T>, D::Error>
where
    D: Deserializer<'de>,
    T: FromStr<Err: fmt::Display>,
{
    struct OneOrMany<T>(PhantomData<T>);

    impl<'de, T: FromStr<Err: fmt::Display>> Visitor<'de> for OneOrMany<T> {
        type Value = Vec<T>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a text such as \"dir:rootfs\", or a list of them")
        }

        fn visit_str<E: de::Error>(self, text: &str) -> Result<Self::Value, E> {
            Ok(vec![text.parse().map_err(E::custom)?])
        }

        fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Self::Value, A::Error> {
            let mut found = Vec::new();
            while let Some(text) = items.next_element::<String>()? {
                found.push(text.parse().map_err(de::Error::custom)?);
            }
            Ok(found)
        }
    }

    deserializer.deserialize_any(OneOrMany(PhantomData))
}

fn syntax(text: &str, path: &Path, error: &toml::de::Error) -> DescriptionError {
    let start = error.span().map_or(0, |span| span.start);
    let before = text.get(..start).unwrap_or(text);
    let line_start = before.rfind('\n').map_or(0, |at| at + 1);
    let line_text = text.get(line_start..).and_then(|rest| rest.lines().next()).unwrap_or("");
    DescriptionError::Syntax {
        path: path.to_owned(),
        line: before.matches('\n').count() + 1,
        column: before.get(line_start..).unwrap_or("").chars().count() + 1,
        // What is missing stands nowhere: the span is that of its whole section.
        key: key_of(line_text).filter(|_| !error.message().starts_with("missing field")),
        message: error.message().replace('\n', "; "),
    }
}

/// The key that a line of TOML sets, if it sets one.
fn key_of(line: &str) -> Option<String> {
    let key = line.split_once('=')?.0.trim();
    let inner = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.' | '"');
    (!key.is_empty() && key.chars().all(inner)).then(|| key.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = r#"name = "hello"
version = "1"

[[image]]
name = "hello"
source = ["binary:../hello", "dir:rootfs"]
entrypoint = ["/hello"]
compression = "zstd"

[[container]]
name = "hello"
image = "hello"
"#;

    fn read(text: &str) -> Result<SetSource, DescriptionError> {
        parse(text, Path::new("set/imageset.toml"), 0)
    }

    #[test]
    fn a_good_description_is_read() {
        let set = read(GOOD).expect("good");
        assert_eq!(set.base, Path::new("set"));
        assert_eq!(set.images[0].sources.len(), 2);
        assert_eq!(set.images[0].compression, Compression::Zstd);
        assert_eq!(set.images[0].architecture(), "amd64");
        let one = GOOD.replace(r#"["binary:../hello", "dir:rootfs"]"#, r#""dir:rootfs""#);
        assert_eq!(read(&one).expect("one").images[0].sources, [Source::Dir("rootfs".into())]);
    }

    #[track_caller]
    fn wrong(from: &str, to: &str, expected: &[&str]) {
        let text = GOOD.replacen(from, to, 1);
        assert_ne!(text, GOOD, "the change changes nothing");
        let error = read(&text).expect_err(to).to_string();
        for part in expected {
            assert!(error.contains(part), "`{part}` is not in: {error}");
        }
        assert!(!error.contains('\n'), "{error}");
    }

    #[test]
    fn each_mistake_names_file_line_column_and_key() {
        wrong("version", "colour", &["set/imageset.toml:2:1: key `colour`", "unknown field"]);
        wrong("entrypoint", "entry", &["imageset.toml:7:1: key `entry`", "unknown field"]);
        wrong("\"1\"", "1", &["imageset.toml:2:11: key `version`", "invalid type: integer"]);
        wrong("\"hello\"", "\"He llo\"", &["imageset.toml:1:8: key `name`", "not a valid name"]);
        wrong("\"zstd\"", "\"xz\"", &["imageset.toml:8:15: key `compression`", "unknown variant"]);
        wrong("dir:rootfs", "rootfs", &["imageset.toml:6:10: key `source`", "dir:PATH"]);
        wrong("name = \"hello\"\n", "name = hello\n", &["imageset.toml:1:"]);
        wrong("version = \"1\"\n", "", &["imageset.toml:1:1: missing field `version`"]);
        wrong("[[container]]\nname", "[[container]]\ncolour = 1\nname", &[":11:1: key `colour`"]);
    }

    #[test]
    fn each_problem_is_named_with_its_image() {
        wrong("entrypoint", "workdir = \"srv\"\nentrypoint", &["image `hello`: workdir"]);
        wrong("entrypoint", "stop_signal = \"X\"\nentrypoint", &["image `hello`: stop_signal `X`"]);
        wrong("entrypoint", "architecture = \"x/y\"\nentrypoint", &["architecture `x/y`"]);
        wrong("entrypoint", "packages = [\"-x\"]\nentrypoint", &["there is none", "`-x` is not"]);
        wrong("entrypoint", "variant = \"huge\"\nentrypoint", &["variant `huge` is none of"]);
        let twice = "mount = [\"erofs\", \"erofs-plain\"]\nentrypoint";
        wrong("entrypoint", twice, &["image `hello`: `mount` has two file systems"]);
        wrong("entrypoint", "mount = \"ext4\"\nentrypoint", &["key `mount`", "`ext4` is not"]);
        wrong("entrypoint", "mirrors = [\"x\"]\nentrypoint", &["mirror `x` is neither"]);
        wrong("entrypoint", "compression_level = 20\nentrypoint", &["compression_level", "19"]);
        wrong("image = \"hello\"", "image = \"other\"", &["wants image `other`"]);
        wrong(r#"["binary:../hello", "dir:rootfs"]"#, "[]", &["`source` is an empty list"]);
    }

    #[test]
    fn every_example_is_a_good_description() {
        let examples = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples");
        for (folder, name) in [
            ("hello/v1", "hello"),
            ("hello/v2", "hello"),
            ("pivot", "pivot"),
            ("debian-systemd", "debian-systemd"),
        ] {
            let set = load(&examples.join(folder).join("imageset.toml")).expect(folder);
            assert_eq!(set.set.name.as_str(), name);
        }
    }

    #[test]
    fn a_missing_file_is_named() {
        let error = load(Path::new("/nowhere/imageset.toml")).expect_err("missing").to_string();
        assert_eq!(error, "cannot read /nowhere/imageset.toml");
    }

    proptest::proptest! {
        #[test]
        fn damaged_descriptions_never_panic(at in 0..GOOD.len(), byte: char) {
            let mut text = GOOD.to_owned();
            text.replace_range(at..=at, &byte.to_string());
            let _ = read(&text);
        }
    }
}
