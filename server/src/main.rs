//! The `layercake` binary: reads the arguments, sets up logs and TLS, calls the library, turns its error into an exit code.

use std::io::{IsTerminal, Write};
use std::process::ExitCode;

use clap::Parser;
use server::cli::Cli;
use tracing_subscriber::EnvFilter;

/// Levels of the log, as tracing-subscriber's `EnvFilter` reads them: `debug`, `server=debug,sqlx=warn`.
const LOG_VARIABLE: &str = "LAYERCAKE_LOG";

fn main() -> ExitCode {
    let cli = Cli::parse();
    start_log();
    // Err only means that a provider is there already, which is as good.
    let _ = rustls::crypto::ring::default_provider().install_default();
    match cli.run() {
        Ok(code) => code,
        Err(error) => {
            // Where stderr is gone there is nobody to tell.
            let _ = writeln!(std::io::stderr().lock(), "layercake: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn start_log() {
    let filter = EnvFilter::try_from_env(LOG_VARIABLE).unwrap_or_else(|_| EnvFilter::new("info"));
    let no_color = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal() && !no_color)
        .with_target(false)
        .init();
}
