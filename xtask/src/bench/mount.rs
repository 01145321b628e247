//! `cargo xtask bench mount`: the same image as `bench pull`, as file systems that are mounted instead of layers that are
//! unpacked: what each costs on the wire, to pull, and to read afterwards.
//!
//! The pull is the agent's own, to a tmpfs; mount(8) then mounts the blob by a loop device as the agent does from a tmpfs, and
//! its time counts. Work that the kernel does in threads of its own (EROFS decompresses in them) is in nobody's CPU
//! seconds: the wall time beside them shows it.

use std::ffi::OsString;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use tests::artifacts::workspace_root;
use tests::{prerequisites, wait};

use super::figures::{Figure, Samples, Way, figures_table, table};
use super::image::{Image, REGISTRY, Variant};
use super::measure::{Bench, Usage};
use super::options::Options;
use super::peers::{self, Job, Peer};
use crate::builds;

/// The bench's name in its figures.
const NAME: &str = "mount";
/// The most that our CPU seconds may be of podman's.
const PODMAN: f64 = 0.05;
/// The form that a node prefers: the goal is its.
const DEFAULT: &str = "squashfs";

/// The image as mounted file systems: wire bytes, pull and reading, beside the unpacked layers and podman pull
///
/// Needs what `bench pull` needs, mkfs.erofs and mksquashfs, and a kernel with EROFS, squashfs and loop devices. The file
/// systems are made once (minutes).
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Args {
    /// How often each is measured
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..=1000))]
    rounds: u16,
    #[command(flatten)]
    options: Options,
}

/// Everything that an image can say of a tree, as one digest: types, modes, owners, times, attributes, hard links, contents.
/// Not of its root, which these layers do not mention: a node dates it by its clock.
const TREE_DIGEST: &str = "tar --create --sort=name --numeric-owner --format=posix --xattrs --xattrs-include='*' \
    --xattrs-exclude='trusted.overlay.*' --pax-option=exthdr.name=%d/%f,delete=atime,delete=ctime --file=- \
    $(ls -A) | sha256sum";

/// A form of the image: the value of `--mount`, the file system, and what the table calls it.
#[derive(Debug, Clone, Copy)]
struct Form {
    mount: &'static str,
    file_system: &'static str,
    name: &'static str,
}

/// Debian 12's mkfs.erofs makes no EROFS with zstd.
const FORMS: [Form; 3] = [
    Form { mount: "squashfs", file_system: "squashfs", name: "squashfs zstd" },
    Form { mount: "erofs", file_system: "erofs", name: "EROFS lz4hc" },
    Form { mount: "erofs-plain", file_system: "erofs", name: "EROFS plain" },
];

impl Form {
    fn set(self) -> String {
        format!("bench-{}", self.mount)
    }
}

/// What was measured of one form.
#[derive(Debug, Default)]
struct Row {
    name: String,
    wire_mb: f64,
    pull: Way,
    read: Way,
}

impl Row {
    fn new(name: &str) -> Self {
        Self { name: name.to_owned(), ..Self::default() }
    }
}

/// Runs the bench.
///
/// # Errors
/// What is missing or failed. A missed goal is none.
pub(crate) fn run(args: &Args) -> Result<()> {
    wait::handle_signals()?;
    ensure!(nix::unistd::geteuid().is_root(), "this bench needs root: it mounts");
    prerequisites::ensure(prerequisites::BENCH_PULL)?;
    let known = fs::read_to_string("/proc/filesystems").context("/proc/filesystems")?;
    for form in FORMS {
        let there = known.split_whitespace().any(|word| word == form.file_system);
        ensure!(there, "this kernel cannot mount {0}: modprobe {0}", form.file_system);
    }
    let root = workspace_root();
    let agent = args.options.agent(&root)?;
    let cache = root.join("target/bench");
    let image = Image::ensure(&cache)?;
    let bench = Bench::new(&cache)?;
    let data = image.registry_dir();
    fs::create_dir_all(&data).with_context(|| data.display().to_string())?;
    let _registry = peers::start_registry(&bench, &data)?;
    image.push(&bench, || builds::server(false), &data)?;
    push(&bench, &data)?;
    let place = cache.join("tmpfs");
    fs::create_dir_all(&place).with_context(|| place.display().to_string())?;
    let job = Job { bench: &bench, image: &image, agent: &agent, place: &place };
    compare(&job)?;
    let (rows, podman) = measure(args, &job)?;
    let figures = figures(&rows, podman.as_ref());
    let text = format!(
        "{}.\nMedian (min-max). Pull: the agent's, mount(8) included. Read: every file once, nothing of it cached.\n\n{}\n{}",
        image.describe()?,
        forms_table(&rows, podman.as_ref()),
        figures_table(&figures)
    );
    if args.options.json {
        eprint!("{text}");
        figures.iter().for_each(|figure| println!("{}", figure.json()));
    } else {
        print!("{text}");
    }
    Ok(())
}

/// Pushes a set for each form, unless they were pushed to this registry before.
fn push(bench: &Bench, data: &Path) -> Result<()> {
    let dir = data.parent().context("a directory for the descriptions")?;
    for form in FORMS {
        let (set, stamp) = (form.set(), data.join(format!("pushed-{}", form.mount)));
        if stamp.exists() {
            continue;
        }
        let file = dir.join(format!("{set}.toml"));
        let source = format!("oci:layout:{}", Variant::Six.name());
        let text = format!(
            "name = {set:?}\nversion = \"1\"\n\n[[image]]\nname = \"system\"\nsource = {source:?}\n\
             mount = {:?}\n\n[[container]]\nname = \"system\"\nimage = \"system\"\n",
            form.mount
        );
        fs::write(&file, text).with_context(|| file.display().to_string())?;
        let program = builds::server(false)?;
        let program = program.to_str().context("a path that is not UTF-8")?;
        let file = file.to_str().context("a path that is not UTF-8")?;
        eprintln!("making the {} and pushing it (once)", form.name);
        bench.run(program, &["imageset", "push", file, "--to", &format!("http://{REGISTRY}")])?;
        fs::write(&stamp, "").with_context(|| stamp.display().to_string())?;
    }
    Ok(())
}

/// Every form mounted is the same tree as the layers, unpacked by the agent and laid over each other.
fn compare(job: &Job<'_>) -> Result<()> {
    let mut digests = Vec::new();
    job.bench.fresh_tmpfs(job.place)?;
    pull(job, "none", &Image::reference(Variant::Six), &mut Row::default())?;
    let layers: Vec<String> = job.image.digests(Variant::Six);
    let layers = layers.iter().rev().map(|hex| job.place.join("run/layers").join(hex));
    let layers: Vec<String> = layers.map(|path| path.display().to_string()).collect();
    let root = job.place.join("root");
    let root = root.to_str().context("path")?;
    job.bench.run("mkdir", &[root])?;
    let lower = format!("lowerdir={}", layers.join(":"));
    job.bench.run("mount", &["-t", "overlay", "-o", &lower, "overlay", root])?;
    let digest = || job.bench.run("sh", &["-e", "-c", &format!("cd {root} && {TREE_DIGEST}")]);
    digests.push(("layers", digest()?));
    for form in FORMS {
        mounted(job, form, &mut Row::default())?;
        digests.push((form.name, digest()?));
    }
    let (_, first) = &digests[0];
    ensure!(digests.iter().all(|(_, digest)| digest == first), "the trees differ: {digests:?}");
    eprintln!("every form is the same tree as the layers: {}", first.trim());
    Ok(())
}

fn measure(args: &Args, job: &Job<'_>) -> Result<(Vec<Row>, Option<Way>)> {
    let mut rows: Vec<Row> = FORMS.iter().map(|form| Row::new(form.name)).collect();
    let mut unpacked = Row::new("layers, unpacked");
    let mut podman = match args.options.without_peers {
        true => None,
        false => Some(Way { name: Peer::Podman.versions(job.bench)?, ..Way::default() }),
    };
    for round in 1..=args.rounds {
        eprintln!("round {round} of {}", args.rounds);
        for (form, row) in FORMS.iter().zip(&mut rows) {
            mounted(job, *form, row)?;
            wait::check()?;
        }
        job.bench.fresh_tmpfs(job.place)?;
        pull(job, "none", &Image::reference(Variant::Six), &mut unpacked)?;
        read(job, "run/layers", &mut unpacked)?;
        if let Some(way) = &mut podman {
            add(way, job.run(Peer::Podman, Variant::Six)?);
        }
        wait::check()?;
    }
    rows.push(unpacked);
    Ok((rows, podman))
}

/// One form from the registry to a mounted root, and then every file of it read.
fn mounted(job: &Job<'_>, form: Form, row: &mut Row) -> Result<()> {
    let bench = job.bench;
    bench.fresh_tmpfs(job.place)?;
    let reference = format!("http://{REGISTRY}/{}:1", form.set());
    pull(job, form.file_system, &reference, row)?;
    let (blobs, root) = (job.place.join("run/filesystems"), job.place.join("root"));
    let blob = bench.run("ls", &[blobs.to_str().context("path")?])?;
    let blob = blobs.join(blob.trim());
    bench.run("mkdir", &[root.to_str().context("path")?])?;
    let options = ["mount", "-t", form.file_system, "-o", "loop,ro"].map(OsString::from);
    let mount = bench.measure(&[&options[..], &[blob.into(), root.into()]].concat())?;
    for (samples, more) in
        [(&mut row.pull.cpu_s, mount.cpu_s), (&mut row.pull.wall_s, mount.wall_s)]
    {
        if let Some(last) = samples.0.last_mut() {
            *last += more;
        }
    }
    read(job, "root", row)
}

/// The agent's pull; what it fetched is on its last line.
fn pull(job: &Job<'_>, forms: &str, reference: &str, row: &mut Row) -> Result<()> {
    let run = job.place.join("run");
    let words = ["pull", "--log", "warn", "--mount-forms", forms, "--run-dir"].map(OsString::from);
    let mut argv = vec![job.agent.as_os_str().to_owned()];
    argv.extend(words);
    argv.extend([run.into_os_string(), reference.into()]);
    add(&mut row.pull, job.bench.measure(&argv)?);
    let said = fs::read_to_string(job.bench.dir.join("measured.log")).context("measured.log")?;
    row.wire_mb = fetched(&said).with_context(|| format!("the agent said: {said}"))? / 1e6;
    Ok(())
}

/// `NAME:VERSION DIGEST N bytes fetched`.
fn fetched(said: &str) -> Option<f64> {
    let line = said.lines().find(|line| line.ends_with(" bytes fetched"))?;
    line.trim_end_matches(" bytes fetched").rsplit(' ').next()?.parse().ok()
}

/// Reads every file below a directory of the place.
fn read(job: &Job<'_>, below: &str, row: &mut Row) -> Result<()> {
    let dir = job.place.join(below);
    let script = format!("find {} -type f -print0 | xargs -0 cat > /dev/null", dir.display());
    add(&mut row.read, job.bench.measure(&["sh", "-c", &script].map(OsString::from))?);
    Ok(())
}

fn add(way: &mut Way, usage: Usage) {
    way.cpu_s.0.push(usage.cpu_s);
    way.wall_s.0.push(usage.wall_s);
    way.peak_mib.0.push(usage.peak_mib);
}

fn figures(rows: &[Row], podman: Option<&Way>) -> Vec<Figure> {
    let mut figures = Vec::new();
    for row in rows {
        let Some(podman) = podman else { continue };
        let goal = (Some(row.name.as_str()) == name_of(DEFAULT)).then_some(PODMAN);
        let mut compare = |what: &str, pair: (&Samples, &Samples), goal| {
            let what = format!("{what}, {} beside podman pull", row.name);
            figures.extend(Figure::beside(NAME, &what, pair, &podman.name, "s", goal));
        };
        compare("CPU", (&row.pull.cpu_s, &podman.cpu_s), goal);
        compare("wall", (&row.pull.wall_s, &podman.wall_s), None);
    }
    figures
}

fn name_of(mount: &str) -> Option<&'static str> {
    FORMS.iter().find(|form| form.mount == mount).map(|form| form.name)
}

fn forms_table(rows: &[Row], podman: Option<&Way>) -> String {
    let head =
        ["form", "wire MB", "pull CPU s", "pull wall s", "peak MiB", "read CPU s", "read wall s"];
    let mut lines = vec![head.map(str::to_owned).to_vec()];
    for row in rows {
        lines.push(vec![
            row.name.clone(),
            format!("{:.1}", row.wire_mb),
            row.pull.cpu_s.cell(2),
            row.pull.wall_s.cell(2),
            row.pull.peak_mib.cell(1),
            row.read.cpu_s.cell(2),
            row.read.wall_s.cell(2),
        ]);
    }
    if let Some(way) = podman {
        let cells = [way.cpu_s.cell(2), way.wall_s.cell(2), way.peak_mib.cell(1)];
        let none = || "-".to_owned();
        lines.push([&[way.name.clone(), none()][..], &cells, &[none(), none()]].concat());
    }
    table(lines)
}

#[cfg(test)]
mod tests_of_figures {
    use super::*;

    #[test]
    fn the_preferred_form_alone_has_a_goal_beside_podman() {
        let way =
            |cpu| Way { cpu_s: Samples(vec![cpu]), wall_s: Samples(vec![cpu]), ..Way::default() };
        let mut rows: Vec<Row> = FORMS.iter().map(|form| Row::new(form.name)).collect();
        rows.iter_mut().for_each(|row| row.pull = way(1.0));
        let judged: Vec<(String, bool)> = figures(&rows, Some(&way(25.0)))
            .into_iter()
            .filter_map(|figure| Some((figure.figure, figure.met?)))
            .collect();
        assert_eq!(judged, [("CPU, squashfs zstd beside podman pull".to_owned(), true)]);
        assert!(figures(&rows, None).is_empty());
    }

    #[test]
    fn what_was_fetched_is_read_from_the_agent_s_line() {
        let said = "warn: something\nbench:1 sha256:aa 123456 bytes fetched\n";
        assert_eq!(fetched(said), Some(123_456.0));
        assert_eq!(fetched("nothing"), None);
    }
}
