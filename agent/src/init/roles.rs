//! The command line of the binary: which of the four roles it plays, and with what options.
//!
//! Pure: arguments in, a [`Role`] or one sentence of complaint out. The kernel's own command line is not read here.

use std::ffi::{CStr, OsStr, OsString};
use std::net::SocketAddr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use protocol::boot_args::LogLevel;
use protocol::ids::NodeId;
use protocol::oci::mount::MountForm;
use protocol::reference::Reference;

use super::shutdown::End;
use super::{PIVOT, RESUME, Stage};
use crate::imageapi::client::ApiOptions;
use crate::imageapi::server::SOCKET;
use crate::paths::{BUSY_PROGRAM, ConfigDir, RUN_DIR};
use crate::sys::crash::RECOVER;

/// What `--help` prints, and wrong usage after its complaint.
pub const USAGE: &str = "\
Usage: layercake-agent ROLE

Roles:
  agent [--standalone] [--run-dir DIR] [--config-dir DIR] [--cache-dir DIR] [--imageset REF] [--server URL]
        [--node ID] [--busy FILE] [--log LEVEL] [--mount-forms LIST]
      What a node does: fetch, mount and run ImageSets.
      --standalone    as a root service on any Linux host; needs --imageset, --imageapi, or --server and --node
      --run-dir DIR   keep everything below DIR (default /run/layercake)
      --config-dir DIR
                      CA certificates (ca/), keys (keys/) and registries.json (default /etc/layercake)
      --cache-dir DIR keep fetched blobs in DIR, too, for the next start (Layer0 mounts a disk labelled LAYERCAKE)
      --imageset REF  run this ImageSet, without a server
      --server URL    a boot server; may be given several times
      --node ID       this node's name at the server
      --busy FILE     a program that ends with 0 when the node may be disturbed by a roll, and else writes why not
                      (default /etc/layercake/busy, where there is one)
      --log LEVEL     error, warn, info (default) or debug
      --mount-forms LIST
                      mount forms of images that are taken in the place of layers, the best first, parted by commas
                      (default squashfs,erofs as far as the kernel has them), or none
       --imageapi      with --standalone: serve the ImageAPI on DIR/imageapi.sock, as Layer0 always does
       --imageapi-listen ADDRESS:PORT
                       serve it by TCP as well, with mutual TLS (default: /etc/layercake/imageapi/listen, else not)
       --imageapi-tls DIR
                       cert.pem, key.pem and clients.pem for that (default /etc/layercake/imageapi)
  pull [--run-dir DIR] [--config-dir DIR] [--cache-dir DIR] [--log LEVEL] [--mount-forms LIST] REF
      Fetch the ImageSet REF into DIR, check every digest, and end: what is there already is not fetched again.
      Not while an agent runs in DIR.
  api [--run-dir DIR] [--socket PATH] METHOD TARGET [JSON]
      One request of the ImageAPI: `api GET /container`. JSON `-` reads standard input.
  why [--run-dir DIR]
      What this node waits for and what went wrong last; for the rescue shell.
  init                PID 1 of Layer0; the kernel starts it as /init
  monitor DIR         the process beside one container (started by the agent)
  container-init ...  the first process of a container (started by a monitor)
  settle              unmounts everything, as PID 1's last child
  container-exec      an operator's command in a container (started by the agent)
  -q -- NAME          load a module that the kernel asks for (started by the kernel)

  --help, --version
";

/// Options of the role `agent`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AgentOptions {
    /// Runs on a host that is not Layer0: no modules, network, kernel log or power duties.
    pub standalone: bool,
    /// Where everything is kept.
    pub run_dir: PathBuf,
    /// The site's certificates, keys and registries.
    pub config: ConfigDir,
    /// A directory that keeps blobs for the next start, in place of a disk.
    pub cache_dir: Option<PathBuf>,
    /// An ImageSet to run without a server; goes before the kernel command line.
    pub imageset: Option<Reference>,
    /// Base URLs of boot servers without a final `/`; go before the kernel command line's.
    pub servers: Vec<String>,
    /// The node's id; goes before the kernel command line.
    pub node: Option<NodeId>,
    /// The program that says whether the node is busy.
    pub busy: PathBuf,
    /// How much is logged; goes before the kernel command line.
    pub log: Option<LogLevel>,
    /// Serves the ImageAPI although this is not Layer0.
    pub imageapi: bool,
    /// Where the ImageAPI listens beside its Unix socket.
    pub imageapi_listen: Option<SocketAddr>,
    /// The directory with its certificates.
    pub imageapi_tls: Option<PathBuf>,
    /// The mount forms that are taken, the best first.
    pub mount_forms: Vec<MountForm>,
}

impl Default for AgentOptions {
    fn default() -> Self {
        Self {
            standalone: false,
            run_dir: PathBuf::from(RUN_DIR),
            config: ConfigDir::default(),
            cache_dir: None,
            imageset: None,
            servers: Vec::new(),
            node: None,
            busy: PathBuf::from(BUSY_PROGRAM),
            log: None,
            imageapi: false,
            imageapi_listen: None,
            imageapi_tls: None,
            mount_forms: MountForm::ALL.to_vec(),
        }
    }
}

/// Options of the role `pull`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PullOptions {
    /// Where the store is kept.
    pub run_dir: PathBuf,
    /// The site's certificates, keys and registries.
    pub config: ConfigDir,
    /// A directory that keeps blobs for the next time.
    pub cache_dir: Option<PathBuf>,
    /// The ImageSet.
    pub reference: Reference,
    /// How much is logged.
    pub log: LogLevel,
    /// The mount forms that are taken, the best first.
    pub mount_forms: Vec<MountForm>,
}

/// What this process is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Role {
    /// PID 1 of Layer0.
    Init(Stage),
    /// The last child of PID 1: lets file systems and disks go.
    Settle,
    /// What a node does.
    Agent(AgentOptions),
    /// Fetches one ImageSet and ends.
    Pull(PullOptions),
    /// Asks the ImageAPI once; a body of `-` is still to be read from standard input.
    Api(ApiOptions),
    /// Says what the node waits for.
    Why {
        /// Where the agent keeps everything.
        run_dir: PathBuf,
    },
    /// The process beside one container.
    Monitor {
        /// The container's directory.
        dir: PathBuf,
    },
    /// The first process of a container.
    ContainerInit {
        /// Whether it was born in a cgroup of its own.
        in_cgroup: bool,
        /// How many held sockets it inherits.
        sockets: u8,
    },
    /// The helper beside an operator's command in a container.
    ContainerExec,
    /// Loads a module that the kernel asks for by `-q -- NAME`, as it would ask modprobe(8).
    Modprobe {
        /// A module's name or an alias, `fs-nfs`.
        request: String,
    },
    /// `--help`.
    Help,
    /// `--version`.
    Version,
}

/// Reads the arguments, `argv[0]` first. `pid1`: this process has PID 1 (of the machine or of a PID namespace).
///
/// The kernel hands stray words of its command line to `/init` as arguments, so as PID 1 under that name only
/// its own stages count. A container's first process is PID 1 too, of its namespace, but has a role's name.
///
/// # Errors
/// One sentence that names the argument.
pub fn parse(argv: &[OsString], pid1: bool) -> Result<Role, String> {
    if pid1 && argv.len() <= 1 {
        return Ok(Role::Init(Stage::First));
    }
    let (program, args) = argv
        .split_first()
        .map_or((OsStr::new(""), &[][..]), |(program, args)| (program.as_os_str(), args));
    let stage = |(word, stage): (&CStr, Stage)| {
        args.iter().any(|arg| arg.as_bytes() == word.to_bytes()).then_some(stage)
    };
    let stages = [(RECOVER, Stage::Recover), (PIVOT, Stage::Pivot), (RESUME, Stage::Resume)];
    let ends = End::ALL.map(|end| (end.stage(), Stage::End(end)));
    let stage = stages.into_iter().chain(ends).find_map(stage).unwrap_or(Stage::First);
    if pid1 && Path::new(program).file_name() == Some(OsStr::new("init")) {
        return Ok(Role::Init(stage));
    }
    let Some((role, rest)) = args.split_first() else {
        return if pid1 { Ok(Role::Init(stage)) } else { Err("a role is needed".to_owned()) };
    };
    match role.to_str() {
        Some("init") if pid1 => Ok(Role::Init(stage)),
        Some("settle") => Ok(Role::Settle),
        Some("init") => Err("the role init needs PID 1: let the kernel start it".to_owned()),
        Some("agent") => parse_agent(rest),
        Some("-q") => match rest {
            [dashes, name] if dashes == "--" => {
                Ok(Role::Modprobe { request: name.to_string_lossy().into_owned() })
            }
            _ => Err("-q is the kernel's way to ask for a module: -q -- NAME".to_owned()),
        },
        Some("pull") => parse_pull(rest),
        Some("api") => parse_api(rest),
        Some("why") => match rest {
            [] => Ok(Role::Why { run_dir: PathBuf::from(RUN_DIR) }),
            [key, dir] if key == "--run-dir" => Ok(Role::Why { run_dir: PathBuf::from(dir) }),
            _ => Err("why takes --run-dir DIR and nothing else".to_owned()),
        },
        Some("monitor") => match rest {
            [dir] => Ok(Role::Monitor { dir: PathBuf::from(dir) }),
            _ => Err("monitor needs exactly one directory".to_owned()),
        },
        Some("container-init") => match rest {
            [mode, sockets] => Ok(Role::ContainerInit {
                in_cgroup: mode == "cgroup",
                sockets: sockets.to_str().and_then(|text| text.parse().ok()).unwrap_or_default(),
            }),
            _ => Err("container-init is started by a monitor only".to_owned()),
        },
        Some("container-exec") => Ok(Role::ContainerExec),
        Some("--help" | "-h" | "help") => Ok(Role::Help),
        Some("--version" | "-V") => Ok(Role::Version),
        _ if pid1 => Ok(Role::Init(stage)),
        _ => Err(format!("unknown role `{}`", role.to_string_lossy())),
    }
}

/// The same options as the agent's, those that a pull has, and one ImageSet.
fn parse_pull(args: &[OsString]) -> Result<Role, String> {
    let mut options = AgentOptions::default();
    let mut args = args.iter();
    while let Some(arg) = args.next() {
        let (text, key, inline) = split(arg)?;
        match key {
            "--help" | "-h" => return Ok(Role::Help),
            "--run-dir" | "--config-dir" | "--cache-dir" | "--log" | "--mount-forms" => {
                set(&mut options, key, &value(key, inline, &mut args)?)?
            }
            _ if text.starts_with('-') => {
                return Err(format!("unknown argument `{text}` of role pull"));
            }
            _ if options.imageset.is_some() => {
                return Err(format!("`{text}`: pull takes one ImageSet"));
            }
            _ => {
                let reference = text.parse().map_err(|error| format!("{text}: {error}"))?;
                options.imageset = Some(reference);
            }
        }
    }
    let reference = options.imageset.ok_or("pull needs the reference of an ImageSet")?;
    let log = options.log.unwrap_or_default();
    let AgentOptions { run_dir, config, cache_dir, mount_forms, .. } = options;
    Ok(Role::Pull(PullOptions { run_dir, config, cache_dir, reference, log, mount_forms }))
}

/// `api [OPTIONS] METHOD TARGET [JSON]`
fn parse_api(args: &[OsString]) -> Result<Role, String> {
    let mut socket = Path::new(RUN_DIR).join(SOCKET);
    let mut words = Vec::new();
    let mut args = args.iter();
    while let Some(arg) = args.next() {
        let (text, key, inline) = split(arg)?;
        match key {
            "--help" | "-h" => return Ok(Role::Help),
            "--socket" => socket = PathBuf::from(value(key, inline, &mut args)?),
            "--run-dir" => socket = Path::new(&value(key, inline, &mut args)?).join(SOCKET),
            _ if text.starts_with("--") => {
                return Err(format!("unknown argument `{text}` of role api"));
            }
            _ => words.push(text.to_owned()),
        }
    }
    let mut words = words.into_iter();
    match (words.next(), words.next(), words.next(), words.next()) {
        (Some(method), Some(target), body, None) => {
            Ok(Role::Api(ApiOptions { socket, method, target, body }))
        }
        _ => Err("api needs METHOD, TARGET and at most one JSON document".to_owned()),
    }
}

/// An argument as text, its key, and the value that stands in it behind `=`.
fn split(arg: &OsStr) -> Result<(&str, &str, Option<OsString>), String> {
    let text = arg.to_str().ok_or_else(|| format!("`{}` is not UTF-8", arg.display()))?;
    Ok(match text.split_once('=') {
        Some((key, value)) if key.starts_with("--") => (text, key, Some(OsString::from(value))),
        _ => (text, text, None),
    })
}

/// The value of a key: in the same argument, else the next one.
fn value(
    key: &str,
    inline: Option<OsString>,
    args: &mut std::slice::Iter<'_, OsString>,
) -> Result<OsString, String> {
    let value = inline.or_else(|| args.next().cloned());
    value.filter(|value| !value.is_empty()).ok_or_else(|| format!("{key} needs a value"))
}

fn parse_agent(args: &[OsString]) -> Result<Role, String> {
    let mut options = AgentOptions::default();
    let mut args = args.iter();
    while let Some(arg) = args.next() {
        let (text, key, inline) = split(arg)?;
        match key {
            "--standalone" if inline.is_none() => options.standalone = true,
            "--imageapi" if inline.is_none() => options.imageapi = true,
            "--help" | "-h" => return Ok(Role::Help),
            "--run-dir" | "--config-dir" | "--cache-dir" | "--imageset" | "--server" | "--node"
            | "--busy" | "--log" | "--mount-forms" | "--imageapi-listen" | "--imageapi-tls" => {
                set(&mut options, key, &value(key, inline, &mut args)?)?;
            }
            _ => return Err(format!("unknown argument `{text}` of role agent")),
        }
    }
    check(options)
}

fn set(options: &mut AgentOptions, key: &str, value: &OsStr) -> Result<(), String> {
    match key {
        "--run-dir" => options.run_dir = PathBuf::from(value),
        "--config-dir" => options.config = ConfigDir::new(value),
        "--cache-dir" => options.cache_dir = Some(PathBuf::from(value)),
        _ => return set_text(options, key, value),
    }
    Ok(())
}

fn set_text(options: &mut AgentOptions, key: &str, value: &OsStr) -> Result<(), String> {
    let text = value.to_str().ok_or_else(|| format!("{key} {}: not UTF-8", value.display()))?;
    let bad = |problem: &dyn std::fmt::Display| format!("{key} {text}: {problem}");
    match key {
        "--imageset" => options.imageset = Some(text.parse().map_err(|e| bad(&e))?),
        "--busy" => options.busy = PathBuf::from(text),
        "--imageapi-tls" => options.imageapi_tls = Some(PathBuf::from(text)),
        "--imageapi-listen" => {
            options.imageapi_listen =
                Some(text.parse().map_err(|_| bad(&"expected ADDRESS:PORT"))?);
        }
        "--node" => options.node = Some(text.parse().map_err(|e| bad(&e))?),
        "--mount-forms" if text == "none" => options.mount_forms.clear(),
        "--mount-forms" => {
            let forms = text.split(',').map(str::parse).collect::<Result<_, _>>();
            options.mount_forms = forms.map_err(|e| bad(&e))?;
        }
        "--log" => {
            options.log = Some(match text {
                "error" => LogLevel::Error,
                "warn" => LogLevel::Warn,
                "info" => LogLevel::Info,
                "debug" => LogLevel::Debug,
                _ => return Err(bad(&"expected error, warn, info or debug")),
            });
        }
        _ => {
            for url in text.split(',') {
                if !url.starts_with("http://") && !url.starts_with("https://") {
                    return Err(bad(&"expected a URL that begins with http:// or https://"));
                }
                options.servers.push(url.trim_end_matches('/').to_owned());
            }
        }
    }
    Ok(())
}

/// What fits together: a standalone agent has no kernel command line to fall back on.
fn check(options: AgentOptions) -> Result<Role, String> {
    let by_server = !options.servers.is_empty();
    if options.imageset.is_some() && by_server {
        return Err("--imageset and --server exclude each other".to_owned());
    }
    if options.standalone && !by_server && options.imageset.is_none() && !options.imageapi {
        return Err("--standalone needs --imageset, --imageapi, or --server and --node".to_owned());
    }
    if options.standalone && by_server && options.node.is_none() {
        return Err("--server needs --node with --standalone".to_owned());
    }
    Ok(Role::Agent(options))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(line: &str, pid1: bool) -> Result<Role, String> {
        let argv: Vec<OsString> = line.split(' ').map(OsString::from).collect();
        parse(&argv, pid1)
    }

    #[track_caller]
    fn check_error(line: &str, expect: &str) {
        let error = run(line, false).unwrap_err();
        assert!(error.contains(expect), "{line}: {error}");
    }

    #[test]
    fn the_kernel_gets_pid_1_whatever_stray_words_it_passes() {
        for line in ["/init", "/init agent", "/init quiet splash", "/sbin/x", "/sbin/x word"] {
            assert_eq!(run(line, true), Ok(Role::Init(Stage::First)), "{line}");
        }
        for (line, stage) in [
            ("init --recover", Stage::Recover),
            ("init --pivot", Stage::Pivot),
            ("init --resume", Stage::Resume),
            ("init --kexec", Stage::End(End::Kexec)),
        ] {
            assert_eq!(run(line, true), Ok(Role::Init(stage)), "{line}");
        }
        assert_eq!(run("init settle", false), Ok(Role::Settle));
    }

    #[test]
    fn pid_1_of_a_namespace_keeps_its_role() {
        let expect = Role::Modprobe { request: "fs-nfs".to_owned() };
        assert_eq!(run("/init -q -- fs-nfs", false), Ok(expect));
        let expect = Role::ContainerInit { in_cgroup: true, sockets: 2 };
        assert_eq!(run("layercake-agent container-init cgroup 2", true), Ok(expect));
        let expect = Role::Monitor { dir: "/d".into() };
        assert_eq!(run("@m monitor /d", false), Ok(expect));
    }

    #[test]
    fn the_agent_takes_its_options_in_both_spellings() {
        let line = "a agent --standalone --run-dir=/x --server http://s:1/,https://t --node n1 --log=debug";
        let Ok(Role::Agent(options)) = run(line, false) else { panic!("not the agent") };
        assert!(options.standalone);
        assert_eq!(options.run_dir, Path::new("/x"));
        assert_eq!(options.servers, ["http://s:1", "https://t"]);
        assert_eq!(options.node.map(|node| node.to_string()), Some("n1".to_owned()));
        assert_eq!(options.log, Some(LogLevel::Debug));
        assert_eq!(run("a agent", false), Ok(Role::Agent(AgentOptions::default())));
        for (text, forms) in [
            ("erofs", vec![MountForm::Erofs]),
            ("erofs,squashfs", vec![MountForm::Erofs, MountForm::Squashfs]),
            ("none", Vec::new()),
        ] {
            let line = format!("a agent --mount-forms {text}");
            let Ok(Role::Agent(options)) = run(&line, false) else { panic!("not the agent") };
            assert_eq!(options.mount_forms, forms);
        }
    }

    #[test]
    fn wrong_usage_names_the_argument() {
        check_error("a", "a role is needed");
        check_error("a dance", "`dance`");
        check_error("a init", "PID 1");
        check_error("a monitor", "exactly one");
        check_error("a agent --verbose", "`--verbose`");
        check_error("a agent --log", "--log needs a value");
        check_error("a agent --log loud", "--log loud");
        check_error("a agent --server ftp://x", "ftp://x");
        check_error("a agent --standalone", "--imageset");
        check_error("a agent --standalone --server http://x", "--node");
        check_error("a agent --mount-forms ext4", "--mount-forms ext4");
        check_error("a agent --node ../x", "--node ../x");
    }

    #[test]
    fn a_pull_takes_one_imageset_and_a_place() {
        let Ok(Role::Pull(options)) = run("a pull --run-dir /x http://r:5000/hello:1", false)
        else {
            panic!("not a pull")
        };
        assert_eq!(options.run_dir, Path::new("/x"));
        assert_eq!(options.reference.to_string(), "http://r:5000/hello:1");
        assert_eq!(options.log, LogLevel::default());
        check_error("a pull", "needs the reference");
        check_error("a pull r/a:1 r/b:1", "one ImageSet");
        check_error("a pull --node n r/a:1", "`--node`");
        check_error("a pull not//a:reference", "not//a:reference");
    }

    #[test]
    fn the_imageapi_is_asked_for_and_spoken_to() {
        let line =
            "a agent --standalone --imageapi --imageapi-listen 127.0.0.1:7000 --imageapi-tls /t";
        let Ok(Role::Agent(options)) = run(line, false) else { panic!("not the agent") };
        assert!(options.imageapi && options.imageapi_tls == Some("/t".into()));
        assert_eq!(options.imageapi_listen, Some(([127, 0, 0, 1], 7000).into()));
        let Ok(Role::Api(options)) = run("a api --run-dir=/x POST /mount {}", false) else {
            panic!("not a request")
        };
        assert_eq!(options.socket, Path::new("/x/imageapi.sock"));
        assert_eq!((options.target.as_str(), options.body.as_deref()), ("/mount", Some("{}")));
        check_error("a agent --imageapi-listen here", "ADDRESS:PORT");
        check_error("a api GET", "METHOD, TARGET");
        check_error("a api GET /a b c", "METHOD, TARGET");
        check_error("a api --loud GET /a", "`--loud`");
    }

    #[test]
    fn help_and_version_are_roles() {
        assert_eq!(run("a --help", false), Ok(Role::Help));
        assert_eq!(run("a agent --help", false), Ok(Role::Help));
        assert_eq!(run("a --version", false), Ok(Role::Version));
    }
}
