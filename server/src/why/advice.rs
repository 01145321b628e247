//! What an operator can do about a reason that a node gives. By the words in it: they come from the agent, which may be of
//! another version, so what is not recognised has no advice.

/// Words in a reason, any of which is enough, and what can be done then. The first row that fits counts.
/// `{set}` is the set, `{node}` the node.
const ADVICE: [(&[&str], &str); 8] = [
    (
        &["is not signed", "no good signature", "a signature by"],
        "sign it: layercake imageset sign {set} --key KEY; or roll to a version that is signed",
    ),
    (
        &["signatures cannot be verified"],
        "put good keys into the site overlay: cargo xtask overlay --imageset-key FILE",
    ),
    (
        &["status 404", "not found"],
        "see what is there: layercake imageset list; push it: layercake imageset push FILE, and roll again",
    ),
    (
        &["status 401", "status 403", "needs a login"],
        "give nodes a login for that registry: [[registries]] in the server's config",
    ),
    (
        &["digest is", "its descriptor says", "the image's config says", "malformed"],
        "push it again: what the registry (or a mirror, or the way to it) gives is not what was pushed",
    ),
    (
        &["certificate", "no CA"],
        "trust the registry's authority: cargo xtask overlay --ca FILE, or [[registries]] in the server's config",
    ),
    (
        &["memory", "no room", "No space"],
        "give the node more memory or a disk labelled LAYERCAKE, or undo: layercake roll undo NAME --node {node}",
    ),
    (
        &["refused", "timed out", "unreachable", "No route", " failed", "broke off", "resolve"],
        "see that the registry runs and that the node's network leads to it",
    ),
];

/// What can be done about this reason.
pub(super) fn on(reason: &str, set: &str, node: &str) -> Option<String> {
    let fits = |words: &[&str]| words.iter().any(|word| reason.contains(word));
    let (_, text) = ADVICE.iter().find(|(words, _)| fits(words))?;
    Some(text.replace("{set}", set).replace("{node}", node))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reasons_that_agents_give_have_advice() {
        for (reason, expected) in [
            ("sha256:1 is not signed; a signature by key site.pem is asked for", "sign hello:2"),
            ("signatures cannot be verified: x", "overlay --imageset-key"),
            ("GET http://r/v2/hello/manifests/2: status 404: {}", "imageset push"),
            ("http://r: the content's digest is sha256:1, expected sha256:2", "push it again"),
            ("GET http://r/v2/ failed: io: Connection refused", "registry runs"),
            ("GET https://r: status 401: x", "[[registries]]"),
        ] {
            let text = on(reason, "hello:2", "n1").expect(reason);
            assert!(text.contains(expected), "{reason}: {text}");
        }
        assert_eq!(on("the moon is full", "hello:2", "n1"), None);
    }
}
