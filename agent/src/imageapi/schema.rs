//! What a request's body may say: types, required fields, patterns, enumerations, read-only fields. Pure.
//!
//! In three passes, as the services that go-swagger generates do it: JSON of the wrong type is 400, then the first thing that
//! is wrong in alphabetical order is 422, then the first read-only field that is set is 422. Unknown fields are collected,
//! not refused.

use serde_json::{Map, Value};

use super::error::ApiError;

/// Most unknown fields that are named.
const MAX_UNKNOWN: usize = 8;

/// A pattern a text must match.
#[derive(Debug, Clone, Copy)]
pub(super) enum Pattern {
    /// A container's name. The reference's own pattern has only the digits 0 and 1.
    Name,
    /// An IPv4 address, loosely.
    Ipv4,
}

impl Pattern {
    /// As a regular expression, for messages.
    pub(super) fn text(self) -> &'static str {
        match self {
            Self::Name => r"^[A-Za-z0-9.\-_]*$",
            Self::Ipv4 => r"^(?:[0-9]{1,3}\.){3}[0-9]{1,3}$",
        }
    }

    /// Whether a text matches.
    pub(super) fn matches(self, text: &str) -> bool {
        match self {
            Self::Name => {
                text.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_'))
            }
            Self::Ipv4 => {
                text.split('.').count() == 4
                    && text.split('.').all(|part| {
                        (1..=3).contains(&part.len()) && part.bytes().all(|b| b.is_ascii_digit())
                    })
            }
        }
    }
}

/// What a field may hold.
#[derive(Debug)]
enum Rule {
    Bool,
    Int,
    Text,
    /// A text of at least one character.
    Filled,
    Matching(Pattern),
    OneOf(&'static [&'static str]),
    List(&'static Rule),
    Object(&'static Schema),
    /// Set by us alone.
    ReadOnlyInt,
    ReadOnlyText,
}

#[derive(Debug)]
struct Field {
    name: &'static str,
    rule: Rule,
    required: bool,
}

/// What a document may hold.
#[derive(Debug)]
pub(super) struct Schema {
    /// In alphabetical order.
    fields: &'static [Field],
}

const fn may(name: &'static str, rule: Rule) -> Field {
    Field { name, rule, required: false }
}

const fn must(name: &'static str, rule: Rule) -> Field {
    Field { name, rule, required: true }
}

/// Kinds of attachments.
pub(super) const ATTACH_KINDS: &[&str] = &["iscsi", "local", "loopback", "rbd"];
/// Kinds of mounts; `oci` is ours.
pub(super) const MOUNT_KINDS: &[&str] = &["attach", "bind", "nfs", "overlay", "uri", "oci"];
/// States of containers.
pub(super) const STATES: &[&str] = &["created", "running", "stopping", "exited", "dead"];
/// States that can be asked for.
pub(super) const ASKED_STATES: &[&str] = &["running", "exited", "paused"];
const BASES: &[&str] = &["root", "mount"];
const FORMATS: &[&str] = &["cpio", "erofs", "squashfs", "tar"];
const NAMESPACES: &[&str] = &["cgroup", "ipc", "net", "mnt", "pid", "time", "user", "uts"];

/// An attachment.
pub(super) static ATTACH: Schema = Schema {
    fields: &[
        may("device_file", Rule::ReadOnlyText),
        may("id", Rule::Int),
        may("iscsi", Rule::Object(&ISCSI)),
        may("kind", Rule::OneOf(ATTACH_KINDS)),
        may("local", Rule::Object(&LOCAL)),
        may("loopback", Rule::Object(&LOOPBACK)),
        may("rbd", Rule::Object(&RBD)),
        may("refs", Rule::ReadOnlyInt),
    ],
};

static ISCSI: Schema = Schema {
    fields: &[
        must("host", Rule::Text),
        must("initiator", Rule::Text),
        may("lun", Rule::Int),
        may("max_comands", Rule::Int),
        may("port", Rule::Int),
        may("queue_depth", Rule::Int),
        may("scheduler", Rule::Text),
        must("target", Rule::Text),
    ],
};

static LOCAL: Schema = Schema { fields: &[must("path", Rule::Text)] };

static LOOPBACK: Schema = Schema {
    fields: &[
        must("base", Rule::OneOf(BASES)),
        may("mount", Rule::Object(&MOUNT)),
        may("partition", Rule::Int),
        must("path", Rule::Text),
        may("readPartitions", Rule::Bool),
    ],
};

static RBD: Schema = Schema {
    fields: &[
        may("device_id", Rule::ReadOnlyInt),
        must("image", Rule::Filled),
        must("monitors", Rule::List(&Rule::Matching(Pattern::Ipv4))),
        may("options", Rule::Object(&RBD_OPTIONS)),
        must("pool", Rule::Filled),
        may("snapshot", Rule::Text),
    ],
};

static RBD_OPTIONS: Schema = Schema {
    fields: &[
        may("abort_on_full", Rule::Bool),
        may("alloc_size", Rule::Int),
        may("ceph_requires_signatures", Rule::Bool),
        may("cephx_sign_messages", Rule::Bool),
        may("crc", Rule::Bool),
        may("exclusive", Rule::Bool),
        may("force", Rule::Bool),
        may("fsid", Rule::Text),
        may("ip", Rule::Matching(Pattern::Ipv4)),
        may("lock_on_read", Rule::Bool),
        may("lock_timeout", Rule::Int),
        may("mount_timeout", Rule::Int),
        may("name", Rule::Text),
        may("namespace", Rule::Text),
        may("noceph_requires_signatures", Rule::Bool),
        may("nocephx_sign_messages", Rule::Bool),
        may("nocrc", Rule::Bool),
        may("noshare", Rule::Bool),
        may("notcp_nodelay", Rule::Bool),
        may("notrim", Rule::Bool),
        may("osd_idle_ttl", Rule::Int),
        may("osdkeepalive", Rule::Int),
        may("queue_depth", Rule::Int),
        may("ro", Rule::Bool),
        may("rw", Rule::Bool),
        may("secret", Rule::Text),
        may("share", Rule::Bool),
        may("tcp_nodelay", Rule::Bool),
    ],
};

/// A mount.
pub(super) static MOUNT: Schema = Schema {
    fields: &[
        may("attach", Rule::Object(&MOUNT_ATTACH)),
        may("bind", Rule::Object(&MOUNT_BIND)),
        may("id", Rule::Int),
        may("kind", Rule::OneOf(MOUNT_KINDS)),
        may("mountpoint", Rule::ReadOnlyText),
        may("nfs", Rule::Object(&MOUNT_NFS)),
        may("oci", Rule::Object(&MOUNT_OCI)),
        may("overlay", Rule::Object(&MOUNT_OVERLAY)),
        may("refs", Rule::ReadOnlyInt),
        may("uri", Rule::Object(&MOUNT_URI)),
    ],
};

static MOUNT_ATTACH: Schema = Schema {
    fields: &[
        must("attach", Rule::Object(&ATTACH)),
        must("fs_type", Rule::Text),
        may("mount_options", Rule::List(&Rule::Text)),
    ],
};

static MOUNT_BIND: Schema = Schema {
    fields: &[
        must("base", Rule::OneOf(BASES)),
        may("mount", Rule::Object(&MOUNT)),
        must("path", Rule::Text),
        may("recursive", Rule::Bool),
        may("ro", Rule::Bool),
    ],
};

static MOUNT_NFS: Schema = Schema {
    fields: &[
        must("host", Rule::Text),
        may("options", Rule::List(&Rule::Text)),
        must("path", Rule::Text),
        may("ro", Rule::Bool),
        may("version", Rule::Text),
    ],
};

static MOUNT_OCI: Schema = Schema {
    fields: &[
        may("digest", Rule::ReadOnlyText),
        must("image", Rule::Filled),
        may("ro", Rule::Bool),
        may("size", Rule::Int),
    ],
};

static MOUNT_OVERLAY: Schema = Schema {
    fields: &[
        must("lower", Rule::List(&Rule::Object(&MOUNT))),
        may("size", Rule::Int),
        may("upperdir", Rule::ReadOnlyText),
        may("workdir", Rule::ReadOnlyText),
    ],
};

static MOUNT_URI: Schema = Schema {
    fields: &[
        must("digest", Rule::Filled),
        may("format", Rule::OneOf(FORMATS)),
        may("ro", Rule::Bool),
        may("size", Rule::Int),
        must("uri", Rule::Filled),
    ],
};

/// A container.
pub(super) static CONTAINER: Schema = Schema {
    fields: &[
        must("command", Rule::Text),
        may("id", Rule::Int),
        may("logfile", Rule::ReadOnlyText),
        must("mount", Rule::Object(&MOUNT)),
        may("name", Rule::Matching(Pattern::Name)),
        may("namespaces", Rule::List(&Rule::OneOf(NAMESPACES))),
        may("refs", Rule::ReadOnlyInt),
        may("state", Rule::OneOf(STATES)),
        may("systemd", Rule::Bool),
    ],
};

/// A body as the schema's type, and the unknown fields in it.
///
/// # Errors
/// 400 for what is no such JSON, 422 for what is wrong in it.
pub(super) fn read<T: serde::de::DeserializeOwned>(
    schema: &Schema,
    body: &[u8],
) -> Result<(T, Vec<String>), ApiError> {
    if body.iter().all(u8::is_ascii_whitespace) {
        return Err(ApiError::required("body"));
    }
    let unread = |reason: &dyn std::fmt::Display| ApiError::unreadable(reason);
    let value: Value = serde_json::from_slice(body).map_err(|error| unread(&error))?;
    let mut unknown = Vec::new();
    let Value::Object(document) = value else {
        return Err(unread(&"it is not an object"));
    };
    let document = schema.typed(document, "", &mut unknown)?;
    schema.check(&document, "")?;
    schema.check_read_only(&document, "")?;
    let read = serde_json::from_value(Value::Object(document));
    Ok((read.map_err(|error| unread(&error))?, unknown))
}

impl Schema {
    /// First pass: the same document without unknown fields and without those that say nothing (`null`, an empty word of an
    /// enumeration, a read-only zero).
    fn typed(
        &self,
        document: Map<String, Value>,
        path: &str,
        unknown: &mut Vec<String>,
    ) -> Result<Map<String, Value>, ApiError> {
        let mut typed = Map::new();
        for (key, value) in document {
            let path = join(path, &key);
            let Some(field) = self.fields.iter().find(|field| field.name == key) else {
                if unknown.len() < MAX_UNKNOWN {
                    unknown.push(path);
                }
                continue;
            };
            if let Some(value) = field.rule.typed(value, &path, unknown)? {
                typed.insert(key, value);
            }
        }
        Ok(typed)
    }

    /// Second pass.
    fn check(&self, document: &Map<String, Value>, path: &str) -> Result<(), ApiError> {
        for field in self.fields {
            let path = join(path, field.name);
            match document.get(field.name) {
                None if field.required => return Err(ApiError::required(&path)),
                None => {}
                Some(value) => field.rule.check(value, &path)?,
            }
        }
        Ok(())
    }

    /// Third pass.
    fn check_read_only(&self, document: &Map<String, Value>, path: &str) -> Result<(), ApiError> {
        for field in self.fields {
            if let Some(value) = document.get(field.name) {
                field.rule.check_read_only(value, &join(path, field.name))?;
            }
        }
        Ok(())
    }
}

impl Rule {
    fn typed(
        &self,
        value: Value,
        path: &str,
        unknown: &mut Vec<String>,
    ) -> Result<Option<Value>, ApiError> {
        let wrong = |expected: &str| Err(ApiError::unreadable(&format!("{path} is no {expected}")));
        match (self, value) {
            (_, Value::Null) => Ok(None),
            (Self::OneOf(_) | Self::ReadOnlyText, Value::String(text)) if text.is_empty() => {
                Ok(None)
            }
            (Self::Bool, value @ Value::Bool(_)) => Ok(Some(value)),
            (Self::Bool, _) => wrong("boolean"),
            (Self::Int | Self::ReadOnlyInt, value) => match value.as_i64() {
                Some(0) if matches!(self, Self::ReadOnlyInt) => Ok(None),
                Some(_) => Ok(Some(value)),
                None => wrong("64-bit integer"),
            },
            (Self::List(rule), Value::Array(values)) => {
                let mut list = Vec::new();
                for (index, value) in values.into_iter().enumerate() {
                    let path = join(path, &index.to_string());
                    // An element that says nothing is still one.
                    let value = rule.typed(value, &path, unknown)?;
                    list.push(value.unwrap_or_else(|| rule.nothing()));
                }
                Ok(Some(Value::Array(list)))
            }
            (Self::List(_), _) => wrong("array"),
            (Self::Object(schema), Value::Object(document)) => {
                Ok(Some(Value::Object(schema.typed(document, path, unknown)?)))
            }
            (Self::Object(_), _) => wrong("object"),
            (
                Self::Text | Self::Filled | Self::Matching(_) | Self::OneOf(_) | Self::ReadOnlyText,
                value,
            ) => match value {
                value @ Value::String(_) => Ok(Some(value)),
                _ => wrong("string"),
            },
        }
    }

    /// What stands for an empty element of a list.
    fn nothing(&self) -> Value {
        match self {
            Self::Object(_) => Value::Object(Map::new()),
            _ => Value::String(String::new()),
        }
    }

    fn check(&self, value: &Value, path: &str) -> Result<(), ApiError> {
        let text = value.as_str().unwrap_or_default();
        match self {
            Self::Filled if text.is_empty() => Err(ApiError::too_short(path)),
            Self::Matching(pattern) if !pattern.matches(text) => {
                Err(ApiError::pattern(path, "body", *pattern))
            }
            Self::OneOf(words) if !words.contains(&text) => {
                Err(ApiError::one_of(path, "body", words))
            }
            Self::List(rule) => {
                let values = value.as_array().into_iter().flatten().enumerate();
                for (index, value) in values {
                    rule.check(value, &join(path, &index.to_string()))?;
                }
                Ok(())
            }
            Self::Object(schema) => {
                value.as_object().map_or(Ok(()), |document| schema.check(document, path))
            }
            _ => Ok(()),
        }
    }

    fn check_read_only(&self, value: &Value, path: &str) -> Result<(), ApiError> {
        match self {
            Self::ReadOnlyInt | Self::ReadOnlyText => Err(ApiError::read_only(path)),
            Self::List(rule) => {
                let values = value.as_array().into_iter().flatten().enumerate();
                for (index, value) in values {
                    rule.check_read_only(value, &join(path, &index.to_string()))?;
                }
                Ok(())
            }
            Self::Object(schema) => {
                value.as_object().map_or(Ok(()), |document| schema.check_read_only(document, path))
            }
            _ => Ok(()),
        }
    }
}

fn join(path: &str, name: &str) -> String {
    if path.is_empty() { name.to_owned() } else { format!("{path}.{name}") }
}
