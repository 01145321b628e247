//! Who the container's program runs as: `USER[:GROUP]` looked up in the image's own /etc/passwd and /etc/group.
//!
//! The parsers take text that an image brought: bounded, and a line that is wrong is a line that is not there.

use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd};

use rustix::fs::{Mode, OFlags, ResolveFlags, openat2};

/// Largest passwd or group file that is read, in bytes.
const MAX_FILE: u64 = 1 << 20;
/// Most supplementary groups (NGROUPS_MAX is 65536; no image needs that).
const MAX_GROUPS: usize = 1024;

/// A user as the kernel knows it, and a home.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct User {
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
    /// Supplementary groups.
    pub groups: Vec<u32>,
    /// Home directory, `/` when nothing says otherwise.
    pub home: String,
}

/// Why a user cannot be found.
#[derive(Debug, thiserror::Error)]
pub enum UserError {
    /// Not in passwd and not a number.
    #[error("user `{0}` is not in the image's /etc/passwd")]
    NoUser(String),
    /// Not in group and not a number.
    #[error("group `{0}` is not in the image's /etc/group")]
    NoGroup(String),
    /// One of the files cannot be read.
    #[error("the image's {path}: {source}")]
    File {
        /// The file.
        path: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

/// Finds a user in the image with this root; root when none is named.
///
/// # Errors
/// [`UserError`] names the user, the group or the file.
pub fn find_in(root: impl AsFd, user: Option<&str>) -> Result<User, UserError> {
    let read = |path| read(root.as_fd(), path);
    resolve(user.unwrap_or("0"), &read("/etc/passwd")?, &read("/etc/group")?)
}

/// The rules of `docker run --user`: names come from the files, numbers need not stand there; a user that is named brings
/// its own group and those it is a member of; a group that is named is then the only one.
///
/// # Errors
/// [`UserError::NoUser`] and [`UserError::NoGroup`].
pub fn resolve(wanted: &str, passwd: &str, group: &str) -> Result<User, UserError> {
    let (name, wanted_group) = match wanted.split_once(':') {
        Some((name, group)) => (name, Some(group).filter(|group| !group.is_empty())),
        None => (wanted, None),
    };
    let name = if name.is_empty() { "0" } else { name };
    let number = id(name);
    let by_name = || passwd.lines().filter_map(Passwd::parse).find(|entry| entry.name == name);
    let by_number = || passwd.lines().filter_map(Passwd::parse).find(|e| Some(e.uid) == number);
    let entry = by_name().or_else(by_number);
    let uid = entry
        .as_ref()
        .map(|entry| entry.uid)
        .or(number)
        .ok_or_else(|| UserError::NoUser(name.to_owned()))?;
    let mut user = User {
        uid,
        gid: entry.as_ref().map_or(0, |entry| entry.gid),
        groups: Vec::new(),
        home: entry
            .as_ref()
            .map(|entry| entry.home)
            .filter(|home| home.starts_with('/'))
            .unwrap_or("/")
            .to_owned(),
    };
    if let Some(wanted) = wanted_group {
        user.gid = group
            .lines()
            .filter_map(Group::parse)
            .find(|entry| entry.name == wanted)
            .map(|entry| entry.gid)
            .or_else(|| id(wanted))
            .ok_or_else(|| UserError::NoGroup(wanted.to_owned()))?;
    } else if let Some(entry) = entry {
        user.groups = group
            .lines()
            .filter_map(Group::parse)
            .filter(|group| group.members.split(',').any(|member| member == entry.name))
            .map(|group| group.gid)
            .take(MAX_GROUPS)
            .collect();
    }
    Ok(user)
}

/// All ones means "unchanged" to setresuid(2): not an id.
fn id(text: &str) -> Option<u32> {
    let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    text.parse().ok().filter(|id| digits && *id != u32::MAX)
}

/// A line of passwd(5).
struct Passwd<'a> {
    name: &'a str,
    uid: u32,
    gid: u32,
    home: &'a str,
}

impl<'a> Passwd<'a> {
    fn parse(line: &'a str) -> Option<Self> {
        let mut fields = line.split(':');
        let name = fields.next().filter(|name| !name.is_empty())?;
        let (uid, gid) = (id(fields.nth(1)?)?, id(fields.next()?)?);
        Some(Self { name, uid, gid, home: fields.nth(1)? })
    }
}

/// A line of group(5).
struct Group<'a> {
    name: &'a str,
    gid: u32,
    members: &'a str,
}

impl<'a> Group<'a> {
    fn parse(line: &'a str) -> Option<Self> {
        let mut fields = line.split(':');
        let name = fields.next().filter(|name| !name.is_empty())?;
        Some(Self { name, gid: id(fields.nth(1)?)?, members: fields.next().unwrap_or_default() })
    }
}

/// A file of the image, empty when it is not there. A pipe or device in its place must not hold us up.
fn read(root: BorrowedFd<'_>, path: &'static str) -> Result<String, UserError> {
    let failed = |source: io::Error| UserError::File { path, source };
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let resolve = ResolveFlags::NO_MAGICLINKS | ResolveFlags::IN_ROOT;
    let opened = openat2(root, path, flags, Mode::empty(), resolve);
    let file = match opened {
        Err(rustix::io::Errno::NOENT) => return Ok(String::new()),
        opened => std::fs::File::from(opened.map_err(|e| failed(e.into()))?),
    };
    let meta = file.metadata().map_err(failed)?;
    if !meta.is_file() || meta.len() > MAX_FILE {
        return Err(failed(io::Error::other("not a file of at most 1 MiB")));
    }
    let mut bytes = Vec::new();
    file.take(MAX_FILE).read_to_end(&mut bytes).map_err(failed)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\nbroken\nbad:x:-1:0::/:\nweb:x:101:102:Web:/srv/web:/sbin/nologin\n7:x:1007:1008::/seven:/bin/sh\n";
    const GROUP: &str =
        "root:x:0:\nweb:x:102:\nlog:x:200:other,web\nssl:x:201:web\nbad:x:z:web\nshort:x:300\n";

    #[test]
    fn users_are_found_as_docker_finds_them() {
        type Expected = (u32, u32, &'static [u32], &'static str);
        let table: [(&str, Expected); 11] = [
            ("root", (0, 0, &[], "/root")),
            ("0", (0, 0, &[], "/root")),
            ("", (0, 0, &[], "/root")),
            ("web", (101, 102, &[200, 201], "/srv/web")),
            ("101", (101, 102, &[200, 201], "/srv/web")),
            ("web:", (101, 102, &[200, 201], "/srv/web")),
            ("web:ssl", (101, 201, &[], "/srv/web")),
            ("web:0", (101, 0, &[], "/srv/web")),
            ("5000:6000", (5000, 6000, &[], "/")),
            ("5000", (5000, 0, &[], "/")),
            ("7", (1007, 1008, &[], "/seven")),
        ];
        for (wanted, (uid, gid, groups, home)) in table {
            let user = resolve(wanted, PASSWD, GROUP).expect(wanted);
            let expected = User { uid, gid, groups: groups.to_vec(), home: home.to_owned() };
            assert_eq!(user, expected, "{wanted}");
        }
    }

    #[test]
    fn whom_nobody_knows_is_an_error_that_names_them() {
        for wanted in ["ghost", "bad", "-1", "4294967295", "99999999999", "+5"] {
            let error = resolve(wanted, PASSWD, GROUP).expect_err(wanted).to_string();
            assert!(error.contains(&format!("user `{wanted}`")), "{error}");
        }
        for wanted in ["web:ghost", "web:bad", "0:4294967295"] {
            let error = resolve(wanted, PASSWD, GROUP).expect_err(wanted).to_string();
            assert!(error.contains("group `"), "{error}");
        }
        assert_eq!(resolve("0", "", "").expect("no files").home, "/");
    }

    proptest! {
        #[test]
        fn no_file_makes_the_lookup_panic(wanted in ".{0,20}", passwd in ".{0,200}", group in "[a-z0-9:,\n]{0,200}") {
            drop(resolve(&wanted, &passwd, &group));
        }
    }
}
