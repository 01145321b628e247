//! Channels with the real server and the real `layercake` program, and a node in this process: what operators see of commands and
//! logs, also when a node goes away, a reader stands still, or somebody shows the wrong token.

#[path = "channels/node.rs"]
mod node;

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use protocol::channel::frame::{Exit, Frame, MAX_DATA, WINDOW};
use protocol::channel::{ChannelWish, ExecWish, TerminalSize};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{LocalModes, Winsize, tcgetattr, tcsetwinsize};

use node::{End, Site};

const PROGRAM: &str = env!("CARGO_BIN_EXE_layercake");
/// Longer than anything here takes on a busy machine.
const LONG: Duration = Duration::from_secs(60);

fn command(site: &Site, line: &str) -> Command {
    let mut command = Command::new(PROGRAM);
    command.args(line.split(' ')).env("LAYERCAKE_SERVER", &site.base).env("TERM", "vt220");
    command.env_remove("http_proxy").stdin(Stdio::null());
    command
}

fn start(site: &Site, line: &str) -> Child {
    let mut command = command(site, line);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command.spawn().expect("layercake")
}

#[track_caller]
fn check(output: &Output, status: i32, stdout: &str, stderr: &str) {
    let (out, err) =
        (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert_eq!((output.status.code(), &*out), (Some(status), stdout), "{err}");
    assert!(err.contains(stderr), "{err}");
}

fn exec_of(end: &End) -> &ExecWish {
    match &end.request.wish {
        ChannelWish::Exec(wish) => wish,
        other => panic!("{other:?}"),
    }
}

/// Bytes that do not repeat.
fn noise(total: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut noise = Vec::with_capacity(total);
    while noise.len() < total {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        noise.extend_from_slice(&state.to_le_bytes());
    }
    noise
}

#[test]
fn a_command_s_words_streams_and_exit_code_pass_both_ways() {
    let site = Site::start();
    let child = start(&site, "exec n1 hello -u www -e A=1 -- ls -l --all");
    let mut end = site.node_end();
    let wish = exec_of(&end);
    assert_eq!(wish.argv, ["ls", "-l", "--all"]);
    assert_eq!((wish.user.as_deref(), &wish.env[..]), (Some("www"), &["A=1".to_owned()][..]));
    assert_eq!(wish.terminal, None);
    assert_eq!(
        end.request.container.as_ref().map(ToString::to_string).as_deref(),
        Some("hello/hello")
    );
    end.send(&Frame::Started);
    // Without -i there is no input.
    assert_eq!(end.next(), Frame::EndOfInput.render());
    end.send(&Frame::Output(b"to stdout\n"));
    end.send(&Frame::Errors(b"to stderr\n"));
    end.send(&Frame::Exit(Exit::Code(7)));
    check(&child.wait_with_output().expect("output"), 7, "to stdout\n", "to stderr\n");
    // By a signal.
    let child = start(&site, "exec n1 hello/hello true");
    let mut end = site.node_end();
    end.send(&Frame::Started);
    end.send(&Frame::Exit(Exit::Signal(9)));
    check(&child.wait_with_output().expect("output"), 137, "", "");
}

#[test]
fn ten_megabytes_go_to_a_command_and_back() {
    const TOTAL: usize = 10 << 20;
    let site = Site::start();
    let mut child = start(&site, "exec -i n1 hello cat");
    let mut end = site.node_end();
    let echo = std::thread::spawn(move || {
        end.send(&Frame::Started);
        end.echo();
        end.send(&Frame::Exit(Exit::Code(0)));
        end.until_closed();
    });
    let noise = noise(TOTAL);
    let mut stdin = child.stdin.take().expect("stdin");
    let bytes = noise.clone();
    let writing = std::thread::spawn(move || stdin.write_all(&bytes).expect("write"));
    let output = child.wait_with_output().expect("output");
    writing.join().expect("writer");
    echo.join().expect("node");
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(output.stdout == noise, "{} bytes came back", output.stdout.len());
}

#[test]
fn a_reader_that_stands_still_stops_the_node_and_loses_nothing() {
    let site = Site::start();
    let mut child = start(&site, "logs n1 hello -f");
    let mut end = site.node_end();
    end.send(&Frame::Started);
    let noise = noise(4 << 20);
    // What a pipe and the program's own hands hold is granted again; then it stops.
    let sent = end.send_what_is_granted(&noise);
    let most = WINDOW as usize + (64 << 10) + MAX_DATA;
    assert!(sent <= most, "{sent} bytes were granted to a reader that reads nothing");
    let mut stdout = child.stdout.take().expect("stdout");
    let reading = std::thread::spawn(move || {
        let mut bytes = Vec::new();
        stdout.read_to_end(&mut bytes).expect("read");
        bytes
    });
    end.send_all(&noise[sent..]);
    end.send(&Frame::Exit(Exit::Code(0)));
    end.until_closed();
    assert!(child.wait().expect("wait").success());
    assert!(reading.join().expect("reader") == noise);
}

#[test]
fn a_node_that_goes_away_ends_the_command_with_255() {
    let site = Site::start();
    let child = start(&site, "exec n1 hello sleep 9");
    let mut end = site.node_end();
    end.send(&Frame::Started);
    end.send(&Frame::Output(b"so far"));
    drop(end);
    let output = child.wait_with_output().expect("output");
    check(&output, 255, "so far", "layercake: node n1 disconnected before the end");
    check(&output, 255, "so far", "last seen 0 s ago");
    // It says so itself.
    let child = start(&site, "exec n1 hello sleep 9");
    let mut end = site.node_end();
    end.send(&Frame::Failure("container hello/hello does not run".into()));
    let output = child.wait_with_output().expect("output");
    check(&output, 255, "", "layercake: container hello/hello does not run\n");
    // It breaks the rules.
    let child = start(&site, "exec n1 hello sleep 9");
    let mut end = site.node_end();
    end.send_raw(&[77]);
    let output = child.wait_with_output().expect("output");
    check(&output, 255, "", "node n1 sent something wrong: a frame of the unknown kind 77");
}

#[test]
fn an_operator_who_leaves_ends_the_node_s_end() {
    let site = Site::start();
    let mut child = start(&site, "exec n1 hello sleep 9");
    let mut end = site.node_end();
    end.send(&Frame::Started);
    child.kill().expect("kill");
    child.wait().expect("reap");
    end.until_closed();
    // `head` has read enough: that is no failure of the program's.
    let mut child = start(&site, "logs n1 hello -f");
    let mut end = site.node_end();
    end.send(&Frame::Started);
    drop(child.stdout.take());
    end.send(&Frame::Output(b"one line\n"));
    end.until_closed();
    assert!(child.wait().expect("wait").success());
}

#[test]
fn signals_go_to_the_command_and_before_there_is_one_end_the_program() {
    let site = Site::start();
    let child = start(&site, "exec n1 hello sleep 9");
    let mut end = site.node_end();
    let pid = rustix::process::Pid::from_child(&child);
    let interrupt = || rustix::process::kill_process(pid, rustix::process::Signal::INT);
    end.send(&Frame::Started);
    assert_eq!(end.next(), Frame::EndOfInput.render());
    interrupt().expect("kill");
    assert_eq!(end.next(), Frame::Signal(2).render());
    end.send(&Frame::Exit(Exit::Signal(2)));
    check(&child.wait_with_output().expect("output"), 130, "", "");
    let child = start(&site, "exec n1 hello sleep 9");
    let _never_starts = site.node_end();
    let pid = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(pid, rustix::process::Signal::INT).expect("kill");
    check(&child.wait_with_output().expect("output"), 130, "", "");
}

#[test]
fn what_cannot_be_asked_for_is_refused_with_what_to_do() {
    let site = Site::start();
    let run = |line: &str| command(&site, line).output().expect("layercake");
    check(&run("exec n1 web true"), 255, "", "node n1 has no container `web`; it has hello/hello");
    check(&run("logs n1 web"), 1, "", "node n1 has no container `web`; it has hello/hello");
    check(&run("exec n9 hello true"), 255, "", "n9");
    check(&run("exec -t n1 hello true"), 255, "", "-t needs a terminal");
    check(&run("exec n1 hello/x --set other true"), 255, "", "two different sets");
    check(&run("exec n1 hello"), 2, "", "Usage");
    site.stop_polling();
    check(&run("exec n1 hello true"), 255, "", "node n1 is not listening: its agent has not asked");
}

#[test]
fn a_log_is_shown_as_it_is_or_as_json() {
    let site = Site::start();
    for (line, expected) in [
        ("logs n1 hello -n 2", "one\ntwo"),
        ("logs n1 -n 2 --json", "{\"line\":\"one\"}\n{\"line\":\"two\"}\n"),
    ] {
        let child = start(&site, line);
        let mut end = site.node_end();
        assert_eq!(end.request.wish, ChannelWish::Logs { follow: false, tail: Some(2) });
        end.send(&Frame::Started);
        end.send(&Frame::Output(b"one\ntw"));
        end.send(&Frame::Output(b"o"));
        end.send(&Frame::Exit(Exit::Code(0)));
        check(&child.wait_with_output().expect("output"), 0, expected, "");
    }
    let child = start(&site, "logs n1 --agent -f");
    let mut end = site.node_end();
    assert_eq!(end.request.wish, ChannelWish::NodeLog { follow: true, tail: None });
    assert_eq!(end.request.container, None);
    end.send(&Frame::Exit(Exit::Code(0)));
    check(&child.wait_with_output().expect("output"), 0, "", "");
}

#[test]
fn a_token_opens_one_end_of_one_channel_once() {
    let site = Site::start();
    let child = start(&site, "exec n1 hello true");
    let mut end = site.node_end();
    let id = end.request.id.clone();
    let upgrade = [
        ("connection", "Upgrade"),
        ("upgrade", "websocket"),
        ("sec-websocket-version", "13"),
        ("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ=="),
    ];
    let ask = |side: &str, token: &str, headers: &[(&str, &str)]| {
        let agent = ureq::Agent::config_builder().http_status_as_error(false).build().new_agent();
        let mut request = agent.get(format!("{}/v1/nodes/n1/channels/{id}/{side}", site.base));
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        request.header("authorization", format!("Bearer {token}")).call().expect("answer").status()
    };
    let token = end.request.token.as_str().to_owned();
    let token = token.as_str();
    for side in ["node", "operator"] {
        assert_eq!(ask(side, token, &upgrade).as_u16(), 404, "{side}: used, or another end's");
        assert_eq!(ask(side, &"0".repeat(64), &upgrade).as_u16(), 404, "{side}: wrong");
        assert_eq!(ask(side, "", &upgrade).as_u16(), 404, "{side}: none");
        assert_eq!(ask(side, token, &[]).as_u16(), 426, "{side}: no upgrade");
    }
    end.send(&Frame::Exit(Exit::Code(0)));
    check(&child.wait_with_output().expect("output"), 0, "", "");
}

/// A terminal, and the program on it as its session's leader.
fn on_terminal(site: &Site, line: &str, size: Winsize) -> (File, Child) {
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let master = openpt(flags).expect("openpt");
    grantpt(&master).and_then(|()| unlockpt(&master)).expect("unlockpt");
    tcsetwinsize(&master, size).expect("size");
    let name = ptsname(&master, Vec::new()).expect("ptsname").into_string().expect("UTF-8");
    let slave = || {
        let file = File::options().read(true).write(true).open(&name).expect("slave");
        Stdio::from(OwnedFd::from(file))
    };
    let mut setsid = Command::new("setsid");
    setsid.args(["--ctty", "--wait", PROGRAM]).args(line.split(' '));
    setsid.env("LAYERCAKE_SERVER", &site.base).env("TERM", "vt220");
    let child = setsid.stdin(slave()).stdout(slave()).stderr(slave()).spawn();
    (File::from(master), child.expect("setsid is missing: apt-get install util-linux"))
}

fn window_size(columns: u16, rows: u16) -> Winsize {
    Winsize { ws_col: columns, ws_row: rows, ws_xpixel: 0, ws_ypixel: 0 }
}

fn echoes(terminal: &File) -> bool {
    tcgetattr(terminal)
        .expect("tcgetattr")
        .local_modes
        .contains(LocalModes::ECHO | LocalModes::ISIG)
}

#[test]
fn a_terminal_is_the_command_s_until_it_ends() {
    let site = Site::start();
    let (mut terminal, mut child) = on_terminal(&site, "exec -it n1 hello sh", window_size(90, 33));
    let mut end = site.node_end();
    let wish = exec_of(&end);
    assert_eq!(wish.terminal, Some(TerminalSize { columns: 90, rows: 33 }));
    assert_eq!(wish.env, ["TERM=vt220"]);
    assert!(echoes(&terminal), "it is the program's until the command runs");
    end.send(&Frame::Started);
    let until = Instant::now() + LONG;
    while echoes(&terminal) {
        assert!(Instant::now() < until, "never raw");
        std::thread::sleep(Duration::from_millis(2));
    }
    // Ctrl-C is a key like any other.
    terminal.write_all(b"a\x03b\r").expect("type");
    let mut typed = Vec::new();
    while typed.len() < 4 {
        match Frame::parse(&end.next()).expect("frame") {
            Frame::Input(bytes) => typed.extend_from_slice(bytes),
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(typed, b"a\x03b\r");
    tcsetwinsize(&terminal, window_size(70, 20)).expect("size");
    assert_eq!(end.next(), Frame::Size(TerminalSize { columns: 70, rows: 20 }).render());
    end.send(&Frame::Output(b"as it is\r\n"));
    let mut seen = [0; 10];
    terminal.read_exact(&mut seen).expect("read");
    assert_eq!(&seen, b"as it is\r\n");
    end.send(&Frame::Exit(Exit::Code(5)));
    assert_eq!(child.wait().expect("wait").code(), Some(5));
    assert!(echoes(&terminal), "it is as it was");
}
