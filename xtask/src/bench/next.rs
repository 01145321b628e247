//! What comes after a node's first pull: the next version, which differs in one small layer, and a pull with nothing to do.

use std::fs;
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result, ensure};

use super::figures::{Figure, Samples, Way};
use super::image::{Image, REGISTRY, Variant};
use super::measure::Bench;
use super::peers::{Job, argv};

/// The set, and the versions of it that follow each other.
const SET: &str = "bench-next";
const VERSIONS: [&str; 2] = ["1", "2"];
/// Size of the layer that differs, in bytes; it does not compress well.
const CHANGED: usize = 64 << 10;
/// The most that the second version may cost, beside the first.
const GOAL: f64 = 0.1;
/// The most milliseconds that nothing may take.
const NOTHING_MS: f64 = 20.0;

/// What was measured.
#[derive(Debug, Default)]
pub(super) struct Next {
    first: Way,
    second: Way,
    nothing_ms: Samples,
    requests: Samples,
}

/// Pushes both versions, unless they were pushed to this registry before: the six layers and a small one above them.
///
/// # Errors
/// When pushing fails.
pub(super) fn push(
    bench: &Bench,
    image: &Image,
    layercake: impl FnOnce() -> Result<std::path::PathBuf>,
) -> Result<()> {
    let (dir, stamp) = (image.dir(), image.registry_dir().join("pushed-next"));
    if stamp.exists() {
        return Ok(());
    }
    let layercake = layercake()?;
    let program = layercake.to_str().context("a path that is not UTF-8")?;
    let written = |path: &Path, bytes: &[u8]| {
        fs::write(path, bytes).with_context(|| path.display().to_string())
    };
    for (number, version) in VERSIONS.into_iter().enumerate() {
        let small = dir.join(format!("small-{version}/etc"));
        fs::create_dir_all(&small).with_context(|| small.display().to_string())?;
        let mut state = 0x9e37_79b9_7f4a_7c15_u64 + number as u64;
        let noise = std::iter::repeat_with(|| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            state.to_be_bytes()[0]
        });
        written(&small.join("changed"), &noise.take(CHANGED).collect::<Vec<u8>>())?;
        let file = dir.join(format!("{SET}-{version}.toml"));
        let text = format!(
            "name = {SET:?}\nversion = {version:?}\n\n[[image]]\nname = \"system\"\nsource = [\"oci:layout:{}\", \
             \"dir:small-{version}\"]\n\n[[container]]\nname = \"system\"\nimage = \"system\"\n",
            Variant::Six.name()
        );
        written(&file, text.as_bytes())?;
        let file = file.to_str().context("a path that is not UTF-8")?;
        eprintln!("pushing {SET}:{version} to docker-registry (once)");
        bench.run(program, &["imageset", "push", file, "--to", &format!("http://{REGISTRY}")])?;
    }
    written(&stamp, b"")
}

impl Next {
    /// One round: version 1 into an empty store, version 2 into the same, version 2 again.
    ///
    /// # Errors
    /// When a pull fails, or the last one fetches something.
    pub(super) fn round(&mut self, job: &Job<'_>) -> Result<()> {
        job.bench.fresh_tmpfs(job.place)?;
        let run = job.place.join("run").into_os_string();
        let run = run.to_str().context("a path that is not UTF-8")?;
        let words = |version: &str| -> Vec<String> {
            let reference = format!("http://{REGISTRY}/{SET}:{version}");
            ["pull", "--log", "warn", "--run-dir", run, &reference].map(str::to_owned).to_vec()
        };
        let ways = [&mut self.first, &mut self.second];
        for (way, version) in ways.into_iter().zip(VERSIONS) {
            let words = words(version);
            let words: Vec<&str> = words.iter().map(String::as_str).collect();
            super::pull::add(way, job.bench.measure(&argv(&[job.agent], &words))?);
        }
        let agent = job.agent.to_str().context("a path that is not UTF-8")?;
        let words = words(VERSIONS[1]);
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        let before = requests(job.bench)?;
        let begun = Instant::now();
        let said = job.bench.run(agent, &words)?;
        self.nothing_ms.0.push(begun.elapsed().as_secs_f64() * 1000.0);
        ensure!(said.contains(" 0 bytes fetched"), "a pull with nothing to do said: {said}");
        self.requests.0.push(requests(job.bench)? - before);
        Ok(())
    }

    /// The figures, for this bench.
    pub(super) fn figures(&self, bench: &'static str) -> Vec<Figure> {
        let (first, second) = (&self.first, &self.second);
        let mut figures = Vec::new();
        let mut beside = |what: &str, ours: &Samples, theirs: &Samples, goal| {
            figures.extend(Figure::beside(bench, what, (ours, theirs), "first pull", "s", goal));
        };
        let what = "second version with one changed layer, beside the first";
        beside(&format!("CPU, {what}"), &second.cpu_s, &first.cpu_s, Some(GOAL));
        beside(&format!("wall, {what}"), &second.wall_s, &first.wall_s, Some(GOAL));
        figures.extend(
            [
                Figure::below(
                    bench,
                    "nothing to do, from its start to its end",
                    &self.nothing_ms,
                    "ms",
                    NOTHING_MS,
                ),
                Figure::below(bench, "nothing to do, requests", &self.requests, "requests", 2.0),
            ]
            .into_iter()
            .flatten(),
        );
        figures
    }

    /// The rows of the table.
    pub(super) fn ways(&mut self) -> [&Way; 2] {
        self.first.name = "first version, empty store".to_owned();
        self.second.name = "second version, one changed layer".to_owned();
        [&self.first, &self.second]
    }
}

/// How many requests the registry has answered so far, by its log.
fn requests(bench: &Bench) -> Result<f64> {
    let log = bench.dir.join("registry.log");
    let text = fs::read_to_string(&log).with_context(|| log.display().to_string())?;
    let count =
        text.lines().filter(|line| line.contains("\"GET /v2/") || line.contains("\"HEAD /v2/"));
    Ok(f64::from(u32::try_from(count.count())?))
}
