//! LUNs of iSCSI targets: connect, log in, hand the connection to the kernel, wait for the disk. Sessions belong to the kernel from
//! then on: they outlive the agent, and go by their number.

use std::fs;
use std::io::{self, Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::Modules;
use crate::imageapi::error::ApiError;
use crate::imageapi::iscsi::login::{self, Agreed, FIRST_COMMAND, HEADER, Login, Step};
use crate::imageapi::iscsi::netlink::{Order, Socket, parameters};
use crate::imageapi::table::Device;
use crate::imageapi::types::AttachIscsi;

/// Where the kernel says how its transport is called.
const HANDLE: &str = "/sys/class/iscsi_transport/tcp/handle";
/// Longest for a connection, and for each answer of the login.
const LOGIN_TIMEOUT: Duration = Duration::from_secs(15);
/// Longest from a scan of a LUN to its disk.
const DISK_TIMEOUT: Duration = Duration::from_secs(20);
/// Pause between looks for it.
const DISK_PAUSE: Duration = Duration::from_millis(20);
/// Defaults of the API.
const PORT: i64 = 3260;
const MAX_COMMANDS: i64 = 128;
const QUEUE_DEPTH: i64 = 16;
const SCHEDULER: &str = "mq-deadline";
/// `STOP_CONN_TERM`.
const STOP_FOR_GOOD: u32 = 1;

/// Numbers and names of a request, checked.
struct Wanted<'a> {
    spec: &'a AttachIscsi,
    port: u16,
    lun: u32,
    commands: u16,
    depth: u16,
}

fn wanted(spec: &AttachIscsi) -> Result<Wanted<'_>, ApiError> {
    let or = |value: i64, default: i64| if value == 0 { default } else { value };
    let bad = |name: &str| ApiError::invalid(format!("iscsi.{name} is out of range"));
    // RFC 7143, 4.2.7.2: at most 223 bytes, no blanks; a comma or NUL would be two things to somebody.
    for (name, text) in [("initiator", &spec.initiator), ("target", &spec.target)] {
        let plain = text.bytes().all(|byte| byte.is_ascii_graphic() && byte != b',');
        if text.is_empty() || text.len() > 223 || !plain {
            return Err(ApiError::invalid(format!("iscsi.{name} is no iSCSI name")));
        }
    }
    let scheduler = spec.scheduler.bytes();
    if !{ scheduler }.all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_')) {
        return Err(bad("scheduler"));
    }
    Ok(Wanted {
        spec,
        port: u16::try_from(or(spec.port, PORT)).map_err(|_| bad("port"))?,
        lun: u32::try_from(spec.lun).ok().filter(|lun| *lun < 1 << 14).ok_or_else(|| bad("lun"))?,
        commands: u16::try_from(or(spec.max_commands, MAX_COMMANDS))
            .map_err(|_| bad("max_comands"))?,
        depth: u16::try_from(or(spec.queue_depth, QUEUE_DEPTH)).map_err(|_| bad("queue_depth"))?,
    })
}

/// Makes a session and returns the LUN's disk.
pub(in crate::imageapi) fn attach(
    spec: &AttachIscsi,
    number: i64,
    modules: &Modules,
) -> Result<(String, Device), ApiError> {
    let wanted = wanted(spec)?;
    let place = format!("iscsi {} at {}:{}", spec.target, spec.host, wanted.port);
    let failed = |what: &dyn std::fmt::Display| ApiError::failed(format!("{place}: {what}"));
    modules.need(&["iscsi_tcp", "sd_mod"]);
    let kernel = kernel().map_err(|error| failed(&error))?;
    let (stream, agreed) = log_in(&wanted, number).map_err(|reason| failed(&reason))?;
    let commands = u32::from_ne_bytes(
        [wanted.commands.to_ne_bytes(), wanted.depth.to_ne_bytes()]
            .concat()
            .try_into()
            .unwrap_or_default(),
    );
    let created = kernel.order(Order::CreateSession, &[FIRST_COMMAND, commands], "");
    let [session, host] = created.map_err(|error| failed(&format!("session: {error}")))?;
    let disk = start(&kernel, session, &stream, &agreed, spec)
        .and_then(|()| find_disk(session, host, wanted.lun));
    match disk {
        Ok(disk) => {
            let scheduler = if spec.scheduler.is_empty() { SCHEDULER } else { &spec.scheduler };
            let file = format!("/sys/block/{disk}/queue/scheduler");
            if let Err(error) = fs::write(&file, scheduler) {
                log::info!("imageapi: {file}: {scheduler}: {error}");
            }
            Ok((format!("/dev/{disk}"), Device::Iscsi(session)))
        }
        Err(reason) => {
            if let Err(error) = detach(session) {
                log::warn!("imageapi: {error}");
            }
            Err(failed(&reason))
        }
    }
}

fn kernel() -> io::Result<Socket> {
    let missing = || io::Error::other("this kernel has no iSCSI (module iscsi_tcp)");
    let handle = fs::read_to_string(HANDLE).map_err(|_| missing())?;
    Socket::open(handle.trim().parse().map_err(|_| missing())?)
}

/// Connects and logs in.
fn log_in(wanted: &Wanted<'_>, number: i64) -> Result<(TcpStream, Agreed), String> {
    let spec = wanted.spec;
    let addresses = (spec.host.as_str(), wanted.port).to_socket_addrs();
    let mut addresses = addresses.map_err(|error| error.to_string())?;
    let address = addresses.next().ok_or("it has no address")?;
    let stream = TcpStream::connect_timeout(&address, LOGIN_TIMEOUT);
    let mut stream = stream.map_err(|error| error.to_string())?;
    let tuned = stream
        .set_nodelay(true)
        .and_then(|()| stream.set_read_timeout(Some(LOGIN_TIMEOUT)))
        .and_then(|()| stream.set_write_timeout(Some(LOGIN_TIMEOUT)));
    tuned.map_err(|error| error.to_string())?;
    // Qualifier "random" (RFC 7143, 11.12.5): sessions of one initiator at one target differ by our number of them.
    let tail = number.to_be_bytes();
    let isid = [0x80, tail[3], tail[4], tail[5], tail[6], tail[7]];
    let mut login = Login::new(&spec.initiator, &spec.target, isid);
    let mut request = login.first();
    loop {
        let mut response = || {
            stream.write_all(&request)?;
            let mut header = [0; HEADER];
            stream.read_exact(&mut header)?;
            let (additional, length) = login::lengths(&header).map_err(io::Error::other)?;
            let mut data = vec![0; additional + length.next_multiple_of(4)];
            stream.read_exact(&mut data)?;
            Ok::<_, io::Error>((header, data, additional, length))
        };
        let (header, data, additional, length) =
            response().map_err(|error| format!("login: {error}"))?;
        let data = data.get(additional..additional + length).unwrap_or_default();
        match login.take(&header, data).map_err(|error| error.to_string())? {
            Step::Send(next) => request = next,
            Step::Done(agreed) => {
                // The kernel waits in its own way.
                let plain = stream.set_read_timeout(None);
                plain.and_then(|()| stream.set_write_timeout(None)).map_err(|it| it.to_string())?;
                return Ok((stream, agreed));
            }
        }
    }
}

/// Gives the session its connection and starts it.
fn start(
    kernel: &Socket,
    session: u32,
    stream: &TcpStream,
    agreed: &Agreed,
    spec: &AttachIscsi,
) -> Result<(), String> {
    let step = |what: &'static str| move |error: io::Error| format!("{what}: {error}");
    let connection = [session, 0];
    kernel.order(Order::CreateConnection, &connection, "").map_err(step("connection"))?;
    let fd = u32::try_from(stream.as_raw_fd()).map_err(|_| "its socket has no number")?;
    // The descriptor is a number of 64 bits; then: it is the session's first connection.
    let words = bind_words(session, fd);
    kernel.order(Order::BindConnection, &words, "").map_err(step("bind"))?;
    for (parameter, name, value) in parameters(agreed, &spec.target, &spec.initiator) {
        let length = u32::try_from(value.len() + 1).unwrap_or_default();
        let words = [session, 0, parameter, length];
        kernel.order(Order::SetParameter, &words, &value).map_err(step(name))?;
    }
    kernel.order(Order::StartConnection, &connection, "").map_err(step("start")).map(drop)
}

/// Session, connection 0, descriptor (64 bits), leading.
fn bind_words(session: u32, fd: u32) -> [u32; 5] {
    let halves = u64::from(fd).to_ne_bytes();
    let half = |at: usize| {
        let bytes = halves.get(at..).and_then(|rest| rest.first_chunk::<4>());
        bytes.map_or(0, |bytes| u32::from_ne_bytes(*bytes))
    };
    [session, 0, half(0), half(4), 1]
}

/// Asks for one LUN and waits for its disk.
fn find_disk(session: u32, host: u32, lun: u32) -> Result<String, String> {
    let scan = format!("/sys/class/scsi_host/host{host}/scan");
    fs::write(&scan, format!("0 0 {lun}")).map_err(|error| format!("{scan}: {error}"))?;
    let until = Instant::now() + DISK_TIMEOUT;
    loop {
        if let Some(disk) = disk_of(session, Some(lun)) {
            return Ok(disk);
        }
        if Instant::now() > until {
            return Err(format!("it has no disk at LUN {lun}"));
        }
        std::thread::sleep(DISK_PAUSE);
    }
}

/// The SCSI devices of a session: `/sys/class/iscsi_session/sessionN/device/targetH:C:T/H:C:T:L`.
fn devices(session: u32) -> Vec<PathBuf> {
    let list = |dir: &Path| {
        let entries = fs::read_dir(dir).into_iter().flatten().flatten();
        entries.map(|entry| entry.path()).collect::<Vec<_>>()
    };
    let named = |path: &Path, start: &str| {
        path.file_name().and_then(|name| name.to_str()).is_some_and(|name| name.starts_with(start))
    };
    let device = PathBuf::from(format!("/sys/class/iscsi_session/session{session}/device"));
    let targets = list(&device).into_iter().filter(|path| named(path, "target"));
    let devices = targets.flat_map(|target| list(&target));
    devices.filter(|path| path.join("delete").exists()).collect()
}

/// The name of the disk of a LUN, or of any.
fn disk_of(session: u32, lun: Option<u32>) -> Option<String> {
    devices(session).into_iter().find_map(|device| {
        let name = device.file_name()?.to_str()?;
        let found: u32 = name.rsplit(':').next()?.parse().ok()?;
        if lun.is_some_and(|lun| lun != found) {
            return None;
        }
        let disk = fs::read_dir(device.join("block")).ok()?.flatten().next()?;
        disk.file_name().into_string().ok()
    })
}

/// Ends a session: the disk first, so that what was written is flushed. A session that is gone is fine.
pub(in crate::imageapi) fn detach(session: u32) -> Result<(), ApiError> {
    let class = format!("/sys/class/iscsi_session/session{session}");
    if !Path::new(&class).exists() {
        return Ok(());
    }
    if let Some(disk) = disk_of(session, None) {
        super::block::check_unused(Path::new(&format!("/dev/{disk}")))?;
    }
    let failed = |what: &str, error: &io::Error| {
        ApiError::failed(format!("iscsi session {session}: {what}: {error}"))
    };
    for device in devices(session) {
        fs::write(device.join("delete"), "1").map_err(|error| failed("disk", &error))?;
    }
    let kernel = kernel().map_err(|error| failed("netlink", &error))?;
    // Session, connection, a handle of 64 bits that is not used, why.
    let stop = [session, 0, 0, 0, STOP_FOR_GOOD];
    let orders: [(Order, &[u32]); 3] = [
        (Order::StopConnection, &stop),
        (Order::DestroyConnection, &[session, 0]),
        (Order::DestroySession, &[session]),
    ];
    let mut last = Ok(());
    for (order, words) in orders {
        // A session that was never started has no connection.
        last = kernel.order(order, words, "").map(drop);
    }
    last.map_err(|error| failed("end", &error))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec() -> AttachIscsi {
        let (initiator, target) = ("iqn.2026-11.a:b".to_owned(), "iqn.2026-11.c:d".to_owned());
        AttachIscsi { initiator, target, host: "10.0.0.1".to_owned(), ..AttachIscsi::default() }
    }

    #[test]
    fn defaults_are_those_of_the_api() {
        let spec = spec();
        let wanted = wanted(&spec).expect("good");
        assert_eq!((wanted.port, wanted.lun), (3260, 0));
        assert_eq!((wanted.commands, wanted.depth), (128, 16));
    }

    #[test]
    fn what_the_kernel_or_the_target_would_misread_is_refused() {
        let table: [fn(&mut AttachIscsi); 7] = [
            |it| it.initiator = "a b".to_owned(),
            |it| it.target = "a\0b".to_owned(),
            |it| it.target = String::new(),
            |it| it.port = 70_000,
            |it| it.lun = -1,
            |it| it.queue_depth = 1 << 20,
            |it| it.scheduler = "../x".to_owned(),
        ];
        for change in table {
            let mut bad = spec();
            change(&mut bad);
            assert_eq!(wanted(&bad).err().map(|error| error.status), Some(400), "{bad:?}");
        }
    }

    #[test]
    fn a_connection_is_bound_by_its_descriptor() {
        let words = bind_words(7, 9);
        assert_eq!((words[0], words[1], words[4]), (7, 0, 1));
        let bytes: Vec<u8> = words[2..4].iter().flat_map(|word| word.to_ne_bytes()).collect();
        assert_eq!(u64::from_ne_bytes(bytes.try_into().expect("eight")), 9);
    }

    /// Debian's tgt with one target, in a network namespace of this thread's own; ends when dropped.
    struct Tgt {
        dir: tempfile::TempDir,
        process: std::process::Child,
    }

    impl Tgt {
        fn start() -> Self {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).expect("unshare");
            let up = std::process::Command::new("/bin/busybox")
                .args(["ip", "link", "set", "lo", "up"])
                .status();
            assert!(up.expect("/bin/busybox: apt-get install busybox-static").success());
            let dir = tempfile::tempdir().expect("directory");
            let process = std::process::Command::new("tgtd")
                .args(["-f", "--iscsi", "portal=127.0.0.1:3260"])
                .env("TGT_IPC_SOCKET", dir.path().join("tgt"))
                .stderr(std::process::Stdio::null())
                .spawn()
                .expect("tgtd: apt-get install tgt");
            let tgt = Self { dir, process };
            let until = Instant::now() + Duration::from_secs(30);
            while TcpStream::connect("127.0.0.1:3260").is_err() {
                assert!(Instant::now() < until, "tgtd does not listen");
                std::thread::sleep(Duration::from_millis(10));
            }
            tgt.admin("--op new --mode target --tid 1 -T iqn.2026-11.c:d");
            tgt
        }

        fn admin(&self, args: &str) {
            let status = std::process::Command::new("tgtadm")
                .args(["--lld", "iscsi"])
                .args(args.split(' '))
                .env("TGT_IPC_SOCKET", self.dir.path().join("tgt"))
                .status();
            assert!(status.expect("tgtadm").success(), "{args}");
        }
    }

    impl Drop for Tgt {
        fn drop(&mut self) {
            drop(self.process.kill());
            drop(self.process.wait());
        }
    }

    #[test]
    fn a_real_target_lets_us_in_or_says_why_not() {
        let spec = AttachIscsi { host: "127.0.0.1".to_owned(), ..spec() };
        let outcome = || {
            let tgt = Tgt::start();
            let refused = log_in(&wanted(&spec).expect("good"), 5).map(drop);
            tgt.admin("--op bind --mode target --tid 1 -I ALL");
            let agreed = log_in(&wanted(&spec).expect("good"), 5).map(|(_, agreed)| agreed);
            let other = AttachIscsi { target: "iqn.2026-11.x:y".to_owned(), ..spec.clone() };
            let absent = log_in(&wanted(&other).expect("good"), 6).map(drop);
            (refused, agreed, absent)
        };
        let (refused, agreed, absent) =
            std::thread::scope(|scope| scope.spawn(outcome).join()).expect("thread");
        assert!(refused.is_err_and(|reason| reason.contains("refused the login")));
        let agreed = agreed.expect("let in");
        assert!(agreed.their_segment >= 8192 && agreed.max_r2t == 1, "{agreed:?}");
        assert!(absent.is_err_and(|reason| reason.contains("there is no such target")));
    }
}
