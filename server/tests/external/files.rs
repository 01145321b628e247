//! Files of the config: which node is given which, that changed ones reach it, and that nobody else sees them.

use std::fs;

use serde_json::{Value, json};

use super::{NODE, get, layercake, serve};

/// `czNjcmV0LXdvcmQ=` in JSON.
const SECRET: &str = "s3cret-word";

#[test]
fn a_node_is_given_its_files_and_changed_ones_and_nobody_else_is() {
    let dir = tempfile::tempdir().expect("dir");
    fs::write(dir.path().join("key"), SECRET).expect("key");
    let more = "[[files]]\nname = \"key\"\npath = \"key\"\nnodes = [\"n1\"]\n\
                [[files]]\nname = \"motd\"\ncontent = \"hello\"\n\
                [[node]]\nid = \"n2\"\nmac = \"52:54:00:00:00:03\"\n";
    let (base, stop) = serve(dir.path(), more);
    let desired = |node: &str, query: &str| {
        let (status, text) = get(&format!("{base}/v1/nodes/{node}/desired{query}"));
        (status, serde_json::from_str::<Value>(&text).unwrap_or_default())
    };
    let motd = json!({"name": "motd", "content": "aGVsbG8="});
    let (status, first) = desired("n1", "");
    assert_eq!(status, 200);
    assert_eq!(first["files"], json!([{"name": "key", "content": "czNjcmV0LXdvcmQ="}, motd]));
    let (_, second) = desired("n2", "");
    assert_eq!(second["files"], json!([motd]));
    let query = |document: &Value, wait: u8| {
        let (version, tag) = (&document["version"], document["registries_tag"].as_str());
        format!("?after={version}&wait={wait}&registries={}", tag.expect("tag"))
    };
    assert_eq!(desired("n1", &query(&first, 0)).0, 204);
    assert_eq!(desired("n1", &query(&second, 0)).0, 200, "another node's tag is another one");
    // Nobody else is told.
    let shown = |text: &str| text.contains(SECRET) || text.contains("czNjcmV0LXdvcmQ");
    for path in ["/v1/nodes", NODE, "/v1/nodes/n2/desired", "/v1/imagesets", "/v1/rolls"] {
        let text = get(&format!("{base}{path}")).1;
        assert!(!shown(&text), "{path}");
        assert!(path.ends_with("desired") || !text.contains("aGVsbG8"), "{path}: {text}");
    }
    assert!(!shown(&layercake(dir.path(), &format!("--server {base} node show n1"))));
    for entry in fs::read_dir(dir.path().join("data")).expect("data").flatten() {
        let kept = fs::read(entry.path()).unwrap_or_default();
        let kept = String::from_utf8_lossy(&kept);
        assert!(!shown(&kept), "{}", entry.path().display());
    }
    // The poll that waits is answered as soon as the file is read again.
    fs::write(dir.path().join("new"), "another").expect("new");
    fs::rename(dir.path().join("new"), dir.path().join("key")).expect("rename");
    let (status, changed) = desired("n1", &query(&first, 15));
    assert_eq!(status, 200);
    assert_eq!(changed["version"], first["version"]);
    assert_eq!(changed["files"][0]["content"], "YW5vdGhlcg==");
    assert_eq!(desired("n2", &query(&second, 0)).0, 204, "it has nothing to do with this node");
    stop.send_replace(true);
}
