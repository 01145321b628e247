//! The command line: one file per subcommand. Results on stdout, progress and logs on stderr; exit 0 done, 1 failed,
//! 2 wrong usage.

mod channel;
mod client;
mod completions;
mod exec;
mod imageset;
mod layer0;
mod logs;
mod man;
mod node;
mod output;
mod registry;
mod roll;
mod serve;
mod why;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use self::client::Client;
use self::output::Output;

/// Boots machines over the network and gives them their system as ImageSets from an OCI registry.
#[derive(Debug, Parser)]
#[command(name = "layercake", version, propagate_version = true, arg_required_else_help = true)]
pub struct Cli {
    /// The boot server that is spoken to. Behind https:// the system's CAs are trusted, or those of SSL_CERT_FILE.
    #[arg(
        long,
        global = true,
        env = "LAYERCAKE_SERVER",
        default_value = "http://127.0.0.1:8080",
        value_name = "URL"
    )]
    server: crate::config::values::BaseUrl,
    /// Results as JSON.
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the boot server: DHCP, TFTP, HTTP and the registry.
    Serve(serve::Args),
    /// Look at nodes, and switch them off or on again.
    #[command(subcommand)]
    Node(node::Command),
    /// Say why a node is not what is wanted of it, what happens next, and what can be done.
    Why(why::Args),
    /// Build, push, pull, inspect, compare, copy, sign and verify ImageSets.
    #[command(subcommand)]
    Imageset(imageset::Command),
    /// Bring nodes to a version of an ImageSet.
    #[command(subcommand)]
    Roll(roll::Command),
    /// List, add and sign builds of Layer0, and bring nodes to one by kexec, by reboot, or only its agent.
    #[command(subcommand)]
    Layer0(layer0::Command),
    /// Show what a container of a node wrote, or the node itself, and follow it.
    Logs(logs::Args),
    /// Run a command in a container of a node. Exits as the command does; 255 where it cannot be run.
    Exec(exec::Args),
    /// Print the completions of a shell.
    Completions(completions::Args),
    /// Write the man pages.
    Man(man::Args),
}

impl Cli {
    /// Does what was asked. The exit code is 0, or that of the command that was run on a node.
    ///
    /// # Errors
    /// Whatever went wrong, in words for the person who asked.
    pub fn run(self) -> anyhow::Result<ExitCode> {
        let output = Output { json: self.json };
        let client = || Client::new(&self.server);
        let done = match self.command {
            Command::Serve(args) => serve::run(&args, output),
            Command::Node(command) => node::run(command, &client(), output),
            Command::Why(args) => why::run(&args, &client(), output),
            Command::Imageset(command) => imageset::run(&command, &self.server, output),
            Command::Roll(command) => roll::run(command, &client(), output),
            Command::Layer0(command) => layer0::run(command, &client(), output),
            Command::Logs(args) => logs::run(&args, &client(), &self.server, output),
            Command::Exec(args) => return Ok(exec::run(&args, &client(), &self.server)),
            Command::Completions(args) => completions::run(&args),
            Command::Man(args) => man::run(&args),
        };
        done.map(|()| ExitCode::SUCCESS)
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_definitions_are_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn usual_command_lines_are_understood() {
        for line in [
            "layercake serve --config l.toml",
            "layercake serve --init",
            "layercake serve --init l.toml",
            "layercake node list --json",
            "layercake --server http://h:1 node show n1",
            "layercake node power n1 reboot",
            "layercake layer0 list",
            "layercake layer0 add out/layer0 --name lab",
            "layercake layer0 sign out/layer0 --key site.key",
            "layercake layer0 start n1,n2 --layer0 lab --how kexec --wait",
            "layercake layer0 start all --layer0 sha256:abcdef --how agent --no-wait",
            "layercake layer0 status --json",
            "layercake why n1 --json",
            "layercake imageset build i.toml --out dir",
            "layercake imageset push i.toml --to http://r:5000/a",
            "layercake imageset push i.toml --to r:5000 --ca ca.pem --authfile auth.json",
            "layercake imageset pull hello:1 dir",
            "layercake imageset inspect oci:dir:1 --json",
            "layercake imageset list r:5000/hello --plain-http",
            "layercake imageset diff hello:1 hello:2",
            "layercake imageset copy hello:1 https://r/hello:1",
            "layercake imageset keygen",
            "layercake imageset keygen dir/site --json",
            "layercake imageset sign hello:1 --key site.key",
            "layercake imageset verify http://r:5000/a/b:1 --key a.pem --key b.pem --index-only",
            "layercake imageset gc --dry-run --grace 60 --token t",
            "layercake imageset token",
            "layercake roll start n1,n2 --imageset hello:2 --wait --timeout 60",
            "layercake roll start all --imageset http://r:1/hello:2",
            "layercake roll start all --no-wait --force --imageset hello:2",
            "layercake roll undo hello --all",
            "layercake roll undo hello --node n1,n2 --timeout 5",
            "layercake roll show 3",
            "layercake logs n1 web -f -n 100 --set hello",
            "layercake logs n1 hello/web --json",
            "layercake logs n1 --agent -f",
            "layercake exec n1 web -- ls -l",
            "layercake exec -it n1 hello/web -u 1000:10 -e A=1 -e B= sh -c x",
            "layercake roll status",
            "layercake node busy n1",
            "layercake node busy n1 off",
            "layercake node busy n1 on --reason job",
            "layercake completions bash",
            "layercake man dir",
        ] {
            Cli::try_parse_from(line.split(' ')).expect(line);
        }
    }

    #[test]
    fn wrong_usage_is_refused() {
        for line in [
            "layercake serve",
            "layercake serve --init a --config b",
            "layercake node power n1 explode",
            "layercake node show N_1",
            "layercake why",
            "layercake roll start n1",
            "layercake roll start n1 --imageset hello:1 --no-wait --timeout 3",
            "layercake roll undo hello",
            "layercake roll undo --all",
            "layercake roll start n1 --imageset hello",
            "layercake imageset sign hello:1",
            "layercake imageset verify hello:1",
            "layercake roll show x",
            "layercake logs n1 a/b/c",
            "layercake logs n1 web --agent",
            "layercake exec n1 web",
            "layercake --server host node list",
        ] {
            let error = Cli::try_parse_from(line.split(' ')).expect_err(line);
            assert_eq!(error.exit_code(), 2, "{line}");
        }
    }
}
