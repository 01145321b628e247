//! Images of a Ceph cluster, by the kernel's own client: `/sys/bus/rbd` (linux `Documentation/ABI/testing/sysfs-bus-rbd`).
//!
//! Secrets go into the kernel's file and nowhere else: no error, log or answer has them.

use std::fs;
use std::io;
use std::path::Path;

use serde_json::Value;

use super::Modules;
use crate::imageapi::error::ApiError;
use crate::imageapi::table::Device;
use crate::imageapi::types::AttachRbd;

/// Where the kernel takes orders.
const BUS: &str = "/sys/bus/rbd";
/// The port of monitors, version 1 of their protocol.
const MONITOR_PORT: u16 = 6789;

/// The order to map an image: `MONITORS OPTIONS POOL IMAGE SNAPSHOT`.
fn order(spec: &AttachRbd) -> Result<String, ApiError> {
    let word = |name: &str, text: &str| {
        let bad = |c: char| c == ',' || c.is_whitespace() || c.is_control();
        match text.contains(bad) {
            true => Err(ApiError::invalid(format!("rbd.{name} must be without blanks and commas"))),
            false => Ok(text.to_owned()),
        }
    };
    let monitors = spec.monitors.as_deref().unwrap_or_default();
    if monitors.is_empty() {
        return Err(ApiError::invalid("rbd.monitors is empty"));
    }
    let monitors: Vec<String> = monitors.iter().map(|it| format!("{it}:{MONITOR_PORT}")).collect();
    let mut options = Vec::new();
    if let Some(given) = &spec.options {
        let document = serde_json::to_value(given).map_err(ApiError::internal)?;
        for (name, value) in document.as_object().into_iter().flatten() {
            let path = format!("options.{name}");
            let Some(name) = kernels_name(name) else { continue };
            match value {
                Value::Bool(true) => options.push(name.to_owned()),
                Value::Number(number) => options.push(format!("{name}={number}")),
                Value::String(text) => options.push(format!("{name}={}", word(&path, text)?)),
                _ => {}
            }
        }
        if !given.secret.is_empty() {
            options.push(format!("secret={}", word("options.secret", &given.secret)?));
        }
    }
    // The field must not be empty; an `rw` mapping is what the kernel makes without one.
    let options = if options.is_empty() { "rw".to_owned() } else { options.join(",") };
    let (pool, image) = (word("pool", &spec.pool)?, word("image", &spec.image)?);
    let snapshot = match spec.snapshot.as_str() {
        "" => "-".to_owned(),
        name => word("snapshot", name)?,
    };
    Ok(format!("{} {options} {pool} {image} {snapshot}", monitors.join(",")))
}

/// The kernel's name of an option (linux `drivers/block/rbd.c`, `net/ceph/ceph_common.c`): the API's own but for four. `force`
/// is for taking the mapping away.
fn kernels_name(name: &str) -> Option<&str> {
    match name {
        "namespace" => Some("_pool_ns"),
        "ceph_requires_signatures" => Some("cephx_require_signatures"),
        "noceph_requires_signatures" => Some("nocephx_require_signatures"),
        "force" => None,
        name => Some(name),
    }
}

/// Maps an image and returns its device file.
pub(in crate::imageapi) fn map(
    spec: &AttachRbd,
    modules: &Modules,
) -> Result<(String, Device), ApiError> {
    let order = order(spec)?;
    let name = format!("{}/{}", spec.pool, spec.image);
    modules.need(&["rbd"]);
    if !Path::new(BUS).exists() {
        let what = format!("rbd {name}: this kernel has no rbd ({BUS} is missing)");
        return Err(ApiError::failed(what));
    }
    if let Some(number) = find(spec) {
        return Err(ApiError::busy(format!("rbd {name} is mapped already, as /dev/rbd{number}")));
    }
    let file = [format!("{BUS}/add_single_major"), format!("{BUS}/add")];
    let file = file.iter().find(|file| Path::new(file).exists()).cloned().unwrap_or_default();
    fs::write(&file, order).map_err(|error| {
        let monitors = spec.monitors.as_deref().unwrap_or_default().join(", ");
        ApiError::failed(format!("rbd {name} of {monitors}: {}", meaning(&error)))
    })?;
    let missing = || ApiError::failed(format!("rbd {name}: it was mapped but cannot be found"));
    let number = find(spec).ok_or_else(missing)?;
    Ok((format!("/dev/rbd{number}"), Device::Rbd(number)))
}

/// What the kernel's errors mean here.
fn meaning(error: &io::Error) -> String {
    let hint = match error.raw_os_error().map(rustix::io::Errno::from_raw_os_error) {
        Some(rustix::io::Errno::TIMEDOUT) => "no monitor answered in time",
        Some(rustix::io::Errno::NOENT) => "there is no such pool, image or snapshot",
        Some(rustix::io::Errno::PERM | rustix::io::Errno::ACCESS) => {
            "name or secret are not those of the cluster"
        }
        Some(rustix::io::Errno::INVAL) => "the kernel does not know one of the options",
        _ => return error.to_string(),
    };
    format!("{hint} ({error})")
}

/// The number of the mapping of this image.
fn find(spec: &AttachRbd) -> Option<u32> {
    let snapshot = if spec.snapshot.is_empty() { "-" } else { &spec.snapshot };
    let entries = fs::read_dir(format!("{BUS}/devices")).ok()?;
    entries.flatten().find_map(|entry| {
        let is = |file: &str, text: &str| {
            fs::read_to_string(entry.path().join(file)).is_ok_and(|found| found.trim() == text)
        };
        let same =
            is("pool", &spec.pool) && is("name", &spec.image) && is("current_snap", snapshot);
        same.then(|| entry.file_name().to_str()?.parse().ok()).flatten()
    })
}

/// Takes a mapping away, with `force` although somebody has it open. One that is gone is fine.
pub(in crate::imageapi) fn unmap(number: u32, force: bool) -> Result<(), ApiError> {
    let files = [format!("{BUS}/remove_single_major"), format!("{BUS}/remove")];
    let file = files.iter().find(|file| Path::new(file).exists()).cloned().unwrap_or_default();
    let order = if force { format!("{number} force") } else { number.to_string() };
    match fs::write(file, order) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) if error.raw_os_error() == Some(rustix::io::Errno::BUSY.raw_os_error()) => {
            Err(ApiError::busy(format!("/dev/rbd{number} is in use")))
        }
        Err(error) => Err(ApiError::failed(format!("unmap /dev/rbd{number}: {error}"))),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn spec(document: Value) -> AttachRbd {
        serde_json::from_value(document).expect("rbd")
    }

    #[test]
    fn every_option_reaches_the_kernel() {
        let document = json!({
            "monitors": ["10.0.0.1", "10.0.0.2"], "pool": "p", "image": "i", "snapshot": "s",
            "options": {
                "fsid": "f", "ip": "10.0.0.9", "name": "admin", "secret": "AQ==", "namespace": "n",
                "mount_timeout": 5, "osdkeepalive": 6, "osd_idle_ttl": 7, "queue_depth": 8,
                "alloc_size": 65536, "lock_timeout": 9, "share": true, "noshare": true, "crc": true,
                "nocrc": true, "ceph_requires_signatures": true, "noceph_requires_signatures": true,
                "tcp_nodelay": true, "notcp_nodelay": true, "cephx_sign_messages": true,
                "nocephx_sign_messages": true, "force": true, "rw": true, "ro": true,
                "lock_on_read": true, "exclusive": true, "notrim": true, "abort_on_full": true
            }
        });
        let options = document["options"].as_object().expect("options").clone();
        let text = order(&spec(document)).expect("order");
        let words: Vec<&str> = text.split(' ').collect();
        assert_eq!((words[0], &words[2..]), ("10.0.0.1:6789,10.0.0.2:6789", &["p", "i", "s"][..]));
        let sent: Vec<&str> = words[1].split(',').collect();
        assert_eq!(sent.len(), options.len() - 1, "all but force");
        for (name, value) in options {
            let Some(name) = kernels_name(&name).map(str::to_owned) else { continue };
            let option = match value {
                Value::Bool(_) => name,
                Value::String(text) => format!("{name}={text}"),
                number => format!("{name}={number}"),
            };
            assert!(sent.contains(&option.as_str()), "{option}: {text}");
        }
    }

    #[test]
    fn an_order_without_options_or_snapshot_still_has_all_its_fields() {
        let plain = json!({"monitors": ["10.0.0.1"], "pool": "p", "image": "i"});
        assert_eq!(order(&spec(plain)).expect("order"), "10.0.0.1:6789 rw p i -");
    }

    #[test]
    fn words_that_would_be_several_are_refused_without_repeating_them() {
        for (pointer, value) in [
            ("/pool", "a b"),
            ("/image", "a\nb"),
            ("/snapshot", "a,b"),
            ("/options/secret", "hush,force"),
            ("/options/name", "x ,secret=y"),
        ] {
            let mut document = json!({"monitors": ["10.0.0.1"], "pool": "p", "image": "i",
                "snapshot": "s", "options": {"name": "n", "secret": "s"}});
            *document.pointer_mut(pointer).expect("field") = value.into();
            let error = order(&spec(document)).expect_err(pointer);
            assert_eq!(error.status, 400);
            assert!(!error.message.contains(value), "{error}");
        }
    }
}
