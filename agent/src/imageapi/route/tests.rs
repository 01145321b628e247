//! Requests and what becomes of them, as tables; JSON as it must stand on the wire; hostile bytes.

use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;

fn ask(method: &str, target: &str, body: &str) -> Result<(Call, Vec<String>), ApiError> {
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    let path = format!("{BASE_PATH}{path}");
    read(&Request { method, path: &path, query, accept: None, body: body.as_bytes() })
}

#[track_caller]
fn refused(method: &str, target: &str, body: &str, status: u16, code: i64, message: &str) {
    let error = ask(method, target, body).expect_err(target);
    assert_eq!((error.status, error.code), (status, code), "{method} {target} {body}: {error}");
    assert_eq!(error.message, message, "{method} {target} {body}");
}

#[test]
fn paths_methods_and_types_of_answers_are_refused_in_the_references_words() {
    refused("GET", "/x", "", 404, 404, "path /imageapi/v1/x was not found");
    refused("GET", "", "", 404, 404, "path /imageapi/v1 was not found");
    refused("PUT", "/mount", "", 405, 405, "method PUT is not allowed, but [DELETE,GET,POST] are");
    refused(
        "HEAD",
        "/container",
        "",
        405,
        405,
        "method HEAD is not allowed, but [DELETE,GET,PATCH,POST] are",
    );
    let path = format!("{BASE_PATH}/mount");
    for (accept, good) in [
        ("*/*", true),
        ("", true),
        ("text/html, application/json;q=0.5", true),
        ("application/*", true),
        ("text/html", false),
        ("application/json;q=0", false),
    ] {
        let accept = Some(accept);
        let request = Request { method: "GET", path: &path, query: "", accept, body: b"" };
        assert_eq!(read(&request).map_err(|error| error.status).err(), (!good).then_some(406));
    }
}

#[test]
fn queries_are_read_and_refused_as_the_reference_does() {
    let ok = |method, target| ask(method, target, "").expect(target).0;
    let none = Call::ListMounts { id: None, kind: None };
    assert_eq!(ok("GET", "/mount"), none);
    assert_eq!(ok("GET", "/mount?kind=&id=&x=1"), none);
    assert_eq!(ok("GET", "/mount?id=1&id=7"), Call::ListMounts { id: Some(7), kind: None });
    assert_eq!(ok("DELETE", "/attach?id=3&force=yes"), Call::Detach { id: 3, force: true });
    assert_eq!(ok("DELETE", "/mount?id=3&force=maybe"), Call::Unmount { id: 3, force: false });
    let by_id = Some(Which::Id(4));
    assert_eq!(
        ok("GET", "/container?name=a&id=4&state=dead"),
        Call::ListContainers { which: by_id, state: Some(State::Dead) }
    );
    let name = || Which::Name("web-9.x".to_owned());
    assert_eq!(
        ok("PATCH", "/container?name=web%2D9.x&state=running"),
        Call::SetState { which: name(), run: true }
    );
    assert_eq!(
        ok("DELETE", "/container?name=web-9.x"),
        Call::Delete { which: name(), force: false }
    );

    let int = "id in query must be of type int64: \"x\"";
    refused("GET", "/mount?id=x", "", 422, 601, int);
    refused("DELETE", "/mount?id=", "", 422, 602, "id in query is required");
    let kinds = "kind in query should be one of [iscsi local loopback rbd]";
    refused("GET", "/attach?kind=nfs", "", 422, 606, kinds);
    let states = "state in query should be one of [running exited paused]";
    refused("PATCH", "/container?id=1&state=dead", "", 422, 606, states);
    refused("PATCH", "/container?id=1", "", 422, 602, "state in query is required");
    let paused = "invalid data type: a container cannot be paused";
    refused("PATCH", "/container?id=1&state=paused", "", 400, 400, paused);
    let nobody = "invalid data type: neither id nor name is given";
    refused("PATCH", "/container?state=running", "", 400, 400, nobody);
    refused("DELETE", "/container", "", 400, 400, nobody);
    let pattern = r"name in query should match '^[A-Za-z0-9.\-_]*$'";
    refused("GET", "/container?name=a/b", "", 422, 605, pattern);
}

#[test]
fn bodies_are_refused_by_the_first_thing_that_is_wrong() {
    let table: &[(&str, &str, u16, i64, &str)] = &[
        ("/mount", "", 422, 602, "body in body is required"),
        ("/mount", " \n", 422, 602, "body in body is required"),
        (
            "/mount",
            "[]",
            400,
            400,
            "parsing body body from \"\" failed, because it is not an object",
        ),
        ("/mount", r#"{"kind":5}"#, 400, 400, "kind is no string"),
        ("/mount", r#"{"id":1.5}"#, 400, 400, "id is no 64-bit integer"),
        ("/mount", r#"{"id":9223372036854775808}"#, 400, 400, "id is no 64-bit integer"),
        ("/mount", r#"{"overlay":{"lower":{}}}"#, 400, 400, "overlay.lower is no array"),
        (
            "/mount",
            r#"{"kind":"attach","attach":{"fs_type":"ext4","attach":{"kind":"loopback","loopback":{"base":"root"}}}}"#,
            422,
            602,
            "attach.attach.loopback.path in body is required",
        ),
        (
            "/mount",
            r#"{"kind":"tape"}"#,
            422,
            606,
            "kind in body should be one of [attach bind nfs overlay uri oci]",
        ),
        ("/mount", r#"{"overlay":{}}"#, 422, 602, "overlay.lower in body is required"),
        (
            "/mount",
            r#"{"overlay":{"lower":[{},{"kind":"x"}]}}"#,
            422,
            606,
            "overlay.lower.1.kind in body should be one of [attach bind nfs overlay uri oci]",
        ),
        ("/mount", r#"{"bind":{"path":"/","base":""}}"#, 422, 602, "bind.base in body is required"),
        ("/mount", r#"{"mountpoint":"/x"}"#, 422, 619, "mountpoint in body is readOnly"),
        (
            "/mount",
            r#"{"refs":1,"kind":"x"}"#,
            422,
            606,
            "kind in body should be one of [attach bind nfs overlay uri oci]",
        ),
        (
            "/mount",
            r#"{"overlay":{"lower":[{"refs":2}]}}"#,
            422,
            619,
            "overlay.lower.0.refs in body is readOnly",
        ),
        ("/attach", r#"{"device_file":"/dev/x"}"#, 422, 619, "device_file in body is readOnly"),
        (
            "/attach",
            r#"{"rbd":{"image":"","pool":"p","monitors":[]}}"#,
            422,
            604,
            "rbd.image in body should be at least 1 chars long",
        ),
        (
            "/attach",
            r#"{"rbd":{"image":"i","pool":"p","monitors":["1.2.3"]}}"#,
            422,
            605,
            r"rbd.monitors.0 in body should match '^(?:[0-9]{1,3}\.){3}[0-9]{1,3}$'",
        ),
        ("/container", r#"{"mount":{"id":1}}"#, 422, 602, "command in body is required"),
        ("/container", r#"{"command":"x"}"#, 422, 602, "mount in body is required"),
        (
            "/container",
            r#"{"command":"x","mount":{},"name":"a b"}"#,
            422,
            605,
            r"name in body should match '^[A-Za-z0-9.\-_]*$'",
        ),
        (
            "/container",
            r#"{"command":"x","mount":{},"state":"paused"}"#,
            422,
            606,
            "state in body should be one of [created running stopping exited dead]",
        ),
        (
            "/container",
            r#"{"command":"x","mount":{},"namespaces":["net","x"]}"#,
            422,
            606,
            "namespaces.1 in body should be one of [cgroup ipc net mnt pid time user uts]",
        ),
        (
            "/container",
            r#"{"command":"x","mount":{},"logfile":"/x"}"#,
            422,
            619,
            "logfile in body is readOnly",
        ),
    ];
    for (path, body, status, code, message) in table {
        let error = ask("POST", path, body).expect_err(body);
        assert_eq!((error.status, error.code), (*status, *code), "{body}: {error}");
        assert!(error.message.ends_with(message), "{body}: {error}");
    }
    let broken = ask("POST", "/mount", "{").expect_err("broken");
    assert!(
        broken.message.starts_with("parsing body body from \"\" failed, because EOF"),
        "{broken}"
    );
}

#[test]
fn unknown_fields_are_accepted_and_named() {
    let body = r#"{"kind":"bind","colour":1,"bind":{"path":"/","base":"root","x":{"y":[]}}}"#;
    let (call, unknown) = ask("POST", "/mount", body).expect("accepted");
    assert!(matches!(call, Call::Mount(mount) if mount.kind == Some(MountKind::Bind)));
    assert_eq!(unknown, ["bind.x", "colour"]);
}

/// What is posted comes out again: the golden form of a document.
#[track_caller]
fn echoed(path: &str, body: Value, expected: Value) {
    let (call, unknown) = ask("POST", path, &body.to_string()).expect("accepted");
    assert_eq!(unknown, Vec::<String>::new());
    let text = match call {
        Call::Attach(attach) => serde_json::to_string(&attach),
        Call::Mount(mount) => serde_json::to_string(&mount),
        Call::Create(container) => serde_json::to_string(&container),
        other => panic!("{other:?}"),
    };
    assert_eq!(text.expect("JSON"), expected.to_string());
}

#[test]
fn zero_scalars_are_left_out_absent_arrays_are_null_and_defaults_are_not_filled_in() {
    echoed(
        "/attach",
        json!({"kind":"iscsi","id":0,"refs":0,"iscsi":{"initiator":"i","target":"t","host":"h","lun":0,"max_comands":64}}),
        json!({"iscsi":{"host":"h","initiator":"i","max_comands":64,"target":"t"},"kind":"iscsi"}),
    );
    echoed(
        "/attach",
        json!({"kind":"rbd","rbd":{"monitors":["10.0.0.1"],"pool":"p","image":"i","options":{"name":"admin","secret":"hush","ro":true}}}),
        json!({"kind":"rbd","rbd":{"image":"i","monitors":["10.0.0.1"],"options":{"name":"admin","ro":true},"pool":"p"}}),
    );
    echoed(
        "/mount",
        json!({"kind":"nfs","nfs":{"host":"h","path":"/p","ro":false,"version":""}}),
        json!({"kind":"nfs","nfs":{"host":"h","options":null,"path":"/p"}}),
    );
    echoed(
        "/mount",
        json!({"kind":"overlay","overlay":{"lower":[{"id":3},{"kind":"attach","attach":{"attach":{"id":4},"fs_type":"ext4"}}]}}),
        json!({"kind":"overlay","overlay":{"lower":[{"id":3},{"attach":{"attach":{"id":4},"fs_type":"ext4","mount_options":null},"kind":"attach"}]}}),
    );
    echoed(
        "/container",
        json!({"command":"/bin/true","mount":{"id":9},"name":"n.9","systemd":false,"state":""}),
        json!({"command":"/bin/true","mount":{"id":9},"name":"n.9","namespaces":null}),
    );
    echoed(
        "/container",
        json!({"command":"","mount":{},"namespaces":[],"state":"created"}),
        json!({"command":"","mount":{},"namespaces":[],"state":"created"}),
    );
}

#[test]
fn what_comes_out_of_a_get_does_not_go_in_again() {
    let document =
        json!({"kind":"bind","id":1,"refs":1,"mountpoint":"/m","bind":{"base":"root","path":"/"}});
    let error = ask("POST", "/mount", &document.to_string()).expect_err("read-only");
    assert_eq!((error.status, error.code), (422, 619));
}

/// JSON with the API's own names at random places.
fn hostile_json() -> impl Strategy<Value = Value> {
    let names = prop_oneof![
        Just("id".to_owned()),
        Just("kind".to_owned()),
        Just("refs".to_owned()),
        Just("attach".to_owned()),
        Just("mount".to_owned()),
        Just("overlay".to_owned()),
        Just("lower".to_owned()),
        Just("bind".to_owned()),
        Just("base".to_owned()),
        Just("path".to_owned()),
        Just("command".to_owned()),
        Just("rbd".to_owned()),
        Just("monitors".to_owned()),
        Just("namespaces".to_owned()),
        ".{0,8}",
    ];
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        ".{0,12}".prop_map(Value::from),
        Just(json!("mount")),
        Just(json!("overlay")),
        Just(json!("root")),
        Just(json!("")),
    ];
    leaf.prop_recursive(6, 64, 6, move |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..5).prop_map(Value::from),
            prop::collection::vec((names.clone(), inner), 0..6)
                .prop_map(|pairs| Value::Object(pairs.into_iter().collect())),
        ]
    })
}

proptest! {
    #[test]
    fn hostile_documents_are_read_or_refused_and_what_is_read_is_read_again(document in hostile_json()) {
        for path in ["/attach", "/mount", "/container"] {
            match ask("POST", path, &document.to_string()) {
                Err(error) => {
                    prop_assert!(matches!(error.status, 400 | 422), "{error:?}");
                    prop_assert!(error.message.len() <= 1010);
                }
                Ok((Call::Mount(mount), _)) => {
                    let text = serde_json::to_string(&mount).expect("JSON");
                    let (again, unknown) = ask("POST", path, &text).expect("its own form");
                    prop_assert_eq!(again, Call::Mount(mount));
                    prop_assert!(unknown.is_empty());
                }
                Ok(_) => {}
            }
        }
    }

    #[test]
    fn hostile_bytes_never_do_harm(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
        fuzz_request(&bytes);
        let head = b"POST /imageapi/v1/mount x=%zz&id=%F0%9F\n";
        fuzz_request(&[&head[..], &bytes].concat());
    }

    #[test]
    fn hostile_queries_end_in_a_call_or_a_known_status(query in "[a-z=&%+0-9 ]{0,40}") {
        for (method, path) in [("GET", "/container"), ("PATCH", "/container"), ("DELETE", "/mount")] {
            if let Err(error) = ask(method, &format!("{path}?{query}"), "") {
                prop_assert!(matches!(error.status, 400 | 422), "{error:?}");
            }
        }
    }
}
