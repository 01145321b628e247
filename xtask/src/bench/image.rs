//! The image that is pulled: a Debian system of about 460 MB unpacked, as six gzip layers and as one, in an OCI layout,
//! made once and kept under `target/bench/`.
//!
//! mmdebstrap makes the system; what its package database says is required goes to the lowest layer with everything
//! that no package owns, the other packages go by name to the five above it. GNU tar and gzip make the layers, so that
//! nothing of ours had a hand in what is measured.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use super::measure::Bench;

/// Where the registry listens, in the namespace.
pub(super) const REGISTRY: &str = "127.0.0.1:5000";
/// Changes when the image is made in another way: the old one is then not used any more.
const RECIPE: &str = "pull-image-1";
/// Debian's release and where it comes from.
const SUITE: [&str; 2] = ["bookworm", "http://deb.debian.org/debian"];
/// What is in it beside the required packages: a system with the tools of an ordinary server.
const PACKAGES: &str = "systemd-sysv,dbus,udev,openssh-server,python3,git,vim,curl,ca-certificates,iproute2,locales,\
                        binutils,nginx-light";
/// Times are cut to this, seconds since 1970, so that the same packages give the same layers.
const EPOCH: u64 = 1_700_000_000;
/// Layers above the lowest.
const UPPER: usize = 5;
/// The set's version, and the name of its image: the image alone is tagged with both.
const VERSION: &str = "1";
const IMAGE: &str = "system";

/// How the image is cut into layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Variant {
    Six,
    One,
}

impl Variant {
    pub(super) const ALL: [Self; 2] = [Self::Six, Self::One];

    /// Name of its ImageSet.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Six => "bench-six",
            Self::One => "bench-one",
        }
    }
}

/// The image, made.
#[derive(Debug)]
pub(super) struct Image {
    dir: PathBuf,
    facts: Value,
}

impl Image {
    /// The image in this cache; made when it is not there, which takes minutes and Debian's mirror.
    ///
    /// # Errors
    /// When it cannot be made.
    pub(super) fn ensure(cache: &Path) -> Result<Self> {
        let dir = cache.join(RECIPE);
        let facts = dir.join("facts.json");
        if !facts.exists() {
            eprintln!("making the image below {} (minutes, once)", dir.display());
            if dir.exists() {
                fs::remove_dir_all(&dir).with_context(|| dir.display().to_string())?;
            }
            fs::create_dir_all(dir.join("layout/blobs/sha256")).context("making the cache")?;
            let made = make(&dir)?;
            fs::write(&facts, serde_json::to_vec_pretty(&made)?).context("facts.json")?;
        }
        let text = fs::read(&facts).with_context(|| facts.display().to_string())?;
        let facts = serde_json::from_slice(&text).context("facts.json")?;
        Ok(Self { dir, facts })
    }

    /// Pushes both variants to the registry at [`REGISTRY`], unless they were pushed to this one before.
    /// `layercake` builds the program that pushes.
    ///
    /// # Errors
    /// When pushing fails.
    pub(super) fn push(
        &self,
        bench: &Bench,
        layercake: impl FnOnce() -> Result<PathBuf>,
        registry: &Path,
    ) -> Result<()> {
        let stamp = registry.join("pushed");
        if stamp.exists() {
            return Ok(());
        }
        let layercake = layercake()?;
        let program = layercake.to_str().context("a path that is not UTF-8")?;
        for variant in Variant::ALL {
            let (name, file) = (variant.name(), self.description(variant)?);
            let file = file.to_str().context("a path that is not UTF-8")?;
            let to = format!("http://{REGISTRY}");
            eprintln!("pushing {name} to docker-registry (once)");
            bench.run(program, &["imageset", "push", file, "--to", &to])?;
        }
        fs::write(&stamp, "").with_context(|| stamp.display().to_string())
    }

    /// Its ImageSet in six layers, in an OCI layout, built by this `layercake` unless it was before.
    ///
    /// # Errors
    /// When it cannot be built.
    pub(super) fn set_layout(&self, layercake: &Path) -> Result<PathBuf> {
        let (name, layout) = (Variant::Six.name(), self.dir.join("set"));
        if !layout.exists() {
            let file = self.description(Variant::Six)?;
            eprintln!("building {name} into an OCI layout (once)");
            let mut build = Command::new(layercake);
            build.args(["imageset", "build"]).arg(file).arg("--out").arg(&layout);
            run(build.stdout(Stdio::null()))?;
        }
        Ok(layout)
    }

    /// Writes the description of a variant's ImageSet.
    fn description(&self, variant: Variant) -> Result<PathBuf> {
        let name = variant.name();
        let file = self.dir.join(format!("{name}.toml"));
        let text = format!(
            "name = {name:?}\nversion = {VERSION:?}\n\n[[image]]\nname = {IMAGE:?}\n\
             source = \"oci:layout:{name}\"\n\n[[container]]\nname = {IMAGE:?}\nimage = {IMAGE:?}\n"
        );
        fs::write(&file, text).with_context(|| file.display().to_string())?;
        Ok(file)
    }

    /// Where it is kept.
    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    /// Where the registry keeps it.
    pub(super) fn registry_dir(&self) -> PathBuf {
        self.dir.join("registry")
    }

    /// The ImageSet, as the agent takes it.
    pub(super) fn reference(variant: Variant) -> String {
        format!("http://{}", Self::of_set(variant, VERSION))
    }

    /// The image alone, as every OCI tool takes it.
    pub(super) fn tagged(variant: Variant) -> String {
        Self::of_set(variant, &format!("{VERSION}-{IMAGE}"))
    }

    fn of_set(variant: Variant, tag: &str) -> String {
        format!("{REGISTRY}/{}:{tag}", variant.name())
    }

    /// The digests of its layers' blobs, in hexadecimal.
    pub(super) fn digests(&self, variant: Variant) -> Vec<String> {
        let digests = self.facts["layers"][variant.name()].as_array();
        digests.into_iter().flatten().filter_map(Value::as_str).map(str::to_owned).collect()
    }

    /// The files of its layers' blobs.
    pub(super) fn blobs(&self, variant: Variant) -> Vec<PathBuf> {
        let dir = self.dir.join("layout/blobs/sha256");
        self.digests(variant).iter().map(|hex| dir.join(hex)).collect()
    }

    /// The URLs of its layers' blobs.
    pub(super) fn blob_urls(&self, variant: Variant) -> Vec<String> {
        let base = format!("http://{REGISTRY}/v2/{}/blobs/sha256:", variant.name());
        self.digests(variant).iter().map(|hex| format!("{base}{hex}")).collect()
    }

    /// Everything as one uncompressed archive.
    pub(super) fn plain_tar(&self) -> PathBuf {
        self.dir.join("one.tar")
    }

    /// What it is, in a sentence.
    pub(super) fn describe(&self) -> Result<String> {
        let mut wire = 0;
        for blob in self.blobs(Variant::Six) {
            wire += fs::metadata(&blob).with_context(|| blob.display().to_string())?.len();
        }
        Ok(format!(
            "Debian {} by mmdebstrap: {} packages, {} paths, {} MB of tar, {} MB in {} gzip layers",
            SUITE[0],
            self.facts["packages"],
            self.facts["paths"],
            fs::metadata(self.plain_tar()).context("one.tar")?.len() / 1_000_000,
            wire / 1_000_000,
            self.digests(Variant::Six).len(),
        ))
    }
}

fn make(dir: &Path) -> Result<Value> {
    let root = dir.join("root");
    let mut build = Command::new("mmdebstrap");
    build.args(["--mode=root", "--variant=minbase", "--quiet", "--include", PACKAGES, SUITE[0]]);
    run(build.arg(&root).arg(SUITE[1]).env("SOURCE_DATE_EPOCH", EPOCH.to_string()))?;
    let packages = packages(&root)?;
    let layers = assign(&root, &packages)?;
    let paths: usize = layers.iter().map(BTreeSet::len).sum();
    let layout = dir.join("layout");
    let mut six = Vec::new();
    for (number, paths) in layers.iter().enumerate() {
        let tar = dir.join(format!("layer-{number}.tar"));
        archive(&root, paths, &tar)?;
        six.push(layer(&layout, &tar)?);
        fs::remove_file(&tar).with_context(|| tar.display().to_string())?;
    }
    let all: BTreeSet<PathBuf> = layers.into_iter().flatten().collect();
    let tar = dir.join("one.tar");
    archive(&root, &all, &tar)?;
    let one = vec![layer(&layout, &tar)?];
    fs::remove_dir_all(&root).context("removing the root")?;
    let mut entries = Vec::new();
    let mut digests = BTreeMap::new();
    for (variant, layers) in [(Variant::Six, six), (Variant::One, one)] {
        let hexes: Vec<String> = layers.iter().map(|layer| layer.hex.clone()).collect();
        entries.push(image(&layout, variant.name(), &layers)?);
        digests.insert(variant.name(), hexes);
    }
    let index = json!({ "schemaVersion": 2, "manifests": entries });
    write(&layout.join("index.json"), &index)?;
    write(&layout.join("oci-layout"), &json!({ "imageLayoutVersion": "1.0.0" }))?;
    Ok(json!({ "packages": packages.len(), "paths": paths, "layers": digests }))
}

/// An installed package.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Package {
    /// As its file list is named.
    name: String,
    required: bool,
    /// Installed size, KiB.
    size: u64,
}

fn packages(root: &Path) -> Result<Vec<Package>> {
    let mut query = Command::new("dpkg-query");
    query.arg(format!("--admindir={}", root.join("var/lib/dpkg").display())).arg("-W");
    let format = "${binary:Package} ${Priority} ${Essential} ${Installed-Size}\\n";
    let said = output(query.args(["-f", format]))?;
    said.lines().map(package).collect()
}

fn package(line: &str) -> Result<Package> {
    match line.split(' ').collect::<Vec<_>>()[..] {
        [name, priority, essential, size] => Ok(Package {
            name: name.to_owned(),
            required: priority == "required" || essential == "yes",
            size: size.parse().with_context(|| line.to_owned())?,
        }),
        _ => bail!("dpkg-query: {line}"),
    }
}

/// Which layer each package goes to, 0 the lowest: the others in order of their names, about the same size each.
fn layers_of(packages: &[Package]) -> BTreeMap<&str, usize> {
    let total: u64 = packages.iter().filter(|it| !it.required).map(|it| it.size).sum();
    let share = total / UPPER as u64 + 1;
    let mut before = 0;
    let mut layers = BTreeMap::new();
    for package in packages {
        if package.required {
            layers.insert(package.name.as_str(), 0);
            continue;
        }
        let layer = usize::try_from(before / share).unwrap_or(0).min(UPPER - 1) + 1;
        layers.insert(package.name.as_str(), layer);
        before += package.size;
    }
    layers
}

/// The paths of every layer, relative to the root. A directory is in each layer that has something in it.
fn assign(root: &Path, packages: &[Package]) -> Result<Vec<BTreeSet<PathBuf>>> {
    let mut owner: BTreeMap<PathBuf, usize> = BTreeMap::new();
    for (name, layer) in layers_of(packages) {
        let list = root.join(format!("var/lib/dpkg/info/{name}.list"));
        let text = fs::read_to_string(&list).with_context(|| list.display().to_string())?;
        for line in text.lines() {
            // The lists name what lies behind the links of a merged /usr by its old place.
            let old = Path::new(line.trim_start_matches('/'));
            let merged = ["bin", "sbin", "lib", "lib64"].iter().any(|dir| old.starts_with(dir));
            owner.insert(if merged { Path::new("usr").join(old) } else { old.into() }, layer);
        }
    }
    let mut layers = vec![BTreeSet::new(); UPPER + 1];
    let mut stack = vec![PathBuf::new()];
    while let Some(dir) = stack.pop() {
        let full = root.join(&dir);
        for entry in fs::read_dir(&full).with_context(|| full.display().to_string())? {
            let entry = entry?;
            let path = dir.join(entry.file_name());
            let is_dir = entry.file_type()?.is_dir();
            let layer = owner.get(&path).copied().unwrap_or(0);
            let paths: &mut BTreeSet<PathBuf> = layers.get_mut(layer).context("a layer")?;
            paths.extend(path.ancestors().map(Path::to_path_buf));
            if is_dir {
                stack.push(path);
            }
        }
    }
    for paths in &mut layers {
        paths.remove(Path::new(""));
    }
    Ok(layers)
}

/// Writes these paths as a tar, in their order, with the numbers of owners and PAX records only where they are needed.
fn archive(root: &Path, paths: &BTreeSet<PathBuf>, tar: &Path) -> Result<()> {
    let list = tar.with_extension("list");
    let mut names = Vec::new();
    for path in paths {
        names.extend_from_slice(path.as_os_str().as_bytes());
        names.push(0);
    }
    fs::write(&list, names).with_context(|| list.display().to_string())?;
    let mut command = Command::new("tar");
    command.args(["--create", "--format=posix", "--pax-option=delete=atime,delete=ctime"]);
    command.args(["--xattrs", "--numeric-owner", "--no-recursion", "--clamp-mtime"]);
    command.arg(format!("--mtime=@{EPOCH}")).arg("--file").arg(tar).arg("--directory").arg(root);
    run(command.args(["--null", "--verbatim-files-from"]).arg("--files-from").arg(&list))?;
    fs::remove_file(&list).with_context(|| list.display().to_string())
}

#[derive(Debug)]
struct Layer {
    hex: String,
    size: u64,
    diff_id: String,
}

/// Compresses a tar into the layout.
fn layer(layout: &Path, tar: &Path) -> Result<Layer> {
    let compressed = tar.with_extension("tar.gz");
    let file = fs::File::create(&compressed).with_context(|| compressed.display().to_string())?;
    run(Command::new("gzip").args(["-6", "--no-name", "--stdout"]).arg(tar).stdout(file))?;
    let (hex, diff_id) = (sha256(&compressed)?, sha256(tar)?);
    let size = fs::metadata(&compressed).context("the layer")?.len();
    fs::rename(&compressed, layout.join("blobs/sha256").join(&hex)).context("the layer")?;
    Ok(Layer { hex, size, diff_id })
}

/// Writes config and manifest of an image, and gives its entry for the index.
fn image(layout: &Path, name: &str, layers: &[Layer]) -> Result<Value> {
    let diff_ids = layers.iter().map(|layer| format!("sha256:{}", layer.diff_id));
    let config = json!({
        "architecture": "amd64", "os": "linux", "config": { "Cmd": ["/bin/true"] },
        "rootfs": { "type": "layers", "diff_ids": diff_ids.collect::<Vec<_>>() },
    });
    let descriptor = |media: &str, hex: &str, size: u64| json!({ "mediaType": media, "digest": format!("sha256:{hex}"), "size": size });
    let (config, size) = blob(layout, &config)?;
    let config = descriptor("application/vnd.oci.image.config.v1+json", &config, size);
    let media = "application/vnd.oci.image.layer.v1.tar+gzip";
    let layers: Vec<Value> =
        layers.iter().map(|layer| descriptor(media, &layer.hex, layer.size)).collect();
    let media = "application/vnd.oci.image.manifest.v1+json";
    let manifest =
        json!({ "schemaVersion": 2, "mediaType": media, "config": config, "layers": layers });
    let (manifest, size) = blob(layout, &manifest)?;
    let mut entry = descriptor(media, &manifest, size);
    entry["annotations"] = json!({ "org.opencontainers.image.ref.name": name });
    entry["platform"] = json!({ "architecture": "amd64", "os": "linux" });
    Ok(entry)
}

/// Keeps a document as a blob.
fn blob(layout: &Path, document: &Value) -> Result<(String, u64)> {
    let temporary = layout.join("document");
    write(&temporary, document)?;
    let (hex, size) = (sha256(&temporary)?, fs::metadata(&temporary).context("a document")?.len());
    fs::rename(&temporary, layout.join("blobs/sha256").join(&hex)).context("a document")?;
    Ok((hex, size))
}

fn write(path: &Path, document: &Value) -> Result<()> {
    let bytes = serde_json::to_vec(document)?;
    fs::write(path, bytes).with_context(|| path.display().to_string())
}

fn sha256(path: &Path) -> Result<String> {
    let said = output(Command::new("sha256sum").arg("--binary").arg(path))?;
    let hex = said.split(' ').next().unwrap_or_default().to_owned();
    ensure!(hex.len() == 64, "sha256sum said: {said}");
    Ok(hex)
}

fn run(command: &mut Command) -> Result<()> {
    let line = format!("{command:?}");
    let status = command.stdin(Stdio::null()).status().with_context(|| line.clone())?;
    ensure!(status.success(), "{line}: {status}");
    Ok(())
}

fn output(command: &mut Command) -> Result<String> {
    let line = format!("{command:?}");
    let output = command.stdin(Stdio::null()).output().with_context(|| line.clone())?;
    ensure!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn required_packages_lie_lowest_and_the_others_in_five_even_layers() {
        let lines = (0..20).map(|number| format!("p{number:02} optional no 10"));
        let lines = ["libc6:amd64 optional no 10", "tar required yes 999"]
            .map(str::to_owned)
            .into_iter()
            .chain(lines);
        let packages: Vec<Package> = lines.map(|line| package(&line).expect("package")).collect();
        let layers = layers_of(&packages);
        assert_eq!(layers["tar"], 0);
        assert_eq!(layers["libc6:amd64"], 1);
        assert_eq!(layers["p19"], UPPER);
        for layer in 1..=UPPER {
            let size = layers.values().filter(|it| **it == layer).count();
            assert!((3..=5).contains(&size), "layer {layer} has {size}");
        }
        assert!(package("half a line").is_err());
    }

    #[test]
    fn what_a_package_owns_goes_to_its_layer_with_its_directories() {
        let dir =
            std::env::temp_dir().join(format!("layercake-bench-image.{}", std::process::id()));
        for (path, text) in [
            ("var/lib/dpkg/info/a.list", "/.\n/lib\n/lib/a\n"),
            ("usr/lib/a", "a"),
            ("etc/nobody", "generated"),
        ] {
            let path = dir.join(path);
            fs::create_dir_all(path.parent().expect("parent")).expect("directory");
            fs::write(path, text).expect("file");
        }
        let layers = assign(&dir, &[package("a optional no 1").expect("package")]).expect("layers");
        let names = |layer: usize| -> Vec<String> {
            layers[layer].iter().map(|path| path.display().to_string()).collect()
        };
        assert_eq!(names(1), ["usr", "usr/lib", "usr/lib/a"]);
        assert!(names(0).contains(&"etc/nobody".to_owned()));
        assert!(!names(0).contains(&"usr/lib/a".to_owned()));
        fs::remove_dir_all(&dir).expect("clean");
    }
}
