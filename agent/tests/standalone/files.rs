//! Files that the server gives the node: what a container reads, and when it reads changed ones.

use std::fs;

use serde_json::json;

use super::{Bench, ask, base, layer, server, wait_until};

#[test]
fn a_container_reads_the_server_s_file_as_it_was_when_it_was_started() {
    let mut bench = Bench::new();
    let mut containers = server();
    containers[0]["files"] = json!([{"target": "/www/version", "from": "greeting"}]);
    let layers = [base(), layer(&[("www/version", b"the image's own")])];
    let published = bench.site.publish("1", &layers, &containers);
    bench.site.want(&[&published]);
    bench.site.give("first", &[("greeting", "s3cret-1")]);
    let log = bench.dir.path().join("agent.log");
    bench.log = Some(log.clone());
    bench.start_with_server();
    bench.runs(&published);
    assert_eq!(ask(), "s3cret-1");

    // Another file, in a document of the same version.
    let before = bench.instances();
    bench.site.give("second", &[("greeting", "s3cret-2")]);
    let given = bench.run_dir().join("files/given.json");
    // In base64.
    let has = |text: &str| fs::read_to_string(&given).is_ok_and(|given| given.contains(text));
    wait_until("the node has it", || has("czNjcmV0LTI"));
    assert_eq!(ask(), "s3cret-1", "a container that runs keeps what it has");
    assert_eq!(bench.instances(), before);
    bench.kill_container();
    wait_until("another instance", || bench.instances() != before && bench.instances().len() == 1);
    assert_eq!(ask(), "s3cret-2");

    let notes = bench.notes().to_string();
    bench.kill_agent();
    let said = fs::read_to_string(&log).expect("log");
    for text in [notes, said] {
        assert!(!text.contains("s3cret-") && !text.contains("czNjcmV0"), "{text}");
    }
}
