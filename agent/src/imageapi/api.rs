//! One request of the ImageAPI from its head and body to its answer. Knows no sockets.

use std::sync::Arc;

use serde::Serialize;

use super::engine::Engine;
use super::error::ApiError;
use super::route::{self, Call, Request};
use super::table::{Refusal, Sort};

/// An answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// The HTTP status.
    pub status: u16,
    /// JSON.
    pub body: Vec<u8>,
    /// Value of the header `Warning` (RFC 7234, 5.5), where there is something to say.
    pub warning: Option<String>,
}

/// Answers one request. May take as long as a pull or a stop does.
#[must_use]
pub fn answer(engine: &Arc<Engine>, request: &Request<'_>) -> Answer {
    let result = route::read(request).and_then(|(call, unknown)| {
        let (status, body) = perform(engine, call)?;
        Ok((status, body, warning(&unknown)))
    });
    match result {
        Ok((status, body, warning)) => Answer { status, body, warning },
        Err(error) => refusal(&error),
    }
}

/// The answer that is an error.
#[must_use]
pub fn refusal(error: &ApiError) -> Answer {
    let body = serde_json::to_vec(&error.body()).unwrap_or_default();
    Answer { status: error.status, body, warning: None }
}

/// The fields that nobody knows, as one value of printable ASCII.
fn warning(unknown: &[String]) -> Option<String> {
    let clean = |name: &String| -> String {
        let known = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
        name.chars().take(60).map(|c| if known(c) { c } else { '?' }).collect()
    };
    let names: Vec<String> = unknown.iter().map(clean).collect();
    let text = format!("299 layercake \"unknown fields were ignored: {}\"", names.join(", "));
    (!names.is_empty()).then_some(text)
}

fn perform(engine: &Arc<Engine>, call: Call) -> Result<(u16, Vec<u8>), ApiError> {
    match call {
        Call::ListAttachments { id: Some(id), .. } => {
            let found = engine.present().table.attach(id);
            json(200, &[found.ok_or(Refusal::Absent(Sort::Attach, id))?])
        }
        Call::ListAttachments { id: None, kind } => {
            json(200, &engine.present().table.attachments(kind))
        }
        Call::Attach(spec) => json(201, &engine.attach(*spec)?),
        Call::Detach { id, force } => {
            let shown = engine.present().table.attach(id);
            engine.remove(Sort::Attach, id, force)?;
            json(200, &shown.map(|attach| super::types::Attach { refs: 0, ..attach }))
        }
        Call::ListMounts { id: Some(id), .. } => {
            let found = engine.present().table.mount(id);
            json(200, &[found.ok_or(Refusal::Absent(Sort::Mount, id))?])
        }
        Call::ListMounts { id: None, kind } => json(200, &engine.present().table.mounts(kind)),
        Call::Mount(spec) => json(201, &engine.mount(*spec)?),
        Call::Unmount { id, force } => {
            let shown = engine.present().table.mount(id);
            engine.remove(Sort::Mount, id, force)?;
            json(200, &shown.map(|mount| super::types::Mount { refs: 0, ..mount }))
        }
        Call::ListContainers { which: Some(which), .. } => {
            let id = engine.which(&which)?;
            json(200, &[engine.shown(id)?])
        }
        Call::ListContainers { which: None, state } => {
            let present = engine.present();
            let ids = present.table.containers().map(|(id, ..)| id);
            let shown = ids.filter_map(|id| present.table.container(id));
            let wanted = |it: &super::types::Container| state.is_none() || it.state == state;
            json(200, &shown.filter(wanted).collect::<Vec<_>>())
        }
        Call::Create(spec) => json(201, &engine.create(*spec)?),
        Call::Delete { which, force } => {
            let id = engine.which(&which)?;
            json(200, &engine.delete(id, force)?)
        }
        Call::SetState { which, run } => {
            let id = engine.which(&which)?;
            if run {
                engine.start(id)?
            } else {
                engine.stop(id)?
            }
            json(200, &engine.shown(id)?)
        }
    }
}

fn json(status: u16, document: &impl Serialize) -> Result<(u16, Vec<u8>), ApiError> {
    let body = serde_json::to_vec(document).map_err(ApiError::internal)?;
    Ok((status, body))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_warning_holds_no_character_that_a_header_must_not() {
        assert_eq!(warning(&[]), None);
        let unknown = ["a.b".to_owned(), "x\"\r\nSet-Cookie: y\u{e4}".to_owned()];
        let text = "299 layercake \"unknown fields were ignored: a.b, x???Set-Cookie??y?\"";
        assert_eq!(warning(&unknown).as_deref(), Some(text));
    }
}
