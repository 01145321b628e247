//! What a container is to those it serves: held sockets, readiness, watchdog and health, with the real program as monitor.
//! Needs root. The program in the containers is this very test ([`play_service`]).

#[path = "containers/bench.rs"]
#[allow(dead_code, reason = "shared with the other tests of containers")]
mod bench;

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use agent::containers::sockets::obtain;
use agent::containers::{Adopted, Handle, HeldSockets, Spec, adopt};
use agent::health::{Sign, Watcher};
use bench::{Bench, LONG, kill, wait_until};
use protocol::imageset::{Health, Socket};

/// Set for this test when it is the program of a container.
const PLAY: &str = "LAYERCAKE_TEST_PLAY_SERVICE";

/// Not a test of its own: the program of the containers. Without the variable it does nothing. It does what the first line of
/// each connection to its first held socket says.
#[test]
fn play_service() {
    if std::env::var_os(PLAY).is_none() {
        return;
    }
    let variable = |key: &str| std::env::var(key).unwrap_or_default();
    assert_eq!(variable("LISTEN_PID"), std::process::id().to_string());
    let count: i32 = variable("LISTEN_FDS").parse().expect("LISTEN_FDS");
    let sockets: Vec<OwnedFd> = (3..3 + count)
        .map(|number| agent::sys::process::inherited_fd(number).expect("inherited"))
        .collect();
    let listener = TcpListener::from(sockets[0].try_clone().expect("clone"));
    let mut status = "200 OK";
    for stream in listener.incoming() {
        let mut stream = stream.expect("accept");
        let mut line = String::new();
        BufReader::new(&stream).read_line(&mut line).expect("line");
        let answer = match line.trim_end() {
            "names" => variable("LISTEN_FDNAMES"),
            "watchdog" => format!("{} {}", variable("WATCHDOG_USEC"), variable("WATCHDOG_PID")),
            "" => continue,
            #[expect(clippy::exit, reason = "the container's program ends so")]
            "exit" => std::process::exit(3),
            "sick" => {
                status = "503 Service Unavailable";
                String::new()
            }
            "well" => {
                status = "200 OK";
                String::new()
            }
            line if line.starts_with("GET ") => {
                // The rest of the head is on its way; closing on it would be a reset.
                drop(stream.set_read_timeout(Some(Duration::from_millis(20))));
                drop(stream.read(&mut [0; 1024]));
                format!("HTTP/1.1 {status}\r\ncontent-length: 0\r\n\r\n")
            }
            words => {
                let inbox = UnixDatagram::unbound().expect("socket");
                let words = words.replace(';', "\n");
                inbox.send_to(words.as_bytes(), variable("NOTIFY_SOCKET")).expect("notify");
                String::new()
            }
        };
        drop(stream.write_all(answer.as_bytes()));
    }
}

/// Copies a program and the libraries it is linked with into a root.
fn bring_in(root: &Path, program: &Path) {
    let libraries = std::process::Command::new("ldd").arg(program).output().expect("ldd").stdout;
    let libraries = String::from_utf8(libraries).expect("utf-8");
    let paths = libraries.split_whitespace().filter(|word| word.starts_with('/'));
    for path in paths.map(Path::new) {
        let to = root.join(path.strip_prefix("/").expect("absolute"));
        fs::create_dir_all(to.parent().expect("directory")).expect("mkdir");
        fs::copy(path, to).expect("copy a library");
    }
    fs::copy(program, root.join("bin/service")).expect("copy the program");
}

/// A bench whose containers run [`play_service`] with held sockets.
struct Service {
    bench: Bench,
    sockets: HeldSockets,
    described: Vec<Socket>,
}

impl Service {
    fn new() -> Self {
        let bench = Bench::new();
        bring_in(&bench.root(), &std::env::current_exe().expect("exe"));
        let described = ["http", "other"].map(|name| Socket {
            name: name.parse().expect("name"),
            listen: "tcp://127.0.0.1:0".parse().expect("listen"),
            backlog: Some(16),
            mode: None,
        });
        let sockets = obtain(&described, &HeldSockets::default()).expect("sockets");
        Self { bench, sockets, described: described.to_vec() }
    }

    fn spec(&self, id: &str) -> Spec {
        let command = ["/bin/service", "play_service", "--exact", "--nocapture"];
        let mut spec = self.bench.spec(id, &command);
        spec.env.push(format!("{PLAY}=1"));
        spec.sockets.clone_from(&self.described);
        spec
    }

    fn run(&self, spec: &Spec) -> Handle {
        let handle = self.bench.create_holding(spec, &self.sockets).expect("create");
        handle.release().expect("release");
        handle
    }

    fn address(&self) -> SocketAddr {
        let fd = self.sockets.descriptors()[0].try_clone_to_owned().expect("clone");
        TcpListener::from(fd).local_addr().expect("address")
    }

    fn call(&self, line: &str) -> TcpStream {
        let mut stream = TcpStream::connect(self.address()).expect("connect");
        stream.set_read_timeout(Some(LONG)).expect("timeout");
        stream.write_all(format!("{line}\n").as_bytes()).expect("write");
        stream
    }

    /// What the program answers to this line.
    #[track_caller]
    fn ask(&self, line: &str) -> String {
        let mut answer = String::new();
        self.call(line).read_to_string(&mut answer).expect("answer");
        answer
    }
}

#[test]
fn a_program_finds_its_sockets_where_it_looks_for_them() {
    let service = Service::new();
    let handle = service.run(&service.spec("names"));
    assert_eq!(service.ask("names"), "http:other");
    let got = handle.sockets().expect("sockets");
    assert_eq!(got.places().collect::<Vec<_>>(), service.sockets.places().collect::<Vec<_>>());
    handle.stop_with(bench::SIGKILL, Duration::ZERO).expect("stop");
    handle.remove().expect("remove");
}

#[test]
fn a_program_behind_a_reaper_has_its_sockets_as_its_own() {
    let service = Service::new();
    let mut spec = service.spec("reaper");
    spec.view.init = true;
    spec.notify = true;
    spec.watchdog_ms = Some(3_600_000);
    let handle = service.run(&spec);
    // The program checks LISTEN_PID itself.
    assert_eq!(service.ask("watchdog"), "3600000000 2");
    service.ask("READY=1");
    wait_until("it is ready", || handle.last_status().ready_at_ns.is_some());
    handle.stop_with(bench::SIGKILL, Duration::ZERO).expect("stop");
    handle.remove().expect("remove");
}

#[test]
fn connections_wait_while_a_program_crashes_and_is_started_again() {
    let service = Service::new();
    let first = service.run(&service.spec("crash1"));
    drop(service.call("exit"));
    assert_eq!(first.wait(LONG).expect("ends").status.code, Some(3));
    let mut waiting: Vec<TcpStream> = (0..8).map(|_| service.call("names")).collect();
    first.remove().expect("remove");
    let second = service.run(&service.spec("crash2"));
    for stream in &mut waiting {
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("answer");
        assert_eq!(answer, "http:other");
    }
    second.stop_with(bench::SIGKILL, Duration::ZERO).expect("stop");
    second.remove().expect("remove");
}

#[test]
fn a_new_agent_has_the_very_same_sockets() {
    let mut service = Service::new();
    let spec = service.spec("adopted");
    drop(service.run(&spec));
    let address = service.address();
    // The old agent's copies end with it.
    service.sockets = HeldSockets::default();
    let adopted = adopt(&service.bench.dirs, &service.bench.on_end).expect("adopt").pop();
    let Some(Adopted::Live(handle)) = adopted else { panic!("{adopted:?}") };
    service.sockets = handle.sockets().expect("sockets");
    assert_eq!(service.address(), address);
    kill(handle.pid());
    handle.wait(LONG).expect("ends");
    let mut waiting = service.call("names");
    handle.remove().expect("remove");
    let next = service.run(&service.spec("next"));
    let mut answer = String::new();
    waiting.read_to_string(&mut answer).expect("answer");
    assert_eq!(answer, "http:other");
    next.stop_with(bench::SIGKILL, Duration::ZERO).expect("stop");
    next.remove().expect("remove");
}

#[test]
fn two_versions_serve_one_socket_and_the_last_closes_it() {
    let service = Service::new();
    let (old, new) = (service.run(&service.spec("old")), service.run(&service.spec("new")));
    for _ in 0..10 {
        assert_eq!(service.ask("names"), "http:other");
    }
    let address = service.address();
    let Service { bench, sockets, .. } = service;
    drop(sockets);
    for handle in [old, new] {
        TcpStream::connect(address).expect("somebody holds it");
        handle.stop_with(bench::SIGKILL, Duration::ZERO).expect("stop");
        handle.remove().expect("remove");
    }
    wait_until("nobody listens", || TcpStream::connect(address).is_err());
    drop(bench);
}

/// A watcher, and the signs it gives.
fn watcher() -> (Watcher, mpsc::Receiver<(String, Sign)>) {
    let (sender, signs) = mpsc::channel();
    let sink = move |id: &str, sign, at_ns| {
        assert!(at_ns > 0);
        drop(sender.send((id.to_owned(), sign)));
    };
    let watcher = Watcher::start_with(Some(bench::PROGRAM.into()), Box::new(sink));
    (watcher.expect("watcher"), signs)
}

#[track_caller]
fn next(signs: &mpsc::Receiver<(String, Sign)>) -> Sign {
    signs.recv_timeout(LONG).expect("a sign").1
}

#[test]
fn a_program_says_that_it_is_ready_and_a_new_agent_hears_it_too() {
    let service = Service::new();
    let mut spec = service.spec("ready");
    spec.notify = true;
    spec.watchdog_ms = Some(3_600_000);
    let handle = service.run(&spec);
    let (watcher, signs) = watcher();
    watcher.watch(&handle, None);
    assert_eq!(service.ask("watchdog"), "3600000000 1");
    service.ask("STATUS=warming up");
    assert_eq!(next(&signs), Sign::Says("warming up".to_owned()));
    assert_eq!(handle.last_status().ready_at_ns, None);
    service.ask("READY=1;STATUS=serving");
    assert_eq!(next(&signs), Sign::Ready);
    assert_eq!(next(&signs), Sign::Says("serving".to_owned()));
    let adopted = adopt(&service.bench.dirs, &service.bench.on_end).expect("adopt").pop();
    let Some(Adopted::Live(again)) = adopted else { panic!("{adopted:?}") };
    let (watcher, signs) = self::watcher();
    watcher.watch(&again, None);
    assert_eq!([next(&signs), next(&signs)], [Sign::Ready, Sign::Says("serving".to_owned())]);
    handle.stop_with(bench::SIGKILL, Duration::ZERO).expect("stop");
    handle.remove().expect("remove");
}

#[test]
fn a_program_that_starves_its_watchdog_is_killed_and_the_record_says_why() {
    let service = Service::new();
    let mut spec = service.spec("starving");
    spec.notify = true;
    spec.watchdog_ms = Some(400);
    let handle = service.run(&spec);
    service.ask("READY=1");
    let until = Instant::now() + Duration::from_millis(1200);
    while Instant::now() < until {
        service.ask("WATCHDOG=1");
    }
    assert_eq!(handle.ended(), None, "it was fed");
    let record = handle.wait(LONG).expect("it is killed");
    let error = record.status.error.expect("why");
    assert_eq!(error, "watchdog: it sent no WATCHDOG=1 for 400 ms");
    assert!(record.status.signal.is_some() && !record.asked, "{:?}", record.status.signal);
    handle.remove().expect("remove");
}

fn health(url: String) -> Health {
    let health = serde_json::json!({"http": url, "interval_ms": 20, "start_period_ms": 60_000,
        "timeout_ms": 20_000, "retries": 2});
    serde_json::from_value(health).expect("health")
}

#[test]
fn a_container_is_healthy_until_its_probe_fails_in_a_row() {
    let service = Service::new();
    let health = health(format!("http://{}/health", service.address()));
    let handle = service.bench.create_holding(&service.spec("well"), &service.sockets);
    let handle = handle.expect("create");
    handle.release().expect("release");
    let (watcher, signs) = watcher();
    watcher.watch(&handle, Some(&health));
    assert_eq!(next(&signs), Sign::Healthy);
    service.ask("sick");
    let unhealthy = Sign::Unhealthy("it answered 503".to_owned());
    assert_eq!(next(&signs), unhealthy);
    // Another agent begins where this one was, and notices when that changes.
    watcher.forget(&handle.spec().id);
    let (second, of_second) = self::watcher();
    second.watch(&handle, Some(&health));
    assert_eq!(next(&of_second), unhealthy);
    service.ask("well");
    assert_eq!(next(&of_second), Sign::Healthy);
    assert!(signs.try_recv().is_err(), "it was forgotten there");
    handle.stop_with(bench::SIGKILL, Duration::ZERO).expect("stop");
    handle.remove().expect("remove");
}

#[test]
fn a_probe_may_be_a_command_in_the_container() {
    let service = Service::new();
    let handle = service.run(&service.spec("command"));
    let health = |script: &str| -> Health {
        let exec = ["/bin/sh", "-c", script];
        let health = serde_json::json!({"exec": exec, "interval_ms": 20, "start_period_ms": 0,
            "timeout_ms": 20_000, "retries": 1});
        serde_json::from_value(health).expect("health")
    };
    let (watcher, signs) = watcher();
    let script = "test -e /well && exit 0; hostname; echo no /well >&2; exit 7";
    watcher.watch(&handle, Some(&health(script)));
    assert_eq!(next(&signs), Sign::Unhealthy("it ended with 7: no /well".to_owned()));
    fs::write(service.bench.root().join("well"), "").expect("write");
    assert_eq!(next(&signs), Sign::Healthy);
    handle.stop_with(bench::SIGKILL, Duration::ZERO).expect("stop");
    handle.remove().expect("remove");
}

#[test]
fn a_probe_asks_from_the_network_that_the_container_is_in() {
    // A network of the container's own, which only its processes are in: here that of a thread which starts it.
    let (address, handle, bench) = std::thread::spawn(|| {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).expect("unshare");
        let up = std::process::Command::new("/bin/busybox")
            .args(["ip", "link", "set", "lo", "up"])
            .status();
        assert!(up.expect("busybox").success());
        let service = Service::new();
        let handle = service.run(&service.spec("network"));
        (service.address(), handle, service)
    })
    .join()
    .expect("thread");
    TcpStream::connect(address).expect_err("not in this network");
    let (watcher, signs) = watcher();
    watcher.watch(&handle, Some(&health(format!("http://{address}/"))));
    assert_eq!(next(&signs), Sign::Healthy);
    handle.stop_with(bench::SIGKILL, Duration::ZERO).expect("stop");
    handle.remove().expect("remove");
    drop(bench);
}

#[test]
fn sockets_that_do_not_fit_the_spec_are_refused() {
    let service = Service::new();
    let mut spec = service.spec("misfit");
    spec.sockets.pop();
    let error = service.bench.create_holding(&spec, &service.sockets).expect_err("misfit");
    assert!(error.to_string().contains("2 came instead of 1"), "{error}");
    service.bench.assert_clean(&spec.id);
}
