//! A typed client for the boot server's `/v1`, and for whatever else answers HTTP in the lab. Every request is made
//! from inside the lab's namespace.

use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use protocol::api::{ErrorBody, ImageSetRecord, NodeRecord, PowerBody, Roll, RollRequest};
use protocol::ids::NodeId;
use protocol::node::PowerAction;
use serde::Serialize;
use serde::de::DeserializeOwned;
use ureq::Agent;
use ureq::http::{Method, Request};

use crate::namespace::Entrance;

/// How long one request may take. A loaded server in a loaded lab answers well within.
const REQUEST: Duration = Duration::from_secs(10);
/// Most bytes of an answer.
const MAX_ANSWER: u64 = 16 << 20;

/// A client of one boot server.
#[derive(Debug, Clone)]
pub struct Client {
    entrance: Entrance,
    agent: Agent,
    base: String,
}

/// An HTTP agent that fails after `timeout`, keeps no connection, and knows of no proxy outside the lab.
pub(crate) fn agent(timeout: Duration) -> Agent {
    Agent::config_builder()
        .timeout_global(Some(timeout))
        .http_status_as_error(false)
        .proxy(None)
        .max_idle_connections(0)
        .build()
        .into()
}

impl Client {
    /// A client of the server with this base URL.
    #[must_use]
    pub fn new(entrance: Entrance, base: &str) -> Self {
        Self { entrance, agent: agent(REQUEST), base: base.trim_end_matches('/').to_owned() }
    }

    /// The way into the lab that this client takes.
    #[must_use]
    pub fn entrance(&self) -> &Entrance {
        &self.entrance
    }

    /// Every node of the inventory.
    ///
    /// # Errors
    /// When the server does not answer, or answers otherwise.
    pub fn nodes(&self) -> Result<Vec<NodeRecord>> {
        self.get("/v1/nodes")
    }

    /// One node; none when the server does not know it.
    ///
    /// # Errors
    /// When the server does not answer, or answers otherwise.
    pub fn node(&self, id: &NodeId) -> Result<Option<NodeRecord>> {
        Ok(self.nodes()?.into_iter().find(|node| node.id == *id))
    }

    /// Every ImageSet in the server's registry.
    ///
    /// # Errors
    /// When the server does not answer, or answers otherwise.
    pub fn imagesets(&self) -> Result<Vec<ImageSetRecord>> {
        self.get("/v1/imagesets")
    }

    /// Switches a node off, or reboots it.
    ///
    /// # Errors
    /// When the server refuses or does not answer.
    pub fn power(&self, id: &NodeId, action: PowerAction) -> Result<()> {
        let path = format!("/v1/nodes/{id}/power");
        self.request(&Method::POST, &path, Some(&PowerBody { action })).map(drop)
    }

    /// Starts a roll of these nodes (`all` is every one) to this version.
    ///
    /// # Errors
    /// When the server refuses or does not answer.
    pub fn start_roll(&self, nodes: &[&str], imageset: &str) -> Result<Roll> {
        let request = RollRequest {
            nodes: nodes.iter().map(|node| (*node).to_owned()).collect(),
            imageset: imageset.to_owned(),
            force: false,
        };
        decode("/v1/rolls", &self.request(&Method::POST, "/v1/rolls", Some(&request))?)
    }

    /// A roll.
    ///
    /// # Errors
    /// When the server does not answer, or answers otherwise.
    pub fn roll(&self, id: u64) -> Result<Roll> {
        self.get(&format!("/v1/rolls/{id}"))
    }

    /// Whether the server answers at all.
    #[must_use]
    pub fn answers(&self) -> bool {
        self.request::<()>(&Method::GET, "/v1/version", None).is_ok()
    }

    /// Whatever this URL answers with, as text.
    ///
    /// # Errors
    /// When nothing answers within this time, or with another status than 200.
    pub fn get_text(&self, url: &str, timeout: Duration) -> Result<String> {
        let agent = agent(timeout);
        let (status, body) = self.entrance.inside(|| call(&agent, &Method::GET, url, None))??;
        let body = String::from_utf8_lossy(&body).into_owned();
        if status != 200 {
            bail!("{url} answered {status}: {body}");
        }
        Ok(body)
    }

    fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T> {
        decode(path, &self.request::<()>(&Method::GET, path, None)?)
    }

    fn request<B: Serialize + Sync>(
        &self,
        method: &Method,
        path: &str,
        body: Option<&B>,
    ) -> Result<Vec<u8>> {
        let url = format!("{}{path}", self.base);
        let body = body.map(serde_json::to_vec).transpose().context("cannot encode a request")?;
        let (status, answer) =
            self.entrance.inside(|| call(&self.agent, method, &url, body.as_deref()))??;
        if (200..300).contains(&status) {
            return Ok(answer);
        }
        let text = String::from_utf8_lossy(&answer);
        Err(match serde_json::from_slice::<ErrorBody>(&answer) {
            Ok(said) => anyhow!("{method} {url}: {} ({})", said.error.message, said.error.code),
            Err(_) => anyhow!("{method} {url} answered {status}: {text}"),
        })
    }
}

fn decode<T: DeserializeOwned>(path: &str, answer: &[u8]) -> Result<T> {
    serde_json::from_slice(answer).with_context(|| {
        format!("{path} answered what is not understood: {}", String::from_utf8_lossy(answer))
    })
}

/// One request on the calling thread: status and body.
fn call(agent: &Agent, method: &Method, url: &str, body: Option<&[u8]>) -> Result<(u16, Vec<u8>)> {
    let request = Request::builder().method(method).uri(url);
    let answer = match body {
        Some(body) => {
            let request = request.header("content-type", "application/json");
            agent.run(request.body(body).with_context(|| format!("bad request {url}"))?)
        }
        None => agent.run(request.body(()).with_context(|| format!("bad request {url}"))?),
    };
    let mut answer = answer.with_context(|| format!("{method} {url} failed"))?;
    let status = answer.status().as_u16();
    let body = answer
        .body_mut()
        .with_config()
        .limit(MAX_ANSWER)
        .read_to_vec()
        .with_context(|| format!("the answer of {url} broke off"))?;
    Ok((status, body))
}
