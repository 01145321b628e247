//! What `sign` and `verify` are about: an ImageSet in some registry, or in the server's own by NAME:VERSION.

use anyhow::Context;
use protocol::reference::Reference;

use crate::config::values::BaseUrl;

#[derive(Debug, clap::Args)]
pub(crate) struct Target {
    /// A full reference such as `http://HOST:5000/REPOSITORY:TAG`, or NAME:VERSION in the server's own registry. Plain HTTP
    /// only if this begins with http://.
    #[arg(value_name = "REFERENCE")]
    target: String,
}

impl Target {
    pub(crate) fn reference(&self, server: &BaseUrl) -> anyhow::Result<Reference> {
        let text = match self.target.contains('/') {
            true => self.target.clone(),
            false => format!("{server}/{}", self.target),
        };
        Ok(text.parse()?)
    }
}

/// Runs asynchronous work of the imagebuilder to its end.
pub(crate) fn block_on<T>(work: impl Future<Output = T>) -> anyhow::Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    Ok(runtime.context("no runtime")?.block_on(work))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_meant_in_the_server_s_registry_and_a_reference_where_it_says() {
        let server: BaseUrl = "http://10.9.0.1:8080".parse().expect("url");
        for (target, reference) in [
            ("hello:1", "http://10.9.0.1:8080/hello:1"),
            ("reg.example/a/b:2", "reg.example/a/b:2"),
            ("http://127.0.0.1:5000/a", "http://127.0.0.1:5000/a"),
        ] {
            let target = Target { target: target.to_owned() };
            assert_eq!(target.reference(&server).expect("reference").to_string(), reference);
        }
        Target { target: "No:1:2".to_owned() }.reference(&server).expect_err("no reference");
    }
}
