//! `layercake imageset gc` and `token`: the upkeep of the server's registry.

use serde_json::json;

use super::client::Client;
use super::output::{Output, bytes};
use crate::registry::{GcReport, GcRequest, TokenHash, random_hex};

/// Bytes of a token before they are written as digits: 256 bits.
const TOKEN_BYTES: usize = 32;

#[derive(Debug, clap::Args)]
pub(super) struct Gc {
    /// Only say what would be removed.
    #[arg(long)]
    dry_run: bool,
    /// Keep what was sent less than so many seconds ago; gc_grace_s of the server's config when absent. What is
    /// shorter than a push that is going on takes its blobs away under it.
    #[arg(long, value_name = "SECONDS")]
    grace: Option<u64>,
    /// A push token of the registry, where its config has such.
    #[arg(long, env = "LAYERCAKE_TOKEN", hide_env_values = true, value_name = "TOKEN")]
    token: Option<String>,
}

pub(super) fn gc(args: &Gc, client: &Client, output: Output) -> anyhow::Result<()> {
    let request = GcRequest { dry_run: args.dry_run, grace_s: args.grace };
    let report: GcReport = client.post_long("/v1/imagesets/gc", &request, args.token.as_deref())?;
    output.result(&report, || gc_text(&report))
}

fn gc_text(report: &GcReport) -> String {
    let mut text: String = report.manifests.iter().map(|name| format!("{name}\n")).collect();
    for repository in &report.skipped {
        text.push_str(&format!(
            "{repository} was left alone: something in it is damaged, the server's log says what\n"
        ));
    }
    let done = if report.dry_run { "would be removed" } else { "removed" };
    let (manifests, blobs) = (report.manifests.len(), report.blobs);
    let size = bytes(report.bytes);
    text.push_str(&format!("{manifests} manifests and {blobs} blobs {done}, {size}\n"));
    text
}

pub(super) fn token(output: Output) -> anyhow::Result<()> {
    let token = random_hex::<TOKEN_BYTES>()?;
    let hash = TokenHash::of(&token);
    output.result(&json!({ "token": token, "hash": hash.to_string() }), || {
        format!(
            "{token}\n\nThe server knows it by this line in its config, after a restart:\n\n[registry]\n\
             push_tokens = [\"{hash}\"]\n\nIt is the password of any user (`podman login`, \
             ~/.docker/config.json), or a Bearer token.\n"
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_says_what_went_and_what_was_left_alone() {
        let report = GcReport {
            dry_run: true,
            manifests: vec!["a@sha256:1".to_owned()],
            blobs: 2,
            bytes: 10,
            skipped: vec!["b".to_owned()],
        };
        let size = bytes(10);
        assert_eq!(
            gc_text(&report),
            format!(
                "a@sha256:1\nb was left alone: something in it is damaged, the server's log says \
                 what\n1 manifests and 2 blobs would be removed, {size}\n"
            )
        );
    }
}
