//! `cargo xtask bench registry`: the embedded registry of `layercake serve` over plain HTTP. It serves blobs beside nginx, and
//! takes pushes beside Debian's docker-registry; everything lies on tmpfs. What fsync(2) costs is a push to a disk beside
//! the same push to tmpfs.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use tests::artifacts::workspace_root;
use tests::process::Process;
use tests::{prerequisites, wait};

use super::figures::{Figure, Samples, figures_table};
use super::image::{Image, REGISTRY, Variant};
use super::measure::{Bench, of_daemon};
use super::{load, peers};

/// The bench's name in its figures.
const NAME: &str = "registry";
/// Where ours listens, and nginx.
const OURS: &str = "127.0.0.1:8080";
const NGINX: &str = "127.0.0.1:8081";
/// How long a server may take to answer.
const START: Duration = Duration::from_secs(30);
/// Streams at a time, and the least part of nginx's rate that ours is to have.
const STREAMS: [(usize, f64); 2] = [(1, 0.9), (64, 0.7)];

/// The embedded registry over plain HTTP: serving blobs beside nginx, taking pushes beside docker-registry
///
/// The layers of `bench pull`, read at 1 and at 64 streams, and pushed one after the other; everything on tmpfs, the client
/// a load generator of this program's own. Needs root.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Args {
    /// How often each is measured
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..=1000))]
    rounds: u16,
    /// Seconds of reading in each round
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u64).range(1..=600))]
    seconds: u64,
    /// Print the figures as JSON, one a line; the table goes to stderr
    #[arg(long)]
    json: bool,
    /// Measure this `layercake` instead of building one
    #[arg(long, value_name = "FILE")]
    layercake: Option<PathBuf>,
}

/// Rates in MB/s, and what the servers worked for it in CPU seconds for each GB.
#[derive(Debug, Default)]
struct Side {
    rate: Samples,
    cpu: Samples,
}

/// What is measured by, and with.
struct Site<'a> {
    bench: &'a Bench,
    place: &'a Path,
    layercake: &'a Path,
    blobs: Vec<(String, PathBuf)>,
}

/// Runs the bench.
///
/// # Errors
/// What is missing or failed. A missed goal is none.
pub(crate) fn run(args: &Args) -> Result<()> {
    wait::handle_signals()?;
    ensure!(nix::unistd::geteuid().is_root(), "this bench needs root: it mounts a tmpfs");
    prerequisites::ensure(prerequisites::BENCH_PULL)?;
    prerequisites::ensure(&[prerequisites::Need::Nginx])?;
    let cache = workspace_root().join("target/bench");
    let image = Image::ensure(&cache)?;
    let bench = Bench::new(&cache)?;
    let layercake = super::layercake(args.layercake.as_deref())?;
    let place = cache.join("tmpfs");
    fs::create_dir_all(&place).with_context(|| place.display().to_string())?;
    let blobs = image.digests(Variant::Six).into_iter().zip(image.blobs(Variant::Six)).collect();
    let site = Site { bench: &bench, place: &place, layercake: &layercake, blobs };
    let version = |package: &str| bench.run("dpkg-query", &["-W", "-f", "${Version}", package]);
    let nginx = format!("nginx {}", version("nginx")?);
    let registry = format!("docker-registry {}", version("docker-registry")?);
    let mut figures = site.serving(args, &nginx)?;
    figures.extend(site.taking(args, &registry)?);
    let text = format!(
        "{}.\nMedians of {} rounds, interleaved; a rate's goal is the least that its ratio may be.\n\n{}",
        image.describe()?,
        args.rounds,
        figures_table(&figures)
    );
    super::print(&text, &figures, args.json);
    Ok(())
}

impl Site<'_> {
    /// Reading blobs from ours and from nginx.
    fn serving(&self, args: &Args, nginx_name: &str) -> Result<Vec<Figure>> {
        self.bench.fresh_tmpfs(self.place)?;
        let ours = self.start_ours(&self.place.join("ours"))?;
        self.inside(|| load::push(OURS, "bench", &self.blobs))?;
        let nginx = self.start_nginx()?;
        let paths: Vec<String> =
            self.blobs.iter().map(|(hex, _)| format!("/v2/bench/blobs/sha256:{hex}")).collect();
        let time = Duration::from_secs(args.seconds);
        let workers = descendants(nginx.pid())?;
        let mut figures = Vec::new();
        for (streams, goal) in STREAMS {
            let mut sides = [Side::default(), Side::default()];
            for round in 1..=args.rounds {
                eprintln!("{streams} streams, round {round} of {}", args.rounds);
                let servers = [(OURS, vec![ours.pid()]), (NGINX, workers.clone())];
                for (side, (address, pids)) in sides.iter_mut().zip(&servers) {
                    let before = cpu(pids)?;
                    let rate = self.inside(|| load::read(address, &paths, streams, time))?;
                    let gigabytes = rate * time.as_secs_f64() / 1e9;
                    side.cpu.0.push((cpu(pids)? - before) / gigabytes);
                    side.rate.0.push(rate / 1e6);
                    wait::check()?;
                }
            }
            let [ours, theirs] = &sides;
            let what = format!("blobs at {streams} streams");
            let rates = (&ours.rate, &theirs.rate);
            figures.extend(Figure::at_least(NAME, &what, rates, nginx_name, "MB/s", Some(goal)));
            let (what, pair) = (format!("{what}, server's CPU"), (&ours.cpu, &theirs.cpu));
            figures.extend(Figure::beside(NAME, &what, pair, nginx_name, "s/GB", None));
        }
        Ok(figures)
    }

    /// Pushing blobs to ours and to docker-registry, each time an empty one: on tmpfs, then on the disk of `target/`.
    fn taking(&self, args: &Args, peer: &str) -> Result<Vec<Figure>> {
        let disk = self.bench.dir.join("push-disk");
        let mut sides = [Side::default(), Side::default(), Side::default(), Side::default()];
        for round in 1..=args.rounds {
            eprintln!("pushes, round {round} of {}", args.rounds);
            for (number, side) in sides.iter_mut().enumerate() {
                self.bench.fresh_tmpfs(self.place)?;
                let data = if number < 2 { self.place.join("data") } else { disk.clone() };
                if disk.exists() {
                    fs::remove_dir_all(&disk).with_context(|| disk.display().to_string())?;
                }
                let (mut server, address) = match number % 2 {
                    0 => (self.start_ours(&data)?, OURS),
                    _ => (peers::start_registry(self.bench, &data)?, REGISTRY),
                };
                side.rate.0.push(self.inside(|| load::push(address, "bench", &self.blobs))? / 1e6);
                server.stop()?;
                wait::check()?;
            }
        }
        let [ours, theirs, our_disk, their_disk] = &sides;
        let mut figures = Vec::new();
        for (what, pair, peer, goal) in [
            ("pushes", (ours, theirs), peer, Some(1.0)),
            ("pushes to a disk; ours syncs, the peer does not", (our_disk, their_disk), peer, None),
            ("pushes to a disk with fsync, beside tmpfs", (our_disk, ours), "ours on tmpfs", None),
        ] {
            let rates = (&pair.0.rate, &pair.1.rate);
            figures.extend(Figure::at_least(NAME, what, rates, peer, "MB/s", goal));
        }
        Ok(figures)
    }

    fn inside<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        self.bench.namespace.entrance().inside(work)?
    }

    /// `layercake serve` with nothing but its registry.
    fn start_ours(&self, data: &Path) -> Result<Process> {
        let config = self.bench.dir.join("registry-ours.toml");
        let text = format!(
            "[server]\nlisten = {OURS:?}\nurl = \"http://{OURS}\"\ndata_dir = {data:?}\nlayer0_dir = {:?}\n",
            self.bench.dir
        );
        fs::write(&config, text).with_context(|| config.display().to_string())?;
        let args = ["serve".into(), "--config".into(), config.into_os_string()];
        let log = self.bench.dir.join("registry-ours.log");
        let process = Process::start(&self.bench.namespace, self.layercake, args, &log)?;
        self.answers(process, OURS)
    }

    /// nginx as Debian configures it for files: sendfile, a worker for each processor, no log.
    fn start_nginx(&self) -> Result<Process> {
        let root = self.place.join("nginx");
        let root_text = root.to_str().context("a path that is not UTF-8")?;
        let mut copy = format!(
            "set -e; mkdir -p '{root_text}/v2/bench/blobs'; touch '{root_text}/v2/index.html'\n"
        );
        for (hex, path) in &self.blobs {
            copy += &format!("cp '{}' '{root_text}/v2/bench/blobs/sha256:{hex}'\n", path.display());
        }
        self.bench.run("sh", &["-c", &copy])?;
        let config = self.bench.dir.join("nginx.conf");
        let log = self.bench.dir.join("nginx.log");
        let text = format!(
            "daemon off; user root; worker_processes auto; pid {root_text}/pid; error_log {} warn;\n\
             events {{ worker_connections 768; }}\n\
             http {{ access_log off; sendfile on; tcp_nopush on; default_type application/octet-stream;\n\
             client_body_temp_path {root_text}/a; proxy_temp_path {root_text}/b; fastcgi_temp_path {root_text}/c;\n\
             uwsgi_temp_path {root_text}/d; scgi_temp_path {root_text}/e;\n\
             server {{ listen {NGINX}; root {root_text}; }} }}\n",
            log.display()
        );
        fs::write(&config, text).with_context(|| config.display().to_string())?;
        let nginx = prerequisites::find_program("nginx").context("nginx is missing")?;
        let unshare = prerequisites::find_program("unshare").context("unshare is missing")?;
        // Its workers outlive a master that is killed: in a process namespace of its own they end with it.
        let own = ["--pid", "--fork", "--kill-child"].map(OsString::from);
        let words = [nginx.into_os_string(), "-c".into(), config.into_os_string()];
        let args = own.into_iter().chain(words);
        self.answers(Process::start(&self.bench.namespace, &unshare, args, &log)?, NGINX)
    }

    fn answers(&self, mut process: Process, address: &str) -> Result<Process> {
        let url = format!("http://{address}/v2/");
        wait::until(&format!("{address} to answer"), START, || {
            process.check_alive()?;
            Ok(self.bench.run("curl", &["-sSf", "-o", "/dev/null", &url]).ok())
        })?;
        Ok(process)
    }
}

/// The CPU seconds that processes have used so far.
fn cpu(pids: &[u32]) -> Result<f64> {
    pids.iter().map(|pid| Ok(of_daemon(*pid)?.cpu_s)).sum()
}

/// The processes that a process has started, and those that they have.
fn descendants(pid: u32) -> Result<Vec<u32>> {
    let path = format!("/proc/{pid}/task/{pid}/children");
    let text = fs::read_to_string(&path).with_context(|| path)?;
    let mut found = Vec::new();
    for child in text.split_whitespace() {
        let child = child.parse()?;
        found.push(child);
        found.extend(descendants(child)?);
    }
    Ok(found)
}
