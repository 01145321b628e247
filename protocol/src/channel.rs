//! Channels: an operator's look at a node's logs, or a command run in one of its containers.
//!
//! The node only dials out. A channel is asked for in the desired document ([`ChannelRequest`]); the node's agent then opens a
//! WebSocket to the boot server, which joins it to the operator's own. What passes through both is [`frame`].
//! Who may ask, sockets and processes are not here.

pub mod frame;

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::ids::{InvalidId, Name};

/// Most words of a command, and most variables of its environment.
pub const MAX_WORDS: usize = 1024;
/// Longest command with its environment, in bytes.
pub const MAX_COMMAND_BYTES: usize = 128 << 10;

macro_rules! hex_id {
    ($type:ident, $bytes:literal, $what:literal, $expected:literal) => {
        impl $type {
            /// Made of these bytes, which are random.
            #[must_use]
            pub fn from_random(bytes: [u8; $bytes]) -> Self {
                Self(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
            }

            /// As text.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $type {
            type Err = InvalidId;

            fn from_str(text: &str) -> Result<Self, InvalidId> {
                let hex = |b: u8| b.is_ascii_digit() || (b'a'..=b'f').contains(&b);
                if text.len() == 2 * $bytes && text.bytes().all(hex) {
                    return Ok(Self(text.to_owned()));
                }
                Err(InvalidId { what: $what, text: String::new(), expected: $expected })
            }
        }

        impl TryFrom<String> for $type {
            type Error = InvalidId;

            fn try_from(text: String) -> Result<Self, InvalidId> {
                text.parse()
            }
        }

        impl From<$type> for String {
            fn from(id: $type) -> Self {
                id.0
            }
        }
    };
}

/// Names a channel. Random: two servers never choose the same.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ChannelId(String);

hex_id!(ChannelId, 8, "channel id", "16 hexadecimal digits");

impl fmt::Display for ChannelId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Lets one side take its end of a channel, once. Not shown by `Debug`.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ChannelToken(String);

hex_id!(ChannelToken, 32, "channel token", "64 hexadecimal digits");

impl fmt::Debug for ChannelToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ChannelToken(…)")
    }
}

/// A container as an operator writes it: `NAME`, or `SET/NAME` where several sets have one of that name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ContainerPath {
    /// The ImageSet; any when absent.
    pub set: Option<Name>,
    /// The container's name in it.
    pub name: Name,
}

impl fmt::Display for ContainerPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.set {
            Some(set) => write!(f, "{set}/{}", self.name),
            None => write!(f, "{}", self.name),
        }
    }
}

impl FromStr for ContainerPath {
    type Err = InvalidId;

    fn from_str(text: &str) -> Result<Self, InvalidId> {
        let (set, name) =
            text.split_once('/').map_or((None, text), |(set, name)| (Some(set), name));
        Ok(Self { set: set.map(str::parse).transpose()?, name: name.parse()? })
    }
}

impl TryFrom<String> for ContainerPath {
    type Error = InvalidId;

    fn try_from(text: String) -> Result<Self, InvalidId> {
        text.parse()
    }
}

impl From<ContainerPath> for String {
    fn from(path: ContainerPath) -> Self {
        path.to_string()
    }
}

/// The size of a terminal, in characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct TerminalSize {
    /// Columns.
    pub columns: u16,
    /// Rows.
    pub rows: u16,
}

/// A command to run in a container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExecWish {
    /// Program and arguments; the program is looked up in the container's PATH.
    pub argv: Vec<String>,
    /// `KEY=VALUE`, replacing the container's own of the same name.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub env: Vec<String>,
    /// `USER[:GROUP]` by name or number in the image; the container's own when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// The size of its terminal; it gets none when absent, and its standard output and error come apart then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub terminal: Option<TerminalSize>,
}

/// What a channel is for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum ChannelWish {
    /// What a container wrote, across its restarts and rolls.
    Logs {
        /// Go on with what it writes next.
        #[serde(default)]
        follow: bool,
        /// Begin with this many last lines; with all there are when absent.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        tail: Option<u64>,
    },
    /// A command in a running container.
    Exec(ExecWish),
    /// The node's own log: its kernel's and its agent's.
    NodeLog {
        /// Go on with what is logged next.
        #[serde(default)]
        follow: bool,
        /// Begin with this many last lines; with all there are when absent.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        tail: Option<u64>,
    },
    /// Something of a later version.
    #[serde(other)]
    Unknown,
}

impl ChannelWish {
    /// What is wrong with it: one sentence.
    #[must_use]
    pub fn problem(&self) -> Option<String> {
        match self {
            Self::Exec(wish) => wish.problem(),
            _ => None,
        }
    }
}

impl ExecWish {
    /// What is wrong with it: one sentence.
    #[must_use]
    pub fn problem(&self) -> Option<String> {
        if self.argv.first().is_none_or(String::is_empty) {
            return Some("there is no command to run".to_owned());
        }
        if self.argv.len() > MAX_WORDS || self.env.len() > MAX_WORDS {
            return Some(format!("more than {MAX_WORDS} words in the command or its environment"));
        }
        let texts = || self.argv.iter().chain(&self.env).chain(&self.user);
        if texts().map(|text| text.len() + 1).sum::<usize>() > MAX_COMMAND_BYTES {
            return Some(format!("the command is longer than {MAX_COMMAND_BYTES} bytes"));
        }
        if texts().any(|text| text.contains('\0')) {
            return Some("a NUL byte in the command, its environment or its user".to_owned());
        }
        let variable =
            |entry: &&String| entry.split_once('=').is_none_or(|(key, _)| key.is_empty());
        self.env
            .iter()
            .find(variable)
            .map(|entry| format!("`{entry}` is not of the form KEY=VALUE"))
    }
}

/// In the desired document: the server wants this channel opened.
///
/// The node answers with `GET /v1/nodes/{node}/channels/{id}/node`, upgraded to a WebSocket, with the token as bearer. The
/// token is good once; the request is withdrawn when nobody comes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChannelRequest {
    /// The channel.
    pub id: ChannelId,
    /// The node's token.
    pub token: ChannelToken,
    /// The container; none for the node's own log.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub container: Option<ContainerPath>,
    /// What it is for.
    #[serde(flatten)]
    pub wish: ChannelWish,
}

/// `POST /v1/nodes/{id}/channels`: an operator asks for a channel.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChannelBody {
    /// The container; none for the node's own log.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub container: Option<ContainerPath>,
    /// What it is for.
    #[serde(flatten)]
    pub wish: ChannelWish,
}

/// Its answer. The operator goes on with `GET /v1/nodes/{node}/channels/{id}/operator`, upgraded to a WebSocket, with the token
/// as bearer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChannelCreated {
    /// The channel.
    pub id: ChannelId,
    /// The operator's token.
    pub token: ChannelToken,
    /// The container that was meant, with its set.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub container: Option<ContainerPath>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::node::Desired;

    fn exec(argv: &[&str], env: &[&str]) -> ChannelWish {
        let texts = |texts: &[&str]| texts.iter().map(|text| (*text).to_owned()).collect();
        ChannelWish::Exec(ExecWish {
            argv: texts(argv),
            env: texts(env),
            user: None,
            terminal: None,
        })
    }

    #[test]
    fn the_golden_document_is_read_and_written_unchanged() {
        let golden = include_str!("../golden/v1/desired-channels.json");
        let desired: Desired = serde_json::from_str(golden).expect("golden");
        assert_eq!(serde_json::to_string_pretty(&desired).expect("render") + "\n", golden);
        assert!(matches!(
            desired.channels[0].wish,
            ChannelWish::Logs { follow: true, tail: Some(10) }
        ));
        assert!(
            matches!(&desired.channels[1].wish, ChannelWish::Exec(exec) if exec.argv == ["sh"])
        );
    }

    #[test]
    fn a_wish_of_a_later_version_does_not_spoil_the_document() {
        let golden = include_str!("../golden/v1/desired-channels.json");
        let later = golden.replacen("\"exec\"", "\"teleport\"", 1);
        let desired: Desired = serde_json::from_str(&later).expect("one version apart");
        assert_eq!(desired.channels[1].wish, ChannelWish::Unknown);
    }

    #[test]
    fn containers_are_named_alone_or_with_their_set() {
        for text in ["web", "hello/web"] {
            assert_eq!(text.parse::<ContainerPath>().expect(text).to_string(), text);
        }
        for text in ["", "/", "a/", "/b", "a/b/c", "../x", "A"] {
            assert!(text.parse::<ContainerPath>().is_err(), "{text}");
        }
    }

    #[test]
    fn tokens_are_not_shown_and_have_one_form() {
        let token = ChannelToken::from_random([0xab; 32]);
        assert!(!format!("{token:?}").contains("ab"));
        assert_eq!(token.as_str().parse(), Ok(token.clone()));
        for text in ["", "ab", &"g".repeat(64), &"A".repeat(64), &"a".repeat(65)] {
            assert!(text.parse::<ChannelToken>().is_err(), "{text}");
        }
    }

    #[test]
    fn commands_are_bounded_and_the_mistake_is_named() {
        let large = "x".repeat(MAX_COMMAND_BYTES);
        let table = [
            (exec(&[], &[]), "no command"),
            (exec(&[""], &[]), "no command"),
            (exec(&["sh", "a\0b"], &[]), "NUL"),
            (exec(&["sh"], &["X"]), "`X` is not of the form"),
            (exec(&["sh"], &["=1"]), "`=1` is not of the form"),
            (exec(&["sh", &large], &[]), "longer than"),
            (exec(&["sh"; MAX_WORDS + 1], &[]), "words"),
        ];
        for (wish, expected) in table {
            let problem = wish.problem().expect(expected);
            assert!(problem.contains(expected), "{problem}");
        }
        assert_eq!(exec(&["sh"], &["X=", "Y=1=2"]).problem(), None);
    }
}
