//! PID 1 itself, in a PID namespace: a real one, with agents that are scripts. The binary is a debug build, which aborts when
//! PID 1 allocates after its start, so that every case here proves that it does not.
//!
//! `/dev`, `/etc`, `/run`, `/sys` and what names swap are empty in there: nothing of this machine is reached. In a PID
//! namespace reboot(2) ends PID 1 by a signal (pid_namespaces(7)).

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

const SETUP: &str = r#"
set -e
for dir in /dev /etc /run /sys /lib/modules; do [ ! -d $dir ] || mount -t tmpfs none $dir; done
mount -t proc proc /proc
mknod /dev/null c 1 3
mount --bind /dev/null /proc/swaps
mount --bind "$DIR/cmdline" /proc/cmdline
mkdir -p /run/layercake/state /etc/layercake
[ ! -e "$DIR/rescue" ] || cp "$DIR/rescue" /etc/layercake/rescue
if grep -q own-agent "$DIR/cmdline"; then
    # It cannot work: somebody else has its run directory.
    flock /run/layercake/lock sleep 1000 &
    sleep 0.5
else
    printf '0 0 0 0 %s' "$DIR/agent" > /run/layercake/state/init
fi
exec "$BINARY" --resume
"#;
/// What the scripts have in common: a request to PID 1 and its answer.
const HEAD: &str = r#"#!/bin/sh
ask() { printf "$1" >&3; answer=$(dd bs=4096 count=1 <&3 2>/dev/null | tr -d '\000'); echo "answer to $2: $answer"; }
n=$LAYERCAKE_AGENT_STARTS
echo "script $n runs"
"#;
const PATIENCE: Duration = Duration::from_secs(60);

/// A PID 1 that runs. Dropped, it ends with everybody in its namespace.
struct Init {
    child: Child,
    dir: tempfile::TempDir,
}

impl Init {
    /// Starts one whose agents are this script; `rescue` is its rescue program.
    fn start(cmdline: &str, agent: &str, rescue: Option<&str>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let this = |name: &str| dir.path().join(name);
        fs::write(this("cmdline"), cmdline).unwrap();
        program(this("agent"), &format!("{HEAD}{agent}"));
        if let Some(script) = rescue {
            program(this("rescue"), &format!("#!/bin/sh\n{script}"));
        }
        let log = fs::File::create(this("log")).unwrap();
        let child = Command::new("unshare")
            .args(["--pid", "--mount", "--net", "--uts", "--ipc", "--fork", "--kill-child"])
            .args(["sh", "-c", SETUP])
            .env("DIR", dir.path())
            .env("BINARY", env!("CARGO_BIN_EXE_layercake-agent"))
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        Self { child, dir }
    }

    fn log(&self) -> String {
        String::from_utf8_lossy(&fs::read(self.dir.path().join("log")).unwrap()).into_owned()
    }

    /// Waits until the log has all of these, in this order.
    #[track_caller]
    fn wait(&self, texts: &[&str]) {
        let until = Instant::now() + PATIENCE;
        loop {
            let log = self.log();
            let mut rest = log.as_str();
            let missing = texts.iter().find(|text| match rest.split_once(**text) {
                Some((_, tail)) => {
                    rest = tail;
                    false
                }
                None => true,
            });
            assert!(!log.contains("has allocated"), "{log}");
            let Some(missing) = missing else { return };
            assert!(Instant::now() < until, "no `{missing}` in\n{log}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Waits for the end, which is the end of PID 1.
    fn end(&mut self) -> ExitStatus {
        let until = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(Instant::now() < until, "it does not end:\n{}", self.log());
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Init {
    fn drop(&mut self) {
        // --kill-child: the namespace's PID 1 goes with it, and everybody with that.
        let _ = (self.child.kill(), self.child.wait());
    }
}

fn program(path: PathBuf, text: &str) {
    fs::write(&path, text).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
}

#[test]
fn every_death_of_the_agent_is_survived() {
    let init = Init::start(
        "",
        r#"[ $n != 1 ] || ask 'steady\0' steady
        case $n in
            1) kill -SEGV $$ ;; 2) kill -ABRT $$ ;; 3) kill -KILL $$ ;; 4) exit 3 ;; 5) exec /nowhere ;; 6) kill -40 $$ ;;
            *) echo "starts: $n"; exec sleep 1000 ;;
        esac"#,
        None,
    );
    init.wait(&[
        "was killed by SIGSEGV",
        "starts again in 0 ms",
        "script 2 runs",
        "was killed by SIGABRT",
        "starts again in 100 ms",
        "was killed by SIGKILL",
        "exited with status 3",
        "exited with status 127",
        "was killed\n",
        "starts again in 1600 ms",
        "starts: 7",
    ]);
}

#[test]
fn pid_1_survives_its_own_crash_and_keeps_the_agent_and_its_link() {
    let init = Init::start(
        "",
        r#"ask 'steady\0' steady
        for signal in SEGV ABRT BUS; do
            kill -$signal 1
            ask 'dance\0' dance
            ask 'steady\0' "steady after $signal"
        done
        echo "still $n"; exec sleep 1000"#,
        None,
    );
    init.wait(&[
        "answer to steady: ok",
        "PID 1 has crashed and goes on",
        "answer to dance: no unknown request",
        "answer to steady after SEGV: ok",
        "answer to steady after ABRT: ok",
        "answer to steady after BUS: ok",
        "still 1",
    ]);
}

#[test]
fn another_agent_takes_over_at_once_and_is_given_up_when_it_dies_unsteady() {
    let new = r#"[ $n = 2 ] && { ask 'steady\0' 'the new one'; ask "agent\0$0-2\0" 'a third'; }
        echo "not steady $n"; exit 1"#;
    let init = Init::start(
        "layercake.rescue=never",
        r#"dir=$(dirname $0)
        ask "agent\0$dir/missing\0" missing
        ask "agent\0relative\0" relative
        cp $dir/rescue $dir/new; cp $dir/rescue $dir/new-2
        ask "agent\0$dir/new\0" new
        exec sleep 1000"#,
        Some(&[HEAD.trim_start_matches("#!/bin/sh\n"), new].concat()),
    );
    init.wait(&[
        "answer to missing: no there is no such program",
        "answer to relative: no unknown request",
        "was killed by SIGKILL",
        "starts again in 0 ms",
        "answer to the new one: ok",
        "new-2 from here on",
        "not steady 3",
        "not steady 4",
        "not steady 5",
        "the agent that took over has failed: back to Layer0's own",
    ]);
}

#[test]
fn two_thousand_orphans_leave_no_zombie_and_pid_1_answers_meanwhile() {
    // Every child of PID 1 that has ended is one of these: perl waits for its own.
    let init = Init::start(
        "",
        r#"perl -e 'for (1..2000) { if (!fork) { exit if fork; select(undef, undef, undef, 0.001); exit } wait }' &
        while kill -0 $! 2>/dev/null; do
            before=$(date +%s%N); ask 'steady\0' steady; after=$(date +%s%N)
            [ $(( (after - before) / 1000000 )) -lt 500 ] || echo "slow: $(( after - before ))"
            sleep 0.2
        done
        wait; sleep 0.3
        echo "zombies: $(cat /proc/[0-9]*/stat 2>/dev/null | grep -c ') Z 1 ')"
        exec sleep 1000"#,
        None,
    );
    init.wait(&["answer to steady: ok", "zombies: 0"]);
    assert!(!init.log().contains("slow"), "{}", init.log());
}

#[test]
fn a_rescue_program_of_the_site_goes_before_every_shell() {
    let rescue =
        r#"echo "rescue in $(ps -o sid= -p $$ | tr -d ' ') of $$ with $PATH"; exec sleep 1000"#;
    let init = Init::start("layercake.rescue=always", "exec sleep 1000", Some(rescue));
    init.wait(&["a rescue shell is on the console", "with /usr/sbin"]);
    let never = Init::start("layercake.rescue=never", "exec sleep 1000", Some(rescue));
    never.wait(&["script 1 runs"]);
    assert!(!never.log().contains("rescue"), "{}", never.log());
}

#[test]
fn an_agent_that_keeps_failing_brings_the_rescue_shell_and_is_started_on() {
    // The waits between ten starts are 25 s.
    let rescue = "echo rescue is here; exec sleep 1000";
    let init = Init::start("layercake.rescue=on-failure own-agent", "", Some(rescue));
    let never = Init::start("layercake.rescue=never own-agent", "", Some(rescue));
    for init in [&init, &never] {
        init.wait(&[
            "exited with status 1",
            "starts again in 12800 ms",
            "starts again in 30000 ms",
        ]);
    }
    init.wait(&["keeps failing: a rescue shell is offered", "on the console", "rescue is here"]);
    assert!(!never.log().contains("a rescue shell"), "{}", never.log());
}

#[test]
fn the_end_stops_the_agent_then_everybody_and_has_limits() {
    let stubborn = &r#"trap 'echo "asked to stop"; exit 0' TERM
        sh -c 'trap "" TERM HUP; while :; do sleep 1; done' &
        mkdir /run/a; mount -t tmpfs none /run/a
        REQUEST
        while :; do sleep 0.05; done"#;
    let end = move |request: &str, name: &str, signal: i32| {
        let begun = Instant::now();
        let mut init = Init::start("", &stubborn.replace("REQUEST", request), None);
        let status = init.end();
        let log = init.log();
        init.wait(&["asked to stop", "ignore SIGTERM are killed", &format!("{name}: now")]);
        // unshare tells how PID 1 ended: as a signal of its own, or as a shell would.
        let ended = status.signal().or_else(|| Some(status.code()? - 128));
        assert_eq!(ended, Some(signal), "{request}: {status}\n{log}");
        assert_eq!(log.contains("kexec refused"), name == "kexec", "{log}");
        assert!(!log.contains("still in use"), "{log}");
        assert!(begun.elapsed() < Duration::from_secs(20), "{request}: {:?}", begun.elapsed());
    };
    std::thread::scope(|scope| {
        for (request, name, signal) in [
            ("ask 'poweroff\\0' poweroff", "power off", 2),
            ("ask 'reboot\\0' reboot", "reboot", 1),
            ("ask 'kexec\\0' kexec", "kexec", 1),
            ("kill -USR1 1", "halt", 2),
            ("kill -TERM 1", "reboot", 1),
        ] {
            scope.spawn(move || end(request, name, signal));
        }
    });
}
