//! QEMU's own socket (QMP, docs/interop/qmp-spec.rst of QEMU): to plug devices into a machine that runs, and to pull them out.
//! One connection for each conversation; events that come between are passed over.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

/// How long QEMU may take to answer.
const ANSWER: Duration = Duration::from_secs(30);

/// A conversation with a machine's QEMU.
#[derive(Debug)]
pub struct Qmp {
    reader: BufReader<UnixStream>,
}

impl Qmp {
    /// Begins a conversation.
    ///
    /// # Errors
    /// When nobody listens there, or it is not QEMU.
    pub fn connect(socket: &Path) -> Result<Self> {
        let context = || format!("cannot speak to QEMU at {}", socket.display());
        let stream = UnixStream::connect(socket).with_context(context)?;
        stream.set_read_timeout(Some(ANSWER)).with_context(context)?;
        let mut qmp = Self { reader: BufReader::new(stream) };
        qmp.message(|message| message.get("QMP").is_some()).with_context(context)?;
        qmp.execute("qmp_capabilities", &json!({}))?;
        Ok(qmp)
    }

    /// Runs a command and gives what it returns.
    ///
    /// # Errors
    /// What QEMU says against it, or that it does not answer.
    pub fn execute(&mut self, command: &str, arguments: &Value) -> Result<Value> {
        let line = json!({ "execute": command, "arguments": arguments }).to_string();
        let context = || format!("QMP {line}");
        writeln!(self.reader.get_mut(), "{line}").with_context(context)?;
        let answers =
            |message: &Value| ["return", "error"].iter().any(|key| message.get(key).is_some());
        let mut answer = self.message(answers).with_context(context)?;
        if let Some(error) = answer.get("error") {
            bail!("QMP {line}: {error}");
        }
        Ok(answer["return"].take())
    }

    /// The next message that is wanted.
    fn message(&mut self, wanted: impl Fn(&Value) -> bool) -> Result<Value> {
        loop {
            let mut line = String::new();
            if self.reader.read_line(&mut line)? == 0 {
                bail!("QEMU hung up");
            }
            let message: Value = serde_json::from_str(&line)?;
            if wanted(&message) {
                return Ok(message);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    /// A QEMU that says these lines, each after a line from us but the first.
    fn converse(lines: &'static [&str]) -> (tempfile::TempDir, Result<Qmp>) {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("qmp");
        let listener = UnixListener::bind(&socket).unwrap();
        std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut said = BufReader::new(stream.try_clone().unwrap()).lines();
            for line in lines {
                writeln!(stream, "{line}").unwrap();
                if said.next().is_none() {
                    return;
                }
            }
        });
        let qmp = Qmp::connect(&socket);
        (dir, qmp)
    }

    const GREETING: &str = "{\"QMP\": {\"version\": {}, \"capabilities\": []}}";

    #[test]
    fn events_between_question_and_answer_are_passed_over() {
        let (_dir, qmp) = converse(&[
            GREETING,
            "{\"return\": {}}",
            "{\"event\": \"DEVICE_DELETED\", \"data\": {}}\n{\"return\": 7}",
        ]);
        assert_eq!(qmp.unwrap().execute("x", &json!({})).unwrap(), 7);
    }

    #[test]
    fn what_qemu_says_against_a_command_is_the_error() {
        let error = "{\"error\": {\"class\": \"GenericError\", \"desc\": \"no such bus\"}}";
        let lines: &'static [&str] = Box::leak(Box::new([GREETING, "{\"return\": {}}", error]));
        let (_dir, qmp) = converse(lines);
        let error = format!("{:#}", qmp.unwrap().execute("device_add", &json!({})).unwrap_err());
        assert!(error.contains("no such bus") && error.contains("device_add"), "{error}");
    }

    #[test]
    fn nobody_at_the_socket_is_an_error_that_names_it() {
        let error = format!("{:#}", Qmp::connect(Path::new("/no/such/socket")).unwrap_err());
        assert!(error.contains("/no/such/socket"), "{error}");
    }
}
