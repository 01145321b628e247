//! How registries are spoken to, the same for every command that does, and what names an ImageSet on a command line.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, anyhow};
use imagebuilder::client::Options;
use imagebuilder::credentials::AuthFiles;
use imagebuilder::place::Place;
use imagebuilder::push::{OnProgress, Progress};
use indicatif::ProgressBar;
use protocol::reference::Reference;

use crate::cli::output;
use crate::config::values::BaseUrl;

/// Options of every command that speaks to registries.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Registries")]
pub(in crate::cli) struct RegistryArgs {
    /// Trust the certificates of this PEM file, and no others. May be given several times.
    #[arg(long, value_name = "FILE")]
    ca: Vec<PathBuf>,
    /// Speak plain HTTP to registries whose reference has no scheme. One that begins with http:// or https:// is
    /// spoken to as it says.
    #[arg(long)]
    plain_http: bool,
    /// Read credentials from this file alone. By default REGISTRY_AUTH_FILE, or else
    /// ${XDG_RUNTIME_DIR}/containers/auth.json, ~/.config/containers/auth.json and ~/.docker/config.json, with the
    /// credential helpers that they name.
    #[arg(long, value_name = "FILE")]
    authfile: Option<PathBuf>,
}

impl RegistryArgs {
    /// What the imagebuilder is told.
    pub(in crate::cli) fn options(&self) -> anyhow::Result<Options> {
        let mut ca_pem = Vec::new();
        for path in &self.ca {
            let pem = std::fs::read(path)
                .with_context(|| format!("cannot read the certificates {}", path.display()))?;
            ca_pem.push(pem);
        }
        let auth_files = match &self.authfile {
            Some(path) => AuthFiles::named(path.clone()),
            None => AuthFiles::from_environment(),
        };
        Ok(Options { ca_pem, auth_files, ..Options::default() })
    }

    /// A layout, a reference, or `NAME:VERSION` in the server's registry.
    pub(in crate::cli) fn place(&self, text: &str, server: &BaseUrl) -> anyhow::Result<Place> {
        let is_layout = text.starts_with("oci:") || Path::new(text).join("oci-layout").is_file();
        if is_layout || text.starts_with(['.', '/']) {
            return Ok(Place::parse(text)?);
        }
        Ok(Place::Registry(self.reference(text, server)?))
    }

    /// A reference, or `NAME:VERSION` in the server's registry.
    pub(in crate::cli) fn reference(
        &self,
        text: &str,
        server: &BaseUrl,
    ) -> anyhow::Result<Reference> {
        let whole = match (text.contains("://"), text.contains('/')) {
            (true, _) => text.to_owned(),
            (false, true) if self.plain_http => format!("http://{text}"),
            (false, true) => text.to_owned(),
            (false, false) => format!("{server}/{text}"),
        };
        Ok(whole.parse()?)
    }
}

/// A bar of bytes, and what moves it.
pub(super) fn bar(verb: &'static str) -> (ProgressBar, OnProgress) {
    let bar = output::byte_bar().with_message(verb);
    let show = bar.clone();
    let on_progress = Arc::new(move |progress: Progress| {
        show.set_length(progress.total);
        show.set_position(progress.sent + progress.skipped);
    });
    (bar, on_progress)
}

/// Runs work to its end, or to Ctrl-C: returning, and not the signal's own end, removes temporary directories.
pub(super) fn wait<T, E>(work: impl Future<Output = Result<T, E>>) -> anyhow::Result<T>
where
    anyhow::Error: From<E>,
{
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let done = runtime.block_on(async {
        tokio::select! {
            done = work => done.map_err(anyhow::Error::from),
            _ = tokio::signal::ctrl_c() => Err(anyhow!("interrupted")),
        }
    });
    // A layer that is still being packed must not hold the end up.
    runtime.shutdown_background();
    done
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_references_and_layouts_are_told_apart() {
        let server: BaseUrl = "http://s:8080".parse().expect("url");
        let args = |plain_http| RegistryArgs { ca: Vec::new(), plain_http, authfile: None };
        for (text, plain_http, expected) in [
            ("hello:1", false, "http://s:8080/hello:1"),
            ("r.example/a:1", false, "r.example/a:1"),
            ("r.example/a:1", true, "http://r.example/a:1"),
            ("https://r.example/a:1", true, "r.example/a:1"),
            ("http://r.example/a:1", false, "http://r.example/a:1"),
            ("oci:dir:1", true, "oci:dir:1"),
            ("./dir", true, "oci:./dir"),
        ] {
            let place = args(plain_http).place(text, &server).expect(text);
            assert_eq!(place.to_string(), expected);
        }
        assert!(args(false).place("Hello:1", &server).is_err());
    }
}
